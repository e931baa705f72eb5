"""What runs beside computation, where `parallel.*` leaves it to the device, and the environment that CUDA starts in.

These are what Megatron-LM's users run with. Of its other switches `tp_comm_overlap` needs Transformer Engine's layers,
which are not ours; sent outputs of pipeline stages are released where nothing overlaps (`transformer_config.py`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from dataclasses import replace

import torch

from megatron_mm.config.schema import ParallelConfig

WGRAD_EXTENSION = "fused_weight_gradient_mlp_cuda"
"""Apex's kernel that adds a weight's gradient to the buffer in the product itself."""


def select(config: ParallelConfig, device: torch.device, dtype: torch.dtype) -> tuple[ParallelConfig, str]:
    """`config` with true or false for every null, and what that means, as a line for the log.

    On a CPU nothing overlaps with gradients and weights: transfers and products share its cores.

    Raises:
        ValueError: what was asked for cannot run here.
    """
    cuda = device.type != "cpu"
    obstacle = _no_fused_gradients(device, dtype)
    if config.gradient_accumulation_fusion and obstacle:
        raise ValueError(
            f"parallel.gradient_accumulation_fusion=true cannot run: {obstacle}. Leave it null, or set it to false."
        )
    grads = _or(config.overlap_grad_reduce, cuda)
    gather = _or(config.overlap_param_gather, cuda and grads and config.use_distributed_optimizer)
    p2p = _or(config.overlap_p2p_comm, config.virtual_pipeline_model_parallel_size is not None)
    fused = _or(config.gradient_accumulation_fusion, obstacle is None)
    beside = [
        name for name, on in (("gradients' sums", grads), ("weights' gathering", gather), ("pipeline", p2p)) if on
    ]
    line = f"{', '.join(beside) or 'nothing'} beside computation on {device.type}; weight gradients " + (
        "added up in their products" if fused else f"added up after them ({obstacle or 'asked for'})"
    )
    return replace(
        config,
        overlap_grad_reduce=grads,
        overlap_param_gather=gather,
        overlap_p2p_comm=p2p,
        gradient_accumulation_fusion=fused,
    ), line


def set_environment(configs: Iterable[ParallelConfig]) -> None:
    """Sets what CUDA and torch's allocator read when they start, for layouts that follow one another in this process;
    what is set already stays. Comes before the first call of CUDA.

    A single connection makes kernels start in the order in which they were launched, so that a transfer that was
    launched before a product really runs beside it. Segments that grow leave no holes between batches of many shapes.
    """
    if any(config.tensor_model_parallel_size > 1 or config.context_parallel_size > 1 for config in configs):
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its name before torch 2.9, which is still read
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _or(asked: bool | None, default: bool) -> bool:
    return default if asked is None else asked


def _no_fused_gradients(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Apex's kernel cannot be used, if it cannot."""
    if device.type != "cuda":
        return "it needs CUDA"
    if dtype == torch.float64:
        return "it knows no fp64"
    return None if importlib.util.find_spec(WGRAD_EXTENSION) else "Apex's CUDA extensions are not installed"
