"""One shot: score the unpruned network once, search once, cut once.

The strategy that the others are measured against, and the default: re-scoring after every few cuts costs more and
keeps less (see the study under benchmarks/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn

from ..costs import Budget, CostModel
from ..features import (
    CHUNK_SIZE,
    Forward,
    GetLabels,
    chunks,
    device_of,
    first_images,
    forward_inputs,
    labels_of,
    to_device,
)
from ..network import NetworkTrace
from ..plan import PruningPlan
from ..ranking import ByAll, Ranking, hand_out
from ..recovery import REPAIRS, Cut, Repair, best_repair
from ..scoring import GroupScores, group_energies, group_norms, score_groups
from ..search import FixedScores, GreedySearch, Search, SearchLimits
from ..taps import AfterActivation, Tap
from ..team import current_team
from .job import Job, Shrunk, shares


@dataclass(frozen=True)
class OneShot:
    """How a plan is made and carried out without a gradient step.

    Attributes:
        rho: relative ridge of DI.
        tap: which tensors are scored.
        ranking: which channels of a group leave first; how many do, DI alone says.
        limits: floor and alignment of the widths.
        searcher: chooses the widths: `GreedySearch()` or `ExactSearch()`.
        repairs: what is tried on the cut network; the holdout chooses among them.
        images: training images used for scores and repairs; the refit has a number of its own, `Reconstruction.images`.
    """

    rho: float = 10.0
    tap: Tap = field(default_factory=AfterActivation)
    ranking: Ranking = field(default_factory=ByAll)
    limits: SearchLimits = field(default_factory=SearchLimits)
    searcher: Search = field(default_factory=GreedySearch)
    repairs: tuple[Repair, ...] = REPAIRS
    images: int = 2000
    get_labels: GetLabels = labels_of
    forward: Forward = forward_inputs

    def score(self, model: nn.Module, loader: Iterable[Any], trace: NetworkTrace) -> GroupScores:
        """DI of every prunable group, how much its readers make of each channel, and how large its filters are."""
        scores = score_groups(
            model, first_images(loader, self.images), trace.groups, rho=self.rho, tap=self.tap,
            get_labels=self.get_labels, forward=self.forward, chunk_size=CHUNK_SIZE,
        )  # fmt: skip
        batch = to_device(next(iter(chunks(first_images(loader, CHUNK_SIZE)))), device_of(model))
        energies = group_energies(model, batch, trace.groups, self.forward)
        return replace(scores, energies=energies, norms=group_norms(model, trace.groups))

    def losses(self, trace: NetworkTrace, scores: GroupScores) -> dict[str, Tensor]:
        """What the search takes channels to be worth: DI's losses, handed out in the order of the ranking."""
        found = {}
        for g in trace.prunable:
            losses = scores.scores[g.name]
            values = self.ranking(losses, scores.energies.get(g.name), scores.norms.get(g.name))
            found[g.name] = hand_out(losses, values, g.blocks)
        return found

    def search(
        self, trace: NetworkTrace, scores: GroupScores, costs: Sequence[CostModel], budgets: Sequence[Budget]
    ) -> PruningPlan:
        """The plan for these scores."""
        return self.plan(trace, self.losses(trace, scores), costs, budgets)

    def plan(
        self, trace: NetworkTrace, losses: Mapping[str, Tensor], costs: Sequence[CostModel], budgets: Sequence[Budget],
        start: PruningPlan | None = None,
    ) -> PruningPlan:  # fmt: skip
        """The plan for these losses, from what an earlier plan for the same network has left.

        Of many processes the first one searches: a solver that runs against the clock ends elsewhere each time.
        """

        def search() -> str:
            scorer = FixedScores(trace.prunable, losses)
            return self.searcher(trace, scorer, costs, budgets, self.limits, start=start).to_json()

        return PruningPlan.from_json(current_team().done_by_first(search))

    def shrink(self, job: Job, scores: GroupScores) -> Shrunk:
        """The whole strategy: one plan for all budgets, and the network cut by it."""
        return self.carry_out(job, job.plan(lambda budgets: self.search(job.trace, scores, job.costs, budgets)))

    def carry_out(self, job: Job, plan: PruningPlan) -> Shrunk:
        """The job's network, cut by a plan and repaired."""
        job.tell(f"planned: {shares(plan)} of the unpruned network" + (f"; {plan.found_by}" if plan.found_by else ""))
        with job.stage("cut"):
            model, verdicts = self.carve(job.model, job.split.scoring, job.trace, plan, job.judge)
        job.tell("repaired, holdout accuracy: " + ", ".join(f"{n} {v:.2%}" for n, v in verdicts.items()))
        return Shrunk(model, plan)

    def carve(
        self, model: nn.Module, loader: Iterable[Any], trace: NetworkTrace, plan: PruningPlan,
        judge: Callable[[nn.Module], float],
    ) -> tuple[nn.Module, dict[str, float]]:  # fmt: skip
        """A pruned copy of the model with the repair that the judge likes best, and what it said of each."""
        cut = Cut(model, loader, trace, plan, self.images, self.forward)
        return best_repair(cut, self.repairs, judge)


class Strategy(Protocol):
    """Another way than one shot to shrink a network."""

    def record(self) -> dict[str, Any]:
        """The settings as JSON, for `config.json`."""
        ...

    def shrink(self, once: OneShot, job: Job, scores: GroupScores) -> Shrunk:
        """The network at its budgets.

        Args:
            once: how a network is scored, searched and cut, each time.
            scores: of the unpruned network.
        """
        ...
