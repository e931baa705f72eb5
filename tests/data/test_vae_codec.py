"""The VAE as an image codec: it learns to carry an image, and its file says what it is."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from megatron_mm.config.model import ImageConfig, TransfusionConfig
from megatron_mm.config.schema import DataConfig
from megatron_mm.data.image_codecs import load_image_codec
from megatron_mm.data.vae_codec import VAECodec, VAEShape, fit_vae
from megatron_mm.nn.vae import ConvVAE

SHAPE = VAEShape(channels=1, height=12, width=10, latents=2, halvings=2)


def pictures(count: int) -> list[Image.Image]:
    """A white square on black, here and there."""
    rng = np.random.default_rng(0)
    made = []
    for x, y in rng.integers(0, 7, (count, 2)).tolist():
        image = Image.new("L", (10, 12))
        ImageDraw.Draw(image).rectangle((x, y, x + 3, y + 3), fill=255)
        made.append(image)
    return made


@pytest.fixture(scope="module")
def codec():
    torch.set_num_threads(1)
    return fit_vae(pictures(200), SHAPE, seed=0, steps=300, batch=32, kl_weight=0.1)


def test_carries_the_image(codec):
    images = pictures(50)
    latents = np.stack([codec.encode(image) for image in images])
    assert latents.shape == (50, 2, 3, 3) and latents.dtype == np.float32
    assert 0.7 < latents.std() < 1.4  # in standard deviations of the corpus
    pixels = np.stack([np.asarray(image) for image in images]).astype(float)
    decoded = np.stack([codec.decode(each)[..., 0] for each in latents]).astype(float)
    assert ((decoded - pixels) ** 2).mean() < 0.25 * ((pixels - pixels.mean(0)) ** 2).mean()


def test_file_round_trip(codec, tmp_path):
    codec.save(tmp_path / "vae.pt")
    data = DataConfig(image_tokenizer=str(tmp_path / "vae.pt"))
    loaded = load_image_codec(data, TransfusionConfig(image=ImageConfig(channels=2, height=3, width=3)))
    image = pictures(1)[0]
    np.testing.assert_array_equal(loaded.encode(image), codec.encode(image))
    with pytest.raises(ValueError, match=r"makes 2 x 3 x 3 latents .* Set model.image.channels=2 model.image.height=3"):
        load_image_codec(data, TransfusionConfig(image=ImageConfig(channels=4, height=4, width=4)))


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.pt is no file"):
        VAECodec.load(tmp_path / "none.pt")
    (tmp_path / "bad.pt").write_bytes(b"not a VAE")
    with pytest.raises(ValueError, match=r"bad\.pt is not a VAE file"):
        VAECodec.load(tmp_path / "bad.pt")


def test_latents_that_carry_nothing_are_refused():
    with pytest.raises(ValueError, match="carry nothing"):
        fit_vae(pictures(20), SHAPE, seed=0, steps=200, batch=8, kl_weight=1e4)


def test_gradients_of_the_loss_reach_every_weight():
    torch.manual_seed(0)
    vae = ConvVAE(3, latents=4, halvings=3)
    assert vae.sizes(9, 9) == [(9, 9), (5, 5), (3, 3), (2, 2)]
    vae.loss(torch.randn(2, 3, 9, 9), 0.5).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in vae.parameters())
