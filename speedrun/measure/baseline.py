# Tangled from notebooks/03_baseline.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.model.baseline import AdamWOptions, GPT2, GPT2Options, decays_by_shape, flops_per_token, make_adamw


# %% The measurement
import re
import time

import torch
from torch.profiler import ProfilerActivity, profile

from speedrun.lab.hardware import Problem
from speedrun.lab.results import stamp

NAMES = ("step",)
KINDS = {  # kind → what its kernels are called; the first that matches counts
    "attention": r"flash|fmha|attention|sdpa|cudnn_generated",
    "matrix products": r"gemm|nvjet|cutlass|xmma|addmm|aten::mm|aten::bmm|matmul",
    "loss": r"softmax|nll_loss|cross_entropy|log_sum",
    "optimizer": r"multi_tensor|adam|lpnorm|foreach",
    "norms": r"layer_norm|LayerNorm|native_layer",
    "copies and casts": r"copy|Memcpy|Memset|fill|cast|_to_copy",
}


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), "other element-wise")


def profile_step(step, device: torch.device, repeats: int = 3) -> dict[str, float]:
    """Milliseconds of one step: `wall`, and per kind of kernel; `waiting` is what the kernels leave of the wall time."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(3):
        step()
    wait()
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    wait()
    wall = 1000 * (time.perf_counter() - begin) / repeats
    with profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as seen:
        for _ in range(repeats):
            step()
        wait()
    times = {"wall": wall}
    for event in seen.key_averages():
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        times[kind_of(event.key)] = times.get(kind_of(event.key), 0.0) + spent / 1000 / repeats
    return times | {"waiting": max(0.0, wall - sum(ms for kind, ms in times.items() if kind != "wall"))}


FORMS = {"float32": ("float32", False), "bf16": ("bfloat16", False), "bf16, compiled": ("bfloat16", True)}


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Profile a step of the 124M model in each of the FORMS on one GPU. Returns data and stamp."""
    if not torch.cuda.is_available():
        raise Problem("the profile of the baseline needs a GPU", "run it on one; the committed result is book/results/baseline/step.json")
    rows, device, forms = 32, torch.device("cuda"), {}
    tokens = torch.randint(50_257, (rows, 1025), device=device)
    for form, (precision, compiled) in FORMS.items():
        torch.manual_seed(0)
        model = GPT2(GPT2Options(), 50_257).to(device)
        forward = torch.compile(model) if compiled else model
        optimizer = make_adamw(dict(model.named_parameters()), decays_by_shape(model), AdamWOptions())

        def step() -> None:
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
                loss = forward(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        forms[form] = profile_step(step, device)
        del model, forward, optimizer, step
        torch.cuda.empty_cache()
    flops = flops_per_token(GPT2Options(), 50_257, 1024) * rows * 1024
    return {"forms": forms, "tokens": rows * 1024, "flops": flops}, stamp(command, ["speedrun.measure.baseline"], n=1)
