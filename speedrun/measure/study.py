# Tangled from notebooks/22_config.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.config import Config, vary


# %% Ablations of the laptop's choices
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speedrun.run import Run


def runs_of(arms: dict[str, Config], seeds: Sequence[int]) -> dict[str, Config]:
    """The runs of a study by name, `arm_seed`, in the order in which they are made; each is validated once, at its end."""
    once = {arm: vary(run, {"val_every": run.steps}) for arm, run in arms.items()}
    return {f"{arm}_{seed}": vary(once[arm], {"seed": seed}) for seed in seeds for arm in arms}


def measured_run(folder: Path) -> dict:
    """What is kept of a finished run: what `read_run` says, but of the steps' durations the percentiles, 1 to 99."""
    from speedrun.report import quantile, read_run

    run = read_run(folder)
    return run | {"steps_ms": [quantile(run["steps_ms"], share / 100) for share in range(1, 100)]}


def loss_in_documents(live: "Run") -> float:
    """What a run that was trained on rows of the stream loses, nats a token, on the same validation tokens as packed documents."""
    from speedrun.train import validation_loss, val_batches, prepare_attention

    live.config = vary(live.config, {"data.mode": "documents"})
    live.attn_settings = prepare_attention(live.config, live.model, live.ranks.device)
    return validation_loss(live, val_batches(live, live.config.val_tokens))


def train_alone(
    run: Config, command: str, after: Callable[["Run"], dict] | None = None, echo: Any = print
) -> tuple[dict, dict]:
    """Train a run of a study as one rank, on the first GPU that this process sees or on the CPU. Returns a result's data, {"runs": [run]}, and its stamp.

    after: what else to measure on the trained run.
    """
    from speedrun.train import train

    with tempfile.TemporaryDirectory() as folder:
        live = train(run, Path(folder), echo=echo, command=command)
        done = measured_run(Path(folder))
    stamp = done.pop("stamp")
    return {"runs": [done | (after(live) if after else {})]}, stamp
