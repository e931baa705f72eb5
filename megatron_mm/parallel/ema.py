"""An exponential moving average of the weights that train, held where the optimizer holds its states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.optimizer import ChainedOptimizer


class WeightAverage:
    """average <- decay * average + (1 - decay) * weight, after every step that changes weights.

    The weights are the optimizer's own, in fp32 (or wider), of which a rank of the distributed optimizer has its share;
    the average is cut alike and needs no message.
    """

    def __init__(self, optimizer: ChainedOptimizer, decay: float):
        self._parts = [part.optimizer for part in optimizer.chained_optimizers if part.optimizer is not None]
        self._decay = decay
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Begins anew with the weights as they are."""
        self._averages = {weight: weight.detach().clone() for weight in self._weights()}

    @torch.no_grad()
    def update(self) -> None:
        """A step has been taken."""
        if self._averages:
            averages = list(self._averages.values())
            torch._foreach_lerp_(averages, [weight.detach() for weight in self._averages], 1 - self._decay)

    @contextmanager
    def as_first_moments(self) -> Iterator[None]:
        """The averages stand where the optimizer has its first moments, so that whatever saves these saves them. What
        stands there at the end becomes the averages."""
        moments = {weight: self._state(weight)["exp_avg"] for weight in self._averages}
        for weight, average in self._averages.items():
            self._state(weight)["exp_avg"] = average
        try:
            yield
        finally:
            for weight, moment in moments.items():
                self._averages[weight] = self._state(weight)["exp_avg"]
                self._state(weight)["exp_avg"] = moment

    def _weights(self) -> Iterator[torch.Tensor]:
        for part in self._parts:
            for group in part.param_groups:
                yield from group["params"]

    def _state(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = next(part.state[weight] for part in self._parts if weight in part.state)
        return state
