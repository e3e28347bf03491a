"""Runs as values, and every command's --help."""

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedrun.config import (
    HISTORY,
    PRESETS,
    Config,
    as_arguments,
    at_cpu_size,
    check_config,
    config_from_json,
    fields_of,
    preset,
    read_command,
    vary,
)
from speedrun.lab.errors import Problem
from speedrun.train import TrainCommand

NAMES = [*PRESETS, *HISTORY]


@pytest.mark.parametrize("name", NAMES)
class TestPresets:
    def test_they_are_sound_on_one_to_eight_ranks(self, name):
        run = preset(name)
        assert run.preset == name
        for world in (1, 2, 4, 8):
            if run.data.grad_shards % world == 0:
                assert check_config(run, world) is run
            else:
                with pytest.raises(Problem, match="grad_shards"):
                    check_config(run, world)

    def test_json_and_arguments_lead_back(self, name):
        run = vary(
            preset(name), {"seed": 3, "optim.lr": 0.125, "compile": False, "data.path": "a b"}
        )
        assert config_from_json(json.loads(json.dumps(dataclasses.asdict(run)))) == run
        assert read_command(TrainCommand, as_arguments(run), "cpu", "x").config == run

    def test_cpu_size_keeps_the_decisions(self, name):
        run, small = preset(name), at_cpu_size(preset(name))
        assert small.architecture == run.architecture
        assert vary(small.optim, {"warmup_steps": run.optim.warmup_steps}) == run.optim
        assert (
            small.model.width == PRESETS["cpu"].model.width and small.data.path == "data/embedded"
        )


class TestVarying:
    @given(st.sampled_from(sorted(fields_of(Config()))))
    def test_every_field_can_be_set_to_what_it_is(self, name):
        assert vary(Config(), {name: fields_of(Config())[name]}) == Config()

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"model.layer": 3}, "did you mean model.layers"),
            ({"steps": "many"}, "wrong type, str"),
            ({"compile": 1}, "wrong type, int"),
            ({"steps": True}, "wrong type, bool"),
            ({"optim": 3}, "no field"),
        ],
    )
    def test_nonsense_is_refused(self, changes, words):
        with pytest.raises(Problem) as caught:
            vary(Config(), changes)
        assert words in str(caught.value)

    def test_an_int_may_stand_for_a_float(self):
        assert vary(Config(), {"optim.lr": 1}).optim.lr == 1


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

    def test_a_misspelt_flag_is_named(self):
        command = [sys.executable, "-m", "speedrun.train", "--model.layer", "3"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and "--model.layers" in done.stderr + done.stdout

    def test_a_misspelt_preset_is_a_problem(self):
        command = [sys.executable, "-m", "speedrun.train", "--preset", "smol"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (
            done.returncode == 1
            and "there is no preset “smol”" in done.stderr
            and "did you mean" in done.stderr
        )
