"""A small unCLIP pipeline trained from nothing: the classes of Stable Diffusion unCLIP at sizes for a CPU.

As a tokenizer it has one continuous token, the image embedding: :meth:`encode` is CLIP's image encoder, :meth:`decode` the
diffusion pipeline. One training pass serves its three parts, none of which sends a gradient into another: the image encoder learns
from captions (CLIP), the autoencoder from pixels, and the UNet to denoise latents given the image embedding.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from torch import Tensor, nn

from vargen.condition import TextFeatures
from vargen.errors import ConfigError, SpaceError, VargenError
from vargen.losses.contrastive import contrastive_loss
from vargen.model import TokenizerOutput, VisualTokenizer
from vargen.nn.gaussian import DiagonalGaussian
from vargen.nn.vit import Transformer, key_mask
from vargen.noise import Noise, as_noise
from vargen.space import TokenSpace
from vargen.tokenizers.seed.captions import SPECIAL, CaptionIds
from vargen.tokenizers.seed.unclip import UnCLIPDecoder, noised_embedding
from vargen.tokenizers.seed.vit import CLIP_MEAN, CLIP_STD, clip_normalize

PRESETS: dict[str, dict[str, Any]] = {"unclip-tiny": {}}

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
PROMPT_LENGTH = 4
# small models trained for minutes bear less of it than Stable Diffusion's
GUIDANCE_SCALE = 2.0


class CaptionTower(nn.Module):
    """Word ids to unit features ``(B, dim)``; only training needs it."""

    def __init__(self, vocab_size: int, length: int, width: int, depth: int, heads: int, dim: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.transformer = Transformer(depth, width, heads, final_norm=True)
        self.proj = nn.Linear(width, dim)
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, text: TextFeatures) -> Tensor:
        ids = text.features[..., 0].long()
        mask = key_mask(text.mask, batch_size=len(ids))
        x = self.transformer(self.words(ids) + self.positions[: ids.shape[1]], mask=mask)
        weight = text.mask.unsqueeze(-1).to(x.dtype)
        return F.normalize(self.proj((x * weight).sum(1) / weight.sum(1)), dim=-1)


class UnCLIP(VisualTokenizer):
    """Images to their CLIP embedding ``(B, 1, embedding_dim)``, and embeddings to images by diffusion.

    Args:
        sample_size: side of the images.
        embedding_dim: length of the embedding.
        patch_size, vision_dim, vision_depth, vision_heads: of the image encoder.
        words: vocabulary of the captions that it is trained with.
        vae_widths, latent_channels: of the autoencoder; the stride is 2 to the number of widths less one.
        unet_widths, unet_heads: of the denoiser, whose deeper levels attend.
        condition_dropout: share of training samples whose UNet sees zeros instead of the embedding.
        max_noise_level: embeddings are noised at a random level below it in training.
        kl_weight: of the autoencoder's KL term, per element.
    """

    takes_text = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        embedding_dim: int = 64,
        patch_size: int = 8,
        vision_dim: int = 64,
        vision_depth: int = 3,
        vision_heads: int = 4,
        words: list[str] | None = None,
        max_caption: int = 24,
        vae_widths: tuple[int, ...] = (16, 32),
        latent_channels: int = 4,
        unet_widths: tuple[int, ...] = (32, 64),
        unet_heads: int = 4,
        condition_dropout: float = 0.1,
        max_noise_level: int = 300,
        kl_weight: float = 1e-4,
    ) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__()
        stride = 2 ** (len(vae_widths) - 1)
        if sample_size % patch_size or sample_size % (stride * 2 ** (len(unet_widths) - 1)):
            raise ConfigError(f"sample_size {sample_size}: expected a multiple of the patch and of the UNet's stride")
        self.image_encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=vision_dim,
                intermediate_size=4 * vision_dim,
                projection_dim=embedding_dim,
                num_hidden_layers=vision_depth,
                num_attention_heads=vision_heads,
                image_size=sample_size,
                patch_size=patch_size,
            )
        )
        vocabulary = words or []
        self.text_encoder = CaptionIds(vocabulary, max_length=max_caption)
        self.caption_tower = CaptionTower(SPECIAL + len(vocabulary), max_caption, vision_dim, 2, vision_heads, embedding_dim)
        self.log_scale = nn.Parameter(torch.tensor(2.6593))  # log(1 / 0.07)
        levels = len(vae_widths)
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(vae_widths),
            latent_channels=latent_channels,
            norm_num_groups=8,
            sample_size=sample_size,
        )
        # the prompt is always empty: its states are a learned constant
        self.prompt_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=2,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=PROMPT_LENGTH,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
        deeper = len(unet_widths) - 1
        self.unet = UNet2DConditionModel(
            sample_size=sample_size // stride,
            in_channels=latent_channels,
            out_channels=latent_channels,
            block_out_channels=tuple(unet_widths),
            layers_per_block=1,
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * deeper,
            up_block_types=("CrossAttnUpBlock2D",) * deeper + ("UpBlock2D",),
            cross_attention_dim=32,
            attention_head_dim=unet_heads,
            norm_num_groups=16,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * embedding_dim,
        )
        self.stride = stride
        self.register_buffer("embedding_mean", torch.zeros(1, embedding_dim))
        self.register_buffer("embedding_std", torch.ones(1, embedding_dim))
        self.register_buffer("latent_std", torch.ones(()))

    embedding_mean: Tensor
    embedding_std: Tensor
    latent_std: Tensor

    @property
    def space(self) -> TokenSpace:
        return TokenSpace(levels=((1,),), channels=self.config.embedding_dim)

    @property
    def sample_shape(self) -> tuple[int, int]:
        return (self.config.sample_size, self.config.sample_size)

    def check_text(self, text: TextFeatures | None, batch_size: int) -> None:
        """As in the base, but only the training pass needs captions."""
        if text is not None:
            super().check_text(text, batch_size)

    def check_pixels(self, pixels: Tensor, text: TextFeatures | None = None) -> Tensor:
        super().check_pixels(pixels, text)
        if tuple(pixels.shape[2:]) != self.sample_shape:
            raise VargenError(f"UnCLIP: pixels of {tuple(pixels.shape[2:])}, expected {self.sample_shape}; resize first")
        return pixels

    def embed(self, pixels: Tensor) -> Tensor:
        return self.image_encoder(pixel_values=clip_normalize(pixels)).image_embeds

    def encode(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        """Pixels to embeddings ``(B, 1, embedding_dim)``."""
        return self.embed(self.check_pixels(pixels, text)).unsqueeze(1)

    def decode(self, tokens: Tensor, text: TextFeatures | None = None, noise: Noise | None = None, **options: Any) -> Tensor:
        """Embeddings to pixels; ``options`` as of :class:`UnCLIPDecoder`, whose guidance is weaker here by default."""
        if tokens.dim() != 3:
            raise SpaceError(f"tokens of shape {tuple(tokens.shape)}: expected (B, 1, {self.config.embedding_dim})")
        embeddings = self.space.check(tokens).squeeze(1)
        return UnCLIPDecoder(self.pipeline(), GUIDANCE_SCALE)(embeddings, noise, **options)

    def pipeline(self) -> StableUnCLIPImg2ImgPipeline:
        """The diffusers pipeline of these weights, to be saved or drawn with."""
        from transformers import CLIPImageProcessor, CLIPTokenizer

        side = self.config.sample_size
        normalizer = StableUnCLIPImageNormalizer(self.config.embedding_dim)
        normalizer.mean.data, normalizer.std.data = self.embedding_mean.clone(), self.embedding_std.clone()
        self.vae.register_to_config(scaling_factor=float(1 / self.latent_std))
        tokenizer = CLIPTokenizer(vocab={BEGIN: 0, END: 1}, merges=[], model_max_length=PROMPT_LENGTH)
        processor = CLIPImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=list(CLIP_MEAN),
            image_std=list(CLIP_STD),
        )
        return StableUnCLIPImg2ImgPipeline(
            feature_extractor=processor,
            image_encoder=self.image_encoder,
            image_normalizer=normalizer.to(self.device, self.dtype),
            image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            tokenizer=tokenizer,
            text_encoder=self.prompt_encoder,
            unet=self.unet,
            scheduler=DDIMScheduler.from_config(_chain().config),
            vae=self.vae,
        )

    def forward(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> TokenizerOutput:
        """The training pass of all parts."""
        if text is None:
            raise VargenError("UnCLIP's image encoder learns from captions: pass text=model.text_encoder.encode(captions)")
        self.check_pixels(pixels, text)
        noise = as_noise(noise, len(pixels), pixels.device)
        embeddings = self.embed(pixels)
        contrastive = contrastive_loss(F.normalize(embeddings, dim=-1), self.caption_tower(text), 1 / self.log_scale.exp())
        posterior = DiagonalGaussian.from_moments(self.vae.encode(pixels).latent_dist.parameters, dim=1)
        latents = posterior.sample(noise.normal("posterior", posterior.mean.shape[1:]))
        if self.training:
            self._track(embeddings.detach(), latents.detach())
        losses = {
            "contrastive": contrastive,
            "kl": self.config.kl_weight * posterior.kl().mean(),
            "denoising": self._denoising(latents.detach(), embeddings.detach(), noise),
        }
        return TokenizerOutput(embeddings.unsqueeze(1), self.vae.decode(latents).sample, losses)

    def _denoising(self, latents: Tensor, embeddings: Tensor, noise: Noise) -> Tensor:
        """Error of the predicted velocity at one random time per image."""
        chain, blur = _chain(), DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        level = noise.integers("level", self.config.max_noise_level)
        draws = noise.normal("embedding", embeddings.shape[1:])
        rows = zip(embeddings.split(1), draws.split(1), level.tolist(), strict=True)
        condition = torch.cat([noised_embedding(e, n, at, self._normalizer(), blur) for e, n, at in rows])
        condition = condition.masked_fill(noise.bernoulli("null", self.config.condition_dropout)[:, None], 0.0)
        t = noise.integers("time", chain.config.num_train_timesteps)
        scaled, normal = latents / self.latent_std, noise.normal("latent", latents.shape[1:])
        ids = torch.tensor([[0, *[1] * (PROMPT_LENGTH - 1)]], device=latents.device)
        prompt = self.prompt_encoder(input_ids=ids).last_hidden_state.expand(len(latents), -1, -1)
        predicted = self.unet(chain.add_noise(scaled, normal, t), t, prompt, class_labels=condition).sample
        return F.mse_loss(predicted.float(), chain.get_velocity(scaled, normal, t))

    def _normalizer(self) -> Any:
        return _Statistics(self.embedding_mean, self.embedding_std)

    @torch.no_grad()
    def _track(self, embeddings: Tensor, latents: Tensor, decay: float = 0.99) -> None:
        """Moving statistics by which the pipeline normalises embeddings and latents."""
        self.embedding_mean.lerp_(embeddings.mean(0, keepdim=True), 1 - decay)
        self.embedding_std.lerp_(embeddings.std(0, keepdim=True).clamp(min=1e-3), 1 - decay)
        self.latent_std.lerp_(latents.std(), 1 - decay)

    @torch.no_grad()
    def scores(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> dict[str, Tensor]:
        """PSNR of the autoencoder, and whether an image finds its caption among those of the batch (chance 1 / B)."""
        moments = self.vae.encode(self.check_pixels(pixels, text)).latent_dist.mean
        error = (self.vae.decode(moments).sample.clamp(-1, 1) - pixels).square().flatten(1).mean(1)
        scores = {"vae_psnr": 10 * torch.log10(4 / error.clamp(min=1e-10))}
        if text is not None:
            similarity = F.normalize(self.embed(pixels), dim=-1) @ self.caption_tower(text).T
            partner = torch.arange(len(pixels), device=pixels.device)
            scores["image_to_text"] = (similarity.argmax(-1) == partner).float()
        return scores


def load_decoder(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> UnCLIPDecoder:
    """The decoder of a diffusers pipeline (directory or hub id), or of an :class:`UnCLIP` of ours (directory).

    Raises:
        CheckpointError: neither.
    """
    file = Path(path) / "config.json"
    if file.is_file() and json.loads(file.read_text()).get("_class_name") == UnCLIP.__name__:
        return UnCLIPDecoder(UnCLIP.from_pretrained(path).to(device).eval().pipeline(), GUIDANCE_SCALE)
    return UnCLIPDecoder.from_pretrained(path, device)


class _Statistics:
    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.mean, self.std = mean, std


def _chain() -> DDPMScheduler:
    """The latents' noise: Stable Diffusion 2.1's. Latents, unlike pixels, have no range to clip to."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False
    )
