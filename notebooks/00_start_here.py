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
# # Start here: forty-five minutes, then forty seconds
#
# ```{admonition} Cost box
# Any machine: a few seconds, no download; there is nothing for a GPU to do. This page leans on all 92 records of the NanoGPT speedrun, Keller Jordan's contest {cite}`moddednanogpt`; the
# [credits](../book/credits.md) name everyone who set one. Record 1 is llm.c, by Andrej Karpathy and its contributors {cite}`llmc`.
# ```
#
# ## The problem
#
# In May 2024 a well-tuned C program trained a 124-million-parameter GPT-2 to a validation loss of 3.28 in **45 minutes** on eight H100s. In September
# 2026 a program was accepted that reaches the same loss on the same kind of machine in **39.9 seconds**. The text is the same, and so is the target; PyTorch got a little faster. The model is no GPT-2 any more.
# Nearly all of the rest is that some fifty people, and lately a few AI systems, had some ninety ideas, most of them small enough to explain over lunch.
#
# You would like to understand them. So you open the trainer that holds the record, and meet thousands of lines in which every line is the residue
# of an argument that somebody won. Most of the arguments are written down: in the READMEs of two thirds of the record folders, in pull requests and their discussions, in posts such as Keller Jordan's on Muon {cite}`jordan2024`. They are not in one place or in order; and many ideas arrived several to a record, so that the ladder does not say what each is worth alone.
#
# That is what this book adds. Each chapter takes one idea, asks what it should buy, builds it in the fewest lines that work, and measures. The lines
# are then collected, mechanically, into a trainer; the code you read is the code that runs. There is the *spine*, from the data and the baseline to the launcher and the means to measure, and there are twelve chapters of ideas so far, on the architecture, on attention over whole documents, on the optimizer and on eight bits. They take the ladder to its thirty-first record, and parts of it much further.

# %%
from speedrun.lab import tier as tangled  # what this chapter builds below, from the package

tier = tangled.choose_tier()

# %% [markdown]
# ## The game
#
# The contest was started by Keller Jordan and is played in the open, in the repository
# [modded-nanogpt](https://github.com/KellerJordan/modded-nanogpt). Its rules fit in a paragraph. Train on FineWeb, English text from the web, cut into GPT-2's tokens, in the given order,
# until the mean cross-entropy over the first 10,485,760 validation tokens is at most **3.28 nats** per token (a nat is the unit of the natural logarithm, as a bit is of that to base two). Use eight H100s. The clock runs while the model
# trains and stops while it is validated; compiling and warming up happen before it starts. A record must be faster than the last one *on the same
# machine*, must show over several runs that the mean loss is below 3.28 at $p < 0.01$ (pure systems changes are excused), may not touch the tokens, and may not add
# compiler flags. Nearly everything else is allowed: another architecture, another optimizer, another number format, hand-written kernels.
#
# Why 3.28? It is about where llm.c, Andrej Karpathy's reproduction of GPT-2, arrived after its 45 minutes; its log ends a little lower, at 3.272. And why is it a good game? Because the score is
# a *time*. Papers trade in currencies that cannot be exchanged: this one saves steps, that one saves memory, a third one gains accuracy at equal
# FLOPs. Here an idea that learns 2% more from each token and slows each step by 3% is worth less than nothing, and the clock says so. (How many runs it takes to hear it is the subject of the next chapter.)
#
# Below is the whole history, record by record. Before you scroll to the figure, decide what you expect.

# %% [markdown]
# ```{admonition} Prediction
# The record fell by a factor of about 68 in 91 steps. If each step had helped equally, each would have cut the time by
# $1 - 68^{-1/91} \approx 4.5\%$. It was not like that. **Write down your guess: how many of the 91 improvements make up half of the progress?**
# And a second one: while the time fell by 68, by what factor did the *program* grow?
# ```
#
# Progress has to be measured so that shares add up. A step from 10 minutes to 5 and a step from 2 minutes to 1 are the same feat, so the natural
# unit is the logarithm of the ratio. With $t_i$ the time of record $i$, the gains $\ln(t_{i-1}/t_i)$ sum to $\ln(t_1/t_{92})$ exactly:

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

assert len(ladder) == 92 and seconds[0] == 45 * 60 and len(people) == 52
assert ladder[0]["final_val_loss"] == "3.2722"
assert round(1 - (seconds[0] / seconds[-1]) ** (-1 / 91), 3) == 0.045
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

assert len(half) == 6 and sorted(half)[-2] <= 10, "six steps: five of the first eleven,"
assert max(half) == half[0] == len(gains) - 1, "and the last, which is the largest of all"
for i in sorted(half):
    row, share = ladder[i + 1], gains[i] / sum(gains)
    what = textwrap.shorten(row["description"], 46, placeholder=" …")
    print(f"record {row['record']:>2} {seconds[i + 1]:5.0f} s {share:5.1%}  {what}")
print(f"half of the progress took {len(half)} steps, the other half {len(gains) - len(half)}")

# %% [markdown]
# Five of the six are early. Most changed several things at once, and are called here by the best known of them: rotary positions, Muon, a squared ReLU, a shortcut for the values, attention that respects documents. (Record 2 also tripled the learning rate, and record 5 changed the vocabulary's padding, the heads and the initial weights.) The sixth is the latest. Record 92, too, brings many ideas together: its author measured eleven parts by taking each away, from a softmax over a sample of the vocabulary to a table of 65 billion parameters that is only looked up. What kind of progress was each? A run gets faster in two ways. It reads fewer tokens, or it spends
# less time on each. On the logarithmic scale the two add up, so one can ask which share of a gain is tokens:


# %%
tokens = [float(row["merged_total_tokens"] or row["total_train_tokens"] or "nan") for row in ladder]


def share_of_tokens(first: int, last: int) -> float:
    """Share of the gain between two records that is fewer tokens; the rest is less time a token."""
    return math.log(tokens[first - 1] / tokens[last - 1]) / math.log(
        seconds[first - 1] / seconds[last - 1]
    )


early, late, last = share_of_tokens(1, 12), share_of_tokens(12, 91), share_of_tokens(91, 92)
usual = sorted(gains[11:])[len(gains[11:]) // 2]
steps_91 = int(ladder[90]["merged_scheduled_steps"]) + int(ladder[90]["merged_extension_steps"])
fewer_steps = math.log(int(ladder[11]["steps"]) / steps_91) / math.log(tokens[11] / tokens[90])
assert early > 1 and 0.7 < late < 0.75 and last < 0.1 and 0.01 < usual < 0.013
assert 9 < tokens[0] / tokens[11] < 11 and seconds[11] / tokens[11] > seconds[0] / tokens[0]
assert 0.3 < fewer_steps < 0.4, "the rest of the saving is smaller batches"
print(
    f"fewer tokens: {early:.0%} of the gain of records 1 to 12, {late:.0%} of 12 to 91, {last:.0%} of 92"
)
print(
    f"of the tokens saved from 12 to 91, fewer steps: {fewer_steps:.0%}, smaller batches: the rest"
)
print(f"half of the later records gained less than {usual:.1%}")

# %% [markdown]
# More than all of the early gain came from *learning more from each token*: by record 12 the run needs a tenth of them, and each costs more time than in llm.c. What follows is a long grind of cuts of about one per cent, and that is where the kernels, the number formats and the schedules live. Yet even there seven tenths of the gain is
# text that need not be read. A third of that saving is fewer steps, and two thirds are smaller batches: a step of record 91 reads on average half as much as one of record 12 ([chapter 14](14_schedule.py) says why that can be enough). Until record 91 the contest looked like engineering and mostly needed less text; record 92 is the exception, and mostly spends less time on each token. The figure shows when the time fell, and how the program grew meanwhile.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Record time on a logarithmic axis against date, with the lines of code of each record below"}}
import matplotlib.pyplot as plt

figure_style()
lines = [(day, int(row["code_lines"])) for day, row in zip(days, ladder) if row["code_lines"]]
growth = lines[-1][1] / lines[0][1]
fig, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5.6), sharex=True, height_ratios=[2.2, 1])
top.step(days, seconds, where="post", color="C0")
top.plot(days, seconds, "o", ms=3.5, color="C0")
names = {2: "rotary, …", 3: "Muon", 5: "ReLU², QK-norm, …", 9: "value residual, …"}
names |= {12: "FlexAttention, …", 92: "eleven parts"}
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
    at, left = (days[number - 1], seconds[number - 1]), number in (3, 92)
    place = {"xytext": (-8, -3) if left else (8, 1), "ha": "right" if left else "left"}
    top.annotate(f"{number} {name}", at, textcoords="offset points", fontsize=7.5, **place)
top.set_yscale("log")
ticks = {
    40: "40 s",
    60: "1 min",
    120: "2 min",
    300: "5 min",
    600: "10 min",
    1200: "20 min",
    2700: "45 min",
}
top.set_yticks(list(ticks), list(ticks.values()))
top.minorticks_off()
top.set_ylabel("time to 3.28")
top.legend(loc="upper right")
row = next(row for row in ladder if row["record"] == "89")
assert seconds[21] > seconds[20], "record 22 stands above the first time of record 21"
assert (lines[0][1], int(row["code_lines"]), lines[-1][1]) == (462, 2978, 5946)
since = next(t for t, row in zip(seconds, ladder) if row["code_lines"]) / seconds[90]
assert 19 < since < 21 and 12 < growth < 13
top.set_title(
    f"{factor:.0f}× faster in {span / 365.25:.1f} years; records 4 to 91, {since:.0f}× for {growth:.0f}× the code"
)
bottom.plot(*zip(*lines), "o-", ms=3, lw=1, color="C2")
bottom.set_ylim(0)
bottom.set_ylabel("lines of code")
fig.autofmt_xdate()
plt.show()

# %% [markdown]
# *Source: the public record logs and README of modded-nanogpt, to record 89 as of August 2026, records 90 to 92 as of 3 October 2026, carried over in `book/data/records.csv`; dates are those of submission. Code lines, without blank ones, are counted in
# what each record's log embeds, and logs of branches that were merged later differ from the code that holds the record: the jumps at records 85 and 90 are such logs'. None was counted for record 92. An ellipsis stands for the other changes of a record. Record 21 was timed again under stricter rules, and record 22 had to beat the new time: hence the step upwards.*
#
# That settles the second guess. The first log that holds its program is record 4's, with 462 lines. Record 89's has 2,978, record 91's 5,946, and record 92 added 5,068 lines and took 2,465 away. The lower curve is the reason for this book. The five hundred lines of January 2025 were one evening's reading.
#
# ## How to read this book
#
# In order, or by the idea you came for. Three habits hold throughout.
#
# **Predict first.** Each chapter stops before its measurement and asks for a number. A wrong prediction teaches more than a page that you agree with.
#
# **Claims are cells.** What a sentence says about the code, a cell after it asserts, as far as it can be computed. If such an assertion failed, the page you are reading could not have been built. What stands in no cell, such as a reason, you have to judge yourself.
#
# **The cells are the program.** A cell that begins with `#| export` goes, as it stands, into the package `speedrun`; the file that a traceback
# names carries the heading of the section that it came from. `make lab` opens the chapters in Jupyter, and saving one rewrites the package. Change Muon's weight
# decay in [chapter 22](22_config.py), save, and the next run of [chapter 24](24_speedrun.py) trains with it.
#
# ## Your machine
#
# You do not need eight H100s. Every chapter runs on a laptop CPU in about a minute at most, on real text, with the same code at smaller shapes; on one GPU with 16 GB it
# computes there, at larger shapes where they show more, in three minutes at most; and the chapters at the end run the whole trainer on whatever you have. The first line that a chapter prints says which of the two it is.
#
# | you have | you can | command |
# | --- | --- | --- |
# | a browser | read, with every output on the page | |
# | a CPU | run each chapter; train a small GPT in about five minutes | `make speedrun` |
# | one NVIDIA GPU | train on GPT-2's tokens, in minutes | `make speedrun` |
# | several with 48 GB each | train `record`, the best that the chapters give together, on FineWeb | `make speedrun` |
# | the same | follow the contest from record 1, llm.c's, to record 31; record 11 took 7 minutes on 8×H100 | `make speedrun PRESET=record11` |
#
# It is the same command on purpose. A trainer that works only on the machine it was tuned for is of no use on yours, and
# neither is an error that says `AttributeError` when it means *you have no GPU*. So the first code that we write is neither model nor
# optimizer. It is the part that looks at a machine and says what it sees. If you came for the ideas, go straight to [chapter 01](01_are_you_faster.py); nothing there needs the rest of this page.
#
# ### Errors with a way out
#
# A message that only says what went wrong leaves its reader where the program stopped. Throughout this book an error that somebody can mend
# is a `UserError`: what is wrong, with the name and the value, and the way out. Commands print it without a traceback; anything else is a bug of ours, and keeps its traceback. ([The workshop](93_errors_and_files.py) has the class, and what the operating system can refuse.)

# %%
#| default_exp lab.hardware
#| export
from speedrun.lab.errors import UserError

# %%
try:
    raise UserError(
        "data/fineweb holds no manifest.json", "python -m speedrun.data manifest data/fineweb"
    )
except UserError as problem:
    assert problem.what in str(problem) and problem.fix in str(problem)
    print(problem)

# %% [markdown]
# ### Looking without touching
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
import sys
from dataclasses import dataclass, replace
from pathlib import Path


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
# An eight-GPU server; then a virtual machine whose driver declines to say what its card can do, followed by a line of complaint:

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
def look() -> Machine:
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
machine = look()
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
        raise UserError(f"kernel {self.__name__} cannot be launched: no Triton on {where}", fix)


# %%
#| export
def jit(kernel):
    """`triton.jit`, or without Triton a stand-in whose launch says why."""
    triton = find_triton()
    return triton.jit(kernel) if triton else Unlaunchable(kernel)


def setup() -> Machine:
    """First call of every command and kernel chapter: without a GPU, makes Triton interpret its kernels."""
    machine = look()
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
# The machine on which everything is wrong, the Mac, which is not wrong but a Mac, and a torch that was moved:

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
    sys.exit(run_main(lambda: min(doctor(look()), 1)))

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
# Which of these tiers a chapter runs at is decided once, in its first cell, and shapes are taken from the answer: `tier.pick(cpu=128, gpu=768)`. No later cell asks what machine it is on. The environment variable `TIER` overrules the machine: `TIER=C make lab` keeps to the CPU, `TIER=1` takes a GPU that is smaller than the chapters were measured on.
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
    machine, asked = look(), os.environ.get("TIER", "").strip()
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
    print("tier", tier_of(each, "").name, "for", reason(tier_of(each, ""), each, ""))

# %% [markdown]
# ## Exercises
#
# 1. On a logarithmic axis an exponential is a straight line. Is the record one? Write `half_life(days, seconds)`, the number of days in which the time halves, by a least-squares line through
#    $\log_2$ of the time, and compare records 1–21 with 22–92. (A straight line has slope $\sum (x-\bar x)(y-\bar y) / \sum (x-\bar x)^2$.)


# %% tags=["solution"]
def half_life(days: list[float], seconds: list[float]) -> float:
    """Days per halving, from a straight line through log2(seconds)."""
    logs = [math.log2(second) for second in seconds]
    day, log = sum(days) / len(days), sum(logs) / len(logs)
    slope = sum((x - day) * (y - log) for x, y in zip(days, logs))
    return -sum((x - day) ** 2 for x in days) / slope


# %%
line = half_life([0.0, 10.0, 20.0], [8.0, 4.0, 2.0])
assert math.isclose(line, 10.0), (
    f"8, 4 and 2 s on days 0, 10 and 20 halve in 10 days, not in {line}"
)
steps = half_life([0.0, 10.0, 20.0, 30.0], [8.0, 8.0, 2.0, 2.0])
assert math.isclose(steps, 12.5), (
    f"8, 8, 2, 2 s on days 0, 10, 20, 30: the least-squares line halves in 12.5 days, not in {steps} (end points alone give 15, days against logarithms 10)"
)
after = [(day - days[0]).days for day in days]
first, then = half_life(after[:21], seconds[:21]), half_life(after[21:], seconds[21:])
assert then > 4 * first, (
    f"halving slowed down more than four times, but yours says {first:.0f} and then {then:.0f} days"
)
print(f"records 1–21 halved the time every {first:.0f} days, records 22–92 every {then:.0f}")

# %% [markdown]
# 2. Which *kind* of idea paid? Each row of the table has a `technique_area` such as `optimizer` or `systems+kernel`. Write `share_by_area(ladder, gains)`:
#    the share of the total gain per area, a record with several areas split evenly among them. Predict the order before you run it. (The areas are our labels, and the even split is our rule; another rule can put close areas in another order.)


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
three = [{"technique_area": area} for area in ("systems", "optimizer", "optimizer+data")]
made_up = share_by_area(three, [1.0, 3.0])
assert made_up == {"optimizer": 0.625, "data": 0.375}, (
    f"two steps gain 1 (optimizer) and 3 (optimizer+data, half each): the shares of 4 are 2.5/4 and 1.5/4, not {made_up} (the first record has no gain)"
)
shares = share_by_area(ladder, gains)
total, most = sum(shares.values()), max(shares, key=shares.get)
assert math.isclose(total, 1.0), f"the shares sum to 1, not to {total}"
assert most == "architecture", f"architecture earned most, not {most}"
for area, share in sorted(shares.items(), key=lambda item: -item[1]):
    print(f"{area:13} {share:6.1%}")

# %% [markdown]
# ## Where to go next
#
# [Chapter 01](01_are_you_faster.py) asks what a difference of 0.001 is worth when two runs of the *same* program differ by more than that. Read
# it before you believe a measurement, ours included.
