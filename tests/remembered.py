"""What many tests ask, and what is always answered the same, is worked out once in a process.

Where a module is, what it imports, the hash of its code; the types of a dataclass's fields; a corpus as one text. Callers get what the
functions return; a test may play another package or write another corpus, which are other questions.
"""

import functools
from pathlib import Path

import speedrun
from speedrun import config, run, sample
from speedrun.data.shards import load_manifest
from speedrun.lab import bounds, provenance


def remember() -> None:
    for pure in ("code_hash", "imported_names"):
        setattr(provenance, pure, functools.cache(getattr(provenance, pure)))
    real_file, real_text = provenance.module_file, sample.training_text
    file = functools.cache(lambda package, name: real_file(name))
    for module in (provenance, run):
        module.module_file = lambda name: file(speedrun.__file__, name)
    for module in (bounds, config):  # neither changes the dict that it gets
        module.get_type_hints = functools.cache(module.get_type_hints)
    text = functools.lru_cache(2)(lambda folder, sha256, most: real_text(folder, most))

    def training_text(folder: Path, most_tokens: int = 20_000_000) -> str:
        return text(folder, load_manifest(folder).sha256, most_tokens)

    sample.training_text = training_text


remember()
