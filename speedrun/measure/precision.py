# Tangled from notebooks/15_low_precision.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.kernels.fp8 import E4M3, E5M2, fp8_matmul, quantize, scale_of


# %% How to find out what each costs in loss
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from speedrun.config import Config, vary
from speedrun.kernels import loss as head
from speedrun.kernels.head_bf16 import bf16_form
from speedrun.lab.results import load_result, result_names
from speedrun.measure.study import runs_of
from speedrun.model import gpt
from speedrun.presets import preset

FACTORS = ("head", "mlp", "qkv", "sampled")
NAMESPACE = __name__.strip("_").replace(".", "_")  # the notebook's operator is not the package's


def arms() -> dict[str, set[str]]:
    """Half of the sixteen combinations, those with an odd number of factors on: each alone, and all but each.

    head, mlp, qkv: products in eight bits. sampled: the softmax over candidates in the first stages. An effect is four runs against four, and clear of what two factors do together.
    """
    alone = {f"only_{one}": {one} for one in FACTORS}
    return alone | {f"all_but_{one}": {*FACTORS} - {one} for one in FACTORS}


def config_of(on: set[str]) -> Config:
    """The run of a combination; what no option switches is patched in by `around`."""
    base = preset("record_200m")
    stages = tuple(replace(s, candidates=0) for s in base.schedule.stages)
    changes: dict[str, Any] = {} if "sampled" in on else {"schedule.stages": stages}
    # passes half as long as the preset's: in sixteen bits they keep more
    changes |= {"model.block.fp8": "mlp" in on, "data.max_forward_tokens": 32_768}
    return vary(base, changes)


def study() -> dict[str, Config]:
    """`record_200m` with products in eight bits and the sampled softmax on and off, a half-fraction factorial, with each of two seeds."""
    return runs_of({arm: config_of(on) for arm, on in arms().items()}, (0, 1))


@torch.library.custom_op(f"{NAMESPACE}::linear", mutates_args=())
def linear_op(x: Tensor, w: Tensor) -> list[Tensor]:
    """x wᵀ in eight bits, (tokens, rows) in x's dtype; then what the backward pass needs. x: (tokens, width), each row of root mean square 1. w: (rows, width)."""
    of_x = x.new_full((1,), math.sqrt(x.shape[1]) / torch.finfo(E4M3).max, dtype=torch.float32)
    of_w = scale_of(w)
    x8, x8t = quantize(x, of_x, turned=True)
    w8, w8t = quantize(w, of_w, turned=True)
    return [fp8_matmul(x8, w8, of_x, of_w, x.dtype), x8t, w8t, of_x, of_w]


@linear_op.register_fake
def fake_linear(x, w):
    (tokens, width), rows, one = x.shape, len(w), x.new_empty(1, dtype=torch.float32)
    eight = [x.new_empty(shape, dtype=E4M3) for shape in ((width, tokens), (width, rows))]
    return [x.new_empty(tokens, rows), *eight, one, torch.empty_like(one)]


@torch.library.custom_op(f"{NAMESPACE}::linear_backward", mutates_args=())
def linear_backward_op(grad: Tensor, of_grad: Tensor, saved: list[Tensor]) -> list[Tensor]:
    """Gradients of x and w, in grad's dtype, from the output's, (tokens, rows), which goes to e5m2 over its scale."""
    x8t, w8t, of_x, of_w = saved
    grad8, grad8t = quantize(grad, of_grad, E5M2, turned=True)
    dx = fp8_matmul(grad8, w8t, of_grad, of_w, grad.dtype)
    return [dx, fp8_matmul(grad8t, x8t, of_grad, of_x, grad.dtype)]


@linear_backward_op.register_fake
def fake_linear_backward(grad, of_grad, saved):
    (width, tokens), (_, rows) = saved[0].shape, saved[1].shape
    return [grad.new_empty(tokens, width), grad.new_empty(rows, width)]


def linear_gradients(ctx: Any, grads: list[Tensor]) -> tuple:
    """By `linear_backward_op`, with the scale of this very gradient, not an earlier one's."""
    grad = grads[0].contiguous()
    of_grad = (grad.abs().amax().float() / torch.finfo(E5M2).max).clamp(min=1e-12).reshape(1)
    return tuple(linear_backward_op(grad, of_grad, list(ctx.saved_tensors)))


def keep_linear(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ctx.save_for_backward(*output[1:])


linear_op.register_autograd(linear_gradients, setup_context=keep_linear)
plain_linear = gpt.linear


def linear_in_eight(x: Tensor, weights: Any, name: str) -> Tensor:
    """The model's linear maps, in training that of queries, keys and values in eight bits."""
    if name != "attention_qkv" or not torch.is_grad_enabled():
        return plain_linear(x, weights, name)
    w = weights[name]
    return linear_op(x.flatten(0, -2).to(w.dtype), w)[0].view(*x.shape[:-1], len(w))


@contextmanager
def around(name: str) -> Iterator[None]:
    """What a run of the study is trained under: its products where no option of the model switches them."""
    on = arms()[name.rpartition("_")[0]]
    with ExitStack() as patches:
        if "qkv" in on:
            patches.enter_context(patch.object(gpt, "linear", linear_in_eight))
        if "head" not in on:
            patches.enter_context(patch.object(head, "head_form", bf16_form))
        yield


def finished() -> dict[str, dict]:
    """The runs of the study that have been made, by name."""
    made = result_names("precision")
    return {name: load_result("precision", name)["data"]["runs"][0] for name in study() if name in made}  # fmt: skip


def effects(number: Callable[[dict], float]) -> dict[str, tuple[float, float]]:
    """What each factor adds to a number of the runs, averaged over the others, and half of a 95% interval around it.

    Least squares of a mean for each seed and four effects; what they leave unexplained is taken as noise, interactions included (Student's t). Seeds that
    are not complete are left out.
    """
    from scipy.stats import t

    runs, sets = finished(), arms()
    seeds = [s for s in ("0", "1") if all(f"{arm}_{s}" in runs for arm in sets)]
    rows = [(arm, seed) for seed in seeds for arm in sets]
    means = np.array([[float(seed == s) for s in seeds] for _, seed in rows])
    signs = np.array([[1.0 if one in sets[arm] else -1.0 for one in FACTORS] for arm, _ in rows])
    values = np.array([number(runs[f"{arm}_{seed}"]) for arm, seed in rows])
    design = np.hstack([means, signs])
    fit = np.linalg.lstsq(design, values)[0]
    free, left = len(values) - len(fit), values - design @ fit
    half = t.ppf(0.975, free) * 2 * math.sqrt(left @ left / free / len(values))
    return {one: (2 * each, half) for one, each in zip(FACTORS, fit[len(seeds) :].tolist())}
