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
# # Schedules: rate, momentum, batch, length
#
# ```{admonition} Cost box
# Any machine: under half a minute on two CPU cores, no GPU. The comparison of shapes in the last figure is eighteen short trainings on a CPU, and is committed.
# Records 4 and 9 (Keller Jordan and others), 13 (@fernbear.bsky.social), 19 (@YouJiacheng), 21 (@leloykun), 26 and 39 (@classiclarryd), 46 and 53 (@varunneal), 72 (@dualverse-ai & AI System Station), 88 (@jvarho).
# ```
#
# ## The problem
#
# A step of record 89 takes 31.4 ms in the first third of its log, 56.9 ms in the second, 82.6 ms in the last. The merged run has 1,285 steps, and eight of its settings change while it runs. What if nothing changed, and every step were like the last?

# %%
import math

import numpy as np
import torch

from speedrun.lab.results import public_table

ladder = {row["record"]: row for row in public_table("records") if row["contributors"]}
seconds_of = {int(record): float(row["record_time_s"]) for record, row in ladder.items()}
STEP_MS = {131_072: 31.4, 262_144: 56.9, 393_216: 82.6}  # record 89's log, by tokens a step
thirds = (423, 424, 423 + 15)
as_it_is = sum(count * ms for count, ms in zip(thirds, STEP_MS.values())) / 1000
all_alike = sum(thirds) * STEP_MS[393_216] / 1000
level = max(record for record, seconds in seconds_of.items() if seconds > all_alike)
assert abs(as_it_is / seconds_of[89] - 1) < 0.01, "close to the record's time"
assert 105.5 < all_alike < 106.5 and level == 59
print(f"{as_it_is:.1f} s as it is (the record: {seconds_of[89]} s), {all_alike:.0f} s if all alike")
print(f"record {level} took {seconds_of[level]} s, record {level + 1} {seconds_of[level + 1]} s")

# %% [markdown]
# (The log is that of the proposal; the merged run does a little more in a step.) **106 seconds**. Even if the run learned as much in them, the contest would stand where it stood thirty records ago. No schedule is learned. Each is a function of the number of the step, written down beforehand, and most were found by trying. Which of them could have been worked out?
#
# ```{admonition} Prediction
# Record 39 read 262,144 tokens in every step. Record 46 reads 131,072 in the first third of its steps, 262,144 in the second and 393,216 in the last: as many on average. **When the batch has tripled, by which factor should the learning rate have grown?** By three, by $\sqrt3$, not at all? And a rate that is held, and then falls along a line to the end: **in which share of the steps should it fall?**
# ```
#
# ## The idea
#
# ### How long should a step be?
#
# Let $g$ be the true gradient, and let the loss be curved by $h$ along a step $s$, so that it changes by $-g\cdot s + \tfrac12 h\lVert s\rVert^2$. We do not have $g$. We have its mean over a batch of $B$ tokens, which is $g$ and an error of squared length $S/B$, where $S$ is the variance that a single token would leave. So what we measure has the squared length
#
# $$
# r^2 = \lVert g\rVert^2 + S/B .
# $$
#
# Adam, Muon and their kind divide by it: their step has the length of the learning rate $\eta$, whatever the gradient. The error is at right angles to $g$ on average, so the expected gain is $\eta\,\lVert g\rVert^2/r - \tfrac12 h\eta^2$, and the best rate is
#
# $$
# \eta^* = \frac{\lVert g\rVert^2}{h\,r} = \frac{\lVert g\rVert}{h}\,\frac{1}{\sqrt{1 + B^*/B}}, \qquad B^* = \frac{S}{\lVert g\rVert^2}.
# $$
#
# $B^*$ is the batch at which signal and error are equally long, the *noise scale* {cite}`mccandlish2018`. Far below it the best rate grows like $\sqrt B$; far above, not at all. (Plain gradient descent does not divide. Its best rate is $\lVert g\rVert^2/hr^2$, which grows like $B$ itself. That is why one reads of a linear rule and of a square-root rule {cite}`malladi2022`: they are about different optimizers.)


# %%
def best_rate(batch: float, noise_scale: float) -> float:
    """The best rate of an optimizer that divides by the gradient's length, in units of |g| / h."""
    return 1 / math.sqrt(1 + noise_scale / batch)


generator = torch.Generator().manual_seed(0)
signal = torch.randn(40_000, generator=generator)
signal /= signal.norm()
for batch in (250, 1000, 4000):  # h = 1, |g| = 1, S = 1000: the noise scale is 1000
    error = torch.randn(40_000, generator=generator) * math.sqrt(1000 / batch / 40_000)
    step = (signal + error) / (signal + error).norm()
    best = (signal @ step).item()  # where the gain η g·step − η²/2 is largest
    assert abs(best - best_rate(batch, 1000)) < 0.02
    print(
        f"batch {batch / 1000:4.2f} B*: best rate {best:.3f}, {best_rate(batch, 1000):.3f} derived"
    )

# %% [markdown]
# Record 46 multiplied its rate by 1.51 and 1.93 when the batch had doubled and tripled; since record 53 the factors are 1.52 and 1.73. Which rule is that?

# %%
rule = {(ratio, power): ratio**power for ratio in (2, 3) for power in (0.5, 0.6)}
assert {key: f"{factor:.2f}" for key, factor in rule.items()} == {
    (2, 0.5): "1.41",
    (2, 0.6): "1.52",
    (3, 0.5): "1.73",
    (3, 0.6): "1.93",
}
steepest = max(best_rate(2 * b, 1.0) / best_rate(b, 1.0) for b in np.logspace(-6, 6, 1000))
assert 1.4142 < steepest < math.sqrt(2)
print(", ".join(f"{ratio}^{power} = {factor:.2f}" for (ratio, power), factor in rule.items()))

# %% [markdown]
# Two rules. 1.73 is the square root of three. 1.52 is the power 0.6 of two, and more than the derivation ever allows, at any noise scale. The power 0.6 was tried and kept; in the last third it was later taken back to the root. In the last third, as we shall see, the rate is falling anyway, so that trimming the factor there is hard to tell from falling sooner.
#
# The formula says more. Far below the noise scale $\eta^* = \lVert g\rVert^2\sqrt{B}\,/\,h\sqrt S$. So the rate should *fall* as the gradient does, by its square, and *jump* when the batch grows. Both at once: a falling line with jumps is a saw.
#
# ### Why the batch should grow
#
# Put the best rate back. A step then gains $\lVert g\rVert^2/2h$ times $B/(B + B^*)$. At the noise scale half of the gain is lost to noise. Far below it every token counts in full; far above it more tokens buy nothing. As training goes on $\lVert g\rVert$ falls, so $B^*$ grows: a batch that is too large for the beginning is too small for the end.
#
# How large is $B^*$ here? Years before the contest, a fit to many language models gave $2\cdot10^8$ tokens divided by the loss to the power $1/0.21$ {cite}`kaplan2020`. It was made on another text, with Adam. Record 89's log knows the loss at the end of each third:

# %%
curve = [row for row in public_table("curves") if row["record"] == "89"]
at, losses = ([float(row[key]) for row in curve] for key in ("step", "val_loss"))
scheduled = at[-1] - 15  # of the logged run, which was longer than the merged one
ends = [np.interp(scheduled * n / 3, at, losses) for n in (1, 2)] + [losses[-1]]
scales = [2e8 / loss ** (1 / 0.21) for loss in ends]
shares = [batch / scale for batch, scale in zip(STEP_MS, scales)]
assert 0.5 < min(shares) and max(shares) < 0.65
for loss, scale, batch, share in zip(ends, scales, STEP_MS, shares):
    print(
        f"loss {loss:.2f}: noise scale {scale / 1000:3.0f}k; batch {batch / 1000:.0f}k, {share:.0%}"
    )
pairs = zip(STEP_MS, [*STEP_MS][1:], scales)
jumps = [best_rate(after, scale) / best_rate(before, scale) for before, after, scale in pairs]
assert 1.19 < jumps[0] < 1.21 and 1.12 < jumps[1] < 1.14
print(f"where the batch grows the rate should jump by {jumps[0]:.2f}, {jumps[1]:.2f}")

# %% [markdown]
# Each of the three batches, when its third ends, is at a little more than half of what the fit calls the noise scale. This may be luck, and one should not lean on it: at its beginning a third is a good deal closer to its noise scale, or above it. But one, two, three look less arbitrary now. The jumps that the derivation asks for are 1.20 and 1.13. The record's will turn out to be 1.52 and 1.13, so one agrees and one does not. (The derivation knows no momentum, which averages noise away before the step is taken, and takes the curvature to be the same along the signal and the noise.)
#
# ### Rate and batch do the same work
#
# One step is not a training. So take the simplest whole training that can be computed without rolling dice. Sixty directions with curvatures $h_i$ between 1 and a thousandth, all starting at distance 1, and a gradient whose noise is larger where the curvature is, of variance $\nu h_i / B$. A step of gradient descent turns the expected squared distance $v_i$ into
#
# $$
# v_i \leftarrow (1 - \eta h_i)^2\, v_i + \eta^2 \nu h_i / B,
# $$
#
# and the loss is $\tfrac12\sum_i h_i v_i$. Noise that came in at step $t$ is forgotten by $(1-\eta h_i)^2$ in each later step. The last noise stays. That is the whole reason to treat the end of training differently.

# %%
curvature, steps = torch.logspace(0, -3, 60, dtype=torch.float64), 300
PEAKS = torch.logspace(-3, 0, 61, dtype=torch.float64)


def final_loss(peaks, shape, batches, noise):
    """Expected final loss at each peak rate; shape: rates as shares of the peak; batches: (steps) or (peaks, steps)."""
    v, count = torch.ones(len(peaks), 60, dtype=torch.float64), len(shape)
    batches = batches.expand(len(peaks), count)
    for t in range(count):
        rate = (peaks * shape[t])[:, None]
        added = noise * curvature / batches[:, t, None]
        v = (1 - rate * curvature) ** 2 * v + rate**2 * added
    return 0.5 * (curvature * v).sum(-1)


ones = torch.ones(steps, dtype=torch.float64)
walkers = torch.ones(2000, 60, dtype=torch.float64)
for _ in range(steps):
    luck = torch.randn(2000, 60, generator=generator, dtype=torch.float64)
    walkers -= 0.05 * (curvature * walkers + (10 * curvature).sqrt() * luck)
walked = 0.5 * (curvature * walkers.square()).sum(-1).mean().item()
(exact,) = final_loss(torch.tensor([0.05]), ones, ones, 10).tolist()
assert abs(walked / exact - 1) < 0.03
print(f"computed {exact:.3f}; two thousand trainings with dice {walked:.3f}")

# %% [markdown]
# Now ask: with so many tokens and so many steps, how large should each batch be? The noise of step $t$ adds $c_t / B_t$ to the final loss, where $c_t$ counts how much of it survives. To minimise $\sum c_t/B_t$ at a fixed sum of $B_t$, make $B_t$ proportional to $\sqrt{c_t}$. No search is needed:


# %%
def best_batches(peaks, shape):
    """For each peak rate the batches, mean 1, with the lowest final loss: (peaks, steps)."""
    rates = peaks[:, None] * shape
    kept = (1 - rates[..., None] * curvature) ** 2
    after = kept.flip(1).cumprod(1).flip(1) / kept  # what survives of noise that came in at a step
    survives = rates**2 * (after * curvature**2).sum(-1)
    return survives.sqrt() / survives.sqrt().mean(1, keepdim=True)


def falling(share: float, count: int = steps) -> torch.Tensor:
    """Rates as shares of the peak: held, then falling to 0.15 over a share of the steps."""
    left = count - torch.arange(count, dtype=torch.float64)
    return 0.85 * (left / (share * count)).clamp(max=1) + 0.15


shapes = {"rising": falling(1.0).flip(0), "constant": ones}
shapes |= {f"falling over {share:.0%}": falling(share) for share in (0.3, 0.6, 1.0)}
equal, best, growth = {}, {}, {}
for name, shape in shapes.items():
    grid, batches = PEAKS[PEAKS < 0.3], best_batches(PEAKS[PEAKS < 0.3], shape)
    equal[name] = final_loss(grid, shape, ones, 10).min().item()
    found = final_loss(grid, shape, batches, 10)
    best[name], chosen = found.min().item(), batches[found.argmin()]
    growth[name] = (chosen.max() / chosen[0]).item()
    print(f"rate {name:17} equal batches {equal[name]:.3f}, best batches {best[name]:.3f}")
    assert (chosen[-1] == chosen.max()) == (name in ("rising", "constant"))
assert max(best.values()) / min(best.values()) < 1.01
assert list(equal.values()) == sorted(equal.values(), reverse=True), "the more it falls, the better"
assert list(growth.values()) == sorted(growth.values(), reverse=True) and growth["constant"] > 10
print("largest batch against first:", ", ".join(f"{n:.0f}" for n in growth.values()))

# %% [markdown]
# The right column is the lesson. With the best batches the rate may fall, be held, or even *rise*: the losses agree to a per cent. (There is a reason. The surviving noise is then $(\sum_t\sqrt{c_t})^2$ by the number of steps, and while steps are short $\sqrt{c_t}$ is the rate of step $t$ times something that depends on the rates still to come. The sum over all steps depends on the sum of all rates and on nothing else.) A falling rate and a growing batch are two ways of doing one thing, which is to forget the noise
# before the end {cite}`smith2018`. The more of it the rate does, the less is left for the batch: under a constant rate the best batches grow to the last step, under a falling one they grow less, and shrink again near the end.
#
# So a schedule of batches should not be expected to work miracles on top of a rate that falls well. What do thirds of one, two, three bring, against equal batches, at a rate that falls over the last 60%? It depends on what the rate does when the batch grows: nothing, follow its root, or follow the batch. Every peak is tuned for itself.

# %%
gain = {}
for noise in (1, 10, 100):
    for power in (0, 0.5, 1):
        ends_at = []
        for thirds_of in ((1, 2, 3), (2, 2, 2)):
            batches = torch.tensor(thirds_of, dtype=torch.float64).repeat_interleave(steps // 3) / 2
            shape = shapes["falling over 60%"] * batches**power
            ends_at.append(final_loss(PEAKS[PEAKS < 0.6], shape, batches, noise).min().item())
        gain[noise, power] = ends_at[0] / ends_at[1] - 1
    row = ", ".join(f"B^{power} {gain[noise, power]:+.1%}" for power in (0, 0.5, 1))
    print(f"noise {noise:3}: rate with {row}")
assert gain[1, 0] < gain[1, 0.5] < gain[1, 1] < 0, "little noise: leave the rate alone"
assert gain[100, 1] < gain[100, 0.5] < gain[100, 0] and abs(gain[100, 1]) < 0.01
assert (int(ladder["45"]["steps"]), int(ladder["46"]["steps"])) == (2225, 2225 - 65)

# %% [markdown]
# In this toy the answer to the prediction's first half depends on the noise. Where there is little, the batch may grow and the rate should not follow; where there is nothing else, it should follow in proportion, and even then the order of the batches brings nothing. A rule that is right for one step is not right for a training: raising the rate with the batch takes back part of what the fall has done. Record 46, with the power 0.6 and a longer fall, needed 65 steps fewer of 2,225, which is 1.8 seconds by its own account.
#
# ### Travel first, then come down
#
# With the rate held, $v_i$ stops falling where the noise that comes in equals what is forgotten, at $\eta\nu/B(2-\eta h_i)$. That floor is proportional to the rate. A high rate travels fast along the flat directions and hovers above the floor of the valley; lowering the rate lets it down.

# %%
floor_of = {}
for rate in (0.01, 0.1):
    v = rate * 10 / (2 - rate * curvature)
    stays = (1 - rate * curvature) ** 2 * v + rate**2 * 10 * curvature
    assert torch.allclose(stays, v), "what comes in is what is forgotten"
    floor_of[rate] = 0.5 * (curvature * v).sum().item()
assert 9.5 < floor_of[0.1] / floor_of[0.01] < 11
print({rate: f"floor {loss:.3f}" for rate, loss in floor_of.items()})

# %% [markdown]
# How much of a run should the descent be? In the toy that can be searched, peak and share together:

# %%
best_share = {}
for count in (150, 600, 3000):
    ends_at = {}
    for share in [n / 10 for n in range(1, 11)]:
        ends_at[share] = final_loss(PEAKS, falling(share, count), torch.ones(count), 1).min().item()
    best_share[count] = min(ends_at, key=ends_at.get)
    print(f"{count:5} steps: best if the rate falls over {best_share[count]:.0%} of them")
found = list(best_share.values())
assert found == sorted(found, reverse=True) and found[0] > found[-1] > 0.3

# %% [markdown]
# The longer the run, the smaller the share of its fall. The journey grows with the run, and the descent grows less.
#
# Half a cosine, which the baseline uses, lets the rate fall from the beginning. It has a second property that matters to anybody who is looking for something: every one of its rates depends on the length of the run. Whoever wants to know what twice the steps would have brought has to begin again. A *trapezoid* is held and then falls along a line. Until it falls it does not know how long the run will be, so it can be continued, or ended early from any point {cite}`hagele2024`. The contest has done so since record 4, and without a warm-up.
#
# Its runs became ever shorter. The share of the fall has moved fifteen times:

# %% tags=["hide-input"] mystnb={"image": {"alt": "Share of steps in which the learning rate falls, and the rate's floor, by record number"}}
import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style

COOLDOWN = {4: 0.29, 5: 0.28, 8: 0.29, 11: 0.30, 13: 0.37, 14: 0.39, 15: 0.40, 26: 0.45}
COOLDOWN |= {31: 0.50, 39: 0.40, 40: 0.45, 42: 0.50, 46: 0.55, 54: 0.50, 62: 0.55, 73: 0.60}
FLOOR = {4: 0.0, 19: 0.10, 72: 0.15}
assert len(COOLDOWN) - 1 == 15 and max(COOLDOWN.values()) == COOLDOWN[73] == 0.60
figure_style()
fig, axis = plt.subplots(figsize=(5.5, 2.9))
for name, history in {
    "its fall, share of the steps": COOLDOWN,
    "its floor, share of the peak": FLOOR,
}.items():
    records = [*history, 89]
    axis.step(records, [*history.values(), [*history.values()][-1]], where="post", label=name)
axis.set_xlabel("record")
axis.set_ylim(-0.02, 0.75)
axis.yaxis.set_major_formatter("{x:.0%}")
axis.legend(loc="upper left")
axis.set_title(f"the fall of the rate: from {COOLDOWN[4]:.0%} to {COOLDOWN[73]:.0%} of the steps")
plt.show()

# %%
held = {4: 6200 - 1800, 89: round(0.4 * 1270)}
falls = {4: 1800, 89: 1270 - held[89]}
assert round(falls[4] / 6200, 2) == COOLDOWN[4] and held[89] == 508
assert 8.6 < held[4] / held[89] < 8.7 and 2.3 < falls[4] / falls[89] < 2.4
print(f"held for {held[4]:,} steps, then {held[89]}; falling for {falls[4]:,}, then {falls[89]}")

# %% [markdown]
# As the run shrank, it was the plateau that went: to less than an eighth, while the fall shrank to less than a half. That is what the toy does, too: the descent shrinks far less than the journey. The floor rose from zero to 0.1 with record 19 and to 0.15 with record 72: steps at a rate near zero do not move, and are paid in full.
#
# ## The code
#
# ### The trainer's rate
#
# First what the trainer of this book uses today: a warm-up, and one of the two shapes. The options say which. The peak, the warm-up and the last rate are AdamW's ([chapter 03](03_baseline.py)), and whatever has these three attributes will do.

# %%
#| default_exp optim.schedule
#| export
import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple, Protocol


@dataclass(frozen=True)
class ScheduleOptions:
    """How the learning rate comes down."""

    shape: Literal["cosine", "trapezoid"] = "cosine"
    """cosine: from the end of the warm-up on. trapezoid: held, then along a line."""
    cooldown: float = 0.6
    """trapezoid: the share of the steps in which the rate falls."""


class Peak(Protocol):
    """What `learning_rate` asks of an optimizer's options."""

    @property
    def lr(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def final_lr(self) -> float: ...


# %%
#| export
def cooled(peak: float, floor: float, step: int, begin: int, end: int) -> float:
    """`peak` until step `begin`, then a line that is at `floor` in step `end` and stays there."""
    if step <= begin or step >= end:
        return floor if step >= end else peak
    t = (step - begin) / (end - begin)
    return (1 - t) * peak + t * floor


def learning_rate(step: int, steps: int, optim: Peak, schedule: ScheduleOptions) -> float:
    """The rate of a step (0 … steps − 1): a line up, then the schedule's shape down to final_lr · lr."""
    warmup = optim.warmup_steps
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if schedule.shape == "trapezoid":
        begin = max(warmup, steps - round(schedule.cooldown * steps))
        return optim.lr * cooled(1.0, optim.final_lr, step, begin, steps)
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return optim.lr * (optim.final_lr + (1 - optim.final_lr) * cosine)


# %%
from speedrun.model.baseline import AdamWOptions

plan, cosine = AdamWOptions(lr=1.0, warmup_steps=100, final_lr=0.1), ScheduleOptions()
trapezoid = ScheduleOptions(shape="trapezoid", cooldown=0.6)
rates = [learning_rate(step, 1000, plan, trapezoid) for step in range(1000)]
assert rates[0] == 0.01 and rates[99:401] == [1.0] * 302 and rates[401] < 1
assert all(a > b for a, b in zip(rates[400:], rates[401:])) and 0.1 < rates[-1] < 0.102
assert math.isclose(rates[700], 0.55), "half-way down after half of the fall"
twice = [learning_rate(step, 2000, plan, trapezoid) for step in range(801)]
assert twice[:400] == rates[:400] and twice[100:] == [1.0] * 701
knows = [learning_rate(step, 1000, plan, cosine) for step in range(1000)]
assert all(a != learning_rate(n, 2000, plan, cosine) for n, a in enumerate(knows) if n > 100)
print("for 400 steps the trapezoid does not know whether it has 1,000 or 2,000; the cosine knows")

# %% [markdown]
# ### Training as a list of stages
#
# Record 89 needs more. Eight of its settings depend on the step: batch, rate, momentum, the cap on the length of a document, two attention windows, the weights of the tokens that the model has to predict ahead (record 53), and the weight of an extra target, the longest prefix of the right token (record 88). (The softmax scale and the rotary frequencies follow the windows, and the borders set off what is not a number, such as untying the head. Other chapters have that.) Written into the loop they would be eight `if`s with eight ideas of where a third begins. Written as data they are a table with a row per stage, and functions of a step that nothing else can influence. That is worth insisting on. A schedule without state can be plotted before the run, resumed in its middle, and compiled for each of its shapes before the clock starts.


# %%
#| export
@dataclass(frozen=True)
class Stage:
    """A stretch of training. What changes inside it is a pair: its value at the stage's start, and at its end."""

    share: float
    """Share of the scheduled steps. The last stage has none: it is the extension."""
    batch_tokens: int
    """Tokens a step."""
    rate: float
    """Learning rate before it falls, as a multiple of the base rate. The extension's is the floor, whatever stands here."""
    cap_tokens: int
    """Longest stretch of one document."""
    windows: tuple[int, int]
    """How far short and long attention look back, in blocks of 128 tokens."""
    ahead: tuple[tuple[float, ...], tuple[float, ...]] = ((1.0,), (1.0,))
    """Weights in the loss of the next token, the one after it, and so on."""
    prefix: tuple[float, float] = (0.0, 0.0)
    """Weight in the loss of the next token's longest prefix that is a token."""


@dataclass(frozen=True)
class Schedule:
    """Training as a list of stages, and what runs across them."""

    stages: tuple[Stage, ...]
    """One after the other; the last is the extension, which may have no steps."""
    scheduled: int
    """Steps of all stages but the last."""
    extension: int = 0
    """Steps of the last stage, at the floor of the rate."""
    cooldown: float = 0.6
    """Share of the scheduled steps in which the rate falls."""
    floor: float = 0.0
    """Where it falls to, as a multiple of the base rate."""
    momentum: tuple[float, float] = (0.85, 0.95)
    """Lowest and highest."""
    momentum_steps: tuple[int, int] = (300, 50)
    """First steps, in which momentum rises, and last steps, in which it falls."""

    def __post_init__(self):
        check_schedule(self)


# %% [markdown]
# A table that makes no sense should be refused when it is written, not in step 847. Where do the stages begin? At the rounded multiples of their shares, so that no step is lost or done twice, whatever the shares.


# %%
#| export
def check_schedule(schedule: Schedule) -> None:
    """Refuse, with a ValueError that says why, what no run could follow."""
    stages, (low, high) = schedule.stages, schedule.momentum
    shares, rates = ([getattr(stage, name) for stage in stages] for name in ("share", "rate"))
    weights = [w for s in stages for w in (*s.ahead[0], *s.ahead[1], *s.prefix)]
    sound = {
        "two stages or more": len(stages) >= 2,
        "shares above 0, and 0 for the last stage": min(shares[:-1], default=0) > 0 == shares[-1],
        "shares that add up to 1": abs(math.fsum(shares) - 1) < 1e-9,
        "a step or more for each stage": schedule.extension >= 0
        and all(schedule.scheduled * share >= 1 for share in shares[:-1]),
        "0 < cooldown ≤ 1": 0 < schedule.cooldown <= 1,
        "0 ≤ floor ≤ every rate": 0 <= schedule.floor <= min(rates, default=0),
        "weights of 0 or more": min(weights, default=0) >= 0,
        "0 ≤ lowest ≤ highest momentum < 1": 0 <= low <= high < 1,
        "momentum_steps of 0 or more": min(schedule.momentum_steps) >= 0,
        "batches, caps and windows of 1 or more": all(
            min(s.batch_tokens, s.cap_tokens, *s.windows) >= 1 for s in stages
        ),
        "weights for equally many tokens ahead": all(
            len(s.ahead[0]) == len(s.ahead[1]) > 0 for s in stages
        ),
    }
    wrong = [what for what, holds in sound.items() if not holds]
    if wrong:
        raise ValueError(f"a schedule needs {'; '.join(wrong)}")


# %%
#| export
def borders(schedule: Schedule) -> tuple[int, ...]:
    """The first step of each stage, and at the end the number of steps."""
    ends = list(accumulate(stage.share for stage in schedule.stages[:-1]))
    ends[-1] = 1.0  # whatever the rounding of the shares
    scheduled = [round(schedule.scheduled * end) for end in ends]
    return (0, *scheduled, schedule.scheduled + schedule.extension)


def fall_begins(schedule: Schedule) -> int:
    """The last step at the full rate."""
    return schedule.scheduled - round(schedule.cooldown * schedule.scheduled)


def stage_at(schedule: Schedule, step: int) -> tuple[Stage, float]:
    """The stage of a step, and the share of the stage that is over: 0 at its first step, below 1 at its last."""
    edges = borders(schedule)
    if not 0 <= step < edges[-1]:
        raise ValueError(f"step {step} is none of the {edges[-1]} steps")
    n = bisect_right(edges, step) - 1
    return schedule.stages[n], (step - edges[n]) / (edges[n + 1] - edges[n])


# %% [markdown]
# Record 89, whole:

# %%
RECORD_89 = Schedule(
    stages=(
        Stage(1 / 3, 131_072, 1.0, 896, (1, 3), ((1, 0.5, 0.25), (1, 0.5, 0)), (0.25, 0.25)),
        Stage(1 / 3, 262_144, 1.52, 2048, (3, 7), ((1, 0.5), (1, 0)), (0.25, 0)),
        Stage(1 / 3, 393_216, 1.73, 2048, (5, 11)),
        Stage(0, 393_216, 1.73, 2048, (6, 13)),
    ),
    scheduled=1270,
    extension=15,
    floor=0.15,
)
edges = borders(RECORD_89)
assert edges == (0, 423, 847, 1270, 1285)
assert [after - before for before, after in zip(edges, edges[1:])] == [423, 424, 423, 15]
assert stage_at(RECORD_89, 422) == (RECORD_89.stages[0], 422 / 423)
assert stage_at(RECORD_89, 423) == (RECORD_89.stages[1], 0.0)
for words, nonsense in {
    "0 for the last stage": {"stages": RECORD_89.stages[:3]},
    "0 < cooldown ≤ 1": {"cooldown": 1.5},
    "lowest ≤ highest momentum": {"momentum": (0.95, 0.85)},
    "a step or more for each stage": {"scheduled": 2},
    "0 ≤ floor ≤ every rate": {"floor": 1.1},
}.items():
    try:
        Schedule(**(vars(RECORD_89) | nonsense))
        raise AssertionError("accepted")
    except ValueError as error:
        assert words in str(error)
        print(error)

# %% [markdown]
# ### The rate is a saw
#
# The rate of a stage and the fall are independent. The fall begins after 40% of the scheduled steps and mixes the stage's rate with the floor; the stage's rate jumps after 33% and 67%. So it jumps once before the fall begins and once in its midst:


# %%
#| export
def rate_at(schedule: Schedule, step: int) -> float:
    """The learning rate of a step, as a multiple of the base rate."""
    stage, _ = stage_at(schedule, step)
    return cooled(stage.rate, schedule.floor, step, fall_begins(schedule), schedule.scheduled)


# %%
marks = (0, 422, 423, 508, 509, 846, 847, 1269, 1270, 1284)
saw = {step: round(rate_at(RECORD_89, step), 4) for step in marks}
assert [saw[step] for step in (0, 422, 423, 508)] == [1.0, 1.0, 1.52, 1.52] and saw[509] < 1.52
assert (saw[846], saw[847], saw[1269]) == (0.9123, 1.0271, 0.1521)
assert saw[1270] == saw[1284] == 0.15
tooth = [saw[423] / saw[422], saw[847] / saw[846]]
against_root = [tooth[0] / math.sqrt(2), tooth[1] / math.sqrt(1.5)]
assert 1.07 < against_root[0] < 1.08 and 0.91 < against_root[1] < 0.93
print(saw)
print(f"jumps by {tooth[0]:.2f} and {tooth[1]:.2f}; the root of the batch: 1.41 and 1.22")

# %% [markdown]
# Divide the rate by the root of the batch and the teeth nearly vanish: what remains of them is 8% up, and 8% down.
#
# ### Momentum
#
# A running mean with momentum $m$ gives the gradient of $k$ steps ago the weight $(1-m)\,m^k$. Its mean age is $m/(1-m)$, and it shrinks the variance of independent noise by $(1-m)/(1+m)$. More momentum, less noise, older news. (Nesterov's form, which Muon takes, mixes the newest gradient in once more and is fresher by a factor of $m$.)


# %%
#| export
def between(step: int, steps: int, ends: tuple[float, float], ramps: tuple[int, int]) -> float:
    """A line from ends[0] up to ends[1] over the first ramps[0] steps, and a line back over the last ramps[1]."""
    (low, high), (rising, falling) = ends, ramps
    up = step / rising if rising else 1.0
    down = (steps - step) / falling if falling else 1.0
    return low + (high - low) * min(1.0, up, down)


def momentum_at(schedule: Schedule, step: int) -> float:
    """Momentum of a step: a line up in the first steps, a line down in the last."""
    stage_at(schedule, step)  # refuses a step that there is not
    steps = schedule.scheduled + schedule.extension
    return between(step, steps, schedule.momentum, schedule.momentum_steps)


# %%
age, variance = {}, {}
for m in RECORD_89.momentum:
    weight = (1 - m) * m ** np.arange(2000)
    age[m], variance[m] = (weight * np.arange(2000)).sum(), (weight**2).sum()
    assert math.isclose(age[m], m / (1 - m)) and math.isclose(variance[m], (1 - m) / (1 + m))
assert round(age[0.85], 1) == 5.7 and round(age[0.95]) == 19
assert 3.1 < variance[0.85] / variance[0.95] < 3.2
shown = {step: round(momentum_at(RECORD_89, step), 3) for step in (0, 150, 300, 1235, 1284)}
assert shown == {0: 0.85, 150: 0.9, 300: 0.95, 1235: 0.95, 1284: 0.852}
early = {int(step): loss for step, loss in zip(at, losses)}
assert (f"{early[0]:.1f}", f"{early[250]:.1f}") == ("10.8", "4.5")
print(shown, {m: f"{years:.1f} steps old" for m, years in age.items()})

# %% [markdown]
# In its first 250 steps record 89 goes from a loss of 10.8 to 4.5, and the gradient turns quickly; news that is nineteen steps old describes a place that the model has left. Later it turns slowly, and a threefold smaller variance is worth the delay. In the last fifty steps the delay hurts again, since what is still in the mean when the run ends has been paid for and never used. The rise came with record 9, over 500 steps; record 13 made them 300; the fall came with record 39. Record 9's list of parts puts the rise at 0.013 nats (3.2972 to 3.2844, single runs).
#
# ### What the model is asked, and how far it sees


# %%
#| export
class Settings(NamedTuple):
    """All that a schedule says about one step."""

    batch_tokens: int
    rate: float
    momentum: float
    cap_tokens: int
    windows: tuple[int, int]
    ahead: tuple[float, ...]
    prefix: float


def loss_weights_at(schedule: Schedule, step: int) -> tuple[tuple[float, ...], float]:
    """Weights of the tokens ahead, and of the prefix target: on lines between the ends of the stage."""
    stage, t = stage_at(schedule, step)
    ahead = tuple((1 - t) * first + t * last for first, last in zip(*stage.ahead))
    return ahead, (1 - t) * stage.prefix[0] + t * stage.prefix[1]


def settings_at(schedule: Schedule, step: int) -> Settings:
    """All settings of one step."""
    stage, _ = stage_at(schedule, step)
    rate, momentum = rate_at(schedule, step), momentum_at(schedule, step)
    lengths = (stage.cap_tokens, stage.windows)
    return Settings(stage.batch_tokens, rate, momentum, *lengths, *loss_weights_at(schedule, step))


def tokens_before(schedule: Schedule, step: int) -> int:
    """Tokens that have been read before a step; before the step after the last: all of them."""
    pairs = zip(schedule.stages, borders(schedule), borders(schedule)[1:])
    return sum(s.batch_tokens * max(0, min(step, end) - begin) for s, begin, end in pairs)


# %%
assert tokens_before(RECORD_89, 1285) == int(ladder["89"]["merged_total_tokens"]) == 338_821_120
assert tokens_before(RECORD_89, 424) - tokens_before(RECORD_89, 423) == 262_144
weights = {step: loss_weights_at(RECORD_89, step) for step in (0, 422, 423, 846, 847, 1284)}
assert weights[0] == ((1, 0.5, 0.25), 0.25) and weights[423] == ((1, 0.5), 0.25)
assert weights[847] == weights[1284] == ((1,), 0)
assert sum(weights[0][0]) + weights[0][1] == 2 and sum(weights[847][0]) == 1
assert weights[422][0][2] < 0.001 and weights[422][1] == 0.25
assert weights[846][0][1] < 0.002 and weights[846][1] < 0.001, "no jump at the borders"
print(f"{tokens_before(RECORD_89, 1285) / 1e6:.1f} million tokens")

# %% [markdown]
# The third token ahead fades out over the first third of the run, the second over the second, and with it the prefix. At no border does a weight jump. The extra targets teach early, and at the end the loss is the one that is scored. (The weights add up to 2 at first and to 1 at the end. Adam and Muon divide by the gradient's length, and do not notice.)
#
# The windows are a schedule of what attention costs. They grow from 128 and 384 tokens to 768 and 1,664; documents are cut after 896 tokens in the first third. [Chapter 22](22_config.py) has seen the reason on a laptop, where longer rows were worse after a third of the steps and better at the end. A model that cannot spell yet has no use for what stands a thousand tokens back. Record 13, whose window grew over the run from 64 tokens to 1,792, was the first to do so (among four other changes):

# %%
reach = {n: [128 * w for w in RECORD_89.stages[n].windows] for n in (0, -1)}
assert reach == {0: [128, 384], -1: [768, 1664]}
brought = seconds_of[12] - seconds_of[13]
assert 21.5 < brought < 22.5
print(f"record 13: {brought:.0f} s less than record 12")

# %% [markdown]
# ### The table
#
# A schedule that is a function can be looked at. All that is left is to know where to look: at the borders, on both sides, and where a line begins or ends.


# %%
#| export
def turning_points(schedule: Schedule) -> list[int]:
    """The steps at which something begins, ends or is last what it was."""
    edges, (rising, falling) = borders(schedule), schedule.momentum_steps
    points = {
        fall_begins(schedule),
        rising,
        edges[-1] - falling,
        *edges,
        *(edge - 1 for edge in edges),
    }
    return sorted(point for point in points if 0 <= point < edges[-1])


def schedule_table(schedule: Schedule) -> list[str]:
    """A heading, and a line for each turning point."""
    lines = [" step   batch   rate  mom.   cap  windows  ahead / prefix"]
    for step in turning_points(schedule):
        now = settings_at(schedule, step)
        windows = "{}, {}".format(*now.windows)
        targets = " ".join(f"{weight:.2f}" for weight in now.ahead) + f" / {now.prefix:.2f}"
        numbers = f"{step:5} {now.batch_tokens:7} {now.rate:6.3f} {now.momentum:5.3f}"
        lines.append(f"{numbers} {now.cap_tokens:5}  {windows:>7}  {targets}")
    return lines


# %%
table = schedule_table(RECORD_89)
points = turning_points(RECORD_89)
assert points == [0, 300, 422, 423, 508, 846, 847, 1235, 1269, 1270, 1284]
assert len(table) == len(points) + 1 and max(map(len, table)) <= 66
assert table[4].split()[:4] == ["423", "262144", "1.520", "0.950"]
print("\n".join(table))

# %% [markdown]
# Fifteen steps belong to no third. The *extension* runs at the floor of the rate, with the widest windows that are trained; validation widens the long one once more, and the last steps come closest to it. It was 40 steps long in records 35 to 80, then 10, and has been 15 since record 85.
#
# Everything on one axis, which is time and not steps:

# %% tags=["hide-input"] mystnb={"image": {"alt": "Batch, learning rate, momentum, lengths and loss weights of record 89 against seconds of training"}}
every = [settings_at(RECORD_89, step) for step in range(edges[-1])]
took = np.array([STEP_MS[now.batch_tokens] for now in every]) / 1000
seconds = took.cumsum() - took
share_of_third = [took[a:b].sum() / took.sum() for a, b in zip(edges[:3], (*edges[1:3], edges[4]))]
assert 0.48 < share_of_third[2] < 0.50 and 0.17 < share_of_third[0] < 0.19
batch = np.array([now.batch_tokens for now in every])
rate = np.array([now.rate for now in every])
fig, axes = plt.subplots(5, 1, figsize=(5.5, 8.2), sharex=True)
panels: list[dict] = [
    {"batch (1,000 tokens)": batch / 1000},
    {"rate": rate, "rate / √(batch / first)": rate / np.sqrt(batch / batch[0])},
    {"momentum": [now.momentum for now in every]},
    {
        "cap (tokens)": [now.cap_tokens for now in every],
        "long window (tokens)": [128 * now.windows[1] for now in every],
        "short window": [128 * now.windows[0] for now in every],
    },
    {
        "weight of 2nd token": [(*now.ahead, 0, 0)[1] for now in every],
        "3rd token": [(*now.ahead, 0, 0)[2] for now in every],
        "prefix": [now.prefix for now in every],
    },
]
places = ("upper left", "lower left", "lower center", "upper left", "upper right")
for axis, panel, place in zip(axes, panels, places):
    for name, values in panel.items():
        axis.step(seconds, values, where="post", label=name)
    for edge in edges[1:4]:
        axis.axvline(seconds[edge], color="0.4", lw=0.8, ls=":")
    axis.set_ylim(0.8 if "momentum" in panel else 0)
    axis.legend(loc=place, ncols=2 if "cap (tokens)" in panel else 1)
axes[3].set_ylim(0, 3600)
axes[0].set_ylim(0, 450)
axes[-1].set_xlabel("seconds of training")
axes[0].set_title(f"step {edges[2]} to the end takes {share_of_third[2]:.0%} of the time")
plt.show()

# %% [markdown]
# ## The measurement
#
# The prediction's second half can be tried here. The laptop's run, with Muon for the matrices at the rates of [chapter 12](12_newton_schulz.py), 1,000 steps, three seeds: once with the cosine, and with the trapezoid falling over a fifth, two, three, four fifths and all of the steps. The peak is the same for all.

# %% tags=["hide-input"]
#| default_exp measure.schedule
#| export
from typing import Any

from speedrun.config import Config, preset, vary
from speedrun.lab.results import stamp
from speedrun.measure.runs import corpus_of, train_many

NAMES = ("shapes",)
SEEDS = (0, 1, 2)
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
MUON: dict[str, Any] = {"matrix.rule": "muon", "matrix.lr": 0.016, "optim.lr": 0.008, "steps": 1000}


def arms() -> dict[str, Config]:
    """The cosine, and the trapezoid by the share of steps in which it falls."""
    base = vary(preset("cpu"), MUON)
    falls = {"schedule.shape": "trapezoid"}
    shapes = {f"{share:g}": vary(base, falls | {"schedule.cooldown": share}) for share in SHARES}
    return {"cosine": base} | shapes


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train each arm with each seed: {"arms": {arm: [run, …]}}."""
    runs = {(a, s): vary(run, {"seed": s}) for a, run in arms().items() for s in SEEDS}
    modules = ["speedrun.measure.schedule", "speedrun.train"]
    facts = stamp(command, modules, len(SEEDS), SEEDS, corpus_of(preset("cpu")))
    done = dict(zip(runs, train_many(list(runs.values()))))
    return {"arms": {arm: [done[arm, seed] for seed in SEEDS] for arm in arms()}}, facts


# %%
planned = arms()
assert [*planned] == ["cosine", "0.2", "0.4", "0.6", "0.8", "1"]
area = {
    arm: sum(learning_rate(n, run.steps, run.optim, run.schedule) for n in range(run.steps))
    for arm, run in planned.items()
}
mean_rate = {arm: area[arm] / run.steps / run.optim.lr for arm, run in planned.items()}
trapezoids = [arm for arm in planned if arm != "cosine"]
assert sorted(trapezoids, key=mean_rate.get) == ["1", "0.8", "0.6", "0.4", "0.2"]
assert abs(mean_rate["cosine"] - 0.5) < 0.002 and abs(mean_rate["1"] - 0.5) < 0.002
print({arm: f"mean rate {share:.2f} of the peak" for arm, share in mean_rate.items()})

# %% [markdown]
# (The shapes differ in their mean rate, then. That is no accident of this comparison, but it is a reason to distrust its details: each shape might prefer a peak of its own.)

# %%
from speedrun.lab.results import load_result, measured_on
from speedrun.lab.stats import describe

result = load_result("schedule", "shapes")
found = {arm: describe(r["val_loss"] for r in runs) for arm, runs in result["data"]["arms"].items()}
assert set(found) == set(planned) and {sample.n for sample in found.values()} == {3}
for runs in result["data"]["arms"].values():
    assert [run["config"]["seed"] for run in runs] == [0, 1, 2], "paired seeds"
    assert {run["config"]["steps"] for run in runs} == {1000}
spread = (sum(sample.sd**2 for sample in found.values()) / len(found)) ** 0.5
visible = 4.7 * spread  # what three runs a side see nine times out of ten: chapter 01
best = min(trapezoids, key=lambda arm: found[arm].mean)
worst = max(trapezoids, key=lambda arm: found[arm].mean)
near = [arm for arm in trapezoids if found[arm].mean - found[best].mean < visible]
against_cosine = found["cosine"].mean - found[best].mean
assert set(near) == {"0.6", "0.8", "1"} and worst == "0.2" and against_cosine > visible
assert found[worst].mean - found[best].mean < 0.5, "a shape is no catastrophe"
for arm in sorted(found, key=lambda arm: found[arm].mean):
    gap = found[arm].mean - found[best].mean
    print(f"{arm:7} {found[arm]}  {gap:+.4f}{'' if gap < visible else '  visible'}")
print(f"visible: {visible:.4f}; cosine against the best trapezoid: {against_cosine:+.4f}")
print(measured_on(result))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Final validation loss against the share of steps in which the rate falls, three seeds each, with the cosine as a band"}}
fig, axis = plt.subplots(figsize=(5.5, 3.4))
by_arm = {arm: [r["val_loss"] for r in runs] for arm, runs in result["data"]["arms"].items()}
axis.axhspan(min(by_arm["cosine"]), max(by_arm["cosine"]), color="C1", alpha=0.25)
axis.axhline(found["cosine"].mean, color="C1", label="cosine, three seeds")
means = [found[arm].mean for arm in trapezoids]
axis.plot([float(arm) for arm in trapezoids], means, "-", color="C0", lw=1)
for arm in trapezoids:
    axis.plot([float(arm)] * 3, by_arm[arm], "o", color="C0", ms=5, alpha=0.8)
axis.set_xlabel("share of the steps in which the rate falls")
axis.set_ylabel("final validation loss")
axis.xaxis.set_major_formatter("{x:.0%}")
axis.set_xticks([float(arm) for arm in trapezoids])
axis.legend()
ties = ", ".join(f"{float(arm):.0%}" for arm in near if arm != best)
tail = f",\nnot visibly lower than over {ties}" if ties else ""
axis.set_title(f"lowest: a fall over {float(best):.0%} of the steps{tail}")
plt.show()

# %% [markdown]
# Falling over all of the steps, over four fifths and over three fifths cannot be told apart here; over a fifth is clearly too late. That is the valley's usual shape: steep on the side of falling too late, flat on the other. The half cosine, which falls slowly at first and slowly at last, loses to a plain line. So the answer to the second half of the prediction is *most of the run, and more exactly it does not matter*; the contest's is 60%. To the first half its answer is $\sqrt3$, and the toy's is that it depends on the noise.
#
# ## What it costs, and when it fails
#
# In code it costs a table and a handful of functions. In freedom it costs more. Every number here was tuned for a run of this length; cut the run by a tenth and the fall, the momentum and the stages move along, and nobody has measured whether they should. A stage with another batch or window is another shape, which has to be compiled and warmed up beforehand, or the clock pays for it ([chapter 23](23_training_loop.py)). And schedules hide each other. A rate that falls too late looks like a batch that is too small; both look like too much momentum. The toy above says how far that goes: the best batches made four different rates equal to a thousandth.
#
# A last warning is about comparisons. A new idea that needs a little less forgetting at the end, or a little more, will look good or bad under somebody else's fall. Whoever changes an optimizer should try two or three falls before believing the difference.
#
# ## What did not work
#
# - **Batches that grow, with the rate left alone.** They failed until the rate was retuned with them (record 46).
# - **Less momentum around the steps at which the windows change**, in Muon only: worse (record 31). **Freezing the learned scalars for 40 steps after each change** came with record 52 and was dropped two or three records later.
# - **Shorter caps for longer.** Record 72 caps documents at 896 tokens in the first third. In the second, 1,920 would still have passed; 1,536 and 1,664 failed by three or four ten-thousandths.
# - **Uneven thirds**, of 36, 32 and 32 per cent, were proposed with record 87 and not merged. **Replacing the tokens ahead by the prefix** was worse than stacking both (record 88).
# - **No schedule at all.** At record 7 schedule-free optimization brought no gain.
#
# ## Exercises
#
# 1. A step takes time $a + cB$: a fixed part, and a part for each token. Which batch gains most in a *second*? Gain per step is proportional to $B/(B+B^*)$. Write `best_batch(noise_scale, fixed_ms, ms_per_token)`. Then fit $a$ and $c$ to record 89's three step times, and ask at which noise scales its three batches would be the best.


# %% tags=["solution"]
def best_batch(noise_scale: float, fixed_ms: float, ms_per_token: float) -> float:
    """The batch with the largest gain per second: the geometric mean of the noise scale and a / c."""
    return math.sqrt(noise_scale * fixed_ms / ms_per_token)


# %%
ms_per_token, fixed_ms = np.polyfit([*STEP_MS], [*STEP_MS.values()], 1)
assert max(abs(fixed_ms + ms_per_token * b - ms) for b, ms in STEP_MS.items()) < 0.1, "a line"
tried = np.logspace(3, 8, 5001)
for scale in (1e5, 1e6, 1e7):
    by_search = tried[(tried / (tried + scale) / (fixed_ms + ms_per_token * tried)).argmax()]
    assert abs(best_batch(scale, fixed_ms, ms_per_token) / by_search - 1) < 0.01
implied = [batch**2 * ms_per_token / fixed_ms for batch in STEP_MS]
ratio = [ours / fit for ours, fit in zip(implied, scales)]
assert 2.5 < ratio[0] < ratio[1] < ratio[2] < 7.6
assert 5.5 < fixed_ms < 6.1 and 0.5e6 < implied[0] < 0.65e6 and 5e6 < implied[2] < 5.5e6
print(f"{fixed_ms:.1f} ms, and {131_072 * ms_per_token:.1f} ms for 131,072 tokens")
print("best at noise scales of", ", ".join(f"{scale / 1e6:.1f} million" for scale in implied))

# %% [markdown]
# (That is three to seven times the fit above, and grows faster. Stages differ in more than their batch, so that $a$ is only roughly the time of an empty step. But the cheaper a step's fixed part, the smaller the batch should be: kernels that launch faster change the schedule.)
#
# 2. You want to know the loss at 1,000, 2,000 and 4,000 steps. With a cosine these are three runs. With a trapezoid they share their plateau, and only the falls are run separately. Write `steps_to_pay(lengths, cooldown)` for the trapezoid. At a fall of 60%, is it still worth it?


# %% tags=["solution"]
def steps_to_pay(lengths: list[int], cooldown: float) -> float:
    """Steps for runs of all lengths that share one plateau: the longest plateau, and each one's fall."""
    return (1 - cooldown) * max(lengths) + cooldown * sum(lengths)


# %%
lengths = [1000, 2000, 4000]
assert steps_to_pay(lengths, 1.0) == sum(lengths) == 7000
assert steps_to_pay(lengths, 0.2) == 4600 and math.isclose(steps_to_pay(lengths, 0.6), 5800)
saved = {share: 1 - steps_to_pay(lengths, share) / 7000 for share in (0.2, 0.4, 0.6)}
print({f"fall over {share:.0%}": f"saves {part:.0%}" for share, part in saved.items()})

# %% [markdown]
# ## Since then
#
# Record 89 is the last that this book knows. A proposal of August 2026 that had not been merged lets the rate fall over 80% of the steps, to a floor of 0.20, and gives documents three caps, of 896, 2,048 and 3,072 tokens. The fall, it seems, has not finished growing.
