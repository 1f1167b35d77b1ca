"""Calls of layers against what the layers give: windows times weight is the output, whoever pads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_layers import Activates, Adapted, Casts, PadsItself, Squares, Standardises
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.overrides import _get_current_function_mode_stack

from diplugin.layer_calls import LayerCall, call_of, plain_layers, set_call, watching_calls

CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def seen(layer: nn.Module, x: Tensor) -> tuple[LayerCall | None, Tensor]:
    calls: list[LayerCall | None] = []
    with torch.no_grad(), watching_calls({"it": layer}, lambda _name, _x, _y, call: calls.append(call)):
        y = layer(x)
    return calls[0], y


@settings(max_examples=60, deadline=None)
@given(
    dims=st.integers(1, 3), kernel=st.integers(1, 4), stride=st.integers(1, 3), dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same", "valid"]), groups=st.sampled_from([1, 2]), itself=st.booleans(),
    mode=st.sampled_from(["zeros", "reflect", "circular"]), seed=st.integers(0, 999),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # once in a process
def test_windows_times_the_weight_are_the_output(
    dims: int, kernel: int, stride: int, dilation: int, padding: Any, groups: int, itself: bool, mode: str, seed: int
) -> None:
    torch.manual_seed(seed)
    conv: nn.Module = (
        PadsItself(4, 6, (kernel, 2), stride, 0, dilation, groups) if itself
        else CONVS[dims](4, 6, kernel, 1 if padding == "same" else stride, padding, dilation, groups, padding_mode=mode)
    )  # fmt: skip
    x = torch.randn(3, 4, *[8 + i for i in range(2 if itself else dims)])
    call, y = seen(conv, x)
    assert call is not None and call.bias is conv.bias and call.weight is conv.weight
    flat = y.flatten(2)
    positions = torch.stack([torch.randperm(flat.shape[2])[:3] for _ in range(len(x))])
    windows = call.windows(call.x, positions).unflatten(1, (groups, -1)).flatten(2)  # [M, G, D]
    got = torch.einsum("mgd,god->mgo", windows, call.weight.view(groups, -1, windows.shape[2])).flatten(1) + conv.bias
    want = flat.transpose(1, 2)[torch.arange(len(x))[:, None], positions].flatten(0, 1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(call.of(call.x, call.weight), y - conv.bias.view(-1, *[1] * (y.ndim - 2)))
    if not itself:
        by_settings = set_call(conv, x)
        assert (by_settings.stride, by_settings.dilation, by_settings.groups) == (
            call.stride, call.dilation, call.groups)  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_weight_by_groups(groups: int, transposed: bool) -> None:
    """Channel c of group g alone reaches the outputs of g, by the filters that the weight has there."""
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(4, 6, 1, groups=groups, bias=False)
    x = torch.randn(5, 4, 3, 3)
    call, y = seen(layer, x)
    assert call is not None and call.transposed == transposed
    blocks = x.unflatten(1, (groups, -1))
    want = torch.einsum("ngchw,gock->ngohw", blocks, call.by_group).flatten(1, 2)
    torch.testing.assert_close(want, y)


def test_arguments_by_name_and_by_place() -> None:
    x, w = torch.randn(1, 4, 9, 9), torch.randn(6, 2, 3, 3)
    by_place = call_of(F.conv2d, (x, w, None, 2, (1, 0), 1, 2), {})
    by_name = call_of(F.conv2d, (x,), {"weight": w, "stride": (2, 2), "padding": [1, 0], "groups": 2})
    assert by_place is not None and by_name is not None
    assert by_place.padding == by_name.padding == ((1, 1), (0, 0))
    assert (by_place.stride, by_place.dilation, by_place.groups) == (by_name.stride, (1, 1), 2)
    numbers = call_of(F.conv2d, (x, w), {"stride": np.int64(2), "padding": (np.int64(1), 0), "groups": 2})
    assert numbers is not None and (numbers.stride, numbers.padding) == (by_place.stride, by_place.padding)
    assert call_of(F.relu, (x,), {}) is None and call_of(F.conv2d, (x, w), {"groups": 2}) is not None


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(3, 4, 3), nn.Conv2d(3, 4, 3, 2, 1, padding_mode="reflect"), nn.ConvTranspose2d(3, 4, 2)]
)
def test_an_image_without_its_batch_is_a_batch_of_one(layer: Any) -> None:
    x = torch.randn(1, 3, *[9] * len(layer.kernel_size))
    batched, _ = seen(layer, x)
    alone, _ = seen(layer, x[0])
    assert batched is not None and alone is not None
    assert torch.equal(alone.x, batched.x) and torch.equal(set_call(layer, x[0]).x, set_call(layer, x).x)


class Net(nn.Module):
    """Runs a layer in a way of its own."""

    def __init__(self, layer: nn.Module, run: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.other = nn.Linear(6, 6)
        self.run = run or (lambda net, x: net.layer(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def tied(layer: nn.Linear) -> Net:
    net = Net(layer, lambda net, x: net.other(net.layer(x)))
    net.other.weight = layer.weight
    return net


def tied_to_tokens(layer: nn.Linear) -> Net:
    net = Net(layer, lambda net, x: net.layer(net.tokens((x > 0).long().argmax(1))))
    net.tokens = nn.Embedding(6, 6)
    net.tokens.weight = layer.weight
    return net


IMAGE, ROW = torch.randn(2, 3, 8, 8), torch.randn(2, 6)
PLAIN: dict[str, tuple[nn.Module, Tensor]] = {
    "convolution": (Net(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), IMAGE),
    "transposed": (Net(nn.ConvTranspose2d(3, 4, 2, 2)), IMAGE),
    "linear without a bias": (Net(nn.Linear(6, 5, bias=False)), ROW),
    "pads itself": (Net(PadsItself(3, 4, 3, 2)), IMAGE),
    "asked for its type": (Net(nn.Linear(6, 6), lambda net, x: net.layer(x.to(net.layer.weight.dtype))), ROW),
    "casts to the type it has": (Net(Casts(6, 5)), ROW),
    "of squares": (Net(Squares(3, 4, 3)), IMAGE),
    "called twice": (Net(nn.Linear(6, 6), lambda net, x: net.layer(net.layer(x))), ROW),
}
NOT_PLAIN: dict[str, tuple[nn.Module, Tensor]] = {
    "standardised": (Net(Standardises(3, 4, 3)), IMAGE),
    "parametrized": (Net(weight_norm(nn.Linear(6, 5))), ROW),
    "adapted": (Net(Adapted(6, 5)), ROW),
    "tied": (tied(nn.Linear(6, 6)), ROW),
    "activates in place": (Net(Activates(3, 4, 3)), IMAGE),
    "tied to an embedding": (tied_to_tokens(nn.Linear(6, 6)), ROW),
    "part of a product": (Net(nn.Linear(6, 6), lambda net, x: net.layer(x) @ net.layer.weight), ROW),
    "used elsewhere": (Net(nn.Linear(6, 6), lambda net, x: F.linear(net.layer(x), net.layer.weight)), ROW),
    "never run": (Net(nn.Linear(6, 6), lambda net, x: net.other(x)), ROW),
}


@pytest.mark.parametrize("name", PLAIN)
def test_layers_that_only_multiply(name: str) -> None:
    net, x = PLAIN[name]
    assert plain_layers(net.train(), (x,), ["layer"]) == {"layer"}
    assert net.training and not net.get_submodule("layer")._forward_hooks


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_layers_whose_weight_is_not_all(name: str) -> None:
    net, x = NOT_PLAIN[name]
    assert plain_layers(net, (x,), ["layer"]) == set()


def test_a_hook_that_changes_the_output_is_seen() -> None:
    net = Net(nn.Linear(6, 6))
    net.layer.register_forward_hook(lambda _m, _a, y: 2 * y)
    assert plain_layers(net, (ROW,), ["layer"]) == set()


def test_a_hook_that_changes_the_output_in_place_is_seen() -> None:
    net = Net(nn.Linear(6, 6))
    net.layer.register_forward_hook(lambda _m, _a, y: y.mul_(2))
    assert plain_layers(net, (ROW,), ["layer"]) == set()


def test_what_the_onlooker_computes_is_no_call_of_the_network() -> None:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    seen: list[tuple[str, bool]] = []

    def see(name: str, x: Any, _y: Any, call: LayerCall | None) -> None:
        seen.append((name, call is not None))
        F.linear(x, second.weight)

    with torch.no_grad(), watching_calls({"0": first, "1": second}, see) as watch:
        nn.Sequential(first, second)(ROW)
    assert seen == [("0", True), ("1", True)]
    assert (watch.uses[id(first.weight)], watch.uses[id(second.weight)]) == (1, 1)


def test_a_network_that_fails_is_left_as_it_was() -> None:
    net = Net(nn.Linear(6, 6), lambda net, x: net.other(net.layer(x)[:, :5])).train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        plain_layers(net, (ROW,), ["layer"])
    assert net.training and not net.get_submodule("layer")._forward_hooks
    assert not _get_current_function_mode_stack()
