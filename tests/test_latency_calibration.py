"""Calibration and alignment: read off made-up devices whose truth is known."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.stats import spearmanr

from diplugin.latency.calibration import MIN_NETS, calibrate, fit_line, measured_alignment, rank_correlation
from diplugin.tables import Alignment, NetTiming


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
    assert calibration.predict(2.0) == pytest.approx(2.5)


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
    scale, offset = fit_line([1.0, 1.1, 1.05], [2.0, 2.2, 2.1])
    assert scale == pytest.approx(2.0) and offset == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_is_scipys(seed: int) -> None:
    draw = np.random.default_rng(seed)
    one, other = draw.integers(0, 6, 30).astype(float), draw.normal(size=30)
    assert rank_correlation(list(one), list(other)) == pytest.approx(spearmanr(one, other).statistic)
    assert rank_correlation([1.0, 1.0], [1.0, 2.0]) == 0.0


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
