# Tangled from notebooks/22_config.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Validation: bounds in the types
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
