"""Dataclass fields that say which values they take."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def choice(*options: str | None) -> Any:
    """A field that takes one of `options`; the first is the default."""
    return field(default=options[0], metadata={"choices": options})


Problem = tuple[bool, str]
"""Whether something is wrong, and the sentence that says so, with a remedy."""
