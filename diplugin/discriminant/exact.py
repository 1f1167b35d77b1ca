"""Discriminant Information of features that are at hand, in float64 throughout.

The features become X [N, C, P], centred over the images and scaled to one, and the targets Y with ‖Y‖ = 1. W = XᵀZ is
all that scores need, and it comes from whichever of XᵀX [D, D] and XXᵀ [N, N] is smaller: by the push-through identity
(XᵀX + ρI)⁻¹Xᵀ = Xᵀ(XXᵀ + ρI)⁻¹ both give the same numbers.

ρ is relative unless `ridge` is given: ρ = rho · tr(XXᵀ)/N. DI never falls when a channel is added *at a fixed ridge*:
whatever compares subsets of one layer passes the absolute ridge of the whole layer (`absolute_ridge`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diplugin.discriminant.targets import (
    check_length,
    check_positive,
    label_targets,
    unit_targets,
    warn_if_saturated,
)
from diplugin.errors import DataError

#: A feature that varies less than this, relative to its mean, is constant up to rounding.
CONSTANT = 1e-13


@dataclass(frozen=True)
class Problem:
    """A ridge problem: `x` [N, C, P] = centred features / `scale`, `y` [N, L] with ‖y‖ = 1, `ridge` in units of x²."""

    x: Tensor
    y: Tensor
    ridge: float
    scale: float

    @property
    def flat(self) -> Tensor:
        """The features as [N, C·P]."""
        return self.x.flatten(1)


def discriminant_information(
    features: Tensor, labels: Tensor, rho: float = 10.0, ridge: float | None = None, class_weight: str | None = None
) -> Tensor:
    """DI/‖Y‖² of a feature map: the fraction of label variance that it explains, a float64 scalar in [0, 1).

    Args:
        features: [N, C, ...] in any floating dtype.
        labels: class ids [N] or targets [N, L], see `label_targets`.
        rho: ridge relative to the mean energy of an image, ρ = rho · tr(K)/N.
        ridge: absolute ρ in units of the squared features; overrides `rho`.
        class_weight: None, or "balanced" for the trace of linear discriminant analysis divided by L − 1.

    Raises:
        DataError: features or labels that cannot be used.
        UserError: rho or ridge that is not above zero.

    Differentiable in the features. Warns (DISaturationWarning) above .98.

    >>> x = torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 1.0], [1.0, -1.0]])
    >>> discriminant_information(x, torch.tensor([0, 0, 1, 1]), ridge=1.0)
    tensor(0.5000, dtype=torch.float64)
    """
    problem = problem_of(features, labels, rho, ridge, class_weight)
    di = (cross(problem) * solve(problem)).sum()
    warn_if_saturated(float(di.detach()))
    return di


@torch.no_grad()
def channel_scores(
    features: Tensor, labels: Tensor, rho: float = 10.0, ridge: float | None = None, class_weight: str | None = None
) -> Tensor:
    """First-order DI scores 2ρ‖W_c‖²/‖Y‖², float64 [C]: the derivative of DI/‖Y‖² by a mask on channel c, at ρ fixed.

    In the fraction of label variance, so that channels of different layers compare; DI is quadratic in a mask, so the
    score of a small channel is about twice the loss of removing it (`removal_losses`). Arguments, errors and the
    warning are those of `discriminant_information`.

    >>> x = torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 1.0], [1.0, -1.0]])
    >>> channel_scores(x, torch.tensor([0, 0, 1, 1]), ridge=1.0)
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    scores, di = problem_scores(problem_of(features, labels, rho, ridge, class_weight))
    warn_if_saturated(di)
    return scores


@torch.no_grad()
def feature_gradient(
    features: Tensor, labels: Tensor, rho: float = 10.0, ridge: float | None = None, class_weight: str | None = None
) -> Tensor:
    """Derivative of DI/‖Y‖² by the features at ρ fixed, 2ρ Z Wᵀ/‖Y‖², float64 in the shape of the features.

    Its product with the features, summed over a channel, is that channel's score; its product with any small change of
    the features predicts the change of DI.
    """
    problem = problem_of(features, labels, rho, ridge, class_weight)
    if problem.ridge == 0:
        return torch.zeros(features.shape, dtype=torch.float64, device=features.device)
    weights = solve(problem)
    residual = problem.y - problem.flat @ weights  # equals ρZ
    return ((residual @ weights.T).mul_(2 / problem.scale)).view(features.shape)


@torch.no_grad()
def perturbation_scores(
    features: Tensor,
    errors: Tensor,
    labels: Tensor,
    rho: float = 10.0,
    ridge: float | None = None,
    class_weight: str | None = None,
) -> Tensor:
    """First-order change of DI/‖Y‖² when channel c becomes F_c + E_c: 2ρ⟨W_c, E_cᵀZ⟩/‖Y‖² (our reading).

    Args:
        features: [N, C, ...].
        errors: E of the same shape, or [B, N, C, ...] for B bit widths at once.

    Returns:
        float64 [C] or [B, C]; negative where information is lost, and −score for E = −F.

    Raises:
        DataError: as `discriminant_information`, and for errors of another shape.
    """
    if errors.shape not in (features.shape, errors.shape[:1] + features.shape):
        raise DataError(
            f"errors have the features' shape {list(features.shape)} or one dimension more in front, "
            f"got {list(errors.shape)}"
        )
    gradient = feature_gradient(features, labels, rho, ridge, class_weight)
    channels = features.shape[1]
    many = errors if errors.ndim > features.ndim else errors[None]
    changes = [(error * gradient).reshape(len(features), channels, -1).sum((0, 2)) for error in many]
    return torch.stack(changes) if errors.ndim > features.ndim else changes[0]


@torch.no_grad()
def absolute_ridge(features: Tensor, rho: float = 10.0) -> float:
    """ρ = rho · tr(K)/N of these features, to be passed as `ridge` for every subset of their channels.

    >>> absolute_ridge(torch.tensor([[0.0], [2.0]]), rho=10.0)
    10.0
    """
    x, scale = centred_features(features)
    return check_positive(rho, "rho") * float(x.square().sum()) / len(x) * scale * scale


def centred_features(features: Tensor) -> tuple[Tensor, float]:
    """Float64 [N, C, P] with mean zero and largest magnitude near one before centring, and the scale taken out."""
    if features.ndim < 2 or not features.is_floating_point():
        raise DataError(f"features are real maps [N, C, ...], got {list(features.shape)} of {features.dtype}")
    if 0 in features.shape or len(features) < 2:
        raise DataError(f"features need two images or more and a channel, got {list(features.shape)}")
    x = features.double().reshape(features.shape[0], features.shape[1], -1)
    scale = float(x.detach().abs().max())
    if not scale < float("inf"):
        raise DataError("features contain NaN or infinity: check the model and the input's normalisation")
    if scale == 0:
        return x, 1.0
    x = x / scale
    mean = x.mean(dim=0)
    x = x - mean
    varies = x.detach().abs().amax(0) > CONSTANT * mean.detach().abs()
    return (x if bool(varies.all()) else x * varies), scale


def problem_of(features: Tensor, labels: Tensor, rho: float, ridge: float | None, class_weight: str | None) -> Problem:
    targets = label_targets(labels, class_weight=class_weight)
    check_length(features, targets)
    return make_problem(features, targets, rho, ridge)


def make_problem(features: Tensor, targets: Tensor, rho: float, ridge: float | None) -> Problem:
    """The ridge problem of features [N, C, ...] and centred targets [N, L]."""
    x, scale = centred_features(features)
    energy = float(x.detach().square().sum())
    if ridge is None:
        absolute = check_positive(rho, "rho") * energy / len(x)
    elif ridge == 0 and energy == 0:  # what `absolute_ridge` gives for a dead layer
        absolute = 0.0
    else:
        absolute = check_positive(ridge, "ridge") / scale / scale
    return Problem(x, unit_targets(targets.to(x.device)), absolute, scale)


def problem_scores(problem: Problem) -> tuple[Tensor, float]:
    """(first-order scores [C], DI), both in fractions of label variance."""
    weights = solve(problem)
    di = float((cross(problem) * weights).sum())
    return 2 * problem.ridge * by_channel(weights, problem).square().sum((1, 2)), di


def cross(problem: Problem) -> Tensor:
    return problem.flat.T @ problem.y


def solve(problem: Problem) -> Tensor:
    """W = (XᵀX + ρI)⁻¹XᵀY [D, L], through the smaller of the two Gram matrices."""
    x = problem.flat
    if problem.ridge == 0:  # no feature varies, so nothing is explained
        return torch.zeros_like(cross(problem))
    if x.shape[1] <= x.shape[0]:
        return torch.cholesky_solve(cross(problem), factor_of(x.T @ x, problem.ridge))
    return x.T @ torch.cholesky_solve(problem.y, factor_of(x @ x.T, problem.ridge))


def factor_of(gram: Tensor, ridge: float) -> Tensor:
    """Cholesky factor of gram + ridge·I."""
    shifted = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if int(failed):
        raise DataError(f"the ridge is too small for float64 ({ridge:.1e} of the features' scale): use a larger one")
    return factor


def by_channel(weights: Tensor, problem: Problem) -> Tensor:
    _, channels, positions = problem.x.shape
    return weights.view(channels, positions, -1)
