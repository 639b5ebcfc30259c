"""Training a visual tokenizer: reconstruction, perceptual and adversarial losses, and the care for its codebook."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from vargen.condition import TextFeatures
from vargen.data.base import VisualDataset, build_dataset
from vargen.data.loader import Batch, ordered_batches
from vargen.errors import ConfigError
from vargen.losses.objective import TokenizerObjective
from vargen.model import TokenizerOutput, VisualTokenizer
from vargen.noise import Noise
from vargen.text import load_text_encoder
from vargen.train.build import build_tokenizer, frames, plain
from vargen.train.card import write_card
from vargen.train.loop import TRAINING
from vargen.train.optim import LR_SCHEDULER, OPTIMIZER
from vargen.train.state import write_model
from vargen.train.task import Facts, Task

# left out, the perceptual weights are looked for in the cache; a recipe that does without them says `perceptual: null`
OBJECTIVE: dict[str, Any] = {name: p.default for name, p in inspect.signature(TokenizerObjective).parameters.items()}
OBJECTIVE["perceptual"] = "cache"

SCHEMA: dict[str, Any] = {
    "kind": "tokenizer",
    "seed": 0,
    "output_dir": None,
    "dataset": {},
    "validation": {"dataset": {}, "samples": 512, "pictures": 16},
    "model": {"system": None, "preset": None, "config": {}, "path": None},
    "text_encoder": {"path": None, "max_length": None},
    "objective": OBJECTIVE,
    "optimizer": OPTIMIZER,
    "discriminator_optimizer": dict.fromkeys(OPTIMIZER),
    "lr_scheduler": LR_SCHEDULER,
    "training": TRAINING,
}


class TokenizerTask(Task):
    """A visual tokenizer, its objective and its data, as a recipe with the keys of ``SCHEMA`` describes them.

    Raises:
        ConfigError: unknown system, preset or argument; a data set of another size or kind than the tokenizer's.
    """

    def __init__(self, config: DictConfig, command: str = "vargen train") -> None:
        torch.manual_seed(config.seed)
        self.config, self.command = config, command
        self.dataset = build_dataset(plain(config.dataset))
        self.held_out = build_dataset({**plain(config.dataset), "split": "test", **plain(config.validation.dataset)})
        self.tokenizer = build_tokenizer(plain(config.model), self.dataset)
        self.network = _Network(self.tokenizer)
        self.objective = TokenizerObjective(**plain(config.objective))
        if self.objective.discriminator_parameters():
            self.adversary = self.objective
        self.text_encoder: Any = None
        if self.tokenizer.takes_text:
            self.text_encoder = _text_encoder(config, self.dataset)
            self.fixed = (self.text_encoder,)

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
        output: TokenizerOutput = network(pixels, self._text(batch), noise)
        self._last = (pixels, None if output.reconstruction is None else output.reconstruction.detach())
        losses = self.objective.generator_losses(pixels, output, step, self.tokenizer.last_layer)
        scalars = {name: value for name, value in output.features.items() if value.dim() == 0}
        return {**losses, **scalars}

    def adversary_losses(self, step: int) -> dict[str, Tensor] | None:
        return self.objective.discriminator_losses(*self._last, step)

    def validate(self) -> dict[str, float]:
        """PSNR in dB over held-out samples (mean of the samples' own), and the share of codes that they use."""
        psnr, used = [], set()
        for batch in ordered_batches(self.held_out, self.config.training.batch_size, self.config.validation.samples):
            pixels = batch["pixels"].to(self.device)
            text = self._text(batch)
            tokens = self.tokenizer.encode(pixels, text, Noise(0, len(pixels), self.device))
            painted = self.tokenizer.decode(tokens, text, Noise(0, len(pixels), self.device)).clamp(-1, 1)
            psnr.append(10 * torch.log10(4 / (painted - pixels).square().flatten(1).mean(1).clamp(min=1e-10)))
            if self.tokenizer.space.discrete:
                used.update(tokens.flatten().tolist())
        scores = {"psnr": float(torch.cat(psnr).mean())}
        size = self.tokenizer.space.codebook_size
        return {**scores, "codebook_usage": len(used) / size} if size else scores

    def _examples(self) -> tuple[Tensor, TextFeatures | None]:
        batch = next(ordered_batches(self.held_out, self.config.validation.pictures, self.config.validation.pictures))
        return batch["pixels"].to(self.device), self._text(batch)

    def reference(self) -> Tensor:
        return frames(self._examples()[0])

    def preview(self) -> Tensor:
        pixels, text = self._examples()
        noise = Noise(0, len(pixels), self.device)
        return frames(self.tokenizer.decode(self.tokenizer.encode(pixels, text, noise), text, noise))

    def export(self, folder: Path, state: dict[str, Tensor], facts: Facts) -> None:
        write_model(folder, self.tokenizer, {k.removeprefix("tokenizer."): v for k, v in state.items()})
        write_card(folder, f"{type(self.tokenizer).__name__}: tokenizer for {self.config.dataset.name}", self.command, facts)


class _Network(nn.Module):
    """What the trainer wraps: the tokenizer's training pass."""

    def __init__(self, tokenizer: VisualTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, pixels: Tensor, text: TextFeatures | None, noise: Noise) -> TokenizerOutput:
        return self.tokenizer(pixels, text, noise)


def _text_encoder(config: DictConfig, dataset: VisualDataset) -> Any:
    if config.text_encoder.path is None:
        raise ConfigError("this tokenizer takes captions: set text_encoder.path, e.g. google/flan-t5-base")
    if not dataset.has_captions:
        raise ConfigError("this tokenizer takes captions, but the data set has none")
    return load_text_encoder(config.text_encoder.path, max_length=config.text_encoder.max_length)
