"""A process group whose messages go nowhere: every collective of one rank, seen with its group and its bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.distributed as dist

BACKEND = "rehearsal"


@dataclass(frozen=True)
class Collective:
    """kind: NCCL's name of it. ranks: global ones, of the group; of a message this one and its peer. bytes: of the
    whole result (gathers), of the whole input (reductions), or of what this rank sends or receives."""

    kind: str
    group: str
    ranks: tuple[int, ...]
    bytes: int


Listener = Callable[[Collective, Sequence[torch.Tensor]], Callable[[], None]]
"""Told of a collective and its tensors when it is issued; returns what to call when something waits for it."""


class IssuedWork(dist.Work):
    """A collective that was issued; nothing happens when somebody waits for it, but it is seen."""

    def __init__(self, waited: Callable[[], None]):
        super().__init__()
        self._waited = waited

    def wait(self, timeout=None) -> bool:
        self._waited()
        return True

    def is_completed(self) -> bool:
        return True


class RehearsedGroup(dist.ProcessGroup):
    """One rank's place in a group of ranks that are not there. What it would receive is its own; of a peer, zeros."""

    def __init__(self, name: str, rank: int, size: int, ranks: Sequence[int], listener: Listener):
        super().__init__(rank, size)
        self._name, self._place, self._size, self._listener = name, rank, size, listener
        self._ranks = tuple(ranks) or tuple(range(size))
        self.label = "world"
        """Name of the dimension of the layout whose group it is."""

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._place

    def getBackendName(self) -> str:
        return BACKEND

    @property
    def group_name(self) -> str:
        return self._name

    def _issue(
        self, kind: str, whole: Sequence[torch.Tensor], others: Sequence[torch.Tensor] = (), peer: int | None = None
    ):
        size = sum(tensor.numel() * tensor.element_size() for tensor in whole)
        ranks = self._ranks if peer is None else (self._ranks[self._place], self._ranks[peer])
        return IssuedWork(self._listener(Collective(kind, self.label, ranks, size), [*whole, *others]))

    def allreduce(self, tensors, opts=None):
        return self._issue("all_reduce", tensors)

    allreduce_coalesced = allreduce

    def broadcast(self, tensors, opts=None):
        return self._issue("broadcast", tensors)

    def reduce(self, tensors, opts=None):
        return self._issue("reduce", tensors)

    def allgather(self, outputs, inputs, opts=None):
        for places, mine in zip(outputs, inputs, strict=True):
            for place in places:
                _fill(place, mine)
        return self._issue("all_gather", [place for places in outputs for place in places], inputs)

    def all_gather_single(self, output, mine, opts=None):
        for place in output.chunk(self._size):
            _fill(place, mine)
        return self._issue("all_gather", [output], [mine])

    def all_gather_single_coalesced(self, outputs, inputs, opts=None):
        return self._issue("all_gather", outputs, inputs)

    def reduce_scatter(self, outputs, inputs, opts=None):
        return self._issue("reduce_scatter", [part for parts in inputs for part in parts], outputs)

    def reduce_scatter_single(self, output, whole, opts=None):
        _fill(output, whole.chunk(self._size)[self._place])
        return self._issue("reduce_scatter", [whole], [output])

    def reduce_scatter_single_coalesced(self, outputs, inputs, opts=None):
        return self._issue("reduce_scatter", inputs, outputs)

    def all_to_all_single(self, output, mine, output_sizes, input_sizes, opts=None):
        return self._issue("all_to_all", [mine], [output])

    def alltoall(self, outputs, inputs, opts=None):
        return self._issue("all_to_all", inputs, outputs)

    def send(self, tensors, peer, tag=0):
        return self._issue("send", tensors, peer=peer)

    def recv(self, tensors, peer, tag=0):
        for tensor in tensors:
            if tensor.device.type == "cpu":
                tensor.detach().zero_()
        return self._issue("receive", tensors, peer=peer)

    def barrier(self, opts=None):
        return self._issue("barrier", [])

    # Names of torch before 2.13.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _fill(place: torch.Tensor, mine: torch.Tensor) -> None:
    """On the host somebody reads the numbers."""
    if place.device.type == "cpu":
        place.detach().view(-1).copy_(mine.detach().reshape(-1))


@contextlib.contextmanager
def groups_of_one_rank(listener: Listener) -> Iterator[None]:
    """Every process group that is made in here tells the listener what it is asked for, those for the host too."""
    new_group, init = dist.new_group, dist.init_process_group

    def create(options, _):
        ranks = options.global_ranks_in_group
        return RehearsedGroup(options.group_id, options.group_rank, options.group_size, ranks, listener)

    def make(*args, backend=None, pg_options=None, **kwargs):
        group = new_group(*args, backend=BACKEND, **kwargs)
        if group is not dist.GroupMember.NON_GROUP_MEMBER and (name := kwargs.get("group_desc")):
            group.label = name.lower().replace("_group", "")
        return group

    dist.Backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu", "cuda"])
    with (
        patch.object(dist, "new_group", make),
        patch.object(dist, "init_process_group", lambda backend, **kwargs: init(BACKEND, **kwargs)),
    ):
        yield
