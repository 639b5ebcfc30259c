from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor, nn

from tests.tiny_pipelines import tiny_tokenizer
from vargen import TextFeatures, TokenSpace, WordEncoder
from vargen.errors import ConfigError, DataError, VargenError
from vargen.model import TokenizerOutput, VisualTokenizer
from vargen.noise import Noise
from vargen.sample import reconstruct as job
from vargen.sample.picture import to_uint8
from vargen.sample.reconstruct import read_samples, reconstruct, round_trips


class Columns(VisualTokenizer):
    """Sixteen ordered continuous tokens: the columns of a 16x16 picture; what is left out is black."""

    @register_to_config
    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    @property
    def space(self) -> TokenSpace:
        return TokenSpace(((self.config.size,),), channels=3 * self.config.size, ordered=True)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (self.config.size, self.config.size)

    def encode(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        self.check_pixels(pixels, text)
        return pixels.permute(0, 3, 1, 2).flatten(2)

    def decode(
        self, tokens: Tensor, text: TextFeatures | None = None, noise: Noise | None = None, *, brightness: float = 0.0
    ) -> Tensor:
        self.check_text(text, len(tokens))
        pixels = tokens.unflatten(2, (3, -1)).permute(0, 2, 3, 1) + brightness
        return nn.functional.pad(pixels, (0, self.config.size - tokens.shape[1]), value=-1.0) * self.weight

    def forward(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> TokenizerOutput:
        tokens = self.encode(pixels, text, noise)
        return TokenizerOutput(tokens, self.decode(tokens, text, noise))


class CaptionedColumns(Columns):
    takes_text = True


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """``reconstruct`` gets this tokenizer whatever name it is given."""
    monkeypatch.setattr(job, "load_tokenizer", lambda *_: Columns().eval())


def test_perfect_tokenizer_has_perfect_scores() -> None:
    samples, _ = read_samples("shapes", (16, 16), 10)
    (trip,) = round_trips(Columns(), samples, [16])
    assert trip.psnr.tolist() == [100.0] * 10
    torch.testing.assert_close(trip.ssim, torch.ones(10, dtype=torch.float64))
    assert (to_uint8(trip.pixels) == to_uint8(samples)).all()


def test_prefixes_get_better_with_length(use: None, tmp_path: Path) -> None:
    trips, folder = reconstruct("columns", "shapes", num=3, prefixes=[2, 8, 16], output=tmp_path / "out")
    assert [trip.tokens for trip in trips] == [2, 8, 16]
    assert trips[0].psnr.mean() < trips[1].psnr.mean() < trips[2].psnr.mean()
    report = json.loads((folder / "report.json").read_text())
    assert [result["tokens"] for result in report["results"]] == [2, 8, 16]
    assert report["results"][1]["psnr"] == pytest.approx(np.mean([image["psnr"] for image in report["results"][1]["images"]]))
    assert Image.open(folder / "reconstruct.png").width > 4 * 128


def test_settings_reach_the_decoder(use: None, tmp_path: Path) -> None:
    trips, folder = reconstruct("columns", "shapes", num=2, output=tmp_path / "out", settings={"brightness": 0.5})
    assert float(trips[0].psnr.max()) < 20
    assert json.loads((folder / "report.json").read_text())["settings"] == {"brightness": 0.5}
    with pytest.raises(ConfigError, match="no 'brigthness'; did you mean 'brightness'"):
        reconstruct("columns", "shapes", num=2, output=tmp_path / "new", settings={"brigthness": 0.5})
    assert not (tmp_path / "new").exists()


def test_prefixes_are_checked(use: None, tmp_path: Path) -> None:
    with pytest.raises(VargenError, match=r"17 tokens: expected 1\.\.16"):
        reconstruct("columns", "shapes", prefixes=[17], output=tmp_path / "out")
    with pytest.raises(VargenError, match="num 0"):
        reconstruct("columns", "shapes", num=0, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scores_are_of_8_bit_pictures() -> None:
    tokenizer = tiny_tokenizer()
    samples, _ = read_samples("digits", tokenizer.sample_shape, 2)
    (trip,) = round_trips(tokenizer, samples, [tokenizer.space.num_tokens])
    error = (to_uint8(trip.pixels).astype(float) - to_uint8(samples)) / 255
    expected = -10 * np.log10((error**2).mean((1, 2, 3)))
    assert trip.psnr.numpy() == pytest.approx(expected)


def test_batches_do_not_change_the_scores() -> None:
    samples, _ = read_samples("shapes", (16, 16), 11)
    (all_at_once,), (alone,) = round_trips(Columns(), samples, [4]), round_trips(Columns(), samples[9:10], [4])
    assert all_at_once.psnr[9] == alone.psnr[0]


def test_samples_from_sets_folders_and_files(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 20), (80 * number, 0, 0)).save(tmp_path / f"images/{number}.png")
    assert read_samples(str(tmp_path / "images"), (16, 16), 8)[0].shape == (3, 3, 16, 16)
    assert read_samples(str(tmp_path / "images/2.png"), (16, 24), 8)[0].shape == (1, 3, 16, 24)
    captions = read_samples("shapes", (16, 16), 2)[1]
    assert captions is not None
    assert len(captions) == 2
    with pytest.raises(DataError, match="the tokenizer expects"):
        read_samples("shapes", (16, 24), 2)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError):
        read_samples(str(tmp_path / "broken.png"), (16, 16), 2)


class Frames(Columns):
    """Clips of four frames of 16x16 pixels as they are."""

    video = True

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (4, 16, 16)

    def encode(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        return pixels

    def decode(self, tokens: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        return tokens


def test_videos_are_scored_by_frame() -> None:
    samples, _ = read_samples("shapes-video", (4, 16, 16), 2)
    assert samples.shape == (2, 3, 4, 16, 16)
    (trip,) = round_trips(Frames(), samples, [16])
    assert trip.psnr.shape == (2,)
    assert job._sheet(samples, [trip]).width > 2 * 4 * 16


def test_videos_in_and_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "load_tokenizer", lambda *_: Frames().eval())
    reconstruct("frames", "shapes-video", num=2, output=tmp_path / "set", format="gif")
    clips = tmp_path / "set" / "clips"
    assert sorted(p.name for p in clips.iterdir()) == ["000000.gif", "000001.gif"]
    # a file, a folder of videos, and a folder of frames
    reconstruct("frames", str(clips / "000001.gif"), output=tmp_path / "file", format="frames")
    assert len(list((tmp_path / "file" / "clips" / "000000").glob("*.png"))) == 4
    for source, count in ((clips, 2), (tmp_path / "file" / "clips" / "000000", 1)):
        trips, folder = reconstruct("frames", str(source), num=5, output=tmp_path / f"out-{count}")
        assert trips[0].pixels.shape == (count, 3, 4, 16, 16)
        assert len(list((folder / "clips").glob("*.mp4"))) == count
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"broken\.mp4' "):
        reconstruct("frames", str(tmp_path / "broken.mp4"), output=tmp_path / "new")
    with pytest.raises(VargenError, match="mp4 or gif or frames"):
        reconstruct("frames", "shapes-video", output=tmp_path / "new", format="png")
    assert not (tmp_path / "new").exists()


def test_captions_go_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "load_tokenizer", lambda *_: CaptionedColumns().eval())
    WordEncoder(["red", "blue"], dim=8, depth=0).save_pretrained(tmp_path / "words")
    trips, _ = reconstruct("digits", "shapes", num=2, output=tmp_path / "out", text_encoder=str(tmp_path / "words"))
    assert trips[0].psnr.tolist() == [100.0, 100.0]
    Image.new("RGB", (16, 16)).save(tmp_path / "bare.png")
    with pytest.raises(VargenError, match=r"needs captions, and '.*bare\.png' has none"):
        reconstruct("digits", str(tmp_path / "bare.png"), num=2, output=tmp_path / "new", text_encoder=str(tmp_path / "words"))
    with pytest.raises(VargenError, match="--text-encoder"):
        reconstruct(str(tmp_path), "shapes", num=2, output=tmp_path / "new")
    assert not (tmp_path / "new").exists()
