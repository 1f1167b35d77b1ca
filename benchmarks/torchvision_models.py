"""torchvision and timm where only a CPU build of torch is installed.

torchvision's wheel then stops at an operator that its missing extension would have declared; declaring the name is
all that its models need. Nothing here is part of the package.
"""

from __future__ import annotations

from types import ModuleType

import torch

_LIBRARY: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """torchvision, with the two operators of detection declared where its extension is missing."""
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        _LIBRARY.append(library)  # a library that is collected takes its declarations along
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


def import_timm() -> ModuleType:
    """timm, which imports torchvision."""
    import_torchvision()
    import timm

    return timm
