"""Labels that are not class ids: what to give as `get_labels` for segmentation, detection, or no labels at all.

DI asks which label information a feature map carries, image by image, so every batch needs one row of targets an
image. Pixels' classes are pooled to the share that each class has of an image, or of each cell of a grid over it;
boxes to which classes are there; and where there are no labels at all, a trained network's own outputs do as well.
Each reader is an object for `get_labels=`; `picked` makes a `forward=` for batches in a dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import DataError
from .features import Forward, device_of, forward_inputs, labels_of, to_device
from .modes import evaluating


@dataclass(frozen=True)
class PooledLabels:
    """Class ids by pixel [N, H, W] become shares of the image by class and cell: [N, classes · cells²].

    Attributes:
        num_classes: ids from 0 to num_classes - 1.
        cells: the image is seen through a grid of cells × cells; 1 for the whole image.
        ignore_index: pixels of this id count for no class.
        read: the label maps of a batch.

    >>> maps = torch.tensor([[[0, 0], [1, 255]]])
    >>> PooledLabels(2)((torch.zeros(1, 3, 2, 2), maps))
    tensor([[0.5000, 0.2500]])
    """

    num_classes: int
    cells: int = 1
    ignore_index: int = 255
    read: Callable[[Any], Tensor] = labels_of

    def __call__(self, batch: Any) -> Tensor:
        maps = self.read(batch)
        if maps.ndim != 3 or maps.is_floating_point():
            raise DataError(f"expected class ids by pixel [N, H, W], got {list(maps.shape)} of {maps.dtype}")
        known = maps != self.ignore_index
        ids = torch.where(known, maps, 0).long()
        if int(ids.min()) < 0 or int(ids.max()) >= self.num_classes:
            raise DataError(f"expected class ids from 0 to {self.num_classes - 1}, or {self.ignore_index} to ignore, "
                            f"got {int(ids.min())} to {int(ids.max())}")  # fmt: skip
        planes = F.one_hot(ids, self.num_classes).movedim(-1, 1) * known.unsqueeze(1)
        return F.adaptive_avg_pool2d(planes.float(), self.cells).flatten(1)


@dataclass(frozen=True)
class PresentClasses:
    """Detection targets, a list of dicts with class ids under `key`, become multi-label targets [N, classes]."""

    num_classes: int
    key: str = "labels"
    read: Callable[[Any], Iterable[Mapping[str, Tensor]]] = lambda batch: batch[1]

    def __call__(self, batch: Any) -> Tensor:
        targets = list(self.read(batch))
        present = torch.zeros(len(targets), self.num_classes)
        for row, target in zip(present, targets, strict=True):
            try:
                ids = target[self.key].long()
                if ids.numel() and int(ids.min()) < 0:  # would count from the last class
                    raise DataError(f"expected class ids from 0 to {self.num_classes - 1} under {self.key!r}, got "
                                    f"{int(ids.min())}: drop those boxes")  # fmt: skip
                row[ids] = 1.0
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise DataError(f"expected targets with class ids below {self.num_classes} under {self.key!r}, got "
                                f"{type(error).__name__}: {error}") from error  # fmt: skip
        return present


@dataclass(frozen=True)
class TeacherOutputs:
    """A trained network's outputs as targets [N, L]: no labels are needed.

    Attributes:
        teacher: run in eval mode, without gradients, where its parameters are.
        forward: how it is run on a batch.
        limit: outputs of more values than this are pooled over their positions.
    """

    teacher: nn.Module
    forward: Forward = forward_inputs
    limit: int = 4096

    def __call__(self, batch: Any) -> Tensor:
        with evaluating(self.teacher), torch.no_grad():
            output = self.forward(self.teacher, to_device(batch, device_of(self.teacher)))
        tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point() and t.ndim]
        if not tensors:
            raise DataError(f"expected a teacher that returns tensors of one row an image, got {type(output).__name__}")
        return torch.cat([self._rows(t) for t in tensors], 1).cpu()

    def _rows(self, output: Tensor) -> Tensor:
        rows = output.reshape(len(output), -1)
        return rows if rows.shape[1] <= self.limit or output.ndim < 3 else output.flatten(2).mean(2)


def picked(*names: str) -> Forward:
    """A `forward=` for batches in a dict: the model is called with these entries, by keyword."""

    def forward(model: nn.Module, batch: Any) -> Any:
        missing = [name for name in names if name not in batch]
        if missing:
            raise DataError(f"expected {missing[0]!r} in every batch, got {', '.join(map(str, batch))}")
        return model(**{name: batch[name] for name in names})

    return forward
