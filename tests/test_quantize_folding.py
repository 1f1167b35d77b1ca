"""BatchNorm folded into layers: whatever a network does between the two, its outputs stay what they were."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diplugin.errors import ModelError
from diplugin.quantize.folding import fold_batchnorm

KINDS = ["plain", "vgg", "residual", "option_a", "depthwise", "grouped", "dense", "tokens", "transposed"]


def norms_in(model: nn.Module) -> int:
    return sum(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_folding_changes_no_output(make_net, kind):
    model, inputs = make_net(kind, batch=3)
    model.eval()
    expected = model(*inputs)
    norms = norms_in(model)
    folded = fold_batchnorm(model, inputs)
    torch.testing.assert_close(folded(*inputs), expected, rtol=1e-3, atol=1e-4)
    assert norms_in(folded) == 0 or kind in ("dense", "tokens", "transposed"), (norms, norms_in(folded))


class Parts(nn.Module):
    """A layer and a BatchNorm with statistics of its own, put together by a function."""

    def __init__(self, build: Callable[[Any, Tensor], Any], layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.build, self.layer, self.norm = build, layer, norm

    def forward(self, x: Tensor) -> Any:
        return self.build(self, x)


class WithActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: what follows is a child."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class WithFunction(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Standardised(nn.Conv2d):
    """A convolution with another weight than the one it holds."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


def in_a_row(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.layer(x))


def returned_as_well(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = net.layer(x)
    return net.norm(y), y


def partly_overwritten(net: Any, x: Tensor) -> Tensor:
    y = net.layer(x)
    y[:, :2] = 0
    return net.norm(y)


def added_to_itself(net: Any, x: Tensor) -> Tensor:
    y = net.layer(x)
    return net.norm(y) + y


def passed_by_name(net: Any, x: Tensor) -> Tensor:
    return net.norm(input=net.layer(input=x))


def after_an_unused_layer(net: Any, x: Tensor) -> Tensor:
    net.layer(x)
    return net.norm(x * 2)


def turned_around(net: Any, x: Tensor) -> Tensor:
    """As autoencoders decode with what they encode with."""
    return F.conv_transpose2d(F.relu(net.norm(net.layer(x))), net.layer.weight, padding=1)


def mish(x: Tensor) -> Tensor:
    return x * torch.tanh(F.softplus(x))


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # networks of the day have it all the same
    SCRIPTED_MISH = torch.jit.script(mish)


def read_by_compiled_code(net: Any, x: Tensor) -> Tensor:
    """Of whose reading no watch is told."""
    y = net.layer(x)
    return net.norm(y) + SCRIPTED_MISH(y)


def asked_for_its_statistics(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.layer(x)) + net.norm.running_mean[:, None, None]


def conv() -> nn.Module:
    return nn.Conv2d(3, 3, 3, padding=1, bias=False)


def doubled_by_a_hook() -> nn.Module:
    layer = conv()
    layer.register_forward_hook(lambda module, args, y: 2 * y)
    return layer


def weight_normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(conv())


TOKENS = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
CASES = [
    (in_a_row, conv(), nn.BatchNorm2d(3), IMAGES, 0),
    (in_a_row, conv(), nn.BatchNorm2d(3, affine=False), IMAGES, 0),
    (passed_by_name, conv(), nn.BatchNorm2d(3), IMAGES, 0),
    (in_a_row, conv(), WithActivation(3), IMAGES, 0),
    (in_a_row, nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False), IMAGES[:, :, 0, 0], 0),
    (in_a_row, conv(), WithFunction(3), IMAGES, 1),
    (in_a_row, Standardised(3, 3, 1), nn.BatchNorm2d(3), IMAGES, 1),
    (in_a_row, doubled_by_a_hook(), nn.BatchNorm2d(3), IMAGES, 1),
    (in_a_row, weight_normed(), nn.BatchNorm2d(3), IMAGES, 1),
    (in_a_row, conv(), nn.BatchNorm2d(3, track_running_stats=False), IMAGES, 1),
    (in_a_row, nn.Linear(3, 3), nn.BatchNorm1d(3), TOKENS, 1),  # it normalises the tokens, not the features
    (in_a_row, nn.Linear(3, 5), nn.BatchNorm1d(3), TOKENS, 1),
    (returned_as_well, conv(), nn.BatchNorm2d(3), IMAGES, 1),
    (partly_overwritten, conv(), nn.BatchNorm2d(3), IMAGES, 1),
    (added_to_itself, conv(), nn.BatchNorm2d(3), IMAGES, 1),
    (turned_around, conv(), nn.BatchNorm2d(3), IMAGES, 1),
    (read_by_compiled_code, conv(), nn.BatchNorm2d(3), IMAGES, 1),
    (asked_for_its_statistics, conv(), nn.BatchNorm2d(3), IMAGES, 1),
    (after_an_unused_layer, conv(), nn.BatchNorm2d(3), IMAGES, 1),
]  # fmt: skip


def with_statistics(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    for norm in model.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for values in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
                if values is not None:
                    values.data.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


@pytest.mark.parametrize(("build", "layer", "norm", "x", "left"), CASES)
def test_whatever_lies_between_layer_and_norm(build, layer, norm, x, left):
    model = with_statistics(Parts(build, layer, norm))
    expected = pytree.tree_map(lambda y: y.clone(), model(x))
    folded = fold_batchnorm(model, (x[:2],))
    torch.testing.assert_close(folded(x), expected, rtol=1e-3, atol=1e-4)
    assert norms_in(folded) == left


@pytest.mark.parametrize("called", ["layer and other norm", "other layer and norm", "both others"])
def test_modules_of_two_names_are_folded_under_both(called):
    def build(net, x):
        layer = net.layer if called.startswith("layer") else net.both[0]
        return (net.norm if called.endswith("and norm") else net.both[1])(layer(x))

    model = with_statistics(Parts(build, conv(), nn.BatchNorm2d(3)))
    model.both = nn.ModuleList([model.layer, model.norm])
    expected = model(IMAGES)
    torch.testing.assert_close(fold_batchnorm(model, (IMAGES,))(IMAGES), expected, rtol=1e-3, atol=1e-4)
    assert norms_in(model) == 0


def test_a_model_that_does_not_run_is_named():
    with pytest.raises(ModelError, match="runs on the example inputs"):
        fold_batchnorm(nn.Conv2d(3, 3, 1), (torch.zeros(1, 4, 2, 2),))


def test_one_fold_that_fails_leaves_the_others():
    blocks = [Parts(build, conv(), nn.BatchNorm2d(3)) for build in (in_a_row, read_by_compiled_code, in_a_row)]
    model = with_statistics(nn.Sequential(*blocks))
    expected = model(IMAGES)
    folded: Any = fold_batchnorm(model, (IMAGES[:2],))
    torch.testing.assert_close(folded(IMAGES), expected, rtol=1e-3, atol=1e-4)
    assert [norms_in(block) for block in folded] == [0, 1, 0]
