"""Nearest code of a codebook: the search of every vector quantiser."""

from __future__ import annotations

import torch
from torch import Tensor

from vargen.errors import VargenError

# distances held at once: 64 MiB of float32
_BLOCK_ELEMENTS = 2**24


def check_nearest(z: Tensor, codebook: Tensor) -> None:
    """Raises VargenError where the arguments of :func:`nearest_code` do not fit together."""
    if z.dim() != 2 or codebook.dim() != 2 or z.shape[1] != codebook.shape[1] or not len(codebook):
        raise VargenError(f"nearest_code of {tuple(z.shape)} in {tuple(codebook.shape)}: expected (N, D) and (K, D) with K > 0")


@torch.no_grad()
def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the code at the least squared Euclidean distance ``|z|^2 + |e|^2 - 2 z.e``, evaluated in float32.

    Rows are searched in blocks, so that the distance matrix is never held whole. Among equal distances the first code wins; NaN
    counts as the least distance, as in ``torch.argmin``.

    Args:
        z: ``(N, D)`` vectors.
        codebook: ``(K, D)`` codes.

    Returns:
        int64 ``(N,)``, in [0, K).

    Raises:
        VargenError: shapes that do not fit.
    """
    check_nearest(z, codebook)
    with torch.autocast(z.device.type, enabled=False):
        z, codebook = z.float(), codebook.float()
        code_norms = codebook.square().sum(-1)
        index = torch.empty(len(z), dtype=torch.int64, device=z.device)
        rows = max(_BLOCK_ELEMENTS // len(codebook), 1)
        for start in range(0, len(z), rows):
            block = z[start : start + rows]
            distance = block.square().sum(-1, keepdim=True) + code_norms
            index[start : start + rows] = distance.sub_(block @ codebook.T, alpha=2).argmin(-1)
        return index
