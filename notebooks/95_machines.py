# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   speedrun:
#     modules: [speedrun.lab.hardware, speedrun.lab.doctor, speedrun.lab.tier]
# ---

# %% [markdown]
# # Workshop: machines
#
# ```{admonition} Cost box
# Any machine, some seconds; what is said about GPUs is shown on machines that are made up, so there is nothing for a GPU to do. The faults that the doctor knows are such as people report: a PyTorch without CUDA, a driver that is too old, a container with
# too little shared memory.
# ```
#
# ## The problem
#
# A trainer that works only on the machine it was tuned for is of no use on yours, and neither is an error that says `AttributeError` or `AssertionError` when it means *you have no GPU*. Here is what a program hears that asks PyTorch for a GPU where none can be seen:

# %%
from speedrun.lab import tier as tangled  # the finished module; this page builds it again below

tier = tangled.choose_tier()

# %%
import os
import subprocess
import sys

ask = "import torch; torch.cuda.init()"
hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "-1"}
told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, env=hidden)
complaint = told.stderr.strip().splitlines()
assert told.returncode == 1 and complaint[0].startswith("Traceback")
print(f"{len(complaint)} lines, of which the last says: {complaint[-1]}")

# %% [markdown]
# It comes as a traceback, names no way out, and is one of the clearer ones. A driver that is older than PyTorch's CUDA gives a warning, and a GPU that is not used. In a container with 64 MB of shared memory eight processes may die of a bus error that names nothing.
#
# ```{admonition} Prediction
# A server has eight GPUs, numbered 0 to 7, and `nvidia-smi` lists all eight whatever you do. **How many of them can a program use if the environment variable `CUDA_VISIBLE_DEVICES` is** (a) not set, (b) empty, (c) `2,9,4`, (d) `1,1`? And how many if GPU 0 is cut into two slices for two users,
# GPU 1 is whole, and the variable is not set?
# ```
#
# ## The idea
#
# Three steps, kept apart. *Look* at the machine, without touching what others may be using. Put what was seen into one *value*, which can be printed, compared, and made up. Then *decide*, in functions of that value alone: whether PyTorch can use the GPU, what is missing and how to mend it, at which size a chapter computes. Only the first step
# needs the machine. The other two can be shown, and tested, on machines that nobody here owns.
#
# ## The code
#
# A decision that ends in *no* is a `UserError` ([errors and files](93_errors_and_files.py)): what is wrong, with the name and the value, and the way out.

# %%
#| default_exp lab.hardware
#| export
from speedrun.lab.errors import UserError

# %%
problem = UserError(
    "there is a GPU, but this torch was built for the CPU", "install the other torch"
)
assert problem.what in str(problem) and problem.fix in str(problem)
print(problem)

# %% [markdown]
# ### Detecting GPUs without initialising CUDA
#
# Asking PyTorch for GPUs has a side effect. It can initialise CUDA in the process that asks, which from then on cannot safely start copies of itself (*fork*), and holds a few hundred megabytes of a GPU. A notebook that *launches* training should hold nothing of the kind. The driver's own tool, `nvidia-smi`, answers without
# leaving a trace, so we ask it and parse what it prints.
#
# A tool that is asked can also be missing, fail, or hang: `nvidia-smi` waits for the driver, and a driver that hangs lets nobody kill its callers. So tools are called through one function, which does not wait for what it has given up.

# %%
#| export
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


# %%
import time

python = [sys.executable, "-c"]
assert run_tool([*python, "print('here')"], 60).strip() == "here"
assert run_tool(["no-such-tool"], 60) == run_tool([*python, "print('failed'); exit(9)"], 60) == ""
began = time.perf_counter()
assert run_tool([*python, "import time; time.sleep(30)"], 0.2) == ""
print(f"given up after {time.perf_counter() - began:.1f} s")


# %%
#| export
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


# %% [markdown]
# The parser is kept apart from the call, so that it can be shown machines we do not have:


# %%
#| export
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


# %% [markdown]
# An eight-GPU server; then a virtual machine whose driver does not report what its card can do, followed by a line of complaint:

# %%
row = "{i}, GPU-{i}f3c, NVIDIA H100 80GB HBM3, 81559, 580.65.06, 9.0, Disabled"
server = parse_gpus("\n".join(row.format(i=i) for i in range(8)))
shy = parse_gpus("0, GPU-a1, GRID A100, [N/A], 535.00, [N/A]\nFailed to initialize NVML")

assert len(server) == 8 and server[7].index == 7 and server[0].capability == (9, 0)
assert 79 < server[0].memory_gb < 80
assert len(shy) == 1 and shy[0].capability == (0, 0) and shy[0].memory_gb == 0
assert parse_gpus("NVIDIA-SMI has failed because it couldn't communicate with the driver.") == ()
print(server[0])

# %% [markdown]
# Big GPUs can be cut into slices (NVIDIA's term is *multi-instance GPU*, MIG), each with memory and processors of its own, for several users. The query above still describes the whole GPU, which nobody can use while it is cut. `nvidia-smi -L` lists the slices under it, with a profile such as `1g.10gb`: one of seven parts, 10 GB.


# %%
#| export
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


# %%
listing = """GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-9c73eb7b-8d6d-6c0e-dc13-97873e2ede40)
  MIG 3g.40gb     Device  0: (UUID: MIG-a686709d-6dc2-542a-8851-0d2508448c10)
  MIG 1g.10gb+me  Device  1: (UUID: MIG-53864714-0a66-5df2-9007-9268e30d9a72)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-c92e2d5d-4a69-f1cd-4df0-305f8606705a)
"""
cut_row = "0, GPU-9c73eb7b-8d6d-6c0e-dc13-97873e2ede40, NVIDIA A100-SXM4-80GB, 81920, 535.54.03, 8.0, Enabled"
two = parse_gpus(cut_row + "\n" + cut_row.replace("0, GPU-9c73eb7b-8d6d-6c0e-dc13-97873e2ede40", "1, GPU-c92e2d5d-4a69-f1cd-4df0-305f8606705a").replace("Enabled", "Disabled"))  # fmt: skip
cut = with_slices(two, listing)
assert [gpu.memory_gb for gpu in cut] == [40, 10, 80] and cut[1].uuid.startswith("MIG-5386")
assert with_slices(two[:1], "") == (), "in MIG mode, and not cut yet: nobody can use it"
print("\n".join(f"{gpu.name}: {gpu.memory_gb:.0f} GB" for gpu in cut))

# %% [markdown]
# `nvidia-smi` lists every GPU of the machine, whatever `CUDA_VISIBLE_DEVICES` says. On a shared server that variable is how colleagues keep out of each
# other's way, so we apply CUDA's reading of it. It is a list of numbers, or of UUIDs that may be abbreviated, in the order in which the GPUs will be counted. The list ends at the first entry that matches nothing, or more than one; an entry that comes twice makes it empty. And of all slices that a process may see, CUDA shows it the first alone, and no whole GPU beside
# it ([NVIDIA's MIG guide](https://docs.nvidia.com/datacenter/tesla/mig-user-guide/)).


# %%
#| export
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


# %%
assert visible_gpus(server, None) == server
assert visible_gpus(server, "") == visible_gpus(server, "-1") == ()
assert [gpu.index for gpu in visible_gpus(server, "GPU-3f,GPU-1f")] == [3, 1]
assert [gpu.index for gpu in visible_gpus(server, "2,9,4")] == [2], "9 matches nothing"
assert visible_gpus(server, "GPU-") == visible_gpus(server, "1,1") == ()
assert visible_gpus(cut, None) == visible_gpus(cut, "0") == cut[:1], "one slice a process"
assert visible_gpus(cut, "MIG-53864714") == cut[1:2] and visible_gpus(cut, "1") == cut[2:]
for setting in (None, "", "2,9,4", "1,1"):
    print(f"CUDA_VISIBLE_DEVICES {setting!r:8}: {len(visible_gpus(server, setting))} of 8 GPUs")
print("GPU 0 in two slices, GPU 1 whole, not set:", len(visible_gpus(cut, None)), "slice")


# %%
#| export
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


# %%
found = find_gpus()
assert not any(gpu.mig for gpu in found)
print("here:", ", ".join(gpu.name for gpu in found) or "no NVIDIA GPU")

# %% [markdown]
# ### The machine, in one value
#
# What the rest of the book needs to know fits in a dataclass. The number of cores is what this process may *use*, which in a container is fewer than
# the machine has; the compiler is what `torch.compile` calls on a CPU, and what Triton needs on a GPU.

# %%
#| export
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


# %% [markdown]
# A value like this can be made up, and that is its point: every decision on this page is a function of a `Machine`, and so can be tested on machines that nobody here owns.

# %%
nothing, everything = dict.fromkeys(PACKAGES), dict.fromkeys(PACKAGES, "1.0")
poor = Machine("Linux x86_64", "3.10.4", 2, 8.0, (), nothing, None, None)
mac = Machine(
    "Darwin arm64", "3.12.1", 8, 16.0, (), everything | {"triton": None}, None, "/usr/bin/clang++"
)
forgotten = Machine("Linux x86_64", "3.12.1", 64, 512.0, server, everything, None, "/usr/bin/g++")
assert [machine.device for machine in (poor, mac, forgotten)] == ["cpu"] * 3
print(f"{len(forgotten.gpus)} GPUs and a torch without CUDA: device {forgotten.device}")


# %%
#| export
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


# %%
#| export
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


# %%
machine = detect_machine()
assert machine.cores >= 1 and machine.memory_gb > 0.1 and machine.versions["torch"]
assert version_of("a-package-that-nobody-wrote") is None
print(
    f"{machine.system}, Python {machine.python}, {machine.cores} cores, {machine.memory_gb:.0f} GB"
)
print(f"torch {machine.versions['torch']} → {machine.device}")

# %% [markdown]
# ### A GPU that torch cannot use
#
# A GPU in the list is not yet one that trains. Torch may have been built without CUDA. Its CUDA may be newer than the driver, or too new for an old card. PyTorch says all that with a warning, or not before the first kernel. The drivers that each CUDA wants are in NVIDIA's [release notes](https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html); the
# driver's library is asked first, since a container may bring a newer one.


# %%
#| export lab.doctor
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


# %%
modern = Machine("Linux x86_64", "3.12.1", 64, 512.0, server, everything, "13.0", "/usr/bin/g++")
aged = replace(modern, gpus=(replace(server[0], driver="535.54.03"),))
assert numbers("580.65.06") == (580, 65, 6) > numbers("535.54.03")
assert gpu_problem(modern) is gpu_problem(mac) is gpu_problem(poor) is None
assert "built for the CPU" in str(gpu_problem(forgotten))
assert "535.54.03 is too old" in str(gpu_problem(aged)) and "whl/cu126" in str(gpu_problem(aged))
assert gpu_problem(replace(aged, cuda="12.8")) is None, "535 runs every CUDA 12"
assert gpu_problem(replace(aged, driver_cuda=13)) is None, "the library in this container is newer"
pascal = replace(server[0], name="Tesla P100", capability=(6, 0))
assert "P100 is too old" in str(gpu_problem(replace(modern, gpus=(pascal,))))
print(gpu_problem(aged))

# %% [markdown]
# ### Kernels without a GPU
#
# Some chapters write GPU kernels in Triton, a Python dialect that is compiled for the device. Triton also has an *interpreter* that runs a kernel on the
# CPU, thousands of times slower and good enough to show that it is right. The switch is read when a kernel is **defined**, which is too late to
# think of it once the kernels have been imported. So commands that compute, and kernel chapters, call `setup()`.
#
# On macOS and Windows there is no Triton at all, and a package that cannot be *imported* there is useless there. The decorator below is `triton.jit` where
# Triton exists. Where it does not, the kernel becomes an object that refuses to launch, and says why, at the moment somebody tries.


# %%
#| export
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


# %%
#| export
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


# %% [markdown]
# That a missing Triton refuses only at the launch can be shown on any machine. Blocking the import plays the Mac:

# %%
machine = setup()
had = sys.modules.get("triton")
sys.modules["triton"] = None  # Python's own way to say "cannot be imported"


def twice(pointer):
    """Doubles what the pointer points at."""


try:
    kernel = jit(twice)
    assert kernel.__name__ == "twice" and "Doubles" in kernel.__doc__
    kernel[(1,)](None)
    raise AssertionError("launched without Triton")
except UserError as problem:
    print(problem)
finally:
    sys.modules.pop("triton")
    sys.modules.update({"triton": had} if had else {})

# %% [markdown]
# ### The doctor
#
# `make doctor` prints what follows: one line a finding, and for each problem its fix. It can only know problems that somebody has met. Those below
# are ones that people report: a PyTorch without CUDA beside a perfectly good GPU, a driver that was updated and does not answer until the next start, a missing compiler, and a
# container with 64 MB of shared memory, in which eight *ranks* (one process per GPU) die of a bus error that names nothing.


# %%
#| default_exp lab.doctor
#| export
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


# %%
assert verdict(True, "fine", "broken", "mend it") == Finding(True, "fine")
assert verdict(False, "fine", "broken", "mend it").fix == "mend it"


# %% tags=["hide-input"]
#| export
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


# %% [markdown]
# The machine on which everything is wrong, a Mac, which has no Triton, and a torch that was moved:

# %%
assert [finding.ok for finding in software_findings(poor)] == [False] * 5
assert all(finding.fix for finding in software_findings(poor)), "each problem comes with its fix"
assert [finding.ok for finding in software_findings(mac)] == [True, True, None, True, True]
moved = replace(mac, no_torch="libcudart.so.13: cannot open shared object file")
assert "cannot be imported: libcudart" in software_findings(moved)[1].text
print(software_findings(mac)[2].text)


# %% tags=["hide-input"]
#| export
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


# %%
problems = [f for f in hardware_findings(forgotten, disk_gb=2.0, shared_gb=0.064) if f.ok is False]
assert len(problems) == 3 and all(finding.fix for finding in problems)
assert not any(finding.ok is False for finding in hardware_findings(mac, 100.0, None))
assert "reboot" in hardware_findings(mac, 100.0, None, silent=True)[1].fix
for finding in problems:
    print(f"✗ {finding.text}\n  → {finding.fix}")

# %% [markdown]
# And yours; or rather, that of the machine which made this page:


# %% tags=["hide-input"]
#| export
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

# %%
import io

with contextlib.redirect_stdout(io.StringIO()) as told:
    problems_found = doctor(forgotten)
assert problems_found >= 1 and "this torch was built for the CPU" in told.getvalue()
doctor(machine)
assert [finding.ok for finding in tier_findings(forgotten)] == [True, None, None]
assert [finding.ok for finding in tier_findings(poor)] == [None] * 3
assert [finding.ok for finding in tier_findings(aged)] == [True, None, None]
assert [finding.ok for finding in tier_findings(modern)] == [True] * 3

# %% [markdown]
# ### The tier of a chapter
#
# Which of these tiers a chapter runs at is decided once, in its first cell, and shapes are taken from the answer: `tier.pick(cpu=128, gpu=768)`. Later cells seldom ask again. The environment variable `TIER` overrules the machine: `TIER=C make lab` keeps to the CPU, `TIER=1` takes a GPU that is smaller than the chapters were measured on.
#
# “Keeps to the CPU” has to include whatever a chapter starts, such as a training run that takes a GPU where it finds one. So the GPUs are hidden from the process and its children, by `CUDA_VISIBLE_DEVICES`; of several GPUs, tier 1 leaves one to be seen. CUDA reads that variable once, when it is initialised; after that, going back to the CPU comes too late and is refused.


# %%
#| default_exp lab.tier
#| export
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


# %%
#| export
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


# %%
#| export
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


# %%
laptop_gpu = replace(server[0], name="RTX 4060 Laptop", memory_gb=8.0, index=1)
two_cards = replace(modern, gpus=(laptop_gpu, server[0]))
small_card = replace(modern, gpus=(laptop_gpu,))
assert tier_of(modern, "").name == "1" and tier_of(modern, "C") == tier_of(mac, "") == Tier()
assert tier_of(two_cards, "").gpu == server[0], "the first that is large enough"
assert tier_of(small_card, "") == Tier() and tier_of(small_card, "1").gpu == laptop_gpu
assert [tier_of(each, "").pick(cpu=128, gpu=768) for each in (mac, modern)] == [128, 768]
for on, asked in ((mac, "1"), (aged, "1"), (modern, "gpu")):
    try:
        tier_of(on, asked)
        raise AssertionError("accepted")
    except UserError as problem:
        print(problem)
for each in (modern, small_card, aged, mac):
    print(f"tier {tier_of(each, '').name} ({reason(tier_of(each, ''), each, '')})")

# %% [markdown]
# ## What it costs, and when it fails
#
# The first line of every chapter looks at the machine, and so does a training command:

# %%
began = time.perf_counter()
again = detect_machine()
looked_s = time.perf_counter() - began
assert again == machine, "looking changes nothing"
print(f"looking at this machine: {1000 * looked_s:.0f} ms")

# %% [markdown]
# Eight GPUs that sleep take ten seconds, since the driver has to wake each of them, unless it is kept awake (NVIDIA's *persistence mode*).
#
# - **Only NVIDIA's GPUs are looked for.** On a Mac, or with an AMD card, the book computes on the CPU, and says so.
# - **A number in `CUDA_VISIBLE_DEVICES` is taken as `nvidia-smi` counts**, by slots. CUDA by default puts the fastest card first, so in a machine with different cards a number may mean another one to it. Where the tier leaves one of several GPUs it names it by UUID, which means the same to both.
# - **A GPU that is listed may be busy.** How much of its memory others have taken is not looked at (`memory.used` would say, but what is free now may not be free in a minute); the run finds out.
# - **The doctor knows what somebody has met.** Where it finds nothing and something is wrong all the same, what it printed is the first thing to put into a report.
#
# ## Exercises
#
# Colleagues share a server whose GPUs differ. Write `setting_for(gpus, need_gb)`: the value of `CUDA_VISIBLE_DEVICES` for a program that needs `need_gb` of memory on one GPU. It names the smallest GPU, or slice, that has so much, in a way that cannot mean another one; where none has, it hides all of them.
# (A number stands for the first slice of a GPU. An empty variable does not exist on Windows.)


# %% tags=["solution"]
def setting_for(gpus: tuple[GPU, ...], need_gb: float) -> str:
    """CUDA_VISIBLE_DEVICES that leaves the smallest GPU with `need_gb`, by its UUID; "-1" where none has so much."""
    enough = [gpu for gpu in gpus if gpu.memory_gb >= need_gb]
    return min(enough, key=lambda gpu: gpu.memory_gb).uuid if enough else "-1"


# %%
mixed = (laptop_gpu, *cut)  # 8 GB; slices of 40 and 10 GB; and 80 GB
for need_gb, right in ((6, 8), (9, 10), (10, 10), (41, 80)):
    setting = setting_for(mixed, need_gb)
    left = [gpu.memory_gb for gpu in visible_gpus(mixed, setting)]
    assert left == [right], (
        f"of 8, 40, 10 and 80 GB, {need_gb} GB are to leave the GPU with {right}, but {setting!r} leaves {left}"
    )
none_fits = setting_for(mixed, 81)
assert none_fits == "-1", f"where no GPU has enough, all are hidden by -1 and not by {none_fits!r}"
print("for 9 GB:", setting_for(mixed, 9))
