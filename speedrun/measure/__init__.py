# Written by "make tangle". Edits made here are lost.
"""speedrun.measure: baseline, config, samples, speedrun, training_loop."""
