"""Group scores: the sum of what the tapped tensors' channels carry, in the unit of the search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diplugin.discriminant import channel_scores, discriminant_information
from diplugin.errors import DataError, ModelError
from diplugin.groups import trace_groups
from diplugin.network import trace_network
from diplugin.scoring import score_groups
from diplugin.taps import AtLayer, AtNorm, points_of

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]
KINDS = ["plain", "residual", "option_a", "vgg", "depthwise", "dense", "grouped", "multi_output", "tokens", "twice"]


def inputs_of(model: nn.Module, images: Tensor, layer: str) -> list[Tensor]:
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_scores_by_hand(make_net: MakeNet, make_images: Any, kind: str) -> None:
    """Formula on stored maps, channel by channel: sum over readers and over the channels of a root."""
    model, inputs = make_net(kind)
    data = make_images(60)
    groups = trace_network(model, inputs).prunable
    got = score_groups(model, data.loader(13), groups)
    assert set(got.scores) == set(got.di) == {g.name for g in groups}
    assert (got.images, got.rho) == (60, 10.0)
    for group in groups:
        rows = []
        for member in group.side("in"):
            linear = isinstance(model.get_submodule(member.layer), nn.Linear)
            calls = inputs_of(model, data.images, member.layer)
            per_channel = torch.stack(
                [channel_scores(x.movedim(-1, 1) if linear else x, data.labels) for x in calls]
            ).mean(0)
            roots = torch.zeros(group.channels, dtype=torch.float64)
            for channel, root in zip(member.channels, member.roots, strict=True):
                roots[root] += per_channel[channel]
            rows.append(roots)
        torch.testing.assert_close(got.scores[group.name], torch.stack(rows).sum(0), rtol=1e-4, atol=1e-9)


def test_di_is_that_of_the_tapped_tensor(make_net: MakeNet, make_images: Any) -> None:
    model, inputs = make_net("plain")
    data = make_images(60)
    got = score_groups(model, data.loader(60), trace_groups(model, inputs))
    expected = discriminant_information(inputs_of(model, data.images, "3")[0], data.labels)
    assert got.di["0"] == pytest.approx(float(expected), rel=1e-5)
    assert all(0 <= di < 1 for di in got.di.values())


@pytest.mark.parametrize("tap", [AtLayer(), AtNorm()])
def test_other_taps_look_elsewhere(make_net: MakeNet, make_images: Any, tap: Any) -> None:
    model, _ = make_net("residual")
    data, groups = make_images(60), trace_network(*make_net("residual")).prunable
    default = score_groups(model, data.loader(60), groups)
    got = score_groups(model, data.loader(60), groups, tap=tap)
    assert set(got.scores) == set(default.scores)
    assert all(not torch.allclose(got.scores[n], default.scores[n]) for n in got.scores)
    assert all(p.side == "out" for p in points_of(groups, tap))


def test_noted_groups_are_passed_over(make_net: MakeNet, make_images: Any) -> None:
    model, inputs = make_net("option_a")
    got = score_groups(model, make_images(40).loader(40), trace_groups(model, inputs))
    assert set(got.scores) == {"a", "c"}


def test_dead_channels_score_nothing(make_net: MakeNet, make_images: Any) -> None:
    model, inputs = make_net("plain")
    with torch.no_grad():
        model.get_submodule("1").weight[2] = 0
        model.get_submodule("1").bias[2] = -1
    got = score_groups(model, make_images(60).loader(60), trace_groups(model, inputs)).scores["0"]
    assert got[2] == 0
    assert int((got == 0).sum()) == 1


def test_settings_reach_the_formula(make_net: MakeNet, make_images: Any) -> None:
    model, _ = make_net("plain")
    data, groups = make_images(80), trace_groups(*make_net("plain"))
    maps = inputs_of(model, data.images, "3")[0]
    for settings in ({"rho": 1.0}, {"class_weight": "balanced"}):
        got = score_groups(model, data.loader(20), groups, **settings).scores["0"]
        torch.testing.assert_close(got, channel_scores(maps, data.labels, **settings), rtol=1e-4, atol=1e-9)
    halves = score_groups(model, data.loader(20), groups, chunk_size=40).scores["0"]
    both = [channel_scores(maps[i : i + 40], data.labels[i : i + 40]) for i in (0, 40)]
    torch.testing.assert_close(halves, torch.stack(both).mean(0), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("batch", [1, 32, 250, 600])
def test_the_same_scores_whatever_the_batch_size(make_net: MakeNet, make_images: Any, batch: int) -> None:
    model, _ = make_net("depthwise")
    data, groups = make_images(600), trace_groups(*make_net("depthwise"))
    expected = score_groups(model, data.loader(77), groups).scores
    got = score_groups(model, data.loader(batch), groups).scores
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_other_batches(make_net: MakeNet, make_images: Any) -> None:
    model, _ = make_net("plain")
    data, groups = make_images(60), trace_groups(*make_net("plain"))
    expected = score_groups(model, data.loader(60), groups).scores
    batches = [{"x": x, "y": y} for x, y in data.loader(20)]
    got = score_groups(model, batches, groups, get_labels=lambda b: b["y"], forward=lambda m, b: m(b["x"])).scores
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_frozen_model_in_training_mode_is_left_as_it_was(
    make_net: MakeNet, make_images: Any, state_of: Any, assert_same_state: Any
) -> None:
    model, inputs = make_net("depthwise")
    groups = trace_groups(model, inputs)
    model.train().requires_grad_(False)
    before = state_of(model)
    assert score_groups(model, make_images(40).loader(40), groups).scores
    assert_same_state(model, before)


def test_layers_that_do_not_run_on_the_data(make_net: MakeNet, make_images: Any) -> None:
    model, inputs = make_net("plain")
    groups = trace_groups(model, inputs)
    with pytest.raises(DataError, match="layers of group '7' to run"):
        score_groups(model, make_images(40).loader(40), groups, forward=lambda m, b: m[:9](b[0]))


def test_groups_of_another_model(make_net: MakeNet, make_images: Any) -> None:
    groups = trace_groups(*make_net("residual"))
    with pytest.raises(ModelError, match="expected a model with a layer"):
        score_groups(make_net("plain")[0], make_images(40).loader(40), groups)
