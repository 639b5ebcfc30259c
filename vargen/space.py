"""Token spaces: what a tokenizer produces and a backbone models."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vargen.errors import SpaceError


@dataclass(frozen=True)
class TokenSpace:
    """The set in which the tokens of one image or video lie.

    Attributes:
        levels: grid shape of every level, coarse first: ``((16, 16),)`` for an image grid, ``((4, 16, 16),)`` for video,
            ``((256,),)`` for a 1D tokenizer, ``((8, 8), (16, 16))`` for two levels.
        codebook_size: number of ids of a discrete space, else None.
        channels: length of a token vector of a continuous space, else None.
        ordered: any prefix of the tokens is itself a valid image (FlexTok).
        mean, std: scaling of continuous tokens; backbones see ``(latent - mean) / std``.
    """

    levels: tuple[tuple[int, ...], ...]
    codebook_size: int | None = None
    channels: int | None = None
    ordered: bool = False
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(tuple(int(n) for n in level) for level in self.levels))
        if not self.levels or any(not level or min(level) < 1 for level in self.levels):
            raise SpaceError(f"token space levels {self.levels}: expected at least one non-empty grid of positive sizes")
        if (self.codebook_size is None) == (self.channels is None):
            raise SpaceError("a token space is discrete (codebook_size) or continuous (channels): give exactly one")
        if self.std <= 0:
            raise SpaceError(f"token space std {self.std}: expected a positive number")

    @property
    def discrete(self) -> bool:
        return self.codebook_size is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """Grid of the finest level."""
        return self.levels[-1]

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Number of cells of every level."""
        return tuple(math.prod(level) for level in self.levels)

    @property
    def num_tokens(self) -> int:
        """Number of cells over all levels."""
        return sum(self.level_sizes)

    @property
    def token_shape(self) -> tuple[int, ...]:
        """Shape of one sample's tokens: the grid of a single level, a flat sequence of cells for several."""
        grid = self.shape if len(self.levels) == 1 else (self.num_tokens,)
        return grid if self.channels is None else (*grid, self.channels)

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        """Tokenizer latents to the scale that backbones model."""
        return (latents - self.mean) / self.std

    def denormalize(self, tokens: torch.Tensor) -> torch.Tensor:
        """Inverse of :meth:`normalize`."""
        return tokens * self.std + self.mean

    def check(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns ``tokens`` of shape ``(B, *token_shape)``; raises SpaceError if they are not of this space."""
        if tuple(tokens.shape[1:]) != self.token_shape:
            raise SpaceError(f"tokens of shape {tuple(tokens.shape)}: expected (batch, {', '.join(map(str, self.token_shape))})")
        if self.codebook_size is not None:
            if tokens.dtype.is_floating_point:
                raise SpaceError(f"tokens of dtype {tokens.dtype}: expected integer ids below {self.codebook_size}")
            if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= self.codebook_size):
                raise SpaceError(f"token ids span {int(tokens.min())}..{int(tokens.max())}: expected 0..{self.codebook_size - 1}")
        elif not torch.isfinite(tokens).all():
            raise SpaceError("continuous tokens hold NaN or infinity: check the tokenizer and its input")
        return tokens

    def require(self, other: TokenSpace, what: str = "tokenizer and model") -> None:
        """Raises SpaceError, naming the first difference, unless both spaces hold the same tokens."""
        for field in ("levels", "codebook_size", "channels"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise SpaceError(f"{what} do not share a token space: {field} is {mine} on one side and {theirs} on the other")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form, the inverse of ``TokenSpace(**d)``."""
        return asdict(self)
