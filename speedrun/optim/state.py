# Tangled from notebooks/20_many_gpus.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.optim.adam import AdamConfig, Number, adam_step
from speedrun.optim.comm import Replicated, Sharded
from speedrun.optim.graph import StepScalars, bias_correction


# %% The parameter table
import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from speedrun.lab.bounds import NonNegativeFloat
from speedrun.lab.compile import compiled_copy
from speedrun.optim.muon import MuonConfig, matrix_lr_mul, muon_state, muon_step, split_bf16
from speedrun.params import ParamSpec


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer of all parameters. The defaults are llm.c's for GPT-2."""

    adam: AdamConfig = field(default_factory=AdamConfig)
    """Adam."""
    muon: MuonConfig = field(default_factory=MuonConfig)
    """Muon, if it updates the matrices."""
    matrices: Literal["adam", "muon", "soap"] = "adam"
    """What updates the blocks' matrices. muon: orthogonalised momentum. soap: Adam in the eigenbases of the gradient's covariances."""
    matrix_lr: Annotated[NonNegativeFloat, "0: optim.adam.lr"] = 0.0
    """Peak learning rate of the blocks' matrices; 0: optim.adam.lr."""
    grad_clip: Annotated[NonNegativeFloat, "0 switches clipping off"] = 1.0
    """Largest norm of the gradient of all parameters together; 0 switches clipping off."""


def assign_optimizers(specs: Iterable[ParamSpec], config: OptimConfig) -> tuple[ParamSpec, ...]:
    """The model's table with the optimizer's columns filled in; the matrices come first, since they take longest."""
    adam, found = "adam" if config.adam.cautious else "adamw", []
    ratio = (config.matrix_lr or config.adam.lr) / config.adam.lr
    for spec in specs:
        optim: Any = config.matrices if spec.matrices and config.matrices != "adam" else adam
        lr_mul: Any = matrix_lr_mul(spec, config.muon) if optim == "muon" else spec.lr_mul
        lr_mul = ratio * lr_mul if spec.matrices and optim == adam else lr_mul
        found.append(replace(spec, optim=optim, lr_mul=lr_mul))
    return tuple(sorted(found, key=lambda spec: spec.optim not in MATRIX_RULES))


MATRIX_RULES = ("muon", "soap")  # of whole matrices; all others work entry by entry


# %% Communication and update rule
class AdamRule:
    """Adam with cautious decay, on a shard of one parameter, or on the vector of many: then every constant is a vector, too."""

    graphable = True

    def __init__(self, specs: Sequence[ParamSpec], comm: Any, config: OptimConfig, fuse: bool):
        self.comm, self.eps = comm, config.adam.eps
        self.state = {
            key: torch.zeros_like(comm.shard, dtype=torch.float32)
            for key in ("exp_avg", "exp_avg_sq")
        }

        def column(values: list[float], dtype=torch.float32) -> Number:
            if not isinstance(comm, Replicated):
                return values[0]
            found = torch.zeros(len(comm.shard), dtype=dtype)
            for part, value in zip(comm.views(found).values(), values):
                part.fill_(value)
            return found.to(comm.shard.device)

        self.lr_mul = column([spec.lr_mul for spec in specs])  # type: ignore[misc]
        self.weight_decay = column([config.adam.weight_decay * spec.wd_mul for spec in specs])
        betas = [[(spec.betas or config.adam.betas)[n] for spec in specs] for n in (0, 1)]
        self.betas = (column(betas[0]), column(betas[1]))
        self.betas64 = [column(values, torch.float64) for values in betas]
        self.step = compiled_copy(adam_step, fuse)

    def update(self, scalars: StepScalars, skip: Tensor, updates: Tensor) -> None:
        """One step of the shard."""
        lr = scalars["lr"] * self.lr_mul
        decay = lr * lr * self.weight_decay
        corrections = tuple(bias_correction(beta, updates) for beta in self.betas64)
        own, numbers = (self.comm.shard, self.comm.grad), (self.eps, decay, skip)
        self.step(*own, *self.state.values(), lr, self.betas, corrections, *numbers)


class AdamWRule:
    """PyTorch's fused AdamW: decay of lr · weight_decay, of every weight."""

    graphable = False  # the rate is an argument on the host

    def __init__(self, specs: Sequence[ParamSpec], comm: Any, config: OptimConfig, fuse: bool):
        self.state = {key: torch.zeros_like(comm.shard) for key in ("exp_avg", "exp_avg_sq")}
        tensors = [comm.shard, comm.grad, *self.state.values()]
        views = [list(comm.views(tensor).values()) for tensor in tensors]
        self.config, groups = config.adam, dict[tuple, list[tuple[Tensor, ...]]]()
        for spec, *own in zip(specs, *views):
            numbers = spec.lr_mul, spec.wd_mul, spec.betas or config.adam.betas
            groups.setdefault(numbers, []).append(tuple(own))
        self.groups = {key: [list(some) for some in zip(*rows)] for key, rows in groups.items()}

    def update(self, scalars: StepScalars, skip: Tensor, updates: Tensor) -> None:
        """One step of the shard."""
        for (lr_mul, wd_mul, (beta1, beta2)), tensors in self.groups.items():
            p, g, exp_avg, exp_avg_sq = tensors
            done = list((updates - 1).float().repeat(len(p)).unbind())  # adamw counts on
            rates: dict[str, Any] = {"lr": scalars.host["lr"] * lr_mul, "eps": self.config.eps}
            rates |= {"weight_decay": self.config.weight_decay * wd_mul, "beta1": beta1}
            rates |= {"beta2": beta2, "maximize": False, "amsgrad": False}
            adamw(p, g, exp_avg, exp_avg_sq, [], done, fused=True, found_inf=skip, **rates)


class MuonRule:
    """Muon, on the whole matrices that this rank has."""

    def __init__(self, specs: Sequence[ParamSpec], comm: Any, config: OptimConfig, fuse: bool):
        (spec,), muon = specs, config.muon
        self.comm, self.config, self.graphable = comm, muon, bool(muon.ns_steps)
        self.state = muon_state(comm.shard, muon)
        self.weight_decay, self.lr_mul = muon.weight_decay * spec.wd_mul, spec.lr_mul
        if isinstance(spec.lr_mul, tuple):  # for the matrices in turn
            turns = [spec.lr_mul[n % len(spec.lr_mul)] for n in range(len(comm.full))]
            column = torch.tensor(turns, device=comm.shard.device)[:, None, None]
            self.lr_mul = comm.my_slice(column)  # type: ignore[assignment]
        self.step = compiled_copy(muon_step, fuse and self.graphable)

    def update(self, scalars: StepScalars, skip: Tensor, updates: Tensor) -> None:
        """One step of the shard."""
        numbers = scalars["matrix_lr"], self.lr_mul, scalars["momentum"], self.weight_decay
        self.step(self.comm.shard, self.comm.grad, self.state, *numbers, self.config, skip)


REPLICATED = "replicated"  # the name under which all replicated parameters stand in an order


@dataclass
class ParamState:
    """How one parameter, or the vector of small ones, is shared by the ranks, and updated."""

    specs: Sequence[ParamSpec]
    comm: Any
    rule: Any
    every: int = 1
    """Steps from one update to the next."""


def build_state(
    specs: Sequence[ParamSpec], params: Mapping[str, Tensor], config: OptimConfig, fuse: bool
) -> ParamState:
    """A parameter's comm and rule. Muon's parameters become bfloat16 here if the config says so."""
    spec, p, mantissa = specs[0], params[specs[0].name], None
    matrix = spec.optim in MATRIX_RULES
    if spec.optim == "muon" and config.muon.param_dtype != "float32" and p.dtype == torch.float32:
        p.data, mantissa = split_bf16(p.data)
    unit = (p.shape[1] // spec.matrices, p.shape[2]) if matrix else tuple(p.shape[1:])
    if spec.comm == REPLICATED:
        comm: Any = Replicated({row.name: params[row.name] for row in specs})
    else:
        kind: Any = Sharded
        if spec.comm == "sharded_sparse":
            kind = importlib.import_module("speedrun.optim.sparse").ShardedSparse
        comm = kind(spec.name, p, unit)
    rules: dict[str, Any] = {"adam": AdamRule, "adamw": AdamWRule, "muon": MuonRule}
    if spec.optim == "soap":
        from speedrun.optim.soap import SoapRule

        rules["soap"] = SoapRule
    rule = rules[spec.optim](specs, comm, config, fuse)
    if mantissa is not None and "mantissa" in rule.state:
        rule.state["mantissa"].copy_(comm.shard_of(mantissa.view(comm.units, *unit)))
    return ParamState(specs, comm, rule, 1 if matrix else config.adam.every)


def build_states(
    specs: Sequence[ParamSpec], params: Mapping[str, Tensor], config: OptimConfig, fuse: bool
) -> dict[str, ParamState]:
    """A state for each row, by its name, and one for the replicated rows of each rule and dtype."""
    groups: dict[str, list[ParamSpec]] = {}
    for spec in specs:
        small = f"{REPLICATED} {spec.optim} {params[spec.name].dtype}"
        groups.setdefault(small if spec.comm == REPLICATED else spec.name, []).append(spec)
    return {name: build_state(rows, params, config, fuse) for name, rows in groups.items()}
