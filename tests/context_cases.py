"""Random packed rows for tests of context parallelism."""

import numpy as np
from hypothesis import strategies as st

from megatron_mm import mask as masks


def draw_mask(data: st.DataObject, rows: int, length: int) -> np.ndarray:
    """Packed rows with spans, hidden ones, windows and padding."""
    made = []
    for _ in range(rows):
        documents, used = [], 0
        while used < length and (n := data.draw(st.integers(0, length - used))) > 4:
            first = data.draw(st.integers(0, n - 2))
            span = [(first, data.draw(st.integers(first + 1, n)))]
            document = masks.with_spans(n, span)
            kind = data.draw(st.sampled_from(["plain", "hidden", "window"]))
            if kind == "hidden":
                document = masks.hide_after(document, span)
            documents.append(masks.window(document, 5) if kind == "window" else document)
            used += n
        made.append(masks.concatenate(documents, length))
    return np.stack(made)
