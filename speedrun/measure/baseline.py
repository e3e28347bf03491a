# Tangled from notebooks/03_baseline.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.model.baseline import GPT2, decay_groups


# %% The measurement
import re
import time

import torch
from torch.profiler import ProfilerActivity, profile

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


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    found = (kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE))
    return next(found, "other element-wise")


def profile_step(step, device: torch.device, repeats: int = 3) -> dict[str, float]:
    """Milliseconds of one step: `wall`, then per kind of kernel; `waiting` is what the kernels leave of the wall time."""
    on_gpu = device.type == "cuda"
    for _ in range(3):
        step()
    torch.cuda.synchronize() if on_gpu else None
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    torch.cuda.synchronize() if on_gpu else None
    times = {"wall": 1000 * (time.perf_counter() - begin) / repeats}
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize() if on_gpu else None
    for event in seen.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        times[kind_of(event.key)] = times.get(kind_of(event.key), 0.0) + spent / 1000 / repeats
    return times | {"waiting": max(0.0, 2 * times["wall"] - sum(times.values()))}


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
