"""Masks of packed documents: bounds against brute force, block masks against PyTorch's, attention against one softmax a query."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import and_masks, create_block_mask

from speedrun.model.masks import (
    block_mask_of,
    bounds_mask,
    causal,
    dense_mask,
    document_mask,
    document_numbers,
    flex_attention_packed,
    lower_bounds,
    sliding_window,
)

GPU = torch.cuda.is_available()
one_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no GPU that PyTorch can use")]
quiet = pytest.mark.filterwarnings("ignore:flex_attention called without")


@st.composite
def packs(draw, longest: int = 60):
    """Lengths of documents (empty ones among them), unused slots at the end, rows in no document."""
    lengths = draw(st.lists(st.integers(0, longest), min_size=1, max_size=8))
    unused, outside = draw(st.integers(0, 3)), draw(st.integers(0, 20))
    tokens = max(1, sum(lengths) + outside)
    return lengths, unused, tokens


def bounds_of(lengths: list[int], unused: int) -> Tensor:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return F.pad(ends, (0, unused), value=int(ends[-1])).int()


def brute_force(lengths: list[int], tokens: int, window: int) -> Tensor:
    """Which key each query sees, pair by pair."""
    owner = [n for n, length in enumerate(lengths) for _ in range(length)]
    owner += [-1] * (tokens - len(owner))
    pairs = [[owner[q] == owner[k] >= 0 and 0 <= q - k <= window for k in range(tokens)] for q in range(tokens)]  # fmt: skip
    return torch.tensor(pairs)


def reference(q, k, v, cu_seqlens, window: int, scale: float) -> Tensor:
    """One softmax for each query, document by document."""
    rows, borders = list(0 * (q + k + v)), cu_seqlens.tolist()
    for begin, end in zip(borders, borders[1:]):
        for i in range(begin, end):
            low = max(begin, i - window)
            weights = (scale * torch.einsum("hd,khd->hk", q[i], k[low : i + 1])).softmax(-1)
            rows[i] = torch.einsum("hk,khd->hd", weights, v[low : i + 1])
    return torch.stack(rows)


CASES = [  # lengths, unused slots, tokens, window
    ([1] * 40, 0, 40, 5),  # documents of one token
    ([0, 0, 7, 0, 9], 3, 16, 3),  # empty slots within and behind
    ([90], 0, 90, 10),  # longer than the window
    ([90], 2, 90, 1000),  # shorter than the window
    ([5, 20], 1, 60, 8),  # rows in no document
    ([0], 2, 10, 4),  # no document at all
    ([30, 30], 0, 60, 0),  # every token sees itself
]


def with_cases(test):
    for lengths, unused, tokens, window in CASES:
        test = example(pack=(lengths, unused, tokens), window=window)(test)
    return test


class TestBounds:
    @given(pack=packs(), window=st.integers(0, 80))
    @with_cases
    @settings(max_examples=60, deadline=None)
    def test_bounds_and_masks_are_brute_force(self, pack, window):
        lengths, unused, tokens = pack
        cu_seqlens = bounds_of(lengths, unused)
        lower, expected = lower_bounds(cu_seqlens, tokens, window), brute_force(lengths, tokens, window)  # fmt: skip
        assert lower.shape == (tokens,) and lower.dtype == torch.int32
        assert (lower.diff() >= 0).all()
        first = torch.where(expected.any(1), expected.int().argmax(1), tokens)
        assert torch.equal(lower.long(), first)
        assert torch.equal(dense_mask(bounds_mask(lower), tokens), expected)
        documents = document_numbers(cu_seqlens, tokens)
        composed = and_masks(causal, sliding_window(window), document_mask(documents))
        assert torch.equal(dense_mask(composed, tokens), expected)

    def test_a_window_may_be_data(self):
        cu_seqlens = bounds_of([9, 30, 2], 2)
        bounds = torch.compile(lower_bounds, fullgraph=True, backend="eager")
        for window in (0, 4, 11, 100):
            data = torch.tensor(window, dtype=torch.int32)
            assert torch.equal(bounds(cu_seqlens, 50, data), lower_bounds(cu_seqlens, 50, window))


def same(ours, theirs) -> bool:
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = [getattr(mask, f"{kind}_num_blocks") for mask in (ours, theirs)]
        lists = [getattr(mask, f"{kind}_indices") for mask in (ours, theirs)]
        assert lists[0].shape == lists[1].shape and lists[0].dtype == lists[1].dtype == torch.int32
        assert lists[0].min() >= 0 and lists[0].max() < lists[0].shape[-1]
        if counts[0].dtype != counts[1].dtype or not torch.equal(*counts):
            return False
        used = torch.arange(lists[0].shape[-1]) < counts[0][..., None]
        if not torch.equal(*(each[used] for each in lists)):
            return False
    return ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE


class TestBlockMask:
    @given(pack=packs(), window=st.integers(0, 80), block=st.sampled_from([1, 2, 3, 8, 16, 128]))
    @example(pack=([90], 0, 90), window=10, block=8)
    @example(pack=([0], 2, 10), window=4, block=4)
    @example(pack=([1] * 40, 0, 40), window=5, block=1)
    @settings(max_examples=100, deadline=None)
    def test_it_is_pytorchs(self, pack, window, block):
        lengths, unused, tokens = pack
        lower = lower_bounds(bounds_of(lengths, unused), tokens, window)
        theirs = create_block_mask(bounds_mask(lower), None, None, tokens, tokens, device="cpu", BLOCK_SIZE=block)  # fmt: skip
        assert same(block_mask_of(lower, block), theirs)

    def test_it_is_one_graph(self):
        def lists(cu_seqlens, window):
            mask = block_mask_of(lower_bounds(cu_seqlens, 300, window), 32)
            return mask.kv_num_blocks, mask.kv_indices, mask.q_num_blocks, mask.full_q_indices

        given = bounds_of([100, 1, 150], 1), torch.tensor(40, dtype=torch.int32)
        captured = torch.compile(lists, fullgraph=True, backend="aot_eager")
        assert all(map(torch.equal, captured(*given), lists(*given)))


def check(attend, pack, window: int, dtype: torch.dtype, limit: float, device: str = "cpu", shape=(2, 16)) -> None:  # fmt: skip
    """Forward and three gradients against the reference in float64; zeros in rows that are in no document."""
    lengths, unused, tokens = pack
    cu_seqlens, draw = bounds_of(lengths, unused), torch.Generator().manual_seed(tokens)
    q, k, v, arrives = torch.randn(4, tokens, *shape, generator=draw).to(dtype).unbind()
    exact = [each.double().requires_grad_() for each in (q, k, v)]
    out = reference(*exact, cu_seqlens, window, 0.12)
    wanted = [out, *torch.autograd.grad(out, exact, arrives.double())]
    at = cu_seqlens.to(device), torch.tensor(window, dtype=torch.int32), torch.tensor(0.12)
    leaves = [each.to(device).requires_grad_() for each in (q, k, v)]
    out = attend(*leaves, *at)
    found = [out, *torch.autograd.grad(out, leaves, arrives.to(device))]
    found.append(attend(*(each.detach() for each in leaves), *at))
    for ours, theirs in zip(found, [*wanted, wanted[0]], strict=True):
        assert ours.dtype == dtype and not ours[sum(lengths) :].any()
        assert (ours.cpu().double() - theirs).norm() <= limit * (1 + theirs.norm())


@quiet
class TestAttention:
    @given(pack=packs(40), window=st.integers(0, 60))
    @with_cases
    @settings(max_examples=15, deadline=None)
    def test_it_is_one_softmax_a_query(self, pack, window):
        check(flex_attention_packed, pack, window, torch.float64, 1e-7)  # the scale is float32

    @pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)  # fmt: skip
    def test_other_dtypes(self, dtype, limit):
        check(flex_attention_packed, ([70, 1, 0, 129, 90], 1, 300), 40, dtype, limit)

    def test_numbers_and_data_are_the_same(self):
        q, k, v = torch.randn(3, 50, 2, 16, generator=torch.Generator().manual_seed(1))
        cu_seqlens = bounds_of([20, 25], 2)
        data = torch.tensor(7, dtype=torch.int32), torch.tensor(0.25)
        numbers = flex_attention_packed(q, k, v, cu_seqlens, 7, 0.25)
        assert torch.equal(numbers, flex_attention_packed(q, k, v, cu_seqlens, *data))
        assert not torch.allclose(numbers, flex_attention_packed(q, k, v, cu_seqlens, 7, 4.0))

    def test_it_is_one_graph(self):
        attend = torch.compile(flex_attention_packed, fullgraph=True, backend="aot_eager")
        check(attend, ([70, 1, 0, 129, 90], 1, 300), 40, torch.float32, 1e-5)

    @pytest.mark.long
    def test_inductor_on_a_cpu(self):
        attend = torch.compile(flex_attention_packed, fullgraph=True)
        for tokens in (300, 310):
            check(attend, ([70, 1, 0, 129, 90], 1, tokens), 40, torch.float32, 1e-5)

    def test_a_later_token_changes_nothing(self):
        q, k, v = torch.randn(3, 60, 2, 16, generator=torch.Generator().manual_seed(2))
        cu_seqlens = bounds_of([25, 35], 0)
        before = flex_attention_packed(q, k, v, cu_seqlens, 10, 0.12)
        k[40:], v[40:] = 5.0, -5.0
        after = flex_attention_packed(q, k, v, cu_seqlens, 10, 0.12)
        assert torch.equal(before[:40], after[:40]) and not torch.allclose(before[40:], after[40:])


class TestOnAGPU:
    pytestmark = one_gpu

    @pytest.mark.parametrize("tokens", [1024, 1000])
    @pytest.mark.parametrize("window", [0, 100, 384])
    def test_the_kernel_is_one_softmax_a_query(self, tokens, window):
        attend = torch.compile(flex_attention_packed, fullgraph=True)
        pack = ([300, 1, 0, 400, 129, 60], 3, tokens)
        check(attend, pack, window, torch.bfloat16, 2e-2, "cuda", (2, 128))

    def test_the_block_mask_is_pytorchs(self):
        lower = lower_bounds(bounds_of([3000, 1, 900, 4000], 2).cuda(), 8192, 700)
        theirs = create_block_mask(bounds_mask(lower), None, None, 8192, 8192, device="cuda")
        ours, theirs = block_mask_of(lower).to("cpu"), theirs.to("cpu")
        assert same(ours, theirs)
