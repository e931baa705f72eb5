"""The attention benchmark: its masks, its counts of work, and the one command, at a size for a CPU."""

import csv
import sys

import numpy as np
import pytest
import torch
from devices import CUDA
from mm_kernels.span_attention.benchmark import __main__ as benchmark
from mm_kernels.span_attention.benchmark.distributions import DISTRIBUTIONS, IMAGES, area, documents, mask
from mm_kernels.span_attention.benchmark.measure import wrong
from mm_kernels.span_attention.benchmark.peers import PEERS, Case, Unavailable
from mm_kernels.span_attention.benchmark.work import grid_tiles, picture, span_tiles, walked_blocks
from torch.nn.attention.flex_attention import create_block_mask

from megatron_mm import mask as masks


def dense(intervals):
    key = np.arange(intervals.shape[1])
    return (intervals[0][:, None] <= key) & (key < intervals[1][:, None])


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_masks_are_seeded_and_valid(name):
    intervals = mask(name, 2000)
    assert intervals.dtype == np.int32 and np.array_equal(intervals, mask(name, 2000))
    masks.validate(np.concatenate([intervals, np.full((1, 2000), 2000, np.int32)]))
    assert (intervals[0] < intervals[1]).all(), "no padding: rows are full"
    assert area(intervals) == dense(intervals).sum()
    if name not in ("full", "causal", "window"):
        assert not np.array_equal(intervals, mask(name, 2000, row=1))


def test_half_of_the_interleaved_tokens_are_in_images():
    inside = []
    for row in range(8):
        lo, hi = mask("interleaved", 131072, row)
        inside.append(np.mean(hi > np.arange(131072) + 1))
        spans = np.unique(hi[hi > np.arange(131072) + 1], return_counts=True)[1] + 1
        assert np.isin(spans, IMAGES).mean() > 0.95, "but for those that a document's end cuts"
    assert 0.42 < np.mean(inside) < 0.52


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_nothing_sees_across_the_documents_bounds(name):
    intervals = mask(name, 3000)
    bounds = documents(intervals)
    inside = np.zeros((3000, 3000), bool)
    for first, end in zip(bounds[:-1], bounds[1:], strict=True):
        inside[first:end, first:end] = True
    assert bounds[0] == 0 and bounds[-1] == 3000 and not (dense(intervals) & ~inside).any()
    if name == "mmada":
        assert (dense(intervals) == inside).all() and len(bounds) > 2


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_counts_of_work(name):
    intervals = mask(name, 1024)
    allowed = dense(intervals)
    lo, hi = torch.from_numpy(intervals)
    blocks = create_block_mask(lambda b, h, q, k: (lo[q] <= k) & (k < hi[q]), None, None, 1024, 1024, device="cpu")
    partial, full = (int(n.sum()) for n in (blocks.kv_num_blocks, blocks.full_kv_num_blocks))
    assert grid_tiles(intervals) == (partial + full, partial), "as torch's own block mask has it"

    tiles = masked = 0
    for start in range(0, 1024, 64):
        rows = allowed[start : start + 64]
        first, end = np.flatnonzero(rows.any(0))[[0, -1]] + [0, 1]
        everyone = rows.all(0)
        walked = range(first, end, 32)
        tiles += len(walked)
        masked += sum(not everyone[at : at + 32].all() or at + 32 > end for at in walked)
    assert span_tiles(intervals, 64, 32) == (tiles, masked)
    drawn = list(walked_blocks(intervals, 64, 32))
    assert (len(drawn), sum(with_mask for *_, with_mask in drawn)) == (tiles, masked)


def test_the_picture_of_the_walk(tmp_path):
    picture(tmp_path / "tiles.png", names=("docs", "t2i"), length=512)
    assert (tmp_path / "tiles.png").stat().st_size > 3_000


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    benchmark.main()


SMALL = ("--device", "cpu", "--lengths", 64, "--head-dims", 16, "--heads", "2:1", "--tokens", 128, "--milliseconds", 1)


def test_one_command_measures_plots_and_goes_on(tmp_path, monkeypatch):
    run(monkeypatch, "--out", tmp_path, *SMALL, "--distributions", "causal", "t2i")
    run(monkeypatch, "--out", tmp_path, *SMALL, "--distributions", "t2i", "mmada")
    rows = list(csv.DictReader((tmp_path / "attention.csv").open()))
    tried = [(row["distribution"], row["peer"]) for row in rows]
    assert len(tried) == len(set(tried)), "what the file holds is not measured twice, and said once"
    measured = [row for row in rows if not row["note"]]
    assert len(measured) == 6 and {row["peer"] for row in measured} == {"reference", "sdpa-dense"}
    assert {row["note"] for row in rows} == {"", "not here: needs CUDA"}
    assert {row["peer"] for row in rows if row["distribution"] == "causal"} == set(PEERS)
    for row in measured:
        assert row["device"].startswith("CPU") and row["torch"] == torch.__version__ and row["commit"]
        assert float(row["forward_ms"]) > 0 and float(row["backward_ms"]) > 0
        done = 4 * 2 * 16 * sum(area(mask(row["distribution"], 64, i)) for i in range(2)) / 1e9
        assert float(row["forward_tflops"]) == pytest.approx(done / float(row["forward_ms"]), rel=1e-2)
    assert (tmp_path / "attention.png").stat().st_size > 10_000


def test_a_wrong_implementation_is_not_timed(tmp_path, monkeypatch):
    case = Case("t2i", 64, 2, 2, 1, 16, torch.float32, torch.device("cpu"))
    call, _ = PEERS["reference"](case)
    assert wrong(call, case) < 4 and wrong(lambda: call() * 1.001, case) > benchmark.TOLERANCE
    monkeypatch.setitem(PEERS, "reference", lambda case: (lambda: call() * 1.001, case.qkv[:3]))
    with pytest.raises(SystemExit, match="reference on t2i of 64: wrong by"):
        run(monkeypatch, "--out", tmp_path, *SMALL, "--distributions", "t2i")
    rows = {row["peer"]: row for row in csv.DictReader((tmp_path / "attention.csv").open())}
    assert not rows["reference"]["forward_ms"] and rows["sdpa-dense"]["forward_ms"], "the others are measured"


def test_a_peer_that_gives_up_is_a_row_that_says_why(tmp_path, monkeypatch):
    def gives_up(case):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setitem(PEERS, "sdpa-dense", gives_up)
    run(monkeypatch, "--out", tmp_path, *SMALL, "--distributions", "t2i")
    notes = {row["peer"]: row["note"] for row in csv.DictReader((tmp_path / "attention.csv").open())}
    assert notes["reference"] == "" and notes["sdpa-dense"] == "RuntimeError: no kernel"


def test_a_peer_that_fails_is_a_row_and_tried_again(tmp_path, monkeypatch):
    def broken(case):
        raise ImportError("no such\nsymbol")

    narrow = ("--out", tmp_path, *SMALL, "--distributions", "t2i", "--peers", "sdpa-dense")
    with monkeypatch.context() as patch:
        patch.setitem(PEERS, "sdpa-dense", broken)
        run(patch, *narrow)
    run(monkeypatch, *narrow)
    failed, measured = csv.DictReader((tmp_path / "attention.csv").open())
    assert failed["note"] == "ImportError: no such" and not failed["forward_ms"]
    assert not measured["note"] and float(measured["forward_ms"]) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["causal", "docs", "t2i"])
@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer != "reference"])
def test_peers_compute_what_they_are_measured_for(name, peer):
    case = Case(name, 1024, 2, 4, 2, 64, torch.bfloat16, torch.device("cuda"))
    try:
        made = PEERS[peer](case)
    except Unavailable as missing:
        pytest.skip(str(missing))
    if made is None:
        pytest.skip("cannot express the mask")
    assert wrong(made[0], case) < benchmark.TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--heads", "3:2"), "a multiple of the second"),
        (("--distributions", "nothing"), "invalid choice"),
        *([] if CUDA else [(("--device", "cuda"), "sees no GPU")]),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(tmp_path, monkeypatch, capsys, arguments, why):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--out", tmp_path / "out", *arguments)
    assert why in capsys.readouterr().err and not (tmp_path / "out").exists()
