"""One pipeline stage: family front (first stage), megatron-core transformer block, family back (last stage)."""

from __future__ import annotations

import torch
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from megatron_mm.families.base import Family, FurtherLayers
from megatron_mm.nn.fusion import rotary_frequencies, rotary_table
from megatron_mm.nn.init import Undrawn
from megatron_mm.parallel.context.borrow import narrow, widen
from megatron_mm.parallel.context.runtime import Part
from megatron_mm.parallel.layer import block_spec
from megatron_mm.parallel.lora import adapt
from megatron_mm.parallel.modulated import Attended
from megatron_mm.parallel.ops import MegatronOps
from megatron_mm.parallel.transformer_config import TrunkTransformerConfig


class StageModel(MegatronModule):
    """A model chunk of one rank. `first` and `last` say whether it holds the family's front and back."""

    def __init__(
        self, config: TrunkTransformerConfig, family: Family, first: bool, last: bool, virtual_stage: int | None
    ):
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = first, last
        self.share_embeddings_and_output_weights = False
        self.vp_stage = virtual_stage
        self.terms = tuple(term.name for term in family.terms)
        self.rotary_dim, self.rotary_base = family.trunk.rotary_dim, family.trunk.rotary_base
        ops = MegatronOps(config)
        options = {"device": torch.cuda.current_device(), "dtype": config.params_dtype}
        # What a family builds lies on the device from the start: Show-o2's semantic layers alone take 10 GB in fp32.
        with Undrawn(), torch.device(options["device"]):
            self.front = family.build_front(ops).to(**options) if first else None
            self.decoder = TransformerBlock(
                config,
                block_spec(config, get_num_layers_to_build(config, virtual_stage), virtual_stage),
                pre_process=first,
                post_process=last,
                vp_stage=virtual_stage,
            )
            self.back = family.build_back(ops).to(**options) if last else None
        if config.lora.rank:
            adapt(self, config.lora, config.dropout_seed)

    @classmethod
    def of_this_rank(cls, config: TrunkTransformerConfig, family: Family) -> StageModel:
        """The only chunk that this rank has where pipelining is not interleaved."""
        return cls(config, family, mpu.is_pipeline_first_stage(), mpu.is_pipeline_last_stage(), virtual_stage=None)

    def set_input_tensor(self, input_tensor) -> None:
        """Called by the pipeline schedule with the previous stage's output."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, part: Part) -> torch.Tensor:
        """Hidden states [n (/ TP under sequence parallelism), B, D] of a part's n positions; on the last stage the loss
        sums [terms]."""
        hidden = self.hidden(part)
        if not self.post_process:
            return hidden
        hidden, batch = hidden.transpose(0, 1), part.shard.back
        if isinstance(self.back, FurtherLayers):
            batch = part.shard.own_back()
        elif part.shard.widening is not None:
            hidden = widen(hidden, part.shard.widening, part.group)
        sums = self.back(hidden, batch)
        return torch.stack([sums[name] for name in self.terms])

    def hidden(self, part: Part, further: bool = True) -> torch.Tensor:
        """The trunk's output [n, B, D]: every position of the part on the last stage, where `further` appends what
        layers of the family's own make of it."""
        x, meta = None, part.shard.meta
        if self.pre_process:
            x = self.front(part.shard.front)
            if part.shard.widening is not None:
                x = narrow(x, part.shard.widening)
            x = x.transpose(0, 1).contiguous()
            if self.config.sequence_parallel:
                x = scatter_to_sequence_parallel_region(x)
            if self._recomputes_for_frozen_front(x):
                x = x.detach().requires_grad_()
        x = self.decoder(
            x,
            attention_mask=meta,
            rotary_pos_emb=self._rotary_table(meta[:, 3]),
            packed_seq_params=part.attention,
        )
        if self.post_process and self.config.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False)
        if further and isinstance(self.back, FurtherLayers):
            made = self.back.further(x.transpose(0, 1), part.shard.own_back(), Attended(meta, part.attention))
            x = torch.cat([x, made.transpose(0, 1)], dim=-1)
        return x

    def _recomputes_for_frozen_front(self, x: torch.Tensor) -> bool:
        """Whether recomputed layers would lose their gradients: where no input needs one, megatron-core's checkpoint
        gives none to weights either."""
        wanted = torch.is_grad_enabled() and self.config.recompute_granularity == "full" and not x.requires_grad
        return wanted and any(parameter.requires_grad for parameter in self.decoder.parameters())

    def _rotary_table(self, positions: torch.Tensor) -> torch.Tensor:
        """`rotary_table` [S, B, 1, rotary_dim] of positions [B, S]."""
        precise = torch.promote_types(self.config.params_dtype, torch.float32)
        frequencies = rotary_frequencies(self.rotary_dim, self.rotary_base, positions.device)
        return rotary_table(positions.t(), frequencies, precise).unsqueeze(2)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Sharded tensors under layout-free names: `front.*`, `decoder.layers.<global number>.*`, `back.*`."""
        metadata = {**(metadata or {}), "non_homogeneous_layers": True}
        state = self.decoder.sharded_state_dict(f"{prefix}decoder.", sharded_offsets, metadata)
        for name, part in (("front", self.front), ("back", self.back)):
            if part is not None:
                state |= _sharded_tree(part, f"{prefix}{name}.", metadata)
        # What remains are Transformer Engine's empty `_extra_state` objects, which a checkpoint need not hold.
        return {name: entry for name, entry in state.items() if not isinstance(entry, ShardedObject)}


def _sharded_tree(module: nn.Module, prefix: str, metadata: dict) -> dict:
    """Sharded tensors of a family's part: megatron-core modules in it know their sharding, the rest is replicated."""
    if hasattr(module, "sharded_state_dict"):
        return module.sharded_state_dict(prefix, (), metadata)
    own = {}
    module._save_to_state_dict(own, "", keep_vars=True)
    state = make_sharded_tensors_for_checkpoint(
        own,
        prefix,
        tp_group=mpu.get_tensor_model_parallel_group(),
        dp_cp_group=mpu.get_data_parallel_group(with_context_parallel=True),
    )
    for name, child in module.named_children():
        state |= _sharded_tree(child, f"{prefix}{name}.", metadata)
    return state
