"""How each family is decoded where nothing else is asked for: the values that its paper or its code publishes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron_mm.config.compose import ModelConfig
from megatron_mm.config.generate import SamplingConfig
from megatron_mm.config.plugins import family_plugin

TEXT = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.0}
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "chameleon": {
        "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2, "image_temperature": 0.7, "image_top_p": 0.9,
        "cfg_scale": 3.0, "image_cfg_scale": 1.2,
    },
    "janus": {**TEXT, "image_temperature": 1.0, "image_top_p": 1.0, "cfg_scale": 5.0},
    "mmada": {
        "temperature": 0.7, "top_p": 0.9, "image_temperature": 1.0, "cfg_scale": 4.5, "steps": 50, "block_length": 64,
        "tokens_per_step": 1,
    },
    "showo": {**TEXT, "image_temperature": 1.0, "cfg_scale": 6.0, "steps": 50},
    "showo_flow": {**TEXT, "cfg_scale": 7.5, "steps": 50},
    "transfusion": {**TEXT, "cfg_scale": 3.0, "steps": 250},
    "unimoe": TEXT,
}  # fmt: skip
"""Of each family the options that it has. Guidance of Show-o and MMaDA is w + 1 for their w = 5 and 3.5 in
(1 + w) c - w u."""


def options_of(family: str) -> Mapping[str, float]:
    """The options that a family has, with its defaults; `family` as in `model.family`."""
    if family in PUBLISHED:
        return PUBLISHED[family]
    plugin = family_plugin(family)
    return plugin.decoding if plugin else {}


def settings_for(family: str, **asked: Any) -> SamplingConfig:
    """Settings with what is `asked`, but for options that the family does not have."""
    shared = {field.name for field in fields(SamplingConfig)} - {field.name for field in fields(Decoding)}
    has = {*options_of(family), *shared, "max_new_tokens"}
    return SamplingConfig(**{name: value for name, value in asked.items() if name in has})


@dataclass(frozen=True)
class Decoding:
    """`SamplingConfig` with nothing left open; what a family does not have is 1."""

    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    image_temperature: float = 1.0
    image_top_p: float = 1.0
    cfg_scale: float = 1.0
    image_cfg_scale: float = 1.0
    steps: int = 1
    block_length: int = 1
    tokens_per_step: int = 1
    max_new_tokens: int = 1

    @property
    def guided(self) -> bool:
        return self.cfg_scale != 1.0

    @classmethod
    def of(cls, settings: SamplingConfig, model: ModelConfig) -> tuple[Decoding, str]:
        """What `settings` mean for a model; and what a user should know of its guidance, or an empty text.

        Raises:
            ValueError: an option that the family does not have.
        """
        options = options_of(model.family)
        given = {field.name: getattr(settings, field.name) for field in fields(cls)}
        asked = {name: value for name, value in given.items() if value is not None and name != "max_new_tokens"}
        for name in asked.keys() - options.keys():
            raise ValueError(f"{name}={asked[name]} does nothing in a {model.family} model: leave it out.")
        values = {**options, **asked, "max_new_tokens": settings.max_new_tokens}
        # Chameleon's own guidance goes without dropout: it compares with images alone as well.
        untrained = getattr(model, "condition_dropout", 1.0) == 0 and "image_cfg_scale" not in options
        scale, told = asked.get("cfg_scale"), ""
        if untrained and "cfg_scale" in options and scale != 1.0:
            values["cfg_scale"] = scale or 1.0
            what = f"cfg_scale={scale} leads away from what the model never saw" if scale else "images have no guidance"
            told = f"{what}: it was trained with model.condition_dropout=0"
        return cls(**values), told  # type: ignore[arg-type]
