import math

import pytest
import torch
from torch.nn import functional as F

from vargen.errors import VargenError
from vargen.kernels.diffusion_step import adaln_linear, adaln_mlp_block, ddpm_update

# the kernels round where they store and where they multiply; the bfloat16 conversion of Triton's interpreter truncates
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def block_arguments(n, c, m, dtype=torch.float32, device="cpu", affine=True):
    generator = torch.Generator().manual_seed(n * 1000 + c)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    # modulation as a model has it: chunks of one wide matrix
    shift, scale, gate = normal(n, 3 * c).chunk(3, -1)
    norm = (normal(c), normal(c)) if affine else (None, None)
    return (
        normal(n, c) * 2 + 1,
        shift,
        scale,
        gate,
        *norm,
        normal(m, c) / math.sqrt(c),
        normal(m),
        normal(c, m) / math.sqrt(m),
        normal(c),
    )


def upcast(args):
    return [a.float() if isinstance(a, torch.Tensor) else a for a in args]


def assert_near(found, exact, dtype):
    assert found.dtype == dtype
    assert (found.float() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()


def test_reference_block_is_its_formula():
    h, shift, scale, gate, weight, bias, w1, b1, w2, b2 = block_arguments(3, 8, 5)
    normed = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt() * weight + bias
    hidden = F.silu((normed * (1 + scale) + shift) @ w1.T + b1)
    torch.testing.assert_close(
        adaln_mlp_block(h, shift, scale, gate, weight, bias, w1, b1, w2, b2), h + gate * (hidden @ w2.T + b2)
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n, c, m", [(1, 1, 3), (2, 48, 48), (19, 33, 20), (70, 130, 67)])
def test_block_kernel_agrees_with_reference(run_triton, device, dtype, n, c, m):
    args = block_arguments(n, c, m, dtype, device, affine=n != 2)
    assert_near(run_triton("adaln_mlp_block", *args), adaln_mlp_block(*upcast(args)), dtype)
    linear = (*args[:3], *args[4:8])
    assert_near(run_triton("adaln_linear", *linear), adaln_linear(*upcast(linear)), dtype)


def test_block_kernel_broadcasts_modulation_over_leading_axes(run_triton, device):
    h, shift, scale, gate, *weights = block_arguments(6, 16, 16, device=device)
    h = h.reshape(2, 3, 16)
    modulation = [t[:2, None] for t in (shift, scale, gate)]
    torch.testing.assert_close(
        run_triton("adaln_mlp_block", h, *modulation, *weights), adaln_mlp_block(h, *modulation, *weights), atol=1e-5, rtol=1e-5
    )


def test_block_kernel_norm_survives_a_large_mean(run_triton, device):
    h, *rest = block_arguments(4, 64, 64, device=device)
    args = (h + 1e3, *rest)
    exact = adaln_mlp_block(*[a.double() for a in args]).float()
    torch.testing.assert_close(run_triton("adaln_mlp_block", *args), exact, atol=1e-2, rtol=1e-3)


def test_block_kernel_carries_nan_of_a_row_to_that_row_only(run_triton, device):
    h, *rest = block_arguments(3, 8, 8, device=device)
    h[1, 2] = float("nan")
    found = run_triton("adaln_mlp_block", h, *rest)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_block_kernel_takes_no_rows(run_triton, device):
    args = [a[:0] if i < 4 else a for i, a in enumerate(block_arguments(2, 8, 8, device=device))]
    assert run_triton("adaln_mlp_block", *args).shape == (0, 8)


def test_block_kernel_refuses_weights_that_do_not_fit(run_triton, device):
    h, shift, scale, gate, weight, bias, w1, b1, w2, b2 = block_arguments(2, 8, 6, device=device)
    for norm, products in [
        ((weight[:5], bias), (w1, b1, w2, b2)),
        ((weight, bias), (w1[:, :5], b1, w2, b2)),
        ((weight, bias), (w1, b1[:2], w2, b2)),
        ((weight, bias), (w1, b1, w2[:3], b2[:3])),
        ((weight, bias), (w1, b1, w2[:, :3], b2)),
    ]:
        with pytest.raises(VargenError, match="adaln_mlp_block: .* expected"):
            run_triton("adaln_mlp_block", h, shift, scale, gate, *norm, *products)


def update_arguments(n=5, c=6, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(n)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    prediction = normal(n, 2 * c)  # predicted noise and variance are halves of one output
    coefficients = torch.tensor([1.6, 1.2, 0.3, 0.68, -4.0, -1.5, 0.9], device=device)
    return normal(n, c), prediction[:, :c], prediction[:, c:], normal(n, c), coefficients, normal(n, 2 * c)[:, :c], 2.5


def test_reference_update_draws_from_the_posterior():
    x, eps, v, noise, _, null_eps, s = update_arguments()
    abar, abar_previous = 0.4, 0.7
    beta = 1 - abar / abar_previous
    variance = beta * (1 - abar_previous) / (1 - abar)
    factors = beta * math.sqrt(abar_previous) / (1 - abar), (1 - abar_previous) * math.sqrt(1 - beta) / (1 - abar)
    coefficients = torch.tensor([abar**-0.5, math.sqrt(1 / abar - 1), *factors, math.log(variance), math.log(beta), 0.9])
    e = null_eps + s * (eps - null_eps)
    x0 = (x - math.sqrt(1 - abar) * e) / math.sqrt(abar)
    std = variance ** ((1 - v) / 4) * beta ** ((1 + v) / 4)
    expected = factors[0] * x0 + factors[1] * x + 0.9 * std * noise
    torch.testing.assert_close(ddpm_update(x, eps, v, noise, coefficients, null_eps, s), expected, atol=1e-5, rtol=1e-5)
    unguided = ddpm_update(x, e, v, noise, coefficients)
    torch.testing.assert_close(unguided, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n, c", [(1, 1), (5, 6), (70, 17), (0, 4)])
def test_update_kernel_agrees_with_reference(run_triton, device, dtype, n, c):
    args = update_arguments(n, c, dtype, device)
    for used in (args, args[:5]):
        found = run_triton("ddpm_update", *used)
        assert found.shape == (n, c)
        if n:
            assert_near(found, ddpm_update(*upcast(used)), dtype)


def test_update_kernel_refuses_other_coefficients(run_triton, device):
    x, eps, v, noise, coefficients, *_ = update_arguments(device=device)
    with pytest.raises(VargenError, match=r"expected \(7,\)"):
        run_triton("ddpm_update", x, eps, v, noise, coefficients[:5])
