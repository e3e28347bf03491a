# Tangled from notebooks/14_schedule.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% One table for a run
import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Annotated, Literal, NamedTuple

from annotated_types import Interval

from speedrun.lab.bounds import (
    Beta,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
)
from speedrun.lab.errors import UserError


@dataclass(frozen=True)
class Stage:
    """A stretch of training. What changes inside it is a pair: its value at the stage's start, and at its end."""

    duration: Annotated[float, Interval(ge=0, le=1)] = 1.0
    """Share of the scheduled steps; 0: the extension, which comes last."""
    batch_mul: PositiveInt = 1
    """Tokens a step, as a multiple of data.batch_tokens."""
    lr_mul: PositiveFloat = 1.0
    """Learning rate before it falls, as a multiple of its peak. The extension's is the floor, whatever stands here."""
    max_doc_tokens: NonNegativeInt = 0
    """Longest piece of a document; 0: data.max_doc_tokens."""
    windows: tuple[NonNegativeInt, NonNegativeInt] = (0, 0)
    """How many tokens short and long attention look back; 0: all."""
    candidates: Annotated[int, Interval(ge=0, le=2**24)] = 0
    """Candidates: vocabulary entries that the training loss's softmax runs over (sampled softmax, chapter 19), a multiple of 16; 0: all. Wants model.head.fp8."""
    mtp_weights: tuple[tuple[NonNegativeFloat, ...], tuple[NonNegativeFloat, ...]] = (
        (1.0,),
        (1.0,),
    )
    """Weights in the loss of the next token, the one after it, and so on."""
    prefix_weight: tuple[NonNegativeFloat, NonNegativeFloat] = (0.0, 0.0)
    """Weight in the loss of the next token's longest prefix that is a token."""


@dataclass(frozen=True)
class ScheduleConfig:
    """What changes from step to step. The defaults are llm.c's."""

    warmup_steps: NonNegativeInt = 700
    """Steps in which the learning rate climbs to its peak."""
    shape: Literal["cosine", "trapezoid"] = "cosine"
    """The learning rate after the warm-up. cosine: falls at once. trapezoid: held, then along a line."""
    cooldown_frac: Share = 0.6
    """trapezoid: the share of the scheduled steps in which the learning rate falls (warmdown_ratio in nanochat)."""
    final_lr_frac: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Learning rate at the end, and in the extension, as a share of the peak."""
    momentum_min: Annotated[Beta, "0: momentum stays as it is"] = 0.0
    """Muon's momentum in the first step and after the last, on a line to optim.muon.momentum and back; 0: no lines."""
    momentum_ramp: tuple[NonNegativeInt, NonNegativeInt] = (300, 50)
    """Steps in which momentum rises at the beginning, and falls at the end."""
    untie_at: Share = 2 / 3
    """Share of the scheduled steps after which embedding and head train apart, if model.head.tie is until_step."""
    extension_steps: NonNegativeInt = 0
    """How many of the steps come after the scheduled ones, at the end of the learning rate's fall."""
    stages: tuple[Stage, ...] = (Stage(),)
    """Stretches of training, one after the other, as JSON: [{"duration": 0.5}, {"duration": 0.5, "batch_mul": 2}]."""
    val_windows: tuple[NonNegativeInt, NonNegativeInt] = (0, 0)
    """Short and long window in the validation at the end; each 0: as in the last stage."""


def stage_boundaries(schedule: "Schedule") -> tuple[int, ...]:
    """The first step of each stage, and at the end the number of steps."""
    durations = [stage.duration for stage in schedule.config.stages]
    starts = [round(schedule.scheduled * share) for share in (0, *accumulate(durations[:-1]))]
    return (*starts, schedule.steps)


def stage_at(schedule: "Schedule", step: int) -> tuple[Stage, float]:
    """The stage of a step, and the share of the stage that is over: 0 at its first step, below 1 at its last."""
    edges = schedule.boundaries
    if not 0 <= step < schedule.steps:
        raise ValueError(f"step {step} is none of the {schedule.steps} steps")
    n = bisect_right(edges, step) - 1
    return schedule.config.stages[n], (step - edges[n]) / (edges[n + 1] - edges[n])


def tokens_before(schedule: "Schedule", step: int) -> int:
    """Tokens that have been read before a step; before the step after the last: all of them."""
    edges = schedule.boundaries
    pairs = zip(schedule.config.stages, edges, edges[1:])
    steps = sum(s.batch_mul * max(0, min(step, end) - begin) for s, begin, end in pairs)
    return steps * schedule.batch_tokens


# %% Learning rate by stage
def linear_cooldown(peak: float, floor: float, step: int, begin: int, end: int) -> float:
    """`peak` until step `begin`, then a line that is at `floor` in step `end` and stays there."""
    if step <= begin or step >= end:
        return floor if step >= end else peak
    t = (step - begin) / (end - begin)
    return (1 - t) * peak + t * floor


def learning_rate(schedule: "Schedule", step: int) -> float:
    """The rate of a step (0 … steps − 1): a line up, then the stage's, along the schedule's shape down to final_lr_frac · lr, the extension's."""
    config, peak = schedule.config, schedule.lr
    warmup, final, top = config.warmup_steps, config.final_lr_frac, schedule.stage(step)[0].lr_mul
    if step >= schedule.scheduled:
        return peak * final
    if step < warmup:
        return peak * top * (step + 1) / warmup
    if config.shape == "trapezoid":
        begin, end = schedule.cooldown_start, schedule.scheduled
        return peak * linear_cooldown(top, final, step, begin, end)
    progress = (step - warmup) / (schedule.scheduled - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (final + (top - final) * cosine)


# %% Momentum and loss weights
def ramp(step: int, steps: int, ends: tuple[float, float], ramps: tuple[int, int]) -> float:
    """A line from ends[0] up to ends[1] over the first ramps[0] steps, and a line back over the last ramps[1]."""
    (low, high), (rising, falling) = ends, ramps
    up = step / rising if rising else 1.0
    down = (steps - step) / falling if falling else 1.0
    return low + (high - low) * min(1.0, up, down)


def loss_weights(schedule: "Schedule", step: int) -> tuple[tuple[float, ...], float]:
    """Weights of the tokens ahead, and of the prefix target: on lines between the ends of the stage."""
    stage, t = schedule.stage(step)
    ahead = tuple((1 - t) * first + t * last for first, last in zip(*stage.mtp_weights))
    return ahead, (1 - t) * stage.prefix_weight[0] + t * stage.prefix_weight[1]


class StepSettings(NamedTuple):
    """What a step is told. Fields with a default are nothing to an optimizer that is used by itself."""

    step: int
    lr: float
    """Learning rate of all but the blocks' matrices."""
    matrix_lr: float
    momentum: float
    untie: bool = False
    """Whether tied parameters train apart from this step on."""
    batch_tokens: int = 0
    """Tokens a step, over all ranks."""
    max_doc_tokens: int = 0
    windows: tuple[int, int] = (0, 0)
    candidates: int = 0
    mtp_weights: tuple[float, ...] = (1.0,)
    prefix_weight: float = 0.0
    stage: int = 0
    """The number of its stage."""


def step_settings(schedule: "Schedule", step: int) -> StepSettings:
    """All settings of one step (0 … steps − 1). ValueError for any other."""
    config, (stage, _) = schedule.config, schedule.stage(step)
    lr, high = learning_rate(schedule, step), schedule.momentum
    momentum = ramp(step, schedule.steps, (config.momentum_min or high, high), config.momentum_ramp)
    matrix_lr, untie = lr * (schedule.matrix_lr / schedule.lr), schedule.unties(step)
    lengths = (stage.max_doc_tokens or schedule.max_doc_tokens, stage.windows, stage.candidates)
    rates, batch = (lr, matrix_lr, momentum), schedule.batch_tokens * stage.batch_mul
    number = bisect_right(schedule.boundaries, step) - 1
    weights = loss_weights(schedule, step)
    return StepSettings(step, *rates, untie, batch, *lengths, *weights, number)


@dataclass(frozen=True)
class Schedule:
    """A run's settings as functions of the step. lr, matrix_lr, momentum: peaks; batch_tokens, max_doc_tokens: without a stage's own."""

    config: ScheduleConfig
    steps: int
    """All of them, the extension's included."""
    lr: float = 1.0
    matrix_lr: float = 1.0
    momentum: float = 0.95
    batch_tokens: int = 1
    max_doc_tokens: int = 2048

    at, stage, tokens_before = step_settings, stage_at, tokens_before

    @cached_property
    def boundaries(self) -> tuple[int, ...]:
        return stage_boundaries(self)

    @property
    def starts(self) -> list[int]:
        """The first step of each stage that has one: an extension may be empty."""
        return [start for start in self.boundaries[:-1] if start < self.steps]

    @property
    def scheduled(self) -> int:
        """Steps without the extension's."""
        return self.steps - self.config.extension_steps

    @property
    def cooldown_start(self) -> int:
        """trapezoid: the last step at the full rate."""
        falls = round(self.config.cooldown_frac * self.scheduled)
        return max(self.config.warmup_steps, self.scheduled - falls)

    def unties(self, step: int) -> bool:
        return step >= self.config.untie_at * self.scheduled


# %% The table
def check_schedule(config: ScheduleConfig, steps: int) -> None:
    """Raise UserError, which says why, about stages that no run of so many steps could follow."""
    stages, floor = config.stages, config.final_lr_frac
    durations = [stage.duration for stage in stages]
    edges = Schedule(config, steps).boundaries if stages else ()
    starts = [edge for edge, duration in zip(edges, durations) if duration]
    ends = [*starts[1:], steps - config.extension_steps]
    sound = {
        "a stage or more": bool(stages),
        "durations above 0, but for the last": min(durations[:-1], default=1) > 0,
        "durations that add up to 1": abs(math.fsum(durations) - 1) < 1e-9,
        "a step or more for each": all(start < end for start, end in zip(starts, ends)),
        "no lr_mul below schedule.final_lr_frac": all(s.lr_mul >= floor for s in stages),
        "weights for equally many tokens ahead": all(
            len(s.mtp_weights[0]) == len(s.mtp_weights[1]) > 0 for s in stages
        ),
    }
    wrong = [what for what, holds in sound.items() if not holds]
    if wrong:
        what = f"schedule.stages in a run of {steps} steps, {config.extension_steps} of them the extension's, want {'; '.join(wrong)}"
        raise UserError(what, "other stages, more --steps, or fewer --schedule.extension-steps")
