# Written by "make tangle". Edits made here are lost.
"""speedrun.optim: adam, adamw, distributed, muon, newton_schulz, optimizer, schedule, soap."""
