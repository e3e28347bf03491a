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
# # Plumbing: which layer hears what
#
# ```{admonition} Cost box
# Any machine: about fifteen seconds on two CPU cores, no GPU. The comparisons took one GPU half an hour and are committed.
# Record 9: @Grad62304977, @kellerjordan0. Record 11: @brendanh0gan. Record 14: @KoszarskyB. Records 15 to 17: @leloykun, @YouJiacheng. Records 30, 34, 35, 40, 45: @EmelyanenkoK, @classiclarryd. Record 55: @classiclarryd. Records 63, 65, 70: @photon_mz, @varunneal.
# ```
#
# ## The problem
#
# Record 9 took **156 seconds** off 648, and hardly a matrix changed. Each layer got two numbers that say how much of the stream and how much of the embedding it hears, and one more for how much of the first layer's values. For the next year the contest rewired the same model. Skips between mirrored layers came with record 11, were passed through a sigmoid in record 32, and in record 45 all but one of them went. The first layer's values gave way to a table for every layer, 463 million parameters, which three records later were a quarter of that, and are five tables today.

# %%
from speedrun.lab.results import public_table

ladder = {int(row["record"]): row for row in public_table("records")}
seconds = {n: float(ladder[n]["record_time_s"]) for n in ladder if 7 < n < 71}
gained = {n: seconds[n - 1] - seconds[n] for n in (9, 11, 14, 17, 34, 40, 45, 55, 63)}
assert gained[9] == 156 and seconds[8] == 648 and 12 * 50_257 * 768 // 10**6 == 463
print({f"record {n}": f"{s:.1f} s, {s / seconds[n - 1]:.1%}" for n, s in gained.items()})

# %% [markdown]
# Each gain is for all that its record changed. Record 9's log has single runs at 3,200 steps with one thing more than the last: values 0.0123 and, with learned weights, 0.0086 more; the embedding for every layer 0.0093; Muon's momentum 0.0128; the cap 0.0053 {cite}`moddednanogpt`.
#
# ```{admonition} Prediction
# Take the model of the last two chapters and add one wire. **(a)** Every layer hears the embedding again. **(b)** Late layers hear the outputs of early ones. **(c)** Each token brings a vector of its own to attention's values, from a table. **(d)** Half of the middle layers' stream is taken out before the head. Order them by the loss they save. And (a)'s weights begin at zero: **do they become positive or negative?**
# ```
#
# ## The idea
#
# A layer adds what it writes to the stream. Let $w_0$ be the embedding's vector and $w_k$ what layer $k$ writes; number the layers from 1. Then what layer $\ell$ hears, and what the head hears at the end, are sums
#
# $$
# x_\ell = \sum_{k < \ell} C_{\ell k}\, w_k .
# $$
#
# In GPT-2 every $C_{\ell k}$ is one. All plumbing puts other numbers into this lower triangle, and nothing else. Every reader norms what it hears, so a row counts only up to a factor.
#
# **The embedding again.** Record 9 lets layer $\ell$ begin with $x \leftarrow a_\ell x + b_\ell w_0$. It fills the column of the embedding with anything, and multiplies all that came before by $a_\ell$. If all $a_\ell$ are $a$ and all $b_\ell$ zero, row $\ell$ is $a^\ell, a^{\ell-1}, \dots, a$: what was written earlier counts for more. A model whose writing matrices shrink by $a$ from layer to layer is the same function. So the $a_\ell$ add nothing that the matrices could not do. The $b_\ell$ do: no matrix can make one layer hear a write that the next one does not.
#
# **Skips.** Record 11 adds the output of layer $\ell$ to the input of layer $L+1-\ell$, after the U-shaped networks of image models. There the middle is narrow, and skips carry what does not fit through it. Here nothing is narrow. What they do is to count: an output holds all that was written until then, so late layers hear early writes several times.
#
# **Taking out.** Record 40 subtracts half of the stream as it was after two thirds of the layers, just before the head. For the head alone, early writes count half. The two go in opposite directions: late layers should hear more of what early ones wrote, and the head less.
#
# **Values.** Attention moves values from token to token, and a value is a matrix times what the layer hears. In the first layer that is the embedding, so a value is a function of its token alone; it could stand in a table. Record 9 mixes the first layer's values into every other's. Record 14 lets the table learn for itself, one for each layer: no product, any vector for any token.
#
# **Gates.** Record 55 multiplies a table's vector by $2\sigma(W x)$ for each head, where $W$ sees twelve numbers of $x$ and begins at zero, the gate at one.
#
# **Smear.** Record 34 adds to each token's embedding a little of the one before, so that the first layer knows pairs.
#
# ## The code
#
# What a token brings:

# %%
#| default_exp model.embedding
#| export
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

READS = 12  # how many of a vector's numbers a gate looks at
Value = int | Literal["first"] | None


@dataclass(frozen=True)
class EmbeddingOptions:
    """What a token brings into the model. The defaults are GPT-2's."""

    norm: bool = False
    """RMS norm behind the lookup, so that only a vector's direction counts."""
    std: float = 0.0
    """Deviation of the first vectors; 0: model.init_std."""
    rate: float = 1.0
    """The embedding's rate as a multiple of optim.lr."""
    smear: bool = False
    """Each token's vector gets a little of the one before, through a gate."""
    values: Literal["none", "first", "all", "mirror", "outer", "ends"] = "none"
    """What is mixed into attention's values: the first layer's, or rows of tables. all: a table a layer. mirror: one for first and last, and so on. outer: three, for the first and the last three layers. ends: five, for the first two and the last three."""
    value_mix: Literal["share", "free", "gates"] = "share"
    """share: two learned weights that add up to 1, from halves. free: two. gates: 1 for the values, and a gate for every token and head."""
    value_std: float = 0.01
    """Deviation of the tables' first entries."""
    value_rate: float = 1.0
    """The tables' rate as a multiple of optim.lr."""


# %%
#| export
def values_by_layer(layers: int, kind: str) -> list[Value]:
    """What each layer's values are mixed with: the number of a table, the first layer's values, or nothing."""
    if kind == "first":
        own: list[Value] = [None]
        return own + ["first"] * (layers - 1)
    if kind in ("all", "mirror"):
        return [n if kind == "all" else min(n, layers - 1 - n) for n in range(layers)]
    begin, end = {"outer": (3, 3), "ends": (2, 3)}.get(kind, (0, 0))
    begin = min(begin, layers // 2)
    end = min(end, begin if kind == "outer" else layers - begin)
    middle: list[Value] = [None] * (layers - begin - end)
    last = range(end) if kind == "outer" else range(begin, begin + end)
    return [*range(begin), *middle, *last]


# %%
twelve = {kind: values_by_layer(12, kind) for kind in ("mirror", "outer", "ends")}
assert twelve["mirror"] == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0], "record 15"
assert twelve["outer"] == [0, 1, 2, *[None] * 6, 0, 1, 2], "record 17"
assert twelve["ends"] == [0, 1, *[None] * 7, 2, 3, 4], "record 63, of one layer more"
words, width = 50_257, 768
tables = {kind: len({v for v in values if v is not None}) for kind, values in twelve.items()}
for kind, count in {"all": 12, **tables}.items():
    print(f"{kind:6} {count:2} tables, {count * words * width / 1e6:.0f} million parameters")

# %% [markdown]
# ### Gates and smear


# %%
#| export
def gate(x: Tensor, weight: Tensor) -> Tensor:
    """A number between 0 and 2 for every vector of x, (…, width); with a weight of (heads, READS), and not (READS,), one a head."""
    return 2 * torch.sigmoid(F.linear(x[..., :READS], weight))


def smeared(x: Tensor, weights: Mapping[str, Any]) -> Tensor:
    """x, (batch, tokens, width), with a share of every vector added to the next one."""
    share = weights["smear_weight"] * gate(x[:, 1:], weights["smear_gate"]) / 2
    return torch.cat([x[:, :1], x[:, 1:] + share[..., None] * x[:, :-1]], 1)


# %%
#| export
def looked_up(inputs: Tensor, table: Tensor, tables: int) -> tuple[Tensor, ...]:
    """Rows of value tables that stand on top of each other, in one gather: (batch, tokens, width) of each."""
    begins = len(table) // tables * torch.arange(tables, device=inputs.device)
    return F.embedding(inputs[..., None] + begins, table).unbind(-2)


def with_value(
    v: Tensor, other: Tensor, x: Tensor, weights: Mapping[str, Tensor], kind: str
) -> Tensor:
    """Attention's values, (batch, heads, tokens, head_dim), with others mixed in. x: (batch, tokens, width), what attention reads."""
    if kind == "gates":
        return v + gate(x, weights["value_gate"]).mT[..., None] * other
    weight = weights["value_mix"]
    own, others = (1 - weight, weight) if kind == "share" else weight.unbind()
    return own * v + others * other


# %%
x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
none = {"smear_weight": torch.zeros(1), "smear_gate": torch.zeros(READS)}
assert torch.equal(smeared(x, none), x) and torch.equal(
    gate(x, none["smear_gate"]), torch.ones(2, 5)
)
half = smeared(x, none | {"smear_weight": torch.ones(1)})
assert torch.equal(half[:, 0], x[:, 0]) and torch.equal(half[:, 3], x[:, 3] + x[:, 2] / 2)
tables = torch.arange(12.0)[:, None].expand(12, 4)  # three tables of four words
rows = looked_up(torch.tensor([[0, 3]]), tables, 3)
assert [row[0, :, 0].tolist() for row in rows] == [[0, 3], [4, 7], [8, 11]]
print("smear and gates begin as if they were not there")

# %% [markdown]
# The tables stand on top of each other and are read in one gather, as since record 65.
#
# ### The plan
#
# What each layer has is a row of a plan, and no `if` in the forward pass asks for a layer's number.

# %%
#| default_exp model.plan
#| export
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class PlanOptions:
    """How the stream runs through the layers. The defaults are GPT-2's."""

    x0: bool = False
    """Before each layer the stream is mixed with x0, what the embedding gave; both weights are learned, x0's from 0."""
    residual: float = 1.0
    """x0: where the stream's own weights begin."""
    skips: Literal["none", "unet", "sigmoid", "one", "gated"] = "none"
    """Outputs of early layers that late ones get as well. unet: mirror-wise, weights from 1. sigmoid: of weights from -1.5. one: one of these. gated: times a gate for every token."""
    backout: bool = False
    """A share of the stream as it was after two thirds of the layers is taken out at the end; learned, from 0.5."""
    without: Literal["nothing", "attention", "mlp", "both"] = "nothing"
    """attention: the second layer of the later half has none. mlp: the first has none."""
    rate: float = 1.0
    """The rate of all weights that mix, as a multiple of optim.lr."""


@dataclass(frozen=True)
class LayerSpec:
    """A row of the plan: what one layer is made of."""

    attention: bool = True
    mlp: bool = True
    skip: int | None = None
    """The layer whose output is added before this one."""
    value: Value = None
    """The table whose rows, or the first layer's values, are mixed into attention's."""


# %%
#| export
def skip_pairs(layers: int, kind: str) -> dict[int, int]:
    """Late layers, and which early layer's output each gets."""
    half = layers // 2
    pairs = {layers - 1 - n: n for n in range(half)}
    if kind in ("one", "gated"):
        source = min(layers // 3, half - 1)
        return {layers - 1 - source: source}
    return pairs if kind != "none" else {}


def make_plan(
    layers: int, options: PlanOptions, embedding: EmbeddingOptions
) -> tuple[LayerSpec, ...]:
    """One row for each layer."""
    skips, values = skip_pairs(layers, options.skips), values_by_layer(layers, embedding.values)
    deaf = min(layers // 2 + 1, layers - 1) if options.without in ("attention", "both") else None
    dull = 0 if options.without in ("mlp", "both") else None
    if deaf is not None:
        values[deaf] = None
    used = sorted({value for value in values if isinstance(value, int)})
    values = [used.index(value) if isinstance(value, int) else value for value in values]
    return tuple(LayerSpec(n != deaf, n != dull, skips.get(n), values[n]) for n in range(layers))


def tables_of(plan: Sequence[LayerSpec]) -> int:
    """How many value tables a plan needs."""
    return len({spec.value for spec in plan if isinstance(spec.value, int)})


# %%
def drawn(plan: Sequence[LayerSpec]) -> list[str]:
    """A plan, a line a layer."""
    said = {"attention": lambda on: "attn" * on, "mlp": lambda on: "mlp" * on}
    said |= dict.fromkeys(("skip", "value"), lambda n: "" if n is None else str(n))
    return [" ".join(f"{said[f](getattr(spec, f)):5}" for f in said) for spec in plan]


seventeen = make_plan(
    12, PlanOptions(skips="unet", without="attention"), EmbeddingOptions(values="outer")
)
assert [n for n, spec in enumerate(seventeen) if not spec.attention] == [7]
assert seventeen[6].skip == 5 and seventeen[11].skip == 0 and seventeen[5].skip is None
assert make_plan(12, PlanOptions(skips="one"), EmbeddingOptions())[7].skip == 4, "record 45"
print("record 17, from the first layer to the last: attention, MLP, skip from, value table")
print("\n".join(f"{n:2} {line}" for n, line in enumerate(drawn(seventeen))))

# %% [markdown]
# The weights that mix are rows of [the model's](21_model.py) parameter table, banks with a number for each layer that has one. They begin so that a wire is there or not, as its record had it.


# %%
#| export
def mixing_rows(
    plan: Sequence[LayerSpec], heads: int, options: PlanOptions, embedding: EmbeddingOptions
) -> list[dict[str, Any]]:
    """All weights that mix, as fields of their rows in the table."""
    skipping = tuple(n for n, spec in enumerate(plan) if spec.skip is not None)
    valued = tuple(n for n, spec in enumerate(plan) if spec.value is not None)
    everyone, rows = tuple(range(len(plan))), list[dict[str, Any]]()
    if embedding.smear:
        rows += [{"name": "smear_weight", "shape": (1,)}, {"name": "smear_gate", "shape": (READS,)}]
    if options.x0:
        kind: dict[str, Any] = {"shape": (len(plan),), "owners": everyone}
        rows += [{"name": "stream_weight", "mean": options.residual} | kind]
        rows += [{"name": "x0_weight"} | kind]
    if skipping:
        kind = {"shape": (len(skipping),), "owners": skipping}
        rows += [{"name": "skip_weight", "mean": 1.0 if options.skips == "unet" else -1.5} | kind]
    if options.skips == "gated":
        rows += [{"name": "skip_gate", "shape": (1, READS), "owners": skipping}]
    if valued and embedding.value_mix == "gates":
        shape: tuple[int, ...] = (len(valued), heads, READS)
        rows += [{"name": "value_gate", "shape": shape, "owners": valued}]
    elif valued:
        shape = (len(valued),) if embedding.value_mix == "share" else (len(valued), 2)
        rows += [{"name": "value_mix", "shape": shape, "mean": 0.5, "owners": valued}]
    if options.backout:
        rows += [{"name": "backout_weight", "shape": (1,), "mean": 0.5}]
    return [{"rate": options.rate, "mixes": True} | row for row in rows]


# %%
#| export
def enter(
    x: Tensor,
    x0: Tensor,
    outputs: Sequence[Tensor],
    spec: LayerSpec,
    weights: Mapping[str, Tensor],
    skips: str,
) -> Tensor:
    """What a layer gets, (batch, tokens, width): the stream, with an earlier layer's output and x0 mixed in."""
    if spec.skip is not None:
        weight = weights["skip_weight"]
        weight = weight if skips == "unet" else torch.sigmoid(weight)
        if skips == "gated":
            weight = weight * gate(x0, weights["skip_gate"])[..., None]
        x = x + weight * outputs[spec.skip]
    if "x0_weight" in weights:
        x = weights["stream_weight"] * x + weights["x0_weight"] * x0
    return x


def leave(x: Tensor, outputs: Sequence[Tensor], weights: Mapping[str, Any]) -> Tensor:
    """What the final norm gets: the stream, less a share of what it was after two thirds of the layers."""
    if weights.get("backout_weight") is None:
        return x
    return x - weights["backout_weight"] * outputs[min(2 * len(outputs) // 3, len(outputs) - 2)]


# %% [markdown]
# ### The triangle
#
# Both functions only add and multiply by numbers. So they can be asked for $C$ themselves: let each write be a unit vector.

# %%
from speedrun.model.gpt import GPT, GPTOptions, Switches, weights_of_layers
from speedrun.model.mlp import BlockOptions
from speedrun.model.rotary import RotaryOptions


def triangle(model) -> Tensor:
    """What each layer, and then the head, hears: (layers + 1, layers + 1), columns: the embedding, then the layers' writes."""
    unit = torch.eye(len(model.plan) + 1, dtype=torch.float64)
    x = x0 = unit[0]
    heard, outputs = [], []
    for n, (spec, weights) in enumerate(zip(model.plan, weights_of_layers(model))):
        x = enter(x, x0, outputs, spec, weights, model.switches.plan.skips)
        heard.append(x)
        x = x + unit[n + 1]
        outputs.append(x)
    return torch.stack([*heard, leave(x, outputs, model._parameters)]).detach()


# %%
def model_of(plan: PlanOptions, layers: int = 12, width: int = 24, std: float = 0.3) -> GPT:
    """A small model with a plan, and noise in its matrices."""
    shape = GPTOptions(layers=layers, heads=2, width=width, context=16, init_std=std)
    block = BlockOptions(norm="rms", biases=False)
    return GPT(shape, 50, switches=Switches(block, RotaryOptions("rotary"), plan=plan)).double()


# %%
start = {"GPT-2": PlanOptions()}
start["record 11"] = PlanOptions(x0=True, skips="unet")
start["record 45"] = PlanOptions(x0=True, residual=1.1, skips="one", backout=True)
triangles = {name: triangle(model_of(plan)) for name, plan in start.items()}
assert torch.equal(triangles["GPT-2"], torch.ones(13, 13).tril())
mirrored, refined = triangles["record 11"], triangles["record 45"]
assert mirrored[-1].tolist() == [7, 7, 6, 5, 4, 3, 2, *[1] * 6]
powers = 1.1 ** torch.arange(7, 0, -1, dtype=torch.float64)
assert torch.allclose(refined[6, :7], powers)
for name, matrix in triangles.items():
    print(f"{name}, the head: {(matrix[-1] / matrix[-1, -1]).round(decimals=1).tolist()}")

# %% [markdown]
# One entry per write, oldest first, less a factor. At its start record 11's head hears the embedding and the first layer seven times, and each of the last six once. Record 45's hears them twice as loud as the last, and less of the middle. How much of this do the matrices undo? That they can undo the $a_\ell$ whole is a claim about functions, and can be tested on one: shrink the writing matrices instead.

# %%
scaled, plain = model_of(PlanOptions(x0=True, residual=1.1)), model_of(PlanOptions())
plain.load_state_dict(
    {
        **plain.state_dict(),
        **{n: p for n, p in scaled.state_dict().items() if n in plain.state_dict()},
    }
)
shrink = 1.1 ** -(torch.arange(12.0, dtype=torch.float64) + 1)
with torch.no_grad():
    for name in ("attention_out", "mlp_down"):
        plain.get_parameter(name).mul_(shrink[:, None, None])
tokens = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(1))
assert torch.allclose(scaled(tokens), plain(tokens), atol=1e-4)
assert not torch.allclose(scaled(tokens), model_of(PlanOptions())(tokens), atol=1e-2)
print(f"the same logits, though the stream ends {1.1**12:.1f} times as long")

# %% [markdown]
# (Norms add a millionth to what they divide by, hence the tolerance.) Record 45's 1.1 is worth 0.001 in its author's notes, and what it changes is not what the model can be but how quickly: a rate that suits a matrix moves its write by more when the write is small.
#
# And the first layer's values are a table, without having been stored as one:

# %%
from speedrun.model.mlp import linear, rms_norm

model = model_of(PlanOptions())
with torch.no_grad():
    weights = weights_of_layers(model)[0]
    stream = torch.nn.functional.embedding(tokens, model.token_embedding)
    values = linear(rms_norm(stream), weights, "attention_qkv")[..., -24:]
    table = rms_norm(model.token_embedding) @ weights["attention_qkv"][-24:].mT
assert torch.allclose(values, table[tokens])
print(f"values of the first layer: rows of a table of {len(table)} words")

# %% [markdown]
# ## The measurement
#
# On a GPU, one wire at a time is added to a model of 8 layers and a width of 384, with the block, the positions and the head of the chapters around this one, and a norm behind its embedding. A run is 600 steps of 32,768 tokens, 19 seconds. All arms have the rates that were best of four pairs for the control, and for the same seed the same data and first weights.

# %%
import statistics

from speedrun.lab.results import load_result, measured_on
from speedrun.lab.stats import beside, describe, p_difference

result = load_result("architecture", "corpus")
arms = result["data"]["arms"]
losses = {arm: describe(run["val_loss"] for run in runs) for arm, runs in arms.items()}
seconds = {arm: statistics.median(run["seconds"] for run in runs) for arm, runs in arms.items()}
control = losses["control"]
WIRES = (
    "first values",
    "mirror tables",
    "gated tables",
    "x0",
    "U-net",
    "one skip",
    "smear",
    "backout",
)
OTHERS = (
    "all plumbing",
    "no norm of the embedding",
    "one layer without attention",
    "one layer without MLP",
)
print(f"{'control':27} {control}")
for arm in (*WIRES, *OTHERS):
    time_of = f"{seconds[arm] / seconds['control'] - 1:+.0%}"
    print(f"{arm:27} {beside(losses[arm], control)}  time {time_of}")
print(measured_on(result))

# %%
less = {arm: control.mean - sample.mean for arm, sample in losses.items()}
p_of = {arm: p_difference(sample, control) for arm, sample in losses.items() if arm != "control"}
for arm in ("first values", "mirror tables", "backout", "x0", "U-net"):
    assert p_of[arm] < 0.05 / len(p_of), arm  # among so many
assert 0.11 < less["first values"] < 0.12 and 0.055 < less["mirror tables"] < 0.07
assert (
    0.03 < less["backout"] < 0.04
    and 0.03 < less["x0"] < 0.04
    and 0.015 < less["gated tables"] < 0.03
)
assert (
    0.05 < -less["U-net"] < 0.065
    and 0.015 < -less["smear"] < 0.023
    and abs(less["one skip"]) < 0.01
)
assert 0.03 < less["all plumbing"] < 0.045 and 0.1 < -less["no norm of the embedding"] < 0.12
table_size = 50_257 * 384 / 1e6
assert round(4 * table_size) == 77 and round(5 * table_size) == 96
print(f"among {len(p_of)} arms, one in twenty of luck is p = {0.05 / len(p_of):.3f} each")

# %% [markdown]
# One wire stands out. The first layer's values save 0.115, three times what any other does but the tables, and they have seven numbers. The tables save half of that with 77 million, the gated ones at both ends a fifth with 96. They begin with almost nothing and learn a row only when its token comes, while the first layer's values are made of what is learned anyway. A contest run reads fifty times as many tokens, and there the tables won. (Here they train at the rate of all else, which nobody tuned for them.)
#
# The embedding for every layer and backout save 0.035 each. One skip does nothing. Mirrored skips *cost* 0.06, smear costs 0.02. And everything that record 55 had at once is worth 0.038, no more than one of its parts alone. Nine seeds of the control have a deviation of 0.012, so three runs show differences from about 0.025 on, and nothing below.
#
# So much for the order. What did the weights become?

# %% tags=["hide-input"] mystnb={"image": {"alt": "Learned weights over 600 steps: the stream's and the embedding's for each of eight layers, those of the first layer's values, and of skips"}}
import matplotlib.pyplot as plt

from speedrun.config import config_from_json, switches_of
from speedrun.lab.results import figure_style

figure_style()


def learned(arm: str, seed: int = 0) -> tuple[GPT, dict[str, list]]:
    """A model of an arm with the weights that mix as they were at the end of a run, and their values over the run."""
    run = arms[arm][seed]
    config, told = config_from_json(run["config"]), run["learned"]
    model = GPT(config.model, 288, switches=switches_of(config)).double()
    with torch.no_grad():
        for name, values in told.items():
            model.get_parameter(name).copy_(torch.tensor(values[-1][1]))
    return model, told


# %% tags=["hide-input"] mystnb={"image": {"alt": "Learned weights over 600 steps: the stream's and the embedding's for each of eight layers, those of the first layer's values, and of skips"}}
SHOWN = {
    "x0_weight": "x0",
    "stream_weight": "x0",
    "value_mix": "first values",
    "skip_weight": "U-net",
}
fig, axes = plt.subplots(1, 4, figsize=(9.6, 3.1), layout="constrained")
for axis, (name, arm) in zip(axes, SHOWN.items()):
    model, told = learned(arm)
    for n, layer in enumerate(model.banks[name]):
        steps, values = zip(*((step, all_of[n]) for step, all_of in told[name]))
        axis.plot(steps, values, color=plt.cm.viridis(layer / 7.5))
        axis.annotate(f" {layer}", (steps[-1], values[-1]), fontsize=7, va="center")
    axis.set_title(f"{name} ({arm})", loc="left", fontsize=9)
    axis.set_xlabel("step")
fig.suptitle(
    "early layers take the embedding in, late ones take it out and the first layer's values for their own"
)
plt.show()

# %%
final = {
    name: torch.tensor(told[-1][1])
    for arm in SHOWN.values()
    for name, told in learned(arm)[1].items()
}
assert final["x0_weight"].diff().max() < 0 and final["x0_weight"][0] > 1 > 0 > final["x0_weight"][5]
assert final["stream_weight"][0] > 1.9 and 0.2 < final["stream_weight"][1] < 0.3
assert final["value_mix"][0] < 0.1 and final["value_mix"][3:].min() > 0.85
assert final["skip_weight"].max() < 0.65
ends = {
    arm: sum(learned(arm, n)[1][name][-1][1][0] for n in range(3)) / 3
    for arm, name in (("backout", "backout_weight"), ("smear", "smear_weight"))
}
one_skip = torch.tensor(learned("one skip")[1]["skip_weight"][-1][1]).sigmoid().item()
assert 0.08 < one_skip < 0.1
print(
    {name: f"{value:.2f}" for name, value in ends.items()}, f"one skip, from 0.18: {one_skip:.2f}"
)

# %% [markdown]
# Both signs, is the answer to the prediction's last question. `x0_weight` falls from layer to layer: early ones add the embedding, the last three subtract it. The second layer turns its stream down to a quarter, and with it what the first layer wrote. (In the first layer stream and embedding are the same vector, two weights with one job.) The values of the later half go over to the first layer's whole: a weight near one leaves $1-\lambda$ of nothing for their own. And every skip shrinks. A model that is given one doubles what it hears of early layers, and then spends its steps on undoing that.
#
# Here are the triangles, as records began them and as the embedding's weights were learned:

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four lower triangles of what each layer and the head hear of the embedding and of each layer's write: at the start of record 11 and of record 45, learned with the embedding's weights, and learned with mirrored skips"}}
from matplotlib.colors import LogNorm


def heard_by(model: GPT) -> Tensor:
    """The triangle, each row less a factor, so that its newest entry is one."""
    matrix = triangle(model)
    return matrix / matrix.diagonal()[:, None]


shown = {
    f"{name}, start": heard_by(model_of(start[name], 8)) for name in ("record 11", "record 45")
}
shown |= {f"{arm}, learned": heard_by(learned(arm)[0]) for arm in ("x0", "U-net")}
fig, axes = plt.subplots(1, 4, figsize=(9.6, 2.9), layout="constrained", sharey=True)
for axis, (title, rows) in zip(axes, shown.items()):
    hidden = torch.ones_like(rows).triu(1).bool()
    image = axis.imshow(
        rows.masked_fill(hidden, float("nan")), cmap="coolwarm", norm=LogNorm(1 / 6, 6)
    )
    axis.set_title(title, loc="left", fontsize=9)
    axis.set_xticks([0, 1, 8], ["emb.", "0", "7"])
    axis.set_xlabel("hears of")
    axis.grid(False)
axes[0].set_yticks([0, 4, 8], ["layer 0", "layer 4", "head"])
bar = fig.colorbar(image, ax=axes, label="against its newest", ticks=[1 / 4, 1, 4], format="%.2g")
bar.ax.minorticks_off()
fig.suptitle(
    "the embedding is heard less and less with depth, and the first layer's write hardly at all"
)
plt.show()

# %%
embedding, first = shown["x0, learned"][1:, 0], shown["x0, learned"][2:, 1]
assert embedding[0] > 5 and embedding[-1] < 0.9 and embedding[:-1].diff().max() < 0
assert first.max() < 0.25
print("embedding, by layer from the second on:", [f"{x:.1f}" for x in embedding.tolist()])
print("the first layer's write:", [f"{x:.2f}" for x in first.tolist()])

# %% [markdown]
# GPT-2's column of ones would have been the embedding in every layer as loud as everything else. Given the choice, this model hears it six times as loud as the rest in its second layer, and less than anything in its last. That is one function in four disguises: $b_\ell$ here, 1.1 and backout in record 45, a weight of $1-\lambda$ for the first layer's values. Attach any one, and much of what the others could do is done; the sum of the gains is not the gain of the sum.
#
# ## What it buys
#
# In the public logs, what the first cell prints; each with other changes in the same record. Where an author took one away: without its last skip the model loses 0.0025, without gates on the tables some 0.003 {cite}`moddednanogpt`. The value residual was published soon after record 9 {cite}`zhou2024`, and a full triangle of learned weights, one for each layer and write, earlier that year {cite}`pagliardini2024`.
#
# ## What it costs, and when it fails
#
# Hardly any arithmetic, and a per cent or five of time here, most of it for reading and writing streams. A table has to be stored, and updated: Adam moves 24 bytes for each of its numbers ([chapter 20](20_many_gpus.py)).

# %%
numbers = 12 * 50_257 * 768
update_ms = 24 * numbers / 3.0e12 * 1000
row_bytes = 12 * 768 * 2
extra = {arm: seconds[arm] / seconds["control"] - 1 for arm in WIRES}
assert 3.6 < update_ms < 3.8 and row_bytes == 18_432
assert max(extra.values()) < 0.06 and extra["gated tables"] > extra["first values"] < 0.02
print(f"twelve tables: {row_bytes:,} bytes a token, and {update_ms:.1f} ms an update at 3 TB/s")

# %% [markdown]
# Record 14's twelve took three and a half milliseconds of updating, unless GPUs share it, in steps of 150. In a step of record 89, which takes about 50, they would not have fitted.
#
# It fails where a wire begins too loud. Mirrored skips start at one because record 11 started them there; from 0.18, in one pair, they do no harm. It fails, too, when rates are not asked: the weights that mix are trained here at the rate of the embedding, some of record 9's had a fifteenth of it. And all of it was measured for 600 steps. [Chapter 05](05_modern_block.py) has examples of what is left of such differences after 2,000.
#
# Taking a layer's attention or its MLP away costs 0.013 and 0.024 here, and saves four per cent of the time. In the record, which has other kernels, losing a first MLP bought 0.84 seconds of 164.
#
# ## What did not work
#
# The contest's list: gates that see the embedding and not the stream gained nothing; the embedding's weights from 0.5 on made no difference; normed tables, tables of a larger or smaller spread, tables for frequent tokens only were worse. Two residual streams, one for attention and one for MLPs, came with record 73 and went with record 77, which lets the last three layers hear layer 7 in place of the newest {cite}`moddednanogpt`. That is a triangle, too.
#
# ## Exercises
#
# 1. At its start record 11's head hears the embedding seven times in 12 layers. Write `head_hears(layers)`: the head's row of mirrored skips with weights of one, for any number of layers, without running anything.


# %% tags=["solution"]
def head_hears(layers: int) -> list[int]:
    """One for itself, and one for every early output that comes again and holds it."""
    again = layers // 2
    return [1 + again] + [1 + max(0, again - n) for n in range(layers)]


# %%
for layers in (2, 5, 8, 12):
    model = model_of(PlanOptions(skips="unet"), layers)
    assert head_hears(layers) == triangle(model)[-1].tolist()
print(head_hears(8))

# %% [markdown]
# 2. The stream's weights can be had without them. Write `absorbed(a, b)`: for learned `stream_weight` and `x0_weight`, both (layers,), the embedding's weights of an equal model whose stream's weights are all one, and the factors by which its layers' writing matrices shrink.


# %% tags=["solution"]
def absorbed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Divide the whole stream by all that it has been multiplied by."""
    total = a.cumprod(0)
    return b / total, 1 / total


# %%
model, other = model_of(PlanOptions(x0=True)), model_of(PlanOptions(x0=True))
with torch.no_grad():
    model.stream_weight.uniform_(0.7, 1.4)
    model.x0_weight.uniform_(-0.2, 0.2)
    weight, shrinks = absorbed(model.stream_weight, model.x0_weight)
    other.x0_weight.copy_(weight)
    for name in ("attention_out", "mlp_down"):
        other.get_parameter(name).mul_(shrinks[:, None, None])
assert torch.allclose(model(tokens), other(tokens), atol=1e-3)
print("the same logits, with a weight less for each layer")

# %% [markdown]
# ## Since then
#
# Record 89 has all of it, and has made most of it depend on the token. Its embedding's weights are no numbers but functions of the embedding (record 85). A table of pairs of tokens is added to every layer's stream since record 62, the largest gain of the contest's second year. And the triangle's last rows are learned whole, for each token anew: multiway connections, record 81.
