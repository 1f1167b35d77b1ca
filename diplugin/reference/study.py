"""What a selection of channels is worth: cross-validated LDA accuracy on the channels that a criterion keeps.

In every fold the criterion ranks channels on the training part, a linear discriminant analysis is fitted there on the
channels it keeps, and the held part is classified: nothing that is judged has been seen. Features are maps averaged
over positions, so that criteria differ by their choice alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..discriminant import absolute_ridge, backward_elimination, channel_scores
from ..errors import DataError
from ..whole_files import write_text
from .identities import Identity, RidgedCovariance, check_identities, di_along, greedy_order, pool

FRACTIONS = (0.125, 0.25, 0.5, 0.75, 1.0)
RANDOM_DRAWS = 5
#: Of the classifier's covariance, relative to the mean variance: keeps constant and equal channels harmless.
SHRINKAGE = 1e-2

#: (pooled training features [N, C], class ids [N]) -> importance [C], higher kept.
Ranking = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Accuracy:
    """Mean accuracy over folds on the `kept` channels that `criterion` chose, in [0, 1]."""

    criterion: str
    kept: int
    accuracy: float


@dataclass(frozen=True)
class LayerValidation:
    """One layer's evidence.

    Attributes:
        layer: name of the channel group.
        channels, images: size of the features.
        identities: DI beside scikit-learn's numbers.
        counts: channel counts at which DI was taken along an order.
        random_order, greedy_order: DI/‖Y‖² of the first `counts` channels of either order, at one ridge.
        accuracies: cross-validated LDA accuracy for every criterion and count.
    """

    layer: str
    channels: int
    images: int
    identities: tuple[Identity, ...]
    counts: tuple[int, ...]
    random_order: tuple[float, ...]
    greedy_order: tuple[float, ...]
    accuracies: tuple[Accuracy, ...]

    @property
    def worst_difference(self) -> float:
        """Largest relative difference to scikit-learn."""
        return max(identity.relative_difference for identity in self.identities)

    @property
    def non_decreasing(self) -> bool:
        """Whether DI never fell as channels were added, up to rounding."""
        orders = (self.random_order, self.greedy_order)
        return all(b >= a - 1e-10 for order in orders for a, b in pairwise(order))

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the derived verdicts beside the figures."""
        record = asdict(self)
        for entry, identity in zip(record["identities"], self.identities, strict=True):
            entry["relative_difference"] = identity.relative_difference
        return record | {"worst_difference": self.worst_difference, "non_decreasing": self.non_decreasing}


def rank_by_di(features: Tensor, labels: Tensor, rho: float = 10.0) -> Tensor:
    """First-order DI scores."""
    return channel_scores(features, labels, rho)


def rank_by_elimination(features: Tensor, labels: Tensor, rho: float = 10.0) -> Tensor:
    """Place in the exact backward elimination: the last to leave counts most."""
    order = backward_elimination(features, labels, rho).order
    importance = torch.empty(len(order), dtype=torch.float64)
    importance[order] = torch.arange(len(order), dtype=torch.float64)
    return importance


def rank_by_variance(features: Tensor, labels: Tensor) -> Tensor:
    """Variance of the pooled channel."""
    return features.var(dim=0)


def lda_accuracy(
    features: Tensor, labels: Tensor, ranking: Ranking, counts: Sequence[int], *, folds: int = 5, seed: int = 0
) -> list[float]:
    """Cross-validated accuracy of LDA on the `k` channels that `ranking` keeps, for every k of `counts`.

    Args:
        features: pooled [N, C].
        labels: class ids [N].
        ranking: called on the training part of every fold.

    Raises:
        DataError: fewer than two images a fold, one class, or classes of so few images that a fold has one class or
            as many as images.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.model_selection import KFold, StratifiedKFold

    x, ids = features.double().numpy(), labels.numpy()
    if len(ids) < 2 * folds or len(np.unique(ids)) < 2:
        raise DataError(f"cross-validation needs two classes and {2 * folds} images or more, got {len(ids)} images")
    even = np.bincount(np.unique(ids, return_inverse=True)[1]).min() >= folds
    splitter = (StratifiedKFold if even else KFold)(folds, shuffle=True, random_state=seed)
    correct = np.zeros(len(counts))
    for train, held in splitter.split(x, ids):
        classes = len(np.unique(ids[train]))
        if not 1 < classes < len(train):
            raise DataError(f"cross-validation needs classes of several images each, got a fold of {len(train)} images "
                            f"and {classes} classes: take more images")  # fmt: skip
        order = ranking(features[train], labels[train]).argsort(descending=True, stable=True).numpy()
        for place, count in enumerate(counts):
            kept = order[:count]
            spread = x[np.ix_(train, kept)].var(axis=0).mean()
            estimator: Any = RidgedCovariance(SHRINKAGE * spread or 1.0)
            model = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=estimator)
            model.fit(x[np.ix_(train, kept)], ids[train])
            correct[place] += np.count_nonzero(model.predict(x[np.ix_(held, kept)]) == ids[held])
    return (correct / len(ids)).tolist()


def validate_layer(
    layer: str,
    features: Tensor,
    labels: Tensor,
    *,
    rho: float = 10.0,
    importances: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> LayerValidation:
    """All the evidence on one layer's features.

    Args:
        layer: its name, for the table.
        features: [N, C, ...].
        labels: class ids [N].
        rho: relative ridge.
        importances: fixed importances [C] to compare with, such as the L1 norms of the producing filters.
        seed: of random orders and folds.
    """
    pooled = pool(features)
    channels = pooled.shape[1]
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(channels, generator=generator).tolist()
    steps = sorted({max(1, round(channels * k / 16)) for k in range(1, 17)})
    ridge = absolute_ridge(pooled, rho)
    orders = (shuffled, greedy_order(pooled, labels, rho))
    random_di, greedy_di = (tuple(di_along(pooled, labels, order, steps, ridge)) for order in orders)
    return LayerValidation(
        layer=layer,
        channels=channels,
        images=len(labels),
        identities=check_identities(features, labels, rho),
        counts=tuple(steps),
        random_order=random_di,
        greedy_order=greedy_di,
        accuracies=tuple(_accuracies(pooled, labels, rho, importances or {}, seed)),
    )


def _accuracies(
    pooled: Tensor, labels: Tensor, rho: float, importances: Mapping[str, Tensor], seed: int
) -> list[Accuracy]:
    channels = pooled.shape[1]
    counts = sorted({_kept(channels, fraction) for fraction in FRACTIONS})
    rankings: dict[str, Ranking] = {
        "DI": lambda x, y: rank_by_di(x, y, rho),
        "DI, eliminated": lambda x, y: rank_by_elimination(x, y, rho),
        "variance": rank_by_variance,
    }
    rankings |= {name: (lambda _x, _y, fixed=fixed: fixed) for name, fixed in importances.items()}
    rows = [
        Accuracy(name, count, accuracy)
        for name, ranking in rankings.items()
        for count, accuracy in zip(counts, lda_accuracy(pooled, labels, ranking, counts, seed=seed), strict=True)
    ]
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(RANDOM_DRAWS):
        fixed = torch.rand(channels, generator=generator)
        draws.append(lda_accuracy(pooled, labels, lambda _x, _y, fixed=fixed: fixed, counts, seed=seed))
    means = np.mean(draws, axis=0)
    return rows + [Accuracy("random", count, float(mean)) for count, mean in zip(counts, means, strict=True)]


def mean_accuracies(layers: Sequence[LayerValidation]) -> dict[str, tuple[float, ...]]:
    """Criterion -> accuracy at each of `FRACTIONS` of the channels kept, averaged over the layers that it ranked."""
    found: dict[str, list[list[float]]] = {}
    for layer in layers:
        counts = [_kept(layer.channels, fraction) for fraction in FRACTIONS]
        for criterion in dict.fromkeys(row.criterion for row in layer.accuracies):
            at = {row.kept: row.accuracy for row in layer.accuracies if row.criterion == criterion}
            found.setdefault(criterion, []).append([at[count] for count in counts])
    return {criterion: tuple(np.mean(rows, axis=0).tolist()) for criterion, rows in found.items()}


def _kept(channels: int, fraction: float) -> int:
    return max(1, round(channels * fraction))


def save_validation(layers: Sequence[LayerValidation], path: Path) -> None:
    """All layers' evidence as JSON."""
    means = {"kept": FRACTIONS, "accuracies": mean_accuracies(layers)}
    record = {"schema": "diplugin.validation/1", "layers": [layer.to_json() for layer in layers], "means": means}
    write_text(path, json.dumps(record, indent=1))
