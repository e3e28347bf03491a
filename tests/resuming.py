"""A run that is broken off and resumed, beside the whole one: for every test of a stage that a run may stop in."""

from pathlib import Path

import torch

from speedrun.config import Config, vary
from speedrun.train import train


def broken_and_resumed(run: Config, folder: Path, stop: int) -> tuple:
    """The run in one go, and stopped before step `stop` and resumed; their weights are equal to the bit."""
    whole = train(run, folder / "whole", echo=None)
    train(vary(run, {"max_steps": stop}), folder / "broken", echo=None)
    again = train(run, folder / "broken", again=True, echo=None)
    wanted = dict(whole.model.named_parameters())
    for name, p in again.model.named_parameters():
        assert torch.equal(p, wanted[name]), name
    return whole, again
