"""DI against its independent twins: autograd, brute force, scikit-learn; and the numerics that real features bring."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled_maps import maps
from torch import Tensor

from diplugin.discriminant import (
    ChunkScores,
    absolute_ridge,
    backward_elimination,
    channel_scores,
    chunk_scores,
    discriminant_information,
    feature_gradient,
    label_targets,
    perturbation_scores,
    removal_losses,
)


def naive_di(features: Tensor, labels: Tensor, ridge: float) -> Tensor:
    """The definition, by an explicit inverse: nothing shared with the package."""
    x = features.double().flatten(1)
    x = x - x.mean(0)
    y = torch.eye(int(labels.max()) + 1, dtype=torch.float64)[labels]
    y = y - y.mean(0)
    inverse = torch.linalg.inv(x @ x.T + ridge * torch.eye(len(x), dtype=torch.float64))
    return torch.trace(y.T @ x @ x.T @ inverse @ y) / y.square().sum()


SHAPES = [(30, 5, 3, 3), (30, 5), (12, 20), (40, 6, 2), (9, 2, 5, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_the_mask_gradient_at_fixed_ridge(shape: tuple[int, ...]) -> None:
    features, labels = maps(*shape)
    ridge = absolute_ridge(features)
    for di in (naive_di, lambda f, y, r: discriminant_information(f, y, ridge=r)):
        mask = torch.ones(shape[1], dtype=torch.float64, requires_grad=True)
        di(features * mask.view(-1, *[1] * (len(shape) - 2)), labels, ridge).backward()
        torch.testing.assert_close(channel_scores(features, labels), mask.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rho", [0.01, 10.0])
def test_removal_loss_is_brute_force(shape: tuple[int, ...], rho: float) -> None:
    features, labels = maps(*shape)
    ridge = absolute_ridge(features, rho)
    whole = naive_di(features, labels, ridge)
    brute = []
    for channel in range(shape[1]):
        rest = [c for c in range(shape[1]) if c != channel]
        brute.append(whole - naive_di(features[:, rest], labels, ridge))
    torch.testing.assert_close(removal_losses(features, labels, rho), torch.stack(brute), rtol=1e-7, atol=1e-11)


def test_backward_elimination_removes_the_least_exact_loss_each_time() -> None:
    features, labels = maps(40, 8)
    ridge = absolute_ridge(features, 0.1)
    left, order, losses = list(range(8)), [], []
    while left:
        whole = naive_di(features[:, left], labels, ridge)
        each = [whole - naive_di(features[:, [c for c in left if c != gone]], labels, ridge) for gone in left]
        best = int(torch.stack(each).argmin())
        order.append(left.pop(best))
        losses.append(each[best])
    result = backward_elimination(features, labels, rho=0.1)
    assert result.order.tolist() == order
    torch.testing.assert_close(result.losses, torch.stack(losses), rtol=1e-6, atol=1e-10)
    assert backward_elimination(features, labels, rho=0.1, keep=3).order.tolist() == order[:5]


@pytest.mark.parametrize("shape", [(30, 5, 3, 3), (30, 7)])
def test_perturbation_scores_are_the_derivative_along_the_error(shape: tuple[int, ...]) -> None:
    features, labels = maps(*shape)
    ridge = absolute_ridge(features)
    errors = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    changes = perturbation_scores(features, errors, labels)
    for error, change in zip(errors, changes, strict=True):
        step = torch.zeros(shape[1], dtype=torch.float64, requires_grad=True)
        wide = step.view(-1, *[1] * (len(shape) - 2))
        naive_di(features + wide * error, labels, ridge).backward()
        torch.testing.assert_close(change, step.grad, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(perturbation_scores(features, errors[0], labels), changes[0])
    torch.testing.assert_close(perturbation_scores(features, -features, labels), -channel_scores(features, labels))


def test_feature_gradient_is_autograd_of_di() -> None:
    features, labels = maps(20, 3, 4, 4)
    features.requires_grad_()
    naive_di(features, labels, absolute_ridge(features)).backward()
    torch.testing.assert_close(feature_gradient(features, labels), features.grad, rtol=1e-8, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    images=st.integers(4, 24),
    channels=st.integers(1, 6),
    side=st.integers(1, 3),
    rho=st.sampled_from([1e-3, 0.1, 10.0, 1e3]),
)
@pytest.mark.filterwarnings("ignore::diplugin.errors.DISaturationWarning")
def test_di_never_falls_when_a_channel_is_added(seed: int, images: int, channels: int, side: int, rho: float) -> None:
    features, labels = maps(images, channels, side, side, seed=seed, classes=3)
    ridge = absolute_ridge(features, rho)
    before = 0.0
    for count in range(1, channels + 1):
        di = float(discriminant_information(features[:, :count], labels, ridge=ridge))
        assert before - 1e-12 <= di < 1
        before = di
    assert bool((removal_losses(features, labels, rho) >= -1e-12).all())


def test_ridge_and_kernel_ridge_give_the_same_value() -> None:
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.linear_model import Ridge

    features, labels = maps(60, 12)
    ridge = absolute_ridge(features)
    x = (features - features.mean(0)).numpy()
    y = label_targets(labels).numpy()
    for model in (Ridge(alpha=ridge), KernelRidge(alpha=ridge, kernel="linear")):
        fitted = model.fit(x, y).predict(x)
        twin = float((y * fitted).sum() / (y * y).sum())
        assert float(discriminant_information(features, labels)) == pytest.approx(twin, rel=1e-9)


def test_primal_and_dual_give_the_same_numbers() -> None:
    features, labels = maps(24, 8, 2, 2)  # D = 32 > N: dual
    twice = features.repeat(2, 1, 1, 1)  # N = 48 > D: primal; the sums double, so the ridge does
    both = labels.repeat(2)
    ridge = absolute_ridge(features)
    for function in (discriminant_information, channel_scores, removal_losses):
        torch.testing.assert_close(
            function(twice, both, ridge=2 * ridge), function(features, labels, ridge=ridge), rtol=1e-9, atol=1e-13
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_results_are_float64_and_float64_is_not_rounded(dtype: torch.dtype) -> None:
    features, labels = maps(30, 5, 3, 3)
    exact = channel_scores(features, labels)
    for scores in (
        channel_scores(features.to(dtype), labels),
        chunk_scores(features.to(dtype), label_targets(labels)).scores,
    ):
        assert scores.dtype == torch.float64
        error = float((scores - exact).abs().max() / exact.max())
        assert error < {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    tiny = torch.zeros(30, 1, dtype=torch.float64)
    tiny[::2] = 1e-9
    seen = 1.0 + tiny  # float32 would see a constant
    assert float(discriminant_information(seen, labels % 2)) == pytest.approx(
        float(discriminant_information(tiny, labels % 2)), rel=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(20, 6, 4, 4), (20, 6)])
def test_hard_numerics(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    features, labels = maps(*shape)
    targets = label_targets(labels)
    exact = channel_scores(features, labels)

    def both(maps_: Tensor) -> list[Tensor]:
        return [channel_scores(maps_.to(dtype), labels), chunk_scores(maps_.to(dtype), targets).scores]

    for scale in (1e20, 1e-20, 1.0):
        for scores in both(features * scale):
            torch.testing.assert_close(scores, exact, rtol=1e-4, atol=1e-7)
    dead = features.clone()
    dead[:, 2] = 0
    constant = features.clone()
    constant[:, 2] = 0.1
    for scores in (*both(dead), *both(constant)):
        assert float(scores[2]) < 1e-12
        assert bool(torch.isfinite(scores).all())
    for nothing in (torch.zeros(shape), torch.full(shape, 0.1), torch.full(shape, 1e30)):
        for scores in both(nothing):
            assert scores.tolist() == [0.0] * 6
        assert removal_losses(nothing.to(dtype), labels).tolist() == [0.0] * 6
        assert float(discriminant_information(nothing.to(dtype), labels)) == 0
        assert not bool(feature_gradient(nothing.to(dtype), labels).any())
    for scores in both(features + 1e4):  # a mean that dwarfs the variation
        torch.testing.assert_close(scores, exact, rtol=0.02, atol=1e-4)


def test_duplicates_are_nearly_free_only_for_a_small_ridge() -> None:
    features, labels = maps(60, 6)
    twins = torch.cat([features, features[:, :1]], 1)
    for rho, low, high in ((1e-6, 0.0, 0.01), (10.0, 0.3, 1.0)):
        losses = removal_losses(twins, labels, rho)
        alone = removal_losses(features, labels, ridge=absolute_ridge(twins, rho))
        assert low <= float(losses[0] / alone[0]) < high
        torch.testing.assert_close(losses[0], losses[-1])
    order = backward_elimination(twins, labels, rho=1e-6).order.tolist()
    assert abs(order.index(0) - order.index(6)) >= 1  # once one is gone, the other is not free
    assert min(order.index(0), order.index(6)) == 0


def test_one_sample_a_class_and_a_thousand_classes() -> None:
    features, _ = maps(128, 10, 4, 4)
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:128]
    targets = label_targets(ids, num_classes=1000)
    assert targets.shape == (128, 1000)
    exact = channel_scores(features, ids)
    torch.testing.assert_close(chunk_scores(features.float(), targets).scores, exact, rtol=1e-4, atol=1e-8)
    assert float(naive_di(features, ids, absolute_ridge(features))) == pytest.approx(
        float(discriminant_information(features, ids)), rel=1e-9
    )


def test_rank_deficient_features() -> None:
    base, labels = maps(30, 2)
    features = base @ torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ridge = absolute_ridge(features)
    wide = channel_scores(features, labels, ridge=ridge)  # D > N: dual
    narrow = channel_scores(features[:, :20], labels, ridge=ridge)  # D < N: primal
    assert bool(torch.isfinite(wide).all() and torch.isfinite(narrow).all())
    assert np.isfinite(removal_losses(features, labels).numpy()).all()
    assert isinstance(chunk_scores(features, label_targets(labels)), ChunkScores)
