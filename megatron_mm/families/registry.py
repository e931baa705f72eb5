"""Families by name."""

from __future__ import annotations

from collections.abc import Callable

from megatron_mm.config.compose import ModelConfig
from megatron_mm.config.plugins import family_plugin
from megatron_mm.families.base import Family
from megatron_mm.families.chameleon import Chameleon
from megatron_mm.families.janus import Janus
from megatron_mm.families.mmada import MMaDA
from megatron_mm.families.showo import Showo
from megatron_mm.families.showo_flow import ShowoFlow
from megatron_mm.families.transfusion import Transfusion
from megatron_mm.families.unimoe import UniMoE

FAMILIES: dict[str, Callable[..., Family]] = {
    "chameleon": Chameleon,
    "janus": Janus,
    "mmada": MMaDA,
    "showo": Showo,
    "showo_flow": ShowoFlow,
    "transfusion": Transfusion,
    "unimoe": UniMoE,
}


def build_family(model: ModelConfig, text_vocab_size: int) -> Family:
    """The family that `model.family` names, for a text tokenizer of `text_vocab_size` entries.

    Raises:
        ValueError: the name is unknown, or the family refuses its configuration.
    """
    if model.family in FAMILIES:
        return FAMILIES[model.family](model, text_vocab_size)
    if plugin := family_plugin(model.family):
        family: Family = plugin.family(model, text_vocab_size)
        return family
    raise ValueError(f"Unknown model.family={model.family}: use one of {', '.join(sorted(FAMILIES))}.")
