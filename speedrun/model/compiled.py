# Tangled from notebooks/16_compile.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.lab.compile import compiled_copy


# %% torch.compile, and where to cut
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from speedrun.model.gpt import GPT, AttentionContext, gpt_forward


def mark_tokens(argument: Any) -> None:
    """Tell the compiler which dimension counts the tokens of packed rows, so that no other number of them compiles again: of (1, tokens, …), borders, angles and tiles."""
    mark = torch._dynamo.maybe_mark_dynamic
    if isinstance(argument, Tensor) and argument.ndim > 1 and len(argument) == 1:
        mark(argument, 1)
    if isinstance(argument, AttentionContext) and argument.packed is not None:
        mark(argument.packed.cu_seqlens, 0)  # room for documents, by the number of tokens
        for angles in argument.cos_sin or ():
            mark(angles, 0)
        if isinstance(argument.tiles, Tensor):
            mark(argument.tiles, 1)


def compile_model(model: GPT) -> Callable:
    """The model's forward pass, each part compiled once for all layers of one kind and all numbers of tokens. Slices of banks are inputs of those graphs."""
    torch._dynamo.config.recompile_limit = 64  # kinds of layers, times training and validation
    compiled = cache(compiled_copy)

    def call(part: Callable, *arguments: Any) -> Any:
        for argument in arguments:
            mark_tokens(argument)
        return compiled(part)(*arguments)

    return partial(gpt_forward, model, call=call)


# %% CUDA graphs
def can_record(model: GPT, mode: str) -> bool:
    """Whether nothing in a forward pass but its tensors differs from batch to batch: FlashAttention and our reference read the longest document in Python."""
    return next(model.parameters()).is_cuda and (model.backend == "triton" or mode == "stream")
