"""Collecting what the referees look at: a network's features, in memory, for a few hundred images.

Scoring keeps no maps; scikit-learn needs them. So that any layer fits, maps are averaged onto a grid of at most
`GRID`×`GRID` positions as they come; the identities hold for those features as for any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, ModelError
from ..features import Forward, GetLabels, device_of, forward_inputs, labels_of, to_device
from ..groups import ChannelGroup
from ..modes import evaluating
from ..taps import AfterActivation, Tap
from .study import LayerValidation, validate_layer

GRID = 4


def validate_network(
    model: nn.Module,
    loader: Iterable[Any],
    groups: Sequence[ChannelGroup],
    *,
    images: int = 1000,
    rho: float = 10.0,
    tap: Tap | None = None,
    get_labels: GetLabels = labels_of,
    forward: Forward = forward_inputs,
    seed: int = 0,
) -> tuple[LayerValidation, ...]:
    """The evidence of `validate_layer` for every prunable group that reads one tensor per root channel.

    Args:
        model: run in eval mode, left as it was.
        loader: batches of (inputs, class ids); the first `images` images are used.
        groups: which to validate, from `trace_groups`.
        tap: which tensor stands for a group.

    Raises:
        DataError: unusable data or labels.
        ModelError: no group can be validated.
    """
    chosen = {group.name: _point(group, tap or AfterActivation()) for group in groups if group.prunable}
    points = {name: point for name, point in chosen.items() if point is not None}
    if not points:
        raise ModelError("expected a channel group whose features can be read, this model has none: check trace_groups")
    features, labels = collect(model, loader, list(points.values()), images, get_labels, forward)
    norms = {group.name: l1_norms(model, group) for group in groups}
    usable = {
        name: point
        for name, point in points.items()
        if len(features.get(point, ())) == len(labels) and float(features[point].var(dim=0).sum()) > 0
    }
    if not usable:
        raise DataError("expected features that vary over the images, one map an image, got none: check model and data")
    return tuple(
        validate_layer(
            name,
            features[point],
            labels,
            rho=rho,
            importances={} if (found := norms[name]) is None else {"L1": found},
            seed=seed,
        )
        for name, point in usable.items()
    )


def choose_groups(groups: Sequence[ChannelGroup], names: Sequence[str] | None) -> list[ChannelGroup]:
    """The groups of the given names, or every prunable one.

    Raises:
        ModelError: a name that no group has, or a group that is left alone.
    """
    prunable = {group.name: group for group in groups if group.prunable}
    unknown = [name for name in names or () if name not in prunable]
    if unknown:
        raise ModelError(f"expected a prunable channel group, got {unknown[0]!r}; there are {', '.join(prunable)}")
    return [prunable[name] for name in names or prunable]


def collect(
    model: nn.Module,
    loader: Iterable[Any],
    points: Sequence[tuple[str, str]],
    images: int,
    get_labels: GetLabels = labels_of,
    forward: Forward = forward_inputs,
) -> tuple[dict[tuple[str, str], Tensor], Tensor]:
    """Features [N, C, P] of (layer, side) points and class ids [N], for the first `images` images of the loader."""
    modules = dict(model.named_modules())
    parts: dict[tuple[str, str], list[Tensor]] = {point: [] for point in points}
    labels: list[Tensor] = []
    handles = [_watch(modules[layer], side, parts[layer, side]) for layer, side in points]
    try:
        with evaluating(model), torch.no_grad():
            for batch in loader:
                labels.append(get_labels(batch).cpu())
                forward(model, to_device(batch, device_of(model)))
                if sum(map(len, labels)) >= images:
                    break
    finally:
        for handle in handles:
            handle.remove()
    if not labels:
        raise DataError("expected a loader that yields batches, got an empty one")
    return {point: torch.cat(seen)[:images] for point, seen in parts.items() if seen}, torch.cat(labels)[:images]


def l1_norms(model: nn.Module, group: ChannelGroup) -> Tensor | None:
    """L1 norm of the filters that produce each root channel, summed over producers; None where there are none."""
    modules = dict(model.named_modules())
    total = torch.zeros(group.channels, dtype=torch.float64)
    producers = group.side("out") or group.side("out", ("depthwise",))
    for member in producers:
        weight = getattr(modules.get(member.layer), "weight", None)
        if not isinstance(weight, Tensor):
            return None
        if isinstance(modules[member.layer], (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            weight = weight.transpose(0, 1)
        norms = weight.detach().cpu().double().flatten(1).abs().sum(1)
        total.index_add_(0, torch.tensor(member.roots), norms[list(member.channels)])
    return total if producers else None


def _point(group: ChannelGroup, tap: Tap) -> tuple[str, str] | None:
    """The first tapped tensor that holds the group's channels one to one and nothing else."""
    for member in tap.members(group):
        if member.channels == tuple(range(group.channels)) and member.roots == member.channels:
            return member.layer, member.side
    return None


def _watch(module: nn.Module, side: str, into: list[Tensor]) -> Any:
    last = isinstance(module, (nn.Linear, nn.LayerNorm))

    def see(tensor: Any) -> None:
        if isinstance(tensor, Tensor):
            into.append(_on_grid(tensor.detach().movedim(-1, 1) if last else tensor.detach()))

    if side == "in":
        return module.register_forward_pre_hook(
            lambda _, args, kwargs: see(next(iter((*args, *kwargs.values())), None)), with_kwargs=True
        )
    return module.register_forward_hook(lambda _module, _args, output: see(output))


def _on_grid(maps: Tensor) -> Tensor:
    """[N, C, ...] as [N, C, P] with P ≤ GRID²."""
    maps = maps.float()
    if maps.ndim == 4:
        size = (min(GRID, maps.shape[2]), min(GRID, maps.shape[3]))
        maps = nn.functional.adaptive_avg_pool2d(maps, size)
    flat = maps.flatten(2) if maps.ndim > 2 else maps.unsqueeze(2)
    return nn.functional.adaptive_avg_pool1d(flat, GRID * GRID).cpu() if flat.shape[2] > GRID * GRID else flat.cpu()
