# Written by "make tangle". Edits made here are lost.
"""speedrun.lab: doctor, hardware, provenance, results, runlog, stats."""
