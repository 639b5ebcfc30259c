import pytest
import torch

from vargen.errors import ConfigError
from vargen.losses.discriminators import make_discriminator


def test_logits_are_a_map_of_the_grid_whatever_the_size():
    discriminator = make_discriminator("blurgan", width=32, num_stages=2, grid=4)
    for size in (16, 24):
        logits = discriminator(torch.zeros(2, 3, size, size))
        assert logits.shape == (2, 1, 4, 4)
    with pytest.raises(ConfigError, match="multiple of the 32 groups"):
        make_discriminator("blurgan", width=20)


def test_published_size():
    with torch.device("meta"):
        discriminator = make_discriminator("blurgan")
    convolutions = 5 * 5 * 3 * 128 + 9 * (128 * 128 + 128 * 256 + 256 * 512) + 512 * 512 + 25 * 512
    biases_and_norms = 128 + 3 * (128 + 256 + 512) + 512 + 1
    assert sum(p.numel() for p in discriminator.parameters()) == convolutions + biases_and_norms
