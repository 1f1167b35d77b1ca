"""Every architecture family that torch-pruning's own importance prunes, pruned with DIImportance too.

    python benchmarks/zoo.py [--only resnet50,vit_b_16] [--every 3] [--json OUT]

For each model × {local, global, isomorphic} × {30, 50 %}: prune a copy, run it, compare the shape of its outputs. A
cell shows the share of parameters that is left, as `MagnitudeImportance / DIImportance`; an error is shown by its
name. Weights and images are random: this is about structure. Exit code 1 if a model passes with theirs only.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from diplugin_torch_pruning import DIImportance
from torch import Tensor, nn
from torchvision_models import import_timm, import_torchvision

SCOPES = {"local": {}, "global": {"global_pruning": True}, "isomorphic": {"global_pruning": True, "isomorphic": True}}
RATIOS = (0.3, 0.5)
IMAGES = 6


@dataclass(frozen=True)
class Entry:
    """One architecture: where it comes from, the side of its images, arguments of its builder."""

    name: str
    library: str = "torchvision"
    side: int = 64
    options: tuple[tuple[str, Any], ...] = ()

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        if self.library == "torchvision":
            return import_torchvision().models.get_model(self.name, weights=None, **dict(self.options))
        return import_timm().create_model(self.name, pretrained=False, **dict(self.options))


_FEW = (("num_classes", 10),)
_VIT = (("num_classes", 10), ("img_size", 64))
#: Swin is not here: torch-pruning needs minutes and gigabytes to follow its windows, whatever the importance.
ZOO = (
    Entry("resnet18"),
    Entry("resnet50"),
    Entry("resnext50_32x4d"),
    Entry("wide_resnet50_2"),
    Entry("vgg16_bn", options=_FEW),
    Entry("alexnet", options=_FEW),
    Entry("densenet121"),
    Entry("mobilenet_v2"),
    Entry("mobilenet_v3_large"),
    Entry("mobilenet_v3_small"),
    Entry("efficientnet_b0"),
    Entry("efficientnet_v2_s"),
    Entry("regnet_x_400mf"),
    Entry("regnet_y_400mf"),
    Entry("convnext_tiny"),
    Entry("shufflenet_v2_x1_0"),
    Entry("googlenet", side=96, options=(("init_weights", True), ("aux_logits", False))),
    Entry("inception_v3", side=160, options=(("init_weights", True), ("aux_logits", False))),
    Entry("squeezenet1_1", options=_FEW),
    Entry("mnasnet1_0"),
    Entry("vit_b_16", options=(("image_size", 64), ("num_classes", 10))),
    Entry("deeplabv3_resnet50", options=(("weights_backbone", None),)),
    Entry("fcn_resnet50", options=(("weights_backbone", None),)),
    Entry("vit_tiny_patch16_224", "timm", options=_VIT),
    Entry("deit_tiny_patch16_224", "timm", options=_VIT),
    Entry("mixer_s32_224", "timm", 64, _VIT),
    Entry("repvgg_a0", "timm", 64, _FEW),
    Entry("dla34", "timm", 64, _FEW),
    Entry("hrnet_w18_small", "timm", 64, _FEW),
    Entry("ghostnet_100", "timm", 64, _FEW),
    Entry("resnetv2_50", "timm", 64, _FEW),
    Entry("convnextv2_atto", "timm", 64, _FEW),
    Entry("cspresnet50", "timm", 64, _FEW),
    Entry("eca_resnet33ts", "timm", 64, _FEW),
    Entry("legacy_seresnet18", "timm", 64, _FEW),
    Entry("vovnet39a", "timm", 64, _FEW),
    Entry("res2net50_26w_4s", "timm", 64, _FEW),
)


def heads_of(model: nn.Module) -> dict[nn.Module, int]:
    """Attention heads by qkv layer; timm's attention is set to the form whose reshapes torch-pruning can follow."""
    heads: dict[nn.Module, int] = {}
    for module in model.modules():
        if isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "num_heads"):
            attention: Any = module
            if hasattr(attention, "fused_attn"):
                attention.fused_attn = False
            if type(attention).__name__ in ("Attention", "WindowAttention") and "timm" in type(attention).__module__:
                heads[attention.qkv] = attention.num_heads
    return heads


def pruner_arguments(model: nn.Module, example: Tensor) -> dict[str, Any]:
    """What both importances are given: outputs kept, heads known, no dict shared between pruners."""
    heads = heads_of(model)
    with torch.no_grad():
        classes = {t.shape[1] for t in _tensors(model.eval()(example)) if t.ndim > 1}
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    out = [m for m in layers if getattr(m, "out_features", getattr(m, "out_channels", 0)) in classes][-2:]
    ignored = [*out, *(m for m in model.modules() if type(m).__name__ == "RelPosBias")]
    fresh: dict[str, Any] = {"in_channel_groups": {}, "out_channel_groups": {}, "channel_groups": {}}
    # torch-pruning does not know that a MultiheadAttention's width must stay a multiple of its heads.
    even = {m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return {"ignored_layers": ignored, "num_heads": heads, "round_to": max(even, default=None), **fresh}


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)] or [
        t for t in vars(output).values() if isinstance(t, Tensor)
    ]


def prune_copy(model: nn.Module, example: Tensor, importance: Any, scope: dict[str, bool], ratio: float) -> float:
    """Parameters left in a pruned copy, a fraction; whatever goes wrong is raised."""
    pruned = copy.deepcopy(model)
    want = [t.shape for t in _tensors(pruned.eval()(example))]
    before = sum(p.numel() for p in pruned.parameters())
    arguments = pruner_arguments(pruned, example)
    tp.pruner.BasePruner(pruned, (example,), importance=importance, pruning_ratio=ratio, **scope, **arguments).step()
    _fix_attention(pruned)
    with torch.no_grad():
        got = [t.shape for t in _tensors(pruned.eval()(example))]
    if got != want:
        raise RuntimeError(f"outputs {got} instead of {want}")
    after = sum(p.numel() for p in pruned.parameters())
    if after >= before:
        raise RuntimeError("nothing was pruned")
    return after / before


def _fix_attention(model: nn.Module) -> None:
    """Transformers keep widths as numbers beside their weights."""
    for module in model.modules():
        attention: Any = module
        if type(module).__name__ == "VisionTransformer" and hasattr(module, "hidden_dim"):
            attention.hidden_dim = attention.conv_proj.out_channels
        if isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "head_dim"):
            attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)
            attention.attn_dim = attention.num_heads * attention.head_dim


def outcome(action: Callable[[], float]) -> float | str:
    """A fraction, or the name of what went wrong."""
    try:
        return action()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"


def run_entry(entry: Entry) -> dict[str, Any]:
    """All cells of one model."""
    model = entry.build().eval()
    example = torch.randn(1, 3, entry.side, entry.side)
    images = torch.randn(IMAGES, 3, entry.side, entry.side)
    labels = torch.arange(IMAGES) % 3
    start = time.perf_counter()
    heads_of(model)
    importance = DIImportance()
    fitted = outcome(lambda: float(len(importance.fit(model, [(images, labels)]).fitted.points)))
    row: dict[str, Any] = {"model": entry.name, "fit": fitted, "seconds": 0.0, "cells": {}}
    for scope, options in SCOPES.items():
        for ratio in RATIOS:
            l2 = tp.importance.MagnitudeImportance(p=2)
            theirs = outcome(lambda o=options, r=ratio, i=l2: prune_copy(model, example, i, o, r))
            ours = outcome(lambda o=options, r=ratio: prune_copy(model, example, importance, o, r))
            row["cells"][f"{scope} {ratio:.0%}"] = (theirs, ours)
    row["seconds"] = time.perf_counter() - start
    return row


def shown(cell: tuple[float | str, float | str]) -> str:
    return " / ".join(f"{c:.2f}" if isinstance(c, float) else c.split(":")[0][:12] for c in cell)


def passes(row: dict[str, Any]) -> bool:
    """Ours passes wherever theirs does."""
    return all(isinstance(ours, float) or not isinstance(theirs, float) for theirs, ours in row["cells"].values())


def run_zoo(
    entries: Iterable[Entry], tell: Callable[[list[dict[str, Any]]], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Rows of the table, printed as they come; `tell` is given all rows so far."""
    head = [f"{s} {r:.0%}" for s in SCOPES for r in RATIOS]
    print(f"{'model':30}" + "".join(f"{h:>22}" for h in head) + f"{'seconds':>9}")
    rows = []
    for entry in entries:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = run_entry(entry)
        rows.append(row)
        print(f"{entry.name:30}" + "".join(f"{shown(row['cells'][h]):>22}" for h in head) + f"{row['seconds']:9.1f}"
              + ("" if passes(row) else "   <- ours fails"), flush=True)  # fmt: skip
        tell(rows)
    return rows


def _write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    good = sum(map(passes, rows))
    target = {"name": "passes wherever MagnitudeImportance does", "target": len(rows), "value": good,
              "met": good == len(rows)}  # fmt: skip
    if path is not None:
        path.write_text(json.dumps({"rows": rows, "targets": [target]}, indent=1))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--every", type=int, default=1, help="every n-th model only")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args(arguments)
    wanted = args.only.split(",") if args.only else None
    entries = [e for e in ZOO if wanted is None or e.name in wanted][:: args.every]
    rows = run_zoo(entries, lambda rows: _write(args.json, rows))
    handled = [r for r in rows if all(isinstance(theirs, float) for theirs, _ in r["cells"].values())]
    good = sum(map(passes, rows))
    print(f"{len(rows)} models, {len(handled)} of them pruned by MagnitudeImportance in every cell; "
          f"DIImportance passes wherever it does in {good} of {len(rows)}")  # fmt: skip
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
