"""Base classes: a model is a diffusers ``ModelMixin`` with a strict configuration; a tokenizer and a generator are models."""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vargen.condition import Condition, TextFeatures
from vargen.errors import CheckpointError, VargenError
from vargen.guidance import Guidance
from vargen.noise import Noise
from vargen.registry import PRESETS_ATTRIBUTE
from vargen.space import TokenSpace


class VargenModel(ModelMixin, ConfigMixin):
    """A model that saves and loads as ``config.json`` + safetensors and refuses unknown configuration keys.

    Subclasses decorate ``__init__`` with diffusers' ``register_to_config`` and take only JSON-able arguments.
    """

    config_name = "config.json"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # diffusers writes this module path into model_index.json; public names live in `vargen`, wherever the file is
        if not cls.__name__.startswith("_"):
            cls.__module_file__ = cls.__module__
            cls.__module__ = "vargen"

    def __getattr__(self, name: str) -> Any:
        # diffusers would answer with the configuration entry before looking at a submodule of the same name
        return nn.Module.__getattr__(self, name)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Any:
        """A freshly initialised model of a named size from the table beside the class."""
        import sys

        from vargen.errors import ConfigError, nearest

        presets = getattr(sys.modules[cls.__module_file__], PRESETS_ATTRIBUTE, {})
        if name not in presets:
            raise ConfigError(f"{cls.__name__} has no preset '{name}'{nearest(name, presets)}")
        return cls(**{**presets[name], **overrides})

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Loads ``config.json`` and safetensors weights from a directory or a hub id, in float32 unless ``torch_dtype`` is given.

        Raises:
            CheckpointError: nothing there, pickled or truncated weights, unknown configuration keys, missing or unexpected weights.
        """
        from vargen.checkpoint import check_model_directory

        kwargs.setdefault("torch_dtype", torch.float32)
        kwargs["use_safetensors"] = True
        folder = Path(path) / kwargs.get("subfolder", "") if Path(path).exists() else None
        if folder is not None:
            check_model_directory(folder)
        try:
            model, info = super().from_pretrained(path, output_loading_info=True, **kwargs)
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(f"cannot load {cls.__name__} from '{path}': {' '.join(str(error).split())[:300]}") from error
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(kind):
                keys = [str(k) for k in info[kind]]
                raise CheckpointError(
                    f"'{path}': {kind.replace('_', ' ')} for {cls.__name__}: {', '.join(keys[:8])} ({len(keys)} in all)"
                )
        return model

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        known = cls._get_init_keys(cls)
        for key in config_dict:
            if not key.startswith("_") and key not in known and key not in cls.ignore_for_config:
                from vargen.errors import nearest

                raise CheckpointError(f"configuration of {cls.__name__} has an unknown key '{key}'{nearest(key, known)}")
        return super().extract_init_dict(config_dict, **kwargs)

    def config_dict(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able."""
        return {k: v for k, v in json.loads(self.to_json_string()).items() if not k.startswith("_")}

    @property
    def num_parameters_(self) -> int:
        return sum(p.numel() for p in self.parameters())


@dataclass
class TokenizerOutput:
    """What a tokenizer's ``forward`` gives its training objective.

    Attributes:
        tokens: ``(B, *token_shape)`` ids, or latents for a continuous space.
        reconstruction: pixels like the input, or None for tokenizers without a pixel decoder.
        losses: the tokenizer's own scalar losses, already weighted (commitment, KL, prior, flow...).
        features: tensors that an objective or a log may use.
    """

    tokens: Tensor
    reconstruction: Tensor | None
    losses: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)


class VisualTokenizer(VargenModel):
    """Turns pixels in [-1, 1], ``(B, 3, H, W)`` or ``(B, 3, T, H, W)``, into tokens and back.

    Attributes:
        takes_text: ``encode`` and ``decode`` need captions (TexTok, TA-TiTok); a configuration may decide.
        text_shape: most tokens that a caption may have, and the width of their features; None if any will do.
        text_encoder: reads captions for this tokenizer, where it embeds words by itself; None for any text encoder.
        video: pixels have a time axis.
        causal_stride: k of video tokenizers that are causal in time: the first 1 + k m frames have tokens of their own, which do
            not depend on later frames; 0 where tokens depend on the whole clip.
        scheduled: ``forward`` takes ``progress=``, the share in [0, 1] of the training that is done.
        paints: ``decode`` makes pixels; False where tokens stand for meaning and no decoder of them is at hand.
    """

    takes_text: bool = False
    text_shape: tuple[int, int] | None = None
    text_encoder: Any = None
    video: ClassVar[bool] = False
    causal_stride: ClassVar[int] = 0
    scheduled: ClassVar[bool] = False

    @property
    def paints(self) -> bool:
        return True

    @property
    @abstractmethod
    def space(self) -> TokenSpace:
        """Token space at the configured sample size."""

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, ...]:
        """Pixel shape ``(H, W)`` or ``(T, H, W)`` that ``space`` belongs to."""

    @abstractmethod
    def encode(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        """Pixels to tokens ``(B, *token_shape)``; continuous tokens are normalised (``space.mean/std`` applied)."""

    @abstractmethod
    def decode(self, tokens: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        """Tokens to pixels, not clamped."""

    @abstractmethod
    def forward(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> TokenizerOutput:
        """The training pass."""

    @property
    def moments_shape(self) -> tuple[int, ...] | None:
        """Shape of one sample's :meth:`moments`; None for tokenizers whose tokens are not drawn from a Gaussian posterior."""
        return None

    def moments(self, pixels: Tensor, text: TextFeatures | None = None) -> Tensor:
        """Mean and log-variance ``(B, *moments_shape)`` of the posterior of the latents, not clamped: what latent caches hold.

        Raises:
            VargenError: a tokenizer without a posterior.
        """
        raise VargenError(f"{type(self).__name__} draws its tokens from no posterior, so that there are no moments of it")

    def tokens_of(self, moments: Tensor, noise: Noise | None = None) -> Tensor:
        """Tokens ``(B, *token_shape)`` of a sample of the posterior with these moments: the second half of :meth:`encode`."""
        raise VargenError(f"{type(self).__name__} draws its tokens from no posterior, so that there are no moments of it")

    @torch.no_grad()
    def calibrate(self, tokens: Iterable[Tensor]) -> None:
        """Sets the scale of continuous tokens, such that batches of them made at the scale of before have mean 0 and deviation 1.

        Done once training is over, as backbones expect tokens of that scale. Nothing for ids, which have none.

        Raises:
            VargenError: no tokens, or all equal ones.
        """
        space = self.space
        prefix = next((prefix for prefix in ("", "latent_") if f"{prefix}mean" in self.config), None)
        if space.discrete or prefix is None:
            return
        count, total, square = 0, 0.0, 0.0
        for batch in tokens:
            latents = space.denormalize(batch.double())
            count, total = count + latents.numel(), total + float(latents.sum())
            square += float(latents.square().sum())
        mean = total / count if count else 0.0
        variance = square / count - mean**2 if count else 0.0
        if variance <= 0:
            raise VargenError("calibration needs tokens that differ: give it those of training images")
        self.register_to_config(**{f"{prefix}mean": mean, f"{prefix}std": variance**0.5})

    @torch.no_grad()
    def scores(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> dict[str, Tensor]:
        """What validation says of a batch, a number per sample ``(B,)``: by default the PSNR of the round trip in dB."""
        painted = self.decode(self.encode(pixels, text, noise), text, noise).clamp(-1, 1)
        error = (painted - pixels).square().flatten(1).mean(1)
        return {"psnr": 10 * torch.log10(4 / error.clamp(min=1e-10))}

    @property
    def last_layer(self) -> nn.Parameter | None:
        """Weight of the last decoder layer, where the adaptive adversarial weight is measured; None if there is none."""
        return None

    def check_pixels(self, pixels: Tensor, text: TextFeatures | None = None) -> Tensor:
        """Returns ``pixels``; raises VargenError for a wrong shape, NaN, missing text, or text that is not taken."""
        axes = 5 if self.video else 4
        if pixels.dim() != axes or pixels.shape[1] != 3:
            layout = "(B, 3, T, H, W)" if self.video else "(B, 3, H, W)"
            raise VargenError(f"{type(self).__name__}: pixels of shape {tuple(pixels.shape)}, expected {layout}")
        if not pixels.is_floating_point():
            raise VargenError(
                f"{type(self).__name__}: pixels of dtype {pixels.dtype}, expected floats in [-1, 1]; for bytes x / 127.5 - 1"
            )
        if not torch.isfinite(pixels).all():
            raise VargenError(f"{type(self).__name__}: pixels hold NaN or infinity, expected values in [-1, 1]")
        self.check_text(text, pixels.shape[0])
        return pixels

    def check_text(self, text: TextFeatures | None, batch_size: int) -> None:
        """Raises VargenError for text where none is taken, none where it is needed, or features that do not fit."""
        if self.takes_text and text is None:
            raise VargenError(f"{type(self).__name__} needs captions: pass text=TextFeatures(...)")
        if text is not None and not self.takes_text:
            raise VargenError(f"{type(self).__name__} takes no text: leave text out")
        if text is not None and text.mask.shape[0] != batch_size:
            raise VargenError(f"{text.mask.shape[0]} captions for {batch_size} samples: expected one each")
        if text is not None and self.text_shape is not None:
            (length, width), (most, expected) = text.features.shape[1:], self.text_shape
            if length > most or width != expected:
                raise VargenError(
                    f"{type(self).__name__}: captions of {length} tokens of width {width}, expected at most {most} tokens of width "
                    f"{expected}; use the text encoder that it was trained with"
                )


@dataclass(frozen=True)
class StepInfo:
    """What ``on_step`` is told after each decoding step.

    Attributes:
        index, total: this step and the number of steps.
        tokens: ``(B, *token_shape)`` so far, zeros where nothing is known.
        known: float ``(*grid)`` in [0, 1], how far each cell is done (``(num_tokens,)`` for several levels).
        level: level or stage that was decoded.
    """

    index: int
    total: int
    tokens: Tensor
    known: Tensor
    level: int = 0


OnStep = Callable[[StepInfo], None]


@dataclass(frozen=True)
class Sampling:
    """How discrete tokens are drawn from logits.

    Attributes:
        temperature: logits are divided by it; 0 is greedy.
        top_k: keep the k largest logits (ties survive); 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches p; 1 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise VargenError(f"temperature {self.temperature}: expected a number >= 0 (0 is greedy)")
        if self.top_k < 0:
            raise VargenError(f"top_k {self.top_k}: expected 0 (off) or a positive integer")
        if not 0 < self.top_p <= 1:
            raise VargenError(f"top_p {self.top_p}: expected a number in (0, 1], 1 is off")

    @property
    def greedy(self) -> bool:
        return self.temperature <= 1e-5


class Generator(VargenModel):
    """A model of tokens given a condition.

    Attributes:
        conditioning: parts of a :class:`Condition` that it takes, of ``class``, ``text``, ``text_ids``, ``tokens`` (given
            ones, to be continued) and ``context``; empty for unconditional models.
        scheduled: ``training_losses`` takes ``progress=``, the share in [0, 1] of the training that is done.
        edits: ``generate`` takes ``known=`` and ``tokens=``, see :func:`vargen.decoding.masked.given_tokens`: a part of a picture
            is kept and the rest drawn.
        reports_flops: sampling jobs say what an image costs.
        coarse_from: what the coarser levels of its tokens are made of, where there are any: ``latents`` or ``pixels``, see
            :class:`vargen.tokenizers.pyramid.PyramidTokenizer`.
    """

    scheduled: ClassVar[bool] = False
    edits: ClassVar[bool] = False
    reports_flops: ClassVar[bool] = False
    coarse_from: ClassVar[str] = "latents"

    @property
    @abstractmethod
    def space(self) -> TokenSpace:
        """Token space that it models; a tokenizer must share it."""

    @property
    @abstractmethod
    def conditioning(self) -> tuple[str, ...]: ...

    @property
    def num_classes(self) -> int | None:
        return None

    @abstractmethod
    def training_losses(self, tokens: Tensor, condition: Condition, noise: Noise | None = None) -> dict[str, Tensor]:
        """Scalar losses of a batch, the total under ``"loss"``.

        ``noise`` addresses every random choice (condition dropout, masks, timesteps); without it a fresh seed is used.
        """

    @abstractmethod
    def generate(
        self,
        condition: Condition,
        *,
        batch_size: int | None = None,
        noise: Noise | None = None,
        guidance: Guidance | None = None,
        sampling: Sampling | None = None,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Tensor:
        """Tokens ``(B, *token_shape)``. ``options`` are the system's own (steps, decoding...); unknown ones are refused."""

    def check_condition(self, condition: Condition, batch_size: int | None = None) -> int:
        """The batch size; raises VargenError when the condition is not one that this model takes."""
        labels = condition.class_labels
        if labels is not None:
            if "class" not in self.conditioning:
                raise VargenError(
                    f"{type(self).__name__} takes no class labels; it is conditioned on {self.conditioning or 'nothing'}"
                )
            if (
                self.num_classes is not None
                and labels.numel()
                and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes
            ):
                bad = labels[(labels < 0) | (labels >= self.num_classes)][0]
                raise VargenError(f"class label {int(bad)}: expected 0..{self.num_classes - 1}")
        parts = {"text": condition.text, "text_ids": condition.text_ids, "tokens": condition.tokens, "context": condition.context}
        for name, part in parts.items():
            if part is not None and name not in self.conditioning:
                given = {"text": "text", "text_ids": "text ids", "tokens": "tokens to continue", "context": "a context"}[name]
                raise VargenError(
                    f"{type(self).__name__} takes no {given}; it is conditioned on {', '.join(self.conditioning) or 'nothing'}"
                )
        size = condition.batch_size if condition.batch_size is not None else batch_size
        if size is None:
            raise VargenError(f"{type(self).__name__}: give a condition or batch_size")
        if batch_size is not None and batch_size != size:
            raise VargenError(f"batch_size {batch_size} but the condition holds {size} samples")
        return size
