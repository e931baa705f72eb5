"""Trunks of Phi's and of Qwen2's options against transformers on random weights and biases (the bodies of Show-o and
Show-o2)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from sharded import assemble
from transformers import PhiConfig, PhiForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from trunk_runs import CPU, VOCAB, Z_WEIGHT, config_of, documents, engine_of, run_trunk

from megatron_mm.config.masked import ShowoConfig
from megatron_mm.config.model import ChameleonConfig, TrunkConfig
from megatron_mm.engines.checkpoint import Checkpointer
from megatron_mm.engines.whole_weights import load_whole_weights
from megatron_mm.interop import chameleon_weights, showo_weights
from megatron_mm.mask import dense
from megatron_mm.parallel.distributed import process_groups, single_process
from megatron_mm.types import IGNORE

LAYERS, HEADS = 2, 4
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS = {"one": {}, "tp2": TP2, "tp2_sp": TP2 | {"sequence_parallel": True}, "pp2": PP2}


@dataclass(frozen=True)
class Body:
    """A model of transformers, our options for it, and how its weights (or their gradients) come under our names."""

    trunk: TrunkConfig
    make: Callable[[], PreTrainedModel]
    to_ours: Callable[[dict[str, torch.Tensor], TrunkConfig], dict[str, torch.Tensor]]


def sizes_of(trunk: TrunkConfig) -> dict:
    return {
        "vocab_size": VOCAB,
        "hidden_size": trunk.hidden_size,
        "intermediate_size": trunk.ffn_size,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": trunk.kv_heads,
        "attn_implementation": "eager",
    }


def phi(groups: int) -> Body:
    trunk = TrunkConfig(
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
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    config = PhiConfig(qk_layernorm=True, rope_parameters=rope, **sizes_of(trunk))
    return Body(trunk, lambda: PhiForCausalLM(config), phi_to_ours)


def qwen2(groups: int) -> Body:
    trunk = TrunkConfig(
        num_layers=LAYERS,
        hidden_size=32,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        rotary_base=500.0,
        layernorm_epsilon=1e-3,
        add_qkv_bias=True,
    )
    rope = {"rope_type": "default", "rope_theta": 500.0}
    config = Qwen2Config(rope_parameters=rope, rms_norm_eps=1e-3, tie_word_embeddings=False, **sizes_of(trunk))
    return Body(trunk, lambda: Qwen2ForCausalLM(config), llama_to_ours)


def phi_to_ours(hf: dict[str, torch.Tensor], trunk: TrunkConfig) -> dict[str, torch.Tensor]:
    """By way of Show-o's names."""
    prefixed = {f"showo.{name}": weight for name, weight in hf.items()}
    return dict(showo_weights.weights_from_hf(prefixed, ShowoConfig(trunk=trunk), VOCAB))


def llama_to_ours(hf: dict[str, torch.Tensor], trunk: TrunkConfig) -> dict[str, torch.Tensor]:
    """By way of Chameleon's names, which are Llama's."""
    return dict(chameleon_weights.weights_from_hf(hf, ChameleonConfig(trunk=trunk), VOCAB))


@dataclass(frozen=True)
class Oracle:
    """What transformers computes for `documents(spans)`, each document by itself."""

    trunk: TrunkConfig
    spans: bool
    weights: dict[str, torch.Tensor]
    logits: list[torch.Tensor]
    losses: dict[str, float]
    gradients: dict[str, torch.Tensor]


def additive(mask: np.ndarray) -> torch.Tensor:
    """float32 [1, 1, n, n]."""
    allowed = torch.from_numpy(dense(mask))
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]


ORACLES = {"phi": (phi(4), False), "phi-omni-gqa": (phi(2), True), "qwen2-omni-gqa": (qwen2(2), True)}


@pytest.fixture(scope="module", params=ORACLES)
def oracle(request) -> Oracle:
    body, spans = ORACLES[request.param]
    model = body.make()
    generator = torch.Generator().manual_seed(body.trunk.kv_heads)
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
    weights = body.to_ours({name: p.detach() for name, p in parameters.items()}, body.trunk)
    gradients = body.to_ours({name: p.grad for name, p in parameters.items()}, body.trunk)
    return Oracle(body.trunk, spans, weights, logits, {k: v.item() for k, v in terms.items()}, gradients)


def check_close(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    assert theirs.abs().max() > 0, f"{name} is not exercised"
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error < 1e-5, f"{name} is off by {error:.1e} of the largest value"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients_are_transformers(oracle, layout):
    config = config_of(oracle.trunk, **LAYOUTS[layout])
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
@pytest.mark.parametrize("oracle", ["phi-omni-gqa", "qwen2-omni-gqa"], indirect=True)
def test_a_checkpoint_holds_every_weight_under_a_layout_free_name(oracle, tmp_path):
    config = config_of(oracle.trunk, **LAYOUTS["tp2_sp"])
    run_ranks(save, 2, config, oracle.weights, tmp_path)
    (loaded,) = run_ranks(load, 1, tmp_path)
    assert loaded.keys() == oracle.weights.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in oracle.weights.items())
