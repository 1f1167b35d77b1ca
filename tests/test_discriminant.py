"""DI against its independent twins: autograd, brute force, scikit-learn; and the numerics that real features bring."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diplugin.discriminant import (
    EXACT,
    ChunkScores,
    ScoreAverage,
    Sketch,
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
from diplugin.errors import DataError, DISaturationWarning, UserError


def maps(images: int, *shape: int, seed: int = 0, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Rectified maps of which every second channel carries the label, and class ids."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes
    features = torch.randn(images, *shape, generator=generator, dtype=torch.float64)
    directions = torch.randn(classes, *shape, generator=generator, dtype=torch.float64)
    directions[:, ::2] = 0
    return (features + directions[labels]).relu(), labels


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


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens", "strided"])
def test_chunk_scores_equal_exact_scores_in_any_layout(layout: str) -> None:
    features, labels = maps(40, 6, 8, 8)
    features = features.float()
    exact = channel_scores(features, labels)
    dim = 1
    if layout == "channels_last":
        features = features.to(memory_format=torch.channels_last)
    elif layout == "tokens":
        features, dim = features.flatten(2).transpose(1, 2).contiguous(), -1
    elif layout == "strided":
        features = features.repeat(1, 1, 1, 2)[..., :8]
    chunk = chunk_scores(features, label_targets(labels), channel_dim=dim)
    torch.testing.assert_close(chunk.scores, exact, rtol=1e-5, atol=1e-9)
    plain = features.movedim(dim, 1)
    assert chunk.di == pytest.approx(float(discriminant_information(plain, labels)), rel=1e-5)
    assert chunk.ridge == pytest.approx(absolute_ridge(plain), rel=1e-5)


def test_chunks_add_up_whatever_their_order() -> None:
    features, labels = maps(90, 4, 6, 6)
    parts = [slice(0, 40), slice(40, 90)]
    chunks = [chunk_scores(features[p], label_targets(labels[p])) for p in parts]
    forth, back = ScoreAverage(), ScoreAverage()
    for chunk in chunks:
        forth.add(chunk)
    for chunk in reversed(chunks):
        back.add(chunk)
    expected = (40 * channel_scores(features[:40], labels[:40]) + 50 * channel_scores(features[40:], labels[40:])) / 90
    torch.testing.assert_close(forth.result().scores, expected)
    torch.testing.assert_close(back.result().scores, expected)
    assert forth.result().images == 90
    with pytest.raises(DataError, match="no chunk"):
        ScoreAverage().result()


def test_label_forms_agree() -> None:
    features, ids = maps(30, 5)
    expected = channel_scores(features, ids)
    one_hot = torch.nn.functional.one_hot(ids, 4)
    wide = torch.cat([one_hot.double(), torch.zeros(30, 100)], 1)  # more columns than images, most of them empty
    rotation = torch.linalg.qr(torch.randn(60, 4, dtype=torch.float64))[0]
    logits = one_hot.double() @ rotation.T  # the same targets, seen from another basis of 60 dimensions
    for form in (ids * 10, ids.int(), one_hot, one_hot.bool(), one_hot.float(), wide, logits, logits * 1e20):
        torch.testing.assert_close(channel_scores(features, form), expected, rtol=1e-8, atol=1e-13)
    multi = (torch.arange(30)[:, None] % torch.tensor([2, 3, 5]) == 0).long()
    assert 0 < float(discriminant_information(features, multi)) < 1


def test_balanced_targets_weigh_every_class_the_same() -> None:
    ids = torch.tensor([0] * 90 + [1] * 9 + [2] * 1)
    balanced = label_targets(ids, class_weight="balanced")
    assert float(balanced.square().sum()) == pytest.approx(2.0)  # L − 1
    torch.testing.assert_close(balanced.mean(0), torch.zeros(3, dtype=torch.float64))
    assert label_targets(ids, num_classes=7, class_weight="balanced").shape == (100, 7)
    assert label_targets(ids, class_weight="balanced").dtype == torch.float64


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (torch.zeros(4, 2, 2), {}, "got shape"),
        (torch.zeros(8).long(), {}, "all 8 labels are the same"),
        (torch.ones(8, 3), {}, "all 8 labels are the same"),
        (torch.zeros(8, 0), {}, "the same"),
        (torch.zeros(0).long(), {}, "two images or more, got 0"),
        (torch.zeros(1).long(), {}, "two images or more, got 1"),
        (torch.tensor([0, 1, 7]), {"num_classes": 5}, "num_classes=5, got 7"),
        (torch.tensor([0, 1, -100]), {}, "got -100"),
        (torch.tensor([0.5, 1.0]), {}, "class ids are integers"),
        (torch.tensor([[0.5], [math.nan]]), {}, "NaN or infinity"),
        (torch.tensor([[0.5], [0.2]]), {"class_weight": "balanced"}, "0/1 targets"),
    ],
)
def test_unusable_labels_are_named(labels: Tensor, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        label_targets(labels, **options)
    assert "\n" not in str(error.value)


def test_unusable_features_and_settings_are_named() -> None:
    features, labels = maps(8, 3, 5, 5)
    broken = features.clone()
    broken[2, 1] = math.nan
    cases = [
        (broken, labels, "NaN or infinity"),
        (features.float() * math.inf, labels, "NaN or infinity"),
        (features[:7], labels, "7 feature maps and 8 labels"),
        (features[:, 0, 0, 0], labels, r"maps \[N, C, ...\]"),
        (features.long(), labels, "int64"),
        (features[:, :0], labels, "a channel"),
    ]
    for maps_, ids, message in cases:
        with pytest.raises(DataError, match=message):
            channel_scores(maps_, ids)
        with pytest.raises(DataError, match=message):
            chunk_scores(maps_, label_targets(ids))
    for options in ({"rho": 0.0}, {"rho": -1.0}, {"ridge": 0.0}, {"rho": math.nan}, {"class_weight": "even"}):
        with pytest.raises(UserError):
            channel_scores(features, labels, **options)
    with pytest.raises(DataError, match="pooled"):
        backward_elimination(features, labels)
    with pytest.raises(DataError, match="errors have"):
        perturbation_scores(features, features[:, :2], labels)
    with pytest.raises(DataError, match="too small"):
        channel_scores(torch.ones(8, 30) * torch.arange(8.0)[:, None], labels, rho=1e-30)


def test_saturation_warns() -> None:
    features, labels = maps(10, 5, 8, 8)
    with pytest.warns(DISaturationWarning, match="larger rho"):
        channel_scores(features, labels, rho=1e-6)


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


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("targets", ["a class an image", "logits"])
def test_many_directions_of_which_some_stand_out(targets: str, channel_dim: int) -> None:
    """Beyond 32 directions the rest count alike: the scores of maps with a thousand targets stay what they are."""
    generator = torch.Generator().manual_seed(0)
    strength = torch.logspace(0, -2, 40)[:, None, None]
    smooth = torch.randn(96, 40, 5, 5, generator=generator) * strength + torch.randn(40, 1, 1, generator=generator)
    features = torch.nn.functional.interpolate(smooth, scale_factor=2.0).relu()
    if targets == "logits":
        logits = features.mean((2, 3)) @ torch.randn(40, 1000, generator=generator)
        y = label_targets(logits + 0.1 * torch.randn(96, 1000, generator=generator))
    else:
        y = label_targets(torch.randint(1000, (96,), generator=generator))
    maps_in_order = features if channel_dim == 1 else features.movedim(1, -1).contiguous()
    exact = chunk_scores(maps_in_order, y, channel_dim=channel_dim, sketch=EXACT)
    shipped = chunk_scores(maps_in_order, y, channel_dim=channel_dim)
    torch.testing.assert_close(shipped.scores, exact.scores, rtol=0.15, atol=0)
    assert rank_correlation(shipped.scores, exact.scores) > 0.995
    assert shipped.di == pytest.approx(exact.di, rel=1e-6)


def test_rank_deficient_features() -> None:
    base, labels = maps(30, 2)
    features = base @ torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ridge = absolute_ridge(features)
    wide = channel_scores(features, labels, ridge=ridge)  # D > N: dual
    narrow = channel_scores(features[:, :20], labels, ridge=ridge)  # D < N: primal
    assert bool(torch.isfinite(wide).all() and torch.isfinite(narrow).all())
    assert np.isfinite(removal_losses(features, labels).numpy()).all()
    assert isinstance(chunk_scores(features, label_targets(labels)), ChunkScores)


def photographs(images: int, channels: int, side: int, classes: int) -> tuple[Tensor, Tensor]:
    """Rectified maps as networks make them: smooth over positions, channels of unlike strength, labels in some."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(images) % classes
    coarse = torch.randn(images, channels, side // 4, side // 4, generator=generator)
    signal = torch.randn(classes, channels, side // 4, side // 4, generator=generator)
    strength = torch.rand(channels, generator=generator).view(-1, 1, 1)
    maps_ = torch.nn.functional.interpolate(coarse + strength * signal[labels], size=(side, side), mode="bilinear")
    return (maps_ + 0.3 * torch.randn(maps_.shape, generator=generator)).relu(), labels


def rank_correlation(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize("layout", ["maps", "channels_last", "tokens"])
@pytest.mark.parametrize("classes", [5, 80])
def test_sketched_scores_rank_as_exact_ones(layout: str, classes: int) -> None:
    features, labels = photographs(96, 24, 64, classes)
    targets = label_targets(labels)
    dim = 1
    if layout == "channels_last":
        features = features.to(memory_format=torch.channels_last)
    elif layout == "tokens":
        features, dim = features.flatten(2).transpose(1, 2).contiguous(), -1
    exact = chunk_scores(features, targets, channel_dim=dim, sketch=EXACT)
    sketched = chunk_scores(features, targets, channel_dim=dim)
    assert not torch.equal(sketched.scores, exact.scores)
    assert rank_correlation(sketched.scores, exact.scores) >= 0.99
    torch.testing.assert_close(sketched.scores, exact.scores, rtol=0.1, atol=0)
    assert sketched.ridge == pytest.approx(exact.ridge, rel=0.05)
    assert sketched.di == pytest.approx(exact.di, rel=0.05)
    again = chunk_scores(features, targets, channel_dim=dim)
    assert torch.equal(again.scores, sketched.scores)  # the draw is fixed
    absolute = chunk_scores(features, targets, ridge=exact.ridge, channel_dim=dim)
    torch.testing.assert_close(absolute.scores, exact.scores, rtol=0.1, atol=0)


def test_a_sketch_that_misses_what_varies_gives_way_to_the_exact_scores() -> None:
    features, labels = torch.zeros(20, 4, 40, 40), torch.arange(20) % 2
    features[:, 1, 7, 7] = labels.float()
    targets = label_targets(labels)
    exact = chunk_scores(features, targets, sketch=EXACT)
    assert float(exact.scores[1]) > 0
    torch.testing.assert_close(chunk_scores(features, targets, sketch=Sketch(columns=50)).scores, exact.scores)
    features[3, 2, 9, 9] = math.nan  # in a position that is not drawn
    features[:, 0] = torch.randn(20, 40, 40, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="NaN"):
        chunk_scores(features, targets, sketch=Sketch(columns=3000))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    images=st.integers(3, 30),
    channels=st.integers(2, 6),
    side=st.integers(1, 6),
    power=st.integers(-20, 20),
    half=st.booleans(),
)
@pytest.mark.filterwarnings("ignore::diplugin.errors.DISaturationWarning")
def test_streaming_equals_exact_whatever_the_features(
    seed: int, images: int, channels: int, side: int, power: int, half: bool
) -> None:
    """Dead, constant and duplicate channels, any scale, single samples a class: finite, scale-free, alike."""
    features, labels = maps(images, channels, side, side, seed=seed, classes=max(2, min(images, 1 + seed % 40)))
    features[:, -1] = (features[:, 0], torch.zeros(()), torch.full((), 3.0))[seed % 3]
    exact = channel_scores(features, labels)
    given_ = features.to(torch.bfloat16) if half and abs(power) < 10 else (features * 10.0**power).float()
    scored = chunk_scores(given_, label_targets(labels))
    assert bool(torch.isfinite(scored.scores).all()) and bool((scored.scores >= 0).all())
    assert 0 <= scored.di < 1
    loose = 0.2 if given_.dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(scored.scores, exact, rtol=loose, atol=loose * float(exact.max()) + 1e-12)
