"""Predicted costs against networks that were really pruned, counted by torch, thop and torch-pruning.

torch's own counter sees every convolution and matrix product that runs, so it is the twin wherever no matrix product
hides outside layers. thop and torch-pruning also count BatchNorm, activations or pooling: they are asked where there
is none of what they add.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from random_plans import random_plan
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diplugin.costs import Budget, CostModel, PeakActivationMemory, SeparableCost, layer_macs, macs, params
from diplugin.costs.latency import timed_layers
from diplugin.network import trace_network
from diplugin.plan import PruningPlan
from diplugin.search import FixedScores, greedy_search
from diplugin.surgery import apply_plan

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]
KINDS = ["plain", "residual", "option_a", "vgg", "depthwise", "dense", "grouped", "transposed", "multi_output",
         "tokens", "twice"]  # fmt: skip


def torch_macs(model: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Half the floating-point operations of convolutions and matrix products, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() / 2


def peak_memory_mb(model: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Largest float32 size of a layer's first input and its output, by watching the model run."""
    sizes = [0]

    def watch(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        sizes.append(args[0].numel() + output.numel())

    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d)
    handles = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return 4 * max(sizes) / 1e6


@pytest.mark.parametrize("kind", KINDS)
def test_predicted_costs_are_those_after_surgery(make_net: MakeNet, kind: str) -> None:
    model, inputs = make_net(kind)
    trace = trace_network(model, inputs)
    draw = random.Random(kind)
    costs = (macs(trace), params(trace), PeakActivationMemory(trace))
    for plan in [PruningPlan({n: tuple(range(c)) for n, c in trace.base_widths.items()}, trace.base_widths)] + [
        random_plan(trace, draw) for _ in range(6)
    ]:
        pruned = apply_plan(copy.deepcopy(model), plan, inputs)
        predicted = [cost.cost(plan.widths) for cost in costs]
        assert predicted[0] == torch_macs(pruned, inputs)
        assert predicted[1] == sum(p.numel() for p in pruned.parameters())
        assert predicted[2] == pytest.approx(peak_memory_mb(pruned, inputs), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_changes_along_a_random_walk_add_up(make_net: MakeNet, kind: str) -> None:
    trace = trace_network(*make_net(kind))
    draw = random.Random(kind)
    costs: list[CostModel] = [macs(trace), params(trace), PeakActivationMemory(trace)]
    widths = trace.base_widths
    totals = [cost.base for cost in costs]
    for _ in range(30):
        group = draw.choice(trace.prunable)
        width = group.blocks * draw.randint(1, group.units)
        totals = [t + c.change(widths, group.name, width) for t, c in zip(totals, costs, strict=True)]
        widths[group.name] = width
        assert totals == pytest.approx([cost.cost(widths) for cost in costs], rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_depends_on_neighbours_only(make_net: MakeNet, kind: str) -> None:
    """The search trusts `neighbours` when it remembers moves."""
    trace = trace_network(*make_net(kind))
    draw = random.Random(kind)
    for cost in (macs(trace), params(trace)):
        for group in trace.prunable:
            far = [g for g in trace.prunable if g.name not in cost.neighbours(group.name)]
            other = {**trace.base_widths, **{g.name: g.blocks * draw.randint(1, g.units) for g in far}}
            width = group.blocks
            assert cost.change(trace.base_widths, group.name, width) == cost.change(other, group.name, width)


def without(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> nn.Module:
    """A copy of a Sequential without the layers that other counters count and we do not."""
    assert isinstance(model, nn.Sequential)
    return nn.Sequential(*(copy.deepcopy(m) for m in model if not isinstance(m, kinds)))


@pytest.mark.parametrize("kind", ["plain", "vgg", "grouped"])
def test_torch_pruning_counts_the_same_where_it_counts_only_layers(make_net: MakeNet, kind: str) -> None:
    """But for transposed convolutions, which it multiplies by output instead of input positions."""
    added = (nn.BatchNorm2d, nn.ReLU, nn.PReLU, nn.MaxPool2d)
    if kind == "vgg":
        added = (nn.BatchNorm2d, nn.ReLU, nn.PReLU)  # without its pooling the linear layer would not fit
    full, inputs = make_net(kind)
    model = without(full, added)
    trace = trace_network(model, inputs)
    counted, parameters = tp.utils.count_ops_and_params(model, inputs[0])
    counted -= sum(pooling_and_bias(m, inputs, model) for m in model.modules())
    assert macs(trace).base == counted
    assert params(trace).base == parameters


def pooling_and_bias(module: nn.Module, inputs: tuple[Tensor, ...], model: nn.Module) -> float:
    """What torch-pruning's counter adds for one layer: a multiply-add per bias and output, pooled inputs."""
    seen: list[float] = []

    def watch(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            seen.append(output.numel() if not isinstance(module, nn.Linear) else output.shape[-1])
        elif isinstance(module, (nn.MaxPool2d, nn.AdaptiveAvgPool2d)):
            seen.append(args[0].numel())

    handle = module.register_forward_hook(watch)
    with torch.no_grad():
        model(*inputs)
    handle.remove()
    return sum(seen)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["plain", "residual", "vgg", "depthwise", "dense", "grouped", "twice"])
def test_thop_counts_the_same_for_layers(make_net: MakeNet, kind: str) -> None:
    """thop with its rules for everything but convolutions and linear layers switched off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        thop = pytest.importorskip("thop")
    model, inputs = make_net(kind)

    def nothing(module: Any, _inputs: Any, _output: Any) -> None:
        module.total_ops += torch.zeros(1, dtype=torch.float64)

    others = {type(m) for m in model.modules() if not list(m.children())} - {nn.Conv2d, nn.Linear}
    counted, parameters = thop.profile(
        copy.deepcopy(model), inputs, custom_ops=dict.fromkeys(others, nothing), verbose=False
    )
    trace = trace_network(model, inputs)
    assert macs(trace).base == counted
    leaves = sum(p.numel() for m in model.modules() if not list(m.children()) for p in m.parameters())
    assert parameters in (leaves, params(trace).base)


def test_macs_of_one_layer_by_hand(make_net: MakeNet) -> None:
    layers = {layer.name: layer for layer in trace_network(*make_net("plain")).layers}
    assert layer_macs(layers["0"], 3, 8) == 8 * 8 * 9 * 3 * 8
    assert layer_macs(layers["3"], 8, 12) == 3 * 3 * 9 * 8 * 12
    assert layer_macs(layers["11"], 10, 4) == 40
    deep = {layer.name: layer for layer in trace_network(*make_net("depthwise")).layers}
    assert layer_macs(deep["depth.0"], 5, 5) == 8 * 8 * 9 * 5
    upward = {layer.name: layer for layer in trace_network(*make_net("transposed")).layers}
    assert layer_macs(upward["2"], 8, 6) == 4 * 4 * 16 * 8 * 6


def test_a_layer_called_twice_counts_twice_in_macs_and_once_in_params(make_net: MakeNet) -> None:
    model, inputs = make_net("twice")
    trace = trace_network(model, inputs)
    assert [layer.name for layer in trace.layers].count("shared") == 2
    assert macs(trace).base == torch_macs(model, inputs)
    assert params(trace).base == sum(p.numel() for p in model.parameters())


def test_an_image_without_a_batch_dimension_is_one_image() -> None:
    """Its channels are no images: torch's convolutions take it as it is."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3), nn.Conv2d(6, 4, 1))
    image = torch.randn(3, 8, 8)
    alone, batched = trace_network(model, (image,)), trace_network(model, (image[None],))
    assert macs(alone).base == macs(batched).base == torch_macs(model, (image[None],))
    assert PeakActivationMemory(alone).base == PeakActivationMemory(batched).base
    for one, other in zip(timed_layers(alone), timed_layers(batched), strict=True):
        assert one.key(alone.base_widths) == other.key(batched.base_widths)


class Classifies(nn.Linear):
    """Maps, which it pools to 2x2 and flattens itself."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.adaptive_avg_pool2d(input, 2).flatten(1))


def test_a_linear_layer_s_rows_are_those_that_it_multiplies() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Classifies(32, 5))
    apart = nn.Sequential(*model[:2], nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))
    image = torch.randn(1, 3, 9, 9)
    one, other = (trace_network(m, (image,)) for m in (model, apart))
    assert macs(one).base == macs(other).base == torch_macs(model, (image,))
    assert PeakActivationMemory(one).base == PeakActivationMemory(other).base
    assert one.base_widths == other.base_widths == {"0": 8}


def test_macs_scale_with_the_batch_and_params_do_not(make_net: MakeNet) -> None:
    one, four = (trace_network(*make_net("residual", batch)) for batch in (1, 4))
    assert macs(four).base == 4 * macs(one).base
    assert params(four).base == params(one).base
    assert PeakActivationMemory(four).base == pytest.approx(4 * PeakActivationMemory(one).base)


def test_the_guide_falls_with_every_layer_that_ties_for_the_peak() -> None:
    """Three equal layers: the peak moves only when two groups narrow, its stand-in with each of them."""
    convs = [nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(5)]
    model, inputs = nn.Sequential(*convs), (torch.randn(1, 3, 8, 8),)
    trace = trace_network(model, inputs)
    cost = PeakActivationMemory(trace)
    widths = trace.base_widths
    assert len(widths) == 4
    assert cost.guide.cost(widths) == pytest.approx(cost.base)
    for name in widths:
        assert cost.change(widths, name, 4) == 0
        assert cost.guide.change(widths, name, 4) < -0.01 * cost.base
    scores = {name: torch.rand(8, dtype=torch.float64) for name in widths}
    plan = greedy_search(trace, FixedScores(trace.prunable, scores), [cost], [Budget("memory_mb", fraction=0.6)])
    pruned = apply_plan(model, plan)
    assert peak_memory_mb(pruned, inputs) <= 0.6 * cost.base


class ChannelsFirstNorm(nn.LayerNorm):
    """The LayerNorm over channels of maps [N, C, H, W] that ConvNeXt and its kin use."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Oddities(nn.Module):
    """Parameters that no group owns or that have a shape of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(7))
        self.unused = nn.Linear(5, 5)
        self.first, self.norm = nn.Conv2d(3, 12, 3), ChannelsFirstNorm(12)
        self.second, self.shared_prelu = nn.Conv2d(12, 8, 3), nn.PReLU()
        self.groupnorm, self.last = nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.groupnorm(self.shared_prelu(self.second(self.norm(self.first(x)))))) * self.scale.sum()


def test_every_parameter_is_counted_once_whatever_its_shape() -> None:
    model, inputs = Oddities().eval(), (torch.randn(1, 3, 8, 8),)
    trace = trace_network(model, inputs)
    cost = params(trace)
    draw = random.Random(0)
    assert cost.base == sum(p.numel() for p in model.parameters())
    for _ in range(4):
        plan = random_plan(trace, draw)
        pruned = apply_plan(copy.deepcopy(model), plan, inputs)
        assert cost.cost(plan.widths) == sum(p.numel() for p in pruned.parameters())


class JoinedSlopes(nn.Module):
    """Slopes and a gain over two producers side by side."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.a, self.b, self.slopes = nn.Conv2d(3, a, 3), nn.Conv2d(3, b, 3), nn.PReLU(a + b)
        self.gain = nn.Parameter(torch.rand(a + b, 1, 1))
        self.last = nn.Conv2d(a + b, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.slopes(torch.cat([self.a(x), self.b(x)], 1)) * self.gain)


@pytest.mark.parametrize(("a", "b"), [(6, 6), (9, 3), (2, 7)])
def test_parameters_that_several_groups_hold_shrink_with_all_of_them(a: int, b: int) -> None:
    torch.manual_seed(0)
    model, inputs = JoinedSlopes(a, b).eval(), (torch.randn(1, 3, 8, 8),)
    trace = trace_network(model, inputs)
    cost, draw = params(trace), random.Random(0)
    assert set(trace.base_widths) == {"a", "b"}
    for plan in [random_plan(trace, draw) for _ in range(4)]:
        pruned = apply_plan(copy.deepcopy(model), plan, inputs)
        assert cost.cost(plan.widths) == sum(p.numel() for p in pruned.parameters())
        one = {**trace.base_widths, "b": plan.widths["b"]}
        assert cost.change(one, "a", plan.widths["a"]) == cost.cost(plan.widths) - cost.cost(one)


def test_names_and_units(make_net: MakeNet) -> None:
    trace = trace_network(*make_net("plain"))
    assert [(c.name, c.unit) for c in (macs(trace), params(trace), PeakActivationMemory(trace))] == [
        ("macs", "MAC"), ("params", ""), ("memory_mb", "MB"),
    ]  # fmt: skip
    assert isinstance(macs(trace), SeparableCost)
    assert isinstance(PeakActivationMemory(trace), CostModel)
