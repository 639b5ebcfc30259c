import pytest
import torch

from vargen.backbones.llamagen import PRESETS, LlamaGen
from vargen.condition import Condition, TextFeatures
from vargen.errors import CheckpointError, ConfigError, SpaceError, VargenError
from vargen.guidance import Guidance
from vargen.model import Sampling
from vargen.noise import Noise

TINY = {"grid": (3, 4), "codebook_size": 11, "dim": 32, "depth": 2, "heads": 2, "mlp_hidden": 48}


def tiny(**more) -> LlamaGen:
    torch.manual_seed(0)
    model = LlamaGen(**{**TINY, "num_classes": 5, **more})
    # the output layer starts at zero, which would make every distribution uniform
    torch.nn.init.normal_(model.output_heads[0].linear.weight)
    return model.eval()


def text_model() -> LlamaGen:
    return tiny(num_classes=None, text_dim=6, text_length=4)


def text(*lengths: int) -> TextFeatures:
    torch.manual_seed(3)
    mask = torch.arange(4) < torch.tensor(lengths).unsqueeze(1)
    return TextFeatures(torch.randn(len(lengths), 4, 6) * mask.unsqueeze(-1), mask)


@torch.no_grad()
def uncached_greedy(model: LlamaGen, condition: Condition, batch: int, scale: float) -> torch.Tensor:
    tokens = torch.zeros(batch, model.layout.order.num_cells, dtype=torch.int64)
    for cell in range(tokens.shape[1]):
        cond = model.assemble(model.sequence(tokens, condition, torch.zeros(batch, dtype=torch.bool)))
        null = model.assemble(model.sequence(tokens, condition, torch.ones(batch, dtype=torch.bool)))
        tokens[:, cell] = (null + (cond - null) * scale)[:, cell].argmax(-1)
    return tokens.unflatten(1, model.space.shape)


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_cached_decoding_equals_uncached(kind, scale):
    model = tiny() if kind == "class" else text_model()
    condition = Condition(class_labels=torch.tensor([1, 4])) if kind == "class" else Condition(text=text(2, 4))
    decoded = model.generate(condition, guidance=Guidance(scale), sampling=Sampling(temperature=0.0))
    assert torch.equal(decoded, uncached_greedy(model, condition, 2, scale))


def test_a_sample_does_not_depend_on_its_batch():
    model = tiny()
    labels = torch.tensor([0, 1, 2])
    together = model.generate(Condition(class_labels=labels), noise=Noise(9, 3), guidance=Guidance(2.0))
    for i in range(3):
        alone = model.generate(Condition(class_labels=labels[i : i + 1]), noise=Noise(9, [i]), guidance=Guidance(2.0))
        assert torch.equal(alone[0], together[i])


def test_one_pass_per_token_and_steps_reported():
    model = tiny()
    passes, known = [], []
    handle = model.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    tokens = model.generate(
        Condition(class_labels=torch.tensor([2])),
        guidance=Guidance(2.0),
        on_step=lambda info: known.append(info.known.sum().item()),
    )
    handle.remove()
    assert len(passes) == 12
    assert known == list(range(1, 13))
    assert tokens.shape == (1, 3, 4)


def test_given_tokens_are_continued():
    model = tiny()
    condition = Condition(class_labels=torch.tensor([2, 3]))
    whole = model.generate(condition, noise=Noise(0, 2))
    given = Condition(class_labels=condition.class_labels, tokens=whole.flatten(1)[:, :5])
    passes = []
    handle = model.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    assert torch.equal(model.generate(given, noise=Noise(0, 2)), whole)
    handle.remove()
    assert len(passes) == 7


def test_loss_is_cross_entropy_and_drops_conditions():
    model = tiny(condition_dropout=1.0)
    tokens = torch.randint(11, (4, 3, 4))
    a = model.training_losses(tokens, Condition(class_labels=torch.tensor([0, 1, 2, 3])), Noise(0, 4))["loss"]
    b = model.training_losses(tokens, Condition(class_labels=torch.tensor([3, 2, 1, 0])), Noise(0, 4))["loss"]
    assert a == b, "every condition is dropped"
    weighted = model.training_losses(tokens, Condition(class_labels=torch.zeros(4).long()), Noise(0, 4), torch.tensor([0, 1, 0, 0]))
    alone = model.training_losses(tokens[1:2], Condition(class_labels=torch.zeros(1).long()), Noise(0, 1))
    torch.testing.assert_close(weighted["loss"], alone["loss"])


def test_training_reduces_the_loss():
    model = tiny().train()
    tokens = (torch.arange(12) * 5 % 11).reshape(1, 3, 4).expand(8, 3, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for step in range(30):
        loss = model.training_losses(tokens, Condition(class_labels=torch.zeros(8).long()), Noise(step, 8))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_padding_of_text_does_not_matter():
    model = text_model()
    short = TextFeatures(text(2).features[:, :2], text(2).mask[:, :2])
    sampling = Sampling(temperature=0.0)
    assert torch.equal(
        model.generate(Condition(text=short), sampling=sampling), model.generate(Condition(text=text(2)), sampling=sampling)
    )


SIZES = {
    "B": 110_888_448,
    "L": 342_910_976,
    "XL": 774_699_520,
    "XXL": 1_410_972_672,
    "3B": 3_096_659_200,
    "1B": 1_199_616_000,
    "XXXL": 3_893_027_840,
    "7B": 6_614_589_440,
    "XL-t2i": 777_678_080,
}


@pytest.mark.parametrize("name, count", SIZES.items())
def test_presets_have_the_published_sizes(name, count):
    with torch.device("meta"):
        model = LlamaGen(**PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == count


def test_save_and_load(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    loaded = LlamaGen.from_pretrained(tmp_path)
    condition = Condition(class_labels=torch.tensor([1]))
    assert torch.equal(loaded.generate(condition, noise=Noise(1, 1)), model.generate(condition, noise=Noise(1, 1)))
    torch.testing.assert_close(loaded.rotary_rows, model.rotary_rows)
    half = LlamaGen.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.generate(condition).shape == (1, 3, 4)


def test_damaged_models_are_refused(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    config = tmp_path / "config.json"
    content, text = weights.read_bytes(), config.read_text()
    config.write_text(text.replace('"depth"', '"depht"'))
    with pytest.raises(CheckpointError, match="'depht'; did you mean 'depth'"):
        LlamaGen.from_pretrained(tmp_path)
    config.write_text(text.replace('"depth": 2', '"depth": 3'))
    with pytest.raises(CheckpointError):
        LlamaGen.from_pretrained(tmp_path)
    config.write_text(text)
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="not a complete safetensors"):
        LlamaGen.from_pretrained(tmp_path)
    weights.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="refused"):
        LlamaGen.from_pretrained(tmp_path)


def test_wrong_input_is_refused():
    model = tiny()
    for condition, message in (
        (Condition(class_labels=torch.tensor([5])), "class label 5: expected 0..4"),
        (Condition(class_labels=torch.tensor([-1])), "class label -1"),
        (Condition(text=text(2)), "takes no text"),
        (Condition(), "give a condition or batch_size"),
    ):
        with pytest.raises(VargenError, match=message):
            model.generate(condition)
    with pytest.raises(VargenError, match="no option 'steps'"):
        model.generate(Condition(class_labels=torch.tensor([1])), steps=3)
    with pytest.raises(SpaceError, match="expected 0..10"):
        model.training_losses(torch.full((1, 3, 4), 11), Condition(class_labels=torch.tensor([1])))
    with pytest.raises(ConfigError, match="exactly one"):
        LlamaGen(**TINY)
    with pytest.raises(ConfigError, match="needs a multiple of 4"):
        LlamaGen(**{**TINY, "dim": 36, "heads": 6}, num_classes=2)
    with pytest.raises(ConfigError, match="did you mean 'XL-t2i'"):
        LlamaGen.from_preset("XL-t2l")
    with torch.no_grad():
        model.output_heads[0].linear.weight.fill_(float("nan"))
    with pytest.raises(VargenError, match="NaN logits"):
        model.generate(Condition(class_labels=torch.tensor([1])))
