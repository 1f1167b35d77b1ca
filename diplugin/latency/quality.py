"""What a table says that cannot be true, and how two tables differ.

Tables travel; a public one of a Jetson had all three faults that are looked for here: times that scatter, times that
do not grow with the resolution, and rows copied from another device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from statistics import median

from ..tables import Entry, LatencyTable, OpKey

MAX_UNSTABLE, MAX_CV, MAX_FALLING, MAX_EQUAL, MAX_MAPE = 0.2, 0.05, 0.1, 0.05, 0.1
SLACK = 0.05


@dataclass(frozen=True)
class Finding:
    """One thing that is odd about a table; `fatal` ones mean that its numbers cannot be used."""

    text: str
    fatal: bool = True


def findings(table: LatencyTable) -> list[Finding]:
    """Everything odd about one table, the worst first."""
    found = [*_emulation(table), *_scatter(table), *_resolution(table), *_calibration(table)]
    return sorted(found, key=lambda f: not f.fatal)


def _emulation(table: LatencyTable) -> Iterable[Finding]:
    if table.emulated:
        yield Finding("it was timed on an emulator: its times mean nothing and it guides no search")


def _scatter(table: LatencyTable) -> Iterable[Finding]:
    if table.origin != "measured":
        return
    unstable = sum(entry.unstable for entry in table.entries) / len(table.entries)
    if unstable > MAX_UNSTABLE:
        yield Finding(f"{unstable:.0%} of its entries are unstable (at most {MAX_UNSTABLE:.0%} may be): profile again "
                      f"on a quieter device")  # fmt: skip
    elif unstable:
        yield Finding(f"{unstable:.1%} of its entries are unstable", fatal=False)
    scatter = median(entry.cv for entry in table.entries)
    if scatter > MAX_CV:
        yield Finding(f"its entries scatter by {scatter:.1%} in the median (at most {MAX_CV:.0%} may be)")


def _resolution(table: LatencyTable) -> Iterable[Finding]:
    """Entries alike but for their resolution: a larger image takes longer."""
    alike: dict[OpKey, list[Entry]] = {}
    for entry in table.entries:
        alike.setdefault(replace(entry.key, size=()), []).append(entry)
    pairs = falling = 0
    for entries in alike.values():
        ordered = sorted(entries, key=lambda e: prod(e.key.size))
        for small, large in pairwise(ordered):
            if prod(large.key.size) >= 2 * prod(small.key.size):
                pairs += 1
                falling += large.latency_ms <= small.latency_ms * (1 + SLACK)
    if pairs >= 3 and falling / pairs > MAX_FALLING:
        yield Finding(f"{falling} of {pairs} operators take no longer at a higher resolution: these are not times")


def _calibration(table: LatencyTable) -> Iterable[Finding]:
    if table.calibration is None:
        kind = "its predictions are uncalibrated sums: time at least 10 whole nets on the device"
        if table.origin == "measured":
            yield Finding(kind, fatal=False)
    elif table.calibration.mape > MAX_MAPE:
        yield Finding(f"its calibration misses held-out nets by {table.calibration.mape:.0%}")


@dataclass(frozen=True)
class TableDiff:
    """Two tables side by side: keys in one only, and the ratio of times (other / one) of those in both."""

    only_one: int
    only_other: int
    ratios: dict[OpKey, float]
    equal: int

    @property
    def copied(self) -> bool:
        """So many times are equal to the last digit that one table must be a copy of the other."""
        return len(self.ratios) >= 3 and self.equal > MAX_EQUAL * len(self.ratios)


def diff_tables(one: LatencyTable, other: LatencyTable) -> TableDiff:
    """How two tables differ."""
    common = one.by_key.keys() & other.by_key.keys()
    ratios = {key: other.by_key[key].latency_ms / one.by_key[key].latency_ms for key in sorted(common)}
    equal = sum(one.by_key[key].latency_ms == other.by_key[key].latency_ms for key in common)
    return TableDiff(len(one.by_key.keys() - common), len(other.by_key.keys() - common), ratios, equal)
