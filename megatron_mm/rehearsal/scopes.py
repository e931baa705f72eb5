"""Which part of the model is at work, in which pass: told by hooks on the parts, and around the engine's steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch
from torch import nn

import megatron_mm.engines.megatron as engine_module
from megatron_mm.engines.megatron import MegatronEngine
from megatron_mm.parallel.context.runtime import HostPart
from megatron_mm.parallel.model import StageModel
from megatron_mm.parallel.modulated import ModulatedLayers
from megatron_mm.rehearsal.record import AGAIN, BACKWARD, ENGINE, FORWARD, GRADIENTS, OPTIMIZER, SCHEDULE
from megatron_mm.rehearsal.recorder import Recorder


@contextlib.contextmanager
def scopes(recorder: Recorder, engine: MegatronEngine) -> Iterator[None]:
    """The recorder knows what the engine is at. The backward pass of a part begins when the gradient of its output is
    there, and ends where that of another one begins."""
    hooks = [
        hook for model in engine.models for part, module in parts(model) for hook in _watch(recorder, part, module)
    ]
    core = engine.models[0].config

    def around(function: Callable, before: str, after: str) -> Callable:
        def run(*args, **kwargs):
            recorder.enter(before, FORWARD if before == SCHEDULE else "")
            result = function(*args, **kwargs)
            recorder.enter(after)
            return result

        return run

    with (
        patch.object(HostPart, "to", around(HostPart.to, SCHEDULE, SCHEDULE)),
        patch.object(core, "finalize_model_grads_func", around(core.finalize_model_grads_func, GRADIENTS, ENGINE)),
        patch.object(engine_module, "squared_grad_norm", around(engine_module.squared_grad_norm, OPTIMIZER, ENGINE)),
        patch.object(engine_module, "clip_and_step", around(engine_module.clip_and_step, OPTIMIZER, ENGINE)),
    ):
        yield
    for hook in hooks:
        hook.remove()


def parts(model: StageModel) -> list[tuple[str, nn.Module]]:
    """(name, module) of a chunk's parts: layers by their number in the whole model, a family's ends, and `further`,
    layers behind the trunk."""
    found = [(f"layer {layer.layer_number - 1}", layer) for layer in model.decoder.layers]
    ends = [(name, part) for name, part in (("front", model.front), ("back", model.back)) if part is not None]
    inside = [module for _, part in ends for module in part.modules()]
    return found + ends + [("further", module) for module in inside if isinstance(module, ModulatedLayers)]


def _watch(recorder: Recorder, part: str, module: nn.Module) -> tuple:
    def enter(*_) -> None:
        recorder.enter(part, AGAIN if recorder.recomputes else FORWARD)

    def leave(module: nn.Module, args: tuple, output: object) -> None:
        recorder.enter(SCHEDULE, recorder.direction)
        outputs = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
        for tensor in outputs:
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: recorder.enter(part, BACKWARD))

    return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)
