"""Optimizers, weight-decay groups and learning-rate schedules, as the published recipes need them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vargen.errors import ConfigError, nearest

OPTIMIZER: dict[str, Any] = {
    "name": "adamw",
    "learning_rate": None,  # absolute, or as blr: per 256 samples of the global batch
    "blr": None,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "weight_decay": 0.0,
    "decay": "matrices",
    "no_decay": [],
    "multipliers": {},  # regular expression -> factor of the learning rate of the parameters whose name it finds
}
LR_SCHEDULER: dict[str, Any] = {
    "name": "constant",
    "warmup_steps": 0,
    "warmup_epochs": None,
    "hold_steps": 0,  # up to this step, linear and cosine schedules stay at the full rate
    "hold_epochs": None,
    "floor": 0.0,
    "milestones": [],
    "gamma": 0.1,
}

DECAY_RULES = ("all", "matrices", "linear")
SCHEDULES = ("constant", "linear", "cosine", "multistep")
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}


def decayed(module: nn.Module, rule: str = "matrices", exclude: Sequence[str] = ()) -> set[str]:
    """Names of the trainable parameters of ``module`` that weight decay acts on.

    Args:
        rule: ``matrices`` decays tensors with two axes or more (LlamaGen, MAR), ``linear`` only weights of linear layers (LARP),
            ``all`` everything.
        exclude: regular expressions; a parameter whose name matches one anywhere is not decayed.

    Raises:
        ConfigError: an unknown rule, or a text that is no regular expression.
    """
    if rule not in DECAY_RULES:
        raise ConfigError(f"weight-decay rule '{rule}'{nearest(rule, DECAY_RULES)}")
    linear = {f"{name}.weight".lstrip(".") for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    names, patterns = set(), [_pattern(text) for text in exclude]
    for name, parameter in module.named_parameters():
        chosen = rule == "all" or (parameter.dim() >= 2 if rule == "matrices" else name in linear)
        if parameter.requires_grad and chosen and not any(pattern.search(name) for pattern in patterns):
            names.add(name)
    return names


def build_optimizer(module: nn.Module, config: Mapping[str, Any], batch_size: int) -> torch.optim.Optimizer:
    """The optimizer of a recipe's ``optimizer`` block (keys of ``OPTIMIZER``) over the trainable parameters of ``module``.

    Raises:
        ConfigError: unknown name or rule, not exactly one of ``learning_rate`` and ``blr``, or multipliers of no parameter.
    """
    if config["name"] not in OPTIMIZERS:
        raise ConfigError(f"optimizer '{config['name']}'{nearest(str(config['name']), OPTIMIZERS)}")
    names = decayed(module, config["decay"], config["no_decay"])
    factors = rate_factors(module, config["multipliers"])
    members: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for decays in (True, False):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and (name in names) == decays:
                members.setdefault((decays, factors[name]), []).append(parameter)
    return OPTIMIZERS[config["name"]](
        [
            {"params": parameters, "weight_decay": config["weight_decay"] if decays else 0.0, "multiplier": factor}
            for (decays, factor), parameters in members.items()
        ],
        lr=base_learning_rate(config, batch_size),
        betas=tuple(config["betas"]),
        eps=config["eps"],
    )


def rate_factors(module: nn.Module, multipliers: Mapping[str, float]) -> dict[str, float]:
    """What the learning rate of every parameter is multiplied by.

    Args:
        multipliers: factors by regular expression, for parameters whose name it matches anywhere; the last match counts.

    Raises:
        ConfigError: no regular expression, one that matches no name, or a factor that is no positive number.
    """
    factors = {name: 1.0 for name, _ in module.named_parameters()}
    for text, factor in multipliers.items():
        pattern = _pattern(text)
        found = [name for name in factors if pattern.search(name)]
        if not found:
            raise ConfigError(f"optimizer.multipliers: no parameter's name matches '{text}'")
        if not isinstance(factor, int | float) or not 0 < factor < math.inf:
            raise ConfigError(f"optimizer.multipliers: factor {factor} for '{text}', expected a positive number")
        factors.update(dict.fromkeys(found, float(factor)))
    return factors


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"optimizer: '{text}' is no regular expression ({error})") from error


def base_learning_rate(config: Mapping[str, Any], batch_size: int) -> float:
    """``learning_rate``, or ``blr * batch_size / 256`` with ``batch_size`` the samples of one optimizer step."""
    rate, blr = config["learning_rate"], config["blr"]
    if (rate is None) == (blr is None):
        raise ConfigError("optimizer: give exactly one of learning_rate and blr (per 256 samples of the global batch)")
    return float(rate) if rate is not None else float(blr) * batch_size / 256


def learning_rate(
    config: Mapping[str, Any], base: float, total_steps: int, warmup_steps: int, hold_steps: int = 0
) -> Callable[[int], float]:
    """The learning rate of step ``s`` (counted from 1) as a function, so that resuming needs no scheduler state.

    Warm-up rises linearly from ``floor * base`` to ``base`` over ``warmup_steps``; then ``constant`` stays, ``linear`` and
    ``cosine`` fall from step ``hold_steps`` on to ``floor * base`` at ``total_steps``, and ``multistep`` multiplies by ``gamma`` at
    each milestone (a step).

    Raises:
        ConfigError: unknown name, or a floor outside [0, 1].
    """
    name, floor = config["name"], float(config["floor"])
    if name not in SCHEDULES:
        raise ConfigError(f"lr_scheduler '{name}'{nearest(str(name), SCHEDULES)}")
    if not 0 <= floor <= 1:
        raise ConfigError(f"lr_scheduler floor {floor}: expected a share of the learning rate in [0, 1]")

    start = max(warmup_steps, hold_steps)

    def rate(step: int) -> float:
        if step <= warmup_steps:
            return base * (floor + (1 - floor) * step / warmup_steps)
        if name == "multistep":
            return base * float(config["gamma"]) ** sum(step > milestone for milestone in config["milestones"])
        if name == "constant":
            return base
        share = min(max(step - start, 0) / max(total_steps - start, 1), 1.0)
        remaining = 1 - share if name == "linear" else 0.5 * (1 + math.cos(math.pi * share))
        return base * (floor + (1 - floor) * remaining)

    return rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets ``rate`` times its multiplier in every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["multiplier"]
