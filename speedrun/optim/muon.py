# Tangled from notebooks/13_muon.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The best polynomials
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from speedrun.lab.bounds import Beta, NonNegativeFloat, NonNegativeInt, PositiveFloat
from speedrun.optim.newton_schulz import MatrixOptimizer, MatrixOptions
from speedrun.optim.newton_schulz import fold, newton_schulz, orthogonal_factor, through


POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(
    g: Tensor, iterations: int = 5, dtype: torch.dtype = torch.bfloat16, gram: bool = False
) -> Tensor:
    """Nearly the orthogonal factor of each matrix in g, (…, rows, cols) → the same, in `dtype`.

    The polynomials are Amsel and others' for singular values above 1/1000 of the matrix's length, with record 38's margins.
    gram: by way of the Gram matrix, restarted once for long matrices and after every polynomial for others; for g of
    three dimensions.
    """
    x = g.float() if dtype == torch.float16 else g.to(dtype)  # a small gradient is none in float16
    x = (x / (1.02 * torch.linalg.matrix_norm(x, keepdim=True) + 1e-6)).to(dtype)
    last = POLAR_EXPRESS[-1:] * max(0, iterations - len(POLAR_EXPRESS))
    polynomials = (*POLAR_EXPRESS[:iterations], *last)
    if not gram:
        return through(x, polynomials)
    return through_gram(x, polynomials, 3 if max(x.shape[-2:]) > 1.5 * min(x.shape[-2:]) else 1)


# %% The small square
def through_gram(
    x: Tensor, polynomials: Sequence[tuple[float, float, float]], restart: int = 3
) -> Tensor:
    """`through`, for x (matrices, rows, cols), with products of the short side's square alone, but for two a restart and two.

    restart: after every so many polynomials x is multiplied out, and its square computed anew.
    """
    tall, restart = x.shape[-2] > x.shape[-1], max(1, restart)
    for begin in range(0, len(polynomials), restart):
        part = polynomials[begin : begin + restart]
        gram = x.mT @ x if tall else x @ x.mT
        q = torch.eye(len(gram[0]), dtype=x.dtype, device=x.device).expand_as(gram)
        for n, (a, b, c) in enumerate(part):
            z = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            q = torch.baddbmm(q, z, q, beta=a) if n else torch.add(z, q, alpha=a)
            if n < len(part) - 1:  # p(gram) · gram · p(gram): all of these commute
                half = torch.baddbmm(gram, z, gram, beta=a)
                gram = torch.baddbmm(half, z, half, beta=a)
        x = x @ q if tall else q @ x
    return x


# %% Rows of one length
def even_rows(update: Tensor, second: Tensor, beta2: float, skip: Tensor | None) -> Tensor:
    """NorMuon: rows of update, (matrices, rows, cols), divided by the root of their mean square, at the matrix's old length.

    second: the running mean squares, (matrices, rows, 1), folded in place; of columns, (matrices, 1, cols), where these are more.
    """
    u = update.float()
    square = u.square().mean(-1 if second.shape[-1] == 1 else -2, keepdim=True).to(second.dtype)
    if skip is not None:
        square = torch.where(skip > 0, second, square)
    second.lerp_(square, 1 - beta2)
    even = u * second.clamp_min(1e-10).rsqrt()
    length, now = (torch.linalg.matrix_norm(x, keepdim=True) for x in (u, even))
    return even * (length / now.clamp_min(1e-10))


# %% Decay that agrees
def cautious(p: Tensor, update: Tensor, decay: float | Tensor) -> Tensor:
    """The update with decay · p added where both have one sign, so where the step makes a weight smaller anyway."""
    return update + decay * p * (update * p >= 0)


# %% Sixteen bits beside sixteen bits
def split(whole: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as the nearest bfloat16 and what is missing, int16: `join` gives back every bit."""
    bits = whole.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(rounded: Tensor, lost: Tensor) -> Tensor:
    """The float32 that `split` took apart."""
    return ((rounded.view(torch.int16).to(torch.int32) << 16) + lost).view(torch.float32)


# %% All of it, in the optimizer
@dataclass(frozen=True)
class MuonOptions:
    """What later records made of Muon. The defaults change nothing: they are record 4's."""

    polynomials: Literal["quintic", "polar_express"] = "quintic"
    """quintic: the same one again and again. polar_express: each the best for what the last one left."""
    products: Literal["bfloat16", "float16"] = "bfloat16"
    """polar_express: the numbers that are multiplied."""
    gram: bool = False
    """polar_express: multiply squares of the short side instead of the matrix, as far as that is cheaper."""
    beta2: Beta = 0.0
    """NorMuon: what the rows' mean squares keep of themselves in a step; 0: rows stay as long as they are."""
    decay: Literal["plain", "squared", "cautious", "none"] = "plain"
    """plain: rate · optim.weight_decay. squared: rate² · decay_factor. cautious: that, where the step makes a weight smaller anyway."""
    decay_factor: NonNegativeFloat = 1.2
    """squared, cautious: decay of a step as a multiple of the rate's square."""
    low_momentum: Beta = 0.0
    """Momentum in the first step and after the last, on a line to matrix.momentum and back; 0: no lines."""
    momentum_steps: tuple[NonNegativeInt, NonNegativeInt] = (300, 50)
    """Steps in which momentum rises at the beginning, and falls at the end."""
    wide_factor: PositiveFloat = 1.0
    """The rate of a matrix of fewer rows than columns is larger by this."""
    weights: Literal["float32", "bfloat16", "split"] = "float32"
    """What the matrices are in the model. split: bfloat16, and the optimizer keeps what rounding took."""


def take_step(
    p: Tensor,
    lost: Tensor | None,
    update: Tensor,
    rate: float | Tensor,
    kind: str,
    plain: float | Tensor,
    squared: float | Tensor,
) -> None:
    """p ← p − rate · (update + decay · p), in place and in float32, whatever p is. lost: what p's rounding took, or None.

    kind: how p decays. plain: the decay of that kind. squared: of the other kinds, a multiple of the rate.
    """
    whole = p if p.dtype != torch.bfloat16 else p.float() if lost is None else join(p, lost)
    if kind == "plain":
        whole.mul_(1 - rate * plain).sub_(rate * update)
    elif kind == "cautious":
        whole.sub_(rate * cautious(whole, update.float(), squared))
    else:
        whole.mul_(1 - rate * squared * (kind == "squared")).sub_(rate * update)
    if p.dtype == torch.bfloat16:
        rounded, missing = split(whole)
        p.copy_(rounded)
        if lost is not None:
            lost.copy_(missing)


def orthogonal(g: Tensor, iterations: int, options: MuonOptions) -> Tensor:
    """Nearly the orthogonal factor of matrices, as the options say; without iterations the exact one."""
    if not iterations:
        return orthogonal_factor(g)
    if options.polynomials == "polar_express":
        return polar_express(g, iterations, getattr(torch, options.products), options.gram)
    return newton_schulz(g, iterations)


def rate_factor(rows: int, cols: int, matrix: MatrixOptions, options: MuonOptions) -> float:
    """What the rate of a matrix of this shape is multiplied by."""
    tall = math.sqrt(rows / cols) if matrix.shape_factor and rows > cols else 1.0
    return options.wide_factor if rows < cols else tall


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
            group["factor"] = rate_factor(rows, cols, matrix, options)
            group["momentum"] = matrix.momentum
            if options.weights != "float32":
                bank.data, lost = split(bank.data.float())
                if options.weights == "split":
                    self.state[bank]["lost"] = lost

    def load_state_dict(self, state_dict: dict) -> None:
        """As ever, but state keeps its dtypes: PyTorch would give it the parameters'."""
        super().load_state_dict(state_dict)
        order = [p for group in self.param_groups for p in group["params"]]
        for n, kept in state_dict["state"].items():
            device = order[n].device
            self.state[order[n]] = {key: value.to(device).clone() for key, value in kept.items()}

    def direction(self, g: Tensor, group: dict) -> Tensor:
        (bank,), g = group["params"], g if g.dtype == torch.float64 else g.float()
        state, skip = self.state[bank], self.found_inf
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(g)
        ahead = fold(g, state["momentum"], group["momentum"], self.matrix.nesterov, skip)
        update = orthogonal(ahead, self.matrix.iterations, self.options)
        if self.options.beta2:
            if "second" not in state:
                by_row = g.shape[1] >= g.shape[2]
                state["second"] = torch.zeros_like(g[:, :, :1] if by_row else g[:, :1, :])
            update = even_rows(update, state["second"], self.options.beta2, skip)
        return update * group["factor"]

    def move(self, bank: Tensor, update: Tensor, rate: float | Tensor, group: dict) -> None:
        decay = group["weight_decay"], self.options.decay_factor * rate * group["factor"]
        lost = self.state[bank].get("lost")
        take_step(bank.data, lost, update, rate, self.options.decay, *decay)
