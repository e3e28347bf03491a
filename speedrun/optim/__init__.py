# Written by "make tangle". Edits made here are lost.
"""speedrun.optim: newton_schulz, schedule, soap."""
