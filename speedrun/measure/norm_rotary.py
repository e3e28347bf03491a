# Tangled from notebooks/17_norm_and_rotary.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.kernels.rotary import norm_rotary_backward_op, norm_rotary_op


# %% The measurement
import dataclasses
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from speedrun.config import vary
from speedrun.lab.bench import KINDS, bench, ledger
from speedrun.lab.errors import UserError
from speedrun.lab.provenance import stamp
from speedrun.measure.runs import corpus_of, relative_error
from speedrun.model.mlp import rms_norm
from speedrun.model.rotary import RotaryConfig, apply_rotary, rotary_tables
from speedrun.presets import preset

NAMES = ()
ON_GPUS = ("kernels", "ledger")  # ledger: the folder of a corpus
SHAPES = (16_384, 32_768, 49_152, 65_536)  # tokens of record_200m's forward passes
HEADS, HEAD_DIM = 6, 128


def drawn_heads(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """qkv (tokens, 2304) bfloat16, cosines and sines (tokens, 64) of random places below 2,048, and gradients of q, k and v; on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    draw = partial(torch.randn, device="cuda", generator=generator)
    places = torch.randint(0, 2048, (tokens,), device="cuda", generator=generator)
    tables = rotary_tables(2048, HEAD_DIM, RotaryConfig("half_rope", 1024.0))
    cos, sin = (table.cuda()[places] for table in tables)
    grads = [draw(tokens, HEADS, HEAD_DIM).bfloat16() for _ in range(3)]
    return draw(tokens, 3 * HEADS * HEAD_DIM).bfloat16(), cos, sin, grads


def separate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> list[Tensor]:
    """Chapter 05's norm and chapter 06's rotation: q, k and v, (tokens, heads, head_dim)."""
    q, k, v = qkv.view(1, len(qkv), 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k = (apply_rotary(rms_norm(each), cos, sin) for each in (q, k))
    return [each[0].transpose(0, 1).to(v.dtype).contiguous() for each in (q, k, v)]


def rotary_versions(qkv: Tensor, cos: Tensor, sin: Tensor, grads: list[Tensor]) -> dict[str, Callable[[], list[Tensor]]]:  # fmt: skip
    """q, k, v and the gradient of qkv, by each version."""
    compiled = torch.compile(separate, dynamic=False, fullgraph=True)
    leaf = qkv.detach().requires_grad_()

    def plain() -> list[Tensor]:
        out = compiled(leaf, cos, sin, HEADS)
        return [*out, *torch.autograd.grad(out, leaf, grads)]

    def fused() -> list[Tensor]:
        q, k, v, factors = norm_rotary_op(qkv, cos, sin, HEADS)
        return [q, k, v, norm_rotary_backward_op(grads, q, k, factors, cos, sin)]

    return {"plain": plain, "fused": fused}


def measure_kernels() -> dict[str, Any]:
    """Times of both versions, of the kernels and of a copy of qkv; errors against float64."""
    found: dict[str, list] = {"rows": [], "errors": []}
    for tokens in SHAPES:
        qkv, cos, sin, grads = drawn_heads(tokens)
        calls: dict[str, Callable] = {**rotary_versions(qkv, cos, sin, grads)}
        q, k, _, factors = norm_rotary_op(qkv, cos, sin, HEADS)
        other, compiled = torch.empty_like(qkv), torch.compile(separate, dynamic=False)
        calls |= {
            "plain forward": partial(compiled, qkv, cos, sin, HEADS),
            "forward": partial(norm_rotary_op, qkv, cos, sin, HEADS),
            "backward": partial(norm_rotary_backward_op, grads, q, k, factors, cos, sin),
            "copy": partial(other.copy_, qkv),
        }
        for name, took in bench(calls, "cuda", 15, cold=True, graph=True).items():
            found["rows"].append({"name": name, "tokens": tokens} | took._asdict())
            print(found["rows"][-1], flush=True)
        torch._dynamo.reset()  # it compiles a function only so many times
    qkv, cos, sin, grads = drawn_heads(4096)
    leaf = qkv.double().requires_grad_()
    exact = separate(leaf, cos.double(), sin.double(), HEADS)
    known = [*exact, *torch.autograd.grad(exact, leaf, [each.double() for each in grads])]
    for name, call in rotary_versions(qkv, cos, sin, grads).items():
        errors = [relative_error(a, b) for a, b in zip(call(), known)]
        found["errors"].append({"name": name} | dict(zip(("q", "k", "v", "dqkv"), errors)))
    return found


HEAD = {"model.head.fp8": False}
ARMS: dict[str, dict[str, Any]] = {  # what is left out of record_200m, one thing more in each line
    "all": {},
    "without the kernel": {},
    "and the MLP in bfloat16": {"model.block.fp8": False},
    "and the head in bfloat16, all words": {"model.block.fp8": False, **HEAD},
}
RECORD_KINDS = {
    "MLP": r"hidden_kernel",
    "norm and rotary": r"norm_rotary",
    "quantising": r"quantize_kernel",
    "head": r"head_kernel|target_kernel|dx_kernel|softmax|nll_loss|cross_entropy|log_sum",
    "attention": r"^(?:forward|delta|dkv|dq)_kernel",
}
RECORD_KINDS |= {kind: name for kind, name in KINDS.items() if kind not in RECORD_KINDS}


def separate_op(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> list[Tensor]:
    """In the operator's place, what the compiler makes of `separate`."""
    return [*separate(qkv, cos, sin, heads), cos]


def ledger_of(arm: str, folder: str, step: int = 500) -> dict[str, Any]:
    """Milliseconds by kind of one forward and backward pass of record_200m on one GPU, at a step of its third stage; memory in MiB."""
    from speedrun.train import accumulate, build_run

    changes: dict[str, Any] = {"data.path": folder, "data.max_forward_tokens": 49_152} | ARMS[arm]
    base, bf16_head = preset("record_200m"), "model.head.fp8" in ARMS[arm]
    if bf16_head:
        stages = tuple(dataclasses.replace(each, candidates=0) for each in base.schedule.stages)
        changes["schedule.stages"] = stages
    config = vary(base, changes)
    instead = separate_op if arm != "all" else norm_rotary_op
    with (
        tempfile.TemporaryDirectory() as scratch,
        mock.patch("speedrun.model.gpt.norm_rotary_op", instead),
    ):
        run = build_run(config, Path(scratch), echo=None)
        now = run.schedule.at(step)
        batch = run.loader.next(now.batch_tokens, now.max_doc_tokens)[0]
        few = None if bf16_head else torch.tensor([now.candidates, 1])
        record = partial(run.recorder, now.stage)
        told = run.ranks.device, config.precision, run.attn_settings[now.stage], few
        torch.cuda.reset_peak_memory_stats()
        one_pass = partial(accumulate, run.forward, [batch], 8, *told, record=record)
        one_pass()
        run.recorder.recording = True
        found = ledger(one_pass, "cuda", 3, RECORD_KINDS)
        peak = torch.cuda.max_memory_allocated() >> 20
    return {
        "arm": arm,
        "tokens": batch.inputs.numel(),
        "candidates": now.candidates,
        "ms": found,
        "peak_mib": peak,
    }


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """kernels: times and errors. ledger: where a forward and backward pass's time goes, with and without each kernel; its argument the folder of a corpus."""
    if not torch.cuda.is_available():
        raise UserError(f"{name} needs a GPU", "run it on an NVIDIA GPU")
    modules = ["speedrun.measure.norm_rotary"]
    if name == "kernels":
        return measure_kernels(), stamp(command, modules, 1, [0])
    if not arguments:
        raise UserError("no corpus is given for ledger", "python scripts/measure.py norm_rotary ledger data/fineweb10B")  # fmt: skip
    rows = []
    for arm in ARMS:
        rows.append(ledger_of(arm, arguments[0]))
        print(rows[-1], flush=True)
        torch._dynamo.reset()
    corpus = corpus_of(vary(preset("record_200m"), {"data.path": arguments[0]}))
    return {"rows": rows}, stamp(command, [*modules, "speedrun.train"], 1, [0], corpus)
