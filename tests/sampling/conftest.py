"""The tiny image tokenizer of `tiny_runs`, once a session."""

from pathlib import Path

import numpy as np
import pytest

from megatron_mm.data.image_codec import PatchVQCodec
from megatron_mm.data.image_transform import ImageTransform


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("codebook")
    codebook = np.random.default_rng(0).uniform(-1, 1, (16, 4)).astype(np.float32)
    PatchVQCodec(codebook, 1, ImageTransform(8, 8), 2).save(folder / "codebook.npz")
    return folder
