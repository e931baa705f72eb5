"""The rehearsal's memory against what the CPU's allocator records of the same step, within 3 %."""

import itertools

import pytest
import torch
from distributed import run_ranks
from torch.profiler import ProfilerActivity, profile

from megatron_mm.benchmark.synthetic import rank_steps
from megatron_mm.config.compose import compose
from megatron_mm.engines.megatron import MegatronEngine
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.distributed import process_groups

VOCABULARY = 500
COMMON = [
    "run.name=test", "data.path=none", "logging.wandb=disabled", "attention.backend=reference",
    "fusion.elementwise=eager", "data.seq_length=512", "train.global_batch_size=4", "model.trunk.num_layers=4",
    "model.trunk.hidden_size=256", "model.trunk.num_attention_heads=8",
]  # fmt: skip
TP, CP = "parallel.tensor_model_parallel_size=2", "parallel.context_parallel_size=2"
# Under sequence parallelism and overlap gloo's own threads hold copies of what they reduce, for as long as they like.
PAIRS = {
    "transfusion": (1, ["model=transfusion_tiny"]),
    "transfusion_recompute": (1, ["model=transfusion_tiny", "parallel.recompute_granularity=full"]),
    "chameleon_tp2": (2, ["model=chameleon_tiny", TP]),
    "chameleon_cp2": (2, ["model=chameleon_tiny", CP]),
    "janus_dp2": (2, ["model=janus_tiny"]),
    "showo_selective": (1, ["model=showo_tiny", "parallel.recompute_granularity=selective"]),
    "mmada_cp2": (2, ["model=mmada_tiny", CP]),
    "janus_tp2": (2, ["model=janus_tiny", TP]),
    "showo_flow_dp2": (2, ["model=showo_flow_tiny"]),
    "showo_flow_cp2": (2, ["model=showo_flow_tiny", CP]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_memory_is_what_a_cpu_measures(rehearsed, name):
    ranks, own = PAIRS[name]
    overrides = [*COMMON, *own]
    for rank, (state, step) in enumerate(run_ranks(_measured, ranks, overrides)):
        result = rehearsed(overrides, ranks, rank, text_vocab_size=VOCABULARY, path="cpu")
        assert result.peak.total - result.start == pytest.approx(step, rel=0.03)
        held = sum(result.peak.by[owner] for owner in ("weights", "gradients", "optimizer"))
        assert held == pytest.approx(state, rel=0.03)


def _measured(init_kwargs: dict, overrides: list[str]) -> tuple[int, int]:
    """Bytes of weights, gradients and optimizer, and the most that a step takes above them."""
    config, device = compose(overrides), torch.device("cpu")
    with process_groups(config.parallel, 0, device, **init_kwargs) as layout:
        family = build_family(config.model, VOCABULARY)
        engine = MegatronEngine(config, family, layout, device)
        batches = rank_steps(config, family, VOCABULARY, layout.dp_size)
        prepared = [engine.prepare(batch) for batch in batches]
        engine.step(prepared)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            engine.step(prepared)
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        return _state(engine), max(itertools.accumulate(changes))


def _state(engine: MegatronEngine) -> int:
    tensors = [tensor for chunk in engine.chunks for tensor in chunk.parameters()]
    for chunk in engine.chunks:
        tensors += [b.grad_data for b in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    for part in engine.optimizer.chained_optimizers:
        tensors += [value for state in part.optimizer.state.values() for value in state.values()]
        tensors += [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
    tensors = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
