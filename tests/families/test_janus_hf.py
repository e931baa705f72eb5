"""Janus against transformers' JanusForConditionalGeneration on random weights, through our own conversion."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from documents import label_counts, lay_out
from omegaconf import OmegaConf
from safetensors.torch import load_file
from sharded import assemble, local_shards
from transformers import JanusConfig, JanusForConditionalGeneration

from megatron_mm.config.compose import Config, from_dict_config
from megatron_mm.config.generate import SamplingConfig
from megatron_mm.config.schema import ParallelConfig
from megatron_mm.convert import from_hf, to_hf
from megatron_mm.data.pack import pack
from megatron_mm.engines.format import common_state
from megatron_mm.engines.weights import load_weights
from megatron_mm.families.registry import build_family
from megatron_mm.interop.janus_weights import weights_to_hf
from megatron_mm.interop.rules import VQ_PREFIX
from megatron_mm.parallel.build import build_chunks
from megatron_mm.parallel.context.runtime import Part
from megatron_mm.parallel.distributed import process_groups
from megatron_mm.sampling.generation import generate
from megatron_mm.sampling.model import SamplingModel
from megatron_mm.types import ImageSegment, Sample, TextSegment

CPU = torch.device("cpu")
VOCAB, CODES, LENGTH, SEEN = 300, 20, 40, 4
PAD, BOS, EOS, BOI, EOI, IMAGE = 290, 291, 292, 293, 294, 295
ROWS = (((0, "understanding"), (1, "generation")), ((2, "interleaved"), (3, "text")), ((4, "generation"),))
"""Packed rows of (number, kind of document)."""
CONFIG = {
    "text_config": {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    },
    "vision_config": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "mlp_ratio": 2.0,
        "projection_dim": 32,
        "num_image_tokens": SEEN,
    },
    "vq_config": {
        "embed_dim": 8,
        "num_embeddings": CODES,
        "projection_dim": 32,
        "image_token_embed_dim": 32,
        "latent_channels": 32,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
    },
}


def sample(number: int, kind: str) -> Sample:
    rng = np.random.default_rng(number)
    text = lambda n: TextSegment(rng.integers(0, 256, n))  # noqa: E731
    pixels = lambda: rng.uniform(-1, 1, (3, 8, 8)).astype(np.float32)  # noqa: E731
    image = lambda: ImageSegment(rng.integers(0, CODES, (2, 2)), pixels())  # noqa: E731
    segments = {
        "understanding": lambda: (text(6), image()),
        "generation": lambda: (text(5), image()),
        "interleaved": lambda: (text(3), image(), image(), text(4)),
        "text": lambda: (text(7),),
    }[kind]()
    return Sample(number, kind, segments, task=kind if kind in ("understanding", "generation") else "auto")


@dataclass(frozen=True)
class Reading:
    """What a model computes of one document: logits of text and codes, float [n, V], and the positions and next tokens
    that its losses read."""

    text: torch.Tensor
    codes: torch.Tensor
    text_labels: dict[int, int]
    code_labels: dict[int, int]


def read_with_transformers(model: JanusForConditionalGeneration, number: int, kind: str) -> Reading:
    """By transformers' own embedding of pixels and codes, one document at a time."""
    source, specials = sample(number, kind), {BOI, EOI, IMAGE}
    texts = [s.ids.tolist() for s in source.segments if isinstance(s, TextSegment)]
    images = [s for s in source.segments if isinstance(s, ImageSegment)]
    seen = [BOI, *[IMAGE] * SEEN, EOI]
    if kind == "generation":
        codes = torch.from_numpy(images[0].data.reshape(1, -1))
        embed = lambda ids: model.get_input_embeddings()(torch.tensor([ids]))  # noqa: E731
        drawn = model.prepare_embeddings_for_image_generation(codes)
        embeds = torch.cat([embed([BOS, *texts[0], BOI]), drawn, embed([EOI, EOS])], 1)
        hidden = model.model.language_model(inputs_embeds=embeds).last_hidden_state[0]
        boi = 1 + len(texts[0])
        labels = {}, {boi + i: code for i, code in enumerate(codes[0].tolist())}
    else:
        ids = {
            "understanding": lambda: [BOS, *seen, *texts[0], EOS],
            "interleaved": lambda: [BOS, *texts[0], *seen, *seen, *texts[1], EOS],
            "text": lambda: [BOS, *texts[0], EOS],
        }[kind]()
        pixels = torch.from_numpy(np.stack([image.pixels for image in images])) if images else None
        hidden = model.model(input_ids=torch.tensor([ids]), pixel_values=pixels).last_hidden_state[0]
        labels = {i: after for i, after in enumerate(ids[1:]) if after not in specials}, {}
    return Reading(model.lm_head(hidden), model.model.generation_head(hidden), *labels)


@dataclass(frozen=True)
class Oracle:
    """A Hugging Face folder, its conversion, and what transformers computes for `ROWS`, each document by itself."""

    hf: Path
    checkpoint: Path
    readings: list[list[Reading]]
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def make_oracle(_init, folder: Path) -> Oracle:
    torch.manual_seed(0)
    config = JanusConfig(**CONFIG, image_token_id=IMAGE, tie_word_embeddings=False, attn_implementation="eager")
    model = JanusForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(0.5 + torch.rand_like(parameter))
            else:
                parameter.normal_(std=0.15)
        model.model.generation_head.vision_head.bias.normal_(std=0.05)
    model.save_pretrained(folder / "hf")
    ids = [f"model.vocabulary.boi={BOI}", f"model.vocabulary.eoi={EOI}"]
    from_hf(folder / "hf", folder / "checkpoint", ["data.tokenizer=bytes", *ids])

    readings = [[read_with_transformers(model, *document) for document in row] for row in ROWS]
    flat = [reading for row in readings for reading in row]
    means = []
    for logits, labels in (("text", "text_labels"), ("codes", "code_labels")):
        parts = [(getattr(r, logits)[list(getattr(r, labels))], list(getattr(r, labels).values())) for r in flat]
        chosen, targets = torch.cat([part for part, _ in parts]), [label for _, own in parts for label in own]
        means.append(F.cross_entropy(chosen, torch.tensor(targets)))
    loss = means[0] + means[1]
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if not name.startswith(VQ_PREFIX)}
    readings = [[replace(r, text=r.text.detach(), codes=r.codes.detach()) for r in row] for row in readings]
    return Oracle(folder / "hf", folder / "checkpoint", readings, loss.detach(), gradients)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory) -> Oracle:
    return run_ranks(make_oracle, 1, tmp_path_factory.mktemp("oracle"))[0]


def load_config(checkpoint: Path, **changes) -> Config:
    """Without condition dropout, which draws."""
    config = from_dict_config(OmegaConf.create(common_state(checkpoint)["config"]))
    model = replace(config.model, condition_dropout=0.0, **changes)
    return replace(config, model=model)


def run_ours(init, checkpoint: Path, tp: int, changes: dict):
    """Logits of both heads [B, S, V], loss, gradients as shards."""
    config = replace(load_config(checkpoint, **changes), parallel=ParallelConfig(tensor_model_parallel_size=tp))
    family = build_family(config.model, 256)
    rows = [[lay_out(family, sample(*document)) for document in row] for row in ROWS]
    batch = pack(rows, LENGTH, family.fields, family.vocab.pad, [[0] * len(row) for row in rows])
    with process_groups(config.parallel, 0, CPU, **init) as layout:
        (model,) = chunks = build_chunks(config, family, layout, CPU)
        load_weights(chunks, checkpoint)
        with torch.no_grad():
            hidden = model.hidden(Part.of(batch)).transpose(0, 1)
            heads = (model.back.logits, model.back.code_logits)
            logits = [model.back.ops.gather_logits(head(hidden)) for head in heads]
        sums, counts = model(Part.of(batch)), label_counts(family, batch)
        loss = sums[0] / counts["text"] + sums[1] / counts["image"]
        loss.backward()
        for parameter in model.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return *logits, loss.detach(), local_shards(chunks)


def check_close(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error < 1e-5, f"{name} is off by {error:.1e} of the largest value"


@pytest.mark.parametrize("tp", [1, 2])
def test_logits_and_gradients_are_transformers(oracle, tp):
    results = run_ranks(run_ours, tp, oracle.checkpoint, tp, {})
    text, codes, loss, _ = results[0]
    for row, readings in enumerate(oracle.readings):
        for name, ours, size in (("text", text, VOCAB), ("codes", codes, CODES)):
            theirs = torch.cat([getattr(reading, name) for reading in readings])
            check_close(ours[row, : len(theirs), :size], theirs, f"{name} logits of packed documents")
            assert (ours[row, :, size:] == torch.finfo(ours.dtype).min).all(), "padding entries must never be drawn"
    check_close(loss, oracle.loss, "loss")
    gradients = assemble([shards for *_, shards in results])
    mapped = dict(weights_to_hf(gradients, load_config(oracle.checkpoint).model, VOCAB))
    assert mapped.keys() == oracle.gradients.keys()
    for name, theirs in oracle.gradients.items():
        if name.endswith("k_proj.bias"):  # softmax takes a constant of all keys away: zero but for rounding
            assert mapped[name].abs().max() < 1e-6 and theirs.abs().max() < 1e-6
            continue
        assert theirs.abs().max() > 1e-6, f"{name} is not exercised"
        check_close(mapped[name], theirs, name)


def test_a_frozen_encoder_gets_no_gradient_and_changes_no_other(oracle):
    frozen, whole = (run_ranks(run_ours, 1, oracle.checkpoint, 1, {"freeze_encoder": f})[0][3] for f in (True, False))
    for name, gradient in assemble([frozen]).items():
        expected = torch.zeros_like(gradient) if ".encoder." in name else assemble([whole])[name]
        assert torch.equal(gradient, expected), name


def round_trip(_init, oracle: Oracle, out: Path) -> dict:
    """Converts back; returns what transformers says of loading the result."""
    to_hf(oracle.checkpoint, out)
    _, report = JanusForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    return {key: sorted(map(str, report[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def test_round_trip_is_bit_exact(oracle, tmp_path):
    (report,) = run_ranks(round_trip, 1, oracle, tmp_path)
    assert report == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    before, after = (load_file(folder / "model.safetensors") for folder in (oracle.hf, tmp_path))
    assert before.keys() == after.keys() and any(name.startswith(VQ_PREFIX) for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    ours, theirs = (JanusConfig.from_pretrained(folder).to_dict() for folder in (tmp_path, oracle.hf))
    assert ours == theirs
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False


def generate_both(_init, oracle: Oracle) -> tuple[list, list]:
    """(ours, transformers') greedy continuations: codes of two guided images, and text behind two images."""
    model = JanusForConditionalGeneration.from_pretrained(oracle.hf, attn_implementation="eager").eval()
    model.generation_config.generation_kwargs = {"boi_token_id": BOI}
    model.generation_config.pad_token_id, model.generation_config.bos_token_id = PAD, BOS
    texts = [[65, 66, 67], [70, 71, 72, 73, 74]]
    images = [s for n in (0, 4) for s in sample(n, "generation").segments if isinstance(s, ImageSegment)]
    theirs = []
    for ids in texts:
        prompt = torch.tensor([[BOS, *ids, BOI]])
        options = {"generation_mode": "image", "do_sample": False, "guidance_scale": 2.0, "use_cache": True}
        theirs.append(model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0].tolist())
    for image, ids in zip(images, texts, strict=True):
        prompt = torch.tensor([[BOS, BOI, *[IMAGE] * SEEN, EOI, *ids]])
        out = model.generate(
            input_ids=prompt,
            pixel_values=torch.from_numpy(image.pixels)[None],
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=6,
            eos_token_id=EOS,
            suppress_tokens=[PAD, BOS, BOI, EOI, *range(256, 290), *range(IMAGE, VOCAB)],
        )
        theirs.append([token for token in out[0, prompt.shape[1] :].tolist() if token != EOS])
    with SamplingModel.load(oracle.checkpoint) as ours:
        greedy = SamplingConfig(temperature=0, image_temperature=0, cfg_scale=2.0, max_new_tokens=6)
        written = generate(ours, [[TextSegment(np.array(ids))] for ids in texts], "image", greedy)
        drawn = [document[0].data.ravel().tolist() for document in written]
        prompts = [[image, TextSegment(np.array(ids))] for image, ids in zip(images, texts, strict=True)]
        read = generate(ours, prompts, "text", greedy)
        return drawn + [[i for s in document for i in s.ids.tolist()] for document in read], theirs


def test_greedy_sampling_is_transformers(oracle):
    ours, theirs = run_ranks(generate_both, 1, oracle)[0]
    assert ours == theirs and ours[0] != ours[1] and ours[2] != ours[3]
