# Written by "make tangle". Edits made here are lost.
"""speedrun.model: attention, baseline, embedding, gpt, head, layout, masks, mlp, rotary, yarn."""
