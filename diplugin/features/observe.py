"""Running a model over a data set and bringing home one vector of scores for every tapped tensor."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..discriminant import ChunkScores, ScoreAverage, Sketch, label_targets, unit_targets, warn_if_saturated
from ..errors import DataError, DipluginError, ModelError, OneClassWarning, first_line
from ..taps import TapPoint
from ..team import Team, current_team
from .batches import CHUNK_SIZE, Forward, GetLabels, chunks, device_of, forward_inputs, labels_of, to_device
from .profile import ScoreProfile
from .scene import Scene, observing
from .sharing import Chunk, exchange
from .stability import UntilStable, reliability

DEFAULT_SKETCH = Sketch()


@dataclass(frozen=True)
class Observation:
    """What is run and how its labels are read; one object for scoring, calibration and both adapters."""

    get_labels: GetLabels = labels_of
    forward: Forward = forward_inputs
    rho: float = 10.0
    class_weight: str | None = None
    chunk_size: int = CHUNK_SIZE
    sketch: Sketch = DEFAULT_SKETCH


def score_points(
    model: nn.Module,
    loader: Iterable[Any],
    points: Sequence[TapPoint],
    observation: Observation | None = None,
    *,
    until: UntilStable | None = None,
    profile: ScoreProfile | None = None,
) -> dict[TapPoint, ChunkScores]:
    """First-order DI scores of every channel of every tapped tensor, averaged over chunks.

    The model runs in eval mode without gradients; hooks and modes are as before afterwards, whatever happens. Where
    `torch.distributed` is initialised the chunks are shared out (`features.sharing`) and every process returns the
    scores of all.

    Args:
        until: stop before the data ends, once the ranking is reliable.
        profile: a notebook for time and memory, layer by layer, and for the reliability of the ranking.

    Returns:
        scores (float64, [channels], fractions of label variance) per point; a layer that never ran is left out.

    Raises:
        DataError: an empty loader, unusable labels, NaN features, or labels that never differ within a chunk.
        ModelError: a layer that the model does not have.
    """
    seen = observation or Observation()
    team = current_team(loader)
    points = tuple(dict.fromkeys(points))
    started = time.perf_counter()
    with observing(model, points, profile) as scene, torch.no_grad():
        scored = _run(model, loader, points, seen, team, scene, until)
    if profile is not None:
        profile.total_seconds += time.perf_counter() - started
        profile.reliability = reliability([chunk for chunk in scored if chunk])
    averages = {point: ScoreAverage() for point in points}
    for chunk in scored:
        for point, scores in chunk.items():
            averages[point].add(scores)
    results = {point: average.result() for point, average in averages.items() if average.images}
    if not results and not scene.chunks:
        raise DataError("expected labels that differ within a chunk of images: shuffle the data, or check the labels")
    if scene.misfits and not results:
        raise DataError(next(iter(scene.misfits.values())))
    if results:
        if not scene.misfits:
            _warn_of_one_class(sum(not chunk for chunk in scored), len(scored))
        point = max(results, key=lambda p: results[p].di)
        warn_if_saturated(results[point].di, point.layer)
    return results


def _warn_of_one_class(silent: int, chunks: int) -> None:
    if silent:
        warnings.warn(f"{silent} of {chunks} chunks hold images of one class and are left out: shuffle the data",
                      OneClassWarning, stacklevel=3)  # fmt: skip


def _run(
    model: nn.Module, loader: Iterable[Any], points: Sequence[TapPoint], seen: Observation, team: Team, scene: Scene,
    until: UntilStable | None,
) -> list[Chunk]:  # fmt: skip
    """Scores of the chunks in the order of the data, everybody's."""
    own: list[Chunk] = []
    together: list[Chunk] = []
    count = 0
    failure: Exception | None = None
    try:
        for count, batch in enumerate(chunks(loader, seen.chunk_size), 1):
            if team.mine(count - 1):
                own.append(_score_chunk(model, batch, seen, scene))
            if until is not None and count % team.size == 0:
                together, own = together + exchange(team, own, points), []
                if until.reached([chunk for chunk in together if chunk]):
                    return together
        if not count:
            raise DataError("expected a loader that yields batches, got an empty one")
    except Exception as error:
        failure = error
    return together + exchange(team, own, points, failure)


def _score_chunk(model: nn.Module, batch: Any, seen: Observation, scene: Scene) -> Chunk:
    targets = _targets(seen, batch)
    if targets is None:
        return {}
    scene.start(targets, seen.rho, seen.sketch)
    _forward(seen.forward, model, to_device(batch, device_of(model)))
    return scene.finish()


def _forward(forward: Forward, model: nn.Module, batch: Any) -> None:
    try:
        forward(model, batch)
    except DipluginError:
        raise
    except Exception as error:
        raise ModelError(
            f"expected a model that runs on the batches, got {type(error).__name__}: {first_line(error)}; "
            "check the inputs' shape, or pass forward="
        ) from error


def _targets(seen: Observation, batch: Any) -> Tensor | None:
    """Centred targets of a chunk, no more columns than images.

    None for a chunk of one class, in which there is nothing to tell apart.
    """
    labels = seen.get_labels(batch)
    if not isinstance(labels, Tensor):
        raise DataError(f"expected labels as a tensor, got {type(labels).__name__}; pass get_labels=")
    if labels.ndim in (1, 2) and len(labels) > 0 and bool((labels == labels[0]).all()):
        return None
    return unit_targets(label_targets(labels, class_weight=seen.class_weight))  # once, and not for every layer
