"""Fused parts against what they replace: megatron-core's RoPE, and the same functions without a compiler."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor import config as inductor

from megatron_mm.config.model import TrunkConfig
from megatron_mm.config.schema import FusionConfig
from megatron_mm.nn.dropout import hash_tokens
from megatron_mm.nn.fusion import (
    add_dropped,
    compiled,
    feed_forward_activation,
    gelu_tanh,
    liger_rms_norm,
    norm_heads,
    rotary_frequencies,
    rotary_table,
    rotate,
    select,
)

S, B, H, D = 48, 2, 3, 16


def swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def cases(dtype=torch.float64, device="cpu") -> dict:
    """name -> (function, tensors that get a gradient, other arguments)."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)  # noqa: E731
    positions = torch.arange(S).repeat(B, 1).t().to(device)
    keys = torch.tensor([[5, 2**31 - 7]], device=device).expand(S, B).int()
    table = rotary_table(
        positions, rotary_frequencies(D, 10000.0, positions.device), torch.promote_types(dtype, torch.float32)
    ).unsqueeze(2)
    return {
        # A head's queries as megatron-core cuts them: a view into the mixed projection.
        "rotate": (rotate, [draw(S, B, H, 3 * D)[..., :D]], [table]),
        "rotate_in_part": (rotate, [draw(S, B, H, 3 * D)[..., : 2 * D]], [table]),
        "norm_heads": (norm_heads, [draw(S, B, H, D), 1 + draw(H, D), draw(H, D)], [1e-5]),
        "add_dropped": (
            add_dropped, [draw(S, B, 4 * D), draw(S, B, 4 * D)], [0.3, hash_tokens(keys, positions.int(), 12345)]
        ),
        "swiglu": (swiglu, [draw(S, B, 8 * D)], []),
    }  # fmt: skip


NAMES = list(cases())


def results(function, leaves, others) -> list[torch.Tensor]:
    """The output, and the gradient of each leaf."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves, *others)
    direction = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).to(out).view_as(out)
    return [out, *torch.autograd.grad(out, leaves, direction)]


def assert_same(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        largest = float(b.detach().abs().max())
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance * largest)


def test_rotate_is_megatron_cores():
    _, [x], [table] = cases()["rotate"]
    cos, sin = table.chunk(2, -1)
    angles = torch.atan2(sin, cos).repeat(1, 1, 1, 2)
    theirs = results(_apply_rotary_pos_emb_bshd, [x], [angles])
    assert_same(results(rotate, [x], [table]), theirs, 1e-14)


def test_channels_beyond_the_table_pass_through():
    _, [x], [table] = cases()["rotate_in_part"]
    out = rotate(x, table)
    assert torch.equal(out[..., D:], x[..., D:]) and torch.equal(out[..., :D], rotate(x[..., :D], table))


def test_a_rotation_by_half_precision_loses_one_rounding_only():
    """The table stays in fp32: bf16 cosines would cost several units in the last place."""
    _, [x], [table] = cases(torch.bfloat16)["rotate"]
    assert table.dtype == torch.float32 and rotate(x, table).dtype == torch.bfloat16
    torch.testing.assert_close(rotate(x, table).double(), rotate(x.double(), table), rtol=2**-8, atol=1e-6)


def test_swiglu_is_megatron_cores():
    """Its backward pass is written out by hand; here without a compiler."""
    function, leaves, _ = cases()["swiglu"]
    with torch.compiler.set_stance("force_eager"):
        ours = results(lambda x: bias_swiglu_impl(x, None), leaves, [])
    assert_same(ours, results(function, leaves, []), 1e-14)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_gelu_is_the_tanh_approximation_whoever_computes_it(biases, compiled):
    """megatron-core's plain path calls the function; its fused one goes by the function's name, and has 8 digits."""
    trunk = TrunkConfig(activation="gelu", add_bias_linear=biases)
    function, fused = feed_forward_activation(trunk, compiled)
    assert fused == (biases and compiled)
    _, leaves, _ = cases()["swiglu"]
    bias = torch.linspace(-1, 1, leaves[0].shape[-1], dtype=torch.float64)
    new = lambda x, b: 0.5 * (x + b) * (1 + torch.tanh((2 / torch.pi) ** 0.5 * ((x + b) + 0.044715 * (x + b) ** 3)))  # noqa: E731
    with torch.compiler.set_stance("force_eager"):
        ours = results(bias_gelu_impl if fused else lambda x, b: function(x + b), [*leaves, bias], [])
    assert function is F.gelu if fused else function is gelu_tanh
    assert_same(ours, results(new, [*leaves, bias], []), 1e-8 if fused else 1e-14)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("biases", [False, True])
def test_experts_have_a_fused_activation_only_where_megatron_core_has_one(activation, biases):
    trunk = TrunkConfig(activation=activation, add_bias_linear=biases, num_experts=2)
    assert feed_forward_activation(trunk, compiled=True)[1] == (activation == "swiglu" and not biases)


@pytest.mark.parametrize("name", NAMES)
def test_traced_as_one_graph(name, monkeypatch):
    """What torch.compile makes of the function and its gradients, before any code is generated."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    function, leaves, others = cases()[name]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    traced = torch.compile(function, backend=backend, dynamic=False, fullgraph=True)
    assert_same(results(traced, leaves, others), results(function, leaves, others), 1e-14)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_generated_code(name, monkeypatch):
    """By inductor's C++ (minutes where its headers are not compiled yet). The hash must wrap in int32 here as well."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    function, leaves, others = cases()[name]
    with inductor.patch(compile_threads=1):  # other tests fork, which threads do not survive
        ours = results(compiled(function), leaves, others)
    assert_same(ours, results(function, leaves, others), 1e-14)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*NAMES, "liger_rms_norm"])
def test_cuda_kernels(name):
    """In bf16 (8 bits, rounded at most twice, sums in fp32) against fp64 on the same inputs."""
    if name == "liger_rms_norm":
        pytest.importorskip("liger_kernel")
        draw = lambda *shape: torch.randn(shape, device="cuda").bfloat16()  # noqa: E731
        function, leaves, others = liger_rms_norm, [draw(S, B, 256), 1 + draw(256)], [1e-5]
        exact = lambda x, weight, eps: F.rms_norm(x, (256,), weight, eps)  # noqa: E731
    else:
        function, leaves, others = cases(torch.bfloat16, "cuda")[name]
        exact, function = function, compiled(function)
    expected = results(exact, [leaf.double() for leaf in leaves], others)
    assert_same(results(function, leaves, others), expected, 2**-6)


def test_auto_is_eager_on_a_cpu_and_compiled_on_cuda(monkeypatch):
    chosen, line = select(FusionConfig(), torch.device("cpu"))
    assert chosen == FusionConfig("eager", "torch") and "eager" in line
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    assert select(FusionConfig(), torch.device("cuda"))[0] == FusionConfig("compile", "torch")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert select(FusionConfig(), torch.device("cuda"))[0] == FusionConfig("eager", "torch")


def test_what_cannot_run_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="fusion.elementwise=compile cannot run: .* CPU"):
        select(FusionConfig("compile"), torch.device("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"fusion.rms_norm=liger needs the liger-kernel package: pip install"):
        select(FusionConfig(rms_norm="liger"), torch.device("cuda"))
