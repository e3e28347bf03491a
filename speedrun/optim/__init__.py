# Written by "make tangle". Edits made here are lost.
"""speedrun.optim: adam, comm, muon, newton_schulz, optimizer, soap, sparse."""
