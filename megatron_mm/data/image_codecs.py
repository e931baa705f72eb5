"""The image codec that a configuration names."""

from __future__ import annotations

from pathlib import Path

from megatron_mm.config.model import ImageConfig
from megatron_mm.config.schema import DataConfig
from megatron_mm.data.image_codec import ImageCodec, PatchVQCodec, PixelCodec
from megatron_mm.data.vae_codec import VAECodec


def load_image_codec(data: DataConfig, image: ImageConfig) -> ImageCodec:
    """The codec that `data.image_tokenizer` names, checked against `model.image`.

    Raises:
        ValueError: there is no such file, or what it makes of an image is not of model.image's size.
    """
    name = data.image_tokenizer
    if name == "pixels":
        return PixelCodec(image.channels, image.height, image.width)
    if name.endswith(".pt"):
        vae = VAECodec.load(Path(name))
        _check(name, "latents", vae.grid, {"channels": image.channels, "height": image.height, "width": image.width})
        return vae
    codebook = PatchVQCodec.load(Path(name))
    _check(name, "codes", codebook.grid, {"height": image.height, "width": image.width})
    return codebook


def _check(name: str, what: str, made: tuple[int, ...], expected: dict[str, int]) -> None:
    if made != tuple(expected.values()):
        remedy = " ".join(f"model.image.{key}={size}" for key, size in zip(expected, made, strict=True))
        raise ValueError(
            f"data.image_tokenizer={name} makes {' x '.join(map(str, made))} {what} of an image, but the model expects "
            f"{' x '.join(map(str, expected.values()))}. Set {remedy}."
        )
