# Written by "make tangle". Edits made here are lost.
"""speedrun.model: attention, backends, baseline, compiled, embedding, gpt, head, init, layout, masks, mlp, rotary, yarn."""
