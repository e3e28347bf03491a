# Written by "make tangle". Edits made here are lost.
"""speedrun.lab: hardware, results, runlog, stats."""
