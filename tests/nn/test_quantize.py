"""Vector quantisation and finite scalar quantisation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vargen.errors import ConfigError, VargenError
from vargen.nn.quantize import FSQ, VectorQuantizer
from vargen.noise import Noise


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def latents(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_nearest_code_and_straight_through(l2_normalize):
    quantizer = VectorQuantizer(7, 4, l2_normalize=l2_normalize)
    with torch.no_grad():
        quantizer.codebook.copy_(latents(7, 4) * 3)
    z = latents(2, 3, 5, 4).requires_grad_()
    out = quantizer(z)
    compared = F.normalize(z, dim=-1) if l2_normalize else z
    codes = F.normalize(quantizer.codebook, dim=-1) if l2_normalize else quantizer.codebook
    assert out.indices.shape == (2, 3, 5)
    assert torch.equal(out.indices, torch.cdist(compared, codes).argmin(-1))
    torch.testing.assert_close(out.quantized, codes[out.indices])
    torch.testing.assert_close(out.quantized, quantizer.lookup(out.indices))
    assert torch.equal(quantizer.nearest(z), out.indices)
    weight = latents(2, 3, 5, 4)
    (gradient,) = torch.autograd.grad((out.quantized * weight).sum(), z, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad((compared * weight).sum(), z)[0])


def test_losses_pull_the_right_side():
    quantizer = VectorQuantizer(5, 3, codebook_weight=2.0, commitment_weight=0.5)
    z = latents(4, 6, 3).requires_grad_()
    out = quantizer(z)
    distance = (quantizer.codebook[out.indices] - z).square().mean()
    torch.testing.assert_close(out.losses["codebook"], 2 * distance)
    torch.testing.assert_close(out.losses["commitment"], 0.5 * distance)
    assert torch.autograd.grad(out.losses["codebook"], z, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(out.losses["commitment"], quantizer.codebook, allow_unused=True) == (None,)
    assert not VectorQuantizer(5, 3, codebook_weight=0, commitment_weight=0)(z).losses


def test_entropy_loss_prefers_sure_assignments_spread_over_the_codes():
    quantizer = VectorQuantizer(4, 4, entropy_weight=1.0, entropy_temperature=0.05)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.eye(4))
    spread = quantizer(torch.eye(4)[None]).losses["entropy"]
    collapsed = quantizer(torch.eye(4)[:1].expand(1, 4, 4)).losses["entropy"]
    unsure = quantizer(torch.full((1, 4, 4), 0.25)).losses["entropy"]
    assert spread < -1.3 < collapsed
    torch.testing.assert_close(collapsed, torch.zeros(()), atol=1e-3, rtol=0)
    torch.testing.assert_close(unsure, torch.zeros(()), atol=1e-3, rtol=0)


def test_usage_is_counted_over_the_last_indices():
    quantizer = VectorQuantizer(4, 2, usage_window=6)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    points = quantizer.codebook.detach()
    assert quantizer(points[None, [0, 0, 1]]).statistics["codebook_usage"] == 0.5
    assert quantizer(points[None, [2, 2, 2]]).statistics["dead_codes"] == 1
    assert quantizer.recent.tolist() == [0, 0, 1, 2, 2, 2]
    assert quantizer(points[None, [3, 3, 3, 3, 3, 3, 3]]).statistics["codebook_usage"] == 0.25
    perplexity = quantizer(points[None]).statistics["codebook_perplexity"]
    torch.testing.assert_close(perplexity, torch.tensor(4.0))
    quantizer.eval()
    before = quantizer.recent.clone()
    assert quantizer(points[None, [0]]).statistics["codebook_usage"] == 0.25
    assert torch.equal(quantizer.recent, before)


def test_samples_may_stay_between_the_levels():
    fsq = FSQ((8, 5))
    z = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    plain, mixed = fsq(z), fsq(z, torch.tensor([True, False, True]))
    assert torch.equal(plain.indices, mixed.indices)
    assert torch.equal(plain.quantized[1], mixed.quantized[1])
    torch.testing.assert_close(mixed.quantized[0], fsq.bound(z[0]) / torch.tensor([4, 2]))


def test_scalar_codes_are_counted_over_the_last_indices_too():
    fsq = FSQ((2, 2), usage_window=4)
    points = fsq.lookup(torch.arange(4)) * 20
    assert fsq(points[None, [0, 1]]).statistics["codebook_usage"] == 0.5
    assert fsq(points[None, [2]]).statistics["dead_codes"] == 1
    assert fsq.recent.tolist() == [-1, 0, 1, 2]
    assert fsq.eval()(points[None, [3]]).statistics["codebook_usage"] == 0.25
    assert fsq.recent.tolist() == [-1, 0, 1, 2]


def test_moving_averages_follow_the_latents():
    quantizer = VectorQuantizer(2, 2, ema_decay=0.5)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        quantizer.ema_sums.copy_(quantizer.codebook)
    z = torch.tensor([[[3.0, 1.0], [3.0, -1.0], [-2.0, 0.0]]]).requires_grad_()
    out = quantizer(z)
    assert "codebook" not in out.losses
    assert out.quantized.requires_grad
    assert not quantizer.codebook.requires_grad
    # counts (1+2)/2 and (1+1)/2; sums half old, half new
    torch.testing.assert_close(quantizer.codebook, torch.tensor([[3.5 / 1.5, 0.0], [-1.5, 0.0]]), rtol=1e-4, atol=1e-4)
    for _ in range(20):
        quantizer(z)
    torch.testing.assert_close(quantizer.codebook, torch.tensor([[3.0, 0.0], [-2.0, 0.0]]), rtol=1e-3, atol=1e-3)
    codes = quantizer.codebook.clone()
    quantizer.eval()(z)
    assert torch.equal(quantizer.codebook, codes)


def test_dead_codes_move_to_latents_of_the_batch():
    def run(seed):
        quantizer = VectorQuantizer(8, 2, revive_after=3)
        with torch.no_grad():
            quantizer.codebook.copy_(torch.cat([torch.tensor([[5.0, 5.0]]), torch.full((7, 2), 1000.0)]))
        z = latents(2, 9, 2) + 5
        used = [int(quantizer(z, Noise(seed, 2).at(step)).indices.unique().numel()) for step in range(8)]
        return quantizer, z, used

    quantizer, z, used = run(3)
    assert used[:3] == [1, 1, 1]
    assert used[3] > 2
    moved = quantizer.codebook.detach()[1:]
    assert (moved[:, None] == z.reshape(-1, 2)).all(-1).any(-1).all()
    assert torch.equal(run(3)[0].codebook, quantizer.codebook)
    assert not torch.equal(run(4)[0].codebook, quantizer.codebook)


def test_revival_leaves_gradients_valid():
    quantizer = VectorQuantizer(6, 2, revive_after=1, l2_normalize=True)
    for step in range(3):
        out = quantizer(latents(1, 3, 2), Noise(0, 1).at(step))
        sum(out.losses.values()).backward()
    assert torch.isfinite(quantizer.codebook.grad).all()


def test_clustering_moves_rare_codes_only():
    quantizer = VectorQuantizer(2, 2, clustering_decay=0.9)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [50.0, 50.0]]))
        quantizer.usage_average.copy_(torch.tensor([1.0, 0.0]))
    quantizer(torch.tensor([[[0.5, 0.5], [2.0, 2.0]]]))
    assert torch.equal(quantizer.codebook[0], torch.zeros(2))
    torch.testing.assert_close(quantizer.codebook[1], torch.tensor([2.0, 2.0]), rtol=0.05, atol=0)


def test_sampling_follows_the_softmax_of_cosines():
    quantizer = VectorQuantizer(3, 2, l2_normalize=True, sampling_temperature=0.5).eval()
    z = latents(1, 1, 2).expand(4000, 1, 2)
    cosines = F.normalize(z[0], dim=-1) @ quantizer.codes.T
    probs = torch.softmax(cosines / 0.5, -1)[0]
    torch.testing.assert_close(quantizer.probabilities(z)[0, 0], probs)
    drawn = quantizer(z, Noise(0, 4000)).indices
    torch.testing.assert_close(torch.bincount(drawn.flatten(), minlength=3) / 4000, probs.detach(), atol=0.03, rtol=0)
    assert torch.equal(quantizer(z, sample=False).indices, quantizer.nearest(z))
    with pytest.raises(VargenError, match="no sampling_temperature"):
        VectorQuantizer(3, 2).probabilities(z)


def test_low_precision_latents_are_searched_in_float32():
    quantizer = VectorQuantizer(64, 8, l2_normalize=True)
    z = latents(2, 50, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(z)
    assert torch.equal(out.indices, quantizer(z.float()).indices)
    assert out.quantized.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"codebook_size": 0}, "codebook of 0 codes"),
        ({"ema_decay": 1.0}, "ema_decay 1.0"),
        ({"clustering_decay": -0.1}, "clustering_decay"),
        ({"revive_after": 0}, "revive_after 0"),
    ],
)
def test_bad_configurations(arguments, match):
    with pytest.raises(ConfigError, match=match):
        VectorQuantizer(**{"codebook_size": 4, "dim": 2, **arguments})


def test_wrong_channels():
    for quantizer in (VectorQuantizer(4, 2), FSQ((3, 3))):
        with pytest.raises(VargenError, match="expected 2 channels in the last axis"):
            quantizer(torch.zeros(1, 3))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=5), st.sampled_from([("atanh", 1e-3), ("tan", -1e-3)]))
def test_fsq_indices_and_codes_are_inverse(levels, variant):
    fsq = FSQ(levels, shift=variant[0], margin=variant[1])
    indices = torch.arange(min(fsq.codebook_size, 500))
    codes = fsq.lookup(indices)
    assert codes.shape == (len(indices), len(levels))
    assert codes.abs().max() <= 1
    assert torch.equal(fsq.index(codes), indices)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=4), st.integers(0, 99))
def test_fsq_quantizes_to_codes_of_the_grid(levels, seed):
    fsq = FSQ(levels)
    z = 10 * torch.randn(20, len(levels), generator=torch.Generator().manual_seed(seed))
    out = fsq(z)
    assert 0 <= out.indices.min() <= out.indices.max() < fsq.codebook_size
    torch.testing.assert_close(fsq.lookup(out.indices), out.quantized)


def test_fsq_reaches_every_level():
    for shift, margin in (("atanh", 1e-3), ("tan", -1e-3)):
        fsq = FSQ((8, 5), shift=shift, margin=margin)
        z = torch.stack([torch.linspace(-9, 9, 999)] * 2, dim=-1)
        assert [column.unique().numel() for column in fsq(z).quantized.T] == [8, 5]


def test_fsq_is_straight_through_and_keeps_its_grid_in_half_precision():
    fsq = FSQ((8, 5)).to(torch.bfloat16)
    z = latents(1, 30, 2).requires_grad_()
    out = fsq(z)
    (gradient,) = torch.autograd.grad(out.quantized.sum(), z)
    (expected,) = torch.autograd.grad((fsq.bound(z) / torch.tensor([4, 2])).sum(), z)
    torch.testing.assert_close(gradient, expected)
    assert torch.equal(out.indices, FSQ((8, 5))(z).indices)
    assert torch.equal(out.indices, FSQ((8, 5))(z).indices)
    assert not fsq.state_dict()


def test_fsq_variants_differ_by_their_shift():
    """The two published formulas, evaluated by hand for eight levels at z = 0."""
    half = 7 * 1.001 / 2
    expected = half * torch.tanh(torch.atanh(torch.tensor(0.5 / half))) - 0.5
    torch.testing.assert_close(FSQ((8,)).bound(torch.zeros(1)), expected[None])
    half = 7 * 0.999 / 2
    expected = half * torch.tanh(torch.tan(torch.tensor(0.5 / half))) - 0.5
    torch.testing.assert_close(FSQ((8,), shift="tan", margin=-1e-3).bound(torch.zeros(1)), expected[None])


@pytest.mark.parametrize("arguments", [{"levels": ()}, {"levels": (1,)}, {"shift": "sin"}])
def test_fsq_bad_configurations(arguments):
    with pytest.raises(ConfigError, match="FSQ"):
        FSQ(**arguments)
