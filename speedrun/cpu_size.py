# Tangled from notebooks/22_config.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.config import Config, fields_of, vary
from speedrun.presets import preset


# %% Shrinking a run to CPU size
import dataclasses
from typing import Any

from speedrun.schedule import Stage

MODEL_SIZES = [
    f"model.{name}" for name in ("num_layers", "num_heads", "model_dim", "max_seq_len", "init_std")
]
DATA_SIZES = [
    "data.path",
    "data.seq_len",
    "data.batch_tokens",
    "data.micro_batches",
    "data.max_forward_tokens",
]
NUMBERS = (
    "precision",
    "optim.muon.param_dtype",
    "optim.muon.ns_dtype",
    "model.layout.stream_dtype",
)
SIZES = (*MODEL_SIZES, *DATA_SIZES, *NUMBERS)
LONG_LAYERS = "model.attention.long_layers"
RAMPS = (
    "schedule.warmup_steps",
    "schedule.momentum_ramp",
    "schedule.extension_steps",
)  # steps in which something rises or falls


def scaled(count: int, whole: int, steps: int) -> int:
    """A count of steps out of `whole` as one out of `steps`: at least three if there are any, and at most a quarter."""
    return min(max(round(count * steps / whole), 3), max(1, steps // 4)) if count else 0


def fewer(stages: tuple[Stage, ...], most: int) -> tuple[Stage, ...]:
    """At most so many of a table's stages, evenly chosen, the first and the last among them, over the same steps."""
    within, after = [s for s in stages if s.duration], [s for s in stages if not s.duration]
    if len(within) <= most:
        return stages
    kept = [within[round(n * (len(within) - 1) / (most - 1))] for n in range(most)]
    return (*(dataclasses.replace(stage, duration=1 / most) for stage in kept), *after)


def at_cpu_size(config: Config, steps: int = 20) -> Config:
    """The same decisions at cpu_gpt2's widths, vocabulary and lengths, with all of the schedule in a few steps."""
    laptop, own = fields_of(preset("cpu_gpt2")), fields_of(config)
    changes = {name: laptop[name] for name in SIZES}
    changes |= {"steps": steps, "max_steps": 0, "val_every": steps, "val_tokens": 16_384}
    last = laptop["model.num_layers"] - 1  # long layers stay where they are in the model's depth
    deep = [round(n * last / max(1, config.model.num_layers - 1)) for n in own[LONG_LAYERS]]
    changes[LONG_LAYERS] = tuple(sorted({*deep}))
    stages = fewer(config.schedule.stages, max(2, steps // 4))
    few = [dataclasses.replace(s, candidates=min(s.candidates, 128)) for s in stages]
    changes["schedule.stages"] = tuple(few)  # of 256 words
    for name in RAMPS:
        if isinstance(own[name], tuple):
            changes[name] = tuple(scaled(count, config.steps, steps) for count in own[name])
        else:
            changes[name] = scaled(own[name], config.steps, steps)
    return vary(config, changes)
