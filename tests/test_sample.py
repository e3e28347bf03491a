"""Sampling, and the judge of samples: half of the words must be real, and shuffled text must fail."""

import math
import random

import pytest
import torch

from speedrun.lab.errors import UserError
from speedrun.lab.results import load_result
from speedrun.sample import (
    known_word_fraction,
    load_trained,
    main,
    sample_token,
    training_text,
    words_of,
)
from speedrun.train import train


@pytest.fixture(scope="module")
def known(request) -> set[str]:
    """The words of the training text."""
    return set(words_of(training_text(request.getfixturevalue("embedded"))))


class TestTheFiveMinuteRun:
    def test_half_of_its_words_are_real_and_shuffled_text_fails(self, known):
        text = "\n".join(load_result("samples", "cpu")["data"]["stages"][-1]["texts"])
        letters = list(text)
        random.Random(0).shuffle(letters)
        assert len(words_of(text)) > 100
        assert (
            known_word_fraction(text, known)
            >= 0.5
            > 0.1
            > known_word_fraction("".join(letters), known)
        )

    def test_text_without_words_has_no_share(self, known):
        assert math.isnan(known_word_fraction("x = 1\n", known))


class TestChoosing:
    @pytest.mark.parametrize("top_k", [0, 1, 3, 99])
    def test_only_the_likeliest_are_drawn(self, top_k):
        logits = torch.tensor([0.5, 3.0, 1.0, 2.0, -4.0])
        allowed = set(logits.topk(min(top_k or 5, 5)).indices.tolist())
        generator = torch.Generator().manual_seed(0)
        assert {sample_token(logits, 1.0, top_k, generator) for _ in range(300)} <= allowed

    def test_the_same_seed_draws_the_same(self):
        logits = torch.randn(288, generator=torch.Generator().manual_seed(1))
        draws = [
            [sample_token(logits, 1.0, 40, torch.Generator().manual_seed(s)) for s in range(9)]
            for _ in range(2)
        ]
        assert draws[0] == draws[1]


class TestCommand:
    def test_it_writes_and_keeps_what_it_wrote(self, brief, tmp_path, capsys):
        train(brief, tmp_path, echo=None)
        assert main([str(tmp_path), "--prompt", "def ", "--tokens", "30"]) == 0
        said = capsys.readouterr().out
        kept = (tmp_path / "sample.txt").read_text(encoding="utf-8")
        assert kept.startswith("def ") and kept in said and "occur in the training text" in said

    def test_it_reads_rows_as_long_as_it_was_trained_on(self, brief, tmp_path):
        from speedrun.config import vary

        train(vary(brief, {"data.seq_len": 64}), tmp_path, echo=None)
        assert load_trained(tmp_path).seq_len == 64

    def test_a_stream_in_bfloat16_is_read_in_float32(self, embedded, tmp_path):
        """The record's: its sample is drawn without autocast."""
        from speedrun.config import vary
        from speedrun.cpu_size import at_cpu_size
        from speedrun.presets import preset

        lower = {"precision": "bfloat16", "model.layout.stream_dtype": "bfloat16", "compile": False}
        config = vary(at_cpu_size(preset("record"), 4), lower | {"data.path": str(embedded)})
        live = train(config, tmp_path, echo=None)
        assert live.model.config.layout.stream_dtype == "bfloat16"
        logits = load_trained(tmp_path).logits(torch.arange(9)[None])
        assert logits.dtype == torch.float32 and torch.isfinite(logits).all()

    def test_a_folder_without_a_run(self, tmp_path, capsys):
        assert main([str(tmp_path)]) == 1
        assert "has no checkpoint" in capsys.readouterr().err
        with pytest.raises(UserError):
            load_trained(tmp_path)

    def test_what_cannot_be_counted_is_said_and_the_sample_is_kept(self, brief, tmp_path, capsys):
        import shutil

        from speedrun.config import vary

        source = brief.data.path
        shutil.copytree(source, tmp_path / "text")
        train(vary(brief, {"data.path": str(tmp_path / "text")}), tmp_path / "run", echo=None)
        shutil.rmtree(tmp_path / "text")
        assert main([str(tmp_path / "run"), "--tokens", "20"]) == 0
        said = capsys.readouterr()
        assert (tmp_path / "run" / "sample.txt").read_text(encoding="utf-8") in said.out
        assert "were not counted" in said.err and "Traceback" not in said.err

    def test_it_does_not_read_the_optimizer(self, brief, tmp_path):
        train(brief, tmp_path, echo=None)
        (moments,) = tmp_path.rglob("optimizer.safetensors")
        moments.write_bytes(b"damaged")
        assert main([str(tmp_path), "--tokens", "5"]) == 0

    @pytest.mark.parametrize(
        "flags",
        ["--temperature nan", "--temperature -1", "--tokens -1", "--tokens 0", f"--seed {10**21}", "--top-k -3"],
    )  # fmt: skip
    def test_numbers_out_of_range_are_refused(self, brief, tmp_path, capsys, flags):
        assert main([str(tmp_path), *flags.split()]) == 1
        assert f"{flags.split()[0][2:].replace('-', '_')}=" in capsys.readouterr().err
