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
#     modules: [speedrun.lab.runlog]
# ---

# %% [markdown]
# # Workshop: logs, results and stamps
#
# ```{admonition} Cost box
# Any machine, some seconds; there is nothing for a GPU to do. That a log holds the program that wrote it is the contest's own custom {cite}`moddednanogpt`, and so is the line in which it reports a step.
# ```
#
# ## The problem
#
# [Chapter 01](01_are_you_faster.py) finds that a thousandth of a nat takes more than seventy runs a side. Seventy runs are worth nothing if a year later nobody can say which program made them, and less if some lines of their logs are wrong. Lines go wrong when a program is killed while it writes. Here a run logs fifty records and is killed in the next one; it is
# resumed, and the log goes on with fifty more:

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
import json
import tempfile
from pathlib import Path

scratch = Path(tempfile.mkdtemp())
records = [json.dumps({"kind": "val", "step": step, "val_loss": 3.5}) for step in range(100)]
with (scratch / "naive.jsonl").open("w") as file:
    file.write("\n".join(records[:51])[:-9])  # the signal came here
with (scratch / "naive.jsonl").open("a") as file:
    file.write("\n".join(records[51:]) + "\n")


def readable(line: str) -> bool:
    """Whether a line is a record."""
    try:
        return bool(json.loads(line))
    except ValueError:
        return False


found = [readable(line) for line in (scratch / "naive.jsonl").read_text().splitlines()]
assert found.index(False) == 50 and found.count(False) == 1 and len(found) == 99
print(
    f"line {found.index(False) + 1} is no record; a reader that stops there has {found.index(False)} of {len(records)}"
)

# %% [markdown]
# Half a record and a whole one stand in one line, and both are lost. A reader that stops at the first bad line loses half of the run as well. That is the smaller worry: a torn line shows at least that something is missing. A number whose program has changed since looks as good as ever.
#
# ```{admonition} Prediction
# Somebody changes a module, and a result was measured with it. Of these changes, which must make the result doubtful: a comment; a blank line; a docstring; a constant; the name of a local variable; a newer PyTorch? **Which of the six does a hash of the file see, and which a hash of its syntax tree**, as Python parses it?
# ```
#
# ## The idea
#
# A number is as good as what is known about it. So a run writes down, before its first step, what is likeliest to differ next time, and then every step, in lines that appear whole or not at all. A measurement carries a *stamp*: the machine, the versions, the command, and a hash of all code that it came from. And whoever reads a number asks
# first whether the code is still the same. None of that makes a number right. It makes it possible to find out, later and by somebody else, that it is not.
#
# ## The code
#
# ### Logs: what a run must write down
#
# A loss says little without the program that made it. In the contest each log begins with the complete source of the script that
# wrote it. Ours keeps that habit in two files. `log.txt` has the lines that every speedrunner's eye and every existing parser knows:

# %%
#| export lab.runlog
import contextlib
import json
import os
import re
import time
from pathlib import Path

from speedrun.lab.errors import UserError

LINE = re.compile(
    r"step:(?P<step>\d+)/(?P<steps>\d+)(?: train_loss:(?P<train_loss>\S+))?"
    r"(?: val_loss:(?P<val_loss>\S+))? train_time:(?P<train_time_ms>[\d.]+)ms step_avg:(?P<step_avg_ms>\S+)ms"
)


def format_line(step: int, steps: int, train_time_ms: float, **losses: float) -> str:
    """The contest's log line; `losses` are train_loss or val_loss, in nats a token."""
    shown = "".join(f" {name}:{loss:.4f}" for name, loss in losses.items())
    average = train_time_ms / max(step, 1)
    return f"step:{step}/{steps}{shown} train_time:{train_time_ms:.0f}ms step_avg:{average:.2f}ms"


def parse_line(line: str) -> dict | None:
    """The numbers of a log line, ours or the contest's; None for any other text."""
    match = LINE.search(line)
    if match is None:
        return None
    numbers = {name: float(text) for name, text in match.groupdict().items() if text is not None}
    return numbers | {"step": int(match["step"]), "steps": int(match["steps"])}


# %%
import math

line = format_line(1750, 1750, 169_021.4, val_loss=3.27912)
print(line)
assert line == "step:1750/1750 val_loss:3.2791 train_time:169021ms step_avg:96.58ms"
assert parse_line(line)["val_loss"] == 3.2791 and parse_line(line)["train_time_ms"] == 169021
assert parse_line("peak memory allocated: 30220 MiB") is None
upstream = "step:0/1390 val_loss:10.8258 train_time:0ms step_avg:nanms"  # its step 0 has no average
assert parse_line(upstream)["val_loss"] == 10.8258 and math.isnan(
    parse_line(upstream)["step_avg_ms"]
)

# %% [markdown]
# `metrics.jsonl` has one JSON record a line, for programs. Its first record holds what is likeliest to differ next time: the configuration, the source and
# hash of every module, the versions, the GPUs.
#
# A log has one more duty. Disks fill up. A full disk must not kill a run that is otherwise healthy, and must not
# corrupt what has been written. So an append happens whole or not at all. If it fails its text is kept, and written together with the next one.


# %%
#| export lab.runlog
def append_whole(path: Path, text: str) -> OSError | None:
    """Append all of `text` or nothing; returns why, if it was nothing.

    A half line that a killed writer left at the end is cut off first.
    """
    try:
        # a buffer would be written when the file is closed
        with open(path, "ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (1 << 20)))
            tail = file.read()
            if tail and not tail.endswith(b"\n"):
                size -= len(tail) - (tail.rfind(b"\n") + 1)
                os.truncate(path, size)
            rest = memoryview(text.encode())
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                os.truncate(path, size)
                raise
    except OSError as error:
        return error
    return None


# %%
torn = scratch / "torn.jsonl"
torn.write_text('{"kind": "run"}\n{"kind": "val", "val_lo')  # a writer was killed here
assert append_whole(torn, '{"kind": "val"}\n') is None
assert [json.loads(line)["kind"] for line in torn.open()] == ["run", "val"]
assert isinstance(append_whole(scratch / "no" / "folder.txt", "lost?\n"), FileNotFoundError)
print("the half record is gone, the next one is whole")


# %%
#| export lab.runlog
class RunLog:
    """`log.txt` and `metrics.jsonl` in a run's folder. echo: called with each text line (print, or None)."""

    def __init__(self, folder: str | Path, echo=print):
        self.folder, self.echo, self.waiting = Path(folder), echo, {}
        self.folder.mkdir(parents=True, exist_ok=True)

    def record(self, kind: str, **fields) -> None:
        """One line of JSON: the kind of record, the time of day in seconds, and the fields."""
        self.append(
            "metrics.jsonl", json.dumps({"kind": kind, "time": round(time.time(), 3), **fields})
        )

    def line(self, text: str) -> None:
        """One line of text, kept and shown; if it cannot be shown, that is all."""
        self.append("log.txt", text)
        self.say(text)

    def say(self, text: str) -> None:
        if self.echo:
            with contextlib.suppress(OSError, ValueError):
                self.echo(text)

    def append(self, name: str, line: str) -> None:
        """Append a line, with whatever could not be written before; says so once when it begins to wait."""
        text = self.waiting.pop(name, "") + line + "\n"
        with contextlib.suppress(OSError):  # somebody may have removed it
            self.folder.mkdir(parents=True, exist_ok=True)
        error = append_whole(self.folder / name, text)
        if error is not None:
            self.waiting[name] = text
            if len(text) == len(line) + 1:
                wait = "going on, its lines wait in memory"
                self.say(f"{self.folder / name} cannot be written ({error.strerror}): {wait}")

    def lacking(self) -> list[str]:
        """The files that still lack lines, after one more try."""
        lost = [
            name for name, text in self.waiting.items() if append_whole(self.folder / name, text)
        ]
        self.waiting = {name: self.waiting[name] for name in lost}
        return lost


# %% [markdown]
# Lines that still wait when a run ends are asked for (`lacking`), and are then a problem. What cannot be shown on the screen is not kept for later: a closed terminal is no reason to stop, and the line stands in the file.
#
# A full disk can be had for nothing. The kernel refuses to let a file grow past a limit that a process may set for itself, in the middle of a line if need be:

# %%
import subprocess
import sys

full_disk = """
import resource, signal, sys
from speedrun.lab.runlog import RunLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log, (soft, hard) = RunLog(sys.argv[1], echo=None), resource.getrlimit(resource.RLIMIT_FSIZE)
log.line("written before")
resource.setrlimit(resource.RLIMIT_FSIZE, (60, hard))
log.line("written while there was no room for all of so long a line as this one is")
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
log.line("written after")
"""
if sys.platform != "win32":
    subprocess.run([sys.executable, "-c", full_disk, str(scratch / "run")], check=True)
    lines = (scratch / "run" / "log.txt").read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["before", "while", "after"]
    print(f"a full disk came and went: {len(lines)} lines, all of them whole")

# %% [markdown]
# Reading has to be as careful. A run that was interrupted and resumed repeats the steps after its last checkpoint, and the repetition is the truth:


# %%
#| export lab.metrics
import json
from pathlib import Path

from speedrun.lab.errors import UserError


def read_metrics(path: str | Path) -> list[dict]:
    """All records of a metrics.jsonl. A torn last line is skipped: its writer may be at work."""
    lines, records = Path(path).read_text(encoding="utf-8").splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                fix = "take that line out; the others are whole"
                raise UserError(f"{path}, line {number}: not a record: {error}", fix) from None
    return records


def series(records: list[dict], kind: str) -> list[dict]:
    """The records of one kind in order of their step; of several with one step (a resumed run) the last."""
    by_step = {record["step"]: record for record in records if record["kind"] == kind}
    return [by_step[step] for step in sorted(by_step)]


# %%
log = RunLog(scratch / "resumed", echo=None)
for step, loss in [
    (0, 5.7),
    (10, 3.0),
    (20, 2.5),
    (10, 3.1),
    (20, 2.6),
]:  # interrupted at 20, resumed from 10
    log.record("val", step=step, val_loss=loss)
    log.line(format_line(step, 20, 40.0 * step, val_loss=loss))
steps = series(read_metrics(scratch / "resumed" / "metrics.jsonl"), "val")
assert [(record["step"], record["val_loss"]) for record in steps] == [
    (0, 5.7),
    (10, 3.1),
    (20, 2.6),
]
logged = map(parse_line, (scratch / "resumed" / "log.txt").read_text().splitlines())
assert [numbers["val_loss"] for numbers in logged] == [5.7, 3.0, 2.5, 3.1, 2.6]
print([(record["step"], record["val_loss"]) for record in steps])

# %% [markdown]
# ### Results: numbers that remember where they come from
#
# A measured number does not say that its code has changed since. The code moves on, the figure stays, and after a year nobody knows whether the claim beside it still
# holds. We cannot measure everything again at every change. We can make every number carry enough to know *whether* it should be.
#
# Each measurement in this book is a JSON file under `book/results/`, and carries a **stamp**: the GPU, the driver, the versions, the command, the
# corpus, the seeds, the number of runs, the date, and a hash of every module that the measured command imported. What should such a hash see? Changing a constant
# changes behaviour; writing a comment does not. So it is taken of the syntax tree, without comments, docstrings and line numbers. The tree is written out by hand, because Python's
# own `ast.dump` prints a different text in every other version.

# %%
#| export lab.provenance
import ast
import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path

import speedrun
from speedrun.lab.errors import UserError
from speedrun.lab.hardware import detect_machine, run_tool


def is_docstring(node) -> bool:
    """A string that stands as a statement of its own."""
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def canonical(node) -> str:
    """A syntax tree as text, without docstrings, positions and empty fields: every Python version agrees on it."""
    if isinstance(node, list):
        return "[" + ",".join(canonical(item) for item in node if not is_docstring(item)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    names = sorted(set(node._fields) - {"ctx", "kind", "type_ignores"})
    fields = [(name, getattr(node, name, None)) for name in names]
    shown = [f"{name}={canonical(value)}" for name, value in fields if value not in (None, [])]
    return f"{type(node).__name__}({','.join(shown)})"


# %%
#| export lab.provenance
def code_hash(source: str) -> str:
    """Sixteen hex digits that change with the code, and not with its comments, docstrings or layout."""
    return hashlib.sha256(canonical(ast.parse(source)).encode()).hexdigest()[:16]


# %%
def file_hash(source: str) -> str:
    """Sixteen hex digits of the text as it stands."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


short = "def area(r):\n    pi = 3.14\n    return pi * r * r\n"
changes = {
    "a comment": short.replace("3.14\n", "3.14  # roughly\n"),
    "a blank line": short.replace("    return", "\n    return"),
    "a docstring": short.replace("    pi", '    "Of a circle."\n    pi', 1),
    "a constant": short.replace("3.14", "3.1416"),
    "a local name": short.replace("pi", "ratio"),
}
seen = {name: code_hash(text) != code_hash(short) for name, text in changes.items()}
assert all(file_hash(text) != file_hash(short) for text in changes.values())
assert seen == dict(zip(changes, (False, False, False, True, True)))
print("the tree sees:", ", ".join(name for name in changes if seen[name]))
print("only the file:", ", ".join(name for name in changes if not seen[name]))

# %% [markdown]
# Both hashes see too much, each in its way: the file's changes with every comment, and the tree's with the name of a variable, which computes the same. Neither sees PyTorch; its version stands in the stamp as it is.
#
# Which modules does a command run? Those that it imports, and those that they import. We follow the `import` statements in the files, without executing any. The files are found from the
# package itself: a notebook can be started anywhere. A run also notes the commit, if there is one. A downloaded archive has none; unpacked inside somebody's repository, it must not be given theirs, as git would by itself.


# %%
#| export lab.provenance
def root() -> Path:
    """The project's folder, found from the package's own file and never from the working directory."""
    folder = Path(speedrun.__file__).resolve().parent.parent
    if not (folder / "book" / "data").is_dir():
        what = f"there is no project around {folder / 'speedrun'}: book/data is missing"
        raise UserError(what, "pip install -e . in a clone of the repository")
    return folder


def module_file(name: str) -> Path | None:
    """The file of a module such as speedrun.lab.stats; None if there is no such module."""
    path = Path(speedrun.__file__).resolve().parent.joinpath(*name.split(".")[1:])
    candidates = (
        [path.with_suffix(".py"), path / "__init__.py"] if name.startswith("speedrun.") else []
    )
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def commit() -> str:
    """The commit of this project; "" without git, or where this folder has no repository of its own, whatever is around it."""
    # named outright, git neither looks in the folders above nor obeys GIT_DIR, which its hooks set
    command = ["git", f"--git-dir={root() / '.git'}", "rev-parse", "--verify", "HEAD"]
    return run_tool(command, 30).strip()


# %%
assert (root() / "notebooks" / "96_logs_and_stamps.py").is_file()
assert re.fullmatch("([0-9a-f]{40,64})?", commit())
assert (
    module_file("speedrun.lab.stats").name == "stats.py"
    and module_file("speedrun.nonsense") is None
)
assert module_file("torch") is None, (
    "other people's modules are named by their version, not by a hash"
)


# %%
#| export lab.provenance
def imported_names(source: str) -> set[str]:
    """Dotted names that the source imports anywhere, functions included; `from a import b` counts as a and a.b, and a module that `import_module` is told by name as well."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {str(each.value) for each in node.args if isinstance(each, ast.Constant)}
    return names


def module_hashes(names) -> dict[str, str]:
    """Module → code hash, for the given modules of the package and all that they import, directly or not."""
    hashes, queue = {}, list(names)
    while queue:
        name = queue.pop()
        file = module_file(name)
        if file is not None and name not in hashes:
            source = file.read_text(encoding="utf-8")
            hashes[name] = code_hash(source)
            queue += imported_names(source)
    return dict(sorted(hashes.items()))


# %%
hashes = module_hashes(["speedrun.lab.provenance"])
assert "speedrun.lab.hardware" in hashes and "speedrun.lab.stats" not in hashes
assert "speedrun.lab.stats" in imported_names("def f():\n    from speedrun.lab import stats")
print(hashes)

# %% [markdown]
# The stamp is taken by the script that measures (`scripts/measure.py`) and compared when a page is built:


# %%
#| export lab.provenance
def stamp(command: str, modules, n: int, seeds=(), corpus: dict | None = None) -> dict:
    """Where, when and with what something was measured. modules: those that the command starts.

    n: runs, or repetitions of a timing. corpus: {"name": …, "sha256": …}, None if no text was read.
    """
    machine = detect_machine()
    names = ", ".join(sorted({gpu.name for gpu in machine.gpus}))
    return {
        "gpu": f"{len(machine.gpus)}×{names}" if names else None,
        "cpu": f"{machine.cores} cores, {machine.system}",
        "driver": machine.gpus[0].driver if machine.gpus else None,
        "python": machine.python,
        "torch": machine.versions["torch"],
        "triton": machine.versions["triton"],
        "command": command,
        "corpus": corpus,
        "seeds": list(seeds),
        "n": n,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "modules": module_hashes(modules),
    }


# %%
#| export lab.results
import csv
import json
from pathlib import Path

from speedrun.lab.errors import UserError
from speedrun.lab.files import atomic_write


def freshness(result: dict) -> str:
    """`fresh`: the measured code is today's. `same behaviour`: it changed, and was shown to train bit-equally. Else `stale`."""
    measured, proved = result["stamp"]["modules"], result.get("proof", {}).get("modules")
    today = module_hashes(measured)
    return "fresh" if today == measured else "same behaviour" if today == proved else "stale"


# %%
now = {
    "stamp": stamp(
        "python scripts/measure.py example", ["speedrun.lab.stats"], n=3, seeds=(0, 1, 2)
    )
}
old = {"stamp": now["stamp"] | {"modules": {"speedrun.lab.stats": "0" * 16}}}
proved = old | {"proof": {"modules": module_hashes(["speedrun.lab.stats"])}}
assert [freshness(result) for result in (now, old, proved)] == ["fresh", "stale", "same behaviour"]
print({name: now["stamp"][name] for name in ("gpu", "cpu", "torch", "n", "date")})

# %% [markdown]
# *Same behaviour* is the useful middle. A refactoring changes the hash and not the arithmetic. `make stale PROVE=1` checks out the commit that brought the
# result, trains twenty steps with the code of then and of now on one machine, and compares the losses bit by bit. Losses then still stand. Times do
# not, and the badge on the page says so.
#
# What remains is to load and save in one place, so that everything that a page has read is known. A list of the files that were read is how the page you are reading knows that it is out of date when a
# measurement that it draws is replaced.


# %%
#| export lab.provenance
def note_opened(path: Path) -> None:
    """Tell whoever executes this notebook that it read `path`, so that a change of the file runs it again."""
    opened_files = os.environ.get("SPEEDRUN_OPENED")
    if opened_files:
        with open(opened_files, "a", encoding="utf-8") as file:
            file.write(f"{Path(path).resolve()}\n")


# %%
#| export lab.results
def public_table(name: str) -> list[dict]:
    """A table of the public record history, book/data/<name>.csv, as dicts of strings: records, curves, variance, or chain9 (record 9, one change after the other)."""
    path = root() / "book" / "data" / f"{name}.csv"
    note_opened(path)
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# %%
before = os.environ.get("SPEEDRUN_OPENED")
os.environ["SPEEDRUN_OPENED"] = str(scratch / "opened")
assert public_table("records")[0]["record"] == "1"
os.environ.pop("SPEEDRUN_OPENED") if before is None else os.environ.update(SPEEDRUN_OPENED=before)
assert (scratch / "opened").read_text().strip().endswith("records.csv")

# %% [markdown]
# Our own measurements are saved and loaded by two names, the chapter's and their own. One that nobody has made yet is refused, with the command that makes it: a page cannot be built on a number that somebody remembers. What stands at the foot of a figure is computed from the stamp, freshness included, so that a reader sees whether a time was measured with other code.


# %%
#| export lab.results
def result_path(slug: str, name: str) -> Path:
    """Where a measurement is kept: book/results/<slug>/<name>.json."""
    return root() / "book" / "results" / slug / f"{name}.json"


def result_names(slug: str) -> list[str]:
    """The names of all measurements of a chapter."""
    return sorted(path.stem for path in result_path(slug, "").parent.glob("*.json"))


def save_result(slug: str, name: str, data, stamp: dict) -> Path:
    """Write a measurement, in one step."""
    path = result_path(slug, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"stamp": stamp, "data": data}, indent=1, ensure_ascii=False)
    atomic_write(path, text + "\n")
    return path


def load_result(slug: str, name: str) -> dict:
    """A measurement with its stamp: {"stamp": …, "data": …}."""
    path = result_path(slug, name)
    note_opened(path)
    if not path.is_file():
        what = f"book/results/{slug}/{name}.json does not exist: nobody has measured that yet"
        raise UserError(what, f"python scripts/measure.py {slug} {name}")
    return json.loads(path.read_text(encoding="utf-8"))


# %%
try:
    load_result("are_you_faster", "of_course")
    raise AssertionError("found a measurement that nobody made")
except UserError as problem:
    assert "nobody has measured" in problem.what
    print(problem)


# %%
#| export lab.results
def measured_on(result: dict) -> str:
    """One line for the foot of a figure: hardware, versions, text, runs, date and freshness."""
    stamp = result["stamp"]
    corpus = f", {stamp['corpus']['name']}" if stamp["corpus"] else ""
    where = f"{stamp['gpu'] or stamp['cpu']}, torch {stamp['torch']}{corpus}"
    return f"measured on {where}, n={stamp['n']}, {stamp['date']} ({freshness(result)})"


def figure_style() -> None:
    """The look of the book's figures: call it once, before the first one."""
    from matplotlib import style

    style.use(root() / "book" / "figures.mplstyle")


# %%
assert measured_on(now).endswith("(fresh)") and f"torch {now['stamp']['torch']}" in measured_on(now)
print(measured_on(now))

# %% [markdown]
# ## What it costs, and when it fails
#
# To see whether somebody left half a line, an append reads the end of the file, up to a megabyte of it. What a record costs in a new log, and in one of two megabytes:

# %%
timed = {}
for name, before in (("new", 1), ("long", 20_000)):
    log = RunLog(scratch / name, echo=None)
    log.append(
        "metrics.jsonl", "\n".join([json.dumps({"kind": "note", "text": "x" * 70})] * before)
    )
    began = time.perf_counter()
    for step in range(300):
        log.record("train", step=step, train_loss=3.28)
    timed[name] = 1e6 * (time.perf_counter() - began) / 300
    assert len(series(read_metrics(scratch / name / "metrics.jsonl"), "train")) == 300
assert (scratch / "long" / "metrics.jsonl").stat().st_size > 2_000_000 and not log.lacking()
print(", ".join(f"{name}: {each_us:.0f} µs a record" for name, each_us in timed.items()))

# %% [markdown]
# - **Whole is not yet safe.** An append is not waited for until it is on the disk, as a checkpoint is ([errors and files](93_errors_and_files.py)). After a power cut the last lines may be missing, or torn, or zeros.
# - **Two writers of one log** would cut off each other's half lines. A run's folder has one owner, and a lock that says so.
# - **The hash sees our modules and nothing below them.** A new PyTorch, a new driver or a warmer machine room can move a time by several per cent while every hash stays equal,
#   which is why the stamp also says when and where, and why kernels are compared in turn on one machine. Whole runs, in [chapter 24](24_speedrun.py), were made on different days and hosts; their dates stand beside them.
# - **A module that is imported by a name in a string** is not found by reading `import` statements. It has to be named to `stamp`.
#
# ## Exercises
#
# 1. A log tells when its run was interrupted, though nobody wrote that down: steps that had been done come again. Write `resumed_at(records)`, for records in the order in which they were written: the steps, in that order, at which the log went on after an interruption. Records of kind `val` and `train` both have a `step`, and a step may have one of each; other kinds have none. (A run may be resumed
# twice at one step.)


# %% tags=["solution"]
def resumed_at(records: list[dict]) -> list[int]:
    """Steps at which a log goes on after an interruption: a record whose step, for its kind, is not beyond the last."""
    last: dict[str, int] = {}
    steps: list[int] = []
    for record in records:
        kind, step = record["kind"], record.get("step")
        if step is not None and step <= last.get(kind, -1):
            steps.append(step)
            last = {}
        if step is not None:
            last[kind] = step
    return steps


# %%
def logged_as(text: str) -> list[dict]:
    """v10 is a validation at step 10, t10 a training record, r the record of a run."""
    kinds = {"v": "val", "t": "train", "r": "run"}
    return [{"kind": kinds[w[0]]} | ({"step": int(w[1:])} if w[1:] else {}) for w in text.split()]


for written, right in (
    ("r v0 t0 t5 t10 v10 t15 t20 v20", []),
    ("r v0 v10 v20 r v10 v20", [10]),
    ("r v0 v10 r v10 v20", [10]),
    ("r v0 v10 v20 r v10 v20 r v10", [10, 10]),
    ("r v0 t0 t5 r t5 t10 v10 r t10", [5, 10]),
    ("r v0 t0 t5 v10 t10 r v10 t10 v20", [10]),
):
    told = resumed_at(logged_as(written))
    assert told == right, f"{written}: went on at {right}, and not at {told}"
print(
    "the log above was resumed at", resumed_at(read_metrics(scratch / "resumed" / "metrics.jsonl"))
)

# %% [markdown]
# 2. A hash of a module makes every result doubtful that imported it, though perhaps a function has changed that the result never called. Write `changed_functions(before, after)` for the sources of two versions of a module: the names of the functions at its top level that are new, are gone, or have other code; what `code_hash` does not see is no change.
#    What would still have to be known before one of these results can be believed again? (What calls what; and what stands outside of functions.)


# %% tags=["solution"]
def changed_functions(before: str, after: str) -> set[str]:
    """Names of the top-level functions that two versions of a module do not share."""
    versions = []
    for source in (before, after):
        functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
        versions.append({node.name: code_hash(ast.unparse(node)) for node in functions})
    old, new = versions
    return {name for name in old | new if old.get(name) != new.get(name)}


# %%
two = short + "\n\ndef twice(x):\n    return 2 * x\n"
for what, version, right in (
    ("a comment in area", two.replace("3.14\n", "3.14  # roughly\n"), set()),
    ("another constant in area", two.replace("3.14", "3.1416"), {"area"}),
    ("twice in front of area", two[len(short) :] + "\n\n" + short, set()),
    ("twice is gone", short, {"twice"}),
    ("twice is called double", two.replace("twice", "double"), {"twice", "double"}),
    ("a docstring in twice", two.replace("(x):\n", '(x):\n    "Of x."\n'), set()),
):
    told = changed_functions(two, version)
    assert told == right, f"{what}: changed are {right or 'none'}, and not {told or 'none'}"
print("with another constant:", changed_functions(two, two.replace("3.14", "3.1416")))

# %% tags=["remove-cell"]
import shutil

shutil.rmtree(scratch)
