# Tangled from notebooks/22_config.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.config import Config, TODAY, config_from_json, preset, switches_of, vary


# %% Were the choices right?
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from speedrun.data.loader import Shards
from speedrun.lab.hardware import Problem, look
from speedrun.lab.results import load_result
from speedrun.lab.runlog import read_metrics, series
from speedrun.optim.muon import MuonOptions
from speedrun.optim.newton_schulz import MatrixOptions

if TYPE_CHECKING:
    from speedrun.train import Run


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
        return list(tqdm(pool.map(train_one, runs), total=len(runs), unit="run"))


def corpus_of(run: Config) -> dict[str, str]:
    """Name and SHA-256 of what a run reads, for a result's stamp."""
    manifest = Shards(run.data.path, "val").manifest
    return {"name": manifest.source, "sha256": manifest.sha256}


SHORT: dict[str, Any] = {"steps": 600, "val_tokens": 131_072}  # what a laptop's comparisons run


def today(base: Config) -> Config:
    """A run under Muon as it runs today; momentum's ramps are as long a share of it as of the record's."""
    rises, falls = round(0.23 * base.steps), round(0.04 * base.steps)
    changes: dict[str, Any] = {"matrix.rule": "muon", "muon.momentum_steps": (rises, falls)}
    if base.precision == "float32":  # on a CPU
        changes |= {"muon.weights": "float32", "muon.products": "bfloat16", "muon.gram": False}
    return vary(dataclasses.replace(base, muon=TODAY), changes)


def best_of(slug: str, name: str) -> Config:
    """The run with the lowest loss of a committed measurement, each arm's first seed counting."""
    arms = load_result(slug, name)["data"]["arms"]
    best = min((runs[0] for runs in arms.values()), key=lambda run: run["val_loss"])
    return config_from_json(best["config"])


def laptop_bench() -> Config:
    """The run in which ideas are compared on a laptop: the cpu preset's model under today's Muon, at chapter 13's rates."""
    return vary(today(vary(preset("cpu"), SHORT)), {"matrix.lr": 0.016, "optim.lr": 0.004})


def bench(data: str) -> Config:
    """The run in which ideas are compared on a GPU: 30 million parameters, 400 steps of 32,768 tokens."""
    sizes = {"model.layers": 6, "model.heads": 6, "model.width": 384, "model.init_std": 0.03}
    reads = {"data.path": data, "data.step_tokens": 32_768, "data.grad_shards": 1}
    lasts: dict[str, Any] = {"steps": 400, "optim.warmup_steps": 40, "val_tokens": 1_048_576}
    lasts |= {"schedule.shape": "trapezoid"}
    plain = dataclasses.replace(preset("small"), matrix=MatrixOptions(), muon=MuonOptions())
    return vary(plain, sizes | reads | lasts)


def retrain(live: "Run", config: Config) -> dict:
    """Train a run with the assembled model of another, from which it differs in optimizers, schedule and seed alone."""
    import torch

    from speedrun.data.loader import Position
    from speedrun.model.gpt import begin
    from speedrun.train import evaluate, held_out, make_optimizers, train_step, warm_up

    model: Any = live.model
    for row in model.table:  # an optimizer may have given it another dtype
        weights = model.get_parameter(row.name)
        weights.data = torch.empty(row.shape, device=weights.device)
    begin(model, config.seed)
    live.config, live.step, live.loader.position = config, 0, Position()
    live.optimizers = make_optimizers(config, model, model.decays())
    live.skipped.zero_()
    live.clock.elapsed_ms = 0.0
    warm_up(live)
    live.clock.start()
    for _ in range(config.steps):
        train_step(live)
    live.clock.stop()
    loss = evaluate(live, held_out(live, config.val_tokens))
    done = {
        "val_loss": loss,
        "seconds": live.clock.elapsed_ms / 1000,
        "skipped": live.skipped.item(),
    }
    return done | {"config": dataclasses.asdict(config)}


LIVE: dict[str, Any] = {}


def train_on_gpu(config: Config) -> dict:
    """`retrain` with this process's run of that model, assembled when another one was trained before."""
    import torch

    from speedrun.train import assemble

    parts = (config.model, switches_of(config), config.data, config.precision, config.compile)
    sees = repr((*parts, config.muon.weights))
    if sees not in LIVE:
        LIVE.clear()  # its memory, and its code, of which PyTorch keeps eight versions at most
        torch._dynamo.reset()
        LIVE[sees] = assemble(config, Path(tempfile.mkdtemp()), echo=None)
    return retrain(LIVE[sees], config)


def train_arms(
    arms: dict[str, Config], seeds: int, many: Callable[[Sequence[Config]], list[dict]]
) -> dict[str, list[dict]]:
    """Train every arm with the same seeds 0 … seeds − 1. many: trains a list of runs."""
    runs = {
        (arm, seed): vary(run, {"seed": seed}) for arm, run in arms.items() for seed in range(seeds)
    }
    done = dict(zip(runs, many(list(runs.values()))))
    return {arm: [done[arm, seed] for seed in range(seeds)] for arm in arms}


def step_times(
    arms: dict[str, Config], rounds: int = 12, steps: int = 10
) -> dict[str, list[float]]:
    """Milliseconds of a step of each arm, the arms in turn; on a CPU with one thread."""
    import torch

    from speedrun.train import assemble, train_step, warm_up

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    live = {arm: assemble(run, folder / arm, echo=None) for arm, run in arms.items()}
    took: dict[str, list[float]] = {arm: [] for arm in arms}
    for run in live.values():
        warm_up(run)
    for _ in range(rounds):
        for arm, run in live.items():
            run.clock.wait()
            begin = time.perf_counter()
            for _ in range(steps):
                train_step(run)
            run.clock.wait()
            took[arm].append(1000 * (time.perf_counter() - begin) / steps)
    return took


def take_gpu(numbers: Any) -> None:
    """Let this process see one GPU only."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(numbers.get())


def train_on_gpus(runs: Sequence[Config]) -> list[dict]:
    """Train runs on the GPUs of this machine, one process each; what `retrain` says of each, in order."""
    context, gpus = get_context("spawn"), len(look().gpus)
    if not gpus:
        raise Problem("this is measured on a GPU, and PyTorch sees none", "make doctor says why")
    numbers = context.Queue()
    for number in range(gpus):
        numbers.put(number)
    with ProcessPoolExecutor(gpus, context, take_gpu, (numbers,)) as pool:
        return list(tqdm(pool.map(train_on_gpu, runs), total=len(runs), unit="run"))
