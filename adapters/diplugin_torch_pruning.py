"""`DIImportance`: Discriminant Information as an importance of torch-pruning's pruners.

A criterion of torch-pruning sees weights; DI needs data, so `fit` runs the model once over a loader and keeps one
vector of scores for every tensor that a channel group may ask for. Called with a group, the importance turns its
members into a `ChannelGroup`, asks its tap which tensors speak for it, and adds their scores up on the group's root
channels. Nothing else is assumed about the pruner: local, global, isomorphic, iterative and interactive pruning,
groups of all channels or of some.

    importance = diplugin.DIImportance().fit(model, loader)
    tp.pruner.BasePruner(model, (x,), importance=importance, global_pruning=True, pruning_ratio=0.5).step()

Channels leave while scores stay: they are followed through the pruner's history, so that later steps of an iterative
schedule rank the survivors by the scores of the network that was fitted, with a `StaleScoresWarning`; `refit=True`
scores afresh instead.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch_pruning as tp
from diplugin_torch_pruning_explanation import Explanation
from diplugin_torch_pruning_groups import (
    device_of_group,
    fault_of,
    key_of,
    modules_of,
    norms_of,
    peek,
    wanted_points,
    whole_group,
)
from torch import Tensor, nn

from diplugin.discriminant.targets import check_positive
from diplugin.errors import FrozenLayersWarning, ModelError, NotFittedError, StaleScoresWarning, UserError
from diplugin.features import (
    CHUNK_SIZE,
    Forward,
    GetLabels,
    Observation,
    forward_inputs,
    labels_of,
)
from diplugin.fitted_scores import (
    ChannelCost,
    FittedScores,
    MACs,
    fit_scores,
    record_of,
    weighted_layers,
    width_of,
)
from diplugin.groups import ChannelGroup, group_from_torch_pruning
from diplugin.ranking import ByAll, ByLoss, Ranking, hand_out, lift_best
from diplugin.survivors import Survivors
from diplugin.taps import AfterActivation, AtLayer, Tap, TapPoint, points_of, root_scores

__all__ = ["PLAIN", "DIImportance", "Explanation"]

_PER_MAC, _BY_ALL = MACs(), ByAll()

#: Options under which a channel's score is its DI loss and nothing else.
PLAIN: Mapping[str, Any] = MappingProxyType({"per_cost": None, "ranking": ByLoss(), "floor": 0.0})


class DIImportance(tp.importance.Importance):
    """Importance of every channel of a group by Discriminant Information, for any pruner of torch-pruning.

    A score is the first-order DI loss of removing the channel, per share of the network's MACs that this frees; inside
    a group the losses are handed out in the order that `ranking` gives. `PLAIN` holds the options that leave the loss
    as it is: `DIImportance(**PLAIN)`.

    Args:
        rho: ridge relative to the mean energy of an image.
        tap: which tensors speak for a group and how they are put together, see `diplugin.taps`.
        get_labels: labels of a batch, for batches that are not (inputs, labels).
        forward: `forward(model, batch)`, for the same.
        per_cost: what a channel's loss is divided by, so that one threshold for the whole network spends losses where
            they save most; None for the loss itself.
        ranking: which channels of a group leave first, while the losses say how many, see `diplugin.ranking`.
        floor: fraction of every group's channels that a global threshold spares, of as many as there were at first.
        class_weight: None, or "balanced": every class counts the same.
        chunk_size: images per DI problem; scores of different sizes do not compare.
        num_heads: the very dict that the pruner is given, of attention layers and their heads, which lose the same
            dimensions; without it the floor spares channels of single heads, and so nearly every dimension.
        refit: keep model and loader, and score afresh whenever channels have left; the loader must be one that can
            be iterated again.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    >>> x, y = torch.randn(64, 3, 8, 8), torch.arange(64) % 2
    >>> importance = DIImportance().fit(net, [(x, y)])
    >>> pruner = tp.pruner.BasePruner(net, (x[:1],), importance, pruning_ratio=0.5, ignored_layers=[net[3]])
    >>> pruner.step()
    >>> net[0].out_channels, net[3].in_features
    (4, 144)
    """

    def __init__(
        self,
        rho: float = 10.0,
        tap: Tap | None = None,
        get_labels: GetLabels | None = None,
        forward: Forward | None = None,
        *,
        per_cost: ChannelCost | None = _PER_MAC,
        ranking: Ranking = _BY_ALL,
        floor: float = 0.1,
        class_weight: str | None = None,
        chunk_size: int = CHUNK_SIZE,
        num_heads: Mapping[nn.Module, int] | None = None,
        refit: bool = False,
    ) -> None:
        self.tap: Tap = AfterActivation() if tap is None else tap
        self.per_cost, self.ranking, self.refit = per_cost, ranking, refit
        if not 0 <= floor <= 1:
            raise UserError(f"expected a floor from 0 to 1, a fraction of the channels, got {floor}")
        self.floor, self.num_heads = floor, {} if num_heads is None else num_heads
        self._observation = Observation(
            labels_of if get_labels is None else get_labels, forward_inputs if forward is None else forward,
            check_positive(rho, "rho"), class_weight, chunk_size,
        )  # fmt: skip
        self._fitted: FittedScores | None = None
        self._again: tuple[nn.Module, Iterable[Any]] | None = None
        self._names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._survivors = Survivors({})
        self._units: dict[tuple[str, bool], int] = {}
        self._warned = False

    def fit(self, model: nn.Module, loader: Iterable[Any]) -> DIImportance:
        """Score the model on calibration data; returns self.

        Args:
            model: run in eval mode without gradients, left as it was.
            loader: batches of (inputs, labels), or of what `get_labels` and `forward` understand. A few hundred
                training images do.

        Raises:
            DataError: unusable data, labels or features.
            ModelError: not a module, or one without a convolution or linear layer.
        """
        self._units = {}
        return self._fit(model, loader)

    def _fit(self, model: nn.Module, loader: Iterable[Any]) -> DIImportance:
        if not isinstance(model, nn.Module):
            raise ModelError(f"expected a torch.nn.Module to fit, got {type(model).__name__}")
        if not weighted_layers(model):
            raise ModelError("expected a model with a convolution or linear layer to score, this one has none")
        _warn_of_frozen(model)
        first, batches = peek(loader)
        points = wanted_points(model, first, self._observation, self.tap)
        self._use(fit_scores(model, batches, points, self._observation))
        self._names = weakref.WeakKeyDictionary({module: name for name, module in model.named_modules()})
        self._again = (model, loader) if self.refit else None
        return self

    def _use(self, fitted: FittedScores) -> None:
        self._fitted, self._warned = fitted, False
        largest = max((float(s.scores.max()) for s in fitted.points.values()), default=0.0)
        self._ceiling = largest if self.per_cost is None else largest / 1e-6
        read = {TapPoint(layer, "in"): len(energies) for layer, energies in fitted.energies.items()}
        self._survivors = Survivors({**read, **{p: len(s.scores) for p, s in fitted.points.items()}})

    @property
    def fitted(self) -> FittedScores:
        """The scores by tensor.

        Raises:
            NotFittedError: `fit` was not called.
        """
        if self._fitted is None:
            raise NotFittedError("expected DIImportance to be fitted before it is used: call fit(model, loader) first")
        return self._fitted

    def save(self, path: str | Path) -> None:
        """Write the fitted scores as one safetensors file, with rho, chunk size and class weight, no more options."""
        self.fitted.save(path)

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> DIImportance:
        """An importance with the scores that `save` wrote; `options` are the constructor's.

        Raises:
            PlanError: not a file of scores.
        """
        fitted = FittedScores.load(path)
        importance = cls(**{**fitted.settings, **options})
        importance._use(fitted)
        return importance

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Importance [len(group[0].idxs)] of the group's channels; None for a group to be left alone.

        float64, as spared channels lie so high that float32 does not tell them apart; float32 on devices without it.

        Raises:
            NotFittedError: not fitted, fitted on another model, or none of the group's layers ran.
        """
        scores, device = self.explain(group).scores, device_of_group(group)
        return None if scores is None else scores.to(device, torch.float32 if device.type == "mps" else torch.float64)

    def explain(self, group: Any) -> Explanation:
        """What the importance of a group is made of."""
        full, chosen = whole_group(group)
        graph = group._DG
        name = graph._module2name.get(group[0].dep.target.module, "")
        note = fault_of(full)
        if note:
            return Explanation(name, note, None, None, None, None, ())
        found = group_from_torch_pruning(graph, full)
        heads = max((self.num_heads.get(module, 1) for module in modules_of(full)), default=1)
        if heads > 1 and found.channels % heads == 0:
            found = replace(found, blocks=heads)
        norms, converted = norms_of(full, found), self._named(graph, full, found)
        if not self._current(graph, full, converted) and self._again is not None:
            self._fit(*self._again)
            self._survivors.follow(graph)
        self._survivors.remember(key_of(graph, full), converted)
        rows, tap = self._tensors(converted)
        at = {point: scores for point, _, scores in rows}
        losses = root_scores(converted, tap, lambda point: at.get(point))
        if losses is None:
            where = ", ".join(dict.fromkeys(m.layer for m in converted.members)) or name
            raise NotFittedError(f"expected a layer of the group of {name!r} to run on the data given to fit, none of "
                                 f"these did: {where}; fit on data that reaches them, or ignore them")  # fmt: skip
        energies = self._energies(converted)
        units = self._units.setdefault(key_of(graph, full), converted.channels // converted.blocks)
        scores = self._scores(converted, losses, energies, norms, ceil(self.floor * units))
        energies, norms = (None if values is None else values[chosen] for values in (energies, norms))
        return Explanation(name, "", scores[chosen], losses[chosen], energies, norms, tuple(rows))

    def _energies(self, group: ChannelGroup) -> Tensor | None:
        """How much of its readers' outputs every root channel makes, summed over readers."""
        total: Tensor | None = None
        for member in group.side("in"):
            energies = self.fitted.energies.get(member.layer)
            if energies is not None:
                left = self._survivors.of(TapPoint(member.layer, "in"), energies.double().cpu())
                if len(left) > max(member.channels):
                    total = torch.zeros(group.channels, dtype=torch.float64) if total is None else total
                    total.index_add_(0, torch.tensor(member.roots), left[list(member.channels)])
        return total

    def _scores(
        self, group: ChannelGroup, losses: Tensor, energies: Tensor | None, norms: Tensor | None, spared: int
    ) -> Tensor:
        scores = losses if self.per_cost is None else losses / self.per_cost(group, self.fitted)
        scores = hand_out(scores, self.ranking(scores, energies, norms), group.blocks)
        return lift_best(scores, spared, self._ceiling, group.blocks)

    def _named(self, graph: Any, group: Any, converted: ChannelGroup) -> ChannelGroup:
        """Members by the names of the model that was fitted, which the graph's model may only be a part of."""
        renamed = {}
        for item in group.items:
            module = item.dep.target.module
            if isinstance(module, nn.Module) and module in self._names:
                renamed[graph._module2name.get(module, "")] = self._names[module]
        members = tuple(replace(m, layer=renamed.get(m.layer, m.layer)) for m in converted.members)
        return replace(converted, members=members)

    def _tensors(self, group: ChannelGroup) -> tuple[list[tuple[TapPoint, float, Tensor]], Tap]:
        """Scored tensors that speak for the group: the tap's, else any that holds its channels."""
        for tap in (self.tap, AtLayer(), _AnyMember()):
            rows = [
                (point, self.fitted.points[point].di, self._survivors.of(point, self.fitted.points[point].scores))
                for point in points_of([group], tap)
                if point in self.fitted.points
            ]
            if rows:
                return rows, tap
        return [], self.tap

    def _current(self, graph: Any, group: Any, converted: ChannelGroup) -> bool:
        """Whether the scores still fit the group's layers; False asks for a new fit.

        Raises:
            NotFittedError: they do not, and there is no loader to fit again with.
        """
        self._survivors.follow(graph)
        modules = {self._names.get(m, graph._module2name.get(m, "")): m for m in modules_of(group)}
        layers: dict[str, nn.Module] = {}
        for member in _AnyMember().members(converted):
            layer = modules.get(member.layer)
            if layer is None or member.layer not in self.fitted.layers:
                raise NotFittedError(f"expected a group of the model that was fitted, which had no {member.layer!r}: "
                                     "call fit(model, loader) on the model that is pruned")  # fmt: skip
            width, known = width_of(layer, member.side), self._survivors.count(TapPoint(member.layer, member.side))
            if self._again is not None and (self._survivors.fewer or known not in (None, width)):
                return False
            if known not in (None, width):
                raise NotFittedError(f"expected {known} channels {member.side} of {member.layer!r}, got {width}: call "
                                     "fit(model, loader) on the model as it is now")  # fmt: skip
            layers[member.layer] = layer
        self._warn_if_changed(layers)
        return True

    def _warn_if_changed(self, layers: dict[str, nn.Module]) -> None:
        for name, layer in layers.items():
            now, was = record_of(layer), self.fitted.layers[name]
            same_width = (now.in_channels, now.out_channels) == (was.in_channels, was.out_channels)
            if self._warned or (same_width and abs(now.norm - was.norm) <= 1e-5 * was.norm):
                continue
            self._warned = True
            what = "weights have changed" if same_width else "channels have been removed"
            warnings.warn(
                f"scores are of the network that was fitted, and {what} since (seen at {name!r}); "
                "call fit again for fresh ones, or pass refit=True", StaleScoresWarning, stacklevel=5,
            )  # fmt: skip


def _warn_of_frozen(model: nn.Module) -> None:
    layers = weighted_layers(model)
    frozen = [name for name, layer in layers.items() if not any(p.requires_grad for p in layer.parameters())]
    if frozen:
        warnings.warn(
            f"{len(frozen)} of {len(layers)} layers take no gradient ({frozen[0]!r} is one): they are scored, but "
            "torch-pruning follows gradients and prunes nothing of them; call model.requires_grad_(True) before the "
            "pruner is made", FrozenLayersWarning, stacklevel=3,
        )  # fmt: skip


@dataclass(frozen=True)
class _AnyMember:
    """Whatever holds the group's channels."""

    def members(self, group: ChannelGroup) -> Any:
        return tuple(m for m in group.members if m.kind in ("weighted", "depthwise"))
