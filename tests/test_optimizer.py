"""One optimizer for all ranks: against itself on 1, 2 and 4 ranks, against Muon written down once more, PyTorch's AdamW, and bad input."""

import math
from dataclasses import replace

import optimizer_ranks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_ranks import (
    CONFIG,
    SCATTER,
    SCENARIOS,
    TABLE,
    WORK,
    adamw_table,
    copies,
    everything,
    gradient,
    model,
    settings_at,
)
from torch.nn.utils import clip_grad_norm_

from speedrun.model.gpt import GPTConfig, param_specs
from speedrun.optim.adam import AdamConfig, adam_step
from speedrun.optim.comm import Replicated, Sharded
from speedrun.optim.graph import bias_correction
from speedrun.optim.muon import MuonConfig, gram_newton_schulz, join_bf16, polar_express, split_bf16
from speedrun.optim.newton_schulz import apply_odd_polynomials
from speedrun.optim.optimizer import MuonAdam, grad_norm
from speedrun.optim.state import OptimConfig, assign_optimizers
from speedrun.optim.traffic import bytes_sent
from speedrun.params import ParamSpec
from speedrun.presets import RECORD_MUON

# (ranks, step): where runs go on from what 2 and 4 ranks have saved; before step 5 tables have a gradient that waits
RESUMED = ((1, 4), (2, 5), (4, 5))
RECORD = ("record-streams", "record-in-turn")
ROUNDS = (
    (1, [(name, None) for name in SCENARIOS]),
    (2, [(name, None) for name in (*SCENARIOS, *RECORD)]),
    (4, [(name, None) for name in SCENARIOS]),
    *(
        (world, [("integers", ("integers", other, step)) for other in (2, 4)])
        for world, step in RESUMED
    ),
    *((world, [("integers-silent", None)]) for world in (2, 4)),
)


@pytest.fixture(scope="module")
def on(tmp_path_factory):
    """What a scenario on some ranks has left; saved: which other run's state it went on from. Starting ranks takes longest: it is done once."""
    return optimizer_ranks.starter(tmp_path_factory.mktemp("ranks"), rounds=ROUNDS)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(parameters: dict[str, torch.Tensor], seed: int, scale: float = 1.0) -> None:
    """Add normal numbers to every gradient."""
    for n, p in enumerate(parameters.values()):
        p.grad += scale * random(*p.shape, seed=100 * seed + n).to(p.dtype)


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of what is not the same, to the bit."""
    assert list(one) == list(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


def apart(one: dict, other: dict) -> dict[str, float]:
    """How far two results lie from each other: parameters as a share of the way from their start, states of their length."""
    found = {}
    for name, tensor in everything(one).items():
        length = tensor.float() - one["start"][name].float() if name in one["start"] else tensor
        between = everything(other)[name].float() - tensor.float()
        found[name] = (between.norm() / length.float().norm().clamp(min=1e-30)).item()
    return found


@pytest.mark.parametrize("world", [2, 4])
class TestRanks:
    def test_sums_of_integers_lead_to_the_same_bits(self, on, world):
        assert differing(everything(on("integers", 1)), everything(on("integers", world))) == []

    def test_real_gradients_lead_to_the_same_step(self, on, world):
        alone, shared = on("float32", 1), on("float32", world)
        for name, start in alone["start"].items():
            step = alone["parameters"][name] - start
            apart = shared["parameters"][name] - alone["parameters"][name]
            assert step.norm() > 0 and apart.norm() <= 1e-3 * step.norm(), name

    def test_sums_in_bfloat16_differ_by_its_rounding(self, on, world):
        alone, shared = on("normal", 1), on("normal", world)
        for name in ("qk", "mlp"):
            momentum = alone["state"][f"{name}/momentum_buffer"]
            apart = shared["state"][f"{name}/momentum_buffer"] - momentum
            assert apart.norm() < 2**-7 * momentum.norm(), name

    def test_one_nan_on_the_last_rank_stops_all_and_has_a_name(self, on, world):
        result = on("integers-nan", world)
        before, now = everything(result["at"][5]), everything(result)
        assert set(before) - set(now) == {n for n in before if n.endswith("/pending_grad")}
        moved = [name for name, tensor in now.items() if not torch.equal(tensor, before[name])]
        assert moved == ["optimizer/pending"] and result["nonfinite"] == ["values"]

    def test_a_rank_that_announces_nothing_stops_all(self, on, world):
        refused = on("integers-silent", world)["refused"]
        assert len(refused) == world and len(set(refused)) == 1
        assert refused[0].startswith("step 5:") and "announce() was not called" in refused[0]

    def test_clipped_steps_are_those_of_one_rank(self, on, world):
        alone, shared = on("float32-clipped", 1), on("float32-clipped", world)
        found = apart(alone, shared)
        # what comes after Muon's products, which round in float16
        coarse = [n for n in found if n.startswith(("qk", "mlp")) and "/momentum" not in n]
        assert max(found[name] for name in coarse) < 1e-3, found
        assert max(found[name] for name in found if name not in coarse) < 2e-6, found

    def test_adamw_rows_are_those_of_one_rank(self, on, world):
        found = apart(on("adamw-float32-clipped", 1), on("adamw-float32-clipped", world))
        assert max(found.values()) < 2e-6, found

    def test_adamw_rows_in_bfloat16_are_those_of_one_rank(self, on, world):
        """Sums are exact; the last entries of a shard may be rounded in another order than in the middle of a tensor."""
        alone, shared = on("adamw-integers", 1), on("adamw-integers", world)
        found = apart(alone, shared)
        assert alone["state"]["head/exp_avg"].dtype == torch.bfloat16
        for name, distance in found.items():
            low = everything(alone)[name].dtype == torch.bfloat16
            assert distance < (2**-8 if low else 1e-6), name

    @pytest.mark.parametrize(
        "scenario",
        ["integers", "float32-clipped", "normal", "adamw-integers", "adamw-float32-clipped"],
    )
    def test_all_ranks_are_the_same_to_the_bit(self, on, world, scenario):
        digests = on(scenario, world)["digests"]
        assert len(digests) == world and len(set(digests)) == 1


@pytest.mark.parametrize(("world", "step"), RESUMED)
@pytest.mark.parametrize("other", [2, 4])
def test_it_goes_on_from_the_state_of_another_number_of_ranks(on, world, step, other):
    resumed = on("integers", world, saved=("integers", other, step))
    assert differing(everything(on("integers", other)), everything(resumed)) == []


def test_clipping_is_felt(on):
    """The scenarios above that clip do so in each step, of the banks alone and of all rows."""
    free, clipped = (on(name, 1)["state"] for name in ("float32", "float32-clipped"))
    for name in ("qk/momentum_buffer", "head/exp_avg", "bigram/exp_avg", "gates/exp_avg"):
        assert clipped[name].norm() < 0.5 * free[name].norm(), name


def plain_orthogonal(g: torch.Tensor) -> torch.Tensor:
    """Record 4's five iterations, in bfloat16."""
    x = g.bfloat16()
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    x = x.mT if (tall := x.shape[1] > x.shape[2]) else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class PlainMuon:
    """Muon written down once more, for float32 weights (matrices, rows, cols)."""

    def __init__(self, p: torch.Tensor, muon: MuonConfig, lr_mul: float | torch.Tensor):
        self.p, self.muon, self.lr_mul = p, muon, lr_mul
        self.buffer = torch.zeros_like(p)
        self.second = torch.zeros_like(p.mean(2 if p.shape[1] >= p.shape[2] else 1, keepdim=True))

    def step(self, g: torch.Tensor, rate: float, momentum: float) -> None:
        p, muon, lr = self.p, self.muon, torch.tensor(rate)
        self.buffer.lerp_(g, 1 - momentum)
        update = g.lerp(self.buffer, momentum) if muon.nesterov else self.buffer
        new = muon.orthogonalizer == "polar_express"
        update = polar_express(update, 5, torch.float16, True) if new else plain_orthogonal(update)
        if muon.beta2:
            u, axis = update.float(), 2 if self.second.shape[2] == 1 else 1
            self.second.lerp_(u.square().mean(axis, keepdim=True), 1 - muon.beta2)
            even = u * self.second.rsqrt()
            old, now = (torch.linalg.matrix_norm(x, keepdim=True) for x in (u, even))
            update = even * (old / now)
        update = (update * self.lr_mul).to(update.dtype)
        decay = muon.weight_decay
        decay = decay * lr * self.lr_mul if muon.decay_with_lr else decay
        if muon.cautious:
            agree = update.float() * p >= 0
            p.sub_(lr * (update.float() + decay * p * agree))
        else:
            p.mul_(1 - lr * decay).sub_(lr * update)


MUONS: dict[str, dict] = {
    "no decay": {},
    "plain decay": {"weight_decay": 0.1},
    "no Nesterov": {"weight_decay": 0.1, "nesterov": False},
    "lr² decay": {"weight_decay": 1.2, "decay_with_lr": True},
    "cautious": {"weight_decay": 0.1, "cautious": True},
    "cautious lr² decay": {"weight_decay": 1.2, "cautious": True, "decay_with_lr": True},
    "NorMuon": {"weight_decay": 0.1, "beta2": 0.9},
    "mantissa": {"weight_decay": 0.1, "param_dtype": "bf16_mantissa"},
    "bfloat16": {"weight_decay": 0.1, "param_dtype": "bfloat16"},
    "record": {name: getattr(RECORD_MUON, name) for name in RECORD_MUON.__dataclass_fields__},
}


class TestOneRank:
    def test_gradients_are_cleared_when_used(self, on):
        for scenario in ("integers", "adamw-float32-clipped"):
            assert set(on(scenario, 1)["left"].values()) == {0.0}
            assert set(on(scenario, 4)["left"].values()) == {0.0}

    @pytest.mark.parametrize("lr_mul", [1.0, 1.7, (0.5, 2.0)])
    @pytest.mark.parametrize("matrices", [1, 2, 3])
    @pytest.mark.parametrize("change", MUONS)
    def test_a_bank_moves_as_under_a_plain_muon_to_the_bit(self, change, matrices, lr_mul):
        """Tall, wide and wider matrices. Weights of 16 bits get the gradients of 16 bits."""
        muon, start = MuonConfig(**MUONS[change]), 0.1 * random(4, 24, 16)
        bank, p = torch.nn.Parameter(start.clone()), start.clone()
        p = p.view(4 * matrices, 24 // matrices, 16)
        turns = lr_mul if isinstance(lr_mul, tuple) else (lr_mul,)
        rates = torch.tensor([turns[n % len(turns)] for n in range(len(p))])[:, None, None]
        if muon.param_dtype == "bfloat16":
            p.copy_(split_bf16(p)[0])
        plain = PlainMuon(p, muon, rates if len(turns) > 1 else lr_mul)
        row = ParamSpec("bank", (4, 24, 16), optim="muon", comm="sharded", matrices=matrices)
        row = replace(row, lr_mul=lr_mul, wd_mul=1.0)
        own = MuonAdam({"bank": bank}, [row], replace(CONFIG, muon=muon))
        for step in range(5):
            now = settings_at(step, matrix_lr=0.02 * (step + 1), momentum=0.85 + 0.02 * step)
            g = random(4, 24, 16, seed=step + 1).to(bank.dtype)
            bank.grad += g
            own.step(now)
            plain.step(g.float().view(p.shape), now.matrix_lr, now.momentum)
            if muon.param_dtype == "bfloat16":
                p.copy_(split_bf16(p)[0])
        state = own.states["bank"].rule.state
        whole = bank.detach().view(p.shape)
        if muon.param_dtype == "bf16_mantissa":
            assert bank.dtype == torch.bfloat16 and state["mantissa"].any()
            whole = join_bf16(whole, state["mantissa"])
        assert (p - start.view(p.shape)).norm() > 0.1
        assert torch.equal(whole.float(), p)
        assert torch.equal(state["momentum_buffer"], plain.buffer)
        assert ("second_momentum_buffer" in state) == bool(muon.beta2)
        if muon.beta2:
            assert torch.equal(state["second_momentum_buffer"], plain.second)

    def test_adam_is_pytorchs_where_nothing_decays(self):
        start = random(6, 4)
        theirs, ours = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
        reference = torch.optim.Adam([theirs], lr=0.008 * 3, betas=(0.75, 0.95), eps=1e-10)
        row = ParamSpec("p", (6, 4), optim="adam", comm="sharded", lr_mul=3.0, betas=(0.75, 0.95))
        own = MuonAdam({"p": ours}, [row], replace(CONFIG, adam=replace(CONFIG.adam, every=1)))
        for step in range(5):
            theirs.grad = random(6, 4, seed=step)
            ours.grad += theirs.grad
            reference.step()
            own.step(settings_at(step))
        assert torch.allclose(theirs, ours, atol=1e-6)

    @pytest.mark.parametrize("comm", ["sharded", "replicated"])
    def test_adam_decays_only_what_its_step_makes_smaller_by_the_rates_square(self, comm):
        p = torch.nn.Parameter(torch.tensor([2.0, 2.0, -2.0, -2.0]))
        row = ParamSpec("p", (4,), optim="adam", comm=comm, lr_mul=3.0, wd_mul=5.0)
        own = MuonAdam({"p": p}, [row], replace(CONFIG, adam=replace(CONFIG.adam, every=1)))
        p.grad += torch.tensor([1.0, -1.0, 1.0, -1.0])
        own.step(settings_at(0, lr=0.1))
        rate = 0.1 * 3.0
        smaller, larger = 2.0 * (1 - rate * rate * 0.005 * 5.0) - rate, 2.0 + rate
        assert p.tolist() == pytest.approx([smaller, larger, -larger, -smaller], abs=1e-6)

    @pytest.mark.parametrize("optim", ["adam", "adamw"])
    def test_every_other_step_it_takes_the_sum_of_two_gradients(self, optim):
        once, twice = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2))
        row = ParamSpec("p", (3, 2), optim=optim, comm="sharded", wd_mul=1.0)
        each = replace(CONFIG, adam=replace(CONFIG.adam, every=1))
        first, second = MuonAdam({"p": once}, [row], each), MuonAdam({"p": twice}, [row], CONFIG)
        once.grad += 3.0
        first.step(settings_at(0))
        for step, g in enumerate((1.0, 2.0)):
            before = twice.detach().clone()
            twice.grad += g
            second.step(settings_at(step))
            assert torch.equal(before, twice) == (step == 0)
        assert torch.equal(once, twice) and second.state_dict()["optimizer/updates"] == 1

    @pytest.mark.parametrize("optim", ["adam", "adamw"])
    def test_replicated_and_sharded_agree(self, optim):
        start, found = random(5, 3), {}
        for comm in ("sharded", "replicated"):
            parameters = {name: torch.nn.Parameter(start.clone()) for name in "ab"}
            a = ParamSpec("a", (5, 3), optim=optim, comm=comm, lr_mul=5.0, wd_mul=2.0)
            b = ParamSpec("b", (5, 3), optim=optim, comm=comm, wd_mul=1.0, betas=(0.9, 0.95))
            table = [replace(a, betas=(0.5, 0.99)), b]
            each = replace(CONFIG, adam=replace(CONFIG.adam, every=1))
            optimizer = MuonAdam(parameters, table, each)
            for step in range(4):
                fill(parameters, step)
                optimizer.step(settings_at(step))
            found[comm] = copies(parameters)
        for name, p in found["replicated"].items():
            assert torch.allclose(p, found["sharded"][name], atol=1e-7)
            assert not torch.allclose(p, start, atol=1e-3)

    def test_autograd_writes_into_the_storage(self):
        p = torch.nn.Parameter(torch.ones(3, 4, 2))
        row = ParamSpec("p", (3, 4, 2), optim="muon", comm="sharded", matrices=1)
        optimizer = MuonAdam({"p": p}, [row])
        (p * 2).sum().backward()
        comm = optimizer.states["p"].comm
        assert torch.equal(comm.full_grad, torch.full((3, 4, 2), 2.0))
        optimizer.step(settings_at(0))
        assert p.data_ptr() == comm.full.data_ptr() and not p.grad.any()

    def test_order_and_the_replicated_vector_change_no_bit(self):
        """The table's order, and another one."""
        found = []
        for orders in ((None, None), (SCATTER, WORK)):
            parameters = model()
            optimizer = MuonAdam(parameters, TABLE, CONFIG, True, *orders)
            for step in range(4):
                fill(parameters, step)
                optimizer.states["bigram"].comm.announce(torch.arange(61))
                optimizer.step(settings_at(step))
            found.append(copies(parameters) | optimizer.state_dict())
        assert [n for n in found[0] if not torch.equal(found[0][n], found[1][n])] == []


# name → shape and columns: what decays and what does not, rates of their own, betas of their own
MIXED: dict[str, tuple[tuple[int, ...], dict]] = {
    "embedding": ((37, 6), {"comm": "sharded", "wd_mul": 1.0}),
    "gain": ((6,), {}),
    "bank": ((3, 12, 6), {"comm": "sharded", "wd_mul": 1.0, "matrices": 1}),
    "bias": ((3, 12), {}),
    "scalar": ((1,), {"lr_mul": 5.0, "betas": (0.8, 0.99)}),
    "head": ((6, 37), {"comm": "sharded", "wd_mul": 1.0, "lr_mul": 0.25}),
    "table": ((29, 5), {"comm": "sharded", "wd_mul": 1.0, "lr_mul": 4.0, "betas": (0.5, 0.95)}),
}
ADAMW = OptimConfig(AdamConfig(lr=0.01), matrix_lr=0.03)


def mixed(dtype=torch.float32) -> dict[str, torch.nn.Parameter]:
    """Parameters for the table above."""
    shapes = [shape for shape, _ in MIXED.values()]
    values = [0.1 * random(*shape, seed=n).to(dtype) for n, shape in enumerate(shapes)]
    return {name: torch.nn.Parameter(value) for name, value in zip(MIXED, values)}


def mixed_specs(config: OptimConfig = ADAMW) -> tuple[ParamSpec, ...]:
    return assign_optimizers((ParamSpec(n, s, **kind) for n, (s, kind) in MIXED.items()), config)


class TestAdamW:
    """Rows under adamw are PyTorch's fused AdamW, and clipping is PyTorch's."""

    @pytest.mark.parametrize("clip", [0.0, 1.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_it_is_pytorchs_to_the_bit(self, dtype, clip):
        ours, theirs, config = mixed(dtype), mixed(dtype), replace(ADAMW, grad_clip=clip)
        own, groups = MuonAdam(ours, mixed_specs(config), config), []
        multiples = {"bank": 3.0, "scalar": 5.0, "head": 0.25, "table": 4.0}
        for name, (_, kind) in MIXED.items():
            decay = 0.1 if kind.get("wd_mul") else 0.0
            betas = {"scalar": (0.8, 0.99), "table": (0.5, 0.95)}.get(name, (0.9, 0.95))
            groups.append({"params": [theirs[name]], "weight_decay": decay, "betas": betas})
        reference = torch.optim.AdamW(groups, lr=0.01, eps=1e-8, fused=True)
        for step in range(6):
            rate = 0.01 * (step + 1) / 6
            fill(ours, step, scale=10.0 ** (step % 3 - 2))  # lengths of 0.2, 2 and 20
            for p, q in zip(theirs.values(), ours.values()):
                p.grad = q.grad.clone()
            if clip:
                clip_grad_norm_(theirs.values(), clip)
            for name, group in zip(MIXED, reference.param_groups):
                group["lr"] = rate * multiples.get(name, 1.0)
            reference.step()
            own.step(settings_at(step, lr=rate))
        state = own.state_dict()
        for name, p in theirs.items():
            assert torch.equal(p, ours[name]), name
            for key in ("exp_avg", "exp_avg_sq"):
                moments = state[f"{name}/{key}"].view(p.shape)
                assert torch.equal(moments, reference.state[p][key]), f"{name}/{key}"
        assert state["optimizer/updates"] == 6

    def test_groups_of_two_decays_are_chapter_03s(self):
        """One group that decays and one that does not, as with any model of torch's."""
        from speedrun.model.baseline import decay_groups

        ours, theirs = mixed(), torch.nn.ParameterDict(mixed())
        config = replace(ADAMW, matrix_lr=0.0)
        rows = (ParamSpec(n, p.shape, wd_mul=float(p.ndim > 1)) for n, p in ours.items())
        own = MuonAdam(ours, assign_optimizers(rows, config), config)
        reference = torch.optim.AdamW(
            decay_groups(theirs), lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=True
        )
        for step in range(4):
            fill(ours, step)
            for name, p in theirs.items():
                p.grad = ours[name].grad.clone()
            clip_grad_norm_([theirs[name] for name in ours], 1.0)
            reference.step()
            own.step(settings_at(step, lr=0.01))
        assert [name for name, p in theirs.items() if not torch.equal(p, ours[name])] == []

    @pytest.mark.parametrize("table", [TABLE, adamw_table()], ids=["adam", "adamw"])
    @pytest.mark.parametrize("length", [1e-3, 0.99, 1.01, 1e4])
    @pytest.mark.parametrize("clip", [0.3, 1.0, 100.0])
    def test_gradients_are_scaled_as_by_pytorch_to_the_bit(self, table, length, clip):
        """In several dtypes; below the bound and above it."""
        ours = {name: p for name, p in model().items() if name != "embed"}
        rows = [replace(row, tied_to="") for row in table if row.name in ours]
        optimizer = MuonAdam(ours, rows, replace(CONFIG, grad_clip=clip))
        fill(ours, 1)
        norm = torch.nn.utils.get_total_norm([p.grad for p in ours.values()])
        for p in ours.values():
            p.grad.mul_(length * clip / norm.item())
        theirs = {n: torch.nn.Parameter(torch.zeros_like(p)) for n, p in ours.items()}
        for name, p in theirs.items():
            p.grad = ours[name].grad.clone()
        norm = clip_grad_norm_(theirs.values(), clip)
        due = optimizer.due_params(1)
        assert torch.equal(grad_norm(optimizer.states, ours, due), norm)
        before = {name: p.grad.clone() for name, p in ours.items()}
        optimizer.clip(due)
        assert [
            name for name, p in ours.items() if not torch.equal(p.grad, theirs[name].grad)
        ] == []
        scaled = [name for name in ours if not torch.equal(before[name], ours[name].grad)]
        assert bool(scaled) == (length > 1)

    def test_only_what_is_due_is_counted_and_scaled(self):
        """In the first step of a pair, the banks alone; what is tied counts with what it is tied to."""
        optimizer = MuonAdam(model(), TABLE, replace(CONFIG, grad_clip=1.0))
        fill(optimizer.params, 0)
        grads = {name: p.grad.clone() for name, p in optimizer.params.items()}
        due = optimizer.due_params(0)
        norm = torch.nn.utils.get_total_norm([grads["qk"], grads["mlp"]])
        assert sorted(due) == ["mlp", "qk"]
        assert torch.equal(grad_norm(optimizer.states, optimizer.params, due), norm)
        optimizer.clip(due)
        scaled = [n for n, p in optimizer.params.items() if not torch.equal(p.grad, grads[n])]
        assert scaled == ["qk", "mlp"]
        due = optimizer.due_params(1)
        assert "head" in due and "embed" not in due

    def test_no_bound_leaves_gradients_as_they_are(self):
        optimizer = MuonAdam(mixed(), mixed_specs(), replace(ADAMW, grad_clip=0.0))
        fill(optimizer.params, 0, scale=1e3)
        before = {name: p.grad.clone() for name, p in optimizer.params.items()}
        optimizer.clip(optimizer.due_params(0))
        assert all(torch.equal(p.grad, before[name]) for name, p in optimizer.params.items())

    def test_small_rows_of_one_dtype_share_one_vector(self):
        optimizer = MuonAdam(mixed(), mixed_specs(), ADAMW)
        assert [n for n in optimizer.states if n not in MIXED] == ["replicated adamw torch.float32"]
        rows = optimizer.states["replicated adamw torch.float32"].specs
        assert [row.name for row in rows] == ["gain", "bias", "scalar"]


class TestAssignment:
    CONFIG = GPTConfig(num_layers=3, num_heads=2, model_dim=16, max_seq_len=8)

    def test_each_row_gets_its_optimizer_and_matrices_come_first(self):
        specs = param_specs(self.CONFIG, 19)
        banks = {"attention_qkv", "attention_out", "mlp_up", "mlp_down"}
        for matrices in ("muon", "soap"):
            for cautious in (False, True):
                adam = AdamConfig(cautious=cautious)
                rows = assign_optimizers(specs, OptimConfig(adam, matrices=matrices))
                assert {row.name for row in rows[:4]} == banks
                for row in rows:
                    other = "adam" if cautious else "adamw"
                    assert row.optim == (matrices if row.name in banks else other), row.name
                rest = [row.name for row in specs if row.name not in banks]
                assert [row.name for row in rows[4:]] == rest
        plain = assign_optimizers(specs, OptimConfig())
        assert [row.name for row in plain] == [row.name for row in specs]
        assert {row.optim for row in plain} == {"adamw"}

    def test_a_rate_of_the_matrices_own_is_a_multiple_of_the_others(self):
        config = OptimConfig(AdamConfig(lr=0.01), matrix_lr=0.03)
        for row in assign_optimizers(param_specs(self.CONFIG, 19), config):
            assert row.lr_mul == pytest.approx(3.0 if row.matrices else 1.0), row.name

    def test_muons_rate_goes_by_the_matrixs_shape(self):
        """sqrt(rows / cols) where a matrix is tall; the wide one has a multiple of its own."""
        specs = param_specs(self.CONFIG, 19)
        for muon in (MuonConfig(), MuonConfig(down_lr_mul=4.0), MuonConfig(scale_by_shape=False)):
            for row in assign_optimizers(specs, OptimConfig(muon=muon, matrices="muon")):
                if not row.matrices:
                    continue
                rows, cols = row.shape[1] // row.matrices, row.shape[2]
                tall = math.sqrt(max(1.0, rows / cols)) if muon.scale_by_shape else 1.0
                assert row.lr_mul == (muon.down_lr_mul if rows < cols else tall), row.name

    def test_several_multiples_stay_as_they_are(self):
        row = ParamSpec("bank", (4, 6, 6), matrices=1, comm="sharded", lr_mul=(2.0, 4.0))
        (found,) = assign_optimizers([row], OptimConfig(matrices="muon"))
        assert found.lr_mul == (2.0, 4.0)


class TestOverlap:
    def test_one_transfer_after_the_other_is_no_other_result(self, on):
        overlapped, in_turn = on("record-streams", 2), on("record-in-turn", 2)
        assert overlapped["hashes"] == in_turn["hashes"]
        assert set(overlapped["left"].values()) == {0.0}


class TestTies:
    @pytest.mark.parametrize("optim", ["adam", "adamw"])
    def test_untied_it_goes_on_with_the_transposed_moments(self, optim):
        """Two matrices are one; apart, and with gradients that are each other's transpose, they stay it."""
        parameters = {
            "embed": torch.nn.Parameter(random(7, 3)),
            "head": torch.nn.Parameter(random(3, 7, seed=1)),
        }
        embed = ParamSpec("embed", (7, 3), optim=optim, comm="sharded", tied_to="head", wd_mul=1.0)
        head = ParamSpec("head", (3, 7), optim=optim, comm="sharded", wd_mul=1.0)
        each = replace(CONFIG, adam=replace(CONFIG.adam, every=1), grad_clip=1.0)
        optimizer = MuonAdam(parameters, [embed, head], each)
        (a, b), start = parameters.values(), parameters["head"].detach().clone()
        assert torch.equal(a, b.mT) and not torch.equal(start, random(7, 3).mT + 1)
        for step in range(3):
            fill(parameters, step)
            optimizer.step(settings_at(step))
            assert torch.equal(a, b.mT) and not a.grad.any() and not b.grad.any()
        assert not torch.equal(b, start) and not optimizer.state_dict()["embed/exp_avg"].any()
        for step in range(3, 6):
            g = random(7, 3, seed=step)
            a.grad += g
            b.grad += g.mT
            optimizer.step(settings_at(step, untie=True))
            assert torch.allclose(a, b.mT, atol=1e-7)
        state = optimizer.state_dict()
        assert state["optimizer/embed untied"] == 1
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(state[f"embed/{key}"], state[f"head/{key}"].mT, atol=1e-7)
        fill(parameters, 6)
        optimizer.step(settings_at(6, untie=True))
        assert not torch.allclose(a, b.mT, atol=1e-4)

    def test_the_gradient_of_what_is_tied_is_added_to_the_others(self):
        optimizer = MuonAdam(model(), TABLE, CONFIG)
        embed, head = optimizer.params["embed"], optimizer.params["head"]
        fill({"embed": embed, "head": head}, 0)
        wanted = head.grad + embed.grad.mT
        optimizer.check_finite(optimizer.due_params(1))
        assert torch.equal(head.grad, wanted) and not embed.grad.any()


def build(table=TABLE, parameters=None, config=CONFIG, **orders) -> MuonAdam:
    return MuonAdam(parameters or model(), table, config, **orders)


class TestRefusals:
    def test_what_muon_updates_is_not_tied(self):
        banks = {name: torch.nn.Parameter(torch.ones(4, 4, 4)) for name in "ab"}
        bank = ParamSpec("a", (4, 4, 4), optim="muon", comm="sharded", matrices=1)
        table = (bank, ParamSpec("b", (4, 4, 4), optim="adam", comm="sharded", tied_to="a"))
        with pytest.raises(ValueError, match="b and a: both have to be adam's, or adamw's"):
            MuonAdam(banks, table)

    @pytest.mark.parametrize(
        "table, said",
        [
            (TABLE[:-1], "the parameter table: missing: scalars"),
            ((*TABLE, TABLE[0]), "twice: qk"),
            ((*TABLE, ParamSpec("other", (3,), optim="adam")), "not in the model: other"),
            ((replace(TABLE[0], matrices=5), *TABLE[1:]), "qk: 16 rows are not 5 matrices"),
            ((replace(TABLE[0], comm="replicated"), *TABLE[1:]), "qk: muon updates sharded banks"),
            ((*TABLE[:7], replace(TABLE[7], optim="soap")), "scalars: soap updates sharded banks"),
            (
                (*TABLE[:2], replace(TABLE[2], lr_mul=(1.0, 2.0)), *TABLE[3:]),
                r"head: adam has one lr_mul, not \(1.0, 2.0\)",
            ),
            (
                (*TABLE[:6], replace(TABLE[6], comm="sharded_sparse"), TABLE[7]),
                "gates: a sparse table has two dimensions, not 1",
            ),
            (
                (*TABLE[:3], replace(TABLE[3], tied_to="qk"), *TABLE[4:]),
                "embed: qk has not the transposed shape",
            ),
            (
                (*TABLE[:3], replace(TABLE[3], tied_to="nothing"), *TABLE[4:]),
                "embed: nothing has not the transposed shape",
            ),
            (
                (*TABLE[:3], replace(TABLE[3], comm="replicated"), *TABLE[4:]),
                "embed and head: tied parameters have to be sharded",
            ),
            (
                (*TABLE[:3], replace(TABLE[3], optim="adamw"), *TABLE[4:]),
                "embed and head: both have to be adam's, or adamw's",
            ),
        ],
    )
    def test_a_table_that_does_not_fit(self, table, said):
        with pytest.raises(ValueError, match=said):
            build(table)

    @pytest.mark.parametrize("what", ["scatter_order", "work_order"])
    def test_an_order_that_does_not_fit(self, what):
        order = SCATTER if what == "scatter_order" else WORK
        for wrong, said in (
            (order[1:], f"missing: {order[0]}"),
            ((*order, "qk"), "twice: qk"),
            ((*order[1:], "scalars"), "not in the table: scalars"),
        ):
            with pytest.raises(ValueError, match=f"{what}.*{said}"):
                build(**{what: wrong})

    @pytest.mark.parametrize("what", ["gradient", "value"])
    def test_a_tensor_that_is_somewhere_else(self, what):
        optimizer = build()
        if what == "gradient":
            optimizer.params["qk"].grad = None  # what zero_grad() does
        else:
            optimizer.params["qk"].data = optimizer.params["qk"].data.clone()
        with pytest.raises(RuntimeError, match=f"the {what} of qk .* leave zero_grad"):
            optimizer.step(settings_at(0))

    def test_rows_that_nobody_announced(self):
        optimizer = build()
        optimizer.step(settings_at(0))
        with pytest.raises(RuntimeError, match="announce"):
            optimizer.step(settings_at(1))


@pytest.mark.parametrize("table", [TABLE, adamw_table()], ids=["adam", "adamw"])
class TestNonFinite:
    @pytest.mark.parametrize("clip", [0.0, 1.0])
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_nonfinite_gradient_changes_nothing_and_has_a_name(self, value, clip, table):
        optimizer = build(table, config=replace(CONFIG, grad_clip=clip))
        state = optimizer.state_dict()
        assert torch.equal(optimizer.params["head"], optimizer.params["embed"].mT)
        before = copies(optimizer.params)
        for p in optimizer.params.values():
            p.grad += 1.0
        optimizer.states["bigram"].comm.announce(torch.arange(61))
        optimizer.params["mlp"].grad[4, 3, 1] = value
        optimizer.step(settings_at(1))
        assert optimizer.nonfinite_params() == ["mlp"] and optimizer.skip.item() == 1.0
        assert differing(before, copies(optimizer.params)) == []
        assert differing(state, optimizer.state_dict()) == []
        assert not any(p.grad.any() for p in optimizer.params.values()), "it is cleared as well"

    @pytest.mark.parametrize("name", ["qk", "head", "values", "bigram", "gates", "scalars"])
    def test_nonfinite_gradient_is_named_by_parameter_replicated_or_not(self, name, table):
        optimizer = build(table)
        optimizer.states["bigram"].comm.announce(torch.arange(61))
        optimizer.params[name].grad.view(-1)[-1] = math.nan
        assert optimizer.nonfinite_params() == []
        optimizer.step(settings_at(1))
        assert optimizer.nonfinite_params() == [name]

    @pytest.mark.parametrize("clip", [0.0, 1.0])
    @pytest.mark.parametrize("broken", [0, 1, 3])
    @pytest.mark.parametrize("every", [1, 2])
    def test_nonfinite_step_is_as_if_its_batches_had_never_come(self, every, broken, clip, table):
        """A step of all rules; or a pair, by adam alone: in the first of its steps muon would move, and rightly."""
        table = [row for row in table if every == 1 or row.optim != "muon"]
        adam = replace(CONFIG.adam, every=every)

        def trained(turns) -> dict:
            parameters = {row.name: model()[row.name] for row in table}
            config = replace(CONFIG, adam=adam, grad_clip=clip)
            optimizer = MuonAdam(parameters, table, config)
            for index in (every * turn + n for turn in turns for n in range(every)):
                for name, p in parameters.items():
                    p.grad += gradient(name, index, 0, "normal").to(p)
                optimizer.states["bigram"].comm.announce(torch.arange(61))
                if index == every * broken + every - 1:
                    parameters["values"].grad[3, 2] = math.nan
                ramp = 0.85 + 0.01 * index  # it goes by the number of the step
                optimizer.step(settings_at(index, momentum=ramp))
            return copies(parameters) | optimizer.state_dict()

        left_out, never = trained(range(6)), trained([n for n in range(6) if n != broken])
        assert differing(never, left_out) == []
        assert left_out["optimizer/updates"] == 5
        assert all(t.isfinite().all() for t in never.values())

    def test_warming_up_changes_nothing(self, table):
        optimizer = build(table)
        before, state = copies(optimizer.params), optimizer.state_dict()
        for p in optimizer.params.values():
            p.grad += 1.0
        optimizer.warm_up()
        assert differing(before, copies(optimizer.params)) == []
        assert differing(state, optimizer.state_dict()) == []
        assert optimizer.ties.tied == {"embed": "head"} and optimizer.skip.item() == 0


@pytest.mark.parametrize("matrices", ["adam", "muon"])
def test_a_norm_that_is_not_finite_leaves_the_step_out(matrices):
    """Gradients are finite, their squares are not."""
    config = replace(ADAMW, matrices=matrices)
    optimizer = MuonAdam(mixed(), mixed_specs(config), config)
    before, state = copies(optimizer.params), optimizer.state_dict()
    for p in optimizer.params.values():
        p.grad.fill_(1e25)
    optimizer.step(settings_at(0))
    assert optimizer.skip.item() == 1.0
    assert differing(before, copies(optimizer.params)) == []
    assert differing(state, optimizer.state_dict()) == []


def test_nonfinite_step_is_counted_once():
    """The trainer adds `skip` up after every step, one in which nothing is due as well."""
    optimizer, counted = MuonAdam(mixed(), mixed_specs(), replace(ADAMW, adam=CONFIG.adam)), 0
    for step in range(4):
        if step == 1:
            optimizer.params["gain"].grad[2] = math.nan
        optimizer.step(settings_at(step))
        counted += optimizer.skip.item()
    assert counted == 1.0


@pytest.mark.parametrize("beta", [0.5, 0.75, 0.9, 0.95, 0.99])
def test_adams_corrections_are_those_of_python_to_the_bit(beta):
    betas = torch.tensor([beta, 0.0, beta], dtype=torch.float64)
    for t in range(3000):
        updates, wanted = torch.tensor(float(t), dtype=torch.float64), 1 - beta ** max(1, t)
        assert torch.equal(bias_correction(beta, updates), torch.tensor(wanted)), t
        assert torch.equal(bias_correction(betas, updates), torch.tensor([wanted, 1.0, wanted])), t


class TestState:
    @pytest.mark.parametrize("table", [TABLE, adamw_table()], ids=["adam", "adamw"])
    def test_a_state_in_the_middle_of_a_pair_of_steps_holds_what_waits(self, table):
        optimizer, again = build(table), build(table)
        for p in optimizer.params.values():
            p.grad += 1.0
        optimizer.step(settings_at(0))
        saved = optimizer.state_dict()
        waiting = saved["values/pending_grad"]
        assert torch.equal(waiting, torch.ones(37, 6, dtype=torch.bfloat16))
        assert ("qk/pending_grad" in saved) == (table is not TABLE)
        assert saved["optimizer/updates"] == 0 and saved["optimizer/pending"] == 1
        again.load_state_dict(saved)
        assert differing(saved, again.state_dict()) == []
        optimizer.states["bigram"].comm.announce(torch.arange(61))
        optimizer.step(settings_at(1))
        again.load_state_dict(optimizer.state_dict())  # nothing waits any more
        assert not again.pending and not again.params["values"].grad.any()

    @pytest.mark.parametrize("table", [TABLE, adamw_table()], ids=["adam", "adamw"])
    @pytest.mark.parametrize("cut", [2, 3, 5])
    def test_resuming_is_exact(self, table, cut):
        """Cut between pairs of steps and inside of one, tied and untied."""

        def go(optimizer, steps):
            for step in steps:
                for name, p in optimizer.params.items():
                    p.grad += gradient(name, step, 0, "normal").to(p)
                optimizer.states["bigram"].comm.announce(torch.arange(61))
                optimizer.step(settings_at(step, untie=step >= 4))
            return copies(optimizer.params), optimizer.state_dict()

        config = replace(CONFIG, grad_clip=1.0)
        whole = go(build(table, config=config), range(6))
        weights, state = go(build(table, config=config), range(cut))
        again = build(table, config=config)
        for name, p in again.params.items():
            p.data.copy_(weights[name])
        again.load_state_dict(state)
        resumed = go(again, range(cut, 6))
        assert differing(whole[0], resumed[0]) == [] and differing(whole[1], resumed[1]) == []

    def test_a_state_of_something_else(self):
        optimizer = build()
        saved, second = optimizer.state_dict(), "mlp/second_momentum_buffer"
        momentum = saved["mlp/momentum_buffer"]
        for change, said in (
            ({}, f"the saved state: missing: {second}"),
            ({second: torch.ones(4, 24, 1)}, rf"{second}: saved as \(4, 24, 1\) float32, here"),
            ({second: saved[second].double()}, f"{second}: saved as .* float64, here .* float32"),
            ({second: saved[second], "mlp/mantissa": momentum}, "mlp/mantissa: .* here .* int16"),
            ({second: saved[second], "gates/mean": momentum}, "not in this .*: gates/mean"),
            ({second: saved[second], "gates/pending_grad": momentum}, "not in this .*: gates/pend"),
        ):
            other = {label: tensor for label, tensor in saved.items() if label != second}
            other["qk/momentum_buffer"] = torch.ones(6, 8, 12)
            with pytest.raises(ValueError, match=said):
                optimizer.load_state_dict(other | change)
        assert not optimizer.states["qk"].rule.state["momentum_buffer"].any(), "nothing was taken"

    def test_a_state_of_another_config(self):
        """Saved without NorMuon and mantissas, or with all of its gradients taken in every step."""
        plain = replace(CONFIG, muon=MuonConfig())
        missing = "missing: mlp/mantissa, mlp/second_momentum_buffer, qk/mantissa"
        with pytest.raises(ValueError, match=missing):
            build().load_state_dict(build(config=plain).state_dict())
        with pytest.raises(ValueError, match="not in this optimizer's state: mlp/mantissa"):
            build(config=plain).load_state_dict(build().state_dict())
        paired = build()
        paired.step(settings_at(0))
        each = build(config=replace(CONFIG, adam=replace(CONFIG.adam, every=1)))
        with pytest.raises(ValueError, match="not in this .*: bigram/pending_grad"):
            each.load_state_dict(paired.state_dict())

    def test_it_is_a_copy(self):
        optimizer = build()
        saved = optimizer.state_dict()
        fill(optimizer.params, 0)
        optimizer.states["bigram"].comm.announce(torch.arange(61))
        optimizer.step(settings_at(1))
        zeros = [label for label in saved if label.endswith(("exp_avg", "buffer"))]
        assert zeros and not any(saved[label].any() for label in zeros)


class TestBytes:
    def test_a_rank_alone_sends_nothing(self):
        sparse = bytes_sent("sharded_sparse", 1000, 2, 1, 10, 5)
        assert bytes_sent("sharded", 1000, 2, 1) == sparse == (0, 0)

    def test_each_kind_by_its_formula(self):
        assert bytes_sent("sharded", 1000, 2, 4) == (1500, 1500)
        assert bytes_sent("replicated", 1000, 2, 4) == (3000, 0)
        assert bytes_sent("sharded_sparse", 1000, 2, 4, rows=100, width=5) == (1350, 1500)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 30), st.integers(1, 4))
    def test_shares_are_even_and_padding_is_zero(self, units, cols):
        p = torch.nn.Parameter(torch.ones(units, cols))
        comm = Sharded("p", p, (cols,))
        assert comm.units == units and comm.shard_of(p.data).shape == comm.full.shape
        assert torch.equal(comm.full_of(comm.shard), torch.ones(units, cols))
        assert comm.full[units:].eq(0).all() and comm.full_grads()["p"].shape == (units, cols)


class TestMuonsParts:
    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50))
    def test_split_and_join_keep_every_bit(self, bits):
        whole = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
        joined = join_bf16(*split_bf16(whole))
        assert torch.equal(joined.view(torch.int32), whole.view(torch.int32))

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50))
    def test_the_upper_half_is_the_nearest_bfloat16(self, numbers):
        whole = torch.tensor(numbers)
        half, other = split_bf16(whole)[0].float(), whole.bfloat16().float()
        assert torch.equal((whole - half).abs(), (whole - other).abs()), "but for ties"

    @settings(max_examples=25, deadline=None)
    @given(st.integers(2, 12), st.integers(2, 40), st.integers(0, 5), st.integers(1, 7))
    def test_by_way_of_the_gram_matrix_it_is_the_same_map(self, rows, cols, restart, count):
        g = random(2, rows, cols).double()
        g = g / torch.linalg.matrix_norm(g, keepdim=True)
        polynomials = [(3.4445, -4.7750, 2.0315)] * count
        wanted = apply_odd_polynomials(g, polynomials)
        assert torch.allclose(gram_newton_schulz(g, polynomials, restart), wanted, atol=1e-6)

    def test_in_float16_it_is_more_exact_than_in_bfloat16(self):
        draw = torch.Generator().manual_seed(0)
        u = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64, generator=draw))[0]
        v = torch.linalg.qr(torch.randn(192, 48, dtype=torch.float64, generator=draw))[0]
        g = ((u * torch.logspace(0, -4, 48, dtype=torch.float64)) @ v.mT)[None]
        wanted = polar_express(g, dtype=torch.float64)
        error = {}
        for dtype, gram in ((torch.bfloat16, False), (torch.float16, True)):
            got = polar_express(g, dtype=dtype, gram=gram).double()
            error[dtype] = ((got - wanted).norm() / wanted.norm()).item()
        assert error[torch.float16] < error[torch.bfloat16] / 3

    def test_a_skipped_step_of_adam_changes_nothing(self):
        p, mean, square = torch.ones(3), torch.full((3,), 0.5), torch.full((3,), 2.0)
        numbers = (0.1, (0.9, 0.99), (0.1, 0.01), 1e-10, 0.1)
        adam_step(p, torch.full((3,), math.nan), mean, square, *numbers, skip=torch.ones(()))
        assert p.tolist() == [1.0] * 3
        assert mean.tolist() == [0.5] * 3 and square.tolist() == [2.0] * 3


def test_small_parameters_begin_at_multiples_of_16_bytes():
    tensors = {
        name: torch.nn.Parameter(torch.ones(size).bfloat16())
        for name, size in zip("abc", (7, 64, 1))
    }
    comm = Replicated(tensors)
    assert all(p.data_ptr() % 16 == comm.shard.data_ptr() % 16 for p in tensors.values())
    assert comm.shard.sum() == 72 and [comm.slices[n].start for n in "abc"] == [0, 8, 72]


def test_the_defaults_of_muon_are_record_4s():
    usual = MuonConfig()
    assert usual.orthogonalizer == "quintic" and usual.param_dtype == "float32"
    assert not (usual.beta2 or usual.cautious or usual.decay_with_lr or usual.weight_decay)
    assert usual.down_lr_mul == 1.0 and usual.scale_by_shape and usual.nesterov
