# Tangled from notebooks/93_errors_and_files.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% UserError: an error that names a remedy
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


# %% What the operating system refuses
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


# %% Printing never ends a run
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


# %% One entry point for every command: run_main
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


# %% Ctrl-C, from the first moment
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
