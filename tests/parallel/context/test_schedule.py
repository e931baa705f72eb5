"""Schedules bring every rank the keys that its queries need, and no others; what one rank sends, another awaits."""

import numpy as np
import pytest
from context_cases import draw_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm import mask as masks
from megatron_mm.parallel.context.assignment import assign, contiguous
from megatron_mm.parallel.context.schedule import exchange, exchange_distances, needs, relayed_counts, ring

pytestmark = pytest.mark.usefixtures("small_chunks")
LENGTH = 192


def seen(mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Keys that some query at these positions may see by lo and hi: bool [S]."""
    every = mask.copy()
    every[:, 2] = mask.shape[2]
    return np.stack([masks.dense(row) for row in every])[:, positions].any((0, 1))


def deliver(assignment, schedules: list[list]) -> list[list[np.ndarray]]:
    """Plays the messages, each key being its own position: every rank's buffer after every stage."""
    ranks = assignment.ranks
    own = [assignment.positions(rank) for rank in range(ranks)]
    buffers: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    for stage in range(max(map(len, schedules), default=0)):
        post = {}
        for rank in range(ranks):
            now = schedules[rank][stage]
            source = buffers[rank][-1] if now.relays else own[rank]
            post |= {(rank, peer): source[rows] for peer, rows in now.sends.items()}
        for rank in range(ranks):
            arrived = [post.pop((peer, rank)) for peer in schedules[rank][stage].receives]
            assert [len(keys) for keys in arrived] == list(schedules[rank][stage].receives.values())
            buffers[rank].append(np.concatenate([np.zeros(0, np.int64), *arrived]))
        assert not post, "a message that nobody awaits"
    return buffers


@pytest.mark.parametrize("kind", [ring, exchange])
@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data(), ranks=st.sampled_from([2, 3, 4, 6]))
def test_all_that_is_needed_arrives_and_gradients_go_home(kind, data, ranks):
    mask = draw_mask(data, data.draw(st.sampled_from([1, 2])), LENGTH)
    assignment = assign(mask, ranks)
    needed = needs(mask, assignment)
    schedules = [kind(needed, rank) for rank in range(ranks)]
    buffers = deliver(assignment, schedules)
    for rank, stages in enumerate(schedules):
        own = assignment.positions(rank)
        for stage, buffer in zip(stages, buffers[rank], strict=True):
            assert np.array_equal(buffer[stage.rows], stage.keys) and (np.diff(stage.keys) > 0).all()
        met = np.concatenate([np.zeros(0, np.int64), *(stage.keys for stage in stages)])
        assert len(np.unique(met)) == len(met) and not np.isin(met, own).any(), "no key is multiplied twice"
        wanted = np.setdiff1d(np.flatnonzero(seen(mask, own)), own)
        assert np.isin(wanted, met).all()
        if kind is exchange and len(mask) == 1:
            assert sum(sum(stage.receives.values()) for stage in stages) == len(met) == len(wanted), "and none besides"
    for number in range(len(schedules[0])):
        for rank in range(ranks):
            stage = schedules[rank][number]
            for owner, rows in stage.returns.items():
                home = schedules[owner][number].homes[rank]
                assert np.array_equal(assignment.positions(owner)[home], stage.keys[rows])


@settings(deadline=None, max_examples=40, derandomize=True)
@given(data=st.data(), ranks=st.sampled_from([2, 3, 5, 6]))
def test_counts_are_those_of_the_messages(data, ranks):
    length = 240
    mask = draw_mask(data, 1, length)
    needed = needs(mask, assign(mask, ranks))
    relayed = relayed_counts(needed)
    for rank in range(ranks):
        for distance, stage in enumerate(ring(needed, rank), 1):
            assert relayed[rank, distance] == sum(stage.receives.values())
        for distances, stage in zip(exchange_distances(needed), exchange(needed, rank), strict=True):
            brought = {
                (rank - distance) % ranks: needed.counts()[rank, (rank - distance) % ranks] for distance in distances
            }
            assert stage.receives == {owner: count for owner, count in brought.items() if count}


def test_documents_that_fit_into_parts_send_nothing():
    mask = masks.concatenate([masks.causal(48)] * 4, LENGTH)[None]
    needed = needs(mask, contiguous(LENGTH, 4))
    assert all(not stage.sends and not stage.receives for rank in range(4) for stage in exchange(needed, rank))


def test_a_ring_cuts_down_what_it_passes_on():
    """Only rank 1 and 2 need keys of rank 0, and rank 2 fewer: rank 3 gets none."""
    mask = masks.concatenate([masks.causal(40), masks.causal(150)], LENGTH)[None]
    mask[0, 0, 96:144] = 24  # rank 2's queries see keys from 24 on
    mask[0, 0, 144:] = 144
    needed = needs(mask, contiguous(LENGTH, 4))
    received = [[sum(stage.receives.values()) for stage in ring(needed, rank)] for rank in range(4)]
    assert received == [[0, 0, 0], [24, 0, 0], [48, 24, 0], [0, 0, 0]]
