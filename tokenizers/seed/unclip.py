"""Images from image embeddings by an unCLIP diffusion pipeline of diffusers (Ramesh et al., 2022; Stable Diffusion 2.1 unCLIP)."""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch
from torch import Tensor

from vargen.errors import CheckpointError, VargenError
from vargen.nn.embed import timestep_sinusoid
from vargen.noise import Noise, as_noise


class Normalizer(Protocol):
    """Mean and standard deviation of embeddings, ``(1, C)``."""

    mean: Tensor
    std: Tensor


class NoisingScheduler(Protocol):
    """The chain whose first levels blur embeddings; diffusers' ``DDPMScheduler``."""

    alphas_cumprod: Tensor


def noised_embedding(embedding: Tensor, noise: Tensor, level: int, normalizer: Normalizer, scheduler: NoisingScheduler) -> Tensor:
    """The UNet's condition ``(B, 2 C)``: the embedding, noised at ``level`` on its normalised scale, and the level's sinusoid.

    Level 0 is the first step of the chain and adds a little noise too.
    """
    if not 0 <= level < len(scheduler.alphas_cumprod):
        raise VargenError(f"noise_level {level}: expected 0..{len(scheduler.alphas_cumprod) - 1}")
    mean, std = normalizer.mean.to(embedding), normalizer.std.to(embedding)
    survival = scheduler.alphas_cumprod[level].to(embedding)
    scaled = survival.sqrt() * (embedding - mean) / std + (1 - survival).sqrt() * noise.to(embedding)
    levels = torch.full((len(embedding),), level, device=embedding.device)
    return torch.cat([scaled * std + mean, timestep_sinusoid(levels, embedding.shape[-1]).to(embedding)], dim=-1)


def guidance_conditions(
    embedding: Tensor,
    noise: Noise,
    normalizer: Normalizer,
    scheduler: NoisingScheduler,
    level: int = 0,
    negative: Tensor | None = None,
) -> Tensor:
    """Conditions ``(2 B, 2 C)`` of a guided batch, unconditional rows first: all zeros, or a negative embedding at level 0."""
    draw = noise.normal("embedding", embedding.shape[1:])
    condition = noised_embedding(embedding, draw, level, normalizer, scheduler)
    if negative is None:
        return torch.cat([torch.zeros_like(condition), condition])
    draw = noise.normal("negative_embedding", negative.shape[1:])
    return torch.cat([noised_embedding(negative, draw, 0, normalizer, scheduler), condition])


def guided(predictions: Tensor, guidance_scale: float) -> Tensor:
    """``u + s (c - u)`` of predictions ``(2 B, ...)``, unconditional rows first."""
    unconditional, conditional = predictions.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


class UnCLIPDecoder:
    """Draws images from image embeddings with the parts of a ``StableUnCLIPImg2ImgPipeline``.

    All draws are addressed noise: the latent an image starts from and the blur of its embedding. The pipeline's scheduler must be
    one without noise of its own, as the released one is.

    Args:
        pipeline: the loaded pipeline; only its parts are used.
        guidance_scale: where a call names none; 1 is no guidance.
    """

    def __init__(self, pipeline: Any, guidance_scale: float = 10.0) -> None:
        self.pipeline, self.guidance_scale = pipeline, guidance_scale

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], device: torch.device | str = "cpu", torch_dtype: torch.dtype = torch.float32, **hub: Any
    ) -> UnCLIPDecoder:
        """Loads a pipeline from a directory or a hub id such as ``stabilityai/stable-diffusion-2-1-unclip``.

        Raises:
            CheckpointError: nothing there, or not an unCLIP pipeline with safetensors weights.
        """
        from diffusers import StableUnCLIPImg2ImgPipeline

        try:
            pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(path, torch_dtype=torch_dtype, use_safetensors=True, **hub)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"'{path}' is not an unCLIP pipeline (StableUnCLIPImg2ImgPipeline with safetensors weights): {reason}"
            ) from error
        return cls(pipeline.to(device))

    @property
    def embedding_dim(self) -> int:
        return self.pipeline.image_normalizer.mean.shape[-1]

    @torch.no_grad()
    def __call__(
        self,
        embeddings: Tensor,
        noise: Noise | None = None,
        *,
        negative: Tensor | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float | None = None,
        noise_level: int = 0,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """Image embeddings ``(B, C)`` to pixels ``(B, 3, H, W)`` around [-1, 1].

        Args:
            negative: embeddings ``(B, C)`` to steer away from; none by default.
            guidance_scale: 1 is no guidance; the decoder's own by default.
            noise_level: of the embedding, 0 the least.
            height, width: in pixels; by default what the UNet was trained at.
        """
        unet, vae, scheduler = self.pipeline.unet, self.pipeline.vae, self.pipeline.scheduler
        if embeddings.dim() != 2 or embeddings.shape[1] != self.embedding_dim:
            raise VargenError(f"image embeddings {tuple(embeddings.shape)}: this unCLIP takes (B, {self.embedding_dim})")
        stride = self.pipeline.vae_scale_factor
        height, width = (size or unet.config.sample_size * stride for size in (height, width))
        if height % stride or width % stride:
            raise VargenError(f"size {height}x{width}: expected multiples of {stride}")
        if num_inference_steps < 1:
            raise VargenError(f"num_inference_steps {num_inference_steps}: expected at least 1")
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        batch, device, dtype = len(embeddings), unet.device, unet.dtype
        noise = as_noise(noise, batch, device)
        conditions = guidance_conditions(
            embeddings.to(device, dtype),
            noise,
            self.pipeline.image_normalizer,
            self.pipeline.image_noising_scheduler,
            noise_level,
            negative if negative is None else negative.to(device, dtype),
        )
        rows = 1 if guidance_scale == 1 else 2
        conditions = conditions[-rows * batch :]
        prompt = self.pipeline.encode_prompt("", device, 1, False)[0].to(dtype).expand(rows * batch, -1, -1)
        scheduler.set_timesteps(num_inference_steps, device=device)
        shape = (unet.config.in_channels, height // stride, width // stride)
        latents = noise.normal("latent", shape).to(device, dtype) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            stacked = scheduler.scale_model_input(latents.repeat(rows, 1, 1, 1), t)
            prediction = unet(stacked, t, encoder_hidden_states=prompt, class_labels=conditions).sample
            prediction = prediction if rows == 1 else guided(prediction, guidance_scale)
            latents = scheduler.step(prediction, t, latents).prev_sample
        return vae.decode(latents / vae.config.scaling_factor).sample.float()
