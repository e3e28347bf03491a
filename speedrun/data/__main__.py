# Tangled from notebooks/02_data.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.data.shards import file_sha256, how_to_mend, load_manifest, read_shard
from speedrun.data.sources import (
    BYTE_FACTS,
    GPT2_FACTS,
    build_embedded,
    describe_folder,
    fetch_fineweb,
    pack,
)


# %% The command
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from speedrun.lab.errors import Problem
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
        out: the data folder.
        tokenizer: gpt2 (50,257 tokens) or bytes (288).
        validation: share of the documents that validates.
    """
    report(pack(list(files), out, tokenizer, validation), out)


def make_manifest(
    folder: Annotated[Path, tyro.conf.Positional], tokenizer: Name, source: str = "unknown"
) -> None:
    """Write manifest.json for a folder that already holds shards named *train*.bin and *val*.bin.

    Args:
        folder: the data folder.
        tokenizer: what its tokens index.
        source: where the text comes from.
    """
    command = f"python -m speedrun.data manifest {folder} --tokenizer {tokenizer}"
    report(
        describe_folder(folder, GPT2_FACTS if tokenizer == "gpt2" else BYTE_FACTS, source, command),
        folder,
    )


def verify(folder: Annotated[Path, tyro.conf.Positional]) -> None:
    """Check every shard of a data folder: header, size, vocabulary and SHA-256.

    Args:
        folder: the data folder.
    """
    found = load_manifest(folder)
    for file in found.files:
        path = folder / file.name
        read_shard(path, found.vocab_size)
        if file_sha256(path) != file.sha256:
            raise Problem(
                f"{path}: its SHA-256 is not the manifest's {file.sha256}", how_to_mend(path)
            )
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
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands, args=arguments, prog="python -m speedrun.data"
        )
    except Problem as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__" and __spec__ is not None:  # python -m, not a notebook
    sys.exit(main())
