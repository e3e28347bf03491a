"""Hundreds of kills and interrupts at random moments: nothing is lost, nobody is left over, a resumed run is the same run.

    python -m pytest -m endurance             all of it, some two hours on two cores (ENDURANCE=0.1: a tenth of the counts)
    python -m pytest -m slow tests/test_endurance.py     a fixed sample (make check)

What is drawn at random (when, whom, which signal) comes from fixed seeds; how far a run has come at that moment does not. The
kills of ranks (TestResumedRunsAreTheSame) happen to forked children (zygote.py), whose training is the real command. All others
happen to real trees of processes: the launcher, torchrun and its ranks; papermill and the notebook's kernel. Only processes that
a test has started are ever ended: each tree carries a variable of its environment that names its folder.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import zygote
from test_fuzz import newest, run_command, show, tensors_of, write_shard
from zygote import ROOT, as_command

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork, and /proc")
SCALE = float(os.environ.get("ENDURANCE", "1"))
SIZES = "--model.num-layers 2 --model.num-heads 2 --model.model-dim 32 --model.max-seq-len 32 --data.seq-len 32 --data.batch-tokens 256"
SMALL = ["--preset", "smoke", *SIZES.split(), "--warmup", "1", "--schedule.warmup-steps", "5"]
SIXTY = "--steps 60 --val-every 30 --val-tokens 2048 --log-every 1 --checkpoint-every 5"
BRIEF = [*SMALL, *SIXTY.split()]
MILLION = "--steps 1000000 --val-every 1000000 --val-tokens 2048 --log-every 5"
ENDLESS = [*SMALL, *MILLION.split()]
SHARED = ["--optim.matrices", "muon", "--optim.matrix-lr", "0.016", "--optim.adam.every", "2"]
GONE_S = 15.0  # until then every process of a killed tree must have ended
MARK = "SPEEDRUN_ENDURANCE"
ROWS: list[str] = []


def times(count: int) -> int:
    """A count at this session's scale, 1 at least."""
    return max(1, round(count * SCALE))


# %% A killed rank, and the run resumed
def make_data(folder: Path) -> None:
    """20,000 tokens to train on and 4,000 to validate on."""
    folder.mkdir()
    for seed, (name, count) in enumerate({"train_000000.bin": 20_000, "val_000000.bin": 4_000}.items()):  # fmt: skip
        write_shard(folder / name, seed, count)


def free_port() -> int:
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        return there.getsockname()[1]


def start_ranks(arguments: list[str], world: int, log: Path) -> list[int]:
    """Fork the ranks of a run, as torchrun would start them."""
    port, pids = str(free_port()), []
    for rank in range(world):
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        environment = {name: str(value) for name, value in facts.items()} if world > 1 else {}
        pids.append(zygote.fork(as_command("speedrun.train", arguments), log, environment))
    return pids


def facts_of(folder: Path) -> dict:
    """All losses of a run, as they were written, and its last tensors."""
    from speedrun.lab.metrics import read_metrics, series

    records = read_metrics(folder / "metrics.jsonl")
    losses = {kind: {row["step"]: row[name] for row in series(records, kind)} for kind, name in (("step", "train_loss"), ("val", "val_loss"))}  # fmt: skip
    return losses | {"tensors": tensors_of(newest(folder))}


def same(folder: Path, undisturbed: dict) -> str:
    """“exact”, or the first thing that is not."""
    found = facts_of(folder)
    for name, wanted in undisturbed.items():
        if found[name].keys() != wanted.keys():
            return f"{name}: other keys"
        differ = [key for key in wanted if found[name][key] != wanted[key]]
        if differ and name != "tensors":
            most = max(abs(found[name][key] - wanted[key]) for key in differ)
            return f"{name}: from step {differ[0]}, by {most:.1e} at most"
        if differ:
            return f"tensors: {len(differ)} differ"
    return "exact"


def disturbed(folder: Path, flags: list[str], world: int, rng: random.Random, seconds: float) -> dict:  # fmt: skip
    """One run whose ranks are killed at random moments, and resumed once or twice to its end. seconds: an undisturbed one's."""
    log, arguments = folder.with_suffix(".log"), [*BRIEF, *flags, "--out", str(folder)]
    resumed: list[int] = []
    kills = anew = 0
    while True:
        pids = start_ranks(arguments, world, log)
        if kills == 9 or len(resumed) == 2 or (resumed and rng.random() < 0.5):
            break  # resumed at least once, unless it was always killed before it had saved
        time.sleep(rng.uniform(0.05, 1.0) * seconds)
        zygote.end(rng.choice(pids))
        if world > 1:
            time.sleep(rng.uniform(0, 0.3))
        for pid in pids:
            zygote.end(pid)
        zygote.wait(pids)
        kills += 1
        if list(folder.glob("checkpoints/step-*[0-9]")):
            arguments = ["--resume", str(folder)]
            resumed.append(int(newest(folder).name[5:]))
        else:
            anew += 1
            shutil.rmtree(folder, ignore_errors=True)
    statuses = zygote.wait(pids, 120)
    return {"kills": kills, "anew": anew, "resumed": resumed, "statuses": statuses}


def kill_and_resume(home: str, name: str, world: int, flags: list[str], count: int, seed: int) -> None:  # fmt: skip
    """In a zygote: an undisturbed run, then `count` disturbed ones, each a line of JSON."""
    base, data = Path(home) / name, ["--data.path", str(Path(home) / "data")]
    zygote.preload(("speedrun.train", [*BRIEF, *flags, *data, "--max-steps", "2", "--out", str(base / "example")]))  # fmt: skip
    if not (Path(home) / "data" / "manifest.json").exists():
        assert not run_command("speedrun.data", ["manifest", data[1], "--tokenizer", "bytes"]).status  # fmt: skip
    flags, whole = [*flags, *data], base / "whole"
    base.mkdir(exist_ok=True)
    began = time.monotonic()
    assert not any(zygote.wait(start_ranks([*BRIEF, *flags, "--out", str(whole)], world, base / "whole.log")))  # fmt: skip
    seconds, undisturbed = time.monotonic() - began, facts_of(whole)
    for number in range(count):
        folder = base / f"run-{number}"
        found = disturbed(folder, flags, world, random.Random(f"{seed} {number}"), seconds)
        if any(found["statuses"]):
            found["result"] = f"statuses {found['statuses']}: {folder.with_suffix('.log').read_text()[-300:]}"  # fmt: skip
        else:
            found["result"] = same(folder, undisturbed)
            found["said"] = "rounding" in (folder / "log.txt").read_text()
            found["steps"] = len(facts_of(folder)["step"])
        print(json.dumps(found), flush=True)
        shutil.rmtree(folder, ignore_errors=True)


def resumed_runs(home: Path, name: str, world: int, flags: list[str], count: int) -> list[dict]:
    """`count` disturbed runs; adds a row to the table."""
    if not (home / "data").exists():
        make_data(home / "data")
    inputs = [[str(home), name, world, flags, count, 1]]
    runs = zygote.zygotes("test_endurance", "kill_and_resume", inputs, home, 60 + 20 * count)
    kills, anew = sum(run["kills"] for run in runs), sum(run["anew"] for run in runs)
    exact = sum(run["result"] == "exact" for run in runs)
    said = sum(run["result"] != "exact" and run.get("said", False) for run in runs)
    steps = Counter(step % 2 for run in runs for step in run["resumed"])
    ROWS.append(f"| kill -9 of a rank, {name} | {len(runs)} runs, {kills} kills ({anew} before the first checkpoint), resumed at {steps[0]} even and {steps[1]} odd steps | {exact} exact, {said} said “up to rounding”, {len(runs) - exact - said} neither |")  # fmt: skip
    return runs


class TestResumedRunsAreTheSame:
    """All losses and the bytes of the last checkpoint's tensors are those of a run that nobody disturbed."""

    @pytest.mark.endurance
    @pytest.mark.timeout(3600)
    @pytest.mark.parametrize(
        ("name", "world", "flags", "count"),
        [
            ("one rank", 1, [], 60),
            ("two ranks", 2, [], 25),
            ("two ranks that share the update", 2, SHARED, 25),
        ],
    )
    def test_killed_at_random(self, home, name, world, flags, count):
        runs = resumed_runs(home, name, world, flags, times(count))
        # ranks that share the update sum its gradients at every second step: what they save in between is
        # summed in another order, which the log has to say
        allowed = [run for run in runs if flags and run.get("said")]
        wrong = [run for run in runs if run["result"] != "exact" and run not in allowed]
        assert len(runs) == times(count) and not wrong, wrong[:3]

    @pytest.mark.slow
    def test_a_few(self, home):
        runs = resumed_runs(home, "one rank, a few", 1, [], 6)
        assert [run["result"] for run in runs] == ["exact"] * 6


# %% Trees of processes
def restore_signals() -> None:
    """Under nohup, or started in the background, a test would hand on that signals are ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.default_int_handler)  # fmt: skip


def grow(command: list[str], folder: Path) -> psutil.Popen:
    """Start a command whose whole tree carries its folder's name, in a session of its own. Its output goes to FOLDER.out."""
    restore_signals()
    environment = os.environ | zygote.ENVIRONMENT | {MARK: str(folder), "YES": "1"}
    with open(f"{folder}.out", "wb") as out:
        return psutil.Popen(command, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)  # fmt: skip


def alive(folder: Path) -> list[psutil.Process]:
    """All processes of a tree that are still there, whoever their parents are by now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:  # fmt: skip
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
    return found


def fell(folder: Path) -> None:
    """End what is left of a tree."""
    for process in alive(folder):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def until_gone(folder: Path, limit_s: float) -> float:
    """Seconds until nothing of a tree is left, `limit_s` at most."""
    began = time.monotonic()
    while alive(folder) and time.monotonic() - began < limit_s:
        time.sleep(0.1)
    return time.monotonic() - began


def step_of(folder: Path) -> int:
    """The last training step that a run has logged; 0 before the first."""
    path = folder / "log.txt"
    steps = re.findall(r"^step:(\d+)/\d+ train_loss", path.read_text() if path.exists() else "", re.MULTILINE)  # fmt: skip
    return int(steps[-1]) if steps else 0


def saved(folder: Path) -> tuple[int, float]:
    """Step of the newest checkpoint that loads, and when it was complete (seconds since 1970); (0, 0.0) if there is none."""
    from speedrun.checkpoint import checkpoints, latest_checkpoint, load_checkpoint

    if not checkpoints(folder):
        return 0, 0.0
    newest_one = latest_checkpoint(folder)
    facts = load_checkpoint(newest_one)[2]
    return facts["step"], (newest_one / "state.json").stat().st_mtime


CUT = """
import runpy, sys
import jupytext
read = jupytext.read
def cut(*args, **kwargs):  # the parameters and the launch, without the rest of the chapter
    notebook = read(*args, **kwargs)
    given = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    launch = [c for c in notebook.cells if "\\nlaunch(" in c.source]
    assert given and launch
    launch[0].source = "from speedrun.launch import *\\nfrom speedrun.checkpoint import checkpoints\\nimport tempfile\\nscratch = Path(tempfile.mkdtemp())\\n" + launch[0].source
    notebook.cells = [*given, launch[0]]
    return notebook
jupytext.read = cut
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])  # as Python does for a script
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SCRIPT = str(ROOT / "scripts" / "run_speedrun.py")


def command_for(kind: str, folder: Path, data: Path, ranks: int) -> list[str]:
    """The command of a tree: train, launch, run_speedrun, or run_speedrun with a notebook that is cut to its launch."""
    flags = [*ENDLESS, "--data.path", str(data), "--out", str(folder)]
    if kind == "train":
        return [sys.executable, "-m", "speedrun.train", *flags]
    flags += ["--gpus", str(ranks), "--yes"]
    if kind == "launch":
        return [sys.executable, "-m", "speedrun.launch", *flags]
    return [sys.executable, *(["-c", CUT] if kind == "cut" else []), SCRIPT, *flags]


def victim(kind: str, root: psutil.Popen, folder: Path) -> psutil.Process:
    """Whom to kill, as soon as it is there: the process that was started, torchrun, or the notebook's kernel."""
    if kind in ("launcher", "papermill"):
        return root
    name = {"torchrun": "torch.distributed.run", "kernel": "ipykernel"}[kind]
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for process in alive(folder):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(name in word for word in process.cmdline()):
                    return process
        time.sleep(0.05)
    raise AssertionError(f"there is no {kind} in this tree")


def wait_for_steps(root: psutil.Popen, folder: Path, limit_s: float = 120.0) -> None:
    """Until a run trains."""
    until = time.monotonic() + limit_s
    while not step_of(folder):
        said = Path(f"{folder}.out").read_text(errors="replace")
        assert root.poll() is None and time.monotonic() < until, said[-2000:]
        time.sleep(0.05)


def killed(kind: str, number: int, home: Path, data: Path) -> dict:
    """A tree of two ranks, one of its processes killed: while it trains, every fifth while it starts.

    Every tenth notebook is the whole chapter.
    """
    rng, folder = random.Random(f"{kind} {number}"), home / f"{kind}-{number}"
    command = {"launcher": "launch", "torchrun": "launch"}.get(kind, "run_speedrun" if number % 10 == 9 else "cut")  # fmt: skip
    root = grow(command_for(command, folder, data, 2), folder)
    try:
        if number % 5 == 3:
            time.sleep(rng.uniform(0.5, 10.0))
        else:
            wait_for_steps(root, folder)
            time.sleep(rng.uniform(0, 1.0))
        target, before = victim(kind, root, folder), step_of(folder)
        target.kill()
        began = time.time()
        gone_s = until_gone(folder, 60.0)
        left = [process.cmdline()[:4] for process in alive(folder)]
    finally:
        fell(folder)
        root.wait(timeout=10)
    step, when = saved(folder)
    facts = {"kind": kind, "number": number, "gone_s": gone_s, "left": left, "before": before}
    shutil.rmtree(folder, ignore_errors=True)
    return facts | {"saved": step, "saved_s": when - began if step else None}


def kills(home: Path, counts: dict[str, int]) -> list[str]:
    """Kill processes of trees; a row of the table for each kind. Returns what went wrong."""
    data, wrong = ready(home), []
    for kind, count in counts.items():
        found = [killed(kind, number, home, data) for number in range(count)]
        late = [row for row in found if row["gone_s"] > GONE_S]
        lost = [row for row in found if row["saved"] < row["before"]]
        gone, until = max(row["gone_s"] for row in found), max((row["saved_s"] or 0.0) for row in found)  # fmt: skip
        ROWS.append(f"| kill -9 of the {kind}, two ranks | {count} | {len(late)} left after {GONE_S:.0f} s, {len(lost)} without the steps before the kill; all gone after {gone:.1f} s, saved after {until:.2f} s at most |")  # fmt: skip
        wrong += [str(row) for row in late + lost]
    return wrong


def ready(home: Path) -> Path:
    """The data folder, with its manifest."""
    data = home / "data"
    if not data.exists():
        make_data(data)
    if not (data / "manifest.json").exists():
        subprocess.run([sys.executable, "-m", "speedrun.data", "manifest", str(data), "--tokenizer", "bytes"], check=True, capture_output=True, cwd=ROOT)  # fmt: skip
    return data


class TestNobodyIsLeft:
    @pytest.mark.endurance
    @pytest.mark.timeout(14400)
    @pytest.mark.parametrize("kind", ["launcher", "torchrun", "kernel", "papermill"])
    def test_killed_while_training(self, home, kind):
        assert not (wrong := kills(home, {kind: times(25)})), wrong

    @pytest.mark.slow
    def test_two_of_them(self, home):
        assert not (wrong := kills(home, {"launcher": 1, "papermill": 1})), wrong


# %% Interrupts, from the start
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal: from then on it is Python code of ours that runs."""
    text = Path(f"/proc/{pid}/status").read_text()
    mask = int(re.search(r"^SigCgt:\s*(\w+)", text, re.MULTILINE)[1], 16)
    return bool(mask >> (number - 1) & 1)


def interrupted(kind: str, number: int, home: Path, data: Path, trains: bool = False) -> dict:
    """A command that gets a signal, alone or as a terminal sends it (to its group), up to 12 seconds after its start.

    trains: up to 2 seconds after its first training steps.
    """
    rng, folder = random.Random(f"interrupt {kind} {number}"), home / f"interrupt-{kind}-{number}"
    sign, delay = NUMBERS[number % 3], rng.uniform(0, 2 if trains else 12)
    ranks, group = rng.choice((1, 2)), rng.random() < 0.5
    root = grow(command_for(kind, folder, data, ranks), folder)
    try:
        if trains:
            wait_for_steps(root, folder)
        time.sleep(delay)
        assert root.poll() is None, Path(f"{folder}.out").read_text(errors="replace")[-2000:]
        # the first moments belong to the interpreter; SIGTERM is what only we can be waiting for
        early = not trains and delay < 1.0 and not catches(root.pid, signal.SIGTERM)
        before, began = step_of(folder), time.time()
        os.killpg(root.pid, sign) if group else root.send_signal(sign)
        try:
            status: int | None = root.wait(timeout=45)
        except psutil.TimeoutExpired:
            status = None
        ended_s = time.time() - began
        until_gone(folder, GONE_S)
        left = [process.cmdline()[:4] for process in alive(folder)]
    finally:
        fell(folder)
        root.wait(timeout=10)
    said = Path(f"{folder}.out").read_text(errors="replace")
    step, when = saved(folder)
    wrong = faults(sign, early, status, said, left if status is not None else [])
    wrong += [f"step {before} at the signal, {step} saved"] if before > step else []
    shutil.rmtree(folder, ignore_errors=True)
    words = f"{sign.name}{' to the group' * group} after {delay:.2f} s at step {before}, {ranks} ranks"  # fmt: skip
    return {"kind": kind, "words": words, "wrong": wrong, "early": early, "ended_s": ended_s, "saved_s": when - began if before and step else 0.0, "said": said[-300:] if wrong else ""}  # fmt: skip


def faults(sign: signal.Signals, early: bool, status: int | None, said: str, left: list) -> list[str]:  # fmt: skip
    """What is wrong with how a command ended after a signal."""
    if status is None:
        return ["the signal was lost"]
    fine = status == 128 + sign or (early and status == -sign)
    wrong = [] if fine else [f"status {status}, not {128 + sign}"]
    told = "Traceback" in said or "KeyboardInterrupt" in said
    wrong += ["a traceback"] if told and not early else []
    return wrong + ([f"left: {left}"] if left else [])


def interrupts(kind: str, count: int, home: Path, trains: bool) -> str:
    """Interrupt a command `count` times; a row of the table. Returns what went wrong."""
    data = ready(home)
    found = [interrupted(kind, number, home, data, trains) for number in range(count)]
    bad = [row for row in found if row["wrong"]]
    why = Counter(re.sub(r"step \d+ at.*", "steps lost", word.partition(":")[0]) for row in bad for word in row["wrong"])  # fmt: skip
    early, when = sum(row["early"] for row in found), "while it trains" if trains else "0 to 12 s after its start"  # fmt: skip
    ended, until = max(row["ended_s"] for row in found), max(row["saved_s"] for row in found)
    ROWS.append(f"| interrupt of {kind}, {when} | {len(found)} ({early} before its first line) | {len(found) - len(bad)} as they should be; {dict(why) or 'none lost, no traceback'}; ended after {ended:.1f} s, saved after {until:.2f} s at most |")  # fmt: skip
    return "\n".join(f"{row['words']}: {row['wrong']} {row['said']!r}" for row in bad)


class TestNoInterruptIsLost:
    @pytest.mark.endurance
    @pytest.mark.timeout(7200)
    @pytest.mark.parametrize("kind", ["train", "launch", "run_speedrun"])
    def test_from_the_start(self, kind, home):
        assert not (wrong := interrupts(kind, times(60), home, trains=False)), wrong

    @pytest.mark.endurance
    @pytest.mark.timeout(7200)
    @pytest.mark.parametrize("kind", ["train", "launch", "cut"])
    def test_while_it_trains(self, kind, home):
        assert not (wrong := interrupts(kind, times(15), home, trains=True)), wrong


@pytest.fixture(scope="module")
def home(tmp_path_factory, request) -> Path:
    """A folder for all of it; at the end the table is printed."""
    yield tmp_path_factory.mktemp("endurance")
    text = "\n".join(["| test | N | result |", "| --- | --- | --- |", *ROWS])
    show(request, text)
    (ROOT / "_build").mkdir(exist_ok=True)
    (ROOT / "_build" / "endurance.md").write_text(text + "\n")
