"""Token caches: what ``vargen tokenize`` wrote, as a data set whose items hold tokens in place of pixels."""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vargen.data.base import Item, VisualDataset
from vargen.data.shards import Sample, Shard, open_shard
from vargen.errors import DataError, SpaceError
from vargen.model import VisualTokenizer
from vargen.nn.quantize import TRAINING_STATE
from vargen.noise import Noise
from vargen.space import TokenSpace

JOB_FILE, MANIFEST_FILE = "job.json", "manifest.jsonl"
# shards that a process keeps open; each is a mapped file and small tables
OPEN_SHARDS = 4096


class CachedTokens(VisualDataset):
    """The samples of a token cache.

    Items hold ``tokens`` ``(*token_shape)``, or ``moments`` where posteriors were cached, in place of ``pixels``: of a view (crop,
    flip) that is drawn anew for each epoch and index. ``text_features`` ``(L, D)`` and ``text_mask`` ``(L,)`` join them where
    features of the captions were stored. Whatever is read is checked against what was written.

    Args:
        path: directory of one cache, or one that holds a cache for each split.
        split: which of them.
        seed: addresses the choice of views, together with epoch and index.

    Attributes:
        job: what the cache was made of and how, as in its ``job.json``.
        stored: ``tokens`` or ``moments``.
        space: token space of the tokenizer that made it.

    Raises:
        DataError: no cache, one that is not finished, of another split, or with shards missing or cut.
    """

    def __init__(self, path: str | os.PathLike[str], split: str | None = None, seed: int = 0) -> None:
        self.root = _find(Path(path), split)
        self.seed = seed
        self.job = _read_job(self.root)
        if split is not None and self.job["split"] != split:
            raise DataError(f"cache '{self.root}' holds split '{self.job['split']}', not '{split}': make that by `vargen tokenize`")
        self.classes = list(self.job["classes"])
        self.sample_shape = tuple(self.job["sample_shape"])
        self.has_captions = bool(self.job["captions"])
        self.stored = str(self.job["stored"])
        self.space = TokenSpace(**self.job["space"])
        self.shards = _read_manifest(self.root, self.job)
        self._ends: list[int] = torch.tensor([shard["samples"] for shard in self.shards]).cumsum(0).tolist()
        self._open: OrderedDict[int, Shard] = OrderedDict()
        if not len(self):
            raise DataError(f"cache '{self.root}' holds no sample: none of its pictures could be read")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    @property
    def labels(self) -> Tensor:
        return torch.cat([self._shard(n).labels() for n, entry in enumerate(self.shards) if entry["samples"]])

    def get(self, index: int, epoch: int = 0) -> Item:
        sample = self.sample(index)
        view = int(Noise(self.seed, [index]).integers("cache/view", len(sample.views), at=(epoch,))) if len(sample.views) > 1 else 0
        item: Item = {self.stored: sample.views[view], "class_label": sample.class_label}
        if self.has_captions:
            item["caption"] = sample.caption or ""
        if sample.text is not None:
            length = self.job["text_encoder"]["length"]
            features = torch.zeros(length, sample.text.shape[1])
            features[: len(sample.text)] = sample.text
            item |= {"text_features": features, "text_mask": torch.arange(length) < len(sample.text)}
        return item

    def sample(self, index: int) -> Sample:
        """All views of item ``index``.

        Raises:
            DataError: its shard is damaged, or holds values that are no tokens of the space.
        """
        number = bisect.bisect_right(self._ends, index)
        shard = self._shard(number)
        sample = shard.read(index - (self._ends[number - 1] if number else 0))
        shape = tuple(self.job["shape"])
        if tuple(sample.views.shape) != (self.job["views"], *shape):
            raise shard.damage(f"views of shape {tuple(sample.views.shape)}, expected {(self.job['views'], *shape)}")
        try:
            if self.stored == "tokens":
                self.space.check(sample.views)
            elif not torch.isfinite(sample.views).all():
                raise SpaceError("moments hold NaN or infinity")
        except SpaceError as error:
            raise shard.damage(str(error)) from error
        return sample

    def _shard(self, number: int) -> Shard:
        if number not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)
            self._open[number] = open_shard(self.root / self.shards[number]["file"])
        self._open.move_to_end(number)
        return self._open[number]

    def require(self, tokenizer: VisualTokenizer, text_encoder: Any = None) -> None:
        """Raises DataError or SpaceError unless the cache was made by ``tokenizer``, and its text features by ``text_encoder``."""
        self.space.require(tokenizer.space, f"cache '{self.root}' and tokenizer")
        made, mine = self.job["fingerprint"], fingerprint(tokenizer)
        if made != mine:
            raise DataError(
                f"cache '{self.root}' was made by tokenizer '{self.job['tokenizer']}' ({made}), not by this one ({mine}): "
                "give that one, or make the cache anew"
            )
        encoder = self.job["text_encoder"]
        if encoder is not None and text_encoder is not None and encoder["fingerprint"] != weights_digest(text_encoder):
            raise DataError(
                f"cache '{self.root}' was made with text encoder '{encoder['name']}', not with this one: give that one, or make "
                "the cache anew"
            )


def fingerprint(tokenizer: VisualTokenizer) -> str:
    """A short hash of all that decides a tokenizer's tokens: class, token space, and every weight but the state of its training."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(json.dumps([type(tokenizer).__name__, tokenizer.space.to_dict()]).encode())
    digest.update(weights_digest(tokenizer).encode())
    return digest.hexdigest()


def weights_digest(module: nn.Module) -> str:
    """A hash of every weight's name, shape and value as float32, whatever its device and precision."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(module.state_dict().items()):
        if name.rpartition(".")[2] not in TRAINING_STATE:
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file; raises DataError if it cannot be read."""
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror or error}") from error


def _find(path: Path, split: str | None) -> Path:
    if (path / JOB_FILE).is_file():
        return path
    inner = (split,) if split is not None else ("train", "all")
    for name in inner:
        if (path / name / JOB_FILE).is_file():
            return path / name
    if not path.is_dir():
        raise DataError(f"there is no token cache '{path}': make it by `vargen tokenize TOKENIZER DATASET --output {path}`")
    raise DataError(f"'{path}' is no token cache: expected {JOB_FILE} in it or in its folder {inner[0]}; see `vargen tokenize`")


def _read_job(root: Path) -> dict[str, Any]:
    try:
        job = json.loads((root / JOB_FILE).read_text(encoding="utf-8"))
        missing = {"split", "classes", "sample_shape", "captions", "stored", "space", "shape", "views", "shards"} - job.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"'{root / JOB_FILE}' is not readable ({error}): make the cache anew") from error
    if missing:
        raise DataError(f"'{root / JOB_FILE}' is no token cache's: it lacks {', '.join(sorted(missing))}")
    return job


def _read_manifest(root: Path, job: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of all shards in order, each checked against the size of its file."""
    found: dict[int, dict[str, Any]] = {}
    try:
        for line in (root / MANIFEST_FILE).read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            found.setdefault(int(entry["index"]), entry)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"'{root / MANIFEST_FILE}' is damaged ({error}): run `vargen tokenize` again") from error
    if len(found) < job["shards"]:
        raise DataError(
            f"cache '{root}' is not finished: {len(found)} of {job['shards']} shards are there; run the same `vargen tokenize` "
            "again"
        )
    entries = [found[number] for number in range(job["shards"])]
    for entry in entries:
        file = root / entry["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != entry["bytes"]:
            what = "is missing" if size is None else f"has {size} of {entry['bytes']} bytes"
            raise DataError(f"'{file}' {what}: run the same `vargen tokenize` again, which makes it anew")
    return entries
