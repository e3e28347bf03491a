"""A run that is broken off and resumed, beside the whole one: for every test of the steps that a run may stop in."""

from pathlib import Path

import torch

from speedrun.config import Config, vary
from speedrun.train import train


def broken_and_resumed(run: Config, folder: Path, *stops: int, whole=None) -> tuple:
    """The run in one go, unless it is given, and stopped before each of the steps and resumed; weights are equal to the bit."""
    whole = whole or train(run, folder / "whole", echo=None)
    for stop in sorted(stops):
        part, begun = vary(run, {"max_steps": stop}), (folder / "broken").exists()
        assert train(part, folder / "broken", again=begun, echo=None).step == stop
    again = train(run, folder / "broken", again=True, echo=None)
    wanted = dict(whole.model.named_parameters())
    for name, p in again.model.named_parameters():
        assert torch.equal(p, wanted[name]), name
    return whole, again
