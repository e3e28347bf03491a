# Tangled from notebooks/23_training_loop.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Rank, world size and device
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from speedrun.lab.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device


def choose_device(device: str, backend: str, rank: int, local: int) -> torch.device:
    """The device of a rank; local: its number on this machine. device: auto, cpu or cuda."""
    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if device == "cuda" and not gpus:
        raise UserError(
            "--device cuda, but PyTorch sees no GPU", "make doctor says why; or --device cpu"
        )
    if not gpus:
        return torch.device("cpu")
    if local >= gpus and backend != "gloo":
        what = f"rank {rank} has no GPU of its own: there are {gpus}"
        raise UserError(what, f"--gpus {gpus}, or --backend gloo to share one, slowly")
    return torch.device("cuda", local % gpus)


def rank_numbers() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; (0, 1, 0) without it. An empty variable is not set."""
    said = {name: os.environ.get(name) or None for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        rank, world = int(said["RANK"] or 0), int(said["WORLD_SIZE"] or 1)
        local = int(said["LOCAL_RANK"] or rank)
    except ValueError:
        rank, world, local = -1, 0, 0
    if not 0 <= rank < world or local < 0:
        what = "the environment names no rank: " + ", ".join(
            f"{k}={v}" for k, v in said.items() if v
        )
        raise UserError(
            what, "unset RANK WORLD_SIZE LOCAL_RANK; python -m speedrun.launch starts ranks"
        )
    return rank, world, local


def join_ranks(device: str, backend: str) -> Ranks:
    """Join the other ranks of this run, if there are any. backend: auto, nccl or gloo.

    They meet in a file that the launcher names, or else, under a torchrun of one's own, at its address.
    """
    rank, world, local = rank_numbers()
    planned = os.environ.get("SPEEDRUN_DEVICE") if device == "auto" else None
    chosen = choose_device(planned or device, backend, rank, local)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1 and not dist.is_initialized():
        meeting = os.environ.get("SPEEDRUN_STORE")
        if not meeting and not os.environ.get("MASTER_ADDR"):
            what = f"WORLD_SIZE={world}, but nobody says where the ranks meet (MASTER_ADDR)"
            raise UserError(
                what, "unset RANK WORLD_SIZE; or python -m speedrun.launch, which starts them"
            )
        auto = "nccl" if chosen.type == "cuda" else "gloo"
        store: dict[str, Any] = {"store": dist.FileStore(meeting, world)} if meeting else {}
        numbers: dict[str, Any] = {
            "rank": rank,
            "world_size": world,
            "timeout": timedelta(minutes=30),
        }
        dist.init_process_group(auto if backend == "auto" else backend, **numbers, **store)
    return Ranks(rank, world, chosen)


def all_reduce_sum(tensor: Tensor, world: int) -> Tensor:
    """The tensor, added up over all ranks, in place."""
    if world > 1:
        dist.all_reduce(tensor)
    return tensor
