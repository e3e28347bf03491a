# Written by "make tangle". Edits made here are lost.
"""speedrun.kernels: attention, fp8, gram, head_bf16, head_reference, loss, mlp, rotary."""
