"""`vargen sample --image --mask`, and the cost that ECAR's sampling prints."""

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vargen import ECAR, MAR, KLTokenizer, VisualARPipeline
from vargen.cli.main import app
from vargen.decoding.flops import generation_flops
from vargen.errors import DataError, VargenError
from vargen.guidance import Guidance
from vargen.sample.images import sample


def saved(folder, model, **defaults):
    tokenizer = KLTokenizer(
        sample_size=16, widths=[4, 4, 4], encoder_blocks=1, decoder_blocks=1, encoder_attention_levels=[], latent_channels=3,
        norm_groups=2,
    )  # fmt: skip
    VisualARPipeline(model, tokenizer, defaults=defaults).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def mar(tmp_path_factory):
    torch.manual_seed(0)
    stacks = {
        f"{stack}_{key}": value for stack in ("encoder", "decoder") for key, value in (("dim", 16), ("depth", 1), ("heads", 2))
    }
    model = MAR(
        grid=(4, 4), channels=3, num_classes=3, buffer_size=2, head_width=16, head_depth=1, head_steps="ddim4", **stacks
    )  # fmt: skip
    return saved(tmp_path_factory.mktemp("mar"), model, steps=4)


@pytest.fixture
def files(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    Image.fromarray(mask).save(tmp_path / "hole.png")
    return tmp_path / "cat.png", tmp_path / "hole.png", pixels, mask > 0


def test_every_image_is_an_edit_of_the_picture(mar, files, tmp_path):
    image, mask, pixels, hole = files
    result = sample(mar, num=3, batch_size=2, image=image, mask=mask, keep_pixels=True, output=tmp_path / "out", progress=False)
    drawn = [np.asarray(Image.open(tmp_path / "out" / f"{index:06d}.png")) for index in range(3)]
    assert all(np.abs(picture[~hole].astype(int) - pixels[~hole]).max() <= 1 for picture in drawn)
    assert not np.array_equal(drawn[0][hole], drawn[1][hole])
    assert result.flops is None
    # the job knows its files by their pixels
    Image.fromarray(255 - pixels).save(image)
    from vargen.sample.edit import _picture

    _picture.cache_clear()
    with pytest.raises(VargenError):
        sample(mar, num=3, batch_size=2, image=image, mask=mask, keep_pixels=True, output=tmp_path / "out", progress=False)


def test_the_command_line_edits(mar, files, tmp_path):
    image, mask, *_ = files
    command = ["sample", mar, "-n", "1", "--image", str(image), "--mask", str(mask), "-o", str(tmp_path / "out"), "--quiet"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "000000.png").is_file()


def test_bad_files_are_refused_before_anything_is_written(mar, files, tmp_path):
    image, mask, *_ = files
    (tmp_path / "broken.png").write_bytes(image.read_bytes()[:60])
    for wrong, error, message in [
        ({"image": image}, VargenError, "both --image and --mask"),
        ({"keep_pixels": True}, VargenError, "both --image and --mask"),
        ({"image": tmp_path / "dog.png", "mask": mask}, DataError, "dog.png' does not exist"),
        ({"image": tmp_path / "broken.png", "mask": mask}, DataError, "broken.png'"),
    ]:
        with pytest.raises(error, match=message):
            sample(mar, num=1, output=tmp_path / "out", progress=False, **wrong)
    Image.new("RGB", (8, 8)).save(image)
    with pytest.raises(VargenError, match="image of 8x8 pixels: expected 16x16"):
        sample(mar, num=1, output=tmp_path / "out", progress=False, image=image, mask=mask)
    assert not (tmp_path / "out").exists()


def test_sampling_of_ecar_prints_what_an_image_costs(tmp_path):
    torch.manual_seed(0)
    model = ECAR(grid=(4, 4), channels=3, num_classes=3, stages=2, dim=16, depth=1, heads=2, head_width=16, head_depth=1)
    folder = saved(tmp_path / "ecar", model, guidance_scale=1.5, sampling_steps=3)
    done = CliRunner().invoke(app, ["sample", folder, "-n", "2", "-o", str(tmp_path / "out"), "--quiet"])
    assert done.exit_code == 0, done.output
    expected = generation_flops(model, guidance=Guidance(1.5), sampling_steps=3)
    assert f"{expected / 1e9:.3g} GFLOPs per image" in done.output
