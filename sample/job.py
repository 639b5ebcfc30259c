"""Sampling jobs: numbered images that depend on model, settings, seed and number only, whatever the shard, restart or count.

A matrix product gives a row the same bits at every position of one batch shape, but not at another shape. So a job runs one fixed
batch size, recorded in its folder, and pads the last batch; other sizes give the same images up to rounding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vargen.errors import DataError, VargenError, nearest
from vargen.model import OnStep
from vargen.noise import Noise
from vargen.pipeline import VisualARPipeline
from vargen.sample.decoding import Decoder
from vargen.sample.edit import EditFiles
from vargen.sample.files import pick_format, save_sample
from vargen.sample.given import Given, read_given
from vargen.sample.load import fingerprint
from vargen.sample.manifest import Manifest

DEFAULT_BATCH_SIZE = 16


@dataclass(frozen=True)
class Job:
    """What decides every image of a job; written to its ``job.json``.

    Attributes:
        model: as the user named it.
        fingerprint: short hash of the weights, so that a folder never mixes images of two models.
        seed: job seed; image ``i`` draws from ``Noise(seed, i)``.
        class_labels, prompts: image ``i`` has entry ``i % len`` of each that is not empty.
        given: first frames of clips to be continued, entry ``i % len`` for video ``i``.
        edit: the picture and mask that every image is an edit of; None for images from nothing.
        settings: arguments of the pipeline's call: the model's defaults, and what the user set.
        batch_size: the one batch shape that runs.
        dtype, device: e.g. ``float32`` and ``cpu``.
        format, fps: of the files, see :func:`vargen.sample.files.save_sample`.
        decoding: how it is decoded, see :attr:`vargen.sample.decoding.Decoder.record`; None without acceleration.
    """

    model: str
    fingerprint: str
    seed: int
    class_labels: list[int]
    prompts: list[str]
    given: list[Given]
    edit: EditFiles | None
    settings: dict[str, Any]
    batch_size: int
    dtype: str
    device: str
    format: str
    fps: float
    decoding: dict[str, Any] | None = None

    def condition(self, index: int) -> dict[str, Any]:
        """``class_label``, ``prompt`` and ``given`` (file and number of frames) of image ``index``, as far as the job has them."""
        condition: dict[str, Any] = {}
        if self.class_labels:
            condition["class_label"] = self.class_labels[index % len(self.class_labels)]
        if self.prompts:
            condition["prompt"] = self.prompts[index % len(self.prompts)]
        if self.given:
            clip = self.given[index % len(self.given)]
            condition["given"] = {"file": clip.file, "frames": clip.frames}
        return condition

    def conditions(self, indices: Sequence[int]) -> dict[str, Any]:
        """The pipeline's arguments that condition a batch."""
        each = [self.condition(index) for index in indices]
        batch: dict[str, Any] = {"class_labels": [c["class_label"] for c in each]} if self.class_labels else {}
        if self.prompts:
            batch["prompt"] = [c["prompt"] for c in each]
        if self.given:
            batch["video"] = torch.stack([self.given[index % len(self.given)].pixels() for index in indices])
        return batch or {"batch_size": len(each)}

    def record(self, index: int, file: str) -> dict[str, Any]:
        """The manifest's line of an image."""
        settings = {**self.settings, "batch_size": self.batch_size, "dtype": self.dtype, "device": self.device}
        if self.decoding is not None:
            settings["decoding"] = self.decoding
        edit = {} if self.edit is None else {"image": self.edit.image, "mask": self.edit.mask}
        return {
            "file": file,
            "index": index,
            **self.condition(index),
            **edit,
            "seed": self.seed,
            "model": self.model,
            "settings": settings,
        }


def make_job(
    pipe: VisualARPipeline,
    model: str,
    *,
    class_labels: Sequence[str],
    prompts: Sequence[str],
    seed: int,
    batch_size: int,
    dtype: str,
    settings: dict[str, Any],
    clips: Sequence[str | Path] = (),
    frames: int | None = None,
    edit: EditFiles | None = None,
    format: str | None = None,
    fps: float = 8.0,
    decoding: dict[str, Any] | None = None,
) -> Job:
    """The job with labels looked up, given frames read and settings filled from the model's defaults.

    Raises:
        VargenError: a condition that the model does not take, an unknown class, or frames that it cannot continue.
    """
    kinds, names = pipe.model.conditioning, pipe.config.class_names
    takes = f"it is conditioned on {', '.join(kinds) or 'nothing'}"
    if class_labels and "class" not in kinds:
        raise VargenError(f"model '{model}' takes no class labels; {takes}")
    if prompts and pipe.text_encoder is None:
        raise VargenError(f"model '{model}' takes no prompts; {takes}")
    if not prompts and (("text" in kinds and "class" not in kinds) or pipe.visual_tokenizer.takes_text):
        raise VargenError(f"model '{model}' draws from text: give --prompt or --prompt-file")
    if pipe.continues_only and not clips:
        raise VargenError(f"model '{model}' continues given frames: give --frames CLIP")
    if not 0 < fps < float("inf"):
        raise VargenError(f"fps {fps}: expected a positive rate")
    count = pipe.model.num_classes or 0
    labels = parse_labels(class_labels, count, names)
    if "class" in kinds and not labels and not (prompts and "text" in kinds):
        labels = list(range(count))
    return Job(
        model=model,
        fingerprint=fingerprint(pipe.components),
        seed=seed,
        class_labels=labels,
        prompts=list(prompts),
        given=read_given(pipe, clips, frames),
        edit=edit,
        settings={**pipe.config.defaults, **settings},
        batch_size=batch_size,
        dtype=dtype,
        device=pipe.device.type,
        format=pick_format(format, pipe.visual_tokenizer.video),
        fps=float(fps),
        decoding=decoding,
    )


def draw(
    pipe: VisualARPipeline,
    job: Job,
    manifest: Manifest,
    indices: Sequence[int],
    progress: bool = True,
    decoder: Decoder | None = None,
) -> None:
    """Draws those of ``indices`` that are not done, batch by batch; each batch is on disk and recorded before the next begins.

    ``decoder`` is the one of the job's ``decoding``, and counts what it gained.
    """
    pending = [index for index in indices if not manifest.done(index)]
    with tqdm(total=len(indices), initial=len(indices) - len(pending), unit="image", disable=None if progress else True) as bar:
        for start in range(0, len(pending), job.batch_size):
            batch = pending[start : start + job.batch_size]
            pixels = run_batch(pipe, job, batch, decoder=decoder)
            if decoder is not None:
                decoder.count(len(batch))
            manifest.start()
            files = [save_sample(pixels[row], manifest.folder, index, job.format, job.fps) for row, index in enumerate(batch)]
            manifest.append([job.record(index, file) for index, file in zip(batch, files)])
            bar.update(len(batch))


def run_batch(
    pipe: VisualARPipeline, job: Job, batch: Sequence[int], on_step: OnStep | None = None, decoder: Decoder | None = None
) -> Tensor:
    """Pixels of images ``batch``, at the job's batch shape: a short batch is padded by repeating its last image."""
    padded = [*batch, *[batch[-1]] * (job.batch_size - len(batch))]
    noise = Noise(job.seed, padded, pipe.device)
    edit = {} if job.edit is None else job.edit.arguments()
    options = {**job.settings, **({} if decoder is None else decoder.arguments())}
    drawn = pipe(**job.conditions(padded), **edit, **options, generator=noise, output_type="pt", on_step=on_step)
    pixels = drawn.images[: len(batch)]
    bad = [index for index, image in zip(batch, pixels) if not torch.isfinite(image).all()]
    if bad:
        raise VargenError(f"image {bad[0]} came out with NaN or infinity: sample in float32, or check that the model was trained")
    return pixels


def parse_labels(texts: Sequence[str], num_classes: int, names: Sequence[str] | None) -> list[int]:
    """Class numbers from numbers or names; an item that is no name itself may hold several, separated by commas.

    Raises:
        DataError: an unknown class.
    """
    known = {name.casefold(): number for number, name in enumerate(names or ())}
    labels = []
    for text in texts:
        items = [text] if text.strip().casefold() in known else text.split(",")
        for item in (item.strip() for item in items):
            if re.fullmatch(r"-?\d+", item):
                label = int(item)
            elif item.casefold() in known:
                label = known[item.casefold()]
            else:
                hint = nearest(item, names) if names else "; the model knows no class names"
                raise DataError(f"class label '{item}': expected 0..{num_classes - 1}{hint}")
            if not 0 <= label < num_classes:
                raise DataError(f"class label {label}: expected 0..{num_classes - 1}")
            labels.append(label)
    return labels
