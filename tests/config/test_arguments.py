"""key=value command lines: typed, checked, and every mistake one sentence."""

from dataclasses import dataclass

import pytest

from megatron_mm.config.arguments import parse_arguments
from megatron_mm.config.compose import ConfigError


@dataclass(frozen=True)
class Plain:
    run: str = "runs/demo"
    note: str | None = None
    count: int = 3
    scale: float | None = None
    names: bool = False


def test_values_take_their_keys_type():
    given = ["run=1e3", "note=[a, b", "count=7", "scale=2", "names=true"]
    assert parse_arguments(Plain(), given) == Plain("1e3", "[a, b", 7, 2.0, True)
    assert parse_arguments(Plain(), []) == Plain()
    assert parse_arguments(Plain(count=1), ["count=2", "count=3", "run=a=b"]) == Plain("a=b", count=3)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("count", r"'count' is not understood: arguments are written key=value"),
        ("cuont=1", r"cuont is not a known key \(did you mean count\?\)"),
        ("count=many", r"count=many must be a whole number"),
        ("count=0", r"count=0 must be 1 or more"),
        ("scale=[1", r"scale=\[1 cannot be read"),
        ("names=yes please", r"names=yes please must be true or false"),
    ],
)
def test_mistake_is_one_sentence(argument, said):
    with pytest.raises(ConfigError, match=said):
        parse_arguments(Plain(), [argument])
