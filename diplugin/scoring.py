"""Scores of channel groups: one pass over the data, one vector for every group.

`GroupScores` speaks in fractions of label variance, the same unit for every layer, which is what lets a search compare
channels across the network by their score per cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .discriminant import Sketch
from .errors import DataError
from .features import (
    CHUNK_SIZE,
    Forward,
    GetLabels,
    Observation,
    ScoreProfile,
    UntilStable,
    forward_inputs,
    labels_of,
    score_points,
)
from .filters import filter_norms
from .fitted_scores import weighted_layers
from .groups import ChannelGroup
from .modes import evaluating
from .reader_energy import measuring
from .taps import AfterActivation, Tap, points_of, root_scores
from .team import current_team


@dataclass(frozen=True)
class GroupScores:
    """DI scores of the root channels of every group that ran.

    Attributes:
        scores: group name -> float64 [channels]: first-order DI loss of removing that channel alone, a fraction of
            label variance.
        di: group name -> DI of the tapped tensors (their mean), in [0, 1).
        images: how many images were scored.
        rho: the relative ridge.
        energies: group name -> float64 [channels]: how much of what its readers write comes from each channel
            (`reader_energy`); empty where it was not asked for.
        norms: group name -> float64 [channels]: squared norms of the filters that make each channel; likewise.
    """

    scores: Mapping[str, Tensor]
    di: Mapping[str, float]
    images: int
    rho: float
    energies: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Mapping[str, Tensor] = field(default_factory=dict)


def score_groups(
    model: nn.Module,
    loader: Iterable[Any],
    groups: Sequence[ChannelGroup],
    *,
    rho: float = 10.0,
    tap: Tap | None = None,
    get_labels: GetLabels = labels_of,
    forward: Forward = forward_inputs,
    chunk_size: int = CHUNK_SIZE,
    class_weight: str | None = None,
    sketch: Sketch | None = None,
    until: UntilStable | None = None,
    profile: ScoreProfile | None = None,
) -> GroupScores:
    """Score every prunable group by first-order DI.

    Args:
        model: run in eval mode, left as it was.
        loader: batches of (inputs, labels); other forms with `get_labels(batch)` and `forward(model, batch)`.
        groups: from `trace_groups`; the ones with a note are passed over.
        rho: ridge relative to the mean energy of an image.
        tap: which tensors are scored, see `diplugin.taps`.
        chunk_size: images per DI problem; scores of different sizes do not compare.
        sketch: how much of large maps is read, see `discriminant.Sketch`.
        until: stop before the data ends, once the ranking is reliable.
        profile: a notebook for time, memory and reliability.

    Raises:
        DataError: unusable data, or a group none of whose layers ran.
    """
    tap = tap or AfterActivation()
    wanted = [group for group in groups if group.prunable]
    observation = Observation(get_labels, forward, rho, class_weight, chunk_size, sketch or Sketch())
    seen = score_points(model, loader, points_of(wanted, tap), observation, until=until, profile=profile)
    scores: dict[str, Tensor] = {}
    di: dict[str, float] = {}
    for group in wanted:
        total = root_scores(group, tap, lambda point: seen[point].scores if point in seen else None)
        if total is None:
            raise DataError(f"expected the layers of group {group.name!r} to run on the data, none of them did")
        scores[group.name] = total
        ran = [seen[p].di for p in points_of([group], tap) if p in seen]
        di[group.name] = sum(ran) / len(ran)
    images = max((s.images for s in seen.values()), default=0)
    return GroupScores(scores, di, images, rho)


def group_norms(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """Squared norms of the filters that make each channel of the prunable groups, where filters do."""
    layers = dict(model.named_modules())
    found = {group.name: filter_norms(layers, group) for group in groups if group.prunable}
    return {name: norms for name, norms in found.items() if norms is not None}


def group_energies(
    model: nn.Module, batch: Any, groups: Sequence[ChannelGroup], forward: Forward = forward_inputs
) -> dict[str, Tensor]:
    """Reader energy of the root channels of every prunable group, float64 [channels], from one batch.

    Summed over a group's readers; no labels are needed.
    """
    with evaluating(model), torch.no_grad(), measuring(model, weighted_layers(model)) as meter:
        forward(model, batch)
    found = meter.energies()
    result = {}
    for group in groups:
        total = torch.zeros(group.channels, dtype=torch.float64)
        for member in group.side("in", ("weighted", "depthwise")) if group.prunable else ():
            if member.layer in found:
                read = found[member.layer].cpu()[torch.tensor(member.channels)]
                total.index_add_(0, torch.tensor(member.roots), read)
        if bool(total.any()):
            result[group.name] = total
    # Computed by all alike; were their machines to round differently, they would still go on with one result.
    current_team().follow_first(list(result.values()))
    return result
