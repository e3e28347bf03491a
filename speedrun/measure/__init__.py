# Written by "make tangle". Edits made here are lost.
"""speedrun.measure: ablations, attention, baseline, compile, config, documents, gram, logits, loss, many_gpus, mlp, modern_block, muon, newton_schulz, norm_rotary, plumbing, precision, rotary, runs, samples, schedule, speedrun, study, training_loop, windows."""
