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
# Under half a minute on two CPU cores; within three minutes on one GPU. The comparison of shapes in the last figure is eighteen short trainings on a CPU, and is committed.
# Records 4 and 9 (Keller Jordan and others), 13 (\@fernbear.bsky.social), 19 (\@YouJiacheng), 21 (\@leloykun), 26 and 39 (\@classiclarryd), 46 and 53 (\@varunneal), 72 (\@dualverse-ai & AI System Station), 88 (\@jvarho).
# ```
#
# ## The problem
#
# A step of record 89 takes 31.4 ms in the first third of its log, 56.9 ms in the second, 82.6 ms in the last. The merged run has 1,285 steps, and eight of its settings change while it runs. What if nothing changed, and every step were like the last?

# %%
from speedrun.lab.tier import choose_tier

tier = choose_tier()

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

# %%
budget = int(ladder["89"]["merged_total_tokens"])
counts = {batch: math.ceil(budget / batch) for batch in STEP_MS}
lasts = {batch: counts[batch] * ms / 1000 for batch, ms in STEP_MS.items()}
assert round(sum(thirds) * 393_216 / 1e6) == 505 and round(budget / 1e6) == 339
assert counts[393_216] == 862 and (round(lasts[393_216]), round(lasts[262_144])) == (71, 74)
assert as_it_is > lasts[393_216]
print(f"all alike: {sum(thirds) * 393_216 / 1e6:.0f} million tokens; record 89: {budget / 1e6:.0f}")
for batch, took in lasts.items():
    print(
        f"{budget / 1e6:.0f} million in batches of {batch:,}: {counts[batch]} steps, {took:.0f} s"
    )

# %% [markdown]
# (The log is that of the proposal; the merged run does a little more in a step.) **106 seconds**, the time of thirty records ago. But it would read 505 million tokens, and record 89 reads 339. For as many tokens, batches of 393,216 take 862 steps and 71 seconds, and batches of 262,144 take 74. So small first batches do not save time on a token. What they can save is tokens, and that has to be shown.
#
# No schedule is learned. Each is a function of the step's number, written down beforehand; most were found by trying. Which of them could have been worked out?
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
# The simplest optimizer that divides by the gradient's length makes a step $s = \eta\,\hat g/\lVert\hat g\rVert$, where $\hat g$ is the measured gradient. Adam (a division for each coordinate, by a running mean) and Muon (one for each direction of a matrix) share with it that the step's size is $\eta$ whatever the gradient's; what follows is exact only for the simple one. The error is at right angles to $g$ on average, so the expected gain is $\eta\,\lVert g\rVert^2/r - \tfrac12 h\eta^2$, and the best rate is
#
# $$
# \eta^* = \frac{\lVert g\rVert^2}{h\,r} = \frac{\lVert g\rVert}{h}\,\frac{1}{\sqrt{1 + B^*/B}}, \qquad B^* = \frac{S}{\lVert g\rVert^2}.
# $$
#
# $B^*$ is the batch at which signal and error are equally long, the *noise scale* {cite}`mccandlish2018`. Far below it the best rate grows like $\sqrt B$; far above, not at all. (Plain gradient descent does not divide. Its best rate is $\lVert g\rVert^2/hr^2$, which far below $B^*$ grows like $B$ itself, and far above it not at all. That is why one reads of a linear rule and of a square-root rule {cite}`malladi2022`: they are about different optimizers.)


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
    plain = (signal @ (signal + error)).item() / (signal + error).square().sum().item()
    assert abs(best - best_rate(batch, 1000)) < 0.02
    assert abs(plain - best_rate(batch, 1000) ** 2) < 0.02, "not divided: 1 / (1 + B* / B)"
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
# Two rules. 1.73 is the square root of three. 1.52 is the power 0.6 of two, and more than the derivation ever allows, at any noise scale (of the simple optimizer; for Muon nobody has derived it here). The power 0.6 was tried and kept; in the last third it was later taken back to the root. There the rate is falling anyway, so that this is hard to tell from falling sooner.
#
# The formula says more. Far below the noise scale $\eta^* = \lVert g\rVert^2\sqrt{B}\,/\,h\sqrt S$. So, with $h$ and $S$ fixed, the rate should *fall* with the gradient, by its square there and by its first power far above, and *jump* when the batch grows. Both at once: a falling line with jumps is a saw.
#
# ### Why the batch should grow
#
# Put the best rate back. A step then gains $\lVert g\rVert^2/2h$ times $B/(B + B^*)$. At the noise scale half of the gain is lost to noise. Far below it every token counts in full; far above it more tokens buy nothing. As training goes on, what is left to learn becomes small beside the noise, so $B^*$ grows; the fit below says so. A batch that is too large for the beginning is too small for the end.
#
# How large is $B^*$ here? Years before the contest, a fit to many language models gave $2\cdot10^8$ tokens divided by the loss to the power $1/0.21$ {cite}`kaplan2020`. It was made on another text, with Adam. Record 89's log has the loss every 250 steps; between them we draw a line.

# %%
curve = [row for row in public_table("curves") if row["record"] == "89"]
at, losses = ([float(row[key]) for row in curve] for key in ("step", "val_loss"))
scheduled = at[-1] - 15  # of the logged run, which was longer than the merged one
ends = [np.interp(scheduled * n / 3, at, losses) for n in (1, 2)] + [losses[-1]]
scales = [2e8 / loss ** (1 / 0.21) for loss in ends]
shares = [batch / scale for batch, scale in zip(STEP_MS, scales)]
first_scales = [2e8 / losses[0] ** (1 / 0.21), *scales[:2]]
begins = [batch / scale for batch, scale in zip(STEP_MS, first_scales)]
assert at[1] == 250 and scales == sorted(scales), "the noise scale grows"
assert 0.5 < min(shares) and max(shares) < 0.65 and round(begins[0]) == 55
assert [round(share, 1) for share in begins[1:]] == [1.2, 0.8]
for loss, scale, batch, first, last in zip(ends, scales, STEP_MS, begins, shares):
    row = f"batch {batch / 1000:.0f}k: from {first:.1f} noise scales to {last:.2f}"
    print(f"{row}, at the end {scale / 1000:.0f}k (loss {loss:.2f})")
pairs = zip(STEP_MS, [*STEP_MS][1:], scales)
jumps = [best_rate(after, scale) / best_rate(before, scale) for before, after, scale in pairs]
assert [f"{jump:.2f}" for jump in (*jumps, math.prod(jumps))] == ["1.20", "1.13", "1.36"]
row = f"{jumps[0]:.2f} and {jumps[1]:.2f}, together {math.prod(jumps):.2f}"
print(f"where the batch grows the rate should jump by {row}")

# %% [markdown]
# Each of the three batches, when its third ends, is at a little more than half of what the fit calls the noise scale. This may be luck: the thirds begin at 55, 1.2 and 0.8 of their noise scales. But one, two, three look less arbitrary now. The jumps that the derivation asks for are 1.20 and 1.13. The record's will turn out to be 1.52 and 1.13, so one agrees and one does not. (The derivation knows no momentum, which averages noise away before the step, and takes the curvature to be the same along the signal and the noise.)
#
# ### Rate and batch do the same work
#
# One step is not a training. So take the simplest whole training that can be computed without rolling dice. Sixty directions with curvatures $h_i$ between 1 and a thousandth, all starting at distance 1, and a gradient whose noise is larger where the curvature is, of variance $\nu h_i / B$. A step of gradient descent turns the expected squared distance $v_i$ into
#
# $$
# v_i \leftarrow (1 - \eta h_i)^2\, v_i + \eta^2 \nu h_i / B,
# $$
#
# and the loss is $\tfrac12\sum_i h_i v_i$. Noise that came in at step $t$ is forgotten by $(1-\eta h_i)^2$ in each later step. The last noise stays. That is the reason to treat the end differently.

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
walkers = torch.ones(tier.pick(cpu=2000, gpu=200_000), 60, dtype=torch.float64, device=tier.device)
h, dice = curvature.to(tier.device), torch.Generator(tier.device).manual_seed(0)
for _ in range(steps):
    luck = torch.randn(walkers.shape, generator=dice, dtype=torch.float64, device=tier.device)
    walkers -= 0.05 * (h * walkers + (10 * h).sqrt() * luck)
walked = 0.5 * (h * walkers.square()).sum(-1).mean().item()
(exact,) = final_loss(torch.tensor([0.05]), ones, ones, 10).tolist()
assert abs(walked / exact - 1) < 0.03
print(f"computed {exact:.3f}; {len(walkers):,} trainings with dice {walked:.3f}")

# %% [markdown]
# With so many tokens and so many steps, how large should each batch be? The noise of step $t$ adds $c_t / B_t$ to the final loss, where $c_t = \tfrac12\nu\eta_t^2\sum_i h_i^2\prod_{s>t}(1-\eta_s h_i)^2$: what comes in, times what later steps leave of it. To minimise $\sum c_t/B_t$ at a fixed sum of $B_t$, make $B_t$ proportional to $\sqrt{c_t}$:


# %%
def surviving(peaks, shape):
    """For each peak rate c_t, if ν = 1: (peaks, steps)."""
    rates = peaks[:, None] * shape
    kept = (1 - rates[..., None] * curvature) ** 2
    after = kept.flip(1).cumprod(1).flip(1) / kept  # what later steps leave of a step's noise
    return 0.5 * rates**2 * (after * curvature**2).sum(-1)


def best_batches(peaks, shape):
    """For each peak rate the batches, mean 1, with the lowest final loss: (peaks, steps)."""
    root = surviving(peaks, shape).sqrt()
    return root / root.mean(1, keepdim=True)


# %%
def falling(share: float, count: int = steps) -> torch.Tensor:
    """Rates as shares of the peak: held, then falling to 0.15 over a share of the steps."""
    left = count - torch.arange(count, dtype=torch.float64)
    return 0.85 * (left / (share * count)).clamp(max=1) + 0.15


shapes = {"rising": falling(1.0).flip(0), "constant": ones}
shapes |= {f"falling over {share:.0%}": falling(share) for share in (0.3, 0.6, 1.0)}
equal, best, growth = {}, {}, {}
grid = PEAKS[PEAKS < 0.3]  # short steps; at ηh = 1 `surviving` would divide by zero
for name, shape in shapes.items():
    batches = best_batches(grid, shape)
    equal[name] = final_loss(grid, shape, ones, 10).min().item()
    found = final_loss(grid, shape, batches, 10)
    best[name], chosen = found.min().item(), batches[found.argmin()]
    growth[name] = (chosen.max() / chosen[0]).item()
    print(f"rate {name:17} equal batches {equal[name]:.3f}, best batches {best[name]:.3f}")
    assert (chosen[-1] == chosen.max()) == (name in ("rising", "constant"))
assert max(best.values()) / min(best.values()) < 1.01
four = [loss for name, loss in best.items() if name != "rising"]
assert max(four) / min(four) < 1.001
assert list(equal.values()) == sorted(equal.values(), reverse=True), "the more it falls, the better"
assert list(growth.values()) == sorted(growth.values(), reverse=True) and growth["constant"] > 10
print("largest batch against first:", ", ".join(f"{n:.0f}" for n in growth.values()))

# %% [markdown]
# The right column is the lesson. With the best batches the rate may fall, be held, or even *rise*: the losses agree to a per cent. (The reason: with these batches the noise that is left is $(\sum_t\sqrt{c_t})^2$ divided by the number of steps. While steps are short, $\sqrt{c_t}$ is $\eta_t$ times a function of the rates still to come, so the sum is an integral whose value depends only on the sum of all rates. What is left of the starting distance depends on that sum, too.) A falling rate and a growing batch are two ways of doing one thing, which is to forget the noise before the end {cite}`smith2018`. Under a constant rate the best batches grow to the last step, under a falling one they grow less, and shrink again near the end.

# %%
some, one = torch.rand(steps, generator=generator, dtype=torch.float64) + 0.5, grid[-20:]
sums, distances = [], []
for shape in shapes.values():
    c, still = 10 * surviving(one, shape), final_loss(one, shape, some, 0)
    assert torch.allclose(final_loss(one, shape, some, 10) - still, (c / some).sum(1))
    left = final_loss(one, shape, best_batches(one, shape), 10) - still
    assert torch.allclose(left, c.sqrt().sum(1) ** 2 / steps)
    alike = 9 / shape.sum()[None]  # the peak at which the rates add up to 9
    sums.append(surviving(alike, shape).sqrt().sum().item())
    distances.append(final_loss(alike, shape, ones, 0).item())
assert max(sums) / min(sums) < 1.002 and max(distances) / min(distances) < 1.001
print("rates that add up to 9: starting distance leaves", [f"{loss:.3f}" for loss in distances])

# %% [markdown]
# So on top of a rate that falls well, a schedule of batches should work no miracles. What do thirds of one, two, three bring, against equal batches, if the rate falls over the last 60%, and with a growing batch stays, follows its root, or follows the batch itself? Every peak is tuned for itself.

# %%
THIRDS = {name: torch.tensor(n) for name, n in {"growing": (1, 2, 3), "equal": (2, 2, 2)}.items()}


def noise_scales(peak, shape, batches, noise):
    """B* / B before each step of one run: the noise scale of the whole gradient, in batches."""
    v, ratios = torch.ones(60, dtype=torch.float64), []
    for rate, batch in zip((peak * shape).tolist(), batches.tolist()):
        ratios.append((noise * curvature.sum() / (curvature**2 * v).sum() / batch).item())
        v = (1 - rate * curvature) ** 2 * v + rate**2 * noise * curvature / batch
    return ratios


def against_equal(base, power, noise):
    """Growing batches against equal ones, each at its best peak; and B* / B along the growing run."""
    tuned, grid = {}, PEAKS[PEAKS < 0.6]
    for name, thirds_of in THIRDS.items():
        batches = thirds_of.double().repeat_interleave(steps // 3) / 2
        ends_at = final_loss(grid, base * batches**power, batches, noise)
        along = noise_scales(grid[ends_at.argmin()], base * batches**power, batches, noise)
        tuned[name] = ends_at.min().item(), along
    return tuned["growing"][0] / tuned["equal"][0] - 1, tuned["growing"][1]


# %%
gain, held_gain, ratios, follow = {}, {}, [], []
for noise in (1, 10, 100):
    for power in (0, 0.5, 1):
        gain[noise, power], along = against_equal(shapes["falling over 60%"], power, noise)
        held_gain[noise, power], _ = against_equal(ones, power, noise)
        ratios += along
        before = along[steps // 3 - 1]  # where the batch doubles
        follow.append((1 + before) / (1 + before / 2))  # by which one step's best rate grows
    for name, gains in {"falls": gain, "is held": held_gain}.items():
        row = ", ".join(f"B^{power} {gains[noise, power]:+.1%}" for power in (0, 0.5, 1))
        print(f"noise {noise:3}, rate {name:7} and follows {row}")
assert gain[1, 0] < gain[1, 0.5] < gain[1, 1] < 0, "little noise: leave the rate alone"
assert abs(gain[10, 0] - gain[10, 0.5]) < 0.002 and gain[10, 0] < gain[10, 1], "between: a tie"
assert gain[100, 1] < gain[100, 0.5] < gain[100, 0] and abs(gain[100, 1]) < 0.01
taken_back = [1 - gain[noise, 1] / gain[noise, 0] for noise in (1, 10)]
assert [round(part, 1) for part in taken_back] == [0.9, 0.5]
assert all(held_gain[noise, 1] >= 0 for noise in (1, 10, 100))
assert 3.5 < min(ratios) < 4.5 and 495 < max(ratios) < 505 and 1.9 < min(follow)
assert (int(ladder["45"]["steps"]), int(ladder["46"]["steps"])) == (2225, 2225 - 65)
print(f"the noise scale is {min(ratios):.1f} to {max(ratios):.0f} batches")
print(f"when the batch doubles, a step's best rate grows by {min(follow):.2f} or more")

# %% [markdown]
# The toy is plain gradient descent, and at all three noises its growing batches stay below the noise scale, which is 4 to 500 times as large. For a single step the rate should follow the batch nearly in proportion, each time. For the training it should only where there is hardly anything but noise, and there the order of the batches brings nothing. Where there is little, the rate should stay; in between, staying and following the root tie. In these two cases a rate in proportion to the batch takes back nine tenths and half of what the growing batch has done. (Held instead of falling, it gains nothing at any of the three noises.) Of optimizers that divide by the gradient's length the toy says nothing.
#
# Record 46, with the power 0.6, a longer fall and a lower rate for Muon, needed 65 steps fewer of 2,225, which is 1.8 seconds by its own account; which of them did it was not taken apart.
#
# ### Travel first, then come down
#
# With the rate held, $v_i$ stops falling where the noise that comes in equals what is forgotten, at $\eta\nu\,/\,\bigl(B\,(2-\eta h_i)\bigr)$. While $\eta h_i$ is small, that is proportional to the rate. A high rate travels fast along the flat directions and hovers high above the bottom of the valley; lowering the rate lowers the level at which it hovers.

# %%
hovers_at = {}
for rate in (0.01, 0.1):
    v = rate * 10 / (2 - rate * curvature)
    stays = (1 - rate * curvature) ** 2 * v + rate**2 * 10 * curvature
    assert torch.allclose(stays, v), "what comes in is what is forgotten"
    hovers_at[rate] = 0.5 * (curvature * v).sum().item()
assert 9.5 < hovers_at[0.1] / hovers_at[0.01] < 11
print({rate: f"hovers at a loss of {loss:.3f}" for rate, loss in hovers_at.items()})

# %% [markdown]
# How much of a run should the descent be? In the toy that can be searched, with the peak:

# %%
best_share = {}
for noise in (1, 10):
    for count in (150, 600, 3000):
        ends_at = {}
        for share in [n / 10 for n in range(1, 11)]:
            lowest = final_loss(PEAKS, falling(share, count), torch.ones(count), noise).min()
            ends_at[share] = lowest.item()
        best_share[noise, count] = min(ends_at, key=ends_at.get)
        row = f"noise {noise:2}, {count:4} steps"
        print(f"{row}: best if the rate falls over {best_share[noise, count]:.0%} of them")
for noise in (1, 10):
    found = [best_share[noise, count] for count in (150, 600, 3000)]
    assert found == sorted(found, reverse=True) and found[0] > found[-1] > 0.3
assert all(best_share[10, count] > best_share[1, count] for count in (150, 600, 3000))
shrinks = 3000 * best_share[1, 3000] / (150 * best_share[1, 150])
assert 14.9 < shrinks < 15.1
print(f"at noise 1 a run of a twentieth has a fall {shrinks:.0f} times shorter")

# %% [markdown]
# The longer the run, the smaller the share of its fall.
#
# Half a cosine, the baseline's, falls from the beginning, and every one of its rates depends on the length of the run. Whoever wants to know what twice the steps would have brought begins again. A *trapezoid* is held and then falls along a line. Until it falls it does not know how long the run will be, so it can be continued, or ended early from any point {cite}`hagele2024`. The contest has had it since record 4, without a warm-up. Record 89 has kept the shape and lost this property: its stages are thirds of a length that is known beforehand.
#
# In tokens its runs became ever shorter, give or take 2 per cent; in steps, with two setbacks when the batch shrank (records 21 and 39; at 39 the share went back to 40%). The share of the fall has moved fifteen times:

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
lengths = {}
for record, row in ladder.items():  # the merged run's, where it is known
    steps_of = int(row["merged_scheduled_steps"] or row["steps"] or 0)
    steps_of += int(row["merged_extension_steps"] or 0)
    lengths[int(record)] = (
        steps_of,
        int(row["merged_total_tokens"] or row["total_train_tokens"] or 0),
    )
known = [
    (record, *lengths[record]) for record in sorted(lengths) if 4 <= record and all(lengths[record])
]
grew = [(b[0], b[1] / a[1], b[2] / a[2]) for a, b in zip(known, known[1:])]
assert max(tokens for _, _, tokens in grew) < 1.025
assert [record for record, more, _ in grew if more > 1.025] == [21, 39] and COOLDOWN[39] == 0.40
assert abs(lengths[89][1] / lengths[89][0] / 524_288 - 0.5) < 0.01, "half the batch"

# %% [markdown]
# As the run shrank, it was the plateau that went: to less than an eighth, while the fall shrank to less than a half. The toy has the sign of it: when its run shrinks twentyfold, the fall shrinks fifteenfold. It does not have the size. More noise lengthens its fall as well, and the contest's batch was halved on the way. The floor rose from zero to 0.1 with record 19 and to 0.15 with record 72: steps at a rate near zero do not move, and are paid in full.
#
# ## The code
#
# ### The trainer's learning rate
#
# First what this book's trainer uses: a warm-up, one of the two shapes down, and momentum that may start and end lower. `step_settings` hands the optimizer all of it for one step; the matrices' rate is a fixed multiple of the other.

# %%
#| default_exp optim.schedule
#| export
import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Literal, NamedTuple

from annotated_types import Interval

from speedrun.lab.bounds import Beta, NonNegativeInt, Share


@dataclass(frozen=True)
class ScheduleConfig:
    """What changes from step to step. The defaults are llm.c's."""

    warmup_steps: NonNegativeInt = 700
    """Steps in which the learning rate climbs to its peak."""
    shape: Literal["cosine", "trapezoid"] = "cosine"
    """The learning rate after the warm-up. cosine: falls at once. trapezoid: held, then along a line."""
    cooldown_frac: Share = 0.6
    """trapezoid: the share of the steps in which the learning rate falls."""
    final_lr_frac: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Learning rate at the end, as a share of the peak."""
    momentum_min: Annotated[Beta, "0: momentum stays as it is"] = 0.0
    """Muon's momentum in the first step and after the last, on a line to optim.muon.momentum and back; 0: no lines."""
    momentum_ramp: tuple[NonNegativeInt, NonNegativeInt] = (300, 50)
    """Steps in which momentum rises at the beginning, and falls at the end."""
    untie_at: Share = 2 / 3
    """Share of the steps after which embedding and head train apart, if model.head.tied is split."""


# %%
#| export
def linear_cooldown(peak: float, floor: float, step: int, begin: int, end: int) -> float:
    """`peak` until step `begin`, then a line that is at `floor` in step `end` and stays there."""
    if step <= begin or step >= end:
        return floor if step >= end else peak
    t = (step - begin) / (end - begin)
    return (1 - t) * peak + t * floor


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """The rate of a step (0 … steps − 1): a line up, then the schedule's shape down to final_lr_frac · peak."""
    warmup, final = schedule.warmup_steps, schedule.final_lr_frac
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.shape == "trapezoid":
        begin = max(warmup, steps - round(schedule.cooldown_frac * steps))
        return peak * linear_cooldown(1.0, final, step, begin, steps)
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * (final + (1 - final) * cosine)


# %%
from dataclasses import replace

cosine = ScheduleConfig(warmup_steps=100, final_lr_frac=0.1)
trapezoid = replace(cosine, shape="trapezoid")
rates = [learning_rate(step, 1000, 1.0, trapezoid) for step in range(1000)]
assert rates[0] == 0.01 and rates[99:401] == [1.0] * 302 and rates[401] < 1
assert all(a > b for a, b in zip(rates[400:], rates[401:])) and 0.1 < rates[-1] < 0.102
assert math.isclose(rates[700], 0.55), "half-way down after half of the fall"
twice = [learning_rate(step, 2000, 1.0, trapezoid) for step in range(801)]
assert twice[:400] == rates[:400] and twice[100:] == [1.0] * 701
knows = [learning_rate(step, 1000, 1.0, cosine) for step in range(1000)]
assert all(a != learning_rate(n, 2000, 1.0, cosine) for n, a in enumerate(knows) if n > 100)
print("for 400 steps the trapezoid does not know whether it has 1,000 or 2,000; the cosine knows")


# %%
#| export
def ramp(step: int, steps: int, ends: tuple[float, float], ramps: tuple[int, int]) -> float:
    """A line from ends[0] up to ends[1] over the first ramps[0] steps, and a line back over the last ramps[1]."""
    (low, high), (rising, falling) = ends, ramps
    up = step / rising if rising else 1.0
    down = (steps - step) / falling if falling else 1.0
    return low + (high - low) * min(1.0, up, down)


class StepSettings(NamedTuple):
    """What changes from step to step, for the optimizer."""

    step: int
    lr: float
    """Learning rate of all but the blocks' matrices."""
    matrix_lr: float
    momentum: float
    untie: bool = False
    """Whether tied parameters train apart from this step on."""


def step_settings(
    step: int, steps: int, schedule: ScheduleConfig, peaks: tuple[float, float], momentum: float
) -> StepSettings:
    """The settings of a step (0 … steps − 1). peaks: learning rates of all, and of the matrices. momentum: its highest value."""
    lr = learning_rate(step, steps, peaks[0], schedule)
    ends = (schedule.momentum_min or momentum, momentum)
    now = ramp(step, steps, ends, schedule.momentum_ramp)
    return StepSettings(
        step, lr, lr * (peaks[1] / peaks[0]), now, step >= schedule.untie_at * steps
    )


# %%
slow_start = replace(trapezoid, momentum_min=0.85, momentum_ramp=(100, 10))
every = [step_settings(step, 1000, slow_start, (0.01, 0.02), 0.95) for step in range(1000)]
assert [now.lr for now in every] == [learning_rate(n, 1000, 0.01, trapezoid) for n in range(1000)]
assert every[0].momentum == 0.85 and every[100].momentum == every[990].momentum == 0.95
assert all(now.matrix_lr == 2 * now.lr for now in every) and every[667].untie > every[666].untie

# %% [markdown]
# ### Training as a list of stages
#
# Record 89 needs more. Eight of its settings depend on the step: batch, rate, momentum, the cap on the length of a document, two attention windows (most layers look back over a short stretch, two over a long one), the weights of the tokens that the model has to predict ahead (record 53), and the weight of an extra target: the longest beginning of the right token, shorter than it, that is a token itself (record 88). The rate is a factor on both base rates, Muon's 0.023 and Adam's 0.008. Momentum is Muon's alone. Weight decay follows without a row of its own: a step takes off the square of the rate times a constant, so it is at most 1.52² = 2.31, and in the end 0.15² = 0.02. Record 43 brought this in and puts that part at 10 to 15 steps. (The softmax scale and the rotary frequencies follow the windows, and the head is untied at a border.) Written into the loop they would be eight `if`s with eight ideas of where a third begins. Written as data they are a table with a row per stage, and functions of the step alone, which can be plotted before the run, resumed in its middle, and compiled for each shape before the clock starts. After the three thirds come a few steps at the lowest rate, the *extension*.


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
# A table that makes no sense should be refused when it is written, not in step 847. Where do the stages begin? At the rounded multiples of their shares, so that no step is lost or done twice.


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

# %%
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
# ### Learning rate by stage
#
# The fall begins after 40% of the scheduled steps and mixes the stage's rate with the floor; the stage's rate jumps after 33% and 67%. So it jumps once before the fall begins and once in its midst, and is a saw:


# %%
#| export
def rate_at(schedule: Schedule, step: int) -> float:
    """The learning rate of a step, as a multiple of the base rate."""
    stage, _ = stage_at(schedule, step)
    return linear_cooldown(
        stage.rate, schedule.floor, step, fall_begins(schedule), schedule.scheduled
    )


# %%
marks = (0, 422, 423, 508, 509, 846, 847, 1269, 1270, 1284)
saw = {step: round(rate_at(RECORD_89, step), 4) for step in marks}
assert [saw[step] for step in (0, 422, 423, 508)] == [1.0, 1.0, 1.52, 1.52] and saw[509] < 1.52
assert (saw[846], saw[847], saw[1269]) == (0.9123, 1.0271, 0.1521)
assert saw[1270] == saw[1284] == 0.15
largest = max(rate_at(RECORD_89, step) for step in range(edges[-1]))
assert largest == 1.52 and (round(largest**2, 2), round(0.15**2, 2)) == (2.31, 0.02)
tooth = [saw[423] / saw[422], saw[847] / saw[846]]
against_root = [tooth[0] / math.sqrt(2), tooth[1] / math.sqrt(1.5)]
assert 1.07 < against_root[0] < 1.08 and 0.91 < against_root[1] < 0.93
print(saw)
print(f"jumps by {tooth[0]:.2f} and {tooth[1]:.2f}; the root of the batch: 1.41 and 1.22")

# %% [markdown]
# Divide the rate by the root of the batch and the teeth nearly vanish: what remains is 8% up, and 8% down.
#
# ### Momentum
#
# A running mean with momentum $m$ gives the gradient of $k$ steps ago the weight $(1-m)\,m^k$. Its mean age is $m/(1-m)$, and it shrinks the variance of independent noise by $(1-m)/(1+m)$. More momentum, less noise, older news.


# %%
#| export
def momentum_at(schedule: Schedule, step: int) -> float:
    """Momentum of a step: a line up in the first steps, a line down in the last."""
    stage_at(schedule, step)  # refuses a step that there is not
    steps = schedule.scheduled + schedule.extension
    return ramp(step, steps, schedule.momentum, schedule.momentum_steps)


# %%
age, variance, fresh, fresh_variance = {}, {}, {}, {}
for m in RECORD_89.momentum:
    weight = (1 - m) * m ** np.arange(2000)
    age[m], variance[m] = (weight * np.arange(2000)).sum(), (weight**2).sum()
    assert math.isclose(age[m], m / (1 - m)) and math.isclose(variance[m], (1 - m) / (1 + m))
    weight = m * weight + (1 - m) * (np.arange(2000) == 0)  # Nesterov's form
    fresh[m], fresh_variance[m] = (weight * np.arange(2000)).sum(), (weight**2).sum()
    assert math.isclose(weight.sum(), 1) and math.isclose(fresh[m], m * age[m])
assert round(age[0.85], 1) == 5.7 and round(age[0.95]) == 19
assert 3.1 < variance[0.85] / variance[0.95] < 3.2
assert [f"{n:.1f}" for n in fresh.values()] == ["4.8", "18.0"]
assert 3.9 < fresh_variance[0.85] / fresh_variance[0.95] < 4.0
shown = {step: round(momentum_at(RECORD_89, step), 3) for step in (0, 150, 300, 1235, 1284)}
assert shown == {0: 0.85, 150: 0.9, 300: 0.95, 1235: 0.95, 1284: 0.852}
early = {int(step): loss for step, loss in zip(at, losses)}
assert (f"{early[0]:.1f}", f"{early[250]:.1f}") == ("10.8", "4.5")
print(shown)
print({m: f"{age[m]:.1f} steps old; Nesterov's form {fresh[m]:.1f}" for m in age})

# %% [markdown]
# In its first 250 steps record 89 goes from a loss of 10.8 to 4.5. The loss falls fastest there, so presumably the gradient turns fastest, too; news that is nineteen steps old describes a place that the model has left. Later it turns slowly, and a threefold smaller variance is worth the delay. (Nesterov's form, which Muon takes, mixes the newest gradient in once more. It is fresher by a factor of $m$, 4.8 and 18 steps, and its variance falls fourfold.) In the last fifty steps what is still in the mean when the run ends is never used; that is the likely reason for the fall. The rise came with record 9, over 500 steps; record 13 made them 300; the fall came with record 39. Record 9's list of parts puts the rise at 0.013 nats (3.2972 to 3.2844, single runs).
#
# ### Windows and loss weights by stage


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
# The third token ahead fades out over the first third of the run, the second over the second, and with it the prefix. At no border does a weight jump. The extra targets teach early, and at the end the loss is the one that is scored. (The weights' sum falls from 2 to 1. Adam and Muon, which divide, hardly notice.)
#
# The windows are a schedule of what attention costs. They grow from 128 and 384 tokens to 768 and 1,664; documents are cut after 896 tokens in the first third. [Chapter 22](22_config.py) has a hint of the reason: longer rows did worse in runs of a third of the steps, and better in whole ones. A likely reading is that a model that cannot spell yet has little use for what stands a thousand tokens back. Record 13, whose window grew over the run from 64 tokens to 1,792, was the first to do so (among four other changes):

# %%
reach = {n: [128 * w for w in RECORD_89.stages[n].windows] for n in (0, -1)}
assert reach == {0: [128, 384], -1: [768, 1664]}
brought = seconds_of[12] - seconds_of[13]
assert 21.5 < brought < 22.5
print(f"record 13: {brought:.0f} s less than record 12")

# %% [markdown]
# ### The table
#
# A schedule that is a function can be looked at: at the borders, on both sides, and where a line begins or ends.


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
# Fifteen steps belong to no third. The extension runs at the floor of the rate, with the widest windows that are trained. Validation widens the long one once more, to 2,560 tokens; the extension's comes nearest. It was 40 steps long in records 35 to 80, then 10, and has been 15 since record 85.
#
# Everything on one axis, which is time and not steps:

# %%
every = [settings_at(RECORD_89, step) for step in range(edges[-1])]
took = np.array([STEP_MS[now.batch_tokens] for now in every]) / 1000
seconds = took.cumsum() - took
share_of_third = [took[a:b].sum() / took.sum() for a, b in zip(edges[:3], (*edges[1:3], edges[4]))]
assert 0.48 < share_of_third[2] < 0.50 and 0.17 < share_of_third[0] < 0.19
assert round((edges[4] - edges[2]) / edges[4], 2) == 0.34
batch, rate = (np.array([getattr(now, name) for now in every]) for name in ("batch_tokens", "rate"))
momentum = [now.momentum for now in every]
pairs = [(every[edge - 1], every[edge]) for edge in edges[1:4]]
changes = {
    name: sum(getattr(a, name) != getattr(b, name) for a, b in pairs) for name in every[0]._fields
}
assert changes["windows"] == 3 and changes["batch_tokens"] == 2 and changes["cap_tokens"] == 1
bends = np.abs(np.diff(rate, 2))  # a line has none
assert all(bends[edge - 2 : edge].max() > 1e-3 for edge in edges[1:4]), "the rate, at all three"
assert max(abs(np.diff(momentum, 2)[edge - 2 : edge]).max() for edge in edges[1:4]) < 1e-12
slope = [abs(rate[a] - rate[b]) / (seconds[b] - seconds[a]) for a, b in ((509, 846), (847, 1269))]
assert slope[1] < 0.85 * slope[0], "flatter by the clock"
print(changes, f"; in a second the rate falls by {slope[0]:.3f}, in the last third {slope[1]:.3f}")

# %% tags=["hide-input"]
panels: list[dict] = [
    {"batch (1,000 tokens)": batch / 1000},
    {"rate": rate, "rate / √(batch / first)": rate / np.sqrt(batch / batch[0])},
    {"momentum": momentum},
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

# %% tags=["hide-input"] mystnb={"image": {"alt": "Batch, learning rate, momentum, lengths and loss weights of record 89 against seconds of training"}}
fig, axes = plt.subplots(5, 1, figsize=(5.5, 8.2), sharex=True)
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
# Dotted lines are the borders of the stages. The last third and the extension are 34% of the steps and 49% of the time, so the line of the fall looks flatter there: the steps are longer. The windows change at all three borders. The rate jumps at two and stops falling at the third. The batch changes at two, the cap at one, momentum at none.
#
# ## The measurement
#
# The prediction's second half can be tried here. The laptop's run, with Muon for the matrices at the rates of [chapter 12](12_newton_schulz.py), 1,000 steps, three seeds: once with the cosine, and with the trapezoid falling over a fifth, two, three, four fifths and all of the steps. The peak is the same for all, and the floor here is 0.

# %% tags=["hide-input"]
#| default_exp measure.schedule
#| export
from typing import Any

from speedrun.config import Config, vary
from speedrun.presets import preset
from speedrun.lab.provenance import stamp
from speedrun.measure.runs import corpus_of, train_many

NAMES = ("shapes",)
SEEDS = (0, 1, 2)
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
MUON: dict[str, Any] = {
    "optim.matrices": "muon",
    "optim.matrix_lr": 0.016,
    "optim.adam.lr": 0.008,
    "steps": 1000,
}


def arms() -> dict[str, Config]:
    """The cosine, and the trapezoid by the share of steps in which it falls."""
    base = vary(preset("cpu"), MUON)
    falls = {"schedule.shape": "trapezoid"}
    shapes = {
        f"{share:g}": vary(base, falls | {"schedule.cooldown_frac": share}) for share in SHARES
    }
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
    arm: sum(learning_rate(n, run.steps, run.optim.adam.lr, run.schedule) for n in range(run.steps))
    for arm, run in planned.items()
}
mean_rate = {arm: area[arm] / run.steps / run.optim.adam.lr for arm, run in planned.items()}
trapezoids = [arm for arm in planned if arm != "cosine"]
assert sorted(trapezoids, key=mean_rate.get) == ["1", "0.8", "0.6", "0.4", "0.2"]
assert abs(mean_rate["cosine"] - 0.5) < 0.002 and abs(mean_rate["1"] - 0.5) < 0.002
assert {run.schedule.final_lr_frac for run in planned.values()} == {0.0}
print({arm: f"mean rate {share:.2f} of the peak" for arm, share in mean_rate.items()})

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
above = {arm: (found[arm].mean - found[best].mean) / visible for arm in trapezoids}
assert 1 < above["0.4"] < 1.1 and above["0.2"] > 2, "just visible, and clearly"
assert found["cosine"].mean - found["1"].mean > visible, "same peak, mean rate and end"
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
# All of the steps, four fifths and three fifths cannot be told apart; two fifths is worse by just what three runs can see, a fifth clearly. Only one side of the valley is in view, since no fall is longer than the run. And a longer fall has a lower mean rate, at a peak that chapter 12 chose with the cosine and for 600 steps: if it is too high for 1,000, longer falls win for that reason. One comparison is free of this. The cosine and the line over all steps have the same peak, the same mean rate and the same end, zero, and the line wins.
#
# So the answer to the second half of the prediction is *three fifths or more, and among those three seeds see no difference*; the contest's is 60%. To the first half the contest has given two answers, $3^{0.6}$ and since record 53 $\sqrt3$; the derivation, at the fitted noise scales, says 1.20 × 1.13 = 1.36; the toy says that it depends on the noise.
#
# ## What it costs, and when it fails
#
# In code it costs a table and a handful of functions; in freedom, more. Every number here was tuned for a run of this length; cut the run by a tenth, and the fall and the stages shrink with it, while momentum's 300 and 50 steps and the extension's 15 stay. Nobody has measured whether either is right. A stage with another batch or window is another shape, which has to be compiled and warmed up beforehand, or the clock pays for it ([chapter 23](23_training_loop.py)). And schedules hide each other. A rate that falls too late looks like a batch that is too small; both leave noise, as too little averaging does. The toy above says how far that goes: the best batches made four different rates equal to a thousandth.
#
# A new idea that needs less forgetting at the end, or more, will look good or bad under somebody else's fall. Whoever changes an optimizer should try two or three falls before believing the difference.
#
# ## What did not work
#
# - **Batches that grow**, for a long time. Record 46 got them to work with the token budget about kept and the rate retuned; its author does not say what the failures had done about the rate.
# - **Less momentum around the steps at which the windows change**, in Muon only: worse (record 31). **Freezing the learned scalars for 40 steps after each change** came with record 52 and was dropped two or three records later.
# - **Shorter caps for longer.** Record 72 caps documents at 896 tokens in the first third. In the second, 1,920 still passed; 1,536 and 1,664 failed by three or four ten-thousandths.
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
off = max(abs(fixed_ms + ms_per_token * b - ms) for b, ms in STEP_MS.items())
assert off < 0.1, f"the three step times lie on a line to 0.1 ms, not {off:.2f}"
tried = np.logspace(3, 8, 5001)
for scale in (1e5, 1e6, 1e7):
    by_search = tried[(tried / (tried + scale) / (fixed_ms + ms_per_token * tried)).argmax()]
    got = best_batch(scale, fixed_ms, ms_per_token)
    assert abs(got / by_search - 1) < 0.01, (
        f"at a noise scale of {scale:,.0f} a search finds a best batch of {by_search:,.0f} tokens, not {got:,.0f}"
    )
implied = [batch**2 * ms_per_token / fixed_ms for batch in STEP_MS]
ratio = [ours / fit for ours, fit in zip(implied, scales)]
assert 2.5 < ratio[0] < ratio[1] < ratio[2] < 7.6, (
    f"three to seven times the fit, and growing: {ratio}"
)
assert 5.5 < fixed_ms < 6.1, f"a step's fixed part is 5.5 to 6.1 ms, not {fixed_ms:.2f}"
print(f"{fixed_ms:.1f} ms, and {131_072 * ms_per_token:.1f} ms for 131,072 tokens")
print("best at noise scales of", ", ".join(f"{scale / 1e6:.1f} million" for scale in implied))

# %% [markdown]
# (That is three to seven times the fit above, and grows faster. Stages differ in more than their batch, so $a$ is only roughly an empty step's time. But the cheaper a step's fixed part, the smaller the batch should be: kernels that launch faster change the schedule.)
#
# 2. You want to know the loss at 1,000, 2,000 and 4,000 steps. With a cosine these are three runs. With a trapezoid they share their plateau, and only the falls are run separately. Write `steps_to_pay(lengths, cooldown)` for the trapezoid. At a fall of 60%, is it still worth it?


# %% tags=["solution"]
def steps_to_pay(lengths: list[int], cooldown: float) -> float:
    """Steps for runs of all lengths that share one plateau: the longest plateau, and each one's fall."""
    return (1 - cooldown) * max(lengths) + cooldown * sum(lengths)


# %%
lengths = [1000, 2000, 4000]
for share, right in {1.0: 7000, 0.2: 4600, 0.6: 5800, 0.0: 4000}.items():
    got = steps_to_pay(lengths, share)
    assert math.isclose(got, right), (
        f"runs of {lengths} steps that fall over {share:.0%}: {right:,} steps, not {got:,}"
    )
saved = {share: 1 - steps_to_pay(lengths, share) / 7000 for share in (0.2, 0.4, 0.6)}
assert abs(saved[0.6] - 1 / 6) < 0.005, (
    f"at 60% a sixth of 7,000 steps is saved, not {saved[0.6]:.1%}"
)
print({f"fall over {share:.0%}": f"saves {part:.0%}" for share, part in saved.items()})

# %% [markdown]
# A sixth, and at a price: all three runs share one peak and one share, and the toy says that shorter runs want a larger share.
#
# ## Since then
#
# Record 89 is the last that this book knows. A proposal of August 2026, not merged by then, lets the rate fall over 80% of the steps, to a floor of 0.20, and gives documents three caps, of 896, 2,048 and 3,072 tokens. It also averages the weights over the last 300 steps, which forgets noise as a fall does. So it does not show that a longer fall is better by itself.
