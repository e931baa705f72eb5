"""A rank's part of a model: what computes it here, and its chunks with their first weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from megatron_mm.config.compose import Config
from megatron_mm.config.schema import FusionConfig, ParallelConfig
from megatron_mm.documents.traits import MaskTraits
from megatron_mm.families.base import Family
from megatron_mm.nn import attention, fusion
from megatron_mm.parallel import overlap
from megatron_mm.parallel.init import Fresh, initialize
from megatron_mm.parallel.layout import Layout
from megatron_mm.parallel.lora import check_targets
from megatron_mm.parallel.model import StageModel
from megatron_mm.parallel.transformer_config import transformer_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What computes the model's parts here, and why, as lines for the log."""

    attention: str
    fusion: FusionConfig
    parallel: ParallelConfig
    reasons: tuple[str, ...]


def select_parts(config: Config, family: Family, device: torch.device) -> Parts:
    """What `attention.*`, `fusion.*` and the overlaps of `parallel.*` come to on this device.

    Raises:
        ValueError: what was asked for cannot run here.
    """
    backend, why = attention.select(
        config.attention.backend, device, config.train.dtype, MaskTraits.of(family).causal, family.trunk.head_dim,
        spread=config.parallel.context_parallel_size > 1,
    )  # fmt: skip
    fused, parts = fusion.select(config.fusion, device)
    parallel, beside = overlap.select(config.parallel, device, config.train.dtype)
    lines = (f"attention backend: {backend} ({why})", f"elementwise parts: {parts}", f"overlap: {beside}")
    return Parts(backend, fused, parallel, lines)


def build_chunks(
    config: Config, family: Family, layout: Layout, device: torch.device, fresh: Fresh = "all"
) -> list[StageModel]:
    """This rank's model chunks (several under interleaved pipelining), `fresh` weights drawn from the run's seed."""
    parts = select_parts(config, family, device)
    if layout.rank == 0:
        for reason in parts.reasons:
            logger.info(reason)
    hides_keys = MaskTraits.of(family).hides_keys
    core = transformer_config(
        family.trunk, parts.parallel, config.train, parts.attention, hides_keys, parts.fusion, config.lora
    )
    chunks = []
    for stage in range(layout.virtual_stages):
        virtual = stage if layout.virtual_stages > 1 else None
        first = layout.pp_rank == 0 and stage == 0
        last = layout.pp_rank == layout.pp_size - 1 and stage == layout.virtual_stages - 1
        chunk = StageModel(core, family, first, last, virtual)
        initialize(chunk, config.train.seed, fresh)
        chunks.append(chunk)
    check_targets(chunks, config.lora)
    return chunks
