"""Schedules: the trainer's rate against formulas spelled out, and random lists of stages."""

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from speedrun.config import ABSENT, PRESETS, check_config, preset, vary
from speedrun.lab.errors import Problem
from speedrun.lab.runlog import read_metrics, series
from speedrun.optim.adamw import AdamWOptions
from speedrun.optim.schedule import (
    Schedule,
    ScheduleOptions,
    Stage,
    borders,
    learning_rate,
    loss_weights_at,
    momentum_at,
    rate_at,
    schedule_table,
    settings_at,
    stage_at,
    tokens_before,
    turning_points,
)
from speedrun.train import train

COSINE = ScheduleOptions()
PEAKS = st.builds(
    AdamWOptions,
    lr=st.floats(1e-5, 1.0),
    warmup_steps=st.integers(0, 50),
    final_lr=st.floats(0.0, 1.0),
)
FALLS = st.floats(0.01, 1.0)


def rates(steps: int, optim: AdamWOptions, schedule: ScheduleOptions) -> list[float]:
    return [learning_rate(step, steps, optim, schedule) for step in range(steps)]


def llm_c(step: int, steps: int, o: AdamWOptions) -> float:
    """What the trainer did before it had a choice, expression for expression."""
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    progress = (step - o.warmup_steps) / max(1, steps - o.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return o.lr * (o.final_lr + (1 - o.final_lr) * cosine)


class TestLearningRate:
    @given(st.integers(1, 300), PEAKS)
    def test_the_cosine_is_llm_cs_to_the_last_bit(self, steps, optim):
        assert rates(steps, optim, COSINE) == [llm_c(n, steps, optim) for n in range(steps)]

    @given(st.integers(1, 300), PEAKS, FALLS)
    def test_the_trapezoid_climbs_stays_and_falls(self, steps, optim, share):
        schedule = ScheduleOptions("trapezoid", share)
        found, climb = rates(steps, optim, schedule), min(optim.warmup_steps, steps)
        begin = max(climb, steps - round(share * steps))
        assert found[:climb] == sorted(found[:climb])
        assert found[climb:begin] == [optim.lr] * (begin - climb)
        falls = found[begin:]
        assert all(a >= b * (1 - 1e-12) for a, b in zip(falls, falls[1:])), "but for rounding"
        least = optim.lr * optim.final_lr
        assert all(least * (1 - 1e-12) <= rate <= optim.lr * (1 + 1e-12) for rate in found[begin:])

    @given(st.integers(2, 300), PEAKS, FALLS)
    def test_the_fall_is_a_line_to_the_end(self, steps, optim, share):
        schedule = ScheduleOptions("trapezoid", share)
        begin = max(optim.warmup_steps, steps - round(share * steps))
        assume(begin < steps)
        down = [learning_rate(step, steps, optim, schedule) for step in range(begin, steps + 3)]
        slope = optim.lr * (1 - optim.final_lr) / (steps - begin)
        for n, rate in enumerate(down):
            wanted = optim.lr - slope * min(n, steps - begin)
            assert rate == pytest.approx(wanted, abs=1e-12)

    @pytest.mark.parametrize("shape", ["cosine", "trapezoid"])
    def test_a_run_shorter_than_its_warm_up_still_moves(self, shape):
        optim = AdamWOptions(warmup_steps=700)
        assert all(0 < rate < optim.lr for rate in rates(5, optim, ScheduleOptions(shape)))
        assert learning_rate(5, 5, optim, ScheduleOptions(shape)) > 0

    def test_a_longer_run_begins_alike_under_the_trapezoid_only(self):
        optim, held = AdamWOptions(warmup_steps=10), ScheduleOptions("trapezoid", 0.5)
        assert rates(100, optim, held)[:51] == rates(300, optim, held)[:51]
        assert rates(100, optim, COSINE)[12:] != rates(300, optim, COSINE)[12:100]


class TestInARun:
    def test_which_presets_have_changed(self):
        assert preset("small").schedule == ScheduleOptions("trapezoid")  # with chapter 13's Muon
        for name in set(PRESETS) - {"small"}:
            assert preset(name).schedule == ABSENT["schedule"] == COSINE

    @pytest.mark.parametrize("share", [0.0, -0.5, 1.5, math.nan, math.inf])
    def test_nonsense_is_refused(self, share):
        with pytest.raises(Problem, match="schedule.cooldown=.* must be"):
            check_config(vary(preset("cpu"), {"schedule.cooldown": share}))

    @pytest.mark.parametrize("share", [1e-9, 0.6, 1.0])
    def test_any_share_is_accepted(self, share):
        check_config(vary(preset("cpu"), {"schedule.cooldown": share}))

    def test_the_trainer_follows_it(self, brief, tmp_path):
        changes = {"schedule.shape": "trapezoid", "schedule.cooldown": 0.5, "log_every": 1}
        run = vary(brief, changes)
        train(run, tmp_path, echo=None)
        logged = [row["lr"] for row in series(read_metrics(tmp_path / "metrics.jsonl"), "step")]
        assert logged == rates(run.steps, run.optim, run.schedule)
        assert logged.count(run.optim.lr) > 3


@st.composite
def schedules(draw) -> Schedule:
    """Sound schedules of one to five stages and an extension, which may be empty."""
    parts = draw(st.lists(st.integers(1, 100), min_size=1, max_size=5))
    floor = draw(st.floats(0, 0.3))
    least, stages = math.ceil(1.001 * sum(parts) / min(parts)), []
    for share in [part / sum(parts) for part in parts] + [0]:
        weights = st.tuples(*[st.floats(0, 1)] * draw(st.integers(1, 3)))
        stages.append(
            Stage(
                share,
                batch_tokens=draw(st.integers(1, 10**6)),
                rate=draw(st.floats(floor, 3)),
                cap_tokens=draw(st.integers(1, 4096)),
                windows=(draw(st.integers(1, 20)), draw(st.integers(1, 20))),
                ahead=(draw(weights), draw(weights)),
                prefix=(draw(st.floats(0, 1)), draw(st.floats(0, 1))),
            )
        )
    return Schedule(
        tuple(stages),
        scheduled=least + draw(st.integers(0, 400)),
        extension=draw(st.integers(0, 40)),
        cooldown=draw(FALLS),
        floor=floor,
        momentum=tuple(sorted(draw(st.tuples(st.floats(0, 0.99), st.floats(0, 0.99))))),
        momentum_steps=(draw(st.integers(0, 100)), draw(st.integers(0, 100))),
    )


def every_step(schedule: Schedule) -> range:
    return range(schedule.scheduled + schedule.extension)


class TestStages:
    @given(schedules())
    def test_they_share_out_the_steps(self, schedule):
        edges, steps = borders(schedule), every_step(schedule)
        assert edges[0] == 0 and edges[-2:] == (schedule.scheduled, len(steps))
        assert list(edges) == sorted(edges)
        found = [stage_at(schedule, step)[0] for step in steps]
        counts = [after - before for before, after in zip(edges, edges[1:])]
        spelled = [s for s, count in zip(schedule.stages, counts) for _ in range(count)]
        assert all(a is b for a, b in zip(found, spelled)) and len(found) == len(spelled)
        for stage, count in zip(schedule.stages[:-1], counts):
            assert abs(count - stage.share * schedule.scheduled) <= 1 + 1e-6

    @given(schedules())
    def test_tokens_add_up(self, schedule):
        total = 0
        for step in every_step(schedule):
            assert tokens_before(schedule, step) == total
            total += settings_at(schedule, step).batch_tokens
        assert tokens_before(schedule, len(every_step(schedule))) == total

    @given(schedules())
    def test_nothing_jumps_but_at_a_border(self, schedule):
        edges, steps = set(borders(schedule)), every_step(schedule)
        fall = max(1, round(schedule.cooldown * schedule.scheduled))
        rising, falling = schedule.momentum_steps
        span = schedule.momentum[1] - schedule.momentum[0]
        for before, after in zip(steps, steps[1:]):
            change = abs(momentum_at(schedule, after) - momentum_at(schedule, before))
            slopes = [span / n for n in (rising, falling) if n]
            assert change <= max(slopes, default=0) * 1.0001 + 1e-12
            if after in edges:
                continue
            peak = stage_at(schedule, after)[0].rate
            change = abs(rate_at(schedule, after) - rate_at(schedule, before))
            assert change <= abs(peak - schedule.floor) / fall + 1e-12
            lengths = [
                settings_at(schedule, n)._replace(rate=0, momentum=0) for n in (before, after)
            ]
            assert lengths[0][:5] == lengths[1][:5]

    @given(schedules())
    def test_loss_weights_run_from_end_to_end(self, schedule):
        for stage, begin, end in zip(schedule.stages, borders(schedule), borders(schedule)[1:]):
            if begin == end:
                continue
            assert loss_weights_at(schedule, begin) == (stage.ahead[0], stage.prefix[0])
            ahead, prefix = loss_weights_at(schedule, end - 1)
            t = (end - 1 - begin) / (end - begin)
            assert prefix == pytest.approx(
                stage.prefix[0] + t * (stage.prefix[1] - stage.prefix[0])
            )
            assert len(ahead) == len(stage.ahead[0])
            lowest = min(stage.prefix) - 1e-12
            assert all(
                lowest <= loss_weights_at(schedule, n)[1] <= max(stage.prefix) + 1e-12
                for n in range(begin, end)
            )

    @given(schedules())
    def test_rate_and_momentum_stay_in_bounds_and_the_extension_is_at_the_floor(self, schedule):
        low, high = schedule.momentum
        for step in every_step(schedule):
            stage, t = stage_at(schedule, step)
            bounds = sorted((stage.rate, schedule.floor))
            assert bounds[0] - 1e-12 <= rate_at(schedule, step) <= bounds[1] + 1e-12
            assert low <= momentum_at(schedule, step) <= high + 1e-12 and 0 <= t < 1
            if step >= schedule.scheduled:
                assert rate_at(schedule, step) == schedule.floor

    @given(schedules())
    def test_the_table_has_a_line_for_every_turning_point(self, schedule):
        points = turning_points(schedule)
        assert points[0] == 0 and points[-1] == len(every_step(schedule)) - 1
        lines = schedule_table(schedule)
        assert [int(line.split()[0]) for line in lines[1:]] == points

    @given(schedules())
    def test_steps_outside_are_refused(self, schedule):
        for step in (-1, len(every_step(schedule))):
            with pytest.raises(ValueError, match="is none of the"):
                settings_at(schedule, step)


FIRST = Stage(1.0, 1024, 1.0, 128, (1, 1))
SOUND = Schedule((FIRST, replace(FIRST, share=0)), scheduled=10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stages": ()}, "two stages or more"),
        ({"stages": (FIRST,)}, "0 for the last stage"),
        ({"stages": (FIRST, FIRST)}, "0 for the last stage"),
        ({"stages": (replace(FIRST, share=0.5), SOUND.stages[1])}, "add up to 1"),
        (
            {"stages": (replace(FIRST, share=2.0), replace(FIRST, share=-1.0), SOUND.stages[1])},
            "shares above 0",
        ),
        ({"stages": (replace(FIRST, share=math.nan), SOUND.stages[1])}, "add up to 1"),
        ({"stages": (replace(FIRST, batch_tokens=0), SOUND.stages[1])}, "batches"),
        ({"stages": (replace(FIRST, windows=(0, 3)), SOUND.stages[1])}, "windows"),
        ({"stages": (replace(FIRST, rate=-1.0), SOUND.stages[1])}, "0 ≤ floor ≤ every rate"),
        ({"stages": (replace(FIRST, prefix=(-1.0, 0.0)), SOUND.stages[1])}, "weights of 0 or more"),
        ({"stages": (replace(FIRST, ahead=((1.0,), ())), SOUND.stages[1])}, "equally many"),
        ({"scheduled": 0}, "a step or more"),
        ({"extension": -1}, "a step or more"),
        ({"cooldown": 0.0}, "cooldown"),
        ({"cooldown": math.nan}, "cooldown"),
        ({"floor": -0.1}, "floor"),
        ({"momentum": (0.95, 0.85)}, "momentum"),
        ({"momentum": (0.85, 1.0)}, "momentum"),
        ({"momentum_steps": (-1, 0)}, "momentum_steps"),
    ],
)
def test_a_schedule_that_makes_no_sense_says_why(change, words):
    with pytest.raises(ValueError, match=words):
        replace(SOUND, **change)


def test_a_border_between_equal_stages_is_invisible():
    half = replace(FIRST, share=0.5)
    cut = replace(SOUND, stages=(half, half, SOUND.stages[1]))
    for step in range(10):
        assert settings_at(cut, step) == settings_at(SOUND, step)
