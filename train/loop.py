"""The training loop: accelerate underneath, and every step a function of the recipe, the step's number and the weights.

Batches, model noise and dropout are addressed by (seed, step), so a checkpoint needs no random state, and a run that was
interrupted anywhere continues bit for bit.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from vargen.checkpoint import atomic_directory
from vargen.errors import CheckpointError, ConfigError, VargenError
from vargen.noise import Noise
from vargen.train.adversary import Adversary
from vargen.train.compiling import compile_network
from vargen.train.ema import EMA
from vargen.train.log import Meter, RunLog, read_metrics
from vargen.train.optim import base_learning_rate, build_optimizer, learning_rate, set_learning_rate
from vargen.train.state import Checkpoints, read_tree, write_model, write_tree
from vargen.train.stop import StopRequest
from vargen.train.task import Facts, Task, micro_batches, to_device

logger = logging.getLogger(__name__)

TRAINING: dict[str, Any] = {
    "batch_size": 64,  # samples of one optimizer step, over all processes and micro-batches
    "gradient_accumulation_steps": 1,
    "max_train_steps": None,  # or
    "num_train_epochs": None,
    "mixed_precision": "no",
    "max_grad_norm": 1.0,
    "max_grad_value": None,  # clips every element of the gradient, before its norm
    "use_ema": True,
    "ema_decay": 0.9999,
    "ema_warmup": True,
    "compile": "auto",
    "log_steps": 50,
    "checkpointing_steps": 1000,
    "checkpoints_total_limit": 2,
    "preview_steps": 1000,
    "validation_steps": 1000,
    "num_workers": 0,
    "report_to": "none",
    "device": None,
}
FINAL = "final"
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Trainer:
    """Trains a task as a recipe says.

    Args:
        task: what is trained.
        config: recipe with the blocks ``seed``, ``optimizer``, ``lr_scheduler``, ``training`` (and ``discriminator_optimizer``
            where the task has an adversary).
        output_dir: run directory: checkpoints, pictures, metrics, and the finished model under ``final``.

    Raises:
        ConfigError: sizes that do not divide, or unknown values.
    """

    def __init__(self, task: Task, config: DictConfig, output_dir: str | os.PathLike[str]) -> None:
        self.task, self.config, self.output_dir = task, config, Path(output_dir)
        training = config.training
        # a process may train twice, with another precision the second time
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            cpu=training.device == "cpu",
            mixed_precision=training.mixed_precision,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        self.device, world = self.accelerator.device, self.accelerator.num_processes
        self.parts, self.batch_size = int(training.gradient_accumulation_steps), int(training.batch_size)
        if self.batch_size < 1 or self.parts < 1 or self.batch_size % (world * self.parts):
            raise ConfigError(
                f"batch_size {self.batch_size} is the whole of a step: expected a multiple of "
                f"{world} processes x gradient_accumulation_steps {self.parts}"
            )
        self.local_size = self.batch_size // world
        self.total_steps = self._steps("max_train_steps", training.max_train_steps, training.num_train_epochs)
        warmup = self._steps("warmup_steps", config.lr_scheduler.warmup_steps, config.lr_scheduler.warmup_epochs)
        hold = self._steps("hold_steps", config.lr_scheduler.hold_steps, config.lr_scheduler.hold_epochs)
        self.checkpoints = Checkpoints(self.output_dir, training.checkpoints_total_limit)
        self.final = self.output_dir / FINAL

        task.total_steps = self.total_steps
        task.setup(self.device)
        base = base_learning_rate(config.optimizer, self.batch_size)
        self.rate = learning_rate(config.lr_scheduler, base, self.total_steps, warmup, hold)
        self.compiled = compile_network(task.network, training.compile, self.device)
        optimizer = build_optimizer(task.network, config.optimizer, self.batch_size)
        self.network, self.optimizer = self.accelerator.prepare(task.network, optimizer)
        self.ema = EMA(self.network.parameters(), training.ema_decay, training.ema_warmup) if training.use_ema else None
        self.adversary = self._adversary(base)
        self.step = 0

    def _steps(self, what: str, steps: int | None, epochs: float | None) -> int:
        """A number of steps given as such or in epochs."""
        if epochs is not None:
            return math.ceil(float(epochs) * len(self.task.dataset) / self.batch_size)
        if steps is None or int(steps) < 0:
            raise ConfigError(f"{what} {steps}: expected a number of steps, or of epochs")
        return int(steps)

    def _adversary(self, base: float) -> Adversary | None:
        if self.task.adversary is None:
            return None
        self.task.adversary.to(self.device)
        own = {k: v for k, v in self.config.discriminator_optimizer.items() if v is not None}
        if "learning_rate" in own or "blr" in own:
            own = {"learning_rate": None, "blr": None, **own}
        settings = {**self.config.optimizer, **own}
        optimizer = build_optimizer(self.task.adversary, settings, self.batch_size)
        self.adversary_ratio = base_learning_rate(settings, self.batch_size) / base
        return Adversary(self.task.adversary, optimizer, self.config.training.max_grad_norm, self.accelerator)

    def fit(self, resume: str | None = None) -> bool:
        """Trains to the last step and exports the model.

        Args:
            resume: ``latest``, ``auto`` (latest if there is one), or a checkpoint's path or name; None for a new run.

        Returns:
            False if the run was stopped by a signal, after saving a checkpoint.

        Raises:
            VargenError: the loss is not finite, or the directory holds a run and nothing was said about resuming.
        """
        training, rank, world = self.config.training, self.accelerator.process_index, self.accelerator.num_processes
        self._start(resume)
        log = RunLog(self.output_dir, self.step, self.total_steps, self.accelerator.is_main_process, training.report_to)
        batches = self.task.batches(self.config.seed, self.step, self.local_size, rank, world, training.num_workers)
        noise = Noise(self.config.seed, torch.arange(rank * self.local_size, (rank + 1) * self.local_size), self.device)
        meter, scores = Meter(self.device), dict[str, float]()
        self.network.train()
        try:
            with StopRequest() as stop:
                while self.step < self.total_steps:
                    self.step += 1
                    self._train_step(to_device(next(batches), self.device), noise.at(self.step), meter)
                    log.advance()
                    stopping = self._agree(stop.requested)
                    last = self.step == self.total_steps
                    # elsewhere looking at a value makes the host wait for the device, so it is done only where one looks anyway
                    if self.device.type == "cpu" or stopping or last or self._due("log_steps") or self._due("checkpointing_steps"):
                        self._require_finite(meter)
                    if last or self._due("log_steps"):
                        values = {**meter.mean(self.accelerator), "lr": self.rate(self.step)}
                        log.values(self.step, values, self.batch_size)
                    if last or self._due("preview_steps"):
                        log.picture(self.step, self._panels())
                    if last or self._due("validation_steps"):
                        scores = self._validate()
                        log.extra(self.step, scores)
                    if stopping or last or self._due("checkpointing_steps"):
                        self.save()
                    if stopping and not last:
                        log.say(f"stopped at step {self.step}; continue with --resume {self.checkpoints.path(self.step)}")
                        return False
        finally:
            log.close()
        self.export(self.final, scores)
        return True

    def _train_step(self, batch: dict[str, Any], noise: Noise, meter: Meter) -> None:
        torch.manual_seed(_step_seed(self.config.seed, self.step, self.accelerator.process_index))
        rate, adversary = self.rate(self.step), self.adversary
        rows = torch.arange(self.local_size, device=self.device).chunk(self.parts)
        for part, (piece, chosen) in enumerate(zip(micro_batches(batch, self.parts), rows), start=1):
            with nullcontext() if part == self.parts else self.accelerator.no_sync(self.network):
                with self.accelerator.autocast():
                    losses = self.task.losses(self.network, piece, noise.select(chosen), self.step)
                self.accelerator.backward(losses["loss"] / self.parts)
            meter.add(losses, self.step)
            if adversary is not None:
                with self.accelerator.autocast():
                    against = self.task.adversary_losses(self.step)
                if against is not None:
                    adversary.backward(against["loss"] / self.parts)
                    meter.add({f"discriminator/{name}": value for name, value in against.items()}, self.step)
        norm = self._clip()
        # with loss scaling, infinite gradients are found and skipped by the scaler
        meter.add({"grad_norm": norm}, self.step, required=self.accelerator.scaler is None)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if adversary is not None:
            adversary.step(rate * self.adversary_ratio)
        if self.ema is not None:
            self.ema.update()

    def _clip(self) -> Tensor:
        """Clips the gradient, element by element if so wished, then its norm, and returns what that was."""
        limit, largest = self.config.training.max_grad_norm, self.config.training.max_grad_value
        self.accelerator.unscale_gradients(self.optimizer)
        if largest is not None:
            nn.utils.clip_grad_value_(self.network.parameters(), float(largest))
        limit = math.inf if limit is None else float(limit)
        if hasattr(self.network, "clip_grad_norm_"):
            return self.network.clip_grad_norm_(limit)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _due(self, key: str) -> bool:
        every = self.config.training[key]
        return bool(every) and self.step % int(every) == 0

    def _agree(self, requested: bool) -> bool:
        """Whether any process was asked to stop; processes look at each other every ten steps, as that makes them wait."""
        if self.accelerator.num_processes == 1:
            return requested
        if self.step % 10:
            return False
        return bool(self.accelerator.reduce(torch.tensor(float(requested), device=self.device)) > 0)

    def _require_finite(self, meter: Meter) -> None:
        step = meter.first_bad(self.accelerator)
        if step:
            good = self.checkpoints.latest()
            advice = f"the last good checkpoint is '{good}'" if good else "there is no checkpoint before it"
            raise VargenError(
                f"loss or gradient is not finite at step {step}; {advice}; lower the learning rate or max_grad_norm, "
                f"or use bf16 instead of fp16"
            )

    @contextmanager
    def _evaluating(self, averaged: bool) -> Iterator[None]:
        """Evaluation mode, with averaged weights or raw ones."""
        self.network.eval()
        try:
            with torch.no_grad(), self.ema.swapped() if averaged and self.ema else nullcontext():
                yield
        finally:
            self.network.train()

    def _panels(self) -> list[Tensor]:
        """Images for one picture: references if there are any, those of the raw weights, those of the averaged ones."""
        panels = [self.task.reference()]
        for averaged in (False, True) if self.ema else (False,):
            with self._evaluating(averaged):
                panels.append(self.task.preview())
        return [panel for panel in panels if panel is not None]

    def _validate(self) -> dict[str, float]:
        with self._evaluating(averaged=True):
            return {f"validation/{name}": value for name, value in self.task.validate().items()}

    def _start(self, resume: str | None) -> None:
        """Cleans the run directory and loads the checkpoint to continue from, if any."""
        if self.accelerator.is_main_process:
            self.checkpoints.clean()
        self.accelerator.wait_for_everyone()
        if resume is None and self.checkpoints.steps():
            raise VargenError(f"'{self.output_dir}' already holds a run: add --resume latest to continue it, or choose another")
        if resume is None or (resume == "auto" and not self.checkpoints.steps()):
            return
        path = self.checkpoints.resolve("latest" if resume == "auto" else resume)
        self.load(path)
        if self.accelerator.is_main_process:
            forgotten = self.checkpoints.forget_after(self.step)
            if forgotten:
                logger.warning("continuing from step %d: removed the later checkpoints %s", self.step, forgotten)
            self._compare_recipe(path)
        self.accelerator.wait_for_everyone()

    def _compare_recipe(self, path: Path) -> None:
        before, now = (_flat(OmegaConf.to_container(c)) for c in (OmegaConf.load(path / "recipe.yaml"), self.config))
        changed = [f"{k}={now.get(k)} (was {before.get(k)})" for k in {**before, **now} if before.get(k) != now.get(k)]
        if changed:
            logger.warning("resuming with a changed recipe: %s", ", ".join(changed))

    def save(self) -> None:
        """Writes the checkpoint of the current step; all processes must call it."""
        raw = get_model_state_dict(self.network, options=_FULL)
        averaged: dict[str, Tensor] = {}
        if self.ema is not None:
            with self.ema.swapped():
                averaged = {k: v.clone() for k, v in get_model_state_dict(self.network, options=_FULL).items()}
        optimizer = get_optimizer_state_dict(self.network, _inner(self.optimizer), options=_FULL)
        scaler = self.accelerator.scaler
        tree = {
            "step": self.step,
            "optimizer": optimizer,
            "ema_updates": self.ema.updates if self.ema else 0,
            "scaler": scaler.state_dict() if scaler else {},
            "adversary": self.adversary.state() if self.adversary else {},
        }

        def write(folder: Path) -> None:
            for name, model in self.task.models().items():
                write_model(folder / name, model, _part(raw, name))
                if averaged:
                    write_model(folder / "ema" / name, model, _part(averaged, name))
            write_tree(folder / "training.safetensors", tree)
            OmegaConf.save(self.config, folder / "recipe.yaml")

        if self.accelerator.is_main_process:
            self.checkpoints.save(self.step, write)
        self.accelerator.wait_for_everyone()

    def load(self, path: Path) -> None:
        """Continues from a checkpoint directory.

        Raises:
            CheckpointError: unreadable, or of another model.
        """
        tree = read_tree(path / "training.safetensors")
        self._load_weights(path)
        if self.ema is not None:
            with self.ema.swapped():
                self._load_weights(path / "ema" if (path / "ema").is_dir() else path)
            self.ema.updates = tree["ema_updates"]
        set_optimizer_state_dict(
            self.network, _inner(self.optimizer), tree["optimizer"], options=StateDictOptions(full_state_dict=True)
        )
        if self.accelerator.scaler is not None and tree["scaler"]:
            self.accelerator.scaler.load_state_dict(tree["scaler"])
        if self.adversary is not None and tree["adversary"]:
            self.adversary.load(tree["adversary"])
        self.step = tree["step"]

    def _load_weights(self, folder: Path) -> None:
        state = {}
        for name in self.task.models():
            weights = load_file(folder / name / "diffusion_pytorch_model.safetensors")
            state.update({f"{name}.{key}": value for key, value in weights.items()})
        try:
            set_model_state_dict(self.network, state, options=StateDictOptions(full_state_dict=True, strict=True))
        except RuntimeError as error:
            raise CheckpointError(f"'{folder}' does not fit the recipe's model: {' '.join(str(error).split())[:300]}") from error

    def export(self, folder: Path, scores: dict[str, float]) -> None:
        """Writes the finished model, with averaged weights where there are any; all processes must call it."""
        facts = Facts(self.step, self.step * self.batch_size, scores, read_metrics(self.output_dir), OmegaConf.to_yaml(self.config))
        with self._evaluating(averaged=True):
            state = get_model_state_dict(self.network, options=_FULL)
            if self.accelerator.is_main_process:
                with atomic_directory(folder) as temporary:
                    self.task.export(temporary, state, facts)
        self.accelerator.wait_for_everyone()


def _step_seed(seed: int, step: int, rank: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {key: value for name, child in tree.items() for key, value in _flat(child, f"{prefix}{name}.").items()}
