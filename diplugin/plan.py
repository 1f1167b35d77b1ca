"""The pruning plan: which channels stay, and what that will cost.

A plan is the one thing that search, the two hosts, surgery and the report hand to each other. It is frozen, holds
names and numbers only, round-trips through JSON, and carries the specification of the inputs it was traced with, so
that a fresh model and a plan are enough to build the pruned network again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from .errors import PlanError, first_line
from .network import TensorSpec
from .whole_files import finite_number, whole_number, write_text

SCHEMA = 1


@dataclass(frozen=True)
class PlannedCost:
    """A cost of the unpruned network and the one predicted for the plan, in the cost's own unit."""

    base: float
    predicted: float

    @property
    def fraction(self) -> float:
        return self.predicted / self.base if self.base else 0.0


@dataclass(frozen=True)
class PathPoint:
    """One step of the search: the label information given up so far (sum of DI losses) and the costs then."""

    loss: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class PruningPlan:
    """Root channels kept in every prunable group.

    Attributes:
        kept: group name -> root channels that stay, ascending; never empty.
        channels: group name -> root channels of the unpruned network; the same names as `kept`.
        costs: cost name -> unpruned and predicted value.
        inputs: what the network was traced with.
        path: how the search came here, coarse to fine; may be empty.
        found_by: which search found it and how good it is known to be, in words; may be empty.
    """

    kept: Mapping[str, tuple[int, ...]]
    channels: Mapping[str, int]
    costs: Mapping[str, PlannedCost] = field(default_factory=dict)
    inputs: tuple[TensorSpec, ...] = ()
    path: tuple[PathPoint, ...] = field(default=(), repr=False)
    found_by: str = ""

    def __post_init__(self) -> None:
        if set(self.kept) != set(self.channels):
            odd = sorted(set(self.kept) ^ set(self.channels))
            raise PlanError(f"expected the same groups in kept and channels, only one of them names {odd[:3]}")
        for name, kept in self.kept.items():
            ordered = all(a < b for a, b in pairwise(kept))
            if not kept or not ordered or kept[0] < 0 or kept[-1] >= self.channels[name]:
                raise PlanError(
                    f"expected 1 to {self.channels[name]} ascending channel numbers below {self.channels[name]} "
                    f"for group {name!r}, got {list(kept)[:8]}"
                )

    @property
    def widths(self) -> dict[str, int]:
        """Kept channels per group."""
        return {name: len(kept) for name, kept in self.kept.items()}

    @property
    def removed(self) -> dict[str, tuple[int, ...]]:
        """Channels that go, per group."""
        return {n: tuple(sorted(set(range(self.channels[n])) - set(kept))) for n, kept in self.kept.items()}

    def then(self, later: PruningPlan) -> PruningPlan:
        """This plan followed by one made for the network that this plan leaves; indices of the first network.

        Raises:
            PlanError: the later plan is not for the network that this one leaves.
        """
        if dict(later.channels) != self.widths:
            raise PlanError("expected a later plan made for the network that this plan leaves, its widths differ")
        kept = {name: tuple(self.kept[name][i] for i in later.kept[name]) for name in self.kept}
        costs = {n: PlannedCost(self.costs[n].base if n in self.costs else c.base, c.predicted)
                 for n, c in later.costs.items()}  # fmt: skip
        return PruningPlan(kept, self.channels, costs, self.inputs, (*self.path, *later.path))

    def since(self, earlier: PruningPlan) -> PruningPlan:
        """What is left to do of this plan for a network that an earlier one has pruned: `earlier.then` undone.

        Raises:
            PlanError: the earlier plan is for another network, or has removed what this one keeps.
        """
        if self.channels != earlier.channels or any(set(k) - set(earlier.kept[n]) for n, k in self.kept.items()):
            raise PlanError("expected an earlier plan for the same network that keeps all that this plan keeps")
        kept = {}
        for name, channels in earlier.kept.items():
            place = {channel: i for i, channel in enumerate(channels)}
            kept[name] = tuple(place[channel] for channel in self.kept[name])
        return PruningPlan(kept, earlier.widths, {}, self.inputs)

    def merge(self, other: PruningPlan) -> PruningPlan:
        """Both cuts at once: a channel stays if both plans keep it. Costs are left out, being unknown.

        Raises:
            PlanError: the plans disagree on a group's size, or nothing of a group is left.
        """
        channels = {**self.channels, **other.channels}
        if any(plan.channels[n] != channels[n] for plan in (self, other) for n in plan.channels):
            raise PlanError("expected two plans for the same network, their groups have different sizes")
        everything = {n: tuple(range(c)) for n, c in channels.items()}
        one, two = {**everything, **self.kept}, {**everything, **other.kept}
        kept = {n: tuple(sorted(set(one[n]) & set(two[n]))) for n in channels}
        return PruningPlan(kept, channels, {}, self.inputs or other.inputs)

    def diff(self, other: PruningPlan) -> dict[str, tuple[int, int]]:
        """Groups whose widths differ: name -> (width here, width there); 0 where a plan lacks the group."""
        one, two = self.widths, other.widths
        names = [*one, *(n for n in two if n not in one)]
        return {n: (one.get(n, 0), two.get(n, 0)) for n in names if one.get(n, 0) != two.get(n, 0)}

    def to_json(self) -> str:
        """JSON text; `from_json` gives an equal plan back."""
        return json.dumps(
            {
                "schema": SCHEMA,
                "inputs": [asdict(spec) for spec in self.inputs],
                "costs": {name: asdict(cost) for name, cost in self.costs.items()},
                "groups": {n: {"channels": self.channels[n], "kept": list(k)} for n, k in self.kept.items()},
                "path": [{"loss": p.loss, "costs": dict(p.costs)} for p in self.path],
                **({"found_by": self.found_by} if self.found_by else {}),
            },
            indent=1,
            allow_nan=False,
        )

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """The plan that `to_json` wrote.

        Raises:
            PlanError: not JSON, another schema, or a field that is missing or of the wrong kind.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"expected a pruning plan in JSON, got text that does not parse ({error})") from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise PlanError(f"expected a pruning plan of schema {SCHEMA}, got {schema!r}; update diplugin?")
        try:
            return cls._from_data(data)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise PlanError(
                f"expected a whole pruning plan, got a broken one ({type(error).__name__}: {error})"
            ) from error

    @classmethod
    def _from_data(cls, data: Mapping[str, Any]) -> PruningPlan:
        groups = data["groups"]
        return cls(
            kept={n: tuple(_integer(i) for i in g["kept"]) for n, g in groups.items()},
            channels={n: _integer(g["channels"]) for n, g in groups.items()},
            costs={n: PlannedCost(finite_number(c["base"]), finite_number(c["predicted"]))
                   for n, c in data["costs"].items()},
            inputs=tuple(_tensor_spec(spec) for spec in data["inputs"]),
            path=tuple(PathPoint(finite_number(p["loss"]), {k: finite_number(v) for k, v in p["costs"].items()})
                       for p in data["path"]),
            found_by=_text(data.get("found_by", "")),
        )  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON.

        Raises:
            PlanError: the file cannot be written.
        """
        try:
            write_text(path, self.to_json())
        except OSError as error:
            raise PlanError(f"expected a path that can be written at {path}, got {first_line(error)}") from error

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read a plan.

        Raises:
            PlanError: there is no such file, or it holds no whole plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"expected a pruning plan at {path}, got {error}") from error
        return cls.from_json(text)


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected an integer, got {value!r}")
    return whole_number(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 500:
        raise TypeError(f"expected a short text, got {value!r:.80}")
    return value


def _tensor_spec(data: Mapping[str, Any]) -> TensorSpec:
    shape = tuple(_integer(size) for size in data["shape"])
    # The name is looked up in torch, which holds much else.
    if min(shape, default=0) < 0 or not isinstance(getattr(torch, data["dtype"], None), torch.dtype):
        raise ValueError(f"expected a tensor's shape and dtype, got {data!r:.80}")
    return TensorSpec(shape, data["dtype"])
