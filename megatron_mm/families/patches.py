"""What families share whose images are patch vectors of latents, or of the pixels that a vision encoder reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_mm.config.flow import ShowoFlowConfig
from megatron_mm.config.model import ImageConfig, TransfusionConfig
from megatron_mm.data.shape import ImagePart
from megatron_mm.documents.spans import Block, Items, Role, Span, length_of
from megatron_mm.types import ImageSegment, Sample


class PatchGrid:
    """Images of `config.image` cut into patches of `config.patch_size`."""

    config: TransfusionConfig | ShowoFlowConfig

    @property
    def patch_dim(self) -> int:
        """P: numbers in a patch vector."""
        return self.config.image.channels * self.config.patch_size**2

    def grid(self, part: ImagePart | ImageConfig) -> tuple[int, int]:
        """Rows and columns of an image's patches."""
        return part.height // self.config.patch_size, part.width // self.config.patch_size

    def latents(self, sample: Sample, segment: ImageSegment) -> np.ndarray:
        """An image's latents (or pixels), float32 [C, H, W].

        Raises:
            ValueError: it is not as configured.
        """
        image, shape, p = self.config.image, segment.data.shape, self.config.patch_size
        native = image.transform == "native"
        fits = not any(side % p for side in shape[1:]) if native else shape[1:] == (image.height, image.width)
        if len(shape) != 3 or shape[0] != image.channels or not fits:
            size = f"multiples of {p}" if native else f"{image.height}, {image.width}"
            raise ValueError(
                f"Sample {sample.key!r} has an image of shape {list(shape)}, but model.image says "
                f"[{image.channels}, {size}]. Change model.image or the shards."
            )
        return segment.data


def places(grid: tuple[int, int]) -> np.ndarray:
    """Row and column of every patch of an image, int32 [h * w, 2]."""
    return np.indices(grid, dtype=np.int32).reshape(2, -1).T


def drawn_in_place(clean: Sequence[Span], reading: str, copied: bool) -> Items:
    """A block that ends in an image, of whose `clean` form these are the spans, noised and predicted in place. If
    `copied`, it is hidden from what follows, which sees the clean one behind it, at the same positions."""
    *lead, image = clean
    drawn = Block((*lead, replace(image, role=Role.IN_PLACE, term="image", reading=reading)), hidden=copied)
    first, *rest = clean
    return [drawn, Block((replace(first, rewind=length_of(clean)), *rest))] if copied else [drawn]


def pixels_of(sample: Sample, segment: ImageSegment, side: int) -> np.ndarray:
    """What a vision encoder reads of an image, float32 [3, side, side].

    Raises:
        ValueError: it has no pixels, or of another size.
    """
    if segment.pixels is None or segment.pixels.shape != (3, side, side):
        found = None if segment.pixels is None else list(segment.pixels.shape)
        raise ValueError(
            f"Sample {sample.key!r} has an image with pixels {found}, but model.encoder.image_size={side} reads "
            f"[3, {side}, {side}]. Change model.encoder.image_size or what fills ImageSegment.pixels."
        )
    return segment.pixels
