"""Parts of equal length and nearly equal area, whatever the mask; and how they are cut."""

import numpy as np
import pytest
from context_cases import draw_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_kernels.span_attention.benchmark.distributions import DISTRIBUTIONS
from mm_kernels.span_attention.benchmark.distributions import mask as named_mask

from megatron_mm import mask as masks
from megatron_mm.parallel.context.assignment import assign, chunk_areas, contiguous, zigzag
from megatron_mm.parallel.context.schedule import needs


def imbalance(mask: np.ndarray, assignment) -> float:
    loads = chunk_areas(mask, assignment.chunk_size)[assignment.chunks].sum(1)
    return loads.max() / loads.mean()


@pytest.mark.parametrize("ranks", [2, 8, 64])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_named_distributions_come_out_even(name, ranks):
    mask = named_mask(name, 65536)[None]
    assignment = assign(mask, ranks)
    assert imbalance(mask, assignment) <= 1.03
    assert assignment.part == 65536 // ranks


def test_a_million_tokens_over_64_ranks():
    mask = named_mask("interleaved", 2**20)[None]
    assert imbalance(mask, assign(mask, 64)) <= 1.03 < imbalance(mask, zigzag(2**20, 64))


@pytest.mark.parametrize("name", ["docs", "interleaved", "mmada"])
def test_parts_keep_to_nodes(name):
    mask = named_mask(name, 2**17)[None]
    flat, by_nodes = (assign(mask, 32, node_size) for node_size in (1, 8))
    assert imbalance(mask, by_nodes) <= 1.03

    def crossing(assignment) -> int:
        counts = needs(mask, assignment).counts().reshape(4, 8, 4, 8).sum((1, 3))
        return counts.sum() - counts.trace()

    assert crossing(by_nodes) < 0.8 * crossing(flat)


def test_one_causal_document_is_mirrored():
    mask = masks.concatenate([masks.causal(512)], 512)[None]
    ours, mirrored = assign(mask, 4), zigzag(512, 4)
    assert ours.chunk_size == mirrored.chunk_size == 64
    assert imbalance(mask, ours) == imbalance(mask, mirrored) == 1.0
    assert {frozenset(row) for row in ours.chunks} == {frozenset(row) for row in mirrored.chunks}


def test_even_rows_stay_in_one_piece():
    mask = masks.concatenate([masks.full(512)], 512)[None]
    assert np.array_equal(np.concatenate([assign(mask, 4).positions(rank) for rank in range(4)]), np.arange(512))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data())
def test_areas_are_the_dense_masks(data):
    mask = draw_mask(data, 2, 96)
    dense = sum(masks.dense(row) for row in mask)
    assert np.array_equal(chunk_areas(mask, 8), dense.reshape(12, 8, 96).sum((1, 2)))


@pytest.mark.usefixtures("small_chunks")
@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data(), st.sampled_from([2, 3, 4, 6]), st.sampled_from([1, 2, 8]))
def test_every_position_has_one_rank(data, ranks, node_size):
    mask = draw_mask(data, 1, 192)
    assignment = assign(mask, ranks, node_size)
    parts = [assignment.positions(rank) for rank in range(ranks)]
    assert all(len(part) == 192 // ranks and (np.diff(part) > 0).all() for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(192))
    assert np.array_equal(assign(mask.copy(), ranks, node_size).chunks, assignment.chunks), (
        "every rank comes to the same"
    )
    if chunk_areas(mask, 192).any():
        assert imbalance(mask, assignment) <= imbalance(mask, contiguous(192, ranks)) + 1e-9


def test_lengths_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="100 positions cannot be cut into 3 equal parts"):
        assign(masks.concatenate([masks.causal(100)], 100)[None], 3)
