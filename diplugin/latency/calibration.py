"""From a sum of entries to a time that can be trusted, and from staircases to an alignment.

Both are read off measurements. The calibration is a line fitted by relative least squares on nets timed end to end;
its error is that of nets left out, one at a time. The alignment follows two definitions: the *step* is the smallest
one on whose multiples more channels are not faster than fewer; the *plateau* is the largest one to which rounding up
is free. Both are judged on averages over a staircase, so that one disturbed width does not decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..tables import Alignment, Calibration, NetTiming

STEPS = (1, 2, 4, 8, 16, 32)
CLIFF, FREE = 0.06, 0.05
MIN_NETS = 10


def fit_line(sums: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """(scale, offset_ms) of least squared *relative* error; the offset needs sums that spread by a third.

    >>> scale, offset = fit_line([1.0, 2.0, 4.0], [1.5, 2.5, 4.5])
    >>> round(scale, 6), round(offset, 6)
    (1.0, 0.5)
    """
    x, y = np.asarray(sums, float), np.asarray(measured, float)
    if x.max() < 4 / 3 * x.min():
        return float((x / y).sum() / ((x / y) ** 2).sum()), 0.0
    design = np.stack([x / y, 1 / y], 1)
    (scale, offset), *_ = np.linalg.lstsq(design, np.ones_like(y), rcond=None)
    return float(scale), float(offset)


def calibrate(nets: Sequence[NetTiming]) -> Calibration | None:
    """The calibration of these nets, None if there are fewer than `MIN_NETS` or they do not grow with their sums."""
    nets = [net for net in nets if net.sum_ms > 0]
    if len(nets) < MIN_NETS:
        return None
    sums, measured = [net.sum_ms for net in nets], [net.measured_ms for net in nets]
    scale, offset = fit_line(sums, measured)
    if scale <= 0:
        return None
    held_out = []
    for i, total in enumerate(sums):
        rest_scale, rest_offset = fit_line(sums[:i] + sums[i + 1 :], measured[:i] + measured[i + 1 :])
        held_out.append(rest_scale * total + rest_offset)
    errors = np.abs(np.asarray(held_out) / np.asarray(measured) - 1)
    return Calibration(scale, offset, len(nets), float(errors.mean()), float(errors.max()),
                       rank_correlation(held_out, measured))  # fmt: skip


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 if one of them is constant."""
    ranks = [_ranks(np.asarray(values, float)) for values in (one, other)]
    centred = [r - r.mean() for r in ranks]
    norm = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum() / norm) if norm > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def measured_alignment(staircases: Iterable[Mapping[int, float]]) -> Alignment:
    """The alignment that all staircases (width -> ms) agree on; (1, 1) without any.

    >>> steps = {w: -(-w // 8) + (2.0 if w % 4 else 0.0) for w in range(16, 41)}
    >>> measured_alignment([steps])
    Alignment(step=4, plateau=8)
    """
    stairs = [dict(s) for s in staircases if len(s) >= 4]
    worst = {s: max((_cliff(stair, s) for stair in stairs), default=0.0) for s in STEPS}
    step = next((s for s in STEPS if worst[s] <= CLIFF), min(STEPS, key=lambda s: worst[s]))
    plateaus = [p for p in STEPS if p % step == 0 and p >= step]
    free = [p for p in plateaus if all(_free(stair, step, p) for stair in stairs)] if stairs else []
    return Alignment(step, max(free, default=step))


def _cliff(stair: Mapping[int, float], step: int) -> float:
    """How much slower multiples of the step are, on average, than the fastest of all wider widths; a fraction."""
    excess = [ms / min(v for u, v in stair.items() if u >= w) - 1 for w, ms in stair.items() if w % step == 0]
    return sum(excess) / len(excess) if excess else 0.0


def _free(stair: Mapping[int, float], step: int, plateau: int) -> bool:
    """Rounding a multiple of the step up to the plateau costs, on average, next to nothing."""
    rounded = {w: -(-w // plateau) * plateau for w in stair if w % step == 0 and w % plateau}
    extra = [stair[wide] / stair[w] - 1 for w, wide in rounded.items() if wide in stair]
    return not extra or sum(extra) <= FREE * len(extra)
