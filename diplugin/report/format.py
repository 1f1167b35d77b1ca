"""Numbers for people: a cost in its own unit, a share as a percentage, a change with its sign.

A figure that was not taken is an en dash, never a zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

ABSENT = "–"
MINUS = "−"
_GAP = "\u00a0"  # keeps a number and its unit on one line


@dataclass(frozen=True)
class Quantity:
    """How one figure of `metrics.json` is called and written."""

    name: str
    unit: str = ""
    scaled: bool = False
    share: bool = False
    exponent: bool = False


QUANTITIES = {
    "accuracy": Quantity("Accuracy", share=True),
    "macs": Quantity("MACs", scaled=True),
    "params": Quantity("Parameters", scaled=True),
    "size_mb": Quantity("File size", "MB"),
    "latency_ms": Quantity("Latency", "ms"),
    "latency_ms_predicted": Quantity("Latency, predicted", "ms"),
    "latency_ms_measured": Quantity("Latency, measured", "ms"),
    "memory_mb": Quantity("Peak activation memory", "MB"),
    "onnx_max_abs_difference": Quantity("ONNX against torch, largest difference", exponent=True),
    "peak_memory_mb_measured": Quantity("Peak memory of the process", "MB"),
    "size_mb_predicted": Quantity("File size, predicted", "MB"),
    "size_mb_uniform8": Quantity("File size with 8 bits everywhere", "MB"),
    "mean_bits": Quantity("Bits per weight, mean", "bits"),
    "relative_difference": Quantity("ONNX against torch, relative difference", exponent=True),
    "bops": Quantity("Bit operations", scaled=True),
}
_SPELLED = {"macs": "MACs", "lr": "learning rate", "onnx": "ONNX", "onnxruntime": "ONNX Runtime", "mb": "MB",
            "di": "DI", "sha256": "SHA-256", "rho": "ρ"}  # fmt: skip
_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def quantity(key: str) -> Quantity:
    """The known quantity, or one that is named as its key says."""
    known = QUANTITIES.get(key)
    if known is not None:
        return known
    for ending, unit in (("_ms", "ms"), ("_mb", "MB"), ("_s", "s")):
        if key.endswith(ending):
            return Quantity(words(key.removesuffix(ending)), unit)
    return Quantity(words(key), scaled=True, share="accuracy" in key)


def words(key: str) -> str:
    """`latency_budget` as "Latency budget"."""
    text = " ".join(_SPELLED.get(word, word) for word in str(key).replace("_", " ").split())
    return text[:1].upper() + text[1:] if text[:1].isascii() else text  # ρ is no P


def value(key: str, number: float | None) -> str:
    """A figure with its unit.

    >>> value("macs", 40_551_424), value("latency_ms_measured", 0.4321), value("accuracy", 0.98223)
    ('40.6\xa0M', '0.432\xa0ms', '98.22\xa0%')
    """
    if number is None:
        return ABSENT
    kind = quantity(key)
    if kind.share:
        return f"{100 * number:.2f}{_GAP}%"
    if kind.exponent:
        return f"{number:.1e}"
    if kind.scaled:
        return scaled(number)
    return f"{significant(number)}{_GAP}{kind.unit}".strip().replace("-", MINUS, 1)


def scaled(number: float) -> str:
    """1,234,567 as 1.23 M; whole numbers below 10,000 as they are."""
    if abs(number) < 10_000:
        return f"{number:,.0f}" if float(number).is_integer() else significant(number)
    factor, letter = next((f, s) for f, s in _SCALES if abs(number) >= f * 0.9995)
    return f"{significant(number / factor)}{_GAP}{letter}"


def significant(number: float) -> str:
    """Three figures, at most four decimals, no exponent for sizes that occur."""
    size = abs(float(f"{number:.3g}"))  # 0.9996 is one of the ones
    if size >= 100 or number == 0:
        return f"{number:,.0f}"
    if size >= 10:
        return f"{number:.1f}"
    if size >= 1:
        return f"{number:.2f}"
    return f"{number:.3f}" if size >= 0.1 else f"{number:.2g}" if size < 0.001 else f"{number:.4f}"


def tick_labels(marks: Sequence[float]) -> list[str]:
    """Marks of one axis with as many decimals as their step needs."""
    step = min((abs(b - a) for a, b in pairwise(marks)), default=abs(marks[0]) if marks else 1.0) or 1.0
    decimals = next((d for d in range(9) if abs(round(step, d) - step) < 1e-6 * step), 9)
    return [f"{mark:,.{decimals}f}".replace("-", MINUS) for mark in marks]


def percent(share: float | None, digits: int = 1) -> str:
    """0.123 as "12.3 %"."""
    return ABSENT if share is None else f"{100 * share:.{digits}f}{_GAP}%".replace("-", MINUS)


def signed_percent(share: float | None, digits: int = 1) -> str:
    """0.05 as "+5.0 %", −0.05 as "−5.0 %"."""
    if share is None:
        return ABSENT
    text = f"{100 * share:+.{digits}f}"
    return ("±0" if float(text) == 0 else text.replace("-", MINUS)) + f"{_GAP}%"


def change(key: str, before: float | None, after: float | None) -> str:
    """What became of a figure: points for accuracies, a percentage for the rest.

    >>> change("accuracy", 0.95, 0.94), change("macs", 200.0, 100.0)
    ('−1.00\xa0points', '−50.0\xa0%')
    """
    if before is None or after is None:
        return ABSENT
    if quantity(key).share:
        text = f"{100 * (after - before):+.2f}"
        return ("±0" if float(text) == 0 else text.replace("-", MINUS)) + f"{_GAP}points"
    return ABSENT if before == 0 else signed_percent(after / before - 1)


def seconds(number: float | None) -> str:
    """A duration: 0.42 s, 12.3 s, 4 min 05 s, 2 h 10 min."""
    if number is None:
        return ABSENT
    if number < 99.95:
        return f"{number:.1f}{_GAP}s" if number >= 9.995 else f"{number:.2f}{_GAP}s"
    whole = round(number)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
