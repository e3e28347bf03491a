# Tangled from notebooks/96_logs_and_stamps.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.lab.provenance import module_hashes, note_opened, root


# %% Results: numbers that remember where they come from
import csv
import json
from pathlib import Path

from speedrun.lab.errors import UserError
from speedrun.lab.files import atomic_write


def freshness(result: dict) -> str:
    """`fresh`: the measured code is today's. `same behaviour`: it changed, and was shown to train bit-equally. Else `stale`."""
    measured, proved = result["stamp"]["modules"], result.get("proof", {}).get("modules")
    today = module_hashes(measured)
    return "fresh" if today == measured else "same behaviour" if today == proved else "stale"


def public_table(name: str) -> list[dict]:
    """A table of the public record history, book/data/<name>.csv, as dicts of strings: records, curves, variance, or chain9 (record 9, one change after the other)."""
    path = root() / "book" / "data" / f"{name}.csv"
    note_opened(path)
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def result_path(slug: str, name: str) -> Path:
    """Where a measurement is kept: book/results/<slug>/<name>.json."""
    return root() / "book" / "results" / slug / f"{name}.json"


def result_names(slug: str) -> list[str]:
    """The names of all measurements of a chapter."""
    return sorted(path.stem for path in result_path(slug, "").parent.glob("*.json"))


def save_result(slug: str, name: str, data, stamp: dict) -> Path:
    """Write a measurement, in one step."""
    path = result_path(slug, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"stamp": stamp, "data": data}, indent=1, ensure_ascii=False)
    atomic_write(path, text + "\n")
    return path


def load_result(slug: str, name: str) -> dict:
    """A measurement with its stamp: {"stamp": …, "data": …}."""
    path = result_path(slug, name)
    note_opened(path)
    if not path.is_file():
        what = f"book/results/{slug}/{name}.json does not exist: nobody has measured that yet"
        raise UserError(what, f"python scripts/measure.py {slug} {name}")
    return json.loads(path.read_text(encoding="utf-8"))


def measured_on(result: dict) -> str:
    """One line for the foot of a figure: hardware, versions, text, runs, date and freshness."""
    stamp = result["stamp"]
    corpus = f", {stamp['corpus']['name']}" if stamp["corpus"] else ""
    where = f"{stamp['gpu'] or stamp['cpu']}, torch {stamp['torch']}{corpus}"
    return f"measured on {where}, n={stamp['n']}, {stamp['date']} ({freshness(result)})"


def figure_style() -> None:
    """The look of the book's figures: call it once, before the first one."""
    from matplotlib import style

    style.use(root() / "book" / "figures.mplstyle")
