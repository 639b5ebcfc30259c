"""Tables of what there is: public names, systems with their presets, bundled models. Nothing heavy is imported here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from vargen.errors import ConfigError, nearest

PRESETS_ATTRIBUTE = "PRESETS"

# public name -> module that defines it; `vargen.<name>` resolves lazily through this table
PUBLIC: dict[str, str] = {
    "CLIPTextEncoder": "vargen.text",
    "Condition": "vargen.condition",
    "ECAR": "vargen.backbones.ecar",
    "EagleDrafter": "vargen.backbones.drafter",
    "FlexTok": "vargen.tokenizers.flextok",
    "FrameTokenizer": "vargen.tokenizers.frames",
    "FeatureNet": "vargen.metrics.features",
    "Engine": "vargen.decoding.engine",
    "GridTokenizer": "vargen.tokenizers.grid",
    "Guidance": "vargen.guidance",
    "HiMAR": "vargen.backbones.himar",
    "KLTokenizer": "vargen.tokenizers.kl",
    "LARPTokenizer": "vargen.tokenizers.larp",
    "FlexTokGenerator": "vargen.backbones.flextok",
    "LARPGenerator": "vargen.backbones.larp",
    "Lantern": "vargen.decoding.lantern",
    "LlamaGen": "vargen.backbones.llamagen",
    "MAR": "vargen.backbones.mar",
    "MaskGITVQGAN": "vargen.tokenizers.titok_vqgan",
    "MingTok": "vargen.tokenizers.mingtok",
    "ModelMixin": "diffusers.models.modeling_utils",
    "MaskGIT": "vargen.backbones.maskgit",
    "NAR": "vargen.backbones.nar",
    "NBP": "vargen.backbones.nbp",
    "NBPTokenizer": "vargen.tokenizers.nbp",
    "Noise": "vargen.noise",
    "Order": "vargen.order",
    "PyramidTokenizer": "vargen.tokenizers.pyramid",
    "Sampling": "vargen.model",
    "SeedEmbedder": "vargen.tokenizers.seed.embedder",
    "SeedTokenizer": "vargen.tokenizers.seed.tokenizer",
    "T5TextEncoder": "vargen.text",
    "TexTok": "vargen.tokenizers.textok",
    "TextFeatures": "vargen.condition",
    "TiTok": "vargen.tokenizers.titok",
    "TokenSpace": "vargen.space",
    "UnCLIP": "vargen.tokenizers.seed.unclip_training",
    "VQTokenizer": "vargen.tokenizers.vq",
    "VisualARPipeline": "vargen.pipeline",
    "WordEncoder": "vargen.text",
    "build_dataset": "vargen.data.base",
    "XAR": "vargen.backbones.xar",
}


@dataclass(frozen=True)
class System:
    """One system of the literature.

    Attributes:
        name: key in configurations and on the command line.
        kind: ``tokenizer``, ``generator`` or ``drafter``.
        model: public class name.
        paper: title and arXiv number.
        official: module of its checkpoint adapter, with ``load(path, **options) -> model``; None if nothing was released.
        checkpoints: released files, as the hub names them.
    """

    name: str
    kind: str
    model: str
    paper: str
    official: str | None = None
    checkpoints: tuple[str, ...] = ()

    def load_class(self) -> Any:
        return load_public(self.model)

    @property
    def presets(self) -> dict[str, dict[str, Any]]:
        return getattr(importlib.import_module(PUBLIC[self.model]), PRESETS_ATTRIBUTE, {})


SYSTEMS: dict[str, System] = {
    s.name: s
    for s in (
        System(
            "llamagen-vq",
            "tokenizer",
            "VQTokenizer",
            "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation, arXiv 2406.06525",
            "vargen.official.llamagen_vq",
            ("FoundationVision/LlamaGen: vq_ds16_c2i.pt, vq_ds8_c2i.pt", "peizesun/llamagen_t2i: vq_ds16_t2i.pt"),
        ),
        System(
            "llamagen",
            "generator",
            "LlamaGen",
            "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation, arXiv 2406.06525",
            "vargen.official.llamagen",
            (
                "FoundationVision/LlamaGen: c2i_{B,L}_{256,384}.pt, c2i_{XL,XXL,3B}_384.pt",
                "peizesun/llamagen_t2i: t2i_XL_stage1_256.pt, t2i_XL_stage2_512.pt",
            ),
        ),
        System(
            "maskgit",
            "generator",
            "MaskGIT",
            "An Image is Worth 32 Tokens for Reconstruction and Generation, arXiv 2406.07550",
            "vargen.official.maskgit",
            ("yucornetto/generator_titok_{l32,b64,s128}_imagenet",),
        ),
        System(
            "nar",
            "generator",
            "NAR",
            "Neighboring Autoregressive Modeling for Efficient Visual Generation, arXiv 2503.10696",
            "vargen.official.nar",
            (
                "chenfeng1271/NAR-imagenet-256-{B,L,XXL}, yefly/NAR-imagenet-256-{M,XL}",
                "yefly/NAR-XL-t2i-stage1, NAR-XL-t2i-stage2",
                "chenfeng1271/NAR-ucf101-256-{L,LP}",
            ),
        ),
        System(
            "nbp-tokenizer",
            "tokenizer",
            "NBPTokenizer",
            "Next Block Prediction: Video Generation via Semi-Autoregressive Modeling, arXiv 2502.07737",
            "vargen.official.nbp_tokenizer",
            ("ShuhuaiRen/NBP-tokenizer-ucf: magvit2_ucf.pt", "ShuhuaiRen/NBP-tokenizer-k600: magvit2_k600.pt"),
        ),
        System(
            "nbp",
            "generator",
            "NBP",
            "Next Block Prediction: Video Generation via Semi-Autoregressive Modeling, arXiv 2502.07737",
            "vargen.official.nbp",
            ("ShuhuaiRen/NBP-ucf-{base,3b}, NBP-k600-{base,3b}",),
        ),
        System(
            "frames",
            "tokenizer",
            "FrameTokenizer",
            "Any tokenizer of images, frame by frame",
        ),
        System(
            "flextok-ar",
            "generator",
            "FlexTokGenerator",
            "FlexTok: Resampling Images into 1D Token Sequences of Flexible Length, arXiv 2502.13967",
        ),
        System(
            "larp",
            "generator",
            "LARPGenerator",
            "LARP: Tokenizing Videos with a Learned Autoregressive Generative Prior, arXiv 2410.21264",
            "vargen.official.larp",
            ("hywang66/LARP-L-long-AR", "hywang66/LARP-L-long-AR-FP"),
        ),
        System(
            "lantern",
            "drafter",
            "EagleDrafter",
            "LANTERN: Accelerating Visual Autoregressive Models with Relaxed Speculative Decoding, arXiv 2410.03355; LANTERN++, "
            "arXiv 2502.06352",
            "vargen.official.lantern",
            ("jadohu/{llamagen,llamagen2}_drafter", "jadohu/LlamaGen-T2I, LlamaGen-T2I-2 (LlamaGen's text-conditional models)"),
        ),
        System(
            "titok",
            "tokenizer",
            "TiTok",
            "An Image is Worth 32 Tokens for Reconstruction and Generation, arXiv 2406.07550; Democratizing Text-to-Image Masked "
            "Generative Models with Compact Text-Aware One-Dimensional Tokens, arXiv 2501.07730",
            "vargen.official.titok",
            (
                "yucornetto/tokenizer_titok_{l32,b64,s128}_imagenet",
                "yucornetto/tokenizer_titok_{bl64_vq8k,bl128_vq8k,sl256_vq8k,ll32_vae_c16,bl64_vae_c16,bl128_vae_c16}_imagenet",
                "turkeyju/tokenizer_tatitok_{bl32_vq,bl64_vq,bl128_vq,bl32_vae,bl64_vae,sl128_vae}",
            ),
        ),
        System(
            "maskgit-vqgan",
            "tokenizer",
            "MaskGITVQGAN",
            "MaskGIT: Masked Generative Image Transformer, arXiv 2202.04200",
            "vargen.official.titok_vqgan",
            ("fun-research/TiTok: maskgit-vqgan-imagenet-f16-256.bin",),
        ),
        System(
            "textok",
            "tokenizer",
            "TexTok",
            "Language-Guided Image Tokenization for Generation, arXiv 2412.05796",
        ),
        System(
            "mingtok",
            "tokenizer",
            "MingTok",
            "Ming-UniVision: Joint Image Understanding and Generation with a Unified Continuous Tokenizer, arXiv 2510.06590",
            "vargen.official.mingtok",
            ("inclusionAI/MingTok-Vision", "inclusionAI/Ming-UniVision-16B-A3B"),
        ),
        System(
            "larp-tokenizer",
            "tokenizer",
            "LARPTokenizer",
            "LARP: Tokenizing Videos with a Learned Autoregressive Generative Prior, arXiv 2410.21264",
            "vargen.official.larp_tokenizer",
            ("hywang66/LARP-L-long-tokenizer",),
        ),
        System(
            "seed",
            "tokenizer",
            "SeedTokenizer",
            "Planting a SEED of Vision in Large Language Model, arXiv 2307.08041; Making LLaMA SEE and Draw with SEED Tokenizer, "
            "arXiv 2310.01218",
            "vargen.official.seed",
            ("AILab-CVC/seed-tokenizer-2: seed_quantizer.pt",),
        ),
        System(
            "seed-embedder",
            "tokenizer",
            "SeedEmbedder",
            "Planting a SEED of Vision in Large Language Model (first training stage), arXiv 2307.08041",
            "vargen.official.seed",
        ),
        System(
            "flextok",
            "tokenizer",
            "FlexTok",
            "FlexTok: Resampling Images into 1D Token Sequences of Flexible Length, arXiv 2502.13967",
            "vargen.official.flextok",
            ("EPFL-VILAB/flextok_{d12_d12,d18_d18,d18_d28}_in1k", "EPFL-VILAB/flextok_d18_d28_dfn"),
        ),
        System(
            "unclip",
            "tokenizer",
            "UnCLIP",
            "Hierarchical Text-Conditional Image Generation with CLIP Latents, arXiv 2204.06125",
        ),
        System(
            "kl16",
            "tokenizer",
            "KLTokenizer",
            "Autoregressive Image Generation without Vector Quantization, arXiv 2406.11838",
            "vargen.official.kl16",
            ("MAR: kl16.ckpt",),
        ),
        System(
            "mar",
            "generator",
            "MAR",
            "Autoregressive Image Generation without Vector Quantization, arXiv 2406.11838",
            "vargen.official.mar",
            ("MAR: mar_{base,large,huge}/checkpoint-last.pth",),
        ),
        System(
            "himar",
            "generator",
            "HiMAR",
            "Hierarchical Masked Autoregressive Models with Low-Resolution Token Pivots, arXiv 2505.20288",
            "vargen.official.himar",
            ("HiDream-ai/Hi-MAR: Hi-MAR-{B,L,H}/checkpoint-last.pth",),
        ),
        System(
            "xar",
            "generator",
            "XAR",
            "Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation, arXiv 2502.20388",
            "vargen.official.xar",
            ("OliverRen/xAR: xAR-{B,L,H}.pth",),
        ),
        System(
            "ecar",
            "generator",
            "ECAR",
            "E-CAR: Efficient Continuous Autoregressive Image Generation via Multistage Modeling, arXiv 2412.14170",
        ),
    )
}

# bundled models: name -> directory under vargen/assets
BUNDLED: dict[str, str] = {"digits": "digits", "shapes": "shapes", "motion": "motion"}


def load_public(name: str) -> Any:
    """The public class or function called ``name``."""
    if name not in PUBLIC:
        raise ConfigError(f"vargen has no '{name}'{nearest(name, PUBLIC)}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def system(name: str) -> System:
    """The system called ``name``; raises ConfigError naming the nearest one."""
    if name not in SYSTEMS:
        raise ConfigError(f"unknown system '{name}'{nearest(name, SYSTEMS)}")
    return SYSTEMS[name]
