"""torch.compile put off until a compiled function is first called."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def compiling_later() -> Iterator[None]:
    """What `torch.compile` is asked to compile meanwhile costs nothing until it is called."""
    compile_now = torch.compile
    torch.compile = functools.partial(_later, compile_now)
    try:
        yield
    finally:
        torch.compile = compile_now


def _later(compile_now: Callable, function: Callable | None = None, **options) -> Callable:
    if function is None:  # a decorator with options
        return functools.partial(_later, compile_now, **options)

    @functools.cache
    def ready() -> Callable:
        # torch would load its compiler, and then not use it.
        return function if os.environ.get("TORCHDYNAMO_DISABLE") == "1" else compile_now(function, **options)

    @functools.wraps(function)
    def call(*args, **kwargs):
        return ready()(*args, **kwargs)

    return call
