"""What a latency budget asks of a plan: something to spare where it can be had, the clock where there is one."""

from __future__ import annotations

from typing import Any

import pytest
from bars import INPUTS, bars, trained_on_bars
from small_tables import timed_by_macs
from torch import nn
from torch.utils.data import DataLoader

import diplugin
from diplugin.costs import LatencyCost
from diplugin.errors import InfeasibleBudget
from diplugin.measurements import Measure
from diplugin.network import trace_network
from diplugin.recovery import FineTuning, Recalibrate
from diplugin.search import SearchLimits, allowed_widths
from diplugin.strategies import Geometric, Strategy, StructureDistillation
from diplugin.tables import LatencyTable

pytestmark = pytest.mark.usefixtures("nothing_is_exported")
STRATEGIES = [None, StructureDistillation(Geometric(2), FineTuning(epochs=1, lr=0.01))]
SPARE = 0.15


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return trained_on_bars()


@pytest.fixture(scope="module")
def table(trained: nn.Module) -> LatencyTable:
    return timed_by_macs(trained, INPUTS, mape=SPARE)


@pytest.fixture(scope="module")
def narrowest(trained: nn.Module, table: LatencyTable) -> float:
    """Predicted latency of the narrowest network that may be made, in ms."""
    trace = trace_network(trained, INPUTS)
    cost = LatencyCost(trace, table)
    return cost.cost({g.name: min(allowed_widths(g, [cost], SearchLimits())) for g in trace.prunable})


def compress(model: nn.Module, table: LatencyTable, limit: float, **settings: Any) -> diplugin.CompressionResult:
    return diplugin.compress(
        model, DataLoader(bars(300, 1), batch_size=50), example_inputs=INPUTS, latency_table=table,
        budgets=[diplugin.Budget("latency_ms", limit=limit)], repairs=(Recalibrate(),), holdout=0.2, **settings,
    )  # fmt: skip


def test_the_error_of_the_table_is_spared(trained: nn.Module, table: LatencyTable, narrowest: float) -> None:
    limit = 2 * narrowest
    cost = compress(trained, table, limit).plan.costs["latency_ms"]
    assert cost.predicted <= (1 - SPARE) * limit


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_in_reach_with_nothing_to_spare_is_not_refused(
    trained: nn.Module, table: LatencyTable, narrowest: float, strategy: Strategy | None
) -> None:
    limit = narrowest * (1 + SPARE / 2)
    assert (1 - SPARE) * limit < narrowest
    result = compress(trained, table, limit, strategy=strategy)
    assert all(budget["met"] for budget in result.metrics["budgets"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_out_of_reach_is_said_at_once_in_the_numbers_asked_for(
    trained: nn.Module, table: LatencyTable, narrowest: float, strategy: Strategy | None
) -> None:
    limit, lines = 0.99 * narrowest, list[str]()
    with pytest.raises(InfeasibleBudget, match=f"latency_ms <= {limit:g}"):
        compress(trained, table, limit, strategy=strategy, tell=lines.append)
    assert not any(line.startswith("step") for line in lines)


def test_a_clock_gives_back_what_the_table_took(
    trained: nn.Module, table: LatencyTable, narrowest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where networks run in half the time that was predicted, channels come back."""
    limit = 2 * narrowest
    planned = compress(trained, table, limit).plan.costs["latency_ms"].predicted

    def milliseconds(_: Measure, model: nn.Module) -> float:
        return 0.5 * LatencyCost(trace_network(model, INPUTS), timed_by_macs(model, INPUTS)).base

    monkeypatch.setattr(Measure, "local", property(lambda _: True))
    monkeypatch.setattr(Measure, "milliseconds", milliseconds)
    found = compress(trained, table, limit).plan.costs["latency_ms"].predicted
    assert planned <= limit < found and 0.5 * found <= limit
