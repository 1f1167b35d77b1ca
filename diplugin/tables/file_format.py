"""The file of a latency table, schema version 1: strict in, canonical out.

A table decides what a network becomes, so nothing in its file is taken on trust: every field has a checked type and
range, unknown fields are refused, keys are unique, and a SHA-256 over the canonical content tells a flipped bit or a
hand edit. Reading never fails with anything but a one-line `TableError`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import TableError
from ..whole_files import write_text
from . import checks
from .keys import OpKey
from .table import SCHEMA, Alignment, Entry, LatencyTable, NetTiming, Setting

FORMAT = "diplugin-latency-table"
KEY_COLUMNS = tuple(f.name for f in fields(OpKey))
ENTRY_COLUMNS = (*KEY_COLUMNS, "latency_ms", "cpu_ms", "wall_ms", "cv", "unstable")
# Added to schema 1 later, and written only where there is something to say: older tables keep their hashes.
WEIGHTS = "weights_mb"
NET_COLUMNS = tuple(name for name in NetTiming._fields if name != WEIGHTS)
MAX_BYTES = 64 << 20
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
    if os.path.isfile(source):  # no name is too long for it, as for a path's own
        return Path(source)
    shipped = shipped_tables()
    if str(source) in shipped:
        return shipped_folder() / f"{source}.json"
    names = ", ".join(shipped) or "none"
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
    """Write a table so that a reader sees the old file or the whole new one.

    Raises:
        TableError: it holds something that `load_table` would refuse, such as a name of two lines.
    """
    try:
        text = dumps_table(table)
        table_from_document(strict_json(text.encode()))
    except (ValueError, TypeError) as error:
        raise TableError(f"expected a table that can be read again, but {error}") from None
    write_text(path, text)
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
        else {k: _round(v) for k, v in asdict(table.calibration).items() if k not in checks.REFILL or v},
        "error_band": None if table.error_band is None else [_round(v) for v in table.error_band],
        "plan_sha256": table.plan_sha256, "provenance": dict(table.provenance),
        "columns": list(ENTRY_COLUMNS), "net_columns": net_columns,
    }  # fmt: skip
    document |= {"nets": nets, "rows": rows}
    return {**document, "sha256": content_sha256(document)}


def _round(value: Any) -> Any:
    return float(f"{value:.7g}") if isinstance(value, float) else value


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
    rows = checks.exact_rows(document["rows"], ENTRY_COLUMNS, "rows")
    entries = tuple(Entry(OpKey.from_row(row[:width]), *row[width:]) for row in rows)
    if not entries:
        raise ValueError("it has no rows")
    for number, entry in enumerate(entries):
        checks.check_key(entry.key, f"rows[{number}]")
    if len({entry.key for entry in entries}) != len(entries):
        raise ValueError("two rows have the same key")
    nets = tuple(NetTiming(*row) for row in checks.exact_rows(document["nets"], document["net_columns"], "nets"))
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
        name=checks.table_name(document["name"], "name"),
        device=checks.device_words(document["device"], "device"),
        setting=Setting(**checks.exact_object(document["setting"], checks.SETTING, "setting")),
        entries=entries, nets=nets,
        alignment=Alignment(**checks.exact_object(document["alignment"], checks.ALIGNMENT, "alignment")),
        overhead_ms=checks.ms(document["overhead_ms"], "overhead_ms"),
        calibration=None if calibration is None else checks.calibration(calibration),
        origin=origin, emulated=checks.boolean(document["emulated"], "emulated"),
        error_band=None if band is None else (checks.number(0, 10)(band[0], "error_band"),
                                              checks.number(0, 10)(band[1], "error_band")),
        provenance=checks.provenance(document["provenance"]), plan_sha256=sha,
    )  # fmt: skip
