# Written by "make tangle". Edits made here are lost.
"""speedrun.model: baseline, embedding, gpt, head, mlp, plan, rotary."""
