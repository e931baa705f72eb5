"""Ids of the specials of models whose config.json does not hold them: official ones, or those of our own key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from megatron_mm.config.masked import MaskedVocabularyConfig
from megatron_mm.families.base import Vocabulary

KEY = "special_ids"
"""Of config.json; ours, where ids are not the official ones."""


def id_overrides(hf: Mapping[str, Any], official: Mapping[str, int]) -> list[str]:
    """`model.vocabulary.*` overrides."""
    return [f"model.vocabulary.{name}={value}" for name, value in {**official, **hf.get(KEY, {})}.items()]


def id_entry(vocab: Vocabulary, official: Mapping[str, int]) -> dict[str, Any]:
    """What of config.json says where `vocab` has its ids: nothing where they are official."""
    named = vars(vocab) | dict(vocab.special)
    ids = {field.name: named[field.name] for field in fields(MaskedVocabularyConfig)}
    return {} if ids == official else {KEY: ids}
