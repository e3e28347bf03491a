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
# # Logits and loss: one matrix with two jobs
#
# ```{admonition} Cost box
# About fifteen seconds on two CPU cores; within three minutes on one GPU. The comparisons are committed; those on H100s took some 20 seconds a run.
# Records 5, 8 and 9: \@Grad62304977, \@kellerjordan0. Record 18: \@KoszarskyB. Record 19: \@YouJiacheng. Record 51: \@varunneal. Record 53: \@varunneal, \@classiclarryd. Record 54: \@classiclarryd.
# ```
#
# ## The problem
#
# GPT-2's largest matrix works twice. Row $t$ is what a token $t$ looks like when it is read, and at the other end it is what an output must look like for $t$ to be the next token. Sharing saves **38.6 million** parameters of 163. Record 8, which gave each job a matrix of its own, was 72 seconds faster than the one before. Record 51 shared again, and was 3 seconds faster. Record 53 shares for two thirds of the run, then parts.

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
import math

from speedrun.lab.results import public_table

ladder = {int(row["record"]): row for row in public_table("records")}
gained = {
    n: float(ladder[n - 1]["record_time_s"]) - float(ladder[n]["record_time_s"])
    for n in (8, 18, 51, 53, 54)
}
assert gained[8] == 72 and 2 < gained[51] < 4 and 50_257 * 768 == 38_597_376
share = {n: seconds / float(ladder[n - 1]["record_time_s"]) for n, seconds in gained.items()}
assert f"{share[8]:.0%} {share[51]:.1%}" == "10% 2.5%"
print({f"record {n}": f"{s:.1f} s, {share[n]:.1%}" for n, s in gained.items()})

# %% [markdown]
# Between the matrix and the loss stands one more thing. Since record 9 logits are squashed, by four forms in turn (and a fifth for a while, see below): $30\tanh(z/30)$, then 15 in place of 30, then $30\,\sigma(z/7.5)$, then $23\,\sigma((z+5)/7.5)$. Nobody has shown why it helps; the contest's own notes call it structure that helps at a small scale {cite}`moddednanogpt`.
#
# ```{admonition} Prediction
# A cap of 15 leaves logits between −15 and 15. **How small can a token's loss still get**, among 50,304? And of the four forms, **which two are the same function for the loss**?
# ```
#
# ## The idea
#
# **Padding.** 50,257 is $29 \cdot 1733$. A GPU multiplies tiles of 128 columns and loads 16 bytes at a time. A token's logits are a row of 50,257 2-byte numbers, so most rows begin at places that 16 does not divide. Record 5 rounded the vocabulary up to 50,304, by 47 rows that no token uses. Their logits stand in the softmax like all others, and being wrong every time they are pushed down.
#
# **Two gradients.** As an embedding a row gets a gradient only where its token was read; as a head, from every position. Let $g$ be the gradient that arrives at the embedding's output, $h$ the last vector of a position, $p$ the softmax of its logits and $y$ the next token. Summed over positions,
#
# $$
# \frac{\partial L}{\partial E_t} = \underbrace{\textstyle\sum_{\text{read } t} g}_{\text{as an embedding}} + \underbrace{\textstyle\sum (p_t - [t = y])\, h}_{\text{as a head}} .
# $$
#
# One rate has to serve both. Record 8's two matrices had rates of 0.3 and 0.002, but there a norm follows the lookup, so the scale of the embedding has no effect on the forward pass. In record 89 both have the same rate, also when they have parted.
#
# **The cap.** $z \mapsto c \tanh(z/c)$ is nearly the identity for small logits and never exceeds $c$. The gradient of a logit is multiplied by the slope there, $1 - \tanh^2(z/c)$. So a logit that is large already, right or wrong, is moved less.
#
# ## The code

# %%
#| default_exp model.head
#| export
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor
from torch.nn import functional as F

from speedrun.lab.bounds import NonNegativeFloat, PositiveFloat

Cap = Literal["none", "tanh30", "tanh15", "sigmoid30", "sigmoid23"]


@dataclass(frozen=True)
class HeadConfig:
    """From the last vectors to the loss, through the matrix lm_head. The defaults are GPT-2's."""

    tie: Literal["tied", "untied", "until_step"] = "tied"
    """Weight tying (Press and Wolf 2016). tied: the embedding is the head. untied: two matrices. until_step: two that are kept equal until schedule.untie_at."""
    std: NonNegativeFloat = 0.0
    """untied: deviation of the head's first weights; 0: zeros."""
    lr_mul: PositiveFloat = 1.0
    """untied: the head's learning rate as a multiple of optim.adam.lr."""
    pad_vocab_to: Annotated[int, Interval(ge=1, le=2**16)] = 1
    """The vocabulary is padded to a multiple of this, by rows that no token uses."""
    softcap: Cap = "none"
    """The logit softcap (Gemma 2), by which logits are bounded: 30 tanh(z/30), 15 tanh(z/15), 30 sigmoid(z/7.5), 23 sigmoid((z+5)/7.5)."""
    fp8: bool = False
    """Training's loss in one pass with FP8 products (chapter 19), for a head that is not tied, under sigmoid23. Validation stays as it is."""


def round_up(vocab_size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least the vocabulary."""
    return -(-vocab_size // multiple) * multiple


# %%
assert round_up(50_257, 128) == 50_304 and round_up(50_304, 128) == 50_304 and round_up(7, 1) == 7
assert 50_257 == 29 * 1733 and 50_257 * 2 % 16 == 2
print(
    f"{50_304 - 50_257} rows more; at the start the loss is {math.log(50_304 / 50_257):.4f} higher"
)


# %% [markdown]
# ### Logit softcap


# %%
#| export
def softcap(logits: Tensor, cap: Cap) -> Tensor:
    """Logits, bounded as the option says; in their own dtype."""
    if cap.startswith("tanh"):
        bound = float(cap.removeprefix("tanh"))
        return bound * torch.tanh(logits / bound)
    if cap == "sigmoid30":
        return 30 * torch.sigmoid(logits / 7.5)
    return 23 * torch.sigmoid((logits + 5) / 7.5) if cap == "sigmoid23" else logits


def loss_of(logits: Tensor, targets: Tensor, cap: Cap) -> Tensor:
    """Mean cross-entropy in nats of (…, vocab) logits, computed in float32; bits are nats / ln 2."""
    bounded = softcap(logits.float(), cap)
    return F.cross_entropy(bounded.flatten(0, -2), targets.flatten())


# %%
z = torch.linspace(-60, 60, 2001, dtype=torch.float64)
rows = torch.randn(50, 288, generator=torch.Generator().manual_seed(0)).double() * 8
shares = {cap: softcap(rows, cap).softmax(-1) for cap in ("tanh15", "sigmoid30", "sigmoid23")}
assert torch.allclose(softcap(z, "sigmoid30"), softcap(z, "tanh15") + 15)
assert torch.allclose(shares["sigmoid30"], shares["tanh15"]), "a shift is nothing to a softmax"
assert not torch.allclose(shares["sigmoid23"], shares["tanh15"])
spans = {"tanh30": 60.0, "tanh15": 30.0, "sigmoid23": 23.0}
least = {cap: math.log1p(50_303 * math.exp(-span)) for cap, span in spans.items()}
assert least["tanh15"] < 1e-7 and least["sigmoid23"] < 1e-5
print({cap: f"{loss:.0e}" for cap, loss in least.items()}, "nats: the least loss of a token")

# %% [markdown]
# In the limit, then, no cap keeps the model from being sure, and $30\,\sigma(z/7.5)$ is $15 \tanh(z/15)$ again, moved up by 15. (Record 19 changed the form along with its 8-bit head. For the loss it changes nothing.) The last form differs. Measured from its value at zero it has the same floor, −15, but half the ceiling, 8: a logit of 10 counts like one of 5 under $15\tanh(z/15)$. So to be sure it has to push the others down. With all other logits at zero, a token cannot cost less than three nats:

# %%
zero = softcap(torch.zeros(1), "sigmoid23").item()
ceiling, ten = 23 - zero, softcap(torch.tensor([10.0]), "sigmoid23").item() - zero
five = softcap(torch.tensor([5.0]), "tanh15").item()
others_at_zero = math.log1p(50_303 * math.exp(-ceiling))
assert round(ceiling) == 8 and round(zero) == 15 and round(ten) == round(five) == 5
assert 2.9 < others_at_zero < 3.1
print(f"floor {-zero:.1f}, ceiling {ceiling:.1f}; all others at zero: {others_at_zero:.2f} nats")

# %% [markdown]
# What does a cap do to the gradient? It multiplies $p - y$ by its slope. In closed form, against autograd:


# %%
def slope(z: Tensor, cap: str) -> Tensor:
    """The derivative of a cap."""
    if cap == "none":
        return torch.ones_like(z)
    if cap.startswith("tanh"):
        return 1 - (softcap(z, cap) / float(cap.removeprefix("tanh"))) ** 2
    top = float(cap.removeprefix("sigmoid"))
    share = softcap(z, cap) / top
    return top * share * (1 - share) / 7.5


CAPS = ("none", "tanh30", "tanh15", "sigmoid30", "sigmoid23")
targets = torch.randint(288, (50,), generator=torch.Generator().manual_seed(1))
for cap in CAPS:
    leaf = rows.clone().requires_grad_()
    mean = F.cross_entropy(softcap(leaf, cap), targets)
    (gradient,) = torch.autograd.grad(mean, leaf)
    by_hand = (softcap(rows, cap).softmax(-1) - F.one_hot(targets, 288)) * slope(rows, cap) / 50
    assert torch.allclose(gradient, by_hand, atol=1e-12), cap
    assert abs(loss_of(rows, targets, cap) - mean) < 1e-5
assert torch.allclose(slope(z, "tanh15"), slope(z, "sigmoid30"))
at_zero = {cap: slope(torch.zeros(1), cap).item() for cap in CAPS}
assert at_zero["tanh30"] == at_zero["tanh15"] == 1 and 0.68 < at_zero["sigmoid23"] < 0.69
print({cap: f"{steep:.2f}" for cap, steep in at_zero.items()}, "is the slope at zero")

# %% [markdown]
# ### Nats, and sixteen bits
#
# The loss is the mean of $-\ln p$ of the tokens that came, in *nats*. Divided by $\ln 2$ it is bits, and per byte of text it can be compared across vocabularies. The contest's 3.28 nats a token are 4.73 bits. This chapter's head computes it in float32, but from logits that a product in bfloat16 has rounded to eight bits: one of 20 is off by up to 0.06. Does that matter? A single token's loss moves by up to nine hundredths. In the mean the errors cancel, to first order. What is left, if tokens come as the model expects them, is the divergence of the two distributions, a ten-thousandth, and to the worse:

# %%
many = 5 * torch.randn(20_000, 288, generator=torch.Generator().manual_seed(6))
came = many.softmax(-1).multinomial(1, generator=torch.Generator().manual_seed(7))[:, 0]
many, came = many.to(tier.device), came.to(tier.device)
single = F.cross_entropy(many, came, reduction="none")
rounded = F.cross_entropy(many.bfloat16().float(), came, reduction="none")
right, wrong = many.double().log_softmax(-1), many.bfloat16().double().log_softmax(-1)
kl = (right.exp() * (right - wrong)).sum(-1).mean().item()
assert f"{3.28 / math.log(2):.2f}" == "4.73"
assert 0.02 < (rounded - single).abs().max() < 0.1 and 8e-5 < kl < 1.1e-4
print(
    f"a token's loss moves by up to {(rounded - single).abs().max():.3f}; the divergence is {kl:.5f}"
)

# %% [markdown]
# ### Two matrices, or one
#
# In [the model](21_model.py) `tied` reads the embedding a second time. `untied` and `until_step` have a head of their own, `lm_head`, stored transposed. With `until_step`, the optimizer of [chapter 20](20_many_gpus.py) adds up both gradients and copies the result into both, until the last third, when the embedding takes over the head's weights and moments. Here is the sum of the two gradients, taken apart:

# %%
from speedrun.model.gpt import GPT, GPTConfig

from dataclasses import replace

shape = GPTConfig(num_layers=2, num_heads=2, model_dim=32, max_seq_len=16)
one = GPT(shape, 288).double().to(tier.device)
two = GPT(replace(shape, head=HeadConfig(tie="until_step")), 288).double().to(tier.device)
tokens = torch.randint(288, (4, 17), generator=torch.Generator().manual_seed(2)).to(tier.device)
for model in (one, two):
    model(tokens[:, :-1], tokens[:, 1:]).backward()
as_embedding, as_head = two.embed.grad, two.lm_head.grad.mT
assert torch.allclose(one.embed.grad, as_embedding + as_head, atol=1e-9)
read = len(tokens[:, :-1].unique())
assert as_embedding.any(1).sum() == read < 64 and as_head.any(1).all()
print(f"as an embedding {read} rows have a gradient, as a head all {len(as_head)} have")

# %% [markdown]
# There is a second thing about a shared matrix. Record 5 let the last matrices of attention and MLP begin with zeros ([chapter 05](05_modern_block.py)), so that at the start no block does anything. What reaches the head then is the embedding of the token that was just read, at length $\sqrt d$. Its product with its own row is $\sqrt d$ times that row's length, far more than with any other. So an untrained model with *idle blocks* and a tied head is sure of something: that the next token is the last one again. GPT-2's untrained blocks are not idle, and it is sure of nothing.

# %%
from speedrun.model.mlp import BlockConfig
from speedrun.model.rotary import RotaryConfig

empty = BlockConfig(norm="rms", biases=False, zero_init_proj=True)
laptop = GPTConfig(num_layers=2, num_heads=2, model_dim=128, max_seq_len=128, init_std=0.05)
turned = replace(laptop, block=empty, rotary=RotaryConfig("rope"))
fresh = GPT(turned, 288).to(tier.device)
row = torch.randint(288, (4, 129), generator=torch.Generator().manual_seed(3)).to(tier.device)
chance = fresh(row[:, :-1]).softmax(-1)
again = chance.gather(-1, row[:, :-1, None]).mean().item()
first = {"tied": fresh(row[:, :-1], row[:, 1:]).item()}
untied = GPT(replace(turned, head=HeadConfig(tie="untied")), 288).to(tier.device)
first["untied, zeros"] = untied(row[:, :-1], row[:, 1:]).item()
plain = GPT(laptop, 288).to(tier.device)
busy = plain(row[:, :-1]).softmax(-1).gather(-1, row[:, :-1, None]).mean().item()
first["tied, GPT-2's blocks"] = plain(row[:, :-1], row[:, 1:]).item()
assert busy < 0.02 and abs(first["tied, GPT-2's blocks"] - math.log(288)) < 0.2
assert 0.6 < again < 0.8 and first["tied"] > math.log(288) + 0.9
assert abs(first["untied, zeros"] - math.log(288)) < 1e-5
print(f"untrained, it expects the same token again at {again:.0%}; GPT-2 at {busy:.0%}")
print(
    "first loss:",
    {head: f"{loss:.2f}" for head, loss in first.items()},
    f"; ln 288 = {math.log(288):.2f}",
)

# %% [markdown]
# That costs more than a nat at the first step. What counts is the width times the deviation, here 6.4. At a width of 768, for rows drawn with GPT-2's 0.02, it is 15, and for record 51's shared matrix, drawn with 0.005, it is 3.8:


# %%
def sure_of_itself(width: int, std: float, words: int) -> float:
    """About the share that an untrained model with a tied head gives to the same token again."""
    own, others = width * std, math.exp((math.sqrt(width) * std) ** 2 / 2)
    return math.exp(own) / (math.exp(own) + words * others)


guess = {std: sure_of_itself(768, std, 50_304) for std in (0.02, 0.005)}
assert abs(sure_of_itself(128, 0.05, 288) - again) < 0.1
assert guess[0.02] > 0.98 and guess[0.005] < 0.002
print({f"768 wide, {std}": f"{share:.1%}" for std, share in guess.items()})

# %% [markdown]
# If the share is nearly one, the loss of any *other* token is nearly the logit of that one: width times deviation. PyTorch draws a linear layer's rows with a deviation of $1/\sqrt{3d}$, which is what records 5 to 7 had. That predicts their first loss:

# %%
at_first = {row["record"]: float(row["val_loss"]) for row in public_table("curves") if row["step"] == "0"}  # fmt: skip
predicted = 768 / math.sqrt(3 * 768)
assert all(abs(at_first[n] - predicted) < 0.05 for n in ("5", "6", "7"))
assert all(at_first[n] < 11.02 for n in ("1", "2", "4"))
assert abs(at_first["8"] - math.log(50_304)) < 1e-3
print(f"predicted {predicted:.2f};", {n: at_first[n] for n in ("1", "2", "4", "5", "6", "7", "8")})

# %% [markdown]
# Record 8 gave the head a matrix of its own, which begins with zeros, and since then every record begins at the logarithm of its vocabulary, or near it: record 51 tied the two again, but drew them with 0.005.
#
# How unlike are the two gradients, in a model that has begun to learn? Train the laptop's model for 150 steps, give its weights to one with two matrices, and look at the two gradients of the same rows:

# %%
import tempfile
from pathlib import Path

from speedrun.config import vary
from speedrun.presets import preset
from speedrun.train import build_run, train_step

brief = vary(preset("cpu_gpt2"), {"steps": 150, "warmup": 0, "device": tier.device})
live = build_run(brief, Path(tempfile.mkdtemp()), echo=None)
for _ in range(brief.steps):
    train_step(live)
parted = GPT(replace(brief.model, head=HeadConfig(tie="until_step")), 288).to(tier.device)
known = live.model.state_dict()
parted.load_state_dict(known | {"lm_head": known["embed"].mT})
for _ in range(8):
    batch = live.loader.next()[0]
    parted(batch.inputs.to(tier.device), batch.targets.to(tier.device)).backward()
reading, writing = parted.embed.grad, parted.lm_head.grad.mT
ratio = (writing.norm() / reading.norm()).item()
often = reading.norm(dim=1) > 0
agree = torch.cosine_similarity(reading[often], writing[often], dim=1)
spread = agree.square().mean().sqrt().item()
left = 1 / math.sqrt(1 + ratio**2)
assert 1.6 < ratio < 2.2 and 0.4 < left < 0.55 and 60 < often.sum() < 120
assert agree.mean().abs() < 0.07 and 0.13 < spread < 0.2
print(f"the head's gradient is {ratio:.1f} times the embedding's")
print(
    f"{often.sum()} of 288 rows were read; cosine of their two gradients: mean {agree.mean():+.2f}, rms {spread:.2f}"
)

# %% [markdown]
# Most rows were not read at all in these 4,096 tokens; they have a head's gradient only, which pushes them down. In those that were, the two gradients agree in some rows and disagree in others: their cosine is twice as large as chance would make it in 128 dimensions, to either side. Adam divides by the root mean square of the *sum*, in which the head's part is the larger. So the embedding's part of a step is, very roughly, half of what it would be alone. A matrix for each lets each have its own division, and its own rate.
#
# And the padding, in a model that has learned nothing. Its rows are drawn like all others, so at first they take their share of the softmax:


# %%
def with_padding(model: GPT, inputs: Tensor) -> Tensor:
    """The logits of padding, which the model does not give out."""
    wanted, model.vocab_size = model.vocab_size, len(model.embed)
    with torch.no_grad():
        logits = model(inputs)[..., wanted:]
    model.vocab_size = wanted
    return logits


wide = GPT(replace(shape, head=HeadConfig(pad_vocab_to=16)), 283).to(tier.device)
pair = tokens[:, :-1] % 283, tokens[:, 1:] % 283
loss = wide(*pair)
loss.backward()
pads = wide.embed.grad[283:]
narrow = GPT(shape, 283).to(tier.device)(*pair)
before = with_padding(wide, pair[0])
with torch.no_grad():
    wide.embed -= wide.embed.grad
after = with_padding(wide, pair[0])
assert wide.embed.shape == (288, 32) and wide(pair[0]).shape[-1] == 283
assert abs(loss - narrow - math.log(288 / 283)) < 0.001 and after.mean() < before.mean()
captured = torch.compile(wide, fullgraph=True, backend="eager")
assert torch.equal(captured(*pair), wide(*pair))
print(
    f"{len(pads)} rows of padding: the first loss is {(loss - narrow).item():.3f} higher; after a step their mean logit is {(after.mean() - before.mean()).item():+.2f}"
)

# %% [markdown]
# ## The measurement
#
# The caps, each less its value at zero (dotted: no cap), and their slopes:

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three caps of a logit, each less its value at zero, and their slopes, between minus 40 and 40"}}
import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style

figure_style()
fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.2), layout="constrained")
drawn = torch.linspace(-40, 40, 801)
SHOWN = {"tanh30": "30 tanh(z/30)", "tanh15": "15 tanh(z/15)", "sigmoid23": "23 σ((z+5)/7.5)"}
for n, (cap, label) in enumerate(SHOWN.items()):
    axes[0].plot(
        drawn, softcap(drawn, cap) - softcap(torch.zeros(1), cap), color=f"C{n}", label=label
    )
    axes[1].plot(drawn, slope(drawn, cap), color=f"C{n}", label=label)
axes[0].plot(drawn, drawn, ":", color="0.6")
axes[0].set_ylim(-32, 32)
axes[0].set_ylabel("softcapped logit, less its value at zero")
axes[1].set_ylabel("what a gradient is multiplied by")
for axis in axes:
    axis.set_xlabel("logit z")
axes[0].legend()
left, right = (slope(torch.tensor([x]), "sigmoid23").item() for x in (-20.0, 20.0))
fig.suptitle(f"the last cap passes {left / right:.0f} times as much of a gradient at −20 as at 20")
plt.show()

# %%
halves = {
    cap: drawn[slope(drawn, cap) > slope(torch.zeros(1), cap) / 2].abs().max().item()
    for cap in ("tanh30", "tanh15")
}
steepest = drawn[slope(drawn, "sigmoid23").argmax()].item()
assert abs(steepest + 5) < 0.1 and abs(halves["tanh30"] / halves["tanh15"] - 2) < 0.02
assert 2.5 < left / right < 3.5
print(f"the last one is steepest at {steepest:.0f}")

# %% [markdown]
# On the laptop's model, which has 288 tokens instead of 50,304, with [chapter 05's](05_modern_block.py) block, 600 steps, rates as tuned for it with a tied head and no cap:

# %% tags=["hide-input"]
#| default_exp measure.logits
#| export
from typing import Any

from speedrun.config import Config, vary
from speedrun.lab.provenance import stamp
from speedrun.measure.runs import best_of, corpus_of, train_arms

NAMES = ("laptop",)
ARMS: dict[str, dict[str, Any]] = {
    "tied, no cap": {},
    "untied, zeros": {"model.head.tie": "untied"},
    "untied, drawn at 0.05": {"model.head.tie": "untied", "model.head.std": 0.05},
    "untied, a quarter of the rate": {"model.head.tie": "untied", "model.head.lr_mul": 0.25},
    "untied, four times the rate": {"model.head.tie": "untied", "model.head.lr_mul": 4.0},
    "30 tanh(z/30)": {"model.head.softcap": "tanh30"},
    "15 tanh(z/15)": {"model.head.softcap": "tanh15"},
    "23 σ((z+5)/7.5)": {"model.head.softcap": "sigmoid23"},
}


def arms_of() -> dict[str, Config]:
    """Heads and caps; the modern block else, at its tuned rates."""
    return {arm: vary(best_of("modern_block", "rates"), change) for arm, change in ARMS.items()}


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train every arm with three seeds, {"arms": {arm: [run, …]}}."""
    arms = arms_of()
    facts = stamp(command, ["speedrun.measure.logits", "speedrun.train"], 3, range(3), corpus_of(arms["30 tanh(z/30)"]))  # fmt: skip
    return {"arms": train_arms(arms, 3, facts)}, facts


# %%
from speedrun.lab.results import load_result, measured_on
from speedrun.lab.stats import describe, p_difference

arms = load_result("logits", "laptop")["data"]["arms"]
heads = {arm: describe(run["val_loss"] for run in runs) for arm, runs in arms.items()}
plain = heads.pop("tied, no cap")
print(f"tied, no cap                   {plain}")
for arm, sample in heads.items():
    apart = sample.mean - plain.mean
    print(f"{arm:30} {sample}  {apart:+.3f}  p = {p_difference(sample, plain):.0e}")
print(measured_on(load_result("logits", "laptop")))

# %%
from speedrun.lab.stats import runs_needed

apart = {arm: sample.mean - plain.mean for arm, sample in heads.items()}
p_of = {arm: p_difference(sample, plain) for arm, sample in heads.items()}
zeros, drawn_at, slower, faster = (arm for arm in heads if arm.startswith("untied"))
assert 0.05 < apart[drawn_at] < 0.06 and 0.09 < apart[zeros] < 0.11 and p_of[zeros] < 1e-3
assert apart[zeros] < apart[faster] < 0.15 < 0.17 < apart[slower] < 0.2
assert p_of["30 tanh(z/30)"] > 0.5 and p_of["15 tanh(z/15)"] > 0.2
last_cap = "23 σ((z+5)/7.5)"
assert 0.09 < apart[last_cap] < 0.12 and p_of[last_cap] < 0.05
chain = {(row["arm"], int(row["step"])): float(row["val_loss"]) for row in public_table("chain9")}
by_cap = {step: chain["5", step] - chain["6", step] for step in (125, 500, 3200)}
assert [round(saved, 3) for saved in by_cap.values()] == [0.033, 0.009, 0.005]
for_record_9 = runs_needed(by_cap[3200], plain.sd)
assert 100 < for_record_9 < 150
print(
    f"to see what the cap of record 9 gained would take {for_record_9} runs of each here (nine times in ten, at p < 0.01)"
)

# %% [markdown]
# Nothing here helps, and one thing surely hurts. A head of its own costs a tenth if it begins with zeros, and more at four times the rate as well as at a quarter of it; drawn like an embedding it seems to cost half as much. That is among 288 tokens and at rates that were tuned for a shared matrix, of which only the head's was varied. The last cap costs about a tenth, too, with $p = 0.02$, which among seven arms is not much; on the GPU below a cost is sure. One candidate for why is its slope of 0.69: for the same probabilities all logits have to be half as large again. The caps with a slope of one do nothing that three seeds could show, and they could not show a hundredth.
#
# ### On a GPU
#
# With GPT-2's vocabulary of 50,257: 8 layers, a width of 384, 600 steps of 32,768 tokens, a norm behind the embedding; tied, no cap and no padding in the control ([chapter 05](05_modern_block.py) says more of these runs):

# %%
import statistics

from speedrun.lab.stats import compare_line, study_of

corpus = load_result("architecture", "corpus")
runs_of = corpus["data"]["arms"]
losses = {arm: [run["val_loss"] for run in runs] for arm, runs in runs_of.items()}
study = study_of({arm: all_of for arm, all_of in losses.items() if "two matrices" not in arm})
took = {arm: statistics.median(r["seconds"] for r in runs) for arm, runs in runs_of.items()}
CAPS = ("30 tanh(z/30)", "15 tanh(z/15)", "30 sigmoid(z/7.5)", "23 sigmoid((z+5)/7.5)")
HEADS = ("two matrices", "two matrices, a quarter of the rate")
SHARED = ("chapter 20's optimizer", "split head")
print(f"{'control':36} {study.samples['control']}  {took['control']:.1f} s")
for arm in HEADS:
    print(
        f"{arm:36} {compare_line(describe(losses[arm]), study.samples['control'])}  {took[arm]:.1f} s"
    )
for arm in (*SHARED, *CAPS, "padded to 128"):
    print(f"{study.line(arm)}  {took[arm]:.1f} s")
print(measured_on(corpus))

# %%
more = {arm: describe(losses[arm]).mean - study.samples["control"].mean for arm in HEADS}
assert 0.095 < more[HEADS[0]] < 0.11 and 0.19 < more[HEADS[1]] < 0.2
assert 0.035 < study.delta(CAPS[3]) < 0.045 and study.p_values[CAPS[3]] < 0.001
assert min(study.p_values[arm] for arm in (*CAPS[:3], "padded to 128")) > 0.9
assert max(describe(losses[arm]).sd for arm in HEADS) < study.pooled_sd / 3
shared = study.delta("split head") - study.delta("chapter 20's optimizer")
assert 0 < shared < 0.005 and study.pairwise_p("split head", "chapter 20's optimizer") > 0.5
assert 0.01 < study.p_values["chapter 20's optimizer"] < 0.05
faster = 1 - took["padded to 128"] / took["control"]
slowest = max(run["seconds"] for run in runs_of["padded to 128"])
assert 0.13 < faster < 0.17 and slowest < min(run["seconds"] for run in runs_of["control"])
caps = [took[arm] / took["control"] - 1 for arm in CAPS]
assert 0 < min(caps) < 0.02 and 0.04 < max(caps) < 0.06
slow = max(run["seconds"] for run in runs_of["control"])
assert min(took[arm] for arm in CAPS) > 0.999 * slow
print(f"padding saves {faster:.0%} of the time; the caps take {min(caps):.0%} to {max(caps):.0%}")
print(f"the split head and its own control differ by {shared:+.4f}")

# %% [markdown]
# At full size record 9's cap is seen at each of its logged validations: against the same run without it, it saves 0.033 at step 125, 0.009 at 500, and 0.005 at the end (one run each {cite}`moddednanogpt`). Our models are too small, and their runs too short, to say anything against that.
#
# A head that begins with zeros costs a tenth here as well, at rates that were chosen for a shared matrix. A quarter of its rate costs another 0.09; whether a higher one would help was not tried, and on the laptop four times cost more, too. In record 8 the embedding's rate was 0.3 and the head's 0.002, where here both are 0.008; so this says nothing against that record. (Runs with two matrices have standard deviations of 0.0006 and 0.0030, the others of about 0.012, so they stand outside [Dunnett's test](01_are_you_faster.py), with Welch's $p$; [chapter 07](07_plumbing.py) has more of them.) The split head was trained under the record's Adam ([chapter 20](20_many_gpus.py)), which decays cautiously, steps after every second batch and does not clip, and which by itself may cost 0.025 at these rates ($p = 0.03$). Beside *that*, 400 steps with one matrix and 200 in which the two part differ by 0.004 from one matrix throughout, which three runs cannot tell from nothing.
#
# Of the caps the last one costs 0.04, less than half of the laptop's tenth, and what the others do three seeds do not show.
#
# The clock says something else. Forty-seven rows that no token uses make the whole step a seventh shorter. The matrix's rows, of 384 numbers, all begin at even places; those of the logits and their gradient, of 50,257, do not. Which of the kernels that read and write them lose the time, we did not measure. And in this model the head is about half of all multiplications; in a larger one it is less.
#
# ## What it buys
#
# The first cell prints it, from the public logs, at full size. Record 8, the first head of its own, gained most, a tenth; how much of that was the head one cannot say, since the embedding was normed in the same record and attention became faster. Record 53's seconds came with a loss over several next tokens. The cleanest are two caps. Record 18 saved 100 steps. Record 54 saved 40, and also shortened the cooldown from 55% to 50%. Our short runs show nothing of the first, and the second costs something; what differs is the length, the size, the rates and all else in the record, and we cannot say which of it counts. Record 9's log has a column of single runs at 3,200 steps, each with one thing more than the last: its cap took the loss from 3.2844 to 3.2791, the smallest of five steps {cite}`moddednanogpt`.
#
# ## What it costs, and when it fails
#
# An untied head is a second matrix of 39 million numbers to store, to update, and to sum over GPUs. What records 8 and 51 gained were steps, 522 and 55 of them, at the same time for each. In record 8 attention became 4 ms faster, so something else, perhaps the second matrix, cost as much. In record 51 it was not the matrix less that paid, and nothing says whether it was sharing, the smaller start, the new rate or the new scales of its 8-bit products.
#
# A cap costs next to nothing in a kernel that computes cap, softmax and loss together. If it is not in there, it is one more tensor of tokens times vocabulary, read and written: 16,384 tokens make that 1.6 GB in 16 bits, in each direction, and twice that in float32, which this chapter's head uses. (The preset `record` trains with [chapter 19](19_head_and_loss.py)'s head, which computes cap, softmax, loss and gradient in one kernel.) In the runs above the caps' medians are one to five per cent above the control's, all about or above the slowest of its fifteen; how much of that is the cards' we cannot say.

# %%
gigabytes = 16_384 * 50_304 * 2 / 1e9
assert f"{gigabytes:.1f}" == "1.6"
print(f"{gigabytes:.1f} GB of logits for 16,384 tokens")

# %% [markdown]
# And a bound is one for good answers, too. With a larger vocabulary or a tighter cap the least loss stops being nothing: exercise 1.
#
# ## What did not work
#
# The slope at zero was tried in other ways. A revision of record 21 divided logits by another 28 before the sigmoid and raised the head's rate by as much; record 28 took both back, which is credited with five to ten steps. On the contest's other track, which trains a larger model, the cap is an inverse square root instead {cite}`moddednanogpt`.
#
# ## Exercises
#
# 1. Write `least_loss(top, vocab_size)`: the least loss of a token when logits lie between 0 and `top`. How high must the top be, in whole numbers, for a thousandth of a nat among 50,304?


# %% tags=["solution"]
def least_loss(top: float, vocab_size: int) -> float:
    """The loss when the right logit is at the top and all others are at zero."""
    return math.log1p((vocab_size - 1) * math.exp(-top))


# %%
equal = least_loss(0.0, 50_304)
assert math.isclose(equal, math.log(50_304)), (
    f"when all logits are equal the loss is ln 50,304 = {math.log(50_304):.6f}, not {equal}"
)
needed = next((top for top in range(100) if least_loss(top, 50_304) < 1e-3), None)
assert needed == 18, (
    f"a thousandth of a nat needs a top of 18, by your formula {needed} (all 50,303 others keep their share)"
)
print(f"a top of {needed}; of 12: {least_loss(12, 50_304):.2f} nats")

# %% [markdown]
# 2. Every sigmoid is a tanh. Write `as_tanh(top, shift, scale)`: the four numbers $(a, b, c, d)$ with $\text{top} \cdot \sigma((z + \text{shift})/\text{scale}) = a \tanh((z + b)/c) + d$.


# %% tags=["solution"]
def as_tanh(top: float, shift: float, scale: float) -> tuple[float, float, float, float]:
    """σ(x) = (tanh(x / 2) + 1) / 2."""
    return top / 2, shift, 2 * scale, top / 2


# %%
for cap, numbers in (("sigmoid30", (30.0, 0.0, 7.5)), ("sigmoid23", (23.0, 5.0, 7.5))):
    a, b, c, d = as_tanh(*numbers)
    off = (a * torch.tanh((z + b) / c) + d - softcap(z, cap)).abs().max().item()
    assert off < 1e-9, (
        f"{cap}: with (a, b, c, d) = {(a, b, c, d)} the two differ by up to {off:.3g}"
    )
print("23 σ((z+5)/7.5) is {} tanh((z+{})/{}) + {}".format(*as_tanh(23.0, 5.0, 7.5)))

# %% [markdown]
# ## Since then
#
# Record 89 pads to 50,304, ties for two thirds of the run, and squashes by $23\,\sigma((z+5)/7.5)$. What else has changed is how it is computed: one kernel for cap, softmax, loss and gradient (records 60, 67, 75, 79; with products in eight bits it is `model.head.fp8`, [chapter 19](19_head_and_loss.py)'s), and what the loss is of: several next tokens (record 53), and a prefix of the next one (record 88).
