"""Tables: lookup by the rules, and files that load right or not at all."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diplugin.errors import RoundedLatencyWarning, TableError
from diplugin.table_format import (
    content_sha256,
    document_from_table,
    dumps_table,
    shipped_folder,
    shipped_tables,
    strict_json,
    table_from_document,
)
from diplugin.tables import Alignment, Calibration, Entry, LatencyTable, NetTiming, OpKey, Setting

SETTING = Setting("onnxruntime", "1.32.0", "CPUExecutionProvider", "all", 1)


def conv(cin: int, cout: int, **changes: Any) -> OpKey:
    return replace(OpKey("conv", cin, cout, (3, 3), (1, 1), (1, 1), (1, 1), 1, (8, 8), "relu"), **changes)


def table(*widths: int, **changes: Any) -> LatencyTable:
    """Entries for the product of the widths, each cin * cout microseconds."""
    entries = tuple(
        Entry(conv(i, o), i * o * 1e-3, i * o * 1.1e-3, i * o * 1.2e-3, 0.01) for i in widths for o in widths
    )
    nets = (NetTiming("unpruned", 2.0, 1.9, 2.0, 2.1, 0.004),)
    built = LatencyTable(
        "bench",
        "a device",
        SETTING,
        entries,
        nets,
        Alignment(4, 8),
        0.005,
        Calibration(1.02, 0.1, 12, 0.011, 0.03, 0.99),
        provenance={"governor": "performance", "cpus": 4},
    )
    return replace(built, **changes)


def test_exact_hit() -> None:
    assert table(8, 16).lookup(conv(8, 16)) == pytest.approx(0.128)


def test_a_missing_width_rounds_up_within_its_alignment_class_and_says_so() -> None:
    with pytest.warns(RoundedLatencyWarning, match=r"8>12"):
        assert table(8, 16).lookup(conv(8, 12)) == pytest.approx(0.128)


def test_the_nearest_wider_entry_is_taken() -> None:
    with pytest.warns(RoundedLatencyWarning):
        assert table(8, 16, 32, 64).lookup(conv(20, 24)) == pytest.approx(32 * 32 * 1e-3)


@pytest.mark.parametrize("key", [conv(8, 13), conv(64, 64), conv(8, 8, size=(16, 16)), conv(8, 8, activation="")])
def test_what_no_entry_answers_for_is_an_error_that_names_it(key: OpKey) -> None:
    with pytest.raises(TableError, match="profile plan") as error:
        table(8, 16).lookup(key)
    assert key.text in str(error.value) and "\n" not in str(error.value)


def test_unaligned_widths_answer_only_for_unaligned_ones() -> None:
    odd = table(13, 16)
    assert odd.resolve(conv(13, 16)) == conv(13, 16)
    assert odd.resolve(conv(12, 16)) == conv(16, 16)
    assert odd.resolve(conv(11, 16)) == conv(13, 16)


@given(cin=st.integers(1, 64), cout=st.integers(1, 64))
def test_a_lookup_never_answers_with_a_narrower_entry(cin: int, cout: int) -> None:
    found = table(8, 16, 40, 64).resolve(conv(cin, cout))
    aligned = cin % 4 == 0 and cout % 4 == 0
    assert (found is not None) == aligned
    assert found is None or (found.cin >= cin and found.cout >= cout)


def test_missing_error_counts_the_rest() -> None:
    keys = [conv(1, n) for n in range(1, 8)]
    assert "and 4 more" in str(table(8).missing_error(keys))
    assert table(8).missing([conv(8, 8), conv(1, 1), conv(1, 1)]) == [conv(1, 1)]


def test_depthwise_families_round_up_too() -> None:
    keys = [conv(c, c, groups=c) for c in (8, 16)]
    rows = tuple(Entry(key, key.cin * 1e-3, 1.0, 1.0, 0.0) for key in keys)
    assert table(8, entries=rows).resolve(conv(12, 12, groups=12)) == keys[1]


def test_an_emulated_table_guides_nothing() -> None:
    table(8).check_guides()
    with pytest.raises(TableError, match="emulator"):
        table(8, emulated=True).check_guides()


def test_a_table_of_another_device_is_refused() -> None:
    table(8).check_device("a device")
    with pytest.raises(TableError, match="another"):
        table(8).check_device("another device")


@pytest.mark.parametrize(
    ("key", "size"),
    [
        (conv(4, 4, stride=(2, 2)), (4, 4)),
        (conv(4, 4, kernel=(5, 5), padding=(0, 0)), (4, 4)),
        (conv(4, 4, op="conv_transpose", stride=(2, 2), kernel=(2, 2), padding=(0, 0)), (16, 16)),
        (OpKey("linear", 4, 4), (1,)),
    ],
)
def test_output_size(key: OpKey, size: tuple[int, ...]) -> None:
    assert key.output_size == size


@pytest.mark.parametrize("changes", [{"name": "n" * 81}, {"name": "two\nlines"}, {"device": "d" * 161}])
def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path, changes: dict[str, Any]) -> None:
    before = table(8).save(tmp_path / "t.json").read_bytes()
    with pytest.raises(TableError, match="can be read again") as error:
        table(8, **changes).save(tmp_path / "t.json")
    assert "\n" not in str(error.value) and (tmp_path / "t.json").read_bytes() == before


def test_a_saved_table_loads_equal(tmp_path: Path) -> None:
    one = table(8, 16)
    path = one.save(tmp_path / "deep" / "t.json")
    other = LatencyTable.load(path)
    assert document_from_table(other) == document_from_table(one)
    assert other.calibration == one.calibration and other.provenance == one.provenance
    assert [p.name for p in path.parent.iterdir()] == ["t.json"]


def refilled() -> LatencyTable:
    calibration = Calibration(1.02, 0.1, 12, 0.011, 0.03, 0.99, refill_ms=0.2, cache_mb=2.097152)
    return table(8, nets=(NetTiming("unpruned", 2.0, 1.9, 2.0, 2.1, 0.004, 11.5),), calibration=calibration)


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


@pytest.mark.parametrize(
    ("key", "layer"),
    [
        (conv(12, 8), nn.Conv2d(12, 8, 3, bias=False)),
        (conv(12, 12, groups=12), nn.Conv2d(12, 12, 3, groups=12, bias=False)),
        (conv(12, 8, groups=4), nn.Conv2d(12, 8, 3, groups=4, bias=False)),
        (conv(12, 8, op="conv_transpose", groups=2), nn.ConvTranspose2d(12, 8, 3, groups=2, bias=False)),
        (conv(12, 8, kernel=(1, 5)), nn.Conv2d(12, 8, (1, 5), bias=False)),
        (OpKey("linear", 12, 8, size=(7,)), nn.Linear(12, 8, bias=False)),
    ],
)
def test_weight_bytes_are_those_of_torchs_layer(key: OpKey, layer: nn.Module) -> None:
    floats = sum(p.numel() * p.element_size() for p in layer.parameters())
    assert key.weight_bytes == floats and replace(key, dtype="int8").weight_bytes == floats // 4


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
