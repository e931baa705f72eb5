"""The DDPM schedule and the DDIM sampler against diffusers."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from megatron_mm.nn.diffusion import DDPMSchedule, guide

COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}


def test_schedule_is_the_cosine_of_diffusers():
    ours = DDPMSchedule(1000).alphas_cumprod
    assert ours.dtype == np.float64 and (np.diff(ours) < 0).all()
    np.testing.assert_allclose(ours, DDPMScheduler(**COSINE).alphas_cumprod.double().numpy(), rtol=3e-4, atol=1e-7)


def test_schedule_is_the_paper_s_formula_up_to_the_clip():
    t = np.arange(1, 1001) / 1000
    signal = lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
    np.testing.assert_allclose(DDPMSchedule(1000).alphas_cumprod[:-1], (signal(t) / signal(0.0))[:-1], rtol=1e-9)
    assert DDPMSchedule(1000).alphas_cumprod[-1] > 0


@pytest.mark.parametrize("t", [0, 1, 500, 998, 999])
def test_noising_is_that_of_diffusers(t):
    x0, noise = np.random.default_rng(t).standard_normal((2, 1, 3, 8, 8), dtype=np.float32)
    theirs = DDPMScheduler(**COSINE).add_noise(torch.from_numpy(x0), torch.from_numpy(noise), torch.tensor([t]))
    ours = DDPMSchedule(1000).add_noise(x0, noise, t)
    assert ours.dtype == np.float32
    # diffusers rounds 1 - abar in float32, which costs it digits of the smallest noise (6e-3 at t = 0)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 10, 250])
def test_sampling_is_ddim_of_diffusers(spacing, steps, clip):
    scheduler = DDIMScheduler(**COSINE, timestep_spacing=spacing, clip_sample=clip is not None)
    scheduler.set_timesteps(steps)
    schedule = DDPMSchedule(1000)
    timesteps = schedule.timesteps(steps, spacing)
    assert timesteps == scheduler.timesteps.tolist()

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
        eps = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        theirs = scheduler.step(eps, t, x, use_clipped_model_output=clip is not None).prev_sample
        x = schedule.step(x, eps, t, t_prev, clip)
        # diffusers keeps its schedule in float32: near t = 999 the signal is 5e-5 of x_t and its error is magnified
        torch.testing.assert_close(x, theirs, rtol=2e-3, atol=1e-4 * float(theirs.abs().max()))


def test_the_true_noise_leads_back_to_the_image():
    schedule = DDPMSchedule(1000)
    x0, noise = np.random.default_rng(0).standard_normal((2, 3, 4, 4), dtype=np.float32)
    x, eps = torch.from_numpy(schedule.add_noise(x0, noise, 980)), torch.from_numpy(noise)
    timesteps = schedule.timesteps(50)
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
        x = schedule.step(x, eps, t, t_prev)
    np.testing.assert_allclose(x.numpy(), x0, atol=1e-4)


def test_sampler_refuses_impossible_steps():
    with pytest.raises(ValueError, match="steps=1001"):
        DDPMSchedule(1000).timesteps(1001)
    with pytest.raises(ValueError, match="linspace"):
        DDPMSchedule(1000).timesteps(10, "linspace")


def test_guidance_extrapolates():
    conditional, unconditional = torch.tensor([2.0]), torch.tensor([1.0])
    assert [guide(conditional, unconditional, s).item() for s in (0, 1, 3)] == [1.0, 2.0, 4.0]
