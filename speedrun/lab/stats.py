# Tangled from notebooks/01_are_you_faster.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The code
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Summary:
    """n runs of one thing: mean and sample standard deviation (n − 1 below; nan for a single run)."""

    n: int
    mean: float
    sd: float

    def __str__(self) -> str:
        spread = f" ± {self.sd:.4f}" if self.n > 1 else ""
        return f"{self.mean:.4f}{spread} (n={self.n})"


def describe(values) -> Summary:
    """Summarise a sequence of numbers."""
    values = [float(value) for value in values]
    n, mean = len(values), math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return Summary(n, mean, math.sqrt(squares / (n - 1)) if n > 1 else math.nan)


# %% The contest's own test
def p_below(sample: Summary, target: float) -> float:
    """One-sided p-value of "the true mean is below target": how likely a mean this low is if it were target."""
    if sample.n < 2:
        raise ValueError(f"a test needs at least 2 runs, got {sample.n}")
    t = (sample.mean - target) / (sample.sd / math.sqrt(sample.n))
    return float(stats.t.cdf(t, sample.n - 1))


def p_difference(a: Summary, b: Summary) -> float:
    """Two-sided p-value of "the true means differ" (Welch's t-test)."""
    if a.n < 2 or b.n < 2:
        raise ValueError(f"a test needs at least 2 runs on each side, got {a.n} and {b.n}")
    two = stats.ttest_ind_from_stats(a.mean, a.sd, a.n, b.mean, b.sd, b.n, equal_var=False)
    return float(two.pvalue)


def compare_line(sample: Summary, control: Summary) -> str:
    """A sample, how far its mean is from a control's, and the p-value of that if there are runs enough for one."""
    test = f", p = {p_difference(sample, control):.1e}" if min(sample.n, control.n) > 1 else ""
    return f"{sample}  {sample.mean - control.mean:+.4f}{test}"


# %% How many runs?
def power(difference: float, sd: float, n: int, alpha: float = 0.01) -> float:
    """Chance that n runs against n show a true difference of means, in a one-sided t-test at level alpha."""
    dof = 2 * n - 2
    threshold = stats.t.ppf(1 - alpha, dof)
    return float(stats.nct.sf(threshold, dof, difference / (sd * math.sqrt(2 / n))))


def runs_needed(difference: float, sd: float, alpha: float = 0.01, wanted: float = 0.9) -> int:
    """The fewest runs *per arm* (with, and without) that show a true difference with probability `wanted`."""
    if difference <= 0 or sd <= 0:
        raise ValueError(f"need a positive difference and sd, got {difference} and {sd}")
    low, high = 1, 2  # too few, perhaps enough
    while power(difference, sd, high, alpha) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if power(difference, sd, middle, alpha) >= wanted else (middle, high)
        )
    return high


# %% Forty ideas, one control
def dunnett(arms: Mapping[str, Sequence[float]], control: Sequence[float]) -> dict[str, float]:
    """Two-sided p-value of each arm's difference from one control, given that all were tried: Dunnett's test, one deviation for all."""
    points = np.random.default_rng(0)  # at which the integral is evaluated
    found = stats.dunnett(*arms.values(), control=control, rng=points).pvalue
    return dict(zip(arms, map(float, found)))


def p_text(p: float) -> str:
    """A p-value for printing, to a thousandth, which is as far as Dunnett's integral is evaluated."""
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


@dataclass(frozen=True)
class Study:
    """Arms beside one control: samples and, for all but the control, Dunnett's p, by name; one deviation for all, and its degrees of freedom."""

    samples: dict[str, Summary]
    p_values: dict[str, float]
    pooled_sd: float
    dof: int

    def delta(self, arm: str) -> float:
        """How far an arm's mean is above the control's."""
        return self.samples[arm].mean - self.samples["control"].mean

    def line(self, arm: str) -> str:
        """An arm beside the control, for printing."""
        return f"{arm:36} {self.samples[arm]}  {self.delta(arm):+.4f}, {p_text(self.p_values[arm])}"

    def detectable(self, n: int, power: float = 0.5, alpha: float = 0.05) -> float:
        """About the true difference that an arm of n runs shows with this probability at p < alpha (by Bonferroni's threshold, which is near)."""
        error = self.pooled_sd * math.sqrt(1 / n + 1 / self.samples["control"].n)
        height = stats.t.isf(alpha / len(self.p_values) / 2, self.dof)
        return float(error * (height + stats.t.ppf(power, self.dof)))

    def pairwise_p(self, a: str, b: str) -> float:
        """Two-sided p-value of the difference of two arms, as if nothing else had been asked: Student's test with the common deviation."""
        one, two = self.samples[a], self.samples[b]
        t = (one.mean - two.mean) / (self.pooled_sd * math.sqrt(1 / one.n + 1 / two.n))
        return float(2 * stats.t.sf(abs(t), self.dof))


def study_of(losses: Mapping[str, Sequence[float]]) -> Study:
    """A study from each arm's losses, those of “control” among them."""
    samples = {arm: describe(values) for arm, values in losses.items()}
    dof = sum(sample.n - 1 for sample in samples.values())
    squares = math.fsum((sample.n - 1) * sample.sd**2 for sample in samples.values())
    others = {arm: values for arm, values in losses.items() if arm != "control"}
    p_values = dunnett(others, losses["control"])
    return Study(samples, p_values, math.sqrt(squares / dof), dof)
