# Tangled from notebooks/22_config.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.config import vary
from speedrun.measure.runs import corpus_of, train_many
from speedrun.presets import preset


# %% Ablations of the laptop's choices
from typing import Any

from speedrun.lab.provenance import stamp

NAMES = ("laptop", "short")
SEEDS = (0, 1, 2)
START: dict[str, Any] = {"data.seq_len": 64, "model.max_seq_len": 64, "steps": 9000}
ARMS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "deviation 0.02, GPT-2's": {"model.init_std": 0.02},
    "deviation 0.10": {"model.init_std": 0.10},
    "half the rate": {"optim.adam.lr": 1e-3},
    "twice the rate": {"optim.adam.lr": 4e-3},
    "half the batch": {"data.batch_tokens": 512, "steps": 18_000},
    "twice the batch": {"data.batch_tokens": 2048, "steps": 4500},
    "rows of 32": {"data.seq_len": 32, "model.max_seq_len": 32},
    "rows of 128": {"data.seq_len": 128, "model.max_seq_len": 128},
    "one layer": {"model.num_layers": 1},
    "four layers": {"model.num_layers": 4},
}


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train the arms with each seed: {"arms": {arm: [run, …]}}.

    laptop: all ARMS to the end. short: two lengths of rows, for a third of the steps.
    """
    short = {arm: ARMS[arm] | {"steps": 3000} for arm in ("as it is", "rows of 128")}
    arms, laptop = (short if name == "short" else ARMS), vary(preset("cpu_gpt2"), START)
    runs = {(a, s): vary(laptop, arms[a] | {"seed": s}) for a in arms for s in SEEDS}
    done = dict(zip(runs, train_many(list(runs.values()))))
    modules = ["speedrun.measure.config", "speedrun.train"]
    facts = stamp(command, modules, len(SEEDS), SEEDS, corpus_of(laptop))
    return {"arms": {a: [done[a, s] for s in SEEDS] for a in arms}}, facts
