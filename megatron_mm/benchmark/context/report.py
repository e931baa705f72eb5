"""What the study leaves behind on the console and in CSV files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_mm.benchmark.context import simulation, table
from megatron_mm.benchmark.context.rates import PUBLISHED, published_share

SHOWN = (8, 64)
"""Ranks in the console's first table."""
PEERS = ("zigzag ring", "all-gather")
LOSSES = ("imbalance", "latency", "network")


def write(path: Path, lines: Sequence[table.Line] | Sequence[simulation.Line]) -> None:
    """One row a line; numbers with 4 digits, `yes` or nothing, and nothing where there is no figure."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(lines[0])])
        writer.writerows(map(_text, asdict(line).values()) for line in lines)


def _text(cell: object) -> object:
    if isinstance(cell, bool):
        return "yes" if cell else ""
    return f"{round(cell, 6):.4g}" if isinstance(cell, float) else cell


def show_table(console: Console, lines: Sequence[table.Line]) -> None:
    """A table for each length, and every line of ours that misses a goal."""
    by_place = {(line.length, line.distribution, line.ranks, line.way): line for line in lines}
    sizes = sorted({line.ranks for line in lines})
    loads, shares = ("ours", "contiguous", "zigzag"), ("ours", "ours, ring", "contiguous", "zigzag", "all-gather")
    for length in dict.fromkeys(line.length for line in lines):
        headers = [
            "CP",
            "chunks",
            *(f"load\n{way}" for way in loads),
            *(f"keys\n{way}" for way in shares),
            "least\nours",
        ]
        view = _view(f"{length} positions: largest load over the mean, and keys received, % of the row", headers)
        for name in dict.fromkeys(line.distribution for line in lines):
            for ranks in [size for size in sizes if size in SHOWN] or sizes:
                ways = {way: by_place[length, name, ranks, way] for way in shares}
                ours = ways["ours"]
                cells = [f"{ways[way].imbalance:.3f}" for way in loads]
                cells += [f"{100 * share:.2f}" for share in (*(ways[way].received for way in shares), ours.least)]
                view.add_row(name, str(ranks), f"{ours.chunks}x{ours.chunk_size}", *cells)
        console.print(view)
    balanced = [line for line in lines if line.way == "ours"]
    missed = [line for line in balanced if line.misses]
    console.print(
        f"{len(balanced) - len(missed)} of {len(balanced)} are balanced to {table.IMBALANCE} with at most "
        f"{table.RATIO} x the keys that cannot be done without."
    )
    for line in missed:
        place = f"{line.distribution}, {line.length} positions, {line.ranks} ranks"
        console.print(f"missed: {place}: load {line.imbalance:.3f}, keys {line.ratio:.3f} x the least")


def show_simulation(console: Console, lines: Sequence[simulation.Line]) -> None:
    """Efficiencies on the first GPU with the first heads, and how they scale beside MagiAttention's published rates."""
    gpu, heads = lines[0].gpu, lines[0].heads
    shown = [line for line in lines if (line.gpu, line.heads) == (gpu, heads)]
    sizes = list(dict.fromkeys(line.ranks for line in shown))
    view = _view(
        f"Simulated, not measured: % of perfect scaling, {gpu}, {heads} heads, {speed(shown)} kernel speed.\n"
        f"ours (what loses most: {', '.join(LOSSES)}) | {' | '.join(PEERS)}",
        ["tokens a GPU", *(f"CP {ranks}" for ranks in sizes)],
    )
    best = best_of_ours(shown)
    peers = {(line.distribution, line.tokens, line.ranks, line.way): line.efficiency for line in shown}
    for name, tokens in dict.fromkeys((line.distribution, line.tokens) for line in shown):
        cells = []
        for ranks in sizes:
            ours = best[name, tokens, ranks]
            loss = max(LOSSES, key=lambda loss, line=ours: getattr(line, loss))
            others = [f"{100 * peers[name, tokens, ranks, way]:.0f}" for way in PEERS]
            cells.append(" | ".join([f"{100 * ours.efficiency:.0f} {loss[:3]}", *others]))
        view.add_row(name, str(tokens), *cells)
    console.print(view)
    published = ", ".join(f"CP {ranks}: {published_share(ranks):.0%}" for ranks in PUBLISHED)
    console.print(f"Published, other masks and nodes: MagiAttention's rate over its own at CP 8: {published}.")
    scaling = {ranks: best["docs", 8192, ranks].efficiency for ranks in sizes if ("docs", 8192, ranks) in best}
    if 8 in scaling:
        shares = ", ".join(f"CP {ranks}: {share / scaling[8]:.0%}" for ranks, share in scaling.items())
        console.print(f"Simulated, ours on docs at 8192 tokens a GPU, likewise: {shares}.")


def best_of_ours(lines: Sequence[simulation.Line]) -> dict[tuple[str, int, int], simulation.Line]:
    """(distribution, tokens, ranks) -> the line of ours with the highest efficiency."""
    best: dict[tuple[str, int, int], simulation.Line] = {}
    for line in lines:
        place = line.distribution, line.tokens, line.ranks
        if line.way not in PEERS and (place not in best or line.efficiency > best[place].efficiency):
            best[place] = line
    return best


def speed(lines: Sequence[simulation.Line]) -> str:
    """`measured`, `assumed`, or both."""
    return " or ".join(sorted({line.rates for line in lines}, reverse=True))


def _view(title: str, columns: Sequence[str]) -> Table:
    view = Table("mask", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for column in columns:
        view.add_column(column, justify="right")
    return view
