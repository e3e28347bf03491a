"""The page about one finished run: its numbers are the log's, and what others wrote into it stays text."""

import re

import matplotlib.pyplot as plt
import pytest

from speedrun.config import vary
from speedrun.lab.errors import UserError
from speedrun.lab.metrics import read_metrics, series
from speedrun.presets import preset
from speedrun.report import five_numbers, loss_figure, read_run, unit_of, write_report
from speedrun.train import train

TINY = {"steps": 6, "val_every": 3, "val_tokens": 4096, "model.model_dim": 32, "log_every": 2}


@pytest.fixture(scope="module")
def folder(embedded, tmp_path_factory):
    """The folder of a finished run, with a name that HTML and a shell read otherwise, and a sample that is markup."""
    place = tmp_path_factory.mktemp("runs") / "a & <b> run"
    train(vary(preset("smoke"), TINY | {"data.path": str(embedded)}), place, echo=lambda line: None)
    (place / "sample.txt").write_text(
        '<script>alert("1 & 2")</script> def f():\n', encoding="utf-8"
    )
    return place


def test_its_numbers_are_those_of_the_log(folder):
    page = write_report(folder).read_text(encoding="utf-8")
    records = read_metrics(folder / "metrics.jsonl")
    loss = series(records, "val")[-1]["val_loss"]
    bits = loss / records[0]["bytes_per_token"] / 0.6931471805599453
    end = records[-1]
    assert f"<b>{bits:.4f}</b><small>bits a byte; {loss:.4f} nats a token" in page
    assert f"<b>{end['train_time_ms'] / 1000:.1f} s</b>" in page
    assert f"{records[0]['parameters']:,} parameters, 6 steps" in page
    assert str(records[0]["commit"] or "no commit known") in page
    assert "python -m speedrun.launch --preset smoke" in page and "--model.model-dim 32" in page


def test_nothing_in_it_is_fetched_and_all_links_lead_to_files(folder):
    page = write_report(folder).read_text(encoding="utf-8")
    assert not re.findall(r"https?:|//cdn", page) and page.count("data:image/png;base64,") == 4
    links = re.findall(r'href="([^"]+)"', page)
    assert links == ["log.txt", "metrics.jsonl", "sample.txt", "checkpoints"]
    assert all((folder / link).exists() for link in links)
    alts = re.findall(r'<img alt="([^"]+)"', page)
    assert len(alts) == 2 and all(len(alt) > 20 for alt in alts)


def test_what_a_model_writes_stays_text(folder):
    page = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;alert(&quot;1 &amp; 2&quot;)" in page
    (folder / "sample.txt").rename(folder / "aside.txt")
    without = write_report(folder).read_text(encoding="utf-8")
    (folder / "aside.txt").rename(folder / "sample.txt")
    assert "What it writes" not in without and "sample.txt" not in without


def test_public_records_stand_beside_their_own_text_only(folder):
    def named(run: dict) -> set[str]:
        figure = loss_figure(run)
        (labels,) = [{text.get_text() for text in axis.get_legend().get_texts()} for axis in figure.axes[:1]]  # fmt: skip
        plt.close(figure)
        return labels

    run = read_run(folder)
    assert named(run) == {"smoke, 1 × CPU", "target"}
    fineweb = run | {"data": {"name": "FineWeb (10B)", "tokenizer": "gpt2"}, "bytes_per_token": None}  # fmt: skip
    assert {"record 89", "record 92"} < named(fineweb)
    assert unit_of(fineweb) == (1.0, "nats a token (gpt2)")
    assert named(fineweb | {"data": {"name": "FineWeb (10B)", "tokenizer": "bytes"}}) == named(run)
    ((_, number, more), *_) = five_numbers(fineweb)
    assert (number, more) == (f"{run['curve'][-1]['val_loss']:.4f}", "nats a token (gpt2)")


def test_a_run_that_has_not_ended_has_no_page(folder, tmp_path):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(UserError, match="has not ended"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
