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
# # Low precision: eight bits
#
# ```{admonition} Cost box
# About half a minute on two CPU cores, where Triton's interpreter runs the kernel; on one GPU of compute capability 8.9 or later it is compiled, and the products are real ones. Nothing here is timed.
# Record 10, all of the model but the matrices' master weights in bfloat16: \@kellerjordan0. Record 19, the first matrix in eight bits: \@YouJiacheng. Record 57: \@classiclarryd, \@YouJiacheng, \@ChrisJMcCormick. Record 67: \@andrewbriand8. Record 84: \@sisovicm. Record 89: \@Mister-dev-oss, \@CerovazS, \@MarioPaerle, \@GabrieleCirillo, \@crisostomi. Record 90: \@theonlyglitch_. Record 92: \@devenpzak. The two formats are those of Micikevicius and others {cite}`micikevicius2022`.
# ```
#
# ## The problem
#
# The matrix that turns a vector into 50,304 logits does **a third** of the operations that the record's matrices do. A pass of 49,152 tokens needs it three times, forward, for the gradient of its input and for its own, and that takes **11.5 ms** if an H100 reaches the 989 TFLOP/s which its data sheet promises for bfloat16. A step of record 89 with so many tokens on each GPU, in its last third, takes 83 ms. For numbers of eight bits the same sheet promises 1,979, twice as many.

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
from speedrun.lab.hardware import setup

machine = setup()

# %%
import math

import torch

from speedrun.lab.results import public_table
from speedrun.model.gpt import param_specs
from speedrun.presets import preset

specs = param_specs(preset("record").model, 50_257)
sizes = {spec.name: math.prod(spec.shape) for spec in specs}
matrices = ("attention_qkv", "attention_out", "mlp_up", "mlp_down", "lm_head")
share = sizes["lm_head"] / sum(sizes[name] for name in matrices)
flop = 3 * 2 * 49_152 * 768 * 50_304
ms = {form: flop / rate * 1e3 for form, rate in {"bf16": 989e12, "FP8": 1979e12}.items()}
ladder = {int(row["record"]): row for row in public_table("records")}
step_ms = float(ladder[89]["step_avg_ms"])
assert 0.33 < share < 0.35 and 11.4 < ms["bf16"] < 11.6 and 57 < step_ms < 57.5
print(
    f"the head: {share:.0%} of the matrices' operations; {flop / 1e12:.1f} TFLOP, in ms:",
    {form: f"{each:.1f}" for form, each in ms.items()},
)

# %% [markdown]
# ```{admonition} Prediction
# Of a number's binary digits the eight-bit format e4m3 keeps three, its *mantissa bits*, behind the leading one. So rounding to the nearest is wrong by up to a sixteenth, 6%. A logit is a sum of 768 products of two such numbers. **How wrong is the sum: 6%, because that is how wrong its parts can be? Or 6% divided by $\sqrt{768}$, which is 0.2%, because errors average out?** And does a sum of 50,304 products fare better or worse? Write two numbers down.
# ```
#
# ## The idea
#
# ### Three formats
#
# A floating-point number is a sign, an exponent and a mantissa: $\pm 1.m \cdot 2^{e}$. The exponent is stored as an unsigned number from which a *bias* is taken off. Where the stored exponent is zero, the leading 1 goes, too, and what is left is a ladder of equal steps down to zero: the *subnormal* numbers. That is all, except for what the largest exponent means. In bfloat16 and in **e5m2** it stands for infinities and NaN, as IEEE 754 has it. In **e4m3** there are too few exponents to give one away: it has no infinity, and only the code with all bits set is NaN. (PyTorch's `fn` in `float8_e4m3fn` stands for *finite, and NaN*.) So here are all numbers of all three, from their bits:


# %%
def decode(code: int, exponent_bits: int, mantissa_bits: int, finite: bool) -> float:
    """The number that a code stands for. finite: the largest exponent is one like others."""
    top, mantissa = 2**exponent_bits - 1, code % 2**mantissa_bits
    exponent = code >> mantissa_bits & top
    sign = -1 if code >> (exponent_bits + mantissa_bits) else 1
    last = (
        1 - 2 ** (exponent_bits - 1) - mantissa_bits
    )  # of a mantissa's last digit, less the exponent
    if exponent == top and (mantissa == 2**mantissa_bits - 1 or not finite):
        return math.nan if finite or mantissa else sign * math.inf
    if exponent == 0:  # subnormal: no leading 1, and the step of the exponent above
        return sign * mantissa * 2.0 ** (last + 1)
    return sign * (2**mantissa_bits + mantissa) * 2.0 ** (last + exponent)


FORMATS = {  # exponent and mantissa bits, no infinity?
    torch.float8_e4m3fn: (4, 3, True),
    torch.float8_e5m2: (5, 2, False),
    torch.bfloat16: (8, 7, False),
}
numbers = {}
for dtype, layout in FORMATS.items():
    codes = torch.arange(2 ** (8 * dtype.itemsize))
    ours = torch.tensor([decode(code, *layout) for code in codes.tolist()], dtype=torch.float64)
    integers = torch.uint8 if dtype.itemsize == 1 else torch.uint16
    theirs = codes.to(integers).view(dtype).double()
    assert torch.equal(ours.nan_to_num(1e99), theirs.nan_to_num(1e99)), dtype
    assert ours.isnan().sum() == {4: 2, 5: 6, 8: 254}[layout[0]]
    numbers[dtype] = ours[ours.isfinite() & (ours > 0)].sort().values
    least, largest = numbers[dtype][0], numbers[dtype][-1]
    normal = torch.finfo(dtype).smallest_normal
    assert largest == torch.finfo(dtype).max and normal == 2.0 ** (2 - 2 ** (layout[0] - 1))
    doublings = math.log2(largest / least)
    print(f"{str(dtype)[6:]:14} {len(ours):6} codes, {len(numbers[dtype]):6} numbers above 0: from 2^{math.log2(least):.0f} (normal from 2^{math.log2(normal):.0f}) to {largest:.4g}, {doublings:.0f} doublings; next after 1: {1 + torch.finfo(dtype).eps}")  # fmt: skip

# %% [markdown]
# All codes agree with PyTorch's. Bfloat16 is float32 with sixteen digits cut off, so it has float32's range and nobody needs to think about scales. With eight bits one has to choose. E4m3 has three digits and eighteen doublings between its least number and its largest, 448. E5m2 has two digits and 32 doublings. It has float16's exponents: an e5m2 number is the upper byte of one in float16. Neither is more than a logarithmic table with eight or four entries for each doubling.
#
# ### What has to fit
#
# Which numbers are to be written in them? Train the laptop's model for a few seconds, with [chapter 05's](05_modern_block.py) block and the record's cap, and look at the three matrices of the head's products: the last vectors $x$, the weights $W$, and the gradient $g$ of the logits.

# %%
import tempfile
from pathlib import Path
from unittest.mock import patch

from speedrun.config import vary
from speedrun.model import gpt
from speedrun.train import build_run, train_step

BLOCK = {
    "norm": "rms",
    "biases": False,
    "activation": "relu2",
    "qk_norm": True,
    "zero_init_proj": True,
}
changes = {f"model.block.{name}": value for name, value in BLOCK.items()}
changes |= {"model.rotary.pos": "half_rope", "model.head.softcap": "sigmoid23"}
changes |= {"steps": tier.pick(cpu=80, gpu=150), "schedule.warmup_steps": 20, "compile": False}
live = build_run(vary(preset("cpu_gpt2"), changes | {"model.init_std": 0.02, "device": tier.device}), Path(tempfile.mkdtemp()), echo=None)  # fmt: skip
seen, plain_logits = {}, gpt.logits_of


def watched_logits(model, x):
    """The model's logits; what goes in, and the gradient that comes back, stay in `seen`."""
    logits = plain_logits(model, x)
    seen["x"] = x.detach().flatten(0, -2).float()
    if logits.requires_grad:
        logits.register_hook(lambda g: seen.update(g=g.flatten(0, -2).float()))
    return logits


amax = {"x": [], "W": [], "g": []}  # largest magnitudes, step by step
with patch.object(gpt, "logits_of", watched_logits):
    for _ in range(live.config.steps):
        train_step(live)
        seen["W"] = live.model.embed.detach().clone()
        for name, values in amax.items():
            values.append(seen[name].abs().max().item())
x, w, g = (seen[name].cpu().double() for name in ("x", "W", "g"))
assert len(x) == len(g) and w.shape == (g.shape[1], x.shape[1])
for name, each in (("x", x), ("W", w), ("g", g)):
    print(f"{name} {tuple(each.shape)}: largest {each.abs().max():.2g}, median {each.abs().median():.2g}")  # fmt: skip

# %% tags=["hide-input"] mystnb={"image": {"alt": "On a logarithmic axis: histograms of the last vectors, the weights and the gradient of the logits, and below them the numbers that e4m3, e5m2 and bfloat16 have"}}
import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style

figure_style()
fig, axes = plt.subplots(2, 1, figsize=(7.4, 4.2), layout="constrained", sharex=True, height_ratios=(2, 1))  # fmt: skip
bins = torch.arange(-36, 19)
for n, (label, each) in enumerate((("last vectors x", x), ("weights W", w), ("gradient of the logits g", g))):  # fmt: skip
    counts = torch.histogram(each.abs().clamp(min=2.0**-36).log2().flatten(), bins.double()).hist
    axes[0].stairs(counts / each.numel(), bins, color=f"C{n}", fill=True, alpha=0.5, label=label)
axes[0].set_ylabel("share of the entries")
axes[0].legend(loc="upper left")
for n, (dtype, marks) in enumerate(numbers.items()):
    where = marks.log2()
    if dtype == torch.bfloat16:
        axes[1].plot([-36, 18], [n, n], color="0.3", linewidth=8, solid_capstyle="butt")
    else:
        normal = marks >= torch.finfo(dtype).smallest_normal
        axes[1].plot(where[normal], [n] * int(normal.sum()), "|", color="0.3", markersize=10)
        axes[1].plot(where[~normal], [n] * int((~normal).sum()), "|", color="C3", markersize=10)
axes[1].set_yticks([0, 1, 2], ["e4m3", "e5m2", "bfloat16"])
axes[1].set_ylim(2.6, -0.6)
axes[1].set_xlabel("log₂ of the magnitude (pink: subnormal)")
axes[1].set_xlim(-36, 18)
lost = {dtype: (g.to(dtype).double() == 0).double().mean().item() for dtype in FORMATS}
fig.suptitle(f"unscaled, e4m3 turns {lost[torch.float8_e4m3fn]:.0%} of the gradient into zeros, e5m2 {lost[torch.float8_e5m2]:.0%}")  # fmt: skip
plt.show()

# %%
below = (w.abs() < torch.finfo(torch.float8_e4m3fn).smallest_normal).double().mean().item()
assert lost[torch.float8_e4m3fn] > 0.9 and lost[torch.float8_e5m2] > 0.5
assert lost[torch.bfloat16] == 0 and x.abs().max() < 448 and 0.1 < below < 0.5
print(f"of the weights {below:.0%} are subnormal in e4m3 as they stand")

# %% [markdown]
# The vectors would fit, since a norm has just been applied to them. The weights lie at the lower end, where digits get lost. The gradient is a mean over the batch, so it is divided by the number of tokens, and nearly all of it lies below everything that e4m3 has. Its middle 98% is the widest of the three, some eleven doublings, but it is mostly in the wrong place: multiplied by a suitable number nearly all of it would fit.
#
# ### Scales
#
# So a tensor in eight bits comes with a *scale* $s$, one float32 number: $x \approx s\,q$, where $q$ is what is stored. It goes in front of a product, which the GPU's units therefore compute without knowing of it:
#
# $$
# \sum_k a_{ik}\, b_{jk} \approx s_a s_b \sum_k q^a_{ik}\, q^b_{jk} .
# $$
#
# The plainest choice puts the largest magnitude of the tensor, its *amax*, at the largest number of the format.

# %%
#| default_exp kernels.fp8
#| export
import math
from typing import Any

import torch
from torch import Tensor

from speedrun.lab.hardware import jit

try:
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # macOS, Windows
    tl = constexpr = Any

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


# %%
#| export
def scale_of(x: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """What x is divided by so that its largest magnitude becomes the format's largest number: (1,) float32, on x's device.

    x: any shape with at least one number, any float dtype; beyond float32's range its numbers count as infinite. Never below 1e-12, so never 0. NaN if
    x has one, infinite if x has an infinity; then everything that is divided by it is NaN or 0, and no error is hidden. Reads x once; waits for nothing.
    """
    largest = torch.linalg.vector_norm(x, math.inf).float() / torch.finfo(dtype).max
    return largest.clamp(min=1e-12).reshape(1)


def quantize_reference(x: Tensor, scale: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """x / scale, any shape, in a format of eight bits: clipped at its largest number, rounded to the nearest, ties to even.

    x: any float dtype, divided in float32. scale: float32, of a shape that broadcasts. Infinities are clipped as well; NaN stays NaN. Where dtype is float32
    nothing is rounded. The formats: Micikevicius and others (2022).
    """
    largest = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-largest, largest).to(dtype)


# %%
def dequantized(x: Tensor, scale: Tensor | float, dtype: torch.dtype = E4M3) -> Tensor:
    """What is left of x, in float64."""
    scale = torch.as_tensor(scale, dtype=torch.float32)
    return quantize_reference(x, scale, dtype).double() * scale.double()


def error(found: Tensor, exact: Tensor) -> float:
    """The length of the difference, as a share of the exact one's."""
    return ((found - exact).norm() / exact.norm()).item()


assert scale_of(torch.tensor([[3.0, -896.0]])) == 2 and scale_of(torch.zeros(3)) > 0
stored = quantize_reference(torch.tensor([1e9, -500.0, 17.0, 19.0, 2.0**-10, math.nan]), torch.ones(1))  # fmt: skip
assert torch.equal(stored.float().nan_to_num(-1), torch.tensor([448.0, -448.0, 16.0, 20.0, 0.0, -1]))  # fmt: skip
for name, each in (("x", x), ("W", w), ("g", g)):
    found = {str(dtype)[13:]: error(dequantized(each, scale_of(each, dtype), dtype), each) for dtype in (E4M3, E5M2)}  # fmt: skip
    assert 0.02 < found["e4m3fn"] < 0.03 and 0.04 < found["e5m2"] < 0.06
    print(name, {form: f"{off:.1%}" for form, off in found.items()})
fits = (dequantized(g, scale_of(g)) == 0).double().mean().item()
assert fits < 0.5 * lost[E4M3]
print(f"zeros in the gradient, e4m3: {fits:.1%} instead of {lost[E4M3]:.0%}")

# %% [markdown]
# (17 lies halfway between 16 and 18, as 19 does between 18 and 20. Both go to the neighbour whose last digit is zero, so that halves do not all go one way.)
#
# The errors can be worked out. Between $2^e$ and $2^{e+1}$ a format with $m$ digits has gaps of $2^{e-m}$. An error is anything up to half of one, with equal chance, so its mean square is the gap's square over 12. Numbers that are spread evenly from $2^e$ to $2^{e+1}$ have a mean square of $\tfrac73\, 2^{2e}$ themselves. The ratio of the two roots is
#
# $$
# \varepsilon_m = 2^{-m} / \sqrt{28} ,
# $$
#
# 2.4% for e4m3, 4.7% for e5m2, 0.15% for bfloat16, at any $e$. We see a tenth or so more, in three tensors that could hardly be more different: **a floating-point format does not care about the scale**, as long as nothing is clipped above or underflows below. How long is that?

# %% tags=["hide-input"] mystnb={"image": {"alt": "Relative error of x, W and g in eight bits against the scale, from a 2^6th of amax scaling to 2^32 times it: rising steeply to the left, flat over many doublings, rising again to the right"}}
shifts = range(-6, 33)
kinds = (("x in e4m3", x, E4M3), ("W in e4m3", w, E4M3), ("g in e4m3", g, E4M3), ("g in e5m2", g, E5M2))  # fmt: skip
curves = {label: [error(dequantized(each, scale_of(each, dtype).item() * 2.0**shift, dtype), each) for shift in shifts] for label, each, dtype in kinds}  # fmt: skip
fig, axis = plt.subplots(figsize=(7.4, 3.2), layout="constrained")
for n, (label, found) in enumerate(curves.items()):
    axis.plot(shifts, found, color=f"C{min(n, 2)}", linestyle="--" if "e5m2" in label else "-", label=label)  # fmt: skip
axis.axvline(0, color="0.7", linewidth=1)
axis.set_yscale("log")
axis.set_xlabel("log₂ of the scale, as a multiple of amax scaling")
axis.set_ylabel("relative error")
axis.legend(loc="upper center")
inside = {label: [shift for shift, off in zip(shifts, found) if off < 1.2 * min(found)] for label, found in curves.items()}  # fmt: skip
widths = {label: kept[-1] - kept[0] for label, kept in inside.items()}
fig.suptitle(f"the error stays within a fifth of its least over {min(widths.values())} to {max(widths.values())} doublings of the scale\n(left of them numbers are clipped, right of them they underflow)")  # fmt: skip
plt.show()

# %%
assert all(len(kept) == widths[label] + 1 for label, kept in inside.items()), "no gaps"
assert min(widths.values()) >= 7 and widths["g in e5m2"] > widths["g in e4m3"] + 12
clipped = error(dequantized(x, scale_of(x).item() / 8), x)
assert clipped > 0.1, "to the left it is steep"
print(widths, "doublings of the scale that cost less than a fifth more")

# %% [markdown]
# On this plateau the scale does not matter; left of it, where the largest are clipped, errors soon are of another kind. With e5m2 it is wider by more than a dozen doublings, and twice as high: that is the choice between the two formats. A gradient's largest entry may change suddenly, which is why records took e5m2 for it first. So a scale needs no precision. It needs safety from above, and for that there are three ways.
#
# **Amax, now.** Always right. But the largest is known only when the whole tensor is there. So it has to be written in sixteen bits and read twice more: once for the amax, once for the conversion. For the logits' gradient that is 4.9 GB each time.
#
# **A constant.** Known beforehand, so a kernel can convert as it writes. That is what records 19 to 89 do in the head {cite}`moddednanogpt`; record 89 has $x$ at 100/448, $W$ at 1.6/448, and the gradient at 0.75/448 in e5m2. For $x$ this is safe by proof: a row of 768 numbers with a mean square of 1 has none above $\sqrt{768}$. For the weights it is a bet that none exceeds 1.6. And it wastes nothing, as long as it stays on the plateau.
#
# **Amax, one step late.** Weights, activations and gradients change little from step to step. Take the last step's amax and a margin, for which record 89 has 1.12 for a matrix and 1.8 for an activation, and record 90 has 1.25 {cite}`moddednanogpt`. A margin costs nothing on the plateau. Would it have been enough in the run above?

# %%
assert x.abs().max() <= math.sqrt(x.shape[1]) + 1e-3, "no number exceeds the root of the width"
assert (
    f"{49_152 * 50_304 * 2 / 1e9:.1f}" == "4.9"
    and math.sqrt(768) < 28
    and 28 / (100 / 448) < 448 / 3
), "so record 89's x is never clipped"
growth = {name: torch.tensor(values[1:]) / torch.tensor(values[:-1]) for name, values in amax.items()}  # fmt: skip
settled = {name: ratios[20:] for name, ratios in growth.items()}
clips = {margin: {name: int((ratios > margin).sum()) for name, ratios in settled.items()} for margin in (1.0, 1.12, 1.25, 1.8)}  # fmt: skip
for margin, counts in clips.items():
    print(f"margin {margin:.2f}: steps with something clipped", counts)
assert clips[1.0]["W"] > 20 and clips[1.12]["W"] == 0 and sum(clips[1.8].values()) == 0
assert min(clips[1.0].values()) > 10
assert f"{growth['x'].max():.2f} {growth['W'].max():.2f}" == "1.35 1.02"
print("largest growth in a step, from the first on:", {name: f"{ratios.max():.2f}" for name, ratios in growth.items()})  # fmt: skip

# %% [markdown]
# After the first twenty steps, which are not counted here, something would be clipped in many steps without a margin, and nothing at all with one of 1.12. Before that $x$ grew by up to 35% in a step; $W$ never by more than 2%. Record 89's weights have exact scales in the first sixteen steps.
#
# One scale may also stand for each *row*, as long as the sum does not run over rows: $s_a$ becomes $s_{a,i}$ and still goes in front. It pays where the rows' lengths differ by more than the plateau is wide, and only there:

# %%
draw = torch.Generator().manual_seed(0)
even = torch.randn(256, 128, generator=draw, dtype=torch.float64)
uneven = even * torch.logspace(0, -20, 256, base=2, dtype=torch.float64)[:, None]
worst = {}
for name, each in (("W", w), ("rows over 20 doublings", uneven)):
    row_scales = (each.abs().amax(1, keepdim=True) / 448).float()
    left = dequantized(each, scale_of(each)), dequantized(each, row_scales)
    worst[name] = [((found - each).norm(dim=1) / each.norm(dim=1)).max().item() for found in left]
    print(f"{name}: the worst row is off by {worst[name][0]:.1%} with one scale, {worst[name][1]:.1%} with its own")  # fmt: skip
b = torch.randn(64, 128, generator=draw, dtype=torch.float64)
q = quantize_reference(uneven, row_scales).double()
assert torch.allclose(dequantized(uneven, row_scales) @ b.T, row_scales * (q @ b.T))
assert worst["W"][1] > 0.8 * worst["W"][0], "W gains nothing"
assert worst["rows over 20 doublings"][0] > 0.3 and worst["rows over 20 doublings"][1] < 0.04

# %% [markdown]
# ### Two layouts of every matrix
#
# The matrix units of Hopper and Ada (*Tensor Cores*) multiply numbers of eight bits only if in *both* operands the dimension that is summed over is the one whose numbers lie side by side in memory. (For sixteen bits Hopper's take either order.) A matrix that is used forward and backward is summed over in both of its dimensions:
#
# | product | summed over | first operand, by rows | second operand, by rows |
# | --- | --- | --- | --- |
# | logits $= x W^\top$ | width | $x$ (tokens, width) | $W$ (words, width) |
# | $dx = g\, W$ | words | $g$ (tokens, words) | $W^\top$ (width, words) |
# | $dW = g^\top x$ | tokens | $g^\top$ (words, tokens) | $x^\top$ (width, tokens) |
#
# So each of the three matrices is needed straight and turned. Turning a matrix in a pass of its own reads and writes all of it once more: record 92's author reports that such a pass costs 10.7 s a run {cite}`moddednanogpt`. So one kernel should read a block once and write it both ways.
#
# ## The code
#
# A program takes a block of 64 × 64. (*Program*, block and mask are Triton's words; [chapter 17](17_norm_and_rotary.py) begins with its smallest kernel.) It may also multiply each row by a factor of its own, for a kernel of [the loss](08_logits.py) that does not know a row's softmax sum before it has been through the row: the gradient is divided by that sum afterwards.


# %%
#| export
@jit
def divide_clip(x, SCALE, largest):
    """x / scale between -largest and largest; NaN stays NaN."""
    return tl.clamp(x / tl.load(SCALE), -largest, largest, propagate_nan=tl.PropagateNan.ALL)


@jit
def quantize_kernel(
    X, SCALE, FACTOR, Q, QT, rows, columns, largest, ROWS: constexpr, COLUMNS: constexpr
):
    """A block of X / SCALE, clipped at ±largest, into Q and, transposed, into QT, in their dtypes; either may be None. FACTOR: one number a row that X is multiplied by, or None."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    # no `other`: what is not there is not stored either, and where X has eight bits a GPU has read other=0.0 as NaN
    x = tl.load(X + at, there).to(tl.float32)
    if FACTOR is not None:
        x = x * tl.load(FACTOR + row, row < rows, 0.0)[:, None]
    if Q is not None:
        tl.store(Q + at, divide_clip(x, SCALE, largest).to(Q.dtype.element_ty), there)
    if QT is not None:  # turned before it is rounded: see below
        at = column.to(tl.int64)[:, None] * rows + row[None, :]
        turned = divide_clip(tl.trans(x), SCALE, largest).to(QT.dtype.element_ty)
        tl.store(QT + at, turned, tl.trans(there))


# %%
block = torch.randn(70, 100, generator=draw).to(machine.device)
block[3, 5], block[69, 99] = math.nan, 1e9
straight, turned = torch.empty_like(block), block.new_empty(100, 70)
half = torch.full((1,), 0.5, device=machine.device)
quantize_kernel[(2, 2)](block, half, None, straight, turned, 70, 100, 3.0, ROWS=64, COLUMNS=64)
wanted = (block.cpu() / 0.5).clamp(-3, 3)
assert torch.allclose(straight.cpu(), wanted, equal_nan=True) and torch.equal(
    straight.nan_to_num(-9), turned.mT.nan_to_num(-9)
)
assert straight[3, 5].isnan() and straight[69, 99] == 3
print("clipped at 3:", int((straight.abs() == 3).sum()), "of 7,000; NaN stays NaN")

# %% [markdown]
# Two things are not as simple as they look. The comparison that clips has to be told to keep NaN: on a GPU the minimum of NaN and 448 is 448 otherwise, and a run that is broken would go on as if it were not. And the block is turned *before* it is rounded, so that division and clipping are written twice. To round once and turn the result looks better, and for float32 inputs Triton 3.6 makes a wrong kernel of it on an H200: a quarter of the turned numbers are others. The interpreter does not show that, nor would inputs in bfloat16. A test on a GPU does, and it is the reason why both copies are compared with a reference there, entry by entry.
#
# On a GPU the kernel's cast rounds to eight bits. Triton's interpreter loses the carry (1.98 becomes 1.0), so there the kernel writes float32, and PyTorch rounds.


# %%
#| export
def has_fp8(device: torch.device) -> bool:
    """Whether a device's matrix units take eight bits: NVIDIA GPUs from compute capability 8.9 on (Ada, Hopper, Blackwell)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def launch_quantize(
    x: Tensor, scale: Tensor, dtype: torch.dtype = E4M3, factor: Tensor | None = None,
    straight: bool = True, turned: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """As `quantize`, by the kernel; off a GPU, for the interpreter, in float32, rounded afterwards."""
    (rows, columns), x = x.shape, x.contiguous()
    kept = dtype if x.device.type == "cuda" else torch.float32
    q = x.new_empty(rows, columns, dtype=kept) if straight else None
    qt = x.new_empty(columns, rows, dtype=kept) if turned else None
    grid, largest = (-(-rows // 64), -(-columns // 64)), torch.finfo(dtype).max
    quantize_kernel[grid](x, scale, factor, q, qt, rows, columns, largest, ROWS=64, COLUMNS=64)
    return (None if q is None else q.to(dtype)), (None if qt is None else qt.to(dtype))


def quantize(
    x: Tensor, scale: Tensor, dtype: torch.dtype = E4M3, factor: Tensor | None = None,
    straight: bool = True, turned: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """x, times `factor` if given, over `scale`, in eight bits: as it is (straight), (rows, columns), and transposed (turned), (columns, rows), both row-major. What is not asked for is None.

    x: (rows, columns), any float dtype or layout; copied if it is not contiguous. scale: (1,) float32. factor: (rows,) float32. dtype: E4M3, E5M2, or float32, which rounds nothing. Clipping,
    infinities and NaN: as `quantize_reference`, which is also what runs where there are no units for eight bits.
    """
    if has_fp8(x.device):
        return launch_quantize(x, scale, dtype, factor, straight, turned)
    whole = quantize_reference(x if factor is None else x.float() * factor[:, None], scale, dtype)
    return (whole if straight else None), (whole.mT.contiguous() if turned else None)


# %%
on_device = [each.float().to(machine.device) for each in (x, w, g)]
scales = [scale_of(each, dtype) for each, dtype in zip(on_device, (E4M3, E4M3, E5M2))]
pairs = [launch_quantize(each, s, dtype, turned=True) for each, s, dtype in zip(on_device, scales, (E4M3, E4M3, E5M2))]  # fmt: skip
for each, s, (q, qt) in zip(on_device, scales, pairs):
    reference = quantize_reference(each, s, q.dtype)
    same = (q.float() == reference.float()).float().mean().item()
    assert same > 0.999, "a GPU's division may decide a tie differently"
    assert torch.equal(q.float(), qt.float().mT) and qt.is_contiguous() and q.dtype == reference.dtype  # fmt: skip
    print(f"{tuple(q.shape)} in {str(q.dtype)[6:]}: {q.numel() / 1e3:.0f} kB each way")
rising = torch.arange(1, len(x) + 1, device=machine.device) / len(x)
_, only = launch_quantize(on_device[0], scales[0], factor=rising, straight=False, turned=True)
exact = (x * rising.cpu()[:, None].double()).T
assert error(only.double().cpu() * scales[0].double().cpu(), exact) < 0.03

# %% [markdown]
# ### The product
#
# PyTorch hands such products to NVIDIA's library. It wants row-major matrices, dimensions that are multiples of 16, not both in e5m2, and scales at addresses that 16 divides. The last is easily overlooked: cut a scale out of a tensor of scales, and the library says `CUBLAS_STATUS_NOT_SUPPORTED`. Here such a scale is copied first; the rest is refused in words.


# %%
#| export
def check_operands(a: Tensor, b: Tensor) -> None:
    """What matrix units ask of `fp8_matmul`'s a (m, k) and b (n, k). Raises ValueError."""
    whole = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1]
    sizes = whole and b.shape[0] % 16 == b.shape[1] % 16 == 0
    layout = a.is_contiguous() and b.is_contiguous()
    if not (sizes and layout and E4M3 in (a.dtype, b.dtype) and {a.dtype, b.dtype} <= {E4M3, E5M2}):
        have = [f"{tuple(each.shape)} in {each.dtype}" for each in (a, b)]
        rows = "" if layout else ", not row-major"
        raise ValueError(f"FP8 matrix units take a (m, k) and b (n, k), row-major, k and n multiples of 16, at most one of them in e5m2; not {have[0]} and {have[1]}{rows}")  # fmt: skip


def fp8_matmul(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out: torch.dtype) -> Tensor:
    """a (m, k) times the transpose of b (n, k), both of eight bits and row-major, times both scales: (m, n) in dtype `out`.

    scale_a, scale_b: (1,) float32. Sums are off by less than 0.1% (slow accumulation). On GPUs that `has_fp8` it is `torch._scaled_mm`, and raises ValueError for operands that
    `check_operands` refuses; elsewhere, or where a is float32, it is the same product in float32, for any shape.
    """
    if a.dtype == torch.float32 or not has_fp8(a.device):
        return ((a.float() @ b.float().mT) * (scale_a * scale_b)).to(out)
    check_operands(a, b)
    scales = [s.clone() if s.storage_offset() % 4 else s for s in (scale_a, scale_b)]  # 16 bytes
    return torch._scaled_mm(a, b.mT, scales[0], scales[1], out_dtype=out, use_fast_accum=False)


# %%
(x8, x8_turned), (w8, w8_turned), (g8, g8_turned) = pairs
s_x, s_w, s_g = scales
products = {  # the three lines of the table: found, exact, and the operands
    "logits": (fp8_matmul(x8, w8, s_x, s_w, torch.bfloat16), x, w),
    "dx": (fp8_matmul(g8, w8_turned, s_g, s_w, torch.bfloat16), g, w.T),
    "dW": (fp8_matmul(g8_turned, x8_turned, s_g, s_x, torch.float32), g.T, x.T),
}
off = {name: error(found.cpu().double(), a @ b.T) for name, (found, a, b) in products.items()}
assert off["logits"] < 0.02 and 0.03 < off["dx"] < 0.12 and 0.03 < off["dW"] < 0.12
print({name: f"{each:.1%}" for name, each in off.items()}, "is the error of each product")
try:
    check_operands(x8[:, :-1].contiguous(), w8[:, :-1].contiguous())
except ValueError as refusal:
    print(refusal)

# %% [markdown]
# ## The measurement
#
# Why is the error of the logits ten times as small as the others? And which answer to the prediction was right? Rounding errors $\delta a$, $\delta b$ shift $\sum_k a_k b_k$ by about $\sum_k (a_k\,\delta b_k + \delta a_k\, b_k)$. If signs are random, squares add up, and
#
# $$
# \text{relative error} \approx \sqrt{\varepsilon_a^2 + \varepsilon_b^2} \;\cdot\; \frac{\sqrt{\sum_k a_k^2 b_k^2}}{\left|\sum_k a_k b_k\right|} .
# $$
#
# The second factor says how much the sum gains over its parts. If products have random signs, the sum grows as $\sqrt K$, as the error does. The factor is 1, and **nothing averages out**, at any length. If all have one sign, the sum grows as $K$, and the factor falls as $1/\sqrt K$. So both answers are right, for different sums.
#
# There is a second source of error, which is Hopper's own. A matrix unit adds 32 products and what it has so far at one go. To do so it shifts all of them to the largest one's exponent and, as the authors of DeepSeek-V3 found, keeps 14 bits there {cite}`deepseekv3`; the sum that it holds has 13 digits behind the leading one, as those of SageAttention2 found {cite}`zhang2024`. *Fast accumulation* leaves the sum there until the end. *Slow* accumulation takes it out after 128 products or so and adds it up in float32. That, too, can be played, in float64, by cutting digits off as they say. They found this from outside, with experiments; on an H200, sums of one sign lose what it predicts, to within a tenth (a test of ours that needs a GPU holds it to that).


# %%
def cut(values: Tensor, below: Tensor, bits: int) -> Tensor:
    """Values without the digits that lie `bits` or more below the leading one of `below`."""
    quantum = torch.ldexp(torch.ones_like(below), torch.frexp(below)[1] - bits)
    return torch.where(quantum > 0, (values / quantum).trunc() * quantum, values)


def hopper_sums(products: Tensor, lengths: list[int], together: int) -> list[Tensor]:
    """Sums of the first so many products, (rows, products) float64, as the units add them. together: products between two visits to float32."""
    total, held, found = torch.zeros(2, len(products), 1, dtype=torch.float64).unbind() + ([],)
    for n in range(0, products.shape[1], 32):
        if n in lengths:
            found.append((total + held)[:, 0])
        if n % together == 0:
            total, held = total + held, torch.zeros_like(held)
        terms = torch.cat([held, products[:, n : n + 32]], 1)
        held = cut(terms, terms.abs().amax(1, keepdim=True), 14).sum(1, keepdim=True)
        held = cut(held, held.abs(), 14)
    return [*found, (total + held)[:, 0]]


LENGTHS = [32, 96, 384, 768, 3072, 12_288, 50_304]
rows_drawn = tier.pick(cpu=96, gpu=384)
FORMS = {"e4m3 × e4m3": (E4M3, E4M3), "e4m3 × e5m2": (E4M3, E5M2), "bf16 × bf16": None}
measured = {}
for case in ("either sign", "one sign"):
    pair = torch.randn(2, rows_drawn, LENGTHS[-1], generator=draw, dtype=torch.float64)
    pair = pair.abs() if case == "one sign" else pair
    exact = (pair[0] * pair[1]).cumsum(1)
    for form, kinds in FORMS.items():
        scale, stored = 1.0, pair.bfloat16()
        if kinds:  # what the units multiply: the codes, without their scales
            both = [scale_of(each, dtype) for each, dtype in zip(pair, kinds)]
            stored = [quantize_reference(*each) for each in zip(pair, both, kinds)]
            scale = (both[0].double() * both[1].double()).item()
        codes = stored[0].double() * stored[1].double()
        sums = codes.cumsum(1)
        measured[case, form] = [error(scale * sums[:, n - 1], exact[:, n - 1]) for n in LENGTHS]
        for how, together in (("fast", LENGTHS[-1]), ("slow", 128)):
            if form == "e4m3 × e4m3":
                found = hopper_sums(codes, LENGTHS, together)
                measured[case, how] = [error(at, sums[:, n - 1]) for at, n in zip(found, LENGTHS)]
for (case, form), found in measured.items():
    print(f"{case:12} {form:12}", *(f"{each:8.3%}" for each in found))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Relative error of dot products against their length, for products of either sign and of one sign: three formats, and what fast and slow accumulation add"}}
fig, axes = plt.subplots(1, 2, figsize=(7.4, 4.0), layout="constrained", sharey=True)
for axis, case in zip(axes, ("either sign", "one sign")):
    for n, form in enumerate(("e4m3 × e4m3", "e4m3 × e5m2", "bf16 × bf16")):
        axis.plot(LENGTHS, measured[case, form], "o-", color=f"C{n}", markersize=3, label=form)
    axis.plot(LENGTHS, measured[case, "fast"], "--", color="C3", label="added by fast accumulation")
    axis.plot(LENGTHS, measured[case, "slow"], ":", color="C3", label="added by slow accumulation")
    axis.set_title(f"products of {case}", fontsize=9)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("length of the sum, K")
axes[0].set_ylabel("relative error")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
at_768 = LENGTHS.index(768)
fig.suptitle(f"768 products in e4m3: {measured['either sign', 'e4m3 × e4m3'][at_768]:.1%} off with either sign, {measured['one sign', 'e4m3 × e4m3'][at_768]:.2%} with one\nemulated fast accumulation: {measured['one sign', 'fast'][-1]:.0%} off a long sum of one sign")  # fmt: skip
plt.show()

# %%
epsilon = {form: 2.0**-digits / math.sqrt(28) for form, digits in (("e4m3", 3), ("e5m2", 2), ("bf16", 7))}  # fmt: skip
for form in ("e4m3 × e4m3", "e4m3 × e5m2", "bf16 × bf16"):
    predicted = math.hypot(*(epsilon[each] for each in form.split(" × ")))
    found = measured["either sign", form]
    assert all(0.7 < each / predicted < 1.5 for each in found), "flat, from 32 to 50,304"
    fallen = measured["one sign", form][0] / measured["one sign", form][-1]
    print(f"{form}: predicted {predicted:.2%}, at 768 {found[at_768]:.2%}; of one sign it fell {fallen:.0f} times")  # fmt: skip
e4 = measured["one sign", "e4m3 × e4m3"]
assert (
    0.0025 < e4[at_768] < 0.0035
    and 15 < measured["either sign", "e4m3 × e4m3"][at_768] / (2**-4 / math.sqrt(768)) < 20
)
assert 0.002 < e4[at_768] < 0.006 and 0.001 < e4[-1] < 0.002
assert measured["one sign", "bf16 × bf16"][0] > 20 * measured["one sign", "bf16 × bf16"][-1]
rounded = dequantized(pair[0], scale_of(pair[0]))
shrunk = 1 - (rounded.mean() / pair[0].mean()).item()
assert 0.0004 < shrunk < 2**-10 and 0.8 < e4[-1] / (2 * shrunk) < 1.2, "which both factors lose"
for case in ("either sign", "one sign"):
    assert max(measured[case, "slow"]) < 0.001
assert measured["either sign", "fast"][at_768] < 0.05 * measured["either sign", "e4m3 × e4m3"][at_768]  # fmt: skip
assert measured["one sign", "fast"][-1] > 0.3 and measured["one sign", "fast"][at_768] > e4[at_768]
assert 0.003 < measured["either sign", "fast"][-1] < 0.015
print(f"the mean of positive numbers falls by {shrunk:.2%} when they are rounded to e4m3")

# %% [markdown]
# For products of either sign the error is about 4%, at any length: less than the worst case, and almost twenty times more than 6% over $\sqrt{768}$. For products of one sign it is 0.3% at 768, and falls with the length. It does not fall for ever, since only chance averages out. Rounding is fair where numbers are spread evenly within a doubling: what is lost at its lower end, where numbers are rounded down across half a wide gap, is made up for at its upper end. But small numbers are usually more frequent than large ones, so a little more is rounded down than up. Numbers that are spread evenly on a logarithmic scale shrink by $2^{-2m}/48$, 0.03% in e4m3; normal ones by about twice as much.
#
# Does the formula hold for the model's three products, too?


# %%
def with_random_signs(each: Tensor, dtype: torch.dtype) -> Tensor:
    """As rounded to eight bits, but every error with a sign of its own."""
    signs = torch.randint(0, 2, each.shape, generator=draw) * 2 - 1
    return each + signs * (dequantized(each, scale_of(each, dtype), dtype) - each)


for name, (_, a, b) in products.items():
    parts, whole = ((a**2) @ (b**2).T).sum().sqrt(), (a @ b.T).norm()
    first = E4M3 if name == "logits" else E5M2
    law = math.hypot(epsilon["e4m3" if first == E4M3 else "e5m2"], epsilon["e4m3"])
    law *= (parts / whole).item()
    by_chance = error(with_random_signs(a, first) @ with_random_signs(b, E4M3).T, a @ b.T)
    print(f"{name}: the sum is {whole / parts:.1f} times its parts; error {law:.1%} by the formula, {by_chance:.1%} with random signs, {off[name]:.1%} found")  # fmt: skip
    assert 0.7 < by_chance / law < 1.5 and 0.8 < off[name] / by_chance < 2
own = g.abs() == g.abs().amax(1, keepdim=True)  # the entry of a row's own next token
assert (g[own] < 0).all() and own.sum() == len(g), "of p - 1, which all others lack"
of_targets = (g[own].square().sum() / g.square().sum()).item()
apart = dequantized(g.masked_fill(own, 0), s_g.cpu(), E5M2) + g.masked_fill(~own, 0)
x_left, w_left = dequantized(x, scale_of(x)), dequantized(w, scale_of(w))
kept_apart = {"dx": error(apart @ w_left, g @ w), "dW": error(apart.T @ x_left, g.T @ x)}
assert of_targets > 0.9 and all(kept_apart[name] < 0.6 * off[name] for name in kept_apart)
print(f"{of_targets:.0%} of the squared gradient is in one entry a row; with that one exact:", {name: f"{each:.1%}" for name, each in kept_apart.items()})  # fmt: skip

# %% [markdown]
# For the logits and $dx$ it does, nearly. Logits are sums whose terms agree. In $dx$ nothing agrees, and one factor has but two digits. In $dW$ the error is larger than chance would have it, since rounding is no chance: equal numbers get equal errors, and where many tokens have nearly the same gradient, these add up.
#
# And nearly all of the gradient's *norm* is in one entry of each row, that of the next word. Its $p - 1$ is large where all other $p$ are small. Left out of the eight bits and added exactly, which takes as many numbers as there are tokens, it halves the error and more. No record up to 92 does so, as far as we have read; [chapter 19](19_head_and_loss.py)'s kernel does.
#
# To a sum of 768 fast accumulation adds 0.04% or 1%, by its signs. In a long sum of one sign it is a disaster. The sum so far grows, and with it the last digit that is kept, until whole products lie below it and vanish. The gradients' products sum over 50,304 words and 49,152 tokens; how far terms agree there has not been measured. Record 89 accumulates fast in the head's forward product, slowly in the backward ones; record 92's author reports NaN otherwise, and a pull request on kernels found fast backward sums too inaccurate {cite}`moddednanogpt`. `fp8_matmul` is slow always.
#
# ## What it buys
#
# Times are the public records' {cite}`moddednanogpt`, on eight H100s. What this module brings in our own runs is measured with the kernels that use it: the MLP's in [chapter 18](18_fused_mlp.py), the head's in [chapter 19](19_head_and_loss.py).

# %%
for n, what in ((10, "model in bfloat16"), (19, "head in FP8"), (57, "Muon's weights in bfloat16, mantissa kept"), (67, "loss kernel writes the gradient in FP8"), (84, "MLP's first matrix, forward"), (89, "MLP's second matrix, forward"), (90, "MLP backward, and queries, keys, values")):  # fmt: skip
    before, after = (float(ladder[m]["record_time_s"]) for m in (n - 1, n))
    print(f"record {n}: {what:45} {before:6.1f} → {after:6.1f} s  ({1 - after / before:4.1%})  {ladder[n]['contributors'][:40]}")  # fmt: skip
seconds = {n: float(ladder[n - 1]["record_time_s"]) - float(ladder[n]["record_time_s"]) for n in (10, 19, 67, 84, 89, 90)}  # fmt: skip
more_steps = int(ladder[10]["steps"]) - int(ladder[9]["steps"])
faster = float(ladder[18]["step_avg_ms"]) - float(ladder[19]["step_avg_ms"])
counted = (ms["bf16"] - ms["FP8"]) * 65_536 / 49_152
assert seconds[10] == 24 and more_steps == 42 and 15 < seconds[19] < 16 and 3.2 < seconds[67] < 3.4
assert 11.9 < faster < 12.1 and 7.6 < counted < 7.8 and max(seconds[84], seconds[89]) < 1
assert int(ladder[19]["tokens_per_step_start"]) == 8 * 65_536
print(f"record 19: a step is {faster:.1f} ms shorter; by count the head saves {counted:.1f}")

# %% [markdown]
# Record 10 is the plainest: everything but the master weights of the matrices in sixteen bits saved 24 s and took 42 steps more. In record 19 each GPU read 65,536 tokens a step, so by the data sheet's rates the head should have saved 7.7 ms of a step. It became 12 ms shorter. The units reach less than the sheet says, at sixteen bits as at eight, so a halving is worth more than counted; and the same record changed the cap and the schedule, which cost or gain something, too.
#
# Afterwards less was left to gain. Forward products in the MLP gave half a second and 0.8 s (records 84 and 89). Record 89's authors report 0.0001 more loss, which their runs cannot tell from nothing. Record 90 adds the backward pass: 3.8 s less by its author's test, with narrower queries and keys and 30 more steps. Without eight bits in the MLP and the head's ready-made copies record 92 takes 5.0 s more, at a loss lower by 0.0004 (two runs) {cite}`moddednanogpt`.
#
# ### How to find out what each costs in loss
#
# What these records report is ten-thousandths of a nat, and what separates two seeds is thousandths ([chapter 24](24_speedrun.py)). A run with and a run without decide nothing, and pairs for each of four questions are many runs. There is a cheaper way. Take four things that a run like `record_200m` may or may not do (the preset does all but the third):
#
# - **head**: the head's products in eight bits, by [chapter 19](19_head_and_loss.py)'s kernel;
# - **mlp**: the MLP's, forward and backward, by [chapter 18](18_fused_mlp.py)'s;
# - **qkv**: the product that makes queries, keys and values, forward and backward, by `quantize` and `fp8_matmul` as they stand above, with a constant scale for the normed input, and the others' from their largest entries;
# - **sampled**: the softmax over a sample of the words in the first two thirds of the run, also chapter 19's.
#
# Of the sixteen combinations train the eight with an odd number of things on: each alone, and all but each. Then each thing is on in four runs and off in four; among the four with it, as among the four without, each of the other three is on twice. The difference of the two means is what it adds. Every run answers four questions. This is a *half-fraction factorial design*. Pairs do not disturb these means, but it cannot tell pairs apart: of what head and mlp do together, and qkv and sampled, it sees only the difference, and takes it for noise. What three things do together, beyond their pairs, it counts against the fourth.
#
# It is no magic, either. With seeds that scatter by 0.0016 ([chapter 01](01_are_you_faster.py)) eight runs know an effect to ± 0.0036, and the sixteen of two seeds to ± 0.0018. Costs of 0.001 stay below that. What the eight can show is that nothing costs 0.005, and the seconds.
#
# The hidden cells declare that study, and patch in what the trainer has no option for: `qkv`, and chapter 19's kernels in sixteen bits, for the head where it is off. The cell behind them tests the product and its gradients, and that without a GPU the head is the definition, rounded to bfloat16; its kernels are tested on GPUs only. All passes are half as long as the preset's, since those in sixteen bits keep more; that costs one and a half per cent of the time ([chapter 16](16_compile.py)). Our prediction, written before any run: head, mlp and qkv cost 0.001 each, the sample 0.003; and qkv saves nothing, since its conversions are kernels of their own, which read and write for about as long as its products get shorter. The last lines below say which runs have been made, and will print the effects when all eight are there. Until then five runs solve for a mean and four effects, if no two things do anything together. Believe of the seconds that the MLP's products save most and `qkv` nothing, and of the losses nothing.

# %% tags=["hide-input"]
#| export measure.precision
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from speedrun.config import Config, vary
from speedrun.kernels import loss as head
from speedrun.kernels.head_bf16 import bf16_form
from speedrun.lab.results import load_result, result_names
from speedrun.measure.study import runs_of
from speedrun.model import gpt
from speedrun.presets import preset

FACTORS = ("head", "mlp", "qkv", "sampled")
NAMESPACE = __name__.strip("_").replace(".", "_")  # the notebook's operator is not the package's


def arms() -> dict[str, set[str]]:
    """Half of the sixteen combinations, those with an odd number of factors on: each alone, and all but each.

    head, mlp, qkv: products in eight bits. sampled: the softmax over candidates in the first stages. An effect is four runs against four, and clear of what two factors do together.
    """
    alone = {f"only_{one}": {one} for one in FACTORS}
    return alone | {f"all_but_{one}": {*FACTORS} - {one} for one in FACTORS}


def config_of(on: set[str]) -> Config:
    """The run of a combination; what no option switches is patched in by `around`."""
    base = preset("record_200m")
    stages = tuple(replace(s, candidates=0) for s in base.schedule.stages)
    changes: dict[str, Any] = {} if "sampled" in on else {"schedule.stages": stages}
    # passes half as long as the preset's: in sixteen bits they keep more
    changes |= {"model.block.fp8": "mlp" in on, "data.max_forward_tokens": 32_768}
    return vary(base, changes)


def study() -> dict[str, Config]:
    """`record_200m` with products in eight bits and the sampled softmax on and off, a half-fraction factorial, with each of two seeds."""
    return runs_of({arm: config_of(on) for arm, on in arms().items()}, (0, 1))


# %% tags=["hide-input"]
#| export measure.precision
@torch.library.custom_op(f"{NAMESPACE}::linear", mutates_args=())
def linear_op(x: Tensor, w: Tensor) -> list[Tensor]:
    """x wᵀ in eight bits, (tokens, rows) in x's dtype; then what the backward pass needs. x: (tokens, width), each row of root mean square 1. w: (rows, width)."""
    of_x = x.new_full((1,), math.sqrt(x.shape[1]) / torch.finfo(E4M3).max, dtype=torch.float32)
    of_w = scale_of(w)
    x8, x8t = quantize(x, of_x, turned=True)
    w8, w8t = quantize(w, of_w, turned=True)
    return [fp8_matmul(x8, w8, of_x, of_w, x.dtype), x8t, w8t, of_x, of_w]


@linear_op.register_fake
def fake_linear(x, w):
    (tokens, width), rows, one = x.shape, len(w), x.new_empty(1, dtype=torch.float32)
    eight = [x.new_empty(shape, dtype=E4M3) for shape in ((width, tokens), (width, rows))]
    return [x.new_empty(tokens, rows), *eight, one, torch.empty_like(one)]


@torch.library.custom_op(f"{NAMESPACE}::linear_backward", mutates_args=())
def linear_backward_op(grad: Tensor, of_grad: Tensor, saved: list[Tensor]) -> list[Tensor]:
    """Gradients of x and w, in grad's dtype, from the output's, (tokens, rows), which goes to e5m2 over its scale."""
    x8t, w8t, of_x, of_w = saved
    grad8, grad8t = quantize(grad, of_grad, E5M2, turned=True)
    dx = fp8_matmul(grad8, w8t, of_grad, of_w, grad.dtype)
    return [dx, fp8_matmul(grad8t, x8t, of_grad, of_x, grad.dtype)]


@linear_backward_op.register_fake
def fake_linear_backward(grad, of_grad, saved):
    (width, tokens), (_, rows) = saved[0].shape, saved[1].shape
    return [grad.new_empty(tokens, width), grad.new_empty(rows, width)]


def linear_gradients(ctx: Any, grads: list[Tensor]) -> tuple:
    """By `linear_backward_op`, with the scale of this very gradient, not an earlier one's."""
    grad = grads[0].contiguous()
    of_grad = (grad.abs().amax().float() / torch.finfo(E5M2).max).clamp(min=1e-12).reshape(1)
    return tuple(linear_backward_op(grad, of_grad, list(ctx.saved_tensors)))


def keep_linear(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ctx.save_for_backward(*output[1:])


linear_op.register_autograd(linear_gradients, setup_context=keep_linear)
plain_linear = gpt.linear


def linear_in_eight(x: Tensor, weights: Any, name: str) -> Tensor:
    """The model's linear maps, in training that of queries, keys and values in eight bits."""
    if name != "attention_qkv" or not torch.is_grad_enabled():
        return plain_linear(x, weights, name)
    w = weights[name]
    return linear_op(x.flatten(0, -2).to(w.dtype), w)[0].view(*x.shape[:-1], len(w))


# %% tags=["hide-input"]
#| export measure.precision
@contextmanager
def around(name: str) -> Iterator[None]:
    """What a run of the study is trained under: its products where no option of the model switches them."""
    on = arms()[name.rpartition("_")[0]]
    with ExitStack() as patches:
        if "qkv" in on:
            patches.enter_context(patch.object(gpt, "linear", linear_in_eight))
        if "head" not in on:
            patches.enter_context(patch.object(head, "head_form", bf16_form))
        yield


# %% tags=["hide-input"]
#| export measure.precision
def finished() -> dict[str, dict]:
    """The runs of the study that have been made, by name."""
    made = result_names("precision")
    return {name: load_result("precision", name)["data"]["runs"][0] for name in study() if name in made}  # fmt: skip


def effects(number: Callable[[dict], float]) -> dict[str, tuple[float, float]]:
    """What each factor adds to a number of the runs, averaged over the others, and half of a 95% interval around it.

    Least squares of a mean for each seed and four effects; what they leave unexplained is taken as noise, interactions included (Student's t). Seeds that
    are not complete are left out.
    """
    from scipy.stats import t

    runs, sets = finished(), arms()
    seeds = [s for s in ("0", "1") if all(f"{arm}_{s}" in runs for arm in sets)]
    rows = [(arm, seed) for seed in seeds for arm in sets]
    means = np.array([[float(seed == s) for s in seeds] for _, seed in rows])
    signs = np.array([[1.0 if one in sets[arm] else -1.0 for one in FACTORS] for arm, _ in rows])
    values = np.array([number(runs[f"{arm}_{seed}"]) for arm, seed in rows])
    design = np.hstack([means, signs])
    fit = np.linalg.lstsq(design, values)[0]
    free, left = len(values) - len(fit), values - design @ fit
    half = t.ppf(0.975, free) * 2 * math.sqrt(left @ left / free / len(values))
    return {one: (2 * each, half) for one, each in zip(FACTORS, fit[len(seeds) :].tolist())}


# %%
import itertools

from scipy.stats import t as student

from speedrun.kernels.head_reference import head_loss_by_hand
from speedrun.kernels.loss import head_loss_op
from speedrun.lab.results import measured_on

plain = torch.randn(64, 48, generator=draw), 0.1 * torch.randn(96, 48, generator=draw)
leaves = [torch.nn.functional.rms_norm(plain[0], (48,)).requires_grad_(), plain[1].requires_grad_()]
upstream = torch.randn(64, 96, generator=draw)
rounded = torch.autograd.grad(linear_op(*leaves)[0], leaves, upstream)
whole = torch.autograd.grad(leaves[0] @ leaves[1].T, leaves, upstream)
worst = max(error(a.double(), b.double()) for a, b in zip(rounded, whole))
assert 0.04 < worst < 0.08, "e5m2 and e4m3: 4.7% and 2.4%, and a tenth or two more"
wide, targets = plain[1].detach().T.contiguous(), torch.arange(64) % 96
with around("only_mlp_0"):
    sampled = head_loss_op(leaves[0].detach(), wide, targets, torch.tensor([64, 1]))
inside = torch.zeros(96, dtype=torch.bool).scatter(0, targets, True)
exact = head_loss_by_hand(leaves[0].detach().double(), wide.double(), targets, inside)
far = [error(a.double(), b) for a, b in zip(sampled, exact)]
assert max(far) < 0.005 and max(far) > 1e-5, "64 candidates: the targets; rounded to bfloat16"
y = linear_op(*leaves)[0].detach().double()
forward = error(y, (leaves[0] @ leaves[1].T).detach().double())
assert 0.025 < forward < 0.05, "e4m3 twice"
on = arms()
assert sorted(map(len, on.values())) == [1] * 4 + [3] * 4 and len(study()) == 16
signs = np.array([[1 if one in each else -1 for one in FACTORS] for each in on.values()])
assert not (signs.T @ signs - 8 * np.eye(4)).any(), "main effects do not disturb each other"
assert np.array_equal(signs[:, 0] * signs[:, 1], -signs[:, 2] * signs[:, 3]), "pairs come in twos"
for trio in itertools.combinations(range(4), 3):
    (fourth,) = {*range(4)} - {*trio}
    assert np.array_equal(signs[:, trio].prod(1), -signs[:, fourth])
    assert not (signs[:, trio[0]] * signs[:, trio[1]] @ signs).any(), "nor do pairs"
known = [student.ppf(0.975, free) * 2 * 0.0016 / math.sqrt(n) for n, free in ((8, 3), (16, 10))]
assert [f"{each:.4f}" for each in known] == ["0.0036", "0.0018"]
print(f"a product in eight bits: {forward:.1%} off, its gradients {worst:.1%}; of {len(on)} combinations each factor is on in {(signs[:, 0] > 0).sum()}")  # fmt: skip
made, asked = finished(), [name for name in study() if name.endswith("_0")]
for name, run in made.items():
    print(f"{name}: {run['seconds']:.1f} s, {run['curve'][-1]['val_loss']:.4f}; {measured_on(load_result('precision', name))}")  # fmt: skip
print(f"of the {len(asked)} runs of one seed {sum(name in made for name in asked)} made; the others: python scripts/measure.py precision missing FOLDER")  # fmt: skip
some = [name for name in asked if name in made]
design = np.array([[1, *(one in on[name.rpartition("_")[0]] for one in FACTORS)] for name in some], float)  # fmt: skip
if len(some) == np.linalg.matrix_rank(design) == 5:  # as many as unknowns
    known = 1.96 * 0.0016 * np.linalg.norm(np.linalg.inv(design), axis=1)[1:]
    for what, number in (("seconds", lambda run: run["seconds"]), ("loss", lambda run: run["curve"][-1]["val_loss"])):  # fmt: skip
        solved = np.linalg.solve(design, [number(made[name]) for name in some])[1:]
        print(f"{what}, by {len(some)} runs:", {one: f"{each:+.4f}" for one, each in zip(FACTORS, solved)})  # fmt: skip
        if what == "seconds":
            assert solved[1] == min(solved) < -30 and solved[0] < -20 and abs(solved[2]) < 10
        else:
            print("of which noise alone makes", ", ".join(f"± {half:.4f}" for half in known))
            assert (abs(solved) < known).all()
if set(asked) <= set(made):
    for what, number in (("seconds", lambda run: run["seconds"]), ("loss", lambda run: run["curve"][-1]["val_loss"])):  # fmt: skip
        print(what, {one: f"{each:+.4f} ± {half:.4f}" for one, (each, half) in effects(number).items()})  # fmt: skip

# %% [markdown]
# ## What it costs, and when it fails
#
# **Errors of a few per cent in every product.** They are mostly noise, as a step is anyway, though slow weights keep theirs; a larger model may not forgive them. The contest's track for a larger model took its FP8 head out again {cite}`moddednanogpt`.
#
# **Conversions.** They read and write what used to be only read. Where they are not part of the kernel that makes the numbers, they eat the gain.
#
# **Constants that somebody must choose.** Records 21, 28, 51 and 55 changed those of the head. A clipped tensor gives no error, only a worse loss. NaN is not clipped, by `quantize` at least, and ends a run of ours ([chapter 23](23_training_loop.py)); an infinity is, under a constant scale.
#
# **Shapes.** Multiples of 16, and a GPU from compute capability 8.9 on. Elsewhere this module computes the same product in float32, slowly, which is good for tests only.
#
# ## What did not work
#
# Rounding at random, up or down so that the *mean* is right, would stop magnitudes from shrinking, and equal numbers from having equal errors. But a number that lies near a neighbour is now sometimes sent to the other one, so the noise grows by $\sqrt 2$:


# %%
def rounded_at_random(values: Tensor, dtype: torch.dtype) -> Tensor:
    """To one of the two neighbours in the format, with chances that keep the mean; |values| within the format."""
    ladder_up = numbers[dtype]
    steps = torch.cat([-ladder_up.flip(0), torch.zeros(1), ladder_up])
    above = torch.searchsorted(steps, values).clamp(1, len(steps) - 1)
    low, high = steps[above - 1], steps[above]
    chance = torch.rand(values.shape, generator=draw, dtype=torch.float64)
    return torch.where(chance < (values - low) / (high - low), high, low)


for name, each, dtype in (("|W| in e4m3", w.abs(), E4M3), ("g in e5m2", g, E5M2)):
    s = scale_of(each, dtype).double()
    largest = torch.finfo(dtype).max
    at_random = rounded_at_random((each / s).clamp(-largest, largest), dtype) * s
    nearest = dequantized(each, s.item(), dtype)
    ratio = error(at_random, each) / error(nearest, each)
    assert 1.3 < ratio < 1.6
    mean = [f"{found.abs().sum() / each.abs().sum() - 1:+.2%}" for found in (nearest, at_random)]
    print(f"{name}: noise {ratio:.2f} times as large", f"mean {mean[0]}, at random {mean[1]}" if each.min() >= 0 else "")  # fmt: skip
random_dx, random_dw = error(at_random @ w_left, g @ w), error(at_random.T @ x_left, g.T @ x)
assert random_dx > 1.2 * off["dx"] and random_dw < off["dW"]
print(f"dx is off by {random_dx:.1%} instead of {off['dx']:.1%}, dW by {random_dw:.1%} instead of {off['dW']:.1%}")  # fmt: skip

# %% [markdown]
# One gradient's error grows by a third, the other's falls by a quarter. Other attempts are public {cite}`moddednanogpt`. A pass of its own that turns a matrix round cost record 92's author 10.7 s. A pull request on record 89 found the MLP's own gradients in eight bits not worth it without turned copies that a kernel writes on the way. And stale scales for a weight or a gradient clip, and what is clipped is fed on, says the author of record 90, who takes exact ones there.
#
# ## Exercises
#
# 1. Round by hand. Write `nearest_e4m3(value)` for a float: the nearest number that e4m3 has, ties to the even mantissa, clipped at 448. Subnormal numbers are the trap. (`math.frexp` gives the exponent; Python's `round` sends halves to the even integer.)


# %% tags=["solution"]
def nearest_e4m3(value: float) -> float:
    """Rounded to a multiple of the gap around the value."""
    exponent = max(math.frexp(value)[1] - 1, -6)  # 2^-6 is the least normal number
    gap = 2.0 ** (exponent - 3)
    return max(-448.0, min(448.0, round(value / gap) * gap))


# %%
grid = numbers[E4M3].tolist()
middles = [(a + b) / 2 for a, b in zip([0.0, *grid], grid)]
tries = [*grid, *middles, *(middle * 1.001 for middle in middles), 0.0, 1e-9, 460.0, 1e6]
for value in [*tries, *(-value for value in tries)]:
    right = quantize_reference(torch.tensor([value]), torch.ones(1)).item()
    answer = nearest_e4m3(value)
    assert answer == right, f"{value:.9g} becomes {right:.9g}, not {answer:.9g}"
print(f"{2 * len(tries)} numbers, {len(middles)} of them halfway between two neighbours")

# %% [markdown]
# 2. One step late. Write `late_scales(largest, margin, start, exact)`: the list of scales for e4m3 when the amaxes of steps 0, 1, 2, … are `largest`. The first `exact` steps take their own amax over 448. Each later step takes the amax of the step before, times `margin`, over 448. Where `exact` is 0, step 0 has no step before it and takes `start`.


# %% tags=["solution"]
def late_scales(largest: list[float], margin: float, start: float, exact: int) -> list[float]:
    """Delayed scales, exact in the first steps."""
    late = [start, *(margin * value / 448 for value in largest[:-1])]
    return [own / 448 if n < exact else late[n] for n, own in enumerate(largest)]


# %%
for largest, margin, exact, right in (
    ([448.0, 896.0, 448.0], 1.0, 1, [1.0, 1.0, 2.0]),
    ([448.0, 896.0, 448.0], 1.5, 0, [7.0, 1.5, 3.0]),
    ([448.0, 896.0, 448.0, 448.0], 1.5, 2, [1.0, 2.0, 3.0, 1.5]),
):
    answer = late_scales(largest, margin, 7.0, exact)
    assert answer == right, f"amaxes {largest}, margin {margin}, the first {exact} exact, start 7: {right}, not {answer}"  # fmt: skip
for name, values in amax.items():
    clipped_at = [n for n, (scale, own) in enumerate(zip(late_scales(values, 1.12, 1.0, 16), values)) if own > 448 * scale]  # fmt: skip
    print(f"{name}: with a margin of 1.12 clipped at steps {clipped_at}")

# %% [markdown]
# ## Since then
#
# Records 84 and 89 took eight bits from the head to the MLP's forward products, record 90 to its backward ones and to queries, keys and values, with e4m3 even for gradients there. Record 92 has the logits themselves in e4m3, and in the head as in the MLP both copies of each matrix ready-made. The output projection of attention, the embedding and the products of Muon are in sixteen bits still, Muon's momentum and Adam's moments in float32; validation is in sixteen bits, too. Newer GPUs have blocks of 16 or 32 numbers with a scale each, and formats of four bits; the contest runs on H100s, which have not.
