"""The index: where every sample lies in its shard and how long it will be, so that no later step opens a tar.

Each shard is scanned once per tokenizer; the result stands beside it (`shard-000000.tar.<tokenizer>.idx.npz`) and is
rebuilt when the shard's size or modification time changes. Ranks may build the same index at once: they write the same
bytes and the last rename wins. Costs about 60 bytes of memory a sample and 24 an image.

    python -m megatron_mm.data.index FOLDER [TOKENIZER]
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from megatron_mm.data.files import replacing
from megatron_mm.data.tokenizer import Tokenizer, load_tokenizer

CAPTION_SUFFIXES = ("txt", "caption")
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")


@dataclass(frozen=True)
class Index:
    """N samples with M members in all; a sample's first member is its document (json) or caption, the rest its images
    in reading order.

    shards: the tar files. shard int32 [N]: ordinal of the sample's. keys bytes [N], UTF-8.
    paired bool [N]: a loose webdataset pair (KEY.txt + KEY.jpg), read as caption, image.
    text_tokens int64 [N], texts int32 [N]: tokens in all text segments, and number of those segments.
    starts int64 [N + 1]: members of sample i are starts[i] .. starts[i + 1].
    offsets, sizes int64 [M]: bytes in the shard. heights, widths int32 [M]: pixels (0 for the first member).
    """

    shards: tuple[Path, ...]
    shard: np.ndarray
    keys: np.ndarray
    paired: np.ndarray
    text_tokens: np.ndarray
    texts: np.ndarray
    starts: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    heights: np.ndarray
    widths: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def images(self) -> np.ndarray:
        """int64 [N], number of images of each sample."""
        return np.diff(self.starts) - 1

    def key(self, uid: int) -> str:
        return bytes(self.keys[uid]).decode()

    def path(self, uid: int) -> Path:
        """The shard that holds the sample."""
        return self.shards[int(self.shard[uid])]


ARRAYS = tuple(f.name for f in fields(Index) if f.name not in ("shards", "shard"))


def build_index(folder: str | Path, tokenizer: Tokenizer, key: str = "data.path") -> Index:
    """The index of all `*.tar` of `folder`, in order of name; scans only what has no valid index yet.

    Args:
        key: the configuration key that names the folder, for errors.

    Raises:
        ValueError: no folder, no shards, a corrupt shard, or a sample that is not as `megatron_mm.data.shards` says.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{key}={folder} is no folder. Prepare shards first: python -m megatron_mm.data.prepare.")
    shards = tuple(sorted(folder.glob("*.tar")))
    if not shards:
        raise ValueError(f"{key}={folder} holds no shards (*.tar). Name the folder that holds them directly.")
    parts = [_shard_index(shard, tokenizer) for shard in shards]
    return joined(
        [
            Index((shard,), np.zeros(len(part["keys"]), np.int32), **part)
            for shard, part in zip(shards, parts, strict=True)
        ]
    )


def joined(parts: Sequence[Index]) -> Index:
    """The samples of `parts` one after the other, as one index."""
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS if name != "starts"}
    counts = np.concatenate([np.diff(part.starts) for part in parts])
    firsts = np.cumsum([0, *(len(part.shards) for part in parts[:-1])], dtype=np.int32)
    return Index(
        shards=tuple(shard for part in parts for shard in part.shards),
        shard=np.concatenate([part.shard + first for part, first in zip(parts, firsts, strict=True)]),
        starts=np.concatenate([[0], counts.cumsum()]),
        **arrays,
    )


def _shard_index(shard: Path, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The arrays of one shard, from the file beside it if that is valid."""
    path = shard.with_name(f"{shard.name}.{tokenizer.fingerprint}.idx.npz")
    stat = shard.stat()
    stamp = np.array([stat.st_size, stat.st_mtime_ns])
    try:
        with np.load(path) as saved:
            if np.array_equal(saved["stamp"], stamp):
                return {name: saved[name] for name in ARRAYS}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        pass  # absent or damaged: scan again
    arrays = _scan(shard, tokenizer)
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, stamp=stamp, **arrays)
    except OSError as error:
        warnings.warn(f"Cannot keep the index {path} ({error}); the shard is scanned again each time.", stacklevel=2)
    return arrays


def _scan(shard: Path, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    keys, paired, text_tokens, texts, counts, members = [], [], [], [], [], []
    with shard.open("rb") as file:
        for key, found in _samples(shard, file).items():
            try:
                segments, is_pair, ordered = _parse(file, found)
                sizes = [_image_size(file, member) for member in ordered[1:]]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{shard}, sample {key!r} is not a document: {_reason(error)}") from error
            tokens = [len(tokenizer.encode(text)) for text in segments]
            keys.append(key.encode())
            paired.append(is_pair)
            text_tokens.append(sum(tokens))
            texts.append(len(tokens))
            counts.append(len(ordered))
            members += [(*member, *size) for member, size in zip(ordered, [(0, 0), *sizes], strict=True)]
    table = np.array(members, dtype=np.int64).reshape(-1, 4)
    return {
        "keys": np.array(keys, dtype=bytes),
        "paired": np.array(paired, dtype=bool),
        "text_tokens": np.array(text_tokens, dtype=np.int64),
        "texts": np.array(texts, dtype=np.int32),
        "starts": np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        "offsets": table[:, 0],
        "sizes": table[:, 1],
        "heights": table[:, 2].astype(np.int32),
        "widths": table[:, 3].astype(np.int32),
    }


Member = tuple[int, int]
"""Byte offset and size of a file in the shard."""


def _samples(shard: Path, file: BinaryIO) -> dict[str, dict[str, Member]]:
    """key -> suffix -> member, in the shard's order; a key ends at the first dot of the file's name."""
    samples: dict[str, dict[str, Member]] = {}
    newest = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if not info.isfile():
                    continue
                folder, slash, name = info.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = folder + slash + stem
                if key != newest and key in samples or suffix in samples.get(key, ()):
                    raise ValueError(f"{shard} holds {info.name!r} apart from, or twice in, its sample. Rewrite it.")
                newest = key
                samples.setdefault(key, {})[suffix] = (info.offset_data, info.size)
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(f"{shard} is damaged or no tar file: {error}. Write it again.") from error
    # tarfile takes any unreadable header for the end; a real end is at least one block of zeros.
    file.seek(end)
    rest = file.read()
    if len(rest) < tarfile.BLOCKSIZE or any(rest):
        raise ValueError(f"{shard} is damaged: it breaks off or turns unreadable at byte {end}. Write it again.")
    return samples


def _parse(file: BinaryIO, found: dict[str, Member]) -> tuple[list[str], bool, list[Member]]:
    """Texts of one sample, whether it is a loose pair, and its members: document or caption first, then the images."""
    if "json" in found:
        document = json.loads(_content(file, found["json"]))
        if isinstance(document, dict) and "segments" in document:
            segments = document["segments"]
            texts = [segment["text"] for segment in segments if segment["type"] == "text"]
            names = [segment["file"] for segment in segments if segment["type"] == "image"]
            if len(texts) + len(names) != len(segments):
                raise ValueError("its json has a segment whose type is neither 'text' nor 'image'.")
            if missing := [name for name in names if name not in found]:
                raise ValueError(f"its json names {missing[0]!r}, which the shard does not hold. Write it again.")
            return texts, False, [found["json"], *(found[name] for name in names)]
    captions = [found[suffix] for suffix in CAPTION_SUFFIXES if suffix in found]
    images = [found[suffix] for suffix in IMAGE_SUFFIXES if suffix in found]
    if len(captions) != 1 or len(images) != 1:
        raise ValueError("it is neither a json with segments nor one caption (.txt) with one image (.png, .jpg).")
    return [_content(file, captions[0]).decode()], True, [captions[0], images[0]]


def _reason(error: Exception) -> str:
    return f"its json lacks {error}." if isinstance(error, KeyError) else str(error)


def _content(file: BinaryIO, member: Member) -> bytes:
    file.seek(member[0])
    return file.read(member[1])


def _image_size(file: BinaryIO, member: Member) -> tuple[int, int]:
    """(height, width) in pixels, from the picture's header."""
    try:
        width, height = Image.open(io.BytesIO(_content(file, member))).size
    except OSError as error:
        raise ValueError(f"the image at byte {member[0]} is unreadable ({error}).") from error
    return height, width


if __name__ == "__main__":
    index = build_index(sys.argv[1], load_tokenizer((sys.argv[2:] or ["bytes"])[0]))
    print(f"{len(index)} samples, {int(index.text_tokens.sum())} text tokens, {int(index.images.sum())} images")
