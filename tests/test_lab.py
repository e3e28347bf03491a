"""The bottom layer: machines, statistics, logs, results and their freshness."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from speedrun.lab import doctor, hardware, metrics, provenance, results, runlog, stats
from speedrun.lab.errors import UserError


def machine_with(gpus, cuda, system="Linux x86_64") -> hardware.Machine:
    versions = dict.fromkeys(hardware.PACKAGES, "1.0")
    return hardware.Machine(system, "3.12.1", 8, 64.0, gpus, versions, cuda, "/usr/bin/g++")


H100 = "{i}, GPU-{i}0000000-0000-0000-0000-000000000000, NVIDIA H100 80GB HBM3, 81559, 580.65.06, 9.0, Disabled"
OLD_DRIVER = """\
0, GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f, A100-SXM4-40GB, 40537 MiB, 460.32.03
1, GPU-fb8bbc70-d551-45f9-43d4-9734f9cddb2c, A100-SXM4-40GB, 40537, 460.32.03
"""
OLD_LISTING = """\
GPU 0: A100-SXM4-40GB (UUID: GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f)
  MIG 1g.5gb Device 0: (UUID: MIG-GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f/7/0)
  MIG 3g.20gb Device 1: (UUID: MIG-GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f/1/0)
GPU 1: A100-SXM4-40GB (UUID: GPU-fb8bbc70-d551-45f9-43d4-9734f9cddb2c)
"""
CUT = """\
0, GPU-9c73eb7b-8d6d-6c0e-dc13-97873e2ede40, NVIDIA A100-SXM4-80GB, 81920, 535.54.03, 8.0, Enabled
1, GPU-c92e2d5d-4a69-f1cd-4df0-305f8606705a, NVIDIA A100-SXM4-80GB, 81920, 535.54.03, 8.0, Disabled
"""
CUT_LISTING = """\
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-9c73eb7b-8d6d-6c0e-dc13-97873e2ede40)
  MIG 1g.10gb     Device  0: (UUID: MIG-a686709d-6dc2-542a-8851-0d2508448c10)
  MIG 1c.3g.40gb  Device  1: (UUID: MIG-53864714-0a66-5df2-9007-9268e30d9a72)
  MIG 1g.10gb+me  Device  2: (UUID: MIG-c71dc464-b9f9-5611-9d29-d601a47cffd6)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-c92e2d5d-4a69-f1cd-4df0-305f8606705a)
"""
BROKEN = {
    "no driver": (9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA driver is installed and running."),
    "after an update": (18, "Failed to initialize NVML: Driver/library version mismatch"),
    "no GPU": (6, "No devices were found"),
    "garbage": (0, "\x00\x07, , ,,,,\n²,a,b,c,d,e\n1,2"),
}  # fmt: skip


def fake_smi(folder: Path, monkeypatch, query: str, listing: str = "", status: int = 0) -> None:
    """An nvidia-smi in front of the PATH that prints what is given; an older driver refuses fields that it does not know."""
    (folder / "query").write_text(query, encoding="utf-8")
    (folder / "listing").write_text(listing, encoding="utf-8")
    known = "newer" if query.count(",") % 6 == 0 or status else "older"
    script = f"""#!/bin/sh
case "$1" in
  -L) cat "{folder}/listing" ;;
  *mig.mode*) if [ {known} = older ]; then echo 'Field "compute_cap" is not a valid field to query.'; exit 2; fi; cat "{folder}/query" ;;
  *) cat "{folder}/query" ;;
esac
exit {status}
"""
    (folder / "nvidia-smi").write_text(script)
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


class TestHardware:
    def test_a_gpu_that_is_hidden_is_not_there(self, tmp_path, monkeypatch):
        fake_smi(tmp_path, monkeypatch, "\n".join(H100.format(i=i) for i in (0, 1)))
        assert [gpu.index for gpu in hardware.find_gpus()] == [0, 1]
        for setting, left in {"1": [1], "": [], "-1": [], "1,0": [1, 0], "0,0": [], "GPU-1": [1]}.items():  # fmt: skip
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
            assert [gpu.index for gpu in hardware.find_gpus()] == left, setting

    @pytest.mark.parametrize(("status", "text"), BROKEN.values(), ids=BROKEN.keys())
    def test_a_tool_that_fails_or_babbles_is_no_gpu(self, tmp_path, monkeypatch, status, text):
        fake_smi(tmp_path, monkeypatch, text, status=status)
        assert hardware.find_gpus() == () and hardware.detect_machine().device == "cpu"

    def test_no_tool_is_no_gpu_and_no_git_is_no_commit(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert hardware.find_gpus() == () and provenance.commit() == ""

    def test_a_tool_that_hangs_is_given_up(self, tmp_path, monkeypatch):
        fake_smi(tmp_path, monkeypatch, "")
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\ntrap '' TERM INT\nsleep 60\n")
        monkeypatch.setattr(hardware, "SMI_TIMEOUT_S", 0.2)
        began = time.monotonic()
        assert hardware.find_gpus() == () and time.monotonic() - began < 10

    def test_a_card_with_a_damaged_memory_of_itself_is_used(self, tmp_path, monkeypatch):
        text = H100.format(i=0) + "\nWARNING: infoROM is corrupted at gpu 0000:0B:00.0\n"
        fake_smi(tmp_path, monkeypatch, text, status=14)
        assert len(hardware.find_gpus()) == 1

    def test_an_old_driver_does_not_know_all_fields(self, tmp_path, monkeypatch):
        fake_smi(tmp_path, monkeypatch, OLD_DRIVER)
        gpus = hardware.find_gpus()
        assert [gpu.driver for gpu in gpus] == ["460.32.03"] * 2
        assert "too old" in str(doctor.gpu_problem(machine_with(gpus, "12.8")))

    @pytest.mark.parametrize(
        ("setting", "memory"),
        [
            (None, [10]),  # of slices, CUDA shows the first alone, and nothing whole beside it
            ("0", [10]),
            ("1", [80]),
            ("1,0", [10]),
            ("MIG-53864714-0a66-5df2-9007-9268e30d9a72", [40]),
            ("MIG-5386", [40]),
            ("MIG-c71dc464-b9f9-5611-9d29-d601a47cffd6,MIG-53864714", [10]),
            ("MIG-", []),
            ("MIG-ffff", []),
            ("GPU-c92e", [80]),
        ],
    )
    def test_slices(self, tmp_path, monkeypatch, setting, memory):
        fake_smi(tmp_path, monkeypatch, CUT, CUT_LISTING)
        if setting is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
        gpus = hardware.find_gpus()
        assert [gpu.memory_gb for gpu in gpus] == memory
        if memory and memory != [80]:
            assert gpus[0].uuid.startswith("MIG-") and gpus[0].capability == (8, 0)
            assert gpus[0].name.startswith("NVIDIA A100-SXM4-80GB MIG 1") and not gpus[0].mig

    @pytest.mark.parametrize(
        ("setting", "memory"),
        [
            (None, [5]),
            ("MIG-GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f/1/0", [20]),
            ("MIG-GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f/2/0", []),
            ("1", [40537 / 1024]),
        ],
    )
    def test_slices_as_older_drivers_name_them(self, tmp_path, monkeypatch, setting, memory):
        fake_smi(tmp_path, monkeypatch, OLD_DRIVER, OLD_LISTING)
        if setting is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
        assert [gpu.memory_gb for gpu in hardware.find_gpus()] == memory

    def test_a_gpu_that_waits_to_be_cut_is_not_offered(self, tmp_path, monkeypatch):
        fake_smi(tmp_path, monkeypatch, CUT, "")
        assert [gpu.index for gpu in hardware.find_gpus()] == [1]

    @given(st.lists(st.sampled_from("0 1 2 9 -1 +1 1x,x| 2,,GPU-0,GPU-1,GPU-1f,GPU-,GPU-z,MIG-a".replace("|", ",").replace(" ", ",").split(",")), max_size=5))  # fmt: skip
    def test_cudas_list_is_read_as_torch_reads_it(self, entries):
        setting = ",".join(entries)
        gpus = hardware.parse_gpus("\n".join(H100.format(i=i) for i in range(3)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", setting)
            theirs = torch.cuda._parse_visible_devices()
        if theirs and isinstance(theirs[0], str):
            theirs = torch.cuda._transform_uuid_to_ordinals(theirs, [gpu.uuid for gpu in gpus])
        there = list(itertools.takewhile(lambda index: index < len(gpus), theirs))
        assert [gpu.index for gpu in hardware.visible_gpus(gpus, setting)] == there

    @pytest.mark.parametrize(
        ("system", "driver", "cuda", "words"),
        [
            ("Linux x86_64", "580.65.06", "13.0", None),
            ("Linux x86_64", "580.65.05", "13.0", "whl/cu126"),
            ("Linux x86_64", "575.57.08", "13.2", "580.65.06 or newer"),
            ("Linux x86_64", "525.60.13", "12.9", None),
            ("Linux x86_64", "525.60.12", "12.9", "525.60.13 or newer; or, to train on the CPU"),
            ("Windows AMD64", "528.33", "12.8", None),
            ("Windows AMD64", "528.24", "12.8", "528.33 or newer"),
            ("Linux x86_64", "[N/A]", "13.0", None),
            ("Linux x86_64", "450.80.02", "11.8", None),
            ("Linux x86_64", "580.65.06", "14.0", None),  # not known yet
        ],
    )
    def test_a_driver_that_is_too_old_for_torch(self, system, driver, cuda, words):
        gpu = hardware.GPU(0, "GPU-0", "NVIDIA H100", 79.6, driver, (9, 0))
        problem = doctor.gpu_problem(machine_with((gpu,), cuda, system))
        assert (problem is None) if words is None else (words in str(problem))

    def test_the_doctor_names_what_a_gpu_lacks(self, tmp_path, monkeypatch):
        fake_smi(tmp_path, monkeypatch, H100.format(i=0).replace("580.65.06", "470.57.02"))
        command = [sys.executable, "-m", "speedrun.lab.doctor"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        assert done.returncode == 1 and "→" in done.stdout and "GPU 0: NVIDIA H100" in done.stdout
        words = "too old for the CUDA" if torch.version.cuda else "this torch was built for the CPU"
        assert words in done.stdout

    @pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
    def test_the_doctor_speaks_where_the_console_lacks_signs(self, encoding):
        command = [sys.executable, "-m", "speedrun.lab.doctor"]
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run(command, env=environment, capture_output=True)
        assert b"ok Python 3" in done.stdout and b"?" not in done.stdout
        assert done.returncode in (0, 1) and not done.stderr

    def test_the_doctor_looks_at_a_torch_that_does_not_start(self, tmp_path):
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: gone')")
        path = f"{tmp_path}{os.pathsep}{provenance.root()}"
        command = [sys.executable, "-m", "speedrun.lab.doctor"]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, encoding="utf-8")  # fmt: skip
        assert done.returncode == 1 and not done.stderr
        assert "cannot be imported: libcudart.so.13: gone\n  → mv .venv" in done.stdout

    def test_setup_makes_triton_interpret_where_there_is_no_gpu(self):
        triton = hardware.find_triton()
        if triton is None or hardware.detect_machine().device == "cuda":
            pytest.skip("needs Triton and no GPU")
        hardware.setup()
        from tests_kernel import fill_one

        assert (
            triton.knobs.runtime.interpret
            and "Interpreted" in type(hardware.jit(fill_one)).__name__
        )

    def test_an_interpreted_kernel_runs(self):
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
        alone = stats.dunnett({"a": arm}, control)["a"]
        assert alone == pytest.approx(scipy_stats.ttest_ind(arm, control).pvalue, rel=1e-2)
        others = {str(n): [3.1 + 0.01 * n, 3.2, 3.25] for n in range(4)}
        among = stats.dunnett(others | {"a": arm}, control)
        assert among.keys() == {*others, "a"} and alone < among["a"] < 5 * alone < among["0"]
        assert among == stats.dunnett(others | {"a": arm}, control)

    def test_two_arms_of_a_study_share_its_deviation(self):
        losses = {"control": [3.1, 3.2, 3.15], "a": [3.0, 3.1, 3.05], "b": [3.3, 3.2, 3.26]}
        study = stats.study_of(losses)
        squares = sum(2 * scipy_stats.tvar(values) for values in losses.values())
        assert study.dof == 6 and study.pooled_sd == pytest.approx((squares / 6) ** 0.5)
        t = (study.delta("b") - study.delta("a")) / (study.pooled_sd * (2 / 3) ** 0.5)
        assert study.pairwise_p("a", "b") == pytest.approx(2 * scipy_stats.t.sf(t, 6))
        assert study.delta("a") == pytest.approx(-0.1) and study.line("a").startswith("a ")
        height = scipy_stats.t.isf(0.05 / 4, 6) * study.pooled_sd * (2 / 3) ** 0.5
        assert study.detectable(3) == pytest.approx(height)
        assert study.detectable(3, 0.9) > height

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
            records = metrics.read_metrics(path)
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
        assert done.stdout.count("log.txt cannot be written (File too large)") == 1, "said once"

    def test_a_broken_line_in_the_middle_is_named(self, tmp_path):
        (tmp_path / "m.jsonl").write_text('{"kind": "a"}\nnonsense\n{"kind": "b"}\n')
        with pytest.raises(UserError, match=r"m\.jsonl, line 2: not a record"):
            metrics.read_metrics(tmp_path / "m.jsonl")

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
        lines = (tmp_path / "log.txt").read_text().splitlines()
        read = [numbers for line in lines if (numbers := runlog.parse_line(line))]
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

    def test_the_commit_is_this_projects_own(self, tmp_path, monkeypatch):
        """Not that of a repository around an unpacked archive, nor one that a hook's variables name."""
        project = tmp_path / "outer" / "unpacked"
        for folder in ("speedrun", "book/data"):
            (project / folder).mkdir(parents=True)
        monkeypatch.setattr(provenance.speedrun, "__file__", str(project / "speedrun/__init__.py"))
        git = ["git", "-c", "user.name=x", "-c", "user.email=x@x"]

        def repository(folder: Path) -> str:
            subprocess.run([*git, "init", "-q", str(folder)], check=True)
            subprocess.run([*git, "-C", str(folder), "commit", "-q", "--allow-empty", "-m", str(folder)], check=True)  # fmt: skip
            return subprocess.run([*git, "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()  # fmt: skip

        outer = repository(project.parent)
        assert len(outer) == 40 and provenance.commit() == ""
        subprocess.run([*git, "init", "-q", str(project)], check=True)
        assert provenance.commit() == "", "a repository without a commit"
        own = repository(project)
        monkeypatch.setenv("GIT_DIR", str(project.parent / ".git"))
        assert provenance.commit() == own != outer

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
            len(results.public_table("records")) == 94
            and len(results.public_table("curves")) > 1000
        )
        assert all(
            math.isfinite(float(row["final_val_loss"])) for row in results.public_table("variance")
        )
