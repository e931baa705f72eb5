import numpy as np
import pytest
from PIL import Image
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from megatron_mm.config.model import ChameleonConfig, ImageConfig
from megatron_mm.config.schema import DataConfig
from megatron_mm.data.image_codec import PatchVQCodec, PixelCodec, encoder_pixels
from megatron_mm.data.image_codecs import load_image_codec
from megatron_mm.data.image_transform import ImageTransform
from megatron_mm.nn.patch import patchify


def random_image(mode: str, height: int, width: int) -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_pixels_round_trip_exactly(mode, channels):
    image, codec = random_image(mode, 6, 5), PixelCodec(channels, ImageTransform(6, 5))
    pixels = codec.encode(image)
    assert pixels.dtype == np.float32 and pixels.shape == (channels, 6, 5)
    assert pixels.min() >= -1 and pixels.max() <= 1
    assert np.array_equal(codec.decode(pixels).squeeze(), np.asarray(image))


def test_decode_clips():
    assert PixelCodec(1, ImageTransform(1, 2)).decode(np.array([[[-3.0, 3.0]]])).ravel().tolist() == [0, 255]


def test_transparency_is_laid_on_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (255, 0, 0, 255)
    pixels = PixelCodec(3, ImageTransform(2, 2)).encode(Image.fromarray(rgba))
    assert pixels[:, 0, 0].tolist() == [1, -1, -1]
    assert (pixels[:, 1, 1] == 1).all()


def test_other_sizes_are_resized():
    assert PixelCodec(3, ImageTransform(4, 8)).encode(random_image("L", 9, 7)).shape == (3, 4, 8)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (40, 10), (7, 33), (300, 11), (5, 3)])
def test_encoder_pixels_are_transformers_image_processor(height, width):
    image = random_image("RGB", height, width)
    released = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    theirs = JanusImageProcessorPil(**released)(image, return_tensors="np")["pixel_values"][0]
    ours = encoder_pixels(image, 16)
    assert ours.shape == (3, 16, 16) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    if height > 2 * width:
        np.testing.assert_allclose(ours[:, :, 0], 127 / 127.5 - 1, atol=1e-6, err_msg="padding is grey")


def test_encoder_pixels_of_grey_and_transparent_pictures():
    grey = encoder_pixels(random_image("L", 8, 8), 8)
    assert (grey == PixelCodec(1, ImageTransform(8, 8)).encode(random_image("L", 8, 8))).all()
    assert (encoder_pixels(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 8) == 1).all()


def codebook_codec() -> PatchVQCodec:
    """Two codes for each patch of a 4 x 6 grey image: black and white, with patches of 2."""
    return PatchVQCodec(np.stack([np.full(4, -1.0), np.full(4, 1.0)]).astype(np.float32), 1, ImageTransform(4, 6), 2)


def test_patches_keep_their_place():
    pixels = np.arange(2 * 4 * 6, dtype=np.float32).reshape(2, 4, 6)
    patches = patchify(pixels, 2)
    assert np.array_equal(patches[1 * 3 + 2], pixels[:, 2:4, 4:6].reshape(-1))


def test_codes_round_trip_what_the_codebook_holds():
    wanted = np.array([[0, 1, 1], [1, 0, 0]])
    codec = codebook_codec()
    pixels = codec.decode(wanted)
    assert pixels.shape == (4, 6, 1) and set(pixels.ravel().tolist()) == {0, 255}
    codes = codec.encode(Image.fromarray(pixels[..., 0]))
    assert codes.dtype == np.int64 and np.array_equal(codes, wanted)


def test_encode_takes_the_nearest_entry():
    codec = PatchVQCodec(np.random.default_rng(1).normal(size=(20, 12)).astype(np.float32), 3, ImageTransform(4, 6), 2)
    image = random_image("RGB", 4, 6)
    patches = patchify(codec.pixels.encode(image), 2)
    distance = ((patches[:, None] - codec.codebook[None]) ** 2).sum(-1)
    assert np.array_equal(codec.encode(image).reshape(-1), distance.argmin(1))


def test_saved_codebook_loads_and_is_checked_against_the_model(tmp_path):
    path = tmp_path / "codebook.npz"
    codebook_codec().save(path)
    data = DataConfig(path="", image_tokenizer=str(path))
    codec = load_image_codec(data, ChameleonConfig(image=ImageConfig(height=2, width=3)))
    assert (codec.codes, codec.grid(9, 9)) == (2, (2, 3))
    with pytest.raises(ValueError, match=r"makes 2 x 3 codes.*expects 32 x 32.*model.image.height=2"):
        load_image_codec(data, ChameleonConfig())


def test_errors_are_sentences(tmp_path):
    with pytest.raises(ValueError, match="1 .grey. or 3"):
        PixelCodec(2, ImageTransform(4, 4))
    with pytest.raises(ValueError, match="cannot be cut into patches"):
        PatchVQCodec(np.zeros((2, 9), np.float32), 1, ImageTransform(4, 4), 3)
    missing = DataConfig(path="", image_tokenizer=str(tmp_path / "no.npz"))
    with pytest.raises(ValueError, match="no.npz is no file"):
        load_image_codec(missing, ChameleonConfig())
    (tmp_path / "bad.npz").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="not a patch codebook"):
        load_image_codec(DataConfig(path="", image_tokenizer=str(tmp_path / "bad.npz")), ChameleonConfig())


def test_fitted_codebook_rebuilds_its_images_and_is_deterministic():
    fit = pytest.importorskip("megatron_mm.data.codebook").fit_patch_codebook
    row, column = np.mgrid[0:8, 0:8]
    # slopes under a plain ground, whose patch is the commonest
    pixels = np.stack([np.where(row < 4, 16, 16 + 4 * (a * row + b * column)) for a in range(5) for b in range(5)])
    images = [Image.fromarray(p.astype(np.uint8)) for p in pixels]
    codec, again = (fit(images, 24, 2, 1, 8, 8, seed=0) for _ in range(2))
    assert np.array_equal(codec.codebook, again.codebook)
    rebuilt = np.stack([codec.decode(codec.encode(image))[..., 0] for image in images])
    assert np.square(rebuilt - pixels).mean() < 0.02 * pixels.var()
    assert set(rebuilt[0].ravel()) == {16}, "the ground must be exact"
    with pytest.raises(ValueError, match="different patches, fewer than the 999 codes"):
        fit(images, 999, 2, 1, 8, 8, seed=0)
