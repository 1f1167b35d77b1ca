"""Networks of given proportions: the widest one that budgets allow, and the plan of given widths.

Whoever says how wide layers should be *relative to each other* leaves one number open, the common factor, and that one
follows from the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..costs import Budget, CostModel
from ..errors import InfeasibleBudget
from ..network import NetworkTrace
from ..plan import PlannedCost, PruningPlan
from .curves import first_order_curve
from .problem import SearchLimits, allowed_widths, limits_of

#: Halvings of the factor's interval: far below one channel of any layer.
_HALVINGS = 40
Widths = dict[str, int]


def nearest(grid: Sequence[int], wanted: float) -> int:
    """The width of a grid that comes nearest to a wanted one, the narrower of equals."""
    return min(grid, key=lambda width: abs(width - wanted))


def widest(
    trace: NetworkTrace,
    costs: Sequence[CostModel],
    budgets: Sequence[Budget],
    limits: SearchLimits,
    profile: Mapping[str, float],
) -> Widths:
    """Widths in proportion to a profile, with the largest factor at which every budget holds.

    Rounded widths leave some of a budget over; groups that rounding has cut shortest get it while it lasts. Costs are
    taken to rise with the factor. Where a measured latency does not, the budgets hold all the same.

    Args:
        costs: cost models, one at least for every budget; widths are on their grids.
        profile: group name -> how wide it should be, above 0, in any unit.

    Raises:
        BudgetError: no budget, or one on a cost that no model knows.
        InfeasibleBudget: the narrowest widths allowed are over a budget.
    """
    bounds = limits_of(costs, budgets)
    grids = {g.name: allowed_widths(g, costs, limits) for g in trace.prunable}

    def scaled(factor: float) -> Widths:
        return {name: nearest(grid, factor * profile[name]) for name, grid in grids.items()}

    def fits(widths: Widths) -> bool:
        return all(model.cost(widths) <= limit for model, limit in bounds)

    low, high = 0.0, max(grid[-1] / profile[name] for name, grid in grids.items())
    if fits(scaled(high)):
        return scaled(high)
    if not fits(scaled(low)):
        raise InfeasibleBudget(f"no widths in these proportions meet {' and '.join(map(str, budgets))}, "
                               f"not even the narrowest: {scaled(low)}")  # fmt: skip
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(scaled(middle)) else (low, middle)
    widths = scaled(low)
    for name in sorted(grids, key=lambda name: widths[name] - low * profile[name]):
        wider = {**widths, name: next((w for w in grids[name] if w > widths[name]), widths[name])}
        widths = wider if fits(wider) else widths
    return widths


def plan_at(
    trace: NetworkTrace, losses: Mapping[str, Tensor], costs: Sequence[CostModel], widths: Mapping[str, int]
) -> PruningPlan:
    """The plan of these widths; in every group the channels of the largest losses stay.

    Args:
        losses: group name -> [channels].
        costs: recorded in the plan.
        widths: group name -> channels that stay, whole units.
    """
    kept = {}
    for group in trace.prunable:
        leave = (group.channels - widths[group.name]) // group.blocks
        units = sorted(first_order_curve(group, losses[group.name]).order[leave:])
        kept[group.name] = tuple(sorted(u + b * group.units for u in units for b in range(group.blocks)))
    planned = {model.name: PlannedCost(model.base, model.cost(widths)) for model in costs}
    return PruningPlan(kept, trace.base_widths, planned, trace.inputs)
