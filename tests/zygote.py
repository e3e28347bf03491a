"""Commands of the project in forked children of one process that has imported everything: thousands of runs in minutes.

Importing PyTorch and the trainer takes two seconds, a step of a tiny model a hundredth of one. So a *zygote* imports once and
forks. What a child runs is the real command: `run_command` executes a module as `python -m` does, only its arguments and streams
are ours. Two things are computed once instead of in each child, since they read every source file: the hashes of the modules and
the stamp of a run. Needs fork and /proc; the tests that use it are skipped elsewhere.

    python tests/zygote.py MODULE FUNCTION [JSON …]    call a function of a test module in a fresh zygote
"""

import contextlib
import ctypes
import faulthandler
import importlib
import io
import json
import os
import re
import resource
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for name in ("tests", "scripts", ""):
    if str(ROOT / name) not in sys.path:
        sys.path.insert(0, str(ROOT / name))
ENVIRONMENT = {  # no network, no threads that wait in a loop, no key of whoever runs the tests
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "COLUMNS": "100",
    "PYTHONPATH": str(ROOT),
}
OURS = (str(ROOT / "speedrun"), str(ROOT / "scripts"))
COMMANDS = ("speedrun.train", "speedrun.launch", "speedrun.sample", "speedrun.data.__main__")


# %% A command, and what it said
@dataclass(frozen=True)
class Said:
    """How a command ended. status: its exit status, None if an exception escaped. place: where that came from."""

    status: int | None
    out: str
    err: str
    place: str = ""
    trace: str = ""


def place_of(error: BaseException) -> str:
    """An exception's type and the innermost line of ours that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(OURS)] or frames
    if not ours:
        return type(error).__name__
    last = ours[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno} {last.name}"


def stream(errors: str) -> io.TextIOWrapper:
    """A text stream as strict as a real one: UTF-8, so that a lone surrogate cannot be written to standard output."""
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors, write_through=True)


def call(function: Callable[[], object]) -> Said:
    """Call a function as the body of a command: its streams are kept, its exit is a status."""
    out, err, place, trace = stream("strict"), stream("backslashreplace"), "", ""
    status: int | None = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            function()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                err.write(end.code)
        except BaseException as error:
            status, place, trace = None, place_of(error), traceback.format_exc()
    texts = [text.buffer.getvalue().decode(errors="backslashreplace") for text in (out, err)]
    return Said(status, *texts, place, trace)


def run_command(module: str, arguments: list[str]) -> Said:
    """`python -m module arguments`, in this process."""
    sys.argv = [module, *arguments]
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", category=RuntimeWarning, module="runpy"
        )  # imported already: so it is
        return call(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))


# %% Importing once
def modules_of(function: Callable[[], object]) -> list[str]:
    """What a function imports, found in a forked child, in order."""
    read, write = os.pipe()
    before = set(sys.modules)
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            function()
        with os.fdopen(write, "w") as pipe:
            json.dump([name for name in sys.modules if name not in before], pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        names = json.load(pipe)
    os.waitpid(pid, 0)
    return names


def import_what_they_import(*examples: tuple[str, list[str]]) -> None:
    """Import all that these commands import in the middle of their work."""
    for example in examples:
        for name in modules_of(lambda example=example: run_command(*example)):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def preload(*examples: tuple[str, list[str]]) -> None:
    """Import all that the commands import, at first or (found with example command lines) later. Stays one thread."""
    os.environ.update(ENVIRONMENT)
    from vocabulary import offline_vocabulary

    offline_vocabulary(ROOT / "_build" / "tiktoken")
    import torch

    torch.set_num_threads(1)
    for name in COMMANDS:
        importlib.import_module(name)
    from speedrun import run
    from speedrun.command import TrainCommand
    from speedrun.data.tokenizer import get_tokenizer
    from speedrun.lab import provenance
    from speedrun.launch import LaunchCommand
    from speedrun.presets import read_command

    hashes = provenance.module_hashes(["speedrun.train"])
    stamp = provenance.stamp("a test", ["speedrun.train"], 1)
    for module in (provenance, run):
        module.module_hashes = lambda names: hashes
        module.stamp = lambda *args, **kwargs: stamp
    read_command(TrainCommand, [], "smoke", "")  # tyro reads the fields' docstrings once
    read_command(lambda config: LaunchCommand(TrainCommand(config)), [], "smoke", "")
    get_tokenizer("gpt2")
    import_what_they_import(*examples)
    assert len(os.listdir("/proc/self/task")) == 1, "a zygote with threads cannot fork"


# %% A child
def limit_memory(gigabytes: float) -> None:
    """A child that asks for more is refused, and the machine lives."""
    most = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def fork(
    work: Callable[[], int | None], log: Path, environment: dict[str, str] | None = None
) -> int:
    """Fork a child that calls `work` and ends with what it returns. Its streams go to a file; it leads a group of its own."""
    pid = os.fork()
    if pid:
        return pid
    status: int | None = 99
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no child outlives its zygote
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
        os.environ.update(environment or {})
        status = work()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status or 0)


def as_command(module: str, arguments: list[str]) -> Callable[[], None]:
    """Work for `fork`: a command that writes to the child's own streams."""

    def work() -> None:
        sys.argv = [module, *arguments]
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    return work


def end(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a child and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def wait(pids: list[int], limit_s: float = 60.0) -> list[int | None]:
    """The exit statuses of children, negative for a signal; None for those that had to be ended after `limit_s`."""
    until, found = time.monotonic() + limit_s, {}
    while len(found) < len(pids):
        for pid in set(pids) - set(found):
            if time.monotonic() > until:
                end(pid)
                os.waitpid(pid, 0)
                found[pid] = None
            elif (told := os.waitpid(pid, os.WNOHANG))[0]:
                found[pid] = os.waitstatus_to_exitcode(told[1])
        time.sleep(0.005)
    return [found[pid] for pid in pids]


# %% Many cases
def last_place(words: Path) -> str:
    """The innermost line of ours in what faulthandler wrote of a child that crashed or hung."""
    text = words.read_text(errors="replace") if words.exists() else ""
    frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', text)
    ours = [frame for frame in frames if frame[0].startswith(OURS)] or frames
    return f"{Path(ours[0][0]).name}:{ours[0][1]} {ours[0][2]}" if ours else "nowhere that is known"


def batch_of_cases(judge: Callable[[int], dict], numbers: list[int], words: Path, limit_s: float, memory_gb: float) -> Iterator[dict]:  # fmt: skip
    """Judge cases one after the other in one child, up to the first that crashes or hangs; that one is named."""
    read, write = os.pipe()

    def work() -> None:
        os.close(read)
        limit_memory(memory_gb)
        pipe = os.fdopen(write, "w", buffering=1)
        file = open(words, "w")  # noqa: SIM115
        faulthandler.enable(file)
        for number in numbers:
            faulthandler.dump_traceback_later(0.9 * limit_s, file=file)
            pipe.write(json.dumps({"begins": number}) + "\n")
            pipe.write(json.dumps({"number": number, **judge(number)}) + "\n")

    pid = fork(work, words.with_suffix(".log"))
    os.close(write)
    now, done, text, late = None, 0, b"", False
    while not late:
        late = not select.select([read], [], [], limit_s)[0]
        if late:
            end(pid)
        part = b"" if late else os.read(read, 1 << 16)
        *lines, text = (text + part).split(b"\n")
        for answer in map(json.loads, lines):
            now = answer.get("begins", now)
            if "number" in answer:
                done, now = done + 1, None
                yield answer
        if not part:
            break
    os.close(read)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == 99:  # not the command: what judges it
        raise RuntimeError(words.with_suffix(".log").read_text()[-2000:])
    if now is not None:
        verdict, how = ("hang", f"{limit_s:.0f} s") if late else ("crash", ended(status))
        yield {"number": now, "verdict": verdict, "place": f"{how} at {last_place(words)}"}
    elif done < len(numbers):
        raise RuntimeError(f"a child ended between two cases: {ended(status)}; see {words}")


def ended(status: int) -> str:
    """An exit status in words."""
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def judged(judge: Callable[[int], dict], numbers: list[int], batch: int, words: Path, limit_s=20.0, memory_gb=6.0) -> Iterator[dict]:  # fmt: skip
    """The answer for each case. `batch`: cases that share a child, 1 where one could damage the memory of the next."""
    left = list(numbers)
    while left:
        for answer in batch_of_cases(judge, left[:batch], words, limit_s, memory_gb):
            left.remove(answer["number"])
            yield answer


# %% Elsewhere
def zygotes(
    module: str, function: str, inputs: list[list], folder: Path, limit_s: float
) -> list[dict]:
    """Call a function in several zygotes at once, one for each list of JSON arguments; the lines of JSON that they print."""
    live = []
    for number, given in enumerate(inputs):
        out = open(folder / f"{function}-{number}.jsonl", "w+")  # noqa: SIM115
        command = [sys.executable, __file__, module, function, *map(json.dumps, given)]
        live.append((subprocess.Popen(command, stdout=out, start_new_session=True, env=os.environ | ENVIRONMENT), out))  # fmt: skip
    found, until = [], time.monotonic() + limit_s
    try:
        for process, out in live:
            status = process.wait(timeout=max(1.0, until - time.monotonic()))
            out.seek(0)
            found += [json.loads(line) for line in out]
            assert status == 0, f"the zygote ended with status {status}"
    finally:
        for process, out in live:
            if process.poll() is None:
                end(process.pid)
                process.wait()
            out.close()
    return found


def main(arguments: list[str]) -> None:
    module, function, *given = arguments
    getattr(importlib.import_module(module), function)(*map(json.loads, given))


if __name__ == "__main__":
    main(sys.argv[1:])
