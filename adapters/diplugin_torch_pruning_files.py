"""A model pruned by torch-pruning, on disk and back: data only, nothing that can execute.

A pruner keeps a history: which channels of which layer were removed, step by step. `save_history` writes it as JSON
beside the weights, `load_history` repeats it on a fresh model; that works for every model that torch-pruning prunes.
`plan_of` turns a history into a `PruningPlan`, diplugin's own currency, where every group's channels can be followed.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diplugin.dependency import dependency_graph, frozen_kept
from diplugin.errors import PlanError, first_line
from diplugin.features import device_of
from diplugin.groups import ChannelGroup, Side, trace_groups
from diplugin.network import TensorSpec, specs_of
from diplugin.plan import PruningPlan
from diplugin.surgery import WEIGHTS_FILE, load_weights, read_weights, save_weights
from diplugin.whole_files import write_text

__all__ = ["HISTORY_FILE", "load_history", "plan_of", "save_history"]

HISTORY_FILE = "history.json"
SCHEMA = 1

History = list[tuple[str, bool, list[int]]]


def history_of(pruner: Any) -> History:
    """(root layer, whether its outputs were pruned, indices) of every removal so far, as plain data."""
    return [(str(name), bool(is_out), [int(i) for i in indices]) for name, is_out, indices in pruner.pruning_history()]


def save_history(model: nn.Module, pruner: Any, folder: str | Path, example_inputs: tuple[Any, ...]) -> None:
    """Write a pruned model: `history.json` and `weights.safetensors`.

    Args:
        pruner: the torch-pruning pruner, or dependency graph, that pruned the model.
        example_inputs: what it was traced with, a tuple such as (x,); a fresh model is traced with its like.

    Raises:
        ModelError: not a tuple of tensors.
        PlanError: the folder cannot be written.
    """
    data = {
        "schema": SCHEMA,
        "inputs": [asdict(spec) for spec in specs_of(example_inputs)],
        "history": history_of(pruner),
    }
    folder = Path(folder)
    try:
        write_text(folder / HISTORY_FILE, json.dumps(data))
        save_weights(model, folder / WEIGHTS_FILE)
    except OSError as error:
        raise PlanError(f"expected a folder that can be written at {folder}, got {first_line(error)}") from error


def load_history(fresh_model: nn.Module, folder: str | Path) -> nn.Module:
    """Rebuild a pruned network from a fresh, unpruned one, in place; returns the model.

    Raises:
        PlanError: no such files, broken ones, or another architecture's; nothing has been removed then.
    """
    path = Path(folder) / HISTORY_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise PlanError(f"expected a history of schema {SCHEMA} in {path}, got {data['schema']!r}")
        inputs = tuple(TensorSpec(tuple(s["shape"]), s["dtype"]).example() for s in data["inputs"])
        history = [(str(name), bool(is_out), list(indices)) for name, is_out, indices in data["history"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise PlanError(f"expected a pruning history at {path}, got {first_line(error)}") from error
    weights = read_weights(Path(folder) / WEIGHTS_FILE)
    layers = dict(fresh_model.named_modules())
    absent = next((name for name, _, _ in history if name not in layers), None)
    if absent is not None:
        raise PlanError(f"expected the model of the history in {folder}, this one has no layer {absent!r}")
    # How wide a layer still is at a step shows only when the steps before it are done: on a copy at first.
    for model in (copy.deepcopy(fresh_model), fresh_model):
        _repeat(model, history, inputs, str(folder))
        load_weights(model, weights, str(folder))
    return fresh_model


def _repeat(model: nn.Module, history: History, inputs: tuple[torch.Tensor, ...], where: str) -> None:
    """Remove, in place, what a history says, one step after another."""
    graph, layers = dependency_graph(model, tuple(x.to(device_of(model)) for x in inputs)), dict(model.named_modules())
    with torch.no_grad(), frozen_kept(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, is_out, indices in history:
            try:
                width = (graph.get_out_channels if is_out else graph.get_in_channels)(layers[name])
                _check_indices(indices, width or 0)
                graph.load_pruning_history([(name, is_out, indices)])
            except Exception as error:
                raise PlanError(f"expected the model of the history in {where}, got {first_line(error)}") from error


def _check_indices(indices: list[Any], width: int) -> None:
    """torch-pruning takes any list: a channel that is not there, or is named twice, would shrink some layers only."""
    sound = all(type(i) is int and 0 <= i < width for i in indices)
    if not sound or len(set(indices)) != len(indices) or len(indices) >= width:
        raise ValueError(f"a step that removes {str(indices)[:80]} of {width} channels")


def plan_of(pruner: Any, unpruned: nn.Module, example_inputs: tuple[Any, ...]) -> PruningPlan:
    """The removals of a pruner as a `PruningPlan` for the unpruned network.

    Args:
        pruner: the torch-pruning pruner, or dependency graph, after its steps.
        unpruned: the same architecture as it was, with any weights.

    Raises:
        PlanError: another network's history, or one that removes channels of a group that cannot be followed (such as
            attention heads): `save_history` writes those too.
    """
    groups = trace_groups(unpruned, example_inputs)
    alive = _Channels(groups)
    for name, is_out, indices in history_of(pruner):
        alive.remove(name, "out" if is_out else "in", indices)
    prunable = [group for group in groups if group.prunable]
    gone = {group.name: alive.gone.get(group.name, set()) for group in prunable}
    kept = {g.name: tuple(c for c in range(g.channels) if c not in gone[g.name]) for g in prunable}
    return PruningPlan(kept, {g.name: g.channels for g in prunable}, {}, specs_of(example_inputs))


class _Channels:
    """Every layer side's channels that are left, in the numbers of the unpruned network."""

    def __init__(self, groups: Iterable[ChannelGroup]) -> None:
        self.gone: dict[str, set[int]] = {}
        self._owner: dict[tuple[str, Side, int], tuple[ChannelGroup, int]] = {}
        self._left: dict[tuple[str, Side], list[int]] = {}
        for group in groups:
            for m in group.members:
                for channel, root in zip(m.channels, m.roots, strict=True):
                    self._owner[m.layer, m.side, channel] = (group, root)
                self._left.setdefault((m.layer, m.side), []).extend(m.channels)
        for channels in self._left.values():
            channels.sort()

    def remove(self, layer: str, side: Side, indices: Iterable[int]) -> None:
        left = self._left.get((layer, side), [])
        indices = list(indices)
        if max(indices, default=-1) >= len(left):
            raise PlanError(f"expected a history of this network, it removes channel {max(indices)} of "
                            f"{layer!r} ({side}), which has {len(left)} left that can be followed")  # fmt: skip
        for group, root in [self._owner[layer, side, left[i]] for i in indices]:
            if not group.prunable:
                raise PlanError(f"expected groups that can be followed, the one of {layer!r} cannot: {group.note}; "
                                "save_history writes such models too")  # fmt: skip
            self._drop(group, root)

    def _drop(self, group: ChannelGroup, root: int) -> None:
        if root in self.gone.setdefault(group.name, set()):
            return
        self.gone[group.name].add(root)
        for m in group.members:
            leaving = {c for c, r in zip(m.channels, m.roots, strict=True) if r == root}
            self._left[m.layer, m.side] = [c for c in self._left[m.layer, m.side] if c not in leaving]
