"""Scores for hosts that name layers, not channel groups: one number for every channel of a layer's side.

An output channel that belongs to a group gets its group's score, so layers that a shortcut sum ties together rank
their channels alike and agree on what to drop without being told to. Everything else (the inputs of a layer, a
classifier's outputs, a group that is left alone) is scored at the layer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .discriminant import ChunkScores
from .errors import DataError
from .features import Observation, score_points
from .groups import ChannelGroup, GroupMember, Side
from .taps import AfterActivation, Tap, TapPoint, points_of, root_scores

LayerSide = tuple[str, Side]


def score_layers(
    model: nn.Module,
    loader: Iterable[Any],
    sides: Sequence[LayerSide],
    groups: Sequence[ChannelGroup] = (),
    tap: Tap | None = None,
    observation: Observation | None = None,
    rank: Callable[[ChannelGroup, Tensor], Tensor] | None = None,
) -> dict[LayerSide, Tensor]:
    """First-order DI of every channel of the given layer sides.

    Args:
        model: run in eval mode, left as it was; its masks or pruned weights count.
        loader: batches, read by the observation.
        sides: (layer, "out") or (layer, "in").
        groups: from `trace_groups`, of the same network; empty scores every layer at its own tensors.
        tap: which tensors stand for a group.
        rank: from a group and its losses [channels] to the scores it gets, `ranking.hand_out` say; None leaves them.

    Returns:
        float64 [channels of that side], fractions of label variance.

    Raises:
        DataError: unusable data, or a layer that never runs on it.
        ModelError: a layer that the model does not have.
    """
    tap = tap or AfterActivation()
    owners = _owners(model, sides, groups)
    tied = list(dict.fromkeys(group for pairs in owners.values() for group, _ in pairs))
    direct = [TapPoint(*side) for side in sides if side not in owners]
    seen = score_points(model, loader, tuple(dict.fromkeys([*points_of(tied, tap), *direct])), observation)
    losses = {group.name: _roots(group, tap, seen) for group in tied}
    roots = {g.name: even_over_units(g, losses[g.name] if rank is None else rank(g, losses[g.name])) for g in tied}
    return {side: _tied(owners[side], roots) if side in owners else _own(side, seen) for side in sides}


def even_over_units(group: ChannelGroup, scores: Tensor) -> Tensor:
    """Scores [channels] with every channel given its unit's mean: grouped convolutions lose whole units."""
    if group.blocks == 1:
        return scores
    return scores.view(group.blocks, group.units).mean(0).repeat(group.blocks)


def _owners(
    model: nn.Module, sides: Sequence[LayerSide], groups: Sequence[ChannelGroup]
) -> dict[LayerSide, list[tuple[ChannelGroup, GroupMember]]]:
    """The group members that together hold every output channel of a layer; layers held in part are left out."""
    held: dict[LayerSide, list[tuple[ChannelGroup, GroupMember]]] = {}
    for group in groups:
        for member in group.members:
            if group.prunable and member.side == "out":
                held.setdefault((member.layer, "out"), []).append((group, member))
    modules = dict(model.named_modules())
    return {
        side: held[side] for side in sides
        if side in held and sum(len(m.channels) for _, m in held[side]) == _width(modules.get(side[0]))
    }  # fmt: skip


def _width(module: Any) -> int:
    names = ("out_channels", "out_features", "num_features", "num_channels")
    return next((int(getattr(module, name)) for name in names if hasattr(module, name)), -1)


def _roots(group: ChannelGroup, tap: Tap, seen: Mapping[TapPoint, ChunkScores]) -> Tensor:
    scores = root_scores(group, tap, lambda point: seen[point].scores if point in seen else None)
    if scores is None:
        raise _never_ran(group.name)
    return scores


def _tied(pairs: Sequence[tuple[ChannelGroup, GroupMember]], roots: Mapping[str, Tensor]) -> Tensor:
    result = torch.zeros(sum(len(member.channels) for _, member in pairs), dtype=torch.float64)
    for group, member in pairs:
        result[torch.tensor(member.channels)] = roots[group.name][torch.tensor(member.roots)]
    return result


def _own(side: LayerSide, seen: Mapping[TapPoint, ChunkScores]) -> Tensor:
    if TapPoint(*side) not in seen:
        raise _never_ran(side[0])
    return seen[TapPoint(*side)].scores.cpu()


def _never_ran(layer: str) -> DataError:
    return DataError(f"expected layer {layer!r} to run on the data, it never did: leave it out, or use other data")
