# Tangled from notebooks/22_config.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The runs of history
from typing import Any

HISTORY: dict[str, tuple[str, dict[str, Any]]] = {
    # llm.c: 45 minutes on 8×H100
    "record1": ("", {"data.path": "data/fineweb10B", "checkpoint_every": 1000}),
    # 31 minutes
    "record2": (
        "record1",
        {
            "model.block.norm": "rms",
            "model.block.biases": False,
            "model.rotary.positions": "rotary",
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
            "model.heads": 6,
            "model.block.qk_norm": True,
            "model.block.activation": "relu2",
            "model.block.zero_out": True,
            "model.head.multiple": 128,
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
            "model.embedding.rate": 0.3 / 0.002,
            "model.head.tied": "untied",
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
            "model.plan.x0": True,
            "model.plan.rate": 0.02 / 0.002,
            "model.head.cap": "tanh30",
            "schedule.momentum_min": 0.85,
            "schedule.momentum_ramp": (500, 0),
            "steps": 3200,
        },
    ),
    # 7 minutes
    "record11": (
        "record9",
        {
            "model.embedding.rate": 0.6 / 0.008,
            "model.plan.skips": "unet",
            "model.plan.rate": 0.04 / 0.008,
            "optim.adam.lr": 0.008,
            "optim.matrix_lr": 0.04,
            "schedule.cooldown_frac": 0.3,
            "steps": 3000,
        },
    ),
}
