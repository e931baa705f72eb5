"""`python -m megatron_mm.generate`, from a checkpoint to files."""

import contextlib
import io
import json
import subprocess
import sys

import pytest
import torch
from distributed import run_ranks
from PIL import Image
from tiny_models import config_for

from megatron_mm.config.cli import user_errors
from megatron_mm.config.compose import to_yaml
from megatron_mm.data.codebook import fit_patch_codebook
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.engines.checkpoint import Checkpointer
from megatron_mm.engines.megatron import MegatronEngine
from megatron_mm.families.registry import build_family
from megatron_mm.generate import main
from megatron_mm.parallel.distributed import process_groups

CPU = torch.device("cpu")


def save(init_kwargs, config, folder):
    with process_groups(config.parallel, config.train.seed, CPU, **init_kwargs) as layout:
        family = build_family(config.model, load_tokenizer(config.data.tokenizer).size)
        Checkpointer(MegatronEngine(config, family, layout, CPU), folder).save(7, {"config": to_yaml(config)})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = config_for("transfusion", folder, "parallel.use_distributed_optimizer=false")
    run_ranks(save, 1, config, folder / "checkpoints")
    return folder / "checkpoints"


def call(_init_kwargs, arguments):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(arguments)
    return printed.getvalue()


def generate(checkpoint, out, *arguments, steps=True):
    """Printed lines and samples.jsonl."""
    common = [f"checkpoint={checkpoint}", f"out={out}", *["steps=2"] * steps, "max_new_tokens=8"]
    printed = run_ranks(call, 1, [*common, *arguments])[0]
    return printed.splitlines(), [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_text_to_image(checkpoint, tmp_path):
    printed, samples = generate(checkpoint, tmp_path, "prompt=[a cat, a dog]", "num_samples=2", "batch_size=3")
    assert [(s["prompt"], s["sample"]) for s in samples] == [
        ([{"text": name}], number) for name in ("a cat", "a dog") for number in range(2)
    ]
    files = [part["image"] for sample in samples for part in sample["segments"]]
    assert sorted(files) == sorted(path.name for path in tmp_path.glob("*.png")) and len(files) == 4
    with Image.open(tmp_path / files[0]) as image:
        assert (image.size, image.mode) == ((8, 8), "L")
    assert printed[0] == f"a cat -> {tmp_path / files[0]}"
    page = (tmp_path / "index.html").read_text()
    assert all(f'src="{file}"' in page for file in files) and page.count("a dog") == 2


def test_image_to_text_and_interleaved(checkpoint, tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    image = f"image={tmp_path / 'red.png'}"
    for arguments in ([image], [image, "prompt=this is"], ["prompt=first", image, image, "write=auto"]):
        _, (sample,) = generate(checkpoint, tmp_path / "out", *arguments)
        assert [next(iter(part)) for part in sample["prompt"]] == [
            {"image": "image", "prompt": "text"}[argument.partition("=")[0]]
            for argument in arguments
            if not argument.startswith("write")
        ]
        assert all(set(part) in ({"text"}, {"image"}) for part in sample["segments"])
        assert "data:image/png;base64," in (tmp_path / "out" / "index.html").read_text()


def test_janus_draws_reads_and_interleaves(tmp_path):
    fit_patch_codebook([Image.new("L", (8, 8), value) for value in range(0, 256, 5)], 16, 2, 1, 8, 8, 0).save(
        tmp_path / "codebook.npz"
    )
    config = config_for("janus", tmp_path, "parallel.use_distributed_optimizer=false")
    run_ranks(save, 1, config, tmp_path / "checkpoints")
    _, (drawn,) = generate(tmp_path / "checkpoints", tmp_path / "drawn", "prompt=a cat", "cfg_scale=2", steps=False)
    with Image.open(tmp_path / "drawn" / drawn["segments"][0]["image"]) as image:
        assert (image.size, image.mode) == ((8, 8), "L")
    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    arguments = [f"image={tmp_path / 'red.png'}", "prompt=this is"]
    _, (read,) = generate(tmp_path / "checkpoints", tmp_path / "read", *arguments, steps=False)
    assert [set(part) for part in read["segments"]] in ([], [{"text"}])
    _, (both,) = generate(tmp_path / "checkpoints", tmp_path / "both", "prompt=x", "write=image,text", steps=False)
    assert [set(part) for part in both["segments"]][:2] == [{"image"}, {"text"}]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["checkpoint={here}/no", "prompt=x"], "error: {here}/no holds no checkpoint"),
        (["checkpoint={here}/no", "prompt=x", "stesp=3"], "error: stesp is not a known key (did you mean steps?)"),
        (["checkpoint={here}/no"], "error: Nothing to continue: add prompt"),
        (["checkpoint={here}/no", "image={here}/broken.png"], "error: image={here}/broken.png cannot be read as a"),
        (["checkpoint={here}/no", "prompt=x", "out={here}/broken.png"], "error: out={here}/broken.png is no folder"),
    ],
)
def test_mistake_is_one_line(arguments, said, tmp_path, capsys):
    (tmp_path / "broken.png").write_text("no picture")
    with pytest.raises(SystemExit) as stop, user_errors():
        main([f"out={tmp_path / 'out'}", *(argument.format(here=tmp_path) for argument in arguments)])
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == ""
    assert output.err.startswith(said.format(here=tmp_path)) and output.err.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.slow
def test_module_runs():
    result = subprocess.run([sys.executable, "-m", "megatron_mm.generate"], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "error: checkpoint is not set" in result.stderr
