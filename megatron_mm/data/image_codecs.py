"""The image codec that a configuration names."""

from __future__ import annotations

from pathlib import Path

from megatron_mm.config.compose import ModelConfig
from megatron_mm.config.model import ImageConfig, PatchedConfig
from megatron_mm.config.schema import DataConfig
from megatron_mm.data.image_codec import ImageCodec, PatchVQCodec, PixelCodec
from megatron_mm.data.image_transform import ImageTransform, NativeTransform
from megatron_mm.data.vae_codec import VAECodec


def load_image_codec(data: DataConfig, model: ModelConfig) -> ImageCodec:
    """The codec that `data.image_tokenizer` names, checked against `model.image`.

    Raises:
        ValueError: there is no such file, or what it makes of an image is not of model.image's size.
    """
    name, image = data.image_tokenizer, model.image
    if name == "pixels":
        return PixelCodec(image.channels, _transform(model, image.height, image.width))
    if name.endswith(".pt"):
        vae = VAECodec.load(Path(name))
        shape = vae.shape
        fitted = vae.fitted(_transform(model, shape.height, shape.width, shape.downsampling))
        expected = {"channels": image.channels}
        if image.transform == "crop":
            expected |= {"height": image.height, "width": image.width}
        _check(name, "latents", (shape.latents, *fitted.grid(shape.height, shape.width))[: len(expected)], expected)
        return fitted
    codebook = PatchVQCodec.load(Path(name), image.resample)
    _check(name, "codes", (codebook.rows, codebook.columns), {"height": image.height, "width": image.width})
    return codebook


def _transform(model: ModelConfig, height: int, width: int, downsampling: int = 1) -> ImageTransform:
    """To `height` x `width` pixels, or to what the picture allows, where `downsampling` pixels of a side are one number
    of the model's."""
    image: ImageConfig = model.image
    if image.transform == "crop" or not isinstance(model, PatchedConfig):
        return ImageTransform(height, width, image.resample)
    most = image.max_pixels or height * width
    return NativeTransform(height, width, image.resample, downsampling * model.patch_size, most)


def _check(name: str, what: str, made: tuple[int, ...], expected: dict[str, int]) -> None:
    if made != tuple(expected.values()):
        remedy = " ".join(f"model.image.{key}={size}" for key, size in zip(expected, made, strict=True))
        raise ValueError(
            f"data.image_tokenizer={name} makes {' x '.join(map(str, made))} {what} of an image, but the model expects "
            f"{' x '.join(map(str, expected.values()))}. Set {remedy}."
        )
