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
# # Norm and rotary in one kernel
#
# ```{admonition} Cost box
# A quarter of a minute on two CPU cores, where Triton's interpreter runs the kernels at small shapes; on one GPU they are compiled. Times come from committed measurements on H200s.
# RMS norm of queries and keys is record 5's, \@Grad62304977 and \@kellerjordan0 ([chapter 05](05_modern_block.py)); rotary embeddings are Su and others', half-truncated they are record 17's, \@YouJiacheng ([chapter 06](06_rotary.py)). One kernel each way for norm, rotation and layout: record 90, \@theonlyglitch_. The kernels below, and the gradient that is computed from the rotated vectors, are this book's own.
# ```
#
# ## The problem
#
# The compiler fuses. [Chapter 03](03_baseline.py) saw what that brings for one line, and ever since, this book has written norms, rotations and gates as plain PyTorch and left the rest to Inductor. Here is where a forward and backward pass of `record_200m` spends its time, 49,152 tokens on one H200, after the MLP ([chapter 18](18_fused_mlp.py)) and the head ([chapter 19](19_head_and_loss.py)) have been given kernels of their own. (Both chapters come after this one because they need what it teaches. The measurement did not wait.)

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
from speedrun.lab.hardware import setup

machine = setup()

# %% tags=["hide-input"]
import numpy as np

from speedrun.lab.results import load_result, measured_on
from speedrun.presets import preset

result = load_result("norm_rotary", "ledger")
arms = {row["arm"]: row for row in result["data"]["rows"]}
before = arms["without the kernel"]["ms"]
for kind, ms in sorted(before.items(), key=lambda pair: -pair[1]):
    print(f"{kind:22} {ms:5.1f} ms")
print(measured_on(result))
around = before["pointwise"] + before["gathers and scatters"]
assert around > 2.7 * before["attention"] and 0.32 < around / before["wall"] < 0.36
assert around > before["matmul"] > before["attention"]
print(f"pointwise, gathers and scatters: {around:.1f} of {before['wall']:.1f} ms")

# %% [markdown]
# **A third of the pass is neither products nor attention**, nor one of the two kernels, which contain products. What moves numbers and hardly computes takes a little longer than all products that a library still computes, and nearly three times as long as attention. Almost half of it is spent in one place: between the product that makes queries, keys and values, and the kernel that attends.
#
# What happens there? The product writes one tensor, (tokens, 3 · heads · head_dim). Queries and keys are normed, rotated by their position, and all three are copied into the layout that the attention kernel reads. In the backward pass, three gradients go the same way back.
#
# ```{admonition} Prediction
# Count the bytes that have to move, if everything between the product and attention happens in one kernel each way: 2,304 numbers of two bytes a token are read, and as many written. Backward, three gradients are read and one is written, and the norm's gradient needs to know what it has normed. **How many milliseconds is that for 49,152 tokens and ten layers**, at the 4.8 TB/s of an H200's data sheet? Cosines and sines add five per cent; leave them out. And must the backward pass have kept the vectors *before* the norm?
# ```
#
# ## The idea
#
# ### The gradient of a rotated vector
#
# For one head's query $x$ of $d$ numbers the forward pass computes
#
# $$
# q = R\,(r x), \qquad r = \Big(\tfrac1d |x|^2 + \varepsilon\Big)^{-1/2},
# $$
#
# where $R$ rotates pairs by the position's angles. If $\partial q$ is the gradient of $q$, the chain rule gives, with $n = r x$,
#
# $$
# \partial x = r\,\Big(\partial n - \tfrac1d\,(n \cdot \partial n)\, n\Big), \qquad \partial n = R^\top \partial q .
# $$
#
# The usual way is to keep $x$, compute $n$ again, and turn the gradient back first. But a rotation changes no inner product: $n \cdot \partial n = (R^\top q) \cdot (R^\top \partial q) = q \cdot \partial q$, since $R R^\top = 1$. Put $n = R^\top q$ and $\partial n = R^\top \partial q$ into the formula, and both terms in the bracket begin with $R^\top$, which can be taken out:
#
# $$
# \partial x = R^\top \Big( r\,\big(\partial q - \tfrac1d\,(q \cdot \partial q)\, q\big) \Big).
# $$
#
# Everything on the right is there already. The attention kernel has kept $q$ and $k$ for its own backward pass, and $r$ is one number for each token and head. **The vectors before the norm need not be kept at all.** With them goes the product's whole output, 226 megabytes a layer, since a view of its queries and keys would keep all of it alive.
#
# ### Why did the compiler not find this?
#
# It does fuse norm and rotation. But it differentiates what it is given, and does not know that rotations preserve inner products. And what our own operators (`custom_op`s, into which it cannot look) take in, it has to write to memory first. So it matters how a tensor was picked out of another, because that decides what its gradient is:

# %%
import torch

x = torch.randn(1, 3, 4, requires_grad=True)
picked, squeezed = x[0], x.squeeze(0)
print("the gradient of x[0]:", picked.grad_fn.name(), "· of x.squeeze(0):", squeezed.grad_fn.name())
assert torch.equal(picked, squeezed) and picked.grad_fn.name() == "SelectBackward0"
base = torch.randn(3, 4)
(of_picked,) = torch.autograd.grad(picked, x, base)
(of_squeezed,) = torch.autograd.grad(squeezed, x, base)
assert torch.equal(of_picked, of_squeezed)
assert of_squeezed.data_ptr() == base.data_ptr() != of_picked.data_ptr(), "a view, and a copy"

# %% [markdown]
# `x[0]` of a batch of one and `x.squeeze(0)` are the same numbers in the same place. But the first one's gradient is a new tensor of zeros into which the gradient is copied, for `select` might have picked one of many. The second's is a view. When the kernels below were first tried, such copies stood around them in every layer. (The baseline of this chapter's measurement indexes with `[0]`, as the model did then.)
#
# ## The code
#
# ### Triton, from the smallest kernel
#
# Chapters [11](11_attention_backends.py) and [15](15_low_precision.py) have used Triton; here is its smallest kernel, in full. A Triton kernel is a function that runs many times at once. Each instance, a *program*, asks for its number, computes which block of the data is its own, loads the block, computes on it as on a small tensor, and stores it. Sizes of blocks are powers of two and known when the kernel is compiled (`constexpr`). What lies beyond the edge of the data is masked. Here each program scales four rows to a root mean square of one. `X` is a pointer to the first number, so that adding offsets to it gives pointers to the others; `tl.load(pointers, mask, 0.0)` reads where the mask is true; and `norm_rows[(3,)]` launches a grid of three programs:


# %%
#| default_exp kernels.rotary
#| export
from typing import Any

import torch
from torch import Tensor

from speedrun.lab.hardware import jit

try:
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # macOS, Windows
    tl = constexpr = Any

EPS = 1e-6  # of the RMS norm
ROWS = 16  # tokens of a program
NAMESPACE = __name__.strip("_").replace(".", "_")  # the notebook's operators are not the package's


# %%
@jit
def norm_rows(X, Y, rows, WIDTH: constexpr, ROWS: constexpr):
    """ROWS rows of X (rows, WIDTH), each over its root mean square, into Y."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # this program's rows …
    at = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # … and where their numbers are
    mine = (row < rows)[:, None]
    x = tl.load(X + at, mine, 0.0)
    factor = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + 1e-6)
    tl.store(Y + at, x * factor[:, None], mine)


given, normed = torch.randn(10, 8, device=machine.device), torch.empty(10, 8, device=machine.device)
norm_rows[(3,)](given, normed, 10, WIDTH=8, ROWS=4)  # three programs of four rows: two are masked
assert torch.allclose(normed, given / given.square().mean(1, keepdim=True).sqrt(), atol=1e-5)
print("ten rows by three programs:", normed.square().mean(1).tolist()[:2], "…")

# %% [markdown]
# In CUDA one would also place data in shared memory, assign elements to threads and synchronise them. In Triton the compiler does all three: `tl.sum` adds up over however many threads hold the row. Left to choose are block, warps and the order in which memory is touched.
#
# ### Forward
#
# A program takes sixteen tokens, loads their cosines and sines once, and goes through the heads. A head is loaded in halves, since a pair is one number of each (GPT-NeoX's pairing; half-truncated means that half of the pairs have angle zero). Everything is computed in float32 and rounded once. `tl.static_range` is unrolled when the kernel is compiled, so that `part == 0` chooses between two pointers at no cost.


# %%
#| export
@jit
def load_halves(X, at, mine, HALF: constexpr):
    """Rows of twice HALF numbers that begin at `at`, (ROWS, 1), float32: their first and their second half."""
    halves = at + tl.arange(0, HALF)[None, :]
    first = tl.load(X + halves, mine, 0.0).to(tl.float32)
    return first, tl.load(X + halves + HALF, mine, 0.0).to(tl.float32)


@jit
def store_halves(X, first, second, at, mine, HALF: constexpr):
    """The reverse, in X's dtype."""
    halves = at + tl.arange(0, HALF)[None, :]
    tl.store(X + halves, first.to(X.dtype.element_ty), mine)
    tl.store(X + halves + HALF, second.to(X.dtype.element_ty), mine)


@jit
def load_turns(COS, SIN, rows, mine, HALF: constexpr):
    """Cosines and sines of these rows' positions, (ROWS, HALF)."""
    at = rows[:, None] * HALF + tl.arange(0, HALF)[None, :]
    return tl.load(COS + at, mine, 0.0), tl.load(SIN + at, mine, 0.0)


# %%
#| export
@jit
def norm_rotary_kernel(
    QKV, COS, SIN, Q, K, V, FACTORS, tokens, eps, HEADS: constexpr, HALF: constexpr, ROWS: constexpr
):
    """Queries, keys and values of ROWS tokens, head after head, and what the norms multiplied by, FACTORS, (2, tokens, HEADS)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine, WIDTH = (rows < tokens)[:, None], HEADS * 2 * HALF
    cos, sin = load_turns(COS, SIN, rows, mine, HALF)
    for head in range(HEADS):
        source = rows.to(tl.int64)[:, None] * (3 * WIDTH) + head * 2 * HALF
        place = rows.to(tl.int64)[:, None] * WIDTH + head * 2 * HALF
        for part in tl.static_range(2):
            a, b = load_halves(QKV, source + part * WIDTH, mine, HALF)
            factor = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)
            tl.store(FACTORS + (part * tokens + rows) * HEADS + head, factor, rows < tokens)
            a, b = a * factor[:, None], b * factor[:, None]
            OUT = Q if part == 0 else K
            store_halves(OUT, a * cos - b * sin, a * sin + b * cos, place, mine, HALF)
        a, b = load_halves(QKV, source + 2 * WIDTH, mine, HALF)
        store_halves(V, a, b, place, mine, HALF)


# %% [markdown]
# ### Backward
#
# The same loop with the formula above. It reads what attention kept, and writes the one tensor that the product's backward pass wants.


# %%
#| export
@jit
def norm_rotary_gradient_kernel(
    DQ, DK, DV, Q, K, FACTORS, COS, SIN, DQKV, tokens, HEADS: constexpr, HALF: constexpr, ROWS: constexpr
):  # fmt: skip
    """The gradient of qkv for ROWS tokens, head after head."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine, WIDTH = (rows < tokens)[:, None], HEADS * 2 * HALF
    cos, sin = load_turns(COS, SIN, rows, mine, HALF)
    for head in range(HEADS):
        source = rows.to(tl.int64)[:, None] * WIDTH + head * 2 * HALF
        place = rows.to(tl.int64)[:, None] * (3 * WIDTH) + head * 2 * HALF
        for part in tl.static_range(2):
            factor = tl.load(FACTORS + (part * tokens + rows) * HEADS + head, rows < tokens, 0.0)
            a, b = load_halves(DQ if part == 0 else DK, source, mine, HALF)
            x, y = load_halves(Q if part == 0 else K, source, mine, HALF)
            inner = ((tl.sum(a * x, 1) + tl.sum(b * y, 1)) / (2 * HALF))[:, None]
            a, b = (a - x * inner) * factor[:, None], (b - y * inner) * factor[:, None]
            store_halves(DQKV, a * cos + b * sin, b * cos - a * sin, place + part * WIDTH, mine, HALF)  # fmt: skip
        a, b = load_halves(DV, source, mine, HALF)
        store_halves(DQKV, a, b, place + 2 * WIDTH, mine, HALF)


# %% [markdown]
# ### The operators
#
# The reference is [chapter 05](05_modern_block.py)'s norm and [chapter 06](06_rotary.py)'s rotation, which is what runs everywhere else. The operator hides the kernels from `torch.compile`, which traces with a *fake* version that only says which shapes come out, and it tells autograd what to keep: not its input.


# %%
#| export
@torch.library.custom_op(f"{NAMESPACE}::norm_rotary", mutates_args=())
def norm_rotary_op(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> list[Tensor]:
    """Queries and keys, RMS-normed and rotated, and values, (tokens, heads, head_dim) each; and their reciprocal root mean squares (rstd), (2, tokens, heads) float32, through which no gradient flows.

    qkv: (tokens, 3 · heads · head_dim). cos, sin: (tokens, head_dim / 2) float32. A pair is a number of a head's first half and one of its second. Computed in float32; head_dim must be a power of two.
    """
    tokens, half = len(qkv), qkv.shape[1] // (6 * heads)
    fits = qkv.shape[1] == 6 * heads * half and half & (half - 1) == 0 < half
    if not (fits and cos.shape == sin.shape == (tokens, half)):
        shapes = f"{tuple(qkv.shape)}, {tuple(cos.shape)}, {tuple(sin.shape)}"
        raise ValueError(f"qkv (tokens, 3 · {heads} heads · head_dim, a power of two), cos and sin (tokens, head_dim / 2), not {shapes}")  # fmt: skip
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    q, k, v = (qkv.new_empty(tokens, heads, 2 * half) for _ in range(3))
    factors, grid = cos.new_empty(2, tokens, heads), (-(-tokens // ROWS),)
    norm_rotary_kernel[grid](qkv, cos, sin, q, k, v, factors, tokens, EPS, heads, half, ROWS)
    return [q, k, v, factors]


# %%
from speedrun.model.mlp import rms_norm
from speedrun.model.rotary import RotaryConfig, apply_rotary, rotary_tables

tokens, heads, dim = 37, 3, 16
generator = torch.Generator().manual_seed(0)
qkv = torch.randn(tokens, 3 * heads * dim, generator=generator).to(machine.device)
cos, sin = (each.to(machine.device) for each in rotary_tables(tokens, dim, RotaryConfig("half_rope")))  # fmt: skip
q, k, v, factors = norm_rotary_op(qkv, cos, sin, heads)


def by_chapters(qkv: Tensor) -> list[Tensor]:
    """What chapters 05 and 06 make of it: queries, keys, values, (tokens, heads, dim)."""
    q, k, v = qkv.view(tokens, 3, heads, dim).permute(1, 2, 0, 3)
    c, s = cos.to(qkv.dtype), sin.to(qkv.dtype)
    return [
        *(apply_rotary(rms_norm(each), c, s).transpose(0, 1) for each in (q, k)),
        v.transpose(0, 1),
    ]


wanted = by_chapters(qkv.double())
worst = max((a - b).abs().max().item() for a, b in zip((q, k, v), wanted))
assert worst < 2e-6 and torch.allclose(q.square().mean(-1), torch.ones_like(q[..., 0]), atol=1e-4)
print(f"queries, keys and values differ from float64's by at most {worst:.0e}")


# %%
#| export
@norm_rotary_op.register_fake
def fake_norm_rotary(qkv, cos, sin, heads):
    shape = qkv.shape[0], heads, qkv.shape[1] // (3 * heads)
    return [*(qkv.new_empty(shape) for _ in range(3)), cos.new_empty(2, *shape[:2])]


@torch.library.custom_op(f"{NAMESPACE}::norm_rotary_backward", mutates_args=())
def norm_rotary_backward_op(
    grads: list[Tensor], q: Tensor, k: Tensor, factors: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """The gradient of qkv, (tokens, 3 · heads · head_dim), from those of q, k and v, and from what `norm_rotary_op` returned."""
    (tokens, heads, dim), grads = q.shape, [grad.contiguous() for grad in grads]
    found, grid = q.new_empty(tokens, 3 * heads * dim), (-(-tokens // ROWS),)
    norm_rotary_gradient_kernel[grid](*grads, q, k, factors, cos.contiguous(), sin.contiguous(), found, tokens, heads, dim // 2, ROWS)  # fmt: skip
    return found


# %%
#| export
@norm_rotary_backward_op.register_fake
def fake_norm_rotary_backward(grads, q, k, factors, cos, sin):
    return q.new_empty(q.shape[0], 3 * q.shape[1] * q.shape[2])


def keep_turned(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    q, k, _, factors = output
    ctx.save_for_backward(q, k, factors, *inputs[1:3])


def norm_rotary_gradients(ctx: Any, grads: list[Tensor]) -> tuple:
    return norm_rotary_backward_op(grads[:3], *ctx.saved_tensors), None, None, None


norm_rotary_op.register_autograd(norm_rotary_gradients, setup_context=keep_turned)


# %%
leaf, exact = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
grads = [torch.randn(tokens, heads, dim, generator=generator).to(machine.device) for _ in range(3)]
(found,) = torch.autograd.grad(norm_rotary_op(leaf, cos, sin, heads)[:3], leaf, grads)
(known,) = torch.autograd.grad(by_chapters(exact), exact, [each.double() for each in grads])
worst = (found - known).abs().max().item()
assert worst < 3e-6
kept = [tuple(each.shape) for each in (q, k, factors)]
print(
    f"the gradient differs by at most {worst:.0e}; it was computed from {kept}, and never from qkv"
)
inner = [(each * grad).sum(-1) for each, grad in ((q, grads[0]), (k, grads[1]))]
before_turning = [(apply_rotary(each.transpose(0, 1), cos, -sin) * apply_rotary(grad.transpose(0, 1), cos, -sin)).sum(-1).T for each, grad in ((q, grads[0]), (k, grads[1]))]  # fmt: skip
assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(inner, before_turning)), "a rotation changes no inner product"  # fmt: skip

# %% [markdown]
# The model takes the operator where our attention kernel computes, with queries and keys that are normed and paired in halves, and writes the same thing in PyTorch elsewhere. There the code is what it was.
#
# ## The measurement
#
# First both kernels by themselves, against what the compiler makes of the reference, and beside a plain copy of `qkv`, which moves nearly as many bytes as the forward kernel. Caches are cold, and each call is replayed from a CUDA graph, so that no launch is waited for. Then a pass of the whole model, with and without each of the three chapters' kernels.


# %% tags=["hide-input"]
#| export measure.norm_rotary
import dataclasses
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from speedrun.config import vary
from speedrun.lab.bench import KINDS, bench, ledger
from speedrun.lab.errors import UserError
from speedrun.lab.provenance import stamp
from speedrun.measure.runs import corpus_of, relative_error
from speedrun.model.mlp import rms_norm
from speedrun.model.rotary import RotaryConfig, apply_rotary, rotary_tables
from speedrun.presets import preset

NAMES = ()
ON_GPUS = ("kernels", "ledger")  # ledger: the folder of a corpus
SHAPES = (16_384, 32_768, 49_152, 65_536)  # tokens of record_200m's forward passes
HEADS, HEAD_DIM = 6, 128


def drawn_heads(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """qkv (tokens, 2304) bfloat16, cosines and sines (tokens, 64) of random places below 2,048, and gradients of q, k and v; on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    draw = partial(torch.randn, device="cuda", generator=generator)
    places = torch.randint(0, 2048, (tokens,), device="cuda", generator=generator)
    tables = rotary_tables(2048, HEAD_DIM, RotaryConfig("half_rope", 1024.0))
    cos, sin = (table.cuda()[places] for table in tables)
    grads = [draw(tokens, HEADS, HEAD_DIM).bfloat16() for _ in range(3)]
    return draw(tokens, 3 * HEADS * HEAD_DIM).bfloat16(), cos, sin, grads


# %% tags=["hide-input"]
#| export measure.norm_rotary
def separate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> list[Tensor]:
    """Chapter 05's norm and chapter 06's rotation: q, k and v, (tokens, heads, head_dim)."""
    q, k, v = qkv.view(1, len(qkv), 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k = (apply_rotary(rms_norm(each), cos, sin) for each in (q, k))
    return [each[0].transpose(0, 1).to(v.dtype).contiguous() for each in (q, k, v)]


def rotary_versions(qkv: Tensor, cos: Tensor, sin: Tensor, grads: list[Tensor]) -> dict[str, Callable[[], list[Tensor]]]:  # fmt: skip
    """q, k, v and the gradient of qkv, by each version."""
    compiled = torch.compile(separate, dynamic=False, fullgraph=True)
    leaf = qkv.detach().requires_grad_()

    def plain() -> list[Tensor]:
        out = compiled(leaf, cos, sin, HEADS)
        return [*out, *torch.autograd.grad(out, leaf, grads)]

    def fused() -> list[Tensor]:
        q, k, v, factors = norm_rotary_op(qkv, cos, sin, HEADS)
        return [q, k, v, norm_rotary_backward_op(grads, q, k, factors, cos, sin)]

    return {"plain": plain, "fused": fused}


def measure_kernels() -> dict[str, Any]:
    """Times of both versions, of the kernels and of a copy of qkv; errors against float64."""
    found: dict[str, list] = {"rows": [], "errors": []}
    for tokens in SHAPES:
        qkv, cos, sin, grads = drawn_heads(tokens)
        calls: dict[str, Callable] = {**rotary_versions(qkv, cos, sin, grads)}
        q, k, _, factors = norm_rotary_op(qkv, cos, sin, HEADS)
        other, compiled = torch.empty_like(qkv), torch.compile(separate, dynamic=False)
        calls |= {
            "plain forward": partial(compiled, qkv, cos, sin, HEADS),
            "forward": partial(norm_rotary_op, qkv, cos, sin, HEADS),
            "backward": partial(norm_rotary_backward_op, grads, q, k, factors, cos, sin),
            "copy": partial(other.copy_, qkv),
        }
        for name, took in bench(calls, "cuda", 15, cold=True, graph=True).items():
            found["rows"].append({"name": name, "tokens": tokens} | took._asdict())
            print(found["rows"][-1], flush=True)
        torch._dynamo.reset()  # it compiles a function only so many times
    qkv, cos, sin, grads = drawn_heads(4096)
    leaf = qkv.double().requires_grad_()
    exact = separate(leaf, cos.double(), sin.double(), HEADS)
    known = [*exact, *torch.autograd.grad(exact, leaf, [each.double() for each in grads])]
    for name, call in rotary_versions(qkv, cos, sin, grads).items():
        errors = [relative_error(a, b) for a, b in zip(call(), known)]
        found["errors"].append({"name": name} | dict(zip(("q", "k", "v", "dqkv"), errors)))
    return found


# %% tags=["hide-input"]
#| export measure.norm_rotary
HEAD = {"model.head.fp8": False}
ARMS: dict[str, dict[str, Any]] = {  # what is left out of record_200m, one thing more in each line
    "all": {},
    "without the kernel": {},
    "and the MLP in bfloat16": {"model.block.fp8": False},
    "and the head in bfloat16, all words": {"model.block.fp8": False, **HEAD},
}
RECORD_KINDS = {
    "MLP": r"hidden_kernel",
    "norm and rotary": r"norm_rotary",
    "quantising": r"quantize_kernel",
    "head": r"head_kernel|target_kernel|dx_kernel|softmax|nll_loss|cross_entropy|log_sum",
    "attention": r"^(?:forward|delta|dkv|dq)_kernel",
}
RECORD_KINDS |= {kind: name for kind, name in KINDS.items() if kind not in RECORD_KINDS}


def separate_op(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> list[Tensor]:
    """In the operator's place, what the compiler makes of `separate`."""
    return [*separate(qkv, cos, sin, heads), cos]


def ledger_of(arm: str, folder: str, step: int = 500) -> dict[str, Any]:
    """Milliseconds by kind of one forward and backward pass of record_200m on one GPU, at a step of its third stage; memory in MiB."""
    from speedrun.train import accumulate, build_run

    changes: dict[str, Any] = {"data.path": folder, "data.max_forward_tokens": 49_152} | ARMS[arm]
    base, bf16_head = preset("record_200m"), "model.head.fp8" in ARMS[arm]
    if bf16_head:
        stages = tuple(dataclasses.replace(each, candidates=0) for each in base.schedule.stages)
        changes["schedule.stages"] = stages
    config = vary(base, changes)
    instead = separate_op if arm != "all" else norm_rotary_op
    with (
        tempfile.TemporaryDirectory() as scratch,
        mock.patch("speedrun.model.gpt.norm_rotary_op", instead),
    ):
        run = build_run(config, Path(scratch), echo=None)
        now = run.schedule.at(step)
        batch = run.loader.next(now.batch_tokens, now.max_doc_tokens)[0]
        few = None if bf16_head else torch.tensor([now.candidates, 1])
        record = partial(run.recorder, now.stage)
        told = run.ranks.device, config.precision, run.attn_settings[now.stage], few
        torch.cuda.reset_peak_memory_stats()
        one_pass = partial(accumulate, run.forward, [batch], 8, *told, record=record)
        one_pass()
        run.recorder.recording = True
        found = ledger(one_pass, "cuda", 3, RECORD_KINDS)
        peak = torch.cuda.max_memory_allocated() >> 20
    return {
        "arm": arm,
        "tokens": batch.inputs.numel(),
        "candidates": now.candidates,
        "ms": found,
        "peak_mib": peak,
    }


# %% tags=["hide-input"]
#| export measure.norm_rotary
def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """kernels: times and errors. ledger: where a forward and backward pass's time goes, with and without each kernel; its argument the folder of a corpus."""
    if not torch.cuda.is_available():
        raise UserError(f"{name} needs a GPU", "run it on an NVIDIA GPU")
    modules = ["speedrun.measure.norm_rotary"]
    if name == "kernels":
        return measure_kernels(), stamp(command, modules, 1, [0])
    if not arguments:
        raise UserError("no corpus is given for ledger", "python scripts/measure.py norm_rotary ledger data/fineweb10B")  # fmt: skip
    rows = []
    for arm in ARMS:
        rows.append(ledger_of(arm, arguments[0]))
        print(rows[-1], flush=True)
        torch._dynamo.reset()
    corpus = corpus_of(vary(preset("record_200m"), {"data.path": arguments[0]}))
    return {"rows": rows}, stamp(command, [*modules, "speedrun.train"], 1, [0], corpus)


# %%
kernels = load_result("norm_rotary", "kernels")
alone = {(row["name"], row["tokens"]): row["p50"] for row in kernels["data"]["rows"]}
ways = {"plain": "compiled, both ways", "fused": "kernels, both ways", "plain forward": "compiled, forward", "forward": "kernel, forward", "backward": "kernel, backward", "copy": "a copy of qkv"}  # fmt: skip
print(f"{'tokens':20}", *(f"{tokens:9,}" for tokens in SHAPES))
for name, label in ways.items():
    print(f"{label:20}", *(f"{alone[name, tokens]:6.3f} ms" for tokens in SHAPES))
took = {name: np.array([alone[name, tokens] for tokens in SHAPES]) for name in ways}
both, forward = took["plain"] / took["fused"], took["plain forward"] / took["forward"]
backward = (took["plain"] - took["plain forward"]) / took["backward"]
copied = took["forward"] / took["copy"]
for what, times in (("both ways", both), ("forward", forward), ("backward", backward)):
    print(f"{what}: {min(times):.2f} to {max(times):.2f} times as fast as compiled")
print(f"the forward kernel takes {min(copied):.2f} to {max(copied):.2f} times as long as the copy")
errors = {row["name"]: row for row in kernels["data"]["errors"]}
for name, row in errors.items():
    print(f"{ways[name]}: against float64, queries {row['q']:.2%}, gradient {row['dqkv']:.2%}")
print(measured_on(kernels))
assert ((both > 2.6) & (both < 2.9) & (forward > 1.1) & (forward < 1.13)).all()
assert ((backward > 3.5) & (backward < 4.2) & (copied > 1.15) & (copied < 1.2)).all()
assert errors["fused"]["q"] < 0.9 * errors["plain"]["q"]
assert errors["fused"]["dqkv"] < 0.76 * errors["plain"]["dqkv"]

# %% [markdown]
# Forward the compiler leaves little to gain: the kernel is an eighth faster at most, and within a fifth of the copy. The gain is in the backward pass, where the kernel needs about a quarter of the compiler's time. (That is the difference of two measurements, one with and one without a backward pass.) The compiled version norms again what it has kept, makes one tensor of three gradients and, for the sake of `[0]`, probably copies that once more. In the whole model:

# %%
from speedrun.model.gpt import layout_of

layers = sum(spec.attention for spec in layout_of(preset("record").model))
numbers = 49_152 * 3 * HEADS * HEAD_DIM
forward_mb, backward_mb = 2 * numbers * 2 / 1e6, (2 + 2 / 3) * numbers * 2 / 1e6
least_ms = layers * (forward_mb + backward_mb) / 4.8e3
after = arms["all"]["ms"]
print(f"forward {forward_mb:.0f} MB a layer, backward {backward_mb:.0f}: in {layers} layers at least {least_ms:.1f} ms")  # fmt: skip
print(f"measured: {after['norm and rotary']:.1f} ms, {least_ms / after['norm and rotary']:.0%} of the data sheet's bandwidth")  # fmt: skip
gone = around - after["pointwise"] - after["gathers and scatters"]
print(f"they replace {gone:.1f} ms of the compiler's kernels; {measured_on(result)}")
assert 0.95 < after["norm and rotary"] / layers / alone["fused", 49_152] < 1, "as alone"
assert layers == 10 and 2.1 < least_ms < 2.3 and 0.75 < least_ms / after["norm and rotary"] < 0.85
assert 9 < gone < 10.5 and 0.45 < gone / around < 0.5

# %% tags=["hide-input"] mystnb={"image": {"alt": "Milliseconds by kind of kernel of a forward and backward pass, with head and MLP in bfloat16, with the head's kernel, with the MLP's, and with norm and rotary in one."}}
from matplotlib import pyplot as plt

from speedrun.lab.results import figure_style

figure_style()
ORDER = [
    "and the head in bfloat16, all words",
    "and the MLP in bfloat16",
    "without the kernel",
    "all",
]
LABELS = ["compiled PyTorch\nand our attention", "+ head in FP8\n(19)", "+ MLP in FP8\n(18)", "+ norm and rotary\n(this chapter)"]  # fmt: skip
STACK = {"matmul": ("matmul",), "MLP's kernel": ("MLP",), "attention": ("attention",), "norm and rotary": ("norm and rotary",), "pointwise, gathers, scatters": ("pointwise", "gathers and scatters"), "head and loss": ("head",), "quantising": ("quantising",), "gaps": ("gaps",)}  # fmt: skip
fig, ax = plt.subplots(figsize=(8.2, 3.8), layout="constrained")
bottom = np.zeros(4)
for number, (label, parts) in enumerate(STACK.items()):
    ms = np.array([sum(arms[arm]["ms"].get(part, 0.0) for part in parts) for arm in ORDER])
    color = "0.7" if label == "gaps" else f"C{number}"
    ax.bar(LABELS, ms, 0.62, bottom=bottom, label=label, color=color)
    bottom += ms
for place, arm in enumerate(ORDER):
    ax.text(place, arms[arm]["ms"]["wall"] + 1.5, f"{arms[arm]['ms']['wall']:.0f} ms", ha="center")
ax.set_ylabel("ms of a pass of 49,152 tokens")
ax.set_ylim(0, 104)
ax.set_title(
    f"three chapters' kernels take a pass from {arms[ORDER[0]]['ms']['wall']:.0f} to {after['wall']:.0f} ms"
)
ax.legend(fontsize=7, loc="upper right")
fig.text(0.99, -0.03, measured_on(result), ha="right", fontsize=6.5)
plt.show()

# %% [markdown]
# The answer to the prediction: by count it is at least 2.2 milliseconds for ten layers; measured, 2.8, about four fifths of the data sheet's bandwidth, which no kernel reaches in full. They take the place of almost ten. And the vectors before the norm are not needed. In the third bar a third of the pass is pointwise work and copies: the faster the products, the more what lies between them decides. (At this step no version samples words. The FP8 head's first product is counted as head, not as matmul.)
#
# ## What it buys

# %%
walls = [arms[arm]["ms"]["wall"] for arm in ORDER]
shorter = 1 - walls[3] / walls[2]
memory = {arm: row["peak_mib"] / 1024 for arm, row in arms.items()}
print(f"the pass takes {walls[2]:.1f} → {walls[3]:.1f} ms, {walls[2] - walls[3]:.1f} ms or {shorter:.0%} less")  # fmt: skip
print(f"memory at its peak {memory['without the kernel']:.1f} → {memory['all']:.1f} GiB")
assert 0.12 < shorter < 0.14 and 1.8 < memory["without the kernel"] - memory["all"] < 2.4
still = after["pointwise"] + after["gathers and scatters"]
print(f"still pointwise, gathers and scatters: {still:.1f} ms; gaps {before['gaps']:.1f} → {after['gaps']:.1f} ms")  # fmt: skip
waits = {arm: row["ms"]["gaps"] for arm, row in arms.items()}
print(f"gaps of all four versions: {min(waits.values()):.1f} to {max(waits.values()):.1f} ms")
assert 10 < still < 11 and all(waits[arm] < 0.02 * arms[arm]["ms"]["wall"] for arm in ORDER)

# %% [markdown]
# An eighth of the pass and more than two gigabytes, for no change of the mathematics. Rounding does change: forward, cosines and sines stay in float32; backward, the formula uses the rounded queries and keys. By the errors above both come out nearer to float64 than the compiled reference, the gradient by a quarter. What it gives in a whole run, together with the MLP, stands in [chapter 18](18_fused_mlp.py) and [24](24_speedrun.py).
#
# ## What it costs, and when it fails
#
# - **Queries and keys must be normed** and paired in halves. Without QK-norm, with learned positions or with interleaved pairs the model takes PyTorch's way; so does every backend but our own kernel.
# - **A call of an operator costs Python time.** There are twenty in a pass, each through PyTorch's dispatcher. When passes were launched kernel by kernel, the GPU waited for that, and the wait took back a part of what these kernels save. Here a pass is replayed from a CUDA graph ([chapter 16](16_compile.py)), and with it the gaps are less than two per cent of a pass in every version. Of the 7.8 ms saved, 0.8 are gaps, which vary between versions.
# - A kernel is code that somebody has to keep. These two and their operators are a hundred lines; what they replace were four lines of PyTorch, and those are still there, as the reference.
#
# ## What did not work
#
# - **A program for each head.** The first form loaded the cosines and sines of its tokens for each of six heads. They hit the L2 cache, but that traffic is not free: looping over heads inside the program was faster when it was tried (the factor has not been kept).
# - **Returning queries, keys and values as one tensor.** Then autograd stacks the three gradients before it calls the backward kernel, a copy as large as the one that the kernel saves.
# - **Fusing the value embeddings' gate as well** was left alone: five of ten layers have one, and it is a small part of the eleven milliseconds that are left. The largest, when they were last taken apart, was the gradient of the value tables, a scatter of 189 million numbers.
#
# ## Exercises
#
# 1. Write `bandwidth_ms(read, written, tokens, bandwidth=4.8e12)`: the least time in milliseconds of a kernel that reads and writes so many numbers of two bytes a token, at so many bytes a second.


# %% tags=["solution"]
def bandwidth_ms(read: int, written: int, tokens: int, bandwidth: float = 4.8e12) -> float:
    """Bytes over bandwidth."""
    return 1000 * 2 * (read + written) * tokens / bandwidth


# %%
answer = bandwidth_ms(1000, 1000, 1000, 4e9)
assert abs(answer - 1) < 1e-9, f"4 MB at 4 GB/s take a millisecond, not {answer:g}"
answer = bandwidth_ms(3 * 768, 3 * 768, 49_152)
assert abs(answer - forward_mb / 4.8e3) < 1e-9, f"the forward kernel's {forward_mb:.0f} MB take {forward_mb / 4.8e3:.4f} ms, not {answer:g}"  # fmt: skip
answer = bandwidth_ms(100, 0, 10, 2e6)
assert abs(answer - 1) < 1e-9, f"a kernel that only reads 2,000 bytes at 2 MB/s takes a millisecond, not {answer:g}"  # fmt: skip
print(f"a residual add of 768 numbers a token: {bandwidth_ms(2 * 768, 768, 49_152):.3f} ms")

# %% [markdown]
# 2. The formula for $\partial x$ works for any matrix $R$ that preserves inner products. Write `norm_gradient(grad, y, factor, unturn)`: the gradient of $x$ for $y = R\,(\text{factor} \cdot x)$, (rows, width), given $y$'s gradient, the norms' reciprocal root mean squares `factor`, (rows,), and a function that applies $R^\top$ to rows.


# %% tags=["solution"]
def norm_gradient(grad: Tensor, y: Tensor, factor: Tensor, unturn: Any) -> Tensor:
    """As in the kernel: the norm's part first, from the rotated vectors, then back."""
    inner = (grad * y).mean(-1, keepdim=True)
    return unturn((grad - inner * y) * factor[:, None])


# %%
basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
rows_here = torch.randn(5, 6, generator=generator, dtype=torch.float64).requires_grad_()
y = rms_norm(rows_here) @ basis.T
upstream = torch.randn(5, 6, generator=generator, dtype=torch.float64)
(known,) = torch.autograd.grad(y, rows_here, upstream)
scale_of_rows = (rows_here.square().mean(-1) + EPS).rsqrt().detach()
answer = norm_gradient(upstream, y.detach(), scale_of_rows, lambda rows: rows @ basis)
worst = (answer - known).abs().max().item()
assert worst < 1e-6, f"the gradient is off by {worst:.1e} for a random orthogonal 6 × 6 matrix"
print(f"a random orthogonal matrix in six dimensions: off by at most {worst:.0e}")

# %% [markdown]
# ## Since then
#
# Record 90 norms, rotates, shifts keys by a position and pads heads to the width that FlashAttention wants, all in one kernel each way; the backward one also rounds to eight bits, in both layouts. Record 92 keeps both kernels, after a product in eight bits. [Chapter 18](18_fused_mlp.py) has products with epilogues, [chapter 11](11_attention_backends.py) the kernel that reads what this one writes.
