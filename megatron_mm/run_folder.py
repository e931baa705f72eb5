"""The folder of a run: config.yaml, metrics.jsonl, checkpoints/, pictures. Two runs are never mixed in one."""

from __future__ import annotations

import time
from itertools import chain, count
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_mm.config.compose import Config, ConfigError, from_dict_config, to_yaml
from megatron_mm.data.files import replacing
from megatron_mm.run_lock import RunLock

_SAME_ON_RESUME = ("model", "optim", "data.path", "data.sources", "data.blend_by", "data.tokenizer", "data.seq_length",
                   "data.window", "train.seed", "train.global_batch_size")  # fmt: skip
"""What defines a run. Layout, precision, micro-batches, logging and the like may change on the way; the number of
iterations too, where it does not set the learning rate's decay."""
_MAY_CHANGE = "optim.ema_decay"
"""It only watches."""


def continues(config: Config) -> bool:
    """Whether an earlier run in run.dir is to be continued, as run.if_exists says. Writes nothing.

    Raises:
        ConfigError: there is a run already and nothing says what to do with it, or it is not this config's.
    """
    folder = Path(config.run.dir)
    if not (folder / "config.yaml").exists() or config.run.if_exists == "restart":
        return False
    if config.run.if_exists == "error":
        raise ConfigError(
            f"run.dir={folder} already holds a run: run.if_exists=resume continues it, run.if_exists=restart moves it "
            "aside and starts over, another run.name keeps both."
        )
    _refuse_other_run(config, read_run_config(folder), folder)
    return True


def open_run_folder(config: Config, lock: RunLock) -> bool:
    """Makes run.dir, whose lock we hold, ready, moving an earlier run aside where run.if_exists says so. Returns what
    `continues` does and raises as it."""
    folder = Path(config.run.dir)
    resume = continues(config)
    if not resume and (folder / "config.yaml").exists():
        folder.rename(_free_name(folder))
        lock.acquire()
    _write_config(config, folder / "config.yaml")
    return resume


def read_run_config(folder: Path) -> Config:
    """The configuration that the run in `folder` was started (or last resumed) with.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} holds no run ({path.name} is missing): check the path, or train one first.")
    try:
        return from_dict_config(OmegaConf.load(path))
    except (ConfigError, OmegaConfBaseException, YAMLError) as error:
        problem = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(f"{path} cannot be read: {problem}. Mend it, or start over elsewhere.") from error


def _free_name(folder: Path) -> Path:
    """Where a run is moved aside: its name, the time, and a number if that is taken."""
    aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    numbered = (aside.with_name(f"{aside.name}-{number}") for number in count(2))
    return next(path for path in chain([aside], numbered) if not path.exists())


def _refuse_other_run(new: Config, old: Config, folder: Path) -> None:
    keys = _SAME_ON_RESUME if new.optim.lr_decay_iters else (*_SAME_ON_RESUME, "train.train_iters")
    both = [OmegaConf.create(to_yaml(config)) for config in (old, new)]
    for config in both:
        OmegaConf.update(config, _MAY_CHANGE, None)
    for key in keys:
        before, now = (OmegaConf.select(config, key) for config in both)
        if before != now:
            key, before, now = _first_difference(key, before, now)
            raise ConfigError(
                f"run.dir={folder} was started with {key}={before}, now it is {now}: resume with the old value, or "
                "give the new run another run.name (checkpoint.load=... starts it from these weights)."
            )


def _first_difference(key: str, before, now) -> tuple[str, object, object]:
    while OmegaConf.is_dict(before) and OmegaConf.is_dict(now):
        name = next(k for k in [*before, *now] if before.get(k) != now.get(k))
        key, before, now = f"{key}.{name}", before.get(name), now.get(name)
    return key, before, now


def _write_config(config: Config, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(to_yaml(config))
