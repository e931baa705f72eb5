"""A run's folder is started, continued or moved aside as the user says; two runs are never mixed."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megatron_mm.config.compose import ConfigError, compose, from_dict_config
from megatron_mm.run_folder import open_run_folder, read_run_config
from megatron_mm.run_lock import LOCK, RunLock

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


def opened(config):
    """What `open_run_folder` says, as by a run that then ends."""
    lock = RunLock(Path(config.run.dir), patience=0)
    lock.acquire()
    try:
        return open_run_folder(config, lock)
    finally:
        lock.release()


@pytest.fixture
def folder(tmp_path, config):
    """The folder of a run that has logged something."""
    assert opened(config()) is False
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    return tmp_path / "run"


def saved(folder):
    return from_dict_config(OmegaConf.load(folder / "config.yaml"))


def test_a_new_folder_gets_the_config(folder, config):
    assert saved(folder) == config()


def test_an_earlier_run_is_an_error_by_default(folder, config):
    with pytest.raises(ConfigError, match=r"run\.dir=.*already holds a run.*if_exists=resume.*if_exists=restart"):
        opened(config())
    assert (folder / "metrics.jsonl").exists()


def test_resume_continues_in_place(folder, config):
    assert opened(config("resume")) is True
    assert (folder / "metrics.jsonl").exists()


def test_resume_of_nothing_starts(tmp_path, config):
    assert opened(config("resume")) is False
    assert (tmp_path / "run/config.yaml").exists()


def test_restart_moves_the_old_run_aside(folder, config):
    assert opened(config("restart", "optim.lr=0.5")) is False
    assert [path.name for path in folder.iterdir()] == ["config.yaml"] and saved(folder).optim.lr == 0.5
    (aside,) = folder.parent.glob("run.*")
    assert (aside / "metrics.jsonl").exists() and saved(aside) == config()


def test_restarts_within_a_second_do_not_collide(folder, config, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "20300101-000000")
    for _ in range(3):
        opened(config("restart"))
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
        opened(config("resume", override))
    assert (folder / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    "override",
    ["parallel.tensor_model_parallel_size=2", "train.micro_batch_size=1", "train.precision=bf16",
     "train.exit_interval=9", "logging.log_interval=5", "data.num_workers=1", "checkpoint.save_interval=1"],
)  # fmt: skip
def test_resume_allows_and_records_what_changes_no_number(folder, config, override):
    changed = config("resume", override)
    assert opened(changed) is True
    assert saved(folder) == changed


def test_a_run_may_grow_longer_where_its_decay_does_not_follow(tmp_path, config):
    opened(config("error", "optim.lr_decay_iters=900"))
    longer = config("resume", "optim.lr_decay_iters=900", "train.train_iters=2000")
    assert opened(longer) is True and saved(tmp_path / "run").train.train_iters == 2000


@pytest.mark.parametrize(
    "text", ["model: {family: transfusion, no_such_key: 1}", "model: {family: [", "run: ${nowhere}", ""]
)
def test_an_unreadable_config_is_named(folder, config, text):
    (folder / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read: .+\. Mend it"):
        opened(config("resume"))


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no run \(config\.yaml is missing\)"):
        read_run_config(tmp_path)


def test_two_names_keep_both(tmp_path, config):
    first = config()
    second = replace(first, run=replace(first.run, dir=str(tmp_path / "other")))
    assert opened(first) is opened(second) is False


def hold(folder, ready):
    lock = RunLock(folder)
    lock.acquire()
    ready.set()
    time.sleep(600)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path/run."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", ready))
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_folder_in_use_is_refused_by_the_name_of_its_user(holder, tmp_path, config):
    """Whatever the second run would do with it; restart must not move the first away."""
    (tmp_path / "run/config.yaml").write_text("a run\n")
    for if_exists in ("resume", "restart"):
        with pytest.raises(ConfigError, match=rf"run\.dir=.* is in use by process {holder.pid} on \S+, since .*end it"):
            opened(config(if_exists))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_job_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    said = json.loads((tmp_path / "run" / LOCK).read_text())
    assert said["job"] == "4711" and said["process"] == os.getpid()


def test_a_killed_holder_lets_go(holder, tmp_path, config):
    holder.kill()
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    assert json.loads((tmp_path / "run" / LOCK).read_text())["process"] == os.getpid()
    lock.release()
    assert list((tmp_path / "run").iterdir()) == []


def test_what_a_holder_forked_keeps_nobody_out(tmp_path):
    """A checkpoint writer that outlives the run has not inherited its lock."""

    def fork_and_die(lock, pid):
        lock.acquire()
        child = context.Process(target=time.sleep, args=(60,))
        child.start()
        pid.value = child.pid
        os._exit(0)

    context = multiprocessing.get_context("fork")
    pid = context.Value("i", 0)
    holder = context.Process(target=fork_and_die, args=(RunLock(tmp_path), pid))
    holder.start()
    holder.join()
    try:
        RunLock(tmp_path, patience=0).acquire()
    finally:
        os.kill(pid.value, signal.SIGKILL)


def test_the_lock_follows_a_run_that_is_moved_aside(folder, config, tmp_path):
    lock = RunLock(folder)
    lock.acquire()
    open_run_folder(config("restart"), lock)
    context = multiprocessing.get_context("fork")
    second = context.Process(target=lambda: RunLock(folder, patience=0).acquire())
    second.start()
    second.join(60)
    assert second.exitcode == 1
    lock.release()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir=.*file/run cannot be written \(.+\): choose another"):
        RunLock(tmp_path / "file" / "run").acquire()
