import json

import numpy as np
import pytest
import torch

from vargen import LlamaGen, Noise, VisualARPipeline, VQTokenizer, WordEncoder
from vargen.errors import CheckpointError, SpaceError, VargenError
from vargen.model import StepInfo


def tokenizer(codes=16):
    return VQTokenizer(
        sample_size=16, encoder_widths=[8, 8, 8], decoder_widths=[8, 8, 8], encoder_blocks=1, decoder_blocks=1, latent_channels=8,
        codebook_size=codes, codebook_dim=4, norm_groups=4,
    )  # fmt: skip


def generator(**condition):
    model = LlamaGen(grid=(4, 4), codebook_size=16, dim=16, depth=1, heads=2, mlp_hidden=24, **condition)
    torch.nn.init.normal_(model.output_heads[0].linear.weight, std=0.5)
    return model


@pytest.fixture(scope="module")
def by_class():
    torch.manual_seed(0)
    return VisualARPipeline(generator(num_classes=3), tokenizer(), class_names=["cat", "dog", "7"], defaults={"temperature": 0.9})


@pytest.fixture(scope="module")
def by_text():
    torch.manual_seed(1)
    encoder = WordEncoder.from_captions(["a red circle", "a blue square"], dim=8)
    return VisualARPipeline(generator(text_dim=8, text_length=6), tokenizer(), text_encoder=encoder)


def test_pictures_in_every_output_type(by_class):
    out = by_class(class_labels=[0, 2], generator=3, output_type="pt")
    assert out.images.shape == (2, 3, 16, 16)
    assert out.tokens.shape == (2, 4, 4)
    arrays = by_class(class_labels=["cat", "7"], generator=3, output_type="np").images
    assert arrays.shape == (2, 16, 16, 3)
    assert 0 <= arrays.min() <= arrays.max() <= 1
    pictures = by_class(class_labels=["cat", 2], generator=3).images
    expected = (out.images.movedim(1, -1) * 127.5 + 128).clamp(0, 255).byte().numpy()
    assert np.array_equal(np.stack([np.asarray(p) for p in pictures]), expected)


def test_settings_fall_back_to_the_defaults(by_class):
    default = by_class(class_labels=[1], generator=5).tokens
    assert torch.equal(default, by_class(class_labels=[1], generator=5, temperature=0.9).tokens)
    greedy = by_class(class_labels=[1], generator=5, temperature=0.0).tokens
    assert torch.equal(greedy, by_class(class_labels=[1], generator=6, temperature=0.0).tokens)


def test_generators_address_samples(by_class):
    pair = by_class(class_labels=[1, 1], generator=Noise(4, [7, 8])).tokens
    single = by_class(class_labels=[1], generator=Noise(4, [8])).tokens
    assert torch.equal(pair[1:], single)
    a = by_class(class_labels=[1], generator=torch.Generator().manual_seed(2)).tokens
    assert torch.equal(a, by_class(class_labels=[1], generator=[torch.Generator().manual_seed(2)]).tokens)


def test_callbacks(by_class):
    steps: list[StepInfo] = []
    ended = []
    by_class(
        class_labels=[1],
        guidance_scale=2.0,
        on_step=steps.append,
        callback_on_step_end=lambda pipe, step, timestep, kwargs: ended.append((step, kwargs["tokens"].shape)),
    )
    assert [s.index for s in steps] == list(range(16))
    assert steps[-1].known.sum() == 16
    assert ended[-1] == (15, (1, 4, 4))


def test_round_trip_through_a_directory(by_class, by_text, tmp_path):
    for name, pipe, call in (("class", by_class, {"class_labels": ["dog"]}), ("text", by_text, {"prompt": "a red circle"})):
        pipe.save_pretrained(tmp_path / name)
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        assert index["model"] == ["vargen", "LlamaGen"]
        loaded = VisualARPipeline.from_pretrained(tmp_path / name)
        assert loaded.config.class_names == pipe.config.class_names
        a, b = (p(**call, generator=1, output_type="pt") for p in (pipe, loaded))
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.images, b.images)


def test_damaged_directories_are_refused(by_class, tmp_path):
    by_class.save_pretrained(tmp_path / "whole")
    weights = next((tmp_path / "whole" / "model").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a complete safetensors"):
        VisualARPipeline.from_pretrained(tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"no model_index\.json"):
        VisualARPipeline.from_pretrained(tmp_path)


def test_what_does_not_fit_is_refused(by_class, by_text):
    with pytest.raises(SpaceError, match="codebook_size is 16 on one side and 8"):
        VisualARPipeline(generator(num_classes=3), tokenizer(codes=8))
    with pytest.raises(SpaceError, match="needs a text_encoder"):
        VisualARPipeline(generator(text_dim=8), tokenizer())
    with pytest.raises(VargenError, match="2 class names"):
        VisualARPipeline(generator(num_classes=3), tokenizer(), class_names=["a", "b"])
    for pipe, call, message in (
        (by_class, {}, "pass class_labels"),
        (by_class, {"class_labels": ["dgo"]}, "did you mean 'dog'"),
        (by_class, {"class_labels": [3]}, r"expected 0\.\.2"),
        (by_class, {"prompt": "a cat"}, "takes no prompts"),
        (by_class, {"class_labels": [0], "output_type": "png"}, "expected 'pil'"),
        (by_class, {"class_labels": [0], "steps": 4}, "no option 'steps'"),
        (by_class, {"class_labels": [0], "temperature": -1.0}, "expected a number >= 0"),
        (by_class, {"class_labels": [0], "top_p": 0.0}, r"in \(0, 1\]"),
        (by_text, {}, "pass prompt"),
    ):
        with pytest.raises(VargenError, match=message):
            pipe(**call)
