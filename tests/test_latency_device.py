"""The file that runs on a device: journals that survive anything, times that are picked right."""

from __future__ import annotations

import ast
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diplugin.errors import TableError
from diplugin.latency import device
from diplugin.latency.finish import finish, table_from_rows
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


class Idle:
    """A runtime without work."""

    version = "1.0"

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self.loads = 0
        self.before = before

    def load(self, blob: bytes, inputs: Any) -> Callable[[], None]:
        self.loads += 1
        self.before()
        return lambda: None


def run(plan: ProfilePlan, journal: Path, runtime: Any = None) -> device.Journal:
    return device.profile(plan, str(journal), runtime=runtime or Idle())


def ids(plan: ProfilePlan) -> set[str]:
    return {job.id for job in plan.jobs}


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
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("device", sys.argv[1])
device = importlib.util.module_from_spec(spec); spec.loader.exec_module(device)
class Slow:
    version = "1.0"
    def load(self, blob, inputs):
        return lambda: time.sleep(0.002)
device.profile(device.Bundle(sys.argv[2]), sys.argv[3], runtime=Slow())
"""


def test_killed_at_fifty_random_points_it_ends_with_the_same_rows(tmp_path: Path) -> None:
    plan, draw = small_plan(30), random.Random(1)
    bundle, journal = plan.save(tmp_path / "b.pyz"), tmp_path / "j"
    command = [sys.executable, "-S", "-c", KILLED, device.__file__, str(bundle), str(journal)]
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


def test_two_processes_do_not_write_one_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "WAIT_S", 0.0)
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


def sealed(**changes: Any) -> str:
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
    return device.sealed({**row, **changes})


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
    header = device.sealed({"format": device.JOURNAL_FORMAT, "schema": 1, "plan_sha256": "x", "provenance": {}})
    (tmp_path / "j").write_text(header + sealed(**changes))
    with pytest.raises(device.ProfileError, match="line 2"):
        device.read_journal(str(tmp_path / "j"))


def test_rows_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    header = device.sealed({"format": device.JOURNAL_FORMAT, "schema": 1, "plan_sha256": "x", "provenance": {}})
    (tmp_path / "j").write_text(header + sealed() + sealed(cpu_ms=2.0, n=1))
    with pytest.raises(device.ProfileError, match="contradicts"):
        device.read_journal(str(tmp_path / "j"))
    (tmp_path / "j").write_text(sealed())
    with pytest.raises(device.ProfileError, match="header"):
        device.read_journal(str(tmp_path / "j"))


def test_a_bundle_that_is_none(tmp_path: Path) -> None:
    plan = small_plan(2)
    good = plan.save(tmp_path / "good.pyz")
    document = plan.plan
    cases = {"text": b"hello", "empty": b"", "cut": good.read_bytes()[:-40]}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    for name, changed in (("edited", {**document, "name": "x"}), ("newer", {**document, "schema": 9}), ("list", [1])):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("plan.json", json.dumps(changed))
    for name in (*cases, "edited", "newer", "list", "missing"):
        with pytest.raises(device.ProfileError) as error:
            device.Bundle(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_damaged_graph_is_refused(tmp_path: Path) -> None:
    plan = small_plan(2)
    name = plan.jobs[0].blob
    plan.blobs[name] += b" "
    with pytest.raises(device.ProfileError, match="damaged"):
        device.Bundle(plan.save(tmp_path / "b.pyz")).blob(name)


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
    timer = device.Timer({"id": "a"}, job, protocol, True)
    while not timer.done:
        timer.round()
    row = timer.row(0.5, False)
    assert row["cpu_ms"] == pytest.approx(1.0) and not row["unstable"] and row["rounds"] == 8


def test_a_job_that_never_settles_is_tried_again_and_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = {"rounds": 4, "runs": 1, "min_runs": 1, "round_ms": 1.0, "warmup_ms": 0.0, "patience": 3}
    timer = device.Timer({"id": "a"}, Clocked(monkeypatch, lambda run: 1.0 + run % 7), protocol, True)
    while not timer.done:
        timer.round()
    row = timer.row(0.5, False)
    assert row["unstable"] and row["rounds"] == 12 and row["attempts"] == 3


def test_rows_of_a_throttled_device_are_taken_again_then_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, looks = small_plan(1), [0]

    def throttled() -> bool:
        looks[0] += 1
        return looks[0] <= 2

    monkeypatch.setattr(device, "DRIFT", float("inf"))
    monkeypatch.setattr(device, "throttled", throttled)
    rows = run(plan, tmp_path / "once").rows
    chunks = -(-len(plan.jobs) // FAST.chunk)
    assert looks[0] == chunks + 2 and len(rows) == len(plan.jobs)
    monkeypatch.setattr(device, "throttled", lambda: True)
    assert all(row["unstable"] for row in run(plan, tmp_path / "always").rows.values())


def test_vcgencmd_and_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, expected in (
        ("throttled=0x0", False),
        ("throttled=0x50000", False),
        ("throttled=0x50005", True),
        ("", False),
    ):
        monkeypatch.setattr(device, "tool", lambda *_, said=said: said)
        assert device.throttled() is expected


def test_provenance_is_plain_printable_and_bounded() -> None:
    found = device.provenance({"version": "1.0"})
    assert found["device"] and found["machine"] and found["emulated"] is False
    assert all(isinstance(v, bool | int | float) or (v.isprintable() and len(v) <= 500) for v in found.values())


@pytest.mark.parametrize(
    ("machine", "texts", "expected"),
    [
        ("aarch64", {"/proc/cpuinfo": "model name : Cortex-A76"}, False),
        ("aarch64", {"/proc/cpuinfo": "vendor_id : GenuineIntel"}, True),
        ("aarch64", {"/proc/cpuinfo": "model name : ARMv8", "/proc/self/comm": "qemu-aarch64"}, True),
        ("x86_64", {"/proc/cpuinfo": "vendor_id : GenuineIntel"}, False),
    ],
)
def test_an_emulator_gives_itself_away(
    machine: str, texts: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "read_text", lambda path: texts.get(path, ""))
    monkeypatch.setattr(device.platform, "machine", lambda: machine)
    assert device.emulated() is expected


def test_the_device_file_needs_nothing_of_ours_and_little_else() -> None:
    tree = ast.parse(Path(device.__file__).read_text(), feature_version=(3, 8))
    top = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    top |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert top - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}


RECORDED = """#!/bin/sh
case "$*" in *--help*) echo "&&&& RUNNING TensorRT.trtexec [TensorRT v8502] # trtexec --help"; exit 0;; esac
for word; do case "$word" in
  --exportTimes=*) echo '[{"computeMs": 0.4}, {"computeMs": 0.5}]' > "${word#*=}";;
  --saveEngine=*) touch "${word#*=}";;
  --onnx=*) test -s "${word#*=}" || exit 1;;
esac; done
echo "$@" >> "$(dirname "$0")/calls"
"""


def test_trtexec_stands_behind_the_same_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "trtexec"
    tool.write_text(RECORDED)
    tool.chmod(0o755)
    monkeypatch.setenv("TRTEXEC", str(tool))
    plan = ProfilePlan("jetson", Setting("trtexec", "", "TensorRT-fp16", "all", 1), FAST)
    key = OpKey("conv", 8, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1, (2, 2))
    add_entries(plan, [key, replace(key, dtype="int8")])
    rows = device.profile(device.Bundle(plan.save(tmp_path / "b.pyz")), str(tmp_path / "j")).rows
    assert plan.count("edge") == 0 and set(rows) == ids(plan)
    assert all(row["wall_ms"] == 0.4 for row in rows.values())
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum("--onnx=" in call for call in calls) and all("--fp16" in call for call in calls if "--onnx=" in call)
    assert sum("--loadEngine=" in call for call in calls)
    assert sum("--int8" in call for call in calls) == 1, "the one engine with quantized layers"
    table = table_from_rows(plan.plan, rows, device.read_journal(str(tmp_path / "j"))[0]["provenance"])
    assert table.setting.version == "8.5.2"


def test_trtexec_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "trtexec"
    tool.write_text("#!/bin/sh\ncase $* in *help*) echo v8502;; *) echo out of memory; exit 1;; esac\n")
    tool.chmod(0o755)
    monkeypatch.setenv("TRTEXEC", str(tool))
    runtime = device.Trtexec({"provider": "TensorRT"})
    with pytest.raises(device.ProfileError, match="out of memory"):
        runtime.load(b"x", []).times(3)
    monkeypatch.setenv("TRTEXEC", str(tmp_path / "none"))
    with pytest.raises(device.ProfileError, match="found none"):
        device.Trtexec({"provider": "TensorRT"})


def test_trtexec_times_and_version() -> None:
    recorded = json.dumps(
        [
            {"startComputeMs": 1.0, "endComputeMs": 1.4, "computeMs": 0.4, "latencyMs": 0.5},
            {"startComputeMs": 2.0, "endComputeMs": 2.5, "computeMs": 0.5, "latencyMs": 0.6},
        ]
    )
    assert device.trtexec_times(recorded) == [0.4, 0.5]
    assert device.trtexec_version("&&&& RUNNING TensorRT.trtexec [TensorRT v8502] # trtexec --help") == "8.5.2"
    assert device.trtexec_version("[TensorRT v100300]") == "10.3.0"
    for text in ("", "{}", "[]", '[{"latencyMs": 1}]', '[{"computeMs": -1}]', '[{"computeMs": "x"}]', "[[]]", "null"):
        with pytest.raises(device.ProfileError):
            device.trtexec_times(text)


def rewritten(bundle: Path, change: Callable[[Any], None]) -> Path:
    """A bundle whose plan was changed by somebody who also mended its hash."""
    with zipfile.ZipFile(bundle) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    plan = json.loads(held["plan.json"])
    change(plan)
    plan["sha256"] = device.plan_sha256(plan)
    held["plan.json"] = device.canonical(plan).encode()
    with zipfile.ZipFile(bundle, "w") as archive:
        for name, data in held.items():
            archive.writestr(name, data)
    return bundle


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "no setting": lambda p: p.pop("setting"),
    "threads as text": lambda p: p["setting"].update(threads="2"),
    "no threads": lambda p: p["setting"].update(threads=0),
    "a runtime that is a list": lambda p: p["setting"].update(runtime=[]),
    "an unknown optimisation": lambda p: p["setting"].update(graph_optimization="utmost"),
    "a name with a control character": lambda p: p.update(name="a\x1b[2J"),
    "endless rounds": lambda p: p["protocol"].update(rounds=10**12),
    "no rounds": lambda p: p["protocol"].update(rounds=0),
    "a pause of years": lambda p: p["protocol"].update(pause_s=1e9),
    "a protocol without chunks": lambda p: p["protocol"].pop("chunk"),
    "jobs that are a number": lambda p: p.update(jobs=3),
    "no jobs": lambda p: p.update(jobs=[]),
    "a job that is a text": lambda p: p["jobs"].append("job"),
    "a job twice": lambda p: p["jobs"].append(p["jobs"][0]),
    "an unknown kind": lambda p: p["jobs"][2].update(kind="shell"),
    "a blob elsewhere": lambda p: p["jobs"][2].update(blob="../../etc/passwd"),
    "an input that fills the memory": lambda p: p["jobs"][2].update(inputs=[["x", [1 << 20, 1 << 20], "float32"]]),
    "a negative shape": lambda p: p["jobs"][2].update(inputs=[["x", [-1], "float32"]]),
    "inputs that are no triples": lambda p: p["jobs"][2].update(inputs=[["x"]]),
    "a sentinel that is nobody": lambda p: p.update(sentinel="x"),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_plan_that_makes_no_sense_is_one_line_though_its_hash_is_right(
    change: Callable[[Any], Any], tmp_path: Path
) -> None:
    bundle = rewritten(small_plan(2).save(tmp_path / "b.pyz"), change)
    with pytest.raises(device.ProfileError, match="profile plan") as error:
        device.Bundle(bundle)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


def test_a_graph_that_the_runtime_refuses_is_named(tmp_path: Path) -> None:
    def refuse() -> None:
        raise RuntimeError("ONNX Runtime only guarantees support for opset 15\nand more")

    with pytest.raises(device.ProfileError, match=r"does not run .* opset 15") as error:
        run(small_plan(2), tmp_path / "j", Idle(refuse))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key", [[], ["conv"], ["conv", 8, 8, [1, 1], [1, 1], [0, 0], [1, 1], 3, [2, 2], "", 1, "float32", "NCHW"], "x" * 13]
)
def test_a_plan_whose_keys_are_no_operators_makes_no_table(key: Any, tmp_path: Path) -> None:
    plan = small_plan(2)
    document = plan.plan
    next(job for job in document["jobs"] if job["kind"] == "entry")["detail"]["key"] = key
    document["sha256"] = device.plan_sha256(document)
    journal = device.Journal(str(tmp_path / "j"), document)
    journal.start({})
    for row in run(plan, tmp_path / "rows").rows.values():
        journal.add(row)
    journal.close()
    with pytest.raises(TableError, match="plan and profile again") as error:
        finish(document, tmp_path / "j")
    assert "\n" not in str(error.value)
