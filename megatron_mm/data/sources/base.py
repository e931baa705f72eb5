"""What a source of documents hands to `megatron_mm.data.prepare`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_mm.data.image_codec import PatchVQCodec
from megatron_mm.data.shards import Record
from megatron_mm.data.vae_codec import VAECodec


@dataclass(frozen=True)
class Source:
    """A corpus ready to be written: records of each split, where it comes from, and image tokenizers fitted to it."""

    name: str
    licence: str
    origin: str
    attribution: str
    splits: Mapping[str, Iterable[Record]]
    codebook: PatchVQCodec | None = None
    vae: VAECodec | None = None


def is_held_out(key: str, share: float) -> bool:
    """Whether a record of this key belongs to the val split, which gets `share` of all keys."""
    draw = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")
    return draw < share * 2**32
