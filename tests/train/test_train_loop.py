"""The loop: resuming is exact, accumulation changes nothing, bad losses and signals stop it with something to go on from."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.configuration_utils import register_to_config
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

from vargen.data.base import VisualDataset
from vargen.errors import CheckpointError, ConfigError, VargenError
from vargen.model import VargenModel
from vargen.train.loop import FINAL, TRAINING, Trainer
from vargen.train.optim import LR_SCHEDULER, OPTIMIZER
from vargen.train.state import read_tree, write_model
from vargen.train.task import Task


class _Net(VargenModel):
    """A perceptron with dropout and a buffer that training changes."""

    @register_to_config
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, width), nn.Dropout(0.3), nn.GELU(), nn.Linear(width, 12))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
        return self.layers(x)


class _Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.judge = nn.Linear(12, 1)
        self.features = nn.Linear(12, 4).requires_grad_(False)


class Random(VisualDataset):
    classes = ["one"]
    sample_shape = (2, 2)

    def __len__(self) -> int:
        return 10

    @property
    def labels(self) -> Tensor:
        return torch.zeros(10, dtype=torch.int64)

    def get(self, index: int, epoch: int = 0) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"pixels": torch.rand(3, 2, 2, generator=generator), "class_label": 0}


class Denoise(Task):
    """Removes noise from pixels; a critic joins in from step 3 on. ``bad_step``: of a NaN loss; ``kill_step``: of a SIGTERM."""

    def __init__(self, critic: bool = False, bad_step: int = 0, kill_step: int = 0) -> None:
        torch.manual_seed(0)
        self.network = nn.ModuleDict({"net": _Net()})
        self.network.forward = lambda x: self.network["net"](x)  # type: ignore[method-assign]
        self.adversary = _Critic() if critic else None
        self.dataset = Random()
        self.bad_step, self.kill_step = bad_step, kill_step

    def models(self) -> dict[str, VargenModel]:
        return {"net": self.network["net"]}

    def losses(self, network, batch, noise, step):
        clean = batch["pixels"].flatten(1)
        self.output = network(clean + noise.normal("noise", (12,)))
        loss = (self.output - clean).square().mean()
        if self.adversary is not None and step > 2:
            loss = loss - 0.1 * (self.output @ self.adversary.judge.weight.detach().T).mean()
        if step == self.bad_step:
            loss = loss * float("nan")
        if step == self.kill_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": loss, "error": loss.detach()}

    def adversary_losses(self, step):
        return {"loss": self.adversary.judge(self.output.detach()).square().mean()} if step > 2 else None

    def validate(self):
        return {"error": 1.0}

    def preview(self):
        return self.network["net"](torch.zeros(5, 12)).reshape(5, 3, 2, 2)

    def export(self, folder, state, facts):
        write_model(folder, self.network["net"], {k.removeprefix("net."): v for k, v in state.items()})
        (folder / "facts.json").write_text(json.dumps(asdict(facts)))


def recipe(**training: Any):
    settings = {"batch_size": 4, "max_train_steps": 6, "log_steps": 2, "checkpointing_steps": 2, "preview_steps": 0}
    return OmegaConf.create(
        {
            "seed": 1,
            "optimizer": {**OPTIMIZER, "learning_rate": 1e-2, "weight_decay": 0.1},
            "discriminator_optimizer": {**dict.fromkeys(OPTIMIZER), "learning_rate": 3e-3, "betas": [0.5, 0.9]},
            "lr_scheduler": {**LR_SCHEDULER, "name": "cosine", "warmup_steps": 2},
            "training": {**TRAINING, **settings, "ema_decay": 0.9, "device": "cpu", "checkpoints_total_limit": None, **training},
        }
    )


def same_files(a: Path, b: Path) -> bool:
    one, two = load_file(a), load_file(b)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("critic", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_interrupted_equals_uninterrupted_bit_for_bit(tmp_path, critic, parts):
    config = recipe(gradient_accumulation_steps=parts)
    assert Trainer(Denoise(critic), config, tmp_path / "whole").fit()
    # stopped by a signal between two scheduled checkpoints, before the critic's first step, and resumed twice
    assert not Trainer(Denoise(critic, kill_step=1), config, tmp_path / "parts").fit()
    assert not Trainer(Denoise(critic, kill_step=5), config, tmp_path / "parts").fit(resume="latest")
    assert Trainer(Denoise(critic), config, tmp_path / "parts").fit(resume="auto")
    assert (tmp_path / "parts" / "checkpoint-00000005").is_dir()
    for name in ("training.safetensors", "net/diffusion_pytorch_model.safetensors", "ema/net/diffusion_pytorch_model.safetensors"):
        assert same_files(*(tmp_path / run / "checkpoint-00000006" / name for run in ("whole", "parts"))), name
    assert same_files(*(tmp_path / run / FINAL / "diffusion_pytorch_model.safetensors" for run in ("whole", "parts")))
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]


def test_an_earlier_checkpoint_gives_the_same_end(tmp_path):
    config = recipe()
    Trainer(Denoise(True), config, tmp_path / "run").fit()
    end = tmp_path / "run" / "checkpoint-00000006" / "training.safetensors"
    before = {k: v.clone() for k, v in load_file(end).items()}
    Trainer(Denoise(True), config, tmp_path / "run").fit(resume="checkpoint-00000002")
    after = load_file(end)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_accumulation_changes_only_rounding(tmp_path):
    ends = []
    for parts in (1, 2, 4):
        task = Denoise()
        task.network["net"].layers[1].p = 0.0
        Trainer(task, recipe(gradient_accumulation_steps=parts), tmp_path / str(parts)).fit()
        ends.append(torch.cat([p.flatten() for p in task.network.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-4, atol=1e-5)


def test_state_of_the_critic(tmp_path):
    config = recipe(max_train_steps=2)
    Trainer(Denoise(True), config, tmp_path / "a").fit()
    state = read_tree(tmp_path / "a" / "checkpoint-00000002" / "training.safetensors")["adversary"]
    assert state["optimizer"] == {}
    assert set(state["module"]) == {"judge.weight", "judge.bias"}
    Trainer(Denoise(True), recipe(max_train_steps=4), tmp_path / "b").fit()
    state = read_tree(tmp_path / "b" / "checkpoint-00000004" / "training.safetensors")["adversary"]
    assert float(state["optimizer"]["state"]["judge.weight"]["step"]) == 2
    assert state["optimizer"]["param_groups"][0]["betas"] == [0.5, 0.9]


def test_a_loss_that_is_not_finite_names_step_and_last_good_checkpoint(tmp_path):
    with pytest.raises(VargenError, match=r"step 5; .*checkpoint-00000004"):
        Trainer(Denoise(bad_step=5), recipe(), tmp_path / "run").fit()
    with pytest.raises(VargenError, match=r"step 1; there is no checkpoint"):
        Trainer(Denoise(bad_step=1), recipe(), tmp_path / "other").fit()


def test_a_run_is_not_overwritten_and_must_fit(tmp_path):
    Trainer(Denoise(), recipe(max_train_steps=2), tmp_path).fit()
    with pytest.raises(VargenError, match="already holds a run"):
        Trainer(Denoise(), recipe(), tmp_path).fit()
    wider = Denoise()
    wider.network["net"] = _Net(width=9)
    with pytest.raises(CheckpointError, match="does not fit"):
        Trainer(wider, recipe(), tmp_path).fit(resume="latest")


def test_pictures_show_raw_and_averaged_weights(tmp_path):
    from PIL import Image

    Trainer(Denoise(), recipe(max_train_steps=2, preview_steps=1), tmp_path).fit()
    # two panels of 3x2 cells of 2 pixels with gaps of 2, and 8 between the panels
    assert Image.open(tmp_path / "pictures" / "00000001.png").size == (2 * 3 * 4 + 8, 2 * 4)


def test_tensorboard_gets_scalars(tmp_path):
    Trainer(Denoise(), recipe(max_train_steps=2, report_to="tensorboard"), tmp_path).fit()
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 5, "gradient_accumulation_steps": 2}, {"max_train_steps": None}, {"compile": "maybe"}, {"report_to": "x"}],
)
def test_settings_that_cannot_be_met(tmp_path, change):
    with pytest.raises(ConfigError):
        Trainer(Denoise(), recipe(**change), tmp_path).fit()


def test_epochs(tmp_path):
    trainer = Trainer(Denoise(), recipe(max_train_steps=None, num_train_epochs=3), tmp_path)
    assert trainer.total_steps == 8


def _train_without_dropout(directory: Path, **training: Any) -> None:
    task = Denoise(critic=True)
    task.network["net"].layers[1].p = 0.0
    Trainer(task, recipe(**training), directory).fit()


def _worker(rank: int, port: int, directory: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    AcceleratorState._reset_state(reset_partial_state=True)
    _train_without_dropout(directory, gradient_accumulation_steps=2)
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    """The same global batches and the same mean gradient: only rounding differs. Dropout is off, since processes draw their own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # forked rather than launched by torchrun, whose processes would each spend seconds on importing torch
    workers = [multiprocessing.get_context("fork").Process(target=_worker, args=(r, port, tmp_path / "two")) for r in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    _train_without_dropout(tmp_path / "one")
    for file in ("checkpoint-00000006/training.safetensors", f"{FINAL}/diffusion_pytorch_model.safetensors"):
        one, two = load_file(tmp_path / "one" / file), load_file(tmp_path / "two" / file)
        assert one.keys() == two.keys()
        for name in set(one) - {"seen"}:
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
