"""Every technique of the model, off and on: against a model written with loops, in one graph, and in training."""

import dataclasses

import pytest
import torch
from reference_gpt import angle_of, reference
from torch.nn.functional import cross_entropy

from speedrun.config import at_cpu_size, check_config, preset, switches_of, vary
from speedrun.lab.errors import Problem
from speedrun.lab.runlog import read_metrics, series
from speedrun.model.embedding import EmbeddingOptions
from speedrun.model.gpt import GPT, GPTOptions, Switches, parameter_table
from speedrun.model.head import HeadOptions
from speedrun.model.mlp import BlockOptions
from speedrun.model.plan import PlanOptions
from speedrun.model.rotary import RotaryOptions
from speedrun.train import assemble, train, train_step

SHAPE = GPTOptions(layers=4, heads=2, width=16, context=8)
ON = {
    "block.norm": "rms",
    "block.biases": False,
    "block.qk_norm": True,
    "block.activation": "relu2",
    "block.zero_out": True,
    "block.fan_in": True,
    "rotary.positions": "half",
    "rotary.base": 1024.0,
    "rotary.pairs": "neighbours",
    "embedding.norm": True,
    "embedding.std": 0.5,
    "embedding.rate": 0.5,
    "embedding.smear": True,
    "embedding.values": "ends",
    "embedding.value_mix": "gates",
    "embedding.value_std": 0.02,
    "embedding.value_rate": 2.0,
    "plan.x0": True,
    "plan.residual": 1.1,
    "plan.skips": "gated",
    "plan.backout": True,
    "plan.without": "both",
    "plan.rate": 0.5,
    "head.tied": "untied",
    "head.std": 0.01,
    "head.rate": 0.5,
    "head.multiple": 8,
    "head.cap": "sigmoid23",
}
ALSO = {"head.split_at"}  # in TestTheSplitHead
GROUPS: dict[str, type] = {"block": BlockOptions, "rotary": RotaryOptions, "head": HeadOptions}
GROUPS |= {"embedding": EmbeddingOptions, "plan": PlanOptions}
TURN = {"rotary.positions": "rotary"}
WAYS: dict[str, dict] = {"none": {}} | {name: {name: value} for name, value in ON.items()}
WAYS |= {cap: {"head.cap": cap} for cap in ("tanh30", "tanh15", "sigmoid30")}
WAYS |= {kind: {"embedding.values": kind} for kind in ("first", "all", "mirror", "outer")}
WAYS |= {mix: {"embedding.values": "mirror", "embedding.value_mix": mix} for mix in ("free", "gates")}  # fmt: skip
WAYS |= {kind: {"plan.skips": kind, "plan.x0": True} for kind in ("unet", "sigmoid", "one")}
WAYS |= {f"no {part}": {"plan.without": part} for part in ("attention", "mlp")}
WAYS |= {"rotary": TURN, "neighbours": TURN | {"rotary.pairs": "neighbours"}, "all": ON}


def model_with(changes: dict, shape: GPTOptions = SHAPE) -> GPT:
    """A model with some switches on, and noisy weights, in float64."""
    torch.manual_seed(5)
    model = GPT(shape, 19, switches=switches_of(vary(preset("record"), changes))).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model.vocab_size = len(model.token_embedding)  # logits of padding as well
    if (rotary := model.switches.rotary).positions != "learned":
        half = model.cos.shape[1]
        angles = [[angle_of(n, j, half, rotary) for j in range(half)] for n in range(shape.context)]
        exact = torch.tensor(angles, dtype=torch.float64)
        assert torch.allclose(model.cos, exact.cos(), atol=1e-6)
        model.cos.copy_(exact.cos())
        model.sin.copy_(exact.sin())
    return model


def test_every_switch_is_tested():
    fields = {f"{name}.{f.name}" for name, kind in GROUPS.items() for f in dataclasses.fields(kind)}
    assert fields == set(ON) | ALSO and set(GROUPS) == {
        f.name for f in dataclasses.fields(Switches)
    }


@pytest.mark.parametrize("way", WAYS)
class TestEverySwitch:
    def test_loss_and_gradients_are_those_of_loops(self, way):
        model = model_with(WAYS[way])
        tokens = torch.randint(19, (2, 8), generator=torch.Generator().manual_seed(2))
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        assert model(inputs, targets).item() == pytest.approx(loss.item(), abs=1e-6), "in float32"
        copies = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        other = reference(copies, SHAPE, model.switches, inputs, targets)
        other.backward()
        assert loss.item() == pytest.approx(other.item(), abs=1e-12)
        for name, p in model.named_parameters():
            assert torch.allclose(p.grad, copies[name].grad, rtol=1e-9, atol=1e-12), name

    def test_it_is_one_graph(self, way):
        model = model_with(WAYS[way])
        tokens = torch.randint(19, (2, 8))
        torch._dynamo.reset()  # it keeps eight versions of a function at most
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(tokens[:, :-1], tokens[:, 1:]), model(tokens[:, :-1], tokens[:, 1:]))  # fmt: skip

    def test_it_learns(self, way, embedded, tmp_path):
        base = vary(at_cpu_size(preset("cpu")), {"data.path": str(embedded), "warmup": 0})
        muon = {"matrix.rule": "muon", "matrix.lr": 0.02, "optim.warmup_steps": 0}
        train(vary(base, WAYS[way] | muon | {"log_every": 19}), tmp_path, echo=None)
        records = read_metrics(tmp_path / "metrics.jsonl")
        val = [record["val_loss"] for record in series(records, "val")]
        assert val[-1] < val[0] - (0.4 if way == "all" else 0.8), val


class TestWhatIsOffIsNotThere:
    def test_no_parameter_is_left_of_what_is_off(self):
        bare = {name: value for name, value in ON.items() if name.split(".")[0] not in ("embedding", "plan")}  # fmt: skip
        names = {row.name for row in parameter_table(SHAPE, 19, switches_of(vary(preset("record"), bare)))}  # fmt: skip
        banks = {"attention_qkv", "attention_out", "mlp_up", "mlp_down"}
        assert names == {"token_embedding", "head"} | banks

    def test_a_part_that_a_layer_lacks_has_no_slice(self):
        def sizes(changes):
            table = parameter_table(SHAPE, 19, switches_of(vary(preset("record"), changes)))
            return {row.name: row.shape[0] for row in table}

        whole, without = sizes({}), sizes({"plan.without": "both"})
        parts = ("attention", "mlp")
        assert without == {n: size - (n.split("_")[0] in parts) for n, size in whole.items()}

    def test_one_layer_has_nothing_to_connect(self):
        with pytest.raises(Problem, match="model.layers is 1"):
            check_config(vary(preset("cpu"), {"model.layers": 1, "plan.backout": True}))
        check_config(vary(preset("cpu"), {"model.layers": 1, "plan.x0": True}))


class TestTheSplitHead:
    def test_two_matrices_are_one_until_they_part(self, embedded, tmp_path):
        run = vary(
            at_cpu_size(preset("cpu"), 12),
            {"data.path": str(embedded), "head.tied": "split", "head.split_at": 0.5}
            | {"matrix.rule": "muon", "matrix.lr": 0.02, "sharing.on": True, "warmup": 0},
        )
        live = assemble(run, tmp_path, echo=None)
        model, same = live.model, []
        for _ in range(run.steps):
            train_step(live)
            same.append(torch.equal(model.token_embedding, model.head.mT))
        assert (
            same == [True] * 7 + [False] * 5
        )  # adam's first step in the second half is the eighth
        assert not live.optimizers[0].tied

    def test_it_needs_the_optimizer_that_unties(self):
        with pytest.raises(Problem, match="kept equal by the optimizer"):
            check_config(vary(preset("small"), {"head.tied": "split"}))


def test_rates_of_their_own(embedded, tmp_path):
    run = vary(at_cpu_size(preset("cpu")), {"data.path": str(embedded), "warmup": 0})
    own: dict = {"head.tied": "untied", "head.rate": 0.25, "plan.x0": True, "plan.rate": 2.0}
    own |= {"embedding.values": "ends", "embedding.rate": 0.5, "embedding.value_rate": 4.0}
    live = assemble(vary(run, own), tmp_path, echo=None)
    for _ in range(3):
        train_step(live)
    (adamw,) = live.optimizers
    names = {id(p): name for name, p in live.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in adamw.param_groups for p in group["params"]}
    whole = rates["mlp_up"]
    assert whole > 0 and rates["head"] == 0.25 * whole and rates["token_embedding"] == 0.5 * whole
    assert rates["value_embedding"] == 4 * whole
    mixing = ("stream_weight", "x0_weight", "value_mix")
    assert {rates[name] for name in mixing} == {2 * whole}
