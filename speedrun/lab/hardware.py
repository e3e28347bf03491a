# Tangled from notebooks/95_machines.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The code
from speedrun.lab.errors import UserError


# %% Detecting GPUs without initialising CUDA
import contextlib
import ctypes
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, replace


def run_tool(command: list[str], timeout_s: float, fine: tuple[int, ...] = (0,)) -> str:
    """What a command prints; nothing if it is not there, ends with another status, or takes longer."""
    none, pipe = subprocess.DEVNULL, subprocess.PIPE
    try:
        process = subprocess.Popen(command, stdin=none, stdout=pipe, stderr=none)
    except OSError:
        return ""
    try:
        text = process.communicate(timeout=timeout_s)[0]
    except subprocess.TimeoutExpired:
        process.kill()  # and no wait: what hangs in a driver cannot be killed
        return ""
    return text.decode(errors="replace") if process.returncode in fine else ""


GPU_QUERY = "index,uuid,name,memory.total,driver_version"
NEWER = "compute_cap,mig.mode.current"  # for an unknown field, older drivers refuse the whole query


@dataclass(frozen=True)
class GPU:
    """One NVIDIA GPU, or one slice of one, as its driver describes it.

    memory_gb: counted in 2**30 bytes. capability: (9, 0) for Hopper; (0, 0) where the driver does not say.
    mig: it is cut into slices, which are used in its place.
    """

    index: int
    uuid: str
    name: str
    memory_gb: float
    driver: str
    capability: tuple[int, int]
    mig: bool = False


def parse_gpus(text: str) -> tuple[GPU, ...]:
    """GPUs from what `nvidia-smi --query-gpu=… --format=csv,noheader,nounits` prints; other lines are skipped."""
    gpus = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if not 5 <= len(cells) <= 7 or not cells[0].isdecimal():
            continue
        index, uuid, name, memory, driver, capability, mig = (*cells, "", "")[:7]
        known = re.fullmatch(r"(\d+)\.(\d+)", capability)
        memory_gb = float(memory) / 1024 if re.fullmatch(r"\d+(\.\d+)?", memory) else 0.0
        pair = (int(known[1]), int(known[2])) if known else (0, 0)
        gpus.append(GPU(int(index), uuid, name, memory_gb, driver, pair, mig == "Enabled"))
    return tuple(gpus)


def with_slices(gpus: tuple[GPU, ...], listing: str) -> tuple[GPU, ...]:
    """The GPUs, with the slices that `nvidia-smi -L` lists in place of those that are cut. memory_gb of a slice: by its profile's name."""
    slices: dict[str, list[GPU]] = {gpu.uuid: [] for gpu in gpus}
    whole = {gpu.uuid: gpu for gpu in gpus}
    parent = None
    for line in listing.splitlines():
        uuid = re.search(r"\(UUID: ([^)]+)\)", line)
        profile = re.match(r"\s+MIG (\S*?(\d+)gb\S*)\s", line)
        if uuid and line.startswith("GPU "):
            parent = whole.get(uuid[1])
        elif uuid and profile and parent:
            name, size = f"{parent.name} MIG {profile[1]}", float(profile[2])
            part = replace(parent, uuid=uuid[1], name=name, memory_gb=size, mig=False)
            slices[parent.uuid].append(part)
    kept = (slices[gpu.uuid] or ([] if gpu.mig else [gpu]) for gpu in gpus)
    return tuple(gpu for some in kept for gpu in some)


def asked_for(setting: str) -> list[str]:
    """The entries that CUDA takes from `CUDA_VISIBLE_DEVICES`: UUIDs or numbers, as the first one is; none at all if one comes twice."""
    kind, taken = re.match("GPU-|MIG-", setting), []
    for part in setting.split(","):
        number = re.match(r"\s*\+?(\d+)", part)
        if kind and part.startswith(kind[0]):
            entry = part
        elif number and not kind:
            entry = str(int(number[1]))
        else:
            break
        if entry in taken:
            return []
        taken.append(entry)
    return taken


def visible_gpus(gpus: tuple[GPU, ...], setting: str | None) -> tuple[GPU, ...]:
    """The GPUs that `CUDA_VISIBLE_DEVICES=setting` leaves, in its order; None (not set) leaves all; of slices one."""
    chosen = list(gpus) if setting is None else []
    for entry in asked_for(setting or ""):
        match = [gpu for gpu in gpus if gpu.uuid.startswith(entry) or str(gpu.index) == entry]
        match = match[:1] if entry.isdecimal() else match  # a number stands for the first slice
        if len(match) != 1:
            break
        if match[0] in chosen:
            return ()
        chosen += match
    slices = [gpu for gpu in chosen if gpu.uuid.startswith("MIG-")]
    return tuple(slices[:1] or chosen)


SMI_TIMEOUT_S = 30  # eight GPUs that sleep take ten


def find_gpus() -> tuple[GPU, ...]:
    """The NVIDIA GPUs that this process may use, found without touching CUDA. Empty without a driver that answers."""
    tool = shutil.which("nvidia-smi") or "/usr/lib/wsl/lib/nvidia-smi"
    fine = (0, 14)  # 14: the card's memory of what it is has been damaged, and the card works
    gpus: tuple[GPU, ...] = ()
    for fields in (f"{GPU_QUERY},{NEWER}", GPU_QUERY):
        command = [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        gpus = gpus or parse_gpus(run_tool(command, SMI_TIMEOUT_S, fine))
    if any(gpu.mig or gpu.capability == (0, 0) for gpu in gpus):
        gpus = with_slices(gpus, run_tool([tool, "-L"], SMI_TIMEOUT_S, fine))
    return visible_gpus(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))


# %% The machine, in one value
PACKAGES = ("torch", "triton", "numpy", "tiktoken", "jupytext", "papermill", "nbconvert")


@dataclass(frozen=True)
class Machine:
    """What a process can use here.

    versions: package → version, or None. cuda: the CUDA that torch was built for, or None.
    driver_cuda: the newest CUDA that the driver's library runs, its first number; 0 if not known.
    no_torch: why torch cannot be imported though it is installed.
    """

    system: str
    python: str
    cores: int
    memory_gb: float
    gpus: tuple[GPU, ...]
    versions: dict[str, str | None]
    cuda: str | None
    compiler: str | None
    driver_cuda: int = 0
    no_torch: str = ""

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


def torch_cuda() -> tuple[str | None, str]:
    """The CUDA that torch was built for, or None; and why torch cannot be imported, if it cannot."""
    try:
        return importlib.import_module("torch.version").cuda, ""
    except (ImportError, OSError) as error:  # OSError: one of its libraries is missing, or broken
        return None, str(error).splitlines()[0]


def driver_cuda() -> int:
    """The newest CUDA that the driver's library runs, its first number; 0 without one. Asks before anything is initialised."""
    version, windows = ctypes.c_int(), platform.system() == "Windows"
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("nvcuda.dll" if windows else "libcuda.so.1")
        library.cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000


def detect_machine() -> Machine:
    """Describe this machine. Starts no CUDA context and opens no connection."""
    versions = {package: version_of(package) for package in PACKAGES}
    cuda, no_torch = torch_cuda() if versions["torch"] else (None, "")
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
    compiler = next((path for name in compilers if name and (path := shutil.which(name))), None)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    system, python = f"{platform.system()} {platform.machine()}", platform.python_version()
    gpus = find_gpus()
    facts = (gpus, versions, cuda, compiler, driver_cuda() if gpus else 0, no_torch)
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
        raise UserError(f"kernel {self.__name__} cannot be launched: no Triton on {where}", fix)


def jit(kernel):
    """`triton.jit`, or without Triton a stand-in whose launch says why."""
    triton = find_triton()
    return triton.jit(kernel) if triton else Unlaunchable(kernel)


def setup() -> Machine:
    """First call of every command and kernel chapter: without a GPU, makes Triton interpret its kernels."""
    machine = detect_machine()
    if machine.device == "cpu":
        os.environ["TRITON_INTERPRET"] = (
            "1"  # read where Triton's own functions are made: at its import
        )
        if triton := find_triton():
            triton.knobs.runtime.interpret = True
    return machine
