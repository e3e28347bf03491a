# Tangled from notebooks/96_logs_and_stamps.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Logs: what a run must write down
import json
from pathlib import Path

from speedrun.lab.errors import UserError


def read_metrics(path: str | Path) -> list[dict]:
    """All records of a metrics.jsonl. A torn last line is skipped: its writer may be at work."""
    lines, records = Path(path).read_text(encoding="utf-8").splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                fix = "take that line out; the others are whole"
                raise UserError(f"{path}, line {number}: not a record: {error}", fix) from None
    return records


def series(records: list[dict], kind: str) -> list[dict]:
    """The records of one kind in order of their step; of several with one step (a resumed run) the last."""
    by_step = {record["step"]: record for record in records if record["kind"] == kind}
    return [by_step[step] for step in sorted(by_step)]
