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
# 2026 the same kind of machine reaches the same loss in **73.8 seconds**. The hardware is the same, the text is the same, the target is the same. PyTorch
# got a little faster. Nearly all the rest is that fifty people, and lately a few AI systems, had some ninety ideas, each small enough to explain over lunch.
#
# You would like to understand them. So you open the trainer that holds the record, and meet five thousand lines in which every line is the residue
# of an argument that somebody won, and none of the arguments are written down.
#
# This book is the arguments. Each chapter takes one idea, asks what it should buy, builds it in the fewest lines that work, and measures. The lines
# are then collected, mechanically, into a trainer; the code you read is the code that runs. What exists so far is the spine: the data, the baseline, the model, the loop,
# the launcher, and the means to measure. The ideas that made it fast come next, one chapter each.

# %% [markdown]
# ## The game
#
# The contest was started by Keller Jordan and is played in the open, in the repository
# [modded-nanogpt](https://github.com/KellerJordan/modded-nanogpt). Its rules fit in a paragraph. Train on FineWeb, English text from the web, cut into GPT-2's tokens, in the given order,
# until the mean cross-entropy over the first 10,485,760 validation tokens is at most **3.28 nats** (bits, but with the natural logarithm). Use eight H100s. The clock runs while the model
# trains and stops while it is validated; compiling and warming up happen before it starts. A record must be faster than the last one *on the same
# machine*, must show over several runs that the mean loss is below 3.28 at $p < 0.01$ (pure systems changes are excused), may not touch the tokens, and may not add
# compiler flags. Nearly everything else is allowed: another architecture, another optimizer, another number format, hand-written kernels.
#
# Why 3.28? It is where llm.c, Andrej Karpathy's reproduction of GPT-2, arrived after its 45 minutes. And why is it a good game? Because the score is
# a *time*. Papers trade in currencies that cannot be exchanged: this one saves steps, that one saves memory, a third one gains accuracy at equal
# FLOPs. Here an idea that learns 2% more from each token and slows each step by 3% is worth less than nothing, and the clock says so. (How many runs it takes to hear it is the subject of the next chapter.)
#
# Here is everything that happened. Before you scroll to the figure, decide what you expect.

# %% [markdown]
# ```{admonition} Prediction
# The record fell by a factor of about 37 in 88 steps. If each step had helped equally, each would have cut the time by
# $1 - 37^{-1/88} \approx 4\%$. It was not like that. **Write down your guess: how many of the 88 improvements make up half of the progress?**
# And a second one: while the time fell by 37, by what factor did the *program* grow?
# ```
#
# Progress has to be measured so that shares add up. A step from 10 minutes to 5 and a step from 2 minutes to 1 are the same feat, so the natural
# unit is the logarithm of the ratio. With $t_i$ the time of record $i$, the gains $\ln(t_{i-1}/t_i)$ sum to $\ln(t_1/t_{89})$ exactly:

# %%
import math
import re
import textwrap
from datetime import date

from speedrun.lab.results import figure_style, public_table

# record 21 was timed three times, under changing rules; its first time stands here
ladder = [row for row in public_table("records") if not row["note"].startswith("retiming")]
seconds = [float(row["record_time_s"]) for row in ladder]
days = [date.fromisoformat(row["date"]) for row in ladder]
gains = [math.log(before / after) for before, after in zip(seconds, seconds[1:])]
people = {name for row in ladder for name in re.findall(r"@[\w.-]+", row["contributors"])}

assert len(ladder) == 89 and seconds[0] == 45 * 60 and len(people) == 50
assert math.isclose(sum(gains), math.log(seconds[0] / seconds[-1]))
factor, span = seconds[0] / seconds[-1], (days[-1] - days[0]).days
print(f"{seconds[0]:.0f} s → {seconds[-1]:.1f} s: a factor of {factor:.1f} in {span} days")

# %% [markdown]
# Sort the gains, add them up from the largest, and stop at half:

# %%
order = sorted(range(len(gains)), key=lambda i: -gains[i])
half, running = [], 0.0
while running < sum(gains) / 2:
    half.append(order[len(half)])
    running += gains[half[-1]]

assert len(half) == 7 and max(half) <= 10, "seven steps, all among the first eleven"
for i in sorted(half):
    row, share = ladder[i + 1], gains[i] / sum(gains)
    what = textwrap.shorten(row["description"], 46, placeholder=" …")
    print(f"record {row['record']:>2} {seconds[i + 1]:5.0f} s {share:5.1%}  {what}")
print(f"half of the progress took {len(half)} steps, the other half {len(gains) - len(half)}")

# %% [markdown]
# All of the big ones are early. Rotary positions, Muon, a squared ReLU, a shortcut for the values, attention that respects documents: what kind of progress was that? A run gets faster in two ways. It reads fewer tokens, or it spends
# less time on each. On the logarithmic scale the two add up, so one can ask which share of a gain is tokens:


# %%
tokens = [float(row["merged_total_tokens"] or row["total_train_tokens"] or "nan") for row in ladder]


def share_of_tokens(first: int, last: int) -> float:
    """Share of the gain between two records that is fewer tokens; the rest is less time a token."""
    return math.log(tokens[first - 1] / tokens[last - 1]) / math.log(
        seconds[first - 1] / seconds[last - 1]
    )


early, late = share_of_tokens(1, 12), share_of_tokens(12, 89)
usual = sorted(gains[11:])[len(gains[11:]) // 2]
assert early > 1 and 0.7 < late < 0.8 and 0.01 < usual < 0.013
print(f"records 1 to 12: {early:.0%} of the gain is fewer tokens; 12 to 89: {late:.0%}")
print(f"half of the later records gained less than {usual:.1%}")

# %% [markdown]
# More than all of the early gain came from *learning more from each token*: by record 12 the run needs a tenth of them, and each costs more time than before. What follows is a long grind of cuts of about one per cent, and that is where the kernels, the number formats and the schedules live. Yet even there three quarters of the gain is
# text that need not be read. The contest looks like engineering and is mostly learning. The figure shows both parts, and their price.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Record time on a logarithmic axis against date, with the lines of code of each record below"}}
import matplotlib.pyplot as plt

figure_style()
lines = [(day, int(row["code_lines"])) for day, row in zip(days, ladder) if row["code_lines"]]
growth = lines[-1][1] / lines[0][1]
fig, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5.6), sharex=True, height_ratios=[2.2, 1])
top.step(days, seconds, where="post", color="C0")
top.plot(days, seconds, "o", ms=3.5, color="C0")
names = {2: "rotary", 3: "Muon", 4: "Muon, bf16", 5: "ReLU², QK-norm", 6: "shared Muon"}
names |= {9: "value residual", 12: "FlexAttention"}
assert set(names) == {i + 2 for i in half}
label = f"{len(half)} steps, half of the progress"
top.plot(
    [days[i + 1] for i in half],
    [seconds[i + 1] for i in half],
    "o",
    ms=8,
    mfc="none",
    color="C1",
    label=label,
)
for number, name in names.items():
    at, left = (days[number - 1], seconds[number - 1]), number in (2, 3, 6)
    place = {"xytext": (-8, -3) if left else (8, 1), "ha": "right" if left else "left"}
    top.annotate(f"{number} {name}", at, textcoords="offset points", fontsize=7.5, **place)
top.set_yscale("log")
ticks = {60: "1 min", 120: "2 min", 300: "5 min", 600: "10 min", 1200: "20 min", 2700: "45 min"}
top.set_yticks(list(ticks), list(ticks.values()))
top.minorticks_off()
top.set_ylabel("time to 3.28")
top.legend(loc="upper right")
since = next(t for t, row in zip(seconds, ladder) if row["code_lines"]) / seconds[-1]
assert 17 < since < 19 and 6 < growth < 7 and (lines[0][1], lines[-1][1]) == (462, 2978)
top.set_title(
    f"{factor:.0f}× faster in {span / 365.25:.1f} years; since record 4, {since:.0f}× for {growth:.1f}× the code"
)
bottom.plot(*zip(*lines), "o-", ms=3, lw=1, color="C2")
bottom.set_ylim(0)
bottom.set_ylabel("lines of code")
fig.autofmt_xdate()
plt.show()

# %% [markdown]
# *Source: the public record logs and README of modded-nanogpt as of August 2026, carried over in `book/data/records.csv`. Code lines, without blank ones, are counted in
# the program that each record's log embeds. Logs of branches that were merged later differ from the code that holds the record; the spike is record 85's.*
#
# That settles the second guess. The first log that holds its program is record 4's, with 462 lines; the last, record 89's, has 2,978; and the repository with its kernel files and blank lines stands at five thousand. The lower curve is the reason for this book. The five hundred lines of January 2025 were one evening's reading.
# The ideas in today's have not become harder. They have become unlabelled.
#
# ## How to read this book
#
# In order, or by the idea you came for. Three habits hold throughout.
#
# **Predict first.** Each chapter stops before its measurement and asks for a number. A prediction that turns out wrong is worth more than a page that is
# nodded through.
#
# **Every claim is a cell.** A sentence about the code is followed by a cell that asserts it. If the claim were false, the page you are reading could not have been built.
#
# **The cells are the program.** A cell that begins with `#| export` goes, as it stands, into the package `speedrun`; the file that a traceback
# names carries the heading of the section that it came from. `make lab` opens the chapters in Jupyter, and saving one rewrites the package. Change the weight
# decay in chapter 03, save, and the next run of chapter 24 trains with it.
#
# ## Your machine
#
# You do not need eight H100s. Every chapter runs on a laptop CPU in about a minute at most, on real text, with the same code at smaller shapes; on one GPU it
# runs at shapes where the timings mean something; and the chapters at the end run the whole trainer on whatever you have.
#
# | you have | you can | command |
# | --- | --- | --- |
# | a browser | read, with every output on the page | |
# | a CPU | run each chapter; train a small GPT in about five minutes | `make speedrun` |
# | one NVIDIA GPU | train on GPT-2's tokens, in minutes | `make speedrun` |
# | several | train GPT-2 124M on FineWeb by the fastest recipe whose chapters exist; for now llm.c's | `make speedrun` |
#
# It is the same command on purpose. A trainer that works only on the machine it was tuned for is a common complaint about speedruns, and
# close behind comes the error that says `AttributeError` when it means *you have no GPU*. So the first code that we write is neither model nor
# optimizer. It is the part that looks at a machine and says what it sees. If you came for the ideas, go straight to [chapter 01](01_are_you_faster.py); nothing there needs the rest of this page.
#
# ### Errors with a way out
#
# A message that only says what went wrong leaves its reader where the program stopped. Throughout this book an error that somebody can mend
# is a `Problem`: what is wrong, with the name and the value, and the way out. Commands print it without a traceback; anything else is a bug of ours, and keeps its traceback. ([The workshop](93_errors_and_files.ipynb) has the class, and what the operating system can refuse.)

# %%
#| default_exp lab.hardware
#| export
from speedrun.lab.errors import Problem

# %%
try:
    raise Problem(
        "data/fineweb holds no manifest.json", "python -m speedrun.data manifest data/fineweb"
    )
except Problem as problem:
    assert problem.what in str(problem) and problem.fix in str(problem)
    print(problem)

# %% [markdown]
# ### Looking without touching
#
# Asking PyTorch for GPUs has a side effect. It can initialise CUDA in the process that asks, which from then on cannot safely start copies of itself (*fork*), and whose first use of a GPU takes some hundred megabytes of it. A notebook that *launches* training should hold nothing of the kind. The driver's own tool, `nvidia-smi`, answers without
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
    """One NVIDIA GPU as its driver describes it.

    memory_gb: counted in 2**30 bytes. capability: (9, 0) for Hopper; (0, 0) where the driver does not say.
    """

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


# %% [markdown]
# An eight-GPU server; then a virtual machine whose driver declines to say what its card can do, followed by a line of complaint:

# %%
row = "{i}, GPU-{i}f3c, NVIDIA H100 80GB HBM3, 81559, 580.65.06, 9.0"
server = parse_gpus("\n".join(row.format(i=i) for i in range(8)))
shy = parse_gpus("0, GPU-a1, GRID A100, [N/A], 535.00, [N/A]\nFailed to initialize NVML")

assert len(server) == 8 and server[7].index == 7 and server[0].capability == (9, 0)
assert 79 < server[0].memory_gb < 80
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


# %%
assert visible_gpus(server, None) == server
assert visible_gpus(server, "") == visible_gpus(server, "-1") == ()
assert [gpu.index for gpu in visible_gpus(server, "3, GPU-1f")] == [3, 1]
assert [gpu.index for gpu in visible_gpus(server, "2,9,4")] == [2], (
    "CUDA stops at what matches nothing"
)
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


# %% [markdown]
# A value like this can be made up, and that is its point: every decision in this book that depends on hardware is a function of a `Machine`, and so can be tested on machines that nobody here owns.

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


# %%
machine = look()
assert machine.cores >= 1 and machine.memory_gb > 0.1 and machine.versions["torch"]
assert version_of("a-package-that-nobody-wrote") is None
print(
    f"{machine.system}, Python {machine.python}, {machine.cores} cores, {machine.memory_gb:.0f} GB"
)
print(f"torch {machine.versions['torch']} → {machine.device}")

# %% [markdown]
# ### Kernels without a GPU
#
# Later chapters write GPU kernels in Triton, a Python dialect that is compiled for the device. Triton also has an *interpreter* that runs a kernel on the
# CPU, thousands of times slower and good enough to show that it is right. The switch is read when a kernel is **defined**, which is too late to
# think of it once the kernels have been imported. So every command and every kernel chapter begins with `setup()`.
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
        raise Problem(f"kernel {self.__name__} cannot be launched: no Triton on {where}", fix)


# %%
#| export
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
except Problem as problem:
    print(problem)
finally:
    sys.modules.pop("triton")
    sys.modules.update({"triton": had} if had else {})

# %% [markdown]
# ### The doctor
#
# `make doctor` prints what follows: one line a finding, and for each problem its fix. It can only know problems that somebody has met. Those below
# are ones that people report: a PyTorch without CUDA beside a perfectly good GPU, a missing compiler, and a
# container with 64 MB of shared memory, in which eight *ranks* (one process per GPU) die of a bus error that names nothing.


# %%
#| default_exp lab.doctor
#| export
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path


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


# %% [markdown]
# The machine on which everything is wrong, and the Mac, which is not wrong but a Mac:

# %%
assert [finding.ok for finding in software_findings(poor)] == [False] * 5
assert all(finding.fix for finding in software_findings(poor)), "each problem comes with its fix"
assert [finding.ok for finding in software_findings(mac)] == [True, True, None, True, True]
print(software_findings(mac)[2].text)


# %% tags=["hide-input"]
#| export
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


# %%
problems = [f for f in hardware_findings(forgotten, disk_gb=2.0, shared_gb=0.064) if f.ok is False]
assert len(problems) == 3 and all(finding.fix for finding in problems)
assert not any(finding.ok is False for finding in hardware_findings(mac, 100.0, None))
for finding in problems:
    print(f"✗ {finding.text}\n  → {finding.fix}")

# %% [markdown]
# And yours; or rather, that of the machine which made this page:


# %% tags=["hide-input"]
#| export
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

# %%
import contextlib
import io

with contextlib.redirect_stdout(io.StringIO()) as told:
    problems_found = doctor(forgotten)
assert problems_found >= 1 and "this torch was built for the CPU" in told.getvalue()
doctor(machine)
assert [finding.ok for finding in tier_findings(forgotten)] == [True, None, None]

# %% [markdown]
# ## Exercises
#
# 1. On a logarithmic axis an exponential is a straight line. Is the record one? Write `half_life(days, seconds)`, the number of days in which the time halves, by a least-squares line through
#    $\log_2$ of the time, and compare records 1–21 with 22–89. (A straight line has slope $\sum (x-\bar x)(y-\bar y) / \sum (x-\bar x)^2$.)


# %% tags=["solution"]
def half_life(days: list[float], seconds: list[float]) -> float:
    """Days per halving, from a straight line through log2(seconds)."""
    logs = [math.log2(second) for second in seconds]
    day, log = sum(days) / len(days), sum(logs) / len(logs)
    slope = sum((x - day) * (y - log) for x, y in zip(days, logs))
    return -sum((x - day) ** 2 for x in days) / slope


# %%
assert math.isclose(half_life([0.0, 10.0, 20.0], [8.0, 4.0, 2.0]), 10.0)
after = [(day - days[0]).days for day in days]
first, then = half_life(after[:21], seconds[:21]), half_life(after[21:], seconds[21:])
assert then > 4 * first
print(f"records 1–21 halved the time every {first:.0f} days, records 22–89 every {then:.0f}")

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
