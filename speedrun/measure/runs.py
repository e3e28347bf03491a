# Tangled from notebooks/22_config.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.config import Config, config_from_json, fields_of, vary
from speedrun.presets import RECORD_MUON, preset


# %% Ablations of the laptop's choices
import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from speedrun.data.loader import Shards
from speedrun.lab.errors import UserError
from speedrun.lab.files import atomic_write
from speedrun.lab.hardware import detect_machine
from speedrun.lab.provenance import root
from speedrun.lab.results import load_result
from speedrun.optim.muon import MuonConfig
from speedrun.schedule import Stage

if TYPE_CHECKING:
    from speedrun.run import Run

After = Callable[["Run"], dict]  # what else to measure on a trained run


def corpus_of(run: Config) -> dict[str, str]:
    """Name and SHA-256 of what a run reads, for a result's stamp."""
    manifest = Shards(run.data.path, "val").manifest
    return {"name": manifest.source, "sha256": manifest.sha256}


def config_of_run(folder: Path) -> Config:
    """The settings of a finished run, to be used on one GPU."""
    from speedrun.checkpoint import latest_checkpoint, load_facts

    return config_from_json(load_facts(latest_checkpoint(folder))["config"])


def relative_error(found: Any, known: Any) -> float:
    """Norm of a tensor's difference from one in float64, over its norm."""
    return ((found.double() - known).norm() / known.norm()).item()


SHORT: dict[str, Any] = {"steps": 600, "val_tokens": 131_072}  # what a laptop's comparisons run


def with_record_muon(base: Config) -> Config:
    """A run under record 89's Muon; momentum's ramps are as long a share of it as of the record's."""
    rises, falls = round(0.23 * base.steps), round(0.04 * base.steps)
    changes = fields_of(RECORD_MUON, "optim.muon.") | {"optim.matrices": "muon"}
    changes |= {"schedule.momentum_min": 0.85, "schedule.momentum_ramp": (rises, falls)}
    if base.precision == "float32":  # on a CPU
        changes |= {"optim.muon.param_dtype": "float32", "optim.muon.ns_dtype": "bfloat16"}
    return vary(base, changes)


def best_of(slug: str, name: str) -> Config:
    """The run with the lowest loss of a committed measurement, each arm's first seed counting."""
    arms = load_result(slug, name)["data"]["arms"]
    best = min((runs[0] for runs in arms.values()), key=lambda run: run["val_loss"])
    return config_from_json(best["config"])


def cpu_base() -> Config:
    """The run in which ideas are compared on a laptop: cpu_gpt2's model under record 89's Muon, at chapter 13's rates."""
    return vary(
        with_record_muon(vary(preset("cpu_gpt2"), SHORT)),
        {"optim.matrix_lr": 0.016, "optim.adam.lr": 0.004},
    )


def gpu_base(data: str) -> Config:
    """The run in which ideas are compared on a GPU: 30 million parameters, 400 steps of 32,768 tokens."""
    sizes = {
        "model.num_layers": 6,
        "model.num_heads": 6,
        "model.model_dim": 384,
        "model.init_std": 0.03,
    }
    reads = {"data.path": data, "data.batch_tokens": 32_768, "data.micro_batches": 1}
    lasts: dict[str, Any] = {"steps": 400, "schedule.warmup_steps": 40, "val_tokens": 1_048_576}
    adamw = {"optim.matrices": "adam", "optim.matrix_lr": 0.0, "schedule.momentum_min": 0.0}
    adamw |= fields_of(MuonConfig(weight_decay=0.1), "optim.muon.")  # should an arm have it
    return vary(preset("small_gpt2"), sizes | reads | lasts | adamw)


def reset_run(live: "Run", config: Config) -> None:
    """Put an assembled run back to its first step, with another config: one that differs in optimizer, schedule and seed alone."""
    import torch

    from speedrun.data.loader import Position
    from speedrun.model.init import init_weights
    from speedrun.train import build_optimizer, warm_up

    model = live.model
    for spec in model.specs:  # an optimizer may have given it another dtype
        weights = model.get_parameter(spec.name)
        weights.data, weights.grad = torch.empty(spec.shape, device=weights.device), None
    init_weights(model, config.seed)
    live.config, live.step, live.loader.position = config, 0, Position()
    live.optimizer = build_optimizer(config, model)
    live.nonfinite_steps.zero_()
    live.recorder.calls.clear()  # recorded with the old places
    live.clock.elapsed_ms = 0.0
    warm_up(live)


def train_with_history(live: "Run") -> dict[str, list]:
    """Train from the first step to the last; the weights that mix, by name: [step, values] at 33 moments."""
    from speedrun.train import train_step

    model: Any = live.model
    steps, every = live.config.steps, -(-live.config.steps // 32)
    few = {spec.name: model.get_parameter(spec.name) for spec in model.specs if spec.is_scalar}
    learned: dict[str, list] = {name: [] for name in few}
    for step in range(steps + 1):
        for name, values in few.items():
            if step % every == 0 or step == steps:
                learned[name].append([step, values.tolist()])
        if step < steps:
            train_step(live)
    return learned


WORKER: dict[str, Any] = {"turn": nullcontext()}  # a process's own place: entered while it trains


def train_in_place(live: "Run", config: Config, after: After | None = None) -> dict:
    """Train a run with the assembled model of another; what it ends with, and what `after` finds in it."""
    from speedrun.train import validation_loss, val_batches

    reset_run(live, config)
    with WORKER["turn"]:
        live.clock.start()
        learned = train_with_history(live)
        live.clock.stop()
    done: dict[str, Any] = {"val_loss": validation_loss(live, val_batches(live, config.val_tokens))}
    done |= {"seconds": live.clock.elapsed_ms / 1000, "skipped": live.nonfinite_steps.item()}
    done |= ({"learned": learned} if learned else {}) | (after(live) if after else {})
    return done | {"config": dataclasses.asdict(config)}


def compile_key(config: Config) -> str:
    """All that decides what is compiled for a run."""
    parts = (config.model, config.data, config.precision, config.compile)
    return repr((*parts, config.optim.muon.param_dtype))


def group_by_model(runs: Sequence[Config], gpus: int) -> list[list[int]]:
    """Numbers of runs that share a model; dealt out to the GPUs if there are fewer models than those."""
    alike: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        alike.setdefault(compile_key(run), []).append(number)
    parts = 1 if len(alike) >= gpus else gpus
    dealt = [group[part::parts] for group in alike.values() for part in range(parts)]
    return [group for group in dealt if group]


def take_place(places: Any) -> None:
    """Let this process see one GPU only, on which it trains when it is its turn; or none, and use one thread."""
    import torch

    gpu, turn = places.get()
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    if turn is not None:
        WORKER["turn"] = turn
    else:
        torch.set_num_threads(1)


def train_group(runs: Sequence[Config], after: After | None) -> list[dict]:
    """Train runs of one model, one after the other; what `train_in_place` says of each."""
    import torch

    from speedrun.train import build_run

    torch._dynamo.reset()  # PyTorch keeps eight versions of a function at most
    with tempfile.TemporaryDirectory() as folder:
        live = build_run(runs[0], Path(folder), echo=None)
        return [train_in_place(live, run, after) for run in runs]


def train_each(
    runs: Sequence[Config], on_gpus: bool, after: After | None = None
) -> Iterator[tuple[int, dict]]:
    """Train runs on the GPUs of this machine, or one on each of its cores; the number of each with what `train_in_place` says, as they end.

    Two processes share a GPU: while one trains, the other compiles the next model.
    """
    context, machine = get_context("spawn"), detect_machine()
    if on_gpus and not machine.gpus:
        raise UserError("this is measured on a GPU, and PyTorch sees none", "make doctor says why")
    groups = [[number] for number in range(len(runs))]
    free: list[tuple[str, Any]] = [("", None)] * machine.cores
    if on_gpus:
        groups = group_by_model(runs, len(machine.gpus))
        free = 2 * [(str(gpu), context.Lock()) for gpu in range(len(machine.gpus))]
    places = context.Queue()
    for place in free:
        places.put(place)
    workers = max(1, min(len(free), len(groups)))
    with ProcessPoolExecutor(workers, context, take_place, (places,)) as pool:
        jobs = {
            pool.submit(train_group, [runs[n] for n in group], after): group for group in groups
        }
        for job in as_completed(jobs):
            yield from zip(jobs[job], job.result())


def step_times(
    arms: dict[str, Config], rounds: int = 12, steps: int = 10
) -> dict[str, list[float]]:
    """Milliseconds of a step of each arm, the arms in turn; on a CPU with one thread."""
    import torch

    from speedrun.train import build_run, train_step, warm_up

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    live = {arm: build_run(run, folder / arm, echo=None) for arm, run in arms.items()}
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


def kept_runs(facts: dict) -> Path:
    """The folder for what is finished of a measurement with this stamp, until all of it is: by its command, code, machine and text."""
    same = [facts[key] for key in ("command", "modules", "gpu", "cpu", "torch", "corpus")]
    name = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]
    return root() / "_build" / "measured" / name


def train_arms(
    arms: dict[str, Config],
    seeds: int | dict[str, int],
    facts: dict,
    on_gpus: bool = False,
    after: After | None = None,
) -> dict[str, list[dict]]:
    """Train every arm with the seeds 0 … seeds − 1, all arms with one seed before any with the next: {arm: [run, …]}.

    seeds: for all arms, or by arm. facts: the measurement's stamp; runs that ended when it was made before, and did not end itself, are not made again.
    """
    counts = {arm: seeds if isinstance(seeds, int) else seeds[arm] for arm in arms}
    pairs = [(arm, seed) for seed in range(max(counts.values())) for arm in arms if seed < counts[arm]]  # fmt: skip
    runs = [vary(arms[arm], {"seed": seed}) for arm, seed in pairs]
    texts = [json.dumps(dataclasses.asdict(run), sort_keys=True) for run in runs]
    names = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
    files = [kept_runs(facts) / f"{name}.json" for name in names]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    missing = [number for number, file in enumerate(files) if not file.exists()]
    ended = train_each([runs[number] for number in missing], on_gpus, after)
    for number, done in tqdm(ended, total=len(missing), unit="run"):
        atomic_write(files[missing[number]], json.dumps(done))
    found = dict(zip(pairs, (json.loads(file.read_text(encoding="utf-8")) for file in files)))
    return {arm: [found[arm, seed] for seed in range(counts[arm])] for arm in arms}
