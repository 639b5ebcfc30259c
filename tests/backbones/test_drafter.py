import pytest
import torch

from vargen.backbones.drafter import PRESETS, EagleDrafter, drafter_losses, target_states
from vargen.backbones.flextok import FlexTokGenerator
from vargen.backbones.larp import LARPGenerator
from vargen.backbones.llamagen import LlamaGen
from vargen.backbones.nar import NAR
from vargen.condition import Condition, TextFeatures
from vargen.decoding.lantern import Lantern
from vargen.decoding.speculative import prefix_mask
from vargen.errors import ConfigError, VargenError
from vargen.noise import Noise


def target(**more):
    torch.manual_seed(0)
    sizes = {"grid": (3, 4), "codebook_size": 11, "dim": 32, "depth": 2, "heads": 2, "mlp_hidden": 48, "num_classes": 5}
    model = LlamaGen(**{**sizes, **more})
    for part in model.modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(part.weight, std=0.3)
    return model.eval()


def text_target():
    return target(num_classes=None, text_dim=6, text_length=4)


def text(*lengths):
    torch.manual_seed(3)
    mask = torch.arange(4) < torch.tensor(lengths).unsqueeze(1)
    return Condition(text=TextFeatures(torch.randn(len(lengths), 4, 6) * mask.unsqueeze(-1), mask))


def test_published_size():
    with torch.device("meta"):
        drafter = EagleDrafter.from_preset("llamagen-t2i")
    assert drafter.num_parameters_ == 44_567_040
    assert [p.numel() for p in drafter.parameters() if not p.requires_grad] == [20_971_520]
    assert set(PRESETS) == {"llamagen-t2i", "llamagen-t2i-2"}


def test_a_drafter_takes_its_targets_sizes_and_head(tmp_path):
    model = target()
    drafter = EagleDrafter.for_target(model, norm_eps=1e-5)
    assert drafter.config_dict() == {
        "grid": [3, 4],
        "codebook_size": 11,
        "dim": 32,
        "heads": 2,
        "depth": 1,
        "mlp_hidden": 48,
        "norm_eps": 1e-5,
        "rope_base": 10000.0,
    }
    assert torch.equal(drafter.tokens.weight, model.output_heads[0].linear.weight)
    drafter.save_pretrained(tmp_path)
    again = EagleDrafter.from_pretrained(tmp_path)
    hidden, ids, cells = torch.randn(2, 5, 32), torch.randint(11, (2, 5)), torch.tensor([-1, 0, 3, 3, 11])
    assert torch.equal(again(hidden, ids, cells), drafter(hidden, ids, cells))
    assert not again.tokens.weight.requires_grad


def test_cached_equals_whole():
    drafter = EagleDrafter.for_target(target(), depth=2).eval()
    hidden, ids, cells = torch.randn(2, 6, 32), torch.randint(11, (2, 6)), torch.arange(6) - 1
    whole = drafter(hidden, ids, cells)
    cache = drafter.start(2, 6)
    parts = [drafter(hidden[:, a:b], ids[:, a:b], cells[a:b], cache=cache) for a, b in ((0, 3), (3, 4), (4, 6))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["class", "text"])
def test_states_are_those_of_decoding(kind):
    model = target() if kind == "class" else text_target()
    condition = Condition(class_labels=torch.tensor([1, 4])) if kind == "class" else text(2, 4)
    tokens = torch.randint(11, (2, 12))
    drop = torch.tensor([False, kind == "class"])
    states = target_states(model, tokens, condition, drop)
    state = model.start(condition, 2, rows=2)
    slots = torch.arange(model.layout.num_inputs)
    ids = tokens.repeat(2, 1)[:, model.layout.cell[slots].clamp(min=0)]
    with torch.no_grad():
        hidden = model.forward(state, ids, slots, prefix_mask(model.layout, slots, state.cache.visible))[0]
    torch.testing.assert_close(states[0], hidden[0])
    torch.testing.assert_close(states[1], hidden[3 if drop[1] else 1])


def test_a_dropped_caption_has_no_padding():
    model, drop, tokens = text_target(), torch.tensor([True]), torch.randint(11, (1, 12))
    states = [target_states(model, tokens, text(length), drop) for length in (1, 4)]
    torch.testing.assert_close(*states)


def test_losses_count_positions_and_leave_embeddings_and_target_alone():
    model = text_target()
    drafter = EagleDrafter.for_target(model)
    tokens = torch.randint(11, (2, 12))
    states = target_states(model, tokens, text(2, 3), torch.tensor([False, False]))
    losses = drafter.training_losses(states, tokens, model, Noise(0, 2))
    assert torch.equal(losses["loss"], losses["state"] + 0.1 * losses["probability"])
    losses["loss"].backward()
    assert drafter.join.weight.grad.abs().sum() > 0
    assert drafter.tokens.weight.grad is None
    # the state behind the first token, and whatever belongs to the prefix, is not asked for
    predicted = torch.randn(2, 14, 32)
    mask = (torch.arange(14) >= 4).float().expand(2, -1)
    ignored = predicted.clone()
    ignored[:, :4] = 100
    goal = torch.randn(2, 14, 32)
    first, second = (drafter_losses(p, goal, mask, model.logits)["loss"] for p in (predicted, ignored))
    assert torch.equal(first, second)
    exact = drafter_losses(goal, goal, mask, model.logits)
    assert exact["state"] == 0
    assert exact["agreement"] == pytest.approx(1, abs=1e-5)


def test_noise_is_addressed_and_scaled():
    model = target()
    drafter, tokens = EagleDrafter.for_target(model), torch.randint(11, (2, 12))
    states = target_states(model, tokens, Condition(class_labels=torch.tensor([0, 1])), torch.tensor([False, False]))
    a, b, c = (float(drafter.training_losses(states, tokens, model, Noise(s, 2))["loss"]) for s in (0, 0, 1))
    assert a == b != c
    quiet = [float(drafter.training_losses(states, tokens, model, Noise(s, 2), state_noise=0.0)["loss"]) for s in (0, 1)]
    assert quiet[0] == quiet[1]


def next_token_targets():
    sizes = {"codebook_size": 11, "dim": 16, "depth": 1, "heads": 2, "mlp_hidden": 48, "num_classes": 5}
    yield "llamagen", lambda: target(grid=(2, 4), dim=16, depth=1)
    yield "flextok", lambda: FlexTokGenerator(length=8, **sizes)
    yield "larp", lambda: LARPGenerator(length=8, **sizes)


@pytest.mark.parametrize("build", [pytest.param(build, id=name) for name, build in next_token_targets()])
def test_training_raises_what_is_accepted(build):
    torch.manual_seed(0)
    model = build().eval()
    for part in model.modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(part.weight, std=0.3)
    drafter = EagleDrafter.for_target(model)
    labels = torch.arange(40) % 5
    condition = Condition(class_labels=labels)
    tokens = model.generate(condition, noise=Noise(1, 40)).flatten(1)
    states = target_states(model, tokens, condition, torch.zeros(40, dtype=torch.bool))
    few = Condition(class_labels=torch.arange(12) % 5)

    def accepted():
        way = Lantern(drafter, tree="chain_5")
        model.generate(few, noise=Noise(2, 12), decoding=way)
        return way.statistics.tokens_per_round

    before = accepted()
    optimizer = torch.optim.AdamW([p for p in drafter.parameters() if p.requires_grad], lr=5e-3)
    for step in range(60):
        loss = drafter.training_losses(states, tokens, model, Noise(3, 40).at(step), 0.0, 1.0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert accepted() > before


def test_1d_targets():
    model = FlexTokGenerator(length=6, codebook_size=11, dim=32, depth=1, heads=2, mlp_hidden=24, num_classes=3)
    assert EagleDrafter.for_target(model).config.grid == [6]


def test_refusals():
    with pytest.raises(VargenError, match="NAR cannot be decoded speculatively"):
        EagleDrafter.for_target(NAR(grid=(2, 2), codebook_size=5, dim=16, depth=1, heads=2, num_classes=3))
    with pytest.raises(ConfigError, match="multiple of 4"):
        EagleDrafter(dim=12, heads=2)
    with pytest.raises(VargenError, match="hidden states of width 8"):
        EagleDrafter.for_target(target())(torch.zeros(1, 2, 8), torch.zeros(1, 2, dtype=torch.int64), torch.tensor([0, 1]))
