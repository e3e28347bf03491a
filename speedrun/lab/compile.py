# Tangled from notebooks/16_compile.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% torch.compile, and where to cut
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor


def compiled_copy(function: Callable, on: bool = True) -> Callable:
    """The function under torch.compile, as one graph, if `on`: a copy of it, since compiled code is kept by function, and shapes are many."""
    if not on:
        return function
    code, known = function.__code__.replace(), function.__globals__
    own = FunctionType(code, known, function.__name__, function.__defaults__)
    return torch.compile(own, dynamic=False, fullgraph=True)


# %% CUDA graphs
def new_stream(device: torch.device) -> Any:
    """A stream of a GPU; None elsewhere."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class GraphedCall:
    """A function without arguments, called; or, with a stream, recorded in it after `plain` such calls and replayed from then on.

    Graphs that run at once need streams of their own: recorded in one, they share its scratch memory for products. Graphs that run one
    after the other may share a pool of memory.
    """

    graph: Any = None

    def __init__(self, function: Callable[[], Any], stream: Any = None, pool: Any = None, plain=2):
        self.function, self.stream, self.pool, self.plain = function, stream, pool, plain

    def __call__(self) -> None:
        if self.stream is None or self.plain:
            self.plain -= 1
            self.function()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # thread_local: else what NCCL's own thread asks the GPU meanwhile would break the recording
            own = {"stream": self.stream, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(self.graph, self.pool, **own):
                self.function()
        self.graph.replay()


class Recorder:
    """Functions of tensors that return a number, called; on a GPU, if `on`, those that are called while `recording` is true become CUDA graphs, one for each key. Inputs are copied to where the graph reads them.

    Whatever else a function reads has to stay in its place, and to be the same in each call with one key. It has to have been called before.
    """

    recording = False

    def __init__(self, device: torch.device, on: bool = True):
        self.device, self.stream = device, new_stream(device) if on else None
        self.pool = torch.cuda.graph_pool_handle() if self.stream else None
        self.calls: dict[Any, tuple[GraphedCall, list[Tensor], Tensor]] = {}

    def __call__(self, key: Any, function: Callable, tensors: Sequence[Tensor]) -> Tensor:
        """The function's result for tensors on any device, (): where the next call with this key writes its own. Python does not wait."""
        if key not in self.calls:
            if not self.recording:
                return function(*tensors)
            places = [tensor.to(self.device, copy=True) for tensor in tensors]
            result = torch.zeros((), device=self.device)
            call = GraphedCall(lambda: result.copy_(function(*places)), self.stream, self.pool, 0)
            self.calls[key] = call, places, result
        call, places, result = self.calls[key]
        for place, tensor in zip(places, tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        call()
        return result
