"""Chameleon against transformers' ChameleonForConditionalGeneration on random weights, through our own conversion."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed import run_ranks
from documents import label_counts, next_tokens
from omegaconf import OmegaConf
from safetensors.torch import load_file
from sharded import assemble, local_shards
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from megatron_mm.config.compose import Config, from_dict_config
from megatron_mm.config.schema import OptimConfig, ParallelConfig
from megatron_mm.convert import from_hf, to_hf
from megatron_mm.data.pack import pack
from megatron_mm.engines.checkpoint import Checkpointer
from megatron_mm.engines.format import common_state
from megatron_mm.engines.megatron import MegatronEngine
from megatron_mm.engines.weights import load_weights
from megatron_mm.families.base import Family
from megatron_mm.families.registry import build_family
from megatron_mm.interop.chameleon_weights import weights_to_hf
from megatron_mm.interop.rules import VQ_PREFIX
from megatron_mm.mask import causal
from megatron_mm.parallel.build import build_chunks
from megatron_mm.parallel.context.runtime import Part
from megatron_mm.parallel.distributed import process_groups
from megatron_mm.types import IGNORE, Document, PackedBatch

VOCAB, LENGTH, Z_WEIGHT = 300, 24, 0.1
CPU = torch.device("cpu")
SPECIALS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<eoss>": 19, "<racm3:break>": 20, "<image>": 21}
CODES = {f"IMGIMG{''.join(chr(65 + int(digit)) for digit in str(code))}Z": 4 + code for code in range(15)}
VQ = {
    "embed_dim": 4,
    "num_embeddings": 15,
    "latent_channels": 4,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "resolution": 8,
}


def documents() -> list[list[Document]]:
    """Two rows: two packed documents with padding behind them, and one that fills the row."""
    rng = np.random.default_rng(0)
    rows = []
    for lengths in ((9, 13), (LENGTH,)):
        tokens = [rng.integers(0, VOCAB, n) for n in lengths]
        none = np.zeros((0, 3), np.int32)
        rows.append([Document(0, t, causal(len(t)), next_tokens(t), none) for t in tokens])
    return rows


def packed(family: Family) -> PackedBatch:
    rows = documents()
    return pack(rows, LENGTH, family.fields, family.vocab.pad, [[0] * len(row) for row in rows])


@dataclass(frozen=True)
class Oracle:
    """A Hugging Face folder, its conversion, and what transformers computes for `documents`, each by itself."""

    hf: Path
    checkpoint: Path
    logits: list[list[torch.Tensor]]
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def make_oracle(_init, folder: Path, swin: bool, kv_heads: int) -> Oracle:
    torch.manual_seed(kv_heads)
    model = ChameleonForConditionalGeneration(
        ChameleonConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            swin_norm=swin,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            vocabulary_map=SPECIALS | CODES,
            vq_config=VQ,
            attn_implementation="eager",
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.5 + torch.rand_like(parameter))
            else:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder / "hf")
    from_hf(folder / "hf", folder / "checkpoint", ["data.tokenizer=bytes"])

    logits, losses, log_zs = [], [], []
    for row in documents():
        logits.append([model.lm_head(model.model(torch.from_numpy(d.tokens)[None]).last_hidden_state)[0] for d in row])
        for document, computed in zip(row, logits[-1], strict=True):
            labels = torch.from_numpy(document.fields["labels"])
            losses.append(F.cross_entropy(computed, labels, reduction="none", ignore_index=IGNORE)[:-1])
            log_zs.append(computed[:-1].logsumexp(-1))
    loss = torch.cat(losses).mean() + Z_WEIGHT * torch.cat(log_zs).square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if not name.startswith(VQ_PREFIX)}
    logits = [[computed.detach() for computed in row] for row in logits]
    return Oracle(folder / "hf", folder / "checkpoint", logits, loss.detach(), gradients)


@pytest.fixture(scope="module", params=[(False, 4), (False, 2), (True, 2)], ids=["pre-mha", "pre-gqa", "swin-gqa"])
def oracle(request, tmp_path_factory) -> Oracle:
    return run_ranks(make_oracle, 1, tmp_path_factory.mktemp("oracle"), *request.param)[0]


def load_config(checkpoint: Path, **parallel) -> Config:
    config = from_dict_config(OmegaConf.create(common_state(checkpoint)["config"]))
    return replace(config, parallel=ParallelConfig(**parallel))


def run_ours(init, checkpoint: Path, parallel: dict):
    """(logits [B, S, V], None before the last stage), loss, and gradients as shards: the last two without PP only."""
    config = load_config(checkpoint, **parallel)
    family = build_family(config.model, 256)
    batch = packed(family)
    with process_groups(config.parallel, 0, CPU, **init) as layout:
        (model,) = chunks = build_chunks(config, family, layout, CPU)
        load_weights(chunks, checkpoint)
        if layout.pp_rank > 0:
            received = torch.empty(LENGTH, len(batch.tokens), config.model.trunk.hidden_size)
            dist.recv(received, layout.rank - layout.tp_size)
            model.set_input_tensor(received)
        if layout.pp_rank < layout.pp_size - 1:
            dist.send(model.hidden(Part.of(batch)).contiguous(), layout.rank + layout.tp_size)
            return None, None, None
        with torch.no_grad():
            logits = model.back.ops.gather_logits(model.back.logits(model.hidden(Part.of(batch)).transpose(0, 1)))
        if layout.pp_size > 1:
            return logits, None, None
        sums, counts = model(Part.of(batch)), label_counts(family, batch)
        loss = sums[0] / counts["ce"] + Z_WEIGHT * sums[1] / counts["z"]
        loss.backward()
        for parameter in model.parameters():
            parameter.data = parameter.grad
        return logits, loss.detach(), local_shards(chunks)


def check_close(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error < 1e-5, f"{name} is off by {error:.1e} of the largest value"


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}],
    ids=["one", "tp2", "pp2"],
)
def test_logits_and_gradients_are_transformers(oracle, parallel):
    results = run_ranks(run_ours, ParallelConfig(**parallel).model_parallel_size, oracle.checkpoint, parallel)
    logits, loss, _ = results[-1]
    for row, per_document in zip(logits, oracle.logits, strict=True):
        theirs = torch.cat(per_document)
        check_close(row[: len(theirs), :VOCAB], theirs, "logits of packed documents")
        assert (row[:, VOCAB:] == torch.finfo(row.dtype).min).all(), "padding entries must never be drawn"
    if loss is None:
        return
    check_close(loss, oracle.loss, "loss")
    gradients = assemble([shards for _, _, shards in results])
    assert (gradients["front.embedding.weight"][VOCAB:] == 0).all()
    assert (gradients["back.head.weight"][VOCAB:] == 0).all()
    mapped = dict(weights_to_hf(gradients, load_config(oracle.checkpoint).model, VOCAB))
    assert mapped.keys() == oracle.gradients.keys()
    for name, theirs in oracle.gradients.items():
        assert theirs.abs().max() > 0, f"{name} is not exercised"
        check_close(mapped[name], theirs, name)


def round_trip(_init, oracle: Oracle, checkpoint: Path, out: Path) -> dict:
    """Converts back; returns what transformers says of loading the result."""
    to_hf(checkpoint, out)
    _, report = ChameleonForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    return {key: sorted(map(str, report[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def test_round_trip_is_bit_exact(oracle, tmp_path):
    (report,) = run_ranks(round_trip, 1, oracle, oracle.checkpoint, tmp_path)
    assert report == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    before, after = (load_file(folder / "model.safetensors") for folder in (oracle.hf, tmp_path))
    assert before.keys() == after.keys() and any(name.startswith(VQ_PREFIX) for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [ChameleonConfig.from_pretrained(folder).to_dict() for folder in (oracle.hf, tmp_path)]
    assert configs[0] == configs[1]


def train_under(init, checkpoint: Path, out: Path, parallel: dict) -> None:
    """One step with learning rate 0, and a training checkpoint with its optimizer state."""
    config = replace(load_config(checkpoint, **parallel), optim=OptimConfig(lr=0.0))
    family = build_family(config.model, 256)
    with process_groups(config.parallel, 0, CPU, **init) as layout:
        engine = MegatronEngine(config, family, layout, CPU)
        load_weights(engine.models, checkpoint)
        engine.optimizer.reload_model_params()
        engine.step([engine.prepare(packed(family))])
        Checkpointer(engine, out).save(1, {"config": common_state(checkpoint)["config"]})


@pytest.mark.slow
def test_a_training_checkpoint_of_another_layout_converts_back(oracle, tmp_path):
    parallel = {"tensor_model_parallel_size": 2}
    run_ranks(train_under, 2, oracle.checkpoint, tmp_path / "trained", parallel)
    (report,) = run_ranks(round_trip, 1, oracle, tmp_path / "trained", tmp_path / "hf")
    assert report["unexpected_keys"] == [] and all("vqmodel" in name for name in report["missing_keys"])
    before, after = load_file(oracle.hf / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert after.keys() == {name for name in before if not name.startswith(VQ_PREFIX)}
    assert all(torch.equal(before[name], weight) for name, weight in after.items())
