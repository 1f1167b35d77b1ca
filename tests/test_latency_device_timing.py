"""How a device times its jobs: times that are picked right, chunks that are timed again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_profiles import FAST, small_plan

from diplugin.latency import device
from diplugin.latency.device import profiler
from diplugin.latency.device.timer import Timer
from diplugin.latency.finish import table_from_rows
from diplugin.latency.plan import ProfilePlan


class Idle:
    """A runtime without work."""

    version = "1.0"

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self.before = before

    def load(self, blob: bytes, inputs: Any) -> Callable[[], None]:
        self.before()
        return lambda: None


def run(plan: ProfilePlan, journal: Path, runtime: Any = None) -> device.Journal:
    return device.profile(plan, str(journal), runtime=runtime or Idle())


class Clocked:
    """A job whose runs take the times it is given, on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times_ms: Callable[[int], float]) -> None:
        self.now = self.runs = 0
        self.times_ms = times_ms
        for clock in ("thread_time_ns", "process_time_ns", "perf_counter_ns"):
            monkeypatch.setattr(time, clock, lambda: self.now)

    def __call__(self) -> None:
        self.now += round(self.times_ms(self.runs) * 1e6)
        self.runs += 1


def test_disturbed_runs_and_rounds_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = {"rounds": 8, "runs": 5, "min_runs": 5, "round_ms": 1.0, "warmup_ms": 0.0, "patience": 2}
    job = Clocked(monkeypatch, lambda run: 1.0 if run % 3 and run % 20 < 15 else 1.4)
    timer = Timer({"id": "a"}, job, protocol, True)
    while not timer.done:
        timer.round()
    row = timer.row(0.5, False)
    assert row["cpu_ms"] == pytest.approx(1.0) and not row["unstable"] and row["rounds"] == 8


def test_a_job_that_never_settles_is_tried_again_and_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = {"rounds": 4, "runs": 1, "min_runs": 1, "round_ms": 1.0, "warmup_ms": 0.0, "patience": 3}
    timer = Timer({"id": "a"}, Clocked(monkeypatch, lambda run: 1.0 + run % 7), protocol, True)
    while not timer.done:
        timer.round()
    row = timer.row(0.5, False)
    assert row["unstable"] and row["rounds"] == 12 and row["attempts"] == 3


def test_rows_of_a_throttled_device_are_taken_again_then_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, looks = small_plan(1), [0]

    def bits() -> int:
        """Limited at the end of the first chunk, and for a moment within the second."""
        looks[0] += 1
        return {1: 0, 2: 0x50005, 3: 0x50000}.get(looks[0], 0xD0000)

    monkeypatch.setattr(profiler, "DRIFT", float("inf"))
    monkeypatch.setattr(profiler, "throttle_bits", bits)
    rows = run(plan, tmp_path / "once").rows
    chunks = -(-len(plan.jobs) // FAST.chunk)
    assert looks[0] == 2 * (chunks + 2) and len(rows) == len(plan.jobs)
    assert not any(row["unstable"] for row in rows.values())
    monkeypatch.setattr(profiler, "throttle_bits", lambda: 0x5)
    assert all(row["unstable"] for row in run(plan, tmp_path / "always").rows.values())


def test_a_fast_moment_does_not_make_all_else_look_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor may run faster for a second; what it does the rest of the time is what counts."""
    plan, readings = small_plan(20), iter([0.9])
    taken = [0]

    def sentinel(_: Any, timers: list[Timer]) -> float:
        for timer in timers:
            timer.round()
        taken[0] += 1
        return next(readings, 1.0)

    monkeypatch.setattr(profiler.Profiler, "time_rounds", sentinel)
    rows = run(plan, tmp_path / "j").rows
    chunks = -(-len(plan.jobs) // FAST.chunk)
    assert chunks >= 8 and taken[0] <= 1 + chunks + 4, "the first few are taken again, the others are as usual"
    assert {row["sentinel_ms"] for row in rows.values()} == {1.0}


def test_rows_of_slow_and_of_fast_moments_are_brought_to_the_usual(tmp_path: Path) -> None:
    plan = small_plan(20)
    row = {"wall_ms": 9.0, "cv": 0.0, "unstable": False}
    speeds = [0.8 if i % 7 == 3 else 1.3 if i % 7 == 5 else 1.0 for i in range(len(plan.jobs))]
    rows = {job.id: {**row, "cpu_ms": (1 + i) * speed, "sentinel_ms": 2.0 * speed}
            for i, (job, speed) in enumerate(zip(plan.jobs, speeds, strict=True))}  # fmt: skip
    calm = {job.id: {**row, "cpu_ms": 1.0 + i, "sentinel_ms": 2.0} for i, job in enumerate(plan.jobs)}
    moody, steady = table_from_rows(plan.plan, rows, {}), table_from_rows(plan.plan, calm, {})
    for one, other in zip(moody.entries, steady.entries, strict=True):
        assert one.key == other.key and one.latency_ms == pytest.approx(other.latency_ms)
    assert any(e.unstable for e in moody.entries) and not all(e.unstable for e in moody.entries)
    assert not any(e.unstable for e in steady.entries)


def test_a_graph_that_the_runtime_refuses_is_named(tmp_path: Path) -> None:
    def refuse() -> None:
        raise RuntimeError("ONNX Runtime only guarantees support for opset 15\nand more")

    with pytest.raises(device.ProfileError, match=r"does not run .* opset 15") as error:
        run(small_plan(2), tmp_path / "j", Idle(refuse))
    assert "\n" not in str(error.value)


class Failing:
    """A runtime whose graphs, with a clock of their own, load and then do not run."""

    version = "8.5"

    def load(self, blob: bytes, inputs: Any) -> Any:
        return self

    def times(self, runs: int) -> list[float]:
        raise FileNotFoundError("no times.json\nand more")


def test_a_graph_that_fails_in_the_middle_of_its_rounds_is_named(tmp_path: Path) -> None:
    with pytest.raises(device.ProfileError, match=r"sentinel does not run .*no times\.json") as error:
        run(small_plan(2), tmp_path / "j", Failing())
    assert "\n" not in str(error.value)
