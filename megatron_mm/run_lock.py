"""The right to write in a run's folder: one process at a time, whatever has become of the launcher that started it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from megatron_mm.config.compose import ConfigError

logger = logging.getLogger(__name__)

LOCK = "run.lock"
_PATIENCE = 10.0
"""Seconds to wait for a holder that may be about to end: a killed process lets go when the kernel is done with it."""


class RunLock:
    """The lock of a run's folder, the file run.lock in it, which says who holds it.

    The kernel drops the lock when its process ends, however it ends. Being a POSIX record lock, it is not passed on to
    processes that are forked or started: a checkpoint writer that outlives its run keeps no resumed run out. What it
    still writes is inside the half-written checkpoint, which a resumed run removes before it writes there itself.
    Over NFS the lock holds between hosts; where a file system has no locks, a warning says so.
    """

    def __init__(self, folder: Path, patience: float = _PATIENCE):
        self._folder, self._patience = folder, patience
        self._file: TextIO | None = None
        self._made_folder = False

    def acquire(self) -> None:
        """Takes the lock of what is now the folder, making it where there is none; letting go of one moved aside.

        Raises:
            ConfigError: another process holds it, or the folder cannot be written.
        """
        path, deadline = self._folder / LOCK, time.monotonic() + self._patience
        self._made_folder = self._made_folder or not self._folder.exists()
        while True:
            if self._file is not None and _is_at(self._file, path):
                return
            file = _open(path)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                holder = _read(file)
                file.close()
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"run.dir={self._folder} is in use by {holder}: wait for it or end it (kill), or give this run "
                        "another run.name."
                    ) from None
                time.sleep(0.1)
                continue
            except OSError as error:
                logger.warning("%s cannot be locked (%s): nothing keeps a second run out", path, error.strerror)
            if _is_at(file, path):  # else its holder removed it while we waited
                break
            file.close()
        self.release()
        self._file = file
        file.truncate(0)
        json.dump(
            {
                "process": os.getpid(),
                "host": socket.gethostname(),
                "job": os.environ.get("SLURM_JOB_ID"),
                "since": time.ctime(),
            },
            file,
        )
        file.flush()

    def release(self) -> None:
        """Lets go, and leaves no empty folder that it made itself; does nothing without the lock."""
        if self._file is None:
            return
        path = self._folder / LOCK
        if _is_at(self._file, path):
            path.unlink()
        self._file.close()
        self._file = None
        if self._made_folder:
            with contextlib.suppress(OSError):  # the run has written there
                self._folder.rmdir()


def _open(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a+")
    except OSError as error:
        raise ConfigError(
            f"run.dir={path.parent} cannot be written ({error.strerror}): choose another run.dir, or mend it."
        ) from error


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether `path` still is this open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _read(file: TextIO) -> str:
    """Who holds the lock, as its file says."""
    file.seek(0)
    try:
        holder = json.load(file)
        job = f" (job {holder['job']})" if holder["job"] else ""
        return f"process {holder['process']} on {holder['host']}{job}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
