"""The bundled model of moving shapes, offline: motions as asked by the rule, and given frames continued."""

from __future__ import annotations

import torch

from vargen.data.shapes import MOTIONS, ShapesVideo
from vargen.data.shapes_reader import check_motions
from vargen.sample.load import load_pipeline


def test_motions_are_as_asked_and_frames_continued() -> None:
    pipe = load_pipeline("motion", device="cpu")
    assert pipe.config.class_names == list(MOTIONS)
    labels = torch.arange(24) % 8
    steps = []
    clips = pipe(class_labels=labels, generator=0, output_type="pt", on_step=steps.append).images.clamp(-1, 1)
    assert clips.shape == (24, 3, 6, 24, 24)
    # NBP's hybrid start: the first frame token by token, then a frame a step
    assert len(steps) == 216 // 36 + 36 - 1
    assert check_motions(clips, labels)["motion"].float().mean() >= 0.7

    data = ShapesVideo(size=24, frames=6, length=8, split="test")
    true = torch.stack([data[i]["pixels"] for i in range(8)])
    continued = pipe(class_labels=data.labels, video=true[:, :, :3], generator=0, output_type="pt").images
    still = true[:, :, 2:3].expand(-1, -1, 3, -1, -1)
    moving = data.labels != MOTIONS.index("staying still")

    def error(frames: torch.Tensor) -> torch.Tensor:
        return (frames - true[:, :, 3:]).square().flatten(1).mean(1)[moving].mean()

    assert error(continued[:, :, 3:]) < error(still)
