"""How scores become zeros and ones, under the rules that a mask-based host lets its users set.

A tensor has a *rule*: a ratio or a threshold, bounds on the ratio, and maybe partners that share one mask (a
dependency) or one budget (a global group). Counts are exact to the channel, bounds hold in every case, ties go by
position so that equal scores give equal masks, and no tensor is ever emptied.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, lcm
from typing import TypeVar

import torch
from torch import Tensor

from .errors import UserError

Key = TypeVar("Key", bound=Hashable)

#: A shared budget leaves every tensor this share of its channels, unless told otherwise.
GLOBAL_FLOOR = 0.1


@dataclass(frozen=True)
class MaskRule:
    """What a user asked for one tensor.

    Attributes:
        ratio: share of entries to mask; None where a threshold or a partner's ratio decides.
        threshold: entries below it are masked.
        lowest, highest: bounds on the share that is masked; None for none.
        shared_mask: tensors of one name get one mask, from the mean of their scores.
        shared_budget: tensors of one name are ranked together; `ratio` then counts elements of all of them.
        blocks: equally many entries are masked in each of so many blocks.
        elements: elements of the tensor itself, of which one score stands for several.
    """

    ratio: float | None = None
    threshold: float | None = None
    lowest: float | None = None
    highest: float | None = None
    shared_mask: Hashable | None = None
    shared_budget: Hashable | None = None
    blocks: int = 1
    elements: int = 0

    def bounded(self, ratio: float) -> float:
        return min(1.0 if self.highest is None else self.highest, max(self.lowest or 0.0, ratio))


def choose_masks(rules: Mapping[Key, MaskRule], metrics: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """A mask of zeros and ones, shaped like the metric, for every rule.

    Args:
        metrics: scores of every tensor that has a rule; low ones leave first.

    Raises:
        UserError: partners with different ratios or thresholds, or of different sizes.

    >>> rules = {"a": MaskRule(ratio=0.5), "b": MaskRule(threshold=2.5)}
    >>> masks = choose_masks(rules, {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 2.0, 4.0])})
    >>> masks["a"].tolist(), masks["b"].tolist()
    ([0.0, 1.0], [1.0, 0.0, 1.0])
    """
    masks: dict[Key, Tensor] = {}
    for name in dict.fromkeys(r.shared_mask for r in rules.values() if r.shared_mask is not None):
        partners = [key for key, rule in rules.items() if rule.shared_mask == name]
        masks.update(_one_mask(str(name), partners, rules, metrics))
    apart = [key for key in rules if key not in masks]
    for name in dict.fromkeys(rules[k].shared_budget for k in apart if rules[k].shared_budget is not None):
        partners = [k for k in apart if rules[k].shared_budget == name and rules[k].threshold is None]
        masks.update(_one_budget(str(name), partners, rules, metrics))
    for key in apart:
        if key not in masks:
            masks[key] = _own_mask(rules[key], metrics[key])
    return masks


def _one_mask(
    name: str, partners: Sequence[Key], rules: Mapping[Key, MaskRule], metrics: Mapping[Key, Tensor]
) -> dict[Key, Tensor]:
    sizes = sorted({metrics[key].numel() for key in partners})
    if len(sizes) > 1:
        raise UserError(f"expected layers of one width in dependency group {name!r}, got {sizes}")
    mean = torch.stack([metrics[key].flatten() for key in partners]).mean(0)
    mask = _own_mask(_common_rule(name, [rules[key] for key in partners]), mean)
    return {key: mask.reshape(metrics[key].shape).clone() for key in partners}


def _one_budget(
    name: str, partners: Sequence[Key], rules: Mapping[Key, MaskRule], metrics: Mapping[Key, Tensor]
) -> dict[Key, Tensor]:
    ratio = _common("sparse_ratio", [rules[key].ratio for key in partners], f"global group {name!r}") or 0.0
    ceiling = max(1 - GLOBAL_FLOOR, ratio)
    highest = [ceiling if rules[k].highest is None else float(rules[k].highest or 0) for k in partners]
    grains = [max(1, rules[k].elements // metrics[k].numel()) for k in partners]
    lowest = [rules[k].lowest or 0.0 for k in partners]
    shared = share_out([metrics[k] for k in partners], grains, ratio, lowest, highest)
    return dict(zip(partners, shared, strict=True))


def _common_rule(name: str, rules: Sequence[MaskRule]) -> MaskRule:
    """What all partners of one mask ask for: its bounds are the narrowest of theirs."""
    where = f"dependency group {name!r}"
    ratio = _common("sparse_ratio", [rule.ratio for rule in rules], where)
    threshold = _common("sparse_threshold", [rule.threshold for rule in rules], where)
    if ratio is not None and threshold is not None:
        raise UserError(f"expected a sparse_ratio or a sparse_threshold in {where}, got {ratio} and {threshold}")
    return MaskRule(
        ratio, threshold,
        lowest=max((rule.lowest for rule in rules if rule.lowest is not None), default=None),
        highest=min((rule.highest for rule in rules if rule.highest is not None), default=None),
        blocks=lcm(*(rule.blocks for rule in rules)),
    )  # fmt: skip


def _common(setting: str, values: Sequence[float | None], where: str) -> float | None:
    """The one value among those that are given; None where none is."""
    given = sorted({value for value in values if value is not None})
    if len(given) > 1:
        raise UserError(f"expected one {setting} in {where}, got {given}")
    return given[0] if given else None


def _own_mask(rule: MaskRule, metric: Tensor) -> Tensor:
    count = metric.numel()
    if rule.threshold is None:
        return keep_lowest_out(metric, count_of(count, rule.bounded(rule.ratio or 0.0)), rule.blocks)
    below = int((metric < rule.threshold).sum())
    least, most = count_of(count, rule.bounded(0.0)), count_of(count, rule.bounded(1.0))
    return keep_lowest_out(metric, min(most, max(least, below)), rule.blocks)


def count_of(total: int, ratio: float) -> int:
    """How many of `total` a ratio stands for, rounded down but for float noise: 29 of 100 for .29.

    >>> count_of(100, 0.29), count_of(8, 0.3)
    (29, 2)
    """
    return floor(total * ratio + 1e-9)


def keep_lowest_out(metric: Tensor, count: int, blocks: int = 1) -> Tensor:
    """Ones but for the `count` lowest entries, equally many in each of `blocks` blocks; one entry a block stays.

    Args:
        metric: scores of any shape; ties go by position, so equal metrics give equal masks.

    Returns:
        zeros and ones of the metric's shape.

    Raises:
        UserError: the metric cannot be cut into that many blocks.

    >>> keep_lowest_out(torch.tensor([3.0, 1.0, 2.0, 1.0]), 2)
    tensor([1., 0., 1., 0.])
    """
    if metric.numel() % blocks:
        raise UserError(f"expected {blocks} blocks to divide {metric.numel()} channels, they do not")
    flat = metric.reshape(blocks, -1)
    leave = min(count // blocks, flat.shape[1] - 1)
    order = flat.argsort(dim=1, stable=True)[:, :leave]
    return torch.ones_like(flat, dtype=torch.float32).scatter(1, order, 0.0).reshape(metric.shape)


def share_out(
    metrics: Sequence[Tensor], grains: Sequence[int], ratio: float, lowest: Sequence[float], highest: Sequence[float]
) -> list[Tensor]:
    """Masks of several tensors that share one budget: the least score per element leaves first.

    Args:
        metrics: scores of each tensor's channels (or blocks).
        grains: elements that one entry of each metric stands for.
        ratio: share of all elements to mask; it is not exceeded, and missed by less than one channel.
        lowest, highest: least and greatest share of each tensor's entries to mask; one entry always stays.

    >>> metrics = [torch.tensor([1.0, 9.0]), torch.tensor([5.0, 6.0])]
    >>> [mask.tolist() for mask in share_out(metrics, [1, 1], 0.5, [0, 0], [1, 1])]
    [[0.0, 1.0], [0.0, 1.0]]
    """
    budget = count_of(sum(m.numel() * g for m, g in zip(metrics, grains, strict=True)), ratio)
    counts = [min(count_of(m.numel(), low), m.numel() - 1) for m, low in zip(metrics, lowest, strict=True)]
    limits = [min(count_of(m.numel(), high), m.numel() - 1) for m, high in zip(metrics, highest, strict=True)]
    left = budget - sum(c * g for c, g in zip(counts, grains, strict=True))
    candidates = [
        (score / grain, i, rank, grain)
        for i, (metric, grain) in enumerate(zip(metrics, grains, strict=True))
        for rank, score in enumerate(metric.flatten().sort(stable=True).values.tolist())
        if counts[i] <= rank < limits[i]
    ]
    for _, i, rank, grain in sorted(candidates):
        # Only the next channel of a tensor may leave: where a big one did not fit, its successors stay as well.
        if grain <= left and rank == counts[i]:
            counts[i], left = rank + 1, left - grain
    return [keep_lowest_out(metric, count) for metric, count in zip(metrics, counts, strict=True)]
