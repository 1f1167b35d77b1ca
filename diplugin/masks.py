"""Masks: zeros over weights, as mask-based hosts and `torch.nn.utils.prune` produce them, and how they become channels.

Following: a channel is *gone* once no layer writes it any more, or no layer reads it; `follower_masks` then silences
what only passes it on (BatchNorm's shift, a depthwise convolution), which is what makes a masked network equal to the
smaller one. Removing: `remove_masked` bakes masks into the weights and takes out the channels that are gone; a channel
that only some of its layers mask stays, as zeros, so the outputs agree whatever the masks are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PlanError
from .groups import ChannelGroup, Side, remove_channels
from .network import trace_network

#: layer -> target ("weight", "bias", "_output_0", …) -> zeros and ones that broadcast to the target, or None.
Masks = Mapping[str, Mapping[str, Tensor | None]]
#: (layer, side) -> bool [channels of that side], True where everything is masked.
Dead = Mapping[tuple[str, Side], Tensor]

_FOLLOWERS = ("batch_norm", "depthwise")
#: Members through which a silent channel still speaks: a shift of their own, or statistics over all channels.
_SHIFTS, _STATISTICS = ("parameter", "embedding", "instance_norm"), ("layer_norm", "group_norm")
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def dead_channels(modules: Mapping[str, nn.Module], masks: Masks) -> dict[tuple[str, Side], Tensor]:
    """Channels of every masked convolution or linear layer whose weights (or whose input, output) are all zero."""
    dead: dict[tuple[str, Side], Tensor] = {}

    def add(layer: str, side: Side, zeros: Tensor) -> None:
        dead[layer, side] = zeros | dead[layer, side] if (layer, side) in dead else zeros

    for layer, targets in masks.items():
        module: Any = modules.get(layer)
        for target, mask in targets.items():
            if mask is None or module is None:
                continue
            if target.startswith(("_input_", "_output_")):
                add(layer, "in" if target.startswith("_input_") else "out", (_by_channel(mask) == 0).all(1))
            elif target == "weight" and mask.ndim >= 2:
                for side, zeros in _dead_sides(module, mask).items():
                    add(layer, side, zeros)
    return dead


def _dead_sides(module: Any, mask: Tensor) -> dict[Side, Tensor]:
    mask = mask.expand_as(module.weight)
    rows, columns = (~mask.bool().flatten(1).any(1)).cpu(), (~mask.bool().transpose(0, 1).flatten(1).any(1)).cpu()
    groups = getattr(module, "groups", 1)
    if groups == 1:
        return {"in": rows, "out": columns} if isinstance(module, _TRANSPOSED) else {"out": rows, "in": columns}
    # Column c of a grouped convolution belongs to one input channel in each block of rows.
    blocks = mask.bool().unflatten(0, (groups, -1)).transpose(1, 2)
    per_block = ~blocks.flatten(2).any(2).flatten().cpu()
    return {"in": rows, "out": per_block} if isinstance(module, _TRANSPOSED) else {"out": rows, "in": per_block}


def _by_channel(mask: Tensor) -> Tensor:
    """[C, positions] of an activation's mask [1, C, …] (or [C])."""
    return (mask.movedim(1, 0).flatten(1) if mask.ndim > 1 else mask[:, None]).cpu()


def _whole_channels(layer: str, target: str, mask: Tensor) -> Tensor:
    """[C] of an activation's mask."""
    parts = _by_channel(mask)
    if bool((parts != parts[:, :1]).any()):
        raise PlanError(f"expected masks over whole channels of {layer!r}, its {target} has one over parts of them, "
                        "which stay")  # fmt: skip
    return parts[:, 0]


def gone_roots(group: ChannelGroup, dead: Dead) -> tuple[int, ...]:
    """Root channels that no layer writes or no layer reads any more: whole units, one of which always stays.

    None where the others would notice: a position embedding writes as well, a LayerNorm counts zeros among the rest.
    """
    kinds = {member.kind for member in group.members}
    if kinds & set(_STATISTICS):
        return ()
    unwritten, unread = _all_dead(group, "out", dead), _all_dead(group, "in", dead)
    if kinds & set(_SHIFTS):
        unwritten = torch.zeros_like(unread)
    units = (unwritten | unread).view(group.blocks, group.units).all(0)
    if bool(units.all()):
        units[0] = False
    return tuple(torch.nonzero(units.repeat(group.blocks)).flatten().tolist())


def _all_dead(group: ChannelGroup, side: Side, dead: Dead) -> Tensor:
    members = group.side(side)
    result = torch.full((group.channels,), bool(members))
    for member in members:
        zeros = dead.get((member.layer, side))
        if zeros is None:
            return torch.zeros(group.channels, dtype=torch.bool)
        roots, alive = torch.tensor(member.roots), ~zeros[torch.tensor(member.channels)]
        result[roots[alive]] = False
    return result


def followers(groups: Iterable[ChannelGroup], masked: Iterable[str]) -> tuple[str, ...]:
    """Layers that pass on channels of the masked ones, and are not masked themselves."""
    known = set(masked)
    touched = [g for g in groups if g.prunable and any(m.layer in known for m in g.members)]
    names = (m.layer for g in touched for m in g.members if m.kind in _FOLLOWERS and m.side == "out")
    return tuple(dict.fromkeys(name for name in names if name not in known))


def follower_masks(groups: Iterable[ChannelGroup], dead: Dead, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """For each follower of `widths` (its number of channels): ones [C] but for the channels that are gone."""
    result = {name: torch.ones(width) for name, width in widths.items()}
    for group in groups:
        if not group.prunable:
            continue
        gone = set(gone_roots(group, dead))
        for member in group.members:
            if member.side == "out" and member.layer in result and gone:
                result[member.layer][member.channels_of(gone)] = 0.0
    return result


def apply_masks(model: nn.Module, masks: Masks) -> nn.Module:
    """Multiply masks into the weights, in place; returns the model.

    An output's mask is applied to the weight's rows and the bias, an input's to the columns.

    Raises:
        PlanError: a layer or a target that the model does not have, a mask of another shape, or one over parts of an
            activation's channels.
    """
    modules = dict(model.named_modules())
    for layer, targets in masks.items():
        module: Any = modules.get(layer)
        if module is None:
            raise PlanError(f"expected masks of this model, it has no layer {layer!r}")
        for target, mask in targets.items():
            if mask is not None:
                for tensor, factor in _factors(module, layer, target, mask):
                    _multiply(tensor, factor, f"{layer}.{target}")
    return model


def _factors(module: Any, layer: str, target: str, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    if target.startswith(("_input_", "_output_")) and getattr(module, "weight", None) is not None:
        channels, out = _whole_channels(layer, target, mask), target.startswith("_output_")
        if not out and getattr(module, "groups", 1) > 1:
            raise PlanError(f"expected masks over outputs of the grouped convolution {layer!r}, got one over its input")
        axis = (0 if out else 1) ^ int(isinstance(module, _TRANSPOSED))
        shape = [1] * module.weight.ndim
        shape[axis if module.weight.ndim > 1 else 0] = -1
        bias = [(module.bias, channels)] if out and getattr(module, "bias", None) is not None else []
        return [(module.weight, channels.view(shape)), *bias]
    tensor = getattr(module, target, None)
    if not isinstance(tensor, Tensor):
        # A mask over the output of a layer without weights stays to its neighbours: their own masks say the same.
        if target.startswith(("_input_", "_output_")):
            return []
        raise PlanError(f"expected masks of this model, {layer!r} has no {target!r}")
    return [(tensor, mask)]


def _multiply(tensor: Tensor, mask: Tensor, name: str) -> None:
    try:
        with torch.no_grad():
            tensor.mul_(mask.to(tensor))
    except RuntimeError as error:
        raise PlanError(
            f"expected a mask that fits {name} of shape {list(tensor.shape)}, got {list(mask.shape)}"
        ) from error


def remove_masked(model: nn.Module, masks: Masks, example_inputs: tuple[Any, ...]) -> nn.Module:
    """Bake masks into the weights and physically remove the channels that are gone, in place; returns the model.

    Args:
        masks: over weights and biases of layers, by qualified name.
        example_inputs: a tuple such as (x,), to trace the model with.

    Raises:
        ModelError: the model does not run on the example inputs.
        PlanError: the masks are another model's.
    """
    groups = trace_network(model, example_inputs).groups
    apply_masks(model, masks)
    dead = dead_channels(dict(model.named_modules()), masks)
    removed = {group.name: gone_roots(group, dead) for group in groups if group.prunable}
    return remove_channels(model, example_inputs, removed)
