# Tangled from notebooks/16_compile.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.lab.compile import Recorder
from speedrun.model.compiled import compile_model


# %% The measurement
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch

from speedrun.config import vary
from speedrun.lab.bench import bench
from speedrun.lab.errors import UserError
from speedrun.lab.provenance import root, stamp
from speedrun.measure.runs import corpus_of
from speedrun.model.gpt import GPT
from speedrun.presets import preset

NAMES = ()
ON_GPUS = ("whole", "parts", "passes")  # with the folder of a corpus
RANKS = (8, 4, 2)  # of which one is timed
ONE_RANK: dict[str, Any] = {"data.batch_tokens": 16_384, "data.micro_batches": 1}  # of eight


def whole_model(model: GPT) -> Callable:
    """The whole forward pass in one graph, for each number of tokens anew; without the fusion that breaks gradients of a bank's slices (pytorch#193061)."""
    safe: dict[str, Any] = {"triton.mix_order_reduction": False}
    return torch.compile(model, dynamic=False, fullgraph=True, options=safe)


WAYS: dict[str, Callable] = {"whole": whole_model, "parts": compile_model}


def compiler_seconds(own_kernels_s: float) -> dict[str, float]:
    """What this process has spent in each part of the compiler so far, by PyTorch's own clocks, which contain one another."""
    from torch._dynamo.utils import compile_times

    clocks: dict[str, Any] = dict(zip(*compile_times(repr="csv", aggregate=True)))
    took = {name: float(clocks.get(name, 0.0)) for name in (
        "_compile.compile_inner", "create_aot_dispatcher_function", "compile_fx_inner", "PyCodeCache.load_by_key_path",
        "backward._backward_impl", "CachingAutotuner.benchmark_all_configs")}  # fmt: skip
    frames, autograd, inductor, kernels, later, tuning = took.values()
    return {
        "Dynamo": frames - autograd,
        "AOTAutograd": autograd + later - inductor,
        "Inductor": inductor - kernels,
        "Triton": kernels + own_kernels_s,
        "autotuning": tuning,
    }


def start_up(way: str, folder: str) -> dict[str, Any]:
    """Seconds from this process's start to the first step of one rank of eight's run, by what they went into; called in a process of its own."""
    began, marks, own = psutil.Process().create_time(), dict[str, float](), []
    from speedrun import train

    marks["import"] = time.time() - began
    config = vary(preset("record_200m"), {"data.path": folder, "val_tokens": 2**18, **ONE_RANK})
    with listening(own), mock.patch("speedrun.train.compile_model", WAYS[way]):
        run = train.build_run(config, Path(tempfile.mkdtemp()), echo=None)
        torch.cuda.synchronize()
        marks["build"] = time.time() - began
        train.warm_up(run)
        marks["warm-up"] = time.time() - began
    found = {"way": way, "seconds": marks, "compiler": compiler_seconds(sum(own))}
    from torch._dynamo.utils import counters

    return found | {
        "graphs": counters["stats"]["unique_graphs"],
        "peak_mib": torch.cuda.max_memory_reserved() >> 20,
    }


@contextlib.contextmanager
def listening(seconds: list[float]):
    """Triton's time for each kernel that is compiled in this block, of our own: Inductor's are counted by its clock."""
    from triton import knobs

    def listen(src: Any = None, times: Any = None, **others: Any) -> None:
        if not str(getattr(src, "name", src)).startswith("triton_"):
            seconds.append(times.total / 1e6)

    knobs.compilation.listener = listen
    try:
        yield
    finally:
        knobs.compilation.listener = None


def measure_start(way: str, folder: str) -> list[dict[str, Any]]:
    """`start_up` with empty caches and then with full ones, in new processes."""
    code = "import json, sys; from speedrun.measure.compile import start_up; print(json.dumps(start_up(*sys.argv[1:])))"
    words, rows = [sys.executable, "-c", code, way, folder], []
    with tempfile.TemporaryDirectory() as cache:
        places = {
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton",
        }
        for kept in ("cold", "warm"):
            variables = os.environ | places | {"PYTHONPATH": str(root())}
            done = subprocess.run(words, env=variables, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"{way}, {kept} caches: {done.stderr[-2000:]}", "run it by itself")
            rows.append({"caches": kept} | json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    return rows


def host_ms(call: Callable[[], Any], repeats: int = 11) -> float:
    """Milliseconds until a call returns, whatever it has asked a GPU for; the median."""
    took = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took)


def pass_times(folder: str) -> list[dict[str, Any]]:
    """Milliseconds of one rank's forward and backward pass, launched by Python and replayed, by its number of tokens; and of one graph of the whole model, replayed."""
    from speedrun import train

    config, rows = vary(preset("record_200m"), {"data.path": folder, **ONE_RANK}), []
    run = train.build_run(config, Path(tempfile.mkdtemp()), echo=None)
    now, ways = run.schedule.at(0), {"parts": run.forward, "whole": whole_model(run.model)}
    for ranks in RANKS:
        batches = run.loader.next(131_072 // ranks, now.max_doc_tokens)
        settings = (
            run.ranks.device,
            config.precision,
            run.attn_settings[now.stage],
            torch.tensor([now.candidates, 8 // ranks]),
        )
        calls = {}
        for way, forward in ways.items():
            recorder = Recorder(run.ranks.device)
            recorder.recording = True  # after the same pass by Python, which is timed before it
            record = partial(recorder, way)
            calls[f"{way}, by Python"] = partial(
                train.accumulate, forward, batches, ranks, *settings
            )
            calls[f"{way}, a CUDA graph"] = partial(
                train.accumulate, forward, batches, ranks, *settings, record=record
            )
        for name, took in bench(calls, "cuda", 15, warm_up=4).items():
            host = host_ms(calls[name])
            rows.append(
                {"name": name, "ranks": ranks, "tokens": 131_072 // ranks, "host_ms": host}
                | took._asdict()
            )
            print(rows[-1], flush=True)
    return rows


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """whole, parts: seconds from a process's start to the first step, by what they went into, of a model compiled as one graph or in parts. passes: milliseconds of a pass, by Python and by a CUDA graph. For one rank of record_200m on a corpus, whose folder is the argument."""
    if not torch.cuda.is_available():
        raise UserError(f"{name} needs a GPU", "run it on an NVIDIA GPU")
    if not arguments:
        raise UserError(f"no corpus is given for {name}", f"python scripts/measure.py compile {name} data/fineweb10B")  # fmt: skip
    folder = arguments[0]
    rows = pass_times(folder) if name == "passes" else measure_start(name, folder)
    corpus = corpus_of(vary(preset("record_200m"), {"data.path": arguments[0]}))
    modules = ["speedrun.measure.compile", "speedrun.train"]
    return {"rows": rows}, stamp(command, modules, 1, [0], corpus)
