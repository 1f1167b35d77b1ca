"""BatchNorm recalibration: new running statistics for a network whose channels are gone.

Without it every criterion looks alike at half the MACs: the statistics still describe sums over channels that no
longer exist. No gradient is needed, a few hundred training images are enough.

In training mode a BatchNorm normalises by the chunk at hand, so chunks know nothing of each other and can be dealt out
to many processes: the average over all of them is what one process would have found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import DataError
from ..features import Forward, chunks, device_of, forward_inputs, images_in, to_device
from ..modes import evaluating
from ..team import Team, current_team

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def recalibrate_batchnorm(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    images: int = 2000,
    forward: Forward = forward_inputs,
    chunk_size: int = 250,
) -> nn.Module:
    """Replace the running statistics of every BatchNorm by averages over training images, in place.

    Only BatchNorms run in training mode (dropout stays off); all modes are as before afterwards. A model without
    BatchNorm is left alone and the data is not read. Where `torch.distributed` is initialised the chunks are shared
    out, and every process ends with the statistics of all.

    Args:
        loader: batches of training data; labels are not used.
        images: stop after this many.
        forward: how a batch is run.

    Raises:
        DataError: the loader yields nothing, or a batch of one image only, or what makes statistics NaN or infinite;
            the old ones are put back.
    """
    norms = [m for m in model.modules() if isinstance(m, _BATCH_NORM) and m.track_running_stats]
    if not norms:
        return model
    momenta = {norm: norm.momentum for norm in norms}
    before = {norm: {k: v.clone() for k, v in norm.state_dict().items()} for norm in norms}
    seen, done = 0, False
    team = current_team(loader)
    try:
        with evaluating(model), torch.no_grad(), team.together():
            for norm in norms:
                norm.training = True  # not `train()`: a dropout of its own stays off
                norm.reset_running_stats()
                norm.momentum = None  # a plain average over chunks
            turn = 0
            for batch in chunks(loader, chunk_size):
                count = images_in(batch)
                if count < 2:
                    continue
                if team.mine(turn):
                    forward(model, to_device(batch, device_of(model)))
                seen, turn = seen + count, turn + 1
                if seen >= images:
                    break
        _average(norms, team)
        done = seen > 0 and all(bool(torch.isfinite(s).all()) for norm in norms for s in _statistics(norm))
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
            # Also where a norm never ran: no statistics are better than none of its own.
            if not done or not int(norm.num_batches_tracked or 0):
                norm.load_state_dict(before[norm])
    if not done:
        what, got = (
            ("finite images and weights", "NaN or infinity") if seen else ("batches of two images or more", "none")
        )
        raise DataError(f"expected {what} to recalibrate BatchNorm, got {got}")
    return model


def _average(norms: Sequence[Any], team: Team) -> None:
    """Statistics of every process, weighted by its chunks."""
    if team.size == 1:
        return
    weights = [norm.num_batches_tracked.double() for norm in norms]
    sums = [weight * statistic.double() for norm, weight in zip(norms, weights, strict=True)
            for statistic in _statistics(norm)]  # fmt: skip
    team.sum([*weights, *sums])
    for norm, weight, mean, var in zip(norms, weights, sums[0::2], sums[1::2], strict=True):
        norm.num_batches_tracked.copy_(weight)
        if weight:
            norm.running_mean.copy_(mean / weight)
            norm.running_var.copy_(var / weight)


def _statistics(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return norm.running_mean, norm.running_var
