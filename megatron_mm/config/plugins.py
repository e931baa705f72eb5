"""What a user's own package brings: a family or a source of data, by import path or by entry point.

    model.family=my_package.family:PLUGIN    an import path of a `FamilyPlugin`
    model.family=mine                        its name, where the package's pyproject.toml says
                                             [project.entry-points."megatron_mm.families"]
                                             mine = "my_package.family:PLUGIN"

docs/extending.md has an example.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

FAMILIES, SOURCES = "megatron_mm.families", "megatron_mm.sources"
"""Groups of entry points."""


@dataclass(frozen=True)
class FamilyPlugin:
    """A family of a user's own.

    config: its frozen dataclass, with a default for every field, `family`, `trunk` and `image` among them. family:
    makes the `megatron_mm.families.base.Family` of it and a text vocabulary's size. sampler: its
    `megatron_mm.sampling.sampler.Sampler`; without one it is trained only. decoding: the options of sampling that it
    has, with defaults.
    """

    config: Callable[[], Any]
    family: Callable[[Any, int], Any]
    sampler: Any = None
    decoding: Mapping[str, float] = field(default_factory=dict)


def find(group: str, name: str) -> Any:
    """What `name` stands for in a group of entry points, or as an import path `package.module` or
    `package.module:attribute`; None where it is neither.

    Raises:
        ValueError: a module or attribute that is named is not there.
    """
    for point in entry_points(group=group):
        if point.name == name:
            return point.load()
    path, _, attribute = name.partition(":")
    if "." not in path and not attribute:
        return None
    try:
        module = importlib.import_module(path)
        return getattr(module, attribute) if attribute else module
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{name} cannot be imported ({error}): install its package, or add it to PYTHONPATH."
        ) from error


def family_plugin(name: str) -> FamilyPlugin | None:
    """The plugin that `model.family` names, if it is one.

    Raises:
        ValueError: what it names is no `FamilyPlugin`.
    """
    found = find(FAMILIES, name) if isinstance(name, str) else None
    if found is None or isinstance(found, FamilyPlugin):
        return found
    raise ValueError(f"model.family={name} is a {type(found).__name__}, not a megatron_mm.config.plugins.FamilyPlugin.")
