"""Two parts of attention, merged, are attention over both; one kernel does what plain torch does."""

import pytest
import torch
from devices import KERNEL_DEVICE as DEVICE
from devices import ON_KERNEL_DEVICE
from mm_kernels.span_attention import merge_fused
from mm_kernels.span_attention.merge import merge_, merge_reference_

pytestmark = ON_KERNEL_DEVICE
B, S, H, D = 2, 37, 3, 24
NOTHING = float("-inf")


def parts(seed: int, dtype: torch.dtype, out_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of views with gaps; some queries without a key."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(S + 5, B, H, D, generator=generator).to(DEVICE, out_dtype)[5:].transpose(0, 1)
    lse = 3 * torch.randn(B, H, S + 5, generator=generator).to(DEVICE, dtype)[..., 5:]
    nothing = torch.rand(B, H, S, generator=generator).to(DEVICE) < 0.3
    lse.masked_fill_(nothing, NOTHING)
    out.masked_fill_(nothing.transpose(1, 2)[..., None], 0.0)
    return out, lse


def test_parts_make_a_whole():
    """Over all keys at once, in fp64."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(B, H, S, 40, generator=generator, dtype=torch.float64)
    values = torch.randn(B, H, 40, D, generator=generator, dtype=torch.float64)
    scores[..., :7, :15] = NOTHING
    scores[..., 3:9, 15:] = NOTHING  # queries 3 to 6 see nothing at all

    def attend(keys):
        lse = scores[..., keys].logsumexp(-1)
        return (scores[..., keys].softmax(-1).nan_to_num() @ values[..., keys, :]).transpose(1, 2), lse

    out, lse = attend(slice(15))
    merge_(out, lse, *attend(slice(15, None)))
    torch.testing.assert_close((out, lse), attend(slice(None)), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel(dtype):
    out, lse = parts(0, torch.float32, torch.float32)
    new = parts(1, torch.float32, dtype)
    expected_out, expected_lse = out.clone(), lse.clone()
    merge_reference_(expected_out, expected_lse, *new)
    merge_fused.merge_(out, lse, *new)
    assert (lse == NOTHING).any() and out.isfinite().all()
    torch.testing.assert_close((out, lse), (expected_out, expected_lse), rtol=1e-6, atol=1e-6)
