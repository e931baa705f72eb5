"""Layers behind the trunk against transformers' own: outputs, and the gradient of everything."""

from types import SimpleNamespace

import torch
from distributed import run_ranks
from plain_ops import PlainOps

from megatron_mm import mask as masks
from megatron_mm.config.model import TrunkConfig
from megatron_mm.config.schema import ParallelConfig, TrainConfig
from megatron_mm.nn.fusion import rotary_frequencies
from megatron_mm.nn.ops import Conditions
from megatron_mm.parallel.distributed import single_process
from megatron_mm.parallel.ops import MegatronOps
from megatron_mm.parallel.transformer_config import transformer_config

D, HEADS, GROUPS, LAYERS, N = 32, 4, 2, 2, 24
OWN = TrunkConfig(
    num_layers=LAYERS, hidden_size=D, num_attention_heads=HEADS, num_query_groups=GROUPS, ffn_hidden_size=48
)
TRUNK = TrunkConfig(
    hidden_size=16, hidden_dropout=0.5, parallel_block=True, add_bias_linear=True, qk_layernorm=True, num_experts=None
)
"""Of which these layers take nothing over."""


def frequencies(device):
    return rotary_frequencies(D // HEADS, 500.0, device)


def inputs():
    """Two rows of a document and padding; images at 4 .. 9 and, in the second row, at 12 .. 17, of three times."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, N, D, generator=generator, dtype=torch.float64)
    vectors = torch.randn(4, D, generator=generator, dtype=torch.float64)
    number = torch.zeros(2, N, dtype=torch.int64)
    number[0, 4:10], number[1, 4:10], number[1, 12:18] = 1, 2, 3
    document = masks.with_spans(N - 4, [(4, 10), (12, 18)])
    meta = torch.zeros(2, 6, N, dtype=torch.int32)
    meta[:, :3] = torch.from_numpy(masks.concatenate([document], N))
    meta[:, 3, : N - 4] = torch.arange(N - 4)
    return x, Conditions(number, vectors, torch.tensor([False, True, True, True])), SimpleNamespace(meta=meta)


def computed(layers):
    x, conditions, attended = inputs()
    x.requires_grad_()
    conditions.vectors.requires_grad_()
    out = layers(x, conditions, SimpleNamespace(meta=attended.meta, attention=None))
    out[:, : N - 4].square().sum().backward()
    return out[:, : N - 4].detach(), x.grad[:, : N - 4], conditions.vectors.grad


def to_ours(plain, take):
    """What `take` gives of each parameter, under our names."""
    found = {}
    for number, (layer, modulation) in enumerate(zip(plain.layers, plain.modulations, strict=True)):
        attention, mlp = layer.self_attn, layer.mlp
        grouped = [take(p.weight).view(GROUPS, -1, D) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        own = {
            "input_layernorm.weight": take(layer.input_layernorm.weight),
            "pre_mlp_layernorm.weight": take(layer.post_attention_layernorm.weight),
            "self_attention.linear_qkv.weight": torch.cat(grouped, 1).flatten(0, 1),
            "self_attention.linear_proj.weight": take(attention.o_proj.weight),
            "self_attention.q_layernorm.weight": take(attention.q_norm.weight),
            "self_attention.k_layernorm.weight": take(attention.k_norm.weight),
            "mlp.linear_fc1.weight": torch.cat([take(mlp.gate_proj.weight), take(mlp.up_proj.weight)]),
            "mlp.linear_fc2.weight": take(mlp.down_proj.weight),
            "modulate.weight": take(modulation.weight),
            "modulate.bias": take(modulation.bias),
        }
        found |= {f"layers.{number}.{name}": value for name, value in own.items()}
    return found


def ours(_init_kwargs, weights, recompute):
    with single_process(torch.device("cpu")):
        parallel = ParallelConfig(recompute_granularity=recompute)
        core = transformer_config(TRUNK, parallel, TrainConfig(precision="fp64"), "reference")
        layers = MegatronOps(core).modulated_layers(OWN, frequencies).double()
        parameters = dict(layers.named_parameters())
        assert parameters.keys() == weights.keys()
        for name, parameter in parameters.items():
            parameter.data.copy_(weights[name])
        made = computed(layers)
        return made, {name: parameter.grad for name, parameter in parameters.items()}


def test_outputs_and_gradients_are_transformers():
    torch.manual_seed(0)
    plain = PlainOps().modulated_layers(OWN, frequencies).double()
    for parameter in plain.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    expected = computed(plain)
    for recompute in (None, "full", "selective"):
        ((made, gradients),) = run_ranks(ours, 1, to_ours(plain, lambda p: p.detach()), recompute)
        for one, other in zip(made, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        for name, gradient in to_ours(plain, lambda p: p.grad).items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-8, atol=1e-9, msg=name)
