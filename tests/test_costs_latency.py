"""Latency as a cost: sums of entries over layers, at the widths that physical pruning gives."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import nn

from diplugin.costs import CostModel
from diplugin.costs.latency import LatencyCost, op_key, table_covers, timed_layers
from diplugin.errors import RoundedLatencyWarning, TableError, UncalibratedLatencyWarning
from diplugin.latency.grid import group_grids, layer_keys, random_widths
from diplugin.latency.plan import prune_to
from diplugin.network import NetworkTrace, trace_network
from diplugin.tables import Alignment, Calibration, Entry, LatencyTable, OpKey, Setting

SETTING = Setting("onnxruntime", "1.32.0", "CPUExecutionProvider", "all", 1)
ALIGNMENT = Alignment(4, 8)


class Residual(nn.Module):
    """A stem, a residual block with an expanded depthwise middle, a strided layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.middle = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU6()
        )
        self.down = nn.Conv2d(32, 16, 1)
        self.last = nn.Sequential(nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(24 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.down(self.middle(self.up(x)))
        return self.head(self.last(x).flatten(1))


EXPANDED = "middle.0"
INPUTS = (torch.zeros(1, 3, 8, 8),)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


@pytest.fixture(scope="module")
def trace(model: nn.Module) -> NetworkTrace:
    return trace_network(model, INPUTS)


def made_up_ms(key: OpKey) -> float:
    return key.macs * 1e-6 + 0.01 * len(key.activation) + 0.001


def full_table(trace: NetworkTrace, calibration: Calibration | None = None) -> LatencyTable:
    grid = group_grids(trace, ALIGNMENT)
    keys = {key for layer in timed_layers(trace) for key in layer_keys(layer, grid, trace.base_widths)}
    rows = tuple(Entry(key, made_up_ms(key), 1.0, 1.0, 0.0) for key in sorted(keys))
    return LatencyTable("made-up", "device", SETTING, rows, (), ALIGNMENT, 0.02, calibration)


def quiet_cost(trace: NetworkTrace, table: LatencyTable) -> LatencyCost:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UncalibratedLatencyWarning)
        return LatencyCost(trace, table)


def test_predicted_keys_are_those_of_the_physically_pruned_net(model: nn.Module, trace: NetworkTrace) -> None:
    grid, draw = group_grids(trace, ALIGNMENT), random.Random(0)
    for _ in range(5):
        widths = random_widths(grid, draw)
        pruned = trace_network(prune_to(model, INPUTS, trace, widths), INPUTS, verify=False)
        actual = [op_key(x, x.in_channels, x.out_channels) for x in pruned.layers if x.op != "norm"]
        assert [layer.key(widths) for layer in timed_layers(trace)] == actual


def test_the_cost_is_the_calibrated_sum_of_entries(trace: NetworkTrace) -> None:
    calibration = Calibration(1.5, 0.25, 12, 0.01, 0.02, 1.0)
    cost = LatencyCost(trace, full_table(trace, calibration))
    widths: Mapping[str, int] = {**trace.base_widths, EXPANDED: 16}
    expected = sum(made_up_ms(layer.key(widths)) for layer in timed_layers(trace))
    assert cost.cost(widths) == pytest.approx(1.5 * expected + 0.25)
    assert cost.sum_ms(widths) == pytest.approx(expected)
    assert cost.base == pytest.approx(cost.cost(trace.base_widths)) and cost.calibrated
    assert cost.change(trace.base_widths, EXPANDED, 16) == pytest.approx(cost.cost(widths) - cost.base)
    assert isinstance(cost, CostModel) and (cost.name, cost.unit) == ("latency_ms", "ms")


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("fits", [0.3, 0.6, 0.9])
def test_nets_whose_weights_outgrow_the_cache_pay_the_refill(
    model: nn.Module, trace: NetworkTrace, fits: float, dtype: str
) -> None:
    def weights_mb(net: nn.Module) -> float:
        layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        return sum(m.weight.numel() for m in layers) * {"float32": 4, "int8": 1}[dtype] / 1e6

    calibration = Calibration(1.5, 0.25, 12, 0.01, 0.02, 1.0, refill_ms=0.4, cache_mb=fits * weights_mb(model))
    table = full_table(trace, calibration)
    rows = tuple(e._replace(key=replace(e.key, dtype=dtype)) for e in table.entries)
    table = replace(table, entries=rows)
    cost, grid, draw = LatencyCost(trace, table), group_grids(trace, ALIGNMENT), random.Random(1)
    paying = []
    for _ in range(12):
        widths = random_widths(grid, draw)
        pruned = prune_to(model, INPUTS, trace, widths)
        narrow = trace_network(pruned, INPUTS, verify=False)
        total = sum(made_up_ms(op_key(x, x.in_channels, x.out_channels)) for x in narrow.layers if x.op != "norm")
        paying.append(weights_mb(pruned) > calibration.cache_mb)
        expected = 1.5 * total + 0.25 + 0.4 * paying[-1]
        assert cost.cost(widths) == pytest.approx(expected)
        assert LatencyCost(narrow, table).base == pytest.approx(expected)  # the pruned net by itself
        assert cost.guide.cost(widths) == pytest.approx(1.5 * total + 0.25 + 0.4)
        for name, channels in trace.base_widths.items():
            wider = {**widths, name: channels}
            assert cost.change(widths, name, channels) == pytest.approx(cost.cost(wider) - cost.cost(widths))
    assert cost.base == pytest.approx(1.5 * cost.sum_ms(trace.base_widths) + 0.65)
    assert {True, False} == set(paying) or fits != 0.6


def test_an_unpruned_net_that_fits_into_the_cache_has_a_cost_without_a_refill(trace: NetworkTrace) -> None:
    calibration = Calibration(1.5, 0.25, 12, 0.01, 0.02, 1.0)
    plain = LatencyCost(trace, full_table(trace, calibration))
    cost = LatencyCost(trace, full_table(trace, replace(calibration, refill_ms=0.4, cache_mb=1.0)))
    assert cost.base == plain.base and cost.guide is cost and cost.step is None


def test_an_uncalibrated_table_is_said_to_be(trace: NetworkTrace) -> None:
    with pytest.warns(UncalibratedLatencyWarning, match="uncalibrated"):
        cost = LatencyCost(trace, full_table(trace))
    assert "uncalibrated" in cost.text and not cost.calibrated
    expected = sum(made_up_ms(layer.key(trace.base_widths)) for layer in timed_layers(trace))
    assert cost.base == pytest.approx(expected + 0.02)


def test_activations_and_depthwise_are_part_of_the_keys(trace: NetworkTrace) -> None:
    keys = [layer.key(trace.base_widths) for layer in timed_layers(trace)]
    assert [key.activation for key in keys] == ["relu", "relu6", "relu6", "", "relu", ""]
    assert [key.depthwise for key in keys] == [False, False, True, False, False, False]
    assert keys[-1] == OpKey("linear", 24 * 16, 10)


def test_every_allowed_width_is_on_the_grid_and_costs_less_than_all_wider_ones(trace: NetworkTrace) -> None:
    cost = quiet_cost(trace, full_table(trace))
    grid = group_grids(trace, ALIGNMENT)
    for group in trace.prunable:
        allowed = cost.allowed_widths(group.name)
        assert allowed is not None and set(allowed) <= set(grid[group.name]) and allowed[-1] == group.channels
        costs = [cost.cost({**trace.base_widths, group.name: w}) for w in allowed]
        assert costs == sorted(costs) and len(set(costs)) == len(costs)


def test_widths_off_the_lower_envelope_are_left_out(trace: NetworkTrace) -> None:
    table = full_table(trace)
    slow = tuple(e._replace(latency_ms=e.latency_ms + (9.0 if e.key.cout == 16 and e.key.cin == 16 else 0.0))
                 if e.key.op == "conv" and e.key.depthwise else e for e in table.entries)  # fmt: skip
    allowed = quiet_cost(trace, replace(table, entries=slow)).allowed_widths(EXPANDED)
    assert allowed is not None and 16 not in allowed and 24 in allowed and 8 in allowed


def test_a_layer_that_was_profiled_wider_than_it_is_pins_no_group(trace: NetworkTrace) -> None:
    """The table of a network with 36 channels where this one has 32: rounding up answers, as every lookup does."""
    full = full_table(trace)
    there = {32: 36, 24: 28}
    keys = [replace(e.key, cin=there.get(e.key.cin, e.key.cin), cout=there.get(e.key.cout, e.key.cout),
                    groups=there.get(e.key.groups, e.key.groups)) for e in full.entries]  # fmt: skip
    wider = replace(full, entries=tuple(Entry(key, made_up_ms(key), 1.0, 1.0, 0.0) for key in dict.fromkeys(keys)))
    cost, own = quiet_cost(trace, wider), quiet_cost(trace, full)
    with pytest.warns(RoundedLatencyWarning):
        assert cost.base > own.base
    for group in trace.base_widths:
        allowed = cost.allowed_widths(group)
        assert allowed is not None and len(allowed) >= 2 and allowed[-1] == trace.base_widths[group]
        costs = [cost.cost({**trace.base_widths, group: w}) for w in allowed]
        assert costs == sorted(costs) and len(set(costs)) == len(costs)


def test_a_table_without_the_unpruned_net_is_refused(trace: NetworkTrace) -> None:
    table = full_table(trace)
    lacking = replace(table, entries=tuple(e for e in table.entries if e.key.op != "linear"))
    assert table_covers(trace, table) and not table_covers(trace, lacking)
    with pytest.raises(TableError, match="linear 384>10"):
        LatencyCost(trace, lacking)


def test_an_emulated_table_guides_no_cost(trace: NetworkTrace) -> None:
    with pytest.raises(TableError, match="emulator"):
        LatencyCost(trace, replace(full_table(trace), emulated=True))


def test_rounding_up_is_said_once(trace: NetworkTrace) -> None:
    cost = quiet_cost(trace, full_table(trace))
    with pytest.warns(RoundedLatencyWarning) as caught:
        cost.cost({**trace.base_widths, EXPANDED: 20})
        cost.cost({**trace.base_widths, EXPANDED: 12})
    assert len(caught) == 1


def test_a_width_that_nothing_answers_for_is_an_error(trace: NetworkTrace) -> None:
    cost = quiet_cost(trace, full_table(trace))
    with pytest.raises(TableError, match="profile plan"):
        cost.cost({**trace.base_widths, EXPANDED: 19})
