"""Calibration and alignment: read off made-up devices whose truth is known."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from diplugin.latency.calibration import (
    MIN_NETS,
    calibrate,
    fit_nets,
    measured_alignment,
    own_cache_mb,
)
from diplugin.tables import Alignment, NetTiming, Setting


def nets(count: int, scale: float, offset: float, noise: float = 0.0, seed: int = 0) -> list[NetTiming]:
    draw = random.Random(seed)
    sums = [draw.uniform(1, 10) for _ in range(count)]
    times = [(scale * s + offset) * (1 + draw.uniform(-noise, noise)) for s in sums]
    return [NetTiming(f"n{i}", t, s, t, t, 0.0) for i, (s, t) in enumerate(zip(sums, times, strict=True))]


def test_an_exact_line_is_found_with_no_error() -> None:
    calibration = calibrate(nets(12, 1.1, 0.3))
    assert calibration is not None
    assert (calibration.scale, calibration.offset_ms) == pytest.approx((1.1, 0.3))
    assert calibration.mape < 1e-9 and calibration.rho == pytest.approx(1.0) and calibration.nets == 12
    assert calibration.predict(2.0, 99.0) == pytest.approx(2.5)


def test_held_out_error_is_that_of_nets_left_out() -> None:
    timed = nets(14, 1.0, 0.1, noise=0.1)
    calibration = calibrate(timed)
    assert calibration is not None
    x, y = np.array([n.sum_ms for n in timed]), np.array([n.measured_ms for n in timed])
    errors = []
    for i in range(len(timed)):
        rest = np.arange(len(timed)) != i
        weights = 1 / y[rest]
        slope, intercept = np.polyfit(x[rest], y[rest], 1, w=weights)
        errors.append(abs((slope * x[i] + intercept) / y[i] - 1))
    assert calibration.mape == pytest.approx(np.mean(errors)) and calibration.worst == pytest.approx(max(errors))


def test_too_few_nets_give_no_calibration() -> None:
    assert calibrate(nets(MIN_NETS - 1, 1.0, 0.0)) is None
    assert calibrate([]) is None


def test_nets_that_fall_with_their_sums_give_none() -> None:
    timed = [n._replace(measured_ms=20 - n.sum_ms) for n in nets(12, 1.0, 0.0)]
    assert calibrate(timed) is None


def test_sums_all_alike_fit_a_scale_only() -> None:
    assert fit_nets([1.0, 1.1, 1.05], [2.0, 2.2, 2.1]) == pytest.approx((2.0, 0.0, 0.0))


CACHE = 2.097152


def weighed(
    small: int, large: int, law: tuple[float, float, float] = (1.1, 0.3, 0.7), noise: float = 0.0
) -> list[NetTiming]:
    """Nets on both sides of a cache, of a device with this scale, offset and refill."""
    draw = random.Random(small * 100 + large)
    sizes = [draw.uniform(0.1, 1) * CACHE for _ in range(small)] + [draw.uniform(1.01, 9) * CACHE for _ in range(large)]
    found = []
    for i, size in enumerate(sizes):
        total = size * draw.uniform(1, 3)
        ms = (law[0] * total + law[1] + law[2] * (size > CACHE)) * (1 + draw.uniform(-noise, noise))
        found.append(NetTiming(f"n{i}", ms, total, ms, ms, 0.0, size))
    return found


@pytest.mark.parametrize("small", [2, 5, 20])
def test_the_refill_of_a_made_up_device_is_found(small: int) -> None:
    calibration = calibrate(weighed(small, MIN_NETS), CACHE)
    assert calibration is not None and calibration.mape < 1e-9
    found = calibration.scale, calibration.offset_ms, calibration.refill_ms
    assert found == pytest.approx((1.1, 0.3, 0.7)) and calibration.cache_mb == CACHE
    assert calibration.predict(2.0, CACHE) == pytest.approx(2.5)
    assert calibration.predict(2.0, CACHE + 1e-6) == pytest.approx(3.2)


def test_held_out_errors_refit_the_refill_too() -> None:
    timed = weighed(4, 14, noise=0.1)
    calibration = calibrate(timed, CACHE)
    assert calibration is not None and calibration.refill_ms > 0

    def row(net: NetTiming) -> list[float]:
        return [net.sum_ms, 1.0, float(net.weights_mb > CACHE)]

    errors = []
    for net in timed:
        rest = [n for n in timed if n is not net]
        weights = np.diag([1 / n.measured_ms**2 for n in rest])
        design, times = np.array([row(n) for n in rest]), np.array([n.measured_ms for n in rest])
        law = np.linalg.solve(design.T @ weights @ design, design.T @ weights @ times)  # normal equations
        errors.append(abs(law @ row(net) / net.measured_ms - 1))
    assert calibration.mape == pytest.approx(np.mean(errors)) and calibration.worst == pytest.approx(max(errors))


def test_the_only_small_net_is_predicted_without_a_refill() -> None:
    timed = weighed(1, 12)
    calibration = calibrate(timed, CACHE)
    assert calibration is not None and calibration.refill_ms == pytest.approx(0.7)
    # The others agree on an offset with the refill in it, which the small one does not pay.
    assert calibration.worst == pytest.approx(0.7 / timed[0].measured_ms)


@pytest.mark.parametrize(
    ("timed", "cache"),
    [
        (weighed(5, 12), 0.0),
        (weighed(0, 12), CACHE),
        (weighed(12, 0), CACHE),
        (weighed(12, MIN_NETS - 1), CACHE),
        (weighed(5, 12, (1.1, 2.0, -0.5)), CACHE),
        (weighed(5, 12, (1.1, 0.3, 0.0)), CACHE),
        ([n._replace(weights_mb=0.0) if i == 7 else n for i, n in enumerate(weighed(5, 12))], CACHE),
    ],
    ids=["no cache", "all large", "all small", "few large", "large ones faster", "no difference", "weights not noted"],
)
def test_what_shows_no_refill_is_fitted_by_a_line(timed: list[NetTiming], cache: float) -> None:
    calibration = calibrate(timed, cache)
    assert calibration is not None and (calibration.refill_ms, calibration.cache_mb) == (0.0, 0.0)
    times = np.array([n.measured_ms for n in timed])
    line = np.polyfit([n.sum_ms for n in timed], times, 1, w=1 / times)
    assert (calibration.scale, calibration.offset_ms) == pytest.approx(tuple(line))


def test_sums_all_alike_leave_the_offset_out_beside_a_refill() -> None:
    found = fit_nets([1.0, 1.1, 1.05, 1.2], [2.0, 2.2, 2.6, 2.9], [False, False, True, True])
    assert found == pytest.approx((2.0, 0.0, 0.5))


@pytest.mark.parametrize(
    ("change", "said", "expected"),
    [
        ({}, 2048, CACHE),
        ({}, 0, 0.0),
        ({}, None, 0.0),
        ({}, "2048", 0.0),
        ({}, -5, 0.0),
        ({}, 10**400, 0.0),
        ({"threads": 2}, 2048, 0.0),
        ({"provider": "CUDAExecutionProvider"}, 2048, 0.0),
        ({"runtime": "torch", "provider": "cpu"}, 1024, CACHE / 2),
    ],
)
def test_only_one_core_by_itself_has_a_cache_of_its_own(change: dict[str, Any], said: Any, expected: float) -> None:
    values = {"runtime": "onnxruntime", "version": "1", "provider": "CPUExecutionProvider",
              "graph_optimization": "all", "threads": 1, **change}  # fmt: skip
    assert own_cache_mb(Setting(**values), {"l2_kb": said}) == pytest.approx(expected)
    assert own_cache_mb(Setting(**values), {}) == 0.0


WIDTHS = (16, 20, 24, 28, 29, 30, 31, 32, 36, 40, 44, 47, 48)


@pytest.mark.parametrize(("step", "plateau"), [(4, 4), (4, 16), (8, 8), (8, 16), (16, 16), (2, 8)])
def test_the_alignment_of_a_made_up_device_is_found(step: int, plateau: int) -> None:
    """Time by whole plateaus, and a slow path off the step."""

    def ms(width: int) -> float:
        return -(-width // plateau) * plateau * (1.0 if width % step == 0 else 2.5) + 1

    draw = random.Random(step * plateau)
    stair = {w: ms(w) * (1 + draw.uniform(-0.01, 0.01)) for w in WIDTHS}
    found = measured_alignment([stair])
    assert found.plateau == plateau
    assert found.step == step


def test_a_smooth_device_has_no_steps() -> None:
    assert measured_alignment([{w: float(w) for w in WIDTHS}]).step == 1
    assert measured_alignment([{w: float(w) for w in WIDTHS}]).plateau <= 2


def test_the_coarsest_of_several_staircases_counts() -> None:
    fine = {w: float(w) for w in WIDTHS}
    coarse = {w: float(w) * (1.0 if w % 8 == 0 else 3.0) for w in WIDTHS}
    assert measured_alignment([fine, coarse]).step == 8


def test_without_staircases_nothing_is_assumed() -> None:
    assert measured_alignment([]) == Alignment(1, 1)
