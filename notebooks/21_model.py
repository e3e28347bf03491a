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
# # The model, assembled: banks and one table
#
# ```{admonition} Cost box
# About ten seconds on two CPU cores; within three minutes on one GPU. Record 1, llm.c (\@karpathy and its contributors), kept equal matrices together; records 27, 36 and 61 (\@byronxu99,
# \@classiclarryd, \@ChrisJMcCormick) came back to it.
# ```
#
# ## The problem
#
# The plain GPT-2 of [chapter 03](03_baseline.py) holds its 124 million parameters in **148 tensors**. To the formulas it makes no difference how many tensors hold them. To everything around the formulas it does. An optimizer visits 148 tensors, a communication library
# announces 148 reductions unless it buckets them, a checkpoint lists 148 names. And an optimizer that multiplies matrices, as all the good ones in this book do, launches its kernels once for every one of 48 matrices that are far too small to fill a GPU.

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
import torch

from speedrun.model import gpt
from speedrun.model.baseline import GPT2

with torch.device("meta"):
    plain = GPT2(gpt.GPTConfig(), 50_257)  # the config is below; its defaults are GPT-2's
shapes = [tuple(parameter.shape) for parameter in plain.parameters()]
matrices = [shape for shape in shapes if len(shape) == 2][2:]  # without the two embeddings
assert len(shapes) == 148 and len(matrices) == 48 and len(set(matrices)) == 4
print(
    f"{len(shapes)} tensors; {len(matrices)} matrices in the blocks, of {len(set(matrices))} shapes"
)
print(sorted(set(matrices)))

# %% [markdown]
# Forty-eight matrices, four shapes. A list of blocks hides that regularity, and the rest of the program has to find it again. llm.c, record 1, never lost it: C has no lists of blocks, so it keeps sixteen tensors, each with a first dimension for the layers. The ports to PyTorch unpacked them.
#
# Take an optimizer that works on whole matrices and whose work eight GPUs share ([chapter 20](20_many_gpus.py); Muon of [chapter 12](12_newton_schulz.py) replaces a gradient by a matrix whose singular values are all near 1, which does not split well). Each GPU takes some of the matrices, in rounds of eight. The two matrices of the MLP make two groups of twelve, and the second round of each is half empty:


# %%
def busy(groups: list[int], ranks: int = 8) -> tuple[int, float]:
    """Rounds in which `ranks` GPUs work off groups of equal matrices, and the share of GPU time that is work."""
    rounds = sum(-(-group // ranks) for group in groups)
    return rounds, sum(groups) / (rounds * ranks)


separate, together = busy([12, 12]), busy([24])
assert separate == (4, 0.75) and together == (3, 1.0)
print(f"two groups of 12: {separate[0]} rounds, {separate[1]:.0%} busy")
print(f"one group of 24: {together[0]} rounds, {together[1]:.0%} busy")

# %% [markdown]
# In that update a quarter of the machine is idle. Record 27 stored both matrices of the MLP with one shape, so that 24 of them fill three rounds, and re-arranged weights at every step to get there; record 61 stored them together for good.
#
# ```{admonition} Prediction
# Stack the equal matrices of all layers into one tensor, a **bank** with one slice a layer, and the 148 tensors become 16. The forward pass then takes slices. Gradients flow back through the slicing, and there lies a trap. A layer can take its slice as `bank[i]`, or all layers can share one `bank.unbind()`. For twelve layers, **how many times the bank's size does autograd write to assemble its gradient, in each case**: once, twelve times, or more?
# ```
#
# ## The idea
#
# Keep the mathematics of chapter 03 and change where the weights live. Everything that the optimizer, the checkpoint and the communication need to know about a parameter is said once, in a table with one row per parameter. The forward pass is a function of the banks.
#
# ## The code
#
# First the row of that table, a `ParamSpec`. Its columns come in two groups. The model's own say what a parameter is: its name and shape; how it starts (a mean and a standard deviation, normal or uniform; gains are ones, that is mean 1 and deviation 0); and whether every token is multiplied with it, which is what costs FLOPs (`is_matmul`). Of a bank they say which layer each slice belongs to (`layers`), and of a bank of matrices how many are stacked in a slice (`matrices`): queries', keys' and values' are three, and an optimizer that works on whole matrices must not take them for one.
#
# The other columns are for the optimizer:
#
# - `optim` is the rule that turns a gradient into a step: [AdamW](03_baseline.py), Adam with a decay of another kind, [Muon](13_muon.py) or [SOAP](12_newton_schulz.py). The model leaves it open; the run's config decides, and `assign_optimizers` of [chapter 20](20_many_gpus.py) fills it in.
# - `comm` is how several GPUs share the update. *Replicated*: each does all of it. *Sharded*: each updates its own slices and sends them to the others. *Sharded, sparse*: so, for a table of which a batch looks up only a few rows.
# - `lr_mul` and `wd_mul` are multiples of the rule's learning rate and of its weight decay. An embedding may want a larger rate than everything else, and a bias is not decayed at all (0).
# - `shape_scale` is one more multiple of Muon's rate, for a tall matrix: $\sqrt{\text{rows}/\text{cols}}$.
# - `betas` are Adam's two decay rates where a parameter needs its own.
# - `tied_to` names the parameter whose transpose this one is, until both go their own ways.
#
# The record's trainer has had such a `param_table` since record 61, and most of our names come from there.
#
# Why do the two matrices of the MLP have a bank each, and not the record's one for both? Here each matrix is stored as it is multiplied, (outputs, inputs), and so `mlp_up` and `mlp_down` have different shapes. Upstream has three banks: queries and keys, values and outputs, and the MLP, whose second matrix is stored transposed. We have four, and pay for it in the optimizer; how much is counted where this chapter comes to costs.

# %%
#| default_exp params
#| export
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: what it is, how it starts, how it is updated. A row of the model's table."""

    name: str
    shape: tuple[int, ...]
    layers: tuple[int, ...] = ()
    """The layer of each slice of a bank; empty: it is no bank."""
    init_mean: float = 0.0
    init_std: float = 0.0
    init_uniform: bool = False
    """Uniform with that mean and deviation, not normal."""
    matrices: int = 0
    """Matrices stacked in each slice of a bank; 0: it is no bank of matrices."""
    is_matmul: bool = False
    """Costs one multiply-add a weight and token."""
    is_scalar: bool = False
    """One weight, or a few, by which vectors are mixed."""
    optim: Literal["adamw", "adam", "muon", "soap"] = "adamw"
    """The update rule. adamw: every weight decays. adam: only weights that the step makes smaller anyway. muon, soap: on whole matrices."""
    comm: Literal["replicated", "sharded", "sharded_sparse"] = "replicated"
    """replicated: all-reduce, every rank updates all. sharded: reduce-scatter, update the own shard, all-gather. sharded_sparse: the same, but only gradients of rows looked up are sent."""
    lr_mul: float | tuple[float, ...] = 1.0
    """Multiple of the rule's learning rate; muon: may be several, for a bank's matrices in turn."""
    shape_scale: float = 1.0
    """muon: one more multiple, sqrt(rows / cols) of a tall matrix; ignored without optim.muon.scale_by_shape."""
    wd_mul: float = 0.0
    """Multiple of the rule's weight decay; 0: no decay."""
    betas: tuple[float, float] | None = None
    """adam, adamw: decay of the two moments; None: the config's."""
    tied_to: str = ""
    """The parameter that this one is the transpose of until they are untied."""


# %%
qkv = ParamSpec("attention_qkv", (12, 2304, 768), layers=tuple(range(12)), matrices=3)
assert len(qkv.layers) == qkv.shape[0] and qkv.wd_mul == 0.0
assert qkv.shape[1] == qkv.matrices * 768, "queries, keys and values: three square matrices a layer"

# %% [markdown]
# What the table lists follows from the model's config: four numbers that say its shape, the initial deviation, and six groups of options, each a config of its own from the chapter that explains it: `block` ([a modern block](05_modern_block.py)), `rotary` ([rotary positions](06_rotary.py)), `embedding` and `layout` ([residual wiring](07_plumbing.py)), `attention` ([windows and YaRN](10_windows_and_yarn.py), [backends](11_attention_backends.py)), and `head` ([logits and loss](08_logits.py)). A command line reaches into the groups, as in `--model.block.norm rms`. With the defaults it is GPT-2.

# %%
#| default_exp model.gpt
#| export
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


# %% [markdown]
# `param_specs` makes the table, in the order in which the forward pass comes to the parameters. `optim` stays at its default, for the optimizer to fill in:


# %%
#| export
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


# %%
#| export
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


# %%
table = param_specs(GPTConfig(), 50_257)
numbers = {row.name: math.prod(row.shape) for row in table}
assert len(table) == 16 and sum(numbers.values()) == 124_439_808
decaying = sum(numbers[row.name] for row in table if row.wd_mul)
assert decaying == sum(math.prod(shape) for shape in shapes if len(shape) == 2)
print(f"{len(table)} tensors, {sum(numbers.values()):,} parameters: the same model")

# %% [markdown]
# The rule "what has two dimensions decays" can no longer be read off a shape, since a bank of biases is two-dimensional. llm.c has the same trouble, and names its six decaying tensors by number. That is the kind of accident the table exists to prevent: a property that used to follow from something else is now said (`wd_mul`).
#
# ### Initialisation
#
# Initial values should depend on the seed and on nothing else. Not on the order of the rows: else adding a parameter in some later chapter would change all the others, and every comparison across that chapter would compare two random draws as well. Not on the device, and not on the number of ranks. Each row therefore draws from a generator of its own, seeded by a hash of the seed and the row's name, or, if that has changed, the name that it was first measured under. Only where one parameter is tied to another do both start alike, transposed.


# %%
#| export model.init
import math
import zlib

import torch
from torch import Tensor

DRAWN_AS = {  # the names that these had in the first measured runs, whose initial values are still theirs
    "embed": "token_embedding",
    "pos_embed": "position_embedding",
    "value_embeds": "value_embedding",
    "lm_head": "head",
}


def init_parameter(spec: ParamSpec, seed: int) -> Tensor:
    """The initial values of one parameter, float32 on the CPU: a function of the seed and the row alone."""
    generator = torch.Generator().manual_seed(
        zlib.crc32(f"{seed}:{DRAWN_AS.get(spec.name, spec.name)}".encode())
    )
    std = spec.init_std
    draw = torch.zeros(spec.shape)
    if spec.init_uniform:
        std *= math.sqrt(3)
        draw.uniform_(-1, 1, generator=generator)
    elif std:
        draw.normal_(generator=generator)
    return draw.mul_(std).add_(spec.init_mean)  # in place: some have 200 million entries


@torch.no_grad()
def init_weights(model, seed: int) -> None:
    """Give a model, in place and on whatever device it is, the initial values of a seed; tied parameters start equal, transposed."""
    for spec in model.specs:
        model.get_parameter(spec.name).copy_(init_parameter(spec, seed))
    for spec in model.specs:
        if spec.tied_to:
            model.get_parameter(spec.tied_to).copy_(model.get_parameter(spec.name).mT)


# %%
deviation = next(row.init_std for row in table if row.name == "attention_out")
small_row = ParamSpec("attention_out", (2, 64, 64), init_std=deviation)
other_row = ParamSpec("mlp_down", (2, 64, 64), init_std=deviation)
drawn = init_parameter(small_row, 7)
assert torch.equal(drawn, init_parameter(small_row, 7))
assert not torch.equal(drawn, init_parameter(small_row, 8)), "another seed"
assert not torch.equal(drawn, init_parameter(other_row, 7)), "another name"
heads = (ParamSpec(name, (64, 64), init_std=deviation) for name in ("head", "lm_head"))
assert torch.equal(*(init_parameter(row, 7) for row in heads)), "a name of then and of now"
assert abs(drawn.std().item() / (0.02 / math.sqrt(24)) - 1) < 0.05
print(f"attention_out starts with a deviation of {drawn.std():.5f} = 0.02 / √24")

# %% [markdown]
# ### Slices of a bank: index or unbind
#
# Now the prediction. A layer can take its slice of a bank in two ways that look alike: `bank[i]` for each layer, or `bank.unbind()` once. Going forward both are free. Going backward, the gradient of `bank[i]` is a tensor of the *whole bank's* size, zero but for one slice, and $L$ of them are
# then added up. `unbind` is one operation with $L$ outputs, so its gradient is one operation too: a stack. Count what each writes, with a mode that sees every tensor operation:

# %%
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CountWrites(TorchDispatchMode):
    """Counts the elements of every tensor that an operation returns in new memory."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        is_view = any(argument.alias_info for argument in operation._schema.arguments)
        made = (
            [] if is_view else [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        )
        self.elements += sum(tensor.numel() for tensor in made)
        return out


def written(take) -> float:
    """Elements written by the backward pass through `take`, in units of the bank."""
    size = tier.pick(cpu=64, gpu=768)
    bank = torch.randn(12, size, size, device=tier.device, requires_grad=True)
    loss = sum((piece * piece.detach()).sum() for piece in take(bank))
    with CountWrites() as count:
        loss.backward()
    return count.elements / bank.numel()


# %%
indexed, unbound = (
    written(lambda bank: [bank[i] for i in range(12)]),
    written(lambda bank: bank.unbind()),
)
gigabytes = numbers["mlp_up"] * 4 / 1e9
assert round(unbound - 1) == 1 and round(indexed - 1) == 23  # without the slices' own gradients
print(
    f"indexing writes {indexed - 1:.0f} times the bank to assemble its gradient, unbind {unbound - 1:.0f}"
)
print(
    f"for mlp_up {(indexed - 1) * gigabytes:.1f} GB instead of {(unbound - 1) * gigabytes:.1f}, every micro-batch"
)

# %% [markdown]
# Twelve full-size gradients, and eleven sums of them. A compiler may remove this waste; `unbind` writes the bank once and does not depend on one. Upstream reads its banks by `unbind`, too.
#
# ### The forward pass
#
# The layers are those of chapter 03, as functions of their weights. Those come as a dictionary by name, since the config decides what a layer has; what is not in it is not computed. MLP and norms are [chapter 05](05_modern_block.py)'s, and the loss in one pass with products in eight bits, `head_loss_op`, [chapter 19](19_head_and_loss.py)'s. Which parts a layer has, and what is added to its input, is a row of [chapter 07](07_plumbing.py)'s layout.


# %%
#| export
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


# %% [markdown]
# Rows come in two kinds. A row of the stream is seen whole, and goes through PyTorch's attention. A *packed* row holds whole documents, one after the other ([chapter 02](02_data.py)), and [chapter 11](11_attention_backends.py)'s attention keeps them apart. There positions count from the beginning of each document, so that it does not matter where in the row one lies. What depends on the row is worked out once, for all layers: angles, and the kernel's tiles.


# %%
#| export
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


# %% [markdown]
# A layer has two halves, attention and MLP, and each ends with a product of matrices whose result is to be added to the stream. Where that sum is taken makes no difference to its value, but to a compiler that sees one half at a time it does: a sum at the end of a half is a kernel of its own, and at the beginning of the next half it shares one with the mixing and the norm there. So a half hands on two things, the stream and what is still to be added (`delta`). [Chapter 16](16_compile.py) compiles these four functions and not the whole, and says what it gains.


# %%
#| export
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


# %%
from speedrun.model.mlp import BlockConfig

ones, blank = torch.ones(1, 2, 8), {"mlp_up": torch.zeros(32, 8), "mlp_down": torch.zeros(8, 32)}
assert added(ones, None) is ones, "nothing is copied where nothing is to be added"
stream, delta = mlp_half(ones, ones, blank, BlockConfig(norm="rms", biases=False))
assert torch.equal(stream, 2 * ones) and not delta.any(), "first the sum, then the MLP"


# %%
#| export
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


# %% [markdown]
# Attention's settings change with the windows of a schedule: how far it looks, and, with YaRN ([chapter 10](10_windows_and_yarn.py)), by how much it turns and scales.


# %%
#| export
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


# %% [markdown]
# And a thin class collects them: it registers a parameter for each row of the table, and keeps the table as `model.specs`, because optimizer and checkpoint will ask for it.


# %%
#| export
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


# %% [markdown]
# A document in the middle of a packed row gets the logits that it gets alone:

# %%
turned = GPTConfig(
    num_layers=2, num_heads=2, model_dim=64, max_seq_len=32, rotary=RotaryConfig("half_rope")
)
model = GPT(turned, 288).to(tier.device)
(settings,) = attention_settings(turned, [(0, 0)], torch.device(tier.device))
row = torch.randint(288, (1, 32), generator=torch.Generator().manual_seed(1)).to(tier.device)
borders = torch.tensor([0, 7, 25, 32], dtype=torch.int32, device=tier.device)
with torch.no_grad():
    together = model(row, None, Packed(borders, torch.tensor(18, dtype=torch.int32), *settings))
    off = (together[:, 7:25] - model(row[:, 7:25])).abs().max().item()
assert off < 1e-4, "its neighbours and its place do not matter"
print(f"logits differ by {off:.0e}")

# %%
model = GPT(GPTConfig(num_layers=2, num_heads=2, model_dim=64, max_seq_len=32), 288).to(tier.device)
tokens = torch.randint(288, (3, 33), generator=torch.Generator().manual_seed(0)).to(tier.device)
inputs, targets = tokens[:, :-1], tokens[:, 1:]
assert model(inputs).shape == (3, 32, 288)
assert abs(model(inputs, targets).item() - math.log(288)) < 0.1
changed = inputs.clone()
changed[:, 20] = (changed[:, 20] + 1) % 288
assert torch.equal(model(inputs)[:, :20], model(changed)[:, :20]), "no token sees a later one"
assert not torch.equal(model(inputs)[:, 20:], model(changed)[:, 20:]), "and the later ones do"
try:
    GPT(GPTConfig(num_heads=5), 288)
    raise AssertionError("accepted")
except ValueError as error:
    print(error)

# %% [markdown]
# With or without banks the whole forward pass can be captured as *one* graph. (The trainer compiles it in parts all the same, for the reasons that [chapter 16](16_compile.py) gives.) `fullgraph=True` makes the compiler refuse if there is anything that it has to leave to Python. (The backend `eager` captures the graph and generates no code, which is all that is wanted here and takes a second.)

# %%
compiled = torch.compile(model, fullgraph=True, backend="eager")
assert torch.equal(compiled(inputs, targets), model(inputs, targets))
print("captured whole, and equal")

# %% [markdown]
# ### Equivalence with GPT-2
#
# "The same GPT-2" is a strong claim, and cheap to test: give both models the same weights in double precision, and compare the loss and *every gradient*. A gradient is a far more sensitive witness than a loss, since each of its numbers can be wrong on its own. The weights get some noise first, so that no zero bias and no unit gain can hide a term that was forgotten. `state_dict_from_gpt2` stacks the tensors of chapter 03's blocks into banks; it serves for weights and gradients alike.

# %%
from torch import Tensor

GPT2_TO_BANKS = {
    "attention_norm": "norm_1",
    "attention_qkv": "attention.qkv",
    "attention_out": "attention.out",
    "mlp_norm": "norm_2",
    "mlp_up": "mlp.up",
    "mlp_down": "mlp.down",
}


def state_dict_from_gpt2(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Tensors of chapter 03's GPT2 (weights or gradients, by name) as banks: those of all blocks stacked."""
    banks = {"embed": state["tokens.weight"], "pos_embed": state["positions.weight"]}
    for bank, layer in GPT2_TO_BANKS.items():
        for part, suffix in (("weight", "_gain" if "norm" in bank else ""), ("bias", "_bias")):
            banks[bank + suffix] = torch.stack(
                [state[f"blocks.{i}.{layer}.{part}"] for i in range(layers)]
            )
    return banks | {"final_norm_gain": state["norm.weight"], "final_norm_bias": state["norm.bias"]}


# %%
shape = {"num_layers": 3, "num_heads": 4, "model_dim": 64, "max_seq_len": 32}
fresh = state_dict_from_gpt2(GPT2(GPTConfig(**shape), 288).state_dict(), 3)
for row in reversed(param_specs(GPTConfig(**shape), 288)):
    assert abs(fresh[row.name].mean() - row.init_mean) < 0.01, row.name
    assert math.isclose(fresh[row.name].std().item(), row.init_std, rel_tol=0.15), row.name
print("every tensor starts with the mean and deviation of chapter 03's")

# %%
torch.manual_seed(0)
reference = GPT2(GPTConfig(**shape), 288).double()
banked = GPT(GPTConfig(**shape), 288).double()
with torch.no_grad():
    for parameter in reference.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
banked.load_state_dict(state_dict_from_gpt2(reference.state_dict(), 3))
reference, banked = reference.to(tier.device), banked.to(tier.device)
losses = [model(inputs, targets) for model in (reference, banked)]
for loss in losses:
    loss.backward()
gradients = state_dict_from_gpt2({name: p.grad for name, p in reference.named_parameters()}, 3)
worst = max(
    ((gradients[name] - p.grad).norm() / p.grad.norm()).item()
    for name, p in banked.named_parameters()
)
assert abs(losses[0] - losses[1]) < 1e-12 and worst < 1e-12
print(
    f"losses differ by {abs(losses[0] - losses[1]).item():.1e}, gradients by {worst:.1e} of their length"
)

# %% [markdown]
# ## The measurement
#
# With a table, questions about the model become sums over its rows. The one that every later chapter comes back to: where are the parameters, and where is the work? `flops_per_token` counts six FLOPs for each weight that `is_matmul` marks, two of them forward and four backward, and attention's own products, which have no weights:


# %%
#| export
def flops_per_token(config: GPTConfig, vocab_size: int, seq_len: int) -> float:
    """FLOPs of a token, forward and backward: 6 for each weight of a matrix product, 6 · seq_len · model_dim for each attention layer.

    Attention counts what causality leaves: on average a token sees half of the row. Windows, borders of documents and words that a sampled softmax leaves out are not subtracted, so for `record` it is a nominal count.
    """
    specs = param_specs(config, vocab_size)
    weights = sum(math.prod(spec.shape) for spec in specs if spec.is_matmul)
    layers = sum(spec.attention for spec in layout_of(config))
    return 6.0 * weights + 6.0 * layers * seq_len * config.model_dim


# %%
total = flops_per_token(GPTConfig(), 50_257, 1024)
assert total == 6 * (12 * 12 * 768**2 + 50_257 * 768) + 6 * 12 * 1024 * 768, "chapter 03's formula"
groups = {
    "embedding / head": ("embed",),
    "attention matrices": ("attention_qkv", "attention_out"),
    "MLP matrices": ("mlp_up", "mlp_down"),
}
parameters = {label: sum(numbers[name] for name in names) for label, names in groups.items()}
flops = {label: 6.0 * count for label, count in parameters.items()}
flops["attention scores and mixing"] = 6.0 * 12 * 1024 * 768
parameters["positions, norms, biases"] = sum(numbers.values()) - sum(parameters.values())
shares = {label: amount / total for label, amount in flops.items()}
assert math.isclose(sum(shares.values()), 1.0) and max(shares, key=shares.get) == "MLP matrices"
assert (
    0.28 < shares["embedding / head"] < 0.30
    and 0.065 < shares["attention scores and mixing"] < 0.075
)
whole_square = (
    2 * flops["attention scores and mixing"] / (total + flops["attention scores and mixing"])
)
assert 0.125 < whole_square < 0.135, "as nanoGPT and PaLM count"
print(
    f"{total / 1e6:.0f} MFLOPs a token:", {label: f"{share:.0%}" for label, share in shares.items()}
)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two stacked bars: the shares of embedding, attention and MLP in the parameters and in the FLOPs of GPT-2 124M"}}
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from speedrun.lab.results import figure_style

figure_style()
fig, axis = plt.subplots(figsize=(8, 2.6))
labels = list(dict.fromkeys([*parameters, *flops]))
for y, amounts in ((1, parameters), (0, flops)):
    left = 0.0
    for n, label in enumerate(labels):
        share = 100 * amounts.get(label, 0.0) / sum(amounts.values())
        axis.barh(y, share, left=left, color=f"C{n}", height=0.6)
        if share > 4:
            axis.text(left + share / 2, y, f"{share:.0f}%", ha="center", va="center", color="white")
        left += share
axis.set_yticks([1, 0], ["parameters", "FLOPs"])
axis.set_xlabel("share (%)")
axis.grid(False)
axis.set_xlim(0, 100)
handles = [Patch(color=f"C{n}", label=label) for n, label in enumerate(labels)]
axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=3)
axis.set_title(
    f"GPT-2 124M: one matrix, the head, is {shares['embedding / head']:.0%} of the FLOPs"
)
plt.show()

# %% [markdown]
# *Computed from the parameter table: GPT-2 124M, rows of 1,024 tokens.*
#
# The MLP is the largest part of the work, and the head, a single matrix, comes next with 29 per cent. Attention's own products, scores and the mixing of values, are seven per cent at this length, or thirteen by the usual formula, which counts the whole square of queries and keys and not the causal half. Size alone does not explain where the records went. Eight-bit floats came to the head first (record 19), one matrix with three scales, which were constants, and to the larger MLP only 65 records later (84 for the first matrix, 89 for the second). For queries, keys and values they came with record 90. And the loss, which reads what the head writes, was fused four times over.
#
# ## What it buys, and what it costs
#
# Nothing yet, in seconds, that this chapter measures: AdamW on one GPU updates 148 tensors as it does 16. What a bank buys is the chapters that follow. A checkpoint has sixteen names that mean something. A bank of equal matrices is sharded over eight GPUs by slicing it, padded where eight does not divide. And where an optimizer needs fifteen matrix products per gradient and step, as Muon does, a bank makes each of them one call where a list makes twelve (below). It also met a bug: in a graph that holds a whole bank, Inductor of PyTorch 2.10 to 2.13 fuses two reductions and leaves most of the gradient of gains that are slices unwritten, without an error. [Chapter 16](16_compile.py) compiles the model in parts whose inputs are the slices, and so has nothing to do with it.


# %%
class CountProducts(TorchDispatchMode):
    """Counts the matrix products that are called."""

    launched = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.launched += "mm" in operation.__name__
        return operation(*args, **(kwargs or {}))


size = tier.pick(cpu=64, gpu=768)
bank = torch.randn(12, size, size, device=tier.device)
with CountProducts() as apart:
    separately = [matrix @ matrix.mT for matrix in bank.unbind()]
with CountProducts() as stacked:
    at_once = bank @ bank.mT
assert (apart.launched, stacked.launched) == (12, 1)
assert torch.allclose(at_once, torch.stack(separately), atol=1e-4)
print(f"{apart.launched} calls, or {stacked.launched}: the same numbers")

# %% [markdown]
# A launch costs roughly five microseconds. A product of two 768-wide matrices is $2 \cdot 768^3$ FLOPs, about one microsecond of an H100. Twelve in one launch keep it busy; one at a time they leave it waiting for the next.
#
# The cost is the stack: one more copy of the gradients per micro-batch, read and written. The rival design stacks matrices when the optimizer needs them, weights and gradients, once a step. Upstream, as this book calls modded-nanogpt's own trainer, did that for months. Count both:

# %%
block_weights = sum(math.prod(shape) for shape in matrices)
stack_gb = 2 * 4 * block_weights / 1e9  # gradients, read and written, four bytes
demand_gb = 2 * stack_gb  # weights as well
assert 0.6 < stack_gb < 0.7 and 8 * stack_gb == 4 * demand_gb
assert round(8 * stack_gb / 3.35, 1) == 1.6, "ms at an H100's 3.35 TB/s"
print(f"a stack of gradients moves {stack_gb:.2f} GB, {stack_gb / 3.35:.2f} ms of an H100's memory")
print(f"once a step on eight GPUs: {stack_gb:.2f} GB against {demand_gb:.2f} on demand")
print(f"eight micro-batches on one GPU: {8 * stack_gb:.1f} GB against {demand_gb:.2f}")

# %% [markdown]
# And our four banks are not the ones that fill eight GPUs best:

# %%
banks = {row.name: row.shape[0] * row.matrices for row in table if row.matrices}
assert banks == {"attention_qkv": 36, "attention_out": 12, "mlp_up": 12, "mlp_down": 12}
assert busy([12]) == (2, 0.75) and busy([36]) == (5, 0.9) and busy([12, 12]) == separate
for name, count in banks.items():
    print(f"{name:13} {count} matrices, {busy([count])[0]} rounds, {busy([count])[1]:.0%} busy")

# %% [markdown]
# So in [chapter 20](20_many_gpus.py)'s optimizer the two MLP banks have the problem we began with: four rounds for three, a quarter of the GPUs' time idle. `attention_out` takes two more. For Muon on eight GPUs the record's layout is the better one, and we have not adopted it.
#
# In the contest, where each GPU has one micro-batch a step, the bank costs half of stacking on demand. On a single GPU that works through eight it costs four times as much, 1.6 ms of a step that takes more than a second. The bank is chosen for its one name per thing and not for these bytes. And a bank is rigid. All layers have the same shapes, so a model that drops the attention of one layer (as the record's does) must leave a hole, or keep a list of which layer owns which slice. Chapter 07 makes that list.
#
# ## What does not work
#
# The obvious way to read a bank is `bank[i]`. It is correct, its tests pass, and uncompiled it writes **twenty-three times** as much as `unbind` does to assemble a bank's gradient. A loss curve does not show it; counting does.
#
# A gentler design would keep the list of blocks and let each of their weights be a *view* into a bank, with gradients that are views into a bank of gradients, so that the model stays as it was and the optimizer sees one tensor. It works, until it does not:

# %%
bank, kept = torch.randn(3, 4), torch.zeros(3, 4)
views = [torch.nn.Parameter(bank[i]) for i in range(3)]
for view, slot in zip(views, kept):
    view.grad = slot
sum((view * view).sum() for view in views).backward()
assert torch.allclose(kept, 2 * bank)
print("the gradients are in the bank")
torch.optim.SGD(views, lr=0.1).zero_grad()  # sets them to None, as is its habit
sum((view * view).sum() for view in views).backward()
assert views[0].grad.data_ptr() != kept.data_ptr()
print("after the first zero_grad they are elsewhere, and nobody says so")

# %% [markdown]
# The optimizer would go on reading a bank that nobody writes. A failure that is silent disqualifies a design, however gentle. Here the bank is the parameter, and the slices are made in the forward pass, where autograd can see them. (Chapter 20's optimizer does keep gradients as views, of what it sends to other GPUs. It looks at their addresses in every step, and raises an error if one has moved.)
#
# ## Exercises
#
# 1. How much memory does training this model take before the first activation? Write `state_bytes(table)`: weights, gradients and the two moments of AdamW, all in 32 bits.


# %% tags=["solution"]
def state_bytes(table: tuple[ParamSpec, ...]) -> int:
    """Bytes of weights, gradients and two AdamW moments in float32."""
    return sum(math.prod(row.shape) for row in table) * 4 * 4


# %%
small = state_bytes((ParamSpec("w", (2, 10, 10)), ParamSpec("b", (3,))))
assert small == 3248, f"200 + 3 weights, four numbers of 4 bytes for each: 3,248 bytes, not {small}"
print(f"{state_bytes(table) / 2**30:.2f} GiB before the first token")

# %% [markdown]
# 2. Record 5 padded the vocabulary to 50,304 and changed to six heads of 128. Write `count(config, vocab_size)` from the table, and find out how many parameters each of the two changes adds.


# %% tags=["solution"]
def count(config: GPTConfig, vocab_size: int) -> int:
    """All parameters."""
    return sum(math.prod(row.shape) for row in param_specs(config, vocab_size))


# %%
base, wider = count(GPTConfig(), 50_257), count(GPTConfig(), 50_304)
assert base == 124_439_808, (
    f"GPT-2 has 124,439,808 parameters, not {base:,} (all of them count, not only matrices)"
)
assert wider - base == 47 * 768, f"47 more rows of 768 are 36,096 parameters, not {wider - base:,}"
six = count(GPTConfig(num_heads=6), 50_257)
assert six == base, f"the number of heads does not change the count, but yours gives {six:,}"
print(
    f"padding adds {47 * 768:,} parameters that no token uses; six heads instead of twelve add none"
)

# %% [markdown]
# 3. Record 89 has 60 blocks of query and key matrices, 20 square matrices for values and outputs, and 22 of MLPs, each kind in a bank. Find `padding(matrices, ranks)`: how many empty slices must be added so that every rank always has work, and what share of the bank they are. Check it with `busy`.


# %% tags=["solution"]
def padding(matrices: int, ranks: int) -> tuple[int, float]:
    """Empty slices to add until `ranks` divides the bank, and their share of it."""
    empty = -matrices % ranks
    return empty, empty / (matrices + empty)


# %%
right = {(60, 8): (4, 4 / 64), (20, 8): (4, 4 / 24), (22, 8): (2, 2 / 24), (24, 8): (0, 0.0)}
right[20, 16] = (12, 12 / 32)
slices = {sizes: padding(*sizes) for sizes in right}
for (matrices, ranks), (empty, share) in slices.items():
    wanted = right[matrices, ranks]
    assert (empty, share) == wanted, (
        f"{matrices} matrices on {ranks} ranks: {wanted[0]} empty slices, a share of {wanted[1]:.3f} of the bank with them, not {empty} and {share}"
    )
    work = busy([matrices + empty], ranks)[1]
    assert work == 1.0, f"with {matrices} + {empty} slices the ranks are busy for {work:.0%}"
print({f"{n} on {ranks}": f"{e} empty, {share:.0%}" for (n, ranks), (e, share) in slices.items()})
