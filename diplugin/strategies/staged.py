"""Staged cuts: a structure from a handful of numbers, for a black-box search to turn.

A network's *stages* are its channel groups by resolution. A `StagedCut` says how deep each stage is cut relative to
the others, and what share of the saving the greedy search is left to choose; how deep in absolute terms follows from
the budget. So every setting of the numbers gives a plan at or under the budget, and a search over them (NNI's
experiments, say) spends its trials on accuracy alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from torch import Tensor

from ..costs import Budget, CostModel
from ..errors import BudgetError, InfeasibleBudget
from ..network import NetworkTrace
from ..plan import PruningPlan
from ..search import FixedScores, SearchLimits, allowed_widths, greedy_search, nearest, plan_at

#: How finely the common depth of all stages is tried, up to where the deepest is gone and up to where all are.
_STEPS = 400


@dataclass(frozen=True)
class StagedCut:
    """Attributes:
        depths: for every stage, how deep it is cut relative to the others; at least one above 0.
        greedy_share: share of the saving, 0 to 1, that greedy selection by DI takes first, wherever it is cheapest.
        rho: relative ridge of the scores, for whoever scores.

    Raises:
        BudgetError: numbers outside their ranges.
    """

    depths: tuple[float, ...]
    greedy_share: float = 0.0
    rho: float = 10.0

    def __post_init__(self) -> None:
        depths_hold = all(isfinite(depth) and depth >= 0 for depth in self.depths) and any(self.depths)
        if not depths_hold or not 0 <= self.greedy_share <= 1:
            raise BudgetError(
                f"expected finite depths of 0 or more, one above 0, and a greedy_share in [0, 1], got {self}"
            )


def stages_of(trace: NetworkTrace) -> tuple[tuple[str, ...], ...]:
    """Prunable groups by the resolution at which their first layer writes, finest first.

    >>> from torch import nn, randn
    >>> from diplugin.network import trace_network
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, stride=2), nn.Conv2d(8, 4, 1))
    >>> stages_of(trace_network(net, (randn(1, 3, 8, 8),)))
    (('0',), ('1',))
    """
    size = {layer.name: layer.output_shape[2:] for layer in reversed(trace.layers) if layer.op != "norm"}
    order = {layer.name: i for i, layer in reversed(list(enumerate(trace.layers)))}
    stages: dict[tuple[int, ...], list[str]] = {}
    for group in sorted(trace.prunable, key=lambda g: order.get(g.name, len(order))):
        stages.setdefault(size.get(group.name, ()), []).append(group.name)
    return tuple(tuple(names) for names in stages.values())


def staged_plan(
    trace: NetworkTrace,
    scores: Mapping[str, Tensor],
    costs: Sequence[CostModel],
    budget: Budget,
    cut: StagedCut,
    *,
    floor: float = 0.1,
) -> PruningPlan:
    """The least cut in the given proportions that meets the budget; channels leave by DI.

    Args:
        scores: group name -> [channels], from `score_groups`.
        costs: recorded in the plan; the budget's among them.
        floor: fraction of every group's channels that stays.

    Raises:
        BudgetError: as many depths as stages are needed, and a cost model for the budget.
        InfeasibleBudget: no depth meets the budget in these proportions.
    """
    stages = stages_of(trace)
    if len(cut.depths) != len(stages):
        raise BudgetError(f"expected a depth for each of {len(stages)} stages, got {len(cut.depths)}")
    model = next((c for c in costs if c.name == budget.cost), None)
    if model is None:
        raise BudgetError(f"expected a cost model for {budget.cost}, got {', '.join(c.name for c in costs)}")
    limit = budget.absolute(model)
    first = model.base - cut.greedy_share * (model.base - limit)
    start = trace.base_widths
    if first < model.base:
        greedy = Budget(budget.cost, limit=first)
        start = greedy_search(trace, FixedScores(trace.prunable, scores), costs, [greedy], SearchLimits(floor)).widths
    depth = {name: d for names, d in zip(stages, cut.depths, strict=True) for name in names}
    grids = {g.name: allowed_widths(g, [model], SearchLimits(floor)) for g in trace.prunable}
    for share in _shares(cut.depths):
        widths = {name: nearest(grid, start[name] * (1 - share * depth[name])) for name, grid in grids.items()}
        if model.cost(widths) <= limit * (1 + 1e-12):
            return plan_at(trace, scores, costs, widths)
    raise InfeasibleBudget(
        f"no depth meets {budget} with stages cut as {cut.depths}: at their floor they cost {model.cost(widths):.6g} "
        f"(asked {limit:.6g}); relax the budget, lower the floor of {floor:g} or cut other stages"
    )


def _shares(depths: Sequence[float]) -> list[float]:
    """Factors on the depths, rising until every stage that is cut at all has nothing left."""
    deepest, shallowest = 1 / max(depths), 1 / min(d for d in depths if d > 0)
    rising = [deepest * step / _STEPS for step in range(_STEPS)]
    return [*rising, *(deepest + (shallowest - deepest) * step / _STEPS for step in range(_STEPS + 1))]
