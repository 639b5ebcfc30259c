"""Decay groups, schedules and the average of weights."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vargen.errors import ConfigError
from vargen.train.ema import EMA
from vargen.train.optim import (
    LR_SCHEDULER,
    OPTIMIZER,
    base_learning_rate,
    build_optimizer,
    decayed,
    learning_rate,
    set_learning_rate,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.block = nn.Linear(4, 4)
        self.diffloss = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_decay_rules():
    assert decayed(Net(), "matrices") == {"embed.weight", "block.weight", "diffloss.weight"}
    assert decayed(Net(), "matrices", ["diffloss"]) == {"embed.weight", "block.weight"}
    assert decayed(Net(), "linear") == {"block.weight", "diffloss.weight"}
    assert len(decayed(Net(), "all")) == 7
    assert decayed(nn.Linear(2, 2), "linear") == {"weight"}
    with pytest.raises(ConfigError, match="matrices"):
        decayed(Net(), "matrix")


def test_optimizer_groups():
    config = {**OPTIMIZER, "blr": 1e-4, "weight_decay": 0.05}
    optimizer = build_optimizer(Net(), config, batch_size=2048)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.05, 0.0]
    assert [len(g["params"]) for g in optimizer.param_groups] == [3, 4]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(8e-4)
    assert isinstance(build_optimizer(Net(), {**config, "name": "adam"}, 256), torch.optim.Adam)
    with pytest.raises(ConfigError, match="adam"):
        build_optimizer(Net(), {**config, "name": "adamv"}, 256)
    for wrong in ({"learning_rate": 1e-4, "blr": 1e-4}, {"learning_rate": None, "blr": None}):
        with pytest.raises(ConfigError, match="exactly one"):
            base_learning_rate({**OPTIMIZER, **wrong}, 256)


def test_published_schedules():
    larp = learning_rate({**LR_SCHEDULER, "name": "cosine", "floor": 0.01}, 1.0, total_steps=150, warmup_steps=8)
    for s in (1, 5, 8, 9, 80, 150):
        expected = 0.01 + 0.99 * s / 8 if s <= 8 else 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (s - 8) / 142))
        assert larp(s) == pytest.approx(expected)
    mar = learning_rate(LR_SCHEDULER, 8e-4, total_steps=400, warmup_steps=100)
    assert [mar(s) for s in (50, 100, 400)] == pytest.approx([4e-4, 8e-4, 8e-4])
    steps = learning_rate({**LR_SCHEDULER, "name": "multistep", "milestones": [10, 20]}, 1.0, 30, 0)
    assert [steps(s) for s in (10, 11, 21)] == pytest.approx([1, 0.1, 0.01])
    for wrong in ({"name": "cosin"}, {"floor": 2}):
        with pytest.raises(ConfigError):
            learning_rate({**LR_SCHEDULER, **wrong}, 1.0, 10, 0)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(1, 200), st.integers(0, 50), st.floats(0, 1, allow_nan=False))
def test_rates_lie_between_floor_and_base(name, total, warmup, floor):
    rate = learning_rate({**LR_SCHEDULER, "name": name, "floor": floor}, 2.0, total, warmup)
    rates = [rate(s) for s in range(1, total + warmup + 2)]
    assert all(2.0 * floor - 1e-9 <= r <= 2.0 + 1e-9 for r in rates)
    top = rates.index(max(rates))
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_ema_is_near_the_weights_early_and_slow_late():
    layer = nn.Linear(3, 3)
    ema = EMA(layer.parameters(), decay=0.999)
    for _ in range(20):
        with torch.no_grad():
            layer.weight.add_(1)
        ema.update()
    with ema.swapped():
        average = layer.weight.clone()
    # the mean lag of an average whose decay is (1 + t) / (10 + t) stays far below the 20 steps that were made
    assert 0 < (layer.weight - average).mean() < 4
    ema.updates = 10**6
    assert ema.current_decay == 0.999
    assert EMA(layer.parameters(), decay=0.9, warmup=False).current_decay == 0.9
    with pytest.raises(ConfigError):
        EMA(layer.parameters(), decay=1.0)


def test_ema_swap_restores_bit_for_bit_even_after_an_error():
    layer = nn.Linear(3, 3)
    ema = EMA(layer.parameters())
    with torch.no_grad():
        layer.weight.mul_(math.pi)
    ema.update()
    raw, average = layer.weight.clone(), ema.averages[0].clone()
    with contextlib.suppress(RuntimeError), ema.swapped():
        assert torch.equal(layer.weight, average)
        raise RuntimeError
    assert torch.equal(layer.weight, raw)
    assert torch.equal(ema.averages[0], average)


def test_frozen_parameters_are_not_averaged():
    net = Net()
    assert len(EMA(net.parameters()).averages) == 7


def test_multipliers_scale_the_rate_of_the_parameters_they_match():
    config = {**OPTIMIZER, "learning_rate": 1e-3, "weight_decay": 0.1, "multipliers": {"weight": 0.5, "^norm": 50.0}}
    net = Net()
    optimizer = build_optimizer(net, config, 256)
    set_learning_rate(optimizer, 2e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    expected = {name: 0.1 if name.startswith("norm") else 1e-3 if "weight" in name else 2e-3 for name in trained}
    assert {name: rates[id(p)] for name, p in trained.items()} == pytest.approx(expected)
    names = {id(p): name for name, p in net.named_parameters()}
    kept = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert kept == decayed(net)
    with pytest.raises(ConfigError, match="no parameter's name matches 'weigth'"):
        build_optimizer(net, {**config, "multipliers": {"weigth": 2.0}}, 256)
    with pytest.raises(ConfigError, match="expected a positive"):
        build_optimizer(net, {**config, "multipliers": {"weight": 0.0}}, 256)
    with pytest.raises(ConfigError, match="factor much for 'weight'"):
        build_optimizer(net, {**config, "multipliers": {"weight": "much"}}, 256)
    for mistake in ({"multipliers": {"(norm": 2.0}}, {"no_decay": ["(norm"]}):
        with pytest.raises(ConfigError, match="no regular expression"):
            build_optimizer(net, {**config, **mistake}, 256)
