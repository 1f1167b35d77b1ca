"""The page: a `Run` becomes words and pictures, and a template lays them out.

The template only places; every figure is put into words here, next to the sentence that qualifies it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import curves, rows
from .format import ABSENT, change, percent, quantity, scaled, seconds, signed_percent, value, words
from .run import BudgetResult, Run
from .svg import DARK, LIGHT, Drawing, drawing_style, variables

_TILES = ("accuracy", "macs", "params", "size_mb", "latency_ms_measured")
_ROWS = ("accuracy", "macs", "params", "size_mb", "memory_mb", "bops", "latency_ms_predicted", "latency_ms_measured")
_STAGE_WORDS = {"base": "Unpruned", "pruned": "Pruned", "recovered": "Recovered", "quantized": "Quantized"}
_DEEP = 4


@dataclass(frozen=True)
class Tile:
    """One figure before and after; `share` is what is left of it, for the small bar."""

    name: str
    after: str
    before: str
    change: str
    share: float | None


@dataclass(frozen=True)
class Pill:
    """A label and what it means; `tone` is "good", "plain" or "warn"."""

    text: str
    tone: str
    meaning: str


def render(run: Run) -> str:
    """The whole page as HTML.

    Template values are escaped by jinja2; drawings escape their own text.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(loader=PackageLoader("diplugin", "report"), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    style, _, _ = environment.loader.get_source(environment, "page.css")  # type: ignore[union-attr]

    def drawn(drawing: Drawing | None) -> Markup | None:
        return None if drawing is None else Markup(drawing.inline())

    pictures = {f.__name__: drawn(f(run)) for f in PICTURES}
    colours = Markup(
        f":root {{ color-scheme: light dark; {variables(LIGHT)} }} "
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }} "
        f"@media print {{ :root {{ color-scheme: light; }} }} {drawing_style()}"
    )
    return environment.get_template("page.html.jinja").render(
        style=Markup(style), colours=colours, pictures=pictures, **_content(run)
    )


PICTURES = (
    rows.structure, rows.channel_scores, rows.stage_seconds, rows.bit_map,
    curves.search_path, curves.calibration, curves.journey, curves.validation,
)  # fmt: skip


def _content(run: Run) -> dict[str, Any]:
    return {
        "title": title(run),
        "headline": headline(run),
        "tiles": tiles(run),
        "budgets": [_budget_row(b) for b in run.budgets],
        "stages": [_STAGE_WORDS[s.name] for s in run.stages],
        "rows": stage_rows(run),
        "agreement": agreement(run),
        "steps": steps_table(run),
        "measured_on": run.measured_on,
        "eight_bits": run.table is not None and run.table.get("dtype") == "int8",
        "groups": {"kept": len(run.plan.kept), "left_alone": _left_alone(run)},
        "scores": run.scores,
        "found_by": run.plan.found_by,
        "table": table_lines(run),
        "pill": latency_pill(run),
        "calibrated_on": len(curves.calibration_points(run.table)),
        "total_seconds": seconds(sum(run.seconds.values())) if run.seconds else None,
        "validation": validation_lines(run),
        "sections": [(name, lines) for name, lines in _record(run) if lines],
    }


def title(run: Run) -> str:
    """The model's name, and the data's where the run recorded one."""
    model = run.config.get("model")
    name = str(model) if isinstance(model, str) and model else run.folder.resolve().name
    data = run.config.get("data")
    return f"{name} on {data}" if isinstance(data, str) and data else name


def headline(run: Run) -> str:
    """One sentence: what is left of the costs, and what it took in accuracy."""
    costs = []
    for key, name in (
        ("macs", "multiply-accumulates"),
        ("params", "parameters"),
        ("latency_ms_measured", "measured latency"),
        ("latency_ms_predicted", "predicted latency"),
    ):
        before, after = run.base.get(key), run.last(key)
        if before and after is not None and len(costs) < 3:
            costs.append(f"{percent(after / before, 0)} of the {name}")
    if not costs:
        return "The run recorded no costs before and after."
    before, after = run.base.get("accuracy"), run.last("accuracy")
    left = ", ".join(costs[:-1]) + (" and " if len(costs) > 1 else "") + costs[-1]
    if before is None or after is None:
        judged = ""
    elif round(before, 4) == round(after, 4):
        judged = f" Accuracy stayed at {percent(after, 2)}."
    else:
        judged = (
            f" Accuracy went from {percent(before, 2)} to {percent(after, 2)} ({change('accuracy', before, after)})."
        )
    return f"The {_STAGE_WORDS[run.final.name].lower()} network keeps {left}.{judged}"


def tiles(run: Run) -> list[Tile]:
    """The figures at the top of the page; measured latency gives way to the predicted one where it is missing."""
    made = []
    for key in _TILES:
        if key.startswith("latency") and run.last(key, quantized=False) is None:
            key = "latency_ms_predicted"
        before, after = run.base.get(key), run.last(key)
        basis = {"latency_ms_measured": ", measured", "latency_ms_predicted": ", predicted"}.get(key, "")
        if after is None:
            after, basis = run.last(key, quantized=False), f"{basis} before quantization"
        if after is None:
            continue
        name = "Latency" if key.startswith("latency") else quantity(key).name
        share = after if quantity(key).share else after / before if before else None
        made.append(Tile(name, value(key, after), value(key, before), f"{change(key, before, after)}{basis}",
                         None if share is None else min(1.0, max(0.0, share))))  # fmt: skip
    return made


def stage_rows(run: Run) -> list[dict[str, Any]]:
    """A row a figure: one cell a stage, and the change from the first to the last stage that has it."""
    extra = dict.fromkeys(k for s in run.stages for k in s.figures if k not in _ROWS)
    table = []
    for key in (*_ROWS, *extra):
        cells = [value(key, s.get(key)) for s in run.stages]
        if all(c == ABSENT for c in cells) and key not in _ROWS[:4]:
            continue
        table.append({"name": quantity(key).name, "cells": cells,
                     "change": change(key, run.base.get(key), run.last(key)) if key in _ROWS else ABSENT})  # fmt: skip
    return table


def steps_table(run: Run) -> dict[str, Any] | None:
    """The steps of a gradual strategy: a row each, a column for every cost that a budget or the headline names."""
    named = [n for n in ("macs", *(b.cost for b in run.budgets)) if any(n in s.shares for s in run.steps)]
    costs = list(dict.fromkeys(named))
    rows = [
        {"number": s.number, "shares": [percent(s.shares[n]) if n in s.shares else ABSENT for n in costs],
         "repair": s.repair, "cut": percent(s.cut, 2), "taught": ABSENT if s.taught is None else percent(s.taught, 2)}
        for s in run.steps
    ]  # fmt: skip
    return {"costs": [quantity(n).name for n in costs], "rows": rows} if rows else None


def agreement(run: Run) -> list[dict[str, str]]:
    """Predicted and measured latency side by side, for every stage that has both."""
    lines = []
    for stage in run.stages:
        predicted, measured = stage.get("latency_ms_predicted"), stage.get("latency_ms_measured")
        if predicted is not None and measured:
            lines.append({"stage": _STAGE_WORDS[stage.name], "predicted": value("latency_ms", predicted),
                         "measured": value("latency_ms", measured),
                         "difference": signed_percent(predicted / measured - 1)})  # fmt: skip
    return lines


def _budget_row(budget: BudgetResult) -> dict[str, Any]:
    decided = budget.measured if budget.measured is not None else budget.predicted
    return {
        "name": quantity(budget.cost).name,
        "asked": value(budget.cost, budget.asked),
        "predicted": value(budget.cost, budget.predicted),
        "measured": value(budget.cost, budget.measured),
        "difference": signed_percent(budget.predicted / budget.measured - 1)
        if budget.predicted is not None and budget.measured else ABSENT,
        "verdict": {True: "met", False: "missed", None: "not judged"}[budget.met],
        "basis": "as measured" if budget.measured is not None else "as predicted",
        "use": None if decided is None or not budget.asked else min(1.25, decided / budget.asked) / 1.25,
        "of": ABSENT if decided is None or not budget.asked else percent(decided / budget.asked),
    }  # fmt: skip


def latency_pill(run: Run) -> Pill | None:
    """How far the table's predictions can be trusted."""
    table = run.table
    if table is None:
        return None
    if table.get("emulated"):
        return Pill("emulated", "warn", "Timed on an emulator: these times mean nothing for the device.")
    if table.get("origin") == "estimated":
        return Pill("estimated", "warn", "From a model of the device fitted to whole networks; no layer was timed.")
    calibration = table.get("calibration")
    if not isinstance(calibration, Mapping):
        return Pill("uncalibrated", "warn", "Plain sums of layer times, never compared with a whole network.")
    parts = [f"worst {percent(calibration['worst'])}" if _is_number(calibration.get("worst")) else "",
             f"{calibration['nets']} networks" if _is_number(calibration.get("nets")) else ""]  # fmt: skip
    error = percent(calibration["mape"]) if _is_number(calibration.get("mape")) else ABSENT
    detail = ", ".join(p for p in parts if p)
    return Pill("calibrated", "good", f"Held-out error {error}{f' ({detail})' if detail else ''}.")


def _is_number(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool)


def table_lines(run: Run) -> list[tuple[str, str]]:
    """What the latency table says of itself."""
    if run.table is None:
        return []
    table = dict(run.table)
    fit = table.pop("calibration", None)
    band = table.pop("error_band", None)
    lines = flat({k: v for k, v in table.items() if k not in ("nets", "emulated") and v not in (None, {}, [])})
    if isinstance(fit, Mapping):
        lines += [(name, form(fit[key])) for key, name, form in _CALIBRATION
                  if _is_number(fit.get(key)) and fit[key]]  # fmt: skip
    if isinstance(band, (list, tuple)) and len(band) == 2 and all(map(_is_number, band)):
        lines.append(("Error band", f"{signed_percent(band[0], 0)} to {signed_percent(band[1], 0)}"))
    return lines


_CALIBRATION: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("nets", "Networks timed end to end", lambda n: f"{n:g}"),
    ("mape", "Held-out error", percent),
    ("worst", "Worst held-out error", percent),
    ("rho", "Rank correlation", lambda r: f"{r:.3f}"),
    ("scale", "Scale on the sum of layers", lambda s: f"{s:.3f}"),
    ("offset_ms", "Offset", lambda ms: value("latency_ms", ms)),
    ("refill_ms", "More, where weights outgrow the cache", lambda ms: value("latency_ms", ms)),
    ("cache_mb", "The cache", lambda mb: value("size_mb", mb)),
)


def _left_alone(run: Run) -> list[tuple[str, str]]:
    notes = run.scores.left_alone if run.scores is not None else {}
    return [(name, note) for name, note in notes.items() if "output of the model" not in note]


def validation_lines(run: Run) -> list[dict[str, str]]:
    """The cross-check with scikit-learn, a line a layer."""
    lines = []
    for layer in curves.validated_layers(run):
        worst, rising = layer.get("worst_difference"), layer.get("non_decreasing")
        lines.append({
            "layer": str(layer.get("layer", ABSENT)),
            "worst": f"{worst:.0e}" if isinstance(worst, (int, float)) else ABSENT,
            "rising": {True: "yes", False: "no"}.get(rising, ABSENT) if isinstance(rising, bool) else ABSENT,
        })  # fmt: skip
    return lines


def _record(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    config = {k: v for k, v in run.config.items() if k not in ("versions", "seed")}
    packages = [(str(name), _plain(item)) for name, item in run.versions.items()]  # names as packages spell them
    seed = [] if run.seed is None else [("Seed", _plain(run.seed))]
    return [("Asked for", flat(config)), ("Data", flat(run.data) if run.data else []), ("Versions", packages + seed)]


def flat(section: Any, prefix: str = "", depth: int = 0) -> list[tuple[str, str]]:
    """Nested settings as (name, value) lines."""
    if not isinstance(section, Mapping):
        return [(words(prefix) if prefix else "", _plain(section))]
    lines: list[tuple[str, str]] = []
    for key, item in section.items():
        name = f"{prefix} · {key}" if prefix else str(key)
        if isinstance(item, Mapping) and item and depth < _DEEP:
            lines += flat(item, name, depth + 1)
        else:
            lines.append((words(name), _plain(item)))
    return lines


def _plain(item: Any) -> str:
    if item is None or item == {} or item == []:
        return ABSENT
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, float):
        return f"{item:.6g}"
    if isinstance(item, int) and abs(item) >= 10_000:
        return scaled(item)
    if isinstance(item, (list, tuple)):
        return ", ".join(_plain(i) for i in item)
    return str(item)
