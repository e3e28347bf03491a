"""Training: one rank and two, interrupted and resumed, on a full disk, with a number that is not one."""

import json
import math
import os
import pkgutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from resuming import broken_and_resumed

from speedrun.checkpoint import (
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    load_facts,
    save_checkpoint,
)
from speedrun.config import vary
from speedrun.cpu_size import at_cpu_size
from speedrun.lab.errors import UserError
from speedrun.lab.metrics import read_metrics, series
from speedrun.lab.runlog import parse_line
from speedrun.presets import as_arguments, known_presets, preset
from speedrun.schedule import Stage
from speedrun.supervise import run_ranks
from speedrun.train import accumulate, build_run, main, train


def state_dict_from_gpt2(state: dict, layers: int) -> dict:
    """Tensors of chapter 03's GPT2, by name, as the banked model's."""
    parts = {"attention_qkv": "attention.qkv", "attention_out": "attention.out"}
    parts |= {"mlp_up": "mlp.up", "mlp_down": "mlp.down"}
    parts |= {"attention_norm": "norm_1", "mlp_norm": "norm_2"}
    found = {"embed": "tokens.weight", "pos_embed": "positions.weight"}
    found |= {"final_norm_gain": "norm.weight", "final_norm_bias": "norm.bias"}
    banks = {name: state[other] for name, other in found.items()}
    for bank, part in parts.items():
        for kind, suffix in (("weight", "_gain" if "norm" in bank else ""), ("bias", "_bias")):
            stacked = [state[f"blocks.{n}.{part}.{kind}"] for n in range(layers)]
            banks[bank + suffix] = torch.stack(stacked)
    return banks


def curve(folder: Path, kind: str = "val") -> list[float]:
    records = series(read_metrics(folder / "metrics.jsonl"), kind)
    return [record["val_loss" if kind == "val" else "train_loss"] for record in records]


FACTS = {"config": {}, "position": [0, 0, 0], "train_time_ms": 1.5, "data_sha256": "0" * 64, "vocab_size": 288, "tokenizer": "bytes"}  # fmt: skip


FP8_HEAD = {"model.head.fp8": True, "model.head.tie": "untied", "model.head.softcap": "sigmoid23"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(latest_checkpoint(folder))[0]


def command(config, folder: Path) -> list[str]:
    """The words behind `python -m speedrun.train`."""
    return ["--out", str(folder), *as_arguments(config)]


# Rates are so high that decay, and the end of a schedule, move losses by more than another machine does. With one thread or two, with
# SSE, AVX2 or AVX-512 these curves differ by 1.4e-6 at most; with Newton–Schulz in bfloat16 it would be 5e-3, hence the exact factor.
GOLDEN: dict[str, tuple[str, dict]] = {
    "adamw": ("record1", {"optim.adam.lr": 8e-3, "optim.adam.weight_decay": 1.0}),
    "muon": (
        "small_gpt2",
        {"optim.adam.lr": 4e-3, "optim.matrix_lr": 0.05, "optim.muon.ns_steps": 0},
    ),
}


def golden_run(name: str, data: Path, folder: Path) -> list[float]:
    """The training losses of twenty steps of AdamW on a cosine, or of Muon on a trapezoid with a ramp of momentum."""
    torch.set_num_threads(1)
    base, rates = GOLDEN[name]
    brief = {"compile": False, "log_every": 1, "model.model_dim": 64, "data.path": str(data)}
    train(vary(at_cpu_size(preset(base), 20), brief | rates), folder, echo=None)
    return curve(folder, "step")


def known_curve(name: str):
    curves = json.loads((Path(__file__).parent / "golden.json").read_text())
    return pytest.approx(curves[name], abs=1e-5)


def late(share: float, first: int, last: int = 20):
    """Something that depends on the step, its first integer, changed in some steps only."""

    def changed(real):
        def wrong(*told):
            step = next(one for one in told if isinstance(one, int))
            return real(*told) * (share if first <= step < last else 1)

        return wrong

    return changed


def less_decay(real):
    return lambda *tensors, weight_decay, **rest: real(*tensors, weight_decay=0.98 * weight_decay, **rest)  # fmt: skip


CHANGES: dict = {  # which curve sees it, what is changed, and how
    "cosine": ("adamw", "speedrun.schedule.learning_rate", late(0.998, 10)),
    "decay": ("adamw", "speedrun.optim.state.adamw", less_decay),
    "cooldown": ("muon", "speedrun.schedule.learning_rate", late(0.998, 10)),
    "its begin": (
        "muon",
        "speedrun.schedule.linear_cooldown",
        lambda real: lambda peak, floor, step, begin, end: real(peak, floor, step, begin + 1, end),
    ),
    "momentum after its ramp": ("muon", "speedrun.schedule.ramp", late(0.998, 6, 15)),
    "momentum at the end": ("muon", "speedrun.schedule.ramp", late(0.98, 18)),
    "cautious decay": (
        "muon",
        "speedrun.optim.muon.cautious_decay",
        lambda real: lambda p, update, decay: real(p, update, decay * 0.95),
    ),
}


class TestOneRank:
    @pytest.mark.parametrize("name", [*known_presets()])
    def test_every_preset_learns_at_cpu_size(self, name, tmp_path, embedded):
        run = vary(
            at_cpu_size(preset(name)),
            {"compile": False, "schedule.warmup_steps": 3, "optim.adam.lr": 4e-3}
            | {
                "val_tokens": 4096,
                "warmup": 0,
                "data.batch_tokens": 256,
            },  # FlexAttention on a CPU is dense: quadratic in a row
        )
        train(run, tmp_path, echo=None)
        first, *_, last = curve(tmp_path)
        expects_the_same_again = 0.3 if run.model.rotary.pos == "learned" else 1.3  # chapter 08
        assert abs(first - math.log(288)) < expects_the_same_again and last < 4.5

    def test_the_same_run_is_the_same_run(self, brief, tmp_path):
        for name in "ab":
            train(brief, tmp_path / name, echo=None)
        assert curve(tmp_path / "a") == curve(tmp_path / "b")
        assert curve(tmp_path / "a", "step") == curve(tmp_path / "b", "step")

    @pytest.mark.parametrize("name", GOLDEN)
    def test_a_golden_curve(self, name, embedded, tmp_path):
        """Twenty steps whose losses are known: whoever changes them has changed the arithmetic."""
        assert golden_run(name, embedded, tmp_path) == known_curve(name)

    @pytest.mark.parametrize("change", CHANGES)
    def test_a_golden_curve_sees_every_part_of_the_schedule(
        self, change, embedded, tmp_path, monkeypatch
    ):
        name, where, changed = CHANGES[change]
        monkeypatch.setattr(where, changed(pkgutil.resolve_name(where)))
        assert golden_run(name, embedded, tmp_path) != known_curve(name)

    def test_chapter_03s_gpt2_and_the_banked_model_train_alike(self, brief, tmp_path):
        from speedrun.data.loader import Loader
        from speedrun.model.baseline import GPT2, decay_groups
        from speedrun.train import accumulate, build_run, run_loop

        torch.manual_seed(0)
        plain = GPT2(brief.model, 288)
        run = build_run(brief, tmp_path, echo=None)
        run.model.load_state_dict(state_dict_from_gpt2(plain.state_dict(), brief.model.num_layers))
        adamw = torch.optim.AdamW(decay_groups(plain), betas=brief.optim.adam.betas, fused=True)
        loader, losses = Loader(brief.data), []

        def forward(inputs, targets, candidates=None):  # chapter 03's has no head with candidates
            assert candidates is None
            return plain(inputs, targets)

        for step in range(brief.steps):
            batches = loader.next()
            parts = (batches, len(batches), run.ranks.device, "float32")
            losses += [accumulate(forward, *parts).item()]
            torch.nn.utils.clip_grad_norm_(plain.parameters(), brief.optim.grad_clip)
            for group in adamw.param_groups:
                group["lr"] = run.schedule.at(step).lr
            adamw.step()
            adamw.zero_grad()
        run_loop(run)
        every = brief.log_every
        assert curve(tmp_path, "step") == pytest.approx(losses[every - 1 :: every], abs=1e-4)

    def test_the_last_step_is_logged_even_if_its_turn_has_not_come(self, brief, tmp_path):
        train(vary(brief, {"log_every": 50}), tmp_path, echo=None)
        (record,) = series(read_metrics(tmp_path / "metrics.jsonl"), "step")
        assert record["step"] == 12 and len(record["steps_ms"]) == 12

    def test_max_steps_keeps_the_schedule(self, brief, tmp_path):
        train(brief, tmp_path / "whole", echo=None)
        train(vary(brief, {"max_steps": 6}), tmp_path / "part", echo=None)
        assert curve(tmp_path / "part", "step") == curve(tmp_path / "whole", "step")[:2]

    def test_a_log_holds_what_could_differ(self, brief, tmp_path):
        train(brief, tmp_path, echo=None, command="python -m …")
        first, *_, last = read_metrics(tmp_path / "metrics.jsonl")
        assert first["config"]["steps"] == 12 and first["stamp"]["torch"] and first["world"] == 1
        assert first["modules"]["speedrun.model.gpt"]["source"].startswith(
            "# Tangled from notebooks/21_model.py"
        )
        assert last["kind"] == "end" and last["reason"] == "finished"
        logged = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
        lines = [numbers for line in logged if (numbers := parse_line(line))]
        assert [line["step"] for line in lines if "val_loss" in line] == [0, 6, 12]
        assert all(line["steps"] == 12 for line in lines)

    def test_validation_and_saving_are_not_timed(self, brief, tmp_path, monkeypatch):
        from speedrun import train as module

        real, loop, took = module.validation_loss, module.run_loop, []
        monkeypatch.setattr(
            module, "validation_loss", lambda run, batches: (time.sleep(0.5), real(run, batches))[1]
        )

        def timed(run):
            began = time.perf_counter()
            why = loop(run)
            took.append(1000 * (time.perf_counter() - began))
            return why

        monkeypatch.setattr(module, "run_loop", timed)
        run = train(brief, tmp_path, echo=None)
        steps = [
            ms
            for record in series(read_metrics(tmp_path / "metrics.jsonl"), "step")
            for ms in record["steps_ms"]
        ]
        assert len(steps) == brief.steps and run.clock.ms <= took[0] - 3 * 500, "three validations"
        assert sum(steps) < run.clock.ms + 500

    def test_data_that_run_short_are_announced(self, brief, tmp_path, capsys):
        import numpy as np

        from speedrun.data.sources import write_corpus
        from speedrun.data.tokenizer import byte_tokenizer

        texts = [(np.arange(400, dtype=np.uint16) % 256, 400) for _ in range(12)]
        write_corpus(
            tmp_path / "d", {"train": texts, "val": texts}, byte_tokenizer(), "counting", "…", 10**6
        )
        train(vary(brief, {"data.path": str(tmp_path / "d"), "val_tokens": 1024}), tmp_path / "run")
        assert (
            "the data run short: 12,288 tokens are 2.55 epochs of the 4,812 there are"
            in capsys.readouterr().out
        )
        assert series(read_metrics(tmp_path / "run" / "metrics.jsonl"), "step")[-1]["epoch"] == 2

    def test_without_data_it_says_how_to_get_them(self, brief, tmp_path, capsys):
        nothing = vary(brief, {"data.path": str(tmp_path)})
        assert main(["--out", str(tmp_path / "r"), *as_arguments(nothing)]) == 1
        said = capsys.readouterr().err
        assert "holds no manifest.json" in said and "Traceback" not in said

    def test_weights_and_biases_is_asked_for_only_when_named(self, brief, tmp_path, monkeypatch):
        import types

        seen = []

        def refuse(**kwargs):
            raise RuntimeError("api_key not configured\x1b[2J")

        fake = types.SimpleNamespace(
            init=lambda **k: seen.append(("init", k["project"])),
            log=lambda n, step: seen.append((step, n)),
        )
        monkeypatch.setitem(sys.modules, "wandb", fake)
        train(brief, tmp_path / "quiet", echo=None)
        assert not seen
        train(vary(brief, {"wandb": "mine"}), tmp_path / "loud", echo=None)
        assert seen[0] == ("init", "mine") and seen[1][0] == 0 and "val_loss" in seen[1][1]
        for name, module in {
            "missing": None,
            "keyless": types.SimpleNamespace(init=refuse),
        }.items():
            monkeypatch.setitem(sys.modules, "wandb", module)
            train(vary(brief, {"wandb": "mine"}), tmp_path / name, echo=None)
            log = (tmp_path / name / "log.txt").read_text()
            assert "no Weights & Biases, going on without" in log and "finished" in log
            assert "\x1b" not in log


class TestResuming:
    def test_every_bit_is_the_same(self, brief, tmp_path):
        stops = (1, 5, 6, 11)
        broken_and_resumed(brief, tmp_path, *stops)
        whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
        assert all(torch.equal(whole[name], broken[name]) for name in whole)
        assert curve(tmp_path / "whole")[-1] == curve(tmp_path / "broken")[-1]
        read = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "broken")]
        (one, two) = ({r["step"]: r["train_loss"] for r in series(log, "step")} for log in read)
        assert two == one | {stop: two[stop] for stop in stops}, "the broken run also logged where it stopped"  # fmt: skip

    def test_killed_without_warning_it_goes_on_from_the_last_checkpoint(self, brief, tmp_path):
        train(brief, tmp_path / "whole", echo=None)
        slow = vary(brief, {"checkpoint_every": 4, "log_every": 1})
        live = forked.start("speedrun.train", command(slow, tmp_path / "killed"))
        for line in live.stdout:
            if line.startswith("step:9/"):
                live.kill()
        live.wait()
        saved = [path.name for path in checkpoints(tmp_path / "killed")]
        assert saved and saved[-1] in ("step-0000008", "step-0000012")
        train(slow, tmp_path / "killed", again=True, echo=None)
        whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
        assert all(torch.equal(whole[name], killed[name]) for name in whole)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_a_signal_saves_and_says_how_to_go_on(self, brief, tmp_path, number):
        long = vary(brief, {"steps": 100_000, "val_every": 100_000})
        live = forked.start("speedrun.train", command(long, tmp_path))
        said = []
        for line in live.stdout:
            said.append(line)
            if line.startswith("step:6/"):
                live.send_signal(number)
        assert live.wait(timeout=60) == 128 + number
        assert said[-1].startswith("to resume: python -m speedrun.train --resume") and checkpoints(
            tmp_path
        )

    def test_other_data_are_refused(self, brief, tmp_path):
        import numpy as np

        from speedrun.data.sources import write_corpus
        from speedrun.data.tokenizer import byte_tokenizer

        train(brief, tmp_path / "run", echo=None)
        texts = [(np.arange(900, dtype=np.uint16) % 256, 900) for _ in range(12)]
        write_corpus(
            tmp_path / "d", {"train": texts, "val": texts}, byte_tokenizer(), "other", "…", 10**6
        )
        with pytest.raises(UserError, match="was trained on other data"):
            train(
                vary(brief, {"data.path": str(tmp_path / "d")}),
                tmp_path / "run",
                again=True,
                echo=None,
            )

    def test_a_folder_without_a_checkpoint(self, tmp_path, capsys):
        assert main(["--resume", str(tmp_path)]) == 1
        assert "has no checkpoint" in capsys.readouterr().err


def in_small_files(arguments: list[str]) -> int:
    """The trainer where no file may grow beyond 400 kB; patience takes a thirtieth of its time, and is told."""
    import resource

    from speedrun import train as module

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
    save, waited = module.save, []
    module.save = lambda run, patience_s=0.0: (waited.append(patience_s), save(run, patience_s / 30))[1]  # fmt: skip
    status = module.main(arguments)
    print("waited", waited)
    return status


class TestTrouble:
    def test_a_full_disk_loses_nothing_and_is_no_success(self, brief, tmp_path):
        """Files may not grow beyond 400 kB: no checkpoint fits. The run goes on to its end, and then it is a problem."""
        run = vary(brief, {"checkpoint_every": 6, "model.model_dim": 64})
        done = forked.run("test_train:in_small_files", command(run, tmp_path))
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "no checkpoint at step 6, going on without" in done.stdout
        assert "step 12 is reached, but not saved: the checkpoint" in done.stderr
        assert "MB where" in done.stderr and "waited [0.0, 30.0]" in done.stdout
        assert checkpoints(tmp_path) == [] and not list(tmp_path.rglob("*.part"))
        assert len(curve(tmp_path)) == 3, "the log before and after is whole"

    def test_room_that_comes_back_in_time_is_used(self, brief, tmp_path, monkeypatch):
        from speedrun import train as module

        real, tries = module.save_checkpoint, []

        def full_twice(*given):
            tries.append(given)
            if len(tries) < 3:
                raise OSError(28, "No space left on device")
            return real(*given)

        monkeypatch.setattr(module, "save_checkpoint", full_twice)
        monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
        train(brief, tmp_path, echo=None)
        assert len(tries) == 3 and [path.name for path in checkpoints(tmp_path)] == ["step-0000012"]

    def test_views_and_transposed_tensors_are_saved(self, tmp_path):
        whole = torch.arange(12.0)
        tensors = {"a": whole[:4], "b": whole[4:], "turned": whole.view(3, 4).mT}
        path = save_checkpoint(tmp_path, 1, tensors, tensors, FACTS)
        assert all(torch.equal(load_checkpoint(path)[0][name], t) for name, t in tensors.items())

    def test_an_old_checkpoint_survives_a_failed_save(self, tmp_path, monkeypatch):
        from speedrun import checkpoint

        tensors = {"w": torch.ones(3)}
        first = save_checkpoint(tmp_path, 1, tensors, tensors, FACTS)
        monkeypatch.setattr(
            checkpoint.os,
            "replace",
            lambda a, b: (_ for _ in ()).throw(OSError(28, "No space left on device")),
        )
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, 2, tensors, tensors, FACTS)
        assert checkpoints(tmp_path) == [first] and load_checkpoint(first)[2]["step"] == 1
        assert [path.name for path in first.parent.iterdir()] == [first.name], "no rest"

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_the_nonfinite_parameter_is_named(self, brief, tmp_path, value):
        from speedrun.train import build_run, run_loop, train_step

        run = build_run(brief, tmp_path, echo=None)

        def poisoned(run):
            if run.step == 4:
                with torch.no_grad():
                    run.model.attention_out[0, 1, 1] = value
            return train_step(run)

        with pytest.raises(UserError, match="step 6: parameter attention_out is not finite"):
            run_loop(run, step=poisoned)
        others = (p for name, p in run.model.named_parameters() if name != "attention_out")
        assert all(torch.isfinite(p).all() for p in others)

    def test_a_validation_loss_that_is_nan_stops_the_run(self, brief, tmp_path, monkeypatch):
        from speedrun import train as module

        monkeypatch.setattr(module, "validation_loss", lambda run, batches: math.nan)
        with pytest.raises(UserError, match="step 0: the loss is nan"):
            train(brief, tmp_path, echo=None)

    def test_a_rate_that_explodes_stops_the_run(self, brief, tmp_path, capsys):
        explosive = vary(brief, {"optim.adam.lr": 1e9})
        assert main(["--out", str(tmp_path), *as_arguments(explosive)]) == 1
        said = capsys.readouterr().err
        assert "is not finite" in said and "--optim.adam.lr" in said


def told_to_stop_at_4(arguments: list[str]) -> int:
    """The trainer, as one rank: it is asked to stop before the fourth step, and told so after the third."""
    from speedrun import train as module

    def choose(run):
        if run.step == 3:
            run.stop_at = 4

    module.choose_stop = choose
    return module.main(arguments)


class TestTwoRanks:
    def test_gradients_and_losses_equal_one_ranks(self, brief, tmp_path):
        train(brief, tmp_path / "one", echo=None)
        run_ranks(
            ["-m", "speedrun.train", "--out", str(tmp_path / "two"), *as_arguments(brief)],
            2,
            tmp_path / "two",
        )
        assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), abs=1e-5)
        one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
        for name in one:
            assert (one[name] - two[name]).norm() <= 1e-4 * one[name].norm() + 1e-6, name
        assert read_metrics(tmp_path / "two" / "metrics.jsonl")[0]["world"] == 2

    def test_an_interruption_right_after_a_checkpoint_ends_all_ranks(self, brief, tmp_path):
        """Collecting the optimizer's state is a collective, which rank 0 must not leave out because the step is saved already."""
        flags = as_arguments(vary(brief, {"checkpoint_every": 2, "optim.matrices": "muon"}))
        folder = tmp_path / "run"
        told = ["--out", str(folder), *flags]
        forked.train_on_ranks(told, 2, folder, program="test_train:told_to_stop_at_4")
        assert latest_checkpoint(folder).name == "step-0000004"
        end = series(read_metrics(folder / "metrics.jsonl"), "end")[-1]
        assert (end["step"], end["reason"]) == (4, "interrupted")

    # make check has four ranks read documents, in tests/test_attention.py
    @pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.long)])
    def test_they_read_and_learn_the_same_in_every_stage(self, brief, tmp_path, world):
        stages = (Stage(0.5), Stage(0.5, batch_mul=3, lr_mul=1.5), Stage(0, batch_mul=2))
        changes = {"schedule.stages": stages, "schedule.extension_steps": 2, "log_every": 1}
        long = vary(brief, changes | {"data.micro_batches": 4, "data.batch_tokens": 2048})
        one = train(long, tmp_path / "one", echo=None)
        forked.train_on_ranks(command(long, tmp_path / "all"), world, tmp_path / "all")
        known = curve(tmp_path / "one", "step")
        assert curve(tmp_path / "all", "step") == pytest.approx(known, abs=1e-5)
        facts = load_facts(latest_checkpoint(tmp_path / "all"))
        assert tuple(facts["position"]) == one.loader.position
        assert one.loader.position.offset == (5 + 5 * 3 + 2 * 2) * 2048

    def test_a_softmax_over_some_words_has_the_same_words(self, brief, tmp_path):
        """Candidates are a micro-batch's own, whichever rank has it."""
        stages = (Stage(0.5, candidates=64), Stage(0.25, candidates=128), Stage(0.25))
        run = vary(brief, FP8_HEAD | {"schedule.stages": stages, "log_every": 1})
        train(run, tmp_path / "one", echo=None)
        forked.train_on_ranks(command(run, tmp_path / "two"), 2, tmp_path / "two")
        for kind in ("val", "step"):
            known = curve(tmp_path / "one", kind)
            assert curve(tmp_path / "two", kind) == pytest.approx(known, abs=1e-5)
        one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
        for name in one:
            assert (one[name] - two[name]).norm() <= 1e-4 * one[name].norm() + 1e-6, name

    @pytest.mark.slow
    def test_interrupted_and_resumed_on_one_rank(self, brief, tmp_path):
        """Two ranks are told to stop through their launcher; one rank finishes what they began."""
        long = vary(brief, {"steps": 150, "val_every": 150})
        train(long, tmp_path / "whole", echo=None)
        code = (
            "import sys; from pathlib import Path; from speedrun.supervise import run_ranks;"
            "run_ranks(sys.argv[2:], 2, Path(sys.argv[1]))"
        )
        folder = tmp_path / "two"
        rank = ["-m", "speedrun.train", "--out", str(folder), *as_arguments(long)]
        live = subprocess.Popen(
            [sys.executable, "-c", code, str(folder), *rank], stdout=subprocess.PIPE, text=True
        )
        said = []
        for line in live.stdout:
            said.append(line)
            if line.startswith("step:30/"):
                live.send_signal(signal.SIGINT)
        live.wait(timeout=60)
        assert any("the ranks save" in line for line in said) and checkpoints(folder)
        train(long, folder, again=True, echo=None)
        assert curve(folder)[-1] == pytest.approx(curve(tmp_path / "whole")[-1], abs=1e-3)

    def test_three_ranks_cannot_share_two_micro_batches(self, brief, tmp_path):
        assert forked.run_on_ranks(command(brief, tmp_path), 3, tmp_path) == [1, 1, 1]
        assert "3 ranks cannot share 2 micro-batches" in (tmp_path / "output.txt").read_text()


@pytest.fixture
def every_other(brief):
    """The same run under Muon, and an Adam that steps every other time, decays cautiously and does not clip."""
    adam = {"optim.adam.cautious": True, "optim.adam.every": 2, "optim.grad_clip": 0.0}
    return vary(brief, adam | {"optim.matrices": "muon", "optim.matrix_lr": 0.01})


class TestAdamEveryOtherStep:
    def test_two_ranks_train_as_one(self, every_other, tmp_path):
        train(every_other, tmp_path / "one", echo=None)
        forked.train_on_ranks(command(every_other, tmp_path / "two"), 2, tmp_path / "two")
        assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), abs=1e-3)
        saved = load_checkpoint(latest_checkpoint(tmp_path / "two"))
        assert saved[1].keys() == load_checkpoint(latest_checkpoint(tmp_path / "one"))[1].keys()
        # what two ranks have saved, one goes on from, and the other way round
        longer = vary(every_other, {"max_steps": 7})
        train(longer, tmp_path / "seven", echo=None)
        rank = ["--resume", str(tmp_path / "seven"), "--max-steps", "0"]
        forked.train_on_ranks(rank, 2, tmp_path / "seven")
        assert "up to rounding: 2 ranks, not 1" in (tmp_path / "seven" / "log.txt").read_text()
        assert curve(tmp_path / "seven")[-1] == pytest.approx(curve(tmp_path / "one")[-1], abs=1e-3)

    def test_resuming_is_exact_in_the_middle_of_a_pair_of_steps_as_well(
        self, every_other, tmp_path
    ):
        broken_and_resumed(every_other, tmp_path, 5, 6)

    def test_the_nonfinite_gradient_is_named(self, every_other, tmp_path):
        from speedrun.train import build_run, run_loop, train_step

        run = build_run(every_other, tmp_path, echo=None)

        def poisoned(run):
            if run.step == 3:
                run.model.mlp_up.grad[0, 1, 1] = math.nan
            return train_step(run)

        with pytest.raises(UserError, match="step 6: the gradient of mlp_up is not finite"):
            run_loop(run, step=poisoned)
        assert all(torch.isfinite(p).all() for p in run.model.parameters())


@pytest.mark.slow
class TestCompiled:
    @pytest.mark.parametrize("name", ["record", pytest.param("cpu", marks=pytest.mark.long)])
    def test_inductor_computes_eagers_gradients(self, name, embedded, tmp_path):
        """Under Muon and an epsilon of 1e-10 a few steps make much of a rounding, so here it is one pass: of packed documents."""
        found = []
        for compiled in (True, False):
            exact = {"compile": compiled, "model.block.fp8": False}  # eight bits: below
            config = vary(at_cpu_size(preset(name), 10), exact)
            run = build_run(config, tmp_path / str(compiled), echo=None)
            with torch.no_grad():  # what begins at zero would hide what is behind it
                for p in run.model.parameters():
                    p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
            now = run.schedule.at(0)
            batches = run.loader.next(now.batch_tokens, now.max_doc_tokens)
            loss = accumulate(run.forward, batches, len(batches), run.ranks.device, "float32", run.attn_settings[0])  # fmt: skip
            grads = {key: p.grad.clone() for key, p in run.model.named_parameters()}
            found.append((loss.item(), grads))
        (compiled_loss, ours), (eager_loss, known) = found
        assert compiled_loss == pytest.approx(eager_loss, abs=1e-5)
        for key, grad in known.items():
            assert grad.any(), f"{key} has no gradient"
            assert (ours[key] - grad).norm() <= 1e-4 * grad.norm(), key

    def test_inductor_computes_eagers_gradients_in_eight_bits(self, embedded, tmp_path):
        """Head and MLP, candidates included. A rounding of inductor's can turn a number that e4m3 rounds up into one that it rounds down."""
        found = {}
        for compiled in (True, False):
            run = build_run(
                vary(at_cpu_size(preset("record_200m"), 20), {"compile": compiled, "data.path": str(embedded)}),
                tmp_path / str(compiled),
                echo=None,
            )  # fmt: skip
            with torch.no_grad():
                for p in run.model.parameters():
                    p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
            batches = run.loader.next(2048, 0)
            for count in (0, 128):
                run.model.zero_grad()
                loss = accumulate(run.forward, batches, len(batches), run.ranks.device, "float32", run.attn_settings[0], torch.tensor([count, 1]))  # fmt: skip
                grads = {key: p.grad.clone() for key, p in run.model.named_parameters()}
                found[compiled, count] = loss.item(), grads
        for count in (0, 128):
            (compiled_loss, ours), (eager_loss, known) = found[True, count], found[False, count]
            assert compiled_loss == pytest.approx(eager_loss, abs=1e-4)
            for key, grad in known.items():
                assert grad.any(), f"{key} has no gradient"
                assert (ours[key] - grad).norm() <= 1e-2 * grad.norm(), key
        assert found[False, 128][0] < found[False, 0][0] - 0.1

    @pytest.mark.parametrize("name", ["cpu_gpt2", pytest.param("record1", marks=pytest.mark.long)])
    def test_inductor_trains_what_eager_trains(self, name, embedded, tmp_path):
        """And resumed, to the bit, on one thread. On several, inductor's embedding gradient adds up in whatever order the threads come."""
        torch.set_num_threads(1)
        brief = {"schedule.warmup_steps": 3, "log_every": 2, "compile": True}
        run = vary(at_cpu_size(preset(name), 10), brief)
        whole = train(run, tmp_path / "compiled", echo=None)
        train(vary(run, {"compile": False}), tmp_path / "eager", echo=None)
        assert curve(tmp_path / "compiled", "step") == pytest.approx(
            curve(tmp_path / "eager", "step"), abs=1e-4
        )
        if name == "cpu_gpt2":
            broken_and_resumed(run, tmp_path, 5, whole=whole)


@pytest.mark.skipif(os.name == "nt", reason="signals")
class TestLaunching:
    def test_launch_prepares_trains_and_resumes(self, brief, tmp_path):
        flags = as_arguments(vary(brief, {"max_steps": 6}))
        done = forked.run("speedrun.launch", ["--out", str(tmp_path), *flags])
        assert done.returncode == 0, done.stderr
        assert "nothing to download" in done.stdout and str(tmp_path) in done.stdout
        again = forked.run("speedrun.launch", ["--resume", str(tmp_path)])
        assert again.returncode == 0 and "finished at step 12" in again.stdout, (
            again.stderr + again.stdout
        )
        train(brief, tmp_path / "whole", echo=None)
        assert curve(tmp_path)[-1] == pytest.approx(curve(tmp_path / "whole")[-1], abs=1e-5)
