"""EAGLE's drafter: one decoder layer that predicts a next-token model's next hidden state (Li et al., 2024; LANTERN)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.backbones.causal import CausalGenerator
from vargen.backbones.llama import grid_rotary, llama_block
from vargen.condition import Condition
from vargen.decoding.draft import Sample
from vargen.decoding.speculative import prefix_mask, require_next_token
from vargen.errors import VargenError
from vargen.model import VargenModel
from vargen.nn.cache import KVCache
from vargen.noise import Noise

PRESETS: dict[str, dict[str, Any]] = {
    "llamagen-t2i": {"grid": [16, 16], "dim": 1280, "heads": 20, "mlp_hidden": 3584},
    "llamagen-t2i-2": {"grid": [32, 32], "dim": 1280, "heads": 20, "mlp_hidden": 3584},
}


class EagleDrafter(VargenModel):
    """From a target's hidden state and the token that follows it, the target's state at that token.

    The token's embedding and the state, joined, go through one linear layer and decoder layers of Llama's kind; the first has no
    input norm, and there is no final one. The target's own head makes logits of the result.

    Args:
        grid: token grid of the target (one number for 1D tokens); rotary embedding runs over it, tokens of the prefix have none.
        codebook_size, dim, heads: of the target.
        depth: decoder layers.
        mlp_hidden: hidden width of SwiGLU, Llama's rule by default.
        norm_eps, rope_base: of norms and rotary embedding.

    Raises:
        ConfigError: widths that do not divide.
    """

    @register_to_config
    def __init__(
        self,
        grid: Sequence[int] = (16, 16),
        codebook_size: int = 16384,
        dim: int = 1280,
        heads: int = 20,
        depth: int = 1,
        mlp_hidden: int | None = None,
        norm_eps: float = 1e-6,
        rope_base: float = 10000.0,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(codebook_size, dim).requires_grad_(False)
        self.join = nn.Linear(2 * dim, dim)
        self.blocks = nn.ModuleList(llama_block(dim, heads, mlp_hidden, norm_eps) for _ in range(depth))
        self.blocks[0].norm1 = nn.Identity()
        with torch.device("cpu"):
            # the last row, which the number -1 of tokens without a cell chooses, is zero
            cells = torch.cat([torch.arange(math.prod(grid)), torch.tensor([-1])])
            self.register_buffer("rotary_rows", grid_rotary(cells, grid, dim, heads, rope_base), persistent=False)

    @classmethod
    def for_target(cls, target: CausalGenerator, **options: Any) -> EagleDrafter:
        """A fresh drafter of a target's sizes, with the rows of its head as embeddings; ``options`` are constructor arguments.

        Raises:
            VargenError: a target that does not predict one token after another.
        """
        require_next_token(target)  # type: ignore[arg-type]
        weight = target.output_heads[0].linear.weight  # type: ignore[union-attr]
        vocabulary, dim = weight.shape  # type: ignore[union-attr]
        sizes = {"heads": target.blocks[0].attn.heads, "mlp_hidden": target.blocks[0].mlp.down.in_features}  # type: ignore[union-attr]
        drafter = cls(**{"grid": list(target.space.shape), "codebook_size": vocabulary, "dim": dim, **sizes, **options})
        drafter.tokens.weight.data.copy_(weight)  # type: ignore[arg-type]
        return drafter

    def require(self, sample: Sample) -> None:
        """Raises VargenError unless the target has this drafter's vocabulary and grid."""
        space, config = sample.model.space, self.config
        if space.codebook_size != config.codebook_size or tuple(space.shape) != tuple(config.grid):
            raise VargenError(
                f"the drafter is for {config.codebook_size} codes on {list(config.grid)}, the target has {space.codebook_size} on "
                f"{list(space.shape)}: train one with EagleDrafter.for_target"
            )

    def start(self, rows: int, capacity: int) -> KVCache:
        """An empty cache of ``capacity`` entries."""
        attn, weight = self.blocks[0].attn, self.join.weight
        return KVCache(len(self.blocks), rows, attn.kv_heads, capacity, attn.head_dim, weight.dtype, weight.device)  # type: ignore[union-attr, arg-type]

    def forward(
        self, hidden: Tensor, ids: Tensor, cells: Tensor, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Predicted states ``(R, n, dim)``.

        Args:
            hidden: ``(R, n, dim)`` states of the target after its final norm.
            ids: ``(R, n)``, the token that follows each; 0 within the prefix.
            cells: ``(n,)``, grid cells of these tokens, -1 within the prefix.
            mask: bool, broadcastable to ``(R, 1, n, cached + n)``; plain causal by default.
            cache: entries are appended to it.
        """
        if hidden.shape[-1] != self.config.dim:
            raise VargenError(
                f"hidden states of width {hidden.shape[-1]}: the drafter was made for a target of width {self.config.dim}"
            )
        x = self.join(torch.cat([self.tokens(ids).to(hidden.dtype), hidden], dim=-1))
        rotary = self.rotary_rows[cells.to(x.device)]  # type: ignore[index]
        for number, block in enumerate(self.blocks):
            x = block(x, mask=mask, causal=mask is None, rotary=rotary, cache=cache, layer=number)
        if cache is not None:
            cache.advance(ids.shape[1])
        return x

    def training_losses(
        self,
        states: Tensor,
        tokens: Tensor,
        target: CausalGenerator,
        noise: Noise | None = None,
        state_noise: float = 0.2,
        probability_weight: float = 0.1,
    ) -> dict[str, Tensor]:
        """Losses of a batch, the total under ``"loss"``, see :func:`drafter_losses`; the defaults are LANTERN's.

        Every state behind a token of the image is predicted, but for the first one.

        Args:
            states: ``(B, S, dim)``, see :func:`target_states`.
            tokens: flat codes ``(B, num_cells)``.
            target: whose head makes the logits.
            noise: addresses what is added to the input states, uniform of width ``512 state_noise / (number of slots)``.
        """
        layout, count = target.layout, states.shape[1]
        noise = noise or Noise.fresh(len(states), states.device)
        added = (noise.uniform("states", tuple(states.shape[1:])) - 0.5) * (state_noise * 512 / layout.num_slots)
        cells = layout.cell[1:count]
        ids = torch.where(cells >= 0, tokens.cpu()[:, cells.clamp(min=0)], 0).to(states.device)
        predicted = self((states + added.to(states))[:, :-1], ids, cells)
        mask = (torch.arange(count - 1) >= layout.prefix).to(states).expand(len(states), -1)
        return drafter_losses(predicted, states[:, 1:], mask, target.logits, probability_weight)


def drafter_losses(predicted: Tensor, target: Tensor, mask: Tensor, head: Any, weight: float = 0.1) -> dict[str, Tensor]:
    """Smooth L1 between states, plus ``weight`` times the cross-entropy between the distributions that the head makes of them.

    Args:
        predicted, target: ``(B, n, dim)``.
        mask: ``(B, n)``, 1 at positions that count.
        head: states to logits.
    """
    count = mask.sum() + 1e-5
    value = (mask * F.smooth_l1_loss(predicted.float(), target.float(), reduction="none").mean(-1)).sum() / count
    with torch.no_grad():
        goal = head(target).softmax(-1)
    log_probs = head(predicted).log_softmax(-1)
    cross = -(mask * (goal * log_probs).sum(-1)).sum() / count
    with torch.no_grad():
        agreement = (mask * (log_probs.argmax(-1) == goal.argmax(-1))).sum() / count
    return {"loss": value + weight * cross, "state": value, "probability": cross, "agreement": agreement}


@torch.no_grad()
def target_states(target: CausalGenerator, tokens: Tensor, condition: Condition, drop: Tensor) -> Tensor:
    """Hidden states of the target after its final norm, ``(B, S, dim)``, in one pass over prefix and tokens.

    The last token is left out, since no model predicts anything from it. A dropped condition (bool ``drop`` ``(B,)``) has no
    padding, and padded slots are as in decoding, see :func:`vargen.decoding.speculative.prefix_mask`.
    """
    layout = target.layout
    slots = torch.arange(layout.num_inputs)
    prefix, valid = target.prefix(condition, drop)
    ids = tokens[:, layout.cell[slots].clamp(min=0).to(tokens.device)]
    x = target.embed(prefix, ids, slots)
    visible = None if valid is None else F.pad(valid | drop.unsqueeze(1), (0, len(slots) - valid.shape[1]), value=True)
    mask = prefix_mask(layout, slots, visible)
    return target.trunk(x, slots, None if mask is None else mask.to(x.device), None, **target.context(condition, drop))[0]
