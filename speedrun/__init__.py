# Written by "make tangle". Edits made here are lost.
"""speedrun: checkpoint, config, cpu_size, history, launch, params, presets, report, sample, schedule, train."""
