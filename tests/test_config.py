"""Runs as values, what is no run, and every command's --help."""

import dataclasses
import json
import math
import subprocess
import sys
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import torch
from annotated_types import Interval
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun.command import TrainCommand
from speedrun.config import Config, check_config, config_from_json, fields_of, vary
from speedrun.cpu_size import at_cpu_size
from speedrun.data.loader import DataConfig, check_options
from speedrun.lab.bounds import check_ranges
from speedrun.lab.errors import UserError
from speedrun.launch import LaunchCommand
from speedrun.model.gpt import GPT, param_specs
from speedrun.presets import as_arguments, known_presets, preset, read_command
from speedrun.schedule import StepSettings
from speedrun.train import build_optimizer, main

NAMES = [*known_presets()]


def kinds_of(group: type, prefix: str = "") -> dict:
    """Every field's type with its bounds, by dotted name."""
    found = {}
    for name, kind in get_type_hints(group, include_extras=True).items():
        nested = dataclasses.is_dataclass(kind)
        found |= kinds_of(kind, f"{prefix}{name}.") if nested else {prefix + name: kind}
    return found


KINDS = kinds_of(Config)
NUMBERS = [name for name, value in fields_of(Config()).items() if type(value) in (int, float)]
LISTS = [name for name, kind in KINDS.items() if ... in get_args(kind)]
TABLES = [name for name in LISTS if dataclasses.is_dataclass(get_args(KINDS[name])[0])]
LISTS = [name for name in LISTS if name not in TABLES]
TUPLES = [n for n, v in fields_of(Config()).items() if type(v) is tuple]
TUPLES = [name for name in TUPLES if name not in (*TABLES, *LISTS)]
ROWS = {
    f"{table}.0.{name}": kind
    for table in TABLES
    for name, kind in kinds_of(get_args(KINDS[table])[0]).items()
}


def numbers_in(kind) -> list:
    """The kinds of single numbers in a field's, tuples in tuples included."""
    if get_origin(kind) is not tuple:
        return [kind]
    return [inner for one in get_args(kind) if one is not ... for inner in numbers_in(one)]


def put(config, name: str, value):
    """A config with one field set, whatever the value is: `vary` would refuse."""
    group, _, rest = name.partition(".")
    value = put(getattr(config, group), rest, value) if rest else value
    return dataclasses.replace(config, **{group: value})


@pytest.mark.parametrize("name", NAMES)
class TestPresets:
    def test_they_are_sound_on_one_to_eight_ranks(self, name):
        run = preset(name)
        assert run.preset == name
        for world in (1, 2, 4, 8):
            if run.data.micro_batches % world == 0:
                assert check_config(run, world) is run
            else:
                with pytest.raises(UserError, match="micro_batches"):
                    check_config(run, world)

    def test_json_and_arguments_lead_back(self, name):
        run = vary(
            preset(name), {"seed": 3, "optim.adam.lr": 0.125, "compile": False, "data.path": "a b"}
        )
        assert config_from_json(json.loads(json.dumps(dataclasses.asdict(run)))) == run
        assert read_command(TrainCommand, as_arguments(run), "cpu", "x").config == run

    def test_cpu_size_keeps_the_decisions(self, name):
        run, small = preset(name), at_cpu_size(preset(name))
        sizes = {"muon.param_dtype": "float32", "muon.ns_dtype": "bfloat16"}
        assert small.optim == vary(run.optim, sizes)
        ramps = {
            name: getattr(run.schedule, name)
            for name in ("warmup_steps", "momentum_ramp", "extension_steps")
        }
        stages, shown = run.schedule.stages, small.schedule.stages
        if (
            len(stages) > 5
        ):  # as many as twenty steps have room for, the first and the last among them
            assert len(shown) == 5 and {stage.windows for stage in shown} < {
                stage.windows for stage in stages
            }
            ends = [(table[0].windows, table[-1].windows) for table in (shown, stages)]
            assert ends[0] == ends[1]
            ramps["stages"] = stages
        else:  # all are kept; a softmax over some of the words runs over some of 256
            assert [s.candidates > 0 for s in shown] == [s.candidates > 0 for s in stages]
            assert all(s.candidates < 256 for s in shown)
            ramps["stages"] = tuple(
                dataclasses.replace(s, candidates=of.candidates) for s, of in zip(shown, stages)
            )
        assert vary(small.schedule, ramps) == run.schedule
        assert small.model.block == run.model.block and small.model.layout == vary(
            run.model.layout, {"stream_dtype": "float32"}
        )
        assert small.model.model_dim == preset("cpu_gpt2").model.model_dim
        assert small.data.path == "data/embedded"

    def test_it_says_all_that_it_turns_on(self, name):
        """What a run is, is what its rows say, from GPT-2 on."""
        rows, parent = [], name
        while parent:
            parent, changes = known_presets()[parent]
            rows.append(changes)
        told = {field: value for row in reversed(rows) for field, value in row.items()}
        assert fields_of(preset(name)) == fields_of(Config()) | told | {"preset": name}


class TestVarying:
    @given(st.sampled_from(sorted(fields_of(Config()))))
    def test_every_field_can_be_set_to_what_it_is(self, name):
        assert vary(Config(), {name: fields_of(Config())[name]}) == Config()

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"model.layer": 3}, "did you mean model.num_layers"),
            ({"steps": "many"}, "must be of type int"),
            ({"compile": 1}, "must be of type bool"),
            ({"steps": True}, "must be of type int"),
            ({"precision": "bf16"}, "must be float32 or bfloat16"),
            ({"optim.adam.betas": (0.9,)}, "must be 2 values"),
            ({"seed": -1}, "must be at least 0"),
            ({"optim": 3}, "no field"),
        ],
    )
    def test_nonsense_is_refused(self, changes, words):
        with pytest.raises(UserError) as caught:
            vary(Config(), changes)
        assert words in str(caught.value)

    def test_an_int_may_stand_for_a_float(self):
        assert vary(Config(), {"optim.adam.lr": 1}).optim.adam.lr == 1


def test_the_model_of_records_17_to_29_is_as_large_as_upstreams():
    """Record 24's log prints a number; it has pairs of mixing weights where no table is mixed in, and unused ones for a layer."""
    for name in ("record17", "record20", "record29"):
        specs = param_specs(preset(name).model, 50_257)
        assert 0 <= 275_742_784 - sum(math.prod(spec.shape) for spec in specs) < 32


class TestBounds:
    """Every number of a run lies between bounds, which stand on its field."""

    def test_every_number_has_two(self):
        assert len(NUMBERS) > 40 and TUPLES == ["optim.adam.betas", "schedule.momentum_ramp", "schedule.val_windows"]  # fmt: skip
        assert TABLES == ["schedule.stages"] and len(ROWS) == 8
        assert LISTS == ["model.attention.long_layers"]
        kinds = {name: KINDS[name] for name in (*NUMBERS, *TUPLES, *LISTS)} | ROWS
        for name, whole in kinds.items():
            for kind in numbers_in(whole):
                assert get_origin(kind) is Annotated, name
                (bound,) = (item for item in kind.__metadata__ if isinstance(item, Interval))
                assert (bound.ge is None) != (bound.gt is None), name
                assert (bound.le is None) != (bound.lt is None), name
                limits = (bound.ge, bound.gt, bound.le, bound.lt)
                assert all(math.isfinite(limit) for limit in limits if limit is not None), name

    @pytest.mark.parametrize("name", NAMES)
    def test_every_preset_is_inside(self, name):
        check_ranges(preset(name))

    @pytest.mark.parametrize("name", LISTS)
    def test_each_number_of_a_list_is_inside(self, name):
        for value in (-1, 10**30, True, None, "1", math.nan, (), 1.5):
            with pytest.raises(UserError, match=f"^{name}=.* must be"):
                check_config(put(Config(), name, (0, value)))
        assert check_config(vary(Config(), {name: (0, 3)}))

    @pytest.mark.parametrize("name", [*NUMBERS, *TUPLES])
    def test_outside_is_refused_and_the_advice_is_accepted(self, name):
        usual, bad = fields_of(Config())[name], [-1, 10**30, -(10**30), True, None, "1", [1]]
        bad += [math.nan, math.inf, -math.inf, 1e30, 10**400] + [1.0] * isinstance(usual, int)
        for value in bad:
            value = (usual[0], value) if name in TUPLES else value
            with pytest.raises(UserError) as caught:
                check_config(put(Config(), name, value))
            assert caught.value.what.startswith(f"{name}=") and "must be" in caught.value.what
        flags = caught.value.fix.split(",")[0].split()
        advised = read_command(TrainCommand, flags, "record1", "x").config
        check_config(advised)
        assert f"--{name.replace('_', '-')}" == flags[0]
        assert fields_of(advised)[name] == fields_of(Config())[name]

    @pytest.mark.parametrize("name", ROWS)
    def test_rows_of_a_table_are_inside_too(self, name):
        table, _, field = name.rpartition(".0.")
        (usual,) = fields_of(Config())[table]
        for value in (-1, 10**30, True, None, "1", math.nan, math.inf, (), (math.nan, math.nan)):
            row = dataclasses.replace(usual, **{field: value})
            with pytest.raises(UserError, match=f"^{name}=.* must be") as caught:
                check_config(put(Config(), table, (row,)))
            assert caught.value.fix.startswith(f"{name}={getattr(usual, field)!r}, say")

    def test_a_table_that_is_no_table_is_a_usage_error(self, capsys):
        for text in ("3", "[3]", "[{", '[{"duration": 2}]', '[{"hours": 1}]', '{"duration": 1}'):
            with pytest.raises(SystemExit) as caught:
                read_command(TrainCommand, ["--schedule.stages", text], "cpu", "x")
            assert caught.value.code == 2 and "--schedule.stages" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "name, value, words",
        [
            ("optim.grad_clip", -1.0, "0 switches clipping off"),
            ("optim.adam.lr", 0.0, "at least 1e-20"),
            ("optim.adam.lr", 1e-320, "at least 1e-20"),
            ("optim.adam.betas", (0.9, 1.0), "less than 1"),
            ("schedule.final_lr_frac", 1.01, "at most 1"),
            ("schedule.cooldown_frac", 0.0, "more than 0"),
            ("model.num_layers", 0, "at least 1"),
            ("model.model_dim", 8, "at least 12"),  # gates read twelve numbers
            ("seed", 2**63, "at most"),
            ("optim.adam.betas", (0.9, 0.95, 0.99), "2 values"),
            ("precision", "bf16", "float32 or bfloat16"),
        ],
    )
    def test_what_it_must_be_is_said(self, name, value, words):
        with pytest.raises(UserError, match=words):
            check_config(put(Config(), name, value))

    def test_ends_that_mean_something_are_inside(self):
        ends = {
            "optim.grad_clip": 0.0,
            "optim.matrix_lr": 0.0,
            "optim.muon.ns_steps": 0,
            "max_steps": 0,
        }
        ends |= {"schedule.cooldown_frac": 1.0, "schedule.final_lr_frac": 1.0, "seed": 2**63 - 1}
        ends |= {
            "optim.adam.weight_decay": 0.0,
            "optim.adam.betas": (0.0, 0.0),
            "checkpoint_every": 0,
        }
        check_ranges(vary(Config(), ends))

    @pytest.mark.parametrize("name", ["seq_len", "batch_tokens", "micro_batches", "max_doc_tokens"])
    def test_the_loader_checks_its_own(self, name):
        with pytest.raises(UserError, match=f"data.{name}=0 is not allowed"):
            check_options(dataclasses.replace(DataConfig(), **{name: 0}))


SMALL = {"model.num_layers": (1, 5), "model.num_heads": (1, 4), "model.model_dim": (1, 40)}
SMALL |= {"model.max_seq_len": (1, 16), "data.seq_len": (1, 16), "data.batch_tokens": (1, 64)}
SMALL |= {"data.micro_batches": (1, 4), "val_tokens": (1, 64), "model.head.pad_vocab_to": (1, 300)}
SMALL |= {"optim.muon.ns_steps": (0, 7)}
FIXED = {"preset", "device", "backend", "compile", "wandb", "data.path"}
DRAWS = {
    name: st.integers(*SMALL[name]) if name in SMALL else st.from_type(kind)
    for name, kind in KINDS.items()
    if name not in FIXED
}
TINY = {"model.num_layers": 2, "model.num_heads": 2, "model.model_dim": 16, "model.max_seq_len": 8}
TINY |= {"data.seq_len": 8, "data.batch_tokens": 16, "data.micro_batches": 2, "val_tokens": 64}


def one_step(run: Config, vocab: int = 31) -> None:
    """Build a run's model and optimizer, and take a step with them."""
    model = GPT(run.model, vocab)
    optimizer = build_optimizer(run, model)
    tokens = torch.arange(run.data.seq_len + 1)[None] % vocab
    with torch.autocast("cpu", torch.bfloat16, enabled=run.precision == "bfloat16"):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step(StepSettings(0, lr=1e-3, matrix_lr=1e-3, momentum=0.9))


def test_what_is_accepted_can_be_built_and_takes_a_step():
    counts = {"accepted": 0, "refused": 0}
    start = vary(preset("smoke"), TINY)

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def try_one(data):
        names = data.draw(st.lists(st.sampled_from(sorted(DRAWS)), max_size=12, unique=True))
        changes = {name: data.draw(DRAWS[name], label=name) for name in names}
        try:
            run = check_config(vary(start, changes))
        except UserError:
            counts["refused"] += 1
            return
        one_step(run)
        counts["accepted"] += 1

    try_one()
    assert counts["accepted"] > 100, counts


@pytest.mark.parametrize(
    "changes",
    [
        {"model.model_dim": 12, "model.embedding.smear": True},
        {"model.model_dim": 12, "model.layout.skips": "single_gated"},
        {
            "model.model_dim": 12,
            "model.embedding.values": "outer",
            "model.embedding.value_residual": "gate",
        },
        {"seed": 2**63 - 1},
    ],
)
def test_the_smallest_and_the_largest_take_a_step(changes):
    one_step(check_config(vary(preset("smoke"), TINY | changes)))


SAVED = json.loads(json.dumps(dataclasses.asdict(preset("smoke"))))
PATHS = [tuple(name.split(".")) for name in fields_of(Config())]
PATHS += [(item.name,) for item in dataclasses.fields(Config) if item.name in SAVED]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from([10**30, -(10**30), 1e-320, "gpt", "muon", "cpu", "x\x1b[2J", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


class TestSavedRuns:
    @settings(max_examples=400, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.tuples(st.sampled_from(PATHS), JSON), min_size=1, max_size=3))
    def test_whatever_stands_there_is_a_sound_run_or_a_problem(self, changes):
        saved = json.loads(json.dumps(SAVED))
        for (*groups, last), value in changes:
            at = saved
            for group in groups:
                at = at[group] if isinstance(at.get(group), dict) else {}
            at[last] = value
        try:
            run = check_config(config_from_json(saved))
        except UserError as problem:
            problem.what.encode()  # half a character could not be printed
            assert "\x1b" not in str(problem)
        else:
            check_ranges(run)

    @given(JSON)
    @settings(max_examples=100, derandomize=True, database=None)
    def test_anything_else_is_a_problem(self, value):
        with pytest.raises(UserError):
            config_from_json(value)

    @pytest.mark.parametrize("value", [7, [1], None, "x", {}, {"model": 7}, {"\ud800": 1}, {1: 2}])
    def test_so_is_this(self, value):
        with pytest.raises(UserError) as caught:
            config_from_json(value)
        caught.value.what.encode()

    def test_and_what_is_deep(self):
        deep: list = []
        for _ in range(100_000):
            deep = [deep]
        for value in (deep, SAVED | {"steps": deep}, SAVED | {"model": deep}):
            with pytest.raises(UserError):
                config_from_json(value)

    @pytest.mark.parametrize(
        "changes, words",
        [
            ({"steps": math.nan}, "steps=nan .* of type int"),
            ({"target": math.nan}, "target=nan"),
            ({"seed": 10**30}, "seed=1000"),
            ({"seed": 1.0}, "seed=1.0 .* of type int"),
            ({"compile": 1}, "compile=1 .* of type bool"),
            ({"optim": "x"}, "saved optim is no group of fields: 'x'"),
            ({"optim": {"adam": {"betas": [math.nan, 2]}}}, r"optim.adam.betas=\(nan, 2\)"),
        ],
    )
    def test_the_field_and_its_value_are_named(self, changes, words):
        with pytest.raises(UserError, match=words) as caught:
            config_from_json(SAVED | changes)
        assert "--" not in caught.value.fix, "no flag can mend what is saved"


class TestStopping:
    def test_the_last_step(self):
        run = vary(preset("cpu_gpt2"), {"steps": 50})
        stops = [vary(run, {"max_steps": most}).last_step for most in (0, 1, 49, 50, 51, 10**9)]
        assert stops == [50, 1, 49, 50, 50, 50]

    @pytest.mark.parametrize("name", NAMES)
    def test_what_takes_hours_is_saved_now_and_then(self, name):
        run = preset(name)
        long = run.steps * run.data.batch_tokens > 5 * 10**8
        assert (0 < run.checkpoint_every <= 1000) if long else run.checkpoint_every == 0


class TestCommands:
    @pytest.mark.parametrize("module", ["train", "launch", "sample", "data"])
    def test_help_explains_itself(self, module):
        done = subprocess.run(
            [sys.executable, "-m", f"speedrun.{module}", "--help"], capture_output=True, text=True
        )
        assert done.returncode == 0 and "usage: python -m speedrun" in done.stdout
        if module in ("train", "launch"):
            for name, field in fields_of(Config()).items():
                assert f"--{name.replace('_', '-')}" in done.stdout or isinstance(field, bool), name
            assert "Longest row of tokens" in done.stdout and "Peak learning rate" in done.stdout

    def test_a_misspelt_flag_is_named(self, capsys):
        with pytest.raises(SystemExit) as caught:
            main(["--model.layer", "3"])
        said = capsys.readouterr()
        assert caught.value.code == 2 and "--model.num-layers" in said.err + said.out

    @pytest.mark.parametrize(
        "flags, both",
        [
            (["--compile=False"], "--compile or --no-compile"),
            (["--compile", "False"], "--compile or --no-compile"),
            (["--steps", "3", "--compile", "true"], "--compile or --no-compile"),
            (["--no-compile=1"], "--compile or --no-compile"),
            (["--model.block.qk_norm=True"], "--model.block.qk-norm or --model.block.no-qk-norm"),
            (["--yes", "true"], "--yes or --no-yes"),
        ],
    )
    def test_a_switch_with_a_value_is_told_how(self, flags, both):
        with pytest.raises(UserError) as caught:
            read_command(lambda run: LaunchCommand(TrainCommand(run)), flags, "cpu", "x")
        assert both in caught.value.fix and "takes no value" in caught.value.what

    def test_a_word_that_looks_like_one_is_no_switch(self):
        flags = ["--wandb", "true", "--data.path=False", "--compile"]
        run = read_command(TrainCommand, flags, "cpu", "x").config
        assert (run.wandb, run.data.path, run.compile) == ("true", "False", True)

    @pytest.mark.parametrize("flags", [["--seed", "1e30"], ["--steps", "9" * 5000], ["--bogus"]])
    def test_what_is_no_number_or_no_flag_has_its_way_out(self, flags, capsys):
        with pytest.raises(SystemExit) as caught:
            read_command(TrainCommand, flags, "cpu", "python -m speedrun.train")
        said = capsys.readouterr()
        assert caught.value.code == 2 and "--help" in said.out + said.err

    @pytest.mark.parametrize("flags", [["--optim.grad-clip", "-1"], ["--optim.adam.eps", "nan"]])
    def test_numbers_out_of_bounds_are_problems(self, flags, tmp_path, capsys):
        assert main(["--preset", "smoke", *flags, "--out", str(tmp_path / "run")]) == 1
        said = capsys.readouterr().err
        assert "is not allowed: it must be at least" in said
        assert f"{flags[0]} " in said and "Traceback" not in said

    def test_a_misspelt_preset_is_a_problem(self, capsys):
        assert main(["--preset", "smol"]) == 1
        said = capsys.readouterr().err
        assert "there is no preset “smol”" in said and "did you mean" in said
