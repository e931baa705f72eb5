"""The rehearsal's memory against what the CPU's allocator records of the same step, within 3 %."""

import itertools

import pytest
import torch
from distributed import run_ranks
from torch.profiler import ProfilerActivity, profile, record_function
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_mm.benchmark.synthetic import rank_steps
from megatron_mm.config.compose import compose
from megatron_mm.engines.megatron import MegatronEngine
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.distributed import process_groups
from megatron_mm.rehearsal.group import groups_of_one_rank

VOCABULARY = 500
COMMON = [
    "run.name=test", "data.path=none", "logging.wandb=disabled", "attention.backend=reference",
    "fusion.elementwise=eager", "data.seq_length=512", "train.global_batch_size=4", "model.trunk.num_layers=4",
    "model.trunk.hidden_size=256", "model.trunk.num_attention_heads=8",
]  # fmt: skip
TP, CP = "parallel.tensor_model_parallel_size=2", "parallel.context_parallel_size=2"
SP = [TP, "parallel.sequence_parallel=true"]
PP, VPP = "parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"
# Not Uni-MoE: on a CPU its experts read on the host how many tokens each has.
PAIRS = {
    "transfusion": (1, ["model=transfusion_tiny"]),
    "transfusion_recompute": (1, ["model=transfusion_tiny", "parallel.recompute_granularity=full"]),
    "transfusion_tp2_pp2": (4, ["model=transfusion_tiny", *SP, PP]),
    "chameleon_sp2": (2, ["model=chameleon_tiny", *SP]),
    "chameleon_cp2": (2, ["model=chameleon_tiny", CP]),
    "janus_tp2": (2, ["model=janus_tiny", TP]),
    "showo_selective": (1, ["model=showo_tiny", "parallel.recompute_granularity=selective"]),
    "showo_pp2": (2, ["model=showo_tiny", PP]),
    "mmada_pp2_interleaved": (2, ["model=mmada_tiny", PP, VPP]),
    "showo_flow_dp2": (2, ["model=showo_flow_tiny"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_memory_is_what_a_cpu_measures(rehearsed, name):
    ranks, own = PAIRS[name]
    overrides = [*COMMON, *own]
    for rank in {0, ranks - 1}:
        state, step = run_ranks(_measured, 1, overrides, ranks, rank)[0]
        result = rehearsed(overrides, ranks, rank, text_vocab_size=VOCABULARY, path="cpu")
        assert result.peak.total - result.start == pytest.approx(step, rel=0.03)
        held = sum(result.peak.by[owner] for owner in ("weights", "gradients", "optimizer"))
        assert held == pytest.approx(state, rel=0.03)


def _measured(_: dict, overrides: list[str], world_size: int, rank: int) -> tuple[int, int]:
    """Bytes of weights, gradients and optimizer, and the most that a step takes above them. The other ranks are not
    there: gloo's threads would hold copies of what they send, for as long as they like."""
    config, device = compose(overrides), torch.device("cpu")
    groups = process_groups(config.parallel, 0, device, store=FakeStore(), rank=rank, world_size=world_size)
    with groups_of_one_rank(lambda *_: lambda: None), groups as layout:
        family = build_family(config.model, VOCABULARY)
        engine = MegatronEngine(config, family, layout, device)
        batches = rank_steps(config, family, VOCABULARY, layout.dp_size)
        prepared = [engine.prepare(batch) for batch in batches]
        # Two steps: the profiler does not see the end of what was there before it.
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            engine.step(prepared)
            with record_function("second"):
                engine.step(prepared)
        events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        (second,) = (event.start_ns() for event in events if event.name() == "second")
        changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
        start = sum(size for at, size in changes if at < second)
        return _state(engine), max(itertools.accumulate(size for _, size in changes)) - start


def _state(engine: MegatronEngine) -> int:
    tensors = [tensor for chunk in engine.chunks for tensor in chunk.parameters()]
    for chunk in engine.chunks:
        tensors += [b.grad_data for b in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    for part in engine.optimizer.chained_optimizers:
        tensors += [value for state in part.optimizer.state.values() for value in state.values()]
        tensors += [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
    tensors = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
