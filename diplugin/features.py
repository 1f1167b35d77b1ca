"""Watching feature maps go by: scores are computed inside the forward hook, and no map outlives it.

DI depends on how many images it sees at once, so it is defined over chunks of 250 images in the order of the data,
whatever the loader's batch size; a tail shorter than half a chunk joins the chunk before it. `chunks` re-batches any
loader so; `score_points` runs the model on each chunk and keeps one vector of scores for every tapped tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .discriminant import ChunkScores, ScoreAverage, chunk_scores, label_targets, warn_if_saturated
from .errors import DataError, DipluginError, ModelError
from .groups import first_line
from .taps import TapPoint

CHUNK_SIZE = 250

GetLabels = Callable[[Any], Tensor]
Forward = Callable[[nn.Module, Any], Any]


def labels_of(batch: Any) -> Tensor:
    """The labels of an (inputs, labels) batch.

    Raises:
        DataError: the batch is of another form.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[1]
    raise DataError(
        f"expected batches of (inputs, labels), got {_form(batch)}; pass get_labels= and forward= for other forms"
    )


def forward_inputs(model: nn.Module, batch: Any) -> Any:
    """Run the model on the inputs of an (inputs, labels) batch; a tuple or dict of inputs is spread."""
    inputs = batch[0]
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _form(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {len(batch)} ({', '.join(type(x).__name__ for x in batch[:4])})"
    return type(batch).__name__


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on `device`."""
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def chunks(loader: Iterable[Any], size: int = CHUNK_SIZE) -> Iterator[Any]:
    """Re-batch a loader into chunks of `size` images in order; a tail below size/2 joins the chunk before.

    A batch whose leaves are not all tensors of one length (detection targets, say) cannot be cut: such batches are
    passed on as they come.
    """
    pending: list[Any] = []
    count = 0
    for batch in loader:
        length = _length(batch)
        if length is None:
            yield batch
            continue
        pending.append(batch)
        count += length
        # Half a chunk is held back, so that a short tail can still join the last chunk.
        while count >= size + (size + 1) // 2:
            joined = _join(pending)
            yield pytree.tree_map(lambda x: x[:size], joined)
            pending, count = [pytree.tree_map(lambda x: x[size:], joined)], count - size
    if count:
        joined = _join(pending)
        if count > size + (size - 1) // 2:
            yield pytree.tree_map(lambda x: x[:size], joined)
            joined = pytree.tree_map(lambda x: x[size:], joined)
        yield joined


def _length(batch: Any) -> int | None:
    leaves = pytree.tree_leaves(batch)
    if not leaves or not all(isinstance(x, Tensor) and x.ndim > 0 for x in leaves):
        return None
    lengths = {len(x) for x in leaves}
    if len(lengths) != 1:
        raise DataError(f"expected inputs and labels of one length in a batch, got lengths {sorted(lengths)}")
    return lengths.pop()


def _join(batches: list[Any]) -> Any:
    if len(batches) == 1:
        return batches[0]
    try:
        return pytree.tree_map(lambda *xs: torch.cat(xs), *batches)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"expected batches of one shape, got {first_line(error)}") from error


@dataclass(frozen=True)
class Observation:
    """What is run and how its labels are read; one object for scoring, calibration and both adapters."""

    get_labels: GetLabels = labels_of
    forward: Forward = forward_inputs
    rho: float = 10.0
    class_weight: str | None = None
    chunk_size: int = CHUNK_SIZE


def score_points(
    model: nn.Module, loader: Iterable[Any], points: Sequence[TapPoint], observation: Observation | None = None
) -> dict[TapPoint, ChunkScores]:
    """First-order DI scores of every channel of every tapped tensor, averaged over chunks.

    The model runs in eval mode without gradients; hooks and modes are as before afterwards, whatever happens.

    Returns:
        scores (float64, [channels], fractions of label variance) per point; a layer that never ran is left out.

    Raises:
        DataError: an empty loader, unusable labels, NaN features, or labels that never differ within a chunk.
        ModelError: a layer that the model does not have.
    """
    seen = observation or Observation()
    averages = {point: ScoreAverage() for point in points}
    batches = told_apart = 0
    with observing(model, points) as scene, torch.no_grad():
        for batch in chunks(loader, seen.chunk_size):
            batches += 1
            targets = _targets(seen, batch)
            if targets is None:
                continue
            told_apart += 1
            scene.start(targets, seen.rho)
            _run(seen.forward, model, to_device(batch, device_of(model)))
            for point, scored in scene.finish().items():
                averages[point].add(scored)
    if not batches:
        raise DataError("expected a loader that yields batches, got an empty one")
    if not told_apart:
        raise DataError("expected labels that differ within a chunk of images: shuffle the data, or check the labels")
    if scene.misfits and not any(average.images for average in averages.values()):
        raise DataError(next(iter(scene.misfits.values())))
    results = {point: average.result() for point, average in averages.items() if average.images}
    if results:
        point = max(results, key=lambda p: results[p].di)
        warn_if_saturated(results[point].di, point.layer)
    return results


def _run(forward: Forward, model: nn.Module, batch: Any) -> None:
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
    """Centred targets of a chunk; None for a chunk of one class, in which there is nothing to tell apart."""
    labels = seen.get_labels(batch)
    if not isinstance(labels, Tensor):
        raise DataError(f"expected labels as a tensor, got {type(labels).__name__}; pass get_labels=")
    if labels.ndim == 1 and len(labels) > 0 and bool((labels == labels[0]).all()):
        return None
    return label_targets(labels, class_weight=seen.class_weight)


class Scene:
    """The hooks' notebook for one chunk.

    A tensor that is not one feature map an image (the table of a relative position bias, say) says nothing about
    labels: it is passed over and noted in `misfits`.
    """

    def __init__(self) -> None:
        self.misfits: dict[TapPoint, str] = {}
        self._targets: Tensor | None = None
        self._rho = 0.0
        self._scores: dict[TapPoint, list[ChunkScores]] = {}

    def start(self, targets: Tensor, rho: float) -> None:
        self._targets, self._rho, self._scores = targets, rho, {}

    def see(self, point: TapPoint, features: Tensor, channel_dim: int) -> None:
        if self._targets is None:
            return
        where = f"{'input' if point.side == 'in' else 'output'} of {point.layer or 'the model'}"
        images = len(self._targets)
        maps, channel_dim = _per_image(features, images, channel_dim)
        if len(maps) != images:
            self.misfits[point] = f"{where}: expected {images} maps, one a label, got {len(maps)}; check the labels"
            return
        try:
            scored = chunk_scores(maps, self._targets, self._rho, channel_dim=channel_dim)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        self._scores.setdefault(point, []).append(scored)

    def finish(self) -> dict[TapPoint, ChunkScores]:
        """Scores of the chunk; a layer that ran more than once counts with its mean."""
        self._targets = None
        return {point: _mean(calls) for point, calls in self._scores.items()}


def _mean(calls: list[ChunkScores]) -> ChunkScores:
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
def observing(model: nn.Module, points: Sequence[TapPoint]) -> Iterator[Scene]:
    """Eval mode and scoring hooks for the time of the block."""
    modules = dict(model.named_modules())
    missing = [p.layer for p in points if p.layer not in modules]
    if missing:
        raise ModelError(f"expected a model with a layer {missing[0]!r}, this one has none")
    scene, handles = Scene(), []
    modes = {module: module.training for module in model.modules()}
    try:
        for point in points:
            module = modules[point.layer]
            handles.append(_attach(scene, point, module))
        model.eval()
        yield scene
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training


def _attach(scene: Scene, point: TapPoint, module: nn.Module) -> Any:
    def see(tensor: Any) -> None:
        if isinstance(tensor, Tensor):
            scene.see(point, tensor, _channel_dim(module, tensor))

    if point.side == "in":
        return module.register_forward_pre_hook(lambda _, args: see(args[0] if args else None))
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
