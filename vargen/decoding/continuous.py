"""Continuous speculative decoding: a small masked generator drafts tokens, a large one tests them (Wang et al., 2024,
arXiv 2411.11925).

Both models draw the token of a cell from the same addressed noise: their denoising trajectories are aligned, so that the noise
terms of the density ratio cancel. Two rules: ``reference`` is what the published code does, ``exact`` leaves the target's
distribution as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vargen.condition import Condition
from vargen.decoding.masked import MaskedStep, step_info
from vargen.errors import ConfigError, VargenError
from vargen.flow.diffusion import Diffusion, Predict, StepNoise
from vargen.flow.sample import HeadSample
from vargen.flow.trajectory import draw_trajectory, score_trajectory
from vargen.guidance import Guidance
from vargen.heads.diffusion import guided_network
from vargen.model import OnStep
from vargen.nn.masking import positions_where, put, take
from vargen.noise import Noise

MAX_ROUNDS = 100


def log_ratio(x: Tensor, draft: HeadSample, target: HeadSample, inner_temperature: float) -> Tensor:
    """Log of the published acceptance ratio, float64 ``(N,)``.

    ``N(x; mu_p, sigma_p T) F prod(sigma_q) / (N(x; mu_q, sigma_q T) prod(sigma_p))`` without the Gaussians' own normalisation, with
    F = exp(sum of log_std_sum_p - log_std_sum_q). In theory F is the reciprocal of that; the code is followed. Everything
    is in logs: products of small deviations underflow float32 from about 18 channels on.
    """

    def distance(sample: HeadSample) -> Tensor:
        return ((x.double() - sample.mean) / (sample.std.double() * inner_temperature)).square().sum(-1)

    scales = (draft.std.double().log() - target.std.double().log()).sum(-1)
    return 0.5 * (distance(draft) - distance(target)) + fixed_log_term(draft, target) + scales


def fixed_log_term(draft: HeadSample, target: HeadSample) -> Tensor:
    """log F, float64 ``(N,)``."""
    return (target.log_std_sum.double() - draft.log_std_sum.double()).sum(-1)


def residual_share(y: Tensor, draft: HeadSample, target: HeadSample) -> Tensor:
    """``max(0, p(y) - q(y) / F) / p(y)`` with the last step's Gaussians, float64 ``(N,)``."""

    def log_density(sample: HeadSample) -> Tensor:
        std = sample.std.double()
        return (-0.5 * ((y.double() - sample.mean) / std).square() - std.log()).sum(-1)

    return (1 - (log_density(draft) - fixed_log_term(draft, target) - log_density(target)).exp()).clamp(min=0)


def resample(draft: HeadSample, target: HeadSample, draws: Callable[[int], tuple[Tensor, Tensor]]) -> tuple[Tensor, int]:
    """Published resampling: proposals from the target's last step, kept with :func:`residual_share`, at most 100 rounds.

    Every row goes on until all rows have kept something, a later proposal replacing an earlier one; a row that never keeps any
    stays zero.

    Args:
        draws: round to proposal noise ``(N, C)`` and uniforms ``(N,)``.

    Returns:
        ``(N, C)`` and the number of rounds.
    """
    kept = torch.zeros_like(target.mean)
    done = torch.zeros(len(kept), dtype=torch.bool, device=kept.device)
    for number in range(MAX_ROUNDS):
        noise, uniform = draws(number)
        proposal = target.mean + target.std * noise
        take_it = uniform < residual_share(proposal, draft, target)
        kept, done = torch.where(take_it.unsqueeze(-1), proposal, kept), done | take_it
        if done.all():
            return kept, number + 1
    return kept, MAX_ROUNDS


@dataclass
class Verification:
    """What one test of drafted tokens saw, rows in order of (sample, position).

    Attributes:
        step: decoding step at which it took place.
        positions: int64 ``(B, n)``.
        draft, target: what the heads returned, ``(B * n, C)``.
        ratio, accepted, result: ``(B * n,)``, ``(B * n,)``, ``(B * n, C)``.
    """

    step: int
    positions: Tensor
    draft: HeadSample
    target: HeadSample
    ratio: Tensor
    accepted: Tensor
    result: Tensor


@dataclass
class Statistics:
    """Counts of a run: backbone passes of each model (a guided pair counts once), tokens tested and accepted."""

    draft_passes: int = 0
    target_passes: int = 0
    tested: int = 0
    accepted: int = 0


@dataclass
class ContinuousSpeculation:
    """Speculation with a draft model of the same tokens, cells, and head chain: ``target.generate(..., decoding=...)``.

    Args:
        draft: the small masked generator.
        rule: ``reference``, the published procedure: drafts are tested together every ``num_draft`` steps against predictions that
            do not see them, a rejected token is replaced alone, and ``inner_temperature`` flattens the test; it trades the target's
            distribution for quality of the draft's, and its samples may depend on their batch through shared resampling rounds.
            ``exact``: drafts are tested in context by the ratio of whole trajectory densities; the first step with a rejection
            takes exact residual draws and discards later drafts. Its output has the target's distribution.
        num_draft: decoding steps between tests.
        prefill: share of the steps that the target does alone first.
        inner_temperature: of the reference rule's test.
        on_verify: called with every :class:`Verification` of the reference rule.

    Attributes:
        statistics: of the last run.
    """

    draft: Any
    rule: str = "reference"
    num_draft: int = 8
    prefill: float = 0.15
    inner_temperature: float = 42.0
    on_verify: Callable[[Verification], None] | None = None
    statistics: Statistics = field(default_factory=Statistics)

    def __post_init__(self) -> None:
        if self.rule not in ("reference", "exact"):
            raise ConfigError(f"rule '{self.rule}': expected 'reference' or 'exact'")
        if self.num_draft < 1 or not 0 <= self.prefill <= 1 or self.inner_temperature <= 0:
            raise ConfigError("expected num_draft >= 1, prefill in [0, 1] and a positive inner_temperature")

    @torch.no_grad()
    def decode(
        self,
        target: Any,
        condition: Condition,
        tokens: Tensor,
        steps: Iterable[MaskedStep],
        noise: Noise,
        guidance: Guidance,
        temperature: float = 1.0,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Tensor:
        """Fills ``tokens`` ``(B, L, C)`` along ``steps``; see :func:`vargen.decoding.masked.decode_masked`.

        Raises:
            SpaceError: draft and target do not share a token space.
        """
        target.space.require(self.draft.space, "target and draft")
        self.statistics = Statistics()
        plan = list(steps)
        if self.rule == "reference":
            return self._reference(target, condition, tokens, plan, noise, guidance, temperature, on_step, options)
        rows = [
            self._exact(
                target,
                condition.select(slice(row, row + 1)),
                tokens[row : row + 1],
                [_one(step, row) for step in plan],
                noise.select(slice(row, row + 1)),
                guidance,
                temperature,
            )
            for row in range(len(tokens))
        ]
        return torch.cat(rows)

    def _reference(
        self,
        target: Any,
        condition: Condition,
        tokens: Tensor,
        plan: list[MaskedStep],
        noise: Noise,
        guidance: Guidance,
        temperature: float,
        on_step: OnStep | None,
        options: dict[str, Any],
    ) -> Tensor:
        models = {"draft": self.draft, "target": target}
        states = {name: model.start(condition, len(tokens), guidance.rows) for name, model in models.items()}

        def run(name: str, mask: Tensor, positions: Tensor, scale: float) -> HeadSample:
            z = take(models[name].hidden(states[name], tokens, mask), positions.repeat(guidance.rows, 1))
            passes = f"{name}_passes"
            setattr(self.statistics, passes, getattr(self.statistics, passes) + 1)
            return models[name].draw(z, positions, noise, partial(guidance.combine, scale=scale), temperature, **options)

        maps = {name: torch.zeros_like(tokens) for name in ("mean", "std", "log_std_sum")}
        verified = plan[0].mask if plan else None
        for step in plan:
            scale = guidance.at(step.progress)
            by_target = step.index <= len(plan) * self.prefill
            sample = run("target" if by_target else "draft", step.mask, step.positions, scale)
            tokens = put(tokens, step.positions, sample.tokens)
            if by_target:
                verified = step.mask_after
            else:
                maps = {name: put(kept, step.positions, getattr(sample, name)) for name, kept in maps.items()}
                due = (step.index % self.num_draft == 0 and step.index > 0) or step.index == len(plan) - 1
                assert verified is not None
                if due:
                    window = verified & ~step.mask_after
                    positions = positions_where(window, int(window[0].sum()))
                    expected = run("target", verified, positions, scale)
                    tokens = self._verify(step.index, positions, tokens, maps, expected, noise)
                    verified = step.mask_after
            if on_step is not None:
                on_step(step_info(step, tokens, target.space))
        return tokens

    def _verify(
        self, step: int, positions: Tensor, tokens: Tensor, maps: dict[str, Tensor], target: HeadSample, noise: Noise
    ) -> Tensor:
        drafted = take(tokens, positions)
        batch, count, channels = drafted.shape
        draft = HeadSample(drafted.flatten(0, 1), *(take(maps[name], positions).flatten(0, 1) for name in maps))
        target = HeadSample(*(getattr(target, n).flatten(0, 1) for n in ("tokens", "mean", "std", "log_std_sum")))
        ratio = log_ratio(draft.tokens, draft, target, self.inner_temperature).exp()
        accepted = ratio > noise.uniform("speculation/accept", (), (positions, step)).flatten()
        result = draft.tokens
        if not accepted.all():

            def draws(number: int) -> tuple[Tensor, Tensor]:
                at = (positions, step, number)
                proposal = noise.normal("speculation/proposal", (channels,), at).flatten(0, 1)
                return proposal, noise.uniform("speculation/keep", (), at).flatten()

            replaced, _ = resample(draft, target, draws)
            result = torch.where(accepted.unsqueeze(-1), draft.tokens, replaced)
        self.statistics.tested += len(accepted)
        self.statistics.accepted += int(accepted.sum())
        if self.on_verify is not None:
            self.on_verify(Verification(step, positions, draft, target, ratio, accepted, result))
        return put(tokens, positions, result.unflatten(0, (batch, count)))

    def _exact(
        self,
        target: Any,
        condition: Condition,
        tokens: Tensor,
        plan: list[MaskedStep],
        noise: Noise,
        guidance: Guidance,
        temperature: float,
    ) -> Tensor:
        """One sample by the exact rule."""
        chains = [head_chain(model) for model in (self.draft, target)]
        if chains[0].timesteps != chains[1].timesteps:
            raise VargenError("exact speculation needs draft and target with the same sampling steps of the head")
        states = [model.start(condition, 1, guidance.rows) for model in (self.draft, target)]
        channels = tokens.shape[-1]

        def predictor(which: int, step: MaskedStep, known: Tensor) -> Predict:
            model = (self.draft, target)[which]
            z = take(model.hidden(states[which], known, step.mask), step.positions.repeat(guidance.rows, 1))
            like = tokens.new_zeros(1, step.positions.shape[1], channels)
            times = torch.tensor(chains[which].timesteps, device=tokens.device)
            combine = partial(guidance.combine, scale=guidance.at(step.progress))
            return guided_network(model.head.net, z, like, combine if guidance.rows > 1 else None, times)

        def draws(kind: str, step: MaskedStep, attempt: int) -> tuple[Tensor, StepNoise]:
            name = f"speculation/{kind}"
            start = noise.normal(f"{name}_start", (channels,), (step.positions, attempt))
            return start, lambda level: noise.normal(name, (channels,), (step.positions, attempt, level))

        done, attempt = 0, 0
        while done < len(plan):
            drafted, seen = [], tokens
            for step in plan[done : done + self.num_draft]:
                predict = predictor(0, step, seen)
                self.statistics.draft_passes += 1
                start, step_noise = draws("draft", step, attempt)
                states_q = draw_trajectory(chains[0], predict, start, step_noise, temperature)
                log_q, token = score_trajectory(chains[0], predict, states_q, temperature)
                seen = put(seen, step.positions, token)
                drafted.append((step, predict, states_q, log_q))
            for step, predict_q, states_q, log_q in drafted:
                predict_p = predictor(1, step, tokens)
                self.statistics.target_passes += 1
                uniform = noise.uniform("speculation/accept", (), (step.positions, attempt), dtype=torch.float64)
                residual = partial(draws, "residual", step)
                keep = partial(_uniform, noise, step.positions)
                result, accepted = exact_tokens(
                    chains[1], predict_q, predict_p, states_q, log_q, uniform, residual, keep, temperature
                )
                tokens = put(tokens, step.positions, result)
                done += 1
                self.statistics.tested += accepted.numel()
                self.statistics.accepted += int(accepted.sum())
                if not accepted.all():
                    break
            attempt += 1
        return tokens


def exact_tokens(
    chain: Diffusion,
    draft: Predict,
    target: Predict,
    states: list[Tensor],
    log_q: Tensor,
    uniform: Tensor,
    residual: Callable[[int], tuple[Tensor, StepNoise]],
    keep: Callable[[int], Tensor],
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Tokens distributed as the target's, from trajectories that the draft drew.

    A trajectory is accepted with probability min(1, p / q) and then ends where the target takes it; a rejected one is replaced by
    a trajectory of the normalised positive part of p - q, found by drawing from p and keeping with probability max(0, 1 - q / p).

    Args:
        draft, target: networks ``(x, timestep) -> output`` in their contexts.
        states, log_q: the draft's trajectories ``(..., C)`` and their log densities ``(...)``.
        uniform: ``(...)``, float64; residual: attempt to start and step noise; keep: attempt to uniforms ``(...)``.

    Returns:
        tokens ``(..., C)`` and bool ``(...)``, which were accepted.
    """
    log_p, tokens = score_trajectory(chain, target, states, temperature)
    accepted = uniform.log() < log_p - log_q
    open_, attempt = ~accepted, 0
    while open_.any():
        start, noise = residual(attempt)
        candidate = draw_trajectory(chain, target, start, noise, temperature)
        log_p, token = score_trajectory(chain, target, candidate, temperature)
        log_q, _ = score_trajectory(chain, draft, candidate, temperature)
        taken = open_ & (keep(attempt) < -torch.expm1(log_q - log_p))
        tokens, open_ = torch.where(taken.unsqueeze(-1), token, tokens), open_ & ~taken
        attempt += 1
    return tokens, accepted


def head_chain(model: Any) -> Diffusion:
    """Sampling chain of a model's diffusion head; raises VargenError for other heads."""
    head = getattr(model, "head", None)
    if getattr(head, "sampler", None) != "ddpm":
        raise VargenError(f"exact speculation needs a diffusion head with ancestral sampling; {type(model).__name__} has none")
    return head.sampling_chain  # type: ignore[union-attr]


def _uniform(noise: Noise, positions: Tensor, attempt: int) -> Tensor:
    return noise.uniform("speculation/keep", (), (positions, attempt), dtype=torch.float64)


def _one(step: MaskedStep, row: int) -> MaskedStep:
    rows = slice(row, row + 1)
    return MaskedStep(
        step.index, step.total, step.mask[rows], step.mask_after[rows], step.positions[rows], step.masked, step.masked_after
    )
