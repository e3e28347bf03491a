# Tangled from notebooks/23_training_loop.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Building a run
import contextlib
import dataclasses

from speedrun.config import Config
from speedrun.lab.errors import visible
from speedrun.lab.runlog import RunLog


def track(log: RunLog, config: Config, name: str) -> None:
    """Let a log's steps and validations go to Weights & Biases as well, under a name, if it answers."""
    try:
        import wandb

        wandb.init(project=config.wandb, name=name, config=dataclasses.asdict(config))
    except Exception as error:  # not installed, no key, no network: a log is not worth a run
        log.line(f"no Weights & Biases, going on without: {visible(error)}")
        return
    write = log.record

    def record(kind: str, **fields) -> None:
        write(kind, **fields)
        if kind in ("step", "val"):
            numbers = {k: v for k, v in fields.items() if isinstance(v, int | float)}
            with contextlib.suppress(Exception):
                wandb.log(numbers, step=fields["step"])

    log.record = record  # type: ignore[method-assign]
