"""Which channels of a network are still there while a host prunes it step by step.

Scores are kept by channel of the network that was fitted. A host says which root channels of which group have left;
what they were in the fitted network was noted when the group was last scored, since by now the numbers have shifted.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .groups import ChannelGroup
from .taps import TapPoint


class Survivors:
    """For every scored tensor, the channels of the fitted network that are left, in order.

    >>> from diplugin.groups import GroupMember
    >>> point = TapPoint("b", "in")
    >>> survivors = Survivors({point: 4})
    >>> class Graph:
    ...     def __init__(self): self.history = []
    ...     def pruning_history(self): return self.history
    >>> graph = Graph()
    >>> survivors.follow(graph)
    >>> survivors.remember(("a", True), ChannelGroup("a", 4, (GroupMember("b", "in", (0, 1, 2, 3), (0, 1, 2, 3)),)))
    >>> graph.history.append(("a", True, [1]))
    >>> survivors.follow(graph)
    >>> survivors.of(point, torch.tensor([5.0, 6.0, 7.0, 8.0])), survivors.count(point), survivors.fewer
    (tensor([5., 7., 8.]), 3, True)
    """

    def __init__(self, channels: Mapping[TapPoint, int]) -> None:
        self._alive = {point: torch.arange(count) for point, count in channels.items()}
        self._read: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._known: dict[Hashable, list[tuple[TapPoint, Tensor, Tensor]]] = {}
        self.fewer = False

    def of(self, point: TapPoint, scores: Tensor) -> Tensor:
        """The scores of the channels that are left; all of them for a tensor that is not followed."""
        return scores[self._alive[point]] if point in self._alive else scores

    def count(self, point: TapPoint) -> int | None:
        """Channels that a tensor should have now; None for one that was not scored."""
        return len(self._alive[point]) if point in self._alive else None

    def remember(self, key: tuple[str, bool], group: ChannelGroup) -> None:
        """Note which channels of the fitted network a full group's root channels stand for.

        Args:
            key: what the history calls the group: its root layer's name, and whether its outputs are pruned.
        """
        self._known[key] = [
            (point, self._alive[point][list(member.channels)], torch.tensor(member.roots))
            for member in group.members
            if (point := TapPoint(member.layer, member.side)) in self._alive
        ]

    def follow(self, graph: Any) -> None:
        """Take out the channels that left since the last look at the history of this graph, or of any seen before.

        Args:
            graph: has a `pruning_history()` of (root layer, whether its outputs were pruned, indices).
        """
        self._read.setdefault(graph, len(graph.pruning_history()))
        for known, start in list(self._read.items()):
            history = known.pruning_history()
            self._read[known] = len(history)
            for name, is_out, indices in history[start:]:
                self._leave((name, bool(is_out)), indices)

    def _leave(self, key: tuple[str, bool], indices: Iterable[int]) -> None:
        for point, originals, roots in self._known.pop(key, []):
            gone = originals[torch.isin(roots, torch.tensor(list(indices)))]
            self._alive[point] = self._alive[point][~torch.isin(self._alive[point], gone)]
            self.fewer = True
