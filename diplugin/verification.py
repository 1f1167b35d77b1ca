"""No group is believed unchecked: a random quarter of its channels is removed from a copy of the network.

The copy must equal the original in which nobody reads those channels any more, and in which LayerNorms and GroupNorms
take their statistics over the others. A dependency that no graph sees (a shuffle, an index, a feature that is also
returned) shows as a difference, and the group is left alone. So is one whose removal leaves two weights where there
was one: the network would be larger than predicted, and trained as another.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .dependency import tensors_of, traceable
from .errors import first_line
from .groups import ChannelGroup, remove_channels, shared_parameters

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_OVER_CHANNELS = ("layer_norm", "group_norm")

Removed = Mapping[str, Sequence[int]]


def verified(model: nn.Module, inputs: tuple[Any, ...], groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """Groups whose removal is not what it seems get a note; one joint check when all is well."""
    candidates = [g for g in groups if g.prunable and g.units > 1]
    if _removal_fault(model, inputs, candidates) is None:
        return list(groups)
    faults = {g.name: fault for g in candidates if (fault := _removal_fault(model, inputs, [g])) is not None}
    noted = [replace(g, note=faults[g.name]) if g.name in faults else g for g in groups]
    sound = [g for g in noted if g in candidates]
    joint = _removal_fault(model, inputs, sound)
    # Sound one by one and not together: no single group to blame, so none is safe.
    return noted if joint is None else [replace(g, note=joint) if g in sound else g for g in noted]


def _removal_fault(model: nn.Module, inputs: tuple[Any, ...], groups: Sequence[ChannelGroup]) -> str | None:
    """Why removing a random quarter of these groups' channels is wrong; None if it is right."""
    if not groups:
        return None
    draw = random.Random(0)
    removed = {}
    for group in groups:
        units = draw.sample(range(group.units), max(1, group.units // 4))
        removed[group.name] = [u + b * group.units for u in units for b in range(group.blocks)]
    with torch.no_grad(), traceable(model):
        try:
            pruned = remove_channels(copy.deepcopy(model), inputs, removed)
            with torch.no_grad():
                got = tensors_of(pruned.eval()(*inputs))
        except Exception as error:
            return f"removing its channels breaks the model ({first_line(error)})"
        if shared_parameters(pruned) != shared_parameters(model):
            return "removing its channels parts layers that share a weight"
        masked = copy.deepcopy(model)
        silence(masked, groups, removed)
        _leave_out_of_statistics(masked, groups, removed)
        with torch.no_grad():
            want = tensors_of(masked.eval()(*inputs))
    if [t.shape for t in got] != [t.shape for t in want]:
        return "removing its channels changes the shape of the model's output"
    close = all(torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-4 * float(b.abs().max() + 1e-12))
                for a, b in zip(got, want, strict=True))  # fmt: skip
    return None if close else "removing its channels changes the output in ways no dependency explains"


def silence(model: nn.Module, groups: Iterable[ChannelGroup], removed: Removed) -> None:
    """Zero, in place, the weights by which layers read the removed channels: equal to removing them.

    (But for LayerNorm and GroupNorm, whose statistics still count them.)
    """
    modules = dict(model.named_modules())
    for group in groups:
        gone = set(removed.get(group.name, ()))
        for m in group.side("in"):
            channels = m.channels_of(gone)
            module: Any = modules[m.layer]
            with torch.no_grad():
                if getattr(module, "groups", 1) > 1:
                    _silence_grouped(module, channels)
                elif isinstance(module, _TRANSPOSED):
                    module.weight[channels] = 0
                else:
                    module.weight[:, channels] = 0


def _silence_grouped(conv: Any, channels: Sequence[int]) -> None:
    """Input channel c of a grouped convolution is column c mod (in/groups) of its block's filters."""
    per_in, per_out = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    for c in channels:
        block, column = divmod(c, per_in)
        if isinstance(conv, _TRANSPOSED):
            conv.weight[c] = 0
        else:
            conv.weight[block * per_out : (block + 1) * per_out, column] = 0


def _leave_out_of_statistics(model: nn.Module, groups: Iterable[ChannelGroup], removed: Removed) -> None:
    """Let every LayerNorm and GroupNorm of these groups take its statistics over the channels that are not removed."""
    modules, gone = dict(model.named_modules()), dict[str, list[int]]()
    for group in groups:
        for m in group.side("out", _OVER_CHANNELS):
            gone.setdefault(m.layer, []).extend(m.channels_of(removed.get(group.name, ())))
    for name, channels in gone.items():
        modules[name].register_forward_hook(
            lambda norm, args, kwargs, output, channels=tuple(channels): _over_the_others(
                norm, next(iter((*args, *kwargs.values()))), output, channels
            ),
            with_kwargs=True,
        )


def _over_the_others(norm: Any, x: Tensor, output: Tensor, gone: Sequence[int]) -> Tensor | None:
    """What the norm writes if its statistics leave these channels out; None for one over more than channels.

    The channels' dimension is the one over which the norm's own output comes out: subclasses of LayerNorm for maps
    [N, C, H, W] turn their input around by themselves.
    """
    channels = norm.num_channels if isinstance(norm, nn.GroupNorm) else prod(norm.normalized_shape)
    close = max(1e-3, 2 * torch.finfo(output.dtype).eps)
    for dim in (dim for dim in (1, -1) if x.shape[dim] == channels):
        kept = torch.ones(channels, dtype=torch.bool, device=x.device)
        if torch.allclose(_normalised(norm, x, dim, kept).to(output), output, rtol=close, atol=close):
            kept[list(gone)] = False
            return _normalised(norm, x, dim, kept).to(output)
    return None


def _normalised(norm: Any, x: Tensor, dim: int, kept: Tensor) -> Tensor:
    """`norm` of x, float64, with the statistics of the kept channels [C] along `dim`."""
    grouped = isinstance(norm, nn.GroupNorm)
    rows = x.movedim(dim, 1).double()
    blocks = rows.unflatten(1, (norm.num_groups if grouped else 1, -1))
    shape = (1, -1, *[1] * (rows.ndim - 2))
    count = kept.double().view(shape).expand_as(rows[:1]).unflatten(1, blocks.shape[1:3])
    axes = tuple(range(2, blocks.ndim)) if grouped else (2,)
    mean = (blocks * count).sum(axes, keepdim=True) / count.sum(axes, keepdim=True)
    variance = ((blocks - mean).square() * count).sum(axes, keepdim=True) / count.sum(axes, keepdim=True)
    result = ((blocks - mean) / (variance + norm.eps).sqrt()).flatten(1, 2)
    if norm.weight is not None:
        result = result * norm.weight.view(shape)
    if norm.bias is not None:
        result = result + norm.bias.view(shape)
    return result.movedim(1, dim)
