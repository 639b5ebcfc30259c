"""Fast decoding of a sampling job: what the user chose, checked against the model, built, and described for the job's record."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vargen.backbones.causal import CausalGenerator
from vargen.backbones.mar import MAR
from vargen.decoding.acceptance import Acceptance, Relaxation
from vargen.decoding.continuous import ContinuousSpeculation
from vargen.decoding.continuous import Statistics as DraftCounts
from vargen.decoding.eagle import DynamicTree, Eagle, FixedTree
from vargen.decoding.engine import Engine
from vargen.decoding.jacobi import Jacobi
from vargen.decoding.neighbors import neighbor_table
from vargen.decoding.quantize import int8_weights
from vargen.decoding.speculative import Speculation, Statistics, require_next_token
from vargen.decoding.tree import StaticTree
from vargen.errors import ConfigError, VargenError
from vargen.pipeline import VisualARPipeline
from vargen.sample.load import fingerprint, load_drafter, load_pipeline
from vargen.train.compiling import compiler_failure, repeated_blocks


@dataclass(frozen=True)
class DecodingChoice:
    """How a job decodes; by default as the model does without options. Fields are the options of ``vargen sample``.

    Attributes:
        compile: blocks through torch.compile: by the engine in causal models, in place in others.
        cuda_graphs: passes of causal models as CUDA graphs.
        int8: weights of causal models as 8-bit integers; implies ``compile``, without which it is slower.
        drafter: directory or hub id of an :class:`vargen.EagleDrafter` of the model.
        tree: name of the static tree that it drafts, by default a dynamic one.
        jacobi: speculative Jacobi decoding, without a drafter.
        lantern_k, lantern_delta, lantern_ratio: with a drafter or ``jacobi``, relaxed acceptance over the k nearest codes up to one
            of the bounds, see :class:`vargen.decoding.acceptance.Relaxation`; without them acceptance is lossless.
        draft: bundled name, directory or hub id of a smaller MAR that drafts for a MAR, by the published rule or, with ``exact``,
            by the exact one, see :class:`vargen.decoding.continuous.ContinuousSpeculation`.

    Raises:
        ConfigError: parts that do not go together, or an unknown tree.
    """

    compile: bool = False
    cuda_graphs: bool = False
    int8: bool = False
    drafter: str | None = None
    tree: str | None = None
    jacobi: bool = False
    lantern_k: int | None = None
    lantern_delta: float | None = None
    lantern_ratio: float | None = None
    draft: str | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if self.int8:
            object.__setattr__(self, "compile", True)
        chosen = self.chosen
        ways = [_flag(name) for name in ("int8", "compile", "cuda_graphs", "drafter", "jacobi", "draft") if name in chosen]
        speculative = [way for way in ways if way in ("--drafter", "--jacobi", "--draft")]
        if speculative and len(ways) > 1:
            other = next(way for way in ways if way != speculative[0])
            raise ConfigError(f"{other} with {speculative[0]}: these do not go together, leave one of them out")
        for name, bases in (
            ("tree", ("drafter",)),
            *((f"lantern_{part}", ("drafter", "jacobi")) for part in ("k", "delta", "ratio")),
            ("exact", ("draft",)),
        ):
            if name in chosen and not any(base in chosen for base in bases):
                raise ConfigError(f"{_flag(name)} goes with {' or '.join(map(_flag, bases))}, which is not given")
        self._check_bound()
        if self.tree is not None:
            StaticTree.of(self.tree)

    def _check_bound(self) -> None:
        k, delta, ratio = self.lantern_k, self.lantern_delta, self.lantern_ratio
        if delta is not None and ratio is not None:
            raise ConfigError("--lantern-delta with --lantern-ratio: expected one bound")
        if k is not None and delta is None and ratio is None:
            raise ConfigError(f"--lantern-k {k} needs a bound: give --lantern-delta (LANTERN) or --lantern-ratio (LANTERN++)")
        if k is None and (delta is not None or ratio is not None):
            raise ConfigError("relaxed acceptance needs the number of neighbours: give --lantern-k")
        if delta is not None and not 0 <= delta <= 1:
            raise ConfigError(f"--lantern-delta {delta}: expected 0..1; LANTERN++'s bound of 1 and more is --lantern-ratio")
        if ratio is not None and not 1 <= ratio < float("inf"):
            raise ConfigError(f"--lantern-ratio {ratio}: expected a number of at least 1")

    @property
    def chosen(self) -> dict[str, Any]:
        """The fields that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False}

    @property
    def name(self) -> str:
        """For the names of folders, such as ``drafter_final+tree_chain_5+lantern_k_10+lantern_ratio_5.0``; empty for nothing."""
        values = {name: Path(value).name if name in ("drafter", "draft") else value for name, value in self.chosen.items()}
        return "+".join(name if value is True else f"{name}_{value}" for name, value in values.items())


class Decoder:
    """A choice built for one pipeline.

    Args:
        dtype: of the pipeline and what is loaded beside it, see :func:`vargen.sample.load.load_pipeline`.

    Attributes:
        record: plain data that names the choice and the weights that it brings, for the job; None for plain decoding.
        one_by_one: samples are decoded one after the other, so that batches are not faster and padding costs as much as images.

    Raises:
        VargenError: a choice that this model, device or installation does not allow, or a drafter or draft model that cannot be
            loaded or is of other tokens.
    """

    def __init__(self, choice: DecodingChoice, pipe: VisualARPipeline, dtype: str = "float32") -> None:
        self.choice, self.pipe = choice, pipe
        self.record: dict[str, Any] | None = choice.chosen or None
        self.one_by_one = choice.drafter is not None or choice.jacobi or choice.exact
        self._driver: Any = None
        self._calls, self._speculated, self._drafted = 0, Statistics(), DraftCounts()
        if choice.drafter is not None or choice.jacobi:
            self._driver = self._speculation(dtype)
        elif choice.draft is not None:
            self._driver = self._continuous(choice.draft, dtype)
        elif choice.chosen:
            self._driver = self._engine()

    def _engine(self) -> Engine | None:
        choice, model = self.choice, self.pipe.model
        for flag, given in (("--cuda-graphs", choice.cuda_graphs), ("--int8", choice.int8)):
            if given:
                self._causal_model(flag)
        if choice.cuda_graphs and self.pipe.device.type != "cuda":
            raise VargenError(f"--cuda-graphs needs a CUDA device, the model is on '{self.pipe.device}': leave it out")
        if choice.compile:
            reason = compiler_failure(self.pipe.device)
            if reason:
                raise VargenError(f"torch.compile does not work here, leave --compile and --int8 out: {reason}")
        if isinstance(model, CausalGenerator):
            return Engine(compile=choice.compile, graphs=choice.cuda_graphs)
        if not repeated_blocks(model):
            raise VargenError(f"--compile is for models of repeated blocks; {_class(model)} has none")
        return None

    def _speculation(self, dtype: str) -> Speculation:
        choice = self.choice
        require_next_token(self._causal_model("--jacobi" if choice.jacobi else "--drafter"))  # type: ignore[arg-type]
        proposer: Any = Jacobi()
        if choice.drafter is not None:
            drafter = load_drafter(choice.drafter, str(self.pipe.device), dtype)
            self._record_weights(drafter)
            tree = DynamicTree() if choice.tree is None else FixedTree(StaticTree.of(choice.tree))
            proposer = Eagle(drafter, tree)
        return Speculation(proposer, Acceptance(self._relaxation()))

    def _relaxation(self) -> Relaxation | None:
        k, codes = self.choice.lantern_k, self.pipe.model.space.codebook_size or 0
        if k is None:
            return None
        if not 1 <= k < codes:
            raise VargenError(f"--lantern-k {k}: expected 1..{codes - 1}, the tokenizer has {codes} codes")
        table = neighbor_table(self.pipe.visual_tokenizer, k + 1)
        return Relaxation(table, k, self.choice.lantern_delta, self.choice.lantern_ratio)

    def _continuous(self, source: str, dtype: str) -> ContinuousSpeculation:
        model = self.pipe.model
        if not isinstance(model, MAR):
            raise VargenError(f"--draft is for MAR models; {_class(model)} is none")
        draft = load_pipeline(source, str(self.pipe.device), dtype).model
        if not isinstance(draft, MAR):
            raise VargenError(f"--draft '{source}' holds a {_class(draft)}: expected a smaller MAR")
        model.space.require(draft.space, f"the model and its draft '{source}'")
        if (draft.conditioning, draft.num_classes) != (model.conditioning, model.num_classes):
            raise VargenError(
                f"--draft '{source}' is conditioned on {_condition(draft)}, the model on {_condition(model)}: expected the same"
            )
        self._record_weights(draft)
        return ContinuousSpeculation(draft, rule="exact" if self.choice.exact else "reference")

    def _causal_model(self, flag: str) -> CausalGenerator:
        model = self.pipe.model
        if not isinstance(model, CausalGenerator):
            raise VargenError(f"{flag} is for models that draw token after token or group after group; {_class(model)} is none")
        return model

    def _record_weights(self, network: Any) -> None:
        self.record = {**(self.record or {}), "fingerprint": fingerprint({"network": network})}

    def prepare(self) -> None:
        """Changes the pipeline's model where the choice asks for it: int8 weights, blocks compiled in place.

        Not before the job has taken the fingerprint of its weights.
        """
        model = self.pipe.model
        if self.choice.int8:
            int8_weights(model)
        if self.choice.compile and self._driver is None:
            for block in repeated_blocks(model):
                block.compile()

    def arguments(self) -> dict[str, Any]:
        """The pipeline's arguments."""
        return {} if self._driver is None else {"decoding": self._driver}

    def count(self, images: int) -> None:
        """Takes in what speculation counted in the last call, whose first ``images`` samples are no padding."""
        self._calls += 1
        if isinstance(self._driver, Speculation):
            self._speculated.accepted += self._driver.statistics.accepted[:images]
        elif isinstance(self._driver, ContinuousSpeculation):
            last, total = self._driver.statistics, self._drafted
            self._drafted = DraftCounts(**{key: getattr(total, key) + value for key, value in asdict(last).items()})

    @property
    def gain(self) -> str | None:
        """What speculation has gained so far, in a line; None without speculation, or before anything was drawn."""
        drawn, drafted = self._speculated, self._drafted
        if drawn.accepted:
            # each pass gives a token of its own, as every pass of plain decoding does
            passes, images = drawn.target_passes, len(drawn.accepted)
            plain = (passes + sum(map(sum, drawn.accepted))) / images
            return f"{drawn.tokens_per_round:.2f} tokens per target pass: {passes / images:.1f} passes per image, not {plain:.0f}"
        if drafted.target_passes:
            share = f"{drafted.accepted / drafted.tested:.0%}" if drafted.tested else "none"
            return (
                f"{share} of the drafted tokens accepted: {drafted.target_passes / self._calls:.1f} target passes and "
                f"{drafted.draft_passes / self._calls:.1f} draft passes per batch"
            )
        return None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _class(model: Any) -> str:
    return type(model).__name__


def _condition(model: MAR) -> str:
    kinds = ", ".join(model.conditioning) or "nothing"
    return kinds if model.num_classes is None else f"{kinds} ({model.num_classes} classes)"
