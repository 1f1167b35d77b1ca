"""Estimates: features counted right, prices that give sensible times, and labels that never say measured."""

from __future__ import annotations

import sys
from math import prod
from pathlib import Path

import pytest
import torch
from torch import nn

from diplugin.costs import macs
from diplugin.costs.latency import LatencyCost
from diplugin.errors import TableError, UncalibratedLatencyWarning
from diplugin.latency.estimate import devices, estimate, estimated_table, key_layer
from diplugin.latency.operators import FEATURES, layer_features, network_features
from diplugin.latency.prices import ERRORS, PRICES
from diplugin.network import NetworkTrace, trace_network
from diplugin.tables import LatencyTable


def trace_of(width: int, side: int = 16) -> NetworkTrace:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Hardswish(), nn.Conv2d(width, 2 * width, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
    )  # fmt: skip
    return trace_network(net.eval(), (torch.zeros(1, 3, side, side),))


def test_features_hold_all_macs_of_the_network() -> None:
    trace = trace_of(16)
    features = dict(zip(FEATURES, network_features(trace.layers), strict=True))
    assert sum(value for name, value in features.items() if name.endswith("_macs")) == macs(trace).base
    assert features["depthwise_macs"] == 16 * 16 * 16 * 9 and features["depthwise_calls"] == 1
    assert features["calls"] == 4 and features["soft_calls"] == 1
    assert features["weight_bytes"] == 4 * (3 * 16 * 9 + 16 * 9 + 16 * 32 + 32 * 10)


def test_a_key_stands_for_a_layer_with_the_same_features() -> None:
    from diplugin.costs.latency import timed_layers

    trace = trace_of(16)
    for layer in timed_layers(trace):
        assert layer_features(key_layer(layer.key(trace.base_widths))) == layer_features(layer.layer)


@pytest.mark.parametrize("device", devices())
def test_estimates_grow_with_width_and_resolution_and_lie_in_their_band(device: str) -> None:
    small, wide, large = (estimate(device, t) for t in (trace_of(16), trace_of(32), trace_of(16, 32)))
    assert 0 < small.low < small.latency_ms < small.high
    assert small.latency_ms < wide.latency_ms and small.latency_ms < large.latency_ms
    assert "not a measurement" in small.text and all(price >= 0 for price in PRICES[device].values())


@pytest.mark.parametrize("device", devices())
def test_an_estimated_table_predicts_what_the_estimate_says_and_says_so(device: str, tmp_path: Path) -> None:
    trace = trace_of(16)
    table = LatencyTable.load(estimated_table(device, trace).save(tmp_path / "t.json"))
    assert table.origin == "estimated" and "estimated" in table.quality and "measured" not in table.quality
    with pytest.warns(UncalibratedLatencyWarning):
        cost = LatencyCost(trace, table)
    assert cost.base == pytest.approx(estimate(device, trace).latency_ms, rel=1e-5)
    assert "estimated" in cost.text and all(len(cost.allowed_widths(g) or ()) > 1 for g in trace.base_widths)


def test_an_unknown_device_is_told_which_there_are() -> None:
    with pytest.raises(TableError, match="jetson-nano-cpu"):
        estimate("abacus", trace_of(16))


def test_held_out_errors_keep_what_the_project_promises() -> None:
    assert ERRORS["jetson-nano-cpu"]["median"] <= 0.15 and ERRORS["jetson-nano-cpu"]["rho"] >= 0.95


def test_cells_of_the_search_space_become_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    sys.modules.pop("fit_estimates", None)
    import fit_estimates

    edges, alive = fit_estimates.cell_edges("|nor_conv_3x3~0|+|none~0|none~1|+|skip_connect~0|nor_conv_1x1~1|none~2|")
    assert edges == [("nor_conv_3x3", 0, 1), ("skip_connect", 0, 3), ("nor_conv_1x1", 1, 3)] and alive
    assert not fit_estimates.cell_edges("|skip_connect~0|+|none~0|none~1|+|none~0|none~1|skip_connect~2|")[1]
    skips = "|skip_connect~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|"
    features = dict(zip(FEATURES, fit_estimates.cell_network(skips), strict=True))
    between = [(16, 32, 16), (32, 64, 8)]
    macs = 3 * 16 * 9 * 32**2 + sum(prod((o, 9 * (i + o), s, s)) for i, o, s in between)
    assert features["dense_macs"] == macs
    assert features["point_macs"] == sum(i * o * s * s for i, o, s in between)
    assert fit_estimates.family("tf_efficientnet_b0.ap_in1k") == fit_estimates.family("efficientnet_b3.ra2_in1k")


def test_a_fit_on_made_up_prices_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    import fit_estimates
    import numpy as np

    draw = np.random.default_rng(0)
    features, prices = draw.uniform(1, 9, (40, 4)), np.array([0.5, 0.0, 2.0, 0.1])
    np.testing.assert_allclose(fit_estimates.fit(features, features @ prices), prices, atol=1e-9)
    error = fit_estimates.held_out(features, features @ prices, [str(i % 8) for i in range(40)])
    assert error["median"] < 1e-9 and error["rho"] == pytest.approx(1.0)
