"""LARP's autoregressive prior: a small causal transformer on latents, whose next-token loss orders the tokens (section 3.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vargen.errors import ConfigError
from vargen.nn.vit import Transformer
from vargen.noise import Noise

# layers, heads and width of the published sizes
PRIORS: dict[str, dict[str, int]] = {
    "L": {"depth": 24, "heads": 16, "dim": 1024},
    "B": {"depth": 12, "heads": 12, "dim": 768},
    "M": {"depth": 12, "heads": 8, "dim": 512},
    "S": {"depth": 12, "heads": 6, "dim": 384},
    "XS": {"depth": 6, "heads": 6, "dim": 384},
    "XXS": {"depth": 6, "heads": 4, "dim": 256},
}


class PriorOutput(NamedTuple):
    """Loss of the prior, its logits ``(rounds, B, N-1, K)`` and the latents ``(B, N, C)`` that the last round saw."""

    loss: Tensor
    logits: Tensor
    last_input: Tensor


class LatentPrior(nn.Module):
    """Predicts the latent of position i from those of positions below i; logits are cosines to the codebook.

    Attention dropout acts in training only; the published code also leaves it on in evaluation.

    Args:
        code_dim: width of a latent.
        max_tokens: longest sequence.
        depth, heads, dim: size of the transformer.
        dropout: of embeddings, attention weights, and after attention and feed-forward layers.
        temperature: divides the cosines.
        rounds: forward passes per loss; each later one sees some of its tokens replaced by samples of the one before.
        max_ratio: final share of replaced tokens (scheduled sampling); ramp: share of training over which it rises from 0.
    """

    def __init__(
        self,
        code_dim: int,
        max_tokens: int,
        depth: int = 12,
        heads: int = 6,
        dim: int = 384,
        *,
        dropout: float = 0.1,
        temperature: float = 1.0,
        rounds: int = 2,
        max_ratio: float = 0.5,
        ramp: float = 0.3,
    ) -> None:
        super().__init__()
        if rounds < 1 or not 0 <= max_ratio <= 1 or ramp < 0:
            raise ConfigError(f"prior rounds {rounds}, max_ratio {max_ratio}, ramp {ramp}: expected >= 1, 0..1 and >= 0")
        self.temperature, self.rounds, self.max_ratio, self.ramp = temperature, rounds, max_ratio, ramp
        self.embed = nn.Linear(code_dim, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(max_tokens, dim))
        self.dropout = nn.Dropout(dropout)
        self.transformer = Transformer(
            depth, dim, heads, final_norm=True, norm_eps=1e-5, dropout=dropout, attn_dropout=dropout, mlp_dropout=dropout
        )
        self.head = nn.Linear(dim, code_dim)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents ``(B, N, C)`` to unit predictions ``(B, N-1, C)`` of positions 1 to N-1."""
        known = latents[:, :-1]
        x = self.dropout(self.embed(known) + self.positions[: known.shape[1]])
        return F.normalize(self.head(self.transformer(x, causal=True)), dim=-1)

    def ratio(self, progress: float) -> float:
        """Share of replaced tokens at ``progress`` in [0, 1] of the training."""
        return self.max_ratio if progress >= self.ramp else self.max_ratio * progress / self.ramp

    def loss(self, latents: Tensor, ids: Tensor, codebook: Tensor, progress: float, noise: Noise) -> PriorOutput:
        """Cross entropy of the ids given the latents before them, averaged over rounds, samples and positions.

        Args:
            latents: ``(B, N, C)`` straight-through latents; the gradient flows into them, but not into the targets.
            ids: int64 ``(B, N)``.
            codebook: unit codes ``(K, C)``.
            progress: share of the training that is done.
        """
        codebook = codebook.detach()
        replaced = noise.bernoulli("prior/mask", self.ratio(progress), (ids.shape[1] - 1,)).unsqueeze(-1)
        seen, logits = latents, []
        for round_ in range(self.rounds):
            logits.append((self(seen) @ codebook.T).float() / self.temperature)
            if round_ + 1 < self.rounds:
                sample = noise.categorical("prior/sample", logits[-1].detach().softmax(-1), at=(round_,))
                # never the previous mixture: a position that is not replaced sees the encoder's own latent
                seen = torch.cat([latents[:, :1], torch.where(replaced, codebook[sample], latents[:, 1:])], dim=1)
        stacked = torch.stack(logits)
        labels = ids[:, 1:].expand(self.rounds, -1, -1)
        return PriorOutput(F.cross_entropy(stacked.flatten(0, 2), labels.flatten()), stacked, seen)


def top_accuracy(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Share of labels among the ``k`` largest logits; logits ``(..., K)``, labels ``(...)``."""
    return (logits.topk(k, dim=-1).indices == labels.unsqueeze(-1)).any(-1).float().mean()
