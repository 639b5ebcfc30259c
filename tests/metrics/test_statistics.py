"""Fréchet distance, precision and recall, KID, Inception Score, PSNR and SSIM: laws and known values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vargen.errors import VargenError
from vargen.metrics.frames import clip_psnr, frame_scores, psnr, ssim
from vargen.metrics.frechet import FeatureStatistics, frechet_distance, frechet_from_features
from vargen.metrics.inception_score import inception_score
from vargen.metrics.kid import draw_subsets, kernel_distance, polynomial_mmd
from vargen.metrics.manifold import manifold_scores, squared_radii


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(1, 6))
def test_streams_merge_exactly(sizes, dim):
    data = 100 + _normal(sum(sizes), dim)
    stream = FeatureStatistics.empty(dim)
    for part in data.split(sizes):
        stream.update(part)
    whole = FeatureStatistics.of(data)
    assert stream.count == whole.count
    assert torch.allclose(stream.mean, whole.mean)
    assert torch.allclose(stream.scatter, whole.scatter, atol=1e-8)
    if len(data) > 1:
        assert torch.allclose(stream.covariance().view(dim, dim), torch.cov(data.T).view(dim, dim), atol=1e-10)


def test_frechet_of_gaussians_in_closed_form():
    a, b = torch.tensor([1.0, 4.0]), torch.tensor([9.0, 16.0])
    distance = frechet_distance(torch.zeros(2), torch.diag(a), torch.tensor([3.0, 4.0]), torch.diag(b))
    assert distance == pytest.approx(25 + (3 - 1) ** 2 + (4 - 2) ** 2)


def test_frechet_is_a_symmetric_distance_even_when_singular():
    x, y = _normal(10, 30), 2 * _normal(12, 30, seed=1)
    assert frechet_from_features(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_from_features(x, y) == pytest.approx(frechet_from_features(y, x), rel=1e-7)
    rotation = torch.linalg.qr(_normal(30, 30, seed=2)).Q
    assert frechet_from_features(x @ rotation, y @ rotation) == pytest.approx(frechet_from_features(x, y), rel=1e-6)


def test_biased_covariance_differs_by_its_factor():
    statistics = FeatureStatistics.of(_normal(8, 3))
    assert torch.allclose(statistics.covariance(unbiased=False) * 8 / 7, statistics.covariance())


def test_frechet_refuses_what_it_cannot_measure():
    with pytest.raises(VargenError, match="NaN"):
        frechet_from_features(torch.full((4, 2), float("nan")), torch.zeros(4, 2))
    with pytest.raises(VargenError, match="same features"):
        frechet_from_features(_normal(4, 2), _normal(4, 3))
    with pytest.raises(VargenError, match="at least 2"):
        frechet_from_features(_normal(1, 2), _normal(4, 2))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 50))
def test_blocks_do_not_change_precision_and_recall(block):
    real, fake = _normal(40, 4), _normal(30, 4, seed=1)
    whole, blocked = manifold_scores(real, fake), manifold_scores(real, fake, block=block)
    assert (whole.precision, whole.recall) == (blocked.precision, blocked.recall)
    assert torch.allclose(whole.realism, blocked.realism)


def test_precision_and_recall_mean_what_they_say():
    real = torch.cat([_normal(50, 2), 100 + _normal(50, 2, seed=1)])
    half = _normal(60, 2, seed=2)
    scores = manifold_scores(real, half)
    assert scores.precision > 0.85
    assert 0.3 < scores.recall <= 0.5
    assert manifold_scores(real, half + 1000).precision == 0
    assert manifold_scores(real, real).precision == 1
    line = torch.arange(5.0)[:, None]
    assert squared_radii(line, k=1).tolist() == [1, 1, 1, 1, 1]
    with pytest.raises(VargenError, match="more samples than neighbours"):
        manifold_scores(real[:3], half)


def test_kid_is_unbiased_and_sees_a_shift():
    values = [polynomial_mmd(_normal(40, 8, seed=s), _normal(40, 8, seed=100 + s)) for s in range(60)]
    assert abs(sum(values) / 60) < 3 * torch.tensor(values).std() / math.sqrt(60)
    mean, std = kernel_distance(_normal(50, 8), 1 + _normal(60, 8, seed=1), draw_subsets(50, 60, 5, 20))
    assert mean > 3 * std > 0
    assert draw_subsets(50, 60, 5, 20).shape == (5, 2, 20)
    assert torch.equal(draw_subsets(50, 60, 5, 1000)[0, 0].sort().values, torch.arange(50))


def test_inception_score_bounds_and_order():
    confident = 50 * torch.eye(10, dtype=torch.float64).repeat(20, 1)
    assert inception_score(confident, splits=2)[0] == pytest.approx(10, rel=1e-6)
    assert inception_score(torch.zeros(20, 10), splits=2) == pytest.approx((1, 0))
    by_class = confident[confident.argmax(1).argsort(stable=True)]
    assert inception_score(by_class, split_size=20)[0] == pytest.approx(1)
    with pytest.raises(VargenError, match="at least one sample in each"):
        inception_score(torch.zeros(3, 5), splits=10)


def test_psnr_and_ssim():
    images = _normal(2, 3, 16, 20).clamp(-1, 1)
    assert psnr(images, images).tolist() == [100, 100]
    assert ssim(images, images).tolist() == pytest.approx([1, 1])
    assert psnr(torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 0.2)).item() == pytest.approx(20)
    clips = torch.stack([torch.zeros(3, 2, 8, 8), torch.full((3, 2, 8, 8), 0.2)])
    assert clip_psnr(clips, torch.zeros_like(clips)).tolist() == [math.inf, pytest.approx(20)]
    scores = frame_scores(images, -images)
    assert scores["psnr"] < 20
    assert scores["ssim"] < 0.5
    with pytest.raises(VargenError, match="at least 11"):
        ssim(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8))
    with pytest.raises(VargenError, match="same shape"):
        psnr(torch.zeros(3, 8, 8), torch.zeros(3, 8, 9))
