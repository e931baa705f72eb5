"""Image codecs: a picture file on one side, the array the model reads on the other.

Pixels are float32 in [-1, 1]; a patch codebook turns each p x p patch into one code. The codebook is k-means on raw
patches: no match for a VQGAN, but it trains in seconds without any download and shows the discrete path end to end.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from megatron_mm.data.files import replacing
from megatron_mm.nn.patch import patchify, unpatchify

MODES = {1: "L", 3: "RGB"}
"""Pillow's mode for each number of channels."""

GREY = (127, 127, 127)
"""Padding of `square_pixels`."""

LEAST_SIDE = 14
"""A very long picture's short side is stretched to so many pixels (Janus's own)."""


class ImageCodec(Protocol):
    """`codes` is the number of image codes, 0 for a continuous codec; `limit` the largest magnitude that a continuous
    codec's arrays take, as good as always, None for codes; `pixels` the codec of the pictures on its other side."""

    @property
    def codes(self) -> int: ...
    @property
    def limit(self) -> float | None: ...
    @property
    def pixels(self) -> PixelCodec: ...

    def encode(self, image: Image.Image) -> np.ndarray:
        """float32 [C, H, W] in [-1, 1], or int64 codes [h, w]."""
        ...

    def decode(self, array: np.ndarray) -> np.ndarray:
        """uint8 [H, W, C], from what `encode` returns (or a model's imitation of it)."""
        ...


class PixelCodec:
    """Pixels, resized (Lanczos) where the size differs; transparency is laid on white.

    Raises:
        ValueError: `channels` is neither 1 nor 3.
    """

    codes = 0
    limit = 1.0

    def __init__(self, channels: int, height: int, width: int):
        if channels not in MODES:
            raise ValueError(f"model.image.channels={channels}: pixels have 1 (grey) or 3 (RGB) channels.")
        self.channels, self.height, self.width = channels, height, width

    @property
    def pixels(self) -> PixelCodec:
        return self

    def encode(self, image: Image.Image) -> np.ndarray:
        image = _opaque(image).convert(MODES[self.channels])
        if image.size != (self.width, self.height):
            image = image.resize((self.width, self.height), Image.Resampling.LANCZOS)
        return _to_array(image)

    def decode(self, array: np.ndarray) -> np.ndarray:
        pixels = np.clip(np.rint((array.transpose(1, 2, 0) + 1) * 127.5), 0, 255)
        return np.asarray(pixels, dtype=np.uint8)


def picture_of(image: np.ndarray) -> Image.Image:
    """uint8 [H, W, C] as a grey (C = 1) or RGB picture."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def square_pixels(image: Image.Image, side: int) -> np.ndarray:
    """A picture for a vision encoder, float32 [3, side, side] in [-1, 1], by Janus's rule: the longer side becomes
    `side` (bicubic), the shorter one keeps the proportions and is padded with grey on both ends."""
    image = _opaque(image).convert("RGB")
    scale = side / max(image.size)
    width, height = (max(round(length * scale), min(LEAST_SIDE, side)) for length in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side), GREY)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return _to_array(square)


def _opaque(image: Image.Image) -> Image.Image:
    """With transparency laid on white."""
    if not image.has_transparency_data:
        return image
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)


def _to_array(image: Image.Image) -> np.ndarray:
    """uint8 [H, W] or [H, W, C] as float32 [C, H, W] in [-1, 1]."""
    pixels = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, -1)
    pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return np.subtract(pixels / 127.5, 1, dtype=np.float32)


class PatchVQCodec:
    """Nearest entries of a codebook of patches.

    codebook float32 [K, C * patch * patch] in [-1, 1], each entry (channel, row, column)-major; images are
    channels x height x width pixels, so that codes are int64 [height / patch, width / patch].
    """

    limit = None

    def __init__(self, codebook: np.ndarray, channels: int, height: int, width: int, patch: int):
        if height % patch or width % patch:
            raise ValueError(f"Images of {height} x {width} pixels cannot be cut into patches of {patch} x {patch}.")
        self._pixels = PixelCodec(channels, height, width)
        self.codebook, self.patch = codebook, patch
        self.codes = len(codebook)
        self.grid = (height // patch, width // patch)

    @property
    def pixels(self) -> PixelCodec:
        return self._pixels

    def encode(self, image: Image.Image) -> np.ndarray:
        patches = patchify(self.pixels.encode(image), self.patch)
        # argmin of |c|^2 - 2 x.c, which is |x - c|^2 up to a constant of the patch
        distance = (self.codebook**2).sum(1) - 2 * patches @ self.codebook.T
        codes: np.ndarray = distance.argmin(1).astype(np.int64)
        return codes.reshape(self.grid)

    def decode(self, array: np.ndarray) -> np.ndarray:
        return self.pixels.decode(unpatchify(self.codebook[array.reshape(-1)], *self.grid, self.patch))

    def save(self, path: Path) -> None:
        """Write the codebook as npz, whole or not at all."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                codebook=self.codebook,
                channels=self.pixels.channels,
                height=self.pixels.height,
                width=self.pixels.width,
                patch=self.patch,
            )

    @classmethod
    def load(cls, path: Path) -> PatchVQCodec:
        """
        Raises:
            ValueError: the file is missing or no codebook.
        """
        if not path.is_file():
            raise ValueError(f"data.image_tokenizer={path} is no file. Use 'pixels' or the path of a codebook (*.npz).")
        try:
            with np.load(path) as saved:
                sizes = {name: int(saved[name]) for name in ("channels", "height", "width", "patch")}
                return cls(saved["codebook"], **sizes)
        except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"data.image_tokenizer={path} is not a patch codebook: {error}.") from error
