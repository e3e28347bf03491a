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
# Any machine: under a minute on two CPU cores, no GPU. The comparison of optimizers in the last figures is 189 short trainings on a CPU, and is committed.
# Records 3 and 4: Keller Jordan, Jeremy Bernstein, Vlado Boža. Muon itself {cite}`jordan2024`: also You Jiacheng, Franz Cesista, Laker Newhouse.
# ```
#
# ## The problem
#
# AdamW sees a matrix as a bag of numbers. Each is divided by the size that it usually has, and no number knows its neighbours. But a matrix acts as a whole, and its gradient has a shape that the bag does not show. Here is a small GPT after sixty steps. (It keeps its matrices in *banks*: a bank stacks the same matrix of all layers into one parameter, [chapter 21](21_model.py).) The running mean of the gradient of one matrix, which is what an optimizer follows, has 128 directions. How many of them does it use? And how many does AdamW's step, which divides that mean entry by entry?

# %%
import tempfile
from pathlib import Path

import torch

from speedrun.config import preset, vary
from speedrun.train import train

scratch = Path(tempfile.mkdtemp())
BRIEF = {"steps": 60, "optim.warmup_steps": 10, "val_every": 60, "val_tokens": 32_768}
model_run = train(vary(preset("cpu"), BRIEF), scratch / "look", echo=None)
(adamw,) = model_run.optimizers
bank = model_run.model.attention_qkv  # (2, 384, 128): in each layer Q, K and V
followed = adamw.state[bank]["exp_avg"].view(6, 128, 128)[1].double()
divisor = adamw.state[bank]["exp_avg_sq"].view(6, 128, 128)[1].double().sqrt() + 1e-8
adams_step = followed / divisor


def directions(matrix: torch.Tensor) -> int:
    """In how many directions 90% of a matrix's squared length lies."""
    energy = torch.linalg.svdvals(matrix).square()
    return int((energy.cumsum(0) < 0.9 * energy.sum()).sum()) + 1


sigma = torch.linalg.svdvals(followed)
assert directions(followed) < 16 and directions(adams_step) < 40 and sigma[0] > 30 * sigma[64]
print(f"90% of the mean's squared length lies in {directions(followed)} of 128 directions")
print(f"of AdamW's step, in {directions(adams_step)}")
print(f"the largest singular value is {sigma[0] / sigma[64]:.0f} times the median one")

# %% [markdown]
# Either way a step moves the weights in a few directions and leaves most of the others nearly where they are. Are those noise? Or are they what is rare, and therefore slow to learn? Training will tell.
#
# ```{admonition} Prediction
# Muon replaces that mean by the matrix which has the same directions, *all of them equally long*. It does so with five iterations of three matrix products each, in every matrix, at every step. Record 4 trains matrices of width 768 on 524,288 tokens a step; the laptop's run, width 128 on 1,024. **By which share does a step get dearer, in FLOPs, for each of the two?** (Forward and backward a matrix costs
# 6 FLOPs a weight and token.)
# ```
#
# ## The idea
#
# Let $G$ be the gradient of a matrix of weights $W$. A step $\Delta$ changes the loss by about $\langle G, \Delta\rangle = \sum_{ij} G_{ij}\Delta_{ij}$. The best step is the one that makes this most negative *without being too long*, and everything depends on what “long” means. Three rulers, three optimizers {cite}`bernstein2024`:
#
# | a step is as long as | the best step of length 1 | known as |
# | --- | --- | --- |
# | the root of its summed squares | $-G / \lVert G\rVert_F$ | gradient descent |
# | its largest entry | $-\operatorname{sign}(G)$ | Adam, without its memory |
# | its largest singular value | $-UV^\top$, where $G = U\Sigma V^\top$ | Muon, without its momentum |
#
# The last line takes one more. Write $\langle G,\Delta\rangle = \sum_i \sigma_i\, u_i^\top \Delta v_i$. If no singular value of $\Delta$ exceeds 1, then each $u_i^\top\Delta v_i$ is at least $-1$, so the sum is at least $-\sum_i\sigma_i$; and $\Delta = -UV^\top$ gets exactly that, with every term at its bound.
#
# Why this ruler? Because of what a matrix is for. It multiplies: $\lVert \Delta x\rVert \le \sigma_{\max}(\Delta)\,\lVert x\rVert$. A step of spectral length $\eta$ changes the output of the layer, for no input whatsoever, by more than $\eta$ times the input's length. That is the promise one wants from a learning rate. Under that promise, $UV^\top$ goes as far as it may in *every* direction at once.
#
# ## The code
#
# ### What we want: the orthogonal factor
#
# The singular value decomposition gives it directly.

# %%
#| default_exp optim.newton_schulz
#| export
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


# %%
#| export
def orthogonal_factor(g: Tensor) -> Tensor:
    """U Vᵀ of each matrix U S Vᵀ in g, (…, rows, cols), without the directions in which it is zero."""
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    kept = s > s[..., :1] * torch.finfo(g.dtype).eps * max(g.shape[-2:])
    return (u * kept[..., None, :]) @ vt


# %%
g = followed
u = orthogonal_factor(g)
assert torch.allclose(u @ u.mT, torch.eye(128, dtype=torch.float64), atol=1e-10)
nuclear = torch.linalg.matrix_norm(g, ord="nuc")
assert torch.allclose((g * u).sum(), nuclear)
generator = torch.Generator().manual_seed(0)
shaken = u + 0.01 * torch.randn(128, 128, dtype=torch.float64, generator=generator)
rivals = {"gradient": g, "its sign": g.sign(), "AdamW's": adams_step, "UVᵀ, shaken": shaken}
for name, rival in rivals.items():
    gain = (g * rival).sum() / torch.linalg.matrix_norm(rival, ord=2)  # at spectral length 1
    assert gain < nuclear
    print(f"{name:11} gains {gain / nuclear:.0%} of what UVᵀ gains")
signs = torch.optim.Adam([p := torch.zeros(3, requires_grad=True)], lr=1.0)
p.grad = torch.tensor([0.001, -5.0, 70.0])
signs.step()
assert torch.allclose(p, torch.tensor([-1.0, 1.0, -1.0]), atol=1e-4), (
    "Adam's first step is the sign"
)

# %% [markdown]
# That is the update, and nobody computes it so. The decomposition is iterative, sequential and unbatched where a GPU is parallel.
#
# ### Polynomials do not care for bases
#
# A product such as $XX^\top X$ has the singular vectors of $X$ and the cubes of its singular values, since the inner $U^\top U$ and $V^\top V$ vanish. So any odd polynomial can be applied to all singular values at once without knowing one of them:
#
# $$
# X \mapsto aX + b\,(XX^\top)X + c\,(XX^\top)^2X \qquad\text{does}\qquad \sigma_i \mapsto p(\sigma_i) = a\sigma_i + b\sigma_i^3 + c\sigma_i^5 .
# $$
#
# Find a $p$ that, applied again and again, drives everything in $(0, 1]$ to 1, divide $G$ by its length so that nothing exceeds 1, and iterate. The classic choice is Newton–Schulz, $p(\sigma) = \tfrac32\sigma - \tfrac12\sigma^3$ {cite}`bjorck1971`. It ends at 1 exactly, and takes its time: a small value grows by a factor of 1.5 an iteration, and small values are the point. Keller Jordan's quintic grows them by 3.44:

# %%
#| export
QUINTIC = (3.4445, -4.7750, 2.0315)


def through(x: Tensor, polynomials: Sequence[tuple[float, float, float]]) -> Tensor:
    """x, (…, rows, cols), after its singular values went through odd quintics (a, b, c), one after the other."""
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
    """Nearly the orthogonal factor of each matrix in g, (…, rows, cols) → the same, in `dtype`.

    Singular vectors stay; singular values, divided by the matrix's length, go through the polynomial
    `iterations` times. Zeros stay zeros. Coefficients: Keller Jordan's of record 4.
    """
    x = g.to(dtype)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    return through(x, [coefficients] * iterations)


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


wide = torch.randn(3, 64, 128, dtype=torch.float64, generator=generator)
exact = torch.linalg.svdvals(wide / torch.linalg.matrix_norm(wide, keepdim=True))
got = torch.linalg.svdvals(newton_schulz(wide, dtype=torch.float64))
assert torch.allclose(got, iterated(exact, 5).sort(-1, descending=True).values, atol=1e-6)
print("the singular values went through the polynomial, five times, and nobody looked at them")

# %% [markdown]
# The tall and the wide form are one another's transpose, and the code turns a tall matrix so that the squares which it multiplies are the small ones. A bank of matrices goes through in one call. The result does not depend on the scale of what it is given, so loss scaling is superfluous. (Clipping is not, as we shall see.)

# %%
assert torch.allclose(
    newton_schulz(wide.mT, dtype=torch.float64), newton_schulz(wide, dtype=torch.float64).mT
)
one_by_one = torch.stack([newton_schulz(matrix, dtype=torch.float64) for matrix in wide])
assert torch.allclose(newton_schulz(wide, dtype=torch.float64), one_by_one)
flat = newton_schulz(wide)
assert torch.equal(flat, newton_schulz(1024 * wide)), "a power of two: the same bits"
assert (flat - newton_schulz(1000 * wide)).norm() < 0.05 * flat.norm(), "else bf16's rounding"
assert not newton_schulz(torch.zeros(4, 8)).any(), "no gradient, no step"

# %% [markdown]
# ### Not quite orthogonal, on purpose
#
# Steepness at zero and settling at one are traded against each other. A quintic of slope 2.9 with $p(1) = 1$ and $p'(1) = 0$ settles, and is too slow for what is small. Keller Jordan's does not settle at all: above about 0.7 it swings. How far, and from where on, can be read from the map itself.

# %%
grid_of_sigma = torch.logspace(-5, 0, 200_001, dtype=torch.float64)
after = iterated(grid_of_sigma, 5)
floor = after[grid_of_sigma > 0.1].min().item()
lifted = grid_of_sigma[after < floor - 1e-6].max().item()  # the last input that ends up lower
top = max(iterated(grid_of_sigma, times).max().item() for times in (5, 6, 7, 8, 9, 10))
assert 0.67 < floor < 0.69 and 1.19 < top < 1.21 and 1 / 700 < lifted < 1 / 600
print(f"inputs above 1/{1 / lifted:.0f} end between {floor:.2f} and {top:.2f}")
settling = iterated(grid_of_sigma, 5, (2.9, -3.3, 1.4))
settled = grid_of_sigma[settling < 0.999].max().item()
assert 1 / 170 < settled < 1 / 150 and settling.max() < 1.15
print(f"the one that settles brings only what is above 1/{1 / settled:.0f} to 1")

# %% [markdown]
# PyTorch's documentation of its own Muon says that the singular values of the result are spread uniformly over 0.5 to 1.5. They are not: but for rounding, no input at all ends above 1.21. Does it matter that they are not all 1? It is asked below, by training with the exact factor.
#
# What about bf16, with its eight bits? The distance from $UV^\top$ that the polynomial leaves is larger than what rounding adds:

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

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: the quintic map applied one to five times, on a logarithmic axis of input singular values. Right: the singular values of a real momentum matrix after each iteration"}}
import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style

figure_style()
fig, (upper, lower) = plt.subplots(2, 1, figsize=(5.6, 6.4), layout="constrained")
shades = plt.get_cmap("viridis")
start = sigma / sigma.norm()
for times in (0, 1, 3, 5):
    shade = shades(0.9 - 0.16 * times)
    upper.semilogx(
        grid_of_sigma[::50], iterated(grid_of_sigma, times)[::50], color=shade, label=times
    )
    lower.semilogy(range(1, 129), iterated(start, times).sort(descending=True).values, color=shade)
upper.axhspan(floor, top, color="0.93", zorder=0)
upper.axvline(lifted, color="0.5", ls=":")
upper.set_xlabel("singular value, as a share of the matrix's length")
upper.legend(title="iterations", loc="upper left")
lower.axhspan(floor, top, color="0.93", zorder=0)
lower.set_xlabel("singular values of a real mean, sorted each time")
lower.set_ylim(1e-4, 2)
for axis in (upper, lower):
    axis.set_ylabel("singular value after")
reached = (iterated(start, 5) > floor - 1e-6).sum().item()
upper.set_title(f"five iterations lift all above 1/{1 / lifted:.0f} to {floor:.2f} or more")
lower.set_title(f"{reached} of 128 directions of a real mean get there")
plt.show()

# %% [markdown]
# ### Muon
#
# Momentum first, then orthogonalise: the mean of gradients is what is followed, and a mean of orthogonal matrices would not be one. Nesterov's variant mixes the newest gradient in once more. And a matrix with more rows than columns gets a factor: an orthogonal step on `rows × cols` adds a vector of the input's length that is spread over more entries, so each of them is $\sqrt{\text{cols}/\text{rows}}$ times as large; the factor gives that back. (`skip` is the trainer's flag for a gradient that is not finite, [chapter 23](23_training_loop.py).)


# %%
#| export
@dataclass(frozen=True)
class MatrixOptions:
    """How the blocks' matrices are updated. All other parameters are AdamW's, and so are these under `adamw`."""

    rule: Literal["adamw", "muon", "soap"] = "adamw"
    """muon: orthogonalised momentum. soap: Adam in the eigenbases of the gradient's covariances."""
    lr: float = 0.0
    """Peak rate of the matrices, on the schedule of all parameters; 0: optim.lr, like all."""
    momentum: float = 0.95
    """muon: the share of its momentum that a step keeps."""
    nesterov: bool = True
    """muon: mix the newest gradient in once more."""
    iterations: int = 5
    """muon: Newton–Schulz iterations; 0: the exact factor, from a singular value decomposition."""
    shape_factor: bool = True
    """muon: the rate of a matrix of more rows than columns is larger by sqrt(rows / cols)."""


# %%
#| export
def fold(g: Tensor, momentum: Tensor, kept: float, nesterov: bool, skip: Tensor | None) -> Tensor:
    """Fold g into momentum, in place. Returns what a step follows: the momentum, or with `nesterov` g mixed into it again.

    kept: the share of itself that the momentum keeps. skip: where this is not zero it stays as it is, and nobody waits to find out.
    """
    if skip is not None:
        g = torch.where(skip > 0, momentum, g)  # momentum folded into itself is what it was
    momentum.lerp_(g, 1 - kept)
    return g.lerp(momentum, kept) if nesterov else momentum


def muon_update(g: Tensor, state: dict, skip: Tensor | None, options: MatrixOptions) -> Tensor:
    """The update at rate 1 of matrices with gradient g, (matrices, rows, cols); folds g into state["momentum"]."""
    momentum = state.setdefault("momentum", torch.zeros_like(g))
    ahead = fold(g, momentum, options.momentum, options.nesterov, skip)
    if options.iterations:
        update = newton_schulz(ahead, options.iterations)
    else:
        update = orthogonal_factor(ahead)
    rows, cols = g.shape[-2:]
    return update * math.sqrt(max(1.0, rows / cols)) if options.shape_factor else update


# %%
options, state = MatrixOptions(rule="muon"), {}
gradient = torch.randn(2, 128, 64, generator=generator)
first = muon_update(gradient, state, None, options)
values = torch.linalg.svdvals(first.double()) / math.sqrt(2)
assert floor - 0.02 < values.min() and values.max() < 1.22, (
    "semi-orthogonal, to the map's tolerance"
)
kept = state["momentum"].clone()
muon_update(gradient * math.nan, state, torch.ones(()), options)
assert torch.equal(state["momentum"], kept), "a broken gradient leaves no trace"

spiked, summed, exact = {}, torch.zeros(1, 64, 64), MatrixOptions(rule="muon", iterations=0)
for step in range(30):
    gradient = torch.randn(1, 64, 64, generator=generator)
    if step == 9:
        gradient = spike = 100 * gradient
    update = muon_update(gradient, spiked, None, exact)
    summed = 0.95 * summed + gradient
    same = orthogonal_factor(gradient + 0.95 * summed)
    assert torch.allclose(update, same, atol=1e-3), "momentum as a sum leads the same way"
owned = (update * orthogonal_factor(spike)).sum() / update.norm() ** 2
assert owned > 0.9
print(
    f"twenty steps after a gradient of 100 times the size the update is {owned:.0%} that gradient's"
)

# %% [markdown]
# That is the case for clipping: the momentum is averaged *before* the scale is removed. The cell shows a second thing on the way. Records 3 to 14 kept the momentum as a plain sum, $B \leftarrow \mu B + G$; since record 15 it is a mean, $B \leftarrow \mu B + (1-\mu)G$. At a constant $\mu$ the two differ by a factor, and the orthogonal factor has no scale. What remains is the code that puts banks through a rule: each slice of the queries', keys' and values' bank is three matrices, and has to be cut into them.


# %%
#| export
def cut(bank: Tensor, matrices: int) -> Tensor:
    """A bank (slices, matrices · rows, cols) as its matrices (slices · matrices, rows, cols): a view."""
    slices, rows, cols = bank.shape
    return bank.view(slices * matrices, rows // matrices, cols)


class MatrixOptimizer(torch.optim.Optimizer):
    """Banks of matrices under one rule: p ← (1 − lr · weight_decay) p − lr · rule(gradients, state, found_inf).

    banks: bank and the number of matrices in each of its slices. Like torch's fused optimizers it
    changes nothing in a step whose `found_inf` is not zero.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        banks: list[tuple[Tensor, int]],
        rule: Callable[[Tensor, dict, Tensor | None], Tensor] | None,
        lr: float,
        weight_decay: float,
    ):
        self.rule = rule
        groups = [{"params": [bank], "matrices": matrices} for bank, matrices in banks]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            (bank,) = group["params"]
            g = cut(bank.grad, group["matrices"])
            update = self.direction(g, group).view(bank.shape)
            rate = group["lr"] if self.found_inf is None else group["lr"] * (1 - self.found_inf)
            self.move(bank, update, rate, group)

    def direction(self, g: Tensor, group: dict) -> Tensor:
        """The update at rate 1 of a group's matrices."""
        assert self.rule is not None  # else a subclass has a direction of its own
        return self.rule(g, self.state[group["params"][0]], self.found_inf)

    def move(self, bank: Tensor, update: Tensor, rate: float | Tensor, group: dict) -> None:
        """Take the step."""
        bank.mul_(1 - rate * group["weight_decay"]).sub_(rate * update)


# %%
from functools import partial

bank = torch.arange(24.0).view(2, 6, 2)
assert torch.equal(cut(bank, 3), torch.stack([*bank[0].split(2), *bank[1].split(2)]))

rows, cols = 96, 64
start_weight = torch.randn(rows, cols, generator=generator)
theirs, ours = (torch.nn.Parameter(start_weight.clone()) for _ in range(2))
reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95)
bank = torch.nn.Parameter(ours.detach()[None].clone())
rule = partial(muon_update, options=options)
optimizer = MatrixOptimizer([(bank, 1)], rule, lr=0.02, weight_decay=0.1)
for _ in range(10):
    theirs.grad = torch.randn(rows, cols, generator=generator)
    bank.grad = theirs.grad[None].clone()
    reference.step()
    optimizer.step()
moved = (theirs - start_weight).norm()
apart = ((theirs - bank[0]).norm() / moved).item()
assert apart < 0.02
print(
    f"ten steps of torch.optim.Muon and of ours: apart by {apart:.1%} of the way, bf16's rounding"
)

# %% [markdown]
# ### SOAP, from the other side
#
# There is an older road to the same place. Shampoo {cite}`gupta2018` multiplies the gradient by inverse roots of its two covariances, $GG^\top$ and $G^\top G$, summed over time. SOAP's authors {cite}`vyas2025` noticed that a variant of this is Adafactor, Adam's thriftier cousin, in the eigenbases of the two covariances, and put Adam itself there: turn the gradient into the eigenbases, let Adam divide, and turn the result back.

# %%
#| default_exp optim.soap
#| export
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SoapOptions:
    """SOAP's constants, its authors' defaults."""

    betas: tuple[float, float] = (0.95, 0.95)
    """Decay of the running mean, and of the squares and covariances."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    every: int = 10
    """Steps between two looks at the eigenbases."""


def adam_in(basis: tuple[Tensor, Tensor], g: Tensor, state: dict, options: SoapOptions) -> Tensor:
    """One step of Adam on matrices (n, rows, cols), taken in another pair of bases and turned back."""
    (left, right), (beta1, beta2) = basis, options.betas
    turned = left.mT @ g @ right
    state["exp_avg"].lerp_(turned, 1 - beta1)
    state["exp_avg_sq"].lerp_(turned.square(), 1 - beta2)
    state["step"] += 1
    done = state["step"].item()
    mean = state["exp_avg"] / (1 - beta1**done)
    root = (state["exp_avg_sq"] / (1 - beta2**done)).sqrt()
    return left @ (mean / (root + options.eps)) @ right.mT


# %%
#| export
def eigenbasis(covariance: Tensor) -> Tensor:
    """Eigenvectors of symmetric matrices (n, d, d) as columns, the largest eigenvalue first."""
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
def soap_update(
    g: Tensor, state: dict, skip: Tensor | None, options: SoapOptions = SoapOptions()
) -> Tensor:
    """The update at rate 1 of matrices with gradient g, (matrices, rows, cols). The first step only looks."""
    if skip is not None and skip.item():
        return torch.zeros_like(g)
    pairs, beta2 = {"left": g @ g.mT, "right": g.mT @ g}, options.betas[1]
    if not state:
        state |= {side: (1 - beta2) * pair for side, pair in pairs.items()}
        state |= {f"{side}_basis": eigenbasis(pair) for side, pair in pairs.items()}
        state |= {"exp_avg": torch.zeros_like(g), "exp_avg_sq": torch.zeros_like(g)}
        state["step"] = torch.zeros(())
        return torch.zeros_like(g)
    update = adam_in((state["left_basis"], state["right_basis"]), g, state, options)
    for side, pair in pairs.items():
        state[side].lerp_(pair, 1 - beta2)
    if state["step"].item() % options.every == 0:
        turn(state)
    return update


# %% [markdown]
# How do the three relate? Ask each for one step without any memory. Adam's is the sign of every entry. SOAP's eigenbases of $GG^\top$ and $G^\top G$ are $U$ and $V$; there the gradient is $\Sigma$, a diagonal; Adam makes it the identity; turned back it is $UV^\top$. *SOAP without memory is Muon without momentum.* The two differ in what they average over time, and in the bill.

# %%
g = wide[:, :, :64].contiguous()  # square, of full rank
bases = (eigenbasis(g @ g.mT), eigenbasis(g.mT @ g))
fresh = {"exp_avg": torch.zeros_like(g), "exp_avg_sq": torch.zeros_like(g), "step": torch.zeros(())}
one_step = adam_in(bases, g, fresh, SoapOptions())
assert torch.allclose(one_step, orthogonal_factor(g), atol=1e-3)
q, r = (
    torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=generator))[0] for _ in "qr"
)
assert torch.allclose(orthogonal_factor(q @ g @ r), q @ orthogonal_factor(g) @ r, atol=1e-8)
assert not torch.allclose((q @ g @ r).sign(), q @ g.sign() @ r, atol=0.1)
print("turn the gradient and Muon's step turns along; Adam's does not: it depends on the basis")

# %% [markdown]
# ## The measurement
#
# A comparison of optimizers is a comparison of tunings. So each rule is given the same grid: ten rates for the matrices, four for everything else (embeddings, gains and biases, which AdamW trains in every case), the same warm-up, decay and clipping. Each point trains the laptop's model for 600 steps. Then the three winners run with nine seeds, and once more for 2,000 steps with three, because a short run may mislead, as [chapter 22](22_config.py) will show. The rates are
# those of 600 steps in all cases; betas and weight decay are the defaults. Muon's parts are taken away one at a time, at its best rates.

# %% tags=["hide-input"]
#| default_exp measure.newton_schulz
#| export
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from speedrun.config import Config, preset, vary
from speedrun.lab.results import load_result, stamp
from speedrun.measure.runs import (
    bench,
    corpus_of,
    step_times,
    train_arms,
    train_many,
    train_on_gpus,
)

NAMES = ("grid", "low", "winners", "pace", "clock", "parts", "long")
RULES = ("adamw", "soap", "muon")
GRIDS = tuple(f"corpus_{rule}" for rule in RULES)
CORPUS = (*GRIDS, "corpus_winners", "corpus_pace", "corpus_clock")  # on GPUs, with a data folder
KEYS = ("matrix.rule", "matrix.lr", "optim.lr")
RATES = tuple(0.00025 * 2**n for n in range(10))
OTHERS = (0.002, 0.004, 0.008, 0.016)
SHORT: dict[str, Any] = {"steps": 600, "val_tokens": 131_072}
PARTS: dict[str, dict[str, Any]] = {
    "exact factor": {"matrix.iterations": 0},
    "three iterations": {"matrix.iterations": 3},
    "no Nesterov": {"matrix.nesterov": False},
    "no momentum": {"matrix.momentum": 0.0, "matrix.nesterov": False},
    "no shape factor": {"matrix.shape_factor": False},
}


def grid(base: Config, rates=RATES, others=OTHERS) -> dict[str, Config]:
    """A run under every rule at every rate of the matrices and every rate of the rest, by its three numbers."""
    points = [(rule, rate, other) for rule in RULES for rate in rates for other in others]
    return {f"{p[0]} {p[1]:g} {p[2]:g}": vary(base, dict(zip(KEYS, p))) for p in points}


def short() -> Config:
    """The laptop's run, made short."""
    return vary(preset("cpu"), SHORT)


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
    points = grid(bench(data), RATES[1:8], OTHERS[:3])
    if name in RULES:
        return {point: run for point, run in points.items() if run.matrix.rule == name}
    best = winners(losses_of_grid(GRIDS), points)
    return in_muons_time(best, "corpus_pace") if name == "clock" else best


def in_muons_time(best: dict[str, Config], pace: str) -> dict[str, Config]:
    """AdamW and SOAP for as many steps as fit into the time of Muon's run, by measured step times."""
    ms = load_result("newton_schulz", pace)["data"]["median"]
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
        return in_muons_time(best, "pace")
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
    many = train_on_gpus if place else train_many
    if place and kind == "winners":  # one control for both
        control = train_arms({"muon": arms.pop("muon")}, seeds, many)
        return {"arms": control | train_arms(arms, 3, many)}, facts
    return {"arms": train_arms(arms, seeds, many)}, facts


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
assert 0.65 < curves["adamw"][0.016] - curves["muon"][0.016] < 0.72
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
# One run a point, so this is a map and not a proof. Its lesson stands even so. The three valleys lie at different rates. At a rate of 0.0005 AdamW beats Muon; at 0.016 Muon leads by two thirds of a nat. Whoever compares at one rate measures where that rate lies in each valley. The proof is the winners, nine seeds each, all of them started from the same nine sets of weights. They run three ways: for 600 steps, for more steps, and for as many steps as fit into the time that 600 of Muon's take.


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
again = load_result("newton_schulz", "winners")["data"]["arms"]
assert all(again[rule][0]["val_loss"] == loss_at[lowest[rule]] for rule in RULES), "to the bit"
assert (
    1.3 < pace["soap"] / pace["muon"] < 1.4
    and min(loss_at[k] for k in loss_at if k[0] == "adamw") > 2.6
)
assert won["soap"].mean < won["muon"].mean < won["adamw"].mean, "by steps"
assert won["muon"].mean < clocked["soap"].mean < clocked["adamw"].mean, "by the clock"
assert max(p_difference(other["soap"], won["muon"]) for other in (won, clocked)) < 1e-6
lead = {n: found["adamw"].mean - found["muon"].mean for n, found in ((600, won), (2000, lasting))}
behind = {n: found["muon"].mean - found["soap"].mean for n, found in ((600, won), (2000, lasting))}
assert 0.7 < lead[2000] / lead[600] < 0.8 and 0 < behind[2000] < 0.25 * behind[600]
print(measured_on(load_result("newton_schulz", "winners")))

# %% [markdown]
# So there are two answers. *By steps* SOAP is the best of the three and Muon a tenth of a nat behind, far beyond any doubt at $n = 9$. *By the clock* Muon wins, just as clearly, since SOAP takes a third longer for a step. AdamW loses both ways, even with the hundred more steps that its cheapness pays for.
#
# Half a nat is a great deal, and one should ask how much of it lasts. After 600 steps AdamW is above 2.6 at each of its forty points. In runs of 2,000 steps it gets to 2.01: it is late rather than stuck. There Muon's lead over it has shrunk by a quarter, and SOAP's lead over Muon has nearly vanished, while a step of SOAP stays as dear as it was. A gap in nats has a length of training attached to it.

# %% [markdown]
# ### The bill
#
# Now the prediction. An iteration multiplies an $m \times n$ matrix, $m \le n$, three times: $X X^\top$ and the last product cost $2m^2n$ FLOPs each, the square of the small matrix $2m^3$. Forward and backward through the same matrix, with $B$ tokens in a step, cost $6mnB$. For a square matrix and five iterations the ratio is $30m^3/6m^2B = 5m/B$: it does not depend on anything but the width and the batch.

# %%
from torch.utils.flop_counter import FlopCounterMode

from speedrun.model.gpt import GPTOptions, model_flops_per_token, parameter_table


def newton_schulz_flops(rows: int, cols: int, iterations: int = 5) -> int:
    """FLOPs of the iterations for one matrix."""
    m, n = sorted((rows, cols))
    return iterations * (4 * m * m * n + 2 * m**3)


def dearer(shape: GPTOptions, vocab_size: int, seq_len: int, step_tokens: int) -> float:
    """FLOPs of orthogonalising all matrices of the blocks, as a share of a training step's."""
    total = 0
    for row in parameter_table(shape, vocab_size):
        if row.matrices:
            slices, rows, cols = row.shape
            total += slices * row.matrices * newton_schulz_flops(rows // row.matrices, cols)
    return total / (step_tokens * model_flops_per_token(shape, vocab_size, seq_len))


with FlopCounterMode(display=False) as counter:
    newton_schulz(torch.randn(96, 64))
assert counter.get_total_flops() == newton_schulz_flops(96, 64)
laptop = preset("cpu")
shares = {
    "record 4": dearer(GPTOptions(), 50_257, 1024, 524_288),
    "the laptop": dearer(laptop.model, 288, laptop.data.seq_len, laptop.data.step_tokens),
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

# %% [markdown]
# Under half a per cent for the record, nearly half of a step for the laptop. (The one-line answer, $5m/B$, gives 0.7% and 62%. It is for a model of square matrices; wide ones are cheaper, and attention and the head are paid for and not orthogonalised.) Muon is nearly free *where the batch is large*, and the contest's is. On the laptop's clock the price is smaller than in FLOPs, for one because much of a small model's step is not multiplying at all. SOAP pays with products by square matrices of both sizes, the larger included, and with a QR decomposition at every tenth step.
#
# ### Which part does it?

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
axis.set_xlabel("change of the loss, same seed (nats a token); grey: ±2 sd")
axis.set_title(f"without {order[-1].removeprefix('no ')}: {means[order[-1]]:+.2f} nats")
plt.show()

# %%
assert max(map(abs, change["exact factor"])) < 2 * spread, "the map's swings do no harm"
assert means["no momentum"] > 0.2 > means["three iterations"] > 0.1
assert 0.03 < means["no shape factor"] < 0.08 and 0.03 < means["no Nesterov"] < 0.08
above = iterated(grid_of_sigma, 3)
reach_of_three = 1 / grid_of_sigma[above < floor - 1e-6].max().item()
assert 50 < reach_of_three < 60
for part in order:
    print(f"{part:17} {means[part]:+.3f}")
print(f"three iterations lift what is above 1/{reach_of_three:.0f}")

# %% [markdown]
# The exact factor is no better than the polynomial's rough one: that the singular values are *of one order* is what counts, and exact equality is not. With three iterations most small ones stay small, and the whole step is shorter; together that costs more than a tenth of a nat. Without momentum a quarter of a nat is lost. So the small directions of a *mean* are worth lifting, and those of a single gradient much less: there most of what is small is noise after all. (No arm was tuned anew. These are costs at Muon's best rates, and not the worth of its parts.)
#
# ## What it buys
#
# The public ladder has the same comparison at full size. Record 2 read 9,536 steps of 524,288 tokens with a tuned AdamW; record 4 reached the target in 6,200 with Muon and a schedule of its own. A race of optimizers at record 7, one run each, ended with Muon at 3.2760 and 142 ms a step, SOAP at 3.2752 and 301 ms, AdamW at 3.3406 and 139 ms {cite}`moddednanogpt`. There a step of SOAP is worth a step of Muon, as it nearly is here after 2,000, and the clock decides.

# %%
from speedrun.lab.results import public_table

ladder = {row["record"]: row for row in public_table("records")}
steps = {n: int(ladder[n]["steps"]) for n in ("2", "4")}
assert steps == {"2": 9536, "4": 6200}
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
# Orthogonalising is right for what *multiplies* a stream whose directions all matter. An embedding is looked up, not multiplied: most rows of its gradient are zero, and lifting all singular values to one would move every row, seen or not. Gains and biases have no singular values worth the name. So Muon is always half of an optimizer, and the other half is AdamW.
#
# It needs whole matrices. AdamW can be cut anywhere: a GPU that holds a thousandth of the weights can update that thousandth. A matrix has to be in one place to be multiplied by itself, which is why sharing the work among eight GPUs takes a chapter.
#
# And it is deaf to the gradient's size. Where a matrix has nothing left to learn and its gradient is noise, Adam's step shrinks, because the mean of noise is small beside its root mean square. Muon goes on moving by a full step in every direction. Only the schedule brings it to rest. That is the other reason why a rate has to end at zero.
#
# ## What did not work
#
# The contest tried the obvious neighbours. Distributed Shampoo ended at 3.2858 in the race above, between AdamW and SOAP. Sophia, Lion and schedule-free AdamW gained nothing over AdamW. Later, blending Adam's update and Muon's on the same matrix was worse than either, and so was orthogonalising each head of queries, keys, values and outputs by itself (record 48's trials; record 80 found a grouping of queries and keys by pairs of heads that pays).
#
# ## Exercises
#
# 1. How many iterations does a polynomial need? Write `iterations_needed(coefficients, smallest, floor)`: the number of times that the quintic has to be applied until `smallest` is at least `floor`. Compare Newton and Schulz's cubic with Keller Jordan's quintic.


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
assert iterations_needed(CUBIC, 0.5, 0.5) == 0
assert iterations_needed(QUINTIC, 1 / 600, 0.68) == 5 < iterations_needed(CUBIC, 1 / 600, 0.68)
print(f"to lift 1/600: quintic 5, cubic {iterations_needed(CUBIC, 1 / 600, 0.68)}")

# %% [markdown]
# 2. The three rulers of this chapter are the beginning of a family. For an embedding, “long” should mean the largest *row*: no token may move by more than 1. Write `steepest_by_rows(g)`, the best step of length 1 by that ruler, and see that it treats a frequent and a rare token alike.


# %% tags=["solution"]
def steepest_by_rows(g: Tensor) -> Tensor:
    """The step that lowers ⟨g, step⟩ most when no row may be longer than 1; rows without a gradient stay."""
    length = g.norm(dim=-1, keepdim=True)
    return -torch.where(length > 0, g / length, 0.0)


# %%
rows_of = torch.tensor([[300.0, -400.0], [0.0, 0.0], [0.003, 0.004]])
step = steepest_by_rows(rows_of)
assert torch.allclose(step, torch.tensor([[-0.6, 0.8], [0.0, 0.0], [-0.6, -0.8]]))
rivals = torch.nn.functional.normalize(torch.randn(1000, 3, 2, generator=generator), dim=-1)
assert (rivals * rows_of).sum((-2, -1)).min() >= (step * rows_of).sum() - 1e-3

# %%
import shutil

shutil.rmtree(scratch)

# %% [markdown]
# ## Since then
#
# Record 38 replaced the quintic by five different ones, each the best for what the last has left over (Polar Express). Record 41 rescales the result row by row (NorMuon), record 43 lets weights decay only where the step agrees. Record 24 shares the work by scattering gradients and gathering weights, record 57 keeps the weights in bf16 with their lost bits beside them. The idea has not been replaced.
