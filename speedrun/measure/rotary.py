# Tangled from notebooks/06_rotary.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The measurement
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from speedrun.config import Config, vary
from speedrun.lab.provenance import stamp
from speedrun.measure.runs import best_of, corpus_of, train_arms

if TYPE_CHECKING:
    from speedrun.run import Run

NAMES = ("positions", "long", "beyond")
ARMS: dict[str, dict[str, Any]] = {
    "rotary 10000": {"model.rotary.pos": "rope"},
    "rotary 1024": {"model.rotary.pos": "rope", "model.rotary.base": 1024.0},
    "half 1024": {"model.rotary.pos": "half_rope", "model.rotary.base": 1024.0},
}


def arms_of(name: str) -> dict[str, Config]:
    """Three ways to turn; the modern block else, at its tuned rates. Chapter 05 has it with learned positions."""
    modern = best_of("modern_block", "rates")
    modern = vary(
        modern, {"steps": 2000, "schedule.momentum_ramp": (460, 80)} if name == "long" else {}
    )
    return {arm: vary(modern, change) for arm, change in ARMS.items()}


@torch.no_grad()
def loss_by_position(live: "Run") -> dict[str, list[float]]:
    """The mean loss of each position in validation rows of twice a trained run's length, and of the same tokens in rows of its own."""
    from speedrun.model.gpt import GPT
    from speedrun.train import val_batches

    own, found = live.config.data.seq_len, dict[str, list[Tensor]](twice=[], own=[])
    live.config = vary(live.config, {"data.seq_len": 2 * own, "model.max_seq_len": 2 * own})
    longer = GPT(live.config.model, live.model.vocab_size).to(live.ranks.device)
    longer.load_state_dict(live.model.state_dict())
    for batch in val_batches(live, live.config.val_tokens):
        for name, model, length in (("twice", longer, 2 * own), ("own", live.model, own)):
            logits = model(batch.inputs.view(-1, length)).flatten(0, 1)
            losses = F.cross_entropy(logits, batch.targets.flatten(), reduction="none")
            found[name].append(losses.view(-1, 2 * own))
    return {name: torch.cat(losses).mean(0).tolist() for name, losses in found.items()}


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train the arms with paired seeds, {"arms": {arm: [run, …]}}; long: for 2,000 steps.

    beyond: also each run's loss by position, "twice" and "own".
    """
    arms, seeds = arms_of(name), 3 if name == "long" else 5
    facts = stamp(command, ["speedrun.measure.rotary", "speedrun.train"], seeds, range(seeds), corpus_of(arms["half 1024"]))  # fmt: skip
    after = loss_by_position if name == "beyond" else None
    return {"arms": train_arms(arms, seeds, facts, after=after)}, facts
