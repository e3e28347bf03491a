# Tangled from notebooks/95_machines.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.lab.doctor import CHAPTER_GB, gpu_problem, usable_gpus
from speedrun.lab.hardware import GPU, Machine, detect_machine


# %% The tier of a chapter
import os
import sys
from dataclasses import dataclass
from typing import Any

from speedrun.lab.errors import UserError, visible


@dataclass(frozen=True)
class Tier:
    """Where a chapter computes: on this GPU, tier 1; or without one on the CPU, tier C."""

    gpu: GPU | None = None

    @property
    def name(self) -> str:
        return "1" if self.gpu else "C"

    @property
    def device(self) -> str:
        """As PyTorch calls it: cuda or cpu."""
        return "cuda" if self.gpu else "cpu"

    def pick(self, cpu: Any, gpu: Any) -> Any:
        """A shape, or whatever else depends on the tier."""
        return gpu if self.gpu else cpu


def tier_of(machine: Machine, asked: str) -> Tier:
    """The tier that `TIER=asked` chooses: C, 1, or if empty 1 where a GPU has CHAPTER_GB and else C. Raises UserError."""
    if asked not in ("", "C", "c", "1"):
        fix = "TIER=C keeps to the CPU, TIER=1 takes one GPU; without TIER the machine decides"
        raise UserError(f"TIER={visible(asked)} is no tier of a chapter", fix)
    gpus = usable_gpus(machine)
    large = [gpu for gpu in gpus if gpu.memory_gb >= CHAPTER_GB]
    if asked == "1" and not gpus:
        trouble = gpu_problem(machine)
        why = trouble.what if trouble else "PyTorch finds no GPU here"
        fix = "python -m speedrun.lab.doctor says more; a kernel that was at tier C has to be restarted; or TIER=C"  # fmt: skip
        raise UserError(f"TIER=1 wants a GPU: {why}", fix)
    if asked == "1" and not large:
        return Tier(max(gpus, key=lambda gpu: gpu.memory_gb))
    return Tier(large[0] if large and asked in ("", "1") else None)


def reason(tier: Tier, machine: Machine, asked: str) -> str:
    """Why it is this tier, and how to get the other one."""
    if tier.gpu or asked:
        return "TIER=C keeps to the CPU" if tier.gpu else "as TIER=C says"
    trouble, gpus = gpu_problem(machine), usable_gpus(machine)
    if trouble:
        return f"{trouble.what}: make doctor"
    small = f"{CHAPTER_GB:.0f} GB are wanted, {gpus[0].name} is smaller: TIER=1 takes it" if gpus else ""  # fmt: skip
    return small or f"a GPU with {CHAPTER_GB:.0f} GB makes it tier 1"


def show_only(tier: Tier, machine: Machine) -> None:
    """Hide all GPUs but the tier's from this process and those that it starts. Raises UserError if CUDA is initialised already."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if tier.gpu is None and cuda is not None and cuda.is_initialized():
        what = "this kernel has a GPU in use, and tier C keeps to the CPU"
        raise UserError(what, "restart the kernel, and run the chapter from its first cell")
    if tier.gpu is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # an empty variable is none at all on Windows
    elif len(machine.gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = tier.gpu.uuid


def choose_tier() -> Tier:
    """First line of every chapter: the tier by TIER and the machine, printed and kept to. Does not initialise CUDA."""
    machine, asked = detect_machine(), os.environ.get("TIER", "").strip()
    tier = tier_of(machine, asked)
    show_only(tier, machine)
    cores = f"{machine.cores} CPU core{'s' * (machine.cores > 1)}"
    where = f"{tier.gpu.name}, {tier.gpu.memory_gb:.0f} GB" if tier.gpu else cores
    print(f"tier {tier.name}: {where} ({reason(tier, machine, asked)})")
    return tier
