"""Images of many sizes (`model.image.transform=native`): the index foretells what the documents become."""

import pytest
from tiny_runs import SIZES, make_shards, overrides_for

from megatron_mm.config.compose import compose
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.dataset import open_data
from megatron_mm.data.loader import StepLoader
from megatron_mm.data.tokenizer import ByteTokenizer
from megatron_mm.documents.builder import Builder
from megatron_mm.families.registry import build_family


@pytest.mark.parametrize("family", ["transfusion", "transfusion_unet", "showo_flow"])
def test_documents_are_as_long_as_planned_and_batches_mix_grids(family, tmp_path):
    make_shards(tmp_path, SIZES)
    config = compose(overrides_for(f"{family}_native", tmp_path, tmp_path / "run"))
    builder = Builder(build_family(config.model, ByteTokenizer().size))
    plan, reader, ledger = open_data(config.data, config.model, builder, ByteTokenizer(), 0)
    assert not ledger
    for uid in range(len(reader.index)):
        longest = max(len(builder.lay_out(reader.read(uid), Streams(0, uid, epoch)).tokens) for epoch in range(9))
        assert longest == plan.lengths[uid]
    loader = StepLoader(plan, reader, builder, config.data, 0, 8, 8, 0, 1)
    (batch,) = next(loader).batches
    loader.close()
    grids = {tuple(grid) for grid in batch.images[:, 2:].tolist()}
    assert len(grids) >= 3 and grids <= {(4, 4), (2, 6), (6, 2), (2, 2), (6, 2)}
