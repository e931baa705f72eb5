"""Show-o and MMaDA from official names against transformers' Phi and Llama on random weights, and back bit for bit.

transformers' models are given the families' own masks, document by document.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_ranks
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM, PreTrainedModel

from megatron_mm.config.compose import Config, from_dict_config
from megatron_mm.config.schema import ParallelConfig
from megatron_mm.convert import from_hf, to_hf
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.pack import pack
from megatron_mm.documents.builder import Builder
from megatron_mm.engines.checkpoint import Checkpointer
from megatron_mm.engines.format import common_state
from megatron_mm.engines.megatron import MegatronEngine
from megatron_mm.engines.weights import load_weights
from megatron_mm.families.base import Family
from megatron_mm.families.registry import build_family
from megatron_mm.mask import dense
from megatron_mm.parallel.build import build_chunks
from megatron_mm.parallel.context.runtime import Part
from megatron_mm.parallel.distributed import process_groups
from megatron_mm.parallel.stages import from_last_stage, through_stages
from megatron_mm.types import Document, ImageSegment, Sample, TextSegment

TEXT, CODES, LENGTH = 256, 16, 48
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CPU = torch.device("cpu")
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS = pytest.mark.parametrize("parallel", [{}, TP2, PP2], ids=["one", "tp2", "pp2"])


@dataclass(frozen=True)
class Official:
    """A family's config.json, the transformers model with its body, and the official name of each weight of that."""

    config: dict
    model: Callable[[], PreTrainedModel]
    rename: Callable[[str], str]
    ids: dict[str, int]
    """Where ids must be, text tokens and codes in mind."""


def phi() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    config = PhiConfig(
        vocab_size=TEXT + 10 + CODES + 1, intermediate_size=48, qk_layernorm=True, rope_parameters=rope, **SIZES
    )
    return PhiForCausalLM(config)


def llama() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 500.0}
    config = LlamaConfig(vocab_size=300, intermediate_size=48, rms_norm_eps=1e-3, rope_parameters=rope, **SIZES)
    return LlamaForCausalLM(config)


def llada_name(name: str) -> str:
    """Of Llama's weights, as LLaDA's code has them: its gate is `ff_proj`, what `up_proj` is multiplied with."""
    outer = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}
    if (stem := name.removesuffix(".weight")) in outer:
        return f"model.transformer.{outer[stem]}.weight"
    _, _, number, *part, _ = name.split(".")
    inner = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm", "o_proj": "attn_out",
        "gate_proj": "ff_proj", "up_proj": "up_proj", "down_proj": "ff_out",
    }  # fmt: skip
    return f"model.transformer.blocks.{number}.{inner.get(part[-1], part[-1])}.weight"


OFFICIAL = {
    "showo": Official(
        {
            "_class_name": "Showo", "llm_vocab_size": TEXT, "vocab_size": TEXT + 10 + CODES + 1, "w_clip_vit": False,
            "codebook_size": CODES, "num_vq_tokens": 4, "mask_token_id": TEXT + 10 + CODES, "rope_theta": 500.0,
            "intermediate_size": 48, **SIZES, "special_ids": {"bos": 3, "eos": 3},
        },
        phi,
        lambda name: f"showo.{name}",
        {"pad": 256, "boi": 257, "eoi": 258, "t2i": 261, "mmu": 262, "image_start": 266, "mask": 282, "bos": 3},
    ),
    "mmada": Official(
        {
            "model_type": "mmada", "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 48,
            "rope_theta": 500.0, "rms_norm_eps": 1e-3, "vocab_size": 300, "embedding_size": 300, "mask_token_id": 250,
            "codebook_size": CODES, "num_vq_tokens": 4, "block_type": "llama", "include_bias": False,
            "special_ids": {
                "pad": 1, "bos": 2, "eos": 3, "boi": 4, "eoi": 5, "t2i": 6, "mmu": 7, "image_start": 256,
            },
        },
        llama,
        llada_name,
        {"pad": 1, "boi": 4, "mmu": 7, "image_start": 256, "mask": 250, "eos": 3},
    ),
}  # fmt: skip


def rows_of(family: Family) -> list[list[Document]]:
    """Text to image beside text; image to text."""
    rng = np.random.default_rng(0)
    text, image = TextSegment(rng.integers(10, 200, 9)), ImageSegment(rng.integers(0, CODES, (2, 2)))
    samples = [
        Sample(0, "a", (text, image), task="generation"),
        Sample(1, "b", (text,)),
        Sample(2, "c", (text, image), task="understanding"),
    ]
    first, second, third = (Builder(family).lay_out(sample, Streams(0, sample.uid, 0)) for sample in samples)
    return [[first, second], [third]]


def load_config(checkpoint: Path, **parallel) -> Config:
    config = from_dict_config(OmegaConf.create(common_state(checkpoint)["config"]))
    own = {"text_block": 4} if config.model.family == "mmada" else {}
    model = replace(config.model, condition_dropout=0.0, **own)
    return replace(config, model=model, parallel=ParallelConfig(**parallel))


def make(_init, folder: Path, name: str) -> list[list[torch.Tensor]]:
    """Writes a release to folder/official and its conversion to folder/checkpoint; returns transformers' logits."""
    official = OFFICIAL[name]
    torch.manual_seed(0)
    model = official.model().eval()
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            weight.copy_(0.5 + torch.rand_like(weight) if "norm" in weight_name else 0.15 * torch.randn_like(weight))
    (folder / "official").mkdir()
    (folder / "official" / "config.json").write_text(json.dumps(official.config))
    weights = {official.rename(n): w for n, w in model.state_dict().items()}
    save_file(weights, folder / "official" / "model.safetensors")
    from_hf(folder / "official", folder / "checkpoint", ["data.tokenizer=bytes"])
    family = build_family(load_config(folder / "checkpoint").model, TEXT)
    with torch.no_grad():
        return [[logits_of(model, document) for document in row] for row in rows_of(family)]


def logits_of(model: PreTrainedModel, document: Document) -> torch.Tensor:
    allowed = torch.from_numpy(dense(document.mask))
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
    return model(torch.from_numpy(document.tokens)[None], attention_mask=mask).logits[0]


@pytest.fixture(scope="module", params=OFFICIAL)
def oracle(request, tmp_path_factory) -> tuple[str, Path, list[list[torch.Tensor]]]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, run_ranks(make, 1, folder, request.param)[0]


def run_ours(init, checkpoint: Path, parallel: dict) -> torch.Tensor:
    config = load_config(checkpoint, **parallel)
    family = build_family(config.model, TEXT)
    rows = rows_of(family)
    batch = pack(rows, LENGTH, family.fields, family.vocab.pad, [[0] * len(row) for row in rows])
    with process_groups(config.parallel, 0, CPU, **init) as layout, torch.no_grad():
        (stage,) = chunks = build_chunks(config, family, layout, CPU)
        load_weights(chunks, checkpoint)
        hidden = through_stages(stage, Part.of(batch)).transpose(0, 1)
        return from_last_stage(stage, lambda back: back.ops.gather_logits(back.logits(hidden)))


@pytest.mark.slow
@LAYOUTS
def test_logits_are_transformers(oracle, parallel):
    _, folder, expected = oracle
    ranks = run_ranks(run_ours, ParallelConfig(**parallel).model_parallel_size, folder / "checkpoint", parallel)
    for ours, row in zip(ranks[0], expected, strict=True):
        theirs = torch.cat(row)
        error = (ours[: len(theirs), : theirs.shape[-1]] - theirs).abs().max() / theirs.abs().max()
        assert error < 1e-5, f"off by {error:.1e} of the largest value"


def test_ids_are_the_official_ones(oracle):
    name, folder, _ = oracle
    vocab = build_family(load_config(folder / "checkpoint").model, TEXT).vocab
    named = vars(vocab) | dict(vocab.special)
    assert {key: named[key] for key in OFFICIAL[name].ids} == OFFICIAL[name].ids


def train_under(init, checkpoint: Path, out: Path, parallel: dict) -> None:
    """Loads the converted weights under a layout, and writes a training checkpoint of them."""
    config = load_config(checkpoint, **parallel)
    family = build_family(config.model, TEXT)
    with process_groups(config.parallel, 0, CPU, **init) as layout:
        engine = MegatronEngine(config, family, layout, CPU)
        load_weights(engine.models, checkpoint)
        engine.optimizer.reload_model_params()
        Checkpointer(engine, out).save(1, {"config": common_state(checkpoint)["config"]})


def convert_back(_init, checkpoint: Path, out: Path) -> None:
    to_hf(checkpoint, out)


def check_same(before: Path, after: Path) -> None:
    """Both folders hold the same release."""
    (one,), (other,) = (list(folder.glob("*.safetensors")) for folder in (before, after))
    theirs, ours = load_file(one), load_file(other)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], weight) and ours[name].dtype == weight.dtype for name, weight in theirs.items())
    written, read = (json.loads((folder / "config.json").read_text()) for folder in (after, before))
    assert written | read == written, "what the release says is kept"


def test_round_trip_is_bit_exact(oracle, tmp_path):
    name, folder, _ = oracle
    run_ranks(convert_back, 1, folder / "checkpoint", tmp_path)
    check_same(folder / "official", tmp_path)
    assert (tmp_path / "pytorch_model.safetensors").exists() == (name == "showo"), "as the official code calls it"


@LAYOUTS
@pytest.mark.slow
def test_a_training_checkpoint_of_any_layout_converts_back(oracle, parallel, tmp_path):
    _, folder, _ = oracle
    ranks = ParallelConfig(**parallel).model_parallel_size
    run_ranks(train_under, ranks, folder / "checkpoint", tmp_path / "trained", parallel)
    (tmp_path / "trained" / "hf_config.json").write_text((folder / "checkpoint" / "hf_config.json").read_text())
    run_ranks(convert_back, 1, tmp_path / "trained", tmp_path / "back")
    check_same(folder / "official", tmp_path / "back")


def convert_twice(_init, folder: Path) -> None:
    """Without the config that it came from, so that all of it is ours; then in again."""
    (folder / "hf_config.json").unlink()
    to_hf(folder, folder / "alone")
    from_hf(folder / "alone", folder / "again", ["data.tokenizer=bytes"])


@pytest.mark.slow
def test_a_model_of_ours_is_described_so_that_it_is_read_again(oracle, tmp_path):
    _, folder, _ = oracle
    copy = shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
    run_ranks(convert_twice, 1, copy)
    assert load_config(copy / "again").model == load_config(copy).model
