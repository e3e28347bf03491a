# Tangled from notebooks/20_many_gpus.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.optim.comm import Replicated, dist_info
from speedrun.optim.graph import StepScalars, on_stream
from speedrun.optim.state import MATRIX_RULES, OptimConfig, ParamState, REPLICATED, build_states


# %% The parameter table
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from speedrun.lab.compile import GraphedCall, compiled_copy, new_stream
from speedrun.params import ParamSpec
from speedrun.schedule import StepSettings


def check_names(what: str, given: Iterable[str], wanted: Iterable[str], where: str) -> None:
    """Raise ValueError about names that are missing, that are too many, or that stand there twice."""
    counts, needed = Counter(list(given)), set(wanted)
    wrong = {
        "twice": sorted(name for name, count in counts.items() if count > 1),
        "missing": sorted(needed - set(counts)),
        f"not in {where}": sorted(set(counts) - needed),
    }
    said = [f"{kind}: {', '.join(names)}" for kind, names in wrong.items() if names]
    if said:
        raise ValueError(f"{what}: {'; '.join(said)}")


def check_specs(specs: Sequence[ParamSpec], params: Mapping[str, Tensor]) -> None:
    """Raise ValueError, which says where, if rows do not fit the parameters."""
    check_names("the parameter table", (spec.name for spec in specs), params, "the model")
    rows = {spec.name: spec for spec in specs}
    for spec in specs:
        p, other = params[spec.name], rows.get(spec.tied_to)
        matrix = spec.optim in MATRIX_RULES
        if matrix and (spec.comm != "sharded" or p.ndim != 3):
            raise ValueError(f"{spec.name}: {spec.optim} updates sharded banks of three dimensions")
        if matrix and p.shape[1] % max(1, spec.matrices):
            raise ValueError(f"{spec.name}: {p.shape[1]} rows are not {spec.matrices} matrices")
        if spec.optim != "muon" and isinstance(spec.lr_mul, tuple):
            raise ValueError(f"{spec.name}: {spec.optim} has one lr_mul, not {spec.lr_mul!r}")
        if spec.comm == "sharded_sparse" and p.ndim != 2:
            raise ValueError(f"{spec.name}: a sparse table has two dimensions, not {p.ndim}")
        if spec.tied_to and (other is None or params[spec.tied_to].shape != p.shape[::-1]):
            raise ValueError(f"{spec.name}: {spec.tied_to} has not the transposed shape")
        if other and {spec.comm, other.comm} != {"sharded"}:
            raise ValueError(f"{spec.name} and {spec.tied_to}: tied parameters have to be sharded")
        if other and (spec.optim != other.optim or matrix):
            raise ValueError(f"{spec.name} and {spec.tied_to}: both have to be adam's, or adamw's")


# %% The optimizer step
def addresses_of(p: Tensor) -> tuple[int, int]:
    """Where a parameter's value and gradient are stored."""
    return p.data_ptr(), 0 if p.grad is None else p.grad.data_ptr()


def new_streams(states: Mapping[str, ParamState], device: torch.device) -> dict[str, Any]:
    """A stream for each state; among several ranks one for the matrices and one for all else, which is faster there."""
    shared = dist_info()[1] > 1
    kinds = {
        name: state.specs[0].optim in MATRIX_RULES if shared else name
        for name, state in states.items()
    }
    streams = {kind: new_stream(device) for kind in dict.fromkeys(kinds.values())}
    return {name: streams[kind] for name, kind in kinds.items()}


def expand_order(
    states: Mapping[str, ParamState], what: str, order: Sequence[str] | None
) -> list[str]:
    """An order of rows as one of states: “replicated” spelled out, by rule and dtype. None: the table's."""
    small = [name for name in states if name.split()[0] == REPLICATED]
    names = [name for name in states if name not in small] + [REPLICATED] * bool(small)
    chosen = names if order is None else list(order)
    check_names(what, chosen, names, "the table")
    return [state for name in chosen for state in (small if name == REPLICATED else [name])]


# %% Tied parameters
def add_transposed(target: Tensor, source: Tensor) -> None:
    target.add_(source.mT)


def copy_transposed(target: Tensor, source: Tensor) -> None:
    target.copy_(source.mT)


class Ties:
    """Parameters that are the transpose of another one, until they are untied. tied: name → the other's."""

    def __init__(self, specs: Iterable[ParamSpec], states: Mapping[str, ParamState], fuse: bool):
        self.states, self.tied = states, {spec.name: spec.tied_to for spec in specs if spec.tied_to}
        self.add, self.copy = (compiled_copy(f, fuse) for f in (add_transposed, copy_transposed))

    def pairs(self, due: Sequence[str]) -> Iterator[tuple[Any, Any]]:
        """The comms of each tied parameter, and of the one that it is tied to, where that is due."""
        for name, other in self.tied.items():
            if other in due:
                yield self.states[name].comm, self.states[other].comm

    def add_grads(self, due: Sequence[str]) -> None:
        """Add the gradient of each tied parameter to that of the other."""
        for comm, other in self.pairs(due):
            self.add(other.full_grad[: other.units], comm.full_grad[: comm.units])
            comm.full_grad.zero_()

    def copy_values(self, due: Sequence[str]) -> None:
        """Give each tied parameter the other's values."""
        for comm, other in self.pairs(due):
            self.copy(comm.full[: comm.units], other.full[: other.units])

    def untie(self, name: str) -> None:
        """Let a parameter train by itself from now on, with the transposed moments of what it was tied to."""
        state, other = self.states[name], self.states[self.tied.pop(name)]
        for key, own in state.rule.state.items():
            moments = other.comm.full_of(other.rule.state[key]).mT.contiguous()
            own.copy_(state.comm.shard_of(moments))


class FiniteCheck:
    """Whether all gradients that are due are finite, on all ranks. skip: 1 in a step where they are not, else 0."""

    def __init__(self, states: Mapping[str, ParamState], ties: Ties, graphs: bool):
        self.ties, self.calls = ties, dict[tuple, tuple[GraphedCall, Tensor]]()
        self.grads = {name: state.comm.full_grads() for name, state in states.items()}
        self.device = next(iter(states.values())).comm.full.device
        self.stream = new_stream(self.device) if graphs else None
        self.skip = torch.zeros((), device=self.device)
        parameters = [name for grads in self.grads.values() for name in grads]
        self.counts = {name: torch.zeros((), device=self.device) for name in parameters}

    def find(self, due: Sequence[str], flags: Tensor) -> None:
        """Add the gradients of tied parameters, and flag this rank's gradients whose norm is not finite."""
        self.ties.add_grads(due)
        grads = [grad for name in due for grad in self.grads[name].values()]
        norms = torch._foreach_norm(grads)  # not the largest numbers: that is slow on a CPU
        flags.copy_(~torch.isfinite(torch.stack([norm.float() for norm in norms])))

    def __call__(self, due: Sequence[str]) -> None:
        """Set `skip`, and count the parameters that it is due to. Python does not wait for the device."""
        parameters = [parameter for name in due for parameter in self.grads[name]]
        if not parameters:
            self.skip.zero_()
            return
        key = (tuple(due), tuple(self.ties.tied))
        if key not in self.calls:
            flags = torch.zeros(len(parameters), device=self.device)
            self.calls[key] = GraphedCall(partial(self.find, due, flags), self.stream), flags
        find, flags = self.calls[key]
        find()
        if dist_info()[1] > 1:
            dist.all_reduce(flags)
        self.skip.copy_(flags.sum().clamp(max=1.0))
        torch._foreach_add_([self.counts[name] for name in parameters], list(flags.unbind()))


def grad_norm(states: Mapping[str, ParamState], params: Mapping[str, Tensor], due: Sequence[str]) -> Tensor:  # fmt: skip
    """The norm of all gradients that are due, summed over ranks: of what each rank has, in the table's order. A collective."""
    names = {spec.name for name in due for spec in states[name].specs}
    if dist_info()[1] == 1:
        return get_total_norm([p.grad for name, p in params.items() if name in names and p.grad is not None])  # fmt: skip
    total = torch.zeros((), device=next(iter(params.values())).device)
    sharded = [states[name].comm for name in due if not isinstance(states[name].comm, Replicated)]
    if sharded:
        total += get_total_norm([comm.grad for comm in sharded]).square()
    dist.all_reduce(total)  # of a fixed order of ranks, and the same on each
    small = [states[name].comm.grad for name in due if name.split()[0] == REPLICATED]
    return (total + get_total_norm(small).square()).sqrt() if small else total.sqrt()


class MuonAdam:
    """All parameters' updates, shared by all ranks, as their specs say (ZeRO-1; on one rank it is the same code).

    A step has three phases: reduce gradients in scatter order, and check that they are finite; in work order wait, update
    this rank's shard, start to gather; wait for all. Parameters keep their shapes and become views of padded storage;
    gradients are never None, are summed over ranks, and are cleared here. All ranks start from the same values. Saved
    values are loaded afterwards. scatter_order, work_order: names of rows, and “replicated” for all that are.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        specs: Sequence[ParamSpec],
        config: OptimConfig = OptimConfig(),
        compile: bool = True,
        scatter_order: Sequence[str] | None = None,
        work_order: Sequence[str] | None = None,
    ):
        check_specs(specs, params)
        self.params, self.specs, self.config = params, specs, config
        self.device = next(iter(params.values())).device
        self.use_graphs = compile and self.device.type == "cuda"
        with torch.no_grad():
            self.states = build_states(specs, params, config, self.use_graphs)
        self.scatter_order = expand_order(self.states, "scatter_order", scatter_order)
        self.work_order = expand_order(self.states, "work_order", work_order)
        self.addresses = {name: addresses_of(p) for name, p in params.items()}
        self.ties = Ties(specs, self.states, self.use_graphs)
        self.check_finite = FiniteCheck(self.states, self.ties, self.use_graphs)
        self.skip, self.scalars = self.check_finite.skip, StepScalars(self.device)
        self.updates = torch.zeros((), dtype=torch.float64, device=self.device)  # by Adam
        self.pending = False  # whether gradients wait for Adam's turn
        self.streams = new_streams(self.states, self.device)
        self.calls = {name: self.update_of(name) for name in self.states}
        with torch.no_grad():
            self.ties.copy_values(list(self.states))

    def update_of(self, name: str) -> GraphedCall:
        """A state's update as a call, on a stream of its own, which a graph may replace."""
        rule = self.states[name].rule
        update = partial(rule.update, self.scalars, self.skip, self.updates)
        graphed = self.use_graphs and rule.graphable
        return GraphedCall(update, self.streams[name] if graphed else None)

    @torch.no_grad()
    def step(self, settings: StepSettings) -> None:
        """Update what is due in a step. Python does not wait for the device."""
        self.check_addresses()
        for name in list(self.ties.tied) if settings.untie else ():
            self.ties.untie(name)
        due = self.due_params(settings.step)
        self.scalars.set(settings)
        self.reduce(due)
        self.clip(due)
        if not self.pending:  # only the device knows whether the step is left out
            self.updates += 1 - self.skip
        for name in due:
            comm = self.states[name].comm
            with on_stream(self.streams[name]):
                comm.wait()
                self.calls[name]()
                comm.gather()
                comm.clear()
        for name in due:
            if (stream := self.streams[name]) is not None:
                torch.cuda.current_stream().wait_stream(stream)
            self.states[name].comm.wait()
        self.ties.copy_values(due)

    def due_params(self, step: int) -> list[str]:
        """The states that are updated in a step: Adam's in every adam.every-th only, tied ones never."""
        self.pending = (step + 1) % self.config.adam.every != 0
        names = [name for name in self.work_order if name not in self.ties.tied]
        return [name for name in names if (step + 1) % self.states[name].every == 0]

    def reduce(self, due: Sequence[str]) -> None:
        """Begin the matrices' sums, check that gradients are finite, begin the other sums."""
        sums = [name for name in self.scatter_order if name in due]
        # nothing is added to the matrices' gradients any more
        early = list(takewhile(lambda name: self.states[name].specs[0].optim in MATRIX_RULES, sums))
        for name in early:
            self.states[name].comm.reduce()
        self.check_finite(due)
        for name in sums[len(early) :]:
            self.states[name].comm.reduce()

    def clip(self, due: Sequence[str]) -> None:
        """Scale all gradients that are due so that their norm is at most grad_clip; a norm that overflows is not finite either."""
        if not self.config.grad_clip or not due:
            return
        for name in due:
            self.states[name].comm.wait()
        norm = grad_norm(self.states, self.params, due)
        finite = torch.isfinite(norm)
        self.skip.clamp_(min=1.0 - finite.float())
        scale = self.config.grad_clip / (torch.where(finite, norm, 0.0) + 1e-6)
        grads = [self.states[name].comm.grad for name in due]
        torch._foreach_mul_(grads, scale.clamp(max=1.0))

    def check_addresses(self) -> None:
        """Raise RuntimeError where a value or a gradient is not in the optimizer's storage any more."""
        for name, p in self.params.items():
            pairs = zip(("value", "gradient"), addresses_of(p), self.addresses[name])
            for what in (what for what, now, then in pairs if now != then):
                moved = f"the {what} of {name} is not in the optimizer's storage any more"
                fix = "leave zero_grad() out, step() clears gradients; and copy values in place"
                raise RuntimeError(f"{moved}: {fix}")

    def nonfinite_params(self) -> list[str]:
        """Names of parameters whose gradient was not finite in some step; waits for the device."""
        return [name for name, count in self.check_finite.counts.items() if count.item()]

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state, the same on every rank and for every world size. A collective."""
        return optimizer_state(self)

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave, on however many ranks. ValueError for a state of something else."""
        load_optimizer_state(self, saved)

    @torch.no_grad()
    def warm_up(self) -> None:
        """Compile and record everything, with tied parameters tied and untied; nothing is updated."""
        if self.device.type != "cuda":
            return
        pending, tied = self.pending, self.ties.tied
        for self.ties.tied in (tied, {}) if tied else ({},):
            for step in [*range(self.config.adam.every)] * 3:
                self.check_finite(self.due_params(step))
        self.pending, self.ties.tied = pending, tied
        self.skip.fill_(1.0)
        for name, call in self.calls.items():
            for _ in range(3):
                with on_stream(self.streams[name]):
                    call()
        torch.cuda.synchronize()
        torch._foreach_zero_([self.skip, *self.check_finite.counts.values()])


# %% Saving and loading state
def pending_grads(optimizer: MuonAdam) -> dict[str, Tensor]:
    """Gradients that wait for Adam's turn, summed over ranks."""
    found: dict[str, Tensor] = {}
    for state in optimizer.states.values():
        if optimizer.pending and state.every > 1:
            for name, grad in state.comm.full_grads().items():
                found[f"{name}/pending_grad"] = total = grad.clone()
                if dist_info()[1] > 1:
                    dist.all_reduce(total)
    return found


def state_places(optimizer: MuonAdam) -> dict[str, tuple[Any, Tensor]]:
    """For each tensor of the state, by `parameter/key`: the comm, and what this rank has of it."""
    return {
        f"{name}/{key}": (state.comm, own)
        for state in optimizer.states.values()
        for key, tensor in state.rule.state.items()
        for name, own in state.comm.views(tensor).items()
    }


def optimizer_state(optimizer: MuonAdam) -> dict[str, Tensor]:
    """The whole state by `parameter/key`, the same on every rank and for every world size. A collective."""
    facts = {"updates": int(optimizer.updates), "pending": int(optimizer.pending)}
    tied = [spec.name for spec in optimizer.specs if spec.tied_to]
    facts |= {f"{name} untied": int(name not in optimizer.ties.tied) for name in tied}
    found = {f"optimizer/{key}": torch.tensor(value) for key, value in facts.items()}
    places = state_places(optimizer).items()
    return found | {k: comm.full_of(own) for k, (comm, own) in places} | pending_grads(optimizer)


def load_optimizer_state(optimizer: MuonAdam, saved: Mapping[str, Tensor]) -> None:
    """Take back what `optimizer_state` gave, on however many ranks."""
    check_state(optimizer, saved)
    optimizer.updates.copy_(saved["optimizer/updates"])
    optimizer.pending = bool(saved["optimizer/pending"])
    torch._foreach_zero_([optimizer.skip, *optimizer.check_finite.counts.values()])
    tied = {spec.name: spec.tied_to for spec in optimizer.specs if spec.tied_to}
    optimizer.ties.tied = {k: v for k, v in tied.items() if not saved[f"optimizer/{k} untied"]}
    for label, (comm, own) in state_places(optimizer).items():
        own.copy_(comm.shard_of(saved[label].to(own.device)))
    for state in optimizer.states.values():
        state.comm.full_grad.zero_()
        for name, grad in state.comm.full_grads().items():
            if f"{name}/pending_grad" in saved and dist_info()[0] == 0:
                grad.copy_(saved[f"{name}/pending_grad"])
        if hasattr(state.comm, "touched"):  # a sparse table
            state.comm.touched.copy_(state.comm.full_grad.any(1))


def check_state(optimizer: MuonAdam, saved: Mapping[str, Tensor]) -> None:
    """Raise ValueError about a saved state of other parameters or of another config."""
    tied = [f"{spec.name} untied" for spec in optimizer.specs if spec.tied_to]
    count = torch.tensor(0)
    wanted = {f"optimizer/{key}": count for key in ("updates", "pending", *tied)}
    for label, (comm, own) in state_places(optimizer).items():
        units = (comm.units, *own.shape[1:]) if not isinstance(comm, Replicated) else own.shape
        wanted[label] = own.new_empty(units)
    for state in optimizer.states.values():
        if saved.get("optimizer/pending", 0) and state.every > 1:
            grads = state.comm.full_grads().items()
            wanted |= {f"{name}/pending_grad": grad for name, grad in grads}
    check_names("the saved state", saved, wanted, "this optimizer's state")
    for label, tensor in saved.items():
        kinds = [f"{tuple(t.shape)} {str(t.dtype)[6:]}" for t in (tensor, wanted[label])]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{label}: saved as {kinds[0]}, here {kinds[1]}")
