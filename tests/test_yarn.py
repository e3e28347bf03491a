"""Frequencies and scale that follow the window: properties of the formulas, and of lists of windows."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from speedrun.model.rotary import RotaryConfig, frequencies
from speedrun.model.yarn import follow_windows, widened_scale, yarn

WINDOW = st.integers(1, 1 << 18)
WINDOWS = st.lists(WINDOW, min_size=1, max_size=6)
SPECTRUM = st.builds(
    lambda half, base, head_dim: frequencies(
        head_dim, RotaryConfig("half_rope" if half else "rope", base)
    ),
    st.booleans(),
    st.floats(2.0, 1e6),
    st.sampled_from([16, 64, 128]),
)
RECORD = frequencies(128, RotaryConfig("half_rope", base=1024.0))


def ordered(windows: tuple[int, int]) -> tuple[int, int]:
    return (min(windows), max(windows))


WIDER = st.tuples(WINDOW, WINDOW).map(ordered)


def turns(turning: torch.Tensor, window: int) -> torch.Tensor:
    return window * turning / (2 * math.pi)


class TestYarn:
    @given(SPECTRUM, WIDER)
    def test_the_order_of_pairs_is_kept(self, turning, windows):
        after = yarn(turning, *windows)
        falls = after.double().diff()
        assert (falls <= 1e-6 * after[:-1].double()).all(), "falling, up to rounding"

    @given(SPECTRUM, WIDER)
    def test_no_pair_is_slowed_by_more_than_the_window_grows_nor_sped_up(self, turning, windows):
        old, new = windows
        after = yarn(turning, old, new)
        assert (after <= turning * (1 + 1e-6)).all()
        assert (after >= turning * (old / new) * (1 - 1e-6)).all()

    @given(SPECTRUM, WIDER, st.floats(2.0, 64.0), st.floats(0.1, 1.9))
    def test_fast_pairs_are_kept_and_slow_ones_interpolated(self, turning, windows, fast, slow):
        old, new = windows
        after, count = yarn(turning, old, new, fast, slow), turns(turning, old)
        kept, slowed = count >= fast * (1 + 1e-6), count <= slow
        assert torch.equal(after[kept], turning[kept])
        assert torch.equal(after[slowed], turning[slowed] * (old / new))

    @given(SPECTRUM, WIDER)
    def test_slow_pairs_turn_as_often_in_the_new_window_as_in_the_old(self, turning, windows):
        old, new = windows
        slow = turns(turning, old) <= 1
        after = turns(yarn(turning, old, new), new)
        assert torch.allclose(after[slow], turns(turning, old)[slow], rtol=1e-5)

    @given(SPECTRUM, WIDER)
    def test_the_formula(self, turning, windows):
        old, new = windows
        for before, after in zip(turning.tolist(), yarn(turning, old, new).tolist()):
            share = old / new
            kept = min(max((old * before / (2 * math.pi) - 1) / 31, 0), 1)
            assert math.isclose(
                after, before * (share + kept * (1 - share)), rel_tol=1e-5, abs_tol=1e-12
            )

    @given(SPECTRUM, WIDER)
    def test_what_stands_still_goes_on_standing_still(self, turning, windows):
        assert torch.equal(yarn(turning, *windows) == 0, turning == 0)

    @given(SPECTRUM, WINDOW)
    def test_the_same_window_changes_nothing(self, turning, window):
        assert torch.allclose(yarn(turning, window, window), turning, rtol=1e-6)

    def test_kind_and_input_are_left_alone(self):
        for dtype in (torch.float32, torch.float64):
            turning = RECORD.to(dtype)
            copy = turning.clone()
            after = yarn(turning, 384, 896)
            assert after.dtype == dtype and after.shape == turning.shape
            assert torch.equal(turning, copy)

    def test_one_leap_is_not_two_steps(self):
        two = yarn(yarn(RECORD, 384, 896), 896, 1664)
        assert not torch.allclose(two, yarn(RECORD, 384, 1664), rtol=1e-2)


class TestScale:
    @given(st.floats(0.01, 1.0), WIDER)
    def test_it_grows_with_the_window(self, scale, windows):
        old, new = windows
        assert widened_scale(scale, old, old) == scale
        assert widened_scale(scale, old, new) >= scale
        assert widened_scale(scale, old, 2 * new) > widened_scale(scale, old, new)

    @given(st.floats(0.01, 1.0), WIDER, st.integers(2, 9))
    def test_only_the_ratio_counts(self, scale, windows, factor):
        old, new = windows
        larger = widened_scale(scale, factor * old, factor * new)
        assert math.isclose(larger, widened_scale(scale, old, new), rel_tol=1e-12)

    def test_the_record(self):
        found = [scale for _, scale in follow_windows(RECORD, 0.1, [384, 896, 1408, 1664])]
        assert [round(scale, 5) for scale in found] == [0.1, 0.11695, 0.12752, 0.13178]


class TestFollowing:
    @given(SPECTRUM, st.floats(0.01, 1.0), WINDOWS)
    def test_it_is_one_step_after_the_other(self, turning, scale, windows):
        found = follow_windows(turning, scale, windows)
        assert len(found) == len(windows)
        assert found[0][0] is turning and found[0][1] == scale
        for n, (old, new) in enumerate(zip(windows, windows[1:])):
            if old == new:
                continue
            turning, scale = yarn(turning, old, new), widened_scale(scale, old, new)
            assert torch.equal(found[n + 1][0], turning) and found[n + 1][1] == scale

    @given(SPECTRUM, st.floats(0.01, 1.0), WINDOWS, st.data())
    def test_a_stage_depends_only_on_those_before(self, turning, scale, windows, data):
        """So a run that was cut anywhere and rebuilt has the same."""
        cut = data.draw(st.integers(1, len(windows)))
        whole, part = (follow_windows(turning, scale, w) for w in (windows, windows[:cut]))
        assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(part, whole))

    @given(SPECTRUM, st.floats(0.01, 1.0), WINDOWS, st.data())
    def test_equal_windows_change_nothing(self, turning, scale, windows, data):
        place = data.draw(st.integers(0, len(windows) - 1))
        longer = [*windows[: place + 1], *windows[place:]]
        found, wanted = (follow_windows(turning, scale, w) for w in (longer, windows))
        del found[place + 1]
        assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(found, wanted))

    @given(st.lists(st.integers(0, 4096), min_size=2, max_size=6))
    def test_some_zeros_are_refused(self, windows):
        assume(0 in windows and any(windows))
        with pytest.raises(ValueError, match="all tokens") as caught:
            follow_windows(RECORD, 0.1, windows)
        assert str(windows) in str(caught.value)

    @pytest.mark.parametrize("windows", [[-1], [384, -896], [0, -1]])
    def test_negative_windows_are_refused(self, windows):
        with pytest.raises(ValueError, match="number of tokens"):
            follow_windows(RECORD, 0.1, windows)

    @pytest.mark.parametrize("stages", [1, 2, 5])
    def test_all_zeros_change_nothing(self, stages):
        found = follow_windows(RECORD, 0.1, [0] * stages)
        assert len(found) == stages
        assert all(turning is RECORD and scale == 0.1 for turning, scale in found)

    def test_no_stages(self):
        assert follow_windows(RECORD, 0.1, []) == []

    def test_nothing_is_accumulated(self):
        windows, copy = (384, 896, 1408), RECORD.clone()
        first, second = (follow_windows(RECORD, 0.1, windows) for _ in range(2))
        assert torch.equal(RECORD, copy)
        assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(first, second))
