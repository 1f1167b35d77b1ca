"""Which sums mend a layer: those that read its output first and as it is. Twins say the same in words that hide it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from odd_layers import NormAct
from torch import Tensor, nn

from diplugin.network import NetworkTrace, trace_network
from diplugin.plan import PruningPlan
from diplugin.recovery import Reconstruction, reconstruct
from diplugin.surgery import apply_plan

Build = Callable[[Any, Tensor], Tensor]
X = torch.randn(40, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Parts(nn.Module):
    """Convolutions and a BatchNorm put together by a function; `inner` is pruned, `outer` reads it."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.build = build
        self.stem, self.side = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.inner, self.outer = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.norm, self.vector = nn.BatchNorm2d(6), nn.Parameter(torch.randn(5))
        self.norm_act, self.norm_act_in_place = NormAct(6), NormAct(6)
        self.norm_act_in_place.inplace = True
        self.token, self.head = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.build(self, x)).mean((2, 3)))

    def branch(self, x: Tensor) -> Tensor:
        return self.outer(F.relu(self.inner(x)))


def refitted(build: Build, keep: int = 4) -> tuple[nn.Module, nn.Module, tuple[str, ...]]:
    """The network, the same with so many channels of `inner` and refitted, and the layers that were."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Parts(build).eval()
    trace, plan = plan_of(model, keep)
    pruned = apply_plan(copy.deepcopy(model), plan)
    return model, pruned, reconstruct(pruned, model, [(X,)], trace, plan, Reconstruction(images=40, samples=4000))


def plan_of(model: nn.Module, keep: int) -> tuple[NetworkTrace, PruningPlan]:
    trace = trace_network(model, (X[:1],))
    kept = {n: tuple(range(keep if n == "inner" else c)) for n, c in trace.base_widths.items()}
    return trace, PruningPlan(kept, trace.base_widths, {}, trace.inputs)


def with_itself(net: Any, x: Tensor) -> Tensor:
    y = net.branch(x)
    return y + y


def with_its_own_activation(net: Any, x: Tensor) -> Tensor:
    y = net.branch(x)
    return F.relu(y) + y


def with_a_copy_s_activation(net: Any, x: Tensor) -> Tensor:
    y = net.branch(x)
    return F.relu(y) + y.clone()


def with_its_own_norm(net: Any, x: Tensor) -> Tensor:
    y = net.branch(x)
    return net.norm(y) + y


def with_a_copy_s_norm(net: Any, x: Tensor) -> Tensor:
    y = net.branch(x).clone()
    return net.norm(y) + y


def with_a_norm_s_own_activation(norm: str) -> Build:
    def build(net: Any, x: Tensor) -> Tensor:
        x = net.branch(x)  # the shortcut brings what is wrong with it
        return net.get_submodule(norm)(net.side(x)) + x

    return build


def with_an_activation_behind_the_norm(net: Any, x: Tensor) -> Tensor:
    x = net.branch(x)
    return F.relu(net.norm(net.side(x))) + x


TWINS: list[tuple[Build, Build]] = [
    (with_itself, lambda net, x: 2 * net.branch(x)),
    (with_its_own_activation, with_a_copy_s_activation),
    (with_its_own_norm, with_a_copy_s_norm),
    (with_a_norm_s_own_activation("norm_act"), with_an_activation_behind_the_norm),
    (with_a_norm_s_own_activation("norm_act_in_place"), with_an_activation_behind_the_norm),
    # Of two layers the one that runs later mends the sum, whichever comes first in it.
    (lambda net, x: net.side(x) + net.branch(x), lambda net, x: net.side(x).clone() + net.branch(x)),
    (lambda net, x: net.branch(x) + net.side(x), lambda net, x: net.branch(x).clone() + net.side(x)),
]


@pytest.mark.parametrize(("build", "twin"), TWINS)
def test_a_sum_counts_only_where_it_reads_first(build: Build, twin: Build) -> None:
    one, two = (refitted(b)[1] for b in (build, twin))
    with torch.no_grad():
        torch.testing.assert_close(one(X), two(X), rtol=1e-4, atol=1e-5)
    ones, twos = dict(one.named_parameters()), dict(two.named_parameters())
    assert all(torch.allclose(ones[name], twos[name], rtol=1e-4, atol=1e-5) for name in ones)


def overwritten(net: Any, x: Tensor) -> Tensor:
    y = net.side(x)
    x.mul_(-0.5)
    return net.branch(y + x) + y


def vector_beside_maps(net: Any, x: Tensor) -> Tensor:
    return net.branch(x) + net.token(net.vector)[:, None, None]


@pytest.mark.parametrize(("build", "left"), [(overwritten, "side"), (vector_beside_maps, "token")])
def test_what_cannot_be_refitted_is_left(build: Build, left: str) -> None:
    """A layer whose input is overwritten before its target is known, and one that is called without a batch."""
    model, same, done = refitted(build, keep=8)
    assert left not in done and {"inner", "outer"} <= set(done)
    with torch.no_grad():
        torch.testing.assert_close(same(X), model(X), rtol=1e-4, atol=1e-4)


def test_a_norm_called_twice_keeps_its_mean() -> None:
    """It would take up the constant of one call in both."""
    model, mended, done = refitted(lambda net, x: net.norm(net.branch(net.norm(net.side(x)))))
    assert {"side", "outer"} <= set(done)
    assert torch.equal(mended.get_buffer("norm.running_mean"), model.get_buffer("norm.running_mean"))
