"""What scoring costs, when it may stop, and what processes tell each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from diplugin.discriminant import EXACT, ChunkScores, Sketch
from diplugin.errors import UserError
from diplugin.features import (
    Observation,
    ScoreProfile,
    UntilStable,
    reliability,
    score_points,
)
from diplugin.features.sharing import pack, unpack
from diplugin.rank_correlation import rank_correlation
from diplugin.taps import TapPoint
from diplugin.team import Team, current_team

POINTS = (TapPoint("0", "out"), TapPoint("2", "in"), TapPoint("5", "in"))


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    patterns = torch.randn(3, 1, 8, 8, generator=generator)
    return torch.randn(count, 1, 8, 8, generator=generator) + patterns[labels], labels


def loader_of(x: Tensor, y: Tensor, batch: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), batch_size=batch)


class TwoReaders(nn.Module):
    """Two layers read one tensor; between them it may be written to."""

    def __init__(self, write: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.stem = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(1, 4, 3)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.first(x)
        if self.write:
            x.relu_()
        return (y + self.second(x)).mean((2, 3))


@pytest.mark.parametrize("write", [False, True])
def test_a_tensor_with_two_readers_is_scored_once_unless_it_changed(
    write: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diplugin.features import scene

    calls = []
    real = scene.chunk_scores
    monkeypatch.setattr(scene, "chunk_scores", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    x, y = images(40)
    points = (TapPoint("first", "in"), TapPoint("second", "in"))
    scores = score_points(TwoReaders(write), [(x, y)], points)
    assert len(calls) == (2 if write else 1)
    assert torch.equal(scores[points[0]].scores, scores[points[1]].scores) is not write


def test_the_sketch_reaches_the_hooks() -> None:
    model, (x, y) = small_net(), images(60)
    exact = score_points(model, [(x, y)], POINTS, Observation(sketch=EXACT))
    rough = score_points(model, [(x, y)], POINTS, Observation(sketch=Sketch(columns=70)))
    assert not torch.equal(exact[POINTS[0]].scores, rough[POINTS[0]].scores)


def test_profile_tells_time_and_memory_of_every_layer() -> None:
    model, (x, y) = small_net(), images(100)
    profile = ScoreProfile()
    score_points(model, [(x, y)], POINTS, Observation(chunk_size=50), profile=profile)
    assert [layer.point for layer in profile.layers] == [POINTS[0], POINTS[1], POINTS[2]]
    first = profile.layers[0]
    assert (first.calls, first.shape) == (2, (50, 5, 6, 6))
    assert first.map_mb == pytest.approx(50 * 5 * 36 * 4 / 1e6)
    assert 0 < profile.scoring_seconds < profile.total_seconds
    assert profile.ratio > 1


def chunk_of(scores: Tensor) -> dict[TapPoint, ChunkScores]:
    return {TapPoint("a", "in"): ChunkScores(scores.double(), 0.1, 1.0, 10)}


def test_reliability_is_the_correlation_with_fresh_images() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.linspace(0, 1, 200)

    def noisy(count: int) -> list[dict[TapPoint, ChunkScores]]:
        return [chunk_of(truth + torch.randn(200, generator=generator)) for _ in range(count)]

    told, fresh = [], []
    for _ in range(20):
        chunks_, others = noisy(20), noisy(20)
        told.append(reliability(chunks_))
        means = [torch.stack([c[TapPoint("a", "in")].scores for c in part]).mean(0) for part in (chunks_, others)]
        fresh.append(rank_correlation(*means))
    assert sum(told) / 20 == pytest.approx(sum(fresh) / 20, abs=0.03)
    assert reliability(noisy(1)) == 0


def test_scoring_stops_when_the_ranking_is_reliable() -> None:
    model = small_net()
    x, y = images(1000)
    read = []

    def watched() -> Iterator[tuple[Tensor, Tensor]]:
        for part, ids in zip(x.split(50), y.split(50), strict=True):
            read.append(len(ids))
            yield part, ids

    seen = Observation(chunk_size=50)
    scores = score_points(model, watched(), POINTS, seen, until=UntilStable(0.9))
    used = scores[POINTS[0]].images
    assert 200 <= used < 1000 and sum(read) < 1000
    alone = score_points(model, [(x[:used], y[:used])], POINTS, seen)
    torch.testing.assert_close(alone[POINTS[0]].scores, scores[POINTS[0]].scores, rtol=1e-5, atol=1e-9)
    everything = score_points(model, watched(), POINTS, seen, until=UntilStable(0.999999))
    assert everything[POINTS[0]].images == 1000
    with pytest.raises(UserError, match="reliability"):
        UntilStable(1.5)


def test_what_is_exchanged_comes_back_whole() -> None:
    other = TapPoint("b", "out")
    first = chunk_of(torch.arange(4)) | {other: ChunkScores(torch.ones(2, dtype=torch.float64), 0.5, 2.0, 7)}
    rows = pack([first, chunk_of(torch.zeros(4)), {}], [TapPoint("a", "in"), other], [4, 2])
    back = unpack(rows, [TapPoint("a", "in"), other], [4, 2])
    assert [set(chunk) for chunk in back] == [{TapPoint("a", "in"), other}, {TapPoint("a", "in")}, set()]
    assert torch.equal(back[0][other].scores, torch.ones(2, dtype=torch.float64))
    assert (back[0][other].di, back[0][other].ridge, back[0][other].images) == (0.5, 2.0, 7)
    x, y = images(10)
    sampler = DistributedSampler(TensorDataset(x, y), num_replicas=2, rank=0)
    assert current_team(DataLoader(TensorDataset(x, y), sampler=sampler)) == Team()  # alone: as the loader says
