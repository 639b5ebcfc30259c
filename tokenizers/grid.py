"""The tokens of a 1D tokenizer laid on a grid, in raster order (NAR's video models over LARP's holistic tokens)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from vargen.condition import TextFeatures
from vargen.errors import ConfigError, SpaceError, VargenError
from vargen.model import TokenizerOutput, VisualTokenizer
from vargen.noise import Noise
from vargen.registry import load_public
from vargen.space import TokenSpace


class GridTokenizer(VisualTokenizer):
    """A grid over the tokens of a base tokenizer; the places in it stand for nothing in the picture.

    Args:
        base: the base tokenizer's configuration, with its public class name under ``class``.
        grid: its product is the number of the base's tokens.

    Raises:
        ConfigError: no tokenizer under ``class``.
        SpaceError: a base with a grid of its own, or of another number of tokens.
    """

    @register_to_config
    def __init__(self, base: Mapping[str, Any], grid: Sequence[int]) -> None:
        super().__init__()
        arguments = dict(base)
        found = load_public(str(arguments.pop("class", None)))
        if not (isinstance(found, type) and issubclass(found, VisualTokenizer)):
            raise ConfigError(f"grid over '{base.get('class')}': expected the class name of a tokenizer under 'class'")
        self.base: VisualTokenizer = found(**arguments)
        space = self.base.space
        if len(space.levels) != 1 or len(space.shape) != 1 or math.prod(grid) != space.num_tokens:
            raise SpaceError(
                f"a grid {tuple(grid)} needs a 1D tokenizer of {math.prod(grid)} tokens, {found.__name__} has {space.levels}"
            )
        self.takes_text, self.text_shape = self.base.takes_text, self.base.text_shape

    @classmethod
    def of(cls, base: VisualTokenizer, grid: Sequence[int]) -> GridTokenizer:
        """A grid over ``base``, which is shared rather than copied."""
        tokenizer = cls({"class": type(base).__name__, **base.config_dict()}, list(grid))
        tokenizer.base = base
        return tokenizer.train(base.training)

    @property
    def video(self) -> bool:  # type: ignore[override]
        return self.base.video

    @property
    def space(self) -> TokenSpace:
        return replace(self.base.space, levels=(tuple(self.config.grid),), ordered=False)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.base.sample_shape

    @property
    def paints(self) -> bool:
        return self.base.paints

    def of_base(self, tokens: Tensor) -> Tensor:
        """The base's tokens ``(B, N, ...)`` on the grid."""
        return tokens.unflatten(1, tuple(self.config.grid))

    @property
    def moments_shape(self) -> tuple[int, ...] | None:
        return self.base.moments_shape

    def moments(self, pixels: Tensor, text: TextFeatures | None = None) -> Tensor:
        return self.base.moments(pixels, text)

    def tokens_of(self, moments: Tensor, noise: Noise | None = None) -> Tensor:
        return self.of_base(self.base.tokens_of(moments, noise))

    def encode(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        return self.of_base(self.base.encode(pixels, text, noise))

    def decode(self, tokens: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        return self.base.decode(self.space.check(tokens).flatten(1, len(self.config.grid)), text, noise)

    def forward(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> TokenizerOutput:
        raise VargenError("a grid has nothing of its own to train: train its base tokenizer")

    def calibrate(self, tokens: Iterable[Tensor]) -> None:
        raise VargenError("a grid has no scale of its own: calibrate its base tokenizer")
