"""Q-Former (Li et al., BLIP-2, 2023): learned queries in a BERT that read image features in every other layer.

SEED's own turn is that the queries attend to each other causally, so that their outputs form a 1D sequence (arXiv 2307.08041).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vargen.errors import VargenError
from vargen.nn.bert import BertLayer, PostNormMLP
from vargen.nn.norm import LayerNorm


class QFormer(nn.Module):
    """``num_queries`` learned queries over a context; optionally a text branch that shares the attention layers.

    Args:
        num_queries: number of outputs.
        dim, depth, heads, mlp_hidden: of the BERT.
        context_dim: width of the image features.
        causal: query i sees queries up to i.
        cross_every: layers 0, n, 2n ... read the context.
        vocab_size: adds word and position embeddings and feed-forward layers for text; None for queries alone.
        max_positions: longest text.
        dropout: everywhere, in training.
    """

    def __init__(
        self,
        num_queries: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_hidden: int,
        context_dim: int,
        *,
        causal: bool = False,
        cross_every: int = 2,
        vocab_size: int | None = None,
        max_positions: int = 512,
        dropout: float = 0.1,
        norm_eps: float = 1e-12,
    ) -> None:
        super().__init__()
        self.causal, self.vocab_size, self.max_positions = causal, vocab_size, max_positions
        self.queries = nn.Parameter(0.02 * torch.randn(num_queries, dim))
        self.norm = LayerNorm(dim, norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            BertLayer(
                dim,
                heads,
                mlp_hidden,
                context_dim=context_dim if i % cross_every == 0 else None,
                norm_eps=norm_eps,
                dropout=dropout,
                attn_dropout=dropout,
            )
            for i in range(depth)
        )
        if vocab_size is not None:
            self.words = nn.Embedding(vocab_size, dim)
            self.positions = nn.Embedding(max_positions, dim)
            self.text_feeds = nn.ModuleList(PostNormMLP(dim, mlp_hidden, norm_eps=norm_eps, dropout=dropout) for _ in range(depth))
        self.apply(_init_weights)

    def forward(self, context: Tensor) -> Tensor:
        """Image features ``(B, M, context_dim)`` to query outputs ``(B, num_queries, dim)``."""
        x = self.dropout(self.norm(self.queries).expand(context.shape[0], -1, -1))
        for layer in self.layers:
            x = layer(x, context, causal=self.causal)
        return x

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Word ids ``(B, L)`` and their bool mask to hidden states ``(B, L, dim)``; every word sees all words."""
        if self.vocab_size is None:
            raise VargenError("this Q-Former has no text branch")
        if ids.shape[1] > self.max_positions:
            raise VargenError(f"text of {ids.shape[1]} tokens: expected at most {self.max_positions}")
        x = self.dropout(self.norm(self.words(ids) + self.positions.weight[: ids.shape[1]]))
        for layer, feed in zip(self.layers, self.text_feeds, strict=True):
            x = feed(layer.attend(x, mask=mask[:, None, None, :]))  # type: ignore[operator]
        return x


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
