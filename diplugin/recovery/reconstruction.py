"""Reconstruction: every layer of the pruned network learns, by least squares, to say what it said before.

Layer by layer in the order of execution, each convolution and linear layer is refitted so that from the inputs it
*now* gets (those of the pruned network, whose earlier layers are refitted already) it comes as near as possible to the
outputs it *used to* give. With X the patches it reads, T the unpruned network's outputs and W₀ the present weights,

    W = W₀ + (XᵀX + λI)⁻¹ Xᵀ(T − X W₀),

centred where a bias or a BatchNorm can take up the constant. Errors of earlier layers are repaired by later ones
instead of adding up, which is what a fit of each layer alone cannot do. Where a layer's output is added to a shortcut,
the target is the unpruned *sum* less what the shortcut now brings, so that every block mends the residual stream.

No gradient, no label: one pass of the unpruned network over a thousand images, in which targets are kept at a few
random pixels an image, and one pass of the pruned one, in which every layer is refitted just before its output is
used. BatchNorm keeps the statistics of the unpruned network, whose outputs are reproduced; recalibrating afterwards
would undo part of the work.

Many processes deal the images out: each runs both passes on its own, the sums of every layer's problem are added up,
and all solve the same one.

This is our addition; the idea of fitting a pruned layer to the unpruned outputs is that of He, Zhang & Sun, "Channel
pruning for accelerating very deep neural networks", 2017.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..features import Forward, device_of, forward_inputs, to_device
from ..layer_calls import LayerCall, call_of, plain_layers, version_of
from ..network import LayerSpec, NetworkTrace
from ..plan import PruningPlan
from ..team import Team, current_team
from .layer_fit import LayerFit, Site
from .one_batch import one_batch, rows_of
from .outputs import OutputWatch, after_call, examples_of, norms_behind

_ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_BATCH_NORMS = (F.batch_norm, torch.batch_norm)
_SMALLEST_SCALE = 1e-3


@dataclass(frozen=True)
class Reconstruction:
    """Settings of the refit.

    Attributes:
        images: training images that the fit sees, all at once.
        samples: about this many output positions a layer, spread over the images.
        ridge: λ as a fraction of the inputs' mean square: how strongly the present weights are held.
        memory_mb: images and samples become fewer until activations and targets take no more than about this.
    """

    images: int = 1000
    samples: int = 64_000
    ridge: float = 3e-3
    memory_mb: int = 4000

    def within_memory(self, trace: NetworkTrace) -> Reconstruction:
        """These settings, with images and samples that fit a network of this size (float32 assumed).

        Half the memory is for the two largest tensors that one layer reads and writes, twice, since the runtime copies
        them into layouts of its own; a quarter for all layers' targets.
        """
        spare = self.memory_mb * 1e6 / 4
        layers = [x for x in trace.layers if x.op != "norm"]
        largest = max((prod(x.input_shape) + prod(x.output_shape) for x in layers), default=1)
        values = sum(x.out_channels for x in layers) or 1
        images = max(1, min(self.images, int(2 * spare / (2 * largest * 4))))
        return replace(self, images=images, samples=max(1, min(self.samples, int(spare / (values * 4)))))


@torch.no_grad()
def reconstruct(
    pruned: nn.Module,
    unpruned: nn.Module,
    loader: Iterable[Any],
    trace: NetworkTrace,
    plan: PruningPlan,
    settings: Reconstruction | None = None,
    *,
    forward: Forward = forward_inputs,
) -> tuple[str, ...]:
    """Refit the pruned network's layers to the unpruned one's outputs, in place.

    Args:
        pruned: the network after `apply_plan`, on the unpruned one's device.
        loader: batches of training data; labels are not used.
        trace, plan: of the unpruned network.

    Returns:
        Names of the layers that were refitted. Passed over are grouped and transposed convolutions, layers that run
        more than once or without a batch or do more than to multiply with their weight, those whose input is
        overwritten before a shortcut is added to their output, and fits of more than 6,000 unknowns an output.

    Raises:
        DataError: the loader yields nothing, batches that cannot be joined, or features that are not finite.
    """
    settings = (settings or Reconstruction()).within_memory(trace)
    team = current_team(loader)
    with team.guarding():
        batch, images = one_batch(loader, settings.images)
        if images < team.size:
            team = Team()  # too few to be dealt: everybody does all of it
        share = _Share(images, team.rows(images), settings.samples)
        batch = to_device(rows_of(batch, share.rows, images), device_of(unpruned))
        targets = _Targets(unpruned, _sites(unpruned, trace, plan), share)
        with targets.watching():
            forward(unpruned, batch)
        refit = _Refit(pruned, targets, settings.ridge, team)
        with refit.watching():
            forward(pruned, batch)
    return tuple(refit.done)


def _sites(model: nn.Module, trace: NetworkTrace, plan: PruningPlan) -> dict[str, Site]:
    """The layers that can be refitted: convolutions and linear layers that are called once and do nothing else."""
    gone = trace.channels_of(plan.removed, "out")
    calls = Counter(layer.name for layer in trace.layers)
    orders = {
        layer.name: order for order, layer in enumerate(trace.layers) if calls[layer.name] == 1 and _refittable(layer)
    }
    plain = plain_layers(model, examples_of(model, trace), orders)
    orders = {name: order for name, order in orders.items() if name in plain}
    # The mean of a BatchNorm that is called twice cannot be moved for one of the calls.
    batch_norms = [name for name, count in calls.items() if count == 1 and _is_batch_norm(model.get_submodule(name))]
    norms = norms_behind(model, trace, orders, batch_norms)
    sites = {}
    for name, order in orders.items():
        layer = trace.layers[order]
        kept = [c for c in range(layer.out_channels) if c not in gone.get(name, ())]
        sites[name] = Site(layer, order, torch.tensor(kept), norms.get(name))
    return sites


def _refittable(layer: LayerSpec) -> bool:
    if len(layer.output_shape) < 2 + len(layer.kernel):
        return False  # called without a batch
    return layer.op == "linear" or (layer.op == "conv" and (layer.groups == 1 or layer.depthwise))


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats


class _Share:
    """The images that this process works on, and where in their outputs it looks."""

    def __init__(self, images: int, rows: slice, samples: int) -> None:
        self.images, self.rows, self.samples = images, rows, samples
        self._draw = torch.Generator().manual_seed(0)

    def positions(self, site: Site, y: Tensor) -> Tensor:
        """[N, P]: random positions, none twice, of an output of N rows, one or several an image.

        All processes draw for all images, so that together they look where one process would; rows that are not the
        images' are everybody's own.
        """
        each, rest = divmod(len(y), self.rows.stop - self.rows.start)
        total, first = (len(y), 0) if rest or not each else (self.images * each, self.rows.start * each)
        places = site.places(y)
        count = min(places, max(1, self.samples // total))
        return torch.rand(total, places, generator=self._draw).topk(count, dim=1).indices[first : first + len(y)]


class _Watch(OutputWatch):
    """Hooks on the sites of one network, and an eye on the sums that their outputs, normalised, go into."""

    def __init__(self, model: nn.Module, sites: Mapping[str, Site]) -> None:
        super().__init__(model)
        self.sites = dict(sites)
        self._affine: tuple[weakref.ref[Tensor], int] | None = None

    def after(self, name: str, y: Tensor) -> None:
        """Called after a site has run."""

    def added(self, name: str, y: Tensor, other: Tensor) -> None:
        """Called when a site's output, normalised, is about to meet a shortcut; nobody has read it before."""

    def hook(self, stack: ExitStack) -> None:
        for name, site in self.sites.items():
            after_call(stack, self.modules[name], partial(self.after, name))
            after_call(stack, self.modules[site.norm or name], partial(self._gives, name))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _ADDITIONS and len(args) == 2 and not kwargs:
            self._add(*args)
        result = super().__torch_function__(func, types, args, kwargs)
        if func in _BATCH_NORMS:
            self._affine = weakref.ref(result), version_of(result)
        return result

    def _gives(self, name: str, y: Tensor) -> None:
        output = self.follow(name, y)
        if self.sites[name].norm is not None:
            made, version = self._affine or (lambda: None, 0)
            # A norm with an activation of its own: what is added behind that cannot be mended in front of it.
            output.read = made() is not y or version_of(y) != version

    def _add(self, a: Any, b: Any) -> None:
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape or a is b:
            return
        # Of two sites the later one mends the sum: by then the earlier one's error is known.
        found = [(output.layer, y, other) for y, other in ((a, b), (b, a)) if (output := self.unread(y))]
        if found:
            self.added(*max(found, key=lambda x: self.sites[x[0]].order))


class _Targets(_Watch):
    """What the unpruned network's sites say, and what shortcuts bring them, at positions drawn on the way."""

    def __init__(self, model: nn.Module, sites: Mapping[str, Site], share: _Share) -> None:
        super().__init__(model, sites)
        self.share = share
        self.outputs_of: dict[str, Tensor] = {}
        self.shortcuts: dict[str, Tensor] = {}

    def after(self, name: str, y: Tensor) -> None:
        site = self.sites[name] = self.sites[name].at(self.share.positions(self.sites[name], y))
        self.outputs_of[name] = site.sampled(y)[..., site.kept.to(y.device)]

    def added(self, name: str, y: Tensor, other: Tensor) -> None:
        site = self.sites[name]
        self.shortcuts[name] = site.sampled(other)[..., site.kept.to(other.device)]


@dataclass(frozen=True)
class _Waiting:
    """A call that is over, how to make it again, and how often what it read had been changed in place by then."""

    call: LayerCall
    make: Callable[[], Tensor]
    version: int


class _Refit(_Watch):
    """Refits the pruned network's sites while it runs."""

    def __init__(self, model: nn.Module, targets: _Targets, ridge: float, team: Team) -> None:
        calls = Counter(output.layer for output in targets.outputs)  # a `forward` may call the network twice
        super().__init__(model, {name: site for name, site in targets.sites.items() if calls[name] == 1})
        self.targets, self.ridge, self.team = targets, ridge, team
        self.done: list[str] = []
        self._by_weight = {id(self.modules[name].weight): name for name in self.sites}
        self._waiting: dict[str, _Waiting] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = call_of(func, args, kwargs)
        # Once: a `forward` may use a weight again behind the network.
        name = None if call is None else self._by_weight.pop(id(call.weight), None)
        if call is not None and name is not None:
            self._calling(name, call, partial(func, *args, **(kwargs or {})))
        return super().__torch_function__(func, types, args, kwargs)

    def _calling(self, name: str, call: LayerCall, make: Callable[[], Tensor]) -> None:
        """A site is about to use its weight: the moment to refit it."""
        if name in self.targets.shortcuts:
            self._waiting[name] = _Waiting(call, make, version_of(call.x))  # its target is known once the shortcut is
        else:
            self._fit(name, call, self.targets.outputs_of.pop(name))

    def added(self, name: str, y: Tensor, other: Tensor) -> None:
        waiting = self._waiting.pop(name, None)
        if waiting is None or version_of(waiting.call.x) != waiting.version:
            return  # what the layer read has been overwritten since
        site, norm = self.sites[name], self._norm_of(name)
        shortcut = self.targets.shortcuts.pop(name) - site.sampled(other)
        self._fit(name, waiting.call, self.targets.outputs_of.pop(name) + shortcut / _scale(norm))
        refitted = waiting.make()
        # In place: whoever holds the output goes on with the refitted one, and so does a sum whose value nobody takes.
        y.copy_(refitted if norm is None else norm.forward(refitted))

    def _fit(self, name: str, call: LayerCall, target: Tensor) -> None:
        fit = LayerFit(self.modules[name], self.sites[name], call, target, self.team)
        if fit.solve(self.ridge, self._norm_of(name)):
            self.done.append(name)

    def _norm_of(self, name: str) -> Any:
        norm = self.sites[name].norm
        return None if norm is None else self.modules[norm]


def _scale(norm: Any) -> Any:
    """By what a BatchNorm in eval mode multiplies its input, kept away from zero."""
    if norm is None:
        return 1.0
    scale = torch.rsqrt(norm.running_var + norm.eps) * (1.0 if norm.weight is None else norm.weight)
    return torch.where(scale.abs() < _SMALLEST_SCALE, torch.inf, scale)
