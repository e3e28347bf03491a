"""The two models against each other, against Hugging Face's GPT-2, and against formulas."""

import math
import zlib
from dataclasses import replace

import pytest
import torch

from speedrun.model.baseline import GPT2, decay_groups, parameter_count
from speedrun.model.gpt import GPT, GPTConfig, check_heads, flops_per_token, param_specs
from speedrun.model.init import init_parameter
from speedrun.model.rotary import RotaryConfig
from speedrun.optim.adam import AdamConfig
from speedrun.optim.optimizer import MuonAdam
from speedrun.optim.state import OptimConfig, assign_optimizers
from speedrun.params import ParamSpec
from speedrun.schedule import StepSettings

SHAPES = [
    GPTConfig(num_layers=1, num_heads=1, model_dim=8, max_seq_len=4),
    GPTConfig(num_layers=3, num_heads=4, model_dim=48, max_seq_len=33),
    GPTConfig(num_layers=5, num_heads=2, model_dim=32, max_seq_len=16),
]
BANKS = {
    "attention_norm_gain": "norm_1.weight",
    "attention_norm_bias": "norm_1.bias",
    "attention_qkv": "attention.qkv.weight",
    "attention_qkv_bias": "attention.qkv.bias",
    "attention_out": "attention.out.weight",
    "attention_out_bias": "attention.out.bias",
    "mlp_norm_gain": "norm_2.weight",
    "mlp_norm_bias": "norm_2.bias",
    "mlp_up": "mlp.up.weight",
    "mlp_up_bias": "mlp.up.bias",
    "mlp_down": "mlp.down.weight",
    "mlp_down_bias": "mlp.down.bias",
}
OTHERS = {
    "embed": "tokens.weight",
    "pos_embed": "positions.weight",
    "final_norm_gain": "norm.weight",
    "final_norm_bias": "norm.bias",
}


def banked_names(plain: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """The plain model's tensors as the package's: each layer's in banks."""
    found = {name: plain[other] for name, other in OTHERS.items()}
    for name, other in BANKS.items():
        found[name] = torch.stack([plain[f"blocks.{layer}.{other}"] for layer in range(layers)])
    return found


def both(config: GPTConfig, vocab: int = 61) -> tuple[GPT2, GPT]:
    """The plain and the banked model with the same noisy weights, in float64."""
    torch.manual_seed(3)
    plain = GPT2(config, vocab).double()
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.3 * torch.randn_like(p))
    banked = GPT(config, vocab).double()
    banked.load_state_dict(banked_names(plain.state_dict(), config.num_layers))
    return plain, banked


def optimizer_of(model: GPT, config: OptimConfig) -> MuonAdam:
    """The package's optimizer of a model."""
    specs = assign_optimizers(model.specs, config)
    return MuonAdam(dict(model.named_parameters()), specs, config, compile=False)


@pytest.mark.parametrize("config", SHAPES)
class TestBankedModel:
    def test_loss_and_every_gradient_equal_the_baselines(self, config):
        plain, banked = both(config)
        tokens = torch.randint(61, (3, config.max_seq_len + 1))
        losses = [model(tokens[:, :-1], tokens[:, 1:]) for model in (plain, banked)]
        for loss in losses:
            loss.backward()
        assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-12)
        grads = {name: p.grad for name, p in plain.named_parameters()}
        wanted = banked_names(grads, config.num_layers)
        assert set(wanted) == {name for name, _ in banked.named_parameters()}
        for name, p in banked.named_parameters():
            assert torch.allclose(p.grad, wanted[name], rtol=1e-10, atol=1e-13), name

    @pytest.mark.parametrize("clip", [0.0, 1.0])
    def test_ten_optimizer_steps_equal_the_baselines(self, config, clip):
        plain, banked = both(config)
        reference = torch.optim.AdamW(decay_groups(plain), 0.01, (0.9, 0.95), 1e-8, fused=True)
        own = optimizer_of(banked, OptimConfig(AdamConfig(lr=0.01), grad_clip=clip))
        for step in range(10):
            draw = torch.Generator().manual_seed(step)
            tokens = torch.randint(61, (2, config.max_seq_len + 1), generator=draw)
            reference.zero_grad()
            for model in (plain, banked):
                model(tokens[:, :-1], tokens[:, 1:]).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
            reference.step()
            own.step(StepSettings(step, 0.01, 0.01, 0.95))
        wanted = banked_names(plain.state_dict(), config.num_layers)
        for name, p in banked.named_parameters():
            assert torch.allclose(p, wanted[name], rtol=1e-8, atol=1e-10), name

    def test_counts_follow_the_formulas(self, config):
        specs, d = param_specs(config, 61), config.model_dim
        numbers = sum(math.prod(row.shape) for row in specs)
        assert numbers == parameter_count(config, 61)
        assert numbers == sum(p.numel() for p in GPT(config, 61).parameters())
        weights = config.num_layers * 12 * d**2 + 61 * d
        attention = config.num_layers * 12 * 16 * d * 0.5  # the half that causality leaves
        assert flops_per_token(config, 61, 16) == 6.0 * weights + attention

    def test_every_row_says_its_matrices_shape(self, config):
        """What Muon's rate goes by, sqrt(rows / cols) of a tall matrix, is told by the row."""
        for row in param_specs(config, 61):
            if row.matrices:
                rows, cols = row.shape[1] // row.matrices, row.shape[2]
                assert row.shape_scale == math.sqrt(max(1.0, rows / cols)), row.name
            assert row.layers == (tuple(range(config.num_layers)) if row.name in BANKS else ())

    def test_shorter_rows_and_no_targets(self, config):
        model = GPT(config, 61)
        tokens = torch.randint(61, (2, 3))
        assert model(tokens).shape == (2, 3, 61)

    @pytest.mark.parametrize("kind", ["gpt", "baseline"])
    def test_one_graph(self, config, kind):
        model = GPT(config, 61) if kind == "gpt" else GPT2(config, 61)
        torch._dynamo.reset()  # it keeps eight versions of a function at most
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        tokens = torch.randint(61, (2, config.max_seq_len + 1))
        assert torch.allclose(
            compiled(tokens[:, :-1], tokens[:, 1:]), model(tokens[:, :-1], tokens[:, 1:])
        )


@pytest.mark.parametrize(
    "change, said",
    [
        ({"num_heads": 3}, "model_dim 16 is not a multiple of num_heads 3"),
        ({"num_heads": 16, "rotary": RotaryConfig("rope")}, "needs a multiple of 2"),
        ({"num_heads": 8, "rotary": RotaryConfig("half_rope")}, "needs a multiple of 4"),
    ],
)
def test_heads_that_do_not_fit(change, said):
    config = replace(GPTConfig(2, 2, 16, 8), **change)
    for refuse in (check_heads, lambda config: GPT(config, 61)):
        with pytest.raises(ValueError, match=said):
            refuse(config)


class TestInitialValues:
    def test_they_depend_on_seed_and_name_only(self):
        config = GPTConfig(2, 2, 16, 8)
        one, same = GPT(config, 61, seed=5), GPT(config, 61, seed=5)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters()))
        other = GPT(config, 61, seed=6)
        assert not torch.equal(one.mlp_up, other.mlp_up)
        wider = GPT(config, 99, seed=5)
        assert torch.equal(one.mlp_up, wider.mlp_up), "another vocabulary changes embeddings alone"
        assert not torch.equal(one.mlp_up, one.mlp_down.mT * math.sqrt(4)), "nor are two alike"

    @pytest.mark.parametrize("mean", [0.0, 0.5])
    @pytest.mark.parametrize("std", [0.0, 0.018])
    @pytest.mark.parametrize("uniform", [True, False])
    def test_they_are_drawn_in_place_bit_for_bit(self, uniform, std, mean):
        row = ParamSpec("bank", (3, 40, 7), init_mean=mean, init_std=std, init_uniform=uniform)
        for seed in (0, 1):
            seeded = torch.Generator().manual_seed(zlib.crc32(f"{seed}:bank".encode()))
            if uniform:
                draw = 2 * torch.rand(row.shape, generator=seeded) - 1
                wanted = torch.full(row.shape, mean) + math.sqrt(3) * std * draw
            else:
                draw = torch.randn(row.shape, generator=seeded)
                wanted = torch.full(row.shape, mean) + std * draw
            assert torch.equal(init_parameter(row, seed), wanted)

    def test_the_first_loss_is_as_predicted(self):
        config = GPTConfig(num_layers=2, num_heads=2, model_dim=128, max_seq_len=64, init_std=0.05)
        model = GPT(config, 288)
        tokens = torch.randint(288, (64, 65))
        expected = math.log(288) + 0.05**2 * 128 / 2
        assert model(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(expected, abs=0.05)


class TestHuggingFace:
    @pytest.mark.parametrize("layers,heads,width", [(1, 1, 16), (4, 4, 64)])
    def test_logits_and_loss_are_theirs(self, layers, heads, width):
        from transformers import GPT2Config, GPT2LMHeadModel

        off = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0) | {
            "bos_token_id": None,
            "eos_token_id": None,
        }
        config = GPT2Config(
            vocab_size=77, n_positions=32, n_embd=width, n_layer=layers, n_head=heads, **off
        )
        theirs, ours = (
            GPT2LMHeadModel(config).double(),
            GPT2(GPTConfig(layers, heads, width, 32), 77).double(),
        )
        renamed = {
            "wte": "tokens",
            "wpe": "positions",
            "ln_f": "norm",
            "ln_1": "norm_1",
            "ln_2": "norm_2",
        }
        renamed |= {"attn": "attention", "c_attn": "qkv", "c_fc": "up", "h": "blocks"}
        with torch.no_grad():
            for name, weight in theirs.transformer.named_parameters():
                weight.add_(0.3 * torch.randn_like(weight))
                parts = (
                    name.replace("mlp.c_proj", "mlp.down")
                    .replace("attn.c_proj", "attn.out")
                    .split(".")
                )
                mine = ours.get_parameter(".".join(renamed.get(part, part) for part in parts))
                mine.copy_(weight.T if ".c_" in name and weight.ndim == 2 else weight)
        tokens = torch.randint(77, (2, 33))
        assert torch.allclose(ours(tokens[:, :-1]), theirs(tokens[:, :-1]).logits, atol=1e-10)
        row = tokens[:, :-1]
        their_loss = theirs(row, labels=row).loss  # shifts by itself
        assert ours(row[:, :-1], row[:, 1:]).item() == pytest.approx(their_loss.item(), abs=1e-5)


class TestOptimizer:
    def test_only_what_should_decay_decays(self):
        """Matrices and tables, as in the plain model those tensors that have two dimensions."""
        model = GPT(GPTConfig(1, 1, 8, 4), 9)
        optimizer = optimizer_of(model, OptimConfig(AdamConfig(lr=0.1, weight_decay=0.5)))
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1.0)
        optimizer.step(StepSettings(0, 0.1, 0.1, 0.95))
        decays = {"embed", "pos_embed"}
        decays |= {"attention_qkv", "attention_out", "mlp_up", "mlp_down"}
        plain = GPT2(model.config, 9).named_parameters()
        names = {other: name for name, other in (OTHERS | BANKS).items()}
        by_shape = {names[n.removeprefix("blocks.0.")] for n, p in plain if p.ndim > 1}
        assert by_shape == decays
        for name, p in model.named_parameters():
            wanted = torch.full_like(p, 0.95 if name in decays else 1.0)
            assert torch.allclose(p, wanted), name

    def test_every_tensor_is_in_the_table(self):
        model = GPT(GPTConfig(1, 1, 8, 4), 9)
        rows = [row for row in model.specs if row.name != "embed"]
        with pytest.raises(ValueError, match="the parameter table: missing: embed"):
            MuonAdam(dict(model.named_parameters()), rows)
