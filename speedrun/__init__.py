# Written by "make tangle". Edits made here are lost.
"""speedrun: checkpoint, config, history, launch, params, presets, report, sample, schedule, train."""
