"""What families share whose images are patch vectors of latents or pixels."""

from __future__ import annotations

import numpy as np

from megatron_mm.config.flow import ShowoFlowConfig
from megatron_mm.config.model import ImageConfig, TransfusionConfig
from megatron_mm.types import ImageSegment, Sample, Segment


class PatchGrid:
    """Images of `config.image` cut into patches of `config.patch_size`."""

    config: TransfusionConfig | ShowoFlowConfig

    @property
    def patch_dim(self) -> int:
        """P: numbers in a patch vector."""
        return self.config.image.channels * self.config.patch_size**2

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an image."""
        return self.config.image.height // self.config.patch_size, self.config.image.width // self.config.patch_size


def images_of(sample: Sample, segments: tuple[Segment, ...], image: ImageConfig) -> list[np.ndarray]:
    """The images among `segments`, each float32 [C, H, W].

    Raises:
        ValueError: one is not of the configured size.
    """
    found = [segment.data for segment in segments if isinstance(segment, ImageSegment)]
    for data in found:
        if data.shape != (image.channels, image.height, image.width):
            raise ValueError(
                f"Sample {sample.key!r} has an image of shape {list(data.shape)}, but model.image says "
                f"[{image.channels}, {image.height}, {image.width}]. Change model.image or the shards."
            )
    return found


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
