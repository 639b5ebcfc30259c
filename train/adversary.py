"""The other player of an adversarial objective: its own optimizer, gradient scaler and state."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from vargen.checkpoint import load_strictly
from vargen.train.optim import set_learning_rate


class Adversary:
    """Trains the trainable parameters of ``module``, which every process holds whole, on losses of its own.

    Gradients are averaged over processes here rather than by a wrapper: the same module also serves the generator's loss, in passes
    that give none of its parameters a gradient, which wrappers do not expect.

    Args:
        module: the objective that holds the discriminator.
        optimizer: over the module's trainable parameters.
        max_grad_norm: gradients are clipped to this norm, or not if None.
        accelerator: of the run; decides on loss scaling (fp16).
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float | None, accelerator: Accelerator
    ) -> None:
        self.module, self.optimizer, self.max_grad_norm, self.accelerator = module, optimizer, max_grad_norm, accelerator
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=accelerator.mixed_precision == "fp16")

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, rate: float) -> None:
        """One optimizer step with the learning rate ``rate`` on what :meth:`backward` has gathered; none if that is nothing."""
        if all(p.grad is None for p in self.parameters):
            return
        self.scaler.unscale_(self.optimizer)
        if self.accelerator.num_processes > 1:
            for parameter in self.parameters:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, reduction="mean")
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        set_learning_rate(self.optimizer, rate)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Everything that training changes here; fixed feature networks inside the module are left out."""
        fixed = self._fixed()
        # asking an optimizer that has not stepped for its state would make it count a step
        started = bool(self.optimizer.state)
        options = StateDictOptions(cpu_offload=True)
        return {
            "module": {k: v for k, v in self.module.state_dict().items() if k not in fixed},
            "optimizer": get_optimizer_state_dict(self.module, self.optimizer, options=options) if started else {},
            "scaler": self.scaler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        fixed = self._fixed()
        own = {k: v for k, v in self.module.state_dict().items() if k in fixed}
        load_strictly(self.module, {**own, **state["module"]}, source="state of the adversarial objective")
        if state["optimizer"]:
            set_optimizer_state_dict(self.module, self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def _fixed(self) -> set[str]:
        trained = {id(p) for p in self.parameters}
        return {name for name, p in self.module.named_parameters() if id(p) not in trained}
