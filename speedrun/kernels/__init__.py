# Written by "make tangle". Edits made here are lost.
"""speedrun.kernels: attention, fp8, gram, loss, mlp, rotary."""
