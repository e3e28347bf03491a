# Tangled from notebooks/22_config.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.config import Config, fields_of, value_from_json, vary
from speedrun.lab.bounds import as_flags, check_value


# %% Presets
import dataclasses
import difflib
import importlib
import json
from collections.abc import Callable
from typing import Any, get_args

from speedrun.lab.errors import UserError, check_words
from speedrun.optim.muon import MuonConfig
from speedrun.schedule import Stage

RECORD_MUON = MuonConfig(
    orthogonalizer="polar_express",
    ns_dtype="float16",
    beta2=0.9,
    weight_decay=1.2,
    decay_with_lr=True,
    cautious=True,
    down_lr_mul=4.0,
    param_dtype="bf16_mantissa",
)
"""Muon as it was in record 89, from records 38, 41, 43, 48, 57 and 78, with a Gram Newton–Schulz in float16 that it does not have."""

RECORD_STAGES = (
    Stage(1 / 3, 1, 1.0, 896, (128, 384), 10_240),
    Stage(1 / 3, 2, 1.52, 2048, (384, 896), 10_240),
    Stage(1 / 3, 3, 1.73, 2048, (640, 1408)),
    Stage(0, 3, 1.73, 2048, (768, 1664)),
)
SMALL_THIRD = (
    Stage(0.27, 3, 1.73, 2048, (640, 1408), 16_384),
    Stage(1 / 3 - 0.27, 3, 1.73, 2048, (640, 1408)),
)

Changes = dict[str, Any]
FINEWEB = "data/fineweb10B"
PRESETS: dict[str, tuple[str, Changes]] = {  # name → the run that it starts from, what it changes
    "cpu": (
        "record",
        {
            "model.head.fp8": False,
            "model.block.fp8": False,
            "model.num_layers": 3,
            "model.num_heads": 2,
            "model.model_dim": 128,
            "model.init_std": 0.02,
            "model.layout.skip_sublayers": "none",
            "model.layout.stream_dtype": "float32",
            "model.attention.long_layers": (2,),
            "optim.muon.param_dtype": "float32",
            "optim.muon.ns_dtype": "bfloat16",
            "schedule.extension_steps": 0,
            "schedule.stages": (
                Stage(1 / 3, 1, 1.0, 256, (64, 128)),
                Stage(1 / 3, 1, 1.0, 512, (64, 256)),
                Stage(1 / 3, 2, 1.4, 1024, (128, 512)),
            ),
            "schedule.val_windows": (0, 0),
            "data.path": "data/embedded",
            "data.batch_tokens": 1024,
            "data.micro_batches": 2,
            "data.max_forward_tokens": 1024,
            "steps": 1600,
            "precision": "float32",
            "compile": False,
            "val_every": 200,
            "val_tokens": 262_144,
            "log_every": 50,
            "target": 1.15,
        },
    ),
    "cpu_gpt2": (
        "",
        {
            "model.num_layers": 2,
            "model.num_heads": 2,
            "model.model_dim": 128,
            "model.max_seq_len": 128,
            "model.init_std": 0.05,
            "optim.adam.lr": 2e-3,
            "schedule.warmup_steps": 100,
            "data.path": "data/embedded",
            "data.seq_len": 128,
            "data.batch_tokens": 1024,
            "data.micro_batches": 2,
            "steps": 8000,
            "precision": "float32",
            "compile": False,
            "val_every": 1000,
            "val_tokens": 262_144,
            "log_every": 50,
            "target": 1.55,
        },
    ),
    "smoke": ("cpu_gpt2", {"steps": 600, "val_every": 200, "val_tokens": 65_536, "target": 2.75}),
    "small_gpt2": (
        "",
        {
            "model.num_layers": 8,
            "model.num_heads": 8,
            "model.model_dim": 512,
            "model.init_std": 0.025,
            "optim.adam.lr": 4e-3,
            "optim.matrices": "muon",
            "optim.matrix_lr": 0.016,
            **fields_of(RECORD_MUON, "optim.muon."),
            "schedule.warmup_steps": 100,
            "schedule.shape": "trapezoid",
            "schedule.momentum_min": 0.85,
            "data.path": FINEWEB,
            "data.batch_tokens": 65_536,
            "data.max_forward_tokens": 32_768,
            "steps": 1520,
            "val_every": 190,
            "val_tokens": 4_194_304,
            "log_every": 20,
            "target": 4.0,
        },
    ),
    "record": (
        "",
        {
            "model.num_layers": 11,
            "model.num_heads": 6,
            "model.init_std": 0.005,
            "model.block.norm": "rms",
            "model.block.biases": False,
            "model.block.qk_norm": True,
            "model.block.activation": "relu2",
            "model.block.zero_init_proj": True,
            "model.block.fan_in_init": True,
            "model.block.fp8": True,
            "model.rotary.pos": "half_rope",
            "model.rotary.base": 1024.0,
            "model.embedding.norm": True,
            "model.embedding.smear": True,
            "model.embedding.values": "ends",
            "model.embedding.value_residual": "gate",
            "model.embedding.value_lr_mul": 75.0,
            "model.embedding.value_decay": 1 / 30,
            "model.layout.x0": True,
            "model.layout.resid_lambda_init": 1.1,
            "model.layout.skips": "single_gated",
            "model.layout.backout": True,
            "model.layout.skip_sublayers": "attn",
            "model.layout.lr_mul": 5.0,
            "model.layout.stream_dtype": "bfloat16",
            "model.attention.scale": 0.1,
            "model.attention.long_layers": (3, 10),
            "model.attention.yarn": True,
            "model.head.tie": "until_step",
            "model.head.pad_vocab_to": 128,
            "model.head.softcap": "sigmoid23",
            "model.head.fp8": True,
            "optim.adam.lr": 0.008,
            "optim.adam.betas": (0.65, 0.95),
            "optim.adam.eps": 1e-10,
            "optim.adam.weight_decay": 0.75,
            "optim.adam.cautious": True,
            "optim.adam.every": 2,
            "optim.grad_clip": 0.0,
            "optim.matrices": "muon",
            "optim.matrix_lr": 0.023,
            **fields_of(RECORD_MUON, "optim.muon."),
            "schedule.warmup_steps": 0,
            "schedule.shape": "trapezoid",
            "schedule.cooldown_frac": 0.6,
            "schedule.final_lr_frac": 0.15,
            "schedule.momentum_min": 0.85,
            "schedule.extension_steps": 40,
            "schedule.stages": RECORD_STAGES,
            "schedule.val_windows": (0, 2560),
            "data.path": FINEWEB,
            "data.mode": "documents",
            "data.batch_tokens": 131_072,
            "data.max_forward_tokens": 65_536,
            "steps": 2100,
        },
    ),
    "record_200m": (
        "record",
        {"schedule.extension_steps": 10, "steps": 735, "val_every": 125, "val_tokens": 8_388_608},
    ),
    "small": (
        "record_200m",
        {
            "model.block.fp8": False,
            "schedule.stages": (*RECORD_STAGES[:2], *SMALL_THIRD, RECORD_STAGES[3]),
            "model.num_layers": 8,
            "model.num_heads": 4,
            "model.model_dim": 512,
            "model.attention.long_layers": (2, 7),
            "data.batch_tokens": 65_536,
            "data.max_forward_tokens": 32_768,
            "val_tokens": 4_194_304,
            "log_every": 20,
            "target": 4.0,
        },
    ),
}


# %% Presets of historic records
def known_presets() -> dict[str, tuple[str, Changes]]:
    """All presets, those of history included."""
    return PRESETS | importlib.import_module("speedrun.history").HISTORY


def preset(name: str) -> Config:
    """A run by its name. Raises UserError, with the names that there are, for any other."""
    known = PRESETS if name in PRESETS else known_presets()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"there is no preset “{name}”", f"{hint}Known are {', '.join(known)}")
    parent, changes = known[name]
    return vary(preset(parent) if parent else Config(), {"preset": name} | changes)


# %% JSON and the command line
def preset_in(arguments: list[str], default: str) -> str:
    """The value of --preset among command-line arguments, wherever it stands; the last one counts."""
    found = default
    for argument, following in zip(arguments, [*arguments[1:], default]):
        if argument == "--preset":
            found = following
        elif argument.startswith("--preset="):
            found = argument.split("=", 1)[1]
    return found


def check_switches(arguments: list[str], command: Any) -> None:
    """Refuse a switch with a value, --compile=False: tyro would only say that it does not know “False”."""
    known = [name for name, value in fields_of(command).items() if isinstance(value, bool)]
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        given, equals, value = argument.partition("=")
        for name in known:
            both = [as_flags(name.rpartition("config.")[2], on)[0] for on in (True, False)]
            if given.replace("_", "-") in both and (
                equals or following.lower() in ("true", "false")
            ):
                what = f"{given} takes no value, and was given “{value or following}”"
                raise UserError(what, " or ".join(both))


def table_as_json(info: Any) -> Any:
    """tyro's rule for a table, which is a tuple of any number of one dataclass: one argument, in JSON."""
    from tyro.constructors import PrimitiveConstructorSpec

    kinds = get_args(info.type)
    if kinds[1:] != (...,) or not dataclasses.is_dataclass(kinds[0]):
        return None

    def read(arguments: list[str]) -> tuple:
        try:
            rows = value_from_json(json.loads(arguments[0]), info.type, "row ")
            check_value("the table", rows, info.type, "[{}]")
            return rows
        except UserError as problem:
            raise ValueError(problem.what.removeprefix("the saved ")) from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda rows: as_flags("", rows)[1:],
    )


def read_command(
    make: Callable[[Config], Any], arguments: list[str], default: str, prog: str
) -> Any:
    """A command, which `make` builds around a run, with its fields set from arguments; --preset names the run."""
    import tyro

    check_words(arguments)
    command = make(preset(preset_in(arguments, default)))
    check_switches(arguments, command)
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(table_as_json)
    return tyro.cli(type(command), args=arguments, default=command, prog=prog, registry=registry)


def as_arguments(config: Config) -> list[str]:
    """The command-line arguments that `read_command` turns into this config."""
    arguments, defaults = ["--preset", config.preset], fields_of(preset(config.preset))
    for name, value in fields_of(config).items():
        if value != defaults[name]:
            arguments += as_flags(name, value)
    return arguments
