# Tangled from notebooks/92_a_run_that_survives.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.checkpoint import checkpoints
from speedrun.heartbeat import RankStatus, read_heartbeats


# %% Launching ranks: the rendezvous
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


# %% Detecting a hung rank
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


# %% Terminating ranks
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


# %% The supervisor's loop
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


def failure(folder: Path, why: str) -> UserError:
    """The end of a failed run, with the way to go on."""
    saved, last_words = checkpoints(folder), folder / "output.txt"
    fix = f"it had no checkpoint yet; its last words are in {last_words}"
    if saved:
        fix = f"python -m speedrun.launch --resume {quoted(folder)} goes on from {saved[-1].name}"
    return UserError(f"the run in {folder} failed: {why}", fix)


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
