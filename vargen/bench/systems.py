"""The generators that are measured, at equal size and with random weights: what tokens cost does not depend on what they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vargen.backbones.causal import CausalGenerator
from vargen.backbones.drafter import EagleDrafter
from vargen.condition import Condition
from vargen.errors import ConfigError, VargenError, nearest
from vargen.guidance import Guidance
from vargen.model import Generator
from vargen.noise import Noise
from vargen.registry import system

REFERENCE = "llamagen"

# about 1 M weights for 8 x 8 tokens, and about 110 M, as many as LlamaGen-B has, for 16 x 16
_TINY: dict[str, dict[str, Any]] = {
    "codes": {"codebook_size": 128, "dim": 128, "depth": 5, "heads": 4},
    "llama": {"mlp_hidden": 344, "num_classes": 10},
    "latents": {"grid": [8, 8], "channels": 4, "num_classes": 10},
}
_BASE: dict[str, dict[str, Any]] = {
    "codes": {"codebook_size": 16384, "dim": 768, "depth": 12, "heads": 12},
    "llama": {"num_classes": 1000},
    "latents": {"grid": [16, 16], "channels": 16, "num_classes": 1000},
}


def _sizes(
    codes: Mapping[str, Any], llama: Mapping[str, Any], latents: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    """Constructor arguments of every system, from what systems share and their ``own``."""
    grid, length = {"grid": latents["grid"]}, {"length": latents["grid"][0] * latents["grid"][1]}
    shared: dict[str, dict[str, Any]] = {
        "llamagen": {**grid, **codes, **llama},
        "nar": {**grid, **codes, **llama},
        "nbp": {**grid, **codes, "block_size": latents["grid"][1], "condition_vocabulary": latents["num_classes"]},
        "larp": {**length, **codes, **llama},
        "flextok-ar": {**length, **codes, **llama},
        "maskgit": {**grid, **codes, "trunk": "uvit", "num_classes": latents["num_classes"]},
        **{name: dict(latents) for name in ("mar", "himar", "xar", "ecar")},
    }
    return {name: {**arguments, **own.get(name, {})} for name, arguments in shared.items()}


SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": _sizes(
        **_TINY,
        own={
            "nar": {"depth": 4},
            "nbp": {"max_positions": 128},
            "flextok-ar": {"depth": 6},
            "maskgit": {"depth": 4, "mlp_hidden": 512},
            "mar": {"encoder_dim": 128, "encoder_depth": 2, "encoder_heads": 4, "decoder_dim": 128, "decoder_depth": 2,
                    "decoder_heads": 4, "buffer_size": 8, "head_width": 112, "head_depth": 2, "head_steps": "50"},
            "himar": {"pivots": [4, 4], "dim": 128, "encoder_depth": 1, "decoder_depth": 2, "heads": 4, "buffer_size": 8,
                      "head_width": 96, "head_depth": 2, "head_steps": "50", "dense_head_width": 64, "dense_head_depth": 2,
                      "dense_head_heads": 2, "dense_head_steps": "50"},
            "xar": {"entity_size": [4, 4], "dim": 128, "encoder_depth": 1, "decoder_depth": 2, "heads": 4, "sampling_steps": 25},
            "ecar": {"stages": 3, "dim": 128, "depth": 3, "heads": 4, "head_width": 112, "head_depth": 2},
        },
    ),
    "base": _sizes(
        **_BASE,
        own={
            "nar": {"depth": 10},
            "nbp": {"max_positions": 512},
            "maskgit": {"mlp_hidden": 2048},
            "mar": {"encoder_depth": 6, "decoder_depth": 6, "head_depth": 3},
            "himar": {"encoder_depth": 5, "decoder_depth": 5, "head_depth": 3, "head_width": 768, "dense_head_depth": 3},
            "xar": {"encoder_depth": 5, "decoder_depth": 5},
            "ecar": {"depth": 8, "head_depth": 3},
        },
    ),
}  # fmt: skip
SYSTEMS = tuple(SIZES["base"])

# options of generate where a system has no default of its own that fits the size
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {"tiny": {"mar": {"steps": 16}}, "base": {}}
# a draft model for continuous speculation, in relation to the target as MAR-B is to MAR-H: a third to a fifth of its weights
DRAFTS: dict[str, dict[str, Any]] = {
    "tiny": {"encoder_dim": 64, "encoder_depth": 1, "decoder_dim": 64, "decoder_depth": 1, "head_width": 64},
    "base": {"encoder_dim": 384, "encoder_heads": 6, "decoder_dim": 384, "decoder_heads": 6, "head_width": 512},
}


@dataclass
class Subject:
    """A system's model, and how it is asked for images.

    Attributes:
        options: of ``generate``.
        guidance_scale: 1 for systems that know no null condition.
    """

    name: str
    size: str
    model: Generator
    options: dict[str, Any] = field(default_factory=dict)
    guidance_scale: float = 1.0

    @classmethod
    def build(cls, name: str, size: str, device: torch.device, dtype: torch.dtype, guidance_scale: float = 1.0) -> Subject:
        """A fresh model of a system in ``SYSTEMS`` at a size in ``SIZES``.

        Raises:
            ConfigError: no such system or size.
        """
        arguments = arguments_of(name, size)
        torch.manual_seed(0)
        model = system(name).load_class()(**arguments)
        scale = guidance_scale if name != "nbp" else 1.0
        return cls(name, size, _moved(model, device, dtype), OPTIONS[size].get(name, {}), scale)

    def condition(self, batch_size: int) -> Condition:
        classes = self.model.num_classes or SIZES[self.size][self.name]["condition_vocabulary"]
        return Condition(class_labels=torch.arange(batch_size, device=self.model.device) % classes)

    def generate(self, batch_size: int, **options: Any) -> Tensor:
        """Tokens of ``batch_size`` samples, the same at every call."""
        return self.model.generate(
            self.condition(batch_size),
            batch_size=batch_size,
            noise=Noise(0, batch_size, self.model.device),
            guidance=Guidance(self.guidance_scale),
            **{**self.options, **options},
        )

    def draft(self) -> Generator:
        """A smaller model of the same tokens, of the same system."""
        arguments = {**SIZES[self.size][self.name], **DRAFTS[self.size]}
        return _moved(type(self.model)(**arguments), self.model.device, self.model.dtype)

    def drafter(self) -> EagleDrafter:
        """An EAGLE drafter of the model."""
        if not isinstance(self.model, CausalGenerator):
            raise VargenError(f"{self.name} has no drafter: it is no next-token generator")
        return _moved(EagleDrafter.for_target(self.model), self.model.device, self.model.dtype)


def arguments_of(name: str, size: str) -> dict[str, Any]:
    """Constructor arguments of a system at a size."""
    if size not in SIZES:
        raise ConfigError(f"size '{size}'{nearest(size, SIZES)}")
    if name not in SYSTEMS:
        raise ConfigError(f"unknown system '{name}'{nearest(name, SYSTEMS)}")
    return SIZES[size][name]


def _moved(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    # not by diffusers' own `to`, which warns of modules to keep in float32 even where there are none
    return torch.nn.Module.to(model, device, dtype).eval()
