"""The file of a latency table, schema version 1: strict in, canonical out.

A table decides what a network becomes, so nothing in its file is taken on trust: every field has a checked type and
range, unknown fields are refused, keys are unique, and a SHA-256 over the canonical content tells a flipped bit or a
hand edit. Reading never fails with anything but a one-line `TableError`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from importlib import resources
from pathlib import Path
from typing import Any

from .errors import TableError
from .tables import SCHEMA, Alignment, Calibration, Entry, LatencyTable, NetTiming, OpKey, Setting

FORMAT = "diplugin-latency-table"
KEY_COLUMNS = tuple(f.name for f in fields(OpKey))
ENTRY_COLUMNS = (*KEY_COLUMNS, "latency_ms", "cpu_ms", "wall_ms", "cv", "unstable")
# Added to schema 1 later, and written only where there is something to say: older tables keep their hashes.
WEIGHTS = "weights_mb"
NET_COLUMNS = tuple(name for name in NetTiming._fields if name != WEIGHTS)
OPS = ("conv", "conv_transpose", "linear")
MAX_BYTES, MAX_MS, MAX_MB, MAX_COUNT = 64 << 20, 3.6e6, 1e6, 1 << 24
_WORD = re.compile(r"[A-Za-z0-9_.+-]{0,40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def canonical(document: Any) -> bytes:
    """JSON with sorted keys and no spaces: the bytes that are hashed."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def content_sha256(document: Mapping[str, Any]) -> str:
    """SHA-256 of a document's canonical form without its own `sha256` field."""
    return hashlib.sha256(canonical({k: v for k, v in document.items() if k != "sha256"})).hexdigest()


def strict_json(text: str | bytes) -> Any:
    """Parse JSON and refuse what JSON readers usually let pass: NaN, infinities, repeated names, endless nesting.

    Raises:
        ValueError: with a one-line reason.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ValueError("a name occurs twice in one object")
        return dict(pairs)

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None


def shipped_folder() -> Any:
    """Where the package's own tables lie: package data, or beside the package in a checkout."""
    try:
        folder = resources.files("diplugin.latency_tables")
    except ModuleNotFoundError:
        folder = None
    return folder if folder is not None and folder.is_dir() else Path(__file__).parent.parent / "latency_tables"


def shipped_tables() -> tuple[str, ...]:
    """Names of the tables that come with the package."""
    names = (item.name for item in shipped_folder().iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in names if name.endswith(".json")))


def _locate(source: str | Path) -> Any:
    path = Path(source)
    if path.is_file():
        return path
    shipped = shipped_folder() / f"{source}.json"
    if re.fullmatch(r"[\w.-]+", str(source)) and shipped.is_file():
        return shipped
    names = ", ".join(shipped_tables()) or "none"
    raise TableError(f"expected a latency table's file or the name of a shipped one ({names}), got {str(source)!r}")


def load_table(source: str | Path) -> LatencyTable:
    """Read and check a table; see `LatencyTable.load`."""
    path = _locate(source)
    try:
        if isinstance(path, Path) and path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES >> 20} MB")
        document = strict_json(path.read_bytes())
        return table_from_document(document)
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise TableError(f"expected a diplugin latency table in {str(source)!r}, but {reason}: profile again or "
                         f"fetch the file again") from None  # fmt: skip


def save_table(table: LatencyTable, path: Path) -> Path:
    """Write a table so that a reader sees the old file or the whole new one."""
    text = dumps_table(table)
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def dumps_table(table: LatencyTable) -> str:
    """The file's text: one row a line, so that differences between tables can be read."""
    document = document_from_table(table)
    head = {name: value for name, value in document.items() if name not in ("rows", "nets")}
    lines = json.dumps(head, indent=1, ensure_ascii=True, allow_nan=False)[:-2]
    blocks = []
    for name in ("nets", "rows"):
        rows = ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in document[name])
        blocks.append(f' "{name}": [\n  {rows}\n ]' if rows else f' "{name}": []')
    return lines + ",\n" + ",\n".join(blocks) + "\n}\n"


def document_from_table(table: LatencyTable) -> dict[str, Any]:
    """The table as JSON types, with its content hash."""
    rows = [[*e.key.row, *(_round(v) for v in e[1:5]), e.unstable] for e in sorted(table.entries)]
    weighed = any(net.weights_mb for net in table.nets)
    net_columns = [*NET_COLUMNS, *([WEIGHTS] if weighed else [])]
    nets = [[_round(getattr(net, column)) for column in net_columns] for net in table.nets]
    document: dict[str, Any] = {
        "format": FORMAT, "schema": SCHEMA, "name": table.name, "device": table.device, "origin": table.origin,
        "emulated": table.emulated, "setting": asdict(table.setting), "alignment": asdict(table.alignment),
        "overhead_ms": _round(table.overhead_ms),
        "calibration": None if table.calibration is None
        else {k: _round(v) for k, v in asdict(table.calibration).items() if k not in _REFILL_CHECKS or v},
        "error_band": None if table.error_band is None else [_round(v) for v in table.error_band],
        "plan_sha256": table.plan_sha256, "provenance": dict(table.provenance),
        "columns": list(ENTRY_COLUMNS), "net_columns": net_columns,
    }  # fmt: skip
    document |= {"nets": nets, "rows": rows}
    return {**document, "sha256": content_sha256(document)}


def _round(value: Any) -> Any:
    return float(f"{value:.7g}") if isinstance(value, float) else value


# Checks: each takes a value and says what is wrong with it through ValueError.


def _number(low: float, high: float) -> Callable[[Any, str], float]:
    def check(value: Any, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} is no finite number")
        if not low <= value <= high:
            raise ValueError(f"{name} = {value:.6g} lies outside {low:g} to {high:g}")
        return float(value)

    return check


def _integer(low: int, high: int) -> Callable[[Any, str], int]:
    def check(value: Any, name: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name} is no integer from {low} to {high}")
        return value

    return check


def _text(limit: int) -> Callable[[Any, str], str]:
    def check(value: Any, name: str) -> str:
        if not isinstance(value, str) or len(value) > limit or not value.isprintable():
            raise ValueError(f"{name} is no printable text of at most {limit} characters")
        return value

    return check


def _boolean(value: Any, name: str) -> bool:
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


def _integers(low: int) -> Callable[[Any, str], tuple[int, ...]]:
    def check(value: Any, name: str) -> tuple[int, ...]:
        if not isinstance(value, list) or len(value) > 3:
            raise ValueError(f"{name} is no list of up to 3 integers")
        return tuple(_integer(low, MAX_COUNT)(item, name) for item in value)

    return check


_count, _ms, _positive_ms = _integer(1, MAX_COUNT), _number(0, MAX_MS), _number(1e-9, MAX_MS)
_COLUMN_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "op": _op, "cin": _count, "cout": _count, "kernel": _integers(1), "stride": _integers(1), "padding": _integers(0),
    "dilation": _integers(1), "groups": _count, "size": _integers(1), "activation": _word, "batch": _count,
    "dtype": _word, "layout": _word, "latency_ms": _positive_ms, "cpu_ms": _ms, "wall_ms": _ms,
    "cv": _number(0, 1e3), "unstable": _boolean, "name": _text(120), "measured_ms": _positive_ms, "sum_ms": _ms,
    WEIGHTS: _number(0, MAX_MB),
}  # fmt: skip
_SETTING_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "runtime": _word,
    "version": _word,
    "provider": _word,
    "graph_optimization": _word,
    "threads": _integer(1, 4096),
}
_CALIBRATION_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "scale": _number(1e-3, 1e3), "offset_ms": _number(-MAX_MS, MAX_MS), "nets": _integer(2, 100_000),
    "mape": _number(0, 1e3), "worst": _number(0, 1e3), "rho": _number(-1, 1),
}  # fmt: skip
_REFILL_CHECKS = {"refill_ms": _positive_ms, "cache_mb": _number(1e-3, MAX_MB)}
_ALIGNMENT_CHECKS = {"step": _integer(1, 4096), "plateau": _integer(1, 4096)}


def _object(value: Any, checks: Mapping[str, Callable[[Any, str], Any]], name: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(checks):
        raise ValueError(f"{name} does not hold exactly {', '.join(checks)}")
    return {key: check(value[key], f"{name}.{key}") for key, check in checks.items()}


def _rows(value: Any, columns: Sequence[str], name: str) -> list[list[Any]]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is no list")
    result = []
    for number, row in enumerate(value):
        if not isinstance(row, list) or len(row) != len(columns):
            raise ValueError(f"{name}[{number}] does not hold {len(columns)} values")
        result.append([_COLUMN_CHECKS[c](v, f"{name}[{number}].{c}") for c, v in zip(columns, row, strict=True)])
    return result


def table_from_document(document: Any) -> LatencyTable:
    """Check every field of a parsed file.

    Raises:
        ValueError: with a one-line reason.
    """
    expected = {
        "format", "schema", "name", "device", "origin", "emulated", "setting", "alignment", "overhead_ms",
        "calibration", "error_band", "plan_sha256", "provenance", "columns", "net_columns", "nets", "rows", "sha256",
    }  # fmt: skip
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError("it is another kind of file")
    schema = document.get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        newer = isinstance(schema, int) and schema > SCHEMA
        raise ValueError(f"its schema is {str(schema)[:20]} and this version reads {SCHEMA}"
                         + (" (update diplugin)" if newer else ""))  # fmt: skip
    if set(document) != expected:
        odd = sorted(set(document) ^ expected)
        raise ValueError(f"its fields are not those of schema {SCHEMA} (see {_text_or_repr(odd[0])})")
    net_columns = [list(NET_COLUMNS), [*NET_COLUMNS, WEIGHTS]]
    if document["columns"] != list(ENTRY_COLUMNS) or document["net_columns"] not in net_columns:
        raise ValueError("its columns are not those of schema 1")
    table = _table(document)
    if content_sha256(document) != document["sha256"]:
        raise ValueError("its content does not match its SHA-256: it was damaged or edited")
    return table


def _text_or_repr(value: Any) -> str:
    return ascii(value)[:60]


def _table(document: dict[str, Any]) -> LatencyTable:
    width = len(KEY_COLUMNS)
    rows = _rows(document["rows"], ENTRY_COLUMNS, "rows")
    entries = tuple(Entry(OpKey.from_row(row[:width]), *row[width:]) for row in rows)
    if not entries:
        raise ValueError("it has no rows")
    for number, entry in enumerate(entries):
        _check_key(entry.key, f"rows[{number}]")
    if len({entry.key for entry in entries}) != len(entries):
        raise ValueError("two rows have the same key")
    nets = tuple(NetTiming(*row) for row in _rows(document["nets"], document["net_columns"], "nets"))
    origin = document["origin"]
    if origin not in ("measured", "estimated"):
        raise ValueError("origin is neither 'measured' nor 'estimated'")
    calibration, band = document["calibration"], document["error_band"]
    if band is not None and (not isinstance(band, list) or len(band) != 2):
        raise ValueError("error_band is no pair")
    if (band is None) != (origin == "measured"):
        raise ValueError("an estimated table has an error_band and a measured one has none")
    sha = document["plan_sha256"]
    if not isinstance(sha, str) or (sha and not _SHA256.fullmatch(sha)):
        raise ValueError("plan_sha256 is no SHA-256")
    return LatencyTable(
        name=_text(80)(document["name"], "name"),
        device=_text(160)(document["device"], "device"),
        setting=Setting(**_object(document["setting"], _SETTING_CHECKS, "setting")),
        entries=entries, nets=nets,
        alignment=Alignment(**_object(document["alignment"], _ALIGNMENT_CHECKS, "alignment")),
        overhead_ms=_ms(document["overhead_ms"], "overhead_ms"),
        calibration=None if calibration is None else _calibration(calibration),
        origin=origin, emulated=_boolean(document["emulated"], "emulated"),
        error_band=None if band is None else (_number(0, 10)(band[0], "error_band"),
                                              _number(0, 10)(band[1], "error_band")),
        provenance=_provenance(document["provenance"]), plan_sha256=sha,
    )  # fmt: skip


def _calibration(value: Any) -> Calibration:
    """Refill and cache stand there both or not at all."""
    refilled = isinstance(value, dict) and not _REFILL_CHECKS.keys().isdisjoint(value)
    checks = {**_CALIBRATION_CHECKS, **(_REFILL_CHECKS if refilled else {})}
    return Calibration(**_object(value, checks, "calibration"))


def _check_key(key: OpKey, name: str) -> None:
    dimensions = {len(key.kernel), len(key.stride), len(key.padding), len(key.dilation)}
    if dimensions != ({0} if key.op == "linear" else {len(key.size)}):
        raise ValueError(f"{name}: kernel, stride, padding and dilation do not fit the size")
    if key.cin % key.groups or key.cout % key.groups:
        raise ValueError(f"{name}: {key.groups} groups do not divide {key.cin} and {key.cout} channels")
    if min(key.output_size, default=0) < 1:
        raise ValueError(f"{name}: the output is empty")


def _provenance(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > 100:
        raise ValueError("provenance is no object of at most 100 names")
    for name, item in value.items():
        _text(80)(name, "a name in provenance")
        if not (item is None or isinstance(item, bool | int | float)):
            _text(500)(item, f"provenance.{name}")
    return value
