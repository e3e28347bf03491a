# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The baseline: GPT-2 as llm.c trains it
#
# ```{admonition} Cost box
# About fifteen seconds on two CPU cores; on one GPU, where GPT-2 is profiled at its real size, within three minutes. The profile in the figure was measured on a larger GPU and is committed.
# Record 1: Andrej Karpathy and the contributors of llm.c {cite}`llmc`. Record 2: Keller Jordan. GPT-2 is by Alec Radford and others at OpenAI; one matrix for embedding and head is an idea of Ofir Press and Lior Wolf. Karpathy's build-nanogpt {cite}`buildnanogpt` writes
# the same model step by step.
# ```
#
# ## The problem
#
# Record 1 took **2,700 seconds** on eight H100s and read 10.26 billion tokens. It is a good program: C and CUDA by hand around NVIDIA's matrix library, in mixed precision {cite}`llmc`. And yet record 92 takes 39.9 seconds. Our ledger is for
# record 89, the last one whose steps and sizes stand in merged code: 73.8 seconds and 0.34 billion tokens. Before improving on something by a factor of 37 it is worth knowing *which* thing is being improved on. How much of those 45 minutes was arithmetic that had to be done? How much was
# the machine waiting? And who says that it takes ten billion tokens?

# %% tags=["hide-input"]
import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler says when it begins and ends

from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %% [markdown]
# ```{admonition} Prediction
# An H100 multiplies bf16 matrices at up to 989 TFLOP/s. A token that passes a model forward and backward costs about 6 FLOPs per weight it meets. GPT-2 has 124 million weights. **How many of the 45 minutes would be left if the eight GPUs had
# multiplied at full speed all the time?** Work it out before going on; it takes one line.
# ```
#
# ## The idea
#
# GPT-2 {cite}`radford2019` is a stack of twelve equal blocks on the *residual stream*, which has one vector for each token. A token is a row of an embedding matrix, to which a learned vector for its position is added. Each block adds two corrections: what attention gathers from earlier tokens
# {cite}`vaswani2017`, and what a two-layer perceptron (MLP) makes of the result. At the end the embedding matrix is used once more, transposed, to score every token of the vocabulary {cite}`press2017`. In symbols, with $x$ the residual stream, $E$ the embedding and $\mathrm{LN}$ a layer norm,
#
# $$
# \begin{aligned}
# x &\leftarrow x + \mathrm{Attention}(\mathrm{LN}(x)) \\
# x &\leftarrow x + \mathrm{MLP}(\mathrm{LN}(x)) \\
# \text{logits} &= \mathrm{LN}(x)\, E^{\top}
# \end{aligned}
# $$
#
# The chapters on architecture each replace something in these lines. So they are written here as plainly as they can be.
#
# ## The code

# %%
#| default_exp model.baseline
#| export
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speedrun.model.gpt import GPTConfig

# %% [markdown]
# The shape of the model is a `GPTConfig`. [Chapter 21](21_model.py) builds the package's own model from all of it. GPT-2 reads five of its fields, `num_layers`, `num_heads`, `model_dim` (the width), `max_seq_len` and `init_std`, and their defaults are those of the 124M model.
#
# ### Attention
#
# One matrix makes queries, keys and values for all heads, each of which works with 64 of the 768 numbers. A token may look at itself and at what came before it.


# %%
#| export
class Attention(nn.Module):
    """Causal self-attention, (batch, tokens, width) → the same."""

    def __init__(self, options: GPTConfig):
        super().__init__()
        self.num_heads = options.num_heads
        self.qkv = nn.Linear(options.model_dim, 3 * options.model_dim)
        self.out = nn.Linear(options.model_dim, options.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        shape = (batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = self.qkv(x).view(shape).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # scaled by 1 / sqrt(head_dim)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


# %% [markdown]
# *Causal* is a claim that can be tested: change the last token, and nothing before it may move. It is also worth testing against attention written out by hand, head by head, because a fused
# kernel with a wrong flag is wrong silently.

# %%
torch.manual_seed(0)
tiny = GPTConfig(num_layers=2, num_heads=4, model_dim=32, max_seq_len=16)
attention, x = Attention(tiny).double(), torch.randn(1, 16, 32, dtype=torch.float64)
y, other = attention(x), x.clone()
other[:, -1] += 1.0
assert torch.equal(attention(other)[:, :-1], y[:, :-1])
assert not torch.equal(attention(other)[:, -1], y[:, -1])

weight, bias = attention.qkv.weight.view(3, 4, 8, 32), attention.qkv.bias.view(3, 4, 8)
future, by_hand = torch.ones(16, 16).triu(1).bool(), attention.out.bias.clone()
for head in range(4):
    q, k, v = (F.linear(x, w, b) for w, b in zip(weight[:, head], bias[:, head]))
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(future, -math.inf)
    columns = slice(8 * head, 8 * head + 8)
    by_hand = by_hand + F.linear(scores.softmax(-1) @ v, attention.out.weight[:, columns])
assert torch.allclose(by_hand, y, atol=1e-12)
print("causal, and equal to four heads written out by hand to 1e-12")

# %% [markdown]
# ### MLP and block
#
# The MLP widens the vector by four, applies a GELU, and narrows it again. (GPT-2 used the approximation of the GELU with a tanh, and so must anything that wants GPT-2's numbers.)


# %%
#| export
class MLP(nn.Module):
    """Two linear layers with a GELU between them, (…, width) → the same."""

    def __init__(self, options: GPTConfig):
        super().__init__()
        self.up = nn.Linear(options.model_dim, 4 * options.model_dim)
        self.down = nn.Linear(4 * options.model_dim, options.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """One layer, (batch, tokens, width) → the same: attention and MLP, each on a normed copy of the stream, each added to it."""

    def __init__(self, options: GPTConfig):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(options.model_dim), nn.LayerNorm(options.model_dim)
        self.attention, self.mlp = Attention(options), MLP(options)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


# %%
block, stream = Block(tiny), torch.randn(2, 16, 32)
with torch.no_grad():
    for layer in (block.attention.out, block.mlp.down):
        layer.weight.zero_()
        layer.bias.zero_()
    assert torch.equal(block(stream), stream), (
        "with silent outputs a block changes nothing: it only adds"
    )

# %% [markdown]
# ### The model
#
# The model holds the blocks between two uses of one embedding matrix. It returns logits, or, where targets are given, their mean cross-entropy in nats per token.
#
# Initial values matter more than they look. Weights are drawn from a normal distribution with a standard deviation of 0.02. Matrices whose output is *added* to the stream start smaller by $\sqrt{2L}$, because there are $2L$ such terms and their
# variances add up. [Chapter 05](05_modern_block.py) will set those matrices to zero and gain from it.


# %%
#| export
def init_gpt2(model: nn.Module, options: GPTConfig) -> None:
    """Normal weights of `init_std`, biases zero; smaller by sqrt(2 · layers) where a matrix adds to the stream."""
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(weight)
        elif "norm" not in name:
            adds = name.endswith(("attention.out.weight", "mlp.down.weight"))
            nn.init.normal_(
                weight, std=options.init_std / (math.sqrt(2 * options.num_layers) if adds else 1.0)
            )


class GPT2(nn.Module):
    """GPT-2, embedding and head tied. `model(inputs)`: logits (batch, tokens, vocab); with targets the mean loss."""

    def __init__(self, options: GPTConfig, vocab_size: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, options.model_dim)
        self.positions = nn.Embedding(options.max_seq_len, options.model_dim)
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.num_layers))
        self.norm = nn.LayerNorm(options.model_dim)
        init_gpt2(self, options)

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        return gpt2_forward(self, inputs, targets)


# %%
#| export
def gpt2_forward(model: GPT2, inputs: Tensor, targets: Tensor | None) -> Tensor:
    """Logits, (batch, tokens, vocab), or with targets their mean cross-entropy in nats. inputs and targets: (batch, tokens) int64."""
    x = model.tokens(inputs) + model.positions.weight[: inputs.shape[1]]
    for block in model.blocks:
        x = block(x)
    logits = F.linear(model.norm(x), model.tokens.weight)
    if targets is None:
        return logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


# %%
model, tokens = GPT2(tiny, 100), torch.randint(100, (3, 17))
logits, loss = model(tokens[:, :-1]), model(tokens[:, :-1], tokens[:, 1:])
by_hand = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean()
assert logits.shape == (3, 16, 100) and torch.allclose(loss, by_hand)
deviation = model.blocks[0].mlp.down.weight.std().item()
assert abs(deviation / (0.02 / math.sqrt(4)) - 1) < 0.05
print(
    f"loss {loss.item():.3f}, ln 100 = {math.log(100):.3f}; mlp.down starts with a deviation of {deviation:.4f}"
)

# %% [markdown]
# ### Three checks: parameters, FLOPs, the first loss
#
# **The parameters.** GPT-2 "124M" has 124,439,808 of them, which can be counted by hand and has been published often enough:


# %%
#| export
def parameter_count(options: GPTConfig, vocab_size: int) -> int:
    """Parameters by formula: embeddings, then per block 12 width² of matrices and 13 width of biases and norms."""
    d = options.model_dim
    return (
        (vocab_size + options.max_seq_len) * d + options.num_layers * (12 * d * d + 13 * d) + 2 * d
    )


# %%
VOCAB = 50_257
with torch.device("meta"):  # shapes without memory
    full = GPT2(GPTConfig(), VOCAB)
counted = sum(parameter.numel() for parameter in full.parameters())
assert counted == parameter_count(GPTConfig(), VOCAB) == 124_439_808
print(f"{counted:,} parameters, of which {VOCAB * 768 / counted:.0%} are the embedding")

# %% [markdown]
# **The arithmetic.** A matrix of $N$ weights costs $2N$ FLOPs per token forward, as much again for the gradient of its input, and as much again for the gradient of itself: $6N$ {cite}`kaplan2020`. The embedding is looked up on the way in, which is free, and multiplied on the way out, which is not, so it
# counts once. Attention adds two products, of queries with keys and of probabilities with values. In rows of $T$ tokens, at a width of $d$, they are $2 \cdot 2\,T d$ FLOPs per layer and token, and three times that with the backward pass. A kernel that skips what the mask hides does half of it:


# %%
def flops_per_token(
    options: GPTConfig, vocab_size: int, seq_len: int, causal: bool = True
) -> float:
    """FLOPs of a token, forward and backward: 6 a weight that multiplies, 12 · seq_len · width a layer for attention.

    causal: count half of attention, as a kernel does that skips what the mask hides.
    """
    weights = options.num_layers * 12 * options.model_dim**2 + vocab_size * options.model_dim
    attention = options.num_layers * 12 * seq_len * options.model_dim
    return 6.0 * weights + attention * (0.5 if causal else 1.0)


# %% [markdown]
# PyTorch can count, too. Its plain attention (`MATH`) skips nothing, hence `causal=False`:

# %%
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

small, vocab = GPTConfig(num_layers=3, num_heads=2, model_dim=64, max_seq_len=128), 512
model, tokens = GPT2(small, vocab), torch.randint(vocab, (2, 129))
with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
    model(tokens[:, :-1], tokens[:, 1:]).backward()
by_formula = flops_per_token(small, vocab, 128, causal=False) * 2 * 128
assert counter.get_total_flops() == by_formula
print(f"counted by PyTorch {counter.get_total_flops():,}, by formula {by_formula:,.0f}")

# %% [markdown]
# Equal to the last digit. Now the prediction can be settled, with the two numbers of record 1 that are public:

# %%
from speedrun.lab.results import public_table

ladder = {row["record"]: row for row in public_table("records")}
PEAK = 8 * 989e12  # eight H100s, dense bf16, by the data sheet
work = flops_per_token(GPTConfig(), VOCAB, 1024) * float(ladder["1"]["total_train_tokens"])
seconds = float(ladder["1"]["record_time_s"])
utilisation = work / PEAK / seconds
assert 0.36 < utilisation < 0.40 and 16.5 < work / PEAK / 60 < 17.5
print(f"{work:.2e} FLOPs: {work / PEAK / 60:.0f} of {seconds / 60:.0f} minutes at full speed")
print(
    f"record 1 ran at {utilisation:.0%} of it: running it perfectly would be {1 / utilisation:.1f} times faster"
)

# %% [markdown]
# (The one line gives sixteen minutes. Attention's own products, which no weight pays for, are the seventeenth. The share is called MFU, model FLOPs utilisation.) So a perfect implementation of record 1 would still take seventeen minutes. Of the factor 37, at most 2.6 could ever come from running *this* computation faster in bf16. The rest had to come from computing less, or in fewer bits.
# The ledger can be closed with the public numbers of record 89. It has ten layers with attention and eleven MLPs, and its head has 50,304 rows. For both records count the matrices alone, since attention's products depend on the lengths of documents in one of them:

# %%
last = ladder["89"]
last_tokens, last_seconds = float(last["merged_total_tokens"]), float(last["record_time_s"])
last_steps = int(last["merged_scheduled_steps"]) + int(last["merged_extension_steps"])
fewer = float(ladder["1"]["total_train_tokens"]) / last_tokens
fewer_steps = int(ladder["1"]["steps"]) / last_steps
times_faster = seconds / last_seconds
multiply = (10 * 4 + 11 * 8) * 768**2 + 50_304 * 768  # weights of record 89 that multiply
products = {
    "1": flops_per_token(GPTConfig(), VOCAB, 0) * fewer * last_tokens / PEAK / seconds,
    "89": 6 * multiply * last_tokens / PEAK / last_seconds,
}
assert round(times_faster) == 37 and 30 < fewer < 31 and 1.15 < times_faster / fewer < 1.25
assert round(fewer_steps) == 15 and 1.95 < fewer / fewer_steps < 2.05
assert 6 * multiply < flops_per_token(GPTConfig(), VOCAB, 0) and round(multiply / 1e6) == 114
assert 0.34 < products["1"] < 0.36 and 0.39 < products["89"] < 0.41
print(
    f"{times_faster:.0f} = {fewer_steps:.1f} (fewer steps) × {fewer / fewer_steps:.1f} (fewer tokens a step) × {times_faster / fewer:.2f} (more tokens a second)"
)
print({record: f"{share:.0%} of full speed in bf16" for record, share in products.items()})

# %% [markdown]
# Thirty-seven is thirty times 1.2, and thirty is fifteen times two: record 89 takes a fifteenth of the steps, each on half as many tokens. It passes only a fifth more tokens a second, and its matrix products keep the eight GPUs only a little busier than record 1's did. (Some of them are in eight bits, for which the data sheet promises twice as much.) What the kernels were worth, this ledger cannot say. A step of record 89 does much that a step of record 1 does not, and would take longer without them. But most of the factor is better steps and smaller batches.
#
# **The first loss.** A model that knows nothing should be wrong by $\ln V$: 10.82 nats for 50,257 equally likely tokens. Record 1's log begins at 11.009. Is that a bug? The logits of an untrained model are not zero. The last layer norm
# leaves a vector of length $\sqrt d$, and its product with an embedding row of standard deviation $\sigma$ scatters with $\sigma\sqrt d$. The mean of $e^z$ over such normal logits is $e^{\sigma^2 d/2}$, so the mean cross-entropy is ${\ln V + \sigma^2 d / 2}$. (That holds because the blocks have drowned the token's own embedding. Without any block the tied head would give half of the probability to the token just read, and be wrong.)

# %%
torch.manual_seed(1)
size = tier.pick(cpu=GPTConfig(num_layers=2, max_seq_len=64), gpu=GPTConfig())
model = GPT2(size, VOCAB).to(tier.device)
tokens = torch.randint(VOCAB, (tier.pick(cpu=16, gpu=2), size.max_seq_len + 1)).to(tier.device)
with torch.no_grad():
    first = model(tokens[:, :-1], tokens[:, 1:]).item()
expected = math.log(VOCAB) + 0.02**2 * 768 / 2
logged = float(next(row for row in public_table("curves") if row["record"] == "1")["val_loss"])
assert abs(first - expected) < 0.05 and abs(logged - expected) < 0.05
with torch.no_grad():  # the head behind the embeddings, with no block between
    there = tokens[:1, :-1]
    bare = model.norm(model.tokens(there) + model.positions.weight[: size.max_seq_len])
    itself = (bare @ model.tokens.weight.T).softmax(-1).gather(-1, there[..., None]).mean()
assert 0.4 < itself < 0.6, "what chapter 08 unties"
doubled = math.log(VOCAB) + 0.04**2 * 768 / 2
assert doubled - expected > 0.4
print(
    f"ln V = {math.log(VOCAB):.3f}, with scatter {expected:.3f}; ours {first:.3f}, llm.c's log {logged:.3f}"
)
print(f"weights twice as large would begin at {doubled:.2f}")

# %% [markdown]
# No bug, and a useful habit. The formula gives the mean over all initial weights. One model differs from it by some hundredths, perhaps more on text, where a few frequent tokens weigh most. That is exact enough to see a wrong standard deviation, or a wrong vocabulary. When a first loss is further away than that, find out why before you read the rest of the log.
#
# ### The same logits as Hugging Face's GPT-2
#
# One check is still missing, and it is the one that matters most. All of the above could be right in a model that is *not* GPT-2. So give the same weights to an implementation that we did not write, Hugging Face's, and compare logits. (It stores linear layers transposed, as OpenAI did.)

# %%
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about a progress bar
    from transformers import GPT2Config, GPT2LMHeadModel

shape = {"vocab_size": vocab, "n_positions": 128, "n_embd": 64, "n_layer": 3, "n_head": 2}
off = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0) | {
    "bos_token_id": None,
    "eos_token_id": None,
}
theirs, ours = GPT2LMHeadModel(GPT2Config(**shape, **off)).double(), GPT2(small, vocab).double()
renamed = {"wte": "tokens", "wpe": "positions", "ln_f": "norm", "ln_1": "norm_1", "ln_2": "norm_2"}
renamed |= {"attn": "attention", "c_attn": "qkv", "c_fc": "up", "h": "blocks"}
with torch.no_grad():
    for name, weight in theirs.transformer.named_parameters():
        weight.add_(
            0.3 * torch.randn_like(weight)
        )  # no zeros and ones that could hide a missing term
        parts = name.replace("mlp.c_proj", "mlp.down").replace("attn.c_proj", "attn.out").split(".")
        mine = ours.get_parameter(".".join(renamed.get(part, part) for part in parts))
        mine.copy_(weight.T if ".c_" in name and weight.ndim == 2 else weight)
    inputs = torch.randint(vocab, (2, 128))
    difference = (ours(inputs) - theirs(inputs).logits).abs().max().item()
assert difference < 1e-10
print(f"largest difference of any logit: {difference:.0e}")

# %% [markdown]
# ### The optimizer
#
# Record 1 trains with AdamW {cite}`loshchilov2019`. It keeps two running means for every weight $w$ with gradient $g$, the *first moment* $m$ of the gradient and the *second moment* $v$ of its square. With the learning rate $\eta$ and a weight decay of $\lambda$, a step is
#
# $$
# m \leftarrow \beta_1 m + (1-\beta_1)\,g, \qquad
# v \leftarrow \beta_2 v + (1-\beta_2)\,g^2, \qquad
# w \leftarrow w - \eta\lambda w - \eta\,\frac{\hat m}{\sqrt{\hat v} + \epsilon} .
# $$
#
# Both moments start at zero and are too small at first. The hats stand for the *bias correction* that mends it, $\hat m = m/(1-\beta_1^t)$ and $\hat v = v/(1-\beta_2^t)$ in step $t$. The mean gradient of each weight is thus divided by its own usual size, whatever its neighbours do. That is where [chapter 12](12_newton_schulz.py) will begin.
#
# Record 1's learning rate climbs for 700 steps to $6\cdot10^{-4}$ and falls along half a cosine to zero at the last step. A gradient whose norm, over all parameters together, is more than 1 is scaled down to a norm of 1 (*clipping*). A step reads 512 rows of 1,024 tokens, so 19,560 steps make the 10.26 billion.
# Rate, warm-up, clipping and batch are about the GPT-3 paper's {cite}`brown2020`, whose rate stops at a tenth of its peak. They were taken over and not tuned for this run. Remember that when chapter 12 finds better ones.
#
# What the learning rate does between its ends is a choice of its own, and [chapter 14](14_schedule.py) has the function for it. Its defaults are llm.c's:

# %%
from speedrun.schedule import Schedule, ScheduleConfig

plan = ScheduleConfig()
rates = [Schedule(plan, 19_560, lr=6e-4).at(step).lr for step in range(19_560)]
assert 19_560 * 512 * 1024 == float(ladder["1"]["total_train_tokens"])
assert math.isclose(max(rates), 6e-4) and rates.index(max(rates)) in (699, 700)
assert math.isclose(rates[0], 6e-4 / 700) and rates[-1] < 1e-10
assert math.isclose(rates[700 + 18_860 // 2], 3e-4), "half-way down after half of the descent"
print("rate at", ", ".join(f"step {i:,}: {rates[i]:.1e}" for i in (0, 350, 700, 10_130, 19_559)))

# %% [markdown]
# Not every parameter decays. llm.c's rule, which this model follows, is that what has two dimensions does: matrices and embeddings decay, biases and norms do not. PyTorch's optimizers take *parameter groups* for that, each with constants of its own. In its *fused* form PyTorch's AdamW updates all tensors in a handful of kernels. This chapter uses it as it is; the trainer's optimizer, which calls the same kernels, is [chapter 20](20_many_gpus.py)'s.


# %%
#| export model.baseline
def decay_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer of torch's: tensors of two or more dimensions decay (llm.c's rule), all others do not."""
    parameters = list(model.parameters())
    large, small = ([p for p in parameters if (p.ndim >= 2) == yes] for yes in (True, False))
    return [{"params": large, "weight_decay": weight_decay}, {"params": small, "weight_decay": 0.0}]


# %%
BETAS = (0.9, 0.95)
model = GPT2(small, vocab)
optimizer = torch.optim.AdamW(decay_groups(model), lr=6e-4, betas=BETAS, fused=True)
decaying, resting = (sum(p.numel() for p in group["params"]) for group in optimizer.param_groups)
assert decaying == (vocab + 128) * 64 + 3 * 12 * 64**2 and resting == 3 * 13 * 64 + 2 * 64
print(f"{decaying:,} numbers decay, {resting:,} do not")

w, m, v = torch.tensor(0.5, dtype=torch.float64), 0.0, 0.0
weight = nn.Parameter(w.clone())
theirs = torch.optim.AdamW([weight], lr=0.01, betas=BETAS, eps=1e-8, weight_decay=0.1)
for t, g in enumerate((3.0, -1.0, 0.5), start=1):
    weight.grad = torch.tensor(g, dtype=torch.float64)
    theirs.step()
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
    step = (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.95**t)) + 1e-8)
    w = w - 0.01 * 0.1 * w - 0.01 * step
assert torch.allclose(weight, w, atol=1e-12)
print("three steps by the formula are three of PyTorch's")

# %% [markdown]
# ### A training run of 120 steps
#
# Here is everything together, on a small scale: two layers, and rows of 64 tokens of the embedded text. (A narrow model wants larger weights and a larger learning rate. The vocabulary is [chapter 02](02_data.py)'s 288.) The loop is ten lines; [chapter 23](23_training_loop.py)'s does the same things in the same order, with stages, several ranks and graphs.

# %%
from speedrun.data.loader import DataConfig, Loader
from speedrun.data.shards import data_folder
from speedrun.data.sources import build_embedded
from speedrun.lab.provenance import root

if not (data_folder("data/embedded") / "manifest.json").exists():
    build_embedded(root() / "data" / "embedded", root() / "data" / "wheels")
loader = Loader(DataConfig("data/embedded", seq_len=64, batch_tokens=1024, micro_batches=1))
torch.manual_seed(0)
shape = GPTConfig(num_layers=2, num_heads=2, model_dim=128, max_seq_len=64, init_std=0.05)
model = GPT2(shape, loader.shards.manifest.vocab_size).to(tier.device)
steps, losses = 120, []
cosine = Schedule(ScheduleConfig(warmup_steps=10), steps, lr=4e-3)
optimizer = torch.optim.AdamW(decay_groups(model), betas=BETAS, fused=True)

# %%
for step in range(steps):
    (batch,) = loader.next()
    loss = model(batch.inputs.to(tier.device), batch.targets.to(tier.device))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = cosine.at(step).lr
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

assert abs(losses[0] - math.log(288)) < 0.3 and losses[-1] < 3.2
print(
    f"loss {losses[0]:.2f} (ln 288 = {math.log(288):.2f}) → {losses[-1]:.2f} nats a token after {steps} steps"
)

# %% [markdown]
# ## The measurement
#
# Thirty-eight per cent of the data sheet is what record 1 reached. Where is the rest? We did not profile llm.c itself, and one GPU says nothing about what eight tell each other. But our model does the same arithmetic, and can be profiled. PyTorch's profiler names every kernel that ran and how long it took; sorting the names into a few kinds answers the question ([chapter 04](04_measuring.py) has the tool). (A fused kernel counts under the first
# kind that its name matches.) What the kernels do not fill is time in which the GPU waited.

# %% tags=["hide-input"]
#| export measure.baseline
import torch

from speedrun.lab.bench import ledger
from speedrun.lab.errors import UserError
from speedrun.lab.provenance import stamp
from speedrun.model import gpt

NAMES = ("step",)
KINDS = {  # kind → what its kernels are called; the first that matches counts
    "attention": r"flash|fmha|attention|sdpa|cudnn_generated",
    "matrix products": r"gemm|nvjet|cutlass|xmma|addmm|aten::mm|aten::bmm|matmul",
    "loss": r"softmax|nll_loss|cross_entropy|log_sum",
    "optimizer": r"multi_tensor|adam|lpnorm|foreach",
    "norms": r"layer_norm|native_layer",
    "copies and casts": r"copy|memcpy|memset|fill|cast|_to_copy",
}
OTHER = "other element-wise"


# %% tags=["hide-input"]
#| export measure.baseline
def profile_step(step, device: torch.device, repeats: int = 3) -> dict[str, float]:
    """Milliseconds of one step: `wall`, then per kind of kernel; `waiting` is what the kernels leave of the wall time."""
    times = ledger(step, device.type, repeats, KINDS, OTHER)
    return {"waiting" if kind == "gaps" else kind: ms for kind, ms in times.items()}


# %% [markdown]
# The patterns, in the folded cell above, are names of CUDA kernels and of PyTorch's own operations. On a CPU the same code sorts the latter, in a step of the small model, which is enough to see that the sorting works; on a GPU the former, in a step of GPT-2 on four rows:

# %%
from speedrun.lab.bench import kind_of

products = {kind_of(name, KINDS, OTHER) for name in ("nvjet_hsh_256x128_64x4", "aten::addmm")}
assert products == {"matrix products"}
assert kind_of("void pytorch_flash::flash_fwd_kernel", KINDS, OTHER) == "attention"
assert kind_of("triton_poi_fused_gelu_3", KINDS, OTHER) == OTHER

size, words, rows = tier.pick(cpu=(shape, 288, 16), gpu=(GPTConfig(), VOCAB, 4))
model = GPT2(size, words).to(tier.device)
tokens = torch.randint(words, (rows, size.max_seq_len + 1)).to(tier.device)
optimizer = torch.optim.AdamW(decay_groups(model), lr=4e-3, betas=BETAS, fused=True)


def one_step() -> None:
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()


times = profile_step(one_step, torch.device(tier.device))
parts = {kind: ms for kind, ms in times.items() if kind != "wall"}
assert min(times["matrix products"], times["attention"], times["optimizer"]) > 0
assert 0.4 < sum(parts.values()) / times["wall"] < 2.5
print({kind: f"{ms:.1f} ms" for kind, ms in sorted(parts.items(), key=lambda item: -item[1])})

# %% [markdown]
# The profile to believe takes a large GPU and the real size: 124 million parameters and 32 rows of 1,024 tokens. It is taken of three forms of the step. The first computes in 32-bit floats, as PyTorch does by default. The second multiplies matrices in bf16 (`with torch.autocast("cuda", torch.bfloat16):` around the model). The third is compiled as well (`torch.compile(model)`), which fuses operations between the products and may choose other kernels for the products. (Should the line under the numbers end in *stale*, code that was measured has changed since.)

# %% tags=["hide-input"]
#| export measure.baseline
FORMS = {"float32": (False, False), "bf16": (True, False), "bf16, compiled": (True, True)}


def make_step(tokens: torch.Tensor, bf16: bool, compiled: bool):
    """A training step of the 124M model on one batch of rows, (rows, 1025) int64."""
    torch.manual_seed(0)
    model = GPT2(gpt.GPTConfig(), 50_257).to(tokens.device)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(decay_groups(model), lr=6e-4, betas=(0.9, 0.95), fused=True)

    def step() -> None:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
            loss = forward(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


# %% tags=["hide-input"]
#| export measure.baseline
def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Profile a step of the 124M model in each of the FORMS on one GPU. Returns data and stamp."""
    if not torch.cuda.is_available():
        raise UserError(
            "the profile of the baseline needs a GPU",
            "the committed one is book/results/baseline/step.json",
        )
    rows, device, forms = 32, torch.device("cuda"), {}
    tokens = torch.randint(50_257, (rows, 1025), device=device)
    for form, (bf16, compiled) in FORMS.items():
        forms[form] = profile_step(make_step(tokens, bf16, compiled), device)
        torch.cuda.empty_cache()
    flops = gpt.flops_per_token(gpt.GPTConfig(), 50_257, 1024) * rows * 1024
    data = {"forms": forms, "tokens": rows * 1024, "flops": flops}
    return data, stamp(command, ["speedrun.measure.baseline"], n=3)


# %%
from speedrun.lab.results import figure_style, load_result, measured_on

result = load_result("baseline", "step")
forms, flops = result["data"]["forms"], result["data"]["flops"]
reached = {form: flops / (times["wall"] / 1000) / 989e12 for form, times in forms.items()}
speedup = {form: forms["float32"]["wall"] / times["wall"] for form, times in forms.items()}
compiled = forms["bf16, compiled"]
between = 1 - (compiled["matrix products"] + compiled["attention"]) / compiled["wall"]
saved = {kind: ms - compiled[kind] for kind, ms in forms["bf16"].items()}
in_products = flops_per_token(GPTConfig(), VOCAB, 0) * result["data"]["tokens"] / 989e12
in_products /= compiled["matrix products"] / 1000
assert flops == flops_per_token(GPTConfig(), VOCAB, 1024) * result["data"]["tokens"]
assert reached["float32"] < reached["bf16"] < reached["bf16, compiled"]
assert abs(reached["bf16, compiled"] - utilisation) < 0.06 and 0.3 < between < 0.5
for form, times in forms.items():
    print(
        f"{form:15} {times['wall']:6.1f} ms a step, {reached[form]:4.0%} of the data sheet's bf16"
    )
assert 0.5 < saved["matrix products"] / saved["wall"] < 0.65 and 0.65 < in_products < 0.75
assert saved["copies and casts"] > max(saved[kind] for kind in ("loss", "other element-wise"))
print(
    f"compiling saves {saved['wall']:.0f} ms: {saved['matrix products']:.0f} in matrix products, {saved['copies and casts']:.0f} in copies and casts"
)
print(f"its matrix products run at {in_products:.0%} of the data sheet")
print(measured_on(result))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: milliseconds of one training step in float32, bf16 and compiled bf16. Right: the shares of the kinds of kernels in each"}}
import matplotlib.pyplot as plt

figure_style()
fig, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.4), width_ratios=[1, 2.4], sharey=True)
kinds = [*KINDS, "other element-wise", "waiting"]
colors = [f"C{n}" for n in range(6)] + ["0.55", "0.8"]
for y, times in enumerate(forms.values()):
    left.barh(-y, times["wall"], color="0.4", height=0.6)
    left.text(times["wall"] + 12, -y, f"{times['wall']:.0f} ms", va="center", fontsize=9)
    total, begin = sum(times.get(kind, 0.0) for kind in kinds), 0.0
    for kind, color in zip(kinds, colors):
        share = 100 * times.get(kind, 0.0) / total
        right.barh(-y, share, left=begin, color=color, label=kind if y == 0 else None, height=0.6)
        if share >= 5:
            right.text(
                begin + share / 2,
                -y,
                f"{share:.0f}",
                ha="center",
                va="center",
                color="white",
                fontsize=8,
            )
        begin += share
left.set_yticks([-y for y in range(len(forms))], list(forms))
left.set_xlim(0, 760)
left.set_xlabel("ms a step")
right.set_xlim(0, 100)
right.set_xlabel("share of a step (%)")
for axis in (left, right):
    axis.grid(axis="y", visible=False)
right.legend(loc="upper center", bbox_to_anchor=(0.32, -0.22), ncols=4, fontsize=8)
left.set_title(
    f"a step of GPT-2: {speedup['bf16, compiled']:.1f}× less\ntime with bf16 and a compiler"
)
right.set_title(f"where it goes: compiled, {between:.0%}\nis neither matmul nor attention")
plt.show()

# %% [markdown]
# Two lines of PyTorch, a number format and a compiler, bring a naive program on one GPU to about the share of the data sheet that record 1 reached on eight, which also had to exchange gradients. The compiler's gain is not only fusion. More than half of what it saves is in the matrix products, which are the same products in the same format. Why they became faster, the profile does not say. A likely reason is that the compiler pads the 50,257 columns of the head, which PyTorch without it does not; we did not test that here. [Chapter 08](08_logits.py) measures what a padded vocabulary is worth.
#
# What is left splits in two. The matrix products run at seven tenths of the data sheet, and later records make some of them cheaper with eight-bit floats. Attention aside, everything else moves bytes and multiplies next to nothing:

# %%
rest = {
    kind: compiled[kind] for kind in ("other element-wise", "loss", "norms", "copies and casts")
}
waiting = compiled["waiting"] / compiled["wall"]
assert list(rest) == sorted(rest, key=rest.get, reverse=True) and round(100 * waiting) == 2
assert max(rest.values()) < sum(rest.values()) / 2 and round(10 * in_products) == 7
print({kind: f"{ms:.1f} ms" for kind, ms in rest.items()}, f"waiting {waiting:.0%}")

# %% [markdown]
# No single kind is as much as half of that. And the GPU is idle for two per cent of the step: alone, and with batches as large as these, it hardly waits for Python.
#
# ## Record 2: half the tokens
#
# Record 2, nine days after record 1, is Keller Jordan's, in PyTorch; he began with the PyTorch trainer in llm.c's repository. By his recollection it replaced the learned positions by rotary ones ([chapter 06](06_rotary.py)), tripled the learning rate to 0.0018, shortened the warm-up to 250 steps, and let the rate fall along a line at the end. It needed half the tokens:

# %%
tokens_of = {number: float(ladder[number]["total_train_tokens"]) for number in ("1", "2")}
halved = tokens_of["2"] / tokens_of["1"]
faster = float(ladder["2"]["record_time_s"]) / seconds
assert 0.45 < halved < 0.55 and 0.65 < faster < 0.75
print(
    f"record 2: {halved:.0%} of the tokens, {faster:.0%} of the time: half as many steps, each slower than llm.c's"
)

# %% [markdown]
# Four changes, three of them settings and one rotary positions, halved the tokens in another program. How much the settings alone gave nobody measured. That is what an untuned baseline looks like, and it is the reason why this book compares every optimizer with a *tuned* AdamW ([chapter 12](12_newton_schulz.py)) and not with this one. It is also a warning about reading the ladder as a sum. A record's gain is measured against whatever
# stood there before, and what stood there first had not been tuned for this contest.
#
# ## Exercises
#
# 1. Chinchilla's rule of thumb asks for 20 tokens a parameter, as the best use of a given number of FLOPs {cite}`hoffmann2022`: a model that sees fewer is larger than its FLOPs are best spent on, one that sees more is smaller. On which side of 20 are records 1, 2 and 89? Write `tokens_per_parameter(tokens, parameters)`, and then give a reason why the contest did not shrink the model. (Record 89 has 643.8 million parameters, most of them in tables that are looked up and never multiplied; count the 114 million that multiply.)


# %% tags=["solution"]
def tokens_per_parameter(tokens: float, parameters: float) -> float:
    """Training tokens per parameter."""
    return tokens / parameters


# %%
for some, weights, right in ((50, 20, 2.5), (1, 8, 0.125)):
    ratio = tokens_per_parameter(some, weights)
    assert ratio == right, (
        f"{some} tokens for {weights} parameters are {right} a parameter, not {ratio}"
    )
ratios = {number: tokens_per_parameter(tokens_of[number], counted) for number in ("1", "2")}
ratios["89"] = tokens_per_parameter(last_tokens, multiply)
assert ratios["1"] > 80 and ratios["89"] < 4, (
    f"record 1 read more than 80 tokens a parameter and record 89 fewer than 4, not {ratios}"
)
print({record: f"{ratio:.0f} tokens a parameter" for record, ratio in ratios.items()})
print(
    "The width of GPT-2 was inherited; then the loss was reached with fewer tokens, by better optimizers, architecture and smaller batches."
)
print("Smaller matrices use a GPU badly, and the contest counts seconds and not FLOPs.")

# %% [markdown]
# 2. How would longer rows change the share of attention? Write `attention_share(options, vocab_size, seq_len)` with the formula above, causal, and find `half_at`, the row length at which attention is half of the work.


# %% tags=["solution"]
def attention_share(options: GPTConfig, vocab_size: int, seq_len: int) -> float:
    """Share of attention itself in the FLOPs of a token."""
    total = flops_per_token(options, vocab_size, seq_len)
    return (total - flops_per_token(options, vocab_size, 0)) / total


half_at = next(n for n in range(1, 100_000) if attention_share(GPTConfig(), VOCAB, n) >= 0.5)

# %%
assert half_at is not ..., "exercise: write half_at"
rows = (0, 1024, 4096, half_at)
share = {n: attention_share(GPTConfig(), VOCAB, n) for n in rows}
assert share[0] == 0, f"without a row there is no attention, but its share is {share[0]}"
assert abs(share[1024] - 0.071) < 0.001, (
    f"at 1,024 tokens attention is 7.1% of all FLOPs, not {share[1024]:.1%} (causal: half of it is skipped)"
)
assert abs(share[half_at] - 0.5) < 0.0001, (
    f"at half_at = {half_at} the share should be 50.00%, it is {share[half_at]:.2%}"
)
print("share of attention by row length:", {n: f"{share[n]:.0%}" for n in rows[1:]})

# %% [markdown]
# ## What it does not show
#
# The profile is of our model on one GPU. llm.c's kernels are others and were not profiled, and eight GPUs also exchange gradients. The ledger counts matrix products; what a step does beside them, it only knows as a remainder.
#
# ## Where to go next
#
# [Chapter 04](04_measuring.py) has the clock, the roofline and the trace with which this was measured. [Chapter 05](05_modern_block.py) changes the block.
