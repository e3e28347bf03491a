"""Where the public history is read in a browser: a record's pull request, folder and log, and the people who set it."""

import functools
import re

from speedrun.lab.results import public_table

UPSTREAM = "https://github.com/KellerJordan/modded-nanogpt"
PERSON = re.compile(r"@(?:fernbear\.bsky\.social|[A-Za-z0-9_]+(?:-[A-Za-z0-9]+)*)")


@functools.cache
def records() -> dict[int, dict]:
    """Every record's row of book/data/records.csv by its number, retimings left out."""
    rows = (row for row in public_table("records") if not row["note"].startswith("retiming"))
    return {int(row["record"]): row for row in rows}


def time_of(row: dict) -> str:
    """A record's time in minutes or seconds."""
    seconds = float(row["record_time_s"])
    return f"{seconds / 60:.1f} min" if seconds >= 600 else f"{seconds:.1f} s"


def in_a_line(number: int) -> str:
    """A record in a line, for whoever points at a mention of it."""
    row = records()[number]
    people = row["contributors"].strip(" -") or "the maintainers"
    return f"Record {number}, {row['date']}, {time_of(row)}: {row['description']} ({people})"


def pull_request(row: dict) -> str:
    """The address of the pull request that brought a record, "" where there was none."""
    return f"{UPSTREAM}/pull/{row['pr']}" if row["pr"].isdigit() else ""


def folder(row: dict) -> str:
    """The address of a record's folder upstream, "" where no log was kept."""
    found = re.match(r"records/[^/]+/[^/]+", row["log_file"])
    return f"{UPSTREAM}/tree/master/{found[0]}" if found else ""


@functools.cache
def people() -> dict[str, str]:
    """A person's @name and address: the page that the contest's README links, or else where the first record with the name is kept."""
    found = {row["handle"]: row["url"] for row in public_table("people")}
    for row in records().values():
        for name in PERSON.findall(row["contributors"]):
            found.setdefault(name, pull_request(row) or folder(row))
    return found
