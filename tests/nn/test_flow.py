"""Flow matching's times and steps against diffusers."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from megatron_mm.data.corrupt import Streams
from megatron_mm.nn.flow import UNIT, FlowTimes, interpolate


@pytest.mark.parametrize("positions", [64, 256, 1024, 4096])
def test_times_are_shifted_as_diffusers_does(positions):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = calculate_shift(positions, 256, 4096, 0.5, 1.15)
    noise = np.linspace(0.001, 0.999, 50)
    theirs = 1 - scheduler.time_shift(mu, 1.0, noise)
    ours = [FlowTimes(positions, True).shift(1 - share) for share in noise]
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_ends_stay_and_nothing_moves_unshifted():
    shifted, plain = FlowTimes(1024, True), FlowTimes(1024, False)
    assert shifted.shift(0.0) == 0.0 and shifted.shift(1.0) == 1.0
    assert shifted.shift(0.5) < 0.4 and plain.shift(0.3) == 0.3


def test_sampling_walks_diffusers_sigmas():
    steps, positions = 10, 1024
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = calculate_shift(positions, 256, 4096, 0.5, 1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    ours = np.array(FlowTimes(positions, True).sampling(steps)) / UNIT
    np.testing.assert_allclose(1 - ours, scheduler.sigmas.numpy(), atol=1e-6)
    # and an Euler step along our velocity, data minus noise, is theirs along noise minus data
    x, velocity = torch.randn(3, 4), torch.randn(3, 4)
    theirs = scheduler.step(-velocity, scheduler.timesteps[0], x).prev_sample
    torch.testing.assert_close(x + float(ours[1] - ours[0]) * velocity, theirs, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="steps=0 must be 1 or more"):
        FlowTimes(positions, True).sampling(0)


def test_times_are_logit_normal():
    times = FlowTimes(256, False)
    drawn = np.array([times.draw(Streams(0, uid, 0).generator("time")) for uid in range(4000)]) / UNIT
    logits = np.log(drawn / (1 - drawn))
    assert abs(logits.mean()) < 0.06 and logits.std() == pytest.approx(1.0, abs=0.05)


def test_paths_are_straight_and_end_in_the_data():
    rng = np.random.default_rng(0)
    x1, x0 = rng.standard_normal((2, 1, 4, 4)).astype(np.float32)
    np.testing.assert_array_equal(interpolate(x1, x0, UNIT), x1)
    np.testing.assert_array_equal(interpolate(x1, x0, 0), x0)
    np.testing.assert_allclose(interpolate(x1, x0, UNIT // 4), x0 + 0.25 * (x1 - x0), rtol=1e-5)
