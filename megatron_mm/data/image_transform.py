"""How a picture of any size becomes one that a model reads, keeping its proportions. Training, prompts and vision
encoders share it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image

GREY = (127, 127, 127)
"""Padding of `padded_square`."""
LEAST_SIDE = 14
"""A very long picture's short side is stretched to so many pixels (Janus's own)."""


@dataclass(frozen=True)
class ImageTransform:
    """Scales a picture until it just covers the wanted size, and cuts out its middle.

    height, width: that size, in pixels. resample: `bicubic` or `lanczos`, the filter of scaling.
    """

    height: int
    width: int
    resample: str = "bicubic"

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that a picture of `height` x `width` pixels comes to have."""
        return self.height, self.width

    def __call__(self, image: Image.Image) -> Image.Image:
        return covering(image, *self.size(image.height, image.width), Image.Resampling[self.resample.upper()])


@dataclass(frozen=True)
class NativeTransform(ImageTransform):
    """The same to a size of the picture's own: its sides, rounded to multiples of `multiple` pixels, or those of the
    largest such picture of its proportions that has no more than `max_pixels` (Qwen2-VL, arXiv 2409.12191)."""

    multiple: int = 1
    max_pixels: int = 0

    def size(self, height: int, width: int) -> tuple[int, int]:
        step, most = self.multiple, self.max_pixels // self.multiple**2
        rows, columns = (max(round(side / step), 1) for side in (height, width))
        if rows * columns > most:
            shrunk = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(math.floor(side / shrunk / step), 1) for side in (height, width))
            rows = min(rows, most)  # of a picture as thin as a line
            columns = min(columns, most // rows)
        return rows * step, columns * step


def covering(image: Image.Image, height: int, width: int, resample: Image.Resampling) -> Image.Image:
    """The middle `height` x `width` pixels of a picture, scaled until it just covers them: torchvision's Resize of the
    short side, then its CenterCrop, where they are a square."""
    if image.width * height < image.height * width:
        scaled = width, image.height * width // image.width
    else:
        scaled = image.width * height // image.height, height
    if image.size != scaled:
        image = image.resize(scaled, resample)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height)) if image.size != (width, height) else image


def padded_square(image: Image.Image, side: int) -> Image.Image:
    """An RGB picture for a vision encoder, by Janus's rule: the longer side becomes `side` (bicubic), the shorter one
    keeps the proportions and is padded with grey on both ends."""
    scale = side / max(image.size)
    width, height = (max(round(length * scale), min(LEAST_SIDE, side)) for length in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side), GREY)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def opaque(image: Image.Image, mode: str) -> Image.Image:
    """In Pillow's `mode`, with transparency laid on white."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert(mode)
