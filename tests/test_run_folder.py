"""A run's folder is started, continued or moved aside as the user says; two runs are never mixed."""

import time
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from megatron_mm.config.compose import ConfigError, compose, from_dict_config
from megatron_mm.run_folder import open_run_folder, read_run_config

PINNED = ["optim.lr=1e-3", "train.train_iters=1000"]
"""Values that the tests name, whatever the demo is tuned to."""


@pytest.fixture
def config(tmp_path):
    """Call with run.if_exists and any overrides."""

    def make(if_exists="error", *overrides):
        return compose(
            ["experiment=demo", *PINNED, f"run.dir={tmp_path}/run", f"run.if_exists={if_exists}", *overrides]
        )

    return make


@pytest.fixture
def folder(tmp_path, config):
    """The folder of a run that has logged something."""
    assert open_run_folder(config()) is False
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    return tmp_path / "run"


def saved(folder):
    return from_dict_config(OmegaConf.load(folder / "config.yaml"))


def test_a_new_folder_gets_the_config(folder, config):
    assert saved(folder) == config()


def test_an_earlier_run_is_an_error_by_default(folder, config):
    with pytest.raises(ConfigError, match=r"run\.dir=.*already holds a run.*if_exists=resume.*if_exists=restart"):
        open_run_folder(config())
    assert (folder / "metrics.jsonl").exists()


def test_resume_continues_in_place(folder, config):
    assert open_run_folder(config("resume")) is True
    assert (folder / "metrics.jsonl").exists()


def test_resume_of_nothing_starts(tmp_path, config):
    assert open_run_folder(config("resume")) is False
    assert (tmp_path / "run/config.yaml").exists()


def test_restart_moves_the_old_run_aside(folder, config):
    assert open_run_folder(config("restart", "optim.lr=0.5")) is False
    assert [path.name for path in folder.iterdir()] == ["config.yaml"] and saved(folder).optim.lr == 0.5
    (aside,) = folder.parent.glob("run.*")
    assert (aside / "metrics.jsonl").exists() and saved(aside) == config()


def test_restarts_within_a_second_do_not_collide(folder, config, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "20300101-000000")
    for _ in range(3):
        open_run_folder(config("restart"))
    assert len(list(folder.parent.glob("run.*"))) == 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.seed=7", r"train\.seed=1234, now it is 7"),
        ("optim.lr=0.5", r"optim\.lr=0\.001, now it is 0\.5"),
        ("model.trunk.num_layers=2", r"model\.trunk\.num_layers=4, now it is 2"),
        ("model.patch_size=2", r"model\.patch_size=1, now it is 2"),
        ("model=chameleon_demo", r"model\.family=transfusion, now it is chameleon"),
        ("data.path=elsewhere", r"data\.path=data/mnist/train, now it is elsewhere"),
        ("train.global_batch_size=16", r"train\.global_batch_size=8, now it is 16"),
        ("train.train_iters=7", r"train\.train_iters=1000, now it is 7"),
    ],
)
def test_resume_refuses_another_run(folder, config, override, said):
    before = (folder / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=said):
        open_run_folder(config("resume", override))
    assert (folder / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    "override",
    ["parallel.tensor_model_parallel_size=2", "train.micro_batch_size=1", "train.precision=bf16",
     "train.exit_interval=9", "logging.log_interval=5", "data.num_workers=1", "checkpoint.save_interval=1"],
)  # fmt: skip
def test_resume_allows_and_records_what_changes_no_number(folder, config, override):
    changed = config("resume", override)
    assert open_run_folder(changed) is True
    assert saved(folder) == changed


def test_a_run_may_grow_longer_where_its_decay_does_not_follow(tmp_path, config):
    open_run_folder(config("error", "optim.lr_decay_iters=900"))
    longer = config("resume", "optim.lr_decay_iters=900", "train.train_iters=2000")
    assert open_run_folder(longer) is True and saved(tmp_path / "run").train.train_iters == 2000


@pytest.mark.parametrize(
    "text", ["model: {family: transfusion, no_such_key: 1}", "model: {family: [", "run: ${nowhere}", ""]
)
def test_an_unreadable_config_is_named(folder, config, text):
    (folder / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read: .+\. Mend it"):
        open_run_folder(config("resume"))


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no run \(config\.yaml is missing\)"):
        read_run_config(tmp_path)


def test_two_names_keep_both(tmp_path, config):
    first = config()
    second = replace(first, run=replace(first.run, dir=str(tmp_path / "other")))
    assert open_run_folder(first) is open_run_folder(second) is False
