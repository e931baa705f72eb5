"""Images as latents of a small VAE that is trained on the corpus itself while it is prepared, without any download."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from megatron_mm.data.files import replacing
from megatron_mm.data.image_codec import PixelCodec
from megatron_mm.data.image_transform import ImageTransform
from megatron_mm.nn.vae import ConvVAE


@dataclass(frozen=True)
class VAEShape:
    """What a VAE file says of its network: the pixels [channels, height, width] that it was trained on, its latents."""

    channels: int
    height: int
    width: int
    latents: int
    halvings: int

    @property
    def downsampling(self) -> int:
        """Pixels of a side that become one latent."""
        return 1 << self.halvings

    @property
    def transform(self) -> ImageTransform:
        """Of the pictures that it is trained on."""
        return ImageTransform(self.height, self.width)


class VAECodec:
    """Latent means float32 [latents, h, w], standardised by each channel's mean and standard deviation over the corpus.

    Without that a diffusion model has to find the channels' offsets in the first, noisiest steps.
    """

    codes = 0
    limit = 4.0
    """In standard deviations."""

    def __init__(self, shape: VAEShape, vae: ConvVAE, mean: torch.Tensor, std: torch.Tensor):
        """`mean` and `std` float32 [latents, 1, 1]."""
        self.shape, self.vae, self.mean, self.std = shape, vae.eval().requires_grad_(False), mean, std
        self._pixels = PixelCodec(shape.channels, shape.transform)

    @property
    def pixels(self) -> PixelCodec:
        return self._pixels

    def fitted(self, transform: ImageTransform) -> VAECodec:
        """The same for pictures that come to be of other sizes."""
        codec = copy(self)
        codec._pixels = PixelCodec(self.shape.channels, transform)
        return codec

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self.vae.sizes(*self.pixels.grid(height, width))[-1]

    @torch.inference_mode()
    def encode(self, image: Image.Image) -> np.ndarray:
        mean, _ = self.vae.encode(torch.from_numpy(self.pixels.encode(image))[None])
        latents: np.ndarray = ((mean[0] - self.mean) / self.std).numpy()
        return latents

    @torch.inference_mode()
    def decode(self, array: np.ndarray) -> np.ndarray:
        latents = torch.from_numpy(np.asarray(array, dtype=np.float32)) * self.std + self.mean
        height, width = (side * self.shape.downsampling for side in latents.shape[1:])
        return self.pixels.decode(self.vae.decode(latents[None], *self.pixels.grid(height, width))[0].numpy())

    def save(self, path: Path) -> None:
        """Write shape, statistics and weights, whole or not at all."""
        saved = {"shape": asdict(self.shape), "mean": self.mean, "std": self.std, "weights": self.vae.state_dict()}
        with replacing(path) as temporary:
            torch.save(saved, temporary)

    @classmethod
    def load(cls, path: Path) -> VAECodec:
        """
        Raises:
            ValueError: the file is missing or no VAE of `save`.
        """
        if not path.is_file():
            raise ValueError(f"data.image_tokenizer={path} is no file: prepare the dataset first, or use 'pixels'.")
        try:
            saved = torch.load(path, weights_only=True)
            shape = VAEShape(**saved["shape"])
            vae = ConvVAE(shape.channels, shape.latents, shape.halvings)
            vae.load_state_dict(saved["weights"])
            return cls(shape, vae, saved["mean"], saved["std"])
        except (KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"data.image_tokenizer={path} is not a VAE file: {str(error).splitlines()[0]}") from error


def fit_vae(
    images: Iterable[Image.Image],
    shape: VAEShape,
    seed: int,
    steps: int = 1500,
    batch: int = 64,
    kl_weight: float = 0.5,
) -> VAECodec:
    """Trains a VAE on the images (all held in memory); half a minute for 28 x 28 pixels on two cores.

    The KL weight grows over the first third of the steps: from the start it may push the latents to carry nothing.

    Raises:
        ValueError: it did so all the same.
    """
    codec = PixelCodec(shape.channels, shape.transform)
    pixels = torch.from_numpy(np.stack([codec.encode(image) for image in images]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = ConvVAE(shape.channels, shape.latents, shape.halvings)
        optimizer = torch.optim.Adam(vae.parameters())
        for step in track(range(steps), "VAE", disable=not Console().is_terminal):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * (0.5 * (1 + math.cos(math.pi * step / steps)) + 0.02)
            optimizer.zero_grad()
            warm = min(1.0, 3 * step / steps)
            vae.loss(pixels[torch.randint(len(pixels), (batch,))], warm * kl_weight).backward()
            optimizer.step()
    with torch.inference_mode():
        means = torch.cat([vae.encode(part)[0] for part in pixels[:5000].split(500)])
    mean, std = means.mean((0, 2, 3))[:, None, None], means.std((0, 2, 3))[:, None, None]
    if std.max() < 0.1:
        raise ValueError(f"The VAE's latents carry nothing after {steps} steps: train it longer or with another seed.")
    return VAECodec(shape, vae, mean, std.clamp(min=0.05 * float(std.max())))  # an idle channel must not be magnified
