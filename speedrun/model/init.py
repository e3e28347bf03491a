# Tangled from notebooks/21_model.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.params import ParamSpec


# %% Initialisation
import math
import zlib

import torch
from torch import Tensor

DRAWN_AS = {  # the names that these had in the first measured runs, whose initial values are still theirs
    "embed": "token_embedding",
    "pos_embed": "position_embedding",
    "value_embeds": "value_embedding",
    "lm_head": "head",
}


def init_parameter(spec: ParamSpec, seed: int) -> Tensor:
    """The initial values of one parameter, float32 on the CPU: a function of the seed and the row alone."""
    generator = torch.Generator().manual_seed(
        zlib.crc32(f"{seed}:{DRAWN_AS.get(spec.name, spec.name)}".encode())
    )
    std = spec.init_std
    draw = torch.zeros(spec.shape)
    if spec.init_uniform:
        std *= math.sqrt(3)
        draw.uniform_(-1, 1, generator=generator)
    elif std:
        draw.normal_(generator=generator)
    return draw.mul_(std).add_(spec.init_mean)  # in place: some have 200 million entries


@torch.no_grad()
def init_weights(model, seed: int) -> None:
    """Give a model, in place and on whatever device it is, the initial values of a seed; tied parameters start equal, transposed."""
    for spec in model.specs:
        model.get_parameter(spec.name).copy_(init_parameter(spec, seed))
    for spec in model.specs:
        if spec.tied_to:
            model.get_parameter(spec.tied_to).copy_(model.get_parameter(spec.name).mT)
