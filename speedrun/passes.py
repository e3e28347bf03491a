# Tangled from notebooks/23_training_loop.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% A training step, and gradient accumulation
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from speedrun.data.loader import Batch
from speedrun.model.attention import AttentionSettings, Packed


def forward_loss(
    forward,
    batch: Batch,
    device: torch.device,
    precision: str,
    attn_settings: AttentionSettings | None = None,
    candidates: Tensor | None = None,
) -> Tensor:
    """The model's mean loss on a batch, nats a token. attn_settings: of this stage, for packed documents. candidates: the FP8 head's."""
    there: list[Any] = [tensor.to(device, non_blocking=True) for tensor in batch[:2]]
    if batch.cu_seqlens is not None and batch.longest is not None and attn_settings is not None:
        borders = batch.cu_seqlens.to(device, non_blocking=True)
        there.append(Packed(borders, batch.longest, *attn_settings))
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return forward(*there, candidates=candidates)


def forward_backward(
    forward, micro_batches: int, longest: Tensor | None, settings: tuple, *tensors: Any
) -> Tensor:
    """Forward and backward through one batch's tensors; its gradients are added to those that are there. Returns its part of the mean loss."""
    inputs, targets, *borders = tensors
    batch = Batch(inputs, targets, borders[0] if borders else None, longest)
    loss = forward_loss(forward, batch, *settings) / micro_batches
    loss.backward()
    return loss.detach()


def accumulate(
    forward, batches: Iterable[Batch], micro_batches: int, *settings: Any, record=None
) -> Tensor:
    """Forward and backward through this rank's batches. Gradients add up; returns its part of the mean loss.

    micro_batches: how many batches the step has, on all ranks together. settings: the device, the precision, and what else `forward_loss` is told.
    record: calls a function with a batch's tensors, as a CUDA graph.
    """
    total = torch.zeros((), device=settings[0])
    for batch in batches:
        one_pass = partial(forward_backward, forward, micro_batches, batch.longest, settings)
        tensors = batch[: 2 if batch.cu_seqlens is None else 3]
        total += record(one_pass, tensors) if record else one_pass(*tensors)
    return total
