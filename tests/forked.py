"""A command of the project, started in a hundredth of a second: a forked child of a server that has imported everything.

`python -m` takes three seconds until PyTorch is imported, a run of a test often less than one. So each process of pytest has a server
(multiprocessing's), which imports once (preloaded.py) and forks. A child executes the module as `python -m` does, in a process of its
own, with streams, signals and an exit status; what the imports themselves do is tested elsewhere, with real ones. Where there is no
/proc, a command is a process of its own from its start.
"""

import ctypes
import importlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from speedrun.supervise import rank_environment

HERE = Path(__file__).resolve().parent
FORKS = sys.platform.startswith("linux")


def server():
    """Multiprocessing's words for processes that this pytest's server forks."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["preloaded"])
    return found


def as_command(module: str, arguments: list[str]) -> None:
    import zygote

    zygote.as_command(module, arguments)()


def as_function(program: str, arguments: list[str]) -> None:
    module, _, function = program.partition(":")
    sys.exit(getattr(importlib.import_module(module), function)(arguments))


def in_child(work: Callable, given: tuple, environment: dict, out: Connection, err: Connection) -> None:  # fmt: skip
    """Do the work with these streams and nothing to read; end with the server."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    for number, there in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out.fileno()), (2, err.fileno())):  # fmt: skip
        os.dup2(there, number)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115 # fmt: skip
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.process.current_process()._config["daemon"] = False  # it may start others
    work(*given)


def text_of(end: Connection):
    """What comes out of a pipe, as text."""
    copy = os.dup(end.fileno())
    end.close()
    return open(copy, encoding="utf-8", errors="backslashreplace")


class Forked:
    """A function's call in a forked child, with the words of subprocess.Popen. output: a file that takes both streams."""

    def __init__(self, work: Callable, *given, environment: dict | None = None, output: Path | None = None):  # fmt: skip
        forks, mine, theirs = server(), [], []
        if output:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            theirs = [Connection(file, readable=False)] * 2
        else:
            mine, theirs = zip(*(forks.Pipe(duplex=False) for _ in range(2)))
        before = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), str(HERE.parent / "scripts"), before])  # fmt: skip
        try:  # the server, which starts with the first child, finds what it imports there
            environment = dict(os.environ) | {"PYTHONPATH": before} | (environment or {})
            told = (work, given, environment, *theirs)
            self.process = forks.Process(target=in_child, args=told, daemon=True)
            self.process.start()
        finally:
            os.environ["PYTHONPATH"] = before
        for there in theirs:
            there.close()
        self.stdout, self.stderr = (text_of(end) for end in mine) if mine else (None, None)
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[str, str]:
        """All that it says until it ends."""
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.append(self.stderr.read()))
        reader.start()
        out = self.stdout.read()
        reader.join()
        self.wait()
        return out, said[0]


def start(program: str, arguments: Sequence[str], environment: dict | None = None, output: Path | None = None):  # fmt: skip
    """`python -m program arguments`, as subprocess.Popen or as what has the same words. output: a file for both streams.

    A program may also be a test module's function that takes arguments and returns a status: "test_train:stopped".
    """
    module, _, function = program.partition(":")
    if FORKS:
        work = as_function if function else as_command
        return Forked(work, program, list(arguments), environment=environment, output=output)
    streams: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if output:
        streams = {"stdout": open(output, "a"), "stderr": subprocess.STDOUT}  # noqa: SIM115
    way = ["-m", module]
    if function:
        folders = [str(HERE), str(HERE.parent / "scripts")]
        way = ["-c", f"import sys; sys.path[:0] = {folders}; import {module}; sys.exit({module}.{function}(sys.argv[1:]))"]  # fmt: skip
    return subprocess.Popen([sys.executable, *way, *arguments], **streams, text=True, env=os.environ | (environment or {}))  # fmt: skip


def run(program: str, arguments: Sequence[str], environment: dict | None = None) -> subprocess.CompletedProcess:  # fmt: skip
    """The same, to its end."""
    live = start(program, arguments, environment)
    out, err = live.communicate()
    return subprocess.CompletedProcess([program, *arguments], live.returncode, out, err)


def run_on_ranks(arguments: Sequence[str], world: int, folder: Path, program="speedrun.train", limit_s=120.0) -> list[int]:  # fmt: skip
    """The statuses of ranks that meet in a file, as under the launcher, but with nobody who watches. After a failure the others have ten seconds."""
    shutil.rmtree(folder / "heartbeat", ignore_errors=True)
    (folder / "heartbeat").mkdir(parents=True)
    own = rank_environment(world, world, folder)
    del own["SPEEDRUN_LIFELINE"]
    live = []
    for rank in map(str, range(world)):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(world)}
        live.append(start(program, arguments, own | numbers, folder / "output.txt"))
    until, failed = time.monotonic() + limit_s, False
    try:
        while any(rank.poll() is None for rank in live) and time.monotonic() < until:
            if not failed and any(rank.poll() for rank in live):
                failed, until = True, time.monotonic() + 10.0
            time.sleep(0.01)
    finally:
        for rank in live:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
    return [rank.returncode for rank in live]


def train_on_ranks(arguments: Sequence[str], world: int, folder: Path, **more) -> None:
    """The same, of a run that must succeed."""
    statuses = run_on_ranks(arguments, world, folder, **more)
    assert statuses == [0] * world, (folder / "output.txt").read_text()
