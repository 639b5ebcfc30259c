"""Tokens of several resolutions from any continuous tokenizer of images (Hi-MAR's pivots, xAR's scales)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from vargen.condition import TextFeatures
from vargen.errors import ConfigError, SpaceError, VargenError
from vargen.model import TokenizerOutput, VisualTokenizer
from vargen.noise import Noise
from vargen.registry import load_public
from vargen.space import TokenSpace

SOURCES = ("pixels", "latents")


class PyramidTokenizer(VisualTokenizer):
    """A base tokenizer at several resolutions; only the finest one is decoded.

    Args:
        base: the base tokenizer's configuration, with its public class name under ``class``.
        levels: grids, coarse first, the last one the base's own.
        source: what coarser levels are made of: ``pixels``, the image resized (bicubic) and encoded (Hi-MAR), or ``latents``,
            averages of the finest tokens over blocks.

    Raises:
        ConfigError: levels that do not end in the base's grid or do not divide it.
        SpaceError: a base of discrete tokens, or not of one 2D grid.
    """

    @register_to_config
    def __init__(self, base: Mapping[str, Any], levels: Sequence[Sequence[int]], source: str = "latents") -> None:
        super().__init__()
        arguments = dict(base)
        found = load_public(str(arguments.pop("class", None)))
        if not (isinstance(found, type) and issubclass(found, VisualTokenizer)):
            raise ConfigError(f"pyramid over '{base.get('class')}': expected the class name of a tokenizer under 'class'")
        self.base: VisualTokenizer = found(**arguments)
        space = self.base.space
        if space.discrete or len(space.levels) != 1 or len(space.shape) != 2:
            raise SpaceError(f"a pyramid needs a tokenizer with continuous tokens on one 2D grid, {found.__name__} has {space}")
        if source not in SOURCES:
            raise ConfigError(f"pyramid source '{source}': expected one of {', '.join(SOURCES)}")
        grids = [tuple(level) for level in levels]
        if not grids or grids[-1] != space.shape or any(n % m for grid in grids for n, m in zip(space.shape, grid)):
            raise ConfigError(f"pyramid levels {grids}: expected grids that divide {space.shape} and end in it")
        self.takes_text, self.text_shape = self.base.takes_text, self.base.text_shape

    @classmethod
    def of(cls, base: VisualTokenizer, levels: Sequence[Sequence[int]], source: str = "latents") -> PyramidTokenizer:
        """A pyramid around ``base``, which it shares rather than copies."""
        pyramid = cls({"class": type(base).__name__, **base.config_dict()}, [list(level) for level in levels], source)
        pyramid.base = base
        return pyramid.train(base.training)

    @property
    def space(self) -> TokenSpace:
        return replace(self.base.space, levels=tuple(tuple(level) for level in self.config.levels))

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.base.sample_shape

    def encode(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        """Tokens ``(B, num_tokens, C)``, level after level, of pixels ``(B, 3, H, W)`` of the configured size.

        Raises:
            VargenError: pixels of another size.
        """
        self.check_pixels(pixels, text)
        if tuple(pixels.shape[2:]) != self.sample_shape:
            raise VargenError(f"pixels of {tuple(pixels.shape[2:])}: a pyramid's levels belong to its size {self.sample_shape}")

        def draws(level: int) -> Noise | None:
            return None if noise is None else noise.at(level)

        finest = self.base.encode(pixels, text, draws(len(self.space.levels) - 1))
        coarse = []
        for number, grid in enumerate(self.space.levels[:-1]):
            if self.config.source == "latents":
                averaged = F.adaptive_avg_pool2d(finest.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)
                coarse.append(averaged)
                continue
            size = [side * m // n for side, m, n in zip(pixels.shape[2:], grid, self.space.shape)]
            small = F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
            coarse.append(self.base.encode(small, text, draws(number)))
        return torch.cat([level.flatten(1, 2) for level in (*coarse, finest)], dim=1)

    def decode(self, tokens: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        """Pixels of the finest level of tokens ``(B, num_tokens, C)``."""
        self.space.check(tokens)
        finest = tokens[:, -math.prod(self.space.shape) :].unflatten(1, self.space.shape)
        return self.base.decode(finest, text, noise)

    def forward(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> TokenizerOutput:
        raise VargenError("a pyramid has nothing of its own to train: train its base tokenizer")
