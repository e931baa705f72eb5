"""What a user sees at the command line: one line and exit code 2, or the traceback that is asked for."""

import json
import os
import subprocess
import sys

import pytest

from megatron_mm.config.cli import user_errors
from megatron_mm.data.tokenizer import load_tokenizer

SCRIPT = """
from megatron_mm.config.cli import overrides, run
from megatron_mm.config.compose import compose
from megatron_mm.config.validate import validate

def train(config):
    validate(config, 1)
    if config.run.name == "again":
        config = compose([*overrides(), "run.name=composed"])
        print(config.checkpoint.save)
    print("trained", config.run.name)

if __name__ == "__main__":
    run(train)
"""


@pytest.fixture
def train(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def train_(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        command, env = [sys.executable, script, *arguments], os.environ | environment
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    return train_


def test_runs_and_leaves_nothing_behind(train, tmp_path):
    result = train("experiment=demo")
    assert (result.returncode, result.stdout, result.stderr) == (0, "trained demo\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


def test_a_task_may_compose_again_from_the_same_words(train):
    result = train("experiment=demo", "run.name=again", "checkpoint.save=${run.dir}/here")
    assert (result.returncode, result.stdout) == (0, "runs/composed/here\ntrained composed\n"), result.stderr


def test_cfg_job_prints_without_starting(train):
    result = train("--cfg", "job")  # though run.name is not set
    assert result.returncode == 0 and "train_iters: 1000" in result.stdout and "trained" not in result.stdout


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.sed=1", "error: train.sed is not a known key (did you mean train.seed?)"),
        ("train.seed=-1", "error: train.seed=-1 must be 0 or more."),
    ],
)
def test_mistake_is_one_line(train, override, said):
    result = train("experiment=demo", override)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(said) and result.stderr.count("\n") == 1


def test_traceback_on_demand(train):
    result = train("experiment=demo", "train.seed=-1", HYDRA_FULL_ERROR="1")
    assert result.returncode == 1 and "Traceback" in result.stderr and "ConfigError" in result.stderr


def test_a_library_keeps_its_traceback(capsys):
    with pytest.raises(json.JSONDecodeError), user_errors():
        json.loads("{")
    assert capsys.readouterr().err == ""


def test_rank_is_named(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as stop, user_errors():
        load_tokenizer("no/such.json")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error (rank 3): data.tokenizer=no/such.json is no file.")
