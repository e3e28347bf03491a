# Written by "make tangle". Edits made here are lost.
"""speedrun.model: attention, backends, baseline, embedding, gpt, head, layout, masks, mlp, rotary, yarn."""
