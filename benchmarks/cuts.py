"""Pruned networks kept in a folder: cutting wants a CPU and may take long, training wants a GPU and may be killed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from diplugin.surgery import read_weights, save_weights


@dataclass(frozen=True)
class Cuts:
    """One safetensors file for every contender and fraction; with no folder nothing is kept.

    Attributes:
        folder: of one unpruned network.
        fresh: that network, anew at every call.
    """

    folder: Path | None
    fresh: Callable[[], nn.Module]

    def get(self, name: str, fraction: float, cut: Callable[[], nn.Module | None]) -> nn.Module | None:
        """The network of that name and fraction, in eval mode: the one that is kept, else what `cut` makes."""
        if self.folder is None:
            return cut()
        path = self.folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{fraction:.4f}.safetensors"
        if path.exists():
            return shaped(self.fresh(), read_weights(path)).eval()
        made = cut()
        if made is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_weights(made, path)
        return made


def shaped(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """The model with these parameters and buffers, and the sizes that they have; returns it.

    For ungrouped convolutions, linear layers and BatchNorm, which is all that these networks are made of.
    """
    for key, value in state.items():
        owner, _, leaf = key.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, leaf, value if leaf in module._buffers else nn.Parameter(value))
        if isinstance(module, nn.BatchNorm2d) and leaf == "weight":
            module.num_features = len(value)
        elif isinstance(module, nn.Conv2d) and leaf == "weight":
            module.out_channels, module.in_channels = value.shape[:2]
        elif isinstance(module, nn.Linear) and leaf == "weight":
            module.out_features, module.in_features = value.shape
    return model
