"""A network that was watched is left as it was, whatever fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diplugin.errors import ModelError
from diplugin.features import Observation, score_points
from diplugin.taps import TapPoint

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]


class Breaks(nn.Module):
    """Raises on its second forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop, self.calls = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise ZeroDivisionError("on the second pass")
        return self.drop(self.bn(self.conv(x)))


def endless_trouble(batches: list[Any]) -> Iterator[Any]:
    yield from batches
    raise OSError("the disk is gone")


def test_state_is_restored_whatever_fails(make_images: Any, state_of: Any, assert_same_state: Any) -> None:
    data = make_images(60)
    model = Breaks().train()
    model.bn.eval()
    points = [TapPoint("conv", "out"), TapPoint("bn", "in")]
    before = state_of(model)
    with pytest.raises(ModelError, match="on the second pass"):
        score_points(model, data.loader(20), points, Observation(chunk_size=20))
    assert_same_state(model, before)
    model.calls = -100
    with pytest.raises(OSError, match="disk"):
        score_points(model, endless_trouble(data.loader(20)), points, Observation(chunk_size=20))
    assert_same_state(model, before)
    with pytest.raises(KeyError):
        score_points(model, data.loader(20), points, Observation(get_labels=lambda b: {}["labels"]))
    assert_same_state(model, before)
    score_points(model, data.loader(20), points)
    assert_same_state(model, before)


def test_training_mode_stays_and_statistics_do_not_move(
    make_net: MakeNet, make_images: Any, state_of: Any, assert_same_state: Any
) -> None:
    model, _ = make_net("residual")
    evaluated = score_points(model, make_images(50).loader(50), [TapPoint("head", "in")])
    model.train()
    before = state_of(model)
    trained = score_points(model, make_images(50).loader(50), [TapPoint("head", "in")])
    assert_same_state(model, before)
    assert torch.equal(*(s[TapPoint("head", "in")].scores for s in (evaluated, trained)))


def test_no_gradients_are_kept(make_net: MakeNet, make_images: Any) -> None:
    model, _ = make_net("plain")
    needed: list[bool] = []
    model.register_forward_hook(lambda _m, _a, out: needed.append(out.requires_grad))
    score_points(model, make_images(30).loader(30), [TapPoint("3", "in")])
    assert needed == [False]
