import pytest
import torch
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from vargen.errors import CheckpointError, ConfigError
from vargen.losses.convnext import ConvNeXtDistance, MeanDistance, load_convnext
from vargen.losses.perceptual import FeatureDistance, make_perceptual


def tiny():
    torch.manual_seed(0)
    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], stochastic_depth_prob=0.5, num_classes=6)


def pictures():
    return torch.rand(2, 3, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_distance_is_that_of_the_logits_and_the_network_is_frozen():
    distance = ConvNeXtDistance(tiny(), image_size=32).train()
    x, y = pictures()
    y.requires_grad_()
    found = distance(x, y)
    assert found.shape == (3,)
    assert torch.equal(found, distance(x, y))
    assert torch.equal(distance(x, x), torch.zeros(3))
    found.sum().backward()
    assert y.grad.abs().sum() > 0
    assert all(p.grad is None for p in distance.parameters())


def test_mean_of_distances_divides_by_the_weights():
    class Constant(FeatureDistance):
        def __init__(self, value):
            super().__init__(torch.nn.Identity())
            self.value = value

        def forward(self, x, y):
            return torch.full((len(x),), self.value)

    mean = MeanDistance([Constant(1.0), Constant(12.0)], [1.0, 0.1])
    assert torch.allclose(mean(*pictures()), torch.full((3,), (1.0 + 0.1 * 12.0) / 1.1))


def test_missing_weights_and_unknown_parts(tmp_path):
    with pytest.raises(CheckpointError, match="convnext_small-0c510722.pth"):
        load_convnext(tmp_path)
    with pytest.raises(CheckpointError, match="do not exist"):
        make_perceptual({"convnext": {"source": str(tmp_path / "absent.pth")}})
    with pytest.raises(ConfigError, match="did you mean 'convnext'"):
        make_perceptual({"convnet": {"source": "cache"}})
    with pytest.raises(ConfigError, match="give source"):
        make_perceptual({"lpips": {"weight": 1.0}})
