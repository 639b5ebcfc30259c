"""SEED's tokenizer: image encoder, Q-Formers, de-tokeniser, and the losses of both stages."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.runner import Case, RecordedNoise, capture, checkpoint_file, component
from vargen.condition import TextFeatures
from vargen.losses.contrastive import contrastive_loss
from vargen.official.seed import load, rename_keys
from vargen.tokenizers.seed.tokenizer import SeedTokenizer
from vargen.tokenizers.seed.unclip import guidance_conditions, guided
from vargen.tokenizers.seed.vit import VisionEncoder


def build(case: Case) -> Any:
    c = case.config
    with checkpoint_file(case.state32(), wrapper="model") as path:
        return load(
            path,
            vision_heads=c["visual_encoder"]["num_heads"],
            heads=c["bert"]["num_attention_heads"],
            decoder_heads=c.get("blocks_num_heads", 12),
        )


@component("seed", "vit")
@torch.no_grad()
def vit(case: Case) -> dict[str, Tensor]:
    c = case.config
    hidden = int(c["embed_dim"] * c["mlp_ratio"])
    vision = VisionEncoder(c["img_size"], c["patch_size"], c["embed_dim"], c["depth"], c["num_heads"], hidden).eval()
    vision.load_state_dict({k.removeprefix("vision."): v for k, v in rename_keys(case.state32()).items()})
    blocks = {f"after_block{i}": f"transformer.blocks.{i}" for i in range(c["depth"])}
    with capture(vision, {**blocks, "features": "transformer", "patch_embed": "patches"}) as taken:
        normed = vision(case.inputs["image"])
    return {**taken, "ln_vision": normed, "embedded": vision.embed(case.inputs["image"])}


@component("seed", "qformer")
@component("seed", "reverse-qformer")
@torch.no_grad()
def qformer(case: Case) -> dict[str, Tensor]:
    model: SeedTokenizer = build(case)
    ids = case.inputs["ids"]
    layers = {f"qformer_layer{i}": f"qformer.layers.{i}" for i in range(model.config.depth)}
    with capture(model, {**layers, "qformer_embeddings": "qformer.norm"}) as taken:
        image_embeds = model.vision(case.inputs["image"])
        causal = model.qformer(image_embeds)
    z = model.to_code(causal)
    q = model.quantizer(z)
    names = {
        "decode_up": "from_code",
        "decode_blocks_out": "image_decoder",
        "decode_after_block0": "image_decoder.transformer.blocks.0",
    }
    if model.config.head == "qformer":
        names["reverse_output"] = "image_head.qformer"
    with capture(model, names) as decoded:
        from_ids = model.embed(ids)
    return {
        **taken,
        **decoded,
        "qformer_embeddings": taken["qformer_embeddings"].expand(len(causal), -1, -1),
        "image_embeds": image_embeds,
        "query_output": causal,
        "query_output_down": z,
        "indices": q.indices,
        "quant": q.quantized,
        "loss_embed": q.losses["codebook"] + q.losses["commitment"],
        "query_output_up": model.from_code(q.quantized),
        "decode_codes": model.quantizer.lookup(ids),
        "image_embed_from_ids": from_ids,
        "image_embed_from_image": model.embed(q.indices),
    }


@component("seed", "losses-stage1")
@torch.no_grad()
def first_stage(case: Case) -> dict[str, Tensor]:
    model = build(case)
    text = TextFeatures(case.inputs["input_ids"].unsqueeze(-1).float(), case.inputs["attention_mask"].bool())
    causal = model.qformer(model.vision(case.inputs["image"]))
    image, caption = model.image_features(causal), model.text_features(text)
    loss = contrastive_loss(image, caption, model.temperature_, model.config.label_smoothing)
    return {
        "query_output": causal,
        "image_feat": image,
        "text_hidden": model.text_hidden(text),
        "text_feat": caption,
        "sim_i2t": image @ caption.T / model.temperature_,
        "sim_t2i": caption @ image.T / model.temperature_,
        "loss_itc": loss,
        "loss": loss,
    }


@component("seed", "losses-stage2")
def second_stage(case: Case) -> dict[str, Tensor]:
    model: SeedTokenizer = build(case)
    with torch.no_grad():
        causal = model.qformer(model.vision(case.inputs["image"]))
    with capture(model, {"recon_s": "causal_decoder"}) as taken:
        out = model.train_on(causal)
    prediction = out.features["image_teacher"].squeeze(1)
    distil = 0.5 * F.mse_loss(prediction, case.inputs["clip_image_embeds"])
    loss = sum(out.losses.values()) + distil
    wanted = (model.quantizer.codebook, model.to_code.down.weight)
    codebook, encode = torch.autograd.grad(loss, wanted)
    return {
        "query_output": causal,
        "indices": out.tokens,
        "recon_s": taken["recon_s"],
        "image_pred": prediction,
        "loss_embed": out.losses["codebook"] + out.losses["commitment"],
        "loss_recon_s": out.losses["causal"],
        "loss_distil_image": distil,
        "loss": loss,
        "grad_codebook_x1000": 1000 * codebook,
        "grad_encode_out_x100": 100 * encode,
    }


@component("seed", "detokenizer")
@torch.no_grad()
def detokenizer(case: Case) -> dict[str, Tensor]:
    from diffusers import DDPMScheduler
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    normalizer = StableUnCLIPImageNormalizer(case.config["embedding_dim"])
    normalizer.load_state_dict({k.removeprefix("image_normalizer."): v for k, v in case.state32().items()})
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    x = case.inputs
    noise = RecordedNoise({"embedding": x["noise"], "negative_embedding": x["noise_negative"]}, len(x["noise"]))
    arguments = (x["image_embeds"], noise, normalizer, scheduler, case.config["noise_level"])
    return {
        "class_labels": guidance_conditions(*arguments),
        "class_labels_negative": guidance_conditions(*arguments, negative=x["negative_image_embeds"]),
        "guided": guided(x["unet_out"], case.config["guidance_scale"]),
    }
