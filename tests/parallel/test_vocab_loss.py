"""The vocabulary-parallel head with its loss against plain torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from megatron.core import parallel_state as mpu

from megatron_mm.config.model import TrunkConfig
from megatron_mm.config.schema import ParallelConfig, TrainConfig
from megatron_mm.parallel.distributed import process_groups
from megatron_mm.parallel.ops import MegatronOps
from megatron_mm.parallel.transformer_config import transformer_config
from megatron_mm.parallel.vocab_loss import vocab_parallel_linear_cross_entropy
from megatron_mm.types import IGNORE

VOCAB, PADDED, ROWS, LENGTH, HIDDEN = 21, 24, 2, 9, 8


def problem(vocab=VOCAB):
    """Hidden states and weights that make large logits, labels of every shard and IGNORE, weights of every token."""
    generator = torch.Generator().manual_seed(0)
    hidden = 5 * torch.randn(ROWS, LENGTH, HIDDEN, dtype=torch.float64, generator=generator)
    weight = 5 * torch.randn(PADDED, HIDDEN, dtype=torch.float64, generator=generator)
    labels = torch.randint(vocab, (ROWS, LENGTH), generator=generator)
    labels[0, :4] = torch.tensor([0, vocab // 2 - 1, vocab // 2, vocab - 1])
    labels[:, 5::3] = IGNORE
    weights = torch.rand(2, ROWS, LENGTH, dtype=torch.float64, generator=generator)
    return hidden, weight, labels, weights


def total(losses, weights):
    cross_entropy, log_z = losses
    return (weights[0] * cross_entropy + weights[1] * log_z.square()).sum()


def torchs_losses(logits, labels):
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return cross_entropy, logits.logsumexp(-1).masked_fill(labels == IGNORE, 0.0)


def bias_of_the_problem():
    return 5 * torch.randn(PADDED, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def sharded_losses(init, tp, vocab, chunk, biased):
    """This rank's (cross-entropy, log Z, gradient of all hidden states, gradients of its share of weight and bias)."""
    with process_groups(ParallelConfig(tensor_model_parallel_size=tp), 0, torch.device("cpu"), **init) as layout:
        hidden, weight, labels, weights = problem(vocab)
        hidden.requires_grad_()
        share = weight.chunk(tp)[layout.tp_rank].clone().requires_grad_()
        group = mpu.get_tensor_model_parallel_group()
        bias = bias_of_the_problem().chunk(tp)[layout.tp_rank].clone().requires_grad_() if biased else None
        losses = vocab_parallel_linear_cross_entropy(hidden, share, labels, vocab, group, chunk, bias)
        total(losses, weights).backward()
        return *(loss.detach() for loss in losses), hidden.grad, share.grad, bias.grad if biased else None


@pytest.mark.parametrize(
    ("vocab", "chunk", "biased"),
    [(VOCAB, None, False), (VOCAB, 5, False), (5, 1, False), (VOCAB, 5, True), (5, 1, True)],
)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_losses_and_gradients_are_exact(tp, vocab, chunk, biased):
    """With 5 entries two or three of four shards are nothing but padding."""
    hidden, weight, labels, weights = problem(vocab)
    hidden.requires_grad_(), weight.requires_grad_()
    bias = bias_of_the_problem().requires_grad_() if biased else torch.zeros(PADDED)
    theirs = torchs_losses(hidden @ weight[:vocab].T + bias[:vocab], labels)
    total(theirs, weights).backward()

    results = run_ranks(sharded_losses, tp, tp, vocab, chunk, biased)
    for cross_entropy, log_z, hidden_grad, *_ in results:
        torch.testing.assert_close((cross_entropy, log_z), theirs, rtol=1e-12, atol=1e-12)
        assert (cross_entropy[labels == IGNORE] == 0).all() and (log_z[labels == IGNORE] == 0).all()
        torch.testing.assert_close(hidden_grad, hidden.grad, rtol=1e-12, atol=1e-12)
        assert (hidden_grad[labels == IGNORE] == 0).all()
    weight_grad = torch.cat([share for *_, share, _ in results])
    torch.testing.assert_close(weight_grad, weight.grad, rtol=1e-12, atol=1e-12)
    assert (weight_grad[vocab:] == 0).all()
    if biased:
        bias_grad = torch.cat([share for *_, share in results])
        torch.testing.assert_close(bias_grad, bias.grad, rtol=1e-12, atol=1e-12)
        assert (bias_grad[vocab:] == 0).all()


def head_of(tp, bias=False):
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    ops = MegatronOps(transformer_config(TrunkConfig(), parallel, TrainConfig(), "reference"))
    return ops, ops.vocab_head(HIDDEN, VOCAB, bias)


def head_losses(init, tp, bias):
    """All logits, the losses, how often the head's hooks ran for losses, and the error of a label in the padding."""
    with process_groups(ParallelConfig(tensor_model_parallel_size=tp), 0, torch.device("cpu"), **init):
        ops, head = head_of(tp, bias)
        hidden, _, labels, _ = problem()
        generator = torch.Generator().manual_seed(mpu.get_tensor_model_parallel_rank())
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
        logits = ops.gather_logits(head(hidden.float()))
        calls = []
        head.register_forward_pre_hook(lambda *_: calls.append(None))
        losses = head.cross_entropy(hidden.float(), labels)
        labels = labels.where(labels != 0, VOCAB)
        with pytest.raises(ValueError) as error:
            head.cross_entropy(hidden.float(), labels)
        return logits.detach(), [loss.detach() for loss in losses], len(calls), str(error.value)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_the_heads_losses_are_those_of_its_logits(tp, bias):
    """And they run its hooks, in which megatron-core's DDP awaits a weight that is still being gathered."""
    for logits, losses, calls, error in run_ranks(head_losses, tp, tp, bias):
        theirs = torchs_losses(logits[..., :VOCAB], problem()[2])
        torch.testing.assert_close(tuple(losses), theirs)
        assert calls == 2 and "A label is 21, but the vocabulary has 21 entries" in error


def padded_logits(init, tp):
    with process_groups(ParallelConfig(tensor_model_parallel_size=tp), 0, torch.device("cpu"), **init):
        ops, head = head_of(tp)
        embedding = ops.vocab_embedding(VOCAB, HIDDEN)
        torch.nn.init.ones_(head.weight)
        return ops.gather_logits(head(torch.ones(ROWS, HIDDEN))), len(embedding.weight) * tp


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_padding_of_the_vocabulary_does_not_depend_on_tp_and_is_never_drawn(tp):
    for logits, rows in run_ranks(padded_logits, tp, tp):
        assert rows == logits.shape[-1] == 128
        assert (logits[..., :VOCAB] == HIDDEN).all()
        assert (logits[..., VOCAB:] == torch.finfo(torch.float32).min).all()
