# Tangled from notebooks/10_windows_and_yarn.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.model.yarn import widened_scale, yarn


# %% A model that writes, on long documents
import shlex
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from speedrun.config import Config, vary
from speedrun.lab.provenance import root
from speedrun.measure.study import runs_of
from speedrun.presets import preset
from speedrun.schedule import Stage

LONGEST, TRAINED, FROM = 4096, 512, 512
WIDER = (1024, 2048, 4096)
NARROWER = (64, 128, 256, TRAINED)


def whole_files(folder: Path) -> None:
    """The embedded text's files as documents of at most LONGEST tokens, as a data folder, unless it is there."""
    from speedrun.data import sources
    from speedrun.data.tokenizer import byte_tokenizer, decode_bytes, encode_bytes

    if (folder / "manifest.json").exists():
        return
    documents: dict[str, list] = {"train": [], "val": []}
    for package in sources.WHEELS:
        for name, text in sorted(sources.package_text(package, root() / "data" / "wheels").items()):
            pieces = sources.cut(encode_bytes(text), ord("\n"), LONGEST - 1)
            split = "val" if sources.is_validation(name, 0.05) else "train"
            documents[split] += [(piece, len(decode_bytes(piece))) for piece in pieces]
    mixed = {split: sources.shuffled(texts) for split, texts in documents.items()}
    told = byte_tokenizer(), ", ".join(sources.WHEELS), shlex.join(["measure.py", "windows"])
    sources.write_corpus(folder, mixed, *told, sources.SHARD_TOKENS)


def study() -> dict[str, Config]:
    """The laptop's run on whole files, three seeds; makes the files. Its long layer looks back over 256, then 512 tokens."""
    whole_files(root() / "data" / "files")
    stages = tuple(Stage(1 / 2, 1, 1.5, LONGEST, (64, long)) for long in (256, TRAINED))
    reads = {"data.path": "data/files", "data.max_doc_tokens": LONGEST, "data.micro_batches": 1}
    sizes = {"data.batch_tokens": LONGEST, "data.max_forward_tokens": LONGEST, "steps": 600}
    run = vary(preset("cpu"), reads | sizes | {"schedule.stages": stages})
    return runs_of({"files": run}, (0, 1, 2))


@torch.no_grad()
def far_loss(live: Any, window: int, turning: torch.Tensor, scale: float, tokens: int) -> float:
    """Mean loss of validation tokens with at least FROM before them in their document, when long attention looks back over `window`."""
    from speedrun.data.loader import validation_batches
    from speedrun.model.attention import Packed, positions_of

    short, sums = live.attn_settings[-1].windows[0].item(), torch.zeros(2, dtype=torch.float64)
    reach = torch.tensor([short, window], dtype=torch.int32)
    for batch in validation_batches(live.validation, live.config.data, tokens):
        assert batch.cu_seqlens is not None and batch.longest is not None
        known = Packed(batch.cu_seqlens, batch.longest, reach, torch.tensor(scale), turning)
        logits = live.model(batch.inputs, None, known)[0].float()
        lost = F.cross_entropy(logits, batch.targets[0], reduction="none")
        far = lost[positions_of(batch.cu_seqlens, len(lost)) >= FROM]
        sums += torch.tensor([far.sum().item(), len(far)])
    return (sums[0] / sums[1]).item()


def after(live: Any, tokens: int = 131_072) -> dict:
    """Far losses by the window of the evaluation: as trained; and wider ones also with new frequencies and scale, or one of the two."""
    told = live.attn_settings[-1]
    turning, scale = told.frequencies, told.scale.item()
    found = {"as trained": {w: far_loss(live, w, turning, scale, tokens) for w in NARROWER + WIDER}}
    ways: dict[str, dict] = {"YaRN and scale": {}, "YaRN": {}, "scale": {}}
    for wide in WIDER:
        slower, stronger = yarn(turning, TRAINED, wide), widened_scale(scale, TRAINED, wide)
        ways["YaRN and scale"][wide] = far_loss(live, wide, slower, stronger, tokens)
        ways["YaRN"][wide] = far_loss(live, wide, slower, scale, tokens)
        ways["scale"][wide] = far_loss(live, wide, turning, stronger, tokens)
    return {
        "far": {way: {str(w): loss for w, loss in by.items()} for way, by in (found | ways).items()}
    }
