# Tangled from notebooks/21_model.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The code
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.nn import functional as F

from speedrun.lab.bounds import PositiveFloat, PositiveInt
from speedrun.model.embedding import READS, EmbeddingOptions, looked_up, smeared, with_value
from speedrun.model.head import HeadOptions, capped, loss_of, padded
from speedrun.model.mlp import BlockOptions, initial, linear, mlp, normed, rms_norm
from speedrun.model.plan import LayerSpec, PlanOptions, enter, leave, make_plan, mixing_rows
from speedrun.model.plan import tables_of
from speedrun.model.rotary import RotaryOptions, rotate, rotation_tables


@dataclass(frozen=True)
class GPTOptions:
    """The shape of the package's model. The vocabulary comes from the data."""

    layers: Annotated[int, Interval(ge=1, le=1024)] = 12
    """Blocks."""
    heads: PositiveInt = 12
    """Attention heads; they share the width evenly."""
    width: Annotated[int, Interval(ge=READS, le=2**16)] = 768
    """Length of the residual stream's vectors."""
    context: Annotated[int, Interval(ge=1, le=2**20)] = 1024
    """Longest row of tokens."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights: 0.02 for a width of 768, more for a narrower model."""


@dataclass(frozen=True)
class Switches:
    """The techniques of the model, one group a chapter; the defaults are GPT-2's."""

    block: BlockOptions = BlockOptions()
    rotary: RotaryOptions = RotaryOptions()
    embedding: EmbeddingOptions = EmbeddingOptions()
    plan: PlanOptions = PlanOptions()
    head: HeadOptions = HeadOptions()


@dataclass(frozen=True)
class Parameter:
    """A row of the parameter table. It starts as normal(mean, std), or uniform with the same two numbers.

    decay: whether AdamW decays it. multiplies: whether it costs one multiply-add a weight and token.
    matrices: how many matrices stand on top of each other in each slice of a bank; 0: it is no bank of matrices.
    owners: the layers that a bank has slices for, in their order; none: it is no bank.
    rate: multiple of AdamW's rate. tied: the parameter that it is the transpose of until they are split.
    mixes: whether it is a weight, or a few, by which vectors are mixed.
    """

    name: str
    shape: tuple[int, ...]
    mean: float = 0.0
    std: float = 0.0
    decay: bool = False
    multiplies: bool = False
    matrices: int = 0
    uniform: bool = False
    owners: tuple[int, ...] = ()
    rate: float = 1.0
    tied: str = ""
    mixes: bool = False


def check_heads(options: GPTOptions, switches: Switches) -> None:
    """Refuse heads that do not share the width evenly, or whose numbers cannot be paired."""
    size, rest = divmod(options.width, options.heads)
    if rest:
        raise ValueError(f"width {options.width} is not a multiple of heads {options.heads}")
    of = {"learned": 1, "rotary": 2, "half": 4}[switches.rotary.positions]
    if size % of:
        raise ValueError(f"a head of {size} numbers: rotary.positions needs a multiple of {of}")


def norm_rows(name: str, shape: tuple[int, ...], owners: tuple[int, ...] = ()) -> list[Parameter]:
    """What a layer norm learns: a gain and a bias."""
    gain = Parameter(f"{name}_gain", shape, mean=1.0, owners=owners)
    return [gain, Parameter(f"{name}_bias", shape, owners=owners)]


def layer_rows(
    options: GPTOptions, block: BlockOptions, plan: Sequence[LayerSpec]
) -> list[Parameter]:
    """The banks of attention and MLP, in the order in which a layer comes to them."""
    d, rows = options.width, list[Parameter]()
    shapes = {"attention_qkv": (3 * d, d), "attention_out": (d, d)}
    shapes |= {"mlp_up": (4 * d, d), "mlp_down": (d, 4 * d)}
    for name, (high, wide) in shapes.items():
        reads, part = name in ("attention_qkv", "mlp_up"), name.split("_")[0]
        owners = tuple(layer for layer, spec in enumerate(plan) if getattr(spec, part))
        n = len(owners)
        if reads and block.norm == "layer":
            rows += norm_rows(f"{part}_norm", (n, d), owners)
        start = initial(block, options.init_std, options.layers, wide, adds=not reads)
        kind: dict[str, Any] = {"decay": True, "multiplies": True, "owners": owners} | start
        matrices = 3 if name == "attention_qkv" else 1
        rows.append(Parameter(name, (n, high, wide), matrices=matrices, **kind))
        if block.biases:
            rows.append(Parameter(f"{name}_bias", (n, high), owners=owners))
    return rows


def plan_of(options: GPTOptions, switches: Switches) -> tuple[LayerSpec, ...]:
    """What each layer is made of."""
    return make_plan(options.layers, switches.plan, switches.embedding)


def parameter_table(
    options: GPTOptions, vocab_size: int, switches: Switches = Switches()
) -> tuple[Parameter, ...]:
    """Every parameter of the model, in the order in which the forward pass comes to them."""
    d, std, head = options.width, options.init_std, switches.head
    words, twin = padded(vocab_size, head.multiple), "head" if head.tied == "split" else ""
    embedding, plan = switches.embedding, plan_of(options, switches)
    both: dict[str, Any] = {"decay": True, "multiplies": head.tied == "tied"}
    both |= {"tied": twin, "rate": embedding.rate}
    rows = [Parameter("token_embedding", (words, d), std=embedding.std or std, **both)]
    if switches.rotary.positions == "learned":
        rows.append(Parameter("position_embedding", (options.context, d), std=std, decay=True))
    if tables := tables_of(plan):
        kind: dict[str, Any] = {"decay": True, "rate": embedding.value_rate}
        rows.append(Parameter("value_embedding", (tables * words, d), std=embedding.value_std, **kind))  # fmt: skip
    mixing = mixing_rows(plan, options.heads, switches.plan, embedding)
    rows += [Parameter(**fields) for fields in mixing]
    rows += layer_rows(options, switches.block, plan)
    if switches.block.norm == "layer":
        rows += norm_rows("final_norm", (d,))
    if head.tied != "tied":
        std = std if head.tied == "split" else head.std
        kind = {"decay": True, "multiplies": True, "rate": head.rate}
        rows.append(Parameter("head", (d, words), std=std, **kind))
    return tuple(rows)


# %% Beginning
def init_parameter(row: Parameter, seed: int) -> Tensor:
    """The initial values of one row, float32 on the CPU: a function of the seed and the row alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{row.name}".encode()))
    values = torch.full(row.shape, row.mean)
    if row.uniform:
        return values + math.sqrt(3) * row.std * (
            2 * torch.rand(row.shape, generator=generator) - 1
        )
    return values + row.std * torch.randn(row.shape, generator=generator) if row.std else values


@torch.no_grad()
def begin(model, seed: int) -> None:
    """Give a model the initial values of a seed, on whatever device it is."""
    for row in model.table:
        model.get_parameter(row.name).copy_(init_parameter(row, seed))
    for row in model.table:
        if row.tied:
            model.get_parameter(row.tied).copy_(model.get_parameter(row.name).mT)


# %% The forward pass
def attention(
    x: Tensor,
    weights: Mapping[str, Tensor],
    heads: int,
    switches: Switches,
    tables: tuple[Tensor, Tensor] | None,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal self-attention, (batch, tokens, width) → the same, and its values. qkv: (3 · width, width), out: (width, width).

    tables: cosines and sines to turn queries and keys by. other: values to mix in, (batch, heads, tokens, head_dim).
    """
    batch, tokens, width = x.shape
    shape = (batch, tokens, 3, heads, width // heads)
    q, k, v = linear(x, weights, "attention_qkv").view(shape).permute(2, 0, 3, 1, 4)
    if switches.block.qk_norm:
        q, k = rms_norm(q), rms_norm(k)
    if tables is not None:
        q, k = (rotate(each, *tables, switches.rotary.pairs) for each in (q, k))
    if other is not None:
        v = with_value(v, other.to(v.dtype), x, weights, switches.embedding.value_mix).to(v.dtype)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # scaled by 1 / sqrt(head_dim)
    return linear(y.transpose(1, 2).reshape(batch, tokens, width), weights, "attention_out"), v


def weights_of_layers(self) -> list[dict[str, Tensor]]:
    """Each layer's slices of the banks, by the banks' names."""
    found: list[dict[str, Tensor]] = [{} for _ in range(self.options.layers)]
    for name, owners in self.banks.items():
        for layer, piece in zip(owners, getattr(self, name).unbind()):
            found[layer][name] = piece
    return found


def embed(self, inputs: Tensor) -> Tensor:
    """The stream's beginning, (batch, tokens, width)."""
    x = F.embedding(inputs, self.token_embedding)
    if self.switches.embedding.smear:
        x = smeared(x, self._parameters)
    if self.switches.rotary.positions == "learned":
        x = x + self.position_embedding[: inputs.shape[1]]
    return rms_norm(x) if self.switches.embedding.norm else x


def values_from_tables(self, inputs: Tensor) -> list[Tensor]:
    """What each value table has for the inputs, in heads: (batch, heads, tokens, head_dim)."""
    if not (tables := tables_of(self.plan)):
        return []
    rows = looked_up(inputs, self.value_embedding, tables)
    return [row.unflatten(-1, (self.options.heads, -1)).transpose(1, 2) for row in rows]


def gpt_forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
    """Logits (batch, tokens, vocab) of inputs, (batch, tokens) int64; with targets the mean cross-entropy, nats."""
    heads, switches = self.options.heads, self.switches
    turns = None if switches.rotary.positions == "learned" else (self.cos, self.sin)
    x = x0 = embed(self, inputs)
    outputs: list[Tensor] = []
    values: dict[Any, Tensor] = dict(enumerate(values_from_tables(self, inputs)))
    for spec, weights in zip(self.plan, weights_of_layers(self)):
        x = enter(x, x0, outputs, spec, weights, switches.plan.skips)
        if spec.attention:
            normal = normed(x, weights, "attention_norm")
            y, v = attention(normal, weights, heads, switches, turns, values.get(spec.value))
            values.setdefault("first", v)
            x = x + y
        if spec.mlp:
            x = x + mlp(normed(x, weights, "mlp_norm"), weights, switches.block)
        outputs.append(x)
    x = leave(x, outputs, self._parameters)
    x, tied = normed(x, self._parameters, "final_norm"), switches.head.tied == "tied"
    logits = F.linear(x, self.token_embedding) if tied else x @ self.head
    if targets is None:
        return capped(logits[..., : self.vocab_size], switches.head.cap)
    return loss_of(logits, targets, switches.head.cap)


class GPT(nn.Module):
    """The package's model: banks of weights, and the table that describes them."""

    def __init__(
        self, options: GPTOptions, vocab_size: int, seed: int = 0, switches: Switches = Switches()
    ):
        super().__init__()
        check_heads(options, switches)
        self.options, self.switches, self.vocab_size = options, switches, vocab_size
        self.plan = plan_of(options, switches)
        self.table = parameter_table(options, vocab_size, switches)
        for row in self.table:
            self.register_parameter(row.name, nn.Parameter(torch.empty(row.shape)))
        begin(self, seed)
        self.banks = {row.name: row.owners for row in self.table if row.owners}
        if switches.rotary.positions != "learned":
            size = options.width // options.heads
            cos, sin = rotation_tables(options.context, size, switches.rotary)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    forward = gpt_forward

    def decays(self) -> dict[str, bool]:
        """Which parameters decay, by name."""
        return {row.name: row.decay for row in self.table}

    def matrices(self) -> dict[str, int]:
        """The banks of matrices, by name, and how many each of their slices holds."""
        return {row.name: row.matrices for row in self.table if row.matrices}


# %% The same model
INSIDE = {
    "attention_norm": "norm_1",
    "attention_qkv": "attention.qkv",
    "attention_out": "attention.out",
    "mlp_norm": "norm_2",
    "mlp_up": "mlp.up",
    "mlp_down": "mlp.down",
}


def banks_from_blocks(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Tensors of chapter 03's GPT2 (weights or gradients, by name) as banks: those of all blocks stacked."""
    banks = {
        "token_embedding": state["tokens.weight"],
        "position_embedding": state["positions.weight"],
    }
    for bank, layer in INSIDE.items():
        for part, suffix in (("weight", "_gain" if "norm" in bank else ""), ("bias", "_bias")):
            banks[bank + suffix] = torch.stack(
                [state[f"blocks.{i}.{layer}.{part}"] for i in range(layers)]
            )
    return banks | {"final_norm_gain": state["norm.weight"], "final_norm_bias": state["norm.bias"]}


# %% The measurement
def model_flops_per_token(
    options: GPTOptions, vocab_size: int, seq_len: int, switches: Switches = Switches()
) -> float:
    """FLOPs of a token, forward and backward: 6 a weight that multiplies, 6 · seq_len · width a layer for attention.

    Attention counts what causality leaves: on average a token sees half of the row.
    """
    table = parameter_table(options, vocab_size, switches)
    weights = sum(math.prod(row.shape) for row in table if row.multiplies)
    layers = sum(spec.attention for spec in plan_of(options, switches))
    return 6.0 * weights + 6.0 * layers * seq_len * options.width
