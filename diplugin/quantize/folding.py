"""BatchNorm folded into the layer before it, found by watching the tensors of one run.

A BatchNorm can be folded when it is the only reader of a layer's output. That is a fact about one run of the model,
not about its source: the run is watched, so it works for models that no symbolic tracer can follow. And a class may do
more than its base class does, so a fold is believed once it has given what layer and BatchNorm gave in that run, and
the network says what it said.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils import _pytree as pytree

from ..errors import ModelError
from ..layer_calls import plain_layers
from ..recovery.outputs import NormsBehind, after_call, before_call

_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
#: Of what layer and BatchNorm gave: folding rounds, and BatchNorm blows the rounding of near-constant channels up.
_TOLERANCE = 1e-3


class _Watch(NormsBehind):
    """Keeps copies of what layers read and norms gave, in the order of their calls."""

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        layers = [n for n, m in modules.items() if isinstance(m, _FOLDABLE) and "weight" in m._parameters]
        norms = [n for n, m in modules.items() if isinstance(m, _NORMS) and m.running_mean is not None]
        super().__init__(model, layers, norms)
        self.seen: dict[str, list[Tensor]] = {name: [] for name in (*layers, *norms)}

    def hook(self, stack: ExitStack) -> None:
        super().hook(stack)
        for layer in self.layers:
            before_call(stack, self.modules[layer], partial(self._keep, layer))
        for norm in self.norms:
            after_call(stack, self.modules[norm], partial(self._keep, norm))

    def _keep(self, name: str, x: Tensor) -> None:
        self.seen[name].append(x.clone())


@dataclass(frozen=True)
class Fold:
    """A layer's weight and bias with its BatchNorm in them, and what the BatchNorm's place keeps: an activation, say,
    that is a child of the BatchNorm, as timm's are."""

    layer: str
    norm: str
    weight: nn.Parameter
    bias: nn.Parameter
    rest: nn.Module

    def gives(self, layer: nn.Module, x: Tensor, expected: Tensor) -> bool:
        """Whether the layer, so folded, makes what was seen of what was seen."""
        folded: Any = copy.deepcopy(layer)
        folded.weight, folded.bias = self.weight, self.bias
        try:
            return _alike(self.rest(folded(x)), expected)
        except Exception:  # somebody's own class, whose children do not follow each other
            return False

    def put_into(self, model: nn.Module) -> None:
        layer: Any = model.get_submodule(self.layer)
        norm = model.get_submodule(self.norm)
        layer.weight, layer.bias = self.weight, self.bias
        for name, module in list(model.named_modules(remove_duplicate=False)):  # it may have several names
            if module is norm:
                model.set_submodule(name, self.rest)


@torch.no_grad()
def folds(model: nn.Module, example_inputs: tuple[Any, ...]) -> Iterator[Fold]:
    """A fold for every BatchNorm that alone reads a layer's output, both called once in a run.

    Raises:
        ModelError: the model does not run on the example inputs.
    """
    watch = _Watch(model)
    try:
        with watch.watching():
            watch.returned(model(*example_inputs))
        found = watch.found()
        # A weight that is used in another place too, in a decoder say, would be scaled there as well.
        plain = plain_layers(model, example_inputs, found)
    except Exception as error:
        raise ModelError(f"expected a model that runs on the example inputs, got {error}") from error
    calls = Counter({name: len(tensors) for name, tensors in watch.seen.items()})
    for name, behind in found.items():
        layer, norm = watch.modules[name], watch.modules[behind]
        if name in plain and calls[name] == calls[behind] == 1 and len(layer.weight) == norm.num_features:
            weight, bias = fuse_conv_bn_weights(
                layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            kept = list(norm.children())
            fold = Fold(name, behind, weight, bias, nn.Sequential(*kept) if kept else nn.Identity())
            if fold.gives(layer, watch.seen[name][0], watch.seen[behind][0]):
                yield fold


@torch.no_grad()
def fold_batchnorm(model: nn.Module, example_inputs: tuple[Any, ...]) -> nn.Module:
    """Fold every BatchNorm that can be, in place; an `Identity` stays where one was. Gives the model, in eval mode."""
    found = list(folds(model.eval(), example_inputs))
    if not _leave_it(model, found, example_inputs):
        found = [fold for fold in found if _leave_it(model, [fold], example_inputs)]
    for fold in found:
        fold.put_into(model)
    return model


def _leave_it(model: nn.Module, found: Sequence[Fold], inputs: tuple[Any, ...]) -> bool:
    """Whether the network says the same with these folds: of what compiled code reads, no watch is told."""
    folded = copy.deepcopy(model)
    for fold in found:
        fold.put_into(folded)
    try:
        pairs = zip(pytree.tree_leaves(model(*inputs)), pytree.tree_leaves(folded(*inputs)), strict=True)
        return all(_alike(y, expected) for expected, y in pairs if isinstance(y, Tensor) and y.is_floating_point())
    except Exception:  # a forward that asks the norm for its numbers
        return False


def _alike(y: Tensor, expected: Tensor) -> bool:
    return bool((y - expected).norm() <= _TOLERANCE * expected.norm() + 1e-6)
