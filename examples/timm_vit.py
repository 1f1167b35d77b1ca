"""A timm vision transformer, its heads' dimensions and MLPs pruned with Discriminant Information, saved and rebuilt.

    python examples/timm_vit.py [--model vit_tiny_patch16_224] [--ratio 0.5] [--out DIR]

torch-pruning needs two things of a timm attention: the unfused form, whose reshapes it can follow, and `num_heads`, so
that all heads lose the same dimensions. timm keeps the heads' width as a number beside the weights: set it afterwards.
Weights and images are random here, to show the steps; give your own where `build` and `images` are.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from diplugin_torch_pruning_files import load_history, save_history
from torch import Tensor, nn

import diplugin


def build(name: str = "vit_tiny_patch16_224", side: int = 64) -> nn.Module:
    """A transformer for ten classes, its attention in the form that torch-pruning can follow."""
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=10, img_size=side)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model.eval()


def images(count: int = 32, side: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Batches that have the form of real ones."""
    return [(torch.randn(count, 3, side, side), torch.arange(count) % 10)]


def attentions(model: nn.Module) -> list[Any]:
    """timm's attention modules."""
    return [module for module in model.modules() if isinstance(getattr(module, "qkv", None), nn.Linear)]


def settle(model: nn.Module) -> nn.Module:
    """Tell every attention how wide its heads are now."""
    for attention in attentions(model):
        attention.attn_dim = attention.qkv.out_features // 3
        attention.head_dim = attention.attn_dim // attention.num_heads
    return model


def prune(model: Any, example: Tensor, ratio: float) -> Any:
    """Prune a share of every layer's channels in place; returns the pruner."""
    heads = {attention.qkv: attention.num_heads for attention in attentions(model)}
    importance = diplugin.DIImportance(num_heads=heads).fit(model, images(side=example.shape[-1]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters")  # class token and positions follow the stream
        pruner = tp.pruner.BasePruner(
            model, (example,), importance=importance, pruning_ratio=ratio, ignored_layers=[model.head],
            num_heads=heads,
        )  # fmt: skip
        pruner.step()
    settle(model)
    return pruner


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("runs/timm_vit"))
    args = parser.parse_args(arguments)

    model, example = build(args.model), torch.randn(1, 3, 64, 64)
    before = sum(p.numel() for p in model.parameters())
    pruner = prune(model, example, args.ratio)
    save_history(model, pruner, args.out, (example,))
    print(f"{before / 1e6:.2f} M parameters, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M left")

    again = settle(load_history(build(args.model), args.out))
    with torch.no_grad():
        torch.testing.assert_close(again(example), model(example))
    print(f"written to {args.out}, rebuilt from there: same outputs")


if __name__ == "__main__":
    main()
