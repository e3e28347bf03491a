# Tangled from notebooks/22_config.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.config import Config, FINEWEB, SAVED_EVERY


# %% The rungs of history
import dataclasses

from speedrun.model.baseline import GPT2, GPT2Options, decays_by_shape
from speedrun.optim.adamw import AdamWOptions
from speedrun.model.embedding import EmbeddingOptions
from speedrun.model.gpt import GPTOptions
from speedrun.model.head import HeadOptions
from speedrun.model.mlp import BlockOptions
from speedrun.model.plan import PlanOptions
from speedrun.model.rotary import RotaryOptions
from speedrun.optim.muon import MuonOptions
from speedrun.optim.newton_schulz import MatrixOptions
from speedrun.optim.schedule import ScheduleOptions

BARE = BlockOptions(norm="rms", biases=False)
RUNGS = {
    # record 1, llm.c: 45 minutes on 8×H100
    "baseline": Config(
        preset="baseline", architecture="baseline", data=FINEWEB, checkpoint_every=SAVED_EVERY
    ),
    # record 2: 31 minutes
    "record2": Config(
        preset="record2",
        block=BARE,
        rotary=RotaryOptions(positions="rotary"),
        optim=AdamWOptions(lr=1.8e-3, warmup_steps=250),
        schedule=ScheduleOptions(shape="trapezoid", cooldown=2000 / 9536),
        data=FINEWEB,
        steps=9536,
        checkpoint_every=SAVED_EVERY,
    ),
    # record 5: 15 minutes
    "record5": Config(
        preset="record5",
        model=GPTOptions(heads=6),
        block=dataclasses.replace(BARE, qk_norm=True, activation="relu2", zero_out=True),
        rotary=RotaryOptions(positions="rotary"),
        head=HeadOptions(multiple=128),
        optim=AdamWOptions(lr=3.6e-3, warmup_steps=0, weight_decay=0.0),
        matrix=MatrixOptions(rule="muon", lr=0.01),
        muon=MuonOptions(wide_factor=2.0),
        schedule=ScheduleOptions(shape="trapezoid", cooldown=0.28),
        data=FINEWEB,
        steps=5100,
        checkpoint_every=SAVED_EVERY,
    ),
}
# record 8: 11 minutes
RUNGS["record8"] = dataclasses.replace(
    RUNGS["record5"],
    preset="record8",
    embedding=EmbeddingOptions(norm=True, std=1.0, rate=0.3 / 0.002),
    head=HeadOptions(tied="untied", multiple=128),
    optim=AdamWOptions(lr=0.002, warmup_steps=0, weight_decay=0.0, grad_clip=0.0),
    matrix=MatrixOptions(rule="muon", lr=0.02),
    muon=MuonOptions(),
    schedule=ScheduleOptions(shape="trapezoid", cooldown=0.29),
    steps=4578,
)
# record 9: 8 minutes
RUNGS["record9"] = dataclasses.replace(
    RUNGS["record8"],
    preset="record9",
    embedding=dataclasses.replace(RUNGS["record8"].embedding, values="first"),
    plan=PlanOptions(x0=True, rate=0.02 / 0.002),
    head=HeadOptions(tied="untied", multiple=128, cap="tanh30"),
    muon=MuonOptions(low_momentum=0.85, momentum_steps=(500, 0)),
    steps=3200,
)
# record 11: 7 minutes
RUNGS["record11"] = dataclasses.replace(
    RUNGS["record9"],
    preset="record11",
    embedding=dataclasses.replace(RUNGS["record9"].embedding, rate=0.6 / 0.008),
    plan=PlanOptions(x0=True, skips="unet", rate=0.04 / 0.008),
    optim=AdamWOptions(lr=0.008, warmup_steps=0, weight_decay=0.0, grad_clip=0.0),
    matrix=MatrixOptions(rule="muon", lr=0.04),
    schedule=ScheduleOptions(shape="trapezoid", cooldown=0.3),
    steps=3000,
)


def build_rung(config: Config, vocab_size: int) -> tuple[GPT2, dict[str, bool]]:
    """The model of a historic architecture, and which of its parameters decay."""
    import torch

    torch.manual_seed(config.seed)
    model = GPT2(GPT2Options(**dataclasses.asdict(config.model)), vocab_size)
    return model, decays_by_shape(model)
