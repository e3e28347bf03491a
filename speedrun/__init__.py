# Written by "make tangle". Edits made here are lost.
"""speedrun: checkpoint, command, config, cpu_size, heartbeat, history, launch, params, passes, presets, ranks, report, run, sample, schedule, supervise, tracking, train, trouble."""
