import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vargen.backbones.maskgit import PRESETS, MaskGIT
from vargen.condition import Condition
from vargen.decoding.confidence import arccos_schedule
from vargen.errors import ConfigError, VargenError
from vargen.guidance import Guidance
from vargen.model import Sampling
from vargen.noise import Noise


def build(trunk="bert", **more):
    torch.manual_seed(0)
    config = {"grid": (3, 4), "codebook_size": 9, "dim": 16, "depth": 2, "heads": 2, "mlp_hidden": 32, "num_classes": 3}
    return MaskGIT(**{**config, "trunk": trunk, **more}).eval()


LABELS = Condition(class_labels=torch.tensor([0, 2]))


@pytest.mark.parametrize("trunk", ["bert", "uvit"])
@pytest.mark.parametrize("scale, passes", [(1.0, 5), (3.0, 5)])
def test_one_pass_per_step_whatever_the_guidance(trunk, scale, passes):
    model, counted, known = build(trunk), [], []
    handle = model.embedding.register_forward_hook(lambda *_: counted.append(1))
    tokens = model.generate(LABELS, guidance=Guidance(scale), steps=5, on_step=lambda i: known.append(i.known.sum().item()))
    handle.remove()
    assert len(counted) == passes
    assert tokens.shape == (2, 3, 4)
    assert int(tokens.max()) < 9
    assert known == sorted(known)
    assert known[-1] == 12


def test_linear_guidance_saves_the_first_null_rows():
    model, rows = build(), []
    handle = model.embedding.register_forward_hook(lambda _m, inputs, _o: rows.append(len(inputs[0])))
    model.generate(LABELS, guidance=Guidance(3.0, schedule="linear-index"), steps=3)
    handle.remove()
    assert rows == [2, 4, 4]


def test_batch_one_equals_batch_n():
    model = build()
    together = model.generate(LABELS, noise=Noise(1, 2), guidance=Guidance(2.0), steps=4)
    for i in range(2):
        row = torch.tensor([i])
        assert torch.equal(model.generate(LABELS.select(row), noise=Noise(1, row), guidance=Guidance(2.0), steps=4)[0], together[i])


def test_editing_keeps_the_given_tokens():
    model = build()
    tokens = torch.arange(12).reshape(1, 3, 4) % 9
    known = torch.zeros(3, 4, dtype=torch.bool)
    known[:, :2] = True
    edited = model.generate(LABELS, noise=Noise(0, 2), steps=4, known=known, tokens=tokens)
    assert torch.equal(edited[:, :, :2], tokens[:, :, :2].expand(2, -1, -1))
    everything = model.generate(LABELS, known=torch.ones_like(known), tokens=tokens)
    assert torch.equal(everything, tokens.expand(2, -1, -1))


@given(st.integers(1, 300), st.data())
@settings(max_examples=30, deadline=None)
def test_arccos_schedule_falls_to_zero(tokens, data):
    schedule = arccos_schedule(tokens, data.draw(st.integers(1, tokens)))
    assert schedule[-1] == 0
    assert schedule == sorted(schedule, reverse=True)


def test_training_learns_a_picture():
    model = build("uvit").train()
    tokens = (torch.arange(12) * 5 % 9).reshape(1, 3, 4).expand(16, 3, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for step in range(60):
        loss = model.training_losses(tokens, Condition(class_labels=torch.zeros(16).long()), Noise(step, 16))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_loss_weighs_known_tokens_less():
    model = build(known_weight=0.0, label_smoothing=0.0)
    logits, ids = torch.randn(1, 12, 9), torch.randint(9, (1, 12))
    mask = torch.arange(12).unsqueeze(0) < 3
    expected = torch.nn.functional.cross_entropy(logits[0, :3], ids[0, :3])
    torch.testing.assert_close(model.masked_cross_entropy(logits, ids, mask), expected)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    with torch.device("meta"):
        model = MaskGIT(**PRESETS[name])
    assert model.space.num_tokens == int(name.split("-")[1])
    assert model.embedding.num_embeddings == 4096 + 1002


def test_wrong_input_is_refused():
    model = build()
    for call, message in (
        ({"steps": 13}, r"expected 1\.\.12"),
        ({"sampling": Sampling(top_k=3)}, "do not apply"),
        ({"foo": 1}, "no option 'foo'"),
        ({"known": torch.ones(3, 4, dtype=torch.bool)}, "needs both"),
    ):
        with pytest.raises(VargenError, match=message):
            model.generate(LABELS, **call)
    with pytest.raises(VargenError, match="class label 3"):
        model.generate(Condition(class_labels=torch.tensor([3])))
    with pytest.raises(ConfigError, match="'bert' or 'uvit'"):
        build("vit")
    with pytest.raises(ConfigError, match="even number"):
        build("uvit", depth=3)
