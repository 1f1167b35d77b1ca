"""Compensation: the channels that stay take over what those that go had to say (our addition to the method).

Every layer that reads removed channels is rewritten before surgery. With G the second moments of its input channels,
pixel by pixel, the removed channels are regressed on the kept ones,

    x_R ≈ B x_K,   B = G_RK (G_KK + λI)⁻¹,

and the columns of the layer's weight that read R are folded into those that read K: W_K += W_R B. Where the layer has
a bias, or a BatchNorm behind it that is recalibrated anyway, the regression has an intercept, which goes into the bias
or is left to the BatchNorm; elsewhere no bias may appear that a fresh model would not have, and the regression goes
through the origin. One pass over a few hundred images, no gradient; moments are sums over images, so many processes
share the pass out and add theirs up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import DataError
from ..features import Forward, chunks, device_of, forward_inputs, to_device
from ..layer_calls import LayerCall, plain_layers, watching_calls
from ..modes import evaluating
from ..network import NetworkTrace
from ..plan import PruningPlan
from ..team import current_team
from .outputs import examples_of, norms_behind

_MAX_CHANNELS = 4096


@dataclass(frozen=True)
class _Reader:
    """A layer that reads removed channels: which columns stay and which go."""

    name: str
    kept: Tensor
    gone: Tensor


class _Moments:
    """Second moments and means of one layer's input channels, pixel by pixel, in float64."""

    def __init__(self, channels: int) -> None:
        self.gram = torch.zeros(channels, channels, dtype=torch.float64)
        self.total = torch.zeros(channels, dtype=torch.float64)
        self.count = 0

    def add(self, x: Tensor, channel_dim: int) -> None:
        flat = x.detach().movedim(channel_dim, -1).flatten(0, -2).float()
        self.gram += (flat.T @ flat).double().cpu()
        self.total += flat.sum(0).double().cpu()
        self.count += len(flat)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    def second(self, centred: bool) -> Tensor:
        second = self.gram / self.count
        return second - torch.outer(self.mean, self.mean) if centred else second


def compensate(
    model: nn.Module,
    loader: Iterable[Any],
    trace: NetworkTrace,
    plan: PruningPlan,
    *,
    images: int = 1000,
    strength: float = 1e-3,
    forward: Forward = forward_inputs,
) -> tuple[str, ...]:
    """Fold removed channels into the weights that read the kept ones, in place, before `apply_plan`.

    Args:
        model: the unpruned network.
        loader: batches of training data; labels are not used.
        plan: what will be removed.
        images: how many images the moments are taken from.
        strength: λ as a fraction of the kept channels' mean second moment.

    Returns:
        Names of the layers that were rewritten. Depthwise and grouped convolutions are passed over (their outputs read
        one block only), and so are inputs of more than 4,096 channels and layers that do more than to multiply with
        their weight.

    Raises:
        DataError: the loader yields nothing, or features that are not finite.
    """
    readers = _readers(model, trace, plan)
    moments = _input_moments(model, loader, readers, images, forward)
    modules = dict(model.named_modules())
    norms = (name for name, module in modules.items() if _takes_up_constants(module))
    followed = norms_behind(model, trace, moments, norms) if readers else {}
    done = []
    for reader in readers:
        if moments[reader.name].count:
            module = modules[reader.name]
            _fold(module, reader, moments[reader.name], strength, reader.name in followed)
            done.append(reader.name)
    return tuple(done)


def _readers(model: nn.Module, trace: NetworkTrace, plan: PruningPlan) -> list[_Reader]:
    readers = []
    for name, columns in trace.channels_of(plan.removed, "in").items():
        module: Any = model.get_submodule(name)
        width = getattr(module, "in_channels", None) or getattr(module, "in_features", 0)
        if columns and getattr(module, "groups", 1) == 1 and width <= _MAX_CHANNELS and len(columns) < width:
            kept = [c for c in range(width) if c not in columns]
            readers.append(_Reader(name, torch.tensor(kept), torch.tensor(sorted(columns))))
    plain = plain_layers(model, examples_of(model, trace), [reader.name for reader in readers]) if readers else ()
    return [reader for reader in readers if reader.name in plain]


def _input_moments(
    model: nn.Module, loader: Iterable[Any], readers: Sequence[_Reader], images: int, forward: Forward
) -> dict[str, _Moments]:
    moments = {r.name: _Moments(len(r.kept) + len(r.gone)) for r in readers}
    team = current_team(loader)

    def see(name: str, _x: Any, _y: Any, call: LayerCall | None) -> None:
        if call is not None:
            moments[name].add(call.x, 1 if call.kernel else -1)

    modules = {reader.name: model.get_submodule(reader.name) for reader in readers}
    seen = 0
    with evaluating(model), torch.no_grad(), watching_calls(modules, see), team.together():
        for turn, batch in enumerate(chunks(loader) if readers else ()):
            if team.mine(turn):
                forward(model, to_device(batch, device_of(model)))
            seen += next(len(x) for x in pytree.tree_leaves(batch) if isinstance(x, Tensor))
            if seen >= images:
                break
    if readers and not seen:
        raise DataError("expected a loader that yields batches to compensate with, got an empty one")
    counts = torch.tensor([m.count for m in moments.values()], dtype=torch.float64)
    team.sum([counts, *(t for m in moments.values() for t in (m.gram, m.total))])
    for m, count in zip(moments.values(), counts.tolist(), strict=True):
        m.count = int(count)
    if not all(torch.isfinite(m.gram).all() for m in moments.values()):
        raise DataError("expected finite feature maps to compensate with, got NaN or infinity")
    return moments


def _takes_up_constants(module: nn.Module) -> bool:
    """Whether it is a norm whose statistics follow the channels: those of the image, or those that are recalibrated."""
    instance = isinstance(module, nn.modules.instancenorm._InstanceNorm) and not module.track_running_stats
    return instance or isinstance(module, nn.modules.batchnorm._BatchNorm)


@torch.no_grad()
def _fold(module: Any, reader: _Reader, moments: _Moments, strength: float, normalised: bool) -> None:
    centred = module.bias is not None or normalised
    second = moments.second(centred)
    kept, gone = reader.kept, reader.gone
    inner = second[kept][:, kept]
    ridge = strength * inner.diagonal().mean().clamp(min=1e-12)
    coefficients = torch.linalg.solve(inner + ridge * torch.eye(len(kept), dtype=inner.dtype), second[kept][:, gone])
    weight = _columns_first(module).double().cpu()
    lost = weight[gone].flatten(1)
    weight[kept] += (coefficients @ lost).view_as(weight[kept])
    _columns_first(module).copy_(weight)
    if module.bias is not None and centred:
        rest = moments.mean[gone] - moments.mean[kept] @ coefficients
        # A constant reaches every output pixel through the whole window (borders apart), but a transposed convolution
        # deals its window out to the pixels that a stride spans.
        shared = prod(module.stride) if isinstance(module, nn.modules.conv._ConvTransposeNd) else 1
        per_output = (rest @ lost).view(weight.shape[1], -1).sum(1) / shared
        module.bias.add_(per_output.to(module.bias))


def _columns_first(module: Any) -> Tensor:
    """The weight viewed as [in, out, window...]."""
    weight = module.weight.data
    return weight if isinstance(module, nn.modules.conv._ConvTransposeNd) else weight.transpose(0, 1)
