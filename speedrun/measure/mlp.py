# Tangled from notebooks/18_fused_mlp.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.kernels.mlp import (
    Blocks,
    LARGE_SHARED,
    hidden_layer,
    launch_hidden,
    mlp_backward_op,
    mlp_op,
    mlp_scales,
)


# %% The measurement
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from speedrun.kernels.fp8 import E4M3, E5M2, fp8_matmul, quantize, scale_of
from speedrun.lab.bench import bench
from speedrun.lab.errors import UserError
from speedrun.lab.provenance import stamp
from speedrun.measure.runs import config_of_run, relative_error

NAMES = ()
ON_GPUS = ("kernels", "trained")  # trained: the folder of a finished run, anywhere
SHAPES = (16_384, 32_768, 49_152, 65_536)  # tokens of record_200m's forward passes
WIDTH, HIDDEN = 768, 3072
BF16_BLOCKS = Blocks(128, 256, 64, 8, 4), Blocks(128, 256, 64, 8, 3)


def drawn_mlp(tokens: int, zero: bool = False, seed: int = 0) -> list[Tensor]:
    """x (tokens, 768) bfloat16 of unit mean square, up and down float32, and the output's gradient, whose rows differ by orders of magnitude; on the GPU. zero: down is, as at step 0."""
    generator = torch.Generator("cuda").manual_seed(seed)
    draw = partial(torch.randn, device="cuda", generator=generator)
    x = F.rms_norm(draw(tokens, WIDTH), (WIDTH,)).bfloat16()
    up, down = 0.03 * draw(HIDDEN, WIDTH), (0.0 if zero else 0.03) * draw(WIDTH, HIDDEN)
    return [x, up, down, (1e-5 * draw(tokens, WIDTH) * draw(tokens, 1).exp()).bfloat16()]


def exact_mlp(x: Tensor, up: Tensor, down: Tensor, grad: Tensor) -> list[Tensor]:
    """The output and the three gradients, in the arguments' dtype."""
    leaves = [each.detach().requires_grad_() for each in (x, up, down)]
    y = F.linear(F.relu(F.linear(leaves[0], leaves[1])).square(), leaves[2])
    return [y, *torch.autograd.grad(y, leaves, grad)]


def plain_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Chapter 05's MLP, in bfloat16."""
    with torch.autocast("cuda", torch.bfloat16):
        return F.linear(F.relu(F.linear(x, up)).square(), down)


def fused_bfloat16(x: Tensor, up: Tensor, down: Tensor, grad: Tensor) -> list[Tensor]:
    """Version 2: the kernel's epilogues in bfloat16, the other four products by cuBLAS."""
    one, bf16 = x.new_ones(1, dtype=torch.float32), torch.bfloat16
    up, down = up.bfloat16(), down.bfloat16()
    square, _ = launch_hidden(x, up, (one, one, one, one), bf16, None, False, BF16_BLOCKS[0], True)
    told = (one, one, one, one), bf16, square, False, BF16_BLOCKS[1], True
    hidden, _ = launch_hidden(grad, down.mT.contiguous(), *told)
    return [square @ down.mT, hidden @ up, hidden.mT @ x, grad.mT @ square]


def fp8_mlp(x: Tensor, up: Tensor, down: Tensor, grad: Tensor) -> list[Tensor]:
    """Version 3: all products in eight bits."""
    scales = mlp_scales(up[None], down[None])[0]
    y, *saved = mlp_op(x, up, down, scales)
    return [y, *mlp_backward_op(grad, scale_of(grad, E5M2), saved, scales)]


def mlp_versions(x: Tensor, up: Tensor, down: Tensor, grad: Tensor) -> dict[str, Callable[[], list[Tensor]]]:  # fmt: skip
    """Output and gradients by each version."""
    leaves = [each.detach().requires_grad_() for each in (x, up, down)]
    compiled = torch.compile(plain_mlp, dynamic=False, fullgraph=True)

    def plain() -> list[Tensor]:
        y = compiled(*leaves)
        return [y, *torch.autograd.grad(y, leaves, grad)]

    given = x, up, down, grad
    return {"plain": plain, "fused": partial(fused_bfloat16, *given), "fp8": partial(fp8_mlp, *given)}  # fmt: skip


def parts_of(x: Tensor, up: Tensor, down: Tensor, grad: Tensor) -> dict[str, Callable[[], Any]]:
    """What version 3 consists of; and the kernels in other blocks."""
    of_x, of_up, of_down, of_square, of_hidden = (s[:1] for s in mlp_scales(up[None], down[None])[0])  # fmt: skip
    of_grad = scale_of(grad, E5M2)
    x8, x8t = quantize(x, of_x, turned=True)
    up8, up8t = quantize(up, of_up, turned=True)
    down8, down8t = quantize(down, of_down, turned=True)
    grad8, grad8t = quantize(grad, of_grad, E5M2, turned=True)
    forward = x8, up8, (of_x, of_up, of_up, of_square), E4M3, None, True
    square, squaret = launch_hidden(*forward, LARGE_SHARED[0], True)
    backward = grad8, down8t, (of_grad, of_down, of_square, of_hidden * of_grad), E5M2, square, True
    hidden, hiddent = launch_hidden(*backward, LARGE_SHARED[1], True)
    found: dict[str, Callable[[], Any]] = {
        "quantise x": lambda: quantize(x, of_x, turned=True),
        "quantise weights": lambda: [quantize(w, of_up, turned=True) for w in (up, down)],
        "scale of the gradient": lambda: scale_of(grad, E5M2),
        "quantise the gradient": lambda: quantize(grad, of_grad, E5M2, turned=True),
        "x up": lambda: fp8_matmul(x8, up8, of_x, of_up, torch.bfloat16),
        "square down": lambda: fp8_matmul(square, down8, of_square, of_down, torch.bfloat16),
        "dx": lambda: fp8_matmul(hidden, up8t, of_hidden, of_up, torch.bfloat16),
        "dup": lambda: fp8_matmul(hiddent, x8t, of_hidden, of_x, torch.bfloat16),
        "ddown": lambda: fp8_matmul(grad8t, squaret, of_grad, of_square, torch.bfloat16),
    }
    tried = [*LARGE_SHARED, Blocks(128, 256, 128, 8, 3), Blocks(128, 128, 128, 8, 3, 2), Blocks(256, 128, 128, 8, 3)]  # fmt: skip
    tried += [Blocks(64, 256, 64, 4, 4, 2), LARGE_SHARED[0]._replace(programs=1)]
    launch: Callable[..., Any] = launch_hidden
    for way, told in (("forward", forward), ("backward", backward)):
        for blocks in tried:
            found[f"{way} {tuple(blocks)}"] = partial(launch, *told, blocks, True)
    of_forward = forward[2]
    found["forward straight"] = partial(launch_hidden, x8, up8, of_forward, E4M3, None, False, LARGE_SHARED[0], True)  # fmt: skip
    return found


def measure_kernels() -> dict[str, Any]:
    """Times of versions and parts, and the versions' errors against float64."""
    found: dict[str, list] = {"rows": [], "errors": []}
    for tokens in SHAPES:
        given = drawn_mlp(tokens)
        calls = mlp_versions(*given) | (parts_of(*given) if tokens == 49_152 else {})
        for name, took in bench(calls, "cuda", 15, cold=True, graph=True).items():
            found["rows"].append({"name": name, "tokens": tokens} | took._asdict())
            print(found["rows"][-1], flush=True)
    for zero in (False, True):
        given = drawn_mlp(4096, zero)
        known = exact_mlp(*(each.double() for each in given))
        for name, call in mlp_versions(*given).items():
            pairs = zip(("y", "dx", "dup", "ddown"), call(), known)
            errors = {key: relative_error(a, b) if b.any() else a.abs().max().item() for key, a, b in pairs}  # fmt: skip
            found["errors"].append({"name": name, "zero": zero} | errors)
    return found


def exponents(values: Tensor) -> dict[str, Any]:
    """How often each power of two occurs among magnitudes, from 2^-17 to 2^16, how many are 0, and the largest."""
    sizes = values.float().abs()
    powers = torch.floor(torch.log2(sizes[sizes > 0])).clamp(-17, 16).int() + 17
    counts = torch.bincount(powers, minlength=34).tolist()
    return {"zero": int((sizes == 0).sum()), "counts": counts, "largest": sizes.max().item()}


def hidden_of_run(folder: Path) -> dict[str, Any]:
    """What the kernel writes in a finished run's layers, forward and backward, on a micro-batch of its last stage: in eight bits, so over its scale."""
    from speedrun.train import build_run, forward_loss, resume

    config, rows = config_of_run(folder), list[dict[str, Any]]()

    def recorded(
        a: Tensor, w: Tensor, scales: tuple, kind: torch.dtype, square: Any = None
    ) -> tuple:
        out = hidden_layer(a, w, scales, kind, square)
        way = "forward" if square is None else "backward"
        rows.append({"pass": way, "operand": exponents(a)} | exponents(out[0]))
        return out

    module = sys.modules[hidden_layer.__module__]
    with (
        tempfile.TemporaryDirectory() as scratch,
        mock.patch.object(module, "hidden_layer", recorded),
    ):
        run = build_run(config, Path(scratch), echo=None)
        run.folder = folder
        resume(run)
        now = run.schedule.at(config.steps - 1)
        batch = run.loader.next(now.batch_tokens, now.max_doc_tokens)[0]
        told = run.attn_settings[now.stage], torch.tensor([0, 1])
        loss = forward_loss(run.model, batch, run.ranks.device, config.precision, *told)
        (loss / config.data.micro_batches).backward()
    return {"layers": rows, "tokens": batch.targets.numel(), "loss": loss.item()}


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """kernels: times and errors. trained: which numbers a finished run's hidden layers hold; its argument the run's folder."""
    modules = ["speedrun.measure.mlp"]
    if name == "kernels" and not torch.cuda.is_available():
        raise UserError(f"{name} needs FP8 matrix units", "run it on an NVIDIA GPU")
    if name == "kernels":
        return measure_kernels(), stamp(command, modules, 1, [0])
    if not arguments:
        raise UserError("no run is given for trained", "python scripts/measure.py mlp trained runs/…")  # fmt: skip
    seed = config_of_run(Path(arguments[0])).seed
    return hidden_of_run(Path(arguments[0])), stamp(command, [*modules, "speedrun.train"], 1, [seed])  # fmt: skip
