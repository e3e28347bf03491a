# Tangled from notebooks/20_many_gpus.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.optim.adam import adam_step
from speedrun.optim.distributed import Replicated, Sharded, Sparse, ranks


# %% The table
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from types import FunctionType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from speedrun.optim.muon import MuonOptions, even_rows, orthogonal, split, take_step
from speedrun.optim.newton_schulz import fold


@dataclass(frozen=True)
class Entry:
    """How one parameter is updated: a row of the optimizer's table."""

    name: str
    rule: Literal["muon", "adam"]
    comm: Literal["replicated", "sharded", "sparse"]
    """replicated: every rank updates all of it. sharded: its own units. sparse: so, and only touched rows' gradients travel."""
    rate: float | tuple[float, ...] = 1.0
    """Multiple of the rule's rate; muon's factors for shapes are in here. muon: several, for the matrices in turn."""
    decay: float = 1.0
    """Multiple of the rule's decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """adam: what the running means keep of themselves."""
    matrices: int = 1
    """muon: matrices on top of each other in each slice of the bank."""
    tied: str = ""
    """The parameter that this one is the transpose of, until `untie`: its gradient is added there, its values come from there."""


@dataclass(frozen=True)
class OptimizerOptions:
    """Both rules' constants; the defaults are record 89's."""

    muon: MuonOptions = field(default_factory=MuonOptions)
    """What muon is."""
    iterations: int = 5
    """muon: polynomials."""
    nesterov: bool = True
    """muon: mix the newest gradient in once more."""
    eps: float = 1e-10
    """adam: added to the root of the second moment."""
    adam_decay: float = 0.005
    """adam: decay of weights that the step makes smaller anyway, as a multiple of the rate's square."""
    adam_every: int = 2
    """Steps from one update by adam to the next; gradients add up meanwhile."""
    guard: bool = True
    """Leave out a step whose gradient is not finite."""
    compile: bool = True
    """On a GPU: fuse each update's elementwise work, and replay it as a CUDA graph."""


TOGETHER = "replicated"  # the name under which all replicated parameters stand in an order


def same_names(what: str, given: Iterable[str], wanted: Iterable[str], where: str) -> None:
    """Refuse names that are missing, that are too many, or that stand there twice."""
    counts, needed = Counter(list(given)), set(wanted)
    wrong = {
        "twice": sorted(name for name, count in counts.items() if count > 1),
        "missing": sorted(needed - set(counts)),
        f"not in {where}": sorted(set(counts) - needed),
    }
    said = [f"{kind}: {', '.join(names)}" for kind, names in wrong.items() if names]
    if said:
        raise ValueError(f"{what}: {'; '.join(said)}")


def check_table(table: Sequence[Entry], parameters: Mapping[str, Tensor]) -> None:
    """Refuse, with a ValueError that says which, rows that do not fit the parameters."""
    same_names("the optimizer's table", (row.name for row in table), parameters, "the model")
    rows = {row.name: row for row in table}
    for row in table:
        p, whole = parameters[row.name], rows.get(row.tied)
        if row.rule == "muon" and (row.comm != "sharded" or p.ndim != 3):
            raise ValueError(f"{row.name}: muon updates banks of three dimensions, sharded")
        if row.rule == "adam" and not isinstance(row.rate, float):
            raise ValueError(f"{row.name}: adam has one rate, a float, not {row.rate!r}")
        if row.rule == "muon" and p.shape[1] % row.matrices:
            raise ValueError(f"{row.name}: {p.shape[1]} rows are not {row.matrices} matrices")
        if row.comm == "sparse" and p.ndim != 2:
            raise ValueError(f"{row.name}: a sparse table has two dimensions, not {p.ndim}")
        if row.tied and (whole is None or parameters[row.tied].shape != p.shape[::-1]):
            raise ValueError(f"{row.name}: {row.tied} is no parameter of the transposed shape")
        if row.tied and {row.comm, rows[row.tied].comm} != {"sharded"}:
            raise ValueError(f"{row.name} and {row.tied}: what is tied has to be sharded")
        if row.tied and "muon" in (row.rule, rows[row.tied].rule):
            raise ValueError(f"{row.name} and {row.tied}: what is tied has to be adam's")


# %% Numbers that change, work that does not
class Numbers:
    """What changes from step to step, as one vector on the device: one copy a step, and nothing is compiled anew."""

    def __init__(self, names: Sequence[str], device: torch.device, betas: Sequence[float] = ()):
        self.names, self.device = [*names, *(f"fix {beta}" for beta in betas)], device
        self.vector = torch.zeros(len(self.names), device=device)
        self.told, self.fixes = self.vector[: len(names)], self.vector[len(names) :]
        self.betas = torch.tensor(betas, dtype=torch.float64, device=device)

    def __getitem__(self, name: str) -> Tensor:
        return self.vector[self.names.index(name)]

    def fill(self, values: Mapping[str, float]) -> None:
        """Set all but the fixes; Python does not wait for the device."""
        fresh = torch.tensor([values[name] for name in self.names[: len(self.told)]])
        fresh = fresh.pin_memory() if self.device.type == "cuda" else fresh
        self.told.copy_(fresh, non_blocking=True)

    def fix(self, updates: Tensor) -> None:
        """Set each fix, 1 − betaᵗ after t updates; as after one if there was none. updates: t, float64, on the device."""
        self.fixes.copy_(1 - self.betas ** updates.clamp(min=1))


class Replay:
    """Work without arguments, called; or, with a stream, recorded in it at its third call and replayed from then on.

    Graphs that run at once need streams of their own: recorded in one, they share its scratch memory for products.
    """

    graph: Any = None

    def __init__(self, work: Callable[[], None], stream: Any = None):
        self.work, self.calls, self.stream = work, 0, stream

    def __call__(self) -> None:
        self.calls += 1
        if self.stream is None or self.calls < 3:
            return self.work()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # thread_local: else what NCCL's own thread asks the GPU meanwhile would break the recording
            with torch.cuda.graph(
                self.graph, stream=self.stream, capture_error_mode="thread_local"
            ):
                self.work()
        self.graph.replay()


def compiled(work: Callable, options: OptimizerOptions, device: torch.device) -> Callable:
    """Work as it is, or fused for a GPU: a copy of it, since compiled code is kept by function, and shapes are many."""
    if not options.compile or device.type != "cuda":
        return work
    own = FunctionType(work.__code__.replace(), work.__globals__, work.__name__, work.__defaults__)
    return torch.compile(own, dynamic=False, fullgraph=True)


# %% A part for every row
class MuonPart(Sharded):
    """A bank under Muon: this rank's matrices with their momentum, second moments and lost bits."""

    def __init__(self, row: Entry, parameter: Tensor, options: OptimizerOptions):
        rounded = lost = None
        if options.muon.weights != "float32" and parameter.dtype == torch.float32:
            rounded, lost = split(parameter.data)
            parameter.data = rounded
        rows, cols = parameter.shape[1] // row.matrices, parameter.shape[2]
        super().__init__(parameter, (rows, cols))
        self.row, self.options, self.every = row, options, 1
        self.state = {"momentum": torch.zeros_like(self.own, dtype=torch.float32)}
        if options.muon.beta2:
            one = self.own[:, :, :1] if rows >= cols else self.own[:, :1, :]
            self.state["second"] = torch.zeros_like(one, dtype=torch.float32)
        if options.muon.weights == "split":
            none = torch.zeros_like(self.whole[: self.units], dtype=torch.int16)
            lost = none if lost is None else lost.view(none.shape)
            self.state["lost"] = self.mine(self.padded(lost)).clone()
        turns = row.rate if isinstance(row.rate, tuple) else (row.rate,)
        of_units = torch.tensor([turns[n % len(turns)] for n in range(len(self.whole))])
        self.rates = self.mine(of_units[:, None, None].to(parameter.device))
        self.share = compiled(muon_share, options, parameter.device)

    def update(self, numbers: Numbers, skip: Tensor | None) -> None:
        """One step of this rank's matrices."""
        rates = [numbers[name] for name in ("muon", "momentum", "muon_decay")]
        row, options = self.row, self.options
        self.share(self.own, self.grad, self.state, self.rates, rates, skip, row.decay, options)


def muon_share(
    own: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    factors: Tensor,
    rates: Sequence[Tensor],
    skip: Tensor | None,
    decay: float,
    options: OptimizerOptions,
) -> None:
    """One step of matrices under Muon, in place. factors: of each matrix's rate. rates: muon, momentum, muon_decay."""
    muon, (base, kept, plain) = options.muon, rates
    ahead = fold(grad.float(), state["momentum"], kept, options.nesterov, skip)
    update = orthogonal(ahead, options.iterations, muon)
    if muon.beta2:
        update = even_rows(update, state["second"], muon.beta2, skip)
    rate = base * factors if skip is None else base * (1 - skip) * factors
    squared = muon.decay_factor * decay * base
    take_step(own, state.get("lost"), update, rate, muon.decay, decay * plain, squared)


def adam_rates(row: Entry, numbers: Numbers, options: OptimizerOptions) -> tuple[Tensor, Tensor]:
    """A row's rate, and the share that a weight which decays loses in a step."""
    assert isinstance(row.rate, float)  # check_table has refused several
    rate = numbers["adam"] * row.rate
    return rate, rate * rate * (options.adam_decay * row.decay)


def adam_state(own: Tensor) -> dict[str, Tensor]:
    """Adam's two means, in float32."""
    return {key: torch.zeros_like(own, dtype=torch.float32) for key in ("mean", "square")}


def adam_share(part: Any, numbers: Numbers, skip: Tensor | None) -> None:
    """One step of this rank's rows under Adam."""
    row, options = part.row, part.options
    rate, decay = adam_rates(row, numbers, options)
    fixes = (numbers[f"fix {row.betas[0]}"], numbers[f"fix {row.betas[1]}"])
    mean, square = part.state["mean"], part.state["square"]
    part.share(part.own, part.grad, mean, square, rate, row.betas, fixes, options.eps, decay, skip)


class AdamPart(Sharded):
    """A table under Adam: this rank's rows and their means."""

    def __init__(self, row: Entry, parameter: Tensor, options: OptimizerOptions):
        super().__init__(parameter, tuple(parameter.shape[1:]))
        self.row, self.options, self.every = row, options, options.adam_every
        self.state = adam_state(self.own)
        self.share = compiled(adam_step, options, parameter.device)

    update = adam_share


class SparsePart(Sparse):
    """A table under Adam of which a step touches few rows."""

    def __init__(self, row: Entry, parameter: Tensor, options: OptimizerOptions):
        super().__init__(parameter)
        self.row, self.options, self.every = row, options, options.adam_every
        self.state = adam_state(self.own)
        self.share = compiled(adam_step, options, parameter.device)

    update = adam_share


class SmallPart(Replicated):
    """All replicated parameters of one dtype under Adam: one vector, with a vector of every constant."""

    def __init__(
        self, rows: Sequence[Entry], tensors: dict[str, Tensor], options: OptimizerOptions
    ):
        super().__init__(tensors)
        self.rows, self.options, self.every = rows, options, options.adam_every
        self.state = adam_state(self.own)

        def spread(values: Iterable[float]) -> Tensor:
            found = torch.zeros(len(self.own))
            for row, value in zip(rows, values):
                found[self.slices[row.name]] = value
            return found.to(self.own.device)

        self.rate = spread(row.rate for row in rows if isinstance(row.rate, float))
        self.decay = spread(row.decay * options.adam_decay for row in rows)
        self.betas = tuple(spread(row.betas[n] for row in rows) for n in (0, 1))
        self.share = compiled(adam_step, options, self.own.device)
        self.which = [sorted({row.betas[n] for row in rows}) for n in (0, 1)]
        self.index = [
            spread(float(self.which[n].index(row.betas[n])) for row in rows).long() for n in (0, 1)
        ]

    def update(self, numbers: Numbers, skip: Tensor | None) -> None:
        """One step of all of them."""
        rate = numbers["adam"]
        fixes = [
            torch.stack([numbers[f"fix {beta}"] for beta in which])[index]
            for which, index in zip(self.which, self.index)
        ]
        rates = rate * self.rate
        decay = rates * rates * self.decay
        mean, square = self.state["mean"], self.state["square"]
        betas, eps = self.betas, self.options.eps
        self.share(self.own, self.grad, mean, square, rates, betas, tuple(fixes), eps, decay, skip)


# %% One step
def build_parts(
    table: Sequence[Entry], parameters: Mapping[str, Tensor], options: OptimizerOptions
) -> dict[str, Any]:
    """Every part by its name in an order: one a row, and one for what is replicated, for each dtype."""
    parts: dict[str, Any] = {}
    kinds = {"muon": MuonPart, "sharded": AdamPart, "sparse": SparsePart}
    for row in table:
        if row.comm != TOGETHER:
            kind = kinds[row.rule if row.rule == "muon" else row.comm]
            parts[row.name] = kind(row, parameters[row.name], options)
    small = [row for row in table if row.comm == TOGETHER]
    for dtype in sorted({parameters[row.name].dtype for row in small}, key=str):
        rows = [row for row in small if parameters[row.name].dtype == dtype]
        tensors = {row.name: parameters[row.name] for row in rows}
        parts[f"{TOGETHER} {dtype}".removesuffix(" torch.float32")] = SmallPart(
            rows, tensors, options
        )
    return parts


def lane_of(device: torch.device) -> Any:
    """A stream of a GPU; None elsewhere."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def lanes_of(parts: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A lane for each part; among several ranks one for Muon's and one for Adam's, which is faster there."""
    together = ranks()[1] > 1
    kinds = {name: isinstance(part, MuonPart) if together else name for name, part in parts.items()}
    lanes = {kind: lane_of(device) for kind in dict.fromkeys(kinds.values())}
    return {name: lanes[kind] for name, kind in kinds.items()}


TOLD = ("muon", "adam", "momentum", "muon_decay")  # what a step is told


def addresses_of(p: Tensor) -> tuple[int, int]:
    """Where a parameter's value and gradient are stored."""
    return p.data_ptr(), 0 if p.grad is None else p.grad.data_ptr()


def betas_in(table: Sequence[Entry]) -> list[float]:
    """All betas of adam's rows."""
    return sorted({beta for row in table if row.rule == "adam" for beta in row.betas})


class BankOptimizer:
    """Muon and Adam over a model's parameters, shared by all ranks, as a table says.

    Parameters keep their shapes and become views of padded storage; their gradients are never None, and are
    cleared here. All ranks start from the same values. Saved values are loaded afterwards: this rounds banks to
    bfloat16, and copies what is tied. scatter_order, work_order: names of rows, and “replicated” for all that are; default: the table's.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        table: Sequence[Entry],
        options: OptimizerOptions = OptimizerOptions(),
        scatter_order: Sequence[str] | None = None,
        work_order: Sequence[str] | None = None,
    ):
        check_table(table, parameters)
        self.table, self.options, self.parameters = table, options, parameters
        names = [row.name for row in table if row.comm != TOGETHER]
        names += [TOGETHER] if len(names) < len(table) else []
        for what, order in (("scatter_order", scatter_order), ("work_order", work_order)):
            same_names(what, names if order is None else order, names, "the table")
        with torch.no_grad():
            self.parts = build_parts(table, parameters, options)
        self.scatter_order = self.spelled(names if scatter_order is None else scatter_order)
        self.work_order = self.spelled(names if work_order is None else work_order)
        self.tied = {row.name: row.tied for row in table if row.tied}
        self.addresses = {name: addresses_of(p) for name, p in parameters.items()}
        self.device = next(iter(parameters.values())).device
        self.numbers = Numbers(TOLD, self.device, betas_in(table))
        self.bad = {name: torch.zeros((), device=self.device) for name in self.parts}
        self.skip = torch.zeros((), device=self.device) if options.guard else None
        self.updates = torch.zeros((), dtype=torch.float64, device=self.device)  # by adam
        self.pending = False  # whether gradients wait for adam
        self.records = options.compile and self.device.type == "cuda"
        if self.records and not options.iterations:
            raise ValueError(
                "the exact factor cannot be compiled: iterations=0 wants compile=False"
            )
        muon = [name for name, part in self.parts.items() if isinstance(part, MuonPart)]
        self.lanes = lanes_of(self.parts, self.device)
        # summed before the guard has looked: nothing is added to their gradients any more
        self.early = list(takewhile(muon.__contains__, self.scatter_order))
        self.looking = lane_of(self.device) if self.records else None
        self.works = {
            name: Replay(self.work_of(name), lane if self.records else None)
            for name, lane in self.lanes.items()
        }
        self.looks: dict[tuple, tuple[Replay, Tensor]] = {}
        self.add, self.copy = (
            compiled(work, options, self.device) for work in (add_transposed, copy_transposed)
        )
        with torch.no_grad():
            copy_tied(self, list(self.parts))

    def tensors(self) -> dict[str, Tensor]:
        return state_tensors(self)

    def load(self, saved: Mapping[str, Tensor]) -> None:
        load_state(self, saved)

    def warm_up(self) -> None:
        warm_up(self)

    def blamed(self) -> list[str]:
        return blame(self)

    def spelled(self, order: Sequence[str]) -> list[str]:
        """An order with “replicated” spelled out, dtype by dtype."""
        small = [name for name in self.parts if name.split()[0] == TOGETHER]
        return [part for name in order for part in (small if name == TOGETHER else [name])]

    def work_of(self, name: str) -> Callable[[], None]:
        return lambda: self.parts[name].update(self.numbers, self.skip)

    @torch.no_grad()
    def step(self, index: int, rates: Mapping[str, float]) -> None:
        """Update what is due in step `index` (0, 1, …). rates: muon, adam, momentum, and muon_decay for plain decay."""
        for name, p in self.parameters.items():
            for what, now, then in zip(
                ("value", "gradient"), addresses_of(p), self.addresses[name]
            ):
                if now != then:
                    moved = f"the {what} of {name} is not in the optimizer's storage any more"
                    fix = "leave zero_grad() out, step() clears gradients; and copy values in place"
                    raise RuntimeError(f"{moved}: {fix}")
        take_one_step(self, index, rates)


def due_in(optimizer: BankOptimizer, index: int) -> list[str]:
    """What is updated in a step: adam's parts in every adam_every-th only, and what is tied never."""
    names = [name for name in optimizer.work_order if name not in optimizer.tied]
    return [name for name in names if (index + 1) % optimizer.parts[name].every == 0]


def tell(optimizer: BankOptimizer, index: int, rates: Mapping[str, float]) -> None:
    """Set the numbers of a step."""
    optimizer.pending = (index + 1) % optimizer.options.adam_every != 0
    same_names("rates", {"muon_decay", *rates}, TOLD, "what a step is told")
    optimizer.numbers.fill({"muon_decay": 0.0, **rates})


def count_update(optimizer: BankOptimizer) -> None:
    """Count a step of adam, unless it is left out: only the device knows, so the count is kept there."""
    if not optimizer.pending:
        optimizer.updates += 1 if optimizer.skip is None else 1 - optimizer.skip
        optimizer.numbers.fix(optimizer.updates)


def take_one_step(optimizer: BankOptimizer, index: int, rates: Mapping[str, float]) -> None:
    """`BankOptimizer.step`: begin Muon's sums, look, begin the others; then one after the other wait, update, gather, clear."""
    parts, due = optimizer.parts, due_in(optimizer, index)
    tell(optimizer, index, rates)
    sums = [name for name in optimizer.scatter_order if name in due]
    for name in optimizer.early:
        parts[name].scatter()
    watch(optimizer, due)
    count_update(optimizer)
    for name in sums[len(optimizer.early) :]:
        parts[name].scatter()
    for name in due:
        with beside(optimizer.lanes[name]):
            parts[name].wait()
            optimizer.works[name]()
            parts[name].gather()
            parts[name].clear()
    for name in due:
        if (lane := optimizer.lanes[name]) is not None:
            torch.cuda.current_stream().wait_stream(lane)
        parts[name].wait()
    copy_tied(optimizer, due)


@contextmanager
def beside(lane: Any) -> Iterator[None]:
    """On a GPU: what is begun here runs in a lane (a stream) of its own, after all that was begun before."""
    if lane is None:
        yield
    else:
        lane.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(lane):
            yield


def add_transposed(target: Tensor, source: Tensor) -> None:
    target.add_(source.mT)


def copy_transposed(target: Tensor, source: Tensor) -> None:
    target.copy_(source.mT)


def add_tied(optimizer: BankOptimizer, due: Sequence[str]) -> None:
    """Add the gradient of what is tied to that of what it is tied to."""
    for name, whole in optimizer.tied.items():
        if whole in due:
            part, target = optimizer.parts[name], optimizer.parts[whole]
            optimizer.add(target.grads[: target.units], part.grads[: part.units])
            part.grads.zero_()


def copy_tied(optimizer: BankOptimizer, due: Sequence[str]) -> None:
    """What is tied is what it is tied to."""
    for name, whole in optimizer.tied.items():
        if whole in due:
            part, target = optimizer.parts[name], optimizer.parts[whole]
            optimizer.copy(part.whole[: part.units], target.whole[: target.units])


def watch(optimizer: BankOptimizer, due: Sequence[str]) -> None:
    """Add up what is tied, and look for gradients that are not finite on any rank."""
    key = (tuple(due), tuple(optimizer.tied))
    if key not in optimizer.looks:
        broken = torch.zeros(len(due), device=optimizer.device)
        looking = Replay(partial(look, optimizer, list(due), broken), optimizer.looking)
        optimizer.looks[key] = looking, broken
    looking, broken = optimizer.looks[key]
    looking()
    if optimizer.skip is None or not due:
        return
    if ranks()[1] > 1:
        dist.all_reduce(broken)
    optimizer.skip.copy_(broken.sum().clamp(max=1.0))
    torch._foreach_add_([optimizer.bad[name] for name in due], list(broken.unbind()))


def look(optimizer: BankOptimizer, due: list[str], broken: Tensor) -> None:
    """Which of this rank's gradients are not finite."""
    add_tied(optimizer, due)
    if optimizer.skip is not None and due:
        largest = torch._foreach_norm([optimizer.parts[name].grads for name in due], math.inf)
        broken.copy_(~torch.isfinite(torch.stack([x.float() for x in largest])))


def blame(optimizer: BankOptimizer) -> list[str]:
    """Names of parts with gradients that were not finite; waits for the device."""
    return [name for name, times in optimizer.bad.items() if times.item()]


def warm_up(optimizer: BankOptimizer) -> None:
    """Compile and record everything, with all that is tied tied and with all apart; nothing is updated."""
    if optimizer.skip is None:
        raise ValueError("warming up is a step that is left out, which only the guard can do")
    optimizer.numbers.fill(dict.fromkeys(TOLD, 0.0))
    optimizer.numbers.fixes.fill_(1.0)
    now = optimizer.tied
    for tied in (now, {}) if now else ({},):
        optimizer.tied = tied
        for index in [*range(optimizer.options.adam_every)] * 3:
            watch(optimizer, due_in(optimizer, index))
    optimizer.tied = now
    optimizer.skip.fill_(1.0)
    for name, work in optimizer.works.items():
        for _ in range(3):
            with beside(optimizer.lanes[name]):
                work()
    if optimizer.device.type == "cuda":
        torch.cuda.synchronize()
    optimizer.skip.zero_()
    for total in optimizer.bad.values():
        total.zero_()


# %% Apart, and together again
def untie(optimizer: BankOptimizer, name: str) -> None:
    """Let a tied parameter train by itself from now on, with the transposed moments of what it was tied to."""
    part, source = optimizer.parts[name], optimizer.parts[optimizer.tied.pop(name)]
    for key, own in part.state.items():
        moments = source.collect(source.state[key]).mT.contiguous()
        own.copy_(part.mine(part.padded(moments)))


def waiting(optimizer: BankOptimizer) -> dict[str, Tensor]:
    """Gradients that wait for adam's turn, summed over ranks."""
    found = {}
    for name, part in optimizer.parts.items():
        if optimizer.pending and part.every > 1:
            total = part.grads.clone()
            if ranks()[1] > 1:
                dist.all_reduce(total)
            places = part.slices if isinstance(part, Replicated) else {name: slice(part.units)}
            found |= {f"{p}/waiting": total[here] for p, here in places.items()}
    return found


def state_places(optimizer: BankOptimizer) -> dict[str, tuple[Any, Tensor, slice | None]]:
    """For each tensor of the state: its part, what this rank has, and where in that it stands if there is more in it."""
    found: dict[str, tuple[Any, Tensor, slice | None]] = {}
    for name, part in optimizer.parts.items():
        places = part.slices if isinstance(part, Replicated) else {name: None}
        for key, own in part.state.items():
            found |= {f"{p}/{key}": (part, own, here) for p, here in places.items()}
    return found


def state_tensors(optimizer: BankOptimizer) -> dict[str, Tensor]:
    """The whole state by `parameter/key`, the same on every rank and for every number of ranks. All ranks have to ask."""
    facts = {"updates": int(optimizer.updates), "pending": int(optimizer.pending)}
    tied = [row.name for row in optimizer.table if row.tied]
    facts |= {f"{name} apart": int(name not in optimizer.tied) for name in tied}
    found = {f"optimizer/{key}": torch.tensor(value) for key, value in facts.items()}
    for label, (part, own, here) in state_places(optimizer).items():
        found[label] = own[here].clone() if here else part.collect(own)
    return found | waiting(optimizer)


def load_state(optimizer: BankOptimizer, saved: Mapping[str, Tensor]) -> None:
    """Take back what `state_tensors` gave, on however many ranks."""
    refuse_other_state(optimizer, saved)
    optimizer.updates.copy_(saved["optimizer/updates"])
    optimizer.pending = bool(saved["optimizer/pending"])
    tied = [row for row in optimizer.table if row.tied and not saved[f"optimizer/{row.name} apart"]]
    optimizer.tied = {row.name: row.tied for row in tied}
    for label, (part, own, here) in state_places(optimizer).items():
        value = saved[label].to(own.device)
        own[here or slice(None)].copy_(value if here else part.mine(part.padded(value)))
    for name, part in optimizer.parts.items():
        take_waiting(name, part, saved)


def refuse_other_state(optimizer: BankOptimizer, saved: Mapping[str, Tensor]) -> None:
    """Refuse a saved state of other parameters or other options."""
    shapes: dict[str, tuple[int, ...]] = {f"optimizer/{key}": () for key in ("updates", "pending")}
    shapes |= {f"optimizer/{row.name} apart": () for row in optimizer.table if row.tied}
    for label, (part, own, here) in state_places(optimizer).items():
        shapes[label] = (here.stop - here.start,) if here else (part.units, *own.shape[1:])
        if saved.get("optimizer/pending", 0) and part.every > 1:
            wait = f"{label.rsplit('/', 1)[0]}/waiting"
            shapes[wait] = shapes[label][:1] + tuple(part.grads.shape[1:])
    same_names("the saved state", saved, shapes, "this optimizer's state")
    for label, tensor in saved.items():
        if tuple(tensor.shape) != shapes[label]:
            raise ValueError(f"{label}: saved as {tuple(tensor.shape)}, here {shapes[label]}")


def take_waiting(name: str, part: Any, saved: Mapping[str, Tensor]) -> None:
    """Put gradients that wait, if any, where the first rank's are; all others are zero."""
    part.grads.zero_()
    places = part.slices if isinstance(part, Replicated) else {name: slice(part.units)}
    for p, here in places.items():
        if f"{p}/waiting" in saved and ranks()[0] == 0:
            part.grads[here].copy_(saved[f"{p}/waiting"])
    if isinstance(part, Sparse):
        part.touched.copy_(part.grads.any(1))
