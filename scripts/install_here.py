"""Make `import speedrun` work in the kernel that runs this: what the first cell of a downloaded chapter ends with.

Standard library only: this runs before anything is installed. Whatever is installed goes into the kernel's own Python.
"""

import importlib
import importlib.util
import os
import re
import site
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if sys.version_info < (3, 11):  # noqa: UP036  (an old kernel may run this line)
    what = f"The book needs Python 3.11 or later, and this kernel is {sys.version.split()[0]}"
    raise RuntimeError(f"{what}: choose another kernel.")

PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]

sys.path.insert(0, str(ROOT / "scripts"))
try:
    import environment
finally:
    sys.path.remove(str(ROOT / "scripts"))


def needs() -> list[str]:
    """What the chapters import: the project's requirements, but for the kernel, which runs; and chapter 03's second opinion."""
    base, book = environment.requirements([]), environment.requirements(["book"])
    kept = [need for need in base if name_of(need) != "ipykernel"]
    return kept + [need for need in book if name_of(need) == "transformers"]


def is_found() -> bool:
    """Whether `import speedrun` takes the package of this folder."""
    spec = importlib.util.find_spec("speedrun")
    origin = spec.origin if spec else None
    return bool(origin) and Path(str(origin)).resolve().is_relative_to(ROOT)


def name_of(requirement: str) -> str:
    """A requirement without its versions and conditions."""
    return re.split(r"[^\w-]", requirement)[0]


def loaded(requirements: list[str]) -> dict[str, str]:
    """Versions on the disk of those required packages that this kernel has imported already."""
    names = {name_of(need) for need in requirements} & set(sys.modules)
    found = ((each.metadata["Name"], each.version) for each in metadata.distributions())
    return {name: version for name, version in found if name in names}


def pip(*arguments: str) -> None:
    """Run pip install; if it fails, say what it said."""
    own = {"PIP_USER": "0"} if sys.prefix != sys.base_prefix else {}  # a venv refuses --user
    done = subprocess.run([*PIP, *arguments], capture_output=True, env=os.environ | own)
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        raise RuntimeError("\n".join(["pip could not install what the chapters need. It says:", *said[-25:]]))  # fmt: skip


def install_requirements(lacking: list[str]) -> None:
    """Install requirements; PyTorch's companions move with it, for each fits one release of it, and transformers imports them."""
    torch = [need for need in lacking if name_of(need) == "torch"]
    python = Path(sys.executable)
    names = ", ".join(name_of(need) for need in lacking)
    print(f"Installing {names}" + (": this takes minutes …" if torch else " …"), flush=True)
    if torch:
        torch += [name for name in ("torchvision", "torchaudio") if importlib.util.find_spec(name)]
        lacking = list(dict.fromkeys([*lacking, *torch]))
        if environment.wants_cpu_build() and not environment.pip_is_configured(python) and environment.answers(python, environment.CPU_INDEX):  # fmt: skip
            pip("--index-url", environment.CPU_INDEX, *torch)
    pip(*lacking)


def see_what_is_new() -> None:
    """Let this kernel import what was installed after it began."""
    if site.ENABLE_USER_SITE:  # where pip installs when it may not write elsewhere
        site.addsitedir(site.getusersitepackages())
    sys.path.insert(0, str(ROOT))  # what makes an installation editable is read at a start only
    importlib.invalidate_caches()


def install() -> None:
    """Install what is missing, the package last, so that where it is found all else is; nothing where nothing is missing."""
    wanted = needs()
    lacking = environment.missing(wanted)
    if is_found() and not lacking:
        print(f"The package is here, nothing is installed: {ROOT}")
        return
    if importlib.util.find_spec("pip") is None:
        how = f'"{sys.executable}" -m ensurepip   (with uv: uv pip install pip --python "{sys.executable}")'
        raise RuntimeError(f"This kernel's Python has no pip. Give it one in a terminal, then run this cell again: {how}")  # fmt: skip
    before = loaded(wanted)
    if lacking:
        install_requirements(lacking)
    pip("--no-deps", "--editable", str(ROOT))
    see_what_is_new()
    changed = [name for name, version in loaded(wanted).items() if before.get(name) != version]
    if changed or not is_found():
        what = f"Installed. But this kernel had already imported another {', '.join(changed) or 'speedrun'}."
        raise RuntimeError(f"{what} Restart it (on Colab: Runtime, Restart session) and run the chapter from its first cell.")  # fmt: skip
    print(f"Installed from {ROOT}.")
