"""Watches every operation of a rehearsal: launches, bytes, memory, synchronisations, and what must not be mixed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mm.rehearsal.clock import Clock
from megatron_mm.rehearsal.costs import Cost, of_operation
from megatron_mm.rehearsal.errors import RehearsalError, place
from megatron_mm.rehearsal.group import Collective
from megatron_mm.rehearsal.memory import BLOCK, Ledger
from megatron_mm.rehearsal.meta import META, CudaToMeta
from megatron_mm.rehearsal.record import AGAIN, BACKWARD, ENGINE, Record

_SCALARS = {"_local_scalar_dense", "is_nonzero", "equal"}
"""Operations that give the host a number."""
_SIZED = {"nonzero", "masked_select", "unique_consecutive", "_unique2", "unique_dim", "_unique", "repeat_interleave"}
"""Operations whose result has a size that the host has to learn."""
_SILENT = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_", "lift_fresh",
           "detach", "detach_", "alias", "_unsafe_view", "record_stream"}  # fmt: skip
"""Operations that launch nothing."""


class Recorder(TorchDispatchMode):
    """One rank's device: what its tensors hold, and a `record` of what is done to them.

    A GPU's allocator takes blocks (`memory.BLOCK`), a CPU's bytes, and what comes from the host is there already.
    """

    def __init__(self, pins: CudaToMeta, clock: Clock, gpu: bool = True):
        super().__init__()
        self.record, self.ledger, self.clock = Record(), Ledger(META, BLOCK if gpu else 1), clock
        self.part, self.direction = ENGINE, ""
        self._owner, self._before = ENGINE, 0
        self._pins, self._uploads = pins, gpu
        self._bodies: dict[str, Callable] = {}
        self._host: dict[int, tuple[torch.Tensor, weakref.ref]] = {}
        self._quiet = 0

    def restart(self) -> None:
        """Forgets what was counted; what lives stays."""
        self.record = Record()
        self.ledger.restart()
        self.clock.restart()
        self._before = self.ledger.total

    def enter(self, part: str, direction: str = "") -> None:
        """What follows belongs to a part of the model, in one pass."""
        sums = self.record.parts[self.part, self.direction]
        sums.passes += 1
        sums.kept += self.ledger.total - self._before
        sums.peak = max(sums.peak, self.ledger.high - self._before)
        self.part, self.direction = part, direction
        self._owner = f"{'layers' if part.startswith('layer ') else part}{f', {direction}' if direction else ''}"
        self._before = self.ledger.total
        self.ledger.mark()

    @property
    def recomputes(self) -> bool:
        """Whether a forward pass that begins now is a repetition."""
        return self.direction in (BACKWARD, AGAIN)

    def replace(self, bodies: dict[str, Callable]) -> None:
        """Operations by name ("library::name") whose CUDA implementation is to run in their place."""
        self._bodies |= bodies

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Operations inside are parts of a kernel that is recorded as a whole."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    @property
    def is_quiet(self) -> bool:
        return self._quiet > 0

    def host_copy(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The numbers of a tensor on the device, where they came from the host and nothing else wrote there."""
        found = self._host.get(tensor.untyped_storage()._cdata)
        if found is None:
            return None
        return found[0].view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def launch(self, cost: Cost, outs: Sequence[torch.Tensor] = ()) -> None:
        """A kernel (or several) with what it writes."""
        for tensor in outs:
            self.ledger.add(tensor, self._owner)
        seconds = self.clock.compute(cost)
        for sums in (self.record.parts[self.part, self.direction], self.record.kinds[cost.kind]):
            sums.launches += cost.launches
            sums.flops += cost.flops
            sums.bytes += cost.bytes
            sums.seconds += seconds
        self.record.operations[self.part, self.direction, cost.name] += cost.launches

    def collective(self, call: Collective, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        """A collective is issued; returns what waiting for it calls.

        Raises:
            RehearsalError: some of the tensors are the host's.
        """
        on_host = [tensor for tensor in tensors if tensor.device != META]
        if on_host and len(on_host) < len(tensors):
            raise RehearsalError(f"{call.kind} mixes tensors of the host with tensors of the device: {place()}.")
        if on_host:
            self._synchronised(f"{call.kind} of host tensors")
            return lambda: None
        traffic = self.record.collectives[call.group, call.kind]
        traffic.calls += 1
        traffic.bytes += call.bytes
        seconds, wait = self.clock.communicate(call)
        traffic.seconds += seconds

        def waited() -> None:
            self.record.parts[self.part, self.direction].waited += wait()

        return waited

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._quiet:
            return func(*args, **kwargs)
        name = func._schema.name
        if name in self._bodies:
            with self:
                return self._bodies[name](*args, **kwargs)
        name = name.removeprefix("aten::")
        tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        there = [tensor for tensor in tensors if tensor.device == META]
        if name in ("_to_copy", "copy_"):
            return self._copy(func, args, kwargs)
        if there and name in _SCALARS:
            return self._number(name, tensors[0])
        if there and self._has_unknown_size(name, args, kwargs):
            raise RehearsalError(f"{name} has a result whose size only the device knows: {place()}.")
        if there and any(tensor.device != META and tensor.dim() > 0 for tensor in tensors):
            raise RehearsalError(f"{name} mixes a tensor of the host with tensors of the device: {place()}.")
        out = func(*args, **kwargs)
        outs = [value for value in pytree.tree_leaves(out) if isinstance(value, torch.Tensor) and value.device == META]
        if name in _SILENT or func.is_view:
            for tensor in outs:
                self.ledger.add(tensor, self._owner)
        elif there or outs:
            for tensor in outs:  # what was written over is no copy of the host's numbers any more
                self._host.pop(tensor.untyped_storage()._cdata, None)
            self.launch(of_operation(func, args, kwargs, out, there, outs), outs)
        return out

    @staticmethod
    def _has_unknown_size(name: str, args: tuple, kwargs: dict) -> bool:
        """Whether only the device knows how much the result holds: of an index that is a mask, too. Filling in one
        number needs no size."""
        if name in _SIZED:
            return kwargs.get("output_size") is None
        if not name.startswith("index"):
            return False
        indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
        masks = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        return masks and not (name.startswith("index_put") and args[2].numel() == 1)

    def _copy(self, func, args: tuple, kwargs: dict) -> torch.Tensor:
        """`copy_` and `_to_copy`, within the device or across."""
        in_place = func._schema.name == "aten::copy_"
        source = args[1] if in_place else args[0]
        device = args[0].device if in_place else torch.device(kwargs.get("device") or source.device)
        if source.device == META and device != META:
            self._synchronised("copy to the host")
            target = args[0] if in_place else torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            host = self.host_copy(source)
            return target.fill_(1) if host is None else target.copy_(host)
        out = func(*args, **kwargs)
        if device != META:
            return out
        if source.device == META:
            self.launch(of_operation(func, args, kwargs, out, [source], [out]), [out])
            return out
        asynchronous = (args[2] if len(args) > 2 else False) if in_place else kwargs.get("non_blocking", False)
        if not asynchronous:
            self._synchronised("blocking copy from the host")
        elif not self._pins.is_pinned(source):
            self._synchronised("copy from pageable memory")
        if self._uploads:
            self.ledger.add(out, self._owner)
        if out.is_contiguous() and out.numel() * out.element_size() == out.untyped_storage().nbytes():
            self._remember(out, source)
        return out

    def _remember(self, tensor: torch.Tensor, host: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        values = host.detach().to(tensor.dtype, copy=True).contiguous()
        self._host[key] = values.flatten().view(torch.uint8), weakref.ref(storage, lambda _: self._host.pop(key, None))

    def _number(self, name: str, tensor: torch.Tensor) -> bool | int | float:
        """What the host reads, and waits for on a GPU: one, where nothing better is known."""
        self._synchronised("item" if name == "_local_scalar_dense" else name)
        host = self.host_copy(tensor)
        if name != "_local_scalar_dense":
            return True
        return torch.ones((), dtype=tensor.dtype).item() if host is None else host.reshape(()).item()

    def _synchronised(self, what: str) -> None:
        self.record.syncs[self.part, what, place()] += 1
