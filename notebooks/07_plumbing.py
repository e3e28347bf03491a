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
# # Residual wiring: which layer hears what
#
# ```{admonition} Cost box
# About ten seconds on two CPU cores; within three minutes on one GPU. The comparisons took half an hour of training on H100s and another on two CPU cores, and are committed.
# Record 9: \@Grad62304977, \@kellerjordan0. Record 11: \@brendanh0gan. Record 14: \@KoszarskyB. Records 15 to 17: \@leloykun, \@YouJiacheng. Record 30: \@EmelyanenkoK. Record 32: \@bernard24 and hiverge.ai. Records 34, 40 (after an idea of \@snimu's), 45, 55: \@classiclarryd. Records 63, 70: \@photon_mz. Record 65: \@varunneal.
# ```
#
# ## The problem
#
# Record 9 took **156 seconds** off 648, and hardly a matrix changed. Each layer got two numbers that say how much of the stream and how much of the embedding it receives, and one more for how much of the first layer's values. For the next year the contest rewired the same model. Skips between mirrored layers came with record 11, their weights were passed through a sigmoid in record 32, and in record 45 all but one of them went. The first layer's values gave way to a table for every layer, 463 million parameters, then to six tables, to three, and to five.

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
from speedrun.lab.results import public_table

ladder = {int(row["record"]): row for row in public_table("records")}
times = {n: float(row["record_time_s"]) for n, row in ladder.items()}
shares = {n: 1 - times[n] / times[n - 1] for n in range(22, 90)}
assert max(shares, key=shares.get) == 62 and f"{shares[62]:.1%}" == "5.3%"
seconds = {n: float(ladder[n]["record_time_s"]) for n in ladder if 7 < n < 71}
gained = {n: seconds[n - 1] - seconds[n] for n in (9, 11, 14, 15, 17, 34, 40, 45, 55, 63)}
assert gained[9] == 156 and seconds[8] == 648 and 12 * 50_257 * 768 // 10**6 == 463
print({f"record {n}": f"{s:.1f} s, {s / seconds[n - 1]:.1%}" for n, s in gained.items()})

# %% [markdown]
# Each gain is for all that its record changed. Record 9's folder also has a chain of single runs of 3,200 steps, each with one change more than the last. The loss fell by 0.0123 with the first layer's values, 0.0086 with learned weights for them, 0.0093 with the embedding for every layer, 0.0128 with a ramp of Muon's momentum ([chapter 13](13_muon.py)), 0.0053 with a cap on logits ([chapter 08](08_logits.py)) {cite}`moddednanogpt`. So five eighths of that fall came from wires, as far as single runs can tell.
#
# ```{admonition} Prediction
# Take the model of the last two chapters and add one wire. **(a)** Every layer hears the embedding again. **(b)** Late layers hear the outputs of early ones. **(c)** Each token brings vectors of its own to attention's values, from tables, each shared by a first and a last layer. **(d)** Half of the stream after three quarters of the layers is taken out before the head. Order them by the loss they save. And the weights of (a) begin at zero: **do they become positive or negative?**
# ```
#
# ## The idea
#
# A layer adds what it writes to the stream. Let $w_0$ be the embedding's vector and $w_k$ what the $k$-th layer writes. (Only this section counts layers from 1; all that follows counts from 0.) Then what layer $\ell$ hears, and what the head hears at the end, are sums
#
# $$
# x_\ell = \sum_{k < \ell} C_{\ell k}\, w_k .
# $$
#
# In GPT-2 every $C_{\ell k}$ is one. What is done to the stream puts other numbers into this lower triangle. Attention and the head norm what they hear, so for them a row counts only up to a factor. (An MLP hears its own layer's attention besides. If a row is scaled, that layer's writing matrices have to be scaled with it, and its column divided; then nothing has changed.) Values and smear are wires beside the triangle, and gates make a number depend on the token.
#
# **The embedding again.** Record 9 lets layer $\ell$ begin with $x \leftarrow a_\ell x + b_\ell w_0$ (the contest calls $w_0$ x0). It fills the column of the embedding with anything, and multiplies all that came before by $a_\ell$. If all $a_\ell$ are $a$ and all $b_\ell$ zero, row $\ell$ is $a^\ell, a^{\ell-1}, \dots, a$: if $a$ exceeds one, what was written earlier counts for more. A model whose writing matrices are divided by $a$, once more in each layer, is the same function. So the $a_\ell$ add nothing that the matrices could not do. The $b_\ell$ do. Scaling what is written changes it for all later layers by one factor. So without $b_\ell$ all layers hear the embedding and the first layer's write in one proportion; with them each layer has its own.
#
# **Skips.** Record 11 (U-net in the tables below) adds the output of layer $\ell$ to the input of layer $L+1-\ell$, after the U-shaped networks of image models. There the middle is narrow, and skips carry what does not fit through it. Here the middle is as wide as the ends. A skip adds an output that already contains all earlier writes, so late layers receive early writes several times over.
#
# **Taking out.** Record 40 (backout) subtracts half of the stream as it was after nine of twelve layers, just before the head. For the head alone, early writes count half. That goes in the other direction: late layers should hear more of what early ones wrote, and the head less.
#
# **Values.** Attention moves values from token to token, and a value is a matrix times what the layer hears. In the first layer that is the embedding, so a value is a function of its token alone; it could stand in a table. Record 9 mixes the first layer's values into every other's: the *value residual* {cite}`zhou2024`. Record 14 lets the table learn for itself, one for each layer (*value embeddings*): no product, any vector for any token.
#
# **Gates.** Record 55 multiplies a table's vector by $2\sigma(W x)$ for each head, where $W$ sees twelve numbers of $x$ and begins at zero, the gate at one.
#
# **Smear.** Record 34 adds to each token's embedding a little of the one before, so that the first layer knows pairs.
#
# **Leaving out.** Record 17 took attention out of the eighth of twelve layers, record 30 the MLP out of the first.
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

from speedrun.lab.bounds import NonNegativeFloat, PositiveFloat

GATE_CHANNELS = 12  # how many of a vector's numbers a gate looks at
Value = int | Literal["first"] | None


@dataclass(frozen=True)
class EmbeddingConfig:
    """What a token brings into the model. The defaults are GPT-2's."""

    norm: bool = False
    """RMS norm behind the lookup, so that only a vector's direction counts."""
    std: NonNegativeFloat = 0.0
    """Deviation of the first vectors; 0: model.init_std."""
    lr_mul: PositiveFloat = 1.0
    """The embedding's learning rate as a multiple of optim.adam.lr."""
    smear: bool = False
    """Each token's vector gets a little of the one before, through a gate."""
    values: Literal["none", "first", "all", "mirror", "outer", "ends"] = "none"
    """What is mixed into attention's values: the first layer's, or rows of tables. all: a table a layer. mirror: one for first and last, and so on. outer: three, for the first and the last three layers. ends: five, for the first two and the last three."""
    value_residual: Literal["lambda", "lambdas", "gate"] = "lambda"
    """lambda: two learned weights that add up to 1, from halves. lambdas: two. gate: 1 for the values, and a gate for every token and head."""
    value_std: NonNegativeFloat = 0.01
    """Deviation of the tables' first entries; record 70's is 0.01, record 14's was 1."""
    value_lr_mul: PositiveFloat = 1.0
    """The tables' learning rate as a multiple of optim.adam.lr."""
    value_decay: NonNegativeFloat = 1.0
    """The tables' weight decay as a multiple of optim.adam.weight_decay."""


# %%
#| export
def value_table_layout(layers: int, kind: str) -> list[Value]:
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
twelve = {kind: value_table_layout(12, kind) for kind in ("mirror", "outer", "ends")}
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
    """A number between 0 and 2 for every vector of x, (…, width); with a weight of (heads, GATE_CHANNELS), and not (GATE_CHANNELS,), one a head."""
    return 2 * torch.sigmoid(F.linear(x[..., :GATE_CHANNELS], weight))


def apply_smear(x: Tensor, weights: Mapping[str, Any]) -> Tensor:
    """x, (batch, tokens, width), with a share of every vector added to the next one."""
    share = weights["smear_lambda"] * gate(x[:, 1:], weights["smear_gate"]) / 2
    return torch.cat([x[:, :1], x[:, 1:] + share[..., None] * x[:, :-1]], 1)


# %%
#| export
def lookup_value_embeds(inputs: Tensor, table: Tensor, tables: int) -> tuple[Tensor, ...]:
    """Rows of value tables that stand on top of each other, in one gather: (batch, tokens, width) of each."""
    begins = len(table) // tables * torch.arange(tables, device=inputs.device)
    return F.embedding(inputs[..., None] + begins, table).unbind(-2)


def add_value_embed(
    v: Tensor, ve: Tensor, x: Tensor, weights: Mapping[str, Tensor], kind: str
) -> Tensor:
    """Attention's values, (batch, heads, tokens, head_dim), with others mixed in. x: (batch, tokens, width), what attention reads."""
    if kind == "gate":
        return v + gate(x, weights["ve_gate"]).mT[..., None] * ve
    weight = weights["ve_lambdas"]
    own, others = (1 - weight, weight) if kind == "lambda" else weight.unbind()
    return own * v + others * ve


# %%
x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
none = {"smear_lambda": torch.zeros(1), "smear_gate": torch.zeros(GATE_CHANNELS)}
assert torch.equal(apply_smear(x, none), x) and torch.equal(
    gate(x, none["smear_gate"]), torch.ones(2, 5)
)
half = apply_smear(x, none | {"smear_lambda": torch.ones(1)})
assert torch.equal(half[:, 0], x[:, 0]) and torch.equal(half[:, 3], x[:, 3] + x[:, 2] / 2)
tables = torch.arange(12.0)[:, None].expand(12, 4)  # three tables of four words
rows = lookup_value_embeds(torch.tensor([[0, 3]]), tables, 3)
assert [row[0, :, 0].tolist() for row in rows] == [[0, 3], [4, 7], [8, 11]]
print("smear and gates begin as if they were not there")

# %% [markdown]
# The tables stand on top of each other and are read in one gather, as since record 65.
#
# ### The layout of the layers
#
# What each layer has is a row of a table, the model's layout, and no `if` in the forward pass asks for a layer's number.

# %%
#| default_exp model.layout
#| export
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from speedrun.lab.bounds import NonNegativeFloat, PositiveFloat
from speedrun.params import ParamSpec


@dataclass(frozen=True)
class LayoutConfig:
    """How the stream runs through the layers. The defaults are GPT-2's."""

    x0: bool = False
    """Before each layer the stream is mixed with x0, what the embedding gave; both weights are learned, x0's from 0."""
    resid_lambda_init: NonNegativeFloat = 1.0
    """x0: what the stream's own weights, resid_lambdas, begin with."""
    skips: Literal["none", "unet", "unet_sigmoid", "single", "single_gated"] = "none"
    """Outputs of early layers that late ones get as well. unet: layer i to layer L-1-i, weights from 1. unet_sigmoid: the same, sigmoids of weights from -1.5. single: one skip, to the second layer of the later half. single_gated: times a gate for every token."""
    backout: bool = False
    """A share of the stream as it was after three quarters of the layers is taken out at the end; learned, from 0.5."""
    skip_sublayers: Literal["none", "attn", "mlp", "both"] = "none"
    """attn: attention is skipped in the second layer of the later half. mlp: the MLP is skipped in the first. both: both."""
    lr_mul: PositiveFloat = 1.0
    """The learning rate of all weights that mix, as a multiple of optim.adam.lr."""
    stream_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the residual stream; bfloat16: from the embedding on."""


@dataclass(frozen=True)
class LayerSpec:
    """A row of the layout: what one layer is made of."""

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
    if kind in ("single", "single_gated"):
        return {min(half + 1, layers - 1): min(layers // 3, half - 1)}
    return pairs if kind != "none" else {}


def make_layout(
    layers: int, options: LayoutConfig, embedding: EmbeddingConfig
) -> tuple[LayerSpec, ...]:
    """One row for each layer."""
    skips, values = skip_pairs(layers, options.skips), value_table_layout(layers, embedding.values)
    no_attn = (
        min(layers // 2 + 1, layers - 1) if options.skip_sublayers in ("attn", "both") else None
    )
    no_mlp = 0 if options.skip_sublayers in ("mlp", "both") else None
    if no_attn is not None:
        values[no_attn] = None
    used = sorted({value for value in values if isinstance(value, int)})
    values = [used.index(value) if isinstance(value, int) else value for value in values]
    return tuple(
        LayerSpec(n != no_attn, n != no_mlp, skips.get(n), values[n]) for n in range(layers)
    )


def num_value_tables(layout: Sequence[LayerSpec]) -> int:
    """How many value tables a layout needs."""
    return len({spec.value for spec in layout if isinstance(spec.value, int)})


# %%
def drawn(layout: Sequence[LayerSpec]) -> list[str]:
    """A layout, a line a layer."""
    said = {"attention": lambda on: "attn" * on, "mlp": lambda on: "mlp" * on}
    said |= dict.fromkeys(("skip", "value"), lambda n: "" if n is None else str(n))
    return [" ".join(f"{said[f](getattr(spec, f)):5}" for f in said) for spec in layout]


seventeen = make_layout(
    12, LayoutConfig(skips="unet", skip_sublayers="attn"), EmbeddingConfig(values="outer")
)
assert [n for n, spec in enumerate(seventeen) if not spec.attention] == [7]
assert seventeen[6].skip == 5 and seventeen[11].skip == 0 and seventeen[5].skip is None
assert make_layout(12, LayoutConfig(skips="single"), EmbeddingConfig())[7].skip == 4, "record 45"
print("record 17, from the first layer to the last: attention, MLP, skip from, value table")
print("\n".join(f"{n:2} {line}" for n, line in enumerate(drawn(seventeen))))

# %% [markdown]
# The weights that mix are rows of [the model's](21_model.py) parameter table, banks with a number for each layer that has one. They begin so that a wire is there or not, as its record had it.


# %%
#| export
def scalar_specs(
    layout: Sequence[LayerSpec], heads: int, config: LayoutConfig, embedding: EmbeddingConfig
) -> list[ParamSpec]:
    """All weights by which vectors are mixed."""
    skipping = tuple(n for n, spec in enumerate(layout) if spec.skip is not None)
    valued = tuple(n for n, spec in enumerate(layout) if spec.value is not None)
    everyone = tuple(range(len(layout)))
    row: Any = partial(ParamSpec, lr_mul=config.lr_mul, is_scalar=True)
    specs = (
        [row("smear_lambda", (1,)), row("smear_gate", (GATE_CHANNELS,))] if embedding.smear else []
    )
    if config.x0:
        specs.append(
            row("resid_lambdas", (len(layout),), everyone, init_mean=config.resid_lambda_init)
        )
        specs.append(row("x0_lambdas", (len(layout),), everyone))
    if skipping:
        mean = 1.0 if config.skips == "unet" else -1.5
        specs.append(row("skip_lambdas", (len(skipping),), skipping, init_mean=mean))
    if config.skips == "single_gated":
        specs.append(row("skip_gate", (1, GATE_CHANNELS), skipping))
    if valued and embedding.value_residual == "gate":
        specs.append(row("ve_gate", (len(valued), heads, GATE_CHANNELS), valued))
    elif valued:
        shape = (len(valued),) if embedding.value_residual == "lambda" else (len(valued), 2)
        specs.append(row("ve_lambdas", shape, valued, init_mean=0.5))
    if config.backout:
        specs.append(row("backout_lambda", (1,), init_mean=0.5))
    return specs


# %%
#| export
def mix_residual(
    x: Tensor, x0: Tensor, skip: Tensor | None, weights: Mapping[str, Tensor], skips: str
) -> Tensor:
    """What a layer gets, (batch, tokens, width): the stream, with an earlier layer's output (skip) and x0 mixed in."""
    if skip is not None:
        weight = weights["skip_lambdas"]
        weight = weight if skips == "unet" else torch.sigmoid(weight)
        if skips == "single_gated":
            weight = weight * gate(x0, weights["skip_gate"])[..., None]
        x = x + weight * skip
    if "x0_lambdas" in weights:
        x = weights["resid_lambdas"] * x + weights["x0_lambdas"] * x0
    return x


def backout_layer(layers: int) -> int:
    """The layer behind which three quarters of the layers are over: a share of its output is taken out at the end."""
    return min(2 * layers // 3, layers - 2)


def apply_backout(x: Tensor, early: Tensor, weights: Mapping[str, Any]) -> Tensor:
    """What the final norm gets: the stream, less a share of what it was behind `backout_layer` (early)."""
    return x - weights["backout_lambda"] * early


# %% [markdown]
# ### The triangle
#
# Both functions only add and multiply by numbers. So they can be asked for $C$ themselves: let each write be a unit vector.

# %%
from speedrun.model.gpt import GPT, GPTConfig, weights_of_layers
from speedrun.model.mlp import BlockConfig
from speedrun.model.rotary import RotaryConfig


def triangle(model) -> Tensor:
    """What each layer, and then the head, hears: (layers + 1, layers + 1), columns: the embedding, then the layers' writes."""
    unit = torch.eye(len(model.layout) + 1, dtype=torch.float64)
    x = x0 = unit[0]
    heard, outputs = [], []
    for n, (spec, weights) in enumerate(zip(model.layout, weights_of_layers(model))):
        skip = None if spec.skip is None else outputs[spec.skip]
        x = mix_residual(x, x0, skip, weights, model.config.layout.skips)
        heard.append(x)
        x = x + unit[n + 1]
        outputs.append(x)
    if model.config.layout.backout:
        x = apply_backout(x, outputs[backout_layer(len(outputs))], model._parameters)
    return torch.stack([*heard, x]).detach()


# %%
from dataclasses import replace


def model_of(layout: LayoutConfig, layers: int = 12, width: int = 24, std: float = 0.3) -> GPT:
    """A small model with a layout, and noise in its matrices."""
    shape = GPTConfig(num_layers=layers, num_heads=2, model_dim=width, max_seq_len=16, init_std=std)
    block = BlockConfig(norm="rms", biases=False)
    config = replace(shape, block=block, rotary=RotaryConfig("rope"), layout=layout)
    return GPT(config, 50).double()


# %%
start = {"GPT-2": LayoutConfig()}
start["record 11"] = LayoutConfig(x0=True, skips="unet")
start["record 45"] = LayoutConfig(x0=True, resid_lambda_init=1.1, skips="single", backout=True)
triangles = {name: triangle(model_of(layout)) for name, layout in start.items()}
assert torch.equal(triangles["GPT-2"], torch.ones(13, 13).tril())
mirrored, refined = triangles["record 11"], triangles["record 45"]
assert mirrored[-1].tolist() == [7, 7, 6, 5, 4, 3, 2, *[1] * 6]
powers = 1.1 ** torch.arange(7, 0, -1, dtype=torch.float64)
assert torch.allclose(refined[6, :7], powers)
for name, matrix in triangles.items():
    print(f"{name}, the head: {(matrix[-1] / matrix[-1, -1]).round(decimals=1).tolist()}")

# %% [markdown]
# One entry per write, oldest first, less a factor. At its start record 11's head hears the embedding and the first layer seven times, and each of the last six once. Record 45's hears them twice as loud as the last; fainter than the last are only two, the latest that backout halves. How much of this could matrices do as well? The $a_\ell$ whole, and that can be tested. Divide the stream by all that it has been multiplied by, and the writing matrices with it:


# %%
def absorbed(model: GPT) -> GPT:
    """An equal model whose stream's weights are all one."""
    other = GPT(model.config, model.vocab_size)
    other = other.to(model.resid_lambdas)  # its device, and float64
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        total = model.resid_lambdas.cumprod(0)
        other.resid_lambdas.fill_(1.0)
        other.x0_lambdas.copy_(model.x0_lambdas / total)
        for name in ("attention_out", "mlp_down"):
            other.get_parameter(name).div_(total[:, None, None])
    return other


draw = torch.Generator().manual_seed(1)
model = model_of(LayoutConfig(x0=True))
with torch.no_grad():
    model.resid_lambdas.uniform_(0.7, 1.4, generator=draw)
    model.x0_lambdas.uniform_(-0.2, 0.2, generator=draw)
tokens, model = torch.randint(50, (3, 16), generator=draw).to(tier.device), model.to(tier.device)
fresh = model_of(LayoutConfig(x0=True)).to(tier.device)
assert torch.allclose(model(tokens), absorbed(model)(tokens), atol=1e-3)
assert not torch.allclose(model(tokens), fresh(tokens), atol=0.1)
assert [round(refined[-1, n].item() / refined[-1, -1].item(), 1) for n in (1, 2)] == [2.0, 1.9]
print(f"the same logits, with a weight less a layer; 1.1^11 is {1.1**11:.1f}, 1.1^10 {1.1**10:.1f}")

# %% [markdown]
# (Norms add a millionth to what they divide by, hence the tolerance.) Record 45's 1.1 is worth 0.001 by its author's count. Alone it lets the first layer's write reach the head 2.9 times as large as the last one's. In record 45, with its skip and with backout, that is 2.0 at the start, as printed above (1.9 for its second layer, since its first block was empty). Under Muon, whose steps have a size of their own, 1.1 is a rate of the writing matrices that falls by a tenth from layer to layer.
#
# And the first layer's values are a table, without having been stored as one:

# %%
from speedrun.model.mlp import linear, rms_norm

plain = model_of(LayoutConfig()).to(tier.device)
with torch.no_grad():
    weights = weights_of_layers(plain)[0]
    stream = F.embedding(tokens, plain.embed)
    values = linear(rms_norm(stream), weights, "attention_qkv")[..., -24:]
    table = rms_norm(plain.embed) @ weights["attention_qkv"][-24:].mT
assert torch.allclose(values, table[tokens])
print(f"values of the first layer: rows of a table of {len(table)} words")

# %% [markdown]
# ## The measurement
#
# On a GPU, one wire at a time is added to a model of 8 layers and a width of 384, with chapter 05's block, chapter 06's half-truncated positions, one matrix for embedding and head, no cap, and a norm behind the embedding. A run is 600 steps of 32,768 tokens, some 20 seconds. All runs read the same text in the same order; seeds differ in first weights, so a $p$ here speaks of those and not of another text. All have one pair of rates, the best of [chapter 05](05_modern_block.py)'s grid, whose four neighbours are worse. A wire may still gain by doing what another rate would do.
#
# Only tables were given a start and rates of their own. All but the gated ones are mirrored, four tables for eight layers. “Mirror tables” begin at record 70's deviation of 0.01 and train like the rest. “Record 14's tables” begin with a deviation of one and train at 75 times the rate, as that record's did (one for each layer, there). With them and with four times the rate, AdamW's decay is off in the whole model, and “no decay” is the control with that.

# %%
import statistics

from speedrun.lab.results import load_result, measured_on
from speedrun.lab.stats import compare_line, describe, p_difference, p_text, study_of

result = load_result("architecture", "corpus")
arms = result["data"]["arms"]
losses = {arm: [run["val_loss"] for run in runs] for arm, runs in arms.items()}
study = study_of({arm: all_of for arm, all_of in losses.items() if "two matrices" not in arm})
seconds = {arm: statistics.median(run["seconds"] for run in runs) for arm, runs in arms.items()}
SKIPS = ("U-net", "skips from 0.18", "one skip")
TABLES = ("mirror tables", "tables, four times the rate", "record 14's tables", "gated tables")
WIRES = ("first values", "x0 and first values", *TABLES, "x0", "backout", *SKIPS, "smear")
LESS = ("one layer without attention", "one layer without MLP")
OTHERS = ("all plumbing", "no norm of the embedding", *LESS, "no decay")
print(f"{'control':36} {study.samples['control']}")
for arm in (*WIRES, *OTHERS):
    print(f"{study.line(arm)}  time {seconds[arm] / seconds['control'] - 1:+.0%}")
print(f"one deviation for {len(study.p_values)} arms: {study.pooled_sd:.4f}; arms n=3")
print(measured_on(result))

# %%
gain, sure = {arm: -study.delta(arm) for arm in study.p_values}, 0.003
for arm in ("first values", *TABLES[:3], "backout", "x0", "U-net", "no norm of the embedding"):
    assert study.p_values[arm] < sure, arm
assert 0.11 < gain["first values"] < 0.12 < gain["x0 and first values"] < 0.13
assert [round(gain[arm], 2) for arm in TABLES] == [0.06, 0.08, 0.1, 0.02]
assert 0.03 < gain["x0"] < gain["backout"] < 0.036 and study.pairwise_p("x0", "backout") > 0.5
assert 0.055 < -gain["U-net"] < 0.065 and 0.02 < -gain["skips from 0.18"] < 0.025
assert abs(gain["one skip"]) < 0.01 and abs(gain["no decay"]) < 0.005
assert 0.03 < gain["all plumbing"] < 0.04 and study.p_values["all plumbing"] < sure
assert 0.105 < -gain["no norm of the embedding"] < 0.115
assert all(0.09 < study.p_values[arm] < 0.16 for arm in ("gated tables", "smear", SKIPS[1]))
assert min(study.p_values[arm] for arm in ("one skip", LESS[0], "no decay")) > 0.5
assert 0.02 < study.p_values[LESS[1]] < 0.03 and round(4 * 50_257 * 384 / 1e6) == 77
print(f"p < 0.05 takes {study.detectable(3):.3f}, p < 0.01 {study.detectable(3, alpha=0.01):.3f}")
assert [round(study.detectable(3, alpha=alpha), 3) for alpha in (0.05, 0.01)] == [0.024, 0.028]

# %%
PAIRS = (("first values", TABLES[2]), ("first values", "x0 and first values"), (TABLES[2], TABLES[0]), (TABLES[0], "backout"), (TABLES[0], "x0"), SKIPS[:2])  # fmt: skip
between = {f"{a} / {b}": study.pairwise_p(a, b) for a, b in PAIRS}
assert [p > 0.1 for p in between.values()] == [True, True, False, False, False, False]
assert max(list(between.values())[2:]) < 0.01
by_seed = [
    [round(x - y, 3) for x, y in zip(losses[worse], losses[better])]
    for worse, better in ((TABLES[2], "first values"), ("first values", "x0 and first values"))
]
assert all(0.009 < min(steps) < max(steps) < 0.017 for steps in by_seed)
FIVE = ("gated tables", "x0", "one skip", "smear", "backout")
parts = sum(gain[arm] for arm in FIVE)
variance = sum(1 / study.samples[arm].n for arm in (*FIVE, "all plumbing"))
error = study.pooled_sd * (variance + 16 / study.samples["control"].n) ** 0.5
assert 0.055 < parts < 0.065 and parts - gain["all plumbing"] < 1.5 * error
more_tokens = int(ladder[14]["total_train_tokens"]) / (600 * 32_768)
assert 39 < more_tokens < 42
print({pair: p_text(p) for pair, p in between.items()})
print("the first two pairs by seed:", *by_seed)
apart = parts - gain["all plumbing"]
print(f"five wires apart: {parts:.3f}; at once {apart:.3f} less, standard error {error:.3f}")
print(f"record 14 read {more_tokens:.0f} times as many tokens; four tables hold 77 million")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Losses of each run of 35 arms less the control's mean, sorted, coloured by chapter, with a band in which three runs show nothing"}}
import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style

figure_style()
ELSEWHERE = {
    "05": ("GPT-2's block", "GPT-2's block, its rates", "no QK-norm", "GELU", "layer norms", "no zeros", "biases", "normal start"),
    "06": ("learned positions", "all pairs turn", "all pairs, base 10,000"),
    "08": ("30 tanh(z/30)", "15 tanh(z/15)", "30 sigmoid(z/7.5)", "23 sigmoid((z+5)/7.5)", "padded to 128", "chapter 20's optimizer", "split head"),
}  # fmt: skip
chapter_of = {arm: chapter for chapter, names in ELSEWHERE.items() for arm in names}
chapters = sorted({*ELSEWHERE, "07"})
ranked = sorted(study.p_values, key=study.delta)
assert set(chapter_of) <= set(ranked) and {a for a in ranked if a not in chapter_of} == {
    *WIRES,
    *OTHERS,
}
found = sum(p < 0.01 for p in study.p_values.values())
best = sum(study.p_values[arm] < 0.01 for arm in ranked if study.delta(arm) < 0)
fig, axis = plt.subplots(figsize=(7.6, 6.6), layout="constrained")
axis.axvspan(-study.detectable(3), study.detectable(3), color="0.5", alpha=0.15, lw=0)
for y, arm in enumerate(ranked):
    color = f"C{chapters.index(chapter_of.get(arm, '07'))}"
    dots = [loss - study.samples["control"].mean for loss in losses[arm]]
    axis.plot(dots, [y] * len(dots), "o", ms=4, color=color)
for n, chapter in enumerate(chapters):
    axis.plot([], [], "o", ms=4, color=f"C{n}", label=f"chapter {chapter}")
axis.axvline(0, color="0.5", lw=0.8)
axis.set_yticks(range(len(ranked)), ranked, fontsize=8)
axis.invert_yaxis()
axis.legend(loc="upper right")
axis.set_xlabel("loss of a run, less the control's mean (nats)")
axis.set_title(f"of {len(ranked)} changes {found} show at p < 0.01, and {best} of them are better")
plt.show()

# %% [markdown]
# The figure has all 35 arms with one matrix, of this chapter and those around it; in the grey, a mean of three shows nothing. The $p$ of the table are Dunnett's, for all of them ([chapter 01](01_are_you_faster.py)). Below 0.01 we call it found, below 0.05 a hint; gated tables, smear and four skips from 0.18 are neither, a first layer without MLP is a hint. The $p$ of pairs stand for themselves. All take arms for independent, though they share their seeds and those that differ little move together; between two such arms the printed $p$ is too large.
#
# So the order of the means is: (c), 0.061; (d) and (a), 0.034 and 0.031; and last (b), which *costs* 0.060. (c) is before the other two, $p = 0.007$ and 0.003; (d) and (a) cannot be told apart. Tables save 0.101 if they begin and train as record 14's did; that adds two thirds to what having them saves. What saves most was not asked for: the first layer's values, 0.113, with seven numbers. They are ahead of 77 million by 0.010 to 0.014 in each of three seeds. But a row of a table learns only when its token comes, and record 14 read forty times as many tokens. The embedding beside the first layer's values adds 0.014 to what they save alone ($p = 0.15$, and 0.011 to 0.016 in each of three seeds), as it added something in record 9's chain. And the norm behind the embedding, which came with record 8, is worth as much as the best wire.
#
# Of what mirrored skips cost, about two thirds go if they begin at 0.18 and behind a sigmoid, as in record 32; which of the two does it was not tried. One such skip does nothing that shows.
#
# “All plumbing” is five gated tables, the embedding with 1.1, one gated skip, smear and backout, about what record 63 had. At once they are worth 0.035, no more than x0 or backout alone. The five nearest single arms (x0 has 1.0 there, and the skip no gate) add up to 0.061; smear and the skip count as losses. So whether the whole is less than its parts these runs do not show.
#
# What did the weights become?

# %% tags=["hide-input"]
from speedrun.config import config_from_json


def learned(arm: str, seed: int = 0) -> tuple[GPT, dict[str, list]]:
    """A model of an arm with the weights that mix as they were at the end of a run, and their values over the run."""
    run = arms[arm][seed]
    config, told = config_from_json(run["config"]), run["learned"]
    model = GPT(config.model, 288).double()
    with torch.no_grad():
        for name, values in told.items():
            model.get_parameter(name).copy_(torch.tensor(values[-1][1]))
    return model, told


# %% tags=["hide-input"] mystnb={"image": {"alt": "Learned weights over 600 steps: the embedding's and the stream's for each of eight layers, those of the first layer's values, and of skips"}}
SHOWN = {
    "x0_lambdas": "x0",
    "resid_lambdas": "x0",
    "ve_lambdas": "first values",
    "skip_lambdas": "U-net",
}


def label_ends(axis, step: int, ends: dict[int, float], gap: float):
    """Each line's layer at its end, moved up where two would meet."""
    last = -float("inf")
    for layer, value in sorted(ends.items(), key=lambda end: end[1]):
        last = max(value, last + gap)
        axis.annotate(
            f" {layer}",
            (step, value),
            (step + 30, last),
            arrowprops={"arrowstyle": "-", "lw": 0.4},
            fontsize=7,
            va="center",
        )


fig, axes = plt.subplots(1, 4, figsize=(9.6, 3.1), layout="constrained")
for axis, (name, arm) in zip(axes, SHOWN.items()):
    model, told = learned(arm)
    owners, (steps, values) = model.banks[name], zip(*told[name])
    for n, layer in enumerate(owners):
        axis.plot(steps, [all_of[n] for all_of in values], color=plt.cm.viridis(layer / 9))
    low, high = axis.get_ylim()
    label_ends(axis, steps[-1], dict(zip(owners, values[-1])), (high - low) / 22)
    axis.set_title(f"{name} ({arm})", loc="left", fontsize=9)
    axis.set_xlabel("step")
fig.suptitle(
    "weights learned in 600 steps (seed 0; a number is a layer, from 0):\nx0's become negative in late layers, skips shrink"
)
plt.show()

# %% [markdown]
# One seed; a line's number is its layer, for skips the one that receives. In all three seeds:


# %%
def ends_of(arm: str, name: str) -> Tensor:
    """The last values of a weight that mixes, (seeds, its numbers)."""
    return torch.stack([torch.tensor(learned(arm, n)[1][name][-1][1]) for n in range(3)])


last = {(arm, name): ends_of(arm, name) for name, arm in SHOWN.items()}
b, a, mix, skip = last.values()
assert b.diff(dim=1).max() < 0 < 1 < b[:, 0].min() and b[:, 5:].max() < 0 < b[:, :4].min()
assert a[:, 0].min() > 1.5 and 0.2 < a[:, 1].min() < a[:, 1].max() < 0.3
assert 0.65 < mix[:, 3:].min() < mix[:, 3:].max() < 1.5 and mix[:, 0].max() < 0.5
backout, smear = ends_of("backout", "backout_lambda"), ends_of("smear", "smear_lambda")
one_skip = ends_of("one skip", "skip_lambdas").sigmoid()
assert (
    0.1 < skip.min() < skip.max() < 0.7
    and 0.65 < backout.mean() < 0.75
    and 0.65 < smear.mean() < 0.75
)
mirrored, large = (ends_of(arm, "ve_lambdas") for arm in ("mirror tables", "record 14's tables"))
assert (large[..., 1] < large[..., 0]).float().mean() > 0.7
own, tables = mirrored[:, 1:, 0], mirrored[:, 1:, 1]
assert (
    2.9 < tables.min()
    and 1.3 < own.min() < own.max() < 3.1
    and 1.4 < mirrored[:, 0, 1].mean() < 1.8
)
print(
    f"ve_lambdas: layer 1 {mix[:, 0].min():.2f} to {mix[:, 0].max():.2f}, layers 4 to 7 {mix[:, 3:].min():.2f} to {mix[:, 3:].max():.2f}"
)
print(f"resid_lambdas of layer 1: {a[:, 1].min():.2f} to {a[:, 1].max():.2f}")
print(
    f"mirrored skips {skip.min():.2f} to {skip.max():.2f}; one, from 0.18, {one_skip.min():.2f} to {one_skip.max():.2f}"
)
print(f"backout, from 0.5, {backout.mean():.2f}; smear, from 0, {smear.mean():.2f}")
print(
    f"mirrored tables from layer 1 on, from 0.5, {tables.min():.1f} to {tables.max():.1f}; own values {own.min():.1f} to {own.max():.1f}"
)

# %% [markdown]
# The weights become both: the early ones positive, the late ones negative. `x0_lambdas` falls from layer to layer: the first four add the embedding, the next does hardly anything, the last three subtract it. Layer 1 turns its stream down to a quarter, and with it what layer 0 wrote. (In layer 0 stream and embedding are the same vector: two weights with one job.) Layers 4 to 7 give the first layer's values a weight between two thirds and one and a half, and their own one minus that; layer 1's weight may be anything up to a half. Skips shrink and are not gone after 600 steps. Backout grows.
#
# Smear's weight grows to 0.70. Where its gate is undecided, that is 0.35 of the token before; in record 34 it ended near 0.07, and record 52 trained its gate's twelve numbers at a hundredth of the rate, and it at five times. Ours was not tuned. From layer 1 on the mirrored tables' weights rise from 0.5 to three and more. But so do the weights of the layers' own values, to between 1.4 and 3. From there on all values become larger, and the tables', which begin small, most of all. That is one arm: of record 14's tables, which begin large, most weights stay below the layers' own.

# %% [markdown]
# ### x0's sign with one matrix and with two
#
# An untrained model whose head is its embedding expects every token again ([chapter 08](08_logits.py)), and what it must learn first is to take a token's own vector out before the head. Late weights below zero work in that direction, and so does backout. Record 45's head was a matrix of its own, and the weights that its author gives for the trained model are all positive, from 1.5 to 6.5 {cite}`moddednanogpt`. So the same wires, with two matrices:

# %%
pair = {
    arm.removeprefix("two matrices, "): all_of
    for arm, all_of in losses.items()
    if "two matrices" in arm
}
two = study_of({name.replace("two matrices", "control"): all_of for name, all_of in pair.items()})
print(f"{'control, two matrices':36} {two.samples['control']}")
for name in ("x0", "backout", "first values", "no norm"):
    print(two.line(name))
print(f"deviation with two matrices {two.pooled_sd:.4f}, with one {study.pooled_sd:.4f}")
for wire in ("x0", "backout", "first values"):
    parts = ((study, (1 / 3 + 1 / 15) ** 0.5), (two, (2 / 3) ** 0.5))
    error = sum((of.pooled_sd * root) ** 2 for of, root in parts) ** 0.5
    z = (gain[wire] + two.delta(wire)) / error
    print(
        f"{wire:12} saves {gain[wire]:.3f} with one, {-two.delta(wire):.3f} with two: {z:.1f} standard errors"
    )

# %%
b_two, taken_two = ends_of("two matrices, x0", "x0_lambdas"), ends_of("two matrices, backout", "backout_lambda")  # fmt: skip
for head, weights in (("one matrix", b), ("two matrices", b_two)):
    print(f"x0_lambdas, {head}:", [round(w, 2) for w in weights.mean(0).tolist()])
ends = {"one": backout, "two": taken_two}
print("backout, from 0.5:", {head: f"{w.min():.2f} to {w.max():.2f}" for head, w in ends.items()})
assert b_two.min() > 0.1 and b_two[:, 1:].min() > 0.5 and taken_two.max() < 0.26
assert (
    -0.02 < two.delta("x0") < -0.015 and two.p_values["x0"] < 0.001 < 0.5 < two.p_values["backout"]
)
assert -0.06 < two.delta("first values") < -0.05 and 0.09 < two.delta("no norm") < 0.1
assert 5 < study.pooled_sd / two.pooled_sd < 5.5
assert (gain["backout"] + two.delta("backout")) > 4 * study.pooled_sd * 0.4**0.5 * 1.05
assert (gain["x0"] + two.delta("x0")) < 2 * study.pooled_sd * 0.4**0.5

# %% [markdown]
# (These $p$ are Dunnett's for the five arms with two matrices, four shown here and one in chapter 08, against a control of three runs.)
#
# The sign is the head's, at these rates, which were chosen for one matrix and at which two are 0.10 worse. With two matrices every layer adds the embedding, and backout falls to a quarter and saves nothing. The first layer's values save half of what they did. x0 still saves 0.018, and that is sure; whether it is less than with one matrix is not. What nobody asked for is the scatter. Here seeds make five times less difference to a model whose head begins at zero than to one whose first logits are random. On the laptop, with four layers and chapter 05's block and rates:

# %% tags=["hide-input"]
#| default_exp measure.plumbing
#| export
from typing import Any

from speedrun.config import Config, vary
from speedrun.lab.provenance import stamp
from speedrun.measure.runs import best_of, corpus_of, train_arms

NAMES = ("heads",)
HEADS: dict[str, dict[str, Any]] = {"one matrix": {}, "two matrices": {"model.head.tie": "untied"}}
ONE_WIRE: dict[str, dict[str, Any]] = {
    "": {},
    ", x0": {"model.layout.x0": True},
    ", backout": {"model.layout.backout": True},
}


def arms_of() -> dict[str, Config]:
    """With one matrix for embedding and head, and with two: no wire, x0, backout; four layers, chapter 05's block and rates."""
    shape = {"model.num_layers": 4, "model.rotary.pos": "half_rope", "model.rotary.base": 1024.0}
    base = vary(
        best_of("modern_block", "rates"), shape | {"model.embedding.norm": True, "device": "cpu"}
    )
    return {
        head + wire: vary(base, of_head | of_wire)
        for head, of_head in HEADS.items()
        for wire, of_wire in ONE_WIRE.items()
    }


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train every arm with three seeds, {"arms": {arm: [run, …]}}, with its weights that mix over the run."""
    arms = arms_of()
    facts = stamp(command, ["speedrun.measure.plumbing", "speedrun.train"], 3, range(3), corpus_of(arms["one matrix"]))  # fmt: skip
    return {"arms": train_arms(arms, 3, facts)}, facts


# %%
heads = load_result("plumbing", "heads")
by_head = heads["data"]["arms"]
at_home = study_of(
    {
        "control" if arm == "one matrix" else arm: [run["val_loss"] for run in runs]
        for arm, runs in by_head.items()
    }
)
for arm, sample in at_home.samples.items():
    plain = "two matrices" if "two" in arm else "control"
    apart = sample.mean - at_home.samples[plain].mean
    beside_it = f"  {apart:+.4f}, {p_text(at_home.pairwise_p(arm, plain))}" if arm != plain else ""
    print(f"{arm.replace('control', 'one matrix'):22} {sample}{beside_it}")
on_laptop = {arm.replace("control", "one matrix"): s for arm, s in at_home.samples.items()}
b_of = {
    head: torch.tensor([run["learned"]["x0_lambdas"][-1][1] for run in by_head[f"{head}, x0"]])
    for head in ("one matrix", "two matrices")
}
for head, weights in b_of.items():
    print(f"x0_lambdas, {head}: {[round(w, 2) for w in weights.mean(0).tolist()]}")
print(measured_on(heads))

# %%
gain = {arm: on_laptop[arm.split(",")[0]].mean - sample.mean for arm, sample in on_laptop.items()}
assert 0.055 < gain["one matrix, x0"] < 0.075 and 0.03 < gain["one matrix, backout"] < 0.05
assert abs(gain["two matrices, x0"]) < 0.01 and abs(gain["two matrices, backout"]) < 0.01
assert b_of["one matrix"][:, 2:].max() < -0.03 and b_of["two matrices"][:, 1:].min() > 0.03
taken = {
    head: [run["learned"]["backout_lambda"][-1][1][0] for run in by_head[f"{head}, backout"]]
    for head in b_of
}
assert min(taken["one matrix"]) > 0.6 and max(taken["two matrices"]) < 0.4
apart = on_laptop["one matrix"].mean - on_laptop["two matrices"].mean
assert 0.12 < apart < 0.14
print(
    {head: f"{min(ends):.2f} to {max(ends):.2f}" for head, ends in taken.items()},
    "is backout, from 0.5",
)
error = at_home.pooled_sd * (4 / 3) ** 0.5
apart_by = {
    wire: (gain[f"one matrix, {wire}"] - gain[f"two matrices, {wire}"]) / error
    for wire in ("x0", "backout")
}
assert 3.5 < apart_by["x0"] < 4.5 and 2.5 < apart_by["backout"] < 3.2
print(f"two matrices, no wire: {apart:.2f} less than one")
print("the gains differ by so many standard errors:", {w: f"{z:.1f}" for w, z in apart_by.items()})

# %% [markdown]
# With one matrix the last two layers subtract the embedding, x0 saves 0.066, and backout 0.040, with one deviation for all six. With two they add it, backout falls below its 0.5, and neither saves anything that shows; and the two scatter nearly alike. The gains with one and with two are four and three standard errors apart. The second matrix begins with zeros on both machines, so whether two jobs or the start makes the difference is open.
#
# And what is left of it, with one matrix, after 2,000 steps at the same rates?

# %%
longer = load_result("plumbing", "long")
late = study_of(
    {arm: [run["val_loss"] for run in runs] for arm, runs in longer["data"]["arms"].items()}
)
print(f"{'control, 2,000 steps':36} {late.samples['control']}")
for arm in ("x0", "backout", "first values"):
    print(late.line(arm))
print(measured_on(longer))
assert abs(late.delta("x0")) < 0.005 and abs(late.delta("backout")) < 0.003
assert min(late.p_values[arm] for arm in ("x0", "backout")) > 0.3
assert -0.01 < late.delta("first values") < -0.008 and 0.01 < late.p_values["first values"] < 0.05
assert {run["config"]["steps"] for runs in longer["data"]["arms"].values() for run in runs} == {
    2000
}

# %% [markdown]
# Of x0's 0.066 there is 0.004, of backout's 0.040 nothing, and neither can be told from nothing; the first layer's values save 0.009, a hint. On the laptop most of their gain was a head start. (Not so at full size: see below.)
#
# On this laptop's model, two matrices are 0.13 *better* than one; on [chapter 08](08_logits.py)'s, and on the GPU, they are 0.10 worse. The two laptop models differ in the norm behind the embedding, which chapter 08's lacks. Is that the reason?

# %%
norms = load_result("plumbing", "norms")
by_norm = {
    arm: describe(run["val_loss"] for run in runs) for arm, runs in norms["data"]["arms"].items()
}
assert by_norm["control"] == on_laptop["one matrix"], "the same runs again"
bare = by_norm["one matrix, no norm"]
for arm in ("two matrices, no norm", "control", "two matrices"):
    print(f"{arm.replace('control', 'one matrix, norm'):22} {compare_line(by_norm[arm], bare)}")
for pair in (("control", "two matrices"), ("one matrix, no norm", "two matrices, no norm")):
    one, two = (by_norm[arm] for arm in pair)
    print(f"one matrix {one.mean - two.mean:+.3f}, p = {p_difference(one, two):.1e} ({pair[0]})")
assert 0.08 < by_norm["control"].mean - bare.mean < 0.1
assert abs(by_norm["two matrices, no norm"].mean - bare.mean) < 0.01
gained = by_norm["two matrices, no norm"].mean - by_norm["two matrices"].mean
p_gained = p_difference(by_norm["two matrices, no norm"], by_norm["two matrices"])
assert 0.03 < gained < 0.04 and 0.01 < p_gained < 0.02
print(f"the norm with two matrices: {-gained:+.3f}, p = {p_gained:.3f}")
print(f"one matrix, no norm    {bare}; {measured_on(norms)}")

# %% [markdown]
# For 0.13 of the 0.23 it is. Without the norm the two heads end within 0.004; chapter 08's, with two layers, learned positions and no norm either, were a tenth apart. The norm costs one matrix 0.093, and saves two 0.033, if anything. On the GPU, with 50,257 tokens and rates that were chosen for one matrix with the norm, it saves one matrix 0.11 and two 0.10, and two are worse with it and without. So norm and head have to be chosen together, and for the model at hand. Record 8 brought both at once.
#
# Back to the GPU's runs. A weight that a matrix could undo says nothing. So scale the triangles until every layer hears the newest write with a weight of one; what is left below the diagonal no matrix can undo:


# %%
def scaled(matrix: Tensor) -> Tensor:
    """A triangle with every row times a factor, and the column of that layer's own write divided by it, so that its diagonal is ones."""
    found = matrix.clone()
    for n in range(len(found)):
        factor = 1 / found[n, n].clone()
        found[n] *= factor
        if n + 1 < len(found):
            found[:, n + 1] /= factor
    return found


draw = torch.Generator().manual_seed(4)
any_matrix = (torch.rand(9, 9, generator=draw, dtype=torch.float64) + 0.5).tril()
factors = torch.rand(9, generator=draw, dtype=torch.float64) + 0.5
other = factors[:, None] * any_matrix / torch.cat([torch.ones(1).double(), factors[:-1]])
assert torch.allclose(scaled(any_matrix), scaled(other), atol=1e-9)
assert torch.allclose(scaled(any_matrix).diagonal(), torch.ones(9).double())
x0_model = learned("x0")[0]
assert torch.allclose(scaled(triangle(x0_model)), scaled(triangle(absorbed(x0_model))), atol=1e-9)
print(f"of {9 * 10 // 2} numbers {9 * 8 // 2} are left")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two lower triangles of what each layer and the head hear of the embedding and of each layer's write, of mirrored skips at their start and learned; and the embedding's weight by layer, on the GPU and on the laptop with one matrix and with two"}}
from matplotlib.colors import LogNorm


def column(run: dict) -> Tensor:
    """What each layer, and the head, hears of the embedding; scaled."""
    config = config_from_json(run["config"])
    model = GPT(config.model, 288).double()
    with torch.no_grad():
        for name, values in run["learned"].items():
            model.get_parameter(name).copy_(torch.tensor(values[-1][1]))
    return scaled(triangle(model))[:, 0]


fig, axes = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained")
skips = {
    "mirrored skips, start": model_of(LayoutConfig(skips="unet"), 8),
    "learned": learned("U-net")[0],
}
for axis, (title, model) in zip(axes, skips.items()):
    rows = scaled(triangle(model)).masked_fill(torch.ones(9, 9).triu(1).bool(), float("nan"))
    image = axis.imshow(rows, cmap="viridis", norm=LogNorm(0.9, 2.6))
    axis.set_title(title, loc="left", fontsize=9)
    axis.set_xticks([0, 4, 8], ["e", "3", "7"])
    axis.set_xlabel("hears: embedding, layers")
    axis.set_yticks([0, 4, 8], ["0", "4", "head"])
    axis.grid(False)
bar = fig.colorbar(image, ax=axes[:2], ticks=[1, 1.5, 2, 2.5], format="%.2g")
bar.ax.minorticks_off()
on_gpu_runs = {"one matrix": arms["x0"], "two matrices": arms["two matrices, x0"]}
on_gpu_column = {
    head: torch.stack([column(run) for run in runs]) for head, runs in on_gpu_runs.items()
}
by_matrix = {head: torch.stack([column(run) for run in by_head[f"{head}, x0"]]) for head in b_of}
for axis, machine, found in ((axes[2], "GPU", on_gpu_column), (axes[3], "laptop", by_matrix)):
    for n, (head, lines) in enumerate(found.items()):
        axis.plot(lines[0], "o-", ms=3, color=f"C{n}", label=head)
        axis.plot(lines[1:].T, "o-", ms=3, color=f"C{n}")
    axis.set_title(f"the embedding, {machine}", loc="left", fontsize=9)
    axis.legend(fontsize=7)
for axis, last in ((axes[2], 8), (axes[3], 4)):
    axis.set_xticks([0, last // 2, last], ["0", str(last // 2), "head"])
    axis.set_ylim(0)
    axis.set_xlabel("received by layer")
fig.suptitle(
    "skips weaken; with one matrix the embedding goes up and down again, with two up to the end"
)
plt.show()

# %%
middle, heard = on_gpu_column["one matrix"][:, 3:5], on_gpu_column["one matrix"][:, -1]
assert 3.3 < middle.min() < middle.max() < 4.5 and 1.2 < heard.min() < heard.max() < 1.7
up = on_gpu_column["two matrices"]
assert up.diff(dim=1)[:, 1:-1].min() > -1e-9 and 1.5 < up[:, -1].min() < up[:, -1].max() < 9
assert by_matrix["one matrix"][:, -1].max() < 0.7 < 1.5 < by_matrix["two matrices"][:, -1].min()
assert by_matrix["two matrices"].diff(dim=1)[:, 1:].min() > -1e-9
edges = {name: scaled(triangle(model))[-1, 0].item() for name, model in skips.items()}
assert [round(x, 1) for x in edges.values()] == [2.5, 1.8]
for machine, found in (("GPU", on_gpu_column), ("laptop", by_matrix)):
    for head, lines in found.items():
        print(f"{machine}, {head}:", [f"{x:.1f}" for x in lines.mean(0).tolist()])
print("the head, of what is early, by mirrored skips:", {n: f"{x:.1f}" for n, x in edges.items()})

# %% [markdown]
# Triangles are of one seed, lines of three. A column of ones, as in GPT-2, would be a flat line. With one matrix the eight layers turn the embedding up fourfold to the middle and take most of that back, so that the head hears 1.5 times what layer 0 hears. The laptop's four go below one. With two matrices it goes up to the end. (How loud that is we did not measure: matrices decide how long the writes are beside the embedding.) Mirrored skips make the head hear early things 2.5 times as loud as the newest (five times before scaling, since layer 4 hears them twice already), and still 1.8 times after 600 steps.
#
# ## What it buys
#
# Record 9 was built one change after the other, and each was run to the end at full size, 3,200 steps of half a million tokens. The logs are public. So the best experiment on three of these wires costs nothing:

# %% tags=["hide-input"] mystnb={"image": {"alt": "What three changes of record 9 save in validation loss, each against the run without it, over 3,200 steps"}}
chain: dict[int, dict[int, float]] = {}
for row in public_table("chain9"):
    chain.setdefault(int(row["arm"]), {})[int(row["step"])] = float(row["val_loss"])
ADDED = {2: "value residual, half and half", 3: "its weight learned", 4: "x0"}
saves = {
    arm: {step: chain[arm - 1][step] - loss for step, loss in chain[arm].items() if step}
    for arm in ADDED
}
same = [chain[0][step] - chain[1][step] for step in chain[1] if 125 <= step <= 2000]
x0 = saves[4]
assert max(map(abs, same)) < 0.006, "two runs of one program"
assert [f"{x0[step]:.3f}" for step in (125, 500, 3200)] == ["-0.015", "0.007", "0.009"]
assert f"{max(gain for step, gain in x0.items() if step > 2000):.3f}" == "0.014"
assert x0[125] < -0.01 and 0.005 < x0[500] < x0[1000] < x0[2000] < 0.014 and x0[3200] > 0.009
assert saves[2][125] > 0.07 and 0.012 < saves[2][3200] < 0.013 < saves[2][1000] < 0.03
assert saves[3][125] < 0 < saves[3][1000] < saves[3][3200] < 0.009
fig, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
for arm, name in ADDED.items():
    axis.plot([*saves[arm]], [*saves[arm].values()], ".-", label=name)
axis.axhspan(min(same), max(same), color="0.9", label="the same program, twice")
axis.axhline(0, color="0.4", lw=0.8)
axis.set_xlabel("steps of 524,288 tokens, 8×H100, FineWeb")
axis.set_ylabel("saves (nats a token)")
axis.set_ylim(-0.02, 0.08)
axis.legend(fontsize=8)
axis.set_title("x0 begins behind and still gains at the end; the value residual's gain shrinks")
plt.show()
print("saved at the end:", {ADDED[arm]: f"{saved[3200]:.4f}" for arm, saved in saves.items()})

# %% [markdown]
# One run each {cite}`moddednanogpt`. The value residual saves most at once, and a hundredth at the end. x0 costs 0.015 at step 125, saves 0.007 by step 500, up to 0.014 after 2,000, and 0.009 at the end: at full size it is more than a head start. As large as the laptop's and the GPU's differences above are, where the public logs say something else, trust the logs.
#
# In the other public logs, what the first cell prints; each with other changes in the same record. The author of records 45 and 55, \@classiclarryd, twice took one thing away: without its last skip record 45 lost 0.0025, and without gates on its tables record 55 some 0.004 {cite}`moddednanogpt`. The value residual had been published two weeks before record 9 {cite}`zhou2024`. Learned weights for each layer and each earlier layer's output, which span the same triangle, were a paper of that February {cite}`pagliardini2024`.
#
# ## What it costs, and when it fails
#
# Next to no arithmetic. All plumbing takes ten per cent more time, tables six to eight. The other wires do not stand out of the five per cent between the fastest and the slowest run of the control, and neither does the time that leaving out a part saves. Without one layer's attention the loss does not visibly change (+0.013, $p = 0.9$); without the first layer's MLP it may rise (+0.026, $p = 0.02$).
#
# A table has to be stored and updated, and in the logs one sees it:

# %%
step_ms = {n: float(ladder[n]["step_avg_ms"]) for n in (13, 14, 15)}
extra = {arm: seconds[arm] / seconds["control"] - 1 for arm in (*WIRES, *OTHERS)}
took = [run["seconds"] for run in arms["control"]]
assert [round(x) for x in step_ms.values()] == [161, 174, 161]
assert all(0.055 < extra[arm] < 0.085 for arm in TABLES) and 0.09 < extra["all plumbing"] < 0.11
assert 0.04 < max(took) / min(took) - 1 < 0.055
assert all(-0.045 < extra[arm] < -0.025 for arm in LESS)
assert max(abs(extra[arm]) for arm in ("first values", "x0", *SKIPS, "smear", "backout")) < 0.023
print({f"record {n}": f"{x:.0f} ms a step" for n, x in step_ms.items()})
print(f"equal runs here: {min(took):.1f} to {max(took):.1f} s")

# %% [markdown]
# Record 14's twelve tables cost 13 ms a step, and record 15's six, with other changes, gave them back. Record 89 holds 483 million numbers in tables, and record 92 sixty-five billion, nearly all of them in one table of n-grams whose rows are fetched only where they are used. Its eight GPUs share their update, and every second step has none ([chapter 20](20_many_gpus.py)).
#
# Mirrored skips with weights of one fail here. Record 11 had the $a_\ell$ beside them, which may make up for it; that was not tried. One rate was not tuned: weights that mix train at the embedding's. Record 9's trained at a fifteenth of it, and at ten times the head's. And on the GPU all of it was measured for 600 steps. What the laptop keeps of x0 and backout after 2,000, and the GPU of [chapter 05](05_modern_block.py)'s older block, says how much that may be worth.
#
# ## What did not work
#
# The contest's list: gates on what x0 adds gained nothing (record 55); the embedding's weights from 0.5 on made no difference; normed tables, tables of a larger or smaller spread, tables for frequent tokens only were worse. Two residual streams, one for attention and one for MLPs, came with record 73 and went with record 77. Since then attention in the last three layers hears layer 7's output in place of the newest {cite}`moddednanogpt`. That is a triangle, too.
#
# ## Exercises
#
# 1. At its start record 11's head hears the embedding seven times in 12 layers. Write `head_hears(layers)`: the head's row with mirrored skips and weights of one, for any number of layers, as a list of layers + 1 whole numbers, the embedding's first.


# %% tags=["solution"]
def head_hears(layers: int) -> list[int]:
    """One, and one more for every skipped output that contains the write."""
    again = layers // 2
    return [1 + again] + [1 + max(0, again - n) for n in range(layers)]


# %%
for layers in (2, 5, 8, 12):
    right = triangle(model_of(LayoutConfig(skips="unet"), layers))[-1].tolist()
    got = head_hears(layers)
    assert got == right, f"{layers} layers: the head hears {right}, not {got}"
print(head_hears(8))

# %% [markdown]
# 2. Write `weights_for(column)`: the `x0_lambdas`, (layers,), with which layers hear the embedding as a wanted column says, (layers,), if all stream's weights are one.


# %% tags=["solution"]
def weights_for(column: Tensor) -> Tensor:
    """What a layer adds stays in the stream, so each has to add the difference to the one before."""
    return column.diff(prepend=torch.ones(1, dtype=column.dtype))


# %%
wanted = torch.tensor([1.0, 2.0, 3.5, 3.0, 1.0, 0.5], dtype=torch.float64)
model = model_of(LayoutConfig(x0=True), 6)
with torch.no_grad():
    model.x0_lambdas.copy_(weights_for(wanted))
heard = triangle(model)
assert torch.allclose(heard[:6, 0], wanted), (
    f"asked for {wanted.tolist()}, the layers hear {heard[:6, 0].tolist()} (what was added once stays in the stream)"
)
assert torch.equal(heard[:, 1:], torch.ones(7, 7).double().tril()[:, 1:]), (
    f"the layers' own writes should be heard once each, not {heard[:, 1:]}"
)
print(model.x0_lambdas.tolist())

# %% [markdown]
# ## Since then
#
# Record 89 has x0, tables, gates and smear, and makes most of it depend on the token. The embedding's weights are functions of the embedding in the first four layers, and of the stream later (record 85, which also has a token gate for its one skip). A table of pairs of tokens is added to nearly every layer's stream since record 62, which took 5.3% off the time, the largest share of any between records 21 and 89. And the last layer and the head add earlier outputs with weights that are learned for each token anew (record 81, multiway connections), in which backout is a constant. Record 92 keeps four value tables (layers 1, 2, 8 and 10), adds x0 in six places only and vectors of n-grams in six, and takes attention out of four of eleven layers and both halves out of layer 7.
