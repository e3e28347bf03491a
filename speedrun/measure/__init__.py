# Written by "make tangle". Edits made here are lost.
"""speedrun.measure: baseline, config, many_gpus, modern_block, muon, newton_schulz, runs, samples, schedule, speedrun, training_loop."""
