"""A torchvision ResNet, pruned in torch-pruning's own pruner with Discriminant Information, saved and rebuilt.

    python examples/torch_pruning_resnet.py [--data imagefolder:DIR] [--weights FILE.safetensors] [--out DIR]

Nothing here is special to diplugin but two lines: `DIImportance().fit(...)`, and `importance=` in the pruner. Without
--data it runs on noise, to show the steps.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from diplugin_torch_pruning_files import plan_of
from torch import Tensor, nn

import diplugin
from diplugin.recovery import recalibrate_batchnorm


def prune(model: nn.Module, loader: Iterable[Any], example: Tensor, ratio: float = 0.5) -> diplugin.PruningPlan:
    """Prune a model with a final layer `fc` in place, with one threshold for the whole network; returns the plan."""
    unpruned = copy.deepcopy(model)
    importance = diplugin.DIImportance().fit(model, loader)
    pruner = tp.pruner.BasePruner(
        model, (example,), importance=importance, global_pruning=True, pruning_ratio=ratio, ignored_layers=[model.fc]
    )
    for group in pruner.step(interactive=True):
        group.prune()
    recalibrate_batchnorm(model, loader)
    return plan_of(pruner, unpruned, (example,))


def noise(images: int = 64, side: int = 64, classes: int = 10) -> list[tuple[Tensor, Tensor]]:
    """Batches that have the form of real ones."""
    labels = torch.arange(images) % classes
    return list(zip(torch.randn(images, 3, side, side).split(32), labels.split(32), strict=True))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="torchvision:resnet18")
    parser.add_argument("--data", help="imagefolder:DIR, or package.module:callable")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/torch_pruning_resnet"))
    args = parser.parse_args(arguments)

    from diplugin.features import first_images
    from diplugin.holdout import split_holdout
    from diplugin.sources import load_data, load_model
    from diplugin.surgery import save_pruned

    model, example = load_model(args.model, args.weights), torch.randn(1, 3, 64, 64)
    loader = (
        noise() if args.data is None else list(first_images(split_holdout(load_data(args.data).train).scoring, 1000))
    )
    before = sum(p.numel() for p in model.parameters())
    plan = prune(model, loader, example)
    save_pruned(model, plan, args.out)
    print(f"{before / 1e6:.1f} M parameters, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M left")

    again = diplugin.load_pruned(load_model(args.model), args.out)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(example), model.eval()(example))
    print(f"written to {args.out}, rebuilt from there: same outputs")


if __name__ == "__main__":
    main()
