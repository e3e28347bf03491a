"""What a run survives, and what it refuses: owners, terminals, clocks, environments, damage. Reported by users of other projects, tried here."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import forked
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from speedrun.checkpoint import checkpoints, latest_checkpoint, load_checkpoint
from speedrun.command import run_folder
from speedrun.config import vary
from speedrun.heartbeat import Heartbeat, Interrupts, agree_on_stop, read_heartbeats
from speedrun.lab.errors import UserError
from speedrun.lab.metrics import read_metrics, series
from speedrun.lab.runlog import RunLog
from speedrun.presets import as_arguments
from speedrun.ranks import Ranks, join_ranks, rank_numbers
from speedrun.supervise import Patience, Silence, run_ranks
from speedrun.train import main, train

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals, locks and modes of POSIX")
TRAIN, LAUNCH = ([sys.executable, "-m", f"speedrun.{name}"] for name in ("train", "launch"))


def start(command: list[str], **options) -> subprocess.Popen:
    usual = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **usual | options)


def wait_for_line(live: subprocess.Popen, begin: str) -> list[str]:
    """The lines up to the first that begins so."""
    said = []
    for line in live.stdout:
        said.append(line)
        if line.startswith(begin):
            return said
    raise AssertionError(f"it ended without “{begin}”: {said} {live.stderr.read()}")


@pytest.fixture
def long(brief):
    """A run that does not end by itself."""
    return vary(brief, {"steps": 1_000_000, "val_every": 1_000_000})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder for one run that all tests of this file get copies of."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def finished(brief, trained, tmp_path) -> Path:
    """A finished run with two checkpoints, at steps 6 and 12: a copy."""
    if not trained.exists():
        train(vary(brief, {"checkpoint_every": 6}), trained, echo=None)
    return Path(shutil.copytree(trained, tmp_path / "run"))


class TestOneOwner:
    def test_a_second_run_and_a_second_resume_are_refused_and_the_first_does_not_notice(
        self, long, tmp_path
    ):
        out = tmp_path / "run"
        often = vary(long, {"checkpoint_every": 3})
        live = forked.start("speedrun.train", ["--out", str(out), *as_arguments(often)])
        wait_for_line(live, "step:9/")
        kept = checkpoints(out)
        for again in (["--resume", str(out)], ["--out", str(out), "--preset", "smoke"]):
            assert main(again) == 1
        with pytest.raises(UserError, match="another process is at work"):
            from speedrun.launch import launchers_own

            with launchers_own(out, again=True):
                pass
        assert kept and live.poll() is None and (out / "heartbeat").is_dir()
        wait_for_line(live, "step:30/")
        live.send_signal(signal.SIGTERM)
        assert live.wait(timeout=60) == 143 and live.stderr.read() == ""
        records = read_metrics(out / "metrics.jsonl")
        assert [r["kind"] for r in records].count("run") == 1, "nobody else wrote into its log"

    @pytest.mark.slow
    def test_a_second_launch_disturbs_nothing(self, long, tmp_path):
        command = [*LAUNCH, "--yes", "--out", str(tmp_path / "run"), *as_arguments(long)]
        first = start(command)
        said = wait_for_line(first, "step:9/")
        second = subprocess.run(command, capture_output=True, text=True)
        assert second.returncode == 1 and "holds a run already" in second.stderr
        resumed = subprocess.run([*LAUNCH, "--resume", str(tmp_path / "run")], capture_output=True, text=True)  # fmt: skip
        assert resumed.returncode == 1 and "has no checkpoint" in resumed.stderr
        said += wait_for_line(first, "step:60/")
        output = (tmp_path / "run" / "output.txt").read_text()
        assert output.startswith("compile and warm-up") or "step:0/" in output
        first.send_signal(signal.SIGINT)
        assert first.wait(timeout=60) == 130 and checkpoints(tmp_path / "run")
        again = subprocess.run([*LAUNCH, "--resume", str(tmp_path / "run"), "--max-steps", "1"], capture_output=True, text=True)  # fmt: skip
        assert again.returncode == 0, again.stderr
        assert (tmp_path / "run" / "output.txt").read_text().startswith(output), "nothing is lost"

    def test_ranks_whose_launcher_is_gone_still_own_the_folder(self, tmp_path):
        from speedrun.lab.files import claim
        from speedrun.launch import launchers_own

        saving = claim(tmp_path, "train")
        with pytest.raises(UserError, match="another process"), launchers_own(tmp_path, again=True):
            pass
        saving.release()
        with launchers_own(tmp_path, again=True):
            pass

    def test_runs_of_one_second_get_folders_of_their_own(self, brief, tmp_path, monkeypatch):
        from speedrun import command as module

        monkeypatch.setattr(module, "root", lambda: tmp_path)
        made: list[Path] = []
        several = [
            threading.Thread(target=lambda: made.append(run_folder(module.TrainCommand(brief))))
            for _ in range(6)
        ]
        for thread in several:
            thread.start()
        for thread in several:
            thread.join()
        assert len(set(made)) == 6 and all(folder.is_dir() for folder in made)

    def test_only_names_that_the_trainer_makes_are_checkpoints(self, finished, brief):
        newest = latest_checkpoint(finished)
        for name in ("step-0000012-good", "step-best", "step-3", "step-9999999.bak"):
            shutil.copytree(newest, newest.with_name(name))
        shutil.copytree(newest, newest.with_name("step-10000000"))
        assert latest_checkpoint(finished).name == "step-10000000", "by number, not by letter"
        shutil.rmtree(newest.with_name("step-10000000"))
        longer = vary(brief, {"checkpoint_every": 2, "max_steps": 12})
        train(longer, finished, again=True, echo=None)
        for old in checkpoints(finished):
            shutil.rmtree(old)
        train(longer, finished.parent / "other", echo=None)
        names = {path.name for path in (finished / "checkpoints").iterdir()}
        assert names == {"step-0000012-good", "step-best", "step-3", "step-9999999.bak"}


class TestTerminals:
    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
    def test_a_full_log_disk_does_not_end_a_run(self, brief, tmp_path):
        with open("/dev/full", "w") as full:
            live = start([*TRAIN, "--out", str(tmp_path), *as_arguments(brief)], stdout=full)
            assert live.wait(timeout=60) == 0 and live.stderr.read() == ""
        assert latest_checkpoint(tmp_path).name == "step-0000012"

    def test_no_output_at_all(self, brief, tmp_path):
        command = [*TRAIN, "--out", str(tmp_path), *as_arguments(brief)]
        done = subprocess.run(["bash", "-c", 'exec "$@" >&- 2>&-', "_", *command])
        assert done.returncode == 0 and latest_checkpoint(tmp_path).name == "step-0000012"

    @pytest.mark.parametrize("ignored", [False, True])
    def test_a_terminal_that_closes(self, long, tmp_path, ignored):
        """As with ssh: SIGHUP saves; under nohup it is ignored, and the run goes on although nobody can be told."""
        import pty

        main_end, terminal = pty.openpty()
        command = [*TRAIN, "--out", str(tmp_path), *as_arguments(vary(long, {"max_steps": 100}))]
        ignore = "trap '' HUP; " if ignored else ""
        live = subprocess.Popen(["bash", "-c", f'{ignore}exec "$@"', "_", *command], stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)  # fmt: skip
        os.close(terminal)
        end = time.monotonic() + 60
        while time.monotonic() < end and not list(tmp_path.glob("metrics.jsonl")):
            time.sleep(0.1)
        time.sleep(0.5)
        os.close(main_end)
        if not ignored:
            os.kill(live.pid, signal.SIGHUP)
        assert live.wait(timeout=120) == (0 if ignored else 129)
        reason = read_metrics(tmp_path / "metrics.jsonl")[-1]["reason"]
        assert reason == ("finished" if ignored else "interrupted")

    def test_a_narrow_console(self, finished):
        env = os.environ | {"PYTHONIOENCODING": "ascii"}
        done = subprocess.run([sys.executable, "-m", "speedrun.sample", str(finished), "--tokens", "40", "--prompt", "日本"], capture_output=True, env=env)  # fmt: skip
        assert done.returncode == 0 and b"Traceback" not in done.stderr and b"??" in done.stdout

    def test_a_reader_that_leaves(self):
        done = subprocess.run(["bash", "-c", 'set -o pipefail; "$@" | head -c 1', "_", *LAUNCH, "--plan"], capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0 and "Traceback" not in done.stderr


class TestClocks:
    def test_a_clock_that_jumps_does_not_make_a_healthy_rank_look_dead(self, tmp_path):
        heartbeat, now = Heartbeat(tmp_path, 0), [1000.0]
        silence = Silence(tmp_path, 1, clock=lambda: now[0])
        heartbeat.phase("train", 5)
        for jump in (-3600, 3600):
            os.utime(heartbeat.path, (time.time() + jump,) * 2)
            now[0] += 200
            assert silence.find_hung_rank(Patience()) is None
            heartbeat.beat()
        now[0] += 200
        assert silence.find_hung_rank(Patience()) is None, "it beat since"
        now[0] += 301
        late, seconds = silence.find_hung_rank(Patience())
        assert (late.rank, late.step, seconds) == (0, 5, 301.0)

    def test_a_step_of_many_micro_batches_beats_after_each(self, brief, tmp_path):
        from speedrun.train import build_run, train_step

        run = build_run(vary(brief, {"data.micro_batches": 8}), tmp_path, echo=None)
        before = run.heartbeat.count
        train_step(run)
        assert run.heartbeat.count - before == 8

    def test_patience_is_an_option(self):
        from speedrun.command import TrainCommand
        from speedrun.launch import LaunchCommand
        from speedrun.presets import preset, read_command

        make = lambda config: LaunchCommand(TrainCommand(config))  # noqa: E731
        command = read_command(make, ["--patience.train", "7200"], "cpu", "launch")
        assert command.patience == Patience(train=7200.0) and preset("cpu") == command.train.config

    def test_two_ranks_stop_on_a_disk_without_room(self, tmp_path):
        """The slots were made when there was room; a number is written over blanks."""
        for rank in (0, 1):
            Heartbeat(tmp_path, rank)
        size = [(tmp_path / "heartbeat" / f"stop{rank}").stat().st_size for rank in (0, 1)]
        now, cpu = time.monotonic(), torch.device("cpu")
        assert agree_on_stop(tmp_path, Ranks(0, 2, cpu), 7, now) is None
        assert agree_on_stop(tmp_path, Ranks(1, 2, cpu), 8, now) == 9
        assert agree_on_stop(tmp_path, Ranks(0, 2, cpu), 8, now) == 9
        # where ranks meet in every third step only, one of them may be at 10 by now
        assert agree_on_stop(tmp_path, Ranks(0, 2, cpu), 10, now, every=3) == 11
        assert size == [(tmp_path / "heartbeat" / f"stop{rank}").stat().st_size for rank in (0, 1)]


class TestEnvironment:
    @pytest.mark.parametrize(
        "words",
        [{"RANK": "1"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1"}, {"WORLD_SIZE": "0"},
         {"RANK": "a"}, {"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"}],
    )  # fmt: skip
    def test_a_rank_that_nobody_started_is_refused(
        self, words, monkeypatch, brief, tmp_path, capsys
    ):
        for name, value in words.items():
            monkeypatch.setenv(name, value)
        assert main(["--out", str(tmp_path / "run"), *as_arguments(brief)]) == 1
        assert "unset RANK" in capsys.readouterr().err
        assert not (tmp_path / "run" / "checkpoints").exists()

    def test_an_empty_variable_is_not_set(self, monkeypatch):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.setenv(name, "")
        assert rank_numbers() == (0, 1, 0) and join_ranks("cpu", "auto").world == 1

    def test_without_git_and_other_tools(self, brief, tmp_path):
        env = {"PATH": str(tmp_path / "nowhere")}
        flags = ["--out", str(tmp_path / "run"), *as_arguments(brief)]
        done = forked.run("speedrun.train", flags, env)
        assert done.returncode == 0, done.stderr
        assert read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["commit"] == ""

    def test_without_a_compiler_it_says_what_to_leave_out(self, brief, tmp_path):
        env = {"CXX": "", "PATH": str(tmp_path)}
        flags = ["--out", str(tmp_path / "run"), *as_arguments(vary(brief, {"compile": True}))]
        for command, more in (("speedrun.train", []), ("speedrun.launch", ["--yes"])):
            done = forked.run(command, [*more, *flags], env)
            assert done.returncode == 1 and "--no-compile" in done.stderr
            assert "Traceback" not in done.stderr and not (tmp_path / "run" / "log.txt").exists()

    def test_a_run_planned_for_gpus_never_falls_to_the_cpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("SPEEDRUN_DEVICE", "cuda")
        with pytest.raises(UserError, match="PyTorch sees no GPU"):
            join_ranks("auto", "auto")
        assert join_ranks("cpu", "auto").device.type == "cpu", "asked for by name"

    def test_a_relative_data_folder_is_found_from_elsewhere(self, brief, tmp_path, monkeypatch):
        (tmp_path / "texts").mkdir()
        shutil.copytree(brief.data.path, tmp_path / "texts" / "mydata")
        monkeypatch.chdir(tmp_path / "texts")
        run = vary(brief, {"data.path": "mydata", "max_steps": 6})
        assert main(["--out", "run", *as_arguments(run)]) == 0
        monkeypatch.chdir(tmp_path)
        assert main(["--resume", "texts/run"]) == 0
        assert latest_checkpoint(tmp_path / "texts" / "run").name == "step-0000012"

    def test_hints_can_be_copied(self, long, tmp_path):
        out = tmp_path / "my first run"
        live = forked.start("speedrun.train", ["--out", str(out), *as_arguments(long)])
        wait_for_line(live, "step:3/")
        live.send_signal(signal.SIGINT)
        *_, last = live.stdout.read().splitlines()
        live.wait()
        hint = last.removeprefix("to resume: ")
        assert hint != last
        check = subprocess.run(
            ["bash", "-c", f"printf '%s\\n' {hint}"], capture_output=True, text=True
        )
        assert check.stdout.splitlines()[-1] == str(out)

    @pytest.mark.parametrize("out", ["a file", "a file/below"])
    def test_a_place_that_cannot_be_written_to(self, brief, tmp_path, capsys, out):
        (tmp_path / "a file").write_text("mine")
        assert main(["--out", str(tmp_path / out), *as_arguments(brief)]) == 1
        said = capsys.readouterr().err
        assert (
            "→" in said and "Traceback" not in said and (tmp_path / "a file").read_text() == "mine"
        )

    @pytest.mark.skipif(not shutil.which("unshare"), reason="a name of its own for a process")
    def test_a_machine_whose_name_does_not_resolve(self, brief, tmp_path):
        words = [
            *LAUNCH,
            "--gpus",
            "2",
            "--yes",
            "--out",
            str(tmp_path / "run"),
            *as_arguments(brief),
        ]
        script = 'hostname nosuchhost-laptop.invalid && exec "$@"'
        done = subprocess.run(["unshare", "--uts", "bash", "-c", script, "_", *words], capture_output=True, text=True, timeout=120)  # fmt: skip
        if "unshare failed" in done.stderr:
            pytest.skip("only root may rename")
        assert done.returncode == 0, done.stderr
        assert latest_checkpoint(tmp_path / "run").name == "step-0000012"


class TestLoopback:
    def test_no_port_of_a_run_is_open_to_others(self, long, tmp_path):
        """The launcher, torchrun and two ranks, in the middle of training."""
        flags = ["--gpus", "2", "--yes", "--out", str(tmp_path / "run"), *as_arguments(long)]
        live = forked.start("speedrun.launch", flags)
        wait_for_line(live, "step:9/")
        tree = [psutil.Process(live.pid), *psutil.Process(live.pid).children(recursive=True)]
        ports = [c for process in tree for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]  # fmt: skip
        talk = [c for process in tree for c in process.net_connections("inet") if c.raddr]
        live.send_signal(signal.SIGINT)
        assert live.wait(timeout=60) == 130
        assert len(tree) == 4 and talk, "two ranks talk"
        assert all(c.laddr.ip in ("127.0.0.1", "::1") for c in ports + talk)
        assert all(socket.inet_pton(socket.AF_INET, c.raddr.ip)[0] == 127 for c in talk)


def damage_facts(path: Path, change) -> None:
    """Rewrite a checkpoint's state.json."""
    facts = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(change(facts)))


def damage_tensors(path: Path, kind: str, change) -> None:
    """Rewrite a checkpoint's tensors as somebody who knows the format would: with the right hash."""
    from speedrun.lab.files import file_sha256

    tensors = load_file(path / f"{kind}.safetensors")
    save_file(change(tensors), path / f"{kind}.safetensors")
    facts = json.loads((path / "state.json").read_text())
    facts["sha256"][kind] = file_sha256(path / f"{kind}.safetensors")
    (path / "state.json").write_text(json.dumps(facts))


class TestDamage:
    @pytest.mark.parametrize(
        ("kind", "change"),
        [
            ("optimizer", lambda t: t | {"mlp_up/exp_avg": torch.zeros(3)}),
            ("optimizer", lambda t: t | {"embed/exp_avg_sq": torch.zeros(1)}),
            ("optimizer", lambda t: t | {"optimizer/updates": torch.zeros(2)}),
            ("optimizer", lambda t: t | {"mlp_up/exp_avg": t["mlp_up/exp_avg"].double()}),
            ("optimizer", lambda t: {k: v for k, v in t.items() if k != "mlp_up/exp_avg"}),
            ("optimizer", lambda t: t | {"mlp_up/other": torch.zeros(1)}),
            ("optimizer", lambda t: t | {"nobody/exp_avg": torch.zeros(1)}),
            ("model", lambda t: t | {"mlp_up": torch.zeros(1)}),
            ("model", lambda t: t | {"mlp_up": t["mlp_up"].half()}),
            ("model", lambda t: {("renamed" if k == "mlp_up" else k): v for k, v in t.items()}),
            ("model", lambda t: t | {"mlp_up": t["mlp_up"] * float("nan")}),
        ],
    )
    def test_tensors_of_another_name_shape_or_dtype_never_reach_the_optimizer(
        self, finished, brief, kind, change
    ):
        damage_tensors(latest_checkpoint(finished), kind, change)
        with pytest.raises(UserError, match="is not a whole checkpoint") as caught:
            train(vary(brief, {"max_steps": 12}), finished, again=True, echo=None)
        assert "step-0000006" in caught.value.fix and "mv " in caught.value.fix
        assert "delete" not in str(caught.value)

    @pytest.mark.parametrize("kind", ["model", "optimizer"])
    def test_a_flipped_bit_is_noticed(self, finished, brief, kind):
        file = latest_checkpoint(finished) / f"{kind}.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 4
        file.write_bytes(content)
        with pytest.raises(UserError, match="SHA-256"):
            train(brief, finished, again=True, echo=None)

    @pytest.mark.parametrize(
        "change",
        [
            lambda f: [], lambda f: {}, lambda f: None, lambda f: 7, lambda f: {"step": 12},
            lambda f: f | {"step": 7}, lambda f: f | {"step": -1}, lambda f: f | {"step": "12"}, lambda f: f | {"step": True},
            lambda f: f | {"position": [0, -256, 0]}, lambda f: f | {"position": [0]}, lambda f: f | {"position": None},
            lambda f: f | {"train_time_ms": float("nan")}, lambda f: f | {"train_time_ms": -1},
            lambda f: f | {"vocab_size": 0}, lambda f: f | {"vocab_size": 287}, lambda f: f | {"tokenizer": 5}, lambda f: f | {"tokenizer": "gpt2"},
            lambda f: f | {"data_sha256": "x"}, lambda f: f | {"sha256": 3}, lambda f: f | {"sha256": {}},
            lambda f: f | {"config": 7}, lambda f: f | {"config": {}}, lambda f: f | {"config": f["config"] | {"seed": 1}},
            lambda f: f | {"config": f["config"] | {"model": [1]}}, lambda f: f | {"config": f["config"] | {"steps": float("inf")}},
        ],
    )  # fmt: skip
    def test_facts_are_of_their_types_and_of_this_run(self, finished, capsys, change):
        damage_facts(latest_checkpoint(finished), change)
        assert main(["--resume", str(finished)]) == 1
        said = capsys.readouterr().err
        assert "→" in said and "Traceback" not in said

    def test_an_endless_nesting(self, finished, capsys):
        (latest_checkpoint(finished) / "state.json").write_text("[" * 100_000)
        assert main(["--resume", str(finished)]) == 1 and "Traceback" not in capsys.readouterr().err

    def test_another_runs_checkpoint_is_not_this_run(self, finished, brief, tmp_path):
        train(vary(brief, {"seed": 5}), tmp_path / "other", echo=None)
        shutil.rmtree(finished / "checkpoints")
        shutil.copytree(tmp_path / "other" / "checkpoints", finished / "checkpoints")
        with pytest.raises(UserError, match="is of another run: seed is 5, and was 0"):
            train(brief, finished, again=True, echo=None)

    def test_a_checkpoint_from_before_hashes_still_loads(self, finished):
        damage_facts(latest_checkpoint(finished), lambda f: {k: v for k, v in f.items() if k not in ("sha256", "train_shards", "world")})  # fmt: skip
        assert main(["--resume", str(finished)]) == 0

    def test_a_file_that_may_not_be_read_is_not_called_damaged(self, finished, monkeypatch):
        """Root may read everything, so the system's answer is played."""
        import builtins

        real, locked = builtins.open, latest_checkpoint(finished) / "model.safetensors"

        def refuse(file, *given, **named):
            if str(file) == str(locked):
                raise PermissionError(13, "Permission denied", str(file))
            return real(file, *given, **named)

        monkeypatch.setattr(builtins, "open", refuse)
        with pytest.raises(UserError, match="may not be read by this user") as caught:
            load_checkpoint(latest_checkpoint(finished))
        assert "chmod" in caught.value.fix and "mv" not in caught.value.fix

    def test_files_have_the_modes_of_their_siblings(self, finished):
        modes = {path.stat().st_mode & 0o777 for path in finished.rglob("*") if path.is_file() and path.suffix in (".json", ".safetensors", ".txt", ".jsonl")}  # fmt: skip
        umask = os.umask(0)
        os.umask(umask)
        assert modes == {0o666 & ~umask}

    def test_a_step_is_never_saved_under_a_half_removed_name(self, finished, monkeypatch, brief):
        """A kill in the middle of removing an old checkpoint leaves nothing that looks whole."""
        from speedrun import checkpoint

        monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **k: (Path(path) / "state.json").unlink(missing_ok=True))  # fmt: skip
        checkpoint.retire(checkpoints(finished)[0])
        assert all((path / "state.json").exists() for path in checkpoints(finished))

    def test_shards_that_came_since_are_named_with_a_command_that_helps(self, finished, brief):
        damage_facts(latest_checkpoint(finished), lambda f: f | {"data_sha256": "0" * 64, "train_shards": 1})  # fmt: skip
        with pytest.raises(UserError, match="trained on other data") as caught:
            train(brief, finished, again=True, echo=None)
        assert "--shards 1 lists those of then" in caught.value.fix


def without_patience(arguments: list[str]) -> int:
    """The trainer, which does not wait for room on a disk."""
    from speedrun import train as module

    save = module.save
    module.save = lambda run, patience_s=0.0: save(run, 0.0)
    return module.main(arguments)


class TestDisks:
    def test_lines_that_never_found_room_are_a_problem_at_the_end(
        self, brief, tmp_path, monkeypatch
    ):
        from speedrun.lab import runlog

        real = runlog.append_whole
        monkeypatch.setattr(runlog, "append_whole", lambda path, text: OSError(28, "No space left on device") if path.name == "log.txt" else real(path, text))  # fmt: skip
        with pytest.raises(UserError, match="not saved: log.txt"):
            train(brief, tmp_path, echo=None)
        assert checkpoints(tmp_path)

    def test_a_log_says_why_it_cannot_be_written(self, tmp_path):
        said: list[str] = []
        log = RunLog(tmp_path / "run", said.append)
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").write_text("somebody's")
        log.line("first")
        log.line("second")
        assert sum("cannot be written" in line for line in said) == 1 and log.lacking() == [
            "log.txt"
        ]
        (tmp_path / "run").unlink()
        log.line("third")
        assert (tmp_path / "run" / "log.txt").read_text() == "first\nsecond\nthird\n"
        assert log.lacking() == []

    @pytest.mark.skipif(not Path("/proc/mounts").exists() or (hasattr(os, "geteuid") and os.geteuid() != 0), reason="only root may mount")  # fmt: skip
    @pytest.mark.parametrize("kilobytes", [60, *(pytest.param(k, marks=pytest.mark.slow) for k in (0, 200, 600))])  # fmt: skip
    def test_small_disks(self, brief, tmp_path, kilobytes):
        """Real ones: whatever is on them is whole, and what is not saved is said with status 1."""
        disk = tmp_path / "disk"
        disk.mkdir()
        size = f"size={max(4, kilobytes)}k"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(disk)], capture_output=True).returncode:  # fmt: skip
            pytest.skip("no mounts here")
        try:
            run = vary(brief, {"checkpoint_every": 4, "model.model_dim": 64})
            flags = ["--out", str(disk / "run"), *as_arguments(run)]
            done = forked.run("test_survival:without_patience", flags)
            assert done.returncode == 1 and "Traceback" not in done.stderr and "→" in done.stderr
            for name in ("metrics.jsonl", "log.txt"):
                if (disk / "run" / name).exists():
                    text = (disk / "run" / name).read_text()
                    assert text == "" or text.endswith("\n")
            for path in checkpoints(disk / "run"):
                load_checkpoint(path)
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)


class TestInterrupts:
    def test_hangup_is_left_alone_where_it_is_ignored(self):
        old = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            Interrupts().install()
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            asked = Interrupts()
            asked.install()
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked.signal == signal.SIGHUP
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @pytest.mark.parametrize(
        ("module", "number"),
        [("train", signal.SIGINT), ("launch", signal.SIGTERM), ("sample", signal.SIGHUP), ("data", signal.SIGINT)],
    )  # fmt: skip
    def test_from_the_first_moment(self, module, number):
        """While the imports run: no traceback, the signal's status, and it is never lost."""
        watched = "import runpy, sys, threading, os, signal, time\n"
        watched += "from speedrun.lab import errors\n"
        watched += "def soon():\n    while signal.getsignal(signal.SIGINT) is not errors.end_now: time.sleep(1e-4)\n"
        watched += f"    time.sleep(0.1); os.kill(os.getpid(), {int(number)})\n"
        watched += "threading.Thread(target=soon, daemon=True).start()\n"
        watched += f"sys.argv = ['speedrun.{module}', '--help']\n"
        watched += f"runpy.run_module('speedrun.{module}{'.__main__' if module == 'data' else ''}', run_name='__main__', alter_sys=True)\n"
        done = subprocess.run([sys.executable, "-c", watched], capture_output=True, text=True)
        assert done.returncode == 128 + number and done.stderr == "" and done.stdout == ""

    def test_only_a_person_who_presses_ctrl_c_again_insists(self, monkeypatch):
        """A closing terminal hangs up twice, a service manager sends two kinds of signals at once: both want it saved."""
        from speedrun import heartbeat as module

        ended: list[int] = []
        monkeypatch.setattr(module.os, "_exit", ended.append)
        asked = Interrupts()
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            asked.note(number)
        assert asked.signal == signal.SIGHUP and not ended
        asked.since -= 2
        asked.note(signal.SIGTERM)
        assert not ended
        asked.note(signal.SIGINT)
        assert ended == [130]

    def test_a_launcher_remembers_an_interrupt_that_got_lost(self):
        from speedrun.launch import Insisting

        asked = Insisting()

        class Careless:
            def __del__(self):
                asked.note(signal.SIGINT)

        sys.unraisablehook, old = lambda unraisable: None, sys.unraisablehook
        Careless()
        sys.unraisablehook = old
        with pytest.raises(KeyboardInterrupt):
            asked.check()

    def test_only_own_children_are_ever_killed(self, tmp_path):
        """A heartbeat that names somebody else's process, whose command line even names the folder."""
        stranger = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)", str(tmp_path)]
        )
        program = tmp_path / "program.py"
        program.write_text(
            "import json, os, sys, time\nfrom pathlib import Path\n"
            f"Path({str(tmp_path)!r}, 'heartbeat', 'rank0.json').write_text(json.dumps({{'phase': 'train', 'step': 1, 'pid': {stranger.pid}, 'count': 1}}))\n"
            "time.sleep(60)\n"
        )
        with pytest.raises(UserError, match="rank 0 hangs"):
            run_ranks([str(program)], 1, tmp_path, Patience(train=0.5), echo=lambda line: None, grace_s=0.5)  # fmt: skip
        assert stranger.poll() is None
        stranger.kill()
        stranger.wait()

    def test_a_rank_that_is_killed_is_reported_with_its_step(self, long, tmp_path):
        killed = []

        def kill_rank_1(line: str) -> None:
            if line.startswith("step:30/") and not killed:
                killed.append(next(s.pid for s in read_heartbeats(tmp_path) if s.rank == 1))
                os.kill(killed[0], signal.SIGKILL)

        with pytest.raises(UserError, match=r"rank 1 was killed by SIGKILL in phase train, step (\d+)") as caught:  # fmt: skip
            run_ranks(["-m", "speedrun.train", "--out", str(tmp_path), *as_arguments(long)], 2, tmp_path, echo=kill_rank_1)  # fmt: skip
        assert int(caught.value.what.rsplit(" ", 1)[1]) >= 30
        assert series(read_metrics(tmp_path / "metrics.jsonl"), "step")[-1]["step"] >= 30
