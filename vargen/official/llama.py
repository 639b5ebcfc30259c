"""Key names of the Llama-style decoders that grew from LlamaGen's code (LlamaGen, NAR, LARP's generator)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from vargen.errors import CheckpointError
from vargen.official.shared import square

WRAPPERS = ("model", "module", "state_dict")

RULES: tuple[tuple[str, str], ...] = (
    (r"cls_embedding\.embedding_table\.weight", "classes.table.weight"),
    (r"cls_embedding\.cap_proj\.fc1\.weight", "text.proj.up.weight"),
    (r"cls_embedding\.cap_proj\.fc2\.weight", "text.proj.down.weight"),
    (r"cls_embedding\.uncond_embedding", "text.null"),
    (r"tok_embeddings\.weight", "tokens.weight"),
    (r"layers\.(\d+)\.attention\.wqkv\.weight", r"blocks.\1.attn.qkv.weight"),
    (r"layers\.(\d+)\.attention\.wo\.weight", r"blocks.\1.attn.out.weight"),
    (r"layers\.(\d+)\.feed_forward\.w1\.weight", r"blocks.\1.mlp.gate.weight"),
    (r"layers\.(\d+)\.feed_forward\.w3\.weight", r"blocks.\1.mlp.up.weight"),
    (r"layers\.(\d+)\.feed_forward\.w2\.weight", r"blocks.\1.mlp.down.weight"),
    (r"layers\.(\d+)\.attention_norm\.weight", r"blocks.\1.norm1.weight"),
    (r"layers\.(\d+)\.ffn_norm\.weight", r"blocks.\1.norm2.weight"),
)

# rotary tables are recomputed; older files carry one
IGNORE = (r"freqs_cis",)


# captures the number of a block, see depth_of
BLOCKS = r"layers\.(\d+)\."


def square_grid(path: str, stride: int = 16, block_size: int | None = None) -> tuple[int, int]:
    """The token grid: from ``block_size``, else from the image size in the file's name (``c2i_B_384.pt``: 24 x 24).

    Raises:
        CheckpointError: neither tells it.
    """
    if block_size is None:
        sizes = [int(n) for n in re.findall(r"(?<!\d)(256|384|512)(?!\d)", Path(path).name)]
        if not sizes:
            raise CheckpointError(f"'{path}': the file does not say the token grid; pass grid, for example grid=[16, 16] at 256 px")
        block_size = (sizes[-1] // stride) ** 2
    return square(block_size)


def heads_of(dim: int, depth: int, presets: Mapping[str, Mapping[str, object]], given: int | None) -> int:
    """Attention heads: as given, else those of the preset with this width and depth."""
    if given is not None:
        return given
    for preset in presets.values():
        if preset["dim"] == dim and preset["depth"] == depth:
            return int(preset["heads"])  # type: ignore[call-overload]
    raise CheckpointError(f"no preset has width {dim} and {depth} blocks; pass heads")


def as_grid(grid: Sequence[int] | None, path: str, block_size: int | None = None) -> tuple[int, ...]:
    """A given grid, else :func:`square_grid`."""
    return tuple(grid) if grid is not None else square_grid(path, block_size=block_size)
