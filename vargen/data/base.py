"""What a data set is: an index-addressable collection of pixels with a class label and, if it has them, captions."""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vargen.errors import ConfigError, DataError, nearest

Item = dict[str, Any]

SPLITS = ("train", "test")

# name -> module and class; nothing is imported before it is asked for
DATASETS: dict[str, tuple[str, str]] = {
    "cache": ("vargen.data.cache", "CachedTokens"),
    "digits": ("vargen.data.digits", "Digits"),
    "folder": ("vargen.data.folder", "ImageFolder"),
    "photos": ("vargen.data.photos", "Photos"),
    "shapes": ("vargen.data.shapes", "Shapes"),
    "video": ("vargen.data.video", "VideoFolder"),
    "shapes-video": ("vargen.data.shapes", "ShapesVideo"),
}


class VisualDataset(ABC):
    """Images or videos by index; ``dataset[i]`` is a function of the data set's arguments and ``i``.

    Attributes:
        classes: class names; an item's ``class_label`` indexes them.
        sample_shape: ``(H, W)`` of images or ``(T, H, W)`` of videos.
        has_captions: items carry a ``caption``.
    """

    classes: list[str]
    sample_shape: tuple[int, ...]
    has_captions: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def get(self, index: int, epoch: int = 0) -> Item:
        """Item ``index`` as it looks in ``epoch``, which sets without random augmentation ignore.

        Returns:
            ``pixels`` float32 in [-1, 1], ``(3, H, W)`` or ``(3, T, H, W)``; ``class_label`` int; ``caption`` str if
            ``has_captions``.
        """

    def exact(self, index: int, epoch: int = 0) -> Item:
        """As :meth:`get`, but an item whose file is broken raises DataError where :meth:`get` gives another one in its place."""
        return self.get(index, epoch)

    def item_name(self, index: int) -> str:
        """What the item is called wherever it stands in the set: its file below the root, or its number."""
        return str(index)

    @property
    @abstractmethod
    def labels(self) -> Tensor:
        """Class labels of all items, int64 ``(len(self),)``, found without reading pixels."""

    def judge(self, pixels: Tensor, class_labels: Tensor | None = None, captions: Sequence[str] | None = None) -> dict[str, Tensor]:
        """What rules say of pictures that were asked for by label or caption, where the set has a ground truth.

        Returns:
            For each property that can be read back, bool ``(B,)``: the picture shows what was asked for. Empty by default.
        """
        return {}

    def __getitem__(self, index: int) -> Item:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of a data set of {len(self)}")
        return self.get(index % len(self))

    @property
    def num_classes(self) -> int:
        return len(self.classes)


def check_split(split: str) -> str:
    """Returns ``split``; raises DataError unless it is ``train`` or ``test``."""
    if split not in SPLITS:
        raise DataError(f"split '{split}': expected one of {', '.join(SPLITS)}")
    return split


def check_size(size: int, minimum: int = 8) -> int:
    """Returns ``size``; raises DataError for an image side below ``minimum``."""
    if not isinstance(size, int) or size < minimum:
        raise DataError(f"size {size}: expected an image side of at least {minimum} pixels")
    return size


def build_dataset(config: str | Mapping[str, Any], **options: Any) -> VisualDataset:
    """The data set of a name, a folder, or a mapping such as ``{"name": "digits", "size": 32}``.

    Args:
        config: a key of ``DATASETS``, the path of an image folder, or a mapping of ``name`` and constructor arguments.
        options: further constructor arguments, which win over the mapping's.

    Raises:
        ConfigError: unknown name or argument.
        DataError: the data cannot be used.
    """
    arguments = {"name": config} if isinstance(config, str) else dict(config)
    arguments.update(options)
    name = str(arguments.pop("name", "folder" if "root" in arguments else ""))
    if name not in DATASETS and Path(name).is_dir():
        name, arguments = "folder", {"root": name, **arguments}
    if name not in DATASETS:
        raise ConfigError(f"data set '{name}' is neither a folder nor one that ships{nearest(name, DATASETS)}")
    module, attribute = DATASETS[name]
    dataset_class = getattr(importlib.import_module(module), attribute)
    signature = inspect.signature(dataset_class)
    for key in arguments:
        if key not in signature.parameters:
            raise ConfigError(f"data set '{name}' has no argument '{key}'{nearest(key, signature.parameters)}")
    missing = [k for k, p in signature.parameters.items() if p.default is p.empty and k not in arguments]
    if missing:
        raise ConfigError(f"data set '{name}' needs {', '.join(missing)}")
    return dataset_class(**arguments)
