"""metrics.jsonl survives kills and resumes, and the console shows Megatron-LM's line."""

import json

import pytest

from megatron_mm.config.schema import LoggingConfig
from megatron_mm.report.metrics import MetricsWriter, console_line, read_metrics


def row(iteration: int, **changed) -> dict:
    return {
        "iteration": iteration,
        "consumed_samples": 30 * iteration,
        "consumed_tokens": 4000 * iteration,
        "loss": 1 / 3 + iteration,
        "loss/text": 1.5,
        "loss/image": 0.25,
        "count/text": 7,
        "grad_norm": 2.5,
        "learning_rate": 1e-3,
        "tokens_per_second_per_gpu": 5199.6,
        "mfu": None,
        "skipped": 0,
        **changed,
    }


def write(folder, iterations, start=0, total=10, **logging):
    writer = MetricsWriter(folder, LoggingConfig(**logging), {}, "test", start, total)
    for iteration in iterations:
        writer.write(row(iteration), milliseconds=12.34)
    writer.close()


def test_rows_come_back_in_full_precision(tmp_path):
    write(tmp_path, [1, 2])
    assert read_metrics(tmp_path / "metrics.jsonl") == [row(1), row(2)]


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    write(tmp_path, [3], start=2)
    assert [r["iteration"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_resume_drops_a_half_written_line(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps(row(3))[:40])
    assert [r["iteration"] for r in read_metrics(path)] == [1, 2]
    write(tmp_path, [3], start=2)
    assert [r["iteration"] for r in read_metrics(path)] == [1, 2, 3]


def test_a_line_cut_inside_a_character_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n{"name": "\xc3')
    assert read_metrics(path) == [{"iteration": 1}]


def test_a_row_that_is_only_a_number_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iteration": 2}\n')
    whole = path.read_text()
    for cut in range(1, len(whole)):
        path.write_text(whole[:cut])
        assert all(isinstance(r, dict) for r in read_metrics(path))


def test_damage_inside_the_file_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"itera\n{"iteration": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2"):
        read_metrics(path)


def test_console_line_is_megatrons():
    line = console_line(row(5, loss=1.25), milliseconds=12.34, total=1000)
    assert line == (
        " iteration        5/    1000 | consumed samples:          150 | elapsed time per iteration (ms): 12.3 |"
        " learning rate: 1.000000E-03 | loss: 1.250000E+00 | text loss: 1.500000E+00 | image loss: 2.500000E-01 |"
        " grad norm: 2.500 | tokens/s/gpu: 5200 |"
    )
    assert "MFU: 41.2% | skipped" in console_line(row(5, mfu=0.4123, skipped=1), 1.0, 10)


def test_console_shows_every_interval_and_the_last(tmp_path, capsys):
    write(tmp_path, range(1, 11), total=10, log_interval=4)
    shown = [int(line.split()[1].rstrip("/")) for line in capsys.readouterr().out.splitlines()]
    assert shown == [4, 8, 10]


def test_console_line_is_not_wrapped(tmp_path, capsys):
    write(tmp_path, [1])
    assert capsys.readouterr().out.count("\n") == 1
