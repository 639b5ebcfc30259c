"""Training a drafter for speculative decoding on the hidden states of a frozen next-token generator (LANTERN, EAGLE)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from vargen.backbones.causal import CausalGenerator
from vargen.backbones.drafter import EagleDrafter, target_states
from vargen.condition import Condition
from vargen.config import check_keys
from vargen.data.loader import Batch, ordered_batches
from vargen.errors import ConfigError
from vargen.model import VargenModel
from vargen.noise import Noise
from vargen.sample.load import load_pipeline
from vargen.train.build import build_data, plain, require_cache
from vargen.train.card import write_card
from vargen.train.generator import GeneratorTask
from vargen.train.loop import TRAINING
from vargen.train.optim import LR_SCHEDULER, OPTIMIZER
from vargen.train.state import write_model
from vargen.train.task import Facts

SCHEMA: dict[str, Any] = {
    "kind": "drafter",
    "seed": 0,
    "output_dir": None,
    "dataset": {},
    "validation": {"dataset": {}, "samples": 512},
    "target": None,
    "tokens": {"cache": False, "views": 1, "sample": True},
    "model": {"config": {}, "path": None},
    "losses": {"state_noise": 0.2, "probability_weight": 0.1},
    "export": {"dtype": "float32"},
    "optimizer": OPTIMIZER,
    "lr_scheduler": LR_SCHEDULER,
    "training": TRAINING,
}


class DrafterTask(GeneratorTask):
    """A drafter of a trained pipeline's generator; pictures become tokens, and these the generator's states, as they are needed.

    Raises:
        ConfigError: a target that is no next-token generator, or needs what the data set does not have.
    """

    def __init__(self, config: DictConfig, command: str = "vargen train") -> None:
        torch.manual_seed(config.seed)
        self.config, self.command = config, command
        if config.target is None:
            raise ConfigError("target: expected the directory of a trained pipeline, a bundled name or a hub id")
        pipeline = load_pipeline(str(config.target), device="cpu")
        if not isinstance(pipeline.model, CausalGenerator):
            raise ConfigError(f"target '{config.target}' is a {type(pipeline.model).__name__}: expected a next-token generator")
        self.target, self.tokenizer, self.text_encoder = pipeline.model, pipeline.visual_tokenizer, pipeline.text_encoder
        self.dataset, self.held_out = build_data(config)
        require_cache(self.dataset, self.held_out, self.tokenizer, self.text_encoder)
        self.kinds = self.target.conditioning
        if "context" in self.kinds:
            raise ConfigError("drafters of frame prediction: data sets give no pairs of clips to learn from")
        if "text" in self.kinds and not self.dataset.has_captions:
            raise ConfigError("the target is conditioned on text, but the data set has no captions")
        if "class" in self.kinds and self.dataset.num_classes > (self.target.num_classes or 0):
            raise ConfigError(f"the data set has {self.dataset.num_classes} classes, the target {self.target.num_classes}")
        self.network = _Network(build_drafter(plain(config.model), self.target))
        encoder = self.text_encoder if isinstance(self.text_encoder, nn.Module) else None
        self.fixed = [module for module in (self.target, self.tokenizer, encoder) if module is not None]
        self.cache = None

    def models(self) -> dict[str, VargenModel]:
        return {"model": self.network.model}

    def losses(self, network: nn.Module, batch: Batch, noise: Noise, step: int) -> dict[str, Tensor]:
        tokens = self.tokens(batch, noise).flatten(1)
        labels = batch["class_labels"].to(self.device) if "class" in self.kinds else None
        features = self.features(batch) if "text" in self.kinds else None
        drop = noise.uniform("condition_dropout") < self.target.condition_dropout
        states = target_states(self.target, tokens, Condition(class_labels=labels, text=features), drop)
        return network(states, tokens, self.target, noise, **plain(self.config.losses))

    def validate(self) -> dict[str, float]:
        """Means of all losses over held-out samples, and how often drafter and target agree on the most probable token."""
        totals: dict[str, float] = {}
        samples, size = self.config.validation.samples, self.config.training.batch_size
        count = 0
        for number, batch in enumerate(ordered_batches(self.held_out, size, samples)):
            rows = len(batch["class_labels"])
            for name, value in self.losses(self.network, batch, Noise(0, rows, self.device).at(number), 0).items():
                totals[name] = totals.get(name, 0.0) + rows * float(value)
            count += rows
        return {name: total / count for name, total in totals.items()}

    def preview(self) -> None:
        """A drafter makes no pictures."""
        return None

    def export(self, folder: Path, state: dict[str, Tensor], facts: Facts) -> None:
        weights = {key.removeprefix("model."): value for key, value in state.items()}
        write_model(folder, self.network.model, weights, getattr(torch, str(self.config.export.dtype)))
        title = f"Drafter of {type(self.target).__name__} on {self.config.dataset.name}"
        write_card(folder, title, self.command, facts)


def build_drafter(config: dict[str, Any], target: CausalGenerator) -> EagleDrafter:
    """A fresh drafter with constructor arguments ``config``, or the one saved at ``path``."""
    if config["path"] is not None:
        return EagleDrafter.from_pretrained(str(config["path"])).train()
    check_keys(config["config"], sorted(EagleDrafter._get_init_keys(EagleDrafter)), "model.config of a drafter")
    return EagleDrafter.for_target(target, **config["config"])


class _Network(nn.Module):
    """What the trainer wraps."""

    text_encoder = None

    def __init__(self, model: EagleDrafter) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, states: Tensor, tokens: Tensor, target: CausalGenerator, noise: Noise, **settings: float
    ) -> dict[str, Tensor]:
        return self.model.training_losses(states, tokens, target, noise, **settings)
