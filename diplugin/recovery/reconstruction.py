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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import DataError
from ..features import Forward, device_of, forward_inputs, to_device
from ..modes import evaluating
from ..network import NetworkTrace
from ..plan import PruningPlan
from ..team import Team, current_team
from .layer_fit import LayerFit, Site

_ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
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
        Names of the layers that were refitted. Grouped and transposed convolutions, layers that run more than once
        and fits of more than 6,000 unknowns an output are passed over.

    Raises:
        DataError: the loader yields nothing, or features that are not finite.
    """
    settings = (settings or Reconstruction()).within_memory(trace)
    team = current_team(loader)
    with team.guarding():
        batch = _gather(loader, settings.images)
        images = next(len(x) for x in pytree.tree_leaves(batch) if isinstance(x, Tensor))
        if images < team.size:
            team = Team()  # too few to be dealt: everybody does all of it
        rows = team.rows(images)
        sites = {n: s.only(rows) for n, s in _sites(unpruned, trace, plan, images, settings.samples).items()}
        batch = to_device(pytree.tree_map(lambda x: x[rows], batch), device_of(unpruned))
        targets = _Targets(unpruned, sites)
        with targets.watching():
            forward(unpruned, batch)
        refit = _Refit(pruned, sites, targets, settings.ridge, team)
        with refit.watching():
            forward(pruned, batch)
    return tuple(refit.done)


def _gather(loader: Iterable[Any], images: int) -> Any:
    batches, seen = [], 0
    for batch in loader:
        batches.append(batch)
        seen += next((len(x) for x in pytree.tree_leaves(batch) if isinstance(x, Tensor)), 0)
        if seen >= images:
            break
    if not seen:
        raise DataError("expected a loader that yields batches to reconstruct with, got an empty one")
    return pytree.tree_map(lambda *xs: torch.cat(xs)[:images], *batches)


def _sites(model: nn.Module, trace: NetworkTrace, plan: PruningPlan, images: int, samples: int) -> dict[str, Site]:
    gone = trace.channels_of(plan.removed, "out")
    calls = [layer.name for layer in trace.layers]
    draw = torch.Generator().manual_seed(0)
    sites = {}
    for order, (layer, behind) in enumerate(zip(trace.layers, (*trace.layers[1:], None), strict=True)):
        refittable = layer.op == "linear" or (layer.op == "conv" and (layer.groups == 1 or layer.depthwise))
        if not refittable or calls.count(layer.name) != 1:
            continue
        kept = [c for c in range(layer.out_channels) if c not in gone.get(layer.name, ())]
        places = prod(layer.output_shape[2:] if layer.op == "conv" else layer.output_shape[1:-1])
        count = min(places, max(1, samples // images))
        positions = torch.rand(images, places, generator=draw).topk(count, dim=1).indices
        normalised = behind is not None and behind.op == "norm" and behind.input_shape == layer.output_shape
        norm = behind.name if behind is not None and normalised and _is_batch_norm(model, behind.name) else None
        sites[layer.name] = Site(layer, order, torch.tensor(kept), norm, positions)
    return sites


def _is_batch_norm(model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name)
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats


class _Watch:
    """Hooks on the sites of one network, and an eye on the sums that their outputs go into."""

    def __init__(self, model: nn.Module, sites: Mapping[str, Site]) -> None:
        self.model, self.sites = model, sites
        self.modules: dict[str, Any] = dict(model.named_modules())
        # The last few outputs of sites, each with its site: a sum is recognised by the identity of its operands. A
        # weak reference will do, as an operand is alive; large maps are not kept for it.
        self._recent: list[tuple[weakref.ref[Tensor], Site]] = []

    def before(self, site: Site, x: Tensor) -> None:
        """Called before a site runs."""

    def after(self, site: Site, y: Tensor) -> None:
        """Called after a site has run."""

    def added(self, site: Site, y: Tensor, other: Tensor) -> Tensor:
        """Called when a site's output, normalised, meets a shortcut; returns what is to be added."""
        return y

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Eval mode, hooks and the watch on sums for the time of the block."""
        with ExitStack() as stack:
            for name, site in self.sites.items():
                self._hook(stack, self.modules[name], site, first=True)
                if site.norm is not None:
                    self._hook(stack, self.modules[site.norm], site, first=False)
            stack.enter_context(evaluating(self.model))
            stack.enter_context(_Sums(self))
            try:
                yield
            finally:
                self._recent.clear()

    def _hook(self, stack: ExitStack, module: nn.Module, site: Site, *, first: bool) -> None:
        def seen(_module: nn.Module, _args: Any, y: Tensor) -> None:
            self._recent = [*self._recent[-7:], (weakref.ref(y), site)]
            if first:
                self.after(site, y)

        stack.callback(module.register_forward_hook(seen).remove)
        if first:
            stack.callback(module.register_forward_pre_hook(lambda _, args: self.before(site, args[0])).remove)

    def site_of(self, x: Any) -> Site | None:
        """The site whose (normalised) output this very tensor is."""
        return next((site for y, site in reversed(self._recent) if y() is x), None)


class _Sums(TorchFunctionMode):
    """Shows a watch every sum of two tensors in which a site's output takes part."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _ADDITIONS and len(args) == 2 and not kwargs:
            args = self._shown(*args)
        return func(*args, **(kwargs or {}))

    def _shown(self, a: Any, b: Any) -> tuple[Any, Any]:
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
            return a, b
        one, two = self._watch.site_of(a), self._watch.site_of(b)
        if one is not None and (two is None or one.order > two.order):
            return self._watch.added(one, a, b), b
        if two is not None:
            return a, self._watch.added(two, b, a)
        return a, b


class _Targets(_Watch):
    """What the unpruned network's sites say, and what shortcuts bring them, at the sampled positions."""

    def __init__(self, model: nn.Module, sites: Mapping[str, Site]) -> None:
        super().__init__(model, sites)
        self.outputs: dict[str, Tensor] = {}
        self.shortcuts: dict[str, Tensor] = {}

    def after(self, site: Site, y: Tensor) -> None:
        self.outputs[site.spec.name] = site.sampled(y)[..., site.kept.to(y.device)]

    def added(self, site: Site, y: Tensor, other: Tensor) -> Tensor:
        self.shortcuts[site.spec.name] = site.sampled(other)[..., site.kept.to(other.device)]
        return y


class _Refit(_Watch):
    """Refits the pruned network's sites while it runs."""

    def __init__(
        self, model: nn.Module, sites: Mapping[str, Site], targets: _Targets, ridge: float, team: Team
    ) -> None:
        super().__init__(model, sites)
        self.targets, self.ridge, self.team = targets, ridge, team
        self.done: list[str] = []
        self._waiting: dict[str, Tensor] = {}

    def before(self, site: Site, x: Tensor) -> None:
        name = site.spec.name
        if name in self.targets.shortcuts:
            self._waiting[name] = x  # its target is known once the shortcut is
        else:
            self._fit(site, x, self.targets.outputs.pop(name))

    def added(self, site: Site, y: Tensor, other: Tensor) -> Tensor:
        name = site.spec.name
        if name not in self._waiting:
            return y
        x, module = self._waiting.pop(name), self.modules[name]
        norm = self.modules[site.norm] if site.norm else None
        shortcut = self.targets.shortcuts.pop(name) - site.sampled(other)
        self._fit(site, x, self.targets.outputs.pop(name) + shortcut / _scale(norm))
        refitted = module.forward(x)
        return refitted if norm is None else norm.forward(refitted)

    def _fit(self, site: Site, x: Tensor, target: Tensor) -> None:
        norm = self.modules[site.norm] if site.norm else None
        if LayerFit(self.modules[site.spec.name], site, x, target, self.team).solve(self.ridge, norm):
            self.done.append(site.spec.name)


def _scale(norm: Any) -> Any:
    """By what a BatchNorm in eval mode multiplies its input, kept away from zero."""
    if norm is None:
        return 1.0
    scale = torch.rsqrt(norm.running_var + norm.eps) * (1.0 if norm.weight is None else norm.weight)
    return torch.where(scale.abs() < _SMALLEST_SCALE, torch.inf, scale)
