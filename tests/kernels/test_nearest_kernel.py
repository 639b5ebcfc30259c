import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vargen.errors import VargenError
from vargen.kernels import nearest
from vargen.kernels.nearest import nearest_code

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def brute_force(z, codebook):
    """First nearest code by exact arithmetic: for small integers in any dtype."""
    return (z.double()[:, None] - codebook.double()).square().sum(-1).argmin(-1)


@st.composite
def integer_search(draw):
    """Vectors and codes of small integers, so that ties abound and every distance is exact; sizes off the tiles."""
    n, k, d = draw(st.integers(0, 70)), draw(st.integers(1, 130)), draw(st.sampled_from([1, 3, 8, 17, 40]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    z, codebook = (torch.randint(-2, 3, (rows, d), generator=generator) for rows in (n, k))
    return z.to(draw(st.sampled_from(DTYPES))), codebook.to(draw(st.sampled_from(DTYPES)))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(integer_search())
def test_reference_takes_the_first_nearest_code(case):
    assert torch.equal(nearest_code(*case), brute_force(*case))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(integer_search())
def test_kernel_takes_the_first_nearest_code(run_triton, device, case):
    z, codebook = case
    assert torch.equal(run_triton("nearest_code", z.to(device), codebook.to(device)).cpu(), brute_force(z, codebook))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k, d", [(1, 1, 1), (65, 300, 8), (3, 2100, 33)])
def test_kernel_agrees_with_reference_up_to_rounding(run_triton, device, dtype, n, k, d):
    generator = torch.Generator().manual_seed(n)
    z, codebook = (torch.randn(rows, d, generator=generator).to(device, dtype) for rows in (n, k))
    found = run_triton("nearest_code", z, codebook)
    distances = torch.cdist(z.double(), codebook.double()).square()
    torch.testing.assert_close(distances.gather(1, found[:, None])[:, 0], distances.amin(1), atol=1e-4, rtol=1e-5)


def test_kernel_treats_nan_infinity_and_overflow_as_the_reference_does(run_triton, device):
    z = torch.tensor([[0.0, 0.0], [float("nan"), 0.0], [1e30, 0.0], [float("inf"), 0.0], [3.0, -3.0]], device=device)
    codebook = torch.tensor([[9.0, 9.0], [3.0, -3.0], [0.0, 0.0], [3.0, -3.0]], device=device)
    expected = nearest_code(z, codebook)
    assert expected[[0, 1, 4]].tolist() == [2, 0, 1]
    assert torch.equal(run_triton("nearest_code", z, codebook), expected)
    codebook[2] = float("nan")
    assert run_triton("nearest_code", z, codebook)[[0, 4]].tolist() == [2, 2]
    assert nearest_code(z, codebook)[[0, 4]].tolist() == [2, 2]


def test_kernel_takes_the_first_nearest_code_of_all_blocks(run_triton, device):
    codebook = torch.ones(1000, 1, device=device)
    assert run_triton("nearest_code", torch.zeros(1, 1, device=device), codebook).tolist() == [0]
    codebook[[901, 999]] = 0.5
    assert run_triton("nearest_code", torch.zeros(1, 1, device=device), codebook).tolist() == [901]


def test_kernel_reads_strided_rows(run_triton, device):
    z, codebook = torch.randn(6, 5, device=device).T, torch.randn(7, 12, device=device)[:, ::2]
    assert torch.equal(run_triton("nearest_code", z, codebook), nearest_code(z, codebook))


def test_blocks_do_not_change_the_result(monkeypatch):
    z, codebook = torch.randint(-2, 3, (50, 4)).float(), torch.randint(-2, 3, (30, 4)).float()
    whole = nearest_code(z, codebook)
    monkeypatch.setattr(nearest, "_BLOCK_ELEMENTS", 100)
    assert torch.equal(nearest_code(z, codebook), whole)


def test_autocast_does_not_blur_the_search():
    z, codebook = torch.tensor([[1.0]]), torch.tensor([[1.004], [1.001]])
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_code(z, codebook).tolist() == [1]


@pytest.mark.parametrize("z, codebook", [((2, 3), (4, 2)), ((3,), (4, 3)), ((2, 3), (0, 3))])
def test_shapes_that_do_not_fit_are_refused(run_triton, device, z, codebook):
    for search in (nearest_code, lambda *args: run_triton("nearest_code", *args)):
        with pytest.raises(VargenError, match="expected \\(N, D\\) and \\(K, D\\)"):
            search(torch.zeros(z, device=device), torch.zeros(codebook, device=device))
