"""The study's command line: its own keys, and with `data` Hydra overrides as everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from mm_kernels.span_attention.benchmark.distributions import DISTRIBUTIONS

from megatron_mm.benchmark.context.rates import ASSUMED
from megatron_mm.config.arguments import parse_own
from megatron_mm.config.compose import ConfigError

DATA = "data"
"""Name of the distribution that a prepared dataset stands for."""


@dataclass(frozen=True)
class ContextConfig:
    out: str = "benchmarks/context"
    """Folder for table.csv, table.png, simulation.csv and simulation.png."""
    distributions: str = "all"
    """`all`, or names with commas; `data` is the dataset's."""
    lengths: str = "32768,131072,1048576"
    """Of the table's rows, in positions."""
    ranks: str = "2,4,8,16,32,64"
    """Context-parallel sizes; the simulation takes those that fill nodes."""
    seed: int = 0
    """Draws other documents."""
    tokens: str = "8192,16384,65536"
    """Of one GPU in the simulation; nothing (`tokens=`) leaves it out."""
    gpus: str = "H100,H200"
    """Of the simulation."""
    heads: str = "64:8,32:32"
    """Query heads : key heads of the simulated layer; the head size is 128."""
    kernel_csv: str = ""
    """Measured speeds of the kernel, as `python -m mm_kernels.span_attention.benchmark` writes them."""
    data: str = ""
    """Folder of shards (*.tar), whose documents become one more distribution."""
    experiment: str = "benchmark_transfusion"
    """One of configs/experiment, whose family lays those documents out."""


@dataclass(frozen=True)
class Study:
    """What to look at. `names`: distributions in order. `overrides`: Hydra's, for the family."""

    config: ContextConfig
    names: tuple[str, ...]
    lengths: tuple[int, ...]
    ranks: tuple[int, ...]
    tokens: tuple[int, ...]
    gpus: tuple[str, ...]
    heads: tuple[tuple[int, int], ...]
    overrides: tuple[str, ...]


def parse(arguments: Sequence[str]) -> Study:
    """
    Raises:
        ConfigError: an unknown key or name, a value that its key does not take, or a length that ranks do not divide.
    """
    config, overrides = parse_own(ContextConfig(), arguments)
    if overrides and not config.data:
        keys = ", ".join(sorted(field.name for field in fields(config)))
        raise ConfigError(
            f"{overrides[0]} is no key of this study, which takes {keys}; a run's own keys say how "
            "documents are laid out, and need data=FOLDER."
        )
    known = [*DISTRIBUTIONS, *([DATA] if config.data else [])]
    names = known if config.distributions == "all" else _several("distributions", config.distributions, known)
    gpus = _several("gpus", config.gpus, list(ASSUMED))
    lengths, ranks = _numbers("lengths", config.lengths), _numbers("ranks", config.ranks)
    tokens = _numbers("tokens", config.tokens) if config.tokens else ()
    for length in lengths:
        for count in ranks:
            if length % (2 * count):
                raise ConfigError(f"lengths={length} must be a multiple of 2 x ranks={count}; change one of them.")
    for count in tokens:
        if count % 2:
            raise ConfigError(f"tokens={count} must be even, since a zigzag cuts every part in two.")
    if config.kernel_csv and not Path(config.kernel_csv).is_file():
        raise ConfigError(f"kernel_csv={config.kernel_csv} is no file; leave it out to take published speeds.")
    heads = tuple(_heads(pair) for pair in config.heads.split(","))
    return Study(config, tuple(names), lengths, ranks, tokens, tuple(gpus), heads, tuple(overrides))


def _several(key: str, text: str, known: Sequence[str]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            hint = " data needs data=FOLDER." if name == DATA else ""
            raise ConfigError(f"{key}={name} is unknown; {key}: {', '.join(known)}.{hint}")
    return names


def _numbers(key: str, text: str) -> tuple[int, ...]:
    parts = text.split(",")
    for part in parts:
        if not part.isdecimal() or not int(part):
            raise ConfigError(f"{key}={text} must be whole numbers above 0 with commas, which {part!r} is not.")
    return tuple(map(int, parts))


def _heads(text: str) -> tuple[int, int]:
    heads, _, key_heads = text.partition(":")
    if not (heads.isdecimal() and key_heads.isdecimal() and int(key_heads) and int(heads)) or (
        int(heads) % int(key_heads)
    ):
        raise ConfigError(f"heads={text} must be QUERY_HEADS:KEY_HEADS, the first a multiple of the second.")
    return int(heads), int(key_heads)
