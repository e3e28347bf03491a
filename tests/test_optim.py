"""Update rules for matrices: against singular value decompositions, PyTorch's Muon, Adam, and themselves when resumed."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun.checkpoint import latest_checkpoint, load_checkpoint
from speedrun.config import TODAY, check_config, preset, vary
from speedrun.lab.errors import Problem
from speedrun.optim.muon import Muon
from speedrun.optim.newton_schulz import (
    QUINTIC,
    MatrixOptimizer,
    MatrixOptions,
    cut,
    muon_update,
    newton_schulz,
    orthogonal_factor,
)
from speedrun.optim.soap import SoapOptions, adam_in, eigenbasis, follow, soap_update
from speedrun.train import make_optimizers, train

MUON = MatrixOptions(rule="muon")
RULES = {"muon": partial(muon_update, options=MUON), "soap": soap_update}


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
        exact = orthogonal_factor(g)
        assert torch.linalg.matrix_rank(exact, atol=1e-6).tolist() == [rank, rank]
        flat = newton_schulz(g, dtype=torch.float64)
        assert (torch.linalg.svdvals(flat)[:, rank:] < 1e-6).all()


class TestMuon:
    @pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32)])
    @pytest.mark.parametrize("nesterov", [True, False])
    def test_it_agrees_with_pytorchs(self, shape, nesterov):
        start = random(*shape, dtype=torch.float32)
        theirs = torch.nn.Parameter(start.clone())
        ours = torch.nn.Parameter(start[None].clone())
        constants = {"lr": 0.02, "weight_decay": 0.1}
        reference = torch.optim.Muon([theirs], momentum=0.9, nesterov=nesterov, **constants)
        options = replace(MUON, momentum=0.9, nesterov=nesterov)
        own = MatrixOptimizer([(ours, 1)], partial(muon_update, options=options), **constants)
        for step in range(6):
            theirs.grad = random(*shape, seed=step + 1, dtype=torch.float32)
            ours.grad = theirs.grad[None].clone()
            reference.step()
            own.step()
        moved = (theirs - start).norm()
        assert (theirs - ours[0]).norm() < 0.02 * moved

    def test_a_bank_is_many_matrices_and_not_one(self):
        bank, g = torch.nn.Parameter(torch.zeros(2, 24, 8)), random(2, 24, 8, dtype=torch.float32)
        optimizer = MatrixOptimizer([(bank, 3)], RULES["muon"], lr=1.0, weight_decay=0.0)
        bank.grad = g
        optimizer.step()
        for matrix, gradient in zip(cut(bank.detach(), 3), cut(g, 3)):
            wanted = -muon_update(gradient[None], {}, None, MUON)[0].float()
            assert torch.allclose(matrix, wanted, atol=0.02)

    def test_a_mean_and_a_sum_of_gradients_lead_the_same_way(self):
        summed, state = torch.zeros(1, 16, 16, dtype=torch.float64), {}
        exact = replace(MUON, iterations=0)
        for seed in range(5):
            g = random(1, 16, 16, seed=seed)
            ours = muon_update(g, state, None, exact)
            summed = 0.95 * summed + g
            assert torch.allclose(ours, orthogonal_factor(g + 0.95 * summed), atol=1e-9)


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
            ours = ours - adam_in(bases, gradient, state, SoapOptions())
        assert torch.allclose(p, ours, atol=1e-9)

    def test_it_turns_with_the_gradient(self):
        left, right, states = rotation(8, 1), rotation(8, 2), ({}, {})
        options = SoapOptions(every=3)
        for seed in range(9):
            g = random(2, 8, 8, seed=seed)
            plain = soap_update(g, states[0], None, options)
            turned = soap_update(left @ g @ right, states[1], None, options)
            assert torch.allclose(turned, left @ plain @ right, atol=1e-4)

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
    def test_a_broken_gradient_changes_nothing(self, rule):
        bank = torch.nn.Parameter(random(2, 12, 4, dtype=torch.float32))
        optimizer = MatrixOptimizer([(bank, 3)], RULES[rule], lr=0.1, weight_decay=0.1)
        optimizer.found_inf = torch.zeros(())
        for seed in range(3):
            bank.grad = random(2, 12, 4, seed=seed, dtype=torch.float32)
            optimizer.step()
        weights = bank.detach().clone()
        state = {name: value.clone() for name, value in optimizer.state[bank].items()}
        bank.grad, optimizer.found_inf = torch.full_like(bank, math.nan), torch.ones(())
        optimizer.step()
        assert torch.equal(bank, weights) and bank.isfinite().all()
        assert all(torch.equal(value, state[name]) for name, value in optimizer.state[bank].items())

    def test_resuming_is_exact(self, rule, brief, tmp_path):
        run = vary(brief, {"matrix.rule": rule, "matrix.lr": 0.01})
        whole = train(run, tmp_path / "whole", echo=None)
        train(vary(run, {"max_steps": 7}), tmp_path / "cut", echo=None)
        moments = load_checkpoint(latest_checkpoint(tmp_path / "cut"))[1]
        assert any(name.startswith("mlp_up/") for name in moments)
        resumed = train(run, tmp_path / "cut", again=True, echo=None)
        for (name, a), (_, b) in zip(
            whole.model.named_parameters(), resumed.model.named_parameters()
        ):
            assert torch.equal(a, b), name

    def test_the_plain_architecture_refuses_it(self, rule):
        run = vary(preset("baseline"), {"matrix.rule": rule})
        with pytest.raises(Problem, match="no banks of matrices"):
            check_config(run)


class TestToday:
    """Muon as it runs today, in the trainer."""

    def today(self, brief):
        run = replace(brief, muon=replace(TODAY, products="bfloat16", momentum_steps=(4, 2)))
        changes = {"matrix.rule": "muon", "matrix.lr": 0.01, "precision": "bfloat16"}
        return vary(run, changes)

    def test_resuming_is_exact_with_bits_kept_aside(self, brief, tmp_path):
        run = self.today(brief)
        whole = train(run, tmp_path / "whole", echo=None)
        train(vary(run, {"max_steps": 7}), tmp_path / "cut", echo=None)
        moments = load_checkpoint(latest_checkpoint(tmp_path / "cut"))[1]
        assert {"mlp_up/lost", "mlp_up/second", "mlp_up/momentum"} <= set(moments)
        resumed = train(run, tmp_path / "cut", again=True, echo=None)
        assert whole.model.mlp_up.dtype == torch.bfloat16
        for (name, a), (_, b) in zip(
            whole.model.named_parameters(), resumed.model.named_parameters()
        ):
            assert torch.equal(a, b), name
        for bank in (whole.model.mlp_up, resumed.model.mlp_up):
            lost = (
                (whole if bank is whole.model.mlp_up else resumed).optimizers[1].state[bank]["lost"]
            )
            assert lost.any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_its_state_dict_keeps_every_bit(self, dtype):
        options, start = replace(TODAY, products="bfloat16"), random(2, 12, 4).to(dtype)

        def optimizer() -> Muon:
            bank = torch.nn.Parameter(start.clone())
            return Muon([(bank, 3)], MUON, options, lr=0.01, weight_decay=0.0)

        first, second = optimizer(), optimizer()
        (bank,), (other,) = (one.param_groups[0]["params"] for one in (first, second))
        for seed in range(3):
            bank.grad = random(2, 12, 4, seed=seed).to(bank.dtype)
            first.step()
        second.load_state_dict(first.state_dict())
        assert second.state[other]["lost"].dtype == torch.int16 and bank.dtype == torch.bfloat16
        for key, value in first.state[bank].items():
            assert torch.equal(value, second.state[other][key]), key

    def test_in_double_precision(self):
        bank = torch.nn.Parameter(random(2, 12, 4))
        options = replace(TODAY, weights="float32")
        optimizer = Muon([(bank, 3)], MUON, options, lr=0.01, weight_decay=0.0)
        bank.grad = random(2, 12, 4, seed=1)
        optimizer.step()
        assert bank.dtype == torch.float64 and bank.isfinite().all()

    def test_momentum_takes_its_ramps(self, brief, tmp_path):
        run = train(self.today(brief), tmp_path, echo=None)
        last = run.config.steps - 1
        wanted = 0.85 + 0.1 * min(1.0, (run.config.steps - last) / 2)
        assert run.optimizers[1].param_groups[0]["momentum"] == pytest.approx(wanted)

    def test_what_was_trained_can_be_sampled(self, brief, tmp_path):
        from speedrun.sample import main

        train(self.today(brief), tmp_path / "run", echo=None)
        assert main([str(tmp_path / "run"), "--prompt", "def ", "--tokens", "5"]) == 0

    @pytest.mark.parametrize(
        "changes, said",
        [
            ({"muon.weights": "split"}, "computes in float32"),
            ({"muon.beta2": 1.0}, "must be less than 1"),
            ({"muon.low_momentum": -0.1}, "must be at least 0"),
        ],
    )
    def test_refusals(self, changes, said):
        with pytest.raises(Problem, match=said):
            check_config(vary(preset("cpu"), changes))


@pytest.mark.parametrize("halves", [False, True])
def test_runs_that_share_a_process_end_as_they_would_alone(halves, brief, tmp_path):
    """On a GPU, comparisons train one run after the other with one compiled model."""
    from speedrun.lab.runlog import read_metrics, series
    from speedrun.measure.runs import retrain
    from speedrun.train import assemble

    first = TestToday().today(brief) if halves else brief
    second = vary(first, {"matrix.rule": "muon", "muon.weights": "float32", "seed": 3})
    live = assemble(first, tmp_path / "live", echo=None)
    for n, run in enumerate((first, second, first)):
        train(run, tmp_path / f"alone{n}", echo=None)
        alone = series(read_metrics(tmp_path / f"alone{n}" / "metrics.jsonl"), "val")[-1]
        done = retrain(live, run)
        assert done["val_loss"] == alone["val_loss"] and done["skipped"] == 0


def test_weights_that_mix_are_told_over_the_run(brief, tmp_path):
    from speedrun.measure.runs import retrain
    from speedrun.train import assemble

    run = vary(brief, {"plan.x0": True, "plan.backout": True, "plan.residual": 1.5})
    live = assemble(run, tmp_path, echo=None)
    told = retrain(live, run)["learned"]
    assert set(told) == {"stream_weight", "x0_weight", "backout_weight"}
    assert told["stream_weight"][0] == [0, [1.5] * run.model.layers]
    step, last = told["x0_weight"][-1]
    assert step == run.steps and last == live.model.x0_weight.tolist() != [0.0] * run.model.layers


class TestTwoOptimizers:
    def test_adamw_with_a_rate_of_its_own_is_adamw(self, brief, tmp_path):
        """The same rate said twice, in two optimizers, trains the same bits as one optimizer."""
        one = train(brief, tmp_path / "one", echo=None)
        twice = train(vary(brief, {"matrix.lr": brief.optim.lr}), tmp_path / "two", echo=None)
        assert len(one.optimizers) == 1 and len(twice.optimizers) == 2
        for (name, a), (_, b) in zip(one.model.named_parameters(), twice.model.named_parameters()):
            assert torch.equal(a, b), name

    def test_rates_keep_their_ratio_through_the_schedule(self, brief, tmp_path):
        run = train(vary(brief, {"matrix.rule": "muon", "matrix.lr": 0.02}), tmp_path, echo=None)
        first, second = (optimizer.param_groups[0]["lr"] for optimizer in run.optimizers)
        assert second / first == pytest.approx(0.02 / brief.optim.lr)
        assert (
            make_optimizers(brief, run.model, run.model.decays())[0].param_groups[0]["lr"] > first
        )


@pytest.mark.slow
def test_the_three_winners_keep_their_order_for_sixty_steps(tmp_path, embedded):
    from speedrun.lab.runlog import read_metrics, series
    from speedrun.measure.newton_schulz import grid, losses_of_grid, short, winners

    brief, losses = {"steps": 60, "optim.warmup_steps": 10, "val_every": 60}, {}
    for rule, run in winners(losses_of_grid(), grid(short())).items():
        train(vary(run, brief | {"val_tokens": 32_768}), tmp_path / rule, echo=None)
        losses[rule] = series(read_metrics(tmp_path / rule / "metrics.jsonl"), "val")[-1][
            "val_loss"
        ]
    assert losses["muon"] < losses["soap"] < losses["adamw"], losses
