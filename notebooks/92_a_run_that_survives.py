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
#     alone: true
#     modules: [speedrun.command, speedrun.heartbeat, speedrun.supervise]
# ---

# %% [markdown]
# # Workshop: a run that survives
#
# ```{admonition} Cost box
# Half a minute on two CPU cores; there is nothing for a GPU to do. No record: the contest's runs take minutes, and are watched by somebody. The failures on this page are those of longer and lonelier runs: some were reported by users of other projects, most were met on this one.
# ```
#
# ## The problem
#
# A run on eight GPUs is a tree of ten processes: a launcher (here this notebook), PyTorch's starter `torchrun`, and eight *ranks*, which train, one per GPU. Any of them can die, and when one does, who tells the others? The operating system does not: a child whose parent is gone simply goes on, and `torchrun` even gives every rank a session of its own. Watch it happen, with two ranks that
# do nothing but sleep:

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
import tempfile
from pathlib import Path

scratch = Path(tempfile.mkdtemp())

# %%
import subprocess
import sys
import time

import psutil

sleeper = scratch / "sleeper.py"
sleeper.write_text(
    "import sys, time\nsys.stdout.write('up\\n')\nsys.stdout.flush()\ntime.sleep(600)\n"
)
command = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
    str(sleeper),
]
torchrun = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
assert torchrun.stdout.readline() == torchrun.stdout.readline() == "up\n"
sleepers = psutil.Process(torchrun.pid).children()
torchrun.kill()  # SIGKILL: no handler runs
torchrun.wait()
gone, alive = psutil.wait_procs(sleepers, timeout=2)
for process in alive:
    process.kill()
assert len(alive) == 2
print(f"torchrun was killed; two seconds later {len(alive)} of 2 ranks are still there")

# %% [markdown]
# On a rented machine each of those holds a GPU, its memory, and your credit card, until somebody logs in and looks. The kernel's out-of-memory killer produces this situation. So can a cancelled job, a lost connection, a restarted notebook kernel.
#
# ```{admonition} Prediction
# The remedies that come to mind are a `finally` block, a handler for SIGTERM, killing the process group. **Which of them runs when the launcher gets SIGKILL?** And if none does: what can a rank observe, from where it is, that *changes* when its launcher dies?
# ```

# %% [markdown]
# ## The idea
#
# No process cleans up after its own SIGKILL, so cleaning up cannot be the launcher's duty. Instead, every rank watches for the two things that do change when the tree above it breaks. Its standard input is the reading end of a pipe that only the launcher holds open; the kernel closes it when the launcher dies, however it dies. And its parent's process number changes when `torchrun` does. We call this watch a *lifeline*. (Linux can also be asked to kill a child when its parent dies, with `prctl(PR_SET_PDEATHSIG)`, even one that hangs. It works on Linux only; and of its signals SIGKILL leaves no time to save, while SIGTERM does not end a rank that hangs. So it would be a second lifeline and not the first.)
#
# A run survives by three agreements, and each of them has two ends:
#
# - between a rank and the disk: a **checkpoint** is there whole or not at all, and nothing in it is believed;
# - between a rank and whoever watches it: a **heartbeat**, a small file that one end writes and the other end reads;
# - between the ranks: the step before which **all** of them stop.
#
# What stands above them, the *supervisor*, only needs to start the ranks, listen, and end those that are silent.
#
# ## The code
#
# ### Signal handling
#
# Ctrl-C, a service manager and a closing terminal all ask for the same: stop, but save first. Python's own answer to Ctrl-C is an exception, and an exception between two collectives is how one rank leaves the others waiting. So a signal is noted, and looked at between steps.

# %%
#| default_exp heartbeat
#| export
import contextlib
import faulthandler
import json
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from speedrun.lab.errors import UserError
from speedrun.ranks import Ranks


# %%
#| export
class Interrupts:
    """SIGINT, SIGTERM and SIGHUP (a terminal that closes) as a request, looked at between steps.

    A second Ctrl-C, a second later or more, insists. Other repetitions do not: a terminal that closes may say so twice.
    """

    signal: int | None = None
    since: float = 0.0
    training: bool = False  # there is something to save

    def install(self) -> None:
        """Take over the signals of this process (main thread only); SIGHUP not where it is ignored, as under nohup."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is None or name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN:
                continue
            signal.signal(number, self.note)

    def note(self, number: int, frame=None) -> None:
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.since > 1:
            os._exit(
                128 + number
            )  # no exception, which could get lost; files are whole or not there


# %%
asked = Interrupts()
for number in (signal.SIGTERM, signal.SIGINT):  # a service manager may send both at once
    asked.note(number)
assert asked.signal == signal.SIGTERM, "the first counts, and nobody has insisted"

# %% [markdown]
# ### Orphaned ranks: the lifeline
#
# A launcher that is killed cannot clean up after itself, and a GPU that is held by an orphan is found by the next user. So each rank under a launcher ends itself when its standard input comes to its end, or when its parent process is no longer the one that started it. It is given ten seconds to save.


# %%
#| export
def lifeline(interrupts: Interrupts | None = None, grace_s: float = 10.0) -> None:
    """End this process when its launcher dies: standard input ends, or the parent changes. Only under a launcher.

    With `interrupts` a run that trains is asked to stop first, so that it can save, and has `grace_s` seconds for that.
    The launcher's number is in SPEEDRUN_LIFELINE: a parent that is not its child by now was lost while we were imported.
    """
    launcher, parent = os.environ.get("SPEEDRUN_LIFELINE"), os.getppid()
    if not launcher:
        return
    with contextlib.suppress(psutil.Error):
        if psutil.Process(parent).ppid() != int(launcher):
            parent = -1

    def end_when(launcher_is_gone) -> None:
        while not launcher_is_gone():
            pass
        if interrupts is not None and interrupts.training:
            interrupts.note(signal.SIGTERM)
            time.sleep(grace_s)
        os._exit(70)

    def parent_changed() -> bool:
        time.sleep(0.5)
        return os.getppid() != parent

    for sign in (lambda: not os.read(0, 1), parent_changed):
        threading.Thread(target=end_when, args=(sign,), daemon=True).start()


# %%
orphan = "from speedrun.heartbeat import lifeline; lifeline(); import time; print('up', flush=True); time.sleep(600)"
held = {
    "stdin": subprocess.PIPE,
    "stdout": subprocess.PIPE,
    "env": os.environ | {"SPEEDRUN_LIFELINE": str(os.getppid())},
}
child = subprocess.Popen([sys.executable, "-c", orphan], **held)
assert child.stdout.readline().strip() == b"up"
child.stdin.close()
assert child.wait(timeout=10) == 70
print("the launcher's end of the pipe closed; the rank ended itself")

# %% [markdown]
# ### Heartbeats
#
# Whoever watches a run from outside must be able to tell a rank that thinks from a rank that hangs. A ten-minute compilation is not a hang; five minutes without a micro-batch are. So each rank keeps a small file that says in which phase and at which step it is, with a number that grows whenever something happened. The file has its full length from the start and is written over in place: that needs no room on a disk which is full by now. And it tells no time. A clock may jump (a laptop wakes up, a network sets it right), so it is the watcher who measures, with a clock of its own, since when the number has not changed.


# %%
#| export
class Heartbeat:
    """A file per rank: phase, step, process, and a count of whatever has happened. Raises OSError if it cannot be made.

    Beside it lies the rank's slot for `agree_on_stop`, empty, and the file for the stack that SIGUSR1 asks for.
    """

    def __init__(self, folder: Path, rank: int):
        self.path = folder / "heartbeat" / f"rank{rank}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_name(f"stop{rank}").write_text(" " * SLOT)
        if hasattr(signal, "SIGUSR1"):  # even a rank that hangs writes down where
            self.stack = open(self.path.with_suffix(".stack"), "w")
            faulthandler.register(signal.SIGUSR1, file=self.stack)
        self.file = open(self.path, "wb", buffering=0)
        self.step, self.count = 0, 0
        self.phase("start")

    def phase(self, name: str, step: int | None = None) -> None:
        """Enter a phase: start, data, build, compile, train, validate, checkpoint or end. step: the last one's, if not given."""
        self.name = name
        self.beat(step)

    def beat(self, step: int | None = None) -> None:
        """Something happened (microseconds)."""
        self.step, self.count = self.step if step is None else step, self.count + 1
        facts = {"phase": self.name, "step": self.step, "pid": os.getpid(), "count": self.count}
        with contextlib.suppress(OSError):  # a folder that is gone must not stop a run
            self.file.seek(0)
            self.file.write(json.dumps(facts).ljust(120).encode())

    def over(self, batches: Iterable) -> Iterator:
        """The same batches, with a beat after each."""
        for batch in batches:
            yield batch
            self.beat()


SLOT = 20  # characters of a step's number


# %%
#| export
@dataclass(frozen=True, order=True)
class RankStatus:
    """What a rank's heartbeat says."""

    rank: int
    phase: str
    step: int
    pid: int
    count: int


def read_heartbeats(folder: Path) -> list[RankStatus]:
    """The heartbeats of a run's ranks, in order."""
    found = []
    for path in (folder / "heartbeat").glob("rank*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):  # it is being written just now
            facts = json.loads(path.read_text())
            found.append(RankStatus(int(path.stem[4:]), **facts))
    return sorted(found)


# %%
heartbeat = Heartbeat(scratch, 3)
heartbeat.phase("compile")
first = json.loads(heartbeat.path.read_text())
assert first == {"phase": "compile", "step": 0, "pid": os.getpid(), "count": 2}
size = heartbeat.path.stat().st_size
heartbeat.beat(step=1_000_000)
assert json.loads(heartbeat.path.read_text()) == first | {"step": 1_000_000, "count": 3}
assert heartbeat.path.stat().st_size == size, "written over in place"
(status,) = read_heartbeats(scratch)
assert (status.rank, status.phase, status.step) == (3, "compile", 1_000_000)
print(status)

# %% [markdown]
# ### Graceful shutdown of several ranks
#
# With several ranks stopping is harder than it sounds. The signal reaches them at slightly different moments, and a rank that stops before step 500 while another enters it leaves that one waiting for a sum that never comes. Nor may a rank that was asked to stop wait until the others have been: they would wait for *its* gradients. So it writes down at which step it is, and goes on training. Once all have written, all stop one step after the largest of the numbers. (`Ranks`, from [chapter 23](23_training_loop.py), is a rank's number, how many there are, and its device.) Nobody can be past it, since no step ends without everybody. (But for `optim.adam.every`: a step that updates nothing sums nothing, so then they stop that many steps after it.)


# %%
#| export
def agree_on_stop(
    folder: Path, ranks: Ranks, step: int, since: float, every: int = 1, patience_s: float = 20.0
) -> int | None:
    """The step before which all ranks stop; None while some have not been asked. Never waits: ask again next step.

    since: when this rank was asked (time.monotonic). every: steps from one at which all ranks meet to the next. A slot is written over in place, which works on a full disk, too.
    """
    if ranks.world == 1:
        return step
    slots = [folder / "heartbeat" / f"stop{rank}" for rank in range(ranks.world)]
    told = [path.read_text().strip() if path.exists() else "" for path in slots]
    if not told[ranks.rank]:
        told[ranks.rank] = str(step)
        with contextlib.suppress(OSError), open(slots[ranks.rank], "r+") as slot:
            slot.write(f"{step:{SLOT}d}")
    if all(told):
        return max(map(int, told)) + every
    if time.monotonic() - since > patience_s:
        found = sum(map(bool, told))
        what = f"rank {ranks.rank} was asked to stop, but only {found} of {ranks.world} ranks were"
        raise UserError(what, "interrupt the launcher, not a rank")
    return None


# %% [markdown]
# Play it with two ranks whose steps end at a barrier, as real ones do at the sum. Rank 0 is asked before step 5; rank 1 an instant later, when it has already looked and gone into that step:

# %%
import torch

cpu = torch.device("cpu")
together, stopped = threading.Barrier(2), {}


def play(rank: int, asked_before: int) -> None:
    """Play one of two ranks that is asked to stop before a step."""
    step, stop_at = 0, None
    while step < 50:
        if step >= asked_before and stop_at is None:
            two = Ranks(rank, 2, cpu)
            stop_at = agree_on_stop(scratch / "two", two, step, time.monotonic())
        if step == stop_at:
            break
        together.wait(timeout=5)
        step += 1
    stopped[rank] = step


for rank in (0, 1, 2):
    Heartbeat(scratch / "two", rank)
(scratch / "two" / "heartbeat" / "stop2").write_text("40")  # of a run that once had three ranks
players = [threading.Thread(target=play, args=asked) for asked in ((0, 5), (1, 6))]
for player in players:
    player.start()
for player in players:
    player.join()
assert stopped == {0: 7, 1: 7}
Heartbeat(scratch / "nine", 0)
alone_of_nine = (scratch / "nine", Ranks(0, 9, cpu))
assert agree_on_stop(*alone_of_nine, step=7, since=time.monotonic()) is None
try:
    agree_on_stop(*alone_of_nine, step=8, since=time.monotonic() - 21)
    raise AssertionError("eight ranks were never asked")
except UserError as problem:
    print(f"asked before steps 5 and 6, both stop before step {stopped[0]}; and {problem.what}")

# %% [markdown]
# ### Checkpoints
#
# A checkpoint is a folder: weights and optimizer state as *safetensors*, a format that holds numbers and cannot hold code, and a JSON file with the rest. The folder is written under another name, waited for until the disk has it, and renamed when it is complete: a process that is killed, or a power cut, leaves it whole or not at all. An older checkpoint is deleted only once the next one stands, and only under a name that the trainer itself makes (a copy called `step-0000020-good` is somebody's, and stays).
#
# It may come back from anywhere: another disk, another user, another program. So nothing in it is believed. Each tensor file's SHA-256 stands in the JSON file, names, shapes and dtypes are compared before a number is copied (a moment of a wrong shape once made the fused AdamW write past the end of its memory), and the facts must be of their types and agree with the folder's name.

# %%
#| default_exp checkpoint
#| export
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from speedrun.lab.errors import UserError, quoted, visible
from speedrun.lab.files import atomic_write, file_sha256, sync

# %%
#| export
KEPT = 2


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first: of the folder's entries those that `save_checkpoint` names."""
    found = {
        int(step[1]): path
        for path in (folder / "checkpoints").glob("step-*")
        if (step := re.fullmatch(r"step-(\d{7,})", path.name)) and path.is_dir()
    }
    return [found[step] for step in sorted(found)]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write named tensors to the disk; returns the file's SHA-256."""
    # copies, since small parameters may be views of one storage
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, path)
    path.chmod((path.parent / "state.json").stat().st_mode)  # safetensors shuts out all other users
    sync(path)
    return file_sha256(path)


# %%
#| export
def save_checkpoint(folder: Path, step: int, weights: dict, moments: dict, facts: dict) -> Path:
    """Save named tensors and facts, whole or not at all; keeps the last two. Raises OSError, leaving no rest."""
    path = folder / "checkpoints" / f"step-{step:07d}"
    part = path.with_suffix(".part")
    try:
        for rest in path.parent.glob("step-*.part"):  # of a process that was killed
            shutil.rmtree(rest, ignore_errors=True)
        part.mkdir(parents=True)
        atomic_write(part / "state.json", "")
        tensors = {"model": weights, "optimizer": moments}
        hashes = {k: write_tensors(part / f"{k}.safetensors", v) for k, v in tensors.items()}
        facts = {"step": step, **facts, "sha256": hashes}
        atomic_write(part / "state.json", json.dumps(facts, indent=1))
        retire(path)
        os.replace(part, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        full = (
            errno.ENOSPC if "No space left" in str(error) else None
        )  # safetensors gives no number
        why = getattr(error, "strerror", None) or str(error)
        raise OSError(getattr(error, "errno", full), why, str(path)) from None
    others = [other for other in checkpoints(folder) if other != path]
    for old in others[: 1 - KEPT]:
        retire(old)
    return path


def retire(path: Path) -> None:
    """Remove a checkpoint, under another name, so that a half-removed one is never taken for a whole one."""
    if path.exists():
        aside = path.with_name(f"{path.name}-old.part")
        os.replace(path, aside)
        shutil.rmtree(aside, ignore_errors=True)


# %%
weights = {"w": torch.randn(3, 4), "b": torch.zeros(4)}
told = {"config": {}, "position": [0, 0, 0], "train_time_ms": 1.5, "data_sha256": "0" * 64, "vocab_size": 288, "tokenizer": "bytes"}  # fmt: skip
for step in (10, 20, 30):
    newest = save_checkpoint(scratch, step, weights, {"w/exp_avg": torch.ones(3, 4)}, told)
    if step == 10:
        shutil.copytree(newest, newest.with_name("step-0000010-good"))
assert [path.name for path in checkpoints(scratch)] == ["step-0000020", "step-0000030"]
assert newest.with_name("step-0000010-good").is_dir(), "somebody's copy is not ours to remove"
assert len({path.stat().st_mode for path in newest.iterdir()}) == 1, "read by all or by none"

# %%
#| export
RESUMABLE_FIELDS = (
    "max_steps",
    "data.path",
    "device",
    "backend",
)  # what may change when a run goes on
FACTS: dict[str, Any] = {
    "step": lambda v: type(v) is int and v >= 0,
    "config": lambda v: type(v) is dict,
    "position": lambda v: type(v) is list and len(v) == 3 and all(type(n) is int and n >= 0 for n in v),
    "train_time_ms": lambda v: type(v) in (int, float) and 0 <= v < math.inf,
    "data_sha256": lambda v: type(v) is str and re.fullmatch("[0-9a-f]{64}", v),
    "vocab_size": lambda v: type(v) is int and 0 < v <= 1 << 16,
    "tokenizer": lambda v: type(v) is str,
    "world": lambda v: v is None or type(v) is int and 0 < v <= 1 << 16,
}  # fmt: skip


def damaged(path: Path, why: object) -> UserError:
    """What to say about a checkpoint that is not whole, and the way on, which removes nothing."""
    run = path.parent.parent
    others = [other.name for other in checkpoints(run) if other != path]
    again = (
        f"then the run goes on from {others[-1]}"
        if others
        else "and begin again with another --out"
    )
    fix = f"put it aside (mv {quoted(path)} {quoted(run)}/), {again}"
    return UserError(f"{path} is not a whole checkpoint: {visible(why)}", fix)


def readable(path: Path) -> Path:
    """The path itself, after trying to open it: a file that may not be read is not a damaged one."""
    try:
        open(path, "rb").close()
    except PermissionError:
        fix = f"its owner can permit it: chmod -R a+rX {quoted(path.parent.parent.parent)}"
        raise UserError(f"{path} may not be read by this user", fix) from None
    except OSError as error:
        raise damaged(path.parent, f"{path.name}: {error.strerror}") from None
    return path


# %%
#| export
def load_facts(path: Path) -> dict:
    """What a checkpoint folder says about its run, each fact of its type. Raises UserError."""
    try:
        facts = {"world": None}  # which older checkpoints do not say
        facts |= json.loads(readable(path / "state.json").read_text(encoding="utf-8"))
        wrong = [name for name, holds in FACTS.items() if not holds(facts[name])]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(path, f"state.json: {type(error).__name__} {error}") from None
    if wrong:
        raise damaged(path, f"state.json: {wrong[0]} is {facts[wrong[0]]!r}")
    if checkpoints(path.parent.parent) and path.name != f"step-{facts['step']:07d}":
        raise damaged(path, f"state.json is of step {facts['step']}")
    return facts


def load_tensors(path: Path, kind: str, facts: dict) -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU; kind: model or optimizer. Raises UserError where a bit has changed."""
    file, hashes = readable(path / f"{kind}.safetensors"), facts.get("sha256")
    whole = isinstance(hashes, dict) and file_sha256(file) == hashes.get(kind)
    if hashes is not None and not whole:  # checkpoints of before 28 November 2026 have none
        raise damaged(path, f"the SHA-256 of {file.name} is not the one in state.json")
    try:
        return load_file(file)
    except (SafetensorError, ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
        raise damaged(path, error) from None


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """Weights, optimizer tensors and facts of a checkpoint folder, on the CPU."""
    facts = load_facts(path)
    return load_tensors(path, "model", facts), load_tensors(path, "optimizer", facts), facts


# %%
#| export
def latest_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint of a run."""
    found = checkpoints(folder)
    if not found:
        fix = "a run that ended before it saved begins again with another --out; its folder is not touched"
        raise UserError(
            f"{folder} has no checkpoint", fix if folder.exists() else "look for a misspelt name"
        )
    return found[-1]


def check_tensors(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise UserError unless two sets of named tensors have the same names, shapes and dtypes."""
    for name in sorted(found.keys() ^ wanted.keys()):
        raise damaged(path, f"{name} is {'missing' if name in wanted else 'not of this model'}")
    for name in found:
        here, right = (f"{tuple(t[name].shape)} {str(t[name].dtype)[6:]}" for t in (found, wanted))
        if here != right:
            raise damaged(path, f"{name} is {here}, and not {right}")


# %%
assert latest_checkpoint(scratch) == newest
back, moments, facts = load_checkpoint(newest)
check_tensors(newest, back, weights)
assert all(torch.equal(back[name], weights[name]) for name in weights) and facts["step"] == 30
tensors, state = newest / "model.safetensors", newest / "state.json"
whole_bytes, whole_state = tensors.read_bytes(), state.read_text()
flipped = bytearray(whole_bytes)
flipped[-1] ^= 1  # one bit of one number
for file, content in (
    (tensors, bytes(flipped)),
    (tensors, b"short"),
    (state, whole_state[:40].encode()),
    (state, whole_state.replace('"step": 30', '"step": 31').encode()),
    (state, whole_state.replace("1.5", "NaN").encode()),
):
    file.write_bytes(content)
    try:
        load_checkpoint(newest)
        raise AssertionError("accepted")
    except UserError as problem:
        assert "step-0000020" in problem.fix and "mv " in problem.fix
        print(problem.what.replace(str(scratch), "runs/example"))
    tensors.write_bytes(whole_bytes)
    state.write_text(whole_state)

# %% [markdown]
# What a run puts into such a folder, and how it goes on from one to the same bit, is [chapter 23](23_training_loop.py)'s. The rest of this page is the other process: the one that starts ranks, and watches them.
#
# ### Launching ranks: the rendezvous
#
# `torchrun` is started as a module, so that it need not be on the path, and with a pipe as its standard input, which the ranks inherit.
#
# It also needs a place where the ranks meet, and its usual place is a port that listens on *every* interface of the machine, and `torchrun` unpickles what it finds there: anybody in the network can run code as you. `--standalone`, a static rendezvous and `--local-addr` all leave it open. What does not listen is a *file*: torchrun's own store, and the one through which the ranks find
# each other, are two files in the run's folder, and what gloo and NCCL open after that is told to stay on the loopback interface. This also frees the run from the machine's own name, which need not resolve ([nanochat#42](https://github.com/karpathy/nanochat/issues/42)). Ranks on GPUs are also told how to keep memory ([chapter 16](16_compile.py)), unless the shell says otherwise.

# %%
#| default_exp supervise
#| export
import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
from annotated_types import Gt

from speedrun.lab.errors import UserError, quoted
from speedrun.lab.hardware import detect_machine


# %%
#| export
def loopback() -> str:
    """The name of the network interface that leads to this machine alone: lo on Linux, lo0 on macOS."""
    known = psutil.net_if_addrs().items()
    return next((name for name, own in known if any(a.address == "127.0.0.1" for a in own)), "lo")


def rank_environment(world: int, cores: int, folder: Path, device: str = "cpu") -> dict[str, str]:
    """The environment of ranks: a lifeline, a file to meet in, lines at once, and a fair share of the cores."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("PET_")}  # options for torchrun
    own |= {
        "SPEEDRUN_LIFELINE": str(os.getpid()),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    own |= {"SPEEDRUN_STORE": str(folder / "heartbeat" / "ranks"), "SPEEDRUN_DEVICE": device}
    own |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    usual = {
        "OMP_WAIT_POLICY": "passive",
        "GLOO_SOCKET_IFNAME": loopback(),
        "NCCL_SOCKET_IFNAME": loopback(),
    }
    if world > 1:  # else torchrun gives each rank one thread, and says so at length
        usual["OMP_NUM_THREADS"] = str(max(1, cores // world))
    if device == "cuda" and "PYTORCH_CUDA_ALLOC_CONF" not in own:  # the former name of this one
        usual["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # a fifth less is reserved
    return usual | own


# %%
#| export
def start_ranks(
    program: list[str], world: int, folder: Path, device: str = "cpu"
) -> subprocess.Popen:
    """Start torchrun with `world` ranks of a program: ["-m", module, …] or [script, …]."""
    options = {"rdzv-backend": "c10d", "rdzv-conf": "store_type=file", "rdzv-id": "run"}
    options |= {"rdzv-endpoint": str(folder / "heartbeat" / "torchrun"), "local-addr": "127.0.0.1"}
    options |= {"nnodes": "1", "nproc-per-node": str(world), "max-restarts": "0"}
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    torchrun += [f"--{name}={value}" for name, value in options.items()]
    return subprocess.Popen(
        [*torchrun, *program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=rank_environment(world, detect_machine().cores, folder, device),
        start_new_session=True,
    )


# %%
environment = rank_environment(world=2, cores=16, folder=scratch)
assert environment["SPEEDRUN_LIFELINE"] == str(os.getpid())
assert environment["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", "8")
talkers = scratch / "talkers.py"
talkers.write_text("from speedrun.command import print_line\nfrom speedrun.ranks import join_ranks\njoin_ranks('cpu', 'gloo')\nprint_line('met')\nimport time; time.sleep(600)\n")  # fmt: skip
(scratch / "meeting" / "heartbeat").mkdir(parents=True)
met = start_ranks([str(talkers)], 2, scratch / "meeting")
assert [met.stdout.readline(), met.stdout.readline()] == ["met\n", "met\n"]
tree = [psutil.Process(met.pid), *psutil.Process(met.pid).children(recursive=True)]
ports = [c.laddr for process in tree for c in process.net_connections() if c.status == "LISTEN"]
for process in reversed(tree):
    process.kill()
met.wait()
assert all(port.ip == "127.0.0.1" for port in ports), ports
print(f"torchrun and two ranks have met: {len(ports)} ports, all of them on the loopback interface")

# %% [markdown]
# ### Detecting a hung rank
#
# A heartbeat says in which phase its rank is. A phase has its own patience: a cold compilation may be silent for three quarters of an hour, a training step may not. A rank that waits for another is as patient as the one it waits for.
#
# How long has a rank been silent? Not "now minus the file's time": that compares two readings of a clock which others may set. A laptop that sleeps for an hour, or a network that corrects the time by ten minutes, made healthy runs look dead (of runs with steps of a second, four out of five). The launcher notes, by a clock of its own that only runs forward, since when the heartbeat *has not changed*.

# %%
#| export
Seconds = Annotated[float, Gt(0)]


@dataclass(frozen=True)
class Patience:
    """Seconds without a sign of life after which a rank hangs, by its phase."""

    start: Seconds = 300.0
    """Until a rank is there."""
    data: Seconds = 1800.0
    """Opening the data."""
    build: Seconds = 600.0
    """Building the model."""
    compile: Seconds = 2700.0
    """Compiling and warming up."""
    train: Seconds = 300.0
    """A micro-batch."""
    validate: Seconds = 600.0
    """A validation batch."""
    checkpoint: Seconds = 600.0
    """Saving."""
    end: Seconds = 120.0
    """Going away."""


# %%
#| export
def process_of(status: RankStatus, folder: Path) -> psutil.Process | None:
    """The process of a heartbeat, if it lives and its command line names this run: numbers of the dead are reused."""
    try:
        process = psutil.Process(status.pid)
        return process if str(folder) in " ".join(process.cmdline()) else None
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


class Silence:
    """Since when the heartbeats of a run's ranks have not changed, by this process's own clock."""

    def __init__(self, folder: Path, world: int, clock=time.monotonic):
        self.folder, self.clock, begin = folder, clock, clock()
        self.heard = {rank: (RankStatus(rank, "start", 0, 0, 0), begin) for rank in range(world)}

    def find_hung_rank(self, patience: Patience) -> tuple[RankStatus, float] | None:
        """The rank that has been silent for longest, and for how many seconds, if that is beyond everybody's patience.

        Ranks wait for each other, so the most patient phase counts for all.
        """
        now = self.clock()
        for status in read_heartbeats(self.folder):
            if self.heard.get(status.rank, (None,))[0] != status:
                self.heard[status.rank] = status, now
        heard = self.heard.values()
        here = [(s, since) for s, since in heard if s.phase != "end" or process_of(s, self.folder)]
        limit = max((getattr(patience, status.phase) for status, _ in here), default=0.0)
        late = [(status, now - since) for status, since in here if now - since > limit]
        return max(late, key=lambda found: found[1], default=None)


# %%
def said_after(seconds: float, *phases: str, world: int = 0) -> tuple[RankStatus, float] | None:
    """What is said of ranks in these phases that have been silent for so long."""
    folder, now = Path(tempfile.mkdtemp(dir=scratch)), [0.0]
    for rank, phase in enumerate(phases):
        Heartbeat(folder, rank).phase(phase, 12)
    silence = Silence(folder, world, clock=lambda: now[0])
    assert silence.find_hung_rank(Patience()) is None
    now[0] = seconds
    return silence.find_hung_rank(Patience())


late, long = said_after(400, "train", "train")
assert (late.rank, late.step, late.pid, long) == (0, 12, os.getpid(), 400)
assert said_after(1000, "compile", "train") is None, "one waits for the other"
assert said_after(400, "checkpoint", "end") is None, "gone, and that is fine"
assert said_after(400, "train", world=2)[0].rank == 0 and said_after(299, world=2) is None
assert said_after(301, world=1)[0].phase == "start", "a rank that never came"
print(
    f"rank {late.rank} is silent for {long:.0f} s in phase {late.phase}, step {late.step}: it hangs"
)

# %% [markdown]
# A rank that hangs is asked where. It has a handler for one signal that writes the stack of its threads into a file, and that works even when Python's main thread is stuck in a C function, waiting for a message that does not come.


# %%
#| export
def stack_trace(folder: Path, status: RankStatus, family: set[psutil.Process]) -> str:
    """Where a silent rank is: the innermost line of its main thread; empty if it cannot even say that.

    Only own descendants (`family`) are asked: the signal would end a process that does not expect it.
    """
    path = folder / "heartbeat" / f"rank{status.rank}.stack"
    try:
        rank = next(process for process in family if process.pid == status.pid)
        rank.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        lines = path.read_text().rpartition("Current thread")[2].splitlines()
    except (StopIteration, AttributeError, OSError, psutil.Error):  # Windows, or the rank is gone
        return ""
    frames = [line.strip() for line in lines if line.strip().startswith("File")]
    return f", at {frames[0]}" if frames else ""


# %% [markdown]
# ### Terminating ranks
#
# First politely: SIGTERM to torchrun, which passes it on, and the ranks save. A rank that does not react, because it hangs or because it ignores signals, is killed. Only the launcher's own descendants ever are: it notes them while `torchrun` lives, each with the moment at which it was started, since a process number alone may belong to somebody else by now. (An earlier launcher believed the numbers in the heartbeats. A second launch into the same folder then killed the ranks of the first.)


# %%
#| export
def note_children(torchrun: subprocess.Popen, family: set[psutil.Process]) -> None:
    """Add torchrun's descendants to `family`: a `psutil.Process` is a number and the moment of its start."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family |= set(psutil.Process(torchrun.pid).children(recursive=True))


def end_ranks(torchrun: subprocess.Popen, family: set[psutil.Process], grace_s: float) -> None:
    """End a run's processes: ask, wait `grace_s` for them to save, then cut the lifeline and kill what is left."""
    note_children(torchrun, family)
    torchrun.terminate()
    psutil.wait_procs(family, timeout=grace_s)
    if torchrun.stdin:
        with contextlib.suppress(OSError):
            torchrun.stdin.close()
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    try:
        torchrun.wait(timeout=5)
    except subprocess.TimeoutExpired:
        torchrun.kill()
        torchrun.wait()


# %% [markdown]
# ### The supervisor's loop
#
# A shell escape (`!torchrun …`) shows lines and can be interrupted, but its cell cannot look at anything else meanwhile: a run that goes silent goes silent for ever. Reading the process's pipe in a loop has the same flaw, since a loop that waits for a line cannot look at a clock. So here a thread pumps the ranks' lines into a queue and a file; the main thread shows them and looks at the heartbeats twice a second. Lines appear when they are written, in the notebook cell and, through papermill, in the terminal.


# %%
#| export
def forward_lines(stream, lines: queue.Queue, copy: Path) -> None:
    """Pass lines on as they come, and keep them in a file; None at the end."""
    for line in stream:
        lines.put(line.rstrip("\n"))
        try:
            with open(copy, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError:
            pass  # a full disk must not silence the run
    lines.put(None)


# %%
#| export
def watch(
    torchrun: subprocess.Popen, family: set, silence: Silence, patience: Patience, echo, check
) -> str | None:
    """Show the ranks' lines until they end. Returns why they have to be ended; None if they end by themselves."""
    lines: queue.Queue = queue.Queue()
    arguments = (torchrun.stdout, lines, silence.folder / "output.txt")
    threading.Thread(target=forward_lines, args=arguments, daemon=True).start()
    line, orphaned, next_look = "", 0, 0.0
    while line is not None and orphaned < 10:  # torchrun gone, its output still held: five seconds
        try:
            line = lines.get(timeout=0.5)
            if line:
                echo(line)
        except queue.Empty:
            orphaned += torchrun.poll() is not None
        if time.monotonic() < next_look:
            continue
        next_look = time.monotonic() + 0.5
        check()
        note_children(torchrun, family)
        late = silence.find_hung_rank(patience)
        if late is not None and torchrun.poll() is None:
            status, silent_s = late
            where = f"silent for {silent_s:.0f} s in phase {status.phase}, step {status.step}"
            way = f"--patience.{status.phase} {2 * silent_s:.0f} is more patient"
            return f"rank {status.rank} hangs: {where}{stack_trace(silence.folder, status, family)} ({way})"
    return None


# %%
import io

lines: queue.Queue = queue.Queue()
forward_lines(io.StringIO("step:1/2\nstep:2/2\n"), lines, scratch / "copy.txt")
assert [lines.get() for _ in range(3)] == ["step:1/2", "step:2/2", None]
assert (scratch / "copy.txt").read_text() == "step:1/2\nstep:2/2\n"

# %% [markdown]
# What went wrong has to be said in one line. torchrun reports exit codes at length; the heartbeats know the rest.


# %%
#| export
def diagnosis(folder: Path, status: int, begin: int = 0) -> str:
    """What went wrong, from torchrun's last words (in output.txt from byte `begin` on) and the heartbeats."""
    output = folder / "output.txt"
    text = output.read_bytes()[begin:].decode(errors="replace") if output.exists() else ""
    told = re.search(r"exitcode: (-?\d+)\) local_rank: (\d+)", text)
    if not told:
        return f"torchrun ended with status {status}"
    code, rank = int(told[1]), int(told[2])
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    at = next(
        (f" in phase {s.phase}, step {s.step}" for s in read_heartbeats(folder) if s.rank == rank),
        "",
    )
    return f"rank {rank} {how}{at}"


# %%
#| export
def failure(folder: Path, why: str) -> UserError:
    """The end of a failed run, with the way to go on."""
    saved, last_words = checkpoints(folder), folder / "output.txt"
    fix = f"it had no checkpoint yet; its last words are in {last_words}"
    if saved:
        fix = f"python -m speedrun.launch --resume {quoted(folder)} goes on from {saved[-1].name}"
    return UserError(f"the run in {folder} failed: {why}", fix)


# %%
dead = scratch / "dead"
for dead_rank in range(3):
    Heartbeat(dead, dead_rank).phase("train", 12)
(dead / "output.txt").write_text("failed (exitcode: -9) local_rank: 2 (pid: 77) of binary\n")
assert diagnosis(dead, 1) == "rank 2 was killed by SIGKILL in phase train, step 12"
assert diagnosis(scratch / "nowhere", 7) == "torchrun ended with status 7"
print(str(failure(dead, diagnosis(dead, 1))).replace(str(dead), "runs/example"))

# %% [markdown]
# And the function that does it all.


# %%
#| export
def run_ranks(
    program,
    world: int,
    folder: Path,
    patience: Patience | None = None,
    echo=print,
    grace_s=30.0,
    device: str = "cpu",
    check=lambda: None,
) -> None:
    """Run a program on `world` ranks to its end, showing its output. Raises UserError if it fails. check: called now and then.

    When interrupted (KeyboardInterrupt), or when one hangs, the ranks have `grace_s` seconds to save. The folder must be the caller's own.
    """
    shutil.rmtree(folder / "heartbeat", ignore_errors=True)
    (folder / "heartbeat").mkdir(parents=True)
    output, family = folder / "output.txt", set[psutil.Process]()
    begin = output.stat().st_size if output.exists() else 0
    silence, torchrun = Silence(folder, world), start_ranks(program, world, folder, device)
    why: str | None = "the launcher was ended"
    try:
        why = watch(torchrun, family, silence, patience or Patience(), echo, check)
    except KeyboardInterrupt:
        on = f"python -m speedrun.launch --resume {quoted(folder)}"
        echo(f"interrupted: the ranks save. To resume: {on}")
        raise
    finally:  # ranks that torchrun has left behind end by themselves, in ten seconds at most
        end_ranks(torchrun, family, grace_s if torchrun.poll() is None else min(grace_s, 11.0))
    if torchrun.returncode or why:
        raise failure(folder, why or diagnosis(folder, torchrun.returncode, begin))


# %% [markdown]
# A rank that ignores SIGTERM, prints nothing, and sleeps. The supervisor notices it by its silence.

# %%
rude = scratch / "rude.py"
rude.write_text(
    "import signal, sys, time, pathlib\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "from speedrun.heartbeat import Heartbeat, lifeline\n"
    "lifeline()\n"
    "heartbeat = Heartbeat(pathlib.Path(sys.argv[1]), 0)\n"
    "heartbeat.phase('train', 7)\n"
    "time.sleep(600)\n"
)
silent = scratch / "silent"
try:
    run_ranks([str(rude), str(silent)], 1, silent, Patience(train=1.0), grace_s=1.0)
    raise AssertionError("nobody noticed")
except UserError as problem:
    assert "rank 0 hangs" in problem.what and "phase train, step 7" in problem.what
    assert "rude.py" in problem.what, "and it was asked where it is"
    print(str(problem).replace(str(scratch), "runs"))
assert not psutil.pid_exists(read_heartbeats(silent)[0].pid)

# %% [markdown]
# ## The measurement: who ends eight ranks?
#
# Now the prediction. A short launcher starts eight ranks, each in a session of its own as under `torchrun`, with one remedy at a time. When all eight run, it gets one of three signals. Who is left a few seconds later?

# %%
from itertools import product

rank_program = "import time; print('up', flush=True); time.sleep(600)"
watching_rank = "import os; print('up', flush=True); os.read(0, 1); os._exit(70)"  # a lifeline
launcher_program = """
import signal, subprocess, sys, time
from subprocess import PIPE
remedy, rank_program = sys.argv[1:]
command = [sys.executable, "-S", "-c", rank_program]
ranks = [subprocess.Popen(command, stdin=PIPE, stdout=PIPE, start_new_session=True) for _ in range(8)]
if remedy == "a handler for SIGTERM":
    signal.signal(signal.SIGTERM, lambda *_: [rank.kill() for rank in ranks] and sys.exit())
try:
    ups = [rank.stdout.readline() for rank in ranks]
    print(*(rank.pid for rank in ranks), flush=True)
    time.sleep(600)
finally:
    if remedy == "a finally block":
        for rank in ranks:
            rank.kill()
"""
REMEDIES = ("nothing", "a finally block", "a handler for SIGTERM", "a lifeline")
NUMBERS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}

launchers, ranks = {}, {}
for trial in product(REMEDIES, NUMBERS):
    program = watching_rank if trial[0] == "a lifeline" else rank_program
    command = [sys.executable, "-c", launcher_program, trial[0], program]
    launchers[trial] = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
for trial, launcher in launchers.items():
    ranks[trial] = [psutil.Process(int(pid)) for pid in launcher.stdout.readline().split()]
for (_, name), launcher in launchers.items():
    launcher.send_signal(NUMBERS[name])
for launcher in launchers.values():
    launcher.wait()
_, alive = psutil.wait_procs(sum(ranks.values(), []), timeout=5)
for process in alive:
    process.kill()
counts = {trial: len([p for p in eight if p in alive]) for trial, eight in ranks.items()}
left = {remedy: [counts[remedy, name] for name in NUMBERS] for remedy in REMEDIES}
assert all(len(eight) == 8 for eight in ranks.values())
assert left["nothing"] == [8, 8, 8] and left["a lifeline"] == [0, 0, 0]
assert left["a finally block"] == [0, 8, 8] and left["a handler for SIGTERM"] == [8, 0, 8]
print(f"{'of eight ranks still alive after':34}", *(f"{name:>8}" for name in NUMBERS))
for remedy, numbers in left.items():
    print(f"{remedy:34}", *(f"{number:>8}" for number in numbers))

# %% [markdown]
# Each remedy but the lifeline works for the signals that it handles. A `finally` block runs where an exception passes, and SIGTERM raises none in Python; a handler for SIGTERM knows nothing of Ctrl-C. For SIGKILL there is nothing to write in the launcher at all. (Killing the process group takes somebody who is alive to do it, and these ranks are not in the launcher's group.) Only the ranks themselves are still there to act, and the end of their standard input tells them.
#
# So much for the toy. The same promise for the trainer's own launcher, with the rank that ignores everything: the launcher is killed, with the signal that nothing survives.

# %%
orphaned = scratch / "orphaned"
code = (
    "from pathlib import Path; from speedrun.supervise import run_ranks; "
    f"run_ranks([{str(rude)!r}, {str(orphaned)!r}], 1, Path({str(orphaned)!r}))"
)
launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
while not any(status.phase == "train" for status in read_heartbeats(orphaned)):
    time.sleep(0.1)
rank = psutil.Process(read_heartbeats(orphaned)[0].pid)
family = [rank, *rank.parents()[:1]]  # the rank, and the torchrun above it
launcher.kill()
begin = time.perf_counter()
gone, alive = psutil.wait_procs(family, timeout=15)
assert not alive and len(gone) == 2
print(
    f"{time.perf_counter() - begin:.1f} s after its launcher, neither torchrun nor the rank exists"
)

# %% [markdown]
# ## What it costs, and when it fails
#
# The watch costs one small file per rank, and a touch of it per micro-batch: microseconds. `torchrun` could do one thing more: restart failed ranks by itself. We tell it not to. A restart after a failure that nobody has read repeats the same out-of-memory error until somebody looks, and on the contest's clock it would count; a failed run should stop, say where, and name the command that goes on.
#
# It fails where its assumptions do. A rank that hangs *inside* a C extension while holding Python's lock cannot run the thread that watches its lifeline. The launcher still notices its silence and kills it, but if the launcher dies as well, only the operating system could. On several machines there is no common standard input, and the heartbeats would need a shared disk. The contest has one machine, and so has this launcher. And a checkpoint protects what came before it, never the steps since.
#
# ## Exercises
#
# 1. A watcher reads a heartbeat's count now and then, with its own clock. Write `silent_for(readings)`: the readings are pairs (seconds on the watcher's clock, count), in order; the result is for how many seconds, up to the last reading, the count is known not to have changed.


# %% tags=["solution"]
def silent_for(readings: list[tuple[float, int]]) -> float:
    """Seconds from the first reading of the last run of equal counts to the last reading."""
    end, count = readings[-1]
    since = end
    for clock, other in reversed(readings):
        if other != count:
            break
        since = clock
    return end - since


# %%
for readings, right in (
    ([(0.0, 1), (10.0, 1), (20.0, 2), (30.0, 2), (45.0, 2)], 25.0),
    ([(5.0, 7)], 0.0),
    ([(0.0, 4), (9.0, 3), (12.0, 4), (20.0, 4)], 8.0),  # a rank that was started anew counts anew
):
    got = silent_for(readings)
    assert got == right, f"{readings}: silent for {right} s, not for {got}"

# %% [markdown]
# 2. How often should a run save? Saving takes `save_s` seconds, in which nothing is trained; a failure, which comes once in `between_s` seconds on average, costs half an interval of training. So of each second the share `save_s / interval_s + interval_s / (2 * between_s)` is lost. Write `best_interval(save_s, between_s)`: the interval in seconds at which least is lost (John Young's formula of 1974).


# %% tags=["solution"]
def best_interval(save_s: float, between_s: float) -> float:
    """Seconds from one checkpoint to the next: where the derivative of the lost share is zero."""
    return (2 * save_s * between_s) ** 0.5


# %%
def lost(interval_s: float, save_s: float, between_s: float) -> float:
    """The share of time that is lost to saving, and to failures."""
    return save_s / interval_s + interval_s / (2 * between_s)


for save_s, between_s in ((2.0, 3600.0), (30.0, 86_400.0)):
    best = best_interval(save_s, between_s)
    for other in (0.9 * best, 1.1 * best):
        assert lost(best, save_s, between_s) < lost(other, save_s, between_s), (
            f"saving in {save_s:.0f} s, failing every {between_s:.0f}: {other:.0f} s loses less than {best:.0f}"
        )
    share = lost(best, save_s, between_s)
    print(
        f"{save_s:.0f} s to save, a failure in {between_s / 3600:.0f} h: every {best:.0f} s, {share:.1%} lost"
    )

# %%
shutil.rmtree(scratch)
