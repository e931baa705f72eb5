"""The study of context parallelism: exact counts, the goals of balance and bytes, the simulation's arithmetic."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from mm_kernels.span_attention.benchmark import distributions
from tiny_runs import make_shards

from megatron_mm import mask as masks
from megatron_mm.benchmark.context.__main__ import main
from megatron_mm.benchmark.context.arguments import ContextConfig, parse
from megatron_mm.benchmark.context.counting import least_received, pairs
from megatron_mm.benchmark.context.masks import Masks
from megatron_mm.benchmark.context.rates import ASSUMED, KernelSpeeds, Rates, published_share
from megatron_mm.benchmark.context.simulation import NODE, everything, seconds, simulate, spread
from megatron_mm.benchmark.context.table import IMBALANCE, RATIO, lines
from megatron_mm.config.compose import ConfigError
from megatron_mm.parallel.context.assignment import Assignment, zigzag
from megatron_mm.parallel.context.predict import Work

S, RANKS, CHUNK = 192, 4, 16


def two_rows() -> np.ndarray:
    """Spans, hidden keys, a window and padding: int32 [2, 3, S]."""
    first = masks.hide_after(masks.with_spans(90, [(10, 30), (50, 70)]), [(10, 30)])
    second = [masks.window(masks.causal(80), 9), masks.prefix(60, 25), masks.full(20)]
    return np.stack([masks.concatenate([first, masks.causal(50)], S), masks.concatenate(second, S)])


def shuffled() -> Assignment:
    """Chunks of 16 in no order."""
    chunks = np.random.default_rng(0).permutation(S // CHUNK).reshape(RANKS, -1)
    return Assignment(CHUNK, np.sort(chunks, axis=1))


def test_counts_are_those_of_the_dense_mask():
    rows, assignment = two_rows(), shuffled()
    assert (rows[:, 2] < S).any()
    dense = np.stack([masks.dense(row) for row in rows])
    owner = np.empty(S, int)
    owner[(assignment.starts[..., None] + np.arange(CHUNK)).reshape(RANKS, -1)] = np.arange(RANKS)[:, None]
    counted, least = pairs(rows, assignment), least_received(rows, assignment)
    for rank in range(RANKS):
        mine = dense[:, owner == rank]
        assert counted[rank].tolist() == [mine[..., owner == other].sum() for other in range(RANKS)]
        assert least[rank] == (mine.any((0, 1)) & (owner != rank)).sum()
    unhidden = np.stack([masks.dense(np.stack([*row[:2], np.full(S, S, np.int32)])) for row in rows])
    assert pairs(rows[:, :2], assignment).sum() == unhidden.sum() > counted.sum()


@pytest.mark.parametrize("name", ["interleaved", "causal", "mmada"])
@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_goals(name, ranks):
    ours = next(lines(name, distributions.mask(name, 32768)[None], ranks))
    assert ours.way == "ours" and ours.assign_ms > 0 and ours.plan_ms > 0
    assert ours.imbalance <= IMBALANCE == 1.03
    assert ours.ratio <= RATIO == 1.1


def test_ways_on_a_causal_row():
    """Where closed forms are known: n ranks, the sequence is 1."""
    n, length = 8, 4096
    table = {line.way: line for line in lines("causal", distributions.mask("causal", length)[None], n)}
    part = length // n
    heaviest = part * length - part * (part - 1) / 2
    assert table["contiguous"].imbalance == pytest.approx(heaviest / ((length + 1) * length / 2 / n))
    assert table["contiguous"].received == pytest.approx((n - 1) / 2 / n)  # what stands before a part
    assert table["contiguous"].received_most == pytest.approx((n - 1) / n)
    assert table["zigzag"].imbalance == 1
    # What stands before the mirrored half-part, but for the rank's own half-part: 1 - (r + 1) / 2n - 1 / 2n.
    assert table["zigzag"].received == pytest.approx(np.mean([1 - (r + 2) / 2 / n for r in range(n)]))
    assert {table[way].received for way in ("zigzag ring", "all-gather")} == {(n - 1) / n}
    assert all(table[way].ratio == 1 for way in ("ours", "contiguous", "zigzag"))
    assert table["zigzag ring"].ratio == pytest.approx((n - 1) / n / table["zigzag"].least)
    assert table["ours, ring"].received >= table["ours"].received


def test_nothing_to_send():
    row = masks.concatenate([masks.causal(64)] * 16, 1024)[None]
    table = {line.way: line for line in lines("aligned", row, 8)}
    assert (table["ours"].received, table["ours"].ratio) == (0, 1)
    assert table["zigzag ring"].ratio == np.inf


def test_simulated_times_add_up():
    """A full row on one node by hand: 8 ranks of 1024, 8 heads and 2 key heads, at 100 and 50 TFLOP/s."""
    work, rates = Work(1, 8, 2, 128, 2), Rates(100, 50, "")
    row = distributions.mask("full", 8192)[None]
    ways = {entry.way: entry for entry in spread(row, 8, [1])}
    product = 1024 * 8192 * 4 * 8 * 128 / 1e14
    gather = 7 * 1024 * 2 * 2 * 128 * 2 / 360e9
    forward, backward = seconds(ways["all-gather"], work, rates, NODE)
    assert forward == pytest.approx(product + gather + 35e-6)
    assert backward == pytest.approx(2.5 * 2 * product + gather + 15e-6 + 2.5 * 20e-6)
    # Its own part and 7 stages, each longer than the next one's transfer.
    for way in ("exchange", "ring", "zigzag ring"):
        assert seconds(ways[way], work, rates, NODE) == pytest.approx(
            (product + 8 * 20e-6, 2.5 * (2 * product + 8 * 20e-6))
        )
    # A hundred times slower links: 7 transfers with the last product, each as long as the gather's share.
    slow = replace(NODE, node_gigabytes=3.6, launch_microseconds=0.0)
    transfer = 7 * (1024 * 2 * 2 * 128 * 2 / 3.6e9 + 15e-6)
    assert seconds(ways["ring"], work, rates, slow)[0] == pytest.approx(transfer + product / 8)


def test_simulation_says_what_is_lost():
    study = parse(["distributions=docs,full", "tokens=1024", "ranks=4,8,16", "heads=16:8,4:2", "gpus=H200"])
    found = list(simulate(study, Masks(study)))
    ours = ("exchange", "ring")
    for ranks, wide in (8, ("ulysses",)), (16, ("exchange over ulysses 8", "ring over ulysses 8")):
        for heads, more in ("16:8", wide), ("4:2", ()):  # 4 heads are too few for 8 neighbours
            for name in "docs", "full":
                some = [line for line in found if (line.ranks, line.heads, line.distribution) == (ranks, heads, name)]
                choices = [*ours, *more, "exchange, contiguous"]
                assert [line.way for line in some] == [*choices, "zigzag ring", "all-gather"]
                (chosen,) = [line.way for line in some if line.chosen]
                assert chosen in choices
    assert len(found) == 2 * (6 + 5 + 7 + 5)
    for line in found:
        assert line.efficiency + line.imbalance + line.latency + line.network == pytest.approx(1)
        assert min(line.efficiency, line.latency) > 0 and min(line.imbalance, line.network) > -1e-9
        assert (line.forward_tflops, line.backward_tflops, line.rates) == (688, 581, "assumed")
        ideal = line.efficiency * (line.forward_ms + line.backward_ms) / 1e3
        pairs_of_rank = line.tokens**2 * line.ranks
        if line.distribution == "full":
            flops = 4 * pairs_of_rank * int(line.heads.split(":")[0]) * 128
            assert ideal == pytest.approx(flops / 688e12 + 2.5 * flops / 581e12)
    bounds = {line.way: line.bound for line in found if (line.distribution, line.ranks) == ("docs", 16)}
    assert bounds["zigzag ring"] == "network"  # all keys through one port, for a sliver of products


def test_everything_travels():
    needed = everything(zigzag(64, 4))
    assert (needed.counts() == 16).all()


def test_published_scaling():
    """Time of 1 forward and 2.5 backward units of work, by hand."""
    at_8, at_64 = 1 / 459 + 2.5 / 360, 1 / 237 + 2.5 / 264
    assert published_share(8) == 1
    assert published_share(64) == pytest.approx(at_8 / at_64)
    assert Rates(400, 200, "").both == pytest.approx(3.5 / (1 / 400 + 2.5 / 200))


def test_measured_speeds_come_first(tmp_path):
    path = tmp_path / "attention.csv"
    columns = "device,distribution,length,heads,kv_heads,head_dim,peer,forward_tflops,backward_tflops"
    path.write_text(
        f"{columns}\n"
        "NVIDIA H100 80GB HBM3,docs,8192,32,4,64,span,1,1\n"
        "NVIDIA H100 80GB HBM3,docs,8192,32,4,128,flex,2,2\n"
        "NVIDIA H100 80GB HBM3,docs,131072,32,4,128,span,,\n"
        "NVIDIA H100 80GB HBM3,docs,8192,32,4,128,span,300,200\n"
        "NVIDIA H100 80GB HBM3,docs,65536,32,4,128,span,350,250\n"
        "NVIDIA H100 80GB HBM3,docs,1024,64,8,128,span,100,90\n"
    )
    speeds = KernelSpeeds(str(path))
    assert speeds.rates("H100", "docs", 16384, (32, 4)).forward == 300
    assert speeds.rates("H100", "docs", 131072, (32, 4)).forward == 350  # memory ran out at 131072
    assert speeds.rates("H100", "docs", 16384, (64, 8)).backward == 90
    assert speeds.rates("H100", "docs", 16384, (64, 8)).source.startswith("measured: NVIDIA H100")
    assert speeds.rates("H100", "mmada", 16384, (32, 4)) == ASSUMED["H100"]
    assert speeds.rates("H200", "docs", 16384, (32, 4)) == ASSUMED["H200"]
    path.write_text(f"{columns}\n")
    with pytest.raises(ConfigError, match="has no speed of the kernel"):
        KernelSpeeds(str(path))


TINY = ["experiment=benchmark_transfusion", "model.image={channels: 1, height: 8, width: 8}", "model.patch_size=2"]


def test_documents_of_a_dataset(tmp_path):
    make_shards(tmp_path)
    arguments = [f"data={tmp_path}/train", "distributions=data", *TINY]
    study = parse(arguments)
    row = Masks(study).draw("data", 4096)
    assert row.shape == (1, 2, 4096)  # nothing is hidden
    masks.validate(np.concatenate([row[0], np.full((1, 4096), 4096, np.int32)]))
    used = int(row[0, 1].max())
    starts = distributions.documents(row[0, :, :used])
    sizes = np.diff(starts)
    assert 4096 - used < sizes.max(), "full but for less than a document; 60 documents come more than once"
    # BOS, EOS and at least 13 bytes; at most two captions of 32 bytes or two images of 4 x 4 with BOI and EOI.
    assert sizes.min() >= 15 and sizes.max() <= 2 + 64 + 4 + 36 and len(sizes) > 60
    ahead = row[0, 1, :used] - np.arange(used)
    assert ahead.max() == 16, "an image's first patch sees all of it"
    assert (row[0, 0, used:] == used).all() and (row[0, 1, used:] == used).all()
    assert np.array_equal(Masks(study).draw("data", 4096), row)
    assert not np.array_equal(Masks(parse([*arguments, "seed=1"])).draw("data", 4096), row)
    with pytest.raises(ConfigError, match="No document of data= fits into lengths=8"):
        Masks(study).draw("data", 8)


def test_a_dataset_of_codes(tmp_path):
    """Pictures stay unread, so no image tokenizer is needed."""
    make_shards(tmp_path)
    overrides = ["experiment=benchmark_chameleon", "model.image={channels: 1, height: 4, width: 4}"]
    study = parse([f"data={tmp_path}/train", "distributions=data", *overrides])
    row = Masks(study).draw("data", 1024)[0]
    assert (row[1] <= np.arange(1, 1025)).all(), "causal"


@pytest.mark.slow
def test_command(tmp_path, capsys):
    make_shards(tmp_path)
    out = tmp_path / "out"
    own = ["distributions=docs,data", "lengths=2048", "ranks=2,8", "tokens=256", "heads=16:8", "gpus=H100"]
    main([f"out={out}", f"data={tmp_path}/train", *own, *TINY])
    table = list(csv.DictReader((out / "table.csv").open()))
    assert len(table) == 2 * 2 * 6 and {row["distribution"] for row in table} == {"docs", "data"}
    assert all(float(row["imbalance"]) >= 1 for row in table)
    simulation = list(csv.DictReader((out / "simulation.csv").open()))
    assert len(simulation) == 2 * 6 and {row["ranks"] for row in simulation} == {"8"}
    assert (out / "table.png").stat().st_size > 10_000 and (out / "simulation.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "Simulated, not measured" in printed and "largest load over the mean" in printed
    assert b"\r" not in (out / "table.csv").read_bytes()

    main([f"out={tmp_path / 'table'}", "distributions=t2i", "lengths=1024", "ranks=4", "tokens="])
    assert {path.name for path in (tmp_path / "table").iterdir()} == {"table.csv", "table.png"}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("distributions=docs,books", "distributions=books is unknown; distributions: full, causal"),
        ("distributions=data", "distributions=data is unknown.*needs data=FOLDER"),
        ("gpus=B200", "gpus=B200 is unknown; gpus: H100"),
        ("lengths=32k", "lengths=32k must be whole numbers above 0 with commas"),
        ("lengths=1000", "lengths=1000 must be a multiple of 2 x ranks=8"),
        ("tokens=1001", "tokens=1001 must be even"),
        ("heads=64", "heads=64 must be QUERY_HEADS:KEY_HEADS"),
        ("heads=30:8", "heads=30:8 must be QUERY_HEADS:KEY_HEADS"),
        ("kernel_csv=nowhere.csv", "kernel_csv=nowhere.csv is no file"),
        ("seed=-1", "seed=-1 must be 0 or more"),
        ("length=1024", "length=1024 is no key of this study"),
    ],
)
def test_mistakes(argument, message):
    with pytest.raises(ConfigError, match=message):
        parse([argument])


def test_defaults_are_the_documented_study():
    study = parse([])
    assert study.names == tuple(distributions.DISTRIBUTIONS) and study.config == ContextConfig()
    assert study.lengths == (32768, 131072, 1048576) and study.ranks == (2, 4, 8, 16, 32, 64)
    assert study.tokens == (8192, 16384, 65536) and study.heads == ((64, 8), (32, 32))
