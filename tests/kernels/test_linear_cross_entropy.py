"""The head with its loss in chunks, on one device, against torch's linear and cross-entropy; and what it allocates."""

import pytest
import torch
import torch.nn.functional as F
from devices import KERNEL_DEVICE as DEVICE
from devices import ON_KERNEL_DEVICE
from mm_kernels.vocab_loss import IGNORE, linear_cross_entropy
from mm_kernels.vocab_loss.linear import LinearCrossEntropy, default_chunk
from mm_kernels.vocab_loss.memory import LiveBytes
from torch.torch_version import TorchVersion

pytestmark = ON_KERNEL_DEVICE
REAL, ROWS, WIDTH, ENTRIES = 37, (3, 7), 16, 40


def problem(dtype=torch.float64):
    """hidden [7, 3, 16] (transposed, as the trunk gives it), weight [40, 16] with 37 real rows, labels [3, 7]."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 3, WIDTH, dtype=torch.float64, generator=generator)
    weight = torch.randn(ENTRIES, WIDTH, dtype=torch.float64, generator=generator)
    labels = torch.randint(REAL, ROWS, generator=generator)
    labels[0, 0], labels[2, 6], labels[1, ::2] = 0, REAL - 1, IGNORE
    hidden, weight = (t.to(DEVICE, dtype).requires_grad_() for t in (hidden, weight))
    return hidden, weight, labels.to(DEVICE)


def torchs_losses(hidden, weight, labels, bias=None):
    logits = F.linear(hidden, weight[:REAL], bias)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return cross_entropy, logits.logsumexp(-1).masked_fill(labels == IGNORE, 0.0)


def gradients(losses, inputs):
    """Of a sum in which every token weighs differently, by cross-entropy and by log Z."""
    cross_entropy, log_z = losses
    weights = torch.linspace(0.1, 2, 42, dtype=torch.float64, device=DEVICE).to(log_z.dtype).view(2, *ROWS)
    return torch.autograd.grad((weights[0] * cross_entropy + weights[1] * log_z.square()).sum(), inputs)


@pytest.mark.parametrize("chunk", [1, 4, 7, 21, 100, None])
def test_losses_and_gradients_are_torchs(chunk):
    hidden, weight, labels = problem()
    ours = linear_cross_entropy(hidden.transpose(0, 1), weight, labels, vocab_size=REAL, chunk=chunk)
    theirs = torchs_losses(hidden.transpose(0, 1), weight, labels)
    inputs = (hidden, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grads = gradients(ours, inputs)
    torch.testing.assert_close(grads, gradients(theirs, inputs), rtol=1e-12, atol=1e-12)
    ignored = labels == IGNORE
    assert all((loss[ignored] == 0).all() for loss in ours)
    assert (grads[0].transpose(0, 1)[ignored] == 0).all() and (grads[1][REAL:] == 0).all()


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_a_bias_is_torchs(chunk):
    """With its gradient, in the last chunk's fewer rows too, and exactly none for padding."""
    hidden, weight, labels = problem()
    bias = (3 * torch.randn(ENTRIES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).to(DEVICE)
    inputs = (hidden, weight, bias.requires_grad_())
    rows = hidden.transpose(0, 1)
    ours = linear_cross_entropy(rows, weight, labels, vocab_size=REAL, chunk=chunk, bias=bias)
    theirs = torchs_losses(rows, weight, labels, bias[:REAL])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grads = gradients(ours, inputs)
    torch.testing.assert_close(grads, gradients(theirs, inputs), rtol=1e-12, atol=1e-12)
    assert (grads[2][REAL:] == 0).all() and (grads[2][:REAL] != 0).all()
    frozen = linear_cross_entropy(rows, weight, labels, vocab_size=REAL, chunk=chunk, bias=bias.detach())
    torch.testing.assert_close(gradients(frozen, inputs[:2]), grads[:2], rtol=0, atol=0)


def test_a_bf16_biass_gradient_is_summed_in_fp32():
    """512 like tokens, one a chunk, as below."""
    hidden = torch.zeros(512, WIDTH, dtype=torch.bfloat16, device=DEVICE)
    weight, bias = (torch.zeros(n, dtype=torch.bfloat16, device=DEVICE) for n in ((ENTRIES, WIDTH), (ENTRIES,)))
    labels = torch.zeros(512, dtype=torch.int64, device=DEVICE)
    cross_entropy, _ = linear_cross_entropy(hidden, weight, labels, chunk=1, bias=bias.requires_grad_())
    cross_entropy.sum().backward()
    expected = 512 * (1 / ENTRIES - F.one_hot(torch.tensor(0), ENTRIES).double())
    assert bias.grad.dtype == torch.bfloat16
    torch.testing.assert_close(bias.grad.double().cpu(), expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    hidden, weight, labels = problem()
    inputs = [hidden.transpose(0, 1).detach().requires_grad_(), weight]
    inputs[frozen].requires_grad_(False)
    free = inputs[1 - frozen]
    ours = gradients(linear_cross_entropy(*inputs, labels, vocab_size=REAL), free)
    torch.testing.assert_close(ours, gradients(torchs_losses(*inputs, labels), free), rtol=1e-12, atol=1e-12)


def test_bf16_weights_give_fp32_losses_and_a_gradient_summed_in_fp32():
    """512 like tokens, one a chunk: in bf16 the sum of a like number would stand still at 256 of them."""
    hidden = torch.ones(512, WIDTH, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.zeros(ENTRIES, WIDTH, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    labels = torch.zeros(512, dtype=torch.int64, device=DEVICE)
    cross_entropy, log_z = linear_cross_entropy(hidden, weight, labels, chunk=1)
    cross_entropy.sum().backward()
    exact = torch.full((512,), ENTRIES, dtype=torch.float32, device=DEVICE).log()
    torch.testing.assert_close((cross_entropy, log_z), (exact, exact), rtol=1e-6, atol=0)
    assert weight.grad.dtype == torch.bfloat16
    expected = 512 * (1 / ENTRIES - F.one_hot(torch.tensor(0), ENTRIES).double())
    # Each logit's gradient is rounded to bf16, and so is the sum.
    torch.testing.assert_close(weight.grad.double().cpu(), expected[:, None].expand(-1, WIDTH), rtol=2**-8, atol=0)


def test_no_labels_at_all():
    hidden, weight, labels = problem()
    ours = linear_cross_entropy(hidden.transpose(0, 1), weight, torch.full_like(labels, IGNORE), chunk=4)
    assert all((loss == 0).all() for loss in ours)
    assert all((gradient == 0).all() for gradient in gradients(ours, (hidden, weight)))
    none = linear_cross_entropy(hidden[:0].flatten(0, 1), weight, labels[:0].flatten())
    assert [loss.shape for loss in none] == [(0,), (0,)]


@pytest.mark.parametrize("label", [REAL, ENTRIES, 10**6, -1, -101])
def test_a_label_outside_the_vocabulary_stops_the_run(label):
    """On a CPU by a sentence, on CUDA, where nobody waits for the device, by NaN in the loss and in both gradients."""
    hidden, weight, labels = problem()
    labels[2, 3] = label
    with pytest.raises(ValueError, match=f"label is {label}, but the vocabulary has {REAL} entries"):
        linear_cross_entropy(hidden.transpose(0, 1).cpu(), weight.cpu(), labels.cpu(), vocab_size=REAL)
    unchecked = LinearCrossEntropy.apply(hidden.transpose(0, 1), weight, labels, REAL, 0, REAL, None, 4)
    assert all(loss.isnan().nonzero().tolist() == [[2, 3]] for loss in unchecked)
    hidden_grad, weight_grad = gradients(unchecked, (hidden, weight))
    assert hidden_grad[3, 2].isnan().all() and weight_grad[:REAL].isnan().all()


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, labels = problem()
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(ValueError, match=r"bias \[39\] does not fit weight \[40, 16\]"):
        linear_cross_entropy(hidden.transpose(0, 1), weight, labels, bias=weight[1:, 0])
    with pytest.raises(ValueError, match="vocab_size=41 exceeds the weight's 40 rows"):
        linear_cross_entropy(hidden.transpose(0, 1), weight, labels, vocab_size=41)


def count(loss, tokens, vocab, width, device, dtype=torch.float32):
    """`LiveBytes` of a forward and a backward pass."""
    hidden = torch.ones(tokens, width, dtype=dtype, device=device, requires_grad=True)
    weight = torch.ones(vocab, width, dtype=dtype, device=device, requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.int64, device=device)
    with LiveBytes() as live:
        loss(hidden, weight, labels).backward()
    return live


@pytest.mark.parametrize("device", ["meta", DEVICE])
def test_logits_of_all_tokens_never_exist(device):
    tokens, vocab, width, chunk = 512, 1024, 32, 64
    ours = count(lambda *a: sum(linear_cross_entropy(*a, chunk=chunk)).sum(), tokens, vocab, width, device)
    logits, gradients_and_chunk = 4 * tokens * vocab, 4 * (tokens * width + vocab * width + chunk * vocab)
    assert ours.largest == 4 * chunk * vocab
    # Beside these, single numbers for each token.
    assert gradients_and_chunk < ours.peak < gradients_and_chunk + 64 * tokens
    eager = count(lambda h, w, y: F.cross_entropy(F.linear(h, w), y), tokens, vocab, width, device)
    assert eager.largest == logits and eager.peak > 2 * logits, "the counter would see them"


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.13", reason="no addmm with an out_dtype on the meta device")
def test_a_long_context_over_a_large_vocabulary_fits():
    """131072 tokens over 129280 entries in bf16: 4 GiB, gradients included, where the logits alone are 31.6."""
    tokens, vocab, width = 131072, 129280, 4096
    live = count(lambda *a: sum(linear_cross_entropy(*a)).sum(), tokens, vocab, width, "meta", torch.bfloat16)
    # hidden's gradient, the weight's in fp32 and its copy in bf16, which takes the chunk's place.
    expected = 2 * tokens * width + (4 + 2) * vocab * width
    assert expected < live.peak < expected + 2**25


@pytest.mark.parametrize(("vocab", "dtype", "tokens"), [(129280, "bfloat16", 4096), (2**21, "float32", 128)])
def test_chunks_are_whole_tiles_within_the_budget(vocab, dtype, tokens):
    assert default_chunk(torch.empty(vocab, 8, dtype=getattr(torch, dtype), device="meta")) == tokens
