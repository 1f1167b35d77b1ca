"""A plan of a few convolutions for a device to profile, in next to no time."""

from __future__ import annotations

from diplugin.latency.plan import ProfilePlan, Protocol, add_entries
from diplugin.tables import OpKey, Setting

SETTING = Setting("onnxruntime", "1.0", "CPUExecutionProvider", "all", 1)
FAST = Protocol(
    rounds=2, runs=1, min_runs=1, round_ms=0.01, warmup_ms=0.0, chunk=3, patience=1, gap_ms=0.0, pause_s=0.0
)


def small_plan(entries: int = 10) -> ProfilePlan:
    plan = ProfilePlan("small", SETTING, FAST)
    keys = [OpKey("conv", 8, 4 * i + 4, (1, 1), (1, 1), (0, 0), (1, 1), 1, (2, 2)) for i in range(entries)]
    add_entries(plan, keys)
    return plan
