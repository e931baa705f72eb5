"""Writes `torchvision.npz`: random pictures as torchvision's Resize and CenterCrop fit them to 16 x 16 pixels.

These two, bicubic, are the transform of the official code of Show-o, Show-o2 and MMaDA. torchvision is built against
one torch alone, CUDA's libraries included, so tests compare with the file. To write it anew:

    python3.11 -m venv ../torchvision-env
    ../torchvision-env/bin/pip install torch==2.13.0 torchvision==0.28.0 numpy==1.26.4 pillow==13.0.0
    ../torchvision-env/bin/python tests/oracles/make_transforms.py

Layout: `picture H W` uint8 [H, W, 3], and `bicubic H W`, `lanczos H W` uint8 [16, 16, 3].
"""

from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

SIZES = [(16, 16), (37, 23), (20, 61), (9, 11), (16, 40), (90, 17)]


def main() -> None:
    generator, arrays = np.random.default_rng(0), {}
    for height, width in SIZES:
        picture = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        arrays[f"picture {height} {width}"] = picture
        for resample in ("bicubic", "lanczos"):
            fit = Compose([Resize(16, InterpolationMode(resample)), CenterCrop(16)])
            arrays[f"{resample} {height} {width}"] = np.asarray(fit(Image.fromarray(picture)))
    np.savez_compressed(Path(__file__).with_name("torchvision.npz"), **arrays)


if __name__ == "__main__":
    main()
