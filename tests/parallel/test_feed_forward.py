"""Blockwise feed-forward keeps nothing that is as wide as the feed-forward."""

import pytest
import torch
from distributed import run_ranks

from megatron_mm.benchmark.synthetic import synthetic_steps
from megatron_mm.config.compose import compose
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.context.runtime import Part
from megatron_mm.parallel.distributed import process_groups
from megatron_mm.parallel.init import initialize
from megatron_mm.parallel.model import StageModel
from megatron_mm.parallel.transformer_config import transformer_config

CPU = torch.device("cpu")
WIDTH = 224


def _saved_widths(init_kwargs: dict, config) -> tuple[set[int], int]:
    """Widths of the tensors that the forward pass keeps, and their bytes."""
    with process_groups(config.parallel, 0, CPU, **init_kwargs):
        family = build_family(config.model, text_vocab_size=64)
        stage = StageModel(
            transformer_config(family.trunk, config.parallel, config.train, "reference"), family, True, True, None
        )
        initialize(stage, seed=0)
        parameters = {parameter.data_ptr() for parameter in stage.parameters()}
        ((batch,),) = synthetic_steps(config, family, 64, 1)
        kept: dict[int, tuple[int, int]] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in parameters and tensor.ndim:
                kept[tensor.data_ptr()] = (tensor.shape[-1], tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            sums = stage(Part.of(batch.to(CPU, torch.float32)))
        sums.sum().backward()
        return {width for width, _ in kept.values()}, sum(size for _, size in kept.values())


@pytest.mark.parametrize("family", ["transfusion", "chameleon"])
def test_nothing_wide_is_kept(family):
    overrides = [
        "run.name=test", "data.path=none", "data.seq_length=192", "train.micro_batch_size=1",
        "train.global_batch_size=1",
        f"model.trunk.ffn_hidden_size={WIDTH}",
    ]  # fmt: skip
    widths, bytes_kept = {}, {}
    for block in ("null", "50"):
        config = compose([f"model={family}_tiny", *overrides, f"parallel.feed_forward_block={block}"])
        ((widths[block], bytes_kept[block]),) = run_ranks(_saved_widths, 1, config)
    wide = {WIDTH, 2 * WIDTH}
    assert widths["null"] & wide and not widths["50"] & wide
    assert bytes_kept["50"] < 0.7 * bytes_kept["null"]
