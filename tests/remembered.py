"""What every run asks about the modules, computed once in a process: where a module is, what it imports, the hash of its code."""

import functools

import speedrun
from speedrun import run
from speedrun.lab import provenance


def remember() -> None:
    """The answers for the same text, or for the same name below the same package, are kept. A test may play another package."""
    for pure in ("code_hash", "imported_names"):
        setattr(provenance, pure, functools.cache(getattr(provenance, pure)))
    real = provenance.module_file
    known = functools.cache(lambda package, name: real(name))
    for module in (provenance, run):
        module.module_file = lambda name: known(speedrun.__file__, name)


remember()
