"""Timing finished ONNX files, their weights inside, as the profiler times whole nets."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ModelError, TableError, first_line
from . import device
from .int8 import eight_bit
from .local import run_bundle
from .plan import ProfilePlan, Protocol, runtime_setting

WHOLE_NET = Protocol(rounds=30, round_ms=60.0, gap_ms=20.0, pause_s=0.5, pauses=8)


@dataclass(frozen=True)
class OnnxTiming:
    """A finished ONNX file, timed by the profiler's protocol.

    `latency_ms` is the clock that counts (CPU time with one thread, else wall time). `peak_memory_mb` is that of the
    whole process that ran it, interpreter and runtime included, and None where it shared a process with other work.
    An `unstable` time is one of a device that was throttled, or never came to rest.
    """

    latency_ms: float
    cpu_ms: float
    wall_ms: float
    cv: float
    peak_memory_mb: float | None = None
    unstable: bool = False


def measure_onnx(path: str | Path, *, threads: int = 1, protocol: Protocol = WHOLE_NET) -> OnnxTiming:
    """Time a finished ONNX file on this machine, in this process, as the profiler times whole nets.

    Args:
        path: an ONNX file with its weights inside; symbolic dimensions run as 1.

    Raises:
        ModelError: ONNX Runtime cannot load or run the file.
    """
    return measure_side_by_side([path], threads=threads, protocol=protocol)[0]


def measure_side_by_side(
    paths: Sequence[str | Path], *, threads: int = 1, protocol: Protocol = WHOLE_NET, dtype: str = "float32"
) -> list[OnnxTiming]:
    """`measure_onnx` of up to three files in turns, so that a busy minute slows all of them alike.

    Args:
        dtype: "int8" for what the float files take once they compute in 8 bits, see `int8`.

    Raises:
        ModelError: ONNX Runtime cannot load or run a file.
    """
    plan = ProfilePlan("side by side", runtime_setting(threads), protocol)
    jobs = [_add_file(plan, Path(path), dtype) for path in paths]
    with tempfile.TemporaryDirectory() as folder:
        rows = run_bundle(plan, Path(folder) / "nets.jsonl").rows
    return [replace(_timing(plan, rows[job]), peak_memory_mb=None) for job in jobs]


def onnx_plan(
    path: str | Path, *, threads: int = 1, protocol: Protocol = WHOLE_NET, dtype: str = "float32"
) -> ProfilePlan:
    """The bundle that times one finished ONNX file, its weights inside, or with "int8" its 8-bit form.

    Raises:
        ModelError: ONNX Runtime cannot load the file.
    """
    plan = ProfilePlan("finished file", runtime_setting(threads), protocol)
    _add_file(plan, Path(path), dtype)
    return plan


def _add_file(plan: ProfilePlan, path: Path, dtype: str) -> str:
    """Add a finished file as a whole net; returns the job's id."""
    import onnxruntime

    try:
        blob = path.read_bytes() if dtype == "float32" else eight_bit(path.read_bytes())
        session = onnxruntime.InferenceSession(blob, providers=["CPUExecutionProvider"])
        inputs = [[x.name, [d if isinstance(d, int) else 1 for d in x.shape], _numpy_type(x.type)]
                  for x in session.get_inputs()]  # fmt: skip
    except Exception as error:
        raise ModelError(f"expected an ONNX file that loads, got {str(path)!r}: {first_line(error)}") from None
    return plan.add("net", (blob, inputs), {"name": path.name, "keys": []})


def onnx_timing(plan: ProfilePlan, rows: Mapping[str, Mapping[str, Any]]) -> OnnxTiming:
    """What a journal says of the one net of an `onnx_plan`."""
    return _timing(plan, rows[plan.jobs[-1].id])


def _timing(plan: ProfilePlan, row: Mapping[str, Any]) -> OnnxTiming:
    latency = row["cpu_ms"] if plan.setting.threads == 1 else row["wall_ms"]
    return OnnxTiming(latency, row["cpu_ms"], row["wall_ms"], row["cv"], row["peak_mb"] or None, row["unstable"])


def measure_apart(path: str | Path, *, threads: int = 1, dtype: str = "float32") -> OnnxTiming:
    """Time a finished ONNX file on this machine in a process of its own, which also tells its peak memory.

    Raises:
        ModelError: ONNX Runtime cannot load the file.
        TableError: the process failed.
    """
    plan = onnx_plan(path, threads=threads, protocol=WHOLE_NET, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        bundle, journal = plan.save(Path(folder) / "net.pyz"), Path(folder) / "net.jsonl"
        command = [sys.executable, str(bundle), "--journal", str(journal), "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise TableError(f"expected the timing of {str(path)!r} to run, got {lines[-1][:300]}")
        return onnx_timing(plan, device.read_journal(str(journal))[1])


def _numpy_type(name: str) -> str:
    kinds = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16"}
    return kinds.get(name) or name.removeprefix("tensor(").removesuffix(")")
