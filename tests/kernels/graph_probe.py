"""Run by test_graphs_compiled in a process of its own: whatever torch.compile makes of real layers, forward and
backward, compiled for Hopper and Blackwell. Prints JSON: a row for each of inductor's kernels and configurations.
"""

import json
import os

import torch
import torch.distributed as dist
from megatron.core.fusions.fused_bias_swiglu import weighted_swiglu_back
from mm_kernels.offline_inductor import compiling_graphs

from megatron_mm.benchmark.synthetic import synthetic_steps
from megatron_mm.config.compose import compose
from megatron_mm.config.schema import FusionConfig
from megatron_mm.documents.traits import MaskTraits
from megatron_mm.families.registry import build_family
from megatron_mm.nn.fusion import compiled, norm_heads
from megatron_mm.parallel.context.runtime import Part
from megatron_mm.parallel.distributed import process_groups
from megatron_mm.parallel.init import initialize
from megatron_mm.parallel.model import StageModel
from megatron_mm.parallel.transformer_config import transformer_config

CPU = torch.device("cpu")
OVERRIDES = [
    "run.name=test", "data.path=none", "data.seq_length=192", "train.precision=bf16", "train.micro_batch_size=2",
    "train.global_batch_size=2", "model.trunk.num_layers=1",
]  # fmt: skip
MODELS = [
    ["model=chameleon_tiny", "model.trunk.qk_layernorm=false"],  # RoPE, dropout, SwiGLU
    ["model=chameleon_tiny", "model.trunk.activation=gelu", "model.trunk.add_bias_linear=true"],
    ["model=chameleon_tiny", "model.trunk.add_bias_linear=true"],
    ["model=unimoe_tiny"],  # experts: weighted SwiGLU, of several lengths
]


def train_one_layer(overrides: list[str]) -> None:
    """A forward and a backward pass, as the engine would build them on CUDA."""
    config = compose([*overrides, *OVERRIDES])
    with process_groups(config.parallel, 0, CPU, store=dist.HashStore(), rank=0, world_size=1):
        os.environ.pop("TORCHDYNAMO_DISABLE", None)  # set for CPUs, where compiling gains nothing
        family, fusion = build_family(config.model, text_vocab_size=64), FusionConfig("compile")
        core = transformer_config(
            family.trunk, config.parallel, config.train, "reference", MaskTraits.of(family).hides_keys, fusion
        )
        stage = StageModel(core, family, first=True, last=True, virtual_stage=None)
        initialize(stage, seed=0)
        ((batch,),) = synthetic_steps(config, family, 64, 1)
        stage(Part.of(batch.to(CPU, torch.bfloat16))).sum().backward()


def norm_heads_of_chameleon_7b() -> None:
    """A forward and a backward pass on the meta device, where LayerNorm keeps its statistics as on CUDA."""
    shapes = (4096, 1, 32, 128), (32, 128), (32, 128)
    x, weight, bias = (torch.empty(shape, dtype=torch.bfloat16, device="meta").requires_grad_() for shape in shapes)
    compiled(norm_heads)(x, weight, bias, 1e-5).sum().backward()


def swiglu_of_experts() -> None:
    """The backward pass alone, as megatron-core compiles it."""
    grad, x, weights = (torch.empty(shape, device="meta") for shape in ((8192, 11008), (8192, 22016), (8192, 1)))
    weighted_swiglu_back(grad.bfloat16(), x.bfloat16(), weights)


def rows(capability: int) -> list[dict]:
    with compiling_graphs(capability) as of_norms:
        norm_heads_of_chameleon_7b()
    with compiling_graphs(capability) as of_experts:
        swiglu_of_experts()
    with compiling_graphs(capability, CPU) as of_layers:
        for overrides in MODELS:
            train_one_layer(overrides)
    figures = ("capability", "name", "registers", "spill_bytes")
    return [
        {"of": of} | {name: getattr(made, name) for name in figures}
        for of, compiled in (("norm_heads", of_norms), ("weighted_swiglu_back", of_experts), ("layers", of_layers))
        for made in compiled
    ]


if __name__ == "__main__":
    print(json.dumps([row for capability in (90, 100) for row in rows(capability)]))
