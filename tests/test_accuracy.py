"""Accuracy: every kind of labels by hand, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diplugin.accuracy import accuracy, check_fit
from diplugin.errors import DataError, ModelError

LOGITS = torch.tensor([[2.0, 1.0, -1.0], [0.0, 3.0, 1.0], [-1.0, 0.5, 0.0], [1.0, 1.5, 2.0]])


class Table(nn.Module):
    """Gives the rows of a table, asked by their numbers; dropout would ruin them in training mode."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows, self.drop = nn.Parameter(rows), nn.Dropout(0.99)

    def forward(self, ids: Tensor) -> Tensor:
        return self.drop(self.rows[ids])


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (torch.tensor([0, 1, 2, 2]), 3 / 4),
        (torch.eye(3)[torch.tensor([0, 1, 2, 2])], 3 / 4),
        (torch.tensor([[1, 1, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]]), 8 / 12),
        (torch.tensor([[1, 1, -1], [-1, 1, 0], [1, 1, 0], [0, -1, 1]]), 8 / 12),
    ],
    ids=["class ids", "one-hot", "multi-label", "multi-label, some unknown"],
)
def test_by_hand_whatever_the_batches(labels: Tensor, expected: float, size: int) -> None:
    """Also where some batches of multi-label data have one label an image, and look one-hot."""
    ids = torch.arange(4)
    model = Table(LOGITS).train()
    model.drop.eval()
    batches = list(zip(ids.split(size), labels.split(size), strict=True))
    assert accuracy(model, batches) == pytest.approx(expected)
    assert model.training and not model.drop.training


def test_other_forms_of_batches_and_outputs() -> None:
    batches = [{"image": torch.arange(4), "truth": torch.tensor([0, 1, 1, 2])}]

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return {"logits": model(batch["image"])}["logits"]

    assert accuracy(Table(LOGITS), batches, get_labels=lambda b: b["truth"], forward=forward) == 1.0


def test_what_cannot_be_judged() -> None:
    ids = torch.arange(4)
    with pytest.raises(DataError, match="an empty one"):
        accuracy(Table(LOGITS), [])
    with pytest.raises(DataError, match="ids from 0 to 2 for this model, got 0 to 3"):
        accuracy(Table(LOGITS), [(ids, ids)])
    with pytest.raises(DataError, match="integers"):
        check_fit(LOGITS, torch.ones(4))
    with pytest.raises(DataError, match="4 labels"):
        check_fit(LOGITS[:3], ids)
    with pytest.raises(DataError, match="shape"):
        check_fit(LOGITS, torch.ones(4, 2))
    with pytest.raises(ModelError, match="one tensor of logits, got dict"):
        check_fit({"logits": LOGITS}, ids)


@pytest.mark.parametrize("size", [1, 4])
def test_another_network_s_logits_are_judged_by_their_first_choice(size: int) -> None:
    """Signs agree where nobody is sure: of a thousand logits most are below zero in any network."""
    ids, teacher = torch.arange(4), LOGITS + torch.tensor([0.0, 0.0, 1.5])
    batches = list(zip(ids.split(size), teacher.split(size), strict=True))
    agreement = float((LOGITS.argmax(1) == teacher.argmax(1)).double().mean())
    assert accuracy(Table(LOGITS), batches) == agreement < 1
    assert accuracy(Table(LOGITS), [(ids, LOGITS)]) == 1.0
    column = torch.tensor([[2.0], [-0.3], [0.2], [-1.0]])
    assert accuracy(Table(column), [(ids, torch.tensor([[0.4], [-3.0], [-0.1], [-2.0]]))]) == 3 / 4


def test_soft_labels_are_judged_by_their_largest_share() -> None:
    """Whatever their sums round to: those of 0.1 seven times and 0.3 are not one in float32."""
    ids = torch.tensor([0, 1, 2, 2])
    for rest in (0.05, 0.1 / 3, 0.07):
        soft = torch.full((4, 3), rest).scatter(1, ids[:, None], 1 - 2 * rest)
        assert accuracy(Table(LOGITS), [(torch.arange(4), soft)]) == 3 / 4
    rounded = torch.full((4, 8), 0.1).scatter(1, ids[:, None], 0.3)
    wide = torch.cat([LOGITS, torch.full((4, 5), -9.0)], 1)
    assert bool((rounded.sum(1) != 1).any()) and accuracy(Table(wide), [(torch.arange(4), rounded)]) == 3 / 4


def test_targets_by_position_are_counted_by_position() -> None:
    """Maps [N, C, H, W] as their pixels in a row, each an image of its own."""
    maps, ids = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    one_hot = torch.eye(3)[ids].movedim(-1, 1)
    rows, targets = (t.movedim(1, -1).reshape(-1, 3) for t in (maps, one_hot))
    for labels, flat in ((one_hot, targets), (1 - one_hot, 1 - targets)):
        by_row = accuracy(nn.Identity(), [(rows, flat)])
        assert accuracy(nn.Identity(), list(zip(maps.split(1), labels.split(1), strict=True))) == pytest.approx(by_row)
        assert 0 < by_row < 1


def test_class_ids_of_images_are_not_judged_by_outputs_with_positions() -> None:
    """Compared with one another they would be broadcast, and right more often than asked."""
    with pytest.raises(DataError, match=r"logits \[N, classes\] for 6 labels, got \[6, 3, 1, 1\]"):
        accuracy(nn.Identity(), [(torch.randn(6, 3, 1, 1), torch.randint(3, (6,)))])


def test_one_column_of_targets_is_judged_by_signs_whatever_the_labels() -> None:
    """Where all labels are 1 they look one-hot, and the largest of one logit is always right."""
    logits = torch.tensor([[1.0], [-1.0], [2.0], [0.5]])
    assert accuracy(nn.Identity(), [(logits, torch.ones(4, 1))]) == 3 / 4
    assert accuracy(nn.Identity(), [(logits, torch.tensor([[1.0], [0.0], [0.0], [1.0]]))]) == 3 / 4


@pytest.mark.parametrize("labels", [torch.zeros(0).long(), torch.zeros(0, 3)], ids=["class ids", "targets"])
def test_batches_without_images_count_for_nothing(labels: Tensor) -> None:
    full = torch.arange(3) if labels.ndim == 1 else torch.eye(3)
    batches = [(torch.zeros(0, 3), labels), (torch.eye(3), full)]
    assert accuracy(nn.Identity(), batches) == 1.0
    with pytest.raises(DataError, match="an empty one"):
        accuracy(nn.Identity(), batches[:1])
