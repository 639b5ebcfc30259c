import math

import torch

from vargen.nn.cache import KVCache
from vargen.nn.gaussian import DiagonalGaussian
from vargen.nn.vit import Transformer, key_mask


def test_masked_keys_change_nothing():
    trunk = Transformer(2, 16, 2, pre_norm=True, final_norm=True)
    x, text = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    first = trunk(torch.cat([x, text], 1), mask=key_mask(5, valid, batch_size=2))
    text = text.masked_fill(~valid[..., None], 7.0)
    second = trunk(torch.cat([x, text], 1), mask=key_mask(5, valid, batch_size=2))
    assert torch.equal(first[:, :5], second[:, :5])


def test_cached_steps_equal_the_full_causal_pass():
    trunk = Transformer(2, 16, 2, final_norm=True, gated=True)
    x = torch.randn(2, 6, 16)
    cache = KVCache(2, 2, 2, 6, 8)
    steps = torch.cat([trunk(x[:, :2], causal=True, cache=cache)] + [trunk(x[:, i : i + 1], cache=cache) for i in range(2, 6)], 1)
    assert cache.length == 6
    assert torch.allclose(steps, trunk(x, causal=True), atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    trunk = Transformer(2, 16, 2)
    x = torch.randn(1, 4, 16)
    trunk(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in trunk.named_parameters()}
    trunk.zero_grad()
    trunk.gradient_checkpointing = True
    trunk(x).square().sum().backward()
    for name, p in trunk.named_parameters():
        assert torch.allclose(p.grad, expected[name], atol=1e-6)


def test_gaussian_clamps_samples_and_has_its_divergence():
    moments = torch.tensor([[1.0, 0.0, 100.0, -100.0]])
    posterior = DiagonalGaussian.from_moments(moments)
    assert posterior.logvar.tolist() == [[20.0, -30.0]]
    assert torch.equal(posterior.sample(torch.zeros(1, 2)), posterior.mean)
    standard = DiagonalGaussian(torch.zeros(3), torch.zeros(3))
    assert standard.kl().abs().max() == 0
    shifted = DiagonalGaussian(torch.full((1,), 2.0), torch.full((1,), math.log(3.0)))
    reference = torch.distributions.kl_divergence(torch.distributions.Normal(2.0, 3.0**0.5), torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(shifted.kl(), reference)
