"""What a channel is said to lose at so many bits: against brute-force DI and the errors as they are."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from odd_layers import PadsItself
from small_quantized import FREE_ENDS
from torch import nn

from diplugin import Budget
from diplugin.discriminant import absolute_ridge, channel_scores, label_targets
from diplugin.quantize import (
    Bits,
    Quantizer,
    quantize,
)
from diplugin.quantize.strategies import di_damage, output_error


def of_weight(module, weight):
    """The layer in float64, with this weight and no bias."""
    other = copy.deepcopy(module).double()
    other.weight.data, other.bias = weight.double(), None
    return other


def chunk_di_scores(module, inputs, labels, error, rho):
    """2ρ‖EᵀZ‖²/‖Y‖² from whole maps in float64: the definition, without label images."""
    maps, errors = (of_weight(module, weight)(inputs.double()).detach() for weight in (module.weight.detach(), error))
    x = maps.flatten(1) - maps.flatten(1).mean(0)
    ridge = absolute_ridge(maps, rho)
    y = label_targets(labels)
    solution = torch.linalg.solve(x @ x.T + ridge * torch.eye(len(x), dtype=x.dtype), y)
    e = (errors - errors.mean(0)).flatten(2)
    return 2 * ridge * torch.einsum("ncp,nl->cpl", e, solution).square().sum((1, 2)) / y.square().sum()


@pytest.mark.parametrize("conv", [nn.Conv2d(3, 6, 3, stride=2, padding=1), PadsItself(3, 6, 3, stride=2)])
def test_di_damage_is_the_di_score_of_the_error_map(make_images, conv):
    torch.manual_seed(1)
    net = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)).eval()
    images = make_images(60)
    loader = images.loader(60)
    x, labels = loader[0]
    quantizer = Quantizer(net, loader, (x[:1],), Bits(ends=FREE_ENDS, images=60))
    for width in (2, 4):
        error = quantizer.task.rounded("0", width).values.view(net[0].weight.shape) - net[0].weight.detach()
        expected = chunk_di_scores(net[0], x, labels, error, rho=10.0)
        np.testing.assert_allclose(di_damage(quantizer.task, "0", width), expected.numpy(), rtol=1e-3)
    own = channel_scores(net[0](x).detach(), labels)
    np.testing.assert_allclose(di_damage(quantizer.task, "0", 0), own.numpy(), rtol=1e-3)


def test_first_order_perturbation_predicts_the_change_of_di_by_rounding(make_images):
    """`perturbation_scores` against brute force: DI recomputed with one channel's rounded map, ridge fixed."""
    from diplugin.discriminant import discriminant_information, perturbation_scores

    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(320, 4)).eval()
    x, labels = make_images(60).loader(60)[0]
    quantizer = Quantizer(net, [(x, labels)], (x[:1],), Bits(ends=FREE_ENDS, images=60))
    maps = net[0](x).detach().double()
    ridge = absolute_ridge(maps)
    base = discriminant_information(maps, labels, ridge=ridge)
    for width, tolerance in ((8, 0.02), (4, 0.2)):
        error = quantizer.task.rounded("0", width).values.view(net[0].weight.shape) - net[0].weight.detach()
        errors = nn.functional.conv2d(x, error, None, padding=1).double()
        predicted = perturbation_scores(maps, errors, labels, ridge=ridge)
        for channel in range(5):
            changed = maps.clone()
            changed[:, channel] += errors[:, channel]
            brute = discriminant_information(changed, labels, ridge=ridge) - base
            scale = predicted.abs().max()
            assert abs(float(brute - predicted[channel])) <= tolerance * float(scale)


def test_output_error_is_the_variance_of_the_error_map(make_images):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)).eval()
    x, labels = make_images(60).loader(60)[0]
    quantizer = Quantizer(net, [(x, labels)], (x[:1],), Bits(ends=FREE_ENDS, images=60))
    error = quantizer.task.rounded("0", 4).values.view(net[0].weight.shape) - net[0].weight.detach()
    maps = nn.functional.conv2d(x, net[0].weight, net[0].bias)
    expected = nn.functional.conv2d(x, error).transpose(0, 1).flatten(1).var(1, correction=0)
    spread = maps.transpose(0, 1).flatten(1).var(1, correction=0).mean()
    np.testing.assert_allclose(output_error(quantizer.task, "0", 4), (expected / spread).detach().numpy(), rtol=1e-3)


def test_very_wide_layers_and_many_labels_are_bounded(make_images, monkeypatch):
    """Diagonal blocks in place of the whole second moment; the principal label images in place of all."""
    from diplugin.quantize import observe as module
    from diplugin.quantize.rounding import CompensatedRounding

    x, _ = make_images(60).loader(60)[0]
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 6)).eval()
    data, targets = [(x, torch.randn(60, 7))], []
    for block, kept in ((2304, 32), (50, 3)):
        monkeypatch.setattr(module, "BLOCK", block)
        monkeypatch.setattr(module, "LABEL_IMAGES", kept)
        quantizer = Quantizer(net, data, (x[:1],), Bits(ends=FREE_ENDS, images=60))
        statistics = quantizer.task.statistics["1"]
        targets.append((di_damage(quantizer.task, "1", 4), output_error(quantizer.task, "1", 4)))
        assert len(statistics.label_images[0]) == min(7, kept)
    assert statistics.gram.shape == (1, 4, 48, 48)
    grid, gram = quantizer.task.rounded("1", 4).grid, (statistics.gram / 60).float()
    alone = CompensatedRounding()(net[1].weight.detach()[:, 48:96], gram[:, 1], grid) * grid.scale[:, None]
    assert torch.equal(quantizer.task.rounded("1", 4).values[:, 48:96], alone)
    assert bool((targets[1][0] < 10 * targets[0][0] + 1e-9).all()) and bool((targets[1][1] > 0).all())


class Windows(nn.Module):
    """The middle layer sees four windows an image, as a batch; called by keyword."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.embed, self.inner, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        tokens = self.embed(input=x).flatten(2)
        if self.first:  # tokens first
            return self.head(self.inner(input=tokens.permute(2, 0, 1)).mean(0))
        windows = self.inner(input=tokens.transpose(1, 2).reshape(-1, 4, 8))
        return self.head(windows.reshape(-1, 16, 8).mean(1))


@pytest.mark.parametrize("first", [False, True])
def test_a_layer_that_sees_no_images_is_not_silenced(make_images, first):
    torch.manual_seed(0)
    model, loader = Windows(first).eval(), make_images(80).loader(40)
    x = torch.cat([images for images, _ in loader])
    result = quantize(model, loader, (x[:1],), Bits(ends=FREE_ENDS, images=80), budgets=[Budget("bops", fraction=0.5)])
    expected = model(x)
    assert (result.model(x) - expected).norm() < 0.3 * (expected - expected.mean(0)).norm()
