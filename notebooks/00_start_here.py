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
# Nearly all of the rest is that some fifty people, and since record 32 a few AI systems, set ninety-one records after the first, most of them with several ideas, most of them small enough to explain over lunch.
#
# You would like to understand them. So you open the trainer that holds the record, and meet thousands of lines, and hardly any of them
# says why it is there. Most of the reasons are written down: in the READMEs of two thirds of the record folders, in pull requests and their discussions, in posts such as Keller Jordan's on Muon {cite}`jordan2024`. They are not in one place or in order; and many ideas arrived several to a record, so that the ladder does not say what each is worth alone.
#
# That is what this book adds. Each chapter takes one idea, asks what it should buy, builds it in the fewest lines that work, and measures. The lines
# are then collected, mechanically, into a trainer; the code you read is the code that runs. There is the *spine*, from the data and the baseline to the launcher and the means to measure, and there are seventeen chapters of ideas so far: four on the architecture, three on attention over whole documents, five on the optimizer, and five on low precision, kernels and compiling. They take the ladder to its thirty-first record, and parts of it much further.

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

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
# FLOPs. Here an idea that learns 2% more from each token and slows each step by 3% is worth less than nothing, and the clock says so. (How many runs it takes to tell such a difference from chance is the subject of the next chapter.)
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
    print(f"{'':24} {row['contributors']}")
print(f"half of the progress took {len(half)} steps, the other half {len(gains) - len(half)}")

# %% [markdown]
# Five of the six are early. Most changed several things at once, and are called here by the best known of them: rotary positions, Muon, a squared ReLU, the value residual, attention masked at the borders of documents (FlexAttention). (Record 2 also tripled the learning rate, and record 5 changed the vocabulary's padding, the heads and the initial weights.) The sixth is the latest. Record 92, too, brings many ideas together: its author measured eleven parts by taking each away, from a softmax over a sample of the vocabulary to a table of 65 billion parameters that is only looked up. What kind of progress was each? A run gets faster in two ways. It reads fewer tokens, or it spends
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
since = next(t for t, r in zip(seconds, ladder) if r["code_lines"]) / seconds[ladder.index(row)]
growth = int(row["code_lines"]) / lines[0][1]
assert 17.5 < since < 18.5 and 6 < growth < 6.5
top.set_title(
    f"{factor:.0f}× faster in {span / 365.25:.1f} years; records 4 to 89, {since:.0f}× for {growth:.0f}× the code"
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
# So from record 4 to record 89 the time fell eighteenfold and the program grew sixfold. The first log that holds its program is record 4's, with 462 lines. Record 89's has 2,978, record 91's 5,946, and record 92, which was built on record 89 and not on 91, added 5,068 lines and took 2,465 away. The lower curve is the reason for this book.
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
# decay in [chapter 22](22_config.py), save, and the next `make speedrun` trains with it. (This page exports nothing; the first exported cell is in chapter 01.)
#
# ## Your machine
#
# You do not need eight H100s. Every chapter runs on a laptop CPU in about a minute at most, on real text, with the same code at smaller shapes; on one GPU with 16 GB it
# computes there, at larger shapes where they show more, in three minutes at most; and [chapter 24](24_speedrun.py) runs the whole trainer on whatever you have. The first line that a chapter prints says which: *tier C* is the CPU, *tier 1* a GPU with at least 14 GB of free memory.
#
# | you have | you can | command |
# | --- | --- | --- |
# | a browser | read, with every output on the page | |
# | a CPU | run each chapter; train a small GPT in about five minutes | `make speedrun` |
# | one NVIDIA GPU, or several smaller ones | train on GPT-2's tokens, in minutes | `make speedrun` |
# | several with 50 GB each | train `record`, the best that the chapters give together, on FineWeb | `make speedrun` |
# | the same | follow the contest through fourteen records, from 1, llm.c's, to 31; record 11 took 7 minutes on 8×H100 | `make speedrun PRESET=record11` |
#
# `record` itself has not been run whole yet; [chapter 24](24_speedrun.py) predicts what it should reach. What there is, on one H200 and English that is not FineWeb:

# %% tags=["hide-input"]
from speedrun.lab.results import load_result, measured_on

ours = load_result("loss", "one_gpu")
for run in ours["data"]["runs"]:
    loss = run["curve"][-1]["val_loss"]
    print(f"record_200m, {run['step']} steps: {run['seconds']:.0f} s of training to {loss:.3f}")
print(measured_on(ours))

# %% [markdown]
# It is the same command on purpose: a trainer that works only on the machine it was tuned for is of no use on yours. `make doctor` says what it sees of yours, and for each problem the way out. How a machine is looked at without touching its GPUs, and what the doctor knows, is [a page of the workshop](95_machines.py), at the end of the book, where the tools are: how errors are told, files written, data fetched, runs logged. No idea of the other chapters rests on having read it.

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
