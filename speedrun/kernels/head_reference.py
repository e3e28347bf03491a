# Tangled from notebooks/19_head_and_loss.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.kernels.loss import CAP, SHIFT, SLOPE, choose_candidates


# %% The definition
from typing import Any

import torch
from torch import Tensor

from speedrun.kernels.fp8 import quantize_reference


def head_loss_by_hand(
    x: Tensor, w: Tensor, targets: Tensor, inside: Tensor, rows: int = 4096, weights: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy (nats, scalar) of softcapped logits x @ w, and its gradients with respect to x and w; `rows` tokens at a time.

    x: (tokens, width). w: (width, words). targets: (tokens,) int64, or (tokens, several) with a weight each, (several,): then all three are the sums, by these weights, of what each column alone
    has. inside: (words,) bool, the words that the softmax runs over, or a row for each of several micro-batches of equal length; a target always takes part. On any device, in x's dtype, float32 or float64.
    """
    if weights is not None:
        alone = [head_loss_by_hand(x, w, column, inside, rows) for column in targets.T]
        loss, dx, dw = (sum(a * b for a, b in zip(weights.to(x), each)) for each in zip(*alone))
        return loss, dx, dw
    dx, dw, loss = torch.empty_like(x), torch.zeros_like(w), x.new_zeros(())
    inside = inside.view(-1, w.shape[1])
    number = torch.arange(len(x), device=x.device) * len(inside) // len(x)
    for begin in range(0, len(x), rows):
        now = slice(begin, begin + rows)
        part, mine = x[now], targets[now, None]
        s = torch.sigmoid((part @ w + SHIFT) / SLOPE)
        e = torch.exp(CAP * s - CAP) * inside[number[now]].scatter(1, mine, True)
        total = e.sum(1, keepdim=True)
        loss += (total.log() + CAP - CAP * s.gather(1, mine)).sum() / len(x)
        share = (e / total).scatter_add(1, mine, torch.full_like(total, -1.0))
        g = share * s * (1 - s) * CAP / SLOPE / len(x)
        dx[now] = g @ w.T
        dw += part.T @ g
    return loss, dx, dw


# %% The kernel
def head_loss_reference(
    x: Tensor, w: Tensor, targets: Tensor, count: int, form: Any, parts: int, weights: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`head_loss_fused` by the definition: in float32, of rounded operands; x's gradient in its dtype."""
    scales = [form.scale_of(each) for each in (x, w)]
    x8, w8 = (quantize_reference(each, by, form.kind).float() * by for each, by in zip((x, w), scales))  # fmt: skip
    words = [choose_candidates(to.flatten(), w.shape[1], count)[1] for to in targets.chunk(parts)]
    loss, dx, dw = head_loss_by_hand(x8, w8, targets, torch.stack(words), weights=weights)
    return loss, dx.to(x.dtype).contiguous(), dw.contiguous()
