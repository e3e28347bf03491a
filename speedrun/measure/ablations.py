# Tangled from notebooks/24_speedrun.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% What is each part worth?
from dataclasses import replace
from typing import Any

from speedrun.config import Config, vary
from speedrun.measure.study import loss_in_documents, runs_of
from speedrun.presets import preset


def arms() -> dict[str, dict[str, Any]]:
    """What each arm changes in `record_200m`; all read as many tokens, in as many steps.

    stages: batch and learning rate are the second's until the extension. windows: as long as the longest document. documents: rows cut anywhere, seen whole.
    """
    stages = tuple(replace(s, candidates=0) for s in preset("record_200m").schedule.stages)
    batch, rate = stages[1].batch_mul, stages[1].lr_mul
    same = (*(replace(s, batch_mul=batch, lr_mul=rate) for s in stages[:-1]), stages[-1])
    wide = tuple(replace(s, windows=(2048, 2048)) for s in stages)
    rows = tuple(replace(s, windows=(0, 0), max_doc_tokens=0) for s in stages)
    stream = {"data.mode": "stream", "model.attention.yarn": False, "schedule.stages": rows}
    narrow = {"schedule.val_windows": (0, 0)}
    return {
        "stages": {"schedule.stages": same},
        "windows": {"schedule.stages": wide} | narrow,
        "documents": stream | narrow,
    }


def study() -> dict[str, Config]:
    """`record_200m` with head and MLP in bfloat16 and one part left out, two seeds each. Its runs with everything: book/results/speedrun/record_200m_plain_head.json."""
    base = vary(preset("record_200m"), {"model.head.fp8": False, "model.block.fp8": False})
    return runs_of({arm: vary(base, changes) for arm, changes in arms().items()}, (0, 1))


def after(live: Any) -> dict:
    """Of a run that was trained on rows: what it loses on packed documents."""
    rows = live.config.data.mode == "stream"
    return {"loss_in_documents": loss_in_documents(live)} if rows else {}
