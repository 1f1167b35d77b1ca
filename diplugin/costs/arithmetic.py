"""Costs that follow from shapes alone: multiply-accumulates, parameters, peak activation memory.

MACs here are the multiply-accumulates of convolutions and linear layers at the traced batch (1 for "per image").
Other counters disagree by what they add: torch-pruning's also counts BatchNorm, ReLU and pooling, thop's some of
those. Matrix products inside attention are not counted.
"""

from __future__ import annotations

from functools import cached_property
from math import prod

from ..network import LayerSpec, NetworkTrace, Width
from .base import SeparableCost, Term, Widths

_FLOAT_BYTES = 4


def macs(trace: NetworkTrace) -> SeparableCost:
    """Multiply-accumulates of convolutions and linear layers."""
    layers = [layer for layer in trace.layers if layer.op != "norm"]
    return SeparableCost("macs", "MAC", trace.base_widths, [_macs_term(trace, layer) for layer in layers])


def layer_macs(layer: LayerSpec, cin: int, cout: int) -> float:
    """Multiply-accumulates of one layer call with `cin` inputs and `cout` outputs."""
    if layer.op == "linear":
        return float(prod(layer.input_shape[:-1]) * cin * cout)
    window = prod(layer.kernel)
    positions = layer.input_shape if layer.op == "conv_transpose" else layer.output_shape
    pixels = positions[0] * prod(positions[2:])
    groups = cin if layer.depthwise else layer.groups
    return float(pixels * window * cin * cout // groups)


def _macs_term(trace: NetworkTrace, layer: LayerSpec) -> Term:
    inside, outside = _sides(trace, layer)
    return Term(_groups(inside, outside), lambda w: layer_macs(layer, inside.at(w), outside.at(w)))


def _sides(trace: NetworkTrace, layer: LayerSpec) -> tuple[Width, Width]:
    inside = trace.width(layer.name, "in", layer.in_channels)
    return inside, trace.width(layer.name, "out", layer.out_channels)


def _groups(*sides: Width) -> tuple[str, ...]:
    return tuple(dict.fromkeys(group for side in sides for group, _ in side.parts))


def params(trace: NetworkTrace) -> SeparableCost:
    """Parameters of the network, buffers not counted."""
    by_layer = {layer.name: layer for layer in trace.layers}
    terms = [_params_term(trace, name, shape, by_layer) for name, shape in trace.parameters]
    return SeparableCost("params", "", trace.base_widths, terms)


def _params_term(trace: NetworkTrace, name: str, shape: tuple[int, ...], layers: dict[str, LayerSpec]) -> Term:
    owner, _, leaf = name.rpartition(".")
    layer = layers.get(owner)
    if layer is None:
        return _bare_parameter_term(trace, name, owner, shape)
    inside, outside = _sides(trace, layer)
    if layer.op == "norm" or leaf != "weight":
        per_channel = prod(shape) // layer.out_channels
        return Term(_groups(outside), lambda w: float(per_channel * outside.at(w)))
    window = prod(layer.kernel)

    def weight(widths: Widths) -> float:
        cin, cout = inside.at(widths), outside.at(widths)
        return float(window * cin * cout // (cin if layer.depthwise else layer.groups))

    return Term(_groups(inside, outside), weight)


def _bare_parameter_term(trace: NetworkTrace, name: str, owner: str, shape: tuple[int, ...]) -> Term:
    """A tensor of no traced layer: it shrinks with the groups that hold it, or its PReLU or embedding.

    Its channels lie along the last dimension that is longer than 1; a PReLU with one slope for all channels keeps it.
    """
    kinds = ("parameter", "prelu", "embedding")
    members = (m for g in trace.prunable for m in g.side("out", kinds) if m.layer in (name, owner))
    channels, holder = next((size for size in reversed(shape) if size > 1), 1), next(members, None)
    if holder is None or channels == 1:
        return Term((), lambda _: float(prod(shape)))
    rest, side = prod(shape) // channels, trace.width(holder.layer, "out", channels)
    return Term(_groups(side), lambda w: float(rest * side.at(w)))


class PeakActivationMemory:
    """Largest sum of one layer's input and output tensors, in MB (10^6 bytes) of float32.

    A runtime needs at least this much working memory for activations; tensors that a shortcut keeps alive beside
    them come on top and depend on the runtime.
    """

    name, unit = "memory_mb", "MB"

    def __init__(self, trace: NetworkTrace) -> None:
        self._base_widths = trace.base_widths
        self._terms = [_activation_term(trace, layer) for layer in trace.layers]
        self._base = self.cost(self._base_widths)

    @property
    def base(self) -> float:
        return self._base

    @property
    def sums(self) -> tuple[tuple[Term, ...], ...]:
        """A layer's memory is a sum by itself; the peak is the largest."""
        return tuple((term,) for term in self._terms)

    @cached_property
    def guide(self) -> SeparableCost:
        """A sum that falls wherever any large layer does: the sixth powers of the layers' shares of the peak.

        Of two layers that tie for the maximum, narrowing one frees nothing by itself; here it does.
        """
        peak = self.base or 1.0
        shares = [Term(t.groups, lambda w, t=t: (t.value(w) / peak) ** 6) for t in self._terms]
        total = sum(share.value(self._base_widths) for share in shares) or 1.0
        scaled = [Term(s.groups, lambda w, s=s: peak * s.value(w) / total) for s in shares]
        return SeparableCost(self.name, self.unit, self._base_widths, scaled)

    def cost(self, widths: Widths) -> float:
        return max((term.value(widths) for term in self._terms), default=0.0)

    def change(self, widths: Widths, group: str, width: int) -> float:
        return self.cost({**widths, group: width}) - self.cost(widths)


def _activation_term(trace: NetworkTrace, layer: LayerSpec) -> Term:
    """MB of a layer's input and output."""
    inside, outside = _sides(trace, layer)
    if layer.op == "norm":
        inside = outside
    read = _FLOAT_BYTES * prod(layer.input_shape) / layer.in_channels / 1e6
    written = _FLOAT_BYTES * prod(layer.output_shape) / layer.out_channels / 1e6
    return Term(_groups(inside, outside), lambda w: read * inside.at(w) + written * outside.at(w))
