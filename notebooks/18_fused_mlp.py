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
# # The fused MLP
#
# ## The code

# %%
#| default_exp kernels.mlp
#| export
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speedrun.kernels.fp8 import E4M3, E5M2, fp8_matmul, quantize, quantize_reference
from speedrun.lab.hardware import find_triton, jit

try:
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # macOS, Windows
    tl = constexpr = Any

NAMESPACE = __name__.strip("_").replace(".", "_")  # the notebook's operator is not the package's


# %% [markdown]
# ### Scales without a history


# %%
#| export
@torch.no_grad()
def mlp_scales(up: Tensor, down: Tensor) -> Tensor:
    """Scales of each layer's tensors in eight bits, (layers, 5, 4) float32, the four numbers of a scale equal, so that each begins at a multiple of 16 bytes.

    up: (layers, hidden, width), down: (layers, width, hidden). In order: of x, whose rows have a norm of at most sqrt(width), as rms_norm leaves them; of up; of down; of the
    square, which Cauchy and Schwarz bound by width · max|up's row|²; and the hidden gradient's over the output gradient's.
    """
    width, top = up.shape[2], torch.finfo(E4M3).max
    rows = up.square().sum(2).amax(1)
    columns = down.square().sum(1).amax(1)
    of_x = torch.full_like(rows, math.sqrt(width) / top)
    of_weights = (each.abs().amax((1, 2)) / top for each in (up, down))
    scales = [of_x, *of_weights, width * rows / top, 2 * width * (rows * columns).sqrt()]
    return torch.stack(scales, 1).clamp(min=1e-12)[..., None].expand(-1, -1, 4).contiguous()


# %% [markdown]
# ### The kernel


# %%
#| export
@jit
def load_block(X, row, column, rows, columns, ROWS: constexpr, COLUMNS: constexpr, BULK: constexpr):
    """A block of a matrix (rows, columns), zeros beyond its edges. BULK: X is a descriptor."""
    if BULK:
        return X.load([row, column])
    else:
        r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        there = (r < rows)[:, None] & (c < columns)[None, :]
        block = tl.load(X + r.to(tl.int64)[:, None] * columns + c[None, :], there)
        # not `other`: of eight-bit numbers, masked ones came as NaN
        return tl.where(there, block.to(tl.float32), 0.0).to(block.dtype)


@jit
def store_block(
    X, block, row, column, rows, columns, ROWS: constexpr, COLUMNS: constexpr, BULK: constexpr
):
    """Write a block of a matrix (rows, columns), as far as it lies inside."""
    if BULK:
        X.store([row, column], block)
    else:
        r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        there = (r < rows)[:, None] & (c < columns)[None, :]
        tl.store(X + r.to(tl.int64)[:, None] * columns + c[None, :], block, there)


@jit
def place_of(block, row_blocks, column_blocks):
    """Which block of a matrix comes as number `block`, (row, column): eight rows of blocks go through the columns together, so that both operands stay in the cache."""
    group = block // (8 * column_blocks)
    high = tl.minimum(row_blocks - group * 8, 8)
    inside = block % (8 * column_blocks)
    return group * 8 + inside % high, inside // high


# %%
#| export
@jit
def write_hidden(
    acc, P, OUT, TURNED, row, column, tokens, hidden, scale, root, largest,
    ROWS: constexpr, COLUMNS: constexpr, KIND: constexpr, BULK: constexpr,
):  # fmt: skip
    """What follows a block's product: relu and square, or, where P is the square, times 2 sqrt(P); clipped, rounded, written in one or both layouts."""
    h = acc * scale
    if P is None:
        h = tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)
        h = h * h * root
    else:
        p = load_block(P, row, column, tokens, hidden, ROWS, COLUMNS, BULK).to(tl.float32)
        h = h * (tl.sqrt(p) * root)
    h = tl.clamp(h, -largest, largest, propagate_nan=tl.PropagateNan.ALL)
    out = h.to(KIND)
    store_block(OUT, out, row, column, tokens, hidden, ROWS, COLUMNS, BULK)
    if TURNED is not None:
        store_block(TURNED, tl.trans(out), column, row, hidden, tokens, COLUMNS, ROWS, BULK)


# %%
#| export
@jit
def hidden_kernel(
    A, W, P, OUT, TURNED, SCALE_A, SCALE_W, SCALE_P, SCALE_OUT, tokens, hidden, largest,
    WIDTH: constexpr, KIND: constexpr, ROWS: constexpr, COLUMNS: constexpr, DEPTH: constexpr, PROGRAMS: constexpr, BULK: constexpr,
):  # fmt: skip
    """A (tokens, WIDTH) times W (hidden, WIDTH) transposed, then `write_hidden`, over SCALE_OUT. BULK: A, W, P, OUT and TURNED are descriptors."""
    scale, root = tl.load(SCALE_A) * tl.load(SCALE_W), 1.0 / tl.load(SCALE_OUT)
    if P is not None:
        root = root * 2.0 * tl.sqrt(tl.load(SCALE_P))
    row_blocks, column_blocks = tl.cdiv(tokens, ROWS), tl.cdiv(hidden, COLUMNS)
    HALF: constexpr = COLUMNS // 2
    for block in tl.range(tl.program_id(0), row_blocks * column_blocks, PROGRAMS, flatten=True):
        row, column = place_of(block, row_blocks, column_blocks)
        row, column = row * ROWS, column * COLUMNS
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, WIDTH, DEPTH):
            a = load_block(A, row, k, tokens, WIDTH, ROWS, DEPTH, BULK)
            w = load_block(W, column, k, hidden, WIDTH, COLUMNS, DEPTH, BULK)
            acc = tl.dot(a, tl.trans(w), acc, input_precision="ieee")
        left, right = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, HALF)), (0, 2, 1)))
        write_hidden(left, P, OUT, TURNED, row, column, tokens, hidden, scale, root, largest, ROWS, HALF, KIND, BULK)  # fmt: skip
        write_hidden(right, P, OUT, TURNED, row, column + HALF, tokens, hidden, scale, root, largest, ROWS, HALF, KIND, BULK)  # fmt: skip


# %%
#| export
class Blocks(NamedTuple):
    """How a product is launched: its block of results, how much of the inner dimension at a time, warps, stages, programs on a multiprocessor."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int = 1


SMALL_SHARED = Blocks(128, 128, 64, 8, 3), Blocks(128, 128, 64, 8, 3)  # forward, backward
LARGE_SHARED = Blocks(128, 128, 128, 4, 3, 2), Blocks(128, 128, 64, 4, 4, 2)
CONFIGS = {89: SMALL_SHARED, 90: LARGE_SHARED, 100: LARGE_SHARED, 120: SMALL_SHARED}


def blocks_for(device: torch.device, configs: dict[int, Any]) -> Any:
    """The configuration of a chip: its own, or that of the next older one."""
    major, minor = torch.cuda.get_device_capability(device)
    return configs[max(chip for chip in configs if chip <= 10 * major + minor)]


def in_blocks(x: Tensor | None, block: list[int]) -> Any:
    """A matrix as the tensor memory accelerator reads and writes it."""
    if x is None:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, block)


def programs_for(device: torch.device, blocks: Blocks, wanted: int) -> int:
    """How many programs share so many blocks of results: what the multiprocessors hold at a time, on a GPU."""
    if device.type != "cuda":
        return wanted
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return min(wanted, count * blocks.programs)


# %%
#| export
BYTES = {E4M3: torch.uint8, E5M2: torch.uint8}
KINDS = {E4M3: "float8e4nv", E5M2: "float8e5", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def launch_hidden(
    a: Tensor, w: Tensor, scales: tuple, kind: torch.dtype, square: Tensor | None, turned: bool, blocks: Blocks, bulk: bool
) -> tuple[Tensor, Any]:  # fmt: skip
    """As `hidden_reference`, by the kernel. Off a GPU, for the interpreter, in float32, rounded afterwards."""
    (tokens, width), hidden, kept = a.shape, len(w), kind
    copied, turned = turned and not bulk, turned and bulk
    if a.device.type != "cuda":
        a, w, square = a.float(), w.float(), None if square is None else square.float()
        kept = torch.float32
    out, other = a.new_empty(tokens, hidden, dtype=kept), None
    if turned:
        other = a.new_empty(hidden, tokens, dtype=kept)
    programs = programs_for(
        a.device, blocks, -(-tokens // blocks.rows) * -(-hidden // blocks.columns)
    )
    matrices, half = [a, w, square, out, other], blocks.columns // 2
    if bulk:
        straight = [blocks.rows, half]
        sizes = [
            [blocks.rows, blocks.depth],
            [blocks.columns, blocks.depth],
            straight,
            straight,
            straight[::-1],
        ]
        matrices = [in_blocks(*pair) for pair in zip(matrices, sizes)]
    hidden_kernel[(programs,)](
        *matrices, *scales, tokens, hidden, torch.finfo(kind).max, WIDTH=width, KIND=getattr(tl, KINDS[kept]), ROWS=blocks.rows,
        COLUMNS=blocks.columns, DEPTH=blocks.depth, PROGRAMS=programs, BULK=bulk, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    if copied:  # without descriptors a GPU got some of the turned entries wrong: see chapter 15
        other = out.view(BYTES.get(kept, kept)).mT.contiguous().view(kept)
    return out.to(kind), None if other is None else other.to(kind)


# %%
#| export
def hidden_reference(
    a: Tensor, w: Tensor, scales: tuple, kind: torch.dtype, square: Tensor | None = None, turned: bool = True
) -> tuple[Tensor, Any]:  # fmt: skip
    """h = a wᵀ in true numbers, then relu(h)², or, given the square of the forward pass, h · 2 sqrt(square): over its scale in dtype kind, (tokens, hidden), and transposed.

    a: (tokens, width), w: (hidden, width), square: (tokens, hidden). scales: of a, w, square and the result, (1,) float32 each; the third may be None.
    """
    of_a, of_w, of_square, of_out = scales
    h = a.float() @ w.float().mT * (of_a * of_w)
    h = h.relu().square() if square is None else h * (2 * (square.float() * of_square).sqrt())
    out = quantize_reference(h, of_out, kind)
    return out, out.mT.contiguous() if turned else None


def why_no_kernel(device: torch.device) -> str:
    """Why a device computes by the definition and not by a kernel in eight bits; empty: the kernel runs."""
    if device.type != "cuda":
        return "it is no NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return "its matrix units do not know FP8 (compute capability 8.9 or later)"
    return "" if find_triton() else "Triton is not installed"


def hidden_layer(
    a: Tensor, w: Tensor, scales: tuple, kind: torch.dtype, square: Tensor | None = None
) -> tuple[Tensor, Any]:
    """`hidden_reference` in both layouts, by the kernel where there is one."""
    if why_no_kernel(a.device) or any(size % 16 for size in (*a.shape, len(w))):
        return hidden_reference(a, w, scales, kind, square)
    blocks = blocks_for(a.device, CONFIGS)[square is not None]
    bulk = torch.cuda.get_device_capability(a.device) >= (9, 0)
    return launch_hidden(a, w, scales, kind, square, True, blocks, bulk)


# %%
#| export
@torch.library.custom_op(f"{NAMESPACE}::mlp", mutates_args=())
def mlp_op(x: Tensor, up: Tensor, down: Tensor, scales: Tensor) -> list[Tensor]:
    """relu(x upᵀ)² downᵀ in eight bits, (tokens, width) in x's dtype; then what the backward pass needs: x turned, the square in both layouts, up and down turned.

    x: (tokens, width), up: (hidden, width), down: (width, hidden), any float dtypes. scales: one layer's of `mlp_scales`, (5, 4).
    """
    check_mlp(x, up, down)
    of_x, of_up, of_down, of_square, _ = (scale[:1] for scale in scales)
    x8, x8t = quantize(x, of_x, turned=True)
    up8, up8t = quantize(up, of_up, turned=True)
    down8, down8t = quantize(down, of_down, turned=True)
    square, squaret = hidden_layer(x8, up8, (of_x, of_up, None, of_square), E4M3)
    y = fp8_matmul(square, down8, of_square, of_down, x.dtype)
    return [y, x8t, square, squaret, up8t, down8t]


def check_mlp(x: Tensor, up: Tensor, down: Tensor) -> None:
    """Raise ValueError for shapes that are no MLP's."""
    if x.dim() != 2 or up.dim() != 2 or x.shape[1] != up.shape[1] or down.shape != up.mT.shape:
        shapes = ", ".join(str(tuple(each.shape)) for each in (x, up, down))
        raise ValueError(
            f"x (tokens, width), up (hidden, width), down (width, hidden), not {shapes}"
        )


@mlp_op.register_fake
def fake_mlp(x, up, down, scales):
    (tokens, width), hidden = x.shape, len(up)
    shapes = (width, tokens), (tokens, hidden), (hidden, tokens), (width, hidden), (hidden, width)
    return [torch.empty_like(x), *(x.new_empty(shape, dtype=E4M3) for shape in shapes)]


@torch.library.custom_op(f"{NAMESPACE}::mlp_backward", mutates_args=())
def mlp_backward_op(
    grad: Tensor, of_grad: Tensor, saved: list[Tensor], scales: Tensor
) -> list[Tensor]:
    """Gradients of x, up and down, in grad's dtype, from the output's, (tokens, width), its scale, (1,) float32, and what `mlp_op` saved."""
    x8t, square, squaret, up8t, down8t = saved
    of_x, of_up, of_down, of_square, of_hidden = (scale[:1] for scale in scales)
    grad8, grad8t = quantize(grad, of_grad, E5M2, turned=True)
    of_hidden = of_hidden * of_grad
    hidden, hiddent = hidden_layer(
        grad8, down8t, (of_grad, of_down, of_square, of_hidden), E5M2, square
    )
    dx = fp8_matmul(hidden, up8t, of_hidden, of_up, grad.dtype)
    dup = fp8_matmul(hiddent, x8t, of_hidden, of_x, grad.dtype)
    return [dx, dup, fp8_matmul(grad8t, squaret, of_grad, of_square, grad.dtype)]


@mlp_backward_op.register_fake
def fake_mlp_backward(grad, of_grad, saved, scales):
    x8t, _, _, up8t, down8t = saved
    shapes = x8t.shape[::-1], up8t.shape[::-1], down8t.shape[::-1]
    return [grad.new_empty(shape) for shape in shapes]


def keep_saved(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ctx.save_for_backward(*output[1:], inputs[3])


def mlp_gradients(ctx: Any, grads: list[Tensor]) -> tuple:
    *saved, scales = ctx.saved_tensors
    grad = grads[0].contiguous()
    of_grad = (grad.abs().amax().float() / torch.finfo(E5M2).max).clamp(min=1e-12).reshape(1)
    return *mlp_backward_op(grad, of_grad, saved, scales), None


mlp_op.register_autograd(mlp_gradients, setup_context=keep_saved)


# %% [markdown]
# ## The measurement


# %%
#| export measure.mlp
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from speedrun.kernels.fp8 import E4M3, E5M2, fp8_matmul, quantize, scale_of
from speedrun.lab.bench import bench
from speedrun.lab.errors import UserError
from speedrun.lab.provenance import stamp
from speedrun.measure.loss import config_of_run, relative_error

NAMES = ()
ON_GPUS = ("kernels", "trained")  # trained: the folder of a finished run
SHAPES = (16_384, 32_768, 49_152, 65_536)  # tokens of record_200m's forward passes
WIDTH, HIDDEN = 768, 3072
BF16_BLOCKS = Blocks(128, 256, 64, 8, 4), Blocks(128, 256, 64, 8, 3)


def drawn_mlp(tokens: int, zero: bool = False, seed: int = 0) -> list[Tensor]:
    """x (tokens, 768) bfloat16 of unit mean square, up and down float32, and the output's gradient, whose rows differ by orders of magnitude; on the GPU. zero: down is, as at step 0."""
    generator = torch.Generator("cuda").manual_seed(seed)
    draw = partial(torch.randn, device="cuda", generator=generator)
    x = F.rms_norm(draw(tokens, WIDTH), (WIDTH,)).bfloat16()
    up, down = 0.03 * draw(HIDDEN, WIDTH), (0.0 if zero else 0.03) * draw(WIDTH, HIDDEN)
    return [x, up, down, (1e-5 * draw(tokens, WIDTH) * draw(tokens, 1).exp()).bfloat16()]


def exact_mlp(x: Tensor, up: Tensor, down: Tensor, grad: Tensor) -> list[Tensor]:
    """The output and the three gradients, in the arguments' dtype."""
    leaves = [each.detach().requires_grad_() for each in (x, up, down)]
    y = F.linear(F.relu(F.linear(leaves[0], leaves[1])).square(), leaves[2])
    return [y, *torch.autograd.grad(y, leaves, grad)]


# %%
#| export measure.mlp
def plain_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Chapter 05's MLP, in bfloat16."""
    with torch.autocast("cuda", torch.bfloat16):
        return F.linear(F.relu(F.linear(x, up)).square(), down)


def fused_bfloat16(x: Tensor, up: Tensor, down: Tensor, grad: Tensor) -> list[Tensor]:
    """Version 2: the kernel's epilogues in bfloat16, the other four products by cuBLAS."""
    one, bf16 = x.new_ones(1, dtype=torch.float32), torch.bfloat16
    up, down = up.bfloat16(), down.bfloat16()
    square, _ = launch_hidden(x, up, (one, one, one, one), bf16, None, False, BF16_BLOCKS[0], True)
    told = (one, one, one, one), bf16, square, False, BF16_BLOCKS[1], True
    hidden, _ = launch_hidden(grad, down.mT.contiguous(), *told)
    return [square @ down.mT, hidden @ up, hidden.mT @ x, grad.mT @ square]


def fp8_mlp(x: Tensor, up: Tensor, down: Tensor, grad: Tensor) -> list[Tensor]:
    """Version 3: all products in eight bits."""
    scales = mlp_scales(up[None], down[None])[0]
    y, *saved = mlp_op(x, up, down, scales)
    return [y, *mlp_backward_op(grad, scale_of(grad, E5M2), saved, scales)]


def mlp_versions(x: Tensor, up: Tensor, down: Tensor, grad: Tensor) -> dict[str, Callable[[], list[Tensor]]]:  # fmt: skip
    """Output and gradients by each version."""
    leaves = [each.detach().requires_grad_() for each in (x, up, down)]
    compiled = torch.compile(plain_mlp, dynamic=False, fullgraph=True)

    def plain() -> list[Tensor]:
        y = compiled(*leaves)
        return [y, *torch.autograd.grad(y, leaves, grad)]

    given = x, up, down, grad
    return {"plain": plain, "fused": partial(fused_bfloat16, *given), "fp8": partial(fp8_mlp, *given)}  # fmt: skip


# %%
#| export measure.mlp
def parts_of(x: Tensor, up: Tensor, down: Tensor, grad: Tensor) -> dict[str, Callable[[], Any]]:
    """What version 3 consists of; and the kernels in other blocks."""
    of_x, of_up, of_down, of_square, of_hidden = (s[:1] for s in mlp_scales(up[None], down[None])[0])  # fmt: skip
    of_grad = scale_of(grad, E5M2)
    x8, x8t = quantize(x, of_x, turned=True)
    up8, up8t = quantize(up, of_up, turned=True)
    down8, down8t = quantize(down, of_down, turned=True)
    grad8, grad8t = quantize(grad, of_grad, E5M2, turned=True)
    forward = x8, up8, (of_x, of_up, of_up, of_square), E4M3, None, True
    square, squaret = launch_hidden(*forward, LARGE_SHARED[0], True)
    backward = grad8, down8t, (of_grad, of_down, of_square, of_hidden * of_grad), E5M2, square, True
    hidden, hiddent = launch_hidden(*backward, LARGE_SHARED[1], True)
    found: dict[str, Callable[[], Any]] = {
        "quantise x": lambda: quantize(x, of_x, turned=True),
        "quantise weights": lambda: [quantize(w, of_up, turned=True) for w in (up, down)],
        "scale of the gradient": lambda: scale_of(grad, E5M2),
        "quantise the gradient": lambda: quantize(grad, of_grad, E5M2, turned=True),
        "x up": lambda: fp8_matmul(x8, up8, of_x, of_up, torch.bfloat16),
        "square down": lambda: fp8_matmul(square, down8, of_square, of_down, torch.bfloat16),
        "dx": lambda: fp8_matmul(hidden, up8t, of_hidden, of_up, torch.bfloat16),
        "dup": lambda: fp8_matmul(hiddent, x8t, of_hidden, of_x, torch.bfloat16),
        "ddown": lambda: fp8_matmul(grad8t, squaret, of_grad, of_square, torch.bfloat16),
    }
    tried = [*LARGE_SHARED, Blocks(128, 256, 128, 8, 3), Blocks(128, 128, 128, 8, 3, 2), Blocks(256, 128, 128, 8, 3)]  # fmt: skip
    tried += [Blocks(64, 256, 64, 4, 4, 2), LARGE_SHARED[0]._replace(programs=1)]
    for way, told in (("forward", forward), ("backward", backward)):
        for blocks in tried:
            found[f"{way} {tuple(blocks)}"] = partial(launch_hidden, *told, blocks, True)
    of_forward = forward[2]
    found["forward straight"] = partial(launch_hidden, x8, up8, of_forward, E4M3, None, False, LARGE_SHARED[0], True)  # fmt: skip
    return found


def measure_kernels() -> dict[str, Any]:
    """Times of versions and parts, and the versions' errors against float64."""
    found: dict[str, list] = {"rows": [], "errors": []}
    for tokens in SHAPES:
        given = drawn_mlp(tokens)
        calls = mlp_versions(*given) | (parts_of(*given) if tokens == 49_152 else {})
        for name, took in bench(calls, "cuda", 15, cold=True, graph=True).items():
            found["rows"].append({"name": name, "tokens": tokens} | took._asdict())
            print(found["rows"][-1], flush=True)
    for zero in (False, True):
        given = drawn_mlp(4096, zero)
        known = exact_mlp(*(each.double() for each in given))
        for name, call in mlp_versions(*given).items():
            pairs = zip(("y", "dx", "dup", "ddown"), call(), known)
            errors = {key: relative_error(a, b) if b.any() else a.abs().max().item() for key, a, b in pairs}  # fmt: skip
            found["errors"].append({"name": name, "zero": zero} | errors)
    return found


# %%
#| export measure.mlp
def exponents(values: Tensor) -> dict[str, Any]:
    """How often each power of two occurs among magnitudes, from 2^-17 to 2^16, how many are 0, and the largest."""
    sizes = values.float().abs()
    powers = torch.floor(torch.log2(sizes[sizes > 0])).clamp(-17, 16).int() + 17
    counts = torch.bincount(powers, minlength=34).tolist()
    return {"zero": int((sizes == 0).sum()), "counts": counts, "largest": sizes.max().item()}


def hidden_of_run(folder: Path) -> dict[str, Any]:
    """What the kernel writes in a finished run's layers, forward and backward, on a validation micro-batch: in eight bits, so over its scale."""
    from speedrun.train import build_run, forward_loss, resume, told_now, val_batches

    config, rows = config_of_run(folder), list[dict[str, Any]]()

    def watch(a: Tensor, w: Tensor, scales: tuple, kind: torch.dtype, square: Any = None) -> tuple:
        out = hidden_layer(a, w, scales, kind, square)
        way = "forward" if square is None else "backward"
        rows.append({"pass": way, "operand": exponents(a)} | exponents(out[0]))
        return out

    module = sys.modules[hidden_layer.__module__]
    with tempfile.TemporaryDirectory() as scratch, mock.patch.object(module, "hidden_layer", watch):
        run = build_run(config, Path(scratch), echo=None)
        run.folder = folder
        resume(run)
        batch, told = next(iter(val_batches(run, config.val_tokens))), told_now(run)
        loss = forward_loss(run.model, batch, run.ranks.device, config.precision, told)
        (loss / config.data.micro_batches).backward()
    return {"layers": rows, "tokens": batch.targets.numel(), "loss": loss.item()}


# %%
#| export measure.mlp
def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """kernels: times and errors. trained: which numbers a finished run's hidden layers hold; its argument the run's folder."""
    if not torch.cuda.is_available():
        raise UserError(f"{name} needs FP8 matrix units", "run it on an NVIDIA GPU")
    modules = ["speedrun.measure.mlp"]
    if name == "kernels":
        return measure_kernels(), stamp(command, modules, 1, [0])
    if not arguments:
        raise UserError("no run is given for trained", "python scripts/measure.py mlp trained runs/…")  # fmt: skip
    seed = config_of_run(Path(arguments[0])).seed
    return hidden_of_run(Path(arguments[0])), stamp(command, [*modules, "speedrun.train"], 1, [seed])  # fmt: skip
