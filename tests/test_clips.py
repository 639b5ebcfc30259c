"""Given frames: what users pass, which models continue them, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_pipelines import tiny_pipeline, tiny_video_pipeline
from vargen import NAR, NBP, NBPTokenizer, Noise, VisualARPipeline
from vargen.clips import as_clips, check_given
from vargen.errors import VargenError
from vargen.pipeline import to_output


def given(count: int = 2, frames: int = 2, size: int = 16) -> torch.Tensor:
    return Noise(3, count).uniform("given", (3, frames, size, size)) * 2 - 1


def test_every_form_of_a_clip_is_the_same() -> None:
    frames = np.arange(2 * 3 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 3, 4, 5, 3)
    pixels = as_clips(frames)
    assert pixels.shape == (2, 3, 3, 4, 5)
    lists = [[Image.fromarray(frame) for frame in clip] for clip in frames]
    for form in (pixels, lists):
        assert torch.equal(as_clips(form), pixels)
    for form in (pixels[1], frames[1], lists[1]):
        assert torch.equal(as_clips(form), pixels[1:])
    assert torch.equal(as_clips(to_output(pixels, "pil")), pixels), "what a pipeline returns can be given back"


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(3, 4, 4), "expected pixels"),
        (torch.zeros(2, 1, 2, 4, 4), "expected pixels"),
        (torch.zeros(1, 3, 2, 4, 4, dtype=torch.uint8), "expected pixels"),
        (torch.zeros(1, 3, 0, 4, 4), "at least one frame"),
        (torch.full((1, 3, 1, 4, 4), float("nan")), "NaN"),
        (np.zeros((2, 4, 4, 3)), "expected uint8 frames"),
        ([], "at least one frame"),
        ([[]], "at least one frame"),
        (["clip.mp4"], "list of PIL images"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))], "different sizes"),
        ([[Image.new("RGB", (4, 4))], [Image.new("RGB", (4, 4))] * 2], "different lengths"),
    ],
)
def test_what_is_no_clip_is_refused(video: object, message: str) -> None:
    with pytest.raises(VargenError, match=message):
        as_clips(video)  # type: ignore[arg-type]


@pytest.mark.parametrize("system", ["nbp", "next-token", "nbp-prediction"])
@pytest.mark.parametrize("frames", [1, 3])
def test_given_frames_are_kept_and_continued(system: str, frames: int) -> None:
    pipe = tiny_video_pipeline(system)
    labels = {} if system == "nbp-prediction" else {"class_labels": ["left", "still"]}
    clip = given(frames=frames)
    steps = []
    out = pipe(video=clip, generator=1, output_type="pt", on_step=steps.append, **labels)
    tokens = pipe.visual_tokenizer.encode(clip)
    assert out.images.shape == (2, 3, 4, 16, 16)
    assert torch.equal(out.tokens[:, :frames], tokens)
    rest = (4 - frames) * 16
    # the first row of the hybrid start is among the given ones, so that only whole rows are left
    assert len(steps) == (rest if system == "next-token" else rest // 4)
    again = pipe(video=to_output(clip, "pil")[1], generator=Noise(1, [1]), **{k: v[1:] for k, v in labels.items()})
    assert torch.equal(again.tokens[:, :frames], pipe.visual_tokenizer.encode(as_clips(to_output(clip, "pil")[1])))


def test_a_context_is_the_clip_with_its_last_frame_repeated() -> None:
    pipe = tiny_video_pipeline("larp-prediction")
    clip = given(frames=2)
    condition, size = pipe.condition(video=clip)
    assert size == 2
    whole = torch.cat([clip, clip[:, :, 1:].expand(-1, -1, 2, -1, -1)], dim=2)
    assert condition.tokens is None
    assert torch.equal(condition.context, pipe.visual_tokenizer.encode(whole))
    assert pipe(video=clip, generator=0, output_type="pt").images.shape == (2, 3, 4, 16, 16)


def test_frames_of_a_causal_tokenizer_come_in_its_stride() -> None:
    tokenizer = NBPTokenizer(sample_size=(9, 16, 16), widths=(4, 4, 4), levels=(4, 4), norm_groups=2).eval()
    model = NBP(grid=(3, 2, 2), codebook_size=16, block_size=4, dim=16, depth=1, heads=2, max_positions=16).eval()
    pipe = VisualARPipeline(model, tokenizer)
    clip = given(1, frames=5)
    out = pipe(video=clip, generator=0, output_type="pt")
    assert torch.equal(out.tokens[:, :2], tokenizer.encode(clip))
    assert out.images.shape == (1, 3, 9, 16, 16)
    with pytest.raises(VargenError, match="4 given frames of a clip of 9: expected 1, 5"):
        pipe(video=clip[:, :, :4])


def test_what_cannot_be_continued_is_refused() -> None:
    nbp, nar = tiny_video_pipeline(), tiny_video_pipeline("nar")
    left = {"class_labels": ["left"]}
    for pipe, call, message in (
        (nbp, {"video": given(1, size=24), **left}, "24x24 pixels: the model draws 16x16"),
        (nbp, {"video": given(1, frames=4), **left}, r"4 given frames of a clip of 4: expected 1\.\.3"),
        (nbp, {"video": given(1)}, "pass class_labels"),
        (nbp, {"video": given(2), **left}, r"\[1, 2\] samples"),
        (nar, {"video": given(1), **left}, "begins later frames before it has ended the first ones"),
        (tiny_video_pipeline("nbp-prediction"), {}, "continues given frames: pass video"),
        (tiny_video_pipeline("larp-prediction"), {}, "continues given frames: pass video"),
        (tiny_pipeline(), {"video": given(1), "class_labels": [0]}, "makes images: given frames need a model of videos"),
    ):
        with pytest.raises(VargenError, match=message):
            pipe(**call)
    larp = tiny_video_pipeline("larp-prediction").visual_tokenizer
    with pytest.raises(VargenError, match="depends on the whole clip"):
        check_given(NAR(grid=(2, 2, 2), dim=16, depth=1, heads=2, num_classes=2, positions="learned"), larp, 1)


@pytest.mark.parametrize(
    ("system", "passes"),
    [("next-token", 4 * 4 * 4), ("nar", 4 + 4 + 4 - 2), ("nbp", 4 * 4 * 4 // 4 + 4 - 1)],
)
def test_passes_of_a_video_are_as_published(system: str, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_video_pipeline(system)
    calls = []
    forward = pipe.model.forward
    monkeypatch.setattr(pipe.model, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    steps = []
    pipe(class_labels=[0, 2], generator=0, output_type="pt", on_step=steps.append)
    assert (len(calls), len(steps)) == (passes, passes)
