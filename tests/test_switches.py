"""Every technique of the model, off and on: against a model written with loops, in one graph, and in training."""

import dataclasses

import pytest
import torch
from reference_gpt import angle_of, reference
from torch.nn.functional import cross_entropy

from speedrun.config import Config, check_config, fields_of, vary
from speedrun.cpu_size import at_cpu_size
from speedrun.lab.errors import UserError
from speedrun.lab.metrics import read_metrics, series
from speedrun.model.embedding import EmbeddingConfig
from speedrun.model.gpt import GPT, GPTConfig, param_specs
from speedrun.model.head import HeadConfig
from speedrun.model.layout import LayoutConfig
from speedrun.model.mlp import BlockConfig
from speedrun.model.rotary import RotaryConfig
from speedrun.presets import preset
from speedrun.train import build_run, train, train_step

SHAPE = GPTConfig(num_layers=4, num_heads=2, model_dim=16, max_seq_len=8)
ON = {
    "model.block.norm": "rms",
    "model.block.biases": False,
    "model.block.qk_norm": True,
    "model.block.activation": "relu2",
    "model.block.zero_init_proj": True,
    "model.block.fan_in_init": True,
    "model.rotary.pos": "half_rope",
    "model.rotary.base": 1024.0,
    "model.rotary.interleaved": True,
    "model.embedding.norm": True,
    "model.embedding.std": 0.5,
    "model.embedding.lr_mul": 0.5,
    "model.embedding.smear": True,
    "model.embedding.values": "ends",
    "model.embedding.value_residual": "gate",
    "model.embedding.value_std": 0.02,
    "model.embedding.value_lr_mul": 2.0,
    "model.embedding.value_decay": 0.5,
    "model.layout.x0": True,
    "model.layout.resid_lambda_init": 1.1,
    "model.layout.skips": "single_gated",
    "model.layout.backout": True,
    "model.layout.skip_sublayers": "both",
    "model.layout.lr_mul": 0.5,
    "model.head.tie": "untied",
    "model.head.std": 0.01,
    "model.head.lr_mul": 0.5,
    "model.head.pad_vocab_to": 8,
    "model.head.softcap": "sigmoid23",
    "model.head.fp8": True,
}
GROUPS: dict[str, type] = {"block": BlockConfig, "rotary": RotaryConfig, "head": HeadConfig}
GROUPS |= {"embedding": EmbeddingConfig, "layout": LayoutConfig}
TURN = {"model.rotary.pos": "rope"}
WAYS: dict[str, dict] = {"none": {}} | {name: {name: value} for name, value in ON.items()}
WAYS["model.head.fp8"] |= {"model.head.tie": "untied", "model.head.softcap": "sigmoid23"}
WAYS |= {cap: {"model.head.softcap": cap} for cap in ("tanh30", "tanh15", "sigmoid30")}
WAYS |= {kind: {"model.embedding.values": kind} for kind in ("first", "all", "mirror", "outer")}
WAYS |= {mix: {"model.embedding.values": "mirror", "model.embedding.value_residual": mix} for mix in ("lambdas", "gate")}  # fmt: skip
WAYS |= {
    kind: {"model.layout.skips": kind, "model.layout.x0": True}
    for kind in ("unet", "unet_sigmoid", "single")
}
WAYS |= {f"no {part}": {"model.layout.skip_sublayers": part} for part in ("attn", "mlp")}
WAYS |= {"rope": TURN, "interleaved": TURN | {"model.rotary.interleaved": True}, "all": ON}


def config_with(changes: dict) -> GPTConfig:
    """The small model's config with some switches on."""
    return vary(Config(model=SHAPE), changes).model


def model_with(changes: dict) -> GPT:
    """A model with some switches on, and noisy weights, in float64."""
    torch.manual_seed(5)
    model = GPT(config_with(changes), 19).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model.vocab_size = len(model.embed)  # logits of padding as well
    if (rotary := model.config.rotary).pos != "learned":
        half = model.cos.shape[1]
        angles = [
            [angle_of(n, j, half, rotary) for j in range(half)] for n in range(SHAPE.max_seq_len)
        ]
        exact = torch.tensor(angles, dtype=torch.float64)
        assert torch.allclose(model.cos, exact.cos(), atol=1e-6)
        model.cos.copy_(exact.cos())
        model.sin.copy_(exact.sin())
    return model


def test_every_switch_is_tested():
    fields = {
        f"model.{name}.{f.name}" for name, kind in GROUPS.items() for f in dataclasses.fields(kind)
    }
    elsewhere = {"model.layout.stream_dtype"}  # tests/test_attention.py, as all of model.attention
    assert fields - elsewhere == set(ON)
    sizes = {"num_layers", "num_heads", "model_dim", "max_seq_len", "init_std"}
    assert {f.name for f in dataclasses.fields(GPTConfig)} == sizes | set(GROUPS) | {"attention"}


def test_every_switch_is_off_in_the_small_model():
    """So that each way differs from “none” in what it says alone."""
    flat = fields_of(SHAPE, "model.")
    assert [name for name, value in ON.items() if flat[name] == value] == []


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
        other = reference(copies, model.config, inputs, targets)
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
        base = vary(at_cpu_size(preset("cpu_gpt2")), {"data.path": str(embedded), "warmup": 0})
        muon = {"optim.matrices": "muon", "optim.matrix_lr": 0.02, "schedule.warmup_steps": 0}
        train(vary(base, WAYS[way] | muon | {"log_every": 19}), tmp_path, echo=None)
        records = read_metrics(tmp_path / "metrics.jsonl")
        val = [record["val_loss"] for record in series(records, "val")]
        assert val[-1] < val[0] - (0.4 if way == "all" else 0.8), val


class TestWhatIsOffIsNotThere:
    def test_no_parameter_is_left_of_what_is_off(self):
        bare = {name: value for name, value in ON.items() if name.split(".")[1] not in ("embedding", "layout")}  # fmt: skip
        names = {row.name for row in param_specs(config_with(bare), 19)}
        banks = {"attention_qkv", "attention_out", "mlp_up", "mlp_down"}
        assert names == {"embed", "lm_head"} | banks

    def test_a_part_that_a_layer_lacks_has_no_slice(self):
        def sizes(changes):
            return {row.name: row.shape[0] for row in param_specs(config_with(changes), 19)}

        whole, without = sizes({}), sizes({"model.layout.skip_sublayers": "both"})
        parts = ("attention", "mlp")
        assert without == {n: size - (n.split("_")[0] in parts) for n, size in whole.items()}

    def test_a_bank_says_which_layers_have_a_slice(self):
        """The second layer of the later half has no attention, the first no MLP."""
        for row in param_specs(config_with({"model.layout.skip_sublayers": "both"}), 19):
            part = row.name.split("_")[0]
            wanted = {"attention": (0, 1, 2), "mlp": (1, 2, 3)}.get(part, ())
            assert row.layers == wanted and (not wanted or row.shape[0] == 3), row.name

    def test_one_layer_has_nothing_to_connect(self):
        with pytest.raises(UserError, match="model.num_layers is 1"):
            check_config(
                vary(preset("cpu_gpt2"), {"model.num_layers": 1, "model.layout.backout": True})
            )
        check_config(vary(preset("cpu_gpt2"), {"model.num_layers": 1, "model.layout.x0": True}))


CAUTIOUS = {"optim.adam.cautious": True, "optim.adam.every": 2, "optim.grad_clip": 0.0}
CAUTIOUS |= {"optim.adam.weight_decay": 0.005}


class TestUntying:
    @pytest.mark.parametrize("matrices", ["adam", "muon"])
    @pytest.mark.parametrize("cautious", [False, True])
    def test_two_matrices_are_one_until_they_part(self, cautious, matrices, embedded, tmp_path):
        run = vary(
            at_cpu_size(preset("cpu_gpt2"), 12),
            {"data.path": str(embedded), "model.head.tie": "until_step", "schedule.untie_at": 0.5}
            | {"optim.matrices": matrices, "optim.matrix_lr": 0.02, "warmup": 0}
            | (CAUTIOUS if cautious else {}),
        )
        live = build_run(check_config(run), tmp_path, echo=None)
        model, same = live.model, []
        for _ in range(run.steps):
            before = model.lm_head.detach().clone()
            train_step(live)
            same.append(torch.equal(model.embed, model.lm_head.mT))
            assert torch.equal(model.lm_head, before) == (cautious and live.step % 2 == 1)
        # adam's first step in the second half is the eighth if it is every other one
        assert same == [True] * (7 if cautious else 6) + [False] * (5 if cautious else 6)
        assert not live.optimizer.ties.tied

    @pytest.mark.parametrize("share, last", [(0.25, True), (1.0, False)])
    def test_when_they_part_is_a_share_of_the_steps(self, share, last, embedded, tmp_path):
        changes = {"data.path": str(embedded), "model.head.tie": "until_step", "warmup": 0}
        run = vary(at_cpu_size(preset("cpu_gpt2"), 8), changes | {"schedule.untie_at": share})
        live = build_run(run, tmp_path, echo=None)
        apart = []
        for _ in range(run.steps):
            train_step(live)
            apart.append(not live.optimizer.ties.tied)
        assert apart == [step >= share * run.steps for step in range(run.steps)]
        assert apart[-1] == last


RATES: dict = {
    "model.head.tie": "untied",
    "model.head.std": 0.01,
    "model.head.lr_mul": 0.25,
    "model.layout.x0": True,
    "model.layout.lr_mul": 2.0,
    "model.embedding.values": "ends",
    "model.embedding.lr_mul": 0.5,
    "model.embedding.value_lr_mul": 4.0,
    "optim.adam.weight_decay": 0.0,
}


@pytest.mark.parametrize("matrix_lr", [0.0, 0.006])
@pytest.mark.parametrize("cautious", [False, True])
def test_rates_of_their_own(cautious, matrix_lr, embedded, tmp_path):
    """Adam's first step is as long as its rate, whatever the gradient: where there is one."""
    run = vary(at_cpu_size(preset("cpu_gpt2")), {"data.path": str(embedded), "warmup": 0})
    changes = RATES | {"optim.adam.cautious": cautious, "optim.matrix_lr": matrix_lr}
    live = build_run(vary(run, changes), tmp_path, echo=None)
    before = {name: p.detach().clone() for name, p in live.model.named_parameters()}
    train_step(live)
    whole, named = live.schedule.at(0).lr, live.model.named_parameters()
    rates = {name: (p - before[name]).abs().max().item() / whole for name, p in named}
    wanted = dict.fromkeys(rates, 1.0) | {"lm_head": 0.25, "embed": 0.5}
    wanted |= {"value_embeds": 4.0}
    wanted |= dict.fromkeys(("resid_lambdas", "x0_lambdas", "ve_lambdas"), 2.0)
    if matrix_lr:
        ratio = matrix_lr / run.optim.adam.lr
        wanted |= dict.fromkeys(("attention_qkv", "attention_out", "mlp_up", "mlp_down"), ratio)
    assert rates == pytest.approx(wanted, rel=0.01)
