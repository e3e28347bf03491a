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
# About fifteen seconds on two CPU cores; within three minutes on one GPU. The comparisons are committed: fifteen minutes on a laptop's two cores, and 24 runs of 20 seconds on H100s.
# Record 2: \@kellerjordan0. Record 17: \@YouJiacheng. Record 20: \@leloykun and others. Records 31, 49, 58, 62: \@classiclarryd. Record 32: \@bernard24 and hiverge.ai. Record 90: \@theonlyglitch_.
# ```
#
# ## The problem
#
# Attention does not know where its tokens are: permute keys and values, and a query gathers the same. (A causal mask tells how many came before, and no more.) GPT-2 adds a learned vector for each position to the stream, **786,432 numbers** in all, and each is trained by the tokens at its own position alone. That a token should look at the one before it has to be learned at position 17, and again at 18. A row of 1,025 tokens has no vector for the last.

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
import torch

from speedrun.model.gpt import GPT, GPTConfig, param_specs

learned = next(r for r in param_specs(GPTConfig(), 50_257) if r.name == "pos_embed")
draws = torch.randn(3, 1, 20, 16, generator=torch.Generator().manual_seed(0))
q, k, v = draws.double().to(tier.device)
attend = torch.nn.functional.scaled_dot_product_attention
order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
assert learned.shape[0] * learned.shape[1] == 786_432
assert torch.allclose(attend(q, k, v), attend(q, k[:, order], v[:, order]))
print("the order of keys and values makes no difference")

# %% [markdown]
# What attention should be told is how far apart two tokens are. Each token's place is known when its query or its key is made. So: put it into them in such a way that a product $q \cdot k$ can only see the *difference*.
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
# Is there another way? Ask for a matrix $A_m$ for every position, such that $(A_m q) \cdot (A_n k)$ depends on $m - n$ only. Then $A_m^\top A_n$ does, and with $A_0 = I$ it follows that $A_m^\top A_m = I$ and $A_{m+1} = A_m A_1$: the matrices are powers of one orthogonal matrix. In the right basis it turns pairs by angles (a lone ±1 aside). That basis is orthogonal, so the matrices that make queries and keys can take it in, and a norm between does not notice. With one linear map for both, then, only the frequencies are left to choose. With two different ones $q^\top M^{n-m} k$ is possible, which can fade with the distance {cite}`sun2022`.
#
# A pair that turns by less than a right angle in a row never turns likeness into its opposite, and the slowest compare contents nearly wherever they stand. Some of that is wanted, so that a name is found that was said long ago. Record 17 makes it a decision: half of the pairs have frequency zero, and the others go from 1 to 1/1024. It is called half-truncated.
#
# ## The code

# %%
#| default_exp model.rotary
#| export
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from speedrun.lab.bounds import PositiveFloat


@dataclass(frozen=True)
class RotaryConfig:
    """How attention learns where tokens are. The defaults are GPT-2's."""

    pos: Literal["learned", "rope", "half_rope"] = "learned"
    """learned: a vector for every position. rope: rotary embeddings, turn queries and keys. half_rope: half-truncated, turn half of their pairs."""
    base: PositiveFloat = 10_000.0
    """The slowest pair turns by about 1/base a token; record 17's is 1024."""
    interleaved: bool = False
    """Two numbers that stand side by side are a pair (GPT-J), and not one of the first half with one of the second (GPT-NeoX)."""


def frequencies(head_dim: int, options: RotaryConfig) -> Tensor:
    """Radians a token of each pair, (head_dim / 2,), float32, falling; half_rope: the second half of them zeros."""
    if options.pos == "half_rope":
        turning = (1 / options.base) ** torch.linspace(0, 1, head_dim // 4)
        return torch.cat([turning, torch.zeros(head_dim // 2 - len(turning))])
    return options.base ** -(torch.arange(head_dim // 2) / (head_dim // 2))


# %%
import math

FULL, HALF = RotaryConfig("rope"), RotaryConfig("half_rope", base=1024.0)
spectrum = {"rope": frequencies(128, FULL), "half_rope": frequencies(128, HALF)}
slow = {name: int((1023 * each < math.pi / 2).sum().item()) for name, each in spectrum.items()}
assert spectrum["rope"][0] == spectrum["half_rope"][0] == 1
assert (
    torch.allclose(spectrum["half_rope"][31], torch.tensor(1 / 1024))
    and not spectrum["half_rope"][32:].any()
)
assert slow == {"rope": 18, "half_rope": 35} and 1023 * spectrum["half_rope"][31] < 1
print("pairs of 64 that turn by less than a right angle in 1,024 tokens:", slow)

# %% [markdown]
# More than a quarter of the pairs do not turn by a right angle even at base 10,000: nobody decided that, it is what the formula gives. Half-truncation decides it. Half of the pairs compare contents only, and the slowest of the others turns by one radian in 1,024 tokens.
#
# Cosines and sines depend on the position and the pair, and on nothing else. They are computed once, for the longest row.


# %%
#| export
def rotary_tables(tokens: int, head_dim: int, options: RotaryConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angle for every pair, (tokens, head_dim / 2) each, float32."""
    angles = torch.outer(torch.arange(tokens).float(), frequencies(head_dim, options))
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Queries or keys, (…, tokens, head_dim), each pair turned by its angle (Su and others 2021)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, -1)
    cos, sin = cos[: x.shape[-2]].to(x.dtype), sin[: x.shape[-2]].to(x.dtype)
    turned = a * cos - b * sin, a * sin + b * cos
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)


# %% [markdown]
# The test of such code is the property it was made for. Put one query and one key at many random positions; their product may depend on nothing but the distance:


# %%
def product_at(m: int, n: int, q, k, turn, tables) -> float:
    """q at position m times k at position n."""
    rows = [torch.zeros(len(tables[0]), len(q)).double() for _ in range(2)]
    rows[0][m], rows[1][n] = q, k
    return (turn(rows[0], *tables)[m] @ turn(rows[1], *tables)[n]).item()


def worst_error(turn, options: RotaryConfig, tries: int = 200) -> float:
    """How much a product changes if both tokens move together, at worst, as a share of |q| |k|."""
    draw = torch.Generator().manual_seed(3)
    tables, worst = [table.double() for table in rotary_tables(512, 16, options)], 0.0
    for _ in range(tries):
        q, k = torch.randn(2, 16, generator=draw).double()
        m, n, shift = (int(torch.randint(256, (), generator=draw)) for _ in range(3))
        here = product_at(m, n, q, k, turn, tables)
        there = product_at(m + shift, n + shift, q, k, turn, tables)
        worst = max(worst, abs(here - there) / (q.norm() * k.norm()).item())
    return worst


# %%
from functools import partial

kinds = [RotaryConfig(p, b, side_by_side) for p, b in (("rope", 10_000.0), ("half_rope", 1024.0)) for side_by_side in (False, True)]  # fmt: skip
errors = [worst_error(partial(apply_rotary, interleaved=kind.interleaved), kind) for kind in kinds]
assert max(errors) < 1e-4, "angles are rounded to float32 before cosines are taken"
x = torch.randn(7, 16)
still = apply_rotary(x, *rotary_tables(7, 16, HALF))
assert torch.allclose(still.norm(dim=-1), x.norm(dim=-1)), "nothing is stretched"
assert torch.equal(still[:, 4:8], x[:, 4:8]) and torch.equal(still[:, 12:], x[:, 12:])
print(f"moved together, products change by at most {max(errors):.0e} of |q||k|")


# %% [markdown]
# Not to turn at all would pass that test, too. So one product has to be what the formula says:

# %%
q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(5)).double()
tables = [table.double() for table in rotary_tables(64, 16, FULL)]
product = torch.complex(q[:8], q[8:]) * torch.complex(k[:8], k[8:]).conj()
wanted = (product * torch.exp(1j * (40 - 7) * frequencies(16, FULL).double())).sum().real
assert abs(product_at(40, 7, q, k, apply_rotary, tables) - wanted) < 1e-4
print(f"positions 40 and 7: {wanted:.3f} both ways; side by side: {q @ k:.3f}")


# %% [markdown]
# One easy mistake is to lose the minus. On the other sine it would turn the other way, which is as good. Without it a pair's diagonals are stretched, by $\cos + \sin$ and $\cos - \sin$; the code runs, and its shapes fit.


# %%
def rotate_wrongly(x, cos, sin):
    """One sign is missing."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos + b * sin, a * sin + b * cos], -1)


caught = worst_error(rotate_wrongly, FULL)
backwards = worst_error(lambda x, cos, sin: apply_rotary(x, cos, -sin), FULL)
assert caught > 0.5 and max(backwards, *errors) < 1e-4
print(f"with one sign missing: {caught:.1f}")

# %% [markdown]
# That any rotation will do, and comes down to pairs, can be checked. Take one of a space of eight dimensions, and use its powers:

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
# ### How much attention can position alone give the token before?
#
# With QK-norm a score is at most $\sqrt d$, and the fastest pair turns by one radian a token. How much of its attention can a head give to the token just before, if it looks at nothing but the place? Query and key put the same shares $w_j$ of their squared length into the pairs, turned such that every pair's score is largest at distance 1. At a distance $\Delta$ it is then $\sqrt d \sum_j w_j \cos \theta_j(\Delta - 1)$. Choose the shares that give the token before the largest weight in a softmax over a row of 1,024 (a convex problem, so a minimiser finds the best; other phases would add half a point):

# %%
from scipy.optimize import minimize


def most_attention(options: RotaryConfig, scale: float, head_dim: int = 128, tokens: int = 1024):
    """The largest weight that distance 1 can have by its place alone, and the shares of the pairs."""
    away = torch.arange(tokens).double() - 1
    scores = head_dim * scale * torch.outer(away, frequencies(head_dim, options).double()).cos()

    def loss(logits):
        free = torch.tensor(logits, requires_grad=True)
        of_each = scores @ free.softmax(0)
        value = of_each.logsumexp(0) - of_each[1]
        value.backward()
        return value.item(), free.grad.numpy()

    best = minimize(loss, [0.0] * scores.shape[1], jac=True, method="L-BFGS-B")
    return math.exp(-best.fun), torch.tensor(best.x).softmax(0)


(whole, shares), (half, _) = (most_attention(each, 128**-0.5) for each in (FULL, HALF))
raised, _ = most_attention(HALF, 0.12)
assert 0.77 < whole < 0.8 and 0.73 < half < 0.76 and 0.91 < raised < 0.93
assert 0.19 < shares[0] < 0.23 and shares[46:].sum() < 1e-3
print(f"rotary {whole:.0%}, half-truncated {half:.0%}; with scores times 0.12: {raised:.0%}")
print(
    f"the fastest pair takes {shares[0]:.0%} of the squared length, the 18 slowest {shares[46:].sum():.0%}"
)

# %% [markdown]
# So by its place alone the token before can have about three quarters of a head's attention at the end of such a row. Half-truncation, with its smaller base, costs only a twentieth of that, although half of the pairs stand still. Record 20 multiplied scores by 0.12 in place of $1/\sqrt{128}$, a third more, and by its authors' count saved twenty steps {cite}`moddednanogpt`. That raises the bound to 92 per cent. Whether it is why it helped, nobody tested: scores of contents grow by the same third. And frequencies above one, which would make places sharper, were tried with record 31 and brought nothing.
#
# ### Sixteen bits
#
# Records 5 to 13 kept cosines and sines in bfloat16, and so do all since record 32. A cosine rounded to eight bits is off by at most two thousandths. An *angle* rounded so is another matter: beyond position 256 bfloat16 has no odd numbers. So angles are float32, and only their cosines are rounded:

# %%
exact = torch.outer(torch.arange(1024).double(), spectrum["rope"].double())
angle_first = exact.bfloat16().double().cos() - exact.cos()
cosine_last = exact.cos().bfloat16().double() - exact.cos()
assert cosine_last.abs().max() < 2**-8 < 1 < angle_first.abs().max()
assert torch.tensor([257.0, 259.0]).bfloat16().tolist() == [256.0, 260.0]
shifted = {}
for name, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
    cos, sin = (table.to(kind).double() for table in rotary_tables(1024, 128, FULL))
    q, k = torch.randn(2, 128, generator=torch.Generator().manual_seed(4)).double()
    turned = [apply_rotary(one.expand(1024, 128), cos, sin) for one in (q, k)]
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
# With rounded tables the property is no longer exact: this random query and key, at distance 1, give products that differ from place to place by a thousandth of their lengths. We know of no record that reports a loss from it.
#
# ### In the model
#
# [The model](21_model.py) keeps the tables as buffers, which are not trained and not saved, and turns queries and keys after their norm. The learned vectors are gone from its table of parameters:

# %%
turning = RotaryConfig("half_rope", base=1024.0)
shape = GPTConfig(num_layers=2, num_heads=2, model_dim=32, max_seq_len=64, rotary=turning)
model = GPT(shape, 288).to(tier.device)
row = torch.randint(288, (1, 24), generator=torch.Generator().manual_seed(5)).to(tier.device)
captured = torch.compile(model, fullgraph=True, backend="eager")
assert torch.equal(captured(row), model(row)), "one graph"
names = {name for name, _ in model.named_parameters()}
assert set(model.state_dict()) == names and "pos_embed" not in names
print(
    f"tables of {tuple(model.cos.shape)}: as many positions as the longest row, half a head's numbers"
)

# %% [markdown]
# ## The measurement
#
# We train the laptop's model with the modern block of [the last chapter](05_modern_block.py) for 600 steps, and for 2,000. Its rates were tuned with learned positions, for 600 steps; nothing is tuned anew. Its heads have 64 numbers and its rows 128 tokens, in which record 17's slowest pair turns by an eighth of a radian.

# %% tags=["hide-input"]
#| default_exp measure.rotary
#| export
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from speedrun.config import Config, vary
from speedrun.lab.provenance import stamp
from speedrun.measure.runs import best_of, corpus_of, train_arms

if TYPE_CHECKING:
    from speedrun.run import Run

NAMES = ("positions", "long", "beyond")
ARMS: dict[str, dict[str, Any]] = {
    "rotary 10000": {"model.rotary.pos": "rope"},
    "rotary 1024": {"model.rotary.pos": "rope", "model.rotary.base": 1024.0},
    "half 1024": {"model.rotary.pos": "half_rope", "model.rotary.base": 1024.0},
}


def arms_of(name: str) -> dict[str, Config]:
    """Three ways to turn; the modern block else, at its tuned rates. Chapter 05 has it with learned positions."""
    modern = best_of("modern_block", "rates")
    modern = vary(
        modern, {"steps": 2000, "schedule.momentum_ramp": (460, 80)} if name == "long" else {}
    )
    return {arm: vary(modern, change) for arm, change in ARMS.items()}


# %% tags=["hide-input"]
#| export
@torch.no_grad()
def loss_by_position(live: "Run") -> dict[str, list[float]]:
    """The mean loss of each position in validation rows of twice a trained run's length, and of the same tokens in rows of its own."""
    from speedrun.model.gpt import GPT
    from speedrun.train import val_batches

    own, found = live.config.data.seq_len, dict[str, list[Tensor]](twice=[], own=[])
    live.config = vary(live.config, {"data.seq_len": 2 * own, "model.max_seq_len": 2 * own})
    longer = GPT(live.config.model, live.model.vocab_size).to(live.ranks.device)
    longer.load_state_dict(live.model.state_dict())
    for batch in val_batches(live, live.config.val_tokens):
        for name, model, length in (("twice", longer, 2 * own), ("own", live.model, own)):
            logits = model(batch.inputs.view(-1, length)).flatten(0, 1)
            losses = F.cross_entropy(logits, batch.targets.flatten(), reduction="none")
            found[name].append(losses.view(-1, 2 * own))
    return {name: torch.cat(losses).mean(0).tolist() for name, losses in found.items()}


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train the arms with paired seeds, {"arms": {arm: [run, …]}}; long: for 2,000 steps.

    beyond: also each run's loss by position, "twice" and "own".
    """
    arms, seeds = arms_of(name), 3 if name == "long" else 5
    facts = stamp(command, ["speedrun.measure.rotary", "speedrun.train"], seeds, range(seeds), corpus_of(arms["half 1024"]))  # fmt: skip
    after = loss_by_position if name == "beyond" else None
    return {"arms": train_arms(arms, seeds, facts, after=after)}, facts


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
for name in ("positions", "long", "beyond"):
    print(f"{name}: {measured_on(load_result('rotary', name))}")

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
last = found["long"]
late = {arm: learned["long"].mean - sample.mean for arm, sample in last.items()}
half_late = last["half 1024"].mean - last["rotary 1024"].mean
p_late = p_difference(last["half 1024"], last["rotary 1024"])
assert all(0.3 < late[arm] / gain[arm] < 0.4 for arm in gain) and p_late > 0.3
print(f"half-truncated after 2,000 steps: {half_late:+.3f}, p = {p_late:.1f}")

# %% [markdown]
# That is a large step: 0.14 to 0.17 nats after 600 steps, where five of the last chapter's changes brought 0.05 together, and with fewer parameters. A third of it is left after 2,000. The vectors for places learn, too, but later. One might think of the few tokens that train each of them, one in 128; the GPU below speaks against that as the whole reason. The base makes no difference that could be seen. Half-truncation costs three hundredths at first, and after 2,000 steps none that three runs could show. (At 600 steps the rates favour learned positions, so the gain is, if anything, too small. At 2,000 they were tuned for neither.)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: how alike a query and an equal key are at each distance, for three ways to turn; right: loss at each position of rows twice as long as those that were trained on"}}
import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style

figure_style()
beyond = load_result("rotary", "beyond")["data"]["arms"]
SPECTRA = {
    "rotary 10000": FULL,
    "rotary 1024": RotaryConfig("rope", base=1024.0),
    "half 1024": HALF,
}
NAMED = {
    "rotary 10000": "all pairs, base 10,000",
    "rotary 1024": "all pairs, base 1,024",
    "half 1024": "half-truncated, base 1,024",
}
fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.3), layout="constrained")
distance = torch.arange(257).float()
rises: dict[str, list[float]] = {}
for n, (arm, options) in enumerate(SPECTRA.items()):
    echo = torch.outer(distance, frequencies(64, options)).cos().mean(1)
    axes[0].plot(distance, echo, color=f"C{n}", label=NAMED[arm])
    by_seed = torch.tensor([[run["twice"], run["own"]] for run in beyond[arm]])
    apart = by_seed[:, 0] - by_seed[:, 1]
    rises[arm] = apart[:, 192:].mean(1).tolist()
    smooth = apart.mean(0).view(-1, 8).mean(1).repeat_interleave(8)
    axes[1].plot(smooth, color=f"C{n}", label=NAMED[arm])
axes[0].axhline(0.5, color="C2", lw=0.8, ls=":")
axes[0].set_xlabel("distance (tokens)")
axes[0].set_ylabel("mean of cos(θΔ), heads of 64")
axes[1].axvline(128, color="0.5", lw=0.8)
axes[1].axhline(0, color="0.5", lw=0.8)
axes[1].set_ylim(-0.1, 0.2)
axes[1].text(136, -0.09, "(128 to 135 are below)", fontsize=7)
axes[0].legend()
axes[1].set_xlabel("position in rows of 256")
axes[1].set_ylabel("loss, less that in rows of 128 (nats)")
axes[1].legend()
at_end = {arm: describe(values) for arm, values in rises.items()}
axes[0].set_title(
    "how alike equal vectors are at a distance:\nhalf-truncated stays highest", fontsize=9
)
axes[1].set_title(
    f"at positions 192 to 255 long rows lose {at_end['rotary 1024'].mean:.2f}\nto {at_end['half 1024'].mean:.2f} against rows of 128",
    fontsize=9,
)
plt.show()

# %%
p_ends = p_difference(at_end["half 1024"], at_end["rotary 1024"])
soon = {
    arm: describe(
        sum(run["twice"][144:192]) / 48 - sum(run["own"][144:192]) / 48 for run in beyond[arm]
    )
    for arm in SPECTRA
}
for arm, sample in at_end.items():
    print(f"{arm:12} positions 144 to 191: {soon[arm]}; 192 to 255: {sample}")
begun = [
    sum(run["twice"][128:144]) / 16 - sum(run["own"][128:144]) / 16 for run in beyond["rotary 1024"]
]
assert (
    all(0.03 < sample.mean < 0.05 for sample in soon.values()) and f"{sum(begun) / 5:.1f}" == "-0.2"
)
assert all(0.09 < sample.mean < 0.16 for sample in at_end.values()) and p_ends < 0.05
print(f"half-truncated against whole, at the end: p = {p_ends:.3f}")

# %% [markdown]
# On the left is the mean of $\cos \theta_j \Delta$ over the pairs. It is not what attention sees, which learns its own queries and keys, but it shows the two kinds: pairs that turn make a peak at distance zero and fade as they turn, the slow ones late; pairs that stand add their half (dotted). On the right the same models read rows twice as long as they have ever seen, compared with the same tokens in rows of 128. With learned positions there would be nothing to look up. For the first sixteen tokens beyond 128 the longer row is better, by 0.2 nats, but those are the tokens at which a row of 128 has just begun and sees almost nothing. From there on its few dozen tokens of context are worth more than the 150 and more of the longer row: by 0.04 nats up to position 191, and by 0.10 to 0.15 in the last 64. Turning says what a new place is; whether attention knows what to do with distances that it has never met is another matter.
#
# ### On a GPU
#
# A model of 8 layers and a width of 384, six heads of 64, rows of 1,024 tokens, chapter 05's six changes and a norm behind the embedding, 600 steps of 32,768 tokens. Half-truncated with base 1024 is the control, and the rates were chosen with it ([chapter 05](05_modern_block.py) says more of these runs):

# %%
from speedrun.lab.stats import study_of

corpus = load_result("architecture", "corpus")
runs_of = corpus["data"]["arms"]
losses = {arm: [run["val_loss"] for run in runs] for arm, runs in runs_of.items()}
study = study_of({arm: all_of for arm, all_of in losses.items() if "two matrices" not in arm})
print(f"{'half-truncated, base 1024':36} {study.samples['control']}")
for arm in ("all pairs turn", "all pairs, base 10,000", "learned positions"):
    print(study.line(arm))
assert 0.27 < study.delta("learned positions") < 0.3 and study.p_values["learned positions"] < 0.001
assert -0.01 < study.delta("all pairs turn") < study.delta("all pairs, base 10,000") < 0
assert min(study.p_values[arm] for arm in ("all pairs turn", "all pairs, base 10,000")) > 0.9
alone = study.pairwise_p("all pairs turn", "control")
places = 600 * 32_768 // 1024, 600 * 1024 // 128, 2000 * 1024 // 128
assert places == (19_200, 4_800, 16_000) and 0.2 < alone < 0.4
print(f"all pairs against half of them, as if nothing else had been asked: p = {alone:.1f}")
print(f"tokens for each place: here {places[0]:,}; the laptop's {places[1]:,} and {places[2]:,}")
print(measured_on(corpus))

# %% [markdown]
# Learned positions lose 0.285 nats. Every place was trained by four times as many tokens as in the laptop's 600 steps, and by more than in its 2,000. But tokens are not steps, and each place was moved 600 times on both machines. Here are eight times as many places in which the same thing has to be learned, a norm stands behind the sum of token and place, and the rates were chosen with rotary positions. Which of them it is, we did not test. Among the three ways to turn there is nothing that these runs show. What half-truncation cost on the laptop, 0.033, they would have shown nine times in ten.
#
# ## What it buys

# %%
from speedrun.lab.results import public_table

ladder = {int(row["record"]): row for row in public_table("records")}
seconds = {
    n: float(ladder[n - 1]["record_time_s"]) - float(ladder[n]["record_time_s"]) for n in (2, 17)
}
tokens_of = {n: int(ladder[n]["steps"]) * int(ladder[n]["tokens_per_step_start"]) for n in (1, 2)}
assert seconds[2] == 816 and 13 < seconds[17] < 14.5 and tokens_of[2] < 0.5 * tokens_of[1]
assert 1024 * 64 * 2 * 4 == 2**19 and round(262_144 * 64 * 2 * 2 / 1e6) == 67
print({f"record {n}": f"{s:.1f} s" for n, s in seconds.items()})

# %% [markdown]
# Record 2 brought rotary positions together with a tuned rate and half the tokens, record 17 half-truncation together with three value tables in place of six ([chapter 07](07_plumbing.py)) and one layer without attention. What either gave alone no record says.
#
# ## What it costs, and when it fails
#
# Two multiplications a number, for queries and keys, in every layer, and tables: half a MiB in float32 for 1,024 positions and heads of 128, 67 MB in bfloat16 for rows of 262,144. (Upstream also keeps tables for its paired heads, two heads that share one sequence of double length, and holds about 800 MB for its validation.)
#
# What it does not give is an absolute position. What such a model knows of that, it infers from the causal mask, or from a token that stands at every beginning.
#
# ## What did not work
#
# Record 58 paired neighbours in place of halves and forgot that another part of attention, which moves keys by one token in the numbers that do not turn, had been written for halves. It went on running, with a worse loss, until record 62 put it right: half a second of 5.6 was that mistake's {cite}`moddednanogpt`. Both ways are the same function up to the order of the numbers, which nobody sees but code that picks some of them:

# %%
order = (
    torch.arange(16).view(2, 8).mT.flatten()
)  # number j of the first half beside that of the second
x = torch.randn(5, 16, dtype=torch.float64)
by_halves = apply_rotary(x, *(t.double() for t in rotary_tables(5, 16, FULL)))
by_pairs = apply_rotary(
    x[:, order], *(t.double() for t in rotary_tables(5, 16, FULL)), interleaved=True
)
assert torch.allclose(by_halves[:, order], by_pairs, atol=1e-12)
stands = {
    side_by_side: apply_rotary(torch.ones(2, 16), *rotary_tables(2, 16, HALF), side_by_side)[1] == 1
    for side_by_side in (False, True)
}
assert stands[False].nonzero()[:, 0].tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
assert stands[True].nonzero()[:, 0].tolist() == list(range(8, 16))
idle = {side_by_side: still.nonzero()[:, 0].tolist() for side_by_side, still in stands.items()}
print("numbers of 16 that do not turn, interleaved or not:", idle)

# %% [markdown]
# ## Exercises
#
# 1. Write `rotate_complex(x, positions, options)` for neighbours, with complex numbers: `torch.view_as_complex` makes them of pairs, and `torch.polar` makes $e^{i m \theta}$.


# %% tags=["solution"]
def rotate_complex(x: Tensor, positions: Tensor, options: RotaryConfig) -> Tensor:
    """Pairs of neighbours as complex numbers, times a number of length one."""
    angles = torch.outer(positions.to(x.dtype), frequencies(x.shape[-1], options).to(x.dtype))
    numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


# %%
x, positions = torch.randn(3, 9, 16), torch.tensor([5, 1, 8, 0, 3, 3, 7, 2, 6])
for name, options in (("FULL", FULL), ("HALF", HALF)):
    for where in (torch.arange(9), positions):
        tables = [table[where] for table in rotary_tables(9, 16, options)]
        off = (
            (rotate_complex(x, where, options) - apply_rotary(x, *tables, interleaved=True))
            .abs()
            .max()
        )
        assert off < 1e-5, (
            f"{name}, positions {where.tolist()}: off by up to {off:.3g} from the rotation by tables"
        )
print("the same")

# %% [markdown]
# 2. How far does a spectrum reach? Write `longest_period(head_dim, options)`: the tokens in which the slowest pair that turns at all has gone round once.


# %% tags=["solution"]
def longest_period(head_dim: int, options: RotaryConfig) -> float:
    """Tokens to a full turn of the slowest pair that turns."""
    turning = frequencies(head_dim, options)
    return 2 * math.pi / turning[turning > 0].min().item()


# %%
half, full = longest_period(128, HALF), longest_period(128, FULL)
assert abs(half - 2 * math.pi * 1024) < 1, (
    f"HALF: the slowest pair that turns needs 2π · 1,024 = 6,434 tokens, not {half:,.0f}"
)
assert 54_000 < full < 55_000, (
    f"base 10,000, 128 numbers: between 54,000 and 55,000 tokens, not {full:,.0f}"
)
print(f"base 10,000: {full:,.0f} tokens; half-truncated: {half:,.0f}")

# %% [markdown]
# ## Since then
#
# Record 31 slows the slow frequencies down (a method called YaRN) as it lets attention look further back in the course of training. Record 89 still turns half of the numbers. Norm, rotation and layout are one kernel since record 90 ([chapter 17](17_norm_and_rotary.py)), which rotates 48 of 96 numbers; in record 92 the narrow heads rotate all of their 64 and the wide ones half of 128, and each kind has a YaRN of its own. The half that does not turn has found a use of its own: in layers with long windows record 49 puts the token before into that part of a token's key, so that a query can ask for what followed something.
