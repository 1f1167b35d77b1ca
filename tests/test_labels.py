"""Label readers for what is not a class id."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diplugin_torch_pruning import PLAIN, DIImportance
from torch import Tensor, nn

from diplugin.discriminant import channel_scores
from diplugin.errors import DataError
from diplugin.features import Observation, score_points
from diplugin.labels import PooledLabels, PresentClasses, TeacherOutputs, picked
from diplugin.taps import TapPoint


def test_pooled_labels_are_shares_by_cell() -> None:
    maps = torch.randint(0, 3, (5, 8, 8))
    maps[:, 0, :2] = 255
    got = PooledLabels(3, cells=2)((None, maps)).view(5, 3, 2, 2)
    for c in range(3):
        torch.testing.assert_close(got[:, c, 1, 0], (maps[:, 4:, :4] == c).float().mean((1, 2)))
        torch.testing.assert_close(got[:, c, 0, 0], (maps[:, :4, :4] == c).float().mean((1, 2)))


def test_segmentation_net_is_scored_by_pooled_labels() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 1))
    x, maps = torch.randn(20, 3, 8, 8), torch.randint(0, 3, (20, 8, 8))
    reader = PooledLabels(3, cells=2)
    importance = DIImportance(get_labels=reader, **PLAIN).fit(net, [(x, maps)])
    with torch.no_grad():
        want = channel_scores(F.relu(net[0](x)), reader((x, maps)))
    torch.testing.assert_close(importance.fitted.points[TapPoint("2", "in")].scores.float(), want.float())
    with pytest.raises(DataError, match=r"\[20, 8, 8\]"):
        DIImportance().fit(net, [(x, maps)])


def test_pooled_labels_refuse_other_maps() -> None:
    for maps in (torch.zeros(4, dtype=torch.long), torch.zeros(4, 2, 2), torch.full((4, 2, 2), 9)):
        with pytest.raises(DataError, match="expected class ids"):
            PooledLabels(3)((None, maps))


def test_present_classes() -> None:
    targets = [{"labels": torch.tensor([1, 2, 2])}, {"labels": torch.tensor([], dtype=torch.long)}]
    assert PresentClasses(4)((None, targets)).tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]
    with pytest.raises(DataError, match="below 2"):
        PresentClasses(2)((None, targets))
    with pytest.raises(DataError, match="'labels'"):
        PresentClasses(2)((None, [{}]))
    with pytest.raises(DataError, match=r"from 0 to 3 .* got -1"):
        PresentClasses(4)((None, [{"labels": torch.tensor([2, -1])}]))


def test_detection_batches_are_taken_as_they_come() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    images = list(torch.randn(9, 3, 8, 8))
    batch = (images, [{"labels": torch.tensor([i % 3])} for i in range(9)])
    seen = Observation(PresentClasses(3), lambda model, batch: model(torch.stack(batch[0])))
    assert score_points(net, [batch, batch], [TapPoint("2", "in")], seen)[TapPoint("2", "in")].images == 18


def test_teacher_outputs_need_no_labels() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).train()
    x = torch.randn(30, 3, 8, 8)
    reader = TeacherOutputs(net, forward=lambda model, batch: model(batch[0]))
    importance = DIImportance(get_labels=reader, forward=reader.forward, **PLAIN).fit(net, [(x,)])
    assert net.training
    with torch.no_grad():
        want = channel_scores(net[:4](x), net(x))
    torch.testing.assert_close(importance.fitted.points[TapPoint("4", "in")].scores.float(), want.float(), rtol=1e-4,
                               atol=1e-8)  # fmt: skip


def test_large_teacher_outputs_are_pooled() -> None:
    def two(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        return {"maps": torch.ones(5, 7, 40, 40), "logits": torch.zeros(5, 3)}

    assert TeacherOutputs(nn.Identity(), two)(torch.zeros(5, 1)).shape == (5, 10)
    with pytest.raises(DataError, match="returns tensors"):
        TeacherOutputs(nn.Identity(), lambda *_: "no")(torch.zeros(5, 1))


def test_teachers_of_one_value_an_image_and_a_loss() -> None:
    def two(model: nn.Module, batch: Tensor) -> tuple[Tensor, ...]:
        return torch.tensor(0.7), torch.arange(5.0)

    assert TeacherOutputs(nn.Identity(), two)(torch.zeros(5, 1)).tolist() == [[0], [1], [2], [3], [4]]
    with pytest.raises(DataError, match="returns tensors"):
        TeacherOutputs(nn.Identity(), lambda *_: torch.tensor(0.7))(torch.zeros(5, 1))


def test_picked_calls_by_keyword() -> None:
    class Named(nn.Module):
        def forward(self, pixels: Tensor, scale: Tensor) -> Tensor:
            return pixels * scale

    batch = {"pixels": torch.ones(2), "scale": torch.full((2,), 3.0), "labels": torch.zeros(2)}
    assert picked("pixels", "scale")(Named(), batch).tolist() == [3.0, 3.0]
    with pytest.raises(DataError, match="'depth'"):
        picked("depth")(Named(), batch)
