"""Ablations: one run, and the same with some fields changed, over paired seeds.

    python scripts/ablate.py OUT.json --arm NAME FIELD=VALUE … [--arm …] [--seeds 3] [--control 9] [FLAG …]

Each arm is the base with its fields changed: --arm "no QK-norm" model.block.qk_norm=False. Further flags make the base, as for speedrun.train
(--preset cpu_gpt2 --steps 600 --model.block.qk-norm). The base is trained --control times, each arm --seeds times, with the same first seeds and the
same data; on the GPUs of this machine, or on its cores. OUT.json is written as soon as an arm is done, with its stamp; what is in it already is kept, if the code and the base are the same.
"""

from speedrun.lab.errors import UserError, prepare_command, run_main

if __name__ == "__main__":
    prepare_command()

import argparse
import ast
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speedrun.config import Config, check_config, config_from_json, fields_of, vary
from speedrun.lab.files import atomic_write
from speedrun.lab.hardware import detect_machine, setup
from speedrun.lab.provenance import stamp
from speedrun.lab.stats import describe, study_of
from speedrun.measure.runs import corpus_of, train_each
from speedrun.presets import read_command

MODULES = ["speedrun.train", "speedrun.measure.runs"]


def changes_in(words: list[str]) -> dict[str, Any]:
    """FIELD=VALUE … as a dictionary; a value is a Python literal, or else a string."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise UserError(
                f"“{word}” is no FIELD=VALUE", "--arm NAME model.block.qk_norm=False, say"
            )
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found


def read_arms(base: Config, given: list[list[str]]) -> dict[str, Config]:
    """The base and every arm, checked, by name."""
    arms = {"control": base}
    for name, *words in given:
        if name in arms:
            raise UserError(f"two arms are called “{name}”", "give each --arm a name of its own")
        arms[name] = check_config(vary(base, changes_in(words)))
    return arms


def kept(path: Path, facts: dict, base: Config) -> dict[str, list[dict]]:
    """Arms that the file has from the same code, machine, text and base."""
    if not path.exists():
        return {}
    other = "another file name"
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        arms, base_then = old["data"]["arms"], old["base"]
        same = all(old["stamp"][key] == facts[key] for key in ("modules", "gpu", "cpu", "torch", "corpus"))  # fmt: skip
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is there, and holds no ablations", other) from None
    if not same or base_then != json.loads(as_json(base)):
        raise UserError(f"{path} holds runs of another base, other code or another machine", other)
    return arms


def trained(run: Config, count: int, there: list[dict] | None) -> bool:
    """Whether an arm's runs are there already."""
    if there is None or len(there) < count:
        return False
    return config_from_json(there[0]["config"]) == vary(run, {"seed": 0})


def brief(learned: dict[str, list]) -> dict[str, list]:
    """Weights over a run, to five digits; what has more than 64 numbers is left out."""

    def short(values: Any) -> Any:
        return [short(value) for value in values] if isinstance(values, list) else float(f"{values:.5g}")  # fmt: skip

    few = {name: told for name, told in learned.items() if str(told[0][1]).count(",") < 64}
    return {name: [[step, short(values)] for step, values in told] for name, told in few.items()}


def as_json(base: Config) -> str:
    """A config's fields by dotted name; a table is a list of its rows."""
    return json.dumps(fields_of(base), default=dataclasses.asdict)


def write(path: Path, facts: dict, base: Config, arms: dict[str, list[dict]]) -> None:
    """The file, in one step, a line for each run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {
        arm: [
            {**run, "learned": brief(run["learned"])} if "learned" in run else run for run in runs
        ]
        for arm, runs in arms.items()
    }
    lines = ",\n".join(
        f"  {json.dumps(arm)}: [\n   " + ",\n   ".join(map(json.dumps, runs)) + "\n  ]"
        for arm, runs in kept.items()
    )
    stamped = f' "stamp": {json.dumps(facts)},\n "base": {as_json(base)}'
    text = f'{{\n{stamped},\n "data": {{"arms": {{\n{lines}\n }}}}\n}}\n'
    atomic_write(path, text)


def report(arms: dict[str, list[dict]]) -> list[str]:
    """A line for each arm: mean, deviation, how far it is from the control, Dunnett's p if all were run more than once, and time."""
    losses = {name: [run["val_loss"] for run in runs] for name, runs in arms.items()}
    enough = len(arms) > 1 and min(map(len, losses.values())) > 1
    study = study_of(losses) if enough else None
    control, lines = describe(losses["control"]), []
    for name, values in losses.items():
        seconds = sum(run["seconds"] for run in arms[name]) / len(values)
        told = f"{name:36} {describe(values)}"
        if name != "control":
            told = (
                study.line(name)
                if study
                else f"{told}  {describe(values).mean - control.mean:+.4f}"
            )
        lines.append(f"{told}  {seconds:.1f} s")
    if study:
        lines.append(f"one deviation for all: {study.pooled_sd:.4f}; p for all arms together")
    return lines


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("out", type=Path, help="where the runs are kept: a file that ends in .json")
    parser.add_argument("--arm", nargs="+", action="append", default=[], metavar=("NAME", "FIELD=VALUE"))  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    parser.add_argument("--control", type=int, default=9, help="runs of the base")
    options, flags = parser.parse_known_args(arguments)
    setup()
    if min(options.seeds, options.control) < 1:
        what = f"--seeds {options.seeds} --control {options.control}: every arm is trained"
        raise UserError(what, "1 or more of each; a claim wants 3 and 9")
    usual = "small" if detect_machine().gpus else "cpu"
    base = check_config(read_command(lambda run: run, flags, usual, "scripts/ablate.py"))
    runs = read_arms(base, options.arm)
    command = shlex.join(["python", "scripts/ablate.py", *arguments])
    facts = stamp(command, MODULES, options.control, range(options.control), corpus_of(base))
    done = kept(options.out, facts, base)
    counts = {name: options.control if name == "control" else options.seeds for name in runs}
    missing = [name for name in runs if not trained(runs[name], counts[name], done.get(name))]
    pairs = [(name, seed) for name in missing for seed in range(counts[name])]
    wanted = [vary(runs[name], {"seed": seed}) for name, seed in pairs]
    if wanted:
        write(options.out, facts, base, done)  # fails now, and not after hours, if it must not
    ended = train_each(wanted, bool(detect_machine().gpus))
    new: dict[str, dict[int, dict]] = {name: {} for name in missing}
    for number, result in tqdm(ended, total=len(wanted), unit="run"):
        name, seed = pairs[number]
        new[name][seed] = result
        if len(new[name]) == counts[name]:
            done[name] = [new[name][seed] for seed in range(counts[name])]
            write(options.out, facts, base, done)
    for line in report({name: done[name] for name in runs}):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(sys.argv[1:])))
