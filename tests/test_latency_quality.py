"""What cannot be true of a table is found, and what can be is left alone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from diplugin.errors import TableError
from diplugin.latency.quality import diff_tables, findings
from diplugin.latency.staircase import choose, plot_staircase
from diplugin.tables import Calibration, Entry, LatencyTable, OpKey, Setting


def key(cin: int, cout: int, side: int, groups: int = 1) -> OpKey:
    return OpKey("conv", cin, cout, (3, 3), (1, 1), (1, 1), (1, 1), groups, (side, side), "relu")


def table(seed: int = 0, *, grows: bool = True, cv: float = 0.004, unstable: float = 0.0) -> LatencyTable:
    draw = random.Random(seed)
    rows = []
    for side in (8, 16, 32):
        for cin in (16, 32):
            for cout in (16, 32, 64):
                ms = cin * cout * (side**2 if grows else 64) * 1e-6 * draw.uniform(0.99, 1.01)
                rows.append(Entry(key(cin, cout, side), ms, ms, ms, cv, draw.random() < unstable))
    setting = Setting("onnxruntime", "1.32.0", "CPUExecutionProvider", "all", 1)
    return LatencyTable("t", "device", setting, tuple(rows), calibration=Calibration(1, 0, 12, 0.01, 0.03, 1))


def faults(found: LatencyTable) -> str:
    return " | ".join(f.text for f in findings(found) if f.fatal)


def test_a_sound_table_has_no_faults() -> None:
    assert findings(table()) == []


def test_times_that_do_not_grow_with_the_resolution() -> None:
    assert "resolution" in faults(table(grows=False))


def test_times_that_scatter() -> None:
    assert "scatter" in faults(table(cv=0.2))
    assert "unstable" in faults(table(unstable=0.6))
    assert not faults(table(unstable=0.05))


def test_an_emulated_table_and_a_bad_calibration() -> None:
    assert "emulator" in faults(replace(table(), emulated=True))
    assert "calibration" in faults(replace(table(), calibration=Calibration(1, 0, 12, 0.3, 0.5, 0.5)))
    uncalibrated = findings(replace(table(), calibration=None))
    assert "uncalibrated" in uncalibrated[0].text and not uncalibrated[0].fatal


def test_a_copy_is_recognised_and_another_device_is_not_one() -> None:
    copied = diff_tables(table(), replace(table(), device="another"))
    assert copied.copied and copied.equal == len(copied.ratios) == 18
    measured = diff_tables(table(), table(1))
    assert not measured.copied and all(0.9 < ratio < 1.1 for ratio in measured.ratios.values())


def test_what_only_one_table_holds_is_counted() -> None:
    one = table()
    diff = diff_tables(one, replace(one, entries=one.entries[3:]))
    assert (diff.only_one, diff.only_other, len(diff.ratios)) == (3, 0, 15)


def test_the_staircase_is_drawn(tmp_path: Path) -> None:
    path = plot_staircase(table(), tmp_path / "stairs.png", ["@16x16"])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert {k.size for k in choose(table(), ["@16x16"])} == {(16, 16)}


def test_words_that_describe_nothing(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="k9x9"):
        plot_staircase(table(), tmp_path / "x.png", ["k9x9"])
    assert not list(tmp_path.iterdir())
