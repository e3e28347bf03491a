# Tangled from notebooks/11_attention_backends.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.kernels.attention import NAMESPACE, attention_op
from speedrun.model.attention import Packed


# %% The reference
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def seen(rows: Tensor, columns: Tensor, window: int) -> Tensor:
    """Which keys a query sees, (rows, columns) bool: itself, and `window` before it."""
    distance = rows[:, None] - columns[None, :]
    return (distance >= 0) & (distance <= window)


def blocks_of(borders: list[int], window: int, block: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of queries in documents, the keys that they see, and which query sees which: (rows, columns) bool."""
    for begin, end in zip(borders, borders[1:]):
        for first in range(begin, end, block):
            last, low = min(first + block, end), max(begin, first - window)
            mask = seen(torch.arange(first, last), torch.arange(low, last), window)
            yield slice(first, last), slice(low, last), mask


def attention_by_document(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, scale: float, block: int = 512
) -> Tensor:
    """Causal attention inside packed documents, one after the other, `block` queries at a time. On any device, in any dtype.

    q, k, v: (tokens, heads, head_dim). cu_seqlens: (documents + 1,) int32, where documents begin and end. A query sees itself and
    `window` keys before it, of its document. Rows in no document give zeros.
    """
    out = torch.zeros_like(q)
    q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
    for rows, columns, mask in blocks_of(cu_seqlens.tolist(), window, block):
        part = F.scaled_dot_product_attention(
            q[:, :, rows], k[:, :, columns], v[:, :, columns], mask.to(q.device), scale=scale
        )
        out[rows] = part[0].transpose(0, 1)
    return out


def gradients_by_document(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens: Tensor, window: int, scale: float, block: int = 512
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, where `out` is `attention_by_document`'s, and its gradient is `grad`."""
    dq, dk, dv = (torch.zeros_like(each) for each in (q, k, v))
    delta = (grad * out).sum(-1).T[..., None]  # (heads, tokens, 1)
    turned = (each.transpose(0, 1) for each in (grad, q, k, v))
    grad, q, k, v = turned
    for rows, columns, mask in blocks_of(cu_seqlens.tolist(), window, block):
        logits = scale * q[:, rows] @ k[:, columns].mT
        p = logits.masked_fill(~mask.to(q.device), -math.inf).softmax(-1)
        dlogits = p * (grad[:, rows] @ v[:, columns].mT - delta[:, rows])
        dq[rows] = (scale * dlogits @ k[:, columns]).transpose(0, 1)
        dk[columns] += (scale * dlogits.mT @ q[:, rows]).transpose(0, 1)
        dv[columns] += (p.mT @ grad[:, rows]).transpose(0, 1)
    return dq, dk, dv


# %% One function over all
@torch.library.custom_op(f"{NAMESPACE}::by_document", mutates_args=())
def sdpa_op(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: Tensor, scale: Tensor
) -> Tensor:
    """`attention_by_document`, as an operator that torch.compile does not look into."""
    return attention_by_document(q, k, v, cu_seqlens, int(window), scale.item())


@torch.library.custom_op(f"{NAMESPACE}::by_document_backward", mutates_args=())
def sdpa_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: Tensor, scale: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    return gradients_by_document(grad, q, k, v, out, cu_seqlens, int(window), scale.item())


@sdpa_op.register_fake
def fake_sdpa(q, k, v, cu_seqlens, window, scale):
    return torch.empty_like(q)


@sdpa_backward_op.register_fake
def fake_sdpa_backward(grad, q, k, v, *others):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


sdpa_op.register_autograd(
    lambda ctx, grad: (*sdpa_backward_op(grad, *ctx.saved_tensors), None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output),
)


def flash4(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: Tensor, window: Tensor, scale: Tensor, state: tuple = ()
) -> tuple[Tensor, ...]:  # fmt: skip
    """FlashAttention-4's forward pass, output and logsumexp; with (output, its gradient, logsumexp) as state its backward pass: gradients of q, k and v."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    ends = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    most = {"max_seqlen_q": longest.item(), "max_seqlen_k": longest.item()}
    sides = {"causal": True, "window_size_left": window.item(), "window_size_right": 0}
    told: Any = {**ends, **most, **sides, "softmax_scale": scale.item()}
    if state:
        return _flash_attn_bwd(q, k, v, *state, **told)[:3]
    return _flash_attn_fwd(q, k, v, **told, return_lse=True)[:2]


@torch.library.custom_op(f"{NAMESPACE}::flash", mutates_args=())
def flash_op(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: Tensor, window: Tensor, scale: Tensor, fa4: bool = False
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The FlashAttention that PyTorch has (2, or an activated 3), or version 4, with a window that is data: output, logsumexp, state of no dropout."""
    if fa4:
        out, lse = flash4(q, k, v, cu_seqlens, longest, window, scale)
        return out, lse, q.new_empty(2, dtype=torch.uint64)
    ends, most = (cu_seqlens, cu_seqlens), longest.item()
    sides = {"window_size_left": window.item(), "window_size_right": 0}
    out, lse, state, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *ends, most, most, 0.0, True, False, scale=scale.item(), **sides
    )
    return out, lse, state


@torch.library.custom_op(f"{NAMESPACE}::flash_backward", mutates_args=())
def flash_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: Tensor, window: Tensor, scale: Tensor, out: Tensor, lse: Tensor, state: Tensor, fa4: bool = False
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    grad, ends, most = grad.contiguous(), (cu_seqlens, cu_seqlens), longest.item()
    if fa4:
        dq, dk, dv = flash4(q, k, v, cu_seqlens, longest, window, scale, (out, grad, lse))
        return dq, dk, dv
    sides = {"window_size_left": window.item(), "window_size_right": 0}
    unused = torch.empty(0, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, *ends, most, most, 0.0, True, state, unused, scale=scale.item(), **sides
    )  # fmt: skip
    return dq, dk, dv


@flash_op.register_fake
def fake_flash(q, k, v, cu_seqlens, longest, window, scale, fa4=False):
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return torch.empty_like(q), lse, q.new_empty(2, dtype=torch.uint64)


@flash_backward_op.register_fake
def fake_flash_backward(grad, q, k, v, *others):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def keep_for_flash(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.fa4 = inputs[7]
    ctx.save_for_backward(*inputs[:7], *output)


def flash_gradients(ctx: Any, grad: Tensor, *_) -> tuple:
    return *flash_backward_op(grad, *ctx.saved_tensors, ctx.fa4), *5 * (None,)


flash_op.register_autograd(flash_gradients, setup_context=keep_for_flash)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: Tensor, window: Tensor, scale: Tensor, fa4: bool
) -> Tensor:  # fmt: skip
    """`flash_op`'s output, with zeros in rows that are in no document; FlashAttention leaves those as their memory was, and their gradients."""
    inside = (torch.arange(len(q), device=q.device) < cu_seqlens[-1])[:, None, None]
    q, k, v = (torch.where(inside, each, 0) for each in (q, k, v))
    out = flash_op(q, k, v, cu_seqlens, longest, window, scale, fa4)[0]
    return torch.where(inside, out, 0)


def attend(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, long: bool, backend: str, bounded: bool, tiles: Any
) -> Tensor:  # fmt: skip
    """Causal attention inside packed documents, (tokens, heads, head_dim). long: the long window. bounded: |q · k| ≤ head_dim.

    tiles: what `prepare_tiles` has made for all layers.
    """
    window, scale = packed.windows[int(long)], packed.scale
    if backend == "triton":
        return attention_op(q, k, v, tiles, window, scale, bounded and q.dtype != torch.float16)[0]
    if backend in ("fa2", "fa3", "fa4"):
        told = (packed.cu_seqlens, packed.longest, window, scale, backend == "fa4")
        return flash_attention(q, k, v, *told)
    if backend == "flex":
        from speedrun.model.masks import flex_attention_in

        return flex_attention_in(q, k, v, tiles[int(long)], scale)
    return sdpa_op(q, k, v, packed.cu_seqlens, window, scale)
