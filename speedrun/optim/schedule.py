# Tangled from notebooks/14_schedule.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The trainer's learning rate
import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Literal, NamedTuple

from annotated_types import Interval

from speedrun.lab.bounds import Beta, NonNegativeInt, Share


@dataclass(frozen=True)
class ScheduleConfig:
    """What changes from step to step. The defaults are llm.c's."""

    warmup_steps: NonNegativeInt = 700
    """Steps in which the learning rate climbs to its peak."""
    shape: Literal["cosine", "trapezoid"] = "cosine"
    """The learning rate after the warm-up. cosine: falls at once. trapezoid: held, then along a line."""
    cooldown_frac: Share = 0.6
    """trapezoid: the share of the steps in which the learning rate falls."""
    final_lr_frac: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Learning rate at the end, as a share of the peak."""
    momentum_min: Annotated[Beta, "0: momentum stays as it is"] = 0.0
    """Muon's momentum in the first step and after the last, on a line to optim.muon.momentum and back; 0: no lines."""
    momentum_ramp: tuple[NonNegativeInt, NonNegativeInt] = (300, 50)
    """Steps in which momentum rises at the beginning, and falls at the end."""
    untie_at: Share = 2 / 3
    """Share of the steps after which embedding and head train apart, if model.head.tied is split."""


def linear_cooldown(peak: float, floor: float, step: int, begin: int, end: int) -> float:
    """`peak` until step `begin`, then a line that is at `floor` in step `end` and stays there."""
    if step <= begin or step >= end:
        return floor if step >= end else peak
    t = (step - begin) / (end - begin)
    return (1 - t) * peak + t * floor


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """The rate of a step (0 … steps − 1): a line up, then the schedule's shape down to final_lr_frac · peak."""
    warmup, final = schedule.warmup_steps, schedule.final_lr_frac
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.shape == "trapezoid":
        begin = max(warmup, steps - round(schedule.cooldown_frac * steps))
        return peak * linear_cooldown(1.0, final, step, begin, steps)
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * (final + (1 - final) * cosine)


def ramp(step: int, steps: int, ends: tuple[float, float], ramps: tuple[int, int]) -> float:
    """A line from ends[0] up to ends[1] over the first ramps[0] steps, and a line back over the last ramps[1]."""
    (low, high), (rising, falling) = ends, ramps
    up = step / rising if rising else 1.0
    down = (steps - step) / falling if falling else 1.0
    return low + (high - low) * min(1.0, up, down)


class StepSettings(NamedTuple):
    """What changes from step to step, for the optimizer."""

    step: int
    lr: float
    """Learning rate of all but the blocks' matrices."""
    matrix_lr: float
    momentum: float
    untie: bool = False
    """Whether tied parameters train apart from this step on."""


def step_settings(
    step: int, steps: int, schedule: ScheduleConfig, peaks: tuple[float, float], momentum: float
) -> StepSettings:
    """The settings of a step (0 … steps − 1). peaks: learning rates of all, and of the matrices. momentum: its highest value."""
    lr = learning_rate(step, steps, peaks[0], schedule)
    ends = (schedule.momentum_min or momentum, momentum)
    now = ramp(step, steps, ends, schedule.momentum_ramp)
    return StepSettings(
        step, lr, lr * (peaks[1] / peaks[0]), now, step >= schedule.untie_at * steps
    )


# %% Training as a list of stages
@dataclass(frozen=True)
class Stage:
    """A stretch of training. What changes inside it is a pair: its value at the stage's start, and at its end."""

    share: float
    """Share of the scheduled steps. The last stage has none: it is the extension."""
    batch_tokens: int
    """Tokens a step."""
    rate: float
    """Learning rate before it falls, as a multiple of the base rate. The extension's is the floor, whatever stands here."""
    cap_tokens: int
    """Longest stretch of one document."""
    windows: tuple[int, int]
    """How far short and long attention look back, in blocks of 128 tokens."""
    ahead: tuple[tuple[float, ...], tuple[float, ...]] = ((1.0,), (1.0,))
    """Weights in the loss of the next token, the one after it, and so on."""
    prefix: tuple[float, float] = (0.0, 0.0)
    """Weight in the loss of the next token's longest prefix that is a token."""


@dataclass(frozen=True)
class Schedule:
    """Training as a list of stages, and what runs across them."""

    stages: tuple[Stage, ...]
    """One after the other; the last is the extension, which may have no steps."""
    scheduled: int
    """Steps of all stages but the last."""
    extension: int = 0
    """Steps of the last stage, at the floor of the rate."""
    cooldown: float = 0.6
    """Share of the scheduled steps in which the rate falls."""
    floor: float = 0.0
    """Where it falls to, as a multiple of the base rate."""
    momentum: tuple[float, float] = (0.85, 0.95)
    """Lowest and highest."""
    momentum_steps: tuple[int, int] = (300, 50)
    """First steps, in which momentum rises, and last steps, in which it falls."""

    def __post_init__(self):
        check_schedule(self)


def check_schedule(schedule: Schedule) -> None:
    """Refuse, with a ValueError that says why, what no run could follow."""
    stages, (low, high) = schedule.stages, schedule.momentum
    shares, rates = ([getattr(stage, name) for stage in stages] for name in ("share", "rate"))
    weights = [w for s in stages for w in (*s.ahead[0], *s.ahead[1], *s.prefix)]
    sound = {
        "two stages or more": len(stages) >= 2,
        "shares above 0, and 0 for the last stage": min(shares[:-1], default=0) > 0 == shares[-1],
        "shares that add up to 1": abs(math.fsum(shares) - 1) < 1e-9,
        "a step or more for each stage": schedule.extension >= 0
        and all(schedule.scheduled * share >= 1 for share in shares[:-1]),
        "0 < cooldown ≤ 1": 0 < schedule.cooldown <= 1,
        "0 ≤ floor ≤ every rate": 0 <= schedule.floor <= min(rates, default=0),
        "weights of 0 or more": min(weights, default=0) >= 0,
        "0 ≤ lowest ≤ highest momentum < 1": 0 <= low <= high < 1,
        "momentum_steps of 0 or more": min(schedule.momentum_steps) >= 0,
        "batches, caps and windows of 1 or more": all(
            min(s.batch_tokens, s.cap_tokens, *s.windows) >= 1 for s in stages
        ),
        "weights for equally many tokens ahead": all(
            len(s.ahead[0]) == len(s.ahead[1]) > 0 for s in stages
        ),
    }
    wrong = [what for what, holds in sound.items() if not holds]
    if wrong:
        raise ValueError(f"a schedule needs {'; '.join(wrong)}")


def borders(schedule: Schedule) -> tuple[int, ...]:
    """The first step of each stage, and at the end the number of steps."""
    ends = list(accumulate(stage.share for stage in schedule.stages[:-1]))
    ends[-1] = 1.0  # whatever the rounding of the shares
    scheduled = [round(schedule.scheduled * end) for end in ends]
    return (0, *scheduled, schedule.scheduled + schedule.extension)


def fall_begins(schedule: Schedule) -> int:
    """The last step at the full rate."""
    return schedule.scheduled - round(schedule.cooldown * schedule.scheduled)


def stage_at(schedule: Schedule, step: int) -> tuple[Stage, float]:
    """The stage of a step, and the share of the stage that is over: 0 at its first step, below 1 at its last."""
    edges = borders(schedule)
    if not 0 <= step < edges[-1]:
        raise ValueError(f"step {step} is none of the {edges[-1]} steps")
    n = bisect_right(edges, step) - 1
    return schedule.stages[n], (step - edges[n]) / (edges[n + 1] - edges[n])


# %% Learning rate by stage
def rate_at(schedule: Schedule, step: int) -> float:
    """The learning rate of a step, as a multiple of the base rate."""
    stage, _ = stage_at(schedule, step)
    return linear_cooldown(
        stage.rate, schedule.floor, step, fall_begins(schedule), schedule.scheduled
    )


# %% Momentum
def momentum_at(schedule: Schedule, step: int) -> float:
    """Momentum of a step: a line up in the first steps, a line down in the last."""
    stage_at(schedule, step)  # refuses a step that there is not
    steps = schedule.scheduled + schedule.extension
    return ramp(step, steps, schedule.momentum, schedule.momentum_steps)


# %% Windows and loss weights by stage
class Settings(NamedTuple):
    """All that a schedule says about one step."""

    batch_tokens: int
    rate: float
    momentum: float
    cap_tokens: int
    windows: tuple[int, int]
    ahead: tuple[float, ...]
    prefix: float


def loss_weights_at(schedule: Schedule, step: int) -> tuple[tuple[float, ...], float]:
    """Weights of the tokens ahead, and of the prefix target: on lines between the ends of the stage."""
    stage, t = stage_at(schedule, step)
    ahead = tuple((1 - t) * first + t * last for first, last in zip(*stage.ahead))
    return ahead, (1 - t) * stage.prefix[0] + t * stage.prefix[1]


def settings_at(schedule: Schedule, step: int) -> Settings:
    """All settings of one step."""
    stage, _ = stage_at(schedule, step)
    rate, momentum = rate_at(schedule, step), momentum_at(schedule, step)
    lengths = (stage.cap_tokens, stage.windows)
    return Settings(stage.batch_tokens, rate, momentum, *lengths, *loss_weights_at(schedule, step))


def tokens_before(schedule: Schedule, step: int) -> int:
    """Tokens that have been read before a step; before the step after the last: all of them."""
    pairs = zip(schedule.stages, borders(schedule), borders(schedule)[1:])
    return sum(s.batch_tokens * max(0, min(step, end) - begin) for s, begin, end in pairs)


# %% The table
def turning_points(schedule: Schedule) -> list[int]:
    """The steps at which something begins, ends or is last what it was."""
    edges, (rising, falling) = borders(schedule), schedule.momentum_steps
    points = {
        fall_begins(schedule),
        rising,
        edges[-1] - falling,
        *edges,
        *(edge - 1 for edge in edges),
    }
    return sorted(point for point in points if 0 <= point < edges[-1])


def schedule_table(schedule: Schedule) -> list[str]:
    """A heading, and a line for each turning point."""
    lines = [" step   batch   rate  mom.   cap  windows  ahead / prefix"]
    for step in turning_points(schedule):
        now = settings_at(schedule, step)
        windows = "{}, {}".format(*now.windows)
        targets = " ".join(f"{weight:.2f}" for weight in now.ahead) + f" / {now.prefix:.2f}"
        numbers = f"{step:5} {now.batch_tokens:7} {now.rate:6.3f} {now.momentum:5.3f}"
        lines.append(f"{numbers} {now.cap_tokens:5}  {windows:>7}  {targets}")
    return lines
