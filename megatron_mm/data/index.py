"""The index: where every sample lies in its shard and how long it will be, so that no later step opens a tar.

Each shard is scanned once per tokenizer; the result stands beside it (`shard-000000.tar.<tokenizer>.idx.npz`) and is
rebuilt when the shard's size or modification time changes. Ranks may build the same index at once: they write the same
bytes and the last rename wins. Costs about 60 bytes of memory a sample, 5 a
segment and 24 an image.

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

from megatron_mm.data.chat import PLAIN_CHAT, Chat
from megatron_mm.data.document import Parsed, Picture, parse_document
from megatron_mm.data.files import replacing
from megatron_mm.data.tokenizer import Tokenizer, load_tokenizer
from megatron_mm.types import TextSegment

CAPTION_SUFFIXES = ("txt", "caption")
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
LOSS, ENDS = 1, 2
"""Bits of `Index.flags`."""


@dataclass(frozen=True)
class Index:
    """N samples with M members in all; a sample's first member is its document (json) or caption, the rest its images
    in reading order.

    shards: the tar files. shard int32 [N]: ordinal of the sample's. keys bytes [N], UTF-8.
    paired bool [N]: a loose webdataset pair (KEY.txt + KEY.jpg), read as caption, image.
    segments int64 [N + 1]: segments of sample i are segments[i] .. segments[i + 1], of T in all.
    tokens int32 [T]: of each segment, -1 for an image. flags int8 [T]: LOSS where it is learnt, ENDS where EOS follows.
    starts int64 [N + 1]: members of sample i are starts[i] .. starts[i + 1].
    offsets, sizes int64 [M]: bytes in the shard. heights, widths int32 [M]: pixels (0 for the first member).
    """

    shards: tuple[Path, ...]
    shard: np.ndarray
    keys: np.ndarray
    paired: np.ndarray
    segments: np.ndarray
    tokens: np.ndarray
    flags: np.ndarray
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


STARTS = ("segments", "starts")
ARRAYS = tuple(f.name for f in fields(Index) if f.name not in ("shards", "shard"))


def build_index(folder: str | Path, tokenizer: Tokenizer, key: str = "data.path", chat: Chat = PLAIN_CHAT) -> Index:
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
    parts = [_shard_index(shard, tokenizer, chat) for shard in shards]
    return joined(
        [
            Index((shard,), np.zeros(len(part["keys"]), np.int32), **part)
            for shard, part in zip(shards, parts, strict=True)
        ]
    )


def joined(parts: Sequence[Index]) -> Index:
    """The samples of `parts` one after the other, as one index."""
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS if name not in STARTS}
    for name in STARTS:
        arrays[name] = np.concatenate([[0], *(np.diff(getattr(part, name)) for part in parts)]).cumsum()
    firsts = np.cumsum([0, *(len(part.shards) for part in parts[:-1])], dtype=np.int32)
    return Index(
        shards=tuple(shard for part in parts for shard in part.shards),
        shard=np.concatenate([part.shard + first for part, first in zip(parts, firsts, strict=True)]),
        **arrays,
    )


def _shard_index(shard: Path, tokenizer: Tokenizer, chat: Chat) -> dict[str, np.ndarray]:
    """The arrays of one shard, from the file beside it if that is valid."""
    path = shard.with_name(".".join(filter(None, (shard.name, tokenizer.fingerprint, chat.fingerprint, "idx.npz"))))
    stat = shard.stat()
    stamp = np.array([stat.st_size, stat.st_mtime_ns])
    try:
        with np.load(path) as saved:
            if np.array_equal(saved["stamp"], stamp):
                return {name: saved[name] for name in ARRAYS}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        pass  # absent or damaged: scan again
    arrays = _scan(shard, tokenizer, chat)
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, stamp=stamp, **arrays)
    except OSError as error:
        warnings.warn(f"Cannot keep the index {path} ({error}); the shard is scanned again each time.", stacklevel=2)
    return arrays


def _scan(shard: Path, tokenizer: Tokenizer, chat: Chat) -> dict[str, np.ndarray]:
    keys, paired, segments, counts, members = [], [], [], [], []
    with shard.open("rb") as file:
        for key, found in _samples(shard, file).items():
            try:
                parsed, is_pair, ordered = _parse(file, found, tokenizer, chat)
                sizes = [_image_size(file, member) for member in ordered[1:]]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{shard}, sample {key!r} is not a document: {_reason(error)}") from error
            keys.append(key.encode())
            paired.append(is_pair)
            segments.append(parsed)
            counts.append(len(ordered))
            members += [(*member, *size) for member, size in zip(ordered, [(0, 0), *sizes], strict=True)]
    table = np.array(members, dtype=np.int64).reshape(-1, 4)
    all_segments = [segment for parsed in segments for segment in parsed]
    return {
        "keys": np.array(keys, dtype=bytes),
        "paired": np.array(paired, dtype=bool),
        "segments": np.array([0, *map(len, segments)], dtype=np.int64).cumsum(),
        "tokens": np.array([len(s.ids) if isinstance(s, TextSegment) else -1 for s in all_segments], dtype=np.int32),
        "flags": np.array([LOSS * s.loss + ENDS * getattr(s, "ends", False) for s in all_segments], dtype=np.int8),
        "starts": np.array([0, *counts], dtype=np.int64).cumsum(),
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


def _parse(
    file: BinaryIO, found: dict[str, Member], tokenizer: Tokenizer, chat: Chat
) -> tuple[tuple[Parsed, ...], bool, list[Member]]:
    """Segments of one sample, whether it is a loose pair, and its members: document or caption first, then images."""
    if "json" in found:
        document = json.loads(_content(file, found["json"]))
        if isinstance(document, dict) and "segments" in document:
            segments = parse_document(document, tokenizer, chat)
            names = [segment.file for segment in segments if isinstance(segment, Picture)]
            if missing := [name for name in names if name not in found]:
                raise ValueError(f"its json names {missing[0]!r}, which the shard does not hold. Write it again.")
            return segments, False, [found["json"], *(found[name] for name in names)]
    captions = [found[suffix] for suffix in CAPTION_SUFFIXES if suffix in found]
    images = [found[suffix] for suffix in IMAGE_SUFFIXES if suffix in found]
    if len(captions) != 1 or len(images) != 1:
        raise ValueError("it is neither a json with segments nor one caption (.txt) with one image (.png, .jpg).")
    caption = TextSegment(tokenizer.encode(_content(file, captions[0]).decode()))
    return (caption, Picture("")), True, [captions[0], images[0]]


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
    tokens = int(index.tokens.clip(min=0).sum())
    print(f"{len(index)} samples, {tokens} text tokens, {int(index.images.sum())} images")
