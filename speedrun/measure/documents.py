# Tangled from notebooks/09_flex_attention.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Who gains?
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
