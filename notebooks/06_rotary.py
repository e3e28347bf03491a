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
# # Rotary embeddings: position as an angle
#
# ```{admonition} Cost box
# Any machine: about fifteen seconds on two CPU cores, no GPU. The comparisons took fifteen minutes on a laptop's two cores and are committed.
# Record 2: @kellerjordan0. Record 17: @YouJiacheng. Record 58: @classiclarryd.
# ```
#
# ## The problem
#
# Attention does not know where its tokens are: deal out keys and values in another order, and a query gathers the same. GPT-2 adds a learned vector for each position to the stream, **786,432 numbers** in all, and each is trained by the tokens at its own position alone. That a token should look at the one before it has to be learned at position 17, and again at 18. A row of 1,025 tokens has no vector for the last.

# %%
import torch

from speedrun.model.gpt import GPT, GPTOptions, parameter_table

learned = next(r for r in parameter_table(GPTOptions(), 50_257) if r.name == "position_embedding")
q, k, v = torch.randn(3, 1, 20, 16, generator=torch.Generator().manual_seed(0)).double()
attend = torch.nn.functional.scaled_dot_product_attention
order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
assert learned.shape[0] * learned.shape[1] == 786_432
assert torch.allclose(attend(q, k, v), attend(q, k[:, order], v[:, order]))
print("the order of keys and values makes no difference")

# %% [markdown]
# What attention should be told is how far apart two tokens are. Both know where they are themselves. So: give queries and keys their position in such a way that a product $q \cdot k$ can only see the *difference*.
#
# ```{admonition} Prediction
# A head has 128 numbers in its queries and keys, taken as 64 pairs. Each pair is turned by an angle, its position times a frequency, and the frequencies go down from 1 to nearly 1/10,000 in equal ratios. In a row of 1,024 tokens, **how many of the 64 pairs never turn by as much as a right angle?** Record 17 turned half of the pairs not at all. Would you expect that to cost anything?
# ```
#
# ## The idea
#
# Take a pair of numbers as a complex one. Turn the query at position $m$ by the angle $m\theta$ and the key at position $n$ by $n\theta$. The dot product of two pairs is the real part of one times the conjugate of the other, and there
#
# $$
# \operatorname{Re}\left(q e^{i m \theta}\, \overline{k e^{i n \theta}}\right) = \operatorname{Re}\left(q \bar k\, e^{i (m - n) \theta}\right),
# $$
#
# so of $m$ and $n$ only $m - n$ is left. That is all. It holds for one pair, so it holds for a sum over $d/2$ of them, each with a frequency of its own. A fast pair tells one token from the next and is the same again after a few; a slow one tells near from far. With frequencies $\theta_j = b^{-2j/d}$ and the *base* $b = 10{,}000$ this is rotary position embedding {cite}`su2021`. It has no parameters, it does not touch the values, and it turns without stretching, so what [QK-norm](05_modern_block.py) has made of a length it leaves.
#
# Is there another way? Ask for a matrix $A_m$ for every position, such that $(A_m q) \cdot (A_n k)$ depends on $m - n$ only. Then $A_m^\top A_n$ does, and with $A_0 = I$ it follows that $A_m^\top A_m = I$ and $A_{m+1} = A_m A_1$: the matrices are powers of one rotation $R$ of the whole space. In the right basis every rotation turns pairs of numbers by angles and nothing else. And the basis does not matter, because the matrices that make queries and keys can take it in. So with linear maps there is nothing to choose but the frequencies.
#
# A pair that hardly turns compares contents wherever they stand. Some of that is wanted, or attention could not find a name that was said long ago. Record 17 makes it a decision: half of the pairs have frequency zero, and the others go from 1 to 1/1024. It is called half-truncated.
#
# ## The code

# %%
#| default_exp model.rotary
#| export
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class RotaryOptions:
    """How attention learns where tokens are. The defaults are GPT-2's."""

    positions: Literal["learned", "rotary", "half"] = "learned"
    """learned: a vector for every position. rotary: turn queries and keys. half: turn half of their pairs."""
    base: float = 10_000.0
    """The slowest pair turns by about 1/base a token; record 17's is 1024."""
    pairs: Literal["halves", "neighbours"] = "halves"
    """Which numbers are a pair: one of the first half with one of the second, or two that stand side by side."""


def frequencies(head_dim: int, options: RotaryOptions) -> Tensor:
    """Radians a token of each pair, (head_dim / 2,), float32, falling; half: the second half of them zeros."""
    if options.positions == "half":
        turning = (1 / options.base) ** torch.linspace(0, 1, head_dim // 4)
        return torch.cat([turning, torch.zeros(head_dim // 2 - len(turning))])
    return options.base ** -(torch.arange(head_dim // 2) / (head_dim // 2))


# %%
import math

FULL, HALF = RotaryOptions("rotary"), RotaryOptions("half", base=1024.0)
spectrum = {"rotary": frequencies(128, FULL), "half": frequencies(128, HALF)}
slow = {name: int((1023 * each < math.pi / 2).sum().item()) for name, each in spectrum.items()}
assert spectrum["rotary"][0] == spectrum["half"][0] == 1
assert (
    torch.allclose(spectrum["half"][31], torch.tensor(1 / 1024)) and not spectrum["half"][32:].any()
)
assert slow == {"rotary": 18, "half": 35} and 1023 * spectrum["half"][31] < 1
print("pairs of 64 that turn by less than a right angle in 1,024 tokens:", slow)

# %% [markdown]
# More than a quarter of the pairs hardly turns even at base 10,000: nobody decided that, it is what the formula gives. Half-truncation decides it. Half of the pairs compare contents only, and the slowest of the others turns by one radian in 1,024 tokens.
#
# Cosines and sines depend on the position and the pair, and on nothing else. They are computed once, for the longest row.


# %%
#| export
def rotation_tables(tokens: int, head_dim: int, options: RotaryOptions) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angle for every pair, (tokens, head_dim / 2) each, float32."""
    angles = torch.outer(torch.arange(tokens).float(), frequencies(head_dim, options))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: str) -> Tensor:
    """Queries or keys, (…, tokens, head_dim), each pair turned by its angle (Su and others 2021)."""
    halves = pairs == "halves"
    a, b = x.chunk(2, -1) if halves else x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[: x.shape[-2]].to(x.dtype), sin[: x.shape[-2]].to(x.dtype)
    turned = a * cos - b * sin, a * sin + b * cos
    return torch.cat(turned, -1) if halves else torch.stack(turned, -1).flatten(-2)


# %% [markdown]
# The test of such code is the property it was made for. Put one query and one key at many random positions; their product may depend on nothing but the distance:


# %%
def product_at(m: int, n: int, q, k, turn, tables) -> float:
    """q at position m times k at position n."""
    rows = [torch.zeros(len(tables[0]), len(q)).double() for _ in range(2)]
    rows[0][m], rows[1][n] = q, k
    return (turn(rows[0], *tables)[m] @ turn(rows[1], *tables)[n]).item()


def worst_error(turn, options: RotaryOptions, tries: int = 200) -> float:
    """How much a product changes if both tokens move together, at worst, as a share of |q| |k|."""
    draw = torch.Generator().manual_seed(3)
    tables, worst = [table.double() for table in rotation_tables(512, 16, options)], 0.0
    for _ in range(tries):
        q, k = torch.randn(2, 16, generator=draw).double()
        m, n, shift = (int(torch.randint(256, (), generator=draw)) for _ in range(3))
        here = product_at(m, n, q, k, turn, tables)
        there = product_at(m + shift, n + shift, q, k, turn, tables)
        worst = max(worst, abs(here - there) / (q.norm() * k.norm()).item())
    return worst


# %%
from functools import partial

kinds = [RotaryOptions(p, b, pairs) for p, b in (("rotary", 10_000.0), ("half", 1024.0)) for pairs in ("halves", "neighbours")]  # fmt: skip
errors = [worst_error(partial(rotate, pairs=kind.pairs), kind) for kind in kinds]
assert max(errors) < 1e-4, "angles are rounded to float32 before cosines are taken"
x = torch.randn(7, 16)
still = rotate(x, *rotation_tables(7, 16, HALF), "halves")
assert torch.allclose(still.norm(dim=-1), x.norm(dim=-1)), "nothing is stretched"
assert torch.equal(still[:, 4:8], x[:, 4:8]) and torch.equal(still[:, 12:], x[:, 12:])
print(f"moved together, products change by at most {max(errors):.0e} of |q||k|")


# %% [markdown]
# There is a popular way to get it wrong: a sign on the other of the two sines. The result is no rotation but a reflection of one number and a shear; it runs, its shapes fit, and a model even trains with it.


# %%
def rotate_wrongly(x, cos, sin):
    """One sign is missing."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos + b * sin, a * sin + b * cos], -1)


caught = worst_error(rotate_wrongly, FULL)
assert caught > 0.5 > 1e-4 > max(errors)
print(f"with one sign missing: {caught:.1f}")

# %% [markdown]
# That it had to be pairs can be seen, too. Take any rotation of a space of eight dimensions, and use its powers:

# %%
skew = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
rotation = torch.linalg.matrix_exp(skew - skew.mT)
power = torch.linalg.matrix_power
q, k = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
products = [(power(rotation, m) @ q) @ (power(rotation, m + 3) @ k) for m in range(40)]
turns = torch.linalg.eigvals(rotation)
assert max(products) - min(products) < 1e-10, "only the distance counts"
assert torch.allclose(turns.abs(), torch.ones(8).double())
angles = turns.angle().abs().sort().values
assert torch.allclose(angles[::2], angles[1::2]), "eigenvalues come in pairs, e^iθ and e^-iθ"
print("a random rotation turns four pairs by", [f"{angle:.2f}" for angle in angles[::2].tolist()])

# %% [markdown]
# ### How sharp can a place be?
#
# With QK-norm a score is at most $\sqrt d$, and the fastest pair turns by one radian a token. How much can a head prefer the token just before to all others, if it looks at nothing but the place? Query and key may put their length into the pairs as they like, in shares $w_j$, and give each a phase so that it is largest at distance 1. At a distance $\Delta$ the score is then $\sqrt d \sum_j w_j \cos \theta_j(\Delta - 1)$. The best shares make the second-best distance as bad as possible, which is a linear program:

# %%
from scipy.optimize import linprog


def sharpness(head_dim: int, options: RotaryOptions, tokens: int) -> tuple[float, Tensor]:
    """By how much the score at distance 1 can exceed that of all others, and the shares of the pairs."""
    away = torch.tensor([n - 1 for n in range(tokens) if n != 1]).double()
    loss = 1 - torch.outer(away, frequencies(head_dim, options).double()).cos()
    pairs = loss.shape[1]
    most = linprog(  # of the margin, the last variable
        [0.0] * pairs + [-1.0],
        A_ub=torch.cat([-loss, torch.ones(len(loss), 1)], 1).numpy(),
        b_ub=[0.0] * len(loss),
        A_eq=[[1.0] * pairs + [0.0]],
        b_eq=[1.0],
    )
    return math.sqrt(head_dim) * -most.fun, torch.tensor(most.x[:-1])


margin, shares = sharpness(128, FULL, 1024)
half_margin, _ = sharpness(128, HALF, 1024)
one_pair = math.sqrt(128) * (1 - math.cos(1.0))
assert 3.6 < margin < 3.8 and 3.5 < half_margin < 3.7 and one_pair > 5
print(f"best margin: rotary {margin:.2f}, half-truncated {half_margin:.2f}")

# %%
places = torch.arange(1024).double() - 1
scores = math.sqrt(128) * torch.outer(places, spectrum["rotary"].double()).cos() @ shares
weight = scores.softmax(0)[1].item()
larger = (1.35 * scores).softmax(0)[1].item()  # record 20: 0.12 in place of 1 / sqrt(128)
assert scores[1] == scores.max() and abs(scores[1] - scores.sort().values[-2] - margin) < 1e-6
assert shares[0] > 0.5 and 0.12 * math.sqrt(128) > 1.35
assert math.cos(6) > 0.96 and math.cos(44) > 0.999
assert 0.3 < weight < 0.35 and 0.65 < larger < 0.72 and 0.03 < 1 - half_margin / margin < 0.05
print(f"the fastest pair has {shares[0]:.0%} of the length")
print(
    f"the token before gets {weight:.0%} of the attention in a row of 1,024; with scores × 1.35: {larger:.0%}"
)

# %% [markdown]
# So by its place alone, the token before can have a third of a head's attention and no more. More than half of the length goes into the fastest pair, and the rest has to undo that this pair is nearly the same again after six tokens, and after 44. Slow pairs have little to add: half-truncation throws half of the pairs away and loses four per cent of the margin. What would help is a faster pair, or a larger factor than $1/\sqrt{128}$. A faster one was tried and brought nothing. The factor became 0.12 with record 20, a third more, which makes two thirds of the attention out of one; its author counts it as twenty steps {cite}`moddednanogpt`.
#
# ### Sixteen bits
#
# Record 89 keeps its cosines and sines in bfloat16. A cosine rounded to eight bits is off by a few thousandths. An *angle* rounded so is another matter: beyond position 256 bfloat16 has no odd numbers. So angles are float32, and only their cosines are rounded:

# %%
exact = torch.outer(torch.arange(1024).double(), spectrum["rotary"].double())
angle_first = exact.bfloat16().double().cos() - exact.cos()
cosine_last = exact.cos().bfloat16().double() - exact.cos()
assert cosine_last.abs().max() < 2**-8 < 1 < angle_first.abs().max()
assert torch.tensor([257.0, 259.0]).bfloat16().tolist() == [256.0, 260.0]
shifted = {}
for name, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
    cos, sin = (table.to(kind).double() for table in rotation_tables(1024, 128, FULL))
    q, k = torch.randn(2, 128, generator=torch.Generator().manual_seed(4)).double()
    turned = [rotate(one.expand(1024, 128), cos, sin, "halves") for one in (q, k)]
    next_to = (turned[0][1:] * turned[1][:-1]).sum(-1) / (q.norm() * k.norm())
    shifted[name] = (next_to.max() - next_to.min()).item()
assert shifted["float32"] < 1e-4 and 1e-3 < shifted["bfloat16"] < 1e-2
print(f"a cosine of a rounded angle is off by up to {angle_first.abs().max():.1f}")
print(f"a rounded cosine by {cosine_last.abs().max():.4f}")
print(
    {name: f"{spread:.0e}" for name, spread in shifted.items()},
    "is how products at distance 1 vary",
)

# %% [markdown]
# With rounded tables the property is no longer exact: one and the same query and key at distance 1 give products that differ, from place to place, by a thousandth of their lengths. Nobody has seen it matter.
#
# ### In the model
#
# [The model](21_model.py) keeps the tables as buffers, which are not trained and not saved, and turns queries and keys behind their norm. The learned vectors are gone from its table:

# %%
from speedrun.config import preset, switches_of, vary

turning = {"rotary.positions": "half", "rotary.base": 1024.0}
switches = switches_of(vary(preset("record"), turning))
model = GPT(GPTOptions(layers=2, heads=2, width=32, context=64), 288, switches=switches)
row = torch.randint(288, (1, 24), generator=torch.Generator().manual_seed(5))
captured = torch.compile(model, fullgraph=True, backend="eager")
assert torch.equal(captured(row), model(row)), "one graph"
names = {name for name, _ in model.named_parameters()}
assert set(model.state_dict()) == names and "position_embedding" not in names
print(
    f"tables of {tuple(model.cos.shape)}: as many positions as the longest row, half a head's numbers"
)

# %% [markdown]
# ## The measurement
#
# On the laptop's model with the modern block of [the last chapter](05_modern_block.py), 600 steps under today's Muon, and 2,000. Its rates were tuned with learned positions; nothing is tuned anew. Its rows have 128 tokens, so record 17's base of 1024 is long and 10,000 is longer.

# %% tags=["hide-input"]
#| default_exp measure.rotary
#| export
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from speedrun.config import Config, vary
from speedrun.lab.hardware import look
from speedrun.lab.results import stamp
from speedrun.measure.runs import best_of, corpus_of, train_arms, train_many

NAMES = ("positions", "long", "beyond")
ARMS: dict[str, dict[str, Any]] = {
    "rotary 10000": {"rotary.positions": "rotary"},
    "rotary 1024": {"rotary.positions": "rotary", "rotary.base": 1024.0},
    "half 1024": {"rotary.positions": "half", "rotary.base": 1024.0},
}


def arms_of(name: str) -> dict[str, Config]:
    """Three ways to turn; the modern block else, at its tuned rates. Chapter 05 has it with learned positions."""
    modern = best_of("modern_block", "rates")
    modern = vary(
        modern, {"steps": 2000, "muon.momentum_steps": (460, 80)} if name == "long" else {}
    )
    return {arm: vary(modern, change) for arm, change in ARMS.items()}


# %% tags=["hide-input"]
#| export
def loss_by_position(run: Config) -> list[float]:
    """Train a run; then the mean loss of each position in validation rows of twice the length."""
    from speedrun.train import assemble, build_model, held_out, train_step

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        live = assemble(run, Path(folder), echo=None)
        for _ in range(run.steps):
            train_step(live)
        twice = 2 * run.data.seq_len
        live.config = vary(run, {"data.seq_len": twice, "model.context": twice})
        longer, _ = build_model(
            live.config, live.loader.shards.manifest.vocab_size, live.ranks.device
        )
        longer.load_state_dict(live.model.state_dict())
        sums, rows = torch.zeros(twice), 0
        with torch.no_grad():
            for batch in held_out(live, run.val_tokens):
                logits = longer(batch.inputs).transpose(1, 2)
                losses = F.cross_entropy(logits, batch.targets, reduction="none")
                sums, rows = sums + losses.sum(0), rows + len(losses)
    return (sums / rows).tolist()


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train the arms with paired seeds, {"arms": {arm: [run, …]}}; long: for 2,000 steps.

    beyond: each arm's loss by position in rows twice as long as it was trained on, {"arms": {arm: [losses, …]}}.
    """
    arms, seeds = arms_of(name), 5 if name == "positions" else 3
    facts = stamp(command, ["speedrun.measure.rotary", "speedrun.train"], seeds, range(seeds), corpus_of(arms["half 1024"]))  # fmt: skip
    if name != "beyond":
        return {"arms": train_arms(arms, seeds, train_many)}, facts
    runs = [vary(run, {"seed": seed}) for run in arms.values() for seed in range(seeds)]
    with ProcessPoolExecutor(look().cores, get_context("spawn")) as pool:
        found = list(pool.map(loss_by_position, runs))
    return {"arms": {arm: found[3 * n : 3 * n + 3] for n, arm in enumerate(arms)}}, facts


# %%
from speedrun.lab.results import load_result, measured_on
from speedrun.lab.stats import describe, p_difference

found = {
    name: {
        arm: describe(run["val_loss"] for run in runs)
        for arm, runs in load_result("rotary", name)["data"]["arms"].items()
    }
    for name in ("positions", "long")
}
learned = {
    name: describe(
        run["val_loss"] for run in load_result("modern_block", control)["data"]["arms"]["modern"]
    )
    for name, control in (("positions", "without"), ("long", "long"))
}
for name, steps in (("positions", 600), ("long", 2000)):
    print(f"{steps} steps\n  learned      {learned[name]}")
    for arm, sample in found[name].items():
        apart, p = sample.mean - learned[name].mean, p_difference(sample, learned[name])
        print(f"  {arm:12} {sample}  {apart:+.3f}  p = {p:.0e}")
print(measured_on(load_result("rotary", "positions")))

# %%
short = found["positions"]
gain = {arm: learned["positions"].mean - sample.mean for arm, sample in short.items()}
half_costs = short["half 1024"].mean - short["rotary 1024"].mean
base_gains = short["rotary 10000"].mean - short["rotary 1024"].mean
p_half, p_base = (
    p_difference(short["rotary 1024"], short[arm]) for arm in ("half 1024", "rotary 10000")
)
assert 0.13 < min(gain.values()) < 0.14 and 0.16 < max(gain.values()) < 0.18
assert 0.03 < half_costs < 0.036 and p_half < 0.01 and 0.005 < base_gains < 0.01 and 0.01 < p_base
print(f"base 1024 in place of 10,000: {base_gains:.3f} lower, p = {p_base:.2f}")
print(f"half-truncated: {half_costs:.3f} higher, p = {p_half:.4f}")

# %% [markdown]
# This is the largest step of any single change in this part of the book: 0.16 nats, where all six of the last chapter's changes brought a hundredth. And it is fewer parameters. The base makes little difference. Half-truncation costs three hundredths here, in rows of 128 tokens, which half of the pairs can still count; it was adopted for rows of thousands.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: how alike a query and an equal key are at each distance, for three ways to turn; right: loss at each position of rows twice as long as those that were trained on"}}
import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style

figure_style()
beyond = load_result("rotary", "beyond")["data"]["arms"]
SPECTRA = {
    "rotary 10000": FULL,
    "rotary 1024": RotaryOptions("rotary", base=1024.0),
    "half 1024": HALF,
}
fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.3), layout="constrained")
distance = torch.arange(257).float()
after = {}
for n, (arm, options) in enumerate(SPECTRA.items()):
    echo = torch.outer(distance, frequencies(64, options)).cos().mean(1)
    axes[0].plot(distance, echo, color=f"C{n}", label=arm)
    losses = torch.tensor(beyond[arm]).mean(0)
    after[arm] = [losses[a:b].mean().item() for a, b in ((64, 128), (128, 192), (192, 256))]
    axes[1].plot(losses.view(-1, 4).mean(1).repeat_interleave(4), color=f"C{n}", label=arm)
axes[0].set_xlabel("distance (tokens)")
axes[0].set_ylabel("q · k of equal contents, of 1")
axes[1].axvline(128, color="0.5", lw=0.8)
axes[1].set_xlabel("position in the row; trained on 128")
axes[1].set_ylabel("loss (nats)")
axes[1].set_ylim(1.8, 2.4)
axes[0].legend()
worse = {arm: three[2] - three[0] for arm, three in after.items()}
fig.suptitle(
    f"trained on rows of 128, it reads the end of rows of 256 at {worse['rotary 1024']:+.2f} nats, half-truncated at {worse['half 1024']:+.2f}"
)
plt.show()

# %%
assert (
    all(0.05 < rise < 0.2 for rise in worse.values()) and worse["half 1024"] > worse["rotary 1024"]
)
for arm, three in after.items():
    print(
        f"{arm:12} positions 64 to 127: {three[0]:.2f}; 128 to 191: {three[1]:.2f}; 192 to 255: {three[2]:.2f}"
    )

# %% [markdown]
# On the left is what remains of $q \cdot k$ when both have the same contents and lie apart. It is not what attention sees, which learns its own queries and keys, but it shows the two kinds of pairs: those that turn make a peak at distance zero, those that stand a floor. On the right are the same models on rows twice as long as they have ever seen. With learned positions there would be nothing to look up. Turning goes on, and costs a tenth of a nat at the end: these models gain nothing by the longer context, and are not lost in it either.
#
# ## What it costs, and when it fails
#
# Two multiplications a number, for queries and keys, and tables that fit into any cache. A compiled model fuses it with the norm. It is computed again in every layer, since every layer has its own queries.
#
# What it cannot do is say *where* in a row a token is. Nothing in such a model knows that it is the first one, except that there is nothing before it.
#
# ## What did not work
#
# Record 58 paired neighbours in place of halves and forgot that another part of attention, which moves keys by one token in the numbers that do not turn, had been written for halves. It went on running, with a worse loss, until record 62 put it right: half a second of 5.6 was that mistake's {cite}`moddednanogpt`. Both ways are the same function up to the order of the numbers, which nobody sees but code that picks some of them:

# %%
order = (
    torch.arange(16).view(2, 8).mT.flatten()
)  # number j of the first half beside that of the second
x = torch.randn(5, 16, dtype=torch.float64)
by_halves = rotate(x, *(t.double() for t in rotation_tables(5, 16, FULL)), "halves")
by_pairs = rotate(x[:, order], *(t.double() for t in rotation_tables(5, 16, FULL)), "neighbours")
assert torch.allclose(by_halves[:, order], by_pairs, atol=1e-12)
stands = {
    pairs: rotate(torch.ones(2, 16), *rotation_tables(2, 16, HALF), pairs)[1] == 1
    for pairs in ("halves", "neighbours")
}
assert stands["halves"].nonzero()[:, 0].tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
assert stands["neighbours"].nonzero()[:, 0].tolist() == list(range(8, 16))
print("numbers of 16 that do not turn:", {p: s.nonzero()[:, 0].tolist() for p, s in stands.items()})

# %% [markdown]
# ## Exercises
#
# 1. Write `rotate_complex(x, positions, options)` for neighbours, with complex numbers: `torch.view_as_complex` makes them of pairs, and `torch.polar` makes $e^{i m \theta}$.


# %% tags=["solution"]
def rotate_complex(x: Tensor, positions: Tensor, options: RotaryOptions) -> Tensor:
    """Pairs of neighbours as complex numbers, times a number of length one."""
    angles = torch.outer(positions.to(x.dtype), frequencies(x.shape[-1], options).to(x.dtype))
    numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


# %%
x = torch.randn(3, 9, 16)
for options in (FULL, HALF):
    by_table = rotate(x, *rotation_tables(9, 16, options), "neighbours")
    assert torch.allclose(rotate_complex(x, torch.arange(9), options), by_table, atol=1e-5)
print("the same")

# %% [markdown]
# 2. How far does a spectrum reach? Write `longest_period(head_dim, options)`: the tokens in which the slowest pair that turns at all has gone round once.


# %% tags=["solution"]
def longest_period(head_dim: int, options: RotaryOptions) -> float:
    """Tokens to a full turn of the slowest pair that turns."""
    turning = frequencies(head_dim, options)
    return 2 * math.pi / turning[turning > 0].min().item()


# %%
assert abs(longest_period(128, HALF) - 2 * math.pi * 1024) < 1
assert 54_000 < longest_period(128, FULL) < 55_000
print(
    f"base 10,000: {longest_period(128, FULL):,.0f} tokens; half-truncated: {longest_period(128, HALF):,.0f}"
)

# %% [markdown]
# ## Since then
#
# Record 31 slows the frequencies down as windows grow (YaRN), from the values that half-truncation gives; record 89 still turns half of the numbers, since record 58 as neighbours. The part that does not turn has found a use of its own: record 49 compares it with the token before.
