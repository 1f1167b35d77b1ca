"""Plans drawn at random, and twins of models in which removed channels are masked instead of cut."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from diplugin.network import NetworkTrace
from diplugin.plan import PruningPlan


def random_plan(trace: NetworkTrace, draw: random.Random) -> PruningPlan:
    """Every prunable group keeps a random number of random units."""
    kept = {}
    for group in trace.prunable:
        units = draw.sample(range(group.units), draw.randint(1, group.units))
        kept[group.name] = tuple(sorted(u + b * group.units for u in units for b in range(group.blocks)))
    return PruningPlan(kept, trace.base_widths, {}, trace.inputs)


def masked(model: nn.Module, trace: NetworkTrace, removed: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy in which every reader reads zeros for the removed channels."""
    twin = copy.deepcopy(model)
    for group in trace.prunable:
        gone = set(removed[group.name])
        for member in group.side("in"):
            channels = [c for c, r in zip(member.channels, member.roots, strict=True) if r in gone]

            def mask(module: nn.Module, args: tuple[Tensor, ...], channels: list[int] = channels) -> tuple[Tensor, ...]:
                x = args[0].clone()
                x[(..., channels) if isinstance(module, nn.Linear) else (slice(None), channels)] = 0
                return (x,)

            twin.get_submodule(member.layer).register_forward_pre_hook(mask)
    return twin
