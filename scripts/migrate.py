"""Names that a run's fields had, and have: saved results in today's, and configs for old code in that code's.

    python scripts/migrate.py    rewrite the configs in book/results in today's names

A step is a pair of functions between flat configs ({"optim.adam.lr": 0.004, …}): forwards, and back. Back from today's names, a config says
everything; what old code does not know is left out where it is off, and refused where it is on.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from speedrun.config import Config, config_from_json, fields_of
from speedrun.lab.errors import UserError, run_main
from speedrun.lab.files import atomic_write
from speedrun.lab.provenance import root

Flat = dict[str, Any]
RENAMED = {  # before house I → since
    **{f"model.{n}": f"model.{n}" for n in ("layers", "heads", "width", "context", "init_std")},
    **{
        f"block.{n}": f"model.block.{n}"
        for n in ("norm", "biases", "qk_norm", "activation", "zero_out", "fan_in")
    },  # fmt: skip
    **{f"rotary.{n}": f"model.rotary.{n}" for n in ("positions", "base", "pairs")},
    **{
        f"embedding.{n}": f"model.embedding.{n}"
        for n in ("norm", "std", "rate", "smear", "values", "value_mix", "value_std", "value_rate")
    },  # fmt: skip
    **{
        f"plan.{n}": f"model.plan.{n}"
        for n in ("x0", "residual", "skips", "backout", "without", "rate")
    },  # fmt: skip
    **{f"head.{n}": f"model.head.{n}" for n in ("tied", "std", "rate", "multiple", "cap")},
    "head.split_at": "schedule.untie_at",
    "optim.lr": "optim.adam.lr",
    "optim.betas": "optim.adam.betas",
    "optim.eps": "optim.adam.eps",
    "optim.grad_clip": "optim.grad_clip",
    "optim.warmup_steps": "schedule.warmup_steps",
    "optim.final_lr": "schedule.final_lr_frac",
    "schedule.shape": "schedule.shape",
    "schedule.cooldown": "schedule.cooldown_frac",
    "matrix.lr": "optim.matrix_lr",
    "matrix.momentum": "optim.muon.momentum",
    "matrix.nesterov": "optim.muon.nesterov",
    "matrix.iterations": "optim.muon.ns_steps",
    "matrix.shape_factor": "optim.muon.scale_by_shape",
    "muon.polynomials": "optim.muon.orthogonalizer",
    "muon.products": "optim.muon.ns_dtype",
    "muon.beta2": "optim.muon.beta2",
    "muon.low_momentum": "schedule.momentum_min",
    "muon.momentum_steps": "schedule.momentum_ramp",
    "muon.wide_factor": "optim.muon.down_lr_mul",
}
MATRICES = {"adamw": "adam", "muon": "muon", "soap": "soap"}
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "split": "bf16_mantissa"}
PRESETS = {
    "record": "record1",
    "small": "small_gpt2",
    "cpu": "cpu_gpt2",
}  # other runs have these names now
TABLE_DECAY = 150.0  # the multiple of sharing.adam_decay that tables had


class Step(NamedTuple):
    """One change of names. since: a module that the package has had since then. words: what was renamed in code, as patterns, and to what.

    A change of words alone finds no config that is old, and leaves all as they are.
    """

    since: str
    is_old: Callable[[Flat], bool]
    forward: Callable[[Flat], Flat]
    back: Callable[[Flat], Flat]
    words: tuple[tuple[str, str], ...] = ()


def reworded(text: str, steps: int) -> str:
    """Code from before the last `steps` changes, in the words since: what differs from today's then is more than names."""
    for step in STEPS[len(STEPS) - steps :]:
        for pattern, new in step.words:
            text = re.sub(pattern, new, text)
    return text


def backwards(names: dict) -> dict:
    return {new: old for old, new in names.items()}


def one_optimizer(old: Flat) -> Flat:
    """From two optimizers and a switch between them to one; the model's groups go into the model."""
    new = {RENAMED.get(name, name): value for name, value in old.items()}
    if new.pop("architecture", "gpt") != "gpt":
        raise UserError("architecture=baseline is no run of today's", "check out an older commit")
    rule = new.pop("matrix.rule", "adamw")
    new["optim.matrices"], new["preset"] = MATRICES[rule], PRESETS.get(old["preset"], old["preset"])
    decay = new.pop("optim.weight_decay")
    new["optim.adam.weight_decay"] = decay
    if new.pop("sharing.on", False):
        new["optim.adam.cautious"], new["optim.grad_clip"] = True, 0.0
        new["optim.adam.weight_decay"] = TABLE_DECAY * new["sharing.adam_decay"]
        new["optim.adam.every"] = new["sharing.adam_every"]
    gram = new.get("optim.muon.ns_dtype") == "float16"
    polar = new.get("optim.muon.orthogonalizer") == "polar_express"
    if rule == "muon" and polar and new.get("muon.gram", gram) != gram:
        raise UserError(
            "muon.gram is on in float16 and off in bfloat16", "check out an older commit"
        )
    for name in ("sharing.adam_decay", "sharing.adam_every", "muon.gram"):
        new.pop(name, None)
    kind, squared = new.pop("muon.decay", "plain"), new.pop("muon.decay_factor", 1.2)
    new["optim.muon.decay_with_lr"] = kind in ("squared", "cautious")
    new["optim.muon.cautious"] = kind == "cautious"
    own = {"plain": decay if rule == "muon" else 0.0, "none": 0.0}
    new["optim.muon.weight_decay"] = own.get(kind, squared)
    new["optim.muon.param_dtype"] = DTYPES[new.pop("muon.weights", "float32")]
    return new


def two_optimizers(new: Flat) -> Flat:
    """Back from `one_optimizer`. Refuses what there was no name for."""
    names = backwards(RENAMED)
    old = {names.get(name, name): value for name, value in new.items()}
    old |= {"muon.decay_factor": 1.2, "sharing.adam_decay": 0.005, "sharing.adam_every": 2}
    old["preset"] = backwards(PRESETS).get(new["preset"], new["preset"])
    old["architecture"] = "gpt"
    old["matrix.rule"] = backwards(MATRICES)[old.pop("optim.matrices")]
    old["muon.weights"] = backwards(DTYPES)[old.pop("optim.muon.param_dtype")]
    old["muon.gram"] = new["optim.muon.ns_dtype"] == "float16"
    adam, every = old.pop("optim.adam.weight_decay"), old.pop("optim.adam.every")
    decay, squared = old.pop("optim.muon.weight_decay"), old.pop("optim.muon.decay_with_lr")
    cautious, shared = old.pop("optim.muon.cautious"), old.pop("optim.adam.cautious")
    muon = old["matrix.rule"] == "muon"
    old["sharing.on"], old["optim.weight_decay"] = shared, adam
    if shared:
        if new["optim.grad_clip"]:
            raise UserError("old code does not clip under this Adam", "optim.grad_clip 0")
        old["sharing.adam_decay"], old["sharing.adam_every"] = adam / TABLE_DECAY, every
        old["optim.weight_decay"] = decay if muon and not squared else 0.1
    elif every != 1:
        raise UserError("old code updates all parameters in every step", "optim.adam.every 1")
    if squared:
        old["muon.decay"], old["muon.decay_factor"] = "cautious" if cautious else "squared", decay
    elif muon and decay != old["optim.weight_decay"]:
        old["muon.decay"] = "none"
        if decay or cautious:
            raise UserError("old code has one weight decay for all", "equal ones")
    else:
        old["muon.decay"] = "plain"
    return old


FIELDS_WORDS = {  # before the field's words → since
    "data.step_tokens": "data.batch_tokens",
    "data.grad_shards": "data.micro_batches",
    "data.pass_tokens": "data.max_forward_tokens",
    "data.max_document": "data.max_doc_tokens",
    "model.embedding.rate": "model.embedding.lr_mul",
    "model.embedding.value_rate": "model.embedding.value_lr_mul",
    "model.embedding.value_mix": "model.embedding.value_residual",
    "model.plan.rate": "model.plan.lr_mul",
    "model.head.rate": "model.head.lr_mul",
    "model.head.cap": "model.head.softcap",
}


CODE_WORDS = {
    "stream_weight": "resid_lambdas",
    "x0_weight": "x0_lambdas",
    "skip_weight": "skip_lambdas",
    "backout_weight": "backout_lambda",
    "smear_weight": "smear_lambda",
    "value_gate": "ve_gate",
    "READS": "GATE_CHANNELS",
    "capped": "softcap",
    "looked_up": "lookup_value_embeds",
    "with_value": "add_value_embed",
    "Problem": "UserError",
    "plan_step": "plan_documents",
    "plan_of": "layout_of",
    "speedrun.model.plan": "speedrun.model.layout",
    "enter(?=[(,])": "mix_residual",
    "leave(?=[(,])": "apply_backout",
    "deaf": "no_attn",
    "dull": "no_mlp",
    "chance": "p_values",
    "deviation": "pooled_sd",
    "freedom": "dof",
    "step_tokens": "batch_tokens",
    "grad_shards": "micro_batches",
    "pass_tokens": "max_forward_tokens",
    "max_document": "max_doc_tokens",
    "value_rate": "value_lr_mul",
    "step-tokens": "batch-tokens",
    "grad-shards": "micro-batches",
    "pass-tokens": "max-forward-tokens",
    "max-document": "max-doc-tokens",
    "embedding.value_mix": "embedding.value_residual",
    "embedding.rate": "embedding.lr_mul",
    "plan.rate": "plan.lr_mul",
    "head.rate": "head.lr_mul",
    "head.cap": "head.softcap",
}  # before the field's words → since


TIMER_WORDS = {
    "Clock": "TrainClock",
    "paused": "off_the_clock",
    "Marks": "StepTimer",
}  # before the clock had a module of its own → since
ROOMS_WORDS = (
    (r"\bassemble\b", "build_run"),
    (r"\bheart\b", "heartbeat"),
    (r"(?<=def )say(?=\(line)|(?<=yield )say\b", "print_line"),
    (r"\bPulse\b", "RankStatus"),
    (r"\bpulses\b", "read_heartbeats"),
)  # before the trainer was taken apart → since


def renamed(names: dict[str, str]) -> Callable[[Flat], Flat]:
    """A change of names and nothing else."""
    return lambda flat: {names.get(name, name): value for name, value in flat.items()}


def words_of(names: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """Patterns of whole words, and what each was renamed to."""
    return tuple((rf"\b{old}" + r"\b" * old[-1].isalnum(), new) for old, new in names.items())


STEPS = (
    Step("speedrun.params", lambda flat: "optim.lr" in flat, one_optimizer, two_optimizers),
    Step("speedrun.model.layout", lambda flat: "data.step_tokens" in flat, renamed(FIELDS_WORDS), renamed(backwards(FIELDS_WORDS)), words_of(CODE_WORDS)),
    Step("speedrun.lab.timer", lambda flat: False, renamed({}), renamed({}), words_of(TIMER_WORDS)),
    Step("speedrun.heartbeat", lambda flat: False, renamed({}), renamed({}), ROOMS_WORDS),
)  # fmt: skip


def leaves(part: dict, prefix: str = "") -> Flat:
    """All values of a saved config, by their dotted names."""
    flat: Flat = {}
    for name, value in part.items():
        nested = isinstance(value, dict)
        flat |= leaves(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def nested(flat: Flat) -> dict:
    """`leaves` undone."""
    found: dict = {}
    for name, value in flat.items():
        *groups, last = name.split(".")
        place = found
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return found


def in_todays_names(saved: dict) -> dict:
    """A saved config of whatever age in today's names and their order. What it did not say it does not say now."""
    flat = leaves(saved)
    for step in STEPS:
        flat = step.forward(flat) if step.is_old(flat) else flat
    config_from_json(nested(flat))  # which refuses what is no run
    return nested({name: flat[name] for name in fields_of(Config()) if name in flat})


def todays(saved: dict) -> Config:
    """The run of a saved config, of whatever age."""
    return config_from_json(in_todays_names(saved))


def in_older_names(config: Config, steps: int) -> dict:
    """A config in the names before the last `steps` changes, with every field that they had."""
    flat = fields_of(config)
    for step in reversed(STEPS[len(STEPS) - steps :]):
        flat = step.back(flat)
    return json.loads(json.dumps(nested(flat), default=dataclasses.asdict))


def configs_in(value: Any) -> list[dict]:
    """Every training run's config that a result holds under the key `config`."""
    if isinstance(value, list):
        return [config for item in value for config in configs_in(item)]
    if not isinstance(value, dict):
        return []
    own = [value["config"]] if isinstance(value.get("config"), dict) else []
    inside = (item for key, item in value.items() if key != "config")
    return own + [config for item in inside for config in configs_in(item)]


def migrate(path: Path) -> bool:
    """Rewrite one result's configs, in the layout that the file has; whether there was something to do."""
    before = path.read_text(encoding="utf-8")
    result = json.loads(before)
    pairs = [(old, in_todays_names(old)) for old in configs_in(result["data"])]
    if "base" in result:  # flat, as ablate.py writes it
        base = leaves(in_todays_names(nested(result["base"])))
        pairs.append((result["base"], base))
    if before == text_of(result):
        for old, new in pairs:
            old.clear()
            old.update(new)
        after = text_of(result)
    else:  # a line for each run
        after = before
        for old, new in pairs:
            after = after.replace(json.dumps(old), json.dumps(new))
    if after != before:
        atomic_write(path, after)
    return after != before


def text_of(result: dict) -> str:
    """A result as `save_result` writes it."""
    return json.dumps(result, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    paths = sorted((root() / "book" / "results").rglob("*.json"))
    done = [path for path in paths if migrate(path)]
    print(f"{len(done)} of {len(paths)} results had older names")


if __name__ == "__main__":
    sys.exit(run_main(main))
