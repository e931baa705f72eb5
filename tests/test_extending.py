"""docs/extending.md, outside a clone: a package of a user's own with a family, a source and configurations."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def call(folder: Path, *arguments: str, works: bool = True) -> str:
    """What `python -m arguments` printed in `folder`."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(folder / "site"), *sys.path])}
    command = [sys.executable, "-m", *arguments]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert (result.returncode == 0) == works, result.stderr
    return result.stdout if works else result.stderr


@pytest.fixture
def site(tmp_path):
    """The example as pip installs it: its package, and its entry points."""
    example = ROOT / "examples/own_package"
    shutil.copytree(example / "captioner", tmp_path / "site/captioner")
    shutil.copytree(example / "configs", tmp_path / "configs")
    points = re.findall(r'\[project.entry-points."(.*?)"\]\n(.*?)\n\n', (example / "pyproject.toml").read_text(), re.S)
    info = tmp_path / "site/captioner-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: captioner\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "".join(f"[{group}]\n{lines.replace(chr(34), '')}\n" for group, lines in points)
    )
    return tmp_path


@pytest.mark.slow
def test_the_example_trains_and_speaks(site):
    call(site, "megatron_mm.data.prepare", "squares", "--out", "data/squares")
    train = ["megatron_mm.train", "--config-dir", "configs", "experiment=captioner"]
    call(site, *train)
    kept = (site / "runs/captioner/config.yaml").read_text()
    assert "family: captioner\n" in kept and "shortest_caption: 2\n" in kept
    for shade, name in ((0, "black"), (255, "white")):
        Image.new("L", (8, 8), shade).save(site / f"{name}.png")
        call(site, "megatron_mm.generate", "checkpoint=runs/captioner/checkpoints", f"image={name}.png", f"out={name}")
        sample = json.loads((site / name / "samples.jsonl").read_text())
        assert sample["segments"] == [{"text": name}]
    said = call(
        site, "megatron_mm.generate", "checkpoint=runs/captioner/checkpoints", "image=white.png", "steps=3", works=False
    )
    assert "steps=3 does nothing in a captioner model" in said
    said = call(site, *train, "model.shortest_captoin=3", works=False)
    assert "model.shortest_captoin is not a known key (did you mean model.shortest_caption?)" in said
    short = ["run.name=path", "model.family=captioner.family:PLUGIN", "train.train_iters=2", "optim.lr_warmup_iters=0"]
    call(site, *train, *short)
    assert "family: captioner.family:PLUGIN\n" in (site / "runs/path/config.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["megatron_mm.data.prepare", "triangles", "--out", "x"], "triangles is no source: use mnist"),
        (["megatron_mm.data.prepare", "captioner.nothing", "--out", "x"], "captioner.nothing cannot be imported"),
        (["megatron_mm.train", "experiment=demo", "model.family=own"], "model.family=own is unknown; families: transf"),
        (["megatron_mm.train", "experiment=demo", "model.family=no.where:X"], "no.where:X cannot be imported"),
        (["megatron_mm.train", "experiment=demo", "model.family=captioner.family:Captioner"], "is a type, not a"),
    ],
)
def test_mistakes_are_one_line(site, arguments, said):
    told = call(site, *arguments, works=False).strip().splitlines()
    assert said in told[-1] and told[-1].startswith("error: ")
