# Tangled from notebooks/22_config.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.config import Config, preset, vary


# %% Five runs
import dataclasses
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from speedrun.data.loader import Shards
from speedrun.lab.hardware import look
from speedrun.lab.results import stamp
from speedrun.lab.runlog import read_metrics, series

NAMES = ("laptop", "short")
SEEDS = (0, 1, 2)
START: dict[str, Any] = {"data.seq_len": 64, "model.context": 64, "steps": 9000, "device": "cpu"}
ARMS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "deviation 0.02, GPT-2's": {"model.init_std": 0.02},
    "deviation 0.10": {"model.init_std": 0.10},
    "half the rate": {"optim.lr": 1e-3},
    "twice the rate": {"optim.lr": 4e-3},
    "half the batch": {"data.step_tokens": 512, "steps": 18_000},
    "twice the batch": {"data.step_tokens": 2048, "steps": 4500},
    "rows of 32": {"data.seq_len": 32, "model.context": 32},
    "rows of 128": {"data.seq_len": 128, "model.context": 128},
    "one layer": {"model.layers": 1},
    "four layers": {"model.layers": 4},
}


def train_one(run: Config) -> dict:
    """Train a run on one thread; its final validation loss (nats a token), its seconds of training, its config."""
    import torch

    from speedrun.train import train

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        train(run, Path(folder), echo=None)
        last = series(read_metrics(Path(folder) / "metrics.jsonl"), "val")[-1]
    seconds, config = last["train_time_ms"] / 1000, dataclasses.asdict(run)
    return {"val_loss": last["val_loss"], "seconds": seconds, "config": config}


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train the arms with each seed, as many runs at a time as there are cores: {"arms": {arm: [run, …]}}.

    laptop: all ARMS to the end. short: two lengths of rows, for a third of the steps.
    """
    short = {arm: ARMS[arm] | {"steps": 3000} for arm in ("as it is", "rows of 128")}
    arms, laptop = (short if name == "short" else ARMS), vary(preset("cpu"), START)
    runs = {(a, s): vary(laptop, arms[a] | {"seed": s}) for a in arms for s in SEEDS}
    ends = [vary(run, {"val_every": run.steps}) for run in runs.values()]
    with ProcessPoolExecutor(look().cores, get_context("spawn")) as pool:
        done = dict(zip(runs, pool.map(train_one, ends)))
    manifest = Shards(laptop.data.path, "val").manifest
    corpus = {"name": manifest.source, "sha256": manifest.sha256}
    facts = stamp(command, ["speedrun.measure.config", "speedrun.train"], len(SEEDS), SEEDS, corpus)
    return {"arms": {a: [done[a, s] for s in SEEDS] for a in arms}}, facts
