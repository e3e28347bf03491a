# Tangled from notebooks/18_fused_mlp.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Scales
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


# %% The kernel
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


# %% The reference, and who decides
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
    if why_no_kernel(a.device):
        return hidden_reference(a, w, scales, kind, square)
    blocks = blocks_for(a.device, CONFIGS)[square is not None]
    bulk = torch.cuda.get_device_capability(a.device) >= (9, 0)
    return launch_hidden(a, w, scales, kind, square, True, blocks, bulk)


# %% The operator
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
    """Raise ValueError for shapes that are no MLP's, and on a GPU for sizes that are no multiples of 16."""
    if x.dim() != 2 or up.dim() != 2 or x.shape[1] != up.shape[1] or down.shape != up.mT.shape:
        shapes = f"{tuple(x.shape)}, {tuple(up.shape)}, {tuple(down.shape)}"
        raise ValueError(
            f"x (tokens, width), up (hidden, width), down (width, hidden), not {shapes}"
        )
    if x.device.type == "cuda" and any(size % 16 for size in (*x.shape, len(up))):
        sizes = f"{len(x)} tokens, width {x.shape[1]}, hidden {len(up)}"
        raise ValueError(f"matrix units for eight bits want multiples of 16, not {sizes}")


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
