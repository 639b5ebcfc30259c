"""Videos through a tokenizer of images: every frame alone, its tokens stacked along time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.condition import TextFeatures
from vargen.errors import ConfigError, SpaceError, VargenError
from vargen.model import TokenizerOutput, VisualTokenizer
from vargen.noise import Noise
from vargen.registry import load_public
from vargen.space import TokenSpace


class FrameTokenizer(VisualTokenizer):
    """A (frames, *grid) space over a base tokenizer of images.

    It is causal in the strictest sense: a frame's tokens depend on that frame only, so that any number of given frames can be
    continued, and frames that do not change have tokens that do not change. Clips of any length can be encoded and decoded.

    Args:
        base: the base tokenizer's configuration, with its public class name under ``class``.
        frames: frames of a clip, which ``space`` belongs to.

    Raises:
        ConfigError: no tokenizer under ``class``, or fewer than one frame.
        SpaceError: a base of videos, of captions, or of several levels.
    """

    video = True
    causal_stride = 1

    @register_to_config
    def __init__(self, base: Mapping[str, Any], frames: int = 8) -> None:
        super().__init__()
        if frames < 1:
            raise ConfigError(f"frames {frames}: expected at least 1")
        arguments = dict(base)
        found = load_public(str(arguments.pop("class", None)))
        if not (isinstance(found, type) and issubclass(found, VisualTokenizer)):
            raise ConfigError(f"frames of '{base.get('class')}': expected the class name of a tokenizer under 'class'")
        self.base: VisualTokenizer = found(**arguments)
        if self.base.video or self.base.takes_text or len(self.base.space.levels) != 1:
            raise SpaceError(f"frames need a tokenizer of images with one grid and no captions, not {found.__name__}")

    @classmethod
    def of(cls, base: VisualTokenizer, frames: int, sample_size: Sequence[int] | None = None) -> FrameTokenizer:
        """Frames of ``base``, which is shared, or copied where frames have another ``sample_size`` (height, width) than its images.

        Raises:
            SpaceError: a base that does not work at that size.
        """
        size = list(base.sample_shape if sample_size is None else sample_size)
        config = base.config_dict()
        if size != list(base.sample_shape):
            # only a convolutional tokenizer has the same weights for every size
            other = {**config, "sample_size": size[0] if len(set(size)) == 1 else size}
            tokenizer = cls({"class": type(base).__name__, **other}, frames) if "sample_size" in config else None
            mine, theirs = (_shapes(model) for model in (base, tokenizer and tokenizer.base))
            if tokenizer is None or mine != theirs:
                raise SpaceError(f"{type(base).__name__} works on {base.sample_shape} pixels only, frames have {tuple(size)}")
            tokenizer.base.load_state_dict(base.state_dict())
            # not by diffusers' own `to`, which warns of modules to keep in float32 even where there are none
            return nn.Module.to(tokenizer, base.device, base.dtype).train(base.training)
        tokenizer = cls({"class": type(base).__name__, **config}, frames)
        tokenizer.base = base
        return tokenizer.train(base.training)

    @property
    def space(self) -> TokenSpace:
        return replace(self.base.space, levels=((self.config.frames, *self.base.space.shape),), ordered=False)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (self.config.frames, *self.base.sample_shape)

    @property
    def last_layer(self) -> nn.Parameter | None:
        return self.base.last_layer

    def encode(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        self.check_pixels(pixels, text)
        return self.base.encode(fold(pixels), None, _noise_of_frames(noise, pixels.shape[2])).unflatten(0, _sizes(pixels))

    def decode(self, tokens: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        """Tokens ``(B, T, *grid)`` of any number of frames to pixels ``(B, 3, T, H, W)``."""
        self.check_text(text, len(tokens))
        if tokens.dim() != 1 + len(self.space.token_shape):
            raise VargenError(
                f"tokens of shape {tuple(tokens.shape)}: expected (batch, {', '.join(map(str, self.space.token_shape))})"
            )
        frames = self.base.decode(tokens.flatten(0, 1), None, _noise_of_frames(noise, tokens.shape[1]))
        return frames.unflatten(0, tokens.shape[:2]).transpose(1, 2)

    def forward(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> TokenizerOutput:
        self.check_pixels(pixels, text)
        output = self.base(fold(pixels), None, _noise_of_frames(noise, pixels.shape[2]))
        reconstruction = output.reconstruction
        if reconstruction is not None:
            reconstruction = reconstruction.unflatten(0, _sizes(pixels)).transpose(1, 2)
        tokens = output.tokens.unflatten(0, _sizes(pixels))
        return TokenizerOutput(tokens, reconstruction, output.losses, output.features)

    def calibrate(self, tokens: Iterable[Tensor]) -> None:
        self.base.calibrate(batch.flatten(0, 1) for batch in tokens)
        self.register_to_config(base={"class": self.config.base["class"], **self.base.config_dict()})


def _shapes(model: VisualTokenizer | None) -> dict[str, tuple[int, ...]]:
    return {} if model is None else {name: tuple(value.shape) for name, value in model.state_dict().items()}


def fold(pixels: Tensor) -> Tensor:
    """Videos ``(B, 3, T, H, W)`` to their frames ``(B T, 3, H, W)``."""
    return pixels.transpose(1, 2).flatten(0, 1)


def _sizes(pixels: Tensor) -> tuple[int, int]:
    return pixels.shape[0], pixels.shape[2]


def _noise_of_frames(noise: Noise | None, frames: int) -> Noise | None:
    """Noise with a key per frame, addressed by the frame's number."""
    if noise is None:
        return None
    clip = torch.arange(noise.batch_size).repeat_interleave(frames)
    return noise.select(clip.to(noise.device)).at(torch.arange(frames, device=noise.device).repeat(noise.batch_size))
