import pytest
import torch
from scipy import stats

from vargen.backbones.mar import MAR
from vargen.condition import Condition
from vargen.decoding.continuous import ContinuousSpeculation, exact_tokens
from vargen.errors import ConfigError, SpaceError, VargenError
from vargen.flow.diffusion import Diffusion
from vargen.flow.trajectory import draw_trajectory, score_trajectory
from vargen.guidance import Guidance
from vargen.noise import Noise

LABELS = Condition(class_labels=torch.tensor([0, 2]))


def build(seed, **more):
    torch.manual_seed(seed)
    config = {"grid": (2, 3), "channels": 2, "encoder_dim": 16, "encoder_depth": 1, "encoder_heads": 2, "decoder_dim": 16,
              "decoder_depth": 1, "decoder_heads": 2, "buffer_size": 2, "num_classes": 3, "head_width": 16, "head_depth": 1,
              "head_steps": "ddim10"}  # fmt: skip
    model = MAR(**{**config, **more})
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def toy(slope, shift):
    """A denoising network whose prediction is linear in x."""
    return lambda x, t: slope * x + shift


def test_exact_rule_gives_the_targets_distribution():
    chain = Diffusion(torch.tensor([0.2, 0.4, 0.6]), variance="large")
    draft, target = toy(0.5, 0.3), toy(0.3, -0.2)
    noise = Noise(3, 6000)
    shape = (1,)

    def trajectory(net, name):
        return draw_trajectory(chain, net, noise.normal(name, shape), lambda level: noise.normal(name + "s", shape, (level,)), 1.0)

    plain = score_trajectory(chain, target, trajectory(target, "plain"), 1.0)[1]
    states = trajectory(draft, "draft")
    log_q, drafted = score_trajectory(chain, draft, states, 1.0)
    tokens, accepted = exact_tokens(
        chain,
        draft,
        target,
        states,
        log_q,
        noise.uniform("accept", dtype=torch.float64),
        lambda k: (noise.normal("r", shape, (k,)), lambda level: noise.normal("rs", shape, (k, level))),
        lambda k: noise.uniform("keep", at=(k,), dtype=torch.float64),
    )
    assert 0.3 < accepted.float().mean() < 0.99
    assert stats.ks_2samp(tokens.flatten(), plain.flatten()).pvalue > 1e-3
    assert stats.ks_2samp(drafted.flatten(), plain.flatten()).pvalue < 1e-6, "the toy's draft is really different"


def test_trajectory_density_is_that_of_its_gaussian_steps():
    chain = Diffusion(torch.tensor([0.1, 0.5]), variance="large")
    net = toy(0.2, 0.1)
    states = draw_trajectory(chain, net, torch.zeros(4, 2), lambda level: torch.ones(4, 2), 0.5)
    log_density, token = score_trajectory(chain, net, states, 0.5)
    std = 0.5 * chain.betas[1].sqrt().item()
    expected = 2 * stats.norm.logpdf(std, scale=std)
    torch.testing.assert_close(log_density, torch.full((4,), expected, dtype=torch.float64), atol=1e-5, rtol=1e-5)
    assert token.shape == (4, 2)


@pytest.mark.parametrize("rule", ["reference", "exact"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_both_rules_fill_all_cells_and_count_passes(rule, scale):
    draft, target = build(0), build(1, encoder_depth=2)
    decoding = ContinuousSpeculation(draft, rule=rule, num_draft=2, prefill=0.0, inner_temperature=100.0)
    shown = []
    tokens = target.generate(
        LABELS,
        noise=Noise(0, 2),
        guidance=Guidance(scale),
        steps=5,
        decoding=decoding,
        on_step=lambda info: shown.append(info.index),
    )
    assert tokens.shape == (2, 2, 3, 2)
    assert (tokens != 0).any(-1).all()
    counts = decoding.statistics
    assert counts.tested >= counts.accepted
    if rule == "reference":
        # step 0 is the target's; tests after steps 2 and 4
        assert (counts.draft_passes, counts.target_passes) == (4, 3)
        assert shown == list(range(5))
    else:
        assert counts.target_passes >= 2 * 5


def test_exact_rule_accepts_a_draft_that_is_the_target():
    model = build(1)
    decoding = ContinuousSpeculation(model, rule="exact", num_draft=3)
    model.generate(LABELS, noise=Noise(0, 2), guidance=Guidance(2.0), steps=6, decoding=decoding)
    assert decoding.statistics.accepted == decoding.statistics.tested == 12


def test_exact_samples_do_not_depend_on_their_batch():
    draft, target = build(0), build(1)
    decoding = ContinuousSpeculation(draft, rule="exact", num_draft=2)
    together = target.generate(LABELS, noise=Noise(4, 2), steps=3, decoding=decoding)
    for i in range(2):
        row = torch.tensor([i])
        alone = target.generate(LABELS.select(row), noise=Noise(4, row), steps=3, decoding=decoding)
        torch.testing.assert_close(alone[0], together[i])


def test_what_cannot_work_is_refused():
    target = build(1)
    with pytest.raises(ConfigError, match="'reference' or 'exact'"):
        ContinuousSpeculation(target, rule="fast")
    with pytest.raises(ConfigError, match="num_draft >= 1"):
        ContinuousSpeculation(target, num_draft=0)
    with pytest.raises(SpaceError, match="target and draft do not share a token space: channels"):
        target.generate(LABELS, steps=2, decoding=ContinuousSpeculation(build(0, channels=3)))
    with pytest.raises(VargenError, match="same sampling steps"):
        target.generate(LABELS, steps=2, decoding=ContinuousSpeculation(build(0, head_steps="ddim5"), rule="exact"))
    with pytest.raises(VargenError, match="diffusion head"):
        target.generate(LABELS, steps=2, decoding=ContinuousSpeculation(build(0, head="flow", head_steps="5"), rule="exact"))
