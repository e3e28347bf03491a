"""Importing this ends a script that an old Python runs, with a sentence. In words that Python 3.6 can parse, as is all that imports it."""

import os
import sys

IN_VENV = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), ".venv", "")

if sys.version_info < (3, 11):  # noqa: UP036  (somebody's old interpreter may run this line)
    way_out = "name another one: make PYTHON=python3.12 …"
    if os.path.abspath(sys.executable).startswith(IN_VENV):
        way_out = "put it aside, and a new one is made: mv .venv .venv-old"
    version = sys.version.split()[0]
    message = (
        f"Python {version} ({sys.executable}) is too old: the project needs 3.11\n  → {way_out}"
    )
    sys.stderr.write(message + "\n")
    sys.exit(2)
