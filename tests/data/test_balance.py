"""Dealing out packs by their images."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_mm.data.balance import deal


@given(st.lists(st.integers(0, 9), min_size=24, max_size=24), st.sampled_from([1, 2, 4, 8]))
def test_every_pack_has_one_rank_and_all_ranks_as_many(images, ranks):
    dealt = deal(images, ranks)
    assert sorted(pack for packs in dealt for pack in packs) == list(range(24))
    assert all(len(packs) == 24 // ranks and packs == sorted(packs) for packs in dealt)
    assert dealt == deal(list(images), ranks)


def test_loads_come_out_nearly_even():
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(50):
        images = rng.poisson(4, 64)
        loads = [sum(images[pack] for pack in packs) for packs in deal(images.tolist(), 8)]
        ratios.append(max(loads) / np.mean(loads))
    assert max(ratios) < 1.06


def test_known_cases():
    assert deal([5, 0, 5, 0], 2) == [[0, 1], [2, 3]]
    assert deal([1, 1, 1, 1], 2) == [[0, 2], [1, 3]]
