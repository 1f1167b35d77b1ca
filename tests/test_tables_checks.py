"""Fields of a table that cannot be: refused by the checks, whatever the file's hash says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_tables import refilled, table

from diplugin.errors import TableError
from diplugin.tables import LatencyTable
from diplugin.tables.file_format import content_sha256, document_from_table, table_from_document


def resealed(**changes: Any) -> dict[str, Any]:
    """A document with changed fields and a hash that fits: only the checks stand between it and a search."""
    document = {**document_from_table(table(8, 16)), **changes}
    document.pop("sha256", None)
    return {**document, "sha256": content_sha256(document)}


def row(**changes: Any) -> list[list[Any]]:
    document = document_from_table(table(8))
    values = dict(zip(document["columns"], document["rows"][0], strict=True)) | changes
    return [[values[name] for name in document["columns"]]]


BAD = {
    "another kind": {"format": "something"},
    "a newer schema": {"schema": 2},
    "an older schema": {"schema": 0},
    "a schema that is true": {"schema": True},
    "no rows": {"rows": []},
    "rows that are no list": {"rows": {}},
    "a negative time": {"rows": row(latency_ms=-1.0)},
    "a zero time": {"rows": row(latency_ms=0)},
    "a huge time": {"rows": row(latency_ms=1e300)},
    "a time that no float holds": {"rows": row(latency_ms=10**400)},
    "an overhead that no float holds": {"overhead_ms": 10**400},
    "a band that no float holds": {"origin": "estimated", "error_band": [10**400, 1]},
    "a time that is a word": {"rows": row(latency_ms="1.0")},
    "a time that is true": {"rows": row(latency_ms=True)},
    "a fractional width": {"rows": row(cin=8.5)},
    "a huge width": {"rows": row(cin=10**12)},
    "a width of zero": {"rows": row(cout=0)},
    "groups that do not divide": {"rows": row(groups=3)},
    "an operator of another kind": {"rows": row(op="attention")},
    "a hostile activation": {"rows": row(activation="<script>alert(1)</script>")},
    "an endless activation": {"rows": row(activation="a" * 1000)},
    "dimensions that do not fit": {"rows": row(size=[8])},
    "too many dimensions": {"rows": row(kernel=[1] * 9)},
    "an empty output": {"rows": row(size=[1, 1], padding=[0, 0])},
    "two equal keys": {"rows": row() * 2},
    "a short row": {"rows": [row()[0][:-1]]},
    "other columns": {"columns": ["op"]},
    "no threads": {
        "setting": {"runtime": "x", "version": "1", "provider": "p", "graph_optimization": "all", "threads": 0}
    },
    "an unknown setting": {"setting": {"runtime": "x"}},
    "a control character in the name": {"name": "bell\x07"},
    "a name that is no text": {"name": 7},
    "an endless name": {"name": "n" * 10_000},
    "a line break in the device": {"device": "one\ntwo"},
    "an unknown origin": {"origin": "guessed"},
    "an estimate without a band": {"origin": "estimated"},
    "a band without an estimate": {"error_band": [0.1, 0.1]},
    "an emulated flag that is a word": {"emulated": "no"},
    "an alignment of zero": {"alignment": {"step": 0, "plateau": 8}},
    "a calibration of one net": {
        "calibration": {"scale": 1, "offset_ms": 0, "nets": 1, "mape": 0, "worst": 0, "rho": 1}
    },
    "a calibration that shrinks to nothing": {
        "calibration": {"scale": 0, "offset_ms": 0, "nets": 12, "mape": 0, "worst": 0, "rho": 1}
    },
    "provenance that nests": {"provenance": {"a": {"b": 1}}},
    "provenance without end": {"provenance": {str(i): 1 for i in range(1000)}},
    "a hash that is none": {"plan_sha256": "zz"},
    "a net without a time": {"nets": [["n", 0.0, 1.0, 1.0, 1.0, 0.0]]},
}


@pytest.mark.parametrize("name", BAD)
def test_a_field_that_cannot_be_is_refused_though_the_hash_fits(name: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(resealed(**BAD[name])))
    with pytest.raises(TableError) as error:
        LatencyTable.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value) and len(str(error.value)) < 600


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValueError, match="surprise"):
        table_from_document(resealed(surprise=1))


def test_the_same_content_is_accepted() -> None:
    assert table_from_document(resealed()).name == "bench"


@pytest.mark.parametrize(
    "change",
    [
        {"refill_ms": 0}, {"refill_ms": -0.1}, {"refill_ms": "0.2"}, {"refill_ms": True}, {"refill_ms": 1e9},
        {"cache_mb": 0}, {"cache_mb": -2.0}, {"cache_mb": None}, {"cache_mb": 1e9}, {"refill": 0.2},
    ],
)  # fmt: skip
def test_a_refill_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    calibration = document_from_table(refilled())["calibration"]
    with pytest.raises(ValueError, match="calibration") as error:
        table_from_document(resealed(calibration={**calibration, **change}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["refill_ms", "cache_mb"])
def test_a_refill_without_a_cache_is_refused(name: str) -> None:
    calibration = document_from_table(refilled())["calibration"]
    del calibration[name]
    with pytest.raises(ValueError, match=r"exactly.*refill_ms, cache_mb"):
        table_from_document(resealed(calibration=calibration))


@pytest.mark.parametrize("weights", [-1.0, "11", None, True, 1e9])
def test_weights_that_cannot_be_are_refused(weights: Any) -> None:
    document = document_from_table(refilled())
    nets = [[*document["nets"][0][:-1], weights]]
    with pytest.raises(ValueError, match="weights_mb"):
        table_from_document(resealed(net_columns=document["net_columns"], nets=nets))


@pytest.mark.parametrize("columns", [[], ["name"], ["weights_mb"], "name", {}, None])
def test_other_net_columns_are_refused(columns: Any) -> None:
    with pytest.raises(ValueError, match="columns"):
        table_from_document(resealed(net_columns=columns))
