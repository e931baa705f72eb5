"""Parts of a batch hold it once, images that a family needs whole are whole, and every label counts once."""

import numpy as np
import pytest
import torch
from distributed import run_ranks
from documents import label_counts

from megatron_mm.benchmark.synthetic import synthetic_steps
from megatron_mm.config.compose import compose
from megatron_mm.config.schema import ParallelConfig
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.context.assignment import assign, contiguous
from megatron_mm.parallel.context.borrow import narrow, widen
from megatron_mm.parallel.context.shard import shard
from megatron_mm.parallel.distributed import process_groups

pytestmark = pytest.mark.usefixtures("small_chunks")
S, RANKS = 384, 4


def made(patch_codec: str):
    """A family, and of a few drawn batches the one with most images."""
    config = compose(
        [
            "model=transfusion_tiny", "run.name=test", "data.path=none", f"data.seq_length={S}",
            "train.micro_batch_size=2", "train.global_batch_size=2", "model.image.height=12", "model.image.width=12",
            "model.patch_size=2", f"model.patch_codec={patch_codec}",
        ]
    )  # fmt: skip
    family = build_family(config.model, 64)
    batches = [batch for (batch,) in synthetic_steps(config, family, 64, 8)]
    return family, max(batches, key=lambda batch: len(batch.images))


def parts_of(family, batch, owners):
    return [shard(batch, owners, rank, family.fields, family.vocab.pad) for rank in range(len(owners))]


@pytest.fixture(params=["assign", "contiguous"])
def cut(request):
    def owners(batch):
        mask = batch.mask.numpy()
        made = assign(mask, RANKS) if request.param == "assign" else contiguous(S, RANKS)
        return [made.positions(rank) for rank in range(RANKS)]

    return owners


def test_linear_patches_need_nothing_else(cut):
    family, batch = made("linear")
    owners = cut(batch)
    parts = parts_of(family, batch, owners)
    where = torch.from_numpy(np.concatenate(owners))
    for part in parts:
        assert part.widening is None and part.front is part.back and torch.equal(part.meta, part.front.meta)
    assert torch.equal(torch.cat([part.front.tokens for part in parts], 1), batch.tokens[:, where])
    assert torch.equal(torch.cat([part.meta for part in parts], 2), batch.meta[:, :, where])
    for name, values in batch.fields.items():
        assert torch.equal(torch.cat([part.front.fields[name] for part in parts], 1), values[:, where])


def test_images_are_whole_and_counted_once(cut):
    family, batch = made("unet")
    assert len(batch.images) > 3
    owners = cut(batch)
    parts = parts_of(family, batch, owners)
    assert any(part.widening is not None for part in parts), "some image straddles a border"
    total = {name: 0 for name in label_counts(family, batch)}
    for positions, part in zip(owners, parts, strict=True):
        for name, count in label_counts(family, part.back).items():
            total[name] += count
        front = part.front
        touched = [
            (row, first)
            for row, first, height, width in batch.images.tolist()
            if np.isin(np.arange(first, first + height * width), positions).any()
        ]
        here = [image for grids in front.grids for image in grids.images(front.tokens.shape[1])]
        assert len(here) == len(touched)
        for (row, first), (row_here, place, height, width) in zip(touched, here, strict=True):
            size = height * width
            assert row_here == row
            for name in ("patches", "timestep", "noise"):
                there = batch.fields[name][row, first : first + size]
                assert torch.equal(front.fields[name][row, place : place + size], there)
    assert total == label_counts(family, batch)


def _round_trip(init_kwargs, batch, parts, owners):
    rank = init_kwargs["rank"]
    parallel = ParallelConfig(context_parallel_size=len(parts))
    with process_groups(parallel, 0, torch.device("cpu"), **init_kwargs):
        widening = parts[rank].widening
        if widening is None:
            return None
        hidden = batch.tokens[:, owners[rank], None].double().requires_grad_()
        wide = widen(hidden, widening, torch.distributed.group.WORLD)
        (gradient,) = torch.autograd.grad(wide.sum(), hidden)
        return wide.detach(), narrow(wide, widening).detach(), gradient


def test_hidden_states_are_lent_and_their_gradients_return():
    family, batch = made("unet")
    owners = [contiguous(S, RANKS).positions(rank) for rank in range(RANKS)]
    parts = parts_of(family, batch, owners)
    assert sum(part.widening is not None for part in parts) > 1
    results = run_ranks(_round_trip, RANKS, batch, parts, owners)
    gradients = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    lent = torch.zeros_like(gradients)
    for positions, part, result in zip(owners, parts, results, strict=True):
        if result is None:
            gradients[:, positions] = 1
            continue
        wide, own, gradient = result
        assert torch.equal(own[..., 0], batch.tokens[:, positions].double())
        real = part.front.meta[:, 1] > part.front.meta[:, 0]
        assert torch.equal(wide[..., 0][real], part.front.tokens.double()[real])
        gradients[:, positions] = gradient[..., 0]
        for index in part.widening.sends.values():
            row, place = index // len(positions), index % len(positions)
            lent[row, torch.from_numpy(positions)[place]] += 1
    assert torch.equal(gradients, 1 + lent)
