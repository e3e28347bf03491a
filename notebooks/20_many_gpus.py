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
# # Many GPUs: who updates what
#
# ```{admonition} Cost box
# Under a minute on two CPU cores, where processes that talk through gloo play the GPUs; within three minutes on one GPU. What was measured on one, two and four GPUs is committed.
# Record 6: \@kellerjordan0. Record 15: \@leloykun, \@YouJiacheng. Record 22: \@KonstantinWilleke, \@alexrgilbert, \@adricarda, \@tuttyfrutyee, \@vdlad. Record 23: \@ryanyang0. Record 24: \@vagrawal. Records 36 and 39: \@classiclarryd. Record 44: \@akash5474. Record 53: \@varunneal, \@classiclarryd. Record 57: \@classiclarryd, \@YouJiacheng, \@ChrisJMcCormick. Record 61: \@ChrisJMcCormick. Record 68: \@dhrvji. Record 71: \@roeeshenberg.
# ```
#
# ## The problem
#
# Record 5 ran on eight GPUs, and each of them orthogonalised every matrix. All eight did the same sums and got the same results. Record 6 stopped that: matrix $i$ is updated by GPU $i \bmod 8$, and the results are exchanged.

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
from speedrun.lab.results import public_table

ladder = {row["record"]: row for row in public_table("records")}
before, after = (float(ladder[n]["step_avg_ms"]) for n in ("5", "6"))
assert 175 < before < 183 and 150 < after < 158
print(
    f"a step of record 5: {before:.1f} ms; of record 6: {after:.1f} ms, {1 - after / before:.0%} less"
)

# %% [markdown]
# A seventh of every step was saved, although what one GPU alone has updated, all others now need. Most of this chapter's records make that exchange cheaper.
#
# ```{admonition} Prediction
# Record 89 has 75 million weights in matrices and 560 million in tables, nearly all of them in bfloat16. Every step updates the matrices; every second one the tables too. (Head and embedding are tied at first, and updated as one.) With eight GPUs, **how many megabytes does each of them send in a step of either kind?** (In the first third of the run two batches of a rank touch at most a tenth of the rows of the largest table, which has 290 of the 560 million.) Compare with what it would send if every GPU updated the matrices, and only gradients were summed. Then divide by 450 GB/s, an H100's NVLink in one direction: how much of a step of 31 ms would that be, if nothing overlapped?
# ```
#
# ## The idea
#
# The classic scheme sums gradients over all GPUs, or *ranks*, so that each has the sum (an *all-reduce*), and each updates everything. On a ring of $w$ ranks the sum takes two phases. In the first, pieces travel around and add up until each rank holds one finished piece, $1/w$ of the whole: a *reduce-scatter*. In the second, finished pieces travel around until everybody has all: an *all-gather*. Each half makes every rank send $\frac{w-1}{w}$ of the bytes.
#
# > **An all-reduce is a reduce-scatter and an all-gather. Put the update between the halves.**
#
# Then each rank updates only the piece that it holds, and what travels in the second half are new weights instead of summed gradients. The same bytes are sent, if a weight has as many as its gradient (record 57's 16-bit weights made that true for the matrices). The optimizer's work is divided by $w$, and so is the memory of its state. Rajbhandari and others call it ZeRO's first stage {cite}`rajbhandari2020`. Weights and gradients stay whole on every rank; cutting those, too, is their second and third stage. For Adam any cut will do. For Muon a piece must be whole matrices, so a *bank*, a stack of equal matrices, is cut between them.
#
# Three refinements complete the design:
#
# - **Small parameters** are not worth sharding. Gates and scalars go into one vector, all-reduced in one go, and every rank updates all of it.
# - **Tables of which a step touches few rows** need not send the others' gradients. A rank sends to each owner the rows that its batch has looked up, with their numbers (8 bytes each; upstream's have 4). (New values are gathered whole.)
# - **Order.** All sums are begun at once; then for one parameter after the other: wait for its sum, update, begin to gather. While one is updated, the next ones' sums are on their way. Which order is best depends on sizes, so the caller can give it.
#
# A table says for each parameter how it is communicated and by which rule it is updated. The optimizer knows no parameter by name, and one rank runs the same code as eight.
#
# ## The code
#
# Each rank is a process of its own, and all run the same program. `torch.distributed` connects them: over TCP between CPUs, by a library called *gloo*, and over NVLink between GPUs, by *NCCL*. A *collective* is a call that all ranks make in the same order; a rank that leaves one out makes the others wait, until a timeout (here of thirty minutes) ends the run. So an error that one rank alone raises is a deadlock for the others; what goes wrong on one is told to all before anyone stops. With two ranks that hold [a b] and [c d]:
#
# | collective | the first rank gets | the second |
# | --- | --- | --- |
# | all-reduce | [a+c b+d] | [a+c b+d] |
# | reduce-scatter | [a+c] | [b+d] |
# | all-gather of [x] and [y] | [x y] | [x y] |
# | all-to-all | [a c] | [b d] |
#
# With `async_op=True` a call only begins, and returns something to `wait()` for. Until then the tensors belong to the call: what it reads must not be written, and what it writes must not be read. gloo's `wait` stops Python; NCCL's only makes the GPU's stream wait. (A *stream* is a queue of kernels on the GPU; queues run beside each other, and one can be told to wait for another.) NCCL takes what was begun one after the other, on a stream beside the one that computes. So a gather begins only after all sums that were begun before it.
#
# Gradients are *summed* over ranks, not averaged as elsewhere. Adam and Muon divide the scale away, but clipping does not, so [the trainer](23_training_loop.py) divides every loss by the step's number of batches.
#
# ### Sharded parameters
#
# A bank of 22 matrices cannot be dealt out evenly to four ranks, and collectives want equal pieces. So storage is padded: four ranks have room for 24, of which two are zeros and stay so. (Newton–Schulz maps zero to zero.) Parameter and gradient become *views* of that storage. Autograd adds gradients right where they are sent from, and gathering writes right where the model reads.

# %%
#| default_exp optim.comm
#| export
import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


# %%
#| export
# PyTorch 2.13 has new names for these, and warns of the old ones
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def dist_info() -> tuple[int, int]:
    """This process's rank, and the world size: how many ranks there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Sharded:
    """A parameter whose units, matrices of a bank or rows of a table, are dealt out evenly to the ranks.

    full: all units, padded with zeros to a multiple of the world size; the parameter becomes a view of it. shard: this rank's
    slice of it. full_grad: this rank's gradient of all units, to which autograd adds. grad: the shard's, summed over ranks.
    """

    def __init__(self, name: str, parameter: Tensor, unit: tuple[int, ...]):
        self.rank, self.world = dist_info()
        self.name, self.units = name, parameter.numel() // math.prod(unit)
        per = -(-self.units // self.world)
        self.full = parameter.data.new_zeros(per * self.world, *unit)
        self.full[: self.units] = parameter.data.view(self.units, *unit)
        self.full_grad = torch.zeros_like(self.full)
        parameter.data = self.full[: self.units].view(parameter.shape)
        parameter.grad = self.full_grad[: self.units].view(parameter.shape)
        self.shard = self.my_slice(self.full)
        self.grad = torch.empty_like(self.shard) if self.world > 1 else self.full_grad
        self.work: dist.Work | None = None

    def my_slice(self, full: Tensor) -> Tensor:
        """This rank's slice of a padded tensor, (units, …)."""
        per = len(full) // self.world
        return full[self.rank * per : (self.rank + 1) * per]

    def views(self, shard: Tensor) -> dict[str, Tensor]:
        """By parameter: what a tensor like `shard` holds for it. Here: all of it."""
        return {self.name: shard}

    def full_grads(self) -> dict[str, Tensor]:
        """By parameter: this rank's gradient, without padding, (units, …)."""
        return {self.name: self.full_grad[: self.units]}

    def shard_of(self, full: Tensor) -> Tensor:
        """This rank's shard of a tensor of all units, (units, …)."""
        more = full.new_zeros(len(self.full) - self.units, *full.shape[1:])
        return self.my_slice(torch.cat([full, more]))

    def full_of(self, shard: Tensor) -> Tensor:
        """All ranks' shards in one tensor of all units, (units, …): a copy. A collective."""
        if self.world == 1:
            return shard[: self.units].clone()
        full = shard.new_empty(self.world * len(shard), *shard.shape[1:])
        # as bytes, since NCCL knows no int16, which the mantissas are
        all_gather(full.view(torch.uint8), shard.contiguous().view(torch.uint8))
        return full[: self.units]

    def reduce(self) -> None:
        """Begin to sum the gradient over ranks; each gets its shard's."""
        if self.world > 1:
            self.work = reduce_scatter(self.grad, self.full_grad, async_op=True)

    def gather(self) -> None:
        """Begin to collect all shards from the ranks that updated them."""
        if self.world > 1:
            self.work = all_gather(self.full, self.shard, async_op=True)

    def wait(self) -> None:
        """Wait for the collective that was begun; on a GPU the stream waits, and Python does not."""
        if self.work is not None:
            self.work.wait()
            self.work = None

    def clear(self) -> None:
        """Set the gradient to zero."""
        self.full_grad.zero_()


# %%
import copy

p = torch.nn.Parameter(torch.arange(10.0).view(5, 2))
alone = Sharded("p", p, (2,))
(p * 3).sum().backward()
assert torch.equal(alone.full_grad, torch.full((5, 2), 3.0))
assert alone.shard.data_ptr() == p.data_ptr()

third = copy.copy(alone)  # as the last of three ranks would have it
third.rank, third.world, third.full = 2, 3, torch.zeros(6, 2)
assert torch.equal(third.shard_of(p.detach()), torch.tensor([[8.0, 9.0], [0.0, 0.0]]))
print("five rows for three ranks: two each, and the last one's second row is padding")


# %%
#| export
class Replicated:
    """Small parameters of one dtype that every rank updates: one vector, whose gradient is all-reduced in one go.

    parameters: name → tensor; data and gradient become views. slices: where each stands in the vector. Each begins at
    a multiple of 16 bytes, because matrix products and compiled code want that.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.world, self.slices, end = dist_info()[1], dict[str, slice](), 0
        first = next(iter(parameters.values())).data
        for name, p in parameters.items():
            self.slices[name] = slice(end, end + p.numel())
            end = -(-self.slices[name].stop // 8) * 8
        self.full = self.shard = first.new_zeros(end)
        self.full_grad = self.grad = torch.zeros_like(self.shard)
        for name, p in parameters.items():
            here = self.slices[name]
            self.shard[here] = p.data.flatten()
            p.data, p.grad = self.shard[here].view(p.shape), self.grad[here].view(p.shape)
        self.work: dist.Work | None = None

    def views(self, shard: Tensor) -> dict[str, Tensor]:
        """By parameter: its part of a vector like `shard`, flat."""
        return {name: shard[here] for name, here in self.slices.items()}

    def full_grads(self) -> dict[str, Tensor]:
        return self.views(self.full_grad)

    def shard_of(self, full: Tensor) -> Tensor:
        return full

    def full_of(self, shard: Tensor) -> Tensor:
        return shard.clone()

    def reduce(self) -> None:
        if self.world > 1:
            self.work = dist.all_reduce(self.grad, async_op=True)

    def gather(self) -> None:
        """Nothing to collect: every rank has computed the same."""

    wait, clear = Sharded.wait, Sharded.clear


# %%
pair = {"a": torch.nn.Parameter(torch.ones(3)), "b": torch.nn.Parameter(torch.ones(2, 2))}
small = Replicated(pair)
pair["b"].grad += 1.0
assert small.slices["b"] == slice(8, 12), "b begins at a multiple of 16 bytes"
assert small.grad.tolist() == [0.0] * 8 + [1.0] * 4 + [0.0] * 4, "one vector is summed"

# %% [markdown]
# ### Sparse gradients of embedding tables
#
# A batch of 16,384 tokens looks up at most as many rows of a table that has 377,280. Autograd still writes a dense gradient, of which nearly all is zero. `announce` tells which rows are not. The gradient of a row that is forgotten stays where it is until the row is next announced, so announce too many rather than too few. How many rows everyone sends must be known to *Python*, which allocates the room; so counts travel between CPUs, where asking means no waiting for a GPU. A batch's rows are known long before its gradient, and `exchange` may be called then; if nobody has, `reduce` does it. It is a collective: call it during the backward pass, on all ranks at the same place. No model of this book has such a table yet; tests and measurements take record 89's.


# %%
#| export optim.sparse
import torch
import torch.distributed as dist
from torch import Tensor


class ShardedSparse(Sharded):
    """A sharded table of which a batch looks up few rows: only those rows' gradients travel.

    `announce` says which. `exchange` tells the owners, and may be called before the gradient is there.
    """

    index_work: dist.Work | None = None
    values: Tensor | None = None
    announced = False

    def __init__(self, name: str, parameter: Tensor, unit: tuple[int, ...]):
        super().__init__(name, parameter, unit)
        self.touched = torch.zeros(len(self.full), dtype=torch.bool)
        gpu = parameter.device.type == "cuda" and self.world > 1
        self.cpu_group = dist.new_group(backend="gloo") if gpu else None

    def announce(self, ids: Tensor) -> None:
        """ids: rows that this rank's batch has looked up, on the CPU; any shape, any number of times."""
        assert self.index_work is None, "announce before exchange"
        self.touched[ids.flatten()] = self.announced = True

    def require_announced(self, announced: bool) -> None:
        """Raise RuntimeError for a gradient of unknown rows."""
        if not announced:
            raise RuntimeError("a sparse table's gradient is due, and announce() was not called")

    def exchange(self) -> None:
        """Begin to tell every owner how many rows, and which, this rank will send. All ranks call it, or none."""
        if self.world == 1:  # nobody to tell, and nothing to count
            return self.require_announced(self.announced)
        device, ids = self.full.device, self.touched.nonzero()[:, 0]
        counts = torch.bincount(ids // len(self.shard), minlength=self.world)
        theirs = torch.zeros_like(counts)
        told = counts if self.announced else torch.full_like(counts, -1)
        dist.all_to_all_single(theirs, told, group=self.cpu_group)
        self.require_announced(self.announced and bool(theirs.min() >= 0))  # all ranks stop
        self.values = None
        self.sent, self.received = counts.tolist(), theirs.tolist()
        ids = ids.pin_memory() if device.type == "cuda" else ids  # else Python waits for the copy
        self.ids = ids.to(device, non_blocking=True)
        self.rows = torch.empty(sum(self.received), dtype=torch.int64, device=device)
        self.index_work = dist.all_to_all_single(
            self.rows, self.ids, self.received, self.sent, async_op=True
        )

    def reduce(self) -> None:
        if self.index_work is None:
            self.exchange()
        if self.world == 1:
            return
        values = self.full_grad[self.ids]
        self.values = values.new_empty(len(self.rows), *values.shape[1:])
        self.work = dist.all_to_all_single(
            self.values, values, self.received, self.sent, async_op=True
        )

    def wait(self) -> None:
        """As in Sharded; rows that have just arrived are added up, rank after rank, so that sums have one order."""
        super().wait()
        if self.values is None or self.index_work is None:
            return
        self.index_work.wait()
        self.index_work = None
        self.grad.zero_()
        local = self.rows - self.rank * len(self.shard)
        for rows, values in zip(local.split(self.received), self.values.split(self.received)):
            self.grad[rows] += values  # a rank names a row once

    def clear(self) -> None:
        """Set the gradient to zero: on one rank all of it, else the rows that were touched."""
        if self.world == 1:
            self.full_grad.zero_()
        else:
            self.full_grad.index_fill_(0, self.ids, 0.0)
        self.touched.zero_()
        self.announced = False


# %% [markdown]
# ### Communication volume
#
# What a rank sends can be said beforehand, if it sends around a ring.


# %%
#| export optim.traffic
def bytes_sent(
    comm: str, numel: int, size: int, world: int, rows: float = 0.0, width: int = 1
) -> tuple[float, float]:
    """Bytes that one rank sends for one update of a parameter: reducing the gradient, and gathering the values.

    numel, size: elements, and bytes of one. rows, width: for a sparse table, the rows that a rank touches, and their length.
    """
    others = (world - 1) / world
    whole = others * numel * size
    if comm == "sharded_sparse":
        return others * rows * (width * size + 8), whole  # 8 for the row's number
    return (2 * whole, 0.0) if comm == "replicated" else (whole, whole)


# %%
MUON_WEIGHTS, STORED = 75_497_472, 83_361_792  # without and with padding: 64, 24 and 24 matrices
HEAD, VALUES, BIGRAM = 38_633_472, 193_167_360, 289_751_040
even = sum(bytes_sent("sharded", STORED, 2, 8)) / 1e6
as_before = sum(bytes_sent("replicated", MUON_WEIGHTS, 2, 8)) / 1e6
dense = sum(bytes_sent("sharded", HEAD + VALUES, 2, 8)) / 1e6  # the embedding is still tied
sums, gathers = bytes_sent("sharded_sparse", BIGRAM, 2, 8, rows=2 * 16_384, width=768)
odd = even + dense + (sums + gathers) / 1e6
assert sum(bytes_sent("sharded", 1000, 2, 8)) == sum(bytes_sent("replicated", 1000, 2, 8))
assert 1.1 < even / as_before < 1.11 and gathers > 10 * sums and 0.11 < odd / 450 / 31 < 0.13
assert 1650 < odd < 1660 and (dense / 2 + gathers / 1e6) / odd > 0.5
print(f"a step without tables: {even:.0f} MB a rank, {even / 450:.1f} ms at 450 GB/s")
print(f"an all-reduce of the matrices: {as_before:.0f} MB")
print(f"a step with tables, early on: {odd:.0f} MB, {odd / 450:.1f} ms")

# %% [markdown]
# A sharded update sends what an all-reduce of the same storage sends; the 292 MB against 264 are padding, a tenth. A step with tables (in the first third, where steps are shortest and head and embedding are one) sends 1.65 GB, more than half of it to collect tables: Adam also moves rows that this batch has not looked up, so *gathering* a sparse table is dense. At the 450 GB/s of the data sheet that would be an eighth of that third's average step: worth hiding, and worth doing in every second step only.
#
# ### The Adam step
#
# Adam works entry by entry, so one function serves a rank's rows of a table and the vector of small parameters alike. Weight decay comes in two kinds. AdamW's takes $\eta\lambda w$ from every weight. The record's is the cautious one of [chapter 13](13_muon.py): $\eta^2\lambda w$, and only from weights that the step makes smaller anyway. `adam_step` computes in float32 and rounds once, at the end; rates may be numbers or vectors.

# %%
#| default_exp optim.adam
#| export
from dataclasses import dataclass

import torch
from torch import Tensor

from speedrun.lab.bounds import Beta, NonNegativeFloat, PositiveFloat, PositiveInt

Number = float | Tensor


@dataclass(frozen=True)
class AdamConfig:
    """Adam, for everything but the blocks' matrices, and for those unless optim.matrices says otherwise. The defaults are llm.c's AdamW."""

    lr: PositiveFloat = 6e-4
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the running mean of gradients and of their squares."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices and tables, as a multiple of the learning rate; if cautious, of its square."""
    cautious: bool = False
    """Decay a weight only where the step makes it smaller anyway."""
    every: PositiveInt = 1
    """Steps from one update to the next; gradients add up meanwhile."""


# %%
#| export
def adam_step(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Number,
    betas: tuple[Number, Number],
    bias_corrections: tuple[Number, Number],
    eps: float,
    decay: Number,
    skip: Tensor | None = None,
) -> None:
    """One step of Adam with cautious decay, in place, in float32 whatever p and g are.

    bias_corrections: 1 − betaᵗ after t steps; eps is added after them, as in PyTorch, and upstream before. decay: the share that a decaying weight loses. skip: if not zero, nothing happens.
    """
    g = g.float()
    squared = g.square()
    if skip is not None:
        g, squared = torch.where(skip > 0, exp_avg, g), torch.where(skip > 0, exp_avg_sq, squared)
        lr, decay = lr * (1 - skip), decay * (1 - skip)
    exp_avg.add_((g - exp_avg) * (1 - betas[0]))
    exp_avg_sq.add_((squared - exp_avg_sq) * (1 - betas[1]))
    step = lr * (exp_avg / bias_corrections[0]) / ((exp_avg_sq / bias_corrections[1]).sqrt() + eps)
    weight = p.float()
    p.copy_(weight - step - decay * weight * (step * weight > 0))


# %%
start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
start = start.to(tier.device)
theirs, ours = torch.nn.Parameter(start.clone()), start.clone()
reference = torch.optim.Adam([theirs], lr=0.01, betas=(0.75, 0.95), eps=1e-10)
exp_avg, exp_avg_sq = torch.zeros_like(start), torch.zeros_like(start)
for t in range(1, 6):
    theirs.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(t)).to(tier.device)
    reference.step()
    corrections = (1 - 0.75**t, 1 - 0.95**t)
    moments = exp_avg, exp_avg_sq
    adam_step(ours, theirs.grad, *moments, 0.01, (0.75, 0.95), corrections, 1e-10, decay=0.0)
assert torch.allclose(theirs, ours, atol=1e-6)
print("five steps of torch.optim.Adam and of ours agree")

# %% [markdown]
# ### The parameter table
#
# The table is the model's own, one `ParamSpec` a parameter ([chapter 21](21_model.py)). Five columns matter here: the rule (`optim`), how the ranks share its work (`comm`), the multiples of learning rate and weight decay (`lr_mul`, `wd_mul`), and which other parameter this one is tied to (`tied_to`). `assign_optimizers` fills in what the run's config decides: the rule, and with it the multiple of the rate. And `check_specs` compares table and model before a single number is touched.

# %%
from dataclasses import fields

from speedrun.params import ParamSpec

print(", ".join(column.name for column in fields(ParamSpec)))

# %%
#| default_exp optim.state
#| export
import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from speedrun.lab.bounds import NonNegativeFloat
from speedrun.lab.compile import compiled_copy
from speedrun.optim.muon import MuonConfig, matrix_lr_mul, muon_state, muon_step, split_bf16
from speedrun.params import ParamSpec


# %%
#| export
@dataclass(frozen=True)
class OptimConfig:
    """The optimizer of all parameters. The defaults are llm.c's for GPT-2."""

    adam: AdamConfig = field(default_factory=AdamConfig)
    """Adam."""
    muon: MuonConfig = field(default_factory=MuonConfig)
    """Muon, if it updates the matrices."""
    matrices: Literal["adam", "muon", "soap"] = "adam"
    """What updates the blocks' matrices. muon: orthogonalised momentum. soap: Adam in the eigenbases of the gradient's covariances."""
    matrix_lr: Annotated[NonNegativeFloat, "0: optim.adam.lr"] = 0.0
    """Peak learning rate of the blocks' matrices; 0: optim.adam.lr."""
    grad_clip: Annotated[NonNegativeFloat, "0 switches clipping off"] = 1.0
    """Largest norm of the gradient of all parameters together; 0 switches clipping off."""


def assign_optimizers(specs: Iterable[ParamSpec], config: OptimConfig) -> tuple[ParamSpec, ...]:
    """The model's table with the optimizer's columns filled in; the matrices come first, since they take longest."""
    adam, found = "adam" if config.adam.cautious else "adamw", []
    ratio = (config.matrix_lr or config.adam.lr) / config.adam.lr
    for spec in specs:
        optim: Any = config.matrices if spec.matrices and config.matrices != "adam" else adam
        lr_mul: Any = matrix_lr_mul(spec, config.muon) if optim == "muon" else spec.lr_mul
        lr_mul = ratio * lr_mul if spec.matrices and optim == adam else lr_mul
        found.append(replace(spec, optim=optim, lr_mul=lr_mul))
    return tuple(sorted(found, key=lambda spec: spec.optim not in MATRIX_RULES))


MATRIX_RULES = ("muon", "soap")  # of whole matrices; all others work entry by entry


# %%
#| export optim.optimizer
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from speedrun.lab.compile import GraphedCall, compiled_copy, new_stream
from speedrun.params import ParamSpec
from speedrun.schedule import StepSettings


def check_names(what: str, given: Iterable[str], wanted: Iterable[str], where: str) -> None:
    """Raise ValueError about names that are missing, that are too many, or that stand there twice."""
    counts, needed = Counter(list(given)), set(wanted)
    wrong = {
        "twice": sorted(name for name, count in counts.items() if count > 1),
        "missing": sorted(needed - set(counts)),
        f"not in {where}": sorted(set(counts) - needed),
    }
    said = [f"{kind}: {', '.join(names)}" for kind, names in wrong.items() if names]
    if said:
        raise ValueError(f"{what}: {'; '.join(said)}")


def check_specs(specs: Sequence[ParamSpec], params: Mapping[str, Tensor]) -> None:
    """Raise ValueError, which says where, if rows do not fit the parameters."""
    check_names("the parameter table", (spec.name for spec in specs), params, "the model")
    rows = {spec.name: spec for spec in specs}
    for spec in specs:
        p, other = params[spec.name], rows.get(spec.tied_to)
        matrix = spec.optim in MATRIX_RULES
        if matrix and (spec.comm != "sharded" or p.ndim != 3):
            raise ValueError(f"{spec.name}: {spec.optim} updates sharded banks of three dimensions")
        if matrix and p.shape[1] % max(1, spec.matrices):
            raise ValueError(f"{spec.name}: {p.shape[1]} rows are not {spec.matrices} matrices")
        if spec.optim != "muon" and isinstance(spec.lr_mul, tuple):
            raise ValueError(f"{spec.name}: {spec.optim} has one lr_mul, not {spec.lr_mul!r}")
        if spec.comm == "sharded_sparse" and p.ndim != 2:
            raise ValueError(f"{spec.name}: a sparse table has two dimensions, not {p.ndim}")
        if spec.tied_to and (other is None or params[spec.tied_to].shape != p.shape[::-1]):
            raise ValueError(f"{spec.name}: {spec.tied_to} has not the transposed shape")
        if other and {spec.comm, other.comm} != {"sharded"}:
            raise ValueError(f"{spec.name} and {spec.tied_to}: tied parameters have to be sharded")
        if other and (spec.optim != other.optim or matrix):
            raise ValueError(f"{spec.name} and {spec.tied_to}: both have to be adam's, or adamw's")


# %%
few = {
    "bank": torch.nn.Parameter(torch.ones(2, 4, 3)),
    "table": torch.nn.Parameter(torch.ones(5, 3)),
}
good = (
    ParamSpec("bank", (2, 4, 3), optim="muon", comm="sharded", matrices=2),
    ParamSpec("table", (5, 3), optim="adam", comm="sharded_sparse", wd_mul=1.0),
)
check_specs(good, few)
for wrong in (good[:1], (*good, good[0]), (good[0], replace(good[1], name="tabel"))):
    try:
        check_specs(wrong, few)
        raise AssertionError("accepted")
    except ValueError as error:
        print(error)

# %% [markdown]
# ### CUDA graphs: scalars in device memory
#
# Sharding divides the work, but not its launching: every rank launches every kernel itself, and for small matrices that takes longer than computing. From one step to the next nothing changes but three scalars: two learning rates and the momentum. Keep those in a vector on the device, and the whole update of a parameter is a fixed list of kernels that can be recorded once, as a *CUDA graph* ([chapter 16](16_compile.py)), and replayed with one launch. A graph remembers addresses and not names, so parameters, gradients, state and these scalars never move; everything here is changed in place. (PyTorch's AdamW takes its rate as a number from the host and is not recorded; on a CPU nothing is.)


# %%
#| export optim.graph
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from speedrun.schedule import StepSettings


class StepScalars:
    """The step's learning rates and momentum: floats on a CPU, views of one vector on a GPU, which graphs read."""

    NAMES = ("lr", "matrix_lr", "momentum")

    def __init__(self, device: torch.device):
        self.vector = torch.zeros(len(self.NAMES), device=device)
        self.host = dict.fromkeys(self.NAMES, 0.0)

    def __getitem__(self, name: str) -> Any:
        gpu = self.vector.is_cuda
        return self.vector[self.NAMES.index(name)] if gpu else self.host[name]

    def set(self, settings: StepSettings) -> None:
        """Take a step's values; Python does not wait for the device."""
        self.host = {name: getattr(settings, name) for name in self.NAMES}
        if self.vector.is_cuda:
            values = torch.tensor(list(self.host.values()))
            self.vector.copy_(values.pin_memory(), non_blocking=True)


def bias_correction(beta: float | Tensor, updates: Tensor) -> Tensor:
    """1 − betaᵗ after t = updates (float64), as float32; before the first update as after it."""
    return (1 - beta ** updates.clamp(min=1)).float()


# %%
#| export optim.graph
@contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """On a GPU: what is begun here runs in a stream of its own, after all that was begun before."""
    if stream is None:
        yield
    else:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield


# %%
from speedrun.lab.compile import GraphedCall, new_stream

scalars, seen = StepScalars(torch.device("cpu")), []
call = GraphedCall(lambda: seen.append(scalars["momentum"]))
for step, momentum in enumerate((0.85, 0.9, 0.95)):
    scalars.set(StepSettings(step, lr=0.25, matrix_lr=0.02, momentum=momentum))
    call()
assert seen == [0.85, 0.9, 0.95] and scalars["lr"] == 0.25
with on_stream(new_stream(torch.device("cpu"))):
    call()
assert seen[3:] == [0.95], "a CPU has no streams"

updates = torch.zeros(()).double()
for t in range(1, 1000):
    updates += 1
    wanted = torch.tensor([1 - 0.5**t, 1 - 0.95**t])
    got = torch.stack([bias_correction(0.5, updates), bias_correction(0.95, updates)])
    assert torch.equal(got, wanted), "Python's, to the bit"

# %% [markdown]
# ### Communication and update rule
#
# An update has two sides that know next to nothing of each other: how the ranks share it (replicated, sharded, sharded with sparse gradients), and the rule (Muon, Adam, AdamW, [chapter 12](12_newton_schulz.py)'s SOAP). So the state of a parameter, or of all small ones that share a rule and a dtype, is a pair: a *comm* from above, and a *rule* with its moments, which updates whatever shard the comm has.


# %%
#| export
class AdamRule:
    """Adam with cautious decay, on a shard of one parameter, or on the vector of many: then every constant is a vector, too."""

    graphable = True

    def __init__(self, specs: Sequence[ParamSpec], comm: Any, config: OptimConfig, fuse: bool):
        self.comm, self.eps = comm, config.adam.eps
        self.state = {
            key: torch.zeros_like(comm.shard, dtype=torch.float32)
            for key in ("exp_avg", "exp_avg_sq")
        }

        def column(values: list[float], dtype=torch.float32) -> Number:
            if not isinstance(comm, Replicated):
                return values[0]
            found = torch.zeros(len(comm.shard), dtype=dtype)
            for part, value in zip(comm.views(found).values(), values):
                part.fill_(value)
            return found.to(comm.shard.device)

        self.lr_mul = column([spec.lr_mul for spec in specs])  # type: ignore[misc]
        self.weight_decay = column([config.adam.weight_decay * spec.wd_mul for spec in specs])
        betas = [[(spec.betas or config.adam.betas)[n] for spec in specs] for n in (0, 1)]
        self.betas = (column(betas[0]), column(betas[1]))
        self.betas64 = [column(values, torch.float64) for values in betas]
        self.step = compiled_copy(adam_step, fuse)

    def update(self, scalars: StepScalars, skip: Tensor, updates: Tensor) -> None:
        """One step of the shard."""
        lr = scalars["lr"] * self.lr_mul
        decay = lr * lr * self.weight_decay
        corrections = tuple(bias_correction(beta, updates) for beta in self.betas64)
        own, numbers = (self.comm.shard, self.comm.grad), (self.eps, decay, skip)
        self.step(*own, *self.state.values(), lr, self.betas, corrections, *numbers)


# %%
#| export
class AdamWRule:
    """PyTorch's fused AdamW: decay of lr · weight_decay, of every weight."""

    graphable = False  # the rate is an argument on the host

    def __init__(self, specs: Sequence[ParamSpec], comm: Any, config: OptimConfig, fuse: bool):
        self.state = {key: torch.zeros_like(comm.shard) for key in ("exp_avg", "exp_avg_sq")}
        tensors = [comm.shard, comm.grad, *self.state.values()]
        views = [list(comm.views(tensor).values()) for tensor in tensors]
        self.config, groups = config.adam, dict[tuple, list[tuple[Tensor, ...]]]()
        for spec, *own in zip(specs, *views):
            numbers = spec.lr_mul, spec.wd_mul, spec.betas or config.adam.betas
            groups.setdefault(numbers, []).append(tuple(own))
        self.groups = {key: [list(some) for some in zip(*rows)] for key, rows in groups.items()}

    def update(self, scalars: StepScalars, skip: Tensor, updates: Tensor) -> None:
        """One step of the shard."""
        for (lr_mul, wd_mul, (beta1, beta2)), tensors in self.groups.items():
            p, g, exp_avg, exp_avg_sq = tensors
            done = list((updates - 1).float().repeat(len(p)).unbind())  # adamw counts on
            rates: dict[str, Any] = {"lr": scalars.host["lr"] * lr_mul, "eps": self.config.eps}
            rates |= {"weight_decay": self.config.weight_decay * wd_mul, "beta1": beta1}
            rates |= {"beta2": beta2, "maximize": False, "amsgrad": False}
            adamw(p, g, exp_avg, exp_avg_sq, [], done, fused=True, found_inf=skip, **rates)


# %%
#| export
class MuonRule:
    """Muon, on the whole matrices that this rank has."""

    def __init__(self, specs: Sequence[ParamSpec], comm: Any, config: OptimConfig, fuse: bool):
        (spec,), muon = specs, config.muon
        self.comm, self.config, self.graphable = comm, muon, bool(muon.ns_steps)
        self.state = muon_state(comm.shard, muon)
        self.weight_decay, self.lr_mul = muon.weight_decay * spec.wd_mul, spec.lr_mul
        if isinstance(spec.lr_mul, tuple):  # for the matrices in turn
            turns = [spec.lr_mul[n % len(spec.lr_mul)] for n in range(len(comm.full))]
            column = torch.tensor(turns, device=comm.shard.device)[:, None, None]
            self.lr_mul = comm.my_slice(column)  # type: ignore[assignment]
        self.step = compiled_copy(muon_step, fuse and self.graphable)

    def update(self, scalars: StepScalars, skip: Tensor, updates: Tensor) -> None:
        """One step of the shard."""
        numbers = scalars["matrix_lr"], self.lr_mul, scalars["momentum"], self.weight_decay
        self.step(self.comm.shard, self.comm.grad, self.state, *numbers, self.config, skip)


# %%
#| export
REPLICATED = "replicated"  # the name under which all replicated parameters stand in an order


@dataclass
class ParamState:
    """How one parameter, or the vector of small ones, is shared by the ranks, and updated."""

    specs: Sequence[ParamSpec]
    comm: Any
    rule: Any
    every: int = 1
    """Steps from one update to the next."""


def build_state(
    specs: Sequence[ParamSpec], params: Mapping[str, Tensor], config: OptimConfig, fuse: bool
) -> ParamState:
    """A parameter's comm and rule. Muon's parameters become bfloat16 here if the config says so."""
    spec, p, mantissa = specs[0], params[specs[0].name], None
    matrix = spec.optim in MATRIX_RULES
    if spec.optim == "muon" and config.muon.param_dtype != "float32" and p.dtype == torch.float32:
        p.data, mantissa = split_bf16(p.data)
    unit = (p.shape[1] // spec.matrices, p.shape[2]) if matrix else tuple(p.shape[1:])
    if spec.comm == REPLICATED:
        comm: Any = Replicated({row.name: params[row.name] for row in specs})
    else:
        kind: Any = Sharded
        if spec.comm == "sharded_sparse":
            kind = importlib.import_module("speedrun.optim.sparse").ShardedSparse
        comm = kind(spec.name, p, unit)
    rules: dict[str, Any] = {"adam": AdamRule, "adamw": AdamWRule, "muon": MuonRule}
    if spec.optim == "soap":
        from speedrun.optim.soap import SoapRule

        rules["soap"] = SoapRule
    rule = rules[spec.optim](specs, comm, config, fuse)
    if mantissa is not None and "mantissa" in rule.state:
        rule.state["mantissa"].copy_(comm.shard_of(mantissa.view(comm.units, *unit)))
    return ParamState(specs, comm, rule, 1 if matrix else config.adam.every)


def build_states(
    specs: Sequence[ParamSpec], params: Mapping[str, Tensor], config: OptimConfig, fuse: bool
) -> dict[str, ParamState]:
    """A state for each row, by its name, and one for the replicated rows of each rule and dtype."""
    groups: dict[str, list[ParamSpec]] = {}
    for spec in specs:
        small = f"{REPLICATED} {spec.optim} {params[spec.name].dtype}"
        groups.setdefault(small if spec.comm == REPLICATED else spec.name, []).append(spec)
    return {name: build_state(rows, params, config, fuse) for name, rows in groups.items()}


# %% tags=["hide-input"]
mantissas = OptimConfig(muon=MuonConfig(param_dtype="bf16_mantissa", beta2=0.9))
bank = torch.nn.Parameter(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)))
row = ParamSpec("bank", (2, 6, 4), optim="muon", comm="sharded", matrices=1, lr_mul=(1.0, 2.0))
rule = build_state([row], {"bank": bank}, mantissas, fuse=False).rule
assert bank.dtype == torch.bfloat16 and rule.state["mantissa"].dtype == torch.int16
assert rule.state["second_momentum_buffer"].shape == (2, 6, 1)
assert rule.lr_mul.flatten().tolist() == [1.0, 2.0]
small = {"a": torch.nn.Parameter(torch.ones(3)), "b": torch.nn.Parameter(torch.ones(2, 2))}
rows = [ParamSpec("a", (3,), optim="adam", lr_mul=5.0), ParamSpec("b", (2, 2), optim="adam")]
vector = build_state(rows, small, mantissas, fuse=False)
assert vector.rule.lr_mul.tolist()[:9] == [5.0] * 3 + [0.0] * 5 + [1.0]

# %% [markdown]
# ### The optimizer step
#
# Reduce, wait, update, gather: `MuonAdam.step` below is the whole schedule. The sums of whole matrices begin first, if they stand first in the order: they read gradients and write elsewhere. Meanwhile each rank checks whether its gradients of what is due in this step are finite, and one small all-reduce tells everybody. If any is not, the step is skipped: rates are zero, and moments stay. Nor does Adam count it: a mean of $t$ gradients is divided by $1-\beta^t$, and a skipped gradient is not in the mean. Only the device knows that, so the count is kept there. Python does not wait for the answer; `nonfinite_params` asks later, and names the parameter. Upstream has no such check; it costs reading every gradient once more.
#
# *Clipping* scales the gradient if its norm is too large. It needs the norm of everything that is due before anything is updated, and so gives up the overlap of sums and updates. Each rank has the norm of its own shards, and one more all-reduce adds up the squares. A norm that overflows skips the step, too.
#
# On a single GPU each parameter has a *stream* of its own, in which it is updated and cleared; among several, all matrices share one stream and everything else another, and there parameters also wait for their sums and begin to be gathered. Two rules make that safe. A graph is recorded in the stream in which it will run, because libraries keep scratch memory by stream. And what was allocated in one stream and used in another is not freed before the first has waited for the second.


# %%
#| default_exp optim.optimizer
#| export
def addresses_of(p: Tensor) -> tuple[int, int]:
    """Where a parameter's value and gradient are stored."""
    return p.data_ptr(), 0 if p.grad is None else p.grad.data_ptr()


def new_streams(states: Mapping[str, ParamState], device: torch.device) -> dict[str, Any]:
    """A stream for each state; among several ranks one for the matrices and one for all else, which is faster there."""
    shared = dist_info()[1] > 1
    kinds = {
        name: state.specs[0].optim in MATRIX_RULES if shared else name
        for name, state in states.items()
    }
    streams = {kind: new_stream(device) for kind in dict.fromkeys(kinds.values())}
    return {name: streams[kind] for name, kind in kinds.items()}


def expand_order(
    states: Mapping[str, ParamState], what: str, order: Sequence[str] | None
) -> list[str]:
    """An order of rows as one of states: “replicated” spelled out, by rule and dtype. None: the table's."""
    small = [name for name in states if name.split()[0] == REPLICATED]
    names = [name for name in states if name not in small] + [REPLICATED] * bool(small)
    chosen = names if order is None else list(order)
    check_names(what, chosen, names, "the table")
    return [state for name in chosen for state in (small if name == REPLICATED else [name])]


# %% [markdown]
# #### Tied parameters
#
# In record 89 head and embedding are one matrix until two thirds of the training, stored twice because each is read in another order. The embedding's gradient is added to the head's, and the head's new values are copied back. When they are untied, the embedding inherits the head's weights, which it has, and its moments, which lie on other ranks and transposed.


# %%
#| export
def add_transposed(target: Tensor, source: Tensor) -> None:
    target.add_(source.mT)


def copy_transposed(target: Tensor, source: Tensor) -> None:
    target.copy_(source.mT)


class Ties:
    """Parameters that are the transpose of another one, until they are untied. tied: name → the other's."""

    def __init__(self, specs: Iterable[ParamSpec], states: Mapping[str, ParamState], fuse: bool):
        self.states, self.tied = states, {spec.name: spec.tied_to for spec in specs if spec.tied_to}
        self.add, self.copy = (compiled_copy(f, fuse) for f in (add_transposed, copy_transposed))

    def pairs(self, due: Sequence[str]) -> Iterator[tuple[Any, Any]]:
        """The comms of each tied parameter, and of the one that it is tied to, where that is due."""
        for name, other in self.tied.items():
            if other in due:
                yield self.states[name].comm, self.states[other].comm

    def add_grads(self, due: Sequence[str]) -> None:
        """Add the gradient of each tied parameter to that of the other."""
        for comm, other in self.pairs(due):
            self.add(other.full_grad[: other.units], comm.full_grad[: comm.units])
            comm.full_grad.zero_()

    def copy_values(self, due: Sequence[str]) -> None:
        """Give each tied parameter the other's values."""
        for comm, other in self.pairs(due):
            self.copy(comm.full[: comm.units], other.full[: other.units])

    def untie(self, name: str) -> None:
        """Let a parameter train by itself from now on, with the transposed moments of what it was tied to."""
        state, other = self.states[name], self.states[self.tied.pop(name)]
        for key, own in state.rule.state.items():
            moments = other.comm.full_of(other.rule.state[key]).mT.contiguous()
            own.copy_(state.comm.shard_of(moments))


# %%
#| export
class FiniteCheck:
    """Whether all gradients that are due are finite, on all ranks. skip: 1 in a step where they are not, else 0."""

    def __init__(self, states: Mapping[str, ParamState], ties: Ties, graphs: bool):
        self.ties, self.calls = ties, dict[tuple, tuple[GraphedCall, Tensor]]()
        self.grads = {name: state.comm.full_grads() for name, state in states.items()}
        self.device = next(iter(states.values())).comm.full.device
        self.stream = new_stream(self.device) if graphs else None
        self.skip = torch.zeros((), device=self.device)
        parameters = [name for grads in self.grads.values() for name in grads]
        self.counts = {name: torch.zeros((), device=self.device) for name in parameters}

    def find(self, due: Sequence[str], flags: Tensor) -> None:
        """Add the gradients of tied parameters, and flag this rank's gradients whose norm is not finite."""
        self.ties.add_grads(due)
        grads = [grad for name in due for grad in self.grads[name].values()]
        norms = torch._foreach_norm(grads)  # not the largest numbers: that is slow on a CPU
        flags.copy_(~torch.isfinite(torch.stack([norm.float() for norm in norms])))

    def __call__(self, due: Sequence[str]) -> None:
        """Set `skip`, and count the parameters that it is due to. Python does not wait for the device."""
        parameters = [parameter for name in due for parameter in self.grads[name]]
        if not parameters:
            self.skip.zero_()
            return
        key = (tuple(due), tuple(self.ties.tied))
        if key not in self.calls:
            flags = torch.zeros(len(parameters), device=self.device)
            self.calls[key] = GraphedCall(partial(self.find, due, flags), self.stream), flags
        find, flags = self.calls[key]
        find()
        if dist_info()[1] > 1:
            dist.all_reduce(flags)
        self.skip.copy_(flags.sum().clamp(max=1.0))
        torch._foreach_add_([self.counts[name] for name in parameters], list(flags.unbind()))


# %%
#| export
def grad_norm(states: Mapping[str, ParamState], params: Mapping[str, Tensor], due: Sequence[str]) -> Tensor:  # fmt: skip
    """The norm of all gradients that are due, summed over ranks: of what each rank has, in the table's order. A collective."""
    names = {spec.name for name in due for spec in states[name].specs}
    if dist_info()[1] == 1:
        return get_total_norm([p.grad for name, p in params.items() if name in names and p.grad is not None])  # fmt: skip
    total = torch.zeros((), device=next(iter(params.values())).device)
    sharded = [states[name].comm for name in due if not isinstance(states[name].comm, Replicated)]
    if sharded:
        total += get_total_norm([comm.grad for comm in sharded]).square()
    dist.all_reduce(total)  # of a fixed order of ranks, and the same on each
    small = [states[name].comm.grad for name in due if name.split()[0] == REPLICATED]
    return (total + get_total_norm(small).square()).sqrt() if small else total.sqrt()


# %%
#| export
class MuonAdam:
    """All parameters' updates, shared by all ranks, as their specs say (ZeRO-1; on one rank it is the same code).

    A step has three phases: reduce gradients in scatter order, and check that they are finite; in work order wait, update
    this rank's shard, start to gather; wait for all. Parameters keep their shapes and become views of padded storage;
    gradients are never None, are summed over ranks, and are cleared here. All ranks start from the same values. Saved
    values are loaded afterwards. scatter_order, work_order: names of rows, and “replicated” for all that are.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        specs: Sequence[ParamSpec],
        config: OptimConfig = OptimConfig(),
        compile: bool = True,
        scatter_order: Sequence[str] | None = None,
        work_order: Sequence[str] | None = None,
    ):
        check_specs(specs, params)
        self.params, self.specs, self.config = params, specs, config
        self.device = next(iter(params.values())).device
        self.use_graphs = compile and self.device.type == "cuda"
        with torch.no_grad():
            self.states = build_states(specs, params, config, self.use_graphs)
        self.scatter_order = expand_order(self.states, "scatter_order", scatter_order)
        self.work_order = expand_order(self.states, "work_order", work_order)
        self.addresses = {name: addresses_of(p) for name, p in params.items()}
        self.ties = Ties(specs, self.states, self.use_graphs)
        self.check_finite = FiniteCheck(self.states, self.ties, self.use_graphs)
        self.skip, self.scalars = self.check_finite.skip, StepScalars(self.device)
        self.updates = torch.zeros((), dtype=torch.float64, device=self.device)  # by Adam
        self.pending = False  # whether gradients wait for Adam's turn
        self.streams = new_streams(self.states, self.device)
        self.calls = {name: self.update_of(name) for name in self.states}
        with torch.no_grad():
            self.ties.copy_values(list(self.states))

    def update_of(self, name: str) -> GraphedCall:
        """A state's update as a call, on a stream of its own, which a graph may replace."""
        rule = self.states[name].rule
        update = partial(rule.update, self.scalars, self.skip, self.updates)
        graphed = self.use_graphs and rule.graphable
        return GraphedCall(update, self.streams[name] if graphed else None)

    @torch.no_grad()
    def step(self, settings: StepSettings) -> None:
        """Update what is due in a step. Python does not wait for the device."""
        self.check_addresses()
        for name in list(self.ties.tied) if settings.untie else ():
            self.ties.untie(name)
        due = self.due_params(settings.step)
        self.scalars.set(settings)
        self.reduce(due)
        self.clip(due)
        if not self.pending:  # only the device knows whether the step is left out
            self.updates += 1 - self.skip
        for name in due:
            comm = self.states[name].comm
            with on_stream(self.streams[name]):
                comm.wait()
                self.calls[name]()
                comm.gather()
                comm.clear()
        for name in due:
            if (stream := self.streams[name]) is not None:
                torch.cuda.current_stream().wait_stream(stream)
            self.states[name].comm.wait()
        self.ties.copy_values(due)

    def due_params(self, step: int) -> list[str]:
        """The states that are updated in a step: Adam's in every adam.every-th only, tied ones never."""
        self.pending = (step + 1) % self.config.adam.every != 0
        names = [name for name in self.work_order if name not in self.ties.tied]
        return [name for name in names if (step + 1) % self.states[name].every == 0]

    def reduce(self, due: Sequence[str]) -> None:
        """Begin the matrices' sums, check that gradients are finite, begin the other sums."""
        sums = [name for name in self.scatter_order if name in due]
        # nothing is added to the matrices' gradients any more
        early = list(takewhile(lambda name: self.states[name].specs[0].optim in MATRIX_RULES, sums))
        for name in early:
            self.states[name].comm.reduce()
        self.check_finite(due)
        for name in sums[len(early) :]:
            self.states[name].comm.reduce()

    def clip(self, due: Sequence[str]) -> None:
        """Scale all gradients that are due so that their norm is at most grad_clip; a norm that overflows is not finite either."""
        if not self.config.grad_clip or not due:
            return
        for name in due:
            self.states[name].comm.wait()
        norm = grad_norm(self.states, self.params, due)
        finite = torch.isfinite(norm)
        self.skip.clamp_(min=1.0 - finite.float())
        scale = self.config.grad_clip / (torch.where(finite, norm, 0.0) + 1e-6)
        grads = [self.states[name].comm.grad for name in due]
        torch._foreach_mul_(grads, scale.clamp(max=1.0))

    def check_addresses(self) -> None:
        """Raise RuntimeError where a value or a gradient is not in the optimizer's storage any more."""
        for name, p in self.params.items():
            pairs = zip(("value", "gradient"), addresses_of(p), self.addresses[name])
            for what in (what for what, now, then in pairs if now != then):
                moved = f"the {what} of {name} is not in the optimizer's storage any more"
                fix = "leave zero_grad() out, step() clears gradients; and copy values in place"
                raise RuntimeError(f"{moved}: {fix}")

    def nonfinite_params(self) -> list[str]:
        """Names of parameters whose gradient was not finite in some step; waits for the device."""
        return [name for name, count in self.check_finite.counts.items() if count.item()]

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state, the same on every rank and for every world size. A collective."""
        return optimizer_state(self)

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave, on however many ranks. ValueError for a state of something else."""
        load_optimizer_state(self, saved)

    @torch.no_grad()
    def warm_up(self) -> None:
        """Compile and record everything, with tied parameters tied and untied; nothing is updated."""
        if self.device.type != "cuda":
            return
        pending, tied = self.pending, self.ties.tied
        for self.ties.tied in (tied, {}) if tied else ({},):
            for step in [*range(self.config.adam.every)] * 3:
                self.check_finite(self.due_params(step))
        self.pending, self.ties.tied = pending, tied
        self.skip.fill_(1.0)
        for name, call in self.calls.items():
            for _ in range(3):
                with on_stream(self.streams[name]):
                    call()
        torch.cuda.synchronize()
        torch._foreach_zero_([self.skip, *self.check_finite.counts.values()])


# %%
broken = {name: torch.nn.Parameter(p.detach().clone()) for name, p in few.items()}
optimizer = MuonAdam(broken, good, OptimConfig(grad_clip=0.0))
for p in broken.values():
    p.grad += 1.0
broken["table"].grad[3, 1] = math.nan
optimizer.states["table"].comm.announce(torch.arange(len(broken["table"])))
optimizer.step(StepSettings(0, lr=0.01, matrix_lr=0.02, momentum=0.9))
assert all(torch.equal(p, torch.ones_like(p)) for p in broken.values())
assert optimizer.nonfinite_params() == ["table"] and optimizer.updates == 0
print(f"nothing has moved; not finite was the gradient of {optimizer.nonfinite_params()[0]}")

# %%
started = {name: torch.nn.Parameter(p.detach().clone()) for name, p in few.items()}
clipped = MuonAdam(
    started, [replace(row, comm="sharded", optim="adamw", matrices=0) for row in good]
)
for p in started.values():
    p.grad += 3.0
length = torch.cat([p.grad.flatten() for p in started.values()]).norm()
clipped.reduce(clipped.due_params(0))
clipped.clip(clipped.due_params(0))
after = torch.cat([p.grad.flatten() for p in started.values()]).norm()
assert torch.isclose(after, torch.ones(())), "the largest norm that is allowed"
print(f"a gradient of norm {length:.1f} is clipped to {after:.2f}")

# %% [markdown]
# ### Saving and loading state
#
# The state must not depend on how many ranks there were. It is saved whole and unpadded; whoever loads it takes a shard. It says which parameters have been untied. Gradients that wait for Adam's next turn belong to it as well: their sum is saved, and goes to the first rank, since it does not matter who contributes it. (With several ranks that rounds in another order, so such a run goes on equal up to rounding, and not to the bit.)


# %%
#| export
def pending_grads(optimizer: MuonAdam) -> dict[str, Tensor]:
    """Gradients that wait for Adam's turn, summed over ranks."""
    found: dict[str, Tensor] = {}
    for state in optimizer.states.values():
        if optimizer.pending and state.every > 1:
            for name, grad in state.comm.full_grads().items():
                found[f"{name}/pending_grad"] = total = grad.clone()
                if dist_info()[1] > 1:
                    dist.all_reduce(total)
    return found


def state_places(optimizer: MuonAdam) -> dict[str, tuple[Any, Tensor]]:
    """For each tensor of the state, by `parameter/key`: the comm, and what this rank has of it."""
    return {
        f"{name}/{key}": (state.comm, own)
        for state in optimizer.states.values()
        for key, tensor in state.rule.state.items()
        for name, own in state.comm.views(tensor).items()
    }


def optimizer_state(optimizer: MuonAdam) -> dict[str, Tensor]:
    """The whole state by `parameter/key`, the same on every rank and for every world size. A collective."""
    facts = {"updates": int(optimizer.updates), "pending": int(optimizer.pending)}
    tied = [spec.name for spec in optimizer.specs if spec.tied_to]
    facts |= {f"{name} untied": int(name not in optimizer.ties.tied) for name in tied}
    found = {f"optimizer/{key}": torch.tensor(value) for key, value in facts.items()}
    places = state_places(optimizer).items()
    return found | {k: comm.full_of(own) for k, (comm, own) in places} | pending_grads(optimizer)


# %%
#| export
def load_optimizer_state(optimizer: MuonAdam, saved: Mapping[str, Tensor]) -> None:
    """Take back what `optimizer_state` gave, on however many ranks."""
    check_state(optimizer, saved)
    optimizer.updates.copy_(saved["optimizer/updates"])
    optimizer.pending = bool(saved["optimizer/pending"])
    torch._foreach_zero_([optimizer.skip, *optimizer.check_finite.counts.values()])
    tied = {spec.name: spec.tied_to for spec in optimizer.specs if spec.tied_to}
    optimizer.ties.tied = {k: v for k, v in tied.items() if not saved[f"optimizer/{k} untied"]}
    for label, (comm, own) in state_places(optimizer).items():
        own.copy_(comm.shard_of(saved[label].to(own.device)))
    for state in optimizer.states.values():
        state.comm.full_grad.zero_()
        for name, grad in state.comm.full_grads().items():
            if f"{name}/pending_grad" in saved and dist_info()[0] == 0:
                grad.copy_(saved[f"{name}/pending_grad"])
        if hasattr(state.comm, "touched"):  # a sparse table
            state.comm.touched.copy_(state.comm.full_grad.any(1))


def check_state(optimizer: MuonAdam, saved: Mapping[str, Tensor]) -> None:
    """Raise ValueError about a saved state of other parameters or of another config."""
    tied = [f"{spec.name} untied" for spec in optimizer.specs if spec.tied_to]
    count = torch.tensor(0)
    wanted = {f"optimizer/{key}": count for key in ("updates", "pending", *tied)}
    for label, (comm, own) in state_places(optimizer).items():
        units = (comm.units, *own.shape[1:]) if not isinstance(comm, Replicated) else own.shape
        wanted[label] = own.new_empty(units)
    for state in optimizer.states.values():
        if saved.get("optimizer/pending", 0) and state.every > 1:
            grads = state.comm.full_grads().items()
            wanted |= {f"{name}/pending_grad": grad for name, grad in grads}
    check_names("the saved state", saved, wanted, "this optimizer's state")
    for label, tensor in saved.items():
        kinds = [f"{tuple(t.shape)} {str(t.dtype)[6:]}" for t in (tensor, wanted[label])]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{label}: saved as {kinds[0]}, here {kinds[1]}")


# %%
both = {"head": torch.nn.Parameter(torch.ones(3, 5)), "embed": torch.nn.Parameter(torch.ones(5, 3))}
adams: dict[str, Any] = {"optim": "adam", "comm": "sharded", "wd_mul": 1.0}
rows = [ParamSpec("head", (3, 5), **adams), ParamSpec("embed", (5, 3), tied_to="head", **adams)]
optimizer = MuonAdam(both, rows)
for step in range(4):
    both["head"].grad += torch.arange(15.0).view(3, 5)
    both["embed"].grad += 1.0
    optimizer.step(StepSettings(step, lr=0.01, matrix_lr=0.0, momentum=0.0, untie=step >= 2))
    assert torch.equal(both["head"], both["embed"].mT) == (step < 2)
saved = optimizer.state_dict()
again = MuonAdam(both, rows)
again.load_state_dict(saved)
assert all(torch.equal(tensor, saved[label]) for label, tensor in again.state_dict().items())
assert again.ties.tied == {}, "untied they stay"
print(f"tied for two steps, then untied; {len(saved)} tensors saved and taken back")

# %% [markdown]
# ## The measurement
#
# First the bytes. Linux counts those that each network device has sent, and gloo sends everything through the loopback. So start $w$ processes with record 89's table at an eighth of its widths and vocabularies, scatter and gather one parameter at a time, and read the counter before and after.

# %% tags=["hide-input"]
#| default_exp measure.many_gpus
#| export
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from speedrun.schedule import StepSettings
from speedrun.params import ParamSpec
from speedrun.config import vary
from speedrun.presets import RECORD_MUON, preset
from speedrun.lab.bench import clocked, wait_for
from speedrun.lab.errors import UserError
from speedrun.lab.provenance import root, stamp

NAMES = ("wire",)
ON_GPUS = ("step", "trace", "nvlink")  # measured on a machine that has one or more
RANKS = (1, 2, 4, 8)
# matrices' sums first, but tables' updates: their gathers take longest, and travel while matrices are updated
SCATTER = ("qk", "mlp", "vo", "bigram", "values", "head", "embed", "replicated")
WORK = ("bigram", "values", "head", "embed", "qk", "mlp", "vo", "replicated")


def settings_at(step: int) -> StepSettings:
    """The same rates in every step."""
    return StepSettings(step, lr=0.008, matrix_lr=0.02, momentum=0.9)


def record_specs(scale: int = 1) -> tuple[ParamSpec, ...]:
    """Record 89's parameters in its banks, without their padding, updated much as there; its small ones are lumped together. scale: divides widths and vocabularies."""
    d, words = 768 // scale, 50_304 // scale
    bank = partial(ParamSpec, optim="muon", comm="sharded", matrices=1, wd_mul=1.0)
    adam: Any = partial(ParamSpec, optim="adam", comm="sharded", wd_mul=150.0, betas=(0.5, 0.95))
    table = partial(adam, lr_mul=75.0, wd_mul=5.0, betas=(0.75, 0.95))
    small: Any = partial(ParamSpec, optim="adam", wd_mul=1.0, betas=(0.9, 0.99))
    return (
        bank("qk", (60, d // 3, d)),
        bank("vo", (20, d, d)),
        bank("mlp", (22, 4 * d, d), lr_mul=(2.0, 4.0)),
        adam("head", (d, words)),
        adam("embed", (words, d), tied_to="head"),
        table("values", (5 * words, d)),
        table("bigram", (words * 15 // 2, d), comm="sharded_sparse"),
        small("gates", (12 * 60,)),
        small("scalars", (64,), lr_mul=5.0, wd_mul=0.0),
        small("mudd", (2 * 64, d), lr_mul=0.25),
    )


# %% tags=["hide-input"]
#| export measure.many_gpus
def record_parameters(scale: int, device: str = "cpu") -> dict[str, nn.Parameter]:
    """Small random values of those shapes, bfloat16 but for the scalars and what splits its own bits."""
    draw, found = torch.Generator(device).manual_seed(0), dict[str, nn.Parameter]()
    for spec in record_specs(scale):
        p = 0.02 * torch.randn(spec.shape, generator=draw, device=device)
        exact = spec.name == "scalars" or spec.optim == "muon"
        found[spec.name] = nn.Parameter(p if exact else p.bfloat16())
    return found


# %% tags=["hide-input"]
#| export optim.traffic
import contextlib
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from speedrun.lab.bench import wait_for
from speedrun.lab.errors import UserError


def sent_by_machine() -> float:
    """Bytes that this machine has sent through all network devices, the loopback among them, by the number of ranks."""
    path = Path("/proc/net/dev")
    if not path.exists():
        raise UserError("bytes are counted in /proc/net/dev", "measure this on Linux")
    lines = path.read_text().splitlines()[2:]
    return sum(int(line.split(":")[1].split()[8]) for line in lines) / dist_info()[1]


def sent_by_gpu(index: int) -> float:
    """Bytes that a GPU has sent through its NVLinks, as its own counters say, in steps of 1,024."""
    import pynvml  # type: ignore[import-untyped]

    pynvml.nvmlInit()
    uuid = torch.cuda.get_device_properties(
        index
    ).uuid  # NVML counts GPUs that are hidden from us, too
    handle, every = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"), 0xFFFFFFFF
    counter = pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX
    (value,) = pynvml.nvmlDeviceGetFieldValues(handle, [(counter, every)])
    if value.nvmlReturn:
        error = pynvml.NVMLError(value.nvmlReturn)
        raise UserError(
            f"GPU {index} does not count what its NVLinks send: {error}", "count on gloo"
        )
    return 1024 * value.value.ullVal


HALVES = {"scattered": "reduce", "gathered": "gather"}


def counted(comm: Any, begin: str, repeats: int = 5) -> float:
    """Bytes that a rank sends in one half of an exchange, less a barrier's; a median."""
    device = comm.shard.device
    gpu = device.type == "cuda"

    def settled() -> float:
        dist.barrier()
        if gpu:
            torch.cuda.synchronize()
        time.sleep(0.05)  # until stragglers are through
        return sent_by_gpu(device.index) if gpu else sent_by_machine()

    found = []
    for _ in range(repeats):
        start, before = settled(), settled()
        getattr(comm, begin)()
        comm.wait()
        found.append(settled() - before - (before - start))
    return statistics.median(found)


# %% tags=["hide-input"]
#| export optim.traffic
def sent_so_far(device: torch.device) -> float | None:
    """Bytes that this rank has sent, when all is done: a CPU's by mean of the ranks; None of a GPU that does not count them."""
    wait_for(device.type)
    if dist_info()[1] > 1:
        dist.barrier()
    with contextlib.suppress(UserError):
        return sent_by_gpu(device.index or 0) if device.type == "cuda" else sent_by_machine()
    return None


def bytes_of_step(optimizer: MuonAdam) -> float:
    """Bytes that a rank sends in a step, by formula: the mean of steps with Adam and without. What is tied is not sent."""
    total, world = 0.0, dist_info()[1]
    for name in optimizer.states.keys() - optimizer.ties.tied.keys():
        state = optimizer.states[name]
        full, kind = state.comm.full, state.specs[0].comm
        total += sum(bytes_sent(kind, full.numel(), full.element_size(), world)) / state.every
    return total


# %% tags=["hide-input"]
#| export measure.many_gpus
def small_record(scale: int, device: str = "cpu", compile: bool = True) -> MuonAdam:
    """Record 89's parameters and table at a fraction of its widths."""
    adam = AdamConfig(eps=1e-10, weight_decay=0.005, cautious=True, every=2)
    config = OptimConfig(adam, RECORD_MUON, "muon", grad_clip=0.0)
    parameters, specs = record_parameters(scale, device), record_specs(scale)
    return MuonAdam(parameters, specs, config, compile, SCATTER, WORK)


def announce_some(optimizer: MuonAdam, share: float, seed: int) -> Tensor:
    """Say that a share of the bigram table's rows was touched; which: (rows,) bool."""
    table, draw = optimizer.params["bigram"], torch.Generator().manual_seed(seed)
    rows = torch.rand(len(table), generator=draw) < share
    optimizer.states["bigram"].comm.announce(rows.nonzero())
    return rows


def wire_of_rank(device: str, scale: int = 8, touched: float = 0.2) -> dict:
    """Of each part: bytes that a rank sends, scattering and gathering, as counted (on CPUs: mean of the ranks) and by formula."""
    optimizer, (rank, world), found = small_record(scale, device), dist_info(), dict[str, dict]()
    announce_some(optimizer, touched, seed=rank)
    for name, state in optimizer.states.items():
        full, kind = state.comm.full, state.specs[0].comm
        size, rows = full.element_size(), touched * len(full) * (kind == "sharded_sparse")
        formula = bytes_sent(kind, full.numel(), size, world, rows, full[0].numel())
        found[name] = {"comm": kind, "bytes": full.numel() * size, "formula": formula} | {
            half: counted(state.comm, begin) for half, begin in HALVES.items()
        }
    return found


# %% tags=["hide-input"]
assert bytes_of_step(small_record(48)) == 0.0, "a rank alone sends nothing"


# %% tags=["hide-input"]
#| export measure.many_gpus
def steps_of_rank(device: str, scale: int = 48, steps: int = 4, micro: int = 4) -> dict:
    """Parameters after some steps with small integers for gradients, `micro` micro-batches shared by the ranks: a hash of each, and its length."""
    optimizer, (rank, world) = small_record(scale, device), dist_info()
    for step in range(steps):
        for part in range(rank * micro // world, (rank + 1) * micro // world):
            rows = announce_some(optimizer, 0.2, seed=100 * step + part)
            draw = torch.Generator().manual_seed(100 * step + part)
            for name, p in optimizer.params.items():
                g = torch.randint(-3, 4, p.shape, generator=draw)
                assert p.grad is not None  # the optimizer's storage
                p.grad += (g * rows[:, None] if name == "bigram" else g).to(p.grad)
        optimizer.step(settings_at(step))
    found = {name: p.detach().cpu() for name, p in optimizer.params.items()}
    bits = {name: p.view(torch.uint8).numpy().tobytes() for name, p in found.items()}
    hashes = {name: hashlib.sha256(some).hexdigest() for name, some in bits.items()}
    return {"hash": hashes, "length": {name: p.double().norm().item() for name, p in found.items()}}


# %% tags=["hide-input"]
#| export measure.many_gpus
def fill_gradients(optimizer: MuonAdam, index: int, tokens: int = 32_768) -> None:
    """Random gradients, the bigram table's in as many of its rows as a pair of record 89's micro-batches may touch."""
    rank, world = dist_info()
    rows = announce_some(optimizer, tokens / 377_280, seed=index * world + rank)
    for name, p in optimizer.params.items():
        assert p.grad is not None  # the optimizer's storage
        p.grad.normal_(std=1e-3)
        if name == "bigram":
            p.grad *= rows[:, None].to(p.grad)
    if world > 1:
        dist.barrier()


# %% tags=["hide-input"]
#| export measure.many_gpus
def time_steps(optimizer: MuonAdam, device: str, rounds: int = 17) -> dict[str, list]:
    """Milliseconds of steps without tables (even) and with them (odd), and of Python in them."""
    took: dict[str, list] = {"even": [], "odd": [], "exchange": []}
    for index in range(2 * (rounds + 4)):
        fill_gradients(optimizer, index)
        sparse, tables = optimizer.states["bigram"].comm, index % 2 == 1
        if tables and dist_info()[1] > 1:  # a trainer does this during the backward pass
            took["exchange"].append(clocked(sparse.exchange, device)[0])
        done = clocked(partial(optimizer.step, settings_at(index)), device)
        if index >= 8:
            took["odd" if tables else "even"].append(done)
    return took


def step_of_rank(device: str, scale: int = 0) -> dict:
    """Times of record 89's step, tied and apart; of each part's update alone, and of what is around the updates."""
    optimizer = small_record(scale or (1 if device == "cuda" else 48), device)
    begin = time.perf_counter()
    optimizer.warm_up()
    wait_for(device)
    found: dict[str, Any] = {"warm_up_s": time.perf_counter() - begin}
    found["tied"] = time_steps(optimizer, device)
    optimizer.ties.untie("embed")
    found["apart"] = time_steps(optimizer, device)
    works: dict[str, Callable[[], None]] = dict(optimizer.calls)
    works["guard"] = lambda: optimizer.check_finite(list(optimizer.states))
    works |= {f"clear {name}": state.comm.clear for name, state in optimizer.states.items()}
    with torch.no_grad():
        found["parts"] = {
            name: [clocked(work, device)[0] for _ in range(17)] for name, work in works.items()
        }
    if device == "cuda":
        found["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


# %% tags=["hide-input"]
scale = tier.pick(cpu=48, gpu=1)  # 1: record 89's own widths
brief = step_of_rank(tier.device, scale)
assert len(brief["tied"]["even"]) == len(brief["apart"]["odd"]) == 17
assert {"qk", "bigram", "guard", "clear head"} <= set(brief["parts"])
took = {kind: statistics.median(ms for ms, _ in brief["tied"][kind]) for kind in ("even", "odd")}
print(
    f"here, widths divided by {scale}: {took['even']:.1f} ms a step, {took['odd']:.1f} with tables"
)


# %% tags=["hide-input"]
#| export measure.many_gpus
def ceilings(device: str) -> dict[str, float]:
    """What this device does at best: FLOPs a second of a large bfloat16 product, bytes a second of a large copy."""
    size = 8192 if device == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    source = torch.ones(16 * size * size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    works = {"flops": lambda: [a @ a for _ in range(10)]}
    works["bytes"] = lambda: [target.copy_(source) for _ in range(10)]
    amount, found = {"flops": 20 * size**3, "bytes": 20 * source.numel()}, {}
    for what, work in works.items():
        seconds = statistics.median(clocked(work, device)[0] for _ in range(7)) / 1000
        found[what] = amount[what] / seconds
    return found


# %% tags=["hide-input"]
#| export measure.many_gpus
def stock_of_rank(device: str, scale: int = 0) -> dict:
    """Milliseconds of a step of PyTorch's own pair: Muon on every matrix, fused AdamW on all else, both in bfloat16."""
    scale = scale or (1 if device == "cuda" else 48)
    parameters, matrices, rest = record_parameters(scale, device), [], []
    for spec in record_specs(scale):
        p, muon = parameters[spec.name], spec.optim == "muon"
        for one in p.detach().bfloat16() if muon else [p.detach()]:
            (matrices if muon else rest).append(nn.Parameter(one.clone()))
    pair: list[Any] = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0, momentum=0.95)]
    pair.append(torch.optim.AdamW(rest, lr=0.008, fused=True))
    for p in (*matrices, *rest):
        p.grad = 1e-3 * torch.randn_like(p)
    took = {
        name: [clocked(optimizer.step, device)[0] for _ in range(21)][4:]
        for name, optimizer in zip(("Muon", "AdamW"), pair)
    }
    return {"parts": took, "matrices": len(matrices), "ceilings": ceilings(device)}


# %% tags=["hide-input"]
stock = stock_of_rank(tier.device, scale=tier.pick(cpu=48, gpu=4))  # 16 GB hold no more beside it
assert stock["matrices"] == 60 + 20 + 22 and len(stock["parts"]["AdamW"]) == 17


# %% tags=["hide-input"]
#| export measure.many_gpus
def in_turn(optimizer: MuonAdam) -> None:
    """Leave streams out, and wait for every transfer as soon as it has begun."""
    optimizer.streams = dict.fromkeys(optimizer.states)
    for state in optimizer.states.values():
        for name in HALVES.values():
            begin = getattr(state.comm, name)
            wait = state.comm.wait
            setattr(state.comm, name, lambda begin=begin, wait=wait: (begin(), wait()))


def kind_of(kernel: str) -> str | None:
    """What a kernel does, by its name: sums, gathers, products or elementwise; None for what is no kernel."""
    if kernel.startswith(("nccl:", "gloo:", "ProfilerStep", "record_param_comms")):
        return None
    if "ncclDevKernel" in kernel:
        return "gathers" if "AllGather" in kernel else "sums"
    named = ("gemm", "nvjet", "cutlass", "xmma", "sm90_")
    return "products" if any(part in kernel for part in named) else "elementwise"


def stretches(kernels: list[tuple[str, float, float]], gap: float = 4.0) -> dict[str, list]:
    """What ran when, in µs from the first: kind → [begin, end] of each stretch; kernels closer than `gap` are one."""
    found: dict[str, list] = {"sums": [], "gathers": [], "products": [], "elementwise": []}
    first = min((begin for _, begin, _ in kernels), default=0.0)
    for name, begin, end in sorted(kernels, key=lambda kernel: kernel[1]):
        kind = kind_of(name)
        if kind is None:
            continue
        if found[kind] and begin - first - found[kind][-1][1] < gap:
            found[kind][-1][1] = max(found[kind][-1][1], round(end - first, 1))
        else:
            found[kind].append([round(begin - first, 1), round(end - first, 1)])
    return found


# %% tags=["hide-input"]
fake = [("ncclDevKernel_Sum", 1.0, 5.0), ("nvjet_sm90_hsh", 2.0, 3.0), ("nvjet_sm90_hsh", 4.0, 6.0)]
fake += [("nccl:all_gather", 1.0, 5.0), ("triton_poi_fused", 11.0, 12.0)]
seen = stretches(fake)
assert seen["sums"] == [[0.0, 4.0]] and seen["products"] == [[1.0, 5.0]]
assert seen["elementwise"] == [[10.0, 11.0]]


# %% tags=["hide-input"]
#| export measure.many_gpus
def trace_of_rank(device: str, scale: int = 0) -> dict:
    """What the first rank's GPU did in a step with tables, overlapped, and one thing after the other."""
    from torch.profiler import ProfilerActivity, profile

    optimizer = small_record(scale or (1 if device == "cuda" else 48), device)
    optimizer.warm_up()
    found = {}
    for way in ("overlapped", "in turn"):
        if way == "in turn":
            in_turn(optimizer)
        for index in range(8):
            fill_gradients(optimizer, index)
            if index % 2:
                optimizer.states["bigram"].comm.exchange()
            wait_for(device)
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
                took = clocked(partial(optimizer.step, settings_at(index)), device)
        events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        spans = [(e.name, e.time_range.start, e.time_range.end) for e in events]
        found[way] = {"lanes": stretches(spans), "ms": took[0]}
    return found


# %% tags=["hide-input"]
#| export measure.many_gpus
RUN_STEPS = 20  # timed in each stage


def stage_of_rank(run: Any, start: int, steps: int) -> dict:
    """Milliseconds of steps in the stage that begins at `start`, and bytes that this rank sends in a step, as counted and by formula."""
    from speedrun.lab.timer import StepTimer
    from speedrun.train import train_step

    run.step, marks = start, StepTimer(run.ranks.device)
    tokens = run.schedule.at(start).batch_tokens
    for _ in range(2):
        train_step(run)
    before = sent_so_far(run.ranks.device)
    marks.restart()
    for _ in range(steps):
        train_step(run)
        marks.mark()
    after = sent_so_far(run.ranks.device)
    counted = None if before is None or after is None else (after - before) / steps
    found = {"step": start, "tokens": tokens, "ms": marks.drain()}
    return found | {"sent": counted, "formula": bytes_of_step(run.optimizer)}


# %% tags=["hide-input"]
#| export measure.many_gpus
Spans = list[tuple[str, float, float]]


def named_transfers(kernels: Spans, begun: list[tuple[str, str]]) -> list[list]:
    """NCCL's kernels with what they carry: [kind, parameter, begin, end].

    begun: (kind, parameter) of sharded ones, as they were asked for; transfers of one kind run in that order. What is
    all-reduced are the replicated parameters together, and the flags that say whether gradients are finite.
    """
    queues = {kind: [name for k, name in begun if k == kind] for kind in ("sums", "gathers")}
    found: list[list] = []
    for kernel, begin, end in sorted(kernels, key=lambda one: one[1]):
        if (kind := kind_of(kernel)) not in queues:
            continue
        small = "AllReduce" in kernel or not queues[kind]
        found.append([kind, "all-reduced" if small else queues[kind].pop(0), begin, end])
    return found


# %% tags=["hide-input"]
known = [("ncclDevKernel_ReduceScatter_Sum_bf16", 0.0, 2.0), ("gemm", 1.0, 5.0)]
known += [("ncclDevKernel_AllReduce_Sum_f32", 2.0, 3.0), ("ncclDevKernel_AllGather", 6.0, 8.0)]
moved = named_transfers(known, [("sums", "qk"), ("gathers", "qk")])
assert [what for _, what, _, _ in moved] == ["qk", "all-reduced", "qk"]


# %% tags=["hide-input"]
#| export measure.many_gpus
def spans_of(seen: Any) -> Spans:
    """What a profile saw on the GPU: (kernel, begin, end), µs from the first kernel."""
    events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = [(e.name, e.time_range.start, e.time_range.end) for e in events if kind_of(e.name)]
    first = min((begin for _, begin, _ in spans), default=0.0)
    return [(name, round(begin - first, 1), round(end - first, 1)) for name, begin, end in spans]


def noted(optimizer: MuonAdam) -> list[tuple[str, str]]:
    """A list that grows by (kind, parameter) whenever the optimizer begins to sum or to gather what is sharded."""
    begun: list[tuple[str, str]] = []

    def noting(begin: Callable, what: tuple[str, str]) -> Callable:
        return lambda: (begun.append(what), begin())  # type: ignore[func-returns-value]

    for name, state in optimizer.states.items():
        for half, kind in (("reduce", "sums"), ("gather", "gathers")):
            if state.specs[0].comm != "replicated":
                setattr(state.comm, half, noting(getattr(state.comm, half), (kind, name)))
    return begun


def trace_of_run(run: Any) -> dict:
    """What the first rank's GPU does in a step that updates everything: stretches by kind, and transfers by parameter."""
    from torch.profiler import ProfilerActivity, profile

    from speedrun.train import train_step

    begun, run.step = noted(run.optimizer), 0
    for _ in range(3):
        train_step(run)
    run.clock.wait()
    begun.clear()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        train_step(run)
        run.clock.wait()
    spans = spans_of(seen)
    return {"lanes": stretches(spans, gap=20.0), "transfers": named_transfers(spans, begun)}


def run_of_rank(device: str, path: str, steps: int | str = RUN_STEPS) -> dict:
    """Stages, bytes and a trace of `record_200m` on this rank. On a CPU: of the same at CPU size, without a trace."""
    from speedrun.cpu_size import at_cpu_size
    from speedrun.run import memory_mb
    from speedrun.train import build_run, warm_up

    config = vary(preset("record_200m"), {"data.path": path})
    if device == "cpu":
        config = vary(at_cpu_size(config, 100), {"compile": False})
    config = vary(config, {"device": device})
    with tempfile.TemporaryDirectory() as folder:
        run = build_run(config, Path(folder), echo=lambda line: None)
        found: dict[str, Any] = {"warm_up_s": warm_up(run)}
        if device == "cuda":
            found["trace"] = trace_of_run(run)
        long = [s for s in run.schedule.starts if s + int(steps) + 2 < config.steps]
        found["stages"] = [stage_of_rank(run, start, int(steps)) for start in long]
        return found | {"memory_mb": memory_mb(run.ranks.device)}


# %% tags=["hide-input"]
#| export measure.many_gpus
WORKS: dict[str, Callable[..., dict]] = {"wire": wire_of_rank, "steps": steps_of_rank}
WORKS |= {"step": step_of_rank, "stock": stock_of_rank, "trace": trace_of_rank, "run": run_of_rank}
WORKS |= {"nvlink": partial(wire_of_rank, scale=1, touched=32_768 / 377_280)}


def one_rank(name: str, out: str, device: str, *rest: str) -> None:
    """What each process of `on_ranks` does."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if name != "run":  # or transfers wait behind large kernels; the trainer does not ask for it
            os.environ["TORCH_NCCL_HIGH_PRIORITY"] = "1"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    result = WORKS[name](device, *rest)
    if dist_info()[0] == 0:
        Path(out).write_text(json.dumps(result))
    dist.destroy_process_group()


def on_ranks(world: int, name: str, device: str = "cpu", rest: Sequence[str] = ()) -> dict:
    """What a work gives on the first of `world` processes of this machine, which talk through gloo, or on GPUs through NCCL. rest: its arguments."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={world}", "-m", "speedrun.measure.many_gpus"]
        command += [name, str(out), device, *rest]
        quiet = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=root(), env=quiet, capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        return json.loads(out.read_text())


def on_gpus(name: str) -> dict:
    """A measurement on this machine's GPUs."""
    count = torch.cuda.device_count()
    if count < (1 if name == "step" else 2):
        raise UserError(f"“{name}” is measured on GPUs, here are {count}", "make doctor says why")
    if name != "step":
        return on_ranks(2, name, "cuda")
    worlds = {str(w): on_ranks(w, "step", "cuda") for w in RANKS if w <= count}
    return {"ranks": worlds, "stock": on_ranks(1, "stock", "cuda")}


def run_on_gpus(world: int, path: str, command: str) -> tuple[dict, dict]:
    """`run_of_rank` on a number of this machine's GPUs, which read the folder `path`: data and stamp."""
    from speedrun.measure.runs import corpus_of

    if (count := torch.cuda.device_count()) < world:
        what = f"“run_{world}” is measured on GPUs, here are {count}"
        raise UserError(what, "make doctor says why")
    run = preset("record_200m")
    run = vary(run, {"data.path": str(Path(path or run.data.path).absolute())})
    of = ["speedrun.train", "speedrun.measure.many_gpus", "speedrun.optim.sparse"]
    data = on_ranks(world, "run", "cuda", [run.data.path])
    return data, stamp(command, of, RUN_STEPS, [run.seed], corpus_of(run))


# %% tags=["hide-input"]
#| export measure.many_gpus
def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """wire: bytes that a rank sends for each part of record 89's table at an eighth of its widths, by number of ranks.

    On GPUs, step: times of record 89's step and of PyTorch's own pair. trace: what ran when. nvlink: bytes, of two ranks.
    run_1, run_2, run_4, run_8: `record_200m` on so many GPUs, its steps, bytes and a trace; its argument a data folder, if not the preset's.
    """
    if name.startswith("run_"):
        return run_on_gpus(int(name[4:]), arguments[0] if arguments else "", command)
    modules = ["speedrun.measure.many_gpus", "speedrun.optim.sparse"]
    if name in ON_GPUS:
        samples = {"step": 17, "trace": 1, "nvlink": 5}[name]
        return on_gpus(name), stamp(command, modules, samples)
    found = {str(world): on_ranks(world, "wire") for world in RANKS}
    return {"ranks": found}, stamp(command, modules, 1)


if __name__ == "__main__" and __spec__ is not None:  # python -m, not a notebook
    one_rank(*sys.argv[1:])


# %% [markdown]
# Does it come to the same, however many share the work? Four micro-batches with gradients of small integers are summed exactly in any order and any grouping, so the sums of 1, 2 and 4 ranks are equal to the bit. So are the updates, if a matrix comes out the same from a batch of three and from a batch of six. Many CPUs' libraries do that; others, and a GPU's, need not. These are real processes, with record 89's table (every width and vocabulary divided by 48), Muon and Adam, and every kind of communication:

# %%
after = {world: on_ranks(world, "steps") for world in (1, 2, 4)}
one, others = after[1], (after[2], after[4])
differ = {
    name for name, bits in one["hash"].items() if any(o["hash"][name] != bits for o in others)
}
assert differ <= {"qk", "vo", "mlp"}, "only products of Muon's banks may differ"
for name in differ:
    assert all(math.isclose(one["length"][name], o["length"][name], rel_tol=1e-3) for o in others)
print(
    f"1, 2 and 4 ranks: {len(one['hash']) - len(differ)} of {len(one['hash'])} parameters equal to the bit"
)

# %% [markdown]
# And the bytes, beside the formula:

# %%
import statistics

from torch.utils.flop_counter import FlopCounterMode

from speedrun.lab.results import load_result, measured_on
from speedrun.optim.muon import polar_express

wire = load_result("many_gpus", "wire")
worlds = {int(world): parts for world, parts in wire["data"]["ranks"].items()}
assert set(worlds) == set(RANKS)
assert all(abs(p[k]) < 100 for p in worlds[1].values() for k in ("scattered", "gathered"))
ratios: dict[str, list[float]] = {"gather": [], "sparse": [], "scatter": [], "all-reduce": []}
for world in RANKS[1:]:
    for part in worlds[world].values():
        scattered, gathered = part["formula"]
        if part["bytes"] < 20_000:  # there headers count for more than numbers
            continue
        if gathered:
            ratios["gather"].append(part["gathered"] / gathered)
        kind = {"sharded": "scatter", "replicated": "all-reduce"}.get(part["comm"], "sparse")
        ratios[kind].append(part["scattered"] / scattered)
for kind, values in ratios.items():
    print(f"{kind:10} {min(values):.2f} to {max(values):.2f} of the formula")
assert max(ratios["gather"]) < 1.03 and max(ratios["sparse"]) < 1.03
assert 1.9 < min(ratios["scatter"]) and max(ratios["scatter"]) < 2.1
print(measured_on(wire))

# %% [markdown]
# Gathering and the sparse exchange cost what the formula says, to a part in a hundred or so. Summing costs *twice* as much, for every bank and table: PyTorch's reduce-scatter over gloo is an all-reduce of which each rank throws most away. So over gloo sharding sends 1.5 times an all-reduce.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Bytes that a rank sends for one update of all sharded parameters, counted and by formula, for 1, 2, 4 and 8 ranks"}}
import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style

figure_style()
fig, axis = plt.subplots(figsize=(5.6, 3.4))
dense = {w: [p for p in worlds[w].values() if p["comm"] == "sharded"] for w in RANKS}
drawn: dict = {}
for n, (half, which) in enumerate((("scattered", 0), ("gathered", 1))):
    drawn[half] = [sum(part[half] for part in dense[w]) / 1e6 for w in RANKS]
    drawn[which] = [sum(part["formula"][which] for part in dense[w]) / 1e6 for w in RANKS]
    axis.plot(RANKS, drawn[half], "os"[n], color=f"C{n}", label=f"{half}, counted")
axis.plot(RANKS, drawn[0], "-", color="0.4", lw=1, label="either, by formula")
assert drawn[0] == drawn[1]
axis.set_xscale("log", base=2)
axis.set_xticks(RANKS, RANKS)
axis.set_xlabel("ranks")
axis.set_ylabel("MB sent by a rank")
axis.set_ylim(0)
axis.legend()
twice = drawn["scattered"][-1] / drawn[0][-1]
exact = drawn["gathered"][-1] / drawn[1][-1]
axis.set_title(
    f"gloo's reduce-scatter sends {twice:.1f} times what it has to,\nits all-gather {exact:.2f} times"
)
plt.show()

# %% [markdown]
# NCCL has the real one. An H100 counts what its NVLinks send, so the same can be counted there, on two GPUs:

# %%
nvlink = load_result("many_gpus", "nvlink")
times_formula: dict[str, list[float]] = {"more than 2 MB": [], "less": [], "sparse": []}
for part in nvlink["data"].values():
    for half, formula in zip(("scattered", "gathered"), part["formula"]):
        rows = part["comm"].endswith("sparse") and half == "scattered"
        kind = "sparse" if rows else "more than 2 MB" if formula > 2e6 else "less"
        if formula > 10_000:
            times_formula[kind].append(part[half] / formula)
for kind, values in times_formula.items():
    print(f"{kind:15} {min(values):.2f} to {max(values):.2f} times the formula")
assert all(abs(ratio - 1) < 0.01 for ratio in times_formula["more than 2 MB"])
assert all(abs(ratio - 2) < 0.02 for ratio in times_formula["less"])
assert abs(times_formula["sparse"][0] - 1) < 0.05
print(measured_on(nvlink))

# %% [markdown]
# Large messages cost what the formula says. The one small one, 0.2 MB, costs twice as much. NCCL has a protocol for such, LL, in which a flag travels beside every four bytes.
#
# ### Step time
#
# Now the step, with record 89's shapes at full size and chapter 13's products, by itself. What could it take at best? Muon's products, by whole tiles of 128 × 128, at the rate at which this GPU multiplies large matrices; of a product that is symmetric, the tiles on and below the diagonal. Then each number that has to be read or written, at the rate at which it copies: 20 bytes for a weight under Muon, 24 under Adam, their gradients' clearing included.


# %%
def tiled(count: int, rows: int, cols: int, inner: int, symmetric: bool, tile: int = 128) -> int:
    """FLOPs of `count` products (rows × inner) · (inner × cols) by whole tiles."""
    high, wide = -(-rows // tile), -(-cols // tile)
    tiles = high * (high + 1) // 2 if symmetric else high * wide
    return count * tiles * 2 * tile * tile * inner


def muon_flops(count: int, rows: int, cols: int, symmetric: bool = True) -> int:
    """FLOPs of chapter 13's Gram form: restarted once for long matrices, after every polynomial for others."""
    m, n = sorted((rows, cols))
    parts = 2 if n > 1.5 * m else 5
    squares = 5 + 3 * (5 - parts)
    long = tiled(count, m, m, n, symmetric) + tiled(count, m, n, m, False)
    return parts * long + squares * tiled(count, m, m, m, symmetric)


def floors(at_best: dict[str, float]) -> dict[str, float]:
    """Milliseconds of one GPU's step without tables and with them, if nothing but arithmetic and memory took time."""
    banks = [spec.shape for spec in record_specs()[:3]]
    products = sum(muon_flops(*bank) for bank in banks) / at_best["flops"]
    memory = 20 * sum(math.prod(bank) for bank in banks) / at_best["bytes"]
    tables = 24 * (HEAD + VALUES + BIGRAM) / at_best["bytes"]
    even = 1000 * (products + memory)
    return {"even": even, "odd": even + 1000 * tables}


with FlopCounterMode(display=False) as counter:
    for shape in ((2, 256, 512), (2, 128, 128)):
        polar_express(torch.randn(shape), gram=True)
assert counter.get_total_flops() == muon_flops(2, 256, 512, False) + muon_flops(2, 128, 128, False)

# %%
timed = load_result("many_gpus", "step")
data = timed["data"]
at_best = data["stock"]["ceilings"]
KINDS = ("even", "odd")  # without tables, and with them


def medians(data: dict, n: int) -> dict:
    """Of each number of ranks: milliseconds of either kind of step; n: 0 till all is done, 1 till Python is."""
    return {
        world: {kind: statistics.median(t[n] for t in one["tied"][kind]) for kind in KINDS}
        for world, one in data["ranks"].items()
    }


ms, python = medians(data, 0), medians(data, 1)
floor = floors(at_best)
both_halves = sum(muon_flops(*spec.shape, False) - muon_flops(*spec.shape) for spec in record_specs()[:3]) / at_best["flops"]  # fmt: skip
assert f"{1000 * both_halves:.1f}" == "0.4", "milliseconds, of products' other halves"
for world in ms:
    for kind in KINDS:
        best = f"; at best {floor[kind]:.1f}" if world == "1" else ""
        print(
            f"{world} GPU, {kind:4}: {ms[world][kind]:.1f} ms, Python done after {python[world][kind]:.1f}{best}"
        )
stock = {name: statistics.median(times) for name, times in data["stock"]["parts"].items()}
print(f"PyTorch: Muon {stock['Muon']:.1f} ms, AdamW {stock['AdamW']:.1f}")
exchange = statistics.median(data["ranks"]["2"]["tied"]["exchange"])
print(f"not in these times: telling the touched rows, {exchange:.1f} ms; {measured_on(timed)}")

# %%
parts = {
    world: {name: statistics.median(times) for name, times in one["parts"].items()}
    for world, one in data["ranks"].items()
}
adam = sum(parts["1"][name] for name in ("head", "values", "bigram"))
as_stock = adam + parts["1"]["embed"] + sum(parts["1"][n] for n in parts["1"] if n[:4] == "repl")
one, eighth = ms["1"], sum(parts["1"][name] for name in ("qk", "vo", "mlp")) / 8
alone = sum(parts["1"].values())
apart = statistics.median(t[0] for t in data["ranks"]["1"]["apart"]["odd"])
assert 2.2 < one["even"] / floor["even"] < 2.4 and 1.4 < one["odd"] / floor["odd"] < 1.5
assert abs(adam / ((floor["odd"] - floor["even"]) * 22 / 24) - 1) < 0.03, "without clearing"
assert 9.3 < stock["Muon"] / one["even"] < 9.7 and 1.18 < as_stock / stock["AdamW"] < 1.22
assert f"{sum(stock.values()) / one['odd']:.1f} {alone - apart:.1f}" == "4.4 0.3"
assert 6.1 < 2 * sum(stock.values()) / (one["even"] + one["odd"]) < 6.4
assert eighth < python["2"]["even"] < eighth + parts["2"]["guard"] and f"{eighth:.1f}" == "0.4"
assert all(python[w][kind] < 0.35 * ms[w][kind] for w in ms for kind in KINDS), "not launch-bound"
assert 0.7 < ms["2"]["even"] / one["even"] < 0.75 and 0.75 < python["2"]["even"] < 0.85
assert 0.89 < ms["2"]["odd"] / one["odd"] < 0.92
for name in ("qk", "vo", "mlp", "head", "values", "bigram", "guard"):
    label = "check" if name == "guard" else name
    print(f"{label:7} {parts['1'][name]:.2f} ms on one, {parts['2'][name]:.2f} on each of two")
print(f"with head and embedding apart, on one GPU: {apart:.1f} ms, its parts {alone:.1f}")

# %% [markdown]
# One H100 takes 2.3 times the floor for a step without tables. Products are computed whole, though most are symmetric: 0.4 of the 2.0 ms. The rest is presumably copies of the matrix that is added to, and reading and writing for norms and momentum. Adam, by itself, is at its floor.
#
# PyTorch's `Muon` updates the 102 matrices one after the other, and every operation is its own kernel; ours takes little more than a tenth of its time, though it does more: momentum in float32, mantissas, the non-finite check. A step with tables takes the pair 4.4 times as long.
#
# Two GPUs halve the arithmetic. The step without tables gets more than a quarter shorter, the one with tables a tenth.
#
# On one GPU streams save little. On two they hide transfers:

# %% tags=["hide-input"] mystnb={"image": {"alt": "What the first of two GPUs does during a step with tables: sums, gathers, products and all other kernels over time, once with each transfer waited for and once overlapped"}}
trace = load_result("many_gpus", "trace")["data"]
SAID = {"in turn": "one stream, and each transfer waited for", "overlapped": "overlapped"}
fig, axes = plt.subplots(2, 1, figsize=(7, 3.9), sharex=True, layout="constrained")
for axis, way in zip(axes, SAID):
    for n, spans in enumerate(trace[way]["lanes"].values()):
        bars = [(begin / 1000, (end - begin) / 1000) for begin, end in spans]
        axis.broken_barh(bars, (-n - 0.4, 0.8), color=f"C{n}")
    axis.set_yticks([0, -1, -2, -3], ["sums", "gathers", "products", "all else"])
    axis.set_title(SAID[way], loc="left", fontsize=9)
    axis.grid(False)
busy = {
    way: {kind: sum(b - a for a, b in spans) / 1000 for kind, spans in found["lanes"].items()}
    for way, found in trace.items()
}
network = {way: found["sums"] + found["gathers"] for way, found in busy.items()}
ends = {way: trace[way]["lanes"]["gathers"][-1][1] / 1000 for way in trace}
axes[-1].set_xlabel("ms, on the first of two H100s, under the profiler")
fig.suptitle(f"overlapping: {ends['in turn']:.1f} → {ends['overlapped']:.1f} ms a step")
plt.show()

# %%
gathers = {way: trace[way]["lanes"]["gathers"] for way in trace}
sizes_gb = {name: size / 1e9 for name, size in (("bigram", BIGRAM), ("values", VALUES))}  # halves
rates = {
    way: [gb / (end - begin) * 1e6 for gb, (begin, end) in zip(sizes_gb.values(), spans)]
    for way, spans in gathers.items()
}
assert 1.65 < network["overlapped"] / network["in turn"] < 1.8
assert all(260 < rate < 290 for rate in rates["in turn"])
assert all(130 < rate < 185 for rate in rates["overlapped"])
first = trace["overlapped"]["lanes"]
tenths = {  # of a microsecond: in which of them something travels, or is computed
    kinds: {t for kind in kinds for a, b in first[kind] for t in range(int(10 * a), int(10 * b))}
    for kinds in (("sums", "gathers"), ("products", "elementwise"))
}
travels, computes = tenths.values()
idle = len(travels - computes) / 10
sent = bytes_sent("sharded", HEAD + VALUES + MUON_WEIGHTS, 2, 2)
rows = bytes_sent("sharded_sparse", BIGRAM, 2, 2, rows=2 * 16_384, width=768)
link = (sum(sent) + sum(rows)) / min(rates["in turn"]) / 1e6
assert f"{idle / 1000:.1f}" == "0.5" and 3.4 < link < 3.6
slowest = odd / min(rates["in turn"])
assert 0.19 < slowest / 31 < 0.22 and f"{ends['in turn'] - ends['overlapped']:.1f}" == "1.9"
print(
    f"NCCL's kernels: {network['in turn']:.1f} ms waited for, {network['overlapped']:.1f} overlapped"
)
for way, found in rates.items():
    print(f"gathering two tables, {way}: {', '.join(f'{rate:.0f}' for rate in found)} GB/s")
print(f"all bytes of this step at the undisturbed rate: {link:.1f} ms")
print(f"the prediction's step at that rate: {slowest:.1f} ms")
print(f"one step of each, {measured_on(load_result('many_gpus', 'trace'))}")

# %% [markdown]
# Overlapping saves 1.9 milliseconds of 9.4. But NCCL's kernels are then on the GPU 1.7 times as long. That includes waiting for the other rank, and competing for the GPU: two tables' gathers get 134 and 182 GB/s, undisturbed 285 and 264, three fifths of the data sheet's 450. A trace does not tell waiting from slow travelling. (This is in the order chosen above, with transfers at high priority. The trainer takes the table's order, and no priority.)

# %% [markdown]
# ### Scaling in a whole run
#
# Here is the trainer on `record_200m`, before chapters 16 to 19 ([chapter 24](24_speedrun.py) has whole runs): the same batch for one, two and four H200s, twenty steps of each stage. Its one large table holds five layers' value embeddings, 193 million numbers in bfloat16. Before looking: for how much of a step of 66 ms do four GPUs wait, if a rank sends 0.9 GB in it at 260 GB/s, and nothing is hidden?

# %%
whole_runs = {w: load_result("many_gpus", f"run_{w}")["data"] for w in (1, 2, 4)}
step_ms = {w: [statistics.median(s["ms"]) for s in run["stages"]] for w, run in whole_runs.items()}
for w, run in whole_runs.items():
    for stage, ms, alone in zip(run["stages"], step_ms[w], step_ms[1]):
        wire, formula = stage["sent"] / 1e6, stage["formula"] / 1e6
        print(
            f"{w} GPUs, {stage['tokens']:>7,} tokens: {ms:5.1f} ms, {alone / ms:.2f} times as fast;",
            end=" ",
        )
        print(f"{wire:6.1f} MB sent ({formula:.1f})")
        assert abs(stage["sent"] - stage["formula"]) < 1e-4 * max(1, stage["formula"])
faster = {w: [alone / ms for alone, ms in zip(step_ms[1], step_ms[w])] for w in (2, 4)}
assert all(1.95 < gained < 2.0 for gained in faster[2])
assert 3.6 < faster[4][0] < 3.7 and 3.85 < faster[4][2] < 3.95
even, odd = (statistics.median(whole_runs[4]["stages"][0]["ms"][n::2]) for n in (0, 1))
assert 4 < odd - even < 6
print(f"four GPUs, first stage: {even:.1f} ms without tables, {odd:.1f} with them")
print(measured_on(load_result("many_gpus", "run_4")))
today_ms = load_result("speedrun", "record_200m")["data"]["runs"][0]["steps_ms"]
today_ms = [today_ms[n] for n in (16, 49, 83)]
assert [round(ms) for ms in today_ms] == [70, 137, 246], "in the middle of each third"
assert [f"{then / now:.1f}" for then, now in zip(step_ms[2], today_ms)] == ["1.8", "1.8", "1.5"]
means = {w: statistics.mean(whole_runs[w]["stages"][0]["ms"]) for w in (1, 4)}
assert 5 < means[4] - means[1] / 4 < 6, "what four GPUs lose of a step"

# %% [markdown]
# The counters agree with the formula to a ten-thousandth. Two GPUs are nearly twice as fast as one. Four are 3.6 times as fast in the first stage, where a step is shortest, and 3.9 times in the last. (By the question's arithmetic 3.5 ms a step; a quarter of one GPU's step is 5 to 6 shorter.) What they wait for is named in the trace of one step, of the kind that updates the tables too: all that travels does so in its last tenth.

# %% tags=["hide-input"] mystnb={"image": {"alt": "The last seven milliseconds of a training step on the first of four H200s: which parameter's gradient is summed and whose values are gathered when, above the products and all other kernels"}}
last = whole_runs[4]["trace"]
begins = min(begin for _, _, begin, _ in last["transfers"])
TRACKS = {"sums": 0, "gathers": 1, "products": 2, "elementwise": 3}
fig, axis = plt.subplots(figsize=(7.4, 2.9), layout="constrained")
for kind in ("products", "elementwise"):
    spans = [(a / 1000, (b - a) / 1000) for a, b in last["lanes"][kind] if b > begins - 800]
    axis.broken_barh(spans, (-TRACKS[kind] - 0.4, 0.8), color=f"C{TRACKS[kind]}")
for kind, what, a, b in last["transfers"]:
    track = TRACKS[kind]
    axis.broken_barh(
        [(a / 1000, (b - a) / 1000)], (-track - 0.4, 0.8), color=f"C{track}", ec="w", lw=0.5
    )
    if b - a > 300:
        axis.text(
            (a + b) / 2000,
            -track,
            what.replace("_", "\n"),
            ha="center",
            va="center",
            fontsize=7,
            color="w",
        )
axis.set_xlim((begins - 800) / 1000, None)
axis.set_yticks([0, -1, -2, -3], ["sums", "gathers", "products", "all else"])
axis.set_xlabel("ms since the step's first kernel, first of four H200s, under the profiler")
axis.grid(False)
moving = [(a, b) for *_, a, b in last["transfers"]]
working = sorted(
    span for kind in ("products", "elementwise") for span in map(tuple, last["lanes"][kind])
)
hidden, until = 0.0, 0.0
for a, b in working:
    a, until = max(a, until), max(until, b)
    hidden += sum(max(0.0, min(b, d) - max(a, c)) for c, d in moving)
on_wire = sum(b - a for a, b in moving)
axis.set_title(
    f"Transfers take {on_wire / 1000:.1f} ms of this step; for {(on_wire - hidden) / 1000:.1f} nothing else runs"
)
plt.show()

# %%
carried = {what: 0.0 for _, what, _, _ in last["transfers"]}
for _, what, a, b in last["transfers"]:
    carried[what] += b - a
assert carried["value_embedding"] > 0.55 * on_wire and 0.4 < hidden / on_wire < 0.6
assert begins > 0.9 * until
print({what: f"{us / 1000:.2f} ms" for what, us in carried.items()})

# %% [markdown]
# Six tenths of that time belong to the value embeddings. Four ranks send three quarters of everything; eight would send seven eighths, in steps half as long. We have not had eight. If what did not shrink from two GPUs to four does not shrink to eight either, a step of the three stages takes this long:

# %%
on_8 = [b - (a - b) / 2 for a, b in zip(step_ms[2], step_ms[4])]
shares = [alone / 8 / ms for alone, ms in zip(step_ms[1], on_8)]
assert 0.75 < shares[0] < 0.85 and all(share > 0.9 for share in shares[1:])
print(f"predicted on eight: {', '.join(f'{ms:.0f}' for ms in on_8)} ms a step")
print(f"which is {', '.join(f'{share:.0%}' for share in shares)} of eight times one GPU's speed")

# %% [markdown]
# (Today's trainer takes 70, 137 and 246 ms on two GPUs and sends as many bytes, so the same transfers would be a share 1.8, 1.8 and 1.5 times as large.)
#
# ## What it buys
#
# By count, for record 89's parameters on eight GPUs: the state, and the work of the orthogonalisation.


# %%
from speedrun.model.gpt import param_specs


def state_bytes(numel: int, optim: str) -> int:
    """Optimizer state of a parameter: Adam's two moments in float32; Muon's momentum and its mantissa."""
    return numel * (8 if optim == "adam" else 4 + 2)


def busy_share(matrices: int, world: int) -> float:
    """The share of its time that a rank works on matrices which exist, and not on padding."""
    return matrices / (world * math.ceil(matrices / world))


tables = 2 * HEAD + VALUES + BIGRAM
record_89 = {spec.name: spec for spec in record_specs()}
sizes = {name: math.prod(spec.shape) for name, spec in record_89.items()}
assert sum(sizes[name] for name in ("qk", "vo", "mlp")) == MUON_WEIGHTS
assert (sizes["head"], sizes["values"], sizes["bigram"]) == (HEAD, VALUES, BIGRAM)
assert busy_share(20, 16) == 5 / 8
ours = [s for s in param_specs(preset("record").model, 50_257) if s.matrices]
of_ours = sorted(busy_share(s.shape[0] * s.matrices, 8) for s in ours)
assert {s.shape[0] for s in ours} == {10, 11} and of_ours == [10 / 16, 11 / 16, 11 / 16, 30 / 32]
assert 1.1 < 2 * tables / 1e9 < 1.15
whole = state_bytes(MUON_WEIGHTS, "muon") + state_bytes(tables, "adam")
of_bank = {name: busy_share(record_89[name].shape[0], 8) for name in ("qk", "vo", "mlp")}
assert 4.9e9 < whole < 5.2e9 and [round(x, 2) for x in of_bank.values()] == [0.94, 0.83, 0.92]
print(f"state: {whole / 1e9:.1f} GB on each GPU if replicated, {whole / 8e9:.2f} GB sharded")
for name, share in of_bank.items():
    print(f"{name:3}: {record_89[name].shape[0]} matrices on eight ranks, {share:.0%} busy")

# %% [markdown]
# The public ladder has the seconds. Record 6, the first that dealt matrices out to GPUs, took 126 s off 912. All others together are a few seconds. Record 15 began to gather while the next matrices are orthogonalised. Record 24 replaced all all-reduces by their halves (and used another PyTorch). Record 36 laid the banks out so that they divide evenly; its author's comparison gives that 0.7 s. Record 57 interleaved, Muon's sums first and Adam's gathers while Muon computes. Record 71 gained 0.75 s by its author's comparison, a part of it by sending touched rows only {cite}`moddednanogpt`. Officially:

# %%
gained = {
    n: float(ladder[str(n - 1)]["record_time_s"]) - float(ladder[str(n)]["record_time_s"])
    for n in (24, 36, 57, 61, 71)
}
assert all(0.2 < seconds < 2.5 for seconds in gained.values())
assert round(float(ladder["5"]["record_time_s"]) - float(ladder["6"]["record_time_s"])) == 126
print(", ".join(f"record {n}: {seconds:.1f} s" for n, seconds in gained.items()))

# %% [markdown]
# ### What three options do to the loss
#
# How many ranks share the work changes no loss, but for rounding. (A step is the same micro-batches on however many, and each of them chooses its own candidates for a sampled softmax, [chapter 19](19_head_and_loss.py).) Three options of this optimizer may change it: clipping, which costs the overlap; the record's cautious decay in place of AdamW's; and updating tables in every second step, which halves their traffic. The laptop can tell them apart, in 600 steps under record 89's Muon with nine seeds. Cautious Adam, not clipped, has the best rates of a grid for either schedule (twelve points, one seed each). AdamW has those of [chapter 13](13_muon.py), found with clipping.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Validation loss of nine seeds each after 600 steps: AdamW and cautious Adam, both clipped and not, and cautious Adam in every second step"}}
from speedrun.lab.stats import describe, p_difference
from speedrun.presets import preset

compared = load_result("training_loop", "adam")
losses = {arm: [run["val_loss"] for run in some] for arm, some in compared["data"]["arms"].items()}
of_arm = {arm: describe(values) for arm, values in losses.items()}
worth = {arm: of_arm[arm].mean - of_arm[f"{arm}, clipped"].mean for arm in ("AdamW", "every step")}
rarer = of_arm["every second step"].mean - of_arm["every step"].mean
fig, axis = plt.subplots(figsize=(7, 2.9), layout="constrained")
for n, (arm, values) in enumerate(losses.items()):
    color = "C1" if "clipped" in arm else "C0"
    axis.plot(values, [-n] * len(values), "o", color=color, alpha=0.4, mew=0)
    axis.plot(of_arm[arm].mean, -n, "|", color=color, ms=22, mew=2)
names = [arm.replace("every step", "cautious Adam") for arm in losses]
names[-1] = "cautious Adam, every second step"
axis.set_yticks([-n for n in range(len(names))], names)
axis.set_ylim(0.6 - len(names), 0.6)
axis.set_xlabel("validation loss (nats a token) of each seed, and the mean")
axis.set_title(
    f"clipping lowers the loss by {statistics.mean(worth.values()):.3f} nats, whichever the decay;\n"
    f"Adam in every second step raises it by {rarer:.3f}"
)
plt.show()

# %%
optims = {arm: some[0]["config"]["optim"] for arm, some in compared["data"]["arms"].items()}
grid = load_result("training_loop", "adam_rates")["data"]["arms"]
grids = {
    "every step": [some[0] for point, some in grid.items() if point[0] == "1"],
    "every second step": [some[0] for point, some in grid.items() if point[0] == "2"],
    "AdamW, clipped": [r[0] for r in load_result("muon", "laptop_rates")["data"]["arms"].values()],
}
for arm, points in grids.items():
    found = min(points, key=lambda run: run["val_loss"])["config"]["optim"]
    rates = [(optim["matrix_lr"], optim["adam"]["lr"]) for optim in (found, optims[arm])]
    assert rates[0] == rates[1], "the best of its grid"
assert [len(points) for points in grids.values()] == [12, 12, 15]
adams = {arm: optim["adam"] for arm, optim in optims.items()}
plain, cautious = adams["AdamW"], adams["every step"]
assert {key for key in plain if plain[key] != cautious[key]} == {"cautious", "weight_decay"}
assert adams["every second step"] == cautious | {"lr": 2 * cautious["lr"], "every": 2}
# of the learning rate: warm-up and cosine leave half on average
decayed = 600 / 2 * plain["lr"] * plain["weight_decay"]
weaker = plain["weight_decay"] / (cautious["weight_decay"] * cautious["lr"])
assert 0.11 < decayed < 0.13 and weaker > 30
chances = {
    f"clipping, {name}": p_difference(of_arm[arm], of_arm[f"{arm}, clipped"])
    for arm, name in zip(worth, ("AdamW", "cautious Adam"))
}
assert all(p < 1e-5 for p in chances.values()) and max(worth.values()) < 1.05 * min(worth.values())
for end in ("", ", clipped"):
    chances[f"decay{end}"] = p_difference(of_arm[f"AdamW{end}"], of_arm[f"every step{end}"])
    assert chances[f"decay{end}"] > 0.2
chances["every second step"] = p_difference(of_arm["every step"], of_arm["every second step"])
assert chances["every second step"] < 1e-4 and 0.5 < rarer / min(worth.values()) < 0.75
for name, sample in zip(names, of_arm.values()):
    print(f"{name:32} {sample}")
print("; ".join(f"{what}: p = {p:.0e}" for what, p in chances.items()))
ours = [preset(name).optim for name in ("cpu_gpt2", "small_gpt2")]
assert all(o.grad_clip == 1.0 and o.adam.every == 1 and not o.adam.cautious for o in ours)
print(measured_on(compared))

# %% [markdown]
# Clipping brings 0.02 under either Adam. The two differ in decay alone, and nine seeds see no difference; but in 600 steps AdamW's takes an eighth from a weight, the cautious one at this rate less than a thirtieth of that, and chapter 13 found that decay needs time. Updating half as often, at twice the rate, gives up more than half of what clipping brings, and on the laptop it saves next to nothing. So `cpu_gpt2` and `small_gpt2` clip, and update everything in every step; `record`, and the presets made after it, do as the contest does.
#
# ## What it costs, and when it fails
#
# Padding is work on zeros. Twenty matrices on eight ranks leave a sixth of the time to padding, and on sixteen ranks three eighths. `record`'s own banks have ten or eleven, but for one, and leave about a third ([chapter 21](21_model.py)).
#
# Sharding also ends an equality. All ranks must start from the same values, or replicated parameters stay apart unnoticed; and each number is computed by one rank only, and a wrong one goes unnoticed.
#
# And sums in bfloat16 round, at each of a ring's $w - 1$ hops. The gradient of two ranks is not quite that of one: in the tests momenta after six steps differ by less than one part in 128.
#
# ## What did not work
#
# Record 23 began a bucket's all-reduce, record 44 the reduce-scatter of each of Adam's gradients, from a hook, as soon as autograd had finished it. Record 61 went back to a fixed order after the backward pass and was faster, with other changes at the same time.
#
# ## Exercises
#
# 1. Three parameters have sums that take 2, 4 and 1 ms, updates of 1, 5 and 5 ms, and gathers of 1, 1 and 4 ms. Sums run one after the other on the network, in the order in which they were begun; gathers join the same queue when an update is done, behind the sums; updates run one after the other on the GPU. Write `makespan(jobs)` for jobs (sum, update, gather) taken in the given order, and find the best order and the worst.


# %% tags=["solution"]
def makespan(jobs: list[tuple[float, float, float]]) -> float:
    """When the last gather is over: sums queue on the network from time 0, gathers behind them."""
    network, arrived = 0.0, []
    for total, _, _ in jobs:
        network += total
        arrived.append(network)
    gpu = 0.0
    for ready, (_, update, gather) in zip(arrived, jobs):
        gpu = max(gpu, ready) + update
        network = max(network, gpu) + gather
    return network


# %%
from itertools import permutations

three = [(2.0, 1.0, 1.0), (4.0, 5.0, 1.0), (1.0, 5.0, 4.0)]
alone, waits = makespan([(1.0, 1.0, 1.0)]), makespan([(1.0, 1.0, 4.0), (5.0, 1.0, 1.0)])
assert alone == 3.0, f"a single parameter is summed, updated, gathered: 3 ms, not {alone}"
assert waits == 11.0, (
    f"(1, 1, 4) and (5, 1, 1): the first gather waits for the second sum, until 6 ms, and all is over at 11, not {waits}"
)
times = {order: makespan([three[n] for n in order]) for order in permutations(range(3))}
best, worst = min(times, key=times.get), max(times, key=times.get)
assert (times[best], times[worst]) == (13.0, 20.0), (
    f"the best order takes 13 ms and the worst 20, not {times[best]} and {times[worst]}"
)
print(f"best {best}: {times[best]:.0f} ms; worst {worst}: {times[worst]:.0f} ms")

# %% [markdown]
# 2. A sparse exchange beats a dense sum only while few rows are touched. Write `worth_it(width, world)`: the largest share of rows, per rank, at which sending rows costs fewer bytes than a reduce-scatter of the table in bfloat16. Why does it not depend on the number of ranks?


# %% tags=["solution"]
def worth_it(width: int, world: int) -> float:
    """Share of rows below which rows with their numbers are fewer bytes than the whole table."""
    dense, _ = bytes_sent("sharded", 1000 * width, 2, world)
    row, _ = bytes_sent("sharded_sparse", 1000 * width, 2, world, rows=1, width=width)
    return dense / (1000 * row)


# %%
wide, narrow, pair = worth_it(768, 8), worth_it(4, 2), worth_it(768, 2)
assert math.isclose(narrow, 0.5), (
    f"a row of 4 numbers is 8 bytes, and its own number 8 more: worth it up to 50% of the rows, not {narrow:.1%}"
)
assert math.isclose(wide, 1536 / 1544), (
    f"a row of 768 numbers is 1,536 bytes, 1,544 with its number: up to {1536 / 1544:.2%} of the rows, not {wide:.2%}"
)
assert math.isclose(pair, wide), (
    f"2 ranks should give what 8 give, {wide:.4%}, not {pair:.4%}: both sides have the same (w − 1) / w"
)
print(f"rows of 768: up to {wide:.1%}; rows of 4: up to {worth_it(4, 8):.0%}")

# %% [markdown]
# ## Since then
#
# Record 71's count of touched rows and record 61's order are still what record 89 runs. Record 92 (\@devenpzak) gathers sparsely, too, only the rows that a rank's next steps will read, and records its matrices' updates as CUDA graphs.
