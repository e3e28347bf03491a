# Tangled from notebooks/09_flex_attention.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% In a whole run
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from speedrun.config import vary
from speedrun.data.loader import Batch
from speedrun.lab.errors import UserError
from speedrun.lab.provenance import stamp
from speedrun.model.gpt import GPT
from speedrun.presets import preset
from speedrun.train import compile_model, forward_loss, prepare_attention

NAMES = ()
ON_GPUS = ("attention",)
LENGTHS = (1024, 512, 1024, 256, 768, 512) * 12  # 49,152 tokens, as in the third stage on one GPU


def micro_step(backend: str) -> Callable[[], None]:
    """A forward and a backward pass of `record_200m`'s model over one packed row, compiled, with attention through a backend."""
    config = vary(preset("record_200m"), {"model.attention.backend": backend})
    device = torch.device("cuda")
    model = GPT(config.model, 50_257).to(device)
    told = prepare_attention(config, model, device)[2]
    forward = compile_model(model)
    ids = torch.randint(50_257, (1, sum(LENGTHS) + 1), device=device)
    ends = torch.tensor((0, *LENGTHS)).cumsum(0, dtype=torch.int32).to(device)
    longest = torch.tensor(max(LENGTHS), dtype=torch.int32)
    row = Batch(ids[:, :-1], ids[:, 1:], ends, longest)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        forward_loss(forward, row, device, config.precision, told).backward()

    return step


def sustained(step: Callable[[], None], seconds: float) -> dict[str, float]:
    """Repeat a step for some seconds. Of the second half: median time of a step in ms, clock in MHz, power in W."""
    rows: list[tuple[float, ...]] = []
    torch.cuda.synchronize()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(5):
            step()
        last.record()
        facts = torch.cuda.clock_rate(), torch.cuda.power_draw() / 1000  # while it computes
        torch.cuda.synchronize()
        rows.append((first.elapsed_time(last) / 5, *facts))
    half = rows[len(rows) // 2 :]
    return dict(zip(("ms", "clock_mhz", "power_w"), map(statistics.median, zip(*half))))


def kernels_of(step: Callable[[], None]) -> dict[str, float]:
    """The GPU's kernels in one step by name, ms."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total / 1000 for event in seen.key_averages()}


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """One micro-step through FlexAttention and through the kernel, in turn: rested, for twenty seconds, and its kernels. Argument: other seconds."""
    if not torch.cuda.is_available():
        raise UserError(f"{name} times a model on a GPU", "run it on an NVIDIA GPU")
    seconds = float(arguments[0]) if arguments else 20.0
    steps = {backend: micro_step(backend) for backend in ("flex", "triton")}
    for step in steps.values():
        sustained(step, 1.0)  # compiles
    rows: list[dict[str, Any]] = []
    for _ in range(2):
        for backend, step in steps.items():
            time.sleep(3.0)
            rested = sustained(step, 0.6)
            rows.append({"backend": backend, "rested": rested, "long": sustained(step, seconds)})
            print(rows[-1], flush=True)
    kernels = {backend: kernels_of(step) for backend, step in steps.items()}
    data = {"rows": rows, "kernels": kernels, "tokens": sum(LENGTHS), "seconds": seconds}
    return data, stamp(command, ["speedrun.measure.micro_step"], 1, [0])
