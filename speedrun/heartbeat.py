# Tangled from notebooks/92_a_run_that_survives.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Signal handling
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


# %% Orphaned ranks: the lifeline
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


# %% Heartbeats
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


# %% Graceful shutdown of several ranks
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
