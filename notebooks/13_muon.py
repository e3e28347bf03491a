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
# # Muon since record 4: Polar Express, NorMuon, cautious weight decay
#
# ```{admonition} Cost box
# About half a minute on two CPU cores; within three minutes on one GPU. The comparisons are 105 short trainings on a CPU and six on one H100, and are committed; eleven more, which chose the rates of the six, are not kept.
# Records 8 and 9: \@Grad62304977, \@kellerjordan0. Records 38 and 42 to 43: \@varunneal. Record 39: \@classiclarryd. Record 41: \@li_zichong. Records 48 and 78: \@ChrisJMcCormick. Record 50: \@roeeshenberg. Record 57: \@classiclarryd, \@YouJiacheng, \@ChrisJMcCormick. Polar Express {cite}`amsel2025`, NorMuon {cite}`li2025`, cautious weight decay {cite}`chen2025`, Gram Newton–Schulz {cite}`zhang2026`.
# ```
#
# ## The problem
#
# For nearly a year the polynomial of record 4 stayed. Then four records changed four things about Muon. Here is a small GPT after sixty steps of [chapter 12](12_newton_schulz.py)'s Muon, with the momentum from which its updates are made.

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
from speedrun.optim.newton_schulz import newton_schulz
from speedrun.train import train

scratch = Path(tempfile.mkdtemp())
BRIEF = {"steps": 60, "schedule.warmup_steps": 10, "val_every": 60, "val_tokens": 32_768}
MUON = {
    "optim.matrices": "muon",
    "optim.matrix_lr": 0.016,
    "optim.adam.lr": 0.008,
    "device": tier.device,
}
run = train(vary(preset("cpu_gpt2"), BRIEF | MUON), scratch / "look", echo=None)
state = run.optimizer.state_dict()  # tensors of (matrices, rows, cols), by parameter and name
banks = [spec.name for spec in run.model.specs if spec.matrices]
momenta = {name: state[f"{name}/momentum_buffer"] for name in banks}


# %%
def share_below(momentum: torch.Tensor, floor: float) -> float:
    """The share of singular values that are below `floor` times their matrix's Frobenius norm."""
    length = torch.linalg.matrix_norm(momentum)[:, None]
    return (torch.linalg.svdvals(momentum) < floor * length).float().mean().item()


up = newton_schulz(momenta["mlp_up"]).float()
lengths = up.norm(dim=2)  # of each neuron's step, in each of two layers
low, high = lengths.quantile(lengths.new_tensor([0.05, 0.95]), dim=1)
uneven, usual = (lengths.amax(1) / lengths.amin(1)).max(), (high / low).max()
unreached = share_below(momenta["attention_qkv"], 1 / 664)
weights = run.model.mlp_up.detach().bfloat16()
late = 0.1 * 0.016 * 2 * up.view(weights.shape)  # a tenth of the rate, and its scale of 2
moved = ((weights.float() - late).bfloat16() != weights).float().mean()
assert 0.25 < unreached < 0.4 and 4 < uneven < 6 and 1.7 < usual < 2.5 and 0.4 < moved < 0.5
print(f"{unreached:.0%} of the singular values of Q, K and V are too small for five iterations")
print(f"one neuron's step is {uneven:.1f} times as long as another's")
print(f"without a twentieth at either end, {usual:.1f} times")
print(f"at a tenth of the rate {moved:.0%} of the weights move, if they are kept in bfloat16")

# %% [markdown]
# Three suspects. The polynomial leaves a third of the directions of Q, K and V behind. *Orthogonal* promised to treat all directions alike, and yet the steps of two neurons of one layer differ up to fivefold, and twofold in the middle nine tenths. Weights in bfloat16 are cheaper to send from GPU to GPU, but more than half of these would not notice a step at a tenth of the peak rate. (The record's rate ends at 0.15 of its base.) The fourth thing is not in sight after sixty steps: weights that do not decay grow. When record 43 let the contest's matrices decay, their mean square fell below a fifth of what it had been.
#
# ```{admonition} Prediction
# Four changes: better polynomials, rows of equal norm, weight decay that knows when to hold, and sixteen bits of mantissa kept aside. In the contest they were worth 10 steps of 1,680, 15 of 2,330, 40 of 2,285, and (the mantissa) 15 steps more, and yet part of a second less. **Order the four by what they will be worth in a run of 600 steps on a laptop. Then say which of them three seeds will be able to tell from nothing,** if the loss of one configuration has a standard deviation of 0.007 nats from seed to seed, and arms share their seeds.
# ```
#
# ## The idea
#
# **Polar Express.** Iterating *one* polynomial is a waste. The first iteration sees singular values anywhere between a thousandth and one, and should lift the small ones at any price. The last one gets them between 0.4 and 1.6, as we shall see, and should flatten. So look for the *minimax* polynomial: the odd quintic which, on an interval $[l, u]$, strays least from one,
#
# $$ \min_{a,b,c}\ \max_{\sigma\in[l,u]} \bigl|1 - (a\sigma + b\sigma^3 + c\sigma^5)\bigr| . $$
#
# With three coefficients the largest error $E$ of the best one is reached four times, with alternating sign: at both ends and at two points between (Chebyshev's alternation). After it all singular values lie in $[1-E, 1+E]$, which is the next interval, and so on. No other choice of as many odd quintics, one after the other, ends closer to one in the worst case: to be greedy is optimal here. That is Amsel and others' theorem.
#
# **NorMuon.** If $U$ has orthonormal columns, $U^\top U = I$, little is said about its rows: none is longer than 1, and their squared lengths sum to the number of columns. Each row of the MLP's first matrix is one neuron. NorMuon *normalises* the rows: it keeps a second moment for each row, a running mean of its mean square, and divides the row by the root. In the record the matrix then gets back the Frobenius norm that it had.
#
# **Cautious weight decay.** A step $u$ and a decay $\lambda w$ are both subtracted from the weight $w$. Where $u$ and $w$ have the same sign, the step makes the weight smaller anyway, and decay hurries it. Where they differ, the gradient asks for a weight of *larger* size and decay works against it. Cautious decay leaves it out there. With a learning rate of $\eta$ the record's step is
#
# $$ w \leftarrow w - \eta\,\bigl(u + 1.2\,\eta\,w\,[uw \ge 0]\bigr) , $$
#
# where the bracket is 1 if the condition holds and else 0. Decay is a multiple of the rate's *square*, so it fades faster than the step as the rate falls.
#
# **Mantissa buffers.** A float32 is a bfloat16 with sixteen more bits of mantissa behind it. Keep the front half in the model, where the products want it, and the back half with the optimizer. Nothing is lost, and nothing is kept twice.
#
# ## The code
#
# ### Polar Express: minimax polynomials
#
# The record's coefficients look as if somebody had tuned them. They follow from the problem above, for $l = 1/1000$. One quintic is soon found: guess the two inner points, solve four linear equations for $a, b, c$ and $E$, move the points to where the polynomial really turns, and repeat. (This is Remez's exchange algorithm.)

# %%
import numpy as np


def best_quintic(low: float, high: float) -> tuple[float, float, float, float]:
    """(a, b, c, E): the odd quintic that strays least from 1 on [low, high], and by how much."""
    inner = np.array([(3 * low + high) / 4, (low + 3 * high) / 4])
    for _ in range(100):
        at = np.array([low, *inner, high])
        system = np.stack([at, at**3, at**5, np.array([1, -1, 1, -1])], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        root = np.sqrt(9 * b * b - 20 * a * c)  # the derivative vanishes at the new inner points
        inner = np.sort(np.sqrt([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)]))
    return a, b, c, error


a, b, c, error = best_quintic(0.1, 1.0)
sigma = np.linspace(0.1, 1.0, 10_001)
strays = 1 - (a * sigma + b * sigma**3 + c * sigma**5)
turns = np.flatnonzero(np.diff(np.sign(np.diff(strays)))) + 1
extremes = strays[[0, *turns, -1]]
assert np.allclose(extremes, error * np.array([1, -1, 1, -1]), atol=1e-6), "so it is the best"
draw = np.random.default_rng(0)
for _ in range(2000):
    x, y, z = np.array([a, b, c]) + 0.05 * draw.standard_normal(3)
    assert np.abs(1 - (x * sigma + y * sigma**3 + z * sigma**5)).max() > error
print(f"on [0.1, 1] the best quintic strays by {error:.3f}, at four points, with alternating sign")

# %% [markdown]
# Two margins make it fit for real arithmetic. Rounding may push a singular value above the interval's end, where a quintic explodes; so each polynomial but the last is stretched by 2%. Moreover the best quintic for $[1/1000, 1]$ rises to 1.99 and then dips to 0.008 at its second turn: large singular values would become small differences of large terms, and rounding would drown them. So each is made for an interval of at most 50 to 1, and scaled so that both ends of the *real* interval come out equally far from one.

# %%
#| default_exp optim.muon
#| export
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from speedrun.lab.bounds import Beta, NonNegativeFloat, PositiveFloat
from speedrun.optim.newton_schulz import apply_odd_polynomials, nesterov_momentum
from speedrun.optim.newton_schulz import newton_schulz, polar_factor
from speedrun.params import ParamSpec

# %%
#| export
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(
    g: Tensor,
    iterations: int = 5,
    dtype: torch.dtype = torch.bfloat16,
    gram: bool = False,
    product: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Nearly the polar factor of each matrix in g, (…, rows, cols) → the same shape, in `dtype`.

    The polynomials are Amsel and others' for singular values above 1/1000 of the Frobenius norm, with record 38's margins.
    gram: by way of the Gram matrix, for g of three dimensions; restarted once for long matrices, and after every
    polynomial for others. product: as in `gram_newton_schulz`.
    """
    x = g.float() if dtype == torch.float16 else g.to(dtype)  # a small gradient is none in float16
    x = (x / (1.02 * torch.linalg.matrix_norm(x, keepdim=True) + 1e-6)).to(dtype)
    last = POLAR_EXPRESS[-1:] * max(0, iterations - len(POLAR_EXPRESS))
    polynomials = (*POLAR_EXPRESS[:iterations], *last)
    if not gram:
        return apply_odd_polynomials(x, polynomials)
    long = max(x.shape[-2:]) > 1.5 * min(x.shape[-2:])
    return gram_newton_schulz(x, polynomials, 3 if long else 1, product or whole_product)


# %%
def composed(low: float, count: int, margin: float = 0.02, cushion: float = 0.02) -> list[tuple]:
    """The best quintics one after the other, for singular values in [low, 1], with both margins."""
    high, found = 1.0, []
    for n in range(count):
        a, b, c, _ = best_quintic(max(low, cushion * high), high)
        ends = sum(a * x + b * x**3 + c * x**5 for x in (low, high))
        scale = 2 / ends if cushion * high > low else 1.0
        stretch = 1 + margin * (n < count - 1)
        a, b, c = scale * a / stretch, scale * b / stretch**3, scale * c / stretch**5
        found.append((a, b, c))
        low = a * low + b * low**3 + c * low**5
        high = 2 - low  # what was in the old interval is now in this one
    return found


# %%
derived, without_cushion = composed(1e-3, 5), best_quintic(1e-3, 1.0)
assert np.allclose(derived, POLAR_EXPRESS, rtol=1e-9), "the record's fifteen numbers"
assert (f"{1 - without_cushion[3]:.3f}", f"{1 + without_cushion[3]:.2f}") == ("0.008", "1.99")
found, interval = [], (1e-3, 1.0)
for a, b, c in POLAR_EXPRESS:
    found.append(interval)
    sigma = np.linspace(*interval, 200_001)
    after = a * sigma + b * sigma**3 + c * sigma**5
    interval = after.min(), after.max()
assert [f"{end:.1f}" for end in found[-1]] == ["0.4", "1.6"]
off = np.abs(np.array(derived) - POLAR_EXPRESS).max()
print(f"fifteen numbers, the largest difference {off:.0e}")
print("intervals: " + ", ".join(f"[{low:.3f}, {high:.2f}]" for low, high in [*found, interval]))

# %% [markdown]
# So the fifteen numbers are computed. What is chosen is the thousandth, the number of polynomials and the margins. Here are both maps:

# %% tags=["hide-input"] mystnb={"image": {"alt": "Singular value after five polynomials against the singular value before, on a logarithmic axis: record 4's quintic five times, and the five quintics of Polar Express"}}
import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style
from speedrun.optim.newton_schulz import QUINTIC


def mapped(sigma: np.ndarray, polynomials: Sequence[tuple[float, float, float]]) -> np.ndarray:
    """Numbers after odd quintics, one after the other."""
    for a, b, c in polynomials:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


floor, before = 1.02e-3, np.logspace(-5, 0, 100_001)  # as a share of the Frobenius norm
ends = {"one quintic, five times": mapped(before, [QUINTIC] * 5)}
ends["five best quintics"] = mapped(before / 1.02, POLAR_EXPRESS)
figure_style()
fig, axis = plt.subplots(figsize=(5.6, 3.4))
for label, values in ends.items():
    axis.semilogx(before, values, lw=1, label=label, zorder=3 if label.startswith("one") else 2)
axis.axvline(floor, color="0.5", ls=":")
axis.set_xlabel("singular value, as a share of the Frobenius norm")
axis.set_ylabel("singular value after")
axis.legend(loc="upper left")
quintic, best = ([v[before > floor].min(), v[before > floor].max()] for v in ends.values())
axis.set_title(
    f"above a thousandth of the norm all end at {best[0]:.2f} to {best[1]:.2f},\n"
    f"with the one quintic at {quintic[0]:.2f} to {quintic[1]:.2f}"
)
plt.show()

# %%
assert [f"{end:.2f}" for end in (*best, *quintic)] == ["0.86", "1.14", "0.48", "1.20"]
assert np.allclose(best, interval, atol=1e-4), "the last of the intervals"
steeper = ends["five best quintics"][0] / ends["one quintic, five times"][0]
assert 1.9 < steeper < 2.1
print(f"the smallest grow {steeper:.1f} times as much as with the quintic")

# %% [markdown]
# Above the dotted line everything ends within 14% of one. Below it the smallest singular values grow twice as much as with the quintic, and stay small. What does that do to the momenta?

# %%
exact = {name: polar_factor(m) for name, m in momenta.items()}


def distance(update: torch.Tensor, name: str) -> float:
    """How far an update is from the polar factor, as a share of the factor's Frobenius norm."""
    return ((update.double() - exact[name]).norm() / exact[name].norm()).item()


longer = {}
for name, m in momenta.items():
    old, new = newton_schulz(m), polar_express(m)
    top = torch.linalg.svdvals(new.float()).max().item()
    assert distance(new, name) < distance(old, name) and top < 1.16
    longer[name] = (new.float().norm() / old.float().norm()).item()
    errors = f"off by {distance(old, name):.2f} with the quintic, {distance(new, name):.2f} now"
    print(f"{name:14} {errors}; {share_below(m, floor):3.0%} are below the floor")
assert 0.2 < share_below(momenta["attention_qkv"], floor) < 0.3
assert all(1.05 < by < 1.15 for by in longer.values())
sigma = torch.linalg.svdvals(momenta["attention_qkv"].double())
sigma = (sigma / sigma.norm(dim=1, keepdim=True)).cpu().numpy()
errors = (1 - mapped(sigma / 1.02, POLAR_EXPRESS)) ** 2
share = errors[sigma < floor].sum() / errors.sum()
assert share > 0.9
print(f"Q, K, V: {share:.0%} of the squared error is in the directions below the floor")

# %% [markdown]
# Every bank is nearer to its polar factor. What is left in Q, K and V is nearly all in the quarter of their directions that is below the floor. The update has also become longer, by about a tenth, at the same rate.
#
# ### Gram Newton–Schulz
#
# Chapter 12's iteration multiplies the long matrix twice each time. It need not. All that it ever does to $X$ is to multiply it from the left by polynomials in $XX^\top$. So five iterations are $X \mapsto QX$ with one square matrix $Q$, and $Q$ can be had from the small Gram matrix $G = XX^\top$ alone. With $P = aI + bG + cG^2$:
#
# $$ Q \leftarrow PQ, \qquad G \leftarrow PGP, \qquad\text{and at the end}\quad X \leftarrow QX . $$
#
# Everything here is a polynomial in the first $G$, so on paper their order is free. There is a catch: $G$ holds the *squares* of the singular values. What is a thousandth in $X$ is a millionth in $G$, below the rounding of its large entries, and comes out of it as noise, possibly negative; the polynomials are steep near zero and do not forgive. Zhang and others {cite}`zhang2026` *restart*: after some polynomials they multiply $X$ out, where the small ones have grown meanwhile, and compute $G$ anew. With one restart that makes four long products instead of ten. They also multiply in float16, which has three bits more than bfloat16 and costs a GPU the same. Its range is small, but once the matrix has been divided by its norm nothing here grows out of it, and what falls below it is too small to matter. No record has this yet. This book's `record` does: its Muon is `RECORD_MUON` in [chapter 22](22_config.py). Its products of squares are symmetric: [chapter 31](31_symmetric_matmul.py) can compute half of each.


# %%
#| export
def whole_product(a: Tensor, b: Tensor, c: Tensor | None = None, alpha=1.0, beta=0.0) -> Tensor:
    """alpha · a b + beta · c for stacks of matrices, (matrices, …, …); a b without c."""
    return a @ b if c is None else torch.baddbmm(c, a, b, beta=beta, alpha=alpha)


def gram_newton_schulz(
    x: Tensor,
    polynomials: Sequence[tuple[float, float, float]],
    restart: int = 3,
    product: Callable[..., Tensor] = whole_product,
) -> Tensor:
    """The result of `apply_odd_polynomials` for x, (matrices, rows, cols), computed on the Gram matrix of its short side.

    restart: after so many polynomials x is multiplied out, and the Gram matrix computed anew; each time takes two
    products with x itself. product: computes all those whose results are symmetric but for rounding; if it mirrors a half, restart by two (chapter 31). Shape and dtype stay.
    """
    tall, restart = x.shape[-2] > x.shape[-1], max(1, restart)
    for begin in range(0, len(polynomials), restart):
        part = polynomials[begin : begin + restart]
        gram = x.mT @ x if tall else product(x, x.mT)
        q = torch.eye(len(gram[0]), dtype=x.dtype, device=x.device).expand_as(gram)
        for n, (a, b, c) in enumerate(part):
            z = product(gram, gram, gram, c, b)
            q = product(z, q, q, 1.0, a) if n else torch.add(z, q, alpha=a)
            if n < len(part) - 1:  # p(gram) · gram · p(gram): these commute, but for rounding
                half = product(z, gram, gram, 1.0, a)
                gram = product(z, half, half, 1.0, a)
        x = x @ q if tall else q @ x
    return x


# %%
from torch.utils.flop_counter import FlopCounterMode


def gram_flops(m: int, n: int, iterations: int = 5, restarts: int = 1) -> int:
    """FLOPs of `gram_newton_schulz` for an m × n matrix, m ≤ n: two long products a part, the others m × m."""
    parts = restarts + 1
    squares = iterations + 3 * (iterations - parts)
    return parts * 4 * m * m * n + squares * 2 * m**3


def plain_flops(m: int, n: int, iterations: int = 5) -> int:
    """FLOPs of `apply_odd_polynomials`."""
    return iterations * (4 * m * m * n + 2 * m**3)


with FlopCounterMode(display=False) as counter:
    gram_newton_schulz(torch.randn(1, 24, 96), POLAR_EXPRESS)
assert counter.get_total_flops() == gram_flops(24, 96)
saving = 1 - gram_flops(768, 3072) / plain_flops(768, 3072)
assert 0.32 < saving < 0.34 and gram_flops(768, 768) > plain_flops(768, 768)
assert gram_flops(768, 768, restarts=4) == plain_flops(768, 768), "a restart after each: plain"
print(f"a matrix of 768 × 3,072: {saving:.0%} fewer FLOPs; a square one would need more")

# %% [markdown]
# Now the errors. One matrix, with singular values from one to a ten-thousandth, goes through the polynomials in ten ways, each compared with float64. The plain form comes in two spellings: `apply_odd_polynomials` rounds a product and then a sum, `fused` adds inside the product and rounds once, as PyTorch's Muon does and the Gram form above.

# %%
generator = torch.Generator().manual_seed(0)


def fused(x: torch.Tensor, polynomials: Sequence[tuple[float, float, float]]) -> torch.Tensor:
    """`apply_odd_polynomials` for wide matrices, (matrices, rows, cols), with every sum inside a product."""
    for a, b, c in polynomials:
        gram = x @ x.mT
        z = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, z, x, beta=a)
    return x


def rotation(rows: int, cols: int) -> torch.Tensor:
    """Orthonormal columns at random, float64."""
    return torch.linalg.qr(torch.randn(rows, cols, dtype=torch.float64, generator=generator))[0]


steep = (rotation(96, 96) * torch.logspace(0, -4, 96, dtype=torch.float64)) @ rotation(384, 96).mT
steep = steep.to(tier.device)
right = polar_express(steep[None], dtype=torch.float64)
wide = (steep / (1.02 * steep.norm()))[None]
numbers = {"bfloat16": wide.bfloat16(), "float16": wide.half()}
ways = {f"plain, {n}": apply_odd_polynomials(x, POLAR_EXPRESS) for n, x in numbers.items()}
for n, x in numbers.items():
    ways[f"fused, {n}"] = fused(x, POLAR_EXPRESS)
    for restart in (5, 2, 3):
        ways[f"gram, {n}, restart {restart}"] = gram_newton_schulz(x, POLAR_EXPRESS, restart)
off = {way: ((x.double() - right).norm() / right.norm()).item() for way, x in ways.items()}
assert off["gram, bfloat16, restart 5"] > 1 and off["gram, float16, restart 5"] > 0.1
for n in numbers:
    every_2, every_3 = (off[f"gram, {n}, restart {restart}"] for restart in (2, 3))
    assert every_2 < off[f"fused, {n}"] < every_3 < 0.9 * off[f"plain, {n}"]
for form in ("plain, {}", "fused, {}", "gram, {}, restart 2", "gram, {}, restart 3"):
    assert 7 < off[form.format("bfloat16")] / off[form.format("float16")] < 9
rounded = apply_odd_polynomials(
    numbers["bfloat16"].double(), POLAR_EXPRESS
)  # exact products, rounded matrix
entry = ((rounded - right).norm() / right.norm()).item()
assert 0.7 < entry / off["fused, bfloat16"] < 0.85
exactly = [form(wide, POLAR_EXPRESS) for form in (fused, apply_odd_polynomials)]
assert torch.allclose(*exactly, atol=1e-9), "one map, two spellings"
for way, error in off.items():
    print(f"{way:26} off by {error:.3f}")
print(f"bfloat16, if nothing but the matrix itself were rounded: off by {entry:.3f}")

# %% [markdown]
# Without a restart (after 5 of 5) the Gram form is ruined, in float16 too. With one after three polynomials it is more exact than the trainer's plain form, and that is the merit of its spelling: beside the fused form in the same numbers it is a little *less* exact, for a third less work at this shape. Restarts after two and four take two long products more, and err least on this matrix. And float16 errs an eighth as much as bfloat16, in each form, for its three more bits. Rounding the matrix to bfloat16 already makes three quarters of the fused form's error, before the first product: it adds noise to all directions, and the polynomials lift what is small, noise included. (Zhang and others restart once, after two.) A square matrix gets a restart after each polynomial, and that is the plain form.
#
# ### NorMuon: normalising rows
#
# Which side is “rows”? The longer one. In the MLP's matrices that is the neurons' side: the second matrix has its neurons as columns, and there columns are normalised. Square matrices take rows.


# %%
#| export
def normuon_normalize(
    update: Tensor, second_momentum: Tensor, beta2: float, skip: Tensor | None
) -> Tensor:
    """NorMuon: divide each row of update, (matrices, rows, cols), by the root of its second moment, then give the matrix its old Frobenius norm.

    second_momentum ← beta2 · second_momentum + (1 − beta2) · mean(row²), (matrices, rows, 1), in place; of columns,
    (matrices, 1, cols), where these are more. skip: device flag; if not zero it stays. Returns float32.
    """
    u = update.float()
    square = u.square().mean(-1 if second_momentum.shape[-1] == 1 else -2, keepdim=True)
    square = square.to(second_momentum.dtype)
    if skip is not None:
        square = torch.where(skip > 0, second_momentum, square)
    second_momentum.lerp_(square, 1 - beta2)
    even = u * second_momentum.clamp_min(1e-10).rsqrt()
    length, now = (torch.linalg.matrix_norm(x, keepdim=True) for x in (u, even))
    return even * (length / now.clamp_min(1e-10))


# %%
def spread(update: torch.Tensor) -> float:
    """The longest row of a matrix by its shortest, in the worst matrix of (matrices, rows, cols)."""
    lengths = update.float().norm(dim=2)
    return (lengths.amax(1) / lengths.amin(1)).max().item()


perfect = exact["mlp_up"].cpu()
eye = torch.eye(128).expand(2, 128, 128)
assert torch.allclose(perfect.mT @ perfect, eye, atol=1e-4) and spread(perfect) > 4
second = torch.zeros(2, 512, 1)
normed = normuon_normalize(perfect, second, beta2=0.9, skip=None)
assert spread(normed) < 1.001
assert torch.allclose(torch.linalg.matrix_norm(normed), torch.linalg.matrix_norm(perfect))
tilted = torch.linalg.svdvals(normed)
assert tilted.min() < 0.85 and tilted.max() > 1.15, "no longer orthogonal"
chance = spread(rotation(512, 128)[None])
assert 1.2 < chance < 1.6
hadamard = torch.ones(1, 1)
for _ in range(9):
    hadamard = torch.cat([torch.cat([hadamard, hadamard]), torch.cat([hadamard, -hadamard])], 1)
both = hadamard[None, :, :128] / math.sqrt(512)
assert torch.allclose(both.mT @ both, eye[:1], atol=1e-6) and spread(both) < 1.0001
print(f"the polar factor: rows up to {spread(perfect):.1f} times as long as others")
print(f"orthonormal columns at random: {chance:.1f} times")
print(f"normalised: {spread(normed):.3f} times")
print(f"singular values are {tilted.min():.2f} to {tilted.max():.2f} then")

# %% [markdown]
# The columns of this matrix are orthonormal, and yet the steps of its neurons differ nearly fivefold. By chance it would be less than twofold. A better polynomial cannot repair that, because nothing is wrong with the polynomial. The last line is the price: scaling the rows once spoils the columns. (Both *can* be had: the first columns of a Hadamard matrix are orthonormal, with rows of one length. But that takes more than one scaling.) The record takes rows of one norm and columns that are roughly orthonormal.
#
# In the first step the second moment is of this step alone, and rows come out equal. Later each row is divided by what it *usually* is. The moment starts at zero and needs no bias correction: a constant common to all rows goes when the matrix gets its norm back.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Norms of the 512 rows of an update of the MLP's first matrix, sorted: from the quintic, of the exact polar factor, and normalised by NorMuon"}}
fig, axis = plt.subplots(figsize=(5.6, 3.4))
for label, update in (("quintic", up), ("exact polar factor", perfect), ("NorMuon", normed)):
    axis.plot(update[0].norm(dim=1).sort().values.cpu(), label=label)
axis.set_xlabel("512 neurons of a layer, sorted for each line by itself")
axis.set_ylabel("norm of a neuron's step")
axis.set_ylim(0)
axis.legend(loc="upper left")
ordered = perfect[0].norm(dim=1).sort().values
ratio = (
    ordered[-1] / ordered[0],
    ordered[486] / ordered[25],
)  # of all, and of the middle nine tenths
axis.set_title(
    f"steps of neurons from an orthogonal update:\n{ratio[0]:.1f} to 1, and {ratio[1]:.1f} to 1 in the middle nine tenths"
)
plt.show()

# %% [markdown]
# ### Cautious weight decay
#
# Two things are new: where a weight decays, and by how much as the rate falls.


# %%
#| export
def cautious_decay(p: Tensor, update: Tensor, decay: float | Tensor) -> Tensor:
    """update + decay · p · [update · p ≥ 0], all of one shape: decay only where the step makes a weight smaller anyway."""
    return update + decay * p * (update * p >= 0)


# %%
w, u = torch.tensor([2.0, 2.0, -2.0, 0.0]), torch.tensor([1.0, -1.0, -1.0, 1.0])
assert torch.equal(cautious_decay(w, u, 0.1), torch.tensor([1.2, -1.0, -1.2, 1.0]))
noise = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
steps = torch.randn(100_000, generator=torch.Generator().manual_seed(2))
agree = (steps * noise >= 0).float().mean().item()
assert 0.49 < agree < 0.51
peak = 0.016
early, late = 1.2 * peak**2, 1.2 * (0.1 * peak) ** 2
assert math.isclose(early / late, 100)
print(f"where signs are random {agree:.0%} of the weights decay")
print(
    f"by {early:.6f} at a rate of {peak}, by {late:.6f} at a tenth of it; plain decay: {0.1 * peak}"
)
shares = [factor * early / (0.1 * peak) for factor in (1, 2, 4)]  # for attention, and the MLP's two
assert [f"{share:.2f}" for share in shares] == ["0.19", "0.38", "0.77"]

# %% [markdown]
# ### bfloat16 weights with a 16-bit mantissa buffer
#
# The front half should be the *nearest* bfloat16, since the model multiplies with it. Truncation would give the one nearer to zero. Add half a unit of the sixteenth bit first, and truncation rounds. The back half, the *mantissa* in the code, becomes a signed correction, and joining is one addition. (A number exactly between two goes away from zero here and to the even one in PyTorch. A few NaNs are zeros or infinities in the front half alone. The record truncates.)


# %%
#| export
def split_bf16(whole: Tensor) -> tuple[Tensor, Tensor]:
    """float32 of any shape → the nearest bfloat16, and the rest of the mantissa, int16, with which `join_bf16` gives back every bit."""
    bits = whole.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_bf16(rounded: Tensor, mantissa: Tensor) -> Tensor:
    """The float32 that `split_bf16` took apart, bit by bit: rounded · 2¹⁶ + mantissa, on integers."""
    return ((rounded.view(torch.int16).to(torch.int32) << 16) + mantissa).view(torch.float32)


# %%
everything = torch.randint(-(2**31), 2**31, (1_000_000,), dtype=torch.int64, generator=generator)
floats = everything.to(torch.int32).view(torch.float32)  # a million bit patterns, NaNs among them
rounded, mantissa = split_bf16(floats)
assert torch.equal(join_bf16(rounded, mantissa).view(torch.int32), floats.view(torch.int32))
plain = torch.randn(100_000, generator=generator)
tie = plain.view(torch.int32) & 0xFFFF == 0x8000
assert torch.equal(split_bf16(plain)[0][~tie], plain.bfloat16()[~tie])
cut_short = (plain.view(torch.int32) >> 16 << 16).view(torch.float32)
shrunk = 1 - (cut_short.abs() / plain.abs()).mean().item()
assert 0.002 < shrunk < 0.004
print("every bit of a million patterns came back")
print(f"truncation would shrink weights by {shrunk:.2%}")

weight, exactly, crumbs = torch.tensor([1.0]), 1.0, torch.full((), 1e-4)
half, mantissa = split_bf16(weight)
blunt = weight.bfloat16()
for _ in range(100):
    half, mantissa = split_bf16(join_bf16(half, mantissa) - crumbs)
    blunt = (blunt.float() - crumbs).bfloat16()
    exactly -= 1e-4
kept = join_bf16(half, mantissa).item()
assert blunt.item() == 1.0 and abs(kept - exactly) < 1e-5
print(f"a hundred steps of 0.0001 from 1: bfloat16 {blunt.item()}, with its mantissa {kept:.4f}")

# %% [markdown]
# ### The Muon step
#
# Every change is an option of `MuonConfig`, and with all of them off this is chapter 12's Muon. There are two more. Momentum that starts low and ends low is the schedule's ([chapter 14](14_schedule.py) has the reasons). And the MLP's two matrices have multiples of the learning rate of their own. The tall one, `mlp_up`, has had $\sqrt{\text{rows}/\text{cols}}=2$ since record 8 (records 27 to 41 stored it wide, and lost it). The wide one, `mlp_down`, has had 4 since record 48. It came by accident, with another way to store the matrices, and the run was found not to mind. [Chapter 20](20_many_gpus.py)'s rule for Muon keeps `muon_state` and calls `muon_step`; a `ParamSpec` is a parameter's row in the model's table ([chapter 21](21_model.py)).


# %%
#| export
@dataclass(frozen=True)
class MuonConfig:
    """Muon. With the defaults it is record 4's; what later records made of it is off."""

    momentum: Beta = 0.95
    """Coefficient of the gradients' average; with schedule.momentum_min its highest value."""
    nesterov: bool = True
    """Mix the newest gradient in once more."""
    ns_steps: Annotated[int, Interval(ge=0, le=100)] = 5
    """Newton–Schulz iterations; 0: the exact polar factor, from a singular value decomposition."""
    orthogonalizer: Literal["quintic", "polar_express"] = "quintic"
    """quintic: one polynomial again and again. polar_express: each the best for what the last one left."""
    ns_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """polar_express: what is multiplied. float16: by way of the Gram matrix, which is cheaper."""
    beta2: Beta = 0.0
    """NorMuon: decay of the rows' second moment; 0: off."""
    weight_decay: NonNegativeFloat = 0.0
    """Decay, as a multiple of the learning rate; with decay_with_lr, of its square."""
    decay_with_lr: bool = False
    """Decay a weight by weight_decay · rate², times the matrix's own multiple of the rate; and not by weight_decay · rate."""
    cautious: bool = False
    """Decay a weight only where the step makes it smaller anyway."""
    scale_by_shape: bool = True
    """The rate of a matrix of more rows than columns is larger by sqrt(rows / cols)."""
    down_lr_mul: PositiveFloat = 1.0
    """Multiple of the rate of mlp_down, the wide matrix."""
    param_dtype: Literal["float32", "bfloat16", "bf16_mantissa"] = "float32"
    """What the matrices are in the model. bf16_mantissa: bfloat16, and the optimizer keeps the other 16 bits of the mantissa."""


def matrix_lr_mul(spec: ParamSpec, config: MuonConfig) -> float | tuple[float, ...]:
    """Multiple of Muon's learning rate for a parameter, or several, for a slice's matrices in turn: the spec's, with the scale for its shape."""
    if isinstance(spec.lr_mul, tuple):
        return spec.lr_mul
    scale = spec.shape_scale if config.scale_by_shape else 1.0
    return spec.lr_mul * (config.down_lr_mul if spec.name == "mlp_down" else scale)


# %%
#| export
def apply_update(
    p: Tensor,
    mantissa: Tensor | None,
    update: Tensor,
    lr: float | Tensor,
    decay: float | Tensor,
    cautious: bool,
) -> None:
    """p ← p − lr · (update + decay · p), in place, computed in float32; cautious: decay only where update · p ≥ 0.

    p: float32 or bfloat16. mantissa: int16, the other bits of p, which change with it, or None; then p is rounded.
    """
    whole = p if p.dtype != torch.bfloat16 else p.float()
    whole = whole if mantissa is None else join_bf16(p, mantissa)
    if cautious:
        whole.sub_(lr * cautious_decay(whole, update.float(), decay))
    else:
        whole.mul_(1 - lr * decay).sub_(lr * update)
    if p.dtype == torch.bfloat16:
        rounded, missing = split_bf16(whole)
        p.copy_(rounded)
        if mantissa is not None:
            mantissa.copy_(missing)


# %%
#| export
def orthogonalize(g: Tensor, config: MuonConfig) -> Tensor:
    """Nearly the polar factor of each matrix in g, (matrices, rows, cols), by the config's polynomials; with ns_steps=0 the exact one.

    In the dtype in which the polynomials multiply.
    """
    if not config.ns_steps:
        return polar_factor(g)
    if config.orthogonalizer == "polar_express":
        dtype, gram = getattr(torch, config.ns_dtype), config.ns_dtype == "float16"
        return polar_express(g, config.ns_steps, dtype, gram)
    return newton_schulz(g, config.ns_steps)


def muon_state(p: Tensor, config: MuonConfig) -> dict[str, Tensor]:
    """Muon's state for matrices p, (matrices, rows, cols): momentum_buffer of that shape, float32; if they are used,
    second_momentum_buffer, (matrices, rows, 1) or (matrices, 1, cols), float32, and mantissa, int16.
    """
    state = {"momentum_buffer": torch.zeros_like(p, dtype=torch.float32)}
    if config.beta2:
        one = p[:, :, :1] if p.shape[1] >= p.shape[2] else p[:, :1, :]
        state["second_momentum_buffer"] = torch.zeros_like(one, dtype=torch.float32)
    if config.param_dtype == "bf16_mantissa":
        state["mantissa"] = torch.zeros_like(p, dtype=torch.int16)
    return state


# %%
#| export
def muon_step(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    lr: float | Tensor,
    lr_mul: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float,
    config: MuonConfig,
    skip: Tensor | None = None,
) -> None:
    """p ← p − lr · (lr_mul · O + d · p) for matrices p with gradient g, (matrices, rows, cols), in place, with their state.

    O: the normalised, orthogonalised momentum. d: weight_decay, or with decay_with_lr weight_decay · lr · lr_mul.
    lr_mul: one for all, or (matrices, 1, 1). skip: device flag; if it is not zero nothing changes, without host sync.
    """
    buffer = state["momentum_buffer"]
    update = nesterov_momentum(g.float(), buffer, momentum, config.nesterov, skip)
    update = orthogonalize(update, config)
    if config.beta2:
        second = state["second_momentum_buffer"]
        update = normuon_normalize(update, second, config.beta2, skip)
    update = (update * lr_mul).to(update.dtype)
    lr = lr if skip is None else lr * (1 - skip)
    decay = weight_decay * lr * lr_mul if config.decay_with_lr else weight_decay
    apply_update(p, state.get("mantissa"), update, lr, decay, config.cautious)


# %%
from speedrun.presets import RECORD_MUON


def steps_of(config: MuonConfig, count: int = 5) -> torch.Tensor:
    """Two matrices after some steps under Muon."""
    p, state = torch.ones(2, 32, 16), muon_state(torch.ones(2, 32, 16), config)
    for step in range(count):
        g = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(step))
        muon_step(p, g, state, 0.02, 1.0, config.momentum, config.weight_decay, config)
    return p


old, buffer = torch.ones(2, 32, 16), torch.zeros(2, 32, 16)
for step in range(5):
    g = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(step))
    update = newton_schulz(nesterov_momentum(g, buffer, 0.95, True, None))
    old.mul_(1 - 0.02 * 0.1).sub_(0.02 * update)
assert torch.equal(steps_of(MuonConfig(weight_decay=0.1)), old), "all off: record 4's, bit for bit"
specs = [spec for spec in run.model.specs if spec.matrices]
multiples = {spec.name: matrix_lr_mul(spec, RECORD_MUON) for spec in specs}
assert multiples == dict.fromkeys(multiples, 1.0) | {"mlp_up": 2.0, "mlp_down": 4.0}

# %% [markdown]
# With everything on, one step is written out by hand, for weights in float32 and for bfloat16 with a mantissa buffer.

# %%
from dataclasses import replace

start = torch.randn(1, 32, 128, generator=generator).bfloat16().float()
g = torch.randn(1, 32, 128, generator=generator).bfloat16().float()
after = {}
for dtype in ("float32", "bf16_mantissa"):
    config = replace(RECORD_MUON, param_dtype=dtype)
    p, state = start.clone(), muon_state(start, config)
    if dtype != "float32":
        p, state["mantissa"] = split_bf16(p)
    muon_step(p, g, state, 0.02, config.down_lr_mul, 0.95, config.weight_decay, config)
    after[dtype] = join_bf16(p, state["mantissa"]) if "mantissa" in state else p
followed = g.lerp(0.05 * g, 0.95)  # the momentum's first, and Nesterov
u = polar_express(followed, dtype=torch.float16, gram=True)
u = normuon_normalize(u, torch.zeros(1, 1, 128), RECORD_MUON.beta2, None)
by_hand = start - 0.02 * 4 * (u + 1.2 * 0.02 * start * (u * start >= 0))
assert torch.allclose(after["float32"], by_hand, atol=1e-6)
assert torch.equal(after["bf16_mantissa"], after["float32"]), "the mantissa loses nothing"

# %% [markdown]
# ## The measurement
#
# This is the laptop's model on the embedded text. First the learning rates are tuned for record 89's Muon, on a grid of fifteen points, each run once. Then each part is taken away at these rates, with paired seeds: for 600 steps (nine seeds of the whole, three of each part), and for 2,000 (three of each). No arm is tuned anew.
#
# Record 89's Muon, here, is `RECORD_MUON` with two exceptions: its weights are in float32, since this model computes in it, and it multiplies in bfloat16. So there are five polynomials of Polar Express, NorMuon with 0.9, cautious decay of 1.2 times the rate squared, and multiples of 2 and 4 for the MLP's two matrices. Momentum rises from 0.85 to 0.95 over 23% of the steps and falls back over the last 4%, the shares of record 89. *Momentum held* is 0.95 throughout. *Decay of all* is the same decay without caution, *plain decay* chapter 12's. *Wide factor* is the multiple of 4, and *factors* are both. *Three polynomials* are the first three of the five, and not the best three.

# %% tags=["hide-input"]
#| default_exp measure.muon
#| export
from typing import Any

from speedrun.config import Config, fields_of, vary
from speedrun.lab.provenance import stamp
from speedrun.lab.results import load_result
from speedrun.presets import preset
from speedrun.measure.runs import (
    SHORT,
    gpu_base,
    corpus_of,
    step_times,
    with_record_muon,
    train_arms,
)

NAMES = (
    "laptop_rates",
    "laptop",
    "laptop_record_4",
    "laptop_long",
    "laptop_long_rates",
    "laptop_weights",
    "laptop_pace",
)
CORPUS = ("rates", "parts")  # on a GPU, with a data folder
RATES = tuple(0.004 * 2**n for n in range(5))
OTHERS = (0.002, 0.004, 0.008)
PLAIN_DECAY = {
    "optim.muon.weight_decay": 0.1,
    "optim.muon.decay_with_lr": False,
    "optim.muon.cautious": False,
}
PARTS: dict[str, dict[str, Any]] = {
    "record 4's quintic": {"optim.muon.orthogonalizer": "quintic"},
    "three polynomials": {"optim.muon.ns_steps": 3},
    "no NorMuon": {"optim.muon.beta2": 0.0},
    "momentum held": {"schedule.momentum_min": 0.0},
    "no decay": {"optim.muon.weight_decay": 0.0},
    "decay of all": {"optim.muon.cautious": False},
    "plain decay": PLAIN_DECAY,
    "no wide factor": {"optim.muon.down_lr_mul": 1.0},
    "no factors": {"optim.muon.down_lr_mul": 1.0, "optim.muon.scale_by_shape": False},
}
RECORD_4 = fields_of(MuonConfig(weight_decay=0.1), "optim.muon.") | {"schedule.momentum_min": 0.0}
WEIGHTS = {
    "float32 weights": {"optim.muon.param_dtype": "float32"},
    "bfloat16 weights": {"optim.muon.param_dtype": "bfloat16"},
}


# %% tags=["hide-input"]
#| export measure.muon
def rates(base: Config) -> dict[str, Config]:
    """Record 89's Muon at every rate of the matrices and of the rest."""
    points = [(rate, other) for rate in RATES for other in OTHERS]
    return {
        f"{r:g} {o:g}": vary(with_record_muon(base), {"optim.matrix_lr": r, "optim.adam.lr": o})
        for r, o in points
    }


def tuned(name: str, base: Config) -> Config:
    """Record 89's Muon at the rates that did best in a committed grid."""
    arms = load_result("muon", name)["data"]["arms"]
    return rates(base)[min(arms, key=lambda arm: arms[arm][0]["val_loss"])]


def arms_of(name: str, base: Config) -> dict[str, Config]:
    """The arms of a measurement: record 89's Muon, tuned, and what is compared with it."""
    whole = tuned("laptop_rates" if name.startswith("laptop") else "rates", base)
    if name == "laptop_weights":
        half = vary(whole, {"precision": "bfloat16"})
        return {
            name: vary(half, {"optim.muon.param_dtype": dtype})
            for name, dtype in {
                "split": "bf16_mantissa",
                "bfloat16": "bfloat16",
                "float32": "float32",
            }.items()
        }
    if name == "laptop_pace":
        adamw = vary(whole, RECORD_4 | {"optim.matrices": "adam"})
        return {"AdamW": adamw, "record 4": vary(whole, RECORD_4), "today": whole}
    if name == "laptop_record_4":
        return {"record 4": vary(whole, RECORD_4)}
    parts = PARTS if name.startswith("laptop") else PARTS | WEIGHTS
    return {"today": whole} | {part: vary(whole, change) for part, change in parts.items()}


# %% tags=["hide-input"]
#| export measure.muon
def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train arms with paired seeds: {"arms": {arm: [run, …]}}; laptop_pace: step times, {"ms": {arm: [ms, …]}}.

    rates: every point once. laptop and parts: record 89's Muon nine times, each part three times; laptop_record_4: chapter
    12's Muon at these rates, nine times; the rest: all three times.
    """
    laptop = name.startswith("laptop")
    base = vary(preset("cpu_gpt2"), SHORT) if laptop else gpu_base(arguments[0])
    base = vary(base, {"steps": 2000}) if "long" in name else base
    seeds = {"laptop": 9, "laptop_record_4": 9, "parts": 9}.get(name, 1)
    seeds = 3 if name in ("laptop_long", "laptop_weights") else seeds
    modules = ["speedrun.measure.muon", "speedrun.train"]
    facts = stamp(command, modules, seeds, range(seeds), corpus_of(base))
    if name.endswith("rates"):
        points = rates(base)
        if "long" in name:  # around the best of the short runs
            points = {at: run for at, run in points.items() if run.optim.matrix_lr in RATES[1:3]}
        return {"arms": train_arms(points, 1, facts, not laptop)}, facts
    arms = arms_of(name, base)
    if name == "laptop_pace":
        return {"ms": step_times(arms)}, facts
    counts = {arm: seeds if arm in ("today", "record 4") else 3 for arm in arms}
    return {"arms": train_arms(arms, counts, facts, not laptop)}, facts


# %%
from speedrun.lab.results import measured_on
from speedrun.lab.stats import describe, p_difference, p_text, study_of

results = {name: load_result("muon", name) for name in NAMES}
losses = {
    name: {arm: [one["val_loss"] for one in runs] for arm, runs in result["data"]["arms"].items()}
    for name, result in results.items()
    if "arms" in result["data"]
}
best = min(losses["laptop_rates"], key=losses["laptop_rates"].get)
older = load_result("newton_schulz", "winners")["data"]["arms"]["muon"]
chapter_12, whole = describe(r["val_loss"] for r in older), describe(losses["laptop"]["today"])
p_whole = p_difference(whole, chapter_12)
trainings = sum(len(runs) for of in losses.values() for runs in of.values())
same_rates = describe(losses["laptop_record_4"]["record 4"])
p_same = p_difference(whole, same_rates)
assert trainings == 105 and whole.n == chapter_12.n == same_rates.n == 9 and p_whole < 1e-6
assert 0.02 < same_rates.mean - whole.mean < 0.03 and p_same < 1e-3
assert p_difference(chapter_12, same_rates) < 1e-3
assert best == "0.016 0.004" and 0.04 < chapter_12.mean - whole.mean < 0.06
assert len(losses["laptop_rates"]) == 15 and f"{whole.sd:.3f}" == "0.007"
assert (round(300 / 1285, 2), round(50 / 1285, 2)) == (0.23, 0.04), "record 89's ramps"
print(f"best rates: {best} (matrices, rest)")
print(f"Muon of chapter 12 {chapter_12}")
print(f"   at these rates {same_rates}")
print(f"record 89's         {whole}, p = {p_whole:.0e} and {p_same:.0e}")
print(measured_on(results["laptop"]))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Change of the final loss when one part of record 89's Muon is taken away, for 600 and for 2,000 steps, three seeds each"}}
change = {}
for name in ("laptop", "laptop_long"):
    whole_runs = losses[name]["today"]
    change[name] = {
        arm: [loss - same for loss, same in zip(runs, whole_runs)]
        for arm, runs in losses[name].items()
        if arm != "today"
    }
means = {name: {arm: sum(d) / len(d) for arm, d in of.items()} for name, of in change.items()}
order = sorted(means["laptop"], key=means["laptop"].get)
fig, axis = plt.subplots(figsize=(5.6, 4.2))
for n, (name, label) in enumerate((("laptop", "600 steps"), ("laptop_long", "2,000 steps"))):
    for y, arm in enumerate(order):
        at = [y + 0.15 - 0.3 * n] * 3
        axis.plot(
            change[name][arm], at, "os"[n], ms=4, color=f"C{n}", label=label if y == 0 else None
        )
axis.axvline(0, color="0.5", lw=0.8)
axis.set_yticks(range(len(order)), order)
axis.set_xlabel("change of the loss, same seed (nats a token)")
axis.legend(loc="lower right")
studies = {
    name: study_of(
        {"control" if arm == "today" else arm: runs for arm, runs in losses[name].items()}
    )
    for name in change
}
missed = {
    name: " or ".join(arm.removeprefix("no ") for arm, p in study.p_values.items() if p < 0.05)
    for name, study in studies.items()
}
assert missed == {"laptop": "NorMuon or factors", "laptop_long": ""}
axis.set_title(
    f"after 600 steps {missed['laptop']} are missed (p < 0.05);\nafter 2,000 {missed['laptop_long'] or 'three seeds settle nothing'}"
)
plt.show()

# %%
long_12 = describe(
    run["val_loss"] for run in load_result("newton_schulz", "long")["data"]["arms"]["muon"]
)
long_whole = describe(losses["laptop_long"]["today"])
p_long = p_difference(long_whole, long_12)
around = {arm: runs[0] for arm, runs in losses["laptop_long_rates"].items()}
best_long = min(around, key=around.get)
print(f"2,000 steps: chapter 12 {long_12}\n             record 89  {long_whole}, p = {p_long:.2f}")
same_seed = load_result("newton_schulz", "long")["data"]["arms"]["muon"][0]["val_loss"]
assert all(around[f"0.008 {o}"] < around[f"0.016 {o}"] for o in ("0.002", "0.004"))
assert best_long == "0.008 0.004" and 0.003 < same_seed - around[best_long] < 0.005
assert 0.01 < long_whole.mean - long_12.mean < 0.012 and 0.05 < p_long < 0.2
print(f"2,000 steps, other rates: {', '.join(f'{at} {loss:.3f}' for at, loss in around.items())}")
print("change of the loss in 600 and in 2,000 steps, same three seeds; p: Dunnett's")
for arm in order:
    row = [f"{means[name][arm]:+.3f} {p_text(studies[name].p_values[arm]):9}" for name in change]
    print(f"  {arm:20} {'  '.join(row)}")
short_, long_ = means["laptop"], means["laptop_long"]
assert 0.015 < short_["no NorMuon"] < 0.02 and 0.01 < long_["no NorMuon"] < 0.015
assert short_["no factors"] > 0.04 and long_["no factors"] < 0
assert short_["momentum held"] < -0.005 and long_["momentum held"] > 0.005
assert short_["no decay"] < 0.005 and long_["no decay"] > 0.01 and long_["plain decay"] < -0.01

# %%
from scipy.stats import ttest_1samp

quintic, three = (
    [change[name][arm] for name in ("laptop", "laptop_long")]
    for arm in ("record 4's quintic", "three polynomials")
)
assert sum(d < 0 for d in sum(quintic, [])) == 5 and abs(short_["record 4's quintic"]) < 0.01
assert sum(d < 0 for d in three[0]) == 2 and max(map(abs, three[1])) < 0.004
assert max(change["laptop_long"]["decay of all"]) < 0 < min(change["laptop_long"]["no decay"])
p_short, p_longer = (study.p_values for study in studies.values())
assert f"{p_short['no NorMuon']:.3f}" == "0.007" and p_short["no factors"] < 0.001
assert min(p for arm, p in p_short.items() if arm not in ("no NorMuon", "no factors")) > 0.2
assert f"{p_longer['no NorMuon']:.2f}" == "0.13" and min(change["laptop_long"]["no NorMuon"]) > 0
assert f"{p_longer['plain decay']:.2f}" == "0.10" and min(p_longer.values()) > 0.09
grid_12 = load_result("newton_schulz", "grid")["data"]["arms"]
others = {at: grid_12[f"muon 0.016 {at}"][0]["val_loss"] for at in ("0.004", "0.008")}
together = [
    losses["laptop_record_4"]["record 4"][n] - losses["laptop"]["today"][n] for n in range(3)
]  # chapter 12's Muon, at these rates
FIVE = ("record 4's quintic", "no NorMuon", "momentum held", "plain decay", "no wide factor")
singly = [sum(change["laptop"][arm][n] for arm in FIVE) for n in range(3)]
assert abs(others["0.004"] - others["0.008"]) < 0.001 and min(others, key=others.get) == "0.008"
assert [f"{each:+.3f}" for each in singly] == ["-0.006", "+0.004", "+0.023"]
assert [f"{each:+.3f}" for each in together] == ["+0.032", "+0.029", "+0.023"]
for n in range(3):
    print(f"seed {n}: five parts singly {singly[n]:+.3f}, all at once {together[n]:+.3f}")

# %% [markdown]
# After 600 steps record 89's Muon ends five hundredths of a nat below chapter 12's, far beyond doubt at nine seeds each. Half of that is not Muon's. Embeddings, gains and biases have half the learning rate here, and chapter 12's grid could not tell the two rates apart: its two single runs are less than a thousandth from each other. Nine seeds can. At today's rates chapter 12's Muon ends 0.025 above today's, and that is what the parts are worth together. The other half is that rate, and the luck of one seed in a grid.
#
# After 2,000 steps, at the rates of 600, record 89's ends a hundredth *above*, though three seeds do not settle that. Half the rate for the matrices mends it: in one run, record 89's Muon then ends 0.004 below chapter 12's with the same seed. That is the best of six rates against chapter 12's at the rates of 600 steps, so it is no lead.
#
# Now the parts. The 2,000 steps ran at the rates that were best for 600. At half the matrices' rate two of three single runs end lower, so the full rate seems too high (lower: not tried). So in the second column a part that makes steps longer looks worse than it is. And parts need not add up. Chapter 12's Muon is today's without five of them: it has the quintic, no NorMuon, held momentum, plain decay and no wide factor. Taken away one at a time they change the loss, in sum, by −0.006, +0.004 and +0.023 with three seeds; all at once by +0.032, +0.029 and +0.023.
#
# The $p$ are [Dunnett's](01_are_you_faster.py), for the nine arms of a length. They take runs for independent and normal; as arms share seeds with the whole, $p$ is rather too large. The two lengths share seeds as well, and are not pooled.
#
# - **NorMuon** is missed after 600 steps ($p = 0.007$). After 2,000 its three pairs point the same way and settle nothing ($p = 0.13$).
# - **The polynomials** show no worth here, as the exact polar factor showed none in chapter 12. Record 4's quintic does as well or a little better in five of six pairs, with steps that are a tenth shorter. Even the first three of the five do: no worse in the long run, and better in two of three pairs in the short one, where three *quintics* cost more than a tenth of a nat in chapter 12. In the contest Polar Express is worth ten steps of 1,680; the record's author could not repeat the paper's larger gain. Near the end a step is worth a ten-thousandth there, so that is a thousandth, and three seeds cannot see it.
# - **Decay**: nothing is shown, not even in the long run, which ends a hundredth higher without any and a hundredth lower with plain decay ($p = 0.10$). At this peak rate the cautious one takes a fifth of what the plain one takes from attention, and two fifths and three quarters from the MLP's two matrices (it contains their multiple of the rate). Where signs are random it leaves out half of that.
# - **Momentum's ramps** lose all short pairs and win all long ones: unsettled.
# - **The factors** of the MLP's rates help a great deal at first. In the long run that is not seen; but there the rate seems too high and without factors the MLP's is lower, so this does not tell whether they hurt or the rate does.

# %%
ARMS = {"float32": "float32", "bf16 with mantissa": "split", "bf16 alone": "bfloat16"}
of_weights = {label: losses["laptop_weights"][arm] for label, arm in ARMS.items()}
whole_32, with_mantissa, alone = of_weights.values()
blunted = [b - w for b, w in zip(alone, with_mantissa)]
kept = [w - f for w, f in zip(with_mantissa, whole_32)]
p_bits = ttest_1samp(blunted, 0).pvalue
assert min(blunted) > 0.015 and p_bits < 0.005 and max(map(abs, kept)) < 0.004
for label, sample in of_weights.items():
    print(f"weights in {label:18} {describe(sample)}")
print(f"the mantissa: p = {p_bits:.3f}, paired t-test, three pairs")

# %% [markdown]
# bfloat16 weights alone cost nearly two hundredths of a nat, in each of three pairs. With the mantissa buffer the run is back within a few thousandths of one with float32 weights. (All three multiply in bfloat16.) It is not the products that need the precision but the *sum* of many small steps.
#
# So the answer to the prediction: NorMuon and the mantissa are worth about two hundredths each, and of decay and the polynomials 600 steps show nothing. In pairs three seeds tell the mantissa from nothing; NorMuon, beside nine of the whole.

# %% [markdown]
# ### On a GPU, by the clock
#
# All of it together, then, where you would train: `small_gpt2`, 51 million parameters, 100 million tokens, on one H100, against AdamW for everything. There all of `RECORD_MUON` is on.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Validation loss of the preset small_gpt2 under AdamW and under record 89's Muon, against steps and against seconds of training on one H100"}}
ends, curves = {}, {}
for rule, name in (("AdamW", "small_gpt2_adamw"), ("Muon", "small_gpt2_muon")):
    result = load_result("speedrun", name)
    curves[rule] = [run["curve"] for run in result["data"]["runs"]]
    ends[rule] = describe(curve[-1]["val_loss"] for curve in curves[rule])
mean_end = ends["AdamW"].mean


def reached(curve: list[dict], loss: float, key: str) -> float:
    """Where a curve first is at a loss, on a line between two validations."""
    a, b = next((a, b) for a, b in zip(curve, curve[1:]) if b["val_loss"] <= loss)
    share = (a["val_loss"] - loss) / (a["val_loss"] - b["val_loss"])
    return a[key] + share * (b[key] - a[key])


ahead = {
    key: [reached(c, mean_end, key) for c in curves["Muon"]] for key in ("step", "train_time_ms")
}
whole_run = {key: curves["AdamW"][0][-1][key] for key in ahead}
saved = {key: 1 - sum(values) / len(values) / whole_run[key] for key, values in ahead.items()}
fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.3), sharey=True, layout="constrained")
for axis, key, unit in zip(axes, ahead, (1, 1000)):
    for n, (rule, of_seed) in enumerate(curves.items()):
        for curve in of_seed:
            points = [(c[key] / unit, c["val_loss"]) for c in curve if c["step"]]
            axis.plot(*zip(*points), color=f"C{n}", label=rule if curve is of_seed[0] else None)
    axis.axhline(mean_end, color="0.5", lw=0.8, ls=":")
axes[0].set_ylim(3.7, 5.7)
axes[0].set_xlabel("steps of 65,536 tokens")
axes[1].set_xlabel("seconds of training, one H100")
axes[0].set_ylabel("validation loss (nats a token)")
axes[0].legend()
fig.suptitle(
    f"Muon is where AdamW ends after {1 - saved['step']:.0%} of the steps, {1 - saved['train_time_ms']:.0%} of the time"
)
plt.show()

# %%
seconds = {rule: curves[rule][0][-1]["train_time_ms"] / 1000 for rule in curves}
assert 0.035 < seconds["Muon"] / seconds["AdamW"] - 1 < 0.045
gap = ends["AdamW"].mean - ends["Muon"].mean
assert 0.17 < gap < 0.19 and ends["AdamW"].n == ends["Muon"].n == 3
assert 0.29 < saved["step"] < 0.33 and 0.26 < saved["train_time_ms"] < 0.30
cooldown = result["data"]["runs"][0]["config"]["schedule"]["cooldown_frac"]
assert abs(saved["step"] / cooldown - 0.5) < 0.05, "of the rate is left there"
p_gpu = p_difference(ends["AdamW"], ends["Muon"])
grid_of_12 = load_result("newton_schulz", "corpus_adamw")["data"]["arms"]
at_12 = {point: runs[0]["val_loss"] for point, runs in grid_of_12.items()}
assert 0.005 < at_12["adamw 0.002 0.004"] - at_12["adamw 0.001 0.008"] < 0.015
print(f"AdamW {ends['AdamW']}, Muon {ends['Muon']}: {gap:.3f} lower, p = {p_gpu:.0e}")
print(measured_on(result))

# %% [markdown]
# Muon takes 4% longer for a step and ends 0.18 nats lower. It reaches AdamW's final loss after seven tenths of the steps, with its rate fallen by half: a run made to end there would probably be lower. Both rules read the same text in the same order, on the same schedule. Each was tuned in runs of half the length, one a point, factors of two apart: AdamW at five points, Muon at six. Muon's best, 0.016 for the matrices and 0.004 for the rest, has a worse neighbour on each of its four sides. Of AdamW's best, 0.002 and 0.004, two of four neighbours were tried, and half of both; all were worse. Half the matrices' rate and twice the rest's were not tried. The text is English of several kinds and *not* FineWeb.

# %% [markdown]
# ## What it buys
#
# In the contest, by the ladder {cite}`moddednanogpt`:

# %%
from datetime import date

from speedrun.lab.results import public_table

ladder = {row["record"]: row for row in public_table("records") if row["contributors"]}
steps_at = {n: int(row["steps"]) for n, row in ladder.items() if row["steps"]}
WHAT = {38: "Polar Express", 41: "NorMuon", 42: "rates", 43: "cautious decay"}
WHAT |= {50: "Adam's decay", 57: "mantissa"}
by_record = {}
for n, what in WHAT.items():
    by_record[n] = steps_at[str(n)] - steps_at[str(n - 1)]
    seconds = float(ladder[str(n)]["record_time_s"]) - float(ladder[str(n - 1)]["record_time_s"])
    print(
        f"record {n} {what:15} {by_record[n]:+} of {steps_at[str(n - 1)]:,} steps, {seconds:+.1f} s"
    )
assert by_record == {38: -10, 41: -15, 42: -30, 43: -40, 50: -20, 57: 15}
assert (steps_at["37"], steps_at["40"], steps_at["42"]) == (1680, 2330, 2285)
stayed = date.fromisoformat(ladder["38"]["date"]) - date.fromisoformat(ladder["4"]["date"])
assert 345 < stayed.days < 365

# %% [markdown]
# On one machine, before and after, the author of records 38, 42 and 43 measured 1.0, 3.3 and 2.2 s. Record 42 halved the rate and doubled it for the MLP's first matrix; record 50 gave cautious decay to Adam's parameters, too. bfloat16 weights are half the bytes to gather, and need no casting.
#
# These are records, not ablations. Of record 43's 40 steps its author gives 10 to 15 to the decay's fall with the rate. Record 42 also kept the rate flat in the extension and lengthened the fall; record 38 also raised the rate; record 57's second is shared with an optimizer that interleaves the communication of Adam and Muon, and it took 15 steps more.
#
# ## What it costs, and when it fails
#
# In arithmetic it costs next to nothing. NorMuon reads the update a few times more, and cautious decay is a comparison. The mantissa is two bytes a weight to read and to write, beside the model's two.

# %%
ms = {
    arm: sorted(took)[len(took) // 2] for arm, took in results["laptop_pace"]["data"]["ms"].items()
}
dearer = ms["today"] / ms["record 4"] - 1
for arm, took in ms.items():
    print(f"{arm:9} {took:.1f} ms a step")
assert abs(dearer) < 0.02, "less than such medians differ from one day to the next"
on_gpu = load_result("many_gpus", "step")["data"]
update = sorted(took for took, _ in on_gpu["ranks"]["1"]["tied"]["even"])
stock = sorted(on_gpu["stock"]["parts"]["Muon"])
typical_ms = [times[len(times) // 2] for times in (update, stock)]
assert [f"{each:.0f}" for each in typical_ms] == ["3", "33"]
banks = ("attention_qkv", "attention_out")
square = max(spread(polar_express(momenta[name])) for name in banks)
assert square < 1.4 and max(spread(exact[name]) for name in banks) < 1.1
print(
    f"a step with record 89's Muon takes {dearer:+.1%} against record 4's; {measured_on(results['laptop_pace'])}"
)
print(f"attention: rows of an update differ by a factor of {square:.2f} at most")

# %% [markdown]
# The Gram form is not in these times: on a CPU float16 is slow, and squares of 128 save nothing. On one H100 the whole update of matrices of the record's size, with the Gram form, NorMuon, decay and mantissas, takes 3 to 4 ms; PyTorch's Muon takes 33 ([chapter 20](20_many_gpus.py)).
#
# It fails where there is nothing to repair. Rows of a square orthogonal matrix are all of length 1, and those of attention's updates differ only as far as some directions stay short. So NorMuon does little there: it has something to do where one side is longer than the other. And normalising rows assumes that a neuron whose step is short *should* move more. A neuron that hardly ever fires, whose gradient is mostly noise, is moved as far as any other.

# %% [markdown]
# ## What did not work
#
# Without the mantissa record 57 was clearly worse, as here. Adam's moments in bfloat16 cost 0.0009 (record 56). A momentum that is damped whenever the attention window changes did not help (record 31's trials), nor did orthogonalising each head's share of all four attention matrices by itself (record 48's).
#
# ## Exercises
#
# 1. How many polynomials does it take? Write `quintics_needed(low, error)`: the number of best quintics, one after the other and without margins, until all singular values from `low` to 1 are within `error` of 1 (none, if they are so already). Then see what each further decimal of `low` costs, for an error of 0.15.


# %% tags=["solution"]
def quintics_needed(low: float, error: float) -> int:
    """How many best quintics bring [low, 1] to within `error` of 1."""
    high, count, strays = 1.0, 0, 1 - low
    while strays > error:
        *_, strays = best_quintic(low, high)
        low, high, count = 1 - strays, 1 + strays, count + 1
    return count


# %%
cases = {(0.5, 0.5): 0, (0.4, 0.5): 1, (1e-2, 0.15): 4, (1e-3, 0.15): 5, (1e-4, 0.15): 7}
cases[1e-3, 0.12] = 5  # which margins would miss
needed = {case: quintics_needed(*case) for case in cases}
for (low, error), right in cases.items():
    got = needed[low, error]
    assert got == right, f"from {low:g} to within {error} of 1: {right} quintics, not {got}"
print(", ".join(f"{n} for {low:g}" for (low, error), n in needed.items() if error == 0.15))

# %% [markdown]
# 2. What does caution do to a weight that has nothing to learn? Let a weight take steps of size $r$ whose sign is a coin's, and decay by a share $\lambda$ a step. Write `at_rest(rate, decay, careful)`: the root mean square at which many such weights settle, by simulation. Plain decay settles at $r/\sqrt{2\lambda}$. And `matching_decay`: the $\lambda$ with which cautious decay settles where plain decay of 0.005 does, for $r = 0.01$.


# %% tags=["solution"]
def at_rest(rate: float, decay: float, careful: bool) -> float:
    """Root mean square of weights after many random steps of one size, with plain or cautious decay."""
    draw = torch.Generator().manual_seed(0)
    w = torch.zeros(4000)
    for _ in range(3000):
        u = torch.randint(0, 2, w.shape, generator=draw) * 2.0 - 1.0
        w = w - rate * (cautious_decay(w, u, decay / rate) if careful else u + decay / rate * w)
    return w.square().mean().sqrt().item()


matching_decay = 0.01  # twice as much

# %%
free, careful = at_rest(0.01, 0.005, False), at_rest(0.01, 0.005, True)
assert abs(free / 0.1 - 1) < 0.05, f"plain decay settles at r/√(2λ) = 0.1, yours at {free:.4g}"
far = at_rest(0.02, 0.005, False)
assert abs(far / 0.2 - 1) < 0.05, f"with steps twice as long it settles at 0.2, yours at {far:.4g}"
assert 1.3 < careful / free < 1.6, (
    f"caution lets weights settle between 1.3 and 1.6 times as high, yours {careful / free:.2f} times"
)
strong = at_rest(0.01, 0.3, True) / at_rest(0.01, 0.3, False)
assert 1.65 < strong < 1.9, (
    f"at λ = 0.3 cautious decay settles between 1.65 and 1.9 times as high as plain decay, yours {strong:.2f} times: which weights does it spare?"
)
assert matching_decay is not ..., "exercise: write matching_decay"
match = at_rest(0.01, matching_decay, True)
assert abs(match / free - 1) < 0.1, (
    f"cautious decay of {matching_decay} settles at {match:.3f}, not at the plain decay's {free:.3f}"
)
print(f"plain {free:.3f}, cautious {careful:.3f}: about as if decay were half as strong")

# %% tags=["remove-cell"]
import shutil

shutil.rmtree(scratch)

# %% [markdown]
# ## Since then
#
# Record 48 stores all matrices the other way round, and normalises rows where records 41 to 47 normalised columns. Record 78 shortens NorMuon's memory from 0.95 to 0.9. Record 80 (\@samacqua) orthogonalises queries and keys by pairs of heads, which gives it 60 matrices of 256 × 768 where there were 20 square ones. Record 89 has all of it but two things: no Gram form, since it multiplies in bfloat16 in the plain form (and rounds NorMuon's result to it), and when it splits a float32 it truncates where we round. Record 92 (\@devenpzak) has six polynomials, mixes a second, slower momentum in later in the run, and lets that one say which weights decay.
