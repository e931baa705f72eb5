"""The layout of a run over its ranks, and this rank's place in it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core import parallel_state as mpu

from megatron_mm.config.schema import ParallelConfig


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions and this process's rank in each."""

    world_size: int
    rank: int
    tp_size: int
    tp_rank: int
    pp_size: int
    pp_rank: int
    cp_size: int
    cp_rank: int
    dp_size: int
    dp_rank: int
    virtual_stages: int

    @staticmethod
    def current(config: ParallelConfig, world_size: int, rank: int) -> Layout:
        """Read from megatron-core's initialised process groups."""
        return Layout(
            world_size=world_size,
            rank=rank,
            tp_size=mpu.get_tensor_model_parallel_world_size(),
            tp_rank=mpu.get_tensor_model_parallel_rank(),
            pp_size=mpu.get_pipeline_model_parallel_world_size(),
            pp_rank=mpu.get_pipeline_model_parallel_rank(),
            cp_size=mpu.get_context_parallel_world_size(),
            cp_rank=mpu.get_context_parallel_rank(),
            dp_size=mpu.get_data_parallel_world_size(),
            dp_rank=mpu.get_data_parallel_rank(),
            virtual_stages=config.virtual_pipeline_model_parallel_size or 1,
        )

    @property
    def reports_losses(self) -> bool:
        """True on one rank for each part of the batch: the last stage's first tensor rank."""
        return self.pp_rank == self.pp_size - 1 and self.tp_rank == 0

    @property
    def ends(self) -> list[tuple[bool, bool]]:
        """Of each of this rank's model chunks, whether it is the model's first and whether its last."""
        return [
            (
                self.pp_rank == 0 and stage == 0,
                self.pp_rank == self.pp_size - 1 and stage == self.virtual_stages - 1,
            )
            for stage in range(self.virtual_stages)
        ]

    def describe(self) -> str:
        return (
            f"world {self.world_size} = tensor {self.tp_size} x pipeline {self.pp_size}"
            + (f" (x {self.virtual_stages} interleaved)" if self.virtual_stages > 1 else "")
            + (f" x context {self.cp_size}" if self.cp_size > 1 else "")
            + f" x data {self.dp_size}"
        )
