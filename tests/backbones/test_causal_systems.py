"""Laws that NAR, NBP and LARP's generator share."""

import pytest
import torch

from tests.backbones.uncached import uncached_greedy
from vargen.backbones import larp, nar, nbp
from vargen.backbones.flextok import FlexTokGenerator
from vargen.backbones.larp import LARPGenerator
from vargen.backbones.nar import NAR
from vargen.backbones.nbp import NBP
from vargen.condition import Condition, TextFeatures
from vargen.errors import ConfigError, VargenError
from vargen.guidance import Guidance
from vargen.model import Sampling
from vargen.noise import Noise

GREEDY = Sampling(temperature=0.0)
SMALL = {"codebook_size": 13, "dim": 32, "depth": 2, "heads": 2}


def build(cls, **config):
    torch.manual_seed(0)
    model = cls(**{**SMALL, **config})
    for head in model.output_heads:
        torch.nn.init.normal_(head.linear.weight)
    return model.eval()


def labels(n=2):
    return Condition(class_labels=torch.arange(n))


def text():
    torch.manual_seed(1)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    return Condition(text=TextFeatures(torch.randn(2, 3, 6) * mask.unsqueeze(-1), mask))


CASES = {
    "nar image": (lambda: build(NAR, grid=(3, 4), num_classes=4, mlp_hidden=40), labels, 6, True),
    "nar text": (lambda: build(NAR, grid=(3, 3), text_dim=6, text_length=4, mlp_hidden=40), text, 5, True),
    "nar video": (lambda: build(NAR, grid=(2, 3, 3), num_classes=4, positions="learned", mlp_hidden=40), labels, 6, True),
    "larp": (lambda: build(LARPGenerator, length=9, num_classes=4, mlp_hidden=40), labels, 9, True),
    "larp frames": (
        lambda: build(LARPGenerator, length=6, mlp_hidden=40),
        lambda: Condition(context=torch.arange(12).reshape(2, 6)),
        6,
        False,
    ),
    "nbp labels": (lambda: build(NBP, grid=(3, 2, 4), block_size=4, condition_vocabulary=4), labels, 24 // 4 + 3, False),
    "nbp text": (
        lambda: build(NBP, grid=(2, 2, 4), block_size=8, condition_vocabulary=9, condition_length=3),
        lambda: Condition(text_ids=torch.tensor([[1, 5, 2], [1, 8, 7]])),
        16 // 8 + 7,
        False,
    ),
    "nbp frames": (
        lambda: build(NBP, grid=(3, 2, 4), block_size=4),
        lambda: Condition(tokens=torch.arange(16).reshape(2, 8) % 13),
        4,
        False,
    ),
    "flextok": (lambda: build(FlexTokGenerator, length=7, num_classes=4), labels, 7, True),
    "flextok text": (lambda: build(FlexTokGenerator, length=6, text_dim=6, gated=True, qk_norm="layer"), text, 6, True),
    "nbp tokens": (lambda: build(NBP, grid=(4, 3), block_size=1, condition_vocabulary=3), labels, 12, False),
}


@pytest.mark.parametrize("name", CASES)
def test_cached_equals_uncached_in_the_number_of_passes_that_the_sheets_say(name):
    make, condition, passes, guided = CASES[name]
    model, condition = make(), condition()
    given = 0 if condition.tokens is None else condition.tokens.shape[1]
    for scale in (1.0, 2.5) if guided else (1.0,):
        counted = []
        handle = model.blocks[0].register_forward_hook(lambda *_, counted=counted: counted.append(1))
        tokens = model.generate(condition, guidance=Guidance(scale), sampling=GREEDY)
        handle.remove()
        assert len(counted) == passes
        assert torch.equal(tokens, uncached_greedy(model, condition, 2, scale, given))
    if given:
        assert torch.equal(tokens.flatten(1)[:, :given], condition.tokens)


@pytest.mark.parametrize("name", CASES)
def test_batch_one_equals_batch_n(name):
    make, condition, _, guided = CASES[name]
    model, condition = make(), condition()
    guidance = Guidance(2.0 if guided else 1.0)
    together = model.generate(condition, noise=Noise(5, 2), guidance=guidance)
    for i in range(2):
        row = torch.tensor([i])
        assert torch.equal(model.generate(condition.select(row), noise=Noise(5, row), guidance=guidance)[0], together[i])


@pytest.mark.parametrize("name", CASES)
def test_loss_has_gradients_everywhere(name):
    make, condition, _, _ = CASES[name]
    model, condition = make().train(), condition()
    tokens = torch.randint(13, (2, *model.space.token_shape))
    trained = Condition(condition.class_labels, condition.text, condition.text_ids, None, condition.context)
    loss = model.training_losses(tokens, trained, Noise(0, 2))["loss"]
    loss.backward()
    assert loss.isfinite()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert not without


# millions of parameters, as the fact sheets state them for the released code
NAR_MILLIONS = {
    "B": 130.55,
    "M": 295.45,
    "L": 372.54,
    "XL": 815.99,
    "XXL": 1464.45,
    "XXXL": 4014.28,
    "XL-t2i": 818.97,
    "video-S": 37.8,
    "video-B": 125.1,
    "video-L": 368.7,
    "video-LP": 693.6,
    "video-XL": 815.5,
    "video-XXL": 1467.8,
    "video-XXXL": 4052.0,
}
NBP_MILLIONS = {
    "k600-base": 884.4,
    "k600-xl": 1481.2,
    "k600-3b": 4034.1,
    "ucf-base": 982.8,
    "ucf-xl": 1612.4,
    "ucf-3b": 4230.8,
}
LARP_PARAMETERS = {
    "S": 27_967_104,
    "B": 98_401_536,
    "L": 326_261_760,
    "LP": 631_975_680,
    "LP-frame-prediction": 633_157_120,
}


def parameters(cls, preset) -> int:
    with torch.device("meta"):
        model = cls(**preset)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name, millions", NAR_MILLIONS.items())
def test_nar_presets_have_the_published_sizes(name, millions):
    digits = 1 if name.startswith("video") else 2
    assert round(parameters(NAR, nar.PRESETS[name]) / 1e6, digits) == millions


@pytest.mark.parametrize("name, count", LARP_PARAMETERS.items())
def test_larp_presets_have_the_published_sizes(name, count):
    assert parameters(LARPGenerator, larp.PRESETS[name]) == count


@pytest.mark.parametrize("name, millions", NBP_MILLIONS.items())
def test_nbp_presets_have_the_published_sizes(name, millions):
    assert round(parameters(NBP, nbp.PRESETS[name]) / 1e6, 1) == millions


def test_flextok_may_stop_after_any_number_of_tokens():
    model = build(FlexTokGenerator, length=7, num_classes=4)
    whole = model.generate(labels(), noise=Noise(3, 2))
    for count in (1, 4, 7):
        assert torch.equal(model.generate(labels(), noise=Noise(3, 2), num_tokens=count), whole[:, :count])
    with pytest.raises(VargenError, match=r"expected 1\.\.7"):
        model.generate(labels(), num_tokens=8)
    with pytest.raises(VargenError, match="no valid prefixes"):
        build(LARPGenerator, length=5, num_classes=4, mlp_hidden=40).generate(labels(), num_tokens=3)


def test_flextok_drops_text_to_the_empty_string():
    model = build(FlexTokGenerator, length=6, text_dim=6, condition_dropout=1.0)
    empty = TextFeatures(torch.randn(1, 1, 6), torch.ones(1, 1, dtype=torch.bool))
    model.set_null_text(empty)
    tokens = torch.randint(13, (2, 6))
    dropped = model.training_losses(tokens, text(), Noise(0, 2))["loss"]
    model.condition_dropout = 0.0
    null = TextFeatures(empty.features.expand(2, -1, -1), empty.mask.expand(2, -1))
    torch.testing.assert_close(model.training_losses(tokens, Condition(text=null), Noise(0, 2))["loss"], dropped)


def test_what_cannot_work_is_refused_with_the_reason():
    with pytest.raises(VargenError, match="divisor of the 12 tokens"):
        build(NBP, grid=(3, 4), block_size=5)
    with pytest.raises(ConfigError, match="at least the 25 tokens"):
        build(NBP, grid=(4, 6), block_size=4, condition_vocabulary=2, max_positions=10)
    with pytest.raises(VargenError, match="must be given"):
        build(NBP, grid=(2, 4), block_size=4).generate(Condition(), batch_size=1)
    with pytest.raises(VargenError, match="no unconditional row"):
        build(NBP, grid=(2, 4), block_size=4, condition_vocabulary=2).generate(labels(), guidance=Guidance(2.0))
    with pytest.raises(VargenError, match="no unconditional row"):
        build(LARPGenerator, length=3).generate(Condition(context=torch.zeros(1, 3).long()), guidance=Guidance(2.0))
    with pytest.raises(VargenError, match="takes no class labels"):
        build(LARPGenerator, length=3).generate(labels())
    with pytest.raises(ConfigError, match="expected 'rotary' or 'learned'"):
        build(NAR, grid=(2, 2), num_classes=2, positions="sine")
    with pytest.raises(ConfigError, match="multiple of 6"):
        build(NAR, grid=(2, 2, 2), num_classes=2)
