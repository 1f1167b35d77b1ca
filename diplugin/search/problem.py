"""What every search is given: limits on the costs, and the widths among which it may choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..costs import Budget, CostModel
from ..errors import BudgetError, ModelError
from ..groups import ChannelGroup
from ..network import NetworkTrace
from ..plan import PruningPlan
from .curves import Scorer

_LEVELS = 128

#: A cost model and what it may be at most, in its own unit.
Limit = tuple[CostModel, float]


@dataclass(frozen=True)
class SearchLimits:
    """What the search may do.

    Attributes:
        floor: fraction of every group's channels that stay, whatever the budget (at least one unit).
        align: widths are multiples of this wherever a cost model does not say better.
        rescore_every: ask the scorer again whenever the largest of the limited costs, each as a share of what the
            unpruned network costs, has fallen by more than this; 0: never.
    """

    floor: float = 0.1
    align: int = 1
    rescore_every: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1 or self.align < 1 or not 0 <= self.rescore_every <= 1:
            raise BudgetError(f"expected floor and rescore_every in [0, 1] and align of 1 or more, got {self}")


class Search(Protocol):
    """A way to choose the widths of all groups under budgets; `GreedySearch` and `ExactSearch` are two."""

    def __call__(
        self,
        trace: NetworkTrace,
        scorer: Scorer,
        costs: Sequence[CostModel],
        budgets: Sequence[Budget],
        limits: SearchLimits | None = None,
        *,
        start: PruningPlan | None = None,
    ) -> PruningPlan:
        """The plan; see `greedy_search` for what goes in and what is raised."""
        ...


def check_prunable(trace: NetworkTrace) -> None:
    """Refuse a network without a group that can be pruned.

    Raises:
        ModelError: no group can be pruned.
    """
    if not trace.prunable:
        notes = "; ".join(f"{g.name}: {g.note}" for g in trace.groups[:3]) or "it has no convolution or linear layer"
        raise ModelError(f"expected a model with channels that can be removed, found none ({notes})")


def limits_of(costs: Sequence[CostModel], budgets: Sequence[Budget]) -> list[Limit]:
    """Every budget with its model, as an absolute limit.

    Raises:
        BudgetError: no budget, or one on a cost that no model knows.
    """
    models = {model.name: model for model in costs}
    if not budgets:
        raise BudgetError("expected a budget such as macs=0.5, got none")
    unknown = [b.cost for b in budgets if b.cost not in models]
    if unknown:
        hint = "; give a latency table" if unknown[0] == "latency_ms" else ""
        raise BudgetError(f"expected a budget on one of {', '.join(models)}, got one on {unknown[0]}{hint}")
    return [(models[b.cost], b.absolute(models[b.cost])) for b in budgets]


def allowed_widths(group: ChannelGroup, costs: Sequence[CostModel], limits: SearchLimits) -> list[int]:
    """Ascending widths a search may use: above the floor, on the costs' own grids, the unpruned one included."""
    floor = max(group.blocks, int(limits.floor * group.channels + 0.999999))
    step = group.blocks
    while step % limits.align and step < group.channels:
        step += group.blocks
    coarse = max(1, group.channels // step // _LEVELS) * step
    widths = {w for w in range(group.channels, 0, -coarse) if w >= floor} | {group.channels}
    if limits.align > 1:
        widths = {w for w in range(step, group.channels, step) if w >= floor} | {group.channels}
    for model in costs:
        grid = getattr(model, "allowed_widths", lambda _: None)(group.name)
        if grid is not None:
            widths = {w for w in grid if w >= floor and w % group.blocks == 0} | {group.channels}
    return sorted(widths)


def exceeds(model: CostModel, limit: float, estimate: float, widths: Mapping[str, int]) -> bool:
    """Whether a cost is over its limit; sums of changes carry rounding, so near the limit it is computed afresh."""
    return (estimate if abs(estimate - limit) > 1e-9 * limit else model.cost(widths)) > limit


def hold_after(
    limits: Sequence[Limit], widths: Mapping[str, int], costs: Mapping[str, float], group: str, width: int
) -> bool:
    """Whether every limit holds once a group goes to this width, from widths and what they cost."""
    after = {**widths, group: width}
    return not any(exceeds(m, limit, costs[m.name] + m.change(widths, group, width), after) for m, limit in limits)
