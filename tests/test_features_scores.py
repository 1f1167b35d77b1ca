"""Watching features go by: the scores are those of the formula, whatever the batches are like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diplugin.discriminant import channel_scores
from diplugin.errors import OneClassWarning
from diplugin.features import Observation, chunks, score_points
from diplugin.taps import TapPoint

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]


def captured(model: nn.Module, images: Tensor, layer: str, side: str) -> list[Tensor]:
    """What a layer reads or writes on these images, every call."""
    seen: list[Tensor] = []
    module = dict(model.named_modules())[layer]
    handle = module.register_forward_hook(
        lambda _m, args, out: seen.append((args[0] if side == "in" else out).detach())
    )
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen


def by_formula(
    model: nn.Module, images: Tensor, labels: Tensor, point: TapPoint, size: int, channels_last: bool = False
) -> Tensor:
    """Scores by the exact functions in float64 on stored maps, averaged over chunks by their images."""
    total = torch.zeros(())
    for (x,), (y,) in zip(chunks([(images,)], size), chunks([(labels,)], size), strict=True):
        calls = captured(model, x, point.layer, point.side)
        maps = [m.movedim(-1, 1) if channels_last else m for m in calls]
        total = total + len(x) * torch.stack([channel_scores(m, y) for m in maps]).mean(0)
    return total / len(images)


@pytest.mark.parametrize(
    ("kind", "points"),
    [
        ("plain", [("3", "in"), ("3", "out"), ("1", "out"), ("11", "in")]),
        ("residual", [("c1", "in"), ("project", "out"), ("head", "in")]),
        ("depthwise", [("depth.0", "in"), ("squeeze.0", "in"), ("project.0", "in")]),
        ("vgg", [("6", "in"), ("8", "in")]),
        ("twice", [("shared", "in"), ("shared", "out")]),
    ],
)
def test_scores_are_those_of_the_formula(
    make_net: MakeNet, make_images: Any, kind: str, points: list[tuple[str, Any]]
) -> None:
    model, _ = make_net(kind)
    data = make_images(70)
    wanted = [TapPoint(*p) for p in points]
    got = score_points(model, data.loader(16), wanted, Observation(chunk_size=30))
    assert set(got) == set(wanted)
    for point in wanted:
        assert got[point].images == 70
        expected = by_formula(model, data.images, data.labels, point, 30)
        torch.testing.assert_close(got[point].scores, expected, rtol=1e-4, atol=1e-9)


def test_tokens_have_their_channels_last(make_net: MakeNet, make_images: Any) -> None:
    model, _ = make_net("tokens")
    data = make_images(60)
    points = [TapPoint("up", "in"), TapPoint("up", "out"), TapPoint("down", "in"), TapPoint("head", "in")]
    got = score_points(model, data.loader(60), points)
    for point in points:
        expected = by_formula(model, data.images, data.labels, point, 250, channels_last=True)
        torch.testing.assert_close(got[point].scores, expected, rtol=1e-4, atol=1e-9)


class Windows(nn.Module):
    """Folds positions into the batch before a layer and back after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 6, 4, stride=4), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)  # [N, 4, 6]
        y = self.inner(x.reshape(-1, 6)).view(len(x), 4, 5)
        return self.head(y.mean(1))


def test_positions_folded_into_the_batch_are_unfolded(make_images: Any) -> None:
    model, data = Windows().eval(), make_images(40)
    point = TapPoint("inner", "out")
    got = score_points(model, data.loader(40), [point])[point]
    maps = captured(model, data.images, "inner", "out")[0].view(40, 4, 5).transpose(1, 2)
    torch.testing.assert_close(got.scores, channel_scores(maps, data.labels), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("batch", [1, 7, 64, 250, 333, 600])
def test_the_same_scores_whatever_the_batch_size(make_net: MakeNet, make_images: Any, batch: int) -> None:
    model, _ = make_net("plain")
    data = make_images(600)
    points = [TapPoint("3", "in"), TapPoint("7", "in"), TapPoint("11", "in")]
    expected = score_points(model, data.loader(100), points)
    got = score_points(model, data.loader(batch), points)
    for point in points:
        assert torch.equal(got[point].scores, expected[point].scores)
        assert got[point].di == expected[point].di


@settings(max_examples=15)
@given(batch=st.integers(1, 120), count=st.integers(20, 120))
def test_the_same_scores_whatever_the_batch_size_drawn(batch: int, count: int) -> None:
    torch.manual_seed(count)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    images, labels = torch.randn(count, 5), torch.arange(count) % 3
    point = TapPoint("2", "in")
    one, two = (
        score_points(
            model, list(zip(images.split(b), labels.split(b), strict=True)), [point], Observation(chunk_size=40)
        )
        for b in (batch, count)
    )
    assert torch.equal(one[point].scores, two[point].scores)


@pytest.mark.parametrize("change", ["bfloat16", "channels_last"])
def test_dtype_and_memory_format(make_net: MakeNet, make_images: Any, change: str) -> None:
    model, _ = make_net("plain")
    data = make_images(120)
    points = [TapPoint("3", "in"), TapPoint("11", "in")]
    expected = score_points(model, data.loader(40), points)
    if change == "bfloat16":
        model, images = model.bfloat16(), data.images.bfloat16()
    else:
        model, images = model.to(memory_format=torch.channels_last), data.images.to(memory_format=torch.channels_last)
    got = score_points(model, [(images, data.labels)], points)
    for point in points:
        close = {"rtol": 0.1, "atol": 0.02} if change == "bfloat16" else {"rtol": 1e-3, "atol": 1e-6}
        torch.testing.assert_close(got[point].scores, expected[point].scores, **close)
        assert got[point].scores.dtype == torch.float64


def test_targets_of_every_form(make_net: MakeNet, make_images: Any) -> None:
    """Class ids and their one-hot form give the same scores; multi-label and real targets are taken."""
    model, _ = make_net("plain")
    data = make_images(100)
    point = TapPoint("7", "in")

    def scores(labels: Tensor) -> Tensor:
        return score_points(model, [(data.images, labels)], [point])[point].scores

    one_hot = F.one_hot(data.labels)
    torch.testing.assert_close(scores(data.labels), scores(one_hot))
    torch.testing.assert_close(scores(data.labels), scores(3 * one_hot.double() - 1))
    assert scores((torch.rand(100, 5) > 0.5).float()).sum() > 0


def test_other_batches_by_get_labels_and_forward(make_net: MakeNet, make_images: Any) -> None:
    model, _ = make_net("plain")
    data = make_images(80)
    point = TapPoint("7", "in")
    expected = score_points(model, data.loader(20), [point])[point].scores
    batches = [{"pixels": x, "meta": {"class": y}} for x, y in data.loader(20)]
    seen = Observation(get_labels=lambda b: b["meta"]["class"], forward=lambda m, b: m(b["pixels"]))
    assert torch.equal(score_points(model, batches, [point], seen)[point].scores, expected)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(F.relu(self.mix(torch.cat([left, right], 1))))


def test_tuples_and_dicts_of_inputs_are_spread() -> None:
    model, point = TwoInputs().eval(), TapPoint("head", "in")
    left, right, labels = torch.randn(40, 3), torch.randn(40, 5), torch.arange(40) % 3
    one, two = (
        score_points(model, [(inputs, labels)], [point])[point].scores
        for inputs in ((left, right), {"right": right, "left": left})
    )
    assert torch.equal(one, two)


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(input=F.relu(self.one(input=x)))


def test_layers_called_by_keyword_are_scored_too() -> None:
    point = TapPoint("two", "in")
    assert set(score_points(ByKeyword(), [(torch.randn(40, 8), torch.arange(40) % 3)], [point])) == {point}


def test_chunks_of_one_class_say_nothing_and_do_no_harm(make_net: MakeNet, make_images: Any) -> None:
    model, _ = make_net("plain")
    data = make_images(90)
    order = data.labels.argsort()
    images, labels = data.images[order], data.labels[order]
    point = TapPoint("7", "in")
    for targets in (labels, F.one_hot(labels)):
        whole = sum(len(set(chunk.tolist())) > 1 for chunk in labels.split(10))
        with pytest.warns(OneClassWarning, match=f"{9 - whole} of 9 chunks hold images of one class"):
            got = score_points(model, [(images, targets)], [point], Observation(chunk_size=10))[point]
        assert got.images == 10 * whole


def test_a_layer_that_never_runs_is_left_out(make_images: Any) -> None:
    model = nn.ModuleDict({"used": nn.Conv2d(3, 4, 3), "unused": nn.Conv2d(3, 4, 3)})
    data = make_images(30)
    seen = Observation(forward=lambda m, b: m["used"](b[0]))
    points = [TapPoint("used", "out"), TapPoint("unused", "out")]
    assert set(score_points(model, data.loader(30), points, seen)) == {points[0]}
