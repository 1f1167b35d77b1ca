"""Reconstruction against exact answers: networks whose removed channels are redundant."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diplugin.errors import DataError
from diplugin.network import trace_network
from diplugin.plan import PruningPlan
from diplugin.recovery import Reconstruction, recalibrate_batchnorm, reconstruct
from diplugin.surgery import apply_plan

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]


def half_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, PruningPlan]:
    trace = trace_network(model, inputs)
    kept = {
        g.name: tuple(sorted(u + b * g.units for u in range((g.units + 1) // 2) for b in range(g.blocks)))
        for g in trace.prunable
    }
    return trace, PruningPlan(kept, {g.name: g.channels for g in trace.prunable}, {}, trace.inputs)


def make_redundant(model: nn.Module, trace: Any, plan: PruningPlan) -> None:
    """Make every removed channel of a plain group a copy of a kept one: nothing is lost by removing it."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for group in trace.prunable:
            kept = plan.kept[group.name]
            for member in (m for m in group.members if m.side == "out"):
                module: Any = modules[member.layer]
                for name in ("weight", "bias", "running_mean", "running_var"):
                    values = getattr(module, name, None)
                    if values is not None:
                        for gone in plan.removed[group.name]:
                            values[gone] = values[kept[gone % len(kept)]]


@pytest.mark.parametrize("kind", ["plain", "residual", "vgg"])
def test_redundant_channels_cost_nothing(make_net: MakeNet, kind: str) -> None:
    model, inputs = make_net(kind)
    trace, plan = half_of(model, inputs)
    make_redundant(model, trace, plan)
    x = torch.randn(200, *inputs[0].shape[1:], generator=torch.Generator().manual_seed(0))
    pruned = apply_plan(copy.deepcopy(model), plan)
    with torch.no_grad():
        want, before = model(x), (pruned(x) - model(x)).abs().max()
        done = reconstruct(pruned, model, [(x,)], trace, plan, Reconstruction(images=200, ridge=1e-7))
        after = (pruned.eval()(x) - want).abs().max()
    assert done and before > 0.05
    assert after < 0.02 * before


@pytest.mark.parametrize("kind", ["plain", "residual", "depthwise", "dense", "vgg"])
def test_it_comes_nearer_to_the_unpruned_outputs(
    make_net: MakeNet, state_of: Callable[[nn.Module], dict[str, Any]], kind: str
) -> None:
    model, inputs = make_net(kind)
    trace, plan = half_of(model, inputs)
    draw = torch.Generator().manual_seed(0)
    x, fresh = (torch.randn(400, *inputs[0].shape[1:], generator=draw) for _ in range(2))
    before = state_of(model)
    pruned = apply_plan(copy.deepcopy(model), plan)
    recalibrated = recalibrate_batchnorm(copy.deepcopy(pruned), [(x, None)], forward=lambda m, b: m(b[0]))
    keys = set(pruned.state_dict())
    reconstruct(pruned, model, [(x,)], trace, plan)
    with torch.no_grad():
        errors = [float((net.eval()(fresh) - model(fresh)).square().mean()) for net in (pruned, recalibrated)]
    assert errors[0] < errors[1], "on images that the fit has not seen"
    assert set(pruned.state_dict()) == keys, "a fresh model takes the weights: no bias appears"
    assert str(state_of(model)) == str(before), "the unpruned network is left as it was"


class Words(nn.Module):
    """Scores words by the table that it looks them up in, or by a matrix that merely equals it."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.inner, self.outer = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight if tied else nn.Parameter(self.table.weight.detach().clone())

    def forward(self, words: Tensor) -> Tensor:
        x = self.table(words)
        return self.head(x + self.outer(F.relu(self.inner(x)))).mean(1)


def test_a_table_that_words_are_looked_up_in_is_left() -> None:
    """Fitted as the weight of the head it would be another table."""
    torch.manual_seed(0)
    model, words = Words(tied=True).eval(), torch.randint(0, 9, (40, 5))
    apart = Words(tied=False).eval()
    apart.load_state_dict(model.state_dict())
    (mended, done), (twin, all_done) = (refitted_inside(m, words) for m in (model, apart))
    assert done == ("inner", "outer") and all_done == (*done, "head")
    with torch.no_grad():
        twin.get_submodule("head").weight.copy_(model.table.weight)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(mended.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def refitted_inside(model: nn.Module, words: Tensor) -> tuple[nn.Module, tuple[str, ...]]:
    """Half of the channels of `inner`, refitted, and the layers that were."""
    trace = trace_network(model, (words[:1],))
    kept = {name: tuple(range(4 if name == "inner" else count)) for name, count in trace.base_widths.items()}
    plan = PruningPlan(kept, trace.base_widths, {}, trace.inputs)
    pruned = apply_plan(copy.deepcopy(model), plan)
    return pruned, reconstruct(pruned, model, [(words,)], trace, plan, Reconstruction(images=40, samples=4000))


def test_a_large_network_is_fitted_on_what_fits_the_memory(make_net: MakeNet) -> None:
    model, inputs = make_net("residual")
    trace, plan = half_of(model, inputs)
    x = torch.randn(64, *inputs[0].shape[1:], generator=torch.Generator().manual_seed(0))
    wanted = Reconstruction(images=64, samples=4096)
    assert wanted.within_memory(trace) == wanted, "there is room"
    tight = replace(wanted, memory_mb=1).within_memory(trace)
    layers = [x for x in trace.layers if x.op != "norm"]
    bytes_an_image = 4 * max(math.prod(x.input_shape) + math.prod(x.output_shape) for x in layers)
    assert 1 < tight.images < 64 and tight.images * bytes_an_image * 2 <= 0.5e6
    channels = sum(x.out_channels for x in layers)
    assert tight.samples < 4096 and 4 * tight.samples * channels <= 0.25e6

    def refitted(settings: Reconstruction, images: Tensor) -> Tensor:
        pruned = apply_plan(copy.deepcopy(model), plan)
        assert reconstruct(pruned, model, [(images,)], trace, plan, settings)
        return pruned.eval()(x).detach()

    few = replace(wanted, images=tight.images, samples=tight.samples)
    assert torch.equal(refitted(replace(wanted, memory_mb=1), x), refitted(few, x[: tight.images]))


def test_no_map_outlives_its_readers() -> None:
    """Recognising sums must not keep the large maps of earlier layers alive."""
    torch.manual_seed(0)
    body = [layer for i in range(6) for layer in (nn.Conv2d(4 if i else 3, 4, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    inputs = (torch.randn(1, 3, 8, 8),)
    trace, plan = half_of(model, inputs)
    pruned = apply_plan(copy.deepcopy(model), plan)
    seen: list[weakref.ref[Tensor]] = []
    most = 0

    def note(_module: nn.Module, _args: Any, y: Tensor) -> None:
        nonlocal most
        seen.append(weakref.ref(y))
        most = max(most, sum(r() is not None for r in seen))

    for conv in (m for m in pruned.modules() if isinstance(m, nn.Conv2d)):
        conv.register_forward_hook(note)
    x = torch.randn(16, *inputs[0].shape[1:], generator=torch.Generator().manual_seed(0))
    reconstruct(pruned, model, [(x,)], trace, plan, Reconstruction(images=16))
    assert len(seen) == 6 and 1 <= most <= 2


def test_no_data_and_broken_data(make_net: MakeNet) -> None:
    model, inputs = make_net("plain")
    trace, plan = half_of(model, inputs)
    pruned = apply_plan(copy.deepcopy(model), plan)
    with pytest.raises(DataError, match="empty"):
        reconstruct(pruned, model, [], trace, plan)
    with pytest.raises(DataError, match="NaN"):
        reconstruct(pruned, model, [(torch.full((8, *inputs[0].shape[1:]), float("nan")),)], trace, plan)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *pruned.modules()])
