"""Released checkpoints of TiTok and TA-TiTok (plain state dicts, ``.bin`` or safetensors)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vargen.checkpoint import State, load_strictly, read_file, rename, unwrap
from vargen.official.shared import depth_of, shape_of
from vargen.official.titok_vqgan import convert_decoder, decoder_config
from vargen.tokenizers.titok import PRESETS, TiTok

WRAPPERS = ("model", "state_dict")

RULES: tuple[tuple[str, str], ...] = (
    (r"latent_tokens", "encoder.latent_tokens"),
    (r"encoder\.patch_embed\.(.*)", r"encoder.patch_embed.proj.\1"),
    (r"encoder\.conv_out\.(.*)", r"encoder.out.\1"),
    (r"decoder\.decoder_embed\.(.*)", r"decoder.embed.\1"),
    (r"decoder\.text_guidance_proj\.(.*)", r"decoder.text_proj.\1"),
    (r"decoder\.text_guidance_positional_embedding", "decoder.text_positions"),
    (r"(encoder|decoder)\.positional_embedding", r"\1.positions"),
    (r"(encoder|decoder)\.latent_token_positional_embedding", r"\1.latent_positions"),
    (r"(encoder|decoder)\.ln_pre\.(.*)", r"\1.trunk.pre_norm.\2"),
    (r"(encoder|decoder)\.ln_post\.(.*)", r"\1.trunk.final_norm.\2"),
    (r"(encoder|decoder)\.transformer\.(\d+)\.ln_([12])\.(.*)", r"\1.trunk.blocks.\2.norm\3.\4"),
    (r"(encoder|decoder)\.transformer\.(\d+)\.attn\.in_proj_(weight|bias)", r"\1.trunk.blocks.\2.attn.qkv.\3"),
    (r"(encoder|decoder)\.transformer\.(\d+)\.attn\.out_proj\.(.*)", r"\1.trunk.blocks.\2.attn.out.\3"),
    (r"(encoder|decoder)\.transformer\.(\d+)\.mlp\.c_fc\.(.*)", r"\1.trunk.blocks.\2.mlp.up.\3"),
    (r"(encoder|decoder)\.transformer\.(\d+)\.mlp\.c_proj\.(.*)", r"\1.trunk.blocks.\2.mlp.down.\3"),
    (r"quantize\.embedding\.weight", "quantizer.codebook"),
    (r"quantize\.embed_prob", "quantizer.usage_average"),
    (r"pixel_quantize\.embedding\.weight", "pixel_codebook"),
    (r"decoder\.conv_out\.(.*)", r"pixel_conv.\1"),
)

# single vectors that are stored with leading axes of one, and 1x1 convolutions that are linear layers of ours
_VECTORS = ("encoder.class_embedding", "decoder.class_embedding", "decoder.mask_token")
_LINEARS = ("encoder.out.weight", "pixel_head.weight", "code_head.up.weight", "code_head.down.weight")


def load(path: str | os.PathLike[str], **options: Any) -> TiTok:
    """A TiTok or TA-TiTok from an official file, sizes read from its tensors.

    Two-stage models are taken to be the three legacy ones in what tensors do not tell (mixed latents, unit codes), direct ones not.

    Args:
        options: further arguments of :class:`TiTok`, such as ``l2_normalize``, ``mixed_latents`` or other numbers of heads.

    Raises:
        CheckpointError: unreadable file, or keys that do not fit.
    """
    state = unwrap(read_file(path), WRAPPERS)
    model = TiTok(**{**read_config(state), **options})
    ignore = () if model.config.clustering_decay is not None else (r"quantizer\.usage_average",)
    # buffers are statistics of training, which start anew where the file has none
    load_strictly(model, {**dict(model.named_buffers()), **convert(state)}, ignore, str(path))
    return model.eval()


def convert(state: Mapping[str, Tensor]) -> State:
    """Our keys and shapes."""
    if "decoder.ffn.2.weight" in state:
        heads = ((r"decoder\.ffn\.0\.(.*)", r"code_head.up.\1"), (r"decoder\.ffn\.2\.(.*)", r"code_head.down.\1"))
    else:
        heads = ((r"decoder\.ffn\.0\.(.*)", r"pixel_head.\1"),)  # type: ignore[assignment]
    if any(key.startswith("pixel_decoder.") for key in state):
        state = convert_decoder(state, "pixel_decoder")
    converted = rename(state, (*heads, *RULES))
    converted |= {key: converted[key].flatten() for key in _VECTORS if key in converted}
    return converted | {key: converted[key].flatten(1) for key in _LINEARS if key in converted}


def read_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments that the shapes of an official state dict tell, and those that the released models share."""
    num_tokens, encoder_dim = shape_of(state, "latent_tokens")
    decoder_dim, channels = shape_of(state, "decoder.decoder_embed.weight")
    patch = shape_of(state, "encoder.patch_embed.weight")[-1]
    image_size = math.isqrt(shape_of(state, "encoder.positional_embedding")[0] - 1) * patch
    config: dict[str, Any] = {
        "image_size": image_size,
        "patch_size": patch,
        "decoder_patch_size": image_size // math.isqrt(shape_of(state, "decoder.positional_embedding")[0] - 1),
        "num_tokens": num_tokens,
        "channels": channels,
        "encoder_dim": encoder_dim,
        "encoder_depth": depth_of(state, r"encoder\.transformer\.(\d+)\."),
        "encoder_heads": _heads("encoder", encoder_dim),
        "decoder_dim": decoder_dim,
        "decoder_depth": depth_of(state, r"decoder\.transformer\.(\d+)\."),
        "decoder_heads": _heads("decoder", decoder_dim),
        "codebook_size": None,
    }
    if "quantize.embedding.weight" in state:
        config["codebook_size"] = shape_of(state, "quantize.embedding.weight")[0]
    if "decoder.ffn.2.weight" in state:
        proxy_codes = shape_of(state, "decoder.ffn.2.weight")[0]
        config |= {"proxy_codes": proxy_codes, "mixed_latents": True, "l2_normalize": True}
    if "pixel_quantize.embedding.weight" in state:
        decoder = decoder_config(state, "pixel_decoder")
        config |= {"pixel_widths": decoder["widths"], "pixel_blocks": decoder["num_blocks"]}
        config["pixel_channels"] = shape_of(state, "pixel_quantize.embedding.weight")[1]
    if "decoder.text_guidance_proj.weight" in state:
        config["text_dim"] = shape_of(state, "decoder.text_guidance_proj.weight")[1]
        config["text_length"] = shape_of(state, "decoder.text_guidance_positional_embedding")[0]
    return config


def _heads(part: str, dim: int) -> int:
    """Heads of the preset with this width, else heads of 64 channels as they all have."""
    return next((p[f"{part}_heads"] for p in PRESETS.values() if p[f"{part}_dim"] == dim), max(dim // 64, 1))
