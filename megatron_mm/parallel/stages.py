"""A forward pass through pipeline stages outside training: for sampling, where every rank runs the same program."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import nn

from megatron_mm.parallel.context.runtime import Part
from megatron_mm.parallel.model import StageModel


def through_stages(stage: StageModel, part: Part, further: bool = True) -> torch.Tensor:
    """The trunk's output [n, B, D] on the last stage, and what `further` layers make of it; on the others this stage's
    own, of the trunk's shape."""
    if not stage.pre_process:
        batch, _, length = part.shard.meta.shape
        shape = length, batch, stage.config.hidden_size
        received = torch.empty(shape, dtype=stage.config.params_dtype, device=part.shard.meta.device)
        dist.recv(received, mpu.get_pipeline_model_parallel_prev_rank())
        stage.set_input_tensor(received)
    hidden = stage.hidden(part, further)
    if not stage.post_process:
        dist.send(hidden.contiguous(), mpu.get_pipeline_model_parallel_next_rank())
    return hidden


def from_last_stage(stage: StageModel, compute: Callable[[nn.Module], torch.Tensor]) -> torch.Tensor:
    """What `compute` makes of the family's back, on every pipeline rank."""
    if mpu.get_pipeline_model_parallel_world_size() == 1:
        return compute(stage.back)
    group, source = mpu.get_pipeline_model_parallel_group(), mpu.get_pipeline_model_parallel_last_rank()
    result = compute(stage.back).contiguous() if stage.post_process else None
    box = [None if result is None else (result.shape, result.dtype)]
    dist.broadcast_object_list(box, src=source, group=group)
    if result is None:
        shape, dtype = box[0]
        result = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
    dist.broadcast(result, src=source, group=group)
    return result
