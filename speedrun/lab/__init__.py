# Written by "make tangle". Edits made here are lost.
"""speedrun.lab: bench, bounds, compile, doctor, errors, files, hardware, metrics, provenance, results, runlog, stats, tier, timer."""
