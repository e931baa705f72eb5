"""Transforms against torchvision's and transformers' own, and sizes that keep a picture's proportions."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from megatron_mm.config.compose import ConfigError, compose
from megatron_mm.config.model import ImageConfig, TransfusionConfig
from megatron_mm.config.schema import DataConfig
from megatron_mm.config.validate import validate
from megatron_mm.data.image_codec import PixelCodec
from megatron_mm.data.image_codecs import load_image_codec
from megatron_mm.data.image_transform import ImageTransform, NativeTransform
from megatron_mm.data.vae_codec import VAECodec, VAEShape
from megatron_mm.nn.vae import ConvVAE

SIZES = [(16, 16), (37, 23), (20, 61), (9, 11), (16, 40), (90, 17)]


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("resample", ["bicubic", "lanczos"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_crop_is_torchvisions_resize_and_centre_crop(height, width, resample):
    """As the official code of Show-o, Show-o2 and MMaDA has it (bicubic); see `oracles/make_transforms.py`."""
    with np.load(Path(__file__).parents[1] / "oracles/torchvision.npz") as oracle:
        given, theirs = (oracle[f"{name} {height} {width}"] for name in ("picture", resample))
    assert np.array_equal(ImageTransform(16, 16, resample)(Image.fromarray(given)), theirs)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (37, 23), (20, 61), (16, 40)])
def test_crop_by_lanczos_is_transformers_chameleon_processor(height, width):
    """Pictures whose middle torchvision rounds to as transformers does."""
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    plain = {"do_rescale": False, "do_normalize": False}
    (theirs,) = ChameleonImageProcessorPil(**size, **plain)(picture(height, width), return_tensors="np")["pixel_values"]
    ours = np.asarray(ImageTransform(16, 16, "lanczos")(picture(height, width))).transpose(2, 0, 1)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(("height", "width"), [(37, 23), (20, 61), (8, 8), (100, 40), (300, 170), (41, 160)])
def test_native_sizes_are_qwen2_vls(height, width):
    """Its `smart_resize`, within proportions of 10: what it says of thinner pictures may exceed max_pixels."""
    ours = NativeTransform(16, 16, multiple=4, max_pixels=1600).size(height, width)
    assert ours == smart_resize(height, width, factor=4, min_pixels=16, max_pixels=1600)


def test_native_sizes_stay_within_their_bounds():
    rng = np.random.default_rng(0)
    for height, width in [(1, 5000), (5000, 1), (1, 1), *rng.integers(1, 900, (300, 2)).tolist()]:
        transform = NativeTransform(16, 16, multiple=8, max_pixels=4096)
        h, w = transform.size(height, width)
        assert h % 8 == w % 8 == 0 and 0 < h * w <= 4096, (height, width)
        assert transform.size(h, w) == (h, w)


def test_native_keeps_what_is_in_the_picture_in_proportion():
    """A circle stays one, whatever it is cut to; it was squashed to a square."""
    y, x = np.mgrid[:120, :300]
    circle = Image.fromarray(np.uint8(255 * ((y - 60) ** 2 + (x - 150) ** 2 < 40**2)))
    for transform in (ImageTransform(48, 48), NativeTransform(48, 48, multiple=4, max_pixels=48 * 48)):
        seen = np.asarray(transform(circle)) > 127
        height, width = (np.ptp(np.flatnonzero(seen.any(axis=axis))) + 1 for axis in (1, 0))
        assert abs(int(height) - int(width)) <= 1


def test_a_codec_foretells_the_grid_of_what_it_makes():
    model = TransfusionConfig(image=ImageConfig(3, 16, 24, transform="native"), patch_size=2)
    codec = load_image_codec(DataConfig(), model)
    for height, width in SIZES:
        made = codec.encode(picture(height, width))
        assert made.shape[1:] == codec.grid(height, width) and made.shape[1] * made.shape[2] <= 16 * 24
    assert isinstance(codec, PixelCodec) and codec.grid(300, 17) == (82, 4)


def test_a_vae_reads_and_draws_pictures_of_their_own_size(tmp_path):
    shape, ones = VAEShape(channels=3, height=12, width=12, latents=2, halvings=2), np.ones((2, 1, 1), np.float32)
    vae, path = ConvVAE(3, 2, 2), tmp_path / "vae.pt"
    VAECodec(shape, vae, *(2 * [vae.decoder_out.bias.new_tensor(ones)])).save(path)
    image = ImageConfig(2, 3, 3, transform="native", max_pixels=400)
    codec = load_image_codec(DataConfig(image_tokenizer=str(path)), TransfusionConfig(image=image, patch_size=1))
    latents = codec.encode(picture(10, 40))
    assert latents.shape == (2, 2, 10) and codec.grid(10, 40) == (2, 10)
    assert codec.decode(latents).shape == (8, 40, 3)
    with pytest.raises(ValueError, match=r"makes 2 latents .* expects 4\. Set model.image.channels=2"):
        wrong = TransfusionConfig(image=ImageConfig(4, transform="native"))
        load_image_codec(DataConfig(image_tokenizer=str(path)), wrong)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model=showo_tiny", "model.image.transform=native"], "for images of patches, but a showo model has codes"),
        (["model=transfusion_tiny", "model.image.max_pixels=64"], "max_pixels=64 does nothing with .*transform=crop"),
        (["model=transfusion_tiny", "model.image.transform=native", "model.image.max_pixels=3"], "less than one patch"),
        (["model=transfusion_tiny", "model.image.transform=squash"], "transform=squash must be one of crop, native"),
    ],
)
def test_contradictions_are_named(overrides, said):
    with pytest.raises(ConfigError, match=said):
        validate(compose(["run.name=test", "data.path=data/none", *overrides]), 1)
