"""Masks become channels: against masked networks run as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diplugin.errors import PlanError
from diplugin.masks import apply_masks, dead_channels, follower_masks, followers, gone_roots, remove_masked
from diplugin.network import trace_network

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]
KINDS = ["plain", "residual", "option_a", "vgg", "depthwise", "dense", "grouped", "transposed", "tokens", "twice"]


def row_masks(model: nn.Module, share: float, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Random output channels of every convolution and linear layer masked, with their biases."""
    draw = torch.Generator().manual_seed(seed)
    masks: dict[str, dict[str, Tensor]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)):
            continue
        transposed = isinstance(module, nn.ConvTranspose2d)
        channels = module.weight.shape[1 if transposed else 0]
        keep = (torch.rand(channels, generator=draw) > share).float()
        shape = [1, -1, 1, 1] if transposed else [-1, *[1] * (module.weight.ndim - 1)]
        masks[name] = {"weight": keep.view(shape).expand_as(module.weight)}
        if module.bias is not None:
            masks[name]["bias"] = keep
    return masks


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_the_cut_network_equals_the_masked_one_whatever_the_masks(make_net: MakeNet, kind: str, share: float) -> None:
    model, (x,) = make_net(kind, batch=3)
    groups = trace_network(model, (x[:1],)).groups
    masks: dict[str, dict[str, Tensor]] = row_masks(model, share)
    modules: dict[str, Any] = dict(model.named_modules())
    names = followers(groups, masks)
    widths = {name: len(modules[name].weight) for name in names}
    for name, keep in follower_masks(groups, dead_channels(modules, masks), widths).items():
        masks[name] = {"weight": keep.view(-1, *[1] * (modules[name].weight.ndim - 1)), "bias": keep}
        if modules[name].bias is None:
            del masks[name]["bias"]
    masked = apply_masks(copy.deepcopy(model), masks)
    small = remove_masked(copy.deepcopy(model), masks, (x[:1],))
    assert torch.allclose(outputs(small, x), outputs(masked, x), atol=1e-6)


def test_masked_channels_really_leave(make_net: MakeNet) -> None:
    model, (x,) = make_net("vgg")
    keep = torch.tensor([1.0, 0, 1, 0, 1, 1, 0, 1])
    masks = {"0": {"weight": keep.view(-1, 1, 1, 1), "bias": keep}}
    small: Any = remove_masked(model, masks, (x,))
    assert small[0].out_channels == small[3].in_channels == 5


def test_a_channel_that_nobody_reads_leaves_as_well(make_net: MakeNet) -> None:
    model, (x,) = make_net("vgg", batch=2)
    keep = torch.ones(8)
    keep[[2, 5]] = 0
    masks = {"3": {"weight": keep.view(1, -1, 1, 1)}}
    want = outputs(apply_masks(copy.deepcopy(model), masks), x)
    small: Any = remove_masked(model, masks, (x[:1],))
    assert small[0].out_channels == 6
    assert torch.allclose(outputs(small, x), want, atol=1e-6)


def test_a_shortcut_sum_keeps_what_only_one_of_its_layers_masks(make_net: MakeNet) -> None:
    model, (x,) = make_net("residual")
    group = next(g for g in trace_network(model, (x,)).groups if "c2" in {m.layer for m in g.members})
    dead = {("c2", "out"): torch.arange(10) < 4, ("project", "out"): torch.arange(10) >= 2}
    assert gone_roots(group, dead) == (2, 3)  # pyright: ignore[reportArgumentType]


def test_grouped_convolutions_lose_whole_units_and_never_all(make_net: MakeNet) -> None:
    model, (x,) = make_net("grouped")
    group = next(g for g in trace_network(model, (x,)).groups if g.name == "2")
    assert group.blocks == 4
    dead = torch.zeros(16, dtype=torch.bool)
    dead[[0, 4, 8, 12, 1, 5]] = True
    assert gone_roots(group, {("2", "out"): dead}) == (0, 4, 8, 12)
    assert len(gone_roots(group, {("2", "out"): torch.ones(16, dtype=torch.bool)})) == 12


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ({"nowhere": {"weight": torch.ones(1)}}, "no layer 'nowhere'"),
        ({"0": {"wait": torch.ones(1)}}, "'0' has no 'wait'"),
        ({"0": {"weight": torch.ones(5, 1, 1, 1)}}, r"fits 0.weight of shape \[8, 3, 3, 3\], got \[5, 1, 1, 1\]"),
    ],
)
def test_masks_of_another_model_are_refused_in_one_line(make_net: MakeNet, masks: Any, words: str) -> None:
    model, (x,) = make_net("vgg")
    with pytest.raises(PlanError, match=words) as caught:
        remove_masked(model, masks, (x,))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["_output_0", "_input_0"])
def test_a_mask_over_part_of_a_channel_removes_nothing_and_cannot_be_baked_in(make_net: MakeNet, target: str) -> None:
    model, (x,) = make_net("vgg")
    channels = 6 if target == "_output_0" else 8
    mask = torch.ones(1, channels, 4, 4)
    mask[0, 1] = 0.0
    mask[0, 2, :2] = 0.0
    side = "out" if target == "_output_0" else "in"
    dead = dead_channels(dict(model.named_modules()), {"3": {target: mask}})
    assert dead["3", side].nonzero().flatten().tolist() == [1]
    with pytest.raises(PlanError, match=f"over whole channels of '3', its {target} has one over parts"):
        remove_masked(model, {"3": {target: mask}}, (x,))
