# Tangled from notebooks/22_config.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.lab.bounds import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    as_flags,
    check_ranges,
    check_value,
)


# %% The code
import dataclasses
import difflib
import importlib
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_type_hints

from speedrun.data.loader import DataOptions, check_options
from speedrun.lab.errors import Problem, check_words, visible
from speedrun.optim.adamw import AdamWOptions
from speedrun.model.embedding import EmbeddingOptions
from speedrun.model.gpt import GPTOptions, Switches
from speedrun.model.head import HeadOptions
from speedrun.model.mlp import BlockOptions
from speedrun.model.plan import PlanOptions
from speedrun.model.rotary import RotaryOptions
from speedrun.optim.adam import SharingOptions
from speedrun.optim.muon import MuonOptions
from speedrun.optim.newton_schulz import MatrixOptions
from speedrun.optim.schedule import ScheduleOptions

PresetName = Literal[
    "smoke",
    "cpu",
    "small",
    "record",
    "baseline",
    "record2",
    "record5",
    "record8",
    "record9",
    "record11",
]


# %% Every number has bounds
@dataclass(frozen=True)
class Config:
    """One training run. Every command takes these as flags: --model.layers 4 --steps 100."""

    preset: PresetName = "record"
    """Defaults of all other fields. smoke: 40 s; cpu, small: minutes; record; baseline, record2, 5, 8, 9, 11: of old."""
    architecture: Literal["gpt", "baseline"] = "gpt"
    """gpt: the package's model. baseline: the plain GPT-2 of chapter 03."""
    model: GPTOptions = field(default_factory=GPTOptions)
    """The shape of the model."""
    block: BlockOptions = field(default_factory=BlockOptions)
    """What a layer is made of."""
    rotary: RotaryOptions = field(default_factory=RotaryOptions)
    """How attention learns where tokens are."""
    embedding: EmbeddingOptions = field(default_factory=EmbeddingOptions)
    """What a token brings into the model."""
    plan: PlanOptions = field(default_factory=PlanOptions)
    """How the stream runs through the layers."""
    head: HeadOptions = field(default_factory=HeadOptions)
    """From the last vectors to the loss."""
    optim: AdamWOptions = field(default_factory=AdamWOptions)
    """The optimizer, and where its rate begins and ends."""
    matrix: MatrixOptions = field(default_factory=MatrixOptions)
    """Another rule for the matrices of the blocks."""
    muon: MuonOptions = field(default_factory=MuonOptions)
    """What has become of Muon, if that is the rule."""
    sharing: SharingOptions = field(default_factory=SharingOptions)
    """Whether ranks share the update."""
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    """How the rate gets from its peak to its end."""
    data: DataOptions = field(default_factory=DataOptions)
    """What a step reads."""
    steps: PositiveInt = 19_560
    """Optimizer steps; the schedule ends with the last."""
    max_steps: Annotated[NonNegativeInt, "0 runs them all"] = 0
    """Stop after this many steps of the same schedule; 0: run them all."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: on a GPU if PyTorch sees one."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """How ranks talk; auto: nccl between GPUs, gloo between CPUs. gloo also lets ranks share a GPU, slowly."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """bfloat16: matrix products under autocast, weights in float32."""
    compile: bool = True
    """Compile the forward and backward pass with torch.compile."""
    warmup: NonNegativeInt = 3
    """Untimed steps before the clock starts, undone afterwards: they compile and fill caches."""
    val_every: PositiveInt = 250
    """Steps between validations; the first is before step 0, the last after the last step."""
    val_tokens: PositiveInt = 10_485_760
    """Validation tokens, from the start of the validation stream."""
    log_every: PositiveInt = 10
    """Steps between log lines; each reads the loss from the device."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between checkpoints; 0: only at the end, and when interrupted."""
    target: PositiveFloat = 3.28
    """Validation loss (nats a token) that the run is to reach."""
    wandb: str = ""
    """Weights & Biases project to log to as well; empty: none."""

    @property
    def last_step(self) -> int:
        """The step at which this run stops: the schedule's end, or before it."""
        return min(self.max_steps or self.steps, self.steps)


def fields_of(config: Any, prefix: str = "") -> dict[str, Any]:
    """All fields of a config with their dotted names, nested ones included."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        nested = dataclasses.is_dataclass(value)
        flat |= fields_of(value, f"{prefix}{item.name}.") if nested else {prefix + item.name: value}
    return flat


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(n for n in range(min(limit, number), 0, -1) if number % n == 0)


def switches_of(config: Config) -> Switches:
    """The model's techniques, as the model takes them."""
    return Switches(config.block, config.rotary, config.embedding, config.plan, config.head)


def check_layers(config: Config) -> None:
    """Refuse to connect layers where there is one."""
    usual, fields = fields_of(Config()), fields_of(config)
    names = ("embedding.values", "plan.skips", "plan.backout", "plan.without")
    wants = [name for name in names if fields[name] != usual[name]]
    if wants and config.model.layers < 2:
        what = f"{', '.join(wants)}: this is between layers, and model.layers is 1"
        raise Problem(what, "--model.layers 2, or more")


def check_rules(config: Config) -> None:
    """Refuse optimizers that the run's model or its numbers do not fit."""
    muon, rule = config.muon, config.matrix.rule
    if muon.weights != "float32" and config.precision == "float32":
        what = f"muon.weights={muon.weights} in a model that computes in float32"
        raise Problem(what, "--muon.weights float32, or 16 bits for --precision as well")
    if config.sharing.on and (config.architecture, rule) != ("gpt", "muon"):
        what = f"sharing.on with matrix.rule={rule} and architecture={config.architecture}"
        raise Problem(what, "--matrix.rule muon and --architecture gpt: it updates banks by Muon")
    if config.sharing.on and config.compile and not config.matrix.iterations:
        what = "matrix.iterations=0 with sharing.on: the exact factor cannot be compiled"
        raise Problem(what, "--matrix.iterations 5, or --no-compile")
    if config.head.tied == "split" and not config.sharing.on:
        what = "head.tied=split: two matrices are kept equal by the optimizer that ranks share"
        raise Problem(what, "--sharing.on, or --head.tied tied")
    if config.architecture == "baseline" and switches_of(config) != Switches():
        what = "architecture=baseline is GPT-2, and has no switches"
        raise Problem(what, "--architecture gpt for what --block changes")
    if config.architecture == "baseline" and config.matrix != MatrixOptions():
        fix = "--architecture gpt: the plain one has no banks for --matrix.rule to update"
        raise Problem("there are no banks of matrices", fix)


def check_config(config: Config, world: int = 1) -> Config:
    """The config itself, after checking what can be known beforehand. world: ranks that will share it."""
    model, data = config.model, config.data
    check_ranges(config)
    micro = check_options(data, world)
    if data.mode == "documents":
        what = "data.mode=documents: this model's attention cannot keep documents apart"
        raise Problem(what, "--data.mode stream")
    if data.seq_len > model.context:
        what = f"rows of {data.seq_len} tokens (data.seq_len) do not fit {model.context} positions (model.context)"
        raise Problem(what, f"--data.seq-len {model.context}, or --model.context {data.seq_len}")
    if model.width % model.heads:
        what = f"a width of {model.width} cannot be shared by {model.heads} heads"
        raise Problem(what, f"--model.heads {largest_divisor(model.width, model.heads)}")
    if config.rotary.positions != "learned" and model.width // model.heads % 4:
        what = f"heads of {model.width // model.heads} numbers cannot be taken in pairs to turn, and half of those"
        raise Problem(what, "a --model.width of 4 times --model.heads, or a multiple")
    check_rules(config)
    check_layers(config)
    if config.val_tokens < world * micro:
        what = f"val_tokens={config.val_tokens} are less than a micro-batch of {micro} for each of {world} ranks"
        raise Problem(what, f"--val-tokens {world * micro} or more")
    return config


# %% Five runs
EMBEDDED = DataOptions(path="data/embedded", seq_len=128, step_tokens=1024, grad_shards=2)
FINEWEB = DataOptions(path="data/fineweb10B")
SAVED_EVERY = 1000  # steps of a run that takes hours on few GPUs
LAPTOP = Config(
    preset="cpu",
    model=GPTOptions(layers=2, heads=2, width=128, context=128, init_std=0.05),
    optim=AdamWOptions(lr=2e-3, warmup_steps=100),
    data=EMBEDDED,
    steps=8000,
    precision="float32",
    compile=False,
    val_every=1000,
    val_tokens=262_144,
    log_every=50,
    target=1.55,
)
SMOKE: dict[str, Any] = {
    "preset": "smoke",
    "steps": 600,
    "compile": False,
    "val_every": 200,
    "val_tokens": 65_536,
}
TODAY = MuonOptions(
    polynomials="polar_express",
    products="float16",
    gram=True,
    beta2=0.9,
    decay="cautious",
    low_momentum=0.85,
    wide_factor=4.0,
    weights="split",
)
PRESETS = {
    "smoke": dataclasses.replace(LAPTOP, **SMOKE, target=2.75),
    "cpu": LAPTOP,
    "small": Config(
        preset="small",
        model=GPTOptions(layers=8, heads=8, width=512, init_std=0.025),
        optim=AdamWOptions(lr=4e-3, warmup_steps=100),
        matrix=MatrixOptions(rule="muon", lr=0.016),
        muon=TODAY,
        schedule=ScheduleOptions(shape="trapezoid"),
        data=dataclasses.replace(FINEWEB, step_tokens=65_536, pass_tokens=32_768),
        steps=1520,
        val_every=190,
        val_tokens=4_194_304,
        log_every=20,
        target=4.0,
    ),
    "record": Config(preset="record", data=FINEWEB, checkpoint_every=SAVED_EVERY),
}
HISTORY = ("baseline", "record2", "record5", "record8", "record9", "record11")


# %% The rungs of history
def preset(name: str) -> Config:
    """A run by its name: one of the presets, or a rung of history."""
    if name in PRESETS:
        return PRESETS[name]
    if name in HISTORY:
        return importlib.import_module("speedrun.history").RUNGS[name]
    names = [*PRESETS, *HISTORY]
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise Problem(f"there is no preset “{name}”", f"{hint}Known are {', '.join(names)}")


# %% Varying
def no_field(name: str, known: dict[str, Any], prefix: str) -> Problem:
    """What to say about a name that no field has."""
    inside = [prefix + other for other in known if other.startswith(f"{name}.")]
    near = difflib.get_close_matches(name, known, 1)
    if inside:
        fix = f"it is a group: vary its fields, such as {inside[0]}"
    else:
        fix = f"did you mean {prefix}{near[0]}?" if near else f"the fields are {', '.join(known)}"
    return Problem(f"a run has no field “{prefix}{name}”", fix)


def vary(config: Any, changes: dict[str, Any], prefix: str = "") -> Any:
    """A copy of a config with some fields changed, by dotted name: vary(run, {"model.layers": 3, "seed": 1})."""
    known = fields_of(config)
    for name, value in changes.items():
        if name not in known:
            raise no_field(name, known, prefix)
        head, _, rest = name.partition(".")
        if not rest:
            kinds = get_type_hints(type(config), include_extras=True)
            check_value(prefix + name, value, kinds[head], getattr(config, head))
        inner = f"{prefix}{head}."
        new = vary(getattr(config, head), {rest: value}, inner) if rest else value
        config = dataclasses.replace(config, **{head: new})
    return config


# %% Any run, on a laptop
MODEL_SIZES = [f"model.{name}" for name in ("layers", "heads", "width", "context", "init_std")]
DATA_SIZES = [
    "data.path",
    "data.seq_len",
    "data.step_tokens",
    "data.grad_shards",
    "data.pass_tokens",
]
NUMBERS = ("precision", "muon.weights", "muon.products", "muon.gram")
SIZES = (*MODEL_SIZES, *DATA_SIZES, *NUMBERS)
RAMPS = ("optim.warmup_steps", "muon.momentum_steps")  # steps in which something rises or falls


def scaled(count: int, whole: int, steps: int) -> int:
    """A count of steps out of `whole` as one out of `steps`: at least three if there are any, and at most a quarter."""
    return min(max(round(count * steps / whole), 3), max(1, steps // 4)) if count else 0


def at_cpu_size(config: Config, steps: int = 20) -> Config:
    """The same decisions at the cpu preset's widths, vocabulary and lengths, with all of the schedule in a few steps."""
    laptop, own = fields_of(preset("cpu")), fields_of(config)
    changes = {name: laptop[name] for name in SIZES}
    changes |= {"steps": steps, "max_steps": 0, "val_every": steps, "val_tokens": 16_384}
    for name in RAMPS:
        if isinstance(own[name], tuple):
            changes[name] = tuple(scaled(count, config.steps, steps) for count in own[name])
        else:
            changes[name] = scaled(own[name], config.steps, steps)
    return vary(config, changes)


# %% Saved, and said
# dotted name → what a run saved before the field existed has for it
ABSENT: dict[str, Any] = {"matrix": MatrixOptions(), "schedule": ScheduleOptions()}
ABSENT |= {"muon": MuonOptions(), "data.pass_tokens": 0, "sharing": SharingOptions()}
ABSENT |= {"block": BlockOptions(), "rotary": RotaryOptions(), "head": HeadOptions()}
ABSENT |= {"embedding": EmbeddingOptions(), "plan": PlanOptions()}
ABSENT |= {"muon.products": MuonOptions().products, "muon.gram": False}
OTHER_CODE = (
    "check out the commit that its log names; if the file was changed, use another checkpoint"
)


def absent_values(saved: Any, kind: type, prefix: str) -> dict[str, Any]:
    """What stands for the fields that a saved group lacks. Refuses a group with others, and what is no group."""
    if not isinstance(saved, dict):
        what = f"the saved {prefix[:-1] or 'config'} is no group of fields: {reprlib.repr(saved)}"
        raise Problem(what, OTHER_CODE)
    names = [item.name for item in dataclasses.fields(kind)]
    unknown = sorted(map(str, set(saved) - set(names)))
    if unknown:
        what = f"the saved run has fields that today's {kind.__name__} lacks: {visible(', '.join(unknown))}"
        raise Problem(what, OTHER_CODE)
    later = {name: prefix + name for name in names if name not in saved}
    lost = [name for name in later.values() if name not in ABSENT]
    if lost:
        what = f"the saved run lacks fields of today's {kind.__name__}: {', '.join(lost)}"
        raise Problem(what, OTHER_CODE)
    return {name: ABSENT[full] for name, full in later.items()}


def config_from_json(saved: Any, kind: Any = Config, prefix: str = "") -> Any:
    """Rebuild a config from its `dataclasses.asdict` form after a trip through JSON; Problem for anything else."""
    values = absent_values(saved, kind, prefix)
    kinds = get_type_hints(kind)
    for name, value in saved.items():
        if dataclasses.is_dataclass(kinds[name]):
            value = config_from_json(value, kinds[name], f"{prefix}{name}.")
        values[name] = tuple(value) if isinstance(value, list) else value
    config = kind(**values)
    try:
        check_ranges(config, prefix)
    except Problem as problem:
        raise Problem(f"the saved {problem.what}", OTHER_CODE) from None
    return config


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
                raise Problem(what, " or ".join(both))


def read_command(
    make: Callable[[Config], Any], arguments: list[str], default: str, prog: str
) -> Any:
    """A command, which `make` builds around a run, with its fields set from arguments; --preset names the run."""
    import tyro

    check_words(arguments)
    command = make(preset(preset_in(arguments, default)))
    check_switches(arguments, command)
    return tyro.cli(type(command), args=arguments, default=command, prog=prog)


def as_arguments(config: Config) -> list[str]:
    """The command-line arguments that `read_command` turns into this config."""
    arguments, defaults = ["--preset", config.preset], fields_of(preset(config.preset))
    for name, value in fields_of(config).items():
        if value != defaults[name]:
            arguments += as_flags(name, value)
    return arguments
