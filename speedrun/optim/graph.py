# Tangled from notebooks/20_many_gpus.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% CUDA graphs: scalars in device memory
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
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


class GraphedCall:
    """A function without arguments, called; or, with a stream, recorded in it at its third call and replayed from then on.

    Graphs that run at once need streams of their own: recorded in one, they share its scratch memory for products.
    """

    graph: Any = None

    def __init__(self, function: Callable[[], None], stream: Any = None):
        self.function, self.calls, self.stream = function, 0, stream

    def __call__(self) -> None:
        self.calls += 1
        if self.stream is None or self.calls < 3:
            return self.function()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # thread_local: else what NCCL's own thread asks the GPU meanwhile would break the recording
            with torch.cuda.graph(
                self.graph, stream=self.stream, capture_error_mode="thread_local"
            ):
                self.function()
        self.graph.replay()


def compile_update(function: Callable, on: bool) -> Callable:
    """The function, fused for a GPU if `on`: a copy of it, since compiled code is kept by function, and shapes are many."""
    if not on:
        return function
    code, known = function.__code__.replace(), function.__globals__
    own = FunctionType(code, known, function.__name__, function.__defaults__)
    return torch.compile(own, dynamic=False, fullgraph=True)


def new_stream(device: torch.device) -> Any:
    """A stream of a GPU; None elsewhere."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """On a GPU: what is begun here runs in a stream of its own, after all that was begun before."""
    if stream is None:
        yield
    else:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
