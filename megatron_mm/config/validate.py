"""What a configuration may not say: values out of range, and keys that contradict each other or the world size.

Everything here is known before a process group or a file is opened, and each mistake is one sentence with a remedy.
What a group says of itself stands beside its dataclass, as its method `contradictions`; here is what groups say of each
other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from itertools import chain
from typing import Any

from megatron_mm.config.compose import Config, ConfigError, ModelConfig
from megatron_mm.config.fields import Problem
from megatron_mm.config.flow import ShowoFlowConfig
from megatron_mm.config.model import PatchedConfig, TrunkConfig
from megatron_mm.config.schema import ParallelConfig

IDS = {"pad", "bos", "eos", "boi", "eoi", "image_start", "t2i", "mmu", "mask", "r2i_id"}
FROM_ZERO = {"seed", "prefetch", "lr_warmup_iters", "image_first_max_timestep", "rank", *IDS}
"""Whole numbers that may be 0; all others count something and start at 1."""

ORDERS = {"caption_first", "image_first", "generation_share", "r2i_share", "condition_dropout"}
SHARES = {"adam_beta1", "adam_beta2", "ema_decay", "dropout", "hidden_dropout", "rotary_percent", "top_p", *ORDERS}
"""Numbers between 0 and 1; all others are 0 or more."""


def validate(config: Config, world_size: int, training: bool = True) -> None:
    """Refuse a configuration that cannot run on `world_size` ranks, naming its first mistake.

    Args:
        training: False for a model to sample from.

    Raises:
        ConfigError: a value out of range or not among its field's choices, or keys that contradict each other.
    """
    for problem in out_of_range(config):
        raise ConfigError(problem)
    for wrong, problem in chain(own_contradictions(config), _contradictions(config, world_size, training)):
        if wrong:
            raise ConfigError(problem)


def out_of_range(group: Any, prefix: str = "") -> Iterator[str]:
    """A sentence for each value of the dataclass `group` that its field does not take, recursively."""
    for field in fields(group):
        value = getattr(group, field.name)
        if is_dataclass(value):
            yield from out_of_range(value, f"{prefix}{field.name}.")
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                yield from out_of_range(item, f"{prefix}{field.name}[{i}].") if is_dataclass(item) else ()
        elif expected := _expected(field, value):
            yield f"{prefix}{field.name}={'null' if value is None else value} must be {expected}."


def own_contradictions(group: Any) -> Iterator[Problem]:
    """What the dataclass `group`, and those in it, say themselves (`contradictions`), a family of a user's own too."""
    if hasattr(group, "contradictions"):
        yield from group.contradictions()
    for field in fields(group):
        value = getattr(group, field.name)
        for each in value if isinstance(value, tuple) else (value,):
            if is_dataclass(each):
                yield from own_contradictions(each)


def _expected(field: Field, value: Any) -> str | None:
    """What `value` should have been, or None where it is all right."""
    if choices := field.metadata.get("choices"):
        return None if value in choices else f"one of {', '.join('null' if c is None else c for c in choices)}"
    if type(value) is int:
        least = int(field.name not in FROM_ZERO)
        return None if value >= least else f"{least} or more"
    if type(value) is float and field.name in SHARES:
        return None if 0 <= value <= 1 else "between 0 and 1"
    if type(value) is float:
        return None if 0 <= value < math.inf else "0 or more, and finite"
    return None


def _contradictions(config: Config, world_size: int, training: bool) -> Iterator[Problem]:
    """Lazily, so that a later line may rely on what an earlier one refused."""
    parallel, train, optim, data, trunk = config.parallel, config.train, config.optim, config.data, config.model.trunk
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size
    tp_key, pp_key = f"parallel.tensor_model_parallel_size={tp}", f"parallel.pipeline_model_parallel_size={pp}"
    vpp_key = f"parallel.virtual_pipeline_model_parallel_size={vpp}"

    validation = data.validation
    yield (
        train.eval_interval is not None and not validation.given,
        f"train.eval_interval={train.eval_interval} has nothing to evaluate on: set data.validation.path, or leave it "
        "null.",
    )
    yield (
        train.eval_interval is None and validation.given,
        "data.validation is read at every train.eval_interval iterations, which is null: set it.",
    )
    cut = cp * (tp if parallel.sequence_parallel else 1)
    yield (
        cp > 1 and data.seq_length % cut > 0,
        f"data.seq_length={data.seq_length} must be a multiple of {cut} = parallel.context_parallel_size={cp}"
        f"{f' x {tp_key} (sequence_parallel)' if parallel.sequence_parallel else ''}; change one of them.",
    )
    yield from _context_contradictions(config)
    block = parallel.feed_forward_block
    yield (
        block is not None and parallel.sequence_parallel and block % tp > 0,
        f"parallel.feed_forward_block={block} must be a multiple of {tp_key} under sequence_parallel; change "
        f"one of them.",
    )
    model_ranks = parallel.model_parallel_size
    cut_over = f"{tp_key} x {pp_key}" + (f" x parallel.context_parallel_size={cp}" if cp > 1 else "")
    yield (
        world_size % model_ranks > 0,
        f"{cut_over} needs a multiple of {model_ranks} processes, but the world size is {world_size}; start "
        f"more processes (torchrun --nproc-per-node) or lower one of them.",
    )
    yield from _expert_contradictions(config, world_size, training)
    dp = world_size // model_ranks
    rows = train.micro_batch_size * dp
    yield (
        train.global_batch_size % rows > 0,
        f"train.global_batch_size={train.global_batch_size} must be a multiple of train.micro_batch_size="
        f"{train.micro_batch_size} x {dp} data-parallel ranks = {rows}; change one of the two.",
    )
    micro_batches = train.global_batch_size // rows

    yield (
        vpp is not None and (pp == 1 or vpp == 1),
        f"{vpp_key} interleaves only with 2 or more chunks on 2 or more stages ({pp_key}); raise both, or set "
        f"parallel.virtual_pipeline_model_parallel_size=null.",
    )
    yield (
        vpp is not None and micro_batches % pp > 0,
        f"The interleaved schedule of {vpp_key} needs a multiple of {pp_key} micro-batches, but there are "
        f"{micro_batches} (train.global_batch_size / train.micro_batch_size / {dp} ranks); change one of these.",
    )
    chunks = pp * (vpp or 1)
    yield (
        trunk.num_layers % chunks > 0,
        f"model.trunk.num_layers={trunk.num_layers} must be a multiple of the {chunks} pipeline chunks of {pp_key}"
        f"{f' x {vpp_key}' if vpp else ''}; change one of them.",
    )

    yield (
        trunk.normalization == "LayerNorm" and config.fusion.rms_norm == "liger",
        "fusion.rms_norm=liger has no RMSNorm to compute with model.trunk.normalization=LayerNorm; use torch.",
    )
    for name, size in (
        ("num_attention_heads", trunk.num_attention_heads),
        ("num_query_groups", trunk.kv_heads),
        ("ffn_hidden_size", trunk.ffn_size),
    ):
        yield size % tp > 0, f"model.trunk.{name}={size} must be a multiple of {tp_key}; change one of the two."

    yield 128 % tp > 0, f"{tp_key} must divide 128, the multiple that vocabularies are padded to; use a power of two."

    yield (
        parallel.sequence_parallel and tp == 1,
        f"parallel.sequence_parallel=true cuts the sequence over tensor ranks and needs more than {tp_key}; raise "
        "that, or set parallel.sequence_parallel=false.",
    )
    yield (
        parallel.sequence_parallel and data.seq_length % tp > 0,
        f"data.seq_length={data.seq_length} must be a multiple of {tp_key} with parallel.sequence_parallel=true; "
        "change one of the two.",
    )
    yield (
        bool(parallel.overlap_param_gather)
        and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce),
        "parallel.overlap_param_gather=true needs parallel.use_distributed_optimizer=true and "
        "parallel.overlap_grad_reduce=true; set both, or turn it off.",
    )
    yield (
        bool(parallel.overlap_p2p_comm) and vpp is None,
        f"parallel.overlap_p2p_comm=true needs the interleaved schedule, but {vpp_key.replace('None', 'null')}; set "
        "that, or leave parallel.overlap_p2p_comm=null.",
    )
    yield (
        train.precision == "fp64" and parallel.use_distributed_optimizer,
        "train.precision=fp64 needs parallel.use_distributed_optimizer=false (the distributed optimizer keeps fp32 "
        "gradients); set it, or use fp32.",
    )
    yield (
        parallel.recompute_granularity == "full" and parallel.recompute_num_layers > trunk.num_layers // chunks,
        f"parallel.recompute_num_layers={parallel.recompute_num_layers} is more than the {trunk.num_layers // chunks} "
        "layers of a pipeline chunk; lower it.",
    )

    decay = optim.lr_decay_iters or train.train_iters
    decay_key = "optim.lr_decay_iters" if optim.lr_decay_iters else "train.train_iters"
    yield (
        optim.lr_warmup_iters >= decay,
        f"optim.lr_warmup_iters={optim.lr_warmup_iters} must be less than {decay_key}={decay}; change one of the two.",
    )
    wsd = optim.lr_wsd_decay_iters
    yield (
        wsd is not None and wsd > decay - optim.lr_warmup_iters,
        f"optim.lr_wsd_decay_iters={wsd} is more than the {decay - optim.lr_warmup_iters} iterations between "
        f"optim.lr_warmup_iters and {decay_key}: lower it.",
    )
    profile = config.profile
    yield (
        profile.start is not None and any(rank >= world_size for rank in profile.ranks),
        f"profile.ranks={list(profile.ranks)} names ranks that a world of {world_size} does not have: change it.",
    )
    lora = config.lora
    yield (
        lora.dropout > 0 and block is not None,
        f"lora.dropout={lora.dropout} does not know the blocks of parallel.feed_forward_block={block}; set one of them "
        "to 0 or null.",
    )
    yield from _image_contradictions(config.model)
    if isinstance(config.model, ShowoFlowConfig):
        yield from _showo_flow(config.model, config.parallel)


def _image_contradictions(model: ModelConfig) -> Iterator[Problem]:
    image = model.image
    yield (
        image.max_pixels is not None and image.transform != "native",
        f"model.image.max_pixels={image.max_pixels} does nothing with model.image.transform={image.transform}: set "
        "that to native, or leave it null.",
    )
    if not isinstance(model, PatchedConfig):
        yield (
            image.transform == "native",
            f"model.image.transform=native is for images of patches, but a {model.family} model has codes, all of one "
            "size: use crop.",
        )
        return
    patch = model.patch_size
    yield (
        image.max_pixels is not None and image.max_pixels < patch**2,
        f"model.image.max_pixels={image.max_pixels} is less than one patch of {patch} x {patch}: raise it.",
    )
    yield (
        image.height % patch > 0 or image.width % patch > 0,
        f"model.patch_size={patch} must divide model.image.height={image.height} and model.image.width={image.width}; "
        "change one of them.",
    )


def _showo_flow(model: ShowoFlowConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    tp = parallel.tensor_model_parallel_size
    for name in ("flow_heads", "flow_query_groups", "flow_ffn_size"):
        size = getattr(model, name)
        yield (
            size % tp > 0,
            f"model.{name}={size} must be a multiple of parallel.tensor_model_parallel_size={tp}; change one of them.",
        )


def _expert_contradictions(config: Config, world_size: int, training: bool) -> Iterator[Problem]:
    trunk, parallel = config.model.trunk, config.parallel
    ep, experts = parallel.expert_model_parallel_size, trunk.num_experts
    ep_key = f"parallel.expert_model_parallel_size={ep}"
    yield (
        ep > 1 and experts is None,
        f"{ep_key} has no experts to spread: set model.trunk.num_experts, or leave it at 1.",
    )
    if experts is None:
        return
    yield experts % ep > 0, f"model.trunk.num_experts={experts} must be a multiple of {ep_key}; change one of the two."
    ranks = world_size // parallel.pipeline_model_parallel_size
    yield (
        ranks % ep > 0,
        f"{ep_key} must divide the {ranks} ranks of a pipeline stage (tensor x context x data); change it.",
    )
    tp = parallel.tensor_model_parallel_size
    yield (
        training and tp > 1 and not parallel.sequence_parallel,
        f"model.trunk.num_experts={experts} with parallel.tensor_model_parallel_size={tp} needs "
        "parallel.sequence_parallel=true, or each tensor rank would route every token; set it.",
    )
    for other, value in (
        ("model.trunk.add_bias_linear=true", trunk.add_bias_linear),
        ("train.precision=fp64", config.train.precision == "fp64"),
    ):
        yield trunk.moe_grouped_gemm and value, f"model.trunk.moe_grouped_gemm=true cannot do with {other}; drop one."
    yield (
        parallel.feed_forward_block is not None,
        f"parallel.feed_forward_block={parallel.feed_forward_block} does not reach into experts; leave it null with "
        f"model.trunk.num_experts={experts}.",
    )


def _context_contradictions(config: Config) -> Iterator[Problem]:
    parallel = config.parallel
    cp, comm, size = parallel.context_parallel_size, parallel.context_parallel_comm, parallel.ulysses_size
    yield (
        cp > 1 and config.attention.backend in ("sdpa", "flash", "fa4"),
        f"attention.backend={config.attention.backend} gives no log-sum-exp, which "
        f"parallel.context_parallel_size={cp} needs; use auto, span or reference.",
    )
    yield (
        comm == "hybrid" and (size is None or cp % size > 0),
        f"parallel.context_parallel_comm=hybrid needs parallel.ulysses_size={'null' if size is None else size} to be a "
        f"divisor of parallel.context_parallel_size={cp}: give the ranks of a node that swap positions for heads.",
    )
    yield (
        size is not None and comm != "hybrid",
        f"parallel.ulysses_size={size} is only read with parallel.context_parallel_comm=hybrid, not {comm}; "
        f"leave it null.",
    )
    inner = {"ulysses": cp, "hybrid": size or 1}.get(comm, 1)
    tp = parallel.tensor_model_parallel_size
    for layers in attending(config.model):
        heads, key_heads = layers.num_attention_heads, layers.kv_heads
        yield (
            not heads_divide(heads, key_heads, tp, inner),
            f"parallel.context_parallel_comm={comm} spreads the heads of a tensor-parallel rank ({heads} and "
            f"{key_heads} over {tp}) over {inner} ranks, which does not come out even; use ring or exchange, or hybrid "
            "with a smaller parallel.ulysses_size.",
        )


def attending(model: ModelConfig) -> Iterator[TrunkConfig]:
    """The kinds of layers that attend over documents: the trunk's, and those behind it."""
    yield model.trunk
    if isinstance(model, ShowoFlowConfig):
        yield model.flow_head


def heads_divide(heads: int, key_heads: int, tensor_ranks: int, inner: int) -> bool:
    """Whether `inner` ranks can share a tensor-parallel rank's heads; too few key heads are repeated."""
    heads, key_heads = heads // tensor_ranks, max(key_heads // tensor_ranks, 1)
    return heads % inner == 0 and (key_heads % inner == 0 or inner % key_heads == 0)
