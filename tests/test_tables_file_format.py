"""Files of tables: written so that they load equal, and read right or not at all."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tables import refilled, table

from diplugin.errors import TableError
from diplugin.tables import LatencyTable
from diplugin.tables.file_format import (
    document_from_table,
    dumps_table,
    shipped_folder,
    shipped_tables,
    strict_json,
    table_from_document,
)


def test_a_saved_table_loads_equal(tmp_path: Path) -> None:
    one = table(8, 16)
    path = one.save(tmp_path / "deep" / "t.json")
    other = LatencyTable.load(path)
    assert document_from_table(other) == document_from_table(one)
    assert other.calibration == one.calibration and other.provenance == one.provenance
    assert [p.name for p in path.parent.iterdir()] == ["t.json"]


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "n" * 81},
        {"name": "two\nlines"},
        {"device": "d" * 161},
        {"overhead_ms": math.nan},
        {"provenance": {"load": math.inf}},
        {"provenance": {"journal": Path("j")}},
        {"provenance": {"cores": [0, 1]}},
    ],
    ids=str,
)
def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path, changes: dict[str, Any]) -> None:
    before = table(8).save(tmp_path / "t.json").read_bytes()
    with pytest.raises(TableError, match="can be read again") as error:
        table(8, **changes).save(tmp_path / "t.json")
    assert "\n" not in str(error.value) and (tmp_path / "t.json").read_bytes() == before


def test_refill_and_weights_are_written_only_where_there_are_some(tmp_path: Path) -> None:
    one, older = refilled(), table(8)
    loaded = LatencyTable.load(one.save(tmp_path / "t.json"))
    assert loaded == one and loaded.nets[0].weights_mb == 11.5
    document = document_from_table(older)
    assert list(document["calibration"]) == ["scale", "offset_ms", "nets", "mape", "worst", "rho"]
    assert document["net_columns"] == ["name", "measured_ms", "sum_ms", "cpu_ms", "wall_ms", "cv"]
    again = table_from_document(document)
    assert again.calibration is not None and (again.calibration.refill_ms, again.calibration.cache_mb) == (0.0, 0.0)
    assert [net.weights_mb for net in again.nets] == [0.0]


@pytest.mark.parametrize("name", shipped_tables())
def test_a_shipped_table_is_written_again_byte_for_byte(name: str) -> None:
    assert dumps_table(LatencyTable.load(name)) == (shipped_folder() / f"{name}.json").read_text()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"a": NaN}',
        b'{"a": 1, "a": 2}',
        b"9" * 10_000,
        b'{"a": Infinity}',
    ],
)
def test_what_is_no_table_at_all_is_one_line(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(text)
    with pytest.raises(TableError) as error:
        LatencyTable.load(path)
    assert "\n" not in str(error.value)


def test_a_name_that_is_nowhere(tmp_path: Path) -> None:
    for source in ("no-such-table", tmp_path, "../no/such.json", "", "x" * 300, "a\0b"):
        with pytest.raises(TableError, match="shipped"):
            LatencyTable.load(source)


def mutations(text: bytes, seed: int) -> bytes:
    """One random accident: cut, flipped bit, swapped or doubled lines, a strange number or word."""
    draw = random.Random(seed)
    lines = text.splitlines(keepends=True)
    kind = seed % 6
    if kind == 0:
        return text[: draw.randrange(len(text))]
    if kind == 1:
        at = draw.randrange(len(text))
        return text[:at] + bytes([text[at] ^ (1 << draw.randrange(8))]) + text[at + 1 :]
    i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
    if kind == 2:
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == 3:
        lines.insert(i, lines[j])
    else:
        strange = [b"1e999", b"-1", b"NaN", b'"\\ud800"', b"9" * 400, b"null", b"[]", b'"; rm -rf /"', b"0", b"1e-320"]
        parts = lines[i].split(b",")
        parts[draw.randrange(len(parts))] = draw.choice(strange)
        lines[i] = b",".join(parts)
    return b"".join(lines)


@pytest.mark.parametrize("seed", range(120))
def test_a_mutated_table_loads_equal_or_fails_in_one_line(seed: int, tmp_path: Path) -> None:
    original = table(8, 16)
    path = tmp_path / "t.json"
    path.write_bytes(mutations(dumps_table(original).encode(), seed))
    try:
        loaded = LatencyTable.load(path)
    except TableError as error:
        assert "\n" not in str(error)
    else:
        assert document_from_table(loaded) == document_from_table(original)


@settings(max_examples=60)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_strict_json_agrees_with_json_where_it_accepts(value: Any) -> None:
    text = json.dumps(value)
    try:
        parsed = strict_json(text)
    except ValueError:
        return
    assert parsed == json.loads(text)
