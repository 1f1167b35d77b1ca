"""One training step on many processes: the gradients of a whole batch, of which every process runs a part.

The parts are weighted by their images, so the sum of the parts' gradients is the gradient of the whole, and every
process takes the same step. BatchNorm is what would tell one process from two: its statistics are those of a batch,
and a part has others. So while a part runs, statistics are exchanged at every BatchNorm, and the gradient flows through
those of the whole. (torch's own SyncBatchNorm does so on GPUs only and for one class of modules; here the function
beneath all BatchNorms is watched, on any device.)

What is drawn at random inside the network, dropout say, is drawn by each process for its own images: such a network
ends alike but not equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..features import batch_length
from ..team import Team


@dataclass(frozen=True)
class Part:
    """What one process runs of a batch.

    Attributes:
        share: of the batch's images.
        dealt: False where every process runs the whole batch, which is too small to be dealt or cannot be cut.
    """

    batch: Any
    share: float = 1.0
    dealt: bool = False


class SharedStep:
    """The steps of one training, shared by a team; with a team of one nothing is exchanged and nothing changes."""

    def __init__(self, team: Team) -> None:
        self.team = team

    def part(self, batch: Any) -> Part:
        """This process' images of a batch that all processes have."""
        images = batch_length(batch) if self.team.size > 1 else None
        if images is None or images < 2 * self.team.size:
            return Part(batch)
        rows = self.team.rows(images)
        return Part(pytree.tree_map(lambda x: x[rows], batch), (rows.stop - rows.start) / images, True)

    @contextmanager
    def running(self, part: Part, step: int) -> Iterator[None]:
        """While the part runs forward and backward, as the training's step of this number."""
        if not part.dealt:
            yield
            return
        # What the network draws must not shift what the data draws: all processes see the same batches.
        with torch.random.fork_rng(devices=_gpus()), SharedBatchNorm(self.team):
            torch.manual_seed((torch.initial_seed() + 7919 * (step + 1) + self.team.rank) % 2**63)
            yield

    def everywhere(self, part: Part, facts: list[bool]) -> list[bool]:
        """Facts about a part that hold of the whole batch."""
        if not part.dealt:
            return facts
        against = torch.tensor([not fact for fact in facts]).double()
        self.team.sum([against])
        return [not count for count in against.tolist()]

    def summed(self, part: Part, loss: Tensor, parameters: Sequence[nn.Parameter]) -> float:
        """Exchange the gradients of the parts' weighted losses; returns the loss of the whole batch.

        What one part alone has run (a layer for some images, say) has a gradient there alone, which counts for all.
        """
        if not part.dealt:
            return float(loss.detach())
        reached = [float(p.grad is not None) for p in parameters]
        sums = torch.tensor([float(loss.detach()), *reached], dtype=torch.float64)
        self.team.sum([sums])
        for parameter, anywhere in zip(parameters, sums[1:].tolist(), strict=True):
            if anywhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.team.sum([p.grad for p in parameters if p.grad is not None])
        return float(sums[0])


def _gpus() -> list[int]:
    """The GPU of this process, if it uses one."""
    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []


class SharedBatchNorm(TorchFunctionMode):
    """While it is on, BatchNorm in training mode normalises by the statistics of everybody's images."""

    def __init__(self, team: Team) -> None:
        super().__init__()
        self._team = team

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
        bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        return _Normalised.apply(input, weight, bias, (running_mean, running_var, momentum), eps, self._team)


class _Normalised(torch.autograd.Function):
    """(x − mean) / √(var + eps) · weight + bias, with mean and variance over the images of all processes.

    With w the weight, x̂ the normalised input, n the number of all values of a channel, the gradient is that of fixed
    statistics less what flows through them: w/σ · (Σ dy + x̂ · Σ dy·x̂)/n, both sums over all processes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None,
        running: tuple[Tensor | None, Tensor | None, float], eps: float, team: Team,
    ) -> Tensor:  # fmt: skip
        count, mean, var = _statistics(x, team)
        running_mean, running_var, momentum = running
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var), momentum)
        scale = torch.ones_like(mean, dtype=x.dtype) if weight is None else weight.detach()
        mean, var = mean.to(scale.dtype), var.to(scale.dtype)
        ctx.save_for_backward(x, scale, mean, var)
        ctx.eps, ctx.team, ctx.count = eps, team, count
        return F.batch_norm(x, mean, var, scale, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        x, scale, mean, var = ctx.saved_tensors
        # torch's own backward of fixed statistics is fused; it is meant for inside use, and trusted where it is tested.
        fixed = fused_backward if x.device.type == "cpu" else plain_backward
        dx, d_weight, d_bias = fixed(dy, x, scale, mean, var, ctx.eps)
        sums = torch.stack([d_bias, d_weight])
        ctx.team.sum([sums])
        inverse = torch.rsqrt(var + ctx.eps)
        shape = [1, -1, *[1] * (x.ndim - 2)]
        each = (scale * inverse / ctx.count * sums[0]).view(shape).to(x.dtype)
        along = (scale * inverse * inverse / ctx.count * sums[1]).view(shape).to(x.dtype)
        dx = dx.sub_(each).sub_((x - mean.view(shape).to(x.dtype)).mul_(along))
        _, of_weight, of_bias, *_ = ctx.needs_input_grad
        return dx, d_weight if of_weight else None, d_bias if of_bias else None, None, None, None


def fused_backward(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, ...]:
    """Gradients by input, weight and bias of a normalisation by fixed statistics."""
    return torch.ops.aten.native_batch_norm_backward(
        dy.contiguous(), x, scale, mean, var, None, None, False, eps, [True, True, True]
    )


def plain_backward(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, ...]:
    """The same, from parts that every device has."""
    shape, over = [1, -1, *[1] * (x.ndim - 2)], [d for d in range(x.ndim) if d != 1]
    inverse = torch.rsqrt(var + eps)
    d_bias = dy.sum(over, dtype=scale.dtype)
    d_weight = (dy * (x - mean.view(shape)) * inverse.view(shape)).sum(over, dtype=scale.dtype)
    return dy * (scale * inverse).view(shape).to(dy.dtype), d_weight, d_bias


def _statistics(x: Tensor, team: Team) -> tuple[float, Tensor, Tensor]:
    """(values a channel, their mean, their variance) over all processes, float64."""
    own = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    var, mean = torch.var_mean(own, [d for d in range(x.ndim) if d != 1], correction=0)
    count = torch.full_like(mean, x.numel() / x.shape[1])
    found = torch.stack(team.everybodys(torch.stack([count, mean, var]).double()))  # [processes, 3, channels]
    total = found[:, 0].sum(0)
    mean = (found[:, 0] * found[:, 1]).sum(0) / total
    var = (found[:, 0] * (found[:, 2] + (found[:, 1] - mean).square())).sum(0) / total
    return float(total[0]), mean, var
