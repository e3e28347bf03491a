# Tangled from notebooks/24_speedrun.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The real runs
import shlex
from pathlib import Path

from speedrun.config import config_from_json
from speedrun.presets import as_arguments
from speedrun.lab.errors import UserError
from speedrun.measure.study import measured_run

NAMES = ()  # any name: python scripts/measure.py speedrun NAME RUN_FOLDER …


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Collect finished runs (their folders) under a name. Returns data, and the stamp of the first run for all."""
    if not arguments:
        raise UserError(
            f"no run is given for {name}", f"python scripts/measure.py speedrun {name} runs/…"
        )
    runs = [measured_run(Path(folder)) for folder in arguments]
    stamps = [run.pop("stamp") for run in runs]
    if len({(stamp["gpu"], stamp["torch"], stamp["corpus"]["sha256"]) for stamp in stamps}) > 1:
        what = f"the runs of {name} were made on different machines, versions or texts"
        raise UserError(what, "measure them together")
    arguments = as_arguments(config_from_json(runs[0]["config"]))
    again = {"command": shlex.join(["python", "-m", "speedrun.launch", *arguments])}
    seeds = [seed for stamp in stamps for seed in stamp["seeds"]]
    minutes = round(sum(run["seconds"] + run["prepared_s"] for run in runs) / 60, 2)
    return {"runs": runs}, stamps[0] | again | {"n": len(runs), "seeds": seeds, "minutes": minutes}
