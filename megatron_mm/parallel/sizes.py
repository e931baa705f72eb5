"""How many parameters a model has, part by part: counted on the model itself, built without memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch

from megatron_mm.config.compose import Config
from megatron_mm.config.schema import ParallelConfig
from megatron_mm.documents.traits import MaskTraits
from megatron_mm.families.base import Family
from megatron_mm.parallel.distributed import single_process
from megatron_mm.parallel.model import StageModel
from megatron_mm.parallel.transformer_config import transformer_config


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers in the parameters of a whole model, with norms, biases and the padding of its vocabulary."""

    trunk: int
    """Transformer layers and the final norm."""
    embedding: int
    head: int
    beside: int
    """What else the family has: image paths, heads for images."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def count_parameters(config: Config, family: Family) -> ParameterCounts:
    """Builds the model of `family` on the meta device, whatever its size and layout."""
    core = transformer_config(
        family.trunk, ParallelConfig(), config.train, "reference", MaskTraits.of(family).hides_keys
    )
    with single_process(torch.device("cpu")), _on_meta():
        model = StageModel(core, family, first=True, last=True, virtual_stage=None)
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[_part(name)] += parameter.numel()
    return ParameterCounts(**{field.name: counts[field.name] for field in fields(ParameterCounts)})


def _part(name: str) -> str:
    """Of a parameter's checkpoint name."""
    if name.startswith("decoder."):
        return "trunk"
    return {"front.embedding": "embedding", "back.head": "head"}.get(name.rpartition(".")[0], "beside")


@contextmanager
def _on_meta() -> Iterator[None]:
    """Modules that are built here have their parameters on the meta device; megatron-core asks for the current one."""
    current = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("meta")
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.cuda.current_device = current
