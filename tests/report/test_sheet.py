"""The sheet has the size and the marks that its sections ask for."""

import numpy as np
import pytest
from PIL import Image

from megatron_mm.report.sheet import GAP, MARGIN, TILE, WIDTH, Section, Tile, draw_sheet

FRAMED = TILE + 6 + GAP
"""Height of a row of images without text."""
HEADING = 68


def grey(value: int, height: int = 28, width: int = 28, channels: int = 1) -> np.ndarray:
    return np.full((height, width, channels), value, dtype=np.uint8)


def drawn(tmp_path, *sections: Section) -> np.ndarray:
    draw_sheet(sections, tmp_path / "sheet.png")
    return np.asarray(Image.open(tmp_path / "sheet.png"))


def test_size(tmp_path):
    rows = [("a one", [Tile(grey(0))] * 10), ("a two", [Tile(grey(0))] * 3)]
    sheet = drawn(tmp_path, Section("Text to image", "note", rows), Section("None", "", []))
    assert sheet.shape == (2 * MARGIN + 2 * (HEADING + MARGIN) + 2 * FRAMED, WIDTH, 3)


@pytest.mark.parametrize(("count", "lines"), [(10, 1), (11, 1), (12, 2), (22, 2), (23, 3)])
def test_a_row_goes_on_below(tmp_path, count, lines):
    sheet = drawn(tmp_path, Section("", "", [("", [Tile(grey(0))] * count)]))
    assert len(sheet) == 3 * MARGIN + HEADING + lines * FRAMED


def test_images_are_enlarged_pixel_by_pixel(tmp_path):
    image = grey(0)
    image[5, 7] = 200
    sheet = drawn(tmp_path, Section("", "", [("", [Tile(image)])]))
    top, left = MARGIN + HEADING + 3, MARGIN + 3
    shown = sheet[top : top + TILE, left : left + TILE]
    assert np.array_equal(shown, np.kron(image[..., 0], np.ones((3, 3), np.uint8))[..., None].repeat(3, 2))


def test_colour_and_large_images_keep_their_size(tmp_path):
    image = grey(0, 200, 100, channels=3)
    image[..., 1] = 130
    sheet = drawn(tmp_path, Section("", "", [("", [Tile(image)])]))
    top, left = MARGIN + HEADING + 3, MARGIN + 3
    assert (sheet[top : top + 200, left : left + 100] == [0, 130, 0]).all()


def test_only_wrong_ones_are_red(tmp_path):
    def reds(right):
        sheet = drawn(tmp_path, Section("t", "n", [("", [Tile(grey(0), "an eight", right)])]))
        return int((sheet == [0xCF, 0x22, 0x2E]).all(-1).sum())

    assert reds(True) == 0 and reds(False) > 4 * TILE


@pytest.mark.parametrize("text", ["", "x" * 500, "\x00\n\ufffd", "日本"])
def test_any_generated_text_can_be_drawn(tmp_path, text):
    sheet = drawn(tmp_path, Section("", "", [("", [Tile(grey(0), text, False), text])]))
    assert sheet.shape[1] == WIDTH
