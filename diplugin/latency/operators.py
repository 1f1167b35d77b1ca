"""A network as a few numbers that explain its time: the features of the per-operator latency model.

Time is modelled as a sum over operators of multiply-accumulates (by kind: a depthwise one costs an order of magnitude
more than a dense one), bytes moved, and calls. Every coefficient is a price and none is negative.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from ..network import LayerSpec

FEATURES = (
    "dense_macs", "point_macs", "depthwise_macs", "grouped_macs", "linear_macs", "dense_bytes", "point_bytes",
    "depthwise_bytes", "grouped_bytes", "weight_bytes", "calls", "depthwise_calls", "soft_bytes", "soft_calls",
    "plain_bytes", "norm_bytes", "pool_bytes", "add_bytes",
)  # fmt: skip
# Activations that runtimes do not fuse into the layer before them.
SOFT = ("silu", "hardswish", "gelu", "sigmoid", "hardsigmoid", "leaky_relu", "tanh")
_FLOAT = 4


def kind_of(layer: LayerSpec) -> str:
    """ "dense", "point" (1x1), "depthwise", "grouped" or "linear"."""
    if layer.op == "linear":
        return "linear"
    if layer.depthwise:
        return "depthwise"
    if layer.groups > 1:
        return "grouped"
    return "point" if prod(layer.kernel) == 1 else "dense"


def layer_features(layer: LayerSpec) -> dict[str, float]:
    """One layer call's share of every feature that it has.

    `plain_bytes` are of layers without an activation: what follows them is mostly an addition of its own.
    """
    read, written = prod(layer.input_shape), prod(layer.output_shape)
    if layer.op == "norm":
        return {"norm_bytes": float(_FLOAT * (read + written))}
    kind = kind_of(layer)
    per_output = layer.in_channels if kind == "linear" else prod(layer.kernel) * layer.in_channels // layer.groups
    weights = per_output * layer.out_channels
    positions = read // layer.in_channels if layer.op == "conv_transpose" else written // layer.out_channels
    features = {
        f"{kind}_macs": float(positions * weights), f"{'point' if kind == 'linear' else kind}_bytes":
        float(_FLOAT * (read + written)), "weight_bytes": float(_FLOAT * weights), "calls": 1.0,
    }  # fmt: skip
    if kind == "depthwise":
        features["depthwise_calls"] = 1.0
    if layer.activation in SOFT:
        features |= {"soft_bytes": 2.0 * _FLOAT * written, "soft_calls": 1.0}
    if layer.activation is None:
        features["plain_bytes"] = 2.0 * _FLOAT * written
    return features


def network_features(layers: Iterable[LayerSpec]) -> list[float]:
    """All features of a network, in the order of `FEATURES`."""
    total: dict[str, float] = dict.fromkeys(FEATURES, 0.0)
    for layer in layers:
        for name, value in layer_features(layer).items():
            total[name] += value
    return list(total.values())
