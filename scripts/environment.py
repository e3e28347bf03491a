"""Find or make a Python that has what the project needs, and print its path.

    python scripts/environment.py [EXTRA …]     extras of pyproject.toml: gpu, book, dev, wandb
    python scripts/environment.py --check […]   change nothing; list what is missing and exit 1

The interpreter that runs this is used if it has everything. Else .venv is, and is made or completed if need be. Only then is the
network touched. Standard library only: this runs before anything is installed.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV_PYTHON = ROOT / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def requirements(extras: list[str]) -> list[str]:
    """The project's requirements with those of some extras, as pyproject.toml has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    unknown = [extra for extra in extras if extra not in project["optional-dependencies"]]
    if unknown:
        sys.exit(
            f"there is no extra “{unknown[0]}”: pyproject.toml has {', '.join(project['optional-dependencies'])}"
        )
    return project["dependencies"] + [
        need for extra in extras for need in project["optional-dependencies"][extra]
    ]


def missing(needs: list[str]) -> list[str]:
    """Requirements that this interpreter does not satisfy."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # pip carries a copy
        from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]
    lacking = []
    for text in needs:
        need = Requirement(text)
        if need.marker and not need.marker.evaluate():
            continue
        try:
            fits = need.specifier.contains(importlib.metadata.version(need.name), prereleases=True)
        except importlib.metadata.PackageNotFoundError:
            fits = False
        if not fits:
            lacking.append(str(need))
    return lacking


def is_ours() -> bool:
    """Whether this interpreter imports the package from this checkout."""
    code = "import speedrun, sys; print(speedrun.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/"
    ).stdout.strip()
    return bool(found) and Path(found).resolve().is_relative_to(ROOT)


def pip(python: Path, *arguments: str) -> bool:
    return subprocess.run([python, "-m", "pip", *arguments], stdout=sys.stderr).returncode == 0


def pip_is_configured(python: Path) -> bool:
    """Whether somebody told pip where to look: then we do not tell it otherwise."""
    listing = subprocess.run(
        [python, "-m", "pip", "config", "list"], capture_output=True, text=True
    ).stdout
    return any(word in listing for word in ("find-links", "index-url"))


def install(python: Path, extras: list[str]) -> None:
    """Install the project, editable, with its extras; on a Linux machine without an NVIDIA driver, torch's build for the CPU."""
    needs = requirements([])
    torch = next(need for need in needs if need.startswith("torch"))
    if sys.platform == "linux" and not shutil.which("nvidia-smi") and not pip_is_configured(python):
        say("no NVIDIA driver: taking torch's build for the CPU (200 MB instead of several GB)")
        if not pip(python, "install", "--quiet", "--index-url", CPU_INDEX, torch):
            say(f"{CPU_INDEX} did not answer; taking torch from the default index")
    what = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    if not pip(python, "install", "--quiet", "--editable", what):
        sys.exit(
            f"pip could not install the project into {python}; its message is above. By hand: {python} -m pip install -e '.[{','.join(extras)}]'"
        )


def main(arguments: list[str]) -> int:
    if sys.version_info < (3, 11):  # noqa: UP036  (somebody's old interpreter may run this line)
        sys.exit(
            f"Python {sys.version.split()[0]} is too old: the project needs 3.11. Name another one: make PYTHON=python3.12 …"
        )
    check, extras = (
        "--check" in arguments,
        [argument for argument in arguments if argument != "--check"],
    )
    lacking = missing(requirements(extras))
    if check:
        print("\n".join(lacking + ([] if is_ours() else ["speedrun itself (pip install -e .)"])))
        return int(bool(lacking) or not is_ours())
    if not lacking and not is_ours():
        say(
            f"{sys.executable} has everything but the project itself: installing that, without the network"
        )
        pip(
            Path(sys.executable),
            "install",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--editable",
            str(ROOT),
        )
    if not lacking and is_ours():
        print(sys.executable)
        return 0
    if Path(sys.executable).absolute() == VENV_PYTHON.absolute():
        return 1
    if not VENV_PYTHON.exists():
        say(
            f"{sys.executable} lacks {', '.join(lacking[:4])}{' …' if len(lacking) > 4 else ''}: making .venv"
        )
        if subprocess.run([sys.executable, "-m", "venv", str(ROOT / ".venv")]).returncode:
            sys.exit(
                "a virtual environment could not be made: apt-get install python3-venv, or name another interpreter: make PYTHON=… …"
            )
    again = [str(VENV_PYTHON), __file__, *extras]
    done = subprocess.run(again, capture_output=True, text=True)
    if done.returncode:
        say(
            f"installing into .venv: the project with {', '.join(extras) or 'no extras'} (a few minutes, about 3 GB)"
        )
        install(VENV_PYTHON, extras)
        done = subprocess.run(again, capture_output=True, text=True)
    sys.stdout.write(done.stdout)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
