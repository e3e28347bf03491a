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
# # One table of runs
#
# ```{admonition} Cost box
# Any machine: about ten seconds, no GPU. The historic recipe is record 1's (Andrej Karpathy and the contributors of llm.c).
# ```
#
# ## The problem
#
# A trainer with 25 techniques, each of which can be on or off, is **33,554,432 programs**. Its author has run perhaps five of them. The contest's own answer is radical and honest: keep one program, delete whatever is off, and let history
# live in the git log. That makes the record short and comparisons miserable, because to ask what an idea of last spring is worth *today* you must first transplant it by hand.
#
# The usual answer is worse: a hundred global flags, read wherever somebody needed one, with defaults in three places. Soon nobody can say what a run *was*. The command line in the shell history is half of it; the defaults of that day, which are gone, are the other half.

# %%
assert 2**25 == 33_554_432

# %% [markdown]
# ```{admonition} Prediction
# This chapter defines five ways to run the trainer, from forty seconds on a laptop to llm.c's forty-five minutes on eight H100s. Between them they set some thirty fields. **In how many fields do the laptop's run and the record's differ?** And in how many do the record's run and
# the forty-five minutes of llm.c, which at this point of the book are meant to be the same recipe?
# ```
#
# ## The idea
#
# A run is a **value**. It is made of small frozen dataclasses, each exported by the chapter that explains its fields: what the data loader reads ([chapter 02](02_data.py)), the optimizer ([03](03_baseline.py)), the shape of the model ([21](21_model.py)). This chapter puts them side by side and adds what belongs to the run as a whole. Being a value,
# it can be printed, compared, saved in the log, and varied: *this run, but with that field changed* is an expression, and an ablation is a list of such expressions.
#
# Three rules keep it honest. A module reads only its own options, so that one can tell from a signature what a function depends on. A field that is off leaves nothing behind in the compiled program, so that turning a technique off measures its absence and not the presence of an `if`. (The chapter of each technique asserts it; there is none to switch off yet.) And the vocabulary is *not* here: it is a property of the text and stands in the
# text's manifest, where no run can get it wrong.
#
# Why values in Python and not a YAML file? Because a misspelt field is then an error in the line that misspells it; because a value can be varied, compared and tested without a parser; and because to PyYAML `lr: 6e-4` is a string.
#
# ## The code

# %%
#| default_exp config
#| export
import dataclasses
import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from speedrun.data.loader import DataOptions, check_options
from speedrun.lab.hardware import Problem
from speedrun.model.baseline import AdamWOptions
from speedrun.model.gpt import GPTOptions

PresetName = Literal["smoke", "cpu", "small", "record", "baseline"]


# %%
#| export
@dataclass(frozen=True)
class Config:
    """One training run. Every command takes these as flags: --model.layers 4 --steps 100."""

    preset: PresetName = "record"
    """Defaults of all other fields. smoke: 40 s; cpu, small: minutes; record; baseline: record 1."""
    architecture: Literal["gpt", "baseline"] = "gpt"
    """gpt: the package's model. baseline: the plain GPT-2 of chapter 03."""
    model: GPTOptions = field(default_factory=GPTOptions)
    """The shape of the model."""
    optim: AdamWOptions = field(default_factory=AdamWOptions)
    """The optimizer and its schedule."""
    data: DataOptions = field(default_factory=DataOptions)
    """What a step reads."""
    steps: int = 19_560
    """Optimizer steps; the schedule ends with the last."""
    max_steps: int = 0
    """Stop after this many steps of the same schedule; 0: run them all."""
    seed: int = 0
    """Seed of the initial weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: on a GPU if PyTorch sees one."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """How ranks talk; auto: nccl between GPUs, gloo between CPUs. gloo also lets ranks share a GPU, slowly."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """bfloat16: matrix products under autocast, weights in float32."""
    compile: bool = True
    """Compile the forward and backward pass with torch.compile."""
    warmup: int = 3
    """Untimed steps before the clock starts, undone afterwards: they compile and fill caches."""
    val_every: int = 250
    """Steps between validations; the first is before step 0, the last after the last step."""
    val_tokens: int = 10_485_760
    """Validation tokens, from the start of the validation stream."""
    log_every: int = 10
    """Steps between log lines; each reads the loss from the device."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: only at the end, and when interrupted."""
    target: float = 3.28
    """Validation loss (nats a token) that the run is to reach."""
    wandb: str = ""
    """Weights & Biases project to log to as well; empty: none."""


# %% [markdown]
# Whatever can be checked without a GPU, without data and before an hour has passed is checked first, in words, with the flag that mends it:


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


LEAST = {"model.layers": 1, "model.heads": 1, "model.width": 1, "model.context": 1, "steps": 1}
LEAST |= {"val_every": 1, "val_tokens": 1, "log_every": 1}
LEAST |= dict.fromkeys(("max_steps", "warmup", "checkpoint_every", "optim.warmup_steps"), 0)


def check_config(config: Config, world: int = 1) -> Config:
    """The config itself, after checking what can be known beforehand. world: ranks that will share it."""
    fields, model, data = fields_of(config), config.model, config.data
    for name, least in LEAST.items():
        if fields[name] < least:
            what = f"{name}={fields[name]} must be at least {least}"
            raise Problem(what, f"--{name.replace('_', '-')} {least} or more")
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
    if config.val_tokens < world * micro:
        what = f"val_tokens={config.val_tokens} are less than a micro-batch of {micro} for each of {world} ranks"
        raise Problem(what, f"--val-tokens {world * micro} or more")
    return config


# %%
assert check_config(Config()) == Config() and largest_divisor(768, 13) == 12
wrong = [
    Config(data=DataOptions(seq_len=2048)),
    Config(model=GPTOptions(heads=13)),
    Config(val_every=0),
    Config(val_tokens=1000),
    Config(data=DataOptions(mode="documents")),
]
for config in wrong:
    try:
        check_config(config)
        raise AssertionError("accepted")
    except Problem as problem:
        print(problem)

# %% [markdown]
# ### Five runs
#
# A preset is a named value. `record` is the fastest configuration whose chapters exist; for now that is llm.c's recipe on the banked model, and it will change with almost every part of the book. `small` is a run for one GPU and a coffee, `cpu` for a laptop and five minutes, `smoke` for this page.
#
# The laptop's run is not the record's made small. Its batches are small because what a short run lacks is *steps*: 1,024 tokens and eight thousand updates, where the record takes half a million tokens and twenty thousand. Its rows are short, its rate is three times the record's. It does not compile, since on a CPU that takes
# longer than it saves. And its initial deviation is 0.05, since GPT-2's 0.02 belongs to a width of 768 and a good deviation falls with the root of the width:

# %%
import math

assert abs(0.02 * math.sqrt(768 / 128) - 0.05) < 0.002

# %%
#| export
EMBEDDED = DataOptions(path="data/embedded", seq_len=128, step_tokens=1024, grad_shards=2)
FINEWEB = DataOptions(path="data/fineweb10B")
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
PRESETS = {
    "smoke": dataclasses.replace(LAPTOP, **SMOKE, target=2.75),
    "cpu": LAPTOP,
    "small": Config(
        preset="small",
        model=GPTOptions(layers=8, heads=8, width=512, init_std=0.025),
        optim=AdamWOptions(lr=1e-3, warmup_steps=100),
        data=dataclasses.replace(FINEWEB, step_tokens=65_536),
        steps=1520,
        val_every=190,
        val_tokens=4_194_304,
        log_every=20,
        target=4.5,
    ),
    "record": Config(preset="record", data=FINEWEB),
}
HISTORY = ("baseline",)


# %% [markdown]
# Those are arguments, and arguments are cheap. What the choices are worth can be measured. Take a run, change one thing, train it to the end, and do that with three seeds. Every arm sees the same nine million tokens.
#
# The first version of the laptop's run had rows of 64 tokens. A quick search had favoured them: with a third of the steps they beat rows of 128, and each step was cheaper. So the arms below start from there: “as it is” is that first version. On a laptop they take an afternoon. These went through a machine with more cores, one thread each.

# %% tags=["hide-input"]
#| export measure.config
import dataclasses
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from speedrun.data.loader import Shards
from speedrun.lab.hardware import look
from speedrun.lab.results import stamp
from speedrun.lab.runlog import read_metrics, series

NAMES = ("laptop", "short")
SEEDS = (0, 1, 2)
START: dict[str, Any] = {"data.seq_len": 64, "model.context": 64, "steps": 9000, "device": "cpu"}
ARMS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "deviation 0.02, GPT-2's": {"model.init_std": 0.02},
    "deviation 0.10": {"model.init_std": 0.10},
    "half the rate": {"optim.lr": 1e-3},
    "twice the rate": {"optim.lr": 4e-3},
    "half the batch": {"data.step_tokens": 512, "steps": 18_000},
    "twice the batch": {"data.step_tokens": 2048, "steps": 4500},
    "rows of 32": {"data.seq_len": 32, "model.context": 32},
    "rows of 128": {"data.seq_len": 128, "model.context": 128},
    "one layer": {"model.layers": 1},
    "four layers": {"model.layers": 4},
}


# %% tags=["hide-input"]
#| export measure.config
def train_one(run: Config) -> dict:
    """Train a run on one thread; its final validation loss (nats a token), its seconds of training, its config."""
    import torch

    from speedrun.train import train

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        train(run, Path(folder), echo=None)
        last = series(read_metrics(Path(folder) / "metrics.jsonl"), "val")[-1]
    seconds, config = last["train_time_ms"] / 1000, dataclasses.asdict(run)
    return {"val_loss": last["val_loss"], "seconds": seconds, "config": config}


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train the arms with each seed, as many runs at a time as there are cores: {"arms": {arm: [run, …]}}.

    laptop: all ARMS to the end. short: two lengths of rows, for a third of the steps.
    """
    short = {arm: ARMS[arm] | {"steps": 3000} for arm in ("as it is", "rows of 128")}
    arms, laptop = (short if name == "short" else ARMS), vary(preset("cpu"), START)
    runs = {(a, s): vary(laptop, arms[a] | {"seed": s}) for a in arms for s in SEEDS}
    ends = [vary(run, {"val_every": run.steps}) for run in runs.values()]
    with ProcessPoolExecutor(look().cores, get_context("spawn")) as pool:
        done = dict(zip(runs, pool.map(train_one, ends)))
    manifest = Shards(laptop.data.path, "val").manifest
    corpus = {"name": manifest.source, "sha256": manifest.sha256}
    facts = stamp(command, ["speedrun.measure.config", "speedrun.train"], len(SEEDS), SEEDS, corpus)
    return {"arms": {a: [done[a, s] for s in SEEDS] for a in arms}}, facts


# %%
from speedrun.lab.results import load_result, measured_on
from speedrun.lab.stats import describe, p_difference

result, short = load_result("config", "laptop"), load_result("config", "short")
arms = result["data"]["arms"]
losses = {arm: describe(run["val_loss"] for run in runs) for arm, runs in arms.items()}
pace = {arm: sum(run["seconds"] for run in runs) for arm, runs in arms.items()}
was = losses["as it is"]
spread = (sum(sample.sd**2 for sample in losses.values()) / len(losses)) ** 0.5
assert 0.035 < 4.7 * spread < 0.05, "what three runs a side can see (chapter 01)"
assert set(losses) == set(ARMS) and min(sample.n for sample in losses.values()) == 3
for arm, sample in sorted(losses.items(), key=lambda item: item[1].mean):
    p, time = p_difference(sample, was), pace[arm] / pace["as it is"]
    print(f"{arm:24} {sample}  {sample.mean - was.mean:+.3f}  p = {p:.3f}  {time:.2f} × the time")
print(measured_on(result))

# %% [markdown]
# Eleven arms and three seeds make small samples. By chapter 01's own function, three runs a side see what is more than four standard deviations large, some 0.04 here, nine times out of ten. Half and twice the batch, half the rate and a larger deviation are below that and undecided. Twice the rate is probably too much. GPT-2's own deviation costs a narrow model
# dearly, shorter rows cost more, and half the layers cost most.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Final validation loss of eleven variants of the laptop's run, three seeds each"}}
import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style

figure_style()
fig, axis = plt.subplots(figsize=(8, 3.4))
order = sorted(arms, key=lambda arm: -losses[arm].mean)
for y, arm in enumerate(order):
    color = "C0" if arm == "as it is" else "C1" if losses[arm].mean < was.mean - 0.04 else "0.45"
    axis.plot([run["val_loss"] for run in arms[arm]], [y] * 3, "o", ms=5, alpha=0.8, color=color)
axis.axvline(was.mean, color="C0", lw=0.8, ls=":")
axis.set_yticks(
    range(len(order)), [f"{arm} ({pace[arm] / pace['as it is']:.1f} × the time)" for arm in order]
)
axis.set_xlabel("final validation loss (nats a token), three seeds each")
better = [arm for arm in order if losses[arm].mean < was.mean - 0.04]
axis.set_title(f"only {' and '.join(better)} clearly beat what we had")
plt.show()

# %% [markdown]
# Four layers pay for it with half as much time again. Rows of 128 come for nothing, and the quick search had said the opposite:

# %%
brief = {
    arm: describe(run["val_loss"] for run in runs) for arm, runs in short["data"]["arms"].items()
}
gap_short = brief["rows of 128"].mean - brief["as it is"].mean
gap_long = losses["rows of 128"].mean - was.mean
p_short = p_difference(brief["rows of 128"], brief["as it is"])
p_long = p_difference(losses["rows of 128"], was)
every = [run["val_loss"] for run in short["data"]["arms"]["rows of 128"]]
assert min(every) > max(run["val_loss"] for run in short["data"]["arms"]["as it is"])
assert gap_short > 0 > gap_long and p_long < 0.02 and p_short < 0.1
print(f"3,000 steps: rows of 128 are {gap_short:+.3f} nats against rows of 64, p = {p_short:.3f}")
print(f"9,000 steps: {gap_long:+.3f}, p = {p_long:.3f}")
print(measured_on(short))

# %% [markdown]
# The sign turns. The long difference is likely (one of ten comparisons, at about one in a hundred); the short one is a hint, since each of its three beat each of three, which chance does once in twenty. A likely reason is that a model has to learn to spell before it can use what stands further back, so that a run which ends while it is learning to spell sees only the price of the
# longer row. Part of the gain is the exam and not the pupil, since with longer rows validation sees more context, too; in this contest that counts. But a sign that turns is reason enough not to trust the short search. Short runs that stand for long ones are the cheapest instrument in this contest and its favourite way to be wrong. The preset has had rows of 128 since. It still has two
# layers, and eight thousand steps, because it is meant to take five minutes.
#
# Old rungs of the ladder live in a module of their own, which is imported only when one of them is asked for. The record must not carry its ancestors around.

# %%
#| default_exp history
#| export
import dataclasses

from speedrun.model.baseline import GPT2, GPT2Options, decays_by_shape

RUNGS = {
    # record 1, llm.c: 45 minutes on 8×H100
    "baseline": Config(preset="baseline", architecture="baseline", data=FINEWEB)
}


def build_rung(config: Config, vocab_size: int) -> tuple[GPT2, dict[str, bool]]:
    """The model of a historic architecture, and which of its parameters decay."""
    import torch

    torch.manual_seed(config.seed)
    model = GPT2(GPT2Options(**dataclasses.asdict(config.model)), vocab_size)
    return model, decays_by_shape(model)


# %%
#| export config
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


# %%
import sys

sys.modules.pop("speedrun.history", None)
assert preset("cpu") is PRESETS["cpu"] and "speedrun.history" not in sys.modules
assert tuple(RUNGS) == HISTORY and preset("baseline").architecture == "baseline"
assert "speedrun.history" in sys.modules
for name in (*PRESETS, *HISTORY):
    assert check_config(preset(name)).preset == name
try:
    preset("smal")
    raise AssertionError("accepted")
except Problem as problem:
    print(problem)

# %% [markdown]
# ### Varying
#
# `vary` takes a run and a dict of dotted names. It refuses what does not exist, because an ablation that silently changes nothing is the most convincing null result there is. It refuses values of another type and words that are no choice, for the same reason: `"no"` is true, and a precision called `bf16` would train in 32 bits, because the code asks for `bfloat16`.


# %%
#| export config
def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type: a choice among literals, a tuple of types, or a plain type."""
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return value in parts and isinstance(value, str)
    if get_origin(kind) is tuple:
        same = type(value) is tuple and len(value) == len(parts)
        return same and all(map(fits, value, parts))
    return type(value) is kind or (kind is float and type(value) is int)


def wrong_value(name: str, value: Any, kind: Any) -> Problem:
    """What to say about a value that does not fit."""
    if get_origin(kind) is Literal:
        return Problem(f"{name}={value!r} is none of its choices", " or ".join(get_args(kind)))
    known = str(kind) if get_args(kind) else kind.__name__
    return Problem(f"{name}={value!r} has the wrong type, {type(value).__name__}", f"a {known}")


# %%
#| export config
def vary(config: Any, changes: dict[str, Any]) -> Any:
    """A copy of a config with some fields changed, by dotted name: vary(run, {"model.layers": 3, "seed": 1})."""
    known = fields_of(config)
    for name, value in changes.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            fix = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(known)}"
            raise Problem(f"a run has no field “{name}”", fix)
        head, _, rest = name.partition(".")
        kind = get_type_hints(type(config))[head]
        if not rest and not fits(value, kind):
            raise wrong_value(name, value, kind)
        new = vary(getattr(config, head), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{head: new})
    return config


# %%
changed = vary(preset("record"), {"model.layers": 3, "optim.lr": 1, "seed": 7})
assert changed.model.layers == 3 and changed.seed == 7 and changed.model.width == 768
assert preset("record").model.layers == 12, "the original is untouched"
mistakes = ({"model.layer": 3}, {"compile": "no"}, {"model": 3}, {"precision": "bf16"})
for nonsense in (*mistakes, {"optim.betas": ("a", "b")}):
    try:
        vary(preset("record"), nonsense)
        raise AssertionError("accepted")
    except Problem as problem:
        print(problem)

# %% [markdown]
# ### Any run, on a laptop
#
# Every switch has to work at a size at which a laptop can try it. `at_cpu_size` keeps all the decisions of a run and shrinks its dimensions. Tests use it to train twenty steps of *any* configuration; so does the check that a refactoring has not changed what a run computes.

# %%
#| export config
MODEL_SIZES = [f"model.{name}" for name in ("layers", "heads", "width", "context", "init_std")]
DATA_SIZES = [f"data.{name}" for name in ("path", "seq_len", "step_tokens", "grad_shards")]
SIZES = (*MODEL_SIZES, *DATA_SIZES, "precision")


def at_cpu_size(config: Config, steps: int = 20) -> Config:
    """The same decisions at the cpu preset's widths, vocabulary and lengths, for a few steps."""
    laptop = fields_of(preset("cpu"))
    brief = {"steps": steps, "max_steps": 0, "val_every": steps, "val_tokens": 16_384}
    return vary(config, {name: laptop[name] for name in SIZES} | brief)


# %%
tiny = at_cpu_size(preset("baseline"))
assert tiny.architecture == "baseline" and tiny.model == preset("cpu").model and tiny.steps == 20
assert tiny.optim == preset("baseline").optim, "the decisions stay"

# %% [markdown]
# That is worth doing once in the open. Build the model of each run at this size, and ask it for its first loss, which chapter 03 taught us to predict. Three of the four are one and the same model today, to the last digit; the first switch will tell them apart. The plain architecture is given other random numbers, so it agrees with the prediction and not with them.

# %%
import torch

from speedrun.model.gpt import GPT

expected = math.log(288) + 0.05**2 * 128 / 2
tokens = torch.randint(288, (64, 129), generator=torch.Generator().manual_seed(0))
for name in ("cpu", "small", "record", "baseline"):
    run = at_cpu_size(preset(name))
    model = GPT(run.model, 288) if run.architecture == "gpt" else build_rung(run, 288)[0]
    with torch.no_grad():
        first = model(tokens[:, :-1], tokens[:, 1:]).item()
    assert abs(first - expected) < 0.05, f"{name} starts at {first}"
    print(f"{name:9} starts at {first:.3f}, expected {expected:.3f}")

# %% [markdown]
# ### Saved, and said
#
# A log holds a run as JSON, and a checkpoint has to become a run again. A field that today's code does not know is an error and not a shrug: the run was something that this program cannot be. A field that the *saved* run lacks is the more dangerous case, because today's default would fill it without a word. The chapter that adds a field therefore also says which value stands for its absence.


# %%
#| export config
ABSENT: dict[str, Any] = {}  # dotted name → what a run saved before the field existed has for it


def config_from_json(saved: dict, kind: type = Config, prefix: str = "") -> Any:
    """Rebuild a config from its `dataclasses.asdict` form after a trip through JSON."""
    known: dict[str, Any] = {item.name: item.type for item in dataclasses.fields(kind)}
    unknown = sorted(set(saved) - set(known))
    if unknown:
        what = f"the saved run has fields that today's {kind.__name__} lacks: {', '.join(unknown)}"
        raise Problem(what, "check out the commit that its log names")
    later = {name: prefix + name for name in known if name not in saved}
    lost = [name for name in later.values() if name not in ABSENT]
    if lost:
        what = f"the saved run lacks fields of today's {kind.__name__}: {', '.join(lost)}"
        raise Problem(what, "check out the commit that its log names")
    values = {name: ABSENT[full] for name, full in later.items()}
    for name, value in saved.items():
        if dataclasses.is_dataclass(known[name]):
            value = config_from_json(value, known[name], f"{prefix}{name}.")
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


# %%
import json

for name in PRESETS:
    assert config_from_json(json.loads(json.dumps(dataclasses.asdict(preset(name))))) == preset(
        name
    )
known_by_heart = dataclasses.asdict(preset("cpu"))
for wrong_save in (known_by_heart | {"flux_capacitor": True}, {"preset": "cpu"}):
    try:
        config_from_json(wrong_save)
        raise AssertionError("accepted")
    except Problem as problem:
        print(problem)

# %% [markdown]
# On the command line, `tyro` turns dataclasses into flags and their docstrings into help, so a field is declared, documented and settable in one place. The only thing it cannot know is that `--preset` decides the defaults of everything else; that is read first.


# %%
#| export config
def preset_in(arguments: list[str], default: str) -> str:
    """The value of --preset among command-line arguments, wherever it stands."""
    for n, argument in enumerate(arguments):
        if argument == "--preset" and n + 1 < len(arguments):
            return arguments[n + 1]
        if argument.startswith("--preset="):
            return argument.split("=", 1)[1]
    return default


def read_command(
    make: Callable[[Config], Any], arguments: list[str], default: str, prog: str
) -> Any:
    """A command, which `make` builds around a run, with its fields set from arguments; --preset names the run."""
    import tyro

    command = make(preset(preset_in(arguments, default)))
    return tyro.cli(type(command), args=arguments, default=command, prog=prog)


# %%
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Example:
    """What a command takes beside the run: here, an output folder."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: str = ""


flags = ["--steps", "7", "--preset=small", "--model.layers", "2", "--no-compile", "--out", "x"]
given = read_command(Example, flags, "cpu", "example")
assert given == Example(
    vary(preset("small"), {"steps": 7, "model.layers": 2, "compile": False}), "x"
)
assert read_command(Example, [], "cpu", "example").config == preset("cpu")
print(given.config.model)

# %% [markdown]
# The way back is needed too. A launcher has to hand its run to the ranks that it starts, as arguments. Only what differs from the preset is said.


# %%
#| export config
def as_arguments(config: Config) -> list[str]:
    """The command-line arguments that `read_command` turns into this config."""
    arguments, defaults = ["--preset", config.preset], fields_of(preset(config.preset))
    for name, value in fields_of(config).items():
        *groups, last = name.replace("_", "-").split(".")
        if value == defaults[name]:
            continue
        if isinstance(value, bool):
            arguments.append("--" + ".".join([*groups, last if value else f"no-{last}"]))
        else:
            values = value if isinstance(value, tuple) else [value]
            arguments += ["--" + ".".join([*groups, last]), *map(str, values)]
    return arguments


# %%
odd = vary(preset("small"), {"compile": False, "optim.betas": (0.8, 0.9), "data.path": "/a b/c"})
for run in (preset("smoke"), odd, vary(odd, {"optim.lr": 1e-4, "wandb": "-"})):
    assert read_command(Example, as_arguments(run), "cpu", "example").config == run
print(" ".join(as_arguments(odd)))

# %% [markdown]
# Every field explains itself, or `--help` would have a hole. That can be asserted as well: in the source of each class of options, each field is followed by its docstring.

# %%
import ast

from speedrun.lab.results import module_file


def undocumented(source: str) -> list[str]:
    """Fields of the options classes in a module's source that no docstring follows."""
    missing = []
    for kind in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        fields = [n for n, line in enumerate(kind.body) if isinstance(line, ast.AnnAssign)]
        missing += [
            kind.body[n].target.id
            for n in fields
            if not isinstance((kind.body + [None])[n + 1], ast.Expr)
        ]
    return missing


homes = {"Config": "config", "DataOptions": "data.loader", "AdamWOptions": "model.baseline"}
homes |= {"GPTOptions": "model.gpt"}
for kind, home in homes.items():
    text = module_file(f"speedrun.{home}").read_text(encoding="utf-8")
    own = (
        "@dataclass(frozen=True)\nclass " + kind + text.split(f"class {kind}")[1].split("\n\n\n")[0]
    )
    assert kind in own and not undocumented(own)
print(f"{len(fields_of(Config()))} fields, each with its sentence of help")

# %% [markdown]
# ## The measurement
#
# The prediction, counted:

# %%
table = {name: fields_of(preset(name)) for name in (*PRESETS, *HISTORY)}
record = table["record"]
differs = {
    name: [key for key in record if row[key] != record[key] and key != "preset"]
    for name, row in table.items()
}
assert differs["baseline"] == ["architecture"]
assert len(differs["smoke"]) >= len(differs["cpu"]) > len(differs["small"]) > 8
print({name: f"{len(keys)} of {len(record) - 1} fields" for name, keys in differs.items()})

# %% tags=["hide-input"] mystnb={"image": {"alt": "A table of all presets against all fields; cells that differ from the record are coloured"}}
order = ["record", "baseline", "small", "cpu", "smoke"]
keys = [key for key in record if any(key in differs[name] for name in order)]
fig, axis = plt.subplots(figsize=(8.4, 0.27 * len(keys) + 0.8))
for y, key in enumerate(keys):
    axis.text(-0.1, y, key, ha="right", va="center", fontsize=8.5, family="monospace")
    for x, name in enumerate(order):
        other, value = key in differs[name], table[name][key]
        color = {"color": "#D55E00", "alpha": 0.35} if other else {"color": "0.93"}
        axis.add_patch(plt.Rectangle((x, y - 0.45), 0.97, 0.9, lw=0, **color))
        text = f"{value:,}" if type(value) is int else str(value)
        axis.text(x + 0.48, y, text, ha="center", va="center", fontsize=8)
axis.set_xlim(-1.6, len(order))
axis.set_ylim(len(keys) - 0.4, -1.2)
for x, name in enumerate(order):
    axis.text(x + 0.48, -0.8, name, ha="center", weight="bold", fontsize=9)
axis.axis("off")
laptop, llmc = len(differs["cpu"]), len(differs["baseline"])
axis.set_title(f"the laptop's run differs from the record's in {laptop} fields, llm.c's in {llmc}")
plt.show()

# %% [markdown]
# *The fields in which any preset differs from `record` (coloured). All others are equal in every preset.*
#
# Half of all fields differ between the laptop and the record. Most are sizes, lengths and budgets, and a few are choices that a size forces: rate, warm-up, deviation, precision, compiling. None is a *technique*. That is what makes the small run worth anything: what a later chapter switches on is on in both. Between the record and llm.c there is one field, because nothing has been invented yet. Watch that column. Every
# chapter from 05 on will add a row to this table, and by the end the ancestor at the far end of the ladder will differ in everything but the data.
#
# ## What it costs, and when it fails
#
# It costs ceremony. A new switch needs a field, a docstring, a default, and a reason to be in one class and not in another; upstream it would be a line. And a frozen value has no room for what is found out while running, so the learning rate of a step is a function of the config and the step, and lives elsewhere.
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
runs = grid(preset("cpu"), {"optim.lr": [1e-3, 2e-3], "seed": [0, 1, 2]})
assert len(runs) == 6 and [(run.optim.lr, run.seed) for run in runs[2:4]] == [(1e-3, 2), (2e-3, 0)]
assert grid(preset("cpu"), {}) == [preset("cpu")]

# %% [markdown]
# 2. Two logs lie before you and their losses differ. Write `difference(a, b)`: the dotted names in which two runs differ, each with both values, and nothing else.


# %% tags=["solution"]
def difference(a: Config, b: Config) -> dict[str, tuple]:
    """Dotted name → (value in a, value in b), for every field that differs."""
    ours, theirs = fields_of(a), fields_of(b)
    return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


# %%
assert difference(preset("cpu"), preset("cpu")) == {}
assert difference(preset("cpu"), vary(preset("cpu"), {"model.layers": 3})) == {
    "model.layers": (2, 3)
}
print(difference(preset("record"), preset("baseline")))
