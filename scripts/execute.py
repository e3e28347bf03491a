"""Execute the chapters, each once per state, into _build/executed/.

    python scripts/execute.py            every chapter that is not up to date; on a CPU two at a time
    python scripts/execute.py 02 24      these only
    python scripts/execute.py --force 02 again, whatever its state

A chapter is up to date while its code cells, the modules it rests on, the tier (TIER=C keeps to the CPU) with its device, the library
versions and the files that it read last time are what they were. Tests, the book, its downloads and its status page all read what this writes.
"""

from speedrun.lab.errors import prepare_command, run_main

if __name__ == "__main__":
    prepare_command()

import argparse
import concurrent.futures
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import jupytext
import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from kernel import own_kernel
from nbclient import NotebookClient
from tangle import chapter_paths
from vocabulary import offline_vocabulary

from speedrun.data.shards import data_folder
from speedrun.data.sources import build_embedded
from speedrun.lab import provenance
from speedrun.lab.files import atomic_write
from speedrun.lab.hardware import detect_machine
from speedrun.lab.provenance import imported_names, module_hashes, root
from speedrun.lab.tier import Tier, tier_of

for pure in ("code_hash", "imported_names"):  # asked again for every chapter, of the same texts
    setattr(provenance, pure, functools.cache(getattr(provenance, pure)))
EXECUTED = root() / "_build" / "executed"
LIBRARIES = (
    "torch",
    "triton",
    "numpy",
    "scipy",
    "matplotlib",
    "tiktoken",
    "transformers",
    "ipykernel",
)
LIMIT_S = 600
STARTUP = """import functools
from speedrun.lab import provenance
for pure in ("code_hash", "imported_names"):  # asked again for every result and every run, of the same texts
    setattr(provenance, pure, functools.cache(getattr(provenance, pure)))
del functools, provenance, pure
"""


@dataclass(frozen=True)
class Chapter:
    """A chapter's source as a notebook, with what its metadata says: run alone? which modules does it start with -m?"""

    name: str
    notebook: nbformat.NotebookNode

    @property
    def options(self) -> dict:
        return self.notebook.metadata.get("speedrun", {})

    @property
    def code(self) -> list[str]:
        return [cell.source for cell in self.notebook.cells if cell.cell_type == "code"]

    @property
    def output(self) -> Path:
        return EXECUTED / f"{self.name}.ipynb"

    @property
    def ledger(self) -> Path:
        return EXECUTED / f"{self.name}.json"


@functools.lru_cache(maxsize=64)
def notebook_of(text: str) -> nbformat.NotebookNode:
    """A chapter as a notebook. The book asks for all of them several times; whoever gets one gets a copy."""
    return jupytext.reads(text, fmt="py:percent")


def chapters(wanted: tuple[str, ...] | list[str] = ()) -> list[Chapter]:
    """All chapters, or those whose number or name begins with one of `wanted`."""
    paths = chapter_paths(root())
    chosen = [
        path for path in paths if not wanted or any(path.stem.startswith(start) for start in wanted)
    ]
    if not chosen:
        sys.exit(
            f"no chapter begins with {' or '.join(wanted)}: there are {', '.join(path.stem for path in paths)}"
        )
    texts = {path.stem: path.read_text(encoding="utf-8") for path in chosen}
    return [Chapter(name, nbformat.from_dict(notebook_of(text))) for name, text in texts.items()]


def tier_here() -> Tier:
    """The tier that chapters will choose."""
    return tier_of(detect_machine(), os.environ.get("TIER", "").strip())


def state_of(chapter: Chapter) -> dict:
    """What a chapter's outputs depend on, except for the files that it reads."""
    machine, tier = detect_machine(), tier_here()
    names = set(chapter.options.get("modules", []))
    for source in chapter.code:
        names |= imported_names(source)
    versions = {
        library: importlib.metadata.version(library) for library in LIBRARIES if has(library)
    }
    return {
        "code": hashlib.sha256("\0".join(chapter.code).encode()).hexdigest(),
        "modules": module_hashes(names),
        "tier": tier.name,
        "device": [tier.gpu.name] if tier.gpu else "cpu",
        "python": machine.python,
        "versions": versions,
    }


def has(library: str) -> bool:
    try:
        return bool(importlib.metadata.version(library))
    except importlib.metadata.PackageNotFoundError:
        return False


def hash_of(path: str) -> str | None:
    file = root() / path
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def why_stale(chapter: Chapter) -> str | None:
    """Why a chapter has to be executed; None if it is up to date."""
    if not chapter.output.exists() or not chapter.ledger.exists():
        return "never executed"
    was, now = json.loads(chapter.ledger.read_text(encoding="utf-8")), state_of(chapter)
    for part, value in now.items():
        if was["state"].get(part) != value:
            changed = (
                [
                    name
                    for name in {**value, **was["state"].get(part, {})}
                    if value.get(name) != was["state"].get(part, {}).get(name)
                ]
                if isinstance(value, dict)
                else []
            )
            return f"{part} changed{': ' + ', '.join(changed) if changed else ''}"
    changed = [path for path, digest in was["opened"].items() if hash_of(path) != digest]
    return f"{changed[0]} changed" if changed else None


def opened_files(ledger: Path) -> dict[str, str | None]:
    """The project's files that an execution read, with their hashes."""
    lines = set(ledger.read_text(encoding="utf-8").splitlines()) if ledger.exists() else set()
    inside = sorted(
        Path(line).relative_to(root()).as_posix()
        for line in lines
        if Path(line).is_relative_to(root())
    )
    return {path: hash_of(path) for path in inside}


def why_not_whole(
    notebook: nbformat.NotebookNode, folder: Path, environment: dict[str, str]
) -> str | None:
    """Execute all cells in a kernel of their own; what they say is put into the notebook, as far as it comes. What ended it early."""
    specs = KernelSpecManager(kernel_dirs=[str(folder / "jupyter" / "kernels")])
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
    client = NotebookClient(notebook, kernel, timeout=LIMIT_S, raise_on_iopub_timeout=True)
    with open(folder / "said", "w", encoding="utf-8") as said:
        try:
            client.execute(env=environment, cwd=str(root()), stdout=said, stderr=said)
        except Exception as error:
            outside = (folder / "said").read_text(encoding="utf-8", errors="replace")
            return f"{outside[-1000:]}{type(error).__name__}: {error}"[-4000:]
    return None


def execute(chapter: Chapter, threads: int | None) -> tuple[Chapter, str | None, float]:
    """Execute one chapter in a process of its own. Returns it, the error if there was one, and the seconds it took."""
    folder = EXECUTED / f".{chapter.name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environment = os.environ | {
        "SPEEDRUN_OPENED": str(folder / "opened"),
        "PYTHONPATH": str(root()),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        **own_kernel(folder / "jupyter"),
    }
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads)}
    startup = Path(environment["IPYTHONDIR"]) / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "hashes.py").write_text(STARTUP, encoding="utf-8")
    state, begin = state_of(chapter), time.perf_counter()
    notebook = nbformat.from_dict(chapter.notebook)
    error = why_not_whole(notebook, folder, environment)
    seconds = time.perf_counter() - begin
    if error:
        nbformat.write(notebook, EXECUTED / f"{chapter.name}.failed.ipynb")
        return chapter, error, seconds
    nbformat.write(notebook, folder / "out.ipynb")
    facts = {
        "state": state,
        "opened": opened_files(folder / "opened"),
        "seconds": round(seconds, 1),
    }
    facts |= {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"), "cores": detect_machine().cores}
    os.replace(folder / "out.ipynb", chapter.output)
    atomic_write(chapter.ledger, json.dumps(facts, indent=1))
    (EXECUTED / f"{chapter.name}.failed.ipynb").unlink(missing_ok=True)
    shutil.rmtree(folder)
    return chapter, None, seconds


def refresh_prose(chapter: Chapter) -> None:
    """Put today's prose and tags around the outputs of an execution whose code cells are the same."""
    executed = nbformat.read(chapter.output, as_version=4)
    ran = [
        cell
        for cell in executed.cells
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    fresh = nbformat.from_dict(chapter.notebook)
    for cell, old in zip(
        (cell for cell in fresh.cells if cell.cell_type == "code"), ran, strict=True
    ):
        cell.outputs, cell.execution_count = old.outputs, old.execution_count
    part = chapter.output.with_suffix(".part")
    nbformat.write(fresh, part)
    os.replace(part, chapter.output)


def prepare() -> None:
    """What chapters share: the embedded text, and GPT-2's vocabulary where it can be had without a network."""
    EXECUTED.mkdir(parents=True, exist_ok=True)
    offline_vocabulary(root() / "_build" / "tiktoken")
    if not (data_folder("data/embedded") / "manifest.json").exists():
        build_embedded(root() / "data" / "embedded", root() / "data" / "wheels")


def run_chapters(wanted: list[str], force: bool = False) -> list[str]:
    """Bring chapters up to date. Returns the names of those that failed."""
    prepare()
    todo = []
    for chapter in chapters(wanted):
        reason = "asked for" if force else why_stale(chapter)
        if reason:
            print(f"{chapter.name}: {reason}", flush=True)
            todo.append(chapter)
        else:
            refresh_prose(chapter)
    failed = []
    together = [chapter for chapter in todo if not chapter.options.get("alone")]
    workers = tier_here().pick(cpu=2, gpu=1)  # a card of 16 GB has room for one chapter
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(execute, chapter, max(1, detect_machine().cores // 2))
            for chapter in reversed(together)  # the last ones take longest: no one waits for them
        ]
        results = [job.result() for job in map(announce, concurrent.futures.as_completed(jobs))]
    for chapter in todo:
        if chapter.options.get("alone"):
            done: concurrent.futures.Future = concurrent.futures.Future()
            done.set_result(execute(chapter, None))
            results.append(announce(done).result())
    for chapter, error, _ in results:
        if error:
            failed.append(chapter.name)
            print(
                f"\n{chapter.name} failed; as far as it came: {EXECUTED / chapter.name}.failed.ipynb\n{error}",
                file=sys.stderr,
            )
    return failed


def announce(job: concurrent.futures.Future) -> concurrent.futures.Future:
    chapter, error, seconds = job.result()
    print(f"{chapter.name}: {'FAILED' if error else 'executed'} in {seconds:.0f} s", flush=True)
    return job


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chapters", nargs="*", help="numbers or names; default: all")
    parser.add_argument("--force", action="store_true", help="execute even what is up to date")
    options = parser.parse_args()
    return min(1, len(run_chapters(options.chapters, options.force)))


if __name__ == "__main__":
    sys.exit(run_main(main))
