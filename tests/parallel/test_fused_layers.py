"""Layers with fused parts are the layers without: the same loss sums and gradients.

Only the wiring is seen here, with the compiler off; `tests/nn/test_fusion.py` looks at what it makes.
"""

import pytest
import torch
from distributed import run_ranks

from megatron_mm.benchmark.synthetic import synthetic_steps
from megatron_mm.config.compose import compose
from megatron_mm.config.schema import FusionConfig
from megatron_mm.documents.traits import MaskTraits
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.context.runtime import Part
from megatron_mm.parallel.distributed import process_groups
from megatron_mm.parallel.init import initialize
from megatron_mm.parallel.model import StageModel
from megatron_mm.parallel.transformer_config import transformer_config

CPU = torch.device("cpu")
OVERRIDES = [
    "run.name=test", "data.path=none", "data.seq_length=192", "train.precision=fp64", "train.micro_batch_size=2",
    "train.global_batch_size=2", "model.trunk.num_layers=2", "model.trunk.qk_layernorm=true",
]  # fmt: skip


def _sums_and_gradients(init_kwargs: dict, config, elementwise: str) -> dict[str, torch.Tensor]:
    with torch.compiler.set_stance("force_eager"), process_groups(config.parallel, 0, CPU, **init_kwargs):
        family = build_family(config.model, text_vocab_size=64)
        fusion = FusionConfig(elementwise)
        core = transformer_config(
            family.trunk, config.parallel, config.train, "reference", MaskTraits.of(family).hides_keys, fusion
        )
        gelu_alone = family.trunk.activation == "gelu" and not family.trunk.add_bias_linear
        assert core.bias_activation_fusion == (elementwise == "compile" and not gelu_alone)
        stage = StageModel(core, family, first=True, last=True, virtual_stage=None)
        initialize(stage, seed=0)
        ((batch,),) = synthetic_steps(config, family, 64, 1)
        sums = stage(Part.of(batch.to(CPU, torch.float64)))
        sums.sum().backward()
        return {"sums": sums.detach(), **{name: p.grad for name, p in stage.named_parameters()}}


PHI = [f"model.trunk.{option}" for option in ("activation=gelu", "add_bias_linear=true", "parallel_block=true")]


@pytest.mark.parametrize(
    ("family", "options", "tolerance"),
    [
        ("transfusion", [], 1e-12),
        ("chameleon", [], 1e-12),
        ("chameleon", ["model.trunk.activation=gelu"], 1e-12),
        ("chameleon", ["model.trunk.add_bias_linear=true"], 1e-12),
        # megatron-core's fused GELU writes sqrt(2 / pi) with 8 digits.
        ("chameleon", PHI, 1e-8),
    ],
    ids=["transfusion", "chameleon", "gelu", "biases", "phi"],
)
def test_same_gradients(family, options, tolerance):
    config = compose([f"model={family}_tiny", *OVERRIDES, *options])
    assert config.model.trunk.hidden_dropout > 0
    eager, fused = (run_ranks(_sums_and_gradients, 1, config, name)[0] for name in ("eager", "compile"))
    assert len(eager) > 10 and eager.keys() == fused.keys()
    for name, expected in eager.items():
        assert expected.abs().max() > 0 or "patch_out" in name, name
        torch.testing.assert_close(fused[name], expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
