"""FLOPs of a known configuration, counted by hand."""

import pytest
import torch

from megatron_mm.config.model import TrunkConfig
from megatron_mm.report.mfu import peak_flops, trunk_flops


def test_multi_head_attention():
    trunk = TrunkConfig(num_layers=2, hidden_size=8, num_attention_heads=2, ffn_hidden_size=16)
    # Weights of a layer: q, k, v, o of 8 x 8 each, gate, up, down of 8 x 16 each. Head: 8 x 10.
    weights = 2 * (4 * 64 + 3 * 128) + 80
    # A pair: q.k and p.v, each a multiplication and an addition for 8 channels, in 2 layers.
    pair = 2 * 2 * (8 + 8)
    assert trunk_flops(trunk, vocab_size=10, tokens=1, pairs=0) == 3 * 2 * weights
    assert trunk_flops(trunk, vocab_size=10, tokens=0, pairs=1) == 3.5 * pair
    assert trunk_flops(trunk, vocab_size=10, tokens=1, pairs=0, trained=0.25) == 4.5 * weights
    assert trunk_flops(trunk, vocab_size=10, tokens=5, pairs=15) == 5 * 6 * weights + 15 * 3.5 * pair


def test_grouped_queries_shrink_keys_and_values_only():
    trunk = TrunkConfig(num_layers=1, hidden_size=8, num_attention_heads=4, num_query_groups=1, ffn_hidden_size=16)
    weights = (8 * 8 + 2 * 8 * 2 + 8 * 8) + 3 * 8 * 16 + 8 * 10
    assert trunk_flops(trunk, vocab_size=10, tokens=1, pairs=0) == 6 * weights
    assert trunk_flops(trunk, vocab_size=10, tokens=0, pairs=1) == 3.5 * 4 * 8


def test_gelu_has_two_matrices_and_phi_six_flops_a_weight():
    trunk = TrunkConfig(num_layers=1, hidden_size=8, num_attention_heads=2, ffn_hidden_size=16, activation="gelu")
    assert trunk_flops(trunk, vocab_size=10, tokens=1, pairs=0) == 6 * (4 * 64 + 2 * 128 + 80)
    phi = TrunkConfig(num_layers=24, hidden_size=2048, num_attention_heads=32, activation="gelu")
    # 1.418e9 parameters, less the embedding table, biases and norms.
    assert trunk_flops(phi, 51200, 1, 0) == pytest.approx(6 * (1.418e9 - 51200 * 2048), rel=1e-3)


def test_only_the_experts_that_a_token_uses_count():
    trunk = TrunkConfig(
        num_layers=3, hidden_size=8, num_attention_heads=2, ffn_hidden_size=16, num_experts=5, moe_layer_freq=2
    )
    # Layers 0 and 2 have a router 5 x 8 and use 2 of 5 experts, layer 1 has one feed-forward.
    weights = 3 * 4 * 64 + 2 * (40 + 2 * 3 * 128) + 3 * 128 + 80
    assert trunk_flops(trunk, vocab_size=10, tokens=1, pairs=0) == 6 * weights
    mixtral = TrunkConfig(
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_query_groups=8,
        ffn_hidden_size=14336,
        num_experts=8,
    )
    # Mixtral 8x7B: 46.7e9 parameters, 12.9e9 of them active.
    assert mixtral.trunk_weights + 2 * 32000 * 4096 == pytest.approx(46.7e9, rel=1e-3)
    assert mixtral.active_weights + 2 * 32000 * 4096 == pytest.approx(12.9e9, rel=5e-3)


def test_llama_7b_is_six_flops_a_weight():
    trunk = TrunkConfig(num_layers=32, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=11008)
    # 6.738e9 parameters, less the embedding table (no product) and the norms.
    assert trunk_flops(trunk, 32000, 1, 0) == pytest.approx(6 * (6.738e9 - 32000 * 4096), rel=1e-3)


def test_a_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA B200", 2250e12), ("Tesla T4", None)],
)
def test_peak_by_the_devices_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
