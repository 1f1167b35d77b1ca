"""From a sum of entries to a time that can be trusted, and from staircases to an alignment.

Both are read off measurements. The calibration is a line fitted by relative least squares on nets timed end to end,
with one step: a net whose weights outgrow the core's cache pays for fetching them. Where the step lies is what the
device says of its cache; fitted to so few nets it would follow their noise. The calibration's error is that of nets
left out, one at a time. The alignment follows two definitions: the *step* is the smallest
one on whose multiples more channels are not faster than fewer; the *plateau* is the largest one to which rounding up
is free. Both are judged on averages over a staircase, so that one disturbed width does not decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from ..rank_correlation import rank_correlation
from ..tables import Alignment, Calibration, NetTiming, Setting

T = TypeVar("T")
STEPS = (1, 2, 4, 8, 16, 32)
CLIFF, FREE = 0.06, 0.05
MIN_NETS = 10
_NOTHING_MS = 1e-6
_PROCESSORS = ("CPUExecutionProvider", "cpu")


def fit_nets(
    sums: Sequence[float], measured: Sequence[float], outgrown: Sequence[bool] = ()
) -> tuple[float, float, float]:
    """(scale, offset_ms, refill_ms) of least squared *relative* error.

    The offset needs sums that spread by a third. The refill is paid by the nets that have outgrown the cache; it needs
    nets of both kinds and is never negative.

    >>> tuple(round(c, 6) for c in fit_nets([1.0, 2.0, 4.0, 6.0], [1.5, 2.5, 5.5, 7.5], [False, False, True, True]))
    (1.0, 0.5, 1.0)
    """
    x, y = np.asarray(sums, float), np.asarray(measured, float)
    spread = x.max() >= 4 / 3 * x.min()
    line = [x, np.ones_like(x)] if spread else [x]
    if any(outgrown) and not all(outgrown):
        *fitted, refill = _least_squares([*line, np.asarray(outgrown, float)], y)
        if refill > _NOTHING_MS:
            return fitted[0], fitted[1] if spread else 0.0, refill
    fitted = _least_squares(line, y)
    return fitted[0], fitted[1] if spread else 0.0, 0.0


def _least_squares(columns: Sequence[np.ndarray], y: np.ndarray) -> list[float]:
    solution, *_ = np.linalg.lstsq(np.stack([column / y for column in columns], 1), np.ones_like(y), rcond=None)
    return solution.tolist()


def calibrate(nets: Sequence[NetTiming], cache_mb: float = 0.0) -> Calibration | None:
    """The calibration of these nets, None if there are fewer than `MIN_NETS` or they do not grow with their sums.

    Args:
        nets: timed end to end.
        cache_mb: see `own_cache_mb`; 0 fits no refill. Nor do fewer than `MIN_NETS` nets that outgrow the cache.
    """
    nets = [net for net in nets if net.sum_ms > 0 and net.measured_ms > 0]
    if len(nets) < MIN_NETS:
        return None
    sums, measured = [net.sum_ms for net in nets], [net.measured_ms for net in nets]
    outgrown = [net.weights_mb > cache_mb for net in nets]
    if not cache_mb or sum(outgrown) < MIN_NETS or not all(net.weights_mb for net in nets):
        outgrown = [False] * len(nets)
    scale, offset, refill = fit_nets(sums, measured, outgrown)
    if scale <= 0:
        return None
    held_out = []
    for i, total in enumerate(sums):
        rest = fit_nets(_but(i, sums), _but(i, measured), _but(i, outgrown))
        held_out.append(rest[0] * total + rest[1] + rest[2] * outgrown[i])
    errors = np.abs(np.asarray(held_out) / np.asarray(measured) - 1)
    return Calibration(scale, offset, len(nets), float(errors.mean()), float(errors.max()),
                       rank_correlation(held_out, measured), refill, cache_mb if refill else 0.0)  # fmt: skip


def _but(index: int, values: list[T]) -> list[T]:
    return values[:index] + values[index + 1 :]


def own_cache_mb(setting: Setting, provenance: Mapping[str, Any]) -> float:
    """MB of weights that stay in a core's own cache, its L2, between inferences; 0 where that is not known.

    What the device says of one core's cache bounds nothing on a GPU, nor where several cores share a net.
    """
    said = provenance.get("l2_kb", 0)
    known = isinstance(said, int) and 0 < said <= 1 << 20
    return said * 1024 / 1e6 if known and setting.threads == 1 and setting.provider in _PROCESSORS else 0.0


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
