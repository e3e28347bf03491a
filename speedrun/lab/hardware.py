# Tangled from notebooks/00_start_here.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Errors with a way out
from speedrun.lab.errors import Problem


# %% Looking without touching
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

GPU_QUERY = "index,uuid,name,memory.total,driver_version,compute_cap"


@dataclass(frozen=True)
class GPU:
    """One NVIDIA GPU as its driver describes it.

    memory_gb: counted in 2**30 bytes. capability: (9, 0) for Hopper; (0, 0) where the driver does not say.
    """

    index: int
    uuid: str
    name: str
    memory_gb: float
    driver: str
    capability: tuple[int, int]


def parse_gpus(text: str) -> tuple[GPU, ...]:
    """GPUs from what `nvidia-smi --query-gpu=… --format=csv,noheader,nounits` prints; other lines are skipped."""
    gpus = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(GPU_QUERY.split(",")) or not cells[0].isdigit():
            continue
        index, uuid, name, memory, driver, capability = cells
        known = re.fullmatch(r"(\d+)\.(\d+)", capability)
        memory_gb = float(memory) / 1024 if re.fullmatch(r"[\d.]+", memory) else 0.0
        pair = (int(known[1]), int(known[2])) if known else (0, 0)
        gpus.append(GPU(int(index), uuid, name, memory_gb, driver, pair))
    return tuple(gpus)


def visible_gpus(gpus: tuple[GPU, ...], setting: str | None) -> tuple[GPU, ...]:
    """The GPUs that `CUDA_VISIBLE_DEVICES=setting` leaves, in its order; None (not set) leaves all."""
    if setting is None:
        return gpus
    chosen = []
    for entry in (part.strip() for part in setting.split(",")):
        match = [
            gpu for gpu in gpus if entry and (entry == str(gpu.index) or gpu.uuid.startswith(entry))
        ]
        if not match:
            break
        chosen.append(match[0])
    return tuple(chosen)


def find_gpus() -> tuple[GPU, ...]:
    """The NVIDIA GPUs that this process may use, found without touching CUDA. Empty without a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    command = [tool, f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return visible_gpus(parse_gpus(answer.stdout), os.environ.get("CUDA_VISIBLE_DEVICES"))


# %% The machine, in one value
PACKAGES = ("torch", "triton", "numpy", "tiktoken", "jupytext", "papermill", "nbconvert")


@dataclass(frozen=True)
class Machine:
    """What a process can use here.

    versions: package → version, or None. cuda: the CUDA that torch was built for, or None.
    """

    system: str
    python: str
    cores: int
    memory_gb: float
    gpus: tuple[GPU, ...]
    versions: dict[str, str | None]
    cuda: str | None
    compiler: str | None

    @property
    def device(self) -> str:
        """`cuda` where there is a GPU and a torch that can use it, else `cpu`."""
        return "cuda" if self.gpus and self.cuda else "cpu"


def version_of(package: str) -> str | None:
    """The installed version of a package, or None. Does not import it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def physical_memory_gb() -> float:
    """Memory of this machine, counted in 2**30 bytes."""
    # everywhere but on Windows; the doctor must work where nothing is installed
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    import psutil

    return psutil.virtual_memory().total / 2**30


def look() -> Machine:
    """Describe this machine. Starts no CUDA context and opens no connection."""
    versions = {package: version_of(package) for package in PACKAGES}
    cuda = importlib.import_module("torch.version").cuda if versions["torch"] else None
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
    compiler = next((path for name in compilers if name and (path := shutil.which(name))), None)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    system, python = f"{platform.system()} {platform.machine()}", platform.python_version()
    facts = (find_gpus(), versions, cuda, compiler)
    return Machine(system, python, cores, physical_memory_gb(), *facts)


# %% Kernels without a GPU
def find_triton():
    """The triton module, or None where it cannot be imported."""
    try:
        return importlib.import_module("triton")
    except ImportError:
        return None


class Unlaunchable:
    """What stands for a kernel where Triton is missing: defining it is fine, launching it says why not."""

    def __init__(self, kernel):
        self.__name__, self.__doc__ = kernel.__name__, kernel.__doc__

    def __getitem__(self, grid):
        where = f"{platform.system()}, Python {platform.python_version()}"
        fix = "pip install triton (Linux only), or call the plain reference beside the kernel"
        raise Problem(f"kernel {self.__name__} cannot be launched: no Triton on {where}", fix)


def jit(kernel):
    """`triton.jit`, or without Triton a stand-in whose launch says why."""
    triton = find_triton()
    return triton.jit(kernel) if triton else Unlaunchable(kernel)


def gpu_problem(machine: Machine) -> Problem | None:
    """Why the GPUs that are there cannot be used."""
    return None


def setup() -> Machine:
    """First call of every command and kernel chapter: without a GPU, makes Triton interpret its kernels."""
    machine, triton = look(), find_triton()
    if triton and machine.device == "cpu":
        triton.knobs.runtime.interpret = True
    return machine
