"""The least-squares problem of one layer: its present inputs, the outputs it should give, the weights in between."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..layer_calls import LayerCall
from ..network import LayerSpec
from ..team import Team

_LARGEST_FIT = 6000
_BLOCK_ROWS = 10_000


@dataclass(frozen=True)
class Site:
    """One layer to refit.

    Attributes:
        spec: the layer as it was traced.
        order: its place in the order of execution.
        kept: output channels that the plan keeps.
        norm: name of the BatchNorm that alone reads its output, if there is one.
        positions: [N, P] flat output positions at which the fit looks; none until the layer has been seen to run.
    """

    spec: LayerSpec
    order: int
    kept: Tensor
    norm: str | None
    positions: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))

    def places(self, y: Tensor) -> int:
        """How many positions an output [N, C, *places] of a convolution, [N, *places, C] of a linear layer, has."""
        return prod(y.shape[2:] if self.spec.op == "conv" else y.shape[1:-1])

    def at(self, positions: Tensor) -> Site:
        """The same site, looking there."""
        return replace(self, positions=positions)

    def sampled(self, y: Tensor) -> Tensor:
        """[N, P, C]: a tensor of this layer's output shape at the sampled positions."""
        rows = y.flatten(2).transpose(1, 2) if self.spec.op == "conv" else y.reshape(len(y), -1, y.shape[-1])
        return rows[torch.arange(len(y), device=y.device)[:, None], self.positions.to(y.device)]


class LayerFit:
    """The least-squares problem of one layer; of many processes each has some of the images, all find one solution.

    Args:
        module: whose weight and bias are refitted.
        call: how it uses them, on what it reads now.
        targets: [N, P, O] at the site's positions.
    """

    def __init__(self, module: Any, site: Site, call: LayerCall, targets: Tensor, team: Team | None = None) -> None:
        self.module, self.site, self.call, self.targets = module, site, call, targets
        self.team = team or Team()
        self.depthwise = call.groups > 1
        self.unknowns = call.weight[0].numel()
        self.sets = call.groups

    @torch.no_grad()
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
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=self.call.x.device)  # noqa: E731
        gram, cross = zeros(self.sets, d, d), zeros(self.sets, d, outs)
        sum_x, sum_t, rows = zeros(self.sets, d), zeros(self.sets, outs), zeros(1)
        per_block = max(1, _BLOCK_ROWS // self.site.positions.shape[1])
        for block in torch.arange(len(self.call.x), device=self.call.x.device).split(per_block):
            # Double before the products: centring cancels, and a small ridge multiplies what float32 rounds off by 1/λ.
            x, t = self._patches(block).double(), self._targets(block).double()
            gram += x.transpose(1, 2) @ x
            cross += x.transpose(1, 2) @ t
            sum_x += x.sum(1)
            sum_t += t.sum(1)
            rows += x.shape[1]
        self.team.sum([gram, cross, sum_x, sum_t, rows])
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
        x = self.call.x[block]
        positions, images = self.site.positions.to(x.device)[block], torch.arange(len(x), device=x.device)[:, None]
        if self.site.spec.op == "linear":
            return x.reshape(len(x), -1, x.shape[-1])[images, positions].flatten(0, 1)[None]
        patches = self.call.windows(x, positions)  # [M, C, K]
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
