import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import webdataset
from PIL import Image

from megatron_mm.data.image_codec import PixelCodec, encoder_pixels
from megatron_mm.data.image_transform import ImageTransform
from megatron_mm.data.index import ARRAYS, LOSS, build_index
from megatron_mm.data.sample import SampleReader
from megatron_mm.data.shards import Record, write_shards
from megatron_mm.data.tokenizer import ByteTokenizer
from megatron_mm.types import TextSegment

TOKENIZER = ByteTokenizer()


def png(value: int = 0, size: tuple[int, int] = (5, 3)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, value).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_index_counts_what_was_written(shards, records):
    index = build_index(shards, TOKENIZER)
    assert [index.key(i) for i in range(len(index))] == [record.key for record in records]
    assert index.tokens[index.segments[:-1]].tolist() == [len(record.segments[0]) for record in records]
    assert index.images.tolist() == [len(record.segments) - 1 for record in records]
    assert (index.tokens >= 0).sum() == len(records) and (index.flags == LOSS).all()
    assert [path.name for path in index.shards] == [f"shard-{i:06d}.tar" for i in range(4)]
    assert index.shard.tolist() == [i // 17 for i in range(61)]
    sizes = set(zip(index.heights.tolist(), index.widths.tolist(), strict=True))
    assert sizes == {(0, 0), (4, 4)}


def test_reader_returns_what_was_written_from_many_threads(shards, records):
    codec = PixelCodec(1, ImageTransform(4, 4))
    reader = SampleReader(build_index(shards, TOKENIZER), TOKENIZER, codec)
    uids = np.random.default_rng(0).permutation(len(records)).tolist()
    with ThreadPoolExecutor(8) as threads:
        samples = list(threads.map(reader.read, uids))
    for uid, sample in zip(uids, samples, strict=True):
        assert (sample.uid, sample.key, sample.meta) == (uid, records[uid].key, {"number": uid})
        assert len(sample.segments) == len(records[uid].segments)
        for segment, written in zip(sample.segments, records[uid].segments, strict=True):
            if isinstance(segment, TextSegment):
                assert TOKENIZER.decode(segment.ids) == written
            else:
                assert np.array_equal(codec.decode(segment.data)[..., 0], np.asarray(written))


def test_webdataset_itself_reads_the_shards(shards, records):
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [record.key for record in records]
    assert json.loads(samples[0]["json"])["meta"] == {"number": 0}


def test_equal_records_give_equal_bytes_and_nothing_half_written(tmp_path, records):
    for name in "ab":
        assert write_shards(tmp_path / name, iter(records), samples_per_shard=40) == 61
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()

    def failing():
        yield from records
        raise OSError("the corpus broke off")

    with pytest.raises(OSError, match="broke off"):
        write_shards(tmp_path / "c", failing(), samples_per_shard=40)
    assert [path.name for path in (tmp_path / "c").glob("*.tar")] == ["shard-000000.tar"]
    with pytest.raises(ValueError, match="already holds shards"):
        write_shards(tmp_path / "a", records)


def test_loose_pairs_become_caption_then_image(tmp_path):
    meta = json.dumps({"url": "elsewhere"}).encode()
    write_tar(tmp_path / "a.tar", {"x/1.png": png(255), "x/1.txt": b"white", "x/1.json": meta, "x/2.caption": b"black",
                                   "x/2.png": png(0)})  # fmt: skip
    index = build_index(tmp_path, TOKENIZER)
    assert index.heights.tolist() == [0, 3, 0, 3] and index.widths.tolist() == [0, 5, 0, 5]
    reader = SampleReader(index, TOKENIZER, PixelCodec(1, ImageTransform(3, 5)))
    for uid, (caption, value) in enumerate([("white", 1), ("black", -1)]):
        text, image = reader.read(uid).segments
        assert TOKENIZER.decode(text.ids) == caption
        assert (image.data == value).all()


def test_reader_adds_pixels_for_a_vision_encoder(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 8), dtype=np.uint8))
    write_shards(tmp_path, [Record("a", ("one", picture))])
    index, codec = build_index(tmp_path, TOKENIZER), PixelCodec(1, ImageTransform(4, 4))
    assert SampleReader(index, TOKENIZER, codec).read(0).segments[1].pixels is None
    image = SampleReader(index, TOKENIZER, codec, 6).read(0).segments[1]
    np.testing.assert_array_equal(image.data, codec.encode(picture))
    np.testing.assert_array_equal(image.pixels, encoder_pixels(picture, 6))


def test_index_is_kept_and_rebuilt_when_the_shard_changes(tmp_path):
    write_shards(tmp_path, [Record("a", ("one",))])
    shard = tmp_path / "shard-000000.tar"
    assert build_index(tmp_path, TOKENIZER).tokens.tolist() == [3]
    (kept,) = tmp_path.glob("*.idx.npz")
    first = kept.read_bytes()
    with np.load(kept) as saved:
        changed = {**{name: saved[name] for name in ARRAYS}, "stamp": saved["stamp"]}
    changed["tokens"] = np.array([7])
    np.savez(kept, **changed)
    assert build_index(tmp_path, TOKENIZER).tokens.tolist() == [7], "the kept file was not used"
    os.utime(shard, ns=(0, 1))
    assert build_index(tmp_path, TOKENIZER).tokens.tolist() == [3], "the kept file outlived its shard"
    kept.write_bytes(first[:100])
    assert build_index(tmp_path, TOKENIZER).tokens.tolist() == [3], "a damaged file was believed"


def test_several_processes_may_build_at_once(shards):
    with ThreadPoolExecutor(4) as threads:
        indices = list(threads.map(lambda _: build_index(shards, TOKENIZER), range(4)))
    for index in indices[1:]:
        assert all(np.array_equal(getattr(index, name), getattr(indices[0], name)) for name in ARRAYS)
    assert not list(shards.glob("*.tmp"))


def test_missing_folder_and_missing_shards(tmp_path):
    with pytest.raises(ValueError, match=r"data.path=.*nowhere is no folder"):
        build_index(tmp_path / "nowhere", TOKENIZER)
    with pytest.raises(ValueError, match="holds no shards"):
        build_index(tmp_path, TOKENIZER)


@pytest.mark.parametrize("damage", ["member", "boundary", "garbled", "text"])
def test_damaged_tar_is_named(shards, damage):
    shard = sorted(shards.glob("*.tar"))[1]
    content = shard.read_bytes()
    with tarfile.open(shard) as tar:
        header = tar.getmembers()[7].offset
    shard.write_bytes(
        {
            "member": content[: header + 700],
            "boundary": content[:header],
            "garbled": content[:header] + b"\xff" * 512 + content[header + 512 :],
            "text": b"this is no tar file",
        }[damage]
    )
    with pytest.raises(ValueError, match="shard-000001.tar is damaged"):
        build_index(shards, TOKENIZER)


def document(*segments: dict) -> bytes:
    return json.dumps({"segments": segments}).encode()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.json": document({"type": "image", "file": "0.png"})}, "names '0.png', which the shard does not hold"),
        ({"a.json": document({"type": "video", "file": "0.png"})}, "neither 'text' nor 'image'"),
        ({"a.json": document({"type": "text"})}, "lacks 'text'"),
        ({"a.json": b"{"}, "not a document"),
        ({"a.png": png()}, "neither a json with segments nor one caption"),
        ({"a.png": b"no picture", "a.txt": b"x"}, "is unreadable"),
    ],
)
def test_bad_samples_are_named(tmp_path, members, message):
    write_tar(tmp_path / "s.tar", members)
    with pytest.raises(ValueError, match=rf"s.tar, sample 'a'.*{message}"):
        build_index(tmp_path, TOKENIZER)


def test_a_scattered_sample_is_refused(tmp_path):
    write_tar(tmp_path / "s.tar", {"a.txt": b"x", "b.txt": b"y", "a.png": png()})
    with pytest.raises(ValueError, match=r"holds 'a.png' apart from"):
        build_index(tmp_path, TOKENIZER)


def test_reader_notices_a_shard_cut_after_indexing(shards):
    index = build_index(shards, TOKENIZER)
    os.truncate(index.path(0), 600)
    with pytest.raises(ValueError, match="shard-000000.tar, sample 'doc-0000'.*changed during the run"):
        SampleReader(index, TOKENIZER, PixelCodec(1, ImageTransform(4, 4))).read(0)
