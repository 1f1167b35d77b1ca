"""Where DI looks: which tensors are scored for a channel group.

A *tap* is an object that picks members of a group; the tensor at each of them is scored as a whole (a channel's score
depends on the channels beside it), and the scores of its channels are summed onto the group's root channels, which is
exact for the squared Frobenius norms that first-order DI consists of. What several tensors say of one channel is put
together by the tap's `combine` object, their sum unless told otherwise: a channel of a residual stream costs work in
every layer that reads it, and its loss must grow with them as its cost does. (Measured on a small residual network
with projected shortcuts, CIFAR-10, one threshold for losses per MAC, no training, top-1 at 70 / 50 / 30 % MACs: sum
53.1 / 46.2 / 40.7, mean 49.2 / 28.0 / 25.1, maximum 48.3 / 34.2 / 22.9.)

- `AfterActivation` (default): what the group's *readers* read, the input of the next convolution or linear layer, so
  behind normalisation, activation, pooling, shortcut sum, concatenation or gate, however the model's forward spells
  them. Best or equal in every measurement.
- `AtLayer`: what its *producers* write, the output of the convolution or linear layer itself. As good, and needed
  where nothing reads.
- `AtNorm`: the output of its normalisation layers. For comparison: its scale hides the signal.

What that means for every kind of group, each checked against brute force (remove the channel, measure DI again):

| kind of group | tensors scored by default | why |
|---|---|---|
| chain: conv 1d to 3d, transposed, linear | input of the next layer | all that the network still knows of the channel |
| residual sum | input of every layer that reads the stream | the stream after the sum, not one branch |
| concatenation, reordered or not | the reader's input, at the channels' own offsets | scored beside its neighbours |
| split, chunk | the inputs of the pieces' readers | each piece speaks for its own roots |
| flatten to linear | the linear layer's input, its positions summed per channel | squared norms add up exactly |
| depthwise | the pointwise layer behind it | the depthwise layer adds no channel and removes none |
| grouped conv | its input, or its reader's; channels of one unit are summed | blocks lose the same positions |
| LayerNorm, GroupNorm | what is read behind it | its statistics run over the channels |
| attention | input of the output projection | there heads become information |
| squeeze and excitation | pooled input of the gate, and the gated maps | both readers lose the channel |
| module called twice | the mean of its calls, as one tensor | one set of weights, read at two depths |
| several inputs or outputs | readers of any of them | nothing special |
| output of the model | output of its last layer | nothing in the network reads it |

Both adapters and `scoring` ask here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .groups import ChannelGroup, GroupMember, Side

_NORM_KINDS = ("batch_norm", "layer_norm", "group_norm", "instance_norm")


@dataclass(frozen=True, order=True)
class TapPoint:
    """One tensor of the network: the input ("in") or output ("out") of a layer."""

    layer: str
    side: Side


@runtime_checkable
class Tap(Protocol):
    """Chooses the members of a group whose tensors are scored; none means that the group cannot be scored."""

    def members(self, group: ChannelGroup) -> tuple[GroupMember, ...]: ...


class Combine(Protocol):
    """One score a channel from what several tensors say: [tensors, channels] -> [channels].

    NaN marks a channel that a tensor does not hold; every channel is held by one tensor at least.
    """

    def __call__(self, scores: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Mean:
    """The average over the tensors that hold the channel."""

    def __call__(self, scores: Tensor) -> Tensor:
        return scores.nanmean(0)


@dataclass(frozen=True)
class Total:
    """The sum: a channel that many layers read counts for each of them."""

    def __call__(self, scores: Tensor) -> Tensor:
        return scores.nansum(0)


@dataclass(frozen=True)
class Largest:
    """The score where the channel matters most."""

    def __call__(self, scores: Tensor) -> Tensor:
        return scores.nan_to_num(-torch.inf).amax(0)


@dataclass(frozen=True)
class AtLayer:
    """Score the output of the convolutions and linear layers that produce the channels."""

    combine: Combine = Total()

    def members(self, group: ChannelGroup) -> tuple[GroupMember, ...]:
        return group.side("out") or group.side("out", ("depthwise",))


@dataclass(frozen=True)
class AfterActivation:
    """Score the channels as the next convolutions and linear layers read them."""

    combine: Combine = Total()

    def members(self, group: ChannelGroup) -> tuple[GroupMember, ...]:
        readers = group.side("in") or group.side("in", ("depthwise",))
        return readers or AtLayer().members(group)


@dataclass(frozen=True)
class AtNorm:
    """Score the output of the group's normalisation layers, falling back to the producers'."""

    combine: Combine = Total()

    def members(self, group: ChannelGroup) -> tuple[GroupMember, ...]:
        return group.side("out", _NORM_KINDS) or AtLayer().members(group)


def points_of(groups: Sequence[ChannelGroup], tap: Tap) -> tuple[TapPoint, ...]:
    """Every tensor that the tap wants for these groups, once."""
    return tuple(dict.fromkeys(TapPoint(m.layer, m.side) for g in groups for m in tap.members(g)))


def root_scores(group: ChannelGroup, tap: Tap, at: Callable[[TapPoint], Tensor | None]) -> Tensor | None:
    """Scores of a group's root channels from the scores of the tapped tensors' channels.

    Args:
        at: scores [channels of that tensor] of a tap point, None where the layer never ran.

    Returns:
        float64 [group.channels]; None if none of the tensors ran. A channel that only tensors which never ran hold
        is given the group's largest score: nothing is known against it.
    """
    rows: list[Tensor] = []
    for member in tap.members(group):
        scores = at(TapPoint(member.layer, member.side))
        if scores is not None:
            channels, roots = torch.tensor(member.channels), torch.tensor(member.roots)
            row = torch.zeros(group.channels, dtype=torch.float64)
            row.index_add_(0, roots, scores[channels].to(row))
            held = torch.zeros(group.channels, dtype=torch.bool).index_fill_(0, roots, True)
            rows.append(row.masked_fill(~held, torch.nan))
    if not rows:
        return None
    stacked = torch.stack(rows)
    known = ~stacked.isnan().all(0)
    combine: Combine = getattr(tap, "combine", Total())
    combined = torch.zeros(group.channels, dtype=torch.float64)
    combined[known] = combine(stacked[:, known])
    combined[~known] = combined[known].max()
    return combined
