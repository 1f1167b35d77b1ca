"""What reads a layer's output: found by running the network, whatever the shapes say."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diplugin.network import trace_network
from diplugin.plan import PruningPlan
from diplugin.recovery import compensate, reconstruct
from diplugin.recovery.outputs import norms_behind
from diplugin.surgery import apply_plan

IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Parts(nn.Module):
    """Convolutions `a` and `b`, BatchNorms `m` and `n`, all of one width, put together by a function."""

    def __init__(self, build: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.build = build
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.m, self.n = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.build(self, x).mean((2, 3)))


def shortcut_past_the_norm(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    return x + net.b(F.relu(net.m(x)))


def norm_of_the_sum(net: Any, x: Tensor) -> Tensor:
    x = F.relu(net.a(x))
    return net.n(x + net.b(x))


def changed_in_place(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    y.mul_(2)
    return net.b(net.m(y))


def changed_after_the_norm(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    z = net.m(y)
    return net.b(z + y.mul_(2))


def passed_on_by_dropout(net: Any, x: Tensor) -> Tensor:
    return net.b(net.m(F.dropout(net.a(x), 0.5, net.training)))


def asked_for_its_shape(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    assert y.shape[1] == y.size(1) == 4 and y.dim() == 4
    return net.b(net.m(y))


CASES: list[tuple[Callable[[Any, Tensor], Tensor], dict[str, str]]] = [
    (lambda net, x: net.n(net.b(F.relu(net.m(net.a(x))))), {"a": "m", "b": "n"}),
    (lambda net, x: net.b(net.m(input=net.a(x))), {"a": "m"}),
    (lambda net, x: net.n(net.b(net.n(net.a(x)))), {"a": "n", "b": "n"}),  # one norm for both
    (lambda net, x: torch.cat([net.m(y := net.a(x)), net.b(y)], 1)[:, :4], {}),
    (lambda net, x: net.n(net.b(net.b(net.m(net.a(x))))), {"a": "m"}),  # `b` once with a norm and once without
    (shortcut_past_the_norm, {}),
    (norm_of_the_sum, {}),
    (changed_in_place, {}),
    (changed_after_the_norm, {}),
    (passed_on_by_dropout, {"a": "m"}),
    (asked_for_its_shape, {"a": "m"}),
]


@pytest.mark.parametrize(("build", "expected"), CASES)
def test_a_norm_is_behind_the_layer_that_it_alone_reads(
    build: Callable[[Any, Tensor], Tensor], expected: dict[str, str], state_of: Any, assert_same_state: Any
) -> None:
    model = Parts(build)
    trace = trace_network(model, (IMAGE,), verify=False)
    before, drawn = state_of(model), torch.get_rng_state()
    assert norms_behind(model, trace, ("a", "b"), ("m", "n")) == expected
    assert_same_state(model, before)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_only_the_layers_and_norms_that_were_asked_for() -> None:
    model = Parts(lambda net, x: net.n(net.b(F.relu(net.m(net.a(x))))))
    trace = trace_network(model, (IMAGE,), verify=False)
    assert norms_behind(model, trace, ("a", "b"), ("n",)) == {"b": "n"}
    assert norms_behind(model, trace, ("a",), ("m", "n")) == {"a": "m"}


class Returning(Parts):
    """It returns what the norm reads, too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = self.a(x)
        return self.head(self.n(self.b(self.m(y))).mean((2, 3))), y


def test_whoever_calls_the_network_reads_what_it_returns() -> None:
    model = Returning(lambda net, x: x)
    trace = trace_network(model, (IMAGE,), verify=False)
    assert norms_behind(model, trace, ("a", "b"), ("m", "n")) == {"b": "n"}


class Reader(nn.Module):
    """A linear layer without a bias reads removed channels; a BatchNorm normalises what it says, or a sum with it."""

    def __init__(self, summed: bool) -> None:
        super().__init__()
        self.summed = summed
        self.first, self.reader = nn.Linear(12, 7), nn.Linear(7, 12, bias=False)
        self.norm, self.head = nn.BatchNorm1d(12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.reader(F.relu(self.first(x)))
        return self.head(self.norm(x + y)) + (x + y)[:, :2] if self.summed else self.head(self.norm(y))


class Tokens(nn.Module):
    """What a linear layer says of each of so many tokens, normalised by token; its value passes a copy if told so."""

    def __init__(self, tokens: int, bias: bool, copied: bool) -> None:
        super().__init__()
        self.copied = copied
        self.first, self.reader = nn.Linear(5, 8), nn.Linear(8, 6, bias=bias)
        self.norm, self.head = nn.BatchNorm1d(tokens), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.reader(F.relu(self.first(x)))
        return self.head(F.relu(self.norm(y.clone() if self.copied else y)).mean(1))


@pytest.mark.parametrize("tokens", [4, 6])  # as many as channels, too
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("repair", [reconstruct, compensate])
def test_a_norm_of_tokens_is_not_one_of_channels(tokens: int, bias: bool, repair: Any) -> None:
    """A constant of a channel is none of its: the twin, whose norm reads a copy, is repaired alike."""
    x = torch.randn(40, tokens, 5, generator=torch.Generator().manual_seed(0)) + 1
    states = []
    for copied in (False, True):
        torch.manual_seed(0)
        model = Tokens(tokens, bias, copied).eval()
        trace = trace_network(model, (x[:1],))
        plan = PruningPlan({**{n: tuple(range(c)) for n, c in trace.base_widths.items()}, "first": (0, 1, 2)},
                           trace.base_widths, {}, trace.inputs)  # fmt: skip
        repaired = apply_plan(copy.deepcopy(model), plan) if repair is reconstruct else model
        others = (model,) if repair is reconstruct else ()
        assert "reader" in repair(repaired, *others, [(x, torch.zeros(40))], trace, plan)
        states.append(repaired.state_dict())
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("summed", [False, True])
def test_compensation_leaves_a_constant_only_to_a_norm_that_takes_it_up(summed: bool) -> None:
    """Against torch.linalg.lstsq: with an intercept where the layer itself is normalised, through the origin else."""
    torch.manual_seed(0)
    model, x = Reader(summed), torch.randn(200, 12)
    hidden = F.relu(model.first(x)).detach().double()
    kept, gone = [0, 2, 5, 6], [1, 3, 4]
    trace = trace_network(model, (x[:1],))
    plan = PruningPlan({**{n: tuple(range(c)) for n, c in trace.base_widths.items()}, "first": tuple(kept)},
                       trace.base_widths, {}, trace.inputs)  # fmt: skip
    before = model.reader.weight.detach().double().clone()
    assert compensate(model, [(x, torch.zeros(200))], trace, plan, strength=1e-12) == ("reader",)
    intercept = torch.zeros(200, 0) if summed else torch.ones(200, 1)
    solution = torch.linalg.lstsq(torch.cat([hidden[:, kept], intercept], 1), hidden[:, gone]).solution[: len(kept)]
    expected = before[:, kept] + before[:, gone] @ solution.T
    torch.testing.assert_close(model.reader.weight[:, kept].double(), expected, rtol=1e-3, atol=1e-4)
