"""``vargen sample``: a model's name and settings to a folder of images or videos, with their grid, npz batch and animation."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vargen.decoding.flops import generation_cost
from vargen.errors import VargenError
from vargen.pipeline import VisualARPipeline, split_settings
from vargen.sample.animation import write_animation
from vargen.sample.decoding import Decoder, DecodingChoice
from vargen.sample.edit import edit_files
from vargen.sample.job import DEFAULT_BATCH_SIZE, Job, draw, make_job
from vargen.sample.load import load_pipeline
from vargen.sample.manifest import Manifest, read_job
from vargen.sample.results import write_grid, write_npz


@dataclass(frozen=True)
class JobResult:
    """Where a job's results are.

    Attributes:
        folder: the job's folder.
        done, num: finished images, and images asked for; grid, npz and animation are written once they are equal.
        files: what was written besides the images.
        flops: floating-point operations of generating the tokens of one image, for models whose sampling reports them.
        noun: ``images`` or ``videos``.
        gain: what speculation gained in this run, see :attr:`vargen.sample.decoding.Decoder.gain`.
    """

    folder: Path
    done: int
    num: int
    files: list[Path]
    noun: str = "images"
    flops: int | None = None
    gain: str | None = None


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
    clips: Sequence[str | Path] = (),
    frames: int | None = None,
    image: str | Path | None = None,
    mask: str | Path | None = None,
    keep_pixels: bool = False,
    format: str | None = None,
    fps: float = 8.0,
    shard: tuple[int, int] = (0, 1),
    device: str | None = None,
    dtype: str = "float32",
    progress: bool = True,
    settings: Mapping[str, Any] | None = None,
    decoding: DecodingChoice | None = None,
) -> JobResult:
    """Draws ``num`` images into a folder, continuing where an earlier run of the same job stopped.

    Args:
        model: bundled name, directory or hub id.
        class_labels: class numbers or names, each item one or several separated by commas; prompts: texts. Both cycle.
        batch_size: images per forward pass; without it that of the folder's job, or 16, or 1 where ``decoding`` takes them singly.
        output: the folder; without it ``outputs/<model>-<settings>``.
        npz: also write ``samples.npz`` for FID evaluators; animate: also write ``animation.gif``.
        clips: video files or folders of frames whose first ``frames`` frames are continued; they cycle like labels.
        image, mask, keep_pixels: a picture file, and one that is white where every image draws it anew, see
            :class:`vargen.sample.edit.EditFiles`.
        format, fps: ``mp4`` (the default), ``gif`` or ``frames`` of videos, and their rate; images are ``png``.
        shard: ``(k, n)``, draw only the images whose number is k modulo n.
        settings: ``guidance_scale, temperature, top_k, top_p``, ``guidance_schedule`` or the model's own options; what is absent or
            None has the model's default.
        decoding: what makes it faster; nothing by default.

    Raises:
        VargenError: no such model or label, a way of decoding that the model does not allow, a folder of another job, or one that
            cannot be written.
    """
    if num < 1:
        raise VargenError(f"num {num}: expected at least 1")
    if batch_size is not None and batch_size < 1:
        raise VargenError(f"batch size {batch_size}: expected at least 1")
    if not 0 <= shard[0] < shard[1]:
        raise VargenError(f"shard {shard[0]}/{shard[1]}: expected k/n with 0 <= k < n")
    choice = decoding or DecodingChoice()
    chosen = {key: value for key, value in (settings or {}).items() if value is not None}
    if "decoding" in chosen:
        raise VargenError("decoding is no setting: choose it by --jacobi, --drafter and the like, see `vargen sample --help`")
    edit = edit_files(image, mask, keep_pixels)
    edited = "" if edit is None else f"{Path(edit.image).stem}+{Path(edit.mask).stem}{'+keep' if keep_pixels else ''}"
    extras = {"edit": edited, "given": "+".join(Path(clip).stem for clip in clips), "frames": frames, "format": format}
    extras["decoding"] = choice.name
    named = {**chosen, **{key: value for key, value in extras.items() if value}}
    folder = Path(output) if output is not None else default_folder(model, class_labels, prompts, seed, batch_size, dtype, named)
    pipe = load_pipeline(model, device, dtype)
    if npz and pipe.visual_tokenizer.video:
        raise VargenError("npz batches hold images; this model draws videos: leave --npz out")
    decoder = Decoder(choice, pipe, dtype)
    recorded = read_job(folder) or {}
    job = make_job(
        pipe,
        model,
        class_labels=class_labels,
        prompts=prompts,
        seed=seed,
        batch_size=batch_size or recorded.get("batch_size", 1 if decoder.one_by_one else DEFAULT_BATCH_SIZE),
        dtype=dtype,
        settings=chosen,
        clips=clips,
        frames=frames,
        edit=edit,
        format=format,
        fps=fps,
        decoding=decoder.record,
    )
    manifest = Manifest(folder, asdict(job))
    # counted before blocks are compiled, whose products cannot be
    flops = image_flops(pipe, job) if pipe.model.reports_flops else None
    decoder.prepare()
    draw(pipe, job, manifest, range(shard[0], num, shard[1]), progress, decoder)
    manifest.refresh()
    done = sum(manifest.done(index) for index in range(num))
    files: list[Path] = []
    if done == num:
        manifest.sweep()
        files += write_grid(manifest, num, pipe.config.class_names, fps)
        if npz:
            files.append(write_npz(manifest, num, seed))
        if animate:
            files.append(write_animation(pipe, job, folder, num, decoder))
    noun = "videos" if pipe.visual_tokenizer.video else "images"
    return JobResult(folder, done, num, files, noun, flops, decoder.gain)


def image_flops(pipe: VisualARPipeline, job: Job) -> int:
    """What the tokens of one image of the job cost, see :func:`vargen.decoding.flops.generation_cost`."""
    guidance, sampling, options = split_settings(job.settings)
    return generation_cost(pipe.model, guidance=guidance, sampling=sampling, **options).flops


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
    short = {"guidance_scale": "cfg", "temperature": "t", "top_k": "k", "top_p": "p", "decoding": ""}
    parts += [f"{short.get(key, key)}{value}" for key, value in settings.items()]
    parts += [f"batch{batch_size}"] if batch_size else []
    parts += [dtype] if dtype != "float32" else []
    name = re.sub(r"[^\w.,+-]+", "_", "-".join([*parts, f"seed{seed}"]))
    return Path("outputs") / name[:200]
