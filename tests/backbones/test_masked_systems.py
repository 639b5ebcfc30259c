"""MAR and Hi-MAR through their public face: sizes, training, generation, editing."""

import pytest
import torch
from accelerate import init_empty_weights

import vargen.backbones.himar as himar
import vargen.backbones.mar as mar
from vargen.backbones.himar import HiMAR
from vargen.backbones.mar import MAR
from vargen.condition import Condition, TextFeatures
from vargen.errors import ConfigError, VargenError
from vargen.guidance import Guidance
from vargen.model import Sampling
from vargen.noise import Noise

MAR_TINY = {
    "grid": (4, 4),
    "channels": 3,
    "encoder_dim": 16,
    "encoder_depth": 1,
    "encoder_heads": 2,
    "decoder_dim": 24,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "buffer_size": 3,
    "head_width": 16,
    "head_depth": 1,
    "head_steps": "ddim4",
}
HIMAR_TINY = {
    "grid": (4, 4),
    "pivots": (2, 2),
    "channels": 3,
    "dim": 16,
    "encoder_depth": 1,
    "decoder_depth": 1,
    "heads": 2,
    "buffer_size": 3,
    "head_width": 16,
    "head_depth": 1,
    "head_steps": "ddim4",
    "dense_head_width": 16,
    "dense_head_depth": 1,
    "dense_head_heads": 2,
    "dense_head_steps": "ddim4",
}


def build(kind, **changes):
    torch.manual_seed(0)
    model = kind(**{**(MAR_TINY if kind is MAR else HIMAR_TINY), **changes})
    # parts that start at zero would hide what comes before them
    closed = [*model.head.parameters()]
    if kind is HiMAR:
        closed += [*model.dense_head.parameters(), model.encoder.gains, model.decoder.gains]
    for parameter in closed:
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def data(model, batch=3):
    labels = torch.arange(batch) if model.num_classes else None
    return torch.randn(batch, *model.space.token_shape), Condition(class_labels=labels)


BOTH = pytest.mark.parametrize("kind", [MAR, HiMAR])


@pytest.mark.parametrize(
    "preset, total, head",
    [("B", 207.92, 35.75), ("L", 478.33, 72.23), ("H", 942.40, 151.21), ("L-small-head", 426.36, 20.26)],
)
def test_mar_sizes(preset, total, head):
    with init_empty_weights():
        model = MAR(**mar.PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(total, abs=0.01)
    assert sum(p.numel() for p in model.head.parameters()) / 1e6 == pytest.approx(head, abs=0.01)


@pytest.mark.parametrize("preset, total", [("B", 244_730_160), ("L", 529_490_480), ("H", 1_090_965_808)])
def test_himar_sizes(preset, total):
    with init_empty_weights():
        model = HiMAR(**himar.PRESETS[preset])
    # the published count holds two frozen position tables of the dense head
    tables = 2 * 256 * model.config.dense_head_width
    assert sum(p.numel() for p in model.parameters()) == total - tables


@BOTH
def test_loss_is_a_function_of_noise_and_reaches_every_parameter(kind):
    model = build(kind, num_classes=5, condition_dropout=0.5, dropout=0.0, attn_dropout=0.0).train()
    tokens, condition = data(model)
    first = model.training_losses(tokens, condition, Noise(3, 3))
    assert float(first["loss"]) == float(model.training_losses(tokens, condition, Noise(3, 3))["loss"])
    assert float(first["loss"]) != float(model.training_losses(tokens, condition, Noise(4, 3))["loss"])
    if kind is HiMAR:
        # 4 of 20 cells are pivots
        assert float(first["loss"]) == pytest.approx(0.4 * float(first["pivots"]) + 0.6 * float(first["dense"]), rel=1e-5)
    losses = [model.training_losses(tokens, condition, Noise(seed, 3))["loss"] for seed in range(6)]
    torch.stack(losses).sum().backward()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unreached == []


@BOTH
@pytest.mark.parametrize("guided", [False, True])
def test_samples_do_not_depend_on_their_batch(kind, guided):
    model = build(kind, num_classes=5)
    _, condition = data(model)
    guidance = Guidance(2.0 if guided else 1.0, schedule="linear")
    noise = Noise(7, 3)
    options = {"steps": 3, "guidance": guidance, "sampling": Sampling(temperature=0.9)}
    whole = model.generate(condition, noise=noise, **options)
    rows = torch.tensor([2, 0])
    part = model.generate(condition.select(rows), noise=noise.select(rows), **options)
    assert whole.shape == (3, *model.space.token_shape)
    assert torch.allclose(part, whole[rows], atol=1e-4)
    assert whole.isfinite().all()


@BOTH
def test_callback_sees_cells_become_known(kind):
    model, infos = build(kind), []
    tokens = model.generate(Condition(), batch_size=2, noise=Noise(0, 2), steps=3, on_step=infos.append)
    assert [info.index for info in infos] == list(range(infos[-1].total))
    assert torch.equal(infos[-1].tokens, tokens)
    shares = [float(info.known.mean()) for info in infos]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert infos[0].known.shape == (model.space.shape if kind is MAR else (model.space.num_tokens,))


@BOTH
def test_known_tokens_stay(kind):
    model = build(kind, num_classes=5)
    tokens, condition = data(model, 2)
    known = torch.zeros(4, 4, dtype=torch.bool)
    known[:2, :3] = True
    edited = model.generate(condition, noise=Noise(1, 2), steps=2, known=known, tokens=tokens, guidance=Guidance(1.5))
    dense, given = edited.flatten(1, -2)[:, -16:], tokens.flatten(1, -2)[:, -16:]
    kept = known.flatten()
    assert torch.equal(dense[:, kept], given[:, kept])
    assert not torch.isclose(dense[:, ~kept], given[:, ~kept]).any()
    if kind is HiMAR:
        # the pivot whose whole block is known stays, the one that is half known is drawn
        assert torch.equal(edited[:, 0], tokens[:, 0])
        assert not torch.equal(edited[:, 1], tokens[:, 1])
    everything = model.generate(condition, noise=Noise(1, 2), known=torch.ones(4, 4, dtype=torch.bool), tokens=tokens)
    assert torch.equal(everything, tokens)


@BOTH
def test_given_tokens_condition_the_rest(kind):
    model = build(kind)
    tokens, condition = data(model, 1)
    known = torch.zeros(4, 4, dtype=torch.bool)
    known[:2] = True
    draws = [
        model.generate(condition, batch_size=1, noise=Noise(1, 1), steps=2, known=known, tokens=t) for t in (tokens, tokens + 1)
    ]
    unknown = [d.flatten(1, -2)[:, -8:] for d in draws]
    assert not torch.allclose(*unknown)


@BOTH
def test_text_conditions(kind):
    model = build(kind, text_dim=6)
    text = TextFeatures(torch.randn(2, 2, 6), torch.tensor([[True, True], [True, False]]))
    tokens = torch.randn(2, *model.space.token_shape)
    assert model.conditioning == ("text",)
    assert model.training_losses(tokens, Condition(text=text), Noise(0, 2))["loss"].isfinite()
    options = {"noise": Noise(0, 2), "steps": 2, "guidance": Guidance(2.0)}
    first = model.generate(Condition(text=text), **options)
    other = model.generate(Condition(text=TextFeatures(text.features + 1, text.mask)), **options)
    assert not torch.allclose(first, other)
    with pytest.raises(VargenError, match="width 5: expected 6"):
        model.generate(Condition(text=TextFeatures(torch.randn(2, 2, 5), text.mask)), **options)


def test_mar_encoder_sees_only_what_is_known():
    model = build(MAR, num_classes=5)
    tokens, condition = data(model, 2)
    flat, mask = tokens.flatten(1, 2), torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 4:] = True
    state = model.start(condition.select(slice(0, 2)), 2)
    changed = torch.where(mask.unsqueeze(-1), torch.randn_like(flat), flat)
    assert torch.equal(model.hidden(state, flat, mask), model.hidden(state, changed, mask))


def test_himar_pivots_come_in_with_training():
    """Before the warm-up phase 2 is blind to phase 1; after it, with rate 1, every sample sees the pivots."""
    model = build(HiMAR, pivot_rate=1.0, pivot_warmup=0.5)
    tokens, condition = data(model, 4)

    def dense_loss(progress):
        return float(model.training_losses(tokens, condition, Noise(0, 4), progress)["dense"])

    before, after = dense_loss(0.0), dense_loss(0.5)
    assert after == dense_loss(1.0) != before
    torch.nn.init.normal_(model.pivot_hidden.weight)
    assert dense_loss(0.0) == before
    assert dense_loss(0.5) != after


def test_mar_takes_a_flow_head():
    model = build(MAR, head="flow", head_steps=5)
    assert model.generate(Condition(), batch_size=2, steps=2).isfinite().all()
    tokens, _ = data(model, 2)
    assert model.training_losses(tokens, Condition())["loss"].isfinite()


@BOTH
def test_round_trip_through_a_directory(kind, tmp_path):
    model = build(kind, num_classes=5)
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    condition = Condition(class_labels=torch.tensor([1]))
    same = [m.generate(condition, noise=Noise(0, 1), steps=2) for m in (model, again)]
    assert torch.equal(*same)


@BOTH
def test_bad_arguments_are_refused(kind):
    model = build(kind, num_classes=5)
    condition = Condition(class_labels=torch.tensor([1]))
    with pytest.raises(ConfigError, match="has no 'step'; did you mean 'steps'"):
        model.generate(condition, step=3)
    with pytest.raises(VargenError, match="17 decoding steps for 16 tokens"):
        model.generate(condition, steps=17)
    with pytest.raises(VargenError, match="partial condition"):
        model.generate(condition, guidance=Guidance(2.0, partial_scale=1.5))
    with pytest.raises(VargenError, match="class label 5"):
        model.generate(Condition(class_labels=torch.tensor([5])))
    with pytest.raises(VargenError, match="tokens of shape"):
        model.training_losses(torch.zeros(1, 2, 3), condition)


def test_himar_needs_grids_that_fit():
    with pytest.raises(ConfigError, match="a multiple of its pivots"):
        build(HiMAR, pivots=(3, 2))
