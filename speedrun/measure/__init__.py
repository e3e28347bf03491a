# Written by "make tangle". Edits made here are lost.
"""speedrun.measure: baseline, samples, speedrun, training_loop."""
