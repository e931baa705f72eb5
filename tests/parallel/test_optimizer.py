"""The optimizer against torch's own AdamW, and what must not decay."""

from types import SimpleNamespace

import pytest
import torch
from distributed import run_ranks

from megatron_mm.config.compose import compose
from megatron_mm.engines.megatron import MegatronEngine
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.distributed import process_groups
from megatron_mm.parallel.optimizer import FusedAdam, clip_and_step, squared_grad_norm


def test_fused_adam_is_torch_adamw():
    torch.manual_seed(0)
    start = [torch.randn(7, 5), torch.randn(5)]
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    optimizers = FusedAdam(ours, **options), torch.optim.AdamW(theirs, **options)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert optimizers[0].param_groups[0]["step"] == 5


def test_fused_adam_copies_nothing_from_the_host(monkeypatch):
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(4)]
    optimizer = FusedAdam(weights)
    for weight in weights:
        weight.grad = torch.ones(3)
    monkeypatch.setattr(torch, "tensor", None)
    optimizer.step()
    assert all((weight != 1).all() for weight in weights)


CONFIG = [
    "run.name=test", "data.path=none", "model=chameleon_tiny", "optim.lr=1.0", "optim.weight_decay=0.5",
    "optim.lr_decay_style=constant", "train.train_iters=10",
]  # fmt: skip


def _engine(init_kwargs, check, *overrides):
    config = compose([*CONFIG, *overrides])
    device = torch.device("cpu")
    with process_groups(config.parallel, 1, device, **init_kwargs) as layout:
        return check(MegatronEngine(config, build_family(config.model, 256), layout, device))


def _decay(engine):
    """With no gradient, a step only decays: the factor on every parameter."""
    for parameter in engine.models[0].parameters():
        parameter.data.clamp_(min=0.01)  # biases start at zero, on which nothing shows
    engine.optimizer.reload_model_params()
    before = {name: p.detach().clone() for name, p in engine.models[0].named_parameters()}
    engine.optimizer.zero_grad()
    norm = squared_grad_norm(engine.optimizer).sqrt().item()
    assert norm == 0.0 and clip_and_step(engine.optimizer, norm)
    return {name: float((p / before[name]).mean()) for name, p in engine.models[0].named_parameters()}


BIASES = ["model.trunk.normalization=LayerNorm", "model.trunk.add_bias_linear=true", "model.trunk.head_bias=true"]


@pytest.mark.parametrize("options", [[], BIASES], ids=["llama", "biases"])
@pytest.mark.parametrize("distributed", ["true", "false"])
def test_norms_and_biases_do_not_decay(distributed, options):
    (factors,) = run_ranks(_engine, 1, _decay, f"parallel.use_distributed_optimizer={distributed}", *options)
    assert ("back.head.bias" in factors) == bool(options)
    for name, factor in factors.items():
        decays = "norm" not in name and not name.endswith("bias")
        assert factor == pytest.approx(0.5 if decays else 1.0, rel=1e-5), name


@pytest.mark.parametrize("distributed", ["true", "false"])
def test_multipliers_scale_the_learning_rate_of_what_they_name(distributed):
    """The first pattern that matches counts; with lr 1 and decay 0.5 a step without gradient leaves 1 - factor / 2."""
    patterns = "{decoder.layers.2.*: 0.5, decoder.*: 0.2, back.*: 1}"
    (factors,) = run_ranks(
        _engine, 1, _decay, f"optim.lr_multipliers={patterns}", f"parallel.use_distributed_optimizer={distributed}"
    )
    for name, factor in factors.items():
        expected = 0.75 if ".layers.2." in name else 0.9 if name.startswith("decoder") else 0.5
        if "norm" not in name and not name.endswith("bias"):
            assert factor == pytest.approx(expected, rel=1e-5), name


def _frozen(engine):
    held = sum(p.numel() for group in engine.optimizer.param_groups for p in group["params"])
    trained = sum(p.numel() for p in engine.models[0].parameters() if p.requires_grad)
    return engine.trained_of, trained, held, engine.schedule.get_lr({})


def test_the_optimizer_holds_only_what_trains():
    """Weights of a layer by hand: 64 wide, 4 heads over 2 keys of 16 channels, 192 in the feed-forward; norms
    of the layer, and with biases of its heads."""
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 192 + 2 * 64 + 2 * 16 * (4 + 2)
    (result,) = run_ranks(_engine, 1, _frozen, "optim.trainable=[decoder.layers.1.*]", "optim.frozen=[back.*]")
    (trained, everything), *counts, lr = result
    assert [trained, *counts] == [layer, layer, layer] and everything > 4 * layer and lr == 1.0


def _nan_step(engine):
    before = [p.detach().clone() for p in engine.models[0].parameters()]
    engine.optimizer.zero_grad()
    for parameter in engine.models[0].parameters():
        parameter.main_grad.fill_(float("nan"))
    stepped = clip_and_step(engine.optimizer, squared_grad_norm(engine.optimizer).sqrt().item())
    same = all(torch.equal(a, b) for a, b in zip(before, engine.models[0].parameters(), strict=True))
    return SimpleNamespace(stepped=stepped, same=same)


def test_a_gradient_that_is_not_finite_changes_nothing():
    (result,) = run_ranks(_engine, 1, _nan_step)
    assert not result.stepped and result.same
