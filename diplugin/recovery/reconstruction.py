"""Reconstruction: every layer of the pruned network learns, by least squares, to say what it said before.

Layer by layer in the order of execution, each convolution and linear layer is refitted so that from the inputs it
*now* gets (those of the pruned network, whose earlier layers are refitted already) it comes as near as possible to the
outputs it *used to* give. With X the patches it reads, T the unpruned network's outputs and W₀ the present weights,

    W = W₀ + (XᵀX + λI)⁻¹ Xᵀ(T − X W₀),

centred where a bias or a BatchNorm can take up the constant. Errors of earlier layers are repaired by later ones
instead of adding up, which is what a fit of each layer alone cannot do. No gradient, no label: one pass of the unpruned
network over a thousand images, in which the targets are kept at a few random pixels an image, and one pass of the
pruned one, in which every layer is refitted just before it runs. BatchNorm keeps the statistics of the unpruned
network, whose outputs are reproduced; recalibrating afterwards would undo part of the work.

This is our addition; the idea of fitting a pruned layer to the unpruned outputs is that of He, Zhang & Sun, "Channel
pruning for accelerating very deep neural networks", 2017.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import DataError
from ..features import Forward, device_of, forward_inputs, to_device
from ..network import LayerSpec, NetworkTrace
from ..plan import PruningPlan

_LARGEST_FIT = 6000
_BLOCK_ROWS = 20_000


@dataclass(frozen=True)
class Reconstruction:
    """Settings of the refit.

    Attributes:
        images: training images that the fit sees, all at once.
        samples: about this many output positions a layer, spread over the images.
        ridge: λ as a fraction of the inputs' mean square: how strongly the present weights are held.
    """

    images: int = 1000
    samples: int = 64_000
    ridge: float = 3e-3


@dataclass(frozen=True)
class _Site:
    """One layer to refit: its kept outputs, the BatchNorm behind it, and where its outputs are sampled."""

    spec: LayerSpec
    kept: Tensor
    norm: str | None
    positions: Tensor  # [N, P] flat output positions


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
    settings = settings or Reconstruction()
    batch = _gather(loader, settings.images)
    images = next(len(x) for x in pytree.tree_leaves(batch) if isinstance(x, Tensor))
    sites = _sites(unpruned, trace, plan, images, settings.samples)
    device = device_of(unpruned)
    targets: dict[str, Tensor] = {}
    with _hooked(unpruned, sites, lambda site, _x, y: targets.__setitem__(site.spec.name, _sampled(site, y))):
        forward(unpruned, to_device(batch, device))
    done: list[str] = []
    modules = dict(pruned.named_modules())

    def refit(site: _Site, x: Tensor) -> None:
        module: Any = modules[site.spec.name]
        fit = _Fit(module, site, x, targets.pop(site.spec.name)[..., site.kept])
        if fit.solve(settings.ridge, modules.get(site.norm) if site.norm else None):
            done.append(site.spec.name)

    with _hooked(pruned, sites, None, before=refit):
        forward(pruned, to_device(batch, device))
    return tuple(done)


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


def _sites(
    model: nn.Module, trace: NetworkTrace, plan: PruningPlan, images: int, samples: int
) -> dict[str, _Site]:
    removed = plan.removed
    gone: dict[str, set[int]] = {}
    for group in trace.prunable:
        lost = set(removed.get(group.name, ()))
        for m in group.members:
            if m.side == "out":
                gone.setdefault(m.layer, set()).update(
                    c for c, r in zip(m.channels, m.roots, strict=True) if r in lost)  # fmt: skip
    calls = [layer.name for layer in trace.layers]
    draw = torch.Generator().manual_seed(0)
    sites = {}
    for layer, behind in zip(trace.layers, (*trace.layers[1:], None), strict=True):
        if layer.op not in ("conv", "linear") or calls.count(layer.name) != 1:
            continue
        if layer.groups > 1 and not layer.depthwise:
            continue
        kept = [c for c in range(layer.out_channels) if c not in gone.get(layer.name, ())]
        places = prod(layer.output_shape[2:] if layer.op == "conv" else layer.output_shape[1:-1])
        count = min(places, max(1, samples // images))
        positions = torch.rand(images, places, generator=draw).topk(count, dim=1).indices
        norm = behind.name if behind is not None and behind.op == "norm" and _batch_norm(model, behind) else None
        if norm is not None and behind is not None and behind.input_shape != layer.output_shape:
            norm = None
        sites[layer.name] = _Site(layer, torch.tensor(kept), norm, positions)
    return sites


def _batch_norm(model: nn.Module, layer: LayerSpec) -> bool:
    module = model.get_submodule(layer.name)
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats


@contextmanager
def _hooked(model: nn.Module, sites: Mapping[str, _Site], after: Any, before: Any = None) -> Iterator[None]:
    modules = dict(model.named_modules())
    modes = {module: module.training for module in model.modules()}
    handles = []
    try:
        for name, site in sites.items():
            if after is not None:
                handles.append(modules[name].register_forward_hook(
                    lambda _, args, y, site=site: after(site, args[0], y)))  # fmt: skip
            if before is not None:
                handles.append(modules[name].register_forward_pre_hook(
                    lambda _, args, site=site: before(site, args[0])))  # fmt: skip
        model.eval()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training


def _sampled(site: _Site, y: Tensor) -> Tensor:
    """[N, P, C]: the outputs at the sampled positions."""
    rows = (y.flatten(2).transpose(1, 2) if site.spec.op == "conv" else y.reshape(len(y), -1, y.shape[-1]))
    return rows[torch.arange(len(y))[:, None], site.positions.to(y.device)]


class _Fit:
    """The least-squares problem of one layer."""

    def __init__(self, module: Any, site: _Site, x: Tensor, targets: Tensor) -> None:
        self.module, self.site, self.x, self.targets = module, site, x, targets
        self.depthwise = getattr(module, "groups", 1) > 1
        window = prod(getattr(module, "kernel_size", ()))
        channels = getattr(module, "in_channels", None) or module.in_features
        self.unknowns = window if self.depthwise else window * channels
        self.sets = channels if self.depthwise else 1

    def solve(self, ridge: float, norm: Any) -> bool:
        """Refit the module in place; False where the fit was passed over."""
        if self.unknowns > _LARGEST_FIT:
            return False
        centred = norm is not None or self.module.bias is not None
        gram, cross, mean_x, mean_t = self._moments(centred)
        if not bool(torch.isfinite(gram).all() and torch.isfinite(cross).all()):
            raise DataError(f"expected finite feature maps at {self.site.spec.name}, got NaN or infinity")
        weight = self._columns()
        level = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
        shifted = gram + level[:, None, None] * torch.eye(self.unknowns, dtype=gram.dtype, device=gram.device)
        weight = weight + torch.linalg.solve(shifted, cross - gram @ weight)
        self._write(weight)
        if centred:
            constant = mean_t - (mean_x[:, None] @ weight)[:, 0]
            self._shift(constant.flatten(), norm)
        return True

    def _moments(self, centred: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """XᵀX/M [S, D, D], XᵀT/M [S, D, O] and means, over the samples; S = 1, or the channels of a depthwise one."""
        d, outs = self.unknowns, 1 if self.depthwise else self.targets.shape[-1]
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=self.x.device)  # noqa: E731
        gram, cross = zeros(self.sets, d, d), zeros(self.sets, d, outs)
        sum_x, sum_t, rows = zeros(self.sets, d), zeros(self.sets, outs), 0
        per_block = max(1, _BLOCK_ROWS // self.site.positions.shape[1])
        for block in torch.arange(len(self.x), device=self.x.device).split(per_block):
            x, t = self._patches(block), self._targets(block)
            gram += (x.transpose(1, 2) @ x).double()
            cross += (x.transpose(1, 2) @ t).double()
            sum_x += x.sum(1).double()
            sum_t += t.sum(1).double()
            rows += x.shape[1]
        gram, cross, mean_x, mean_t = gram / rows, cross / rows, sum_x / rows, sum_t / rows
        if centred:
            gram = gram - mean_x[:, :, None] * mean_x[:, None]
            cross = cross - mean_x[:, :, None] * mean_t[:, None]
        return gram, cross, mean_x, mean_t

    def _targets(self, block: Tensor) -> Tensor:
        t = self.targets[block].flatten(0, 1)
        # A depthwise layer is one small problem a channel, of one output each.
        return t.T[..., None] if self.depthwise else t[None]

    def _patches(self, block: Tensor) -> Tensor:
        """[S, M, D]: what the layer reads at the sampled positions."""
        x, positions = self.x[block], self.site.positions.to(self.x.device)[block]
        images = torch.arange(len(x), device=x.device)[:, None]
        if self.site.spec.op == "linear":
            return x.reshape(len(x), -1, x.shape[-1])[images, positions].flatten(0, 1)[None]
        patches = _windows(x, positions, self.module)  # [M, C, K]
        return patches.permute(1, 0, 2) if self.depthwise else patches.flatten(1)[None]

    def _columns(self) -> Tensor:
        """The weights as [S, D, O]."""
        weight = self.module.weight.double()
        return weight.flatten(1)[..., None] if self.depthwise else weight.flatten(1).T[None]

    def _write(self, weight: Tensor) -> None:
        flat = weight[..., 0] if self.depthwise else weight[0].T
        self.module.weight.copy_(flat.reshape(self.module.weight.shape))

    def _shift(self, constant: Tensor, norm: Any) -> None:
        """Make the layer's output larger by `constant` [O], less what its bias says already."""
        if norm is not None:
            bias = 0.0 if self.module.bias is None else self.module.bias.double()
            norm.running_mean.sub_((constant - bias).to(norm.running_mean))
        else:
            self.module.bias.copy_(constant)


def _windows(x: Tensor, positions: Tensor, conv: Any) -> Tensor:
    """[N·P, C, K]: the windows of a convolution around flat output positions [N, P], in one to three dimensions."""
    dims = len(conv.kernel_size)
    padding = _padding(conv)
    padded = F.pad(x, [p for pair in reversed(padding) for p in pair])
    sizes = [(padded.shape[2 + i] - conv.dilation[i] * (conv.kernel_size[i] - 1) - 1) // conv.stride[i] + 1
             for i in range(dims)]  # fmt: skip
    flat, rest = torch.zeros_like(positions)[..., None], positions
    grids = torch.meshgrid(*(torch.arange(k, device=x.device) for k in conv.kernel_size), indexing="ij")
    starts: list[Tensor] = []
    for size in reversed(sizes):
        starts.insert(0, rest % size)
        rest = rest // size
    for i in range(dims):
        coordinate = starts[i][..., None] * conv.stride[i] + grids[i].flatten() * conv.dilation[i]
        flat = flat * padded.shape[2 + i] + coordinate
    maps = padded.flatten(2)  # [N, C, places]
    index = flat.flatten(1)[:, None].expand(-1, maps.shape[1], -1)
    taken = maps.gather(2, index).view(len(x), maps.shape[1], positions.shape[1], -1)
    return taken.transpose(1, 2).flatten(0, 1)


def _padding(conv: Any) -> Sequence[tuple[int, int]]:
    if conv.padding == "valid":
        return [(0, 0)] * len(conv.kernel_size)
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [(t // 2, t - t // 2) for t in totals]
    return [(p, p) for p in conv.padding]
