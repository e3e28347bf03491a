# Tangled from notebooks/20_many_gpus.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.optim.adam import AdamConfig
from speedrun.optim.comm import dist_info
from speedrun.optim.optimizer import MuonAdam
from speedrun.optim.state import OptimConfig
from speedrun.optim.traffic import HALVES, bytes_of_step, bytes_sent, counted, sent_so_far


# %% The measurement
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from speedrun.schedule import StepSettings
from speedrun.params import ParamSpec
from speedrun.config import vary
from speedrun.presets import RECORD_MUON, preset
from speedrun.lab.bench import clocked, wait_for
from speedrun.lab.errors import UserError
from speedrun.lab.provenance import root, stamp

NAMES = ("wire",)
ON_GPUS = ("step", "trace", "nvlink")  # measured on a machine that has one or more
RANKS = (1, 2, 4, 8)
# matrices' sums first, but tables' updates: their gathers take longest, and travel while matrices are updated
SCATTER = ("qk", "mlp", "vo", "bigram", "values", "head", "embed", "replicated")
WORK = ("bigram", "values", "head", "embed", "qk", "mlp", "vo", "replicated")


def settings_at(step: int) -> StepSettings:
    """The same rates in every step."""
    return StepSettings(step, lr=0.008, matrix_lr=0.02, momentum=0.9)


def record_specs(scale: int = 1) -> tuple[ParamSpec, ...]:
    """Record 89's parameters in its banks, without their padding, updated much as there; its small ones are lumped together. scale: divides widths and vocabularies."""
    d, words = 768 // scale, 50_304 // scale
    bank = partial(ParamSpec, optim="muon", comm="sharded", matrices=1, wd_mul=1.0)
    adam: Any = partial(ParamSpec, optim="adam", comm="sharded", wd_mul=150.0, betas=(0.5, 0.95))
    table = partial(adam, lr_mul=75.0, wd_mul=5.0, betas=(0.75, 0.95))
    small: Any = partial(ParamSpec, optim="adam", wd_mul=1.0, betas=(0.9, 0.99))
    return (
        bank("qk", (60, d // 3, d)),
        bank("vo", (20, d, d)),
        bank("mlp", (22, 4 * d, d), lr_mul=(2.0, 4.0)),
        adam("head", (d, words)),
        adam("embed", (words, d), tied_to="head"),
        table("values", (5 * words, d)),
        table("bigram", (words * 15 // 2, d), comm="sharded_sparse"),
        small("gates", (12 * 60,)),
        small("scalars", (64,), lr_mul=5.0, wd_mul=0.0),
        small("mudd", (2 * 64, d), lr_mul=0.25),
    )


def record_parameters(scale: int, device: str = "cpu") -> dict[str, nn.Parameter]:
    """Small random values of those shapes, bfloat16 but for the scalars and what splits its own bits."""
    draw, found = torch.Generator(device).manual_seed(0), dict[str, nn.Parameter]()
    for spec in record_specs(scale):
        p = 0.02 * torch.randn(spec.shape, generator=draw, device=device)
        exact = spec.name == "scalars" or spec.optim == "muon"
        found[spec.name] = nn.Parameter(p if exact else p.bfloat16())
    return found


def small_record(scale: int, device: str = "cpu", compile: bool = True) -> MuonAdam:
    """Record 89's parameters and table at a fraction of its widths."""
    adam = AdamConfig(eps=1e-10, weight_decay=0.005, cautious=True, every=2)
    config = OptimConfig(adam, RECORD_MUON, "muon", grad_clip=0.0)
    parameters, specs = record_parameters(scale, device), record_specs(scale)
    return MuonAdam(parameters, specs, config, compile, SCATTER, WORK)


def announce_some(optimizer: MuonAdam, share: float, seed: int) -> Tensor:
    """Say that a share of the bigram table's rows was touched; which: (rows,) bool."""
    table, draw = optimizer.params["bigram"], torch.Generator().manual_seed(seed)
    rows = torch.rand(len(table), generator=draw) < share
    optimizer.states["bigram"].comm.announce(rows.nonzero())
    return rows


def wire_of_rank(device: str, scale: int = 8, touched: float = 0.2) -> dict:
    """Of each part: bytes that a rank sends, scattering and gathering, as counted (on CPUs: mean of the ranks) and by formula."""
    optimizer, (rank, world), found = small_record(scale, device), dist_info(), dict[str, dict]()
    announce_some(optimizer, touched, seed=rank)
    for name, state in optimizer.states.items():
        full, kind = state.comm.full, state.specs[0].comm
        size, rows = full.element_size(), touched * len(full) * (kind == "sharded_sparse")
        formula = bytes_sent(kind, full.numel(), size, world, rows, full[0].numel())
        found[name] = {"comm": kind, "bytes": full.numel() * size, "formula": formula} | {
            half: counted(state.comm, begin) for half, begin in HALVES.items()
        }
    return found


def steps_of_rank(device: str, scale: int = 48, steps: int = 4, micro: int = 4) -> dict:
    """Parameters after some steps with small integers for gradients, `micro` micro-batches shared by the ranks: a hash of each, and its length."""
    optimizer, (rank, world) = small_record(scale, device), dist_info()
    for step in range(steps):
        for part in range(rank * micro // world, (rank + 1) * micro // world):
            rows = announce_some(optimizer, 0.2, seed=100 * step + part)
            draw = torch.Generator().manual_seed(100 * step + part)
            for name, p in optimizer.params.items():
                g = torch.randint(-3, 4, p.shape, generator=draw)
                assert p.grad is not None  # the optimizer's storage
                p.grad += (g * rows[:, None] if name == "bigram" else g).to(p.grad)
        optimizer.step(settings_at(step))
    found = {name: p.detach().cpu() for name, p in optimizer.params.items()}
    bits = {name: p.view(torch.uint8).numpy().tobytes() for name, p in found.items()}
    hashes = {name: hashlib.sha256(some).hexdigest() for name, some in bits.items()}
    return {"hash": hashes, "length": {name: p.double().norm().item() for name, p in found.items()}}


def fill_gradients(optimizer: MuonAdam, index: int, tokens: int = 32_768) -> None:
    """Random gradients, the bigram table's in as many of its rows as a pair of record 89's micro-batches may touch."""
    rank, world = dist_info()
    rows = announce_some(optimizer, tokens / 377_280, seed=index * world + rank)
    for name, p in optimizer.params.items():
        assert p.grad is not None  # the optimizer's storage
        p.grad.normal_(std=1e-3)
        if name == "bigram":
            p.grad *= rows[:, None].to(p.grad)
    if world > 1:
        dist.barrier()


def time_steps(optimizer: MuonAdam, device: str, rounds: int = 17) -> dict[str, list]:
    """Milliseconds of steps without tables (even) and with them (odd), and of Python in them."""
    took: dict[str, list] = {"even": [], "odd": [], "exchange": []}
    for index in range(2 * (rounds + 4)):
        fill_gradients(optimizer, index)
        sparse, tables = optimizer.states["bigram"].comm, index % 2 == 1
        if tables and dist_info()[1] > 1:  # a trainer does this during the backward pass
            took["exchange"].append(clocked(sparse.exchange, device)[0])
        done = clocked(partial(optimizer.step, settings_at(index)), device)
        if index >= 8:
            took["odd" if tables else "even"].append(done)
    return took


def step_of_rank(device: str, scale: int = 0) -> dict:
    """Times of record 89's step, tied and apart; of each part's update alone, and of what is around the updates."""
    optimizer = small_record(scale or (1 if device == "cuda" else 48), device)
    begin = time.perf_counter()
    optimizer.warm_up()
    wait_for(device)
    found: dict[str, Any] = {"warm_up_s": time.perf_counter() - begin}
    found["tied"] = time_steps(optimizer, device)
    optimizer.ties.untie("embed")
    found["apart"] = time_steps(optimizer, device)
    works: dict[str, Callable[[], None]] = dict(optimizer.calls)
    works["guard"] = lambda: optimizer.check_finite(list(optimizer.states))
    works |= {f"clear {name}": state.comm.clear for name, state in optimizer.states.items()}
    with torch.no_grad():
        found["parts"] = {
            name: [clocked(work, device)[0] for _ in range(17)] for name, work in works.items()
        }
    if device == "cuda":
        found["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def ceilings(device: str) -> dict[str, float]:
    """What this device does at best: FLOPs a second of a large bfloat16 product, bytes a second of a large copy."""
    size = 8192 if device == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    source = torch.ones(16 * size * size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    works = {"flops": lambda: [a @ a for _ in range(10)]}
    works["bytes"] = lambda: [target.copy_(source) for _ in range(10)]
    amount, found = {"flops": 20 * size**3, "bytes": 20 * source.numel()}, {}
    for what, work in works.items():
        seconds = statistics.median(clocked(work, device)[0] for _ in range(7)) / 1000
        found[what] = amount[what] / seconds
    return found


def stock_of_rank(device: str, scale: int = 0) -> dict:
    """Milliseconds of a step of PyTorch's own pair: Muon on every matrix, fused AdamW on all else, both in bfloat16."""
    scale = scale or (1 if device == "cuda" else 48)
    parameters, matrices, rest = record_parameters(scale, device), [], []
    for spec in record_specs(scale):
        p, muon = parameters[spec.name], spec.optim == "muon"
        for one in p.detach().bfloat16() if muon else [p.detach()]:
            (matrices if muon else rest).append(nn.Parameter(one.clone()))
    pair: list[Any] = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0, momentum=0.95)]
    pair.append(torch.optim.AdamW(rest, lr=0.008, fused=True))
    for p in (*matrices, *rest):
        p.grad = 1e-3 * torch.randn_like(p)
    took = {
        name: [clocked(optimizer.step, device)[0] for _ in range(21)][4:]
        for name, optimizer in zip(("Muon", "AdamW"), pair)
    }
    return {"parts": took, "matrices": len(matrices), "ceilings": ceilings(device)}


def in_turn(optimizer: MuonAdam) -> None:
    """Leave streams out, and wait for every transfer as soon as it has begun."""
    optimizer.streams = dict.fromkeys(optimizer.states)
    for state in optimizer.states.values():
        for name in HALVES.values():
            begin = getattr(state.comm, name)
            wait = state.comm.wait
            setattr(state.comm, name, lambda begin=begin, wait=wait: (begin(), wait()))


def kind_of(kernel: str) -> str | None:
    """What a kernel does, by its name: sums, gathers, products or elementwise; None for what is no kernel."""
    if kernel.startswith(("nccl:", "gloo:", "ProfilerStep", "record_param_comms")):
        return None
    if "ncclDevKernel" in kernel:
        return "gathers" if "AllGather" in kernel else "sums"
    named = ("gemm", "nvjet", "cutlass", "xmma", "sm90_")
    return "products" if any(part in kernel for part in named) else "elementwise"


def stretches(kernels: list[tuple[str, float, float]], gap: float = 4.0) -> dict[str, list]:
    """What ran when, in µs from the first: kind → [begin, end] of each stretch; kernels closer than `gap` are one."""
    found: dict[str, list] = {"sums": [], "gathers": [], "products": [], "elementwise": []}
    first = min((begin for _, begin, _ in kernels), default=0.0)
    for name, begin, end in sorted(kernels, key=lambda kernel: kernel[1]):
        kind = kind_of(name)
        if kind is None:
            continue
        if found[kind] and begin - first - found[kind][-1][1] < gap:
            found[kind][-1][1] = max(found[kind][-1][1], round(end - first, 1))
        else:
            found[kind].append([round(begin - first, 1), round(end - first, 1)])
    return found


def trace_of_rank(device: str, scale: int = 0) -> dict:
    """What the first rank's GPU did in a step with tables, overlapped, and one thing after the other."""
    from torch.profiler import ProfilerActivity, profile

    optimizer = small_record(scale or (1 if device == "cuda" else 48), device)
    optimizer.warm_up()
    found = {}
    for way in ("overlapped", "in turn"):
        if way == "in turn":
            in_turn(optimizer)
        for index in range(8):
            fill_gradients(optimizer, index)
            if index % 2:
                optimizer.states["bigram"].comm.exchange()
            wait_for(device)
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
                took = clocked(partial(optimizer.step, settings_at(index)), device)
        events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        spans = [(e.name, e.time_range.start, e.time_range.end) for e in events]
        found[way] = {"lanes": stretches(spans), "ms": took[0]}
    return found


RUN_STEPS = 20  # timed in each stage


def stage_of_rank(run: Any, start: int, steps: int) -> dict:
    """Milliseconds of steps in the stage that begins at `start`, and bytes that this rank sends in a step, as counted and by formula."""
    from speedrun.lab.timer import StepTimer
    from speedrun.train import train_step

    run.step, marks = start, StepTimer(run.ranks.device)
    tokens = run.schedule.at(start).batch_tokens
    for _ in range(2):
        train_step(run)
    before = sent_so_far(run.ranks.device)
    marks.restart()
    for _ in range(steps):
        train_step(run)
        marks.mark()
    after = sent_so_far(run.ranks.device)
    counted = None if before is None or after is None else (after - before) / steps
    found = {"step": start, "tokens": tokens, "ms": marks.drain()}
    return found | {"sent": counted, "formula": bytes_of_step(run.optimizer)}


Spans = list[tuple[str, float, float]]


def named_transfers(kernels: Spans, begun: list[tuple[str, str]]) -> list[list]:
    """NCCL's kernels with what they carry: [kind, parameter, begin, end].

    begun: (kind, parameter) of sharded ones, as they were asked for; transfers of one kind run in that order. What is
    all-reduced are the replicated parameters together, and the flags that say whether gradients are finite.
    """
    queues = {kind: [name for k, name in begun if k == kind] for kind in ("sums", "gathers")}
    found: list[list] = []
    for kernel, begin, end in sorted(kernels, key=lambda one: one[1]):
        if (kind := kind_of(kernel)) not in queues:
            continue
        small = "AllReduce" in kernel or not queues[kind]
        found.append([kind, "all-reduced" if small else queues[kind].pop(0), begin, end])
    return found


def spans_of(seen: Any) -> Spans:
    """What a profile saw on the GPU: (kernel, begin, end), µs from the first kernel."""
    events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = [(e.name, e.time_range.start, e.time_range.end) for e in events if kind_of(e.name)]
    first = min((begin for _, begin, _ in spans), default=0.0)
    return [(name, round(begin - first, 1), round(end - first, 1)) for name, begin, end in spans]


def noted(optimizer: MuonAdam) -> list[tuple[str, str]]:
    """A list that grows by (kind, parameter) whenever the optimizer begins to sum or to gather what is sharded."""
    begun: list[tuple[str, str]] = []

    def noting(begin: Callable, what: tuple[str, str]) -> Callable:
        return lambda: (begun.append(what), begin())  # type: ignore[func-returns-value]

    for name, state in optimizer.states.items():
        for half, kind in (("reduce", "sums"), ("gather", "gathers")):
            if state.specs[0].comm != "replicated":
                setattr(state.comm, half, noting(getattr(state.comm, half), (kind, name)))
    return begun


def trace_of_run(run: Any) -> dict:
    """What the first rank's GPU does in a step that updates everything: stretches by kind, and transfers by parameter."""
    from torch.profiler import ProfilerActivity, profile

    from speedrun.train import train_step

    begun, run.step = noted(run.optimizer), 0
    for _ in range(3):
        train_step(run)
    run.clock.wait()
    begun.clear()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        train_step(run)
        run.clock.wait()
    spans = spans_of(seen)
    return {"lanes": stretches(spans, gap=20.0), "transfers": named_transfers(spans, begun)}


def run_of_rank(device: str, path: str, steps: int | str = RUN_STEPS) -> dict:
    """Stages, bytes and a trace of `record_200m` on this rank. On a CPU: of the same at CPU size, without a trace."""
    from speedrun.cpu_size import at_cpu_size
    from speedrun.run import memory_mb
    from speedrun.train import build_run, warm_up

    config = vary(preset("record_200m"), {"data.path": path})
    if device == "cpu":
        config = vary(at_cpu_size(config, 100), {"compile": False})
    config = vary(config, {"device": device})
    with tempfile.TemporaryDirectory() as folder:
        run = build_run(config, Path(folder), echo=lambda line: None)
        found: dict[str, Any] = {"warm_up_s": warm_up(run)}
        if device == "cuda":
            found["trace"] = trace_of_run(run)
        long = [s for s in run.schedule.starts if s + int(steps) + 2 < config.steps]
        found["stages"] = [stage_of_rank(run, start, int(steps)) for start in long]
        return found | {"memory_mb": memory_mb(run.ranks.device)}


WORKS: dict[str, Callable[..., dict]] = {"wire": wire_of_rank, "steps": steps_of_rank}
WORKS |= {"step": step_of_rank, "stock": stock_of_rank, "trace": trace_of_rank, "run": run_of_rank}
WORKS |= {"nvlink": partial(wire_of_rank, scale=1, touched=32_768 / 377_280)}


def one_rank(name: str, out: str, device: str, *rest: str) -> None:
    """What each process of `on_ranks` does."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if name != "run":  # or transfers wait behind large kernels; the trainer does not ask for it
            os.environ["TORCH_NCCL_HIGH_PRIORITY"] = "1"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    result = WORKS[name](device, *rest)
    if dist_info()[0] == 0:
        Path(out).write_text(json.dumps(result))
    dist.destroy_process_group()


def on_ranks(world: int, name: str, device: str = "cpu", rest: Sequence[str] = ()) -> dict:
    """What a work gives on the first of `world` processes of this machine, which talk through gloo, or on GPUs through NCCL. rest: its arguments."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={world}", "-m", "speedrun.measure.many_gpus"]
        command += [name, str(out), device, *rest]
        quiet = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=root(), env=quiet, capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        return json.loads(out.read_text())


def on_gpus(name: str) -> dict:
    """A measurement on this machine's GPUs."""
    count = torch.cuda.device_count()
    if count < (1 if name == "step" else 2):
        raise UserError(f"“{name}” is measured on GPUs, here are {count}", "make doctor says why")
    if name != "step":
        return on_ranks(2, name, "cuda")
    worlds = {str(w): on_ranks(w, "step", "cuda") for w in RANKS if w <= count}
    return {"ranks": worlds, "stock": on_ranks(1, "stock", "cuda")}


def run_on_gpus(world: int, path: str, command: str) -> tuple[dict, dict]:
    """`run_of_rank` on a number of this machine's GPUs, which read the folder `path`: data and stamp."""
    from speedrun.measure.runs import corpus_of

    if (count := torch.cuda.device_count()) < world:
        what = f"“run_{world}” is measured on GPUs, here are {count}"
        raise UserError(what, "make doctor says why")
    run = preset("record_200m")
    run = vary(run, {"data.path": str(Path(path or run.data.path).absolute())})
    of = ["speedrun.train", "speedrun.measure.many_gpus", "speedrun.optim.sparse"]
    data = on_ranks(world, "run", "cuda", [run.data.path])
    return data, stamp(command, of, RUN_STEPS, [run.seed], corpus_of(run))


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """wire: bytes that a rank sends for each part of record 89's table at an eighth of its widths, by number of ranks.

    On GPUs, step: times of record 89's step and of PyTorch's own pair. trace: what ran when. nvlink: bytes, of two ranks.
    run_1, run_2, run_4, run_8: `record_200m` on so many GPUs, its steps, bytes and a trace; its argument a data folder, if not the preset's.
    """
    if name.startswith("run_"):
        return run_on_gpus(int(name[4:]), arguments[0] if arguments else "", command)
    modules = ["speedrun.measure.many_gpus", "speedrun.optim.sparse"]
    if name in ON_GPUS:
        samples = {"step": 17, "trace": 1, "nvlink": 5}[name]
        return on_gpus(name), stamp(command, modules, samples)
    found = {str(world): on_ranks(world, "wire") for world in RANKS}
    return {"ranks": found}, stamp(command, modules, 1)


if __name__ == "__main__" and __spec__ is not None:  # python -m, not a notebook
    one_rank(*sys.argv[1:])
