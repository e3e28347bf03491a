# Tangled from notebooks/07_plumbing.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% x0's sign with one matrix and with two
from typing import Any

from speedrun.config import Config, vary
from speedrun.lab.provenance import stamp
from speedrun.measure.runs import best_of, corpus_of, train_arms

NAMES = ("heads",)
HEADS: dict[str, dict[str, Any]] = {"one matrix": {}, "two matrices": {"model.head.tie": "untied"}}
ONE_WIRE: dict[str, dict[str, Any]] = {
    "": {},
    ", x0": {"model.layout.x0": True},
    ", backout": {"model.layout.backout": True},
}


def arms_of() -> dict[str, Config]:
    """With one matrix for embedding and head, and with two: no wire, x0, backout; four layers, chapter 05's block and rates."""
    shape = {"model.num_layers": 4, "model.rotary.pos": "half_rope", "model.rotary.base": 1024.0}
    base = vary(
        best_of("modern_block", "rates"), shape | {"model.embedding.norm": True, "device": "cpu"}
    )
    return {
        head + wire: vary(base, of_head | of_wire)
        for head, of_head in HEADS.items()
        for wire, of_wire in ONE_WIRE.items()
    }


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train every arm with three seeds, {"arms": {arm: [run, …]}}, with its weights that mix over the run."""
    arms = arms_of()
    facts = stamp(command, ["speedrun.measure.plumbing", "speedrun.train"], 3, range(3), corpus_of(arms["one matrix"]))  # fmt: skip
    return {"arms": train_arms(arms, 3, facts)}, facts
