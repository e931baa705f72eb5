import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from megatron_mm.data.image_codec import PatchVQCodec, PixelCodec
from megatron_mm.data.image_transform import ImageTransform
from megatron_mm.data.index import build_index
from megatron_mm.data.prepare import main
from megatron_mm.data.sample import SampleReader
from megatron_mm.data.tokenizer import ByteTokenizer
from megatron_mm.types import ImageSegment, TextSegment

TOKENIZER = ByteTokenizer()


def read_all(folder, codec) -> list:
    index = build_index(folder, TOKENIZER)
    reader = SampleReader(index, TOKENIZER, codec)
    return [reader.read(uid) for uid in range(len(index))]


def texts(sample) -> list[str]:
    return [TOKENIZER.decode(segment.ids) for segment in sample.segments if isinstance(segment, TextSegment)]


def test_mnist(tmp_path, capsys):
    pytest.importorskip("mnist")
    mnist = pytest.importorskip("megatron_mm.data.sources.mnist")
    command = ["mnist", "--out", str(tmp_path), "--limit", "300", "--interleaved", "0.2", "--codes", "32"]
    command += ["--latents", "0"]
    main(command)
    codec = PatchVQCodec.load(tmp_path / "codebook.npz")
    assert (codec.codes, codec.grid(28, 28)) == (32, (7, 7))
    card = json.loads((tmp_path / "dataset.json").read_text())
    train = read_all(tmp_path / "train", codec)
    assert card["splits"]["train"] == {"documents": len(train), "images": 300}
    assert card["splits"]["val"]["images"] == 300
    counting = [sample for sample in train if len(sample.meta["labels"]) > 1]
    assert 0.12 < len(counting) / len(train) < 0.25
    assert {len(sample.segments) % 2 for sample in counting} == {0, 1}, "some begin with a picture"
    for sample in train:
        labels = sample.meta["labels"]
        first = int(len(sample.segments) % 2 and sample in counting)
        assert len(sample.segments) == 2 * len(labels) - first
        if sample in counting:
            assert labels == list(range(labels[0], labels[0] + len(labels)))
            assert texts(sample) == [mnist.NAMES[label] for label in labels[first:]]
        else:
            assert texts(sample) == [mnist.caption(labels[0])]

    written = (tmp_path / "dataset.json").stat().st_mtime_ns
    main(command)
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "dataset.json").stat().st_mtime_ns == written
    other = [*command, "--seed", "1"]
    with pytest.raises(ValueError, match="prepared with other options.*--force"):
        main(other)
    main([*other, "--force"])
    assert json.loads((tmp_path / "dataset.json").read_text())["options"]["seed"] == "1"


def test_mnist_labels_belong_to_their_images():
    """A nearest-mean classifier of the original labels agrees with the written ones far beyond chance."""
    pytest.importorskip("mnist")
    mnist = pytest.importorskip("megatron_mm.data.sources.mnist")
    (images, labels), _, _ = mnist._read_package()
    means = np.stack([images[labels == label].mean(0) for label in range(10)])
    records = list(mnist._documents(mnist._pictures(images[:2000], 28), labels[:2000], 0.3, seed=0))
    right = [
        np.square(means - np.asarray(picture).reshape(-1) / 256).sum(1).argmin() == label
        for record in records
        for picture, label in zip(record.segments[-1::-2], record.meta["labels"][::-1], strict=True)
    ]
    assert len(right) == 2000 and np.mean(right) > 0.75


def test_emoji(tmp_path):
    pytest.importorskip("emoji")
    source = pytest.importorskip("megatron_mm.data.sources.emoji")
    main(["emoji", "--out", str(tmp_path)])
    train, val = (build_index(tmp_path / split, TOKENIZER) for split in ("train", "val"))
    assert len(train) + len(val) > 1800 and 0.01 < len(val) / len(train) < 0.04
    assert set(train.heights[train.heights > 0]) == set(train.widths[train.widths > 0]) == {72}
    assert not any(tone in train.key(uid) for uid in range(len(train)) for tone in ("1f3fb", "1f3ff"))
    assert source._artwork("👨‍🚀").stem == "1f468-200d-1f680"


def test_folder(tmp_path):
    for name in ("a", "deep/b.c"):
        path = tmp_path / "src" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2)).save(path)
        path.with_suffix(".txt").write_text(f"caption of {name}\n")
    command = ["folder", "--src", str(tmp_path / "src"), "--out", str(tmp_path / "out"), "--held-out", "0"]
    main(command)
    index = build_index(tmp_path / "out" / "train", TOKENIZER)
    assert [index.key(uid) for uid in range(len(index))] == ["a", "deep/b_c"]
    assert index.tokens[index.tokens >= 0].tolist() == [len("caption of a"), len("caption of deep/b.c")]
    (tmp_path / "src" / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"a.png has no caption"):
        main([*command, "--force"])


PAGE = """<html><head><title>no</title><style>b {}</style></head><body><nav>skip <a>me</a></nav>
<h1>Brushes</h1><p>Choose  a <b>brush</b>.</p><img src="big.png"><p>Then paint &amp; look:</p>
<img src="icon.png"><p>as here</p><img src="https://example.org/x.png"><img src="../shared.jpg">
<script>var x = "<img src='big.png'>";</script></body></html>"""


def test_html(tmp_path):
    pages = tmp_path / "manual" / "pages"
    pages.mkdir(parents=True)
    (pages / "v1.2-brushes.html").write_text(PAGE)
    (pages / "empty.html").write_text("<html><body><img src='missing.png'></body></html>")
    Image.new("RGB", (100, 80), "red").save(pages / "big.png")
    Image.new("RGB", (16, 16)).save(pages / "icon.png")
    Image.new("L", (64, 64)).save(tmp_path / "manual" / "shared.jpg")
    out = tmp_path / "out"
    main(["html", "--src", str(tmp_path / "manual"), "--out", str(out), "--held-out", "0"])
    assert sample_of(out / "train")["segments"] == [
        {"type": "text", "text": "Brushes Choose a brush."},
        {"type": "image", "file": "0.png"},
        {"type": "text", "text": "Then paint & look: as here"},
        {"type": "image", "file": "1.jpeg"},
    ]
    assert json.loads((out / "dataset.json").read_text())["splits"]["train"] == {"documents": 1, "images": 2}
    with pytest.raises(ValueError, match="holds no pages"):
        main(["html", "--src", str(out), "--out", str(tmp_path / "again")])


def sample_of(folder) -> dict:
    """The JSON of the only document in a folder of shards."""
    (shard,) = folder.glob("*.tar")
    with tarfile.open(shard) as tar:
        (name,) = (member for member in tar.getnames() if member.endswith(".json"))
        return json.loads(tar.extractfile(name).read())


def test_questions(tmp_path):
    Image.new("L", (8, 8), 7).save(tmp_path / "seven.png")
    lines = [
        {"question": "1 + 1?", "answer": "2", "reasoning": "one and one", "id": "sum.1"},
        {"question": "What digit?", "answer": "seven", "image": "seven.png"},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    out = tmp_path / "out"
    main(["questions", "--src", str(tmp_path / "q.jsonl"), "--out", str(out), "--held-out", "0"])
    asked, seen = read_all(out / "train", PixelCodec(1, ImageTransform(8, 8)))
    assert asked.key == "sum_1" and (asked.meta, seen.meta) == ({"prompt_segments": 1}, {"prompt_segments": 2})
    assert texts(asked) == ["1 + 1?", "<think>\none and one\n</think>\n2"]
    assert isinstance(seen.segments[0], ImageSegment) and texts(seen) == ["What digit?", "seven"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"question": "a"', "q.jsonl, line 1: JSONDecodeError"),
        ('{"question": "a"}', "line 1: KeyError: 'answer'; a line is a JSON object with question, answer and"),
        ('{"question": "a", "answer": "b", "image": "no.png"}', "line 1: FileNotFoundError.*no.png"),
        ("[1]", "line 1: TypeError"),
    ],
)
def test_questions_that_are_none(tmp_path, line, said):
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(ValueError, match=said):
        main(["questions", "--src", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="is no file"):
        main(["questions", "--src", str(tmp_path / "no"), "--out", str(tmp_path / "out")])
