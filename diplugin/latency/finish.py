"""From a plan and its journal to a table: raw times become what an operator adds to a net.

A one-operator graph also pays for being called and, in a runtime that computes in a blocked layout, for reordering
its input and output. Both were timed apart. The call is taken off, and half of what the reordering took: it also brings
tensors into the cache, which a layer inside a net pays for too. The
nets timed end to end then give the calibration, which knows the cache that the device says it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import TableError
from ..tables import Alignment, Entry, LatencyTable, NetTiming, OpKey, Setting
from ..tables.checks import device_words, table_name
from ..tables.file_format import document_from_table, table_from_document
from . import device
from .calibration import MIN_NETS, calibrate, measured_alignment, own_cache_mb

MIN_SHARE = 0.2
EDGE_SHARE = 0.5
Row = Mapping[str, Any]
Edge = tuple[int, tuple[int, ...], int, str]


def finish(plan: Mapping[str, Any], journal: str | Path, *, name: str = "", device_name: str = "") -> LatencyTable:
    """The table of a plan's journal.

    Args:
        plan: as a bundle holds it.
        journal: what the device wrote.
        name: of the table; the plan's by default.
        device_name: the device in words; what it said about itself by default.

    Raises:
        TableError: a name that no table can have; the journal is damaged, of another plan, or lacks rows; or plan and
            rows make no sense together.
    """
    _check_words(name, device_name)
    header, rows = own_journal(plan, journal)
    if header is None:
        raise TableError(f"expected a profile journal in {str(journal)!r}, got one without a header: profile again")
    missing = [job["id"] for job in plan["jobs"] if job["id"] not in rows]
    if missing:
        raise TableError(f"the journal {str(journal)!r} lacks {len(missing)} of {len(plan['jobs'])} rows: run the "
                         f"bundle again with the same journal to go on")  # fmt: skip
    try:
        table = table_from_rows(plan, rows, header["provenance"], name=name, device_name=device_name)
        table_from_document(document_from_table(table))  # what is written must load again
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise TableError(f"expected rows and a plan that give a table, but {reason}: plan and profile again") from None
    return table


def _check_words(name: str, device_name: str) -> None:
    try:
        table_name(name, "the name")
        device_words(device_name, "the device")
    except ValueError as error:
        raise TableError(f"expected words that a table can hold, but {error}: name them in other words") from None


def own_journal(plan: Mapping[str, Any], journal: str | Path) -> tuple[Row | None, dict[str, Row]]:
    """The header of a plan's journal, None if it was not written yet, and its rows by job.

    Raises:
        TableError: the journal cannot be read, is damaged, or is of another plan.
    """
    try:
        header, rows = device.read_journal(str(journal))
    except device.ProfileError as error:
        raise TableError(str(error)) from None
    if header is not None and header["plan_sha256"] != plan["sha256"]:
        raise TableError(f"expected the journal of this bundle, got {str(journal)!r} of another plan: name another one")
    return header, rows


def load_bundle(path: str | Path) -> device.Bundle:
    """A bundle's plan and graphs.

    Raises:
        TableError: the file is no bundle.
    """
    try:
        return device.Bundle(path)
    except device.ProfileError as error:
        raise TableError(str(error)) from None


class _Times:
    """Rows by job, read as milliseconds of the clock that counts."""

    def __init__(self, plan: Mapping[str, Any], rows: Mapping[str, Row]) -> None:
        setting = plan["setting"]
        one_thread = setting["threads"] == 1 and setting["provider"] == "CPUExecutionProvider"
        self.clock = "cpu_ms" if one_thread else "wall_ms"
        if not all(row["sentinel_ms"] > 0 for row in rows.values()):
            raise ValueError("a sentinel took no time")
        self.plan, self.rows = plan, rows
        self.usual_ms = device.floor_of([row["sentinel_ms"] for row in rows.values()])

    def unstable(self, row: Row) -> bool:
        """Whether a row scattered, or the device was not as fast as usual while it was timed."""
        return row["unstable"] or device.drifted(row["sentinel_ms"], self.usual_ms)

    def ms(self, row: Row) -> float:
        """A row's time; one taken in a slow minute, or a fast moment, is corrected as the sentinel beside it says."""
        off = device.drifted(row["sentinel_ms"], self.usual_ms)
        return row[self.clock] * (self.usual_ms / row["sentinel_ms"] if off else 1.0)

    def of(self, *kinds: str) -> Iterator[tuple[Mapping[str, Any], Row, float]]:
        """Detail, row and time of every job of these kinds; where several passes timed it, of the best row."""
        best: dict[str, tuple[Mapping[str, Any], Row]] = {}
        for job in self.plan["jobs"]:
            if job["kind"] in kinds:
                name, row = device.canonical([job["kind"], job["detail"]]), self.rows[job["id"]]
                if name not in best or self._rank(row) < self._rank(best[name][1]):
                    best[name] = (job["detail"], row)
        for detail, row in best.values():
            yield detail, row, self.ms(row)

    def _rank(self, row: Row) -> tuple[bool, float]:
        """Rows that can be trusted come first, then faster ones: what disturbs a device only ever adds."""
        return self.unstable(row), self.ms(row)


def table_from_rows(
    plan: Mapping[str, Any], rows: Mapping[str, Row], provenance: Mapping[str, Any], *,
    name: str = "", device_name: str = "",
) -> LatencyTable:  # fmt: skip
    """The table of a complete set of rows."""
    times = _Times(plan, rows)
    overhead = next((ms for _, _, ms in times.of("call")), 0.0)
    edges = _edges(times, overhead)
    entries: dict[OpKey, Entry] = {}
    probes: list[OpKey] = []
    for kind in ("entry", "probe"):
        for detail, row, ms in times.of(kind):
            key = OpKey.from_row(detail["key"])
            net = max(MIN_SHARE * ms, ms - overhead - EDGE_SHARE * _edge_ms(edges, key))
            entry = Entry(key, net, row["cpu_ms"], row["wall_ms"], row["cv"], times.unstable(row))
            entries.setdefault(key, entry)
            probes += [key] if kind == "probe" else []
    timed = [(_net(detail, row, ms, entries), times.unstable(row)) for detail, row, ms in times.of("net")]
    nets, steady = tuple(net for net, _ in timed), [net for net, unstable in timed if not unstable]
    known = plan["alignment"]
    version = provenance.get("runtime_version") or plan["setting"]["version"]
    setting = Setting(**{**plan["setting"], "version": version})
    return LatencyTable(
        name=name or plan["name"], device=device_name or str(provenance.get("device", "unknown device"))[:160],
        setting=setting, entries=tuple(entries.values()), nets=nets,
        alignment=Alignment(**known) if known else alignment_of(entries, probes),
        overhead_ms=overhead,
        calibration=calibrate(steady if len(steady) >= MIN_NETS else nets, own_cache_mb(setting, provenance)),
        emulated=bool(provenance.get("emulated", False)), provenance=dict(provenance), plan_sha256=plan["sha256"],
    )  # fmt: skip


def _edges(times: _Times, overhead: float) -> dict[Edge, float]:
    """Reordering cost of a tensor at a graph's edges, in and out together: one operator, less one more of them."""
    found: dict[Edge, dict[int, float]] = {}
    for detail, _, ms in times.of("edge"):
        key = (detail["channels"], tuple(detail["size"]), detail["batch"], detail.get("dtype", "float32"))
        found.setdefault(key, {})[detail["repeats"]] = ms
    return {key: max(0.0, ms[1] - (ms[2] - ms[1]) - overhead) for key, ms in found.items() if len(ms) == 2}


def _edge_ms(edges: Mapping[Edge, float], key: OpKey) -> float:
    """Reordering of an operator's input and of its output: half of what each costs in and out."""
    sides = ((key.cin, key.size, key.batch, key.dtype), (key.cout, key.output_size, key.batch, key.dtype))
    return sum(edges.get(side, 0.0) for side in sides) / 2


def _net(detail: Mapping[str, Any], row: Row, ms: float, entries: Mapping[OpKey, Entry]) -> NetTiming:
    keys = [OpKey.from_row(key) for key in detail["keys"]]
    total, weights = sum(entries[key].latency_ms for key in keys), sum(key.weight_bytes for key in keys)
    return NetTiming(detail["name"], ms, total, row["cpu_ms"], row["wall_ms"], row["cv"], weights / 1e6)


def alignment_of(entries: Mapping[OpKey, Entry], probes: list[OpKey]) -> Alignment:
    """The alignment that the probed staircases show."""
    stairs: dict[str, dict[int, float]] = {}
    for key in dict.fromkeys(probes):
        ms = entries[key].latency_ms
        if key.depthwise:
            stairs.setdefault("depthwise", {})[key.cout] = ms
        elif key.cin == 32:
            stairs.setdefault("out", {})[key.cout] = ms
        if not key.depthwise and key.cout == 32:
            stairs.setdefault("in", {})[key.cin] = ms
    return measured_alignment(stairs.values())
