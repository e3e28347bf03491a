# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Configuration and presets: one table of runs
#
# ```{admonition} Cost box
# Any machine: about twenty seconds; there is nothing for a GPU to do. The historic recipes are those of record 1 (Andrej Karpathy and the contributors of llm.c), record 2 (\@kellerjordan0), records 5, 8 and 9 (\@Grad62304977, \@kellerjordan0), record 11 (\@brendanh0gan), records 12, 14 and 18 (\@KoszarskyB), record 13 (\@fernbear.bsky.social), record 15 (\@leloykun, \@YouJiacheng), records 16, 17 and 19 (\@YouJiacheng), record 20 (\@leloykun, \@fernbear.bsky.social, \@YouJiacheng, \@brendanh0gan, \@scottjmaddox, \@Grad62304977), record 21 (\@leloykun), record 29 (\@varunneal), record 30 (\@EmelyanenkoK) and record 31 (\@classiclarryd). What `record` draws on is credited in the chapters of its techniques.
# ```
#
# ## The problem
#
# A trainer with 25 techniques, each of which can be on or off, is **33,554,432 programs**. Its author has run perhaps five of them. The contest's own answer is radical and honest: keep one program, delete whatever is off, and let history
# live in the git log. That makes the record short and comparisons miserable, because to ask what an idea of last spring is worth *today* you must first transplant it by hand.
#
# The usual answer is worse: a hundred global flags, read wherever somebody needed one, with defaults in three places. Soon nobody can say what a run *was*. The command line in the shell history is half of it; the defaults of that day, which are gone, are the other half.

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
assert 2**25 == 33_554_432

# %% [markdown]
# ```{admonition} Prediction
# This chapter defines twenty-one ways to run the trainer, from a minute on a laptop to record 1: llm.c's recipe, forty-five minutes on eight H100s. A run has more than ninety fields. **In how many of them does a GPT-2 for a laptop differ from record 1?** And in how many does record 11, which took seven minutes?
# ```
#
# ## The idea
#
# A run is a **value**. It is made of small frozen dataclasses, each exported by the chapter that explains its fields. There are four groups: the model, its shape ([chapter 21](21_model.py)) and in it the block ([05](05_modern_block.py)), rotary positions ([06](06_rotary.py)), embedding and layout ([07](07_plumbing.py)), attention ([09](09_flex_attention.py) to [11](11_attention_backends.py)), and head ([08](08_logits.py)); the optimizer ([20](20_many_gpus.py)), and in it Adam and [Muon](13_muon.py); the schedule ([14](14_schedule.py)); and what the data loader reads ([02](02_data.py)). This chapter puts them side by side and adds what belongs to the run as a whole. Being a value,
# it can be printed, compared, saved in the log, and varied: *this run, but with that field changed* is an expression, and an ablation is a list of such expressions.
#
# Three rules keep it honest. A module reads only its own options, so that one can tell from a signature what a function depends on. A field that is off leaves nothing behind in the compiled program, so that turning a technique off measures its absence and not the presence of an `if`. (The chapter of each technique asserts it.) And the vocabulary is *not* here: it is a property of the text and stands in the
# text's manifest, where no run can get it wrong.
#
# Why values in Python and not a YAML file? Because a misspelt field is then an error in the line that misspells it; because a value can be varied, compared and tested without a parser; and for a smaller reason:

# %%
import yaml

assert yaml.safe_load("lr: 6e-4") == {"lr": "6e-4"}, "to PyYAML this rate is a string"

# %% [markdown]
# ## The code

# %%
#| default_exp config
#| export
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

# %% [markdown]
# ### Validation: bounds in the types
#
# A trainer takes any number that it is given. With `--optim.grad-clip -1` ours turned every gradient round, trained thirty steps uphill and said “finished”, as others had done before it ([pytorch#31367](https://github.com/pytorch/pytorch/issues/31367), [torchtitan#4295](https://github.com/pytorch/torchtitan/pull/4295)). And a learning rate that is not a number passes a test that says `if lr <= 0: refuse`, because every comparison with NaN is false.
#
# A table of bounds beside the options is forgotten when a field is added. So the bounds stand in the field's type, as `Annotated` metadata in the vocabulary of `annotated_types`, where property tests find them, too. A bound names what must *hold*, which for NaN nothing does, and there is one on either side, which excludes infinity. What more than one field needs has a name, Pydantic's where it has one:


# %%
#| export lab.bounds
import dataclasses
import json
import operator
import reprlib
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Interval

from speedrun.lab.errors import UserError

PositiveInt = Annotated[int, Interval(ge=1, le=2**63 - 1)]
NonNegativeInt = Annotated[int, Interval(ge=0, le=2**63 - 1)]
PositiveFloat = Annotated[float, Interval(ge=1e-20, le=1e9)]  # in float32 1e-50 would be zero
NonNegativeFloat = Annotated[float, Interval(ge=0, le=1e9)]
Beta = Annotated[float, Interval(ge=0, lt=1)]
"""What a running mean keeps of itself in a step."""
Share = Annotated[float, Interval(gt=0, le=1)]

HOLDS = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "more than"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "less than"),
}


def unmet(value: Any, kind: Any) -> list[str]:
    """What a field's type asks of a value and the value is not, in words; nothing: it is allowed."""
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return [] if isinstance(value, str) and value in parts else [" or ".join(parts)]
    if get_origin(kind) is tuple:
        if parts[-1] is ...:  # as many as there are
            if type(value) is not tuple:
                return ["a list"]
            parts = parts[:1] * len(value)
        if type(value) is not tuple or len(value) != len(parts):
            return [f"{len(parts)} values"]
        return [words for one, of in zip(value, parts) for words in unmet(one, of)]
    if get_origin(kind) is Annotated:
        return unmet(value, parts[0]) or [
            f"{words} {limit:.9g}"
            for bound in parts[1:]
            for key, (holds, words) in HOLDS.items()
            if (limit := getattr(bound, key, None)) is not None and not holds(value, limit)
        ]
    right = isinstance(value, int | float if kind is float else kind)
    return (
        [] if right and isinstance(value, bool) == (kind is bool) else [f"of type {kind.__name__}"]
    )


# %%
assert unmet(0.5, Beta) == unmet(3, PositiveInt) == unmet(1, float) == unmet((0, 0.9), tuple[Beta, Beta]) == []  # fmt: skip
assert unmet(1.0, Beta) == ["less than 1"] and unmet(0.0, PositiveFloat) == ["at least 1e-20"]
assert unmet(10**30, NonNegativeInt) == ["at most 9.22337204e+18"]
assert len(unmet(float("nan"), Share)) == 2 and unmet(float("inf"), NonNegativeFloat)
assert unmet(True, PositiveInt) == unmet(1.0, PositiveInt) == ["of type int"]
assert unmet(["cpu"], Literal["cpu", "cuda"]) == ["cpu or cuda"]

# %% [markdown]
# A message says the field, the value, what it must be, and the flag with a value that is allowed:


# %%
#| export lab.bounds
def as_flags(name: str, value: Any) -> list[str]:
    """A field and its value as command-line arguments: --optim.adam.betas 0.9 0.95, --no-compile."""
    *groups, last = name.replace("_", "-").split(".")
    if isinstance(value, bool):
        return ["--" + ".".join([*groups, last if value else f"no-{last}"])]
    values = value if isinstance(value, tuple) else [value]
    if values and dataclasses.is_dataclass(values[0]):  # a table is one value
        values = [json.dumps([dataclasses.asdict(row) for row in values])]
    return ["--" + ".".join([*groups, last]), *map(str, values)]


def check_value(name: str, value: Any, kind: Any, usual: Any) -> None:
    """Refuse a value that a field's type does not allow. usual: one that it does."""
    wrong = dict.fromkeys(unmet(value, kind))  # each once
    if wrong:
        notes = [note for note in getattr(kind, "__metadata__", ()) if isinstance(note, str)]
        what = f"{name}={reprlib.repr(value)} is not allowed: it must be {' and '.join(wrong)}"
        in_table = any(part.isdigit() for part in name.split("."))
        way = f"{name}={usual!r}" if in_table else " ".join(as_flags(name, usual))
        raise UserError(what, "; ".join([f"{way}, say", *notes]))


def check_ranges(options: Any, prefix: str = "") -> None:
    """Refuse the first value of an options dataclass, nested ones included, that its field's type does not allow."""
    for name, kind in get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, name)
        if dataclasses.is_dataclass(kind):
            check_ranges(value, f"{prefix}{name}.")
            continue
        check_value(prefix + name, value, kind, getattr(type(options), name, value))
        for number, row in enumerate(value if isinstance(value, tuple) else ()):
            if dataclasses.is_dataclass(row):
                check_ranges(row, f"{prefix}{name}.{number}.")


# %%
from speedrun.optim.adam import AdamConfig

for group, nonsense in {
    OptimConfig: {"grad_clip": -1.0},
    AdamConfig: {"lr": float("nan"), "betas": (0.9, 2.0), "eps": "small"},
    ScheduleConfig: {"cooldown_frac": 60.0},
    GPTConfig: {"num_layers": 10**30},
}.items():
    check_ranges(group())
    for name, value in nonsense.items():
        try:
            check_ranges(group(**{name: value}), "group.")
            raise AssertionError("accepted")
        except UserError as problem:
            assert f"group.{name}=" in problem.what
            print(problem)


# %% [markdown]
# A run has its four groups, and fields of its own:


# %%
#| export
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


# %% [markdown]
# Other mistakes are made of two fields, each of which would do by itself: a width that the heads cannot share, rows that are longer than the model's context. Those that can be seen without a GPU, without data and before an hour has passed are looked for first, and each is said in words, with the flag that mends it:


# %%
#| export
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


# %%
flat = fields_of(Config())
assert (
    flat["model.num_layers"] == 12
    and flat["optim.adam.betas"] == (0.9, 0.95)
    and "model" not in flat
)
assert largest_divisor(768, 13) == 12
stops = [(Config(steps=50, max_steps=most).last_step) for most in (0, 20, 80)]
assert stops == [50, 20, 50]


# %%
#| export
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


# %%
#| export
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


# %%
#| export
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


# %%
#| export
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


# %% [markdown]
# The functions of the step that [chapter 14](14_schedule.py) has made of a schedule take their peaks from the optimizer, and their batch from the loader:


# %%
#| export
def schedule_of(config: Config) -> Schedule:
    """A run's settings as functions of the step."""
    adam, muon, data = config.optim.adam, config.optim.muon, config.data
    peaks = (adam.lr, config.optim.matrix_lr or adam.lr, muon.momentum)
    return Schedule(config.schedule, config.steps, *peaks, data.batch_tokens, data.max_doc_tokens)


# %%
assert schedule_of(Config()).tokens_before(19_560) == 19_560 * 524_288
assert schedule_of(Config()).at(700).lr == Config().optim.adam.lr

# %%
from speedrun.model.head import HeadConfig
from speedrun.model.layout import LayoutConfig
from speedrun.model.mlp import BlockConfig

assert check_config(Config()) == Config()
wrong = [
    Config(data=DataConfig(seq_len=2048)),
    Config(model=GPTConfig(num_heads=13)),
    Config(val_tokens=1000),
    Config(data=DataConfig(mode="documents")),
    Config(schedule=ScheduleConfig(stages=(Stage(windows=(128, 384)),))),
    Config(model=GPTConfig(num_layers=1, layout=LayoutConfig(backout=True))),
    Config(schedule=ScheduleConfig(stages=(Stage(0.5),))),
    Config(schedule=ScheduleConfig(stages=(Stage(prefix_weight=(0.25, 0.0)),))),
    Config(schedule=ScheduleConfig(stages=(Stage(candidates=1024),))),
    Config(model=GPTConfig(head=HeadConfig(fp8=True))),
    Config(model=GPTConfig(block=BlockConfig(fp8=True))),
]
for config in wrong:
    try:
        check_config(config)
        raise AssertionError("accepted")
    except UserError as problem:
        print(problem)
eight_bits = HeadConfig("until_step", softcap="sigmoid23", fp8=True)  # what the last one advises
advised = Config(model=GPTConfig(head=eight_bits))
assert check_config(advised) == advised

# %% [markdown]
# ### Overrides: `vary`
#
# `vary` takes a run and a dict of dotted names. It refuses what does not exist, because an ablation that silently changes nothing is the most convincing null result there is. It refuses what the field's type does not allow, for the same reason: `"no"` is true, and a precision called `bf16` would train in 32 bits, because the code asks for `bfloat16`.


# %%
#| export
def no_field(name: str, known: dict[str, Any], prefix: str) -> UserError:
    """What to say about a name that no field has."""
    inside = [prefix + other for other in known if other.startswith(f"{name}.")]
    near = difflib.get_close_matches(name, known, 1)
    if inside:
        fix = f"it is a group: vary its fields, such as {inside[0]}"
    else:
        fix = f"did you mean {prefix}{near[0]}?" if near else f"the fields are {', '.join(known)}"
    return UserError(f"a run has no field “{prefix}{name}”", fix)


# %%
#| export
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


# %%
changed = vary(Config(), {"model.num_layers": 3, "optim.adam.lr": 1, "seed": 7})
assert changed.model.num_layers == 3 and changed.seed == 7 and changed.model.model_dim == 768
assert Config().model.num_layers == 12, "the original is untouched"
mistakes = ({"model.num_layer": 3}, {"compile": "no"}, {"model": 3}, {"precision": "bf16"})
for nonsense in (*mistakes, {"num_layers": 3}, {"optim.adam.betas": ("a", "b")}):
    try:
        vary(Config(), nonsense)
        raise AssertionError("accepted")
    except UserError as problem:
        print(problem)

# %% [markdown]
# ### Presets
#
# A preset is a name, another run that it starts from, and what it changes: a row of data. Whatever it does not say is GPT-2 as llm.c trains it. So to know what a run has turned on, read its rows.
#
# `small` is a run for one GPU and a coffee, `cpu` for a laptop and five minutes, `smoke` for [the page](24_speedrun.py) on which this book trains while you read. `cpu_gpt2` is llm.c's recipe for the laptop, and the run to which the chapters add one idea at a time; `small_gpt2` is GPT-2 under Muon for one GPU, on which [chapter 13](13_muon.py) compares optimizers. The targets of the small runs, 1.15, 1.55 and 2.75 on the embedded text, are a little above what they reach; 4.0 for `small` was set before it had been run on FineWeb, and leaves room. `record` is the best that these chapters give together, at the contest's size: whole documents, windows and batches that grow, eleven layers, value tables, gates, record 89's Muon, an MLP with products in eight bits ([chapter 18](18_fused_mlp.py)), norm and rotation in one kernel ([chapter 17](17_norm_and_rotary.py)), and [chapter 19](19_head_and_loss.py)'s loss: in eight bits, and in the first two thirds of the run over a sample of the vocabulary. On a GPU its passes are compiled in parts and replayed from CUDA graphs ([chapter 16](16_compile.py)). Why it has 2,100 steps, and what it should reach with them, is a prediction, which [chapter 24](24_speedrun.py) makes. `record_200m` is the same for 200 million tokens, in which ideas can be compared at full size within minutes. The historic runs would take one GPU of the contest's kind twenty minutes to six hours, if it did the work of eight in eight times the official time, and save a checkpoint every thousand steps, off the clock, so that a power cut costs minutes.
#
# `small` is `record_200m` with half the tokens in a batch, and eight layers of width 512, with its MLP in bfloat16, and with the schedule that `record_200m` had when `small` was measured: most of its last third, too, runs over a sample of the vocabulary. `cpu` is `record` made smaller still. It has the same techniques, but for head and MLP in eight bits, which a CPU would only imitate, and the softmax over a sample that comes with that head: in three layers of width 128 instead of eleven of 768, all with attention; windows of 64 to 512 tokens; documents cut at 256, 512, and then 1,024 tokens; and batches of 1,024, doubled for the last third of its 1,600 steps.
#
# The laptop's GPT-2, `cpu_gpt2`, is not record 1 made small. Its batches are small because what a short run lacks is *steps*: 1,024 tokens and eight thousand updates, where record 1 takes half a million tokens and twenty thousand. Its rows are short, its rate is three times as high. It does not compile, since it would spend a good part of its five minutes on that. And its initial deviation is 0.05: GPT-2's 0.02 belongs to a width of 768, and the usual rule lets it fall with the root of the width. Those are arguments, and arguments are cheap; the end of this chapter measures them.

# %%
#| default_exp presets
#| export
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

# %% [markdown]
# ### Presets of historic records
#
# The configurations of historic records, as far as the package has their techniques, are data too, in a module of their own, which is read only when a run starts from one of them. Each names only what differs from the one that it starts from. Record 2 is GPT-2 with [rotary positions](06_rotary.py), norms without parameters and no biases, at a tuned rate of AdamW. Record 5 has Muon and the rest of [a modern block](05_modern_block.py); its $0.1 \cdot 0.0036 \sqrt{\max(\text{rows}, \text{cols})}$ is a rate of 0.01 for square matrices of 768 and twice that for wide and tall ones. Records 8, 9 and 11 brought [a head of its own and a cap](08_logits.py), and [the plumbing](07_plumbing.py). Each of the parameters that Adam updates there has a rate of its own, which is said as a multiple of `optim.adam.lr`: record 8's embedding trained at 0.3, its head at 0.002. Up to there all read FineWeb in rows of 1,024. Record 12 brought [FlexAttention](09_flex_attention.py) over rows of 65,536, and trains through it here, too, as do all up to record 20. Records 13 and 31 made [windows widen](10_windows_and_yarn.py), and record 29 packs whole documents, for FlashAttention. Two things that these runs lack, an FP8 head and a gate, are named where they belong; record 10's 16-bit activations, which all later records kept, are on in none of these. From record 16 on the contest's window was counted in blocks of 128 keys, and so reached half a block less far, on average, than a window in tokens does. Initial values that no record names are this package's.

# %%
#| default_exp history
#| export
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


# %%
#| export presets
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


# %% tags=["hide-input"]
import math
import sys

from speedrun.lab.results import public_table
from speedrun.model.gpt import param_specs
from speedrun.optim.state import assign_optimizers

sys.modules.pop("speedrun.history", None)
assert preset("cpu_gpt2").model.num_layers == 2 and "speedrun.history" not in sys.modules
assert preset("record1") == vary(Config(), {"data.path": FINEWEB, "checkpoint_every": 1000})
assert "speedrun.history" in sys.modules
for name in known_presets():
    assert check_config(preset(name)).preset == name
targets = {name: preset(name).target for name in ("cpu", "cpu_gpt2", "smoke", "small")}
assert targets == {"cpu": 1.15, "cpu_gpt2": 1.55, "smoke": 2.75, "small": 4.0}
for name in PRESETS:
    model = preset(name).model  # where matrices start by their columns, the deviation is the head's
    usual = 0.005 if model.block.fan_in_init else 0.02 * math.sqrt(768 / model.model_dim)
    usual = 0.02 if name == "cpu" else usual  # narrower, and tried: 0.005 was worse there
    assert abs(usual - model.init_std) < 0.002
rows = {f"record{row['record']}": row for row in public_table("records") if row["contributors"]}
hours = {}  # on one GPU instead of eight
for name in known_presets().keys() - PRESETS.keys():
    assert preset(name).steps == int(rows[name]["steps"])
    hours[name] = 8 * float(rows[name]["record_time_s"]) / 3600
assert round(hours["record1"], 1) == max(hours.values()) == 6
assert round(60 * min(hours.values())) == 21

five = preset("record5")
for spec in assign_optimizers(param_specs(five.model, 50_257), five.optim):
    if spec.optim == "muon":
        longer = max(spec.shape[1] // spec.matrices, spec.shape[2])
        wanted = 0.1 * 0.0036 * math.sqrt(longer)
        assert math.isclose(five.optim.matrix_lr * spec.lr_mul, wanted, rel_tol=0.003), spec.name
try:
    preset("smal")
    raise AssertionError("accepted")
except UserError as problem:
    print(problem)

# %% [markdown]
# ### Shrinking a run to CPU size
#
# Every switch has to work at a size at which a laptop can try it. `at_cpu_size` keeps the decisions of a run and shrinks its dimensions, in single precision. A count of steps is a dimension, too. Left as it is, record 1's warm-up of 700 steps would outlast all of the twenty, and a changed cosine or a changed decay would change nothing that anybody sees. So warm-ups and ramps shrink with the run, to between three of its steps and a quarter of them, and twenty steps pass through everything: up, along, and down. Tests train twenty steps of *any* configuration; so does the check that a refactoring has not changed what a run computes.

# %%
#| export cpu_size
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


# %%
assert [scaled(count, 19_560, 20) for count in (0, 50, 700, 4000, 19_560)] == [0, 3, 3, 4, 5]
assert scaled(700, 19_560, 19_560) == 700


# %%
#| export cpu_size
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


# %%
tiny = at_cpu_size(preset("record1"))
assert tiny.model == preset("cpu_gpt2").model and tiny.steps == 20
assert tiny.optim == preset("record1").optim, "all else stays"
ramps = {"schedule.warmup_steps": 3, "schedule.momentum_ramp": (3, 3)}
assert tiny.schedule == vary(preset("record1"), ramps).schedule
assert at_cpu_size(preset("small_gpt2")).schedule.momentum_ramp == (4, 3)
many = preset("record13").schedule.stages
assert fewer(many, 27) == many and len(at_cpu_size(preset("record13")).schedule.stages) == 5
assert [stage.windows[0] for stage in fewer(many, 3)] == [63, 895, 1727]

# %% [markdown]
# That is worth doing once in the open. Build the model of some runs at this size, and ask each for its first loss, which chapter 03 taught us to predict. (The embedded text has 288 tokens.) The first three are one and the same model, to the last digit; record 2's has no biases, and turns its queries and keys.

# %%
import torch

from speedrun.model.gpt import GPT

expected, firsts = math.log(288) + 0.05**2 * 128 / 2, {}
tokens = torch.randint(288, (64, 129), generator=torch.Generator().manual_seed(0))
for name in ("cpu_gpt2", "small_gpt2", "record1", "record2"):
    model = GPT(at_cpu_size(preset(name)).model, 288)
    with torch.no_grad():
        first = model(tokens[:, :-1], tokens[:, 1:]).item()
    assert abs(first - expected) < 0.1, f"{name} starts at {first}"
    firsts[name] = first
    print(f"{name:10} starts at {first:.3f}, expected {expected:.3f}")
assert firsts["cpu_gpt2"] == firsts["small_gpt2"] == firsts["record1"] != firsts["record2"]

# %% [markdown]
# ### JSON and the command line
#
# A log holds a run as JSON, and a checkpoint has to become a run again. A field that today's code does not know is an error, since the run was something that this program cannot be. A field that the *saved* run lacks is the more dangerous case, because today's default fills it without a word. That is right under one rule, which every chapter that adds a field keeps: **a new field's default is off**. Then a run that was saved before the field existed is the run with its default. (What every run has had from the beginning must be there.)


# %%
#| export config
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


# %%
import json

for name in known_presets():
    whole = dataclasses.asdict(preset(name))
    saved = json.loads(json.dumps(whole))
    assert dataclasses.asdict(config_from_json(saved)) == whole
    del saved["optim"]["muon"]["beta2"], saved["model"]["layout"]  # from before both existed
    old = config_from_json(saved)
    assert old.optim.muon.beta2 == 0.0 and old.model.layout == LayoutConfig()
known_by_heart = json.loads(json.dumps(dataclasses.asdict(preset("cpu_gpt2"))))
wrong_saves = {"flux_capacitor": True, "steps": "many", "precision": "bf16", "model": 3}
for name, value in wrong_saves.items():
    try:
        config_from_json(known_by_heart | {name: value})
        raise AssertionError("accepted")
    except UserError as problem:
        assert name in problem.what
        print(problem)

# %% [markdown]
# On the command line, `tyro` turns dataclasses into flags and their docstrings into help, so a field is declared, documented and settable in one place. A table, like the schedule's stages, is one argument, in JSON. It cannot know that `--preset` decides the defaults of everything else; that is read first. And people who come from nanoGPT write `--compile=False` where tyro wants `--no-compile`; of that it would only say that it does not know “False”.


# %%
#| export presets
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


# %%
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Example:
    """What a command takes beside the run: here, an output folder."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: str = ""


flags = ["--steps", "7", "--preset=small", "--model.num-layers", "2", "--no-compile", "--out", "x"]
given = read_command(Example, flags, "cpu", "example")
assert given == Example(
    vary(preset("small"), {"steps": 7, "model.num_layers": 2, "compile": False}), "x"
)
twice = ["--preset", "small", "--preset=cpu"]
for flags in ([], twice):
    assert read_command(Example, flags, "cpu", "example").config == preset("cpu")
for flags in (["--compile=False"], ["--optim.adam.cautious", "true"], ["--no_compile", "True"]):
    try:
        read_command(Example, flags, "cpu", "example")
        raise AssertionError("accepted")
    except UserError as problem:
        print(problem)

# %% [markdown]
# The way back is needed too. A launcher has to hand its run to the ranks that it starts, as arguments. Only what differs from the preset is said.


# %%
#| export presets
def as_arguments(config: Config) -> list[str]:
    """The command-line arguments that `read_command` turns into this config."""
    arguments, defaults = ["--preset", config.preset], fields_of(preset(config.preset))
    for name, value in fields_of(config).items():
        if value != defaults[name]:
            arguments += as_flags(name, value)
    return arguments


# %%
import shlex

odd = vary(
    preset("small_gpt2"), {"compile": False, "optim.adam.betas": (0.8, 0.9), "data.path": "/a b/c"}
)
stages = (Stage(0.5), Stage(0.5, batch_mul=2, mtp_weights=((1.0, 0.5), (1.0, 0.0))))
staged = vary(odd, {"schedule.stages": stages})
for run in (preset("smoke"), odd, vary(odd, {"optim.adam.lr": 1e-4, "wandb": "-"}), staged):
    assert read_command(Example, as_arguments(run), "cpu", "example").config == run
print(shlex.join(as_arguments(odd)))

# %% [markdown]
# Every field explains itself, or `--help` would have a hole. That can be asserted as well: in the source of each class of options, each field is followed by its docstring.

# %% tags=["hide-input"]
import ast

from speedrun.lab.provenance import is_docstring, module_file

homes = {"Config": "config", "DataConfig": "data.loader", "GPTConfig": "model.gpt"}
homes |= {"OptimConfig": "optim.state", "AdamConfig": "optim.adam", "MuonConfig": "optim.muon"}
homes |= {"ScheduleConfig": "schedule", "BlockConfig": "model.mlp"}
homes |= {"RotaryConfig": "model.rotary", "HeadConfig": "model.head"}
homes |= {"EmbeddingConfig": "model.embedding", "LayoutConfig": "model.layout"}
homes |= {"AttentionConfig": "model.attention"}
explained = 0
for kind, home in homes.items():
    tree = ast.parse(module_file(f"speedrun.{home}").read_text(encoding="utf-8"))
    (body,) = (
        node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind
    )
    fields = [n for n, line in enumerate(body) if isinstance(line, ast.AnnAssign)]
    assert fields and all(is_docstring((body + [None])[n + 1]) for n in fields), kind
    explained += len(fields)
groups = len(homes) - 1  # each is a field of another, and explained there
assert explained - groups == len(fields_of(Config())) > 80
print(f"{explained - groups} fields, each with its sentence of help")

# %% [markdown]
# ## The measurement
#
# The prediction, counted:

# %%
order = ["record1", "record11", "record31", "record", "small", "cpu", "cpu_gpt2"]
table = {name: fields_of(preset(name)) for name in order}
record = table["record1"]
differs = {
    name: [key for key in record if row[key] != record[key] and key != "preset"]
    for name, row in table.items()
}
assert len(known_presets()) == 21 and len(record) - 1 > 90
share = {name: len(keys) / (len(record) - 1) for name, keys in differs.items()}
assert 0.2 < share["cpu_gpt2"] < 0.28 and 0.3 < share["record11"] < 0.37, (
    "a fifth to a quarter, and a third"
)
moved = {name: set(keys) for name, keys in differs.items()}
assert not [key for key in moved["record11"] if key.startswith("data.")]
assert not moved["record11"] & {"model.num_layers", "model.model_dim", "model.max_seq_len"}
both = moved["cpu_gpt2"] & moved["record11"]
assert both == {"model.num_heads", "optim.adam.lr", "schedule.warmup_steps", "steps"}
print({name: f"{len(keys)} of {len(record) - 1} fields" for name, keys in differs.items()})

# %% [markdown]
# So the answers are a fifth of all fields (`preset` not counted), and three tenths. These are the fields in which any of the runs differs from record 1, with what differs set in bold. All other fields are equal in all of them.

# %% tags=["hide-input"]
from IPython.display import HTML

keys = [key for key in record if any(key in differs[name] for name in order)]
lines = ["<tr>" + "".join(f"<th>{word}</th>" for word in ("field", *order)) + "</tr>"]
for key in keys:
    cells = [f"<td><code>{key}</code></td>"]
    for name in order:
        value = table[name][key]
        text = f"{value:,}" if type(value) is int else str(value)
        if key == "schedule.stages":  # chapter 14 shows a whole table
            text = f"{len(value)}"
        cells.append(f"<td>{f'<b>{text}</b>' if key in differs[name] else text}</td>")
    lines.append("<tr>" + "".join(cells) + "</tr>")
HTML(
    f'<div style="overflow-x: auto"><table style="white-space: nowrap">{"".join(lines)}</table></div>'
)

# %% [markdown]
# What differs in `cpu_gpt2` is mostly sizes, lengths and budgets, and a few choices that a size forces: rate, warm-up, deviation, precision, compiling. None is a *technique*. Record 11 is the opposite. It reads the same batches as record 1, its model is as deep and as wide, and nearly all that it changes are techniques and their rates. Only four fields differ in both: heads, rate, warm-up and steps. That is what makes the small run worth anything: a technique can be switched on in it as in the large one. `small` has all that `record` has but the MLP in eight bits; `cpu` lacks what comes with eight bits, too.

# %% [markdown]
# ### Ablations of the laptop's choices
#
# What the laptop's choices are worth can be measured. Take a run, change one thing, train it to the end, and do that with three seeds. Every arm sees the same nine million tokens.
#
# The first version of the laptop's run had rows of 64 tokens. A quick search had favoured them: with a third of the steps they beat rows of 128. So the arms below start from there: “rows of 64” is that first version. On a laptop they take an afternoon. These went through a machine with more cores, one thread each, side by side, so that their times say little and are not shown.

# %% tags=["hide-input"]
#| export measure.runs
import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from speedrun.data.loader import Shards
from speedrun.lab.errors import UserError
from speedrun.lab.files import atomic_write
from speedrun.lab.hardware import detect_machine
from speedrun.lab.provenance import root
from speedrun.lab.results import load_result
from speedrun.optim.muon import MuonConfig
from speedrun.schedule import Stage

if TYPE_CHECKING:
    from speedrun.run import Run

After = Callable[["Run"], dict]  # what else to measure on a trained run


def corpus_of(run: Config) -> dict[str, str]:
    """Name and SHA-256 of what a run reads, for a result's stamp."""
    manifest = Shards(run.data.path, "val").manifest
    return {"name": manifest.source, "sha256": manifest.sha256}


def config_of_run(folder: Path) -> Config:
    """The settings of a finished run, to be used on one GPU."""
    from speedrun.checkpoint import latest_checkpoint, load_facts

    return config_from_json(load_facts(latest_checkpoint(folder))["config"])


def relative_error(found: Any, known: Any) -> float:
    """Norm of a tensor's difference from one in float64, over its norm."""
    return ((found.double() - known).norm() / known.norm()).item()


# %% [markdown]
# A GPU trains one of these in seconds, and would spend more of them on compiling. So there a process assembles a run once and trains others with its compiled model, as long as they differ in nothing that the model can see. `gpu_base` is the run for such comparisons: half the layers and half the width of record 1, a sixteenth of its batch.


# %% tags=["hide-input"]
#| export measure.runs
SHORT: dict[str, Any] = {"steps": 600, "val_tokens": 131_072}  # what a laptop's comparisons run


def with_record_muon(base: Config) -> Config:
    """A run under record 89's Muon; momentum's ramps are as long a share of it as of the record's."""
    rises, falls = round(0.23 * base.steps), round(0.04 * base.steps)
    changes = fields_of(RECORD_MUON, "optim.muon.") | {"optim.matrices": "muon"}
    changes |= {"schedule.momentum_min": 0.85, "schedule.momentum_ramp": (rises, falls)}
    if base.precision == "float32":  # on a CPU
        changes |= {"optim.muon.param_dtype": "float32", "optim.muon.ns_dtype": "bfloat16"}
    return vary(base, changes)


def best_of(slug: str, name: str) -> Config:
    """The run with the lowest loss of a committed measurement, each arm's first seed counting."""
    arms = load_result(slug, name)["data"]["arms"]
    best = min((runs[0] for runs in arms.values()), key=lambda run: run["val_loss"])
    return config_from_json(best["config"])


def cpu_base() -> Config:
    """The run in which ideas are compared on a laptop: cpu_gpt2's model under record 89's Muon, at chapter 13's rates."""
    return vary(
        with_record_muon(vary(preset("cpu_gpt2"), SHORT)),
        {"optim.matrix_lr": 0.016, "optim.adam.lr": 0.004},
    )


def gpu_base(data: str) -> Config:
    """The run in which ideas are compared on a GPU: 30 million parameters, 400 steps of 32,768 tokens."""
    sizes = {
        "model.num_layers": 6,
        "model.num_heads": 6,
        "model.model_dim": 384,
        "model.init_std": 0.03,
    }
    reads = {"data.path": data, "data.batch_tokens": 32_768, "data.micro_batches": 1}
    lasts: dict[str, Any] = {"steps": 400, "schedule.warmup_steps": 40, "val_tokens": 1_048_576}
    adamw = {"optim.matrices": "adam", "optim.matrix_lr": 0.0, "schedule.momentum_min": 0.0}
    adamw |= fields_of(MuonConfig(weight_decay=0.1), "optim.muon.")  # should an arm have it
    return vary(preset("small_gpt2"), sizes | reads | lasts | adamw)


# %% tags=["hide-input"]
#| export measure.runs
def reset_run(live: "Run", config: Config) -> None:
    """Put an assembled run back to its first step, with another config: one that differs in optimizer, schedule and seed alone."""
    import torch

    from speedrun.data.loader import Position
    from speedrun.model.init import init_weights
    from speedrun.train import build_optimizer, warm_up

    model = live.model
    for spec in model.specs:  # an optimizer may have given it another dtype
        weights = model.get_parameter(spec.name)
        weights.data, weights.grad = torch.empty(spec.shape, device=weights.device), None
    init_weights(model, config.seed)
    live.config, live.step, live.loader.position = config, 0, Position()
    live.optimizer = build_optimizer(config, model)
    live.nonfinite_steps.zero_()
    live.recorder.calls.clear()  # recorded with the old places
    live.clock.elapsed_ms = 0.0
    warm_up(live)


# %% tags=["hide-input"]
#| export measure.runs
def train_with_history(live: "Run") -> dict[str, list]:
    """Train from the first step to the last; the weights that mix, by name: [step, values] at 33 moments."""
    from speedrun.train import train_step

    model: Any = live.model
    steps, every = live.config.steps, -(-live.config.steps // 32)
    few = {spec.name: model.get_parameter(spec.name) for spec in model.specs if spec.is_scalar}
    learned: dict[str, list] = {name: [] for name in few}
    for step in range(steps + 1):
        for name, values in few.items():
            if step % every == 0 or step == steps:
                learned[name].append([step, values.tolist()])
        if step < steps:
            train_step(live)
    return learned


WORKER: dict[str, Any] = {"turn": nullcontext()}  # a process's own place: entered while it trains


def train_in_place(live: "Run", config: Config, after: After | None = None) -> dict:
    """Train a run with the assembled model of another; what it ends with, and what `after` finds in it."""
    from speedrun.train import validation_loss, val_batches

    reset_run(live, config)
    with WORKER["turn"]:
        live.clock.start()
        learned = train_with_history(live)
        live.clock.stop()
    done: dict[str, Any] = {"val_loss": validation_loss(live, val_batches(live, config.val_tokens))}
    done |= {"seconds": live.clock.elapsed_ms / 1000, "skipped": live.nonfinite_steps.item()}
    done |= ({"learned": learned} if learned else {}) | (after(live) if after else {})
    return done | {"config": dataclasses.asdict(config)}


# %% [markdown]
# A run must not notice who trained before it:

# %%
from speedrun.train import build_run

brief = vary(
    at_cpu_size(preset("cpu_gpt2")), {"device": "cpu"}
)  # where equal runs are equal to the bit
with tempfile.TemporaryDirectory() as folder:
    live = build_run(brief, Path(folder), echo=None)
    first, between, again = (
        train_in_place(live, vary(brief, {"seed": seed}))["val_loss"] for seed in (0, 1, 0)
    )
assert first == again != between


# %% tags=["hide-input"]
#| export measure.runs
def compile_key(config: Config) -> str:
    """All that decides what is compiled for a run."""
    parts = (config.model, config.data, config.precision, config.compile)
    return repr((*parts, config.optim.muon.param_dtype))


def group_by_model(runs: Sequence[Config], gpus: int) -> list[list[int]]:
    """Numbers of runs that share a model; dealt out to the GPUs if there are fewer models than those."""
    alike: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        alike.setdefault(compile_key(run), []).append(number)
    parts = 1 if len(alike) >= gpus else gpus
    dealt = [group[part::parts] for group in alike.values() for part in range(parts)]
    return [group for group in dealt if group]


def take_place(places: Any) -> None:
    """Let this process see one GPU only, on which it trains when it is its turn; or none, and use one thread."""
    import torch

    gpu, turn = places.get()
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    if turn is not None:
        WORKER["turn"] = turn
    else:
        torch.set_num_threads(1)


def train_group(runs: Sequence[Config], after: After | None) -> list[dict]:
    """Train runs of one model, one after the other; what `train_in_place` says of each."""
    import torch

    from speedrun.train import build_run

    torch._dynamo.reset()  # PyTorch keeps eight versions of a function at most
    with tempfile.TemporaryDirectory() as folder:
        live = build_run(runs[0], Path(folder), echo=None)
        return [train_in_place(live, run, after) for run in runs]


def train_each(
    runs: Sequence[Config], on_gpus: bool, after: After | None = None
) -> Iterator[tuple[int, dict]]:
    """Train runs on the GPUs of this machine, or one on each of its cores; the number of each with what `train_in_place` says, as they end.

    Two processes share a GPU: while one trains, the other compiles the next model.
    """
    context, machine = get_context("spawn"), detect_machine()
    if on_gpus and not machine.gpus:
        raise UserError("this is measured on a GPU, and PyTorch sees none", "make doctor says why")
    groups = [[number] for number in range(len(runs))]
    free: list[tuple[str, Any]] = [("", None)] * machine.cores
    if on_gpus:
        groups = group_by_model(runs, len(machine.gpus))
        free = 2 * [(str(gpu), context.Lock()) for gpu in range(len(machine.gpus))]
    places = context.Queue()
    for place in free:
        places.put(place)
    workers = max(1, min(len(free), len(groups)))
    with ProcessPoolExecutor(workers, context, take_place, (places,)) as pool:
        jobs = {
            pool.submit(train_group, [runs[n] for n in group], after): group for group in groups
        }
        for job in as_completed(jobs):
            yield from zip(jobs[job], job.result())


def step_times(
    arms: dict[str, Config], rounds: int = 12, steps: int = 10
) -> dict[str, list[float]]:
    """Milliseconds of a step of each arm, the arms in turn; on a CPU with one thread."""
    import torch

    from speedrun.train import build_run, train_step, warm_up

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    live = {arm: build_run(run, folder / arm, echo=None) for arm, run in arms.items()}
    took: dict[str, list[float]] = {arm: [] for arm in arms}
    for run in live.values():
        warm_up(run)
    for _ in range(rounds):
        for arm, run in live.items():
            run.clock.wait()
            begin = time.perf_counter()
            for _ in range(steps):
                train_step(run)
            run.clock.wait()
            took[arm].append(1000 * (time.perf_counter() - begin) / steps)
    return took


def kept_runs(facts: dict) -> Path:
    """The folder for what is finished of a measurement with this stamp, until all of it is: by its command, code, machine and text."""
    same = [facts[key] for key in ("command", "modules", "gpu", "cpu", "torch", "corpus")]
    name = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]
    return root() / "_build" / "measured" / name


def train_arms(
    arms: dict[str, Config],
    seeds: int | dict[str, int],
    facts: dict,
    on_gpus: bool = False,
    after: After | None = None,
) -> dict[str, list[dict]]:
    """Train every arm with the seeds 0 … seeds − 1, all arms with one seed before any with the next: {arm: [run, …]}.

    seeds: for all arms, or by arm. facts: the measurement's stamp; runs that ended when it was made before, and did not end itself, are not made again.
    """
    counts = {arm: seeds if isinstance(seeds, int) else seeds[arm] for arm in arms}
    pairs = [(arm, seed) for seed in range(max(counts.values())) for arm in arms if seed < counts[arm]]  # fmt: skip
    runs = [vary(arms[arm], {"seed": seed}) for arm, seed in pairs]
    texts = [json.dumps(dataclasses.asdict(run), sort_keys=True) for run in runs]
    names = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
    files = [kept_runs(facts) / f"{name}.json" for name in names]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    missing = [number for number, file in enumerate(files) if not file.exists()]
    ended = train_each([runs[number] for number in missing], on_gpus, after)
    for number, done in tqdm(ended, total=len(missing), unit="run"):
        atomic_write(files[missing[number]], json.dumps(done))
    found = dict(zip(pairs, (json.loads(file.read_text(encoding="utf-8")) for file in files)))
    return {arm: [found[arm, seed] for seed in range(counts[arm])] for arm in arms}


# %% [markdown]
# The short runs of one measurement are kept one by one as they end, until the whole is written: a measurement that was stopped goes on where it was, and all arms have a seed before any has the next. Runs that take a GPU minutes each make a **study**: a dictionary of runs by their names, `arm_seed`, in the order in which they should be made: all arms with the first seed, then all with the second, so that wherever it stops the arms are equally far. Each run has a result of its own, so a study can go on another day, on another machine: `scripts/measure.py` trains those that have none yet, one on each GPU.

# %% tags=["hide-input"]
#| export measure.study
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speedrun.run import Run


def runs_of(arms: dict[str, Config], seeds: Sequence[int]) -> dict[str, Config]:
    """The runs of a study by name, `arm_seed`, in the order in which they are made; each is validated once, at its end."""
    once = {arm: vary(run, {"val_every": run.steps}) for arm, run in arms.items()}
    return {f"{arm}_{seed}": vary(once[arm], {"seed": seed}) for seed in seeds for arm in arms}


def measured_run(folder: Path) -> dict:
    """What is kept of a finished run: what `read_run` says, but of the steps' durations the percentiles, 1 to 99."""
    from speedrun.report import quantile, read_run

    run = read_run(folder)
    return run | {"steps_ms": [quantile(run["steps_ms"], share / 100) for share in range(1, 100)]}


def loss_in_documents(live: "Run") -> float:
    """What a run that was trained on rows of the stream loses, nats a token, on the same validation tokens as packed documents."""
    from speedrun.train import validation_loss, val_batches, prepare_attention

    live.config = vary(live.config, {"data.mode": "documents"})
    live.attn_settings = prepare_attention(live.config, live.model, live.ranks.device)
    return validation_loss(live, val_batches(live, live.config.val_tokens))


def train_alone(
    run: Config, command: str, after: Callable[["Run"], dict] | None = None, echo: Any = print
) -> tuple[dict, dict]:
    """Train a run of a study as one rank, on the first GPU that this process sees or on the CPU. Returns a result's data, {"runs": [run]}, and its stamp.

    after: what else to measure on the trained run.
    """
    from speedrun.train import train

    with tempfile.TemporaryDirectory() as folder:
        live = train(run, Path(folder), echo=echo, command=command)
        done = measured_run(Path(folder))
    stamp = done.pop("stamp")
    return {"runs": [done | (after(live) if after else {})]}, stamp


# %% tags=["demonstration"]
turning = vary(brief, {"model.rotary.pos": "rope"})  # positions that do not end
arms = {"as it is": turning, "half the rate": vary(turning, {"optim.adam.lr": 1e-3})}
study = runs_of(arms, (0, 1))
assert [*study] == ["as it is_0", "half the rate_0", "as it is_1", "half the rate_1"]
again = lambda live: {"packed": loss_in_documents(live)}  # noqa: E731
kept, mark = train_alone(study["as it is_1"], "…", again, echo=None)
ended = kept["runs"][0]["curve"][-1]["val_loss"]
assert mark["seeds"] == [1] and abs(kept["runs"][0]["packed"] - ended) < 0.5

# %% tags=["hide-input"]
#| export measure.config
from typing import Any

from speedrun.lab.provenance import stamp

NAMES = ("laptop", "short")
SEEDS = 3
START: dict[str, Any] = {"data.seq_len": 64, "model.max_seq_len": 64, "steps": 9000}
ARMS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "deviation 0.02, GPT-2's": {"model.init_std": 0.02},
    "deviation 0.10": {"model.init_std": 0.10},
    "half the rate": {"optim.adam.lr": 1e-3},
    "twice the rate": {"optim.adam.lr": 4e-3},
    "half the batch": {"data.batch_tokens": 512, "steps": 18_000},
    "twice the batch": {"data.batch_tokens": 2048, "steps": 4500},
    "rows of 32": {"data.seq_len": 32, "model.max_seq_len": 32},
    "rows of 128": {"data.seq_len": 128, "model.max_seq_len": 128},
    "one layer": {"model.num_layers": 1},
    "four layers": {"model.num_layers": 4},
}


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train the arms with each seed: {"arms": {arm: [run, …]}}.

    laptop: all ARMS to the end. short: two lengths of rows, for a third of the steps.
    """
    short = {arm: ARMS[arm] | {"steps": 3000} for arm in ("as it is", "rows of 128")}
    arms, laptop = (short if name == "short" else ARMS), vary(preset("cpu_gpt2"), START)
    runs = {arm: vary(laptop, change) for arm, change in arms.items()}
    modules = ["speedrun.measure.config", "speedrun.train"]
    facts = stamp(command, modules, SEEDS, range(SEEDS), corpus_of(laptop))
    return {"arms": train_arms(runs, SEEDS, facts)}, facts


# %%
from speedrun.lab.results import load_result, measured_on
from speedrun.lab.stats import describe, p_difference, p_text, study_of

result, short = load_result("config", "laptop"), load_result("config", "short")
arms = result["data"]["arms"]
losses = {arm: describe(run["val_loss"] for run in runs) for arm, runs in arms.items()}
start = "as it is"  # rows of 64
gap = {arm: sample.mean - losses[start].mean for arm, sample in losses.items()}
spread = (sum(sample.sd**2 for sample in losses.values()) / len(losses)) ** 0.5
visible = 4.7 * spread
assert set(losses) == set(ARMS) and {sample.n for sample in losses.values()} == {3}
seen = {arm for arm in gap if abs(gap[arm]) > visible}
dear = ("deviation 0.02, GPT-2's", "rows of 32", "one layer")
assert seen == {"four layers", "rows of 128", *dear} and gap["four layers"] < 0
assert visible < gap[dear[0]] < gap[dear[1]] < gap[dear[2]]
trained = {arm: [run["val_loss"] for run in runs] for arm, runs in arms.items()}
study = study_of({"control": trained.pop(start), **trained})
assert seen == {arm for arm, p in study.p_values.items() if p < 0.05}, "Dunnett's test agrees"
tokens_read = [
    run["config"]["steps"] * run["config"]["data"]["batch_tokens"]
    for runs in arms.values()
    for run in runs
]
assert len(set(tokens_read)) == 1
print(f"n = 3 each; visible: {visible:.3f}")
for arm in sorted(gap, key=gap.get):
    chance = p_text(study.p_values[arm]) if arm != start else ""
    print(f"{arm:23} {losses[arm].mean:.3f}  {gap[arm]:+.3f}  {chance}")
print(measured_on(result))

# %% [markdown]
# Eleven arms and three seeds make small samples. By chapter 01's one-sided test at $p < 0.01$, three runs a side see nine times out of ten what is nearly five standard deviations large: *visible*. The same five arms are told from the first version by the test for many arms beside one control, Dunnett's, whose p is printed. Of the arguments for the laptop's choices, one holds: GPT-2's own deviation is too small for a narrow model. Shorter rows cost more, and half the layers cost most. Whether batch and rate matter within a factor of two, three seeds cannot
# say: effects well below *visible* escape them.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Final validation loss of eleven variants of the laptop's run, three seeds each"}}
import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style

figure_style()
fig, axis = plt.subplots(figsize=(5.5, 3.8))
order = sorted(arms, key=lambda arm: -losses[arm].mean)
for y, arm in enumerate(order):
    lower, higher = gap[arm] < -visible, gap[arm] > visible
    color = "C0" if arm == start else "C1" if lower else "C3" if higher else "0.45"
    axis.plot([run["val_loss"] for run in arms[arm]], [y] * 3, "o", ms=5, alpha=0.8, color=color)
axis.axvline(losses[start].mean, color="C0", lw=0.8, ls=":")
fields = {start: "rows of 64", "deviation 0.02, GPT-2's": "init std 0.02 (GPT-2's)"}
fields |= {"deviation 0.10": "init std 0.10"}
names = [fields.get(arm, arm.replace("the rate", "the learning rate")) for arm in order]
axis.set_yticks(range(len(order)), names)
axis.set_xlabel("final validation loss (nats a token), three seeds")
better = [arm for arm in order if gap[arm] < -visible]
axis.set_title(f"three seeds see two arms below rows of 64:\n{' and '.join(better)}")
assert len(better) == 2
plt.show()

# %% [markdown]
# *Blue: the control. Orange: visibly lower; pink: visibly higher; grey: neither.*
#
# Four layers cost twice the arithmetic in the blocks. Rows of 128 cost next to nothing, and the quick search had said the opposite:

# %%
brief = {
    arm: describe(run["val_loss"] for run in runs) for arm, runs in short["data"]["arms"].items()
}
gap_short = brief["rows of 128"].mean - brief[start].mean
gap_long = gap["rows of 128"]
p_short = p_difference(brief["rows of 128"], brief[start])
p_long = study.p_values["rows of 128"]
both = {arm: short["data"]["arms"][arm] for arm in ("rows of 128", start)}
every = {arm: [run["val_loss"] for run in runs] for arm, runs in both.items()}
assert min(every["rows of 128"]) > max(every[start])
seconds = {arm: sum(run["seconds"] for run in runs) for arm, runs in both.items()}
assert 1 < seconds["rows of 128"] / seconds[start] < 1.05
assert gap_short > 0 > gap_long and p_long < 0.01 and p_short < 0.1
print(f"3,000 steps: rows of 128 are {gap_short:+.3f} nats against rows of 64, p = {p_short:.3f}")
print(f"9,000 steps: {gap_long:+.3f}, {p_text(p_long)} (Dunnett's, one of ten arms)")
print(f"time on two cores: {seconds['rows of 128'] / seconds[start]:.2f} × that of rows of 64")
print(measured_on(short))

# %% [markdown]
# The sign turns. The long difference is there, by Dunnett's test; the short one is a hint: all three runs with rows of 64 beat all three with 128, which chance does once in twenty, or once in ten for either side. A likely reason is that a model has to learn to spell before it can use what stands further back, so that a run which ends while it is learning to spell sees only the price of the
# longer row. Part of the gain may come from the validation, which sees more context with longer rows, too; in this contest that counts. But a sign that turns is reason enough not to trust the short search. Short runs that stand for long ones are cheap, and here they misled. The preset has had rows of 128 since. It still has two
# layers, and eight thousand steps, because it is meant to take five minutes.
#
# ## What it costs, and when it fails
#
# It costs ceremony. A new switch needs a field with bounds, a docstring, a default that is off, and a reason to be in one class and not in another; upstream it would be a line. And a frozen value has no room for what is found out while running, so the learning rate of a step is a function of the config and the step, and lives elsewhere ([chapter 14](14_schedule.py)).
#
# A value also cannot say what is *not* in it. Two runs with equal configs can still differ through the code (so the log keeps a hash and the source of every module), through the library versions (so the log keeps those), and through the order in which a GPU adds numbers, which nobody pays to keep. And a default is a
# decision that nobody made. When a field's default changes, every run that relied on it changes in silence. The log therefore stores the whole value, never the arguments that led to it.
#
# ## Exercises
#
# 1. Ablations need lists of runs. Write `grid(config, changes)` that takes a dict from dotted names to *lists* of values and returns every combination.


# %% tags=["solution"]
def grid(config: Config, changes: dict[str, list]) -> list[Config]:
    """The config varied in all combinations of the listed values; the first name varies slowest."""
    runs = [config]
    for name, values in changes.items():
        runs = [vary(run, {name: value}) for run in runs for value in values]
    return runs


# %%
runs = grid(preset("cpu_gpt2"), {"optim.adam.lr": [1e-3, 2e-3], "seed": [0, 1, 2]})
right = [(lr, seed) for lr in (1e-3, 2e-3) for seed in (0, 1, 2)]
got = [(run.optim.adam.lr, run.seed) for run in runs]
assert got == right, f"two rates and three seeds: (rate, seed) should be {right}, not {got}"
alone = grid(preset("cpu_gpt2"), {})
assert alone == [preset("cpu_gpt2")], (
    f"without changes there is one run, the config itself, not {len(alone)} runs"
)

# %% [markdown]
# 2. Two logs lie before you and their losses differ. Write `difference(a, b)`: the dotted names in which two runs differ, each with both values, and nothing else.


# %% tags=["solution"]
def difference(a: Config, b: Config) -> dict[str, tuple]:
    """Dotted name → (value in a, value in b), for every field that differs."""
    ours, theirs = fields_of(a), fields_of(b)
    return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


# %%
none = difference(preset("cpu_gpt2"), preset("cpu_gpt2"))
assert none == {}, f"a config does not differ from itself, but yours says in {[*none]}"
read = config_from_json(json.loads(json.dumps(dataclasses.asdict(preset("cpu_gpt2")))))
same = difference(preset("cpu_gpt2"), read)
assert same == {}, f"read from its log a config is the same, but yours says in {[*same]}"
found = difference(preset("cpu_gpt2"), vary(preset("cpu_gpt2"), {"model.num_layers": 3, "seed": 7}))
right = {"model.num_layers": (2, 3), "seed": (preset("cpu_gpt2").seed, 7)}
assert found == right, f"layers and seed were changed: {right}, not {found}"
print(difference(preset("record1"), preset("record2")))
