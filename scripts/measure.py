"""Measure what a chapter shows, and keep it with its stamp in book/results/.

    python scripts/measure.py SLUG [NAME [ARGUMENT …]]

SLUG is a module of speedrun.measure (baseline, training_loop, samples, speedrun, …). Without NAME, all its measurements are made.
Of a study (ablations, …) a NAME is one run, and its ARGUMENT a data folder, if not the preset's. "missing" instead of a NAME makes the runs
that have no result yet, one at a time on each GPU; each is kept when it ends, so a study may be stopped, and go on later.
"""

from speedrun.lab.errors import prepare_command, run_main

if __name__ == "__main__":
    prepare_command()

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from queue import SimpleQueue
from typing import Any

from speedrun.lab.errors import UserError
from speedrun.lab.hardware import detect_machine, setup
from speedrun.lab.provenance import root
from speedrun.lab.results import result_names, save_result
from speedrun.measure.runs import kept_runs


def measured(module: Any, name: str, rest: list[str], command: str) -> tuple[dict, dict]:
    """Make one measurement, or train one run of a study: its data and its stamp."""
    if not hasattr(module, "study"):
        return module.measure(name, rest, command)
    from speedrun.config import vary
    from speedrun.measure.study import train_alone

    runs = module.study()
    if name not in runs:
        raise UserError(f"the study has no run “{name}”", f"missing, or one of {', '.join(runs)}")
    run = vary(runs[name], {"data.path": rest[0]} if rest else {})
    with getattr(module, "around", nullcontext)(name):
        return train_alone(run, command, getattr(module, "after", None))


def make_missing(slug: str, names: Iterable[str], rest: list[str]) -> int:
    """Train the runs of a study that have no result yet, each in a process that sees one GPU, or has one core. Status 1 if one failed."""
    there, free, machine = result_names(slug), SimpleQueue[dict[str, str]](), detect_machine()
    places = [{"CUDA_VISIBLE_DEVICES": gpu.uuid} for gpu in machine.gpus]
    for place in places or [{"OMP_NUM_THREADS": "1"}] * machine.cores:
        free.put(place)

    def make(name: str) -> int:
        place = free.get()
        words = [sys.executable, str(root() / "scripts" / "measure.py"), slug, name, *rest]
        try:
            return subprocess.call(words, env=os.environ | place)
        finally:
            free.put(place)

    with ThreadPoolExecutor(free.qsize()) as pool:
        ended = list(pool.map(make, [name for name in names if name not in there]))
    return int(any(ended))


def main(arguments: list[str]) -> int:
    """Dispatch to speedrun.measure.<slug>.measure and save what it returns."""
    files = (root() / "speedrun" / "measure").glob("[!_]*.py")
    makes = re.compile(r"^def (measure|study)\(", re.MULTILINE)
    known = sorted(path.stem for path in files if makes.search(path.read_text(encoding="utf-8")))
    if not arguments or arguments[0] not in known:
        print(f"{__doc__}\nmeasurements: {', '.join(known)}", file=sys.stderr)
        return 2
    setup()
    slug, names, rest = arguments[0], arguments[1:2], arguments[2:]
    module = importlib.import_module(f"speedrun.measure.{slug}")
    command = shlex.join(["python", "scripts/measure.py", *arguments])
    study = module.study() if hasattr(module, "study") else None
    if study is not None and names in ([], ["missing"]):
        return make_missing(slug, study, rest)
    for name in names or module.NAMES:
        begin = time.perf_counter()
        data, stamp = measured(module, name, rest, command)
        stamp.setdefault("minutes", round((time.perf_counter() - begin) / 60, 2))
        print(f"wrote {save_result(slug, name, data, stamp).relative_to(root())}", flush=True)
        shutil.rmtree(kept_runs(stamp), ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(sys.argv[1:])))
