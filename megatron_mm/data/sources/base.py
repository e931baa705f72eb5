"""What a source of documents hands to `megatron_mm.data.prepare`."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

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


def add_own_data_arguments(parser: argparse.ArgumentParser, src: str, items: str) -> None:
    """Those of a user's own data: `src` says what --src is, `items` what the splits hold."""
    parser.add_argument("--src", type=Path, required=True, help=src)
    parser.add_argument("--held-out", type=float, default=0.02, help=f"share of {items} in the val split")
    parser.add_argument("--licence", default="unknown", help="written into dataset.json")


def is_held_out(key: str, share: float) -> bool:
    """Whether a record of this key belongs to the val split, which gets `share` of all keys."""
    draw = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")
    return draw < share * 2**32
