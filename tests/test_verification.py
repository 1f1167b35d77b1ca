"""No group is believed unchecked: what no dependency graph sees is found, and what is sound stays prunable."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_plans import masked
from tiny_networks import KINDS
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from diplugin.costs import params
from diplugin.network import trace_network
from diplugin.plan import PruningPlan
from diplugin.surgery import apply_plan
from diplugin.verification import silence

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]
IMAGE = (torch.randn(1, 3, 8, 8),)


class Chain(nn.Module):
    """A stem, a middle and a head; what lies between the first two is another matter."""

    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.norm, self.head = head or nn.Identity(), nn.Linear(6, 4)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Any:
        return self.head(self.norm(self.middle(self.between(F.relu(self.stem(x)))).mean((2, 3))))


class Shuffles(Chain):
    """Channels are interleaved between producer and reader."""

    def between(self, x: Tensor) -> Tensor:
        return x.view(len(x), 2, 4, *x.shape[2:]).transpose(1, 2).reshape(len(x), 8, *x.shape[2:])


class Indexes(Chain):
    """Reads the channels backwards: an index that is part of the program, not of the graph."""

    def between(self, x: Tensor) -> Tensor:
        return x.flip(1)


class SoftmaxOverChannels(Chain):
    """A softmax over channels: removing one changes all others."""

    def between(self, x: Tensor) -> Tensor:
        return x.softmax(1)


class AlsoReturned(Chain):
    """Features are read by the head and returned beside its logits."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.middle(F.relu(self.stem(x))).mean((2, 3)))
        return self.head(x), x


@pytest.mark.parametrize("norm", [nn.Identity, nn.LayerNorm, nn.BatchNorm1d])
@pytest.mark.parametrize(
    ("model", "guilty", "sound"),
    [(Shuffles, "stem", "middle"), (Indexes, "stem", "middle"), (AlsoReturned, "middle", "stem"),
     (SoftmaxOverChannels, "stem", "middle")],
)  # fmt: skip
def test_a_group_that_is_not_what_it_seems_is_left_alone(model: Any, guilty: str, sound: str, norm: Any) -> None:
    """Whatever normalises other channels of the network."""
    torch.manual_seed(0)
    net = model(norm(6))
    groups = trace_network(net, IMAGE).by_name
    assert "removing its channels" in groups[guilty].note
    assert groups[sound].prunable
    assert trace_network(net, IMAGE, verify=False).by_name[guilty].prunable


# --- normalisation over channels: removing one changes the statistics, which is legal ---


class ChannelsFirstNorm(nn.LayerNorm):
    """ConvNeXt's: over the channels of maps [N, C, H, W]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class Normed(nn.Module):
    """Two blocks; every channel goes through a normalisation over channels, read in another order if told so."""

    def __init__(self, norm: Callable[[int], nn.Module], order: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.a, self.first, self.b, self.second = nn.Conv2d(3, 8, 3), norm(8), nn.Conv2d(8, 12, 3), norm(12)
        self.head, self.order = nn.Linear(12, 4), order
        for layer in (self.first, self.second):
            if layer.weight is not None:
                nn.init.uniform_(layer.weight, 0.5, 2.0)
                nn.init.normal_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.a(x)))
        return self.head(F.relu(self.second(self.b(self.order(x)))).mean((2, 3)))


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": ChannelsFirstNorm,
    "bare layer": lambda c: ChannelsFirstNorm(c, elementwise_affine=False),
    "group": lambda c: nn.GroupNorm(2, c),
    "one group": lambda c: nn.GroupNorm(1, c),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_groups_under_statistics_over_channels_are_prunable(norm: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Normed(norm).to(dtype)
    assert {g.name for g in trace_network(model, (IMAGE[0].to(dtype),)).prunable} == {"a", "b"}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_and_are_checked_to_the_number_all_the_same(norm: Any) -> None:
    torch.manual_seed(0)
    groups = trace_network(Normed(norm, lambda x: x.flip(1)), IMAGE).by_name
    assert "no dependency explains" in groups["a"].note
    assert groups["b"].prunable


def test_tokens_under_layer_norm_are_prunable() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    for shape in ((2, 5), (2, 8, 5), (2, 7, 5)):
        assert trace_network(model, (torch.randn(shape),)).by_name["0"].prunable


class NormedConcat(nn.Module):
    """A GroupNorm over a concatenation: a channel less in one piece shifts the blocks of the other."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.GroupNorm(blocks, 16)
        self.middle, self.head = nn.Conv2d(16, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.cat([self.a(x), self.b(x)], 1))
        return self.head(self.middle(F.relu(x)).mean((2, 3)))


@pytest.mark.parametrize(("blocks", "prunable"), [(4, {"middle"}), (1, {"a", "b", "middle"})])
def test_blocks_that_would_shift_are_left_alone(blocks: int, prunable: set[str]) -> None:
    torch.manual_seed(0)
    assert {g.name for g in trace_network(NormedConcat(blocks), IMAGE).prunable} == prunable


# --- silence: an independent twin of removal ---


class Tied(nn.Module):
    """A table of words is the last layer's weight; two inner layers share one weight; or they only equal each other."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.one, self.two = nn.Linear(8, 6), nn.Linear(8, 6)
        self.one_back, self.two_back = nn.Linear(6, 8), nn.Linear(6, 8)
        self.last.weight, self.two.weight = self.table.weight, self.one.weight
        if not tied:
            self.last.weight, self.two.weight = (
                nn.Parameter(m.weight.detach().clone()) for m in (self.table, self.one)
            )

    def forward(self, words: Tensor) -> Tensor:
        x = self.table(words)
        x = x + self.one_back(F.relu(self.one(x)))
        return self.last(x + self.two_back(F.relu(self.two(x))))


def test_shared_weights_stay_shared_and_are_not_cut_apart() -> None:
    """Cut differently they would be two, and the network larger than predicted; its twin holds two from the start."""
    torch.manual_seed(0)
    model, words = Tied(tied=True).eval(), torch.arange(6)[None]
    apart = Tied(tied=False).eval()
    apart.load_state_dict(model.state_dict())
    trace = trace_network(model, (words,))
    stream = next(g.name for g in trace.groups if any(m.layer == "table" for m in g.members))
    assert {g.name for g in trace.prunable} == {stream}
    assert all("share" in g.note for g in trace.groups if g.name in ("one", "two"))
    assert {g.name for g in trace_network(apart, (words,)).prunable} == {stream, "one", "two"}
    plan = PruningPlan({stream: (1, 2, 4, 7)}, trace.base_widths, {}, trace.inputs)
    pruned, twin = (apply_plan(copy.deepcopy(net), plan) for net in (model, apart))
    assert pruned.last.weight is pruned.table.weight and pruned.two.weight is pruned.one.weight
    assert params(trace).cost(plan.widths) == sum(p.numel() for p in pruned.parameters())
    torch.testing.assert_close(pruned(words), twin(words))


@pytest.mark.parametrize("kind", KINDS)
def test_silencing_equals_masking_what_readers_read(make_net: MakeNet, kind: str) -> None:
    model, inputs = make_net(kind, batch=3)
    trace = trace_network(model, inputs)
    removed = {g.name: tuple(u + b * g.units for u in range(0, g.units - 1, 2) for b in range(g.blocks))
               for g in trace.prunable}  # fmt: skip
    silent = copy.deepcopy(model)
    silence(silent, trace.prunable, removed)
    got, want = silent(*inputs), masked(model, trace, removed)(*inputs)
    for one, two in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
