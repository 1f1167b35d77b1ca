"""Channel groups: channels that must be removed together, as torch-pruning's dependency graph sees them.

This file and `dependency.py` are the only ones of the core that speak torch-pruning's language. A `ChannelGroup` is
plain data (names and indices, no modules), so everything above works on numbers: costs are predicted, plans are
searched and written, and the model itself is touched once, at the end, by `remove_channels`.

A group's *root channels* are numbered 0 … channels-1. Each *member* is one side ("in" or "out") of one layer with the
map from its own channels to root channels: sixteen inputs of a linear layer behind a flatten belong to one root,
a concatenation's consumer holds an offset range, a depthwise convolution is a member on both sides.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import nn
from torch_pruning.ops import OPTYPE

from .dependency import bounded, dependency_graph, frozen_kept
from .errors import PlanError

Side = Literal["in", "out"]

_WEIGHTED = {OPTYPE.CONV, OPTYPE.LINEAR}
_PER_CHANNEL = {OPTYPE.BN, OPTYPE.PRELU, OPTYPE.IN, OPTYPE.LN, OPTYPE.GN, OPTYPE.PARAMETER, OPTYPE.EMBED}
_PLUMBING = {
    OPTYPE.CONCAT, OPTYPE.SPLIT, OPTYPE.RESHAPE, OPTYPE.UNBIND, OPTYPE.EXPAND, OPTYPE.SLICE, OPTYPE.OUTPUT,
    OPTYPE.ELEMENTWISE,
}  # fmt: skip
_OPTYPE_NAMES = {
    OPTYPE.CONV: "weighted", OPTYPE.LINEAR: "weighted", OPTYPE.DEPTHWISE_CONV: "depthwise", OPTYPE.BN: "batch_norm",
    OPTYPE.LN: "layer_norm", OPTYPE.GN: "group_norm", OPTYPE.IN: "instance_norm", OPTYPE.PARAMETER: "parameter",
    OPTYPE.PRELU: "prelu", OPTYPE.EMBED: "embedding",
}  # fmt: skip


@dataclass(frozen=True)
class GroupMember:
    """One side of one layer: its channel `channels[i]` belongs to root channel `roots[i]`.

    `kind` is "weighted" (convolution, linear), "depthwise", "batch_norm", "layer_norm", "group_norm",
    "instance_norm", "prelu", "embedding" or "parameter"; a bare parameter's `layer` is the parameter's own name.
    """

    layer: str
    side: Side
    channels: tuple[int, ...]
    roots: tuple[int, ...]
    kind: str = "weighted"

    def channels_of(self, roots: Collection[int]) -> list[int]:
        """This side's channels that belong to these root channels."""
        wanted = set(roots)
        return [c for c, root in zip(self.channels, self.roots, strict=True) if root in wanted]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that leave the network together.

    Attributes:
        name: the first producing layer, by its qualified module name.
        channels: number of root channels.
        members: every layer side that holds them.
        blocks: grouped convolutions need equally many channels in each of their blocks, at the same positions:
            root channels k, k + channels/blocks, k + 2 channels/blocks, … leave as one *unit*. 1: every channel
            is its own unit.
        note: why the group must be left alone; empty for a prunable one.
    """

    name: str
    channels: int
    members: tuple[GroupMember, ...]
    blocks: int = 1
    note: str = ""

    @property
    def prunable(self) -> bool:
        return not self.note

    @property
    def units(self) -> int:
        """Number of smallest sets of channels that can be removed."""
        return self.channels // self.blocks

    def side(self, side: Side, kinds: Sequence[str] = ("weighted",)) -> tuple[GroupMember, ...]:
        """The members on one side, of the given kinds."""
        return tuple(m for m in self.members if m.side == side and m.kind in kinds)

    def multiplicity(self, member: GroupMember) -> int:
        """How many of the member's channels belong to one root channel."""
        return len(member.channels) // self.channels


def trace_groups(model: nn.Module, example_inputs: tuple[Any, ...]) -> list[ChannelGroup]:
    """All channel groups of a model, in torch-pruning's order; the ones to be left alone carry a `note`.

    Args:
        model: any module that torch-pruning can trace; weights, modes and `requires_grad` are not changed.
        example_inputs: positional inputs, a tuple of tensors.

    Raises:
        ModelError: the model does not run on the example inputs.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> [(g.name, g.channels, g.prunable) for g in trace_groups(net, (torch.randn(1, 3, 8, 8),))]
    [('2', 4, False), ('0', 8, True)]
    """
    graph = dependency_graph(model, example_inputs)
    with warnings.catch_warnings(), bounded(500 + 4 * len(graph.module2node)):
        warnings.simplefilter("ignore")
        groups = [group_from_torch_pruning(graph, group) for group in graph.get_all_groups()]
    return _note_shared(_note_partial(groups, graph))


def group_from_torch_pruning(graph: tp.DependencyGraph, group: Any) -> ChannelGroup:
    """A `ChannelGroup` with the same members as one of torch-pruning's groups.

    Root channels are numbered by their place in `group[0].idxs`, which for a full group is the channel itself.
    """
    channels, blocks, notes = len(group[0].idxs), 1, []
    place: dict[int | None, int] = {index: i for i, index in enumerate(group[0].idxs)}
    members: list[GroupMember] = []
    for item in group.items:
        node, kind = item.dep.target, item.dep.target.type
        if kind in _PLUMBING:
            continue
        name = _name(graph, node)
        if kind not in _OPTYPE_NAMES:
            notes.append(f"{name} is a {type(node.module).__name__}, which is not pruned here")
            continue
        roots = [place.get(root, -1) for root in item.root_idxs or (None,)]
        if min(roots, default=0) < 0:
            notes.append(f"torch-pruning does not map the channels of {name}")
            continue
        for side in _sides(graph, item.dep, kind):
            members.append(GroupMember(name, side, tuple(item.idxs), tuple(roots), _OPTYPE_NAMES[kind]))
        own, inside = _blocks_of(node.module, kind), members[-1].side == "in"
        width = (graph.get_in_channels if inside else graph.get_out_channels)(node.module)
        if width is not None and max(item.idxs, default=0) >= width:
            notes.append(f"it leads past the channels of {name}, through a zero-padded or sliced shortcut")
        if own > 1 and len(set(item.idxs)) < (width or 0):
            notes.append(f"it holds a part of the channels of {name}, which come in {own} blocks of one size")
        blocks = _common_blocks(channels, blocks, own)
    result = ChannelGroup(_name(graph, group[0].dep.target), channels, tuple(members), blocks)
    return replace(result, note="; ".join(dict.fromkeys([*notes, *_own_notes(result)])))


def _own_notes(group: ChannelGroup) -> Iterator[str]:
    if not group.side("in") and not group.side("in", ("depthwise",)):
        yield "its channels are an output of the model"
    for member in group.members:
        counts = Counter(member.roots)
        if len(counts) != group.channels or len(set(counts.values())) != 1:
            yield f"{member.layer} uses its channels unevenly"


def _name(graph: tp.DependencyGraph, node: Any) -> str:
    if isinstance(node.module, nn.Parameter):
        return graph._param_to_name[node.module]
    return graph._module2name.get(node.module, node.name)


def _sides(graph: tp.DependencyGraph, dep: Any, kind: OPTYPE) -> tuple[Side, ...]:
    if kind == OPTYPE.DEPTHWISE_CONV:
        return ("in", "out")
    if kind in _WEIGHTED and graph.is_in_channel_pruning_fn(dep.handler):
        return ("in",)
    return ("out",)


def _blocks_of(module: Any, kind: OPTYPE) -> int:
    if kind == OPTYPE.CONV:
        return module.groups
    return module.num_groups if kind == OPTYPE.GN else 1


def _common_blocks(channels: int, one: int, other: int) -> int:
    """Blocks whose period divides both periods, so that a unit is whole for both."""
    return channels // gcd(channels // one, channels // other) if channels % other == 0 else channels


def _note_partial(groups: list[ChannelGroup], graph: tp.DependencyGraph) -> list[ChannelGroup]:
    """Leave alone groups whose producers are covered in part or beyond their width: zero-padded, sliced shortcuts."""
    covered: dict[str, set[int]] = {}
    for group in groups:
        for m in group.members:
            if m.side == "out":
                covered.setdefault(m.layer, set()).update(m.channels)
    modules = {name: module for module, name in graph._module2name.items()}
    partial = {
        name for name, seen in covered.items()
        if name in modules and len(seen) != (graph.get_out_channels(modules[name]) or len(seen))
    }  # fmt: skip

    def note(group: ChannelGroup) -> ChannelGroup:
        tied = sorted({m.layer for m in group.members if m.side == "out"} & partial)
        if not tied or group.note:
            return group
        return replace(group, note=f"tied to {tied[0]} through a zero-padded or sliced shortcut")

    return [note(group) for group in groups]


def _note_shared(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """Leave alone groups that claim the same channel of the same layer."""
    owners = Counter((m.layer, m.side, c) for g in groups for m in g.members for c in set(m.channels))
    shared = {key[:2] for key, count in owners.items() if count > 1}

    def note(group: ChannelGroup) -> ChannelGroup:
        clash = next((m.layer for m in group.members if (m.layer, m.side) in shared), None)
        return group if clash is None or group.note else replace(group, note=f"shares channels of {clash}")

    return [note(group) for group in groups]


def remove_channels(
    model: nn.Module, example_inputs: tuple[Any, ...], removed: Mapping[str, Sequence[int]]
) -> nn.Module:
    """Physically remove root channels of the named groups, in place; returns the model.

    Parameters are replaced: an optimizer made before this call no longer trains the model. One that several modules
    share stays one, unless they lose different channels of it.

    Raises:
        ModelError: the model does not run on the example inputs.
        PlanError: a name is no layer of this model, or an index is out of its range.
    """
    graph = dependency_graph(model, example_inputs)
    modules = dict(model.named_modules())
    shared = shared_parameters(model)
    with frozen_kept(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, channels in removed.items():
            if not channels:
                continue
            module = modules.get(name, model)
            known = name in modules and module in graph.module2node
            pruner = graph.get_pruner_of_module(module) if known else None
            width = graph.get_out_channels(module) if known else None
            if pruner is None or width is None:
                raise PlanError(f"expected a prunable layer named {name!r}, the model has none: another model's plan?")
            if max(channels) >= width or min(channels) < 0 or len(set(channels)) >= width:
                raise PlanError(f"expected channels of {name!r} below {width} with one left over, got {list(channels)}")
            graph.get_pruning_group(module, pruner.prune_out_channels, sorted(channels)).prune(record_history=False)
        _share_again(model, shared)
    return model


def shared_parameters(model: nn.Module) -> list[tuple[str, ...]]:
    """All names of every parameter that has several, as a table of words that also scores them does."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tuple(found) for found in names.values() if len(found) > 1]


def _share_again(model: nn.Module, shared: Sequence[tuple[str, ...]]) -> None:
    """torch-pruning gives every module a parameter of its own; those that come out alike are one again."""
    for first, *others in shared:
        parameter = model.get_parameter(first)
        for name in others:
            other, (owner, _, leaf) = model.get_parameter(name), name.rpartition(".")
            if other.shape == parameter.shape and torch.equal(other, parameter):
                setattr(model.get_submodule(owner), leaf, parameter)
