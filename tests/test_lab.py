"""The bottom layer: machines, statistics, logs, results and their freshness."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from speedrun.lab import hardware, provenance, results, runlog, stats
from speedrun.lab.errors import Problem


class TestHardware:
    def test_a_gpu_that_is_hidden_is_not_there(self, tmp_path, monkeypatch):
        fake = tmp_path / "nvidia-smi"
        fake.write_text(
            '#!/bin/sh\nfor i in 0 1; do echo "$i, GPU-$i, NVIDIA H100, 81559, 580.1, 9.0"; done\n'
        )
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert [gpu.index for gpu in hardware.find_gpus()] == [0, 1]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        assert [gpu.index for gpu in hardware.find_gpus()] == [1]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert hardware.find_gpus() == ()

    def test_a_gpu_with_a_torch_for_the_cpu_is_a_problem_with_a_fix(self, tmp_path):
        fake = tmp_path / "nvidia-smi"
        fake.write_text('#!/bin/sh\necho "0, GPU-0, NVIDIA H100, 81559, 580.1, 9.0"\n')
        fake.chmod(0o755)
        environment = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "0",
        }
        command = [sys.executable, "-m", "speedrun.lab.doctor"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        import torch

        if torch.version.cuda is None:
            assert (
                done.returncode == 1
                and "this torch was built for the CPU" in done.stdout
                and "→" in done.stdout
            )

    def test_setup_makes_triton_interpret_where_there_is_no_gpu(self):
        triton = hardware.find_triton()
        if triton is None or hardware.look().device == "cuda":
            pytest.skip("needs Triton and no GPU")
        hardware.setup()
        from tests_kernel import fill_one

        assert (
            triton.knobs.runtime.interpret
            and "Interpreted" in type(hardware.jit(fill_one)).__name__
        )

    def test_an_interpreted_kernel_runs(self):
        import torch
        from tests_kernel import fill_one

        if hardware.find_triton() is None or hardware.setup().device == "cuda":
            pytest.skip("needs Triton and no GPU")
        pointer = torch.zeros(1)
        hardware.jit(fill_one)[(1,)](pointer)
        assert pointer.item() == 1.0


class TestStats:
    @given(
        st.lists(st.floats(3.0, 4.0), min_size=2, max_size=30).filter(
            lambda x: max(x) - min(x) > 1e-3
        )
    )
    def test_the_contests_test_is_scipys(self, losses):
        sample = stats.describe(losses)
        theirs = scipy_stats.ttest_1samp(losses, 3.28, alternative="less").pvalue
        assert stats.p_below(sample, 3.28) == pytest.approx(theirs, rel=1e-6, abs=1e-12)

    def test_welch_is_scipys(self):
        a, b = [3.1, 3.2, 3.15, 3.3], [3.0, 3.05, 3.2]
        theirs = scipy_stats.ttest_ind(a, b, equal_var=False).pvalue
        assert stats.p_difference(stats.describe(a), stats.describe(b)) == pytest.approx(theirs)

    def test_one_idea_beside_a_control_is_students_test_and_more_ask_for_more(self):
        control, arm = [3.1, 3.2, 3.15, 3.3, 3.18], [3.0, 3.05, 3.1]
        alone = stats.against_control({"a": arm}, control)["a"]
        assert alone == pytest.approx(scipy_stats.ttest_ind(arm, control).pvalue, rel=1e-2)
        others = {str(n): [3.1 + 0.01 * n, 3.2, 3.25] for n in range(4)}
        among = stats.against_control(others | {"a": arm}, control)
        assert among.keys() == {*others, "a"} and alone < among["a"] < 5 * alone < among["0"]
        assert among == stats.against_control(others | {"a": arm}, control)

    def test_two_arms_of_a_study_share_its_deviation(self):
        losses = {"control": [3.1, 3.2, 3.15], "a": [3.0, 3.1, 3.05], "b": [3.3, 3.2, 3.26]}
        study = stats.study_of(losses)
        squares = sum(2 * scipy_stats.tvar(values) for values in losses.values())
        assert study.freedom == 6 and study.deviation == pytest.approx((squares / 6) ** 0.5)
        t = (study.rise("b") - study.rise("a")) / (study.deviation * (2 / 3) ** 0.5)
        assert study.between("a", "b") == pytest.approx(2 * scipy_stats.t.sf(t, 6))
        assert study.rise("a") == pytest.approx(-0.1) and study.line("a").startswith("a ")
        height = scipy_stats.t.isf(0.05 / 4, 6) * study.deviation * (2 / 3) ** 0.5
        assert study.visible(3) == pytest.approx(height)
        assert study.visible(3, 0.9) > height

    def test_more_runs_see_smaller_differences(self):
        needed = [stats.runs_needed(d, 0.0013) for d in (0.004, 0.002, 0.001)]
        assert needed == sorted(needed) and needed[0] < 10
        for difference, n in zip((0.004, 0.002, 0.001), needed):
            assert (
                stats.power(difference, 0.0013, n)
                >= 0.9
                > stats.power(difference, 0.0013, max(2, n - 4))
            )

    def test_one_run_is_no_test(self):
        with pytest.raises(ValueError, match="at least 2 runs"):
            stats.p_below(stats.describe([3.2]), 3.28)
        with pytest.raises(ValueError, match="at least 2 runs"):
            stats.p_difference(stats.describe([3.2]), stats.describe([3.2, 3.3]))
        with pytest.raises(ValueError, match="positive"):
            stats.runs_needed(0, 1)


class TestRunLog:
    @given(st.lists(st.text(max_size=40), max_size=10), st.integers(0, 200))
    def test_a_writer_killed_anywhere_loses_at_most_its_last_line(self, texts, cut):
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            log = runlog.RunLog(folder, echo=None)
            for n, text in enumerate(texts):
                log.record("note", step=n, text=text)
            path = Path(folder) / "metrics.jsonl"
            whole = path.read_bytes() if path.exists() else b""
            path.write_bytes(whole[: min(cut, len(whole))])
            complete = whole[: min(cut, len(whole))].count(b"\n")
            runlog.RunLog(folder, echo=None).record("note", step=-1, text="after")
            records = runlog.read_metrics(path)
            assert [record["text"] for record in records] == [*texts[:complete], "after"]

    def test_a_limit_on_the_file_size_is_survived(self, tmp_path):
        """The kernel refuses to let the file grow, as it does on a full disk; then there is room again."""
        code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from speedrun.lab.runlog import RunLog
log = RunLog({str(tmp_path)!r})
log.line("a" * 100)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (161, hard))
log.line("b" * 100)
log.line("c" * 100)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
log.line("d")
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "log.txt").read_text() == "".join(
            c * n + "\n" for c, n in (("a", 100), ("b", 100), ("c", 100), ("d", 1))
        )
        assert done.stdout.count("no room for") == 1, "said once"

    def test_a_broken_line_in_the_middle_is_named(self, tmp_path):
        (tmp_path / "m.jsonl").write_text('{"kind": "a"}\nnonsense\n{"kind": "b"}\n')
        with pytest.raises(Problem, match=r"m\.jsonl, line 2: not a record"):
            runlog.read_metrics(tmp_path / "m.jsonl")

    @given(st.integers(0, 10**6), st.integers(1, 10**6), st.floats(0, 1e9), st.floats(0.001, 99))
    def test_lines_come_back(self, step, steps, ms, loss):
        numbers = runlog.parse_line(runlog.format_line(step, steps, ms, val_loss=loss))
        assert numbers["step"] == step and numbers["steps"] == steps
        assert numbers["val_loss"] == pytest.approx(loss, abs=1e-4) and numbers[
            "train_time_ms"
        ] == pytest.approx(ms, abs=1)

    def test_the_contests_lines_are_read(self, tmp_path):
        (tmp_path / "log.txt").write_text(
            "import os\nnvidia-smi\nstep:0/1750 val_loss:10.8258 train_time:0ms step_avg:nanms\n"
            "step:1/1750 train_time:96ms step_avg:96.00ms\n"
            "step:1750/1750 val_loss:3.2791 train_time:169021ms step_avg:96.58ms\npeak memory allocated: 30220 MiB\n"
        )
        read = runlog.read_log(tmp_path / "log.txt")
        assert [line.get("val_loss") for line in read] == [10.8258, None, 3.2791] and read[-1][
            "train_time_ms"
        ] == 169021


class TestResults:
    @pytest.mark.parametrize(
        ("change", "same"),
        [
            (lambda s: s + "# a comment\n", True),
            (lambda s: s.replace('"""Doc."""', '"""Another."""'), True),
            (lambda s: s.replace('"""A field."""', ""), True),
            (lambda s: s.replace("a + 1", "a  +  1"), True),
            (lambda s: s.replace("a + 1", "a + 2"), False),
            (lambda s: s.replace("a: int", "a: float"), False),
            (lambda s: s.replace("def f", "def g"), False),
            (lambda s: s.replace("x: int = 3", "x: int = 4"), False),
        ],
    )
    def test_the_hash_sees_code_and_nothing_else(self, change, same):
        source = 'def f(a: int):\n    """Doc."""\n    return a + 1\n\n\nclass A:\n    x: int = 3\n    """A field."""\n'
        assert (provenance.code_hash(source) == provenance.code_hash(change(source))) is same

    @pytest.mark.parametrize("python", ["python3.12", "python3.13", "python3.14"])
    def test_other_pythons_agree_on_the_hash(self, python):
        found = shutil.which(python)
        if not found or subprocess.run([found, "--version"], capture_output=True).returncode:
            pytest.skip(f"no {python} here")
        modules = sorted((provenance.root() / "speedrun").rglob("*.py"))
        code = (provenance.root() / "speedrun" / "lab" / "provenance.py").read_text()
        functions = code[code.index("def is_docstring") : code.index("def root")]
        script = f"import ast, hashlib, sys\n{functions}\nfor path in sys.argv[1:]: print(code_hash(open(path, encoding='utf-8').read()))"
        done = subprocess.run(
            [found, "-c", script, *map(str, modules)], capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [provenance.code_hash(path.read_text()) for path in modules]

    def test_a_changed_import_makes_a_result_stale(self, tmp_path, monkeypatch):
        package = tmp_path / "speedrun"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "low.py").write_text("x = 1\n")
        (package / "high.py").write_text("def f():\n    from speedrun.low import x\n    return x\n")
        monkeypatch.setattr(provenance.speedrun, "__file__", str(package / "__init__.py"))
        result = {"stamp": {"modules": provenance.module_hashes(["speedrun.high"])}}
        assert set(result["stamp"]["modules"]) == {"speedrun.high", "speedrun.low"}
        assert results.freshness(result) == "fresh"
        (package / "low.py").write_text("x = 1  # one\n")
        assert results.freshness(result) == "fresh"
        (package / "low.py").write_text("x = 2\n")
        assert results.freshness(result) == "stale"
        result["proof"] = {"modules": provenance.module_hashes(["speedrun.high"])}
        assert results.freshness(result) == "same behaviour"

    def test_every_committed_result_has_a_whole_stamp(self):
        paths = sorted((provenance.root() / "book" / "results").rglob("*.json"))
        assert paths
        for path in paths:
            stamp = json.loads(path.read_text())["stamp"]
            wanted = {
                "gpu",
                "driver",
                "torch",
                "triton",
                "command",
                "corpus",
                "seeds",
                "n",
                "date",
                "modules",
            }
            assert wanted <= set(stamp) and stamp["n"] >= 1 and stamp["modules"], path
            assert stamp["corpus"] is None or len(stamp["corpus"]["sha256"]) == 64
            assert not any(word in path.read_text() for word in ("/wor" + "k/", "/roo" + "t/")), (
                path
            )

    def test_public_tables_are_whole(self):
        assert (
            len(results.public_table("records")) == 91
            and len(results.public_table("curves")) > 1000
        )
        assert all(
            math.isfinite(float(row["final_val_loss"])) for row in results.public_table("variance")
        )
