"""Graphs without weights: the runtime runs them, and what they compute has the operator's shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from diplugin.errors import ModelError
from diplugin.latency.graphs import call_graph, edge_graph, export_bytes, net_graph, operator_graph
from diplugin.tables import OpKey


def conv(cin: int, cout: int, groups: int = 1, activation: str = "", **changes: Any) -> OpKey:
    return OpKey("conv", cin, cout, (3, 3), (2, 2), (1, 1), (1, 1), groups, (9, 8), activation, **changes)


def run(graph: tuple[bytes, list[list[Any]]]) -> np.ndarray:
    blob, inputs = graph
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(blob, options, providers=["CPUExecutionProvider"])
    feed = {name: np.ones(shape, dtype) for name, shape, dtype in inputs}
    return session.run(None, feed)[0]


@pytest.mark.parametrize(
    "activation", ["", "relu", "relu6", "hardswish", "silu", "gelu", "sigmoid", "hardsigmoid", "leaky_relu", "tanh"]
)
def test_each_activation_runs_and_is_torchs(activation: str) -> None:
    functions: dict[str, Any] = {
        "": nn.Identity(),
        "relu": nn.ReLU(),
        "relu6": nn.ReLU6(),
        "hardswish": nn.Hardswish(),
        "silu": nn.SiLU(),
        "gelu": nn.GELU(),
        "sigmoid": nn.Sigmoid(),
        "hardsigmoid": nn.Hardsigmoid(),
        "leaky_relu": nn.LeakyReLU(),
        "tanh": nn.Tanh(),
    }
    plain, active = (run(operator_graph(conv(4, 8, 1, name))) for name in ("", activation))
    expected = functions[activation](torch.from_numpy(plain)).numpy()
    np.testing.assert_allclose(active, expected, atol=1e-6)


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ModelError, match="mish"):
        operator_graph(conv(4, 8, 1, "mish"))


@pytest.mark.parametrize(
    "key",
    [
        conv(4, 8),
        conv(8, 8, 8),
        conv(8, 4, 2),
        OpKey("linear", 6, 5),
        OpKey("linear", 6, 5, size=(7,)),
        OpKey("conv_transpose", 4, 6, (2, 2), (2, 2), (0, 0), (1, 1), 1, (5, 4)),
        OpKey("conv", 4, 6, (3,), (1,), (1,), (1,), 1, (10,)),
        conv(4, 8, dtype="int8"),
        conv(8, 8, 8, "relu", dtype="int8"),
        OpKey("linear", 6, 5, dtype="int8"),
    ],
)
@pytest.mark.parametrize("dense", [False, True])
def test_every_kind_of_operator_runs_and_has_the_keys_output_size(key: OpKey, dense: bool) -> None:
    output = run(operator_graph(key, dense=dense))
    if key.op == "linear":
        assert output.shape == ((1, 5) if key.size == (1,) else (1, *key.size, 5))
    else:
        assert output.shape == (1, key.cout, *key.output_size)
    assert output.dtype == (np.uint8 if key.dtype == "int8" and not dense else np.float32)


def test_activations_stay_near_one_so_that_no_denormals_slow_the_timing() -> None:
    plain = run(operator_graph(OpKey("conv", 64, 64, (1, 1), (1, 1), (0, 0), (1, 1), 1, (4, 4))))
    np.testing.assert_allclose(plain, 1.0, rtol=1e-5)


def test_a_big_layer_is_a_small_graph() -> None:
    assert len(operator_graph(OpKey("linear", 4096, 4096))[0]) < 20_000


def test_edges_change_nothing_and_a_call_is_a_call() -> None:
    np.testing.assert_array_equal(run(edge_graph(8, (4, 4), 1, 2)), np.ones((1, 8, 4, 4)))
    np.testing.assert_array_equal(run(call_graph()), np.ones((1, 4)))


def test_a_net_loses_its_weights_and_keeps_its_structure() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    x = (torch.randn(1, 3, 12, 12),)
    net.train()
    full, (hollow, feeds) = export_bytes(net, x, ["input_0"]), net_graph(net, x)
    assert net.training and feeds == [["input_0", [1, 3, 12, 12], "float32"]]
    assert len(hollow) < len(full) / 4
    kinds = [
        [n.op_type for n in onnx.load_from_string(b).graph.node if n.op_type != "ConstantOfShape"]
        for b in (full, hollow)
    ]
    assert kinds[0] == kinds[1]
    output = run((hollow, feeds))
    assert output.shape == (1, 10) and np.isfinite(output).all() and np.abs(output).max() > 1e-3


def test_a_model_that_does_not_export_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(ModelError, match="exports to ONNX, got first line") as error:
        export_bytes(nn.Identity(), (torch.zeros(1),), ["x"])
    assert "\n" not in str(error.value)


def kinds(graph: tuple[bytes, list[list[Any]]], tmp_path: Path) -> list[str]:
    """Operators that ONNX Runtime makes of a graph."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(graph[0], options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]


@pytest.mark.parametrize(
    ("key", "fused"),
    [
        (conv(16, 32, activation="relu", dtype="int8"), "QLinearConv"),
        (conv(16, 16, 16, "relu6", dtype="int8"), "QLinearConv"),
        (conv(16, 32, dtype="int8"), "QLinearConv"),
        (OpKey("linear", 64, 32, dtype="int8"), "QGemm"),
        (OpKey("linear", 64, 32, size=(7,), dtype="int8"), "QLinearMatMul"),
    ],
)
def test_an_int8_operator_is_one_8_bit_kernel(key: OpKey, fused: str, tmp_path: Path) -> None:
    found = kinds(operator_graph(key), tmp_path)
    assert fused in found and not {"Conv", "FusedConv", "Gemm", "MatMul", "DequantizeLinear"} & set(found)


def test_for_tensorrt_activations_are_signed_and_biases_float() -> None:
    graph = onnx.load_from_string(operator_graph(conv(16, 32, activation="relu", dtype="int8"), dense=True)[0]).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    zeros = {kinds[node.input[2]] for node in graph.node if "Linear" in node.op_type}
    assert zeros == {onnx.TensorProto.INT8}
    weighted = next(node for node in graph.node if node.op_type == "Conv")
    assert kinds[weighted.input[2]] == onnx.TensorProto.FLOAT


def test_int8_edges_are_what_surrounds_a_convolution(tmp_path: Path) -> None:
    one, two = (kinds(edge_graph(8, (4, 4), 1, repeats, "int8"), tmp_path) for repeats in (1, 2))
    assert one.count("QLinearConv") == 1 and two.count("QLinearConv") == 2
    assert [k for k in one if k != "QLinearConv"] == [k for k in two if k != "QLinearConv"]
    assert run(edge_graph(8, (4, 4), 1, 2, "int8")).dtype == np.uint8


class Residual(nn.Module):
    """A shortcut, a concatenation, a branch of equal weights, and an activation that has no 8-bit kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.twin = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.join, self.head = nn.Conv2d(32, 16, 1), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.norm(self.one(x)))
        y = torch.relu(x + self.twin(self.two(x)))
        y = nn.functional.hardswish(self.join(torch.cat([x, y], 1)))
        return self.head(nn.functional.max_pool2d(y, 2).mean((2, 3)))


def test_an_int8_net_is_8_bit_throughout_and_small(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = net_graph(Residual().eval(), (torch.zeros(2, 3, 8, 8),), dtype="int8")
    found = kinds(graph, tmp_path)
    assert found.count("QLinearConv") == 3 and "QLinearAdd" in found and "QLinearConcat" in found and "QGemm" in found
    assert not {"Conv", "FusedConv", "Gemm", "Clip", "Relu"} & set(found)
    output = run(graph)
    assert output.shape == (2, 10) and output.dtype == np.float32 and np.isfinite(output).all()
    wide = net_graph(nn.Sequential(nn.Conv2d(512, 512, 3)).eval(), (torch.zeros(1, 512, 4, 4),), dtype="int8")
    assert len(wide[0]) < 20_000


def test_a_model_for_the_thorough_exporter_exports_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    assert onnx.load_from_string(export_bytes(layer, (torch.zeros(1, 3, 8),), ["x"])).graph.node
    said = capfd.readouterr()
    assert "graph(" not in said.out + said.err
