# Tangled from notebooks/11_attention_backends.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.kernels.attention import (
    document_tiles,
    has_bulk_loads,
    launch_backward,
    launch_forward,
)
from speedrun.model.attention import why_not
from speedrun.model.backends import (
    attention_by_document,
    flash_backward_op,
    flash_op,
    gradients_by_document,
)


# %% The problem
import statistics
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speedrun.lab.errors import UserError
from speedrun.lab.provenance import stamp
from speedrun.model.masks import flex_attention_packed

NAMES = ()
ON_GPUS = ("backends",)  # further argument: a FlashAttention-3 library for PyTorch's activation
SHAPES = (  # tokens, longest document, window: record 89's stages, short and long
    (16_384, 896, 128),
    (16_384, 896, 384),
    (32_768, 2048, 384),
    (32_768, 2048, 896),
    (49_152, 2048, 640),
    (49_152, 2048, 1408),
)
HEADS, DIM, SCALE = 6, 128, 0.12
SLOTS = {16_384: 64, 32_768: 96, 49_152: 128}  # as the record pads its bounds


def document_bounds(tokens: int, cap: int, seed: int = 0) -> list[int]:
    """Documents with the contest's lengths (log-normal, median 403, mean 690 before the cap) until they fill a row."""
    generator, ends = np.random.default_rng(seed), [0]
    sigma = (2 * np.log(690 / 403)) ** 0.5
    while ends[-1] < tokens:
        length = generator.lognormal(np.log(403), sigma)
        ends.append(min(tokens, ends[-1] + int(np.clip(length, 32, cap))))
    return ends


def padded_bounds(ends: list[int], slots: int) -> Tensor:
    """Bounds with empty slots at the end, as the loader makes them."""
    return torch.tensor(ends + [ends[-1]] * (slots + 1 - len(ends)), dtype=torch.int32)


# %% The measurement
def kernel_ms(call: Callable[[], Any], graph: bool, repeats: int = 15) -> float:
    """Median time of a call's kernels with a cold cache, in ms. graph: replayed as a CUDA graph, so that no launch is waited for."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    if graph:
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            call()
        call = recorded.replay
    flush, times = torch.empty(2**27, dtype=torch.int32, device="cuda"), []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(4):
            flush.zero_()  # meanwhile Python launches what comes
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def load_flash3(library: str) -> None:
    """Let PyTorch's attention run through a FlashAttention-3 library."""
    torch.ops.load_library(library)
    sys.modules["flash_attn_interface"] = types.ModuleType("flash_attn_interface")
    torch.nn.attention.activate_flash_attention_impl("FA3")


def flash3_passes(q, k, v, grad, ends: Tensor, longest: int, window: int):
    """FlashAttention-3's operator without PyTorch between: a forward and a backward pass. Names as in its C++ interface (hopper/flash_api.cpp)."""
    ops, none = torch.ops.flash_attn_3, (None,) * 9
    sizes, where = (longest, longest), (SCALE, True, window, 0)
    # chunk, softcap, rotary, scheduler, splits, pack, margin
    rest = (0, 0.0, False, None, 1, None, 0)

    def forward():
        # none: k_new, v_new, q_v, out; kv_batch_idx and what follows it
        return ops.fwd(q, k, v, *none[:4], ends, ends, *none[:3], *sizes, *none, *where, *rest)[:2]

    out, sums = forward()

    def backward():
        found = [torch.empty_like(each) for each in (q, k, v)]
        limits = (ends, ends, None, None, *sizes, *where, 0.0, False, 0)
        ops.bwd(grad, q, k, v, out, sums, *found, *limits)
        return found

    return forward, backward


WAYS = {  # of our kernel: tiles by document, none beyond the window, no running maximum, bulk loads, D kept
    "below the diagonal": (False, False, False, False, False),
    "documents": (True, False, False, False, False),
    "window": (True, True, False, False, False),
    "no maximum": (True, True, True, False, False),
    "bulk loads": (True, True, True, True, False),
    "triton online": (True, True, False, True, True),
    "triton": (True, True, True, True, True),
}


def our_passes(way: str, tensors: list[Tensor], cu_seqlens: Tensor, window: int):
    """A form of our kernel: its forward and its backward pass. Bulk loads where the GPU has them."""
    documents, narrow, bounded, bulk, keep = WAYS[way]
    q, k, v, grad = tensors
    tokens, bulk = len(q), bulk and has_bulk_loads(q.device)
    ends = cu_seqlens if documents else cu_seqlens.new_tensor([0, tokens])
    told = (document_tiles(ends, tokens), window if narrow else tokens, SCALE)
    forward = partial(launch_forward, q, k, v, *told, bounded, bulk)
    out, lse = forward()
    return forward, partial(launch_backward, grad, q, k, v, out, lse, *told, keep, bulk)


def passes(backend: str, tensors: list[Tensor], cu_seqlens: Tensor, longest: int, window: int):
    """A backend's forward pass and its backward pass, as two calls without arguments."""
    q, k, v, grad = tensors
    numbers = torch.tensor(window, dtype=torch.int32), torch.tensor(SCALE)
    if backend in WAYS:
        return our_passes(backend, tensors, cu_seqlens, window)
    if backend == "fa3 operator":
        return flash3_passes(q, k, v, grad, cu_seqlens, longest, window)
    if backend.startswith("fa"):
        ends = (cu_seqlens, torch.tensor(longest, dtype=torch.int32), *numbers)
        newest = {"fa4": backend == "fa4"}
        forward: Any = partial(flash_op, q, k, v, *ends, **newest)
        return forward, partial(flash_backward_op, grad, q, k, v, *ends, *forward(), **newest)
    asked = [each.detach().requires_grad_() for each in (q, k, v)]
    call: Any = torch.compile(flex_attention_packed, fullgraph=True)
    torch._functorch.config.donated_buffer = False  # the backward pass is timed many times
    told = (cu_seqlens, numbers[0].cuda(), numbers[1].cuda())
    out = call(*asked, *told)
    backward = partial(torch.autograd.grad, out, asked, grad, retain_graph=True)
    return partial(call, q, k, v, *told), backward


def host_ms(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median time that Python is busy with a call, in ms, while the GPU has nothing to do."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def errors_of(found, known) -> list[float]:
    """Relative errors, each over a whole tensor."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, known)]


def errors_at(tensors: list[Tensor], cu_seqlens: Tensor, window: int, found, gradients) -> list[float]:  # fmt: skip
    """Errors of an output and of the gradients of q, k and v against the reference in float64."""
    q, k, v, grad = (each.double() for each in tensors)
    out = attention_by_document(q, k, v, cu_seqlens, window, SCALE)
    known = gradients_by_document(grad, q, k, v, out, cu_seqlens, window, SCALE)
    found = found[0] if isinstance(found, tuple) else found
    return errors_of((found, *gradients), (out, *known))


def times_of(backend: str, tokens: int, cap: int, window: int) -> dict[str, Any]:
    """One backend at one shape: forward and backward time; at the first row length its errors, too."""
    ends = document_bounds(tokens, cap)
    cu_seqlens = padded_bounds(ends, SLOTS[tokens]).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (4, tokens, HEADS, DIM)
    drawn = torch.randn(shape, device="cuda", generator=generator).bfloat16()
    q, k = (torch.nn.functional.rms_norm(each, (DIM,)) for each in drawn[:2])
    tensors = [q, k, drawn[2], drawn[3]]
    forward, backward = passes(backend, tensors, cu_seqlens, int(np.diff(ends).max()), window)
    row: dict[str, Any] = {"backend": backend, "tokens": tokens, "cap": cap, "window": window}
    if tokens == SHAPES[0][0] and backend not in ("below the diagonal", "documents"):
        row["errors"] = errors_at(tensors, cu_seqlens, window, forward(), backward())
    with torch.no_grad():
        row["forward_ms"] = kernel_ms(forward, backend != "flex")
        row["forward_host_ms"] = host_ms(forward)
    row["backward_ms"] = kernel_ms(backward, backend != "flex")
    row["backward_host_ms"] = host_ms(backward)
    return row


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Times of all backends, forward and backward, in turn; errors in the shortest rows against float64."""
    if not torch.cuda.is_available():
        raise UserError(f"{name} times kernels", "run it on an NVIDIA GPU")
    rows, backends = [], [*WAYS, "fa2", "flex", "fa4"]
    if reason := why_not("fa4", torch.device("cuda"), torch.bfloat16):
        print("without fa4:", backends.pop(), reason)
    for backend in backends + ["fa3", "fa3 operator"] * bool(arguments):
        if backend == "fa3":
            load_flash3(arguments[0])
        for tokens, cap, window in SHAPES:
            rows.append(times_of(backend, tokens, cap, window))
            print(rows[-1], flush=True)
    stamped = stamp(command, ["speedrun.measure.attention"], 1, [0])
    return {"rows": rows, "heads": HEADS, "head_dim": DIM, "scale": SCALE}, stamped
