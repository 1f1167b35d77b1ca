"""What scoring cost and how sure it is: a notebook that `score_points` fills when it is given one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..taps import TapPoint

_MEGABYTE = 1e6


@dataclass(frozen=True)
class LayerProfile:
    """One tapped tensor.

    Attributes:
        shape: of the tensor, images first.
        map_mb: what the tensor itself takes, scored or not.
        seconds: spent scoring it, over all chunks.
        calls: how often it was scored.
    """

    point: TapPoint
    shape: tuple[int, ...]
    map_mb: float
    seconds: float
    calls: int


class ScoreProfile:
    """Time of the whole passes, and of scoring within them for every tapped tensor; `reliability` of the ranking as
    `features.reliability` defines it."""

    def __init__(self) -> None:
        self.total_seconds = 0.0
        self.reliability = 0.0
        self._layers: dict[TapPoint, LayerProfile] = {}

    def add(self, point: TapPoint, tensor: Tensor, seconds: float) -> None:
        """One more call of a hook."""
        old = self._layers.get(point)
        megabytes = tensor.numel() * tensor.element_size() / _MEGABYTE
        self._layers[point] = LayerProfile(
            point, tuple(tensor.shape), max(megabytes, old.map_mb if old else 0.0),
            seconds + (old.seconds if old else 0.0), 1 + (old.calls if old else 0),
        )  # fmt: skip

    @property
    def layers(self) -> tuple[LayerProfile, ...]:
        """The tapped tensors in the order in which they first ran."""
        return tuple(self._layers.values())

    @property
    def scoring_seconds(self) -> float:
        """Time inside the hooks."""
        return sum(layer.seconds for layer in self._layers.values())

    @property
    def ratio(self) -> float:
        """Time with scoring over the time of the same forward passes without."""
        plain = self.total_seconds - self.scoring_seconds
        return self.total_seconds / plain if plain > 0 else float("inf")
