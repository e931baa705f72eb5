"""What a row of the cache holds, so that a document that begins alike need not be read again from its start."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from megatron_mm.types import Document


class Held:
    """Tokens int64 [n], ends of their keys int32 [n] and fields [n, ...] of the cached positions of one row."""

    def __init__(self) -> None:
        self._length = 0
        self._pieces: list[dict[str, np.ndarray]] = []

    def __len__(self) -> int:
        return self._length

    def add(
        self, tokens: torch.Tensor, hi: torch.Tensor, fields: Mapping[str, torch.Tensor], row: int, count: int
    ) -> None:
        """The first `count` positions of tokens [n], hi [n] and row `row` of fields [b, n, ...] follow."""
        if count:
            piece = {"tokens": tokens, "hi": hi, **{f"field {name}": values[row] for name, values in fields.items()}}
            self._pieces.append({name: values[:count].cpu().numpy() for name, values in piece.items()})
            self._length += count

    def keep(self, count: int) -> None:
        """Forgets all positions but the first `count`."""
        self._pieces = [{name: values[:count] for name, values in self._joined().items()}] if count else []
        self._length = count

    def common(self, document: Document) -> int:
        """How many of a document's first positions need not be read again: they are held, see nothing that is not, and
        leave at least one to read."""
        if not self._length:
            return 0
        wanted = {"tokens": document.tokens, "hi": document.mask[1]}
        wanted |= {f"field {name}": values for name, values in document.fields.items()}
        n = min(self._length, len(document.tokens) - 1)
        same = np.ones(n, dtype=bool)
        for name, values in self._joined().items():
            differs = values[:n] != wanted[name][:n].astype(values.dtype)
            same &= ~differs.reshape(n, -1).any(axis=1)
        same = np.logical_and.accumulate(same)
        whole = np.maximum.accumulate(document.mask[1, :n]) <= np.arange(1, n + 1)
        ends = np.flatnonzero(same & whole)
        return int(ends[-1]) + 1 if len(ends) else 0

    def _joined(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate([piece[name] for piece in self._pieces]) for name in self._pieces[0]}
