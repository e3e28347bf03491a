"""Some steps of the bank optimizer on one of several ranks; started by test_optimizer.py.

    torchrun … optimizer_ranks.py SCENARIO OUT [SAVED]

Each of four micro-batches has its own gradient; a rank has the sum of its own ones. Writes parameters, state, and what else a test asks.
"""

import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from speedrun.config import TODAY
from speedrun.optim.distributed import ranks
from speedrun.optim.optimizer import (
    BankOptimizer,
    Entry,
    OptimizerOptions,
    blame,
    load_state,
    state_tensors,
    untie,
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


def model() -> dict[str, torch.Tensor]:
    """Parameters, the same on every rank."""
    draw = torch.Generator().manual_seed(1)
    found = {}
    for name, shape in SHAPES.items():
        p = 0.1 * torch.randn(shape, generator=draw)
        found[name] = torch.nn.Parameter(p.bfloat16() if name in BF16 else p)
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


def moments(optimizer: BankOptimizer) -> dict:
    """The whole state, in the middle of a pair of steps, too."""
    optimizer.pending, pending = False, optimizer.pending
    found = state_tensors(optimizer)
    optimizer.pending = pending
    return found


def run_steps(scenario: str, saved: dict | None) -> dict:
    """All that a scenario leaves behind."""
    (rank, world), parameters = ranks(), model()
    kind = "integers" if "integers" in scenario else "normal"
    options = OptimizerOptions(muon=replace(TODAY, products="bfloat16"))
    if "float32" in scenario:
        options = OptimizerOptions(muon=replace(TODAY, weights="float32"))
        for p in parameters.values():
            p.data = p.data.float()
    optimizer = BankOptimizer(parameters, TABLE, options, SCATTER, WORK)
    first, last, out = 0, 6, {"start": {name: p.detach().clone() for name, p in parameters.items()}}
    if saved:
        first = 4
        for name, p in parameters.items():
            p.data.copy_(saved["parameters"][name])
        load_state(optimizer, saved["state"])
    for step in range(first, last):
        if step == 3 and not saved:
            untie(optimizer, "embed")
        if step == 4 and not saved:
            copies = {name: p.detach().clone() for name, p in parameters.items()}
            out["halfway"] = {"parameters": copies, "state": state_tensors(optimizer)}
        for micro in range(rank * MICRO // world, (rank + 1) * MICRO // world):
            for name, p in parameters.items():
                p.grad += gradient(name, step, micro, kind).to(p.dtype)
            rows = gradient("bigram", step, micro, kind).any(1).nonzero()
            optimizer.parts["bigram"].announce(rows)
        if "nan" in scenario and step == 5 and rank == world - 1:
            parameters["values"].grad[3, 2] = float("nan")
        if step == 5:
            out["before"] = {name: p.detach().clone() for name, p in parameters.items()}
            out["before"] |= moments(optimizer)
        optimizer.step(step, RATES)
    left = {name: p.grad.abs().max().item() for name, p in parameters.items()}
    out |= {"parameters": dict(parameters), "state": state_tensors(optimizer), "left": left}
    return out | {"blame": blame(optimizer)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    saved = torch.load(sys.argv[3])["halfway"] if len(sys.argv) > 3 else None
    result = run_steps(sys.argv[1], saved)
    if dist.get_rank() == 0:
        torch.save(result, sys.argv[2])
    dist.destroy_process_group()
