"""Tables: lookup by the rules, and which tables may guide a search."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tables import conv, table

from diplugin.errors import RoundedLatencyWarning, TableError
from diplugin.tables import Entry, OpKey


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
