# Written by "make tangle". Edits made here are lost.
"""speedrun.measure: baseline, config, newton_schulz, runs, samples, speedrun, training_loop."""
