"""Losses handed out along another order, and the floor that a threshold spares."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from diplugin.ranking import BY_ENERGY_AND_NORMS, ByAll, ByBoth, ByEnergy, ByLoss, hand_out, lift_best

numbers = st.lists(st.floats(0.0, 10.0, allow_subnormal=False), min_size=2, max_size=12)


@given(numbers, st.integers(0, 10**6))
def test_handing_out_permutes_the_losses_into_the_order_of_the_values(losses: list[float], seed: int) -> None:
    given_losses = torch.tensor(losses, dtype=torch.float64)
    values = torch.randperm(len(losses), generator=torch.Generator().manual_seed(seed)).double()
    given_out = hand_out(given_losses, values)
    torch.testing.assert_close(given_out.sort().values, given_losses.sort().values)
    assert (given_out[values.argsort()].diff() >= 0).all()


def test_units_keep_together() -> None:
    losses, values = torch.tensor([3.0, 1.0, 30.0, 10.0]), torch.tensor([0.0, 5.0, 0.1, 5.0])
    assert hand_out(losses, values, blocks=2).tolist() == [1.0, 3.0, 10.0, 30.0]
    assert lift_best(losses, 1, 100.0, blocks=2).tolist() == [103.0, 1.0, 130.0, 10.0]


def test_rankings() -> None:
    losses, energies = torch.tensor([1.0, 4.0, 2.0]).double(), torch.tensor([9.0, 1.0, 2.0]).double()
    assert ByLoss()(losses, energies).tolist() == losses.tolist()
    assert ByEnergy()(losses, energies).tolist() == energies.tolist()
    assert ByBoth()(losses, energies).argsort().tolist() == [1, 2, 0]
    assert ByBoth(0.0)(losses, energies).argsort().tolist() == losses.argsort().tolist()
    for ranking in (ByEnergy(), ByBoth()):
        assert ranking(losses, None) is losses


def test_two_ranks_count_alike_and_scales_do_not() -> None:
    losses, energies = torch.tensor([1.0, 4.0, 2.0, 3.0]).double(), torch.tensor([1.0, 4.0, 2.0, 3.0]).double()
    norms = torch.tensor([300.0, 200.0, 0.1, 100.0]).double()
    expected = [0 + 3, 3 + 2, 1 + 0, 2 + 1]  # places of the losses and energies, which agree, and of the norms
    for scale in (1.0, 1e-9):
        assert ByAll()(losses, energies * scale, norms * scale).tolist() == expected
    assert ByAll()(losses, energies, None).tolist() == ByBoth()(losses, energies).tolist()


def test_norms_may_count_more_and_others_be_heard_beside_them() -> None:
    losses, energies = torch.tensor([1.0, 4.0, 2.0, 3.0]).double(), torch.tensor([9.0, 1.0, 2.0, 3.0]).double()
    norms = torch.tensor([300.0, 200.0, 0.1, 100.0]).double()
    assert ByAll(ByLoss(), weight=2.0)(losses, energies, norms).tolist() == [0 + 6, 3 + 4, 1 + 0, 2 + 2]
    assert BY_ENERGY_AND_NORMS(losses, energies, norms).tolist() == [3 + 3, 0 + 2, 1 + 0, 2 + 1]


def test_a_floor_of_nothing_changes_nothing() -> None:
    scores = torch.tensor([1.0, 2.0])
    assert lift_best(scores, 0, 5.0).tolist() == [1.0, 2.0]
    assert lift_best(scores, 2, 5.0).tolist() == [6.0, 7.0]
