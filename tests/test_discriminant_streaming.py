"""Scores by chunks, in any layout, along many directions and by sketches, against the exact ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled_maps import maps
from torch import Tensor

from diplugin.discriminant import (
    EXACT,
    ScoreAverage,
    Sketch,
    absolute_ridge,
    channel_scores,
    chunk_scores,
    discriminant_information,
    label_targets,
)
from diplugin.errors import DataError
from diplugin.rank_correlation import rank_correlation


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


def photographs(images: int, channels: int, side: int, classes: int) -> tuple[Tensor, Tensor]:
    """Rectified maps as networks make them: smooth over positions, channels of unlike strength, labels in some."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(images) % classes
    coarse = torch.randn(images, channels, side // 4, side // 4, generator=generator)
    signal = torch.randn(classes, channels, side // 4, side // 4, generator=generator)
    strength = torch.rand(channels, generator=generator).view(-1, 1, 1)
    maps_ = torch.nn.functional.interpolate(coarse + strength * signal[labels], size=(side, side), mode="bilinear")
    return (maps_ + 0.3 * torch.randn(maps_.shape, generator=generator)).relu(), labels


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


@pytest.mark.filterwarnings("ignore::diplugin.errors.DISaturationWarning")
@pytest.mark.parametrize("rho", [1e-2, 1e-4, 1e-5, 1e-7])
@pytest.mark.parametrize("absolute", [False, True])
def test_a_small_ridge_loses_no_digits_on_maps_of_few_dimensions(rho: float, absolute: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (120,), generator=draw)
    upsampled = torch.randn(120, 3, generator=draw) + torch.randn(10, 3, generator=draw)[labels]
    features = (upsampled @ torch.randn(3, 8 * 40, generator=draw)).view(120, 8, 40)
    given_ = {"ridge": absolute_ridge(features, rho)} if absolute else {"rho": rho}
    scored = chunk_scores(features, label_targets(labels), **given_)
    torch.testing.assert_close(scored.scores, channel_scores(features, labels, rho), rtol=1e-3, atol=0)
    assert scored.di == pytest.approx(float(discriminant_information(features, labels, rho)), rel=1e-5)


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
