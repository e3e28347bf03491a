# Tangled from notebooks/10_windows_and_yarn.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The code
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def yarn(frequencies: Tensor, old: int, new: int, fast: float = 32.0, slow: float = 1.0) -> Tensor:
    """Radians a token of each pair, (head_dim / 2,), after the window went from old to new tokens.

    A pair that turns at most slow times in the old window is slowed by old / new, one that turns
    at least fast times is left alone, and between them the share goes along a line (Peng 2023).
    """
    turns = old * frequencies / (2 * math.pi)
    kept = ((turns - slow) / (fast - slow)).clamp(0, 1)
    return torch.lerp(frequencies * (old / new), frequencies, kept)


def widened_scale(scale: float, old: int, new: int) -> float:
    """What scores are multiplied by after the window went from old to new tokens (record 31)."""
    return scale * (0.2 * math.log(new / old) + 1)


# %% A function of the list of windows
def follow_windows(
    frequencies: Tensor, scale: float, windows: Sequence[int]
) -> list[tuple[Tensor, float]]:
    """Frequencies and scale in each stage, given each stage's long window in tokens; 0: all tokens.

    The first stage has them as they are. ValueError: some windows are 0 and others are not.
    """
    if any(window < 0 for window in windows):
        raise ValueError(f"a window is a number of tokens, or 0 for all of them: {[*windows]}")
    if any(windows) and not all(windows):
        raise ValueError(
            "a window of 0 means all tokens, and there is no ratio to it or from it: "
            f"give every stage a window, or none ({[*windows]})"
        )
    stages = [(frequencies, scale)][: len(windows)]
    for old, new in zip(windows, windows[1:]):
        turning, factor = stages[-1]
        if old != new:
            turning, factor = yarn(turning, old, new), widened_scale(factor, old, new)
        stages.append((turning, factor))
    return stages
