"""Latency tables: what one operator costs on one device, and how far a sum of such costs can be trusted.

Latency is a staircase in the number of channels, and whose staircase depends on device, runtime and threads. So a
table belongs to exactly one such setting, its alignment is measured, and a lookup never interpolates: it is an exact
hit, or a wider profiled entry of the same alignment class (with a warning), or an error that names what is missing.

A prediction for a whole net is `scale * (sum of entries) + offset`, both fitted on nets timed end to end, and a
`refill` for a net whose weights do not all stay in the cache; without them it is only a sum and is labelled
uncalibrated. `latency_tables/README.md` documents the file format, version 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RoundedLatencyWarning, TableError
from .keys import OpKey

SCHEMA = 1


@dataclass(frozen=True)
class Setting:
    """What runs the operators: an entry means nothing under another setting."""

    runtime: str
    version: str
    provider: str
    graph_optimization: str
    threads: int

    @property
    def text(self) -> str:
        return (f"{self.runtime} {self.version} {self.provider}, graph optimisation {self.graph_optimization}, "
                f"{self.threads} thread{'s' if self.threads != 1 else ''}")  # fmt: skip


@dataclass(frozen=True)
class Alignment:
    """Two steps of the staircase, measured.

    Attributes:
        step: on multiples of it more channels never run clearly faster than fewer: the search keeps to these.
        plateau: rounding a width up to a multiple of it costs no time: wide groups need no finer grid.
    """

    step: int = 1
    plateau: int = 1

    def aligned(self, width: int) -> bool:
        return width % self.step == 0


class Entry(NamedTuple):
    """One operator's time.

    `latency_ms` is what the operator adds to a net: the raw time minus the cost of a call and of the graph's edges.
    `cpu_ms` and `wall_ms` are the raw medians of a one-operator graph, `cv` their coefficient of variation.
    """

    key: OpKey
    latency_ms: float
    cpu_ms: float
    wall_ms: float
    cv: float
    unstable: bool = False


class NetTiming(NamedTuple):
    """A whole net timed end to end beside the sum that the entries give for it.

    `weights_mb` is what the layers' weights take, in MB (10^6 bytes); 0 where it was not noted.
    """

    name: str
    measured_ms: float
    sum_ms: float
    cpu_ms: float
    wall_ms: float
    cv: float
    weights_mb: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """`scale * sum + offset_ms`, fitted on `nets` nets; errors are of nets left out of the fit.

    `mape` and `worst` are fractions (0.02 = 2 %), `rho` is Spearman's rank correlation. Entries are timed back to back,
    their weights in the cache. So runs a whole net whose weights all stay there, too; one with more than `cache_mb` MB
    (10^6 bytes) of them fetches them again for every inference and takes `refill_ms` longer. Both are 0 where the
    device told no cache or no such difference was measured.
    """

    scale: float
    offset_ms: float
    nets: int
    mape: float
    worst: float
    rho: float
    refill_ms: float = 0.0
    cache_mb: float = 0.0

    def predict(self, sum_ms: float, weights_mb: float) -> float:
        """Milliseconds of a net with this sum of entries and these weights."""
        return self.scale * sum_ms + self.offset_ms + self.refill(weights_mb)

    def refill(self, weights_mb: float) -> float:
        """Milliseconds that a net pays for weights which do not stay in the cache."""
        return self.refill_ms if weights_mb > self.cache_mb else 0.0

    @property
    def text(self) -> str:
        return f"held-out error {self.mape:.1%} (worst {self.worst:.1%}) over {self.nets} nets"


@dataclass(frozen=True)
class LatencyTable:
    """Entries of one (device, runtime, threads), with what is needed to trust them.

    Attributes:
        name: short, unique among shipped tables.
        device: the device in words.
        setting: runtime, version, provider, graph optimisation, threads.
        origin: "measured", or "estimated" by a model fitted to whole nets.
        emulated: timed on an emulator: may not guide a search.
        alignment: measured steps of the staircase.
        overhead_ms: cost of one call of the runtime, contained in no entry.
        entries, nets: the rows.
        calibration: None leaves predictions uncalibrated.
        error_band: fractions (low, high) around an estimated prediction, None for a measured table.
        provenance: what the device said about itself.
        plan_sha256: of the profile plan that asked for the rows.
    """

    name: str
    device: str
    setting: Setting
    entries: tuple[Entry, ...]
    nets: tuple[NetTiming, ...] = ()
    alignment: Alignment = Alignment()
    overhead_ms: float = 0.0
    calibration: Calibration | None = None
    origin: str = "measured"
    emulated: bool = False
    error_band: tuple[float, float] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    plan_sha256: str = ""

    @classmethod
    def load(cls, source: str | Path) -> LatencyTable:
        """Read a table from a file, or a shipped one by its name.

        Raises:
            TableError: no such file or name, or the content breaks a rule of the format.
        """
        from .file_format import load_table

        return load_table(source)

    def save(self, path: str | Path) -> Path:
        """Write the table atomically; returns the path. The file holds its own content hash.

        Raises:
            TableError: `load` would refuse it, for a name of more than 80 characters, say.
        """
        from .file_format import save_table

        return save_table(self, Path(path))

    @property
    def quality(self) -> str:
        """How far predictions can be trusted, in words."""
        if self.error_band is not None:
            low, high = self.error_band
            return f"estimated, four nets in five within -{low:.0%} to +{high:.0%}"
        return "uncalibrated" if self.calibration is None else self.calibration.text

    @cached_property
    def dtype(self) -> str:
        """The number type that the table predicts: "float32" where it holds float entries, else that of the others."""
        found = {entry.key.dtype for entry in self.entries}
        return "float32" if "float32" in found else min(found, default="float32")

    @cached_property
    def by_key(self) -> Mapping[OpKey, Entry]:
        return {entry.key: entry for entry in self.entries}

    @cached_property
    def _families(self) -> Mapping[OpKey, list[OpKey]]:
        families: dict[OpKey, list[OpKey]] = {}
        for key in sorted(self.by_key, key=lambda k: (k.cin * k.cout, k.cin)):
            families.setdefault(key.family, []).append(key)
        return families

    def resolve(self, key: OpKey) -> OpKey | None:
        """The profiled key that answers for `key`: itself, or the next wider one of its alignment class."""
        if key in self.by_key:
            return key
        return next((wider for wider in self._families.get(key.family, ()) if self._covers(wider, key)), None)

    def _covers(self, wider: OpKey, key: OpKey) -> bool:
        aligned = self.alignment.aligned
        classes_agree = all(aligned(a) == aligned(b) for a, b in ((wider.cin, key.cin), (wider.cout, key.cout)))
        return wider.cin >= key.cin and wider.cout >= key.cout and classes_agree

    def lookup(self, key: OpKey) -> float:
        """Latency in ms of one operator.

        Raises:
            TableError: neither the key nor a wider one of the same alignment class was profiled.
        """
        found = self.resolve(key)
        if found is None:
            raise self.missing_error([key])
        if found != key:
            warnings.warn(f"no entry for '{key.text}': using the wider '{found.text}'", RoundedLatencyWarning,
                          stacklevel=2)  # fmt: skip
        return self.by_key[found].latency_ms

    def missing(self, keys: Iterable[OpKey]) -> list[OpKey]:
        """Those of `keys` that `lookup` would refuse, without repeats."""
        return [key for key in dict.fromkeys(keys) if self.resolve(key) is None]

    def missing_error(self, keys: Iterable[OpKey]) -> TableError:
        """The one-line error for keys that were not profiled."""
        keys = list(dict.fromkeys(keys))
        some = "; ".join(key.text for key in keys[:3])
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        return TableError(
            f"table {self.name!r} ({self.device}) has no entry for {some}{more}: "
            f"profile this model with 'diplugin profile plan MODEL' for that device"
        )

    def check_guides(self) -> None:
        """Refuse a table whose times mean nothing for a search.

        Raises:
            TableError: the table was timed on an emulator.
        """
        if self.emulated:
            raise TableError(f"table {self.name!r} was timed on an emulator, whose times mean nothing: expected one "
                             f"measured on the device; run its bundle there")  # fmt: skip

    def check_device(self, device: str) -> None:
        """Refuse a table of another device than the one named.

        Raises:
            TableError: the devices differ.
        """
        if device != self.device:
            raise TableError(f"expected a table of {device!r}, got {self.name!r} of {self.device!r}: profile this "
                             f"device with 'diplugin profile here'")  # fmt: skip
