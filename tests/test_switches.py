"""Every technique of the model, off and on: against a model written with loops, in one graph, and in training."""

import dataclasses

import pytest
import torch
from reference_gpt import angle_of, reference
from torch.nn.functional import cross_entropy

from speedrun.command import TrainCommand
from speedrun.config import Config, check_config, fields_of, vary
from speedrun.cpu_size import at_cpu_size
from speedrun.kernels.fp8 import quantize_reference, scale_of
from speedrun.kernels.head_reference import head_loss_by_hand
from speedrun.kernels.loss import choose_candidates, head_loss_op
from speedrun.lab.errors import UserError
from speedrun.lab.metrics import read_metrics, series
from speedrun.model.embedding import EmbeddingConfig
from speedrun.model.gpt import GPT, GPTConfig, param_specs
from speedrun.model.head import HeadConfig
from speedrun.model.layout import LayoutConfig
from speedrun.model.mlp import BlockConfig
from speedrun.model.rotary import RotaryConfig
from speedrun.presets import as_arguments, preset, read_command
from speedrun.schedule import Stage
from speedrun.train import build_run, train, train_step

SHAPE = GPTConfig(num_layers=4, num_heads=2, model_dim=16, max_seq_len=8)
ON = {
    "model.block.norm": "rms",
    "model.block.biases": False,
    "model.block.qk_norm": True,
    "model.block.activation": "relu2",
    "model.block.zero_init_proj": True,
    "model.block.fan_in_init": True,
    "model.block.fp8": True,
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
WAYS["model.block.fp8"] |= {"model.block.norm": "rms", "model.block.biases": False, "model.block.activation": "relu2"}  # fmt: skip
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
        model.fp8 = False  # rounding to eight bits has tests of its own
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
        brief = {"log_every": 19, "val_tokens": 4096}
        if way != "all":  # which learns less, and hardly where there is little
            brief |= {"data.batch_tokens": 256, "model.model_dim": 64, "model.num_heads": 2}
        train(vary(base, WAYS[way] | muon | brief), tmp_path, echo=None)
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


EIGHT_BITS = {"model.head.fp8": True, "model.head.tie": "untied", "model.head.softcap": "sigmoid23"}
SOME = {"schedule.stages": (Stage(candidates=32),)}


def eight_bit_model() -> tuple[GPT, torch.Tensor, torch.Tensor]:
    """A small model with 288 words and an FP8 head, no weight of it zero, and two rows of 8 tokens with their targets."""
    model = GPT(config_with(EIGHT_BITS | {"model.head.std": 0.3}), 288)
    tokens = torch.randint(288, (2, 9), generator=torch.Generator().manual_seed(2))
    return model, tokens[:, :-1], tokens[:, 1:]


class TestAnEightBitHead:
    """model.head.fp8, and softmaxes over some of the words: Stage.candidates."""

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"model.head.tie": "tied"}, "fp8 with model.head.tie=tied and .*=sigmoid23"),
            ({"model.head.softcap": "none"}, "tie=untied and model.head.softcap=none"),
            ({"model.head.softcap": "sigmoid30"}, "tie=untied and model.head.softcap=sigmoid30"),
            ({"model.head.fp8": False} | SOME, "candidates, and no model.head.fp8"),
            ({"schedule.stages": (Stage(candidates=40),)}, "candidates of 40: .* multiple of 16"),
            ({"schedule.stages": (Stage(candidates=1),)}, "candidates of 1: .* multiple of 16"),
            ({"schedule.stages": (Stage(candidates=-16),)}, "stages.0.candidates=-16 .* must be"),
            ({"schedule.stages": (Stage(candidates=2**25),)}, "stages.0.candidates=.* must be"),
        ],
    )
    def test_what_the_kernel_is_not_made_for_is_refused(self, changes, words):
        with pytest.raises(UserError, match=words):
            check_config(vary(preset("cpu_gpt2"), EIGHT_BITS | changes))

    @pytest.mark.parametrize("tie", ["untied", "until_step"])
    def test_what_it_is_made_for_is_not(self, tie):
        stages = (Stage(0.5, candidates=16), Stage(0.25, candidates=4096), Stage(0.25))
        run = vary(preset("cpu_gpt2"), EIGHT_BITS | {"model.head.tie": tie, "schedule.stages": stages})  # fmt: skip
        assert check_config(run) is run

    def test_the_advice_can_be_followed(self):
        wrong = vary(preset("cpu_gpt2"), {"model.head.fp8": True})
        with pytest.raises(UserError) as caught:
            check_config(wrong)
        for advice in caught.value.fix.split("; or "):
            flags = [*as_arguments(wrong), *advice.split()]
            check_config(read_command(TrainCommand, flags, "cpu", "x").config)

    @pytest.mark.parametrize("count", [0, 32, 288, 4096])
    def test_it_asks_the_words_that_it_is_told(self, count, monkeypatch):
        """The vectors of the last layer, their gradient, and the head's, against the loss by hand of what e4m3 keeps of both."""
        model, inputs, targets = eight_bit_model()
        asked = {}

        def watched(*told):
            asked.update(zip(("x", "w", "targets", "count"), told))
            told[0].retain_grad()
            return head_loss_op(*told)

        monkeypatch.setattr("speedrun.model.gpt.head_loss_op", watched)
        loss = model(inputs, targets, candidates=torch.tensor([count, 1]))
        (3 * loss).backward()
        assert asked["w"] is model.lm_head and torch.equal(asked["targets"], targets.flatten())
        inside = torch.ones(288, dtype=torch.bool)
        if 0 < count < 288:
            inside = choose_candidates(targets.flatten(), 288, count)[1]
        rounded = [
            quantize_reference(t.detach(), scale_of(t.detach())).float() * scale_of(t.detach())
            for t in (asked["x"], asked["w"])
        ]
        known, dx, dw = head_loss_by_hand(*rounded, targets.flatten(), inside)
        assert torch.equal(loss, known)
        assert torch.equal(asked["x"].grad, 3 * dx) and torch.equal(model.lm_head.grad, 3 * dw)
        lost = model.lm_head.grad.abs().sum(0) == 0
        assert torch.equal(lost, ~inside) or count == 0 or count >= 288

    def test_one_graph_for_any_number_of_words(self):
        """The number is data: a new one, or a new stage, compiles nothing."""
        model, inputs, targets = eight_bit_model()
        graphs = []
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=lambda g, _: graphs.append(g) or g)  # fmt: skip
        for count in (0, 32, 96, 0, 4096):
            few, grads = torch.tensor([count, 1]), []
            for forward in (compiled, model):
                model.zero_grad()
                loss = forward(inputs, targets, candidates=few)
                loss.backward()
                grads.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
            assert all(map(torch.equal, *grads)), count
        assert len(graphs) == 1

    def test_few_words_are_told_apart_more_easily_than_all(self):
        """A softmax over some of the words leaves out terms of the sum; the validation's leaves out none and rounds nothing."""
        model, inputs, targets = eight_bit_model()
        few, many, whole, more = (
            model(inputs, targets, candidates=torch.tensor([count, 1])).item()
            for count in (32, 160, 0, 4096)
        )
        assert few < many - 0.1 < whole - 0.2 and more == whole
        assert whole == pytest.approx(model(inputs, targets).item(), abs=0.01)
        assert whole != model(inputs, targets).item()


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
