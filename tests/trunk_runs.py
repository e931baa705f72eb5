"""One real step of a Chameleon over any trunk, with given weights, under any layout: what trunk tests compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from documents import next_tokens
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from sharded import Shard, local_shards

from megatron_mm.config.compose import Config
from megatron_mm.config.model import ChameleonConfig, TrunkConfig
from megatron_mm.config.schema import LoraConfig, OptimConfig, ParallelConfig, TrainConfig
from megatron_mm.data.pack import pack
from megatron_mm.engines.megatron import MegatronEngine
from megatron_mm.families.registry import build_family
from megatron_mm.mask import with_spans
from megatron_mm.parallel.build import build_chunks
from megatron_mm.parallel.context.runtime import Part
from megatron_mm.parallel.distributed import process_groups
from megatron_mm.types import Document

VOCAB, PADDED, LENGTH, Z_WEIGHT = 300, 384, 24, 0.1
CPU = torch.device("cpu")
NO_LORA = LoraConfig()
KEYS = ((5, 6), (7,))
"""Dropout keys of `documents`."""


def config_of(trunk: TrunkConfig, precision: str = "fp32", lora: LoraConfig = NO_LORA, **parallel) -> Config:
    """Learning rate 0 and no clipping: a step leaves weights and gradients as they are."""
    return Config(
        model=ChameleonConfig(trunk=trunk, image_codes=16, vocab_size=VOCAB, z_loss_weight=Z_WEIGHT),
        parallel=ParallelConfig(**parallel, use_distributed_optimizer=precision != "fp64"),
        train=TrainConfig(precision=precision, seed=3),
        optim=OptimConfig(lr=0.0, min_lr=0.0, clip_grad=0.0),
        lora=lora,
    )


def documents(spans: bool) -> list[list[Document]]:
    """Two rows: two packed documents with padding behind them, and one that fills the row. With `spans`, some of their
    positions see each other both ways."""
    rng = np.random.default_rng(0)
    none = np.zeros((0, 3), np.int32)
    rows = []
    for lengths in ((9, 13), (LENGTH,)):
        tokens = [rng.integers(0, VOCAB, n) for n in lengths]
        masks = [with_spans(n, [(2, 6), (n - 3, n)] if spans else []) for n in lengths]
        labels = [next_tokens(t) for t in tokens]
        rows.append([Document(0, *parts, none) for parts in zip(tokens, masks, labels, strict=True)])
    return rows


def shapes(init, config: Config) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> whole shape of every weight; on one rank."""
    with process_groups(config.parallel, 0, CPU, **init) as layout:
        chunks = build_chunks(config, build_family(config.model, 256), layout, CPU)
        return {name: shape for name, shape, _, _ in local_shards(chunks)}


def fill(models: Sequence, weights: Mapping[str, torch.Tensor]) -> None:
    """Puts whole weights by name where each rank holds its part of them."""
    for entry in (entry for model in models for entry in model.sharded_state_dict().values()):
        for part in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            axes = part.prepend_axis_num
            at = tuple(slice(o, o + n) for o, n in zip(part.global_offset[axes:], part.local_shape, strict=True))
            part.data.detach().copy_(weights[part.key][part.global_offset[:axes] + at])


def engine_of(config: Config, layout, weights: Mapping[str, torch.Tensor]) -> MegatronEngine:
    engine = MegatronEngine(config, build_family(config.model, 256), layout, CPU)
    fill(engine.models, weights)
    engine.optimizer.reload_model_params()
    return engine


def run_trunk(
    init, config: Config, weights: Mapping[str, torch.Tensor], spans: bool
) -> tuple[torch.Tensor | None, dict[str, float], list[Shard]]:
    """Of `documents`: logits [B, S, V] without dropout (None before the last stage), the step's losses, and the step's
    gradients as shards."""
    with process_groups(config.parallel, 0, CPU, **init) as layout:
        engine = engine_of(config, layout, weights)
        family = engine.family
        batch = pack(documents(spans), LENGTH, family.fields, family.vocab.pad, KEYS)
        logits = _logits(engine, batch.to(CPU, config.train.dtype), layout)
        losses = engine.step([engine.prepare(batch)]).losses
        for model in engine.models:
            for parameter in model.parameters():
                parameter.data = parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter)
        return logits, losses, local_shards(engine.models)


@torch.no_grad()
def _logits(engine: MegatronEngine, batch, layout) -> torch.Tensor | None:
    """By hand from stage to stage."""
    (model,) = engine.models
    model.eval()
    if layout.pp_rank > 0:
        width = engine.config.model.trunk.hidden_size
        received = torch.empty(LENGTH, len(batch.tokens), width, dtype=engine.config.train.dtype)
        dist.recv(received, layout.rank - layout.tp_size)
        model.set_input_tensor(received)
    hidden = model.hidden(Part.of(batch))
    if layout.pp_rank < layout.pp_size - 1:
        dist.send(hidden.contiguous(), layout.rank + layout.tp_size)
        return None
    return model.back.ops.gather_logits(model.back.logits(hidden.transpose(0, 1)))
