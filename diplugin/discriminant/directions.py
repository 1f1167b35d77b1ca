"""The directions in which features tell the classes apart: the leading eigenvectors of (S_T + ρI)⁻¹ S_B.

With X the centred features and Y the targets, S_T = XᵀX and S_B = XᵀY YᵀX. All eigenvectors with an eigenvalue above
zero lie in the span of W = (S_T + ρI)⁻¹XᵀY, which DI computes anyway: they are W·u with u the eigenvectors of the
small matrix YᵀX·W, and the eigenvalues, whose sum is DI, are the same. With balanced targets these are the directions
of linear discriminant analysis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DataError
from .exact import cross, problem_of, solve

_NOTHING = 1e-9
#: Features whose products with the targets are this small beside their norms have nothing in common but rounding.
_ROUNDING = 1e-14


@torch.no_grad()
def discriminant_directions(
    features: Tensor, labels: Tensor, rho: float = 10.0, *, count: int | None = None, class_weight: str | None = None
) -> Tensor:
    """Directions V, float64 [C, k], in the order of the label variance they explain; X·V has unit variance.

    Args:
        features: [N, C], pooled.
        labels: class ids [N] or targets [N, L], see `label_targets`.
        rho: relative ridge, as in `discriminant_information`.
        count: at most this many; None for all that explain anything, one less than there are classes.

    Raises:
        DataError: features or labels that cannot be used, or features that tell nothing of the labels.

    >>> x = torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 1.0], [1.0, -1.0]])
    >>> discriminant_directions(x, torch.tensor([0, 0, 1, 1])).abs()
    tensor([[2.],
            [0.]], dtype=torch.float64)
    """
    problem = problem_of(features, labels, rho, None, class_weight)
    products = cross(problem)
    if float(products.norm()) <= _ROUNDING * float(problem.x.norm()):
        raise DataError("features that tell something of the labels are needed, these tell nothing")
    weights = solve(problem)
    explained = products.T @ weights
    values, vectors = torch.linalg.eigh((explained + explained.T) / 2)
    kept = values > _NOTHING * values[-1]
    directions = (weights @ vectors[:, kept]).flip(1)[:, :count]
    spread = (problem.flat @ directions).square().mean(0).sqrt() * problem.scale
    return directions / spread
