"""A sheet of pictures: sections with a heading, each with rows of framed images and texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megatron_mm.data.image_codec import picture_of

WIDTH, MARGIN, LABEL, GAP = 1140, 24, 100, 10
"""Pixels: the sheet, its border, the column of prompts, the space between tiles."""
TILE = 84
"""Smallest height of an image on the sheet; smaller ones are enlarged by a whole factor."""
INK, FAINT, WRONG, FRAME = "#1f2328", "#656d76", "#cf222e", "#d0d7de"


@dataclass(frozen=True)
class Tile:
    """An image uint8 [H, W, C] (C is 1 or 3), what stands under it, and whether it is right."""

    image: np.ndarray
    text: str = ""
    right: bool = True


@dataclass(frozen=True)
class Section:
    """A heading, a faint line under it, and rows: what stands at the left of each, and what follows in order."""

    title: str
    note: str
    rows: Sequence[tuple[str, Sequence[Tile | str]]]


def draw_sheet(sections: Sequence[Section], path: Path) -> None:
    """Writes the sections one below the other, `WIDTH` pixels wide; what does not fit into a row goes on below."""
    strips = [strip for section in sections for strip in _section(section)]
    sheet = Image.new("RGB", (WIDTH, sum(strip.height for strip in strips) + 2 * MARGIN), "white")
    top = MARGIN
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    sheet.save(path)


def _section(section: Section) -> Iterator[Image.Image]:
    heading = Image.new("RGB", (WIDTH, 68), "white")
    draw = ImageDraw.Draw(heading)
    draw.text((MARGIN, 4), section.title, INK, _font(22, bold=True))
    draw.text((MARGIN, 36), section.note, FAINT, _font(15))
    yield heading
    for label, cells in section.rows:
        for i, line in enumerate(_lines([_cell(cell) for cell in cells], LABEL if label else 0)):
            yield _row(label if i == 0 else "", line, LABEL if label else 0)
    yield Image.new("RGB", (WIDTH, MARGIN), "white")


def _lines(cells: list[Image.Image], indent: int) -> Iterator[list[Image.Image]]:
    """The cells cut into lines that fit."""
    line: list[Image.Image] = []
    for cell in cells:
        if line and indent + 2 * MARGIN + sum(c.width + GAP for c in line) + cell.width > WIDTH:
            yield line
            line = []
        line.append(cell)
    if line:
        yield line


def _row(label: str, cells: list[Image.Image], indent: int) -> Image.Image:
    height = max(cell.height for cell in cells)
    row = Image.new("RGB", (WIDTH, height + GAP), "white")
    left = MARGIN + indent
    ImageDraw.Draw(row).text((MARGIN, height // 2), label, INK, _font(16), anchor="lm")
    for cell in cells:
        row.paste(cell, (left, (height - cell.height) // 2))
        left += cell.width + GAP
    return row


def _cell(cell: Tile | str) -> Image.Image:
    return _text(cell) if isinstance(cell, str) else _tile(cell)


def _text(text: str) -> Image.Image:
    """A running text between images."""
    font = _font(20)
    shown = _printable(text)
    picture = Image.new("RGB", (int(font.getlength(shown)) + 2 * GAP, TILE), "white")
    ImageDraw.Draw(picture).text((GAP, TILE // 2), shown, INK, font, anchor="lm")
    return picture


def _tile(tile: Tile) -> Image.Image:
    picture = picture_of(tile.image).convert("RGB")
    scale = max(1, round(TILE / picture.height))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    framed = Image.new("RGB", (picture.width + 6, picture.height + 6 + 22 * bool(tile.text)), "white")
    draw = ImageDraw.Draw(framed)
    box = (0, 0, picture.width + 5, picture.height + 5)
    draw.rectangle(box, outline=FRAME if tile.right else WRONG, width=1 if tile.right else 3)
    framed.paste(picture, (3, 3))
    text, font = _printable(tile.text), _font(14)
    while font.getlength(text) > framed.width:
        text = text[:-2] + "…"
    draw.text((framed.width // 2, framed.height - 9), text, INK if tile.right else WRONG, font, anchor="mm")
    return framed


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)
