# Tangled from notebooks/00_start_here.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Errors with a way out
class Problem(Exception):
    """Something its reader can mend: what is wrong, with the name and the value, and the way out."""

    def __init__(self, what: str, fix: str):
        super().__init__(f"{what}\n  → {fix}")
        self.what, self.fix = what, fix


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
    if hasattr(
        os, "sysconf"
    ):  # everywhere but on Windows; the doctor must work where nothing is installed
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


def setup() -> Machine:
    """First call of every command and kernel chapter: without a GPU, makes Triton interpret its kernels."""
    machine, triton = look(), find_triton()
    if triton and machine.device == "cpu":
        triton.knobs.runtime.interpret = True
    return machine


# %% The doctor
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
    triton = True if have["triton"] else False if machine.system.startswith("Linux") else None
    no_triton = f"no triton on {machine.system}: kernels are shown, not run"
    compiler = "apt-get install g++ (macOS: xcode-select --install), or train with --no-compile"
    missing = [name for name in PACKAGES if have[name] is None and name not in ("torch", "triton")]
    return [
        verdict(
            new, python, f"{python} is too old", "install 3.11 or newer, then make setup PYTHON=…"
        ),
        verdict(have["torch"] is not None, built, "torch is missing", "make setup"),
        verdict(triton, f"triton {have['triton']}", no_triton, "make setup"),
        verdict(
            bool(machine.compiler), f"compiler {machine.compiler}", "no C++ compiler", compiler
        ),
        verdict(
            not missing, "the packages of the book", f"missing: {', '.join(missing)}", "make setup"
        ),
    ]


def hardware_findings(machine: Machine, disk_gb: float, shared_gb: float | None) -> list[Finding]:
    """GPUs, free disk and shared memory (`shared_gb` is None where there is no /dev/shm)."""
    size = f"{machine.cores} cores, {machine.memory_gb:.0f} GB of memory"
    found = [Finding(None, f"{machine.system}, {size}")]
    for gpu in machine.gpus:
        what = f"{gpu.name}, {gpu.memory_gb:.0f} GB, sm {gpu.capability[0]}.{gpu.capability[1]}"
        found.append(Finding(True, f"GPU {gpu.index}: {what}, driver {gpu.driver}"))
    if not machine.gpus:
        found.append(
            Finding(None, "no NVIDIA GPU: kernels run through Triton's interpreter, small")
        )
    elif not machine.cuda:
        fix = "pip install --force-reinstall torch, from the default index"
        found.append(Finding(False, "there is a GPU, but this torch was built for the CPU", fix))
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


def tier_findings(machine: Machine) -> list[Finding]:
    """What can be run here: C, whole chapters on the CPU; 1, one GPU; N, several."""
    usable = len(machine.gpus) if machine.device == "cuda" else 0
    tiers = {
        "C: whole chapters on the CPU": True,
        "1: one GPU": usable >= 1,
        "N: several GPUs": usable > 1,
    }
    return [
        Finding(can or None, f"tier {tier}: {'yes' if can else 'no'}")
        for tier, can in tiers.items()
    ]


def doctor(machine: Machine) -> int:
    """Print every finding, each problem with its fix; returns the number of problems."""
    shared = Path("/dev/shm")
    shared_gb = shutil.disk_usage(shared).total / 2**30 if shared.is_dir() else None
    found = hardware_findings(machine, shutil.disk_usage(".").free / 2**30, shared_gb)
    found = software_findings(machine) + found + tier_findings(machine)
    for finding in found:
        print({True: "✓", False: "✗", None: "·"}[finding.ok], finding.text)
        if finding.ok is False:
            print("  →", finding.fix)
    return sum(finding.ok is False for finding in found)


if __name__ == "__main__" and __spec__ is not None:  # python -m, not a notebook
    sys.exit(min(doctor(look()), 1))
