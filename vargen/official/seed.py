"""SEED's released tokenizer (``seed_quantizer.pt``) and the checkpoints of its two training stages."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vargen.checkpoint import State, load_strictly, read_file, rename, unwrap
from vargen.errors import CheckpointError
from vargen.official.fuse import fuse
from vargen.tokenizers.seed.causal import CausalEmbedder
from vargen.tokenizers.seed.embedder import SeedEmbedder
from vargen.tokenizers.seed.tokenizer import SeedTokenizer

WRAPPERS = ("model", "state_dict", "module")


def _bert(theirs: str, ours: str) -> tuple[tuple[str, str], ...]:
    layer = rf"{theirs}\.bert\.encoder\.layer\.(\d+)\."
    return (
        (rf"{theirs}\.bert\.embeddings\.LayerNorm\.(.*)", rf"{ours}.norm.\1"),
        (rf"{theirs}\.bert\.embeddings\.word_embeddings\.(.*)", rf"{ours}.words.\1"),
        (rf"{theirs}\.bert\.embeddings\.position_embeddings\.(.*)", rf"{ours}.positions.\1"),
        (rf"{layer}attention\.qkv\.(.*)", rf"{ours}.layers.\1.attn.qkv.\2"),
        (rf"{layer}attention\.output\.dense\.(.*)", rf"{ours}.layers.\1.attn.out.\2"),
        (rf"{layer}attention\.output\.LayerNorm\.(.*)", rf"{ours}.layers.\1.norm.\2"),
        (rf"{layer}crossattention\.self\.query\.(.*)", rf"{ours}.layers.\1.cross.q.\2"),
        (rf"{layer}crossattention\.kv\.(.*)", rf"{ours}.layers.\1.cross.kv.\2"),
        (rf"{layer}crossattention\.output\.dense\.(.*)", rf"{ours}.layers.\1.cross.out.\2"),
        (rf"{layer}crossattention\.output\.LayerNorm\.(.*)", rf"{ours}.layers.\1.norm_cross.\2"),
        (rf"{layer}intermediate_query\.dense\.(.*)", rf"{ours}.layers.\1.feed.mlp.up.\2"),
        (rf"{layer}output_query\.dense\.(.*)", rf"{ours}.layers.\1.feed.mlp.down.\2"),
        (rf"{layer}output_query\.LayerNorm\.(.*)", rf"{ours}.layers.\1.feed.norm.\2"),
        (rf"{layer}intermediate\.dense\.(.*)", rf"{ours}.text_feeds.\1.mlp.up.\2"),
        (rf"{layer}output\.dense\.(.*)", rf"{ours}.text_feeds.\1.mlp.down.\2"),
        (rf"{layer}output\.LayerNorm\.(.*)", rf"{ours}.text_feeds.\1.norm.\2"),
    )


def _vit(theirs: str, ours: str) -> tuple[tuple[str, str], ...]:
    return (
        (rf"{theirs}\.(\d+\.(?:norm[12]|attn\.qkv)\..*)", rf"{ours}.transformer.blocks.\1"),
        (rf"{theirs}\.(\d+\.attn)\.proj\.(.*)", rf"{ours}.transformer.blocks.\1.out.\2"),
        (rf"{theirs}\.(\d+\.mlp)\.fc1\.(.*)", rf"{ours}.transformer.blocks.\1.up.\2"),
        (rf"{theirs}\.(\d+\.mlp)\.fc2\.(.*)", rf"{ours}.transformer.blocks.\1.down.\2"),
    )


RULES: tuple[tuple[str, str], ...] = (
    *_vit(r"visual_encoder\.blocks", "vision"),
    (r"visual_encoder\.cls_token", "vision.class_token"),
    (r"visual_encoder\.pos_embed", "vision.positions"),
    (r"visual_encoder\.patch_embed\.(proj\..*)", r"vision.patches.\1"),
    (r"ln_vision\.(.*)", r"vision.norm.\1"),
    (r"query_tokens", "qformer.queries"),
    *_bert("Qformer", "qformer"),
    (r"vision_proj\.(.*)", r"image_proj.\1"),
    (r"temp", "temperature_"),
    (r"encode_task_layer\.0\.(.*)", r"to_code.up.\1"),
    (r"encode_task_layer\.2\.(.*)", r"to_code.down.\1"),
    (r"decode_task_layer\.0\.(.*)", r"from_code.up.\1"),
    (r"decode_task_layer\.2\.(.*)", r"from_code.down.\1"),
    (r"quantize\.embedding\.weight", "quantizer.codebook"),
    (r"pos_embed", "causal_decoder.positions"),
    *_vit("blocks", "causal_decoder"),
    (r"pos_embed_image", "image_decoder.positions"),
    *_vit("blocks_image", "image_decoder"),
    (r"image_down\.0\.(.*)", r"image_head.down.0.\1"),
    (r"image_down\.2\.(.*)", r"image_head.down.1.\1"),
    (r"image_down\.4\.(.*)", r"image_head.down.2.\1"),
    (r"distill_image_proj\.(.*)", r"image_head.proj.\1"),
    (r"reverse_tokens", "image_head.qformer.queries"),
    *_bert("Reverse_Qformer", "image_head.qformer"),
)
# number of leading axes of length one that ours do not have
SQUEEZED = {
    "vision.class_token": 2,
    "vision.positions": 1,
    "qformer.queries": 1,
    "causal_decoder.positions": 1,
    "image_decoder.positions": 1,
    "image_head.qformer.queries": 1,
}
# what the text branch leaves in files of the second stage, BERT's language head, BLIP-2's matching head, the ends of EVA-CLIP
IGNORE = (
    r".*\.position_ids",
    r"(Reverse_)?Qformer\.cls\..*",
    r"itm_head\..*",
    r"visual_encoder\.(norm|fc_norm|head|rel_pos_bias)\..*",
)
TEXT = (r"qformer\.(words|positions|text_feeds)\..*", r"image_head\.qformer\.(words|positions|text_feeds)\..*")


def load(
    path: str | os.PathLike[str],
    base: Sequence[str | os.PathLike[str]] = (),
    vision_heads: int | None = None,
    heads: int | None = None,
    decoder_heads: int = 12,
    unclip: str | None = None,
) -> SeedTokenizer | SeedEmbedder:
    """SEED from its released file or a training checkpoint, sizes read from the tensors.

    Args:
        base: files with the frozen parts that ``path`` lacks, such as ``eva_vit_g.pth``; ``path`` wins where both have a tensor.
        vision_heads, heads: attention heads of the image encoder and the Q-Formers; by default of 88 and 64 channels as released.
        decoder_heads: of the blocks behind the codebook.
        unclip: directory or hub id of the pipeline that the tokenizer is to draw with, such as
            ``stabilityai/stable-diffusion-2-1-unclip``; remembered, and loaded when it first draws.

    Returns:
        A SeedEmbedder for a checkpoint of the first stage, which has a projection of text, else a SeedTokenizer.

    Raises:
        CheckpointError: unreadable file, a missing image encoder, or keys that do not fit.
    """
    state: State = {}
    for file in (*base, path):
        state |= _prefixed(unwrap(read_file(file), WRAPPERS))
    if "visual_encoder.cls_token" not in state:
        raise CheckpointError(f"'{path}' holds no image encoder: pass base=[the path of eva_vit_g.pth]")
    model_class, config = read_config(state, vision_heads, heads, decoder_heads)
    if unclip is not None:
        if model_class is SeedEmbedder:
            raise CheckpointError(f"'{path}' is of the first stage, whose embeddings no unCLIP draws: leave unclip out")
        config["unclip"] = unclip
    model = model_class(**config)
    ignore = IGNORE if model_class is SeedEmbedder else (*IGNORE, *TEXT)
    renamed = {k: v for k, v in rename_keys(state).items() if not any(re.fullmatch(p, k) for p in ignore)}
    depth = config["vision_depth"]
    extra = rf"vision\.transformer\.blocks\.{depth}\..*"
    load_strictly(model, renamed, (extra,), str(path))
    return model.eval()


def _prefixed(state: State) -> State:
    """Image encoders on their own lack the prefix that they have in the whole."""
    alone = "blocks.0.attn.q_bias" in state
    return {f"visual_encoder.{k}": v for k, v in state.items()} if alone else state


def rename_keys(state: Mapping[str, Tensor]) -> State:
    """Official keys to ours, with separate projections fused and the zero bias of the image encoder's keys spelled out."""
    state = dict(state)
    for key in [k for k in state if k.endswith("attn.q_bias")]:
        q, v = state.pop(key), state.pop(key.replace("q_bias", "v_bias"))
        state[key.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    state = fuse(state, [rf"attention\.self\.{name}" for name in ("query", "key", "value")], "attention.qkv")
    state = fuse(state, [rf"crossattention\.self\.{name}" for name in ("key", "value")], "crossattention.kv")
    renamed = rename(state, RULES)
    for name, axes in SQUEEZED.items():
        if name in renamed:
            renamed[name] = renamed[name].reshape(renamed[name].shape[axes:])
    return renamed


def read_config(
    state: Mapping[str, Tensor], vision_heads: int | None, heads: int | None, decoder_heads: int
) -> tuple[type[CausalEmbedder], dict[str, Any]]:
    """The class and its constructor arguments."""

    def size(key: str, axis: int = 0) -> int:
        if key not in state:
            raise CheckpointError(f"key '{key}' is missing: this is not a checkpoint of SEED")
        return state[key].shape[axis]

    def depth(prefix: str) -> int:
        return len({m.group(1) for m in (re.match(rf"{prefix}\.(\d+)\.", k) for k in state) if m})

    vision_dim, dim = size("visual_encoder.cls_token", -1), size("query_tokens", -1)
    patch = size("visual_encoder.patch_embed.proj.weight", -1)
    side = round((size("visual_encoder.pos_embed", 1) - 1) ** 0.5)
    config: dict[str, Any] = {
        "image_size": side * patch,
        "patch_size": patch,
        "vision_dim": vision_dim,
        # the released encoder file may still have the last of EVA-CLIP's 40 blocks, which SEED does not use
        "vision_depth": min(depth(r"visual_encoder\.blocks"), 39),
        "vision_heads": vision_heads or vision_dim // 88,
        "vision_mlp": size("visual_encoder.blocks.0.mlp.fc1.weight"),
        "num_queries": size("query_tokens", 1),
        "dim": dim,
        "depth": depth(r"Qformer\.bert\.encoder\.layer"),
        "heads": heads or dim // 64,
        "mlp_hidden": size("Qformer.bert.encoder.layer.0.intermediate_query.dense.weight"),
        # the published code is causal for exactly 32 queries
        "causal": size("query_tokens", 1) == 32,
    }
    if "text_proj.weight" in state:
        words, positions = (f"Qformer.bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position"))
        return SeedEmbedder, {
            **config,
            "vocab_size": size(words),
            "max_text": size(positions),
            "feature_dim": size("text_proj.weight"),
        }
    config |= {
        "codebook_size": size("quantize.embedding.weight"),
        "code_dim": size("quantize.embedding.weight", 1),
        "decoder_depth": depth("blocks_image"),
        "decoder_heads": decoder_heads,
        "embedding_dim": size("distill_image_proj.weight"),
    }
    if "reverse_tokens" in state:
        reverse = depth(r"Reverse_Qformer\.bert\.encoder\.layer")
        config |= {"head": "qformer", "head_depth": reverse, "embedding_tokens": size("reverse_tokens", 1)}
    return SeedTokenizer, config
