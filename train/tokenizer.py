"""Training a visual tokenizer: reconstruction, perceptual and adversarial losses, and the care for its codebook."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from vargen.condition import TextFeatures
from vargen.data.loader import Batch, ordered_batches
from vargen.errors import ConfigError
from vargen.losses.objective import TokenizerObjective
from vargen.model import TokenizerOutput, VisualTokenizer
from vargen.nn.quantize import codebook_statistics
from vargen.noise import Noise
from vargen.train.build import build_data, build_text_encoder, build_tokenizer, finished, frames, plain
from vargen.train.card import write_card
from vargen.train.loop import TRAINING
from vargen.train.optim import LR_SCHEDULER, OPTIMIZER
from vargen.train.state import write_model
from vargen.train.task import Facts, Task

# left out, the perceptual weights are looked for in the cache; a recipe that does without them says `perceptual: null`
OBJECTIVE: dict[str, Any] = {name: p.default for name, p in inspect.signature(TokenizerObjective).parameters.items()}
OBJECTIVE["perceptual"] = "cache"
# training samples that the scale of continuous tokens is taken from
CALIBRATION_SAMPLES = 1024

SCHEMA: dict[str, Any] = {
    "kind": "tokenizer",
    "seed": 0,
    "output_dir": None,
    "dataset": {},
    "validation": {"dataset": {}, "samples": 512, "pictures": 16},
    # parts: submodules that start from weights of their own, name -> file or directory
    "model": {"system": None, "preset": None, "config": {}, "path": None, "parts": {}},
    "text_encoder": {"path": None, "max_length": None, "words": None},
    "objective": OBJECTIVE,
    "optimizer": OPTIMIZER,
    "discriminator_optimizer": dict.fromkeys(OPTIMIZER),
    "lr_scheduler": LR_SCHEDULER,
    "training": TRAINING,
}


class TokenizerTask(Task):
    """A visual tokenizer, its objective and its data, as a recipe with the keys of ``SCHEMA`` describes them.

    The text encoder of a tokenizer that takes captions is frozen, a fresh word encoder (``text_encoder.words``) too, and stands
    beside the finished tokenizer, which is of no use without it.

    Raises:
        ConfigError: unknown system, preset or argument; a data set of another size or kind than the tokenizer's.
    """

    def __init__(self, config: DictConfig, command: str = "vargen train") -> None:
        torch.manual_seed(config.seed)
        self.config, self.command = config, command
        self.dataset, self.held_out = build_data(config)
        self.tokenizer = build_tokenizer(plain(config.model), self.dataset)
        self.network = _Network(self.tokenizer)
        self.objective = TokenizerObjective(**plain(config.objective))
        if self.objective.discriminator_parameters():
            self.adversary = self.objective
        self.text_encoder: Any = self.tokenizer.text_encoder
        if self.tokenizer.takes_text and self.text_encoder is None:
            self.text_encoder = build_text_encoder(plain(config.text_encoder), self.dataset)
            if self.text_encoder is None:
                raise ConfigError(
                    "this tokenizer takes captions: set text_encoder.path, e.g. google/flan-t5-base, or text_encoder.words"
                )
            self.fixed = (self.text_encoder,)
        if self.text_encoder is not None and not self.dataset.has_captions:
            raise ConfigError(
                f"{type(self.tokenizer).__name__} learns from captions, and the data set '{config.dataset.name}' has none: "
                f"choose one that has, such as shapes or a folder with caption files"
            )

    def models(self) -> dict[str, VisualTokenizer]:
        return {"tokenizer": self.tokenizer}

    def setup(self, device: torch.device) -> None:
        super().setup(device)
        self.device = device
        self.objective.to(device)

    def _text(self, batch: Batch) -> TextFeatures | None:
        return self.text_encoder.encode(batch["captions"]).to(self.device) if self.text_encoder is not None else None

    def losses(self, network: nn.Module, batch: Batch, noise: Noise, step: int) -> dict[str, Tensor]:
        pixels = batch["pixels"]
        output: TokenizerOutput = network(pixels, self._text(batch), noise, (step - 1) / self.total_steps)
        self._last = (pixels, None if output.reconstruction is None else output.reconstruction.detach())
        losses = self.objective.generator_losses(pixels, output, step, self.tokenizer.last_layer)
        scalars = {name: value for name, value in output.features.items() if value.dim() == 0}
        return {**losses, **scalars}

    def adversary_losses(self, step: int) -> dict[str, Tensor] | None:
        return self.objective.discriminator_losses(*self._last, step)

    def validate(self) -> dict[str, float]:
        """Means of the tokenizer's scores over held-out samples, and how they use its codes."""
        scores: dict[str, list[Tensor]] = {}
        indices = []
        for batch in ordered_batches(self.held_out, self.config.training.batch_size, self.config.validation.samples):
            pixels, text = batch["pixels"].to(self.device), self._text(batch)
            noise = Noise(0, len(pixels), self.device)
            for name, values in self.tokenizer.scores(pixels, text, noise).items():
                scores.setdefault(name, []).append(values)
            if self.tokenizer.space.discrete:
                indices.append(self.tokenizer.encode(pixels, text, noise).flatten())
        means = {name: float(torch.cat(values).mean()) for name, values in scores.items()}
        if indices and self.tokenizer.space.codebook_size is not None:
            usage = codebook_statistics(torch.cat(indices), self.tokenizer.space.codebook_size)
            means |= {name: float(value) for name, value in usage.items()}
        return means

    def _examples(self) -> tuple[Tensor, TextFeatures | None]:
        count = int(self.config.validation.pictures)
        batch = next(ordered_batches(self.held_out, count, count))
        return batch["pixels"].to(self.device), self._text(batch)

    def reference(self) -> Tensor | None:
        return frames(self._examples()[0]) if self.tokenizer.paints else None

    def preview(self) -> Tensor | None:
        if not self.tokenizer.paints:
            return None
        pixels, text = self._examples()
        noise = Noise(0, len(pixels), self.device)
        return frames(self.tokenizer.decode(self.tokenizer.encode(pixels, text, noise), text, noise))

    def _tokens(self, tokenizer: VisualTokenizer) -> Iterator[Tensor]:
        """Batches of tokens of training samples."""
        for batch in ordered_batches(self.dataset, 64, CALIBRATION_SAMPLES):
            pixels = batch["pixels"].to(self.device)
            yield tokenizer.encode(pixels, self._text(batch), Noise(0, len(pixels), self.device))

    def export(self, folder: Path, state: dict[str, Tensor], facts: Facts) -> None:
        weights = {k.removeprefix("tokenizer."): v for k, v in state.items()}
        tokenizer = finished(self.tokenizer, weights).to(self.device)
        if not tokenizer.space.discrete:
            tokenizer.calibrate(self._tokens(tokenizer))
        write_model(folder, tokenizer, tokenizer.state_dict())
        if self.text_encoder is not None and self.text_encoder is not self.tokenizer.text_encoder:
            self.text_encoder.save_pretrained(folder / "text_encoder")
        panels = [panel for panel in (self.reference(), self.preview()) if panel is not None]
        title = f"{type(self.tokenizer).__name__}: tokenizer for {self.config.dataset.name}"
        write_card(folder, title, self.command, facts, panels)


class _Network(nn.Module):
    """What the trainer wraps: the tokenizer's training pass."""

    def __init__(self, tokenizer: VisualTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, pixels: Tensor, text: TextFeatures | None, noise: Noise, progress: float) -> TokenizerOutput:
        schedule = {"progress": progress} if self.tokenizer.scheduled else {}
        return self.tokenizer(pixels, text, noise, **schedule)
