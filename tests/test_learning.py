"""Every family learns: the smallest run that knows a handful of documents by heart, and then says and draws them."""

import numpy as np
import pytest
import torch
from distributed import run_ranks
from PIL import Image
from tiny_runs import CPU, FAMILIES, SIDE, overrides_for

from megatron_mm.config.compose import compose
from megatron_mm.config.validate import validate
from megatron_mm.data.codebook import fit_patch_codebook
from megatron_mm.data.shards import Record, write_shards
from megatron_mm.parallel.distributed import process_groups
from megatron_mm.sampling.decoding import settings_for
from megatron_mm.sampling.generation import generate, refusal
from megatron_mm.sampling.model import SamplingModel
from megatron_mm.train import StopSignal, train
from megatron_mm.types import TextSegment

WORDS = ("left", "top", "frame", "cross")
PLAIN = [
    "optim.lr=5e-3",
    "optim.lr_warmup_iters=10",
    "optim.weight_decay=0",
    "model.trunk.hidden_dropout=0",
    "train.micro_batch_size=4",
]
ITERATIONS = {
    "transfusion": 700,
    "chameleon": 200,
    "janus": 100,
    "showo": 200,
    "mmada": 350,
    "showo_flow": 400,
    "unimoe": 80,
}
WIDER = [
    "model.trunk.hidden_size=64",
    "model.trunk.ffn_hidden_size=256",
    "model.caption_first=0.95",
    "optim.lr=3e-3",
    "train.global_batch_size=8",
]
"""Transfusion tells noise from a picture at every level of noise, which takes more than knowing four of them."""


def pictures() -> dict[str, Image.Image]:
    """Waves in four directions."""
    y, x = np.mgrid[:SIDE, :SIDE]
    waves = [np.sin(0.9 * (x * np.cos(angle) + y * np.sin(angle)) + angle) for angle in (0.1, 0.9, 1.7, 2.5)]
    return {
        word: Image.fromarray((127.5 + 127 * wave).astype(np.uint8)) for word, wave in zip(WORDS, waves, strict=True)
    }


def learn(init_kwargs, config) -> dict:
    """The last losses, what it says of each picture, and whether it draws each word's picture."""
    with process_groups(config.parallel, config.train.seed, CPU, **init_kwargs) as layout:
        steps = []
        train(config, layout, CPU, StopSignal(), steps.append)
    with SamplingModel.load(config.checkpoint.save) as model:
        shown = pictures()
        settings = settings_for(
            model.family.name, temperature=0, image_temperature=0, cfg_scale=1.0, image_cfg_scale=1.0, steps=50,
            max_new_tokens=8, repetition_penalty=1.0,
        )  # fmt: skip
        said = generate(model, [[model.read_image(picture)] for picture in shown.values()], "text", settings)
        found = {
            "losses": {name: np.mean([step.losses[name] for step in steps[-10:]]) for name in steps[-1].losses},
            "said": [model.tokenizer.decode(document[0].ids) for document in said if document],
        }
        if refusal(model, ["image"]) is None:
            prompts = [[TextSegment(model.tokenizer.encode(word))] for word in shown]
            drawn = [model.codec.decode(d[0].data)[..., 0] for d in generate(model, prompts, "image", settings)]
            known = [model.codec.decode(model.codec.encode(picture))[..., 0] for picture in shown.values()]
            # [drawn, known]
            found["error"] = np.abs(np.array(drawn, float)[:, None] - np.array(known, float)).mean((2, 3)) / 255
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, "unimoe"])
def test_it_knows_four_documents_by_heart(family, tmp_path):
    write_shards(tmp_path / "train", [Record(word, (word, picture)) for word, picture in pictures().items()])
    fit_patch_codebook(list(pictures().values()), 16, 2, 1, SIDE, SIDE, 0).save(tmp_path / "codebook.npz")
    own = [*PLAIN, f"train.train_iters={ITERATIONS[family]}", f"checkpoint.save={tmp_path}/run/checkpoints"]
    own += WIDER if family == "transfusion" else []
    own += ["model.condition_dropout=0"] if family != "unimoe" else []
    config = compose(overrides_for(family, tmp_path, tmp_path / "run", *own))
    validate(config, 1)
    torch.set_num_threads(1)
    found = run_ranks(learn, 1, config)[0]
    assert all(loss < 0.3 for name, loss in found["losses"].items() if name not in ("z", "image")), found["losses"]
    assert found["said"] == list(WORDS)
    if family != "unimoe":
        assert found["error"].argmin(1).tolist() == [0, 1, 2, 3], "each word's own picture"
        error = found["error"].diagonal()
        # Noise is predicted at all levels alike, of which few need the word: Transfusion is slowest to learn it, and a
        # picture may still be blurred (0.09 to 0.14 over six seeds; other pictures are at 0.4).
        assert error.mean() < 0.2 if family == "transfusion" else error.max() < 0.1
