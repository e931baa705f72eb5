"""The vocabulary-parallel loss against plain torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks

from megatron_mm.config.model import TrunkConfig
from megatron_mm.config.schema import ParallelConfig, TrainConfig
from megatron_mm.parallel.distributed import process_groups
from megatron_mm.parallel.ops import MegatronOps
from megatron_mm.parallel.transformer_config import transformer_config
from megatron_mm.types import IGNORE

VOCAB, ROWS, LENGTH, HIDDEN = 24, 2, 9, 8
LOWEST = torch.finfo(torch.float64).min


def problem():
    """Logits with large values, a vocabulary padding at the dtype's lowest, labels of every share and IGNORE."""
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(ROWS, LENGTH, VOCAB, dtype=torch.float64, generator=generator)
    logits[..., -3:] = LOWEST
    labels = torch.randint(VOCAB - 3, (ROWS, LENGTH), generator=generator)
    labels[0, :4] = torch.tensor([0, VOCAB // 2 - 1, VOCAB // 2, VOCAB - 4])
    labels[:, 5::3] = IGNORE
    weights = torch.rand(2, ROWS, LENGTH, dtype=torch.float64, generator=generator)
    return logits, labels, weights


def sharded_loss(init, tp):
    """This rank's (cross-entropy, log Z, gradient of its logits), and whether it left the logits as they were."""
    with process_groups(ParallelConfig(tensor_model_parallel_size=tp), 0, torch.device("cpu"), **init) as layout:
        logits, labels, weights = problem()
        ours = logits.chunk(tp, -1)[layout.tp_rank].clone().requires_grad_()
        before = ours.detach().clone()
        config = transformer_config(
            TrunkConfig(), ParallelConfig(tensor_model_parallel_size=tp), TrainConfig(), "reference"
        )
        cross_entropy, log_z = MegatronOps(config).cross_entropy(ours, labels)
        (weights[0] * cross_entropy + weights[1] * log_z.square()).sum().backward()
        return cross_entropy.detach(), log_z.detach(), ours.grad, torch.equal(ours.detach(), before)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_loss_and_gradient_are_exact(tp):
    logits, labels, weights = problem()
    logits.requires_grad_()
    valid = labels != IGNORE
    theirs = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    their_z = torch.where(valid, logits.logsumexp(-1), 0.0)
    (weights[0] * theirs + weights[1] * their_z.square()).sum().backward()

    results = run_ranks(sharded_loss, tp, tp)
    for cross_entropy, log_z, _, intact in results:
        torch.testing.assert_close(cross_entropy, theirs.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(log_z, their_z.detach(), rtol=1e-12, atol=1e-12)
        assert (cross_entropy[~valid] == 0).all() and (log_z[~valid] == 0).all()
        assert intact, "the logits are the caller's"
    gradient = torch.cat([shard for _, _, shard, _ in results], -1)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-12, atol=1e-12)
    assert (gradient[~valid] == 0).all() and (gradient[..., -3:] == 0).all()


def low_precision_loss(init):
    with process_groups(ParallelConfig(), 0, torch.device("cpu"), **init):
        config = transformer_config(TrunkConfig(), ParallelConfig(), TrainConfig(), "reference")
        logits, labels, _ = problem()
        logits = logits.clamp(-100, 100).bfloat16().requires_grad_()
        cross_entropy, log_z = MegatronOps(config).cross_entropy(logits, labels)
        (cross_entropy + log_z).sum().backward()
        return logits.detach(), cross_entropy.detach(), log_z.detach(), logits.grad


def test_bf16_logits_give_fp32_losses():
    logits, cross_entropy, log_z, gradient = run_ranks(low_precision_loss, 1)[0]
    _, labels, _ = problem()
    assert cross_entropy.dtype == log_z.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    theirs = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    torch.testing.assert_close(cross_entropy, theirs)


def head_logits(init, tp):
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    with process_groups(parallel, 0, torch.device("cpu"), **init):
        ops = MegatronOps(transformer_config(TrunkConfig(), parallel, TrainConfig(), "reference"))
        head, embedding = ops.vocab_head(HIDDEN, VOCAB), ops.vocab_embedding(VOCAB, HIDDEN)
        torch.nn.init.ones_(head.weight)
        return ops.gather_logits(head(torch.ones(ROWS, HIDDEN))), len(embedding.weight) * tp


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_padding_of_the_vocabulary_does_not_depend_on_tp_and_is_never_drawn(tp):
    for logits, rows in run_ranks(head_logits, tp, tp):
        assert rows == logits.shape[-1] == 128
        assert (logits[..., :VOCAB] == HIDDEN).all()
        assert (logits[..., VOCAB:] == torch.finfo(torch.float32).min).all()
