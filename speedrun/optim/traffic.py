# Tangled from notebooks/20_many_gpus.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.optim.comm import dist_info
from speedrun.optim.optimizer import MuonAdam


# %% Communication volume
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


# %% The measurement
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
