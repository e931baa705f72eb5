"""Documents of families that do not decide themselves when an image begins: text and images take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_mm.sampling.row import Row
from megatron_mm.types import ImageSegment


def take_turns(
    rows: Sequence[Row],
    fits: Callable[[Row], bool],
    draw: Callable[[list[Row]], None],
    write: Callable[[list[Row]], list[Row]],
) -> None:
    """An image goes behind text and text behind an image, until a row's text is empty or no image fits.

    Args:
        fits: whether a row has room for an image. draw: adds an image to each row. write: adds text to each row, and
            returns those that go on.
    """
    rows = [*write([row for row in rows if _ends_in_image(row)]), *(row for row in rows if not _ends_in_image(row))]
    while rows := [row for row in rows if fits(row)]:
        draw(rows)
        rows = write(rows)


def _ends_in_image(row: Row) -> bool:
    segments = row.request.prompt.segments
    return bool(segments) and isinstance(segments[-1], ImageSegment)
