"""The row-wise primitives, in Triton and in plain torch, against torch's own cross-entropy in fp64."""

import pytest
import torch
import torch.nn.functional as F
from devices import KERNEL_DEVICE as DEVICE
from devices import ON_KERNEL_DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_kernels.vocab_loss import IGNORE, fused, logit_gradient_, reference, row_statistics
from mm_kernels.vocab_loss.fused import BLOCK

from megatron_mm import types

# Triton's interpreter computes bf16 wrongly.
TRITON_DTYPES = [torch.float64, torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
IMPLEMENTATIONS = [
    *(pytest.param(fused, dtype, id=f"triton-{dtype}") for dtype in TRITON_DTYPES),
    *(pytest.param(reference, dtype, id=f"torch-{dtype}") for dtype in [*TRITON_DTYPES[:3], torch.bfloat16]),
]
# The interpreter's numpy remarks on log(0), which is the -inf that is wanted.
pytestmark = [pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"), *ON_KERNEL_DEVICE]

WIDTHS = st.one_of(st.integers(1, 300), st.integers(BLOCK - 1, BLOCK + 1), st.integers(2 * BLOCK, 2 * BLOCK + 9))


@st.composite
def shards(draw):
    """(width, first, real, labels): a chunk's labels in a shard of the vocabulary, beside it, and none."""
    width = draw(WIDTHS)
    first, real = draw(st.sampled_from([0, 1, 5000])), draw(st.one_of(st.just(width), st.integers(0, width)))
    near = st.integers(max(first - 2, 0), first + real + 1)
    labels = draw(st.lists(st.one_of(near, st.just(IGNORE)), min_size=1, max_size=4))
    return width, first, real, torch.tensor(labels, device=DEVICE)


def make_logits(width, real, labels, seed, spread, dtype):
    """Memory [1 + C + 1, width] whose middle are the logits, some of them -inf; NaN is all that must not be read: other
    rows, padding, rows without a label."""
    generator = torch.Generator().manual_seed(seed)
    values = (spread * torch.randn(len(labels), width, generator=generator)).to(dtype)
    values[torch.rand(values.shape, generator=generator) < 0.05] = -torch.inf
    if seed % 4 == 0:
        values[0] = -torch.inf
    memory = torch.full((len(labels) + 2, width), torch.nan, dtype=dtype, device=DEVICE)
    memory[1:-1, :real] = values[:, :real].to(DEVICE)
    memory[1:-1][labels == IGNORE] = torch.nan
    return memory


def truth(logits, labels, rest, grad_ce, grad_log_z, first, real):
    """In fp64 by torch and autograd: (log-sum-exp and label's logit in this shard, log Z, gradient of the logits).

    `rest` [C] is one more column, into which all other shards are summed.
    """
    ignored, mine = labels == IGNORE, (labels >= first) & (labels < first + real)
    here = logits[:, :real].double().masked_fill(ignored[:, None], 0.0).requires_grad_()
    whole = torch.cat([here, rest[:, None]], 1)
    column = torch.where(mine, labels - first, real)
    cross_entropy = F.cross_entropy(whole, column.masked_fill(ignored, IGNORE), reduction="none")
    log_z = whole.logsumexp(1).masked_fill(ignored, 0.0)
    gradients = [g.double().masked_fill(ignored, 0.0) for g in (grad_ce, grad_log_z)]
    torch.autograd.backward([cross_entropy, log_z], gradients)
    here, gradient = here.detach(), F.pad(here.grad, (0, logits.shape[1] - real))
    target = F.pad(here, (0, 1)).gather(1, column[:, None]).squeeze(1)
    return here.logsumexp(1).masked_fill(ignored, 0.0), target, log_z.detach(), gradient


@pytest.mark.parametrize(("implementation", "dtype"), IMPLEMENTATIONS)
@settings(deadline=None, max_examples=40, derandomize=True)
@given(shards(), st.integers(0, 99), st.sampled_from([1.0, 100.0, 1e4]))
def test_primitives_are_torchs_cross_entropy(implementation, dtype, shard, seed, spread):
    width, first, real, labels = shard
    memory = make_logits(width, real, labels, seed, spread, dtype)
    logits, precise = memory[1:-1], torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(2, len(labels), dtype=precise, generator=generator).to(DEVICE)
    upstream[:, labels == IGNORE] = torch.nan
    rest = (spread * torch.randn(len(labels), dtype=torch.float64, generator=generator)).to(DEVICE)
    log_sum_exp, target, log_z, gradient = truth(logits, labels, rest, *upstream, first, real)

    ours, our_target = implementation.row_statistics(logits, labels, first, real)
    assert ours.dtype == our_target.dtype == precise
    assert torch.equal(our_target.double(), target), "a logit is copied, not computed"
    # exp and log err by an ulp or two; the sum of n terms in blocks by less than sqrt(n).
    eps = torch.finfo(precise).eps
    torch.testing.assert_close(ours.double(), log_sum_exp, rtol=2 * eps, atol=40 * eps)

    implementation.logit_gradient_(logits, labels, log_z.to(precise), *upstream, first, real)
    # log Z is rounded before it comes in: eps |log Z| in the exponent. The result is rounded to its own dtype.
    limit = (eps * (4 + log_z.abs()) * upstream.double().abs().sum(0))[:, None]
    limit = limit + torch.finfo(dtype).eps * (gradient.abs() + torch.finfo(dtype).tiny)
    assert ((logits.double() - gradient).abs() <= limit.nan_to_num(0.0)).all()
    assert (logits[labels == IGNORE] == 0).all() and (logits[:, real:] == 0).all()
    assert memory[0].isnan().all() and memory[-1].isnan().all()


@pytest.mark.parametrize(("implementation", "dtype"), IMPLEMENTATIONS)
def test_nan_and_an_unknown_log_z_are_passed_on(implementation, dtype):
    """A run must stop where its numbers are lost: NaN in a row that counts, and NaN for log Z."""
    logits = torch.ones(2, BLOCK + 5, dtype=dtype, device=DEVICE)
    logits[0, BLOCK + 1] = torch.nan
    labels = torch.tensor([0, 1], device=DEVICE)
    log_sum_exp, _ = implementation.row_statistics(logits, labels, 0, BLOCK + 5)
    assert log_sum_exp.isnan().tolist() == [True, False]
    ones = torch.ones_like(log_sum_exp)
    implementation.logit_gradient_(logits, labels, log_sum_exp.flip(0), ones, ones, 0, BLOCK + 5)
    assert logits[1].isnan().all()


def test_the_operators_are_what_they_are_declared_to_be():
    """torch's own checks: schemas (what is overwritten), and shapes without values."""
    logits, labels = torch.randn(3, 20, device=DEVICE), torch.tensor([1, IGNORE, 7], device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(row_statistics, (logits, labels, 5, 18), test_utils=checks)
    vectors = torch.randn(3, 3, device=DEVICE).unbind()
    torch.library.opcheck(logit_gradient_, (logits, labels, *vectors, 5, 18), test_utils=checks)


def test_ignored_labels_are_marked_alike():
    assert IGNORE == types.IGNORE
