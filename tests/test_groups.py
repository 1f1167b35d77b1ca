"""Channel groups: complete, unevenness and ties noticed, and the model left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_networks import KINDS
from torch import Tensor, nn

from diplugin.errors import ModelError, PlanError
from diplugin.groups import ChannelGroup, _common_blocks, remove_channels, trace_groups

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]


def by_name(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, ChannelGroup]:
    return {group.name: group for group in trace_groups(model, inputs)}


def sides(group: ChannelGroup) -> set[tuple[str, str]]:
    return {(m.layer, m.side) for m in group.members}


@pytest.mark.parametrize("kind", KINDS)
def test_every_channel_of_a_group_has_a_place_in_every_member(make_net: MakeNet, kind: str) -> None:
    model, inputs = make_net(kind)
    modules = dict(model.named_modules()) | dict(model.named_parameters())
    for group in trace_groups(model, inputs):
        assert group.members
        for member in group.members:
            assert member.layer in modules
            assert len(member.channels) == len(member.roots)
            if group.prunable:
                assert set(member.roots) == set(range(group.channels))
                assert len(member.channels) == group.channels * group.multiplicity(member)
        assert group.channels % group.blocks == 0
        assert group.units * group.blocks == group.channels


@pytest.mark.parametrize("kind", KINDS)
def test_tracing_changes_nothing(make_net: MakeNet, kind: str, state_of: Any, assert_same_state: Any) -> None:
    model, inputs = make_net(kind)
    model.train()
    next(model.children()).eval()
    for p in list(model.parameters())[:2]:
        p.requires_grad_(False)
    before = state_of(model)
    trace_groups(model, inputs)
    assert_same_state(model, before)


def test_a_residual_stream_is_one_group_with_many_producers(make_net: MakeNet) -> None:
    groups = by_name(*make_net("residual"))
    stream = next(g for g in groups.values() if ("stem", "out") in sides(g))
    assert sides(stream) >= {
        ("stem", "out"),
        ("a2", "out"),
        ("a1", "in"),
        ("c1", "in"),
        ("project", "in"),
        ("bn0", "out"),
    }
    assert sides(groups["a1"]) == {("a1", "out"), ("b1", "out"), ("a2", "in")}


def test_flatten_maps_sixteen_inputs_to_one_root(make_net: MakeNet) -> None:
    group = by_name(*make_net("vgg"))["3"]
    reader = group.side("in")[0]
    assert group.channels == 6
    assert group.multiplicity(reader) == 16
    assert [reader.roots[reader.channels.index(c)] for c in (0, 15, 16, 95)] == [0, 0, 1, 5]


def test_concatenation_gives_offset_ranges(make_net: MakeNet) -> None:
    groups = by_name(*make_net("dense"))
    read = {name: next(m for m in groups[name].side("in") if m.layer == "head") for name in ("stem", "c1", "c2")}
    assert [min(read[n].channels) for n in ("stem", "c1", "c2")] == [0, 6, 10]
    assert {c for m in read.values() for c in m.channels} == set(range(15))


def test_depthwise_is_a_member_on_both_sides(make_net: MakeNet) -> None:
    group = next(g for g in trace_groups(*make_net("depthwise")) if ("depth.0", "out") in sides(g))
    assert sides(group) >= {("depth.0", "in"), ("expand.0", "out"), ("squeeze.2", "out"), ("squeeze.0", "in")}
    assert group.blocks == 1
    assert {m.kind for m in group.members if m.layer == "depth.0"} == {"depthwise"}


def test_grouped_convolutions_ask_for_blocks_on_both_sides(make_net: MakeNet) -> None:
    groups = by_name(*make_net("grouped"))
    assert {name: groups[name].blocks for name in ("0", "2", "5")} == {"0": 4, "2": 4, "5": 1}


def test_parameters_are_members_by_their_own_name(make_net: MakeNet) -> None:
    groups = by_name(*make_net("tokens"))
    assert ("position", "out") in sides(groups["down"])


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_left_alone_and_say_so(make_net: MakeNet, kind: str) -> None:
    outputs = [g for g in trace_groups(*make_net(kind)) if not g.side("in") and not g.side("in", ("depthwise",))]
    assert outputs
    assert all("output of the model" in g.note for g in outputs)


def test_zero_padded_shortcuts_are_noticed_without_running_anything(make_net: MakeNet) -> None:
    groups = trace_groups(*make_net("option_a"))
    tied = [g for g in groups if {("stem", "out"), ("b", "out"), ("d", "out")} & sides(g)]
    assert tied
    assert all("zero-padded or sliced shortcut" in g.note for g in tied)
    assert {g.name for g in groups if g.prunable} == {"a", "c"}


class Chunked(nn.Module):
    """Two consumers that read one half of the channels each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.stem(x)).chunk(2, 1)
        return self.head((self.left(left) + self.right(right)).mean((2, 3)))


def test_chunks_are_left_alone() -> None:
    groups = by_name(Chunked(), (torch.randn(1, 3, 8, 8),))
    assert "unevenly" in groups["stem"].note
    assert next(g for g in groups.values() if ("left", "out") in sides(g)).prunable


class Half(nn.Module):
    """One half of a layer's channels is read; beside a bare parameter torch-pruning takes it for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gain = nn.Conv2d(3, 8, 3), nn.Parameter(torch.rand(8, 1, 1))
        self.first, self.head = nn.Conv2d(8, 8, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(F.relu(self.stem(x) * self.gain)).chunk(2, 1)[1].mean((2, 3)))


def test_channels_that_a_reader_does_not_have_are_noticed_without_running_anything() -> None:
    groups = by_name(Half(), (torch.randn(1, 3, 8, 8),))
    assert "past the channels of head" in groups["first"].note
    assert groups["stem"].prunable


class Joined(nn.Module):
    """Two producers side by side under one layer, which may divide its channels into blocks."""

    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.reader, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), reader, nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.reader(torch.cat([self.a(x), self.b(x)], 1)))


@pytest.mark.parametrize("reader", [nn.Conv2d(16, 16, 3, groups=4), nn.GroupNorm(4, 16)])
def test_a_part_of_what_comes_in_blocks_of_one_size_is_left_alone(reader: nn.Module) -> None:
    groups = by_name(Joined(reader), (torch.randn(1, 3, 8, 8),))
    assert all("channels of reader, which come in 4 blocks" in groups[name].note for name in "ab")


@pytest.mark.parametrize("reader", [nn.Conv2d(16, 16, 3), nn.GroupNorm(1, 16)])
def test_a_part_of_what_comes_in_one_piece_is_not(reader: nn.Module) -> None:
    groups = by_name(Joined(reader), (torch.randn(1, 3, 8, 8),))
    assert all(groups[name].prunable for name in "ab")


class Circles(nn.Module):
    """A slice of a tensor is concatenated to it, and both are added up: torch-pruning alone never ends on this."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.narrow, self.wide = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 6, 1), nn.Conv2d(12, 6, 1)
        self.gain, self.head = nn.PReLU(8), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        half = x[:, ::2]
        both = torch.cat([self.gain(x), half], 1)
        return self.head((self.wide(both) * self.narrow(half).sigmoid()).mean((2, 3)))


def test_circles_end() -> None:
    with pytest.raises(ModelError, match="goes in circles"):
        trace_groups(Circles(), (torch.randn(1, 3, 8, 8),))


def test_an_unknown_module_is_named_in_the_note() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attention = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.head((x + self.attention(x, x, x)[0]).mean(1))

    group = by_name(Attends(), (torch.randn(1, 3, 5),))["embed"]
    assert "attention is a MultiheadAttention" in group.note


def test_a_frozen_backbone_has_groups_all_the_same(make_net: MakeNet) -> None:
    model, inputs = make_net("plain")
    free = trace_groups(model, inputs)
    for p in model.parameters():
        p.requires_grad_(False)
    assert trace_groups(model, inputs) == free
    assert not any(p.requires_grad for p in model.parameters())


def test_surroundings_do_not_matter(make_net: MakeNet) -> None:
    model, inputs = make_net("residual")
    expected = trace_groups(model, inputs)
    with torch.no_grad():
        assert trace_groups(model, inputs) == expected
    with torch.inference_mode():
        assert trace_groups(model, inputs) == expected


@given(periods=st.tuples(st.integers(1, 6), st.integers(1, 6)), scale=st.integers(1, 4))
def test_common_blocks_are_whole_units_for_both(periods: tuple[int, int], scale: int) -> None:
    channels = periods[0] * periods[1] * scale
    blocks = _common_blocks(channels, periods[0], periods[1])
    unit = {k * (channels // blocks) for k in range(blocks)}
    for own in periods:
        per_block = channels // own
        counts = [sum(c // per_block == b for c in unit) for b in range(own)]
        assert len(set(counts)) == 1


def test_blocks_that_do_not_divide_the_channels_leave_nothing_to_remove() -> None:
    assert _common_blocks(8, 1, 3) == 8


# --- bad input ---


class Returns(nn.Module):
    """A model that returns something else than its logits."""

    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.what = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), what

    def forward(self, x: Tensor) -> Any:
        return self.what(self.second(F.relu(self.first(x))))


@pytest.mark.parametrize("what", [lambda y: (y, y.mean()), lambda y: [y], lambda y: {"a": y, "b": {"c": y + 1}}])
def test_structured_outputs_are_followed(what: Callable[[Tensor], Any]) -> None:
    groups = by_name(Returns(what), (torch.randn(1, 3, 8, 8),))
    assert groups["first"].prunable
    assert not groups["second"].prunable


@pytest.mark.parametrize("what", [lambda y: None, lambda y: "logits", lambda y: 3, lambda y: object()])
def test_outputs_without_tensors_are_refused(what: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ModelError, match="expected a model that returns tensors"):
        trace_groups(Returns(what), (torch.randn(1, 3, 8, 8),))


def test_a_detached_output_is_refused() -> None:
    with pytest.raises(ModelError, match="undetached"):
        trace_groups(Returns(Tensor.detach), (torch.randn(1, 3, 8, 8),))


@pytest.mark.parametrize(
    "inputs", [(), (torch.randn(1, 4, 8, 8),), (torch.randn(1, 3, 1, 1),), (torch.zeros(1).long(),)]
)
def test_inputs_that_do_not_fit(
    make_net: MakeNet, inputs: tuple[Tensor, ...], state_of: Any, assert_same_state: Any
) -> None:
    model, _ = make_net("plain")
    model.train()
    before = state_of(model)
    with pytest.raises(ModelError, match="expected a model that runs on example inputs of shapes") as caught:
        trace_groups(model, inputs)
    assert "\n" not in str(caught.value)
    assert_same_state(model, before)


def test_the_message_names_the_real_cause(make_net: MakeNet) -> None:
    with pytest.raises(ModelError, match="to have 3 channels, but got 4 channels"):
        trace_groups(make_net("plain")[0], (torch.randn(1, 4, 8, 8),))


def test_no_module_and_no_tuple(make_net: MakeNet) -> None:
    model, inputs = make_net("plain")
    with pytest.raises(ModelError, match=r"torch\.nn\.Module"):
        trace_groups(lambda x: x, inputs)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="tuple such as"):
        trace_groups(model, inputs[0])  # type: ignore[arg-type]


def test_nothing_to_prune_is_no_error() -> None:
    assert trace_groups(nn.Sequential(nn.ReLU()), (torch.randn(1, 3),)) == []
    assert not any(g.prunable for g in trace_groups(nn.Linear(3, 2), (torch.randn(1, 3),)))


@pytest.mark.parametrize(
    ("name", "channels"), [("nope", (0,)), ("2", (0,)), ("0", (8,)), ("0", (-1,)), ("0", tuple(range(8)))]
)
def test_removing_what_is_not_there(make_net: MakeNet, name: str, channels: tuple[int, ...]) -> None:
    model, inputs = make_net("plain")
    with pytest.raises(PlanError):
        remove_channels(model, inputs, {name: channels})


def test_removing_nothing_changes_nothing(make_net: MakeNet) -> None:
    model, inputs = make_net("plain")
    expected = model(*inputs)
    assert torch.equal(remove_channels(model, inputs, {"0": ()})(*inputs), expected)
