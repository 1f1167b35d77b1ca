"""What a smaller network is trained towards, by the kind of its labels: against the formulas by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diplugin.recovery import Distillation, label_loss, teacher_loss, train
from diplugin.recovery.losses import output_kind


def test_label_loss_by_the_kind_of_labels() -> None:
    logits, ids = torch.randn(6, 4), torch.arange(6) % 4
    assert label_loss(logits, ids) == F.cross_entropy(logits, ids)
    assert label_loss(logits, ids.int()) == F.cross_entropy(logits, ids), "ids of any whole kind"
    multi = (torch.rand(6, 4) > 0.5).long()
    assert label_loss(logits, multi) == F.binary_cross_entropy_with_logits(logits, multi.float())
    real = torch.randn(6, 4).double()
    torch.testing.assert_close(label_loss(logits, real), F.mse_loss(logits, real.float()))
    shares = torch.rand(6, 4)
    assert label_loss(logits, shares) == F.mse_loss(logits, shares), "shares that do not sum to one"
    assert label_loss(logits[:, :1], torch.full((6, 1), 0.9999)) > 0, "a column of its own is no choice"


def test_soft_labels_are_probabilities_of_one_label() -> None:
    """Rows summing to one up to rounding; smoothing takes its share of them for all labels alike."""
    logits, soft = torch.randn(6, 4), torch.randn(6, 4, dtype=torch.float64).softmax(1)
    by_hand = -(soft * logits.double().log_softmax(1)).sum(1).mean()
    for labels in (soft, soft.float(), soft.half()):
        torch.testing.assert_close(label_loss(logits, labels).double(), by_hand, rtol=2e-3, atol=0)
    smoothed = -((0.8 * soft + 0.05) * logits.double().log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(label_loss(logits, soft, smoothing=0.2).double(), smoothed)


def test_teacher_loss_is_the_divergence_by_hand() -> None:
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    expected = (p * (p.log() - q.log())).sum(1).mean() * 9
    torch.testing.assert_close(teacher_loss(student, teacher, 3.0), expected)
    assert float(teacher_loss(teacher, teacher)) == pytest.approx(0.0, abs=1e-12)


def test_every_kind_of_output_has_a_teacher_of_its_kind() -> None:
    """Labels that are there or not and real values are judged one by one, so a shift of all of them is a difference."""
    logits, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    p, q = (teacher / 3).sigmoid(), (logits / 3).sigmoid()
    divergences = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    for labels, expected in (
        ((torch.rand(5, 3) > 0.5).long(), divergences.mean() * 9),
        (torch.randn(5, 3), (logits - teacher).square().mean()),
        (torch.arange(5) % 3, teacher_loss(logits, teacher, 3.0)),
        (torch.randn(5, 3).softmax(1), teacher_loss(logits, teacher, 3.0)),
    ):
        kind = output_kind(logits, labels)
        torch.testing.assert_close(kind.teacher_loss(logits, teacher, 3.0), expected)
        assert float(kind.teacher_loss(teacher, teacher, 3.0)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("labels", [torch.tensor([[0.0], [1.0]]).repeat(16, 1), torch.linspace(-1, 1, 32)[:, None]])
def test_a_single_output_follows_its_teacher(labels: Tensor) -> None:
    """Its softmax is one whatever it says."""
    x, teacher, student = torch.randn(32, 4), nn.Linear(4, 1), nn.Linear(4, 1)
    before = (student(x) - teacher(x)).norm()
    train(student, [(x, labels)], Distillation(epochs=60, lr=0.2, teacher_weight=1.0, weight_decay=0), teacher=teacher)
    assert (student(x) - teacher(x)).norm() < 0.3 * before
