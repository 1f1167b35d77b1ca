"""The contenders of the scoring-cost benchmark on a GPU: one process, each between two plain forward passes."""

from __future__ import annotations

import copy
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scoring_contenders import contender, resnet50, run_forward


def measure_all(names: Sequence[str], images: int, size: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Medians over rounds of wall seconds and of peak memory above model and inputs; the forward pass first."""
    warnings.simplefilter("ignore")
    model = resnet50().to(device)
    x = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    rows = []
    for name in dict.fromkeys(("forward", *names)):
        own = copy.deepcopy(model)  # some leave gradients behind
        rows.append(
            {"name": name, **_alternating(contender(name, own, x, size), lambda own=own: run_forward(own, x), rounds)}
        )
        print(f"{name} {rows[-1]}", file=sys.stderr, flush=True)
    base = rows[0]["peak_mb"]
    return [{**row, "memory_ratio": row["peak_mb"] / base} for row in rows]


def _alternating(work: Callable[[], float], forward: Callable[[], float], rounds: int) -> dict[str, float]:
    for warm in (forward, work, work):  # libraries load, choose kernels and allocate on first use
        warm()
    seconds, ratios, peaks = [], [], []
    for _ in range(rounds):
        before, (own, peak), after = _timed(forward)[0], _timed(work), _timed(forward)[0]
        seconds.append(own)
        ratios.append(2 * own / (before + after))
        peaks.append(peak)
    return {"wall_s": statistics.median(seconds), "time_ratio": statistics.median(ratios),
            "peak_mb": statistics.median(peaks)}  # fmt: skip


def _timed(work: Callable[[], float]) -> tuple[float, float]:
    """Seconds between two events of the device, times what the work says it stands for; and MB at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    times = work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 * times, (torch.cuda.max_memory_allocated() - held) / 2**20
