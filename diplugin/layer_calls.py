"""The call of torch that a layer makes when it runs: what its weight is really multiplied with.

A layer's settings do not always say what it computes. Networks that come from TensorFlow pad their inputs themselves
before they convolve, by more on one side than on the other; others standardise their weights first, or compute them
from parameters. So whoever needs a layer's windows or means to change its weights looks at the call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .modes import evaluating

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_NAMES_TRANSPOSED = (*_NAMES[:5], "output_padding", "groups", "dilation")


@dataclass(frozen=True)
class LayerCall:
    """One convolution, transposed convolution or product with a matrix.

    Attributes:
        x: [N, C, *sizes] for a convolution, N = 1 for an image without a batch; [*rows, C] for a product.
        weight, bias: as they were used.
        transposed: a transposed convolution.
        stride, dilation: one number a dimension; empty for a product.
        padding: zeros before and behind, in every dimension; for a transposed convolution, what is cut off there.
        groups: 1 for a product.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    transposed: bool = False
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[2:])

    @property
    def by_group(self) -> Tensor:
        """The weight as [groups, outputs of a group, channels that a group reads, positions of the window]."""
        weight = self.weight.flatten(2) if self.kernel else self.weight.unsqueeze(2)
        blocks = weight.unflatten(0, (self.groups, -1))
        return blocks.transpose(1, 2) if self.transposed else blocks

    def of(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same call, of another input and another weight, and without a bias; not of a transposed convolution."""
        if not self.kernel:
            return F.linear(x, weight)
        convolution = _CONVOLUTIONS[len(self.kernel) - 1]
        return convolution(self.padded(x), weight, None, self.stride, 0, self.dilation, self.groups)

    def padded(self, x: Tensor) -> Tensor:
        """What the windows of a convolution are taken from, for some of its images or other ones."""
        # F.pad begins at the last dimension.
        return F.pad(x, [side for pair in reversed(self.padding) for side in pair])

    def windows(self, x: Tensor, positions: Tensor) -> Tensor:
        """[N·P, C, K]: the windows of a convolution around flat output positions [N, P] of these images [N, C, ...]."""
        padded = self.padded(x)
        sides = zip(padded.shape[2:], self.kernel, self.stride, self.dilation, strict=True)
        sizes = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in sides]
        rest, starts = positions, []
        for size in reversed(sizes):
            starts.insert(0, rest % size)
            rest = rest // size
        flat = torch.zeros_like(positions)[..., None]
        grids = torch.meshgrid(*(torch.arange(k, device=x.device) for k in self.kernel), indexing="ij")
        for i, (start, grid) in enumerate(zip(starts, grids, strict=True)):
            coordinate = start[..., None] * self.stride[i] + grid.flatten() * self.dilation[i]
            flat = flat * padded.shape[2 + i] + coordinate
        maps = padded.flatten(2)  # [N, C, places]
        index = flat.flatten(1)[:, None].expand(-1, maps.shape[1], -1)
        taken = maps.gather(2, index).view(len(x), maps.shape[1], positions.shape[1], -1)
        return taken.transpose(1, 2).flatten(0, 1)


def call_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> LayerCall | None:
    """The call, if this function of torch is a convolution, a transposed one or a product with a matrix."""
    transposed = func in _TRANSPOSED
    if func is not F.linear and func not in _CONVOLUTIONS and not transposed:
        return None
    given = {**dict(zip(_NAMES_TRANSPOSED if transposed else _NAMES, args, strict=False)), **(kwargs or {})}
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if func is F.linear:
        return LayerCall(x, weight, bias)
    dims = weight.ndim - 2
    x = x if x.ndim == weight.ndim else x.unsqueeze(0)
    stride, dilation = (_each(given.get(name, 1), dims) for name in ("stride", "dilation"))
    padding = given.get("padding", 0)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        pairs = tuple((total // 2, total - total // 2) for total in totals)
    else:
        pairs = tuple((p, p) for p in _each(0 if padding == "valid" else padding, dims))
    return LayerCall(x, weight, bias, transposed, stride, pairs, dilation, given.get("groups", 1))


def set_call(layer: Any, x: Tensor) -> LayerCall:
    """The call that a layer's settings speak of, whatever the layer does when it runs."""
    found = None
    if isinstance(layer, nn.modules.conv._ConvNd):
        dims, transposed = len(layer.kernel_size), layer.transposed
        func = (_TRANSPOSED if transposed else _CONVOLUTIONS)[dims - 1]
        settings = {name: getattr(layer, name) for name in ("weight", *_NAMES[3:])}
        found = call_of(func, (x,), settings)
    return found or LayerCall(x, layer.weight)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Iterable) else (value,)  # NumPy's integers are no `int`
    return values * dims if len(values) == 1 else values


def version_of(x: Tensor) -> int:
    """How often a tensor has been changed in place; under `torch.inference_mode` nobody counts."""
    return 0 if x.is_inference() else x._version


def tensors_read(result: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> list[Tensor]:
    """Of which of its arguments a function of torch has made another tensor.

    Shapes and devices do not read, nor does what hands its argument on, as dropout does in eval mode and a cast to the
    type that a tensor has.
    """
    made = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
    given = pytree.tree_leaves((args, kwargs)) if made else []
    return [x for x in given if isinstance(x, Tensor) and not any(x is y for y in made)]


class _CallWatch(TorchFunctionMode):
    """Holds on to the last call and what it gave, and counts how often each parameter was used, by whomever."""

    def __init__(self) -> None:
        super().__init__()
        self.last: tuple[LayerCall, Tensor, int] | None = None
        self.uses: Counter[int] = Counter()
        self.resting = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.resting:
            return result
        if (call := call_of(func, args, kwargs)) is not None:
            self.last = call, result, version_of(result)
        # An embedding may look its rows up in a classifier's weight, a decoder may turn an encoder's around.
        self.uses.update(id(x) for x in tensors_read(result, args, kwargs) if isinstance(x, nn.Parameter))
        return result

    def taken(self, y: Any) -> LayerCall | None:
        """The call that made this very output, if it was the last one and nothing has changed it since; let go of."""
        last, self.last = self.last, None
        return last[0] if last is not None and last[1] is y and last[2] == version_of(y) else None


@contextmanager
def watching_calls(
    layers: Mapping[str, nn.Module], see: Callable[[str, Any, Any, LayerCall | None], object]
) -> Iterator[_CallWatch]:
    """Until the block ends, show `see` of each of these layers that has run its name, what it read, its output, and
    the call whose very result that is: None where there is more to it than one call."""
    watch = _CallWatch()

    def hook(name: str) -> Callable[..., None]:
        def ran(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            call, watch.resting = watch.taken(y), True  # what `see` computes is no part of the network
            try:
                see(name, next(iter((*args, *kwargs.values())), None), y, call)
            finally:
                watch.resting = False

        return ran

    handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with watch:
            yield watch
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def plain_layers(model: nn.Module, inputs: tuple[Any, ...], layers: Iterable[str]) -> set[str]:
    """Those of these layers that multiply with the weight they hold, add their bias, and do nothing behind that.

    Only their weights can be fitted or folded into. A weight that is standardised first, computed from parameters, or
    used in another place too, is not theirs alone. Their inputs they may pad, or prepare in other ways: what they
    multiply is the call's `x`.
    """
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in layers}
    runs: Counter[str] = Counter()
    odd: set[str] = set()

    def see(name: str, _x: Any, _y: Any, call: LayerCall | None) -> None:
        own = modules[name]._parameters
        runs[name] += 1
        if call is None or call.weight is not own.get("weight") or call.bias is not own.get("bias"):
            odd.add(name)

    with evaluating(model), watching_calls(modules, see) as watch:
        model(*inputs)
    return {name for name in runs if name not in odd and watch.uses[id(modules[name].weight)] == runs[name]}
