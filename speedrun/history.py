# Tangled from notebooks/22_config.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.config import Config, FINEWEB


# %% The rungs of history
import dataclasses

from speedrun.model.baseline import GPT2, GPT2Options, decays_by_shape

RUNGS = {
    # record 1, llm.c: 45 minutes on 8×H100
    "baseline": Config(preset="baseline", architecture="baseline", data=FINEWEB)
}


def build_rung(config: Config, vocab_size: int) -> tuple[GPT2, dict[str, bool]]:
    """The model of a historic architecture, and which of its parameters decay."""
    import torch

    torch.manual_seed(config.seed)
    model = GPT2(GPT2Options(**dataclasses.asdict(config.model)), vocab_size)
    return model, decays_by_shape(model)
