"""Corpora as shards: python -m megatron_mm.data.prepare SOURCE --out DIR [options], SOURCE being mnist, emoji, folder,
html, questions, or a package.module of your own.

Writes DIR/train and DIR/val, the image tokenizers that the source fits (DIR/codebook.npz, DIR/vae.pt), and at last
the card DIR/dataset.json (counts, options, licence). With the card in place a second call does nothing; `--force`
starts over.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from megatron_mm.config import plugins
from megatron_mm.config.plugins import find
from megatron_mm.data.files import replacing
from megatron_mm.data.shards import Record, write_shards
from megatron_mm.data.sources.base import Source

SOURCES = ("mnist", "emoji", "folder", "html", "questions")
"""Modules of `megatron_mm.data.sources`, each with `add_arguments(parser)` and `load(args) -> Source`, as a user's own
has them (an import path, or an entry point of the group megatron_mm.sources)."""


def main(argv: list[str] | None = None) -> None:
    """
    Raises:
        ValueError: the source's packages are missing, or the folder was prepared with other options.
    """
    parser = argparse.ArgumentParser(prog="python -m megatron_mm.data.prepare", add_help=False)
    parser.add_argument("source", help=f"{', '.join(SOURCES)}, or package.module of your own")
    known, rest = parser.parse_known_args(argv)
    source = _module(known.source)
    parser = argparse.ArgumentParser(prog=f"{parser.prog} {known.source}", description=source.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--force", action="store_true", help="write again what is already there")
    source.add_arguments(parser)
    args = parser.parse_args(rest)
    options = {name: str(value) for name, value in vars(args).items() if name not in ("out", "force")}
    if args.force or not _complete(args.out, known.source, options):
        write_dataset(args.out, source.load(args), known.source, options)


def _module(name: str) -> Any:
    """The module of a source.

    Raises:
        ValueError: there is none of this name, or its packages are missing.
    """
    if name not in SOURCES:
        if (own := find(plugins.SOURCES, name)) is None:
            raise ValueError(f"{name} is no source: use {', '.join(SOURCES)}, or package.module of your own.")
        return own
    try:
        return importlib.import_module(f"megatron_mm.data.sources.{name}")
    except ModuleNotFoundError as error:
        raise ValueError(f"{name} needs the package {error.name}: pip install 'megatron_mm[demo]'.") from error


def write_dataset(out: Path, source: Source, kind: str, options: dict[str, str]) -> None:
    """Write the splits, the image tokenizers and last the card, replacing what stood there."""
    card_path = out / "dataset.json"
    tokenizers = {out / "codebook.npz": source.codebook, out / "vae.pt": source.vae}
    for old in (card_path, *tokenizers):
        old.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split, records in source.splits.items():
        for old in (out / split).glob("shard-*.tar*"):
            old.unlink()
        tally = Counter(documents=0, images=0)
        silent = not Console().is_terminal
        write_shards(out / split, _counted(track(records, f"{source.name}/{split}", disable=silent), tally))
        counts[split] = dict(tally)
    for path, tokenizer in tokenizers.items():
        if tokenizer:
            tokenizer.save(path)
    card = {
        "name": source.name,
        "kind": kind,
        "options": options,
        "splits": counts,
        "licence": source.licence,
        "origin": source.origin,
        "attribution": source.attribution,
    }
    with replacing(card_path) as temporary:
        temporary.write_text(json.dumps(card, indent=2) + "\n")
    print(f"{out}: " + ", ".join(f"{split} {tally['documents']} documents" for split, tally in counts.items()))


def _counted(records: Iterable[Record], tally: Counter[str]) -> Iterator[Record]:
    for record in records:
        tally["documents"] += 1
        tally["images"] += sum(not isinstance(segment, str) for segment in record.segments)
        yield record


def _complete(out: Path, kind: str, options: dict[str, str]) -> bool:
    """Whether the dataset is there already, as wanted."""
    path = out / "dataset.json"
    if not path.is_file():
        return False
    card = json.loads(path.read_text())
    if (card["kind"], card["options"]) != (kind, options):
        raise ValueError(f"{out} was prepared with other options ({path}). Add --force to write it again.")
    print(f"{out} is complete: nothing to do (--force writes it again).")
    return True


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
