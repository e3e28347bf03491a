# Tangled from notebooks/08_logits.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The code
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor
from torch.nn import functional as F

from speedrun.lab.bounds import NonNegativeFloat, PositiveFloat

Cap = Literal["none", "tanh30", "tanh15", "sigmoid30", "sigmoid23"]


@dataclass(frozen=True)
class HeadConfig:
    """From the last vectors to the loss, through the matrix lm_head. The defaults are GPT-2's."""

    tie: Literal["tied", "untied", "until_step"] = "tied"
    """Weight tying (Press and Wolf 2016). tied: the embedding is the head. untied: two matrices. until_step: two that are kept equal until schedule.untie_at."""
    std: NonNegativeFloat = 0.0
    """untied: deviation of the head's first weights; 0: zeros."""
    lr_mul: PositiveFloat = 1.0
    """untied: the head's learning rate as a multiple of optim.adam.lr."""
    pad_vocab_to: Annotated[int, Interval(ge=1, le=2**16)] = 1
    """The vocabulary is padded to a multiple of this, by rows that no token uses."""
    softcap: Cap = "none"
    """The logit softcap (Gemma 2), by which logits are bounded: 30 tanh(z/30), 15 tanh(z/15), 30 sigmoid(z/7.5), 23 sigmoid((z+5)/7.5)."""
    fp8: bool = False
    """Training's loss in one pass with FP8 products (chapter 19), for a head that is not tied, under sigmoid23. Validation stays as it is."""


def round_up(vocab_size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least the vocabulary."""
    return -(-vocab_size // multiple) * multiple


# %% Logit softcap
def softcap(logits: Tensor, cap: Cap) -> Tensor:
    """Logits, bounded as the option says; in their own dtype."""
    if cap.startswith("tanh"):
        bound = float(cap.removeprefix("tanh"))
        return bound * torch.tanh(logits / bound)
    if cap == "sigmoid30":
        return 30 * torch.sigmoid(logits / 7.5)
    return 23 * torch.sigmoid((logits + 5) / 7.5) if cap == "sigmoid23" else logits


def loss_of(logits: Tensor, targets: Tensor, cap: Cap) -> Tensor:
    """Mean cross-entropy in nats of (…, vocab) logits, computed in float32; bits are nats / ln 2."""
    bounded = softcap(logits.float(), cap)
    return F.cross_entropy(bounded.flatten(0, -2), targets.flatten())
