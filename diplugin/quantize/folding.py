"""BatchNorm folded into the layer before it, found by watching the tensors of one run.

A BatchNorm can be folded when it is the only reader of a layer's output. That is a fact about one run of the model,
not about its source: the run is watched (module hooks name the tensors, a torch-function mode counts their readers),
so it works for models that no symbolic tracer can follow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..errors import ModelError
from ..modes import evaluating

_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class _CountReaders(TorchFunctionMode):
    """How often each tensor is read by a call that returns a tensor; tensors are kept, so that ids stay theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: Counter[int] = Counter()
        self.kept: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    self.readers[id(leaf)] += 1
                    self.kept.append(leaf)
        return output


def foldable_pairs(model: nn.Module, example_inputs: tuple[Any, ...]) -> list[tuple[str, str]]:
    """(layer, BatchNorm) names where the BatchNorm alone reads the layer's output; each called once in a run.

    Raises:
        ModelError: the model does not run on the example inputs.
    """
    produced: dict[int, str] = {}
    read: list[tuple[int, str]] = []
    calls: Counter[str] = Counter()

    def after_layer(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            produced[id(output)] = name
            calls[name] += 1

        return hook

    def before_norm(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            read.append((id(args[0]), name))
            calls[name] += 1

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, _FOLDABLE):
            handles.append(module.register_forward_hook(after_layer(name)))
        elif isinstance(module, _NORMS) and module.running_mean is not None and module.affine:
            handles.append(module.register_forward_pre_hook(before_norm(name)))
    try:
        with evaluating(model), torch.no_grad(), _CountReaders() as count:
            model(*example_inputs)
    except Exception as error:
        raise ModelError(f"expected a model that runs on the example inputs, got {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    pairs = [(produced[key], norm) for key, norm in read if key in produced and count.readers[key] == 1]
    return [(layer, norm) for layer, norm in pairs if calls[layer] == calls[norm] == 1]


def fold_batchnorm(model: nn.Module, example_inputs: tuple[Any, ...]) -> nn.Module:
    """Fold every foldable BatchNorm, in place; an `Identity` stays where one was. Returns the model, in eval mode."""
    pairs = foldable_pairs(model, example_inputs)
    model.eval()
    for layer_name, norm_name in pairs:
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        model.set_submodule(layer_name, fuse(layer, norm))  # pyright: ignore[reportArgumentType]
        model.set_submodule(norm_name, nn.Identity())
    return model
