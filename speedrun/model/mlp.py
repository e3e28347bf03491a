# Tangled from notebooks/05_modern_block.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The code
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from speedrun.kernels.mlp import mlp_op


@dataclass(frozen=True)
class BlockConfig:
    """What a layer is made of. The defaults are GPT-2's."""

    norm: Literal["layer", "rms"] = "layer"
    """layer: subtract the mean, divide, then gain and bias. rms: divide by the root mean square, no parameters."""
    biases: bool = True
    """Whether matrices have biases."""
    qk_norm: bool = False
    """RMS norm for each head's queries and keys."""
    activation: Literal["gelu", "relu2"] = "gelu"
    """The MLP's nonlinearity; relu2: the square of what is positive."""
    zero_init_proj: bool = False
    """Matrices that write to the stream begin at zero, and not smaller than the others by sqrt(2 · layers)."""
    fan_in_init: bool = False
    """Matrices begin uniform with deviation 0.5 / sqrt(columns), and not normal with init_std."""
    fp8: bool = False
    """Train the MLP with products in eight bits, forward and backward."""


# %% The norm
def rms_norm(x: Tensor) -> Tensor:
    """Each vector of the last dimension, scaled to a root mean square of 1 (Zhang and Sennrich 2019)."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def apply_norm(x: Tensor, weights: Mapping[str, Any], name: str) -> Tensor:
    """Layer norm with the gain and bias that stand under a name, or RMS norm if there are none."""
    gain = weights.get(f"{name}_gain")
    if gain is None:
        return rms_norm(x)
    return F.layer_norm(x, gain.shape, gain, weights[f"{name}_bias"])


# %% The MLP
def linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    """x times the matrix of that name, (rows, columns), plus its bias if it has one: (…, columns) → (…, rows)."""
    return F.linear(x, weights[name], weights.get(f"{name}_bias"))


def activate(z: Tensor, kind: str) -> Tensor:
    """The nonlinearity: gelu (its tanh form), or relu2 (So and others 2021)."""
    return F.relu(z).square() if kind == "relu2" else F.gelu(z, approximate="tanh")


def mlp(x: Tensor, weights: Mapping[str, Tensor], options: BlockConfig) -> Tensor:
    """Two matrices with a nonlinearity between, (…, width) → the same. up: (4 · width, width), down: (width, 4 · width). With mlp_scales: in eight bits."""
    if (scales := weights.get("mlp_scales")) is not None:
        matrices = weights["mlp_up"], weights["mlp_down"]
        return mlp_op(x.flatten(0, -2), *matrices, scales)[0].view_as(x)
    hidden = activate(linear(x, weights, "mlp_up"), options.activation)
    return linear(hidden, weights, "mlp_down")


# %% Initialisation
def linear_init(
    config: BlockConfig, init_std: float, layers: int, columns: int, adds: bool
) -> dict[str, Any]:
    """Deviation and distribution with which a matrix of so many columns begins, as fields of its ParamSpec (chapter 21). adds: it writes to the residual stream."""
    std = 0.5 / math.sqrt(columns) if config.fan_in_init else init_std
    if adds:
        std = 0.0 if config.zero_init_proj else std / math.sqrt(2 * layers)
    return {"init_std": std, "init_uniform": config.fan_in_init and std > 0}
