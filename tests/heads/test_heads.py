"""Heads: networks that start closed, losses by position, guided sampling, any net with any process."""

import pytest
import torch

from vargen.errors import ConfigError
from vargen.guidance import Guidance
from vargen.heads.diffusion import DiffusionHead
from vargen.heads.dit import TokenDiT
from vargen.heads.flow import FlowHead
from vargen.heads.make import token_head
from vargen.heads.mlp import TokenMLP
from vargen.noise import Noise


def opened(head):
    """The head with weights drawn everywhere, since fresh ones return zeros."""
    torch.manual_seed(0)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return head.eval()


def make(kind):
    if kind == "dit":
        return DiffusionHead(TokenDiT(3, 8, 16, 2, 2, (2, 4)), variance="large", spacing="ddim4")
    if kind == "gated":
        return FlowHead(TokenMLP(3, 8, 16, 2, time_scale=1000.0, gated_hidden=24), steps=4, sampler="sde")
    return token_head(kind, 3, 8, 16, 2, "4" if kind == "diffusion" else 4)


KINDS = ["diffusion", "flow", "gated", "dit"]


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_networks_predict_zero(kind):
    net = make(kind).net
    assert (net(torch.randn(2, 8, 3), torch.tensor(5), torch.randn(2, 8, 8)) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_guided_sampling_is_the_combination_at_the_first_rows_state(kind):
    head = opened(make(kind))
    z, start = torch.randn(4, 8, 8), torch.randn(2, 8, 3)
    steps = torch.randn(4, 2, 8, 3).__getitem__

    def sample(z, **options):
        return head.sample(z, start, steps, **options).tokens

    alone = sample(z[:2])
    assert torch.allclose(sample(z, combine=lambda rows: Guidance(2.0).combine(rows, 1.0)), alone, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(sample(z, combine=lambda rows: Guidance(2.0).combine(rows, 2.0)), alone, rtol=1e-2)
    assert not torch.equal(sample(z[:2], steps=3), alone)
    if kind != "dit":
        parts = [head.sample(z[:2, i : i + 1], start[:, i : i + 1], lambda j, i=i: steps(j)[:, i : i + 1]).tokens for i in range(8)]
        assert torch.allclose(torch.cat(parts, dim=1), alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_losses_belong_to_positions(kind):
    head, noise = opened(make(kind)), Noise(1, 2)
    x, z = torch.randn(2, 1, 5, 3), torch.randn(2, 1, 5, 8)
    places, copies = torch.arange(5).expand(2, 5), torch.arange(3)
    loss = head.loss(x, z, noise, (places.unsqueeze(1), copies[None, :, None]))
    assert loss.shape == (2, 3, 5)
    assert loss.isfinite().all()
    some = head.loss(x[:, :, 2:4], z[:, :, 2:4], noise, (places[:, 2:4].unsqueeze(1), copies[None, :, None]))
    assert torch.allclose(some, loss[:, :, 2:4], rtol=1e-4)


def test_temperature_zero_removes_the_noise_of_steps():
    for kind in ("diffusion", "gated"):
        head = opened(make(kind))
        z, start = torch.randn(2, 8), torch.randn(2, 3)
        draws = [head.sample(z, start, lambda j: torch.randn(2, 3), temperature=0.0).tokens for _ in range(2)]
        assert torch.equal(*draws)


def test_unknown_kinds_are_refused():
    with pytest.raises(ConfigError, match="head 'difusion'; did you mean 'diffusion'"):
        token_head("difusion", 3, 8, 16, 2, 4)
    with pytest.raises(ConfigError, match="sampler"):
        FlowHead(TokenMLP(3, 8, 16, 2), sampler="heun")
