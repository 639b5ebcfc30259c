import math

import torch

from vargen.nn.embed import ClassEmbedding, TextEmbedding, TimestepEmbedding, timestep_sinusoid
from vargen.nn.norm import LayerNorm, RMSNorm
from vargen.nn.positions import sincos_1d, sincos_2d, sincos_3d
from vargen.nn.rope import apply_rotary, axial_angles, rotary_table, sectioned_angles


def test_axial_angles_put_the_first_axis_first():
    angles = axial_angles(torch.tensor([[3, 5]]), head_dim=16)
    frequencies = [10000 ** (-2 * i / 8) for i in range(4)]
    torch.testing.assert_close(angles[0], torch.tensor([3 * f for f in frequencies] + [5 * f for f in frequencies]))


def test_rotation_preserves_norm_and_depends_on_differences():
    x, y = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    for interleaved in (True, False):

        def score(a, b, interleaved=interleaved):
            tables = [rotary_table(axial_angles(torch.tensor([[p]]), 8)) for p in (a, b)]
            q, k = (apply_rotary(v, t, interleaved) for v, t in zip((x, y), tables))
            return (q * k).sum()

        torch.testing.assert_close(score(3, 1), score(9, 7))
        table = rotary_table(axial_angles(torch.tensor([[5]]), 8))
        torch.testing.assert_close(apply_rotary(x, table, interleaved).norm(), x.norm())


def test_pairings():
    table = rotary_table(torch.tensor([[math.pi / 2, 0.0]]))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    torch.testing.assert_close(apply_rotary(x, table).flatten(), torch.tensor([-2.0, 1.0, 3.0, 4.0]))
    torch.testing.assert_close(apply_rotary(x, table, interleaved=False).flatten(), torch.tensor([-3.0, 2.0, 1.0, 4.0]))


def test_zero_rows_erase_queries():
    table = rotary_table(axial_angles(torch.tensor([[1], [2]]), 4), zero=torch.tensor([True, False]))
    rotated = apply_rotary(torch.randn(1, 1, 2, 4), table)
    assert (rotated[:, :, 0] == 0).all()
    assert (rotated[:, :, 1] != 0).any()


def test_sectioned_angles_choose_streams():
    positions = torch.tensor([[1], [10], [100]])
    angles = sectioned_angles(positions, 8, (1, 2, 1))
    f = [10000 ** (-2 * i / 8) for i in range(4)]
    torch.testing.assert_close(angles[0], torch.tensor([1 * f[0], 10 * f[1], 10 * f[2], 100 * f[3]]))


def test_sine_cosine_tables():
    one = sincos_1d(8, torch.tensor([2.0]))
    omega = [10000 ** (-j / 4) for j in range(4)]
    torch.testing.assert_close(one[0], torch.tensor([math.sin(2 * w) for w in omega] + [math.cos(2 * w) for w in omega]).double())
    two = sincos_2d(8, (2, 3))
    assert two.shape == (6, 8)
    torch.testing.assert_close(two[5, :4], sincos_1d(4, torch.tensor([2.0]))[0].float())
    torch.testing.assert_close(two[5, 4:], sincos_1d(4, torch.tensor([1.0]))[0].float())
    torch.testing.assert_close(sincos_2d(8, (2, 3), column_first=False)[5, :4], sincos_1d(4, torch.tensor([1.0]))[0].float())
    three = sincos_3d(8, (2, 2, 3))
    torch.testing.assert_close(three[11], two[5] + sincos_1d(8, torch.tensor([1.0]))[0].float())


def test_timestep_sinusoid_is_cosine_first():
    s = timestep_sinusoid(torch.tensor([3.0]), 8)
    f = [10000 ** (-k / 4) for k in range(4)]
    torch.testing.assert_close(s[0], torch.tensor([math.cos(3 * w) for w in f] + [math.sin(3 * w) for w in f]))
    assert TimestepEmbedding(6, scale=1000)(torch.rand(2, 5)).shape == (2, 5, 6)


def test_conditions_fall_back_to_null():
    classes = ClassEmbedding(3, 4)
    rows = classes(torch.tensor([-1, 3, 7, 1]))
    assert torch.equal(rows[:3], classes.table.weight[3].expand(3, 4))
    assert torch.equal(rows[3], classes.table.weight[1])
    text = TextEmbedding(6, 2, 4)
    dropped = text(torch.randn(2, 2, 6), torch.tensor([True, False]))
    torch.testing.assert_close(dropped[:1], text.proj(text.null[None]))


def test_norms_compute_in_float32():
    x = (torch.randn(2, 64) * 300).bfloat16()
    rms = RMSNorm(64).bfloat16()
    expected = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(rms(x), expected.bfloat16())
    layer = LayerNorm(64, affine=False).bfloat16()
    torch.testing.assert_close(layer(x).float().mean(-1), torch.zeros(2), atol=2e-2, rtol=0)
    y = torch.randn(2, 8)
    torch.testing.assert_close(LayerNorm(8)(y), torch.nn.LayerNorm(8)(y))
