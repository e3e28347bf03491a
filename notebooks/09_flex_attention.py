# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   speedrun:
#     alone: true
# ---

# %% [markdown]
# # FlexAttention: documents and windows
#
# ```{admonition} Cost box
# About half a minute on two CPU cores; within three minutes on one GPU. Nothing is trained here: the evidence is the contest's own logs, nine committed runs of a laptop, three on two H200s, and chapter 11's kernel times.
# Record 12: \@KoszarskyB. Record 13: \@fernbear.bsky.social. Block masks made by hand in records 15 and 16: \@leloykun, \@YouJiacheng. Long and short windows in record 20: \@leloykun, \@fernbear.bsky.social, \@YouJiacheng, \@brendanh0gan, \@scottjmaddox, \@Grad62304977.
# ```
#
# ## The problem
#
# Until record 11 the stream of tokens was cut into rows of 1,024, wherever the cut fell. A row then holds pieces of several documents, and attention mixes them: a sentence about cooking looks back at one about football. The beginning of most long documents is lost to their end ([chapter 02](02_data.py)). Longer rows would keep documents whole, but the work of attention grows with the square of the row: a row of **65,536** tokens has sixty-four times as many pairs of tokens for each token as one of 1,024. Nearly all of those pairs lie in different documents, and should not be computed at all.

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
row, long_row = 1024, 65_536
pairs_a_token = {n: (n + 1) / 2 for n in (row, long_row)}
assert 63 < pairs_a_token[long_row] / pairs_a_token[row] < 64.1
print({f"{n:,} tokens": f"{pairs:,.1f} keys a query" for n, pairs in pairs_a_token.items()})

# %% [markdown]
# ```{admonition} Prediction
# A GPU computes attention in *tiles*, here of 128 queries and 128 keys. A packed row of 16,384 tokens has 128 × 128 of them, and a causal mask alone leaves 8,256. Fill the row with documents such as the contest's, half of them shorter than 403 tokens and none longer than 896, and let a query look back over at most 384 tokens. **How many tiles are left?** And in those, **what share of the pairs is really seen?**
# ```
#
# ## The idea
#
# Attention's output for a query $i$ is a mean of values, weighted by a softmax over those keys $j$ that a *mask* $M$ lets it see:
#
# $$
# o_i = \sum_{j} \frac{M_{ij}\, e^{s\, q_i \cdot k_j}}{\sum_{l} M_{il}\, e^{s\, q_i \cdot k_l}}\, v_j .
# $$
#
# A kernel for every mask would have to be written by hand. FlexAttention {cite}`dong2024` takes the mask as a small function of four indices, `mask_mod(b, h, q_idx, kv_idx)`, which the compiler puts into a kernel where the logits are. That alone saves nothing, since a masked pair costs as much as another. So there is a second part, the *block mask*: for each row of tiles a list of those in which all pairs are seen (*full*; the function is not called), and a list of those in which some are (*partial*). All others are skipped, and so memory and time follow the tiles that are left.
#
# Our mask is an intersection of three. *Causal*: a key is not later than its query. *Document*: both are in the same one. *Sliding window* {cite}`beltagy2020`: the key is at most $w$ tokens before the query. The three together have a simple form. Let $d(i)$ be the position at which the document of token $i$ begins. Then query $i$ sees exactly the keys
#
# $$
# \ell_i \le j \le i, \qquad \ell_i = \max(d(i),\ i - w),
# $$
#
# one contiguous range with one *lower bound* for each query. Both terms rise with $i$, so $\ell$ does. Therefore the tiles of a row of tiles are contiguous, too, and so are the full ones among them. No pair has to be looked at in order to list them.
#
# ## The code
#
# ### Masks that compose


# %%
#| default_exp model.masks
#| export
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


# %%
cu_seqlens = torch.tensor([0, 9, 9, 22, 28, 28, 28], dtype=torch.int32)
documents = document_numbers(cu_seqlens, 32)
assert documents.tolist() == [0] * 9 + [2] * 13 + [3] * 6 + [-1] * 4
WINDOW = 5
GALLERY = {
    "causal": causal,
    "window": sliding_window(WINDOW),
    "document": document_mask(documents),
    "causal, window": and_masks(causal, sliding_window(WINDOW)),
    "causal, document": and_masks(causal, document_mask(documents)),
    "all three": and_masks(causal, sliding_window(WINDOW), document_mask(documents)),
}
drawn = {name: dense_mask(mask_mod, 32) for name, mask_mod in GALLERY.items()}
assert torch.equal(drawn["all three"], drawn["causal, window"] & drawn["document"])
assert drawn["causal, window"].sum(1).max() == WINDOW + 1, "a window of w keeps w + 1 keys"
assert not drawn["all three"][28:].any(), "rows in no document see nothing"
assert drawn["all three"][:28].diagonal().all(), "every other token sees itself"
print({name: int(mask.sum()) for name, mask in drawn.items()}, "pairs of", 32 * 32)

# %% [markdown]
# `cu_seqlens` says where documents begin and end, as other attention libraries have it: here there are three, of 9, 13 and 6 tokens. An empty one between them and two unused slots at the end do no harm, and the last four tokens are in no document. Two conventions have to be fixed once for all backends: a window of $w$ keeps $w + 1$ keys, the query's own included, as in FlashAttention (record 12's condition was a distance below 1,024, so $w = 1023$); and a query in no document sees nothing, and gives zeros.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Six masks of 32 queries and 32 keys: causal, window, document, and their intersections, with the tiles of 4 that are skipped, partial and full"}}
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap

from speedrun.lab.results import figure_style

figure_style()
TILE = 4
COLOURS = ListedColormap(["white", "#f6dcc4", "#56B4E9", "#00477a"])
fig, axes = plt.subplots(2, 3, figsize=(7.6, 5.4), layout="constrained")
for ax, (name, mask) in zip(axes.flat, drawn.items()):
    share = mask.view(32 // TILE, TILE, 32 // TILE, TILE).float().mean((1, 3))
    share = share.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    state = (share > 0).int() + mask.int() + (share == 1).int()  # skipped, hidden, seen, all seen
    ax.imshow(state, cmap=COLOURS, vmin=0, vmax=3, extent=(0, 32, 32, 0))
    ax.set_title(f"{name}: {mask.float().mean():.0%}")
    ax.set_xticks(range(0, 33, 8))
    ax.set_yticks(range(0, 33, 8))
for ax in axes[1]:
    ax.set_xlabel("key")
for ax in axes[:, 0]:
    ax.set_ylabel("query")
fig.suptitle("share of pairs that are seen, and tiles of 4 × 4:\nfull (dark), partial (light: seen; sand: hidden), skipped (white)", fontsize=9)  # fmt: skip
plt.show()

# %% [markdown]
# ### A window is not causal
#
# The second picture is a trap. A window is sometimes said to make the causal condition redundant, since a distance of at most $w$ seems to say it already. But a later key has a *negative* distance, and passes. All of the future is seen:

# %%
six = dense_mask(sliding_window(3), 6)
assert six.triu(1).sum() == 15 == 6 * 5 // 2, "every pair of the future passes"
assert not dense_mask(and_masks(causal, sliding_window(3)), 6).triu(1).any()
print("future pairs of six tokens that pass a window of 3:", int(six.triu(1).sum()), "of 15")

# %% [markdown]
# What follows is not a slightly worse model but a wonderful one. A head whose query asks for the next position copies the next token, which is the target. Below, tokens are random, so that nobody who plays by the rules can have a loss below $\ln 50$. Queries and keys are one-hot positions, a query's shifted by one, and values are one-hot tokens:


# %%
#| export
def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask_mod: MaskMod, scale: Tensor | float
) -> Tensor:
    """Attention with the whole mask in memory, (heads, tokens, head_dim) as q, k, v; queries that see nothing give zeros."""
    mask = dense_mask(mask_mod, q.shape[-2], q.device)
    return F.scaled_dot_product_attention(q * scale, k, v, mask, scale=1.0)


# %%
words, draw = 50, torch.Generator().manual_seed(0)
text = torch.randint(words, (65,), generator=draw)
asks_for_next, is_here = torch.eye(65)[1:], torch.eye(65)[:-1]
values = F.one_hot(text[:-1], words).float()
cheat = {}
for name, mask_mod in (("window", sliding_window(16)), ("causal, window", and_masks(causal, sliding_window(16)))):  # fmt: skip
    seen = dense_attention(asks_for_next[None], is_here[None], values[None], mask_mod, 50.0)[0]
    cheat[name] = F.cross_entropy(50 * seen[:-1], text[1:-1]).item()
leaf = values.clone().requires_grad_()
told = dense_attention(asks_for_next[None], is_here[None], leaf[None], sliding_window(16), 1.0)
(by_value,) = torch.autograd.grad(told[0, 20].sum(), leaf)
assert by_value[21:].any(1).all(), "the output at 20 depends on every later token"
assert cheat["window"] < 1e-3 and cheat["causal, window"] > torch.tensor(words).log()
print({name: f"{loss:.3f}" for name, loss in cheat.items()}, f"nats; chance: ln 50 = {torch.tensor(words).log():.2f}")  # fmt: skip

# %% [markdown]
# The loss of random text falls to nothing. Gradient descent is paid for finding this, no shape is wrong, and the curve would look like the record of all records.
#
# ### The scale multiplies
#
# The other thing that has been printed wrongly is the factor $s$. Record 20 made it 0.12 in place of $1/\sqrt{128} = 0.088$, and the factor is easily taken for a divisor. With QK-norm $q \cdot k$ lies between −128 and 128. Multiplied by 0.12 that is a range in which a softmax can do everything. Divided, it is seventy times as much, and the softmax is a maximum:

# %%
q, k, v = torch.randn(3, 1, 1, 64, 128, generator=draw)
q, k = (F.rms_norm(each, (128,)) for each in (q, k))
found = torch.compile(flex_attention, backend="eager")(q, k, v, scale=0.12)
weights = {"0.12 q·k": (0.12 * q @ k.mT).softmax(-1), "q·k / 0.12": (q @ k.mT / 0.12).softmax(-1)}
assert torch.allclose(found, weights["0.12 q·k"] @ v, atol=1e-5)
assert not torch.allclose(found, weights["q·k / 0.12"] @ v, atol=0.1)
largest = {name: share.amax(-1).mean().item() for name, share in weights.items()}
assert 0.05 < largest["0.12 q·k"] < 0.3 and largest["q·k / 0.12"] > 0.99
assert 69 < 1 / 0.12**2 < 70
print("mean of the largest of 64 weights:", {name: f"{each:.2f}" for name, each in largest.items()})

# %% [markdown]
# ### Lower bounds


# %%
#| export
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


# %%
#| export
def lower_bounds(cu_seqlens: Tensor, tokens: int, window: Tensor | int) -> Tensor:
    """The first key that each query sees, (tokens,) int32: its document's beginning, or `window` tokens before it.

    cu_seqlens: (slots + 1,) int32 from 0, unused slots at the end. window: an int, or 0-d int32 in CPU memory.
    Rows in no document get `tokens`, which is behind all keys, so that the bounds rise everywhere.
    """
    return lower_bounds_op(cu_seqlens, tokens, torch.as_tensor(window, dtype=torch.int32))


def bounds_mask(lower: Tensor) -> MaskMod:
    """Causal, document and window in one: keys from lower[q_idx] to q_idx."""
    return lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (kv_idx >= lower[q_idx])


# %%
lower = lower_bounds(cu_seqlens, 32, WINDOW)
assert lower.dtype == torch.int32 and (lower.diff() >= 0).all()
assert torch.equal(dense_mask(bounds_mask(lower), 32), drawn["all three"])
assert torch.equal(lower, lower_bounds(cu_seqlens, 32, torch.tensor(WINDOW, dtype=torch.int32)))
print(lower.tolist())

# %% [markdown]
# One look-up and two comparisons in place of two look-ups and three: the same mask. (The window may be a number in CPU memory, so that a schedule can change it and nothing is compiled again: [chapter 10](10_windows_and_yarn.py).)
#
# ### The block mask, without looking at pairs
#
# PyTorch's `create_block_mask` calls the function for every pair of the row, sums over tiles and sorts. That is exact for any mask, and it is quadratic. From bounds it is a matter of a few divisions. Row $m$ of tiles holds the queries from $mB$ to $mB + B - 1$. It touches the tiles from $\lfloor \ell_{mB} / B \rfloor$ to $m$, because the first query's keys reach up to itself and the last queries' up to the diagonal. A tile is full if the *last* query's bound lies at or before its first key, and its last key is not later than the *first* query. So the full tiles go from $\lceil \ell_{mB+B-1} / B \rceil$ to $m - 1$. The gradients of keys and values go through columns, and need the same lists by column. There the ranges end where a bound passes the column, which a binary search over the rising bounds finds.


# %%
#| export
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


# %%
from torch.nn.attention.flex_attention import create_block_mask


def same_blocks(ours: BlockMask, theirs: BlockMask) -> bool:
    """Equal counts, and equal indices as far as the counts say."""
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = [getattr(each, f"{kind}_num_blocks") for each in (ours, theirs)]
        lists = [getattr(each, f"{kind}_indices") for each in (ours, theirs)]
        used = torch.arange(lists[0].shape[-1], device=counts[0].device) < counts[0][..., None]
        if not torch.equal(*counts) or not torch.equal(*(each[used] for each in lists)):
            return False
    return True


tried = set()
for trial in range(120):
    block, tiles, window = (
        1 + int(torch.randint(high, (), generator=draw)) for high in (24, 9, 90)
    )
    tokens = tiles * block - trial % 2 * (block // 2)
    ends = torch.randint(tokens + 1, (trial % 7 + 1,), generator=draw).sort().values
    bounds = F.pad(F.pad(ends, (1, 0)), (0, trial % 3), value=int(ends[-1])).int()
    lower = lower_bounds(bounds, tokens, window)
    theirs = create_block_mask(bounds_mask(lower), None, None, tokens, tokens, device="cpu", BLOCK_SIZE=block)  # fmt: skip
    assert same_blocks(block_mask_of(lower, block), theirs)
    tried.add((int(theirs.full_kv_num_blocks.sum()) > 0, tokens % block > 0, int(bounds[-1]) < tokens))  # fmt: skip
assert len(tried) == 8, "with and without full tiles, ragged rows, rows in no document"
print("120 random packs: the same tiles, by row and by column")

# %% [markdown]
# How long does each take, for a row of record 89's first third? The documents are drawn as [chapter 02](02_data.py) has them: log-normal, with FineWeb's median and mean, none shorter than 32 tokens.


# %%
import math
import time

import numpy as np

SPREAD = math.sqrt(2 * math.log(690 / 403))
fineweb = np.exp(np.random.default_rng(7).normal(math.log(403), SPREAD, 4000)).astype(int).clip(32)


def pack(lengths, tokens: int, cap: int, slots: int) -> Tensor:
    """Documents in turn, each clipped at `cap`, until the row is full: (slots + 1,) int32."""
    ends = np.minimum(np.cumsum(np.minimum(lengths, cap)), tokens)
    ends = ends[: int(np.argmax(ends == tokens)) + 1]
    assert ends[-1] == tokens and len(ends) <= slots
    return torch.tensor([0, *ends, *[tokens] * (slots - len(ends))], dtype=torch.int32)


def seconds(work, times: int = 3) -> float:
    """The least time of so many, with the GPU's queue empty at both ends."""
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        work().kv_num_blocks.sum().item()
        taken.append(time.perf_counter() - begin)
    return min(taken)


first_third = pack(fineweb, 16_384, 896, 64).to(tier.device)
lower = lower_bounds(first_third, 16_384, 384)
slow = seconds(lambda: create_block_mask(bounds_mask(lower), None, None, 16_384, 16_384, device=tier.device), tier.pick(cpu=1, gpu=3))  # fmt: skip
quick = seconds(lambda: block_mask_of(lower_bounds(first_third, 16_384, 384)))
mask = block_mask_of(lower)
theirs = create_block_mask(bounds_mask(lower), None, None, 16_384, 16_384, device=tier.device)
assert same_blocks(mask, theirs) and quick < slow
print(f"create_block_mask: {1e3 * slow:,.1f} ms; from bounds: {1e3 * quick:.2f} ms")

# %% [markdown]
# Record 12 called `create_block_mask`, compiled, in every forward pass. Record 15 listed tiles by hand and called all of them partial; record 16 told the full ones apart, and had a window that moves in blocks of 128 {cite}`moddednanogpt`. Bounds keep the window exact to the token.
#
# ### Attention of packed documents


# %%
#| export
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


# %% [markdown]
# The reference goes document by document and query by query, in float64, and knows nothing of masks or tiles.


# %%
def by_query(q, k, v, cu_seqlens, window: int, scale: float) -> Tensor:
    """One softmax for each query."""
    rows, borders = list(torch.zeros_like(q)), cu_seqlens.tolist()
    for begin, end in zip(borders, borders[1:]):
        for i in range(begin, end):
            low = max(begin, i - window)
            logits = scale * torch.einsum("hd,khd->hk", q[i], k[low : i + 1])
            rows[i] = torch.einsum("hk,khd->hd", logits.softmax(-1), v[low : i + 1])
    return torch.stack(rows)


attend = torch.compile(flex_attention_packed, backend=tier.pick("eager", "inductor"))
borders = torch.tensor([0, 70, 71, 71, 200, 290, 290], dtype=torch.int32)
data = torch.randn(4, 300, 2, 64, generator=draw, dtype=torch.float64)
q, k, v, arrives = data.unbind()
exact = [each.clone().requires_grad_() for each in (q, k, v)]
expected = by_query(*exact, borders, 40, 0.12)
wanted = [expected.detach(), *torch.autograd.grad(expected, exact, arrives)]
at = {"cu_seqlens": borders.to(tier.device), "window": torch.tensor(40, dtype=torch.int32), "scale": torch.tensor(0.12)}  # fmt: skip
single = [each.float().to(tier.device) for each in (q, k, v)]
without = attend(*single, **at)
leaves = [each.clone().requires_grad_() for each in single]
with_gradients = attend(*leaves, **at)
gradients = torch.autograd.grad(with_gradients, leaves, arrives.float().to(tier.device))
off = [((a.cpu() - b).norm() / b.norm()).item() for a, b in zip((with_gradients.detach(), *gradients), wanted)]  # fmt: skip
forward_off = ((without.cpu() - wanted[0]).norm() / wanted[0].norm()).item()
limit = tier.pick(1e-5, 1e-2)  # a GPU may multiply float32 in TensorFloat-32
assert max(off) < limit and forward_off < limit
assert not without[290:].any() and not any(each[290:].any() for each in gradients), "zeros"
print(f"FlexAttention, forward: off by {forward_off:.0e}")
print({name: f"{each:.0e}" for name, each in zip(("output", "dq", "dk", "dv"), off)})

# %% [markdown]
# There are 300 tokens, which 128 does not divide, a document of one token, an empty one, two that are longer than the window, and ten rows that are in none. On a CPU FlexAttention computes the forward pass and refuses gradients; there they come from the dense form with the same mask. On a GPU all four numbers are FlexAttention's.
#
# And a document does not notice its neighbours: put another text around it, move it to another place, and its outputs are the same.

# %%
alone = attend(*(each[71:200].contiguous() for each in single), torch.tensor([0, 129], dtype=torch.int32).to(tier.device), at["window"], at["scale"])  # fmt: skip
noise = [torch.where(((torch.arange(300) < 71) | (torch.arange(300) >= 200))[:, None, None].to(tier.device), torch.randn_like(each), each) for each in single]  # fmt: skip
assert torch.allclose(alone, without[71:200], atol=tier.pick(1e-5, 1e-2))
assert torch.allclose(attend(*noise, **at)[71:200], without[71:200], atol=tier.pick(1e-5, 1e-2))
print("a document is by itself")

# %% [markdown]
# ## The measurement
#
# Now the tiles can be counted. Record 89 has three stages with 16,384, 32,768 and 49,152 tokens to a GPU, documents clipped at 896 and then at 2,048, and in each a short and a long window. Beside them stands one real pack of the embedded text.


# %%
from speedrun.data.loader import Shards

_, begins = Shards("data/embedded", "train").shard(0)
SHAPES = {  # tokens, cap, slots, windows
    "first third": (16_384, 896, 64, (128, 384)),
    "second third": (32_768, 2048, 96, (384, 896)),
    "last third": (49_152, 2048, 128, (640, 1408)),
}


def tiles_of(lower: Tensor, block: int) -> dict[str, float]:
    """Partial and full tiles, those that a causal mask would have, and the share of useful pairs in what is computed."""
    mask, side = block_mask_of(lower, block), -(-len(lower) // block)
    partial, full = (int(each.sum()) for each in (mask.kv_num_blocks, mask.full_kv_num_blocks))
    pairs = int((torch.arange(len(lower)) - lower + 1).clamp(min=0).sum())
    return {"partial": partial, "full": full, "causal": side * (side + 1) // 2, "useful": pairs / ((partial + full) * block**2)}  # fmt: skip


packs = {}
for name, (tokens, cap, slots, windows) in SHAPES.items():
    for window in windows:
        packs[f"{name}, {window}"] = lower_bounds(pack(fineweb, tokens, cap, slots), tokens, window)
embedded = pack(np.diff(begins), 16_384, 896, 64)
packs["embedded text, 384"] = lower_bounds(embedded, 16_384, 384)
counted = {name: tiles_of(each, 128) for name, each in packs.items()}
for name, tiles in counted.items():
    left = tiles["partial"] + tiles["full"]
    print(f"{name:20} {tiles['partial']:4.0f} partial, {tiles['full']:4.0f} full, {tiles['causal'] - left:6,.0f} of {tiles['causal']:6,.0f} causal tiles skipped; useful {tiles['useful']:.0%}")  # fmt: skip
ours = counted["first third, 384"]
assert ours["causal"] == 8256 and 350 < ours["partial"] + ours["full"] < 430
assert all(counted[name]["partial"] > counted[name]["full"] for name in list(packs)[:-1])
assert all((each["partial"] + each["full"]) / each["causal"] < 0.06 for each in counted.values())

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: share of the causal tiles of 128 that are partial and full in seven packs; right: share of useful pairs in what is computed, by the side of a tile"}}
figure_style()
SIDES = (16, 32, 64, 128, 256)
useful = {name: [tiles_of(each, side)["useful"] for side in SIDES] for name, each in packs.items()}
fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.5), layout="constrained")
height = range(len(counted))
partial, full = ([each[kind] / each["causal"] for each in counted.values()] for kind in ("partial", "full"))  # fmt: skip
axes[0].barh(height, partial, color="C4", label="partial")
axes[0].barh(height, full, left=partial, color="C0", label="full")
axes[0].set_yticks(height, list(counted))
axes[0].invert_yaxis()
axes[0].xaxis.set_major_formatter("{x:.0%}")
axes[0].set_xlabel("of a causal mask's tiles of 128")
axes[0].set_xlim(0, 0.075)
axes[0].legend(loc="upper right")
for n, (name, shares) in enumerate(useful.items()):
    axes[1].plot(SIDES, shares, marker="o", ms=3, color=f"C{n}", label=name)
axes[1].set_xscale("log", base=2)
axes[1].set_xticks(SIDES, [str(side) for side in SIDES])
axes[1].set_ylim(0, 1)
axes[1].yaxis.set_major_formatter("{x:.0%}")
axes[1].set_xlabel("side of a tile")
axes[1].set_ylabel("useful pairs of those computed")
axes[1].legend(fontsize=6.5, loc="lower left")
fig.suptitle(f"16,384 tokens, window 384: {ours['partial'] + ours['full']:.0f} of 8,256 tiles, {ours['useful']:.0%} of their pairs useful")  # fmt: skip
plt.show()

# %%
assert all(list(shares) == sorted(shares, reverse=True) for shares in useful.values())
at_64, at_128 = ([shares[SIDES.index(side)] for shares in useful.values()] for side in (64, 128))
shrinks = [large / small for small, large in zip(at_64, at_128)]
assert 0.3 < min(at_128) and max(at_128) < 0.8 and max(shrinks) < 0.9
print(f"useful at 128: {min(at_128):.0%} to {max(at_128):.0%}; at 64: {min(at_64):.0%} to {max(at_64):.0%}")  # fmt: skip

# %% [markdown]
# The answers: 387 tiles, 55%. Nowhere is one causal tile in twenty left. Skipping is nearly everything, and masking inside the tiles is the rest. But of what is left in the contest's packs, most tiles are partial: they are cut by the diagonal, the window's edge, or the border of a document. So the share of useful pairs is far from one, and it falls as tiles grow. Smaller tiles waste less and load more; where the best trade lies, a count cannot tell, only a clock. [Chapter 11](11_attention_backends.py) has a kernel that never lets a tile straddle two documents.
#
# ### Long and short
#
# Record 20 gave most layers half the window of the others. In record 89 two of eleven layers are long, L3 and L10; L6 has no attention at all. How far can a token look, through all of them? Information may move by a window in each layer, from one to the next. Two things shorten the chain. In L0, L2, L5 and L9 heads are paired in a sequence of twice the length, where the same number reaches half as far. And the last three layers' attention reads the output of L7 {cite}`moddednanogpt`, so they stand side by side, and only the widest of them counts.

# %%
STAGES = {"first third": (128, 384, 896), "second third": (384, 896, 2048), "last third": (640, 1408, 2048), "extension": (768, 1664, 2048)}  # fmt: skip
LONG, PAIRED, WITHOUT = {3, 10}, {0, 2, 5, 9}, {6}
print("tokens back in L0 … L10, and through all of them")
reach = {}
for name, (short, long, cap) in STAGES.items():
    back = [0 if n in WITHOUT else long if n in LONG else short // 2 if n in PAIRED else short for n in range(11)]  # fmt: skip
    reach[name] = sum(back[:8]) + max(back[8:])
    print(f"{name:13}", *(f"{each:5}" for each in back), f"  → {reach[name]:5}; documents up to {cap}")  # fmt: skip
    assert sum(each == long for each in back) == 2 and reach[name] > cap
generator, keys, near = np.random.default_rng(8), {640: 0.0, 1408: 0.0}, 0.0
for _ in range(100):  # packs: one alone may have a fifth more or less
    lengths = np.exp(generator.normal(math.log(403), SPREAD, 4000)).astype(int).clip(32)
    row = pack(lengths, 49_152, 2048, 192)
    for window in keys:
        reach_of = torch.arange(49_152) - lower_bounds(row, 49_152, window) + 1
        keys[window] += reach_of.float().mean().item() / 100
    near += (
        torch.arange(49_152) - lower_bounds(row, 49_152, 2048) <= 640
    ).float().mean().item() / 100
saved = 0.8 * (1 - keys[640] / keys[1408])
assert 0.15 < saved < 0.3 and 0.62 < near < 0.72
print(
    f"keys a query sees in the last third, mean of 100 packs: {keys[640]:.0f} short, {keys[1408]:.0f} long; short layers save {saved:.0%} of all pairs"
)

# %% [markdown]
# In every stage the chain is longer than the longest document. So no token is out of reach; it only has to be handed on. And because two thirds of all tokens have at most 640 before them anyway, a short window saves less than its ratio to the long one suggests.
#
# ## What it buys
#
# The contest's logs answer this at full size, with 524,288 tokens to a step in all three records:

# %%
from speedrun.lab.results import public_table

ladder = {row["record"]: row for row in public_table("records") if not row["note"]}
curves = {}
for line in public_table("curves"):
    curves.setdefault(line["record"], []).append((int(line["step"]), float(line["val_loss"])))
for n in ("11", "12", "13"):
    it = ladder[n]
    assert it["tokens_per_step_start"] == it["tokens_per_step_end"] == "524288"
    print(f"record {n}: {float(it['record_time_s']):.1f} s, {it['steps']} steps of {float(it['step_avg_ms']):.1f} ms, torch {it['torch_version'].split('+')[0]}")  # fmt: skip
saved_s, fewer, slower = (
    float(ladder["11"]["record_time_s"]) - float(ladder["12"]["record_time_s"]),
    1 - int(ladder["12"]["steps"]) / int(ladder["11"]["steps"]),
    float(ladder["12"]["step_avg_ms"]) / float(ladder["11"]["step_avg_ms"]) - 1,
)
lower_by = {step: dict(curves["11"])[step] - dict(curves["12"])[step] for step in range(125, 1375, 125)}  # fmt: skip
steps, losses = zip(*curves["11"])
same_loss = float(np.interp(-dict(curves["12"])[1250], [-each for each in losses], steps))
assert 130 < saved_s < 131 and 0.37 < fewer < 0.38 and 0.11 < slower < 0.13
assert 0.05 < min(lower_by.values()) and max(lower_by.values()) < 0.08 and 1700 < same_loss < 1800
print(f"12 against 11: {saved_s:.1f} s, {fewer:.1%} fewer steps, each {slower:.0%} longer")
print(f"lower at steps 125 to 1,250 by {min(lower_by.values()):.3f} to {max(lower_by.values()):.3f} nats; record 12's loss at step 1,250 record 11 had at {same_loss:,.0f}")  # fmt: skip

# %% tags=["hide-input"] mystnb={"image": {"alt": "Validation loss against training step of records 11, 12 and 13, and against training time"}}
figure_style()
fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.4), layout="constrained", sharey=True)
TEXT = {
    "11": "11: rows of 1,024",
    "12": "12: documents, window 1,024",
    "13": "13: window 64 to 1,792",
}
for n, (record, text_of) in enumerate(TEXT.items()):
    lines = [line for line in public_table("curves") if line["record"] == record]
    y = [float(line["val_loss"]) for line in lines]
    axes[0].plot([int(line["step"]) for line in lines], y, color=f"C{n}", label=text_of)
    axes[1].plot([float(line["train_time_ms"]) / 1000 for line in lines], y, color=f"C{n}")
for ax, label in zip(axes, ("steps of 524,288 tokens", "training time (s, 8 × H100)")):
    ax.axhline(3.28, color="0.5", lw=0.8)
    ax.set_ylim(3.2, 4.2)
    ax.set_xlabel(label)
axes[0].set_ylabel("validation loss (nats)")
axes[0].legend(fontsize=8)
fig.suptitle(f"record 12: {fewer:.0%} fewer steps, each {slower:.0%} longer")
plt.show()

# %%
n13 = {step: dict(curves["12"])[step] - dict(curves["13"])[step] for step in (125, 375, 625, 875, 1125)}  # fmt: skip
assert n13[125] < 0 and n13[375] < 0 < n13[625] and 0.01 < n13[875] < 0.015
time_of = {n: {int(line["step"]): float(line["train_time_ms"]) for line in public_table("curves") if line["record"] == n} for n in ("12", "13")}  # fmt: skip
early, late = ((time_of["13"][b] - time_of["13"][a]) / (time_of["12"][b] - time_of["12"][a]) for a, b in ((125, 375), (1250, 1500)))  # fmt: skip
assert 0.9 < early < 0.97 and 1.0 < late < 1.06
saved_13 = float(ladder["12"]["record_time_s"]) - float(ladder["13"]["record_time_s"])
assert 22 < saved_13 < 22.5
print("13 lower than 12 by", {step: f"{each:+.3f}" for step, each in n13.items()})
print(f"a step of 13 takes {early:.2f} of one of 12 early on (steps 125 to 375), {late:.2f} later (1,250 to 1,500); in all {saved_13:.1f} s")  # fmt: skip

# %% [markdown]
# It is one of the largest steps on the whole ladder. Equal steps read equal numbers of tokens, and from step 125 on record 12 is lower by six to eight hundredths of a nat, before either run's rate begins to fall. The steps are a ninth longer. Rows of 1,024 were cheap already, and cuDNN's kernel gave way to a generated one; what of the ninth is the kernel, the block mask made anew in every pass, or the newer PyTorch, no log says. Record 13 shows the trade over time. Its window grows from 64 tokens to 1,792, so that its first steps are shorter and its last ones longer than record 12's, and it falls behind at first and is ahead later. But it also changed Adam's momentum, Muon's rate and the cooldown, so the whole of its seconds is not the window's. [Chapter 10](10_windows_and_yarn.py) is about windows that grow.
#
# One thing has to be kept apart. Record 12 *validates* as it trains, in sequences of 65,536 tokens with this mask, where record 11's validation cut the same text into rows of 1,024. So a part of the difference is not a better model but a better evaluation: tokens that stood at the beginning of a row with nothing before them now have their document. The rules allow it, and no log separates the two. That records 21, 33 and 35 gained about a thousandth of a nat each from nothing but more context at validation says that it counts {cite}`moddednanogpt`.

# %% [markdown]
# ### Who gains?
#
# *Which* tokens gain, a log does not say. On a laptop it can be seen. Take the embedded text, whose documents have about a thousand tokens, and cut it in three ways: into rows of 1,024 that are seen whole, as before record 12; into the same rows, but with documents masked; and by documents, so that each row begins with one, as since record 29. Everything else is the same, 600 steps of 4,096 tokens, three seeds. At the end each loss is sorted by the place of the last known token in its document:

# %% tags=["hide-input"]
#| default_exp measure.documents
#| export
from typing import Any

import torch
from torch.nn import functional as F

from speedrun.config import Config, vary
from speedrun.measure.study import loss_in_documents, runs_of
from speedrun.presets import preset
from speedrun.schedule import Stage

EDGES = (0, 4, 16, 64, 128, 256, 512, 1024)  # places in a document


def study() -> dict[str, Config]:
    """The laptop's run on the same text, cut in three ways, three seeds each; no windows, one stage of 600 steps.

    rows: 1,024 tokens cut anywhere, seen whole. masked: rows cut anywhere, in which no document sees another. whole: documents from their beginning.
    """
    plain = {"schedule.stages": (Stage(1.0, 1, 1.5, 1024),), "model.attention.yarn": False}
    sizes: dict[str, Any] = {
        "data.batch_tokens": 4096,
        "data.max_forward_tokens": 2048,
        "data.micro_batches": 4,
    }
    base = vary(preset("cpu"), plain | sizes | {"steps": 600, "data.mode": "documents"})
    arms: dict[str, dict[str, Any]] = {
        "rows": {"data.mode": "stream", "schedule.stages": (Stage(1.0, 1, 1.5),)},
        "masked": {"data.mode": "packed"},
        "whole": {},
    }
    return runs_of({arm: vary(base, changes) for arm, changes in arms.items()}, (0, 1, 2))


@torch.no_grad()
def losses_by_place(live: Any, tokens: int = 262_144) -> list[float]:
    """Mean loss of validation tokens between two EDGES, by the place of the token that is known last; in rows as in training, or whole documents."""
    from speedrun.data.loader import validation_batches
    from speedrun.model.attention import Packed

    document, place = live.validation.manifest.document, 0
    sums = torch.zeros(2, len(EDGES) - 1, dtype=torch.float64)
    for batch in validation_batches(live.validation, live.config.data, tokens):
        known: tuple = ()
        if batch.cu_seqlens is not None and batch.longest is not None:
            known = (None, Packed(batch.cu_seqlens, batch.longest, *live.attn_settings[-1]))
        lost = F.cross_entropy(live.model(batch.inputs, *known).flatten(0, 1).float(), batch.targets.flatten(), reduction="none")  # fmt: skip
        for token, loss in zip(batch.inputs.flatten().tolist(), lost.tolist()):
            place = 0 if token == document else place + 1
            bucket = sum(place >= edge for edge in EDGES[1:])
            sums[:, min(bucket, len(EDGES) - 2)] += torch.tensor([loss, 1.0])
    return (sums[0] / sums[1]).tolist()


def after(live: Any) -> dict:
    """Losses by place; of a run that was trained on rows also those of whole documents."""
    found: dict[str, Any] = {"by_place": losses_by_place(live)}
    if live.config.data.mode == "stream":
        loss = loss_in_documents(live)  # from here on it reads documents
        found |= {"loss_in_documents": loss, "by_place_in_documents": losses_by_place(live)}
    return found


# %% tags=["hide-input"] mystnb={"image": {"alt": "Loss of a token against its place in the document, for models trained on rows seen whole, on rows with documents masked, and on whole documents"}}
from speedrun.lab.results import load_result, measured_on
from speedrun.lab.stats import describe

ARMS = {"rows": "rows, seen whole", "masked": "rows, documents masked", "whole": "whole documents"}
kept_runs = {arm: [load_result("documents", f"{arm}_{seed}")["data"]["runs"][0] for seed in range(3)] for arm in ARMS}  # fmt: skip
ended = {arm: np.array([run["curve"][-1]["val_loss"] for run in runs]) for arm, runs in kept_runs.items()}  # fmt: skip
by_place = {arm: np.mean([run["by_place"] for run in runs], 0) for arm, runs in kept_runs.items()}
in_documents = np.array([run["loss_in_documents"] for run in kept_runs["rows"]])
middle = np.sqrt((np.array(EDGES[:-1]) + 1) * np.array(EDGES[1:]))
figure_style()
fig, ax = plt.subplots(figsize=(5.8, 3.4), layout="constrained")
for n, (arm, name) in enumerate(ARMS.items()):
    for run in kept_runs[arm]:
        ax.plot(middle, run["by_place"], color=f"C{n}", lw=0.6, alpha=0.6)
    ax.plot(middle, by_place[arm], "o-", color=f"C{n}", label=name)
ax.set_xscale("log", base=2)
ax.set_xlabel("place in the document")
ax.set_ylabel("loss (nats)")
ax.legend(fontsize=8)
lost = describe(ended["rows"] - ended["whole"])
ax.set_title(f"trained and evaluated on rows seen whole: {lost.mean:.2f} nats higher than on whole documents\n(thin: one seed each)", fontsize=9)  # fmt: skip
foot = measured_on(load_result("documents", "whole_0"))
fig.text(0.99, -0.05, f"nine runs, each {foot}", ha="right", fontsize=6)
plt.show()
for arm, losses in ended.items():
    print(f"{arm:7}", *(f"{loss:.3f}" for loss in losses))
print("rows, on whole documents", *(f"{loss:.3f}" for loss in in_documents))
examined, masks, aligned = ended["rows"] - in_documents, ended["rows"] - ended["masked"], ended["masked"] - ended["whole"]  # fmt: skip
places = {arm: np.array([run["by_place"] for run in runs]) for arm, runs in kept_runs.items()}
elsewhere = np.array([run["by_place_in_documents"] for run in kept_runs["rows"]])
assert (
    0.005 < examined.min() and examined.max() < 0.03 and 0.06 < masks.min() and masks.max() < 0.19
)
assert (places["masked"] < places["rows"]).all() and (elsewhere[:, 0] > places["rows"][:, 0] + 0.3).all()  # fmt: skip
assert 0 < aligned[1] < 0.01 and 0 < aligned[2] < 0.01 and aligned[0] > 30 * aligned[1]
assert f"{ended['masked'][0]:.2f}" == "1.44" and ended["masked"][1:].max() < 1.22
assert (places["whole"][:, -1] < places["masked"][:, -1]).all()
assert (places["whole"][1:, 2:5] > places["masked"][1:, 2:5]).all()

# %% [markdown]
# Three things are in that difference; the second includes most of the first.
#
# - *A better evaluation.* A model that was trained on rows loses one to three hundredths less when it is evaluated on whole documents, although it has learned nothing more. Only its first sixteen tokens are worse, the first four far: a beginning with nothing before it was rare in training.
# - *The mask.* Trained on the same rows with documents masked, a model is lower by 0.06 to 0.19 nats, for each seed and at every place in a document, the first four tokens included.
# - *Whole documents.* For two seeds they are lower than masked rows by less than a hundredth. They gain late in a document, where masked rows have often lost the beginning, and lose a little before, though they show more beginnings. For seed 0, the first column, the gap is nearly forty times as large, since its run on masked rows stayed at 1.44; three seeds cannot say whether that is luck.
#
# At this size, then, nearly all that is certain is the mask's. How much whole documents bring at full size, no log says either: they came with records 26 and 29, and in company. In `record_200m` rows cut anywhere and seen whole cost 0.018 nats against packed documents, both evaluated on documents (one run, [chapter 24](24_speedrun.py)).
#
# ## What it costs, and when it fails
#
# A mask that is wrong does not crash. It leaks, or it hides, and both look like progress or bad luck. So the tests for this module compare it with a loop over queries, over random documents and windows. Packed rows hold a changing number of documents, so their borders are padded to a fixed number of slots; otherwise the compiler would begin again for new numbers. And outside of `torch.compile` FlexAttention computes the dense product: correct, and quadratic in memory.
#
# The factor $s$ may be data, too, if it is put into the queries. In bfloat16 that rounds them a second time:

# %%
q, k, v = F.rms_norm(torch.randn(3, 256, 1, 128, generator=draw), (128,)).unbind()
short = [each.bfloat16().transpose(0, 1) for each in (q, k, v)]
true = dense_attention(*(each.double() for each in short), causal, 0.12)
rounded = dense_attention((short[0] * 0.12).double(), short[1].double(), short[2].double(), causal, 1.0)  # fmt: skip
output_rounding = ((true.bfloat16().double() - true).norm() / true.norm()).item()
scale_rounding = ((rounded - true).norm() / true.norm()).item()
assert scale_rounding < 3 * output_rounding < 0.01
print(f"error of the output: {scale_rounding:.4f} from rounding 0.12 q, {output_rounding:.4f} from rounding the output itself")  # fmt: skip

# %% [markdown]
# ### In a whole run
#
# The book's default is a kernel of its own, that of [chapter 11](11_attention_backends.py), which by itself takes 0.3 to 0.6 of FlexAttention's time, if launches from Python and the making of the block mask are counted for FlexAttention and not for the kernel. What does a run lose that stays with FlexAttention? `record_200m` as it was before [chapter 19](19_head_and_loss.py)'s loss, once through FlexAttention, and twice through the kernel:

# %%
whole = load_result("speedrun", "record_200m_flex")["data"]["runs"] + load_result("speedrun", "record_200m_plain_head")["data"]["runs"]  # fmt: skip
assert [run["config"]["model"]["attention"]["backend"] for run in whole] == ["flex", "auto", "auto"]
alone = load_result("attention", "backends")["data"]["rows"]
flex_ms, triton_ms = ([row["forward_ms"] + row["backward_ms"] for row in alone if row["backend"] == name] for name in ("flex", "triton"))  # fmt: skip
shares = [ours / theirs for ours, theirs in zip(triton_ms, flex_ms)]
assert len(shares) == 6 and 0.28 < min(shares) and max(shares) < 0.6
print(f"the kernel takes {min(shares):.2f} to {max(shares):.2f} of FlexAttention's time, alone")
for run, name in zip(whole, ("FlexAttention", "the kernel", "the kernel")):
    print(f"{name:13}  loss {run['curve'][-1]['val_loss']:.4f} in {run['seconds']:.1f} s, {run['prepared_s']:.0f} s before")  # fmt: skip
flex_s, kernel_s = whole[0]["seconds"], [run["seconds"] for run in whole[1:]]
assert min(kernel_s) <= flex_s <= max(kernel_s) and max(kernel_s) < 1.005 * min(kernel_s)
cut = load_result("ablations", "documents_0")["data"]["runs"][0]["loss_in_documents"]
assert round(cut - whole[1]["curve"][-1]["val_loss"], 3) == 0.018, "rows cut anywhere, seen whole"
now_s = load_result("speedrun", "record_200m")["data"]["runs"][0]["seconds"]
assert round(now_s) == 112, "today's"
print(measured_on(load_result("speedrun", "record_200m_flex")))

# %% [markdown]
# Nothing that these runs can show. In the model the block masks are made once for all layers, and not in each call as where the two are timed alone; no document is longer than 1,024 tokens, so there is less attention in a step than in the timings; and what the compiler may fuse with FlexAttention, norms and rotations, it may not fuse with a kernel that it cannot look into. And the timings count FlexAttention's launches and masks. How much each of the four takes back has not been measured. The three runs were made on one machine, the one through FlexAttention on two other cards of it. Today's `record_200m` takes 112 s, so that attention has a larger share of its step; there the comparison was not made again.
#
# ## What did not work
#
# Record 12's own notes report a deviation of about 0.005 between runs, several times the later records', so that not every run went below 3.28; the doubled rates of record 11 and the shorter run are suspected. A log of record 72 narrows the short windows again in the last third, to two blocks of 128; that was left out when the record was merged. Giving L6 its attention back in record 61's time brought a loss of about 3.275 and 2.9 seconds more, and fifty steps less to pay for it then missed 3.28. When FlashAttention-3 came, odd numbers of blocks did better as long windows than even ones, for no reason that anybody gave {cite}`moddednanogpt`.
#
# ## Exercises
#
# 1. How much work is a document? Write `pairs_seen(length, window)`: the number of pairs of a query and a key that it sees, for one document, without a loop.


# %% tags=["solution"]
def pairs_seen(length: int, window: int) -> int:
    """A triangle until the window is full, then window + 1 keys for each query."""
    rising = min(length, window + 1)
    return rising * (rising + 1) // 2 + (length - rising) * (window + 1)


# %%
for size, look_back in ((1, 0), (5, 0), (5, 2), (3, 7), (8, 7), (9, 7), (700, 384)):
    ends_at = torch.tensor([0, size], dtype=torch.int32)
    by_bounds = int((torch.arange(size) - lower_bounds(ends_at, size, look_back) + 1).sum())
    answer = pairs_seen(size, look_back)
    assert answer == by_bounds, (
        f"{size} tokens, window {look_back}: the bounds leave {by_bounds} pairs, not {answer}"
    )
print(f"a document of 700 tokens, window 384: {answer:,} of {700 * 701 // 2:,} causal pairs")

# %% [markdown]
# 2. In a *prefix* mask every token of a document sees the document's first `prefix` tokens, even those that come after it; everything else is causal. Write `prefix_mask(documents, begins_at, prefix)`, a `mask_mod` like those above: `documents` has each token's document, and `begins_at` where that begins.


# %% tags=["solution"]
def prefix_mask(documents: Tensor, begins_at: Tensor, prefix: int) -> MaskMod:
    """Causal or in the prefix, inside a document."""

    def seen(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) | (kv_idx - begins_at[kv_idx] < prefix)

    return and_masks(document_mask(documents), seen)


# %%
numbers = document_numbers(cu_seqlens, 32)
where_from = cu_seqlens[numbers.clamp(min=0)]
for size in (0, 1, 4):
    given = dense_mask(prefix_mask(numbers, where_from, size), 32)
    for row_of in range(32):
        for key_of in range(32):
            inside = numbers[row_of] == numbers[key_of] >= 0
            early_key = key_of - where_from[key_of] < size
            right = bool(inside and (key_of <= row_of or early_key))
            assert bool(given[row_of, key_of]) == right, (
                f"prefix {size}: query {row_of} of document {int(numbers[row_of])} and key {key_of} of document {int(numbers[key_of])}: seen is {right}, not {not right}"
            )
print("a prefix of 4:", int(given.sum()), "pairs; causal:", int(drawn["causal, document"].sum()))

# %% [markdown]
# ## Since then
#
# Record 29 replaced FlexAttention by FlashAttention-3, whose kernel takes borders of documents and a window as numbers. It is less general and was faster; with it came a cap on the length of documents, windows in three steps, and packs in which every document begins at its beginning. Record 31 lets the frequencies of [rotary positions](06_rotary.py) follow the window ([chapter 10](10_windows_and_yarn.py)). This book's own kernel, which knows documents and windows and nothing else, is in [chapter 11](11_attention_backends.py). The masks are still these: causal, document, window.
