"""Schedules: the trainer's rate against formulas spelled out, and random lists of stages."""

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from speedrun.config import check_config, vary
from speedrun.lab.errors import Problem
from speedrun.lab.runlog import read_metrics, series
from speedrun.optim.schedule import (
    Schedule,
    ScheduleConfig,
    Stage,
    borders,
    learning_rate,
    loss_weights_at,
    momentum_at,
    ramp,
    rate_at,
    schedule_table,
    settings_at,
    stage_at,
    step_settings,
    tokens_before,
    turning_points,
)
from speedrun.presets import PRESETS, known_presets, preset
from speedrun.train import train

COSINE = ScheduleConfig()
PEAKS = st.floats(1e-5, 1.0)
ENDS = st.builds(
    ScheduleConfig,
    warmup_steps=st.integers(0, 50),
    final_lr_frac=st.floats(0.0, 1.0),
    cooldown_frac=st.floats(0.01, 1.0),
)
FALLS = st.floats(0.01, 1.0)


def rates(steps: int, peak: float, schedule: ScheduleConfig) -> list[float]:
    return [learning_rate(step, steps, peak, schedule) for step in range(steps)]


def llm_c(step: int, steps: int, peak: float, s: ScheduleConfig) -> float:
    """What the trainer did before it had a choice, expression for expression."""
    if step < s.warmup_steps:
        return peak * (step + 1) / s.warmup_steps
    progress = (step - s.warmup_steps) / max(1, steps - s.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * (s.final_lr_frac + (1 - s.final_lr_frac) * cosine)


class TestLearningRate:
    @given(st.integers(1, 300), PEAKS, ENDS)
    def test_the_cosine_is_llm_cs_to_the_last_bit(self, steps, peak, ends):
        wanted = [llm_c(n, steps, peak, ends) for n in range(steps)]
        assert rates(steps, peak, ends) == wanted

    @given(st.integers(1, 300), PEAKS, ENDS)
    def test_the_trapezoid_climbs_stays_and_falls(self, steps, peak, ends):
        schedule = replace(ends, shape="trapezoid")
        found, climb = rates(steps, peak, schedule), min(schedule.warmup_steps, steps)
        begin = max(climb, steps - round(schedule.cooldown_frac * steps))
        assert found[:climb] == sorted(found[:climb])
        assert found[climb:begin] == [peak] * (begin - climb)
        falls = found[begin:]
        assert all(a >= b * (1 - 1e-12) for a, b in zip(falls, falls[1:])), "but for rounding"
        least = peak * schedule.final_lr_frac
        assert all(least * (1 - 1e-12) <= rate <= peak * (1 + 1e-12) for rate in found[begin:])

    @given(st.integers(2, 300), PEAKS, ENDS)
    def test_the_fall_is_a_line_to_the_end(self, steps, peak, ends):
        schedule = replace(ends, shape="trapezoid")
        begin = max(schedule.warmup_steps, steps - round(schedule.cooldown_frac * steps))
        assume(begin < steps)
        down = [learning_rate(step, steps, peak, schedule) for step in range(begin, steps + 3)]
        slope = peak * (1 - schedule.final_lr_frac) / (steps - begin)
        for n, rate in enumerate(down):
            wanted = peak - slope * min(n, steps - begin)
            assert rate == pytest.approx(wanted, abs=1e-12)

    @pytest.mark.parametrize("shape", ["cosine", "trapezoid"])
    def test_a_run_shorter_than_its_warm_up_still_moves(self, shape):
        schedule = ScheduleConfig(warmup_steps=700, shape=shape)
        assert all(0 < rate < 6e-4 for rate in rates(5, 6e-4, schedule))
        assert learning_rate(5, 5, 6e-4, schedule) > 0

    def test_a_longer_run_begins_alike_under_the_trapezoid_only(self):
        cosine = ScheduleConfig(warmup_steps=10)
        held = replace(cosine, shape="trapezoid", cooldown_frac=0.5)
        assert rates(100, 6e-4, held)[:51] == rates(300, 6e-4, held)[:51]
        assert rates(100, 6e-4, cosine)[12:] != rates(300, 6e-4, cosine)[12:100]


class TestStepSettings:
    @given(st.integers(1, 200), st.integers(0, 60), st.integers(0, 60), st.floats(0.0, 0.99))
    def test_momentum_takes_a_line_up_and_a_line_down(self, steps, rising, falling, low):
        for step in range(steps):
            found = ramp(step, steps, (low, 0.99), (rising, falling))
            up = low + (0.99 - low) * step / rising if step < rising else 0.99
            down = low + (0.99 - low) * (steps - step) / falling if falling else 0.99
            assert found == pytest.approx(min(up, down, 0.99), abs=1e-12)

    @given(st.integers(1, 200), ENDS, PEAKS, PEAKS, st.sampled_from(["cosine", "trapezoid"]))
    def test_both_rates_are_on_one_schedule(self, steps, ends, peak, matrices, shape):
        schedule = replace(ends, shape=shape)
        for step in range(steps):
            found = step_settings(step, steps, schedule, (peak, matrices), 0.95)
            assert found.step == step and found.momentum == 0.95
            assert found.lr == learning_rate(step, steps, peak, schedule)
            other = learning_rate(step, steps, matrices, schedule)
            assert found.matrix_lr == pytest.approx(other, rel=1e-12)

    @given(st.integers(1, 200), PEAKS)
    def test_one_rate_for_both_is_the_same_number(self, steps, peak):
        for step in range(steps):
            found = step_settings(step, steps, COSINE, (peak, peak), 0.95)
            assert found.lr == found.matrix_lr

    def test_without_a_lowest_momentum_it_stays(self):
        still = ScheduleConfig(momentum_ramp=(10, 5))
        lines = replace(still, momentum_min=0.85)
        moments = [step_settings(n, 40, still, (1.0, 1.0), 0.95).momentum for n in range(40)]
        assert moments == [0.95] * 40
        moments = [step_settings(n, 40, lines, (1.0, 1.0), 0.95).momentum for n in range(40)]
        assert moments[0] == 0.85 and moments[5] == pytest.approx(0.9)
        assert moments[10:36] == [0.95] * 26 and moments[39] == pytest.approx(0.87)

    @given(st.integers(1, 200), st.floats(0.01, 1.0))
    def test_matrices_part_after_their_share_of_the_steps(self, steps, share):
        schedule = ScheduleConfig(untie_at=share)
        found = [step_settings(n, steps, schedule, (1.0, 1.0), 0.9).untie for n in range(steps)]
        tied = min(steps, math.ceil(share * steps))
        assert found == [False] * tied + [True] * (steps - tied)


class TestInARun:
    def test_which_presets_have_changed(self):
        small = ScheduleConfig(warmup_steps=100, shape="trapezoid", momentum_min=0.85)
        assert preset("small").schedule == small  # with chapter 13's Muon
        for name in ("cpu", "smoke"):
            assert preset(name).schedule == ScheduleConfig(warmup_steps=100)
        for name in ("record", "record1"):
            assert preset(name).schedule == COSINE
        assert set(PRESETS) == {"cpu", "smoke", "small", "record"}
        history = set(known_presets()) - set(PRESETS) - {"record1"}
        assert history and {preset(name).schedule.shape for name in history} == {"trapezoid"}

    @pytest.mark.parametrize("share", [0.0, -0.5, 1.5, math.nan, math.inf])
    @pytest.mark.parametrize("name", ["cooldown_frac", "untie_at"])
    def test_nonsense_is_refused(self, name, share):
        with pytest.raises(Problem, match=f"schedule.{name}=.* must be"):
            check_config(vary(preset("cpu"), {f"schedule.{name}": share}))

    @pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
    def test_a_final_rate_that_is_no_share_of_the_peak_is_refused(self, share):
        with pytest.raises(Problem, match="schedule.final_lr_frac=.* must be"):
            check_config(vary(preset("cpu"), {"schedule.final_lr_frac": share}))

    @pytest.mark.parametrize("share", [1e-9, 0.6, 1.0])
    @pytest.mark.parametrize("name", ["cooldown_frac", "untie_at", "final_lr_frac"])
    def test_any_share_is_accepted(self, name, share):
        check_config(vary(preset("cpu"), {f"schedule.{name}": share}))

    def test_the_trainer_follows_it(self, brief, tmp_path):
        changes = {"schedule.shape": "trapezoid", "schedule.cooldown_frac": 0.5, "log_every": 1}
        run = vary(brief, changes)
        train(run, tmp_path, echo=None)
        logged = [row["lr"] for row in series(read_metrics(tmp_path / "metrics.jsonl"), "step")]
        assert logged == rates(run.steps, run.optim.adam.lr, run.schedule)
        assert logged.count(run.optim.adam.lr) > 3


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
