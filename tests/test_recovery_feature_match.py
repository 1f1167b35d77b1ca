"""Features matched in the teacher's discriminant subspace: its directions are LDA's, the loss is the formula's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bars import INPUTS, bars, trained_on_bars
from torch import Tensor, nn
from torch.utils.data import DataLoader

import diplugin
from diplugin.costs import macs
from diplugin.discriminant import discriminant_directions, discriminant_information
from diplugin.errors import DataError, UserError
from diplugin.network import trace_network
from diplugin.plan import PruningPlan
from diplugin.recovery import (
    FeatureDistillation,
    feature_loss,
    matching,
    train,
)
from diplugin.search import FixedScores, greedy_search
from diplugin.verification import silence

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]


def clouds(images: int = 120, channels: int = 7, classes: int = 4) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    labels = (classes * torch.rand(images, generator=draw).square()).long()
    centres = torch.randn(classes, channels, generator=draw, dtype=torch.float64)
    return centres[labels] + torch.randn(images, channels, generator=draw, dtype=torch.float64), labels


def test_directions_are_the_leading_eigenvectors() -> None:
    x, y = clouds()
    rho = 5.0
    got = discriminant_directions(x, y, rho, class_weight="balanced").numpy()
    centred = x.numpy() - x.numpy().mean(0)
    total, between = centred.T @ centred, np.zeros((7, 7))
    for k in range(4):
        mean = centred[y.numpy() == k].mean(0)
        between += (y.numpy() == k).sum() * np.outer(mean, mean)
    ridge = rho * np.trace(total) / len(x)
    values, vectors = np.linalg.eig(np.linalg.solve(total + ridge * np.eye(7), between))
    order = np.argsort(-values.real)[:3]
    for mine, theirs in zip(got.T, vectors.real[:, order].T, strict=True):
        cosine = abs(mine @ theirs) / np.linalg.norm(mine) / np.linalg.norm(theirs)
        assert cosine == pytest.approx(1.0, abs=1e-9)
    assert np.allclose((centred @ got).var(0), 1.0), "the teacher's spread is the unit"
    di = float(discriminant_information(x, y, rho, class_weight="balanced"))
    assert values.real.sum() / 3 == pytest.approx(di), "the eigenvalues add up to DI"


def test_directions_are_those_of_linear_discriminant_analysis() -> None:
    from sklearn.covariance import EmpiricalCovariance
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, y = clouds()
    rho = 2.0
    centred = x - x.mean(0)
    ridge = rho * float(centred.square().sum()) / len(x)

    class Ridged(EmpiricalCovariance):
        def fit(self, X: Any, y: Any = None) -> Any:
            super().fit(X)
            self.covariance_ = self.covariance_ + ridge / len(x) * np.eye(7)
            return self

    lda = LinearDiscriminantAnalysis(solver="eigen", covariance_estimator=Ridged()).fit(x.numpy(), y.numpy())
    theirs = lda.scalings_[:, :3]
    got = discriminant_directions(x, y, rho, class_weight="balanced").numpy()
    for one, two in zip(got.T, theirs.T, strict=True):
        assert abs(one @ two) / np.linalg.norm(one) / np.linalg.norm(two) == pytest.approx(1.0, abs=1e-9)
    assert discriminant_directions(x, y, rho, count=2, class_weight="balanced").shape == (7, 2)


def test_features_that_say_nothing_have_no_directions() -> None:
    with pytest.raises(DataError, match="nothing"):
        discriminant_directions(torch.zeros(8, 3), torch.arange(8) % 2)
    labels = torch.arange(40) % 2
    telling = torch.nn.functional.one_hot(labels).double() - 0.5
    features = torch.randn(40, 3, dtype=torch.float64)
    features -= features.mean(0)
    features -= telling @ torch.linalg.pinv(telling) @ features  # up to rounding
    with pytest.raises(DataError, match="nothing"):
        discriminant_directions(features, labels)


def test_the_feature_loss_by_hand() -> None:
    x, y = clouds()
    other = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    directions = discriminant_directions(x, y)
    by_hand = np.mean(((other - x).numpy() @ directions.numpy()) ** 2)
    assert float(feature_loss(other, x, directions)) == pytest.approx(by_hand)
    assert float(feature_loss(x.mean(0).expand_as(x), x, directions)) == pytest.approx(1.0)
    free = torch.linalg.svd(directions.T)[2][-1]  # no direction sees it
    assert float(feature_loss(x + free, x, directions)) == pytest.approx(0.0, abs=1e-20)


@pytest.mark.parametrize("kind", ["plain", "vgg", "residual", "tokens", "transposed"])
def test_the_match_reads_the_channels_that_both_networks_have(make_net: MakeNet, kind: str) -> None:
    teacher, inputs = make_net(kind)
    trace = trace_network(teacher, inputs)
    cost = macs(trace)
    x, y = torch.randn(80, 3, 8, 8), torch.arange(80) % 4
    scores = {g.name: torch.rand(g.channels, dtype=torch.float64) for g in trace.prunable}
    plan = greedy_search(trace, FixedScores(trace.prunable, scores), [cost], [diplugin.Budget("macs", fraction=0.5)])
    # A network whose removed channels are silent is the pruned one: features of the channels that stay are equal.
    silent = copy.deepcopy(teacher)
    silence(silent, trace.prunable, plan.removed)
    student = diplugin.apply_plan(copy.deepcopy(teacher), plan, inputs)
    settings = FeatureDistillation(feature_weight=1.0)
    for net in (silent, teacher):
        with matching(student, net, trace, plan, [(x, y)], settings) as loss, torch.no_grad():
            net(x), student(x)
            assert (float(loss()) < 1e-8) == (net is silent)


def test_the_match_teaches_features() -> None:
    trained, loader = trained_on_bars(), DataLoader(bars(300, 1), batch_size=50)
    trace = trace_network(trained, INPUTS)
    everything = PruningPlan({n: tuple(range(w)) for n, w in trace.base_widths.items()}, trace.base_widths)
    settings = FeatureDistillation(epochs=10, lr=0.05, feature_weight=5.0)
    x, distances = next(iter(loader))[0], []
    for matched in (True, False):
        student = copy.deepcopy(trained)
        with torch.no_grad():
            for p in student.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        with matching(student, trained, trace, everything, loader, settings) as loss:
            train(student, loader, settings, teacher=trained, extra=loss if matched else None)
            with torch.no_grad():
                student.eval()(x), trained(x)
                distances.append(float(loss()))
        assert not any(m._forward_pre_hooks for m in (*student.modules(), *trained.modules()))
    assert distances[0] < 0.8 * distances[1]


@pytest.mark.parametrize(
    ("name", "values"),
    [("teacher_weight", (0.0, 1.5, "1")), ("feature_weight", (-1.0, float("inf"))), ("rho", (0.0, None)),
     ("images", (1, 2.5, "4"))],
)  # fmt: skip
def test_settings_of_the_match(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(UserError, match=f"expected {name} .*, got {value!r}"):
            FeatureDistillation(**{name: value})
