"""A device's journals survive anything."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_profiles import small_plan

from diplugin.errors import TableError
from diplugin.latency import device
from diplugin.latency.device import profiler, state
from diplugin.latency.device.rows import JOURNAL_FORMAT, sealed
from diplugin.latency.finish import finish
from diplugin.latency.plan import ProfilePlan


class Idle:
    """A runtime without work."""

    version = "1.0"

    def __init__(self) -> None:
        self.loads = 0

    def load(self, blob: bytes, inputs: Any) -> Callable[[], None]:
        self.loads += 1
        return lambda: None


def run(plan: ProfilePlan, journal: Path, runtime: Any = None) -> device.Journal:
    return device.profile(plan, str(journal), runtime=runtime or Idle())


def ids(plan: ProfilePlan) -> set[str]:
    return {job.id for job in plan.jobs}


def test_a_folder_in_the_journals_place_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(device.ProfileError, match="cannot be written"):
        run(small_plan(), tmp_path)


def test_every_job_gets_one_row(tmp_path: Path) -> None:
    plan = small_plan()
    run(plan, tmp_path / "j")
    header, rows = device.read_journal(str(tmp_path / "j"))
    assert header is not None and header["plan_sha256"] == plan.plan["sha256"]
    assert set(rows) == ids(plan)


def test_a_second_run_measures_nothing_again(tmp_path: Path) -> None:
    plan, runtime = small_plan(), Idle()
    run(plan, tmp_path / "j")
    before = (tmp_path / "j").read_bytes()
    run(plan, tmp_path / "j", runtime)
    assert (tmp_path / "j").read_bytes() == before and runtime.loads == 0


def test_every_cut_of_a_journal_is_taken_up_without_loss_or_repeat(tmp_path: Path) -> None:
    plan, draw = small_plan(4), random.Random(0)
    run(plan, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for cut in [0, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(50))]:
        path = tmp_path / "cut"
        path.write_bytes(whole[:cut])
        run(plan, path)
        lines = path.read_bytes().splitlines()
        kept = whole[:cut].count(b"\n")
        assert lines[:kept] == whole.splitlines()[:kept]
        assert len(lines) == len(whole.splitlines())
        assert set(device.read_journal(str(path))[1]) == ids(plan)


KILLED = """
import sys, time
sys.path.append(sys.argv[1])
import device
class Slow:
    version = "1.0"
    def load(self, blob, inputs):
        return lambda: time.sleep(0.002)
device.profile(device.Bundle(sys.argv[2]), sys.argv[3], runtime=Slow())
"""


def test_killed_at_fifty_random_points_it_ends_with_the_same_rows(tmp_path: Path) -> None:
    plan, draw = small_plan(30), random.Random(1)
    bundle, journal = plan.save(tmp_path / "b.pyz"), tmp_path / "j"
    command = [sys.executable, "-S", "-c", KILLED, str(Path(device.__file__).parents[1]), str(bundle), str(journal)]
    kills = 0
    while kills < 50:
        process = subprocess.Popen(command)
        try:
            process.wait(timeout=draw.uniform(0.05, 0.3))
            journal.unlink()  # it got through: begin again, there are kills left
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    assert subprocess.run(command, check=False).returncode == 0
    lines = journal.read_text().splitlines()
    assert len(lines) == len(plan.jobs) + 1
    assert set(device.read_journal(str(journal))[1]) == ids(plan)


def test_a_journal_of_another_plan_is_refused(tmp_path: Path) -> None:
    run(small_plan(3), tmp_path / "j")
    with pytest.raises(device.ProfileError, match="another plan"):
        run(small_plan(4), tmp_path / "j")


@pytest.mark.parametrize(("name", "other"), [("device", "Raspberry Pi 5"), ("machine", "riscv64"), ("emulated", True)])
def test_a_journal_begun_on_another_device_is_not_gone_on_with(
    name: str, other: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times of two devices make no table; what is whole already may be read anywhere."""
    plan, path = small_plan(3), tmp_path / "j"
    run(plan, path)
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:3]))
    before, said = path.read_text(), state.provenance({"version": Idle.version})
    monkeypatch.setattr(profiler, "provenance", lambda setting: {**said, name: other})
    with pytest.raises(device.ProfileError, match=rf"begun with {name}.*--journal"):
        run(plan, path)
    assert path.read_text() == before
    path.write_text(whole)
    assert set(run(plan, path).rows) == ids(plan)


def test_a_journal_begun_under_another_version_of_the_runtime_is_not_gone_on_with(tmp_path: Path) -> None:
    plan, updated = small_plan(3), Idle()
    run(plan, tmp_path / "j")
    (tmp_path / "j").write_text("".join((tmp_path / "j").read_text().splitlines(keepends=True)[:3]))
    updated.version = "1.1"
    with pytest.raises(device.ProfileError, match=r"begun with runtime_version '1\.0' and here it is '1\.1'"):
        run(plan, tmp_path / "j", updated)
    assert set(run(plan, tmp_path / "j").rows) == ids(plan)


def test_two_processes_do_not_write_one_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diplugin.latency.device.journal.WAIT_S", 0.0)
    plan = small_plan(3)
    first = device.Journal(str(tmp_path / "j"), plan.plan)
    with pytest.raises(device.ProfileError, match="another process"):
        device.Journal(str(tmp_path / "j"), plan.plan)
    waited: list[int] = []

    def wait() -> None:
        waited.append(1)
        first.close()

    device.Journal(str(tmp_path / "j"), plan.plan, wait).close()
    assert waited == [1]


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_nothing_can_be_locked_a_journal_is_written_all_the_same(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On shares that know no locks; with --wait it waited for nobody, for ever."""

    def refuse(*_: Any) -> None:
        raise OSError(reason, "no locks here")

    plan = small_plan(3)
    monkeypatch.setattr(fcntl, "flock", refuse)
    done = device.profile(plan, str(tmp_path / "j"), runtime=Idle(), wait=lambda: pytest.fail("waited"))
    assert set(done.rows) == ids(plan)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    journal = device.Journal(str(tmp_path / "j"), small_plan(2).plan)
    journal.path = "/dev/full"
    with pytest.raises(device.ProfileError, match="make room"):
        journal.start({})
    journal.close()


def mutated(whole: bytes, seed: int) -> bytes:
    draw = random.Random(seed)
    lines = whole.splitlines(keepends=True)
    i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = seed % 5
    if kind == 0:
        return whole[: draw.randrange(len(whole))]
    if kind == 1:
        at = draw.randrange(len(whole))
        return whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :]
    if kind == 2:
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == 3:
        lines.insert(i, lines[j])
    else:
        hostile = [b"null\n", b"[" * 9999 + b"\n", b'{"id": "\xff"}\n', b"\x00\n", b'{"crc": "00000000"}\n', b"1e999\n"]
        lines.insert(i, draw.choice(hostile))
    return b"".join(lines)


@pytest.mark.parametrize("seed", range(100))
def test_a_mutated_journal_reads_right_or_fails_in_one_line(seed: int, tmp_path: Path) -> None:
    plan = small_plan(6)
    run(plan, tmp_path / "j")
    _, good = device.read_journal(str(tmp_path / "j"))
    (tmp_path / "m").write_bytes(mutated((tmp_path / "j").read_bytes(), seed))
    try:
        _, rows = device.read_journal(str(tmp_path / "m"))
    except device.ProfileError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
    else:
        assert all(good[name] == row for name, row in rows.items())


def sealed_row(**changes: Any) -> str:
    row = {
        "id": "a",
        "n": 0,
        "cpu_ms": 1.0,
        "wall_ms": 1.0,
        "cv": 0.0,
        "ratio": 1.0,
        "runs": 1,
        "rounds": 1,
        "attempts": 1,
        "sentinel_ms": 1.0,
        "peak_mb": 1.0,
        "unstable": False,
    }
    return sealed({**row, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"cpu_ms": -1.0},
        {"cpu_ms": 1e9},
        {"cv": "0"},
        {"n": 1.5},
        {"n": True},
        {"unstable": 0},
        {"id": 3},
        {"more": 1},
        {"wall_ms": None},
        {"format": "other"},
    ],
)
def test_a_row_that_cannot_be_is_refused_though_its_checksum_fits(changes: dict[str, Any], tmp_path: Path) -> None:
    header = sealed({"format": JOURNAL_FORMAT, "schema": 1, "plan_sha256": "x", "provenance": {}})
    (tmp_path / "j").write_text(header + sealed_row(**changes))
    with pytest.raises(device.ProfileError, match="line 2"):
        device.read_journal(str(tmp_path / "j"))


def test_rows_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    header = sealed({"format": JOURNAL_FORMAT, "schema": 1, "plan_sha256": "x", "provenance": {}})
    (tmp_path / "j").write_text(header + sealed_row() + sealed_row(cpu_ms=2.0, n=1))
    with pytest.raises(device.ProfileError, match="contradicts"):
        device.read_journal(str(tmp_path / "j"))
    (tmp_path / "j").write_text(sealed_row())
    with pytest.raises(device.ProfileError, match="header"):
        device.read_journal(str(tmp_path / "j"))


@pytest.mark.parametrize(
    "key",
    [
        [],
        ["conv"],
        ["conv", 8, 8, [1, 1], [1, 1], [0, 0], [1, 1], 3, [2, 2], "", 1, "float32", "NCHW"],
        ["conv", 8, 8, [1, 1], [1, 1], [0, 0], [1, 1], 0, [2, 2], "", 1, "float32", "NCHW"],
        ["conv", 8, 8, [1, 1], [0, 0], [0, 0], [1, 1], 1, [2, 2], "", 1, "float32", "NCHW"],
        ["conv", 8, 10**400, [1, 1], [1, 1], [0, 0], [1, 1], 1, [2, 2], "", 1, "float32", "NCHW"],
        "x" * 13,
    ],
    ids=range(7),
)
def test_a_plan_whose_keys_are_no_operators_makes_no_table(key: Any, tmp_path: Path) -> None:
    plan = small_plan(2)
    document = plan.plan
    next(job for job in document["jobs"] if job["kind"] == "entry")["detail"]["key"] = key
    document["jobs"][1].update(kind="net", detail={"name": "n", "keys": [key]})
    document["sha256"] = device.plan_sha256(document)
    journal = device.Journal(str(tmp_path / "j"), document)
    journal.start({})
    for row in run(plan, tmp_path / "rows").rows.values():
        journal.add(row)
    journal.close()
    with pytest.raises(TableError, match="plan and profile again") as error:
        finish(document, tmp_path / "j")
    assert "\n" not in str(error.value)


def test_rows_of_a_clock_that_stands_still_make_no_table(tmp_path: Path) -> None:
    plan = small_plan(2)
    journal = device.Journal(str(tmp_path / "j"), plan.plan)
    journal.start({})
    for row in run(plan, tmp_path / "rows").rows.values():
        journal.add({**row, "sentinel_ms": 0.0 if row["n"] == 2 else 1.0})
    journal.close()
    with pytest.raises(TableError, match="no time"):
        finish(plan.plan, tmp_path / "j")


@pytest.mark.parametrize("words", [{"name": "n" * 81}, {"device_name": "two\nlines"}])
def test_words_that_no_table_holds_are_no_fault_of_the_profile(words: dict[str, str], tmp_path: Path) -> None:
    plan = small_plan(2)
    run(plan, tmp_path / "j")
    with pytest.raises(TableError, match="in other words"):
        finish(plan.plan, tmp_path / "j", **words)
