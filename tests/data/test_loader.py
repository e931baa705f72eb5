import json
import threading
from itertools import islice

import numpy as np
import pytest
import torch

from megatron_mm.config.model import ImageConfig, TransfusionConfig
from megatron_mm.config.schema import DataConfig
from megatron_mm.data.dataset import open_data, write_ledger
from megatron_mm.data.image_codec import PatchVQCodec
from megatron_mm.data.image_transform import ImageTransform
from megatron_mm.data.loader import DataState, StepLoader
from megatron_mm.data.shards import Record, write_shards
from megatron_mm.data.tokenizer import ByteTokenizer

GLOBAL_BATCH = 8
START = DataState()
MODEL = TransfusionConfig(image=ImageConfig(channels=1, height=4, width=4))


@pytest.fixture
def make_loader(open_shards, layout):
    """Call with rank, size, micro batch and state: a loader over the 61 documents. Closes all of them at the end."""
    loaders = []

    def make(rank=0, size=1, micro=1, state=START, **keys):
        data, plan, reader = open_shards(**keys)
        loaders.append(StepLoader(plan, reader, layout, data, 3, GLOBAL_BATCH, micro, rank, size, state))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def test_batches_are_prepared_in_threads(open_shards, layout):
    data, plan, reader = open_shards()
    prepare = lambda batch: (threading.current_thread().name, batch.documents)  # noqa: E731
    loader = StepLoader(plan, reader, layout, data, 3, GLOBAL_BATCH, 1, 0, 1, prepare=prepare)
    names, documents = zip(*next(loader).batches, strict=True)
    loader.close()
    assert len(documents) == GLOBAL_BATCH and sum(documents) > 0
    assert all(name.startswith("data") for name in names)


def test_images_are_dealt_out_evenly_where_an_encoder_reads_them(make_loader, layout, monkeypatch):
    """The same rows in all, as many on every rank, and images within one of each other."""
    whole = rows(next(make_loader()))
    monkeypatch.setattr(layout.family, "encodes", True)
    ranks = [next(make_loader(rank, 4)) for rank in range(4)]
    dealt = [row for step in ranks for row in rows(step)]
    assert sorted(map(str, dealt)) == sorted(map(str, whole))
    assert all(len(rows(step)) == GLOBAL_BATCH // 4 for step in ranks)
    images = [sum(len(batch.images) for batch in step.batches) for step in ranks]
    monkeypatch.setattr(layout.family, "encodes", False)
    undealt = [sum(len(b.images) for b in next(make_loader(rank, 4)).batches) for rank in range(4)]
    assert max(images) - min(images) < max(undealt) - min(undealt)


def rows(step) -> list[dict[str, torch.Tensor]]:
    """Every row of a step on its own, in micro-batch order, images included."""
    found = []
    for batch in step.batches:
        for row in range(len(batch.tokens)):
            images = torch.from_numpy(batch.images[batch.images[:, 0] == row, 1:])
            fields = {name: value[row] for name, value in batch.fields.items()}
            found.append({"tokens": batch.tokens[row], "meta": batch.meta[row], "images": images, **fields})
    return found


def assert_same_rows(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def joined(steps, size: int, micro: int) -> list[dict[str, torch.Tensor]]:
    """The rows of one step of all ranks, back in the global order."""
    by_rank = [rows(step) for step in steps]
    per_rank = GLOBAL_BATCH // size
    return [by_rank[rank][j + i] for j in range(0, per_rank, micro) for rank in range(size) for i in range(micro)]


@pytest.mark.parametrize(("size", "micro"), [(1, 2), (2, 1), (2, 4), (4, 1), (4, 2), (8, 1)])
def test_any_number_of_ranks_sees_the_same_order(make_loader, size, micro):
    reference = islice(make_loader(), 10)
    ranks = [make_loader(rank, size, micro) for rank in range(size)]
    for expected, *steps in zip(reference, *ranks, strict=False):
        assert_same_rows(joined(steps, size, micro), rows(expected))
        assert {step.state for step in steps} == {expected.state}
        assert {(step.documents, step.tokens) for step in steps} == {(expected.documents, expected.tokens)}


def dropout_keys(step) -> list[int]:
    """One key for each document: a document is where the position is 0 and the key is not padding's."""
    return [int(key) for row in rows(step) for key in row["meta"][4][(row["meta"][3] == 0) & (row["meta"][4] != 0)]]


@pytest.mark.parametrize("seed", range(4))
def test_exactly_once_across_kills_and_changes_of_size(make_loader, seed):
    """Two epochs in short lives of random length and cluster size hold each document of each epoch exactly once."""
    rng = np.random.default_rng(seed)
    uninterrupted = make_loader()
    state, seen, rows_seen, expected_rows = DataState(), [], [], []
    while state.epoch < 2:
        size = int(rng.choice([1, 2, 4]))
        micro = int(rng.choice([1, 2]))
        saved = json.loads(json.dumps(state.to_dict()))
        ranks = [make_loader(rank, size, micro, DataState.from_dict(saved)) for rank in range(size)]
        for _ in range(int(rng.integers(1, 4))):
            steps = [next(loader) for loader in ranks]
            state = steps[0].state
            seen += [key for step in steps for key in dropout_keys(step)]
            rows_seen += joined(steps, size, micro)
            expected_rows += rows(next(uninterrupted))
        for loader in ranks:
            loader.close()
    assert_same_rows(rows_seen, expected_rows)
    assert len(seen) == len(set(seen)) == state.consumed_samples >= 2 * 61
    real = sum(int((row["meta"][0] < row["meta"][1]).sum()) for row in rows_seen)
    assert real == state.consumed_tokens


def test_one_epoch_is_all_documents_with_their_own_text(make_loader, records):
    loader = make_loader()
    texts = []
    for row in (row for step in islice(loader, 12) for row in rows(step)):
        tokens = row["tokens"].tolist()
        for text in "".join(chr(t) if t < 256 else "|" if t == 257 else "" for t in tokens).split("|")[1:]:
            texts.append(text)
    assert sorted(texts[:61]) == sorted(record.segments[0] for record in records)
    assert texts[61:122] != texts[:61]
    assert sorted(texts[61:122]) == sorted(texts[:61])


def test_noise_changes_by_epoch_only(make_loader):
    def noise_by_step(**keys):
        return [row["pixels"] for step in islice(make_loader(**keys), 6) for row in rows(step)]

    first, again = noise_by_step(num_workers=1, prefetch=0), noise_by_step(num_workers=4, prefetch=3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_rows_never_overflow_and_step_counts_add_up(make_loader):
    state = DataState()
    for step in islice(make_loader(micro=4), 15):
        assert sum(batch.documents for batch in step.batches) == step.documents
        assert sum(batch.real_tokens for batch in step.batches) == step.tokens
        assert step.state.consumed_samples == state.consumed_samples + step.documents
        assert step.state.consumed_tokens == state.consumed_tokens + step.tokens
        state = step.state


def test_a_broken_sample_is_named_at_its_step_and_stops_the_loader(make_loader, shards):
    loader = make_loader()
    next(loader)
    shard = sorted(shards.glob("*.tar"))[2]
    content = bytearray(shard.read_bytes())
    at = 0
    while (at := content.find(b"\x89PNG", at)) >= 0:
        content[at : at + 8] = b"garbage!"
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-000002.tar, sample 'doc-00\d\d', cannot be read"):
        for _ in range(20):
            next(loader)
    with pytest.raises(RuntimeError):
        next(loader)


def test_state_of_other_data_is_refused(make_loader):
    state = next(make_loader()).state
    with pytest.raises(ValueError, match="another plan"):
        make_loader(state=state, seq_length=128)


def test_batch_sizes_must_divide(make_loader):
    with pytest.raises(ValueError, match="train.global_batch_size=8 is no multiple of"):
        make_loader(size=3)
    with pytest.raises(ValueError, match="data.num_workers=0"):
        make_loader(num_workers=0)


def open_folder(folder, layout, **keys):
    return open_data(DataConfig(path=str(folder), **keys), MODEL, layout, ByteTokenizer(), seed=0)


def test_overlong_documents_stop_or_go_to_the_ledger(tmp_path, layout):
    texts = {"short": "x" * 10, "long": "x" * 50, "longest": "x" * 70}
    write_shards(tmp_path, [Record(key, (text,)) for key, text in texts.items()])
    with pytest.raises(ValueError, match=r"2 of 3 documents .*data.seq_length=40.*'longest'.*71 positions"):
        open_folder(tmp_path, layout, seq_length=40)
    plan, _, ledger = open_folder(tmp_path, layout, seq_length=40, overlong="skip")
    assert [(entry.uid, entry.key, entry.length) for entry in ledger] == [(1, "long", 51), (2, "longest", 71)]
    assert plan.packs(0, 0) == [(0,)]
    assert len(open_folder(tmp_path, layout, seq_length=51, overlong="skip")[2]) == 1, "51 positions fit into 51"
    write_ledger(tmp_path / "ledger.jsonl", ledger)
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["long", "longest"]
    assert lines[1] | {"uid": 2, "shard": "shard-000000.tar", "length": 71, "reason": "longer than 40"} == lines[1]
    with pytest.raises(ValueError, match="No document is left"):
        open_folder(tmp_path, layout, seq_length=5, overlong="skip")


def test_an_image_that_cannot_fit_has_its_own_sentence(shards, layout):
    with pytest.raises(ValueError, match=r"data.seq_length=12 is shorter than one image.*4 x 4 takes 17"):
        open_folder(shards, layout, seq_length=12, overlong="skip")


def test_image_tokenizer_must_suit_the_family(shards, layout, tmp_path):
    PatchVQCodec(np.zeros((3, 1), np.float32), 1, ImageTransform(4, 4), 1).save(tmp_path / "c.npz")
    with pytest.raises(ValueError, match="the model reads pixels"):
        open_folder(shards, layout, image_tokenizer=str(tmp_path / "c.npz"))
