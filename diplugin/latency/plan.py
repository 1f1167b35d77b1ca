"""What to profile for one model: the exact operators that a search can ask for, and nets to calibrate on.

A channel group gets a grid of widths; a layer needs the product of its two sides' grids; layers that look alike need
it once. Beside them: the edges of their graphs, probes that show the device's staircase, the unpruned net and some
randomly pruned ones end to end. All of it becomes one file that runs on the device by itself.
"""

from __future__ import annotations

import copy
import hashlib
import os
import random
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from ..costs.arithmetic import macs
from ..costs.latency import timed_layers
from ..errors import TableError
from ..groups import remove_channels
from ..network import NetworkTrace
from ..tables import Alignment, OpKey, Setting
from ..tables.checks import table_name
from ..whole_files import writing_whole
from . import device
from .graphs import Graph, Graphs, OnnxGraphs
from .grid import group_grids, layer_keys, random_widths

#: What a bundle does when it is run: `device` is then the folder beside it in the zip.
RUN_DEVICE = "import sys\n\nfrom device.command import main\n\nsys.exit(main())\n"
UNPRUNED = "unpruned"
PROBE_WIDTHS = (16, 20, 24, 28, 29, 30, 31, 32, 36, 40, 44, 47, 48)


@dataclass(frozen=True)
class Protocol:
    """How each job is timed: `rounds` interleaved rounds of at most `runs` runs; a round lasts about `round_ms`.

    Of each round the fastest run counts, of the rounds the lower quartile. `chunk` jobs are interleaved with each
    other; a slow graph runs at least `min_runs` times a round; a restless job gets up to `patience` times the rounds.
    `gap_ms` between rounds spreads them over time;
    a chunk is timed again later if the device was not as fast as usual, at most `pauses` times, with pauses of
    `pause_s` once nothing else is left to do. All jobs are gone through `passes` times, one pass after the other, and
    the best time of each counts: what disturbs a device, its memory most of all, comes in bursts. Whole nets get
    `net_turns` turns in each pass, since they are few, all predictions hang on them, and they feel memory most.
    """

    rounds: int = 10
    runs: int = 20
    min_runs: int = 3
    round_ms: float = 30.0
    warmup_ms: float = 20.0
    chunk: int = 16
    patience: int = 3
    gap_ms: float = 2.0
    pause_s: float = 2.0
    pauses: int = 3
    passes: int = 1
    net_turns: int = 1


THOROUGH = Protocol(rounds=4, passes=4, net_turns=3)
BY_EIGHT = Alignment(8, 8)
SENTINEL = OpKey("conv", 64, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, (16, 16), "relu")
QUICK = Protocol(rounds=7, runs=12, round_ms=8.0, warmup_ms=4.0, patience=2, pause_s=0.3)


@dataclass(frozen=True)
class Job:
    """One graph to time. `kind` is "call", "edge", "probe", "entry" or "net"."""

    id: str
    kind: str
    blob: str
    inputs: tuple[Any, ...]
    detail: Mapping[str, Any]

    def document(self, number: int = 0) -> dict[str, Any]:
        """The job as the device reads it in the pass of this number, each with a row of its own."""
        suffix = f".{number}" if number else ""
        return {"id": self.id + suffix, "kind": self.kind, "blob": self.blob, "inputs": list(self.inputs),
                "detail": dict(self.detail)}  # fmt: skip


@dataclass
class ProfilePlan:
    """Jobs with their graphs; a device's `Bundle` in memory, or written as one that runs by itself.

    Attributes:
        name: becomes the table's name.
        setting, protocol: how to run and time.
        graphs: what jobs are made of; ONNX unless told.
        grid: widths per channel group that the plan covers.
        alignment: measured already; None leaves it to the plan's own probes.
        estimated_s: how long the timing should take on a machine as fast as `rate` says; 0 if unknown.
    """

    name: str
    setting: Setting
    protocol: Protocol = THOROUGH
    graphs: Graphs = field(default_factory=OnnxGraphs, repr=False)
    jobs: list[Job] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    grid: dict[str, tuple[int, ...]] = field(default_factory=dict)
    alignment: Alignment | None = None
    estimated_s: float = 0.0
    _ids: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        """Every plan begins with its sentinel and the cost of a call.

        Raises:
            TableError: a name that no table can have.
        """
        try:
            table_name(self.name, "it")
        except ValueError as error:
            raise TableError(f"expected a name that a table can have, got {self.name!r:.40}: {error}") from None
        if self.setting.runtime == "trtexec" and isinstance(self.graphs, OnnxGraphs):
            self.graphs = OnnxGraphs(dense=True, edges=False)
        if not self.jobs:
            self.add("sentinel", self.graphs.operator(SENTINEL), {})
            self.add("call", self.graphs.call(), {})

    def add(self, kind: str, graph: Graph, detail: Mapping[str, Any]) -> str:
        """Add a job once, however often it is asked for; returns its id."""
        blob, inputs = graph
        name = hashlib.sha256(blob).hexdigest() + ".onnx"
        identity = device.canonical({"blob": name, "kind": kind, "detail": dict(detail)})
        job = Job(hashlib.sha256(identity.encode()).hexdigest()[:20], kind, name, tuple(inputs), dict(detail))
        if job.id not in self._ids:
            self._ids.add(job.id)
            self.jobs.append(job)
            self.blobs[name] = blob
        return job.id

    @property
    def plan(self) -> dict[str, Any]:
        """The plan as the device reads it."""
        document = {
            "format": device.PLAN_FORMAT, "schema": device.SCHEMA, "name": self.name, "sentinel": self.jobs[0].id,
            "setting": asdict(self.setting), "protocol": asdict(self.protocol),
            "alignment": None if self.alignment is None else asdict(self.alignment),
            "grid": {name: list(widths) for name, widths in self.grid.items()},
            "jobs": list(self._in_passes()),
        }  # fmt: skip
        return {**document, "sha256": device.plan_sha256(document)}

    def _in_passes(self) -> Iterator[dict[str, Any]]:
        """All jobs, pass after pass, whole nets as often in each pass as the protocol says."""
        nets = [job for job in self.jobs if job.kind == "net"]
        others = [job for job in self.jobs if job.kind != "net"]
        turns = self.protocol.net_turns
        for number in range(self.protocol.passes):
            for turn in range(turns):
                yield from (job.document(number) for job in others[turn::turns])
                yield from (job.document(number * turns + turn) for job in nets)

    def blob(self, name: str) -> bytes:
        return self.blobs[name]

    def count(self, kind: str) -> int:
        return sum(job.kind == kind for job in self.jobs)

    def save(self, path: str | Path) -> Path:
        """Write the bundle: a zip that `python3 FILE` runs; needs numpy and the runtime there, nothing else."""
        path = Path(path)
        with writing_whole(path) as partial:
            with open(partial, "wb") as file:
                file.write(b"#!/usr/bin/env python3\n")
                with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                    archive.writestr("__main__.py", RUN_DEVICE)
                    for name, source in device_sources():
                        archive.writestr(f"device/{name}", source)
                    archive.writestr("plan.json", device.canonical(self.plan))
                    for name, blob in self.blobs.items():
                        archive.writestr(f"blobs/{name}", blob)
            os.chmod(partial, 0o755)
        return path


def device_sources() -> list[tuple[str, str]]:
    """(name, text) of each file of the package `device`, which a bundle carries."""
    files = (file for file in resources.files(device).iterdir() if file.name.endswith(".py"))
    return sorted((file.name, file.read_text(encoding="utf-8")) for file in files)


def runtime_setting(threads: int = 1, runtime: str = "onnxruntime", provider: str = "", level: str = "all") -> Setting:
    """The setting of this machine's runtime.

    Raises:
        TableError: a number of threads that is not positive.
    """
    if threads < 1:
        raise TableError(f"expected at least 1 thread, got {threads}")
    if runtime == "onnxruntime":
        import onnxruntime

        return Setting(runtime, onnxruntime.__version__, provider or "CPUExecutionProvider", level, threads)
    return Setting(runtime, "", provider or "TensorRT", level, threads)


def plan_entries(plan: ProfilePlan, trace: NetworkTrace, dtype: str = "float32") -> None:
    """Add the entries and edges that the plan's grid asks for."""
    keys: dict[OpKey, None] = {}
    for layer in timed_layers(trace, dtype):
        keys.update(dict.fromkeys(layer_keys(layer, plan.grid, trace.base_widths)))
    add_entries(plan, keys)


def add_entries(plan: ProfilePlan, keys: Iterable[OpKey], kind: str = "entry") -> None:
    """Add operators and, where the runtime may reorder tensors, the edges of their graphs."""
    keys = list(keys)
    for key in keys:
        plan.add(kind, plan.graphs.operator(key), {"key": key.row})
    if not plan.graphs.edges:
        return
    for key in keys:
        if key.op != "linear":
            add_edge(plan, key.cin, key.size, key.batch, key.dtype)
            add_edge(plan, key.cout, key.output_size, key.batch, key.dtype)


def add_edge(plan: ProfilePlan, channels: int, size: tuple[int, ...], batch: int, dtype: str = "float32") -> None:
    """Add what tells the cost of a tensor at a graph's edges: one operator that does next to nothing, and two."""
    for repeats in (1, 2):
        detail = {"channels": channels, "size": list(size), "batch": batch, "repeats": repeats, "dtype": dtype}
        plan.add("edge", plan.graphs.edge(channels, size, batch, repeats, dtype), detail)


def plan_probes(plan: ProfilePlan, trace: NetworkTrace, dtype: str = "float32") -> None:
    """Add staircases: one dense convolution over its outputs, one over its inputs, one depthwise, as the net has."""
    layers = [layer for layer in trace.layers if layer.op == "conv"]
    dense = next((x for x in layers if x.groups == 1 and min(x.in_channels, x.out_channels) >= 8), None)
    depthwise = next((x for x in layers if x.depthwise), None)
    keys: list[OpKey] = []
    for width in PROBE_WIDTHS:
        if dense is not None:
            keys += [_probe_key(dense, 32, width, 1), _probe_key(dense, width, 32, 1)]
        if depthwise is not None:
            keys.append(_probe_key(depthwise, width, width, width))
    add_entries(plan, [replace(key, dtype=dtype) for key in keys], "probe")


def _probe_key(layer: Any, cin: int, cout: int, groups: int) -> OpKey:
    size = tuple(min(16, side) for side in layer.input_shape[2:])
    kernel = tuple(min(k, side) for k, side in zip(layer.kernel, size, strict=True))
    ones = (1,) * len(size)
    return OpKey("conv", cin, cout, kernel, ones, tuple(k // 2 for k in kernel), ones, groups, size,
                 layer.activation or "", layer.input_shape[0])  # fmt: skip


def plan_nets(
    plan: ProfilePlan, model: Any, example_inputs: tuple[Any, ...], trace: NetworkTrace, nets: int,
    seed: int = 0, dtype: str = "float32",
) -> None:  # fmt: skip
    """Add the unpruned net and `nets` randomly pruned ones, physically pruned copies, end to end."""
    draw = random.Random(seed)
    for number in range(nets + 1):
        widths = random_widths(plan.grid, draw) if number else trace.base_widths
        pruned = model if not number else prune_to(model, example_inputs, trace, widths)
        name = f"random-{number}" if number else UNPRUNED
        graph = plan.graphs.net(pruned, example_inputs, name, dtype)
        plan.add("net", graph, net_detail(name, trace, widths, dtype))


def net_detail(name: str, trace: NetworkTrace, widths: Mapping[str, int], dtype: str = "float32") -> dict[str, Any]:
    """What a plan notes of a whole net: its name and the keys of its layers."""
    return {"name": name, "keys": [layer.key(widths).row for layer in timed_layers(trace, dtype)]}


def prune_to(model: Any, example_inputs: tuple[Any, ...], trace: NetworkTrace, widths: Mapping[str, int]) -> Any:
    """A copy of the model with the last channels of every group cut off down to `widths`: for timing only."""
    removed: dict[str, list[int]] = {}
    for group in trace.prunable:
        per_block, keep = group.units, widths[group.name] // group.blocks
        removed[group.name] = [b * per_block + u for b in range(group.blocks) for u in range(keep, per_block)]
    return remove_channels(copy.deepcopy(model), example_inputs, removed)


def make_plan(
    model: Any, example_inputs: tuple[Any, ...], trace: NetworkTrace, *, name: str, setting: Setting,
    alignment: Alignment = BY_EIGHT, points: int = 8, nets: int = 16, seed: int = 0,
    protocol: Protocol | None = None, dtype: str = "float32", probes: bool = True, graphs: Graphs | None = None,
) -> ProfilePlan:  # fmt: skip
    """Everything that a latency budget on this model needs measured.

    Args:
        model, example_inputs, trace: the unpruned network, as traced.
        name: of the table to come.
        setting: runtime and threads to measure under.
        alignment: steps of the width grid; 8 suits most, a measured one is better.
        points: at most about this many widths a group; fewer make a shorter plan.
        nets: randomly pruned nets to time end to end, at least 10 for a calibration.
        dtype: "float32" or "int8".

    Raises:
        ModelError: the model cannot be exported or has no layer that can be timed.
    """
    plan = ProfilePlan(name, setting, protocol or THOROUGH, graphs or OnnxGraphs())
    plan.grid = group_grids(trace, alignment, points)
    if probes:
        plan_probes(plan, trace, dtype)
    plan_entries(plan, trace, dtype)
    if nets:
        plan_nets(plan, model, example_inputs, trace, nets, seed, dtype)
    return plan


def estimate_seconds(plan: ProfilePlan, trace: NetworkTrace, net_ms: float) -> float:
    """How long a plan takes on a device where the unpruned net takes `net_ms`: by MACs, and a job's own cost."""
    rate = net_ms / max(1.0, macs(trace).base)
    total = 0.0
    for job in plan.jobs:
        rows = [job.detail["key"]] if "key" in job.detail else job.detail.get("keys", [])
        total += job_seconds(plan.protocol, job.kind, rate * sum(OpKey.from_row(row).macs for row in rows))
    return total


def job_seconds(protocol: Protocol, kind: str, ms: float) -> float:
    """How long all passes over a job of `ms` take, loading included."""
    ms += 0.02
    runs = max(protocol.min_runs, min(protocol.runs, protocol.round_ms / ms))
    once = protocol.rounds * runs * ms + min(5 * ms, protocol.warmup_ms) + 2 * ms + 3.0
    return protocol.passes * (protocol.net_turns if kind == "net" else 1) * once / 1e3
