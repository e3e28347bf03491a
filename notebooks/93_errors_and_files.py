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
#     modules: [speedrun.lab.errors, speedrun.lab.files]
# ---

# %% [markdown]
# # Workshop: errors and files
#
# ```{admonition} Cost box
# Any machine, a few seconds; there is nothing for a GPU to do. The faults that this page answers were reported by users of nanoGPT, safetensors, pip, gunicorn, papermill and some fifty other projects, and then tried on this trainer; each section names the
# reports that it follows.
# ```
#
# ## The problem
#
# A run that trains for hours can be ended by a line of text. Here is a program that prints its progress into a file on a disk that is full, as a batch job does whose log has grown too long:

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
import subprocess
import sys
import tempfile
from pathlib import Path

scratch = Path(tempfile.mkdtemp())
FULL = Path("/dev/full")  # a device on which every write fails: Linux has it, macOS does not
trainer = """
for step in range(1, 101):
    print(f"step {step} of 100", flush=True)
open("weights", "w").write("the weights")
"""
if FULL.exists():
    with FULL.open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", trainer],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=scratch,
        )
    assert ended.returncode == 1 and not (scratch / "weights").exists()
    print("status", ended.returncode, "·", ended.stderr.splitlines()[-1])

# %% [markdown]
# Nothing was wrong with the training. Its hundred steps would have been done, the folder for the weights had room, and all of it was lost for a `print`. Our trainer did the same until somebody tried.
#
# ```{admonition} Prediction
# :class: tip
# Which of these can make the call `print("step 1", flush=True)` raise an exception: a full disk, a closed terminal, the `head -1` that the output is piped into, a program started without any output at all, a character that the console cannot show?
# And which of them should end a run? Write down both lists before you read on.
# ```
#
# ## The idea
#
# All but one: `OSError` (with three different numbers) and `UnicodeEncodeError`. Without any output `sys.stdout` is `None`; then `print` says nothing, but `sys.stdout.write` raises `AttributeError`. None of them should end a run. That is the general shape of the faults in this chapter: **one exception was foreseen, and its siblings were not**. `BrokenPipeError` had been caught,
# since somebody once typed `| head`; the others had not. So every command of this book goes through one function, `run_main`, which knows the kinds:
#
# - what its reader can mend is a `UserError`, and is printed with its way out;
# - what the operating system refuses (no room, no permission, no such folder) becomes a `UserError`, with the file's name and the way out for that refusal;
# - what fails while *printing* is nobody's problem;
# - everything else is a bug of ours, and keeps its traceback.
#
# Files get the same treatment: one function that writes a file whole or not at all, one that makes a folder which nobody else has, one lock that says whose folder it is.
#
# ## The code
#
# ### UserError: an error that names a remedy
#
# A message that only says what went wrong leaves its reader where the program stopped. An error that somebody can mend is a `UserError`: what is wrong, with the name and the value, and the way out.

# %%
#| default_exp lab.errors
#| export
import contextlib
import errno
import os
import shlex
import signal
import sys
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """Something its reader can mend: what is wrong, with the name and the value, and the way out.

    The way out must not be able to make it worse: it never says “delete” of a file that could not be opened.
    """

    def __init__(self, what: str, fix: str):
        super().__init__(f"{what}\n  → {fix}")
        self.what, self.fix = what, fix


# %% [markdown]
# What stands in a message may come from a file that somebody else has written: a data folder's manifest, a checkpoint. A terminal obeys what it is shown, so a name in a file may move the cursor and write over the line above. Text from files is therefore
# shown with its control characters made visible ([OSC-8 links and other escapes](https://gist.github.com/egmontkob/eb114294efbcd5adb1944c9f3cb5feda) are the same kind).


# %%
#| export
def visible(text: object, most: int = 200) -> str:
    """A value from somebody else's file as one line for a terminal: no control characters, and not endless."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)
    )
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def quoted(path: object) -> str:
    """A path as it can be copied into a shell, in one line."""
    return shlex.quote(visible(path, 4096))


def check_words(arguments: list[str]) -> None:
    """Refuse command-line arguments that would move a terminal's cursor when a message repeats them."""
    for word in arguments:
        if not word.replace("\n", "").replace("\t", "").isprintable():
            raise UserError(
                f"“{visible(word)}” holds control characters", "type that argument anew"
            )


# %%
assert visible("train_000000.bin") == "train_000000.bin"
assert visible("evil\x1b[2J\nname") == r"evil\x1b[2J\nname" and len(visible("x" * 5000)) == 200
assert "\ud800" not in visible("half a character: \ud800")  # which no terminal can be sent
try:
    check_words(["--out", "fine\n", "--device", "\x1b[2J"])
    raise AssertionError("accepted")
except UserError as problem:
    assert r"\x1b[2J" in problem.what
print(visible("a name that clears the screen: \x1b[2J"))

# %% [markdown]
# ### What the operating system refuses
#
# A full disk, a folder of somebody else's, a file where a folder should be: Python raises an `OSError` that holds a number and, nearly always, the name of the file. The number decides the way out. Those that are not in the table are not explained: they are rare enough to
# deserve their traceback.

# %%
#| export
WAYS_OUT = {
    errno.ENOSPC: "free some space there, or choose another folder",
    errno.EDQUOT: "your quota there is used up: free some space, or choose another folder",
    errno.EACCES: "it belongs to another user: chmod u+rwX it, or choose another folder",
    errno.EPERM: "the system does not permit it: choose another folder",
    errno.EROFS: "that place is mounted read-only: choose another folder",
    errno.ENOTDIR: "a file stands where a folder is wanted: choose another name",
    errno.EISDIR: "a folder stands where a file is wanted: choose another name",
    errno.ENOENT: "there is no such file or folder: look for a misspelt name",
    errno.EEXIST: "something of that name is there already: choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "the disk, or the connection to it, fails: choose another folder",
    errno.ESTALE: "the network folder has gone away: mount it again, or choose another folder",
    errno.ELOOP: "links there point at each other: name the folder itself",
    errno.EMFILE: "too many open files: ulimit -n 4096",
}


def explained(error: OSError) -> UserError | None:
    """What the operating system refused, as a UserError; None for what needs its traceback."""
    if error.errno not in WAYS_OUT or isinstance(error, BrokenPipeError):
        return None
    names = [visible(name) for name in (error.filename, error.filename2) if name is not None]
    return UserError(f"{' → '.join(names) or 'a file'}: {error.strerror}", WAYS_OUT[error.errno])


# %%
(scratch / "a file").write_text("not a folder")
try:
    (scratch / "a file" / "runs").mkdir()
except OSError as error:
    refused = explained(error)
assert refused and "a file" in refused.what and "another name" in refused.fix
assert explained(OSError(errno.ECONNREFUSED, "refused")) is None
print(refused)

# %% [markdown]
# ### Printing never ends a run
#
# `Steady` stands before a stream, passes on what it is given, and forgets what cannot be passed on: a full disk ([faceswap#1139](https://github.com/deepfakes/faceswap/issues/1139)), a terminal that was closed ([LlamaFactory#3036](https://github.com/hiyouga/LlamaFactory/issues/3036)), a pipe that nobody
# reads ([pip#4170](https://github.com/pypa/pip/issues/4170)), no stream at all ([phpsploit#39](https://github.com/nil0x42/phpsploit/issues/39)). A character that the console's encoding lacks is replaced ([ctrl#17](https://github.com/salesforce/ctrl/issues/17)). It tries again with every line, since a disk may have room again.


# %%
#| export
class Steady:
    """A text stream (or None) whose writing cannot fail: what cannot be shown is lost, and the program goes on."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # ValueError: it is closed
            try:
                self.stream.write(text)
            except UnicodeEncodeError as error:
                self.stream.write(text.encode(error.encoding, "replace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def isatty(self) -> bool:
        return bool(self.stream) and not self.stream.closed and self.stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def let_go(stream: Any) -> None:
    """Flush a stream; if that fails, send the rest nowhere, so that Python's own flush at exit cannot fail either."""
    try:
        stream.flush()
    except (OSError, ValueError, AttributeError):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# %%
import io

narrow = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
print("✓ all is well", file=Steady(narrow), flush=True)
assert narrow.buffer.getvalue().startswith(b"? all is well")
print("nobody hears this", file=Steady(None), flush=True)
if FULL.exists():
    full = FULL.open("w")
    print("no room for this", file=Steady(full), flush=True)
    let_go(full)
    full.close()

# %% [markdown]
# ### One entry point for every command: run_main
#
# `run_main` is how each command of the book starts: `python -m speedrun.train`, `launch`, `sample`, `data`, and the scripts. Status 0 means done, 1 a problem that was printed with its way out, 130 interrupted.


# %%
#| export
def run_main(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit status: 0, or what it returns; 1, a UserError, printed; 130, interrupted."""
    streams = sys.stdout, sys.stderr
    with contextlib.redirect_stdout(Steady(streams[0])), contextlib.redirect_stderr(Steady(streams[1])):  # fmt: skip
        try:
            return command() or 0
        except OSError as error:
            problem = explained(error)
            if problem is None:
                raise
        except UserError as told:
            problem = told
        except KeyboardInterrupt:
            return 130
        finally:
            for stream in streams:
                let_go(stream)
        sys.stderr.write(f"{problem}\n")
        let_go(streams[1])
        return 1


# %%
def refuses() -> None:
    raise UserError(
        "data/fineweb holds no manifest.json", "python -m speedrun.data manifest data/fineweb"
    )


said = io.StringIO()
with contextlib.redirect_stderr(said):
    assert run_main(refuses) == 1 and run_main(lambda: None) == 0
    assert run_main(lambda: (scratch / "a file" / "runs").mkdir()) == 1
assert "→ python -m speedrun.data manifest" in said.getvalue() and "another name" in said.getvalue()
try:
    run_main(lambda: 1 // 0)  # a bug of ours
except ZeroDivisionError:
    print("a bug keeps its traceback; a problem is a sentence and a way out:\n\n" + said.getvalue())

# %% [markdown]
# And the program from the top of this page, through that door:

# %%
if FULL.exists():
    steady = f"from speedrun.lab.errors import run_main\ndef main():\n{''.join('    ' + line for line in trainer.strip().splitlines(True))}\nraise SystemExit(run_main(main))"
    with FULL.open("w") as full:
        ended = subprocess.run([sys.executable, "-c", steady], stdout=full, stderr=subprocess.PIPE, text=True, cwd=scratch)  # fmt: skip
    assert ended.returncode == 0 and not ended.stderr
    assert (scratch / "weights").read_text() == "the weights"
    print("status", ended.returncode, "· the weights are there")

# %% [markdown]
# ### Ctrl-C, from the first moment
#
# Importing PyTorch takes a second or more. A Ctrl-C that falls into it raises `KeyboardInterrupt` somewhere inside the import: usually a page of traceback, and now and then no end: an exception inside a destructor or a garbage collector's callback is printed and dropped, and the program trains on. (In an early trial, which was not kept as a measurement, 44 interrupts during the import of this package's launcher gave 34 tracebacks, 8 silent ends, and 2 were lost.) Nothing exists yet in that second that would have to be saved, so the right answer is the shortest: end.
#
# The same moment is the last one at which OpenMP can be told not to spin. Its threads wait for each other in a busy loop by default. On a machine that has something else to do, that loop takes the processor from the very thread that it waits for.


# %%
#| export
def end_now(number: int, frame: Any) -> None:
    """End this process at once, with the status of a signal. No exception: nothing can swallow it."""
    os._exit(128 + number)


def prepare_command() -> None:
    """First line of every command, before the imports that take seconds: an interrupt ends it, idle threads sleep."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, when OpenMP is loaded
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, end_now)


# %%
import time

slow_import = """
from speedrun.lab.errors import prepare_command
prepare_command()
print("ready", flush=True)
class Thing:
    def __del__(self):  # where Python drops exceptions
        import time
        time.sleep(1)
for _ in range(20):
    Thing()
"""
live = subprocess.Popen([sys.executable, "-c", slow_import], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
assert live.stdout.readline() == "ready\n"
time.sleep(0.3)
live.send_signal(signal.SIGINT)
status, words = live.wait(timeout=10), live.stderr.read()
assert status == 130 and words == ""
print("interrupted inside a destructor: status", status, "and not a word")

# %% [markdown]
# ### Atomic writes
#
# `path.write_text` empties the file first and fills it afterwards. Whoever reads in between, or after a crash in between, finds half of it. So: write beside, then rename, since a rename replaces a file in one step. Two details are easy to forget. The data must be on the disk *before* the rename is,
# or a power cut leaves a whole name over an empty file: hence `fsync`. And a file written through `tempfile` (as safetensors does, [#782](https://github.com/safetensors/safetensors/issues/782)) may be read by its owner only, mode 0600, while its siblings may be read by all.

# %%
#| export lab.files
import hashlib
import os
from pathlib import Path

from filelock import FileLock, Timeout


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk and not only in memory."""
    if path.is_dir() and os.name == "nt":  # Windows cannot, and need not
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Write a file (text as UTF-8) so that it appears whole or not at all, and lasts. Raises OSError, leaving no rest."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data.encode() if isinstance(data, str) else data)
        sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


# %%
target = scratch / "state.json"
atomic_write(target, "old")
(scratch / "plain").touch()
assert target.stat().st_mode == (scratch / "plain").stat().st_mode
try:
    atomic_write(scratch / "no such folder" / "state.json", "new")
except FileNotFoundError:
    pass
atomic_write(target, b"new")
assert target.read_text() == "new" and not list(scratch.glob("*.part"))

# %% [markdown]
# ### Creating a folder without a race
#
# A run writes into `runs/<date>-<preset>`. Three runs begun in the same second once shared two folders: their logs interleaved, and one run's weights were nowhere. "Does it exist? then take another; now make it" leaves a gap between the question and the deed. `mkdir` *is* the question: it fails where the folder exists, and only one of two callers can succeed.


# %%
#| export lab.files
def new_folder(path: Path) -> Path:
    """Make a folder that did not exist: `path`, or `path-2`, `path-3`, … where that is taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 1
    while True:
        try:
            chosen = path if count == 1 else path.with_name(f"{path.name}-{count}")
            chosen.mkdir()
            return chosen
        except FileExistsError:
            count += 1


# %%
from concurrent.futures import ThreadPoolExecutor

with ThreadPoolExecutor(8) as pool:
    made = list(pool.map(lambda _: new_folder(scratch / "20261128-120000-cpu"), range(8)))
assert len(set(made)) == 8
print("eight runs of one second:", ", ".join(sorted(folder.name[16:] for folder in made)))

# %% [markdown]
# ### Locking a run's folder
#
# Two launchers that write into one folder delete each other's files, and the second one's clean-up once killed the first one's ranks. A process number in a file does not help: after a crash it names nobody, or somebody else. A *lock* is held by an open file, and the operating system lets go of it when its
# process ends, however it ends. `filelock` does that on every system; it is installed anyway, since PyTorch and the Hugging Face hub use it.
#
# What is locked is an empty file with a dot in front of its name, and nothing else is: whoever looks into a run's folder, copies it or draws its curve is not disturbed, and nobody has to tidy up after a crash. There are two roles in a run's folder: the launcher that watches, and rank 0 that trains. When the launcher dies, its ranks still save for some seconds; the folder is theirs until then.


# %%
#| export lab.files
def claim(folder: Path, role: str) -> FileLock:
    """Be the only process with this role (`launch` or `train`) in a run's folder until it ends or lets go (`release()`).

    Raises UserError where another process has it. Touches nothing else in the folder.
    """
    lock = FileLock(folder / f".{role}.lock", timeout=0, mode=0o666)
    try:
        lock.acquire()
    except Timeout:
        what = f"another process is at work in {folder}"
        raise UserError(what, "wait until it ends, or stop it; or choose another --out") from None
    return lock


# %%
holder = f"""
import sys, time
from pathlib import Path
from speedrun.lab.files import claim
lock = claim(Path({str(scratch)!r}), "train")
print("mine", flush=True)
time.sleep(600)
"""
live = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
assert live.stdout.readline() == "mine\n"
try:
    claim(scratch, "train")
except UserError as problem:
    print(problem)
else:
    raise AssertionError("two processes had it at once")
claim(scratch, "launch").release()  # the other role is free
live.kill()  # no clean-up of its own
live.wait()
claim(scratch, "train").release()

# %% [markdown]
# ## What it costs, and when it fails
#
# `fsync` waits for the disk. How long depends on the disk and on what else it does (a checkpoint of record 1 has 1.5 GB with its optimizer); here it is:

# %%
block = os.urandom(1 << 24)
began = time.perf_counter()
(scratch / "unsynced").write_bytes(block)
middle = time.perf_counter()
atomic_write(scratch / "synced", block)
plain_ms, synced_ms = 1000 * (middle - began), 1000 * (time.perf_counter() - middle)
assert (scratch / "synced").read_bytes() == block
print(f"16 MiB: {plain_ms:.0f} ms without waiting, {synced_ms:.0f} ms until it is on the disk")

# %% [markdown]
# All of that is off the clock of training: the loop of [chapter 23](23_training_loop.py) stops its clock before it saves.
#
# What this page cannot do:
#
# - **A lock needs a file system that has locks.** Some network file systems do not; `filelock` then falls back on a file whose existence is the lock, and that file outlives a crash.
# - **`Steady` must not hide a bug.** A bug in what is printed would go unseen if `Steady` swallowed more than it does: it suppresses what the *stream* raises, never what computing the text raises.
# - **`end_now` skips every `finally`.** That is right while nothing exists; from the moment when a run has something to lose, `Interrupts` ([the other workshop](92_a_run_that_survives.py)) takes the signals over and asks between two steps.
# - **An `OSError` is explained by its number**, and a number can be wrong about the cause: a FUSE file system may say "no permission" where it means "no network".
#
# ## Exercises
#
# **1.** `atomic_write` replaces one file. A data folder has many, with a manifest that lists them, and a reader who comes in between must never find an old manifest over new shards. Write `swap(staged, folder)`, which moves all files of `staged` into `folder`, with `manifest.json` last.
# What does a reader find after a crash in the middle? (It must be something that he can notice.)


# %% tags=["solution"]
def swap(staged: Path, folder: Path) -> None:
    """Move all files of a staging folder into another, so that no manifest ever lists shards that are not its own."""
    (folder / "manifest.json").unlink(missing_ok=True)
    for path in sorted(staged.iterdir(), key=lambda path: path.name == "manifest.json"):
        os.replace(path, folder / path.name)


# %%
from unittest import mock

trial, seen, move = Path(tempfile.mkdtemp(dir=scratch)), [], os.replace
for name, text in {"old": "1", "new": "2"}.items():
    (trial / name).mkdir()
    for part in ("manifest.json", "train_000000.bin", "val_000000.bin"):
        (trial / name / part).write_text(text)


def watched(a, b):
    move(a, b)
    there = {path.name: path.read_text() for path in (trial / "old").iterdir()}
    assert "manifest.json" not in there or len(set(there.values())) == 1, (
        f"a crash after the move of {Path(b).name} leaves a manifest over another set's shards"
    )
    seen.append(Path(b).name)


with mock.patch.multiple(os, replace=watched, rename=watched):
    swap(trial / "new", trial / "old")
assert len(seen) == 3, f"three files are to be moved (os.replace), but {len(seen)} were"
there = [path.read_text() for path in (trial / "old").iterdir()]
assert there == ["2"] * 3, f"at the end there should be the three new files (2), not {there}"
print("order of the renames:", ", ".join(seen))

# %% [markdown]
# **2.** A program asks `path.exists()` and then calls `path.mkdir()`. Write `careless(path)`, which does so and returns whether it believes to have made the folder, and see with threads that two callers can both believe it, if `exist_ok=True` is given to keep the second one from failing.


# %% tags=["solution"]
def careless(path: Path) -> bool:
    """Make a folder, and return whether this caller believes to be the one who made it."""
    mine = not path.exists()
    time.sleep(0.01)  # what else a program does
    path.mkdir(exist_ok=True)
    return mine


# %%
shared = Path(tempfile.mkdtemp(dir=scratch)) / "shared"
with ThreadPoolExecutor(8) as pool:
    believers = sum(pool.map(lambda _: careless(shared), range(8)))
assert believers > 1, (
    f"only {believers} of 8 threads believed that it made the folder: leave time between the question and mkdir"
)
assert not careless(shared), (
    "the folder is there by now, and a later caller still believes that it made it"
)
print(f"{believers} callers believe that the folder is theirs alone")
