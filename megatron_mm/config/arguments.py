"""Command lines without Hydra: plain key=value arguments into one frozen dataclass, typed and checked like Hydra's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf
from yaml import YAMLError

from megatron_mm.config.compose import ConfigError, build
from megatron_mm.config.validate import out_of_range

T = TypeVar("T")


def parse_arguments(default: T, arguments: Sequence[str]) -> T:
    """`default` with what the command line gives.

    Raises:
        ConfigError: an argument is not key=value, its key is unknown, or its value is not what the key takes.
    """
    return with_values(default, split(arguments))


def parse_own(default: T, arguments: Sequence[str]) -> tuple[T, list[str]]:
    """`parse_arguments` of those whose key is one of `default`, and the others as they are.

    Raises:
        ConfigError: an own key's value is not what it takes.
    """
    keys = {field.name for field in fields(default)}  # type: ignore[arg-type]  # a dataclass
    own = [argument for argument in arguments if argument.partition("=")[0] in keys]
    return parse_arguments(default, own), [argument for argument in arguments if argument not in own]


def split(arguments: Sequence[str]) -> dict[str, str]:
    """key -> text of each key=value; the last one wins."""
    return dict(pairs(arguments))


def pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Key and text of each key=value, in order.

    Raises:
        ConfigError: an argument is not key=value.
    """
    given = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} is not understood: arguments are written key=value.")
        given.append((key, text))
    return given


def with_values(default: T, given: dict[str, str]) -> T:
    """`default` with values for its keys: text as it was typed, all else read as YAML."""
    hints = get_type_hints(type(default))
    values = {key: text if hints.get(key) in (str, str | None) else read_yaml(key, text) for key, text in given.items()}
    config = build(default, values)
    for problem in out_of_range(config):
        raise ConfigError(problem)
    return config


def read_yaml(key: str, text: str) -> Any:
    """The value that `text` has on Hydra's command line."""
    try:
        values: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        return values["value"]
    except YAMLError as error:
        raise ConfigError(f"{key}={text} cannot be read: {str(error).splitlines()[0]}; put texts in quotes.") from error
