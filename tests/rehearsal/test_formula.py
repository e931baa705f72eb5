"""The closed formula of `plan.memory`, which leaves parts beside the trunk out, against the rehearsal."""

import pytest

from megatron_mm.config.compose import compose
from megatron_mm.families.registry import build_family
from megatron_mm.plan.memory import estimate

COMMON = [
    "run.name=test", "data.path=none", "logging.wandb=disabled", "data.seq_length=4096", "train.precision=bf16",
    "train.global_batch_size=8", "model.trunk.num_layers=16",
]  # fmt: skip
TP, CP = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"], "parallel.context_parallel_size"
RUNS = {
    "transfusion": ["model=transfusion_7b"],
    "transfusion_full": ["model=transfusion_7b", "parallel.recompute_granularity=full"],
    "chameleon_cp2": ["model=chameleon_7b", f"{CP}=2"],
    "mmada_tp2": ["model=mmada_8b", *TP],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_formula_is_near(rehearsed, name):
    overrides = [*COMMON, *RUNS[name]]
    config = compose(overrides)
    formula = estimate(config, build_family(config.model, 32000).vocab.size, 8)
    assert formula.total == pytest.approx(rehearsed(overrides, 8, text_vocab_size=32000).peak.total, rel=0.05)
