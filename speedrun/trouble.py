# Tangled from notebooks/23_training_loop.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.run import Run, facts_of


# %% Non-finite gradients
import contextlib
import json
from pathlib import Path

import torch

from speedrun.checkpoint import RESUMABLE_FIELDS, checkpoints, damaged
from speedrun.config import config_from_json, fields_of
from speedrun.lab.errors import UserError, quoted, visible


def nonfinite_error(run: Run, loss: float = 0.0) -> UserError:
    """What to say about a loss, or steps left out, that are not finite: which parameter, what still happened, the way on."""
    gradients = run.optimizer.nonfinite_params()
    weights = [n for n, p in run.model.named_parameters() if not torch.isfinite(p).all()]
    if weights:
        what = f"parameter {', '.join(weights)} is not finite; nothing has been updated since"
    elif gradients:
        what = f"the gradient of {', '.join(gradients)} is not finite; that step was left out"
    elif run.nonfinite_steps:
        what = f"in {int(run.nonfinite_steps)} steps the gradient's norm was not finite; they were left out, the others taken"
    else:
        what = f"the loss is {loss}, with weights and gradients that are finite"
    fix = "a lower --optim.adam.lr, or a longer --schedule.warmup-steps"
    if saved := checkpoints(run.folder):
        back = f"--resume {quoted(run.folder)} goes back to {saved[-1].name}"
        fix = f"{back}; or begin again with {fix}"
    return UserError(f"step {run.step}: {what}", fix)


# %% Saving and resuming
def check_same_run(path: Path, facts: dict, run: Run) -> None:
    """Raise UserError where a checkpoint is of other data, or of other settings, than the folder that it lies in."""
    folder, now = run.loader.shards.folder, facts_of(run)
    if facts["data_sha256"] != now["data_sha256"]:
        what = f"{path} was trained on other data than {folder} lists now"
        count = facts.get("train_shards", "N")
        again = f"shards fetched since: python -m speedrun.data fineweb --shards {count} lists those of then"
        raise UserError(what, f"{again}; other text: --data.path FOLDER")
    for name in ("vocab_size", "tokenizer", "train_shards"):
        if facts.get(name, now[name]) != now[name]:
            raise damaged(path, f"{name} is {facts[name]!r}, and in {folder} {now[name]!r}")
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
        first = json.loads((run.folder / "metrics.jsonl").open(encoding="utf-8").readline())
        begun = fields_of(config_from_json(first["config"]))
        for name, value in fields_of(config_from_json(facts["config"])).items():
            if name not in RESUMABLE_FIELDS and value != begun[name]:
                values = visible(f"{name} is {value}, and was {begun[name]}")
                what = f"{path} is of another run: {values}"
                raise UserError(what, f"put it aside: mv {quoted(path)} {quoted(run.folder)}/")


# %% Training from start to finish
def unsaved(run: Run, lost: list[str]) -> UserError:
    """What to say where the end of a run could not be written."""
    size = sum(p.numel() * p.element_size() for p in run.model.parameters()) * 3 / 1e6
    older = [path.name for path in checkpoints(run.folder)]
    room = f"free {size + 1:.0f} MB where {run.folder} lies, or see that it can be written to"
    on = (
        f"--resume {quoted(run.folder)} then goes on from {older[-1]}"
        if older
        else "then train again"
    )
    return UserError(
        f"step {run.step} is reached, but not saved: {', '.join(lost)}", f"{room}; {on}"
    )
