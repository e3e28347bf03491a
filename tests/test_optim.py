"""Update rules for matrices: against singular value decompositions, PyTorch's Muon, Adam, and themselves when resumed."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun.checkpoint import latest_checkpoint, load_checkpoint
from speedrun.config import Config, check_config, fields_of, vary
from speedrun.lab.errors import UserError
from speedrun.optim.muon import MuonConfig, join_bf16, muon_state, muon_step
from speedrun.optim.newton_schulz import QUINTIC, nesterov_momentum, newton_schulz, polar_factor
from speedrun.optim.optimizer import MuonAdam
from speedrun.optim.soap import SoapConfig, adam_in, eigenbasis, follow, soap_state, soap_update
from speedrun.optim.state import OptimConfig
from speedrun.params import ParamSpec
from speedrun.presets import RECORD_MUON, preset
from speedrun.schedule import StepSettings
from speedrun.train import build_optimizer, train

RULES = ("muon", "soap")
RECORD_BF16 = replace(RECORD_MUON, ns_dtype="bfloat16")


def random(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(random(size, size, seed=seed))[0]


class TestNewtonSchulz:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.integers(0, 99))
    def test_singular_values_go_through_the_polynomial_and_vectors_stay(self, rows, cols, n, seed):
        g, (a, b, c) = random(n, rows, cols, seed=seed), QUINTIC
        u, s, vt = torch.linalg.svd(g, full_matrices=False)
        sigma = s / (torch.linalg.matrix_norm(g)[:, None] + 1e-7)
        for _ in range(5):
            sigma = a * sigma + b * sigma**3 + c * sigma**5
        wanted = (u * sigma[:, None, :]) @ vt
        assert torch.allclose(newton_schulz(g, dtype=torch.float64), wanted, atol=1e-8)

    @pytest.mark.parametrize("shape", [(768, 768), (768, 3072), (3072, 768), (256, 768)])
    def test_at_the_records_shapes_bf16_is_semi_orthogonal_to_the_maps_tolerance(self, shape):
        g = random(*shape, dtype=torch.float32)
        sigma = torch.linalg.svdvals(g) / g.norm()
        kept = torch.linalg.svdvals(newton_schulz(g).float())
        assert kept.max() < 1.22 and (kept > 0.65).sum() >= (sigma > 1 / 600).sum()

    def test_scale_does_not_matter(self):
        g = random(3, 24, 40, dtype=torch.float32)
        assert torch.equal(newton_schulz(g), newton_schulz(2.0**-6 * g))
        assert torch.equal(newton_schulz(g), newton_schulz(2.0**20 * g))

    @pytest.mark.parametrize("rank", [1, 3])
    def test_directions_without_a_gradient_stay_without(self, rank):
        g = random(2, 16, rank) @ random(2, rank, 24, seed=1)
        exact = polar_factor(g)
        assert torch.linalg.matrix_rank(exact, atol=1e-6).tolist() == [rank, rank]
        flat = newton_schulz(g, dtype=torch.float64)
        assert (torch.linalg.svdvals(flat)[:, rank:] < 1e-6).all()


def bank_optimizer(
    bank: torch.nn.Parameter, matrices: int = 1, optim: str = "muon", **config
) -> MuonAdam:
    """The optimizer of one bank."""
    row = ParamSpec("bank", tuple(bank.shape), matrices=matrices, optim=optim, comm="sharded")
    config = OptimConfig(**({"grad_clip": 0.0, "matrices": optim} | config))
    return MuonAdam({"bank": bank}, [replace(row, wd_mul=1.0)], config)


def rule_state(optimizer: MuonAdam) -> dict[str, torch.Tensor]:
    return optimizer.states["bank"].rule.state


class TestMuon:
    @pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32)])
    @pytest.mark.parametrize("nesterov", [True, False])
    def test_it_agrees_with_pytorchs(self, shape, nesterov):
        start = random(*shape, dtype=torch.float32)
        theirs = torch.nn.Parameter(start.clone())
        ours = torch.nn.Parameter(start[None].clone())
        constants = {"lr": 0.02, "weight_decay": 0.1}
        reference = torch.optim.Muon([theirs], momentum=0.9, nesterov=nesterov, **constants)
        muon = MuonConfig(nesterov=nesterov, weight_decay=0.1)
        row = ParamSpec("bank", (1, *shape), matrices=1, optim="muon", comm="sharded", wd_mul=1.0)
        row = replace(row, lr_mul=math.sqrt(max(1, shape[0] / shape[1])))
        own = MuonAdam({"bank": ours}, [row], OptimConfig(muon=muon, grad_clip=0.0))
        for step in range(6):
            theirs.grad = random(*shape, seed=step + 1, dtype=torch.float32)
            ours.grad += theirs.grad
            reference.step()
            own.step(StepSettings(step, 0.0, 0.02, 0.9))
        moved = (theirs - start).norm()
        assert (theirs - ours[0]).norm() < 0.02 * moved

    def test_a_bank_is_many_matrices_and_not_one(self):
        bank, g = torch.nn.Parameter(torch.zeros(2, 24, 8)), random(2, 24, 8, dtype=torch.float32)
        optimizer = bank_optimizer(bank, 3)
        bank.grad += g
        optimizer.step(StepSettings(0, 0.0, 1.0, 0.95))
        for matrix, gradient in zip(bank.detach().view(6, 8, 8), g.view(6, 8, 8)):
            one = torch.zeros(1, 8, 8)
            state = muon_state(one, MuonConfig())
            muon_step(one, gradient[None], state, 1.0, 1.0, 0.95, 0.0, MuonConfig())
            assert one.norm() > 1 and torch.allclose(matrix, one[0], atol=0.02)

    @pytest.mark.parametrize("nesterov", [True, False])
    def test_a_mean_and_a_sum_of_gradients_lead_the_same_way(self, nesterov):
        summed, buffer = torch.zeros(1, 16, 16).double(), torch.zeros(1, 16, 16).double()
        for seed in range(5):
            g = random(1, 16, 16, seed=seed)
            ours = polar_factor(nesterov_momentum(g, buffer, 0.95, nesterov, None))
            summed = 0.95 * summed + g
            wanted = g + 0.95 * summed if nesterov else summed
            assert torch.allclose(ours, polar_factor(wanted), atol=1e-9)

    def test_without_iterations_a_step_is_the_exact_factor(self):
        bank, g = torch.nn.Parameter(torch.zeros(3, 12, 8)), random(3, 12, 8, dtype=torch.float32)
        optimizer = bank_optimizer(bank, muon=MuonConfig(ns_steps=0))
        bank.grad += g
        optimizer.step(StepSettings(0, 0.0, 1.0, 0.95))
        assert torch.allclose(bank, -polar_factor(g), atol=1e-5)

    @pytest.mark.parametrize("change", [{}, {"beta2": 0.9}, {"cautious": True}])
    def test_a_skipped_step_changes_nothing(self, change):
        muon = MuonConfig(weight_decay=0.1, **change)
        p, g = random(2, 8, 6, dtype=torch.float32), random(2, 8, 6, seed=1, dtype=torch.float32)
        state, moved = muon_state(p, muon), p.clone()
        muon_step(moved, g, state, 0.1, 1.0, 0.9, 0.1, muon)
        assert not torch.equal(moved, p) and all(t.any() for t in state.values())
        after, kept = moved.clone(), {key: t.clone() for key, t in state.items()}
        muon_step(moved, g * math.nan, state, 0.1, 1.0, 0.9, 0.1, muon, torch.ones(()))
        assert torch.equal(moved, after)
        assert all(torch.equal(t, kept[key]) for key, t in state.items())
        again, fresh = p.clone(), muon_state(p, muon)
        muon_step(again, g, fresh, 0.1, 1.0, 0.9, 0.1, muon, torch.zeros(()))
        assert torch.allclose(again, after, atol=1e-3)


class TestSoap:
    def test_in_fixed_bases_it_is_adam(self):
        g = [random(1, 6, 9, seed=seed) for seed in range(8)]
        bases = (torch.eye(6).double()[None], torch.eye(9).double()[None])
        state = {"exp_avg": torch.zeros_like(g[0]), "exp_avg_sq": torch.zeros_like(g[0])}
        state["step"] = torch.zeros(())
        p = torch.nn.Parameter(torch.zeros(1, 6, 9, dtype=torch.float64))
        adam, ours = torch.optim.Adam([p], lr=1.0, betas=(0.95, 0.95)), torch.zeros_like(p)
        for gradient in g:
            p.grad = gradient.clone()
            adam.step()
            ours = ours - adam_in(bases, gradient, state, SoapConfig())
        assert torch.allclose(p, ours, atol=1e-9)

    def test_it_turns_with_the_gradient(self):
        left, right = rotation(8, 1), rotation(8, 2)
        states = [soap_state(torch.zeros(2, 8, 8).double()) for _ in range(2)]
        config = SoapConfig(every=3)
        for seed in range(9):
            g = random(2, 8, 8, seed=seed)
            plain = soap_update(g, states[0], None, config)
            turned = soap_update(left @ g @ right, states[1], None, config)
            assert torch.allclose(turned, left @ plain @ right, atol=1e-4)

    def test_its_first_step_only_takes_the_bases(self):
        g = random(2, 8, 6)
        state = soap_state(torch.zeros_like(g))
        assert state["step"].eq(-1).all() and not soap_update(g, state, None).any()
        assert state["step"].eq(0).all() and not state["exp_avg"].any()
        for side, pair in (("left", g @ g.mT), ("right", g.mT @ g)):
            basis = state[f"{side}_basis"]
            diagonal = basis.mT @ pair @ basis
            off = diagonal - torch.diag_embed(diagonal.diagonal(dim1=-2, dim2=-1))
            assert off.abs().max() < 1e-9 and torch.allclose(state[side], 0.05 * pair)
        assert soap_update(g, state, None).any()

    def test_the_bank_decays_and_follows_the_update(self):
        bank = torch.nn.Parameter(random(2, 12, 4, dtype=torch.float32))
        optimizer = bank_optimizer(bank, 3, "soap")  # decays like AdamW, by optim.adam
        state, p = soap_state(torch.zeros(6, 4, 4)), bank.detach().clone().view(6, 4, 4)
        for step in range(12):
            g = random(2, 12, 4, seed=step, dtype=torch.float32)
            bank.grad += g
            optimizer.step(StepSettings(step, 0.0, 0.01, 0.95))
            update = soap_update(g.view(6, 4, 4), state, None)
            p = p * (1 - 0.01 * 0.1) - 0.01 * update
        assert torch.allclose(bank, p.view(2, 12, 4), atol=1e-6)
        assert all(torch.equal(t, state[key]) for key, t in rule_state(optimizer).items())

    def test_orthogonal_iteration_arrives(self):
        x = random(2, 12, 30)
        covariance, basis = x @ x.mT, rotation(12, 5).expand(2, 12, 12).contiguous()
        for _ in range(400):
            basis, order = follow(covariance, basis)
        wanted = eigenbasis(covariance)
        assert torch.allclose((basis * wanted).sum(-2).abs(), torch.ones(2, 12).double(), atol=1e-3)
        assert order.tolist() == [list(range(12))] * 2


@pytest.mark.parametrize("rule", RULES)
class TestEitherRule:
    def test_nonfinite_gradient_changes_nothing(self, rule):
        bank = torch.nn.Parameter(random(2, 12, 4, dtype=torch.float32))
        muon = MuonConfig(weight_decay=0.1)
        optimizer = bank_optimizer(bank, 3, rule, muon=muon, grad_clip=1.0)
        for seed in range(3):
            bank.grad += random(2, 12, 4, seed=seed, dtype=torch.float32)
            optimizer.step(StepSettings(seed, 0.0, 0.1, 0.95))
        weights = bank.detach().clone()
        state = {name: value.clone() for name, value in rule_state(optimizer).items()}
        bank.grad += math.nan
        optimizer.step(StepSettings(3, 0.0, 0.1, 0.95))
        assert torch.equal(bank, weights) and bank.isfinite().all()
        assert all(torch.equal(t, state[key]) for key, t in rule_state(optimizer).items())
        assert optimizer.nonfinite_params() == ["bank"] and not bank.grad.any()
        bank.grad += 1.0
        optimizer.step(StepSettings(4, 0.0, 0.1, 0.95))
        assert not torch.equal(bank, weights) and bank.isfinite().all()

    def test_resuming_is_exact(self, rule, brief, tmp_path):
        run = vary(brief, {"optim.matrices": rule, "optim.matrix_lr": 0.01})
        whole = train(run, tmp_path / "whole", echo=None)
        train(vary(run, {"max_steps": 7}), tmp_path / "cut", echo=None)
        moments = load_checkpoint(latest_checkpoint(tmp_path / "cut"))[1]
        assert any(name.startswith("mlp_up/") for name in moments)
        resumed = train(run, tmp_path / "cut", again=True, echo=None)
        assert_same_end(whole, resumed)

    def test_its_state_goes_to_another_optimizer_bit_by_bit(self, rule):
        start = random(2, 12, 4, dtype=torch.float32)
        (one, first), (other, second) = (
            (bank, bank_optimizer(bank, 3, rule))
            for bank in (torch.nn.Parameter(start.clone()) for _ in range(2))
        )
        for seed in range(3):
            one.grad += random(2, 12, 4, seed=seed, dtype=torch.float32)
            first.step(StepSettings(seed, 0.0, 0.1, 0.95))
        saved = first.state_dict()
        second.load_state_dict(saved)
        other.data.copy_(one)
        assert all(torch.equal(t, saved[key]) for key, t in second.state_dict().items())
        for bank, optimizer in ((one, first), (other, second)):
            bank.grad += random(2, 12, 4, seed=9, dtype=torch.float32)
            optimizer.step(StepSettings(3, 0.0, 0.1, 0.95))
        assert torch.equal(one, other)


def assert_same_end(whole, resumed) -> None:
    """Two runs have the same weights and the same state, to the bit."""
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters()):
        assert torch.equal(a, b), name
    states = [run.optimizer.state_dict() for run in (whole, resumed)]
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def with_record(brief: Config) -> Config:
    """A run under Muon as it is today, with a bfloat16 that a CPU multiplies fast."""
    changes = fields_of(RECORD_BF16, "optim.muon.") | {"schedule.momentum_min": 0.85}
    changes |= {"optim.matrices": "muon", "optim.matrix_lr": 0.01, "precision": "bfloat16"}
    return vary(brief, changes | {"schedule.momentum_ramp": (4, 2)})


class TestRecordMuon:
    """Muon as it runs today, in the trainer."""

    def test_resuming_is_exact_with_bits_kept_aside(self, brief, tmp_path):
        run = with_record(brief)
        whole = train(run, tmp_path / "whole", echo=None)
        train(vary(run, {"max_steps": 7}), tmp_path / "cut", echo=None)
        moments = load_checkpoint(latest_checkpoint(tmp_path / "cut"))[1]
        keys = ("mantissa", "second_momentum_buffer", "momentum_buffer")
        assert {f"mlp_up/{key}" for key in keys} <= set(moments)
        resumed = train(run, tmp_path / "cut", again=True, echo=None)
        assert_same_end(whole, resumed)
        assert whole.model.mlp_up.dtype == torch.bfloat16
        for live in (whole, resumed):
            assert live.optimizer.states["mlp_up"].rule.state["mantissa"].any()

    def test_mantissas_begin_with_what_rounding_took(self, brief, tmp_path):
        """The first weights are float32's, to the bit: of matrices that are sharded by matrix and of a bank in one."""
        run = with_record(brief)
        for matrices in (1, 3):
            start = 0.1 * random(2, 12, 4, dtype=torch.float32)
            bank = torch.nn.Parameter(start.clone())
            optimizer = bank_optimizer(bank, matrices, muon=run.optim.muon)
            mantissa = rule_state(optimizer)["mantissa"].view(bank.shape)
            assert torch.equal(join_bf16(bank.detach(), mantissa), start)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_its_state_dict_keeps_every_bit(self, dtype):
        start = random(2, 12, 4).to(dtype)

        def optimizer() -> tuple[torch.nn.Parameter, MuonAdam]:
            bank = torch.nn.Parameter(start.clone())
            return bank, bank_optimizer(bank, 3, muon=RECORD_BF16)

        (bank, first), (_, second) = optimizer(), optimizer()
        for seed in range(3):
            bank.grad += random(2, 12, 4, seed=seed).to(bank.dtype)
            first.step(StepSettings(seed, 0.0, 0.01, 0.95))
        second.load_state_dict(first.state_dict())
        state = rule_state(second)
        assert state["mantissa"].dtype == torch.int16 and bank.dtype == torch.bfloat16
        assert state["mantissa"].any()
        for key, value in rule_state(first).items():
            assert torch.equal(value, state[key]), key

    def test_in_double_precision(self):
        bank = torch.nn.Parameter(random(2, 12, 4))
        optimizer = bank_optimizer(bank, 3, muon=replace(RECORD_MUON, param_dtype="float32"))
        start = bank.detach().clone()
        bank.grad += random(2, 12, 4, seed=1)
        optimizer.step(StepSettings(0, 0.0, 0.01, 0.95))
        assert bank.dtype == torch.float64 and bank.isfinite().all()
        assert not torch.equal(bank, start)

    def test_momentum_takes_its_ramps(self, brief, tmp_path):
        run = train(with_record(brief), tmp_path, echo=None)
        last = run.config.steps - 1
        wanted = 0.85 + 0.1 * min(1.0, (run.config.steps - last) / 2)
        assert run.optimizer.scalars["momentum"] == pytest.approx(wanted)

    def test_what_was_trained_can_be_sampled(self, brief, tmp_path):
        from speedrun.sample import main

        train(with_record(brief), tmp_path / "run", echo=None)
        assert main([str(tmp_path / "run"), "--prompt", "def ", "--tokens", "5"]) == 0

    @pytest.mark.parametrize(
        "changes, said",
        [
            ({"optim.muon.param_dtype": "bf16_mantissa"}, "computes in float32"),
            ({"optim.muon.param_dtype": "bfloat16"}, "computes in float32"),
            ({"optim.muon.beta2": 1.0}, "must be less than 1"),
            ({"optim.muon.momentum": 1.0}, "must be less than 1"),
            ({"optim.muon.weight_decay": -0.1}, "must be at least 0"),
            ({"schedule.momentum_min": -0.1}, "must be at least 0"),
        ],
    )
    def test_refusals(self, changes, said):
        with pytest.raises(UserError, match=said):
            check_config(vary(preset("cpu_gpt2"), changes))


@pytest.mark.parametrize("record", [False, True])
def test_runs_that_share_a_process_end_as_they_would_alone(record, brief, tmp_path):
    """On a GPU, comparisons train one run after the other with one compiled model."""
    from speedrun.lab.metrics import read_metrics, series
    from speedrun.measure.runs import train_in_place
    from speedrun.train import build_run

    first = with_record(brief) if record else brief
    second = vary(first, {"optim.matrices": "muon", "optim.muon.param_dtype": "float32", "seed": 3})
    live = build_run(first, tmp_path / "live", echo=None)
    for n, run in enumerate((first, second, first)):
        train(run, tmp_path / f"alone{n}", echo=None)
        alone = series(read_metrics(tmp_path / f"alone{n}" / "metrics.jsonl"), "val")[-1]
        done = train_in_place(live, run)
        assert done["val_loss"] == alone["val_loss"] and done["skipped"] == 0


def test_weights_that_mix_are_told_over_the_run(brief, tmp_path):
    from speedrun.measure.runs import train_in_place
    from speedrun.train import build_run

    run = vary(
        brief,
        {
            "model.layout.x0": True,
            "model.layout.backout": True,
            "model.layout.resid_lambda_init": 1.5,
        },
    )
    live = build_run(run, tmp_path, echo=None)
    told = train_in_place(live, run)["learned"]
    assert set(told) == {"resid_lambdas", "x0_lambdas", "backout_lambda"}
    assert told["resid_lambdas"][0] == [0, [1.5] * run.model.num_layers]
    step, last = told["x0_lambdas"][-1]
    assert (
        step == run.steps and last == live.model.x0_lambdas.tolist() != [0.0] * run.model.num_layers
    )


class TestRatesOfTheMatrices:
    def test_adamw_with_a_rate_of_its_own_is_adamw(self, brief, tmp_path):
        """The same rate said twice trains the same bits."""
        one = train(brief, tmp_path / "one", echo=None)
        again = vary(brief, {"optim.matrix_lr": brief.optim.adam.lr})
        assert_same_end(one, train(again, tmp_path / "two", echo=None))

    @pytest.mark.parametrize("matrices", ["muon", "soap"])
    def test_rates_keep_their_ratio_through_the_schedule(self, matrices, brief, tmp_path):
        changes = {"optim.matrices": matrices, "optim.matrix_lr": 0.02}
        run = train(vary(brief, changes), tmp_path, echo=None)
        first, second = (run.optimizer.scalars[name] for name in ("lr", "matrix_lr"))
        assert second / first == pytest.approx(0.02 / brief.optim.adam.lr)
        last = run.config.steps - 1
        assert first == run.schedule.at(last).lr < brief.optim.adam.lr

    def test_adams_matrices_have_a_multiple_of_the_rate(self, brief, tmp_path):
        from speedrun.train import build_run

        changes = {"optim.matrix_lr": 3 * brief.optim.adam.lr}
        live = build_run(vary(brief, changes), tmp_path, echo=None)
        found = {spec.name: spec.lr_mul for spec in live.optimizer.specs}
        banks = {"attention_qkv", "attention_out", "mlp_up", "mlp_down"}
        assert found == {name: pytest.approx(3.0 if name in banks else 1.0) for name in found}

    def test_a_second_optimizer_of_a_model_takes_its_storage_over(self, brief, tmp_path):
        """Comparisons build one after the other over one model; the first one says that it is out."""
        from speedrun.train import build_run

        live = build_run(brief, tmp_path, echo=None)
        before = {name: p.detach().clone() for name, p in live.model.named_parameters()}
        second = build_optimizer(brief, live.model)
        assert all(torch.equal(p, before[n]) for n, p in live.model.named_parameters())
        second.step(StepSettings(0, 1e-3, 1e-3, 0.95))
        with pytest.raises(RuntimeError, match="is not in the optimizer's storage any more"):
            live.optimizer.step(StepSettings(0, 1e-3, 1e-3, 0.95))


@pytest.mark.slow
def test_the_three_winners_keep_their_order_for_sixty_steps(tmp_path, embedded):
    from speedrun.lab.metrics import read_metrics, series
    from speedrun.measure.newton_schulz import grid, losses_of_grid, short, winners

    brief, losses = {"steps": 60, "schedule.warmup_steps": 10, "val_every": 60}, {}
    for rule, run in winners(losses_of_grid(), grid(short())).items():
        train(vary(run, brief | {"val_tokens": 32_768}), tmp_path / rule, echo=None)
        losses[rule] = series(read_metrics(tmp_path / rule / "metrics.jsonl"), "val")[-1][
            "val_loss"
        ]
    assert losses["muon"] < losses["soap"] < losses["adamw"], losses


def test_soap_takes_its_bases_beside_padding_too():
    """A state that was saved and loaded again has zeros for the padding, also where no gradient has been seen."""
    state = soap_state(torch.zeros(2, 4, 3))
    state["step"][1] = 0.0
    g = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    g[1] = 0.0
    soap_update(g, state, None)
    assert state["left"][0].any() and state["left_basis"][0].any() and not state["step"].any()
    assert soap_update(g, state, None)[0].any()
