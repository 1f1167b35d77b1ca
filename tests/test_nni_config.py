"""Plans in NNI's words: the masks of such a config_list cut exactly what the plan cuts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("nni")

from diplugin_nni import DIPruner, config_list_for, speedup
from diplugin_nni_config import plan_config_list, plan_for
from nni.compression.pruning import L1NormPruner

from diplugin.costs import Budget, macs
from diplugin.costs.latency import timed_layers
from diplugin.errors import BudgetError, InfeasibleBudget
from diplugin.network import trace_network
from diplugin.search import SearchLimits
from diplugin.strategies import OneShot
from diplugin.surgery import apply_plan
from diplugin.tables import Alignment, Calibration, Entry, LatencyTable, Setting

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]
SETTING = Setting("onnxruntime", "1", "CPU", "all", 1)


def staircase(model: nn.Module, inputs: tuple[Tensor, ...]) -> LatencyTable:
    """A table of every width of every layer, on which only even widths are fast."""
    trace = trace_network(model, inputs)
    entries = {}
    for layer in timed_layers(trace):
        ranges = [range(1, trace.base_widths[g] + 1) for g in layer.groups]
        for widths in product(*ranges):
            key = layer.key({**trace.base_widths, **dict(zip(layer.groups, widths, strict=True))})
            steps = (key.cin + 1) // 2 * ((key.cout + 1) // 2)
            ms = 1e-3 * steps * (3.0 if key.cin % 2 or key.cout % 2 else 1.0)
            entries[key] = Entry(key, ms, ms, ms, 0.0)
    fitted = Calibration(1.0, 0.0, 12, 0.02, 0.05, 0.99)
    return LatencyTable("stairs", "a staircase", SETTING, tuple(entries.values()), alignment=Alignment(2, 2),
                        calibration=fitted)  # fmt: skip


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["plain", "residual", "vgg", "depthwise", "dense", "grouped"])
def test_masks_of_a_latency_plan_cut_exactly_the_plan(
    make_net: MakeNet, make_images: Callable[..., Any], kind: str
) -> None:
    model, inputs = make_net(kind)
    data = make_images(100)
    loader = data.loader(50)
    table = staircase(model, inputs)
    budgets = [Budget("latency_ms", fraction=0.6)]
    strategy = OneShot(limits=SearchLimits(floor=0.0))
    plan, trace = plan_for(model, budgets, table, loader, inputs, strategy)
    config_list = config_list_for(model, budgets, table, calibration_data=loader, example_inputs=inputs,
                                  strategy=strategy)  # fmt: skip
    assert config_list == plan_config_list(plan, trace.groups)
    planned = apply_plan(copy.deepcopy(model), plan, inputs)
    pruned = copy.deepcopy(model)
    _, masks = DIPruner(pruned, config_list, calibration_data=loader).compress()
    speedup(pruned, masks, inputs)
    assert plan.costs["latency_ms"].predicted <= 0.6 * plan.costs["latency_ms"].base
    assert shapes(pruned) == shapes(planned) != shapes(model)
    with torch.no_grad():
        assert torch.allclose(pruned.eval()(data.images), planned.eval()(data.images), atol=1e-5)


def test_another_pruner_reaches_the_plans_widths_too(make_net: MakeNet, make_images: Callable[..., Any]) -> None:
    model, inputs = make_net("residual")
    plan, trace = plan_for(model, ["macs=0.5"], None, make_images(100).loader(50), inputs, OneShot())
    planned = apply_plan(copy.deepcopy(model), plan, inputs)
    _, masks = L1NormPruner(model, plan_config_list(plan, trace.groups)).compress()
    assert shapes(speedup(model, masks, inputs)) == shapes(planned)


def test_budgets_as_text_and_inputs_from_the_data(make_net: MakeNet, make_images: Callable[..., Any]) -> None:
    model, inputs = make_net("vgg")
    loader = make_images(100).loader(50)
    config_list = config_list_for(model, ["macs=0.5", "params=0.9"], calibration_data=iter(loader))
    _, masks = DIPruner(model, config_list, calibration_data=loader).compress()
    base = macs(trace_network(make_net("vgg")[0], inputs)).base
    assert 0.4 * base < macs(trace_network(speedup(model, masks, inputs), inputs)).base <= 0.5 * base


def test_budgets_that_cannot_be_met_or_mean_nothing(make_net: MakeNet, make_images: Callable[..., Any]) -> None:
    model, _ = make_net("vgg")
    loader = make_images(100).loader(50)
    with pytest.raises(InfeasibleBudget, match="no structure within reach"):
        config_list_for(model, ["macs=0.001"], calibration_data=loader)
    with pytest.raises(BudgetError, match="give a latency table"):
        config_list_for(model, ["latency_ms=0.5"], calibration_data=loader)


def test_the_model_and_the_data_are_left_alone(
    make_net: MakeNet, make_images: Callable[..., Any], state_of: Any, assert_same_state: Any
) -> None:
    model, _ = make_net("residual")
    model.train()
    before = state_of(model)

    def batches() -> Iterator[Any]:
        yield from make_images(100).loader(50)

    config_list_for(model, ["macs=0.7"], calibration_data=batches())
    assert_same_state(model, before)


def test_layers_excluded_in_nnis_old_words_stay(make_net: MakeNet, make_images: Callable[..., Any]) -> None:
    config_list = [{"op_types": ["Conv2d"], "sparsity": 0.5}, {"exclude": True, "op_names": ["0"]}]
    nnis = L1NormPruner(make_net("vgg")[0], config_list).compress()[1]
    model, _ = make_net("vgg")
    masks = DIPruner(model, config_list, calibration_data=make_images(40).loader(40)).compress()[1]
    assert set(masks) == set(nnis) == {"3"}
    assert float(masks["3"]["weight"].mean()) == float(nnis["3"]["weight"].mean()) == 0.5
