"""A tree of tensors goes to a device in one copy, whatever is in it."""

from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mm.parallel.staging import Staged
from megatron_mm.rehearsal.meta import in_place_of_cuda

CPU, META = torch.device("cpu"), torch.device("meta")


@dataclass(frozen=True)
class Leaf:
    values: torch.Tensor
    name: str


def tree():
    shared = torch.arange(7, dtype=torch.int32)
    leaf = Leaf(torch.randn(3, 5).t(), "transposed")
    return {"a": (leaf, shared, None), "b": shared, 3: torch.zeros(0, 4, dtype=torch.int64), "c": torch.tensor([True])}


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_values_shapes_and_what_is_no_tensor_stay():
    given = tree()
    there = Staged.of(given, CPU).to(CPU)
    (leaf, shared, nothing), expected = there["a"], given["a"][0]
    assert torch.equal(leaf.values, expected.values) and leaf.values.is_contiguous() and leaf.name == "transposed"
    assert nothing is None and shared.data_ptr() == there["b"].data_ptr(), "a tensor that is there twice is copied once"
    for key in ("b", 3, "c"):
        assert torch.equal(there[key], given[key]) and there[key].dtype == given[key].dtype
        assert there[key].data_ptr() % 16 == 0


def test_one_copy():
    with in_place_of_cuda():
        staged = Staged.of(tree(), META)
    with Operations() as operations:
        there = staged.to(META)
    views = {"slice", "view", "detach"}
    assert [name for name in operations.names if name not in views] == ["_to_copy"]
    assert there["a"][0].values.shape == (5, 3) and there["b"].device == META
