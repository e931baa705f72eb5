"""A rank's part of a batch: what each stage gets of it, in one copy, and that ranks that cut it otherwise are told."""

from dataclasses import replace

import pytest
import torch
from distributed import run_ranks
from documents import label_counts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_mm.benchmark.synthetic import synthetic_steps
from megatron_mm.config.compose import compose
from megatron_mm.engines.megatron import MegatronEngine
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.context import assignment
from megatron_mm.parallel.context.runtime import ContextParallel
from megatron_mm.parallel.distributed import process_groups
from megatron_mm.parallel.layout import Layout

pytestmark = pytest.mark.usefixtures("small_chunks")
CPU, META = torch.device("cpu"), torch.device("meta")
ALONE = Layout(
    world_size=1, rank=0, tp_size=1, tp_rank=0, pp_size=1, pp_rank=0, cp_size=1, cp_rank=0, dp_size=1, dp_rank=0,
    virtual_stages=1,
)  # fmt: skip


def drawn(*overrides: str):
    """(config, family, two batches)."""
    config = compose(
        [
            "model=transfusion_tiny", "run.name=test", "data.path=none", "data.seq_length=384",
            "train.micro_batch_size=4", "train.global_batch_size=8", "model.image.height=12", "model.image.width=12",
            "model.patch_size=2", "model.patch_codec=unet", "model.unet_channels=8", *overrides,
        ]
    )  # fmt: skip
    family = build_family(config.model, 64)
    return config, family, synthetic_steps(config, family, 64, 1)[0]


def test_each_stage_gets_what_it_reads():
    config, family, (batch, _) = drawn("train.precision=bf16")
    for rank, ends, front, back in (
        (0, (True, False), {"patches", "timestep"}, None),
        (1, (False, False), None, None),
        (2, (False, True), None, {"noise", "labels", "term"}),
    ):
        layout = replace(ALONE, pp_size=3, pp_rank=rank)
        part = ContextParallel(config, family, layout).part(batch, CPU)
        assert set(part.stages) == {ends}
        shard = part.to(CPU, *ends).shard
        assert torch.equal(shard.meta, batch.meta)
        for end, fields in ((shard.front, front), (shard.back, back)):
            assert (end is None) == (fields is None) and (end is None or set(end.fields) == fields)
        if not any(ends):
            assert len(part.stages[ends].buffer) == batch.meta.nbytes, "the mask and nothing else"
    interleaved = replace(ALONE, pp_size=2, pp_rank=1, virtual_stages=3)
    assert set(ContextParallel(config, family, interleaved).part(batch, CPU).stages) == {(False, False), (False, True)}


def _first_step(init_kwargs, config, family, batches, deviates):
    with process_groups(config.parallel, 0, CPU, **init_kwargs) as layout:
        engine = MegatronEngine(config, family, layout, CPU)
        if layout.rank == deviates:
            assignment.TARGET = 1.2  # as if its sums were rounded otherwise
        try:
            metrics = engine.step([engine.prepare(batch) for batch in batches])
        except (ValueError, SystemExit) as error:
            return str(error)
        return metrics.counts


def test_ranks_that_cut_rows_otherwise_are_told_before_the_first_step():
    config, family, batches = drawn("parallel.context_parallel_size=3", "parallel.context_parallel_comm=ring")
    counts = {name: sum(label_counts(family, batch)[name] for batch in batches) for name in ("text", "image")}
    assert run_ranks(_first_step, 3, config, family, batches, None) == [counts] * 3
    first, *others = run_ranks(_first_step, 3, config, family, batches, 1)
    assert "do not cut the first step's rows alike: ranks [0, 2] (numpy " in first and " and [1] (numpy " in first
    assert others == ["2", "2"], "they leave quietly"


class Copies(TorchDispatchMode):
    """What reads or makes a tensor on the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device == CPU for tensor in tensors):
            self.found.append(func.overloadpacket.__name__)
        return out


def _upload(init_kwargs, config, family, batch):
    with process_groups(config.parallel, 0, CPU, **init_kwargs) as layout:
        part = ContextParallel(config, family, layout).part(batch, META)
        with Copies() as copies:
            there = part.to(META, True, True)
        plan = there.attention.plan
        indices = [rows.index for step in plan.steps for rows in (*step.sends.values(), *step.homes.values())]
        tensors = [there.shard.meta, plan.own.mask, *(index for index in indices if index is not None)]
        return copies.found, {tensor.device.type for tensor in tensors}, there.shard.widening is not None


def test_a_part_and_its_plan_travel_in_one_copy():
    config, family, (batch, _) = drawn("parallel.context_parallel_size=3", "parallel.context_parallel_comm=exchange")
    parts = run_ranks(_upload, 3, config, family, batch)
    assert all(copies == ["_to_copy"] and devices == {"meta"} for copies, devices, _ in parts)
    assert any(widened for *_, widened in parts)
