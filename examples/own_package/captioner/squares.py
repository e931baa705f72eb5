"""Squares of one shade of grey, each with its name."""

from __future__ import annotations

import argparse

from PIL import Image

from megatron_mm.data.codebook import fit_patch_codebook
from megatron_mm.data.shards import Record
from megatron_mm.data.sources.base import Source

SHADES = {"black": 0, "grey": 127, "white": 255}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=60)


def load(args: argparse.Namespace) -> Source:
    pictures = {name: Image.new("L", (8, 8), shade) for name, shade in SHADES.items()}
    names = [list(SHADES)[number % 3] for number in range(args.count)]
    records = [Record(f"{number:04d}", (name, pictures[name])) for number, name in enumerate(names)]
    codebook = fit_patch_codebook(list(pictures.values()), 3, 4, 1, 8, 8, 0)
    return Source("squares", "CC0", "made here", "", {"train": records, "val": records[:3]}, codebook)
