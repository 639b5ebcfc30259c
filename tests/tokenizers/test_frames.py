from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_pipelines import tiny_tokenizer
from vargen import FrameTokenizer, KLTokenizer, LARPTokenizer, TiTok, TokenSpace
from vargen.errors import ConfigError, SpaceError, VargenError
from vargen.noise import Noise


def tokenizer(frames: int = 3) -> FrameTokenizer:
    return FrameTokenizer.of(tiny_tokenizer(), frames)


def clips(count: int = 2, frames: int = 3) -> torch.Tensor:
    return Noise(0, count).uniform("clip", (3, frames, 16, 16)) * 2 - 1


def test_space_has_a_time_axis() -> None:
    assert tokenizer().space == TokenSpace(((3, 4, 4),), codebook_size=32)
    assert tokenizer().sample_shape == (3, 16, 16)


def test_every_frame_goes_through_the_base_alone() -> None:
    base, frames = tiny_tokenizer(), tokenizer()
    pixels = clips()
    tokens = frames.encode(pixels)
    assert tokens.shape == (2, 3, 4, 4)
    for t in range(3):
        assert torch.equal(tokens[:, t], base.encode(pixels[:, :, t]))
        torch.testing.assert_close(frames.decode(tokens)[:, :, t], base.decode(tokens[:, t]))


def test_other_lengths_are_encoded_and_decoded() -> None:
    frames = tokenizer()
    tokens = frames.encode(clips(frames=5))
    assert torch.equal(tokens[:, :2], frames.encode(clips(frames=5)[:, :, :2]))
    assert frames.decode(tokens[:, :1]).shape == (2, 3, 1, 16, 16)


def test_frames_of_another_size_have_the_same_weights() -> None:
    base = tiny_tokenizer()
    larger = FrameTokenizer.of(base, 2, (24, 24))
    assert larger.sample_shape == (2, 24, 24)
    assert larger.space.levels == ((2, 6, 6),)
    pixels = Noise(0, 1).uniform("clip", (3, 2, 24, 24)) * 2 - 1
    assert torch.equal(larger.encode(pixels)[:, 1], base.encode(pixels[:, :, 1]))
    vit = TiTok(16, 4, 4, 4, 16, 1, 2, 16, 1, 2, codebook_size=8)
    assert FrameTokenizer.of(vit, 2).space.levels == ((2, 4),)
    with pytest.raises(SpaceError, match=r"TiTok works on \(16, 16\) pixels only, frames have \(24, 24\)"):
        FrameTokenizer.of(vit, 2, (24, 24))


def test_training_pass_gives_gradients_and_video_shapes() -> None:
    frames = tokenizer().train()
    output = frames(clips(), noise=Noise(0, 2))
    assert output.tokens.shape == (2, 3, 4, 4)
    assert output.reconstruction is not None
    assert output.reconstruction.shape == (2, 3, 3, 16, 16)
    (output.reconstruction.square().mean() + sum(output.losses.values())).backward()
    assert all(p.grad is not None for p in frames.parameters())


def test_continuous_base_draws_for_every_frame() -> None:
    torch.manual_seed(0)
    base = KLTokenizer(sample_size=16, widths=[8, 8, 8], latent_channels=4, norm_groups=4, encoder_blocks=1, decoder_blocks=1)
    frames = FrameTokenizer.of(base, 2).eval()
    assert frames.space.levels == ((2, 4, 4),)
    still = clips(frames=1).expand(-1, -1, 2, -1, -1)
    tokens = frames.encode(still, noise=Noise(0, 2))
    assert not torch.equal(tokens[:, 0], tokens[:, 1]), "frames have draws of their own"
    assert torch.equal(tokens[1:], frames.encode(still[1:], noise=Noise(0, [1])))


def test_saved_and_loaded(tmp_path: Path) -> None:
    frames = tokenizer()
    frames.save_pretrained(tmp_path)
    assert torch.equal(FrameTokenizer.from_pretrained(tmp_path).encode(clips()), frames.encode(clips()))


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        tokenizer(0)
    with pytest.raises(ConfigError, match="class name of a tokenizer"):
        FrameTokenizer({"class": "NAR"})
    with pytest.raises(SpaceError, match="tokenizer of images"):
        FrameTokenizer({"class": "LARPTokenizer", **LARPTokenizer.from_preset("larp-tiny").config_dict()})
    with pytest.raises(VargenError, match=r"expected \(B, 3, T, H, W\)"):
        tokenizer().encode(clips()[:, :, 0])
    with pytest.raises(VargenError, match="tokens of shape"):
        tokenizer().decode(torch.zeros(2, 4, 4, dtype=torch.int64))
