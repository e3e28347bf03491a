"""Measure what a chapter shows, and keep it with its stamp in book/results/.

    python scripts/measure.py SLUG [NAME [ARGUMENT …]]

SLUG is a module of speedrun.measure (baseline, training_loop, samples, speedrun, …). Without NAME, all its measurements are made.
"""

from speedrun.lab.errors import prepare_command, run_main

if __name__ == "__main__":
    prepare_command()

import importlib
import shlex
import sys
import time

from speedrun.lab.hardware import setup
from speedrun.lab.provenance import root
from speedrun.lab.results import save_result


def main(arguments: list[str]) -> int:
    """Dispatch to speedrun.measure.<slug>.measure and save what it returns."""
    files = (root() / "speedrun" / "measure").glob("[!_]*.py")
    known = sorted(
        path.stem for path in files if "\ndef measure(" in path.read_text(encoding="utf-8")
    )
    if not arguments or arguments[0] not in known:
        print(f"{__doc__}\nmeasurements: {', '.join(known)}", file=sys.stderr)
        return 2
    setup()
    slug, names, rest = arguments[0], arguments[1:2], arguments[2:]
    module = importlib.import_module(f"speedrun.measure.{slug}")
    command = shlex.join(["python", "scripts/measure.py", *arguments])
    for name in names or module.NAMES:
        begin = time.perf_counter()
        data, stamp = module.measure(name, rest, command)
        stamp.setdefault("minutes", round((time.perf_counter() - begin) / 60, 2))
        print(f"wrote {save_result(slug, name, data, stamp).relative_to(root())}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(sys.argv[1:])))
