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
# # Head and loss in one pass
#
# ```{admonition} Cost box
# About half a minute on two CPU cores, where Triton's interpreter runs the kernel at small shapes; on a GPU with FP8 it is compiled. Times and losses come from committed measurements on H200s.
# The FP8 head is record 19's: \@YouJiacheng. Fused losses: records 60 (\@soren\_dunn\_ and AI System Locus), 67 and 79 (\@andrewbriand8), 75 (\@moof2x). Sampled softmax, as the contest uses it: record 92. Epilogues that write the gradient and never the logits: Liger Kernel and quack {cite}`liger,quack`. The kernel below is this book's own.
# ```
#
# ## The problem
#
# The last matrix of the model is its largest. It turns each vector of 768 numbers into 50,304 logits, one for each word, and only one number per token is wanted of them: the loss. Chapter 08 wrote it as a matrix product, a softcap and a cross-entropy, and `torch.compile` fuses what it can.

# %%
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
from speedrun.lab.hardware import setup

machine = setup()

# %% tags=["hide-input"]
import math

from speedrun.lab.results import load_result, measured_on
from speedrun.model.gpt import param_specs
from speedrun.presets import preset

TOKENS, WIDTH, WORDS = 49_152, 768, 50_304  # a micro-batch of record_200m's last third
result = load_result("loss", "kernels")
rows = {(row["version"], row["tokens"]): row for row in result["data"]["rows"]}
FLOPS_S, FP8_FLOPS_S = 989e12, 1979e12  # an H200 by its data sheet, dense
specs = param_specs(preset("record_200m").model, 50_257)
weights = {s.name: math.prod(s.shape) for s in specs if s.is_matmul}
plain = rows["plain", TOKENS]
flops = 3 * 2 * TOKENS * WIDTH * WORDS
logits_gb = TOKENS * WORDS * 2 / 1e9
share = WIDTH * WORDS / sum(weights.values())
floor_ms, floor_fp8 = 1e3 * flops / FLOPS_S, 1e3 * flops / FP8_FLOPS_S
print(
    f"the head: {share:.0%} of the weights of matrix products, {flops / 1e12:.1f} TFLOP forward and backward"
)
print(f"by the data sheet at least {floor_ms:.1f} ms in bfloat16, {floor_fp8:.1f} in FP8")
print(
    f"PyTorch, compiled: {plain['p50']:.1f} ms, and {plain['peak_mib'] / 1024:.1f} GiB; one copy of the logits: {logits_gb:.1f} GB"
)
print(measured_on(result))
assert 0.3 < share < 0.4 and plain["p50"] > 2 * floor_ms and 4.9 < logits_gb < 5.0

# %% [markdown]
# The head has a third of all weights that a token is multiplied by, and the compiled form takes more than twice what the data sheet allows for its three products (logits forward, two gradients backward). The difference is traffic. The logits of one micro-batch are five gigabytes in bfloat16. They are written, read for the softmax, read again for the gradient, written as a gradient, and that is read twice more.
#
# ```{admonition} Prediction
# Which of these five trips can be saved at all? The gradient of a logit is $(p_v - [v = y])$ times the slope of the softcap, and $p_v = e^{z'_v} / \sum_u e^{z'_u}$ needs the sum over all words, which is known only when the last block of logits has been computed. **So must the logits be kept, or computed twice?** And if the gradient is rounded to FP8's e5m2, with two bits of mantissa: **how large is the relative error of $\partial L / \partial x$**, 1%, 5% or 25%?
# ```
#
# ## The idea
#
# ### A gradient before the sum
#
# Neither. The softcap bounds every logit: $z' = 23\,\sigma((z + 5) / 7.5)$ lies between 0 and 23. So $e^{z' - 23}$ can be summed without looking for a maximum first. With $s = \sigma((z+5)/7.5)$ and $S_t = \sum_v e^{23 s_{tv} - 23}$,
#
# $$
# \frac{\partial L}{\partial z_{tv}} = \frac{23}{7.5\,T} \Big( \underbrace{\frac{1}{S_t}}_{\text{later}} \; \underbrace{e^{23 s_{tv} - 23}\, s_{tv} (1 - s_{tv})}_{G_{tv},\ \text{known at once}} \; - \; [v = y_t]\, s_{tv}(1 - s_{tv}) \Big) .
# $$
#
# A block of the product is finished in a multiprocessor's registers. What follows, the **epilogue**, can compute $G$ there and write it, instead of the logit. The sum $S_t$ is one number per token, and it multiplies whole rows: the gradient of $x$ is $G W^\top$ with its rows divided by $S_t$, and the gradient of $W$ is $(x / S)^\top G$. Dividing the small operands does what dividing $G$ would have done. No logit is ever written, and $G$ is written once.
#
# ### The target apart
#
# $G$ is stored in e5m2. Its exponent covers what probabilities need, its two bits of mantissa round by up to an eighth. But most of the gradient is not in $p$. It is in the one entry of each row where $-1$ is added, and that entry needs no matrix product: it adds a multiple of *one row* of $W$ to the gradient of $x$, and of $x$ to one row of $W$'s. Both are done exactly, in float32, and the e5m2 tensor holds the rest.
#
# ### Words that need not be asked
#
# A softmax over 50,304 words asks, for every token, about words that no one would have guessed. Record 92 lets the softmax of most steps run over fewer: all words that occur as targets in the batch, filled up by a fixed sweep through the vocabulary {cite}`moddednanogpt`. It is the old idea of a sampled softmax {cite}`bengio2008,jean2015`, without the correction that would make the loss comparable with the full one: all tokens of a batch share the candidates, and the last steps train with all words, so that the final probabilities are right.
#
# ## The code

# %%
#| default_exp kernels.loss
#| export
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speedrun.kernels.fp8 import E4M3, E5M2, fp8_matmul, quantize, quantize_reference, scale_of
from speedrun.lab.hardware import find_triton, jit

try:
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # macOS, Windows
    tl = constexpr = Any

CAP, SHIFT, SLOPE = 23.0, 5.0, 7.5  # the softcap: 23 sigmoid((z + 5) / 7.5)
NAMESPACE = __name__.strip("_").replace(".", "_")  # the notebook's operator is not the package's


# %%
#| export
def head_loss_by_hand(
    x: Tensor, w: Tensor, targets: Tensor, inside: Tensor, rows: int = 4096
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy (nats, scalar) of softcapped logits x @ w, and its gradients with respect to x and w; `rows` tokens at a time.

    x: (tokens, width). w: (width, words). targets: (tokens,) int64. inside: (words,) bool, the words that the softmax runs over; a token's
    target always takes part. On any device, in x's dtype, float32 or float64.
    """
    dx, dw, loss = torch.empty_like(x), torch.zeros_like(w), x.new_zeros(())
    for begin in range(0, len(x), rows):
        part, mine = x[begin : begin + rows], targets[begin : begin + rows, None]
        s = torch.sigmoid((part @ w + SHIFT) / SLOPE)
        kept = inside.expand_as(s).scatter(1, mine, True)
        e = torch.where(kept, torch.exp(CAP * s - CAP), 0.0)
        total = e.sum(1, keepdim=True)
        loss += (total.log() + CAP - CAP * s.gather(1, mine)).sum() / len(x)
        p = e / total
        g = p.scatter_add(1, mine, torch.full_like(total, -1.0)) * s * (1 - s)
        g *= CAP / SLOPE / len(x)
        dx[begin : begin + rows] = g @ w.T
        dw += part.T @ g
    return loss, dx, dw


# %%
generator = torch.Generator().manual_seed(0)
x = torch.randn(60, 32, generator=generator, dtype=torch.float64)
w = torch.randn(32, 100, generator=generator, dtype=torch.float64)
targets = torch.randint(0, 100, (60,), generator=generator)
everything = torch.ones(100, dtype=torch.bool)
asked = x.clone().requires_grad_(), w.clone().requires_grad_()
capped = CAP * torch.sigmoid((asked[0] @ asked[1] + SHIFT) / SLOPE)
by_autograd = torch.nn.functional.cross_entropy(capped, targets)
known = torch.autograd.grad(by_autograd, asked)
by_hand = head_loss_by_hand(x, w, targets, everything, rows=17)
assert torch.isclose(by_hand[0], by_autograd)
assert all(torch.allclose(a, b) for a, b in zip(by_hand[1:], known))


# %%
#| export
STRIDE = 20_011  # record 92's sweep through the vocabulary


def choose_candidates(targets: Tensor, words: int, count: int) -> tuple[Tensor, Tensor]:
    """The `count` words that a batch's softmax runs over: its targets, filled up along a fixed sweep. (count,) int64, ascending; (words,) bool.

    The sweep visits word (offset + k) · stride mod words, k = 0, 1, …, each word once; the offset comes from the targets, so that the choice
    depends on the batch alone, and not on the rank that has it (record 92; there a rank's batch). No random numbers, no wait for the device. Are there more
    different targets than `count`, those late in the sweep are left out.
    """
    stride = next(s for s in range(STRIDE, STRIDE + words) if math.gcd(s, words) == 1)
    word = torch.arange(words, device=targets.device)
    place = (word * pow(stride, -1, words) - targets.sum()) % words
    place[targets] -= words
    chosen = place.topk(count, largest=False, sorted=False).indices.sort().values
    inside = torch.zeros_like(word, dtype=torch.bool)
    inside[chosen] = True
    return chosen, inside


# %%
chosen, inside = choose_candidates(targets, 100, 64)
assert len(chosen.unique()) == 64 == inside.sum() and inside[targets].all()
few, _ = choose_candidates(targets, 100, 16)
assert inside[few].all() and torch.isin(few, targets).all(), "more targets than places"

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


# %%
#| export
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


# %%
#| export
@jit
def head_kernel(
    X, W, G, GT, SUMS, SCALE, tokens, words, WIDTH: constexpr, KIND: constexpr, ROWS: constexpr, COLUMNS: constexpr,
    DEPTH: constexpr, PROGRAMS: constexpr, FAST: constexpr, BULK: constexpr,
):  # fmt: skip
    """Logits of X (tokens, WIDTH) and W (words, WIDTH), never stored: SUMS, (blocks of columns, tokens), and G with its transpose GT. BULK: X, W, G, GT are descriptors."""
    scale, HALF, GROUP = tl.load(SCALE), COLUMNS // 2, 8
    row_blocks, column_blocks = tl.cdiv(tokens, ROWS), tl.cdiv(words, COLUMNS)
    for block in tl.range(tl.program_id(0), row_blocks * column_blocks, PROGRAMS, flatten=True):
        group = block // (GROUP * column_blocks)  # eight blocks of rows share W in the cache
        high = tl.minimum(row_blocks - group * GROUP, GROUP)
        row = (group * GROUP + (block % (GROUP * column_blocks)) % high) * ROWS
        number = (block % (GROUP * column_blocks)) // high
        column = number * COLUMNS
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


# %%
#| export
@jit
def target_kernel(
    X, W, TARGETS, SUMS, INSIDE, SCALE, LOSS, SHARE, OWN, tokens, width, ROWS: constexpr, WIDTH: constexpr
):  # fmt: skip
    """Each token's loss, the reciprocal of its sum, and what its target's own logit adds to the gradient: s (1 - s), less its share where it is no candidate."""
    TOP: constexpr = 23.0 * 1.4426950408889634
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mine = row < tokens
    target, there = tl.load(TARGETS + row, mine, 0), mine[:, None] & (k < width)[None, :]
    x = tl.load(X + row.to(tl.int64)[:, None] * width + k[None, :], there).to(tl.float32)
    w = tl.load(W + target[:, None] * width + k[None, :], there).to(tl.float32)
    z = tl.sum(tl.where(there, x * w, 0.0), 1) * tl.load(SCALE)
    s = tl.sigmoid((z + 5.0) * (1.0 / 7.5))
    e = tl.math.exp2(s * TOP - TOP) * (1.0 - tl.load(INSIDE + target, mine, 1).to(tl.float32))
    total = tl.load(SUMS + row, mine, 1.0) + e
    tl.store(LOSS + row, tl.math.log2(total) * 0.6931471805599453 + 23.0 - 23.0 * s, mine)
    tl.store(SHARE + row, 1.0 / total, mine)
    tl.store(OWN + row, s * (1.0 - s) * (1.0 - e / total), mine)


@jit
def dx_kernel(
    RAW, W, TARGETS, SHARE, OWN, SCALE, DX, factor, tokens, width, ROWS: constexpr, WIDTH: constexpr
):  # fmt: skip
    """Rows of x's gradient: RAW over the token's sum, less the target's own part, times `factor`. SCALE: W's."""
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mine = row < tokens
    target, there = tl.load(TARGETS + row, mine, 0), mine[:, None] & (k < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + k[None, :]
    w = tl.load(W + target[:, None] * width + k[None, :], there).to(tl.float32) * tl.load(SCALE)
    raw, share = tl.load(RAW + at, there, 0.0).to(tl.float32), tl.load(SHARE + row, mine, 0.0)
    dx = (raw * share[:, None] - w * tl.load(OWN + row, mine, 0.0)[:, None]) * factor
    tl.store(DX + at, dx.to(DX.dtype.element_ty), there)


# %%
#| export
GAIN = 2.0**20  # of the gradient before it is divided by sums: e5m2 reaches from 2^-16 to 57,344


class Blocks(NamedTuple):
    """How the kernel is launched: the block of logits, how many numbers of the width at a time, warps, stages, programs on a multiprocessor."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int


SMALL_SHARED, LARGE_SHARED = Blocks(128, 128, 64, 8, 3, 1), Blocks(128, 128, 128, 8, 3, 2)
CONFIGS = {89: SMALL_SHARED, 90: LARGE_SHARED, 100: LARGE_SHARED, 120: SMALL_SHARED}


def in_blocks(x: Tensor, block: list[int]) -> Any:
    """A matrix as the tensor memory accelerator reads and writes it."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, block)


def launch_head(
    x: Tensor, w: Tensor, scale: Tensor, kind: torch.dtype, blocks: Blocks, bulk: bool, fast: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient before division (tokens, words), its transpose, and the tokens' sums, of x (tokens, width) and w (words, width). kind: e5m2, or float32 for the interpreter."""
    (tokens, width), words, device = x.shape, len(w), x.device
    g, gt = (torch.empty(s, dtype=kind, device=device) for s in ((tokens, words), (words, tokens)))
    columns = -(-words // blocks.columns)
    sums, wanted = torch.empty(columns, tokens, device=device), columns * -(-tokens // blocks.rows)
    if device.type == "cuda":
        count = torch.cuda.get_device_properties(device).multi_processor_count
        wanted = min(wanted, count * blocks.programs)
    matrices, half = [x, w, g, gt], blocks.columns // 2
    if bulk:
        sizes = [[blocks.rows, blocks.depth], [blocks.columns, blocks.depth]]
        sizes += [[blocks.rows, half], [half, blocks.rows]]
        matrices = [in_blocks(*pair) for pair in zip(matrices, sizes)]
    head_kernel[(wanted,)](
        *matrices, sums, scale, tokens, words, WIDTH=width, KIND=tl.float8e5 if kind == E5M2 else tl.float32,
        ROWS=blocks.rows, COLUMNS=blocks.columns, DEPTH=blocks.depth, PROGRAMS=wanted, FAST=fast, BULK=bulk,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return g, gt, sums.sum(0)


# %%
#| export
class Head(NamedTuple):
    """Eight-bit operands of one pass: x (tokens, width); w (words, width) and the candidates' rows of it; their scales; who is a candidate."""

    x: Tensor
    w: Tensor
    rows: Tensor
    scales: tuple[Tensor, Tensor]
    chosen: Tensor | None
    inside: Tensor


def prepare_head(x: Tensor, w: Tensor, targets: Tensor, count: int, kind: torch.dtype) -> Head:
    """Quantise x (tokens, width) and w (width, words), and choose the candidates; count: 0 for all words."""
    scales, words = (scale_of(x), scale_of(w)), w.shape[1]
    x8, w8 = quantize(x, scales[0], kind)[0], quantize(w, scales[1], kind, straight=False, turned=True)[1]  # fmt: skip
    if not 0 < count < words:
        return Head(x8, w8, w8, scales, None, targets.new_ones(words, dtype=torch.bool))
    chosen, inside = choose_candidates(targets, words, count)
    return Head(x8, w8, w8.view(BYTES[kind])[chosen].view(kind), scales, chosen, inside)


BYTES = {E4M3: torch.uint8, torch.float32: torch.float32}  # no indexing for eight-bit numbers


# %%
#| export
def head_loss_fused(
    x: Tensor, w: Tensor, targets: Tensor, count: int, blocks: Blocks, bulk: bool = False, emulated: bool = False
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `head_loss_by_hand`, with products in eight bits. count: candidates, 0 for all. emulated: float32 in their place, for the interpreter."""
    kinds = (torch.float32, torch.float32) if emulated else (E4M3, E5M2)
    head = prepare_head(x, w, targets, count, kinds[0])
    tokens, width = x.shape
    sx, sw = head.scales
    g, gt, sums = launch_head(head.x, head.rows, sx * sw, kinds[1], blocks, bulk, not emulated)
    loss, share, own = (torch.empty_like(sums) for _ in range(3))
    sizes = {"ROWS": 4, "WIDTH": 1 << (width - 1).bit_length()}
    inside, grid = head.inside.view(torch.uint8), (-(-tokens // 4),)
    target_kernel[grid](head.x, head.w, targets, sums, inside, sx * sw, loss, share, own, tokens, width, **sizes)  # fmt: skip
    factor, unit = CAP / SLOPE / tokens, sx.new_full((1,), 1 / GAIN)
    raw, dx = fp8_matmul(g, head.rows.T.contiguous(), unit, sw, x.dtype), torch.empty_like(x)
    dx_kernel[grid](raw, head.w, targets, share, own, sw, dx, factor, tokens, width, **sizes)
    scale = sx * share.max()
    xt = quantize(x, scale, kinds[0], share, straight=False, turned=True)[1]
    dw = fp8_matmul(gt, xt, unit * factor, scale, torch.float32)
    if head.chosen is not None:
        dw = dw.new_zeros(len(head.w), width).index_copy_(0, head.chosen, dw)
    dw.index_add_(0, targets, x.float() * (own * -factor)[:, None])
    return loss.mean(), dx, dw.T.contiguous()


# %%
narrow = Blocks(32, 32, 16, 4, 2, 1)
for count in (0, 64, 16):
    _, kept = choose_candidates(targets, 100, count) if count else (None, everything)
    found = head_loss_fused(x.float(), w.float(), targets, count, narrow, emulated=True)
    wanted = head_loss_by_hand(x, w, targets, kept)
    for a, b in zip(found, wanted):
        assert torch.linalg.norm(a - b) < 1e-6 * torch.linalg.norm(b)


# %%
#| export
def why_no_kernel(device: torch.device) -> str:
    """Why a device computes the eight-bit head by its definition and not by the kernel; empty: the kernel runs."""
    if device.type != "cuda":
        return "it is no NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return "its matrix units do not know FP8 (compute capability 8.9 or later)"
    return "" if find_triton() else "Triton is not installed"


def check_head(x: Tensor, w: Tensor, targets: Tensor) -> None:
    """Raise ValueError for shapes and dtypes that the head cannot take."""
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[0] or targets.shape != x.shape[:1]:
        shapes = ", ".join(str(tuple(each.shape)) for each in (x, w, targets))
        raise ValueError(f"x (tokens, width), w (width, words), targets (tokens,), not {shapes}")
    if not (x.is_floating_point() and w.is_floating_point() and targets.dtype == torch.int64):
        kinds = ", ".join(str(each.dtype) for each in (x, w, targets))
        raise ValueError(f"x and w of floating-point numbers and targets of int64, not {kinds}")


@torch.library.custom_op(f"{NAMESPACE}::head_loss", mutates_args=())
def head_loss_op(
    x: Tensor, w: Tensor, targets: Tensor, count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss, float32, and its gradients with respect to x (tokens, width), in its dtype, and to w (width, words), float32.

    count: () int in CPU memory, so that no step compiles again for a new one; candidates of the softmax, 0: all words.
    """
    check_head(x, w, targets)
    x, number = x.contiguous(), int(count)
    sizes = (*x.shape, w.shape[1], number)
    if why_no_kernel(x.device) or any(size % 16 for size in sizes):
        inside = targets.new_ones(w.shape[1], dtype=torch.bool)
        if 0 < number < w.shape[1]:
            inside = choose_candidates(targets, w.shape[1], number)[1]
        x8, w8 = (quantize_reference(each, scale_of(each)).float() * scale_of(each) for each in (x, w))  # fmt: skip
        loss, dx, dw = head_loss_by_hand(x8, w8, targets, inside)
        return loss, dx.to(x.dtype), dw
    major, minor = torch.cuda.get_device_capability(x.device)
    blocks = CONFIGS[max(chip for chip in CONFIGS if chip <= 10 * major + minor)]
    return head_loss_fused(x, w, targets, number, blocks, major >= 9)


@head_loss_op.register_fake
def fake_head_loss(x, w, targets, count):
    dw = w.new_empty(w.shape, dtype=torch.float32)
    return x.new_empty((), dtype=torch.float32), torch.empty_like(x), dw


def keep_gradients(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(output[1], output[2])


def scale_gradients(ctx: Any, grad: Tensor, *_) -> tuple:
    dx, dw = ctx.saved_tensors
    return dx * grad.to(dx.dtype), dw * grad, None, None


head_loss_op.register_autograd(scale_gradients, setup_context=keep_gradients)


# %%
count = torch.tensor(0)
leaves = x.float().requires_grad_(), w.float().requires_grad_()
loss, *_ = head_loss_op(*leaves, targets, count)
(3 * loss).backward()
exact = head_loss_by_hand(x, w, targets, everything)
assert abs(loss.item() - exact[0].item()) < 0.05
for leaf, b in zip(leaves, exact[1:]):
    print(torch.linalg.norm(leaf.grad / 3 - b) / torch.linalg.norm(b))


# %% [markdown]
# ## The measurement
#
# Five versions at the three row lengths of `record_200m`, each forward and backward, on vectors and a matrix drawn at random, with targets drawn from the model's own probabilities, so that losses look trained. *Plain* is chapter 08's head under `torch.compile`. *Two passes* is the design of record 19 and those that followed: an FP8 product writes the logits, a compiled loss reads them and writes an e5m2 gradient. Liger's fused head {cite}`liger` and cut-cross-entropy {cite}`wijmans2025` know the softcap $30 \tanh(z/30)$ only, and are timed with that.


# %% tags=["hide-input"]
#| default_exp measure.loss
#| export
import importlib.metadata
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from speedrun.kernels.fp8 import E4M3, E5M2, fp8_matmul, quantize, scale_of

from speedrun.lab.bench import bench
from speedrun.lab.errors import UserError
from speedrun.lab.provenance import stamp
from speedrun.model.head import loss_of

NAMES = ()
ON_GPUS = ("kernels", "sampled")  # sampled: the folder of a finished run
SHAPES = ((16_384, 10_240), (32_768, 10_240), (49_152, 16_384))  # record_200m's tokens, candidates
VOCABULARY, MODEL_DIM = 50_304, 768


def trained_looking(tokens: int, std: float = 0.15, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors (tokens, 768) bfloat16 of unit mean square, a head (768, 50304) float32, and targets drawn from their softmax; on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    drawn = torch.randn(tokens, MODEL_DIM, device="cuda", generator=generator)
    x = F.rms_norm(drawn, (MODEL_DIM,)).bfloat16()
    w = std * torch.randn(MODEL_DIM, VOCABULARY, device="cuda", generator=generator)
    targets = []
    for part in x.split(2048):
        z = part.float() @ w
        p = (CAP * torch.sigmoid((z + SHIFT) / SLOPE)).softmax(1)
        targets.append(torch.multinomial(p, 1, generator=generator)[:, 0])
    return x, w, torch.cat(targets)


def plain_loss(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Chapter 08's loss, in bfloat16."""
    with torch.autocast("cuda", torch.bfloat16):
        return loss_of(x @ w, targets, "sigmoid23")


def loss_and_gradient(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of stored logits, and its gradient in e5m2, times 2^9 and the tokens."""
    s = torch.sigmoid((z.float() + SHIFT) / SLOPE)
    p, own = torch.softmax(CAP * s, 1), F.one_hot(targets, z.shape[1])
    g = (p - own) * s * (1 - s) * (512 * CAP / SLOPE)
    loss = F.cross_entropy(CAP * s, targets)
    return loss, g.clamp(-57344, 57344).to(E5M2)


# %% tags=["hide-input"]
#| export
def two_passes(x: Tensor, w: Tensor, targets: Tensor, second: Callable = loss_and_gradient) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss and gradients through stored logits: an FP8 product, and a second pass over what it wrote."""
    sx, sw = scale_of(x), scale_of(w)
    x8, x8t = quantize(x, sx, turned=True)
    w8, w8t = quantize(w, sw, turned=True)
    loss, g = second(fp8_matmul(x8, w8t, sx, sw, torch.bfloat16), targets)
    unit = torch.full_like(sx, 1 / 512 / len(x))
    dx = fp8_matmul(g, w8, unit, sw, x.dtype)
    return loss, dx, fp8_matmul(x8t, g.T.contiguous(), sx, unit, torch.float32)


def by_library(name: str, x: Tensor, w: Tensor, targets: Tensor) -> Callable[[], Any] | None:
    """Forward and backward pass of a library's fused head with a softcap of 30 tanh(z / 30); None where it is not installed."""
    leaves = x.detach().requires_grad_(), w.T.contiguous().bfloat16().requires_grad_()
    try:
        if name == "liger":
            module = importlib.import_module("liger_kernel.transformers")
            head = module.LigerFusedLinearCrossEntropyLoss(softcap=30.0)
            loss = lambda: head(leaves[1], leaves[0], targets)  # noqa: E731
        else:
            module = importlib.import_module("cut_cross_entropy")
            loss = lambda: module.linear_cross_entropy(*leaves, targets, softcap=30.0)  # noqa: E731
    except ImportError:
        return None
    return lambda: torch.autograd.grad(loss(), leaves)


def versions(x: Tensor, w: Tensor, targets: Tensor, candidates: int) -> dict[str, Callable[[], Any]]:  # fmt: skip
    """Each version's forward and backward pass, by its name. sampled: over so many candidates."""
    leaves = x.detach().requires_grad_(), w.detach().requires_grad_()
    compiled = torch.compile(plain_loss, dynamic=False, fullgraph=True)
    second = torch.compile(loss_and_gradient, dynamic=False, fullgraph=True)
    found: dict[str, Callable[[], Any]] = {
        "plain": lambda: torch.autograd.grad(compiled(*leaves, targets), leaves),
        "two passes": partial(two_passes, x, w, targets, second),
        "one pass": partial(head_loss_op, x, w, targets, torch.tensor(0)),
        "sampled": partial(head_loss_op, x, w, targets, torch.tensor(candidates)),
    }
    for name in ("liger", "cce"):
        if call := by_library(name, x, w, targets):
            found[name] = call
    return found


# %% tags=["hide-input"]
#| export
def peak_mib(call: Callable[[], Any]) -> int:
    """What a call needs beside what is there, at its peak, in MiB."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) >> 20


def relative_error(found: Tensor, known: Tensor) -> float:
    """Norm of the difference over the norm."""
    return (torch.linalg.norm(found.double() - known) / torch.linalg.norm(known)).item()


def errors_of(tokens: int = 2048, candidates: int = 10_240) -> list[dict[str, Any]]:
    """Error in the loss (nats), and relative errors of both gradients, of each version against float64; std: of the head's weights, 0 at step 0."""
    found = []
    for std in (0.0, 0.02, 0.15, 0.3):
        x, w, targets = trained_looking(tokens, std)
        for version, call in versions(x, w, targets, candidates).items():
            if version in ("liger", "cce"):  # another softcap
                continue
            inside = torch.ones(VOCABULARY, dtype=torch.bool, device="cuda")
            if version == "sampled":
                inside = choose_candidates(targets, VOCABULARY, candidates)[1]
            loss, *known = head_loss_by_hand(x.double(), w.double(), targets, inside, 512)
            got = (plain_loss(x, w, targets), *call()) if version == "plain" else call()
            row = {"version": version, "std": std, "loss": got[0].item() - loss.item()}
            errors = [relative_error(a, b) if b.any() else 0.0 for a, b in zip(got[1:], known)]
            found.append(row | {"dx": errors[0], "dw": errors[1]})
    return found


def blocks_tried(x: Tensor, w: Tensor, targets: Tensor) -> dict[str, Any]:
    """Times of the kernel alone, all words, in other block sizes, and with the exact sigmoid."""
    head, usual = prepare_head(x, w, targets, 0, E4M3), LARGE_SHARED
    scale = head.scales[0] * head.scales[1]
    tried = {
        "as it is": usual,
        "4 warps": usual._replace(warps=4),
        "one program": usual._replace(programs=1),
        "64 rows": usual._replace(rows=64),
        "2 stages": usual._replace(stages=2),
        "256 columns": usual._replace(columns=256, programs=1),
        "exact sigmoid": usual,
    }
    calls = {name: partial(launch_head, head.x, head.rows, scale, E5M2, blocks, True, name != "exact sigmoid") for name, blocks in tried.items()}  # fmt: skip
    return {name: took._asdict() for name, took in bench(calls, "cuda", 9, cold=True).items()}


# %% tags=["hide-input"]
#| export
def measure_kernels() -> dict[str, Any]:
    """Times, memory and errors of all versions."""
    found = []
    for tokens, candidates in SHAPES:
        x, w, targets = trained_looking(tokens)
        calls = versions(x, w, targets, candidates)
        peaks = {version: (call(), peak_mib(call))[1] for version, call in calls.items()}
        for version, took in bench(calls, "cuda", 15, cold=True).items():
            row = {"version": version, "tokens": tokens, "peak_mib": peaks[version]}
            found.append(row | took._asdict())
            print(found[-1], flush=True)
    names = ("liger-kernel", "cut-cross-entropy")
    there = {n: found.version for n in names for found in importlib.metadata.distributions(name=n)}
    blocks = blocks_tried(x, w, targets)
    return {"rows": found, "errors": errors_of(), "blocks": blocks, "peers": there}


def losses_by_candidates(folder: Path, counts: tuple[int, ...], batches: int = 16) -> dict[str, Any]:  # fmt: skip
    """A trained run's loss on its first validation micro-batches, nats a token, with so many candidates each; 0: all words."""
    from speedrun.train import build_run, forward_loss, val_batches, resume, told_now

    config = config_of_run(folder)
    with tempfile.TemporaryDirectory() as scratch:
        run = build_run(config, Path(scratch), echo=None)
        run.folder = folder
        resume(run)
        losses: dict[str, list[float]] = {str(count): [] for count in counts}
        targets = []
        with torch.no_grad():
            for _, batch in zip(range(batches), val_batches(run, config.val_tokens)):
                targets.append(len(batch.targets.unique()))
                for count in counts:
                    place, told = run.ranks.device, told_now(run)
                    loss = forward_loss(run.model, batch, place, config.precision, told, torch.tensor(count))  # fmt: skip
                    losses[str(count)].append(loss.item())
    return {"losses": losses, "tokens": batch.targets.numel(), "distinct_targets": targets}


def config_of_run(folder: Path) -> Any:
    """The settings of a finished run, to be used on one GPU."""
    from speedrun.checkpoint import latest_checkpoint, load_facts
    from speedrun.config import config_from_json

    return config_from_json(load_facts(latest_checkpoint(folder))["config"])


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """kernels: times, memory and errors. sampled: losses of a finished run's model by the number of candidates; its argument the run's folder."""
    if not torch.cuda.is_available():
        raise UserError(f"{name} needs FP8 matrix units", "run it on an NVIDIA GPU")
    modules = ["speedrun.measure.loss"]
    if name == "kernels":
        return measure_kernels(), stamp(command, modules, 1, [0])
    if not arguments:
        raise UserError("no run is given for sampled", "python scripts/measure.py loss sampled runs/…")  # fmt: skip
    counts = (1024, 2048, 4096, 8192, 10_240, 14_336, 16_384, 24_576, 32_768, 0)
    data = losses_by_candidates(Path(arguments[0]), counts)
    return data, stamp(command, [*modules, "speedrun.train"], 1, [config_of_run(Path(arguments[0])).seed])  # fmt: skip
