# Tangled from notebooks/13_muon.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Polar Express: minimax polynomials
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from speedrun.lab.bounds import Beta, NonNegativeFloat, PositiveFloat
from speedrun.optim.newton_schulz import apply_odd_polynomials, nesterov_momentum
from speedrun.optim.newton_schulz import newton_schulz, polar_factor
from speedrun.params import ParamSpec


POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(
    g: Tensor,
    iterations: int = 5,
    dtype: torch.dtype = torch.bfloat16,
    gram: bool = False,
    product: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Nearly the polar factor of each matrix in g, (…, rows, cols) → the same shape, in `dtype`.

    The polynomials are Amsel and others' for singular values above 1/1000 of the Frobenius norm, with record 38's margins.
    gram: by way of the Gram matrix, for g of three dimensions; restarted once for long matrices, and after every
    polynomial for others. product: as in `gram_newton_schulz`.
    """
    x = g.float() if dtype == torch.float16 else g.to(dtype)  # a small gradient is none in float16
    x = (x / (1.02 * torch.linalg.matrix_norm(x, keepdim=True) + 1e-6)).to(dtype)
    last = POLAR_EXPRESS[-1:] * max(0, iterations - len(POLAR_EXPRESS))
    polynomials = (*POLAR_EXPRESS[:iterations], *last)
    if not gram:
        return apply_odd_polynomials(x, polynomials)
    long = max(x.shape[-2:]) > 1.5 * min(x.shape[-2:])
    return gram_newton_schulz(x, polynomials, 3 if long else 1, product or whole_product)


# %% Gram Newton–Schulz
def whole_product(a: Tensor, b: Tensor, c: Tensor | None = None, alpha=1.0, beta=0.0) -> Tensor:
    """alpha · a b + beta · c for stacks of matrices, (matrices, …, …); a b without c."""
    return a @ b if c is None else torch.baddbmm(c, a, b, beta=beta, alpha=alpha)


def gram_newton_schulz(
    x: Tensor,
    polynomials: Sequence[tuple[float, float, float]],
    restart: int = 3,
    product: Callable[..., Tensor] = whole_product,
) -> Tensor:
    """The result of `apply_odd_polynomials` for x, (matrices, rows, cols), computed on the Gram matrix of its short side.

    restart: after so many polynomials x is multiplied out, and the Gram matrix computed anew; each time takes two
    products with x itself. product: computes all those whose results are symmetric but for rounding; if it mirrors a half, restart by two (chapter 31). Shape and dtype stay.
    """
    tall, restart = x.shape[-2] > x.shape[-1], max(1, restart)
    for begin in range(0, len(polynomials), restart):
        part = polynomials[begin : begin + restart]
        gram = x.mT @ x if tall else product(x, x.mT)
        q = torch.eye(len(gram[0]), dtype=x.dtype, device=x.device).expand_as(gram)
        for n, (a, b, c) in enumerate(part):
            z = product(gram, gram, gram, c, b)
            q = product(z, q, q, 1.0, a) if n else torch.add(z, q, alpha=a)
            if n < len(part) - 1:  # p(gram) · gram · p(gram): these commute, but for rounding
                half = product(z, gram, gram, 1.0, a)
                gram = product(z, half, half, 1.0, a)
        x = x @ q if tall else q @ x
    return x


# %% NorMuon: normalising rows
def normuon_normalize(
    update: Tensor, second_momentum: Tensor, beta2: float, skip: Tensor | None
) -> Tensor:
    """NorMuon: divide each row of update, (matrices, rows, cols), by the root of its second moment, then give the matrix its old Frobenius norm.

    second_momentum ← beta2 · second_momentum + (1 − beta2) · mean(row²), (matrices, rows, 1), in place; of columns,
    (matrices, 1, cols), where these are more. skip: device flag; if not zero it stays. Returns float32.
    """
    u = update.float()
    square = u.square().mean(-1 if second_momentum.shape[-1] == 1 else -2, keepdim=True)
    square = square.to(second_momentum.dtype)
    if skip is not None:
        square = torch.where(skip > 0, second_momentum, square)
    second_momentum.lerp_(square, 1 - beta2)
    even = u * second_momentum.clamp_min(1e-10).rsqrt()
    length, now = (torch.linalg.matrix_norm(x, keepdim=True) for x in (u, even))
    return even * (length / now.clamp_min(1e-10))


# %% Cautious weight decay
def cautious_decay(p: Tensor, update: Tensor, decay: float | Tensor) -> Tensor:
    """update + decay · p · [update · p ≥ 0], all of one shape: decay only where the step makes a weight smaller anyway."""
    return update + decay * p * (update * p >= 0)


# %% bfloat16 weights with a 16-bit mantissa buffer
def split_bf16(whole: Tensor) -> tuple[Tensor, Tensor]:
    """float32 of any shape → the nearest bfloat16, and the rest of the mantissa, int16, with which `join_bf16` gives back every bit."""
    bits = whole.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_bf16(rounded: Tensor, mantissa: Tensor) -> Tensor:
    """The float32 that `split_bf16` took apart, bit by bit: rounded · 2¹⁶ + mantissa, on integers."""
    return ((rounded.view(torch.int16).to(torch.int32) << 16) + mantissa).view(torch.float32)


# %% The Muon step
@dataclass(frozen=True)
class MuonConfig:
    """Muon. With the defaults it is record 4's; what later records made of it is off."""

    momentum: Beta = 0.95
    """Coefficient of the gradients' average; with schedule.momentum_min its highest value."""
    nesterov: bool = True
    """Mix the newest gradient in once more."""
    ns_steps: Annotated[int, Interval(ge=0, le=100)] = 5
    """Newton–Schulz iterations; 0: the exact polar factor, from a singular value decomposition."""
    orthogonalizer: Literal["quintic", "polar_express"] = "quintic"
    """quintic: one polynomial again and again. polar_express: each the best for what the last one left."""
    ns_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """polar_express: what is multiplied. float16: by way of the Gram matrix, which is cheaper."""
    beta2: Beta = 0.0
    """NorMuon: decay of the rows' second moment; 0: off."""
    weight_decay: NonNegativeFloat = 0.0
    """Decay, as a multiple of the learning rate; with decay_with_lr, of its square."""
    decay_with_lr: bool = False
    """Decay a weight by weight_decay · rate², times the matrix's own multiple of the rate; and not by weight_decay · rate."""
    cautious: bool = False
    """Decay a weight only where the step makes it smaller anyway."""
    scale_by_shape: bool = True
    """The rate of a matrix of more rows than columns is larger by sqrt(rows / cols)."""
    down_lr_mul: PositiveFloat = 1.0
    """Multiple of the rate of mlp_down, the wide matrix."""
    param_dtype: Literal["float32", "bfloat16", "bf16_mantissa"] = "float32"
    """What the matrices are in the model. bf16_mantissa: bfloat16, and the optimizer keeps the other 16 bits of the mantissa."""


def matrix_lr_mul(spec: ParamSpec, config: MuonConfig) -> float | tuple[float, ...]:
    """Multiple of Muon's learning rate for a parameter, or several, for a slice's matrices in turn: the spec's, with the scale for its shape."""
    if isinstance(spec.lr_mul, tuple):
        return spec.lr_mul
    scale = spec.shape_scale if config.scale_by_shape else 1.0
    return spec.lr_mul * (config.down_lr_mul if spec.name == "mlp_down" else scale)


def apply_update(
    p: Tensor,
    mantissa: Tensor | None,
    update: Tensor,
    lr: float | Tensor,
    decay: float | Tensor,
    cautious: bool,
) -> None:
    """p ← p − lr · (update + decay · p), in place, computed in float32; cautious: decay only where update · p ≥ 0.

    p: float32 or bfloat16. mantissa: int16, the other bits of p, which change with it, or None; then p is rounded.
    """
    whole = p if p.dtype != torch.bfloat16 else p.float()
    whole = whole if mantissa is None else join_bf16(p, mantissa)
    if cautious:
        whole.sub_(lr * cautious_decay(whole, update.float(), decay))
    else:
        whole.mul_(1 - lr * decay).sub_(lr * update)
    if p.dtype == torch.bfloat16:
        rounded, missing = split_bf16(whole)
        p.copy_(rounded)
        if mantissa is not None:
            mantissa.copy_(missing)


def orthogonalize(g: Tensor, config: MuonConfig) -> Tensor:
    """Nearly the polar factor of each matrix in g, (matrices, rows, cols), by the config's polynomials; with ns_steps=0 the exact one.

    In the dtype in which the polynomials multiply.
    """
    if not config.ns_steps:
        return polar_factor(g)
    if config.orthogonalizer == "polar_express":
        dtype, gram = getattr(torch, config.ns_dtype), config.ns_dtype == "float16"
        return polar_express(g, config.ns_steps, dtype, gram)
    return newton_schulz(g, config.ns_steps)


def muon_state(p: Tensor, config: MuonConfig) -> dict[str, Tensor]:
    """Muon's state for matrices p, (matrices, rows, cols): momentum_buffer of that shape, float32; if they are used,
    second_momentum_buffer, (matrices, rows, 1) or (matrices, 1, cols), float32, and mantissa, int16.
    """
    state = {"momentum_buffer": torch.zeros_like(p, dtype=torch.float32)}
    if config.beta2:
        one = p[:, :, :1] if p.shape[1] >= p.shape[2] else p[:, :1, :]
        state["second_momentum_buffer"] = torch.zeros_like(one, dtype=torch.float32)
    if config.param_dtype == "bf16_mantissa":
        state["mantissa"] = torch.zeros_like(p, dtype=torch.int16)
    return state


def muon_step(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    lr: float | Tensor,
    lr_mul: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float,
    config: MuonConfig,
    skip: Tensor | None = None,
) -> None:
    """p ← p − lr · (lr_mul · O + d · p) for matrices p with gradient g, (matrices, rows, cols), in place, with their state.

    O: the normalised, orthogonalised momentum. d: weight_decay, or with decay_with_lr weight_decay · lr · lr_mul.
    lr_mul: one for all, or (matrices, 1, 1). skip: device flag; if it is not zero nothing changes, without host sync.
    """
    buffer = state["momentum_buffer"]
    update = nesterov_momentum(g.float(), buffer, momentum, config.nesterov, skip)
    update = orthogonalize(update, config)
    if config.beta2:
        second = state["second_momentum_buffer"]
        update = normuon_normalize(update, second, config.beta2, skip)
    update = (update * lr_mul).to(update.dtype)
    lr = lr if skip is None else lr * (1 - skip)
    decay = weight_decay * lr * lr_mul if config.decay_with_lr else weight_decay
    apply_update(p, state.get("mantissa"), update, lr, decay, config.cautious)
