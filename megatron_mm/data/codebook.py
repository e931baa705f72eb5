"""Fits the patch codebook of `PatchVQCodec`. Apart from the codec because only preparation needs scikit-learn."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image
from sklearn.cluster import MiniBatchKMeans

from megatron_mm.data.image_codec import PatchVQCodec
from megatron_mm.data.image_transform import ImageTransform
from megatron_mm.nn.patch import patchify


def fit_patch_codebook(
    images: Iterable[Image.Image], codes: int, patch: int, channels: int, height: int, width: int, seed: int
) -> PatchVQCodec:
    """A codec whose `codes` entries (2 or more) are the images' commonest patch and k-means centres of the others.

    All patches are held in memory.

    Raises:
        ValueError: the patch does not divide the image, or there are fewer different patches than codes.
    """
    transform = ImageTransform(height, width)
    codec = PatchVQCodec(np.zeros((codes, channels * patch * patch), np.float32), channels, transform, patch)
    # Each different patch counts once, or the background would take most centres; the commonest is the background
    # itself, and stays an exact entry.
    patches, counts = np.unique(
        np.concatenate([patchify(codec.pixels.encode(image), patch) for image in images]), axis=0, return_counts=True
    )
    if len(patches) < codes:
        raise ValueError(f"The images have only {len(patches)} different patches, fewer than the {codes} codes wanted.")
    commonest = counts.argmax()
    others = np.delete(patches, commonest, axis=0)
    kmeans = MiniBatchKMeans(codes - 1, batch_size=4096, n_init=1, max_iter=20, random_state=seed).fit(others)
    codec.codebook = np.concatenate([patches[commonest, None], kmeans.cluster_centers_]).astype(np.float32)
    return codec
