"""Documents that are longer than a row, in pieces."""

import json

import numpy as np
from PIL import Image

from megatron_mm.config.model import ImageConfig, TransfusionConfig
from megatron_mm.config.schema import DataConfig, SourceConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.dataset import open_data, write_ledger
from megatron_mm.data.pieces import cut_up
from megatron_mm.data.shape import ImagePart, Shape, TextPart
from megatron_mm.data.shards import Record, write_shards
from megatron_mm.data.tokenizer import ByteTokenizer
from megatron_mm.types import IGNORE, TextSegment

MODEL = TransfusionConfig(image=ImageConfig(channels=1, height=4, width=4))


def shape(*parts):
    """Numbers are texts of so many tokens, negative ones given; None is an image."""
    return Shape(
        tuple(
            ImagePart(n, 4, 4) if part is None else TextPart(n, abs(part), loss=part >= 0, ends=part == 7)
            for n, part in enumerate(parts)
        )
    )


def size(whole):
    """A position a token, 16 an image, one each for BOS and EOS."""
    return whole.begins + whole.ends + sum(getattr(part, "tokens", 16) for part in whole.parts)


def cuts(whole, limit):
    pieces = cut_up(whole, lambda each: size(each) <= limit)
    assert all(size(piece.shape(whole)) <= limit for piece in pieces)
    return [(piece.cuts, piece.begins, piece.ends) for piece in pieces]


def test_cuts_come_between_segments_where_they_can():
    assert cuts(shape(5, None, 6), 20) == [
        (((0, 0, 5),), True, False),
        (((1, 0, 0),), False, False),
        (((2, 0, 6),), False, True),
    ]
    assert cuts(shape(5, None, 6), 22) == [(((0, 0, 5), (1, 0, 0)), True, False), (((2, 0, 6),), False, True)]
    assert cuts(shape(5, 6), 13) == [(((0, 0, 5), (1, 0, 6)), True, True)]
    assert len(cuts(shape(5, 6), 12)) == 2, "EOS has its place"


def test_a_long_text_is_cut_inside_and_its_end_with_it():
    whole = shape(7)
    pieces = cut_up(whole, lambda each: size(each) <= 4)
    assert [piece.cuts[0][1:] for piece in pieces] == [(0, 3), (3, 6), (6, 7)], "EOS is not left alone"
    assert [part.ends for piece in pieces for part in piece.shape(whole).parts] == [False, False, True]
    assert [(piece.begins, piece.ends) for piece in pieces] == [(True, False), (False, False), (False, True)]


def test_an_image_is_never_cut_and_what_is_only_given_is_left_out():
    assert cuts(shape(3, None), 10) == []
    assert cuts(shape(-30, 4), 20) == [(((0, 19, 30), (1, 0, 4)), False, True)]
    assert cuts(shape(-30, 9), 12) == [(((1, 0, 9),), False, True)]


def test_pieces_are_trained_on_whole_and_once(tmp_path, layout, monkeypatch):
    rng = np.random.default_rng(0)
    picture = lambda: Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8))  # noqa: E731
    records = [
        Record("short", ("abc",)),
        Record("talk", ("q" * 30, "a" * 70), {"prompt_segments": 1}),
        Record("story", ("x" * 20, picture(), "y" * 25, picture(), "z" * 5)),
    ]
    write_shards(tmp_path / "s", records)
    data = DataConfig(path=str(tmp_path / "s"), seq_length=40, overlong="split", window=100)
    plan, reader, ledger = open_data(data, MODEL, layout, ByteTokenizer(), seed=0)
    decoded, decode = [], reader.codec.encode
    monkeypatch.setattr(reader.codec, "encode", lambda picture: decoded.append(picture) or decode(picture))
    uids = sorted(uid for pack in plan.packs(0, 0) for uid in pack)
    assert uids == list(range(len(plan.lengths)))
    found = {"short": "", "talk": "", "story": ""}
    images = learnt = 0
    for uid in uids:
        sample = reader.read(uid)
        document = layout.lay_out(sample, Streams(0, uid, 0))
        assert sample.uid == uid and len(document.tokens) <= plan.lengths[uid] <= 40
        found[sample.key] += "".join(
            ByteTokenizer().decode(s.ids) for s in sample.segments if isinstance(s, TextSegment)
        )
        images += len(document.images)
        learnt += sample.key == "talk" and int((document.fields["labels"] != IGNORE).sum())
    assert found == {"short": "abc", "talk": "a" * 70, "story": "x" * 20 + "y" * 25 + "z" * 5} and images == 2
    assert len(decoded) == 2, "a piece decodes its own pictures alone"
    assert learnt in (69, 70), "of what is given nothing, of the rest everything but where there is nothing before it"
    write_ledger(tmp_path / "ledger.jsonl", ledger)
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [(line["key"], line["reason"].partition(": ")[2]) for line in lines] == [
        ("talk", "split into 2"), ("story", "split into 3"),
    ]  # fmt: skip


def test_blends_count_pieces(tmp_path, layout):
    for name, count in (("a", 3), ("b", 2)):
        write_shards(tmp_path / name, [Record(f"{name}{i}", ("x" * 60,)) for i in range(count)])
    sources = tuple(SourceConfig(str(tmp_path / name)) for name in "ab")
    data = DataConfig(sources=sources, seq_length=40, overlong="split", window=10)
    plan, reader, ledger = open_data(data, MODEL, layout, ByteTokenizer(), seed=0)
    assert len(plan.lengths) == 10 and len(ledger) == 5
    assert [reader.read(uid).key for uid in (0, 5, 6, 9)] == ["a0", "a2", "b0", "b1"]
