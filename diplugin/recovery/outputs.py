"""Outputs of layers, followed to those who read them: what stands behind a layer is seen, not guessed from shapes.

A hook tells what a layer gives, and a watch on torch's functions tells which of them read that very tensor. So the
sum of a shortcut is recognised however the model spells it, and the BatchNorm that normalises one layer is not taken
for one that normalises a sum behind it.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..features import device_of
from ..layer_calls import tensors_read, version_of
from ..modes import evaluating
from ..network import NetworkTrace


@dataclass
class Output:
    """One output of a layer; `norm` names the normalisation that alone has read it, if one has."""

    layer: str
    tensor: weakref.ref[Tensor]  # large maps are not kept for being known
    version: int
    read: bool = False
    norm: str | None = None


class OutputWatch(TorchFunctionMode, ABC):
    """Follows outputs of layers through passes of a network; subclasses say what is done on the way."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.modules: dict[str, Any] = dict(model.named_modules())
        self.outputs: list[Output] = []
        self._by_id: dict[int, Output] = {}

    @abstractmethod
    def hook(self, stack: ExitStack) -> None:
        """Set up the hooks of a pass; the stack removes them."""

    def read(self, output: Output) -> None:
        """Called when a function has made another tensor of an output."""
        output.read = True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Eval mode, hooks and the watch on functions for the time of the block."""
        with ExitStack() as stack:
            self.hook(stack)
            stack.enter_context(evaluating(self.model))
            stack.enter_context(self)
            try:
                yield
            finally:
                self._by_id.clear()

    def follow(self, layer: str, y: Tensor) -> Output:
        """Follow this tensor from now on as the layer's output."""
        output = self._by_id[id(y)] = Output(layer, weakref.ref(y), version_of(y))
        self.outputs.append(output)
        return output

    def unread(self, x: Any) -> Output | None:
        """The output that this very tensor is, if nobody has read it yet or changed it in place."""
        output = self._known(x)
        return None if output is None or output.read or output.version != version_of(x) else output

    def _known(self, x: Any) -> Output | None:
        output = self._by_id.get(id(x))
        return output if output is not None and output.tensor() is x else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tensors_read(result, args, kwargs):
            output = self._known(x)
            if output is not None:
                self.read(output)
        return result


def before_call(stack: ExitStack, module: nn.Module, act: Callable[[Tensor], object]) -> None:
    """Until the stack closes, show `act` what the module reads, passed by position or by name."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        act(next(iter((*args, *kwargs.values()))))

    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


def after_call(stack: ExitStack, module: nn.Module, act: Callable[[Tensor], object]) -> None:
    """Until the stack closes, show `act` what the module gives."""

    def hook(_module: nn.Module, _args: Any, y: Tensor) -> None:
        act(y)

    stack.callback(module.register_forward_hook(hook).remove)


class NormsBehind(OutputWatch):
    """Finds the normalisations that read layers' outputs as they are, and alone."""

    def __init__(self, model: nn.Module, layers: Iterable[str], norms: Iterable[str]) -> None:
        super().__init__(model)
        self.layers, self.norms = tuple(layers), tuple(norms)
        self._entering: dict[str, Output | None] = {}

    def hook(self, stack: ExitStack) -> None:
        for layer in self.layers:
            after_call(stack, self.modules[layer], partial(self.follow, layer))
        for norm in self.norms:
            before_call(stack, self.modules[norm], partial(self._enter, norm))
            after_call(stack, self.modules[norm], partial(self._leave, norm))

    def read(self, output: Output) -> None:
        super().read(output)
        output.norm = None

    def _enter(self, norm: str, x: Tensor) -> None:
        output = self.unread(x)
        # Channels are a norm's second dimension and a linear layer's last: those of [N, tokens, C] are not the same.
        linear = output is not None and isinstance(self.modules[output.layer], nn.Linear)
        self._entering[norm] = None if linear and x.ndim > 2 else output

    def _leave(self, norm: str, _: Tensor) -> None:
        output = self._entering.pop(norm)
        if output is not None:
            output.norm = norm

    def returned(self, result: Any) -> None:
        """What the network returns is read by whoever called it."""
        for x in pytree.tree_leaves(result):
            output = self._known(x)
            if output is not None:
                self.read(output)

    def found(self) -> dict[str, str]:
        """Layer -> the normalisation that alone reads its outputs, all of them."""
        pairs = {output.layer: output.norm for output in self.outputs if output.norm is not None}
        for output in self.outputs:
            if output.norm is None:
                pairs.pop(output.layer, None)
        return pairs


@torch.no_grad()
def norms_behind(model: nn.Module, trace: NetworkTrace, layers: Iterable[str], norms: Iterable[str]) -> dict[str, str]:
    """Which of these layers one of these normalisations reads, and nothing else does: layer -> normalisation.

    A constant added to such a layer's output can be taken up by the normalisation; where a shortcut or a concatenation
    reads the output as well, it cannot. Found in a pass over inputs like those that were traced. A layer that is called
    more than once has all its outputs normalised, or is left out.
    """
    watch = NormsBehind(model, layers, norms)
    with watch.watching():
        watch.returned(model(*examples_of(model, trace)))
    return watch.found()


def examples_of(model: nn.Module, trace: NetworkTrace) -> tuple[Tensor, ...]:
    """Random inputs like those that were traced, on the model's device; the same ones each time."""
    draw = torch.Generator().manual_seed(0)
    return tuple(spec.example(draw).to(device_of(model)) for spec in trace.inputs)
