"""Where a step's time goes, by what each kernel was started for.

A kernel belongs to the innermost operation that launched it, and that operation to a group by the names of those around
it: the ranges below in the forward pass, autograd's own names in the backward pass. On a CPU, operations stand for
kernels.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_mm.parallel.attention import SpanAttention
from megatron_mm.parallel.model import StageModel

RANGES = "benchmark::"
FORWARD, LOSS, ATTENTION = f"{RANGES}forward", f"{RANGES}loss", f"{RANGES}attention"
BACKWARD = "autograd::engine::evaluate_function"

GROUPS = ("attention", "matmul", "norm + elementwise", "loss", "optimizer", "other")
"""`loss` is the vocabulary head with its cross-entropy; `optimizer` all that is neither in the forward nor in the
backward pass, and the accumulation of gradients; `other` what no operation of torch launched."""

_INSIDE = [
    ("optimizer", re.compile("AccumulateGrad")),
    ("loss", re.compile(f"{LOSS}|CrossEntropy")),
    ("attention", re.compile(f"{ATTENTION}|attention|flash_attn|ScaledDotProduct", re.IGNORECASE)),
    ("matmul", re.compile(r"^aten::(mm|addmm|addmm_|bmm|baddbmm|linear|matmul|_scaled_mm)$")),
]
"""The first pattern that one of the names matches decides; for anything else, `norm + elementwise`."""


@dataclass(frozen=True)
class Share:
    """A group's part in one step. `calls` are kernels, or operations on a CPU."""

    group: str
    ms_per_step: float
    calls: float


def group_of(names: list[str]) -> str:
    """The group of an operation, from its name and those of the operations around it."""
    if not any(name == FORWARD or name.startswith(BACKWARD) for name in names):
        return "optimizer"
    found = (group for group, pattern in _INSIDE if any(pattern.search(name) for name in names))
    return next(found, "norm + elementwise")


def profile_steps(
    step: Callable[[int], object], model: StageModel, device: torch.device, trace: Path | None, steps: int = 2
) -> list[Share]:
    """The groups' shares in one step, as means over `steps`; `trace` is written as a Chrome trace."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with _ranges(model), profile(activities=activities) as profiler:
        for number in range(steps):
            step(number)
        if cuda:
            torch.cuda.synchronize()
    if trace:
        profiler.export_chrome_trace(str(trace))
    time: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in profiler.events():
        if event.device_type == DeviceType.CPU:
            group = group_of(list(_names(event)))
            # A range may come back as a "kernel" of its own, which spans those within.
            kernels = [kernel.duration for kernel in event.kernels if not kernel.name.startswith(RANGES)]
            time[group] += sum(kernels) if cuda else event.self_cpu_time_total
            calls[group] += len(kernels) if cuda else 1
        elif not event.name.startswith(RANGES):
            time["other"] += event.device_time_total
            calls["other"] += 1
    if cuda:  # so far all kernels, those of the groups among them
        time["other"] -= sum(time[group] for group in GROUPS[:-1])
        calls["other"] -= sum(calls[group] for group in GROUPS[:-1])
    return [Share(group, time[group] / steps / 1e3, calls[group] / steps) for group in GROUPS]


def _names(event: FunctionEvent | None) -> Iterator[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent


@contextmanager
def _ranges(model: StageModel) -> Iterator[None]:
    """Names the forward passes of the model, its attention and its loss to the profiler."""
    attention = [layer for layer in model.modules() if isinstance(layer, SpanAttention)]
    with ExitStack() as stack:
        for name, modules in ((FORWARD, [model]), (LOSS, [model.back]), (ATTENTION, attention)):
            for module in modules:
                stack.enter_context(_range(name, module))
        yield


@contextmanager
def _range(name: str, module: nn.Module) -> Iterator[None]:
    opened: list[record_function] = []

    def enter(*_) -> None:
        opened.append(record_function(name))
        opened[-1].__enter__()

    def leave(*_) -> None:
        opened.pop().__exit__(None, None, None)

    # First of all hooks on the way in, so that what they compute counts too.
    hooks = module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
