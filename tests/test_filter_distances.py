"""Distances of filters against a loop over pairs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from diplugin.filter_distances import filter_distances
from diplugin.groups import trace_groups

IMAGES = (torch.randn(1, 3, 8, 8),)


def by_loop(filters: Tensor) -> Tensor:
    """[C, ...] -> the sum of Euclidean distances to the other rows."""
    total = torch.zeros(len(filters), dtype=torch.float64)
    for i, j in itertools.permutations(range(len(filters)), 2):
        total[i] += (filters[i].double() - filters[j].double()).square().sum().sqrt()
    return total


class Branches(nn.Module):
    """Two producers of one group, joined by a sum, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.side = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1), nn.Conv2d(3, 4, 1)
        self.head = nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([(self.one(x) + self.two(x)).relu(), self.side(x)], 1)).mean((2, 3))


def test_distances_of_several_producers_add_up() -> None:
    net = Branches()
    groups = {g.name: g for g in trace_groups(net, IMAGES)}
    both = groups.get("one") or groups["two"]
    found = filter_distances(net, both)
    expected = by_loop(net.one.weight.detach()) + by_loop(net.two.weight.detach())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(filter_distances(net, groups["side"]), by_loop(net.side.weight.detach()))


@pytest.mark.parametrize("blocks", [1, 2])
def test_transposed_convolutions_keep_their_outputs_in_the_second_place(blocks: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 3, groups=blocks), nn.Conv2d(6, 2, 1))
    group = next(g for g in trace_groups(net, IMAGES) if g.name == "1")
    weight: Tensor = net[1].weight.detach()  # type: ignore[union-attr,assignment]
    each = 6 // blocks
    filters = torch.stack(
        [weight[4 // blocks * (c // each) : 4 // blocks * (c // each + 1), c % each] for c in range(6)]
    )
    torch.testing.assert_close(filter_distances(net, group), by_loop(filters))


def test_a_copy_lies_nearer_than_an_odd_one_out() -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1))
    with torch.no_grad():
        net[0].weight[1] = net[0].weight[0]
        net[0].weight[4] *= 10
    group = next(g for g in trace_groups(net, IMAGES) if g.name == "0")
    found = filter_distances(net, group)
    assert int(found.argmax()) == 4
    torch.testing.assert_close(found[0], found[1])


def test_linear_layers() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.ReLU(), nn.Linear(7, 3))
    group = next(g for g in trace_groups(net, IMAGES) if g.prunable)
    torch.testing.assert_close(filter_distances(net, group), by_loop(net[1].weight.detach()))
