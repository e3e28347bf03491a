"""Some steps of the bank optimizer on one of several ranks; started by test_optimizer.py.

    torchrun … optimizer_ranks.py DEVICE SCENARIO OUT [SAVED STEP]

Each of four micro-batches has its own gradient; a rank has the sum of its own ones. Writes parameters, state, and what else a test asks.
SAVED STEP: another run's file, and which of the states in it to go on from.
"""

import os
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
import torch.distributed as dist

from speedrun.config import TODAY
from speedrun.measure import many_gpus
from speedrun.optim.distributed import ranks
from speedrun.optim.optimizer import (
    BankOptimizer,
    Entry,
    OptimizerOptions,
    blame,
    load_state,
    state_tensors,
    untie,
    warm_up,
)

MICRO = 4
SHAPES = {
    "qk": (3, 16, 12),  # two matrices a slice: six of 8 × 12
    "mlp": (5, 24, 8),  # five tall ones, for no number of ranks
    "head": (10, 28),
    "embed": (28, 10),
    "values": (37, 6),
    "bigram": (61, 6),
    "gates": (7,),
    "scalars": (5,),
}
TABLE = (
    Entry("qk", "muon", "sharded", matrices=2),
    Entry("mlp", "muon", "sharded", rate=(2.0, 4.0)),
    Entry("head", "adam", "sharded", decay=150.0, betas=(0.5, 0.95)),
    Entry("embed", "adam", "sharded", decay=150.0, betas=(0.5, 0.95), tied="head"),
    Entry("values", "adam", "sharded", rate=75.0, decay=5.0, betas=(0.75, 0.95)),
    Entry("bigram", "adam", "sparse", rate=75.0, decay=5.0, betas=(0.75, 0.95)),
    Entry("gates", "adam", "replicated", betas=(0.9, 0.99)),
    Entry("scalars", "adam", "replicated", rate=5.0, decay=0.0, betas=(0.9, 0.99)),
)
BF16 = ("head", "embed", "values", "bigram", "gates")
SCATTER = ("values", "bigram", "head", "replicated", "mlp", "qk", "embed")
WORK = ("replicated", "qk", "head", "embed", "bigram", "values", "mlp")
RATES = {"muon": 0.02, "adam": 0.008, "momentum": 0.9}


def model(device: str = "cpu") -> dict[str, torch.Tensor]:
    """Parameters, the same on every rank."""
    draw = torch.Generator().manual_seed(1)
    found = {}
    for name, shape in SHAPES.items():
        p = 0.1 * torch.randn(shape, generator=draw)
        found[name] = torch.nn.Parameter((p.bfloat16() if name in BF16 else p).to(device))
    found["embed"].data.copy_(found["head"].data.mT)
    return found


def gradient(name: str, step: int, micro: int, kind: str) -> torch.Tensor:
    """A micro-batch's gradient: small integers, or normal numbers; of the sparse table most rows are zero."""
    draw = torch.Generator().manual_seed(hash((step, micro, len(name), ord(name[0]))) % 2**31)
    shape = SHAPES[name]
    g = torch.randint(-3, 4, shape, generator=draw).float()
    if kind != "integers":
        g = torch.randn(shape, generator=draw)
    if name == "bigram":
        g *= (torch.rand(shape[0], generator=draw) < 0.2)[:, None]
    return g


def copies(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in named.items()}


def run_steps(scenario: str, device: str, saved: dict | None) -> dict:
    """All that a scenario leaves behind."""
    if scenario.startswith("record"):
        return record_steps(scenario, device)
    (rank, world), parameters = ranks(), model(device)
    kind = "integers" if "integers" in scenario else "normal"
    options = OptimizerOptions(muon=replace(TODAY, products="bfloat16"))
    if "float32" in scenario:
        options = OptimizerOptions(muon=replace(TODAY, weights="float32"))
        for p in parameters.values():
            p.data = p.data.float()
    optimizer = BankOptimizer(parameters, TABLE, options, SCATTER, WORK)
    out = {"start": copies(parameters), "at": {}}
    if device == "cuda":
        warm_up(optimizer)  # then what follows are replayed graphs
    if saved:
        for name, p in parameters.items():
            p.data.copy_(saved["parameters"][name])
        load_state(optimizer, saved["state"])
    for step in range(saved["step"] if saved else 0, 6):
        if step == 3 and not saved:
            untie(optimizer, "embed")
        whole = {"parameters": copies(parameters), "state": copies(state_tensors(optimizer))}
        out["at"][step] = {"step": step, **whole}
        for micro in range(rank * MICRO // world, (rank + 1) * MICRO // world):
            for name, p in parameters.items():
                p.grad += gradient(name, step, micro, kind).to(p)
            rows = gradient("bigram", step, micro, kind).any(1).nonzero()
            optimizer.parts["bigram"].announce(rows)
        if "silent" in scenario and step == 5 and rank == 0:
            optimizer.parts["bigram"].announced = False
        if "nan" in scenario and step == 5 and rank == world - 1:
            parameters["values"].grad[3, 2] = float("nan")
        optimizer.step(step, RATES)
    left = {name: p.grad.abs().max().item() for name, p in parameters.items()}
    now = {"parameters": copies(parameters), "state": copies(state_tensors(optimizer))}
    out |= {**now, "left": left}
    return out | {"blame": blame(optimizer)}


def record_steps(scenario: str, device: str) -> dict:
    """Hashes of record 89's parameters (on a CPU a 48th of the widths) after four steps, in lanes or one transfer after the other."""
    optimizer, found = many_gpus.small_record(1 if device == "cuda" else 48, device), {}
    if device == "cuda":
        warm_up(optimizer)
    if "in-turn" in scenario:
        many_gpus.in_turn(optimizer)
    for index in range(4):
        torch.manual_seed(10 * index + ranks()[0])
        many_gpus.fill_gradients(optimizer, index)
        optimizer.step(index, many_gpus.RATES)
    for name, p in optimizer.parameters.items():
        found[name] = sha256(p.detach().cpu().view(torch.uint8).numpy().tobytes()).hexdigest()
    left = {name: part.grads.abs().max().item() for name, part in optimizer.parts.items()}
    return {"hashes": found, "left": left}


def everything(result: dict) -> dict[str, torch.Tensor]:
    """All tensors of a result, or of one of its states."""
    return {**result["parameters"], **result["state"]}


def starter(folder: Path, device: str = "cpu"):
    """A function that runs a scenario on some ranks, once, and gives its result. saved: (scenario, world, step) to go on from."""
    found: dict = {}

    def run(scenario: str, world: int, saved: tuple[str, int, int] | None = None) -> dict:
        key = (scenario, world, saved)
        if key not in found:
            out = folder / "-".join(map(str, (scenario, world, *(saved or ()))))
            more = [str(folder / "-".join(map(str, saved[:2]))), str(saved[2])] if saved else []
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={world}", __file__, device, scenario, str(out), *more]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr[-9000:]
            found[key] = torch.load(out)
        return found[key]

    return run


if __name__ == "__main__":
    torch.set_num_threads(1)
    device, scenario, out, *rest = sys.argv[1:]
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    result = run_steps(scenario, device, torch.load(rest[0])["at"][int(rest[1])] if rest else None)
    if dist.get_rank() == 0:
        torch.save(result, out)
    dist.destroy_process_group()
