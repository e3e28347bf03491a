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
# # Muon: orthogonalised updates
#
# ```{admonition} Cost box
# Under a minute on two CPU cores; within three minutes on one GPU. The comparisons of optimizers are 189 short trainings on a CPU and 63 on H100s, and are committed.
# Records 3 and 4: Keller Jordan, Jeremy Bernstein, Vlado Boža. Record 6: Keller Jordan. Record 8: \@Grad62304977, Keller Jordan. Muon itself {cite}`jordan2024`: also Yuchen Jin, You Jiacheng, Franz Cesista, Laker Newhouse.
# ```
#
# ## The problem
#
# AdamW treats every entry of a matrix by itself: it divides the mean gradient of each by its usual size. But a matrix acts as a whole, and its gradient has a structure that single entries do not show. Here is a small GPT after sixty steps of AdamW. (It keeps its matrices in *banks*: a bank stacks the same matrix of all layers into one parameter, [chapter 21](21_model.py).) We look at the matrix that makes the keys of layer 0, and at the running mean of its gradient, which the optimizer follows (Muon calls it the *momentum buffer*).
#
# Any matrix is a sum $G = \sum_i \sigma_i\, u_i v_i^\top$, its *singular value decomposition*, or $U\Sigma V^\top$. The $u_i$ have length 1 and are perpendicular to one another, and so are the $v_i$. The *singular values* $\sigma_1 \ge \sigma_2 \ge \dots \ge 0$ say how much of each term there is. A *direction* of a matrix is such a pair $u_i, v_i$: it sends $v_i$ to $\sigma_i u_i$. The matrix's *Frobenius norm*, or length, is $\lVert G\rVert_F = (\sum_i \sigma_i^2)^{1/2}$, which is the root of its entries' summed squares. Its *spectral norm* is $\sigma_1$.
#
# So that mean has 128 directions. How many of them does it use? And how many does AdamW's step use, which divides the mean entry by entry?

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
import math
import tempfile
from pathlib import Path

import torch

from speedrun.config import vary
from speedrun.presets import preset
from speedrun.train import train

scratch = Path(tempfile.mkdtemp())
BRIEF = {"steps": 60, "schedule.warmup_steps": 10, "val_every": 60, "val_tokens": 32_768}
BRIEF |= {"device": tier.device}
model_run = train(vary(preset("cpu_gpt2"), BRIEF), scratch / "look", echo=None)
state = model_run.optimizer.state_dict()  # tensors, by parameter and what they are
moments = {name: state[f"attention_qkv/{name}"] for name in ("exp_avg", "exp_avg_sq")}
assert moments["exp_avg"].shape == (2, 384, 128), "in each of two layers Q, K and V"
keys = {name: moment.view(2, 3, 128, 128)[0, 1].double() for name, moment in moments.items()}
followed, divisor = keys["exp_avg"], keys["exp_avg_sq"].sqrt() + 1e-8
adams_step = followed / divisor


# %%
def directions(matrix: torch.Tensor) -> int:
    """In how many directions 90% of a matrix's squared length lies."""
    energy = torch.linalg.svdvals(matrix).square()
    return int((energy.cumsum(0) < 0.9 * energy.sum()).sum()) + 1


sigma = torch.linalg.svdvals(followed)
assert directions(followed) < 16 and directions(adams_step) < 40 and sigma[0] > 30 * sigma[64]
assert torch.allclose(sigma.square().sum().sqrt(), followed.norm()), "the Frobenius norm, both ways"
print(f"90% of the mean's squared length lies in {directions(followed)} of 128 directions")
print(f"of AdamW's step, in {directions(adams_step)}")
print(f"the largest singular value is {sigma[0] / sigma[64]:.0f} times the median one")
counts = []
banks = [spec for spec in model_run.model.specs if spec.matrices]  # rows of the model's table
for spec in banks:
    mean = state[f"{spec.name}/exp_avg"].double()
    counts += map(directions, mean.view(-1, mean.shape[1] // spec.matrices, mean.shape[2]))
counts.sort()
assert len(counts) == 12 and counts[6] < directions(followed) <= counts[-1] < 64
median = (counts[5] + counts[6]) / 2
print(f"all 12 matrices: {counts[0]} at least, median {median:g}, {counts[-1]} at most")

# %% [markdown]
# Either way a step moves the weights in a few directions and leaves most of the others nearly where they are. (The means of most other matrices use even fewer.) Are the others noise? Or are they what is rare, and therefore slow to learn? Training will tell whether it pays to lift them, though not which of them carried the signal.
#
# ```{admonition} Prediction
# Muon replaces that mean by the matrix which has the same directions, *all of them equally long*. It does so with five iterations of three matrix products each, in every matrix, at every step. Record 4 trains matrices of width 768 on 524,288 tokens a step; the laptop's run, width 128 on 1,024. **By which share does a step get dearer, in FLOPs, for each of the two?** (Forward and backward a matrix costs
# 6 FLOPs a weight and token.)
# ```
#
# ## The idea
#
# Let $G$ be the gradient of a matrix of weights $W$. A step $\Delta$ changes the loss by about $\langle G, \Delta\rangle = \sum_{ij} G_{ij}\Delta_{ij}$. The best step is the one that makes this most negative *without being too long*, and everything depends on the norm that says what “long” means. Three norms, three optimizers {cite}`bernstein2024`:
#
# | norm of a step | the best step of norm 1 | known as |
# | --- | --- | --- |
# | Frobenius: the root of its summed squares | $-G / \lVert G\rVert_F$ | normalised gradient descent |
# | maximum: its largest entry | $-\operatorname{sign}(G)$ | Adam, without its memory |
# | spectral: its largest singular value | $-UV^\top$, where $G = U\Sigma V^\top$ | Muon, without its momentum |
#
# The last line needs a proof. Write $\langle G,\Delta\rangle = \sum_i \sigma_i\, u_i^\top \Delta v_i$. If no singular value of $\Delta$ exceeds 1, then $\lVert\Delta v_i\rVert \le 1$. Since $u_i$ has length 1, $u_i^\top\Delta v_i$ is at least $-1$, and the sum at least $-\sum_i\sigma_i$. And $\Delta = -UV^\top$ gets exactly that, with every term at its bound.
#
# Why this norm? Because of what a matrix is for. It multiplies: $\lVert \Delta x\rVert \le \sigma_{\max}(\Delta)\,\lVert x\rVert$. A step of spectral norm $\eta$ changes the layer's output, whatever the input, by at most $\eta$ times the input's length. That is the promise one wants from a learning rate. Under that promise, $UV^\top$ goes as far as it may in *every* direction at once.
#
# ## The code
#
# ### The polar factor
#
# $UV^\top$ is called the *polar factor* of $G$, or its orthogonal factor. The singular value decomposition gives it directly.

# %%
#| default_exp optim.newton_schulz
#| export
from collections.abc import Sequence

import torch
from torch import Tensor


# %%
#| export
def polar_factor(g: Tensor) -> Tensor:
    """The polar factor U Vᵀ of each matrix g = U S Vᵀ, (…, rows, cols) → the same shape and dtype.

    Directions with a singular value of zero, up to rounding, are left out.
    """
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    kept = s > s[..., :1] * torch.finfo(g.dtype).eps * max(g.shape[-2:])
    return (u * kept[..., None, :]) @ vt


# %%
g = followed
u = polar_factor(g)
assert torch.allclose(u @ u.mT, torch.eye(128).to(u), atol=1e-10)
nuclear = torch.linalg.matrix_norm(g, ord="nuc")
assert torch.allclose((g * u).sum(), nuclear)
generator = torch.Generator().manual_seed(0)
shaken = u + 0.01 * torch.randn(128, 128, dtype=torch.float64, generator=generator).to(u)
rivals = {"gradient": g, "its sign": g.sign(), "AdamW's": adams_step, "UVᵀ, shaken": shaken}
for name, rival in rivals.items():
    gain = (g * rival).sum() / torch.linalg.matrix_norm(rival, ord=2)  # at spectral norm 1
    assert gain < nuclear
    print(f"{name:11} gains {gain / nuclear:.0%} of what UVᵀ gains")
signs = torch.optim.Adam([p := torch.zeros(3, requires_grad=True)], lr=1.0)
p.grad = torch.tensor([0.001, -5.0, 70.0])
signs.step()
assert torch.allclose(p, torch.tensor([-1.0, 1.0, -1.0]), atol=1e-4), (
    "Adam's first step is the sign"
)

# %% [markdown]
# That is the update, and nobody computes it so. An SVD is many small dependent steps in float32 or better. What a GPU does fast is large matrix products in bf16, and a handful of those is enough.
#
# ### Newton–Schulz: odd polynomials of singular values
#
# A product such as $XX^\top X$ has the singular vectors of $X$ and the cubes of its singular values, since the inner $U^\top U$ and $V^\top V$ are identities. So any odd polynomial can be applied to all singular values at once without knowing one of them:
#
# $$
# X \mapsto aX + b\,(XX^\top)X + c\,(XX^\top)^2X \qquad\text{does}\qquad \sigma_i \mapsto p(\sigma_i) = a\sigma_i + b\sigma_i^3 + c\sigma_i^5 .
# $$
#
# Find a $p$ that, applied again and again, drives everything in $(0, 1]$ to 1, divide $G$ by its Frobenius norm, which no $\sigma_i$ exceeds, and iterate. The classic choice is Newton–Schulz, $p(\sigma) = \tfrac32\sigma - \tfrac12\sigma^3$ {cite}`bjorck1971`. It converges to 1, and takes its time: a small value grows by a factor of 1.5 an iteration, and small values are the point. Keller Jordan's quintic makes them grow by 3.44:

# %%
#| export
QUINTIC = (3.4445, -4.7750, 2.0315)


def apply_odd_polynomials(x: Tensor, polynomials: Sequence[tuple[float, float, float]]) -> Tensor:
    """x ← a x + b (x xᵀ) x + c (x xᵀ)² x for each (a, b, c): x, (…, rows, cols) → the same shape and dtype.

    Singular values go through a σ + b σ³ + c σ⁵, one polynomial after the other; singular vectors stay.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def newton_schulz(
    g: Tensor,
    iterations: int = 5,
    coefficients: tuple[float, float, float] = QUINTIC,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Nearly the polar factor of each matrix in g, (…, rows, cols) → the same shape, in `dtype`.

    Singular values, divided by the matrix's Frobenius norm, go through the polynomial `iterations`
    times; singular vectors stay, and rows and columns of zeros. Coefficients: Keller Jordan's of record 4.
    """
    x = g.to(dtype)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    return apply_odd_polynomials(x, [coefficients] * iterations)


# %%
def p(sigma, coefficients=QUINTIC):
    """The quintic, on numbers."""
    a, b, c = coefficients
    return a * sigma + b * sigma**3 + c * sigma**5


def iterated(sigma, times: int, coefficients=QUINTIC):
    """The quintic applied several times."""
    for _ in range(times):
        sigma = p(sigma, coefficients)
    return sigma


several = torch.randn(2, *tier.pick(cpu=(64, 128), gpu=(768, 3072)), generator=generator)
several = several.double().to(tier.device)
exact = torch.linalg.svdvals(several / torch.linalg.matrix_norm(several, keepdim=True))
got = torch.linalg.svdvals(newton_schulz(several, dtype=torch.float64))
assert torch.allclose(got, iterated(exact, 5).sort(-1, descending=True).values, atol=1e-6)
print("the singular values went through the polynomial, five times, and nobody looked at them")

# %% [markdown]
# The polar factor of a transpose is the transpose of the polar factor. So the code transposes a tall matrix, and the *Gram matrix* $XX^\top$ is always the smaller of the two. A bank of matrices goes through in one call. The result does not depend on the scale of what it is given, as long as its norm is far above the 1e-7 that guards the division and the square of the norm fits into float32; beyond that the step silently becomes zero. So if a loss is multiplied by a constant, these updates need not be corrected.

# %%
wide = torch.randn(3, 64, 128, dtype=torch.float64, generator=generator)
assert torch.allclose(
    newton_schulz(wide.mT, dtype=torch.float64), newton_schulz(wide, dtype=torch.float64).mT
)
one_by_one = torch.stack([newton_schulz(matrix, dtype=torch.float64) for matrix in wide])
assert torch.allclose(newton_schulz(wide, dtype=torch.float64), one_by_one)
flat = newton_schulz(wide)
assert torch.equal(flat, newton_schulz(1024 * wide)), "a power of two: the same bits"
assert (flat - newton_schulz(1000 * wide)).norm() < 0.05 * flat.norm(), "else bf16's rounding"
assert newton_schulz(1e-12 * wide).norm() < 0.1 * flat.norm(), "below what guards the division"
assert not newton_schulz(1e20 * wide).any(), "the norm is infinite in float32, and the step zero"
assert not newton_schulz(torch.zeros(4, 8)).any(), "no gradient, no step"

# %% [markdown]
# ### The quintic: a steep slope instead of convergence
#
# A steep slope at zero and convergence to one are traded against each other. The quintics with $p(1)=1$ and $p'(1)=0$ are $(a,\ 2.5-2a,\ a-1.5)$, one for each slope $a$. The one of slope 2.9, (2.9, −3.3, 1.4), converges. In five iterations it lifts to 0.68 what is above 1/277. Keller Jordan's is steeper and does so with what is above 1/664. Its price is that it does not converge: its fixed point, 0.87, repels, and the values swing between 0.68 and 1.20.

# %%
grid_of_sigma = torch.logspace(-5, 0, 200_001, dtype=torch.float64)
after = iterated(grid_of_sigma, 5)
floor = after[grid_of_sigma > 0.1].min().item()
lifted = grid_of_sigma[after < floor - 1e-6].max().item()  # the last input that ends up lower
top = max(iterated(grid_of_sigma, times).max().item() for times in (5, 6, 7, 8, 9, 10))
assert (f"{floor:.2f}", f"{top:.2f}", f"{1 / lifted:.0f}") == ("0.68", "1.20", "664")
print(f"inputs above 1/{1 / lifted:.0f} end between {floor:.2f} and {top:.2f}")
assert after[0] < 0.01 and after[grid_of_sigma < lifted].max() < floor, "small ones stay smaller"
SETTLES = (2.9, 2.5 - 2 * 2.9, 2.9 - 1.5)


def slope(sigma: float, coefficients=QUINTIC) -> float:
    """The quintic's derivative."""
    return sum(n * c * sigma ** (n - 1) for n, c in zip((1, 3, 5), coefficients))


assert [f"{number:.1f}" for number in SETTLES] == ["2.9", "-3.3", "1.4"]
assert math.isclose(p(1.0, SETTLES), 1.0) and abs(slope(1.0, SETTLES)) < 1e-12
settling = iterated(grid_of_sigma, 5, SETTLES)
settled = grid_of_sigma[settling < floor - 1e-6].max().item()  # by the same floor
assert f"{1 / settled:.0f}" == "277" and settling.max() < 1.15
assert (iterated(grid_of_sigma[grid_of_sigma > settled], 30, SETTLES) - 1).abs().max() < 1e-4
fixed = math.sqrt((4.7750 - math.sqrt(4.7750**2 - 4 * 2.0315 * 2.4445)) / (2 * 2.0315))
assert math.isclose(p(fixed), fixed) and f"{fixed:.2f}" == "0.87" and slope(fixed) < -1
print(f"the one that converges lifts what is above 1/{1 / settled:.0f} as far")

# %% [markdown]
# A comment in Keller Jordan's code, which PyTorch copied into a private function of its own Muon, says that the result is “something like” $US'V^\top$ with $S'$ uniform over 0.5 to 1.5, and that this does not hurt. At the top the range is narrower: but for rounding, no input at all ends above 1.20. At the bottom it is wider: what came in below 1/664 ends below 0.68, and far below 0.5 if it was small enough. Training with the exact polar factor, below, asks whether that hurts.
#
# What about bf16, whose numbers have eight significant bits? The distance from $UV^\top$ that the polynomial leaves is larger than what rounding adds:

# %%
in_bf16 = newton_schulz(followed).double()
in_float64 = newton_schulz(followed, dtype=torch.float64)
rounding = ((in_bf16 - in_float64).norm() / in_float64.norm()).item()
shape_error = ((in_float64 - u).norm() / u.norm()).item()
cosine = ((in_bf16 * u).sum() / in_bf16.norm() / u.norm()).item()
assert rounding < shape_error / 3 and cosine > 0.9
print(
    f"bf16 against float64: {rounding:.1%}; float64 against UVᵀ: {shape_error:.0%}; cosine {cosine:.3f}"
)

# %% [markdown]
# Here is the map, and what it does to the mean from the beginning of the chapter. The grey band reaches from the floor of 0.68 to 1.20; what is right of the dotted line ends in it after five iterations.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Above: the quintic map applied zero, one, three and five times, against the input singular value on a logarithmic axis. Below: the 128 singular values of a real momentum mean by rank, after as many iterations"}}
import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style

figure_style()
fig, (upper, lower) = plt.subplots(2, 1, figsize=(5.6, 6.4), layout="constrained")
shades = plt.get_cmap("viridis")
start = (sigma / sigma.norm()).cpu()
for times in (0, 1, 3, 5):
    shade = shades(0.9 - 0.16 * times)
    upper.semilogx(
        grid_of_sigma[::50], iterated(grid_of_sigma, times)[::50], color=shade, label=times
    )
    lower.semilogy(range(1, 129), iterated(start, times).sort(descending=True).values, color=shade)
upper.axhspan(floor, top, color="0.93", zorder=0)
upper.axvline(lifted, color="0.5", ls=":")
upper.set_xlabel("singular value, as a share of the Frobenius norm")
upper.legend(title="iterations", loc="upper left")
lower.axhspan(floor, top, color="0.93", zorder=0)
lower.set_xlabel("rank of the singular value (colours as above)")
lower.set_ylim(1e-4, 2)
for axis in (upper, lower):
    axis.set_ylabel("singular value after")
reached = (iterated(start, 5) > floor - 1e-6).sum().item()
upper.set_title(f"five iterations lift all above 1/{1 / lifted:.0f} to {floor:.2f} or more")
lower.set_title(f"{reached} of a real mean's 128 singular values reach {floor:.2f}")
plt.show()

# %% [markdown]
# ### Muon: momentum, then orthogonalisation
#
# The order matters: the noise is averaged away before what is small is lifted. (The other order is not measured here.) Nesterov's variant mixes the newest gradient in once more. Last comes the *shape factor*, `shape_scale` in the code. An orthogonal step sends an input to an output of the same length. Where a matrix has more rows than columns that length is spread over more entries, each of them smaller by $\sqrt{\text{cols}/\text{rows}}$, and the factor gives that back. Rows are outputs here, so only the MLP's first matrix has a factor, of 2. This scaling is record 8's; record 4 multiplied by the root of the larger dimension. (`skip` is the trainer's flag for a gradient that is not finite, [chapter 23](23_training_loop.py).)


# %%
#| export
def nesterov_momentum(
    g: Tensor, buffer: Tensor, momentum: float | Tensor, nesterov: bool, skip: Tensor | None
) -> Tensor:
    """buffer ← momentum · buffer + (1 − momentum) · g, in place; all of one shape. Returns the buffer, or with `nesterov` the same average of it and g.

    skip: device flag, shape (); if it is not zero the buffer stays as it is, without host sync.
    """
    if skip is not None:
        g = torch.where(skip > 0, buffer, g)  # the average of the buffer and itself
    buffer.lerp_(g, 1 - momentum)
    return g.lerp(buffer, momentum) if nesterov else buffer


# %% [markdown]
# With that Muon's whole update is three lines. (The trainer's, with all that later records added, is [chapter 13](13_muon.py)'s `muon_step`.)


# %%
def muon_update(g: Tensor, buffer: Tensor, ns_steps: int = 5, skip: Tensor | None = None) -> Tensor:
    """Muon's update at a learning rate of 1, for matrices with gradient g, (matrices, rows, cols). ns_steps=0: with the exact polar factor."""
    update = nesterov_momentum(g, buffer, 0.95, True, skip)
    update = newton_schulz(update, ns_steps) if ns_steps else polar_factor(update)
    return update * math.sqrt(max(1.0, g.shape[-2] / g.shape[-1]))


# %%
gradient = torch.randn(2, 128, 64, generator=generator)
buffer = torch.zeros_like(gradient)
first = muon_update(gradient, buffer)
values = torch.linalg.svdvals(first.double()) / math.sqrt(2)
assert floor - 0.02 < values.min() and values.max() < 1.22, (
    "semi-orthogonal, to the map's tolerance"
)
kept = buffer.clone()
muon_update(gradient * math.nan, buffer, skip=torch.ones(()))
assert torch.equal(buffer, kept), "a gradient that is not finite leaves no trace"
scales = {spec.name: spec.shape_scale for spec in banks}
assert scales == dict.fromkeys(scales, 1.0) | {"mlp_up": 2.0}

# %%
spiked, summed = torch.zeros(1, 64, 64), torch.zeros(1, 64, 64)
for step in range(30):
    gradient = torch.randn(1, 64, 64, generator=generator)
    if step == 9:
        gradient = spike = 100 * gradient
    update = muon_update(gradient, spiked, ns_steps=0)
    summed = 0.95 * summed + gradient
    same = polar_factor(gradient + 0.95 * summed)
    assert torch.allclose(update, same, atol=1e-3), "momentum as a sum leads the same way"
owned = (update * polar_factor(spike)).sum() / update.norm() ** 2
assert owned > 0.9
assert preset("cpu_gpt2").optim.grad_clip > 0
print("twenty steps after a gradient of 100 times the size")
print(f"the update's cosine with that gradient's own polar factor is {owned:.2f}")

# %% [markdown]
# That is the case for clipping where spikes occur: the momentum is averaged *before* the scale is removed. The cell shows a second thing on the way. Records 3 to 14 kept the momentum as a plain sum, $B \leftarrow \mu B + G$; since record 15 it is a mean, $B \leftarrow \mu B + (1-\mu)G$. At a constant $\mu$ the two differ by a constant multiple, and the polar factor has no scale. PyTorch has a Muon, too, for single matrices. Are ten of its steps ten of ours? It adds inside its products, so that a product and a sum are rounded once where ours are rounded twice. The cell compares both with steps in float64.

# %%
rows, cols = tier.pick(cpu=(96, 64), gpu=(3072, 768))
start_weight = torch.randn(rows, cols, generator=generator).to(tier.device)
theirs = torch.nn.Parameter(start_weight.clone())
reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95)
by_us = {dtype: start_weight.clone()[None] for dtype in (torch.bfloat16, torch.float64)}
buffers = {dtype: torch.zeros_like(weight) for dtype, weight in by_us.items()}
for _ in range(10):
    theirs.grad = torch.randn(rows, cols, generator=generator).to(tier.device)
    reference.step()
    for dtype, weight in by_us.items():
        update = nesterov_momentum(theirs.grad[None], buffers[dtype], 0.95, True, None)
        update = newton_schulz(update, dtype=dtype).float() * math.sqrt(max(1.0, rows / cols))
        weight.mul_(1 - 0.02 * 0.1).sub_(0.02 * update)
ours, exactly = (weight[0] for weight in by_us.values())
moved = (theirs - start_weight).norm()
apart = ((theirs - ours).norm() / moved).item()
off = {"PyTorch's": (theirs - exactly).norm() / moved, "ours": (ours - exactly).norm() / moved}
assert off["PyTorch's"] < off["ours"] < 0.02 and apart < 0.02
print(f"ten steps of torch.optim.Muon and of ours: apart by {apart:.1%} of the way")
for whose, distance in off.items():
    print(f"from the steps in float64: {whose} {distance:.1%}")

# %% [markdown]
# ### SOAP: Adam in Shampoo's eigenbases
#
# There is an older road to the same place. Shampoo {cite}`gupta2018` multiplies the gradient by inverse roots of its two covariances, $GG^\top$ and $G^\top G$, summed over time. SOAP's authors {cite}`vyas2025` noticed that a variant of this is Adafactor, which stores less than Adam, in the eigenbases of the two covariances, and put Adam itself there: rotate the gradient into the eigenbases, let Adam divide, and rotate the result back.

# %%
#| default_exp optim.soap
#| export
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speedrun.params import ParamSpec


@dataclass(frozen=True)
class SoapConfig:
    """SOAP's constants, its authors' defaults."""

    betas: tuple[float, float] = (0.95, 0.95)
    """Decay of the running mean, and of the squares and covariances."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    every: int = 10
    """Steps between two looks at the eigenbases."""


def adam_in(basis: tuple[Tensor, Tensor], g: Tensor, state: dict, options: SoapConfig) -> Tensor:
    """Adam's update L (m̂ / (√v̂ + eps)) Rᵀ of matrices with gradient g, (matrices, rows, cols); m and v are the moments of Lᵀ g R.

    basis: L, (matrices, rows, rows), and R, (matrices, cols, cols). The moments in `state` change in place.
    """
    (left, right), (beta1, beta2) = basis, options.betas
    turned = left.mT @ g @ right
    state["exp_avg"].lerp_(turned, 1 - beta1)
    state["exp_avg_sq"].lerp_(turned.square(), 1 - beta2)
    state["step"] += 1
    done = state["step"].max().item()
    mean = state["exp_avg"] / (1 - beta1**done)
    root = (state["exp_avg_sq"] / (1 - beta2**done)).sqrt()
    return left @ (mean / (root + options.eps)) @ right.mT


# %%
#| export
def eigenbasis(covariance: Tensor) -> Tensor:
    """Eigenvectors of symmetric matrices, (matrices, d, d), as columns; the largest eigenvalue first."""
    return torch.linalg.eigh(covariance)[1].flip(-1)


def follow(covariance: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration from an old eigenbasis to the new one: (basis, order of its old columns)."""
    values = (basis * (covariance @ basis)).sum(-2)
    order = values.argsort(-1, descending=True)
    basis = basis.gather(-1, order[..., None, :].expand_as(basis))
    return torch.linalg.qr(covariance @ basis)[0], order


# %%
covariance = wide @ wide.mT
basis = eigenbasis(covariance)
turned = basis.mT @ covariance @ basis
values = turned.diagonal(dim1=-2, dim2=-1)
assert (values[:, :-1] >= values[:, 1:]).all()
assert torch.allclose(turned, torch.diag_embed(values), atol=1e-9 * values.max())
other = torch.randn(3, 64, 64, dtype=torch.float64, generator=generator)
moved_on = covariance + 0.05 * other @ other.mT
after_one = follow(moved_on, basis)[0]
crooked = [(b.mT @ moved_on @ b).triu(1).norm() for b in (basis, after_one)]
assert crooked[1] < crooked[0], "one step of the iteration brings the basis closer"


# %%
#| export
def turn(state: dict) -> None:
    """Move SOAP's bases after its covariances, and its moments along with them."""
    for side, axis in (("left", -2), ("right", -1)):
        old = state[f"{side}_basis"]
        new, order = follow(state[side], old)
        index = order.unsqueeze(-1 if axis == -2 else -2).expand_as(state["exp_avg_sq"])
        state["exp_avg_sq"].copy_(state["exp_avg_sq"].gather(axis, index))
        mean, change = state["exp_avg"], new.mT @ old
        mean.copy_(change @ mean if side == "left" else mean @ change.mT)
        old.copy_(new)


# %%
#| export
def soap_state(like: Tensor) -> dict[str, Tensor]:
    """SOAP's state for matrices of the shape of `like`, (matrices, rows, cols): moments, covariances, eigenbases.

    step, (matrices, 1, 1): how many were taken; -1 before the first gradient was seen.
    """
    n, *sides = like.shape
    state = {"exp_avg": torch.zeros_like(like), "exp_avg_sq": torch.zeros_like(like)}
    for side, size in zip(("left", "right"), sides):
        state |= {key: like.new_zeros(n, size, size) for key in (side, f"{side}_basis")}
    return state | {"step": like.new_full((n, 1, 1), -1.0)}


def soap_update(
    g: Tensor, state: dict, skip: Tensor | None, options: SoapConfig = SoapConfig()
) -> Tensor:
    """SOAP's update at a learning rate of 1 for matrices with gradient g, (matrices, rows, cols). The first one only takes the bases, and is zero.

    skip: as elsewhere, but the host waits for it.
    """
    if skip is not None and skip.item():
        return torch.zeros_like(g)
    pairs, beta2 = {"left": g @ g.mT, "right": g.mT @ g}, options.betas[1]
    if state["step"].min() < 0:  # of matrices, not of padding, whose saved state is 0
        for side, pair in pairs.items():
            state[side].copy_((1 - beta2) * pair)
            state[f"{side}_basis"].copy_(eigenbasis(pair))
        state["step"].zero_()
        return torch.zeros_like(g)
    update = adam_in((state["left_basis"], state["right_basis"]), g, state, options)
    for side, pair in pairs.items():
        state[side].lerp_(pair, 1 - beta2)
    if state["step"].max().item() % options.every == 0:
        turn(state)
    return update


# %% [markdown]
# How does such a function become part of the trainer? The optimizer of [chapter 20](20_many_gpus.py) has one *rule object* for each parameter (small ones share one). A rule has `state`, which holds the tensors that it remembers, and `update`, which takes one step of those weights that this GPU is to update (`comm.shard`, with their gradient `comm.grad`).


# %%
#| export
class SoapRule:
    """SOAP as a rule of chapter 20's optimizer, on the whole matrices that this rank updates, (matrices, rows, cols)."""

    graphable = False  # it asks the device

    def __init__(self, specs: Sequence[ParamSpec], comm: Any, config: Any, fuse: bool):
        self.comm, self.state = comm, soap_state(comm.shard)
        self.weight_decay = config.adam.weight_decay * specs[0].wd_mul

    def update(self, scalars: Any, skip: Tensor, updates: Tensor) -> None:
        """One step: p ← p − lr · (update + weight_decay · p), unless skip is 1. scalars: numbers of this step, by name."""
        update = soap_update(self.comm.grad, self.state, skip)
        lr = scalars["matrix_lr"] * (1 - skip)
        self.comm.shard.mul_(1 - lr * self.weight_decay).sub_(lr * update)


# %%
from types import SimpleNamespace

from speedrun.optim.state import OptimConfig

spec = next(spec for spec in banks if spec.name == "mlp_up")
own = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(1)).double()
held = SimpleNamespace(shard=torch.ones_like(own), grad=own)
rule = SoapRule([spec], held, OptimConfig(), fuse=False)
go, leave_out = own.new_zeros(()), own.new_ones(())
rule.update({"matrix_lr": 0.1}, leave_out, updates=go)
assert (held.shard == 1).all() and (rule.state["step"] == -1).all(), "a step that is left out"
for _ in range(2):  # the first one takes the bases, and decays
    before = held.shard.clone()
    rule.update({"matrix_lr": 0.1}, go, updates=go)
    step = (before * (1 - 0.1 * OptimConfig().adam.weight_decay) - held.shard) / 0.1
assert (rule.state["step"] == 1).all()
assert torch.allclose(step, polar_factor(held.grad), atol=1e-3)
print("given one gradient twice SOAP takes its polar factor")

# %% [markdown]
# That step is no accident. How do the three relate? Ask each for one step without any memory. Adam's is the sign of every entry. SOAP's eigenbases of $GG^\top$ and $G^\top G$ are $U$ and $V$, and in them the gradient is the diagonal matrix $\Sigma$. Adam makes it the identity, and that, rotated back, is $UV^\top$. *SOAP without memory is Muon without momentum* (where no two positive singular values are equal; eigenvectors' signs cancel). The two differ in what they average over time, and in their cost.

# %%
low_rank = wide[:, :, :20] @ wide[:, :20, :64]
for g in (wide, low_rank, wide[:, :, :64].contiguous()):  # the last: square, of full rank
    bases = (eigenbasis(g @ g.mT), eigenbasis(g.mT @ g))
    fresh = {key: torch.zeros_like(g) for key in ("exp_avg", "exp_avg_sq")}
    one_step = adam_in(bases, g, fresh | {"step": torch.zeros(())}, SoapConfig())
    assert torch.allclose(one_step, polar_factor(g), atol=1e-3)
q, r = (
    torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=generator))[0] for _ in "qr"
)
assert torch.allclose(polar_factor(q @ g @ r), q @ polar_factor(g) @ r, atol=1e-8)
assert not torch.allclose((q @ g @ r).sign(), q @ g.sign() @ r, atol=0.1)
print("rotate the gradient and Muon's step rotates along; Adam's does not: it depends on the basis")

# %% [markdown]
# ## The measurement
#
# A comparison of optimizers is a comparison of tunings. So each rule is given the same grid: ten learning rates for the matrices and four for everything else (embeddings, gains and biases, which AdamW trains in every case). Warm-up, decay and clipping are the same for all. Each point trains the laptop's model for 600 steps. Then the three winners run with nine seeds, and once more for 2,000 steps with three, because a short run may mislead, as [chapter 22](22_config.py) will show. The rates are
# those of 600 steps in all cases. Betas and weight decay are the defaults, tuned for none of the rules. Muon's parts are taken away one at a time, at its best rates.

# %% tags=["hide-input"]
#| default_exp measure.newton_schulz
#| export
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from speedrun.config import Config, vary
from speedrun.presets import preset
from speedrun.lab.provenance import stamp
from speedrun.lab.results import load_result
from speedrun.measure.runs import SHORT, gpu_base, corpus_of, step_times, train_arms

NAMES = ("grid", "low", "winners", "pace", "clock", "parts", "long")
RULES = {"adamw": "adam", "soap": "soap", "muon": "muon"}
GRIDS = tuple(f"corpus_{rule}" for rule in RULES)
CORPUS = (*GRIDS, "corpus_winners")  # on GPUs, with a data folder
KEYS = ("optim.matrices", "optim.matrix_lr", "optim.adam.lr")
RATES = tuple(0.00025 * 2**n for n in range(10))
OTHERS = (0.002, 0.004, 0.008, 0.016)
PARTS: dict[str, dict[str, Any]] = {
    "exact factor": {"optim.muon.ns_steps": 0},
    "three iterations": {"optim.muon.ns_steps": 3},
    "no Nesterov": {"optim.muon.nesterov": False},
    "no momentum": {"optim.muon.momentum": 0.0, "optim.muon.nesterov": False},
    "no shape factor": {"optim.muon.scale_by_shape": False},
}


def grid(base: Config, rates=RATES, others=OTHERS) -> dict[str, Config]:
    """A run under every rule at every rate of the matrices and every rate of the rest, by its three numbers."""
    points = [(rule, rate, other) for rule in RULES for rate in rates for other in others]
    return {
        f"{rule} {rate:g} {other:g}": vary(base, dict(zip(KEYS, (RULES[rule], rate, other))))
        for rule, rate, other in points
    }


def short() -> Config:
    """The laptop's run, made short."""
    return vary(preset("cpu_gpt2"), SHORT | {"optim.muon.weight_decay": 0.1})


# %% tags=["hide-input"]
#| export measure.newton_schulz
def losses_of_grid(names=("grid", "low")) -> dict[str, float]:
    """The loss at each point of the committed grid; its lowest rates were added when AdamW's best lay at the edge."""
    halves = [load_result("newton_schulz", name)["data"]["arms"] for name in names]
    return {name: runs[0]["val_loss"] for half in halves for name, runs in half.items()}


def winners(loss: dict[str, float], points: dict[str, Config]) -> dict[str, Config]:
    """Each rule at the point of the committed grid with the lowest loss."""
    of_rule = {rule: [name for name in loss if name.split()[0] == rule] for rule in RULES}
    return {rule: points[min(names, key=loss.__getitem__)] for rule, names in of_rule.items()}


def corpus_arms(name: str, data: str) -> dict[str, Config]:
    """The arms of a measurement on a GPU, by the name that they have on a CPU."""
    points = grid(gpu_base(data), RATES[:8], OTHERS[1:3])
    if name in RULES:
        return {point: run for point, run in points.items() if run.optim.matrices == RULES[name]}
    return winners(losses_of_grid(GRIDS), points)


def in_muons_time(best: dict[str, Config]) -> dict[str, Config]:
    """AdamW and SOAP for as many steps as fit into the time of Muon's run, by measured step times."""
    ms = load_result("newton_schulz", "pace")["data"]["median"]
    steps = {rule: best[rule].steps * ms["muon"] / ms[rule] for rule in ("adamw", "soap")}
    return {rule: vary(best[rule], {"steps": round(count)}) for rule, count in steps.items()}


# %% tags=["hide-input"]
#| export measure.newton_schulz
def laptop_arms(name: str) -> dict[str, Config]:
    """The arms of a measurement on a CPU."""
    halves = {"grid": RATES[2:], "low": RATES[:2]}
    if name in halves:
        return grid(short(), halves[name])
    best = winners(losses_of_grid(), grid(short()))
    if name == "clock":
        return in_muons_time(best)
    if name == "long":
        return {rule: vary(run, {"steps": 2000}) for rule, run in best.items()}
    if name == "parts":
        return {part: vary(best["muon"], change) for part, change in PARTS.items()}
    return best


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train arms with paired seeds: {"arms": {arm: [run, …]}}. pace: step times, {"ms": {arm: [ms, …]}}.

    clock: as many steps as Muon leaves time for. long: more steps. parts: Muon without one of its parts.
    """
    place, _, kind = name.rpartition("_")
    seeds = {"winners": 9, "clock": 9, "long": 3, "parts": 3}.get(kind, 1)
    arms = corpus_arms(kind, arguments[0]) if place else laptop_arms(kind)
    modules = ["speedrun.measure.newton_schulz", "speedrun.train"]
    corpus = corpus_of(next(iter(arms.values())))
    facts = stamp(command, modules, seeds, range(seeds), corpus)
    if kind == "pace":
        took = step_times(arms)
        return {"ms": took, "median": {a: statistics.median(ms) for a, ms in took.items()}}, facts
    one_control = place and kind == "winners"
    counts = {arm: 3 if one_control and arm != "muon" else seeds for arm in arms}
    return {"arms": train_arms(arms, counts, facts, bool(place))}, facts


# %%
from speedrun.lab.results import measured_on
from speedrun.lab.stats import describe, p_difference

loss_at = {tuple(name.split()): loss for name, loss in losses_of_grid().items()}
NAMES_OF = {"adamw": "AdamW", "soap": "SOAP", "muon": "Muon"}
lowest = {rule: min((k for k in loss_at if k[0] == rule), key=loss_at.get) for rule in RULES}
assert len(loss_at) == len(RULES) * len(RATES) * len(OTHERS) == 120
assert all(RATES[0] < float(rate) < RATES[-1] for _, rate, _ in lowest.values()), "not at an edge"
assert loss_at[lowest["soap"]] < loss_at[lowest["muon"]] < loss_at[lowest["adamw"]]
for rule, (_, rate, other) in lowest.items():
    print(
        f"{NAMES_OF[rule]:5} {loss_at[lowest[rule]]:.3f} at a rate of {rate}, {other} for the rest"
    )
print(measured_on(load_result("newton_schulz", "grid")))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Validation loss after 600 steps against the rate of the matrices for AdamW, SOAP and Muon, each at its best rate for the rest"}}
curves = {
    rule: {rate: min(loss_at[rule, f"{rate:g}", f"{o:g}"] for o in OTHERS) for rate in RATES}
    for rule in RULES
}
assert curves["adamw"][0.0005] < curves["muon"][0.0005]
assert abs(curves["adamw"][0.016] - curves["muon"][0.016] - 2 / 3) < 0.02
fig, axis = plt.subplots(figsize=(5.6, 3.8))
for n, rule in enumerate(RULES):
    losses = curves[rule].values()
    axis.semilogx(RATES, losses, "o-", ms=4, color=f"C{n}", label=NAMES_OF[rule])
axis.set_xticks(RATES, [f"{rate:g}" for rate in RATES], rotation=45)
axis.minorticks_off()
axis.set_xlabel("rate of the matrices; the rest at each point's best")
axis.set_ylabel("validation loss after 600 steps")
axis.legend(loc="upper center")
below = {rule: loss_at[lowest["adamw"]] - loss_at[lowest[rule]] for rule in ("muon", "soap")}
axis.set_title(
    f"tuned on one grid, Muon ends {below['muon']:.2f} nats\nand SOAP {below['soap']:.2f} below AdamW"
)
plt.show()

# %% [markdown]
# One run a point, so this is a map and not a proof. Its lesson stands even so. The three valleys lie at different rates. At a rate of 0.0005 AdamW beats Muon; at 0.016 Muon leads by two thirds of a nat. Whoever compares at one rate measures where that rate lies in each valley. The test is the winners, nine seeds each (the first of them is the one that chose them), all of them started from the same nine sets of weights. They run three ways: for 600 steps, for more steps, and for as many steps as fit into the time that 600 of Muon's take.


# %%
def samples_of(name: str) -> dict:
    """The final losses of each arm of a measurement."""
    arms = load_result("newton_schulz", name)["data"]["arms"]
    return {arm: describe(run["val_loss"] for run in runs) for arm, runs in arms.items()}


won, lasting, clocked = (samples_of(name) for name in ("winners", "long", "clock"))
pace = load_result("newton_schulz", "pace")["data"]["median"]
for title, found, ours in (
    ("600 steps", won, won["muon"]),
    ("2,000 steps", lasting, lasting["muon"]),
    ("as long as 600 of Muon's", clocked | {"muon": won["muon"]}, won["muon"]),
):
    print(title)
    for rule in RULES:
        p_value = "" if rule == "muon" else f"  p = {p_difference(found[rule], ours):.0e}"
        print(f"  {NAMES_OF[rule]:5} {found[rule]}  {found[rule].mean - ours.mean:+.3f}{p_value}")
assert won["muon"].n == clocked["adamw"].n == 9 and lasting["muon"].n == 3

# %%
again = load_result("newton_schulz", "winners")["data"]["arms"]
assert all(again[rule][0]["val_loss"] == loss_at[lowest[rule]] for rule in RULES), "to the bit"
assert (
    1.2 < pace["soap"] / pace["muon"] < 1.3
    and min(loss_at[k] for k in loss_at if k[0] == "adamw") > 2.6
)
assert won["soap"].mean < won["muon"].mean < won["adamw"].mean, "by steps"
assert won["muon"].mean < clocked["soap"].mean < clocked["adamw"].mean, "by the clock"
assert p_difference(won["soap"], won["muon"]) < 1e-6
assert f"{p_difference(clocked['soap'], won['muon']):.4f}" == "0.0002"
lead = {n: found["adamw"].mean - found["muon"].mean for n, found in ((600, won), (2000, lasting))}
behind = {n: found["muon"].mean - found["soap"].mean for n, found in ((600, won), (2000, lasting))}
assert 0.7 < lead[2000] / lead[600] < 0.8 and 0 < behind[2000] < 0.25 * behind[600]
assert 0.45 < lead[600] < 0.55 and 0.09 < behind[600] < 0.11
p_long = p_difference(lasting["soap"], lasting["muon"])
assert (f"{lasting['adamw'].mean:.2f}", f"{p_long:.2f}") == ("2.01", "0.06")
longer = load_result("newton_schulz", "clock")["data"]["arms"]["adamw"][0]["config"]["steps"]
assert longer == short().steps + 130
assert 0.02 < clocked["soap"].mean - won["muon"].mean < 0.03
assert abs(short().steps * pace["muon"] / pace["adamw"] - longer) < 25, "by the pace measured last"
print(measured_on(load_result("newton_schulz", "winners")))

# %% [markdown]
# So there are two answers. *By steps* SOAP is the best of the three and Muon a tenth of a nat behind (0.08 at chapter 13's better rate). *By the clock* Muon wins, by a fortieth of a nat ($p = 0.0002$), since SOAP takes a quarter longer for a step. AdamW loses both ways, even with 130 more steps, which is about what its cheapness pays for.
#
# Half a nat is a great deal, and one should ask how much of it lasts. After 600 steps AdamW is above 2.6 at each of its forty points. In runs of 2,000 steps it gets to 2.01: it is late rather than stuck. There Muon's lead over it has shrunk by a quarter, and SOAP's lead over Muon has nearly vanished ($p = 0.06$ at $n = 3$, at rates tuned for 600 steps; tuned for 2,000 it may differ), while a step of SOAP stays as dear as it was. A gap in nats has a length of training attached to it.
#
# Two things differ besides the rules. Weight decay is multiplied by the rate, so the same 0.1 takes from Muon's matrices more than ten times what it takes from AdamW's. And AdamW's mean keeps 0.9 of itself in a step, those of Muon and SOAP 0.95. Neither was tuned.

# %%
from speedrun.optim.muon import MuonConfig
from speedrun.schedule import Schedule

run, left = short(), {}
for rule, (_, rate, _) in lowest.items():
    schedule = Schedule(run.schedule, run.steps, lr=float(rate))
    each = [schedule.at(step).lr for step in range(run.steps)]
    left[rule] = math.prod(1 - run.optim.adam.weight_decay * rate for rate in each)
    print(f"{NAMES_OF[rule]:5} decay alone would leave {left[rule]:.0%} of a weight")
assert run.optim.adam.weight_decay == run.optim.muon.weight_decay == 0.1 and 1 - left[
    "muon"
] > 10 * (1 - left["adamw"])
assert run.optim.adam.betas[0] == 0.9
assert SoapConfig().betas[0] == MuonConfig().momentum == 0.95

# %% [markdown]
# ### On a GPU
#
# On a GPU the same three rules train 30 million parameters for 400 steps of 32,768 tokens, on English that is not FineWeb. Each rule has a grid of sixteen points, with eight learning rates of the matrices and two of the rest. Then the winners run again, Muon with nine seeds, the others with the first three of them.

# %%
there = {
    tuple(name.split()): loss
    for name, loss in losses_of_grid(tuple(f"corpus_{rule}" for rule in RULES)).items()
}
best_there = {rule: min((k for k in there if k[0] == rule), key=there.get) for rule in RULES}
runs_there = load_result("newton_schulz", "corpus_winners")["data"]["arms"]
on_gpu = samples_of("corpus_winners")
took = {rule: sum(r["seconds"] for r in runs) / len(runs) for rule, runs in runs_there.items()}
for rule in RULES:
    ahead = f"{on_gpu[rule].mean - on_gpu['muon'].mean:+.3f}"
    print(
        f"{NAMES_OF[rule]:5} {on_gpu[rule]}  {ahead}  {took[rule]:.1f} s  at {best_there[rule][1:]}"
    )
p_soap = p_difference(on_gpu["soap"], on_gpu["muon"])
assert len(there) == 48 and (on_gpu["muon"].n, on_gpu["soap"].n) == (9, 3)
assert on_gpu["muon"].mean < on_gpu["soap"].mean < on_gpu["adamw"].mean and p_soap < 1e-4
assert 0.48 < on_gpu["adamw"].mean - on_gpu["muon"].mean < 0.5
assert 0.03 < on_gpu["soap"].mean - on_gpu["muon"].mean < 0.04
assert 1.8 < took["soap"] / took["muon"] < 1.85 and took["muon"] / took["adamw"] < 1.05
assert best_there["muon"][1:] == (f"{RATES[7]:g}", f"{OTHERS[2]:g}"), "the grid's last corner"
assert {best_there[rule][2] for rule in RULES} == {f"{OTHERS[2]:g}"}
gained = there["soap", "0.004", "0.004"] - there["soap", "0.004", "0.008"]
assert gained > on_gpu["soap"].mean - on_gpu["muon"].mean
run_there = runs_there["muon"][0]["config"]
assert (run_there["steps"], run_there["data"]["batch_tokens"]) == (400, 32_768)
assert "H100" in load_result("newton_schulz", "corpus_winners")["stamp"]["gpu"]
assert len(there) + sum(map(len, runs_there.values())) == 63
print(
    f"SOAP against Muon: p = {p_soap:.0e}; {measured_on(load_result('newton_schulz', 'corpus_winners'))}"
)

# %% [markdown]
# The lead over AdamW is half a nat here, too, after so short a run. SOAP, which led by steps on the laptop, is 0.04 behind, and takes 1.8 times as long. But the grid decides who is ahead as much as the seeds do. For all three the better rate of the rest is the higher of two, so a larger grid might help each. At SOAP's best rate of the matrices, doubling the rate of the rest gained more than SOAP is behind. Muon's rate of the matrices is at the edge as well. With these rates Muon is ahead beyond doubt; but as the grid ends at the best rates, it does not say which rule is better by steps. By the clock Muon is.
#
# ### The FLOPs of orthogonalisation
#
# Now the prediction. An iteration multiplies an $m \times n$ matrix, $m \le n$, three times: $X X^\top$ and the last product cost $2m^2n$ FLOPs each, the square of the Gram matrix $2m^3$. Forward and backward through the same matrix, with $B$ tokens in a step, cost $6mnB$. For a square matrix and five iterations the ratio is $30m^3/6m^2B = 5m/B$: it does not depend on anything but the width and the batch.

# %%
from torch.utils.flop_counter import FlopCounterMode

from speedrun.model.gpt import GPTConfig, flops_per_token, param_specs


def newton_schulz_flops(rows: int, cols: int, iterations: int = 5) -> int:
    """FLOPs of the iterations for one matrix."""
    m, n = sorted((rows, cols))
    return iterations * (4 * m * m * n + 2 * m**3)


def dearer(shape: GPTConfig, vocab_size: int, seq_len: int, batch_tokens: int) -> float:
    """FLOPs of orthogonalising all matrices of the blocks, as a share of a training step's."""
    total = 0
    for spec in param_specs(shape, vocab_size):
        if spec.matrices:
            layers, rows, cols = spec.shape
            total += layers * spec.matrices * newton_schulz_flops(rows // spec.matrices, cols)
    return total / (batch_tokens * flops_per_token(shape, vocab_size, seq_len))


with FlopCounterMode(display=False) as counter:
    newton_schulz(torch.randn(96, 64))
assert counter.get_total_flops() == newton_schulz_flops(96, 64)

# %%
laptop = preset("cpu_gpt2")
shares = {
    "record 4": dearer(GPTConfig(), 50_257, 1024, 524_288),
    "the laptop": dearer(laptop.model, 288, laptop.data.seq_len, laptop.data.batch_tokens),
}
measured = pace["muon"] / pace["adamw"] - 1
assert shares["record 4"] < 0.005 and 0.4 < shares["the laptop"] < 0.5
assert (f"{5 * 768 / 524_288:.1%}", f"{5 * 128 / 1024:.0%}") == ("0.7%", "62%")
for name, share in shares.items():
    print(f"{name}: {share:.1%} more FLOPs a step")
print(
    f"the laptop, by its clock: {measured:.0%} more time; SOAP {pace['soap'] / pace['adamw'] - 1:.0%}"
)
print(measured_on(load_result("newton_schulz", "pace")))

# %%
from speedrun.lab.results import public_table

ladder = {row["record"]: row for row in public_table("records")}
ms_of = {n: round(float(ladder[n]["step_avg_ms"])) for n in ("5", "6", "7")}
assert ms_of == {"5": 179, "6": 154, "7": 142} and ms_of["6"] < 0.9 * ms_of["5"]
assert f"{shares['record 4']:.1%}" == "0.4%"
assert f"{8 * shares['record 4']:.0%}" == "3%" and laptop.precision == "float32"
print(f"if each of eight GPUs does all of it: {8 * shares['record 4']:.1%} of its step's FLOPs")
print(f"ms a step: {ms_of['5']} in record 5, {ms_of['6']} in record 6, {ms_of['7']} in record 7")

# %% [markdown]
# It is under half a per cent for the record, and nearly half of a step for the laptop. (The one-line answer, $5m/B$, gives 0.7% and 62%. It is for a model of square matrices; wide ones are cheaper, and attention and the head are paid for and not orthogonalised.)
#
# But the 0.4% counts each matrix once for 524,288 tokens. In records 3 to 5 each of eight GPUs orthogonalised all matrices and trained on an eighth of the tokens: about 3% of a GPU's FLOPs. The clock charged more. When record 6 shared the matrices out, a step fell from 179 to 154 ms. So Muon is nearly free *where the batch is large and the work is shared*: at record 7 a step takes 142 ms with Muon, 139 with Adam. On the laptop's clock the price is smaller than in FLOPs, presumably because much of a small model's step is not multiplying at all, and, where the CPU multiplies bf16 faster, because Newton–Schulz runs in bf16 and the model in float32. SOAP pays with products by square matrices of both sizes, the larger included, and with a QR decomposition at every tenth step.
#
# ### Ablations: which part does it?

# %% tags=["hide-input"] mystnb={"image": {"alt": "Change of the final loss when one part of Muon is taken away, three seeds each, against Muon as it is"}}
parts = load_result("newton_schulz", "parts")["data"]["arms"]
as_it_is = [
    run["val_loss"] for run in load_result("newton_schulz", "winners")["data"]["arms"]["muon"]
]
change = {
    part: [run["val_loss"] - whole for run, whole in zip(runs, as_it_is)]
    for part, runs in parts.items()
}
means = {part: sum(values) / len(values) for part, values in change.items()}
order = sorted(means, key=means.get)
fig, axis = plt.subplots(figsize=(5.6, 2.9))
for y, part in enumerate(order):
    axis.plot(change[part], [y] * 3, "o", ms=5, color="C2", alpha=0.8)
axis.axvline(0, color="0.5", lw=0.8)
spread = describe(as_it_is).sd
axis.axvspan(-2 * spread, 2 * spread, color="0.9", zorder=0)
axis.set_yticks(range(len(order)), order)
axis.set_xlabel(
    "change of the loss, same seed (nats a token)\ngrey: ±2 sd of Muon's own nine seeds, unpaired"
)
exact = next(part for part in order if "exact" in part)
axis.set_title(f"{order[-1]} {means[order[-1]]:+.2f} nats, {exact} {means[exact]:+.2f}")
plt.show()

# %%
assert max(map(abs, change["exact factor"])) < 0.005, "the map's swings do no harm"
assert 0.2 < means["no momentum"] < 0.3 and 0.1 < means["three iterations"] < 0.2
assert 0.03 < means["no shape factor"] < 0.08 and 0.03 < means["no Nesterov"] < 0.08
above = iterated(grid_of_sigma, 3)
reach_of_three = 1 / grid_of_sigma[above < floor - 1e-6].max().item()
assert 50 < reach_of_three < 60
for part in order:
    print(f"{part:17} {means[part]:+.3f}")
print(f"three iterations lift what is above 1/{reach_of_three:.0f}")

# %% [markdown]
# With three seeds the exact polar factor differs from the polynomial's rough one by less than 0.005: exact equality of the singular values is not what counts. With three iterations most small ones stay small, and the whole step is shorter; together that costs more than a tenth of a nat. Without Nesterov's form 0.06 is lost, and 0.05 without the shape factor, that is with half the rate for the MLP's first matrix. Without momentum a quarter of a nat is lost, at rates tuned with it. That fits the guess that much of what is small in a single gradient is noise, which a mean takes away. And the exact polar factor, which also lifts the last directions that the polynomial leaves low, gains nothing by it. (No arm was tuned anew. These are costs at Muon's best rates, and not the worth of its parts.)
#
# ## What it buys
#
# The public ladder has the same comparison at full size. Record 2 read 9,536 steps of 524,288 tokens with a tuned AdamW; record 4 reached the target in 6,200 with Muon and a schedule of its own. A race of optimizers at record 7, each at the best of about twenty settings, without weight decay and on a trapezoid ([chapter 14](14_schedule.py)), one run each, ended with Muon at 3.2760 and 142 ms a step, SOAP at 3.2752 and 301 ms, Adam at 3.3406 and 139 ms {cite}`moddednanogpt`. There a step of SOAP is worth a step of Muon, as it nearly is here after 2,000, and the clock decides.
#
# The same repository also holds a contest of optimizers alone, on one fixed model and counted in steps. There Adam needed 5,625, which the table calls most likely undertuned, a constrained form of it, AdamH, 4,875, spectral descent without momentum 8,225, and a tuned Muon 3,250; the best by August 2026, with 2,690, lets SOAP rotate and scale the gradient *before* it is orthogonalised {cite}`moddednanogpt`.

# %%
steps = {n: int(ladder[n]["steps"]) for n in ("2", "4")}
assert steps == {"2": 9536, "4": 6200} and f"{6200 * 524_288 / 1e9:.2f}" == "3.25"
assert ladder["2"]["tokens_per_step_start"] == ladder["4"]["tokens_per_step_start"] == "524288"
saved = float(ladder["2"]["record_time_s"]) - float(ladder["4"]["record_time_s"])
runs_of = [load_result("newton_schulz", name)["data"] for name in NAMES if name != "pace"]
assert sum(len(runs) for data in runs_of for runs in data["arms"].values()) == 189
print(
    f"{1 - steps['4'] / steps['2']:.0%} fewer steps; {saved:.0f} s, of which records 3 and 4 share the credit"
)

# %% [markdown]
# ## When it fails
#
# Orthogonalising is right for what *multiplies* a stream whose directions all matter. An embedding is looked up, not multiplied: its inputs are single tokens, never mixtures. The spectral norm bounds the step for mixtures that do not occur, and it does not treat tokens alike: the lengths of the rows of $UV^\top$ depend on which other tokens were in the batch. For lookups the norm should be the length of the longest row, as in exercise 2. The head does multiply; that it, too, is left to Adam is the contest's practice and not a consequence of this argument. So Muon is used for the blocks' matrices only; everything else is trained by AdamW.
#
# Muon needs whole matrices, and so does SOAP. Adam and its kin work entry by entry and can be cut anywhere. A matrix has to be in one place to be multiplied by itself. That is why the optimizer of [chapter 20](20_many_gpus.py) combines two things for each parameter: a rule, such as Muon or Adam, and a way of sharing the parameter among the GPUs, which never cuts a matrix of Muon's in two.
#
# Muon's step does not depend on the gradient's size. Where a matrix has nothing left to learn and its gradient is noise, Adam's step shrinks to about a quarter, because the mean of noise is that much smaller than its root mean square. Muon goes on moving by a full step in every direction. Only the schedule makes its steps smaller ([chapter 14](14_schedule.py)).

# %%
seen = torch.zeros(50, 16, dtype=torch.float64)
seen[:40] = torch.randn(40, 16, dtype=torch.float64, generator=generator)  # 40 of 50 tokens
fewer = seen.clone()
fewer[20:40] = 0.0  # half of them: their neighbours' rows change
first, second = polar_factor(seen), polar_factor(fewer)
assert first[40:].norm() < 1e-12 and second[20:].norm() < 1e-12, "zeros stay zeros"
assert not newton_schulz(seen)[40:].any()
assert ((second[:20].norm(dim=-1) / first[:20].norm(dim=-1)) > 1.1).all(), "by the company"
print(f"lengths of rows: {first[:40].norm(dim=-1).min():.2f} to {first.norm(dim=-1).max():.2f}")
beta1 = preset("cpu_gpt2").optim.adam.betas[0]
expected = math.sqrt((1 - beta1) / (1 + beta1))
mean, noisy = torch.zeros(64, 64), torch.zeros(1, 64, 64)
for _ in range(100):
    noise = torch.randn(64, 64, generator=generator)
    mean.lerp_(noise, 1 - beta1)
    update = muon_update(noise[None], noisy, ns_steps=0)
assert f"{expected:.2f}" == "0.23" and abs(mean.square().mean().sqrt() - expected) < 0.02
assert torch.allclose(torch.linalg.svdvals(update), torch.ones(64), atol=1e-4)
print(f"of noise alone Adam's step is {expected:.2f} times its full size, Muon's is full")

# %% [markdown]
# ## What did not work
#
# The contest tried the obvious neighbours. Distributed Shampoo ended at 3.2858 in the race above, between Adam and Muon. Sophia, Lion and schedule-free AdamW gained nothing over Adam, AdEMAMix a little. Later, blending Adam's update and Muon's on the same matrix did not help (\@ChrisJMcCormick lists it under record 61), nor did orthogonalising each head of queries, keys, values and outputs by itself (his trial at record 48; \@samacqua's record 80 found a grouping of queries and keys by pairs of heads that pays).
#
# ## Exercises
#
# 1. How many iterations does a polynomial need? Write `iterations_needed(coefficients, smallest, floor)`: the number of times that the quintic has to be applied until `smallest` is at least `floor`. Here `smallest` is a singular value after the division by the Frobenius norm, so at most 1. Compare Newton and Schulz's cubic with Keller Jordan's quintic.


# %% tags=["solution"]
def iterations_needed(
    coefficients: tuple[float, float, float], smallest: float, floor: float
) -> int:
    """Applications of the polynomial until a singular value of `smallest` has reached `floor`."""
    sigma, count = smallest, 0
    while sigma < floor:
        sigma, count = p(sigma, coefficients), count + 1
    return count


# %%
CUBIC = (1.5, -0.5, 0.0)
cases = [(CUBIC, 0.5, 0.5, 0), (CUBIC, 0.1, 0.99, 8), (QUINTIC, 1 / 600, 0.68, 5)]
cases += [(QUINTIC, 0.4, 1.08, 1)]  # the fifth power is what lifts it so far
for coefficients, smallest, floor, right in cases:
    got = iterations_needed(coefficients, smallest, floor)
    assert got == right, (
        f"from {smallest:.3g} to {floor} with {coefficients}: {right} iterations, not {got}"
    )
cubic = iterations_needed(CUBIC, 1 / 600, 0.68)
assert cubic > 5, (
    f"the cubic starts with a slope of 1.5 and needs more than the quintic's 5, not {cubic}"
)
print(f"to lift 1/600: quintic 5, cubic {cubic}")

# %% [markdown]
# 2. The three norms of this chapter are the beginning of a family. For an embedding the norm should be the length of the longest *row*: no token may move by more than 1. Write `steepest_by_rows(g)`, the step $\Delta$ of norm 1 which makes $\langle G, \Delta\rangle$ most negative (mind the sign; a row without a gradient stays at zero), and see that it treats a frequent and a rare token alike.


# %% tags=["solution"]
def steepest_by_rows(g: Tensor) -> Tensor:
    """The step that lowers ⟨g, step⟩ most when no row may be longer than 1; rows without a gradient stay."""
    length = g.norm(dim=-1, keepdim=True)
    return -torch.where(length > 0, g / length, 0.0)


# %%
rows_of = torch.tensor([[300.0, -400.0], [0.0, 0.0], [0.003, 0.004]])
step, right = steepest_by_rows(rows_of), torch.tensor([[-0.6, 0.8], [0.0, 0.0], [-0.6, -0.8]])
assert torch.allclose(step, right), (
    f"the gradient {rows_of.tolist()} asks for {right.tolist()}, not for {step.tolist()}"
)
rivals = torch.nn.functional.normalize(torch.randn(1000, 3, 2, generator=generator), dim=-1)
best, ours = (rivals * rows_of).sum((-2, -1)).min(), (step * rows_of).sum()
assert best >= ours - 1e-3, (
    f"a random step of length 1 lowers the product to {best}, yours to {ours}"
)

# %% tags=["remove-cell"]
import shutil

shutil.rmtree(scratch)

# %% [markdown]
# ## Since then
#
# Record 38 (\@varunneal) replaced the quintic by five different ones, each the best for what the last has left over (Polar Express). Record 41 (\@li_zichong) normalises the result row by row or column by column (NorMuon). Record 43 (\@varunneal) lets weights decay only where the step makes them smaller anyway (cautious weight decay), and record 57 (\@classiclarryd, \@YouJiacheng, \@ChrisJMcCormick) keeps them in bf16, with the rest of their mantissa in the optimizer. These four are in [chapter 13](13_muon.py). Record 6 shares the matrices among the GPUs, record 15 (\@leloykun, \@YouJiacheng) overlaps the gathering with other work, and record 24 (\@vagrawal) scatters gradients and gathers weights. Up to record 92 no record has replaced the idea.
