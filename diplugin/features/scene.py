"""The hooks: what a layer reads or writes is scored while the network runs, and no map outlives its hook."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..discriminant import ChunkScores, Sketch, chunk_scores
from ..errors import DataError, ModelError
from ..modes import evaluating
from ..taps import TapPoint
from .profile import ScoreProfile


@dataclass(frozen=True)
class _Seen:
    """A tensor that was scored during this forward pass: several layers may read the same one."""

    tensor: weakref.ref[Tensor]
    version: int
    channel_dim: int
    scores: ChunkScores


class Scene:
    """The hooks' notebook for one chunk.

    A tensor that is not one feature map an image (the table of a relative position bias, say) says nothing about
    labels: it is passed over and noted in `misfits`. `chunks` counts what was started.
    """

    def __init__(self, profile: ScoreProfile | None = None) -> None:
        self.misfits: dict[TapPoint, str] = {}
        self.chunks = 0
        self._targets: Tensor | None = None
        self._rho = 0.0
        self._sketch = Sketch()
        self._scores: dict[TapPoint, list[ChunkScores]] = {}
        self._recent: dict[int, _Seen] = {}
        self._profile = profile

    def start(self, targets: Tensor, rho: float, sketch: Sketch | None = None) -> None:
        """Score what runs from now on against these targets [N, L]."""
        self.chunks += 1
        self._targets, self._rho, self._sketch = targets, rho, sketch or Sketch()
        self._scores, self._recent = {}, {}

    def see(self, point: TapPoint, features: Tensor, channel_dim: int) -> None:
        """Score a tensor whose channels are in `channel_dim` (1 or −1)."""
        if self._targets is None:
            return
        started = time.perf_counter()
        scored = self._again(features, channel_dim)
        if scored is None:
            scored = self._score(point, features, channel_dim, self._targets)
            if scored is None:
                return
            self._remember(features, channel_dim, scored)
        self._scores.setdefault(point, []).append(scored)
        if self._profile is not None:
            self._profile.add(point, features, time.perf_counter() - started)

    def _score(self, point: TapPoint, features: Tensor, channel_dim: int, targets: Tensor) -> ChunkScores | None:
        where = f"{'input' if point.side == 'in' else 'output'} of {point.layer or 'the model'}"
        images = len(targets)
        maps, channel_dim = _per_image(features, images, channel_dim)
        if len(maps) != images:
            self.misfits[point] = f"{where}: expected {images} maps, one a label, got {len(maps)}; check the labels"
            return None
        try:
            return chunk_scores(maps, targets, self._rho, channel_dim=channel_dim, sketch=self._sketch)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error

    def finish(self) -> dict[TapPoint, ChunkScores]:
        """Scores of the chunk; a layer that ran more than once counts with its mean."""
        self._targets = None
        self._recent = {}
        return {point: _mean(calls) for point, calls in self._scores.items()}

    def _again(self, tensor: Tensor, channel_dim: int) -> ChunkScores | None:
        found = self._recent.get(id(tensor))
        if found is None or found.tensor() is not tensor:
            return None
        return found.scores if (found.version, found.channel_dim) == (tensor._version, channel_dim) else None

    def _remember(self, tensor: Tensor, channel_dim: int, scores: ChunkScores) -> None:
        if not tensor.is_inference():  # those do not tell when they are written to
            self._recent[id(tensor)] = _Seen(weakref.ref(tensor), tensor._version, channel_dim, scores)


def _mean(calls: list[ChunkScores]) -> ChunkScores:
    if len(calls) == 1:
        return calls[0]
    scores = torch.stack([c.scores for c in calls]).mean(0)
    return replace(calls[0], scores=scores, di=sum(c.di for c in calls) / len(calls))


def _per_image(features: Tensor, images: int, channel_dim: int) -> tuple[Tensor, int]:
    """(maps with one row an image, their channel dimension).

    Windowed models fold positions into the batch: [N·k, ...] is unfolded to [N, k, ...]. Sequences that come first,
    [T, N, C], are turned around.
    """
    rows = len(features)
    if rows == images or features.ndim < 2:
        return features, channel_dim
    if channel_dim == -1 and features.ndim > 2 and features.shape[1] == images:
        return features.transpose(0, 1), -1
    if rows % images or rows == 0:
        return features, channel_dim
    return features.unflatten(0, (images, rows // images)), 2 if channel_dim == 1 else channel_dim


@contextmanager
def observing(model: nn.Module, points: Sequence[TapPoint], profile: ScoreProfile | None = None) -> Iterator[Scene]:
    """Eval mode and scoring hooks for the time of the block.

    Raises:
        ModelError: a layer that the model does not have.
    """
    modules = dict(model.named_modules())
    missing = [p.layer for p in points if p.layer not in modules]
    if missing:
        raise ModelError(f"expected a model with a layer {missing[0]!r}, this one has none")
    scene, handles = Scene(profile), []
    try:
        for point in points:
            handles.append(_attach(scene, point, modules[point.layer]))
        with evaluating(model):
            yield scene
    finally:
        for handle in handles:
            handle.remove()


def _attach(scene: Scene, point: TapPoint, module: nn.Module) -> Any:
    def see(tensor: Any) -> None:
        if isinstance(tensor, Tensor):
            scene.see(point, tensor, _channel_dim(module, tensor))

    if point.side == "in":
        return module.register_forward_pre_hook(
            lambda _, args, kwargs: see(next(iter((*args, *kwargs.values())), None)), with_kwargs=True
        )
    return module.register_forward_hook(lambda _module, _args, output: see(output))


def _channel_dim(module: nn.Module, tensor: Tensor) -> int:
    """Linear layers and LayerNorm hold their channels last, everything else right behind the batch.

    A LayerNorm over maps [N, C, H, W], as ConvNeXt's, is a subclass that turns its input around by itself.
    """
    if isinstance(module, nn.Linear):
        return -1
    if isinstance(module, nn.LayerNorm):
        channels = module.normalized_shape[-1]
        return 1 if tensor.ndim > 2 and tensor.shape[-1] != channels and tensor.shape[1] == channels else -1
    return 1
