import math

import pytest
import torch

from vargen.errors import VargenError
from vargen.guidance import Guidance, Progress, interval, linear_entity, normalized_difference, power_cosine, until


def test_two_rows_extrapolate_and_three_rows_telescope():
    full, partial, null = torch.randn(3, 2, 4)
    two = Guidance(3.0)
    assert two.rows == 2
    torch.testing.assert_close(two.combine(torch.cat([full, null]), 3.0), null + 3.0 * (full - null))
    three = Guidance(3.0, partial_scale=1.5)
    assert three.rows == 3
    expected = null + 1.5 * (partial - null) + 3.0 * (full - partial)
    torch.testing.assert_close(three.combine(torch.cat([full, partial, null]), 3.0), expected)


def test_scale_one_runs_one_row():
    assert Guidance(1.0).rows == 1
    x = torch.randn(2, 3)
    assert Guidance(1.0).combine(x, 1.0) is x


def test_schedules():
    def at(schedule, scale=3.0, **progress):
        return Guidance(scale, schedule=schedule).at(Progress(**progress))

    assert at("constant", index=5, total=9) == 3.0
    assert [at(until(2), known=k, tokens=9) for k in range(5)] == [3.0, 3.0, 3.0, 1.0, 1.0]
    assert [at(interval(0.25, 0.5), known=k, tokens=4) for k in range(4)] == [1.0, 3.0, 1.0, 1.0]
    assert at("linear", known_after=64, tokens=256) == 1.5
    assert [at("linear-entity", 2.7, entity=k, entities=4) for k in range(4)] == pytest.approx([1, 1.5667, 2.1333, 2.7], abs=1e-4)
    assert linear_entity(2.7, Progress(entities=1)) == 2.7
    assert at(power_cosine(0.0), 5.0, index=3, total=8) == pytest.approx(5.0)
    assert at(power_cosine(2.75), 16.0, index=128, total=256) == pytest.approx(1 + 15 * (1 - math.cos(math.pi * 0.5**2.75)) / 2)


def test_bad_settings_are_refused():
    with pytest.raises(VargenError, match="expected one of"):
        Guidance(2.0, schedule="cosine")
    with pytest.raises(VargenError, match="finite"):
        Guidance(float("nan"))


def test_projected_guidance_keeps_only_the_orthogonal_part():
    full, null = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    direction, average = normalized_difference(full, null, None)
    torch.testing.assert_close((direction * full).sum((1, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
    assert (torch.linalg.vector_norm(direction, dim=(1, 2, 3)) <= 2.5 + 1e-5).all()
    _, second = normalized_difference(full, null, average)
    torch.testing.assert_close(second, (full - null) * 0.5)
