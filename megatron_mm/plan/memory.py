"""How much memory of one GPU a run takes, part by part, from its configuration alone.

Counted: what grows with the model or the context. Left out: the CUDA context and NCCL's buffers (1 to 2 GB), the
allocator's fragments, and the activations of a family's parts beside the vocabulary (patch layers, U-Nets). Frozen
weights count as if they trained: with adapters it is an upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_mm.config.compose import Config

LOGITS_BYTES = 2**30
"""Of the chunk of logits that exists at a time; see `mm_kernels.vocab_loss`."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU that has most."""

    weights: float
    gradients: float
    optimizer: float
    kept: float
    """Activations between forward and backward pass."""
    layer: float
    """One layer at work, that is computed again or differentiated, with the keys and values of two ring steps."""
    logits: float

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))


def usable(gpu_gigabytes: float) -> float:
    """Bytes that a run may take of a GPU: a tenth stays free, for the CUDA context, NCCL's buffers and fragments."""
    return 0.9e9 * gpu_gigabytes


def parameters(config: Config, vocab_size: int, beside: int = 0) -> tuple[float, float]:
    """(weights of one rank at most, weights of the whole model), without norms and biases.

    beside: those of a family's parts beside the vocabulary, which are not cut over tensor-parallel ranks.
    """
    trunk, parallel = config.model.trunk, config.parallel
    embedding = vocab_size * trunk.hidden_size
    ends = embedding * (2 if parallel.pipeline_model_parallel_size == 1 else 1)
    shared = (trunk.shared_weights / parallel.pipeline_model_parallel_size + ends) / parallel.tensor_model_parallel_size
    return shared + _experts(config) + beside, trunk.trunk_weights + 2 * embedding + beside


def _experts(config: Config) -> float:
    """Weights of one rank's experts, of all layers that it has."""
    trunk, parallel = config.model.trunk, config.parallel
    spread = parallel.pipeline_model_parallel_size * parallel.expert_model_parallel_size
    return (trunk.trunk_weights - trunk.shared_weights) / spread


def estimate(config: Config, vocab_size: int, world_size: int, beside: int = 0) -> Memory:
    """The memory of a run on `world_size` GPUs; `beside` as in `parameters`."""
    trunk, parallel, train = config.model.trunk, config.parallel, config.train
    element = train.dtype.itemsize
    rank_weights, _ = parameters(config, vocab_size, beside)
    replicas = world_size / (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    stage_ranks = world_size / parallel.pipeline_model_parallel_size
    experts = _experts(config)
    kept_states = rank_weights  # weights that this rank has optimizer states of
    if parallel.use_distributed_optimizer:
        kept_states = (rank_weights - experts) / replicas
        kept_states += experts * parallel.expert_model_parallel_size / stage_ranks
    states = 12 if train.precision == "bf16" else 2 * element  # master weights and Adam's two moments in fp32
    if config.optim.ema_decay is not None:
        states += max(element, 4)
    tokens = config.data.seq_length / parallel.context_parallel_size * train.micro_batch_size
    pp = parallel.pipeline_model_parallel_size
    data_ranks = replicas / parallel.context_parallel_size
    under_way = min(pp, max(train.global_batch_size / train.micro_batch_size / data_ranks, 1))
    kept = {"full": layer_input, None: layer_activations, "selective": layer_activations}
    per_token = kept[parallel.recompute_granularity](config) * element
    return Memory(
        weights=rank_weights * element,
        gradients=rank_weights * (4 if train.precision == "bf16" else element),
        optimizer=kept_states * states,
        kept=tokens * per_token * trunk.num_layers / pp * under_way,
        layer=tokens * _layer_at_work(config),
        logits=LOGITS_BYTES,
    )


def layer_input(config: Config) -> float:
    """Numbers a token that full recomputation keeps of a layer."""
    parallel = config.parallel
    return config.model.trunk.hidden_size / (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)


def layer_activations(config: Config) -> float:
    """Numbers a token that a layer keeps without recomputation, by fused parts: inputs and outputs of its norms
    (one in a parallel block); queries, keys and values before and after RoPE; attention's output; what lies between the
    feed-forward's matrices, before and behind the activation. Of dense layers and layers with experts the average."""
    trunk, parallel = config.model.trunk, config.parallel
    width, kv = trunk.hidden_size, trunk.kv_heads * trunk.head_dim
    moe = trunk.moe_layers / trunk.num_layers
    sharded: float = (width + 2 * kv) + (width + kv) + width
    if parallel.context_parallel_size > 1:
        sharded += 2 * kv  # keys and values side by side, as they travel
    if parallel.feed_forward_block is None:
        sharded += trunk.ffn_matrices * trunk.ffn_size * (1 - moe)
    # A token visits some experts: what they read and write, and what lies between.
    sharded += moe * trunk.moe_router_topk * (2 * width + trunk.ffn_matrices * trunk.ffn_size)
    norms = 1 if trunk.parallel_block else 2
    return 2 * norms * layer_input(config) + sharded / parallel.tensor_model_parallel_size


def _layer_at_work(config: Config) -> float:
    """Bytes a token: a layer's activations, fp32 sums of attention and its gradients, two steps' keys and values with
    the gradients that go home; and one block of the feed-forward."""
    trunk, parallel = config.model.trunk, config.parallel
    element, tp = config.train.dtype.itemsize, parallel.tensor_model_parallel_size
    kv = trunk.kv_heads * trunk.head_dim
    bytes_ = layer_activations(config) * element
    if parallel.context_parallel_size > 1:
        travelling = 4 * 2 * kv * element
        sums = 4 * (2 * trunk.hidden_size + 2 * kv)
        bytes_ += (travelling + sums) / tp
    if parallel.feed_forward_block is not None:
        part = config.data.seq_length / parallel.context_parallel_size
        bytes_ += 2 * trunk.ffn_matrices * trunk.ffn_size * element / tp * min(parallel.feed_forward_block / part, 1)
    return bytes_
