"""Checks of a latency table's fields: each is given a value and its name and raises a one-line ValueError.

Nothing is converted on the way but lists to tuples and integers to floats: a field of the wrong type is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .keys import OpKey
from .table import Calibration

#: value, name -> the value.
Check = Callable[[Any, str], Any]
OPS = ("conv", "conv_transpose", "linear")
MAX_MS, MAX_MB, MAX_COUNT = 3.6e6, 1e6, 1 << 24
_WORD = re.compile(r"[A-Za-z0-9_.+-]{0,40}")


def number(low: float, high: float) -> Callable[[Any, str], float]:
    """A number from low to high."""

    def check(value: Any, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"{name} is no number from {low:g} to {high:g}")
        return float(value)

    return check


def integer(low: int, high: int) -> Callable[[Any, str], int]:
    """An integer from low to high; true and false are none."""

    def check(value: Any, name: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name} is no integer from {low} to {high}")
        return value

    return check


def text(limit: int) -> Callable[[Any, str], str]:
    """Printable text of at most `limit` characters."""

    def check(value: Any, name: str) -> str:
        if not isinstance(value, str) or len(value) > limit or not value.isprintable():
            raise ValueError(f"{name} is no printable text of at most {limit} characters")
        return value

    return check


#: What a table may be called, and its device.
table_name, device_words = text(80), text(160)


def boolean(value: Any, name: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is neither true nor false")
    return value


def _word(value: Any, name: str) -> str:
    if not isinstance(value, str) or not _WORD.fullmatch(value):
        raise ValueError(f"{name} is no short name")
    return value


def _op(value: Any, name: str) -> str:
    if value not in OPS:
        raise ValueError(f"{name} is none of {', '.join(OPS)}")
    return value


def integers(low: int) -> Callable[[Any, str], tuple[int, ...]]:
    """Up to three integers: one for each direction of a map."""

    def check(value: Any, name: str) -> tuple[int, ...]:
        if not isinstance(value, list) or len(value) > 3:
            raise ValueError(f"{name} is no list of up to 3 integers")
        return tuple(integer(low, MAX_COUNT)(item, name) for item in value)

    return check


_count, ms, _positive_ms = integer(1, MAX_COUNT), number(0, MAX_MS), number(1e-9, MAX_MS)
COLUMNS: dict[str, Check] = {
    "op": _op, "cin": _count, "cout": _count, "kernel": integers(1), "stride": integers(1), "padding": integers(0),
    "dilation": integers(1), "groups": _count, "size": integers(1), "activation": _word, "batch": _count,
    "dtype": _word, "layout": _word, "latency_ms": _positive_ms, "cpu_ms": ms, "wall_ms": ms,
    "cv": number(0, 1e3), "unstable": boolean, "name": text(120), "measured_ms": _positive_ms, "sum_ms": ms,
    "weights_mb": number(0, MAX_MB),
}  # fmt: skip
SETTING: dict[str, Check] = {
    "runtime": _word,
    "version": _word,
    "provider": _word,
    "graph_optimization": _word,
    "threads": integer(1, 4096),
}
CALIBRATION: dict[str, Check] = {
    "scale": number(1e-3, 1e3), "offset_ms": number(-MAX_MS, MAX_MS), "nets": integer(2, 100_000),
    "mape": number(0, 1e3), "worst": number(0, 1e3), "rho": number(-1, 1),
}  # fmt: skip
REFILL = {"refill_ms": _positive_ms, "cache_mb": number(1e-3, MAX_MB)}
ALIGNMENT = {"step": integer(1, 4096), "plateau": integer(1, 4096)}


def exact_object(value: Any, checks: Mapping[str, Check], name: str) -> dict[str, Any]:
    """An object with these very names, each of which passes its check."""
    if not isinstance(value, dict) or set(value) != set(checks):
        raise ValueError(f"{name} does not hold exactly {', '.join(checks)}")
    return {key: check(value[key], f"{name}.{key}") for key, check in checks.items()}


def exact_rows(value: Any, columns: Sequence[str], name: str) -> list[list[Any]]:
    """A list of rows with a value for each of these columns, see `COLUMNS`."""
    if not isinstance(value, list):
        raise ValueError(f"{name} is no list")
    result = []
    for place, row in enumerate(value):
        if not isinstance(row, list) or len(row) != len(columns):
            raise ValueError(f"{name}[{place}] does not hold {len(columns)} values")
        result.append([COLUMNS[c](v, f"{name}[{place}].{c}") for c, v in zip(columns, row, strict=True)])
    return result


def calibration(value: Any) -> Calibration:
    """A calibration, in which refill and cache stand both or not at all."""
    refilled = isinstance(value, dict) and not REFILL.keys().isdisjoint(value)
    checks = {**CALIBRATION, **(REFILL if refilled else {})}
    return Calibration(**exact_object(value, checks, "calibration"))


def check_key(key: OpKey, name: str) -> None:
    """The fields of an operator's key fit one another."""
    dimensions = {len(key.kernel), len(key.stride), len(key.padding), len(key.dilation)}
    if dimensions != ({0} if key.op == "linear" else {len(key.size)}):
        raise ValueError(f"{name}: kernel, stride, padding and dilation do not fit the size")
    if key.cin % key.groups or key.cout % key.groups:
        raise ValueError(f"{name}: {key.groups} groups do not divide {key.cin} and {key.cout} channels")
    if min(key.output_size, default=0) < 1:
        raise ValueError(f"{name}: the output is empty")


def provenance(value: Any) -> dict[str, Any]:
    """Short names with plain values: text, numbers, true, false or null."""
    if not isinstance(value, dict) or len(value) > 100:
        raise ValueError("provenance is no object of at most 100 names")
    for name, item in value.items():
        text(80)(name, "a name in provenance")
        if not (item is None or isinstance(item, bool | int | float)):
            text(500)(item, f"provenance.{name}")
    return value
