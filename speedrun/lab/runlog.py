# Tangled from notebooks/96_logs_and_stamps.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Logs: what a run must write down
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
