"""The pipeline that users call: condition in, pictures out; a diffusers ``DiffusionPipeline`` for saving, loading and the hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from vargen.checkpoint import check_model_directory
from vargen.clips import Clips, continuation
from vargen.condition import Condition
from vargen.editing import Pictures, read_edit
from vargen.errors import CheckpointError, SpaceError, VargenError, nearest
from vargen.guidance import Guidance, Schedule
from vargen.model import Generator, OnStep, Sampling, StepInfo, VisualTokenizer
from vargen.noise import Noise, as_noise
from vargen.text import TextEncoder

SETTINGS = ("guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p")


@dataclass
class VisualAROutput(BaseOutput):
    """What the pipeline returns.

    Attributes:
        images: list of PIL images, an array ``(B, H, W, 3)`` in [0, 1], or a tensor ``(B, 3, H, W)`` in [-1, 1]; videos have a time
            axis before H (a list of lists of PIL frames).
        tokens: ``(B, *token_shape)``.
    """

    images: Any
    tokens: Tensor


class VisualARPipeline(DiffusionPipeline):
    """A generator with the tokenizer that paints its tokens, and a text encoder where it needs one.

    Args:
        model: the generator.
        visual_tokenizer: a tokenizer of the same token space.
        text_encoder: a :class:`vargen.text.TextEncoder` for text-conditional models, or whose tokenizer takes captions.
        tokenizer: tokenizer of a text encoder that has a separate one.
        class_names: names of the classes, in label order.
        defaults: sampling settings used where a call gives none, a subset of ``SETTINGS`` and the model's own options.

    Raises:
        SpaceError: model and tokenizer do not share a token space.
    """

    _optional_components = ["text_encoder", "tokenizer"]

    def __init__(
        self,
        model: Generator,
        visual_tokenizer: VisualTokenizer,
        text_encoder: TextEncoder | None = None,
        tokenizer: Any = None,
        class_names: Sequence[str] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        model.space.require(visual_tokenizer.space)
        if text_encoder is None and ("text" in model.conditioning or visual_tokenizer.takes_text):
            raise SpaceError(f"{type(model).__name__} with {type(visual_tokenizer).__name__} needs a text_encoder")
        if class_names is not None and model.num_classes not in (None, len(class_names)):
            raise VargenError(f"{len(class_names)} class names for a model of {model.num_classes} classes")
        self.register_modules(model=model, visual_tokenizer=visual_tokenizer, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(class_names=list(class_names) if class_names is not None else None, defaults=dict(defaults or {}))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **kwargs: Any) -> VisualARPipeline:
        """Loads a directory or hub id, in float32 unless ``torch_dtype`` is given; never unpickles.

        Raises:
            CheckpointError: not a pipeline directory, or a part of it is damaged.
        """
        folder = Path(path)
        if folder.is_dir():
            if not (folder / "model_index.json").is_file():
                raise CheckpointError(f"'{folder}' is not a pipeline: it has no model_index.json")
            for part in ("model", "visual_tokenizer"):
                check_model_directory(folder / part)
        kwargs.setdefault("torch_dtype", torch.float32)
        try:
            return super().from_pretrained(str(path), use_safetensors=True, **kwargs)
        except VargenError:
            raise
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"cannot load a pipeline from '{path}': {' '.join(str(error).split())[:300]}") from error

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        *,
        video: Clips | None = None,
        image: Pictures | None = None,
        mask: Any = None,
        keep_pixels: bool = False,
        batch_size: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | Schedule | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: Noise | torch.Generator | Sequence[torch.Generator] | int | None = None,
        output_type: str = "pil",
        on_step: OnStep | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], Any] | None = None,
        decode_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> VisualAROutput:
        """Draws one image or video for each prompt or class label.

        Args:
            prompt: text or texts; class_labels: labels or class names; batch_size: for unconditional models.
            video: first frames of clips to be continued, in any form that :func:`vargen.clips.as_clips` takes. The clips that come
                back begin with these frames as the tokenizer reconstructs them.
            image, mask: a picture of which the part under the mask (white, True) is drawn anew, see
                :func:`vargen.editing.read_edit`. Tokens whose whole patch lies outside the mask are kept exactly, and with
                ``keep_pixels`` all pixels outside of it.
            guidance_scale, guidance_schedule, temperature, top_k, top_p: see :class:`Guidance` and :class:`Sampling`; where None,
                the pipeline's ``defaults``, then plain sampling without guidance.
            generator: a seed, a ``torch.Generator``, one for each sample, or a :class:`Noise`.
            output_type: ``"pil"``, ``"np"`` or ``"pt"``, see :class:`VisualAROutput`.
            on_step: called after each step with a :class:`StepInfo`; callback_on_step_end: diffusers' form of it,
                ``(pipeline, step, step, {"tokens": ...})``.
            decode_options: further arguments of the tokenizer's ``decode``.
            options: the model's own, see its ``generate``.

        Raises:
            VargenError: a condition that the model does not take, an unknown setting or output type, or a part of a picture that it
                cannot keep.
        """
        if output_type not in ("pil", "np", "pt"):
            raise VargenError(f"output_type '{output_type}': expected 'pil', 'np' or 'pt'")
        condition, size = self.condition(prompt, class_labels, batch_size, video)
        noise = as_noise(generator, size, self.model.device)
        given = {
            "guidance_scale": guidance_scale,
            "guidance_schedule": guidance_schedule,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        }
        settings = {**self.config.defaults, **{k: v for k, v in {**given, **options}.items() if v is not None}}
        guidance, sampling, options = split_settings(settings)

        def step(info: StepInfo) -> None:
            if on_step is not None:
                on_step(info)
            if callback_on_step_end is not None:
                callback_on_step_end(self, info.index, info.index, {"tokens": info.tokens})

        edit = None
        if image is not None or mask is not None:
            edit = read_edit(self.visual_tokenizer, image, mask, size, condition.text, noise)
            condition, keep = edit.arguments(self.model, condition)
            options.update(keep)
        elif keep_pixels:
            raise VargenError("keep_pixels without image and mask: there are no pixels to keep")
        tokens = self.model.generate(
            condition,
            batch_size=size,
            noise=noise,
            guidance=guidance,
            sampling=sampling,
            on_step=step if on_step or callback_on_step_end else None,
            **options,
        )
        pixels = self.paint(tokens, condition, noise, **(decode_options or {}))
        if edit is not None and keep_pixels:
            pixels = edit.paste(pixels)
        return VisualAROutput(images=to_output(pixels, output_type), tokens=tokens)

    def condition(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        batch_size: int | None = None,
        video: Clips | None = None,
    ) -> tuple[Condition, int]:
        """The condition on the model's device, and the number of samples."""
        if prompt is not None and class_labels is not None and "class" not in self.model.conditioning:
            raise VargenError("give either prompt or class_labels")
        device = self.model.device
        text = labels = None
        if prompt is not None:
            if self.text_encoder is None:
                raise VargenError(
                    f"this model takes no prompts; it is conditioned on {', '.join(self.model.conditioning) or 'nothing'}"
                )
            text = self.text_encoder.encode([prompt] if isinstance(prompt, str) else list(prompt)).to(device)
        elif "text" in self.model.conditioning:
            raise VargenError("this model is conditioned on text: pass prompt")
        if class_labels is not None:
            labels = self.labels(class_labels).to(device)
        elif "class" in self.model.conditioning and text is None:
            raise VargenError("this model is conditioned on classes: pass class_labels")
        condition = Condition(class_labels=labels, text=text)
        if video is None and self.continues_only:
            raise VargenError("this model continues given frames: pass video")
        if video is not None:
            given = continuation(self.model, self.visual_tokenizer, video)
            condition = replace(condition, tokens=given.tokens, context=given.context)
        taken = condition if "text" in self.model.conditioning else replace(condition, text=None)
        size = self.model.check_condition(taken, batch_size or condition.batch_size)
        return condition, size

    @property
    def continues_only(self) -> bool:
        """The model draws nothing without given frames (frame prediction)."""
        return "context" in self.model.conditioning or tuple(self.model.conditioning) == ("tokens",)

    def labels(self, class_labels: int | str | Sequence[int | str] | Tensor) -> Tensor:
        """Class numbers of labels given as numbers or names; raises VargenError for an unknown name."""
        if isinstance(class_labels, Tensor):
            return class_labels.long().reshape(-1)
        given = [class_labels] if isinstance(class_labels, int | str) else list(class_labels)
        names = self.config.class_names or []
        numbers = []
        for label in given:
            if isinstance(label, str) and label in names:
                numbers.append(names.index(label))
            elif isinstance(label, int) or label.lstrip("-").isdigit():
                numbers.append(int(label))
            else:
                raise VargenError(f"unknown class '{label}'{nearest(label, names)}")
        return torch.tensor(numbers, dtype=torch.int64)

    def paint(self, tokens: Tensor, condition: Condition, noise: Noise, **options: Any) -> Tensor:
        """Pixels of tokens, in [-1, 1] up to overshoot; captions go along where the tokenizer takes them."""
        text = condition.text if self.visual_tokenizer.takes_text else None
        return self.visual_tokenizer.decode(tokens, text, noise, **options)


VisualARPipeline.__module__ = "vargen"


def split_settings(settings: Mapping[str, Any]) -> tuple[Guidance, Sampling, dict[str, Any]]:
    """Settings of a call, or a pipeline's ``defaults``, as guidance, sampling and the model's own options."""
    guidance = Guidance(float(settings.get("guidance_scale", 1.0)), schedule=settings.get("guidance_schedule", "constant"))
    sampling = Sampling(**{key: settings[key] for key in ("temperature", "top_k", "top_p") if key in settings})
    return guidance, sampling, {key: value for key, value in settings.items() if key not in SETTINGS}


def to_output(pixels: Tensor, output_type: str) -> Any:
    """Pixels ``(B, 3, (T,) H, W)`` in [-1, 1] as ``"pt"`` (unchanged), ``"np"`` in [0, 1] channels last, or ``"pil"``."""
    if output_type == "pt":
        return pixels
    last = pixels.float().movedim(1, -1)
    if output_type == "np":
        return ((last + 1) / 2).clamp(0, 1).cpu().numpy()
    from PIL import Image

    # LlamaGen's rounding: 127.5 x + 128, clamped and truncated
    array = (last * 127.5 + 128).clamp(0, 255).to(torch.uint8).cpu().numpy()
    if array.ndim == 4:
        return [Image.fromarray(image) for image in array]
    return [[Image.fromarray(frame) for frame in np.asarray(video)] for video in array]
