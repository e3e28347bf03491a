"""Imported once by the server that forked.py starts, before its first fork: the commands, and what they import later."""

import os
import tempfile

import interpreted  # noqa: F401 first of all: see there
import remembered  # noqa: F401
import torch
import zygote

import speedrun.launch
import speedrun.sample
import speedrun.train  # noqa: F401
from speedrun.lab.provenance import module_hashes

BRIEF = [
    "--preset",
    "cpu_gpt2",
    "--no-compile",
    "--model.model-dim",
    "32",
    "--steps",
    "2",
    "--val-tokens",
    "1024",
]
torch.set_num_threads(1)
module_hashes(["speedrun.train"])
with tempfile.TemporaryDirectory() as folder:
    data = ["--data.path", str(zygote.ROOT / "data" / "embedded")]
    examples = [("speedrun.train", [*BRIEF, *data, "--out", folder]), ("speedrun.launch", ["--plan"])]  # fmt: skip
    zygote.import_what_they_import(*examples)
assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot fork"
