"""pyproject.toml names every package by hand, since two of them live in folders of another name."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"megatron_mm_configs"}
    for base, folder in ("megatron_mm", ROOT / "megatron_mm"), ("mm_kernels", ROOT / "kernels" / "mm_kernels"):
        found |= {".".join((base, *path.parent.relative_to(folder).parts)) for path in folder.rglob("__init__.py")}
    assert set(settings["packages"]) == found
