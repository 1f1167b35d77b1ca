"""The bit allocation: its JSON, and its search against all allocations of a tiny network."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from diplugin.errors import InfeasibleBudget, PlanError
from diplugin.quantize import read_bits
from diplugin.quantize.allocation import BitAllocation, Choice, Limit, least_damage
from diplugin.quantize.costs import BitOperations, FileSize, LayerShape
from diplugin.quantize.layouts import JoinedWeights

WIDTHS = (0, 2, 4, 8)
SHAPES = {"a": LayerShape(3, 4, 100.0), "b": LayerShape(2, 6, 30.0)}
CHOICE = Choice({"a": WIDTHS, "b": WIDTHS}, {"a": 3, "b": 2})


def falling_tables(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        name: generator.exponential(1.0, (shape.channels, 1)) * np.array([1.0, 0.15, 0.01, 0.0])
        for name, shape in SHAPES.items()
    }


def every_allocation():
    for flat in itertools.product(WIDTHS, repeat=5):
        bits = {"a": np.array(flat[:3]), "b": np.array(flat[3:])}
        if bits["a"].any() and bits["b"].any():
            yield bits


def damage(tables, bits):
    return sum(tables[n][i, WIDTHS.index(b)] for n, row in bits.items() for i, b in enumerate(row))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cost", [FileSize(SHAPES, lambda bits: 0.0), BitOperations(SHAPES)], ids=["size", "bops"])
def test_search_against_every_allocation(seed, cost):
    tables = falling_tables(seed)
    everything = [(cost.total(bits), damage(tables, bits)) for bits in every_allocation()]
    dearest = max(c for c, _ in everything)
    gaps = []
    for share in (0.3, 0.45, 0.6, 0.8):
        limit = share * dearest
        found = least_damage(tables, CHOICE, [Limit(cost, limit)])
        best = min(d for c, d in everything if c <= limit)
        spent = cost.total(found)
        assert spent <= limit
        # What was found may leave budget unspent, but a channel's one step is all that it can be away by.
        gaps.append(damage(tables, found) - best)
        assert gaps[-1] <= max(t.max() for t in tables.values()) * 0.15 + 1e-12
    assert min(gaps) <= 1e-12


@pytest.mark.parametrize("unit", [1e-30, 1e-16, 1e14, 1e30])
def test_the_unit_of_damages_does_not_matter(unit):
    cost, tables = BitOperations(SHAPES), falling_tables(3)
    for share in (0.4, 0.7, 1.0):
        limits = [Limit(cost, share * (100.0 * 3 * 8 * 8 + 30.0 * 2 * 8 * 8))]
        expected = least_damage(tables, CHOICE, limits)
        found = least_damage({name: unit * table for name, table in tables.items()}, CHOICE, limits)
        assert damage(tables, found) == pytest.approx(damage(tables, expected))


def test_no_budget_is_refused_that_some_bits_meet():
    """Nodes of a width cost bytes: the smallest file has few bits in one layer, and few widths in the other."""
    shapes = {"a": LayerShape(3, 400, 1.0), "b": LayerShape(2, 1, 1.0)}
    size = FileSize(shapes, JoinedWeights().overhead)
    smallest = min(size.total(bits) for bits in every_allocation())
    assert size.total(least_damage(falling_tables(0), CHOICE, [Limit(size, smallest)])) == smallest
    with pytest.raises(InfeasibleBudget):
        least_damage(falling_tables(0), CHOICE, [Limit(size, 0.999 * smallest)])


def test_everything_fits_a_generous_budget():
    found = least_damage(falling_tables(0), CHOICE, [Limit(BitOperations(SHAPES), 1e12)])
    assert all((bits == 8).all() for bits in found.values())


def test_two_budgets_hold_together():
    size, operations = FileSize(SHAPES, lambda bits: 0.0), BitOperations(SHAPES)
    full = {"a": np.full(3, 8), "b": np.full(2, 8)}
    limits = [Limit(size, 0.7 * size.total(full)), Limit(operations, 0.4 * operations.total(full))]
    found = least_damage(falling_tables(1), CHOICE, limits)
    assert all(limit.holds(found) for limit in limits)


def test_noise_never_makes_more_bits_look_worse():
    tables = {"a": np.array([[1.0, -0.2, 0.3, 0.0]] * 3), "b": np.array([[1.0, 0.1, 0.0, 0.0]] * 2)}
    found = least_damage(tables, CHOICE, [Limit(BitOperations(SHAPES), 100.0 * 3 * 4 * 8 + 30 * 2 * 8 * 8)])
    assert all((bits > 0).all() for bits in found.values())


def test_an_unreachable_budget_names_the_smallest_cost():
    size = FileSize(SHAPES, lambda bits: 0.0, fixed=1.0)
    with pytest.raises(InfeasibleBudget, match="smallest reachable is 1"):
        least_damage(falling_tables(0), CHOICE, [Limit(size, 0.5)])


def test_no_layer_is_silenced_altogether():
    size = FileSize(SHAPES, lambda bits: 0.0)
    lowest = CHOICE.lowest()
    found = least_damage(falling_tables(0), CHOICE, [Limit(size, size.total(lowest))])
    assert all(bits.any() for bits in found.values())


def test_a_width_that_costs_more_than_it_saves_is_given_up():
    def overhead(bits):
        return 1000.0 * len(set(bits.tolist()))

    size = FileSize(SHAPES, overhead)
    full = {"a": np.full(3, 8), "b": np.full(2, 8)}
    found = least_damage(falling_tables(2), CHOICE, [Limit(size, size.total(full) + 1e-9)])
    assert all(len(set(bits.tolist())) == 1 for bits in found.values())


def test_json_round_trip(tmp_path):
    allocation = BitAllocation({"conv": (8, 0, 2, 4), "fc": (8, 8)})
    allocation.save(tmp_path / "bits.json")
    assert BitAllocation.load(tmp_path / "bits.json") == allocation
    assert allocation.counts() == {0: 1, 2: 1, 4: 1, 8: 3}
    assert allocation.mean_bits({"conv": 10, "fc": 0}) == 3.5


@pytest.mark.parametrize(
    "data", [None, [], {}, {"version": 2, "bits": {}}, {"version": 1, "bits": {"a": [3]}},
             {"version": 1, "bits": {"a": []}}, {"version": 1, "bits": {"a": ["x"]}}, {"version": 1, "bits": [1]},
             {"version": 1, "bits": {}}, {"version": 1, "bits": {"a": [float("inf")]}},
             {"version": 1, "bits": {"a": [4.9]}}, {"version": 1, "bits": {"a": "84"}}]
)  # fmt: skip
def test_damaged_json_is_refused(data):
    with pytest.raises(PlanError):
        BitAllocation.from_json(data)


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"version": 1, "bits": {"a": [1e999]}}'])
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "bits.json").write_text(text)
    for read in (lambda: BitAllocation.load(tmp_path / "bits.json"), lambda: read_bits(tmp_path)):
        with pytest.raises(PlanError, match="expected"):
            read()


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(PlanError, match="expected a bit allocation at"):
        BitAllocation.load(tmp_path / "none.json")
