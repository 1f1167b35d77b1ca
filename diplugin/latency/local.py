"""Profiling this very machine.

`profile_here` probes the staircase first and lets the measured alignment thin the grid, times the unpruned net to
foresee how long the rest takes, and thins further until it fits the time it was given.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TableError
from ..network import NetworkTrace, trace_network
from ..tables import Alignment, LatencyTable, Setting
from ..whole_files import check_writable
from . import device
from .finish import finish, load_bundle, table_from_rows
from .graphs import Graphs, OnnxGraphs
from .plan import (
    QUICK,
    THOROUGH,
    UNPRUNED,
    ProfilePlan,
    Protocol,
    estimate_seconds,
    job_seconds,
    make_plan,
    net_detail,
    plan_nets,
    plan_probes,
    runtime_setting,
)

if TYPE_CHECKING:
    from .torch_runtime import TorchRuntime

Progress = Callable[[int, int], None]
#: Widths a channel group where those that were asked for take too long.
FEWER_POINTS = (8, 6, 4, 3)


@dataclass(frozen=True)
class Subject:
    """What is profiled, in which number type, and under what: `runtime` is None for ONNX Runtime."""

    model: Any
    example_inputs: tuple[Any, ...]
    trace: NetworkTrace
    setting: Setting
    runtime: TorchRuntime | None = None
    dtype: str = "float32"

    @property
    def graphs(self) -> Graphs:
        return self.runtime if self.runtime is not None else OnnxGraphs()


# What the sentinel has usually taken in this process' runs: a slow minute is told from a slow machine.
_USUAL: dict[Setting, tuple[float, ...]] = {}
MOST_KNOWN = 8


def profile_here(
    model: Any, example_inputs: tuple[Any, ...], *, trace: NetworkTrace | None = None, name: str = "this-machine",
    threads: int = 1, budget_s: float = 120.0, points: int = 8, nets: int = 16, seed: int = 0,
    protocol: Protocol | None = None, runtime: TorchRuntime | None = None, dtype: str = "float32",
    journal: str | Path | None = None, out: str | Path | None = None, progress: Progress | None = None,
) -> LatencyTable:  # fmt: skip
    """Measure every operator that a search on this model can ask for, on this machine, in ONNX Runtime.

    Args:
        model, example_inputs: the unpruned network and its positional inputs, a tuple.
        trace: of them, if at hand.
        name: of the table.
        threads: of the runtime.
        budget_s: aim to spend at most about this many seconds; the grid is thinned until it fits.
        points: at most about this many widths a channel group.
        nets: randomly pruned nets to time end to end for the calibration, at least 10.
        protocol: rounds and runs; by default the thorough one if it fits the budget, else a quicker one.
        runtime: torch instead of ONNX Runtime, on a CPU or a CUDA GPU; `threads` is then its own.
        dtype: "float32", or "int8" for the network's quantized form (ONNX Runtime alone).
        journal: keep the journal here with its bundle, and go on with both if they are there (torch has no bundle).
        out: also write the table here; a place that cannot be written is told before anything is timed.
        progress: called with (jobs done, jobs in all).

    Raises:
        ModelError: the model cannot be traced or exported.
        TableError: the journal belongs to other work: another network or another setting.
        OSError: `out` or `journal` cannot be written.
    """
    trace = trace or trace_network(model, example_inputs)
    setting = runtime.setting if runtime is not None else runtime_setting(threads)
    subject = Subject(model, example_inputs, trace, setting, runtime, dtype)
    if out is not None:
        check_writable(out)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(journal) if journal is not None else Path(folder) / "journal.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        bundle: Any = path.with_suffix(".pyz")
        if path.exists() and bundle.exists():
            bundle = load_bundle(bundle)
            _check_same_work(bundle.plan, subject, path)
        else:
            alignment, net_ms = probe(subject)
            plan = fitting_plan(subject, alignment, net_ms, name=name, budget_s=budget_s, points=points, nets=nets,
                                seed=seed, protocol=protocol)  # fmt: skip
            if journal is not None and runtime is None:
                plan.save(bundle)
            bundle = plan
        run_bundle(bundle, path, progress, runtime)
        table = finish(bundle.plan, path, name=name)
    if out is not None:
        table.save(out)
    return table


def _check_same_work(plan: Mapping[str, Any], subject: Subject, journal: Path) -> None:
    """Refuse to go on with a plan of another network, or under another setting."""
    unpruned = net_detail(UNPRUNED, subject.trace, subject.trace.base_widths, subject.dtype)
    nets = [job["detail"] for job in plan["jobs"] if job["kind"] == "net"]
    if unpruned not in nets or Setting(**plan["setting"]) != subject.setting:
        raise TableError(f"expected a journal of this network under {subject.setting.text}, got {str(journal)!r} of "
                         "other work: name another one")  # fmt: skip


def run_bundle(bundle: Any, journal: Path, progress: Progress | None = None, runtime: Any = None) -> device.Journal:
    """Time a bundle's jobs here, into a journal.

    Raises:
        TableError: the journal is damaged or of another plan, or the runtime is missing.
    """
    try:
        setting = Setting(**bundle.plan["setting"])
        known = _USUAL.get(setting, ())
        done = device.profile(bundle, str(journal), progress, runtime, known=known)
    except device.ProfileError as error:
        raise TableError(str(error)) from None
    _USUAL[setting] = (*known, device.floor_of([row["sentinel_ms"] for row in done.rows.values()]))[-MOST_KNOWN:]
    return done


def probe(subject: Subject) -> tuple[Alignment, float]:
    """The machine's alignment and the unpruned net's time in ms, in about two seconds."""
    plan = ProfilePlan("probe", subject.setting, QUICK, subject.graphs)
    plan_probes(plan, subject.trace, subject.dtype)
    net = plan.graphs.net(subject.model, subject.example_inputs, UNPRUNED, subject.dtype)
    plan.add("net", net, {"name": UNPRUNED, "keys": []})
    with tempfile.TemporaryDirectory() as folder:
        rows = run_bundle(plan, Path(folder) / "probe.jsonl", runtime=subject.runtime).rows
    table = table_from_rows(plan.plan, rows, {})
    return table.alignment, table.nets[0].measured_ms


def fitting_plan(
    subject: Subject, alignment: Alignment, net_ms: float, *, name: str, budget_s: float, points: int, nets: int,
    seed: int, protocol: Protocol | None,
) -> ProfilePlan:  # fmt: skip
    """The richest plan that should take no longer than `budget_s`; the poorest there is if none does."""
    counts = (points, *(fewer for fewer in FEWER_POINTS if fewer < points))
    choices = [(count, chosen) for chosen in ([protocol] if protocol else [THOROUGH, QUICK]) for count in counts]
    model, inputs, trace = subject.model, subject.example_inputs, subject.trace
    plan = ProfilePlan(name, subject.setting)
    for count, chosen in choices:
        plan = make_plan(model, inputs, trace, name=name, setting=subject.setting, alignment=alignment, points=count,
                         nets=0, protocol=chosen, probes=False, graphs=subject.graphs, dtype=subject.dtype)  # fmt: skip
        plan.alignment = alignment
        plan.estimated_s = estimate_seconds(plan, trace, net_ms) + nets * job_seconds(chosen, "net", net_ms)
        if plan.estimated_s <= budget_s:
            break
    plan_nets(plan, model, inputs, trace, nets, seed, subject.dtype)
    return plan


def is_this_machine(table: LatencyTable) -> bool:
    """Whether a table is of a machine like this one, under a setting that finished files are timed under here."""
    here = device.device_model()
    if here != table.provenance.get("device") and here[:160] != table.device:
        return False
    try:
        return table.setting == runtime_setting(table.setting.threads)
    except ImportError:
        return False
