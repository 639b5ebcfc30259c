"""LPIPS, the learned perceptual distance of two pictures (Zhang et al. 2018, arXiv 1801.03924, version 0.1)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vargen.checkpoint import State, load_strictly, read_file, rename, unwrap
from vargen.errors import CheckpointError, ConfigError

# torchvision's trunks as sequences of layers: a number is the index of a width for a 3x3 convolution, "pool" a pooling
_VGG = (0, 0, "pool", 1, 1, "pool", 2, 2, 2, "pool", 3, 3, 3, "pool", 4, 4, 4)
WIDTHS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}
# positions in the trunk of the activations that are compared
TAPS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}
TRUNK_FILES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}

# names of the lpips package, of taming-transformers, and of torchvision
_RULES = (
    (r"net\.slice\d\.(\d+)\.(weight|bias)", r"trunk.\1.\2"),
    (r"features\.(\d+)\.(weight|bias)", r"trunk.\1.\2"),
    (r"lins?\.?(\d)\.model\.1\.weight", r"lins.\1.weight"),
)
_IGNORE = (r"scaling_layer\..*", r"classifier\..*")


class PerceptualDistance(nn.Module):
    """A distance of pictures in [-1, 1]: ``forward(x, y)`` of two ``(B, 3, H, W)`` gives ``(B,)``."""


def unit_channels(features: Tensor) -> Tensor:
    """Features ``(B, C, H, W)`` divided by their length along the channels plus 1e-10."""
    # vector_norm has gradient zero, not NaN, where all channels are zero
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


class LPIPS(PerceptualDistance):
    """Weighted squared difference of unit-length features after five activations of a classifier.

    Args:
        trunk: ``"vgg"`` (VGG16) or ``"alex"`` (AlexNet).
        widths: channels of the five stages, torchvision's by default.
        dropout: on the squared differences, in training mode; the published objectives leave it on while the tokenizer trains.

    Its parameters are frozen. Module numbers of ``trunk`` are torchvision's.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, trunk: str = "vgg", widths: Sequence[int] | None = None, dropout: float = 0.5) -> None:
        super().__init__()
        if trunk not in WIDTHS:
            raise ConfigError(f"LPIPS trunk '{trunk}': expected one of {', '.join(WIDTHS)}")
        widths = tuple(widths or WIDTHS[trunk])
        self.trunk = _vgg(widths) if trunk == "vgg" else _alexnet(widths)
        self.taps = TAPS[trunk]
        self.dropout = nn.Dropout(dropout)
        self.lins = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.requires_grad_(False)

    def features(self, pixels: Tensor) -> list[Tensor]:
        """The five activations of pixels ``(B, 3, H, W)`` in [-1, 1]."""
        x, found = (pixels - self.shift) / self.scale, []
        for i, layer in enumerate(self.trunk):
            x = layer(x)
            if i in self.taps:
                found.append(x)
        return found

    def maps(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Distance of each stage at each of its positions, five of ``(B, 1, h, w)``."""
        pairs = zip(self.features(x), self.features(y), self.lins, strict=True)
        return [lin(self.dropout((unit_channels(a) - unit_channels(b)).square())) for a, b, lin in pairs]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([m.mean((1, 2, 3)) for m in self.maps(x, y)]).sum(0)


def _vgg(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for layer in _VGG:
        if isinstance(layer, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, widths[layer], 3, padding=1), nn.ReLU()]
            channels = widths[layer]
    return nn.Sequential(*layers)


def _alexnet(widths: Sequence[int]) -> nn.Sequential:
    a, b, c, d, e = widths
    return nn.Sequential(
        nn.Conv2d(3, a, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(a, b, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(b, c, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(c, d, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(d, e, 3, padding=1),
        nn.ReLU(),
    )


def load_lpips(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], trunk: str = "vgg", dropout: float = 0.5
) -> LPIPS:
    """LPIPS with weights from files; the widths are read from the tensors.

    Args:
        source: a file, several files, a directory that holds them under their usual names (``vgg.pth`` or ``alex.pth`` of lpips
            v0.1 or taming-transformers, and the trunk as torchvision publishes it), or ``"cache"`` for torch hub's directory.
            A single file may hold everything. A trunk that ``source`` lacks is looked for in torch hub's directory.

    Raises:
        CheckpointError: weights are absent or do not fit.
    """
    if trunk not in WIDTHS:
        raise ConfigError(f"LPIPS trunk '{trunk}': expected one of {', '.join(WIDTHS)}")
    files = _files(source, trunk)
    state: State = {}
    for file in files:
        state |= rename({k.removeprefix("perceptual_loss."): v for k, v in unwrap(read_file(file), ()).items()}, _RULES)
    cached = _hub() / TRUNK_FILES[trunk]
    if "trunk.0.weight" not in state and cached.is_file():
        state |= rename(unwrap(read_file(cached), ()), _RULES)
    names = ", ".join(str(f) for f in files)
    for key, what, name in (("trunk.0.weight", "trunk", TRUNK_FILES[trunk]), ("lins.0.weight", "linear layers", f"{trunk}.pth")):
        if key not in state:
            raise CheckpointError(
                f"no weights of the LPIPS {what} in {names}: add {name}, or train with the perceptual loss switched off"
            )
    lins = [state.get(f"lins.{i}.weight") for i in range(len(TAPS[trunk]))]
    if any(lin is None or lin.dim() != 4 for lin in lins):
        raise CheckpointError(f"{names}: expected five LPIPS linear layers of shape (1, C, 1, 1)")
    model = LPIPS(trunk, [lin.shape[1] for lin in lins if lin is not None], dropout)
    load_strictly(model, state, _IGNORE, names)
    return model.eval()


def _hub() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _files(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], trunk: str) -> list[Path]:
    if not isinstance(source, (str, os.PathLike)):
        return [Path(path) for path in source]
    folder = _hub() if str(source) == "cache" else Path(source)
    if not folder.is_dir():
        if str(source) == "cache" or not folder.exists():
            raise CheckpointError(
                f"LPIPS weights '{folder}' do not exist: give the path of {trunk}.pth and {TRUNK_FILES[trunk]}, "
                f"or train with the perceptual loss switched off"
            )
        return [folder]
    pattern = re.compile(rf"{trunk}(_lpips)?\.(pth|safetensors)|{re.escape(TRUNK_FILES[trunk])}")
    found = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    if not found:
        raise CheckpointError(f"'{folder}' holds neither {trunk}.pth nor {TRUNK_FILES[trunk]}, the weights of LPIPS")
    return found
