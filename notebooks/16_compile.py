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
# ---

# %% [markdown]
# # torch.compile, warm-up and the clock
#
# ```{admonition} Cost box
# Half a minute on two CPU cores; the same on one GPU, where the graphs are real. Seconds of a start come from a committed measurement on an H200.
# CUDA graphs of forward and backward pass together are record 92's, \@devenpzak. (Record 24, \@vagrawal, had `torch.compile`'s own; record 25 took them out.) Compiling repeated parts once is PyTorch's [regional compilation](https://docs.pytorch.org/tutorials/recipes/regional_compilation.html). Where to cut, and the tape below, are this book's own.
# ```
#
# ## The problem
#
# A speedrun's clock starts when training does. What comes before, importing, compiling, warming up, does not count, by the contest's rules. It still has to be waited for. For two minutes this book's trainer compiled before its first step, until it was cut as described below. And a second problem does count. A GPU does nothing by itself. For each kernel Python has to call an operator, which looks at types and shapes, asks for memory and puts the kernel into a queue. How long does that take for one forward and backward pass? Here is the record's model, eleven layers, with vectors so short that next to nothing is left to compute.

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
from speedrun.lab.hardware import setup

machine = setup()

# %%
import time

import numpy as np
import torch

from speedrun.config import vary
from speedrun.cpu_size import at_cpu_size
from speedrun.data.loader import packed_row
from speedrun.model.gpt import GPT, attention_settings
from speedrun.passes import accumulate
from speedrun.presets import preset

narrow = {"model.num_layers": 11, "model.model_dim": 64, "model.attention.long_layers": (3, 10)}
narrow |= {"model.head.fp8": False, "model.block.fp8": False, "schedule.stages": preset("cpu").schedule.stages}  # fmt: skip
config = vary(at_cpu_size(preset("record")), narrow).model
device = torch.device(machine.device)
model = GPT(config, 288).to(device)
(settings,) = attention_settings(config, [(64, 128)], device)
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)


def random_row(seed: int, tokens: int = 256):
    """A packed row of random tokens, in documents of 50."""
    row = np.random.default_rng(seed).integers(0, 287, tokens + 1)
    row[::50] = 287
    return packed_row([row], 287)


def pass_ms(tokens: int, repeats: int = 5) -> float:
    """Milliseconds of a forward and backward pass over a row, the fastest of some."""
    took, batch = [], random_row(0, tokens)
    for _ in range(repeats):
        began = time.perf_counter()
        accumulate(model, [batch], 1, device, "float32", settings)
        took.append(1000 * (time.perf_counter() - began))
    return min(took)


short, longer = pass_ms(64), pass_ms(256)
asking = short - (longer - short) / 3
print(
    f"a pass over 64 tokens: {short:.0f} ms; over 256: {longer:.0f} ms; over none, on a line: {asking:.0f} ms"
)
assert longer < 3 * short and asking > 0.3 * short, "far from four times the time"

# %%
from speedrun.lab.results import load_result, measured_on

result = load_result("norm_rotary", "ledger")
wall = next(row["ms"]["wall"] for row in result["data"]["rows"] if row["arm"] == "all")
gpu_ms = wall * 16_384 / 49_152
print(f"one of eight GPUs computes its 16,384 tokens of record_200m in about {gpu_ms:.0f} ms")
print(measured_on(result), "for 49,152 tokens; a third of that is taken here")

# %% [markdown]
# Four times the tokens take nowhere near four times as long. Drawn to no tokens at all, the line through both does not end at nothing: what is left there is *launch overhead*. **Launching a pass uncompiled takes the CPU about as long as an H200 needs to compute one**: in the first third of the record each of eight GPUs gets 16,384 tokens a step, and has done its part in less than 20 milliseconds. (A rough comparison: this pass is not compiled, that one is; and its time is a third of a pass of the last third, with longer windows and all words, but fewer fixed costs a token.)
#
# ```{admonition} Prediction
# How many times does the pass above call an operator of PyTorch, forward and backward, for eleven layers? `torch.compile` makes one kernel of what lies between two matrix products. **Does that solve the problem?** And a compiled graph is made for certain shapes. How many must be compiled for a schedule with three batch sizes and four pairs of attention windows, if a graph is the whole model, and how few could it do with?
# ```
#
# ## Counting operator calls
#
# PyTorch can tell. A `TorchDispatchMode` sees every operator that reaches the tensors, those that autograd calls included. The one below does not only count. It keeps what it has seen, each operator with its arguments and its result, and can do all of it again; we shall come back to that. Views, which look at the same memory in another shape, compute nothing and are left out. (An operator's schema marks results that share memory with an argument; if nothing is written there, it is a view.)

# %%
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from speedrun.passes import forward_backward


class Tape(TorchDispatchMode):
    """Keeps the operators that are called while it is on, their arguments and results; `replay` does the same again, in the same places."""

    def __init__(self):
        super().__init__()
        self.calls, self.views = [], 0

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        found = operator(*arguments, **(named or {}))
        marks = [each.alias_info for each in operator._schema.arguments if each.alias_info]
        if any(not mark.is_write for mark in marks):  # a view computes nothing
            self.views += 1
            return found
        bare = (
            tree_map_only(torch.Tensor, torch.Tensor.detach, tree) for tree in (arguments, found)
        )
        self.calls.append((operator, named or {}, *bare))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        for operator, named, arguments, found in self.calls:
            fresh = operator(*arguments, **named)
            for old, new in zip(tree_leaves(found), tree_leaves(fresh)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


first = random_row(1)
places = [tensor.to(device, copy=True) for tensor in first[:3]]
facts = (device, "float32", settings)
with Tape() as tape:
    loss = forward_backward(model, 1, first.longest, facts, *places)
calls = len(tape.calls) + tape.views
us_each = 1000 * asking / calls
print(f"{calls:,} calls of an operator, {tape.views} of them views; {us_each:.0f} µs each")
assert 2000 < calls < 3500 and loss.item() > 5

# %% [markdown]
# More than two thousand calls, at several microseconds each. On a GPU the views launch nothing, but Python makes them all the same.
#
# ## torch.compile, and where to cut
#
# `torch.compile` takes away most of those calls. It works in four stages. *Dynamo* follows the Python and writes down a graph of operators, with *guards*: facts about the arguments under which this graph is right, such as shapes, and whether gradients are wanted. *AOTAutograd* traces forward and backward together and splits them, deciding what to keep for the backward pass and what to compute again. *Inductor* fuses pointwise work (what treats each number by itself) and reductions, and writes Triton code, or C++ on a CPU. *Triton* compiles that. A call that no version's guards fit is compiled anew.
#
# Which function to compile? The obvious answer is the model: one graph, with everything in sight of Inductor. It has two costs. Compiling takes time in proportion to the layers, although the record's eleven are nearly alike. And there is a bug. The trainer keeps all layers' matrices, or gains, of one kind in one tensor, a *bank* ([chapter 21](21_model.py)). In a graph that holds a whole bank, Inductor of PyTorch 2.10 to 2.14 at least fuses two reductions of a norm's backward pass and leaves most of the gradient of gains that are slices of one tensor *unwritten* ([pytorch#193061](https://github.com/pytorch/pytorch/issues/193061)). Nothing fails; training goes on with whatever stood in that memory, and for a while even learns. What gave it away was a loss that rose while the rate fell towards zero, which correct gradients hardly do. A flag switches that fusion off, `triton.mix_order_reduction`, but the contest's third rule forbids flags for `torch.compile` beyond the record's own.
#
# So the trainer compiles four functions, and calls them again and again: what comes before the layers, a layer's first half (attention), its second half (the MLP), and what comes after ([chapter 21](21_model.py) has them). Slices of the banks are inputs of these graphs, and the bug has nothing to act on: a test on a GPU compares compiled gradients with those of the plain model, in short passes and in long ones.
#
# A cut in the wrong place costs time. What is handed from one compiled graph to the next goes through memory, and nothing is fused across. But behind a matrix product that a library computes, as ours are, the result goes to memory in any case, and Inductor seldom fuses anything with it. There the halves end. The sum of that product and the residual stream comes next, and is left to the graph that follows, which is why a half hands on two tensors.

# %%
#| default_exp lab.compile
#| export
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


# %% [markdown]
# Compiled versions hang on a function's code. By default there may be eight for one function; beyond that Dynamo gives up, with an error if `fullgraph` is set. So a copy of the code is compiled, which has a list of its own. The optimizer's updates ([chapter 20](20_many_gpus.py)) are compiled in the same way. For the parts of the model the limit is raised, since all first halves are one function. And the number of tokens becomes a symbol: `maybe_mark_dynamic` says which dimension may differ without compiling again, unless the compiler finds that it must not. Attention windows and the number of words in the sampled softmax are tensors anyway, in CPU memory, read inside an operator.

# %%
#| export model.compiled
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from speedrun.model.gpt import GPT, AttentionContext, gpt_forward


def mark_tokens(argument: Any) -> None:
    """Tell the compiler which dimension counts the tokens of packed rows, so that no other number of them compiles again: of (1, tokens, …), borders, angles and tiles."""
    mark = torch._dynamo.maybe_mark_dynamic
    if isinstance(argument, Tensor) and argument.ndim > 1 and len(argument) == 1:
        mark(argument, 1)
    if isinstance(argument, AttentionContext) and argument.packed is not None:
        mark(argument.packed.cu_seqlens, 0)  # room for documents, by the number of tokens
        for angles in argument.cos_sin or ():
            mark(angles, 0)
        if isinstance(argument.tiles, Tensor):
            mark(argument.tiles, 1)


def compile_model(model: GPT) -> Callable:
    """The model's forward pass, each part compiled once for all layers of one kind and all numbers of tokens. Slices of banks are inputs of those graphs."""
    torch._dynamo.config.recompile_limit = 64  # kinds of layers, times training and validation
    compiled = cache(compiled_copy)

    def call(part: Callable, *arguments: Any) -> Any:
        for argument in arguments:
            mark_tokens(argument)
        return compiled(part)(*arguments)

    return partial(gpt_forward, model, call=call)


# %% [markdown]
# Count the graphs, then. Dynamo alone is enough for that, so the compiler behind it is replaced by one that does nothing.

# %%
from functools import partial
from unittest import mock

from torch._dynamo.utils import counters


def graphs_for(way, rows: list, backend: str = "eager") -> tuple[int, list[float]]:
    """How many graphs Dynamo makes of a model for these rows, and the losses."""
    torch._dynamo.reset()
    counters.clear()
    with mock.patch("torch.compile", partial(torch.compile, backend=backend)):
        forward = way(model)
        found = [accumulate(forward, [row], 1, *facts).item() for row in rows]
    return counters["stats"]["unique_graphs"], found


def as_one(model: GPT):
    return torch.compile(model, dynamic=False, fullgraph=True)


def as_one_marked(model: GPT):
    """The same, with the dimensions that count tokens marked, and documents'."""
    compiled = as_one(model)

    def forward(inputs, targets, packed, **others):
        for tensor, dim in ((inputs, 1), (targets, 1), (packed.cu_seqlens, 0)):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
        return compiled(inputs, targets, packed, **others)

    return forward


lengths = [random_row(seed, tokens) for seed, tokens in enumerate((128, 256, 384))]
plain = [accumulate(model, [row], 1, *facts).item() for row in lengths]
made = {}
for way in (as_one, as_one_marked, compile_model):
    rows = lengths[:2] if way is as_one else lengths
    made[way.__name__], found = graphs_for(way, rows)
    assert found == plain[: len(rows)], "and the losses are the plain model's"
assert made == {"as_one": 2, "as_one_marked": 1, "compile_model": 10}
print(
    f"two numbers of tokens, the whole model: {made['as_one']} graphs of eleven layers, one if sizes are symbols"
)
print(f"three numbers of tokens, in parts: {made['compile_model']} small graphs")

# %%
kinds: dict[tuple, list[int]] = {}
pending = False
for n, spec in enumerate(model.layout):
    kind = (n == 0, pending, spec.attention, spec.value is not None, spec.skip is not None)
    kinds.setdefault(kind, []).append(n)
    pending = n not in model.kept
print(*(f"{label:^9}" for label in ("x is x0", "more", "attention", "values", "skip")), "layers")
for kind, layers in kinds.items():
    print(*(f"{'yes' if fact else '-':^9}" for fact in kind), ", ".join(map(str, layers)))
assert len(kinds) == 6 and len({spec.attention for spec in model.layout}) == 2

# %% [markdown]
# Ten: one each for the beginning and the end, two second halves (one behind the layer without attention), and six first halves. They differ in whether something is still to be added (*more*; two layers' outputs are read again later, and are summed up at once), in attention, value embeddings and skip connection; and in the very first one $x$ and $x_0$ are the same tensor, about which Dynamo makes a guard as well. So, the prediction's second half. If windows are Python numbers, each pair needs a graph of its own, four in all, since each comes with one of the three batches. Here windows cost nothing, since they are tensors. Three numbers of tokens are three large graphs, or one with symbols, or ten small ones with symbols. (One large graph with symbols has not been tried on a GPU.) Validation needs the same ten once more, since whether gradients are wanted is guarded.
#
# What would it cost to take the sum at the end of a half? Behind nine MLPs (the sums of two are taken already) one tensor more is written and read; behind ten attentions one is read once more:

# %%
from speedrun.lab.bench import PEAKS

stream_mb = 65_536 * 768 * 2 / 1e6
extra_ms = (9 * 2 + 10) * stream_mb * 1e6 / PEAKS["H200"].bytes_s * 1e3
print(
    f"a residual stream of {stream_mb:.0f} MB; {extra_ms:.2f} ms of a pass of 65,536 tokens on an H200"
)
assert 0.55 < extra_ms < 0.65

# %% [markdown]
# ## CUDA graphs
#
# Compiled, the pass is still many kernels, and Python launches each: our own kernels (about a dozen for each MLP alone, [chapter 18](18_fused_mlp.py)), products, and what Inductor has made. Compiling need not solve the problem, then. But from one step to the next *the same* kernels are launched, in the same order. We want what the tape does. Play it again, and the pass is computed, without autograd, without Dynamo's guards and without a line of the model's Python:

# %%
second = random_row(2)
for place, tensor in zip(places, second[:3]):
    place.copy_(tensor)
for parameter in model.parameters():
    parameter.grad.zero_()
tape.replay()
replayed = {name: p.grad.clone() for name, p in model.named_parameters()}
for parameter in model.parameters():
    parameter.grad.zero_()
expected = accumulate(model, [second], 1, *facts)
for name, parameter in model.named_parameters():
    assert torch.allclose(replayed[name], parameter.grad, rtol=1e-4, atol=1e-6), name
assert abs(loss.item() - expected.item()) < 1e-5
print(
    f"another batch, put where the first one lay: loss {loss.item():.4f}, and all gradients are right"
)

# %% [markdown]
# The tape knows no names. It knows *places*, and finds whatever lies there: the new batch was copied over the old one, so it was read; gradients were added where gradients are. And it knows the *numbers* that it has seen, for good:

# %%
x, rate = torch.ones(3, device=device), 0.1
stored = torch.tensor(0.1, device=device)
with Tape() as small:
    by_number, by_place = x * rate, x * stored
rate = 0.2
stored.fill_(0.2)
small.replay()
assert (
    by_number[0].item() == torch.tensor(0.1).item()
    and by_place[0].item() == torch.tensor(0.2).item()
)
x = torch.zeros(3, device=device)  # another tensor: the tape does not know it
small.replay()
assert by_place[0].item() == torch.tensor(0.2).item()
print(
    "a Python number stays what it was; a number in a tensor is read again; a new tensor is not seen"
)

# %% [markdown]
# A *CUDA graph* is such a tape, kept by the driver. While it is recorded, launches are written down and not carried out. Its replay is a single call, after which the GPU goes through the list by itself; our tape still calls each operator from Python. And while our tape keeps every result alive, a graph has a pool of memory in which results that are no longer needed are overwritten, as in any pass. The rules are the tape's, and stricter:
#
# - What is read and written stays in its place. A graph holds bare addresses, and if the tensor there is gone, it reads whatever has come after.
# - No Python runs at a replay. A number, an `if`, a counter are what they were when the graph was recorded, without an error.
# - What makes Python wait for the GPU is refused while recording: `.item()` of a tensor there, a shape that depends on data, a copy from memory that is not pinned.
#
# PyTorch can record for us. `torch.compile(mode="reduce-overhead")` records each compiled graph by itself and looks after memory and inputs; between our parts Python would remain. `torch.cuda.make_graphed_callables` records a module's forward and its backward pass. We record forward and backward together, autograd and sums of gradients included, as one graph, so that nothing is left to Python but to start it.
#
# A *stream*, below, is a queue of kernels: those in one stream run in order, those in different streams may overlap. A *pool* is the memory from which a graph's tensors are taken. (NCCL, which connects GPUs, has a thread of its own: [chapter 20](20_many_gpus.py).)


# %%
#| export
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


# %% [markdown]
# The first calls run as usual: they compile, and let libraries choose their kernels and take their scratch memory. The next one is recorded, which computes nothing, and then replayed. The optimizer's updates have used this class all along ([chapter 20](20_many_gpus.py)); sums over ranks are no part of any graph. Gradients exist before anything is recorded, as views of the optimizer's storage, so that a graph adds to them in place.
#
# For the forward and backward pass one thing is added, since a batch is new each time: it is copied to where the graph reads it. And there is a graph for each stage of the schedule. They share one pool, which is safe because they run one after the other and leave nothing in it that is needed later: the loss is copied out, and gradients lie elsewhere. For the same reason a validation, which runs between two replays, may borrow the pool, instead of finding memory beside it ([chapter 23](23_training_loop.py)).


# %%
#| export
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


# %% tags=["hide-input"]
on_cpu = Recorder(torch.device("cpu"))
assert on_cpu.stream is None, "a CPU has no graphs: the function is called"
doubled = on_cpu("stage 1", lambda a, b: (a * b).sum(), [torch.ones(2), torch.full((2,), 3.0)])
assert doubled.item() == 6.0 and not on_cpu.calls
recorded = Recorder(device)
numbers = [torch.full((), float(n)) for n in range(5)]
found = []
for number in numbers:
    found.append(recorded("square", lambda a: a * a, [number]).item())
    recorded.recording = True  # from the second call on
assert found == [0.0, 1.0, 4.0, 9.0, 16.0]
print(f"recorded here: {len(recorded.calls)} graphs; squares {found}")

# %% [markdown]
# What differs between two passes of a training run, and where does it live?
#
# | what | where |
# | --- | --- |
# | the batch: inputs, targets, borders of documents | copied into the graph's own tensors |
# | weights, gradients, moments | never move ([chapter 20](20_many_gpus.py): all are views of storage that is kept) |
# | learning rates, momentum | a vector on the device, which the optimizer's graphs read |
# | windows, scale, words of the sampled softmax, number of tokens | the same for a whole stage of the schedule, so in the graph |
# | the longest document of a batch | a Python number, which FlashAttention's interface wants; with those backends nothing is recorded. [Chapter 11](11_attention_backends.py)'s kernel does not ask |


# %%
#| export model.compiled
def can_record(model: GPT, mode: str) -> bool:
    """Whether nothing in a forward pass but its tensors differs from batch to batch: FlashAttention and our reference read the longest document in Python."""
    return next(model.parameters()).is_cuda and (model.backend == "triton" or mode == "stream")


# %% tags=["hide-input"]
assert not can_record(GPT(config, 288), "documents"), "on a CPU nothing is recorded"
if tier.device == "cuda":
    assert can_record(model, "stream") and not can_record(model, "documents"), "its backend is sdpa"
print(
    f"backend {model.backend} on {device}: recorded with data.mode stream: {can_record(model, 'stream')}"
)

# %% [markdown]
# A CUDA graph goes wrong silently. Two things stand against that. The optimizer looks at every step whether values and gradients are still where they were, and stops the run if not. And tests on a GPU compare replayed gradients with those of the plain model.
#
# ## Warm-up
#
# Before the clock starts, the trainer takes three real steps in each stage of the schedule and one batch of validation, and then undoes them: weights, moments and the position in the data are put back. On a GPU a fourth step in each stage is recorded, after all others, so that the graphs' pool is taken when the plain passes have given their memory back; and in the schedule's order, in which they will be replayed. Everything is compiled, and recorded, at the sizes that will come. On the clock no kernel is compiled for the first time.
#
# ## The measurement
#
# How long does all this take, for one rank of eight? A new process each time, once with empty caches, once with full ones: AOTAutograd, Inductor and Triton keep what they have made on the disk. PyTorch counts the seconds of each stage itself, by clocks that contain one another; this takes them apart.

# %% tags=["hide-input"]
#| default_exp measure.compile
#| export
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch

from speedrun.config import vary
from speedrun.lab.bench import bench
from speedrun.lab.errors import UserError
from speedrun.lab.provenance import root, stamp
from speedrun.measure.runs import corpus_of
from speedrun.model.gpt import GPT
from speedrun.presets import preset

NAMES = ()
ON_GPUS = ("whole", "parts", "passes")  # with the folder of a corpus
RANKS = (8, 4, 2)  # of which one is timed
ONE_RANK: dict[str, Any] = {"data.batch_tokens": 16_384, "data.micro_batches": 1}  # of eight


def whole_model(model: GPT) -> Callable:
    """The whole forward pass in one graph, for each number of tokens anew; without the fusion that breaks gradients of a bank's slices (pytorch#193061)."""
    safe: dict[str, Any] = {"triton.mix_order_reduction": False}
    return torch.compile(model, dynamic=False, fullgraph=True, options=safe)


WAYS: dict[str, Callable] = {"whole": whole_model, "parts": compile_model}


# %% tags=["hide-input"]
#| export
def compiler_seconds(own_kernels_s: float) -> dict[str, float]:
    """What this process has spent in each part of the compiler so far, by PyTorch's own clocks, which contain one another."""
    from torch._dynamo.utils import compile_times

    clocks: dict[str, Any] = dict(zip(*compile_times(repr="csv", aggregate=True)))
    took = {name: float(clocks.get(name, 0.0)) for name in (
        "_compile.compile_inner", "create_aot_dispatcher_function", "compile_fx_inner", "PyCodeCache.load_by_key_path",
        "backward._backward_impl", "CachingAutotuner.benchmark_all_configs")}  # fmt: skip
    frames, autograd, inductor, kernels, later, tuning = took.values()
    return {
        "Dynamo": frames - autograd,
        "AOTAutograd": autograd + later - inductor,
        "Inductor": inductor - kernels,
        "Triton": kernels + own_kernels_s,
        "autotuning": tuning,
    }


# %% tags=["hide-input"]

clocks = compiler_seconds(1.5)
assert set(clocks) == {"Dynamo", "AOTAutograd", "Inductor", "Triton", "autotuning"}
assert clocks["Dynamo"] > 0.1 and clocks["Triton"] >= 1.5, "the eager backend above has only traced"
print({kind: round(seconds, 1) for kind, seconds in clocks.items()})


# %% tags=["hide-input"]
#| export
def start_up(way: str, folder: str) -> dict[str, Any]:
    """Seconds from this process's start to the first step of one rank of eight's run, by what they went into; called in a process of its own."""
    began, marks, own = psutil.Process().create_time(), dict[str, float](), []
    from speedrun import train

    marks["import"] = time.time() - began
    config = vary(preset("record_200m"), {"data.path": folder, "val_tokens": 2**18, **ONE_RANK})
    with listening(own), mock.patch("speedrun.train.compile_model", WAYS[way]):
        run = train.build_run(config, Path(tempfile.mkdtemp()), echo=None)
        torch.cuda.synchronize()
        marks["build"] = time.time() - began
        train.warm_up(run)
        marks["warm-up"] = time.time() - began
    found = {"way": way, "seconds": marks, "compiler": compiler_seconds(sum(own))}
    from torch._dynamo.utils import counters

    return found | {
        "graphs": counters["stats"]["unique_graphs"],
        "peak_mib": torch.cuda.max_memory_reserved() >> 20,
    }


# %% tags=["hide-input"]
#| export
@contextlib.contextmanager
def listening(seconds: list[float]):
    """Triton's time for each kernel that is compiled in this block, of our own: Inductor's are counted by its clock."""
    from triton import knobs

    def listen(src: Any = None, times: Any = None, **others: Any) -> None:
        if not str(getattr(src, "name", src)).startswith("triton_"):
            seconds.append(times.total / 1e6)

    knobs.compilation.listener = listen
    try:
        yield
    finally:
        knobs.compilation.listener = None


# %% tags=["hide-input"]
from types import SimpleNamespace

from speedrun.lab.hardware import find_triton

if find_triton():
    from triton import knobs

    heard: list[float] = []
    with listening(heard):
        for name in ("head_kernel", "triton_poi_fused_add_0"):
            knobs.compilation.listener(
                src=SimpleNamespace(name=name), times=SimpleNamespace(total=2e6)
            )
    assert heard == [2.0] and knobs.compilation.listener is None, "Inductor's own are left out"


# %% tags=["hide-input"]
#| export
def measure_start(way: str, folder: str) -> list[dict[str, Any]]:
    """`start_up` with empty caches and then with full ones, in new processes."""
    code = "import json, sys; from speedrun.measure.compile import start_up; print(json.dumps(start_up(*sys.argv[1:])))"
    words, rows = [sys.executable, "-c", code, way, folder], []
    with tempfile.TemporaryDirectory() as cache:
        places = {
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton",
        }
        for kept in ("cold", "warm"):
            variables = os.environ | places | {"PYTHONPATH": str(root())}
            done = subprocess.run(words, env=variables, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"{way}, {kept} caches: {done.stderr[-2000:]}", "run it by itself")
            rows.append({"caches": kept} | json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    return rows


# %% tags=["hide-input"]
#| export
def host_ms(call: Callable[[], Any], repeats: int = 11) -> float:
    """Milliseconds until a call returns, whatever it has asked a GPU for; the median."""
    took = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took)


# %% tags=["hide-input"]
#| export
def pass_times(folder: str) -> list[dict[str, Any]]:
    """Milliseconds of one rank's forward and backward pass, launched by Python and replayed, by its number of tokens; and of one graph of the whole model, replayed."""
    from speedrun import train

    config, rows = vary(preset("record_200m"), {"data.path": folder, **ONE_RANK}), []
    run = train.build_run(config, Path(tempfile.mkdtemp()), echo=None)
    now, ways = run.schedule.at(0), {"parts": run.forward, "whole": whole_model(run.model)}
    for ranks in RANKS:
        batches = run.loader.next(131_072 // ranks, now.max_doc_tokens)
        settings = (
            run.ranks.device,
            config.precision,
            run.attn_settings[now.stage],
            torch.tensor([now.candidates, 8 // ranks]),
        )
        calls = {}
        for way, forward in ways.items():
            recorder = Recorder(run.ranks.device)
            recorder.recording = True  # after the same pass by Python, which is timed before it
            record = partial(recorder, way)
            calls[f"{way}, by Python"] = partial(
                train.accumulate, forward, batches, ranks, *settings
            )
            calls[f"{way}, a CUDA graph"] = partial(
                train.accumulate, forward, batches, ranks, *settings, record=record
            )
        for name, took in bench(calls, "cuda", 15, warm_up=4).items():
            host = host_ms(calls[name])
            rows.append(
                {"name": name, "ranks": ranks, "tokens": 131_072 // ranks, "host_ms": host}
                | took._asdict()
            )
            print(rows[-1], flush=True)
    return rows


# %% tags=["hide-input"]
#| export
def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """whole, parts: seconds from a process's start to the first step, by what they went into, of a model compiled as one graph or in parts. passes: milliseconds of a pass, by Python and by a CUDA graph. For one rank of record_200m on a corpus, whose folder is the argument."""
    if not torch.cuda.is_available():
        raise UserError(f"{name} needs a GPU", "run it on an NVIDIA GPU")
    if not arguments:
        raise UserError(f"no corpus is given for {name}", f"python scripts/measure.py compile {name} data/fineweb10B")  # fmt: skip
    folder = arguments[0]
    rows = pass_times(folder) if name == "passes" else measure_start(name, folder)
    corpus = corpus_of(vary(preset("record_200m"), {"data.path": arguments[0]}))
    modules = ["speedrun.measure.compile", "speedrun.train"]
    return {"rows": rows}, stamp(command, modules, 1, [0], corpus)


# %%
rows = {row["caches"]: row for row in load_result("compile", "parts")["data"]["rows"]}
cold, warm = (rows[kind]["seconds"]["warm-up"] for kind in ("cold", "warm"))
print(
    f"one rank of eight, from the start of its process to the first step: {cold:.0f} s cold, {warm:.0f} s warm"
)
assert 85 < cold < 95 and 20 < warm < 26 and rows["cold"]["graphs"] == 30
print(
    "record_200m on two GPUs            compiling and warming up      step, first two thirds      reserved"
)
runs = {}
for label, name in (
    ("the whole model, launched", "record_200m_sampled"),
    ("parts, recorded", "record_200m"),
):
    runs[label] = found = load_result("speedrun", name)["data"]["runs"]
    seconds = " and ".join(f"{run['prepared_s']:.0f}" for run in found)
    ms = {point["step"]: point["train_time_ms"] for point in found[0]["curve"]}
    thirds = [(ms[end] - ms[begin]) / (end - begin) for begin, end in ((0, 125), (250, 375))]
    memory = found[0]["memory_mb"]["reserved"] / 1024
    print(
        f"{label:26} {seconds:>18} s, cold and warm {thirds[0]:11.1f} and {thirds[1]:.1f} ms {memory:9.0f} GiB"
    )
    runs[label] = np.array([found[0]["prepared_s"], found[1]["prepared_s"], *thirds, memory])
ratio = runs["parts, recorded"] / runs["the whole model, launched"]
assert ratio[0] < 0.7 and 0.95 < ratio[1] < 1.05 and 1.2 < ratio[4] < 1.3
saved = runs["the whole model, launched"][0] - runs["parts, recorded"][0]
assert 37 < saved < 43, "seconds of a cold start"
assert 110 < runs["the whole model, launched"][0] < 130, "two minutes, as said above"
since = load_result("loss", "one_gpu")["data"]["runs"][0]["memory_mb"]
assert 0.85 < since["reserved"] / found[0]["memory_mb"]["reserved"] < 0.89
assert (round(since["reserved"] / 1024), round(100 * since["allocated"] / since["reserved"])) == (41, 59)  # fmt: skip
assert 1.005 < ratio[2] < 1.03 and 1.005 < ratio[3] < 1.03, "as printed, one to two per cent"

# %% [markdown]
# The second line is the trainer's today, but for three things that came later: the order of its warm-up and its allocator's segments (see *Memory* below), and how a run is built (below the figure). The first is an earlier state of it, with the whole model in one graph and everything launched by Python; its schedule had a stage more, in the last third. On two GPUs parts save forty seconds of a start with empty caches, which nobody's clock counts, and cost one or two per cent of each step, which the contest's does.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Seconds of a start with empty and with full caches, stacked by imports, building, Dynamo, AOTAutograd, Inductor and Triton, autotuning and the steps."}}
from matplotlib import pyplot as plt

from speedrun.lab.results import figure_style

figure_style()
COLUMNS = ["cold", "warm"]
marks = [rows[kind]["seconds"] for kind in COLUMNS]
spent = [rows[kind]["compiler"] for kind in COLUMNS]
stack = {
    "imports": [mark["import"] for mark in marks],
    "building model and optimizer": [mark["build"] - mark["import"] for mark in marks],
    "Dynamo, and loading what caches have": [each["Dynamo"] for each in spent],
    "AOTAutograd: the backward graphs": [each["AOTAutograd"] for each in spent],
    "Inductor and Triton: writing and compiling kernels": [
        each["Inductor"] + each["Triton"] for each in spent
    ],
    "autotuning": [each["autotuning"] for each in spent],
}
rest = [mark["warm-up"] - sum(kind[n] for kind in stack.values()) for n, mark in enumerate(marks)]
stack["the steps themselves, and recording"] = [max(0.0, each) for each in rest]
fig, ax = plt.subplots(figsize=(8.2, 2.9), layout="constrained")
left = np.zeros(2)
for number, (label, values) in enumerate(stack.items()):
    ax.barh(
        ["empty caches", "full caches"], values, 0.6, left=left, label=label, color=f"C{number}"
    )
    left += values
ax.invert_yaxis()
ax.set_xlabel("seconds from the start of the process to the first step")
share = (marks[1]["build"] + spent[1]["Dynamo"]) / warm
for place, seconds in enumerate((cold, warm)):
    ax.text(seconds + 0.7, place, f"{seconds:.0f} s", va="center")
ax.set_xlim(0, 1.08 * cold)
ax.set_title(
    f"full caches save {cold - warm:.0f} of {cold:.0f} seconds; imports, building and Dynamo remain"
)
ax.legend(fontsize=7, loc="lower right")
fig.text(0.99, -0.04, measured_on(load_result("compile", "parts")), ha="right", fontsize=6.5)
plt.show()
assert 0.45 < marks[1]["build"] / warm < 0.6, "imports and building: half of a warm start"
assert max(stack, key=lambda label: stack[label][0]).startswith("Inductor and Triton")
assert share > 0.95 and abs(rest[1]) < 1 and min(min(values) for values in stack.values()) >= 0

# %% [markdown]
# With full caches nothing is compiled, and the start still takes more than twenty seconds. Imports and building model and optimizer, drawing the model's initial numbers among other things, are half of it; PyTorch's caches cannot help there. (Since then the numbers are drawn in place, while a thread imports the compiler. On a GPU that has not been timed.) The other half is Dynamo, which follows the Python of all graphs again in every new process, because guards and code objects belong to the process, and then loads what the caches have. Cold, the largest part is writing and compiling kernels, Inductor's on up to 32 cores, ours one by one. (This is one run each, of one rank, from the start of its process. The two-GPU runs' seconds above begin when the model has been built.)
#
# Thirty graphs are compiled in all: the ten of the forward and backward pass, the same ten for validation, and ten for the optimizer's updates and for tying head and embedding.
#
# ## What it buys
#
# A start with empty caches is forty seconds shorter, which no clock of the contest counts. On two GPUs' clock, parts and graphs together cost one or two per cent, as measured above. Without graphs of forward and backward pass record 92's 39.9 s are 3.0 s more, by its author (eight H100s, two runs).
#
# ## What it costs, and when it fails
#
# - **Memory.** A CUDA graph keeps the memory of its pass for itself as long as it lives. All stages' graphs share a pool. The runs above recorded each stage right after its own first passes, which stood beside the pool of the stages before, so that the most that was ever reserved grew by a quarter. Since then all plain passes come first. A run in that order, on one GPU and so not quite comparable, reserved 41 GiB, and never had more than 59% of it allocated. More than half of the rest was lost between *segments*, which PyTorch's allocator gets from the driver: what is free in two of them cannot serve one large tensor. Where segments may grow instead (`expandable_segments:True`, as upstream has it), 22% less is reserved: in passes half as long, in runs of 60 steps that took equally long, and about as much with whole passes, against the run above. In these runs a validation found its memory beside the graphs'. It borrows theirs now ([chapter 23](23_training_loop.py)), and 9% less is reserved (the last line below). What is left may be the warm-up's peak: it keeps a copy of weights and optimizer state, to undo its steps. Of state that is zero, as before the first step, none is kept any more; how much that saves has not been measured. The launcher asks for growing segments; `scripts/measure.py`, which trains without it, does not. With them, passes half as long save only 6% more, and take one and a half per cent longer:

# %%
tried = load_result("compile", "segments")
rows = {(row["config"]["data"]["max_forward_tokens"], row["expandable"]): row for row in tried["data"]["runs"]}  # fmt: skip
for (tokens, expandable), row in rows.items():
    memory = row["memory_mb"]
    print(f"passes of {tokens:,} tokens, {'growing' if expandable else 'fixed'} segments: {memory['reserved'] / 1024:.1f} GiB reserved, {memory['allocated'] / 1024:.1f} allocated; {row['seconds']:.2f} s for {row['step']} steps")  # fmt: skip
fixed, half, whole = rows[32_768, False], rows[32_768, True], rows[65_536, True]
less = 1 - half["memory_mb"]["reserved"] / fixed["memory_mb"]["reserved"]
assert 0.2 < less < 0.25 and 0.2 < 1 - whole["memory_mb"]["reserved"] / since["reserved"] < 0.25
assert 1.01 < half["seconds"] / whole["seconds"] < 1.02
held = {size: row["memory_mb"]["reserved"] for size, row in (("half", half), ("whole", whole))}
assert round(100 * less) == 22 and 0.93 < held["half"] / held["whole"] < 0.95
idle = [each - whole["memory_mb"]["allocated"] for each in (since["reserved"], held["whole"])]
assert 0.5 < 1 - idle[1] / idle[0] < 0.6, "lost between segments"
assert abs(half["seconds"] / fixed["seconds"] - 1) < 0.002, "the same speed"
borrowed = load_result("compile", "borrowed")
lent = borrowed["data"]["runs"][0]["memory_mb"]
assert round(100 * (1 - lent["reserved"] / held["whole"])) == 9 and lent["allocated"] == whole["memory_mb"]["allocated"]  # fmt: skip
print(f"passes of 65,536 tokens, validation in the graphs' memory: {lent['reserved'] / 1024:.1f} GiB reserved; {measured_on(borrowed)}")  # fmt: skip
print(f"compiling and warming up, in the first of these runs with empty caches: {fixed['prepared_s']:.0f} s; {measured_on(tried)}")  # fmt: skip

# %% [markdown]
# - **One to two per cent of a step**, in the two thirds of the runs above whose schedules are the same. Two causes can be named. The gradient of $x_0$, which every layer reads, is added up by autograd between the compiled graphs and not inside one. And the largest entry of the gradient that an eight-bit MLP needs for its scale ([chapter 18](18_fused_mlp.py)) is found by a kernel of its own, where a graph of the whole model found it while the gradient was written. How the loss divides among them, symbols for sizes and copies of batches has not been measured.
# - **What depends on a computed number cannot be recorded**: an `if` about a loss, a shape that depends on data, `.item()`. The first form of the softmax's candidates ([chapter 19](19_head_and_loss.py)) waited for the GPU in each pass. While recording that is refused at once; without a graph a run only gets slower.
# - **On two GPUs recording bought no time that these runs could show.** There a pass has 49,152 or 65,536 tokens, and the GPU is the slower of the two. It should matter where a rank has few tokens, as with eight. `python scripts/measure.py compile passes FOLDER` times both ways for one rank of eight, of four and of two; no result of it is committed yet, so what it saves there is so far an expectation.
#
# ## What did not work
#
# - **Cutting between layers** and not between halves was considered. Graphs are twice as long, the kinds of layers are as many as those of first halves, and the sum behind the MLP still has to be handed on.
# - **Returning the sum at the end of a half** would be simpler to read, and costs the 0.6 ms computed above.
# - **A list indexed by a truth value**, `contexts[n in long_layers]`, is Python that newer versions of Dynamo follow and 2.11 does not. It stopped the graph of the whole model on the GPU, after every test had passed on a CPU with 2.13.
#
# ## Exercises
#
# 1. Write `python_bound(operators, us_each, gpu_ms)`: how many milliseconds a step takes if Python needs `us_each` microseconds to launch each of so many operators, and the GPU needs `gpu_ms` for all of them. They work side by side.


# %% tags=["solution"]
def python_bound(operators: int, us_each: float, gpu_ms: float) -> float:
    """Whoever is slower decides."""
    return max(operators * us_each / 1000, gpu_ms)


# %%
answer = python_bound(1000, 10.0, 4.0)
assert abs(answer - 10.0) < 1e-9, (
    f"a thousand launches of 10 µs take 10 ms, and the GPU waits for them: not {answer:g}"
)
answer = python_bound(1000, 10.0, 25.0)
assert abs(answer - 25.0) < 1e-9, f"here the GPU is the slower one, with 25 ms, not {answer:g}"
print(
    f"Python's part of the pass above: {calls * us_each / 1000:.1f} ms, an H200's {gpu_ms:.1f}; from a graph a step takes {python_bound(1, us_each, gpu_ms):.1f}, and with three times as many calls by Python {python_bound(3 * calls, us_each, gpu_ms):.1f}"
)

# %% [markdown]
# 2. A training loop is to be recorded, and its learning rate changes in each step. Write `recordable_sgd(weights, grads, rate)`, which makes the rate a tensor on the weights' device and returns two functions: `step()`, which takes `rate` times the gradient off the weights, in place, and can be recorded; and `set_rate(value)`, after which a replay uses the new value.


# %% tags=["solution"]
def recordable_sgd(weights: torch.Tensor, grads: torch.Tensor, rate: float):
    """The rate lives in memory, where a replay reads it."""
    stored = torch.full((), rate, device=weights.device)

    def step() -> None:
        weights.sub_(stored * grads)

    def set_rate(value: float) -> None:
        stored.fill_(value)

    return step, set_rate


# %%
weights, grads = torch.zeros(2, device=device), torch.ones(2, device=device)
step, set_rate = recordable_sgd(weights, grads, 1.0)
with Tape() as update:
    step()
assert weights.tolist() == [-1.0, -1.0], (
    f"one step at a rate of 1 takes the gradient off: {weights.tolist()}"
)
set_rate(0.5)
update.replay()
assert weights.tolist() == [-1.5, -1.5], (
    f"replayed at a rate of 0.5 the weights are −1.5, not {weights.tolist()}"
)
grads.fill_(2.0)
update.replay()
assert weights.tolist() == [-2.5, -2.5], (
    f"and with gradients of 2 they are −2.5, not {weights.tolist()}"
)
print("a recorded step that follows rate and gradients")

# %% [markdown]
# ## Since then
#
# Record 92 records forward and backward pass for nine combinations of sizes, the updates of three banks, and the requantising of weights; its author's ablation puts what the graphs of forward and backward pass save at three seconds of 34. [Chapter 20](20_many_gpus.py) records the optimizer, [chapter 23](23_training_loop.py) has the loop that calls all this.
