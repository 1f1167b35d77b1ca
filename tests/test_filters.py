"""Norms of filters against a loop, and their distances against a loop over pairs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from diplugin.filters import filter_distances, filter_norms
from diplugin.groups import ChannelGroup, GroupMember, trace_groups

IMAGES = (torch.zeros(1, 3, 8, 8),)


def by_loop(filters: Tensor) -> Tensor:
    """[C, ...] -> the sum of Euclidean distances to the other rows."""
    total = torch.zeros(len(filters), dtype=torch.float64)
    for i, j in itertools.permutations(range(len(filters)), 2):
        total[i] += (filters[i].double() - filters[j].double()).square().sum().sqrt()
    return total


def distances_of(net: nn.Module, group: ChannelGroup) -> Tensor:
    found = filter_distances(dict(net.named_modules()), group)
    assert found is not None
    return found


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
    found = distances_of(net, both)
    expected = by_loop(net.one.weight.detach()) + by_loop(net.two.weight.detach())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(distances_of(net, groups["side"]), by_loop(net.side.weight.detach()))


@pytest.mark.parametrize("blocks", [1, 2])
def test_transposed_convolutions_keep_their_outputs_in_the_second_place(blocks: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 3, groups=blocks), nn.Conv2d(6, 2, 1))
    group = next(g for g in trace_groups(net, IMAGES) if g.name == "1")
    weight: Tensor = net[1].weight.detach()  # type: ignore[assignment]
    expected = [by_loop(each.transpose(0, 1)) for each in weight.chunk(blocks)]
    torch.testing.assert_close(distances_of(net, group), torch.cat(expected))


def test_grouped_convolutions_compare_what_reads_the_same_inputs() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 2, 1))
    group = next(g for g in trace_groups(net, IMAGES) if g.name == "1")
    expected = [by_loop(each) for each in net[1].weight.detach().chunk(2)]  # type: ignore[union-attr]
    torch.testing.assert_close(distances_of(net, group), torch.cat(expected))


def test_depthwise_filters_do_not_count() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
    group = next(g for g in trace_groups(net, IMAGES) if g.prunable)
    torch.testing.assert_close(distances_of(net, group), by_loop(net[0].weight.detach()))


def test_channels_that_nothing_produces() -> None:
    members = (GroupMember("0", "in", (0, 1, 2), (0, 1, 2)),)
    layers = dict(nn.Sequential(nn.Conv2d(3, 2, 1)).named_modules())
    group = ChannelGroup("input", 3, members)
    assert filter_distances(layers, group) is None and filter_norms(layers, group) is None


def test_one_in_the_midst_lies_nearest_and_an_odd_one_out_farthest() -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1))
    weight: Tensor = net[0].weight  # type: ignore[assignment]
    with torch.no_grad():
        weight.copy_(torch.arange(5.0).square().view(5, 1, 1, 1).expand_as(weight))
        weight[1] = weight[2]
    found = distances_of(net, next(g for g in trace_groups(net, IMAGES) if g.name == "0"))
    torch.testing.assert_close(found, torch.tensor([33.0, 21, 21, 26, 47]).double() * 27**0.5)  # of 0, 4, 4, 9, 16


def test_linear_layers() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.ReLU(), nn.Linear(7, 3))
    group = next(g for g in trace_groups(net, IMAGES) if g.prunable)
    torch.testing.assert_close(distances_of(net, group), by_loop(net[1].weight.detach()))


@pytest.mark.parametrize("blocks", [1, 2])
def test_norms_are_those_of_the_weights_that_produce_a_channel(blocks: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 3, groups=blocks), nn.Conv2d(6, 2, 1))
    groups = {g.name: g for g in trace_groups(net, IMAGES)}
    for name, weights in (("0", net[0].weight), ("1", net[1].weight)):
        found, kernels = filter_norms(dict(net.named_modules()), groups[name]), weights.detach().double()  # type: ignore[union-attr]
        assert found is not None
        for channel in range(len(found)):
            if name == "0":
                own = kernels[channel]
            else:
                block, place = divmod(channel, 6 // blocks)
                own = kernels[4 // blocks * block : 4 // blocks * (block + 1), place]
            assert float(found[channel]) == pytest.approx(sum(float(w) ** 2 for w in own.flatten()))
