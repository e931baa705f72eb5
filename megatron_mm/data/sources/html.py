"""A folder of HTML pages (searched in depth) as interleaved documents: each page's text with its pictures in place.

Manuals make good ones, such as Debian's gimp-help-en: `apt-get download gimp-help-en && dpkg-deb -x gimp-help-en*.deb
d`, then `--src d/usr/share/gimp/2.0/help/en`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from megatron_mm.data.shards import Record
from megatron_mm.data.sources.base import Source, add_own_data_arguments, is_held_out

UNREAD = {"script", "style", "nav", "head", "header", "footer"}
BLOCKS = {"p", "div", "li", "dt", "dd", "tr", "br", "pre", "h1", "h2", "h3", "h4"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_own_data_arguments(parser, "folder of pages and pictures", "pages")
    parser.add_argument("--least-side", type=int, default=64, help="smaller pictures (icons) are left out; pixels")


def load(args: argparse.Namespace) -> Source:
    """
    Raises:
        ValueError: there are no pages.
    """
    pages = sorted(path for path in args.src.rglob("*") if path.suffix.lower() in (".html", ".htm"))
    if not pages:
        raise ValueError(f"--src {args.src} holds no pages (*.html, *.htm).")
    splits: dict[str, list[Path]] = {"train": [], "val": []}
    for page in pages:
        splits["val" if is_held_out(_key(args.src, page), args.held_out) else "train"].append(page)
    return Source(
        name=args.src.name,
        licence=args.licence,
        origin=str(args.src),
        attribution="",
        splits={name: _records(args.src, split, args.least_side) for name, split in splits.items()},
    )


def _records(folder: Path, pages: list[Path], least_side: int) -> Iterator[Record]:
    for page in pages:
        reader = _Page()
        reader.feed(page.read_text(errors="replace"))
        reader.close()
        segments: list[str | bytes] = []
        for text, source in reader.parts:
            if words := re.sub(r"\s+", " ", text).strip():
                segments.append(words)
            if source and (picture := _picture(page.parent / source, least_side)):
                segments.append(picture)
        if segments:
            yield Record(_key(folder, page), _joined(segments))


class _Page(HTMLParser):
    """`parts`: text, and the address of the picture behind it, in reading order; None behind the last text."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[tuple[str, str | None]] = [("", None)]
        self._unread: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in UNREAD:
            self._unread.append(tag)
        elif tag in BLOCKS:
            self.handle_data("\n")
        elif tag == "img" and not self._unread and (source := dict(attrs).get("src")):
            self.parts[-1] = (self.parts[-1][0], source)
            self.parts.append(("", None))

    def handle_endtag(self, tag: str) -> None:
        if self._unread and tag == self._unread[-1]:
            self._unread.pop()

    def handle_data(self, data: str) -> None:
        if not self._unread:
            self.parts[-1] = (self.parts[-1][0] + data, None)


def _picture(path: Path, least_side: int) -> bytes | None:
    """The file's bytes; None where it is no picture here, or a small one."""
    try:
        with Image.open(path) as image:
            return path.read_bytes() if min(image.size) >= least_side else None
    except (OSError, UnidentifiedImageError, ValueError):  # an address on the web, a missing file, another format
        return None


def _joined(segments: list[str | bytes]) -> tuple[str | bytes, ...]:
    """Texts that stand together, because a picture between them was left out, are one."""
    joined: list[str | bytes] = []
    for segment in segments:
        if joined and isinstance(segment, str) and isinstance(last := joined[-1], str):
            joined[-1] = f"{last} {segment}"
        else:
            joined.append(segment)
    return tuple(joined)


def _key(folder: Path, page: Path) -> str:
    return page.relative_to(folder).with_suffix("").as_posix().replace(".", "_")
