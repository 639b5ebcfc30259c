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

    @property
    def moments_shape(self) -> tuple[int, ...] | None:
        """Of averaged latents the base's own, of resized pixels those of every level flat, one after the other."""
        shape = self.base.moments_shape
        if shape is None or self.config.source == "latents":
            return shape
        return (sum(math.prod(level) for level in self._moments_shapes()),)

    def _moments_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the base's moments at every level: the axes that hold the base's grid shrink along with it."""
        shape = self.base.moments_shape or ()
        finest = self.space.shape
        return [(*shape[:-2], *(side * m // n for side, m, n in zip(shape[-2:], grid, finest))) for grid in self.space.levels]

    def moments(self, pixels: Tensor, text: TextFeatures | None = None) -> Tensor:
        if self.config.source == "latents":
            return self.base.moments(pixels, text)
        return torch.cat([self.base.moments(image, text).flatten(1) for image in self._images(pixels, text)], dim=1)

    def tokens_of(self, moments: Tensor, noise: Noise | None = None) -> Tensor:
        if self.config.source == "latents":
            return self.of_base(self.base.tokens_of(moments, self._draws(noise, len(self.space.levels) - 1)))
        shapes = self._moments_shapes()
        parts = moments.split([math.prod(shape) for shape in shapes], dim=1)
        levels = [
            self.base.tokens_of(part.unflatten(1, shape), self._draws(noise, number))
            for number, (part, shape) in enumerate(zip(parts, shapes))
        ]
        return torch.cat([level.flatten(1, 2) for level in levels], dim=1)

    def of_base(self, finest: Tensor) -> Tensor:
        """Tokens ``(B, num_tokens, C)`` of all levels, the coarser ones averages of the finest ``(B, h, w, C)``."""
        image = finest.permute(0, 3, 1, 2)
        coarse = [F.adaptive_avg_pool2d(image, grid).permute(0, 2, 3, 1) for grid in self.space.levels[:-1]]
        return torch.cat([level.flatten(1, 2) for level in (*coarse, finest)], dim=1)

    def _images(self, pixels: Tensor, text: TextFeatures | None) -> list[Tensor]:
        """Checked pixels at the size of every level that is encoded, coarse first."""
        self.check_pixels(pixels, text)
        if tuple(pixels.shape[2:]) != self.sample_shape:
            raise VargenError(f"pixels of {tuple(pixels.shape[2:])}: a pyramid's levels belong to its size {self.sample_shape}")
        coarse = self.space.levels[:-1] if self.config.source == "pixels" else ()
        sizes = [[side * m // n for side, m, n in zip(self.sample_shape, grid, self.space.shape)] for grid in coarse]
        small = [F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True) for size in sizes]
        return [*(image.clamp(-1, 1) for image in small), pixels]

    @staticmethod
    def _draws(noise: Noise | None, level: int) -> Noise | None:
        return None if noise is None else noise.at(level)

    def encode(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        """Tokens ``(B, num_tokens, C)``, level after level, of pixels ``(B, 3, H, W)`` of the configured size.

        Raises:
            VargenError: pixels of another size.
        """
        images = self._images(pixels, text)
        if self.config.source == "latents":
            return self.of_base(self.base.encode(images[-1], text, self._draws(noise, len(self.space.levels) - 1)))
        levels = [self.base.encode(image, text, self._draws(noise, number)) for number, image in enumerate(images)]
        return torch.cat([level.flatten(1, 2) for level in levels], dim=1)

    def decode(self, tokens: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        """Pixels of the finest level of tokens ``(B, num_tokens, C)``."""
        self.space.check(tokens)
        finest = tokens[:, -math.prod(self.space.shape) :].unflatten(1, self.space.shape)
        return self.base.decode(finest, text, noise)

    def forward(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> TokenizerOutput:
        raise VargenError("a pyramid has nothing of its own to train: train its base tokenizer")
