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
from megatron_mm.data.image_transform import ImageTransform, opaque, padded_square
from megatron_mm.nn.patch import patchify, unpatchify

MODES = {1: "L", 3: "RGB"}
"""Pillow's mode for each number of channels."""


class ImageCodec(Protocol):
    """`codes` is the number of image codes, 0 for a continuous codec; `limit` the largest magnitude that a continuous
    codec's arrays take, as good as always, None for codes; `pixels` the codec of the pictures on its other side."""

    @property
    def codes(self) -> int: ...
    @property
    def limit(self) -> float | None: ...
    @property
    def pixels(self) -> PixelCodec: ...

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of what `encode` makes of a picture of so many pixels."""
        ...

    def encode(self, image: Image.Image) -> np.ndarray:
        """float32 [C, H, W] in [-1, 1], or int64 codes [h, w]."""
        ...

    def decode(self, array: np.ndarray) -> np.ndarray:
        """uint8 [H, W, C], from what `encode` returns (or a model's imitation of it)."""
        ...


class PixelCodec:
    """Pixels, fitted by `transform`; transparency is laid on white.

    Raises:
        ValueError: `channels` is neither 1 nor 3.
    """

    codes = 0
    limit = 1.0

    def __init__(self, channels: int, transform: ImageTransform):
        if channels not in MODES:
            raise ValueError(f"model.image.channels={channels}: pixels have 1 (grey) or 3 (RGB) channels.")
        self.channels, self.transform = channels, transform

    @property
    def pixels(self) -> PixelCodec:
        return self

    def encode(self, image: Image.Image) -> np.ndarray:
        return _to_array(self.transform(opaque(image, MODES[self.channels])))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self.transform.size(height, width)

    def decode(self, array: np.ndarray) -> np.ndarray:
        pixels = np.clip(np.rint((array.transpose(1, 2, 0) + 1) * 127.5), 0, 255)
        return np.asarray(pixels, dtype=np.uint8)


def picture_of(image: np.ndarray) -> Image.Image:
    """uint8 [H, W, C] as a grey (C = 1) or RGB picture."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def encoder_pixels(image: Image.Image, side: int) -> np.ndarray:
    """A picture as a vision encoder reads it: float32 [3, side, side] in [-1, 1], padded to a square."""
    return _to_array(padded_square(opaque(image, "RGB"), side))


def _to_array(image: Image.Image) -> np.ndarray:
    """uint8 [H, W] or [H, W, C] as float32 [C, H, W] in [-1, 1]."""
    pixels = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, -1)
    pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return np.subtract(pixels / 127.5, 1, dtype=np.float32)


class PatchVQCodec:
    """Nearest entries of a codebook of patches.

    codebook float32 [K, C * patch * patch] in [-1, 1], each entry (channel, row, column)-major; pictures come to be of
    `transform`'s one size, so that codes are int64 [height / patch, width / patch].
    """

    limit = None

    def __init__(self, codebook: np.ndarray, channels: int, transform: ImageTransform, patch: int):
        if transform.height % patch or transform.width % patch:
            raise ValueError(
                f"Images of {transform.height} x {transform.width} pixels cannot be cut into patches of {patch} x "
                f"{patch}."
            )
        self._pixels = PixelCodec(channels, transform)
        self.codebook, self.patch = codebook, patch
        self.codes = len(codebook)
        self.rows, self.columns = transform.height // patch, transform.width // patch

    @property
    def pixels(self) -> PixelCodec:
        return self._pixels

    def encode(self, image: Image.Image) -> np.ndarray:
        patches = patchify(self.pixels.encode(image), self.patch)
        # argmin of |c|^2 - 2 x.c, which is |x - c|^2 up to a constant of the patch
        distance = (self.codebook**2).sum(1) - 2 * patches @ self.codebook.T
        codes: np.ndarray = distance.argmin(1).astype(np.int64)
        return codes.reshape(self.rows, self.columns)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self.rows, self.columns

    def decode(self, array: np.ndarray) -> np.ndarray:
        return self.pixels.decode(unpatchify(self.codebook[array.reshape(-1)], self.rows, self.columns, self.patch))

    def save(self, path: Path) -> None:
        """Write the codebook as npz, whole or not at all."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                codebook=self.codebook,
                channels=self.pixels.channels,
                height=self.pixels.transform.height,
                width=self.pixels.transform.width,
                patch=self.patch,
            )

    @classmethod
    def load(cls, path: Path, resample: str = "bicubic") -> PatchVQCodec:
        """
        Args:
            resample: as in `ImageTransform`.

        Raises:
            ValueError: the file is missing or no codebook.
        """
        if not path.is_file():
            raise ValueError(f"data.image_tokenizer={path} is no file. Use 'pixels' or the path of a codebook (*.npz).")
        try:
            with np.load(path) as saved:
                channels, height, width, patch = (int(saved[name]) for name in ("channels", "height", "width", "patch"))
                return cls(saved["codebook"], channels, ImageTransform(height, width, resample), patch)
        except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"data.image_tokenizer={path} is not a patch codebook: {error}.") from error
