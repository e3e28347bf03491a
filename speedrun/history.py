# Tangled from notebooks/22_config.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Presets of historic records
from typing import Any

from speedrun.schedule import Stage


def widening(last: float, blocks: int, tokens: int, short: int = 1) -> tuple[Stage, ...]:
    """Stages whose window is 1, 2, … blocks long, each over a share 1 / last of the steps; short layers have a part of it."""
    ends = [min(n, last) / last for n in range(blocks + 1)]
    windows = [(max(1, n // short) * tokens - 1, n * tokens - 1) for n in range(1, blocks + 1)]
    return tuple(Stage(b - a, windows=pair) for a, b, pair in zip(ends, ends[1:], windows))


HISTORY: dict[str, tuple[str, dict[str, Any]]] = {
    # llm.c: 45 minutes on 8×H100
    "record1": ("", {"data.path": "data/fineweb10B", "checkpoint_every": 1000}),
    # 31 minutes
    "record2": (
        "record1",
        {
            "model.block.norm": "rms",
            "model.block.biases": False,
            "model.rotary.pos": "rope",
            "optim.adam.lr": 1.8e-3,
            "schedule.warmup_steps": 250,
            "schedule.shape": "trapezoid",
            "schedule.cooldown_frac": 2000 / 9536,
            "steps": 9536,
        },
    ),
    # 15 minutes
    "record5": (
        "record2",
        {
            "model.num_heads": 6,
            "model.block.qk_norm": True,
            "model.block.activation": "relu2",
            "model.block.zero_init_proj": True,
            "model.head.pad_vocab_to": 128,
            "optim.adam.lr": 3.6e-3,
            "optim.adam.weight_decay": 0.0,
            "optim.matrices": "muon",
            "optim.matrix_lr": 0.01,
            "optim.muon.down_lr_mul": 2.0,
            "schedule.warmup_steps": 0,
            "schedule.cooldown_frac": 0.28,
            "steps": 5100,
        },
    ),
    # 11 minutes
    "record8": (
        "record5",
        {
            "model.embedding.norm": True,
            "model.embedding.std": 1.0,
            "model.embedding.lr_mul": 0.3 / 0.002,
            "model.head.tie": "untied",
            "optim.adam.lr": 0.002,
            "optim.grad_clip": 0.0,
            "optim.matrix_lr": 0.02,
            "optim.muon.down_lr_mul": 1.0,
            "schedule.cooldown_frac": 0.29,
            "steps": 4578,
        },
    ),
    # 8 minutes
    "record9": (
        "record8",
        {
            "model.embedding.values": "first",
            "model.layout.x0": True,
            "model.layout.lr_mul": 0.02 / 0.002,
            "model.head.softcap": "tanh30",
            "schedule.momentum_min": 0.85,
            "schedule.momentum_ramp": (500, 0),
            "steps": 3200,
        },
    ),
    # 7 minutes
    "record11": (
        "record9",
        {
            "model.embedding.lr_mul": 0.6 / 0.008,
            "model.layout.skips": "unet",
            "model.layout.lr_mul": 0.04 / 0.008,
            "optim.adam.lr": 0.008,
            "optim.matrix_lr": 0.04,
            "schedule.cooldown_frac": 0.3,
            "steps": 3000,
        },
    ),
    # 5 minutes: rows of 65,536 tokens, in which no document sees another
    "record12": (
        "record11",
        {
            "model.attention.backend": "flex",
            "schedule.stages": (Stage(windows=(1023, 1023)),),
            "data.mode": "packed",
            "steps": 1875,
        },
    ),
    # 280 seconds
    "record13": (
        "record12",
        {
            "optim.adam.betas": (0.8, 0.95),
            "optim.matrix_lr": 0.05,
            "schedule.momentum_ramp": (300, 0),
            "schedule.cooldown_frac": 640 / 1750,
            "schedule.stages": widening(27, 27, 64),
            "steps": 1750,
        },
    ),
    # 265 seconds
    "record14": (
        "record13",
        {
            "model.embedding.values": "all",
            "model.embedding.value_std": 1.0,
            "model.embedding.value_lr_mul": 0.6 / 0.008,
            "schedule.cooldown_frac": 0.39,
            "steps": 1530,
        },
    ),
    # 228 seconds, with record 15's tables
    "record16": (
        "record14",
        {
            "model.embedding.values": "mirror",
            "model.embedding.value_residual": "lambdas",
            "schedule.cooldown_frac": 0.4,
            "schedule.stages": widening(13.5, 14, 128),
            "steps": 1480,
        },
    ),
    # 214 seconds
    "record17": (
        "record16",
        {
            "model.rotary.pos": "half_rope",
            "model.rotary.base": 1024.0,
            "model.embedding.values": "outer",
            "model.layout.skip_sublayers": "attn",
            "steps": 1490,
        },
    ),
    # 180 seconds, with the caps of records 18 and 19 and 19's initial values, and without its FP8 head
    "record20": (
        "record17",
        {
            "model.block.fan_in_init": True,
            "model.attention.scale": 0.12,
            "model.attention.long_layers": (0, 4, 7, 11),
            "model.head.softcap": "sigmoid30",
            "optim.adam.eps": 1e-10,
            "schedule.final_lr_frac": 0.1,
            "schedule.stages": widening(13.5, 14, 128, 2),
            "steps": 1393,
        },
    ),
    # 164 seconds, with the batch of record 21 and without the gate of record 28, which is worth some 55 steps
    "record29": (
        "record20",
        {
            "model.attention.backend": "auto",
            "optim.muon.scale_by_shape": False,
            "schedule.cooldown_frac": 0.45,
            "schedule.stages": tuple(
                Stage(1 / 3, 1, 1.0, 2048, (n // 2 * 128, n * 128)) for n in (3, 7, 11)
            ),
            "data.mode": "documents",
            "data.batch_tokens": 393_216,
            "steps": 1670,
        },
    ),
    # 159 seconds, with record 30's first layer
    "record31": (
        "record29",
        {
            "model.attention.scale": 0.1,
            "model.attention.yarn": True,
            "model.layout.skip_sublayers": "both",
            "schedule.cooldown_frac": 0.5,
            "schedule.val_windows": (0, 1664),
        },
    ),
}
