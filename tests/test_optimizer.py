"""One optimizer for all ranks: against itself on 1, 2 and 4 ranks, against chapter 13's Muon, AdamW, and bad input."""

import math
from dataclasses import replace

import optimizer_ranks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_ranks import RATES, SCATTER, TABLE, WORK, copies, everything, gradient, model

from speedrun.config import TODAY
from speedrun.optim.adam import adam_step
from speedrun.optim.distributed import Replicated, Sharded, bytes_sent
from speedrun.optim.muon import Muon, MuonOptions, join, polar_express, split, through_gram
from speedrun.optim.newton_schulz import MatrixOptions, through
from speedrun.optim.optimizer import (
    BankOptimizer,
    Entry,
    Numbers,
    OptimizerOptions,
    blame,
    load_state,
    state_tensors,
    warm_up,
)


@pytest.fixture(scope="module")
def on(tmp_path_factory):
    """Runs a scenario on some ranks, once, and says what was left; saved: another run's file to go on from."""
    return optimizer_ranks.starter(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("world", [2, 4])
class TestRanks:
    def test_sums_of_integers_lead_to_the_same_bits(self, on, world):
        alone, shared = everything(on("integers", 1)), everything(on("integers", world))
        assert list(alone) == list(shared)
        assert [name for name in alone if not torch.equal(alone[name], shared[name])] == []

    def test_real_gradients_lead_to_the_same_step(self, on, world):
        alone, shared = on("float32", 1), on("float32", world)
        for name, start in alone["start"].items():
            step = alone["parameters"][name] - start
            apart = shared["parameters"][name] - alone["parameters"][name]
            assert step.norm() > 0 and apart.norm() <= 1e-3 * step.norm(), name

    def test_sums_in_bfloat16_differ_by_its_rounding(self, on, world):
        alone, shared = on("normal", 1), on("normal", world)
        for name in ("qk", "mlp"):
            momentum = alone["state"][f"{name}/momentum"]
            apart = shared["state"][f"{name}/momentum"] - momentum
            assert apart.norm() < 2**-7 * momentum.norm(), name

    def test_it_goes_on_from_the_state_of_another_number_of_ranks(self, on, world):
        whole = everything(on("integers", world))
        for other, step in ((1, 4), (2, 5), (4, 5)):  # before 5 tables have a gradient that waits
            resumed = everything(on("integers", other, saved=("integers", world, step)))
            assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []

    def test_one_nan_on_the_last_rank_stops_all_and_has_a_name(self, on, world):
        result = on("integers-nan", world)
        before, now = everything(result["at"][5]), everything(result)
        moved = [name for name, tensor in now.items() if not torch.equal(tensor, before[name])]
        assert moved == ["optimizer/pending"] and result["blame"] == ["values"]

    def test_a_rank_that_announces_nothing_stops_all(self, on, world):
        with pytest.raises(AssertionError, match="announce.. was not called"):
            on("integers-silent", world)


class TestOneRank:
    def test_gradients_are_cleared_when_used(self, on):
        assert set(on("integers", 1)["left"].values()) == {0.0}
        assert set(on("integers", 4)["left"].values()) == {0.0}

    @pytest.mark.parametrize(
        "change", [{}, {"weights": "float32"}, {"decay": "plain", "beta2": 0.0}]
    )
    def test_a_bank_moves_as_under_chapter_13s_muon(self, change):
        options = replace(TODAY, **change)
        start = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0))
        theirs, ours = (torch.nn.Parameter(start.clone()) for _ in range(2))
        reference = Muon([(theirs, 1)], MatrixOptions(momentum=0.9), options, 0.02, 0.1)
        factor = reference.param_groups[0]["factor"]
        table = [Entry("bank", "muon", "sharded", rate=factor)]
        own = BankOptimizer({"bank": ours}, table, OptimizerOptions(muon=options))
        for step in range(5):
            g = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(step))
            theirs.grad = g.to(theirs.dtype)
            ours.grad += g.to(ours.dtype)
            reference.step()
            plain = 0.1 / factor  # decoupled from the factor in chapter 12
            own.step(step, RATES | {"muon_decay": plain})
        lost = {} if options.weights == "float32" else reference.state[theirs]
        whole = [theirs.detach(), own.parts["bank"].own]
        if lost:
            whole = [join(whole[0], lost["lost"]), join(whole[1], own.parts["bank"].state["lost"])]
        moved, apart = (whole[0] - start).norm(), (whole[0] - whole[1]).norm()
        assert moved > 0.1 and apart < 1e-3 * moved, (moved, apart)

    def test_adam_is_pytorchs_where_nothing_decays(self):
        start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        theirs, ours = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
        reference = torch.optim.Adam([theirs], lr=0.008 * 3, betas=(0.75, 0.95), eps=1e-10)
        table = [Entry("p", "adam", "sharded", rate=3.0, decay=0.0, betas=(0.75, 0.95))]
        own = BankOptimizer({"p": ours}, table, OptimizerOptions(adam_every=1))
        for step in range(5):
            theirs.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            ours.grad += theirs.grad
            reference.step()
            own.step(step, RATES)
        assert torch.allclose(theirs, ours, atol=1e-6)

    def test_every_other_step_adam_takes_the_sum_of_two_gradients(self):
        once, twice = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2))
        table = [Entry("p", "adam", "sharded")]
        first = BankOptimizer({"p": once}, table, OptimizerOptions(adam_every=1))
        second = BankOptimizer({"p": twice}, table, OptimizerOptions(adam_every=2))
        once.grad += 3.0
        first.step(0, RATES)
        for step, g in enumerate((1.0, 2.0)):
            before = twice.detach().clone()
            twice.grad += g
            second.step(step, RATES)
            assert torch.equal(before, twice) == (step == 0)
        assert torch.equal(once, twice)

    def test_replicated_and_sharded_adam_agree(self):
        start = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        for comm in ("sharded", "replicated"):
            parameters = {name: torch.nn.Parameter(start.clone()) for name in "ab"}
            table = [
                Entry("a", "adam", comm, rate=5.0, decay=2.0, betas=(0.5, 0.99)),
                Entry("b", "adam", comm, betas=(0.9, 0.95)),
            ]
            optimizer = BankOptimizer(parameters, table, OptimizerOptions(adam_every=1))
            for step in range(4):
                for n, p in enumerate(parameters.values()):
                    p.grad += torch.randn(
                        5, 3, generator=torch.Generator().manual_seed(9 * n + step)
                    )
                optimizer.step(step, RATES)
            if comm == "sharded":
                wanted = {name: p.detach().clone() for name, p in parameters.items()}
        for name, p in parameters.items():
            assert torch.allclose(p, wanted[name], atol=1e-7)

    def test_autograd_writes_into_the_storage(self):
        p = torch.nn.Parameter(torch.ones(3, 4, 2))
        optimizer = BankOptimizer({"p": p}, [Entry("p", "muon", "sharded")])
        (p * 2).sum().backward()
        assert torch.equal(optimizer.parts["p"].grads, torch.full((3, 4, 2), 2.0))
        optimizer.step(0, RATES)
        assert p.data_ptr() == optimizer.parts["p"].whole.data_ptr() and not p.grad.any()


class TestOverlap:
    def test_one_transfer_after_the_other_is_no_other_result(self, on):
        overlapped, in_turn = on("record-lanes", 2), on("record-in-turn", 2)
        assert overlapped["hashes"] == in_turn["hashes"]
        assert set(overlapped["left"].values()) == {0.0}


class TestRefusals:
    def test_what_muon_updates_is_not_tied(self):
        banks = {name: torch.nn.Parameter(torch.ones(4, 4, 4)) for name in "ab"}
        table = (Entry("a", "muon", "sharded"), Entry("b", "adam", "sharded", tied="a"))
        with pytest.raises(ValueError, match="b and a: what is tied has to be adam's"):
            BankOptimizer(banks, table)

    def build(self, table=TABLE, **orders):
        return BankOptimizer(model(), table, OptimizerOptions(muon=TODAY), **orders)

    @pytest.mark.parametrize(
        "table, said",
        [
            (TABLE[:-1], "missing: scalars"),
            ((*TABLE, TABLE[0]), "twice: qk"),
            ((*TABLE, Entry("other", "adam", "sharded")), "not in the model: other"),
            ((replace(TABLE[0], matrices=5), *TABLE[1:]), "16|rows are not 5 matrices"),
            ((replace(TABLE[0], comm="replicated"), *TABLE[1:]), "muon updates banks"),
            ((*TABLE[:3], replace(TABLE[3], tied="qk"), *TABLE[4:]), "transposed shape"),
        ],
    )
    def test_a_table_that_does_not_fit(self, table, said):
        with pytest.raises(ValueError, match=said):
            self.build(table)

    @pytest.mark.parametrize("what", ["scatter_order", "work_order"])
    def test_an_order_that_is_none(self, what):
        order = SCATTER if what == "scatter_order" else WORK
        for wrong, said in (
            (order[1:], f"missing: {order[0]}"),
            ((*order, "qk"), "twice: qk"),
            ((*order[1:], "scalars"), "not in the table: scalars"),
        ):
            with pytest.raises(ValueError, match=f"{what}.*{said}"):
                self.build(**{what: wrong})

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_gradient_that_is_none(self, value):
        optimizer = self.build()
        state = state_tensors(optimizer)
        assert torch.equal(optimizer.parameters["head"], optimizer.parameters["embed"].mT)
        before = {name: p.detach().clone() for name, p in optimizer.parameters.items()}
        for p in optimizer.parameters.values():
            p.grad += 1.0
        optimizer.parts["bigram"].announce(torch.arange(61))
        optimizer.parameters["mlp"].grad[4, 3, 1] = value
        optimizer.step(1, RATES)
        assert blame(optimizer) == ["mlp"]
        for name, p in optimizer.parameters.items():
            assert torch.equal(p, before[name]), name
        after = state_tensors(optimizer)
        assert all(torch.equal(state[label], after[label]) for label in state)

    @pytest.mark.parametrize("broken", [0, 1, 3])
    @pytest.mark.parametrize("every", [1, 2])
    def test_a_step_that_is_left_out_is_as_if_its_batches_had_never_come(self, every, broken):
        """A step of all rules; or a pair, by adam alone: in the first of its steps muon would move, and rightly."""
        table = [row for row in TABLE if every == 1 or row.rule == "adam"]

        def trained(turns) -> dict:
            parameters = {row.name: model()[row.name] for row in table}
            optimizer = BankOptimizer(
                parameters, table, OptimizerOptions(muon=TODAY, adam_every=every)
            )
            for index in (every * turn + n for turn in turns for n in range(every)):
                for name, p in parameters.items():
                    p.grad += gradient(name, index, 0, "normal").to(p)
                optimizer.parts["bigram"].announce(torch.arange(61))
                if index == every * broken + every - 1:
                    parameters["values"].grad[3, 2] = math.nan
                ramp = {"momentum": 0.85 + 0.01 * index}  # it goes by the number of the step
                optimizer.step(index, RATES | ramp)
            return copies(parameters) | state_tensors(optimizer)

        left_out, never = trained(range(6)), trained([n for n in range(6) if n != broken])
        assert [name for name in never if not torch.equal(left_out[name], never[name])] == []
        assert left_out["optimizer/updates"] == 5 and all(
            t.isfinite().all() for t in never.values()
        )

    @pytest.mark.parametrize("beta", [0.5, 0.75, 0.9, 0.95, 0.99])
    def test_adams_corrections_are_those_of_python_to_the_bit(self, beta):
        numbers = Numbers(("rate",), torch.device("cpu"), (beta, 0.0, beta))
        for t in range(3000):
            numbers.fix(torch.tensor(float(t), dtype=torch.float64))
            wanted = 1 - beta ** max(1, t)
            assert torch.equal(numbers.vector, torch.tensor([0.0, wanted, 1.0, wanted])), t

    @pytest.mark.parametrize("what", ["gradient", "value"])
    def test_a_tensor_that_is_somewhere_else(self, what):
        optimizer = self.build()
        if what == "gradient":
            optimizer.parameters["qk"].grad = None  # what zero_grad() does
        else:
            optimizer.parameters["qk"].data = optimizer.parameters["qk"].data.clone()
        with pytest.raises(RuntimeError, match=f"the {what} of qk .* leave zero_grad"):
            optimizer.step(0, RATES)

    def test_a_rate_that_nobody_knows(self):
        with pytest.raises(ValueError, match="rates: not in what a step is told: muon_dekay"):
            self.build().step(0, RATES | {"muon_dekay": 0.1})
        with pytest.raises(ValueError, match="rates: missing: adam"):
            self.build().step(0, {"muon": 0.1, "momentum": 0.9})

    def test_rows_that_nobody_announced(self):
        optimizer = self.build()
        optimizer.step(0, RATES)
        with pytest.raises(RuntimeError, match="announce"):
            optimizer.step(1, RATES)

    def test_a_state_in_the_middle_of_a_pair_of_steps_holds_what_waits(self):
        optimizer, again = self.build(), self.build()
        for p in optimizer.parameters.values():
            p.grad += 1.0
        optimizer.step(0, RATES)
        saved = state_tensors(optimizer)
        assert torch.equal(saved["values/waiting"], torch.ones(37, 6, dtype=torch.bfloat16))
        assert "qk/waiting" not in saved and saved["optimizer/updates"] == 0
        load_state(again, saved)
        assert all(torch.equal(t, saved[label]) for label, t in state_tensors(again).items())
        optimizer.parts["bigram"].announce(torch.arange(61))
        optimizer.step(1, RATES)
        load_state(again, state_tensors(optimizer))  # nothing waits any more
        assert not again.pending and not again.parameters["values"].grad.any()

    def test_warming_up_changes_nothing_and_needs_the_guard(self):
        optimizer = self.build()
        before, state = copies(optimizer.parameters), state_tensors(optimizer)
        for p in optimizer.parameters.values():
            p.grad += 1.0
        warm_up(optimizer)
        assert all(torch.equal(p, before[name]) for name, p in optimizer.parameters.items())
        assert all(torch.equal(t, state[label]) for label, t in state_tensors(optimizer).items())
        alone = BankOptimizer(model(), TABLE, OptimizerOptions(muon=TODAY, guard=False))
        with pytest.raises(ValueError, match="guard"):
            warm_up(alone)

    def test_a_state_of_something_else(self):
        optimizer = self.build()
        saved = state_tensors(optimizer)
        for change, said in (
            ({}, "missing: mlp/second"),
            ({"mlp/second": torch.ones(4, 24, 1)}, "mlp/second: saved as"),
        ):
            other = {label: tensor for label, tensor in saved.items() if label != "mlp/second"}
            other["qk/momentum"] = torch.ones(6, 8, 12)
            with pytest.raises(ValueError, match=said):
                load_state(optimizer, other | change)
        assert not optimizer.parts["qk"].state["momentum"].any(), "nothing was taken"


class TestBytes:
    def test_a_rank_alone_sends_nothing(self):
        assert (
            bytes_sent("sharded", 1000, 2, 1) == bytes_sent("sparse", 1000, 2, 1, 10, 5) == (0, 0)
        )

    def test_each_kind_by_its_formula(self):
        assert bytes_sent("sharded", 1000, 2, 4) == (1500, 1500)
        assert bytes_sent("replicated", 1000, 2, 4) == (3000, 0)
        assert bytes_sent("sparse", 1000, 2, 4, rows=100, width=5) == (1350, 1500)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 30), st.integers(1, 4))
    def test_shares_are_even_and_padding_is_zero(self, units, cols):
        p = torch.nn.Parameter(torch.ones(units, cols))
        part = Sharded(p, (cols,))
        assert part.units == units and part.padded(p.data).shape == part.whole.shape
        assert torch.equal(part.collect(part.own), torch.ones(units, cols))


class TestMuonsParts:
    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50))
    def test_split_and_join_keep_every_bit(self, bits):
        whole = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
        assert torch.equal(join(*split(whole)).view(torch.int32), whole.view(torch.int32))

    @settings(max_examples=25, deadline=None)
    @given(st.integers(2, 12), st.integers(2, 40), st.integers(0, 5), st.integers(1, 7))
    def test_by_way_of_the_gram_matrix_it_is_the_same_map(self, rows, cols, restart, count):
        g = torch.randn(
            2, rows, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        g = g / torch.linalg.matrix_norm(g, keepdim=True)
        polynomials = [(3.4445, -4.7750, 2.0315)] * count
        wanted = through(g, polynomials)
        assert torch.allclose(through_gram(g, polynomials, restart), wanted, atol=1e-6)

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
        assert (
            p.tolist() == [1.0] * 3 and mean.tolist() == [0.5] * 3 and square.tolist() == [2.0] * 3
        )


def test_small_parameters_begin_at_multiples_of_16_bytes():
    tensors = {
        name: torch.nn.Parameter(torch.ones(size).bfloat16())
        for name, size in zip("abc", (7, 64, 1))
    }
    part = Replicated(tensors)
    assert all(p.data_ptr() % 16 == part.own.data_ptr() % 16 for p in tensors.values())
    assert part.own.sum() == 72 and [part.slices[n].start for n in "abc"] == [0, 8, 72]


def test_the_defaults_of_muon_are_record_4s():
    assert MuonOptions().polynomials == "quintic" and MuonOptions().weights == "float32"
