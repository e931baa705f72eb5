"""A rehearsal as tables: memory, launches, kinds of operation, messages, host synchronisations, the step's time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields

from rich.table import Table

from megatron_mm.plan.memory import usable
from megatron_mm.rehearsal.record import AGAIN, BACKWARD, FORWARD, Sums
from megatron_mm.rehearsal.run import Rehearsal
from megatron_mm.rehearsal.search import Candidate
from megatron_mm.rehearsal.step import StepTime

Stages = Mapping[str, Rehearsal]
"""Name of a pipeline stage -> what one of its ranks did."""


PLACES = {"front": 0, "further": 2, "back": 3}
"""Of the parts beside the layers, which stand at 1."""


def tables(stages: Stages, step: StepTime, gpu_gigabytes: float) -> Iterator[Table]:
    yield memory_table(stages, gpu_gigabytes)
    yield parts_table(stages)
    yield kinds_table(stages)
    yield collectives_table(stages)
    yield syncs_table(stages)
    yield step_table(step)


def memory_table(stages: Stages, gpu_gigabytes: float) -> Table:
    table = _table("peak memory, GB", stages)
    owners = sorted({name for each in stages.values() for name in each.peak.by})
    held = {name: [each.peak.by.get(name, 0) / 1e9 for each in stages.values()] for name in owners}
    for name in sorted(owners, key=lambda owner: -max(held[owner])):
        if max(held[name]) >= 0.005:
            table.add_row(name, *(f"{gigabytes:.2f}" for gigabytes in held[name]))
    most = max(each.peak.total for each in stages.values()) / 1e9
    verdict = "fits" if most * 1e9 < usable(gpu_gigabytes) else "does not fit"
    table.add_row(f"total ({verdict} {gpu_gigabytes:g} GB)", *(f"{e.peak.total / 1e9:.2f}" for e in stages.values()))
    table.caption = f"The fullest: {most:.2f} GB, without the CUDA context and NCCL's buffers (1 to 2 GB)."
    return table


def parts_table(stages: Stages) -> Table:
    """Kernels of one micro-batch in each part, and of a step."""
    table = _table("kernels, bytes kept", stages)
    for part, direction in _in_order(stages):
        table.add_row(f"{part}, {direction}", *(_per_pass(each, part, direction) for each in stages.values()))
    for name, once in (("a micro-batch", False), ("once a step", True)):
        table.add_row(name, *(f"{_launches(each, once):,.0f}" for each in stages.values()))
    table.add_row("a step", *(f"{_launches(e, True) + e.of * _launches(e, False):,.0f}" for e in stages.values()))
    return table


def _in_order(stages: Stages) -> list[tuple[str, str]]:
    """The parts to show: of the layers one, the second where there are two; the first one builds what all share."""
    order = {FORWARD: 0, AGAIN: 1, BACKWARD: 2}
    found = []
    for each in stages.values():
        layers = sorted({part for part, _ in each.record.parts if part.startswith("layer ")}, key=lambda n: int(n[6:]))
        shown = {*layers[1:2], *PLACES}
        found += [key for key in each.record.parts if key[0] in shown and key not in found]
    return sorted(found, key=lambda key: (PLACES.get(key[0], 1), key[0], order.get(key[1], 3)))


def _per_pass(rehearsal: Rehearsal, part: str, direction: str) -> str:
    sums = rehearsal.record.parts.get((part, direction))
    if sums is None:
        return ""
    kept = f", {sums.kept / rehearsal.micro_batches / 1e6:,.1f} MB" if direction == FORWARD else ""
    return f"{sums.launches / rehearsal.micro_batches:,.0f}{kept}"


def _launches(rehearsal: Rehearsal, once: bool) -> float:
    return rehearsal.record.total(once).launches / (1 if once else rehearsal.micro_batches)


def kinds_table(stages: Stages) -> Table:
    table = _table("operations of a rehearsed step", stages)
    for kind in sorted({kind for each in stages.values() for kind in each.record.kinds}):
        table.add_row(kind, *(_kind(each.record.kinds[kind]) for each in stages.values()))
    counts = ", ".join(f"{each.micro_batches} of {each.of}" for each in stages.values())
    table.caption = f"Micro-batches rehearsed: {counts}."
    return table


def _kind(sums: Sums) -> str:
    flops = f"{sums.flops / 1e12:.2f} TFLOP, " if sums.flops else ""
    return f"{sums.launches:,} kernels, {flops}{sums.bytes / 1e9:.2f} GB, {1e3 * sums.seconds:.2f} ms"


def collectives_table(stages: Stages) -> Table:
    table = _table("communication of a rehearsed step", stages)
    for group, kind in sorted({key for each in stages.values() for key in each.record.collectives}):
        cells = (each.record.collectives.get((group, kind)) for each in stages.values())
        texts = (
            f"{c.calls:,} x {c.bytes / c.calls / 1e6:,.3f} MB, {1e3 * c.seconds:.2f} ms" if c else "" for c in cells
        )
        table.add_row(f"{group}: {kind}", *texts)
    return table


def syncs_table(stages: Stages) -> Table:
    table = _table("host synchronisations", stages)
    for once, name in ((False, "inside micro-batches"), (True, "once a step")):
        found = [each.record.syncs_of(once) for each in stages.values()]
        table.add_row(name, *(str(sum(counter.values())) for counter in found), style="bold")
        for what, where in sorted({key for counter in found for key in counter}):
            table.add_row(f"  {what}: {where}", *(str(counter[what, where]) for counter in found))
    return table


def step_table(step: StepTime) -> Table:
    table = Table("a step, by roofline")
    table.add_column("", justify="right")
    texts: dict[str, Callable[[float], str]] = {
        "tokens_per_second": lambda value: f"{value:,.0f}",
        "mfu": lambda value: f"{value:.1%}",
    }
    for field in fields(step):
        text = texts.get(field.name, lambda value: f"{value:.4f} s")
        table.add_row(field.name.replace("_", " "), text(getattr(step, field.name)))
    table.add_row("total", f"{step.total:.4f} s", style="bold")
    table.caption = "From stated rates: no GPU was asked. What overlaps is beside, what does not is between kernels."
    return table


def search_table(found: Sequence[Candidate], gpu_gigabytes: float) -> Table:
    table = Table("layout", caption=f"Rehearsed; of {gpu_gigabytes:g} GB a tenth has to stay free.")
    for name in ("step, s", "tokens/s/GPU", "MFU", "peak, GB", ""):
        table.add_column(name, justify="right")
    for each in found:
        step = each.step
        numbers = (
            f"{step.total:.3f}",
            f"{step.tokens_per_second:,.0f}",
            f"{step.mfu:.1%}",
            f"{each.peak_bytes / 1e9:.1f}",
        )
        table.add_row(each.describe(), *numbers, "" if each.fits else "does not fit")
    return table


def _table(title: str, stages: Stages) -> Table:
    table = Table(title)
    for name in stages:
        table.add_column(name, justify="right")
    return table
