"""Scores by layer: the group's where there is one, the layer's own tensors elsewhere; against DI on captured maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diplugin.discriminant import channel_scores
from diplugin.errors import DataError
from diplugin.groups import trace_groups
from diplugin.layer_scores import even_over_units, score_layers
from diplugin.scoring import score_groups

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]


def test_output_channels_get_their_groups_scores(make_net: MakeNet, make_images: Callable[..., Any]) -> None:
    model, inputs = make_net("residual")
    loader = make_images(100).loader(40)
    groups = trace_groups(model, inputs)
    want = score_groups(model, loader, groups).scores
    by_layer = score_layers(model, loader, [("c2", "out"), ("project", "out"), ("d2", "out"), ("a1", "out")], groups)
    tied = next(g.name for g in groups if "c2" in {m.layer for m in g.members})
    assert all(torch.equal(by_layer[layer, "out"], want[tied]) for layer in ("c2", "project", "d2"))
    assert torch.equal(by_layer["a1", "out"], want["a1"])


def test_without_groups_a_layer_is_scored_at_its_own_tensors(
    make_net: MakeNet, make_images: Callable[..., Any]
) -> None:
    model, _ = make_net("vgg")
    data = make_images(100)
    seen: dict[str, Tensor] = {}
    model[3].register_forward_hook(lambda _, args, output: seen.update({"in": args[0], "out": output}))
    scores = score_layers(model, data.loader(100), [("3", "in"), ("3", "out")])
    with torch.no_grad():
        model(data.images)
    for side in ("in", "out"):
        assert torch.allclose(scores["3", side], channel_scores(seen[side].double(), data.labels), rtol=1e-4)


def test_a_normalisation_behind_a_concatenation_gathers_its_groups(
    make_net: MakeNet, make_images: Callable[..., Any]
) -> None:
    model, inputs = make_net("dense")
    groups = trace_groups(model, inputs)
    scores = score_layers(model, make_images(60).loader(60), [("n2", "out"), ("stem", "out"), ("c1", "out")], groups)
    assert torch.equal(scores["n2", "out"], torch.cat([scores["stem", "out"], scores["c1", "out"]]))


def test_units_of_grouped_convolutions_are_scored_as_one(make_net: MakeNet) -> None:
    model, inputs = make_net("grouped")
    group = next(g for g in trace_groups(model, inputs) if g.blocks == 4)
    scores = torch.rand(16)
    even = even_over_units(group, scores).view(4, 4)
    assert torch.allclose(even, scores.view(4, 4).mean(0).expand(4, 4))


def test_a_layer_that_never_runs_is_named(make_images: Callable[..., Any]) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(DataError, match="layer 'idle' to run on the data"):
        score_layers(Idle(), make_images(40).loader(40), [("used", "out"), ("idle", "out")])
