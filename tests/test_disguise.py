"""Disguised images: what turning, scaling and lighting leave as it is, and that the same disguise comes again."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diplugin.disguise import Disguised, disguised

STILL: dict[str, Any] = {"turn": 0.0, "scale": 0.0, "gain": 0.0, "shift": 0.0}


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def images(count: int = 16, size: int = 12) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def disc(size: int = 33) -> Tensor:
    """A smooth disc in the middle, which looks the same turned."""
    at = torch.linspace(-1, 1, size)
    return torch.exp(-12 * (at[:, None] ** 2 + at**2)).expand(64, 1, size, size)


def test_without_strength_nothing_changes_but_the_mirror() -> None:
    x = images()
    torch.testing.assert_close(disguised(x, draw(), **STILL), x)
    seen = disguised(x, draw(), **STILL, flip=True)
    same = [torch.allclose(s, one, atol=1e-5) for s, one in zip(seen, x, strict=True)]
    mirrored = [torch.allclose(s, one.flip(2), atol=1e-5) for s, one in zip(seen, x, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True)) and any(same) and any(mirrored)


@pytest.mark.parametrize(("height", "width"), [(33, 33), (33, 65), (65, 33)])
def test_turning_moves_a_picture_about_its_middle(height: int, width: int) -> None:
    torch.testing.assert_close(disguised(disc(), draw(), **{**STILL, "turn": math.pi}), disc(), atol=0.02, rtol=0)
    x = torch.zeros(64, 1, height, width)
    x[:, :, height // 2, width // 2 + 8 : width // 2 + 14] = 1  # a ray to the right
    angles = []
    for seen in disguised(x, draw(), **{**STILL, "turn": math.pi / 9}):
        row, column = (seen[0] > 0.2).nonzero().float().mean(0)
        assert math.dist((float(row), float(column)), (height // 2, width // 2)) == pytest.approx(10.5, abs=0.8)
        angles.append(math.atan2(float(row) - height // 2, float(column) - width // 2))
    assert max(map(abs, angles)) < math.pi / 9 + 0.05 and max(angles) > 0.1 and min(angles) < -0.1


def test_scaling_changes_sizes_both_ways_and_within_bounds() -> None:
    areas = (disguised(disc(), draw(), **{**STILL, "scale": 0.2}) > 0.5).sum((1, 2, 3)) / (disc()[0] > 0.5).sum()
    assert 1 / 1.2**2 - 0.1 < float(areas.min()) < 0.95
    assert 1.05 < float(areas.max()) < 1 / 0.8**2 + 0.1


def test_light_is_an_affine_map_of_every_image() -> None:
    x = images()
    for seen, one in zip(disguised(x, draw(), **{**STILL, "gain": 0.3, "shift": 0.5}), x, strict=True):
        gain = float((seen.max() - seen.min()) / (one.max() - one.min()))
        shift = float(seen.min() - gain * one.min())
        torch.testing.assert_close(seen, gain * one + shift)
        assert 0.7 <= gain <= 1.3 and abs(shift) <= 0.5 + 1e-5


def test_a_loader_wears_the_same_disguise_each_time_and_its_labels_none() -> None:
    batches = [{"x": images(), "more": [torch.arange(16), "name"], "flat": torch.rand(16, 5)}, {"x": images(3)}]
    one, two = list(Disguised(batches)), list(Disguised(batches))
    for first, second, plain in zip(one, two, batches, strict=True):
        assert torch.equal(first["x"], second["x"]) and not torch.equal(first["x"], plain["x"])
    assert torch.equal(one[0]["more"][0], torch.arange(16)) and one[0]["more"][1] == "name"
    assert torch.equal(one[0]["flat"], batches[0]["flat"])
    assert not torch.equal(next(iter(Disguised(batches, seed=1)))["x"], one[0]["x"])


@pytest.mark.parametrize("unit", [1.0, 255.0])
def test_brightness_goes_by_the_images_own_unit(unit: float) -> None:
    (seen,) = Disguised([images() * unit])
    (plain,) = Disguised([images()])
    torch.testing.assert_close(seen, plain * unit)


def test_what_is_no_image_passes() -> None:
    odd = [torch.zeros(0, 3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.ones(2, 7), "text", None]
    for leaf, seen in zip(odd, next(iter(Disguised([odd]))), strict=True):
        assert torch.equal(leaf, seen) if isinstance(leaf, Tensor) else leaf is seen
    assert next(iter(Disguised([torch.ones(2, 1, 1, 1)]))).isfinite().all(), "one pixel, no contrast"
