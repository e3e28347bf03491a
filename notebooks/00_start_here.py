# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   kernelspec:
#     name: python3
#     display_name: Python 3
#     language: python
# ---

# %% [markdown]
# # Start here: forty-five minutes, then seventy-four seconds
#
# ```{admonition} Cost box
# Any machine: a few seconds, no GPU, no download. This page leans on all 89 records of the NanoGPT speedrun; the
# [credits](../book/credits.md) name everyone who set one.
# ```
#
# ## The problem
#
# In May 2024 a well-tuned C program trained a 124-million-parameter GPT-2 to a validation loss of 3.28 in **45 minutes** on eight H100s. In July
# 2026 the same machine reaches the same loss in **73.8 seconds**. Nothing was bought in between. The hardware is the same, the text is the same, the
# target is the same; what changed is that some eighty people had some ninety ideas, each small enough to explain over lunch.
#
# You would like to understand them. So you open the trainer that holds the record, and meet five thousand lines in which every line is the residue
# of an argument somebody won, and none of the arguments are written down.
#
# This book is the arguments. Each chapter takes one idea, asks what it should buy, builds it in the fewest lines that work, and measures. The lines
# are then collected, mechanically, into a trainer; the code you read is the code that runs.

# %% [markdown]
# ## The game
#
# The contest was started by Keller Jordan and is played in the open, in the repository
# [modded-nanogpt](https://github.com/KellerJordan/modded-nanogpt). Its rules fit in a paragraph. Train on the FineWeb tokens, in the given order,
# until the mean cross-entropy over the first 10,485,760 validation tokens is at most **3.28 nats**. Use eight H100s. The clock runs while the model
# trains and stops while it is validated; compiling and warming up happen before it starts. A record must be faster than the last one *on the same
# machine*, must show over several runs that the mean loss is below 3.28 at $p < 0.01$, and may not touch the tokens. Everything else is allowed:
# another architecture, another optimizer, another number format, hand-written kernels.
#
# Why 3.28? It is what GPT-2 itself scores on this text. And why is it a good game? Because the score is a *time*, every trade must pay in the one
# currency. An idea that learns 2% more from each token but slows each step by 3% is worth nothing, and the clock says so.
#
# Here is everything that happened. Before you scroll to the figure, decide what you expect.

# %% [markdown]
# ```{admonition} Prediction
# The record fell by a factor of about 37 in 89 steps. If each step had helped equally, each would have cut the time by
# $1 - 37^{-1/88} \approx 4\%$. It was not like that. **Write down your guess: how many of the 88 improvements make up half of the progress?**
# And a second one: while the time fell by 37, by what factor did the *program* grow?
# ```
#
# Progress has to be measured so that shares add up. A step from 10 minutes to 5 and a step from 2 minutes to 1 are the same feat, so the natural
# unit is the logarithm of the ratio. With $t_i$ the time of record $i$, the gains $\ln(t_{i-1}/t_i)$ sum to $\ln(t_1/t_{89})$ exactly:

# %%
import math
from datetime import date

from speedrun.lab.results import figure_style, public_table

rows = public_table("records")
ladder = [row for row in rows if not row["note"].startswith("retiming")]  # record 21 was timed three times; its first time stands here
seconds = [float(row["record_time_s"]) for row in ladder]
days = [date.fromisoformat(row["date"]) for row in ladder]
gains = [math.log(before / after) for before, after in zip(seconds, seconds[1:])]

assert len(ladder) == 89 and seconds[0] == 45 * 60
assert math.isclose(sum(gains), math.log(seconds[0] / seconds[-1]))
print(f"{seconds[0]:.0f} s → {seconds[-1]:.1f} s: a factor of {seconds[0] / seconds[-1]:.1f} in {(days[-1] - days[0]).days} days")

# %% [markdown]
# Sort the gains, add them up from the largest, and stop at half:

# %%
order = sorted(range(len(gains)), key=lambda i: -gains[i])
half, running = [], 0.0
while running < sum(gains) / 2:
    half.append(order[len(half)])
    running += gains[half[-1]]
slower = [ladder[i + 1]["record"] for i, gain in enumerate(gains) if gain < 0]

assert len(half) < 10, "half of the progress is in single digits of steps"
for i in sorted(half):
    row = ladder[i + 1]
    print(f"record {row['record']:>2}  {seconds[i]:6.0f} → {seconds[i + 1]:6.1f} s  {gains[i] / sum(gains):5.1%}  {row['description']}")
print(f"these {len(half)} of {len(gains)} steps are half of the progress; the other half took {len(gains) - len(half)}")

# %% [markdown]
# All of the big ones are early, and most of them are not engineering. Rotary positions, Muon, a squared ReLU, a shortcut for the values, attention
# over documents: the first half of the ladder is *learning more from each token*. The second half is a long grind of one and two percent, and
# that is where the kernels, the number formats and the schedules live. The figure shows both halves, and their price.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Record time on a logarithmic axis against date, with the lines of code of each record below"}}
import matplotlib.pyplot as plt

figure_style()
lines = [(day, int(row["code_lines"])) for day, row in zip(days, ladder) if row["code_lines"]]
first, last = lines[0][1], lines[-1][1]
fig, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5.6), sharex=True, height_ratios=[2.2, 1])
top.step(days, seconds, where="post", color="C0")
top.plot(days, seconds, "o", ms=3.5, color="C0")
top.plot([days[i + 1] for i in half], [seconds[i + 1] for i in half], "o", ms=7, mfc="none", color="C1", label=f"{len(half)} steps, half of the progress")
top.set_yscale("log")
top.set_yticks([60, 120, 300, 600, 1200, 2700], ["1 min", "2 min", "5 min", "10 min", "20 min", "45 min"])
top.minorticks_off()
top.set_ylabel("time to 3.28")
top.legend(loc="upper right")
top.set_title(f"{seconds[0] / seconds[-1]:.0f}× faster in {(days[-1] - days[0]).days / 365.25:.1f} years, for {last / first:.1f}× the code")
bottom.plot(*zip(*lines), "o-", ms=3, lw=1, color="C2")
bottom.set_ylim(0)
bottom.set_ylabel("lines of code")
fig.autofmt_xdate()
plt.show()

# %% [markdown]
# *Source: the public record logs and README of modded-nanogpt as of August 2026, carried over in `book/data/records.csv`. Code lines are counted in
# the program that each record's log embeds; logs of branches that were merged later differ a little from the code that holds the record.*
#
# The lower curve is the reason for this book. The five hundred lines that were one evening's reading in January 2025 are three thousand today, five with the kernels, and the
# ideas in them have not become harder, only unlabelled.
#
# ## Your machine
#
# You do not need eight H100s. Every chapter runs on a laptop CPU in under a minute, on real text, with the same code at smaller shapes; on one GPU it
# runs at shapes where the timings mean something; and the last chapters run the whole trainer on whatever you have.
#
# | you have | you can | command |
# | --- | --- | --- |
# | nothing to install | read, with every output on the page | |
# | a CPU | run each chapter; train a small GPT in about five minutes | `make speedrun` |
# | one NVIDIA GPU | the same on GPT-2's tokens, in minutes; every kernel | `make speedrun` |
# | several | the record's recipe | `make speedrun` |
#
# It is the same command on purpose. A trainer that works only on the machine it was tuned for is the most common complaint about speedruns, and
# the second most common is an error that says `AttributeError` when it means *you have no GPU*. So the first code that we write is neither model nor
# optimizer. It is the part that looks at a machine and says what it sees.
#
# ### Errors with a way out
#
# A message that only says what went wrong leaves the reader where the program stopped. Throughout this book an error that somebody can mend
# is a `Problem`: what is wrong, with the name and the value, and the way out.

# %%
#| default_exp lab.hardware
#| export
class Problem(Exception):
    """Something its reader can mend: what is wrong, with the name and the value, and the way out."""

    def __init__(self, what: str, fix: str):
        super().__init__(f"{what}\n  → {fix}")
        self.what, self.fix = what, fix


# %% [markdown]
# Commands catch exactly this class and print it without a traceback; anything else is a bug of ours, and keeps its traceback.

# %%
try:
    raise Problem("data/fineweb holds no manifest.json", "python -m speedrun.data manifest data/fineweb")
except Problem as problem:
    assert problem.fix in str(problem) and problem.what in str(problem)
    print(problem)

# %% [markdown]
# ### Looking without touching
#
# Asking PyTorch for GPUs has a side effect: the process that asks may end up holding a CUDA context, some hundreds of megabytes on each device, and
# can no longer safely fork. A notebook that *launches* training should hold nothing of the kind. The driver's own tool, `nvidia-smi`, answers without
# leaving a trace, so we ask it and parse what it prints.

# %%
#| export
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
    """One NVIDIA GPU as its driver describes it. `memory_gb` counts 2**30 bytes; `capability` is (9, 0) for Hopper."""

    index: int
    uuid: str
    name: str
    memory_gb: float
    driver: str
    capability: tuple[int, int]


# %% [markdown]
# The parser is kept apart from the call, so that it can be shown machines we do not have:

# %%
#| export
def parse_gpus(text: str) -> tuple[GPU, ...]:
    """GPUs from what `nvidia-smi --query-gpu=… --format=csv,noheader,nounits` prints; lines that are no GPU are skipped."""
    gpus = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(GPU_QUERY.split(",")) or not cells[0].isdigit():
            continue
        index, uuid, name, memory, driver, capability = cells
        known = re.fullmatch(r"(\d+)\.(\d+)", capability)
        memory_gb = float(memory) / 1024 if re.fullmatch(r"[\d.]+", memory) else 0.0
        gpus.append(GPU(int(index), uuid, name, memory_gb, driver, (int(known[1]), int(known[2])) if known else (0, 0)))
    return tuple(gpus)


# %% [markdown]
# An eight-GPU server, then a virtual machine whose driver declines to say what its card can do, followed by a line of complaint:

# %%
server = parse_gpus("\n".join(f"{i}, GPU-{i}f3c, NVIDIA H100 80GB HBM3, 81559, 580.65.06, 9.0" for i in range(8)))
shy = parse_gpus("0, GPU-a1, GRID A100, [N/A], 535.00, [N/A]\nFailed to initialize NVML: Driver/library version mismatch")

assert len(server) == 8 and server[7].index == 7 and server[0].capability == (9, 0) and 79 < server[0].memory_gb < 80
assert len(shy) == 1 and shy[0].capability == (0, 0) and shy[0].memory_gb == 0
print(server[0])

# %% [markdown]
# `nvidia-smi` lists every GPU of the machine, whatever `CUDA_VISIBLE_DEVICES` says. On a shared server that variable is how colleagues keep out of each
# other's way, so we apply CUDA's reading of it: a list of numbers or UUID prefixes, in that order, which ends at the first entry that matches nothing.

# %%
#| export
def visible_gpus(gpus: tuple[GPU, ...], setting: str | None) -> tuple[GPU, ...]:
    """The GPUs that `CUDA_VISIBLE_DEVICES=setting` leaves, in its order; None (not set) leaves all."""
    if setting is None:
        return gpus
    chosen = []
    for entry in setting.split(","):
        match = [gpu for gpu in gpus if entry.strip() and (entry.strip() == str(gpu.index) or gpu.uuid.startswith(entry.strip()))]
        if not match:
            break
        chosen.append(match[0])
    return tuple(chosen)


def find_gpus() -> tuple[GPU, ...]:
    """The NVIDIA GPUs that this process may use, found without touching CUDA. Empty where there is no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    command = [tool, f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return visible_gpus(parse_gpus(answer.stdout), os.environ.get("CUDA_VISIBLE_DEVICES"))


# %%
assert visible_gpus(server, None) == server and visible_gpus(server, "") == () and visible_gpus(server, "-1") == ()
assert [gpu.index for gpu in visible_gpus(server, "3, GPU-1f")] == [3, 1]
assert [gpu.index for gpu in visible_gpus(server, "2,9,4")] == [2], "CUDA stops at the first entry that matches nothing"
print("here:", ", ".join(gpu.name for gpu in find_gpus()) or "no NVIDIA GPU")

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
    """What a process can use here. `versions` maps package → version or None; `cuda` is what the torch build was made for, or None."""

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


# %%
#| export
def version_of(package: str) -> str | None:
    """The installed version of a package, or None. Does not import it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def look() -> Machine:
    """Describe this machine. Starts no CUDA context and opens no connection."""
    import psutil

    versions = {package: version_of(package) for package in PACKAGES}
    cuda = importlib.import_module("torch.version").cuda if versions["torch"] else None
    names = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
    compiler = next((path for name in names if name and (path := shutil.which(name))), None)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_gb = psutil.virtual_memory().total / 2**30
    system = f"{platform.system()} {platform.machine()}"
    return Machine(system, platform.python_version(), cores, memory_gb, find_gpus(), versions, cuda, compiler)


# %%
machine = look()
assert machine.cores >= 1 and machine.memory_gb > 0.1 and machine.versions["torch"]
assert version_of("a-package-that-nobody-wrote") is None
print(f"{machine.system}, Python {machine.python}, {machine.cores} cores, {machine.memory_gb:.0f} GB, torch {machine.versions['torch']} → {machine.device}")

# %% [markdown]
# ### Kernels without a GPU
#
# Later chapters write GPU kernels in Triton, a Python dialect that is compiled for the device. Triton also has an *interpreter* that runs a kernel on the
# CPU, thousands of times slower and good enough to show that it is right. The switch is read when a kernel is **defined**, which is too late to
# think of it once the kernels have been imported. So every command and every kernel chapter begins with `setup()`.
#
# On macOS and Windows there is no Triton at all, and a package that cannot be *imported* there is useless there. The decorator below is `triton.jit` where Triton
# exists. Where it does not, the kernel becomes an object that refuses to launch, and says why, at the moment somebody tries.

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
        raise Problem(
            f"the kernel {self.__name__} cannot be launched: Triton cannot be imported on {platform.system()}, Python {platform.python_version()}",
            "pip install triton (Linux only); elsewhere call the plain reference that stands beside the kernel",
        )


def jit(kernel):
    """`triton.jit`, or without Triton a stand-in whose launch says why."""
    triton = find_triton()
    return triton.jit(kernel) if triton else Unlaunchable(kernel)


def setup() -> Machine:
    """First call of every command and kernel chapter: looks at the machine, and without a GPU makes Triton interpret."""
    machine, triton = look(), find_triton()
    if triton and machine.device == "cpu":
        triton.knobs.runtime.interpret = True
    return machine


# %% [markdown]
# Both promises can be kept on any machine. Blocking the import plays the Mac, and a kernel that doubles a vector plays itself:

# %%
import torch

machine = setup()
blocked = sys.modules.copy()
sys.modules["triton"] = None  # Python's own way to say "cannot be imported"
try:
    refuses = jit(lambda pointer: pointer)
    try:
        refuses[(1,)](None)
    except Problem as problem:
        assert "Triton cannot be imported" in problem.what and "plain reference" in problem.fix
        print(problem)
finally:
    del sys.modules["triton"]
    sys.modules.update({name: module for name, module in blocked.items() if name == "triton"})

# %% [markdown]
# ### The doctor
#
# `make doctor` prints what follows: one line a finding, and for each problem its fix. It can only know problems that somebody has met. Those below
# are the ones people report on the contest's own tracker: a PyTorch without CUDA beside a perfectly good GPU, a missing compiler, and a
# container with 64 MB of shared memory, in which eight ranks die of a bus error that names nothing.

# %%
#| export
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
#| export
def software_findings(machine: Machine) -> list[Finding]:
    """Python, torch, Triton, a compiler, and the packages of the book."""
    have, linux = machine.versions, machine.system.startswith("Linux")
    new = tuple(int(part) for part in machine.python.split(".")[:2]) >= (3, 11)
    python = f"Python {machine.python}"
    built = f"torch {have['torch']}, built for {'CUDA ' + machine.cuda if machine.cuda else 'the CPU'}"
    no_triton = f"no triton on {machine.system}: kernels are shown, not run"
    missing = [name for name in PACKAGES if have[name] is None and name not in ("torch", "triton")]
    return [
        verdict(new, python, f"{python} is too old", "install Python 3.11 or newer, then make setup PYTHON=…"),
        verdict(have["torch"] is not None, built, "torch is missing", "make setup"),
        verdict(True if have["triton"] else False if linux else None, f"triton {have['triton']}", no_triton, "make setup"),
        verdict(bool(machine.compiler), f"compiler {machine.compiler}", "no C++ compiler: torch.compile cannot work",
                "apt-get install g++ (macOS: xcode-select --install), or train with --no-compile"),
        verdict(not missing, "the packages of the book", f"missing: {', '.join(missing)}", "make setup"),
    ]  # fmt: skip


# %% [markdown]
# A machine on which everything is wrong, and a Mac, which is not wrong but a Mac:

# %%
nothing = dict.fromkeys(PACKAGES)
poor = Machine("Linux x86_64", "3.10.4", 2, 8.0, (), nothing, None, None)
assert [finding.ok for finding in software_findings(poor)] == [False] * 5
assert all(finding.fix for finding in software_findings(poor)), "each problem comes with its fix"

everything = dict.fromkeys(PACKAGES, "1.0")
mac = Machine("Darwin arm64", "3.12.1", 8, 16.0, (), everything | {"triton": None}, None, "/usr/bin/clang++")
assert [finding.ok for finding in software_findings(mac)] == [True, True, None, True, True]

# %%
#| export
def hardware_findings(machine: Machine, disk_gb: float, shared_gb: float | None) -> list[Finding]:
    """GPUs, free disk and shared memory (`shared_gb` is None where there is no /dev/shm)."""
    found = [Finding(None, f"{machine.system}, {machine.cores} cores, {machine.memory_gb:.0f} GB of memory")]
    for gpu in machine.gpus:
        capability = ".".join(str(part) for part in gpu.capability)
        found.append(Finding(True, f"GPU {gpu.index}: {gpu.name}, {gpu.memory_gb:.0f} GB, sm {capability}, driver {gpu.driver}"))
    if not machine.gpus:
        found.append(Finding(None, "no NVIDIA GPU: chapters run small, kernels through Triton's interpreter"))
    elif not machine.cuda:
        found.append(Finding(False, "there is a GPU, but this torch was built for the CPU",
                             "pip install --force-reinstall torch, from the default index"))  # fmt: skip
    disk = f"{disk_gb:.0f} GB of free disk"
    found.append(verdict(disk_gb >= 5, disk, disk, "free 5 GB: the environment takes 3, the smallest FineWeb run 0.4"))
    if shared_gb is not None and len(machine.gpus) > 1:
        shared = f"{shared_gb:.2f} GB of shared memory for the ranks"
        found.append(verdict(shared_gb >= 1, shared, shared, "docker run --ipc=host, or --shm-size=8g"))
    cuda = len(machine.gpus) if machine.device == "cuda" else 0
    tiers = {"C: whole chapters on the CPU": True, "1: one GPU": cuda >= 1, "N: several GPUs": cuda > 1}
    return found + [Finding(can or None, f"tier {tier}: {'yes' if can else 'no'}") for tier, can in tiers.items()]


# %%
crammed = Machine("Linux x86_64", "3.12.1", 64, 512.0, server, everything, None, "/usr/bin/g++")
problems = [finding for finding in hardware_findings(crammed, disk_gb=2.0, shared_gb=0.064) if finding.ok is False]
assert len(problems) == 3 and all(finding.fix for finding in problems)
assert not any(finding.ok is False for finding in hardware_findings(mac, 100.0, None))
for finding in problems:
    print(f"✗ {finding.text}\n  → {finding.fix}")

# %% [markdown]
# And yours, or rather the one that made this page:

# %%
#| export
def doctor(machine: Machine) -> int:
    """Print every finding, each problem with its fix; returns the number of problems."""
    shared = Path("/dev/shm")
    shared_gb = shutil.disk_usage(shared).total / 2**30 if shared.is_dir() else None
    findings = software_findings(machine) + hardware_findings(machine, shutil.disk_usage(".").free / 2**30, shared_gb)
    for finding in findings:
        print({True: "✓", False: "✗", None: "·"}[finding.ok], finding.text)
        if finding.ok is False:
            print("  →", finding.fix)
    return sum(finding.ok is False for finding in findings)


if __name__ == "__main__" and __spec__ is not None:  # python -m, not a notebook
    sys.exit(min(doctor(look()), 1))

# %%
count = doctor(machine)
assert count == sum(finding.ok is False for finding in software_findings(machine)) or count > 0

# %% [markdown]
# ## How to read this book
#
# In order, or by the idea you came for; the [atlas of the ladder](01_are_you_faster.py) is not needed to begin. Three habits hold throughout.
#
# **Predict first.** Each chapter stops before its measurement and asks for a number. A prediction that turns out wrong is worth more than a page that is
# nodded through.
#
# **Every claim is a cell.** A sentence about the code is followed by a cell that asserts it. If the claim is false, the page you are reading cannot be built.
#
# **The cells are the program.** A cell that begins with `#| export` goes, as it stands, into the package `speedrun`; the file you would find in a
# traceback carries the heading of the section it came from. `make lab` opens the chapters in Jupyter, and saving one rewrites the package.
#
# ## Exercises
#
# 1. The record falls roughly exponentially. Write `half_life(days, seconds)`, the number of days in which the time halves, by a least-squares line through
#    $\log_2$ of the time. (A straight line has slope $\sum (x-\bar x)(y-\bar y) / \sum (x-\bar x)^2$.)

# %% tags=["solution"]
def half_life(days: list[float], seconds: list[float]) -> float:
    """Days per halving, from a straight line through log2(seconds)."""
    logs = [math.log2(second) for second in seconds]
    day, log = sum(days) / len(days), sum(logs) / len(logs)
    slope = sum((x - day) * (y - log) for x, y in zip(days, logs)) / sum((x - day) ** 2 for x in days)
    return -1 / slope


# %%
assert math.isclose(half_life([0.0, 10.0, 20.0], [8.0, 4.0, 2.0]), 10.0)
since = [(day - days[0]).days for day in days]
early = half_life(since[:21], seconds[:21])
late = half_life(since[21:], seconds[21:])
assert early < late
print(f"records 1–21 halved the time every {early:.0f} days, records 22–89 every {late:.0f}")

# %% [markdown]
# 2. Which *kind* of idea paid? Each row of the table has a `technique_area` such as `optimizer` or `systems+kernel`. Write `share_by_area(ladder, gains)`:
#    the share of the total gain per area, a record with several areas split evenly among them. Predict the order before you run it.

# %% tags=["solution"]
def share_by_area(ladder: list[dict], gains: list[float]) -> dict[str, float]:
    """Share of the whole logarithmic gain that each area earned."""
    shares: dict[str, float] = {}
    for row, gain in zip(ladder[1:], gains):
        areas = row["technique_area"].split("+")
        for area in areas:
            shares[area] = shares.get(area, 0.0) + gain / len(areas) / sum(gains)
    return shares


# %%
shares = share_by_area(ladder, gains)
assert math.isclose(sum(shares.values()), 1.0) and max(shares, key=shares.get) == "architecture"
for area, share in sorted(shares.items(), key=lambda item: -item[1]):
    print(f"{area:13} {share:6.1%}")

# %% [markdown]
# ## Where to go next
#
# [Chapter 01](01_are_you_faster.py) asks what a difference of 0.001 is worth when two runs of the *same* program differ by more than that. It is
# the chapter most contestants wish they had read first.
