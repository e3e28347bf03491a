# Tangled from notebooks/19_head_and_loss.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The definition
import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speedrun.kernels.fp8 import E4M3, E5M2, fp8_matmul, has_fp8, quantize, scale_of
from speedrun.kernels.mlp import (
    KINDS,
    Blocks,
    blocks_for,
    in_blocks,
    load_block,
    place_of,
    programs_for,
    store_block,
)
from speedrun.lab.hardware import find_triton, jit

try:
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # macOS, Windows
    tl = constexpr = Any

CAP, SHIFT, SLOPE = 23.0, 5.0, 7.5  # the softcap: 23 sigmoid((z + 5) / 7.5)
NAMESPACE = __name__.strip("_").replace(".", "_")  # the notebook's operator is not the package's


# %% Choosing the candidates
STRIDE = 20_011  # record 92's sweep through the vocabulary


def choose_candidates(targets: Tensor, words: int, count: int) -> tuple[Tensor | None, Tensor]:
    """The `count` words that a micro-batch's softmax runs over, 0: all: its targets, filled up along a fixed sweep. (count,) int64, ascending, None: all; (words,) bool.

    The sweep visits word (offset + k) · stride mod words, k = 0, 1, …, each word once; the offset comes from the targets, so that the choice
    depends on the micro-batch alone, and not on the rank that has it (record 92 starts rank r at r/8 of the vocabulary instead). No random numbers, no wait for the device. If there are
    more different targets than `count`, those late in the sweep are left out.
    """
    if not 0 < count <= words:
        return None, targets.new_ones(words, dtype=torch.bool)
    stride = next(s for s in range(STRIDE, STRIDE + words) if math.gcd(s, words) == 1)
    place = torch.arange(words, device=targets.device) * pow(stride, -1, words)
    place = (place - targets.sum()) % words
    place[targets] -= words
    nearest = place.topk(count, largest=False, sorted=False)
    return nearest.indices.sort().values, place <= nearest.values.max()


# %% The kernel
@jit
def capped_sigmoid(z, FAST: constexpr):
    """sigmoid((z + 5) / 7.5). FAST: by the GPU's own tanh, one instruction, to about 11 bits."""
    if FAST:
        t = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [(z + 5.0) * (0.5 / 7.5)], dtype=tl.float32, is_pure=True, pack=1
        )  # fmt: skip
        return 0.5 + 0.5 * t
    else:
        return tl.sigmoid((z + 5.0) * (1.0 / 7.5))


@jit
def write_gradient(
    acc, G, GT, row, column, tokens, words, scale,
    ROWS: constexpr, COLUMNS: constexpr, KIND: constexpr, FAST: constexpr, BULK: constexpr,
):  # fmt: skip
    """What follows a block's product: exp(z' - 23), summed over rows, and the gradient before the sums are known, times 2^20, in both layouts."""
    TOP: constexpr = 23.0 * 1.4426950408889634
    s = capped_sigmoid(acc * scale, FAST)
    e = tl.math.exp2(s * TOP - TOP)
    g = (e * s * (1.0 - s) * 1048576.0).to(KIND)
    store_block(G, g, row, column, tokens, words, ROWS, COLUMNS, BULK)
    store_block(GT, tl.trans(g), column, row, words, tokens, COLUMNS, ROWS, BULK)
    return tl.sum(tl.where((column + tl.arange(0, COLUMNS) < words)[None, :], e, 0.0), 1)


@jit
def head_kernel(
    X, W, G, GT, SUMS, SCALE, tokens, words, WIDTH: constexpr, KIND: constexpr, ROWS: constexpr, COLUMNS: constexpr,
    DEPTH: constexpr, PROGRAMS: constexpr, FAST: constexpr, BULK: constexpr,
):  # fmt: skip
    """Logits of X (tokens, WIDTH) and W (words, WIDTH), never stored: SUMS, (blocks of columns, tokens), and G with its transpose GT. BULK: X, W, G, GT are descriptors."""
    scale, HALF = tl.load(SCALE), COLUMNS // 2
    row_blocks, column_blocks = tl.cdiv(tokens, ROWS), tl.cdiv(words, COLUMNS)
    for block in tl.range(tl.program_id(0), row_blocks * column_blocks, PROGRAMS, flatten=True):
        row, number = place_of(block, row_blocks, column_blocks)
        row, column = row * ROWS, number * COLUMNS
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, WIDTH, DEPTH):
            x = load_block(X, row, k, tokens, WIDTH, ROWS, DEPTH, BULK)
            w = load_block(W, column, k, words, WIDTH, COLUMNS, DEPTH, BULK)
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        halves = tl.permute(tl.reshape(acc, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        total = write_gradient(left, G, GT, row, column, tokens, words, scale, ROWS, COLUMNS // 2, KIND, FAST, BULK)  # fmt: skip
        total += write_gradient(right, G, GT, row, column + HALF, tokens, words, scale, ROWS, COLUMNS // 2, KIND, FAST, BULK)  # fmt: skip
        rows = row + tl.arange(0, ROWS)
        tl.store(SUMS + number * tokens + rows, total, rows < tokens)


GAIN = 2.0**20  # what the kernel multiplies the gradient by: e5m2 reaches from 2^-16 to 57,344


SMALL_SHARED, LARGE_SHARED = Blocks(128, 128, 64, 8, 3), Blocks(128, 128, 128, 8, 3, 2)
CONFIGS = {89: SMALL_SHARED, 90: LARGE_SHARED, 100: LARGE_SHARED, 120: SMALL_SHARED}


def launch_head(
    x: Tensor, w: Tensor, scale: Tensor, blocks: Blocks, bulk: bool, fast: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient before division (tokens, words), its transpose, and the tokens' sums, of x (tokens, width) and w (words, width): in e5m2 if these are in e4m3, else in their dtype, bfloat16 or the interpreter's float32."""
    (tokens, width), words, device = x.shape, len(w), x.device
    g = x.new_empty(tokens, words, dtype=E5M2 if x.dtype == E4M3 else x.dtype)
    gt = g.new_empty(words, tokens)
    columns = -(-words // blocks.columns)
    sums = torch.empty(columns, tokens, device=device)
    wanted = programs_for(device, blocks, columns * -(-tokens // blocks.rows))
    matrices, half = [x, w, g, gt], blocks.columns // 2
    if bulk:
        sizes = [[blocks.rows, blocks.depth], [blocks.columns, blocks.depth]]
        sizes += [[blocks.rows, half], [half, blocks.rows]]
        matrices = [in_blocks(*pair) for pair in zip(matrices, sizes)]
    head_kernel[(wanted,)](
        *matrices, sums, scale, tokens, words, WIDTH=width, KIND=getattr(tl, KINDS[g.dtype]),
        ROWS=blocks.rows, COLUMNS=blocks.columns, DEPTH=blocks.depth, PROGRAMS=wanted, FAST=fast, BULK=bulk,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return g, gt, sums.sum(0)


@jit
def target_kernel(
    X, W, TARGETS, WEIGHTS, SUMS, INSIDE, SCALE, LOSS, SHARE, OWN, tokens, width,
    ROWS: constexpr, WIDTH: constexpr, SEVERAL: constexpr,
):  # fmt: skip
    """Each token's loss, the reciprocal of its sum, and what each target's own logit adds to the gradient: s (1 - s), less its share where it is no candidate; all by the targets' WEIGHTS. TARGETS, OWN: (tokens, SEVERAL). WEIGHTS: (SEVERAL,). LOSS, SHARE: (tokens,)."""
    TOP: constexpr = 23.0 * 1.4426950408889634
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mine = row < tokens
    there = mine[:, None] & (k < width)[None, :]
    x = tl.load(X + row.to(tl.int64)[:, None] * width + k[None, :], there).to(tl.float32)
    loss, share = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for number in tl.static_range(SEVERAL):
        at, weight = row * SEVERAL + number, tl.load(WEIGHTS + number)
        target = tl.load(TARGETS + at, mine, 0)
        w = tl.load(W + target[:, None] * width + k[None, :], there).to(tl.float32)
        z = tl.sum(tl.where(there, x * w, 0.0), 1) * tl.load(SCALE)
        s = tl.sigmoid((z + 5.0) * (1.0 / 7.5))
        e = tl.math.exp2(s * TOP - TOP) * (1.0 - tl.load(INSIDE + target, mine, 1).to(tl.float32))
        total = tl.load(SUMS + row, mine, 1.0) + e
        loss += weight * (tl.math.log2(total) * 0.6931471805599453 + 23.0 - 23.0 * s)
        share += weight / total
        tl.store(OWN + at, weight * s * (1.0 - s) * (1.0 - e / total), mine)
    tl.store(LOSS + row, loss, mine)
    tl.store(SHARE + row, share, mine)


@jit
def dx_kernel(
    RAW, W, TARGETS, SHARE, OWN, SCALE, DX, factor, tokens, width,
    ROWS: constexpr, WIDTH: constexpr, SEVERAL: constexpr,
):  # fmt: skip
    """Rows of x's gradient: RAW over the token's sum, less the targets' own parts, times `factor`. SCALE: W's."""
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mine = row < tokens
    there = mine[:, None] & (k < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + k[None, :]
    raw, share = tl.load(RAW + at, there, 0.0).to(tl.float32), tl.load(SHARE + row, mine, 0.0)
    dx = raw * share[:, None]
    for number in tl.static_range(SEVERAL):
        target = tl.load(TARGETS + row * SEVERAL + number, mine, 0)
        w = tl.load(W + target[:, None] * width + k[None, :], there).to(tl.float32)
        own = tl.load(OWN + row * SEVERAL + number, mine, 0.0)
        dx -= w * tl.load(SCALE) * own[:, None]
    tl.store(DX + at, (dx * factor).to(DX.dtype.element_ty), there)


class Form(NamedTuple):
    """What operands are rounded to, and what multiplies them: e4m3 by these functions, or another dtype by its own.

    launch(x, w, scale): as `launch_head`; None: there is no kernel, and the definition computes. product: as `fp8_matmul`. scale_of: as fp8's.
    """

    kind: torch.dtype
    launch: Any = None
    product: Callable = fp8_matmul
    scale_of: Callable = scale_of


def micro_batch_head(
    x: Tensor, w: Tensor, scale: Tensor, targets: Tensor, weights: Tensor, count: int, loss: Tensor, dx: Tensor, dw: Tensor, factor: float, form: Form
) -> Tensor:  # fmt: skip
    """Head and loss of one micro-batch: writes its losses (tokens,) and x's gradient, and returns dw, (words, width), with its part of w's gradient, or that part alone where the softmax is over all words. w: (words, width) in the form's dtype, with its scale. x: (tokens, width). targets: (tokens, several), weights: (several,). dw: float32, without rows where the softmax is over all words. factor: 23 / 7.5 / all tokens."""
    (tokens, width), kind, sx = x.shape, w.dtype, form.scale_of(x)
    chosen, inside = choose_candidates(targets.flatten(), len(w), count)
    numbers = w.view(torch.uint8 if kind == E4M3 else kind)  # there is no indexing for FP8
    rows = w if chosen is None else numbers[chosen].view(kind)
    x8 = quantize(x, sx, kind)[0]
    g, gt, sums = form.launch(x8, rows, sx * scale)
    share, own = torch.empty_like(sums), torch.empty_like(targets, dtype=torch.float32)
    sizes = {"ROWS": 4, "WIDTH": 1 << (width - 1).bit_length(), "SEVERAL": len(weights)}
    grid, unit = (-(-tokens // 4),), sx.new_full((1,), 1 / GAIN)
    target_kernel[grid](x8, w, targets, weights, sums, inside.view(torch.uint8), sx * scale, loss, share, own, tokens, width, **sizes)  # fmt: skip
    raw = form.product(g, rows.T.contiguous(), unit, scale, x.dtype)
    dx_kernel[grid](raw, w, targets, share, own, scale, dx, factor, tokens, width, **sizes)
    late = sx * share.abs().max().clamp(min=1e-12)  # weights may be 0
    xt = quantize(x, late, kind, share, straight=False, turned=True)[1]
    part = form.product(gt, xt, unit * factor, late, torch.float32)
    dw = part if chosen is None else dw.index_add_(0, chosen, part)
    full = x.float()
    for column, each in zip(targets.T, own.T):
        dw.index_add_(0, column, full * (each * -factor)[:, None])
    return dw


def head_loss_fused(
    x: Tensor, w: Tensor, targets: Tensor, count: int, form: Form, parts: int = 1, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `head_loss_by_hand`, by the kernels. count: candidates, 0 for all; parts: micro-batches of equal length, each with its own. targets, weights: as there."""
    x, targets = x.contiguous(), targets.contiguous().view(len(x), -1)
    scale, dx = form.scale_of(w), torch.empty_like(x)
    weights = (targets.new_ones(1) if weights is None else weights).to(scale).contiguous()
    loss, few = scale.new_empty(len(x)), 0 < count <= w.shape[1]
    w8 = quantize(w, scale, form.kind, straight=False, turned=True)[1]
    dw = x.new_zeros(few * len(w8), len(w), dtype=torch.float32)
    pieces = (each.chunk(parts if few else 1) for each in (x, targets, loss, dx))
    factor = CAP / SLOPE / len(x)
    for own, to, lost, out in zip(*pieces):
        dw = micro_batch_head(own, w8, scale, to, weights, count, lost, out, dw, factor, form)
    return loss.mean(), dx, dw.T.contiguous()


def check_head(x: Tensor, w: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
    """Raise ValueError for shapes and dtypes that the head cannot take."""
    told = [x, w, targets, *([] if weights is None else [weights])]
    fit = x.dim() == w.dim() == 2 and x.shape[1] == w.shape[0] and told[-1].dim() == 1
    fit = fit and targets.shape == (len(x), *map(len, told[3:]))
    numbers = x.is_floating_point() and w.is_floating_point() and targets.dtype == torch.int64
    if not (fit and numbers):
        given = ", ".join(f"{tuple(each.shape)} of {each.dtype}" for each in told)
        raise ValueError(
            "x (tokens, width) and w (width, words) of floating-point numbers, targets (tokens,) of int64, or (tokens, several) with weights (several,), not "
            + given
        )


def launch_for(device: torch.device, configs: dict[int, Blocks]) -> Callable | None:
    """`launch_head` as a device runs it: on NVIDIA GPUs from compute capability 8.0 on, where there is Triton. Else None."""
    chip = (
        torch.cuda.get_device_capability(device)
        if device.type == "cuda" and find_triton()
        else (0, 0)
    )
    if chip < (8, 0):
        return None
    return partial(launch_head, blocks=blocks_for(device, configs), bulk=chip >= (9, 0), fast=True)


def head_form(device: torch.device) -> Form:
    """How a device multiplies: in e4m3, or, on GPUs without units for it, in bfloat16."""
    if device.type == "cuda" and not has_fp8(device):
        return import_module("speedrun.kernels.head_bf16").bf16_form(device)
    return Form(E4M3, launch_for(device, CONFIGS))


@torch.library.custom_op(f"{NAMESPACE}::head_loss", mutates_args=())
def head_loss_op(
    x: Tensor, w: Tensor, targets: Tensor, candidates: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss, float32, and its gradients with respect to x (tokens, width), in its dtype, and to w (width, words), float32.

    candidates: (2,) int in CPU memory, so that no step compiles again for a new one: how many words the softmax is over, 0: all; and of how
    many micro-batches of equal length, each of which chooses its own, the tokens are. targets, weights: as `head_loss_by_hand`'s; weights have no gradient.
    """
    check_head(x, w, targets, weights)
    (count, parts), form = candidates.tolist(), head_form(x.device)
    if len(x) % parts:
        raise ValueError(f"{len(x)} tokens are not {parts} micro-batches of equal length")
    compute = head_loss_fused
    if form.launch is None or any(n % 16 for n in (len(x) // parts, *w.shape, count)):
        compute = import_module("speedrun.kernels.head_reference").head_loss_reference
    return compute(x, w, targets, count, form, parts, weights)


@head_loss_op.register_fake
def fake_head_loss(x, w, targets, candidates, weights=None):
    loss = x.new_empty((), dtype=torch.float32)
    return loss, x.new_empty(x.shape), w.new_empty(w.shape, dtype=torch.float32)


def scale_gradients(ctx: Any, grad: Tensor, *_) -> tuple:
    return *(each * grad.to(each.dtype) for each in ctx.saved_tensors), None, None, None


keep = lambda ctx, inputs, output: ctx.save_for_backward(*output[1:])  # noqa: E731
head_loss_op.register_autograd(scale_gradients, setup_context=keep)
