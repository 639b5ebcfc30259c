"""Shards of a token cache: one safetensors file of arrays, or one tar file in webdataset's layout, both readable at any sample.

Every sample carries a CRC-32 of its content, so that what is read is what was written, without hashing whole files.
"""

from __future__ import annotations

import io
import json
import mmap
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vargen.errors import DataError

FORMATS = {"safetensors": ".safetensors", "webdataset": ".tar"}


@dataclass(frozen=True)
class Sample:
    """What a cache holds of one picture or clip.

    Attributes:
        index: its number in the data set that was encoded.
        views: ``(V, *shape)``, tokens or moments of its views.
        class_label: int.
        caption: None where the data set has none.
        text: ``(L, D)``, features of the caption's valid tokens, where they were stored.
    """

    index: int
    views: Tensor
    class_label: int
    caption: str | None = None
    text: Tensor | None = None

    def checksum(self) -> int:
        value = zlib.crc32(self.views.contiguous().numpy())
        value = zlib.crc32(json.dumps([self.index, self.class_label, self.caption]).encode(), value)
        return value if self.text is None else zlib.crc32(self.text.contiguous().numpy(), value)


def write_shard(path: Path, samples: Sequence[Sample]) -> None:
    """Writes a shard in the format that the file's ending names; equal samples give equal bytes.

    Raises:
        OSError: the disk is full or not writable.
    """
    (_write_tar if path.suffix == FORMATS["webdataset"] else _write_arrays)(path, samples)


def open_shard(path: Path) -> Shard:
    """A shard for reading.

    Raises:
        DataError: missing, truncated, or no shard of a token cache.
    """
    return (TarShard if path.suffix == FORMATS["webdataset"] else ArrayShard)(path)


class Shard(ABC):
    """Samples by their place in a shard file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def labels(self) -> Tensor:
        """Class labels, int64 ``(n,)``."""

    @abstractmethod
    def _read(self, place: int) -> tuple[Sample, int]:
        """Sample ``place`` and the checksum that was stored with it."""

    def read(self, place: int) -> Sample:
        """Sample ``place``.

        Raises:
            DataError: it is not as it was written.
        """
        try:
            sample, checksum = self._read(place)
        except (OSError, ValueError, LookupError, TypeError, SafetensorError, tarfile.TarError) as error:
            raise self.damage(f"sample {place} cannot be read: {' '.join(str(error).split())[:120]}") from error
        if sample.checksum() != checksum:
            raise self.damage(f"sample {place} is not as it was written")
        return sample

    def damage(self, what: str) -> DataError:
        return DataError(f"'{self.path}' is damaged ({what}): delete this file and run `vargen tokenize` again")


def _write_arrays(path: Path, samples: Sequence[Sample]) -> None:
    arrays = {
        "views": torch.stack([s.views for s in samples]),
        "index": torch.tensor([s.index for s in samples]),
        "class_label": torch.tensor([s.class_label for s in samples]),
        "checksum": torch.tensor([s.checksum() for s in samples]),
    }
    if samples[0].caption is not None:
        captions = [(s.caption or "").encode() for s in samples]
        arrays["captions"] = torch.frombuffer(bytearray(b"".join(captions) or b" "), dtype=torch.uint8)
        arrays["caption_ends"] = torch.tensor([len(c) for c in captions]).cumsum(0)
    if samples[0].text is not None:
        texts = [s.text for s in samples if s.text is not None]
        arrays["texts"] = torch.cat(texts)
        arrays["text_ends"] = torch.tensor([len(t) for t in texts]).cumsum(0)
    # as bytes, so that a full disk is an OSError
    path.write_bytes(save(arrays))


class ArrayShard(Shard):
    """A safetensors file: ``views`` ``(n, V, *shape)``, ``index``, ``class_label`` and ``checksum`` ``(n,)``; captions as UTF-8
    bytes and text features as rows, both end to end, with the place where each sample's end."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._file = safe_open(path, framework="pt")
            columns = ("index", "class_label", "checksum", "caption_ends", "text_ends")
            names = set(self._file.keys())
            self._columns = {name: self._file.get_tensor(name) for name in columns if name in names}
            self._views = self._file.get_slice("views")
        except (OSError, SafetensorError) as error:
            raise self.damage(" ".join(str(error).split())[:120]) from error

    def labels(self) -> Tensor:
        return self._columns["class_label"]

    def _part(self, name: str, ends: str, place: int) -> Tensor:
        stops = self._columns[ends]
        return self._file.get_slice(name)[int(stops[place - 1]) if place else 0 : int(stops[place])]

    def _read(self, place: int) -> tuple[Sample, int]:
        columns = self._columns
        caption = bytes(self._part("captions", "caption_ends", place).tolist()).decode() if "caption_ends" in columns else None
        text = self._part("texts", "text_ends", place) if "text_ends" in columns else None
        views = self._views[place : place + 1][0]
        sample = Sample(int(columns["index"][place]), views, int(columns["class_label"][place]), caption, text)
        return sample, int(columns["checksum"][place])


def _write_tar(path: Path, samples: Sequence[Sample]) -> None:
    from webdataset import TarWriter

    with open(path, "wb") as stream, TarWriter(stream, encoder=False, mtime=0) as tar:
        for sample in samples:
            facts = {"index": sample.index, "class_label": sample.class_label, "checksum": sample.checksum()}
            members: dict[str, Any] = {"__key__": f"{sample.index:09d}", "views.npy": _npy(sample.views)}
            members |= {"cls": str(sample.class_label).encode(), "json": json.dumps(facts).encode()}
            if sample.caption is not None:
                members["txt"] = sample.caption.encode()
            if sample.text is not None:
                members["text.npy"] = _npy(sample.text)
            tar.write(members)


def _npy(values: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values.contiguous().numpy(), allow_pickle=False)
    return buffer.getvalue()


def index_tar(path: Path) -> dict[str, list[list[int]]]:
    """Where the members of every sample lie: kind, such as ``views.npy`` -> ``[offset, size]`` for each sample, in order.

    Raises:
        OSError, tarfile.TarError: not readable.
        ValueError: samples with different kinds of members.
    """
    places: dict[str, list[list[int]]] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            places.setdefault(member.name.partition(".")[2], []).append([member.offset_data, member.size])
    if len({len(place) for place in places.values()}) > 1:
        raise ValueError("its samples have different members")
    return places


def write_index(path: Path, tar: Path) -> None:
    """Writes the index of a tar shard, which spares reading the whole file to find a sample."""
    path.write_text(json.dumps(index_tar(tar)))


def index_path(tar: Path) -> Path:
    return tar.with_suffix(".index.json")


class TarShard(Shard):
    """A tar file of webdataset: ``KEY.views.npy`` ``(V, *shape)``, ``KEY.cls``, ``KEY.json``, ``KEY.txt`` and ``KEY.text.npy``."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        index = index_path(path)
        try:
            places = json.loads(index.read_text()) if index.is_file() else index_tar(path)
            self._places = {kind: torch.tensor(place) for kind, place in places.items()}
            # mapped rather than opened: thousands of shards stay within the limit on open files, and forks share no position
            with open(path, "rb") as file:
                self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError, TypeError, AttributeError, tarfile.TarError) as error:
            raise self.damage(" ".join(str(error).split())[:120]) from error

    def labels(self) -> Tensor:
        try:
            return torch.tensor([int(self._bytes(place, "cls")) for place in range(len(self._places["cls"]))])
        except (OSError, ValueError, LookupError) as error:
            raise self.damage("class labels cannot be read") from error

    def _bytes(self, place: int, kind: str) -> bytes:
        offset, size = self._places[kind][place].tolist()
        return self._file[offset : offset + size]

    def _array(self, place: int, kind: str) -> Tensor:
        return torch.from_numpy(np.load(io.BytesIO(self._bytes(place, kind)), allow_pickle=False))

    def _read(self, place: int) -> tuple[Sample, int]:
        kinds = self._places
        facts = json.loads(self._bytes(place, "json"))
        caption = self._bytes(place, "txt").decode() if "txt" in kinds else None
        text = self._array(place, "text.npy") if "text.npy" in kinds else None
        sample = Sample(int(facts["index"]), self._array(place, "views.npy"), int(facts["class_label"]), caption, text)
        return sample, int(facts["checksum"])
