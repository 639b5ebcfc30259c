"""xAR: next-entity prediction by flow matching under noisy context (Ren et al. 2025, arXiv 2502.20388)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.condition import Condition
from vargen.config import check_keys
from vargen.decoding.masked import given_tokens
from vargen.errors import ConfigError, VargenError, nearest
from vargen.flow.flow import draw_times, euler, euler_maruyama, stochastic_times, straight_path, uniform_times
from vargen.guidance import Guidance, Progress
from vargen.model import Generator, OnStep, Sampling, StepInfo
from vargen.nn.block import TransformerBlock
from vargen.nn.cache import KVCache
from vargen.nn.embed import ClassEmbedding, TimestepEmbedding
from vargen.nn.init import initialise
from vargen.nn.masking import drop_rows
from vargen.nn.mode import evaluating
from vargen.nn.norm import RMSNorm
from vargen.nn.rope import axial_angles, rotary_table
from vargen.noise import Noise
from vargen.order import Order
from vargen.space import TokenSpace

ENTITIES = ("token", "cell", "subsample", "scale", "image")
SAMPLERS = ("sde", "ode")


def _preset(dim: int, depth: int, heads: int) -> dict[str, Any]:
    return {"dim": dim, "encoder_depth": depth, "decoder_depth": depth, "heads": heads, "num_classes": 1000}


PRESETS: dict[str, dict[str, Any]] = {
    "B": _preset(768, 8, 12),
    "L": _preset(1024, 16, 16),
    "H": _preset(1280, 20, 16),
}


def entity_order(entity: str, grid: Sequence[int], size: Sequence[int], scales: Sequence[Sequence[int]] | None) -> Order:
    """The order whose groups are the entities (figure 1 of the paper).

    Args:
        entity: ``token`` (one cell of the grid), ``cell`` (a block of ``size``), ``subsample`` (all cells with equal coordinates
            modulo ``size``), ``scale`` (grids of growing resolution), ``image`` (everything).
        scales: grids of ``scale``, coarse first, ending in ``grid``; by default halved from it as long as it goes.

    Raises:
        ConfigError: another name, or scales that do not end in the grid.
        VargenError: a size that does not divide the grid.
    """
    if entity == "scale":
        levels = [tuple(level) for level in scales] if scales is not None else [tuple(grid)]
        while scales is None and all(n % 2 == 0 for n in levels[0]):
            levels.insert(0, tuple(n // 2 for n in levels[0]))
        if levels[-1] != tuple(grid):
            raise ConfigError(f"scales {levels}: expected the last one to be the grid {tuple(grid)}")
        return Order.scales(levels)
    orders: dict[str, Callable[[], Order]] = {
        "token": lambda: Order.raster(grid),
        "cell": lambda: Order.cells_of(grid, size),
        "subsample": lambda: Order.subsamples(grid, size),
        "image": lambda: Order.image(grid),
    }
    if entity not in orders:
        raise ConfigError(f"entity '{entity}'{nearest(entity, ENTITIES)}")
    return orders[entity]()


class XAR(Generator):
    """A block-causal transformer over entities whose every evaluation is a flow velocity; data at t = 0, noise at t = 1.

    Sequences run entity by entity. In training every entity has a time of its own, so that context is noisy too; in sampling, clean
    entities (time 0) are context, and their keys and values are cached.

    Args:
        grid: token grid (rows, columns).
        channels: length of a token.
        entity, entity_size, scales: see :func:`entity_order`.
        dim, heads: width and attention heads; encoder_depth, decoder_depth: blocks of the two stacks.
        mlp_hidden: hidden width of the gated feed-forward layers, ``int(8/3 * dim)`` by default.
        num_classes: classes, besides which there is a null class; None for an unconditional model.
        condition_dropout: share of training samples whose class becomes the null one.
        attn_dropout, dropout: in training, on attention weights; after attention and in feed-forward layers.
        sampling_steps: network evaluations per entity; sampler: ``sde`` (Euler-Maruyama, the published one) or ``ode`` (Euler).
    """

    edits = True

    @register_to_config
    def __init__(
        self,
        grid: Sequence[int] = (16, 16),
        channels: int = 16,
        entity: str = "cell",
        entity_size: Sequence[int] = (8, 8),
        scales: Sequence[Sequence[int]] | None = None,
        dim: int = 768,
        encoder_depth: int = 8,
        decoder_depth: int = 8,
        heads: int = 12,
        mlp_hidden: int | None = None,
        num_classes: int | None = None,
        condition_dropout: float = 0.1,
        attn_dropout: float = 0.1,
        dropout: float = 0.1,
        sampling_steps: int = 50,
        sampler: str = "sde",
    ) -> None:
        super().__init__()
        if dim % (4 * heads) or len(grid) != 2:
            raise ConfigError(f"width {dim} over {heads} heads: 2D rotary embedding needs a grid and head widths divisible by 4")
        if sampler not in SAMPLERS:
            raise ConfigError(f"xAR sampler '{sampler}'{nearest(sampler, SAMPLERS)}")
        self.order = entity_order(entity, grid, entity_size, scales)
        # cells and entities in the order of the sequence; bounds[k] is where entity k starts
        self.cells, self.entity = self.order.cells, self.order.step_of[self.order.cells]
        self.bounds = [0, *self.entity.bincount().cumsum(0).tolist()]

        def stack(depth: int) -> nn.ModuleList:
            return nn.ModuleList(
                TransformerBlock(
                    dim,
                    heads,
                    mlp_hidden or int(dim * 8 / 3),
                    norm="rms",
                    norm_affine=False,
                    gated=True,
                    act="gelu",
                    condition_dim=dim,
                    zero_init=False,
                    attn_dropout=attn_dropout,
                    dropout=dropout,
                    mlp_dropout=dropout,
                    mlp_hidden_dropout=dropout,
                )
                for _ in range(depth)
            )

        self.classes = ClassEmbedding(num_classes or 0, dim)
        self.time = TimestepEmbedding(dim)
        self.input = nn.Linear(channels, dim)
        self.encoder_positions = nn.Parameter(torch.randn(1, self.order.num_cells, dim) * 0.02)
        self.input_norm = RMSNorm(dim, 1e-6)
        self.encoder = stack(encoder_depth)
        self.encoder_norm = RMSNorm(dim, 1e-6)
        self.bridge = nn.Linear(dim, dim)
        self.decoder_positions = nn.Parameter(torch.randn(1, self.order.num_cells, dim) * 0.02)
        self.decoder = stack(decoder_depth)
        self.decoder_norm = RMSNorm(dim, 1e-6)
        self.out = nn.Linear(dim, channels)
        self.register_buffer("rotary", self._rotary(dim // heads), persistent=False)
        self.apply(initialise)

    def _rotary(self, head_dim: int) -> Tensor:
        """Rotary rows per cell, at its (row, column) on the finest grid; coarser cells stand at the centre of their area."""
        finest = torch.tensor(self.order.shape, dtype=torch.float64)
        coordinates = []
        for level in self.order.levels:
            rows, columns = torch.meshgrid(*(torch.arange(n) for n in level), indexing="ij")
            place = torch.stack([rows.flatten(), columns.flatten()], dim=1).double() + 0.5
            coordinates.append(place * finest / torch.tensor(level) - 0.5)
        return rotary_table(axial_angles(torch.cat(coordinates), head_dim))

    @property
    def space(self) -> TokenSpace:
        return TokenSpace(self.order.levels, channels=self.config.channels)

    @property
    def conditioning(self) -> tuple[str, ...]:
        return ("class",) if self.config.num_classes is not None else ()

    @property
    def num_classes(self) -> int | None:
        return self.config.num_classes

    @property
    def num_entities(self) -> int:
        return self.order.num_steps

    def condition(self, labels: Tensor | None, drop: Tensor) -> Tensor:
        """Class vectors ``(R, dim)``; where ``drop`` (bool ``(R,)``) is True, and without labels, the null one."""
        return self.classes(torch.full(drop.shape, -1, device=drop.device) if labels is None else labels.masked_fill(drop, -1))

    def velocity(
        self, x: Tensor, t: Tensor, classes: Tensor, first: int = 0, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Velocities of consecutive entities.

        Args:
            x: noisy tokens ``(R, n, C)`` of entities ``first``, ``first + 1``, ... in the order of the sequence.
            t: time of each of these entities ``(R, k)``, rounded down to thousandths for the network.
            classes: ``(R, dim)``.
            mask: bool, which of the cached and given tokens each given one sees; None for all.
            cache: keys and values of earlier entities; those of ``x`` are written behind them, but not yet counted.

        Returns:
            ``(R, n, C)``.
        """
        start = self.bounds[first]
        cells = self.cells[start : start + x.shape[1]].to(x.device)
        own = (self.entity[start : start + x.shape[1]] - first).to(x.device)
        rotary = self.rotary[cells]  # type: ignore[index]
        condition = classes.unsqueeze(1) + self.time((t.float() * 1000).floor())

        def run(h: Tensor, blocks: nn.ModuleList, layer: int) -> Tensor:
            for number, block in enumerate(blocks, start=layer):
                modulation = block.adaln(condition)  # type: ignore[operator]
                if t.shape[1] > 1:
                    modulation = [m[:, own] for m in modulation]
                h = block(h, modulation=modulation, mask=mask, rotary=rotary, cache=cache, layer=number)
            return h

        h = self.input_norm(self.input(x.to(self.dtype)) + self.encoder_positions[:, cells])
        h = self.bridge(self.encoder_norm(run(h, self.encoder, 0)))
        h = run(h + self.decoder_positions[:, cells], self.decoder, len(self.encoder))
        return self.out(self.decoder_norm(h)).float()

    def block_causal(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Mask between places of the sequence: bool ``(q, k)``, True where the key's entity is not later than the query's."""
        return self.entity[queries].unsqueeze(1) >= self.entity[keys]

    def training_losses(self, tokens: Tensor, condition: Condition, noise: Noise | None = None) -> dict[str, Tensor]:
        """Noisy Context Learning: each entity has its own time (logit-normal) and noise, and sees earlier ones as noisy as fed."""
        self.space.check(tokens)
        batch = self.check_condition(condition, len(tokens))
        noise = noise or Noise.fresh(batch, tokens.device)
        data = tokens.reshape(batch, self.order.num_cells, -1)
        draws = noise.normal("noise", data.shape[1:])
        t = draw_times(noise, "time", "logit-normal", (self.num_entities,))
        places, cells = torch.arange(self.order.num_cells), self.cells.to(data.device)
        x, target = straight_path(data[:, cells], draws[:, cells], t[:, self.entity.to(t.device)])
        drop = noise.uniform("condition_dropout") < self.config.condition_dropout
        mask = None if self.num_entities == 1 else self.block_causal(places, places).to(x.device)
        velocity = self.velocity(x, t, self.condition(condition.class_labels, drop), mask=mask)
        return {"loss": (velocity - target).square().mean()}

    def generate(
        self,
        condition: Condition,
        *,
        batch_size: int | None = None,
        noise: Noise | None = None,
        guidance: Guidance | None = None,
        sampling: Sampling | None = None,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Tensor:
        """Tokens ``(B, *space.token_shape)``, entity after entity. The published guidance schedule is ``linear-entity``. Options:

        sampling_steps: network evaluations per entity; sampler: ``sde`` or ``ode``; the model's own by default.
        known, tokens: tokens to keep, which must be the first entities of the order, see
            :func:`vargen.decoding.masked.given_tokens`.

        The temperature scales the noise of the steps of ``sde``, and the initial noise of ``ode``.
        """
        check_keys(options, ("sampling_steps", "sampler", "known", "tokens"), "XAR.generate")
        batch = self.check_condition(condition, batch_size)
        guidance, temperature = guidance or Guidance(), (sampling or Sampling()).temperature
        if guidance.rows > 2:
            raise VargenError("xAR has a condition and a null condition: guidance with a partial condition is not possible")
        steps, sampler = options.get("sampling_steps", self.config.sampling_steps), options.get("sampler", self.config.sampler)
        if sampler not in SAMPLERS:
            raise ConfigError(f"xAR sampler '{sampler}'{nearest(str(sampler), SAMPLERS)}")
        times = stochastic_times(steps) if sampler == "sde" else uniform_times(steps)
        noise = (noise or Noise.fresh(batch)).to(self.device)
        sequence = torch.zeros(batch, self.order.num_cells, self.config.channels, device=self.device)
        known, given = given_tokens(self.space, batch, options.get("known"), options.get("tokens"))
        first = 0
        if known is not None and given is not None:
            first = self._known_entities(known)
            kept = self.cells[: self.bounds[first]].to(self.device)
            sequence[:, : len(kept)] = given.to(self.device).reshape(sequence.shape)[:, kept]
        with evaluating(self):
            draw = _EntityVelocity(self, condition, batch, guidance)
            for k in range(first, self.num_entities):
                start, stop = self.bounds[k : k + 2]
                draw.begin(k, sequence)
                shape = (stop - start, self.config.channels)
                initial = noise.normal("entity_start", shape, at=(k,)).double()
                if sampler == "sde":
                    sample = euler_maruyama(draw, initial, times, _step_noise(noise, shape, k), temperature=temperature)
                else:
                    sample = euler(draw, initial * temperature, times)
                sequence[:, start:stop] = sample.tokens.float()
                if on_step is not None:
                    on_step(self._info(k, first, sequence))
        return self._from_sequence(sequence)

    def _from_sequence(self, sequence: Tensor) -> Tensor:
        return sequence[:, self.cells.argsort().to(sequence.device)].reshape(len(sequence), *self.space.token_shape)

    def _known_entities(self, known: Tensor) -> int:
        """How many first entities the known cells ``(B, cells)`` make up; raises VargenError if they are anything else."""
        entities = self.bounds.index(count) if (count := int(known[0].sum())) in self.bounds else 0
        if len(self.order.levels) > 1 or not entities or not known[:, self.cells[: self.bounds[entities]].to(known.device)].all():
            raise VargenError(
                f"xAR draws entity after entity ({self.config.entity}), so that it can keep only whole ones from the first on: "
                "edit with a masked system such as MAR or Hi-MAR"
            )
        return entities

    def _info(self, entity: int, first: int, sequence: Tensor) -> StepInfo:
        known = (self.order.step_of <= entity).float()
        known = known.reshape(self.space.shape) if len(self.order.levels) == 1 else known
        level = int(self.order.level_of[self.order.groups[entity][0]])
        return StepInfo(entity - first, self.num_entities - first, self._from_sequence(sequence), known, level)


def _step_noise(noise: Noise, shape: tuple[int, ...], entity: int) -> Callable[[int], Tensor]:
    return lambda step: noise.normal("entity_step", shape, at=(entity, step), dtype=torch.float64)


class _EntityVelocity:
    """The guided velocity of the current entity given the clean ones before it, as samplers call it.

    The first evaluation of an entity also runs those before it that the cache lacks (one, unless several were given), now clean at
    time 0, and adds them to it; so the cache never holds noisy tokens and there are no evaluations besides those of the sampler.
    """

    def __init__(self, model: XAR, condition: Condition, batch_size: int, guidance: Guidance) -> None:
        self.model, self.guidance = model, guidance
        rows = guidance.rows * batch_size
        labels = None if condition.class_labels is None else condition.class_labels.to(model.device).repeat(guidance.rows)
        self.classes = model.condition(labels, drop_rows(guidance.rows, batch_size, model.device))
        attn = model.encoder[0].attn
        layers = len(model.encoder) + len(model.decoder)
        self.cached = 0  # entities in the cache
        self.cache = KVCache(layers, rows, attn.heads, model.order.num_cells, attn.head_dim, model.dtype, model.device)

    def begin(self, entity: int, sequence: Tensor) -> None:
        """Turns to an entity; ``sequence`` ``(B, N, C)`` holds the clean ones before it."""
        bounds = self.model.bounds
        progress = Progress(entity, self.model.num_entities, entity=entity, entities=self.model.num_entities)
        self.entity, self.scale = entity, self.guidance.at(progress)
        self.clean = sequence[:, bounds[self.cached] : bounds[entity]]

    def __call__(self, x: Tensor, t: float) -> Tensor:
        model, first = self.model, self.cached
        tokens, mask = x.float(), None
        times = torch.tensor([t], dtype=torch.float32, device=x.device)
        if first < self.entity:
            tokens = torch.cat([self.clean, tokens], dim=1)
            times = torch.cat([times.new_zeros(self.entity - first), times])
            stop = model.bounds[self.entity + 1]
            mask = model.block_causal(torch.arange(model.bounds[first], stop), torch.arange(stop)).to(x.device)
        tokens = tokens.repeat(self.guidance.rows, 1, 1)
        velocity = model.velocity(tokens, times.expand(len(tokens), -1), self.classes, first, mask, self.cache)
        if first < self.entity:
            self.cache.advance(self.clean.shape[1])
            self.cached = self.entity
        return self.guidance.combine(velocity[:, -x.shape[1] :].to(x.dtype), self.scale)
