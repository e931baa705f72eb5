"""What the host does in an optimizer step: it reads numbers from the device once, and nothing in micro-batches; and no
torch call of it goes through the mode that rewrites devices."""

from collections import Counter

import pytest
import torch
from distributed import run_ranks
from tiny_runs import overrides_for

from megatron_mm.benchmark.synthetic import synthetic_steps
from megatron_mm.config.compose import compose
from megatron_mm.engines.megatron import MegatronEngine
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.cpu_device import CudaToCpu
from megatron_mm.parallel.distributed import process_groups

READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__")
CPU = torch.device("cpu")


def calls_in_a_step(init_kwargs, overrides):
    """How often a second step, of two micro-batches, calls what reads a tensor on the host, sums over ranks or rewrites
    devices, and whether it says that a rank asked to stop."""
    config = compose(overrides)
    family = build_family(config.model, 256)
    (batches,) = synthetic_steps(config, family, 256, 1)
    with process_groups(config.parallel, 1, CPU, **init_kwargs) as layout, pytest.MonkeyPatch.context() as patch:
        engine = MegatronEngine(config, family, layout, CPU)
        prepared = [engine.prepare(batch) for batch in batches[:2]]
        assert not engine.step(prepared).stopping
        calls: Counter[str] = Counter()

        def count(of, name):
            original = getattr(of, name)

            def counting(*args, **kwargs):
                calls[name] += 1
                return original(*args, **kwargs)

            patch.setattr(of, name, counting)

        for name in READS:
            count(torch.Tensor, name)
        count(torch.distributed, "all_reduce")
        count(CudaToCpu, "__torch_function__")
        stopping = engine.step(prepared, lambda: layout.rank == layout.world_size - 1).stopping
        return dict(calls), stopping


GROUPED = "model.trunk.moe_grouped_gemm=true"


@pytest.mark.parametrize(
    ("family", "overrides", "ranks"),
    [
        ("transfusion", ["parallel.tensor_model_parallel_size=2"], 2),
        ("transfusion", [], 2),
        ("chameleon", ["parallel.use_distributed_optimizer=false"], 1),
        ("transfusion_experts", [GROUPED], 1),
    ],
)
def test_one_read_a_step(family, overrides, ranks, tmp_path):
    given = overrides_for(family, tmp_path, tmp_path, *overrides, "data.seq_length=256")
    given = [override for override in given if "image_tokenizer" not in override]
    for calls, stopping in run_ranks(calls_in_a_step, ranks, given):
        assert {name: count for name, count in calls.items() if name != "all_reduce"} == {"tolist": 1}
        if ranks == 2 and not overrides:
            assert calls["all_reduce"] == 2, "counts before, all else behind the backward pass"
        assert stopping, "one rank asks for all"
