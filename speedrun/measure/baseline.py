# Tangled from notebooks/03_baseline.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.model.baseline import GPT2, decay_groups


# %% The measurement
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


def profile_step(step, device: torch.device, repeats: int = 3) -> dict[str, float]:
    """Milliseconds of one step: `wall`, then per kind of kernel; `waiting` is what the kernels leave of the wall time."""
    times = ledger(step, device.type, repeats, KINDS, OTHER)
    return {"waiting" if kind == "gaps" else kind: ms for kind, ms in times.items()}


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
