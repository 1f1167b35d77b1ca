"""Finished ONNX files, timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from diplugin.errors import ModelError
from diplugin.export import export_onnx
from diplugin.latency import ProfilePlan, Protocol, measure_onnx, measure_side_by_side, onnx_timing
from diplugin.latency.graphs import export_bytes, net_graph
from diplugin.latency.onnx_timing import measure_apart, onnx_plan

QUICK = Protocol(rounds=3, runs=3, min_runs=1, round_ms=0.5, warmup_ms=0.0, patience=1, gap_ms=0.0, pause_s=0.0)


def written(path: Path, layers: int = 1, size: int = 8) -> Path:
    """An ONNX file of so many 7x7 convolutions on images of this size."""
    net = nn.Sequential(*(nn.Conv2d(3, 3, 7, padding=3) for _ in range(layers)))
    path.write_bytes(export_bytes(net, (torch.zeros(1, 3, size, size),), ["x"]))
    return path


def test_a_finished_file_is_timed(tmp_path: Path) -> None:
    path = written(tmp_path / "net.onnx")
    timing = measure_onnx(path, protocol=QUICK)
    assert 0 < timing.latency_ms == timing.cpu_ms and timing.peak_memory_mb is None
    assert measure_onnx(path, threads=2, protocol=QUICK).latency_ms > 0


def test_files_side_by_side_each_get_their_own_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = list[ProfilePlan]()

    def device(plan: ProfilePlan, _: Path) -> SimpleNamespace:
        """A device on which every byte of a file takes a millisecond."""
        runs.append(plan)
        sizes = {job.id: float(len(plan.blob(job.blob))) for job in plan.jobs}
        return SimpleNamespace(
            rows={
                k: {"cpu_ms": v, "wall_ms": v, "cv": 0.0, "peak_mb": 1.0, "unstable": False} for k, v in sizes.items()
            }
        )

    monkeypatch.setattr(onnx_timing, "run_bundle", device)
    paths = [written(tmp_path / f"{layers}.onnx", layers) for layers in (1, 3, 2)]
    timings = measure_side_by_side([*paths, paths[0]])
    assert [t.latency_ms for t in timings] == [p.stat().st_size for p in (*paths, paths[0])]
    assert len(runs) == 1


def test_a_process_of_its_own_tells_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_timing, "WHOLE_NET", QUICK)
    path = written(tmp_path / "net.onnx")
    timing = measure_apart(path)
    assert timing.latency_ms > 0 and timing.peak_memory_mb is not None and timing.peak_memory_mb > 5


def weighted_kernels(graph: bytes, folder: Path) -> Counter[str]:
    """What ONNX Runtime makes of a graph's layers with weights."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)
    return Counter({kind: count for kind, count in kinds.items() if kind.endswith(("Conv", "Gemm", "MatMul"))})


@pytest.mark.parametrize("kind", ["plain", "residual", "vgg", "depthwise", "grouped", "tokens"])
def test_in_8_bits_a_finished_file_runs_the_kernels_of_the_nets_that_a_table_is_calibrated_on(
    kind: str, make_net: Callable[..., Any], tmp_path: Path
) -> None:
    model, inputs = make_net(kind)
    export_onnx(model, inputs, tmp_path / "model.onnx")
    plan = onnx_plan(tmp_path / "model.onnx", dtype="int8")
    found = weighted_kernels(plan.blob(plan.jobs[-1].blob), tmp_path)
    assert found == weighted_kernels(net_graph(model, inputs, dtype="int8")[0], tmp_path)
    assert found.keys() <= {"QLinearConv", "QGemm", "QLinearMatMul"}


@pytest.mark.parametrize("content", [None, b"", b"no onnx at all"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_file_that_does_not_load_is_one_line(content: bytes | None, dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.onnx") as error:
        onnx_plan(path, dtype=dtype)
    assert "\n" not in str(error.value)
