# Written by "make tangle". Edits made here are lost.
"""speedrun.model: baseline, gpt, head, mlp, rotary."""
