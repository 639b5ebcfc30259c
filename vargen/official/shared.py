"""Published layouts that several systems share: timm's blocks, and the token MLP of MAR's diffusion head."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vargen.checkpoint import State, rename
from vargen.errors import CheckpointError

# names inside a block of timm's vision transformer -> inside ours
TIMM_BLOCK = (
    (r"(.*)\.attn\.proj\.(.*)", r"\1.attn.out.\2"),
    (r"(.*)\.mlp\.fc1\.(.*)", r"\1.mlp.up.\2"),
    (r"(.*)\.mlp\.fc2\.(.*)", r"\1.mlp.down.\2"),
)

_TOKEN_MLP = (
    (r"time_embed\.mlp\.0\.(.*)", r"time.mlp.up.\1"),
    (r"time_embed\.mlp\.2\.(.*)", r"time.mlp.down.\1"),
    (r"cond_embed\.(.*)", r"cond.\1"),
    (r"input_proj\.(.*)", r"input.\1"),
    (r"res_blocks\.(\d+)\.in_ln\.(.*)", r"blocks.\1.norm.\2"),
    (r"res_blocks\.(\d+)\.mlp\.0\.(.*)", r"blocks.\1.mlp.up.\2"),
    (r"res_blocks\.(\d+)\.mlp\.(?:2|w3)\.(.*)", r"blocks.\1.mlp.down.\2"),
    (r"final_layer\.linear\.(.*)", r"out.\1"),
)
_MODULATION = r"(?:res_blocks\.(\d+)|final_layer)\.adaLN_modulation\.1\.(weight|bias)"


def under(state: Mapping[str, Tensor], prefix: str) -> State:
    """The entries under a prefix, which is cut off."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def token_mlp(state: Mapping[str, Tensor]) -> State:
    """State of :class:`vargen.heads.mlp.TokenMLP` from that of the published network; unknown keys are kept.

    There, every block and the output layer have a modulation layer of their own, and SwiGLU has gate and value in one layer.
    """
    modulation = {k: re.fullmatch(_MODULATION, k) for k in state}
    ours = rename({k: v for k, v in state.items() if not modulation[k]}, _TOKEN_MLP)
    for kind in ("weight", "bias"):
        layers = [(int(m[1]) if m[1] else len(state), k) for k, m in modulation.items() if m and m[2] == kind]
        if not layers:
            raise CheckpointError("no modulation layers 'res_blocks.N.adaLN_modulation.1': this is not a diffusion head's state")
        ours[f"adaln.linear.{kind}"] = torch.cat([state[k] for _, k in sorted(layers)])
        for key in [k for k in ours if re.fullmatch(rf"res_blocks\.\d+\.mlp\.w12\.{kind}", k)]:
            gate, value = ours.pop(key).chunk(2)
            block = key.split(".")[1]
            ours[f"blocks.{block}.mlp.gate.{kind}"], ours[f"blocks.{block}.mlp.up.{kind}"] = gate, value
    return ours


def token_mlp_sizes(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """(width, depth) of a published token MLP."""
    depth = len({m[1] for m in (re.match(r"res_blocks\.(\d+)\.", k) for k in state) if m})
    return shape_of(state, "input_proj.weight", 2)[0], depth


def shape_of(state: Mapping[str, Tensor], key: str, axes: int | None = None) -> tuple[int, ...]:
    """Shape of an entry that every checkpoint of the system has, with so many axes where the caller counts on them."""
    if key not in state:
        raise CheckpointError(f"key '{key}' is missing: this is not a checkpoint of this system")
    shape = tuple(state[key].shape)
    if axes is not None and len(shape) != axes:
        raise CheckpointError(f"'{key}' has shape {shape}: expected {axes} axes")
    return shape


def depth_of(state: Mapping[str, Tensor], pattern: str) -> int:
    """Number of parts: one more than the largest number that ``pattern`` captures at the start of a key."""
    numbers = [int(m[1]) for m in (re.match(pattern, key) for key in state) if m]
    if not numbers:
        raise CheckpointError(f"no keys like '{pattern}': this is not a checkpoint of this system")
    return max(numbers) + 1


def square(cells: int) -> tuple[int, int]:
    """The square grid of so many cells; raises CheckpointError when there is none."""
    side = round(cells**0.5)
    if side * side != cells:
        raise CheckpointError(f"{cells} positions do not form a square grid: pass grid=(rows, columns)")
    return side, side


_LDM_RULES = (
    (r"(.*)\.mid\.block_1\.(.*)", r"\1.mid.0.\2"),
    (r"(.*)\.mid\.attn_1\.(.*)", r"\1.mid.1.\2"),
    (r"(.*)\.mid\.block_2\.(.*)", r"\1.mid.2.\2"),
    (r"(.*)\.(?:down|up)\.(\d+)\.block\.(.*)", r"\1.levels.\2.blocks.\3"),
    (r"(.*)\.(?:down|up)\.(\d+)\.attn\.(.*)", r"\1.levels.\2.attentions.\3"),
    (r"(.*)\.(?:down|up)\.(\d+)\.(?:down|up)sample\.(.*)", r"\1.levels.\2.resample.\3"),
)


def ldm_autoencoder(state: Mapping[str, Tensor]) -> State:
    """State of :mod:`vargen.nn.conv`'s networks from that of latent diffusion's, VQ-GAN's and MAR's; other keys are kept.

    There, both networks number levels from full resolution; our decoder's stand in the order of the computation.
    """
    last = depth_of(state, r"decoder\.up\.(\d+)\.") - 1
    ours: State = {}
    for key, value in rename(state, _LDM_RULES).items():
        level = re.match(r"decoder\.levels\.(\d+)\.", key)
        if level:
            key = f"decoder.levels.{last - int(level[1])}.{key[level.end() :]}"
        ours[key.replace(".nin_shortcut.", ".shortcut.").replace(".proj_out.", ".out.")] = value
    return ours


def ldm_sizes(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Widths, blocks per level and levels with attention of both networks of an :func:`ldm_autoencoder` state as published."""
    sizes: dict[str, list[int]] = {}
    for network, levels in (("encoder", "encoder.down"), ("decoder", "decoder.up")):
        depth = range(depth_of(state, rf"{levels}\.(\d+)\."))
        sizes[f"{network}_widths"] = [shape_of(state, f"{levels}.{i}.block.0.conv2.weight", 4)[0] for i in depth]
        sizes[f"{network}_blocks"] = [depth_of(state, rf"{levels}\.{i}\.block\.(\d+)\.") for i in depth]
        sizes[f"{network}_attention"] = [i for i in depth if f"{levels}.{i}.attn.0.q.weight" in state]
    return sizes
