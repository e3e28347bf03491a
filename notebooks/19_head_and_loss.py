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
# About half a minute on two CPU cores, where Triton's interpreter runs the kernel at small shapes; on one GPU it is compiled. Times and losses come from committed measurements on H200s.
# The FP8 head is record 19's: \@YouJiacheng. Fused losses: records 60 (\@soren\_dunn\_ and AI System Locus), 67 and 79 (\@andrewbriand8), 75 (\@moof2x). Sampled softmax, as the contest uses it: record 92 (\@devenpzak). Exponentials from the epilogue, the target apart, row factors folded into the backward products: quack and Liger's Hopper kernel, in bfloat16 {cite}`liger,quack`. The kernel below is this book's own.
# ```
#
# ## The problem
#
# The last matrix is the largest that tokens are multiplied by. It turns each vector of 768 numbers into 50,304 logits, one for each word, and only one number per token is wanted of them: the loss. Chapter 08 wrote it as a matrix product, a softcap and a cross-entropy, and `torch.compile` fuses what it can.

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
from speedrun.lab.hardware import setup

machine = setup()

# %% tags=["hide-input"]
import math

import numpy as np

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
assert 0.4 < 6 * logits_gb / 4.8 / (plain["p50"] - floor_ms) < 0.6, "six trips at 4.8 TB/s"

# %% [markdown]
# The head has a third of all weights that a token is multiplied by, and the compiled form takes more than twice what the data sheet allows for its three products (logits forward, two gradients backward). The six trips below would fill half of the difference, if none were hidden behind a product. The logits of one micro-batch are five gigabytes in bfloat16. They are written, read for the softmax, read again for the gradient, written as a gradient, and that is read twice more.
#
# ```{admonition} Prediction
# Which of these six trips can be saved at all? The gradient of a logit is $(p_v - [v = y])$ times the slope of the softcap, and $p_v = e^{z'_v} / \sum_u e^{z'_u}$ needs the sum over all words, which is known only when the last block of logits has been computed. **So must the logits be kept, or computed twice?** And if the gradient is rounded to FP8's e5m2, with two bits of mantissa: **how large is the relative error of $\partial L / \partial x$**, 1%, 5% or 25%?
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
# A block of the product is finished in a multiprocessor's registers. What follows, the **epilogue**, can compute $G$ there and write it, instead of the logit. The sum $S_t$ is one number per token, and it multiplies whole rows: the gradient of $x$ is $G W^\top$ with its rows divided by $S_t$, and the gradient of $W$ is $(x / S)^\top G$. Dividing the small operand $x$, and the small result $G W^\top$, does what dividing $G$ would have done. No logit is ever written. $G$ is, straight and turned, as FP8 products want it ([chapter 15](15_low_precision.py)), at one byte each, and each is read once: of six trips, two.
#
# ### The target apart
#
# $G$ is stored in e5m2. Its exponent covers what probabilities need, its two bits of mantissa round by up to an eighth. But most of the gradient's norm is not in $p$. It is in the one entry of each row where $-1$ is added, and that entry needs no matrix product: it adds a multiple of *one column* of $W$ to the gradient of $x$, and of $x$ to one column of $W$'s. Both are added in float32: to $W$'s gradient from $x$ itself, to $x$'s from the column of $W$ as e4m3 has rounded it (so $x$'s gradient stays the less exact one). The e5m2 tensor holds the rest.
#
# ### Sampled softmax
#
# A softmax over 50,304 words (a *word* is an entry of the vocabulary here) computes, for every token, logits of words that have almost no probability. Record 92 lets the softmax of most steps run over fewer: all words that occur as targets in the micro-batch, filled up by a fixed sweep through the vocabulary {cite}`moddednanogpt`. It is the old idea of a sampled softmax {cite}`bengio2008`, much as Jean and others use it {cite}`jean2015`: all tokens of a part share its words, and nothing corrects for the rest. The last steps train with all words, to make up for that.
#
# ## The code
#
# ### The definition
#
# First the formula above, as it stands, a few thousand tokens at a time. It is the reference of all tests, and what runs where there is no kernel. `inside` says over which words the softmax runs; a token's own target always takes part.

# %%
#| default_exp kernels.loss
#| export
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


# %%
#| export kernels.head_reference
from typing import Any

import torch
from torch import Tensor

from speedrun.kernels.fp8 import quantize_reference


def head_loss_by_hand(
    x: Tensor, w: Tensor, targets: Tensor, inside: Tensor, rows: int = 4096, weights: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy (nats, scalar) of softcapped logits x @ w, and its gradients with respect to x and w; `rows` tokens at a time.

    x: (tokens, width). w: (width, words). targets: (tokens,) int64, or (tokens, several) with a weight each, (several,): then all three are the sums, by these weights, of what each column alone
    has. inside: (words,) bool, the words that the softmax runs over, or a row for each of several micro-batches of equal length; a target always takes part. On any device, in x's dtype, float32 or float64.
    """
    if weights is not None:
        alone = [head_loss_by_hand(x, w, column, inside, rows) for column in targets.T]
        loss, dx, dw = (sum(a * b for a, b in zip(weights.to(x), each)) for each in zip(*alone))
        return loss, dx, dw
    dx, dw, loss = torch.empty_like(x), torch.zeros_like(w), x.new_zeros(())
    inside = inside.view(-1, w.shape[1])
    number = torch.arange(len(x), device=x.device) * len(inside) // len(x)
    for begin in range(0, len(x), rows):
        now = slice(begin, begin + rows)
        part, mine = x[now], targets[now, None]
        s = torch.sigmoid((part @ w + SHIFT) / SLOPE)
        e = torch.exp(CAP * s - CAP) * inside[number[now]].scatter(1, mine, True)
        total = e.sum(1, keepdim=True)
        loss += (total.log() + CAP - CAP * s.gather(1, mine)).sum() / len(x)
        share = (e / total).scatter_add(1, mine, torch.full_like(total, -1.0))
        g = share * s * (1 - s) * CAP / SLOPE / len(x)
        dx[now] = g @ w.T
        dw += part.T @ g
    return loss, dx, dw


# %%
generator = torch.Generator().manual_seed(0)
x = torch.randn(60, 32, generator=generator, dtype=torch.float64)
w = torch.randn(32, 100, generator=generator, dtype=torch.float64)
targets = torch.randint(0, 100, (60,), generator=generator)
everything = torch.ones(100, dtype=torch.bool)
x, w, targets, everything = (each.to(machine.device) for each in (x, w, targets, everything))
asked = x.clone().requires_grad_(), w.clone().requires_grad_()
bounded = CAP * torch.sigmoid((asked[0] @ asked[1] + SHIFT) / SLOPE)
by_autograd = torch.nn.functional.cross_entropy(bounded, targets)
known = torch.autograd.grad(by_autograd, asked)
by_hand = head_loss_by_hand(x, w, targets, everything, rows=17)
assert torch.isclose(by_hand[0], by_autograd)
assert all(torch.allclose(a, b) for a, b in zip(by_hand[1:], known))
print(f"the loss, {by_hand[0]:.6f}, and both gradients are those of PyTorch's own differentiation")

# %% [markdown]
# ### How exact is e5m2?
#
# Before a kernel is written, its numbers can be tried. Take a head of random rows, and vectors that lean towards their target's row, some a little and some a lot; but no target gets more than a few per cent, unlike after training. Everything is computed in float64, but four tensors are rounded as the kernel would round them: $x$ and $W$ to e4m3 ([chapter 15](15_low_precision.py)); then the gradient of the logits not at all, or to e5m2 with the target's entry among the others, or to e5m2 with that entry apart; and last as the kernel will do it, before the division, with $1/S$ folded into $x$.

# %%
drawn = torch.Generator().manual_seed(1)
SIZE, VOCAB = tier.pick(cpu=192, gpu=1024), tier.pick(cpu=8192, gpu=50_304)
matrix = 0.15 * torch.randn(768, VOCAB, generator=drawn, dtype=torch.float64)
wanted = torch.randint(0, VOCAB, (SIZE, 1), generator=drawn)
leaning = torch.rand(SIZE, 1, generator=drawn, dtype=torch.float64) * 0.8
vectors = torch.randn(SIZE, 768, generator=drawn, dtype=torch.float64)
vectors += leaning * matrix.T[wanted[:, 0]] / 0.15
vectors /= vectors.square().mean(1, keepdim=True).sqrt()


def rounded(x: Tensor, kind: torch.dtype) -> Tensor:
    """x as it comes back from eight bits, float64."""
    scale = scale_of(x, kind)
    return quantize_reference(x, scale, kind).double() * scale.double()


def squashed(x: Tensor, w: Tensor) -> Tensor:
    """sigmoid((z + 5) / 7.5) of the logits."""
    return torch.sigmoid((x @ w + SHIFT) / SLOPE)


s = squashed(vectors, matrix)
confidence = (CAP * s).softmax(1).gather(1, wanted)
x8, w8, rows_at = rounded(vectors, E4M3), rounded(matrix, E4M3), torch.arange(SIZE)[:, None]
s8 = squashed(x8, w8)
p8, slope = (CAP * s8).softmax(1), s8 * (1 - s8)
own = torch.zeros_like(p8).scatter(1, wanted, 1.0)
total = torch.exp(CAP * s8 - CAP).sum(1, keepdim=True)
unnormalised = rounded(torch.exp(CAP * s8 - CAP) * slope, E5M2)
exact_g = ((CAP * s).softmax(1) - own) * s * (1 - s)
forms = {  # the logits' gradient, and what x is multiplied by for W's
    "only x and W": ((p8 - own) * slope, vectors),
    "e5m2": (rounded((p8 - own) * slope, E5M2), vectors),
    "e5m2, target apart": (rounded(p8 * slope, E5M2) - own * slope, vectors),
}


def error(found: Tensor, known: Tensor) -> float:
    """Norm of the difference over the norm."""
    return (torch.linalg.norm(found - known) / torch.linalg.norm(known)).item()


dx_exact, dw_exact = exact_g @ matrix.T, vectors.T @ exact_g
errors = {name: (error(g @ w8.T, dx_exact), error(x.T @ g, dw_exact)) for name, (g, x) in forms.items()}  # fmt: skip
dx_one = (unnormalised @ w8.T) / total - (own * slope) @ w8.T
dw_one = rounded(vectors / total, E4M3).T @ unnormalised - vectors.T @ (own * slope)
errors["as the kernel does it"] = (error(dx_one, dx_exact), error(dw_one, dw_exact))
in_targets = (exact_g.gather(1, wanted).square().sum() / exact_g.square().sum()).item()
for name, (of_x, of_w) in errors.items():
    print(f"{name:24} error in x's gradient {of_x:.1%}, in W's {of_w:.1%}")
print(
    f"mean loss {-confidence.log().mean():.2f}, the target's median probability {confidence.median():.2f}"
)
print(
    f"{in_targets:.0%} of the gradient's squared norm is in the targets' entries (chapter 15's trained model: 96%)"
)
assert in_targets > 0.9 and 0.03 < errors["e5m2"][1] < errors["e5m2"][0] < 0.07
assert 1.3 * errors["e5m2, target apart"][0] < errors["e5m2"][0] < 0.1
assert errors["as the kernel does it"][0] < 1.15 * errors["e5m2, target apart"][0]
assert all(errors["as the kernel does it"][i] < 1.1 * errors["only x and W"][i] for i in (0, 1))
assert abs(2**-2 / math.sqrt(28) - 0.047) < 0.001

# %% [markdown]
# With everything in e5m2 the gradients are off by some five per cent, the error of rounding *one* number: [chapter 15](15_low_precision.py)'s $2^{-2}/\sqrt{28}$ is 4.7%, an eighth only the worst case. Nothing averages out, for nearly all of the gradient's norm is in one entry of each row. With that entry apart the error falls to what rounding $x$ and $W$ costs by itself. (For these random words. In [chapter 15](15_low_precision.py)'s trained model 3.7% and 2.4% are left: up to half of a row's *squared* norm can be a rival's, and stay in e5m2.) So the kernel's gradient is *more* exact than one that writes everything into the FP8 tensor, and it is cheaper.
#
# ### Choosing the candidates
#
# The candidates have to be chosen without random numbers and without waiting for the GPU, and the same ones whichever rank has the micro-batch. Each word has a place on a fixed sweep through the vocabulary (steps of 20,011, which meet every word once), the sweep's beginning depends on the targets, and the batch's targets come before all others. The first `count` places are the candidates.


# %%
#| export
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


# %%
chosen, inside = choose_candidates(targets, 100, 64)
assert len(chosen.unique()) == 64 == inside.sum() and inside[targets].all()
few, _ = choose_candidates(targets, 100, 16)
assert torch.isin(few, targets).all(), "more targets than places"
again, _ = choose_candidates(targets[torch.randperm(60, generator=generator)], 100, 64)
assert torch.equal(chosen, again), "the order of tokens does not matter, so no rank's does"
print(f"{len(targets.unique())} different targets among {len(chosen)} candidates of 100 words")

# %% [markdown]
# If a batch has more different targets than there are places, some targets are no candidates. Nothing breaks: a token's own target takes part in its softmax in any case.
#
# ### The kernel
#
# Blocks of $x$ and $W$ are multiplied, 128 by 128 logits at a time, as in [chapter 18](18_fused_mlp.py), whose loads, stores and order of blocks these are. Two programs share a multiprocessor on chips with much shared memory: while one's epilogue computes exponentials, the other's product runs. The epilogue takes a block in two halves, which halves the shared memory that its stores need.


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


# %%
#| export
GAIN = 2.0**20  # what the kernel multiplies the gradient by: e5m2 reaches from 2^-16 to 57,344


SMALL_SHARED, LARGE_SHARED = Blocks(128, 128, 64, 8, 3), Blocks(128, 128, 128, 8, 3, 2)
CONFIGS = {89: SMALL_SHARED, 90: LARGE_SHARED, 100: LARGE_SHARED, 120: SMALL_SHARED}


# %%
#| export
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


# %%
narrow = Blocks(32, 32, 16, 4, 2, 1)
g, gt, sums = launch_head(x.float(), w.T.float().contiguous(), torch.ones(1, device=machine.device), narrow, False, False)  # fmt: skip
s = squashed(x, w)
assert torch.allclose(sums.double(), torch.exp(CAP * s - CAP).sum(1))
assert torch.allclose(g.double() / GAIN, torch.exp(CAP * s - CAP) * s * (1 - s), atol=1e-9)
assert torch.equal(gt, g.T), "the same numbers in the other layout"
at = lambda z: 1 / (1 + math.exp(-(z + SHIFT) / SLOPE))  # noqa: E731
most = max(math.exp(CAP * n / 999 - CAP) * n / 999 * (1 - n / 999) for n in range(1000))
entry = lambda z: GAIN * math.exp(CAP * at(z) - CAP) * at(z) * (1 - at(z))  # noqa: E731
assert 2**13 < GAIN * most < 57_344 and 90 < entry(0) < 100
assert entry(-22.7) > 2**-14 and entry(-30.1) > 2**-17 > entry(-30.3), "normal; not zero; zero"
print(f"the largest possible entry: {GAIN * most:,.0f} of e5m2's 57,344")

# %% [markdown]
# The interpreter computes in float32, so the numbers must be the formula's, and they are. The gain of $2^{20}$ puts the largest possible entry at 16,058, a factor of 3.6 below e5m2's end, and that of a logit of 0 at 96. Logits below −23 lose digits, and those below −30 become zero; words so improbable do not matter. There is no scale to keep from step to step.
#
# What depends on the target is little, and computed by two small kernels, one before and one after the backward product: each token's own logit, its loss, the reciprocal of its sum; then the division of $G W^\top$ by the sums, less the target's part. If the target was no candidate, its exponential is added to the sum here.


# %%
#| export
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


# %% [markdown]
# Both go through *several targets* of a token, each with a weight: record 53 asks for words after the next one, too (multi-token prediction), record 88 for a prefix of the next word. Such a loss is $\sum_k \lambda_k L_k$, where $L_k$ is the loss of target $k$ alone. The logits are the same, so the large kernel does not change. $1/S_t$ becomes $\sum_k \lambda_k / S_{tk}$, where $S_{tk}$ is $S_t$, plus target $k$'s exponential if that is no candidate; and each target has its own entry apart. The weights are numbers on the GPU: they may change from step to step, and nothing is compiled again unless their number does.
#
# Nor does it change for Ampere GPUs, whose matrix units take no FP8. Operands and $G$ are bfloat16 there, twice the bytes; their scales are 1, and only the gain and the scale of $x/S$ are left.
#
# Now the pieces go together. The operands are quantised with scales from their own largest numbers, anew in each pass, so that nothing clips and nothing is carried along. (Records 19 to 89 use constants, and save two small reductions by it.)


# %%
#| export
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


# %%
in_float32 = Form(torch.float32, partial(launch_head, blocks=narrow, bulk=False, fast=False))
next_two = torch.stack([targets, targets.roll(-1)], 1)
for count in (0, 64, 16):
    for to, by in ((targets, None), (next_two, torch.tensor([1.0, 0.5]).to(x.device))):
        _, kept = choose_candidates(to.flatten(), 100, count) if count else (None, everything)
        found = head_loss_fused(x.float(), w.float(), to, count, in_float32, weights=by)
        wanted = head_loss_by_hand(x, w, to, kept, weights=by)
        errors = [error(a.double(), b) for a, b in zip(found, wanted)]
        assert max(errors) < 1e-6
        print(f"{count or 'all':>3} words, {to.numel() // 60} target(s): loss and gradients off by", [f"{each:.0e}" for each in errors])  # fmt: skip


# %% [markdown]
# With all words, with 64 candidates and with fewer candidates than targets, for one target and for two: loss and both gradients are the definition's. All gradients are computed in the forward pass, so that the two large tensors are gone before the rest of the backward pass begins; what goes backward is one number.
#
# The operator is opaque to `torch.compile`, as attention's is. How many candidates there are is a number in CPU memory, so that no stage of the schedule compiles again. A second number says how many micro-batches the tokens are: a GPU that has several of them passes them through the model at once, but each chooses its own candidates, so that the loss is, but for rounding, the same on any number of GPUs.


# %%
#| export
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


# %%
#| export kernels.head_reference
def head_loss_reference(
    x: Tensor, w: Tensor, targets: Tensor, count: int, form: Any, parts: int, weights: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`head_loss_fused` by the definition: in float32, of rounded operands; x's gradient in its dtype."""
    scales = [form.scale_of(each) for each in (x, w)]
    x8, w8 = (quantize_reference(each, by, form.kind).float() * by for each, by in zip((x, w), scales))  # fmt: skip
    words = [choose_candidates(to.flatten(), w.shape[1], count)[1] for to in targets.chunk(parts)]
    loss, dx, dw = head_loss_by_hand(x8, w8, targets, torch.stack(words), weights=weights)
    return loss, dx.to(x.dtype).contiguous(), dw.contiguous()


# %%
#| export kernels.head_bf16
import torch
from torch import Tensor

from speedrun.kernels.mlp import Blocks

LARGE_BF16, SMALL_BF16 = Blocks(128, 128, 64, 8, 3), Blocks(128, 128, 32, 8, 3)
CONFIGS_BF16 = {80: LARGE_BF16, 86: SMALL_BF16, 90: LARGE_BF16, 120: SMALL_BF16}


def unit_scale(x: Tensor) -> Tensor:
    """1: bfloat16 has float32's range. (1,) float32."""
    return x.new_ones(1, dtype=torch.float32)


def product_bf16(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out: torch.dtype
) -> Tensor:
    """a (m, k) times the transpose of b (n, k), both of bfloat16, times both scales, summed in float32: (m, n) in dtype `out`."""
    on_gpu = a.device.type == "cuda"  # elsewhere PyTorch has no such sums
    z = torch.mm(a, b.mT, out_dtype=torch.float32) if on_gpu else a.float() @ b.float().mT
    return (z * (scale_a * scale_b)).to(out)


def bf16_form(device: torch.device) -> Form:
    """`head_form` in bfloat16, on any device."""
    return Form(torch.bfloat16, launch_for(device, CONFIGS_BF16), product_bf16, unit_scale)


# %%
#| export kernels.loss
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


# %%
leaves = x.float().requires_grad_(), w.float().requires_grad_()
loss, *_ = head_loss_op(*leaves, targets, torch.tensor([0, 1]))
(3 * loss).backward()
exact = head_loss_by_hand(x, w, targets, everything)
assert abs(loss.item() - exact[0].item()) < 0.05, "operands of eight bits"
for leaf, known, name in zip(leaves, exact[1:], ("x", "w")):
    assert leaf.grad is not None and error(leaf.grad / 3, known) < 0.06
    print(f"three times the loss: {name}'s gradient is off by {error(leaf.grad / 3, known):.1%}")
for wrong in (x[:, :5], x[0], x.long()):
    try:
        check_head(wrong, w, targets)
        raise RuntimeError("accepted")
    except ValueError as problem:
        print(problem)

# %% [markdown]
# ## The measurement
#
# Eight heads at the lengths of one micro-batch in the three thirds of `record_200m`, each forward and backward, with cold caches, in turn. Vectors and matrix are drawn at random, targets from the softmax. *Plain* is chapter 08's head under `torch.compile`. *Two passes* writes logits by an FP8 product, and a compiled loss reads them and writes an e5m2 gradient, straight and turned; records 19 to 89 store logits in this order, too (an e5m2 gradient from the loss itself since 67, one kernel for loss and gradient since 79); from record 60 on that loss is a hand-written kernel. Liger's fused head {cite}`liger` (the sliced one, not its Hopper kernel) and cut-cross-entropy {cite}`wijmans2025` know softcaps of the form $c \tanh(z/c)$ only, and are timed with $c = 30$. Random words are the worst case of cut-cross-entropy, which skips blocks of small gradients that a trained model has. (The candidates at the longest rows are those that the last third once had; today it has all words.)


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
from speedrun.measure.runs import config_of_run, relative_error
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


def loss_and_gradient(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of stored logits, and its gradient in e5m2, times 2^9 and the tokens, in both layouts."""
    s = torch.sigmoid((z.float() + SHIFT) / SLOPE)
    p, own = torch.softmax(CAP * s, 1), F.one_hot(targets, z.shape[1])
    g = (p - own) * s * (1 - s) * (512 * CAP / SLOPE)
    loss = F.cross_entropy(CAP * s, targets)
    g = g.clamp(-57344, 57344).to(E5M2)
    return loss, g, g.T.contiguous()


# %% tags=["hide-input"]
#| export
def two_passes(x: Tensor, w: Tensor, targets: Tensor, second: Callable = loss_and_gradient) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss and gradients through stored logits: an FP8 product, and a second pass over what it wrote."""
    sx, sw = scale_of(x), scale_of(w)
    x8, x8t = quantize(x, sx, turned=True)
    w8, w8t = quantize(w, sw, turned=True)
    loss, g, gt = second(fp8_matmul(x8, w8t, sx, sw, torch.bfloat16), targets)
    unit = torch.full_like(sx, 1 / 512 / len(x))
    dx = fp8_matmul(g, w8, unit, sw, x.dtype)
    return loss, dx, fp8_matmul(x8t, gt, sx, unit, torch.float32)


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


def next_three(targets: Tensor) -> tuple[Tensor, Tensor]:
    """For each token the next three words, (tokens, 3), with the weights that record 89 begins with."""
    weights = torch.tensor([1.0, 0.5, 0.25], device=targets.device)
    return torch.stack([targets.roll(-n) for n in range(3)], 1), weights


def versions(x: Tensor, w: Tensor, targets: Tensor, candidates: int) -> dict[str, Callable[[], Any]]:  # fmt: skip
    """Each version's forward and backward pass, by its name. sampled: over so many candidates."""
    leaves = x.detach().requires_grad_(), w.detach().requires_grad_()
    three, weights = next_three(targets)
    compiled = torch.compile(plain_loss, dynamic=False, fullgraph=True)
    second = torch.compile(loss_and_gradient, dynamic=False, fullgraph=True)
    found: dict[str, Callable[[], Any]] = {
        "plain": lambda: torch.autograd.grad(compiled(*leaves, targets), leaves),
        "two passes": partial(two_passes, x, w, targets, second),
        "one pass": partial(head_loss_op, x, w, targets, torch.tensor([0, 1])),
        "sampled": partial(head_loss_op, x, w, targets, torch.tensor([candidates, 1])),
        "three": partial(head_loss_op, x, w, three, torch.tensor([0, 1]), weights),
        "bfloat16": partial(head_loss_fused, x, w, targets, 0, bf16_form(x.device)),
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


def errors_of(tokens: int = 2048, candidates: int = 10_240) -> list[dict[str, Any]]:
    """Error in the loss (nats), and relative errors of both gradients, of each version against float64; std: of the head's weights, 0 at step 0."""
    found = []
    for std in (0.0, 0.02, 0.15, 0.3):
        x, w, targets = trained_looking(tokens, std)
        for version, call in versions(x, w, targets, candidates).items():
            if version in ("liger", "cce"):  # another softcap
                continue
            to, by = next_three(targets) if version == "three" else (targets, None)
            inside = torch.ones(VOCABULARY, dtype=torch.bool, device="cuda")
            if version == "sampled":
                inside = choose_candidates(targets, VOCABULARY, candidates)[1]
            loss, *known = head_loss_by_hand(x.double(), w.double(), to, inside, 512, by)
            got = (plain_loss(x, w, targets), *call()) if version == "plain" else call()
            row = {"version": version, "std": std, "loss": got[0].item() - loss.item()}
            errors = [relative_error(a, b) if b.any() else 0.0 for a, b in zip(got[1:], known)]
            found.append(row | {"dx": errors[0], "dw": errors[1]})
    return found


def blocks_tried(x: Tensor, w: Tensor) -> dict[str, Any]:
    """Times of the kernel alone, all words, in other block sizes, and with the exact sigmoid."""
    scales, usual = (scale_of(x), scale_of(w)), LARGE_SHARED
    x8 = quantize(x, scales[0], E4M3)[0]
    w8 = quantize(w, scales[1], E4M3, straight=False, turned=True)[1]
    scale = scales[0] * scales[1]
    tried = {
        "as it is": usual,
        "4 warps": usual._replace(warps=4),
        "one program": usual._replace(programs=1),
        "64 rows": usual._replace(rows=64),
        "2 stages": usual._replace(stages=2),
        "256 columns": usual._replace(columns=256, programs=1),
        "exact sigmoid": usual,
    }
    calls = {name: partial(launch_head, x8, w8, scale, blocks, True, name != "exact sigmoid") for name, blocks in tried.items()}  # fmt: skip
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
    blocks = blocks_tried(x, w)
    return {"rows": found, "errors": errors_of(), "blocks": blocks, "peers": there}


def losses_by_candidates(folder: Path, counts: tuple[int, ...], batches: int = 16) -> dict[str, Any]:  # fmt: skip
    """A trained run's loss on its first validation micro-batches, nats a token, with so many candidates each; 0: all words."""
    from speedrun.train import build_run, forward_loss, val_batches, resume, attn_settings_now

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
                    place, told = run.ranks.device, attn_settings_now(run)
                    loss = forward_loss(run.model, batch, place, config.precision, told, torch.tensor([count, 1]))  # fmt: skip
                    losses[str(count)].append(loss.item())
    return {"losses": losses, "tokens": batch.targets.numel(), "distinct_targets": targets}


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


# %%
NAMES_OF = {"plain": "PyTorch, compiled, bfloat16", "two passes": "two passes, FP8, compiled loss", "one pass": "one pass, all words", "sampled": "one pass, candidates", "three": "one pass, all words, three targets", "bfloat16": "one pass, all words, bfloat16", "liger": "Liger Kernel, fused, bfloat16", "cce": "cut-cross-entropy, bfloat16"}  # fmt: skip
assert len(rows) == len(NAMES_OF) * len(SHAPES)
print(f"{'ms and GiB, for tokens:':34}", *(f"{tokens:13,}" for tokens, _ in SHAPES))
print(f"{'candidates:':34}", *(f"{count:13,}" for _, count in SHAPES))
for version, label in NAMES_OF.items():
    found = [rows[version, tokens] for tokens, _ in SHAPES]
    print(f"{label:34}", *(f"{row['p50']:8.2f} {row['peak_mib'] / 1024:4.1f}" for row in found))
one, few, base = (np.array([rows[name, tokens]["p50"] for tokens, _ in SHAPES]) for name in ("one pass", "sampled", "plain"))  # fmt: skip
assert (1.9 < (base / one)[1:]).all() and (base / one < 2.2).all() and (4 < (base / few)[1:]).all()
assert (base / one)[0] > 1.65 and (base / few)[0] > 2.5, "16,384 tokens: see below"
two, three, bf16 = (np.array([rows[name, tokens]["p50"] for tokens, _ in SHAPES]) for name in ("two passes", "three", "bfloat16"))  # fmt: skip
assert [f"{change(base / two) - 1:.0%}" for change in (np.min, np.max)] == ["1%", "8%"]
assert (f"{(three - one)[-1]:.1f}", f"{(three / one)[-1] - 1:.0%}") == ("1.0", "8%")
assert 0.8 < few[0] / few[1] < 0.85 and 1.03 < (base / bf16).min() and (base / bf16).max() < 1.06
assert rows["bfloat16", TOKENS]["peak_mib"] > 2 * rows["plain", TOKENS]["peak_mib"]
print(f"against PyTorch: {(base / one).min():.1f} to {(base / one).max():.1f} times as fast, with candidates {(base / few).min():.1f} to {(base / few).max():.1f} times")  # fmt: skip
alone = result["data"]["blocks"]["as it is"]["p50"]
print(f"the kernel alone, {TOKENS:,} tokens: {alone:.2f} ms of {one[-1]:.2f}; the floor by FP8 operations of its product: {floor_fp8 / 3:.2f}")  # fmt: skip
assert alone < 3 * floor_fp8 / 3
print("beside it:", result["data"]["peers"], measured_on(result))

# %% [markdown]
# The two libraries save memory, which is what they are for: they keep no logits at all, and pay by computing them twice, or in slices. Ours keeps two tensors of one byte a logit for a moment, and is in its product and epilogue within a factor of three of what the matrix units could do at best. The rest is the two backward products, which are PyTorch's, and all that is small. With candidates 16,384 tokens take hardly less than twice as many: probably the GPU waits for Python, which launches dozens of kernels. (In the trainer it does not, since a whole pass is replayed from a CUDA graph: [chapter 16](16_compile.py).)
#
# At 49,152 tokens two more targets cost 1.0 ms, 8%; we had guessed half of that. By bytes most of it should be the additions to $W$'s gradient, which are made from float32 copies of $x$; it has not been profiled. In bfloat16 the same kernels are three to five per cent faster than PyTorch, and need twice its memory. Of six trips four are left, since $G$ is written and read in two layouts of two bytes; and only one program fits a multiprocessor as configured, so that no product hides the exponentials. What a GPU without FP8 gains is that candidates save time there, too. (Measured on an H200; no older card has run it.)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: milliseconds of eight heads at 49,152 tokens, with the least time by operations in bfloat16 and FP8. Right: the loss of a trained model against the number of candidates."}}
from matplotlib import pyplot as plt

from speedrun.lab.results import figure_style

figure_style()
sampled = load_result("loss", "sampled")
losses = {int(count): float(np.mean(values)) for count, values in sampled["data"]["losses"].items()}
full = losses.pop(0)
distinct = np.mean(sampled["data"]["distinct_targets"])
fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
order = sorted(NAMES_OF, key=lambda name: rows[name, TOKENS]["p50"], reverse=True)
times = [rows[name, TOKENS]["p50"] for name in order]
axes[0].barh([NAMES_OF[name] for name in order], times, color=["C1" if NAMES_OF[name].startswith("one") else "C0" for name in order])  # fmt: skip
for place, ms in enumerate(times):
    axes[0].text(ms + 1, place, f"{ms:.1f}", va="center", fontsize=8)
for floor, style, name in ((floor_ms, "--", "bfloat16"), (floor_fp8, ":", "FP8")):
    axes[0].axvline(floor, color="k", ls=style, lw=1, label=f"least for all words, {name}")
axes[0].set_xlabel("ms, forward and backward")
axes[0].set_title(f"{SHAPES[-1][0]:,} tokens: {one[-1] / base[-1]:.2f} of PyTorch's\ntime, with {SHAPES[-1][1]:,} candidates {few[-1] / base[-1]:.2f}")  # fmt: skip
axes[0].legend(fontsize=7, loc="upper right")
axes[0].margins(x=0.12)
axes[1].plot(list(losses), list(losses.values()), "o-", ms=4)
axes[1].axhline(full, color="k", ls="--", lw=1, label="all words")
axes[1].axvline(distinct, color="C1", lw=1, label="different targets in the batch")
axes[1].set_xscale("log", base=2)
axes[1].set_xlabel("candidates")
axes[1].set_ylabel("loss of the same model (nats)")
beyond = min(count for count in losses if count > distinct)
axes[1].set_title(
    f"all targets in {beyond:,} candidates:\nthe loss comes out {full - losses[beyond]:.3f} too low"
)
axes[1].legend(fontsize=7, loc="lower right")
foot = f"left: {measured_on(result)}\nright: {measured_on(sampled)}"
fig.text(0.99, -0.08, foot, ha="right", fontsize=6.5)
plt.show()

# %%
assert 2.5 < full / losses[1024] < 3 and 0.02 < full - losses[beyond] < 0.05
assert sampled["data"]["tokens"] == 262_144 and 20_000 < distinct < 22_000
print(f"{distinct:,.0f} different targets among {sampled['data']['tokens']:,} tokens of validation text")  # fmt: skip

# %% [markdown]
# On the right a trained model is asked on validation text, in large batches of 262,144 tokens. With a thousand candidates its loss looks little more than a third of what it is: the words that would have competed are not there. Once all of the batch's targets are among the candidates, the loss is nearly the true one. Training never reads this number. It only follows its gradient, which pushes down the words that are there, and the fillers are others with each batch. (Training's micro-batches are 8 to 16 times smaller and have fewer different targets, so this curve does not say what 10,240 candidates hide there.)
#
# How exact are the gradients? On the GPU, against float64, 2,048 tokens, for heads with weights of growing size. (With candidates: against the gradient of the same sampled loss, so without the bias of sampling.) So of the prediction's numbers 5% is nearest: everything in eight bits gives 6 to 8% here. With the target's entry apart 3 to 4% are left in x's gradient, nearly all of it from rounding the operands of such random heads. In bfloat16 it is a quarter of a per cent, less than under PyTorch, which rounds the target's entry with the others, and the logits, and returns $W$'s gradient in bfloat16.

# %%
table = {(e["version"], e["std"]): e for e in result["data"]["errors"]}
for std in (0.02, 0.15, 0.3):
    cells = [f"{NAMES_OF[name]}: {table[name, std]['dx']:.1%}, {table[name, std]['dw']:.1%}" for name in ("plain", "bfloat16", "two passes", "one pass", "sampled")]  # fmt: skip
    print(f"weights of {std}: error in x's, W's gradient:", *cells, sep="\n    ")
    assert table["bfloat16", std]["dx"] < table["plain", std]["dx"] < 0.004
    assert table["one pass", std]["dx"] < 0.7 * table["two passes", std]["dx"]
    assert table["one pass", std]["dw"] < 0.5 * table["two passes", std]["dw"]
    assert abs(table["one pass", std]["loss"]) < 0.004

# %% [markdown]
# ## What it buys
#
# `record` and `record_200m` train with this head, and with 10,240 candidates in the first two thirds of the schedule. When the head was new, most of the last third had candidates, too, 16,384 of them, and only the last steps had all words. Here are the runs made then beside the runs before, on the same text, with the same seeds, on two H200s. (Both are older than the MLP in eight bits, [chapter 18](18_fused_mlp.py). And in all sampled runs on this page but the last section's the micro-batches that a GPU passes through the model together shared their candidates: on two GPUs four in the first third and two in the second, whose targets leave fewer places to fillers. Since then each micro-batch chooses its own, so that the loss does not depend on the number of GPUs; what is known of that stands at the end.)

# %%
from speedrun.config import config_from_json

runs = {kind: load_result("speedrun", name)["data"]["runs"] for kind, name in (("before", "record_200m_plain_head"), ("with it", "record_200m_fp8_head"))}  # fmt: skip
for kind, found in runs.items():
    took = ", ".join(f"{run['seconds']:.1f}" for run in found)
    ended = ", ".join(f"{run['curve'][-1]['val_loss']:.4f}" for run in found)
    memory = found[0]["memory_mb"]["allocated"] / 1024
    print(f"{kind:8} {took} seconds; final loss {ended}; {memory:.1f} GiB allocated")
seconds = {kind: np.mean([r["seconds"] for r in found]) for kind, found in runs.items()}
ends = {kind: np.mean([r["curve"][-1]["val_loss"] for r in found]) for kind, found in runs.items()}
saved, lost = 1 - seconds["with it"] / seconds["before"], ends["with it"] - ends["before"]
curves = {kind: {point["step"]: point["val_loss"] for point in found[0]["curve"]} for kind, found in runs.items()}  # fmt: skip
behind = {step: curves["with it"][step] - loss for step, loss in curves["before"].items() if step}
a_step = 0.01 / 100 * 2100 / 735  # nats: chapter 24's hundredth for 100 of 2,100 steps
print(f"{saved:.0%} less time, {lost:+.4f} in loss, which a schedule longer by {lost / a_step:.0f} steps is worth")  # fmt: skip
print("behind at each validation:", ", ".join(f"{step}: {gap:+.3f}" for step, gap in behind.items()))  # fmt: skip
assert 0.19 < saved < 0.21 and 0.004 < lost < 0.008 and 18 < lost / a_step < 24
assert 0.4 < behind[125] < 0.5 and behind[625] > 0.04 > 5 * behind[735]
schedule = config_from_json(runs["with it"][0]["config"]).schedule
with_all_words = (
    schedule.stages[3].duration * (735 - schedule.extension_steps) + schedule.extension_steps
)
assert round(with_all_words) == 56 and all(stage.candidates == 0 for stage in schedule.stages[3:])
small = {name: [run["seconds"] for run in load_result("speedrun", name)["data"]["runs"]] for name in ("small_plain_head", "small")}  # fmt: skip
shorter = 1 - np.mean(small["small"]) / np.mean(small["small_plain_head"])
print(
    f"small, on one H200: {', '.join(f'{s:.0f}' for s in small['small'])} seconds, {shorter:.0%} less"
)
assert 0.15 < shorter < 0.22
print(measured_on(load_result("speedrun", "record_200m_fp8_head")))

# %% [markdown]
# A fifth of the training time is gone. The price is about six thousandths of a nat. By the contest's logs, scaled from 2,100 steps ([chapter 24](24_speedrun.py)), a schedule of 735 steps would have to be some twenty steps longer to win that back, 3% of the time against the 20% saved. (Two runs against two, which differ by 0.001 and 0.002: the sign is hardly in doubt, the size is. Which part of it comes from the candidates and which from FP8 has not been measured; record 92's own ablation finds 2.4 thousandths for candidates, prefix loss and kernel together.)
#
# The curve is the instructive part. While the model trains on candidates, its loss over *all* words is behind: by nearly half a nat at first, and still by several hundredths when the last part of the schedule begins. Words that are rarely asked about are not pushed down far enough. In the last 56 steps, with all words, nearly all of that comes back. Whoever validates on the way is misled. (Record 92 validates only at the end, to save time.)
#
# ### The full vocabulary for the whole last third
#
# Is what is left at the end a matter of time? Today's schedule gives the model the whole last third to catch up. (`small` has kept the former one.) These runs, too, are on the same text, with the same seeds, on two H200s; they have [chapter 18](18_fused_mlp.py)'s MLP:

# %%
was, now = (load_result("speedrun", name)["data"]["runs"] for name in ("record_200m_sampled", "record_200m"))  # fmt: skip
plans = [config_from_json(found[0]["config"]).schedule for found in (was, now)]
asked = [[stage.candidates for stage in plan.stages] for plan in plans]
assert asked == [[10_240, 10_240, 16_384, 0, 0], [10_240, 10_240, 0, 0]]
assert plans[1] == preset("record_200m").schedule != plans[0] == preset("small").schedule
with_all_now = plans[1].stages[2].duration * (735 - plans[1].extension_steps) + plans[1].extension_steps  # fmt: skip
print(f"steps with all words: {with_all_words:.0f} before, {with_all_now:.0f} now")
points = {}
for kind, found in (("before", was), ("now", now)):
    for run in found:
        seed, curve = run["config"]["seed"], {point["step"]: point for point in run["curve"]}
        points[kind, seed] = at = curve[500]["train_time_ms"] / 1000, curve[625]["val_loss"], curve[735]["val_loss"]  # fmt: skip
        print(f"{kind:7} seed {seed}: {at[0]:.1f} s to step 500, {run['seconds']:.1f} in all; loss {at[1]:.4f} at 625, {at[2]:.4f} at the end")  # fmt: skip
gained = [points["before", seed][2] - points["now", seed][2] for seed in (0, 1)]
ahead = [points["before", seed][1] - points["now", seed][1] for seed in (0, 1)]
seconds = {kind: np.mean([run["seconds"] for run in found]) for kind, found in (("before", was), ("now", now))}  # fmt: skip
longer = seconds["now"] - seconds["before"]
print(f"both end lower, by {gained[0]:.4f} and {gained[1]:.4f}, and take {longer:.1f} s longer, {longer / seconds['before']:.0%}: {735 * longer / seconds['before']:.0f} steps of the former schedule")  # fmt: skip
assert (round(with_all_words), round(with_all_now)) == (56, 252)
more = 735 * longer / seconds["before"]  # a hundredth for a hundred of 2,100 steps, chapter 24
assert round(more) == 45 and f"{0.01 * (more / 735) / (100 / 2100):.3f}" == "0.013"
assert all(0.0025 < gain < 0.0035 for gain in gained) and 5.5 < longer < 7.5
assert all(0.045 < gain < 0.055 for gain in ahead) and 0.45 < np.mean(gained) / lost < 0.55
assert all(0 < points["now", seed][0] - points["before", seed][0] < longer / 3 for seed in (0, 1))
print(measured_on(load_result("speedrun", "record_200m")))

# %% [markdown]
# With more than four times as many steps over all words both seeds end about three thousandths lower, half of what the head had cost, and take six per cent longer. The two pairs agree more closely than two seeds do, but two pairs can establish the sign at most. And the schedule is not all that differs: between these runs the model has come to be compiled in parts, and its passes to be replayed from a CUDA graph ([chapter 16](16_compile.py)). Neither changes what is computed, but for the order of sums, so that the loss is probably the schedule's. Most of the seconds are the last third's, too. Whether the former schedule, made longer by as many seconds, would have gained as much has not been measured; by the rate above its 45 steps more would have gained about 0.013, four times as much.
#
# ### Candidates of each micro-batch
#
# In all runs above, a pass that joins several micro-batches chose its candidates once, for all of them. Each micro-batch chooses its own now, as in record 92. Here are two runs of that, on one H200, beside those with joined candidates and the same seeds. (How many GPUs there are makes no difference that two seeds could show: [chapter 24](24_speedrun.py).)

# %%
own = load_result("loss", "one_gpu")["data"]["runs"]
lost_at = {kind: [{point["step"]: point["val_loss"] for point in run["curve"]} for run in found] for kind, found in (("joined", now), ("own", own))}  # fmt: skip
assert [run["config"]["seed"] for run in own] == [run["config"]["seed"] for run in now] == [0, 1]
behind = {}
for step in (125, 250, 375, 500, 625, 735):
    there = {kind: [curve[step] for curve in curves] for kind, curves in lost_at.items()}
    behind[step] = np.mean(there["joined"]) - np.mean(there["own"])
    print(f"step {step}: candidates of a joined pass {there['joined'][0]:.4f}, {there['joined'][1]:.4f}; of each micro-batch {there['own'][0]:.4f}, {there['own'][1]:.4f}")  # fmt: skip
print(f"training on one GPU took {own[0]['seconds']:.0f} and {own[1]['seconds']:.0f} s")
assert 0.25 < behind[125] < 0.4 and 0.05 < behind[375] < 0.2 and abs(behind[735]) < 0.004
print(measured_on(load_result("loss", "one_gpu")))

# %% [markdown]
# The loss over all words is less behind, by a third of a nat after 125 steps, probably because more of the candidates are fillers, which push rare words down. At the end, after the last third with all words, one or two thousandths are left of that. They have the right sign in both pairs, and are no more than what separates the two seeds. (Three other runs with these candidates diverged; that was Muon's doing, and [chapter 31](31_symmetric_matmul.py) has found out why.)
#
# ## What it costs, and when it fails
#
# - The largest entry of $G$ fits e5m2 because the softcap is $23\,\sigma((z+5)/7.5)$. Another cap needs another gain, and one without a bound needs a maximum, and so a second pass. The trainer refuses others by name.
# - A head that is tied all the time is refused, too. (One that is tied until a step and then parts, as in `record`, is a matrix of its own that is kept equal.)
# - Without matrix units for FP8 the kernel computes in bfloat16 (compute capability 8.0 on). On older GPUs, on CPUs, and where a length is no multiple of 16, the definition runs, on rounded operands: slowly, and with no rounding of the gradient. (`import_module` takes it from the package: whoever edits the two cells above changes nothing in this notebook's operator.)
# - Sums of gradients over tokens with the same target are added by atomics, in an order that changes from run to run. Two runs with one seed agree until rounding separates them.
# - Two tensors of a byte a logit are alive for a moment. On two H200s the first runs with this head allocated less memory at their peak than those before, and reserved more; why has not been found.
#
# ## What did not work

# %%
tried = {name: row["p50"] for name, row in result["data"]["blocks"].items()}
for name, ms in sorted(tried.items(), key=lambda pair: pair[1]):
    print(f"{name:14} {ms:5.2f} ms, {ms / tried['as it is']:.2f} times")
assert (
    min(tried, key=tried.__getitem__) == "as it is" and tried["64 rows"] > 2.5 * tried["as it is"]
)
assert tried["exact sigmoid"] > 1.1 * tried["as it is"] and tried["one program"] > 1.3 * tried["as it is"]  # fmt: skip

# %% [markdown]
# - **One program on a multiprocessor.** Then nothing runs while its epilogue computes exponentials. Two overlap; one takes a third longer, a seventh with blocks of 256 columns.
# - **Two passes under the compiler.** It is 1 to 8% faster than PyTorch's head in bfloat16: what the products gain is lost between them, where five gigabytes of logits are written and read twice, and two copies of the gradient, five gigabytes together, written and read. This page once turned the gradient outside the compiled loss, with one line in the wrong place, and called two passes slower than PyTorch by half. Records 60 to 79 replaced that loss by hand-written kernels, one after the other.
# - **The exact sigmoid.** It is two special functions where the hardware's `tanh` is one.
# - **`inside[chosen] = True`.** Assigning a Python number copies it to the GPU, and waits until it has arrived: once in each forward pass Python stood still until the GPU was done. `index_fill_`, which an earlier version used, takes the number along. No profile of kernels shows this; a trace of both sides does.
# - **Zeros for what is masked.** A masked load of FP8 numbers with `other=0.0` came back as NaN on the GPU, and as zero in the interpreter. The kernels mask after the conversion.
#
# ## Exercises
#
# 1. How many words should be candidates? Write `expected_distinct(counts, tokens)`: the expected number of different targets among `tokens` tokens that are drawn independently, where word $v$ has been counted `counts[v]` times in a large text.


# %% tags=["solution"]
def expected_distinct(counts: np.ndarray, tokens: int) -> float:
    """Sum over words of the probability to occur at least once."""
    p = counts / counts.sum()
    return float((1 - (1 - p) ** tokens).sum())


# %%
counts = np.array([8, 4, 2, 1, 1])
draws = np.random.default_rng(0).choice(5, size=(20_000, 3), p=counts / counts.sum())
seen = np.mean([len(set(row)) for row in draws.tolist()])
answer = expected_distinct(counts, 3)
assert abs(answer - seen) < 0.03, f"20,000 draws of three tokens hold {seen:.2f} different words on average, not {answer:.2f}"  # fmt: skip
assert abs(expected_distinct(counts, 1) - 1) < 1e-9, "one token is one word"
assert expected_distinct(counts, 10**4) > 4.999, "in a long text all five occur"
print(f"three tokens: {answer:.2f} different words of five")

# %% [markdown]
# 2. The kernel's gain is a power of two. Write `largest_gain(cap)`: the largest power of two by which $e^{c s - c}\,s\,(1-s)$, with $s$ between 0 and 1, can be multiplied for a cap $c$ so that nothing exceeds e5m2's largest number, 57,344.


# %% tags=["solution"]
def largest_gain(cap: float) -> float:
    """The maximum is where the derivative of c s + ln s + ln (1 - s) is zero."""
    s = (cap - 2 + math.sqrt(cap * cap + 4)) / (2 * cap)
    top = math.exp(cap * s - cap) * s * (1 - s)
    return 2.0 ** math.floor(math.log2(57_344 / top))


# %%
for cap in (5.0, 15.0, 23.0, 30.0):
    steps = np.linspace(1e-6, 1 - 1e-6, 200_001)
    top = (np.exp(cap * steps - cap) * steps * (1 - steps)).max()
    answer = largest_gain(cap)
    assert answer * top <= 57_344, f"a cap of {cap}: {answer:g} times {top:.2e} is more than 57,344"
    assert 2 * answer * top > 57_344, f"a cap of {cap}: twice as much would fit"
assert GAIN <= largest_gain(CAP), "the kernel's own"
print(f"for the cap of 23: 2^{math.log2(largest_gain(CAP)):.0f}; the kernel has 2^{math.log2(GAIN):.0f}")  # fmt: skip

# %% [markdown]
# ## Since then
#
# Records 53 and 88 give each token several targets: the two words after the next, and the longest prefix of the next word that is a word itself. The kernel of record 89 takes their weights as an argument, and so does this one; no model of this book trains with them yet. Record 92 lets the product write logits in e4m3 and reads them with a hand-written kernel, at the width of the candidates, and keeps FP8 copies of the head between steps. [Chapter 15](15_low_precision.py) has the formats, [chapter 08](08_logits.py) the softcap, [chapter 24](24_speedrun.py) the runs.
