"""What a source of documents hands to `megatron_mm.data.prepare`."""

from __future__ import annotations

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
