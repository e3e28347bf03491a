# Tangled from notebooks/21_model.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The code
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: what it is, how it starts, how it is updated. A row of the model's table."""

    name: str
    shape: tuple[int, ...]
    layers: tuple[int, ...] = ()
    """The layer of each slice of a bank; empty: it is no bank."""
    init_mean: float = 0.0
    init_std: float = 0.0
    init_uniform: bool = False
    """Uniform with that mean and deviation, not normal."""
    matrices: int = 0
    """Matrices stacked in each slice of a bank; 0: it is no bank of matrices."""
    is_matmul: bool = False
    """Costs one multiply-add a weight and token."""
    is_scalar: bool = False
    """One weight, or a few, by which vectors are mixed."""
    optim: Literal["adamw", "adam", "muon", "soap"] = "adamw"
    """The update rule. adamw: every weight decays. adam: only weights that the step makes smaller anyway. muon, soap: on whole matrices."""
    comm: Literal["replicated", "sharded", "sharded_sparse"] = "replicated"
    """replicated: all-reduce, every rank updates all. sharded: reduce-scatter, update the own shard, all-gather. sharded_sparse: the same, but only gradients of rows looked up are sent."""
    lr_mul: float | tuple[float, ...] = 1.0
    """Multiple of the rule's learning rate; muon: may be several, for a bank's matrices in turn."""
    shape_scale: float = 1.0
    """muon: one more multiple, sqrt(rows / cols) of a tall matrix; ignored without optim.muon.scale_by_shape."""
    wd_mul: float = 0.0
    """Multiple of the rule's weight decay; 0: no decay."""
    betas: tuple[float, float] | None = None
    """adam, adamw: decay of the two moments; None: the config's."""
    tied_to: str = ""
    """The parameter that this one is the transpose of until they are untied."""
