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
# # Norm and rotary in one pass
#
# ## The code

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


# %%
#| export
@torch.library.custom_op(f"{NAMESPACE}::norm_rotary", mutates_args=())
def norm_rotary_op(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> list[Tensor]:
    """Queries and keys, RMS-normed and turned, and values, (tokens, heads, head_dim) each; and what the norms multiplied by, (2, tokens, heads) float32.

    qkv: (tokens, 3 · heads · head_dim). cos, sin: (tokens, head_dim / 2) float32. A pair is a number of a head's first half and one of its second. Computed in float32, for heads of a power of two of numbers.
    """
    tokens, half = len(qkv), qkv.shape[1] // (6 * heads)
    if qkv.shape[1] % (6 * heads) or not cos.shape == sin.shape == (tokens, half):
        shapes = f"{tuple(qkv.shape)}, {tuple(cos.shape)}, {tuple(sin.shape)}"
        raise ValueError(f"qkv (tokens, 3 · {heads} heads · head_dim), cos and sin (tokens, head_dim / 2), not {shapes}")  # fmt: skip
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    q, k, v = (qkv.new_empty(tokens, heads, 2 * half) for _ in range(3))
    factors, grid = cos.new_empty(2, tokens, heads), (-(-tokens // ROWS),)
    norm_rotary_kernel[grid](qkv, cos, sin, q, k, v, factors, tokens, EPS, heads, half, ROWS)
    return [q, k, v, factors]


@norm_rotary_op.register_fake
def fake_norm_rotary(qkv, cos, sin, heads):
    shape = len(qkv), heads, qkv.shape[1] // (3 * heads)
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


@norm_rotary_backward_op.register_fake
def fake_norm_rotary_backward(grads, q, k, factors, cos, sin):
    return q.new_empty(len(q), 3 * q.shape[1] * q.shape[2])


def keep_turned(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    q, k, _, factors = output
    ctx.save_for_backward(q, k, factors, *inputs[1:3])


def norm_rotary_gradients(ctx: Any, grads: list[Tensor]) -> tuple:
    return norm_rotary_backward_op(grads[:3], *ctx.saved_tensors), None, None, None


norm_rotary_op.register_autograd(norm_rotary_gradients, setup_context=keep_turned)


# %% [markdown]
# ## The measurement


# %%
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
from speedrun.measure.loss import relative_error
from speedrun.measure.runs import corpus_of
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


# %%
#| export measure.norm_rotary
def separate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> list[Tensor]:
    """Chapters 05's norm and 06's rotation: q, k and v, (tokens, heads, head_dim)."""
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
    qkv, cos, sin, grads = drawn_heads(4096)
    leaf = qkv.double().requires_grad_()
    exact = separate(leaf, cos.double(), sin.double(), HEADS)
    known = [*exact, *torch.autograd.grad(exact, leaf, [each.double() for each in grads])]
    for name, call in rotary_versions(qkv, cos, sin, grads).items():
        errors = [relative_error(a, b) for a, b in zip(call(), known)]
        found["errors"].append({"name": name} | dict(zip(("q", "k", "v", "dqkv"), errors)))
    return found


# %%
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
} | KINDS


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
        few = None if bf16_head else torch.tensor(now.candidates)
        told = run.ranks.device, config.precision, run.told[now.stage], few
        torch.cuda.reset_peak_memory_stats()
        found = ledger(lambda: accumulate(run.forward, [batch], 8, *told), "cuda", 3, RECORD_KINDS)
        peak = torch.cuda.max_memory_allocated() >> 20
    return {
        "arm": arm,
        "tokens": batch.inputs.numel(),
        "candidates": now.candidates,
        "ms": found,
        "peak_mib": peak,
    }


# %%
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
