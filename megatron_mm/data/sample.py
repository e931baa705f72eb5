"""Reads single samples out of shards by their place in the index: one range read each, whatever the shard's size."""

from __future__ import annotations

import functools
import io
import json
import os
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_mm.data.chat import PLAIN_CHAT, Chat
from megatron_mm.data.document import Picture, parse_document
from megatron_mm.data.image_codec import ImageCodec, encoder_pixels
from megatron_mm.data.index import Index
from megatron_mm.data.pieces import Pieces
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.types import ImageSegment, Sample, Segment, TextSegment

OPEN_SHARDS = 256
"""File descriptors a reader keeps open."""
NOT_READ = ImageSegment(np.zeros((0, 0), np.int64))
"""In place of a picture that a piece of a document does not have."""


class SampleReader:
    """Random access to the samples of an index. Safe to share between threads. `encoder_side` as in `read_image`.

    tasks: (first uid, task) of each source in the index, in order.
    """

    def __init__(
        self,
        index: Index,
        tokenizer: Tokenizer,
        codec: ImageCodec,
        encoder_side: int | None = None,
        tasks: Sequence[tuple[int, str]] = ((0, "auto"),),
        chat: Chat = PLAIN_CHAT,
        pieces: Pieces | None = None,
    ):
        self.index, self.tokenizer, self.codec, self.chat = index, tokenizer, codec, chat
        self.encoder_side = encoder_side
        self._firsts, self._tasks = zip(*tasks, strict=True)
        self._pieces = pieces
        self._open = functools.lru_cache(maxsize=OPEN_SHARDS)(_Shard)

    def read(self, uid: int) -> Sample:
        """Document `uid`, tokenised and encoded: a sample of the index, or a piece of one.

        Raises:
            ValueError: the shard changed since it was indexed, or an image cannot be decoded.
        """
        return self._pieces.read(uid, self._read) if self._pieces else self._read(uid)

    def _read(self, uid: int, wanted: Collection[int] | None = None) -> Sample:
        """Pictures among the segments are left empty, unless they are `wanted` or all are (None)."""
        index = self.index
        members = slice(index.starts[uid], index.starts[uid + 1])
        offsets, sizes = index.offsets[members].tolist(), index.sizes[members].tolist()
        first, end = min(offsets), max(offset + size for offset, size in zip(offsets, sizes, strict=True))
        try:
            block = self._open(index.path(uid)).read(first, end - first)
            head, *images = (block[o - first : o - first + n] for o, n in zip(offsets, sizes, strict=True))
            segments, meta = self._segments(head, images, bool(index.paired[uid]), wanted)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{index.path(uid)}, sample {index.key(uid)!r}, cannot be read: {error}") from error
        task = self._tasks[bisect_right(self._firsts, uid) - 1]
        return Sample(uid, index.key(uid), segments, meta, task)

    def _segments(
        self, head: bytes, images: list[bytes], paired: bool, wanted: Collection[int] | None
    ) -> tuple[tuple[Segment, ...], dict]:
        if paired:
            return (TextSegment(self.tokenizer.encode(head.decode())), self._image(images[0], True)), {}
        document, pictures = json.loads(head), iter(images)
        parsed = parse_document(document, self.tokenizer, self.chat)
        segments: list[Segment] = []
        for number, segment in enumerate(parsed):
            if isinstance(segment, Picture):
                content, seen = next(pictures), wanted is None or number in wanted
                segments.append(self._image(content, segment.loss) if seen else NOT_READ)
            else:
                segments.append(segment)
        return tuple(segments), document.get("meta", {})

    def _image(self, content: bytes, loss: bool) -> ImageSegment:
        return replace(read_image(Image.open(io.BytesIO(content)), self.codec, self.encoder_side), loss=loss)


def read_image(image: Image.Image, codec: ImageCodec, encoder_side: int | None) -> ImageSegment:
    """A picture as the model reads it; `encoder_side`: pixels of a side for its vision encoder, if it has one."""
    return ImageSegment(codec.encode(image), encoder_pixels(image, encoder_side) if encoder_side else None)


class _Shard:
    """An open shard. Closed by its last reference, so that the cache can drop it while another thread reads."""

    def __init__(self, path: Path):
        self._fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`; `pread` leaves no file position for threads to share."""
        content = os.pread(self._fd, size, offset)
        if len(content) != size:
            raise ValueError("the shard is shorter than its index says; it changed during the run.")
        return content
