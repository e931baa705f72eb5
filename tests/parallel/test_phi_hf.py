"""A trunk of Phi's options against transformers' PhiForCausalLM on random weights and biases (the body of Show-o)."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from sharded import assemble
from transformers import PhiConfig, PhiForCausalLM
from trunk_runs import CPU, VOCAB, Z_WEIGHT, config_of, documents, engine_of, run_trunk

from megatron_mm.config.masked import ShowoConfig
from megatron_mm.config.model import TrunkConfig
from megatron_mm.engines.checkpoint import Checkpointer
from megatron_mm.engines.whole_weights import load_whole_weights
from megatron_mm.interop.showo_weights import weights_from_hf
from megatron_mm.mask import dense
from megatron_mm.parallel.distributed import process_groups, single_process
from megatron_mm.types import IGNORE

LAYERS, HEADS = 2, 4
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS = {"one": {}, "tp2": TP2, "tp2_sp": TP2 | {"sequence_parallel": True}, "pp2": PP2}


def trunk_of(groups: int) -> TrunkConfig:
    return TrunkConfig(
        num_layers=LAYERS,
        hidden_size=32,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        qk_layernorm=True,
        rotary_base=500.0,
        normalization="LayerNorm",
        activation="gelu",
        add_bias_linear=True,
        parallel_block=True,
        rotary_percent=0.5,
        head_bias=True,
    )


def to_ours(hf: dict[str, torch.Tensor], trunk: TrunkConfig) -> dict[str, torch.Tensor]:
    """Phi's weights (or their gradients) under our names, by way of Show-o's."""
    return dict(weights_from_hf({f"showo.{name}": w for name, w in hf.items()}, ShowoConfig(trunk=trunk), VOCAB))


@dataclass(frozen=True)
class Oracle:
    """What transformers computes for `documents(spans)`, each document by itself."""

    groups: int
    spans: bool
    weights: dict[str, torch.Tensor]
    logits: list[torch.Tensor]
    losses: dict[str, float]
    gradients: dict[str, torch.Tensor]


def additive(mask: np.ndarray) -> torch.Tensor:
    """float32 [1, 1, n, n]."""
    allowed = torch.from_numpy(dense(mask))
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]


@pytest.fixture(scope="module", params=[(4, False), (2, True)], ids=["causal", "omni-gqa"])
def oracle(request) -> Oracle:
    groups, spans = request.param
    trunk = trunk_of(groups)
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=VOCAB,
            hidden_size=trunk.hidden_size,
            intermediate_size=4 * trunk.hidden_size,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=groups,
            qk_layernorm=True,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
            attn_implementation="eager",
        )
    )
    generator = torch.Generator().manual_seed(groups)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    logits, losses, log_zs = [], [], []
    for row in documents(spans):
        for document in row:
            mask = additive(document.mask) if spans else None
            (computed,) = model(torch.from_numpy(document.tokens)[None], attention_mask=mask).logits
            labels = torch.from_numpy(document.fields["labels"])
            losses.append(F.cross_entropy(computed, labels, reduction="none", ignore_index=IGNORE)[:-1])
            log_zs.append(computed[:-1].logsumexp(-1))
            logits.append(computed.detach())
    terms = {"ce": torch.cat(losses).mean(), "z": torch.cat(log_zs).square().mean()}
    (terms["ce"] + Z_WEIGHT * terms["z"]).backward()
    parameters = dict(model.named_parameters())
    weights = to_ours({name: p.detach() for name, p in parameters.items()}, trunk)
    gradients = to_ours({name: p.grad for name, p in parameters.items()}, trunk)
    return Oracle(groups, spans, weights, logits, {k: v.item() for k, v in terms.items()}, gradients)


def check_close(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    assert theirs.abs().max() > 0, f"{name} is not exercised"
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error < 1e-5, f"{name} is off by {error:.1e} of the largest value"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients_are_transformers(oracle, layout):
    config = config_of(trunk_of(oracle.groups), **LAYOUTS[layout])
    results = run_ranks(run_trunk, config.parallel.model_parallel_size, config, oracle.weights, oracle.spans)
    logits, losses, _ = results[-1]
    assert losses == pytest.approx(oracle.losses, rel=1e-5)
    first, second, third = oracle.logits
    for row, theirs in zip(logits, (torch.cat([first, second]), third), strict=True):
        check_close(row[: len(theirs), :VOCAB], theirs, "logits")
        assert (row[:, VOCAB:] == torch.finfo(row.dtype).min).all(), "padding entries must never be drawn"
    gradients = assemble([shards for *_, shards in results])
    assert gradients.keys() == oracle.gradients.keys()
    for name, theirs in oracle.gradients.items():
        if "q_layernorm" in name or "k_layernorm" in name:
            check_close(gradients[name].sum(0), theirs[0], name)  # transformers' heads share theirs
        else:
            check_close(gradients[name], theirs, name)


def save(init, config, weights, folder) -> None:
    with process_groups(config.parallel, 0, CPU, **init) as layout:
        Checkpointer(engine_of(config, layout, weights), folder).save(1, {})


def load(_init, folder) -> dict[str, torch.Tensor]:
    with single_process(CPU):
        return load_whole_weights(folder)


@pytest.mark.slow
@pytest.mark.parametrize("oracle", [(2, True)], ids=["omni-gqa"], indirect=True)
def test_a_checkpoint_holds_every_weight_under_a_layout_free_name(oracle, tmp_path):
    config = config_of(trunk_of(oracle.groups), **LAYOUTS["tp2_sp"])
    run_ranks(save, 2, config, oracle.weights, tmp_path)
    (loaded,) = run_ranks(load, 1, tmp_path)
    assert loaded.keys() == oracle.weights.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in oracle.weights.items())
