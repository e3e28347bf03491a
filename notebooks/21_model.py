# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   kernelspec:
#     name: python3
#     display_name: Python 3
#     language: python
# ---

# %% [markdown]
# # The model, assembled: banks and one table
#
# ```{admonition} Cost box
# Any machine: about twenty seconds on two CPU cores, no GPU. Keeping equal matrices together is an idea of records 27, 36 and 61 (byronxu99,
# classiclarryd, ChrisJMcCormick), used here from the start.
# ```
#
# ## The problem
#
# The plain GPT-2 of [chapter 03](03_baseline.py) holds its 124 million parameters in **148 tensors**. To the mathematics that is a matter of taste. To everything around the mathematics it is a bill. An optimizer visits 148 tensors, a communication library
# announces 148 reductions, a checkpoint lists 148 names. And an optimizer that multiplies matrices, as all the good ones in this book do, launches its kernels once for every one of 48 matrices that are far too small to fill a GPU.

# %%
import torch

from speedrun.model.baseline import GPT2, GPT2Options

with torch.device("meta"):
    plain = GPT2(GPT2Options(), 50_257)
shapes = [tuple(parameter.shape) for parameter in plain.parameters()]
matrices = [shape for shape in shapes if len(shape) == 2][2:]  # without the two embeddings
assert len(shapes) == 148 and len(matrices) == 48 and len(set(matrices)) == 4
print(
    f"{len(shapes)} tensors; {len(matrices)} matrices in the blocks, of {len(set(matrices))} shapes"
)
print(sorted(set(matrices)))

# %% [markdown]
# Forty-eight matrices, four shapes. Whoever wrote the model as a list of blocks threw that regularity away, and the rest of the program has to find it again.
#
# Take one customer, the sharded optimizer of chapter 20. Orthogonalising a matrix cannot be split, so eight GPUs each take some of them, in rounds of eight. If the matrices come in groups of twelve, the second round of each group is half empty:


# %%
def busy(groups: list[int], ranks: int = 8) -> tuple[int, float]:
    """Rounds in which `ranks` GPUs work off groups of equal matrices, and the share of GPU time that is work."""
    rounds = sum(-(-group // ranks) for group in groups)
    return rounds, sum(groups) / (rounds * ranks)


separate, together = busy([12, 12, 12, 12]), busy([24, 24])
assert separate == (8, 0.75) and together == (6, 1.0)
print(
    f"four groups of 12: {separate[0]} rounds, {separate[1]:.0%} busy; two groups of 24: {together[0]} rounds, {together[1]:.0%}"
)

# %% [markdown]
# A quarter of the machine idles for want of bookkeeping. That is record 27's observation, in which both matrices of the MLP were stored with one shape so that 24 of them fill three rounds. Upstream reached it by re-arranging weights at
# every step. It is cheaper never to separate them.
#
# ```{admonition} Prediction
# Stack the equal matrices of all layers into one tensor, a **bank** with one slice a layer, and the 148 tensors become 16. The forward pass then takes slices. Gradients flow back through the slicing, and there lies a trap. For a bank of $L$ layers,
# **how many bytes does autograd write to assemble the bank's gradient from $L$ slices of it**: once the bank, twice, or $L$ times?
# ```
#
# ## The idea
#
# Keep the mathematics of chapter 03 and change where the weights live. Everything that the optimizer, the checkpoint and the communication need to know about a parameter is said once, in a table with one row per parameter. The forward pass is a function of
# the banks.
#
# ## The code
#
# The shape of the model is what it was. It will grow a switch with almost every chapter.

# %%
#| default_exp model.gpt
#| export
import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTOptions:
    """The shape of the package's model. The vocabulary comes from the data."""

    layers: int = 12
    """Blocks."""
    heads: int = 12
    """Attention heads; they share the width evenly."""
    width: int = 768
    """Length of the residual stream's vectors."""
    context: int = 1024
    """Longest row of tokens: the number of learned positions."""
    init_std: float = 0.02
    """Standard deviation of the initial weights: 0.02 for a width of 768, more for a narrower model."""


# %% [markdown]
# The table. A row says a parameter's name and shape, how it begins (normal, with a mean and a standard deviation; gains are ones, that is mean 1 and deviation 0), whether it decays, and whether it multiplies the
# stream, which is what costs FLOPs. Later chapters add columns: its update rule, how its gradient travels, its learning-rate multiplier.


# %%
#| export
@dataclass(frozen=True)
class Parameter:
    """A row of the parameter table. It starts as normal(mean, std).

    decay: whether AdamW decays it. multiplies: whether it costs one multiply-add a weight and token.
    """

    name: str
    shape: tuple[int, ...]
    mean: float = 0.0
    std: float = 0.0
    decay: bool = False
    multiplies: bool = False


def parameter_table(options: GPTOptions, vocab_size: int) -> tuple[Parameter, ...]:
    """Every parameter of the model. What begins with the number of layers is a bank: one slice a layer."""
    n, d, std = options.layers, options.width, options.init_std
    adds = std / math.sqrt(2 * n)  # matrices whose output is added to the stream, 2n times in all
    matrix = {"decay": True, "multiplies": True}
    return (
        Parameter("token_embedding", (vocab_size, d), std=std, **matrix),  # multiplies as the head
        Parameter("position_embedding", (options.context, d), std=std, decay=True),
        Parameter("attention_norm_gain", (n, d), mean=1.0),
        Parameter("attention_norm_bias", (n, d)),
        Parameter("attention_qkv", (n, 3 * d, d), std=std, **matrix),
        Parameter("attention_qkv_bias", (n, 3 * d)),
        Parameter("attention_out", (n, d, d), std=adds, **matrix),
        Parameter("attention_out_bias", (n, d)),
        Parameter("mlp_norm_gain", (n, d), mean=1.0),
        Parameter("mlp_norm_bias", (n, d)),
        Parameter("mlp_up", (n, 4 * d, d), std=std, **matrix),
        Parameter("mlp_up_bias", (n, 4 * d)),
        Parameter("mlp_down", (n, d, 4 * d), std=adds, **matrix),
        Parameter("mlp_down_bias", (n, d)),
        Parameter("final_norm_gain", (d,), mean=1.0),
        Parameter("final_norm_bias", (d,)),
    )


# %%
table = parameter_table(GPTOptions(), 50_257)
numbers = {row.name: math.prod(row.shape) for row in table}
assert len(table) == 16 and sum(numbers.values()) == 124_439_808
decaying = sum(numbers[row.name] for row in table if row.decay)
assert decaying == sum(math.prod(shape) for shape in shapes if len(shape) == 2)
print(f"{len(table)} tensors, {sum(numbers.values()):,} parameters: the same model")

# %% [markdown]
# llm.c's rule "what has two dimensions decays" can no longer be read off a shape, since a bank of biases is two-dimensional. That is the kind of accident the table exists to prevent: a property that used to follow from
# something else is now said.
#
# ### Beginning
#
# Initial values should depend on the seed and on nothing else. Not on the order of the rows: else adding a parameter in some later chapter would change all the others, and every comparison across that chapter would compare two random draws as well. Not on the device, and not on the number of ranks. Each row therefore draws from
# a generator of its own, seeded by a hash of the seed and the row's name.


# %%
#| export
def init_parameter(row: Parameter, seed: int) -> Tensor:
    """The initial values of one row, float32 on the CPU: a function of the seed and the row alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{row.name}".encode()))
    values = torch.full(row.shape, row.mean)
    return values + row.std * torch.randn(row.shape, generator=generator) if row.std else values


# %%
deviation = next(row.std for row in table if row.name == "attention_out")
small_row = Parameter("attention_out", (2, 64, 64), std=deviation)
other_row = Parameter("mlp_down", (2, 64, 64), std=deviation)
drawn = init_parameter(small_row, 7)
assert torch.equal(drawn, init_parameter(small_row, 7))
assert not torch.equal(drawn, init_parameter(small_row, 8)), "another seed"
assert not torch.equal(drawn, init_parameter(other_row, 7)), "another name"
assert abs(drawn.std().item() / (0.02 / math.sqrt(24)) - 1) < 0.05
print(f"attention_out starts with a deviation of {drawn.std():.5f} = 0.02 / √24")

# %% [markdown]
# ### The trap
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
    bank = torch.randn(12, 64, 64, requires_grad=True)
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
assert round(unbound) == 2 and round(indexed) == 24
print(
    f"indexing writes {indexed:.1f} banks, unbind {unbound:.1f}: its slices' gradients, and their stack"
)
print(
    f"for mlp_up alone {indexed * gigabytes:.1f} GB instead of {unbound * gigabytes:.1f}, every micro-batch"
)

# %% [markdown]
# Twice per layer, in fact, since each full-size gradient is made and then added. `torch.compile` finds this particular waste and removes it, most of the time. It costs us one word never to depend on that.
#
# ### The forward pass
#
# The layers are those of chapter 03, as functions of their weights:


# %%
#| export
def attention(
    x: Tensor, qkv: Tensor, qkv_bias: Tensor, out: Tensor, out_bias: Tensor, *, heads: int
) -> Tensor:
    """Causal self-attention, (batch, tokens, width) → the same. qkv: (3 · width, width), out: (width, width)."""
    batch, tokens, width = x.shape
    shape = (batch, tokens, 3, heads, width // heads)
    q, k, v = F.linear(x, qkv, qkv_bias).view(shape).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # scaled by 1 / sqrt(head_dim)
    return F.linear(y.transpose(1, 2).reshape(batch, tokens, width), out, out_bias)


def mlp(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """Two linear layers with a GELU between them. up: (4 · width, width), down: (width, 4 · width)."""
    return F.linear(F.gelu(F.linear(x, up, up_bias), approximate="tanh"), down, down_bias)


def norm(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Layer norm over the last dimension."""
    return F.layer_norm(x, gain.shape, gain, bias)


# %%
#| export
NORM = ("attention_norm_gain", "attention_norm_bias")
ATTENTION = (*NORM, "attention_qkv", "attention_qkv_bias", "attention_out", "attention_out_bias")
MLP = ("mlp_norm_gain", "mlp_norm_bias", "mlp_up", "mlp_up_bias", "mlp_down", "mlp_down_bias")


def gpt_forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
    """Logits (batch, tokens, vocab) of inputs, (batch, tokens) int64; with targets the mean cross-entropy, nats."""
    x = F.embedding(inputs, self.token_embedding) + self.position_embedding[: inputs.shape[1]]
    banks = [getattr(self, name).unbind() for name in ATTENTION + MLP]
    for weights in zip(*banks):
        gain, bias, *matrices = weights[: len(ATTENTION)]
        x = x + attention(norm(x, gain, bias), *matrices, heads=self.options.heads)
        gain, bias, *matrices = weights[len(ATTENTION) :]
        x = x + mlp(norm(x, gain, bias), *matrices)
    x = norm(x, self.final_norm_gain, self.final_norm_bias)
    logits = F.linear(x, self.token_embedding)
    if targets is None:
        return logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


# %% [markdown]
# And a thin class collects them. It keeps the table, because everybody else will ask for it.


# %%
#| export
class GPT(nn.Module):
    """The package's model: banks of weights, and the table that describes them."""

    def __init__(self, options: GPTOptions, vocab_size: int, seed: int = 0):
        super().__init__()
        if options.width % options.heads:
            raise ValueError(f"width {options.width} is not a multiple of heads {options.heads}")
        self.options, self.table = options, parameter_table(options, vocab_size)
        for row in self.table:
            self.register_parameter(row.name, nn.Parameter(init_parameter(row, seed)))

    forward = gpt_forward

    def decays(self) -> dict[str, bool]:
        """Which parameters decay, by name."""
        return {row.name: row.decay for row in self.table}


# %%
model = GPT(GPTOptions(layers=2, heads=2, width=64, context=32), 288)
tokens = torch.randint(288, (3, 33), generator=torch.Generator().manual_seed(0))
inputs, targets = tokens[:, :-1], tokens[:, 1:]
assert model(inputs).shape == (3, 32, 288)
assert abs(model(inputs, targets).item() - math.log(288)) < 0.1
changed = inputs.clone()
changed[:, 20] = (changed[:, 20] + 1) % 288
assert torch.equal(model(inputs)[:, :20], model(changed)[:, :20]), "no token sees a later one"
try:
    GPT(GPTOptions(heads=5), 288)
except ValueError as error:
    print(error)

# %% [markdown]
# One promise of the design is that the whole forward pass is *one* graph. `fullgraph=True` makes the compiler refuse if there is anything that it has to leave to Python. (The backend `eager` captures the graph and generates no code, which is all that is wanted here and takes a second.)

# %%
compiled = torch.compile(model, fullgraph=True, backend="eager")
assert torch.equal(compiled(inputs, targets), model(inputs, targets))
print("captured whole, and equal")

# %% [markdown]
# ### The same model
#
# "The same GPT-2" is a strong claim, and cheap to test: give both models the same weights in double precision, and compare the loss and *every gradient*. A gradient is a far more sensitive witness than a loss, since each of its numbers can be wrong on its own. The weights get some noise first, so that no zero
# bias and no unit gain can hide a term that was forgotten.

# %%
#| export
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


# %%
torch.manual_seed(0)
reference = GPT2(GPT2Options(layers=3, heads=4, width=64, context=32), 288).double()
banked = GPT(GPTOptions(layers=3, heads=4, width=64, context=32), 288).double()
with torch.no_grad():
    for parameter in reference.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
banked.load_state_dict(banks_from_blocks(reference.state_dict(), 3))
losses = [model(inputs, targets) for model in (reference, banked)]
for loss in losses:
    loss.backward()
gradients = banks_from_blocks({name: p.grad for name, p in reference.named_parameters()}, 3)
worst = max(
    ((gradients[name] - p.grad).norm() / p.grad.norm()).item()
    for name, p in banked.named_parameters()
)
assert abs(losses[0] - losses[1]) < 1e-12 and worst < 1e-12
print(
    f"losses differ by {abs(losses[0] - losses[1]).item():.0e}, gradients by {worst:.0e} of their length"
)

# %% [markdown]
# ## The measurement
#
# With a table, questions about the model become sums over its rows. The one that every later chapter comes back to: where are the parameters, and where is the work?


# %%
#| export
def model_flops_per_token(options: GPTOptions, vocab_size: int, seq_len: int) -> float:
    """FLOPs of a token, forward and backward: 6 a weight that multiplies, 6 · seq_len · width a layer for attention.

    Attention counts what causality leaves: on average a token sees half of the row.
    """
    weights = sum(
        math.prod(row.shape) for row in parameter_table(options, vocab_size) if row.multiplies
    )
    return 6.0 * weights + 6.0 * options.layers * seq_len * options.width


# %%
from speedrun.model.baseline import flops_per_token

total = model_flops_per_token(GPTOptions(), 50_257, 1024)
assert total == flops_per_token(GPT2Options(), 50_257, 1024)
groups = {
    "embedding / head": ("token_embedding",),
    "attention matrices": ("attention_qkv", "attention_out"),
    "MLP matrices": ("mlp_up", "mlp_down"),
}
parameters = {label: sum(numbers[name] for name in names) for label, names in groups.items()}
flops = {label: 6.0 * count for label, count in parameters.items()}
flops["attention itself"] = 6.0 * 12 * 1024 * 768
parameters["positions, norms, biases"] = sum(numbers.values()) - sum(parameters.values())
shares = {label: amount / total for label, amount in flops.items()}
assert math.isclose(sum(shares.values()), 1.0) and max(shares, key=shares.get) == "MLP matrices"
assert 0.28 < shares["embedding / head"] < 0.30 and shares["attention itself"] < 0.08
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
axis.set_title(f"one matrix, the head, is {shares['embedding / head']:.0%} of the work")
plt.show()

# %% [markdown]
# *Computed from the parameter table: GPT-2 124M, rows of 1,024 tokens.*
#
# The MLP is the largest part of the work, and the head, a single matrix, comes next with nearly a third. Attention itself, the part that everybody draws, is seven per cent at this length. That ordering explains the ladder. Eight-bit floats came to the head first (record 19) and to the MLP next (records 84 and 89), and nobody bothered with the
# rest. The loss, which reads what the head writes, was fused three times over.
#
# ## What it buys, and what it costs
#
# Nothing yet, in seconds. That is worth saying plainly: with AdamW on one GPU, 16 tensors are as good as 148. What a bank buys is the chapters that follow. A checkpoint has sixteen names that mean something. A bank of 24 equal matrices is shared by eight GPUs without remainder. And where an optimizer multiplies each gradient with its own transpose, fifteen times a step, as
# Muon does (chapter 12), a bank makes that one launch where a list makes twelve:


# %%
class CountProducts(TorchDispatchMode):
    """Counts the matrix products that are launched."""

    launched = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.launched += "mm" in operation.__name__
        return operation(*args, **(kwargs or {}))


bank = torch.randn(12, 64, 64)
with CountProducts() as apart:
    separately = [matrix @ matrix.mT for matrix in bank.unbind()]
with CountProducts() as stacked:
    at_once = bank @ bank.mT
assert (apart.launched, stacked.launched) == (12, 1)
assert torch.allclose(at_once, torch.stack(separately), atol=1e-4)
print(f"{apart.launched} launches, or {stacked.launched}: the same numbers")

# %% [markdown]
# A launch costs some five microseconds. A product of two 768-wide matrices is $2 \cdot 768^3$ FLOPs, about one microsecond of an H100. Twelve in one launch keep it busy; one at a time they leave it waiting for the next.
#
# The cost is one extra copy of the gradient per micro-batch, the stack, about a quarter of a gigabyte for this model and a tenth of a millisecond on an H100. And a bank is rigid. All layers have the same shapes, so a model that drops the attention of
# one layer (as the record's does) must leave a hole, or keep a list of which layer owns which slice. Chapter 07 makes that list.
#
# ## What does not work
#
# The obvious way to read a bank is `bank[i]`. It is correct, its tests pass, and the backward pass of an uncompiled step writes twelve times as much as it has to. Nothing in a loss curve shows such a thing. One finds it by counting, or never.
#
# A gentler design would keep the list of blocks and let each of their weights be a *view* into a bank, so that the model stays as it was and the optimizer sees one tensor. PyTorch does not like it. A parameter that is a view is not a leaf, so its gradient is not kept where the optimizer looks; assigning `.grad` by hand to
# views of one gradient bank works until something (compilation, moving the model to another device, loading a checkpoint) replaces a tensor and quietly breaks the sharing. The failure is silent, which disqualifies it: the optimizer would go on updating a bank that nobody reads. Here the bank is the parameter, and the slices are made in
# the forward pass, where autograd can see them.
#
# The other gentle design stacks the matrices when the optimizer needs them. Upstream did that for months. It costs a read and a write of every weight and gradient in every step, in exchange for not touching the model:

# %%
block_weights = sum(math.prod(shape) for shape in matrices)
stacked_gb = 2 * 2 * 4 * block_weights / 1e9  # weights and gradients, read and written, four bytes
assert 1.3 < stacked_gb < 1.4
print(
    f"stacking on demand moves {stacked_gb:.2f} GB a step: {stacked_gb / 3.35:.2f} ms at an H100's 3.35 TB/s"
)

# %% [markdown]
# ## Exercises
#
# 1. How much memory does training this model take before the first activation? Write `state_bytes(table)`: weights, gradients and the two moments of AdamW, all in 32 bits.


# %% tags=["solution"]
def state_bytes(table: tuple[Parameter, ...]) -> int:
    """Bytes of weights, gradients and two AdamW moments in float32."""
    return sum(math.prod(row.shape) for row in table) * 4 * 4


# %%
assert state_bytes((Parameter("w", (10, 10)),)) == 1600
print(f"{state_bytes(table) / 2**30:.2f} GiB before the first token")

# %% [markdown]
# 2. Record 5 padded the vocabulary to 50,304 and changed to six heads of 128. Write `count(options, vocab_size)` from the table, and find out how many parameters each of the two changes adds.


# %% tags=["solution"]
def count(options: GPTOptions, vocab_size: int) -> int:
    """All parameters."""
    return sum(math.prod(row.shape) for row in parameter_table(options, vocab_size))


# %%
base = count(GPTOptions(), 50_257)
assert count(GPTOptions(), 50_304) - base == 47 * 768 and count(GPTOptions(heads=6), 50_257) == base
print(
    f"padding adds {47 * 768:,} parameters that no token uses; six heads instead of twelve add none"
)

# %% [markdown]
# 3. The record has ten attention layers and eleven MLPs, and its banks are padded so that eight ranks share them evenly. Using `busy`, find `padding(matrices, ranks)`: how many empty slices must be added so that every rank always has work, and what share of the bank they are.


# %% tags=["solution"]
def padding(matrices: int, ranks: int) -> tuple[int, float]:
    """Empty slices to add until `ranks` divides the bank, and their share of it."""
    empty = -matrices % ranks
    return empty, empty / (matrices + empty)


# %%
assert padding(24, 8) == (0, 0.0) and padding(22, 8) == (2, 2 / 24)
assert busy([22 + padding(22, 8)[0]])[1] == 1.0
print(
    f"22 MLP matrices: {padding(22, 8)[0]} empty slices; 40 square attention matrices: {padding(40, 8)[0]}"
)
