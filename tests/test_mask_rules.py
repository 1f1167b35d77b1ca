"""Rules for masks: exact counts, bounds that hold, and nothing emptied; against plain sorting and brute force."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diplugin.errors import UserError
from diplugin.mask_rules import MaskRule, choose_masks, count_of, keep_lowest_out, share_out

RATIOS = st.floats(0, 1, allow_nan=False)
SCORES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20).map(torch.tensor)


@given(st.integers(1, 400), st.data())
@settings(deadline=None)
def test_a_ratio_made_from_a_count_gives_the_count_back(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total))
    assert count_of(total, count / total) == count


@given(SCORES, RATIOS)
@settings(deadline=None)
def test_the_lowest_leave_and_one_stays(scores: torch.Tensor, ratio: float) -> None:
    count = count_of(len(scores), ratio)
    mask = keep_lowest_out(scores, count)
    assert int((mask == 0).sum()) == min(count, len(scores) - 1)
    if 0 < mask.sum() < len(scores):
        assert scores[mask == 0].max() <= scores[mask == 1].min()


def test_equal_scores_give_equal_masks_and_blocks_lose_equally() -> None:
    scores = torch.zeros(12)
    assert torch.equal(keep_lowest_out(scores, 5), keep_lowest_out(scores.clone(), 5))
    assert keep_lowest_out(torch.rand(12), 6, blocks=3).view(3, 4).sum(1).tolist() == [2, 2, 2]
    with pytest.raises(UserError, match="5 blocks"):
        keep_lowest_out(scores, 5, blocks=5)


@given(st.lists(SCORES, min_size=1, max_size=4), st.floats(0, 0.95), st.data())
@settings(deadline=None)
def test_a_shared_budget_is_met_and_bounds_hold(metrics: list[torch.Tensor], ratio: float, data: st.DataObject) -> None:
    grains = [data.draw(st.integers(1, 9)) for _ in metrics]
    highest = [data.draw(st.floats(0, 1)) for _ in metrics]
    masks = share_out(metrics, grains, ratio, [0.0] * len(metrics), highest)
    total = sum(len(m) * g for m, g in zip(metrics, grains, strict=True))
    gone = [int((mask == 0).sum()) for mask in masks]
    removed = sum(k * g for k, g in zip(gone, grains, strict=True))
    assert removed <= count_of(total, ratio)
    limits = [min(count_of(len(m), h), len(m) - 1) for m, h in zip(metrics, highest, strict=True)]
    assert all(k <= limit for k, limit in zip(gone, limits, strict=True))
    room = [g for g, k, limit in zip(grains, gone, limits, strict=True) if k < limit]
    assert not room or count_of(total, ratio) - removed < max(room)


def test_a_shared_budget_of_equal_grains_loses_the_least_score_of_all_choices() -> None:
    metrics = [torch.rand(4), torch.rand(5)]
    masks = share_out(metrics, [1, 1], 0.5, [0, 0], [1, 1])
    scores = torch.cat(metrics)
    lost = float(scores[torch.cat(masks) == 0].sum())
    every = (torch.tensor(choice, dtype=torch.bool) for choice in product([False, True], repeat=9))
    allowed = (c for c in every if c.sum() == 4 and not c[:4].all())
    assert lost == pytest.approx(min(float(scores[c].sum()) for c in allowed))


def test_partners_share_one_mask_from_the_mean_of_their_scores() -> None:
    metrics = {"a": torch.tensor([0.0, 3.0, 2.0, 9.0]), "b": torch.tensor([[5.0], [0.0], [1.0], [9.0]])}
    rule = MaskRule(ratio=0.5, shared_mask="sum")
    masks = choose_masks({"a": rule, "b": rule}, metrics)
    assert masks["a"].tolist() == masks["b"].flatten().tolist() == [1, 0, 0, 1]
    assert masks["b"].shape == (4, 1)


def test_bounds_hold_for_ratios_and_thresholds() -> None:
    metric = torch.arange(10.0)
    rules = {
        "high": MaskRule(ratio=0.9, highest=0.4),
        "low": MaskRule(ratio=0.1, lowest=0.3),
        "all below": MaskRule(threshold=100.0, highest=0.5),
        "none below": MaskRule(threshold=-1.0, lowest=0.2),
        "everything": MaskRule(ratio=1.0),
    }
    masks = choose_masks(rules, dict.fromkeys(rules, metric))
    gone = {name: int((mask == 0).sum()) for name, mask in masks.items()}
    assert gone == {"high": 4, "low": 3, "all below": 5, "none below": 2, "everything": 9}


def test_a_global_group_leaves_every_tensor_a_tenth() -> None:
    rule = MaskRule(ratio=0.5, shared_budget=0, elements=20)
    masks = choose_masks({"weak": rule, "strong": rule}, {"weak": torch.zeros(20), "strong": torch.ones(20)})
    assert [int(masks[name].sum()) for name in ("weak", "strong")] == [2, 18]


@pytest.mark.parametrize("field", ["shared_mask", "shared_budget"])
def test_partners_with_different_ratios_are_refused(field: str) -> None:
    rules = {"a": MaskRule(ratio=0.5, **{field: "g"}), "b": MaskRule(ratio=0.4, **{field: "g"})}
    with pytest.raises(UserError, match=r"one sparse_ratio in .* group 'g', got \[0.4, 0.5\]"):
        choose_masks(rules, {"a": torch.rand(4), "b": torch.rand(4)})


def test_partners_of_different_widths_are_refused() -> None:
    rule = MaskRule(ratio=0.5, shared_mask="g")
    with pytest.raises(UserError, match=r"one width in dependency group 'g', got \[4, 5\]"):
        choose_masks({"a": rule, "b": rule}, {"a": torch.rand(4), "b": torch.rand(5)})


@given(st.lists(st.tuples(RATIOS, RATIOS), min_size=2, max_size=3), RATIOS)
def test_one_mask_keeps_the_bounds_of_all_its_partners(bounds: list[tuple[float, float]], ratio: float) -> None:
    rules = {str(i): MaskRule(ratio, lowest=min(b), highest=max(b), shared_mask="g") for i, b in enumerate(bounds)}
    least, most = max(min(b) for b in bounds), min(max(b) for b in bounds)
    for mask in choose_masks(rules, {k: torch.rand(20) for k in rules}).values():
        assert int((mask == 0).sum()) == min(19, count_of(20, min(most, max(least, ratio))))


def test_a_partner_without_a_ratio_shares_its_partners_mask_or_budget() -> None:
    metrics = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([5.0, 0.0, 9.0, 9.0])}
    for order in (("a", "b"), ("b", "a")):
        given = {"a": MaskRule(ratio=0.5, shared_mask="g"), "b": MaskRule(shared_mask="g")}
        masks = choose_masks({k: given[k] for k in order}, metrics)
        assert masks["a"].tolist() == masks["b"].tolist() == [0, 0, 1, 1]
        given = {"a": MaskRule(0.5, shared_budget=0, elements=4), "b": MaskRule(shared_budget=0, elements=4)}
        masks = choose_masks({k: given[k] for k in order}, metrics)
        assert (masks["a"].tolist(), masks["b"].tolist()) == ([0, 0, 0, 1], [1, 0, 1, 1])


@pytest.mark.parametrize("other", [MaskRule(threshold=0.2, shared_mask="g"), MaskRule(ratio=0.5, shared_mask="g")])
def test_partners_of_one_mask_with_a_ratio_here_and_a_threshold_there_are_refused(other: MaskRule) -> None:
    rules = {"a": MaskRule(threshold=0.1, shared_mask="g"), "b": other}
    with pytest.raises(UserError, match="in dependency group 'g'"):
        choose_masks(rules, {"a": torch.rand(4), "b": torch.rand(4)})
