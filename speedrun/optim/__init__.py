# Written by "make tangle". Edits made here are lost.
"""speedrun.optim: muon, newton_schulz, schedule, soap."""
