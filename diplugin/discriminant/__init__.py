"""Discriminant Information: how much of the label variance the channels of a feature map explain.

Let X be one layer's feature maps on N images, flattened to [N, D] with the batch mean removed, Y [N, L] the label
targets with their mean removed, and ridge ρ > 0. Then

    DI = tr[(XᵀX + ρI)⁻¹ XᵀY YᵀX] = tr[Yᵀ K (K + ρI)⁻¹ Y],   K = XXᵀ

is the label variance that ridge regression from X explains, penalty included. With Z = (K + ρI)⁻¹Y and W_c = X_cᵀZ the
derivative of DI with respect to a mask on channel c is 2ρ‖W_c‖², so one small symmetric factorisation scores every
channel of a layer. Everything here is divided by ‖Y‖²: DI lies in [0, 1), and scores and losses of all layers share one
unit, the fraction of label variance.

`exact` and `removal` hold the functions for features at hand, in float64; `streaming` the form that runs inside a
forward hook without a copy of the maps; `directions` the few in which classes differ; `targets` turns labels into Y.

DI is due to Hou & Kung, "A Feature-map Discriminant Perspective for Pruning Deep Neural Networks" (arXiv 2005.13796);
the algebra of scores and losses is our reading of it.
"""

from __future__ import annotations

from diplugin.discriminant.directions import discriminant_directions
from diplugin.discriminant.exact import (
    absolute_ridge,
    channel_scores,
    discriminant_information,
    feature_gradient,
    perturbation_scores,
)
from diplugin.discriminant.removal import Elimination, backward_elimination, removal_losses
from diplugin.discriminant.streaming import EXACT, ChunkScores, ScoreAverage, Sketch, chunk_scores
from diplugin.discriminant.targets import label_targets, unit_targets, warn_if_saturated

__all__ = [
    "EXACT",
    "ChunkScores",
    "Elimination",
    "ScoreAverage",
    "Sketch",
    "absolute_ridge",
    "backward_elimination",
    "channel_scores",
    "chunk_scores",
    "discriminant_directions",
    "discriminant_information",
    "feature_gradient",
    "label_targets",
    "perturbation_scores",
    "removal_losses",
    "unit_targets",
    "warn_if_saturated",
]
