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
# About half a minute on two CPU cores, where processes that talk through gloo play the GPUs; within three minutes on one GPU. What was measured on one GPU and on two is committed.
# Record 6: \@kellerjordan0. Record 15: \@leloykun, \@YouJiacheng. Record 22: \@KonstantinWilleke, \@alexrgilbert, \@adricarda, \@tuttyfrutyee, \@vdlad. Record 23: \@ryanyang0. Record 24: \@vagrawal. Records 36 and 39: \@classiclarryd. Record 44: \@akash5474. Record 57: \@classiclarryd, \@YouJiacheng, \@ChrisJMcCormick. Record 61: \@ChrisJMcCormick. Record 68: \@dhrvji. Record 71: \@roeeshenberg.
# ```
#
# ## The problem
#
# Record 5 ran on eight GPUs, and each of them orthogonalised every matrix. All eight did the same sums and got the same results. Record 6 stopped that: matrix $i$ is updated by GPU $i \bmod 8$, and the results are exchanged.

# %%
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
# A seventh of every step was saved, although results now had to be exchanged: what one GPU alone has updated, all others must be told. Most of this chapter's records lower the price of telling.
#
# ```{admonition} Prediction
# Record 89 has 75 million weights in matrices and 560 million in tables, nearly all of them in bfloat16. Every step updates the matrices; every second one the tables too. (Head and embedding are one matrix at first, and updated once.) With eight GPUs, **how many megabytes does each of them send in a step of either kind?** (Two batches of a rank touch at most a tenth of the rows of the largest table, which has 290 of the 560 million.) Compare with what it would send if every GPU updated the matrices, and only gradients were summed. Then divide by 450 GB/s, an H100's NVLink in one direction: how much of a step of 31 ms would that be, if nothing overlapped?
# ```
#
# ## The idea
#
# The classic scheme sums gradients over all ranks so that each has the sum (an *all-reduce*), and each updates everything. On a ring of $w$ ranks the sum takes two rounds. In the first, pieces travel around and add up until each rank holds one finished piece, $1/w$ of the whole: that half alone is called *reduce-scatter*. In the second, finished pieces travel around until everybody has all: an *all-gather*. Each half makes every rank send $\frac{w-1}{w}$ of the bytes.
#
# > **An all-reduce is a reduce-scatter and an all-gather. Put the update between the halves.**
#
# Then each rank updates only the piece that it holds, and what travels in the second half are new weights instead of summed gradients. The same bytes are sent, if a weight has as many bytes as its gradient (record 57's 16-bit weights made that true for the matrices). The optimizer's work is divided by $w$, and so is the memory of its state, since a rank needs moments for its own piece alone. Rajbhandari and others call it ZeRO's first stage {cite}`rajbhandari2020`. Weights and gradients stay whole on every rank; cutting those, too, is their second and third stage. For Adam any cut will do. For Muon a piece must be whole matrices, which is what banks are for: a bank is a stack of equal matrices, and a rank gets some of the stack.
#
# Three refinements, and the design is complete:
#
# - **Small parameters** are not worth the trouble. Gates and scalars go into one vector, which is all-reduced in one go, and every rank updates all of it.
# - **Tables of which a step touches few rows** need not send the others' gradients. A rank sends to each owner the rows that its batch has looked up, with their numbers. (New values are gathered whole.)
# - **Order.** All sums are begun at once; then for one parameter after the other: wait for its sum, update, begin to gather. While one is updated, the next ones' sums are on their way, and behind them the last one's gathering. Which order is best depends on sizes and not on names, so it is a list that the caller can give.
#
# What stands where is a table: for each parameter its rule, its way of communicating, its multipliers. The optimizer knows no parameter by name.
#
# ## The code
#
# Each GPU has a process of its own, a *rank*, and all run the same program. `torch.distributed` connects them: over TCP between CPUs, by a library called *gloo*, and over NVLink between GPUs, by *NCCL*. A *collective* is a call that all ranks make in the same order; a rank that leaves one out makes the others wait, until a timeout (ten minutes for NCCL) ends the run. So an error that one rank alone raises is a deadlock for the others, and what can go wrong on one is told to all before anyone stops. With two ranks that hold [a b] and [c d]:
#
# | collective | the first rank gets | the second |
# | --- | --- | --- |
# | all-reduce | [a+c b+d] | [a+c b+d] |
# | reduce-scatter | [a+c] | [b+d] |
# | all-gather of [x] and [y] | [x y] | [x y] |
# | all-to-all | [a c] | [b d] |
#
# With `async_op=True` a call only begins, and returns something to `wait()` for. Until then the tensors belong to the call: what it reads must not be written, and what it writes must not be read. gloo's `wait` stops Python; NCCL's only makes the GPU's stream wait. NCCL takes what was begun one after the other, on a stream beside the one that computes. So a gather begins only after all sums that were begun before it.
#
# Gradients are *summed*, not averaged as elsewhere. Both rules divide the scale away; who wants means divides the loss.
#
# ### A share for every rank
#
# A bank of 22 matrices cannot be dealt out evenly to four ranks, and collectives want equal pieces. So storage is padded: with four ranks there is room for 24, of which two are zeros and stay so. (Newton–Schulz maps zero to zero.) Parameter and gradient become *views* of that storage. The model does not notice, autograd adds gradients right where they are sent from, and gathering writes right where the model reads.

# %%
#| default_exp optim.distributed
#| export
import math
import torch
import torch.distributed as dist
from torch import Tensor


# %%
#| export
# PyTorch 2.13 has new names for these, and warns of the old ones
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def ranks() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Sharded:
    """A parameter whose units, matrices of a bank or rows of a table, are dealt out evenly to the ranks.

    whole: all units, padded with zeros to a multiple of the ranks; the parameter becomes a view of it. own: this rank's
    slice of it. grads: this rank's gradient of all units, which autograd adds to. grad: all ranks' gradient of its own units.
    """

    def __init__(self, parameter: Tensor, unit: tuple[int, ...]):
        self.rank, self.world = ranks()
        self.units = parameter.numel() // math.prod(unit)
        per = -(-self.units // self.world)
        self.whole = parameter.data.new_zeros(per * self.world, *unit)
        self.whole[: self.units] = parameter.data.view(self.units, *unit)
        self.grads = torch.zeros_like(self.whole)
        parameter.data = self.whole[: self.units].view(parameter.shape)
        parameter.grad = self.grads[: self.units].view(parameter.shape)
        self.own = self.mine(self.whole)
        self.grad = torch.empty_like(self.own) if self.world > 1 else self.grads
        self.work: dist.Work | None = None

    def mine(self, whole: Tensor) -> Tensor:
        """This rank's part of something padded, (units, …)."""
        per = len(whole) // self.world
        return whole[self.rank * per : (self.rank + 1) * per]

    def padded(self, units: Tensor) -> Tensor:
        """Something of every unit, (units, …), with zeros for the units that are not there."""
        more = units.new_zeros(len(self.whole) - self.units, *units.shape[1:])
        return torch.cat([units, more])

    def collect(self, own: Tensor) -> Tensor:
        """What every rank has of its own units, as that of all, (units, …)."""
        if self.world == 1:
            return own[: self.units].clone()
        whole = own.new_empty(self.world * len(own), *own.shape[1:])
        # as bytes, since NCCL knows no int16, which the lost bits are
        all_gather(whole.view(torch.uint8), own.contiguous().view(torch.uint8))
        return whole[: self.units]

    def scatter(self) -> None:
        """Begin to sum the gradient over ranks; each gets its own units'."""
        if self.world > 1:
            self.work = reduce_scatter(self.grad, self.grads, async_op=True)

    def gather(self) -> None:
        """Begin to collect all units from those who updated them."""
        if self.world > 1:
            self.work = all_gather(self.whole, self.own, async_op=True)

    def wait(self) -> None:
        """Until what was begun is there; on a GPU the stream waits, and Python does not."""
        if self.work is not None:
            self.work.wait()
            self.work = None

    def clear(self) -> None:
        """Forget the gradient."""
        self.grads.zero_()


# %%
import copy

p = torch.nn.Parameter(torch.arange(10.0).view(5, 2))
alone = Sharded(p, (2,))
(p * 3).sum().backward()
assert torch.equal(alone.grads, torch.full((5, 2), 3.0)) and alone.own.data_ptr() == p.data_ptr()

third = copy.copy(alone)  # as the last of three ranks would have it
third.rank, third.world, third.whole = 2, 3, torch.zeros(6, 2)
assert torch.equal(third.mine(third.padded(p.detach())), torch.tensor([[8.0, 9.0], [0.0, 0.0]]))
print("five rows for three ranks: two each, and the last one's second row is padding")


# %%
#| export
class Replicated:
    """Small parameters of one dtype that every rank updates: one vector, whose gradient is summed in one go.

    parameters: name → tensor; data and gradient become views. slices: where each stands in the vector. Each begins at
    a multiple of 16 bytes, because matrix products and compiled code want that.
    """

    def __init__(self, parameters: dict[str, Tensor]):
        self.world, self.slices, end = ranks()[1], dict[str, slice](), 0
        first = next(iter(parameters.values())).data
        for name, p in parameters.items():
            self.slices[name] = slice(end, end + p.numel())
            end = -(-self.slices[name].stop // 8) * 8
        self.own = first.new_zeros(end)
        self.grad = self.grads = torch.zeros_like(self.own)
        for name, p in parameters.items():
            here = self.slices[name]
            self.own[here] = p.data.flatten()
            p.data, p.grad = self.own[here].view(p.shape), self.grad[here].view(p.shape)
        self.work: dist.Work | None = None

    def scatter(self) -> None:
        if self.world > 1:
            self.work = dist.all_reduce(self.grad, async_op=True)

    def gather(self) -> None:
        """Nothing: every rank has done the same."""

    wait, clear = Sharded.wait, Sharded.clear


# %% [markdown]
# ### Rows that were touched
#
# A batch of 16,384 tokens looks up at most as many rows of a table that has 377,280. Autograd still writes a dense gradient, of which nearly all is zero. `announce` tells which rows are not. A row that is forgotten is not updated now, and its old gradient is added the next time it is named; so announce too many rather than too few. How many rows everyone sends must be known to *Python*, since it has to allocate the room; so counts travel between CPUs, where asking costs no waiting for a GPU. The batch knows its rows long before the gradient exists, and `exchange` may be called then; if nobody has, `scatter` does it. It is a collective, and Python waits in it for the slowest rank's Python: call it while the GPU is busy with the backward pass, on all ranks at the same place.


# %%
#| export
class Sparse(Sharded):
    """A sharded table of which a batch touches few rows: only those rows' gradients travel.

    `announce` says which. `exchange` tells the owners, and may be called before the gradient is there.
    """

    told: dist.Work | None = None
    values: Tensor | None = None
    announced = False

    def __init__(self, parameter: Tensor):
        super().__init__(parameter, tuple(parameter.shape[1:]))
        self.touched = torch.zeros(len(self.whole), dtype=torch.bool)
        gpu = parameter.device.type == "cuda" and self.world > 1
        self.cpu_group = dist.new_group(backend="gloo") if gpu else None

    def announce(self, ids: Tensor) -> None:
        """ids: rows that this rank's batch has looked up, on the CPU; any shape, any number of times."""
        assert self.told is None, "announce before exchange"
        self.touched[ids.flatten()] = self.announced = True

    def insist(self, announced: bool) -> None:
        """Refuse a gradient of unknown rows."""
        if not announced:
            raise RuntimeError("a sparse table's gradient is due, and announce() was not called")

    def exchange(self) -> None:
        """Tell every owner how many rows, and which, it will get from this rank; begun, like a sum. All ranks call it, or none."""
        if self.world == 1:  # nobody to tell, and nothing to count
            return self.insist(self.announced)
        device, ids = self.whole.device, self.touched.nonzero()[:, 0]
        counts = torch.bincount(ids // len(self.own), minlength=self.world)
        theirs = torch.zeros_like(counts)
        told = counts if self.announced else torch.full_like(counts, -1)
        dist.all_to_all_single(theirs, told, group=self.cpu_group)
        self.insist(self.announced and bool(theirs.min() >= 0))  # all ranks stop, and none waits
        self.values = None
        self.sent, self.received = counts.tolist(), theirs.tolist()
        ids = ids.pin_memory() if device.type == "cuda" else ids  # else Python waits for the copy
        self.ids = ids.to(device, non_blocking=True)
        self.rows = torch.empty(sum(self.received), dtype=torch.int64, device=device)
        self.told = dist.all_to_all_single(
            self.rows, self.ids, self.received, self.sent, async_op=True
        )

    def scatter(self) -> None:
        if self.told is None:
            self.exchange()
        if self.world == 1:
            return
        values = self.grads[self.ids]
        self.values = values.new_empty(len(self.rows), *values.shape[1:])
        self.work = dist.all_to_all_single(
            self.values, values, self.received, self.sent, async_op=True
        )

    def wait(self) -> None:
        """As ever; a gradient that has just arrived is added up, rank after rank, so that sums have one order."""
        super().wait()
        if self.values is None or self.told is None:
            return
        self.told.wait()
        self.told = None
        self.grad.zero_()
        local = self.rows - self.rank * len(self.own)
        for rows, values in zip(local.split(self.received), self.values.split(self.received)):
            self.grad[rows] += values  # a rank names a row once

    def clear(self) -> None:
        """Forget the gradient: of one rank all, else of the rows that were touched."""
        if self.world == 1:
            self.grads.zero_()
        else:
            self.grads.index_fill_(0, self.ids, 0.0)
        self.touched.zero_()
        self.announced = False


# %% [markdown]
# ### Bytes
#
# What a rank sends can be said beforehand, if it sends around a ring. (The switch between eight H100s can add and copy by itself, and then a rank sends less.)


# %%
#| export
def bytes_sent(
    comm: str, numel: int, size: int, world: int, rows: float = 0.0, width: int = 1
) -> tuple[float, float]:
    """Bytes that one rank sends for one update of a parameter: summing the gradient, and collecting the values.

    numel, size: elements, and bytes of one. rows, width: for a sparse table, the rows that a rank touches, and their length.
    """
    others = (world - 1) / world
    whole = others * numel * size
    if comm == "sparse":
        return others * rows * (width * size + 8), whole  # 8 for the row's number
    return (2 * whole, 0.0) if comm == "replicated" else (whole, whole)


# %%
MUON_WEIGHTS, STORED = 75_497_472, 83_361_792  # without and with padding: 64, 24 and 24 matrices
HEAD, VALUES, BIGRAM = 38_633_472, 193_167_360, 289_751_040
even = sum(bytes_sent("sharded", STORED, 2, 8)) / 1e6
as_before = sum(bytes_sent("replicated", MUON_WEIGHTS, 2, 8)) / 1e6
dense = sum(bytes_sent("sharded", HEAD + VALUES, 2, 8)) / 1e6  # the embedding is still tied
sums, gathers = bytes_sent("sparse", BIGRAM, 2, 8, rows=2 * 16_384, width=768)
odd = even + dense + (sums + gathers) / 1e6
assert sum(bytes_sent("sharded", 1000, 2, 8)) == sum(bytes_sent("replicated", 1000, 2, 8))
assert 1.1 < even / as_before < 1.11 and gathers > 10 * sums and 0.11 < odd / 450 / 31 < 0.13
assert 1650 < odd < 1660 and (dense / 2 + gathers / 1e6) / odd > 0.5
print(f"a step without tables: {even:.0f} MB a rank, {even / 450:.1f} ms at 450 GB/s")
print(f"an all-reduce of the matrices: {as_before:.0f} MB")
print(f"a step with tables, early on: {odd:.0f} MB, {odd / 450:.1f} ms")

# %% [markdown]
# A sharded update sends what an all-reduce sends, as promised. But padding travels, too: a tenth of what a step without tables sends is zeros. A step with tables (in the first third, where steps are shortest and head and embedding are one) sends 1.65 GB, more than half of it to collect tables: Adam moves rows that nobody has touched this time, so *gathering* a sparse table is dense. That would be an eighth of an average step, at the 450 GB/s of the data sheet. It is worth hiding, and that tables are updated in every second step only helps as well.
#
# ### Adam, on whatever share
#
# Adam cares for no shape, so one function serves a rank's rows of a table and the vector of small parameters alike. Rates may be numbers or vectors. It computes in float32 from whatever it is given and rounds once, at the end. Decay is the cautious one of [chapter 13](13_muon.py), except that a weight whose step is zero does not decay.

# %%
#| default_exp optim.adam
#| export
from dataclasses import dataclass

import torch
from torch import Tensor

from speedrun.lab.bounds import NonNegativeFloat, PositiveInt

Number = float | Tensor


@dataclass(frozen=True)
class SharingOptions:
    """Whether ranks share the update, each doing its part, and what Adam is if they do."""

    on: bool = False
    """Chapter 20's optimizer, which does not clip. Off: PyTorch's AdamW, with chapter 12's or 13's rule beside it, on every rank."""
    adam_every: PositiveInt = 2
    """Steps from one update by Adam to the next."""
    adam_decay: NonNegativeFloat = 0.005
    """Decay of weights that a step makes smaller anyway, as a multiple of the rate's square."""


# %%
#| export
def adam_step(
    p: Tensor,
    g: Tensor,
    mean: Tensor,
    square: Tensor,
    rate: Number,
    betas: tuple[Number, Number],
    fixes: tuple[Number, Number],
    eps: float,
    decay: Number,
    skip: Tensor | None = None,
) -> None:
    """One step of Adam in place, computed in float32 whatever p and g are; decay where step and weight agree.

    fixes: 1 − betaᵗ after t steps. decay: what such a weight loses, as a share, beside the step. skip: where not zero, nothing happens.
    """
    g = g.float()
    squared = g.square()
    if skip is not None:
        g, squared = torch.where(skip > 0, mean, g), torch.where(skip > 0, square, squared)
        rate, decay = rate * (1 - skip), decay * (1 - skip)
    mean.add_((g - mean) * (1 - betas[0]))
    square.add_((squared - square) * (1 - betas[1]))
    step = rate * (mean / fixes[0]) / ((square / fixes[1]).sqrt() + eps)
    whole = p.float()
    p.copy_(whole - step - decay * whole * (step * whole > 0))


# %%
start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
start = start.to(tier.device)
theirs, ours = torch.nn.Parameter(start.clone()), start.clone()
reference = torch.optim.Adam([theirs], lr=0.01, betas=(0.75, 0.95), eps=1e-10)
mean, square = torch.zeros_like(start), torch.zeros_like(start)
for step in range(1, 6):
    theirs.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step)).to(tier.device)
    reference.step()
    fixes = (1 - 0.75**step, 1 - 0.95**step)
    adam_step(ours, theirs.grad, mean, square, 0.01, (0.75, 0.95), fixes, 1e-10, decay=0.0)
assert torch.allclose(theirs, ours, atol=1e-6)
print("five steps of torch.optim.Adam and of ours agree")

# %% [markdown]
# ### The table
#
# What makes a table worth having is that it can be *checked*, before a single number is touched. A parameter that nobody updates would train nothing and raise no error; the model would be a little worse, and nobody would ever know.

# %%
#| default_exp optim.optimizer
#| export
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from types import FunctionType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from speedrun.optim.muon import MuonOptions, even_rows, orthogonal, split, take_step
from speedrun.optim.newton_schulz import fold


# %%
#| export
@dataclass(frozen=True)
class Entry:
    """How one parameter is updated: a row of the optimizer's table."""

    name: str
    rule: Literal["muon", "adam"]
    comm: Literal["replicated", "sharded", "sparse"]
    """replicated: every rank updates all of it. sharded: its own units. sparse: so, and only touched rows' gradients travel."""
    rate: float | tuple[float, ...] = 1.0
    """Multiple of the rule's rate; muon's factors for shapes are in here. muon: several, for the matrices in turn."""
    decay: float = 1.0
    """Multiple of the rule's decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """adam: what the running means keep of themselves."""
    matrices: int = 1
    """muon: matrices on top of each other in each slice of the bank."""
    tied: str = ""
    """The parameter that this one is the transpose of, until `untie`: its gradient is added there, its values come from there."""


@dataclass(frozen=True)
class OptimizerOptions:
    """Both rules' constants; the defaults are record 89's."""

    muon: MuonOptions = field(default_factory=MuonOptions)
    """What muon is."""
    iterations: int = 5
    """muon: polynomials."""
    nesterov: bool = True
    """muon: mix the newest gradient in once more."""
    eps: float = 1e-10
    """adam: added to the root of the second moment."""
    adam_decay: float = 0.005
    """adam: decay of weights that the step makes smaller anyway, as a multiple of the rate's square."""
    adam_every: int = 2
    """Steps from one update by adam to the next; gradients add up meanwhile."""
    guard: bool = True
    """Leave out a step whose gradient is not finite."""
    compile: bool = True
    """On a GPU: fuse each update's elementwise work, and replay it as a CUDA graph."""


# %%
#| export
TOGETHER = "replicated"  # the name under which all replicated parameters stand in an order


def same_names(what: str, given: Iterable[str], wanted: Iterable[str], where: str) -> None:
    """Refuse names that are missing, that are too many, or that stand there twice."""
    counts, needed = Counter(list(given)), set(wanted)
    wrong = {
        "twice": sorted(name for name, count in counts.items() if count > 1),
        "missing": sorted(needed - set(counts)),
        f"not in {where}": sorted(set(counts) - needed),
    }
    said = [f"{kind}: {', '.join(names)}" for kind, names in wrong.items() if names]
    if said:
        raise ValueError(f"{what}: {'; '.join(said)}")


def check_table(table: Sequence[Entry], parameters: Mapping[str, Tensor]) -> None:
    """Refuse, with a ValueError that says which, rows that do not fit the parameters."""
    same_names("the optimizer's table", (row.name for row in table), parameters, "the model")
    rows = {row.name: row for row in table}
    for row in table:
        p, whole = parameters[row.name], rows.get(row.tied)
        if row.rule == "muon" and (row.comm != "sharded" or p.ndim != 3):
            raise ValueError(f"{row.name}: muon updates banks of three dimensions, sharded")
        if row.rule == "adam" and not isinstance(row.rate, float):
            raise ValueError(f"{row.name}: adam has one rate, a float, not {row.rate!r}")
        if row.rule == "muon" and p.shape[1] % row.matrices:
            raise ValueError(f"{row.name}: {p.shape[1]} rows are not {row.matrices} matrices")
        if row.comm == "sparse" and p.ndim != 2:
            raise ValueError(f"{row.name}: a sparse table has two dimensions, not {p.ndim}")
        if row.tied and (whole is None or parameters[row.tied].shape != p.shape[::-1]):
            raise ValueError(f"{row.name}: {row.tied} is no parameter of the transposed shape")
        if row.tied and {row.comm, rows[row.tied].comm} != {"sharded"}:
            raise ValueError(f"{row.name} and {row.tied}: what is tied has to be sharded")
        if row.tied and "muon" in (row.rule, rows[row.tied].rule):
            raise ValueError(f"{row.name} and {row.tied}: what is tied has to be adam's")


# %%
pair = {
    "bank": torch.nn.Parameter(torch.ones(2, 4, 3)),
    "table": torch.nn.Parameter(torch.ones(5, 3)),
}
good = (Entry("bank", "muon", "sharded", matrices=2), Entry("table", "adam", "sparse"))
check_table(good, pair)
for wrong in (good[:1], (*good, good[0]), (good[0], Entry("tabel", "adam", "sparse"))):
    try:
        check_table(wrong, pair)
        raise AssertionError("accepted")
    except ValueError as error:
        print(error)

# %% [markdown]
# ### Numbers that change, work that does not
#
# Sharing divides the work, but not its launching: every rank launches every kernel itself, and for small matrices that takes longer than computing. From one step to the next nothing changes but a handful of numbers: rates, momentum, Adam's corrections. Keep those in a vector on the device, and the whole update of a parameter is a fixed list of kernels that can be recorded once, as a *CUDA graph*, and replayed with one launch. A graph remembers addresses and not names: it reads and writes the same memory each time. So parameters, gradients, state and these numbers never move; everything here is changed in place. The first call compiles, the second shows that the code is ready, the third is recorded. (On a CPU, as in this chapter, the work is just called.)


# %%
#| export
class Numbers:
    """What changes from step to step, as one vector on the device: one copy a step, and nothing is compiled anew."""

    def __init__(self, names: Sequence[str], device: torch.device, betas: Sequence[float] = ()):
        self.names, self.device = [*names, *(f"fix {beta}" for beta in betas)], device
        self.vector = torch.zeros(len(self.names), device=device)
        self.told, self.fixes = self.vector[: len(names)], self.vector[len(names) :]
        self.betas = torch.tensor(betas, dtype=torch.float64, device=device)

    def __getitem__(self, name: str) -> Tensor:
        return self.vector[self.names.index(name)]

    def fill(self, values: Mapping[str, float]) -> None:
        """Set all but the fixes; Python does not wait for the device."""
        fresh = torch.tensor([values[name] for name in self.names[: len(self.told)]])
        fresh = fresh.pin_memory() if self.device.type == "cuda" else fresh
        self.told.copy_(fresh, non_blocking=True)

    def fix(self, updates: Tensor) -> None:
        """Set each fix, 1 − betaᵗ after t updates; as after one if there was none. updates: t, float64, on the device."""
        self.fixes.copy_(1 - self.betas ** updates.clamp(min=1))


class Replay:
    """Work without arguments, called; or, with a stream, recorded in it at its third call and replayed from then on.

    Graphs that run at once need streams of their own: recorded in one, they share its scratch memory for products.
    """

    graph: Any = None

    def __init__(self, work: Callable[[], None], stream: Any = None):
        self.work, self.calls, self.stream = work, 0, stream

    def __call__(self) -> None:
        self.calls += 1
        if self.stream is None or self.calls < 3:
            return self.work()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # thread_local: else what NCCL's own thread asks the GPU meanwhile would break the recording
            with torch.cuda.graph(
                self.graph, stream=self.stream, capture_error_mode="thread_local"
            ):
                self.work()
        self.graph.replay()


def compiled(work: Callable, options: OptimizerOptions, device: torch.device) -> Callable:
    """Work as it is, or fused for a GPU: a copy of it, since compiled code is kept by function, and shapes are many."""
    if not options.compile or device.type != "cuda":
        return work
    own = FunctionType(work.__code__.replace(), work.__globals__, work.__name__, work.__defaults__)
    return torch.compile(own, dynamic=False, fullgraph=True)


# %%
numbers = Numbers(["rate", "momentum"], torch.device("cpu"))
rate = numbers["rate"]  # a view: read when the work is done
numbers.fill({"rate": 0.25, "momentum": 0.9})
assert rate.item() == 0.25
done = []
work = Replay(lambda: done.append(numbers["momentum"].item()))
for momentum in (0.85, 0.9, 0.95):
    numbers.fill({"rate": 0.25, "momentum": momentum})
    work()
assert torch.allclose(torch.tensor(done), torch.tensor([0.85, 0.9, 0.95]))

numbers, updates = Numbers([], torch.device("cpu"), [0.5, 0.95]), torch.zeros(()).double()
for t in range(1, 1000):
    updates += 1
    numbers.fix(updates)
    assert torch.equal(numbers.vector, torch.tensor([1 - 0.5**t, 1 - 0.95**t])), "to the bit"

# %% [markdown]
# ### A part for every row
#
# Now the pieces meet. A part is a share of a parameter with its state and its rule.


# %%
#| export
class MuonPart(Sharded):
    """A bank under Muon: this rank's matrices with their momentum, second moments and lost bits."""

    def __init__(self, row: Entry, parameter: Tensor, options: OptimizerOptions):
        rounded = lost = None
        if options.muon.weights != "float32" and parameter.dtype == torch.float32:
            rounded, lost = split(parameter.data)
            parameter.data = rounded
        rows, cols = parameter.shape[1] // row.matrices, parameter.shape[2]
        super().__init__(parameter, (rows, cols))
        self.row, self.options, self.every = row, options, 1
        self.state = {"momentum": torch.zeros_like(self.own, dtype=torch.float32)}
        if options.muon.beta2:
            one = self.own[:, :, :1] if rows >= cols else self.own[:, :1, :]
            self.state["second"] = torch.zeros_like(one, dtype=torch.float32)
        if options.muon.weights == "split":
            none = torch.zeros_like(self.whole[: self.units], dtype=torch.int16)
            lost = none if lost is None else lost.view(none.shape)
            self.state["lost"] = self.mine(self.padded(lost)).clone()
        turns = row.rate if isinstance(row.rate, tuple) else (row.rate,)
        of_units = torch.tensor([turns[n % len(turns)] for n in range(len(self.whole))])
        self.rates = self.mine(of_units[:, None, None].to(parameter.device))
        self.share = compiled(muon_share, options, parameter.device)

    def update(self, numbers: Numbers, skip: Tensor | None) -> None:
        """One step of this rank's matrices."""
        rates = [numbers[name] for name in ("muon", "momentum", "muon_decay")]
        row, options = self.row, self.options
        self.share(self.own, self.grad, self.state, self.rates, rates, skip, row.decay, options)


# %%
#| export
def muon_share(
    own: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    factors: Tensor,
    rates: Sequence[Tensor],
    skip: Tensor | None,
    decay: float,
    options: OptimizerOptions,
) -> None:
    """One step of matrices under Muon, in place. factors: of each matrix's rate. rates: muon, momentum, muon_decay."""
    muon, (base, kept, plain) = options.muon, rates
    ahead = fold(grad.float(), state["momentum"], kept, options.nesterov, skip)
    update = orthogonal(ahead, options.iterations, muon)
    if muon.beta2:
        update = even_rows(update, state["second"], muon.beta2, skip)
    rate = base * factors if skip is None else base * (1 - skip) * factors
    squared = muon.decay_factor * decay * base
    take_step(own, state.get("lost"), update, rate, muon.decay, decay * plain, squared)


# %%
#| export
def adam_rates(row: Entry, numbers: Numbers, options: OptimizerOptions) -> tuple[Tensor, Tensor]:
    """A row's rate, and the share that a weight which decays loses in a step."""
    assert isinstance(row.rate, float)  # check_table has refused several
    rate = numbers["adam"] * row.rate
    return rate, rate * rate * (options.adam_decay * row.decay)


def adam_state(own: Tensor) -> dict[str, Tensor]:
    """Adam's two means, in float32."""
    return {key: torch.zeros_like(own, dtype=torch.float32) for key in ("mean", "square")}


def adam_share(part: Any, numbers: Numbers, skip: Tensor | None) -> None:
    """One step of this rank's rows under Adam."""
    row, options = part.row, part.options
    rate, decay = adam_rates(row, numbers, options)
    fixes = (numbers[f"fix {row.betas[0]}"], numbers[f"fix {row.betas[1]}"])
    mean, square = part.state["mean"], part.state["square"]
    part.share(part.own, part.grad, mean, square, rate, row.betas, fixes, options.eps, decay, skip)


class AdamPart(Sharded):
    """A table under Adam: this rank's rows and their means."""

    def __init__(self, row: Entry, parameter: Tensor, options: OptimizerOptions):
        super().__init__(parameter, tuple(parameter.shape[1:]))
        self.row, self.options, self.every = row, options, options.adam_every
        self.state = adam_state(self.own)
        self.share = compiled(adam_step, options, parameter.device)

    update = adam_share


class SparsePart(Sparse):
    """A table under Adam of which a step touches few rows."""

    def __init__(self, row: Entry, parameter: Tensor, options: OptimizerOptions):
        super().__init__(parameter)
        self.row, self.options, self.every = row, options, options.adam_every
        self.state = adam_state(self.own)
        self.share = compiled(adam_step, options, parameter.device)

    update = adam_share


# %%
#| export
class SmallPart(Replicated):
    """All replicated parameters of one dtype under Adam: one vector, with a vector of every constant."""

    def __init__(
        self, rows: Sequence[Entry], tensors: dict[str, Tensor], options: OptimizerOptions
    ):
        super().__init__(tensors)
        self.rows, self.options, self.every = rows, options, options.adam_every
        self.state = adam_state(self.own)

        def spread(values: Iterable[float]) -> Tensor:
            found = torch.zeros(len(self.own))
            for row, value in zip(rows, values):
                found[self.slices[row.name]] = value
            return found.to(self.own.device)

        self.rate = spread(row.rate for row in rows if isinstance(row.rate, float))
        self.decay = spread(row.decay * options.adam_decay for row in rows)
        self.betas = tuple(spread(row.betas[n] for row in rows) for n in (0, 1))
        self.share = compiled(adam_step, options, self.own.device)
        self.which = [sorted({row.betas[n] for row in rows}) for n in (0, 1)]
        self.index = [
            spread(float(self.which[n].index(row.betas[n])) for row in rows).long() for n in (0, 1)
        ]

    def update(self, numbers: Numbers, skip: Tensor | None) -> None:
        """One step of all of them."""
        rate = numbers["adam"]
        fixes = [
            torch.stack([numbers[f"fix {beta}"] for beta in which])[index]
            for which, index in zip(self.which, self.index)
        ]
        rates = rate * self.rate
        decay = rates * rates * self.decay
        mean, square = self.state["mean"], self.state["square"]
        betas, eps = self.betas, self.options.eps
        self.share(self.own, self.grad, mean, square, rates, betas, tuple(fixes), eps, decay, skip)


# %%
options = OptimizerOptions(muon=MuonOptions(weights="split", beta2=0.9), adam_every=1)
bank = torch.nn.Parameter(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)))
part = MuonPart(Entry("bank", "muon", "sharded", rate=(1.0, 2.0), matrices=1), bank, options)
assert bank.dtype == torch.bfloat16 and part.state["lost"].dtype == torch.int16
assert part.state["second"].shape == (2, 6, 1) and part.rates.flatten().tolist() == [1.0, 2.0]
gates = {"a": torch.nn.Parameter(torch.ones(3)), "b": torch.nn.Parameter(torch.ones(2, 2))}
rows_of = [Entry("a", "adam", "replicated", rate=5.0), Entry("b", "adam", "replicated")]
small = SmallPart(rows_of, gates, options)
assert small.rate[small.slices["a"]].tolist() == [5.0] * 3 and small.slices["b"] == slice(8, 12)
gates["b"].grad += 1.0
assert small.grad.tolist() == [0.0] * 8 + [1.0] * 4 + [0.0] * 4, "one vector is summed"

# %% [markdown]
# ### One step
#
# Scatter, wait, update, gather: the loop below is the whole schedule. Sums of Muon's banks begin first, if they stand first in the order: they read gradients and write elsewhere. Meanwhile each rank looks whether all its gradients are finite, and one small all-reduce tells everybody. If any is not, the step is left out: rates are zero, and moments stay. Nor does Adam count it: a mean of $t$ gradients is divided by $1-\beta^t$, and a gradient that was left out is not in the mean. Whether it was is known on the device alone, so the count is kept there. (What follows the number of the step, rates and momentum, goes on.) Only gradients that are due are looked at: a table's number that breaks in the first step of a pair is found in the second, and costs both. Python does not wait for the answer; `blame` asks later, and names the parameter. The price is one reading of every gradient that is due, before the first table's sum.
#
# On a GPU each parameter has a *lane*, a stream of its own, in which it waits for its sum, is updated, begins to be gathered, and is cleared. Python only fills the lanes. Among several ranks all of Muon's parameters share one lane, and all of Adam's another. What runs when is then decided by what has arrived: small kernels of one bank fill the gaps that another leaves, and products run while tables travel. Two rules make that safe. A graph is recorded in the lane in which it will run, because libraries keep scratch memory by stream. And what was allocated in one stream and used in another is not freed before the first has waited for the second.


# %%
#| export
def build_parts(
    table: Sequence[Entry], parameters: Mapping[str, Tensor], options: OptimizerOptions
) -> dict[str, Any]:
    """Every part by its name in an order: one a row, and one for what is replicated, for each dtype."""
    parts: dict[str, Any] = {}
    kinds = {"muon": MuonPart, "sharded": AdamPart, "sparse": SparsePart}
    for row in table:
        if row.comm != TOGETHER:
            kind = kinds[row.rule if row.rule == "muon" else row.comm]
            parts[row.name] = kind(row, parameters[row.name], options)
    small = [row for row in table if row.comm == TOGETHER]
    for dtype in sorted({parameters[row.name].dtype for row in small}, key=str):
        rows = [row for row in small if parameters[row.name].dtype == dtype]
        tensors = {row.name: parameters[row.name] for row in rows}
        parts[f"{TOGETHER} {dtype}".removesuffix(" torch.float32")] = SmallPart(
            rows, tensors, options
        )
    return parts


def lane_of(device: torch.device) -> Any:
    """A stream of a GPU; None elsewhere."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def lanes_of(parts: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A lane for each part; among several ranks one for Muon's and one for Adam's, which is faster there."""
    together = ranks()[1] > 1
    kinds = {name: isinstance(part, MuonPart) if together else name for name, part in parts.items()}
    lanes = {kind: lane_of(device) for kind in dict.fromkeys(kinds.values())}
    return {name: lanes[kind] for name, kind in kinds.items()}


TOLD = ("muon", "adam", "momentum", "muon_decay")  # what a step is told


def addresses_of(p: Tensor) -> tuple[int, int]:
    """Where a parameter's value and gradient are stored."""
    return p.data_ptr(), 0 if p.grad is None else p.grad.data_ptr()


def betas_in(table: Sequence[Entry]) -> list[float]:
    """All betas of adam's rows."""
    return sorted({beta for row in table if row.rule == "adam" for beta in row.betas})


# %%
#| export
class BankOptimizer:
    """Muon and Adam over a model's parameters, shared by all ranks, as a table says.

    Parameters keep their shapes and become views of padded storage; their gradients are never None, and are
    cleared here. All ranks start from the same values. Saved values are loaded afterwards: this rounds banks to
    bfloat16, and copies what is tied. scatter_order, work_order: names of rows, and “replicated” for all that are; default: the table's.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        table: Sequence[Entry],
        options: OptimizerOptions = OptimizerOptions(),
        scatter_order: Sequence[str] | None = None,
        work_order: Sequence[str] | None = None,
    ):
        check_table(table, parameters)
        self.table, self.options, self.parameters = table, options, parameters
        names = [row.name for row in table if row.comm != TOGETHER]
        names += [TOGETHER] if len(names) < len(table) else []
        for what, order in (("scatter_order", scatter_order), ("work_order", work_order)):
            same_names(what, names if order is None else order, names, "the table")
        with torch.no_grad():
            self.parts = build_parts(table, parameters, options)
        self.scatter_order = self.spelled(names if scatter_order is None else scatter_order)
        self.work_order = self.spelled(names if work_order is None else work_order)
        self.tied = {row.name: row.tied for row in table if row.tied}
        self.addresses = {name: addresses_of(p) for name, p in parameters.items()}
        self.device = next(iter(parameters.values())).device
        self.numbers = Numbers(TOLD, self.device, betas_in(table))
        self.bad = {name: torch.zeros((), device=self.device) for name in self.parts}
        self.skip = torch.zeros((), device=self.device) if options.guard else None
        self.updates = torch.zeros((), dtype=torch.float64, device=self.device)  # by adam
        self.pending = False  # whether gradients wait for adam
        self.records = options.compile and self.device.type == "cuda"
        if self.records and not options.iterations:
            raise ValueError(
                "the exact factor cannot be compiled: iterations=0 wants compile=False"
            )
        muon = [name for name, part in self.parts.items() if isinstance(part, MuonPart)]
        self.lanes = lanes_of(self.parts, self.device)
        # summed before the guard has looked: nothing is added to their gradients any more
        self.early = list(takewhile(muon.__contains__, self.scatter_order))
        self.looking = lane_of(self.device) if self.records else None
        self.works = {
            name: Replay(self.work_of(name), lane if self.records else None)
            for name, lane in self.lanes.items()
        }
        self.looks: dict[tuple, tuple[Replay, Tensor]] = {}
        self.add, self.copy = (
            compiled(work, options, self.device) for work in (add_transposed, copy_transposed)
        )
        with torch.no_grad():
            copy_tied(self, list(self.parts))

    def tensors(self) -> dict[str, Tensor]:
        return state_tensors(self)

    def load(self, saved: Mapping[str, Tensor]) -> None:
        load_state(self, saved)

    def warm_up(self) -> None:
        warm_up(self)

    def blamed(self) -> list[str]:
        return blame(self)

    def spelled(self, order: Sequence[str]) -> list[str]:
        """An order with “replicated” spelled out, dtype by dtype."""
        small = [name for name in self.parts if name.split()[0] == TOGETHER]
        return [part for name in order for part in (small if name == TOGETHER else [name])]

    def work_of(self, name: str) -> Callable[[], None]:
        return lambda: self.parts[name].update(self.numbers, self.skip)

    @torch.no_grad()
    def step(self, index: int, rates: Mapping[str, float]) -> None:
        """Update what is due in step `index` (0, 1, …). rates: muon, adam, momentum, and muon_decay for plain decay."""
        for name, p in self.parameters.items():
            for what, now, then in zip(
                ("value", "gradient"), addresses_of(p), self.addresses[name]
            ):
                if now != then:
                    moved = f"the {what} of {name} is not in the optimizer's storage any more"
                    fix = "leave zero_grad() out, step() clears gradients; and copy values in place"
                    raise RuntimeError(f"{moved}: {fix}")
        take_one_step(self, index, rates)


# %%
#| export
def due_in(optimizer: BankOptimizer, index: int) -> list[str]:
    """What is updated in a step: adam's parts in every adam_every-th only, and what is tied never."""
    names = [name for name in optimizer.work_order if name not in optimizer.tied]
    return [name for name in names if (index + 1) % optimizer.parts[name].every == 0]


def tell(optimizer: BankOptimizer, index: int, rates: Mapping[str, float]) -> None:
    """Set the numbers of a step."""
    optimizer.pending = (index + 1) % optimizer.options.adam_every != 0
    same_names("rates", {"muon_decay", *rates}, TOLD, "what a step is told")
    optimizer.numbers.fill({"muon_decay": 0.0, **rates})


def count_update(optimizer: BankOptimizer) -> None:
    """Count a step of adam, unless it is left out: only the device knows, so the count is kept there."""
    if not optimizer.pending:
        optimizer.updates += 1 if optimizer.skip is None else 1 - optimizer.skip
        optimizer.numbers.fix(optimizer.updates)


def take_one_step(optimizer: BankOptimizer, index: int, rates: Mapping[str, float]) -> None:
    """`BankOptimizer.step`: begin Muon's sums, look, begin the others; then one after the other wait, update, gather, clear."""
    parts, due = optimizer.parts, due_in(optimizer, index)
    tell(optimizer, index, rates)
    sums = [name for name in optimizer.scatter_order if name in due]
    for name in optimizer.early:
        parts[name].scatter()
    watch(optimizer, due)
    count_update(optimizer)
    for name in sums[len(optimizer.early) :]:
        parts[name].scatter()
    for name in due:
        with beside(optimizer.lanes[name]):
            parts[name].wait()
            optimizer.works[name]()
            parts[name].gather()
            parts[name].clear()
    for name in due:
        if (lane := optimizer.lanes[name]) is not None:
            torch.cuda.current_stream().wait_stream(lane)
        parts[name].wait()
    copy_tied(optimizer, due)


# %%
#| export
@contextmanager
def beside(lane: Any) -> Iterator[None]:
    """On a GPU: what is begun here runs in a lane (a stream) of its own, after all that was begun before."""
    if lane is None:
        yield
    else:
        lane.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(lane):
            yield


def add_transposed(target: Tensor, source: Tensor) -> None:
    target.add_(source.mT)


def copy_transposed(target: Tensor, source: Tensor) -> None:
    target.copy_(source.mT)


def add_tied(optimizer: BankOptimizer, due: Sequence[str]) -> None:
    """Add the gradient of what is tied to that of what it is tied to."""
    for name, whole in optimizer.tied.items():
        if whole in due:
            part, target = optimizer.parts[name], optimizer.parts[whole]
            optimizer.add(target.grads[: target.units], part.grads[: part.units])
            part.grads.zero_()


def copy_tied(optimizer: BankOptimizer, due: Sequence[str]) -> None:
    """What is tied is what it is tied to."""
    for name, whole in optimizer.tied.items():
        if whole in due:
            part, target = optimizer.parts[name], optimizer.parts[whole]
            optimizer.copy(part.whole[: part.units], target.whole[: target.units])


def watch(optimizer: BankOptimizer, due: Sequence[str]) -> None:
    """Add up what is tied, and look for gradients that are not finite on any rank."""
    key = (tuple(due), tuple(optimizer.tied))
    if key not in optimizer.looks:
        broken = torch.zeros(len(due), device=optimizer.device)
        looking = Replay(partial(look, optimizer, list(due), broken), optimizer.looking)
        optimizer.looks[key] = looking, broken
    looking, broken = optimizer.looks[key]
    looking()
    if optimizer.skip is None or not due:
        return
    if ranks()[1] > 1:
        dist.all_reduce(broken)
    optimizer.skip.copy_(broken.sum().clamp(max=1.0))
    torch._foreach_add_([optimizer.bad[name] for name in due], list(broken.unbind()))


def look(optimizer: BankOptimizer, due: list[str], broken: Tensor) -> None:
    """Which of this rank's gradients are not finite."""
    add_tied(optimizer, due)
    if optimizer.skip is not None and due:
        largest = torch._foreach_norm([optimizer.parts[name].grads for name in due], math.inf)
        broken.copy_(~torch.isfinite(torch.stack([x.float() for x in largest])))


def blame(optimizer: BankOptimizer) -> list[str]:
    """Names of parts with gradients that were not finite; waits for the device."""
    return [name for name, times in optimizer.bad.items() if times.item()]


def warm_up(optimizer: BankOptimizer) -> None:
    """Compile and record everything, with all that is tied tied and with all apart; nothing is updated."""
    if optimizer.skip is None:
        raise ValueError("warming up is a step that is left out, which only the guard can do")
    optimizer.numbers.fill(dict.fromkeys(TOLD, 0.0))
    optimizer.numbers.fixes.fill_(1.0)
    now = optimizer.tied
    for tied in (now, {}) if now else ({},):
        optimizer.tied = tied
        for index in [*range(optimizer.options.adam_every)] * 3:
            watch(optimizer, due_in(optimizer, index))
    optimizer.tied = now
    optimizer.skip.fill_(1.0)
    for name, work in optimizer.works.items():
        for _ in range(3):
            with beside(optimizer.lanes[name]):
                work()
    if optimizer.device.type == "cuda":
        torch.cuda.synchronize()
    optimizer.skip.zero_()
    for total in optimizer.bad.values():
        total.zero_()


# %%
broken = {name: torch.nn.Parameter(p.detach().clone()) for name, p in pair.items()}
optimizer = BankOptimizer(broken, good, OptimizerOptions(adam_every=1))
for p in broken.values():
    p.grad += 1.0
broken["table"].grad[3, 1] = math.nan
optimizer.parts["table"].announce(torch.arange(len(broken["table"])))
optimizer.step(0, {"muon": 0.02, "adam": 0.01, "momentum": 0.9})
assert all(torch.equal(p, torch.ones_like(p)) for p in broken.values())
assert blame(optimizer) == ["table"] and optimizer.updates == 0
print(f"nothing has moved, and the gradient of {blame(optimizer)[0]} is to blame")

# %% [markdown]
# ### Apart, and together again
#
# In record 89 head and embedding are one matrix until two thirds of the training, stored twice because each is read in another order. Meanwhile the embedding's gradient is added to the head's, and the head's new values are copied back. When they part, the embedding inherits the head's weights, which it has, and its moments, which lie on other ranks and the other way round.
#
# The state, too, must not depend on how many ranks there were. It is saved whole and unpadded; whoever loads it takes a share. It says whether the two have parted. Gradients that wait for Adam's next turn belong to it as well: their sum is saved, and goes to the first rank, since it does not matter who contributes it. (With several ranks it is then rounded in another order, so such a run goes on equal up to rounding, and not to the bit.)


# %%
#| export
def untie(optimizer: BankOptimizer, name: str) -> None:
    """Let a tied parameter train by itself from now on, with the transposed moments of what it was tied to."""
    part, source = optimizer.parts[name], optimizer.parts[optimizer.tied.pop(name)]
    for key, own in part.state.items():
        moments = source.collect(source.state[key]).mT.contiguous()
        own.copy_(part.mine(part.padded(moments)))


def waiting(optimizer: BankOptimizer) -> dict[str, Tensor]:
    """Gradients that wait for adam's turn, summed over ranks."""
    found = {}
    for name, part in optimizer.parts.items():
        if optimizer.pending and part.every > 1:
            total = part.grads.clone()
            if ranks()[1] > 1:
                dist.all_reduce(total)
            places = part.slices if isinstance(part, Replicated) else {name: slice(part.units)}
            found |= {f"{p}/waiting": total[here] for p, here in places.items()}
    return found


def state_places(optimizer: BankOptimizer) -> dict[str, tuple[Any, Tensor, slice | None]]:
    """For each tensor of the state: its part, what this rank has, and where in that it stands if there is more in it."""
    found: dict[str, tuple[Any, Tensor, slice | None]] = {}
    for name, part in optimizer.parts.items():
        places = part.slices if isinstance(part, Replicated) else {name: None}
        for key, own in part.state.items():
            found |= {f"{p}/{key}": (part, own, here) for p, here in places.items()}
    return found


def state_tensors(optimizer: BankOptimizer) -> dict[str, Tensor]:
    """The whole state by `parameter/key`, the same on every rank and for every number of ranks. All ranks have to ask."""
    facts = {"updates": int(optimizer.updates), "pending": int(optimizer.pending)}
    tied = [row.name for row in optimizer.table if row.tied]
    facts |= {f"{name} apart": int(name not in optimizer.tied) for name in tied}
    found = {f"optimizer/{key}": torch.tensor(value) for key, value in facts.items()}
    for label, (part, own, here) in state_places(optimizer).items():
        found[label] = own[here].clone() if here else part.collect(own)
    return found | waiting(optimizer)


# %%
#| export
def load_state(optimizer: BankOptimizer, saved: Mapping[str, Tensor]) -> None:
    """Take back what `state_tensors` gave, on however many ranks."""
    refuse_other_state(optimizer, saved)
    optimizer.updates.copy_(saved["optimizer/updates"])
    optimizer.pending = bool(saved["optimizer/pending"])
    tied = [row for row in optimizer.table if row.tied and not saved[f"optimizer/{row.name} apart"]]
    optimizer.tied = {row.name: row.tied for row in tied}
    for label, (part, own, here) in state_places(optimizer).items():
        value = saved[label].to(own.device)
        own[here or slice(None)].copy_(value if here else part.mine(part.padded(value)))
    for name, part in optimizer.parts.items():
        take_waiting(name, part, saved)


def refuse_other_state(optimizer: BankOptimizer, saved: Mapping[str, Tensor]) -> None:
    """Refuse a saved state of other parameters or other options."""
    shapes: dict[str, tuple[int, ...]] = {f"optimizer/{key}": () for key in ("updates", "pending")}
    shapes |= {f"optimizer/{row.name} apart": () for row in optimizer.table if row.tied}
    for label, (part, own, here) in state_places(optimizer).items():
        shapes[label] = (here.stop - here.start,) if here else (part.units, *own.shape[1:])
        if saved.get("optimizer/pending", 0) and part.every > 1:
            wait = f"{label.rsplit('/', 1)[0]}/waiting"
            shapes[wait] = shapes[label][:1] + tuple(part.grads.shape[1:])
    same_names("the saved state", saved, shapes, "this optimizer's state")
    for label, tensor in saved.items():
        if tuple(tensor.shape) != shapes[label]:
            raise ValueError(f"{label}: saved as {tuple(tensor.shape)}, here {shapes[label]}")


def take_waiting(name: str, part: Any, saved: Mapping[str, Tensor]) -> None:
    """Put gradients that wait, if any, where the first rank's are; all others are zero."""
    part.grads.zero_()
    places = part.slices if isinstance(part, Replicated) else {name: slice(part.units)}
    for p, here in places.items():
        if f"{p}/waiting" in saved and ranks()[0] == 0:
            part.grads[here].copy_(saved[f"{p}/waiting"])
    if isinstance(part, Sparse):
        part.touched.copy_(part.grads.any(1))


# %%
tied = {"head": torch.nn.Parameter(torch.ones(3, 5)), "embed": torch.nn.Parameter(torch.ones(5, 3))}
rows_of = (Entry("head", "adam", "sharded"), Entry("embed", "adam", "sharded", tied="head"))
optimizer = BankOptimizer(tied, rows_of, OptimizerOptions(adam_every=1))
rates = {"muon": 0.0, "adam": 0.01, "momentum": 0.0}
for step in range(4):
    if step == 2:
        untie(optimizer, "embed")
        assert torch.equal(
            optimizer.parts["embed"].state["mean"], optimizer.parts["head"].state["mean"].mT
        )
    tied["head"].grad += torch.arange(15.0).view(3, 5)
    tied["embed"].grad += 1.0
    optimizer.step(step, rates)
    assert torch.equal(tied["head"], tied["embed"].mT) == (step < 2)
saved = state_tensors(optimizer)
again = BankOptimizer(tied, rows_of, OptimizerOptions(adam_every=1))
load_state(again, saved)
assert all(torch.equal(tensor, saved[label]) for label, tensor in state_tensors(again).items())
assert again.tied == {}, "apart they stay"
print(f"tied for two steps, then apart; {len(saved)} tensors saved and taken back")

# %% [markdown]
# ## The measurement
#
# First the bytes. Linux says how many bytes each network device has sent, the loopback among them, and gloo sends everything through it. So start $w$ processes with record 89's table at an eighth of its widths and vocabularies, let them scatter and gather one parameter at a time, and read the counter before and after.

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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from speedrun.config import TODAY
from speedrun.lab.errors import Problem
from speedrun.lab.provenance import root, stamp

NAMES = ("wire",)
ON_GPUS = ("step", "trace", "nvlink")  # measured on a machine that has one or more
RANKS = (1, 2, 4, 8)
# matrices' sums first, but tables' updates: their gathers take longest, and travel while matrices are updated
SCATTER = ("qk", "mlp", "vo", "bigram", "values", "head", "embed", "replicated")
WORK = ("bigram", "values", "head", "embed", "qk", "mlp", "vo", "replicated")
RATES = {"muon": 0.02, "adam": 0.008, "momentum": 0.9}


def record_shapes(scale: int = 1) -> dict[str, tuple[int, ...]]:
    """Record 89's parameters in our banks, with every width divided by `scale`, and every vocabulary too."""
    d, words = 768 // scale, 50_304 // scale
    small = {"gates": (12 * 60,), "scalars": (64,), "mudd": (2 * 64, d)}
    tables = {"head": (d, words), "embed": (words, d), "values": (5 * words, d)}
    banks = {"qk": (60, d // 3, d), "vo": (20, d, d), "mlp": (22, 4 * d, d)}
    return banks | tables | {"bigram": (words * 15 // 2, d)} | small


def record_table() -> tuple[Entry, ...]:
    """Much as record 89 updates them; its small parameters are lumped together."""
    slow: dict[str, Any] = {"betas": (0.9, 0.99)}
    tables: dict[str, Any] = {"rate": 75.0, "decay": 5.0, "betas": (0.75, 0.95)}
    words: dict[str, Any] = {"decay": 150.0, "betas": (0.5, 0.95)}
    return (
        Entry("qk", "muon", "sharded"),
        Entry("vo", "muon", "sharded"),
        Entry("mlp", "muon", "sharded", rate=(2.0, 4.0)),
        Entry("head", "adam", "sharded", **words),
        Entry("embed", "adam", "sharded", tied="head", **words),
        Entry("values", "adam", "sharded", **tables),
        Entry("bigram", "adam", "sparse", **tables),
        Entry("gates", "adam", "replicated", **slow),
        Entry("scalars", "adam", "replicated", rate=5.0, decay=0.0, **slow),
        Entry("mudd", "adam", "replicated", rate=0.25, **slow),
    )


# %% tags=["hide-input"]
#| export measure.many_gpus
def record_parameters(scale: int, device: str = "cpu") -> dict[str, nn.Parameter]:
    """Small random values of those shapes, bfloat16 but for the scalars and what splits its own bits."""
    draw, found = torch.Generator(device).manual_seed(0), dict[str, nn.Parameter]()
    for name, shape in record_shapes(scale).items():
        p = 0.02 * torch.randn(shape, generator=draw, device=device)
        exact = name in ("scalars", "qk", "vo", "mlp")
        found[name] = nn.Parameter(p if exact else p.bfloat16())
    return found


def sent_by_machine() -> float:
    """Bytes that this machine has sent through all network devices, the loopback among them, by the number of ranks."""
    path = Path("/proc/net/dev")
    if not path.exists():
        raise Problem("bytes are counted in /proc/net/dev", "measure this on Linux")
    lines = path.read_text().splitlines()[2:]
    return sum(int(line.split(":")[1].split()[8]) for line in lines) / ranks()[1]


def sent_by_gpu(index: int) -> float:
    """Bytes that a GPU has sent through its NVLinks, as its own counters say, in steps of 1,024."""
    import pynvml  # type: ignore[import-untyped]

    pynvml.nvmlInit()
    handle, every = pynvml.nvmlDeviceGetHandleByIndex(index), 0xFFFFFFFF
    counter = pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX
    (value,) = pynvml.nvmlDeviceGetFieldValues(handle, [(counter, every)])
    if value.nvmlReturn:
        error = pynvml.NVMLError(value.nvmlReturn)
        raise Problem(f"GPU {index} does not count what its NVLinks send: {error}", "count on gloo")
    return 1024 * value.value.ullVal


HALVES = {"scattered": "scatter", "gathered": "gather"}


def counted(part: Any, begin: str, repeats: int = 5) -> float:
    """Bytes that a rank sends in one half of an exchange, less a barrier's; a median."""
    gpu = part.own.device.type == "cuda"

    def settled() -> float:
        dist.barrier()
        if gpu:
            torch.cuda.synchronize()
        time.sleep(0.05)  # until stragglers are through
        return sent_by_gpu(part.own.device.index) if gpu else sent_by_machine()

    found = []
    for _ in range(repeats):
        start, before = settled(), settled()
        getattr(part, begin)()
        part.wait()
        found.append(settled() - before - (before - start))
    return statistics.median(found)


# %% tags=["hide-input"]
#| export measure.many_gpus
def small_record(scale: int, device: str = "cpu", **options: Any) -> BankOptimizer:
    """Record 89's parameters and table at a fraction of its widths."""
    chosen = OptimizerOptions(muon=TODAY, **options)
    parameters = record_parameters(scale, device)
    return BankOptimizer(parameters, record_table(), chosen, SCATTER, WORK)


def announce_some(optimizer: BankOptimizer, share: float, seed: int) -> Tensor:
    """Say that a share of the bigram table's rows was touched; which: (rows,) bool."""
    table, draw = optimizer.parameters["bigram"], torch.Generator().manual_seed(seed)
    rows = torch.rand(len(table), generator=draw) < share
    optimizer.parts["bigram"].announce(rows.nonzero())
    return rows


def wire_of_rank(device: str, scale: int = 8, touched: float = 0.2) -> dict:
    """Of each part: bytes that a rank sends, scattering and gathering, as counted (on CPUs: mean of the ranks) and by formula."""
    optimizer, (rank, world), found = small_record(scale, device), ranks(), dict[str, dict]()
    announce_some(optimizer, touched, seed=rank)
    kinds = {row.name: row.comm for row in record_table()}
    for name, part in optimizer.parts.items():
        whole, comm = getattr(part, "whole", part.own), kinds.get(name, TOGETHER)
        size, rows = whole.element_size(), touched * len(whole) * (comm == "sparse")
        formula = bytes_sent(comm, whole.numel(), size, world, rows, whole[0].numel())
        found[name] = {"comm": comm, "bytes": whole.numel() * size, "formula": formula} | {
            half: counted(part, begin) for half, begin in HALVES.items()
        }
    return found


# %% tags=["hide-input"]
#| export measure.many_gpus
def steps_of_rank(device: str, scale: int = 48, steps: int = 4, micro: int = 4) -> dict:
    """Parameters after some steps with small integers for gradients, `micro` micro-batches shared by the ranks: a hash of each, and its length."""
    optimizer, (rank, world) = small_record(scale, device), ranks()
    for step in range(steps):
        for part in range(rank * micro // world, (rank + 1) * micro // world):
            rows = announce_some(optimizer, 0.2, seed=100 * step + part)
            draw = torch.Generator().manual_seed(100 * step + part)
            for name, p in optimizer.parameters.items():
                g = torch.randint(-3, 4, p.shape, generator=draw)
                assert p.grad is not None  # the optimizer's storage
                p.grad += (g * rows[:, None] if name == "bigram" else g).to(p.grad)
        optimizer.step(step, RATES)
    found = {name: p.detach().cpu() for name, p in optimizer.parameters.items()}
    bits = {name: p.view(torch.uint8).numpy().tobytes() for name, p in found.items()}
    hashes = {name: hashlib.sha256(some).hexdigest() for name, some in bits.items()}
    return {"hash": hashes, "length": {name: p.double().norm().item() for name, p in found.items()}}


# %% tags=["hide-input"]
#| export measure.many_gpus
def wait_for(device: str) -> None:
    """Until the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def clocked(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Milliseconds until a work is done, and until Python is."""
    wait_for(device)
    begin = time.perf_counter()
    work()
    python = time.perf_counter()
    wait_for(device)
    return 1000 * (time.perf_counter() - begin), 1000 * (python - begin)


def fill_gradients(optimizer: BankOptimizer, index: int, tokens: int = 32_768) -> None:
    """Random gradients, the bigram table's in as many of its rows as a pair of record 89's micro-batches may touch."""
    rank, world = ranks()
    rows = announce_some(optimizer, tokens / 377_280, seed=index * world + rank)
    for name, p in optimizer.parameters.items():
        assert p.grad is not None  # the optimizer's storage
        p.grad.normal_(std=1e-3)
        if name == "bigram":
            p.grad *= rows[:, None].to(p.grad)
    if world > 1:
        dist.barrier()


# %%
assert 10 < clocked(lambda: time.sleep(0.01), "cpu")[0] < 100


# %% tags=["hide-input"]
#| export measure.many_gpus
def time_steps(optimizer: BankOptimizer, device: str, rounds: int = 17) -> dict[str, list]:
    """Milliseconds of steps without tables (even) and with them (odd), and of Python in them."""
    took: dict[str, list] = {"even": [], "odd": [], "exchange": []}
    for index in range(2 * (rounds + 4)):
        fill_gradients(optimizer, index)
        sparse, tables = optimizer.parts["bigram"], index % 2 == 1
        if tables and ranks()[1] > 1:  # a trainer does this during the backward pass
            took["exchange"].append(clocked(sparse.exchange, device)[0])
        done = clocked(partial(optimizer.step, index, RATES), device)
        if index >= 8:
            took["odd" if tables else "even"].append(done)
    return took


def step_of_rank(device: str, scale: int = 0) -> dict:
    """Times of record 89's step, tied and apart; of each part's update alone, and of what is around the updates."""
    optimizer = small_record(scale or (1 if device == "cuda" else 48), device)
    begin = time.perf_counter()
    warm_up(optimizer)
    wait_for(device)
    found: dict[str, Any] = {"warm_up_s": time.perf_counter() - begin}
    found["tied"] = time_steps(optimizer, device)
    untie(optimizer, "embed")
    found["apart"] = time_steps(optimizer, device)
    works: dict[str, Callable[[], None]] = dict(optimizer.works)
    works["guard"] = lambda: watch(optimizer, list(optimizer.parts))
    works |= {f"clear {name}": part.clear for name, part in optimizer.parts.items()}
    with torch.no_grad():
        found["parts"] = {
            name: [clocked(work, device)[0] for _ in range(17)] for name, work in works.items()
        }
    if device == "cuda":
        found["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


# %%
scale = tier.pick(cpu=48, gpu=1)  # 1: record 89's own widths
brief = step_of_rank(tier.device, scale)
assert len(brief["tied"]["even"]) == len(brief["apart"]["odd"]) == 17
assert {"qk", "bigram", "replicated", "guard", "clear head"} <= set(brief["parts"])
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
    table = {row.name: row for row in record_table()}
    matrices, rest = [], []
    for name, p in record_parameters(scale or (1 if device == "cuda" else 48), device).items():
        muon = table[name].rule == "muon"
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


# %%
stock = stock_of_rank(tier.device, scale=tier.pick(cpu=48, gpu=4))  # 16 GB hold no more beside it
assert stock["matrices"] == 60 + 20 + 22 and len(stock["parts"]["AdamW"]) == 17


# %% tags=["hide-input"]
#| export measure.many_gpus
def in_turn(optimizer: BankOptimizer) -> None:
    """Make one lane of all, in which every transfer is waited for as soon as it has begun."""
    optimizer.lanes = dict.fromkeys(optimizer.parts)
    for part in optimizer.parts.values():
        for name in HALVES.values():
            begin = getattr(part, name)
            setattr(part, name, lambda begin=begin, part=part: (begin(), part.wait()))


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


# %%
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
    warm_up(optimizer)
    found = {}
    for way in ("overlapped", "in turn"):
        if way == "in turn":
            in_turn(optimizer)
        for index in range(8):
            fill_gradients(optimizer, index)
            if index % 2:
                optimizer.parts["bigram"].exchange()
            wait_for(device)
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
                took = clocked(partial(optimizer.step, index, RATES), device)
        events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        spans = [(e.name, e.time_range.start, e.time_range.end) for e in events]
        found[way] = {"lanes": stretches(spans), "ms": took[0]}
    return found


# %% tags=["hide-input"]
#| export measure.many_gpus
WORKS: dict[str, Callable[[str], dict]] = {"wire": wire_of_rank, "steps": steps_of_rank}
WORKS |= {"step": step_of_rank, "stock": stock_of_rank, "trace": trace_of_rank}
WORKS |= {"nvlink": partial(wire_of_rank, scale=1, touched=32_768 / 377_280)}


def one_rank(name: str, out: str, device: str) -> None:
    """What each process of `on_ranks` does."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        os.environ["TORCH_NCCL_HIGH_PRIORITY"] = "1"  # or transfers wait behind large kernels
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    result = WORKS[name](device)
    if ranks()[0] == 0:
        Path(out).write_text(json.dumps(result))
    dist.destroy_process_group()


def on_ranks(world: int, name: str, device: str = "cpu") -> dict:
    """What a work gives on the first of `world` processes of this machine, which talk through gloo, or on GPUs through NCCL."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={world}", "-m", "speedrun.measure.many_gpus"]
        command += [name, str(out), device]
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
        raise Problem(f"“{name}” is measured on GPUs, here are {count}", "make doctor says why")
    if name != "step":
        return on_ranks(2, name, "cuda")
    worlds = {str(w): on_ranks(w, "step", "cuda") for w in RANKS if w <= count}
    return {"ranks": worlds, "stock": on_ranks(1, "stock", "cuda")}


# %% tags=["hide-input"]
#| export measure.many_gpus
def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """wire: bytes that a rank sends for each part of record 89's table at an eighth of its widths, by number of ranks.

    On GPUs, step: times of record 89's step and of PyTorch's own pair. trace: what ran when. nvlink: bytes, of two ranks.
    """
    if name in ON_GPUS:
        samples = {"step": 17, "trace": 1, "nvlink": 5}[name]
        return on_gpus(name), stamp(command, ["speedrun.measure.many_gpus"], samples)
    found = {str(world): on_ranks(world, "wire") for world in RANKS}
    return {"ranks": found}, stamp(command, ["speedrun.measure.many_gpus"], 1)


if __name__ == "__main__" and __spec__ is not None:  # python -m, not a notebook
    one_rank(*sys.argv[1:])


# %% [markdown]
# Does it come to the same, however many share the work? Four micro-batches with gradients of small integers are summed exactly in any order and any grouping, so the sums of 1, 2 and 4 ranks are equal to the bit. So are the updates, if a matrix comes out the same from a batch of three and from a batch of six. Most CPUs' libraries do that. Those for CPUs with matrix units need not, nor does a GPU's; the line below says how it is here. These are real processes (small ones: record 89's table, with every width and every vocabulary divided by 48), both rules, and every kind of communication:

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
# And the bytes, counted beside the formula:

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
        kind = {"sparse": "sparse", "sharded": "scatter"}.get(part["comm"], "all-reduce")
        ratios[kind].append(part["scattered"] / scattered)
for kind, values in ratios.items():
    print(f"{kind:10} {min(values):.2f} to {max(values):.2f} of the formula")
assert max(ratios["gather"]) < 1.03 and max(ratios["sparse"]) < 1.03
assert 1.9 < min(ratios["scatter"]) and max(ratios["scatter"]) < 2.1
print(measured_on(wire))

# %% [markdown]
# Gathering and the sparse exchange cost what the formula says, to a part in a hundred or so. Summing costs *twice* as much, for every bank and table: PyTorch's reduce-scatter over gloo is an all-reduce of which each rank throws most away. So over gloo sharding sends three halves.

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
# NCCL has the real one. An H100 counts what its NVLinks send, so the same works can be counted there, on two GPUs:

# %%
nvlink = load_result("many_gpus", "nvlink")
times_formula: dict[str, list[float]] = {"more than 2 MB": [], "less": [], "sparse": []}
for part in nvlink["data"].values():
    for half, formula in zip(("scattered", "gathered"), part["formula"]):
        rows = part["comm"] == "sparse" and half == "scattered"
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
# Large messages cost what the formula says, to the printed digits. The one small one, 0.2 MB, costs twice as much. NCCL has a protocol for such in which a flag travels beside every four bytes, so that the receiver need not be told that they are there: it pays bytes for latency. (The row numbers of the sparse exchange are small, too, which is its one per cent.)
#
# ### The clock
#
# Now the step, with record 89's shapes at full size, alone, with everything waiting for it. What could it take at best? Muon's products, by whole tiles of 128 × 128, at the rate at which this GPU multiplies large matrices; of a product that is symmetric, the tiles on and below the diagonal. Then each number that has to be read or written, at the rate at which it copies: 20 bytes for a weight under Muon, 24 under Adam, their gradients' clearing included.


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
    banks = list(record_shapes().values())[:3]
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
    print(f"{name:7} {parts['1'][name]:.2f} ms on one, {parts['2'][name]:.2f} on each of two")
print(f"with head and embedding apart, on one GPU: {apart:.1f} ms, its parts {alone:.1f}")

# %% [markdown]
# One H100 takes 2.3 times the floor for a step without tables. Muon's products are computed whole, though most of them are symmetric; a library's batched product copies the matrix that it adds to; and between products everything is read and written several times: for the norm, for the momentum, for the lengths of rows. [Chapter 13](13_muon.py) says which products they are. Adam, by itself, is at its floor.
#
# PyTorch's `Muon` updates the 102 matrices one after the other, and every operation is its own kernel; ours takes little more than a tenth of its time, though it keeps more: momentum in float32, the lost bits, the guard. Its AdamW, with moments in bfloat16, takes a sixth less than ours with float32 ones. A step with tables takes the pair 4.4 times as long, and the mean of both kinds six times, though it updates tables in each.
#
# Two GPUs halve the arithmetic. The step without tables gets a quarter shorter, the one with tables a tenth. (Python needs 0.8 ms of the former. An eighth of Muon's updates would take 0.4, and the guard stays at 0.6.)
#
# On one GPU lanes save little: the step with tables is 0.3 ms shorter than its parts one after the other. On two they hide transfers:

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
fig.suptitle(
    f"overlapped, NCCL's kernels run for {network['overlapped']:.1f} of {ends['overlapped']:.1f} ms"
)
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
rows = bytes_sent("sparse", BIGRAM, 2, 2, rows=2 * 16_384, width=768)
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
# Overlapping saves 1.9 milliseconds of 9.4. But NCCL's kernels are then on the GPU 1.7 times as long. That includes waiting for the other rank, and sharing memory and multiprocessors: two tables' gathers get 134 and 182 GB/s, undisturbed 285 and 264, three fifths of the data sheet's 450. A trace does not tell waiting from slow travelling. For 0.5 ms such a kernel runs and nothing else does. All bytes of this step would take 3.5 ms undisturbed, so the link alone does not bound it.
#
# The prediction divided by 450 GB/s. If eight GPUs gather as fast as these two undisturbed, and sum as fast, a step with tables is a fifth of an average one, and not an eighth.

# %% [markdown]
# ## What it buys
#
# By count, for record 89's parameters on eight GPUs: the state, and the work of the orthogonalisation.


# %%
def state_bytes(numel: int, rule: str) -> int:
    """Optimizer state of a parameter: Adam's two means in float32; Muon's momentum and its lost bits."""
    return numel * (8 if rule == "adam" else 4 + 2)


def busy_share(matrices: int, world: int) -> float:
    """The share of its time that a rank works on matrices which exist, and not on padding."""
    return matrices / (world * math.ceil(matrices / world))


tables = 2 * HEAD + VALUES + BIGRAM
sizes = {name: math.prod(shape) for name, shape in record_shapes().items()}
assert sum(sizes[name] for name in ("qk", "vo", "mlp")) == MUON_WEIGHTS
assert (sizes["head"], sizes["values"], sizes["bigram"]) == (HEAD, VALUES, BIGRAM)
assert busy_share(20, 16) == 5 / 8
assert 1.1 < 2 * tables / 1e9 < 1.15
whole = state_bytes(MUON_WEIGHTS, "muon") + state_bytes(tables, "adam")
of_bank = {name: busy_share(record_shapes()[name][0], 8) for name in ("qk", "vo", "mlp")}
assert 4.9e9 < whole < 5.2e9 and [round(x, 2) for x in of_bank.values()] == [0.94, 0.83, 0.92]
print(f"state: {whole / 1e9:.1f} GB on each GPU if replicated, {whole / 8e9:.2f} GB sharded")
for name, share in of_bank.items():
    print(f"{name:3}: {record_shapes()[name][0]} matrices on eight ranks, {share:.0%} busy")

# %% [markdown]
# The public ladder has the seconds. Sharing Muon's matrices took a step from 179 to 154 ms (record 6). Starting to gather while the next matrices are orthogonalised came with record 15. Record 24 replaced all all-reduces by their halves (and used another PyTorch). Record 36 laid the banks out so that they divide evenly; its author's comparison gives that 0.7 s. Record 57 began to interleave, Muon's sums first and Adam's gathers while Muon computes. Record 71 gained 0.75 s by its author's comparison; sending touched rows only was a part of that {cite}`moddednanogpt`. Officially:

# %%
gained = {
    n: float(ladder[str(n - 1)]["record_time_s"]) - float(ladder[str(n)]["record_time_s"])
    for n in (24, 36, 57, 61, 71)
}
assert all(0.2 < seconds < 2.5 for seconds in gained.values())
print(", ".join(f"record {n}: {seconds:.1f} s" for n, seconds in gained.items()))

# %% [markdown]
# In [the trainer](23_training_loop.py) this optimizer is `--sharing.on` (tables last, transfers without priority), and tests hold one rank and two, sharing and not, against each other. Adam in every other step is another recipe, with rates of its own. On the laptop, tuned on one grid (three rates of the matrices, four of the rest), 600 steps and nine seeds:

# %%
from speedrun.lab.stats import describe, p_difference

arms = load_result("training_loop", "sharing")["data"]["arms"]
of_arm = {arm: describe(run["val_loss"] for run in runs) for arm, runs in arms.items()}
of_arm["AdamW"] = describe(
    run["val_loss"] for run in load_result("muon", "laptop")["data"]["arms"]["today"]
)
best_rest = {arm: runs[0]["config"]["optim"]["lr"] for arm, runs in arms.items()}
assert len(load_result("training_loop", "sharing_rates")["data"]["arms"]) == 24 == 2 * 3 * 4
for arm, sample in of_arm.items():
    print(f"{arm:8} {sample}")
assert best_rest == {"every 1": 0.004, "every 2": 0.008} and of_arm["every 2"].n == 9
assert 0.01 < of_arm["every 2"].mean - of_arm["every 1"].mean < 0.02
assert p_difference(of_arm["every 1"], of_arm["every 2"]) < 1e-4
assert 0.015 < of_arm["every 1"].mean - of_arm["AdamW"].mean < 0.025
print(measured_on(load_result("training_loop", "sharing")))

# %% [markdown]
# Half as many updates by Adam, at twice the rate, cost 0.014 there, where they save next to nothing. And this Adam, in every step, ends 0.02 above chapter 13's runs, in which PyTorch's AdamW decays embeddings by a tenth of the rate, and all gradients are clipped. Which of the two it is, nobody has measured. So no preset shares yet.
#
# ## What it costs, and when it fails
#
# Padding is work on zeros. Twenty matrices on eight ranks leave a sixth of the time to padding, and on sixteen ranks three eighths. Beyond as many ranks as a bank has matrices, more ranks buy nothing at all.
#
# Gradients that have a fixed place must be *added* there, which handing them over would not cost: for tables 1.1 GB of gradients, read twice and written once in every backward pass.
#
# Sharding also ends an equality. All ranks must start from the same values: gathering makes sharded parameters equal at the first step, but replicated ones would stay apart, and nobody would notice. Replicas that all do the same sums stay equal, and if one is wrong, its parameters differ from the others' and can be caught. Here each number is computed by one rank and believed by seven.
#
# And sums in bfloat16 round, at each of a ring's $w - 1$ hops. The gradient of two ranks is not quite that of one: in the tests momenta after six steps differ by less than one part in 128. With integers nothing rounds, which is how the exchange can be tested apart from the arithmetic.
#
# ## What did not work
#
# Record 23 began a bucket's all-reduce, record 44 the reduce-scatter of each of Adam's gradients, from a hook, as soon as autograd had finished it. It is the obvious way to overlap. Record 61 went back to a fixed order after the backward pass and was faster, with other changes at the same time. Two plausible costs, not measured: Python in the middle of the backward pass, and sums that compete with its kernels. Counting a sparse table's rows on the GPU (record 68 hashed there) forces a wait, since Python has to know the counts before it can allocate; record 71 moved the hash back to the CPU for that reason.
#
# ## Exercises
#
# 1. The order matters more than one would think. Three parameters have sums that take 2, 4 and 1 ms, updates of 1, 5 and 5 ms, and gathers of 1, 1 and 4 ms. Sums run one after the other on the network, in the order in which they were begun; gathers join the same queue when an update is done, behind the sums; updates run one after the other on the GPU. Write `makespan(jobs)` for jobs (sum, update, gather) taken in the given order, and find the best order and the worst.


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
    row, _ = bytes_sent("sparse", 1000 * width, 2, world, rows=1, width=width)
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
# Record 71's count of touched rows and record 61's order are still what record 89 runs. PR 349, not merged, updates head and embedding on every rank again. By this chapter's count that saves no bytes: new weights need not be gathered after the update, but gradients have to reach everybody before it.
