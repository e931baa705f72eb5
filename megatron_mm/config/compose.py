"""From Hydra's nested dictionary to one frozen, typed `Config`, with errors that say what to type instead.

YAML and command line meet in Hydra; everything behind this file reads dataclasses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, is_dataclass, replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from megatron_mm.config.flow import ShowoFlowConfig
from megatron_mm.config.janus import JanusConfig
from megatron_mm.config.masked import MMaDAConfig, ShowoConfig
from megatron_mm.config.model import ChameleonConfig, TransfusionConfig
from megatron_mm.config.plugins import family_plugin
from megatron_mm.config.schema import (
    AttentionConfig,
    CheckpointConfig,
    DataConfig,
    FusionConfig,
    LoggingConfig,
    LoraConfig,
    OptimConfig,
    ParallelConfig,
    ProfileConfig,
    RunConfig,
    TrainConfig,
)
from megatron_mm.config.unimoe import UniMoEConfig

ModelConfig = (
    TransfusionConfig | ChameleonConfig | JanusConfig | ShowoConfig | ShowoFlowConfig | MMaDAConfig | UniMoEConfig
)
FAMILIES: dict[str, type[ModelConfig]] = {
    "transfusion": TransfusionConfig,
    "chameleon": ChameleonConfig,
    "janus": JanusConfig,
    "showo": ShowoConfig,
    "showo_flow": ShowoFlowConfig,
    "mmada": MMaDAConfig,
    "unimoe": UniMoEConfig,
}

CONFIG_MODULE = "megatron_mm_configs"
CONFIG_NAME = "config"

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}

T = TypeVar("T")


class ConfigError(ValueError):
    """A mistake in the configuration, in one sentence that names the key."""


@dataclass(frozen=True)
class Config:
    """A whole run. Each attribute but the last is one Hydra group."""

    model: ModelConfig = TransfusionConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()
    logging: LoggingConfig = LoggingConfig()
    attention: AttentionConfig = AttentionConfig()
    fusion: FusionConfig = FusionConfig()
    profile: ProfileConfig = ProfileConfig()
    lora: LoraConfig = LoraConfig()
    stages: tuple[str, ...] = ()
    """Options of the group `stage`, which `megatron_mm.stages` runs one after the other."""


def compose(overrides: list[str]) -> Config:
    """The configuration that the same overrides give on the command line: `compose(["experiment=demo"])`.

    Raises:
        ConfigError: an unknown key or option, a value of the wrong type, a key that is not set.
    """
    # Within a task of `cli.run` Hydra is up already, with the same groups.
    running = GlobalHydra.instance().is_initialized()
    try:
        with nullcontext() if running else hydra.initialize_config_module(CONFIG_MODULE, version_base="1.3"):
            cfg = hydra.compose(CONFIG_NAME, overrides)
    except HydraException as error:
        raise explain(error) from error
    return from_dict_config(cfg)


def from_dict_config(cfg: DictConfig) -> Config:
    """What Hydra composed, as frozen dataclasses; keys that are left out take the dataclasses' defaults.

    Raises:
        ConfigError: see `compose`.
    """
    for key in _missing_keys(OmegaConf.to_container(cfg), ""):
        raise ConfigError(f"{key} is not set: add {key}=... or choose an experiment=NAME that sets it.")
    try:
        groups: dict[Any, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key} cannot be resolved: {str(error).partition(chr(10))[0]}.") from error
    return build(replace(Config(), model=_family_default(groups.get("model", {}))), groups)


def to_yaml(config: Config) -> str:
    """The configuration as YAML; `from_dict_config` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def explain(error: HydraException) -> ConfigError:
    """Hydra's message as one sentence of ours."""
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        prefix, _, name = str(cause.full_key).rpartition(".")
        return _unknown(prefix, name, [str(key) for key in cause.parent_node or () if key != "hydra"])
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = str(error.missing_cfg_file).partition("/")
        folder = Path(str(files(CONFIG_MODULE))) / group
        options = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
        meant = _did_you_mean(option, options, f"{group}=")
        return ConfigError(f"{group}={option} does not exist{meant}; options: {', '.join(options)}.")
    text = ": ".join(str(error).partition("\nSee ")[0].splitlines()).rstrip(".")
    return ConfigError(f"{text}; an override is written key=value.")


def _missing_keys(node: Any, prefix: str) -> Iterator[str]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _missing_keys(value, _join(prefix, name))
    elif node == MISSING:
        yield prefix


def _family_default(model: Any) -> ModelConfig:
    family = model.get("family") if isinstance(model, dict) else model
    if family in FAMILIES:
        return FAMILIES[family]()
    try:
        plugin = family_plugin(str(family))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if plugin is None:
        raise ConfigError(
            f"model.family={family} is unknown; families: {', '.join(FAMILIES)}, or package.module:PLUGIN of your own."
        )
    config: ModelConfig = replace(plugin.config(), family=family)
    return config


def build(default: T, node: Any, prefix: str = "") -> T:
    """`default`, a dataclass, with the values of the dictionary `node`, recursively.

    Raises:
        ConfigError: an unknown key or a value of the wrong type.
    """
    hints = get_type_hints(type(default))
    if not isinstance(node, dict):
        raise ConfigError(f"{prefix}={node} must be a group with the keys {', '.join(hints)}.")
    values = {}
    for name, value in node.items():
        if name not in hints:
            nested = any(is_dataclass(getattr(default, field)) for field in hints)
            raise _unknown(prefix, name, hints, "groups" if nested else "keys")
        key, old = _join(prefix, name), getattr(default, name)
        values[name] = build(old, value, key) if is_dataclass(old) else _value(key, value, hints[name])
    return replace(default, **values)  # type: ignore[type-var]


def _value(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`: tuple[X, ...], dict[str, X], or what `_leaf` takes; X may be a dataclass."""
    if is_dataclass(hint):
        item = build(hint(), value, key)  # type: ignore[operator]
        for missing in _missing_keys(asdict(item), key):
            raise ConfigError(f"{missing} is not set: add it to the entry.")
        return item
    kind = next((kind for kind in (hint, *get_args(hint)) if get_origin(kind) in (tuple, dict)), None)
    if kind is None or (value is None and NoneType in get_args(hint)):
        return _leaf(key, value, hint)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{key}={value} must be a list such as [a, b].")
        return tuple(_value(f"{key}[{i}]", item, get_args(kind)[0]) for i, item in enumerate(value))
    if not isinstance(value, dict):
        raise ConfigError(f"{key}={value} must be a mapping such as {{a: 1}}.")
    return {name: _value(_join(key, str(name)), item, get_args(kind)[1]) for name, item in value.items()}


def _leaf(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint` (X or X | None), or the error that says what is expected."""
    kinds = get_args(hint) or (hint,)
    if value is None and NoneType in kinds:
        return None
    kind = kinds[0]
    if type(value) is int and kind in (float, str):
        return kind(value)
    if type(value) is not kind:
        shown = "null" if value is None else value
        raise ConfigError(f"{key}={shown} must be {KINDS[kind]}{' or null' if NoneType in kinds else ''}.")
    return value


def _unknown(prefix: str, name: str, known: Iterable[str], what: str = "groups") -> ConfigError:
    known = list(known)
    meant = _did_you_mean(name, known, f"{prefix}." if prefix else "")
    within = f"keys of {prefix}" if prefix else what
    return ConfigError(f"{_join(prefix, name)} is not a known key{meant}; {within}: {', '.join(known) or 'none'}.")


def _did_you_mean(name: str, known: Iterable[str], prefix: str) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
