"""torch-pruning's groups as an importance needs them: whole, checked, and known before they are asked for."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch_pruning.ops import TORCH_CONV, TORCH_EMBED, TORCH_LINEAR, TORCH_LSTM

from diplugin.dependency import dependency_graph
from diplugin.errors import DataError
from diplugin.features import Observation, device_of, to_device
from diplugin.filters import filter_norms
from diplugin.fitted_scores import WEIGHTED, weighted_layers, width_of
from diplugin.groups import ChannelGroup, group_from_torch_pruning
from diplugin.taps import Tap, TapPoint, points_of

__all__ = ["device_of_group", "fault_of", "key_of", "modules_of", "norms_of", "peek", "wanted_points", "whole_group"]

#: What a pruner may be told to start groups from; its default is all but the embeddings.
_ROOTS = (TORCH_CONV, TORCH_LINEAR, TORCH_LSTM, TORCH_EMBED)


def key_of(graph: Any, group: Any) -> tuple[str, bool]:
    root = group[0].dep
    return graph._module2name[root.target.module], bool(graph.is_out_channel_pruning_fn(root.trigger))


def whole_group(group: Any) -> tuple[Any, Tensor]:
    """The group with all its root channels in order, and which of those the given one holds."""
    root, graph = group[0].dep, group._DG
    width = (graph.get_out_channels if graph.is_out_channel_pruning_fn(root.handler) else graph.get_in_channels)(
        root.target.module
    )
    chosen = torch.tensor(list(group[0].idxs), dtype=torch.long)
    if width is None or torch.equal(chosen, torch.arange(width)):
        return group, torch.arange(len(chosen))
    return graph.get_pruning_group(root.target.module, root.handler, list(range(width))), chosen


def fault_of(group: Any) -> str:
    """Why a full group cannot be pruned soundly; empty if nothing speaks against it.

    Zero-padded and sliced shortcuts shift channels in ways that no dependency graph follows. They show in channels
    that a layer does not have: in the group itself or, where it holds a part of a layer only, in that layer's own.
    (A part is nothing bad by itself: a layer that is summed with a concatenation belongs to a group for each piece.)
    """
    graph = group._DG
    fault = _out_of_range(group)
    for item in () if fault else group.items:
        module = item.dep.target.module
        if isinstance(module, WEIGHTED) and graph.is_out_channel_pruning_fn(item.dep.handler):
            width = width_of(module, "out")
            if len(set(item.idxs)) < width:
                own = graph.get_pruning_group(module, item.dep.handler, list(range(width)))
                fault = fault or _out_of_range(own)
    return fault


def _out_of_range(group: Any) -> str:
    graph = group._DG
    for item in group.items:
        module = item.dep.target.module
        if isinstance(module, WEIGHTED):
            width = width_of(module, "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in")
            if (last := max(item.idxs, default=0)) >= width:
                name = graph._module2name.get(module, "")
                return f"it leads to channel {last} of {name}, which has {width}: a zero-padded or sliced tensor"
    return ""


def modules_of(group: Any) -> Iterator[nn.Module]:
    return (i.dep.target.module for i in group.items if isinstance(i.dep.target.module, nn.Module))


def norms_of(group: Any, converted: ChannelGroup) -> Tensor | None:
    """Squared norms of the filters that make each root channel, as they are now; `converted` has the graph's names."""
    names = group._DG._module2name
    return filter_norms({names.get(module, ""): module for module in modules_of(group)}, converted)


def device_of_group(group: Any) -> torch.device:
    weights = (p.device for module in modules_of(group) for p in module.parameters())
    return next(weights, torch.device("cpu"))


def peek(loader: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The loader's first batch, and an iterable over all of them."""
    if not hasattr(loader, "__iter__"):
        raise DataError(f"expected a loader that yields batches, got {type(loader).__name__}")
    batches = iter(loader)
    try:
        first = next(batches)
    except StopIteration:
        raise DataError("expected a loader that yields batches, got an empty one") from None
    return first, chain([first], batches)


def wanted_points(model: nn.Module, batch: Any, observation: Observation, tap: Tap) -> tuple[TapPoint, ...]:
    """Every tensor that some group of the model will ask for; all of them if its groups cannot be traced here."""
    few = to_device(_head(batch), device_of(model))
    try:
        graph = dependency_graph(model, (few,), lambda model, inputs: observation.forward(model, inputs[0]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = graph.get_all_groups(root_module_types=_ROOTS)
            groups = [group_from_torch_pruning(graph, group) for group in found]
        points = points_of(groups, tap)
    except Exception:
        points = ()
    layers = weighted_layers(model)
    modules = dict(model.named_modules())
    known = tuple(p for p in points if p.layer in modules)
    return known or tuple(TapPoint(name, side) for name in layers for side in ("in", "out"))


def _head(batch: Any) -> Any:
    """The first two images of a batch whose leaves are tensors of one length; else the batch."""
    leaves = pytree.tree_leaves(batch)
    lengths = {len(x) if isinstance(x, Tensor) and x.ndim else -1 for x in leaves}
    if len(lengths) != 1 or -1 in lengths:
        return batch
    return pytree.tree_map(lambda x: x[:2], batch)
