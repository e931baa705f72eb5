"""A checkpoint as a model to sample from, on one process or several, whatever layout wrote it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from megatron_mm.config.compose import Config, from_dict_config
from megatron_mm.config.schema import ParallelConfig
from megatron_mm.config.validate import validate
from megatron_mm.data.image_codec import ImageCodec, picture_of
from megatron_mm.data.image_codecs import load_image_codec
from megatron_mm.data.sample import read_image
from megatron_mm.data.tokenizer import Tokenizer, load_tokenizer
from megatron_mm.engines.format import common_state, resolve
from megatron_mm.engines.reading import CheckpointError
from megatron_mm.engines.weights import load_weights
from megatron_mm.families.base import Family
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.distributed import model_ranks, pick_device
from megatron_mm.parallel.model import StageModel
from megatron_mm.parallel.stages import from_last_stage
from megatron_mm.parallel.transformer_config import transformer_config
from megatron_mm.types import ImageSegment


@dataclass(frozen=True)
class SamplingModel:
    """All that sampling needs. Made by `load`, or by `build` with new weights (which are not initialised)."""

    config: Config
    family: Family
    tokenizer: Tokenizer
    codec: ImageCodec
    stage: StageModel
    device: torch.device

    @classmethod
    @contextmanager
    def load(
        cls,
        checkpoint: str | Path,
        device: torch.device | None = None,
        parallel: ParallelConfig | None = None,
        averaged: bool = False,
    ) -> Iterator[SamplingModel]:
        """The model in `checkpoint`: a folder of checkpoints (its latest) or one iter_* folder.

        Args:
            parallel: tensor and pipeline sizes, whose product is the number of ranks of this job; None for one rank.
            averaged: the moving averages of its weights (optim.ema_decay).

        Raises:
            ValueError: there is no complete checkpoint, its tokenizer or image tokenizer is not there, or it cannot be
                cut so.
        """
        path = resolve(checkpoint)
        common = common_state(path)
        if "config" not in common:
            raise CheckpointError(f"{path} does not hold its configuration: use one that megatron_mm.train wrote.")
        config = from_dict_config(OmegaConf.create(common["config"]))
        config = replace(config, parallel=replace(parallel or ParallelConfig(), use_distributed_optimizer=False))
        validate(config, config.parallel.model_parallel_size, training=False)
        device = device or pick_device(config.parallel)
        with model_ranks(config.parallel, device):
            model = cls.build(config, device)
            load_weights([model.stage], path, averaged)
            yield model

    @classmethod
    def build(cls, config: Config, device: torch.device) -> SamplingModel:
        """This rank's part of the model that `config` describes, within the process groups of `config.parallel`."""
        tokenizer = load_tokenizer(config.data.tokenizer)
        codec = load_image_codec(config.data, config.model)
        family = build_family(config.model, tokenizer.size)
        # Where the cache is not in use (tests), any backend does; the run's own may not run on this device.
        core = transformer_config(family.trunk, config.parallel, config.train, "reference", lora=config.lora)
        stage = StageModel.of_this_rank(core, family).eval()
        return cls(config, family, tokenizer, codec, stage, device)

    def from_back(self, compute: Callable[[nn.Module], torch.Tensor]) -> torch.Tensor:
        """What `compute` makes of the family's back, on every rank."""
        return from_last_stage(self.stage, compute)

    def grid_to_draw(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Rows and columns, in the unit of `model.image`, of images to be drawn in so many pixels; None: as configured.

        Raises:
            ValueError: the model has no images of that size.
        """
        image, asked = self.config.model.image, f"height={height} width={width}"
        if height is None and width is None:
            return image.height, image.width
        if image.transform == "crop":
            raise ValueError(f"{asked}: with model.image.transform=crop all images have one size; leave it out.")
        if height is None or width is None:
            raise ValueError(f"{asked}: say both, in pixels, or neither.")
        if (fitted := self.codec.pixels.grid(height, width)) != (height, width):
            raise ValueError(
                f"{asked}: the model's images have sides that are multiples of its patches, within "
                f"model.image.max_pixels; the next such size is height={fitted[0]} width={fitted[1]}."
            )
        return self.codec.grid(height, width)

    def reread(self, drawn: ImageSegment) -> ImageSegment:
        """A drawn image as a document holds it that goes on: with the pixels that a vision encoder reads of it."""
        if self.family.encoder_side is None:
            return drawn
        return replace(drawn, pixels=self.read_image(picture_of(self.codec.decode(drawn.data))).pixels)

    def read_image(self, picture: Image.Image) -> ImageSegment:
        """A picture as the model reads it."""
        return read_image(picture, self.codec, self.family.encoder_side)
