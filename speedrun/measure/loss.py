# Tangled from notebooks/19_head_and_loss.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.kernels.head_bf16 import bf16_form
from speedrun.kernels.head_reference import head_loss_by_hand
from speedrun.kernels.loss import (
    CAP,
    LARGE_SHARED,
    SHIFT,
    SLOPE,
    choose_candidates,
    head_loss_fused,
    head_loss_op,
    launch_head,
)


# %% The measurement
import importlib.metadata
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from speedrun.kernels.fp8 import E4M3, E5M2, fp8_matmul, quantize, scale_of

from speedrun.lab.bench import bench
from speedrun.lab.errors import UserError
from speedrun.lab.provenance import stamp
from speedrun.measure.runs import config_of_run, relative_error
from speedrun.model.head import loss_of

NAMES = ()
ON_GPUS = ("kernels", "sampled")  # sampled: the folder of a finished run
SHAPES = ((16_384, 10_240), (32_768, 10_240), (49_152, 16_384))  # record_200m's tokens, candidates
VOCABULARY, MODEL_DIM = 50_304, 768


def trained_looking(tokens: int, std: float = 0.15, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors (tokens, 768) bfloat16 of unit mean square, a head (768, 50304) float32, and targets drawn from their softmax; on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    drawn = torch.randn(tokens, MODEL_DIM, device="cuda", generator=generator)
    x = F.rms_norm(drawn, (MODEL_DIM,)).bfloat16()
    w = std * torch.randn(MODEL_DIM, VOCABULARY, device="cuda", generator=generator)
    targets = []
    for part in x.split(2048):
        z = part.float() @ w
        p = (CAP * torch.sigmoid((z + SHIFT) / SLOPE)).softmax(1)
        targets.append(torch.multinomial(p, 1, generator=generator)[:, 0])
    return x, w, torch.cat(targets)


def plain_loss(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Chapter 08's loss, in bfloat16."""
    with torch.autocast("cuda", torch.bfloat16):
        return loss_of(x @ w, targets, "sigmoid23")


def loss_and_gradient(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of stored logits, and its gradient in e5m2, times 2^9 and the tokens, in both layouts."""
    s = torch.sigmoid((z.float() + SHIFT) / SLOPE)
    p, own = torch.softmax(CAP * s, 1), F.one_hot(targets, z.shape[1])
    g = (p - own) * s * (1 - s) * (512 * CAP / SLOPE)
    loss = F.cross_entropy(CAP * s, targets)
    g = g.clamp(-57344, 57344).to(E5M2)
    return loss, g, g.T.contiguous()


def two_passes(x: Tensor, w: Tensor, targets: Tensor, second: Callable = loss_and_gradient) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss and gradients through stored logits: an FP8 product, and a second pass over what it wrote."""
    sx, sw = scale_of(x), scale_of(w)
    x8, x8t = quantize(x, sx, turned=True)
    w8, w8t = quantize(w, sw, turned=True)
    loss, g, gt = second(fp8_matmul(x8, w8t, sx, sw, torch.bfloat16), targets)
    unit = torch.full_like(sx, 1 / 512 / len(x))
    dx = fp8_matmul(g, w8, unit, sw, x.dtype)
    return loss, dx, fp8_matmul(x8t, gt, sx, unit, torch.float32)


def by_library(name: str, x: Tensor, w: Tensor, targets: Tensor) -> Callable[[], Any] | None:
    """Forward and backward pass of a library's fused head with a softcap of 30 tanh(z / 30); None where it is not installed."""
    leaves = x.detach().requires_grad_(), w.T.contiguous().bfloat16().requires_grad_()
    try:
        if name == "liger":
            module = importlib.import_module("liger_kernel.transformers")
            head = module.LigerFusedLinearCrossEntropyLoss(softcap=30.0)
            loss = lambda: head(leaves[1], leaves[0], targets)  # noqa: E731
        else:
            module = importlib.import_module("cut_cross_entropy")
            loss = lambda: module.linear_cross_entropy(*leaves, targets, softcap=30.0)  # noqa: E731
    except ImportError:
        return None
    return lambda: torch.autograd.grad(loss(), leaves)


def next_three(targets: Tensor) -> tuple[Tensor, Tensor]:
    """For each token the next three words, (tokens, 3), with the weights that record 89 begins with."""
    weights = torch.tensor([1.0, 0.5, 0.25], device=targets.device)
    return torch.stack([targets.roll(-n) for n in range(3)], 1), weights


def versions(x: Tensor, w: Tensor, targets: Tensor, candidates: int) -> dict[str, Callable[[], Any]]:  # fmt: skip
    """Each version's forward and backward pass, by its name. sampled: over so many candidates."""
    leaves = x.detach().requires_grad_(), w.detach().requires_grad_()
    three, weights = next_three(targets)
    compiled = torch.compile(plain_loss, dynamic=False, fullgraph=True)
    second = torch.compile(loss_and_gradient, dynamic=False, fullgraph=True)
    found: dict[str, Callable[[], Any]] = {
        "plain": lambda: torch.autograd.grad(compiled(*leaves, targets), leaves),
        "two passes": partial(two_passes, x, w, targets, second),
        "one pass": partial(head_loss_op, x, w, targets, torch.tensor([0, 1])),
        "sampled": partial(head_loss_op, x, w, targets, torch.tensor([candidates, 1])),
        "three": partial(head_loss_op, x, w, three, torch.tensor([0, 1]), weights),
        "bfloat16": partial(head_loss_fused, x, w, targets, 0, bf16_form(x.device)),
    }
    for name in ("liger", "cce"):
        if call := by_library(name, x, w, targets):
            found[name] = call
    return found


def peak_mib(call: Callable[[], Any]) -> int:
    """What a call needs beside what is there, at its peak, in MiB."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) >> 20


def errors_of(tokens: int = 2048, candidates: int = 10_240) -> list[dict[str, Any]]:
    """Error in the loss (nats), and relative errors of both gradients, of each version against float64; std: of the head's weights, 0 at step 0."""
    found = []
    for std in (0.0, 0.02, 0.15, 0.3):
        x, w, targets = trained_looking(tokens, std)
        for version, call in versions(x, w, targets, candidates).items():
            if version in ("liger", "cce"):  # another softcap
                continue
            to, by = next_three(targets) if version == "three" else (targets, None)
            inside = torch.ones(VOCABULARY, dtype=torch.bool, device="cuda")
            if version == "sampled":
                inside = choose_candidates(targets, VOCABULARY, candidates)[1]
            loss, *known = head_loss_by_hand(x.double(), w.double(), to, inside, 512, by)
            got = (plain_loss(x, w, targets), *call()) if version == "plain" else call()
            row = {"version": version, "std": std, "loss": got[0].item() - loss.item()}
            errors = [relative_error(a, b) if b.any() else 0.0 for a, b in zip(got[1:], known)]
            found.append(row | {"dx": errors[0], "dw": errors[1]})
    return found


def blocks_tried(x: Tensor, w: Tensor) -> dict[str, Any]:
    """Times of the kernel alone, all words, in other block sizes, and with the exact sigmoid."""
    scales, usual = (scale_of(x), scale_of(w)), LARGE_SHARED
    x8 = quantize(x, scales[0], E4M3)[0]
    w8 = quantize(w, scales[1], E4M3, straight=False, turned=True)[1]
    scale = scales[0] * scales[1]
    tried = {
        "as it is": usual,
        "4 warps": usual._replace(warps=4),
        "one program": usual._replace(programs=1),
        "64 rows": usual._replace(rows=64),
        "2 stages": usual._replace(stages=2),
        "256 columns": usual._replace(columns=256, programs=1),
        "exact sigmoid": usual,
    }
    calls = {name: partial(launch_head, x8, w8, scale, blocks, True, name != "exact sigmoid") for name, blocks in tried.items()}  # fmt: skip
    return {name: took._asdict() for name, took in bench(calls, "cuda", 9, cold=True).items()}


def measure_kernels() -> dict[str, Any]:
    """Times, memory and errors of all versions."""
    found = []
    for tokens, candidates in SHAPES:
        x, w, targets = trained_looking(tokens)
        calls = versions(x, w, targets, candidates)
        peaks = {version: (call(), peak_mib(call))[1] for version, call in calls.items()}
        for version, took in bench(calls, "cuda", 15, cold=True).items():
            row = {"version": version, "tokens": tokens, "peak_mib": peaks[version]}
            found.append(row | took._asdict())
            print(found[-1], flush=True)
    names = ("liger-kernel", "cut-cross-entropy")
    there = {n: found.version for n in names for found in importlib.metadata.distributions(name=n)}
    blocks = blocks_tried(x, w)
    return {"rows": found, "errors": errors_of(), "blocks": blocks, "peers": there}


def losses_by_candidates(folder: Path, counts: tuple[int, ...], batches: int = 16) -> dict[str, Any]:  # fmt: skip
    """A trained run's loss on its first validation micro-batches, nats a token, with so many candidates each; 0: all words."""
    from speedrun.train import build_run, forward_loss, val_batches, resume, attn_settings_now

    config = config_of_run(folder)
    with tempfile.TemporaryDirectory() as scratch:
        run = build_run(config, Path(scratch), echo=None)
        run.folder = folder
        resume(run)
        losses: dict[str, list[float]] = {str(count): [] for count in counts}
        targets = []
        with torch.no_grad():
            for _, batch in zip(range(batches), val_batches(run, config.val_tokens)):
                targets.append(len(batch.targets.unique()))
                for count in counts:
                    place, told = run.ranks.device, attn_settings_now(run)
                    loss = forward_loss(run.model, batch, place, config.precision, told, torch.tensor([count, 1]))  # fmt: skip
                    losses[str(count)].append(loss.item())
    return {"losses": losses, "tokens": batch.targets.numel(), "distinct_targets": targets}


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """kernels: times, memory and errors. sampled: losses of a finished run's model by the number of candidates; its argument the run's folder."""
    if not torch.cuda.is_available():
        raise UserError(f"{name} needs FP8 matrix units", "run it on an NVIDIA GPU")
    modules = ["speedrun.measure.loss"]
    if name == "kernels":
        return measure_kernels(), stamp(command, modules, 1, [0])
    if not arguments:
        raise UserError("no run is given for sampled", "python scripts/measure.py loss sampled runs/…")  # fmt: skip
    counts = (1024, 2048, 4096, 8192, 10_240, 14_336, 16_384, 24_576, 32_768, 0)
    data = losses_by_candidates(Path(arguments[0]), counts)
    return data, stamp(command, [*modules, "speedrun.train"], 1, [config_of_run(Path(arguments[0])).seed])  # fmt: skip
