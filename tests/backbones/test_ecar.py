"""E-CAR: block causality, cached stages, numbers of evaluations, costs."""

import pytest
import torch

from vargen.backbones.ecar import ECAR
from vargen.condition import Condition, TextFeatures
from vargen.decoding.flops import generation_flops
from vargen.errors import ConfigError, VargenError
from vargen.flow.flow import euler, uniform_times
from vargen.flow.multistage import endpoints, jump, pyramid, upsample
from vargen.guidance import Guidance
from vargen.noise import Noise

CONDITION = Condition(class_labels=torch.tensor([1, 4]))


def build(**changes):
    torch.manual_seed(0)
    config = {
        "grid": (8, 8),
        "channels": 3,
        "stages": 3,
        "dim": 16,
        "depth": 2,
        "heads": 2,
        "num_classes": 5,
        "head_width": 16,
        "head_depth": 1,
        "head_heads": 2,
        "sampling_steps": 2,
    }
    model = ECAR(**{**config, **changes}).eval()
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("head", ["mlp", "dit"])
def test_loss_is_the_sum_over_stages_and_reaches_everything(head):
    model = build(head=head, condition_dropout=0.5).train()
    tokens = torch.randn(2, 8, 8, 3)
    losses = model.training_losses(tokens, CONDITION, Noise(1, 2))
    assert float(losses["loss"]) == pytest.approx(sum(float(losses[f"stage_{k}"]) for k in (1, 2, 3)), rel=1e-5)
    sum(model.training_losses(tokens, CONDITION, Noise(s, 2))["loss"] for s in range(4)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("stage_input", ["ends", "starts"])
def test_one_stage_is_plain_flow_matching(stage_input):
    model = build(stages=1, condition_dropout=0.0, stage_input=stage_input)
    tokens, noise = torch.randn(2, 8, 8, 3), Noise(3, 2)
    draws, t = noise.normal("stage_noise", (8, 8, 3), at=(0,)), noise.uniform("time", (1,))
    slots = model.condition(CONDITION, torch.zeros(2, dtype=torch.bool))
    z = model.hidden([draws if stage_input == "starts" else torch.zeros_like(draws)], slots)
    x = (1 - t[..., None]) * draws.flatten(1, 2) + t[..., None] * tokens.flatten(1, 2)
    expected = (model.head.net(x, t, z) - (tokens - draws).flatten(1, 2)).square().mean()
    assert float(model.training_losses(tokens, CONDITION, noise)["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_paths_of_training_are_those_of_sampling():
    """Stages start where the jump from the end before leads; the noise of a path is white, shared by its ends, and not seen."""
    model = build()
    maps = pyramid(torch.randn(400, 8, 8, 3), 3)
    starts, ends, inputs = model.paths(maps, Noise(0, 400))
    for k, (s, e) in enumerate(model.times):
        signal = upsample(maps[k - 1]) if k else 0.0
        noise = (starts[k] - s * signal) / (1 - s)
        assert torch.allclose(ends[k], e * maps[k] + (1 - e) * noise, atol=1e-4)
        flat = noise.flatten(1)
        covariance = flat.T @ flat / len(flat)
        assert torch.allclose(covariance.diagonal(), torch.ones(flat.shape[1]), atol=0.35)
        neighbours = (noise[:, :, 1::2] * noise[:, :, ::2]).mean()
        assert abs(float(neighbours)) < 0.05
        assert torch.equal(inputs[k], upsample(ends[k - 1]) if k else torch.zeros_like(starts[k]))

    # other noise in a stage changes its path but not what the transformer sees of it
    class Other(Noise):
        def normal(self, name, shape=(), at=(), dtype=torch.float32):
            return super().normal(name, shape, at, dtype) * (-1.0 if at == (1,) else 1.0)

    other_starts, _, other_inputs = model.paths(maps, Other(0, 400))
    assert not torch.allclose(other_starts[1], starts[1])
    assert torch.equal(other_inputs[1], inputs[1])


def starts_of(model):
    return [torch.randn(2, *level, 3) for level in model.order.levels]


def test_stages_see_only_coarser_ones():
    model = build()
    slots, starts = model.condition(CONDITION, torch.zeros(2, dtype=torch.bool)), starts_of(model)
    base = model.hidden(starts, slots)
    sizes = [4, 16, 64]
    for k in range(3):
        changed = [start + (i == k) for i, start in enumerate(starts)]
        hidden = model.hidden(changed, slots)
        before = sum(sizes[:k])
        assert torch.allclose(hidden[:, :before], base[:, :before], atol=1e-5)
        assert not torch.isclose(hidden[:, before:], base[:, before:], atol=1e-6).all(-1).any()


def test_permuting_a_stage_with_its_position_codes_permutes_its_states():
    model = build(stages=1)
    slots, [start] = model.condition(CONDITION, torch.zeros(2, dtype=torch.bool)), starts_of(model)
    order = torch.randperm(64)
    base = model.hidden([start], slots)
    model.positions = model.positions[order]
    permuted = model.hidden([start.flatten(1, 2)[:, order].unflatten(1, (8, 8))], slots)
    assert torch.allclose(permuted, base[:, order], atol=1e-5)


@pytest.mark.parametrize("head, stage_input", [("mlp", "starts"), ("mlp", "ends"), ("dit", "ends")])
def test_cached_generation_is_the_uncached_one(head, stage_input):
    model, noise = build(head=head, stage_input=stage_input), Noise(2, 2)
    guidance = Guidance(1.7)
    tokens = model.generate(CONDITION, noise=noise, guidance=guidance)
    labels = Condition(class_labels=CONDITION.class_labels.repeat(2))
    slots = model.condition(labels, torch.tensor([False, False, True, True]))
    inputs, x = [], noise.normal("stage_noise", (2, 2, 3), at=(0,))
    before = torch.zeros_like(x)
    with torch.no_grad():
        for k, (_, end) in enumerate(model.times):
            inputs.append(x if stage_input == "starts" else before)
            n = x.shape[1] ** 2
            z = model.hidden([s.repeat(2, 1, 1, 1) for s in inputs], slots)[:, -n:]

            def velocity(x, u, z=z):
                v = model.head.net(x.repeat(2, 1, 1), torch.tensor(u), z)
                return v[2:] + 1.7 * (v[:2] - v[2:])

            x = euler(velocity, x.flatten(1, 2), uniform_times(2, 0.0, 1.0)).tokens.unflatten(1, model.order.levels[k])
            before = upsample(x)
            if k < 2:
                x = jump(x, end, noise.normal("stage_noise", (*model.order.levels[k + 1], 3), at=(k + 1,)))
    assert torch.allclose(tokens, x, rtol=1e-3, atol=1e-3)


def test_an_oracle_head_generates_the_data():
    model, target = build(), torch.randn(2, 8, 8, 3)
    maps, stage = pyramid(target, 3), iter(range(3))

    def oracle(z, start, times, **_):
        k = next(stage)
        s, e = model.times[k]
        shape = maps[k].shape
        signal = torch.zeros(shape) if k == 0 else endpoints(maps[k - 1], maps[k], s, e, torch.zeros(shape))[0]
        noise = (start.reshape(shape) - signal) / (1 - s)
        x0, x1 = endpoints(maps[k - 1] if k else None, maps[k], s, e, noise)
        return euler(lambda x, u: (x1 - x0).flatten(1, 2), start, times)

    model.head.integrate = oracle
    assert torch.allclose(model.generate(CONDITION, noise=Noise(0, 2)), target, atol=1e-4)


def test_counts():
    model = build(grid=(32, 32), stages=4, head="mlp")
    assert model.order.num_cells == 16 + 64 + 256 + 1024 == 1360
    passes, heads = [], []
    model.transformer.register_forward_hook(lambda _m, _i, output: passes.append(output.shape[1]))
    model.head.net.out.register_forward_hook(lambda _m, _i, output: heads.append(output.shape[1]))
    model.head.net.input.register_forward_hook(lambda _m, _i, output: heads.append(output.shape[1]))
    model.generate(CONDITION, noise=Noise(0, 2), sampling_steps=[1, 2, 3, 1])
    # the condition slot goes with the first stage
    assert passes == [17, 64, 256, 1024]
    assert heads == [16, *[64] * 2, *[256] * 3, 1024]


@pytest.mark.parametrize("stages, share", [(2, 0.625), (3, 0.4375), (4, 0.332)])
def test_cost_of_the_head_falls_with_stages(stages, share):
    """Against all steps at full resolution: (4/3) (1 - 4^-K) / K."""

    def cost_of_steps(stages, steps):
        model = build(stages=stages, dim=8, depth=1, heads=1, num_classes=None, head="mlp")
        # backbone and hidden states are paid once, times once per step, so that what is left is tokens times steps
        more = generation_flops(model, sampling_steps=1 + steps) - generation_flops(model, sampling_steps=1)
        return more - stages * steps * 2 * (256 * 16 + 16 * 16)

    assert cost_of_steps(stages, 4) / cost_of_steps(1, 4 * stages) == pytest.approx(share, abs=1e-3)


def test_flops_of_a_linear_model_are_counted():
    model = build(stages=1, num_classes=None, grid=(2, 2), depth=1, sampling_steps=1, head="mlp")
    width, hidden, n = 16, 64, 5
    attention = 2 * n * width * (3 * width + width) + 2 * 2 * n * n * width
    mlp = 2 * 2 * n * width * hidden
    tokens = 4
    head = 2 * (256 * 16 + 16 * 16) + 2 * tokens * (16 * 16 + 3 * 16 + 16 * 5 * 16 + 2 * 16 * 16 + 16 * 3)
    assert generation_flops(model) == attention + mlp + 2 * tokens * 3 * width + head


def test_text_conditions():
    model = build(num_classes=None, text_dim=6, text_length=4)
    text = TextFeatures(torch.randn(2, 3, 6), torch.ones(2, 3, dtype=torch.bool))
    first = model.generate(Condition(text=text), noise=Noise(0, 2), guidance=Guidance(2.0))
    other = model.generate(Condition(text=TextFeatures(text.features + 1, text.mask)), noise=Noise(0, 2), guidance=Guidance(2.0))
    assert not torch.allclose(first, other)
    assert model.training_losses(torch.randn(2, 8, 8, 3), Condition(text=text))["loss"].isfinite()


def test_callback_and_ablation():
    model, infos = build(), []
    tokens = model.generate(CONDITION, noise=Noise(0, 2), on_step=infos.append)
    assert [float(info.known.mean()) for info in infos] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert all(info.tokens.shape == tokens.shape for info in infos)
    assert torch.equal(infos[-1].tokens, tokens)
    biased = build(renoise=False).generate(CONDITION, noise=Noise(0, 2))
    assert not torch.allclose(biased, tokens)


def test_round_trip_through_a_directory(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    again = ECAR.from_pretrained(tmp_path)
    assert torch.equal(*[m.generate(CONDITION, noise=Noise(0, 2)) for m in (model, again)])


def test_bad_arguments_are_refused():
    model = build()
    with pytest.raises(VargenError, match="ECAR cannot keep given tokens"):
        model.generate(CONDITION, known=torch.ones(8, 8, dtype=torch.bool), tokens=torch.zeros(2, 8, 8, 3))
    with pytest.raises(VargenError, match="one for each of 3 stages"):
        model.generate(CONDITION, sampling_steps=[1, 2])
    with pytest.raises(ConfigError, match="did you mean"):
        model.generate(CONDITION, sampling_step=2)
    with pytest.raises(ConfigError, match="halved 4 times"):
        build(stages=5)
    with pytest.raises(ConfigError, match="2 ends for 3 stages"):
        build(ends=[0.5, 1.0])
    with pytest.raises(ConfigError, match="head 'ditt'"):
        build(head="ditt")
    with pytest.raises(ConfigError, match="stage_input .end.; did you mean .ends."):
        build(stage_input="end")
