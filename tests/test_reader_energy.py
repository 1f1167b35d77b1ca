"""Energies against their definition: the variance of each channel's own contribution, one channel at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from odd_layers import PadsItself, Standardises
from torch import Tensor, nn

from diplugin.reader_energy import measuring

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(6, 5, 3), (7, 6, 8, 8)),
    "strided, grouped": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2), (7, 6, 8, 8)),
    "same padding": (lambda: nn.Conv2d(6, 4, 3, padding="same", dilation=2), (7, 6, 8, 8)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 5, padding=2), (7, 6, 20)),
    "conv1d, one tuple for all": (lambda: nn.Conv1d(6, 4, (3,), *[(1,)] * 3), (7, 6, 20)),
    "pointwise": (lambda: nn.Conv2d(6, 4, 1), (7, 6, 5, 5)),
    "conv3d, pointwise": (lambda: nn.Conv3d(6, 4, 1), (7, 6, 3, 3, 3)),
    "linear": (lambda: nn.Linear(6, 3), (20, 6)),
    "pads itself": (lambda: PadsItself(6, 4, 3, stride=2), (7, 6, 8, 8)),
    "standardises": (lambda: Standardises(6, 4, 3), (7, 6, 8, 8)),
    "transposed, pointwise": (lambda: nn.ConvTranspose2d(6, 4, 1, groups=2), (7, 6, 5, 5)),
}


def one_by_one(layer: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
    energies = []
    for channel in range(x.shape[1]):
        alone = torch.zeros_like(x)
        alone[:, channel] = x[:, channel]
        y = layer(alone).movedim(1, 0).flatten(1).double()
        energies.append((y.var(1, unbiased=False) * scale.double().square()).sum())
    return torch.stack(energies)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_energy_is_the_variance_of_each_contribution(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape).cumsum(-1)
    outputs = layer(x).shape[1]
    norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[x.ndim](outputs).eval()
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    net = nn.Sequential(layer, norm)
    with measuring(net, {"0": layer}) as meter:
        net(x)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(meter.energies()["0"], one_by_one(layer, x, scale), rtol=1e-4, atol=1e-8)
    assert not layer._forward_hooks and not norm._forward_pre_hooks


@torch.no_grad()
def test_without_a_norm_outputs_weigh_alike() -> None:
    layer, x = nn.Conv2d(4, 3, 3, padding=1), torch.randn(6, 4, 7, 7)
    with measuring(layer, {"": layer}) as meter:
        layer(x)
        layer(x)
    torch.testing.assert_close(meter.energies()[""], 2 * one_by_one(layer, x, torch.ones(3)), rtol=1e-4, atol=1e-8)


@torch.no_grad()
def test_images_without_a_batch_add_up() -> None:
    layer, x = nn.Conv2d(4, 3, 3, padding=1), torch.randn(2, 4, 7, 7)
    with measuring(layer, {"": layer}) as meter:
        for image in x:
            layer(image)
    want = sum(one_by_one(layer, image[None], torch.ones(3)) for image in x)
    torch.testing.assert_close(meter.energies()[""], want, rtol=1e-4, atol=1e-8)
