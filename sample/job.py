"""Sampling jobs: numbered images that depend on model, settings, seed and number only, whatever the shard, restart or count.

A matrix product gives a row the same bits at every position of one batch shape, but not at another shape. So a job runs one fixed
batch size, recorded in its folder, and pads the last batch; other sizes give the same images up to rounding.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from vargen.errors import DataError, VargenError, nearest
from vargen.model import OnStep
from vargen.noise import Noise
from vargen.pipeline import VisualARPipeline
from vargen.sample.load import load_pipeline
from vargen.sample.manifest import Manifest, read_job
from vargen.sample.motion import frames_of, save_video
from vargen.sample.picture import save_image, to_images
from vargen.sample.results import write_animation, write_grid, write_npz

DEFAULT_BATCH_SIZE = 16
SETTINGS = ("guidance_scale", "temperature", "top_k", "top_p")


@dataclass(frozen=True)
class Job:
    """What decides every image of a job; written to its ``job.json``.

    Attributes:
        model: as the user named it.
        fingerprint: short hash of the weights, so that a folder never mixes images of two models.
        seed: job seed; image ``i`` draws from ``Noise(seed, i)``.
        class_labels, prompts: image ``i`` has entry ``i % len`` of the one that is not empty; both are empty without conditions.
        settings: ``guidance_scale, temperature, top_k, top_p``; None where the model has no such default.
        batch_size: the one batch shape that runs.
        dtype, device: e.g. ``float32`` and ``cpu``.
    """

    model: str
    fingerprint: str
    seed: int
    class_labels: list[int]
    prompts: list[str]
    settings: dict[str, Any]
    batch_size: int
    dtype: str
    device: str

    def condition(self, index: int) -> dict[str, Any]:
        """``{"class_label": c}``, ``{"prompt": text}`` or ``{}`` of image ``index``."""
        if self.class_labels:
            return {"class_label": self.class_labels[index % len(self.class_labels)]}
        return {"prompt": self.prompts[index % len(self.prompts)]} if self.prompts else {}

    def record(self, index: int, file: str) -> dict[str, Any]:
        """The manifest's line of an image."""
        settings = {**self.settings, "batch_size": self.batch_size, "dtype": self.dtype, "device": self.device}
        return {"file": file, "index": index, **self.condition(index), "seed": self.seed, "model": self.model, "settings": settings}


@dataclass(frozen=True)
class JobResult:
    """Where a job's results are.

    Attributes:
        folder: the job's folder.
        done, num: finished images, and images asked for; grid, npz and animation are written once they are equal.
        files: what was written besides the images.
    """

    folder: Path
    done: int
    num: int
    files: list[Path]


def sample(
    model: str,
    *,
    class_labels: Sequence[str] = (),
    prompts: Sequence[str] = (),
    num: int = 16,
    seed: int = 0,
    batch_size: int | None = None,
    output: str | Path | None = None,
    npz: bool = False,
    animate: bool = False,
    shard: tuple[int, int] = (0, 1),
    device: str | None = None,
    dtype: str = "float32",
    progress: bool = True,
    **settings: Any,
) -> JobResult:
    """Draws ``num`` images into a folder, continuing where an earlier run of the same job stopped.

    Args:
        model: bundled name, directory or hub id.
        class_labels: class numbers or names, each item one or several separated by commas; prompts: texts. Both cycle.
        batch_size: images per forward pass; without it that of the folder's job, or 16.
        output: the folder; without it ``outputs/<model>-<settings>``.
        npz: also write ``samples.npz`` for FID evaluators; animate: also write ``animation.gif``.
        shard: ``(k, n)``, draw only the images whose number is k modulo n.
        settings: ``guidance_scale, temperature, top_k, top_p``; None or absent means the model's default.

    Raises:
        VargenError: no such model or label, a folder of another job, or one that cannot be written.
    """
    if num < 1:
        raise VargenError(f"num {num}: expected at least 1")
    if batch_size is not None and batch_size < 1:
        raise VargenError(f"batch size {batch_size}: expected at least 1")
    if not 0 <= shard[0] < shard[1]:
        raise VargenError(f"shard {shard[0]}/{shard[1]}: expected k/n with 0 <= k < n")
    folder = Path(output) if output is not None else default_folder(model, class_labels, prompts, seed, batch_size, dtype, settings)
    pipe = load_pipeline(model, device, dtype)
    if npz and pipe.visual_tokenizer.video:
        raise VargenError("npz batches hold images; this model draws videos: leave --npz out")
    recorded = read_job(folder) or {}
    job = make_job(
        pipe,
        model,
        class_labels=class_labels,
        prompts=prompts,
        seed=seed,
        batch_size=batch_size or recorded.get("batch_size", DEFAULT_BATCH_SIZE),
        dtype=dtype,
        settings=settings,
    )
    manifest = Manifest(folder, asdict(job))
    draw(pipe, job, manifest, range(shard[0], num, shard[1]), progress)
    manifest.refresh()
    done = sum(manifest.done(index) for index in range(num))
    files: list[Path] = []
    if done == num:
        names = pipe.config.class_names
        files.append(write_grid(manifest, num, names))
        if npz:
            files.append(write_npz(manifest, num, seed))
        if animate:
            files.append(
                write_animation(
                    manifest, pipe.visual_tokenizer, num, job.batch_size, lambda on: run_batch(pipe, job, range(job.batch_size), on)
                )
            )
    return JobResult(folder, done, num, files)


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
) -> Job:
    """The job with labels looked up and settings filled from the model's defaults.

    Raises:
        VargenError: a condition that the model does not take, or an unknown class.
    """
    kinds = pipe.model.conditioning
    if class_labels and prompts:
        raise VargenError("class labels and prompts were given: expected one kind")
    if class_labels and "class" not in kinds:
        raise VargenError(f"model '{model}' takes no class labels; it is conditioned on {', '.join(kinds) or 'nothing'}")
    if prompts and "text" not in kinds:
        raise VargenError(f"model '{model}' takes no prompts; it is conditioned on {', '.join(kinds) or 'nothing'}")
    if "text" in kinds and not prompts:
        raise VargenError(f"model '{model}' draws from text: give --prompt or --prompt-file")
    labels: list[int] = []
    if "class" in kinds:
        count = pipe.model.num_classes or 0
        labels = parse_labels(class_labels, count, pipe.config.class_names) if class_labels else list(range(count))
    defaults = pipe.config.defaults or {}
    unknown = next((key for key in settings if key not in SETTINGS), None)
    if unknown is not None:
        raise VargenError(f"unknown setting '{unknown}'{nearest(unknown, SETTINGS)}")
    return Job(
        model=model,
        fingerprint=fingerprint(pipe),
        seed=seed,
        class_labels=labels,
        prompts=list(prompts),
        settings={key: defaults.get(key) if settings.get(key) is None else settings[key] for key in SETTINGS},
        batch_size=batch_size,
        dtype=dtype,
        device=pipe.device.type,
    )


def draw(pipe: VisualARPipeline, job: Job, manifest: Manifest, indices: Sequence[int], progress: bool = True) -> None:
    """Draws those of ``indices`` that are not done, batch by batch; each batch is on disk and recorded before the next begins."""
    pending = [index for index in indices if not manifest.done(index)]
    with tqdm(total=len(indices), initial=len(indices) - len(pending), unit="image", disable=None if progress else True) as bar:
        for batch in _chunks(pending, job.batch_size):
            pixels = run_batch(pipe, job, batch)
            files = [save_sample(pixels[row], manifest.folder, index) for row, index in enumerate(batch)]
            manifest.append([job.record(index, file) for index, file in zip(batch, files)])
            bar.update(len(batch))


def run_batch(pipe: VisualARPipeline, job: Job, batch: Sequence[int], on_step: OnStep | None = None) -> Tensor:
    """Pixels of images ``batch``, at the job's batch shape: a short batch is padded by repeating its last image."""
    padded = [*batch, *[batch[-1]] * (job.batch_size - len(batch))]
    conditions = [job.condition(index) for index in padded]
    arguments: dict[str, Any] = {key: value for key, value in job.settings.items() if value is not None}
    if job.class_labels:
        arguments["class_labels"] = [c["class_label"] for c in conditions]
    elif job.prompts:
        arguments["prompt"] = [c["prompt"] for c in conditions]
    else:
        arguments["batch_size"] = job.batch_size
    noise = Noise(job.seed, padded, pipe.device)
    with torch.inference_mode():
        pixels = pipe(**arguments, generator=noise, output_type="pt", on_step=on_step).images[: len(batch)]
    bad = [index for index, image in zip(batch, pixels) if not torch.isfinite(image).all()]
    if bad:
        raise VargenError(f"image {bad[0]} came out with NaN or infinity: sample in float32, or check that the model was trained")
    return pixels


def save_sample(pixels: Tensor, folder: Path, index: int) -> str:
    """Writes one image as PNG or one video as mp4, atomically; returns the file's name."""
    if pixels.dim() == 4:
        name = f"{index:06d}.mp4"
        save_video(frames_of(pixels[None])[0], folder / name)
    else:
        name = f"{index:06d}.png"
        save_image(to_images(pixels[None])[0], folder / name)
    return name


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


def fingerprint(pipe: VisualARPipeline) -> str:
    """A short hash of every weight's name, shape and first values, the same on every device."""
    digest = hashlib.blake2b(digest_size=8)
    for slot, module in sorted(pipe.components.items()):
        if isinstance(module, nn.Module):
            for name, value in sorted(module.state_dict().items()):
                digest.update(f"{slot}.{name}{tuple(value.shape)}".encode())
                digest.update(value.flatten()[:64].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def default_folder(
    model: str,
    class_labels: Sequence[str],
    prompts: Sequence[str],
    seed: int,
    batch_size: int | None,
    dtype: str,
    settings: dict[str, Any],
) -> Path:
    """``outputs/<model>-<settings>``: one folder for each job, with what the user has set in its name."""
    parts = [Path(model).name or "model"]
    if class_labels:
        parts.append("class" + ",".join(class_labels))
    if prompts:
        parts.append(prompts[0][:32] + (f"+{len(prompts) - 1}" if len(prompts) > 1 else ""))
        parts.append(hashlib.blake2b("\n".join(prompts).encode(), digest_size=3).hexdigest())
    short = {"guidance_scale": "cfg", "temperature": "t", "top_k": "k", "top_p": "p"}
    parts += [f"{short.get(key, key)}{value}" for key, value in settings.items() if value is not None]
    parts += [f"batch{batch_size}"] if batch_size else []
    parts += [dtype] if dtype != "float32" else []
    name = re.sub(r"[^\w.,+-]+", "_", "-".join([*parts, f"seed{seed}"]))
    return Path("outputs") / name[:200]
