"""DI is what scikit-learn says it is, on digits, on a trained network and on unbalanced problems."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from diplugin.discriminant import channel_scores
from diplugin.errors import DataError, ModelError
from diplugin.groups import trace_groups
from diplugin.reference import (
    check_identities,
    l1_norms,
    lda_accuracy,
    plot_validation,
    save_validation,
    validate_layer,
    validate_network,
)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


@pytest.fixture(scope="module")
def trained(digits: tuple[Tensor, Tensor]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(24, 10),
    )  # fmt: skip
    images, labels = digits
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(6):
        for picked in torch.randperm(1024).split(128):
            loss = nn.functional.cross_entropy(model(images[picked]), labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def test_identities_on_digits(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    for rho in (0.1, 10.0):
        for identity in check_identities(images.flatten(1)[:600], labels[:600], rho):
            assert identity.relative_difference < 1e-6, identity
            assert identity.ours > 0.01


@pytest.mark.parametrize("seed", range(20))
def test_identities_on_unbalanced_problems(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    classes = 2 + seed % 5
    sizes = torch.randint(2, 60, (classes,), generator=generator)
    labels = torch.repeat_interleave(torch.arange(classes), sizes)
    width = 3 + 7 * seed % 40
    centres = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    features = (torch.randn(len(labels), width, generator=generator, dtype=torch.float64) + centres[labels]) @ mixing
    for identity in check_identities(features, labels, rho=0.1):
        assert identity.relative_difference < 1e-6, identity


def test_validation_of_a_trained_network(trained: nn.Module, digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    images, labels = digits
    loader = DataLoader(TensorDataset(images[:600], labels[:600]), batch_size=64)
    groups = trace_groups(trained, (images[:1],))
    layers = validate_network(trained, loader, groups, images=500)
    assert {layer.layer for layer in layers} == {"0", "4"}
    for layer in layers:
        assert layer.images == 500
        assert layer.worst_difference < 1e-6
        assert layer.non_decreasing
        assert layer.random_order[-1] == pytest.approx(layer.greedy_order[-1])  # all channels, either way
        assert {row.criterion for row in layer.accuracies} == {"DI", "DI, eliminated", "variance", "L1", "random"}
        whole = {round(row.accuracy, 9) for row in layer.accuracies if row.kept == layer.channels}
        assert len(whole) == 1 and whole.pop() > 0.5
    save_validation(layers, tmp_path / "v.json")
    stored = json.loads((tmp_path / "v.json").read_text())
    assert stored["layers"][0]["identities"][0]["referee"] == "LDA"
    plot_validation(layers, tmp_path / "v.png")
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")


def test_network_is_left_as_it_was(trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    groups = trace_groups(trained, (images[:1],))
    trained.train()
    try:
        validate_network(trained, [(images[:100], labels[:100])], groups, images=100)
        assert all(module.training for module in trained.modules())
    finally:
        trained.eval()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trained.modules())
    with pytest.raises(DataError, match="empty"):
        validate_network(trained, [], groups)
    with pytest.raises(ModelError, match="channel group"):
        validate_network(trained, [(images, labels)], [])


def test_accuracy_prefers_informative_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    features = torch.randn(200, 10, generator=generator)
    features[:, :3] += 3 * torch.randn(4, 3, generator=generator)[labels]
    features[:, 5:] *= 20  # loud, and empty
    good = lda_accuracy(features, labels, lambda x, y: -torch.arange(10.0), [3])
    bad = lda_accuracy(features, labels, lambda x, y: torch.arange(10.0), [3])
    assert good[0] > 0.7 > 0.4 > bad[0]
    with pytest.raises(DataError, match="two classes"):
        lda_accuracy(features, torch.zeros(200).long(), lambda x, y: torch.arange(10.0), [3])


@pytest.mark.parametrize("ids", [[0] * 19 + [1], [*range(11), 0], [*range(9), 0]])
def test_classes_of_too_few_images_are_named(ids: list[int]) -> None:
    features = torch.randn(len(ids), 6, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="classes of several images each, got a fold of"):
        lda_accuracy(features, torch.tensor(ids), lambda x, y: channel_scores(x, y), [3])
    with pytest.raises(DataError):
        validate_layer("layer", features, torch.tensor(ids))


def test_unusable_features_are_named() -> None:
    with pytest.raises(DataError, match="more images than classes, got 12 and 12"):
        check_identities(torch.randn(12, 3), torch.arange(12))
    with pytest.raises(DataError, match="class ids"):
        check_identities(torch.randn(20, 3), torch.randn(20, 2))
    with pytest.raises(DataError, match="do not vary"):
        check_identities(torch.ones(20, 3), torch.arange(20) % 2)


def test_l1_norms_follow_producers_and_transposed_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    groups = {group.name: group for group in trace_groups(model, (torch.randn(1, 1, 8, 8),))}
    for name, dims in (("0", (1, 2, 3)), ("2", (0, 2, 3))):
        weight: Tensor = model[int(name)].weight  # type: ignore[assignment]
        norms = l1_norms(model, groups[name])
        assert norms is not None
        torch.testing.assert_close(norms, weight.detach().double().abs().sum(dims))


def test_layer_without_positions() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(60) % 3
    features = torch.randn(60, 5, generator=generator) + torch.eye(3, 5)[labels]
    layer = validate_layer("pooled", features, labels)
    assert layer.worst_difference < 1e-6 and layer.non_decreasing and layer.channels == 5
