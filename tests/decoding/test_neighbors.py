import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vargen.decoding import neighbors
from vargen.decoding.neighbors import codebook_of, nearest_codes, neighbor_table, read_table, write_table
from vargen.errors import CheckpointError, VargenError
from vargen.nn.quantize import FSQ, VectorQuantizer
from vargen.tokenizers.vq import VQTokenizer


@given(st.integers(2, 30), st.integers(1, 3), st.integers(0, 99), st.data())
@settings(max_examples=30, deadline=None)
def test_nearest_codes_by_distance_then_number(size, dim, seed, data):
    # whole numbers, so that many distances are equal
    codes = torch.randint(-2, 3, (size, dim), generator=torch.Generator().manual_seed(seed)).float()
    count = data.draw(st.integers(1, size - 1))
    table = nearest_codes(codes, count)
    for code in range(size):
        others = [other for other in range(size) if other != code]
        expected = sorted(others, key=lambda other: (float((codes[code] - codes[other]).square().sum()), other))
        assert table[code].tolist() == expected[:count]


def test_rows_in_blocks_are_the_same(monkeypatch):
    codes = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    whole = nearest_codes(codes, 49)
    monkeypatch.setattr(neighbors, "_BLOCK_ELEMENTS", 350)
    assert torch.equal(nearest_codes(codes, 49), whole)
    assert torch.equal(nearest_codes(codes, 5), whole[:, :5])


@pytest.mark.parametrize("codes, count", [(torch.zeros(4), 1), (torch.zeros(4, 2), 4), (torch.zeros(4, 2), 0)])
def test_impossible_tables_are_refused(codes, count):
    with pytest.raises(VargenError, match="neighbours in a codebook"):
        nearest_codes(codes, count)


def test_broken_codebooks_are_refused():
    with pytest.raises(VargenError, match="NaN"):
        nearest_codes(torch.tensor([[0.0], [float("nan")], [1.0]]), 1)


def test_codebooks_of_tokenizers():
    tokenizer = VQTokenizer(
        sample_size=16,
        encoder_widths=[8, 8],
        decoder_widths=[8, 8],
        encoder_blocks=1,
        decoder_blocks=1,
        attention_levels=[],
        latent_channels=8,
        codebook_size=12,
        codebook_dim=4,
        norm_groups=4,
    )
    assert torch.equal(codebook_of(tokenizer), tokenizer.quantizer.codebook)
    grid = FSQ((4, 3))
    assert torch.equal(codebook_of(torch.nn.Sequential(grid)), grid.lookup(torch.arange(12)))
    for wrong in (torch.nn.Linear(2, 2), torch.nn.ModuleList([grid, VectorQuantizer(4, 2)])):
        with pytest.raises(VargenError, match="codebooks: expected one"):
            codebook_of(wrong)


def test_tables_are_kept_on_disk(tmp_path, monkeypatch):
    codes = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    table = neighbor_table(codes, 6, tmp_path)
    assert torch.equal(table, nearest_codes(codes, 6))
    (file,) = tmp_path.iterdir()
    assert np.load(file).dtype == np.uint16
    with monkeypatch.context() as patch:
        patch.setattr(neighbors, "nearest_codes", lambda *_: pytest.fail("made anew"))
        assert torch.equal(neighbor_table(codes, 4, tmp_path), table[:, :4])
    assert neighbor_table(codes, 1000, tmp_path).shape == (20, 19)
    file.write_bytes(file.read_bytes()[:-9])
    assert torch.equal(neighbor_table(codes, 6, tmp_path), table)
    assert neighbor_table(codes + 1, 6, tmp_path).shape == (20, 6)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_place_that_cannot_be_written_costs_only_the_time(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    codes = torch.arange(6.0).unsqueeze(1)
    assert torch.equal(neighbor_table(codes, 3, tmp_path / "file"), nearest_codes(codes, 3))
    assert "not kept" in caplog.text


def test_the_default_place_is_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    neighbor_table(torch.arange(5.0).unsqueeze(1), 2)
    assert len(list((tmp_path / "vargen" / "neighbors").iterdir())) == 1


def test_a_published_table_is_read(tmp_path):
    full = nearest_codes(torch.randn(30, 2, generator=torch.Generator().manual_seed(2)), 29)
    np.save(tmp_path / "top_29_indices.npy", full.numpy().astype(np.uint16))
    assert torch.equal(read_table(tmp_path / "top_29_indices.npy", 11, 30), full[:, :11])


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        (b"", "not a readable"),
        (np.zeros((3, 2)), "float64"),
        (np.zeros((3, 3), np.int32), "shape"),
        (np.full((3, 2), 7), "do not exist"),
        (np.array([[{}, 1], [1, 2], [0, 1]], dtype=object), "not a readable"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    file = tmp_path / "table.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.save(file, content, allow_pickle=True)
    with pytest.raises(CheckpointError, match=message):
        read_table(file)


def test_a_table_of_another_codebook_is_refused(tmp_path):
    write_table(tmp_path / "table.npy", nearest_codes(torch.arange(4.0).unsqueeze(1), 2))
    with pytest.raises(CheckpointError, match="4 rows, the codebook 5 codes"):
        read_table(tmp_path / "table.npy", codebook_size=5)
