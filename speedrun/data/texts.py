# Tangled from notebooks/94_sources.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.data.shards import FORMATS, HEADER_BYTES, MAGIC, recognise


# %% From files to documents
import hashlib
import json
import re
from pathlib import Path

import numpy as np

from speedrun.lab.errors import UserError, quoted, visible


def is_validation(name: str, share: float) -> bool:
    """Whether a file or text validates: its hash, read as a number in [0, 1), is below `share`."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 < share


def cut(tokens: np.ndarray, newline: int, limit: int) -> list[np.ndarray]:
    """Pieces of at most `limit` tokens that end after a `newline` where one is in reach; together they are `tokens`."""
    ends, pieces, start = np.flatnonzero(tokens == newline) + 1, [], 0
    while start < len(tokens):
        stop = start + limit
        if stop < len(tokens):
            last = int(np.searchsorted(ends, stop, side="right")) - 1
            stop = int(ends[last]) if last >= 0 and ends[last] > start else stop
        pieces.append(tokens[start:stop])
        start = stop
    return pieces


def shuffled(documents: list, seed: int = 0) -> list:
    """The documents in an order that depends on `seed` and their number alone."""
    keys = [hashlib.sha256(f"{seed}:{i}".encode()).digest() for i in range(len(documents))]
    return [documents[i] for i in sorted(range(len(documents)), key=keys.__getitem__)]


# %% Your own text
def read_text(path: Path) -> str:
    """The content of a UTF-8 text file; what is something else becomes a UserError that says what, and what to do."""
    try:
        content = path.read_bytes()
    except OSError as error:
        what = f"{visible(path)} cannot be read: {error.strerror}"
        raise UserError(what, "give paths of text or .jsonl files") from None
    try:
        text, at = content.decode("utf-8-sig"), content.find(0)
        if at < 0 and not content.startswith(b"version https://git-lfs"):
            return text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads text
    except UnicodeDecodeError as error:
        at = error.start
    raise UserError(f"{visible(path)}, byte {max(at, 0)}: not UTF-8 text", text_of(path, content))


def text_of(path: Path, content: bytes) -> str:
    """What a file is that is no UTF-8 text, and the command that makes such a text of it."""
    name, plain = quoted(path), quoted(path.with_name(f"plain-{path.name}"))
    if content.startswith(MAGIC.to_bytes(4, "little")):
        return f"it is a shard of tokens already: python -m speedrun.data manifest {quoted(path.parent)} --tokenizer gpt2 (or bytes)"
    for end, letters in (
        ("LE", rb"(?:[\t-\r -~\xa0-\xff]\0){4}"),
        ("BE", rb"(?:\0[\t-\r -~\xa0-\xff]){4}"),
    ):
        if re.match(letters, content):
            return f"it is UTF-16 text: iconv -f UTF-16{end} -t UTF-8 {name} > {plain}"
    stray = f"it is binary, or text with stray zeros; then: tr -d '\\000' < {name} > {plain}"
    latin = f"if it is Latin-1: iconv -f LATIN1 -t UTF-8 {name} > {plain}"
    return recognise(path, content[:HEADER_BYTES], FORMATS) or (stray if 0 in content else latin)


def read_documents(path: Path) -> list[str]:
    """The documents of a text file (one) or of a `.jsonl` (one a line, its `text` field)."""
    content, documents = read_text(path), []
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return [content]
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            json.loads(line)["text"].encode()  # a number, or half a character, fails here
            documents.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            what = f"{visible(path)}, line {number}: expected a JSON object with a “text” field"
            raise UserError(what, "mend that line, or leave it out") from None
    return documents


def cut_in_two(text: str, at: int) -> tuple[str, str] | None:
    """A text in two parts at a border near character `at`: of paragraphs, lines or words; None if it has none."""
    at = min(max(at, 1), len(text) - 1)
    reach = max(100, min(at, len(text) - at) // 10)
    for border in ("\n\n", "\n", " "):
        before = text.rfind(border, 0, at) + len(border)
        after = text.find(border, at) + len(border)
        places = [place for place in (before, after) if place >= len(border) and 0 < place < len(text)]  # fmt: skip
        place = min(places, key=lambda place: abs(place - at), default=len(text))
        if abs(place - at) <= reach and place < len(text):
            return text[:place], text[place:]
    return (text[:at], text[at:]) if len(text) > reach else None


def split_texts(texts: list[str], share: float) -> dict[str, list[str]]:
    """Training and validation texts, by the hashes of the texts; a split that stays empty gets a part of the longest."""
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for text in texts:
        splits["val" if is_validation(text, share) else "train"].append(text)
    if texts and not all(splits.values()):
        longest, total = max(texts, key=len), sum(map(len, texts))
        validates = share * total - (0 if splits["train"] else total - len(longest))
        if halves := cut_in_two(longest, round(len(longest) - validates)):
            rest = [text for text in texts if text != longest]
            copies = len(texts) - len(rest)
            train, val = ([half] * copies for half in halves)
            return {"train": train + rest * bool(splits["train"]), "val": val + rest * bool(splits["val"])}  # fmt: skip
        full, empty = ("train", "val") if splits["train"] else ("val", "train")
        shortest = min(texts, key=len)  # no border in the longest: a whole text goes over
        if shortest != longest:
            splits[empty] = [text for text in texts if text == shortest]
            splits[full] = [text for text in texts if text != shortest]
    return splits
