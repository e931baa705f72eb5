"""Random weights: normal, independent along every coordinate, and the same numbers in whatever parts they are drawn."""

import hashlib
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from megatron_mm.parallel import draw as module
from megatron_mm.parallel.draw import Normal, draw, drawn

CPU = torch.device("cpu")
SIGMAS = 5


def test_numbers_are_standard_normal():
    numbers = drawn("0/weight", (500, 1000)).flatten()
    assert kstest(numbers.numpy(), "norm").pvalue > 1e-3
    n = len(numbers)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(numbers.double().pow(power).mean() - moment) < SIGMAS * math.sqrt(variance / n), power
    assert 4.0 < numbers.max() < 4.33 and -4.33 < numbers.min() < -4.0
    assert len(numbers.unique()) > 0.9 * n, "32 bits, not 16"


def test_no_coordinate_repeats_another():
    weight = drawn("0/weight", (1024, 1024))
    others = [drawn("1/weight", (1024, 1024)), drawn("0/bias", (1024, 1024)), drawn("0/weight/1", (1024, 1024))]
    pairs = [(weight, other) for other in others]
    for lag in (1, 2, 3, 64, 512):
        pairs += [(weight[lag:], weight[:-lag]), (weight[:, lag:], weight[:, :-lag])]
        pairs += [(weight[lag:, lag:], weight[:-lag, :-lag]), (weight[lag:], others[0][:-lag])]
    for first, second in pairs:
        assert abs((first * second).mean()) * math.sqrt(first.numel()) < SIGMAS
        sizes = (first.square() - 1) * (second.square() - 1) / 2
        assert abs(sizes.mean()) * math.sqrt(first.numel()) < SIGMAS
    for means in (weight.mean(0), weight.mean(1)):
        assert 0.9 < means.std() * math.sqrt(1024) < 1.1, "means must scatter as those of independent numbers"


@pytest.mark.parametrize("shape", [(24, 10), (6, 3, 4, 4), (1, 7), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_part_is_a_part_of_the_whole(shape, dtype):
    whole = (drawn("0/weight", shape) * 0.02).to(dtype)
    for axis, size in enumerate(shape):
        for start, length in ((0, size), (size // 2, size - size // 2), (size - 1, 1)):
            offset = [start if number == axis else 0 for number in range(len(shape))]
            expected = whole.narrow(axis, start, length)
            part = torch.full_like(expected.clone(), torch.nan)
            draw(part, Normal(CPU), 0.02, "0/weight", shape, offset)
            assert torch.equal(part, expected), (axis, start)


def test_how_many_are_drawn_at_once_does_not_matter(monkeypatch):
    whole = drawn("0/weight", (33, 40))
    for count in (1, 100, 1000):
        monkeypatch.setattr(module, "_AT_ONCE", {"cpu": count})
        assert torch.equal(drawn("0/weight", (33, 40)), whole), count


def test_numbers_do_not_depend_on_generators_and_leave_them_alone():
    torch.manual_seed(1)
    before, whole = torch.get_rng_state(), drawn("0/weight", (8, 8))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(drawn("0/weight", (8, 8)), whole)


def test_numbers_are_the_quantiles_of_their_hashes():
    """By Python's own integers and distribution, number for number."""

    def lowbias32(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    key = int.from_bytes(hashlib.blake2b(b"3/weight", digest_size=16).digest(), "little")
    expected = []
    for row in np.random.Philox(key=key).random_raw(20).tolist():
        first, second = row % 2**32, row >> 32
        for column in range(30):
            number = lowbias32(lowbias32((first + column) % 2**32) ^ second) ^ 2**31
            expected.append(NormalDist().inv_cdf((number / 2**16 + 0.5) / (2**16 + 1)))
    torch.testing.assert_close(drawn("3/weight", (20, 30)), torch.tensor(expected).view(20, 30), rtol=0, atol=1e-5)
