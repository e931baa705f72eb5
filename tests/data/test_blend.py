"""Several sources in one plan: their shares, each document once a pass, the same under any resume and size."""

import json
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.config.model import ImageConfig, TransfusionConfig
from megatron_mm.config.schema import DataConfig, SourceConfig
from megatron_mm.data.blend import Blend
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.dataset import open_data
from megatron_mm.data.loader import DataState, StepLoader
from megatron_mm.data.plan import Position
from megatron_mm.data.shards import Record, write_shards
from megatron_mm.data.tokenizer import ByteTokenizer

MODEL = TransfusionConfig(image=ImageConfig(channels=1, height=4, width=4))
SEQ_LENGTH = 64


def draw(sizes, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 50, sum(sizes))


def blend(sizes, weights, by="tokens", window=64, lengths=None) -> Blend:
    lengths = draw(sizes) if lengths is None else lengths
    return Blend(lengths, SEQ_LENGTH, 3, window, sizes, weights, by)


def documents(plan: Blend, windows: int) -> list[list[tuple[int, int]]]:
    """(uid, pass) of every document, window by window."""
    return [
        [each for row in plan.rows(0, window) for each in zip(*row, strict=True)] for window in range(windows)
    ]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 80), st.floats(0.01, 100)), min_size=1, max_size=4),
    st.sampled_from(["tokens", "samples"]),
    st.integers(1, 200),
)
def test_shares_and_passes(sources, by, window):
    """After every window each source has had its share, to within one document; its passes are whole, in turn."""
    sizes, weights = zip(*sources, strict=True)
    lengths = draw(sizes)
    lengths[0] = SEQ_LENGTH + 1 if sizes[0] > 1 else 1  # is in no pass
    plan = blend(sizes, weights, by, window, lengths)
    spans = lengths if by == "tokens" else np.ones_like(lengths)
    ends = np.cumsum((0, *sizes))
    seen: list[tuple[int, int]] = []
    for taken in documents(plan, 12):
        seen += taken
        had = [sum(int(spans[uid]) for uid, _ in seen if a <= uid < b) for a, b in pairwise(ends)]
        slack = spans.max() / 2
        # Along the common clock, which no counter keeps: tokens (or documents) had, divided by weight.
        clocks = [((h - slack) / w, (h + slack) / w) for h, w in zip(had, weights, strict=True)]
        assert max(low for low, _ in clocks) <= min(high for _, high in clocks) * (1 + 1e-9)
    assert len(seen) == len(set(seen)), "a document came twice in a pass"
    for first, end in pairwise(ends):
        fitting = [uid for uid in range(first, end) if lengths[uid] <= SEQ_LENGTH]
        last = max((number for uid, number in seen if first <= uid < end), default=0)
        for number in range(last):
            assert sorted(uid for uid, n in seen if n == number and first <= uid < end) == fitting


def test_a_window_holds_its_number_of_documents_on_average():
    taken = [len(window) for window in documents(blend([400, 50, 1000], [1, 2, 5], window=64), 50)]
    assert np.mean(taken) == pytest.approx(64, rel=0.02) and max(taken) < 90


def test_rows_mix_sources_and_none_overflows():
    lengths = np.full(600, 8)
    rows = [row for window in range(5) for row in blend([300, 300], [1, 1], lengths=lengths).rows(0, window)]
    assert max(lengths[list(uids)].sum() for uids, _ in rows) <= SEQ_LENGTH
    mixed = [0 < sum(uid < 300 for uid in uids) < len(uids) for uids, _ in rows]
    assert np.mean(mixed) > 0.9


def test_a_window_is_a_pure_function_of_its_number():
    def make():
        return blend([30, 200], [3, 1])

    plan = make()
    for window in (5, 0, 6, 5, 100):
        assert plan.rows(0, window) == make().rows(0, window)
    whole = list(islice(plan.walk(Position()), 300))
    for at in (0, 77, 250):
        assert list(islice(make().walk(whole[at][2]), 40)) == whole[at + 1 : at + 41]


def test_an_empty_window_is_walked_over():
    """Windows of one document on average hold none now and then."""
    plan = blend([5, 5], [1, 1], window=1)
    assert [] in documents(plan, 40)
    walked = [uids for uids, _, _ in islice(plan.walk(Position()), 30)]
    assert all(walked) and walked == [pack for window in range(60) for pack in plan.packs(0, window)][:30]


def test_passes_are_shuffled_anew_and_sources_apart():
    lengths = np.full(80, 40)  # one document a row
    taken = [each for window in documents(blend([40, 40], [1, 1], lengths=lengths), 10) for each in window]
    orders = [[uid % 40 for uid, n in taken if n == number and uid // 40 == s] for number in (0, 1) for s in (0, 1)]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_fingerprint_tells_blends_apart():
    lengths = draw([30, 30])
    plans = [
        blend([30, 30], [1, 1]), blend([30, 30], [1, 2]), blend([29, 31], [1, 1], lengths=lengths),
        blend([30, 30], [1, 1], "samples"), blend([30, 30], [1, 1], window=65),
    ]  # fmt: skip
    assert len({plan.fingerprint for plan in plans}) == len(plans)
    assert blend([30, 30], [1, 1]).fingerprint == plans[0].fingerprint


@pytest.fixture
def few(tmp_path):
    """A folder of 7 short documents."""
    write_shards(tmp_path / "few", [Record(f"few-{i}", (f"few {i}",)) for i in range(7)])
    return tmp_path / "few"


@pytest.fixture
def open_sources(shards, few, layout):
    """Call with DataConfig keys: (data config, plan, reader) of 61 documents, the 7, and the 61 with another task."""
    listed = (
        SourceConfig(str(shards), 1.0, "understanding"),
        SourceConfig(str(few), 1.0),
        SourceConfig(str(shards), 2.0, "generation"),
    )

    def open_with(**keys):
        data = DataConfig(**{"sources": listed, "seq_length": 96, "window": 20, **keys})
        return data, *open_data(data, MODEL, layout, ByteTokenizer(), seed=3)[:2]

    return open_with


@pytest.fixture
def make_loader(open_sources, layout):
    loaders = []

    def make(rank=0, size=1, micro=1, state=DataState(), **keys):  # noqa: B008 (immutable)
        data, plan, reader = open_sources(**keys)
        loaders.append(StepLoader(plan, reader, layout, data, 3, 4, micro, rank, size, state))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def rows(steps, size: int, micro: int) -> list[tuple]:
    """The rows of one step of all ranks in the global order, as comparable values."""
    by_rank = [
        [tuple(t[row].numpy().tobytes() for t in (batch.tokens, batch.meta, *batch.fields.values()))
         for batch in step.batches for row in range(len(batch.tokens))]
        for step in steps
    ]  # fmt: skip
    per_rank = 4 // size
    return [by_rank[rank][j + i] for j in range(0, per_rank, micro) for rank in range(size) for i in range(micro)]


@pytest.mark.parametrize("by", ["tokens", "samples"])
def test_resume_and_size_change_nothing(make_loader, by):
    """Short lives of several sizes give the rows of one life; small sources come round several times."""
    whole = make_loader(blend_by=by)
    state, keys, rng = DataState(), [], np.random.default_rng(1)
    for size, micro in [(1, 2), (2, 1), (4, 1), (2, 2), (1, 4), (1, 1)] * 3:
        saved = DataState.from_dict(json.loads(json.dumps(state.to_dict())))
        ranks = [make_loader(rank, size, micro, saved, blend_by=by, num_workers=3 - size // 2) for rank in range(size)]
        for _ in range(int(rng.integers(1, 4))):
            steps, expected = [next(loader) for loader in ranks], next(whole)
            assert rows(steps, size, micro) == rows([expected], 1, 1)
            assert {step.state for step in steps} == {expected.state}
            state = expected.state
            for batch in expected.batches:
                keys += batch.meta[:, 4][(batch.meta[:, 3] == 0) & (batch.meta[:, 4] != 0)].tolist()
        for loader in ranks:
            loader.close()
    assert state.consumed_samples == len(keys) == len(set(keys)) > 2 * 129, "each document and pass has its own key"


def test_streams_are_those_of_the_document_and_its_own_pass(make_loader, open_sources):
    """Also where one window, and one row, holds a document from several passes."""
    _, plan, _ = open_sources(window=500)
    step = next(make_loader(window=500))
    walked = list(islice(plan.walk(Position()), 4))
    for batch, (uids, passes, _) in zip(step.batches, walked, strict=True):
        keys = batch.meta[0, 4][batch.meta[0, 3] == 0]
        expected = [Streams(3, uid, number).dropout_key for uid, number in zip(uids, passes, strict=True)]
        assert keys[: len(uids)].tolist() == expected
    assert {number for _, passes, _ in walked for number in passes} > {0, 1}


def test_each_source_names_its_task(open_sources):
    _, plan, reader = open_sources()
    assert len(plan.lengths) == 61 + 7 + 61
    assert [reader.read(uid).task for uid in (0, 60, 61, 67, 68, 128)] == (
        ["understanding"] * 2 + ["auto"] * 2 + ["generation"] * 2
    )
    assert reader.read(3).key == reader.read(68 + 3).key and reader.read(61).key == "few-0"


def test_one_source_is_what_its_path_is(open_sources, shards):
    (_, blended, reader), (_, plan, _) = (
        open_sources(sources=(SourceConfig(str(shards), 7.0, "generation"),)),
        open_sources(sources=(), path=str(shards)),
    )
    assert blended.fingerprint == plan.fingerprint
    assert list(islice(blended.walk(Position()), 60)) == list(islice(plan.walk(Position()), 60))
    assert reader.read(5).task == "generation"


def test_mistakes_name_their_source(open_sources, shards, tmp_path):
    long = tmp_path / "long"
    write_shards(long, [Record("long", ("x" * 200,))])
    for path, keys, said in [
        (tmp_path / "nowhere", {}, r"data\.sources\[1\]\.path=.*nowhere is no folder"),
        (tmp_path, {}, r"data\.sources\[1\]\.path=.* holds no shards"),
        (long, {}, "1 of 62 documents are longer"),
        (long, {"overlong": "skip"}, r"No document of data\.sources\[1\]\.path=.*long fits into data\.seq_length=96"),
    ]:
        with pytest.raises(ValueError, match=said):
            open_sources(sources=(SourceConfig(str(shards)), SourceConfig(str(path))), **keys)


def test_state_of_another_blend_is_refused(make_loader):
    state = next(make_loader()).state
    with pytest.raises(ValueError, match="another plan: the shards, the sources and their shares"):
        make_loader(state=state, blend_by="samples")
