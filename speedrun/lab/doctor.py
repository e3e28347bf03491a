# Tangled from notebooks/95_machines.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.lab.hardware import GPU, Machine, PACKAGES, detect_machine


# %% A GPU that torch cannot use
import re

from speedrun.lab.errors import UserError

LEAST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}  # on Linux, by CUDA
WINDOWS_DRIVER = {11: "452.39", 12: "528.33", 13: "580"}
OLDER_TORCH = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/"
ON_CPU = "to train on the CPU, set CUDA_VISIBLE_DEVICES=-1"


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, to compare it by: "580.65.06" is (580, 65, 6)."""
    return tuple(map(int, re.findall(r"\d+", version)))


def gpu_problem(machine: Machine) -> UserError | None:
    """Why torch cannot use the GPU that is there, and the way out; None if it can, if there is none, or without torch."""
    if not machine.gpus or not machine.versions["torch"] or machine.no_torch:
        return None
    if machine.cuda is None:
        fix = f"pip install --force-reinstall torch, from the default index; or, {ON_CPU}"
        return UserError("there is a GPU, but this torch was built for the CPU", fix)
    gpu, wanted = machine.gpus[0], numbers(machine.cuda)[0]
    least = WINDOWS_DRIVER if machine.system.startswith("Windows") else LEAST_DRIVER
    have = numbers(gpu.driver)
    runs = machine.driver_cuda or max((n for n in least if have >= numbers(least[n])), default=0)
    older = f"take a torch for an older CUDA: {OLDER_TORCH}cu126; or, {ON_CPU}"
    if have and wanted in least and runs < wanted:
        what = f"the driver {gpu.driver} is too old for the CUDA {machine.cuda} of this torch"
        fix = f"update the NVIDIA driver to {least[wanted]} or newer; or, "
        return UserError(what, fix + (older if runs == 12 else ON_CPU))
    if wanted >= 13 and (0, 0) < gpu.capability < (7, 5):
        return UserError(f"{gpu.name} is too old for the CUDA {machine.cuda} of this torch", older)
    return None


# %% The doctor
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from speedrun.lab.errors import run_main


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report: `ok` is True (fine), False (a problem, with its fix) or None (good to know)."""

    ok: bool | None
    text: str
    fix: str = ""


def verdict(ok: bool | None, good: str, bad: str, fix: str) -> Finding:
    """`good` where `ok`, else `bad` with its fix."""
    return Finding(ok, good) if ok else Finding(ok, bad, fix)


def software_findings(machine: Machine) -> list[Finding]:
    """Python, torch, Triton, a compiler, and the packages of the book."""
    have, python = machine.versions, f"Python {machine.python}"
    new = tuple(int(part) for part in machine.python.split(".")[:2]) >= (3, 11)
    built = (
        f"torch {have['torch']}, built for {'CUDA ' + machine.cuda if machine.cuda else 'the CPU'}"
    )
    torch = f"torch {have['torch']} cannot be imported: {machine.no_torch}", "mv .venv .venv-old, then make setup"  # fmt: skip
    torch = torch if machine.no_torch else ("torch is missing", "make setup")
    triton = True if have["triton"] else False if machine.system.startswith("Linux") else None
    no_triton = f"no triton on {machine.system}: kernels are shown, not run"
    compiler = "apt-get install g++ (macOS: xcode-select --install), or train with --no-compile"
    missing = [name for name in PACKAGES if have[name] is None and name not in ("torch", "triton")]
    return [
        verdict(
            new, python, f"{python} is too old", "install 3.11 or newer, then make setup PYTHON=…"
        ),
        verdict(have["torch"] is not None and not machine.no_torch, built, *torch),
        verdict(triton, f"triton {have['triton']}", no_triton, "make setup"),
        verdict(
            bool(machine.compiler), f"compiler {machine.compiler}", "no C++ compiler", compiler
        ),
        verdict(
            not missing, "the packages of the book", f"missing: {', '.join(missing)}", "make setup"
        ),
    ]


def hardware_findings(
    machine: Machine, disk_gb: float, shared_gb: float | None, silent: bool = False
) -> list[Finding]:
    """GPUs, free disk and shared memory (`shared_gb` is None where there is no /dev/shm). silent: a GPU that nvidia-smi does not list."""
    size = f"{machine.cores} cores, {machine.memory_gb:.0f} GB of memory"
    found = [Finding(None, f"{machine.system}, {size}")]
    for gpu in machine.gpus:
        what = f"{gpu.name}, {gpu.memory_gb:.0f} GB, sm {gpu.capability[0]}.{gpu.capability[1]}"
        found.append(Finding(True, f"GPU {gpu.index}: {what}, driver {gpu.driver}"))
    problem = gpu_problem(machine)
    if silent:
        fix = "call nvidia-smi, which says why; after an update of the driver, reboot"
        found.append(Finding(False, "there is /dev/nvidia0, but nvidia-smi lists no GPU", fix))
    elif not machine.gpus:
        found.append(
            Finding(None, "no NVIDIA GPU: kernels run through Triton's interpreter, small")
        )
    elif problem:
        found.append(Finding(False, problem.what, problem.fix))
    disk = f"{disk_gb:.0f} GB of free disk"
    found.append(
        verdict(disk_gb >= 5, disk, disk, "free 5 GB: 3 for the packages, the rest for data")
    )
    if shared_gb is not None and len(machine.gpus) > 1:
        shared = f"{shared_gb:.2f} GB of shared memory for the ranks"
        found.append(
            verdict(shared_gb >= 1, shared, shared, "docker run --ipc=host, or --shm-size=8g")
        )
    return found


CHAPTER_GB = 14.0  # a card of 16 GB has 15 and a bit, and other programs some of that


def usable_gpus(machine: Machine) -> tuple[GPU, ...]:
    """The GPUs that torch can use, of whatever size; none where it can use none of them."""
    usable = machine.device == "cuda" and gpu_problem(machine) is None
    return machine.gpus if usable else ()


def tier_findings(machine: Machine) -> list[Finding]:
    """What can be run here: C, whole chapters on the CPU; 1, on one GPU; N, several."""
    gpus = usable_gpus(machine)
    large = [gpu for gpu in gpus if gpu.memory_gb >= CHAPTER_GB]
    tiers = {
        "C: whole chapters on the CPU": bool(machine.versions["torch"]) and not machine.no_torch,
        f"1: one GPU with {CHAPTER_GB:.0f} GB": bool(large),
        "N: several GPUs": len(gpus) > 1,
    }
    return [
        Finding(can or None, f"tier {tier}: {'yes' if can else 'no'}")
        for tier, can in tiers.items()
    ]


def signs() -> list[str]:
    """The marks of a finding that is fine, a problem and good to know, and of a fix, as far as the console has them."""
    marks = "✓ ✗ · →"
    try:
        marks.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        marks = "ok NO -- ->"
    return marks.split()


def doctor(machine: Machine) -> int:
    """Print every finding, each problem with its fix; returns the number of problems."""
    shared = Path("/dev/shm")
    shared_gb = shutil.disk_usage(shared).total / 2**30 if shared.is_dir() else None
    silent = not machine.gpus and Path("/dev/nvidia0").exists()
    silent = silent and "CUDA_VISIBLE_DEVICES" not in os.environ
    found = hardware_findings(machine, shutil.disk_usage(".").free / 2**30, shared_gb, silent)
    found = software_findings(machine) + found + tier_findings(machine)
    fine, wrong, known, way_out = signs()
    for finding in found:
        print({True: fine, False: wrong, None: known}[finding.ok], finding.text)
        if finding.ok is False:
            print(f"  {way_out} {finding.fix}")
    return sum(finding.ok is False for finding in found)


if __name__ == "__main__" and __spec__ is not None:  # python -m, not a notebook
    sys.exit(run_main(lambda: min(doctor(detect_machine()), 1)))
