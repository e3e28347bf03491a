"""Schedules: the trainer's rate against formulas spelled out, and random lists of stages."""

import dataclasses
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from resuming import broken_and_resumed

from speedrun.config import check_config, config_from_json, schedule_of, vary
from speedrun.cpu_size import at_cpu_size
from speedrun.kernels.loss import head_loss_op
from speedrun.lab.errors import UserError
from speedrun.lab.metrics import read_metrics, series
from speedrun.measure.schedule import schedule_table, turning_points
from speedrun.presets import PRESETS, known_presets, preset
from speedrun.schedule import Schedule, ScheduleConfig, Stage, check_schedule, ramp
from speedrun.train import build_run, run_loop, train, train_step

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
    return [Schedule(schedule, steps, peak).at(step).lr for step in range(steps)]


def settings(steps: int, schedule: ScheduleConfig, peaks: tuple[float, float], momentum: float):
    return [Schedule(schedule, steps, *peaks, momentum).at(step) for step in range(steps)]


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
        down = rates(steps, peak, schedule)[begin:]
        slope = peak * (1 - schedule.final_lr_frac) / (steps - begin)
        for n, rate in enumerate(down):
            wanted = peak - slope * min(n, steps - begin)
            assert rate == pytest.approx(wanted, abs=1e-12)

    @pytest.mark.parametrize("shape", ["cosine", "trapezoid"])
    def test_a_run_shorter_than_its_warm_up_still_moves(self, shape):
        schedule = ScheduleConfig(warmup_steps=700, shape=shape)
        assert all(0 < rate < 6e-4 for rate in rates(5, 6e-4, schedule))

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
        found = settings(steps, schedule, (peak, matrices), 0.95)
        assert [now.step for now in found] == [*range(steps)]
        assert {now.momentum for now in found} == {0.95}
        assert [now.lr for now in found] == rates(steps, peak, schedule)
        other = rates(steps, matrices, schedule)
        assert [now.matrix_lr for now in found] == pytest.approx(other, rel=1e-12)

    @given(st.integers(1, 200), PEAKS)
    def test_one_rate_for_both_is_the_same_number(self, steps, peak):
        assert all(now.lr == now.matrix_lr for now in settings(steps, COSINE, (peak, peak), 0.95))

    def test_without_a_lowest_momentum_it_stays(self):
        still = ScheduleConfig(momentum_ramp=(10, 5))
        moments = [now.momentum for now in settings(40, still, (1.0, 1.0), 0.95)]
        assert moments == [0.95] * 40
        lines = replace(still, momentum_min=0.85)
        moments = [now.momentum for now in settings(40, lines, (1.0, 1.0), 0.95)]
        assert moments[0] == 0.85 and moments[5] == pytest.approx(0.9)
        assert moments[10:36] == [0.95] * 26 and moments[39] == pytest.approx(0.87)

    @given(st.integers(1, 200), st.floats(0.01, 1.0))
    def test_matrices_part_after_their_share_of_the_steps(self, steps, share):
        found = settings(steps, ScheduleConfig(untie_at=share), (1.0, 1.0), 0.9)
        tied = min(steps, math.ceil(share * steps))
        assert [now.untie for now in found] == [False] * tied + [True] * (steps - tied)

    def test_untying_counts_scheduled_steps(self):
        found = settings(40, ScheduleConfig(untie_at=0.5, extension_steps=10), (1.0, 1.0), 0.9)
        assert [now.untie for now in found].index(True) == 15


class TestInARun:
    def test_which_presets_have_changed(self):
        small = ScheduleConfig(warmup_steps=100, shape="trapezoid", momentum_min=0.85)
        assert preset("small_gpt2").schedule == small  # with chapter 13's Muon
        for name in ("cpu_gpt2", "smoke"):
            assert preset(name).schedule == ScheduleConfig(warmup_steps=100)
        assert preset("record1").schedule == COSINE
        whole, part = preset("record").schedule, preset("record_200m").schedule
        assert whole.stages == part.stages and len(whole.stages) == 4
        assert (whole.extension_steps, part.extension_steps) == (40, 10)
        first, second, third, last = part.stages
        asked = replace(third, duration=0.27, candidates=16_384)
        parts = asked, replace(third, duration=1 / 3 - 0.27)
        former = replace(part, stages=(first, second, *parts, last))
        assert preset("small").schedule == former  # as it was measured
        own = {"cpu", "cpu_gpt2", "smoke", "small", "small_gpt2", "record", "record_200m"}
        assert set(PRESETS) == own
        history = set(known_presets()) - set(PRESETS) - {"record1"}
        assert history and {preset(name).schedule.shape for name in history} == {"trapezoid"}

    @pytest.mark.parametrize("share", [0.0, -0.5, 1.5, math.nan, math.inf])
    @pytest.mark.parametrize("name", ["cooldown_frac", "untie_at"])
    def test_nonsense_is_refused(self, name, share):
        with pytest.raises(UserError, match=f"schedule.{name}=.* must be"):
            check_config(vary(preset("cpu_gpt2"), {f"schedule.{name}": share}))

    @pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
    def test_a_final_rate_that_is_no_share_of_the_peak_is_refused(self, share):
        with pytest.raises(UserError, match="schedule.final_lr_frac=.* must be"):
            check_config(vary(preset("cpu_gpt2"), {"schedule.final_lr_frac": share}))

    @pytest.mark.parametrize("share", [1e-9, 0.6, 1.0])
    @pytest.mark.parametrize("name", ["cooldown_frac", "untie_at", "final_lr_frac"])
    def test_any_share_is_accepted(self, name, share):
        check_config(vary(preset("cpu_gpt2"), {f"schedule.{name}": share}))

    def test_the_trainer_follows_it(self, brief, tmp_path):
        changes = {"schedule.shape": "trapezoid", "schedule.cooldown_frac": 0.5, "log_every": 1}
        run = vary(brief, changes)
        train(run, tmp_path, echo=None)
        logged = [row["lr"] for row in series(read_metrics(tmp_path / "metrics.jsonl"), "step")]
        assert logged == rates(run.steps, run.optim.adam.lr, run.schedule)
        assert logged.count(run.optim.adam.lr) > 3


@st.composite
def schedules(draw) -> Schedule:
    """Sound schedules of one to five stages, with an extension, an empty one, or none."""
    parts = draw(st.lists(st.integers(1, 100), min_size=1, max_size=5))
    floor = draw(st.floats(0, 0.3))
    least, stages = math.ceil(1.001 * sum(parts) / min(parts)), []
    last = draw(st.sampled_from([[], [0]]))
    for duration in [part / sum(parts) for part in parts] + last:
        weights = st.tuples(*[st.floats(0, 1)] * draw(st.integers(1, 3)))
        stages.append(
            Stage(
                duration,
                batch_mul=draw(st.integers(1, 10)),
                lr_mul=draw(st.floats(max(floor, 1e-3), 3)),
                max_doc_tokens=draw(st.integers(0, 4096)),
                candidates=16 * draw(st.integers(0, 2048)),
                windows=(draw(st.integers(0, 2000)), draw(st.integers(0, 2000))),
                mtp_weights=(draw(weights), draw(weights)),
                prefix_weight=(draw(st.floats(0, 1)), draw(st.floats(0, 1))),
            )
        )
    low, high = sorted(draw(st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99))))
    extension = draw(st.integers(0, 40))
    config = ScheduleConfig(
        warmup_steps=draw(st.integers(0, 30)),
        shape=draw(st.sampled_from(["cosine", "trapezoid"])),
        cooldown_frac=draw(FALLS),
        final_lr_frac=floor,
        momentum_min=low,
        momentum_ramp=(draw(st.integers(0, 100)), draw(st.integers(0, 100))),
        extension_steps=extension,
        stages=tuple(stages),
    )
    steps = least + draw(st.integers(0, 400)) + extension
    check_schedule(config, steps)
    batch = draw(st.integers(1, 10**6))
    return Schedule(config, steps, momentum=high, batch_tokens=batch)


def every_step(schedule: Schedule) -> list:
    return [schedule.at(step) for step in range(schedule.steps)]


class TestStages:
    @given(schedules())
    def test_they_share_out_the_steps(self, schedule):
        edges, stages = schedule.boundaries, schedule.config.stages
        assert edges[0] == 0 and edges[-1] == schedule.steps and list(edges) == sorted(edges)
        if stages[-1].duration == 0:
            assert edges[-2] == schedule.scheduled
        found = [schedule.stage(step)[0] for step in range(schedule.steps)]
        counts = [after - before for before, after in zip(edges, edges[1:])]
        spelled = [s for s, count in zip(stages, counts) for _ in range(count)]
        assert all(a is b for a, b in zip(found, spelled)) and len(found) == len(spelled)
        counts[-1] -= schedule.config.extension_steps  # the last stage's, if it has none of its own
        for stage, count in zip(stages, counts):
            assert abs(count - stage.duration * schedule.scheduled) <= 1 + 1e-6
        assert schedule.starts == [e for e, n in zip(edges, edges[1:]) if e < n]

    @given(schedules())
    def test_tokens_add_up(self, schedule):
        total = 0
        for now in every_step(schedule):
            assert schedule.tokens_before(now.step) == total
            total += now.batch_tokens
        assert schedule.tokens_before(schedule.steps) == total

    @given(schedules())
    def test_nothing_jumps_but_at_a_boundary(self, schedule):
        config, steps = schedule.config, every_step(schedule)
        fall = max(1, round(config.cooldown_frac * schedule.scheduled))
        fall = min(fall, max(1, schedule.scheduled - config.warmup_steps))
        span = schedule.momentum - config.momentum_min
        for before, after in zip(steps, steps[1:]):
            change = abs(after.momentum - before.momentum)
            slopes = [span / n for n in config.momentum_ramp if n]
            assert change <= max(slopes, default=0) * 1.0001 + 1e-12
            if after.step in schedule.boundaries:
                continue
            top = schedule.stage(after.step)[0].lr_mul
            if config.shape == "trapezoid" and after.step >= config.warmup_steps + 1:
                bound = abs(top - config.final_lr_frac) / fall
                assert abs(after.lr - before.lr) <= bound + 1e-12
            lengths = [
                (s.batch_tokens, s.max_doc_tokens, s.windows, s.candidates) for s in (before, after)
            ]
            assert lengths[0] == lengths[1]

    @given(schedules())
    def test_a_step_is_told_its_stages_candidates(self, schedule):
        for now in every_step(schedule):
            assert now.candidates == schedule.config.stages[now.stage].candidates

    @given(schedules())
    def test_loss_weights_run_from_end_to_end(self, schedule):
        edges = schedule.boundaries
        for stage, begin, end in zip(schedule.config.stages, edges, edges[1:]):
            if begin == end:
                continue
            first, last = schedule.at(begin), schedule.at(end - 1)
            assert (first.mtp_weights, first.prefix_weight) == (
                stage.mtp_weights[0],
                stage.prefix_weight[0],
            )
            t = (end - 1 - begin) / (end - begin)
            low, high = stage.prefix_weight
            assert last.prefix_weight == pytest.approx(low + t * (high - low))
            wanted = [a + t * (b - a) for a, b in zip(*stage.mtp_weights)]
            assert last.mtp_weights == pytest.approx(wanted)

    @given(schedules())
    def test_rate_and_momentum_stay_in_bounds_and_the_extension_is_at_the_floor(self, schedule):
        config = schedule.config
        for now in every_step(schedule):
            stage, t = schedule.stage(now.step)
            low = 0.0 if now.step < config.warmup_steps else config.final_lr_frac
            assert low - 1e-12 <= now.lr <= max(stage.lr_mul, config.final_lr_frac) + 1e-12
            assert config.momentum_min <= now.momentum <= schedule.momentum + 1e-12 and 0 <= t < 1
            if now.step >= max(schedule.scheduled, config.warmup_steps):
                assert now.lr == pytest.approx(config.final_lr_frac, abs=1e-12)

    @given(schedules())
    def test_the_table_has_a_line_for_every_turning_point(self, schedule):
        points = turning_points(schedule)
        assert points[0] == 0 and points[-1] == schedule.steps - 1
        lines = schedule_table(schedule)
        assert [int(line.split()[0]) for line in lines[1:]] == points

    @given(schedules())
    def test_steps_outside_are_refused(self, schedule):
        for step in (-1, schedule.steps):
            with pytest.raises(ValueError, match="is none of the"):
                schedule.at(step)

    @given(schedules())
    def test_they_survive_json(self, schedule):
        config = vary(preset("cpu_gpt2"), {"schedule.stages": schedule.config.stages})
        saved = json.loads(json.dumps(dataclasses.asdict(config)))
        assert config_from_json(saved) == config


HALVES = (Stage(0.5), Stage(0.5, batch_mul=2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schedule.stages": ()}, "a stage or more"),
        ({"schedule.stages": (Stage(0.5),)}, "add up to 1"),
        ({"schedule.stages": (Stage(), Stage())}, "add up to 1"),
        ({"schedule.stages": (Stage(0.0), Stage())}, "durations above 0, but for the last"),
        ({"schedule.stages": HALVES, "steps": 1}, "a step or more for each"),
        ({"schedule.extension_steps": 12}, "a step or more for each"),
        ({"schedule.extension_steps": 13}, "a step or more for each"),
        (
            {"schedule.stages": (Stage(lr_mul=0.1),), "schedule.final_lr_frac": 0.5},
            "no lr_mul below",
        ),
        ({"schedule.stages": (Stage(mtp_weights=((1.0,), ())),)}, "equally many"),
        ({"schedule.stages": (Stage(mtp_weights=((), ())),)}, "equally many"),
        ({"schedule.stages": (Stage(math.nan),)}, r"schedule.stages.0.duration=nan .* must be"),
        ({"schedule.stages": (*HALVES, Stage(0, 0))}, r"schedule.stages.2.batch_mul=0 .* must be"),
        ({"schedule.stages": (Stage(lr_mul=-1.0),)}, r"stages.0.lr_mul=-1.0 .* must be"),
        ({"schedule.stages": (Stage(windows=(-1, 3)),)}, r"stages.0.windows=\(-1, 3\)"),
        ({"schedule.stages": (Stage(prefix_weight=(-1.0, 0.0)),)}, "stages.0.prefix_weight="),
        ({"schedule.val_windows": (0, 256)}, "windows in the schedule, and data.mode=stream: rows"),
        (
            {"schedule.stages": (Stage(windows=(128, 256)),)},
            "windows in the schedule, and data.mode=stream: rows",
        ),
        ({"schedule.stages": (Stage(prefix_weight=(0.5, 0.0)),)}, "prefix_weight: this model"),
    ],
)
def test_a_schedule_that_makes_no_sense_says_why(brief, change, words):
    with pytest.raises(UserError, match=words):
        check_config(vary(brief, change))


def test_stages_that_are_none_are_refused_at_once(brief):
    for nonsense in (3, (3,), ({"duration": 1.0},), [Stage()]):
        with pytest.raises(UserError, match="schedule.stages=.* must be"):
            vary(brief, {"schedule.stages": nonsense})


def test_a_boundary_between_equal_stages_is_invisible():
    cut = ScheduleConfig(stages=(Stage(0.5), Stage(0.5)))
    for step in range(10):
        assert Schedule(cut, 10).at(step)._replace(stage=0) == Schedule(COSINE, 10).at(step)


STAGED = {
    "schedule.stages": (
        Stage(0.25),
        Stage(0.5, batch_mul=3, lr_mul=1.5),
        Stage(0.25, batch_mul=2, lr_mul=1.2),
        Stage(0, batch_mul=4),
    ),
    "schedule.extension_steps": 2,
    "schedule.shape": "trapezoid",
    "schedule.final_lr_frac": 0.1,
    "schedule.warmup_steps": 0,
    "steps": 14,
    "log_every": 1,
    "val_every": 7,
}


class TestInAStagedRun:
    def test_the_run_follows_it(self, brief, tmp_path):
        run = train(vary(brief, STAGED), tmp_path, echo=None)
        schedule, records = run.schedule, read_metrics(tmp_path / "metrics.jsonl")
        logged = [row["lr"] for row in series(records, "step")]
        assert logged == [now.lr for now in every_step(schedule)]
        assert schedule.boundaries == (0, 3, 9, 12, 14)
        read = [now.batch_tokens // brief.data.batch_tokens for now in every_step(schedule)]
        assert read == [1] * 3 + [3] * 6 + [2] * 3 + [4] * 2
        total, there = schedule.tokens_before(14), run.loader.shards.total
        assert total == 35 * brief.data.batch_tokens < there
        assert run.loader.position.offset == total and run.loader.position.epoch == 0

    def test_a_stage_is_what_a_run_with_that_batch_does(self, brief, tmp_path):
        """The same tokens in the same batches, told as one stage or as two."""
        whole = vary(brief, {"log_every": 1, "data.batch_tokens": 2 * brief.data.batch_tokens})
        same = vary(brief, {"log_every": 1, "schedule.stages": (Stage(0.5, 2), Stage(0.5, 2))})
        runs = [train(run, tmp_path / str(n), echo=None) for n, run in enumerate((whole, same))]
        for name, p in runs[0].model.named_parameters():
            assert torch.equal(p, dict(runs[1].model.named_parameters())[name])

    def test_a_resumed_run_is_the_same_run_in_every_stage(self, brief, tmp_path, staged_run):
        stops = (2, 3, 4, 8, 9, 11, 12, 13)
        _, again = broken_and_resumed(vary(brief, STAGED), tmp_path, *stops, whole=staged_run)
        assert again.loader.position == staged_run.loader.position

    def test_warming_up_visits_every_stage_and_leaves_no_trace(self, brief, tmp_path, staged_run):
        run = build_run(vary(brief, STAGED | {"warmup": 2}), tmp_path, echo=None)
        seen, real = [], run.loader.next
        run.loader.next = lambda *told: (
            seen.append(told[0] // brief.data.batch_tokens),
            real(*told),
        )[1]
        from speedrun.train import warm_up

        warm_up(run)
        assert seen == [4, 4, 3, 3, 2, 2, 1, 1] and run.step == 0, "the longest first"
        run_loop(run)
        for name, p in run.model.named_parameters():
            assert torch.equal(p, dict(staged_run.model.named_parameters())[name]), name

    def test_a_warm_up_before_the_first_step_keeps_no_zeros(self, brief, tmp_path, monkeypatch):
        from speedrun.train import warm_up

        run = build_run(vary(brief, STAGED | {"warmup": 1}), tmp_path, echo=None)
        kept, load = [], run.optimizer.load_state_dict
        monkeypatch.setattr(run.optimizer, "load_state_dict", lambda given: (kept.extend(given.values()), load(given)))  # fmt: skip
        warm_up(run)
        assert sum(each.numel() for each in kept) > 1000
        assert all(each.untyped_storage().nbytes() <= 8 for each in kept)

    def test_warming_up_after_some_steps_leaves_no_trace_either(self, brief, tmp_path, staged_run):
        """The state is no longer zero, which a warm-up before the first step need not keep."""
        from speedrun.train import take_steps, warm_up

        run = build_run(vary(brief, STAGED | {"warmup": 2}), tmp_path, echo=None)
        take_steps(run, 0, 3)
        assert run.step == 3 and any(m.any() for m in run.optimizer.state_dict().values())
        warm_up(run)
        run_loop(run)
        for name, p in run.model.named_parameters():
            assert torch.equal(p, dict(staged_run.model.named_parameters())[name]), name

    def test_a_batch_that_the_shards_do_not_hold_is_refused_before_the_first_step(
        self, brief, tmp_path
    ):
        stages = (Stage(0.5), Stage(0.5, batch_mul=10**6))
        with pytest.raises(UserError, match="a step reads .* tokens .*, the training shards hold"):
            build_run(vary(brief, {"schedule.stages": stages}), tmp_path, echo=None)

    def test_at_cpu_size_every_stage_is_there(self):
        run = at_cpu_size(
            vary(
                preset("record11"),
                {k: STAGED[k] for k in ("schedule.stages", "schedule.extension_steps")},
            ),
            20,
        )
        schedule = schedule_of(run)
        assert len(schedule.starts) == 4 and run.schedule.extension_steps == 3

    @pytest.mark.parametrize("steps, shown", [(20, [128, 64, 128, 48, 0]), (8, [128, 48, 0])])
    def test_at_cpu_size_softmaxes_run_over_some_of_few_words(self, embedded, tmp_path, steps, shown):  # fmt: skip
        run, counts = preset("record_200m"), (10_240, 64, 144, 48, 0)
        first, second, third, last = run.schedule.stages
        parts = (replace(third, duration=share) for share in (0.27, 1 / 3 - 0.27))
        pairs = zip((first, second, *parts, last), counts, strict=True)
        stages = tuple(replace(stage, candidates=count) for stage, count in pairs)
        small = at_cpu_size(vary(run, {"schedule.stages": stages}), steps)
        assert [stage.candidates for stage in small.schedule.stages] == shown
        live = build_run(vary(small, {"data.path": str(embedded)}), tmp_path, echo=None)
        assert all(0 <= count < live.model.lm_head.shape[1] for count in shown)


SAMPLED = STAGED | {
    "schedule.stages": (
        Stage(0.25, candidates=32),
        Stage(0.5, batch_mul=3, lr_mul=1.5, candidates=96),
        Stage(0.25, batch_mul=2, lr_mul=1.2, candidates=4096),
        Stage(0, batch_mul=4),
    ),
    "model.head.fp8": True,
    "model.head.tie": "until_step",
    "model.head.softcap": "sigmoid23",
}


class TestASoftmaxOverSomeWords:
    def test_a_resumed_run_is_the_same_run_in_every_stage(self, brief, tmp_path):
        broken_and_resumed(vary(brief, SAMPLED), tmp_path, 2, 3, 6, 12)

    def test_a_step_trains_with_its_stages_words(self, brief, tmp_path, monkeypatch):
        """In steps, and nowhere else: a validation's softmax is over all words."""
        told = []

        def watched(x, w, targets, candidates):
            told.append((*candidates.tolist(), candidates.device.type))
            return head_loss_op(x, w, targets, candidates)

        monkeypatch.setattr("speedrun.model.gpt.head_loss_op", watched)
        run, seen = build_run(vary(brief, SAMPLED), tmp_path, echo=None), []

        def step(run):
            told.clear()
            loss = train_step(run)
            seen.append({*told})
            told.clear()
            return loss

        run_loop(run, step=step)
        assert not told, "in the last validation"
        assert seen == [{(now.candidates, 1, "cpu")} for now in every_step(run.schedule)]
        assert [n for n, _ in itertools.groupby(seen)] == [
            {(n, 1, "cpu")} for n in (32, 96, 4096, 0)
        ]

    @pytest.mark.parametrize("mode", ["stream", "packed", "documents"])
    def test_micro_batches_that_pass_together_choose_apart(self, mode, brief, tmp_path, monkeypatch):  # fmt: skip
        """So that the head's gradient is the same on few GPUs, which join micro-batches, as on many."""
        of_head: list = []

        def watched(x, w, targets, candidates):
            found = head_loss_op(x, w, targets, candidates)
            of_head.append((candidates.tolist(), found[2].clone()))
            return found

        monkeypatch.setattr("speedrun.model.gpt.head_loss_op", watched)
        both = SAMPLED | {"data.mode": mode, "data.micro_batches": 4}
        both |= {} if mode == "stream" else {"model.rotary.pos": "rope"}
        gradients = []
        for most, passes in ((0, [[32, 1]] * 4), (2**16, [[32, 4]])):
            config = vary(brief, both | {"data.max_forward_tokens": most})
            run = build_run(config, tmp_path / str(most), echo=None)
            of_head.clear()
            train_step(run)
            assert [candidates for candidates, _ in of_head] == passes
            gradients.append(torch.stack([gradient for _, gradient in of_head]).mean(0))
        apart, together = gradients
        assert torch.equal(apart.any(0), together.any(0)), "of the same words"
        # vectors are scaled before they are rounded to three bits, by other largest numbers: 2.6% each
        assert (apart - together).norm() < 0.05 * apart.norm()

    def test_warming_up_leaves_no_trace(self, brief, tmp_path):
        runs = [
            train(vary(brief, SAMPLED | {"warmup": n}), tmp_path / str(n), echo=None)
            for n in (0, 1)
        ]
        for name, p in runs[0].model.named_parameters():
            assert torch.equal(p, dict(runs[1].model.named_parameters())[name]), name


@pytest.fixture
def staged_run(brief, tmp_path_factory):
    """The staged run, uninterrupted."""
    return train(vary(brief, STAGED), tmp_path_factory.mktemp("staged") / "run", echo=None)
