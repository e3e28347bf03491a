# Tangled from notebooks/25_samples.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.sample import (
    generate,
    known_share,
    load_trained,
    loss_by_position,
    training_text,
    words_of,
)


# %% The measurement
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from speedrun.config import preset, vary
from speedrun.data.shards import load_manifest
from speedrun.lab.results import stamp
from speedrun.lab.runlog import read_metrics, series
from speedrun.train import train

NAMES = ("cpu",)
STAGES = (125, 1000, 0)  # steps; 0: the end


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train the preset `name` in three stages, and let each write four samples. Returns data and stamp."""
    stages, config = [], preset(name)
    with TemporaryDirectory() as folder:
        for stage in STAGES:
            train(vary(config, {"max_steps": stage}), Path(folder), again=stage != STAGES[0])
            trained = load_trained(Path(folder))
            text = "\n".join(generate(trained, "", 500, seed=seed) for seed in range(4))
            val = series(read_metrics(Path(folder) / "metrics.jsonl"), "val")[-1]["val_loss"]
            share = known_share(text, set(words_of(training_text(trained.data))))
            facts = {"step": trained.step, "val_loss": val, "text": text, "known_share": share}
            greedy = generate(trained, "", 500, temperature=0.0)
            facts |= {"config": asdict(config), "greedy": greedy}
            stages.append(facts | {"loss_by_position": loss_by_position(trained)})
        data = load_manifest(trained.data)
    corpus = {"name": data.source, "sha256": data.sha256}
    modules = ["speedrun.measure.samples"]
    return {"stages": stages}, stamp(command, modules, 1, [config.seed], corpus)
