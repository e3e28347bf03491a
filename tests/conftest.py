"""Shared by all tests: the interpreter switch for kernels, GPT-2's vocabulary without a network, the embedded text."""

import copy
import functools
import os
import shutil
import signal
from pathlib import Path

import interpreted  # noqa: F401 first of all: see there
import jupytext
import pytest
import remembered  # noqa: F401 before it is asked
import torch
from ahead import Ahead
from hypothesis import settings
from vocabulary import offline_vocabulary

from speedrun.config import vary
from speedrun.data.shards import data_folder
from speedrun.data.sources import build_embedded
from speedrun.lab.provenance import root
from speedrun.presets import preset

settings.register_profile("any machine", deadline=None)  # a busy one takes longer for an example
settings.load_profile("any machine")

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # started in the background: children would ignore Ctrl-C, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    # under nohup: children would ignore it, too, and never end; a handler is not handed on
    signal.signal(signal.SIGHUP, lambda *_: None)
offline_vocabulary(root() / "_build" / "tiktoken")


def read_once(read=jupytext.read):
    """jupytext.read, which takes as long for a chapter as some dozens of tests: each text is read once, and every caller gets a copy."""
    kept: dict = {}

    @functools.wraps(read)
    def copied(path, as_version=4, fmt=None, **more):
        if more or not isinstance(path, (str, Path)) or path == "-":
            return read(path, as_version, fmt, **more)
        key = Path(path).suffix, Path(path).read_bytes(), as_version, str(fmt)
        if key not in kept:
            kept[key] = read(path, as_version, fmt)
        return copy.deepcopy(kept[key])

    return copied


jupytext.read = read_once()
if "PYTEST_XDIST_WORKER" in os.environ:  # two workers with two threads each fight over two cores
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def pytest_collection_modifyitems(items):
    """What is quick once the book is there comes last, so that no process of make check waits long for the other.

    Nothing has a group, so that --dist loadgroup gives tests one by one, in this order, to whoever is free.
    """
    items.sort(key=lambda item: item.path.name == "test_chapters.py")


@pytest.fixture(scope="session")
def browser():
    """The Chromium of this system."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    assert path, (
        "no Chromium: apt-get install chromium (Debian, Ubuntu), brew install chromium (macOS)"
    )
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def compiled_ahead():
    """What compiles kernels for other chips; it starts with the first test that asks."""
    pytest.importorskip("triton")
    running = Ahead()
    yield running
    running.close()


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The data folder of the embedded text, built once in the project."""
    folder = data_folder("data/embedded")
    if not (folder / "manifest.json").exists():
        build_embedded(root() / "data" / "embedded", root() / "data" / "wheels")
    return data_folder("data/embedded")


@pytest.fixture
def brief(embedded):
    """A training run of a second: the laptop's, narrower, twelve steps."""
    changes = {
        "model.model_dim": 32,
        "steps": 12,
        "compile": False,
        "val_every": 6,
        "val_tokens": 4096,
        "log_every": 3,
        "schedule.warmup_steps": 3,
    }
    return vary(preset("cpu_gpt2"), changes | {"data.path": str(embedded)})
