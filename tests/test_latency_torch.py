"""torch as the runtime: the same jobs, as modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from diplugin.costs.latency import LatencyCost
from diplugin.errors import ModelError, TableError
from diplugin.latency import Protocol, profile_here
from diplugin.latency.torch_runtime import TorchRuntime, operator_module, torch_setting
from diplugin.network import trace_network
from diplugin.tables import Calibration, LatencyTable, OpKey

QUICK = Protocol(rounds=2, runs=2, min_runs=1, round_ms=0.2, warmup_ms=0.0, patience=1, gap_ms=0.0, pause_s=0.0)


@pytest.mark.parametrize(
    "key",
    [
        OpKey("conv", 4, 8, (3, 3), (2, 2), (1, 1), (1, 1), 1, (9, 8), "relu"),
        OpKey("conv", 8, 8, (3, 3), (1, 1), (2, 2), (2, 2), 8, (9, 8), "hardswish"),
        OpKey("conv", 4, 6, (3,), (1,), (1,), (1,), 1, (10,)),
        OpKey("conv_transpose", 4, 6, (2, 2), (2, 2), (0, 0), (1, 1), 1, (5, 4)),
        OpKey("linear", 6, 5, size=(7,)),
    ],
)
def test_an_operators_module_has_the_keys_shapes(key: OpKey) -> None:
    module, shape = operator_module(key)
    output = module(torch.zeros(shape))
    if key.op == "linear":
        assert output.shape == (1, *key.size, key.cout)
    else:
        assert output.shape == (1, key.cout, *key.output_size)


def test_torch_runs_no_8_bit_operators() -> None:
    with pytest.raises(ModelError, match="ONNX Runtime"):
        TorchRuntime(torch_setting("cpu", 1)).operator(OpKey("linear", 6, 5, dtype="int8"))


def test_an_unknown_activation_and_an_unknown_place() -> None:
    with pytest.raises(ModelError, match="mish"):
        operator_module(OpKey("linear", 2, 2, activation="mish"))
    with pytest.raises(TableError, match="tpu"):
        torch_setting("tpu")


def test_a_table_of_torch_predicts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]
    model, inputs = nn.Sequential(*body).eval(), (torch.zeros(1, 3, 8, 8),)
    threads = torch.get_num_threads()
    try:
        table = profile_here(
            model, inputs, runtime=TorchRuntime(torch_setting()), budget_s=3, protocol=QUICK, nets=10,
            out=tmp_path / "t.json",
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert table.setting.runtime == "torch" and table.setting.provider == "cpu" and len(table.nets) == 11
    loaded = LatencyTable.load(tmp_path / "t.json")
    from dataclasses import replace

    cost = LatencyCost(trace_network(model, inputs), replace(loaded, calibration=Calibration(1, 0, 11, 0, 0, 1)))
    assert cost.base > 0
