# Tangled from notebooks/08_logits.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The measurement
from typing import Any

from speedrun.config import Config, vary
from speedrun.lab.provenance import stamp
from speedrun.measure.runs import best_of, corpus_of, train_arms

NAMES = ("laptop",)
ARMS: dict[str, dict[str, Any]] = {
    "tied, no cap": {},
    "untied, zeros": {"model.head.tie": "untied"},
    "untied, drawn at 0.05": {"model.head.tie": "untied", "model.head.std": 0.05},
    "untied, a quarter of the rate": {"model.head.tie": "untied", "model.head.lr_mul": 0.25},
    "untied, four times the rate": {"model.head.tie": "untied", "model.head.lr_mul": 4.0},
    "30 tanh(z/30)": {"model.head.softcap": "tanh30"},
    "15 tanh(z/15)": {"model.head.softcap": "tanh15"},
    "23 σ((z+5)/7.5)": {"model.head.softcap": "sigmoid23"},
}


def arms_of() -> dict[str, Config]:
    """Heads and caps; the modern block else, at its tuned rates."""
    return {arm: vary(best_of("modern_block", "rates"), change) for arm, change in ARMS.items()}


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train every arm with three seeds, {"arms": {arm: [run, …]}}."""
    arms = arms_of()
    facts = stamp(command, ["speedrun.measure.logits", "speedrun.train"], 3, range(3), corpus_of(arms["30 tanh(z/30)"]))  # fmt: skip
    return {"arms": train_arms(arms, 3, facts)}, facts
