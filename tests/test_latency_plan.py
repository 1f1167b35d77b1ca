"""Profile plans: exactly what a search can ask for, once, in one file that runs by itself."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from diplugin.cli import main
from diplugin.costs.latency import LatencyCost, timed_layers
from diplugin.errors import TableError
from diplugin.latency import device, finish, load_bundle
from diplugin.latency.finish import table_from_rows
from diplugin.latency.grid import group_grids
from diplugin.latency.plan import ProfilePlan, Protocol, estimate_seconds, make_plan, prune_to, runtime_setting
from diplugin.network import NetworkTrace, trace_network
from diplugin.tables import Alignment, Calibration, LatencyTable, OpKey

QUICK = Protocol(rounds=2, runs=2, min_runs=1, round_ms=0.2, warmup_ms=0.0, patience=1, gap_ms=0.0, pause_s=0.0)
INPUTS = (torch.zeros(1, 3, 8, 8),)


class Concat(nn.Module):
    """Two branches whose channels a third layer reads side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.join = nn.Sequential(nn.Conv2d(24, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.join(torch.cat([self.one(x), self.two(x)], 1)).mean((2, 3)))


def plain() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    twin = [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*body, *twin, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()


def plan_of(model: nn.Module, trace: NetworkTrace, nets: int = 0) -> ProfilePlan:
    return make_plan(model, INPUTS, trace, name="p", setting=runtime_setting(), alignment=Alignment(4, 8), nets=nets,
                     protocol=QUICK, probes=False)  # fmt: skip


def keys(plan: ProfilePlan) -> set[OpKey]:
    return {OpKey.from_row(job.detail["key"]) for job in plan.jobs if job.kind == "entry"}


def test_a_plan_covers_every_width_on_the_grid_and_nothing_twice() -> None:
    model = plain()
    trace = trace_network(model, INPUTS)
    plan = plan_of(model, trace)
    assert plan.grid == group_grids(trace, Alignment(4, 8)) and all(len(w) == 4 for w in plan.grid.values())
    wanted = {layer.key({**trace.base_widths, **dict(zip(trace.base_widths, widths, strict=True))})
              for layer in timed_layers(trace)
              for widths in product((4, 8, 12, 16), repeat=3)}  # fmt: skip
    assert keys(plan) == wanted
    # The two inner layers are alike, so they share their 16 entries; stem and head have 4 each.
    assert plan.count("entry") == len(wanted) == 16 + 4 + 4
    assert len({job.id for job in plan.jobs}) == len(plan.jobs)


def test_random_nets_ask_only_for_entries_of_the_plan() -> None:
    model = plain()
    trace = trace_network(model, INPUTS)
    plan = plan_of(model, trace, nets=5)
    rows = [job.detail["keys"] for job in plan.jobs if job.kind == "net"]
    assert len(rows) == 6
    assert {OpKey.from_row(row) for net in rows for row in net} <= keys(plan)


def test_pruning_for_timing_gives_the_widths_asked_for() -> None:
    model = plain()
    trace = trace_network(model, INPUTS)
    widths = dict.fromkeys(trace.base_widths, 8)
    pruned = prune_to(model, INPUTS, trace, widths)
    assert trace_network(pruned, INPUTS).base_widths == widths
    assert trace_network(model, INPUTS).base_widths == trace.base_widths


def test_a_concatenations_reader_is_profiled_over_its_total_width() -> None:
    torch.manual_seed(0)
    model = Concat().eval()
    trace = trace_network(model, INPUTS)
    read = sorted({key.cin for key in keys(plan_of(model, trace)) if key.kernel == (3, 3) and key.cin > 3})
    assert read[-1] == 24 and len(read) >= 3


def test_the_bundle_runs_by_itself_and_finishes(tmp_path: Path) -> None:
    model = plain()
    trace = trace_network(model, INPUTS)
    bundle = plan_of(model, trace, nets=10).save(tmp_path / "b.pyz")
    done = subprocess.run(
        [sys.executable, "-I", str(bundle), "--quiet"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    table = finish(load_bundle(bundle).plan, tmp_path / "b.jsonl", device_name="bench")
    assert table.device == "bench" and table.name == "p"
    assert len(table.nets) == 11 and table.plan_sha256 == load_bundle(bundle).plan["sha256"]
    table = replace(table, calibration=Calibration(1.0, 0.0, 11, 0.0, 0.0, 1.0))  # nets this small need not fit a line
    cost = LatencyCost(trace, table)
    assert cost.cost(dict.fromkeys(trace.base_widths, 8)) > 0
    assert all(cost.allowed_widths(group) for group in trace.base_widths)


def test_a_device_without_a_runtime_is_told_what_to_install(tmp_path: Path) -> None:
    model = plain()
    bundle = plan_of(model, trace_network(model, INPUTS)).save(tmp_path / "b.pyz")
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(bundle)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "pip install" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_bundle_holds_no_weights_and_no_code_but_the_device_files(tmp_path: Path) -> None:
    model = plain()
    bundle = plan_of(model, trace_network(model, INPUTS), nets=1).save(tmp_path / "b.pyz")
    with zipfile.ZipFile(bundle) as archive:
        names = archive.namelist()
        code = {f"device/{path.name}" for path in Path(device.__file__).parent.glob("*.py")}
        assert {n for n in names if not n.startswith("blobs/")} == {"__main__.py", "plan.json", *code}
        assert json.loads(archive.read("plan.json"))["format"] == "diplugin-profile-plan"
    assert [p.name for p in tmp_path.iterdir()] == ["b.pyz"]


def test_finish_wants_the_whole_journal_of_its_own_plan(tmp_path: Path) -> None:
    model = plain()
    plan = plan_of(model, trace_network(model, INPUTS))
    with pytest.raises(TableError, match="cannot be read"):
        finish(plan.plan, tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(TableError, match="header"):
        finish(plan.plan, tmp_path / "empty.jsonl")
    journal = device.Journal(str(tmp_path / "begun.jsonl"), plan.plan)
    journal.start({})
    journal.close()
    with pytest.raises(TableError, match="lacks"):
        finish(plan.plan, tmp_path / "begun.jsonl")
    with pytest.raises(TableError, match="another plan"):
        finish({**plan.plan, "sha256": "0" * 64}, tmp_path / "begun.jsonl")


def test_estimates_grow_with_the_plan() -> None:
    model = plain()
    trace = trace_network(model, INPUTS)
    short, long = (
        estimate_seconds(plan_of(model, trace), trace, 1.0),
        estimate_seconds(plan_of(model, trace, 4), trace, 1.0),
    )
    assert 0 < short < long < estimate_seconds(plan_of(model, trace, 4), trace, 50.0)


def nets_in(plan: ProfilePlan) -> int:
    return sum(job["kind"] == "net" for job in plan.plan["jobs"])


def test_a_burst_that_disturbs_one_pass_of_every_job_leaves_no_trace() -> None:
    model = plain()
    plan = plan_of(model, trace_network(model, INPUTS), nets=3)
    thrice = replace(plan, protocol=replace(QUICK, passes=3))
    assert nets_in(replace(plan, protocol=replace(QUICK, passes=3, net_turns=2))) == 6 * nets_in(plan)
    row = {"wall_ms": 9.0, "cv": 0.0, "sentinel_ms": 1.0, "unstable": False}
    calm = {job["id"]: {**row, "cpu_ms": 1.0 + i / 7} for i, job in enumerate(plan.plan["jobs"])}
    rows = {}
    for i, job in enumerate(thrice.plan["jobs"]):
        number, place = divmod(i, len(calm))
        before = rows[job["id"]] = calm[job["id"].split(".")[0]]
        if number == place % 3:  # every job is disturbed, in one pass or another
            rows[job["id"]] = {**before, "cpu_ms": 2 * before["cpu_ms"]}
        if number == (place + 1) % 3:  # fast, but not to be trusted
            rows[job["id"]] = {**before, "cpu_ms": before["cpu_ms"] / 2, "unstable": True}
    assert len(rows) == 3 * len(calm)
    quiet, disturbed = (table_from_rows(p.plan, r, {}) for p, r in ((plan, calm), (thrice, rows)))
    assert disturbed.entries == quiet.entries and disturbed.nets == quiet.nets
    assert disturbed.overhead_ms == quiet.overhead_ms


def test_a_device_that_tells_its_cache_gets_a_refill_from_its_nets() -> None:
    model = plain()
    trace = trace_network(model, INPUTS)
    plan = plan_of(model, trace, nets=24)
    row = {"wall_ms": 9.0, "cv": 0.0, "sentinel_ms": 1.0, "unstable": False}
    rows = {job["id"]: {**row, "cpu_ms": 0.1} for job in plan.plan["jobs"]}
    for job in plan.plan["jobs"]:
        if job["kind"] == "entry":
            rows[job["id"]] = {**row, "cpu_ms": 0.1 + 1e-5 * OpKey.from_row(job["detail"]["key"]).macs}
    sums = {net.name: net.sum_ms for net in table_from_rows(plan.plan, rows, {}).nets}
    cache = 4096
    for job in plan.plan["jobs"]:
        if job["kind"] == "net":
            # Weights of a layer: what it reads times what it writes times its kernel.
            floats = sum(k[1] * k[2] * (9 if k[0] == "conv" else 1) for k in job["detail"]["keys"])
            paid = 0.5 if 4 * floats > cache else 0.0
            rows[job["id"]] = {**row, "cpu_ms": 1.2 * sums[job["detail"]["name"]] + 0.3 + paid}
    told = table_from_rows(plan.plan, rows, {"l2_kb": cache // 1024})
    assert told.calibration is not None and told.calibration.mape < 1e-6
    found = told.calibration.scale, told.calibration.offset_ms, told.calibration.refill_ms
    assert found == pytest.approx((1.2, 0.3, 0.5), rel=1e-5) and told.calibration.cache_mb == cache / 1e6
    assert LatencyCost(trace, told).base == pytest.approx(1.2 * sums["unpruned"] + 0.8, rel=1e-5)
    for silent in ({}, {"l2_kb": 0}, {"l2_kb": "many"}):
        line = table_from_rows(plan.plan, rows, silent).calibration
        assert line is not None and line.refill_ms == 0 and line.mape > 0.005


def test_no_threads_is_refused() -> None:
    with pytest.raises(TableError, match="thread"):
        runtime_setting(0)


def test_int8_is_planned_with_its_nets_run_and_calibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = plain()
    trace = trace_network(model, INPUTS)
    plan = make_plan(
        model, INPUTS, trace, name="p", setting=runtime_setting(), alignment=Alignment(4, 4), nets=12, protocol=QUICK,
        dtype="int8",
    )  # fmt: skip
    assert {key.dtype for key in keys(plan)} == {"int8"}
    assert {job.detail["dtype"] for job in plan.jobs if job.kind == "edge"} == {"int8"}
    assert {key[-2] for job in plan.jobs if job.kind == "net" for key in job.detail["keys"]} == {"int8"}
    rows = {i: {**row, "sentinel_ms": 1.0} for i, row in device.profile(plan, str(tmp_path / "j")).rows.items()}
    # Times this short scatter; what nets take is made up from their sums.
    raw = table_from_rows(plan.plan, rows, {})
    nets = {job.id: job.detail["name"] for job in plan.jobs if job.kind == "net"}
    sums = {net.name: net.sum_ms for net in raw.nets}
    steady = {i: {**row, "cpu_ms": 1.2 * sums[nets[i]]} if i in nets else row for i, row in rows.items()}
    table = table_from_rows(plan.plan, steady, {})
    assert table.dtype == "int8" and table.calibration is not None
    assert table.calibration.scale == pytest.approx(1.2, rel=1e-2) and table.calibration.mape < 1e-3
    cost = LatencyCost(trace, LatencyTable.load(table.save(tmp_path / "t.json")))
    assert cost.base == pytest.approx(1.2 * sums["unpruned"], rel=1e-2)
    assert "int8" in cost.text and "held-out error" in cost.text
    assert main(["tables", "show", str(tmp_path / "t.json")]) == 0
    shown = capsys.readouterr().out
    assert "int8 operators" in shown and "held-out error" in shown
    with pytest.raises(TableError, match="float32"):
        LatencyCost(trace, table, dtype="float32")


def test_edges_of_plans_made_before_int8_are_float(tmp_path: Path) -> None:
    model = plain()
    plan = plan_of(model, trace_network(model, INPUTS))
    rows = device.profile(plan, str(tmp_path / "j")).rows
    document = json.loads(json.dumps(plan.plan))
    for job in document["jobs"]:
        job["detail"].pop("dtype", None)
    assert table_from_rows(document, rows, {}).entries == table_from_rows(plan.plan, rows, {}).entries


def test_a_bundle_run_on_an_emulator_guides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPLUGIN_EMULATED", "1")
    model = plain()
    trace = trace_network(model, INPUTS)
    plan = plan_of(model, trace)
    device.profile(plan, str(tmp_path / "j"))
    table = finish(plan.plan, tmp_path / "j")
    assert table.emulated and LatencyTable.load(table.save(tmp_path / "t.json")).emulated
    with pytest.raises(TableError, match="emulator"):
        LatencyCost(trace, table)
