# Tangled from notebooks/22_config.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.config import Config, vary


# %% Were the choices right?
import dataclasses
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from speedrun.data.loader import Shards
from speedrun.lab.hardware import look
from speedrun.lab.runlog import read_metrics, series


def train_one(run: Config) -> dict:
    """Train a run on one thread; its final validation loss (nats a token), its seconds of training, its config."""
    import torch

    from speedrun.train import train

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        train(vary(run, {"val_every": run.steps, "device": "cpu"}), Path(folder), echo=None)
        last = series(read_metrics(Path(folder) / "metrics.jsonl"), "val")[-1]
    seconds, config = last["train_time_ms"] / 1000, dataclasses.asdict(run)
    return {"val_loss": last["val_loss"], "seconds": seconds, "config": config}


def train_many(runs: Sequence[Config]) -> list[dict]:
    """Train runs on the CPU, as many at a time as there are cores; what `train_one` says of each, in order."""
    with ProcessPoolExecutor(look().cores, get_context("spawn")) as pool:
        return list(pool.map(train_one, runs))


def corpus_of(run: Config) -> dict[str, str]:
    """Name and SHA-256 of what a run reads, for a result's stamp."""
    manifest = Shards(run.data.path, "val").manifest
    return {"name": manifest.source, "sha256": manifest.sha256}
