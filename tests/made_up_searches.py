"""Problems for searches: groups with made-up costs and losses, and brute force over every width combination."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from diplugin.costs import Budget, CostModel, SeparableCost, Term, Widths
from diplugin.groups import ChannelGroup, GroupMember
from diplugin.network import NetworkTrace, TensorSpec
from diplugin.plan import PruningPlan
from diplugin.search import FixedScores, SearchLimits, greedy_search

ANY_WIDTH = SearchLimits(floor=0.0)


def group(name: str, channels: int, blocks: int = 1, note: str = "") -> ChannelGroup:
    own = tuple(range(channels))
    members = (GroupMember(name, "out", own, own), GroupMember(f"{name}.reader", "in", own, own))
    return ChannelGroup(name, channels, members, blocks, note)


def trace_of(*groups: ChannelGroup) -> NetworkTrace:
    return NetworkTrace(groups, (), (TensorSpec((1, 3, 8, 8)),))


def made_up(sizes: Sequence[tuple[int, int]], seed: int) -> tuple[NetworkTrace, dict[str, Tensor]]:
    """Groups g0, g1, ... of these channels and blocks, and a score for every channel."""
    groups = [group(f"g{i}", channels, blocks) for i, (channels, blocks) in enumerate(sizes)]
    generator = torch.Generator().manual_seed(seed)
    scores = {g.name: torch.rand(g.channels, generator=generator, dtype=torch.float64) ** 2 for g in groups}
    return trace_of(*groups), scores


problems = st.builds(
    made_up, st.lists(st.sampled_from([(2, 1), (5, 1), (8, 1), (8, 2), (6, 3)]), min_size=1, max_size=3),
    st.integers(0, 2**16),
)  # fmt: skip


def chain(trace: NetworkTrace, name: str = "macs", weights: Sequence[float] = (3.0, 1.0, 4.0)) -> SeparableCost:
    """Cost of a chain of layers between neighbouring groups: products of two widths, as MACs are."""
    names = [g.name for g in trace.prunable]
    terms = [Term((names[0],), lambda w: weights[0] * w[names[0]])]
    for one, two in itertools.pairwise(names):
        terms.append(Term((one, two), lambda w, one=one, two=two: weights[1] * w[one] * w[two]))
    terms.append(Term((names[-1],), lambda w: weights[2] * w[names[-1]]))
    return SeparableCost(name, "", trace.base_widths, terms)


def staircase(trace: NetworkTrace, step: int, bump: float) -> SeparableCost:
    """Latency-like: flat between multiples of `step`, and dearer by `bump` right off the step."""

    def value(width: int) -> float:
        return math.ceil(width / step) + (bump if width % step else 0.0)

    terms = [Term((g.name,), lambda w, n=g.name: value(w[n])) for g in trace.prunable]
    return SeparableCost("latency_ms", "ms", trace.base_widths, terms)


def loss_of(trace: NetworkTrace, scores: Mapping[str, Tensor], widths: Widths) -> float:
    """Least information lost at these widths: the cheapest units leave."""
    total = 0.0
    for g in trace.prunable:
        units = scores[g.name].view(g.blocks, g.units).sum(0).sort().values
        total += float(units[: g.units - widths[g.name] // g.blocks].sum())
    return total


def best_loss(
    trace: NetworkTrace, scores: Mapping[str, Tensor], limits: Sequence[tuple[CostModel, float]],
    grid: Mapping[str, Sequence[int]] | None = None, slack: float = 0.0,
) -> float:  # fmt: skip
    """Least loss of all structures within every limit, by trying all of them; inf if there is none.

    Structures have the widths in `grid`, else any; a cost may exceed its limit by the share `slack`.
    """
    grid = grid or {g.name: range(g.blocks, g.channels + 1, g.blocks) for g in trace.prunable}
    best = math.inf
    for combination in itertools.product(*grid.values()):
        widths = dict(zip(grid, combination, strict=True))
        if all(cost.cost(widths) <= limit * (1 + slack) for cost, limit in limits):
            best = min(best, loss_of(trace, scores, widths))
    return best


def search(
    trace: NetworkTrace, scores: Mapping[str, Tensor], costs: Sequence[CostModel], budgets: Sequence[Budget],
    limits: SearchLimits = ANY_WIDTH,
) -> PruningPlan:  # fmt: skip
    """Greedy search by scores that stay what they are, whatever is removed."""
    return greedy_search(trace, FixedScores(trace.prunable, scores), costs, budgets, limits)
