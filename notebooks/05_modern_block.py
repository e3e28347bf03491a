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
# # A modern block: six changes
#
# ```{admonition} Cost box
# About twenty seconds on two CPU cores; within three minutes on one GPU. The comparisons took an hour on two cores, and half an hour of training on H100s, and are committed.
# Record 2: \@kellerjordan0. Record 5: \@Grad62304977, \@kellerjordan0. Record 19: \@YouJiacheng.
# ```
#
# ## The problem
#
# Record 5 cut **426 seconds** from 1,338, a third, and its log holds one run. Seven things changed at once: the vocabulary was padded, twelve heads became six, GELU became ReLU², queries and keys were normed, output matrices began at zero, a factor on attention's output went, and queries, keys and values got matrices of their own. Which of them did it?

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
from speedrun.lab.results import public_table

ladder = {row["record"]: row for row in public_table("records")}
old, new = ladder["4"], ladder["5"]
seconds = float(old["record_time_s"]) - float(new["record_time_s"])
fewer = 1 - int(new["steps"]) / int(old["steps"])
faster = 1 - float(new["step_avg_ms"]) / float(old["step_avg_ms"])
assert seconds == 426 and 0.17 < fewer < 0.18 and 0.17 < faster < 0.18
print(f"steps: {old['steps']} to {new['steps']}, {fewer:.1%} fewer")
print(f"ms a step: {old['step_avg_ms']} to {new['step_avg_ms']}, {faster:.1%} less")

# %% [markdown]
# About half of it is fewer steps and half is shorter ones. We found no runs of them one at a time. A record is not made to separate its changes, and whoever copies from one wants to know which part to copy. Three of the seven are in this chapter, with two from record 2 and one from record 19.
#
# ```{admonition} Prediction
# The six: norms lose their gains, biases and means. Matrices lose their biases. Queries and keys are normed. The activation becomes ReLU². Matrices that write to the residual stream (the *stream* from here on) begin at zero. The others begin with a spread that follows from their number of columns. Take each away from all six, on a small model that is trained for a fixed number of steps. **Which are missed, which are not, and does any change the time of a step?**
# ```
#
# ## The idea
#
# A block of GPT-2 reads the stream through a layer norm, and writes to it. Most of what follows removes something. The question each time is what the model can still compute, what training does differently, and what it costs.
#
# **A norm without parameters.** Layer norm subtracts the mean of a vector's $d$ numbers, divides by their deviation, multiplies by a gain $g$ and adds a bias $b$. RMS norm {cite}`zhang2019rms` divides by the root mean square. The paper keeps a gain; the contest does not:
#
# $$
# \mathrm{LN}(x) = g \odot \frac{P x}{\mathrm{rms}(P x)} + b, \qquad P = I - \tfrac1d \mathbf 1 \mathbf 1^\top, \qquad \mathrm{rms}(x) = \sqrt{\tfrac1d \textstyle\sum_i x_i^2}.
# $$
#
# All three things that went are linear or add a constant, and on both sides of a norm stand linear maps that can do them. Behind it a matrix $W$ with a bias $c$ reads its result: $W(g \odot u + b) + c = (W \operatorname{diag} g)\, u + (W b + c)$, so gain and bias are part of $W$ and $c$. Before it stand the embedding and the matrices that write to the stream. If each is multiplied by $P$ on the side that faces the stream, its bias too, the stream has mean zero everywhere, and subtracting it changes nothing. So every norm of GPT-2 that a matrix of its own follows can lose its parameters without changing a logit. (The last one cannot: behind it stands the embedding, which has another job.) What differs is training: a step of the product $W \operatorname{diag} g$ is not a step of both.
#
# **Biases.** They are what is left of $b$ and $c$, one vector a matrix. In GPT-2 two kinds are idle anyway: a key's bias adds the same to all scores of a query, which a softmax does not see, and a value's passes through attention into the output's bias. No rewriting removes the others; without any it is smaller by 0.07%.
#
# **QK-norm.** Attention weighs keys by $\exp(q \cdot k/\sqrt d)$. Nothing bounds $q$ and $k$, and with Muon every direction of their matrices is pushed by the rate in every step, large gradient or small. A softmax of large scores is one at one key and zero at the others, and there its gradient vanishes. Norm queries and keys, and each has length $\sqrt d$, so a score is at most $\sqrt d$. (Henry and others {cite}`henry2020`, who proposed it, learn a factor beside it.)
#
# **ReLU².** $\max(z, 0)^2$ was found by a search over programs for cheaper language models {cite}`so2021`. Its derivative $2\max(z, 0)$ has no jump, half of its values are zeros, and it has no constants: $f(cz) = c^2 f(z)$.
#
# **Zeros.** GPT-2 shrinks the matrices that write to the stream by $\sqrt{2L}$, since $2L$ of them add up. Record 5 lets them begin at zero. Then each block is the identity at first, and its other matrices get no gradient in the first step.
#
# **Scale.** GPT-2 draws all weights with a deviation of 0.02. A matrix with $m$ columns adds up $m$ products, so an output that should not depend on the width wants $1/\sqrt m$ times something. The contest's something was $1/\sqrt 3$, uniformly distributed, because that is PyTorch's default, and one half from record 19 on, because it was tried.
#
# ## The code

# %%
#| default_exp model.mlp
#| export
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from speedrun.kernels.mlp import mlp_op


@dataclass(frozen=True)
class BlockConfig:
    """What a layer is made of. The defaults are GPT-2's."""

    norm: Literal["layer", "rms"] = "layer"
    """layer: subtract the mean, divide, then gain and bias. rms: divide by the root mean square, no parameters."""
    biases: bool = True
    """Whether matrices have biases."""
    qk_norm: bool = False
    """RMS norm for each head's queries and keys."""
    activation: Literal["gelu", "relu2"] = "gelu"
    """The MLP's nonlinearity; relu2: the square of what is positive."""
    zero_init_proj: bool = False
    """Matrices that write to the stream begin at zero, and not smaller than the others by sqrt(2 · layers)."""
    fan_in_init: bool = False
    """Matrices begin uniform with deviation 0.5 / sqrt(columns), and not normal with init_std."""
    fp8: bool = False
    """Train the MLP with products in eight bits, forward and backward."""


# %% [markdown]
# ### The norm
#
# Which norm it is follows from the weights that are there:


# %%
#| export
def rms_norm(x: Tensor) -> Tensor:
    """Each vector of the last dimension, scaled to a root mean square of 1 (Zhang and Sennrich 2019)."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def apply_norm(x: Tensor, weights: Mapping[str, Any], name: str) -> Tensor:
    """Layer norm with the gain and bias that stand under a name, or RMS norm if there are none."""
    gain = weights.get(f"{name}_gain")
    if gain is None:
        return rms_norm(x)
    return F.layer_norm(x, gain.shape, gain, weights[f"{name}_bias"])


# %%
import torch

torch.manual_seed(0)
x = 3.0 * torch.randn(5, 64, dtype=torch.float64) + 1.0
weights = {"some_norm_gain": torch.rand(64).double(), "some_norm_bias": torch.randn(64).double()}
centred = x - x.mean(-1, keepdim=True)
by_hand = rms_norm(centred) * weights["some_norm_gain"] + weights["some_norm_bias"]
assert torch.allclose(apply_norm(x, weights, "some_norm"), by_hand, atol=1e-5)
assert torch.allclose(rms_norm(x).square().mean(-1), torch.ones(5).double(), atol=1e-6)
assert torch.allclose(rms_norm(1000 * x), rms_norm(x), atol=1e-6), "blind to scale"
print("layer norm is RMS norm of the centred vector, with a gain and a bias")

# %% [markdown]
# What is blind to scale sends back a gradient at right angles to its input: moving $x$ along itself changes nothing. And the gradient shrinks as $x$ grows. So the longer the stream, the smaller the gradient that comes back to it through a block.

# %%
vector = torch.randn(64, dtype=torch.float64, requires_grad=True)
direction = torch.randn(64, dtype=torch.float64)
(gradient,) = torch.autograd.grad(rms_norm(vector) @ direction, vector)
longer = (10 * vector).detach().requires_grad_()
(shorter,) = torch.autograd.grad(rms_norm(longer) @ direction, longer)
assert abs(gradient @ vector) < 1e-5 * gradient.norm() * vector.norm()
assert abs(shorter.norm() / gradient.norm() - 0.1) < 1e-5
print("the gradient is at right angles; ten times the length, a tenth of the gradient")

# %% [markdown]
# ### The MLP


# %%
#| export
def linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    """x times the matrix of that name, (rows, columns), plus its bias if it has one: (…, columns) → (…, rows)."""
    return F.linear(x, weights[name], weights.get(f"{name}_bias"))


def activate(z: Tensor, kind: str) -> Tensor:
    """The nonlinearity: gelu (its tanh form), or relu2 (So and others 2021)."""
    return F.relu(z).square() if kind == "relu2" else F.gelu(z, approximate="tanh")


def mlp(x: Tensor, weights: Mapping[str, Tensor], options: BlockConfig) -> Tensor:
    """Two matrices with a nonlinearity between, (…, width) → the same. up: (4 · width, width), down: (width, 4 · width). With mlp_scales: in eight bits."""
    if (scales := weights.get("mlp_scales")) is not None:
        matrices = weights["mlp_up"], weights["mlp_down"]
        return mlp_op(x.flatten(0, -2), *matrices, scales)[0].view_as(x)
    hidden = activate(linear(x, weights, "mlp_up"), options.activation)
    return linear(hidden, weights, "mlp_down")


# %%
z = torch.randn(1_000_000, dtype=torch.float64).to(tier.device).requires_grad_()
squared = activate(z, "relu2")
(slope,) = torch.autograd.grad(squared.sum(), z)
assert torch.equal(slope, 2 * z.clamp(min=0)) and abs((squared == 0).double().mean() - 0.5) < 0.002
assert torch.allclose(activate(3 * z, "relu2"), 9 * squared)
size = {kind: activate(z, kind).square().mean().sqrt().item() for kind in ("gelu", "relu2")}
assert abs(size["relu2"] - math.sqrt(3 / 2)) < 0.01 and 0.6 < size["gelu"] < 0.7
print({kind: f"{rms:.2f}" for kind, rms in size.items()}, "is what a normal z becomes, as rms")

# %% [markdown]
# What does it cost? On a CPU a tanh costs something; the clock below will say. On a GPU an activation is as dear as the bytes that it moves. GELU's backward pass needs the activation's input; ReLU²'s can do with its output, since $2\max(z, 0)$ is twice its root, and record 87 uses that to store one tensor less.
#
# ### Initialisation


# %%
#| export
def linear_init(
    config: BlockConfig, init_std: float, layers: int, columns: int, adds: bool
) -> dict[str, Any]:
    """Deviation and distribution with which a matrix of so many columns begins, as fields of its ParamSpec (chapter 21). adds: it writes to the residual stream."""
    std = 0.5 / math.sqrt(columns) if config.fan_in_init else init_std
    if adds:
        std = 0.0 if config.zero_init_proj else std / math.sqrt(2 * layers)
    return {"init_std": std, "init_uniform": config.fan_in_init and std > 0}


# %%
ALL_SIX = BlockConfig(
    norm="rms",
    biases=False,
    qk_norm=True,
    activation="relu2",
    zero_init_proj=True,
    fan_in_init=True,
)
plain = linear_init(BlockConfig(), 0.02, 12, 768, adds=False)
assert plain == {"init_std": 0.02, "init_uniform": False}
starts = {width: linear_init(ALL_SIX, 0.02, 12, width, adds=False) for width in (128, 768)}
spread = {width: start["init_std"] for width, start in starts.items()}
assert linear_init(ALL_SIX, 0.02, 12, 768, adds=True)["init_std"] == 0.0
assert f"{spread[768]:.3f}" == "0.018" and f"{spread[128]:.3f}" == "0.044"
print(f"a matrix of 768 columns: {spread[768]:.4f}; of 128: {spread[128]:.4f}")

# %% [markdown]
# At GPT-2's width the formula gives nearly GPT-2's number. What it buys is the other widths. Our laptop's model is 128 wide and begins with 0.05, which is $0.02\sqrt{768/128}$. So for it this change is a small one, and the measurement below says nothing about 0.02.
#
# ### In the model
#
# [The model](21_model.py) takes these options as the group `block` of its `GPTConfig`, and attention there norms its queries and keys if told to. Each of its tensors holds all layers, along the first dimension (a *bank*). With all six switched, a block has four matrices and nothing else, that of queries, keys and values counted as one:

# %%
from speedrun.model.gpt import GPT, GPTConfig, param_specs

sizes = {
    name: {row.name: math.prod(row.shape) for row in param_specs(GPTConfig(block=block), 50_257)}
    for name, block in (("GPT-2", BlockConfig()), ("modern", ALL_SIX))
}
gone = sum(sizes["GPT-2"].values()) - sum(sizes["modern"].values())
biases = sum(
    size for name, size in sizes["GPT-2"].items() if name.endswith("bias") and "norm" not in name
)
assert (len(sizes["GPT-2"]), len(sizes["modern"])) == (16, 6)
assert 0.0009 < gone / sum(sizes["GPT-2"].values()) < 0.0010 and biases == 12 * 9 * 768
assert f"{biases / sum(sizes['GPT-2'].values()):.2%}" == "0.07%"
print(f"16 tensors become 6; {gone:,} parameters are gone, {biases:,} of them matrices' biases")

# %% [markdown]
# Now the claim that norms lose nothing with their parameters. Draw a GPT-2 with random gains and biases, but for the last norm's, fold all of it into the matrices as derived, and compare logits with a model whose norms have no parameters. (Layer norm adds $10^{-5}$ before it divides and our RMS norm $10^{-6}$; here both add the same.)


# %%
from unittest.mock import patch


def folded(state: dict) -> dict:
    """GPT-2's weights as those of a model with parameter-free norms and the same logits."""
    centre = torch.eye(state["final_norm_gain"].numel()).to(state["final_norm_gain"])
    centre -= centre.mean()
    found = {name: state[name] @ centre for name in ("embed", "pos_embed")}
    for writer in ("attention_out", "mlp_down"):
        found[writer] = centre @ state[writer]
        found[f"{writer}_bias"] = state[f"{writer}_bias"] @ centre
    for reader in ("attention_qkv", "mlp_up"):
        gain, bias = (state[f"{reader.split('_')[0]}_norm_{part}"] for part in ("gain", "bias"))
        found[reader] = state[reader] * gain[:, None, :]
        carried = (state[reader] @ bias[:, :, None])[:, :, 0]
        found[f"{reader}_bias"] = state[f"{reader}_bias"] + carried
    return found


from dataclasses import replace

shape = GPTConfig(num_layers=3, num_heads=4, model_dim=64, max_seq_len=32)
full = GPT(shape, 288).double().to(tier.device)
bare = GPT(replace(shape, block=BlockConfig(norm="rms")), 288).double().to(tier.device)
with torch.no_grad():
    for name, p in full.named_parameters():
        p.add_(0.2 * torch.randn_like(p) * ("final" not in name))
bare.load_state_dict(folded(full.state_dict()))
tokens = torch.randint(288, (2, 33), generator=torch.Generator().manual_seed(1)).to(tier.device)
keep = F.rms_norm
with patch.object(F, "rms_norm", lambda x, shape, eps: keep(x, shape, eps=1e-5)):
    off = (full(tokens[:, :-1]) - bare(tokens[:, :-1])).abs().max() / full(tokens[:, :-1]).std()
assert off < 1e-12
print(f"logits differ by at most {off:.0e} of their spread")

# %% [markdown]
# And the first step of a modern model. All blocks are the identity, so the logits are those of a model without blocks, and only what writes to the stream has a gradient:

# %%
modern = GPT(replace(shape, block=ALL_SIX), 288).to(tier.device)
inputs, targets = tokens[:, :-1], tokens[:, 1:]
modern(inputs, targets).backward()
embedded = modern.embed[inputs] + modern.pos_embed[: inputs.shape[1]]
assert torch.allclose(modern(inputs), rms_norm(embedded) @ modern.embed.T, atol=1e-5)
moved = {name for name, p in modern.named_parameters() if p.grad.any()}
assert moved == {"attention_out", "mlp_down", "embed", "pos_embed"}
captured = torch.compile(modern, fullgraph=True, backend="eager")
assert torch.equal(captured(inputs, targets), modern(inputs, targets))
print("in the first step these learn:", ", ".join(sorted(moved)))

# %% [markdown]
# ## The measurement
#
# First at full size, in public. Records 4 and 5 read the same batches in the same order, at the same rates, until record 5's begins to fall at step 3,650. The seven changes are what lies between them, and rounding. What do they save?

# %% tags=["hide-input"] mystnb={"image": {"alt": "Validation loss of record 4 less record 5's by step, beside the difference of records 5 and 6, whose models are the same"}}
import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style

figure_style()
logged: dict[str, dict[int, float]] = {}
for row in public_table("curves"):
    logged.setdefault(row["record"], {})[int(row["step"])] = float(row["val_loss"])


def saved_by(new: str, old: str) -> dict[int, float]:
    """By step: an older record's public loss, less a newer one's."""
    shared = sorted(logged[new].keys() & logged[old].keys())
    return {step: logged[old][step] - logged[new][step] for step in shared if 125 <= step <= 3500}


seven, none = saved_by("5", "4"), saved_by("6", "5")
assert [round(seven[step], 2) for step in (125, 500, 1000, 2500, 3500)] == [
    0.25,
    0.1,
    0.06,
    0.04,
    0.04,
]
assert all(abs(gap) < 0.005 for step, gap in none.items() if step >= 500)
fig, axis = plt.subplots(figsize=(6, 2.9), layout="constrained")
axis.plot([*seven], [*seven.values()], ".-", label="seven changes: record 4 less record 5")
axis.plot(
    [*none], [*none.values()], ".-", color="0.6", label="the same model: record 5 less record 6"
)
axis.set_ylim(-0.02, 0.26)
axis.set_xlabel("steps of 524,288 tokens, 8×H100, FineWeb")
axis.set_ylabel("saves (nats a token)")
axis.legend(fontsize=8)
axis.set_title(
    f"The seven save {seven[500]:.2f} nats at step 500, and {seven[3500]:.2f} from step 2,500 on"
)
plt.show()

# %% [markdown]
# One run each {cite}`moddednanogpt`, which is enough for 0.04 against 0.002. We found no runs of them one at a time. What follows are small models and short runs. They can show how changes depend on each other and on rates; they are too small to divide 0.04 by seven, and where they say something else, the curves above are right about the record.
#
# On the laptop's model: two layers, 128 wide, 600 steps under record 89's Muon ([chapter 13](13_muon.py)). There are two rates, Muon's for the matrices and AdamW's for everything else: embeddings, gains, biases. For GPT-2's block that chapter has tuned them. For the block with all six changes they are tuned here, on a grid of twelve points. Then each change is taken away from the six, and each is added alone to GPT-2's block, at *both* pairs of rates, always against a control at the same rates.

# %% tags=["hide-input"]
#| default_exp measure.modern_block
#| export
import math
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from speedrun.config import Config, vary
from speedrun.lab.provenance import stamp
from speedrun.measure.runs import best_of, corpus_of, cpu_base, step_times, train_arms

if TYPE_CHECKING:
    from speedrun.run import Run

NAMES = ("rates", "without", "alone", "other_rates", "long", "inside", "pace")
GPT2: dict[str, Any] = {
    "model.block.norm": "layer",
    "model.block.biases": True,
    "model.block.qk_norm": False,
}
GPT2 |= {
    "model.block.activation": "gelu",
    "model.block.zero_init_proj": False,
    "model.block.fan_in_init": False,
}
MODERN: dict[str, Any] = {
    "model.block.norm": "rms",
    "model.block.biases": False,
    "model.block.qk_norm": True,
}
MODERN |= {
    "model.block.activation": "relu2",
    "model.block.zero_init_proj": True,
    "model.block.fan_in_init": True,
}
CHANGES = {
    "plain norms": "model.block.norm",
    "no biases": "model.block.biases",
    "QK-norm": "model.block.qk_norm",
    "ReLU²": "model.block.activation",
    "zeros": "model.block.zero_init_proj",
    "scale by width": "model.block.fan_in_init",
}
GRID = [(rate, other) for rate in (0.002, 0.004, 0.008, 0.016) for other in (0.004, 0.008, 0.016)]


# %% tags=["hide-input"]
#| export
LONG: dict[str, Any] = {"steps": 2000, "schedule.momentum_ramp": (460, 80)}


def at_others_rates() -> dict[str, Config]:
    """What lacks one change at the rates of GPT-2's block, and what has one alone at those of the modern block."""
    old, new = (
        {"optim.matrix_lr": run.optim.matrix_lr, "optim.adam.lr": run.optim.adam.lr}
        for run in (cpu_base(), tuned())
    )
    without = {f"without {arm}": vary(run, old) for arm, run in arms_of("without").items()}
    alone = {"GPT-2": cpu_base()} | arms_of("alone")
    return without | {f"alone {arm}": vary(run, new) for arm, run in alone.items()}


def points() -> dict[str, Config]:
    """The modern block at every point of the grid."""
    modern = vary(cpu_base(), MODERN)
    return {
        f"{r:g} {o:g}": vary(modern, {"optim.matrix_lr": r, "optim.adam.lr": o}) for r, o in GRID
    }


def tuned() -> Config:
    """The modern block at the rates that did best in the committed grid."""
    return best_of("modern_block", "rates")


def arms_of(name: str) -> dict[str, Config]:
    """The arms of a measurement, by name."""
    if name == "rates":
        return points()
    if name == "alone":
        return {change: vary(cpu_base(), {key: MODERN[key]}) for change, key in CHANGES.items()}
    modern = tuned()
    if name == "pace":
        return {"GPT-2": cpu_base(), "modern": modern} | arms_of("alone")
    if name == "other_rates":
        return at_others_rates()
    if name == "long":
        some = {"GPT-2": cpu_base()} | arms_of("without")
        kept = ("GPT-2", "modern", "zeros", "QK-norm", "ReLU²")
        return {arm: vary(some[arm], LONG) for arm in kept}
    without = {change: vary(modern, {key: GPT2[key]}) for change, key in CHANGES.items()}
    return {"modern": modern} | without | {"one head": vary(modern, {"model.num_heads": 1})}


# %%
assert vary(cpu_base(), MODERN) != cpu_base() == vary(vary(cpu_base(), MODERN), GPT2)
assert set(CHANGES.values()) == set(GPT2) == set(MODERN) and len(points()) == 12


# %% tags=["hide-input"]
#| export
@torch.no_grad()
def look_inside(live: "Run") -> dict:
    """In one row of validation text of a trained run: the largest score, its bound, and the share of activations at zero."""
    from speedrun.train import val_batches

    found: dict[str, Any] = {"scores": [], "zeros": []}
    attend, relu = F.scaled_dot_product_attention, F.relu

    def attend_and_note(
        q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None
    ) -> Tensor:
        factor = scale or 1 / math.sqrt(q.shape[-1])
        found["scores"].append((factor * q @ k.mT).tril().abs().max().item())
        found["bound"] = factor * q.shape[-1]
        return attend(q, k, v, is_causal=is_causal, scale=scale)

    def relu_and_note(x: Tensor) -> Tensor:
        found["zeros"].append((x <= 0).float().mean().item())
        return relu(x)

    batch = next(val_batches(live, live.config.val_tokens))
    noted = patch.object(F, "scaled_dot_product_attention", attend_and_note)
    with noted, patch.object(F, "relu", relu_and_note):
        live.model(batch.inputs, batch.targets)
    return found


# %% tags=["hide-input"]
#| export
def inside() -> dict[str, Config]:
    """With and without QK-norm, at the tuned rate of the matrices and at twice that."""
    rate = tuned().optim.matrix_lr
    return {
        f"{'with' if norm else 'without'} {times}": vary(
            tuned(), {"optim.matrix_lr": times * rate, "model.block.qk_norm": norm}
        )
        for times in (1, 2)
        for norm in (True, False)
    }


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train arms with paired seeds, {"arms": {arm: [run, …]}}: the modern block nine times, each change five times.

    rates: its grid. pace: step times, {"ms": {arm: [ms, …]}}. inside: also what a trained model's attention and MLP do.
    """
    seeds = {"without": 9, "alone": 5, "inside": 3, "other_rates": 3, "long": 3}.get(name, 1)
    modules = ["speedrun.measure.modern_block", "speedrun.train"]
    facts = stamp(command, modules, seeds, range(seeds), corpus_of(cpu_base()))
    arms = inside() if name == "inside" else arms_of(name)
    if name == "pace":
        return {"ms": step_times(arms)}, facts
    counts = {arm: seeds if arm == "modern" else min(seeds, 5) for arm in arms}
    after = look_inside if name == "inside" else None
    return {"arms": train_arms(arms, counts, facts, after=after)}, facts


# %%
from speedrun.lab.results import load_result, measured_on
from speedrun.lab.stats import describe, p_difference


def losses_of(slug: str, name: str) -> dict[str, list[float]]:
    """The final losses of each arm of a measurement, by seed."""
    arms = load_result(slug, name)["data"]["arms"]
    return {arm: [run["val_loss"] for run in runs] for arm, runs in arms.items()}


grid, without, alone, other = (
    losses_of("modern_block", name) for name in ("rates", "without", "alone", "other_rates")
)
gpt2, modern = losses_of("muon", "laptop")["today"], without.pop("modern")
best = min(grid, key=grid.get)
five = describe(without["zeros"])
lead = describe(gpt2).mean - describe(modern).mean
p_all = p_difference(describe(gpt2[1:]), describe(modern[1:]))  # without the seed that chose rates
p_five = p_difference(describe(gpt2[1:]), describe(without["zeros"][1:]))
assert (tuned().optim.matrix_lr, tuned().optim.adam.lr) == (0.008, 0.008) and best == "0.008 0.008"
assert (cpu_base().optim.matrix_lr, cpu_base().optim.adam.lr) == (0.016, 0.004)
assert 0.01 < lead < 0.014 and 0.05 < p_all < 0.1
assert 0.045 < describe(gpt2).mean - five.mean < 0.055 and p_five < 0.001
print(f"GPT-2's block, rates 0.016 and 0.004:    {describe(gpt2)} (mean and deviation)")
print(f"all six changes, rates 0.008 and 0.008: {describe(modern)}, p = {p_all:.2f}")
print(f"five of them, without zeros:            {five}, p = {p_five:.0e}")
print(measured_on(load_result("modern_block", "without")))

# %% [markdown]
# Five of the six are worth 0.05 nats together. The sixth, zeros, takes four hundredths of that back. One change at a time it looks like this:

# %% tags=["hide-input"] mystnb={"image": {"alt": "Change of the final loss, same seed, when one of six changes is taken away from the set or added alone to GPT-2's block, each at two pairs of rates"}}
import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style

figure_style()


def minus(losses: list[float], control: list[float]) -> list[float]:
    """Differences of runs with the same seed."""
    return [x - y for x, y in zip(losses, control)]


slow, fast = other["without modern"], other["alone GPT-2"]  # each block at the other's rates
taken = {
    change: (minus(without[change], modern), minus(other[f"without {change}"], slow))
    for change in without
}
added = {c: (minus(other[f"alone {c}"], fast), minus(alone[c], gpt2)) for c in alone}
fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.3), sharey=True, sharex=True, layout="constrained")
for axis, arms, title in (
    (axes[0], taken, "all six less one, against all six"),
    (axes[1], added, "GPT-2 plus one, against GPT-2"),
):
    for y, change in enumerate(alone):
        for n, dots in enumerate(arms[change]):
            label = ("0.008, 0.008", "0.016, 0.004")[n] if not y else None
            axis.plot(dots, [y + 0.2 * n - 0.1] * len(dots), "o", ms=4, color=f"C{n}", label=label)
    axis.axvline(0, color="0.5", lw=0.8)
    axis.set_title(title, loc="left", fontsize=9)
    axis.set_xlabel("change of the loss (nats)")
axes[0].set_yticks(range(len(alone)), alone)
axes[0].invert_yaxis()
axes[1].legend(fontsize=8, title="rates: matrices, rest", title_fontsize=8)
mean = {change: [sum(dots) / len(dots) for dots in both] for change, both in taken.items()}
fig.suptitle(
    f"Without QK-norm and ReLU² the loss is higher, by {mean['QK-norm'][0]:.2f} and {mean['ReLU²'][0]:.2f}, at one pair of rates only"
)
plt.show()

# %%
p_of = {c: p_difference(describe(without[c]), describe(modern)) for c in without}
for change, p_value in p_of.items():
    how = "with only" if change == "one head" else "without"
    print(
        f"{how} {change:15} {mean[change][0]:+.3f}, p = {p_value:.0e}; at the other rates {mean[change][1]:+.3f}"
    )
assert 0.08 < mean["QK-norm"][0] < 0.1 and 0.07 < mean["ReLU²"][0] < 0.1
assert all(abs(mean[c][1]) < 0.012 for c in alone if c != "zeros")
assert max(taken["zeros"][0]) < -0.02 > mean["zeros"][1] and mean["zeros"][0] < -0.03
assert p_of["plain norms"] < 0.05 < min(p_of["no biases"], p_of["scale by width"])
assert all(p_of[c] < 2e-3 for c in ("QK-norm", "ReLU²", "zeros")) and mean["one head"][0] > 0.06
assert max(abs(sum(both[1]) / 5) for both in added.values()) < 0.015

# %% [markdown]
# So much for most of the prediction. At the rates of the six QK-norm and ReLU² are missed, by 0.09 and 0.08; the plain norms' 0.02, $p = 0.04$, is no more than a hint among seven arms. Having no biases, or the scale, does not show; zeros do harm. At the other pair of rates no absence makes a difference that three seeds show by Welch's test; zeros, with 0.024 less, come nearest. Added to GPT-2's block alone, at the rates that suit it, none of the six moves the mean by more than a hundredth or so, and five seeds could hardly see less.
#
# Between the pairs two rates differ. Which of them is it? (The two single changes are one run each, from chapter 13's grid.)

# %%
corner = {at: runs[0] - gpt2[0] for at, runs in losses_of("muon", "laptop_rates").items()}
gone_wrong = describe(fast).mean - describe(gpt2).mean
repaired = {c: -sum(both[0]) / 3 for c, both in added.items()}
assert 0.01 < corner["0.016 0.008"] < 0.03 and 0.07 < corner["0.008 0.004"] < 0.09
assert 0.1 < gone_wrong < 0.12 and 0.06 < repaired["QK-norm"] < 0.075
assert 0.035 < min(repaired["ReLU²"], repaired["plain norms"]) < 0.05
assert max(repaired[c] for c in ("no biases", "zeros", "scale by width")) < 0
print(
    f"GPT-2's block, the others' rate doubled: {corner['0.016 0.008']:+.3f}; the matrices' halved: {corner['0.008 0.004']:+.3f}"
)
print(f"both: {gone_wrong:+.3f}")
for change, part in repaired.items():
    print(f"  with {change:15} {gone_wrong - part:+.3f}")

# %% [markdown]
# It is mostly the matrices' rate, in one run each. Of the whole 0.107 QK-norm makes good two thirds, ReLU² four tenths and the plain norms a little less. (They overlap.) What these three bring to so short a run is that matrices need less rate; why, these runs do not say. An ablation at fixed rates measures a change together with those rates, and not the change alone.
#
# Does any of it last?

# %%
lasting = {arm: describe(losses) for arm, losses in losses_of("modern_block", "long").items()}
for arm, sample in lasting.items():
    name = arm if arm in ("GPT-2", "modern") else f"without {arm}"
    print(f"2,000 steps, {name:16} {sample}")

# %%
step_of = {arm: sample.mean - lasting["modern"].mean for arm, sample in lasting.items()}
p_long = {arm: p_difference(lasting[arm], lasting["modern"]) for arm in lasting if arm != "modern"}
assert 0.006 < step_of["GPT-2"] < 0.01 < 0.015 < step_of["QK-norm"] < 0.02
assert -0.007 < step_of["zeros"] < -0.003 and -0.007 < step_of["ReLU²"] < -0.003
assert p_long["QK-norm"] < 0.05 and min(p_long[arm] for arm in ("GPT-2", "zeros", "ReLU²")) > 0.1
print("against all six:", {arm: f"{step_of[arm]:+.3f}, p = {p:.2f}" for arm, p in p_long.items()})
half = losses_of("muon", "laptop_long_rates")["0.008 0.004"][0]
assert half < lasting["modern"].mean < lasting["GPT-2"].mean
print(f"GPT-2's block at half the matrices' rate, one run of chapter 13: {half:.3f}")

# %% [markdown]
# Hardly. After 2,000 steps, at rates that were tuned for 600, neither what zeros cost nor what ReLU² brought can be told from nothing, and QK-norm's 0.017, with $p = 0.03$, is among four a hint. GPT-2's block at half the matrices' rate was level with the six, in one run; theirs nobody tuned for this length. So this model, which is too small and too short a run to say what record 5 gained at 124 million parameters, says how not to find out: one change at a time, at fixed rates, for one length.
#
# ### On a GPU
#
# The same question to a model three times as wide and four times as deep, with a vocabulary of 50,257 instead of 288: 8 layers, a width of 384, all six changes, half-truncated [rotary positions](06_rotary.py) instead of learned ones, a norm behind the embedding as in [chapter 07](07_plumbing.py), in bfloat16. A run is 600 steps of 32,768 tokens (the laptop's have 1,024) and takes some 20 seconds. So here both blocks can be asked for their own rates, one run for each pair:


# %%
def grids_of(name: str) -> dict[str, dict]:
    """Losses of single runs by block and rates: those of the matrices and of the rest."""
    found: dict[str, dict] = {"all six": {}, "GPT-2's block": {}}
    for arm, (run,) in load_result("architecture", name)["data"]["arms"].items():
        rates = run["config"]["optim"]["matrix_lr"], run["config"]["optim"]["adam"]["lr"]
        found["GPT-2's block" if "GPT-2" in arm else "all six"][rates] = run["val_loss"]
    for block, grid in found.items():
        matrices, rests = (sorted({rates[n] for rates in grid}) for n in (0, 1))
        print(f"{block:14}", *(f"rest {rest:.3f}" for rest in rests), sep="   ")
        for matrix in matrices:
            losses = (f"{grid[matrix, rest]:<10.3f}" for rest in rests)
            print(f"matrices {matrix:.3f}", *losses, sep="   ")
    return found


grids = grids_of("rates")
best = {block: min(grid, key=grid.get) for block, grid in grids.items()}
assert best == {"all six": (0.016, 0.008), "GPT-2's block": (0.016, 0.016)}
lowest = {block: min(grid.values()) for block, grid in grids.items()}
beaten = sum(loss < lowest["all six"] for loss in grids["GPT-2's block"].values())
assert 0.08 < lowest["all six"] - lowest["GPT-2's block"] < 0.09 and beaten == 8
print(f"{beaten} of the older block's 9 pairs beat the best of the six")

# %% [markdown]
# All four neighbours of the six's best pair are worse, by 0.02 to 0.05, though two single runs differ by 0.016 of themselves. GPT-2's block has its best at the highest rate for the rest that it was given, and is ahead nevertheless. Then the changes one at a time, the control with fifteen seeds and each arm with three, all but the last arm at the six's rates. These are eight of the 35 arms in chapters 05 to 08 that have one matrix for embedding and head; the $p$ are [Dunnett's](01_are_you_faster.py), for all of them:

# %%
from speedrun.lab.stats import compare_line, study_of

corpus = load_result("architecture", "corpus")
runs_of = corpus["data"]["arms"]
losses = {arm: [run["val_loss"] for run in runs] for arm, runs in runs_of.items()}
study = study_of({arm: all_of for arm, all_of in losses.items() if "two matrices" not in arm})
OFF = ("no QK-norm", "GELU", "layer norms", "biases", "no zeros", "normal start", "GPT-2's block")
took = {arm: sorted(run["seconds"] for run in runs) for arm, runs in runs_of.items()}
first, *_, last = took["control"]
print(f"{'control, all six':36} {study.samples['control']}  {took['control'][7]:.1f} s")
for arm in (*OFF, "GPT-2's block, its rates"):
    print(f"{study.line(arm)}  {took[arm][1]:.1f} s")
print(f"one deviation for all {len(study.p_values)} arms: {study.pooled_sd:.4f}")
print(measured_on(corpus))

# %%
BETTER = ("GPT-2's block, its rates", "GPT-2's block", "layer norms", "GELU")
assert max(study.p_values[arm] for arm in BETTER) < 0.001
assert -0.1 < study.delta(BETTER[0]) < -0.085 and -0.085 < study.delta(BETTER[1]) < -0.075
assert -0.07 < study.delta("layer norms") < -0.06 and -0.047 < study.delta("GELU") < -0.037
assert all(
    abs(study.delta(arm)) < 0.015 < 0.5 < study.p_values[arm] for arm in OFF if arm not in BETTER
)
seen = study.detectable(3), study.detectable(3, power=0.9)
assert [round(difference, 3) for difference in seen] == [0.024, 0.034]
assert study.pairwise_p("layer norms", "GELU") < 0.05 and len(study.p_values) == 35
less = 1 - took["no QK-norm"][1] / took["control"][7]
assert 0.07 < less < 0.09 and took["no QK-norm"][2] < first
SAME = ("GELU", "layer norms", "no zeros", "biases")
assert all(first < took[arm][1] < 1.035 * took["control"][7] for arm in SAME)
assert (
    0.04 < last / first - 1 < 0.055
    and 0.025 < 1 - took["normal start"][1] / took["control"][7] < 0.035
)
print(f"control {first:.1f} to {last:.1f} s; without QK-norm {less:.0%} less than its median")
print(
    f"p < 0.05 takes {seen[0]:.3f}; {seen[1]:.3f} gets it nine times in ten; two single runs differ by {study.pooled_sd * 2**0.5:.3f}"
)

# %% [markdown]
# GPT-2's block is *better*, by 0.08 at the rates of the six and 0.09 at its own. GELU alone brings 0.04 and layer norms alone 0.06; whether the two overlap or the other four take some of it back these runs do not show. Here layer norms bring more than a norm: matrices have no biases in these runs, so those of the norms act as such, and the last norm's gain and bias no matrix can take over. How much of the 0.06 is theirs was not measured. The other four make no difference that shows. All of it is uncertain by 0.024 either way, if 35 arms are to be right at once; for QK-norm's absence that is from $-0.026$ to $+0.022$, which excludes the laptop's 0.09 and not its 0.017.
#
# 600 steps are a short run. Both blocks again for 2,000, with warm-up and ramps as long a share of it: one run at the best rates and at half of either or both, then three at the best.

# %%
again = grids_of("long_rates")
assert {block: min(grid, key=grid.get) for block, grid in again.items()} == best
longest = {
    arm: describe(run["val_loss"] for run in runs)
    for arm, runs in load_result("architecture", "long")["data"]["arms"].items()
}
old, six = longest["GPT-2's block, its rates"], longest["control"]
print(f"2,000 steps, all six {six}\n2,000 steps, GPT-2's block {compare_line(old, six)}")
assert 0.01 < six.mean - old.mean < 0.02 < p_difference(old, six) < 0.03

# %% [markdown]
# At no lower rate is either block better; with half the rate for the rest the older one is as good. Higher rates were not tried. Of a lead of 0.09 there is 0.014 left, with $p = 0.02$. So most of the older block's lead is an early one.
#
# On the laptop it was the other way round, as far as one can see: at the rates of the six GELU cost 0.08 and layer norms perhaps 0.02, and with rates for each the six led by 0.012 ($p = 0.06$), five of them by 0.05. So even the sign, of ReLU² at least, belongs to a model, and its size to rates and length. Depth, width, rows, vocabulary, batch, positions, the norm behind the embedding, schedule and precision differ between the two machines, and which of them turns it these runs do not say. Neither says what record 5 gained. Its width has not been tried, nor its 5,100 steps.
#
# ### Inside
#
# What QK-norm prevents can be looked at. The largest score, by size, that attention sees in a trained model of the laptop's, in one batch of validation text, at the tuned rate of the matrices and at twice that:

# %%
trained = load_result("modern_block", "inside")["data"]["arms"]
largest = {arm: [max(run["scores"]) for run in runs] for arm, runs in trained.items()}
bound = trained["with 1"][0]["bound"]
for arm, scores in largest.items():
    norm, times = arm.split()
    print(f"{norm:7} QK-norm, matrix rate × {times}: {', '.join(f'{s:.1f}' for s in scores)}")
assert bound == 8 and all(max(largest[f"with {n}"]) < bound for n in (1, 2))
assert 8 < min(largest["without 1"]) < max(largest["without 1"]) < 10.5
assert 12.5 < min(largest["without 2"]) < max(largest["without 2"]) < 20.5
zeros = [share for run in trained["with 1"] for share in run["zeros"]]
assert 0.55 < min(zeros) and max(zeros) < 0.65
print(f"the bound is √64 = {bound:.0f}; ReLU² is zero for {min(zeros):.0%} to {max(zeros):.0%}")

# %% [markdown]
# With QK-norm scores come close to the bound and cannot pass it. Without it, doubling the rate takes the largest from 8 to 10 up to 13 to 20. But at the lower rate, where scores end at most 27% above the bound, its absence cost 0.09; at 0.016 and 0.004, where we did not look, nothing that shows. So the bound is perhaps not what it was missed for.
#
# ## What it buys
#
# In time:

# %%
import statistics

ms = load_result("modern_block", "pace")["data"]["ms"]
median = {arm: statistics.median(times) for arm, times in ms.items()}
for arm, time_of in median.items():
    print(f"{arm:15} {time_of:.1f} ms a step, {time_of / median['GPT-2'] - 1:+.0%}")
print(measured_on(load_result("modern_block", "pace")))

# %%
change = {arm: time_of / median["GPT-2"] - 1 for arm, time_of in median.items()}
assert max(map(abs, change.values())) < 0.06 and abs(change["modern"]) < 0.025
assert 0.025 < change["QK-norm"] < 0.035 and -0.055 < change["ReLU²"] < -0.045
idle = [change[arm] for arm in ("zeros", "scale by width")]  # what cannot change the time
assert -0.0125 < min(idle) < max(idle) < 0
print(
    f"QK-norm {change['QK-norm']:+.0%}, ReLU² {change['ReLU²']:+.0%}, all six {change['modern']:+.0%}"
)

# %% [markdown]
# So much for the prediction's last question. On this CPU QK-norm costs three per cent of a step, and ReLU², which needs no tanh, gives five back; zeros and scale, which cannot change the time, move it by one at most. (On other machines and other days QK-norm cost three to five, and ReLU² gave one to four back.) On the GPU runs without QK-norm took 8% less time than the control; GELU, layer norms, biases and zeros moved it by three per cent at most, and so did the normal start, which cannot. That cannot say where record 5's 17% came from. Two candidates are GPU matters. Heads of 128 numbers, half as many, make half as many scores to exponentiate. And the padded vocabulary saves a seventh of a step in [chapter 08](08_logits.py), in a model of which the head is about half; in record 5's, three tenths.
#
# ## What it costs, and when it fails
#
# QK-norm's bound is a limit on what attention can do. A head of $d$ numbers can give a key at most $\sqrt d$ more than one that is at right angles to the query. Among many keys that may be too little to single one out:


# %%
def sharpest(head_dim: int, keys: int) -> float:
    """The largest weight that one of so many keys can have if all others score zero."""
    most = math.exp(math.sqrt(head_dim))
    return most / (most + keys - 1)


among = {head_dim: sharpest(head_dim, 1024) for head_dim in (16, 64, 128)}
assert [f"{share:.0%}" for share in among.values()] == ["5%", "74%", "99%"]
print({f"{d} numbers": f"{share:.0%}" for d, share in among.items()}, "of 1,024 keys")

# %% [markdown]
# A head of 64 numbers gives one key of 1,024 at most three quarters of its attention while the others score zero; to do better it has to push them below. One of 128 need not. Record 5 went from twelve heads of 64 to six of 128 in the same log that brought QK-norm. Its authors do not say that one was for the other. (On the laptop one head of 128 for two of 64 costs 0.07 at the rates of the six, at the others nothing sure; but that is half of all heads.) The bound is a choice, too: record 20 multiplied scores by 0.12 instead of $1/\sqrt{128}$, which raises it from 11.3 to 15.4, and counts twenty steps for it.
#
# Squares grow quickly. ReLU² is larger than GELU for large inputs and smaller for small ones, so its outputs spread wider. Eight-bit floats, which record 89 keeps them in, end at 448.
#
# ## What did not work
#
# The contest went back on half of one of the six. Since record 64 attention's outputs begin like all other matrices, and only the MLP's still begin at zero; that record, which also changed the scale of queries and keys, saved twenty steps. Norms that subtract the mean were tried again on record 70: at the same loss, 3.2796 against 3.2793 in five runs ($p = 0.33$), and 1.8 seconds later {cite}`moddednanogpt`. That agrees with what this chapter derives. It does not contradict the layer norms' lead above, which have gains and biases as well.
#
# ## Exercises
#
# 1. A score with QK-norm is at most $\sqrt d$. Write `numbers_needed(keys, share)`: how many numbers a head needs at least, so that one key of `keys` can have that share of its attention while all others score zero. Use whole numbers.


# %% tags=["solution"]
def numbers_needed(keys: int, share: float) -> int:
    """The smallest head that can give one key that share."""
    head_dim = 1
    while sharpest(head_dim, keys) < share:
        head_dim += 1
    return head_dim


# %%
for keys, share, right in ((1024, 0.5, 49), (2, 0.5, 1), (2, 0.75, 2), (65_536, 0.9, 177)):
    got = numbers_needed(keys, share)
    assert got == right, (
        f"{share:.0%} for one of {keys:,} keys: {right} numbers, not {got} (the others are {keys - 1:,})"
    )
print(f"half of the attention among 65,536 keys: {numbers_needed(65_536, 0.5)} numbers")

# %% [markdown]
# 2. GELU and ReLU² make different things of a normal input. Write `rms_after(kind, scale)`: the root mean square of the activation of normal inputs with a deviation of `scale`, by drawing a million. How does each grow when the inputs double?


# %% tags=["solution"]
def rms_after(kind: str, scale: float) -> float:
    """Root mean square of the activation, of a million normal inputs."""
    draws = torch.randn(1_000_000, generator=torch.Generator().manual_seed(9)).to(tier.device)
    return activate(scale * draws, kind).square().mean().sqrt().item()


# %%
one = rms_after("relu2", 1.0)
assert abs(one - 1.2247) < 0.02, (
    f"ReLU² of a standard normal has a root mean square of √1.5 = 1.22, not {one:.4g}"
)
growth = {kind: rms_after(kind, 2.0) / rms_after(kind, 1.0) for kind in ("gelu", "relu2")}
assert abs(growth["relu2"] - 4) < 0.1, (
    f"a square grows 4 times when its input doubles, not {growth['relu2']:.2f}"
)
assert 2 < growth["gelu"] < 2.3, f"GELU grows a little more than twice, not {growth['gelu']:.2f}"
print({kind: f"× {times:.2f}" for kind, times in growth.items()}, "for inputs twice as large")

# %% [markdown]
# ## Since then
#
# Norms without parameters, QK-norm, ReLU² and six heads of 128 are in record 89. Since record 59 the MLP's first matrix and ReLU² are one kernel ([chapter 18](18_fused_mlp.py)). Record 19's scale is there too; of the zeros half is left. Record 90 cut queries and keys to 96 numbers, and record 92 to 64 in five of its seven attention layers, with scores times 0.13, so that their bound is 8.3; its two layers with long windows keep 128. By its author's account heads, widths and queries, keys and values in eight bits together cost 6.9 thousandths of loss and saved 5 seconds.
