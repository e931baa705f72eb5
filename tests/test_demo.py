"""The demo's report from end to end: tiny models of every family on a few made-up digits, and the user's mistakes."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout

import numpy as np
import pytest
from distributed import run_ranks
from PIL import Image

from megatron_mm import train
from megatron_mm.config.compose import ConfigError, compose
from megatron_mm.data.image_codec import PatchVQCodec
from megatron_mm.data.image_transform import ImageTransform
from megatron_mm.data.shards import Record, write_shards
from megatron_mm.demo import main
from megatron_mm.report.pairs import mnist_splits

PICTURES = ["loss.png", "mask.png", "samples.png"]
FEW = ["images_per_class=2", "captions=6", "steps=2", "classifier_images=60", "classifier_tests=20"]


def python(folder, *arguments) -> str:
    """What the module printed."""
    command = [sys.executable, "-m", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def in_folder(_init_kwargs, folder, call, *arguments) -> str:
    """What `call(*arguments)` printed in `folder`; for a process of its own."""
    os.chdir(folder)
    with redirect_stdout(io.StringIO()) as said:
        call(*arguments)
    return said.getvalue()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with data/mnist: pairs of two classes, and a codebook."""
    folder = tmp_path_factory.mktemp("demo")
    rng = np.random.default_rng(0)
    for split, count in (("train", 80), ("val", 30)):
        records = []
        for i in range(count):
            pixels = rng.integers(0, 60, (28, 28), dtype=np.uint8)
            pixels[8:20, 12:16] += 180 * (i % 2)
            records.append(
                Record(f"pair-{i}", (("a zero", "a one")[i % 2], Image.fromarray(pixels)), {"labels": [i % 2]})
            )
        write_shards(folder / "data/mnist" / split, records)
    (folder / "data/mnist/dataset.json").write_text(json.dumps({"kind": "mnist"}))
    codebook = rng.uniform(-1, 1, (256, 16)).astype(np.float32)
    PatchVQCodec(codebook, 1, ImageTransform(28, 28), 4).save(folder / "data/mnist/codebook.npz")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("transfusion", ["data.image_tokenizer=pixels"]),
        ("chameleon", ["data.image_tokenizer=data/mnist/codebook.npz"]),
        ("janus", ["data.image_tokenizer=data/mnist/codebook.npz"]),
        ("unimoe", ["data.image_tokenizer=pixels"]),
    ],
)
def test_report(digits, family, overrides):
    run = digits / "runs" / family
    arguments = [
        "experiment=demo",
        f"model={family}_tiny",
        f"run.name={family}",
        "data.seq_length=128",
        "optim.lr_warmup_iters=0",
    ]
    config = compose([*arguments, *overrides, "train.train_iters=2", "train.micro_batch_size=8"])
    run_ranks(in_folder, 1, digits, train.main, config)
    report = [f"run=runs/{family}", *FEW]
    (said,) = run_ranks(in_folder, 1, digits, main, report)
    assert f"runs/{family}: 2 iterations in" in said and f"checkpoint=runs/{family}/checkpoints" in said
    assert all((run / name).stat().st_size > 1000 for name in PICTURES)
    first = json.loads((run / "summary.json").read_text())
    assert first["checkpoint"] == f"runs/{family}/checkpoints/iter_0000002" and first["iterations"] == 2
    assert (first["captions"]["of"], first["classifier"]["of"]) == (6, 20)
    assert first["generated_images"] is None if family == "unimoe" else first["generated_images"]["of"] == 4
    assert first["training_seconds"] > 0

    pictures = [(run / name).read_bytes() for name in PICTURES]
    python(digits, "megatron_mm.demo", *report)
    second = json.loads((run / "summary.json").read_text())
    assert first | {"sampling_seconds": 0} == second | {"sampling_seconds": 0}
    assert pictures == [(run / name).read_bytes() for name in PICTURES]


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("run=nowhere", r"nowhere holds no run \(config\.yaml is missing\)"),
        ("steps=0", r"steps=0 must be 1 or more"),
        ("runs=x", r"runs is not a known key \(did you mean run\?\)"),
    ],
)
def test_mistake_is_one_sentence(argument, said):
    with pytest.raises(ConfigError, match=said):
        main([argument])


@pytest.mark.parametrize("card", [None, {"kind": "emoji"}])
def test_another_dataset_is_refused(tmp_path, card):
    (tmp_path / "emoji/val").mkdir(parents=True)
    if card:
        (tmp_path / "emoji/dataset.json").write_text(json.dumps(card))
    run = compose(["experiment=demo", f"data.path={tmp_path}/emoji/train"])
    with pytest.raises(ConfigError, match=r"runs/demo was trained on data\.path=.*, which is not MNIST"):
        mnist_splits(run)
