"""Heads of single tokens by name, for models whose head is a choice."""

from __future__ import annotations

from vargen.errors import ConfigError, nearest
from vargen.heads.diffusion import DiffusionHead
from vargen.heads.flow import FlowHead
from vargen.heads.mlp import TokenMLP

HEADS = ("diffusion", "flow")
TokenHead = DiffusionHead | FlowHead


def token_head(kind: str, channels: int, condition_dim: int, width: int, depth: int, steps: int | str) -> TokenHead:
    """An AdaLN-MLP that draws a token from a hidden state.

    Args:
        kind: ``diffusion`` (cosine schedule, noise prediction, learned variance; MAR) or ``flow`` (velocity, uniform times).
        steps: sampling steps: a spacing of the diffusion chain, or a number of flow steps.

    Raises:
        ConfigError: another kind.
    """
    if kind == "diffusion":
        return DiffusionHead(TokenMLP(channels, condition_dim, width, depth, out_channels=2 * channels), spacing=str(steps))
    if kind == "flow":
        return FlowHead(TokenMLP(channels, condition_dim, width, depth, time_scale=1000.0), steps=int(steps))
    raise ConfigError(f"head '{kind}'{nearest(kind, HEADS)}")
