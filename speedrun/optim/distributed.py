# Tangled from notebooks/20_many_gpus.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% A share for every rank
import math
import torch
import torch.distributed as dist
from torch import Tensor


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


# %% Rows that were touched
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


# %% Bytes
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
