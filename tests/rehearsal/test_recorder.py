"""What a GPU would wait for, or refuse, is seen; what it would not is left alone."""

import pytest
import torch
import torch.nn.functional as F

from megatron_mm.mask import area, causal, concatenate, hide_after, with_spans
from megatron_mm.rehearsal.errors import RehearsalError
from megatron_mm.rehearsal.fused import counted_chains
from megatron_mm.rehearsal.kernels import Launches, pairs
from megatron_mm.rehearsal.meta import META


def _syncs(recorder) -> list[str]:
    return [what for _, what, _ in recorder.record.syncs]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: x.cpu().numpy(),
        lambda x: float(x[0]),
        lambda x: int(x[0]),
        lambda x: bool(x[0] > 0),
        lambda x: torch.equal(x, x + 1),
        lambda x: torch.empty(4).copy_(x),
        lambda x: [value for value in x.tolist() if value],
    ],
)
def test_the_host_waits(recorder, read):
    x = torch.zeros(4, device="cuda")
    assert not _syncs(recorder)
    read(x)
    assert len(_syncs(recorder)) == 1


@pytest.mark.parametrize(
    "select",
    [
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64, device="cuda")),
        lambda x: x.index_put_((x > 0,), torch.zeros(2, device="cuda")),
    ],
)
def test_sizes_that_only_the_device_knows(recorder, select):
    with pytest.raises(RehearsalError, match="size only the device knows"):
        select(torch.zeros(4, device="cuda"))


def test_filling_in_a_number_needs_no_size(recorder):
    x = torch.zeros(4, device="cuda")
    x[x > 0] = 1.0
    x.repeat_interleave(torch.ones(4, dtype=torch.int64, device="cuda"), output_size=4)
    assert not _syncs(recorder)


@pytest.mark.parametrize(
    "mix",
    [
        lambda here, there: there @ here,
        lambda here, there: F.embedding(here.long(), there),
        lambda here, there: there[here.long()],
        lambda here, there: there.index_select(0, here.long()[0]),
        lambda here, there: there.gather(0, here.long()),
        lambda here, there: there + here,
        lambda here, there: torch.cat([here, there]),
    ],
)
def test_tensors_of_host_and_device_do_not_mix(recorder, mix):
    with pytest.raises((RehearsalError, RuntimeError), match="host|device"):
        mix(torch.zeros(4, 4), torch.zeros(4, 4, device="cuda"))


def test_numbers_of_the_host_travel_with_a_kernel(recorder):
    x = torch.zeros(4, device="cuda") * torch.tensor(2.0) + 1
    assert x.device == META and not _syncs(recorder)


@pytest.mark.parametrize(
    ("upload", "seen"),
    [
        (lambda x: x.to("cuda"), "blocking copy from the host"),
        (lambda x: x.cuda(), "blocking copy from the host"),
        (lambda x: torch.tensor([1.0, 2.0], device="cuda"), "blocking copy from the host"),
        (lambda x: torch.empty(4, device="cuda").copy_(x), "blocking copy from the host"),
        (lambda x: x.to("cuda", non_blocking=True), "copy from pageable memory"),
        (lambda x: x.pin_memory().to("cuda", non_blocking=True), None),
        (lambda x: torch.empty(4, pin_memory=True).to("cuda", non_blocking=True), None),
        (lambda x: torch.arange(4, device="cuda"), None),
    ],
)
def test_uploads(recorder, upload, seen):
    assert upload(torch.zeros(4)).device == META
    assert _syncs(recorder) == ([seen] if seen else [])


def test_what_the_host_sent_it_can_read_again(recorder):
    images = torch.tensor([[0, 3, 2, 2], [1, 5, 4, 4]]).to("cuda")
    assert images.tolist() == [[0, 3, 2, 2], [1, 5, 4, 4]]
    assert images[1, 2].item() == 4


def test_memory_is_what_lives(recorder):
    ledger = recorder.ledger
    x = torch.zeros(1000, device="cuda")
    assert ledger.total == 4096  # blocks of 512 bytes
    y = x.view(10, 100)[3:]
    del x
    assert ledger.total == 4096, "a view keeps its storage"
    z = y * 2
    assert ledger.total == 4096 + 3072
    del y
    assert (ledger.total, ledger.peak.total) == (3072, 4096 + 3072)
    del z
    assert ledger.total == 0


def test_the_backward_pass_keeps_what_was_saved(recorder):
    w = torch.zeros(64, 64, device="cuda", requires_grad=True)
    y = (w @ w).relu()
    held = recorder.ledger.total
    loss = y.sum()
    del y
    assert recorder.ledger.total > held, "relu's output is saved for its backward pass"
    loss.backward()
    del loss
    assert recorder.ledger.total == 2 * 64 * 64 * 4, "the weight and its gradient"


def test_flops_and_bytes_of_a_product(recorder):
    a, b = torch.zeros(32, 64, device="cuda"), torch.zeros(64, 16, device="cuda")
    recorder.restart()
    a @ b
    product = recorder.record.kinds["product"]
    assert (product.launches, product.flops, product.bytes) == (1, 2 * 32 * 64 * 16, 4 * (32 * 64 + 64 * 16 + 32 * 16))


def test_flops_of_products_of_groups(recorder):
    """Of experts: outputs, and both gradients."""
    x = torch.zeros(32, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.zeros(4, 64, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ends = torch.zeros(4, device="cuda", dtype=torch.int32)
    recorder.restart()
    F.grouped_mm(x, w, offs=ends).square().sum().backward()
    product = recorder.record.kinds["product"]
    assert (product.launches, product.flops) == (3, 3 * 2 * 32 * 64 * 16)


def test_every_mask_is_counted_although_one_lies_where_another_was(recorder):
    launches = Launches(recorder)
    masks = [with_spans(256, [(8, end)]) for end in range(16, 256, 16)]
    sources = [torch.from_numpy(mask)[:, None].contiguous() for mask in masks]
    for mask, source in zip(masks, sources, strict=True):
        lo, hi, until = source.to("cuda").unbind()
        tensors = {"lo_ptr": lo, "hi_ptr": hi, "until_ptr": until}
        assert launches._count_pairs({"queries": 256, "keys": 256, "HAS_UNTIL": True}, tensors) == area(mask)
        del lo, hi, until, tensors


def test_pairs_are_the_masks_area():
    mask = concatenate([with_spans(40, [(5, 20)]), hide_after(with_spans(30, [(8, 16)]), [(8, 16)]), causal(7)], 100)
    lo, hi, until = mask
    assert pairs(lo, hi, until, 100) == area(mask)
    plain = concatenate([causal(40), causal(50)], 100)
    assert pairs(plain[0], plain[1], None, 100) == area(plain)


def test_a_chain_keeps_what_its_backward_pass_reads(recorder):
    """And nothing of what tracing it makes: its weight is a part of a large buffer, as the engine's are."""
    x, weight = torch.zeros(256, 64, device="cuda"), torch.zeros(10**6, device="cuda")[:64].requires_grad_()
    held = recorder.ledger.total
    with counted_chains(recorder):
        y = torch.compile(lambda x, w: (x * w.expand(256, 64)).exp())(x, weight)
    chain = recorder.record.kinds["fused chain"]
    assert (chain.launches, chain.bytes) == (1, 4 * (2 * 256 * 64 + 64))
    assert recorder.ledger.total == held + y.nbytes
    assert recorder.ledger.peak.total == held + y.nbytes
