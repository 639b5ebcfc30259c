"""xAR with every entity: mask, cache, number of evaluations, limits."""

import pytest
import torch
from accelerate import init_empty_weights

import vargen.backbones.xar as xar
from vargen.backbones.xar import ENTITIES, XAR, entity_order
from vargen.condition import Condition
from vargen.errors import ConfigError, VargenError
from vargen.flow.flow import euler_maruyama, stochastic_times
from vargen.guidance import Guidance
from vargen.model import Sampling
from vargen.noise import Noise

ALL = pytest.mark.parametrize("entity", ENTITIES)


def build(entity="cell", **changes):
    torch.manual_seed(0)
    config = {
        "grid": (4, 4),
        "channels": 3,
        "entity": entity,
        "entity_size": (2, 2),
        "dim": 16,
        "encoder_depth": 1,
        "decoder_depth": 1,
        "heads": 2,
        "num_classes": 5,
        "sampling_steps": 3,
    }
    return XAR(**{**config, **changes}).eval()


CONDITION = Condition(class_labels=torch.tensor([1, 4]))


@pytest.mark.parametrize("preset, total", [("B", 172_638_224), ("L", 608_397_968), ("H", 1_186_024_096)])
def test_sizes(preset, total):
    with init_empty_weights():
        model = XAR(**xar.PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) == total


def test_entities_are_those_of_the_figure():
    def groups(entity, **options):
        order = entity_order(entity, (4, 4), options.get("size", (2, 2)), options.get("scales"))
        return [g.tolist() for g in order.groups]

    assert groups("cell") == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert groups("subsample") == [[0, 2, 8, 10], [1, 3, 9, 11], [4, 6, 12, 14], [5, 7, 13, 15]]
    assert groups("token") == [[i] for i in range(16)]
    assert groups("image") == [list(range(16))]
    assert [len(g) for g in groups("scale")] == [1, 4, 16]
    assert [len(g) for g in groups("scale", scales=[(2, 2), (4, 4)])] == [4, 16]


@ALL
def test_context_is_only_earlier_entities(entity):
    """Changing the last entity changes no other velocity; changing the first changes all later ones."""
    model = build(entity)
    places = torch.arange(model.order.num_cells)
    mask = model.block_causal(places, places)
    x, t = torch.randn(2, model.order.num_cells, 3), torch.rand(2, model.num_entities)
    classes = model.condition(CONDITION.class_labels, torch.zeros(2, dtype=torch.bool))

    def velocity(x):
        return model.velocity(x, t, classes, mask=mask)

    base, last = velocity(x), model.bounds[-2]
    changed = x.clone()
    changed[:, last:] += 1
    assert torch.allclose(velocity(changed)[:, :last], base[:, :last], atol=1e-6)
    assert not torch.isclose(velocity(changed)[:, last:], base[:, last:]).all(-1).any()
    changed = x.clone()
    changed[:, 0] += 1
    assert not torch.isclose(velocity(changed), base).all(-1).any()


@ALL
def test_cached_sampling_is_the_masked_forward_of_clean_context(entity):
    """The whole prefix is recomputed at every evaluation, with clean entities at time 0, and no cache."""
    model, noise = build(entity), Noise(5, 2)
    guidance = Guidance(2.0, schedule="linear-entity")
    tokens = model.generate(CONDITION, noise=noise, guidance=guidance)
    classes = model.condition(CONDITION.class_labels.repeat(2), torch.tensor([False, False, True, True]))
    sequence = torch.zeros(2, 0, 3)
    for k in range(model.num_entities):
        count = model.bounds[k + 1] - model.bounds[k]
        scale = 2.0 if model.num_entities == 1 else 1 + k / (model.num_entities - 1)

        def velocity(x, t, k=k, count=count, scale=scale, clean=sequence):
            x32 = torch.cat([clean, x.float()], dim=1).repeat(2, 1, 1)
            times = torch.cat([torch.zeros(4, k), torch.full((4, 1), t)], dim=1)
            places = torch.arange(x32.shape[1])
            v = model.velocity(x32, times, classes, mask=model.block_causal(places, places))[:, -count:].double()
            return v[2:] + scale * (v[:2] - v[2:])

        with torch.no_grad():
            sample = euler_maruyama(
                velocity,
                noise.normal("entity_start", (count, 3), at=(k,)).double(),
                stochastic_times(3),
                lambda i, k=k, count=count: noise.normal("entity_step", (count, 3), at=(k, i), dtype=torch.float64),
            )
        sequence = torch.cat([sequence, sample.tokens.float()], dim=1)
    expected = sequence[:, model.cells.argsort()].reshape(tokens.shape)
    assert torch.allclose(tokens, expected, rtol=1e-3, atol=1e-4)


@ALL
@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_number_of_evaluations(entity, sampler):
    model, sizes = build(entity), []
    model.out.register_forward_hook(lambda _m, _i, output: sizes.append(output.shape[:2]))
    model.generate(CONDITION, noise=Noise(0, 2), sampling_steps=4, sampler=sampler, guidance=Guidance(2.0))
    assert len(sizes) == 4 * model.num_entities
    assert all(rows == 4 for rows, _ in sizes)
    # every token once per step, and every clean entity but the last once more
    clean = model.bounds[-2]
    assert sum(n for _, n in sizes) == 4 * model.order.num_cells + clean


def test_image_entity_trains_as_plain_flow_matching():
    model = build("image", dropout=0.0, attn_dropout=0.0, condition_dropout=0.0)
    tokens, noise = torch.randn(2, 4, 4, 3), Noise(2, 2)
    t, draws = noise.normal("time", (1,)).sigmoid(), noise.normal("noise", (16, 3))
    data = tokens.flatten(1, 2)
    x = (1 - t[..., None]) * data + t[..., None] * draws
    classes = model.condition(CONDITION.class_labels, torch.zeros(2, dtype=torch.bool))
    expected = (model.velocity(x, t, classes) - (draws - data)).square().mean()
    assert float(model.training_losses(tokens, CONDITION, noise)["loss"]) == pytest.approx(float(expected), rel=1e-5)


@ALL
def test_gradients_reach_everything(entity):
    model = build(entity, condition_dropout=0.5).train()
    tokens = torch.randn(2, *model.space.token_shape)
    sum(model.training_losses(tokens, CONDITION, Noise(s, 2))["loss"] for s in range(4)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@ALL
def test_samples_do_not_depend_on_their_batch(entity):
    model, noise, infos = build(entity), Noise(7, 2), []
    whole = model.generate(CONDITION, noise=noise, on_step=infos.append)
    part = model.generate(CONDITION.select(slice(1, 2)), noise=noise.select(slice(1, 2)))
    assert torch.allclose(part, whole[1:], atol=1e-4)
    assert torch.equal(infos[-1].tokens, whole)
    assert infos[-1].known.min() == 1
    assert [info.index for info in infos] == list(range(model.num_entities))


@pytest.mark.parametrize("entity", ["token", "cell", "subsample"])
def test_given_first_entities_are_gone_on_from(entity):
    """Draws are addressed by entity, so giving what was drawn before changes nothing."""
    model, guidance = build(entity), Guidance(2.0, schedule="linear-entity")
    tokens = model.generate(CONDITION, noise=Noise(5, 2), guidance=guidance)
    known, infos = model.order.step_of.reshape(4, 4) < 3, []
    again = model.generate(
        CONDITION, noise=Noise(5, 2), guidance=guidance, known=known, tokens=tokens, on_step=infos.append, sampling_steps=3
    )
    assert torch.equal(again[:, known], tokens[:, known])
    assert torch.allclose(again, tokens, rtol=1e-3, atol=1e-4)
    assert [(info.index, info.total) for info in infos] == [(k, model.num_entities - 3) for k in range(model.num_entities - 3)]


@ALL
def test_other_given_parts_are_refused(entity):
    model = build(entity)
    for last in (torch.zeros(4, 4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)):
        last[3, 3] = True
        last[0, 0] = False
        with pytest.raises(VargenError, match=f"entity after entity \\({entity}\\).*masked system such as MAR"):
            model.generate(CONDITION, known=last, tokens=torch.zeros(2, *model.space.token_shape))


def test_first_entity_is_unguided_with_the_published_schedule():
    model, noise, first, guided = build("cell"), Noise(1, 2), [], []
    model.generate(CONDITION, noise=noise, on_step=first.append)
    model.generate(CONDITION, noise=noise, guidance=Guidance(3.0, schedule="linear-entity"), on_step=guided.append)
    assert torch.allclose(first[0].tokens, guided[0].tokens, atol=1e-5)
    assert not torch.allclose(first[1].tokens, guided[1].tokens, atol=1e-3)


def test_temperature_scales_noise():
    model = build("image")
    cold = [model.generate(CONDITION, noise=Noise(0, 2), sampler="ode", sampling=Sampling(temperature=0.0)) for _ in range(2)]
    assert torch.equal(*cold)
    assert torch.equal(*[model.generate(CONDITION, noise=Noise(s, 2), sampler="ode", sampling=Sampling(0.0)) for s in (1, 2)])


def test_round_trip_through_a_directory(tmp_path):
    model = build("scale")
    model.save_pretrained(tmp_path)
    again = XAR.from_pretrained(tmp_path)
    assert torch.equal(*[m.generate(CONDITION, noise=Noise(0, 2)) for m in (model, again)])


def test_bad_arguments_are_refused():
    model = build()
    with pytest.raises(ConfigError, match="did you mean 'sampling_steps'"):
        model.generate(CONDITION, sampling_step=3)
    with pytest.raises(ConfigError, match="at least 2"):
        model.generate(CONDITION, sampling_steps=1)
    with pytest.raises(ConfigError, match="sampler 'sdf'; did you mean 'sde'"):
        model.generate(CONDITION, sampler="sdf")
    with pytest.raises(ConfigError, match="entity 'cells'; did you mean 'cell'"):
        build("cells")
    with pytest.raises(VargenError, match="divides the grid"):
        build("cell", entity_size=(3, 2))
    with pytest.raises(ConfigError, match="the last one to be the grid"):
        build("scale", scales=[(1, 1), (2, 2)])
