# Tangled from notebooks/22_config.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.lab.bounds import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_ranges,
    check_value,
)


# %% The code
import dataclasses
import difflib
import reprlib
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from speedrun.data.loader import DataConfig, check_options
from speedrun.lab.errors import UserError, visible
from speedrun.model.gpt import GPTConfig
from speedrun.optim.state import OptimConfig
from speedrun.schedule import Schedule, ScheduleConfig, Stage, check_schedule


# %% Validation: bounds in the types
@dataclass(frozen=True)
class Config:
    """One training run. Every command takes these as flags: --model.num-layers 4 --steps 100."""

    preset: str = "record1"
    """The run that all other fields are taken from; a name that is not known is answered with those that are."""
    model: GPTConfig = field(default_factory=GPTConfig)
    """The model."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """What changes from step to step."""
    data: DataConfig = field(default_factory=DataConfig)
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
    """Untimed steps of each stage before the clock starts, undone afterwards: they compile, fill caches and record CUDA graphs. 0: passes are launched by Python."""
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


def check_model(model: GPTConfig) -> None:
    """Raise UserError for heads that cannot share the width or be turned, and for connections between layers where there is one."""
    size, rest = divmod(model.model_dim, model.num_heads)
    if rest:
        raise UserError(
            f"a width of {model.model_dim} cannot be shared by {model.num_heads} heads",
            f"--model.num-heads {largest_divisor(model.model_dim, model.num_heads)}",
        )
    if model.rotary.pos != "learned" and size % 4:
        raise UserError(
            f"heads of {size} numbers cannot be taken in pairs to turn, and half of those",
            "a --model.model-dim of 4 times --model.num-heads, or a multiple",
        )
    usual, fields = fields_of(GPTConfig(), "model."), fields_of(model, "model.")
    names = ("embedding.values", "layout.skips", "layout.backout", "layout.skip_sublayers")
    wants = [n for n in (f"model.{name}" for name in names) if fields[n] != usual[n]]
    if wants and model.num_layers < 2:
        raise UserError(
            f"{', '.join(wants)}: this is between layers, and model.num_layers is 1",
            "--model.num-layers 2, or more",
        )


def check_optim(optim: OptimConfig, precision: str) -> None:
    """Raise UserError for 16-bit weights in a model that computes in float32, and for two meanings of one decay."""
    dtype = optim.muon.param_dtype
    if dtype != "float32" and precision == "float32":
        what = f"optim.muon.param_dtype={dtype} in a model that computes in float32"
        raise UserError(
            what, "--optim.muon.param-dtype float32, or 16 bits for --precision as well"
        )
    if optim.matrices == "soap" and optim.adam.cautious:
        raise UserError(
            "optim.matrices=soap with optim.adam.cautious: SOAP decays as AdamW does",
            "--optim.adam.no-cautious, or --optim.matrices muon",
        )


def check_fp8(config: Config) -> None:
    """Raise UserError for an FP8 head or MLP that the kernels are not made for, and for candidates without such a head."""
    head, candidates = config.model.head, [s.candidates for s in config.schedule.stages]
    if head.fp8 and (head.tie == "tied" or head.softcap != "sigmoid23"):
        what = (
            f"model.head.fp8 with model.head.tie={head.tie} and model.head.softcap={head.softcap}"
        )
        fix = "--model.head.tie until_step --model.head.softcap sigmoid23; or --model.head.no-fp8"
        raise UserError(what, fix)
    if any(candidates) and not head.fp8:
        what = "schedule.stages with candidates, and no model.head.fp8: the softmax runs over all words there"
        raise UserError(what, "--model.head.fp8, or leave candidates out")
    block = config.model.block
    if block.fp8 and (block.norm, block.biases, block.activation) != ("rms", False, "relu2"):
        what = f"model.block.fp8 with norm={block.norm}, biases={block.biases}, activation={block.activation}"
        fix = "--model.block.norm rms --model.block.no-biases --model.block.activation relu2; or --model.block.no-fp8"
        raise UserError(what, fix)
    if odd := [n for n in candidates if n % 16]:
        what = f"schedule.stages with candidates of {odd[0]}: matrix units want a multiple of 16"
        raise UserError(what, f"{odd[0] + 16 - odd[0] % 16}")


def check_documents(config: Config) -> None:
    """Raise UserError for windows in rows that are no documents, and for documents in a model whose positions end."""
    windows = [stage.windows for stage in config.schedule.stages]
    if config.data.mode == "stream":
        if any(any(pair) for pair in (*windows, config.schedule.val_windows)):
            raise UserError(
                "windows in the schedule, and data.mode=stream: rows of the stream are seen whole",
                "--data.mode documents or packed, or no windows",
            )
        if (backend := config.model.attention.backend) != "auto":
            raise UserError(
                f"model.attention.backend={backend}, and data.mode=stream: PyTorch computes attention in rows of the stream",
                "--model.attention.backend auto; or --data.mode documents or packed",
            )
    elif config.model.rotary.pos == "learned":
        raise UserError(
            f"data.mode={config.data.mode} and {config.model.rotary.pos} positions: there are positions for model.max_seq_len tokens only",
            "--model.rotary.pos rope, or --data.mode stream",
        )
    dtype = config.model.layout.stream_dtype
    if dtype != "float32" and config.precision == "float32":
        what = f"model.layout.stream_dtype={dtype} in a model that computes in float32"
        raise UserError(
            what, "--model.layout.stream-dtype float32, or 16 bits for --precision as well"
        )
    check_fp8(config)
    if config.model.attention.yarn and not all(long for _, long in windows):
        raise UserError(
            "model.attention.yarn, and a stage without a long window: there is nothing to follow",
            "--model.attention.no-yarn, or windows in every stage",
        )


def check_config(config: Config, world: int = 1) -> Config:
    """The config itself, after checking what can be known beforehand. world: ranks that will share it."""
    check_ranges(config)
    micro, data, context = check_options(config.data, world), config.data, config.model.max_seq_len
    check_documents(config)
    if data.mode == "stream" and data.seq_len > context:
        what = f"rows of {data.seq_len} tokens (data.seq_len) do not fit {context} positions (model.max_seq_len)"
        raise UserError(what, f"--data.seq-len {context}, or --model.max-seq-len {data.seq_len}")
    check_model(config.model)
    check_optim(config.optim, config.precision)
    check_schedule(config.schedule, config.steps)
    for name in ("mtp_weights", "prefix_weight"):  # what no model of ours has yet
        if any(getattr(stage, name) != getattr(Stage(), name) for stage in config.schedule.stages):
            what = f"schedule.stages with {name}: this model has no such thing"
            raise UserError(what, f"leave {name} out")
    if config.val_tokens < world * micro:
        what = f"val_tokens={config.val_tokens} are less than a micro-batch of {micro} for each of {world} ranks"
        raise UserError(what, f"--val-tokens {world * micro} or more")
    return config


def schedule_of(config: Config) -> Schedule:
    """A run's settings as functions of the step."""
    adam, muon, data = config.optim.adam, config.optim.muon, config.data
    peaks = (adam.lr, config.optim.matrix_lr or adam.lr, muon.momentum)
    return Schedule(config.schedule, config.steps, *peaks, data.batch_tokens, data.max_doc_tokens)


# %% Overrides: `vary`
def no_field(name: str, known: dict[str, Any], prefix: str) -> UserError:
    """What to say about a name that no field has."""
    inside = [prefix + other for other in known if other.startswith(f"{name}.")]
    near = difflib.get_close_matches(name, known, 1)
    if inside:
        fix = f"it is a group: vary its fields, such as {inside[0]}"
    else:
        fix = f"did you mean {prefix}{near[0]}?" if near else f"the fields are {', '.join(known)}"
    return UserError(f"a run has no field “{prefix}{name}”", fix)


def vary(config: Any, changes: dict[str, Any], prefix: str = "") -> Any:
    """A copy of a config with some fields changed, by dotted name: vary(run, {"model.num_layers": 3, "seed": 1})."""
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


# %% JSON and the command line
ALWAYS = ("preset", "model", "optim", "schedule", "data", "steps", "seed")  # in every saved run
OTHER_CODE = (
    "check out the commit that its log names; if the file was changed, use another checkpoint"
)


def value_from_json(value: Any, kind: Any, prefix: str) -> Any:
    """A field's value: groups, and rows of a table, as the dataclasses that they were, lists as tuples."""
    if dataclasses.is_dataclass(kind):
        return config_from_json(value, kind, prefix)
    if not isinstance(value, list):
        return value
    kinds = get_args(kind) if get_origin(kind) is tuple else ()
    if kinds[1:] == (...,):
        kinds = kinds[:1] * len(value)
    rows = enumerate(zip(value, kinds))
    known = tuple(value_from_json(row, of, f"{prefix}{n}.") for n, (row, of) in rows)
    return known + tuple(value[len(known) :])


def config_from_json(saved: Any, kind: Any = Config, prefix: str = "") -> Any:
    """Rebuild a config from its `dataclasses.asdict` form after a trip through JSON; UserError for anything else."""
    if not isinstance(saved, dict):
        what = f"the saved {prefix[:-1] or 'config'} is no group of fields: {reprlib.repr(saved)}"
        raise UserError(what, OTHER_CODE)
    kinds, values = get_type_hints(kind), dict[str, Any]()
    lost = [name for name in ALWAYS if kind is Config and name not in saved]
    if lost:
        raise UserError(f"the saved run lacks {', '.join(lost)}", OTHER_CODE)
    unknown = sorted(map(str, set(saved) - set(kinds)))
    if unknown:
        what = f"the saved run has fields that today's {kind.__name__} lacks: {visible(', '.join(unknown))}"
        raise UserError(what, OTHER_CODE)
    for name, value in saved.items():
        values[name] = value_from_json(value, kinds[name], f"{prefix}{name}.")
    config = kind(**values)
    try:
        check_ranges(config, prefix)
    except UserError as problem:
        raise UserError(f"the saved {problem.what}", OTHER_CODE) from None
    return config
