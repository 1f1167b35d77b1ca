"""DI against scikit-learn, which shares no code with it.

With balanced classes DI is the trace of linear discriminant analysis, tr[(S_T + ρI)⁻¹S_B] = Σ λ/(1 + λ), where λ are
the eigenvalues of (S_W + ρI)⁻¹S_B. `LinearDiscriminantAnalysis(solver="eigen")` finds them when its covariance
estimator adds (ρ/N)I to each class's empirical covariance. (Its own `shrinkage` shrinks S_T and S_W apart, so its
eigenvalues are other ones.) With plain one-hot targets DI/‖Y‖² is ⟨Y, Ŷ⟩/‖Y‖² of `Ridge(alpha=ρ)` and
`KernelRidge(alpha=ρ)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..discriminant import absolute_ridge, backward_elimination, discriminant_information, label_targets
from ..errors import DataError


@dataclass(frozen=True)
class Identity:
    """One number computed twice, by diplugin and by scikit-learn; `referee` is "LDA", "Ridge" or "KernelRidge"."""

    referee: str
    ours: float
    theirs: float

    @property
    def relative_difference(self) -> float:
        """|ours − theirs| relative to the larger; 0 where both are 0."""
        size = max(abs(self.ours), abs(self.theirs))
        return abs(self.ours - self.theirs) / size if size else 0.0


class RidgedCovariance:
    """A covariance estimator in scikit-learn's sense: empirical covariance + `ridge`·I."""

    def __init__(self, ridge: float) -> None:
        self.ridge = ridge

    def fit(self, x: np.ndarray) -> RidgedCovariance:
        centred = x - x.mean(axis=0)
        self.covariance_ = centred.T @ centred / len(x) + self.ridge * np.eye(x.shape[1])
        return self


def lda_trace(features: Tensor, labels: Tensor, ridge: float) -> float:
    """Σ λ/(1 + λ) of scikit-learn's linear discriminant analysis: DI with balanced classes, not divided by ‖Y‖².

    Args:
        features: [N, D]; scikit-learn factorises D×D matrices.
        labels: class ids [N].
        ridge: absolute ρ.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, ids = _array(features), _array(labels)
    estimator: Any = RidgedCovariance(ridge / len(x))
    fitted = LinearDiscriminantAnalysis(solver="eigen", covariance_estimator=estimator).fit(x, ids)
    means, priors = fitted.means_, fitted.priors_
    spread = means - priors @ means
    between = spread.T @ (priors[:, None] * spread)  # S_B/N
    scalings = fitted.scalings_
    values = np.einsum("ij,ik,kj->j", scalings, between, scalings)
    return float((values / (1 + values)).sum())


def ridge_value(features: Tensor, labels: Tensor, ridge: float, *, kernel: bool = False) -> float:
    """⟨Y, Ŷ⟩/‖Y‖² of scikit-learn's `Ridge(alpha=ridge)`, or of `KernelRidge` if `kernel`: DI/‖Y‖².

    Args:
        features: [N, ...], flattened.
        labels: class ids [N] or targets [N, L].
        ridge: absolute ρ.
    """
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.linear_model import Ridge

    x = _array(features.double().flatten(1))
    x = x - x.mean(axis=0)
    y = _array(label_targets(labels))
    model: Any = (KernelRidge if kernel else Ridge)(alpha=ridge)  # type: ignore[arg-type]
    fitted = model.fit(x, y).predict(x).reshape(y.shape)
    return float((y * fitted).sum() / (y * y).sum())


def check_identities(features: Tensor, labels: Tensor, rho: float = 10.0) -> tuple[Identity, ...]:
    """DI beside its three referees on the same features.

    Args:
        features: [N, C, ...]; LDA and Ridge see the maps averaged over positions [N, C], KernelRidge the whole maps.
        labels: class ids [N].

    Raises:
        DataError: labels that are not class ids, no more images than classes, or features without variance.

    >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    >>> max(i.relative_difference for i in check_identities(x, torch.arange(60) % 3)) < 1e-9
    True
    """
    if labels.ndim != 1:
        raise DataError(f"linear discriminant analysis needs class ids [N], got labels of shape {list(labels.shape)}")
    classes = len(torch.unique(labels))
    if classes >= len(labels):
        raise DataError(f"linear discriminant analysis needs more images than classes, got {len(labels)} and {classes}")
    pooled = pool(features)
    ridge, whole = absolute_ridge(pooled, rho), absolute_ridge(features, rho)
    if ridge == 0:
        raise DataError("the features do not vary over the images: choose another layer or other images")
    balanced = float(discriminant_information(pooled, labels, ridge=ridge, class_weight="balanced"))
    plain = float(discriminant_information(pooled, labels, ridge=ridge))
    maps = float(discriminant_information(features, labels, ridge=whole))
    return (
        Identity("LDA", balanced * (classes - 1), lda_trace(pooled, labels, ridge)),
        Identity("Ridge", plain, ridge_value(pooled, labels, ridge)),
        Identity("KernelRidge", maps, ridge_value(features, labels, whole, kernel=True)),
    )


def di_along(
    features: Tensor, labels: Tensor, order: Sequence[int], counts: Sequence[int], ridge: float
) -> list[float]:
    """DI/‖Y‖² of the first k channels of `order`, for every k of `counts`, at one ridge: it never falls."""
    chosen = list(order)
    return [float(discriminant_information(features[:, chosen[:k]], labels, ridge=ridge)) for k in counts]


def greedy_order(features: Tensor, labels: Tensor, rho: float = 10.0) -> list[int]:
    """Channels by exact backward elimination on pooled features, the one that leaves last first."""
    return backward_elimination(pool(features), labels, rho).order.flip(0).tolist()


def pool(features: Tensor) -> Tensor:
    """Maps [N, C, ...] averaged over positions: float64 [N, C]."""
    return features.double().flatten(2).mean(2) if features.ndim > 2 else features.double()


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy() if values.is_floating_point() else values.detach().cpu().numpy()
