# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   speedrun:
#     alone: true
# ---

# %% [markdown]
# # Measuring: clocks, FLOPs, rooflines, traces
#
# ```{admonition} Cost box
# Half a minute on two CPU cores; a minute on one GPU. What is said about an H100 comes from committed measurements and from its data sheet.
# The roofline is an idea of Samuel Williams, Andrew Waterman and David Patterson {cite}`williams2009`. Filling the cache before each sample, and reporting percentiles, are habits of Triton's `do_bench` {cite}`tillet2019`.
# ```
#
# ## The problem
#
# A GPU is a device with a queue. Python puts work into the queue and goes on; the device works it off in order. Whoever reads the clock before and after a line of Python has therefore timed the queueing. Here is a product of two matrices, timed that way. Without a GPU the device is a thread with a queue of its own, which behaves the same:

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
import math
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler says when it begins and ends
torch.set_num_threads(1)  # a thread more waits for the slowest core, and neighbours use cores
torch.manual_seed(0)
size = tier.pick(cpu=768, gpu=8192)
square = torch.randn(size, size, device=tier.device)
queue, jobs = ThreadPoolExecutor(1), []


def launch() -> None:
    """Hand a product to the device."""
    on_cpu = tier.device == "cpu"
    jobs.append(queue.submit(torch.matmul, square, square)) if on_cpu else square @ square


def finish() -> None:
    """Wait until the device has done all that it was given."""
    while jobs:
        jobs.pop().result()
    torch.cuda.synchronize() if tier.device == "cuda" else None


handed, done = [], []
for _ in range(7):
    begin = time.perf_counter()
    launch()
    handed.append(time.perf_counter() - begin)
    finish()
    done.append(time.perf_counter() - begin)
claimed, real = (2 * size**3 / statistics.median(each[1:]) for each in (handed, done))
assert claimed > 10 * real
print(f"without waiting {claimed / 1e12:,.1f} TFLOP/s, with waiting {real / 1e12:,.2f} TFLOP/s")
print(f"the first number is {claimed / real:,.0f} times the second")

# %% [markdown]
# The second number is right, and the first is not merely inexact: no device of this kind can be that fast. That is how such a mistake is noticed, if one knows what the device can do. Most wrong measurements are wrong by less, and nothing about them looks suspicious.
#
# ```{admonition} Prediction
# **Which of these changes a measured time by more than a factor of two: the first call instead of the second; data that the cache has already seen; one slow call among twenty; the order in which two functions are timed?** And before anything is timed at all: of the products in a training step of GPT-2 on an H100, which wait for memory rather than for arithmetic?
# ```
#
# ## The idea
#
# Two sums can be done before any clock is read. A product of a $(m, k)$ and a $(k, n)$ matrix takes $2mkn$ floating-point operations (FLOPs), a multiplication and an addition for each of $mkn$ pairs. It moves at least $s\,(mk + kn + mn)$ bytes, if each element has $s$ bytes, each operand is read once and the result written once. A device that does at most $P$ FLOPs a second and moves at most $B$ bytes a second then needs at least
#
# $$
# t \ge \max\!\left(\frac{\text{FLOPs}}{P}, \frac{\text{bytes}}{B}\right).
# $$
#
# Divide the FLOPs by this time, and draw the result against the *arithmetic intensity*, FLOPs per byte: the picture is a slope that ends in a flat line, a *roofline* {cite}`williams2009`. Left of the ridge, at $P/B$, a function waits for memory, and only fewer bytes make it faster. Right of it, it waits for arithmetic. A measured time is a point below the roof, and its distance from the roof is what is left to gain. A point *above* the roof means that something was measured wrongly, or counted wrongly.
#
# The rules for the clock are as short:
#
# 1. **Wait** for the device before reading the clock, at both ends.
# 2. **Warm up**: the first calls compile, allocate and choose.
# 3. **Say what is in the cache.** In training, a function's operands were often written just before; in a loop that repeats it, they always were.
# 4. **Take turns.** Machines drift; what is to be compared should drift together.
# 5. **Report percentiles**, and how many samples they are of. A mean is moved by whoever else uses the machine.
#
# ## The code
#
# ### A clock that can be stopped
#
# Training time is measured by one clock, which is stopped for everything that the contest does not count ([chapter 23](23_training_loop.py) has the rules). Waiting for the GPU at both ends is what makes it honest. On a CPU there is nothing to wait for.

# %%
#| default_exp lab.timer
#| export
import contextlib
import time

import torch


class TrainClock:
    """Training time in ms, stopped for whatever does not count. `elapsed_ms` may carry on from a checkpoint."""

    def __init__(self, device: torch.device, elapsed_ms: float = 0.0):
        self.device, self.elapsed_ms = device, elapsed_ms
        self.since: float | None = None

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def start(self) -> None:
        self.wait()
        self.since = time.perf_counter()

    def stop(self) -> None:
        self.wait()
        self.elapsed_ms, self.since = self.ms, None

    @property
    def ms(self) -> float:
        """Training time so far, without waiting for the device."""
        return self.elapsed_ms + (1000 * (time.perf_counter() - self.since) if self.since else 0.0)


# %%
#| export
@contextlib.contextmanager
def off_the_clock(clock: TrainClock, marks: "StepTimer | None" = None):
    """What happens in this block is not training time, nor part of a step for `marks`."""
    running = clock.since is not None
    clock.stop()
    yield
    if running:
        clock.start()
    if marks is not None:
        marks.restart()


# %%
clock = TrainClock(torch.device("cpu"))
clock.start()
time.sleep(0.05)
with off_the_clock(clock):
    time.sleep(0.2)
time.sleep(0.05)
clock.stop()
assert 100 <= clock.ms < 300, "two naps count, the pause does not"
with off_the_clock(clock):
    time.sleep(0.05)
assert clock.ms == clock.elapsed_ms, "a stopped clock stands still"
print(f"{clock.ms:.0f} ms of training in 350 ms of life")

# %% [markdown]
# Single steps are timed by marks. On a GPU a mark is an *event*: a note in the queue that says when the device came past it. Events are read later, so that looking at the time does not take any.


# %%
#| export
class StepTimer:
    """Durations of single steps: `mark` after each, `drain` now and then. On a GPU a mark costs no waiting."""

    def __init__(self, device: torch.device):
        self.device, self.marks, self.done = device, [], []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def drain(self) -> list[float]:
        """Milliseconds between successive marks since the last drain. The device must have been waited for."""
        pairs, done = list(zip(self.marks, self.marks[1:])), self.done
        self.marks, self.done = self.marks[-1:], []
        gpu = self.device.type == "cuda"
        return done + [a.elapsed_time(b) if gpu else 1000 * (b - a) for a, b in pairs]

    def restart(self) -> None:
        """Leave out what happened since the last mark: a validation, say."""
        self.done, self.marks = self.drain(), []
        self.mark()


# %%
marks = StepTimer(torch.device("cpu"))
marks.mark()
for nap in (0.02, 0.04):
    time.sleep(nap)
    marks.mark()
time.sleep(0.1)
marks.restart()  # the long nap does not count
time.sleep(0.02)
marks.mark()
naps = marks.drain()
assert (
    len(naps) == 3 and min(naps) >= 20 and naps[1] >= 40 and max(naps) < 100 and marks.drain() == []
)
print([f"{duration:.0f} ms" for duration in naps])

# %% [markdown]
# ### One call
#
# For a function, rather than a training run, two times are of interest: until its work is done, and until Python is free again. If both are equal, the device may be waiting for Python, or the call waited for it; on a CPU they always are.


# %%
#| default_exp lab.bench
#| export
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


# %%
done_ms, python_ms = clocked(lambda: time.sleep(0.01), "cpu")
assert 10 <= python_ms <= done_ms < 100
device_ms, host_ms = clocked(lambda: square @ square, tier.device)
assert 0 < host_ms <= device_ms
print(f"a product is done after {device_ms:.1f} ms; Python is free after {host_ms:.2f} ms")

# %% [markdown]
# ### Several calls, in turn
#
# A sample is one call: by the host's clock, or, on a GPU, between two events, which leaves out what Python did before the device began. `cold` writes a large buffer first, so that the caches hold nothing of use; on a GPU that also keeps the device busy while Python queues what comes, and the events stand close around the kernels. `graph` records the call once as a CUDA graph and replays it: what a function costs if it is never launched by Python ([chapter 16](16_compile.py)'s passes and [chapter 20](20_many_gpus.py)'s updates run that way).


# %%
#| export
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


# %%
#| export
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


# %%
#| export
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


# %%
order = []
naps = {
    "short": lambda: (order.append("short"), time.sleep(0.002)),
    "long": lambda: (order.append("long"), time.sleep(0.01)),
}
took = bench(naps, rounds=5, warm_up=1)
assert order == ["short", "long"] * 6, "in turn, the warm-up too"
assert took["short"].n == 5 and 2 <= took["short"].p20 <= took["short"].p50 <= took["short"].p80
assert took["long"].p50 > took["short"].p50
print({name: f"{times.p50:.1f} ms" for name, times in took.items()})

# %% [markdown]
# ### Four traps
#
# The device's queue is one way to be wrong. The other four need no GPU. **The first call**: a tensor that was just allocated has no memory yet. The operating system finds it page by page, when it is first written (a GPU's allocator, a library that chooses a kernel, and a compiler do likewise):

# %%
first, second = [], []
for _ in range(5):
    fresh = torch.empty(2**24)
    first.append(clocked(fresh.zero_, "cpu")[0])
    second.append(clocked(fresh.zero_, "cpu")[0])
    del fresh
first_ms, second_ms = statistics.median(first), statistics.median(second)
assert first_ms > 1.2 * second_ms
print(f"zeroing 64 MB: {first_ms:.1f} ms the first time, {second_ms:.1f} ms the second")

# %% [markdown]
# **The cache.** Summing a quarter of a megabyte takes quite another time where the numbers lie in the core's own cache than where they have to come from memory. Neither is wrong; they are answers to different questions.

# %%
numbers = torch.ones(2**16)
warm = bench({"sum": numbers.sum}, rounds=20)["sum"]
cold = bench({"sum": numbers.sum}, rounds=20, cold=True)["sum"]
assert cold.p50 > 1.5 * warm.p50
print(f"warm {1000 * warm.p50:.0f} µs, cold {1000 * cold.p50:.0f} µs")

# %% [markdown]
# **The mean.** Somebody else's program runs for a moment, or Python collects garbage. Here is one call of twenty that is interrupted, on purpose:

# %%
visits = iter(range(23))


def interrupted() -> None:
    """A call of two milliseconds; once in a while a neighbour comes in between."""
    time.sleep(0.1 if next(visits) == 11 else 0.002)


samples = sample_in_turn({"call": interrupted}, rounds=20)["call"]
mean, middle = statistics.mean(samples), times_of(samples).p50
assert mean > 2 * middle
print(f"mean {mean:.1f} ms, median {middle:.1f} ms")

# %% [markdown]
# **The order.** A chip that gets warm lowers its clock; so does a laptop on battery. Let every call take a little longer than the one before, and compare a function with itself, first one after the other and then in turn:


# %%
class Warming:
    """A machine that slows down with every call."""

    def __init__(self):
        self.calls = 0

    def work(self) -> None:
        self.calls += 1
        time.sleep(0.002 * (1 + self.calls / 20))


machine = Warming()
one, other = (bench({"it": machine.work}, rounds=12, warm_up=0)["it"] for _ in range(2))
machine = Warming()
both = bench({"one": machine.work, "other": machine.work}, rounds=12, warm_up=0)
apart, together = other.p50 / one.p50, both["other"].p50 / both["one"].p50
assert apart > 1.2 > 1.15 > together
print(f"one after the other: {apart:.2f} times as slow; in turn: {together:.2f} times")

# %% [markdown]
# Three of the four pass the factor of two (the interruption was staged). The order changed the result by less here, as much as this machine was told to drift; and no repetition cures it: the functions have to take turns.
#
# ### The roof
#
# What a machine does at best can be read from its data sheet, or measured with a large product and a large copy. A data sheet promises more than any product reaches; a measurement is fairer, and is the only way for a CPU.


# %%
#| export
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


# %%
peak = measure_peak(tier.device, size=tier.pick(cpu=512, gpu=8192))
ridge = peak.flops_s / peak.bytes_s
assert 1e9 < peak.bytes_s < peak.flops_s < 1e16
assert roofline_ms(peak.flops_s, 0, peak) == roofline_ms(0, peak.bytes_s, peak) == 1000
h100 = PEAKS["H100"]
ridge_h100 = h100.flops_s / h100.bytes_s
print(f"here, float32: {peak.flops_s / 1e9:,.0f} GFLOP/s, {peak.bytes_s / 1e9:,.0f} GB/s")
print(f"the ridge is at {ridge:.0f} FLOPs a byte here, at {ridge_h100:.0f} on an H100 with bf16")

# %% [markdown]
# ### Every product of the model
#
# GPT-2 has five kinds of matrices: `qkv`, `out`, `up` and `down` in each layer, and the head. Each is multiplied three times in a training step: forward, for the gradient of its input, and for its own. The three have equal FLOPs and different shapes.


# %%
#| export
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


# %%
from speedrun.model.gpt import GPTConfig, flops_per_token


def products_of(config: GPTConfig, vocab: int, tokens: int, size: int) -> dict:
    """(matrix, which of the three) → Product, of a training step on so many tokens."""
    d, layers = config.model_dim, config.num_layers
    shapes = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
    found = {}
    for name, (k, n) in (shapes | {"head": (d, vocab)}).items():
        repeats = 1 if name == "head" else layers
        found[name, "forward"] = Product(tokens, k, n, repeats, size)
        found[name, "input's gradient"] = Product(tokens, n, k, repeats, size)
        found[name, "weights' gradient"] = Product(k, tokens, n, repeats, size)
    return found


gpt2, vocab, tokens = GPTConfig(), 50_257, 32 * 1024
theirs = products_of(gpt2, vocab, tokens, 2)
counted = sum(product.flops for product in theirs.values())
assert counted == flops_per_token(gpt2, vocab, 0) * tokens, "every weight, six FLOPs a token"
least = min(theirs.values(), key=lambda product: product.intensity)
memory_bound = [p for p in theirs.values() if p.intensity < ridge_h100]
assert not memory_bound and least == theirs["out", "forward"]
print(f"{counted / 1e12:.1f} TFLOP in the products of one step")
print(f"the least intense of them has {least.intensity:.0f} FLOPs a byte")

# %% [markdown]
# That is the second half of the prediction: of the weights' products, none (attention's own two, unfused, would). Even the smallest matrix of GPT-2 is right of the ridge, if enough tokens pass it at once: its width decides, since a product of many rows with a square matrix of width $d$ has an intensity near $d/s$. The narrower matrices of smaller models are another matter, and so is everything that is no product. Adding two vectors is one FLOP for three elements moved.
#
# ## The measurement
#
# Now measure. On the left is a small model on this machine, each of its products timed in turn with all others, under the roof as measured before and after them: the best moment counts, for a peak is what a machine *can* do. On the right is GPT-2 under the roof of the H100's data sheet, with the one point that [chapter 03](03_baseline.py)'s committed profile gives: all products of the compiled step together.

# %%
small = GPTConfig(num_layers=2, num_heads=2, model_dim=128, max_seq_len=64)
shape = tier.pick(cpu=(small, 288, 1024), gpu=(gpt2, vocab, 8192))
ours = products_of(*shape, 4)
works = {}
for which, p in ours.items():
    a = torch.randn(p.rows, p.inner, device=tier.device)
    b = torch.randn(p.inner, p.cols, device=tier.device)
    works[" ".join(which)] = lambda a=a, b=b: a @ b
took = bench(works, tier.device, rounds=12)
later = measure_peak(tier.device, size=tier.pick(cpu=512, gpu=8192))
peak = Peak(*map(max, peak, later))  # a machine that others use has good moments and bad ones
reached = {
    which: p.flops / p.repeats / (took[" ".join(which)].p50 / 1000) for which, p in ours.items()
}
share = {which: reached[which] / peak.flops_s for which in ours}
assert sum(p.flops for p in ours.values()) == flops_per_token(*shape[:2], 0) * shape[2]
assert max(share.values()) < 1.5, "no product is faster than the machine"
assert statistics.median(share.values()) > 0.2, "and most come close to it"
best, worst = max(share, key=share.get), min(share, key=share.get)
print(f"{' '.join(best)}: {share[best]:.0%} of the measured peak; {' '.join(worst)}: {share[worst]:.0%}")  # fmt: skip

# %% tags=["hide-input"]
from speedrun.lab.results import figure_style, load_result, measured_on

result = load_result("baseline", "step")
compiled = result["data"]["forms"]["bf16, compiled"]
assert result["data"]["tokens"] == tokens
in_products = counted / (compiled["matrix products"] / 1000)
together = counted / sum(p.bytes_moved for p in theirs.values())
assert 0.5 < in_products / h100.flops_s < 1
print(f"all products of a step on an H100: {in_products / 1e12:.0f} TFLOP/s, {in_products / h100.flops_s:.0%} of the data sheet")  # fmt: skip
print(measured_on(result))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two rooflines, FLOPs a second against FLOPs a byte. Left: every product of a small model as measured here, below the measured roof. Right: every product of GPT-2 under the roof of an H100, all of them right of the ridge, and the measured point of all together"}}
import matplotlib.pyplot as plt
import numpy as np

figure_style()
fig, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.6))
markers = {"forward": "o", "input's gradient": "s", "weights' gradient": "^"}
names = list(dict.fromkeys(name for name, _ in ours))
for axis, roof, products in ((left, peak, ours), (right, h100, theirs)):
    x = np.geomspace(roof.flops_s / roof.bytes_s / 30, 5 * max(p.intensity for p in products.values()), 200)  # fmt: skip
    axis.loglog(x, np.minimum(roof.flops_s, x * roof.bytes_s) / 1e9, color="0.4")
    axis.axvline(roof.flops_s / roof.bytes_s, color="0.8", lw=1, zorder=0)
    axis.set_xlabel("FLOPs a byte")
for (name, which), p in ours.items():
    left.plot(p.intensity, reached[name, which] / 1e9, markers[which], color=f"C{names.index(name)}", ms=5)  # fmt: skip
for (name, which), p in theirs.items():
    right.plot(
        p.intensity,
        h100.flops_s / 1e9,
        markers[which],
        color=f"C{names.index(name)}",
        ms=6,
        markerfacecolor="none",
    )
right.plot(together, in_products / 1e9, "*", color="black", ms=11)
right.annotate("measured, all together", (together, in_products / 1e9), (0.3, 0.62), textcoords="axes fraction", fontsize=8, arrowprops={"arrowstyle": "-", "color": "0.5"})  # fmt: skip
for name in names:
    left.plot([], [], "o", color=f"C{names.index(name)}", label=name)
for which, marker in markers.items():
    left.plot([], [], marker, color="0.5", label=which)
left.set_ylabel("GFLOPs a second")
left.legend(fontsize=7, ncols=2, loc="lower right")
left.set_title(
    f"this machine, measured:\nproducts at {share[worst]:.0%} to {share[best]:.0%} of the peak"
)
beyond = sum(p.intensity > ridge_h100 for p in theirs.values())
right.set_title(
    f"GPT-2 on an H100: where its products could\nrun ({beyond} of {len(theirs)} beyond the ridge), and did (★)"
)
plt.show()

# %% [markdown]
# The left panel's roof was measured with the library that computes its points, so they come close to it; how close, depends on the shape and on what else runs on the machine. All products on the right lie beyond the ridge, if every operand is read once. So memory need not be what separates the star from the roof; a profile of single kernels would have to say. Some of it is the data sheet, which no real product reaches. (Only the star was measured; the other markers have an intensity and are placed on the roof.)
#
# ### A step by kind
#
# A roofline is about one function. A *trace* is about a step: a list of all kernels that ran, with their times. Sorted by kind, chapters 16 to 18 use it to say where a step's time goes. PyTorch's profiler makes the list; kernels are sorted by patterns in their names, and what matches none is pointwise. Times in which no kernel ran are gaps. (On a GPU kernels of several streams may overlap, so gaps are what the union of all kernels leaves.)


# %%
#| export
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


# %%
#| export
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


# %%
assert kind_of("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT") == kind_of("aten::addmm") == "matmul"
assert kind_of("ncclDevKernel_AllGather_RING_LL") == "communication"
assert kind_of("dkv_kernel") == kind_of("void pytorch_flash::flash_fwd_kernel") == "attention"
assert kind_of("aten::embedding_dense_backward") == "gathers and scatters"
assert kind_of("triton_poi_fused_gelu_3") == "pointwise"
assert covered([(0, 4), (1, 2), (3, 6), (9, 10)]) == 7

from speedrun.model.baseline import GPT2, decay_groups

config, words, rows = tier.pick(cpu=(small, 288, 16), gpu=(gpt2, vocab, 4))
model = GPT2(config, words).to(tier.device)
text = torch.randint(words, (rows, config.max_seq_len + 1)).to(tier.device)
optimizer = torch.optim.AdamW(decay_groups(model), lr=6e-4, fused=True)


def one_step() -> None:
    model(text[:, :-1], text[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()


book = ledger(one_step, tier.device)
kinds = {kind: ms for kind, ms in book.items() if kind != "wall"}
assert min(book[kind] for kind in ("matmul", "attention", "head", "optimizer")) > 0
assert "communication" not in book, "there is one rank"
assert 0.4 < sum(kinds.values()) / book["wall"] < 3
for kind, ms in sorted(kinds.items(), key=lambda item: -item[1]):
    print(f"{kind:22}{ms:7.2f} ms")
print(f"{'wall':22}{book['wall']:7.2f} ms")

# %% [markdown]
# For comparison, the committed profile of GPT-2's step on an H100, whose kinds chapter 03 names a little differently. There the products and attention are most of it, and the gaps next to nothing:

# %%
products = compiled["matrix products"] + compiled["attention"]
assert 0.5 < products / compiled["wall"] < 0.75 and compiled["waiting"] < 0.05 * compiled["wall"]
print(f"H100: products and attention {products / compiled['wall']:.0%}, gaps {compiled['waiting'] / compiled['wall']:.0%}")  # fmt: skip

# %% [markdown]
# ## What it costs, and when it fails
#
# **The profiler has its own cost**, and it is paid by operation: the smaller the operations, the more it distorts. So the ledger's wall time is measured without it, and the kinds may add up to more than that. Here are some thousand additions of four numbers, without it and with it:


# %%
four = torch.ones(4)


def additions() -> None:
    for _ in range(3000):
        four.add_(1)


def profiled() -> None:
    with profile(activities=[ProfilerActivity.CPU]):
        additions()


with_and_without = bench({"plain": additions, "profiled": profiled}, rounds=7)
slower = with_and_without["profiled"].p20 / with_and_without["plain"].p20
assert slower > 1.2
print(f"under the profiler they take {slower:.1f} times as long")

# %% [markdown]
# **Launch-bound kernels.** Python needs some time to queue a kernel. If that is more than the kernel takes, the device starves, and making the kernel faster makes nothing faster. [Chapter 11](11_attention_backends.py)'s committed measurement has both times for its attention kernel, in its shortest and its longest rows:

# %%
backends = load_result("attention", "backends")
own = [row for row in backends["data"]["rows"] if row["backend"] == "triton"]
short, long = own[0], own[-1]
assert short["forward_host_ms"] > short["forward_ms"] and long["forward_host_ms"] < long["forward_ms"]  # fmt: skip
for row in (short, long):
    print(f"{row['tokens']:,} tokens: {1000 * row['forward_ms']:.0f} µs on the GPU, {1000 * row['forward_host_ms']:.0f} µs for Python")  # fmt: skip
assert round(1000 * short["forward_host_ms"]) == 293
assert all(85 < 1000 * row["forward_host_ms"] < 100 for row in own[1:])
print(measured_on(backends))

# %% [markdown]
# (293 µs is the first row timed, once; the others took about 92.) In a training step Python is ahead of the device; alone in a loop it is not. That is why `bench` keeps the device busy before a cold sample, and why `graph=True` exists. Which is right depends on how the kernel will be used: under CUDA graphs the host's time is gone, in eager PyTorch it is not.
#
# **Clocks and power.** A GPU lowers its clock when it reaches its power limit (700 W for an H100 in its SXM form, by the data sheet) or gets hot, and products draw most power. Products of zeros draw less than those of random numbers, and run at a higher clock: time with data like the real ones. Two GPUs of one kind need not be equally fast, either. So a difference in speed is claimed as a ratio of runs made in turn on *one* machine; the trainer writes clock, power and temperature into its log beside each validation for whoever wonders afterwards.
#
# **The second-level cache.** An H100 keeps 50 MB on the chip. A function that is repeated on 20 MB may hardly touch memory, and may lie above the roof that the memory's bandwidth draws. Use `cold=True`, or larger tensors, unless the operands will be in the cache in real life as well.
#
# **A roof is for one number format and one kind of memory.** Float32 on an H100 is not bf16, and eight-bit floats promise twice as much again. A point far below one roof may touch another: count bytes between the chip and the memory that you mean.
#
# **Percentiles hide what is rare and real.** If every hundredth step takes ten times as long because a file is opened, the median does not know. For the time of a whole run there is the clock of the first section.
#
# ## Exercises
#
# **1.** How large must a square product be in order to wait for arithmetic and not for memory? Write `smallest_square(peak, size)`: the smallest whole $n$ for which a product of two $(n, n)$ matrices of elements of `size` bytes has at least the intensity of the ridge.


# %% tags=["solution"]
def smallest_square(peak: Peak, size: int) -> int:
    """The smallest n at which 2n³ FLOPs take as long as 3n² elements."""
    return math.ceil(1.5 * size * peak.flops_s / peak.bytes_s)


# %%
for roof, size_of, right in ((Peak(100.0, 10.0), 2, 30), (Peak(10.0, 10.0), 4, 6), (Peak(100.0, 30.0), 2, 10), (Peak(10.0, 4.0), 1, 4)):  # fmt: skip
    n = smallest_square(roof, size_of)
    assert n == right, (
        f"{roof.flops_s:g} FLOPs and {roof.bytes_s:g} bytes a second, elements of {size_of} bytes: n is {right}, not {n} (two operands are read, one result is written)"
    )
n = smallest_square(h100, 2)
assert Product(n, n, n).intensity >= ridge_h100 > Product(n - 1, n - 1, n - 1).intensity, (
    f"n = {n} is not where the H100's ridge is"
)
print(f"on an H100 in bf16 from n = {n}, here in float32 from n = {smallest_square(peak, 4)}")

# %% [markdown]
# **2.** A trace is a list of kernels with begin and end, on several streams. Write `idle_share(spans)`: the share of the time between the first begin and the last end in which no kernel ran.


# %% tags=["solution"]
def idle_share(spans: list[tuple[float, float]]) -> float:
    """Share of the whole stretch that the union of the intervals leaves."""
    whole = max(end for _, end in spans) - min(begin for begin, _ in spans)
    return 1 - covered(spans) / whole


# %%
cases = {
    "one after the other": ([(0.0, 2.0), (3.0, 4.0)], 0.25),
    "two streams at once": ([(0.0, 4.0), (0.0, 4.0), (6.0, 8.0)], 0.25),
    "a short kernel inside a long one": ([(0.0, 6.0), (1.0, 2.0), (7.0, 8.0)], 0.125),
    "not in order, and not from 0": ([(13.0, 14.0), (10.0, 12.0)], 0.25),
}
for what, (spans, right) in cases.items():
    share_idle = idle_share(spans)
    assert math.isclose(share_idle, right, abs_tol=1e-9), (
        f"{what}: {right:.1%} of the time is idle, not {share_idle:.1%}"
    )
print("no kernel ran for", {what: f"{right:.1%}" for what, (_, right) in cases.items()})

# %% [markdown]
# ## Where to go next
#
# The contest's own clock has changed more than once. Since record 21 was timed again, the first steps count and long searches for faster kernels do not happen before the start; [chapter 23](23_training_loop.py) tells that story, and measures what a forgotten wait does to a whole training step. Whether a difference between two runs is one at all, however well both were timed, is [chapter 01](01_are_you_faster.py)'s question. Next, [chapter 05](05_modern_block.py) begins to change the model. [Chapter 11](11_attention_backends.py) holds an attention kernel against its roofline, and [chapter 20](20_many_gpus.py) traces a step of several GPUs, where a new kind comes into the ledger: communication.
