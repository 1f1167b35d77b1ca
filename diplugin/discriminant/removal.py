"""Exact losses: what DI really loses when channels leave, one alone or one after the other.

The first-order score of a channel knows nothing of the others. The exact loss does: of two equal channels either is
nearly free while ρ is small, and once one is gone the other is not. Everything stays at the ridge of the whole layer,
without which DI could rise as channels leave.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diplugin.discriminant.exact import Problem, by_channel, cross, factor_of, problem_of, solve
from diplugin.errors import DataError


@dataclass(frozen=True)
class Elimination:
    """Backward elimination of channels: `order` [M] holds channels, first removed first; `losses` [M] the DI/‖Y‖² that
    each of them took with it when it left."""

    order: Tensor
    losses: Tensor


@torch.no_grad()
def removal_losses(
    features: Tensor, labels: Tensor, rho: float = 10.0, ridge: float | None = None, class_weight: str | None = None
) -> Tensor:
    """Exact loss of DI/‖Y‖² when one channel alone is removed at the ridge of the whole layer, float64 [C], ≥ 0.

    tr(W_cᵀ {[(XᵀX + ρI)⁻¹]_cc}⁻¹ W_c): unlike the first-order score it knows that either of two equal channels is
    nearly free when ρ is small. Costs one P×P (P ≤ N) or N×N factorisation a channel; pooled features have P = 1 and a
    closed form. Arguments and errors are those of `discriminant_information`.

    >>> x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    >>> removal_losses(x, torch.tensor([0, 0, 1, 1]), ridge=1e-6)        # of two equal channels either is free
    tensor([5.0000e-07, 5.0000e-07], dtype=torch.float64)
    """
    problem = problem_of(features, labels, rho, ridge, class_weight)
    weights = by_channel(solve(problem), problem)
    images, channels, positions = problem.x.shape
    if problem.ridge == 0:
        return weights.new_zeros(channels)
    if channels * positions <= images:
        inverse = torch.cholesky_inverse(factor_of(problem.flat.T @ problem.flat, problem.ridge))
        blocks = inverse.view(channels, positions, channels, positions).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))
    gram = problem.flat @ problem.flat.T
    if positions <= images:
        return _losses_by_block(problem, weights, gram)
    return _losses_by_image(problem, gram)


@torch.no_grad()
def backward_elimination(
    features: Tensor,
    labels: Tensor,
    rho: float = 10.0,
    ridge: float | None = None,
    class_weight: str | None = None,
    keep: int = 0,
) -> Elimination:
    """Remove the channel with the least exact loss, again and again, until `keep` are left; pooled features [N, C].

    One C×C inverse, then a rank-one downdate a step, always at the ridge of the whole layer.

    Raises:
        DataError: as `discriminant_information`, and for features that are not [N, C].

    >>> x = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0], [1.0, 1.0, 1.0], [1.0, 1.0, -1.0]])
    >>> backward_elimination(x, torch.tensor([0, 0, 1, 1]), ridge=0.1).order[0]     # label-free noise leaves first
    tensor(2)
    """
    if features.ndim != 2:
        raise DataError(f"backward elimination needs pooled features [N, C], got {list(features.shape)}: average maps")
    problem = problem_of(features, labels, rho, ridge, class_weight)
    channels = problem.x.shape[1]
    steps = max(0, channels - keep)
    if problem.ridge == 0:
        return Elimination(torch.arange(steps), problem.x.new_zeros(steps))
    inverse = torch.cholesky_inverse(factor_of(problem.flat.T @ problem.flat, problem.ridge))
    weights = inverse @ cross(problem)
    names = torch.arange(channels, device=weights.device)
    alive = torch.ones(channels, dtype=torch.bool, device=weights.device)
    order, losses = [], []
    for step in range(steps):
        if 2 * (channels - step) <= len(alive):  # rows of channels that left cost as much as the others
            inverse, weights, names = inverse[alive][:, alive], weights[alive], names[alive]
            alive = torch.ones(len(names), dtype=torch.bool, device=weights.device)
        loss = torch.where(alive, weights.square().sum(1) / inverse.diagonal().clamp(min=1e-300), torch.inf)
        worst = int(loss.argmin())
        column = inverse[:, worst] / inverse[worst, worst]
        order.append(int(names[worst]))
        losses.append(loss[worst])
        weights.addr_(column, weights[worst].clone(), alpha=-1)
        inverse.addr_(column, inverse[worst].clone(), alpha=-1)
        alive[worst] = False
    return Elimination(torch.tensor(order, dtype=torch.long), torch.stack(losses) if losses else weights.new_zeros(0))


def _losses_by_block(problem: Problem, weights: Tensor, gram: Tensor) -> Tensor:
    """[(XᵀX + ρI)⁻¹]_cc = (I − X_cᵀ(K + ρI)⁻¹X_c)/ρ: a P×P solve a channel."""
    factor = factor_of(gram, problem.ridge)
    losses = []
    for channel, weight in enumerate(weights):
        half = torch.linalg.solve_triangular(factor, problem.x[:, channel], upper=False)
        block = torch.eye(half.shape[1], dtype=half.dtype, device=half.device) - half.T @ half
        losses.append(problem.ridge * (weight * torch.linalg.solve(block, weight)).sum())
    return torch.stack(losses)


def _losses_by_image(problem: Problem, gram: Tensor) -> Tensor:
    """ρ tr(ZᵀK_c Z') with Z' the solution without channel c: an N×N solve a channel, for large maps."""
    solution = torch.cholesky_solve(problem.y, factor_of(gram, problem.ridge))
    losses = []
    for channel in range(problem.x.shape[1]):
        part = problem.x[:, channel] @ problem.x[:, channel].T
        without = torch.cholesky_solve(problem.y, factor_of(gram - part, problem.ridge))
        losses.append(problem.ridge * (solution * (part @ without)).sum())
    return torch.stack(losses)
