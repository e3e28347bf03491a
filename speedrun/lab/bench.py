# Tangled from notebooks/04_measuring.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% One call
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile


def wait_for(device: str) -> None:
    """Until the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def clocked(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Milliseconds until a work is done, and until Python is."""
    wait_for(device)
    begin = time.perf_counter()
    work()
    python = time.perf_counter()
    wait_for(device)
    return 1000 * (time.perf_counter() - begin), 1000 * (python - begin)


# %% Several calls, in turn
SCRATCH = {"cpu": 2**27, "cuda": 2**29}  # bytes: several times the caches


class Times(NamedTuple):
    """The 20th, 50th and 80th percentile of a call's times in ms, and of how many samples."""

    p20: float
    p50: float
    p80: float
    n: int


def times_of(samples: Sequence[float]) -> Times:
    """Percentiles of samples, in their unit."""
    low, middle, high = np.quantile(samples, (0.2, 0.5, 0.8)).tolist()
    return Times(low, middle, high, len(samples))


def sample_ms(call: Callable[[], Any], device: str = "cpu", events: bool = False, scratch: Any = None) -> float:  # fmt: skip
    """Milliseconds of one call. events: between two events of a GPU, else by the host's clock. scratch: a tensor that is written first."""
    if scratch is not None:
        for _ in range(4 if events else 1):  # meanwhile Python queues what comes
            scratch.zero_()
    if not events:
        return clocked(call, device)[0]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def as_graph(call: Callable[[], Any]) -> Callable[[], None]:
    """The call's kernels, recorded as a CUDA graph: what it returns launches them all at once, and nothing else."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def sample_in_turn(
    functions: Mapping[str, Callable[[], Any]], device: str = "cpu", rounds: int = 20, warm_up: int = 3,
    events: bool = False, cold: bool = False, graph: bool = False,
) -> dict[str, list[float]]:  # fmt: skip
    """Milliseconds of each function in each round, (rounds,) by name. In a round each is called once, in this order; `warm_up` rounds do not count."""
    calls = {name: as_graph(call) if graph else call for name, call in functions.items()}
    scratch = None
    if cold:
        scratch = torch.empty(SCRATCH[device], dtype=torch.uint8, device=device)
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            ms = sample_ms(call, device, events, scratch)
            if number >= warm_up:
                found[name].append(ms)
    return found


def bench(
    functions: Mapping[str, Callable[[], Any]], device: str = "cpu", rounds: int = 20, warm_up: int = 3,
    cold: bool = False, graph: bool = False,
) -> dict[str, Times]:  # fmt: skip
    """Times of functions, called in turn: on a GPU of their kernels, by events, on a CPU by the clock.

    cold: caches are filled with something else before each call. graph: each is replayed as a CUDA graph (GPU only).
    """
    events = device == "cuda"
    taken = sample_in_turn(functions, device, rounds, warm_up, events, cold, graph)
    return {name: times_of(samples) for name, samples in taken.items()}


# %% The roof
class Peak(NamedTuple):
    """What a machine does at best: FLOPs a second, bytes a second between chip and memory."""

    flops_s: float
    bytes_s: float


PEAKS = {  # dense bf16 with float32 sums; NVIDIA's data sheets of the SXM forms, nvidia.com/en-us/data-center/…
    "A100": Peak(312e12, 2.039e12),  # a100, 80 GB
    "H100": Peak(989e12, 3.35e12),  # h100
    "H200": Peak(989e12, 4.8e12),  # h200
}


def roofline_ms(flops: float, bytes_moved: float, peak: Peak) -> float:
    """Least time in ms: arithmetic or memory, whichever takes longer (Williams et al. 2009)."""
    return 1000 * max(flops / peak.flops_s, bytes_moved / peak.bytes_s)


def measure_peak(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 512, copied: int = 2**27) -> Peak:  # fmt: skip
    """The peak of this machine, as a product of two matrices (size, size) and a copy of so many bytes show it, each in its least time."""
    a, b, c = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    works = {"product": lambda: torch.mm(a, b, out=c), "copy": lambda: target.copy_(source)}
    taken = sample_in_turn(works, device, rounds=20, events=device == "cuda")
    return Peak(2e3 * size**3 / min(taken["product"]), 2e3 * copied / min(taken["copy"]))


# %% Every product of the model
class Product(NamedTuple):
    """`repeats` products of a (rows, inner) and an (inner, cols) matrix. size: bytes of an element."""

    rows: int
    inner: int
    cols: int
    repeats: int = 1
    size: int = 2

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.cols * self.repeats

    @property
    def bytes_moved(self) -> int:
        """If each operand is read once, and the result written once."""
        pairs = (self.rows, self.inner), (self.inner, self.cols), (self.rows, self.cols)
        return self.size * self.repeats * sum(a * b for a, b in pairs)

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes_moved


# %% A step by kind
KINDS = {  # kind → what its kernels are called; the first that matches counts
    "communication": r"nccl|gloo|all_?reduce|reduce_?scatter|all_?gather",
    "attention": r"flash|fmha|attention|sdpa|cudnn_generated|^(?:forward|delta|dkv|dq)_kernel",
    "head": r"softmax|nll_loss|cross_entropy|log_sum",
    "optimizer": r"multi_tensor|adam|lpnorm|foreach",
    "matmul": r"gemm|nvjet|cutlass|xmma|addmm|aten::b?mm|matmul|aten::linear",
    "gathers and scatters": r"embedding|index|gather|scatter",
}
NO_KERNELS = ("nccl:", "gloo:", "ProfilerStep", "record_param_comms")  # names of other spans


def kind_of(kernel: str, kinds: Mapping[str, str] = KINDS, other: str = "pointwise") -> str:
    """The kind of a kernel, by its name. The head's product is a matmul, unless it is fused with the loss."""
    found = (kind for kind, pattern in kinds.items() if re.search(pattern, kernel, re.IGNORECASE))
    return next(found, other)


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals (begin, end), in their unit."""
    total, reach = 0.0, -float("inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reach))
        reach = max(reach, end)
    return total


def kernel_times(seen: Any, device: str) -> tuple[dict[str, float], float]:
    """What a profile saw: milliseconds of each kernel by name (on a CPU: of each operation without those it calls), and how long any ran."""
    if device == "cpu":
        times = {event.key: event.self_cpu_time_total / 1000 for event in seen.key_averages()}
        return times, sum(times.values())
    on_gpu = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [e for e in on_gpu if not e.name.startswith(NO_KERNELS)]
    found: dict[str, float] = {}
    for event in kernels:
        found[event.name] = found.get(event.name, 0.0) + event.time_range.elapsed_us() / 1000
    spans = [(event.time_range.start, event.time_range.end) for event in kernels]
    return found, covered(spans) / 1000


def ledger(step: Callable[[], Any], device: str = "cpu", repeats: int = 3, kinds: Mapping[str, str] = KINDS, other: str = "pointwise") -> dict[str, float]:  # fmt: skip
    """Milliseconds of one step, after three: `wall` without the profiler, then by kind of kernel, and `gaps`, what the kernels leave of the wall time."""

    def steps() -> None:
        for _ in range(repeats):
            step()

    for _ in range(3):
        step()
    found = {"wall": clocked(steps, device)[0] / repeats}
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as seen:
        clocked(steps, device)
    times, busy = kernel_times(seen, device)
    for name, ms in times.items():
        kind = kind_of(name, kinds, other)
        found[kind] = found.get(kind, 0.0) + ms / repeats
    return found | {"gaps": max(0.0, found["wall"] - busy / repeats)}
