"""Writes webdataset shards: plain tar files that any webdataset reader opens.

A sample is KEY.json, as `megatron_mm.data.document` reads it, with its images KEY.0.png, KEY.1.png, ... Shards carry no
timestamps: equal records give equal bytes.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from webdataset import ShardWriter


@dataclass(frozen=True)
class Record:
    """A document to write. `segments` in reading order: text (str), a picture, or an encoded picture file (bytes);
    `roles` of a conversation: who says each of them."""

    key: str
    segments: tuple[str | bytes | Image.Image, ...]
    meta: dict = field(default_factory=dict)
    roles: tuple[str, ...] = ()


def write_shards(folder: Path, records: Iterable[Record], samples_per_shard: int = 10000) -> int:
    """Write `shard-000000.tar`, ... into `folder`; each appears under its name only when it is complete.

    Returns:
        The number of records written.
    Raises:
        ValueError: the folder holds shards already, or a key contains a dot (webdataset ends a key at the first dot).
    """
    if any(folder.glob("*.tar")):
        raise ValueError(f"{folder} already holds shards. Remove them or write to another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    # Not a context manager: leaving one on an error would close, and so publish, the unfinished shard.
    writer = ShardWriter(
        str(folder).replace("%", "%%") + "/shard-%06d.tar.tmp",
        maxcount=samples_per_shard,
        post=lambda name: os.replace(name, name.removesuffix(".tmp")),
        verbose=0,
        encoder=False,
        mtime=0,
        format="PAX_FORMAT",
    )
    for record in records:
        writer.write(_members(record))
    written: int = writer.total
    writer.close()
    return written


def _members(record: Record) -> dict:
    """The record as webdataset's dict of member suffix -> bytes."""
    if "." in record.key:
        raise ValueError(f"The key {record.key!r} contains a dot, where webdataset would end it. Replace the dot.")
    members: dict[str, bytes] = {}
    segments = []
    for segment in record.segments:
        if isinstance(segment, str):
            segments.append({"type": "text", "text": segment})
        else:
            content, suffix = _picture_file(segment)
            name = f"{len(members)}.{suffix}"
            members[name] = content
            segments.append({"type": "image", "file": name})
    for entry, role in zip(segments, record.roles, strict=bool(record.roles)):
        entry["role"] = role
    document = {"segments": segments, "meta": record.meta}
    return {"__key__": record.key, "json": json.dumps(document, ensure_ascii=False).encode(), **members}


def _picture_file(picture: bytes | Image.Image) -> tuple[bytes, str]:
    """An encoded picture and the suffix of its format."""
    if isinstance(picture, bytes):
        return picture, str(Image.open(io.BytesIO(picture)).format).lower()
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue(), "png"
