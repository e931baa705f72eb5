"""Whether a trunk is one that another library's model can be."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_mm.config.model import TrunkConfig

Value = str | float | bool


def check_trunk(trunk: TrunkConfig, always: Mapping[str, Value], whose: str) -> None:
    """Raises ValueError, in one sentence, unless `trunk` has what `whose` model `always` has."""
    for key, value in always.items():
        if (ours := getattr(trunk, key)) != value:
            raise ValueError(
                f"model.trunk.{key}={written(ours)}, but {whose} always has {written(value)}: this model cannot be "
                "converted."
            )


def trunk_overrides(values: Mapping[str, Value | None]) -> list[str]:
    """`model.trunk.*` overrides of these values."""
    return [f"model.trunk.{key}={written(value)}" for key, value in values.items()]


def written(value: Value | None) -> str:
    """As in YAML."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
