"""Names that a run's fields had, and have: saved results in today's, and configs for old code in that code's.

    python scripts/migrate.py            rewrite the configs in book/results in today's names
    python scripts/migrate.py RUN ...    rewrite what is in the folders of runs: logs and checkpoints

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

from speedrun.checkpoint import (
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    load_facts,
    save_checkpoint,
)
from speedrun.config import Config, config_from_json, fields_of
from speedrun.lab.errors import UserError, run_main
from speedrun.lab.files import atomic_write
from speedrun.lab.provenance import root
from speedrun.model.init import DRAWN_AS

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
    marks: a word that has stood in that module since then, where the module is older.
    """

    since: str
    is_old: Callable[[Flat], bool]
    forward: Callable[[Flat], Flat]
    back: Callable[[Flat], Flat]
    words: tuple[tuple[str, str], ...] = ()
    marks: str = ""


def reworded(text: str, steps: int) -> str:
    """Code from before the last `steps` changes, in the words since: what differs from today's then is more than names."""
    for step in STEPS[len(STEPS) - steps :]:
        for pattern, new in step.words:
            text = re.sub(pattern, new, text, flags=re.MULTILINE)
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


CODE_WORDS = {  # before the field's words → since; what is no identifier is a pattern
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
    r"\bspeedrun\.model\.plan\b": "speedrun.model.layout",
    r"\benter(?=[(,])": "mix_residual",
    r"\bleave(?=[(,])": "apply_backout",
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
    r"\bstep-tokens\b": "batch-tokens",
    r"\bgrad-shards\b": "micro-batches",
    r"\bpass-tokens\b": "max-forward-tokens",
    r"\bmax-document\b": "max-doc-tokens",
    r"\bembedding\.value_mix\b": "embedding.value_residual",
    r"\bvalue_mix(?=: Literal)": "value_residual",
    "value_mix": "ve_lambdas",
    r"\bembedding\.rate\b": "embedding.lr_mul",
    r"\bplan\.rate\b": "plan.lr_mul",
    r"\bhead\.rate\b": "head.lr_mul",
    r"\bhead\.cap\b": "head.softcap",
    "switches_of": "GPTConfig",
    "BankOptimizer": "MuonAdam",
    "even_rows": "normuon_normalize",
}
UPSTREAM_FIELDS = {  # before upstream's names of the model → since
    "model.layers": "model.num_layers",
    "model.heads": "model.num_heads",
    "model.width": "model.model_dim",
    "model.context": "model.max_seq_len",
    "model.block.zero_out": "model.block.zero_init_proj",
    "model.block.fan_in": "model.block.fan_in_init",
    "model.rotary.positions": "model.rotary.pos",
    "model.rotary.pairs": "model.rotary.interleaved",
    **{f"model.plan.{n}": f"model.layout.{n}" for n in ("x0", "skips", "backout", "lr_mul")},
    "model.plan.stream_dtype": "model.layout.stream_dtype",
    "model.plan.residual": "model.layout.resid_lambda_init",
    "model.plan.without": "model.layout.skip_sublayers",
    "model.head.tied": "model.head.tie",
    "model.head.multiple": "model.head.pad_vocab_to",
}
UPSTREAM_VALUES: dict[str, dict] = {  # of a field in today's name: its values before → since
    "model.rotary.pos": {"rotary": "rope", "half": "half_rope"},
    "model.rotary.interleaved": {"halves": False, "neighbours": True},
    "model.layout.skips": {"sigmoid": "unet_sigmoid", "one": "single", "gated": "single_gated"},
    "model.layout.skip_sublayers": {"nothing": "none", "attention": "attn"},
    "model.head.tie": {"split": "until_step"},
    "model.embedding.value_residual": {"share": "lambda", "free": "lambdas", "gates": "gate"},
}
UPSTREAM_WORDS = {  # before upstream's names of the model → since; likewise
    # the model's shape
    r"--model\.layers\b": "--model.num-layers",
    r"--model\.heads\b": "--model.num-heads",
    r"--model\.width\b": "--model.model-dim",
    r"--model\.context\b": "--model.max-seq-len",
    r"\b(model|config|options|size|SHAPE)\.layers\b": r"\1.num_layers",
    r"\b(model|config|options|self)\.heads\b": r"\1.num_heads",
    r"\b(model|config|options)\.width\b": r"\1.model_dim",
    r"\b(model|config|options|size|SHAPE)\.context\b": r"\1.max_seq_len",
    r"(GPTConfig\((?:[^()]|\([^()]*\))*?)\blayers=": r"\1num_layers=",
    r"(GPTConfig\((?:[^()]|\([^()]*\))*?)\bheads=": r"\1num_heads=",
    r"(GPTConfig\((?:[^()]|\([^()]*\))*?)\bwidth=": r"\1model_dim=",
    r"(GPTConfig\((?:[^()]|\([^()]*\))*?)\bcontext=": r"\1max_seq_len=",
    r"\blayers(?=: Annotated\[int, Interval)": "num_layers",
    r"\bheads(?=: PositiveInt = 12)": "num_heads",
    r"\bwidth(?=: Annotated\[int, Interval)": "model_dim",
    r"\bcontext(?=: Annotated\[int, Interval)": "max_seq_len",
    r'"layers", "heads", "width", "context"': '"num_layers", "num_heads", "model_dim", "max_seq_len"',
    r"\bwidth \{config\.model_dim\} is not a multiple of heads": "model_dim {config.model_dim} is not a multiple of num_heads",
    # its parameters
    r'(?<!: ")\btoken_embedding\b': "embed",
    r'(?<!: ")\bposition_embedding\b': "pos_embed",
    r'(?<!: ")(?<!carried\[")\bvalue_embedding\b': "value_embeds",
    r"\bembed(?=\(self, inputs|\(self: )": "embed_inputs",
    # which are drawn by the names that they had
    r'^(def init_parameter\(.*\n.*\n.*crc32\(f"\{seed\}:\{)spec\.name\}': 'DRAWN_AS = {"embed": "token_embedding", "pos_embed": "position_embedding", "value_embeds": "value_embedding", "lm_head": "head"}\n\n\n\\1DRAWN_AS.get(spec.name, spec.name)}',
    r'ParamSpec\("head", (?=\(d, words\))': 'ParamSpec("lm_head", ',
    r'\btied_to = "head"': 'tied_to = "lm_head"',
    r"@ self\.head\b": "@ self.lm_head",
    r"(\bx\.flatten\(0, 1\), self)\.head\b": r"\1.lm_head",
    # its blocks and positions
    "zero_out": "zero_init_proj",
    "fan_in": "fan_in_init",
    r'\bmodel\.rotary\.positions": "rotary"': 'model.rotary.pos": "rope"',
    r'\bmodel\.rotary\.positions": "half"': 'model.rotary.pos": "half_rope"',
    r"\bmodel\.rotary\.positions rotary\b": "model.rotary.pos rope",
    r"\bmodel\.rotary\.positions half\b": "model.rotary.pos half_rope",
    r"\b(rotary|options|config\.rotary\))\.positions\b": r"\1.pos",
    r'\bpos == "rotary"': 'pos == "rope"',
    r'\bpos == "half"': 'pos == "half_rope"',
    r'\bpositions: Literal\["learned", "rotary", "half"\]': 'pos: Literal["learned", "rope", "half_rope"]',
    r'"rotary": 2, "half": 4\}': '"rope": 2, "half_rope": 4}',
    r'RotaryConfig\((?:positions=)?"rotary"': 'RotaryConfig("rope"',
    r'RotaryConfig\((?:positions=)?"half"(?! if)': 'RotaryConfig("half_rope"',
    r'\bpairs: Literal\["halves", "neighbours"\] = "halves"': "interleaved: bool = False",
    r"(\bdef rotate\(.*)\bpairs: str": r"\1interleaved: bool = False",
    r'^    halves = pairs == "halves"\n': "",
    r"\b(x\.chunk\(2, -1\)) if halves else (x\.unflatten\(.*)": r"\2 if interleaved else \1",
    r"(\btorch\.cat\(turned, -1\)) if halves else (torch\.stack\(.*)": r"\2 if interleaved else \1",
    r'\bmodel\.rotary\.pairs": "halves"': 'model.rotary.interleaved": False',
    r'\bmodel\.rotary\.pairs": "neighbours"': 'model.rotary.interleaved": True',
    r"\brotary\.pairs\b": "rotary.interleaved",
    r'(\b(?:rotate|apply_rotary)\(.*), "halves"\)': r"\1)",
    r'(\b(?:rotate|apply_rotary)\(.*), "neighbours"\)': r"\1, interleaved=True)",
    r"\brotate(?=[(,]|$)": "apply_rotary",
    "rotation_tables": "rotary_tables",
    # how the stream runs through its layers
    "PlanConfig": "LayoutConfig",
    r'\bmodel\.plan\.without": "nothing"': 'model.layout.skip_sublayers": "none"',
    r'\bmodel\.plan\.without": "attention"': 'model.layout.skip_sublayers": "attn"',
    r"\b(plan|config|options)\.without\b": r"\1.skip_sublayers",
    r'\bskip_sublayers in \("attention", "both"\)': 'skip_sublayers in ("attn", "both")',
    r'\bwithout="attention"': 'skip_sublayers="attn"',
    r'\bwithout: Literal\["nothing", "attention", "mlp", "both"\] = "nothing"': 'skip_sublayers: Literal["none", "attn", "mlp", "both"] = "none"',
    r'\bmodel\.plan\.skips": "sigmoid"': 'model.layout.skips": "unet_sigmoid"',
    r'\bmodel\.plan\.skips": "one"': 'model.layout.skips": "single"',
    r'\bmodel\.plan\.skips": "gated"': 'model.layout.skips": "single_gated"',
    r'\bskips="one"': 'skips="single"',
    r'\bskips == "gated"': 'skips == "single_gated"',
    r'\bin \("one", "gated"\)': 'in ("single", "single_gated")',
    r'\bskips: Literal\["none", "unet", "sigmoid", "one", "gated"\]': 'skips: Literal["none", "unet", "unet_sigmoid", "single", "single_gated"]',
    r"\b(plan|config)\.residual\b": r"\1.resid_lambda_init",
    r"\bresidual(?=: NonNegativeFloat = 1\.0|=1\.1)": "resid_lambda_init",
    r"\b(model|config|self)\.plan\b": r"\1.layout",
    r"(?<!\.)\bplan\.(?=(?:x0|skips|backout|skip_sublayers|lr_mul|stream_dtype|resid_lambda_init)\b)": "layout.",
    r"\bplan(?=: Sequence\[LayerSpec\]|: LayoutConfig|=LayoutConfig\()": "layout",
    r"(?<=\benumerate\()plan(?=\))": "layout",
    r"(?<=\blen\()plan(?=\)(?:,?\)))": "layout",
    r"(?<=\bin )plan(?= if isinstance\(spec)": "layout",
    r"\bwords, plan = ": "words, layout = ",
    r"\b(tables_of\(|scalar_specs\(|layer_specs\(config, )plan\b": r"\1layout",
    "tables_of": "num_value_tables",
    "values_by_layer": "value_table_layout",
    # embeddings and logits
    r'\bvalue_residual": "free"': 'value_residual": "lambdas"',
    r'\bvalue_residual": "gates"': 'value_residual": "gate"',
    r'\bvalue_residual == "gates"': 'value_residual == "gate"',
    r'\bvalue_residual == "free"': 'value_residual == "lambdas"',
    r'\bvalue_residual == "share"': 'value_residual == "lambda"',
    r'\bkind == "gates"': 'kind == "gate"',
    r'\bkind == "share"': 'kind == "lambda"',
    r'\bLiteral\["share", "free", "gates"\] = "share"': 'Literal["lambda", "lambdas", "gate"] = "lambda"',
    "smeared": "apply_smear",
    r'\bhead\.tied": "split"': 'head.tie": "until_step"',
    r'\bhead\.tied == "split"': 'head.tie == "until_step"',
    r"--model\.head\.tied split\b": "--model.head.tie until_step",
    r"\bhead\.tied\b": "head.tie",
    r'HeadConfig\(tied="split"': 'HeadConfig(tie="until_step"',
    r"HeadConfig\(tied=": "HeadConfig(tie=",
    r'\btied: Literal\["tied", "untied", "split"\]': 'tie: Literal["tied", "untied", "until_step"]',
    r"\bhead\.multiple\b": "head.pad_vocab_to",
    r"\bmultiple(?=: Annotated\[int, Interval)": "pad_vocab_to",
    r"HeadConfig\(multiple=": "HeadConfig(pad_vocab_to=",
    r"\bpadded(?=\()": "round_up",
    r"(\bfrom speedrun\.\S+ import .*)\bpadded\b": r"\1round_up",
    # functions
    r"\bnormed(?=\(x[,:] |\(self)": "apply_norm",
    r"(\bfrom speedrun\.\S+ import .*)\bnormed\b": r"\1apply_norm",
    r"\bclass Look\b": "class AttentionContext",
    r"\breturn Look\(": "return AttentionContext(",
    r"(-> |look: )Look\b": r"\1AttentionContext",
    "look_for": "attention_context",
    r"\bturns(?=: tuple\[Tensor, Tensor\] \| None)": "cos_sin",
    r"\blook\.turns\b": "context.cos_sin",
    r"\blook\.(?=packed\b|tiles\b|backend\b)": "context.",
    r"\blook: AttentionContext\b": "context: AttentionContext",
    r"\bconfig, look = self\.config\b": "config, context = self.config",
    r"\bconfig, look, values\b": "config, context, values",
    r"\blook(?=\(\))": "detect_machine",
    r"(\bfrom speedrun\.\S+ import .*)\blook\b": r"\1detect_machine",
    r"\bheld_out(?=\(run|\(live)": "val_batches",
    r"(\bfrom speedrun\.\S+ import .*)\bheld_out\b": r"\1val_batches",
    r"\bevaluate(?=\(run|\(live)": "validation_loss",
    r"(\bfrom speedrun\.\S+ import .*)\bevaluate\b": r"\1validation_loss",
    "FREE": "RESUMABLE_FIELDS",
    # measuring
    "against_control": "dunnett",
    r"\bbeside(?=\()": "compare_line",
    r"(\bfrom speedrun\.\S+ import .*)\bbeside\b": r"\1compare_line",
    r"(\bclass |: |-> |, |\bimport (?:.*, )?)Sample\b(?=[(:,\])]|$)": r"\1Summary",
    r"\bSample(?=\()": "Summary",
    "retrain": "train_in_place",
    r"\brestart(?=\(live)": "reset_run",
    "train_watched": "train_with_history",
    "seen_by_model": "compile_key",
    "train_alike": "train_group",
    "groups_of": "group_by_model",
    r'\bHERE(?=\["turn"\]|: dict)': "WORKER",
    r"(\bclass |: |-> |\breturn )Trained\b(?! )": r"\1LoadedModel",
    r"\bchoose(?=\(logits)": "sample_token",
    r"(\bfrom speedrun\.\S+ import .*)\bchoose\b": r"\1sample_token",
    r'(?<!")\bknown_share\b': "known_word_fraction",  # not the key of a result
    r'(?<!")\brecited_share\b': "verbatim_fraction",
}


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


def as_patterns(words: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """Words as patterns, which no longer word matches; what is no identifier is a pattern as it is."""
    return tuple((rf"\b{old}\b" if old.isidentifier() else old, new) for old, new in words.items())


def renamed(names: dict[str, str], values: dict[str, dict] | None = None) -> Callable[[Flat], Flat]:
    """A change of names, and of what some fields' values are called, by the new names; nothing else."""

    def change(flat: Flat) -> Flat:
        new = {names.get(name, name): value for name, value in flat.items()}
        return {n: tables[n].get(v, v) if n in tables else v for n, v in new.items()}

    tables = values or {}
    return change


STEPS = (
    Step("speedrun.params", lambda flat: "optim.lr" in flat, one_optimizer, two_optimizers),
    Step(
        "speedrun.model.layout",
        lambda flat: "data.step_tokens" in flat,
        renamed(FIELDS_WORDS),
        renamed(backwards(FIELDS_WORDS)),
        as_patterns(CODE_WORDS),
    ),
    Step(
        "speedrun.lab.timer", lambda flat: False, renamed({}), renamed({}), as_patterns(TIMER_WORDS)
    ),
    Step("speedrun.heartbeat", lambda flat: False, renamed({}), renamed({}), ROOMS_WORDS),
    Step(
        "speedrun.model.gpt",
        lambda flat: "model.layers" in flat,
        renamed(UPSTREAM_FIELDS, UPSTREAM_VALUES),
        renamed(
            backwards(UPSTREAM_FIELDS),
            {
                backwards(UPSTREAM_FIELDS).get(n, n): backwards(v)
                for n, v in UPSTREAM_VALUES.items()
            },
        ),
        as_patterns(UPSTREAM_WORDS),
        marks="num_layers",
    ),
)


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


def in_todays_parameters(tensors: dict[str, Any]) -> dict[str, Any]:
    """Tensors of a checkpoint, weights or an optimizer's state, by their names of today."""
    old = {o: new for o, new in CODE_WORDS.items() if o.isidentifier()} | backwards(DRAWN_AS)
    words = re.compile(rf"\b({'|'.join(old)})\b")
    return {words.sub(lambda found: old[found[0]], name): t for name, t in tensors.items()}


def migrate_run(folder: Path) -> bool:
    """Rewrite a run's log and its checkpoints in today's names; whether there was something to do. Every number stays."""
    saved = latest_checkpoint(folder)  # or UserError
    done = config_of(saved) != (config := in_todays_names(config_of(saved)))
    for path in checkpoints(folder) if done else []:
        weights, moments, facts = load_checkpoint(path)
        weights, moments = map(in_todays_parameters, (weights, moments))
        save_checkpoint(folder, facts["step"], weights, moments, facts | {"config": config})
    log = folder / "metrics.jsonl"
    first, _, rest = log.read_text(encoding="utf-8").partition("\n")
    record = json.loads(first)
    if "config" in record and done:
        record["config"] = in_todays_names(record["config"])
        atomic_write(log, json.dumps(record) + "\n" + rest)
    return done


def config_of(checkpoint: Path) -> dict:
    """The config that a checkpoint says, in whatever names."""
    return load_facts(checkpoint)["config"]


def text_of(result: dict) -> str:
    """A result as `save_result` writes it."""
    return json.dumps(result, indent=1, ensure_ascii=False) + "\n"


def main(runs: list[str]) -> None:
    for name in runs:
        print(
            f"{name}: {'had older names' if migrate_run(Path(name)) else 'has the names of today'}"
        )
    if runs:
        return
    paths = sorted((root() / "book" / "results").rglob("*.json"))
    done = [path for path in paths if migrate(path)]
    print(f"{len(done)} of {len(paths)} results had older names")


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(sys.argv[1:])))
