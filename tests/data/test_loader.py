"""Batches are a function of seed and step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vargen.data.folder import ImageFolder
from vargen.data.loader import batch_indices, ordered_batches, training_batches
from vargen.data.shapes import Shapes
from vargen.errors import DataError


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**40))
def test_every_item_once_per_epoch_whatever_the_world(n, batch, world, seed):
    steps = -(-3 * n // (batch * world))
    shards = [batch_indices(seed, s, batch, n, rank, world) for s in range(steps) for rank in range(world)]
    indices, epochs = (torch.cat([shard[k] for shard in shards]) for k in (0, 1))
    for epoch in range(3):
        assert sorted(indices[epochs == epoch].tolist()) == list(range(n))
    whole = [batch_indices(seed, s, batch * world, n) for s in range(steps)]
    assert torch.equal(torch.cat([w[0] for w in whole]), indices)


def test_epochs_and_seeds_differ():
    orders = [batch_indices(seed, step, 50, 50)[0] for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(o.tolist()) for o in orders}) == 4


def test_resume_continues_exactly():
    data = Shapes(size=16, length=10)
    run = training_batches(data, 4, seed=3)
    straight = [next(run) for _ in range(6)]
    resumed = training_batches(data, 4, seed=3, start=4)
    for expected in straight[4:]:
        batch = next(resumed)
        assert torch.equal(batch["index"], expected["index"])
        assert torch.equal(batch["pixels"], expected["pixels"])
        assert batch["captions"] == expected["captions"]
        assert batch["class_labels"].tolist() == (expected["index"] % 8).tolist()


def test_workers_change_nothing_and_report_broken_files(tmp_path):
    for i in range(3):
        Image.new("RGB", (20, 20), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "x.png").write_bytes(b"not an image")
    plain, parallel = ImageFolder(tmp_path, size=16), ImageFolder(tmp_path, size=16)
    a, b = training_batches(plain, 4), training_batches(parallel, 4, num_workers=1)
    for _ in range(2):
        assert torch.equal(next(a)["pixels"], next(b)["pixels"])
    assert list(plain.skipped) == list(parallel.skipped) == ["x.png"]


def test_ordered_batches_end():
    batches = list(ordered_batches(Shapes(size=16, length=7), 3))
    assert [len(b["pixels"]) for b in batches] == [3, 3, 1]
    assert sum(len(b["pixels"]) for b in ordered_batches(Shapes(size=16, length=7), 3, limit=5)) == 5


def test_bad_sizes():
    with pytest.raises(DataError, match="rank 2 of 2"):
        batch_indices(0, 0, 4, 10, rank=2, world=2)
