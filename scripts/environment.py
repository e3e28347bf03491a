"""Find or make a Python that has what the project needs, and print its path.

    python scripts/environment.py [EXTRA …]     extras of pyproject.toml: gpu, book, dev, wandb
    python scripts/environment.py --check […]   change nothing; say what is missing; exit 1 if anything is, 2 if this Python is too old

The interpreter that runs this is used if it has everything. Else .venv is, and is made or completed if need be. Only then is the
network touched. Standard library only, in words that Python 3.6 can parse: this runs before anything is installed, under whatever
is called python3.
"""

import old_python  # noqa: F401  # before what older Pythons lack is imported

# isort: split
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV_PYTHON = ROOT / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DRIVER_FILES = ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/nvidia-smi")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def requirements(extras: list[str]) -> list[str]:
    """The project's requirements with those of some extras, as pyproject.toml has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = project["optional-dependencies"]
    for extra in extras:
        if extra not in known:
            sys.exit(f"there is no extra “{extra}”: pyproject.toml has {', '.join(known)}")
    needs = project["dependencies"] + [need for extra in extras for need in known[extra]]
    return list(dict.fromkeys(needs))


def missing(needs: list[str]) -> list[str]:
    """Requirements that this interpreter does not satisfy."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        try:  # pip carries a copy
            from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]
        except ImportError:  # nbconvert needs packaging, so that is missing too
            return needs
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
    code = "import os, speedrun, sys; sys.stdout.buffer.write(os.fsencode(speedrun.__file__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd="/")
    found = os.fsdecode(done.stdout)
    return bool(found) and Path(found).resolve().is_relative_to(ROOT)


def pip(python: Path, *arguments: str, **options) -> bool:
    """Run pip; its output goes to our stderr. Some clusters configure --user for all, which a virtual environment refuses."""
    environment = {**os.environ, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [str(python), "-m", "pip", *arguments]
    try:
        done = subprocess.run(command, env=environment, **{"stdout": sys.stderr, **options})
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def pip_is_configured(python: Path) -> bool:
    """Whether somebody told pip where to look, in a file or a variable: then we do not tell it otherwise."""
    listing = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True).stdout
    return any(word in listing for word in (b"find-links", b"index-url", b"no-index"))


def wants_cpu_build() -> bool:
    """Whether the default index would give this machine gigabytes of CUDA for nothing: x86-64 Linux without an NVIDIA driver."""
    nvidia = shutil.which("nvidia-smi") or any(map(os.path.exists, DRIVER_FILES))
    return sys.platform == "linux" and platform.machine() == "x86_64" and not nvidia


def answers(python: Path, index: str) -> bool:
    """Whether an index has torch and answers at once: one that hangs must not hold up a user who does not need it."""
    quick = ("--retries", "0", "--timeout", "5", "--index-url", index)
    return pip(python, "index", "versions", "torch", *quick, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=30)  # fmt: skip


def install(python: Path, extras: list[str]) -> None:
    """Install the project, editable, with its extras; where it makes a difference, torch's build for the CPU.

    Python compiles what it imports, when it first does; pip would compile all 16,000 files, one after the other.
    """
    torch = next(need for need in requirements([]) if need.startswith("torch"))
    if wants_cpu_build() and not pip_is_configured(python):
        small = answers(python, CPU_INDEX)
        if small:
            say("no NVIDIA driver: taking torch's build for the CPU (200 MB instead of 3 GB)")
            small = pip(
                python, "install", "--quiet", "--no-compile", "--index-url", CPU_INDEX, torch
            )
        if not small:
            say(f"no torch from {CPU_INDEX}: taking the default index's, with CUDA (3 GB)")
    what = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    if not pip(python, "install", "--quiet", "--no-compile", "--editable", what):
        sys.exit(f"pip could not install the project into {python}; its message is above\n  → make PYTHON=… with an interpreter that has everything, or mend that, and run this again")  # fmt: skip


def starts(python: Path, code: str) -> bool:
    """Whether an interpreter is there, starts, and runs a line of code."""
    try:
        return subprocess.run([python, "-c", code], capture_output=True).returncode == 0
    except OSError:
        return False


def make_venv() -> None:
    """Make .venv, if it is not there; one that is there must be usable, and is not touched if it is not."""
    folder = ROOT / ".venv"
    if os.path.lexists(folder):
        if not starts(VENV_PYTHON, "import sys; sys.exit(sys.version_info < (3, 11))"):
            sys.exit(f"{folder} is no working environment of Python 3.11 or newer\n  → put it aside, and run this again: mv .venv .venv-old")  # fmt: skip
        return
    try:
        done = subprocess.run([sys.executable, "-m", "venv", folder], capture_output=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # half made, by us
        raise
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        say((done.stdout + done.stderr).decode(errors="replace").strip())
        sys.exit("a virtual environment could not be made\n  → apt-get install python3-venv, or name another interpreter: make PYTHON=… …")  # fmt: skip


def is_ready(python: Path, extras: list[str]) -> bool:
    """Whether an interpreter has everything, by asking it."""
    return subprocess.run([python, __file__, "--check", *extras], capture_output=True).returncode == 0  # fmt: skip


def complete_venv(extras: list[str]) -> None:
    """Install into .venv what it lacks."""
    if is_ready(VENV_PYTHON, extras):
        return
    if not starts(VENV_PYTHON, "import pip"):  # uv makes environments without it
        subprocess.run([VENV_PYTHON, "-m", "ensurepip"], stdout=sys.stderr)
    what = ", ".join(extras) or "no extras"
    say(f"installing into .venv: the project with {what} (a few minutes)")
    install(VENV_PYTHON, extras)
    if not is_ready(VENV_PYTHON, extras):
        sys.exit(f"{VENV_PYTHON} still lacks something\n  → to see what: make doctor")


def report(lacking: list[str]) -> int:
    """What `--check` says; 1 if anything is missing."""
    lacking = lacking + ([] if is_ours() else ["speedrun itself (pip install -e .)"])
    if lacking:
        print(f"✗ {sys.executable} lacks:", *lacking, sep="\n    ")
        print("  → make setup")
    return int(bool(lacking))


def main(arguments: list[str]) -> int:
    extras = [argument for argument in arguments if argument != "--check"]
    lacking = missing(requirements(extras))
    if "--check" in arguments:
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a console without ✗
        return report(lacking)
    python = Path(sys.executable)
    if not lacking and not is_ours():
        say(f"{python} has everything but the project itself: installing that, without the network")
        pip(python, "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))  # fmt: skip
    if lacking or not is_ours():
        if python.absolute() != VENV_PYTHON.absolute():
            few = ", ".join(lacking[:4]) + (" …" if len(lacking) > 4 else "")
            say(f"{python} lacks {few or 'the project'}: using .venv")
            make_venv()
        complete_venv(extras)
        python = VENV_PYTHON
    sys.stdout.buffer.write(os.fsencode(python) + b"\n")  # as it is, whatever the console can show
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
