"""Grids and roundings against their definitions, by brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from diplugin.quantize.grid import (
    ActivationGrid,
    ChannelScales,
    TensorScale,
    WeightGrid,
    fit_activation_grid,
    fit_weight_grid,
    limits,
    short,
)
from diplugin.quantize.rounding import CompensatedRounding, NearestRounding


def significant_bits(value: float) -> int:
    mantissa = abs(float(value).as_integer_ratio()[0])
    while mantissa and mantissa % 2 == 0:
        mantissa //= 2
    return mantissa.bit_length()


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_short_numbers_have_few_significant_bits_and_stay_near(bits):
    values = torch.randn(1000) * torch.logspace(-6, 6, 1000)
    rounded = short(values, bits)
    assert max(significant_bits(v) for v in rounded.tolist()) <= bits
    assert bool(((rounded - values).abs() <= values.abs() * 2.0**-bits * 1.001).all())
    assert short(torch.zeros(1), bits).item() == 0


def test_limits_are_those_of_two_s_complement():
    low, high = limits(torch.tensor([0, 2, 4, 8]))
    assert low.tolist() == [0, -2, -8, -128]
    assert high.tolist() == [0, 1, 7, 127]


def test_a_negative_scale_turns_the_longer_side_up():
    weight = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    grid = fit_weight_grid(weight, torch.tensor([2]))
    assert grid.scale.item() < 0
    assert (grid.project(weight) - weight).abs().max() < 0.15


def test_fitted_grids_hold_their_integers_and_beat_the_plain_scale():
    weight = torch.randn(12, 40)
    for width in (2, 4):
        grid = fit_weight_grid(weight, torch.full((12,), width))
        plain = WeightGrid(grid.bits, weight.abs().amax(1) / 2 ** (width - 1))
        integers = grid.integers(weight)
        assert integers.min() >= -(2 ** (width - 1)) and integers.max() <= 2 ** (width - 1) - 1
        errors = [(g.project(weight) - weight).square().sum(1) for g in (grid, plain)]
        assert bool((errors[0] <= errors[1] * 1.01).all())


def test_one_scale_for_the_tensor_is_one_and_worse():
    weight = torch.randn(8, 30) * torch.logspace(-1, 1, 8)[:, None]
    bits = torch.full((8,), 4)
    tensor, channels = (fit(weight, bits, torch.ones(1, 30)) for fit in (TensorScale(), ChannelScales()))
    assert len(tensor.scale.unique()) == 1
    errors = [(grid.project(weight) - weight).square().sum(1) / weight.square().sum(1) for grid in (tensor, channels)]
    assert errors[1].mean() < 0.2 * errors[0].mean()


def test_no_bits_mean_zero_weights():
    grid = fit_weight_grid(torch.randn(3, 5), torch.zeros(3, dtype=torch.int64))
    assert not grid.project(torch.randn(3, 5)).any()
    assert bool((grid.scale != 0).all())


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_activation_grid_is_exact_on_its_points_and_near_elsewhere(shift):
    values = torch.rand(5000) * 4 + shift
    grid = fit_activation_grid(values)
    assert significant_bits(grid.scale) == 1
    projected = grid.project(values)
    assert torch.equal(grid.project(projected), projected)
    assert (projected - values).abs().mean() < grid.scale
    assert grid.project(torch.zeros(1)).item() == 0
    assert (grid.zero_point == 0) == (shift == 0)


def test_activation_grid_rounds_half_to_even_as_onnx_does():
    grid = ActivationGrid(0.5, 0)
    assert grid.project(torch.tensor([0.25, 0.75, 1.25, 1000.0, -3.0])).tolist() == [0.0, 1.0, 1.0, 127.5, 0.0]


def output_error(weight, values, gram):
    error = (values - weight).double()
    return torch.einsum("ci,ij,cj->c", error, gram.double(), error)


def test_compensation_beats_nearest_rounding_in_the_outputs():
    inputs = torch.randn(500, 6) @ torch.randn(6, 24) + 0.1 * torch.randn(500, 24)
    gram = inputs.T @ inputs / 500
    weight = torch.randn(16, 24)
    grid = fit_weight_grid(weight, torch.full((16,), 4))
    errors = {}
    for rounding in (NearestRounding(), CompensatedRounding()):
        integers = rounding(weight, gram[None], grid)
        assert torch.equal(integers, integers.round())
        assert integers.abs().max() <= 8
        errors[type(rounding)] = output_error(weight, integers * grid.scale[:, None], gram)
    assert errors[CompensatedRounding].sum() < 0.5 * errors[NearestRounding].sum()


def test_compensation_is_near_the_best_rounding_of_all():
    torch.manual_seed(3)
    inputs = torch.randn(300, 4) @ torch.randn(4, 4)
    gram = inputs.T @ inputs / 300
    weight = torch.randn(8, 4)
    grid = fit_weight_grid(weight, torch.full((8,), 2))
    choices = torch.tensor(list(itertools.product([-2.0, -1.0, 0.0, 1.0], repeat=4)))
    for row, scale, got in zip(weight, grid.scale, CompensatedRounding()(weight, gram[None], grid), strict=True):
        best = output_error(row.expand(len(choices), 4), choices * scale, gram).min()
        ours = output_error(row[None], got[None] * scale, gram)[0]
        none = output_error(row[None], torch.zeros(1, 4), gram)[0]
        assert ours - best <= 0.25 * (none - best)


def test_blocks_of_channels_have_inputs_of_their_own():
    gram = torch.stack([torch.eye(3), torch.tensor([[1.0, 0.9, 0], [0.9, 1.0, 0], [0, 0, 1.0]])])
    weight = torch.randn(6, 3)
    grid = fit_weight_grid(weight, torch.full((6,), 4))
    together = CompensatedRounding()(weight, gram, grid)
    for block in range(2):
        rows = slice(3 * block, 3 * block + 3)
        part = WeightGrid(grid.bits[rows], grid.scale[rows])
        alone = CompensatedRounding()(weight[rows], gram[block : block + 1], part)
        difference = output_error(weight[rows], together[rows] * part.scale[:, None], gram[block])
        assert torch.allclose(
            difference, output_error(weight[rows], alone * part.scale[:, None], gram[block]), rtol=0.5
        )
