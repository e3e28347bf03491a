# Tangled from notebooks/20_many_gpus.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.optim.distributed import bytes_sent, ranks
from speedrun.optim.optimizer import BankOptimizer, Entry, OptimizerOptions, TOGETHER


# %% The measurement
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from speedrun.config import TODAY
from speedrun.lab.hardware import Problem
from speedrun.lab.results import root, stamp

NAMES = ("wire",)
RANKS = (1, 2, 4, 8)


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


def record_parameters(scale: int, device: str = "cpu") -> dict[str, nn.Parameter]:
    """Small random values of those shapes, bfloat16 but for the scalars and what splits its own bits."""
    draw, found = torch.Generator().manual_seed(0), dict[str, nn.Parameter]()
    for name, shape in record_shapes(scale).items():
        p = 0.02 * torch.randn(shape, generator=draw)
        exact = name in ("scalars", "qk", "vo", "mlp")
        found[name] = nn.Parameter((p if exact else p.bfloat16()).to(device))
    return found


def sent_so_far() -> int:
    """Bytes that this machine has sent through all network devices, the loopback among them."""
    path = Path("/proc/net/dev")
    if not path.exists():
        raise Problem("bytes are counted in /proc/net/dev", "measure this on Linux")
    return sum(int(line.split(":")[1].split()[8]) for line in path.read_text().splitlines()[2:])


HALVES = {"scattered": "scatter", "gathered": "gather"}


def counted(part: Any, begin: str, repeats: int = 5) -> float:
    """Bytes that a rank sends in one half of an exchange: this machine's by the number of ranks, less a barrier's; a median."""

    def settled() -> int:
        dist.barrier()
        time.sleep(0.05)  # until stragglers are through
        return sent_so_far()

    found = []
    for _ in range(repeats):
        start, before = settled(), settled()
        getattr(part, begin)()
        part.wait()
        found.append(settled() - before - (before - start))
    return statistics.median(found) / ranks()[1]


def small_record(scale: int) -> BankOptimizer:
    """Record 89's parameters and table at a fraction of its widths."""
    return BankOptimizer(record_parameters(scale), record_table(), OptimizerOptions(muon=TODAY))


def announce_some(optimizer: BankOptimizer, share: float, seed: int) -> Tensor:
    """Say that a share of the bigram table's rows was touched; which: (rows,) bool."""
    table, draw = optimizer.parameters["bigram"], torch.Generator().manual_seed(seed)
    rows = torch.rand(len(table), generator=draw) < share
    optimizer.parts["bigram"].announce(rows.nonzero())
    return rows


def wire_of_rank(scale: int = 8, touched: float = 0.2) -> dict:
    """Of each part: bytes that a rank sends, scattering and gathering, as counted (mean of the ranks) and by formula."""
    optimizer, (rank, world), found = small_record(scale), ranks(), dict[str, dict]()
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


def steps_of_rank(scale: int = 48, steps: int = 4, micro: int = 4) -> dict:
    """A hash of all parameters after some steps with small integers for gradients: `micro` micro-batches, shared by the ranks."""
    optimizer, (rank, world) = small_record(scale), ranks()
    for step in range(steps):
        for part in range(rank * micro // world, (rank + 1) * micro // world):
            rows = announce_some(optimizer, 0.2, seed=100 * step + part)
            draw = torch.Generator().manual_seed(100 * step + part)
            for name, p in optimizer.parameters.items():
                g = torch.randint(-3, 4, p.shape, generator=draw).to(p.dtype)
                assert p.grad is not None  # the optimizer's storage
                p.grad += g * rows[:, None] if name == "bigram" else g
        optimizer.step(step, {"muon": 0.02, "adam": 0.008, "momentum": 0.9})
    digest = hashlib.sha256()
    for p in optimizer.parameters.values():
        digest.update(p.detach().view(torch.uint8).numpy().tobytes())
    return {"hash": digest.hexdigest()}


WORKS: dict[str, Callable[[], dict]] = {"wire": wire_of_rank, "steps": steps_of_rank}


def one_rank(name: str, out: str) -> None:
    """What each process of `on_ranks` does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = WORKS[name]()
    if ranks()[0] == 0:
        Path(out).write_text(json.dumps(result))
    dist.destroy_process_group()


def on_ranks(world: int, name: str) -> dict:
    """What a work gives on the first of `world` processes of this machine, which talk through gloo."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={world}", "-m", "speedrun.measure.many_gpus", name, str(out)]
        quiet = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=root(), env=quiet, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return json.loads(out.read_text())


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """wire: bytes that a rank sends for each part of record 89's table at an eighth of its widths, by number of ranks."""
    found = {str(world): on_ranks(world, "wire") for world in RANKS}
    return {"ranks": found}, stamp(command, ["speedrun.measure.many_gpus"], 1)


if __name__ == "__main__" and __spec__ is not None:  # python -m, not a notebook
    one_rank(*sys.argv[1:])
