# Tangled from notebooks/11_attention_backends.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.kernels.attention import HEAD_DIMS, document_tiles


# %% One function over all
from dataclasses import dataclass
from importlib.metadata import distributions
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from speedrun.lab.bounds import NonNegativeFloat, NonNegativeInt
from speedrun.lab.errors import UserError
from speedrun.lab.hardware import find_triton

Backend = Literal["auto", "triton", "fa2", "fa3", "fa4", "flex", "sdpa"]


@dataclass(frozen=True)
class AttentionConfig:
    """What attention looks at, and who computes it. The defaults are GPT-2's."""

    scale: NonNegativeFloat = 0.0
    """What logits are multiplied by; 0: 1 / sqrt(head_dim). In the first stage, if it follows the window."""
    long_layers: tuple[NonNegativeInt, ...] = ()
    """Layers that look back over a stage's long window; the others have the short one."""
    yarn: bool = False
    """Frequencies and scale follow the long window (YaRN)."""
    backend: Backend = "auto"
    """For packed documents. auto: triton on NVIDIA GPUs in 16 bits; where it cannot, FlashAttention if it is installed, else sdpa, document by document."""


class AttentionSettings(NamedTuple):
    """What a stage of the schedule says to attention. As data, so that no stage compiles the model again."""

    windows: Tensor
    """(2,) int32 in CPU memory: how far short and long attention look back."""
    scale: Tensor
    """() float32 in CPU memory: what logits are multiplied by."""
    frequencies: Tensor
    """(head_dim / 2,) float32: radians a token of each pair."""


class Packed(NamedTuple):
    """What attention needs to know about one row of packed documents."""

    cu_seqlens: Tensor
    """(slots + 1,) int32: where documents begin and end; slots that are not used lie at the end."""
    longest: Tensor
    """() int32 in CPU memory: no document is longer."""
    windows: Tensor
    """As in AttentionSettings."""
    scale: Tensor
    frequencies: Tensor


def positions_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Every token's place in its document, (tokens,) int64."""
    token = torch.arange(tokens, device=cu_seqlens.device)
    return token - cu_seqlens[torch.searchsorted(cu_seqlens, token, right=True) - 1]


def why_not(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int = 128) -> str:
    """Why a backend cannot compute attention of packed documents there; empty: it can."""
    gpu, half = device.type == "cuda", dtype in (torch.bfloat16, torch.float16)
    if backend == "sdpa" or (backend == "flex" and not gpu):  # there dense, for short rows
        return ""
    if not gpu:
        return "it needs an NVIDIA GPU"
    if not half:
        return f"it computes in bfloat16 or float16, not {dtype}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    if backend in ("triton", "flex") and not find_triton():
        return "Triton is not installed"
    if backend == "triton" and head_dim not in HEAD_DIMS:
        return f"its heads have one of {HEAD_DIMS} numbers, not {head_dim}"
    if backend == "fa4" and not any(distributions(name="flash-attn-4")):
        return 'the package is not installed (pip install "flash-attn-4>=4.0.0b36")'
    if backend == "fa4" and torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return "it computes on Hopper and Blackwell (compute capability 9 and 10)"
    active = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)
    if backend == "fa2" and active() == "FA3":
        return "FlashAttention-3 is active in its place"
    if backend == "fa3" and active() != "FA3":
        return "FlashAttention-3 is not loaded (torch.nn.attention.activate_flash_attention_impl)"
    return ""


def choose_backend(asked: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The backend that will be used. Raises UserError for one that was asked for by name and cannot."""
    there = (device, dtype, head_dim)
    if asked != "auto":
        if reason := why_not(asked, *there):
            raise UserError(
                f"model.attention.backend={asked}: {reason}", "--model.attention.backend auto"
            )
        return asked
    return next(name for name in ("triton", "fa3", "fa2", "sdpa") if not why_not(name, *there))


def prepare_tiles(packed: Packed, tokens: int, backend: str) -> Any:
    """What a backend makes of the bounds once, for all layers: our kernel's tiles, or FlexAttention's block masks for both windows."""
    if backend == "triton":
        return document_tiles(packed.cu_seqlens, tokens)
    if backend == "flex":
        from speedrun.model.masks import flex_masks

        return flex_masks(packed.cu_seqlens, tokens, packed.windows)
    return None
