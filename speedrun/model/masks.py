# Tangled from notebooks/09_flex_attention.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Masks that compose
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, and_masks, flex_attention

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """No key later than its query."""
    return kv_idx <= q_idx


def sliding_window(window: Tensor | int) -> MaskMod:
    """No key more than `window` tokens before its query; of what comes after it, it says nothing."""
    return lambda b, h, q_idx, kv_idx: q_idx - kv_idx <= window


def document_numbers(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The number of every token's document, (tokens,) int32; -1: in none. cu_seqlens: (slots + 1,) int32, from 0."""
    token = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    number = torch.searchsorted(cu_seqlens, token, right=True, out_int32=True) - 1
    return torch.where(token < cu_seqlens[-1], number, -1)


def document_mask(documents: Tensor) -> MaskMod:
    """The document mask: queries and keys of one document. documents: (tokens,), as `document_numbers` has them."""
    return lambda b, h, q_idx, kv_idx: (documents[q_idx] == documents[kv_idx]) & (documents[q_idx] >= 0)  # fmt: skip


def dense_mask(mask_mod: MaskMod, tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """Which key (column) each query (row) sees, (tokens, tokens) bool."""
    index = torch.arange(tokens, device=device)
    zero = index.new_zeros(())
    return mask_mod(zero, zero, index[:, None], index)


# %% A window is not causal
def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask_mod: MaskMod, scale: Tensor | float
) -> Tensor:
    """Attention with the whole mask in memory, (heads, tokens, head_dim) as q, k, v; queries that see nothing give zeros."""
    mask = dense_mask(mask_mod, q.shape[-2], q.device)
    return F.scaled_dot_product_attention(q * scale, k, v, mask, scale=1.0)


# %% Lower bounds
OPERATORS = __name__.strip("_").replace(".", "_") + "_masks"  # the notebook's are not the package's


@torch.library.custom_op(f"{OPERATORS}::lower_bounds", mutates_args=())
def lower_bounds_op(cu_seqlens: Tensor, tokens: int, window: Tensor) -> Tensor:
    """`lower_bounds`, as an operator: inductor cannot look up, in a mask, what it computes in the same graph (torch 2.11)."""
    token = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    number = torch.searchsorted(cu_seqlens, token, right=True, out_int32=True) - 1
    lower = torch.maximum(cu_seqlens[number], token - window)
    return torch.where(token < cu_seqlens[-1], lower, tokens)


@lower_bounds_op.register_fake
def fake_lower_bounds(cu_seqlens, tokens, window):
    return cu_seqlens.new_empty(tokens, dtype=torch.int32)


def lower_bounds(cu_seqlens: Tensor, tokens: int, window: Tensor | int) -> Tensor:
    """The first key that each query sees, (tokens,) int32: its document's beginning, or `window` tokens before it.

    cu_seqlens: (slots + 1,) int32 from 0, unused slots at the end. window: an int, or 0-d int32 in CPU memory.
    Rows in no document get `tokens`, which is behind all keys, so that the bounds rise everywhere.
    """
    return lower_bounds_op(cu_seqlens, tokens, torch.as_tensor(window, dtype=torch.int32))


def bounds_mask(lower: Tensor) -> MaskMod:
    """Causal, document and window in one: keys from lower[q_idx] to q_idx."""
    return lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (kv_idx >= lower[q_idx])


# %% The block mask, without looking at pairs
def block_lists(
    start: Tensor, full: Tensor, rest: Tensor, stop: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each line of tiles, of which those from start to stop are touched and those from full to rest are full: counts and indices of the partial ones, counts and indices of the full ones, as BlockMask wants them."""
    none = rest <= full
    full, rest = torch.where(none, stop, full), torch.where(none, stop, rest)
    place = torch.arange(len(start), device=start.device)
    before, whole = (full - start)[:, None], full[:, None] + place
    partial = torch.where(place < before, start[:, None] + place, rest[:, None] + place - before)
    counts = [each.int()[None, None] for each in (stop - start - (rest - full), rest - full)]
    lists = [each.clamp(max=len(start) - 1).int()[None, None] for each in (partial, whole)]
    return counts[0], lists[0], counts[1], lists[1]


def block_mask_of(lower: Tensor, block: int = 128) -> BlockMask:
    """FlexAttention's block mask for `bounds_mask(lower)`, equal to create_block_mask's, from rising bounds, (tokens,) int32."""
    tokens = len(lower)
    tiles = -(-tokens // block)
    token = torch.arange(tokens, device=lower.device)
    edge = F.pad(torch.where(lower > token, tiles * block, lower), (0, tiles * block - tokens), value=tiles * block)  # fmt: skip
    start, full = edge[::block] // block, (edge[block - 1 :: block] + block - 1) // block
    tile = torch.arange(tiles, device=lower.device)
    reach, whole = (torch.searchsorted(each.long(), tile, right=True) for each in (start, full))
    rows = block_lists(start, full, (tile * block + 1) // block, torch.maximum(tile + 1, start))
    columns = block_lists(tile, tile + int(block > 1), whole, torch.maximum(reach, tile))
    return BlockMask((tokens, tokens), *rows, *columns, BLOCK_SIZE=(block, block), mask_mod=bounds_mask(lower))  # fmt: skip


# %% Attention of packed documents
def flex_masks(cu_seqlens: Tensor, tokens: int, windows: Tensor) -> list[BlockMask]:
    """The block mask of each window, for all layers that have it. cu_seqlens, windows: as in `lower_bounds`."""
    return [block_mask_of(lower_bounds(cu_seqlens, tokens, window)) for window in windows]


def flex_attention_in(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: Tensor | float
) -> Tensor:
    """Attention through FlexAttention, (tokens, heads, head_dim) as q, k and v; queries that see nothing give zeros.

    scale multiplies the logits; it may be 0-d in CPU memory. Fast under torch.compile on a GPU. On a CPU FlexAttention
    has no gradients, and without the compiler it is dense: there the same mask goes to `dense_attention`. In 16 bits q is rounded once more, by at most half a unit of
    its last place.
    """
    q, k, v = (each.transpose(0, 1)[None] for each in (q * scale, k, v))
    if q.device.type != "cuda":  # inductor's template for CPUs takes no other layout
        q, k, v = (each.contiguous() for each in (q, k, v))
    wants_gradients = q.requires_grad or k.requires_grad or v.requires_grad
    if q.device.type != "cuda" and (wants_gradients or not torch.compiler.is_compiling()):
        out = dense_attention(q, k, v, mask.mask_mod, 1.0)
    else:
        out = flex_attention(q, k, v, block_mask=mask, scale=1.0)
    return out[0].transpose(0, 1)


def flex_attention_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: Tensor | int, scale: Tensor | float
) -> Tensor:
    """Causal attention inside packed documents, as in `flex_attention_in`. cu_seqlens, window: as in `lower_bounds`."""
    return flex_attention_in(
        q, k, v, block_mask_of(lower_bounds(cu_seqlens, len(q), window)), scale
    )
