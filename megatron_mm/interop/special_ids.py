"""Ids of the specials of models whose config.json does not hold them: official ones, or those of our own key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_mm.documents.vocabulary import Vocabulary

KEY = "special_ids"
"""Of config.json; it is ours, and holds the ids that are not the official ones."""


def id_overrides(hf: Mapping[str, Any], official: Mapping[str, int]) -> list[str]:
    """`model.vocabulary.*` overrides."""
    return [f"model.vocabulary.{name}={value}" for name, value in {**official, **hf.get(KEY, {})}.items()]


def id_entry(vocab: Vocabulary, official: Mapping[str, int]) -> dict[str, Any]:
    """What of config.json says where `vocab` has other ids than the official ones; nothing where there are none."""
    named = vars(vocab) | dict(vocab.special)
    others = {name: named[name] for name, value in official.items() if named[name] != value}
    return {KEY: others} if others else {}
