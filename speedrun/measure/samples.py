# Tangled from notebooks/25_samples.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.sample import (
    by_context,
    generate,
    known_word_fraction,
    load_trained,
    losses_of_rows,
    training_text,
    words_of,
)


# %% The measurement
import math
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from speedrun.config import vary
from speedrun.presets import preset
from speedrun.data.shards import load_manifest
from speedrun.lab.provenance import stamp
from speedrun.lab.metrics import read_metrics, series
from speedrun.train import train

NAMES = ("cpu",)
STAGES = {125: 4, 500: 4, 0: 16}  # steps (0: the end) → samples


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train the preset `name` in three stages, and let each write samples. Returns data and stamp."""
    stages, config = [], preset(name)
    with TemporaryDirectory() as folder:
        for stage, count in STAGES.items():
            train(vary(config, {"max_steps": stage}), Path(folder), again=bool(stages))
            trained = load_trained(Path(folder))
            texts = [generate(trained, "", 500, seed=seed) for seed in range(count)]
            val = series(read_metrics(Path(folder) / "metrics.jsonl"), "val")[-1]["val_loss"]
            known = set(words_of(training_text(trained.data)))
            facts = {"step": trained.step, "val_loss": val, "texts": texts}
            facts["known_share"] = known_word_fraction("\n".join(texts), known)
            losses = losses_of_rows(trained)
            middle, half = losses.shape[1] // 8, losses.shape[1] // 2
            late = losses[:, middle // 2 : middle].mean(1) - losses[:, half:].mean(1)
            facts["late_gain"] = [late.mean().item(), late.std().item() / math.sqrt(len(late))]
            facts |= {"context": by_context(losses), "config": asdict(config)}
            stages.append(facts | {"greedy": generate(trained, "", 500, temperature=0.0)})
        data = load_manifest(trained.data)
    corpus = {"name": data.source, "sha256": data.sha256}
    modules = ["speedrun.measure.samples"]
    return {"stages": stages}, stamp(command, modules, 1, [config.seed], corpus)
