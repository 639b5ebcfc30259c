"""Our chains against the schedulers of diffusers, where those can express them."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from vargen.flow.diffusion import Diffusion, cosine_betas, ddim, ddpm
from vargen.flow.flow import euler, uniform_times

COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "clip_sample": False}


def network(channels):
    torch.manual_seed(0)
    weight = torch.randn(4, channels) * 0.3
    return lambda x, t: torch.tanh(x @ weight + t / 1000)


def test_betas_are_diffusers_squared_cosine():
    assert torch.allclose(DDPMScheduler(**COSINE).betas.double(), cosine_betas(), atol=1e-7)


@pytest.mark.parametrize("ours, theirs", [("small", "fixed_small"), ("large", "fixed_large"), ("learned", "learned_range")])
def test_ancestral_steps(ours, theirs):
    """Every step of the full chain, at the levels in between; at the first one there is no noise."""
    scheduler = DDPMScheduler(**COSINE, variance_type=theirs)
    chain, predict = Diffusion(cosine_betas(), variance=ours), network(8 if ours == "learned" else 4)
    for level in (0, 1, 2, 500, 900):
        x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(level))
        output = predict(x, level)
        expected = scheduler.step(output.transpose(1, 2), level, x.transpose(1, 2), generator=torch.Generator().manual_seed(7))
        prediction, values = chain.split(output)
        mean = chain.posterior_mean(chain.predicted_x0(prediction, x, level), x, level)
        # diffusers draws in the layout of its samples, channels first
        draws = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(7)).transpose(1, 2)
        std = (0.5 * chain.log_variance(values, level, x)).exp() if level else 0.0
        assert torch.allclose((mean + std * draws).transpose(1, 2), expected.prev_sample, rtol=1e-3, atol=1e-4), level


def test_deterministic_chain():
    scheduler, predict = DDIMScheduler(**COSINE), network(4)
    scheduler.set_timesteps(20)
    chain = Diffusion(cosine_betas(), variance="small").respaced("ddim20")
    assert chain.timesteps == scheduler.timesteps.tolist()[::-1]
    x = start = torch.randn(2, 3, 4)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(predict(x, t), t, x).prev_sample
    assert torch.allclose(ddim(chain, predict, start).tokens, x, rtol=1e-3, atol=1e-4)


def test_ancestral_chain_without_noise_ends_where_its_steps_do():
    scheduler, predict = DDPMScheduler(**COSINE, variance_type="fixed_small"), network(4)
    chain = Diffusion(cosine_betas(), variance="small").respaced("ddim25")
    scheduler.set_timesteps(25)
    x = start = torch.randn(2, 3, 4)
    for t in scheduler.timesteps.tolist():
        state = torch.Generator().manual_seed(t)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
        stepped = scheduler.step(predict(x, t), t, x, generator=state).prev_sample
        x = stepped - (scheduler._get_variance(t) ** 0.5 * noise if t else 0)
    still = ddpm(chain, predict, start, lambda level: torch.zeros_like(start), temperature=0.0)
    assert torch.allclose(still.tokens, x, rtol=1e-2, atol=1e-2)


def test_euler_steps_of_a_flow():
    scheduler, predict = FlowMatchEulerDiscreteScheduler(), network(4)
    times = uniform_times(7)
    scheduler.set_timesteps(sigmas=times[:-1])
    x = start = torch.randn(2, 3, 4)
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, float(t)), t, x).prev_sample
    assert torch.allclose(euler(lambda x, t: predict(x, 1000 * t), start, times).tokens, x, atol=1e-5)
