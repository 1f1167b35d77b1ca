"""ONNX files run as they are written, also where the runtime's own kernels would saturate."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diplugin.errors import ModelError
from diplugin.onnx_inference import int8_saturates, open_session, run_onnx, run_session


def quantized_conv(channels: int, weight: int) -> bytes:
    """A 1x1 convolution of uint8 inputs with int8 weights that are all the same, between QuantizeLinear nodes."""
    total = channels * 255 * weight
    arrays = {
        "one": np.float32(1), "u0": np.uint8(0), "i0": np.int8(0), "out": np.float32(total / 200),
        "w": np.full((8, channels, 1, 1), weight, np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "one", "u0"], ["a"]),
        helper.make_node("DequantizeLinear", ["a", "one", "u0"], ["b"]),
        helper.make_node("DequantizeLinear", ["w", "one", "i0"], ["c"]),
        helper.make_node("Conv", ["b", "c"], ["d"]),
        helper.make_node("QuantizeLinear", ["d", "out", "u0"], ["e"]),
        helper.make_node("DequantizeLinear", ["e", "out", "u0"], ["output"]),
    ]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, c, 4, 4])
        for n, c in (("input", channels), ("output", 8))
    ]
    graph = helper.make_graph(
        nodes, "conv", ends[:1], ends[1:], [numpy_helper.from_array(np.asarray(v), k) for k, v in arrays.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def test_large_products_do_not_saturate() -> None:
    """Two products of 255 and 127 do not fit into 16 bits; the sum is known by hand."""
    (found,) = run_onnx(quantized_conv(64, 127), [np.full((1, 64, 4, 4), 255, np.float32)])
    np.testing.assert_allclose(found, 64 * 255 * 127, rtol=1e-5)


@pytest.mark.parametrize(
    ("machine", "flags", "wanted"),
    [
        ("x86_64", "avx2 fma", True),
        ("x86_64", "avx2 avx_vnni", False),
        ("AMD64", "avx512f avx512_vnni", False),
        ("aarch64", "asimd", False),
    ],
)
def test_kernels_saturate_on_x86_without_vnni(
    machine: str, flags: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(Path, "read_text", lambda *_args, **_named: f"flags : {flags}")
    assert int8_saturates() is wanted


def test_a_system_that_tells_nothing_is_left_to_its_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_args: object, **_named: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(Path, "read_text", missing)
    assert not int8_saturates()


def test_bad_files_and_bad_inputs_get_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected an ONNX model at"):
        open_session(tmp_path / "none.onnx")
    session = open_session(quantized_conv(2, 1))
    with pytest.raises(ModelError, match="expected 1 inputs"):
        run_session(session, [])
    with pytest.raises(ModelError, match="expected inputs that fit"):
        run_session(session, [np.zeros((1, 3, 4, 4), np.float32)])
