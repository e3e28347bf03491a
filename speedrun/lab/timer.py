# Tangled from notebooks/04_measuring.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% A clock that can be stopped
import contextlib
import time

import torch


class TrainClock:
    """Training time in ms, stopped for whatever does not count. `elapsed_ms` may carry on from a checkpoint."""

    def __init__(self, device: torch.device, elapsed_ms: float = 0.0):
        self.device, self.elapsed_ms = device, elapsed_ms
        self.since: float | None = None

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def start(self) -> None:
        self.wait()
        self.since = time.perf_counter()

    def stop(self) -> None:
        self.wait()
        self.elapsed_ms, self.since = self.ms, None

    @property
    def ms(self) -> float:
        """Training time so far, without waiting for the device."""
        return self.elapsed_ms + (1000 * (time.perf_counter() - self.since) if self.since else 0.0)


@contextlib.contextmanager
def off_the_clock(clock: TrainClock, marks: "StepTimer | None" = None):
    """What happens in this block is not training time, nor part of a step for `marks`."""
    running = clock.since is not None
    clock.stop()
    yield
    if running:
        clock.start()
    if marks is not None:
        marks.restart()


class StepTimer:
    """Durations of single steps: `mark` after each, `drain` now and then. On a GPU a mark costs no waiting."""

    def __init__(self, device: torch.device):
        self.device, self.marks, self.done = device, [], []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def drain(self) -> list[float]:
        """Milliseconds between successive marks since the last drain. The device must have been waited for."""
        pairs, done = list(zip(self.marks, self.marks[1:])), self.done
        self.marks, self.done = self.marks[-1:], []
        gpu = self.device.type == "cuda"
        return done + [a.elapsed_time(b) if gpu else 1000 * (b - a) for a, b in pairs]

    def restart(self) -> None:
        """Leave out what happened since the last mark: a validation, say."""
        self.done, self.marks = self.drain(), []
        self.mark()
