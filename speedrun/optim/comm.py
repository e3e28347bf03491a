# Tangled from notebooks/20_many_gpus.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Sharded parameters
import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


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
