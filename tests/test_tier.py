"""The tier of a chapter: what it chooses on which machine, what it prints, what it hides, what it refuses."""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import jupytext
import pytest
from test_lab import H100 as H100_LINE
from test_lab import fake_smi

from speedrun.lab import doctor, tier
from speedrun.lab.errors import UserError
from speedrun.lab.hardware import GPU, Machine
from speedrun.lab.provenance import root

H100 = GPU(0, "GPU-0", "NVIDIA H100 80GB HBM3", 79.6, "580.65.06", (9, 0))
T4 = GPU(1, "GPU-1", "Tesla T4", 15.0, "580.65.06", (7, 5))
SMALL = GPU(2, "GPU-2", "NVIDIA GeForce RTX 4060", 8.0, "580.65.06", (8, 9))
SMALLER = GPU(3, "GPU-3", "NVIDIA T1000", 4.0, "580.65.06", (7, 5))
UNKNOWN = GPU(4, "GPU-4", "NVIDIA GB10", 0.0, "580.65.06", (12, 1))


def with_gpus(*gpus: GPU, cuda: str | None = "13.0") -> Machine:
    return Machine("Linux x86_64", "3.12.1", 16, 64.0, gpus, {"torch": "2.11.0"}, cuda, None)


BARE = with_gpus()
OLD = with_gpus(replace(T4, driver="535.54.03"))
FOR_CPU = with_gpus(H100, cuda=None)


class TestChoice:
    @pytest.mark.parametrize(
        ("machine", "asked", "gpu"),
        [
            (BARE, "", None),
            (BARE, "C", None),
            (with_gpus(H100), "", H100),
            (with_gpus(H100), "1", H100),
            (with_gpus(H100), "C", None),
            (with_gpus(H100), "c", None),
            (with_gpus(T4), "", T4),  # a card of 16 GB
            (with_gpus(SMALL), "", None),
            (with_gpus(UNKNOWN), "", None),
            (with_gpus(SMALL, T4, H100), "", T4),  # the first that is large enough
            (with_gpus(SMALL, T4), "1", T4),
            (with_gpus(SMALLER, SMALL), "1", SMALL),  # or else the largest
            (with_gpus(UNKNOWN), "1", UNKNOWN),
            (OLD, "", None),
            (FOR_CPU, "", None),
            (FOR_CPU, "C", None),
        ],
    )
    def test_by_machine_and_variable(self, machine, asked, gpu):
        chosen = tier.tier_of(machine, asked)
        assert chosen == tier.Tier(gpu)
        wanted = ("1", "cuda", 768) if gpu else ("C", "cpu", 128)
        assert (chosen.name, chosen.device, chosen.pick(cpu=128, gpu=768)) == wanted

    @pytest.mark.parametrize(
        ("machine", "asked", "words"),
        [
            (BARE, "1", "TIER=1 wants a GPU: PyTorch finds no GPU here"),
            (OLD, "1", "TIER=1 wants a GPU: the driver 535.54.03 is too old"),
            (
                FOR_CPU,
                "1",
                "TIER=1 wants a GPU: there is a GPU, but this torch was built for the CPU",
            ),
            (with_gpus(H100), "N", "TIER=N is no tier of a chapter"),
            (BARE, "gpu\x1b[2J", r"TIER=gpu\x1b[2J is no tier of a chapter"),
        ],
    )
    def test_what_cannot_be_is_refused_with_a_way_out(self, machine, asked, words):
        with pytest.raises(UserError) as caught:
            tier.tier_of(machine, asked)
        assert words in caught.value.what and "TIER=C" in caught.value.fix

    @pytest.mark.parametrize("machine", [BARE, OLD, FOR_CPU, with_gpus(H100), with_gpus(SMALL)])
    def test_the_doctor_says_the_same(self, machine):
        (one,) = [f for f in doctor.tier_findings(machine) if f.text.startswith("tier 1: ")]
        assert (one.ok is True) == (tier.tier_of(machine, "").name == "1")
        assert f"{doctor.CHAPTER_GB:.0f} GB" in one.text


@pytest.fixture
def choose(monkeypatch, capsys):
    """Calls choose_tier on a machine that is played; gives the tier, the line, and what CUDA would see."""

    def call(machine: Machine, asked: str | None = None, visible: str | None = None, started=False):
        monkeypatch.setattr(tier, "detect_machine", lambda: machine)
        cuda = SimpleNamespace(is_initialized=lambda: started)
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
        for name, value in {"TIER": asked, "CUDA_VISIBLE_DEVICES": visible}.items():
            monkeypatch.setenv(name, value or "")
            if value is None:
                monkeypatch.delenv(name)
        chosen = tier.choose_tier()
        return chosen, capsys.readouterr().out, os.environ.get("CUDA_VISIBLE_DEVICES")

    return call


class TestFirstLine:
    @pytest.mark.parametrize(
        ("machine", "asked", "line", "sees"),
        [
            (BARE, None, "tier C: 16 CPU cores (a GPU with 14 GB makes it tier 1)", "-1"),
            (replace(BARE, cores=1), "", "tier C: 1 CPU core (a GPU with 14 GB makes it tier 1)", "-1"),
            (with_gpus(H100), "C", "tier C: 16 CPU cores (as TIER=C says)", "-1"),
            (with_gpus(H100), None, "tier 1: NVIDIA H100 80GB HBM3, 80 GB (TIER=C keeps to the CPU)", None),
            (with_gpus(SMALL, T4), " 1 ", "tier 1: Tesla T4, 15 GB (TIER=C keeps to the CPU)", "GPU-1"),
            (with_gpus(SMALL), None, "tier C: 16 CPU cores (14 GB are wanted, NVIDIA GeForce RTX 4060 is smaller: TIER=1 takes it)", "-1"),
            (OLD, None, "tier C: 16 CPU cores (the driver 535.54.03 is too old for the CUDA 13.0 of this torch: make doctor)", "-1"),
        ],
    )  # fmt: skip
    def test_it_says_why_and_the_rest_is_hidden(self, choose, machine, asked, line, sees):
        assert choose(machine, asked)[1:] == (f"{line}\n", sees)

    def test_a_kernel_that_holds_a_gpu_cannot_go_back(self, choose):
        with pytest.raises(UserError, match="restart the kernel"):
            choose(with_gpus(H100), "C", started=True)
        assert choose(with_gpus(H100), "1", started=True)[0].name == "1"

    def test_cuda_is_not_asked(self):
        code = """
import torch
def refuse(*args): raise AssertionError("CUDA was asked")
torch.cuda.init = torch.cuda._lazy_init = torch.cuda.device_count = torch.cuda.is_available = refuse
from speedrun.lab.tier import choose_tier
choose_tier()
"""
        environment = {name: value for name, value in os.environ.items() if name != "TIER"}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)

    def test_what_a_chapter_starts_keeps_to_the_cpu_too(self, tmp_path, monkeypatch):
        """A child that looks for a GPU, as a training run does, finds none at tier C."""
        fake_smi(tmp_path, monkeypatch, H100_LINE.format(i=0))
        child = "from speedrun.lab.hardware import find_gpus; print(len(find_gpus()), 'GPUs')"
        code = f"import subprocess, sys; {{}}; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
        choice = "from speedrun.lab.tier import choose_tier; choose_tier()"
        for first, count in (("pass", 1), (choice, 0)):
            done = subprocess.run([sys.executable, "-c", code.format(first)], env=os.environ | {"TIER": "C"}, capture_output=True, encoding="utf-8", check=True, timeout=120)  # fmt: skip
            assert f"{count} GPUs" in done.stdout.splitlines()


@pytest.mark.parametrize("path", sorted((root() / "notebooks").glob("*.py")), ids=lambda p: p.stem)
class TestChapters:
    @staticmethod
    def code_of(path) -> list[str]:
        cells = jupytext.read(path, fmt="py:percent").cells
        return [cell.source for cell in cells if cell.cell_type == "code"]

    def test_its_first_cell_chooses_the_tier_and_no_other_does(self, path):
        first, *rest = self.code_of(path)
        assert first.endswith("choose_tier()") and "torch" not in first
        mine = [cell for cell in rest if not cell.startswith("#|")]
        calls = [call for cell in mine for call in re.findall(r"(?<!def )\bchoose_tier\(", cell)]
        assert not calls

    def test_no_cell_asks_for_a_gpu_by_name(self, path):
        """Devices come from the tier; only code of the package, and machines that are played, may say cuda."""
        for cell in self.code_of(path):
            if not any(line.startswith("#| export") for line in cell.splitlines()[:3]):
                assert not re.search(r"\.cuda\(\)|device=[\"']cuda|\.to\([\"']cuda|torch\.device\([\"']cuda", cell), cell  # fmt: skip

    def test_its_cost_box_knows_the_tiers(self, path):
        box = path.read_text(encoding="utf-8").split("```{admonition} Cost box")[1].split("```")[0]
        assert "nothing for a GPU to do" in box or "one GPU" in box
        assert "no GPU" not in box


class TestWhoElseAsks:
    def test_an_execution_is_kept_by_its_tier(self, monkeypatch):
        import execute

        monkeypatch.setattr(execute, "detect_machine", lambda: with_gpus(SMALL, T4))
        (chapter,) = execute.chapters(["93"])
        for asked, wanted in {"": ("1", ["Tesla T4"]), "C": ("C", "cpu")}.items():
            monkeypatch.setenv("TIER", asked)
            state = execute.state_of(chapter)
            assert (state["tier"], state["device"]) == wanted
        monkeypatch.setenv("TIER", "two")
        with pytest.raises(UserError, match="TIER=two"):
            execute.state_of(chapter)

    @pytest.mark.parametrize(("machine", "most"), [(BARE, 2), (with_gpus(T4), 1)])
    def test_one_chapter_at_a_time_has_the_gpu(self, monkeypatch, machine, most):
        import execute

        together, seen = [], []

        def played(chapter, threads):
            together.append(chapter)
            time.sleep(0.2)
            seen.append(len(together))
            together.remove(chapter)
            return chapter, None, 0.2

        monkeypatch.delenv("TIER", raising=False)
        for name, value in {"detect_machine": lambda: machine, "prepare": lambda: None, "execute": played}.items():  # fmt: skip
            monkeypatch.setattr(execute, name, value)
        assert execute.run_chapters(["01", "02", "05"], force=True) == []
        assert max(seen) == most

    def test_make_speedrun_trains_on_what_its_preset_says(self, monkeypatch):
        """Its notebook chooses no tier: that would hide a small GPU, or all GPUs but one."""
        import run_speedrun

        cells = [cell.source for cell in run_speedrun.notebook_of_a_run().cells]
        assert not any("choose_tier" in source for source in cells)
