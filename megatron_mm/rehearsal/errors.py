"""Where in our code, or in megatron-core's, something happens."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

_OWN = {"megatron", "megatron_mm", "mm_kernels"}


class RehearsalError(ValueError):
    """What a GPU would refuse, or make wrong: the message says what and where."""


def place(depth: int = 3) -> str:
    """`folder/file:line` of the innermost callers outside torch and this package, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    found: list[str] = []
    while frame is not None and len(found) < depth:
        path = Path(frame.f_code.co_filename)
        if path.parent.name != "rehearsal" and _OWN & set(path.parts):
            found.append(f"{path.parent.name}/{path.name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)
