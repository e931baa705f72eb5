"""A checkpoint as a model to sample from, on one process whatever layout wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

from megatron_mm.config.compose import Config, from_dict_config
from megatron_mm.config.schema import ParallelConfig
from megatron_mm.data.image_codec import ImageCodec
from megatron_mm.data.image_codecs import load_image_codec
from megatron_mm.data.tokenizer import Tokenizer, load_tokenizer
from megatron_mm.engines.checkpoint import CheckpointError, common_state, load_weights, resolve
from megatron_mm.families.base import Family
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.distributed import pick_device, single_process
from megatron_mm.parallel.model import StageModel
from megatron_mm.parallel.transformer_config import transformer_config


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
    def load(cls, checkpoint: str | Path, device: torch.device | None = None) -> Iterator[SamplingModel]:
        """The model in `checkpoint`: a folder of checkpoints (its latest) or one iter_* folder.

        Raises:
            ValueError: there is no complete checkpoint, or its tokenizer or image tokenizer is not there.
        """
        path = resolve(checkpoint)
        common = common_state(path)
        if "config" not in common:
            raise CheckpointError(f"{path} does not hold its configuration: use one that megatron_mm.train wrote.")
        config = from_dict_config(OmegaConf.create(common["config"]))
        device = device or pick_device()
        with single_process(device):
            model = cls.build(config, device)
            load_weights([model.stage], path)
            yield model

    @classmethod
    def build(cls, config: Config, device: torch.device) -> SamplingModel:
        """The model that `config` describes, within `parallel.distributed.single_process`."""
        tokenizer = load_tokenizer(config.data.tokenizer)
        codec = load_image_codec(config.data, config.model.image)
        family = build_family(config.model, tokenizer.size)
        # Where the cache is not in use (tests), any backend does; the run's own may not run on this device.
        core = transformer_config(family.trunk, ParallelConfig(), config.train, "reference", lora=config.lora)
        stage = StageModel(core, family, first=True, last=True, virtual_stage=None).eval()
        return cls(config, family, tokenizer, codec, stage, device)

    @property
    def sees_images_alone(self) -> bool:
        """Whether training left out captions, so that classifier-free guidance has something to lead away from."""
        return self.config.model.condition_dropout > 0
