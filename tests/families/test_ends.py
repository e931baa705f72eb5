"""What the two ends of every family read, where it is, and in which precision."""

import functools
from dataclasses import replace

import pytest
import torch
from documents import label_counts, shape_like
from plain_ops import PlainOps, with_further
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_mm.benchmark.synthetic import synthetic_steps
from megatron_mm.config.compose import compose
from megatron_mm.documents.builder import Builder
from megatron_mm.families.registry import FAMILIES, build_family
from megatron_mm.parallel.context.shard import whole
from megatron_mm.parallel.staging import Staged
from megatron_mm.rehearsal.meta import in_place_of_cuda
from megatron_mm.types import BACK, FRONT

MODELS = {family: (f"model={family}_tiny",) for family in FAMILIES}
MODELS["transfusion_unet"] = ("model=transfusion_tiny", "model.patch_codec=unet", "model.unet_channels=8")
META = torch.device("meta")


@functools.cache
def drawn(name):
    """A family, and a batch with labels of every loss term and, where an encoder reads images, one of these."""
    options = ["run.name=test", "data.path=none", "data.seq_length=512"]
    config = compose([*MODELS[name], *options, "train.micro_batch_size=4", "train.global_batch_size=4"])
    family = build_family(config.model, 100)
    encodes = Builder(family).encoded_images(shape_like(family, "titi")) > 0
    batches = [batch for (batch,) in synthetic_steps(config, family, 100, 4)]
    return family, next(
        b
        for b in batches
        if all(n for term, n in label_counts(family, b).items() if term != "chat") and bool(b.grids) == encodes
    )


@pytest.fixture(params=MODELS)
def model(request):
    """(family, front, back, batch), with random weights in fp32."""
    family, batch = drawn(request.param)
    torch.manual_seed(0)
    front, back = family.build_front(PlainOps()), family.build_back(PlainOps())
    for parameter in [*front.parameters(), *back.parameters()]:
        parameter.data.normal_(std=0.1)
    return family, front, back, batch


def ends_of(family, batch, dtype):
    shard = whole(batch).of_stage(True, True, family.fields, dtype)
    return shard.front, shard.back


class Reads(dict):
    """Fields that note their readers."""

    def __init__(self, fields):
        super().__init__(fields)
        self.seen = set()

    def __getitem__(self, name):
        self.seen.add(name)
        return super().__getitem__(name)


def test_ends_read_the_fields_that_are_declared(model):
    family, front, back, batch = model
    for end, part in ((FRONT, front), (BACK, back)):
        given = ends_of(family, batch, torch.float32)[end == BACK]
        given = replace(given, fields=Reads(given.fields))
        if end == FRONT:
            part(given)
        else:
            part(with_further(part, torch.zeros(*batch.tokens.shape, family.trunk.hidden_size), given), given)
        assert given.fields.seen == {name for name, spec in family.fields.items() if end in spec.readers}
        assert set(given.fields) == given.fields.seen


class DeviceAlone(TorchDispatchMode):
    """Refuses every operation that has to do with a tensor on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            assert not isinstance(tensor, torch.Tensor) or tensor.device == META, f"{func} reads or makes a host tensor"
        return out


def test_ends_never_wait_for_the_host(model):
    """On torch's meta device, where whatever needs a value on the host raises."""
    family, front, back, batch = model
    with in_place_of_cuda():
        given_front, given_back = Staged.of(ends_of(family, batch, torch.float32), META).to(META)
    front, back = front.to(META), back.to(META)
    with DeviceAlone():
        sum(back(with_further(back, front(given_front), given_back), given_back).values()).backward()
    for parameter in [*front.parameters(), *back.parameters()]:
        assert parameter.grad is not None or not parameter.requires_grad


def test_what_losses_compare_with_is_not_rounded(model):
    family, _, _, batch = model
    precise, rounded = (ends_of(family, batch, dtype) for dtype in (torch.float32, torch.bfloat16))
    for name, values in rounded[1].fields.items():
        assert torch.equal(values, precise[1].fields[name]) and torch.equal(values, batch.fields[name])
    for name, values in rounded[0].fields.items():
        assert values.dtype == (torch.bfloat16 if batch.fields[name].is_floating_point() else batch.fields[name].dtype)


def test_losses_in_bf16_are_those_of_their_outputs(model):
    """Against fp64 from the back's own bf16 predictions and the batch as it was laid out."""
    family, front, back, batch = model
    front, back = front.bfloat16(), back.bfloat16()
    given_front, given_back = ends_of(family, batch, torch.bfloat16)
    with torch.no_grad():
        hidden = with_further(back, front(given_front), given_back)
        sums = back(hidden, given_back)
        if family.name == "mmada":
            loss = back.head.cross_entropy(hidden, batch.fields["labels"])[0].double() * batch.fields["weight"].double()
            for number, term in enumerate(family.terms):
                assert sums[term.name].item() == pytest.approx(
                    loss[batch.fields["term"] == number].sum().item(), rel=1e-6
                )
        elif "image" in sums and family.name != "janus":
            diffusion = family.name == "transfusion"
            predicted = back.predict_noise(hidden, given_back) if diffusion else back.velocity(hidden)
            target, time = (
                batch.fields[name] for name in (("noise", "timestep") if diffusion else ("velocity", "time"))
            )
            error = (predicted.double() - target.double()).square().mean(-1)
            noised = (time >= 0) & (diffusion | (time < 1_000_000))
            assert predicted.dtype == torch.bfloat16
            assert sums["image"].item() == pytest.approx(error[noised].sum().item(), rel=1e-6)
