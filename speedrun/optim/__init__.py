# Written by "make tangle". Edits made here are lost.
"""speedrun.optim: adam, comm, gram, graph, muon, newton_schulz, optimizer, soap, sparse, state, traffic."""
