"""Some steps of the optimizer on one of several ranks; started by test_optimizer.py.

    torchrun … optimizer_ranks.py DEVICE ROUNDS

Each of four micro-batches has its own gradient; a rank has the sum of its own ones. Writes parameters, state, and what else a test asks.
ROUNDS: a list, as JSON, of a number of ranks and their jobs; a job is a scenario, the file to write, and null twice or another run's file and
which of the states in it to go on from. Where there are several rounds, ranks that have no part in one wait for the next.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

import forked
import torch
import torch.distributed as dist

from speedrun.measure import many_gpus
from speedrun.optim.adam import AdamConfig
from speedrun.optim.comm import dist_info
from speedrun.optim.optimizer import MuonAdam
from speedrun.optim.state import OptimConfig
from speedrun.params import ParamSpec
from speedrun.presets import RECORD_MUON
from speedrun.schedule import StepSettings

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
KINDS: dict[str, dict] = {
    "qk": {"optim": "muon", "comm": "sharded", "matrices": 2, "wd_mul": 1.0},
    "mlp": {"optim": "muon", "comm": "sharded", "matrices": 1, "lr_mul": (2.0, 4.0), "wd_mul": 1.0},
    "head": {"optim": "adam", "comm": "sharded", "wd_mul": 150.0, "betas": (0.5, 0.95)},
    "values": {
        "optim": "adam",
        "comm": "sharded",
        "lr_mul": 75.0,
        "wd_mul": 5.0,
        "betas": (0.75, 0.95),
    },
    "gates": {"optim": "adam", "wd_mul": 1.0, "betas": (0.9, 0.99)},
    "scalars": {"optim": "adam", "lr_mul": 5.0, "betas": (0.9, 0.99)},
}
KINDS["embed"] = KINDS["head"] | {"tied_to": "head"}
KINDS["bigram"] = KINDS["values"] | {"comm": "sharded_sparse"}
TABLE = tuple(ParamSpec(name, shape, **KINDS[name]) for name, shape in SHAPES.items())
BF16 = ("head", "embed", "values", "bigram", "gates")
SCATTER = ("values", "bigram", "head", "replicated", "mlp", "qk", "embed")
WORK = ("replicated", "qk", "head", "embed", "bigram", "values", "mlp")
ADAM = AdamConfig(eps=1e-10, weight_decay=0.005, cautious=True, every=2)
CONFIG = OptimConfig(adam=ADAM, muon=RECORD_MUON, matrices="muon", grad_clip=0.0)
CLIP = 30.0  # four micro-batches of normal numbers are longer than this in every step of all rows


def adamw_table(table: tuple[ParamSpec, ...] = TABLE) -> tuple[ParamSpec, ...]:
    """The same rows under AdamW, the banks as well; some with the optimizer's own betas."""
    found = []
    for row in table:
        rate = row.lr_mul if isinstance(row.lr_mul, float) else 1.0
        betas = None if row.name in ("values", "gates") else row.betas
        found.append(replace(row, optim="adamw", lr_mul=rate, betas=betas))
    return tuple(found)


def settings_at(step: int, **others) -> StepSettings:
    """The same rates in every step, but for what is said."""
    return StepSettings(step, **{"lr": 0.008, "matrix_lr": 0.02, "momentum": 0.9, **others})


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


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """A hash of all bits."""
    found = sha256()
    for tensor in tensors.values():
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def of_all_ranks(mine: str) -> list[str]:
    """What each rank says, by rank."""
    found = [mine] * dist_info()[1]
    dist.all_gather_object(found, mine)
    return found


def build(scenario: str, parameters: dict[str, torch.Tensor]) -> MuonAdam:
    """A scenario's optimizer, named by its words: float32, adamw, clipped."""
    muon = replace(RECORD_MUON, ns_dtype="bfloat16")
    if "float32" in scenario:
        muon = replace(RECORD_MUON, param_dtype="float32")
        for p in parameters.values():
            p.data = p.data.float()
    clip = CLIP if "clipped" in scenario else 0.0
    table = adamw_table() if "adamw" in scenario else TABLE
    return MuonAdam(
        parameters, table, replace(CONFIG, muon=muon, grad_clip=clip), True, SCATTER, WORK
    )


def run_steps(scenario: str, device: str, saved: dict | None) -> dict:
    """All that a scenario leaves behind."""
    if scenario.startswith("record"):
        return record_steps(scenario, device)
    (rank, world), parameters = dist_info(), model(device)
    kind = "integers" if "integers" in scenario else "normal"
    optimizer = build(scenario, parameters)
    sparse = optimizer.states["bigram"].comm
    out = {"start": copies(parameters), "at": {}}
    if device == "cuda":
        optimizer.warm_up()  # then what follows are replayed graphs
    if saved:
        for name, p in parameters.items():
            p.data.copy_(saved["parameters"][name])
        optimizer.load_state_dict(saved["state"])
    for step in range(saved["step"] if saved else 0, 6):
        now = {"parameters": copies(parameters), "state": copies(optimizer.state_dict())}
        out["at"][step] = {"step": step, **now}
        for micro in range(rank * MICRO // world, (rank + 1) * MICRO // world):
            for name, p in parameters.items():
                p.grad += gradient(name, step, micro, kind).to(p)
            sparse.announce(gradient("bigram", step, micro, kind).any(1).nonzero())
        if "silent" in scenario and step == 5 and rank == 0:
            sparse.announced = False
        if "nan" in scenario and step == 5 and rank == world - 1:
            parameters["values"].grad[3, 2] = float("nan")
        try:
            optimizer.step(settings_at(step, untie=step >= 3))
        except RuntimeError as error:
            if "silent" not in scenario:
                raise
            return {"refused": of_all_ranks(f"step {step}: {error}")}
    left = {name: p.grad.abs().max().item() for name, p in parameters.items()}
    now = {"parameters": copies(parameters), "state": copies(optimizer.state_dict())}
    out |= {**now, "left": left, "nonfinite": optimizer.nonfinite_params()}
    return out | {"digests": of_all_ranks(digest(everything(now)))}


def record_steps(scenario: str, device: str) -> dict:
    """Hashes of record 89's parameters (on a CPU a 48th of the widths) after four steps, on streams or one transfer after the other."""
    optimizer = many_gpus.small_record(1 if device == "cuda" else 48, device)
    if device == "cuda":
        optimizer.warm_up()
    if "in-turn" in scenario:
        many_gpus.in_turn(optimizer)
    for index in range(4):
        torch.manual_seed(10 * index + dist_info()[0])
        many_gpus.fill_gradients(optimizer, index)
        optimizer.step(many_gpus.settings_at(index))
    hashes = {name: digest({name: p}) for name, p in optimizer.params.items()}
    left = {name: s.comm.full_grad.abs().max().item() for name, s in optimizer.states.items()}
    return {"hashes": hashes, "left": left}


def everything(result: dict) -> dict[str, torch.Tensor]:
    """All tensors of a result, or of one of its states."""
    return {**result["parameters"], **result["state"]}


SCENARIOS = ("integers", "float32", "normal", "integers-nan", "float32-clipped", "adamw-float32-clipped", "adamw-integers")  # fmt: skip


Rounds = Sequence[tuple[int, Sequence[tuple[str, tuple[str, int, int] | None]]]]


def starter(folder: Path, device: str = "cpu", together: Sequence[str] = (), rounds: Rounds = ()):
    """A function that runs a scenario on some ranks, once, and gives its result. saved: (scenario, world, step) to go on from.

    together: of these all are run, one after the other, when the first is asked for: starting ranks takes longer than they run.
    rounds: (ranks, jobs) that are all run, in this order, by one start of the largest number of ranks.
    """
    found: dict = {}

    def named(scenario: str, world: int, saved: tuple[str, int, int] | None) -> str:
        return str(folder / "-".join(map(str, (scenario, world, *(saved or ())))))

    def start(rounds: Rounds) -> None:
        listed = [
            (
                world,
                [
                    (n, named(n, world, of), of and named(*of[:2], None), of and of[2])
                    for n, of in jobs
                ],
            )
            for world, jobs in rounds
        ]
        most = max(world for world, _ in rounds)
        words = [device, json.dumps(listed)]
        if device == "cpu":
            forked.train_on_ranks(words, most, folder, program="optimizer_ranks:main")
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={most}", __file__, *words]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr[-9000:]
        for world, jobs in rounds:
            for name, saved in jobs:
                found[name, world, saved] = torch.load(named(name, world, saved))

    def run(scenario: str, world: int, saved: tuple[str, int, int] | None = None) -> dict:
        if rounds and not found:
            start(rounds)
        if (scenario, world, saved) not in found:
            both = together if scenario in together and not saved else (scenario,)
            start([(world, [(name, saved) for name in both])])
        return found[scenario, world, saved]

    return run


def main(arguments: list[str]) -> int:
    """The work of one rank, which its environment names."""
    torch.set_num_threads(1)
    torch._dynamo.config.automatic_dynamic_shapes = False  # each scenario as if it were alone
    torch._dynamo.config.recompile_limit = 64
    device, rounds = arguments[0], json.loads(arguments[1])
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    for number, (world, jobs) in enumerate(rounds):
        rank = int(os.environ["RANK"])
        if rank >= world:
            continue
        way: dict = {}
        if len(rounds) > 1 or device == "cpu":
            met = Path(jobs[0][1]).with_name(f"round {number}")
            way = {"init_method": met.as_uri(), "rank": rank, "world_size": world}
            way |= {"timeout": timedelta(minutes=2)}  # a rank that waits in vain ends
        dist.init_process_group("nccl" if device == "cuda" else "gloo", **way)
        for scenario, out, saved, step in jobs:
            result = run_steps(scenario, device, torch.load(saved)["at"][step] if saved else None)
            if rank == 0:
                torch.save(result, out)
        dist.barrier()  # the next round may read what this one has written
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
