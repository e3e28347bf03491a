# Tangled from notebooks/19_head_and_loss.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.kernels.loss import Form, launch_for


# %% The kernel
import torch
from torch import Tensor

from speedrun.kernels.mlp import Blocks

LARGE_BF16, SMALL_BF16 = Blocks(128, 128, 64, 8, 3), Blocks(128, 128, 32, 8, 3)
CONFIGS_BF16 = {80: LARGE_BF16, 86: SMALL_BF16, 90: LARGE_BF16, 120: SMALL_BF16}


def unit_scale(x: Tensor) -> Tensor:
    """1: bfloat16 has float32's range. (1,) float32."""
    return x.new_ones(1, dtype=torch.float32)


def product_bf16(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out: torch.dtype
) -> Tensor:
    """a (m, k) times the transpose of b (n, k), both of bfloat16, times both scales, summed in float32: (m, n) in dtype `out`."""
    on_gpu = a.device.type == "cuda"  # elsewhere PyTorch has no such sums
    z = torch.mm(a, b.mT, out_dtype=torch.float32) if on_gpu else a.float() @ b.float().mT
    return (z * (scale_a * scale_b)).to(out)


def bf16_form(device: torch.device) -> Form:
    """`head_form` in bfloat16, on any device."""
    return Form(torch.bfloat16, launch_for(device, CONFIGS_BF16), product_bf16, unit_scale)
