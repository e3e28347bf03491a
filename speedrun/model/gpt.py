# Tangled from notebooks/21_model.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.model.init import init_weights
from speedrun.params import ParamSpec


# %% The code
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.nn import functional as F

from speedrun.kernels.attention import attention_op
from speedrun.kernels.loss import head_loss_op
from speedrun.kernels.mlp import mlp_scales
from speedrun.kernels.rotary import norm_rotary_op
from speedrun.lab.bounds import PositiveFloat, PositiveInt
from speedrun.model.attention import (
    AttentionConfig,
    AttentionSettings,
    Packed,
    positions_of,
    prepare_tiles,
)
from speedrun.model.embedding import (
    GATE_CHANNELS,
    EmbeddingConfig,
    lookup_value_embeds,
    apply_smear,
    add_value_embed,
)
from speedrun.model.head import HeadConfig, softcap, loss_of, round_up
from speedrun.model.mlp import BlockConfig, linear, linear_init, mlp, apply_norm, rms_norm
from speedrun.model.layout import (
    LayerSpec,
    LayoutConfig,
    mix_residual,
    apply_backout,
    backout_layer,
    make_layout,
)
from speedrun.model.layout import scalar_specs, num_value_tables
from speedrun.model.rotary import RotaryConfig, frequencies, apply_rotary, rotary_tables
from speedrun.model.yarn import follow_windows


@dataclass(frozen=True)
class GPTConfig:
    """The package's model: its shape, and its techniques, one group a chapter. The defaults are GPT-2's. The vocabulary comes from the data."""

    num_layers: Annotated[int, Interval(ge=1, le=1024)] = 12
    """Blocks."""
    num_heads: PositiveInt = 12
    """Attention heads; they share the width evenly."""
    model_dim: Annotated[int, Interval(ge=GATE_CHANNELS, le=2**16)] = 768
    """Length of the residual stream's vectors."""
    max_seq_len: Annotated[int, Interval(ge=1, le=2**20)] = 1024
    """Longest row of tokens (block_size in nanoGPT)."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights: 0.02 for a width of 768, more for a narrower model."""
    block: BlockConfig = field(default_factory=BlockConfig)
    """What a layer is made of."""
    rotary: RotaryConfig = field(default_factory=RotaryConfig)
    """How attention learns where tokens are."""
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    """What a token brings into the model."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """How the stream runs through the layers."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """What attention looks at, and who computes it."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """From the last vectors to the loss."""


def check_heads(config: GPTConfig) -> None:
    """Raise ValueError for heads that do not share the width evenly, or whose numbers cannot be paired."""
    size, rest = divmod(config.model_dim, config.num_heads)
    if rest:
        raise ValueError(
            f"model_dim {config.model_dim} is not a multiple of num_heads {config.num_heads}"
        )
    of = {"learned": 1, "rope": 2, "half_rope": 4}[config.rotary.pos]
    if size % of:
        raise ValueError(f"a head of {size} numbers: model.rotary.pos needs a multiple of {of}")


def norm_specs(name: str, shape: tuple[int, ...], layers: tuple[int, ...] = ()) -> list[ParamSpec]:
    """What a layer norm learns: a gain and a bias."""
    gain = ParamSpec(f"{name}_gain", shape, layers, init_mean=1.0)
    return [gain, ParamSpec(f"{name}_bias", shape, layers)]


LARGE: dict[str, Any] = {"comm": "sharded", "wd_mul": 1.0}  # all but gains, biases and scalars


def layer_specs(config: GPTConfig, layout: Sequence[LayerSpec]) -> list[ParamSpec]:
    """The banks of attention and MLP, in the order in which a layer comes to them (upstream has three: qk_bank, vo_bank and mlp_bank)."""
    d, block, specs = config.model_dim, config.block, list[ParamSpec]()
    shapes = {"attention_qkv": (3 * d, d), "attention_out": (d, d)}
    shapes |= {"mlp_up": (4 * d, d), "mlp_down": (d, 4 * d)}
    for name, (high, wide) in shapes.items():
        reads, part = name in ("attention_qkv", "mlp_up"), name.split("_")[0]
        layers = tuple(layer for layer, spec in enumerate(layout) if getattr(spec, part))
        n = len(layers)
        if reads and block.norm == "layer":
            specs += norm_specs(f"{part}_norm", (n, d), layers)
        kind: dict[str, Any] = linear_init(block, config.init_std, config.num_layers, wide, adds=not reads)  # fmt: skip
        kind |= {"matrices": 3 if name == "attention_qkv" else 1, "is_matmul": True, **LARGE}
        kind["shape_scale"] = 2.0 if name == "mlp_up" else 1.0  # sqrt(rows / cols)
        specs.append(ParamSpec(name, (n, high, wide), layers, **kind))
        if block.biases:
            specs.append(ParamSpec(f"{name}_bias", (n, high), layers))
    return specs


def layout_of(config: GPTConfig) -> tuple[LayerSpec, ...]:
    """What each layer is made of."""
    return make_layout(config.num_layers, config.layout, config.embedding)


def param_specs(config: GPTConfig, vocab_size: int) -> tuple[ParamSpec, ...]:
    """Every parameter of the model, in the order in which the forward pass comes to them."""
    d, std, head, embedding = config.model_dim, config.init_std, config.head, config.embedding
    words, layout = round_up(vocab_size, head.pad_vocab_to), layout_of(config)
    tied_to = "lm_head" if head.tie == "until_step" else ""
    kind: dict[str, Any] = {"init_std": embedding.std or std, "is_matmul": head.tie == "tied"}
    kind |= {"lr_mul": embedding.lr_mul, "tied_to": tied_to, **LARGE}
    specs = [ParamSpec("embed", (words, d), **kind)]
    if config.rotary.pos == "learned":
        specs.append(ParamSpec("pos_embed", (config.max_seq_len, d), init_std=std, **LARGE))
    if tables := num_value_tables(layout):
        kind = {"init_std": embedding.value_std, "lr_mul": embedding.value_lr_mul, **LARGE}
        kind["wd_mul"] = embedding.value_decay
        specs.append(ParamSpec("value_embeds", (tables * words, d), **kind))
    specs += scalar_specs(layout, config.num_heads, config.layout, embedding)
    specs += layer_specs(config, layout)
    if config.block.norm == "layer":
        specs += norm_specs("final_norm", (d,))
    if head.tie != "tied":
        std = std if head.tie == "until_step" else head.std
        kind = {"init_std": std, "is_matmul": True, "lr_mul": head.lr_mul, **LARGE}
        specs.append(ParamSpec("lm_head", (d, words), **kind))
    return tuple(specs)


# %% The forward pass
class AttentionContext(NamedTuple):
    """What attention needs beside its input: who computes it, and where documents lie, if rows are packed."""

    cos_sin: tuple[Tensor, Tensor] | None
    """Cosines and sines to turn queries and keys by."""
    packed: Packed | None = None
    """Its first window is the layer's."""
    tiles: Any = None
    backend: str = "sdpa"


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, packed: Packed, qk_norm: bool
) -> Tensor:  # fmt: skip
    """Attention that keeps documents apart, by the context's backend: (1, heads, tokens, head_dim) each → (tokens, heads, head_dim)."""
    bounded = qk_norm and v.dtype != torch.float16
    q, k, v = (each.squeeze(0).transpose(0, 1).to(v.dtype).contiguous() for each in (q, k, v))
    if context.backend == "triton":
        kernel = (context.tiles, packed.windows[0], packed.scale, bounded)
        return attention_op(q, k, v, *kernel)[0]
    from speedrun.model.backends import attend

    return attend(q, k, v, packed, False, context.backend, bounded, context.tiles)


def heads_of(
    qkv: Tensor, config: GPTConfig, context: AttentionContext
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (batch, heads, tokens, head_dim) each, of (batch, tokens, 3 · width): queries and keys normed and turned, for our kernel by one of chapter 17's."""
    qk_norm, interleaved = config.block.qk_norm, config.rotary.interleaved
    if context.backend == "triton" and context.cos_sin and qk_norm and not interleaved:
        turned = norm_rotary_op(qkv.flatten(0, 1), *context.cos_sin, config.num_heads)
        q, k, v = (each.transpose(0, 1).unsqueeze(0) for each in turned[:3])
        return q, k, v
    q, k, v = qkv.unflatten(2, (3, config.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if qk_norm:
        q, k = rms_norm(q), rms_norm(k)
    if context.cos_sin is not None:
        q, k = (apply_rotary(each, *context.cos_sin, interleaved) for each in (q, k))
    return q, k, v


def attention(
    x: Tensor,
    weights: Mapping[str, Tensor],
    config: GPTConfig,
    context: AttentionContext,
    ve: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal self-attention, (batch, tokens, width) → the same, and its values, (batch, heads, tokens, head_dim). qkv: (3 · width, width), out: (width, width).

    ve: values to mix in, (batch, tokens, width).
    """
    q, k, v = heads_of(linear(x, weights, "attention_qkv"), config, context)
    if ve is not None:
        ve = ve.unflatten(-1, (config.num_heads, -1)).transpose(1, 2).to(v.dtype)
        v = add_value_embed(v, ve, x, weights, config.embedding.value_residual).to(v.dtype)
    if context.packed is None:
        scale = config.attention.scale or None  # None: 1 / sqrt(head_dim)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
    else:
        y = attend_packed(q, k, v, context, context.packed, config.block.qk_norm)
    return linear(y.reshape(x.shape), weights, "attention_out"), v


def attention_contexts(self, inputs: Tensor, packed: Packed | None) -> list[AttentionContext]:
    """What all attention layers of a forward pass share: those with the short window, and those with the long one. In packed rows positions count from a document's beginning."""
    learned = self.config.rotary.pos == "learned"
    if packed is None:
        return [AttentionContext(None if learned else (self.cos, self.sin))] * 2
    tokens = inputs.shape[1]
    angles = positions_of(packed.cu_seqlens, tokens)[:, None] * packed.frequencies
    cos_sin, tiles = (angles.cos(), angles.sin()), prepare_tiles(packed, tokens, self.backend)
    found = []
    for n, window in enumerate(packed.windows.split(1)):
        own = tiles[n : n + 1] if isinstance(tiles, list) else tiles
        found.append(AttentionContext(cos_sin, packed._replace(windows=window), own, self.backend))
    return found


def weights_of_layers(self, scales: Tensor | None = None) -> list[dict[str, Tensor]]:
    """Each layer's slices of the banks, by the banks' names; and its scales, where training's MLPs compute in eight bits."""
    found: list[dict[str, Tensor]] = [{} for _ in range(self.config.num_layers)]
    banks = {name: getattr(self, name) for name in self.banks}
    if scales is not None:
        banks["mlp_scales"] = scales
    for name, bank in banks.items():
        layers = self.banks.get(name, self.banks.get("mlp_up"))
        for layer, piece in zip(layers, bank.unbind()):
            found[layer][name] = piece
    return found


def embed_inputs(self, inputs: Tensor) -> Tensor:
    """The stream's beginning, (batch, tokens, width)."""
    x = F.embedding(inputs, self.embed)
    if self.config.embedding.smear:
        x = apply_smear(x, self._parameters)
    if self.config.rotary.pos == "learned":
        x = x + self.pos_embed[: inputs.shape[1]]
    x = rms_norm(x) if self.config.embedding.norm else x
    return x.bfloat16() if self.config.layout.stream_dtype == "bfloat16" else x


def values_from_tables(self, inputs: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """What each value table has for the inputs, (batch, tokens, width)."""
    if not (tables := num_value_tables(self.layout)):
        return []
    rows = lookup_value_embeds(inputs, self.value_embeds, tables)
    return [row.to(dtype) for row in rows]


def logits_of(self, x: Tensor) -> Tensor:
    """The head: normed vectors, (…, width), to logits, (…, padded vocabulary)."""
    tied = self.config.head.tie == "tied"
    return F.linear(x, self.embed) if tied else x @ self.lm_head


def loss_in_slabs(self, x: Tensor, targets: Tensor, rows: int = 2**15) -> Tensor:
    """Mean cross-entropy, nats, of vectors (1, tokens, width), with the logits of `rows` tokens in memory at a time."""
    cap, total = self.config.head.softcap, torch.zeros((), device=x.device)
    for part, wanted in zip(x.split(rows, 1), targets.split(rows, 1)):
        total = total + loss_of(logits_of(self, part), wanted, cap) * wanted.numel()
    return total / targets.numel()


def added(x: Tensor, delta: Tensor | None) -> Tensor:
    """The stream, (batch, tokens, width), with what was still to be added."""
    return x if delta is None else x + delta


def begin_forward(self, inputs: Tensor) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """The stream's beginning, (batch, tokens, width); what value tables have for the inputs; and the MLPs' scales, if training computes them in eight bits."""
    x = embed_inputs(self, inputs)
    eight = self.fp8 and torch.is_grad_enabled()
    scales = mlp_scales(self.mlp_up, self.mlp_down) if eight else None
    return x, values_from_tables(self, inputs, x.dtype), scales


def attention_half(
    x: Tensor,
    delta: Tensor | None,
    x0: Tensor,
    skip: Tensor | None,
    ve: Tensor | None,
    weights: Mapping[str, Tensor],
    config: GPTConfig,
    context: AttentionContext | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A layer's first half: the stream, what is to be added, and the values, if other layers want them. context: None for a layer without attention."""
    x = mix_residual(added(x, delta), x0, skip, weights, config.layout.skips)
    if context is None:
        return x, None, None
    y, v = attention(apply_norm(x, weights, "attention_norm"), weights, config, context, ve)
    wanted = config.embedding.values == "first"
    return x, y, v.transpose(1, 2).flatten(2) if wanted else None


def mlp_half(
    x: Tensor, delta: Tensor | None, weights: Mapping[str, Tensor], block: BlockConfig
) -> tuple[Tensor, Tensor]:
    """A layer's second half: the stream, and what is to be added to it."""
    x = added(x, delta)
    return x, mlp(apply_norm(x, weights, "mlp_norm"), weights, block)


def end_forward(
    self,
    x: Tensor,
    delta: Tensor | None,
    early: Tensor | None,
    targets: Tensor | None,
    candidates: Tensor | None,
    slabs: bool,
) -> Tensor:
    """Logits, or the loss. early: what backout takes a share of. slabs: the loss of a long row, without gradients."""
    x = added(x, delta)
    x = x if early is None else apply_backout(x, early, self._parameters)
    x = apply_norm(x, self._parameters, "final_norm")
    if candidates is not None and targets is not None:
        return head_loss_op(x.flatten(0, 1), self.lm_head, targets.flatten(), candidates)[0]
    if slabs and targets is not None:
        return loss_in_slabs(self, x, targets)
    logits = logits_of(self, x)
    if targets is None:
        return softcap(logits[..., : self.vocab_size], self.config.head.softcap)
    return loss_of(logits, targets, self.config.head.softcap)


def call_directly(part: Callable, *arguments: Any) -> Any:
    """Call a part of the forward pass as it is."""
    return part(*arguments)


def gpt_forward(
    self,
    inputs: Tensor,
    targets: Tensor | None = None,
    packed: Packed | None = None,
    candidates: Tensor | None = None,
    call: Callable = call_directly,
) -> Tensor:
    """Logits (batch, tokens, vocab) of inputs, (batch, tokens) int64; with targets the mean cross-entropy, nats; with candidates, (2,) int in CPU memory, the FP8 head's: its softmax is over so many words, 0: all, for each of so many micro-batches. packed: of one row. call: how its parts are called."""
    config, contexts = self.config, attention_contexts(self, inputs, packed)
    x0, tables, scales = call(begin_forward, self, inputs)
    x, delta = x0, None
    outputs: dict[Any, Tensor] = {}
    values: dict[Any, Tensor] = dict(enumerate(tables))
    for n, (spec, weights) in enumerate(zip(self.layout, weights_of_layers(self, scales))):
        own = {name: piece for name, piece in weights.items() if name.startswith("mlp_")}
        context = contexts[int(n in config.attention.long_layers)] if spec.attention else None
        read = outputs.get(spec.skip), values.get(spec.value), weights
        x, delta, v = call(attention_half, x, delta, x0, *read, config, context)
        values.setdefault("first", v)
        if spec.mlp:
            x, delta = call(mlp_half, x, delta, own, config.block)
        if n in self.kept:
            x, delta = added(x, delta), None
            outputs[n] = x
    slabs = packed is not None and not torch.is_grad_enabled()
    return call(end_forward, self, x, delta, outputs.get(self.backout), targets, candidates, slabs)


def attention_settings(
    config: GPTConfig, windows: Sequence[tuple[int, int]], device: torch.device
) -> list[AttentionSettings]:
    """Attention's settings in each stage, given its short and its long window in tokens (0: all)."""
    size = config.model_dim // config.num_heads
    scale, turning = config.attention.scale or size**-0.5, frequencies(size, config.rotary)
    pairs = [(turning, scale)] * len(windows)
    if config.attention.yarn:
        pairs = follow_windows(turning, scale, [long for _, long in windows])
    found = []
    for ends, (turns, factor) in zip(windows, pairs):
        reach = torch.tensor([end or 2**30 for end in ends], dtype=torch.int32)
        found.append(AttentionSettings(reach, torch.tensor(factor), turns.to(device)))
    return found


class GPT(nn.Module):
    """The package's model: banks of weights, and the table that describes them."""

    def __init__(self, config: GPTConfig, vocab_size: int, seed: int = 0):
        super().__init__()
        check_heads(config)
        self.config, self.vocab_size, self.layout = config, vocab_size, layout_of(config)
        self.specs = param_specs(config, vocab_size)
        for spec in self.specs:
            self.register_parameter(spec.name, nn.Parameter(torch.empty(spec.shape)))
        init_weights(self, seed)
        self.banks = {spec.name: spec.layers for spec in self.specs if spec.layers}
        self.backout = backout_layer(config.num_layers) if config.layout.backout else None
        self.kept = {
            self.backout,
            *(spec.skip for spec in self.layout),
        }  # outputs that a later layer reads
        self.backend = "sdpa"  # for packed rows: a trainer that knows its device chooses
        self.fp8 = config.block.fp8  # where the device has units for eight bits, or is a CPU
        if config.rotary.pos != "learned":
            size = config.model_dim // config.num_heads
            cos, sin = rotary_tables(config.max_seq_len, size, config.rotary)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    forward = gpt_forward


# %% The measurement
def flops_per_token(config: GPTConfig, vocab_size: int, seq_len: int) -> float:
    """FLOPs of a token, forward and backward: 6 for each weight of a matrix product, 6 · seq_len · model_dim for each attention layer.

    Attention counts what causality leaves: on average a token sees half of the row. Windows, borders of documents and words that a sampled softmax leaves out are not subtracted, so for `record` it is a nominal count.
    """
    specs = param_specs(config, vocab_size)
    weights = sum(math.prod(spec.shape) for spec in specs if spec.is_matmul)
    layers = sum(spec.attention for spec in layout_of(config))
    return 6.0 * weights + 6.0 * layers * seq_len * config.model_dim
