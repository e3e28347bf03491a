# Tangled from notebooks/23_training_loop.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.ranks import Ranks


# %% The state of a run
import dataclasses
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from speedrun.config import Config
from speedrun.data.loader import Loader, Shards
from speedrun.heartbeat import Heartbeat, Interrupts
from speedrun.lab.compile import Recorder
from speedrun.lab.provenance import commit, module_file, module_hashes, stamp
from speedrun.lab.runlog import RunLog
from speedrun.lab.timer import TrainClock
from speedrun.model.attention import AttentionSettings
from speedrun.model.gpt import GPT, flops_per_token
from speedrun.optim.optimizer import MuonAdam
from speedrun.schedule import Schedule


@dataclass
class Run:
    """Everything that changes while training, and what it needs.

    nonfinite_steps: how many steps had a gradient that was not finite, and were left out.
    saved: the checkpoint that was last written or read.
    """

    config: Config
    folder: Path
    ranks: Ranks
    model: GPT
    forward: Any
    optimizer: MuonAdam
    schedule: Schedule
    attn_settings: list[AttentionSettings]
    loader: Loader
    validation: Shards
    clock: TrainClock
    log: RunLog
    heartbeat: Heartbeat
    nonfinite_steps: Tensor
    interrupts: Interrupts
    recorder: Recorder
    step: int = 0
    stop_at: int | None = None
    saved: Path | None = None


# %% Building a run
class SilentLog(RunLog):
    """The log of the other ranks: it writes nothing."""

    def append(self, name: str, line: str) -> None:
        pass


def open_log(config: Config, folder: Path, echo) -> RunLog:
    """Rank 0's log: two files, and Weights & Biases as well if the run names a project and it answers."""
    log = RunLog(folder, echo)
    if config.wandb:
        importlib.import_module("speedrun.tracking").track(log, config, folder.name)
    return log


# %% Saving and resuming
def facts_of(run: Run) -> dict:
    """What a checkpoint says about its run beside the tensors."""
    manifest = run.loader.shards.manifest
    return {
        "config": dataclasses.asdict(run.config),
        "position": run.loader.position,
        "train_time_ms": run.clock.ms,
        "data_sha256": manifest.sha256,
        "train_shards": len(manifest.split("train")),
        "vocab_size": manifest.vocab_size,
        "tokenizer": manifest.tokenizer,
        "world": run.ranks.world,
    }


# %% Logging
def describe_code() -> dict:
    """The commit, and each module of the trainer with its hash and its source."""
    modules = {
        name: {"hash": digest, "source": file.read_text(encoding="utf-8")}
        for name, digest in module_hashes(["speedrun.train"]).items()
        if (file := module_file(name))
    }
    return {"commit": commit(), "modules": modules}


def bytes_per_token(validation: Shards, tokens: int) -> float | None:
    """Bytes of text a validation token: of the first `tokens` if tokens are bytes, else the files' mean, if known."""
    if validation.manifest.tokenizer == "bytes":
        read = validation.read(0, min(tokens, validation.total))
        from speedrun.data.tokenizer import decode_bytes

        return len(decode_bytes(read.tolist())) / len(read)
    known = [file.bytes for file in validation.files if file.bytes is not None]
    return sum(known) / validation.total if len(known) == len(validation.files) else None


def gpu_state(device: torch.device) -> dict[str, float]:
    """Clock (MHz), power (W) and temperature (°C) of a GPU now, for whoever wonders why theirs is slower."""
    if device.type != "cuda":
        return {}
    try:
        watts = torch.cuda.power_draw(device) / 1000
        clock, celsius = torch.cuda.clock_rate(device), torch.cuda.temperature(device)
        return {"clock_mhz": clock, "power_w": watts, "temperature_c": celsius}
    except (ImportError, RuntimeError):  # without nvidia-ml-py, or where the driver does not tell
        return {}


def describe_run(run: Run, command: str) -> dict:
    """The first record: config, source and hash of every module, versions, machine, data, size of the model."""
    manifest, config = run.loader.shards.manifest, run.config
    corpus = {"name": manifest.source, "sha256": manifest.sha256}
    return {
        "config": dataclasses.asdict(config),
        **describe_code(),
        "data": {
            **corpus,
            "tokenizer": manifest.tokenizer,
            "train_tokens": run.loader.shards.total,
        },
        "stamp": stamp(command, ["speedrun.train"], 1, [config.seed], corpus),
        "world": run.ranks.world,
        "threads": torch.get_num_threads(),
        "device": str(run.ranks.device),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "bytes_per_token": bytes_per_token(run.validation, config.val_tokens),
        "flops_per_token": flops_per_token(config.model, manifest.vocab_size, config.data.seq_len),
    }


def epochs_line(run: Run) -> str | None:
    """A sentence about repeated data; None if the data suffice."""
    wanted, there = run.schedule.tokens_before(run.config.last_step), run.loader.shards.total
    if wanted < there:
        return None
    return f"the data run short: {wanted:,} tokens are {wanted / there:.2f} epochs of the {there:,} there are"


def memory_mb(device: torch.device) -> dict[str, int]:
    """Peak memory of this rank in MiB: allocated and reserved on a GPU; on a CPU, resident now."""
    if device.type == "cuda":
        allocated, reserved = (
            torch.cuda.max_memory_allocated(device),
            torch.cuda.max_memory_reserved(device),
        )
        return {"allocated": allocated >> 20, "reserved": reserved >> 20}
    return {"resident": psutil.Process().memory_info().rss >> 20}
