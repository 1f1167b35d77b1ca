"""Images as the network has not seen them: turned, scaled, lighter or darker.

A trained network knows the images that it was trained with by heart, those that are set aside from pruning among them,
and a cut that harms what it has learned may leave what it remembers. In disguise the same images, whose labels are
known, ask for the former.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree


def disguised(
    x: Tensor,
    draw: torch.Generator,
    *,
    turn: float = math.pi / 9,
    scale: float = 0.2,
    gain: float = 0.3,
    shift: float = 0.3,
    flip: bool = False,
) -> Tensor:
    """Images [N, C, H, W], each turned, scaled and lit as drawn; mirrored at the edges.

    Args:
        draw: a generator on the CPU.
        turn: largest angle, in radians.
        scale: largest change of size, as a fraction.
        gain: largest change of contrast, as a fraction.
        shift: largest change of brightness, in the images' unit.
        flip: every other image is also mirrored, about.
    """
    strength = torch.tensor([[turn], [scale], [gain], [shift]])
    angle, size, contrast, light = strength * (2 * torch.rand(4, len(x), generator=draw) - 1)
    mirror = 1 - 2 * (torch.rand(len(x), generator=draw) < 0.5).float() if flip else torch.ones(len(x))
    cos, sin, zero = angle.cos() * (1 + size), angle.sin() * (1 + size), torch.zeros(len(x))
    ratio = x.shape[2] / x.shape[3]  # the grid's unit is half a side, of either side
    maps = torch.stack([mirror * cos, -sin * ratio, zero, mirror * sin / ratio, cos, zero], 1).view(-1, 2, 3).to(x)
    grid = F.affine_grid(maps, list(x.shape), align_corners=False)
    seen = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return seen * (1 + contrast).view(-1, 1, 1, 1).to(x) + light.view(-1, 1, 1, 1).to(x)


class Disguised:
    """The batches of a loader with their images in disguise, the same one each time they are read.

    Images are floating-point tensors [N, C, H, W] anywhere in a batch; brightness changes in units of their standard
    deviation. Whatever else a batch holds is left as it is, inputs of other shapes and whole numbers included.
    """

    def __init__(self, loader: Iterable[Any], seed: int = 0) -> None:
        self._loader, self._seed = loader, seed

    def __iter__(self) -> Iterator[Any]:
        draw = torch.Generator().manual_seed(self._seed)
        for batch in self._loader:
            yield pytree.tree_map(lambda leaf: _varied(leaf, draw), batch)


def _varied(leaf: Any, draw: torch.Generator) -> Any:
    if not isinstance(leaf, Tensor) or leaf.ndim != 4 or not leaf.is_floating_point() or not leaf.numel():
        return leaf
    return disguised(leaf, draw, shift=0.3 * float(leaf.std(correction=0)))
