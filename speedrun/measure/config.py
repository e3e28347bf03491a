# Tangled from notebooks/22_config.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.config import preset, vary


# %% Five runs
import tempfile
import time
from pathlib import Path

from speedrun.data.loader import Shards
from speedrun.lab.results import stamp
from speedrun.lab.runlog import read_metrics, series

NAMES = ("laptop",)
BRIEF = {"steps": 1000, "val_every": 1000, "log_every": 100, "compile": False}
ARMS = {
    "as it is": {},
    "as it is, seed 1": {"seed": 1},
    "as it is, seed 2": {"seed": 2},
    "init_std 0.02 (GPT-2's)": {"model.init_std": 0.02},
    "init_std 0.10": {"model.init_std": 0.10},
    "rate halved": {"optim.lr": 2e-3},
    "rate doubled": {"optim.lr": 8e-3},
    "batch × 4, steps / 4": {
        "data.step_tokens": 4096,
        "steps": 250,
        "val_every": 250,
        "log_every": 25,
    },
    "rows of 32": {"data.seq_len": 32, "model.context": 32},
    "four layers": {"model.layers": 4},
}


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train each of the ARMS for a million tokens. Returns {"arms": {arm: {"val_loss", "seconds"}}} and stamp."""
    from speedrun.train import train

    arms = {}
    for arm, changes in ARMS.items():
        run = vary(preset("cpu"), BRIEF | changes)
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            train(run, Path(folder), echo=None)
            seconds = time.perf_counter() - begin
            loss = series(read_metrics(Path(folder) / "metrics.jsonl"), "val")[-1]["val_loss"]
        arms[arm] = {"val_loss": loss, "seconds": seconds}
        print(f"{arm:26} {loss:.4f} nats a token, {seconds:.0f} s", flush=True)
    manifest = Shards(preset("cpu").data.path, "val").manifest
    corpus = {"name": manifest.source, "sha256": manifest.sha256}
    return {"arms": arms}, stamp(command, ["speedrun.measure.config"], 1, [0, 1, 2], corpus)
