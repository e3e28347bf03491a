"""The launcher and papermill: live lines, silence, failure, and that no rank survives whoever started it."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import forked
import jupytext
import nbformat
import psutil
import pytest

from speedrun.config import vary
from speedrun.data.loader import DataConfig
from speedrun.heartbeat import read_heartbeats
from speedrun.lab.errors import UserError
from speedrun.lab.hardware import GPU, Machine
from speedrun.lab.metrics import read_metrics, series
from speedrun.launch import choose_preset, confirm, make_plan, prepare_data
from speedrun.presets import preset
from speedrun.supervise import Patience, diagnosis, rank_environment, run_ranks

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and process groups")

RUDE = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
import os
from speedrun.heartbeat import Heartbeat, lifeline
lifeline()
heartbeat = Heartbeat(Path(sys.argv[1]), int(os.environ["RANK"]))
heartbeat.phase("train", 3)
time.sleep(600)
"""


def launch(arguments: list[str]) -> int:
    """A launcher of two ranks: their folder, how long they may save, and their program."""
    folder, grace_s, *program = arguments
    run_ranks(program, 2, Path(folder), grace_s=float(grace_s))
    return 0


def launcher_of(program: list[str], folder: Path, grace_s: int = 30):
    """Its process; what it says, nobody reads."""
    words = [str(folder / "run"), str(grace_s), *program]
    return forked.start("test_launch:launch", words, output=folder / "said.txt")


@pytest.fixture
def rude(tmp_path) -> list[str]:
    """A program whose ranks print nothing, ignore SIGTERM and SIGINT, and sleep."""
    (tmp_path / "rude.py").write_text(RUDE)
    return [str(tmp_path / "rude.py"), str(tmp_path / "run")]


def wait_for(condition, seconds: float = 60.0):
    """What `condition` returns once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("it never happened")


def two_training(folder: Path) -> list[psutil.Process] | None:
    """The processes of two ranks, once both say that they train."""
    found = [status for status in read_heartbeats(folder) if status.phase == "train"]
    return [psutil.Process(status.pid) for status in found] if len(found) == 2 else None


def parent_of(rank: psutil.Process) -> psutil.Process:
    """A rank's torchrun."""
    return rank.parent() or pytest.fail("the rank has no parent")


def all_gone(processes: list[psutil.Process], seconds: float = 20.0) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


class TestNoRankOutlivesAnybody:
    @pytest.mark.parametrize("victim", ["launcher", "torchrun"])
    def test_killed(self, rude, tmp_path, victim):
        launcher = launcher_of(rude, tmp_path)
        ranks = wait_for(lambda: two_training(tmp_path / "run"))
        torchrun = parent_of(ranks[0])
        (launcher if victim == "launcher" else torchrun).kill()
        assert all_gone([*ranks, torchrun])
        assert launcher.wait(timeout=30) != 0

    @pytest.mark.parametrize("late", [0.0, 2.0])
    def test_torchrun_dies_while_its_ranks_are_still_imported(self, tmp_path, late):
        """Their parent has changed before they could note it; only the launcher's number tells."""
        (tmp_path / "slow.py").write_text(f"import time\ntime.sleep({late})\n" + RUDE)
        program = [str(tmp_path / "slow.py"), str(tmp_path / "run")]
        launcher = launcher_of(program, tmp_path)
        family = psutil.Process(launcher.pid)
        tree = wait_for(
            lambda: (found := family.children(recursive=True)) and len(found) == 3 and found
        )
        torchrun = next(process for process in tree if process.ppid() == launcher.pid)
        torchrun.kill()
        assert all_gone(tree, 12)
        assert launcher.wait(timeout=30) != 0

    @pytest.mark.slow
    @pytest.mark.parametrize(  # make check kills papermill in tests/test_endurance.py
        ("victim", "how"),
        [
            pytest.param("papermill", signal.SIGKILL, marks=pytest.mark.long),
            ("papermill", signal.SIGTERM),
            ("kernel", signal.SIGKILL),
            ("kernel", signal.SIGTERM),
        ],
    )
    def test_killed_from_a_notebook(self, rude, tmp_path, victim, how):
        code = f"from pathlib import Path\nfrom speedrun.supervise import run_ranks\nrun_ranks({rude!r}, 2, Path({rude[1]!r}))"
        write_notebook(tmp_path / "in.ipynb", code)
        papermill = psutil.Popen(
            [sys.executable, "-m", "papermill", tmp_path / "in.ipynb", tmp_path / "out.ipynb"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        ranks = wait_for(lambda: two_training(tmp_path / "run"))
        torchrun = parent_of(ranks[0])
        kernel = torchrun.parent()
        assert kernel and papermill in kernel.parents()
        (papermill if victim == "papermill" else kernel).send_signal(how)
        assert all_gone([*ranks, torchrun, kernel], 40)
        papermill.kill()

    def test_a_rank_that_ignores_everything_is_ended_when_the_launcher_is_asked_to(
        self, rude, tmp_path
    ):
        launcher = launcher_of(rude, tmp_path, 1)
        ranks = wait_for(lambda: two_training(tmp_path / "run"))
        everybody = [*ranks, psutil.Process(launcher.pid)]
        launcher.send_signal(signal.SIGINT)
        assert all_gone(everybody)

    def test_silence_is_noticed_and_located(self, rude, tmp_path):
        with pytest.raises(UserError) as caught:
            patience, silent = Patience(train=1.0), lambda line: None
            run_ranks(rude, 2, tmp_path / "run", patience, echo=silent, grace_s=1.0)
        assert "hangs: silent for" in caught.value.what and "rude.py" in caught.value.what
        assert "--patience.train" in caught.value.what, "and how to be more patient"
        assert not any(
            psutil.pid_exists(status.pid) for status in read_heartbeats(tmp_path / "run")
        )


def write_notebook(path: Path, *cells: str) -> None:
    """A notebook of live code cells with the kernel that papermill wants named."""
    live = {"tags": ["live"]}
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell, metadata=live) for cell in cells]
    )
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}  # fmt: skip
    nbformat.write(notebook, path)


def program(folder: Path, text: str) -> list[str]:
    """A rank's program of a few lines."""
    path = folder / "program.py"
    path.write_text("import os, sys, time\nrank = int(os.environ['RANK'])\n" + text)
    return [str(path)]


class TestWatching:
    def test_lines_arrive_within_two_seconds_of_their_writing(self, tmp_path):
        """Each line says when it was written; it is seen two seconds later at most, through papermill too."""
        talk = program(tmp_path, "for n in range(4):\n    sys.stdout.write(f'at {time.time()}\\n'); sys.stdout.flush(); time.sleep(0.7)\n")  # fmt: skip
        code = f"from pathlib import Path\nfrom speedrun.supervise import run_ranks\nrun_ranks({talk!r}, 1, Path({str(tmp_path / 'run')!r}))"
        write_notebook(tmp_path / "in.ipynb", code)
        runner = "import sys; sys.path[:0] = [sys.argv[1]]; import run_speedrun as run, papermill; run.papermill_engines.register('live', run.LiveEngine); papermill.execute_notebook(sys.argv[2], sys.argv[3], engine_name='live', progress_bar=False)"
        scripts = Path(__file__).resolve().parent.parent / "scripts"
        command = [sys.executable, "-c", runner, str(scripts), str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb")]  # fmt: skip
        live = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        delays = [
            time.time() - float(line.split()[1]) for line in live.stdout if line.startswith("at ")
        ]
        assert live.wait() == 0 and len(delays) == 4 and max(delays) < 2.0
        executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
        assert sum(o["text"].count("at ") for o in executed.cells[0].outputs) == 4

    def test_a_rank_that_fails_is_named_and_its_last_words_kept(self, tmp_path):
        fail = program(tmp_path, "sys.stderr.write('the reason\\n')\nsys.exit(3 if rank == 1 else 0)\n")  # fmt: skip
        with pytest.raises(UserError, match="rank 1 ended with status 3") as caught:
            run_ranks(fail, 2, tmp_path / "run", echo=lambda line: None)
        assert "output.txt" in caught.value.fix
        assert "the reason" in (tmp_path / "run" / "output.txt").read_text()

    def test_a_rank_that_is_killed_is_named(self, tmp_path):
        die = program(tmp_path, "import signal\ntime.sleep(1)\nos.kill(os.getpid(), signal.SIGKILL) if rank == 0 else time.sleep(60)\n")  # fmt: skip
        with pytest.raises(UserError, match="rank 0 was killed by SIGKILL"):
            run_ranks(die, 2, tmp_path / "run", echo=lambda line: None)

    def test_lines_of_two_ranks_do_not_mix(self, tmp_path):
        """Two ranks that say a hundred lines each, through `print_line`, at once."""
        talk = program(tmp_path, "from speedrun.command import print_line\nfor n in range(100): print_line(f'{rank}' * 50)\n")  # fmt: skip
        lines = []
        run_ranks(talk, 2, tmp_path / "run", echo=lines.append)
        assert sorted(line for line in lines if set(line) <= {"0", "1"}) == ["0" * 50] * 100 + ["1" * 50] * 100  # fmt: skip

    def test_without_an_output_the_status_is_all_there_is(self, tmp_path):
        assert diagnosis(tmp_path, 7) == "torchrun ended with status 7"

    def test_on_gpus_segments_of_memory_grow_unless_somebody_says_otherwise(
        self, tmp_path, monkeypatch
    ):
        both = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
        for name in both:
            monkeypatch.delenv(name, raising=False)
        assert not set(both) & set(rank_environment(1, 2, tmp_path))
        on_gpus = rank_environment(1, 2, tmp_path, "cuda")
        assert on_gpus["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
        for name in both:
            with monkeypatch.context() as here:
                here.setenv(name, "garbage_collection_threshold:0.8")
                told = rank_environment(1, 2, tmp_path, "cuda")
            assert [told[n] for n in both if n in told] == ["garbage_collection_threshold:0.8"]

    def test_an_environment_of_an_earlier_torchrun_does_no_harm(self, tmp_path, monkeypatch):
        for name, value in {"RANK": "5", "WORLD_SIZE": "9", "MASTER_PORT": "1", "LOCAL_RANK": "5"}.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        lines = []
        tell = program(tmp_path, "sys.stdout.write(f\"{rank} of {os.environ['WORLD_SIZE']}\\n\")\n")
        run_ranks(tell, 2, tmp_path / "run", echo=lines.append)
        assert sorted(lines) == ["0 of 2", "1 of 2"]


CARD = GPU(0, "GPU-0", "NVIDIA H100 80GB HBM3", 79.6, "580.65.06", (9, 0))
BARE = Machine("Linux x86_64", "3.12.1", 16, 128.0, (), {}, "13.0", None)


class TestPlanning:
    @pytest.mark.parametrize(
        ("gpus", "memory", "needs", "name", "words"),
        [
            (0, 0.0, 60.0, "cpu", "PRESET=smoke"),
            (1, 79.6, 60.0, "small", "PRESET=record"),
            (2, 79.6, 60.0, "record", "PRESET=small"),
            (8, 79.6, 60.0, "record", "PRESET=small"),
            (8, 24.0, 60.0, "small", "PRESET=record"),
        ],
    )
    def test_the_machine_decides_and_the_other_command_is_named(
        self, gpus, memory, needs, name, words
    ):
        machine = replace(BARE, gpus=(replace(CARD, memory_gb=memory),) * gpus)
        chosen, why = choose_preset(machine, needs)
        assert chosen == name and words in why

    def test_large_downloads_and_long_runs_ask_first(self, monkeypatch):
        machine = replace(BARE, gpus=(CARD,) * 8)
        known = [{"preset": "small", "device": CARD.name, "step": 9, "flops_per_second": 3e14}]
        plan = make_plan(
            vary(preset("record1"), {"data.path": "data/fineweb10B"}), machine, 0, known
        )
        assert plan.asks and plan.download_gb > 5 and plan.minutes > 30
        with pytest.raises(UserError, match="not started") as caught:
            confirm(plan, yes=False)
        assert "YES=1" in caught.value.fix
        confirm(plan, yes=True)
        for answer, goes_on in (("y", True), ("", False), ("no", False)):
            monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
            monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
            if goes_on:
                confirm(plan, yes=False)
            else:
                with pytest.raises(UserError):
                    confirm(plan, yes=False)

    def test_a_short_part_of_a_long_run_downloads_little(self):
        machine = replace(BARE, gpus=(CARD,))
        run = vary(preset("record"), {"max_steps": 50})
        assert make_plan(run, machine, 0, []).shards == 1

    def test_data_that_are_not_there_are_a_problem(self, tmp_path):
        run = replace(preset("smoke"), data=replace(preset("smoke").data, path=str(tmp_path)))
        with pytest.raises(UserError, match="holds no manifest"):
            prepare_data(make_plan(run, BARE, 0, []))

    def test_a_run_that_nobody_can_time_asks_first(self):
        assert make_plan(preset("small"), BARE, 0, []).asks
        known = [{"device": "CPU", "step": 1600, "flops_per_second": 1e11, "preset": "cpu"}]
        days = make_plan(preset("small"), BARE, 0, known)
        assert days.asks and days.minutes > 24 * 60 and "1,600 steps of cpu" in days.how

    def test_fewer_than_no_ranks_are_refused(self):
        with pytest.raises(UserError, match="--gpus -1"):
            make_plan(preset("cpu"), BARE, -1, [])

    def test_gpus_that_pytorch_cannot_use_are_named_before_anything_long(self, monkeypatch):
        from speedrun import launch as module

        monkeypatch.setattr(module, "gpu_problem", lambda machine: UserError("the driver is too old", "update it"))  # fmt: skip
        said = []
        run = vary(preset("record"), {"data.path": "data/fineweb10B"})
        with pytest.raises(UserError, match="driver is too old"):
            module.check_gpus(make_plan(run, BARE, 0, []), BARE, said.append)
        module.check_gpus(make_plan(vary(run, {"device": "cpu"}), BARE, 0, []), BARE, said.append)
        known = [{"preset": "smoke", "device": "CPU", "step": 9, "flops_per_second": 1e13}]
        module.check_gpus(make_plan(preset("smoke"), BARE, 0, known), BARE, said.append)
        assert len(said) == 1 and "driver is too old" in said[0]

    def test_ranks_that_do_not_divide_a_step_are_refused_before_anything_starts(self):
        run = replace(preset("record1"), data=DataConfig(path="data/fineweb10B"))
        with pytest.raises(UserError, match="3 ranks cannot share 8 micro-batches"):
            make_plan(run, replace(BARE, gpus=(CARD,) * 3), 3, [])
        plan = make_plan(run, replace(BARE, gpus=(CARD,) * 3), 0, [])
        assert (plan.world, plan.idle) == (2, 1) and "1 GPUs stay idle" in str(plan)


def test_a_second_ctrl_c_ends_the_waiting(tmp_path, monkeypatch, capsys):
    import run_speedrun

    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_speedrun.psutil, "wait_procs", pressed)
    (tmp_path / "heartbeat").mkdir()
    assert run_speedrun.interrupted(tmp_path, "interrupted") == 130
    assert "the ranks still save by themselves" in capsys.readouterr().out


@pytest.mark.slow
class TestTheRunScript:
    def script(self, folder: Path, *flags: str, **environment: str) -> subprocess.Popen:
        root = Path(__file__).resolve().parent.parent
        command = [sys.executable, str(root / "scripts" / "run_speedrun.py"), "--out", str(folder)]
        return subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment)  # fmt: skip

    def test_it_makes_everything_that_it_promises(self, tmp_path, embedded):
        flags = ["--preset", "smoke", "--gpus", "2", "--steps", "40", "--val-every", "20"]
        live = self.script(tmp_path / "run", *flags)
        said = live.communicate(timeout=280)[0]
        assert live.returncode == 0, said
        assert "step:40/40 val_loss:" in said and "missing" not in said
        for name in (
            "report.html",
            "speedrun.html",
            "speedrun.ipynb",
            "log.txt",
            "metrics.jsonl",
            "sample.txt",
        ):
            assert (tmp_path / "run" / name).stat().st_size > 0 and name in said
        report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
        losses = [
            r["val_loss"] for r in series(read_metrics(tmp_path / "run" / "metrics.jsonl"), "val")
        ]
        assert f"{losses[-1]:.4f} nats a token" in report and report.count("data:image/png") == 4
        links = re.findall(r'href="([^"]+)"', report)
        assert {"speedrun.html", "log.txt", "checkpoints"} <= {*links}
        assert all((tmp_path / "run" / link).exists() for link in links)
        assert "http:" not in report and "https:" not in report
        html = (tmp_path / "run" / "speedrun.html").read_text(encoding="utf-8")
        assert "40 steps" in html or "step:40/40" in html
        assert "{admonition}" not in html and "24_speedrun.py" not in html
        assert html.count("data:image/png;base64") >= 3
        notebook = jupytext.read(tmp_path / "run" / "speedrun.ipynb")
        (given,) = [
            c for c in notebook.cells if "injected-parameters" in c.metadata.get("tags", [])
        ]
        assert "gpus = 2" in given.source

    def test_a_run_that_fails_keeps_its_notebook_and_says_where(self, tmp_path, embedded):
        live = self.script(
            tmp_path / "run", "--preset", "smoke", "--steps", "60", "--optim.adam.lr", "1e9"
        )
        said = live.communicate(timeout=280)[0]
        assert live.returncode == 1 and "not finite" in said and "speedrun.html" in said
        page = (tmp_path / "run" / "speedrun.html").read_text(encoding="utf-8")
        assert "not finite" in page

    def test_a_mistake_is_refused_before_anything_is_made(self, tmp_path):
        live = self.script(tmp_path / "run", "--preset", "smol")
        said = live.communicate(timeout=120)[0]
        assert live.returncode == 1 and "did you mean" in said and not (tmp_path / "run").exists()

    def test_ctrl_c_saves_and_says_how_to_go_on(self, tmp_path, embedded):
        live = self.script(tmp_path / "run", "--preset", "smoke", "--steps", "20000", "--val-every", "20000")  # fmt: skip
        said = []
        for line in live.stdout:
            said.append(line)
            if line.startswith("step:100/"):
                break
        live.send_signal(signal.SIGINT)
        said += list(live.stdout)
        assert live.wait(timeout=60) == 130, "".join(said)
        assert "--resume" in "".join(said) and "Traceback" not in "".join(said)
        assert list((tmp_path / "run" / "checkpoints").glob("step-*"))

    @pytest.mark.parametrize("named", [True, False])
    def test_relative_paths_are_those_of_whoever_called(
        self, tmp_path, monkeypatch, embedded, named
    ):
        """The notebook runs in the project's folder; the words were said elsewhere."""
        import run_speedrun

        (tmp_path / "texts").symlink_to(embedded.resolve())
        monkeypatch.chdir(tmp_path)
        given: list[dict] = []
        monkeypatch.setattr(run_speedrun, "execute", lambda parameters, folder: (given.append(parameters), folder / "n.ipynb")[1])  # fmt: skip
        monkeypatch.setattr(run_speedrun, "root", lambda: tmp_path)
        monkeypatch.setattr(run_speedrun.Insisting, "install", lambda self: None)
        words = ["--preset", "smoke", "--data", "texts", *(["--out", "mine"] if named else [])]
        assert run_speedrun.main(words) == 0
        assert given[0]["data"] == str(tmp_path / "texts") and Path(given[0]["out"]).is_relative_to(tmp_path)  # fmt: skip

    def test_a_folder_with_a_run_is_not_written_over(self, tmp_path, capsys):
        import run_speedrun

        (tmp_path / "metrics.jsonl").write_text("{}\n")
        (tmp_path / "speedrun.ipynb").write_text("the notebook of that run")
        assert run_speedrun.main(["--preset", "smoke", "--out", str(tmp_path)]) == 1
        assert "holds a run already" in capsys.readouterr().err
        assert (tmp_path / "speedrun.ipynb").read_text() == "the notebook of that run"

    def test_a_run_gets_no_demonstrations(self):
        import run_speedrun

        cells = run_speedrun.notebook_of_a_run().cells
        sources = "\n".join(cell.source for cell in cells)
        assert "launch(mine" in sources and "--plan" not in sources
        assert "rude" not in sources
