import numpy as np
import pytest
import torch

from megatron_mm import mask
from megatron_mm.data.pack import pack
from megatron_mm.types import Document, FieldSpec

FIELDS = {"labels": FieldSpec("int64", (), -100), "pixels": FieldSpec("float32", (2,), 0.5)}
S = 24


def make_document(uid: int, n: int, span: tuple[int, int] | None = None) -> Document:
    """n tokens; `span` is a bidirectional image of one row that nothing behind it sees."""
    spans = [span] if span else []
    images = [(a, 1, b - a) for a, b in spans]
    return Document(
        uid,
        np.arange(n) + 100 * uid,
        mask.hide_after(mask.with_spans(n, spans), spans),
        {"labels": np.arange(n) + 7, "pixels": np.full((n, 2), uid, np.float32)},
        np.array(images, np.int32).reshape(-1, 3),
    )


ROWS = [[make_document(1, 9, (2, 6)), make_document(2, 5), make_document(3, 8, (0, 3))], [make_document(4, 24, (5, 9))]]
KEYS = [[11, 12, 13], [14]]


@pytest.fixture
def batch():
    return pack(ROWS, S, FIELDS, pad=999, dropout_keys=KEYS)


def test_mask_equals_the_documents_masks_on_the_diagonal(batch):
    for row, documents in enumerate(ROWS):
        expected = np.zeros((S, S), dtype=bool)
        start = 0
        for document in documents:
            end = start + len(document.tokens)
            expected[start:end, start:end] = mask.dense(document.mask)
            start = end
        packed = batch.mask[row].numpy()
        mask.validate(packed)
        assert np.array_equal(mask.dense(packed), expected)


def test_tokens_positions_keys_and_fields(batch):
    assert batch.tokens.dtype == torch.int64 and batch.meta.dtype == torch.int32
    assert batch.tokens[0].tolist() == [*range(100, 109), *range(200, 205), *range(300, 308), 999, 999]
    assert batch.meta[0, 3].tolist() == [*range(9), *range(5), *range(8), 0, 0]
    assert batch.meta[0, 4].tolist() == [11] * 9 + [12] * 5 + [13] * 8 + [0, 0]
    assert batch.fields["labels"][0].tolist() == [*range(7, 16), *range(7, 12), *range(7, 15), -100, -100]
    assert batch.fields["pixels"].shape == (2, S, 2) and batch.fields["pixels"].dtype == torch.float32
    assert batch.fields["pixels"][0, -3:, 0].tolist() == [3, 0.5, 0.5]


def test_padding_sees_and_is_seen_by_nothing(batch):
    lo, hi, until = batch.mask[0, :, 22:]
    assert lo.tolist() == hi.tolist() == [22, 22]
    assert until.tolist() == [S, S]


def test_images_and_counts(batch):
    assert batch.images.dtype == np.int32
    assert batch.images.tolist() == [[0, 2, 1, 4], [0, 14, 1, 3], [1, 5, 1, 4]]
    assert (batch.documents, batch.real_tokens) == (4, 22 + 24)


def test_no_images_at_all():
    batch = pack([[make_document(1, 3)]], 4, FIELDS, 0, [[1]])
    assert batch.images.shape == (0, 4) and batch.images.dtype == np.int32


def test_overflow_is_a_bug_and_stops():
    with pytest.raises(AssertionError, match="row 0 overflows at document 3"):
        pack(ROWS[:1], 21, FIELDS, 0, KEYS[:1])
