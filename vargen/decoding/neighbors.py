"""Tables of nearest codes: for every code of a codebook the codes closest to it, which LANTERN lets stand in for each other."""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vargen.checkpoint import atomic_write
from vargen.errors import CheckpointError, VargenError
from vargen.nn.quantize import FSQ, VectorQuantizer

logger = logging.getLogger(__name__)
# distances held at once: 64 MiB of float64
_BLOCK_ELEMENTS = 2**23


def codebook_of(tokenizer: nn.Module) -> Tensor:
    """The codebook of a discrete tokenizer, ``(K, D)``: rows as stored, even where the tokenizer normalises them (LANTERN's code).

    Raises:
        VargenError: not one quantiser with a codebook.
    """
    found = [module for module in tokenizer.modules() if isinstance(module, VectorQuantizer | FSQ)]
    if len(found) != 1:
        raise VargenError(
            f"{type(tokenizer).__name__} has {len(found)} codebooks: expected one; give neighbour tables the codebook itself"
        )
    quantizer = found[0]
    if isinstance(quantizer, VectorQuantizer):
        return quantizer.codebook.detach()
    return quantizer.lookup(torch.arange(quantizer.codebook_size, device=quantizer.counts.device))


@torch.no_grad()
def nearest_codes(codebook: Tensor, count: int) -> Tensor:
    """The ``count`` codes nearest to each code, itself excluded, by ascending Euclidean distance (LANTERN, section 4.1).

    Distances are summed in float64 and rounded to float32; among equal ones the lower number comes first, so that lattices such as
    FSQ's have one table everywhere. Rows are made in blocks: the matrix of all distances is never held.

    Args:
        codebook: ``(K, D)``.
        count: columns, at most K - 1.

    Returns:
        int32 ``(K, count)`` on the CPU.

    Raises:
        VargenError: a codebook of another shape or with NaN, or a count out of range.
    """
    if codebook.dim() != 2 or not 1 <= count < len(codebook):
        raise VargenError(
            f"{count} neighbours in a codebook of shape {tuple(codebook.shape)}: expected (K, D) and a count in 1..K - 1"
        )
    codes = codebook.detach().double()
    if not torch.isfinite(codes).all():
        raise VargenError("the codebook holds NaN or infinity")
    number = torch.arange(len(codes), device=codes.device)
    rows = max(_BLOCK_ELEMENTS // len(codes), 1)
    blocks = []
    for start in range(0, len(codes), rows):
        part = codes[start : start + rows]
        distance = torch.cdist(part, codes, compute_mode="donot_use_mm_for_euclid_dist").float()
        distance[torch.arange(len(part)), number[start : start + len(part)]] = torch.inf
        # bits of a non-negative float order as its value does: one integer holds the distance and, below it, the number
        key = (distance.view(torch.int32).long() << 32) | number
        blocks.append((key.topk(count, largest=False).values & 0xFFFFFFFF).int().cpu())
    return torch.cat(blocks)


def neighbor_table(codebook: Tensor | nn.Module, count: int, cache: str | os.PathLike[str] | None = None) -> Tensor:
    """:func:`nearest_codes` of a codebook or a tokenizer, kept on disk.

    Args:
        count: columns; k + 1 are what LANTERN with k neighbours looks at. Cut to K - 1.
        cache: directory, by default ``vargen/neighbors`` under ``$XDG_CACHE_HOME`` or ``~/.cache``. Files are named by the content
            of the codebook; one with more columns serves smaller counts, a damaged one is made anew. Where nothing can be written
            the table is made every time.

    Returns:
        int32 ``(K, count)`` on the CPU.
    """
    codes = codebook_of(codebook) if isinstance(codebook, nn.Module) else codebook
    count = min(count, len(codes) - 1)
    folder = Path(cache) if cache is not None else _default_cache()
    content = codes.detach().float().cpu().contiguous()
    digest = hashlib.blake2b(repr(tuple(content.shape)).encode() + content.numpy().tobytes(), digest_size=12).hexdigest()
    file = folder / f"{digest}.npy"
    with suppress(CheckpointError):
        kept = read_table(file, codebook_size=len(codes))
        if kept.shape[1] >= count:
            return kept[:, :count]
    table = nearest_codes(codes, count)
    try:
        atomic_write(file, lambda path: write_table(path, table))
    except VargenError as error:
        logger.warning("the neighbour table is not kept for the next time: %s", error)
    return table


def write_table(path: Path, table: Tensor) -> None:
    """The table in NumPy's format, as 16-bit numbers where they suffice."""
    with open(path, "wb") as handle:
        np.save(handle, table.numpy().astype(np.uint16 if len(table) <= 2**16 else np.int32))


def read_table(path: str | os.PathLike[str], count: int | None = None, codebook_size: int | None = None) -> Tensor:
    """A table from an ``.npy`` file, ours or LANTERN's of all K - 1 columns.

    Args:
        count: columns that are read; all by default.
        codebook_size: expected number of rows.

    Returns:
        int32 ``(K, count)``.

    Raises:
        CheckpointError: missing, truncated, pickled, or not a table of this codebook.
    """
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
        if stored.ndim != 2 or stored.dtype.kind not in "ui" or not 0 < stored.shape[1] < len(stored):
            raise ValueError(f"holds {stored.dtype} of shape {stored.shape}, expected integers (K, at most K - 1)")
        if codebook_size not in (None, len(stored)):
            raise ValueError(f"has {len(stored)} rows, the codebook {codebook_size} codes")
        table = torch.from_numpy(stored[:, :count].astype(np.int32))
        if not 0 <= int(table.min()) <= int(table.max()) < len(stored):
            raise ValueError("names codes that do not exist")
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"'{path}' is not a readable neighbour table ({error})") from error
    return table


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vargen" / "neighbors"
