# Tangled from notebooks/22_config.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.config import vary
from speedrun.measure.runs import corpus_of, train_arms
from speedrun.presets import preset


# %% Ablations of the laptop's choices
from typing import Any

from speedrun.lab.provenance import stamp

NAMES = ("laptop", "short")
SEEDS = 3
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
    runs = {arm: vary(laptop, change) for arm, change in arms.items()}
    modules = ["speedrun.measure.config", "speedrun.train"]
    facts = stamp(command, modules, SEEDS, range(SEEDS), corpus_of(laptop))
    return {"arms": train_arms(runs, SEEDS, facts)}, facts
