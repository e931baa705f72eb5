"""The hashed dropout: right rate, reproducible, and without visible structure in any of its coordinates."""

import math

import numpy as np
import pytest
import torch

from megatron_mm.nn.dropout import hash_tokens, hashed_dropout, salts

KEYS, POSITIONS, CHANNELS = 4, 512, 256
N = KEYS * POSITIONS * CHANNELS
SIGMAS = 5  # a bound that a fair mask breaks once in 1.7 million


def dropped(p=0.1, salt=7, keys=range(KEYS), positions=POSITIONS, channels=CHANNELS):
    """bool [keys, positions, channels]."""
    key = torch.tensor(list(keys), dtype=torch.int32)[:, None].expand(-1, positions)
    position = torch.arange(positions, dtype=torch.int32).expand(len(key), -1)
    return hashed_dropout(torch.ones(*key.shape, channels), p, hash_tokens(key, position, salt)) == 0


def lowbias32(x):
    """Wellons' hash as published (nullprogram.com/blog/2018/07/31), on uint32."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("first", [0, 12288])
def test_the_very_bits(p, first):
    """In numpy's unsigned numbers: runs of any version drop the same elements."""
    salt, golden = 2**20 + 3, 0x9E3779B9
    keys = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 7], np.uint32)[:, None]
    positions = np.arange(70, dtype=np.uint32)
    channels = np.arange(first, first + 300, dtype=np.uint32)
    tokens = lowbias32(lowbias32(keys ^ np.uint32(salt * golden % 2**32)) + positions)
    bits = lowbias32(tokens[..., None] ^ (channels * np.uint32(golden)))
    # The threshold is one of signed numbers.
    kept = torch.from_numpy(bits.view(np.int32) >= int(p * 2**32) - 2**31)

    key, position = np.broadcast_arrays(keys, positions)
    hashed = hash_tokens(*(torch.from_numpy(part.copy().view(np.int32)) for part in (key, position)), salt)
    assert torch.equal(hashed, torch.from_numpy(tokens.view(np.int32)))
    assert torch.equal(hashed_dropout(torch.ones(kept.shape), p, hashed, first) != 0, kept)


def test_the_bits_of_the_first_run():
    """As written down when the first model was trained."""
    hashed = hash_tokens(torch.tensor([7, -5], dtype=torch.int32), torch.tensor([3, 4095], dtype=torch.int32), 11)
    assert hashed.tolist() == [864719854, 1049076794]
    kept = hashed_dropout(torch.ones(2, 64), 0.5, hashed, 100) != 0
    assert [sum(2**i for i, bit in enumerate(row) if bit) for row in kept.tolist()] == [
        9523581333054000773,
        1199845487352860922,
    ]


@pytest.mark.parametrize("first", [0, 11, 2**31 - 1, 2**40 + 5])
def test_several_sites_at_once(first):
    keys, positions = torch.randint(-(2**31), 2**31, (2, 5, 3), dtype=torch.int32)
    hashed = hash_tokens(keys, positions, salts(first, 2, torch.device("cpu")))
    assert hashed.dtype == torch.int32
    assert torch.equal(hashed, torch.stack([hash_tokens(keys, positions, first + site) for site in range(2)]))


def correlation(a, b, p):
    """In units of the standard deviation that independent masks would give it."""
    a, b = a.double() - p, b.double() - p
    return abs((a * b).mean().item()) / (p * (1 - p)) * math.sqrt(a.numel())


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_rate_overall_and_along_every_coordinate(p):
    mask = dropped(p).double()
    sigma = math.sqrt(p * (1 - p) / N)
    assert abs(mask.mean() - p) < SIGMAS * sigma
    for kept in range(3):
        means = mask.mean([d for d in range(3) if d != kept])
        each = sigma * math.sqrt(len(means))
        assert (means - p).abs().max() < (SIGMAS + 1) * each
        if len(means) > KEYS:
            assert 0.8 < means.std() / each < 1.2, "rates must scatter as those of independent draws"


def test_kept_values_are_scaled_and_gradient_is_masked():
    x = torch.randn(3, 50, dtype=torch.float64, requires_grad=True)
    hashed = hash_tokens(torch.zeros(3, dtype=torch.int32), torch.arange(3, dtype=torch.int32), 0)
    y = hashed_dropout(x, 0.25, hashed)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept.double() / 0.75)
    assert hashed_dropout(torch.ones(2, 4, dtype=torch.bfloat16), 0.5, hashed[:2]).dtype == torch.bfloat16


def test_mask_depends_on_the_coordinates_alone():
    whole = dropped()
    torch.manual_seed(1)
    assert torch.equal(dropped(), whole)
    keys = torch.arange(KEYS, dtype=torch.int32)[:, None].expand(-1, POSITIONS)
    positions = torch.arange(POSITIONS, dtype=torch.int32).expand(KEYS, -1)
    for rows in torch.arange(KEYS).split(2):
        for columns in torch.arange(POSITIONS).split(100):
            hashed = hash_tokens(keys[rows][:, columns], positions[rows][:, columns], 7)
            part = hashed_dropout(torch.ones(*hashed.shape, CHANNELS), 0.1, hashed) == 0
            assert torch.equal(part, whole[rows][:, columns])
    shuffled = torch.randperm(KEYS * POSITIONS)
    hashed = hash_tokens(keys.flatten()[shuffled], positions.flatten()[shuffled], 7)
    assert torch.equal(
        hashed_dropout(torch.ones(len(shuffled), CHANNELS), 0.1, hashed) == 0, whole.flatten(0, 1)[shuffled]
    )


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("lag", [1, 2, 3, 64, 128, 255])
def test_neighbours_are_independent(p, lag):
    mask = dropped(p)
    assert correlation(mask[:, lag:], mask[:, :-lag], p) < SIGMAS, "positions"
    assert correlation(mask[..., lag:], mask[..., :-lag], p) < SIGMAS, "channels"
    assert correlation(mask[:, lag:, lag:], mask[:, :-lag, :-lag], p) < SIGMAS, "diagonals"


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_sites_and_documents_are_independent(p):
    mask = dropped(p, salt=1000)
    for step in (1, 2, 3, 8, 64, 2**16):
        assert correlation(mask, dropped(p, salt=1000 + step), p) < SIGMAS, f"salts {step} apart"
        moved = dropped(p, salt=1000, keys=range(step * KEYS, (step + 1) * KEYS))
        assert correlation(mask, moved, p) < SIGMAS, "documents"
    assert correlation(mask[1:], mask[:-1], p) < SIGMAS, "neighbouring documents"
    # One document's mask must not be another's, moved along.
    for lag in range(1, 9):
        assert correlation(mask[1:, lag:], mask[:-1, :-lag], p) < SIGMAS
        assert correlation(mask[:, lag:], dropped(p, salt=1001)[:, :-lag], p) < SIGMAS


def test_no_token_repeats():
    hashed = hash_tokens(
        torch.arange(256, dtype=torch.int32)[:, None].expand(-1, 1024), torch.arange(1024, dtype=torch.int32), 3
    )
    expected = hashed.numel() ** 2 / 2**33  # colliding pairs among random 32-bit numbers
    repeats = hashed.numel() - len(hashed.unique())
    assert repeats < expected + SIGMAS * math.sqrt(expected) + 1
