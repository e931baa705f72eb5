"""The devices that tests run on, and a process of its own for a test that runs on a GPU.

A process that has touched CUDA cannot fork others that use it, and a fault on the device ends the context of all that
share it. So the process that collects the tests never touches CUDA, and where there is a GPU each test gets a child.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait

import psutil
import pytest
import torch

FORK = multiprocessing.get_context("fork")


def _cuda_is_there() -> bool:
    """Asked in a child: some ways of asking touch CUDA."""
    if not torch.backends.cuda.is_built():
        return False
    child = FORK.Process(target=lambda: os._exit(int(torch.cuda.is_available())))
    child.start()
    child.join()
    return child.exitcode == 1


CUDA = _cuda_is_there()
KERNEL_DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
"""What Triton's kernels are tested on: a GPU, or the CPU in Triton's interpreter, which is for a whole process."""
ON_KERNEL_DEVICE = [pytest.mark.gpu] if CUDA else []
"""The marks of a module whose tests run on KERNEL_DEVICE."""


def isolate(test: Callable[[], object], seconds: float = 400) -> None:
    """Runs `test` in a forked child, whose failure or skip becomes the caller's; so does its death."""
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=_report, args=(test, sender))
    child.start()
    sender.close()
    outcome, text = "failed", f"no end after {seconds:.0f} s"
    if wait([receiver, child.sentinel], seconds):
        try:
            outcome, text = receiver.recv()
        except EOFError:
            child.join()
            text = f"the test's process died with exit code {child.exitcode}"
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(child.pid)
        for each in (*process.children(recursive=True), process):  # also the ranks of a test that hangs
            each.kill()
    child.join()
    if outcome == "skipped":
        pytest.skip(text)
    if outcome == "failed":
        pytest.fail(text, pytrace=False)


def _report(test: Callable[[], object], sender: Connection) -> None:
    outcome = ("passed", "")
    try:
        test()
    except pytest.skip.Exception as skip:
        outcome = ("skipped", str(skip))
    except BaseException:
        outcome = ("failed", traceback.format_exc())
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    sender.send(outcome)
    sender.close()
    os._exit(0)
