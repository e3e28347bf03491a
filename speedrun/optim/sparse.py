# Tangled from notebooks/20_many_gpus.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.optim.comm import Sharded


# %% Sparse gradients of embedding tables
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
