"""Chameleon that reads only: images come first and are given, text is learnt."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_mm.config.model import ChameleonConfig
from megatron_mm.config.plugins import FamilyPlugin
from megatron_mm.data.shape import Shape
from megatron_mm.documents.choices import Choices
from megatron_mm.families.chameleon import Chameleon
from megatron_mm.sampling.codes import ChameleonSampler


@dataclass(frozen=True)
class CaptionerConfig(ChameleonConfig):
    family: str = "captioner"
    shortest_caption: int = 1
    """Shorter ones (in tokens) are given, and not learnt."""


class Captioner(Chameleon):
    """See `megatron_mm.families.base.Family`."""

    name = "captioner"
    config: CaptionerConfig

    def choices(self, shape: Shape) -> Choices:
        images = [replace(part, loss=False) for part in shape.images]
        texts = [replace(part, loss=part.tokens >= self.config.shortest_caption) for part in shape.texts]
        return [(1.0, shape.of([*images, *texts]))]


PLUGIN = FamilyPlugin(CaptionerConfig, Captioner, ChameleonSampler, {"temperature": 0.0, "top_p": 1.0})
