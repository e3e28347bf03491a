# Tangled from notebooks/06_rotary.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The measurement
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from speedrun.config import Config, vary
from speedrun.lab.hardware import detect_machine
from speedrun.lab.provenance import stamp
from speedrun.measure.runs import best_of, corpus_of, train_arms, train_many

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


def loss_by_position(run: Config) -> dict[str, list[float]]:
    """Train a run; then the mean loss of each position in validation rows of twice the length, and of the same tokens in rows of its own."""
    from speedrun.model.gpt import GPT
    from speedrun.train import build_run, val_batches, train_step

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        live = build_run(run, Path(folder), echo=None)
        for _ in range(run.steps):
            train_step(live)
        twice = 2 * run.data.seq_len
        live.config = vary(run, {"data.seq_len": twice, "model.max_seq_len": twice})
        longer = GPT(live.config.model, live.model.vocab_size).to(live.ranks.device)
        longer.load_state_dict(live.model.state_dict())
        found: dict[str, list[Tensor]] = {"twice": [], "own": []}
        with torch.no_grad():
            for batch in val_batches(live, run.val_tokens):
                for name, model, length in (
                    ("twice", longer, twice),
                    ("own", live.model, twice // 2),
                ):
                    logits = model(batch.inputs.view(-1, length)).flatten(0, 1)
                    losses = F.cross_entropy(logits, batch.targets.flatten(), reduction="none")
                    found[name].append(losses.view(-1, twice))
    return {name: torch.cat(losses).mean(0).tolist() for name, losses in found.items()}


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train the arms with paired seeds, {"arms": {arm: [run, …]}}; long: for 2,000 steps.

    beyond: each arm's loss by position, {"arms": {arm: [{"twice": losses, "own": losses}, …]}}.
    """
    arms, seeds = arms_of(name), 3 if name == "long" else 5
    facts = stamp(command, ["speedrun.measure.rotary", "speedrun.train"], seeds, range(seeds), corpus_of(arms["half 1024"]))  # fmt: skip
    if name != "beyond":
        return {"arms": train_arms(arms, seeds, train_many)}, facts
    runs = [vary(run, {"seed": seed}) for run in arms.values() for seed in range(seeds)]
    with ProcessPoolExecutor(detect_machine().cores, get_context("spawn")) as pool:
        found = list(pool.map(loss_by_position, runs))
    return {"arms": {arm: found[5 * n : 5 * n + 5] for n, arm in enumerate(arms)}}, facts
