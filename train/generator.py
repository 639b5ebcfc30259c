"""Training a generator on the tokens of a frozen tokenizer, conditioned on class labels or captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from vargen.clips import check_given, continuation
from vargen.condition import Condition, TextFeatures
from vargen.data.base import VisualDataset
from vargen.data.cache import CachedTokens
from vargen.data.loader import Batch, batch_indices, ordered_batches, training_batches
from vargen.errors import ConfigError
from vargen.guidance import Guidance
from vargen.model import Generator, Sampling, VargenModel
from vargen.noise import ModalNoise, Noise
from vargen.pipeline import VisualARPipeline
from vargen.sample.load import load_tokenizer
from vargen.text import WordEncoder
from vargen.train.build import (
    build_data,
    build_generator,
    build_text_encoder,
    copy_with,
    derived,
    finished,
    for_videos,
    frames,
    plain,
    require_cache,
    with_levels,
)
from vargen.train.card import write_card
from vargen.train.loop import TRAINING
from vargen.train.optim import LR_SCHEDULER, OPTIMIZER
from vargen.train.task import Facts, Task

SCHEMA: dict[str, Any] = {
    "kind": "generator",
    "seed": 0,
    "output_dir": None,
    "dataset": {},
    "validation": {"dataset": {}, "samples": 512, "pictures": 16},
    "tokenizer": None,
    "tokens": {"cache": False, "views": 1, "sample": True},  # sample: draw where the tokenizer draws, or take its mode
    "given_frames": None,  # of models that continue clips: how many frames they are given
    "model": {"system": None, "preset": None, "config": {}, "path": None},
    "text_encoder": {"path": None, "max_length": None, "words": None},
    "sampling": {
        "guidance_scale": 1.0,
        "guidance_schedule": "constant",
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "options": {},
    },
    "export": {"dtype": "float32"},
    "optimizer": OPTIMIZER,
    "lr_scheduler": LR_SCHEDULER,
    "training": TRAINING,
}


class GeneratorTask(Task):
    """A generator, its frozen tokenizer, its text encoder and its data, as a recipe with the keys of ``SCHEMA`` describes them.

    A word encoder (``text_encoder.words``) is trained along with the generator; any other text encoder is frozen.

    Raises:
        ConfigError: unknown system, preset or argument; text where there are no captions; more classes than the model has.
        SpaceError: generator and tokenizer do not share a token space.
    """

    def __init__(self, config: DictConfig, command: str = "vargen train") -> None:
        torch.manual_seed(config.seed)
        self.config, self.command = config, command
        if config.tokenizer is None:
            raise ConfigError("tokenizer: expected the directory of a trained tokenizer, a bundled name or a hub id")
        self.dataset, self.held_out = build_data(config)
        self.tokenizer = for_videos(load_tokenizer(str(config.tokenizer), device="cpu"), self.dataset)
        self.text_encoder = build_text_encoder(plain(config.text_encoder), self.dataset)
        model = build_generator(plain(config.model), self.tokenizer, self.dataset, self.text_encoder)
        self.tokenizer = with_levels(self.tokenizer, model)
        self.kinds = model.conditioning
        trained = config.text_encoder.words is not None
        self._check_condition(model)
        require_cache(self.dataset, self.held_out, self.tokenizer, None if trained else self.text_encoder)
        self.network = _Network(model, self.text_encoder if trained else None)
        self.fixed = [self.tokenizer] + ([self.text_encoder] if self.text_encoder is not None and not trained else [])
        self.cache: TokenCache | None = None

    def _check_condition(self, model: Generator) -> None:
        if self.text_encoder is None and ("text" in self.kinds or self.tokenizer.takes_text):
            raise ConfigError("text is needed: set text_encoder.path, or text_encoder.words to train a small encoder along")
        if self.tokenizer.takes_text and self.config.text_encoder.words is not None:
            raise ConfigError("the tokenizer takes captions too: give text_encoder.path, the encoder that it was trained with")
        if "class" in self.kinds and model.num_classes is not None and self.dataset.num_classes > model.num_classes:
            raise ConfigError(
                f"the data set has {self.dataset.num_classes} classes, the model {model.num_classes}: set model.config.num_classes"
            )

        if "context" in self.kinds or self.config.given_frames is not None:
            check_given(model, self.tokenizer, int(self.config.given_frames or 1))
        if "context" in self.kinds and (self.config.tokens.cache or isinstance(self.dataset, CachedTokens)):
            raise ConfigError(
                "frame prediction from a context encodes the given frames of every clip: train it from videos, not a cache"
            )
        if self.config.tokens.cache and isinstance(self.dataset, CachedTokens):
            raise ConfigError("tokens.cache encodes pictures, but the data set is a cache already: leave one of them out")

    def models(self) -> dict[str, VargenModel]:
        models: dict[str, VargenModel] = {"model": self.network.model}
        return models if self.network.text_encoder is None else {**models, "text_encoder": self.network.text_encoder}

    def setup(self, device: torch.device) -> None:
        super().setup(device)
        self.device = device
        if self.config.tokens.cache:
            self.cache = TokenCache(self, self.dataset, self.config.tokens.views)

    def batches(self, seed: int, start: int, batch_size: int, rank: int, world: int, num_workers: int) -> Iterator[Batch]:
        if self.cache is None:
            return training_batches(self.dataset, batch_size, seed, start, rank, world, num_workers)
        return self.cache.batches(seed, start, batch_size, rank, world)

    def features(self, batch: Batch) -> TextFeatures | None:
        """Features of the captions by a frozen text encoder, computed or cached; None where there is none."""
        if self.text_encoder is None or self.network.text_encoder is not None:
            return None
        if "text_features" in batch:
            return TextFeatures(batch["text_features"], batch["text_mask"]).to(self.device)
        return self.text_encoder.encode(batch["captions"]).to(self.device)

    @torch.no_grad()
    def tokens(self, batch: Batch, noise: Noise) -> Tensor:
        """Tokens of a batch: encoded from its pixels, drawn from cached posteriors, or as they were cached."""
        if "views" in batch:
            view = noise.integers("view", batch["views"].shape[1])
            chosen = batch["views"][torch.arange(len(view)), view.to(batch["views"].device)].to(self.device)
            return chosen.long() if self.tokenizer.space.discrete else chosen
        noise = noise if self.config.tokens.sample else ModalNoise(noise.batch_size, self.device)
        if "pixels" in batch:
            text = self.features(batch) if self.tokenizer.takes_text else None
            return self.tokenizer.encode(batch["pixels"].to(self.device), text, noise)
        if "moments" in batch:
            return self.tokenizer.tokens_of(batch["moments"].to(self.device).float(), noise)
        tokens = batch["tokens"].to(self.device, torch.int64 if self.tokenizer.space.discrete else torch.float32)
        return self.tokenizer.of_base(tokens) if derived(self.tokenizer) else tokens

    def context(self, batch: Batch) -> Tensor | None:
        """Tokens of the given frames, for models that look at them as another clip."""
        if "context" not in self.kinds:
            return None
        given = batch["pixels"][:, :, : int(self.config.given_frames or 1)]
        return continuation(self.network.model, self.tokenizer, given).context

    def losses(self, network: nn.Module, batch: Batch, noise: Noise, step: int) -> dict[str, Tensor]:
        tokens = self.tokens(batch, noise)
        labels = batch["class_labels"].to(self.device) if "class" in self.kinds else None
        captions = batch["captions"] if "text" in self.kinds else None
        features = self.features(batch) if captions is not None else None
        progress = max(step - 1, 0) / max(self.total_steps, 1)
        return network(tokens, labels, captions, features, self.context(batch), noise, progress)

    def validate(self) -> dict[str, float]:
        """Mean loss over held-out samples, with the same random choices at every call."""
        total, count = 0.0, 0
        for number, batch in enumerate(
            ordered_batches(self.held_out, self.config.training.batch_size, self.config.validation.samples)
        ):
            size = len(batch["class_labels"])
            total += size * float(self.losses(self.network, batch, Noise(0, size, self.device).at(number), 0)["loss"])
            count += size
        return {"loss": total / count}

    def preview(self) -> Tensor:
        """Samples at the recipe's sampling settings: classes in turn, or the first held-out captions or clips."""
        count, settings, model = int(self.config.validation.pictures), self.config.sampling, self.network.model
        batch = next(ordered_batches(self.held_out, count, count))
        count = len(batch["class_labels"])
        labels = torch.arange(count, device=self.device) % self.dataset.num_classes if "class" in self.kinds else None
        text = None
        if "text" in self.kinds:
            trained = self.network.text_encoder
            text = trained.encode(batch["captions"]) if trained is not None else self.features(batch)
        condition = Condition(class_labels=labels, text=text)
        if self.config.given_frames is not None:
            given = continuation(model, self.tokenizer, batch["pixels"][:, :, : int(self.config.given_frames)])
            condition = replace(condition, tokens=given.tokens, context=given.context)
        noise = Noise(0, count, self.device)
        tokens = model.generate(
            condition,
            batch_size=count,
            noise=noise,
            guidance=Guidance(settings.guidance_scale, schedule=settings.guidance_schedule),
            sampling=Sampling(settings.temperature, settings.top_k, settings.top_p),
            **plain(settings.options),
        )
        painted_text = self.features(batch) if self.tokenizer.takes_text else None
        return frames(self.tokenizer.decode(tokens, painted_text, noise))

    def export(self, folder: Path, state: dict[str, Tensor], facts: Facts) -> None:
        dtype = getattr(torch, str(self.config.export.dtype))
        # not by diffusers' own `to`, which warns of modules to keep in float32 even where there are none
        parts = {name: nn.Module.to(copy_with(model, name, state), dtype) for name, model in self.models().items()}
        tokenizer = nn.Module.to(finished(self.tokenizer, self.tokenizer.state_dict()), dtype)
        settings = plain(self.config.sampling)
        pipeline = VisualARPipeline(
            model=parts["model"],
            visual_tokenizer=tokenizer,
            text_encoder=parts.get("text_encoder", self.text_encoder),
            class_names=self.dataset.classes if "class" in self.kinds else None,
            defaults={**settings.pop("options"), **settings},
        )
        pipeline.save_pretrained(folder)
        write_card(folder, f"{type(parts['model']).__name__} of {self.config.dataset.name}", self.command, facts)


class _Network(nn.Module):
    """What the trainer wraps: the generator, and the text encoder where that is trained too."""

    def __init__(self, model: Generator, text_encoder: WordEncoder | None) -> None:
        super().__init__()
        self.model, self.text_encoder = model, text_encoder

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None,
        captions: list[str] | None,
        features: TextFeatures | None,
        context: Tensor | None,
        noise: Noise,
        progress: float,
    ) -> dict[str, Tensor]:
        if captions is not None and self.text_encoder is not None:
            features = self.text_encoder.encode(captions)
        schedule = {"progress": progress} if self.model.scheduled else {}
        condition = Condition(class_labels=labels, text=features, context=context)
        return self.model.training_losses(tokens, condition, noise, **schedule)


class TokenCache:
    """Tokens of a whole data set in memory: ``views`` of every item, as the data set's random augmentation gives them per epoch."""

    def __init__(self, task: GeneratorTask, dataset: VisualDataset, views: int) -> None:
        if views < 1:
            raise ConfigError(f"tokens.views {views}: expected at least 1")
        self.captions: list[str] | None = [] if dataset.has_captions else None
        self.labels = dataset.labels
        rows = []
        for start in range(0, len(dataset), 64):
            items = [[dataset.get(i, view) for view in range(views)] for i in range(start, min(start + 64, len(dataset)))]
            captions = [item["caption"] for views_ in items for item in views_] if self.captions is not None else []
            batch = {"pixels": torch.stack([item["pixels"] for views_ in items for item in views_]), "captions": captions}
            numbers = torch.arange(start * views, start * views + len(batch["pixels"]))
            tokens = task.tokens(batch, Noise(task.config.seed, numbers, task.device)).unflatten(0, (len(items), views)).cpu()
            rows.append(tokens.to(torch.int32) if task.tokenizer.space.discrete else tokens)
            if self.captions is not None:
                self.captions += captions[::views]
        self.tokens = torch.cat(rows)

    def batches(self, seed: int, start: int, batch_size: int, rank: int, world: int) -> Iterator[Batch]:
        step = start
        while True:
            index, _ = batch_indices(seed, step, batch_size, len(self.tokens), rank, world)
            batch: Batch = {"views": self.tokens[index], "class_labels": self.labels[index], "index": index}
            if self.captions is not None:
                batch["captions"] = [self.captions[i] for i in index.tolist()]
            yield batch
            step += 1
