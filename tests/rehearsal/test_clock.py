"""Communication beside kernels, and between them."""

import pytest

from megatron_mm.rehearsal.clock import Clock, Rates
from megatron_mm.rehearsal.costs import Cost
from megatron_mm.rehearsal.group import Collective

RATES = Rates(latency_microseconds=0.0)
GIGABYTE = 10**9


def _gather(group: str = "data", ranks: tuple[int, ...] = (0, 8)) -> Collective:
    return Collective("all_gather", group, ranks, GIGABYTE)


def test_a_kernel_takes_the_longer_of_its_products_and_its_bytes():
    clock = Clock(RATES)
    assert clock.compute(Cost("mm", "product", 600 * 10**12, 1)) == pytest.approx(1.0)
    assert clock.compute(Cost("add", "elementwise", 0, 2800 * GIGABYTE)) == pytest.approx(1.0)
    assert clock.compute(Cost("add", "elementwise", 0, 4)) == pytest.approx(2e-6)
    assert clock.compute(Cost("forward_kernel", "attention", 400 * 10**12, 1)) == pytest.approx(1.0)


def test_half_of_a_gather_over_two_ranks_crosses_the_network():
    seconds, wait = Clock(RATES).communicate(_gather())
    assert seconds == pytest.approx(0.5 / 40) and wait() == pytest.approx(seconds)


def test_a_node_is_faster_and_shares_its_ports():
    clock = Clock(RATES)
    near, _ = clock.communicate(_gather("a", (0, 1)))
    assert near == pytest.approx(0.5 / 360)
    together, _ = clock.communicate(_gather("b", tuple(range(16))))
    assert together == pytest.approx(15 / 16 / 320)


def test_what_is_waited_for_late_costs_nothing():
    clock = Clock(RATES)
    seconds, wait = clock.communicate(_gather())
    clock.compute(Cost("add", "elementwise", 0, int(2800 * GIGABYTE * seconds / 2)))
    assert wait() == pytest.approx(seconds / 2)
    _, wait = clock.communicate(_gather())
    clock.compute(Cost("add", "elementwise", 0, 28 * 10**12))
    assert wait() == 0.0


def test_collectives_of_a_group_queue():
    clock = Clock(RATES)
    seconds, first = clock.communicate(_gather())
    _, second = clock.communicate(_gather())
    assert second() == pytest.approx(2 * seconds) and first() == 0.0


def test_messages_go_both_ways_at_once():
    clock = Clock(RATES)
    waits = [clock.communicate(Collective(kind, "pipeline", (0, 8), GIGABYTE))[1] for kind in ("send", "receive")]
    assert sum(wait() for wait in waits) == pytest.approx(1 / 40)
