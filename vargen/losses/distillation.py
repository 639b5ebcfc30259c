"""Losses that make a tokenizer's features agree with a frozen teacher's view of the same pixels.

MingTok's latent and semantic supervision, REPA (Yu et al. 2024, arXiv 2410.06940) and the proxy codes of TiTok's first stage
(arXiv 2406.07550) are all of this form.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vargen.errors import CheckpointError, ConfigError, VargenError
from vargen.metrics.features import FEATURE_NETS, FeatureNet, load_feature_net
from vargen.model import TokenizerOutput, VisualTokenizer
from vargen.registry import PUBLIC, load_public

DISTANCES = ("cosine", "l2")


class VisionTeacher(nn.Module):
    """Patch features ``(B, h, w, C)`` of a vision model of transformers (DINOv2, CLIP, SigLIP), or CLIP's embedding ``(B, C)``.

    Args:
        model: called with ``pixel_values``; its tokens are special ones followed by patches in raster order. A model that returns
            ``image_embeds`` is asked for those.
        image_size: side that pixels are resized to, a multiple of the model's patch.
        mean, std: of the model's input for pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, image_size: int, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model, self.image_size = model, image_size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        resized = F.interpolate((pixels + 1) / 2, size, mode="bicubic", align_corners=False, antialias=True)
        config, options = self.model.config, {}
        # DINOv2 fits its position table to any size by itself
        if self.image_size != config.image_size and not config.model_type.startswith("dinov2"):
            options["interpolate_pos_encoding"] = True
        output = self.model(pixel_values=(resized - self.mean) / self.std, **options)
        if "image_embeds" in output:
            return output.image_embeds
        tokens = output.last_hidden_state
        side = self.image_size // config.patch_size
        return tokens[:, tokens.shape[1] - side * side :].unflatten(1, (side, side))


class TokenTeacher(nn.Module):
    """Tokens of a frozen tokenizer: ids, or latents with their channels last."""

    def __init__(self, tokenizer: VisualTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, pixels: Tensor) -> Tensor:
        return self.tokenizer.encode(pixels)


class ClassifierTeacher(nn.Module):
    """The feature vector ``(B, C)`` of a small classifier, such as those of the shipped sets."""

    def __init__(self, network: FeatureNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(pixels).features


def agreement(student: Tensor, target: Tensor, distance: str = "cosine") -> Tensor:
    """How far a student's features are from a teacher's, a mean over positions.

    Args:
        student: ``(B, ..., C)``, channels last.
        target: ids ``(B, ...)`` of the student's grid, whose logits the student gives (cross entropy); vectors ``(B, C)``, compared
            with the student's mean over positions; or a map ``(B, h, w, C)``, resized to the student's grid.
        distance: of features: ``cosine`` (one minus the similarity) or ``l2`` (mean square over channels).
    """
    student = student.float()
    if not target.is_floating_point():
        if student.shape[:-1] != target.shape:
            raise VargenError(f"code logits of grid {tuple(student.shape[1:-1])} for a teacher's ids {tuple(target.shape[1:])}")
        return F.cross_entropy(student.flatten(0, -2), target.flatten())
    if target.shape[-1] != student.shape[-1]:
        raise VargenError(
            f"the student gives {student.shape[-1]} channels for a teacher of {target.shape[-1]}: set its head's width"
        )
    if target.dim() == 2:
        student = student.flatten(1, -2).mean(1) if student.dim() > 2 else student
    elif student.shape[1:-1] != target.shape[1:-1]:
        image = rearrange(target.float(), "b h w c -> b c h w")
        image = F.interpolate(image, tuple(student.shape[1:-1]), mode="bilinear", align_corners=False, antialias=True)
        target = rearrange(image, "b c h w -> b h w c")
    if distance == "l2":
        return F.mse_loss(student, target.float())
    return 1 - F.cosine_similarity(student, target.float(), dim=-1).mean()


class TeacherTerm(nn.Module):
    """One weighted term: ``output.features[features]`` against a teacher.

    Args:
        features: name among the features that the tokenizer's training pass returns.
        teacher: a module from pixels ``(B, 3, H, W)`` in [-1, 1] to a target of :func:`agreement`, or where to load one, see
            :func:`load_teacher`.
        weight: of the term.
        distance: see :func:`agreement`.
        image_size: side of the teacher's input, its own by default.
        embedding: take a CLIP model's projected image embedding rather than its patches.
    """

    def __init__(
        self,
        features: str,
        teacher: str | os.PathLike[str] | nn.Module,
        weight: float = 1.0,
        distance: str = "cosine",
        image_size: int | None = None,
        embedding: bool = False,
    ) -> None:
        super().__init__()
        if distance not in DISTANCES:
            raise ConfigError(f"distance '{distance}': expected one of {', '.join(DISTANCES)}")
        self.features, self.weight, self.distance = features, weight, distance
        module = teacher if isinstance(teacher, nn.Module) else load_teacher(teacher, image_size, embedding)
        self.teacher = module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TeacherTerm:
        # the teacher's dropout and batch statistics stay off
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, pixels: Tensor, output: TokenizerOutput) -> Tensor:
        """The unweighted loss."""
        if self.features not in output.features:
            known = ", ".join(k for k, v in output.features.items() if v.dim() > 1) or "none"
            raise ConfigError(f"the tokenizer returns no features '{self.features}' for a teacher; it returns: {known}")
        with torch.no_grad():
            target = self.teacher(pixels)
        return agreement(output.features[self.features], target, self.distance)


def load_teacher(source: str | os.PathLike[str], image_size: int | None = None, embedding: bool = False) -> nn.Module:
    """A frozen teacher.

    Args:
        source: ``digits`` or ``shapes`` (the classifiers that ship), the directory of a tokenizer or classifier of ours, or a
            vision model of transformers in a directory or on the hub.
        image_size: side of a vision model's input, its own by default.
        embedding: of a CLIP model, the projected image embedding.

    Raises:
        CheckpointError: nothing that can be loaded.
    """
    if str(source) in FEATURE_NETS:
        return ClassifierTeacher(load_feature_net(source))
    file = Path(source) / "config.json"
    name = str(json.loads(file.read_text()).get("_class_name")) if file.is_file() else None
    if name == FeatureNet.__name__:
        return ClassifierTeacher(load_feature_net(source))
    if name in PUBLIC:
        model = load_public(name).from_pretrained(source)
        if not isinstance(model, VisualTokenizer):
            raise CheckpointError(f"teacher '{source}' is a {name}: expected a tokenizer or a vision model")
        return TokenTeacher(model)
    return _load_vision(source, image_size, embedding)


def _load_vision(source: str | os.PathLike[str], image_size: int | None, embedding: bool) -> VisionTeacher:
    import transformers

    kind = transformers.CLIPVisionModelWithProjection if embedding else transformers.AutoModel
    try:
        model = kind.from_pretrained(source, use_safetensors=True)
        processor = transformers.AutoImageProcessor.from_pretrained(source)
    except Exception as error:  # hub, configuration and weight errors have no common base
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"teacher '{source}': neither a model of ours nor a vision model of transformers ({reason})"
        ) from error
    model = model if embedding else getattr(model, "vision_model", model)
    size, patch = image_size or model.config.image_size, model.config.patch_size
    if size % patch:
        raise ConfigError(
            f"teacher '{source}': image_size {size}, expected a multiple of its patch, such as {-(-size // patch) * patch}"
        )
    return VisionTeacher(model, size, list(processor.image_mean), list(processor.image_std))
