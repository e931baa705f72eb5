"""A folder of pictures (searched in depth), each with its caption in a text file of the same name: cat.jpg, cat.txt."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from megatron_mm.data.index import IMAGE_SUFFIXES
from megatron_mm.data.shards import Record
from megatron_mm.data.sources.base import Source, add_own_data_arguments, is_held_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_own_data_arguments(parser, "folder of pictures and captions", "pictures")


def load(args: argparse.Namespace) -> Source:
    """
    Raises:
        ValueError: no pictures, or one without a caption.
    """
    pictures = sorted(path for path in args.src.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES)
    if not pictures:
        raise ValueError(f"--src {args.src} holds no pictures ({', '.join(IMAGE_SUFFIXES)}).")
    splits: dict[str, list[Path]] = {"train": [], "val": []}
    for picture in pictures:
        if not picture.with_suffix(".txt").is_file():
            raise ValueError(f"{picture} has no caption: write it to {picture.with_suffix('.txt')}.")
        splits["val" if is_held_out(_key(args.src, picture), args.held_out) else "train"].append(picture)
    return Source(
        name=args.src.name,
        licence=args.licence,
        origin=str(args.src),
        attribution="",
        splits={name: _records(args.src, split) for name, split in splits.items()},
    )


def _records(folder: Path, pictures: list[Path]) -> Iterator[Record]:
    for picture in pictures:
        caption = picture.with_suffix(".txt").read_text().strip()
        yield Record(_key(folder, picture), (caption, picture.read_bytes()))


def _key(folder: Path, picture: Path) -> str:
    return picture.relative_to(folder).with_suffix("").as_posix().replace(".", "_")
