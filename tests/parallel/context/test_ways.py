"""What is predicted, by hand for two ranks, and what is chosen for it."""

import numpy as np
import pytest

from megatron_mm import mask as masks
from megatron_mm.config.schema import ParallelConfig
from megatron_mm.parallel.context.assignment import contiguous
from megatron_mm.parallel.context.predict import Hardware, Work, estimated_pairs, predict
from megatron_mm.parallel.context.schedule import needs
from megatron_mm.parallel.context.ways import Ways, positions

LENGTH = 1024
WORK = Work(rows=1, heads=8, key_heads=8, head_dim=64, element_bytes=2)


def test_two_ranks_by_hand():
    """The second rank multiplies its own half (a triangle) and then the first rank's (a square)."""
    mask = masks.concatenate([masks.causal(LENGTH)], LENGTH)[None]
    half = LENGTH // 2
    triangle, square = half * (half + 1) / 2, half * half
    pairs = np.array([[triangle, 0], [square, triangle]])
    hardware = Hardware(
        tflops=100, node_gigabytes=100, latency_microseconds=5, launch_microseconds=2, node_size=2, network_gigabytes=1
    )
    rate = 100e12 / (4 * 8 * 64)
    transfer = half * (2 * 8 * 64 * 2) / 100e9 + 5e-6
    forward = max(triangle / rate + 2e-6, transfer) + square / rate + 2e-6
    backward = max(2.5 * (triangle / rate + 2e-6), 2 * transfer) + 2.5 * (square / rate + 2e-6)
    for relays in (False, True):
        made = predict(needs(mask, contiguous(LENGTH, 2)), pairs, relays, WORK, hardware)
        assert made.forward == pytest.approx(forward) and made.backward == pytest.approx(backward)
        assert made.efficiency == pytest.approx(3.5 * pairs.sum() / 2 / rate / (forward + backward))


def test_pairs_are_spread_over_the_keys_needed():
    mask = masks.concatenate([masks.full(LENGTH)], LENGTH)[None]
    pairs = estimated_pairs(needs(mask, contiguous(LENGTH, 4)), np.full(4, LENGTH * LENGTH / 4))
    assert np.allclose(pairs, LENGTH * LENGTH / 16)


@pytest.mark.parametrize(
    ("mask", "hardware", "expected"),
    [
        # Each rank needs its neighbour's keys at most: relaying them further costs what sending them does not.
        (masks.window(masks.causal(LENGTH), 8), Hardware(node_size=4), (1, False)),
        # All ranks need all keys; swapping heads moves a quarter of what passing all keys on does.
        (masks.full(LENGTH), Hardware(node_size=4, node_gigabytes=1), (4, False)),
        # The same across slow links between nodes of two: heads inside, keys outside.
        (masks.full(LENGTH), Hardware(400, 1e4, 20, 0, 0, node_size=2), (2, False)),
    ],
)
def test_the_fastest_is_chosen(mask, hardware, expected):
    ways = Ways.of(ParallelConfig(context_parallel_size=4), [WORK], hardware)
    assert set(ways.inner_sizes) == {1, min(hardware.node_size, 4), 4}
    rows = masks.concatenate([mask], LENGTH)[None]
    chosen = ways.best(rows)
    assert (chosen.inner, chosen.relays) == expected


@pytest.mark.parametrize(
    ("comm", "options"),
    [("ring", {(1, True)}), ("exchange", {(1, False)}), ("ulysses", {(8, False)}), ("hybrid", {(2, True)})],
)
def test_named_ways(comm, options):
    parallel = ParallelConfig(context_parallel_size=8, context_parallel_comm=comm, ulysses_size=2)
    assert set(Ways.of(parallel, [WORK], Hardware()).options) == options


def test_neighbours_share_a_part():
    shares = positions(contiguous(16, 2), 4)
    assert [share.tolist() for share in shares] == [[2 * rank, 2 * rank + 1] for rank in range(8)]
