"""The interval mask against its dense definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm import mask as masks


@st.composite
def documents(draw):
    """A document's mask with random spans, window and hidden spans."""
    n = draw(st.integers(1, 24))
    points = sorted(draw(st.lists(st.integers(0, n), max_size=6, unique=True)))
    spans = list(zip(points[::2], points[1::2], strict=False))
    mask = masks.with_spans(n, spans)
    if draw(st.booleans()):
        mask = masks.window(mask, draw(st.integers(1, n)))
    if draw(st.booleans()):
        mask = masks.hide_after(mask, spans)
    return mask


def test_causal_full_and_prefix_are_what_their_names_say():
    n = 7
    query, key = np.mgrid[:n, :n]
    np.testing.assert_array_equal(masks.dense(masks.causal(n)), key <= query)
    np.testing.assert_array_equal(masks.dense(masks.full(n)), np.ones((n, n), bool))
    np.testing.assert_array_equal(masks.dense(masks.prefix(n, 3)), (key <= query) | (key < 3))


def test_spans_see_themselves_and_the_past():
    query, key = np.mgrid[:9, :9]
    inside = lambda a, b: (query >= a) & (query < b) & (key >= a) & (key < b)  # noqa: E731
    expected = (key <= query) | inside(1, 4) | inside(6, 8)
    np.testing.assert_array_equal(masks.dense(masks.with_spans(9, [(1, 4), (6, 8)])), expected)


def test_window_bounds_the_reach_backwards():
    query, key = np.mgrid[:9, :9]
    expected = (key <= query) & (query - key < 3)
    np.testing.assert_array_equal(masks.dense(masks.window(masks.causal(9), 3)), expected)


def test_hidden_span_is_seen_by_itself_only():
    dense = masks.dense(masks.hide_after(masks.with_spans(8, [(2, 5)]), [(2, 5)]))
    assert dense[2:5, 2:5].all()
    assert not dense[5:, 2:5].any()
    assert dense[7, [0, 1, 5, 6, 7]].all()


@settings(deadline=None, max_examples=150)
@given(st.lists(documents(), max_size=4), st.integers(0, 9))
def test_packing_is_block_diagonal_and_padding_sees_nothing(parts, padding):
    used = sum(part.shape[1] for part in parts)
    row = masks.concatenate(parts, used + padding)
    masks.validate(row)
    expected = np.zeros((used + padding, used + padding), bool)
    offset = 0
    for part in parts:
        n = part.shape[1]
        expected[offset : offset + n, offset : offset + n] = masks.dense(part)
        offset += n
    np.testing.assert_array_equal(masks.dense(row), expected)
    assert masks.area(row) == expected.sum()


def test_packing_marks_keys_that_nothing_hides_with_the_row_length():
    row = masks.concatenate([masks.causal(3), masks.hide_after(masks.causal(4), [(0, 2)])], 10)
    assert row.dtype == np.int32
    assert row[2].tolist() == [10, 10, 10, 5, 5, 10, 10, 10, 10, 10]
    assert row[:2, 7:].tolist() == [[7, 7, 7], [7, 7, 7]]


def test_documents_longer_than_the_row_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        masks.concatenate([masks.causal(5), masks.causal(4)], 8)


@pytest.mark.parametrize(
    ("row", "value", "message"),
    [(0, 3, "lo > hi"), (1, 0, "lo > hi|hi smaller"), (1, 9, "outside"), (2, -1, "outside")],
)
def test_validate_names_what_is_broken(row, value, message):
    broken = masks.window(masks.causal(6), 3)
    broken[row, 1] = value
    with pytest.raises(ValueError, match=message):
        masks.validate(broken)


def test_validate_refuses_decreasing_bounds_and_other_types():
    falling = masks.full(4)
    falling[0] = [1, 0, 0, 0]
    with pytest.raises(ValueError, match="lo smaller than the position before at position 1"):
        masks.validate(falling)
    with pytest.raises(ValueError, match="int32"):
        masks.validate(masks.causal(4).astype(np.int64))
