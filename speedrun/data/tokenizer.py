# Tangled from notebooks/02_data.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Text becomes numbers
from speedrun.data.shards import TOKENIZERS


from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from speedrun.lab.errors import UserError

SPACE, LONGEST_RUN = 32, 32
FIRST_RUN = 256  # two spaces; 286 is thirty-two
BYTE_DOCUMENT = 287
RUNS = [b" " * n for n in range(2, LONGEST_RUN + 1)]
PIECES = [bytes([byte]) for byte in range(256)] + RUNS + [b""]


def encode_bytes(text: bytes) -> np.ndarray:
    """Bytes as tokens, (tokens,) uint16: a byte is its value, a run of 2 to 32 spaces one token of its own."""
    tokens = np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
    space = tokens == SPACE
    edges = np.diff(space.astype(np.int8), prepend=0, append=0)
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    where, run = np.flatnonzero(space), np.repeat(np.arange(len(starts)), stops - starts)
    first = (where - starts[run]) % LONGEST_RUN == 0  # opens a token; runs beyond 32 need several
    length = np.minimum(stops[run] - where, LONGEST_RUN)[first]
    tokens[where[first]] = np.where(length == 1, SPACE, FIRST_RUN - 2 + length)
    keep = np.ones(len(tokens), dtype=bool)
    keep[where[~first]] = False
    return tokens[keep]


def decode_bytes(tokens) -> bytes:
    """The inverse of `encode_bytes`; document tokens vanish."""
    return b"".join(PIECES[token] for token in tokens)


@dataclass(frozen=True)
class Tokenizer:
    """`encode`: str → uint16 (tokens,); `decode`: back; `piece`: one token's bytes; `document`: opens a document."""

    name: str
    vocab_size: int
    document: int
    encode: Callable[[str], np.ndarray]
    decode: Callable
    piece: Callable[[int], bytes]


def byte_tokenizer() -> Tokenizer:
    """Bytes and runs of spaces: 288 tokens."""

    def decode(tokens) -> str:
        return decode_bytes(tokens).decode(errors="replace")

    def encode(text: str) -> np.ndarray:
        return encode_bytes(text.encode())

    return Tokenizer("bytes", BYTE_DOCUMENT + 1, BYTE_DOCUMENT, encode, decode, PIECES.__getitem__)


GPT2_DOCUMENT = 50256


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's byte-pair encoding: 50,257 tokens, of which the last opens a document. Needs its vocabulary, once."""
    import tiktoken

    try:
        bpe = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        fix = "run this once with a network; or set TIKTOKEN_CACHE_DIR to a folder with tiktoken's files"
        raise UserError(f"the GPT-2 vocabulary could not be loaded: {error}", fix) from None

    def encode(text: str) -> np.ndarray:
        return np.array(bpe.encode_ordinary(text), dtype=np.uint16)

    def decode(tokens) -> str:
        return bpe.decode([int(token) for token in tokens if token != GPT2_DOCUMENT])

    def piece(token: int) -> bytes:
        return b"" if token == GPT2_DOCUMENT else bpe.decode_single_token_bytes(token)

    return Tokenizer("gpt2", bpe.n_vocab, GPT2_DOCUMENT, encode, decode, piece)


MAKERS = dict(zip(TOKENIZERS, (byte_tokenizer, gpt2_tokenizer)))


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that a manifest names."""
    if name not in TOKENIZERS:
        raise UserError(f"there is no tokenizer “{name}”", f"known are {', '.join(TOKENIZERS)}")
    return MAKERS[name]()
