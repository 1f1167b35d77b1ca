"""Taps: which tensors stand for a group, and how their scores become its root channels'."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from diplugin.discriminant import channel_scores
from diplugin.groups import ChannelGroup, GroupMember, trace_groups
from diplugin.taps import AfterActivation, AtLayer, AtNorm, Largest, Mean, Tap, TapPoint, Total, points_of, root_scores

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]


def points(tap: Tap, group: ChannelGroup) -> set[tuple[str, str]]:
    return {(p.layer, p.side) for p in points_of([group], tap)}


def group_of(make_net: MakeNet, kind: str, producer: str) -> ChannelGroup:
    groups = trace_groups(*make_net(kind))
    return next(g for g in groups if (producer, "out") in {(m.layer, m.side) for m in g.members})


def test_readers_producers_and_norms(make_net: MakeNet) -> None:
    stream = group_of(make_net, "residual", "stem")
    assert points(AfterActivation(), stream) == {("a1", "in"), ("c1", "in"), ("project", "in")}
    assert points(AtLayer(), stream) == {("stem", "out"), ("a2", "out")}
    assert points(AtNorm(), stream) == {("bn0", "out"), ("b2", "out")}


def test_depthwise_layers_are_neither_readers_nor_producers_of_a_wider_group(make_net: MakeNet) -> None:
    group = group_of(make_net, "depthwise", "depth.0")
    assert points(AfterActivation(), group) == {("project.0", "in"), ("squeeze.0", "in")}
    assert points(AtLayer(), group) == {("expand.0", "out"), ("squeeze.2", "out")}


def test_without_readers_the_producers_are_scored(make_net: MakeNet) -> None:
    group = group_of(make_net, "plain", "11")
    assert points(AfterActivation(), group) == {("11", "out")}


def test_without_norms_the_producers_are_scored(make_net: MakeNet) -> None:
    assert points(AtNorm(), group_of(make_net, "vgg", "0")) == {("0", "out")}


def test_a_tensor_is_asked_for_once(make_net: MakeNet) -> None:
    groups = [g for g in trace_groups(*make_net("dense")) if g.prunable]
    wanted = points_of(groups, AfterActivation())
    assert len(wanted) == len(set(wanted))
    assert TapPoint("head", "in") in wanted


def test_taps_are_tapping() -> None:
    assert all(isinstance(tap, Tap) for tap in (AfterActivation(), AtLayer(), AtNorm()))
    assert AfterActivation() == AfterActivation()


def scored(values: dict[tuple[str, str], list[float]]) -> Callable[[TapPoint], Tensor | None]:
    """A lookup of made-up scores by (layer, side)."""

    def at(point: TapPoint) -> Tensor | None:
        found = values.get((point.layer, point.side))
        return None if found is None else torch.tensor(found, dtype=torch.float64)

    return at


TWO_READERS = ChannelGroup(
    "p", 2,
    (
        GroupMember("p", "out", (0, 1), (0, 1)),
        GroupMember("flat", "in", (0, 1, 2, 3), (0, 0, 1, 1)),
        GroupMember("cat", "in", (6, 5), (0, 1)),
    ),
)  # fmt: skip


def test_scores_are_summed_onto_roots_and_averaged_over_tensors() -> None:
    at = scored({("flat", "in"): [1, 2, 3, 4], ("cat", "in"): [0, 0, 0, 0, 0, 10, 20]})
    expected = {Mean: [(3 + 20) / 2, (7 + 10) / 2], Total: [23, 17], Largest: [20, 10]}
    for combine, values in expected.items():
        got = root_scores(TWO_READERS, AfterActivation(combine()), at)
        assert got is not None
        assert got.tolist() == values


def test_tensors_that_never_ran_do_not_count() -> None:
    got = root_scores(TWO_READERS, AfterActivation(), scored({("flat", "in"): [1, 2, 3, 4]}))
    assert got is not None
    assert got.tolist() == [3, 7]
    assert root_scores(TWO_READERS, AfterActivation(), scored({})) is None


def test_a_channel_of_which_nothing_is_known_is_the_last_to_go() -> None:
    partial = ChannelGroup("p", 3, (GroupMember("r", "in", (0, 1), (0, 2)),))
    got = root_scores(partial, AfterActivation(), scored({("r", "in"): [5.0, 2.0]}))
    assert got is not None
    assert got.tolist() == [5.0, 5.0, 2.0]


class Halves:
    """A tap of the user's own."""

    def members(self, group: ChannelGroup) -> tuple[GroupMember, ...]:
        return group.members[:1]


def test_a_tap_of_the_users_own() -> None:
    assert isinstance(Halves(), Tap)
    got = root_scores(TWO_READERS, Halves(), scored({("p", "out"): [1.0, 2.0]}))
    assert got is not None
    assert got.tolist() == [1.0, 2.0]


@given(seed=st.integers(0, 1000), positions=st.integers(1, 5), channels=st.integers(1, 6))
def test_summing_over_a_flatten_is_the_score_of_the_map(seed: int, positions: int, channels: int) -> None:
    """Scores of the 16 flattened inputs of a channel, summed, are the score of its map: DI does not see the shape."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(24, channels, positions, generator=generator, dtype=torch.float64)
    labels = torch.arange(24) % 3
    flat = channel_scores(maps.flatten(1), labels)
    own = tuple(range(channels * positions))
    group = ChannelGroup("p", channels, (GroupMember("l", "in", own, tuple(i // positions for i in own)),))
    got = root_scores(group, AfterActivation(), lambda _: flat)
    torch.testing.assert_close(got, channel_scores(maps, labels))


@pytest.mark.parametrize("device", ["cpu"])
def test_scores_of_lower_precision_are_summed_in_float64(device: str) -> None:
    got = root_scores(TWO_READERS, Halves(), lambda _: torch.tensor([1.0, 2.0], device=device))
    assert got is not None
    assert got.dtype == torch.float64
