# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Muon as it runs today
#
# ## The code
#
# ### The best polynomials

# %%
#| default_exp optim.muon
#| export
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from speedrun.optim.newton_schulz import MatrixOptimizer, MatrixOptions
from speedrun.optim.newton_schulz import fold, newton_schulz, orthogonal_factor, through

# %%
#| export
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(g: Tensor, iterations: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Nearly the orthogonal factor of each matrix in g, (…, rows, cols) → the same, in `dtype`.

    The polynomials are Amsel and others' for singular values above 1/1000 of the matrix's length, with record 38's margins.
    """
    x = g.to(dtype)
    x = x / (1.02 * torch.linalg.matrix_norm(x, keepdim=True) + 1e-6)
    last = POLAR_EXPRESS[-1:] * max(0, iterations - len(POLAR_EXPRESS))
    return through(x, (*POLAR_EXPRESS[:iterations], *last))


# %% [markdown]
# ### Rows of one length


# %%
#| export
def even_rows(update: Tensor, second: Tensor, beta2: float, skip: Tensor | None) -> Tensor:
    """NorMuon: rows of update, (matrices, rows, cols), divided by the root of their mean square, at the matrix's old length.

    second: the running mean squares, (matrices, rows, 1), folded in place; of columns, (matrices, 1, cols), where these are more.
    """
    u = update.float()
    square = u.square().mean(-1 if second.shape[-1] == 1 else -2, keepdim=True)
    if skip is not None:
        square = torch.where(skip > 0, second, square)
    second.lerp_(square, 1 - beta2)
    even = u * second.clamp_min(1e-10).rsqrt()
    length, now = (torch.linalg.matrix_norm(x, keepdim=True) for x in (u, even))
    return even * (length / now.clamp_min(1e-10))


# %% [markdown]
# ### Decay that agrees


# %%
#| export
def cautious(p: Tensor, update: Tensor, decay: float | Tensor) -> Tensor:
    """The update with decay · p added where both have one sign, so where the step makes a weight smaller anyway."""
    return update + decay * p * (update * p >= 0)


# %% [markdown]
# ### Sixteen bits beside sixteen bits


# %%
#| export
def split(whole: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as the nearest bfloat16 and what is missing, int16: `join` gives back every bit."""
    bits = whole.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(rounded: Tensor, lost: Tensor) -> Tensor:
    """The float32 that `split` took apart."""
    return ((rounded.view(torch.int16).to(torch.int32) << 16) + lost).view(torch.float32)


# %% [markdown]
# ### All of it, in the optimizer


# %%
#| export
@dataclass(frozen=True)
class MuonOptions:
    """What later records made of Muon. The defaults change nothing: they are record 4's."""

    polynomials: Literal["quintic", "polar_express"] = "quintic"
    """quintic: the same one again and again. polar_express: each the best for what the last one left."""
    beta2: float = 0.0
    """NorMuon: what the rows' mean squares keep of themselves in a step; 0: rows stay as long as they are."""
    decay: Literal["plain", "squared", "cautious", "none"] = "plain"
    """plain: rate · optim.weight_decay. squared: rate² · decay_factor. cautious: that, where the step makes a weight smaller anyway."""
    decay_factor: float = 1.2
    """squared, cautious: decay of a step as a multiple of the rate's square."""
    low_momentum: float = 0.0
    """Momentum in the first step and after the last, on a line to matrix.momentum and back; 0: no lines."""
    momentum_steps: tuple[int, int] = (300, 50)
    """Steps in which momentum rises at the beginning, and falls at the end."""
    wide_factor: float = 1.0
    """The rate of a matrix of fewer rows than columns is larger by this."""
    weights: Literal["float32", "bfloat16", "split"] = "float32"
    """What the matrices are in the model. split: bfloat16, and the optimizer keeps what rounding took."""


# %%
#| export
class Muon(MatrixOptimizer):
    """Banks of matrices under Muon, old or new. Parameters change their dtype if the options say so.

    The state of a bank: momentum (matrices, rows, cols), float32; second, for NorMuon; lost (as the bank), for split weights.
    """

    def __init__(
        self,
        banks: list[tuple[Tensor, int]],
        matrix: MatrixOptions,
        options: MuonOptions,
        lr: float,
        weight_decay: float,
    ):
        super().__init__(banks, None, lr, weight_decay)
        self.matrix, self.options = matrix, options
        for group in self.param_groups:
            (bank,) = group["params"]
            rows, cols = bank.shape[1] // group["matrices"], bank.shape[2]
            tall = math.sqrt(rows / cols) if matrix.shape_factor and rows > cols else 1.0
            group["factor"] = options.wide_factor if rows < cols else tall
            group["momentum"] = matrix.momentum
            if options.weights != "float32" and bank.dtype == torch.float32:
                bank.data, lost = split(bank.data)
                if options.weights == "split":
                    self.state[bank]["lost"] = lost

    def direction(self, g: Tensor, group: dict) -> Tensor:
        (bank,), g = group["params"], g if g.dtype == torch.float64 else g.float()
        state, skip = self.state[bank], self.found_inf
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(g)
        ahead = fold(g, state["momentum"], group["momentum"], self.matrix.nesterov, skip)
        update = orthogonal(ahead, self.matrix.iterations, self.options.polynomials)
        if self.options.beta2:
            if "second" not in state:
                by_row = g.shape[1] >= g.shape[2]
                state["second"] = torch.zeros_like(g[:, :, :1] if by_row else g[:, :1, :])
            update = even_rows(update, state["second"], self.options.beta2, skip)
        return update * group["factor"]

    def move(self, bank: Tensor, update: Tensor, rate: float | Tensor, group: dict) -> None:
        lost, whole = self.state[bank].get("lost"), bank.data
        if bank.dtype == torch.bfloat16:
            whole = bank.float() if lost is None else join(whole, lost)
        kind, decay = self.options.decay, self.options.decay_factor * rate * group["factor"]
        if kind == "plain":
            super().move(whole, update, rate, group)
        elif kind == "cautious":
            whole.sub_(rate * cautious(whole, update.float(), decay))
        else:
            whole.mul_(1 - rate * decay * (kind == "squared")).sub_(rate * update)
        if bank.dtype == torch.bfloat16:
            rounded, missing = split(whole)
            bank.copy_(rounded)
            if lost is not None:
                lost.copy_(missing)


def orthogonal(g: Tensor, iterations: int, polynomials: str) -> Tensor:
    """Nearly the orthogonal factor of matrices, as the options say; without iterations the exact one."""
    if not iterations:
        return orthogonal_factor(g)
    if polynomials == "polar_express":
        return polar_express(g, iterations)
    return newton_schulz(g, iterations)


# %% [markdown]
# ## The measurement

# %% tags=["hide-input"]
#| default_exp measure.muon
#| export
import dataclasses
from typing import Any

from speedrun.config import TODAY, Config, preset, vary
from speedrun.lab.results import load_result, stamp
from speedrun.measure.runs import (
    bench,
    corpus_of,
    step_times,
    train_arms,
    train_many,
    train_on_gpus,
)

NAMES = ("laptop_rates", "laptop", "laptop_long", "laptop_weights", "laptop_pace")
CORPUS = ("rates", "parts")  # on a GPU, with a data folder
RATES = tuple(0.004 * 2**n for n in range(5))
OTHERS = (0.002, 0.004, 0.008)
LAPTOP: dict[str, Any] = {"steps": 600, "val_tokens": 131_072}
PARTS: dict[str, dict[str, Any]] = {
    "record 4's quintic": {"muon.polynomials": "quintic"},
    "three polynomials": {"matrix.iterations": 3},
    "no NorMuon": {"muon.beta2": 0.0},
    "momentum held": {"muon.low_momentum": 0.0},
    "no decay": {"muon.decay": "none"},
    "decay of all": {"muon.decay": "squared"},
    "plain decay": {"muon.decay": "plain"},
    "no wide factor": {"muon.wide_factor": 1.0},
    "no factors": {"muon.wide_factor": 1.0, "matrix.shape_factor": False},
}
WEIGHTS = {
    "float32 weights": {"muon.weights": "float32"},
    "bfloat16 weights": {"muon.weights": "bfloat16"},
}


# %% tags=["hide-input"]
#| export measure.muon
def today(base: Config) -> Config:
    """A run under Muon as it runs today; momentum's ramps are as long a share of it as of the record's."""
    rises, falls = round(0.23 * base.steps), round(0.04 * base.steps)
    changes: dict[str, Any] = {"matrix.rule": "muon", "muon.momentum_steps": (rises, falls)}
    changes["muon.weights"] = "split" if base.precision == "bfloat16" else "float32"
    return vary(dataclasses.replace(base, muon=TODAY), changes)


def rates(base: Config) -> dict[str, Config]:
    """Today's Muon at every rate of the matrices and of the rest."""
    points = [(rate, other) for rate in RATES for other in OTHERS]
    return {f"{r:g} {o:g}": vary(today(base), {"matrix.lr": r, "optim.lr": o}) for r, o in points}


def tuned(name: str, base: Config) -> Config:
    """Today's Muon at the rates that did best in a committed grid."""
    arms = load_result("muon", name)["data"]["arms"]
    return rates(base)[min(arms, key=lambda arm: arms[arm][0]["val_loss"])]


def arms_of(name: str, base: Config) -> dict[str, Config]:
    """The arms of a measurement: today's Muon, tuned, and what is compared with it."""
    whole = tuned("laptop_rates" if name.startswith("laptop") else "rates", base)
    if name == "laptop_weights":
        half = vary(whole, {"precision": "bfloat16"})
        return {
            kind: vary(half, {"muon.weights": kind}) for kind in ("split", "bfloat16", "float32")
        }
    if name == "laptop_pace":
        plain = dataclasses.replace(whole, muon=MuonOptions())
        return {"AdamW": vary(plain, {"matrix.rule": "adamw"}), "record 4": plain, "today": whole}
    parts = PARTS if name.startswith("laptop") else PARTS | WEIGHTS
    return {"today": whole} | {part: vary(whole, change) for part, change in parts.items()}


# %% tags=["hide-input"]
#| export measure.muon
def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train arms with paired seeds: {"arms": {arm: [run, …]}}; laptop_pace: step times, {"ms": {arm: [ms, …]}}.

    rates: every point once. laptop and parts: today's Muon nine times, each part three times; the rest: all three times.
    """
    laptop = name.startswith("laptop")
    base = vary(preset("cpu"), LAPTOP) if laptop else bench(arguments[0])
    base = vary(base, {"steps": 2000}) if name == "laptop_long" else base
    seeds = {"laptop": 9, "parts": 9, "laptop_long": 3, "laptop_weights": 3}.get(name, 1)
    modules = ["speedrun.measure.muon", "speedrun.train"]
    facts = stamp(command, modules, seeds, range(seeds), corpus_of(base))
    many = train_many if laptop else train_on_gpus
    if name.endswith("rates"):
        return {"arms": train_arms(rates(base), 1, many)}, facts
    arms = arms_of(name, base)
    if name == "laptop_pace":
        return {"ms": step_times(arms)}, facts
    control = train_arms({"today": arms.pop("today")}, seeds, many) if "today" in arms else {}
    return {"arms": control | train_arms(arms, 3, many)}, facts
