# Tangled from notebooks/94_sources.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The command
if __name__ == "__main__" and __spec__ is not None:  # python -m, not a notebook
    from speedrun.lab.errors import prepare_command

    prepare_command()


from speedrun.data.shards import data_folder, load_manifest, read_shard
from speedrun.data.sources import (
    BYTE_FACTS,
    GPT2_FACTS,
    build_embedded,
    describe_folder,
    fetch_fineweb,
    pack,
)


import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from speedrun.lab.errors import end_now, quoted, run_main
from speedrun.lab.provenance import root

Name = Literal["gpt2", "bytes"]


def make_embedded(out: Path | None = None, wheels: Path | None = None) -> None:
    """Build the offline corpus: 20 MB of documented Python from two packages, as bytes.

    Args:
        out: the data folder (default: data/embedded in the project).
        wheels: where the two wheels are, or are fetched to (default: data/wheels in the project).
    """
    out = out or root() / "data" / "embedded"
    report(build_embedded(out, wheels or root() / "data" / "wheels"), out)


def raise_interrupts() -> None:
    """From here on an interrupt raises KeyboardInterrupt, so that what is half written is removed on the way out."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is end_now:  # `prepare_command` set it
            signal.signal(number, signal.default_int_handler)


def make_fineweb(shards: int = 9, out: Path | None = None) -> None:
    """Fetch FineWeb-10B as GPT-2 tokens: the validation shard and SHARDS training shards of 100M tokens, 200 MB each.

    Args:
        shards: training shards, 1 to 103.
        out: the data folder (default: data/fineweb10B in the project).
    """
    out = out or root() / "data" / "fineweb10B"
    report(fetch_fineweb(out, shards), out)


def make_pack(
    files: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path,
    tokenizer: Name = "gpt2",
    validation: float = 0.05,
) -> None:
    """Turn text files, or .jsonl files with a “text” field, into a data folder.

    Args:
        files: text files (one document each) or .jsonl files (one document a line).
        out: the data folder; new, empty, or made by this command before.
        tokenizer: gpt2 (50,257 tokens) or bytes (288).
        validation: share of the documents that validates, between 0 and 1.
    """
    report(pack(list(files), out, tokenizer, validation), out)


def make_manifest(
    folder: Annotated[Path, tyro.conf.Positional], tokenizer: Name, source: str = "unknown"
) -> None:
    """Write manifest.json for a data folder that already holds shards, with train or val as a word of their names.

    Args:
        folder: the data folder.
        tokenizer: what its tokens index.
        source: where the text comes from.
    """
    folder, facts = data_folder(str(folder)), GPT2_FACTS if tokenizer == "gpt2" else BYTE_FACTS
    words = ["python", "-m", "speedrun.data", "manifest", str(folder), "--tokenizer", tokenizer]
    made = describe_folder(folder, facts, source, shlex.join(words))
    listed = {file.name for file in made.files}
    for path in sorted(path for path in folder.glob("*.bin") if path.name not in listed):
        print(f"left out, as neither train nor val is a word of its name: {quoted(path)}")
    report(made, folder)


def verify(folder: Annotated[Path, tyro.conf.Positional]) -> None:
    """Check every shard of a data folder: header, size, vocabulary and SHA-256.

    Args:
        folder: the data folder.
    """
    folder = data_folder(str(folder))
    found = load_manifest(folder)
    for file in found.files:
        read_shard(folder / file.name, found.vocab_size, file, again=True)
    report(found, folder)


def report(manifest, folder: Path) -> None:
    """Say what a data folder holds."""
    for split in ("train", "val"):
        files = manifest.split(split)
        tokens = sum(file.tokens for file in files)
        print(f"{folder}: {split}: {tokens:,} tokens ({manifest.tokenizer}) in {len(files)} shards")


def main(arguments: list[str] | None = None) -> int:
    """`python -m speedrun.data COMMAND`: embedded, fineweb, pack, manifest or verify."""
    commands: dict[str, Callable[..., Any]] = {
        "embedded": make_embedded,
        "fineweb": make_fineweb,
        "pack": make_pack,
        "manifest": make_manifest,
        "verify": verify,
    }
    raise_interrupts()

    def run() -> None:
        tyro.extras.subcommand_cli_from_dict(
            commands, args=arguments, prog="python -m speedrun.data"
        )

    return run_main(run)


if __name__ == "__main__" and __spec__ is not None:  # python -m, not a notebook
    sys.exit(main())
