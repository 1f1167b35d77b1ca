"""DI scores of the tensors of one network: what is left of a calibration run once the data has gone by.

Scoring by group (`scoring`) needs the groups first. A host that brings its own groups, and brings them later, needs
the scores of every tensor that such a group may ask for: that is `FittedScores`. It also remembers what each layer
looked like, so that scores are never taken for those of another network, and how often each layer's weights are
applied to an image, so that a channel's cost is known. It is written as one safetensors file whose header is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import isfinite, prod
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .discriminant import ChunkScores
from .errors import PlanError, first_line
from .features import Observation, score_points
from .groups import ChannelGroup, GroupMember, Side
from .reader_energy import measuring
from .taps import TapPoint
from .whole_files import write_bytes

SCHEMA = 1
_HEADER, _ENERGY = "diplugin", "energy:"
_SETTINGS = {"rho", "chunk_size", "class_weight"}
_FLOATS = (torch.float32, torch.float64)
_NOT_SCORES = (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError)
WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True)
class LayerRecord:
    """What a convolution or linear layer was when it was scored.

    Attributes:
        in_channels, out_channels: widths.
        macs: multiply-accumulates per image, all calls together; 0 if it never ran.
        norm: Frobenius norm of its weight, by which a changed weight is noticed.
    """

    in_channels: int
    out_channels: int
    macs: float
    norm: float

    def width(self, side: Side) -> int:
        return self.in_channels if side == "in" else self.out_channels


@dataclass(frozen=True)
class FittedScores:
    """First-order DI scores by tensor, and the layers they belong to.

    Attributes:
        points: scores (fractions of label variance) of every tensor that was scored.
        layers: every convolution and linear layer of the network.
        energies: by layer, how much of what it writes comes from each channel that it reads (`reader_energy`).
        settings: rho, chunk size and class weight of the run.
    """

    points: Mapping[TapPoint, ChunkScores]
    layers: Mapping[str, LayerRecord]
    energies: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def macs(self) -> float:
        """Multiply-accumulates of the network per image."""
        return sum(layer.macs for layer in self.layers.values())

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; its header carries the rest as JSON.

        Raises:
            PlanError: the file cannot be written.
        """
        points = list(self.points.items())
        header = {
            "schema": SCHEMA,
            "settings": dict(self.settings),
            "layers": {name: asdict(layer) for name, layer in self.layers.items()},
            "points": [{"layer": p.layer, "side": p.side, "di": s.di, "ridge": s.ridge, "images": s.images}
                       for p, s in points],
        }  # fmt: skip
        tensors = {str(i): s.scores.cpu().contiguous() for i, (_, s) in enumerate(points)}
        tensors |= {_ENERGY + name: values.cpu().contiguous() for name, values in self.energies.items()}
        try:
            write_bytes(path, save(tensors, metadata={_HEADER: json.dumps(header)}))
        except OSError as error:
            raise PlanError(f"expected a path that can be written at {path}, got {first_line(error)}") from error

    @classmethod
    def load(cls, path: str | Path) -> FittedScores:
        """Read what `save` wrote; nothing in it can execute.

        Raises:
            PlanError: no such file, or not a whole file of scores.
        """
        try:
            with safe_open(str(path), "pt") as file:
                header = json.loads((file.metadata() or {})[_HEADER])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if header["schema"] != SCHEMA:
                raise PlanError(f"expected scores of schema {SCHEMA} in {path}, got {header['schema']!r}")
            points = {
                TapPoint(p["layer"], p["side"]): ChunkScores(tensors[str(i)], p["di"], p["ridge"], p["images"])
                for i, p in enumerate(header["points"])
            }
            layers = {name: LayerRecord(**record) for name, record in header["layers"].items()}
            energies = {n.removeprefix(_ENERGY): t for n, t in tensors.items() if n.startswith(_ENERGY)}
            fitted = cls(points, layers, energies, header["settings"])
            _check(fitted)
            return fitted
        except _NOT_SCORES as error:
            raise PlanError(f"expected scores saved by diplugin in {path}, got {first_line(error)}") from error


def _check(fitted: FittedScores) -> None:
    """Raise ValueError unless these could be the scores of a network."""
    numbers, whole = [fitted.macs, fitted.settings["rho"]], [fitted.settings["chunk_size"]]
    for layer in fitted.layers.values():
        numbers += [layer.macs, layer.norm]
        whole += [layer.in_channels, layer.out_channels]
    for chunk in fitted.points.values():
        numbers += [chunk.di, chunk.ridge]
        whole += [chunk.images]
    if not all(isinstance(n, int) and n > 0 for n in whole) or not all(isfinite(n) and n >= 0 for n in numbers):
        raise ValueError("numbers that no network has")
    rows = [*(chunk.scores for chunk in fitted.points.values()), *fitted.energies.values()]
    if not fitted.points or not all(_one_a_channel(values) for values in rows):
        raise ValueError("scores that are not finite numbers, one a channel")
    if any(len(t) != fitted.layers[name].in_channels for name, t in fitted.energies.items()):
        raise ValueError("energies of another number of channels")
    if any(point.side not in ("in", "out") for point in fitted.points) or set(fitted.settings) != _SETTINGS:
        raise ValueError("sides or settings that there are none of")


def _one_a_channel(values: Tensor) -> bool:
    return values.ndim == 1 and len(values) > 0 and values.dtype in _FLOATS and bool(values.isfinite().all())


def fit_scores(
    model: nn.Module, loader: Iterable[Any], points: Sequence[TapPoint], observation: Observation | None = None
) -> FittedScores:
    """Score tensors of a network and record its layers in the same pass.

    Raises:
        DataError, ModelError: as `features.score_points`.
    """
    seen = observation or Observation()
    macs: dict[str, float] = {}
    energies: dict[str, Tensor] = {}

    def forward(model: nn.Module, batch: Any) -> Any:
        if macs:
            return seen.forward(model, batch)
        images = len(seen.get_labels(batch))
        with _counting(model, macs, images), measuring(model, weighted_layers(model)) as meter:
            output = seen.forward(model, batch)
        energies.update(meter.energies())
        return output

    scores = score_points(model, loader, points, replace(seen, forward=forward))
    layers = {name: record_of(layer, macs.get(name, 0.0)) for name, layer in weighted_layers(model).items()}
    settings = {"rho": seen.rho, "chunk_size": seen.chunk_size, "class_weight": seen.class_weight}
    return FittedScores(scores, layers, energies, settings)


def weighted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WEIGHTED)}


def record_of(layer: nn.Module, macs: float = 0.0) -> LayerRecord:
    """What a convolution or linear layer looks like now."""
    weight = cast(Tensor, layer.weight).detach()
    norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    return LayerRecord(width_of(layer, "in"), width_of(layer, "out"), macs, norm)


def width_of(layer: nn.Module, side: Side) -> int:
    """Channels of one side of a convolution or linear layer."""
    module: Any = layer
    if isinstance(layer, nn.Linear):
        return module.in_features if side == "in" else module.out_features
    return module.in_channels if side == "in" else module.out_channels


@contextmanager
def _counting(model: nn.Module, macs: dict[str, float], images: int) -> Iterator[None]:
    """Adds up multiply-accumulates per image of every convolution and linear layer that runs in the block."""

    def count(name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and args and isinstance(args[0], Tensor):
                macs[name] = macs.get(name, 0.0) + _macs(module, args[0], output) / max(1, images)

        return hook

    handles = [layer.register_forward_hook(count(name)) for name, layer in weighted_layers(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _macs(module: Any, x: Tensor, y: Tensor) -> float:
    if isinstance(module, nn.Linear):
        return float(y.numel() * module.in_features)
    # A transposed convolution writes a whole window for every pixel that it reads.
    pixels = x.numel() * module.out_channels if module.transposed else y.numel() * module.in_channels
    return float(pixels * prod(module.kernel_size) // module.groups)


class ChannelCost(Protocol):
    """What removing one root channel of a group frees: [channels], positive, in any unit shared by all groups."""

    def __call__(self, group: ChannelGroup, scores: FittedScores) -> Tensor: ...


@dataclass(frozen=True)
class MACs:
    """Multiply-accumulates that a channel frees in every layer that writes or reads it, as a share of the network's."""

    def __call__(self, group: ChannelGroup, scores: FittedScores) -> Tensor:
        freed = torch.zeros(group.channels, dtype=torch.float64)
        for member in group.members:
            layer = scores.layers.get(member.layer)
            if layer is not None and _counts(member):
                share = layer.macs / layer.width(member.side)
                freed.index_add_(0, torch.tensor(member.roots), torch.full((len(member.roots),), share).double())
        return (freed / scores.macs).clamp(min=1e-12) if scores.macs else torch.ones_like(freed)


def _counts(member: GroupMember) -> bool:
    """A depthwise convolution is a member on both sides and frees its work once."""
    return member.kind == "weighted" or (member.kind == "depthwise" and member.side == "out")
