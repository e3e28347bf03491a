# Tangled from notebooks/20_many_gpus.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% CUDA graphs: scalars in device memory
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from speedrun.schedule import StepSettings


class StepScalars:
    """The step's learning rates and momentum: floats on a CPU, views of one vector on a GPU, which graphs read."""

    NAMES = ("lr", "matrix_lr", "momentum")

    def __init__(self, device: torch.device):
        self.vector = torch.zeros(len(self.NAMES), device=device)
        self.host = dict.fromkeys(self.NAMES, 0.0)

    def __getitem__(self, name: str) -> Any:
        gpu = self.vector.is_cuda
        return self.vector[self.NAMES.index(name)] if gpu else self.host[name]

    def set(self, settings: StepSettings) -> None:
        """Take a step's values; Python does not wait for the device."""
        self.host = {name: getattr(settings, name) for name in self.NAMES}
        if self.vector.is_cuda:
            values = torch.tensor(list(self.host.values()))
            self.vector.copy_(values.pin_memory(), non_blocking=True)


def bias_correction(beta: float | Tensor, updates: Tensor) -> Tensor:
    """1 − betaᵗ after t = updates (float64), as float32; before the first update as after it."""
    return (1 - beta ** updates.clamp(min=1)).float()


@contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """On a GPU: what is begun here runs in a stream of its own, after all that was begun before."""
    if stream is None:
        yield
    else:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
