"""Bundles small enough for tests, and what must come of them."""

from __future__ import annotations

from pathlib import Path

from diplugin.latency import device
from diplugin.latency.plan import ProfilePlan, Protocol, add_entries, runtime_setting
from diplugin.tables import OpKey

QUICK = Protocol(
    rounds=2, runs=2, min_runs=1, round_ms=0.2, warmup_ms=0.0, chunk=2, patience=1, gap_ms=0.0, pause_s=0.0
)


def small_plan(protocol: Protocol = QUICK, entries: int = 8) -> ProfilePlan:
    plan = ProfilePlan("small", runtime_setting(), protocol)
    ones = (1, 1)
    add_entries(plan, [OpKey("conv", 8, 4 * i + 4, ones, ones, (0, 0), ones, 1, (4, 4)) for i in range(entries)])
    return plan


def script(path: Path, text: str) -> Path:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def complete(plan: ProfilePlan, journal: Path) -> bool:
    """Whether a journal holds every row of the plan, each once."""
    lines = journal.read_text().splitlines()
    return len(lines) == len(plan.jobs) + 1 and set(device.read_journal(str(journal))[1]) == {j.id for j in plan.jobs}
