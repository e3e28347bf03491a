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
# # Windows that widen, and YaRN
#
# ```{admonition} Cost box
# About fifteen seconds on two CPU cores; there is nothing for a GPU to do. The evidence at full size is the contest's.
# Record 13: \@fernbear.bsky.social. Record 29: \@varunneal. Records 31, 33, 35: \@classiclarryd.
# ```
#
# ## The problem
#
# A token that looks back over $w$ tokens costs in proportion to $w$. So the contest trains with short windows first and widens them: since record 29, layers with a long window look back over 384, then 896, then 1,408 tokens. At the first change **57% of the distances in the window are new**: no weight was ever trained on them. Thirteen of the 32 pairs of numbers that rotary embeddings turn have not gone round once within 384 tokens, so for them a new distance is an angle never seen before. And every query suddenly has more than twice as many keys.

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
import math

import torch

from speedrun.model.rotary import RotaryConfig, frequencies, apply_rotary

BLOCK = 128  # tokens
LONG, SHORT = ([BLOCK * n for n in blocks] for blocks in ((3, 7, 11, 13), (1, 3, 5, 6)))
spectrum = frequencies(
    128, RotaryConfig("half_rope", base=1024.0)
)  # record 89's heads have 128 numbers
turning = spectrum[spectrum > 0]
turns = LONG[0] * turning / (2 * math.pi)
never_round = int((turns < 1).sum())
new_distances = 1 - LONG[0] / LONG[1]
assert LONG == [384, 896, 1408, 1664] and SHORT == [128, 384, 640, 768]
assert round(new_distances, 2) == 0.57 and len(turning) == 32 and never_round == 13
print(
    f"{new_distances:.0%} of the distances are new; {never_round} of 32 pairs have not gone round"
)

# %% [markdown]
# ```{admonition} Prediction
# Take a key that matches its query well: the cosine between them is one half. The other keys in the window are random. **By how much must all scores grow when the window goes from 384 to 896 tokens, if the matching key is to keep its share of the attention?** And if you may slow down some of the 32 pairs, so that no angle is new: **which ones would you rather leave alone?**
# ```
#
# ## The idea
#
# ### Slow pairs are interpolated, fast pairs are kept
#
# [Chapter 06](06_rotary.py) turns pair $j$ of a query or key at position $m$ by the angle $m\theta_j$, so that a score sees only $\cos$ and $\sin$ of $\theta_j\Delta$ at the distance $\Delta$. With a window of $w$ tokens, pair $j$ goes round
#
# $$
# r_j = \frac{w\,\theta_j}{2\pi}
# $$
#
# times. If $r_j$ is large, the pair has shown every angle many times, and a longer distance brings none that is new. If $r_j < 1$, the angles have filled only a part of the circle, and a wider window leads into the rest of it, where nothing was trained.
#
# The simplest way out is to divide all frequencies by $w'/w$, so that the new window spans the old angles. This is position interpolation {cite}`chen2023`. Its price is paid by the fast pairs. They are what tells a token from its neighbour, and if they are slowed as well, one place looks more like the next. YaRN {cite}`peng2023` treats each pair by its number of turns:
#
# $$
# \theta_j' = \theta_j\,\bigl(s + \gamma_j (1 - s)\bigr), \qquad s = \frac{w}{w'}, \qquad \gamma_j = \operatorname{clip}\left(\frac{r_j - 1}{32 - 1},\, 0,\, 1\right).
# $$
#
# Up to one turn $\gamma$ is 0 and the pair is interpolated; from 32 turns on it is 1 and the pair is left alone; between them it goes along a line. The two bounds were chosen for models of the LLaMA family, with contexts of thousands of tokens. Record 31 took them as they were. Pairs of frequency zero (half of all, in a half-truncated spectrum) stay at zero.
#
# ### More keys, larger scores
#
# Queries and keys are normalised ([chapter 05](05_modern_block.py)), so with $d$ numbers a product $q\cdot k$ is at most $d$, and for unrelated directions it is about normal with variance $d$. Scores are $\sigma\,q\cdot k$ with a scale $\sigma$. Among $n$ unrelated keys the denominator of the softmax is about $n\,e^{\sigma^2 d/2}$, and the entropy of the weights is about $\ln n - \sigma^2 d/2$. Its exponential is the *perplexity* of attention, an effective number of keys: it grows in proportion to $n$. One more key, with the product $m = q\cdot k$, gets a share $p$ of the attention, with
#
# $$
# \ln \frac{p}{1 - p} = \sigma m - \ln n - \tfrac12 \sigma^2 d .
# $$
#
# To keep $p$ while $n$ becomes $n'$, the scale has to satisfy $(\sigma' - \sigma)\,m = \ln(n'/n) + \tfrac12(\sigma'^2 - \sigma^2)\,d$. It must grow with the logarithm of the window. Without QK-norm the weights could learn this; with it no weight can make a product larger than $d$, and the schedule has to do it. Record 31's rule, at every change, is
#
# $$
# \sigma' = \sigma\,\bigl(0.2 \ln(w'/w) + 1\bigr).
# $$
#
# ## The code

# %%
#| default_exp model.yarn
#| export
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def yarn(frequencies: Tensor, old: int, new: int, fast: float = 32.0, slow: float = 1.0) -> Tensor:
    """Radians a token of each pair, (head_dim / 2,), after the window went from old to new tokens.

    A pair that turns at most slow times in the old window is slowed by old / new, one that turns
    at least fast times is left alone, and between them the share goes along a line (Peng 2023).
    """
    turns = old * frequencies / (2 * math.pi)
    kept = ((turns - slow) / (fast - slow)).clamp(0, 1)
    return torch.lerp(frequencies * (old / new), frequencies, kept)


# %%
slower = yarn(spectrum, 384, 896)
kept, slowed = (turns >= 32), (turns <= 1)
assert torch.equal(slower[:32][kept], turning[kept]) and int(kept.sum()) == 3
assert torch.equal(slower[:32][slowed], turning[slowed] * (384 / 896)) and int(slowed.sum()) == 13
assert not slower[32:].any(), "pairs that stand still go on standing still"
assert (slower[:32].diff() < 0).all(), "the order of the pairs is kept"
formula = spectrum * (384 / 896 + ((384 * spectrum / (2 * math.pi) - 1) / 31).clamp(0, 1) * (1 - 384 / 896))  # fmt: skip
assert torch.allclose(slower, formula, rtol=1e-6)
print(f"kept: {kept.sum()}, between: {(~kept & ~slowed).sum()}, interpolated: {slowed.sum()}")


# %% [markdown]
# Three pairs are left alone, thirteen are interpolated, and the sixteen others are somewhere between.


# %%
#| export
def widened_scale(scale: float, old: int, new: int) -> float:
    """What scores are multiplied by after the window went from old to new tokens (record 31)."""
    return scale * (0.2 * math.log(new / old) + 1)


# %%
scales = [0.1]
for old, new in zip(LONG, LONG[1:]):
    scales.append(widened_scale(scales[-1], old, new))
assert [f"{scale:.5f}" for scale in scales] == ["0.10000", "0.11695", "0.12752", "0.13178"]
print("record 89:", ", ".join(f"{window}: {scale:.5f}" for window, scale in zip(LONG, scales)))

# %% [markdown]
# The paper has 0.1 where record 31 has 0.2, and the record's notes say that 0.2 was found by trying. But the paper multiplies queries *and* keys by its factor {cite}`peng2023`, so that their product is multiplied by its square, and
#
# $$
# (0.1\ln x + 1)^2 = 1 + 0.2\ln x + 0.01\ln^2 x .
# $$
#
# What the trials found is the paper's own rule, to first order:

# %%
ratios = [new / old for old, new in zip(LONG, LONG[1:])]
apart = [(0.1 * math.log(x) + 1) ** 2 / widened_scale(1.0, 1, x) - 1 for x in ratios]
assert 0 < min(apart) and max(apart) < 0.007
assert all(0.01 * math.log(x) ** 2 < 0.05 * 0.2 * math.log(x) for x in ratios)
print("the paper's square is larger by", ", ".join(f"{off:.2%}" for off in apart))

# %% [markdown]
# Now the prediction. Draw queries and keys with directions that have nothing to do with each other, and put in one key that has a cosine of one half with its query:

# %%
draw = torch.Generator().manual_seed(0)


def directions(*shape: int) -> Tensor:
    """Random vectors of 128 numbers with a root mean square of 1, as QK-norm makes them."""
    return torch.nn.functional.rms_norm(torch.randn(*shape, 128, generator=draw), (128,))


def attention_of(window: int, scale: float, cosine: float = 0.5, tries: int = 400):
    """Perplexity of attention over random keys, and the share of one more key that has this cosine."""
    q, k = directions(tries, 1), directions(tries, window)
    scores = scale * (q @ k.mT).squeeze(1)
    weights = scores.softmax(-1)
    entropy = -(weights * weights.log()).sum(-1).mean().item()
    match = math.exp(scale * cosine * 128)
    return math.exp(entropy), (match / (match + scores.exp().sum(-1))).mean().item()


narrow, wide, scaled = (
    attention_of(window, scale) for window, scale in ((384, 0.1), (896, 0.1), (896, scales[1]))
)
for (perplexity, _), window, scale in zip((narrow, wide, scaled), (384, 896, 896), (0.1, 0.1, scales[1])):  # fmt: skip
    assert abs(perplexity / (window * math.exp(-(scale**2) * 128 / 2)) - 1) < 0.05
assert 0.54 < wide[1] / narrow[1] < 0.62 and abs(scaled[1] / narrow[1] - 1) < 0.03
assert 1.7 < scaled[0] / narrow[0] < 2 < 2.2 < wide[0] / narrow[0] < 2.45
for name, (perplexity, share) in {"384 keys": narrow, "896 keys": wide, "896, scaled": scaled}.items():  # fmt: skip
    print(f"{name:12} perplexity {perplexity:4.0f}, share of the matching key {share:.0%}")

# %% [markdown]
# So the answer is **17%**: with record 31's rule the matching key keeps its share. The perplexity over unrelated keys is not kept; it nearly doubles, where without the rule it would be 2.3 times as large. To keep that instead, scores would have to grow by half, which would make well-matching keys much more dominant than before. For which product does the rule keep the share? For a small change of the window the equation above says $m = \sigma d + 5/\sigma$:

# %%
half_way = 0.1 * 128 + 5 / 0.1
all_kept = math.sqrt(0.1**2 + 2 * math.log(896 / 384) / 128)  # σ′² d = σ² d + 2 ln(n′/n)
products = [
    (math.log(w / v) + 64 * (b * b - a * a)) / (b - a)
    for v, w, a, b in zip(LONG, LONG[1:], scales, scales[1:])
]
assert abs(half_way / 128 - 0.49) < 0.005 and 1.5 < all_kept / 0.1 < 1.55
assert [round(product / 128, 2) for product in products] == [0.50, 0.46, 0.44]
print("cosines that keep their share:", ", ".join(f"{product / 128:.2f}" for product in products))

# %% [markdown]
# A cosine of one half, a little less at the later changes. Nobody chose the rule for that reason, and real keys are not random. But it says what the rule does: keys that match better than that gain by the wider window, and keys that match worse lose.
#
# ### A function of the list of windows
#
# Upstream's model multiplies its frequencies in place at every change, so they depend on what the model has been through. A run that resumes in the third stage, or a program that evaluates a checkpoint, has to go through the same changes again. Here it is a function of the schedule:


# %%
#| export
def follow_windows(
    frequencies: Tensor, scale: float, windows: Sequence[int]
) -> list[tuple[Tensor, float]]:
    """Frequencies and scale in each stage, given each stage's long window in tokens; 0: all tokens.

    The first stage has them as they are. ValueError: some windows are 0 and others are not.
    """
    if any(window < 0 for window in windows):
        raise ValueError(f"a window is a number of tokens, or 0 for all of them: {[*windows]}")
    if any(windows) and not all(windows):
        raise ValueError(
            "a window of 0 means all tokens, and there is no ratio to it or from it: "
            f"give every stage a window, or none ({[*windows]})"
        )
    stages = [(frequencies, scale)][: len(windows)]
    for old, new in zip(windows, windows[1:]):
        turning, factor = stages[-1]
        if old != new:
            turning, factor = yarn(turning, old, new), widened_scale(factor, old, new)
        stages.append((turning, factor))
    return stages


# %%
stages = follow_windows(spectrum, 0.1, LONG)
assert [scale for _, scale in stages] == scales and torch.equal(stages[1][0], slower)
again = follow_windows(spectrum, 0.1, [384, 384, 896, 896, 1408, 1664])
assert torch.equal(again[1][0], spectrum) and torch.equal(again[-1][0], stages[-1][0])
assert again[-1][1] == scales[-1], "a window that stays changes nothing"
assert all(pair == (spectrum, 0.1) for pair in follow_windows(spectrum, 0.1, [0, 0, 0]))
try:
    follow_windows(spectrum, 0.1, [384, 896, 0])
except ValueError as error:
    print(error)
else:
    raise AssertionError("a window of all tokens has no length")

# %% [markdown]
# The list has to be the whole one, because the way counts. From 384 to 1,664 in one leap is not the same as by three steps. Slow pairs do not mind: after $\theta' = \theta\,w/w'$ they turn as often in the new window as in the old one, so the factors multiply. A pair between the bounds turns more often in a wider window, so its $\gamma$ is another at the next change; some of them end up faster than by one leap, and some slower. And $1 + 0.2\ln x$ is no power of $x$.

# %%
leap, leap_scale = follow_windows(spectrum, 0.1, [384, 1664])[-1]
by_steps, by_steps_scale = stages[-1]
ratio = by_steps[:32] / leap[:32]
assert torch.allclose(ratio[slowed], torch.ones(13)), "slow pairs: one leap is as good"
assert 1.1 < ratio.max() < 1.12 and 0.91 < ratio.min() < 0.93 and leap_scale < 0.99 * by_steps_scale
print(f"by steps against one leap: pairs {ratio.min() - 1:+.0%} to {ratio.max() - 1:+.0%}; scale {by_steps_scale:.4f}, {leap_scale:.4f}")  # fmt: skip

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: the angle of each pair at the far end of the window in four stages, with and without YaRN. Right: each pair's frequency as a share of its first"}}
import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style

figure_style()
fig, axes = plt.subplots(1, 2, figsize=(7.8, 3.4), layout="constrained")
for n, (window, (turned, _)) in enumerate(zip(LONG, stages)):
    axes[0].plot(window * turned[:32], color=f"C{n}", label=f"{window:,}")
    axes[1].plot(turned[:32] / turning, color=f"C{n}", label=f"{window:,}")
    if n:
        axes[0].plot(window * turning, color=f"C{n}", lw=0.9, ls=":")
axes[0].axhline(2 * math.pi, color="0.4", lw=0.8)
axes[0].text(0, 2 * math.pi * 0.62, "one turn", fontsize=8)
axes[0].set_yscale("log")
axes[0].set_ylabel("radians at the window's far end")
axes[1].set_ylabel("frequency, as a share of the first")
axes[1].set_ylim(0, 1.05)
for axis in axes:
    axis.set_xlabel("pair, fastest first")
axes[0].legend(title="long window")
ends = [round(window * turned[31].item(), 3) for window, (turned, _) in zip(LONG, stages)]
fig.suptitle(f"the slowest pair ends at {ends[-1]} radians, in every window")
plt.show()

# %%
assert set(ends) == {0.375} and round(LONG[-1] * turning[31].item(), 3) == 1.625
first_round = [2 * math.pi / turned[:32] > window for window, (turned, _) in zip(LONG, stages)]
assert all(int(each.sum()) == 13 for each in first_round), "the same 13 pairs in every stage"
shares = (by_steps[:32] / turning).tolist()
assert abs(min(shares) - 384 / 1664) < 1e-6 and shares[0] == max(shares) == 1
print(f"without YaRN it would end at {LONG[-1] * turning[31]:.3f}")

# %% [markdown]
# On the left, dotted lines are what the angles would be if nothing were done. With YaRN the slow end of the spectrum stays exactly where it was in the first stage: no slow pair ever meets a new angle. At the fast end nothing happens. On the right is the price: in the last stage the slow pairs turn at less than a quarter of their first frequency.
#
# What the fast pairs are kept for can be put in a number. The fastest one turns by a radian a token. Where it is largest, its cosine falls by 0.46 from one token to the next; slowed by the same factor as the slow ones it would fall by less than a seventeenth of that.

# %%
falls = [1 - math.cos(theta) for theta in (by_steps[0].item(), spectrum[0].item() * 384 / 1664)]
assert round(falls[0], 2) == 0.46 and falls[0] > 17 * falls[1]
ratio_short = [b / a for a, b in zip(SHORT, SHORT[1:])]
reach = [short * turned[31].item() for short, (turned, _) in zip(SHORT, stages)]
assert ratio_short[0] > ratios[0] and 1.28 < reach[1] / reach[0] < 1.29
print(f"fall of the cosine to the next token: {falls[0]:.2f} kept, {falls[1]:.3f} interpolated")

# %% [markdown]
# One thing is approximate. All layers share one set of frequencies, and it follows the long window. (Record 92 has two sets of frequencies and scales: one follows the short window, the other the long one.) The layers with a short window go from 128 to 384 tokens at the first change, by three and not by 2.33, so their slow pairs do meet angles that are new, by 29%.
#
# ## The measurement
#
# A task that can be trained in seconds, and in which both problems occur. Every token is a key and a value, drawn at random from 192 keys and 16 values. Asked is the value that this key had *the last time it came*. The one layer of attention must look for equal keys, and among several prefer the nearest: content and distance. It trains with a window of 256, in which a key's last occurrence is missing about a quarter of the time, and the window is then widened to 512. What would you expect of the answers that were *already in* the old window?


# %%
from torch.nn import functional as F

OLD, NEW, KEYS, VALUES, ROW = 256, 512, 192, 16, 768
start = frequencies(64, RotaryConfig("half_rope", base=1024.0))
away = torch.arange(ROW)[:, None] - torch.arange(ROW)


def rows(count: int) -> tuple[Tensor, Tensor]:
    """Keys and values, (count, ROW) each."""
    keys, values = (torch.randint(n, (count, ROW), generator=draw) for n in (KEYS, VALUES))
    return keys.to(tier.device), values.to(tier.device)


def answers(keys: Tensor, values: Tensor, window: int) -> Tensor:
    """The value of the nearest earlier token with the same key; -1 if the window holds none."""
    seen = (keys[:, :, None] == keys[:, None]) & ((away > 0) & (away <= window)).to(keys.device)
    last = torch.where(seen, torch.arange(ROW, device=keys.device), -1).amax(-1)
    return torch.where(last < 0, -1, values.gather(1, last.clamp(min=0)))


def recall(weights: dict, keys: Tensor, values: Tensor, window: int, turning: Tensor, scale: float):
    """One layer of attention with one head of 64 numbers: logits of the value, (rows, ROW, VALUES)."""
    angles = torch.outer(torch.arange(ROW).float(), turning).to(keys.device)
    q, k = (
        apply_rotary(F.rms_norm(weights["key"][keys] @ weights[name], (64,)), angles.cos(), angles.sin())
        for name in ("q", "k")
    )  # fmt: skip
    visible = ((away > 0) & (away <= window)).to(keys.device)
    visible[0, 0] = True  # the first token has nobody else
    attention = (scale * (q @ k.mT)).masked_fill(~visible, -1e9).softmax(-1)
    return attention @ weights["value"][values] @ weights["out"]


# %%
def train(weights: dict, steps: int, window: int, turning: Tensor, scale: float, peak: float):
    """Train in place with Adam, the rate falling in the second half."""
    optimizer = torch.optim.Adam(weights.values(), betas=(0.9, 0.95))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = peak * min(1, 2 * (1 - step / steps))
        keys, values = rows(4)
        logits = recall(weights, keys, values, window, turning, scale)[:, OLD:].flatten(0, 1)
        wanted = answers(keys, values, NEW)[:, OLD:].flatten()
        loss = F.cross_entropy(logits, wanted, ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


shapes = {"key": (KEYS, 64), "q": (64, 64), "k": (64, 64), "value": (VALUES, 64), "out": (64, VALUES)}  # fmt: skip
weights = {
    name: (torch.randn(shape, generator=draw) / (8 if shape[0] == 64 else 2)).to(tier.device)
    for name, shape in shapes.items()
}
weights = {name: weight.requires_grad_() for name, weight in weights.items()}
train(weights, 120, OLD, start, 0.15, peak=0.02)
asked = rows(12)
near, known = (answers(*asked, window)[:, NEW:] for window in (OLD, NEW))
same = (asked[0][:, :, None] == asked[0][:, None]).cpu() & (away > OLD) & (away <= NEW)
older = same.any(-1)[:, NEW:].to(
    tier.device
)  # the wider window brings another occurrence of the key
assert 0.72 < ((near >= 0).sum() / near.numel()).item() < 0.76, "a quarter is out of reach"


# %%
@torch.no_grad()
def losses(weights: dict, window: int, turning: Tensor, scale: float) -> list[float]:
    """Mean loss of answers in the narrow window; only in the wide one; and of the first with and without an older occurrence."""
    logits = recall(weights, *asked, window, turning, scale)[:, NEW:]
    each = F.cross_entropy(logits.mT, known, ignore_index=-1, reduction="none")
    groups = near >= 0, (near < 0) & (known >= 0), (near >= 0) & older, (near >= 0) & ~older
    return [each[group].mean().item() for group in groups]


wider = widened_scale(0.15, OLD, NEW)
arms = {
    "unchanged": (start, 0.15),
    "scale only": (start, wider),
    "frequencies only": (yarn(start, OLD, NEW), 0.15),
    "YaRN and scale": (yarn(start, OLD, NEW), wider),
    "all pairs interpolated": (start * OLD / NEW, wider),
}
before = losses(weights, OLD, start, 0.15)
at_once = {name: losses(weights, NEW, *settings) for name, settings in arms.items()}
print(f"{'window 256':24} near {before[0]:.3f}, far {before[1]:.3f}")
for name, (close, far, *_) in at_once.items():
    print(f"512, {name:24} near {close:.3f}, far {far:.3f}")

# %%
blind, unchanged, both = (at_once[name] for name in ("scale only", "unchanged", "YaRN and scale"))
assert before[0] < 0.08 and before[1] > math.log(VALUES) - 0.1, "near is learned, far is a guess"
assert unchanged[0] > 3 * before[0], "widening spoils what was known"
assert (both[0] - before[0]) / (unchanged[0] - before[0]) < 1 / 3
assert unchanged[2] > 1.5 * unchanged[3] and unchanged[3] > 1.5 * before[3]
assert both[1] < 0.2 * unchanged[1] and 0.7 < both[1] / both[0] < 1.3
assert abs(blind[0] / unchanged[0] - 1) < 0.15, "in the mean the scale alone repairs nothing"
assert blind[3] < before[3] + 0.01 and blind[2] > unchanged[2], (
    "it repairs what has no older occurrence"
)
assert both[3] > unchanged[3], "of which YaRN with the scale repairs nothing"
assert both[0] < 0.9 * at_once["frequencies only"][0], "together with the frequencies it helps"
assert abs(at_once["all pairs interpolated"][0] - both[0]) < 0.01
print(f"near: {before[0]:.3f} → {unchanged[0]:.3f}; with YaRN {both[0]:.3f}")
print(f"unchanged, with an older occurrence {unchanged[2]:.3f}, without {unchanged[3]:.3f}")

# %% [markdown]
# Widening the window without more ado makes the answers *worse that were right before*. It is worst where the new part of the window holds another, older occurrence of the key, at angles that the head was never trained to rank behind the nearer one. But it is worse where there is none, too: the many new keys have their share of the attention. With YaRN less than a third of the damage is left (without an older occurrence, all of it), and answers at untrained distances are found, at about the same loss as near ones. The scale alone repairs the second group and worsens the first; with the frequencies it helps. To interpolate all pairs does as well: YaRN leaves only one of 16 alone here, and this task never asks for the token before. It cannot show what they are good for.
#
# The model of a speedrun goes on training. How long does the damage last?

# %%
mended: dict[str, list[float]] = {}
for name in ("unchanged", "YaRN and scale"):
    copy = {key: weight.detach().clone().requires_grad_() for key, weight in weights.items()}
    mended[name] = [at_once[name][0]]
    for _ in range(3):
        train(copy, 8, NEW, *arms[name], peak=0.005)
        mended[name].append(losses(copy, NEW, *arms[name])[0])

# %% tags=["hide-input"] mystnb={"image": {"alt": "Loss of the near answers against steps after the window was widened, unchanged and with YaRN"}}
fig, axis = plt.subplots(figsize=(5.5, 3.2))
for name, values in mended.items():
    axis.plot(range(0, 25, 8), values, "o-", label=name)
axis.axhline(before[0], color="0.4", lw=0.9, ls=":")
axis.text(12, before[0] * 0.75, "window 256, before the change", fontsize=8)
axis.set_ylim(0)
axis.set_xlabel("steps after the change")
axis.set_ylabel("loss, answers in the old window")
axis.legend()
caught_up = next((8 * n for n, loss in enumerate(mended["unchanged"]) if loss <= both[0]), 0)
axis.set_title(f"without YaRN it takes {caught_up} steps to reach\nthe loss with which YaRN starts")
plt.show()
assert 8 < caught_up <= 24 and mended["unchanged"][-1] < 0.6 * mended["unchanged"][0]
assert mended["unchanged"][-1] > mended["YaRN and scale"][-1]
assert mended["unchanged"][1] > mended["YaRN and scale"][0], "eight steps do not make up for it"

# %% [markdown]
# Training mends it. Within a few dozen steps the head that nobody told of the change comes to where YaRN had begun, and is still behind at the end of these. In this toy, one model and one seed, what YaRN saves is the spike and some steps after it; whether that is so in a run of a thousand steps it cannot say.

# %% [markdown]
# ### A model that writes, on long documents
#
# Does a model of text behave like that toy? The laptop's run can be made to: the same Python as everywhere in this book, but whole files, cut only where they are longer than 4,096 tokens; three layers, of which the last has a long window, 256 and in the second half 512. It is then evaluated with windows that it was never trained with, on the tokens that have at least 512 before them.

# %% tags=["hide-input"]
#| export measure.windows
import shlex
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from speedrun.config import Config, vary
from speedrun.lab.provenance import root
from speedrun.measure.study import runs_of
from speedrun.presets import preset
from speedrun.schedule import Stage

LONGEST, TRAINED, FROM = 4096, 512, 512
WIDER = (1024, 2048, 4096)
NARROWER = (64, 128, 256, TRAINED)


def whole_files(folder: Path) -> None:
    """The embedded text's files as documents of at most LONGEST tokens, as a data folder, unless it is there."""
    from speedrun.data import sources
    from speedrun.data.tokenizer import byte_tokenizer, decode_bytes, encode_bytes

    if (folder / "manifest.json").exists():
        return
    documents: dict[str, list] = {"train": [], "val": []}
    for package in sources.WHEELS:
        for name, text in sorted(sources.package_text(package, root() / "data" / "wheels").items()):
            pieces = sources.cut(encode_bytes(text), ord("\n"), LONGEST - 1)
            split = "val" if sources.is_validation(name, 0.05) else "train"
            documents[split] += [(piece, len(decode_bytes(piece))) for piece in pieces]
    mixed = {split: sources.shuffled(texts) for split, texts in documents.items()}
    told = byte_tokenizer(), ", ".join(sources.WHEELS), shlex.join(["measure.py", "windows"])
    sources.write_corpus(folder, mixed, *told, sources.SHARD_TOKENS)


# %% tags=["hide-input"]
#| export measure.windows
def study() -> dict[str, Config]:
    """The laptop's run on whole files, three seeds; makes the files. Its long layer looks back over 256, then 512 tokens."""
    whole_files(root() / "data" / "files")
    stages = tuple(Stage(1 / 2, 1, 1.5, LONGEST, (64, long)) for long in (256, TRAINED))
    reads = {"data.path": "data/files", "data.max_doc_tokens": LONGEST, "data.micro_batches": 1}
    sizes = {"data.batch_tokens": LONGEST, "data.max_forward_tokens": LONGEST, "steps": 600}
    run = vary(preset("cpu"), reads | sizes | {"schedule.stages": stages})
    return runs_of({"files": run}, (0, 1, 2))


@torch.no_grad()
def far_loss(live: Any, window: int, turning: torch.Tensor, scale: float, tokens: int) -> float:
    """Mean loss of validation tokens with at least FROM before them in their document, when long attention looks back over `window`."""
    from speedrun.data.loader import validation_batches
    from speedrun.model.attention import Packed, positions_of

    short, sums = live.attn_settings[-1].windows[0].item(), torch.zeros(2, dtype=torch.float64)
    reach = torch.tensor([short, window], dtype=torch.int32)
    for batch in validation_batches(live.validation, live.config.data, tokens):
        assert batch.cu_seqlens is not None and batch.longest is not None
        known = Packed(batch.cu_seqlens, batch.longest, reach, torch.tensor(scale), turning)
        logits = live.model(batch.inputs, None, known)[0].float()
        lost = F.cross_entropy(logits, batch.targets[0], reduction="none")
        far = lost[positions_of(batch.cu_seqlens, len(lost)) >= FROM]
        sums += torch.tensor([far.sum().item(), len(far)])
    return (sums[0] / sums[1]).item()


def after(live: Any, tokens: int = 131_072) -> dict:
    """Far losses by the window of the evaluation: as trained; and wider ones also with new frequencies and scale, or one of the two."""
    told = live.attn_settings[-1]
    turning, scale = told.frequencies, told.scale.item()
    found = {"as trained": {w: far_loss(live, w, turning, scale, tokens) for w in NARROWER + WIDER}}
    ways: dict[str, dict] = {"YaRN and scale": {}, "YaRN": {}, "scale": {}}
    for wide in WIDER:
        slower, stronger = yarn(turning, TRAINED, wide), widened_scale(scale, TRAINED, wide)
        ways["YaRN and scale"][wide] = far_loss(live, wide, slower, stronger, tokens)
        ways["YaRN"][wide] = far_loss(live, wide, slower, scale, tokens)
        ways["scale"][wide] = far_loss(live, wide, turning, stronger, tokens)
    return {
        "far": {way: {str(w): loss for w, loss in by.items()} for way, by in (found | ways).items()}
    }


# %%
import numpy as np

from speedrun.lab.results import figure_style, load_result, measured_on

seen = [load_result("windows", f"files_{seed}") for seed in range(3)]
far = [result["data"]["runs"][0]["far"] for result in seen]


def changes(way: str) -> dict[int, list[float]]:
    """By window: each seed's loss, less its loss at the window with which it was trained."""
    at_home = [each["as trained"][str(TRAINED)] for each in far]
    return {int(w): [each[way][w] - home for each, home in zip(far, at_home)] for w in far[0][way]}


moved = {way: changes(way) for way in far[0]}
for way, by in moved.items():
    print(f"{way:15}", *(f"{w}: {np.mean(each):+.3f}" for w, each in by.items()))
plain, yarn_only, scale_only, with_both = (moved[w] for w in ("as trained", "YaRN", "scale", "YaRN and scale"))  # fmt: skip
for seed in range(3):
    assert 0 < plain[1024][seed] < plain[2048][seed] < plain[4096][seed], "unchanged, it is worse"
    assert with_both[1024][seed] < min(0, scale_only[1024][seed], yarn_only[1024][seed])
    assert with_both[1024][seed] < 0 < with_both[2048][seed] < plain[2048][seed]
    assert scale_only[4096][seed] < with_both[4096][seed] < yarn_only[4096][seed]

# %% tags=["hide-input"] mystnb={"image": {"alt": "Change of loss on tokens far from their document's beginning, against the window at evaluation, for four ways to widen it, three seeds each"}}
figure_style()
fig, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
for n, (way, by) in enumerate(moved.items()):
    drawn = {TRAINED: [0.0]} | {w: each for w, each in by.items() if w >= 256}
    line = {w: np.mean(drawn[w]) for w in sorted(drawn)}
    axis.plot(
        [*line], [*line.values()], color=f"C{n}", label=way.replace("as trained", "unchanged")
    )
    for w, each in drawn.items():
        axis.plot([w] * len(each), each, "o", ms=3, color=f"C{n}")
axis.axhline(0, color="0.4", lw=0.8, ls=":")
axis.set_xscale("log", base=2)
axis.set_xticks([256, 512, 1024, 2048, 4096], ["256", "512", "1,024", "2,048", "4,096"])
axis.set_xlabel("long window at evaluation (trained with 512)")
axis.set_ylabel("change of loss (nats a token)")
axis.legend(fontsize=8)
axis.set_title(
    f"Twice the window: {np.mean(with_both[1024]):+.3f} with both, {np.mean(plain[1024]):+.3f} unchanged"
)
fig.text(0.99, -0.03, measured_on(seen[0]).replace("n=1", "n=3"), ha="right", fontsize=6.5)
plt.show()

# %% [markdown]
# In part the same picture, in each of three seeds: unchanged it gets worse, and both halves together are best at twice the window. But the halves change places. In the mean the scale alone takes back all of the loss, the frequencies alone little, in one seed nothing. Doubled without more ado, the window costs loss though it shows more text. With both halves of YaRN the wider window is worth something at once, to a model that was never trained with it; neither half alone gets so far. At four times the old window nothing is gained any more: both together end 0.011 above the narrow window, and frequencies alone already do more harm than no change. At eight times the scale alone is best. That is one leap, though, where record 31 makes three smaller ones, and trains between them. Its last leap, for the validation alone, is from 1,408 to 1,664, a factor of 1.18, which lies between 512 and 1,024 in this figure.
#
# ## What it buys
#
# The public records, at full size. From record 29, which brought the three windows, to record 35 much else changed, and only a part of each step belongs to this chapter:

# %%
from speedrun.lab.results import public_table
from speedrun.lab.stats import describe, p_difference

ladder = {int(row["record"]): row for row in public_table("records") if row["contributors"]}
for n in (12, 13, 29, 30, 31, 33, 35):
    row = ladder[n]
    print(f"{n}: {row['record_time_s']:>6} s, {row['steps']} steps of {row['step_avg_ms']} ms, loss {row['final_val_loss']}: {row['description']}")  # fmt: skip
seconds = {n: float(row["record_time_s"]) for n, row in ladder.items()}
step_ms = {n: float(ladder[n]["step_avg_ms"]) for n in (12, 13, 30, 31)}
fewer = {n: int(ladder[n - 1]["steps"]) - int(ladder[n]["steps"]) for n in (13, 31)}
saved = {n: fewer[n] * step_ms[n - 1] / 1000 for n in (13, 31)}
assert fewer == {13: 125, 31: 35} and abs(step_ms[31] / step_ms[30] - 1) < 0.005
assert 0.9 < saved[31] / (seconds[30] - seconds[31]) < 0.95
assert 0.9 < saved[13] / (seconds[12] - seconds[13]) < 0.95
for n in (13, 31):
    print(f"record {n}: {seconds[n - 1] - seconds[n]:.1f} s, {saved[n]:.1f} of them by {fewer[n]} fewer steps")  # fmt: skip

# %% [markdown]
# Record 13 let the window grow in steps of 64 tokens, from 64 to 1,792, where record 12 had 1,024 throughout. It won by fewer steps and hardly by faster ones. It also changed Muon's rate, Adam's first beta and the fall of the rate, so the steps are not the window's alone. Record 31 brought the frequencies and the scale, and at the end validates with windows of 1,664 tokens, to which YaRN is applied once more. It also lengthened the fall of the rate from 45% to 50% of the steps. Its author's own estimate is that the last widening, from 1,408 to 1,664, is worth about 0.0015 of loss {cite}`moddednanogpt`. Were 35 steps bought at an equal loss?

# %%
final = {
    n: describe(float(row["final_val_loss"]) for row in public_table("variance") if row["record"] == str(n) and row["steps"] == ladder[n]["steps"])
    for n in (30, 31)
}  # fmt: skip
p = p_difference(final[31], final[30])
assert (final[30].n, final[31].n) == (10, 7) and 0 < final[31].mean - final[30].mean < 0.0015
assert 0.05 < p < 0.3
print(f"record 30: {final[30]}; record 31: {final[31]}; p = {p:.2f}")
curves = {n: {int(row["step"]): float(row["val_loss"]) for row in public_table("curves") if row["record"] == str(n)} for n in (30, 31)}  # fmt: skip
change = {n: (1 + int(ladder[n]["steps"])) / 3 for n in (30, 31)}
gaps = {step: curves[31][step] - curves[30][step] for step in (250, 375, 500, 625, 750)}
assert 500 < change[31] < change[30] < 625, "the first change lies between two validations"
assert all(-0.015 < gap < -0.005 for gap in gaps.values())
assert abs(gaps[625] - gaps[500]) < 0.001, "no difference that came with the change"
print("record 31's loss, less record 30's:", ", ".join(f"{gap:+.4f} at {step}" for step, gap in gaps.items()))  # fmt: skip

# %% tags=["hide-input"]
from speedrun.lab.results import load_result, measured_on

full = load_result("speedrun", "record_200m_plain_head")["data"]["runs"]
wide = [load_result("ablations", f"windows_{seed}") for seed in (0, 1)]
apart = [
    other["data"]["runs"][0]["curve"][-1]["val_loss"] - run["curve"][-1]["val_loss"]
    for other, run in zip(wide, full)
]
assert [f"{each:+.3f}" for each in apart] == ["+0.005", "+0.001"]
print("record_200m with windows as long as its documents:", [f"{each:+.4f}" for each in apart])
print(measured_on(wide[0]))

# %% [markdown]
# Nearly: record 31's losses are a little higher, by less than these runs can tell from chance. Along the way the one logged run of record 31 is ahead from the beginning, when its windows are the same and only the scale differs (0.100 against 0.12), and it is no further ahead after the first change than before. So these logs do not show what YaRN does at the change. They validate every 125 steps, the change lies between two of them, and it is a single run. The record's notes say that without YaRN there is a large spike of the loss right after it, and show it in a figure with finer steps; they also show both halves left out once each, as curves without numbers {cite}`moddednanogpt`. In `record_200m`, windows that were as long as the longest document from the beginning changed the loss by +0.005 with one seed and +0.001 with the other, and saved no time ([chapter 24](24_speedrun.py)); no document of that text is longer than 1,024 tokens.
#
# ## What it costs, and when it fails
#
# The computation is nothing: at each change a table of cosines and sines. What a change can cost is compilation. A Python integer is a constant to `torch.compile`; a tensor is data. Count the graphs that the four windows make:


# %%
def graphs_for(windows: list, dynamic: bool | None) -> int:
    """How many graphs torch.compile makes of windowed attention when the window goes through these values."""
    torch._dynamo.reset()
    made = []

    def count_and_run_eagerly(graph, example_inputs):
        made.append(graph)
        return graph.forward

    def attend(x: Tensor, window):
        hidden = (away[:8, :8] < 0) | (away[:8, :8] > window // BLOCK)
        return (x @ x.mT).masked_fill(hidden, -math.inf).softmax(-1) @ x

    fast, x = torch.compile(attend, backend=count_and_run_eagerly, dynamic=dynamic), torch.eye(8)
    for window in windows:
        assert torch.equal(fast(x, window), attend(x, window))
    return len(made)


as_data = [torch.tensor(window) for window in LONG]
counted = {
    "integers, dynamic=False": graphs_for(LONG, False),
    "integers, dynamic left to PyTorch": graphs_for(LONG, None),
    "0-d tensors": graphs_for(as_data, False),
}
assert [*counted.values()] == [4, 2, 1]
print(counted)

# %% [markdown]
# Upstream compiles with `dynamic=False` and passes integers, so each window is a graph of its own, for forward and backward, and each has to be warmed up before the clock starts. Left to itself, PyTorch makes a second graph in which the integer is a symbol; for a kernel that picks its tiles by it, that is not always as fast. The masks of [FlexAttention](09_flex_attention.py) and the kernel of [chapter 11](11_attention_backends.py) take the window as data, as they take frequencies and scale, so another window compiles nothing. But where passes are replayed from CUDA graphs, window and scale are part of the recording, and each [stage](14_schedule.py) has a graph of its own, recorded before the clock starts ([chapter 16](16_compile.py)).
#
# It fails, or does harm, in three ways.
#
# - **No document is longer than the window.** Then a wider one shows no new key, and there is nothing to gain. But frequencies and scale follow the windows all the same, and disturb a model that needed neither. The text that comes with this book has no document of more than 1,024 tokens, so its last change would be of that kind, and the one before it nearly.
# - **The old window is short.** Pairs are kept from 32 turns on, and the fastest turns by a radian a token: below 202 tokens *no* pair is kept, and the token before blurs with the one before it.
# - **Scores that can grow by themselves.** Without QK-norm the lengths of queries and keys learn their own scale.


# %%
def visible(window: int, lengths: list[int]) -> Tensor:
    """Which keys each query sees in packed documents."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(len(document))[:, None] - torch.arange(len(document))
    return (document[:, None] == document) & (distance >= 0) & (distance <= window)


assert torch.equal(visible(40, [30, 17, 40, 9]), visible(90, [30, 17, 40, 9])), "nothing to see"
assert not torch.equal(visible(40, [30, 17, 60, 9]), visible(90, [30, 17, 60, 9]))
assert yarn(spectrum, 202, 404)[0] == 1 > yarn(spectrum, 201, 402)[0]
assert (yarn(spectrum, 128, 384)[:32] < turning).all()
print(f"from 128 to 384 the fastest pair keeps {yarn(spectrum, 128, 384)[0]:.2f} of its frequency")

# %% [markdown]
# ## What did not work
#
# - **Less momentum around a change.** The loss jumps when the window widens, and momentum still points to where the gradient was. Damping it in Muon alone was worse (record 31's notes).
# - **Freezing the learned scalars** for some steps after each change came with record 52 and was gone two or three records later.
# - **Frequencies above one radian a token**, up to half a turn, brought nothing (record 31's notes).
# - **Even numbers of blocks.** The short window is half the long one, rounded down to whole blocks of 128. Long windows of an odd number of blocks, whose short window is less than half, did better, and nobody knows why (records 29 and 31).
# - **Shorter short windows in the last third** were proposed with record 72. They saved time and cost loss, and were not merged.
#
# ## Exercises
#
# 1. Solve the equation for the scale. Write `scale_that_keeps(scale, old, new, product, head_dim)`: the smallest scale at which a key with this product keeps its share when `old` unrelated keys become `new`; `math.inf` if there is none.


# %% tags=["solution"]
def scale_that_keeps(scale: float, old: int, new: int, product: float, head_dim: int) -> float:
    """The smaller root of σ′² d / 2 − σ′ m + (σ m − σ² d / 2 + ln(n′ / n)) = 0."""
    constant = scale * product - scale**2 * head_dim / 2 + math.log(new / old)
    inside = product**2 - 2 * head_dim * constant
    return (product - math.sqrt(inside)) / head_dim if inside >= 0 else math.inf


# %%
for cosine in (0.4, 0.5, 0.7, 1.0):
    m = 128 * cosine
    got = scale_that_keeps(0.1, 384, 896, m, 128)
    share_before = 0.1 * m - math.log(384) - 0.1**2 * 64
    share_after = got * m - math.log(896) - got**2 * 64
    assert abs(share_after - share_before) < 1e-6, (
        f"cosine {cosine}: ln p / (1 − p) was {share_before:.3f}, and with a scale of {got:.4f} it is {share_after:.3f}"
    )
    assert 0.1 < got <= m / 128, f"cosine {cosine}: {got:.4f} is not the smaller solution"
assert math.isclose(scale_that_keeps(0.1, 384, 384, 64.0, 128), 0.1), (
    f"with as many keys as before the scale stays 0.1, not {scale_that_keeps(0.1, 384, 384, 64.0, 128)}"
)
hopeless = scale_that_keeps(0.1, 384, 896, 20.0, 128)
assert hopeless == math.inf, f"a product of 20 cannot keep its share: inf, not {hopeless}"
record_like = scale_that_keeps(0.1, 384, 896, 64.0, 128)
assert abs(record_like - 0.11695) < 2e-4, f"a cosine of one half asks for 0.1169, not {record_like:.4f}"  # fmt: skip
print(f"a cosine of one half: {record_like:.5f}; record 89: {scales[1]:.5f}")

# %% [markdown]
# (Larger scores help a product of 20 only up to a scale of 0.156, and by then too little.)

# %%
best = 20.0 / 128  # where what the key gains over unrelated ones, s m - s² d / 2, is largest
assert f"{best:.3f}" == "0.156" and 20 * best - best**2 * 64 - (20 * 0.1 - 0.1**2 * 64) < math.log(896 / 384)  # fmt: skip

# %% [markdown]
# 2. Write `smallest_window(turning, pairs, fast)`: the smallest window, in whole tokens, from which a change leaves at least so many of the pairs wholly alone. `turning` are the frequencies, in any order.


# %% tags=["solution"]
def smallest_window(turning: Tensor, pairs: int, fast: float = 32.0) -> int:
    """The tokens in which the slowest pair that is to be kept goes round `fast` times."""
    slowest = turning.sort(descending=True).values[pairs - 1].item()
    return math.ceil(2 * math.pi * fast / slowest)


# %%
for pairs, turns_kept in ((1, 32.0), (3, 32.0), (8, 32.0), (8, 4.0), (20, 1.5)):
    for order in (turning, turning.flip(0)):
        got = smallest_window(order, pairs, turns_kept)
        here, shorter = (
            int((yarn(turning, window, 2 * window, turns_kept) == turning).sum())
            for window in (got, got - 1)
        )
        assert here >= pairs, f"{pairs} pairs, {turns_kept:g} turns: a window of {got} keeps {here}"
        assert shorter < pairs, f"{pairs} pairs, {turns_kept:g} turns: {got - 1} would do, too"
assert smallest_window(turning, 1) == 202, f"one pair is kept from 202 tokens on, not {smallest_window(turning, 1)}"  # fmt: skip
print({pairs: smallest_window(turning, pairs) for pairs in (1, 3, 8, 16)})

# %% [markdown]
# ## Since then
#
# Widening windows in the course of training is older than the contest; Longformer did it in phases {cite}`beltagy2020`. What the contest added is that each change costs seconds, and so has to be paid back. Record 33 widened the last layer's window to 2,560 tokens for the last validation, record 35 all long ones, without applying YaRN again; by their author's account each was worth a thousandth. Record 89 has the windows of this chapter, and a fourth stage of 15 steps, the extension, with windows of 768 and 1,664, before it validates at 2,560. Record 92, submitted in August 2026 and merged in September, starts from 0.085 in its wide heads and 0.13 in its narrow ones. A proposal to train the last steps at 2,560 as well was not merged.
