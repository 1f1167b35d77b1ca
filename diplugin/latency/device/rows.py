"""The lines of a journal: a header, then one row a finished job, each with a checksum and checked when it is read."""

from __future__ import annotations

import zlib

from .documents import SCHEMA, canonical, parse

JOURNAL_FORMAT = "diplugin-journal"
ROW_FIELDS = (
    "attempts",
    "cpu_ms",
    "cv",
    "id",
    "n",
    "peak_mb",
    "ratio",
    "rounds",
    "runs",
    "sentinel_ms",
    "unstable",
    "wall_ms",
)


def sealed(row):
    """A row as a line of the journal, with a checksum that tells a flipped bit."""
    return canonical({**row, "crc": f"{zlib.crc32(canonical(row).encode()):08x}"}) + "\n"


def unsealed(line):
    """The row of a journal's line; ValueError if it is damaged."""
    row = parse(line)
    if not isinstance(row, dict):
        raise ValueError("it is no object")
    crc = row.pop("crc", None)
    if crc != f"{zlib.crc32(canonical(row).encode()):08x}":
        raise ValueError("its checksum is wrong")
    return row


def check_header(row, earlier):
    if row["format"] != JOURNAL_FORMAT:
        raise ValueError("it is of another format")
    if row.get("schema") != SCHEMA:
        raise ValueError(f"its schema is {str(row.get('schema'))[:20]} and this version reads {SCHEMA}")
    if not isinstance(row.get("provenance"), dict) or not isinstance(row.get("plan_sha256"), str):
        raise ValueError("its header is incomplete")
    if earlier is not None and earlier != row:
        raise ValueError("it is a second header")


def check_row(row):
    if tuple(sorted(row)) != ROW_FIELDS:
        raise ValueError("its fields are not those of a row")
    if not isinstance(row["id"], str) or type(row["unstable"]) is not bool:
        raise ValueError("its fields have wrong types")
    for name in ("attempts", "n", "rounds", "runs"):
        if type(row[name]) is not int or not 0 <= row[name] < 1 << 31:
            raise ValueError(f"{name} is no count")
    for name in ("cpu_ms", "cv", "peak_mb", "ratio", "sentinel_ms", "wall_ms"):
        if type(row[name]) not in (int, float) or not 0 <= row[name] < 3.6e6:
            raise ValueError(f"{name} is no plausible number")
