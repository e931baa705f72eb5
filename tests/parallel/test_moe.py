"""A layer of experts against transformers' Mixtral, and the balancing loss against its formula."""

import pytest
import torch
from distributed import run_ranks
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from trunk_runs import config_of

from megatron_mm.config.model import TrunkConfig
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.build import build_chunks
from megatron_mm.parallel.distributed import process_groups
from megatron_mm.parallel.experts import GroupedExperts
from megatron_mm.parallel.moe import Routing, take_routing

CPU = torch.device("cpu")
WIDTH, FFN, EXPERTS = 16, 24, 4
TRUNK = TrunkConfig(
    num_layers=1, hidden_size=WIDTH, num_attention_heads=2, ffn_hidden_size=FFN, num_experts=EXPERTS,
    moe_aux_loss_coeff=0.3,
)  # fmt: skip
KINDS = torch.tensor([[1, 1, 2, 2, 2, 1], [1, 2, 2, 0, 0, 0]], dtype=torch.int32).T


def moe_layer(init, precision, x, weights, dispatcher, grouped):
    """(output, gradients of the input and of every weight, routing) of our layer; the loss is sum(output ** 2)."""
    trunk = TrunkConfig(**{**TRUNK.__dict__, "moe_token_dispatcher_type": dispatcher, "moe_grouped_gemm": grouped})
    config = config_of(trunk, precision)
    with process_groups(config.parallel, 0, CPU, **init) as layout:
        (model,) = build_chunks(config, build_family(config.model, 256), layout, CPU)
        layer = model.decoder.layers[0].mlp
        up, down = (expert_weights(layer.experts, name) for name in ("linear_fc1", "linear_fc2"))
        with torch.no_grad():
            layer.router.weight.copy_(weights["gate"])
            for weight, name in ((up, "up"), (down, "down")):
                for own, given in zip(weight, weights[name], strict=True):
                    own.copy_(given)
        x = x.clone().requires_grad_()
        layer.show_tokens(KINDS)
        output, _ = layer(x)
        output.square().sum().backward()
        gradients = {
            "x": x.grad,
            "gate": layer.router.weight.grad,
            "up": up.grad if grouped else torch.stack([weight.grad for weight in up]),
            "down": down.grad if grouped else torch.stack([weight.grad for weight in down]),
        }
        return output.detach(), gradients, Routing.of(model.config, take_routing([model]).tolist())


def expert_weights(experts, name):
    """One parameter for all, or a list of them."""
    if isinstance(experts, GroupedExperts):
        return getattr(experts, name).weight
    return [getattr(expert, name).weight for expert in experts.local_experts]


@pytest.mark.parametrize(("dispatcher", "grouped"), [("alltoall", False), ("allgather", False), ("alltoall", True)])
def test_a_layer_is_mixtrals(dispatcher, grouped):
    torch.manual_seed(0)
    block = MixtralSparseMoeBlock(
        MixtralConfig(hidden_size=WIDTH, intermediate_size=FFN, num_local_experts=EXPERTS, num_experts_per_tok=2)
    )
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    x = torch.randn(6, 2, WIDTH)
    theirs = x.clone().requires_grad_()
    output = block(theirs)
    output = output[0] if isinstance(output, tuple) else output
    # The balancing loss, spelled out for each row: E * sum_e (share of choices) * (mean probability).
    balance = 0.0
    for row in range(2):
        real = (KINDS[:, row] > 0).nonzero().flatten()
        logits = theirs[real, row] @ block.gate.weight.T
        choices = torch.zeros_like(logits).scatter(1, logits.topk(2).indices, 1.0)
        balance = balance + EXPERTS * (choices.mean(0) / 2 * logits.softmax(-1).mean(0)).sum()
    (output.square().sum() + 0.3 / 8 * balance).backward()

    weights = {"gate": block.gate.weight, "up": block.experts.gate_up_proj, "down": block.experts.down_proj}
    given = {name: weight.detach() for name, weight in weights.items()}
    ours, gradients, routing = run_ranks(moe_layer, 1, "fp32", x, given, dispatcher, grouped)[0]
    torch.testing.assert_close(ours, output.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients["x"], theirs.grad, rtol=1e-4, atol=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-4, atol=1e-4)

    assert routing.balance == pytest.approx(balance.item(), rel=1e-5)
    chosen = (x @ given["gate"].T).topk(2).indices
    for number, modality in enumerate(("text", "image"), 1):
        counted = torch.bincount(chosen[number == KINDS].flatten(), minlength=EXPERTS)
        assert routing.load[0, number - 1].tolist() == counted.tolist(), modality
