"""The two models against each other, against Hugging Face's GPT-2, and against formulas."""

import dataclasses
import math

import pytest
import torch

from speedrun.model.baseline import (
    GPT2,
    GPT2Options,
    decays_by_shape,
    flops_per_token,
    parameter_count,
)
from speedrun.model.gpt import (
    GPT,
    GPTOptions,
    banks_from_blocks,
    model_flops_per_token,
    parameter_table,
)
from speedrun.optim.adamw import AdamWOptions, make_adamw

SHAPES = [
    GPTOptions(layers=1, heads=1, width=8, context=4),
    GPTOptions(layers=3, heads=4, width=48, context=33),
    GPTOptions(layers=5, heads=2, width=32, context=16),
]


def both(options: GPTOptions, vocab: int = 61) -> tuple[GPT2, GPT]:
    """The plain and the banked model with the same noisy weights, in float64."""
    torch.manual_seed(3)
    plain = GPT2(GPT2Options(**dataclasses.asdict(options)), vocab).double()
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.3 * torch.randn_like(p))
    banked = GPT(options, vocab).double()
    banked.load_state_dict(banks_from_blocks(plain.state_dict(), options.layers))
    return plain, banked


@pytest.mark.parametrize("options", SHAPES)
class TestBankedModel:
    def test_loss_and_every_gradient_equal_the_baselines(self, options):
        plain, banked = both(options)
        tokens = torch.randint(61, (3, options.context + 1))
        losses = [model(tokens[:, :-1], tokens[:, 1:]) for model in (plain, banked)]
        for loss in losses:
            loss.backward()
        assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-12)
        wanted = banks_from_blocks(
            {name: p.grad for name, p in plain.named_parameters()}, options.layers
        )
        for name, p in banked.named_parameters():
            assert torch.allclose(p.grad, wanted[name], rtol=1e-10, atol=1e-13), name

    def test_ten_optimizer_steps_equal_the_baselines(self, options):
        plain, banked = both(options)
        sets = [(plain, decays_by_shape(plain)), (banked, banked.decays())]
        optimizers = [
            make_adamw(dict(m.named_parameters()), d, AdamWOptions(lr=0.01)) for m, d in sets
        ]
        for step in range(10):
            tokens = torch.randint(
                61, (2, options.context + 1), generator=torch.Generator().manual_seed(step)
            )
            for (model, _), optimizer in zip(sets, optimizers):
                optimizer.zero_grad()
                model(tokens[:, :-1], tokens[:, 1:]).backward()
                optimizer.step()
        wanted = banks_from_blocks(plain.state_dict(), options.layers)
        for name, p in banked.named_parameters():
            assert torch.allclose(p, wanted[name], rtol=1e-8, atol=1e-10), name

    def test_counts_follow_the_formulas(self, options):
        numbers = sum(math.prod(row.shape) for row in parameter_table(options, 61))
        shape = GPT2Options(**dataclasses.asdict(options))
        assert (
            numbers
            == parameter_count(shape, 61)
            == sum(p.numel() for p in GPT(options, 61).parameters())
        )
        assert model_flops_per_token(options, 61, 16) == flops_per_token(shape, 61, 16)

    def test_shorter_rows_and_no_targets(self, options):
        model = GPT(options, 61)
        tokens = torch.randint(61, (2, 3))
        assert model(tokens).shape == (2, 3, 61)

    @pytest.mark.parametrize("kind", ["gpt", "baseline"])
    def test_one_graph(self, options, kind):
        model = (
            GPT(options, 61)
            if kind == "gpt"
            else GPT2(GPT2Options(**dataclasses.asdict(options)), 61)
        )
        torch._dynamo.reset()  # it keeps eight versions of a function at most
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        tokens = torch.randint(61, (2, options.context + 1))
        assert torch.allclose(
            compiled(tokens[:, :-1], tokens[:, 1:]), model(tokens[:, :-1], tokens[:, 1:])
        )


class TestInitialValues:
    def test_they_depend_on_seed_and_name_only(self):
        small, deep = (
            GPT(GPTOptions(2, 2, 16, 8), 61, seed=5),
            GPT(GPTOptions(2, 2, 16, 8), 61, seed=5),
        )
        assert all(torch.equal(a, b) for a, b in zip(small.parameters(), deep.parameters()))
        other = GPT(GPTOptions(2, 2, 16, 8), 61, seed=6)
        assert not torch.equal(small.mlp_up, other.mlp_up)
        wider = GPT(GPTOptions(2, 2, 16, 8), 99, seed=5)
        assert torch.equal(small.mlp_up, wider.mlp_up), (
            "another vocabulary changes the embedding alone"
        )

    def test_the_first_loss_is_as_predicted(self):
        options = GPTOptions(layers=2, heads=2, width=128, context=64, init_std=0.05)
        model = GPT(options, 288)
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
            GPT2(GPT2Options(layers, heads, width, 32), 77).double(),
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
        model = GPT(GPTOptions(1, 1, 8, 4), 9)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1.0)
                p.grad = torch.zeros_like(p)
        make_adamw(
            dict(model.named_parameters()), model.decays(), AdamWOptions(lr=0.1, weight_decay=0.5)
        ).step()
        for name, p in model.named_parameters():
            assert torch.allclose(p, torch.full_like(p, 0.95 if model.decays()[name] else 1.0)), (
                name
            )

    def test_every_tensor_is_in_the_table(self):
        model = GPT(GPTOptions(1, 1, 8, 4), 9)
        with pytest.raises(ValueError, match="only one names token_embedding"):
            make_adamw(
                dict(model.named_parameters()),
                {k: v for k, v in model.decays().items() if k != "token_embedding"},
                AdamWOptions(),
            )
